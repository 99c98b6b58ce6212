"""Compare the recipes of five published systems with reimplementations of the systems themselves.

Called by local/benchmark.py. A reimplementation does what the code of its system does, mistakes included: photos
instead of observations, one view, the last epoch, and so on. Both use the same photos and the same encoder, and are
scored on the same observations.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from kernel.embeddings import list_photos
from kernel.encoders import pick_devices
from kernel.forward import Encoder
from kernel.inputs import InputError
from kernel.loader import PhotoLoader
from kernel.manifest import Manifest, read_weights
from kernel.observations import Observation
from kernel.photos import read_photo, shorter_side
from local.base.console import progress, say
from local.base.metrics import bounded, describe, gained, hit_matrix, interval_of, score
from local.base.run_folder import CACHE
from local.benchmarks.accuracy import cell, heading
from local.benchmarks.methods import MethodAnswers, Task, open_bundle, rank_classes, read_task
from local.data.competition import read_competition
from local.data.observations import LabelledObservations, encode_labels
from local.encoders.load import load_encoder
from local.recipes.recipe import Recipe, read_recipe
from local.training.adaptation import set_training_mode, unfreeze
from local.training.run import train_run

COLUMNS = {"recall_at_1": "Recall@1", "recall_at_5": "Recall@5", "macro_f1": "macro-F1"}


@dataclass(frozen=True)
class Rules:
    """How a published system trains and predicts.

    Attributes:
        batch_size, learning_rate: of AdamW without a schedule, for as many epochs as the recipe.
        groups: trainable groups of layers; see `unfreeze`.
        make_head: from (features, classes), the module that turns embeddings into logits. None compares embeddings
            with class means, which are computed once before training.
        has_ranks: whether every rank has a head; the loss is the sum over them.
    """

    batch_size: int
    learning_rate: float
    groups: int
    make_head: Callable[[int, int], nn.Module] | None = nn.Linear
    has_ranks: bool = False
    label_smoothing: float = 0.0


def resnext_head(features: int, classes: int) -> nn.Module:
    hidden = [nn.Linear(features, 512), nn.ReLU(), nn.BatchNorm1d(512), nn.Dropout(0.5)]
    return nn.Sequential(nn.Dropout(0.3), *hidden, nn.Linear(512, classes))


RULES = {
    "fungiclef-protonet": Rules(32, 1e-5, 3, None),
    "fungitastic-multitask": Rules(16, 1e-4, -1, has_ranks=True),
    "flora-fauna-efficientnet": Rules(32, 1e-3, -1),
    "flora-fauna-convnext": Rules(32, 1e-3, 0),
    "flora-fauna-vit": Rules(32, 1e-4, 4),
    "resnext-head": Rules(64, 1e-3, -1, resnext_head, label_smoothing=0.1),
    "herbarium-protonet": Rules(32, 1e-4, -1, None),
}


class PlainPhotos(Dataset):
    """Single photos, cropped and flipped at random: (3, size, size) uint8, with a label for each rank."""

    def __init__(self, part: LabelledObservations, targets: np.ndarray, encoder: Encoder):
        self.photos = [
            (path, index) for index, observation in enumerate(part.observations) for path in observation.photos
        ]
        self.targets, self.side = targets, shorter_side(encoder.preprocessing)
        crop = v2.RandomResizedCrop(encoder.preprocessing.size, scale=(0.7, 1.0), antialias=True)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, np.ndarray]:
        path, observation = self.photos[index]
        return self.transform(read_photo(path, self.side)), self.targets[observation]


def train_and_predict(
    rules: Rules,
    epochs: int,
    encoder: Encoder,
    part: LabelledObservations,
    targets: np.ndarray,
    queries: Sequence[Observation],
) -> list[torch.Tensor]:
    """Train by the rules of a system and predict the queries.

    Args:
        targets: (observations, ranks) labels of `part`, the species last.

    Returns:
        For each head (queries, classes) probabilities, averaged over photos; zeros if no photo can be read.
    """
    torch.manual_seed(0)
    sizes = (targets.max(axis=0) + 1).tolist()
    trainable = unfreeze(encoder.module, rules.groups)
    if rules.make_head:
        heads = nn.ModuleList(rules.make_head(encoder.features, size) for size in sizes)
    else:
        heads = nn.ModuleList([Distances(photo_means(encoder, part, targets[:, -1]))])
    parameters = [*trainable, *(parameter for parameter in heads.parameters() if parameter.requires_grad)]
    criterion = nn.CrossEntropyLoss(label_smoothing=rules.label_smoothing)
    optimizer = torch.optim.AdamW(parameters, lr=rules.learning_rate, weight_decay=1e-4)
    batches = DataLoader(
        PlainPhotos(part, targets, encoder), rules.batch_size, shuffle=True, drop_last=True, num_workers=2
    )
    for epoch in range(epochs):
        # Keeps the batch statistics of the pretrained encoder, which a few photos would spoil.
        set_training_mode(encoder.module, pretrained=True)
        heads.train()
        for photos, labels in progress(batches, f"epoch {epoch + 1}", unit="batch"):
            embedded = embed_batch(encoder, photos)
            targets_of_heads = zip(heads, labels.T[-len(heads) :].to(encoder.device), strict=True)
            loss = sum(criterion(head(embedded), target) for head, target in targets_of_heads)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    encoder.module.eval()
    heads.eval()
    return predict(encoder, heads, queries, sizes[-len(heads) :])


class Distances(nn.Module):
    """Minus the distance to each prototype; the prototypes are fixed."""

    def __init__(self, prototypes: torch.Tensor):
        super().__init__()
        self.register_buffer("prototypes", prototypes)

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(embedded, self.prototypes)


def load_batches(
    encoder: Encoder, observations: Sequence[Observation], what: str
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Batches of photos, each with the indices of their observations."""
    observation_index = [index for index, observation in enumerate(observations) for _ in observation.photos]
    with PhotoLoader.for_encoder(list_photos(observations), encoder) as loader:
        for photos, pixels in progress(loader.batches(encoder), what, unit="batch"):
            yield [observation_index[photo] for photo in photos], pixels


