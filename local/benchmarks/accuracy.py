"""Measure accuracy: a ladder from the public starter's rule to the best recipe, on the same photos and encoders.

Called by local/benchmark.py. The numbers report what was chosen elsewhere; nothing may be chosen by them.
"""

import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from kernel.bank import classify, read_banks
from kernel.inputs import InputError
from kernel.manifest import Manifest, read_weights
from kernel.metadata_prior import weighted_prior
from kernel.observations import Observation, read_test
from kernel.tables import RESOLUTIONS
from local.banks.ensemble import weigh
from local.banks.estimators import group_means, pool, unit
from local.banks.search import compare
from local.base.console import counted, say
from local.base.files import write_json
from local.base.metrics import GUESSES, bounded, gained, hit_matrix, interval_of, score
from local.base.run_folder import CACHE
from local.data.cache import embed_with_run
from local.data.competition import Labelled, labelled, places_of, read_competition
from local.data.folder import find_competition
from local.drawing.competition import generate
from local.recipes.recipe import read_recipe
from local.rehearsal.trial import read_solution
from local.training.run import train_run

RECIPES = ("fungiclef-baseline", "fungiclef-protonet", "fungiclef-best")
SPECIES = 60  # of the competition that is drawn where none is given
MOST_SHOTS = 4  # classes with so many reference observations or more are told together
COLUMNS = {"recall_at_1": "Recall@1", "recall_at_5": "Recall@5", "recall_at_10": "Recall@10", "macro_f1": "macro-F1"}


@dataclass(frozen=True)
class Task:
    """What a dataset asks, and what may answer it.

    Attributes:
        data: the competition's folder.
        split: "test", or "val" where the test answers are not known; then no training sees val.
        reference: "train" or "train+val", of which the prototypes are made.
        truth: class id of each observation asked, by the observation's id.
    """

    data: Path
    split: str
    reference: str
    truth: dict[str, str]

    def queries(self, resolution: str) -> list[Observation]:
        """The observations asked, with photos of one of FungiCLEF's resolutions."""
        if self.split == "val":
            return labelled(read_competition(self.data, resolution), "val").observations
        return read_test(find_competition(self.data), resolution).observations

    def support(self, resolution: str) -> Labelled:
        """The reference, with photos of one of FungiCLEF's resolutions."""
        return labelled(read_competition(self.data, resolution), *self.reference.split("+"))


@dataclass(frozen=True)
class Rung:
    """What one method answers to all that is asked.

    Attributes:
        guesses: of each observation, class ids, best first.
        losses: (observations,) minus the log-probability of the true class, NaN where none was given; or None.
        below: the rung to compare with.
    """

    name: str
    guesses: list[list[str]]
    losses: np.ndarray | None = None
    below: "Rung | None" = None


def accuracy(folders: Sequence[Path], encoders: Sequence[str], reference: str, out: Path | None = None) -> dict:
    """Print the ladder of every dataset, and the same by the number of reference observations.

    Args:
        folders: competitions as downloaded, with the test answers as `solution.csv`, or with a val to ask instead;
            none draws one.
        encoders: as `--encoder` takes them; several are an ensemble too. None are the recipes' own; for what is drawn,
            one trained on other drawn fungi.
        reference: "train" or "train+val".
        out: where runs and embeddings are kept; None forgets them.

    Returns:
        All that was printed, and more, for `--json`.

    Raises:
        InputError: a folder is no competition, or has nothing to score by; an encoder cannot be had.
    """
    folders, encoders = list(folders), list(encoders)
    refuse_twins("--data", [data.resolve().name for data in folders])
    refuse_twins("--encoder", [label(spec) for spec in encoders])
    with nullcontext(out) if out else tempfile.TemporaryDirectory() as kept, tempfile.TemporaryDirectory() as drawn:
        if not folders:
            say("no --data: drawing a competition of fungi")
            folders = [draw_competition(Path(drawn))]
            encoders = encoders or [pretrain(Path(drawn))]
        tasks = [read_task(data.resolve(), reference) for data in folders]
        reports = []
        for task in tasks:
            rungs = climb(task, encoders or [read_recipe(RECIPES[0]).encoder.encoder], Path(kept))
            reports.append(report_on(task, rungs))
            say("\n" + "\n".join([*tell_ladder(reports[-1]), "", *tell_shots(reports[-1]), ""]))
    return {"datasets": reports}


