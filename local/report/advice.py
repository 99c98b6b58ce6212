"""What to try next: rules that look at the figures."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from local.base.console import counted
from local.report.evidence import Evidence
from local.report.failures import MISSED
from local.report.scores import SCORE_NAMES
from local.report.trust import ALL_VIEWS

if TYPE_CHECKING:
    from local.report.figures import Figures


@dataclass(frozen=True)
class Advice:
    """What was found, what to do, and how many observations it concerns."""

    what: str
    then: str
    observations: int


def advise(evidence: Evidence, figures: "Figures") -> list[Advice]:
    """The advice of every rule that applies to any observation, the most important first."""
    rules = (of_wrong_answers, of_unused_methods, of_probabilities, of_data)
    return [advice for rule in rules for advice in rule(evidence, figures) if advice.observations]


def count(is_meant: np.ndarray) -> int:
    return int(is_meant.sum())


def of_wrong_answers(evidence: Evidence, figures: "Figures") -> Iterator[Advice]:
    ranks, search = evidence.outcome.ranks, evidence.recipe.search
    missed, near = count(ranks > 0), count((ranks > 0) & (ranks < 10))
    has_taxonomy = len(evidence.ranks) > 1
    if has_taxonomy:
        wider = evidence.ranks[-2]
        close = count((ranks > 0) & (wider.groups[evidence.guesses] == wider.groups[evidence.truth]))
        if close * 2 >= missed:
            yield Advice(
                f"In {close} of {missed} wrong answers the {wider.name} is right: close relatives are confused.",
                "Show more detail: `--set image_size=...`, the view `larger`, or an encoder of higher resolution.",
                close,
            )
        else:
            yield Advice(
                f"In {missed - close} of {missed} wrong answers the {wider.name} is wrong too.",
                "Try a better encoder, best one trained on similar photos; then fine-tune it: `--recipe "
                "fungiclef-tuned`.",
                missed - close,
            )
    then = "Let cross-validation choose whitening, views, transduction and metadata: `--recipe fungiclef-best`."
    if search.choose:
        then = "Try a stronger encoder, or an ensemble with a second run: `python bundle.py runs/A runs/B`."
    yield Advice(f"In {near} of {missed} wrong answers the true class is among the ten guesses.", then, near)
    alone, bank = count((ranks > 0) & (evidence.shots <= 1)), evidence.recipe.bank
    uses_relatives = bank.genus_weight or bank.family_weight or "genus_weight" in search.choose
    if has_taxonomy and not uses_relatives and alone * 3 >= missed:
        yield Advice(
            f"{alone} of {missed} wrong answers are in classes with at most one observation in the bank.",
            "Draw these classes towards their relatives: `--set genus_weight=0.5`, or `--recipe fungiclef-best`.",
            alone,
        )


def of_unused_methods(evidence: Evidence, figures: "Figures") -> Iterator[Advice]:
    bank, metric = evidence.recipe.bank, figures.metric
    gains = [(other.ensemble_gain[metric], other) for other in figures.against if other.is_evidence]
    gain, other = max(gains, key=lambda pair: (pair[0].low > 0, pair[0].value), default=(None, None))
    if gain and gain.low > 0:
        yield Advice(
            f"Together with {other.run}, {SCORE_NAMES[metric]} is {gain.value:+.3f} [{gain.low:+.3f}, "
            f"{gain.high:+.3f}] better than that of the better run alone.",
            f"Bundle both: `python bundle.py {evidence.run} {other.path}`.",
            math.ceil(gain.value * other.observations),
        )
    if not bank.metadata_weight and "metadata_weight" not in evidence.recipe.search.choose:
        described = sum(bool(set(query.metadata) - {"year"}) for query in evidence.queries)
        yield Advice(
            f"This run ignores the metadata (location, season, substrate) of {counted(described, 'observation')}.",
            "Use it: `--set metadata_weight=0.5`, or `--set choose=metadata_weight`.",
            described,
        )
    if len(bank.views) <= 4:
        split = sum(row.observations for row in figures.trust.agreement if row.name != ALL_VIEWS)
        yield Advice(
            f"In {counted(split, 'observation')}, some views alone have another first guess.",
            "Average over more views: `--set views=plain,hflip,rotate90,rotate270,rotate15,rotate345,centre`.",
            split,
        )


def of_probabilities(evidence: Evidence, figures: "Figures") -> Iterator[Advice]:
    deadly, first, best = figures.deadly, figures.trust.first, figures.trust.best_temperature
    if deadly and deadly.careful_cost.value < deadly.cost.value:
        missed = deadly.counts[MISSED]
        yield Advice(
            f"{counted(missed, 'observation')} of poisonous species {'was' if missed == 1 else 'were'} taken for "
            "edible.",
            "To decide about eating, warn if poisonous species together have a probability above "
            f"{deadly.threshold:.3f}, whatever the first guess: the mean cost falls from {deadly.cost.value:.2f} to "
            f"{deadly.careful_cost.value:.2f}.",
            missed,
        )
    if first.error > first.chance and best.log_loss_now - best.log_loss >= 0.01:
        way = "overconfident" if best.value > 1 else "underconfident"
        yield Advice(
            f"The run is {way}: its mean confidence is {first.confidence:.2f}, its accuracy {first.right:.2f}. "
            f"Dividing its log-probabilities by {best.value:.2f} would lower the log-loss from "
            f"{best.log_loss_now:.3f} to {best.log_loss:.3f}.",
            "The order of the guesses would stay the same; only decisions by probability would change, such as "
            "warnings of poisonous species, and a log-loss.",
            len(evidence.queries),
        )


def of_data(evidence: Evidence, figures: "Figures") -> Iterator[Advice]:
    left, failed = count(evidence.labelled.is_val), figures.unreadable
    if evidence.recipe.bank.reference == "train":
        yield Advice(
            f"The bank is made of train alone; val has {counted(left, 'more labelled observation')}.",
            "For a submission, train the same recipe with `--set reference=train+val`.",
            left,
        )
    yield Advice(
        f"{counted(len(failed), 'photo')} could not be read: see “Photos that could not be read” under Errors.",
        "Download them again: a class of one observation has no other photo.",
        len({photo.observation for photo in failed}),
    )
