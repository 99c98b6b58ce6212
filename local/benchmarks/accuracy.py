"""Compare methods, from the rule of the public starter notebook to the best recipe, on the same photos and encoders.

Called by local/benchmark.py. Nothing may be chosen by these scores: they are of the test set.
"""

import re
import shutil
import tempfile
from collections import Counter
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
from local.banks.ensemble import ensemble_weights
from local.banks.estimators import group_means, l2_normalize, pool
from local.banks.search import evaluate_predictions
from local.base.console import counted, say
from local.base.files import write_json
from local.base.metrics import GUESSES, METRIC_NAMES, bounded, gained, hit_matrix, interval_of, score
from local.base.run_folder import CACHE
from local.data.competition import read_competition
from local.data.embedding import embed_with_run
from local.data.folder import find_competition
from local.data.observations import LabelledObservations, encode_labels
from local.data.solution import read_solution
from local.drawing.competition import generate
from local.recipes.recipe import read_recipe
from local.training.run import train_run

RECIPES = ("fungiclef-baseline", "fungiclef-protonet", "fungiclef-best")
SPECIES = 60  # of the competition that is drawn without --data
MOST_SHOTS = 4  # classes with so many reference observations or more are one group


@dataclass(frozen=True)
class Task:
    """The queries of a dataset, and the reference set that may answer them.

    Attributes:
        data: the folder of the competition.
        split: of the queries: "test", or "val" if the test labels are unknown; then no training sees val.
        reference: "train" or "train+val", of which the prototypes are made.
        truth: by the id of each query, its class id.
    """

    data: Path
    split: str
    reference: str
    truth: dict[str, str]

    def queries(self, resolution: str) -> list[Observation]:
        if self.split == "val":
            return read_competition(self.data, resolution).in_splits("val").observations
        return read_test(find_competition(self.data), resolution).observations

    def support(self, resolution: str) -> LabelledObservations:
        return read_competition(self.data, resolution).in_splits(*self.reference.split("+"))


@dataclass(frozen=True)
class MethodAnswers:
    """The answers of one method to all queries.

    Attributes:
        guesses: for each query, class ids, best first.
        losses: (queries,) log-losses, NaN if there is none; None for a method without probabilities.
        baseline: the answers to compare with.
    """

    name: str
    guesses: list[list[str]]
    losses: np.ndarray | None = None
    baseline: "MethodAnswers | None" = None


def accuracy(folders: Sequence[Path], encoders: Sequence[str], reference: str, out: Path | None = None) -> dict:
    """Print the scores of all methods on every dataset, over all queries and by the number of shots.

    Args:
        folders: competitions as downloaded, with the test labels as `solution.csv`, or else with a val split to score
            on. Without folders, a competition is drawn.
        encoders: as in `--encoder`; several are also scored as an ensemble. The default is the encoder of the recipes,
            or for a drawn competition one that is trained on other drawn fungi.
        reference: "train" or "train+val".
        out: the folder in which to keep runs and embeddings; None keeps none.

    Returns:
        The figures, for `--json`.

    Raises:
        InputError: a folder is not a competition or has nothing to score on; an encoder cannot be found.
    """
    folders, encoders = list(folders), list(encoders)
    require_unique("--data", [data.resolve().name for data in folders])
    require_unique("--encoder", [label(spec) for spec in encoders])
    with nullcontext(out) if out else tempfile.TemporaryDirectory() as kept, tempfile.TemporaryDirectory() as drawn:
        if not folders:
            say("no --data: drawing a competition of fungi")
            folders = [draw_competition(Path(drawn))]
            encoders = encoders or [pretrain(Path(drawn))]
        tasks = [read_task(data.resolve(), reference) for data in folders]
        reports = []
        for task in tasks:
            answers = run_methods(task, encoders or [read_recipe(RECIPES[0]).encoder.each[0].name], Path(kept))
            reports.append(score_methods(task, answers))
            say("\n" + "\n".join([*method_table(reports[-1]), "", *shots_table(reports[-1]), ""]))
    return {"datasets": reports}