def refuse_twins(option: str, names: Sequence[str]) -> None:
    """Refuse two of one name, since runs are named by them."""
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{option}: two are called {name}, and so would their runs be; rename one")


def draw_competition(folder: Path) -> Path:
    """A drawn competition, with the test answers beside its tables."""
    drawn = generate(folder / "fungi", species=SPECIES)
    shutil.copyfile(drawn.solution, drawn.competition / "solution.csv")
    return drawn.competition.rename(folder / "drawn-fungi")


def pretrain(folder: Path) -> str:
    """Train the demo's encoder on other species than the drawn competition's, as hub models come. Returns its SPEC."""
    say("no --encoder: training a small one on other drawn fungi")
    others = generate(folder / "others", species=SPECIES, seed=1)
    train_run(read_recipe("demo"), others.competition, folder / "demo")
    return keep_encoder(folder / "demo", folder / "other-fungi")


def keep_encoder(run: Path, stem: Path) -> str:
    """Write a run's timm encoder as the pair of .safetensors and .json that `--encoder` takes. Returns its SPEC."""
    weights = read_weights(run)
    spec = weights.manifest.members[0].encoder
    how = spec.preprocessing
    config = {"input_size": [3, how.size, how.size], "crop_pct": how.scale, "interpolation": how.interpolation}
    config |= {"mean": how.mean, "std": how.std}
    shutil.copyfile(weights.file(spec.file), stem.with_name(f"{stem.name}.safetensors"))
    description = {"architecture": spec.architecture, "num_classes": 0, "model_args": spec.arguments}
    write_json(description | {"pretrained_cfg": config}, stem.with_name(f"{stem.name}.json"))
    return str(stem)


def read_task(data: Path, reference: str) -> Task:
    """Ask the test set where `solution.csv` answers it, else val, which is then no part of the reference.

    Raises:
        InputError: there is neither, or the solution is of other observations.
    """
    competition = read_competition(data)
    solution = data / "solution.csv"
    if solution.is_file():
        task = Task(data, "test", reference, read_solution(solution))
        lacking = [query.id for query in task.queries(competition.resolution) if query.id not in task.truth]
        if lacking:
            raise InputError(f"{solution} lacks observation {lacking[0]}: give the matching solution")
        return task
    if not competition.has_val:
        raise InputError(f"{data} has neither a solution.csv nor a val: there is nothing to score by")
    val = labelled(competition, "val")
    ids = [observation.id for observation in val.observations]
    return Task(data, "val", "train", dict(zip(ids, val.class_ids, strict=True)))


def label(encoder: str) -> str:
    """A short name of an encoder: of its files, or its place on a hub."""
    kind, _, name = encoder.rpartition(":")
    return re.sub(r"[^\w.-]+", "-", name if kind else Path(encoder).name)


def climb(task: Task, encoders: Sequence[str], folder: Path) -> list[Rung]:
    """The rungs of every encoder, and of the ensemble of their best, from runs made under `folder`."""
    rungs, best, cache = [], [], folder / CACHE
    for spec in encoders:
        of = f", {label(spec)}" if len(encoders) > 1 else ""
        runs = [folder / f"{task.data.name}-{label(spec)}-{name}" for name in RECIPES]
        for name, run in zip(RECIPES, runs, strict=True):
            recipe = read_recipe(name, [f"reference={task.reference}"], spec)
            train_run(recipe, task.data, run, uses_val=task.split != "val")
        rungs += photo_rungs(task, runs[0], cache, of)
        for name, run in zip(RECIPES, runs, strict=True):
            rungs.append(run_rung(task, [run], [1.0], cache, name + of, rungs[-1]))
        best.append((runs[-1], rungs[-1]))
    if len(best) > 1:
        runs = [run for run, _ in best]
        shares = weigh(runs, find_competition(task.data).competition.guesses)
        below = best[int(np.argmax(shares))][1]  # the weightiest by cross-validation, not by what is asked here
        rungs.append(run_rung(task, runs, shares, cache, "their ensemble", below))
    return rungs