def embed_batch(encoder: Encoder, photos: torch.Tensor) -> torch.Tensor:
    return encoder.module(encoder.normalise(photos, encoder.device))


@torch.no_grad()
def photo_means(encoder: Encoder, part: LabelledObservations, classes: np.ndarray) -> torch.Tensor:
    encoder.module.eval()
    totals = torch.zeros(int(classes.max()) + 1, encoder.features)
    counts = torch.zeros(len(totals), 1)
    for rows, photos in load_batches(encoder, part.observations, "embedding the training photos"):
        index = torch.tensor(classes[rows])
        totals.index_add_(0, index, embed_batch(encoder, photos).cpu())
        counts.index_add_(0, index, torch.ones(len(index), 1))
    return totals / counts.clamp(min=1)


@torch.inference_mode()
def predict(
    encoder: Encoder, heads: Sequence[nn.Module], queries: Sequence[Observation], sizes: Sequence[int]
) -> list[torch.Tensor]:
    """For each head (queries, classes) probabilities in one view, averaged over photos."""
    totals = [torch.zeros(len(queries), size) for size in sizes]
    for rows, photos in load_batches(encoder, queries, "embedding the test photos"):
        embedded = embed_batch(encoder, photos)
        for total, head in zip(totals, heads, strict=True):
            total.index_add_(0, torch.tensor(rows), head(embedded).softmax(dim=1).cpu())
    return [nn.functional.normalize(total, p=1, dim=1) for total in totals]


def systems(folders: Sequence[Path], encoder: str, recipes: Sequence[str], settings: Sequence[str]) -> dict:
    """Print a table for each dataset: every system, then its recipe. Returns the figures, for `--json`.

    Args:
        folders: see `local.benchmarks.accuracy.accuracy`.
        encoder: of all systems, as in `--encoder`.
        recipes: keys of RULES; all if empty.
        settings: changes to the recipes, as `key=value`.

    Raises:
        InputError: there is no system for a recipe; see also `read_task`.
    """
    unknown = [name for name in recipes if name not in RULES]
    if unknown:
        raise InputError(f"--recipe: no system for {unknown[0]}; choose from {', '.join(RULES)}")
    reports = []
    for data in folders:
        task, report = read_task(data.resolve(), "train"), {"data": data.resolve().name, "rows": [], "ranks": []}
        with tempfile.TemporaryDirectory() as temporary:
            for name in recipes or RULES:
                first = len(report["rows"])
                compare_system(task, name, encoder, settings, Path(temporary), report)
                for row in report["rows"][first:]:  # after each system, because all together take hours
                    say(f"{row['name']}: {describe(row)}")
        reports.append(report)
        say("\n" + "\n".join([*system_table(report), "", *rank_table(report)]))
    return {"datasets": reports}


