"""Read the evidence of a report: a run's answers to its held-out observations, with their photos and taxonomy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from kernel.inputs import InputError
from kernel.manifest import Manifest
from kernel.observations import Observation
from kernel.tables import TAXONOMY
from local.banks.ensemble import read_predictions
from local.banks.estimators import in_parts, l2_normalize, pool
from local.banks.evaluation import Evaluation, evaluate_predictions
from local.base.console import counted, say
from local.base.run_folder import CACHE
from local.base.runs import open_run
from local.data.competition import read_competition
from local.data.concatenated_encoders import embed_with_run
from local.data.duplicates import plain_column
from local.data.observations import (
    UNKNOWN_TAXA,
    LabelledObservations,
    encode_labels,
    names_of,
    select_observations,
    sort_ids,
)
from local.data.stored_embeddings import StoredEmbeddings
from local.recipes.recipe import Recipe, make_recipe

SPECIES = "species"  # the finest rank: the class itself


@dataclass(frozen=True)
class Rank:
    """One level of the taxonomy.

    Attributes:
        names: (groups,) in the order of the taxonomy, so that relatives are neighbours.
        groups: (classes,) index of the group of each class. A class without a named group is a group of its own.
        is_named: (groups,) bool.
    """

    name: str
    names: list[str]
    groups: np.ndarray
    is_named: np.ndarray

    def sum_probabilities(self, probabilities: np.ndarray) -> np.ndarray:
        """(queries, classes) -> (queries, groups): the probability of a group is the sum over its classes."""
        order = np.argsort(self.groups, kind="stable")
        starts = np.searchsorted(self.groups[order], np.arange(len(self.names)))
        return np.add.reduceat(probabilities[:, order], starts, axis=1)


@dataclass(frozen=True)
class Embedded:
    """Embeddings of the observations, the queries first, minus the mean of the reference set.

    Attributes:
        readable: (observations,) number of readable photos.
        pooled: (observations, features) of length 1, or 0 where no photo is readable.
        classes: (observations,) label.
        is_reference: (observations,) bool.
        photos: the readable ones.
        photo_observations: (photos,) int, index of the observation of each.
        plain: (photos, 1, features) float16, in the plain view, or in the first where there is none; not centred.
    """

    observations: list[Observation]
    readable: np.ndarray
    pooled: np.ndarray
    classes: np.ndarray
    is_reference: np.ndarray
    photos: list[Path]
    photo_observations: np.ndarray
    plain: np.ndarray | StoredEmbeddings


@dataclass(frozen=True)
class Evidence:
    """A run's answers to its held-out observations, the queries.

    Attributes:
        labelled: the observations of these classes.
        data_sha256: of the data, with the observations of classes that were added since.
        classes: the class ids of the bank, then those of queries whose class the bank lacks; labels are indices of it.
        names: (classes,) unique names of species.
        poisonous: (classes,) 1, 0, or NaN where the competition does not say.
        ranks: of the taxonomy, the widest first, the species last.
        truth: (queries,) label.
        log_probabilities: (queries, classes) float32; minus infinity for a class that the bank lacks.
        weights: (queries,) of mean 1; see `local.base.metrics.held_out_scores`.
        shots: (queries,) observations of the true class in the bank, without the query itself. In cross-validation
            this is exact for classes of up to five observations; larger classes keep at least four in every fold.
        reference: (classes,) observations of each class in the bank.
        is_in_bank: (queries,) bool, those that were held out in turn; the others are never in the bank.
        view_votes: see `local.banks.search.Search.view_votes`; labels are those of the bank.
    """

    run: Path
    manifest: Manifest
    recipe: Recipe
    labelled: LabelledObservations
    data_sha256: str
    classes: list[str]
    names: list[str]
    poisonous: np.ndarray
    ranks: list[Rank]
    queries: list[Observation]
    truth: np.ndarray
    log_probabilities: np.ndarray
    weights: np.ndarray
    shots: np.ndarray
    reference: np.ndarray
    is_in_bank: np.ndarray
    view_votes: np.ndarray

    @property
    def metric(self) -> str:
        """The metric of the competition; macro-F1 where that is of sets, since a held-out observation has one class."""
        competition = self.labelled.competition
        return "macro_f1" if competition.form.is_set else competition.metric

    @property
    def is_macro(self) -> bool:
        """Whether the weights give every class the same weight."""
        return self.recipe.train.monitor == "macro_f1"

    @cached_property
    def agreement(self) -> np.ndarray:
        """(queries,) the fraction of an observation's views that alone give its first guess; NaN without views."""
        queries, labels, votes = self.view_votes.T
        count = len(self.queries)
        agreeing = np.bincount(queries, votes * (labels == self.guesses[queries]), minlength=count)
        with np.errstate(invalid="ignore"):
            return agreeing / np.bincount(queries, votes, minlength=count)

    def votes(self, query: int) -> list[tuple[int, int]]:
        """(label, views that alone give it) of an observation, the commonest first."""
        rows = self.view_votes[self.view_votes[:, 0] == query]
        return [(label, votes) for _, label, votes in sorted(rows.tolist(), key=lambda row: -row[2])]

    @cached_property
    def probabilities(self) -> np.ndarray:
        return torch.tensor(self.log_probabilities).softmax(dim=1).numpy()

    @cached_property
    def outcome(self) -> Evaluation:
        """The guesses, the rank of the true class among them, and the log-losses."""
        return evaluate_answers(self.log_probabilities, self.truth)

    @cached_property
    def guesses(self) -> np.ndarray:
        """(queries,) the first guess."""
        return self.outcome.top[:, 0]

    @cached_property
    def rank_outcomes(self) -> dict[str, Evaluation]:
        """By rank, the outcome of (queries, groups) probabilities."""

        def outcome(rank: Rank) -> Evaluation:
            sums = rank.sum_probabilities(self.probabilities)
            return evaluate_predictions(torch.tensor(sums), rank.groups[self.truth])

        return {rank.name: outcome(rank) for rank in self.ranks}

    @cached_property
    def embedded(self) -> Embedded:
        return read_embeddings(self)

    def photo(self, observation: Observation) -> str:
        """The path of an observation's first photo inside the competition."""
        return self.path_of(observation.photos[0])

    def path_of(self, photo: Path) -> str:
        return photo.relative_to(self.labelled.folder).as_posix()