def photo_rungs(task: Task, run: Path, cache: Path, of: str) -> list[Rung]:
    """The two rules that match photos, not observations: raw class means of photos, in one view, nothing centred.

    Args:
        run: of the baseline, for its encoder and its classes.
        of: what to end the names with.
    """
    weights = read_weights(run)
    manifest = weights.manifest
    classes, resolution = manifest.class_ids, manifest.competition.resolution
    support, queries = task.support(resolution), task.queries(resolution)
    known = embed_with_run(run, support.observations, ["plain"], cache)
    asked = embed_with_run(run, queries, ["plain"], cache)
    owners = places_of(support.class_ids, classes)[known.observations]
    means, _ = group_means(known.values[:, 0].astype(float), owners, len(classes))
    photos = asked.values[:, 0].astype(float)

    rows = nearest_means(photos, asked.observations, means, len(queries))
    guesses = [[classes[place] for place in row] or list(manifest.fallback_classes[:1]) for row in rows]
    starter = Rung("starter: top-1 of each photo" + of, guesses)

    # The published prototypical network's, before its training: minus the distance, averaged over photos.
    distances = torch.cdist(torch.tensor(photos), torch.tensor(means)).numpy()
    scores = torch.tensor(-group_means(distances, asked.observations, len(queries))[0])
    seen = np.isin(np.arange(len(queries)), asked.observations)
    averaged = rank_rung(task, queries, manifest, scores.log_softmax(dim=1), seen, "raw photo means" + of, starter)
    return [starter, averaged]


def nearest_means(photos: np.ndarray, observations: np.ndarray, means: np.ndarray, count: int) -> list[list[int]]:
    """The starter's rule: the class of the nearest mean by cosine of each photo, and nothing else in the row.

    Args:
        photos: (photos, features).
        observations: (photos,) the place of each photo's observation, 0 to `count` - 1.
        means: (classes, features).

    Returns:
        Of each observation, distinct places of classes, the most similar first.
    """
    cosines = unit(photos) @ unit(means).T
    nearest = cosines.argmax(axis=1)
    rows: list[dict[int, None]] = [{} for _ in range(count)]
    for photo in np.argsort(-cosines.max(axis=1), kind="stable"):
        rows[observations[photo]][int(nearest[photo])] = None
    return [list(row) for row in rows]


@dataclass(frozen=True)
class BundleAnswers:
    """What a bundle says of all that is asked.

    Attributes:
        queries: that were asked.
        manifest: of the first run.
        log_probabilities: (queries, classes).
        seen: (queries,) bool, those with a readable photo.
    """

    queries: list[Observation]
    manifest: Manifest
    log_probabilities: torch.Tensor
    seen: np.ndarray


def bundle_answers(task: Task, runs: Sequence[Path], shares: Sequence[float], cache: Path) -> BundleAnswers:
    """What the bundle of some runs answers, its members weighed by `shares`."""
    opened = [(run, read_weights(run).manifest, share) for run, share in zip(runs, shares, strict=True) if share]
    # All members of a bundle see the photos of the largest resolution among them.
    resolution = max((manifest.competition.resolution for _, manifest, _ in opened), key=RESOLUTIONS.index)
    queries = task.queries(resolution)
    total, seen = 0, np.ones(len(queries), dtype=bool)
    for run, manifest, share in opened:
        member = manifest.members[0]
        photos = embed_with_run(run, queries, member.views, cache)
        embeddings = pool(photos.values, photos.observations, len(queries), member.pooling)
        banks = read_banks(read_weights(run).file(member.bank))
        total += share * torch.cat(list(classify(banks, torch.tensor(embeddings, dtype=torch.float32))))
        said = weighted_prior(read_weights(run), [replace(member, weight=share)], queries)
        total += 0 if said is None else said
        seen &= np.isin(np.arange(len(queries)), photos.observations)
    return BundleAnswers(queries, opened[0][1], total.log_softmax(dim=1), seen)


def run_rung(
    task: Task, runs: Sequence[Path], shares: Sequence[float], cache: Path, name: str, below: Rung | None
) -> Rung:
    """The rung of some runs; see `bundle_answers`."""
    found = bundle_answers(task, runs, shares, cache)
    return rank_rung(task, found.queries, found.manifest, found.log_probabilities, found.seen, name, below)


