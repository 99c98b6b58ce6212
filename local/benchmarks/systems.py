"""Measure the recipes of five published systems beside plain renderings of the systems' own rules.

Called by local/benchmark.py. A rendering keeps what its original's code does, the mistakes with it: photos instead of
observations, one view, the last epoch, and so on. Same photos, same encoder, both scored on the same observations.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from kernel.embeddings import load_batches
from kernel.encoders import Encoder, pick_devices
from kernel.inputs import InputError
from kernel.manifest import Manifest, read_weights
from kernel.observations import Observation
from kernel.photos import read_photo, shorter_side
from local.base.console import progress, say
from local.base.metrics import bounded, describe, gained, hit_matrix, interval_of, score
from local.base.run_folder import CACHE
from local.benchmarks.accuracy import Rung, Task, bundle_answers, cell, heading, rank_rung, read_task
from local.data.competition import Labelled, places_of, read_competition, read_ranks
from local.encoders.load import load_encoder
from local.recipes.recipe import Recipe, read_recipe
from local.training.adaptation import set_training_mode, unfreeze
from local.training.run import train_run

COLUMNS = {"recall_at_1": "Recall@1", "recall_at_5": "Recall@5", "macro_f1": "macro-F1"}


@dataclass(frozen=True)
class Rules:
    """How a published system trains and answers.

    Attributes:
        batch_size, rate: of AdamW, without a schedule, for as many epochs as the recipe beside it.
        groups: of layers that learn; see `unfreeze`.
        make_head: maps (features, classes) to what turns embeddings into logits; None matches class means by distance,
            computed once before training.
        has_ranks: a head of its own for every rank, their losses added up.
        smoothing: of labels.
    """

    batch_size: int
    rate: float
    groups: int
    make_head: Callable[[int, int], nn.Module] | None = nn.Linear
    has_ranks: bool = False
    smoothing: float = 0.0


def resnext_head(features: int, classes: int) -> nn.Module:
    """The custom head of the ResNeXt system."""
    hidden = [nn.Linear(features, 512), nn.ReLU(), nn.BatchNorm1d(512), nn.Dropout(0.5)]
    return nn.Sequential(nn.Dropout(0.3), *hidden, nn.Linear(512, classes))


RULES = {
    "fungiclef-protonet": Rules(32, 1e-5, 3, None),
    "fungitastic-multitask": Rules(16, 1e-4, -1, has_ranks=True),
    "flora-fauna-efficientnet": Rules(32, 1e-3, -1),
    "flora-fauna-convnext": Rules(32, 1e-3, 0),
    "flora-fauna-vit": Rules(32, 1e-4, 4),
    "resnext-head": Rules(64, 1e-3, -1, resnext_head, smoothing=0.1),
    "herbarium-protonet": Rules(32, 1e-4, -1, None),
}


class PlainPhotos(Dataset):
    """Single photos, cropped and flipped at random: (3, size, size) uint8, class by rank."""

    def __init__(self, part: Labelled, targets: np.ndarray, encoder: Encoder):
        self.photos = [
            (path, place) for place, observation in enumerate(part.observations) for path in observation.photos
        ]
        self.targets, self.side = targets, shorter_side(encoder.preprocessing)
        crop = v2.RandomResizedCrop(encoder.preprocessing.size, scale=(0.7, 1.0), antialias=True)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, np.ndarray]:
        path, place = self.photos[index]
        return self.transform(read_photo(path, self.side)), self.targets[place]


def follow(
    rules: Rules, epochs: int, encoder: Encoder, part: Labelled, targets: np.ndarray, queries: Sequence[Observation]
) -> list[torch.Tensor]:
    """Train by a system's rules, and ask.

    Args:
        targets: (observations, ranks) of `part`, the species last.

    Returns:
        Per rank (queries, classes) scores, averaged over the photos of each query; zeros where none can be read.
    """
    torch.manual_seed(0)
    sizes = (targets.max(axis=0) + 1).tolist()
    learning = unfreeze(encoder.module, rules.groups)
    if rules.make_head:
        heads = nn.ModuleList(rules.make_head(encoder.features, size) for size in sizes)
    else:
        heads = nn.ModuleList([Distances(photo_means(encoder, part, targets[:, -1]))])
    parameters = [*learning, *(parameter for parameter in heads.parameters() if parameter.requires_grad)]
    optimiser = torch.optim.AdamW(parameters, lr=rules.rate, weight_decay=1e-4)
    batches = DataLoader(
        PlainPhotos(part, targets, encoder), rules.batch_size, shuffle=True, drop_last=True, num_workers=2
    )
    for epoch in range(epochs):
        # Transformers, which most systems are, have no batch statistics; a few shots would spoil those there are.
        set_training_mode(encoder.module, pretrained=True)
        heads.train()
        for photos, wanted in progress(batches, f"epoch {epoch + 1}"):
            embedded = raw(encoder, photos)
            loss = sum(
                nn.functional.cross_entropy(head(embedded), target.to(encoder.device), label_smoothing=rules.smoothing)
                for head, target in zip(heads, wanted.T[-len(heads) :], strict=True)
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    encoder.module.eval()
    heads.eval()
    return answer(encoder, heads, queries, sizes[-len(heads) :])


class Distances(nn.Module):
    """Minus the distance to each prototype; prototypes stay as they were before training."""

    def __init__(self, prototypes: torch.Tensor):
        super().__init__()
        self.register_buffer("prototypes", prototypes)

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(embedded, self.prototypes)


def raw(encoder: Encoder, photos: torch.Tensor) -> torch.Tensor:
    """(photos, 3, size, size) uint8 -> (photos, features), of whatever length."""
    return encoder.module(encoder.normalise(photos, encoder.device))


@torch.no_grad()
def photo_means(encoder: Encoder, part: Labelled, classes: np.ndarray) -> torch.Tensor:
    """(classes, features): the mean of each class's photos."""
    encoder.module.eval()
    totals = torch.zeros(int(classes.max()) + 1, encoder.features)
    counts = torch.zeros(len(totals), 1)
    for owners, photos in load_batches(encoder, part.observations, []):
        index = torch.tensor(classes[list(owners)])
        totals.index_add_(0, index, raw(encoder, photos).cpu())
        counts.index_add_(0, index, torch.ones(len(index), 1))
    return totals / counts.clamp(min=1)