def require_unique(option: str, names: Sequence[str]) -> None:
    """Check that no two names are the same, because runs are named after them."""
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{option}: two values are named {name}, and so would be their runs; rename one")


def draw_competition(folder: Path) -> Path:
    drawn = generate(folder / "fungi", species=SPECIES)
    shutil.copyfile(drawn.solution, drawn.competition / "solution.csv")
    return drawn.competition.rename(folder / "drawn-fungi")


def pretrain(folder: Path) -> str:
    """Train the encoder of the demo on other species, as a model from a hub is. Returns its SPEC."""
    say("no --encoder: training a small one on other drawn fungi")
    others = generate(folder / "others", species=SPECIES, seed=1)
    train_run(read_recipe("demo"), others.competition, folder / "demo")
    return export_encoder(folder / "demo", folder / "other-fungi")


def export_encoder(run: Path, stem: Path) -> str:
    """Write the timm encoder of a run as a pair of .safetensors and .json for `--encoder`. Returns its SPEC."""
    weights = read_weights(run)
    [spec] = weights.manifest.members[0].encoders
    how = spec.preprocessing
    config = {"input_size": [3, how.size, how.size], "crop_pct": how.crop_pct, "interpolation": how.interpolation}
    crop_mode = {"crop": "center", "squash": "squash"}[how.resize_mode]
    config |= {"mean": how.mean, "std": how.std, "crop_mode": crop_mode}
    shutil.copyfile(weights.file(spec.file), stem.with_name(f"{stem.name}.safetensors"))
    description = {"architecture": spec.architecture, "num_classes": 0, "model_args": spec.arguments}
    write_json(description | {"pretrained_cfg": config}, stem.with_name(f"{stem.name}.json"))
    return str(stem)


def read_task(data: Path, reference: str) -> Task:
    """The task of a folder: the test set if there is a `solution.csv`, else val, which the reference then lacks.

    Raises:
        InputError: there is neither, or the solution lacks an observation.
    """
    competition = read_competition(data)
    solution = data / "solution.csv"
    if solution.is_file():
        task = Task(data, "test", reference, read_solution(solution))
        lacking = [query.id for query in task.queries(competition.resolution) if query.id not in task.truth]
        if lacking:
            raise InputError(f"{solution} lacks observation {lacking[0]}: give the solution of this test set")
        return task
    if not competition.has_val:
        raise InputError(f"{data} has nothing to score on: add the test labels as solution.csv, or a val split")
    val = competition.in_splits("val")
    ids = [observation.id for observation in val.observations]
    return Task(data, "val", "train", dict(zip(ids, val.class_ids, strict=True)))


def label(encoder: str) -> str:
    """A short name of an encoder: the name of its files or on its hub."""
    kind, _, name = encoder.rpartition(":")
    return re.sub(r"[^\w.-]+", "-", name if kind else Path(encoder).name)


def run_methods(task: Task, encoders: Sequence[str], folder: Path) -> list[MethodAnswers]:
    """The answers of all methods with every encoder, then of the ensemble of their best runs; trains under `folder`."""
    answers, best, cache = [], [], folder / CACHE
    for spec in encoders:
        of = f", {label(spec)}" if len(encoders) > 1 else ""
        runs = [folder / f"{task.data.name}-{label(spec)}-{name}" for name in RECIPES]
        for name, run in zip(RECIPES, runs, strict=True):
            recipe = read_recipe(name, [f"reference={task.reference}"], spec)
            train_run(recipe, task.data, run, uses_val=task.split != "val")
        answers += match_photos(task, runs[0], cache, of)
        for name, run in zip(RECIPES, runs, strict=True):
            found = bundle_answers(task, [run], [1.0], cache)
            answers.append(rank_classes(task, found, name + of, answers[-1]))
        best.append((runs[-1], answers[-1]))
    if len(best) > 1:
        runs = [run for run, _ in best]
        weights = ensemble_weights(runs, find_competition(task.data).competition.guesses)
        baseline = best[int(np.argmax(weights))][1]  # of the largest weight by cross-validation, not by these scores
        answers.append(rank_classes(task, bundle_answers(task, runs, weights, cache), "their ensemble", baseline))
    return answers