def evaluate_answers(log_probabilities: np.ndarray, truth: np.ndarray) -> Evaluation:
    """The outcome of (queries, classes) log-probabilities; the loss is NaN where they lack the true class."""
    outcome = evaluate_predictions(torch.tensor(log_probabilities), truth)
    return replace(outcome, losses=np.where(np.isinf(outcome.losses), np.nan, outcome.losses))


def read_evidence(run: Path, data: Path) -> Evidence:
    """Read a run's answers to its held-out observations, and the competition's labels and names.

    Raises:
        InputError: `data` is another competition than the run's.
    """
    manifest = open_run(run).manifest
    answers = read_predictions(run)
    ids, bank = answers.observations, answers.classes
    recipe = make_recipe(manifest.members[0].recipe, str(run))
    labelled = read_competition(data, manifest.competition.resolution)
    train = recipe.train
    labelled = select_observations(labelled, True, train.subset, train.seed, train.exclude)
    rows = encode_labels(ids, labelled.ids)
    if (rows < 0).any():
        missing = ids[int(np.argmin(rows))]
        raise InputError(f"{data} lacks observation {missing}, which {run} held out: give the data of the run")
    queries = labelled.subset(rows)
    class_ids = queries.class_ids
    if ((encode_labels(class_ids, bank) != answers.truth) & (answers.truth >= 0)).any():
        raise InputError(f"{data} has other labels than the held-out observations of {run}: give the data of the run")
    classes = [*bank, *sort_ids(set(class_ids) - set(bank))]
    lacking = np.full((len(ids), len(classes) - len(bank)), -np.inf, dtype=np.float32)
    digest = labelled.digest()
    labelled = leave_out_new_classes(labelled, classes)
    names = names_of(labelled, classes)
    truth = encode_labels(class_ids, classes)
    reference = labelled.in_splits(*recipe.bank.reference.split("+"))
    sizes = np.bincount(encode_labels(reference.class_ids, classes) + 1, minlength=len(classes) + 1)[1:]
    is_in_bank = np.isin(ids, reference.ids)
    return Evidence(
        run=run,
        manifest=manifest,
        recipe=recipe,
        labelled=labelled,
        data_sha256=digest,
        classes=classes,
        names=names,
        poisonous=np.array([_number(labelled.poisonous.get(class_id, "")) for class_id in classes]),
        ranks=name_ranks(labelled, classes, names),
        queries=queries.observations,
        truth=truth,
        log_probabilities=np.concatenate([answers.log_probabilities.numpy(), lacking], axis=1),
        weights=answers.weights,
        shots=sizes[truth] - is_in_bank,
        reference=sizes,
        is_in_bank=is_in_bank,
        view_votes=answers.view_votes.reshape(-1, 3),
    )