@torch.inference_mode()
def answer(
    encoder: Encoder, heads: Sequence[nn.Module], queries: Sequence[Observation], sizes: Sequence[int]
) -> list[torch.Tensor]:
    """Per head (queries, classes) probabilities, averaged over photos, of one view."""
    totals = [torch.zeros(len(queries), size) for size in sizes]
    for owners, photos in load_batches(encoder, queries, []):
        embedded = raw(encoder, photos)
        for total, head in zip(totals, heads, strict=True):
            total.index_add_(0, torch.tensor(owners), head(embedded).softmax(dim=1).cpu())
    return [nn.functional.normalize(total, p=1, dim=1) for total in totals]


def systems(folders: Sequence[Path], encoder: str, recipes: Sequence[str], settings: Sequence[str]) -> dict:
    """Print a table per dataset: each system's own rules, and its recipe.

    Args:
        folders: as `local.benchmarks.accuracy.accuracy` takes them.
        encoder: for all, as `--encoder` takes it.
        recipes: keys of RULES; none are all.
        settings: changes to the recipes, as `key=value`.

    Returns:
        All that was printed, for `--json`.

    Raises:
        InputError: a recipe is of none of the systems; see also `local.benchmarks.accuracy.read_task`.
    """
    unknown = [name for name in recipes if name not in RULES]
    if unknown:
        raise InputError(f"--recipe {unknown[0]}: choose from {', '.join(RULES)}")
    reports = []
    for data in folders:
        task, report = read_task(data.resolve(), "train"), {"data": data.resolve().name, "rows": [], "ranks": []}
        with tempfile.TemporaryDirectory() as temporary:
            for name in recipes or RULES:
                first = len(report["rows"])
                compare_system(task, name, encoder, settings, Path(temporary), report)
                for row in report["rows"][first:]:  # at once, since all of them take long
                    say(f"{row['name']}: {describe(row)}")
        reports.append(report)
        say("\n" + "\n".join([*tell_rows(report), "", *tell_ranks(report)]))
    return {"datasets": reports}