def match_photos(task: Task, run: Path, cache: Path, of: str) -> list[MethodAnswers]:
    """Two rules that compare single photos with the class means of photos, in one view and without centring.

    Args:
        run: for its encoder and classes.
        of: the end of the names.
    """
    manifest = read_weights(run).manifest
    classes, resolution = manifest.class_ids, manifest.competition.resolution
    support, queries = task.support(resolution), task.queries(resolution)
    support_photos = embed_with_run(run, support.observations, ["plain"], cache)
    query_photos = embed_with_run(run, queries, ["plain"], cache)
    labels = encode_labels(support.class_ids, classes)[support_photos.observations]
    means, _ = group_means(support_photos.values[:, 0].astype(float), labels, len(classes))
    photos = query_photos.values[:, 0].astype(float)

    rows = nearest_means(photos, query_photos.observations, means, len(queries))
    guesses = [[classes[label] for label in row] or list(manifest.fallback_classes[:1]) for row in rows]
    starter = MethodAnswers("starter: top-1 of each photo" + of, guesses)

    # The rule of the published prototypical network before its training: minus the distance, averaged over photos.
    distances = torch.cdist(torch.tensor(photos), torch.tensor(means)).numpy()
    scores = torch.tensor(-group_means(distances, query_photos.observations, len(queries))[0])
    is_readable = np.isin(np.arange(len(queries)), query_photos.observations)
    found = BundleAnswers(queries, manifest, scores.log_softmax(dim=1), is_readable)
    averaged = rank_classes(task, found, "raw photo means" + of, starter)
    return [starter, averaged]


def nearest_means(photos: np.ndarray, observations: np.ndarray, means: np.ndarray, count: int) -> list[list[int]]:
    """The rule of the public starter notebook: for each photo, only the class of the nearest mean by cosine.

    Args:
        photos: (photos, features).
        observations: (photos,) index of the observation of each, 0 to `count` - 1.
        means: (classes, features).

    Returns:
        For each observation, distinct labels, the most similar first.
    """
    cosines = l2_normalize(photos) @ l2_normalize(means).T
    nearest = cosines.argmax(axis=1)
    rows: list[dict[int, None]] = [{} for _ in range(count)]
    for photo in np.argsort(-cosines.max(axis=1), kind="stable"):
        rows[observations[photo]][int(nearest[photo])] = None
    return [list(row) for row in rows]


@dataclass(frozen=True)
class BundleAnswers:
    """A bundle's (queries, classes) log-probabilities of all queries, and whether any photo of each could be read."""

    queries: list[Observation]
    manifest: Manifest
    log_probabilities: torch.Tensor
    is_readable: np.ndarray


def bundle_answers(task: Task, runs: Sequence[Path], weights: Sequence[float], cache: Path) -> BundleAnswers:
    """The answers of the bundle of some runs, each with its weight."""
    opened = [(run, read_weights(run).manifest, weight) for run, weight in zip(runs, weights, strict=True) if weight]
    # All members of a bundle get photos of the largest resolution among them.
    resolution = max((manifest.competition.resolution for _, manifest, _ in opened), key=RESOLUTIONS.index)
    queries = task.queries(resolution)
    total, is_readable = 0, np.ones(len(queries), dtype=bool)
    for run, manifest, weight in opened:
        member = manifest.members[0]
        photos = embed_with_run(run, queries, member.views, cache)
        embeddings = pool(photos.values, photos.observations, len(queries), member.pooling)
        banks = read_banks(read_weights(run).file(member.banks[-1]))
        total += weight * torch.cat(list(classify(banks, torch.tensor(embeddings, dtype=torch.float32))))
        prior = weighted_prior(read_weights(run), [replace(member, weight=weight)], queries)
        total += 0 if prior is None else prior[:]
        is_readable &= np.isin(np.arange(len(queries)), photos.observations)
    return BundleAnswers(queries, opened[0][1], total.log_softmax(dim=1), is_readable)