def rank_rung(
    task: Task,
    queries: Sequence[Observation],
    manifest: Manifest,
    log_probabilities: torch.Tensor,
    seen: np.ndarray,
    name: str,
    below: Rung | None,
) -> Rung:
    """The rung of (queries, classes) log-probabilities; where no photo could be read, the kernel's fallback."""
    classes = manifest.class_ids
    truth = places_of(np.array([task.truth[query.id] for query in queries], dtype=object), classes)
    outcome = compare(log_probabilities, truth)
    guesses = [
        [classes[place] for place in row] if is_seen else list(manifest.fallback_classes)
        for row, is_seen in zip(outcome.top, seen, strict=True)
    ]
    return Rung(name, guesses, np.where(seen, outcome.losses, np.nan), below)


def report_on(task: Task, rungs: Sequence[Rung]) -> dict:
    """Scores of every rung with 95% intervals, its gain over the one below, and recalls by shots."""
    support = task.support(RESOLUTIONS[0])
    truth = [task.truth[query.id] for query in task.queries(RESOLUTIONS[0])]
    counts = dict(zip(*np.unique(support.class_ids.astype(str), return_counts=True), strict=True))
    shots = np.minimum([counts.get(class_id, 0) for class_id in truth], MOST_SHOTS)
    hits = {rung.name: hit_matrix(truth, rung.guesses)[:, GUESSES.index(5)] for rung in rungs}
    return {
        "data": task.data.name,
        "scored_on": task.split,
        "observations": len(truth),
        "reference": task.reference,
        "reference_observations": len(support),
        "classes": len(counts),
        "rungs": [row_of(rung, truth, hits) for rung in rungs],
        "by_shots": [
            {
                "shots": f"{count} or more" if count == MOST_SHOTS else str(count),
                "observations": int((shots == count).sum()),
                "recall_at_5": {name: bounded(own[shots == count]) for name, own in hits.items()},
            }
            for count in np.unique(shots).tolist()
        ],
    }


def row_of(rung: Rung, truth: Sequence[str], hits: dict[str, np.ndarray]) -> dict:
    """One rung's scores; `hits` of each rung, by name, are those of Recall@5."""
    row = {"rung": rung.name, **score(truth, rung.guesses), "log_loss": None, "gain": None}
    if rung.losses is not None:
        row["log_loss"] = bounded(rung.losses[~np.isnan(rung.losses)])
    if rung.below:
        row["gain"] = {"over": rung.below.name, **gained(hits[rung.name], hits[rung.below.name])}
    return row


def tell_ladder(report: dict) -> list[str]:
    """The ladder as a table, best at the bottom."""
    asked, reference = (counted(report[key], "observation") for key in ("observations", "reference_observations"))
    lines = [
        f"{report['data']}: {asked} of {report['scored_on']}, 95% intervals; reference: "
        f"{report['reference']}, {reference} of {counted(report['classes'], 'class')}",
        "",
        *heading("rung", *COLUMNS.values(), "log-loss", "gain in Recall@5"),
    ]
    for row in report["rungs"]:
        cells = [*(cell(interval_of(row, name)) for name in COLUMNS), cell(row["log_loss"]), cell(row["gain"], "+")]
        lines.append(f"| {row['rung']} | {' | '.join(cells)} |")
    return lines


def tell_shots(report: dict) -> list[str]:
    """Recall@5 by the number of reference observations of the true class, a column per rung."""
    lines = ["Recall@5 by shots, the reference observations of the true class:", ""]
    lines += heading("shots", "n", *(row["rung"] for row in report["rungs"]))
    for row in report["by_shots"]:
        cells = [cell(value) for value in row["recall_at_5"].values()]
        lines.append(f"| {row['shots']} | {row['observations']} | {' | '.join(cells)} |")
    return lines


def heading(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def cell(value: dict | None, sign: str = "") -> str:
    """`.654 [.612, .696]`, or a dash for what there is not."""
    if value is None:
        return "–"
    mean, low, high = (re.sub(r"^([+-]?)0\.", r"\1.", f"{value[name]:{sign}.3f}") for name in ("value", "low", "high"))
    return f"{mean} [{low}, {high}]"