def compare_system(task: Task, name: str, spec: str, settings: Sequence[str], folder: Path, report: dict) -> None:
    """Add to a report what a system's rules and its recipe answer, the latter also without ranks where it has them."""
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
        ranks = [groups for groups in read_ranks(read_competition(task.data), classes) if groups is not None] + ranks
    plain = by_rules(task, rules, read_recipe(name, own, spec), manifest, ranks, queries)
    seen = plain[-1].sum(dim=1).numpy() > 0
    logs = (plain[-1] + 1e-12).log()
    original = rank_rung(task, queries, manifest, logs, seen, f"{name}: the original's rules", None)
    report["rows"].append(scored(original, truth))
    for label, run in runs.items():
        answers = bundle_answers(task, [run], [1.0], folder / CACHE)
        rung = rank_rung(task, queries, manifest, answers.log_probabilities, answers.seen, label, original)
        report["rows"].append(scored(rung, truth))
        if rules.has_ranks:
            ours, places = answers.log_probabilities.exp(), places_of(truth, classes)
            report["ranks"] += [
                rank_row(label, groups, heads, ours, places) for groups, heads in zip(ranks, plain, strict=True)
            ]


def by_rules(
    task: Task,
    rules: Rules,
    recipe: Recipe,
    manifest: Manifest,
    ranks: Sequence[np.ndarray],
    queries: list[Observation],
) -> list[torch.Tensor]:
    """Per rank (queries, groups) scores of a system's rules, over the encoder as it comes; see `follow`."""
    module, spec = load_encoder(recipe.encoder.encoder, recipe.encoder.pretrained, recipe.encoder.image_size)
    device = pick_devices()[0]
    module.to(device, memory_format=torch.channels_last)
    encoder = Encoder(module, spec.preprocessing, spec.features, [device])
    part = task.support(manifest.competition.resolution)
    species = places_of(part.class_ids, manifest.class_ids)
    targets = np.stack([groups[species] for groups in ranks], axis=1)
    return follow(rules, recipe.train.epochs, encoder, part, targets, queries)


def rank_row(label: str, groups: np.ndarray, heads: torch.Tensor, ours: torch.Tensor, places: np.ndarray) -> dict:
    """Top-1 accuracies of one rank.

    Args:
        groups: (classes,) of the rank.
        heads: (queries, groups) scores of the rank's own head.
        ours: (queries, classes) probabilities.
        places: (queries,) of the true classes.
    """
    members = nn.functional.one_hot(torch.tensor(groups)).float()
    guesses = {"heads": heads.argmax(dim=1), "ours": (ours @ members).argmax(dim=1)}
    hits = {name: bounded((guess.numpy() == groups[places]).astype(float)) for name, guess in guesses.items()}
    return {"groups": members.shape[1], "recipe": label, **hits}


def scored(rung: Rung, truth: np.ndarray) -> dict:
    """A row of a report: scores, and the gain in Recall@1 over the original's rules."""
    row = {"name": rung.name, **score(truth, rung.guesses), "gain": None}
    firsts = [guesses[0] for guesses in rung.guesses]
    row["weighted_f1"] = float(f1_score(truth.astype(str), firsts, average="weighted", zero_division=0))
    if rung.below:
        row["gain"] = gained(*(hit_matrix(truth, one.guesses)[:, 0] for one in (rung, rung.below)))
    return row


def tell_rows(report: dict) -> list[str]:
    """The table of a dataset."""
    lines = [report["data"], "", *heading("rules", *COLUMNS.values(), "weighted F1", "gain in Recall@1")]
    for row in report["rows"]:
        cells = [cell(interval_of(row, name)) for name in COLUMNS]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['weighted_f1']:.3f} | {cell(row['gain'], '+')} |")
    return lines


def tell_ranks(report: dict) -> list[str]:
    """Top-1 accuracy by rank, of separate heads and of one head whose ranks are sums over species."""
    if not report["ranks"]:
        return []
    lines = heading("rank's groups", "rules", "a head for each rank", "sums over species")
    for row in report["ranks"]:
        lines.append(f"| {row['groups']} | {row['recipe']} | {cell(row['heads'])} | {cell(row['ours'])} |")
    return [*lines, ""]