def leave_out_new_classes(labelled: LabelledObservations, classes: Sequence[str]) -> LabelledObservations:
    """The observations of these classes. Of the others, which the data gained since training, a line is printed."""
    is_known = encode_labels(labelled.class_ids, classes) >= 0
    if is_known.all():
        return labelled
    new = sort_ids(set(labelled.class_ids) - set(classes))
    say(
        f"{labelled.folder} has {counted(len(new), 'class')} that the run was not trained on, such as {new[0]!r}: left "
        f"out of the report with {counted(int((~is_known).sum()), 'observation')}; to include them, train again"
    )
    return labelled.subset(is_known)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def name_ranks(labelled: LabelledObservations, classes: Sequence[str], names: Sequence[str]) -> list[Rank]:
    """The ranks that the competition names and at which classes differ, then the species."""
    lineages = [labelled.taxa.get(class_id, UNKNOWN_TAXA) for class_id in classes]
    order = sorted(range(len(classes)), key=lambda label: (lineages[label], names[label]))
    ranks = []
    for level, rank in enumerate((*TAXONOMY, SPECIES)):
        named = list(names) if rank == SPECIES else [lineage[level] for lineage in lineages]
        if not any(named):
            continue
        groups = [group or f"of {name}" for group, name in zip(named, names, strict=True)]
        index_of = {group: index for index, group in enumerate(dict.fromkeys(groups[label] for label in order))}
        if len(index_of) < 2:
            continue
        is_named = np.isin(list(index_of), list(filter(None, named)))
        ranks.append(Rank(rank, list(index_of), np.array([index_of[group] for group in groups]), is_named))
    return ranks


def read_embeddings(evidence: Evidence) -> Embedded:
    """Embed the queries and the reference set; all are in the cache unless it was removed."""
    labelled = evidence.labelled
    queries = encode_labels([query.id for query in evidence.queries], labelled.ids)
    in_bank = labelled.split_mask(*evidence.recipe.bank.reference.split("+"))
    # Queries first, so that they have the same indices as in the evidence.
    order = np.concatenate([queries, np.setdiff1d(np.flatnonzero(in_bank), queries)])
    known, is_reference = labelled.subset(order), in_bank[order]
    observations = known.observations
    found = embed_with_run(evidence.run, observations, evidence.recipe.bank.views, evidence.run.parent / CACHE)
    readable = np.bincount(found.observations, minlength=len(observations))
    pooled = pool(found.values, found.observations, len(observations), evidence.recipe.bank.pooling)
    unreadable = {path for path, _ in found.unreadable}
    rows = np.flatnonzero((readable > 0) & is_reference)
    mean = sum(pooled[rows[part]].sum(axis=0, dtype=np.float64) for part in in_parts(len(rows))) / len(rows)
    for part in in_parts(len(pooled)):
        pooled[part] = l2_normalize(np.where(readable[part, None] > 0, pooled[part] - mean, 0.0))
    return Embedded(
        observations=observations,
        readable=readable,
        pooled=pooled,
        classes=encode_labels(known.class_ids, evidence.classes),
        is_reference=is_reference,
        photos=[path for one in observations for path in one.photos if path not in unreadable],
        photo_observations=found.observations,
        plain=found.values[:, [plain_column(evidence.recipe.bank.views)]],
    )
