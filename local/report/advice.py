"""What to try next: rules that look at the figures, what can gain most first."""

from collections.abc import Callable

import numpy as np

from local.base.console import counted
from local.report.evidence import Evidence

Advice = dict | None  # what: what was found; then: what to do; observations: that it concerns


def advise(evidence: Evidence, figures: dict) -> list[dict]:
    """The advice that applies."""
    return list(filter(None, (rule(evidence, figures) for rule in RULES)))


def note(what: str, then: str, observations: int) -> Advice:
    """Advice, if it concerns any observation."""
    return {"what": what, "then": then, "observations": int(observations)} if observations else None


def reorder(evidence: Evidence, figures: dict) -> Advice:
    """The right class is among the ten, but not the first."""
    places = evidence.outcome.places
    near = ((places > 0) & (places < 10)).sum()
    if evidence.recipe.search.choose:
        then = "A stronger encoder, or a second run with other weights; `python bundle.py runs/A runs/B` weighs them."
    else:
        then = "Let cross-validation choose whitening, views, transduction and metadata: `--recipe fungiclef-best`"
    missed = (places > 0).sum()
    return note(f"{near} of {missed} misses have the right class among the other nine guesses.", then, near)


def relatives(evidence: Evidence, figures: dict) -> Advice:
    """Confusion within the rank above the species asks for detail; across it, for another way of seeing."""
    if len(evidence.ranks) < 2:
        return None
    rank = evidence.ranks[-2]
    missed = evidence.guesses != evidence.truth
    close = (missed & (rank.groups[evidence.guesses] == rank.groups[evidence.truth])).sum()
    if close * 2 >= missed.sum():
        return note(
            f"{close} of {missed.sum()} misses are in the right {rank.name}: relatives are confused.",
            "Show more detail: `--set image_size=...`, the view `larger`, or an encoder of higher resolution.",
            close,
        )
    return note(
        f"{missed.sum() - close} of {missed.sum()} misses are in a wrong {rank.name}: not even relatives.",
        "A better encoder gains most, one that was trained on photos of this kind; then `--recipe fungiclef-tuned`.",
        missed.sum() - close,
    )


def one_shot(evidence: Evidence, figures: dict) -> Advice:
    """Classes of a single observation."""
    missed = evidence.guesses != evidence.truth
    alone = missed & (evidence.shots <= 1)
    bank = evidence.recipe.bank
    draws_on_relatives = bank.genus_weight or bank.family_weight or "genus_weight" in evidence.recipe.search.choose
    if draws_on_relatives or len(evidence.ranks) < 2 or alone.sum() * 3 < missed.sum():
        return None
    return note(
        f"Of {counted(missed.sum(), 'miss')}, {alone.sum()} in classes with one observation to learn from.",
        "Draw them towards their relatives: `--set genus_weight=0.5`, or `--recipe fungiclef-best`, which chooses it.",
        alone.sum(),
    )


def views(evidence: Evidence, figures: dict) -> Advice:
    """Views that disagree are an average worth making."""
    rows = figures["trust"]["agreement"]
    split = sum(row["observations"] for row in rows if row["least"] < 1)
    if len(evidence.recipe.bank.views) > 4:
        return None
    return note(
        f"In {counted(split, 'observation')} views of one photo see different classes.",
        "Average over more of them: `--set views=plain,hflip,rotate90,rotate270,rotate15,rotate345,centre`",
        split,
    )


def metadata(evidence: Evidence, figures: dict) -> Advice:
    """Place and season that nobody asked."""
    said = sum(bool(set(query.metadata) - {"year"}) for query in evidence.queries)
    if evidence.recipe.bank.metadata_weight or "metadata_weight" in evidence.recipe.search.choose:
        return None
    return note(
        f"{counted(said, 'observation')} with place, season or substrate, which this run leaves aside.",
        "Give it a weight: `--set metadata_weight=0.5`, or `--set choose=metadata_weight`.",
        said,
    )


def reference(evidence: Evidence, figures: dict) -> Advice:
    """A validation split that the bank leaves out."""
    photos = evidence.competition.photos
    if evidence.recipe.bank.reference != "train" or not evidence.competition.has_val:
        return None
    left = photos.loc[photos["split"] == "val", "observation"].nunique()
    return note(
        f"The bank is made of train alone; val has {counted(left, 'more labelled observation')}.",
        "For a submission, train the same recipe with `--set reference=train+val`.",
        left,
    )


def temperature(evidence: Evidence, figures: dict) -> Advice:
    """Probabilities that mean something else than they say."""
    first, best = figures["trust"]["first"], figures["trust"]["best_temperature"]
    if first["error"] <= first["chance"] or best["log_loss_now"] - best["log_loss"] < 0.01:
        return None
    way = "too sure" if best["value"] > 1 else "not sure enough"
    return note(
        f"The run is {way}: it says {first['confidence']:.2f} and is right in {first['right']:.2f}. Divided by "
        f"{best['value']:.2f}, its log-probabilities would take the log-loss from {best['log_loss_now']:.3f} to "
        f"{best['log_loss']:.3f}.",
        "Ranks do not change by it; an ensemble's weights and the decisions about poisonous species do.",
        len(evidence.queries),
    )


def together(evidence: Evidence, figures: dict) -> Advice:
    """An ensemble that pays beyond its interval."""
    gains = [(other["together"]["recall_at_5"], other) for other in figures["against"]]
    gains = [(gain, other) for gain, other in gains if gain["low"] > 0 and other["is_evidence"]]
    if not gains:
        return None
    gain, other = max(gains, key=lambda pair: pair[0]["value"])
    return note(
        f"Together with {other['run']} Recall@5 is {gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}] "
        "better than with the better of the two alone.",
        f"Bundle both: `python bundle.py {evidence.run} {other['path']}`",
        np.ceil(gain["value"] * other["observations"]),
    )


def caution(evidence: Evidence, figures: dict) -> Advice:
    """Poison that a decision by expected cost would have caught."""
    deadly = figures["deadly"]
    if not deadly or deadly["careful"]["cost"]["value"] >= deadly["cost"]["value"]:
        return None
    missed, careful = deadly["kinds"]["poisonous taken for edible"], deadly["careful"]
    return note(
        f"{counted(missed, 'observation')} of poisonous species {'was' if missed == 1 else 'were'} taken for edible.",
        "Where eating is decided, warn by the summed probability of poisonous species above "
        f"{careful['threshold']:.3f}, not by the first guess: the cost falls from {deadly['cost']['value']:.2f} to "
        f"{careful['cost']['value']:.2f} an observation.",
        missed,
    )


def unreadable(evidence: Evidence, figures: dict) -> Advice:
    """Photos that failed."""
    failed = figures["photos"]["unreadable"]
    return note(
        f"{counted(len(failed), 'photo')} could not be read: see the list under Photos.",
        "Download them again: a class of one observation has nothing else.",
        len({one["observation"] for one in failed}),
    )


RULES: tuple[Callable[[Evidence, dict], Advice], ...] = (
    relatives, reorder, one_shot, together, metadata, views, caution, temperature, reference, unreadable,
)  # fmt: skip