def compare_system(task: Task, name: str, spec: str, settings: Sequence[str], folder: Path, report: dict) -> None:
    """Add the scores of a system and of its recipe to a report; a recipe with ranks is also scored without them."""
    rules, own = RULES[name], ["reference=train", *settings]
    variants = {f"{name}, species alone": ["rank_weights=[]"]} if rules.has_ranks else {}
    runs = {label: folder / f"{name}-{number}" for number, label in enumerate([*variants, name])}
    for label, run in runs.items():
        train_run(read_recipe(name, [*own, *variants.get(label, ())], spec), task.data, run, task.split != "val")
    manifest = read_weights(runs[name]).manifest
    classes, queries = manifest.class_ids, task.queries(manifest.competition.resolution)
    truth = np.array([task.truth[query.id] for query in queries], dtype=object)
    ranks = [np.arange(len(classes))]
    if rules.has_ranks:
        groups_by_rank = read_competition(task.data).group_by_rank(classes)
        ranks = [groups for groups in groups_by_rank.values() if groups is not None] + ranks
    plain = predict_by_rules(task, rules, read_recipe(name, own, spec), manifest, ranks, queries)
    is_readable = plain[-1].sum(dim=1).numpy() > 0
    ranked = rank_classes(task, queries, manifest, (plain[-1] + 1e-12).log(), is_readable)
    original = MethodAnswers(f"{name}: the original's rules", *ranked)
    report["rows"].append(scored(original, truth))
    for label, run in runs.items():
        bundle = open_bundle(task, [run], [1.0], folder / CACHE)
        log_probabilities = bundle.log_probabilities(np.arange(len(queries)))
        ranked = rank_classes(task, bundle.queries, bundle.manifest, log_probabilities, bundle.is_readable)
        report["rows"].append(scored(MethodAnswers(label, *ranked, original), truth))
        if rules.has_ranks:
            ours, labels = log_probabilities.exp(), encode_labels(truth, classes)
            report["ranks"] += [
                rank_row(label, groups, heads, ours, labels) for groups, heads in zip(ranks, plain, strict=True)
            ]


def predict_by_rules(
    task: Task,
    rules: Rules,
    recipe: Recipe,
    manifest: Manifest,
    ranks: Sequence[np.ndarray],
    queries: list[Observation],
) -> list[torch.Tensor]:
    """The predictions of a system that starts from the pretrained encoder; see `train_and_predict`."""
    [one] = recipe.encoder.each
    module, spec = load_encoder(one.name, recipe.encoder.pretrained, one.image_size, one.pool)
    device = pick_devices()[0]
    module.to(device, memory_format=torch.channels_last)
    encoder = Encoder(module, spec.preprocessing, spec.features, [device])
    part = task.support(manifest.competition.resolution)
    species = encode_labels(part.class_ids, manifest.class_ids)
    targets = np.stack([groups[species] for groups in ranks], axis=1)
    return train_and_predict(rules, recipe.train.epochs, encoder, part, targets, queries)


def rank_row(recipe: str, groups: np.ndarray, heads: torch.Tensor, ours: torch.Tensor, labels: np.ndarray) -> dict:
    """The accuracies at one rank of `heads`, (queries, groups), and of `ours`, (queries, classes) probabilities."""
    members = nn.functional.one_hot(torch.tensor(groups)).float()
    guesses = {"heads": heads.argmax(dim=1), "ours": (ours @ members).argmax(dim=1)}
    hits = {name: bounded((guess.numpy() == groups[labels]).astype(float)) for name, guess in guesses.items()}
    return {"groups": members.shape[1], "recipe": recipe, **hits}


def scored(answers: MethodAnswers, truth: np.ndarray) -> dict:
    """A row of a report: scores, and the gain in Recall@1 over the original's rules."""
    row = {"name": answers.name, **score(truth, answers.guesses), "gain": None}
    firsts = [guesses[0] for guesses in answers.guesses]
    row["weighted_f1"] = float(f1_score(truth.astype(str), firsts, average="weighted", zero_division=0))
    if answers.baseline:
        row["gain"] = gained(*(hit_matrix(truth, one.guesses)[:, 0] for one in (answers, answers.baseline)))
    return row


def system_table(report: dict) -> list[str]:
    lines = [report["data"], "", *heading("rules", *COLUMNS.values(), "weighted F1", "gain in Recall@1")]
    for row in report["rows"]:
        cells = [cell(interval_of(row, name)) for name in COLUMNS]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['weighted_f1']:.3f} | {cell(row['gain'], '+')} |")
    return lines


def rank_table(report: dict) -> list[str]:
    """The accuracy by rank, of one head for each rank and of sums over species, as a Markdown table."""
    if not report["ranks"]:
        return []
    lines = heading("groups of the rank", "recipe", "a head for each rank", "sums over species")
    for row in report["ranks"]:
        lines.append(f"| {row['groups']} | {row['recipe']} | {cell(row['heads'])} | {cell(row['ours'])} |")
    return [*lines, ""]