def rank_classes(task: Task, found: BundleAnswers, name: str, baseline: MethodAnswers | None) -> MethodAnswers:
    """The classes in the order of their probability; the fallback of the kernel if no photo could be read."""
    classes = found.manifest.class_ids
    truth = encode_labels(np.array([task.truth[query.id] for query in found.queries], dtype=object), classes)
    outcome = evaluate_predictions(found.log_probabilities, truth)
    guesses = [
        [classes[label] for label in row] if is_readable else list(found.manifest.fallback_classes)
        for row, is_readable in zip(outcome.top, found.is_readable, strict=True)
    ]
    return MethodAnswers(name, guesses, np.where(found.is_readable, outcome.losses, np.nan), baseline)


def score_methods(task: Task, answers: Sequence[MethodAnswers]) -> dict:
    """The scores of every method with 95% intervals, its gain over its baseline, and recalls by shots."""
    support = task.support(RESOLUTIONS[0])
    truth = [task.truth[query.id] for query in task.queries(RESOLUTIONS[0])]
    counts = Counter(support.class_ids.tolist())
    shots = np.minimum([counts[class_id] for class_id in truth], MOST_SHOTS)
    hits = {one.name: hit_matrix(truth, one.guesses)[:, GUESSES.index(5)] for one in answers}
    rows = []
    for one in answers:
        row = {"method": one.name, **score(truth, one.guesses), "log_loss": None, "gain": None}
        if one.losses is not None:
            row["log_loss"] = bounded(one.losses[~np.isnan(one.losses)])
        if one.baseline:
            row["gain"] = {"over": one.baseline.name, **gained(hits[one.name], hits[one.baseline.name])}
        rows.append(row)
    return {
        "data": task.data.name,
        "scored_on": task.split,
        "observations": len(truth),
        "reference": task.reference,
        "reference_observations": len(support),
        "classes": len(counts),
        "methods": rows,
        "by_shots": [
            {
                "shots": f"{count} or more" if count == MOST_SHOTS else str(count),
                "observations": int((shots == count).sum()),
                "recall_at_5": {name: bounded(own[shots == count]) for name, own in hits.items()},
            }
            for count in np.unique(shots).tolist()
        ],
    }


def method_table(report: dict) -> list[str]:
    queries, reference = (counted(report[key], "observation") for key in ("observations", "reference_observations"))
    lines = [
        f"{report['data']}: {queries} of {report['scored_on']}, 95% intervals; reference: "
        f"{report['reference']}, {reference} of {counted(report['classes'], 'class')}",
        "",
        *heading("method", *METRIC_NAMES.values(), "log-loss", "gain in Recall@5"),
    ]
    for row in report["methods"]:
        cells = [cell(interval_of(row, name)) for name in METRIC_NAMES]
        cells += [cell(row["log_loss"]), cell(row["gain"], "+")]
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return lines


def shots_table(report: dict) -> list[str]:
    lines = ["Recall@5 by shots (observations of the true class in the reference set):", ""]
    lines += heading("shots", "n", *(row["method"] for row in report["methods"]))
    for row in report["by_shots"]:
        cells = [cell(value) for value in row["recall_at_5"].values()]
        lines.append(f"| {row['shots']} | {row['observations']} | {' | '.join(cells)} |")
    return lines


def heading(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def cell(value: dict | None, sign: str = "") -> str:
    """`.654 [.612, .696]`, or a dash for None."""
    if value is None:
        return "–"
    mean, low, high = (re.sub(r"^([+-]?)0\.", r"\1.", f"{value[name]:{sign}.3f}") for name in ("value", "low", "high"))
    return f"{mean} [{low}, {high}]"
