"""The methods that the benchmark of accuracy compares: each answers all queries of a dataset, and sparse test sets.

Sparse test sets are small ones, drawn from the queries, in which most classes do not occur. FungiCLEF's test set is
sparse, and methods that learn from the test set gain less there.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from kernel.bank import Bank, read_banks
from kernel.inputs import InputError
from kernel.manifest import Manifest, Member, Weights, read_weights
from kernel.metadata_prior import weighted_prior
from kernel.observations import Observation, read_test
from kernel.ranking import classify
from kernel.tables import RESOLUTIONS
from local.banks.ensemble import weigh_runs
from local.banks.estimators import group_means, l2_normalize, pool
from local.banks.evaluation import evaluate_predictions
from local.base.console import progress
from local.base.run_folder import CACHE
from local.data.competition import read_competition
from local.data.concatenated_encoders import embed_with_run
from local.data.folder import find_competition
from local.data.observations import LabelledObservations, encode_labels
from local.data.solution import read_solution
from local.recipes.recipe import read_recipe
from local.training.run import train_run

RECIPES = ("fungiclef-baseline", "fungiclef-protonet", "fungiclef-best")  # with each encoder
TOGETHER = ("fungiclef-best", "fungiclef-winner")  # with all encoders in one run
# Of a sparse test set. FungiCLEF 2025 has 566 of 2,427 classes in its test set, most of them once or twice.
SPARSE_CLASSES = 0.25  # fraction of the classes of the reference set
SPARSE_OBSERVATIONS = 2  # of a class at most
DRAWS = 200  # so that nearly every query is in some draw


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

    @cached_property
    def draws(self) -> list[np.ndarray]:
        """Of each sparse test set the indices of its queries."""
        truth = [self.truth[query.id] for query in self.queries(RESOLUTIONS[0])]
        return draw_sparse(truth, len(self.support(RESOLUTIONS[0]).classes))


@dataclass(frozen=True)
class MethodAnswers:
    """The answers of one method to all queries.

    Attributes:
        guesses: for each query, class ids, best first.
        losses: (queries,) log-losses, NaN if there is none; None for a method without probabilities.
        baseline: the answers to compare with.
        sparse: for each sparse test set the guesses of a method that learns from the test set, when it sees that one
            alone; None for a method that answers each query as if it were the only one.
    """

    name: str
    guesses: list[list[str]]
    losses: np.ndarray | None = None
    baseline: "MethodAnswers | None" = None
    sparse: list[list[list[str]]] | None = None


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


def draw_sparse(truth: Sequence[str], classes: int) -> list[np.ndarray]:
    """Draw test sets like that of FungiCLEF from the queries: few of the classes, one or two observations of each.

    Every class with queries has the same probability to be drawn, and so has each number of observations.

    Args:
        truth: class id of each query.
        classes: of the reference set.

    Returns:
        Of each of DRAWS test sets the indices of its queries, ascending.
    """
    rng = np.random.default_rng(0)
    names, labels = np.unique(np.array(truth, dtype=str), return_inverse=True)
    members = [np.flatnonzero(labels == label) for label in range(len(names))]
    present = min(len(names), max(1, round(SPARSE_CLASSES * classes)))
    draws = []
    for _ in range(DRAWS):
        drawn = rng.choice(len(names), present, replace=False)
        counts = rng.integers(1, SPARSE_OBSERVATIONS, size=present, endpoint=True)
        own = [rng.permutation(members[label])[:count] for label, count in zip(drawn, counts, strict=True)]
        draws.append(np.sort(np.concatenate(own)))
    return draws


def label(encoder: str) -> str:
    """A short name of an encoder: the name of its files or on its hub."""
    kind, _, name = encoder.rpartition(":")
    return re.sub(r"[^\w.-]+", "-", name if kind else Path(encoder).name)


def run_methods(
    task: Task, encoders: Sequence[str], folder: Path, recipes: Sequence[str] = (*RECIPES, *TOGETHER)
) -> list[MethodAnswers]:
    """The answers of all methods; trains under `folder`.

    Every encoder alone comes first, then the ensemble of the runs of each one's last recipe, then all of them in one
    run. The first run of several encoders is compared with that of one, by the same recipe; the others with the one
    before.

    Args:
        recipes: those of RECIPES are run with each encoder, one at least, and those of TOGETHER with all.
    """
    answers, last, cache = [], [], folder / CACHE
    alone = [name for name in RECIPES if name in recipes] or [RECIPES[0]]

    def answer(run: Path, name: str, baseline: MethodAnswers) -> MethodAnswers:
        return answer_with_bundle(task, open_bundle(task, [run], [1.0], cache), name, baseline)

    def train(name: str, spec: str | Sequence[str], label: str) -> Path:
        run = folder / f"{task.data.name}-{label}-{name}"
        recipe = read_recipe(name, [f"reference={task.reference}"], spec)
        train_run(recipe, task.data, run, uses_val=task.split != "val")
        return run

    for spec in encoders:
        of = f", {label(spec)}" if len(encoders) > 1 else ""
        runs = [train(name, spec, label(spec)) for name in alone]
        answers += match_photos(task, runs[0], cache, of)
        for name, run in zip(alone, runs, strict=True):
            answers.append(answer(run, name + of, answers[-1]))
        last.append((runs[-1], answers[-1]))
    baseline = answers[-1]
    if len(last) > 1:
        runs = [run for run, _ in last]
        weights = weigh_runs(runs, find_competition(task.data).competition.guesses).weights
        baseline = last[int(np.argmax(weights))][1]  # of the largest weight by cross-validation, not by these scores
        found = open_bundle(task, runs, weights, cache)
        answers.append(answer_with_bundle(task, found, "their ensemble", baseline))
    for name in TOGETHER:
        if name in recipes and (len(encoders) > 1 or name not in alone):
            of = ", together" if len(encoders) > 1 else ""
            run = train(name, list(encoders), "together" if of else label(encoders[0]))
            answers.append(baseline := answer(run, name + of, baseline))
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
    guesses, losses = rank_classes(task, queries, manifest, scores.log_softmax(dim=1), is_readable)
    return [starter, MethodAnswers("raw photo means" + of, guesses, losses, starter)]


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
class OpenMember:
    """A member of a bundle, and how it sees the queries.

    Attributes:
        embeddings: (queries, features), zeros where no photo could be read.
    """

    run: Weights
    member: Member
    banks: list[Bank]
    embeddings: torch.Tensor


@dataclass(frozen=True)
class OpenBundle:
    """A bundle, and the queries as its members see them.

    Attributes:
        is_readable: (queries,) bool, whether any photo could be read.
    """

    queries: list[Observation]
    manifest: Manifest
    members: list[OpenMember]
    is_readable: np.ndarray

    @property
    def is_transductive(self) -> bool:
        """Whether the answer to a query depends on which other queries there are."""
        return any(bank.transduction for one in self.members for bank in one.banks)

    def log_probabilities(self, rows: np.ndarray) -> torch.Tensor:
        """(rows, classes), of the queries with these indices, as if the test set had no others."""
        total, queries = 0, [self.queries[row] for row in rows]
        for one in self.members:
            total += one.member.weight * torch.cat(list(classify(one.banks, one.embeddings[torch.tensor(rows)])))
            prior = weighted_prior(one.run, [one.member], queries)
            total += 0 if prior is None else prior[:]
        return total.log_softmax(dim=1)


def open_bundle(task: Task, runs: Sequence[Path], weights: Sequence[float], cache: Path) -> OpenBundle:
    """The bundle of some runs, each with its weight, and the embeddings of the queries."""
    opened = [(run, read_weights(run), weight) for run, weight in zip(runs, weights, strict=True) if weight]
    # All members of a bundle get photos of the largest resolution among them.
    resolution = max((own.manifest.competition.resolution for _, own, _ in opened), key=RESOLUTIONS.index)
    queries = task.queries(resolution)
    members, is_readable = [], np.ones(len(queries), dtype=bool)
    for run, own, weight in opened:
        [member] = own.manifest.members
        member = replace(member, weight=weight * member.weight)
        photos = embed_with_run(run, queries, member.views, cache)
        embeddings = pool(photos.values, photos.observations, len(queries), member.pooling)
        banks = read_banks(own.file(member.banks[-1]))
        members.append(OpenMember(own, member, banks, torch.tensor(embeddings, dtype=torch.float32)))
        is_readable &= np.isin(np.arange(len(queries)), photos.observations)
    return OpenBundle(queries, opened[0][1].manifest, members, is_readable)


def answer_with_bundle(task: Task, bundle: OpenBundle, name: str, baseline: MethodAnswers | None) -> MethodAnswers:
    """The answers of a bundle to all queries at once, and to each sparse test set where that is not the same."""

    def rank_rows(rows: np.ndarray) -> tuple[list[list[str]], np.ndarray]:
        queries = [bundle.queries[row] for row in rows]
        return rank_classes(task, queries, bundle.manifest, bundle.log_probabilities(rows), bundle.is_readable[rows])

    guesses, losses = rank_rows(np.arange(len(bundle.queries)))
    sparse = None
    if bundle.is_transductive:
        sparse = [rank_rows(rows)[0] for rows in progress(task.draws, f"{name} on sparse test sets", unit="draw")]
    return MethodAnswers(name, guesses, losses, baseline, sparse)


def rank_classes(
    task: Task,
    queries: Sequence[Observation],
    manifest: Manifest,
    log_probabilities: torch.Tensor,
    is_readable: np.ndarray,
) -> tuple[list[list[str]], np.ndarray]:
    """The classes in the order of their probability; the fallback of the kernel if no photo could be read.

    Args:
        log_probabilities: (queries, classes).
        is_readable: (queries,) bool.

    Returns:
        The guesses of each query, and (queries,) log-losses, NaN if there is none.
    """
    classes = manifest.class_ids
    truth = encode_labels(np.array([task.truth[query.id] for query in queries], dtype=object), classes)
    outcome = evaluate_predictions(log_probabilities, truth)
    guesses = [
        [classes[label] for label in row] if readable else list(manifest.fallback_classes)
        for row, readable in zip(outcome.top, is_readable, strict=True)
    ]
    return guesses, np.where(is_readable, outcome.losses, np.nan)
