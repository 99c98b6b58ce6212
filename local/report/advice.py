"""What to try next: rules that look at the figures, the largest gain first."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from local.base.console import counted
from local.report.evidence import Evidence
from local.report.scores import METRIC_NAMES

if TYPE_CHECKING:
    from local.report.figures import Figures


@dataclass(frozen=True)
class Advice:
    """What was found, what to do, and how many observations it concerns."""

    what: str
    then: str
    observations: int


def advise(evidence: Evidence, figures: "Figures") -> list[Advice]:
    """The advice of every rule that applies."""
    return list(filter(None, (rule(evidence, figures) for rule in RULES)))


def advice_for(observations: int, what: str, then: str) -> Advice | None:
    """Advice, if it concerns any observation."""
    return Advice(what, then, int(observations)) if observations else None


def reorder(evidence: Evidence, figures: "Figures") -> Advice | None:
    """The true class is among the ten guesses, but not the first."""
    positions = evidence.outcome.ranks
    near, missed = ((positions > 0) & (positions < 10)).sum(), (positions > 0).sum()
    if evidence.recipe.search.choose:
        then = "Try a stronger encoder, or an ensemble with a second run: `python bundle.py runs/A runs/B`."
    else:
        then = "Let cross-validation choose whitening, views, transduction and metadata: `--recipe fungiclef-best`."
    return advice_for(near, f"In {near} of {missed} wrong answers the true class is among the ten guesses.", then)


def relatives(evidence: Evidence, figures: "Figures") -> Advice | None:
    """Most mistakes are within the rank above the species, or most are not."""
    if len(evidence.ranks) < 2:
        return None
    rank = evidence.ranks[-2]
    is_missed = evidence.guesses != evidence.truth
    close = (is_missed & (rank.groups[evidence.guesses] == rank.groups[evidence.truth])).sum()
    missed = is_missed.sum()
    if close * 2 >= missed:
        return advice_for(
            close,
            f"In {close} of {missed} wrong answers the {rank.name} is right: close relatives are confused.",
            "Show more detail: `--set image_size=...`, the view `larger`, or an encoder of higher resolution.",
        )
    return advice_for(
        missed - close,
        f"In {missed - close} of {missed} wrong answers the {rank.name} is wrong too.",
        "Try a better encoder, best one trained on similar photos; then fine-tune it: `--recipe fungiclef-tuned`.",
    )


def one_shot(evidence: Evidence, figures: "Figures") -> Advice | None:
    """Many mistakes are in classes of a single observation."""
    is_missed = evidence.guesses != evidence.truth
    alone = (is_missed & (evidence.shots <= 1)).sum()
    bank = evidence.recipe.bank
    uses_relatives = bank.genus_weight or bank.family_weight or "genus_weight" in evidence.recipe.search.choose
    if uses_relatives or len(evidence.ranks) < 2 or alone * 3 < is_missed.sum():
        return None
    return advice_for(
        alone,
        f"{alone} of {is_missed.sum()} wrong answers are in classes with at most one observation in the bank.",
        "Draw these classes towards their relatives: `--set genus_weight=0.5`, or `--recipe fungiclef-best`.",
    )


def views(evidence: Evidence, figures: "Figures") -> Advice | None:
    """Views of one photo disagree, and there are few views."""
    split = sum(row.observations for row in figures.trust.agreement if row.least < 1)
    if len(evidence.recipe.bank.views) > 4:
        return None
    return advice_for(
        split,
        f"In {counted(split, 'observation')}, views of the same photo resemble different classes.",
        "Average over more views: `--set views=plain,hflip,rotate90,rotate270,rotate15,rotate345,centre`.",
    )


def metadata(evidence: Evidence, figures: "Figures") -> Advice | None:
    """The run ignores location and season."""
    described = sum(bool(set(query.metadata) - {"year"}) for query in evidence.queries)
    if evidence.recipe.bank.metadata_weight or "metadata_weight" in evidence.recipe.search.choose:
        return None
    return advice_for(
        described,
        f"This run ignores the metadata (location, season, substrate) of {counted(described, 'observation')}.",
        "Use it: `--set metadata_weight=0.5`, or `--set choose=metadata_weight`.",
    )


def reference(evidence: Evidence, figures: "Figures") -> Advice | None:
    """The bank leaves out the validation split."""
    if evidence.recipe.bank.reference != "train" or not evidence.labelled.has_val:
        return None
    left = int(evidence.labelled.is_val.sum())
    return advice_for(
        left,
        f"The bank is made of train alone; val has {counted(left, 'more labelled observation')}.",
        "For a submission, train the same recipe with `--set reference=train+val`.",
    )


def temperature(evidence: Evidence, figures: "Figures") -> Advice | None:
    """Probabilities are too high or too low."""
    first, best = figures.trust.first, figures.trust.best_temperature
    if first.error <= first.chance or best.log_loss_now - best.log_loss < 0.01:
        return None
    way = "overconfident" if best.value > 1 else "underconfident"
    return advice_for(
        len(evidence.queries),
        f"The run is {way}: its mean confidence is {first.confidence:.2f}, its accuracy {first.right:.2f}. Dividing "
        f"its log-probabilities by {best.value:.2f} would lower the log-loss from {best.log_loss_now:.3f} to "
        f"{best.log_loss:.3f}.",
        "The order of the guesses would stay the same; only decisions by probability would change, such as warnings "
        "of poisonous species.",
    )


def ensemble(evidence: Evidence, figures: "Figures") -> Advice | None:
    """An ensemble with another run is better by the competition's metric, beyond the interval."""
    metric = figures.leaderboard.metric
    gains = [(other.ensemble_gain[metric], other) for other in figures.against if other.is_evidence]
    gains = [(gain, other) for gain, other in gains if gain.low > 0]
    if not gains:
        return None
    gain, other = max(gains, key=lambda pair: pair[0].value)
    return advice_for(
        np.ceil(gain.value * other.observations),
        f"Together with {other.run}, {METRIC_NAMES[metric]} is {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] "
        "better than that of the better run alone.",
        f"Bundle both: `python bundle.py {evidence.run} {other.path}`.",
    )


def poisonous(evidence: Evidence, figures: "Figures") -> Advice | None:
    """Warning by the expected cost would be cheaper than warning by the first guess."""
    deadly = figures.deadly
    if not deadly or deadly.careful.cost.value >= deadly.cost.value:
        return None
    missed, careful = deadly.counts["poisonous taken for edible"], deadly.careful
    return advice_for(
        missed,
        f"{counted(missed, 'observation')} of poisonous species {'was' if missed == 1 else 'were'} taken for edible.",
        f"To decide about eating, warn if poisonous species together have a probability above {careful.threshold:.3f}, "
        f"whatever the first guess: the mean cost falls from {deadly.cost.value:.2f} to {careful.cost.value:.2f}.",
    )


def unreadable(evidence: Evidence, figures: "Figures") -> Advice | None:
    """Photos could not be read."""
    failed = figures.unreadable
    return advice_for(
        len({photo.observation for photo in failed}),
        f"{counted(len(failed), 'photo')} could not be read; they are listed above.",
        "Download them again: a class of one observation has no other photo.",
    )


RULES: tuple[Callable[[Evidence, "Figures"], Advice | None], ...] = (
    relatives, reorder, one_shot, ensemble, metadata, views, poisonous, temperature, reference, unreadable,
)  # fmt: skip
