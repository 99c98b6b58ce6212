"""Fine-tune an encoder as a prototypical network, and judge it at every epoch as the kernel would use it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from kernel.bank import Bank, rank
from kernel.embeddings import embed_observations
from kernel.encoders import Encoder, pick_dtype
from kernel.observations import Observation
from kernel.photos import read_photo, shorter_side
from local.banks import centroids
from local.competition import Labelled, places_of, sort_ids
from local.console import progress, say
from local.metrics import GUESSES, hit_matrix, paired_gain
from local.recipe import Recipe


@dataclass(frozen=True)
class Judged:
    """An encoder's answers on the validation observations, by class means.

    Attributes:
        bank: of the class means of what was learnt from.
        hits: (validation observations, 3) whether the true class is among the first 1, 5, 10.
    """

    bank: Bank
    hits: np.ndarray

    @property
    def recalls(self) -> dict[str, float]:
        """Recall@1/5/10."""
        return {f"recall_at_{count}": float(self.hits[:, index].mean()) for index, count in enumerate(GUESSES)}


def judge(encoder: Encoder, fit: Labelled, validation: Labelled, recipe: Recipe, views: Sequence[str]) -> Judged:
    """Build the bank from one part and rank the other, both embedded as the kernel would."""
    encoder.module.eval()
    classes, embedded = sort_ids(fit.class_ids), []
    for part in (fit, validation):
        embeddings = embed_observations(encoder, part.observations, views, recipe.pooling)
        for cause, count in embeddings.failures.items():
            say(f"{count} photos could not be read ({cause}) and were left out")
        embedded.append(embeddings.values)
    reference, queries = embedded
    bank = centroids(reference.double().numpy(), places_of(fit.class_ids, classes), len(classes), recipe.centre)
    guesses = [[classes[index] for index in row] for row in rank([[bank]], [1.0], [queries], max(GUESSES)).tolist()]
    return Judged(bank, hit_matrix(validation.class_ids, guesses))


class Support(Dataset):
    """Augmented photos by observation: item -> ((photos, 3, size, size) uint8, index of the observation)."""

    def __init__(self, observations: Sequence[Observation], encoder: Encoder, recipe: Recipe):
        self.observations, self.limit, self.preprocessing = (
            observations,
            recipe.photos_per_observation,
            encoder.preprocessing,
        )
        jitter = recipe.colour_jitter
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(self.preprocessing.size, scale=(recipe.crop_scale, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(jitter, jitter, jitter),
                v2.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.observations)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        photos = self.observations[index].photos
        chosen = torch.randperm(len(photos))[: self.limit].tolist()
        views = []
        for place in chosen:
            try:
                views.append(self.augment(read_photo(photos[place], shorter_side(self.preprocessing))))
            except Exception:  # as wide as the kernel's own guard; the evaluation has counted it by its cause
                continue
        size = self.preprocessing.size
        return (torch.stack(views) if views else torch.zeros(0, 3, size, size, dtype=torch.uint8)), index


def collate(items: Sequence[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Photos of several observations in one batch, the place in the batch of each photo's owner, and the owners."""
    items = [(photos, index) for photos, index in items if len(photos)]
    photos = torch.cat([photos for photos, _ in items]) if items else torch.zeros(0)
    owners = torch.repeat_interleave(torch.arange(len(items)), torch.tensor([len(photos) for photos, _ in items]))
    return photos, owners, torch.tensor([index for _, index in items])


class PrototypicalLoss(nn.Module):
    """Cross-entropy over negative squared distances to one prototype per class (Snell et al. 2017).

    Distances are taken in the bank's own space, centred and of length 1, so that what is trained is what is matched.

    Args:
        centre: (features,) of the reference.
        prototypes: (classes, features), fixed where they are, or where learning starts.
    """

    def __init__(self, centre: torch.Tensor, prototypes: torch.Tensor, recipe: Recipe):
        super().__init__()
        self.register_buffer("centre", centre)
        self.prototypes = nn.Parameter(prototypes.clone(), requires_grad=recipe.prototypes == "learned")
        self.pooling, self.temperature, self.smoothing = recipe.pooling, recipe.temperature, recipe.label_smoothing

    def forward(self, embeddings: torch.Tensor, owners: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(photos, features) of length 1, (photos,) owners, (observations,) classes -> the mean loss."""
        start = 0.0 if self.pooling == "mean" else -torch.inf
        pooled = embeddings.new_full((len(targets), embeddings.shape[1]), start)
        if self.pooling == "mean":
            pooled = pooled.index_add(0, owners, embeddings)
        else:
            pooled = pooled.scatter_reduce(0, owners[:, None].expand_as(embeddings), embeddings, "amax")
        pooled = nn.functional.normalize(nn.functional.normalize(pooled, dim=1) - self.centre, dim=1)
        distances = 2 - 2 * pooled @ nn.functional.normalize(self.prototypes, dim=1).T
        return nn.functional.cross_entropy(-distances / self.temperature, targets, label_smoothing=self.smoothing)


def unfreeze(module: nn.Module, groups: int) -> list[nn.Parameter]:
    """Let the last groups of layers learn, all for -1, and freeze the rest.

    Returns:
        The parameters that learn.
    """
    if groups < 0:
        module.requires_grad_(True)
    elif hasattr(module, "lock"):  # open_clip's towers
        module.requires_grad_(True)
        module.lock(unlocked_groups=groups, freeze_bn_stats=False)
    else:
        from timm.models import group_parameters

        layers = group_parameters(module, module.group_matcher(coarse=False))
        learning = {name for layer in sorted(layers)[-groups:] for name in layers[layer]} if groups else set()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in learning)
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def set_training(module: nn.Module, pretrained: bool) -> None:
    """Training mode; a pretrained encoder's batch statistics stay, since a few shots would only blur them."""
    module.train()
    if pretrained:
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """The learning rate's factor: linear from 0 over the first share of the steps, then half a cosine back to 0."""
    ramp = max(1, round(steps * warmup))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def train_epoch(
    encoder: Encoder,
    loss: PrototypicalLoss,
    batches: DataLoader,
    targets: torch.Tensor,
    optimiser: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
) -> float:
    """One pass over the observations. Returns the mean loss."""
    total, seen, device = 0.0, 0, encoder.device
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for photos, owners, index in progress(batches, "training"):
        if not len(index):
            continue
        with torch.autocast(device.type, pick_dtype(device), enabled=device.type == "cuda"):
            embeddings = encoder.forward(encoder.normalise(photos, device), encoder.module)
        value = loss(embeddings, owners.to(device), targets[index].to(device))
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(value).backward()
        scaler.unscale_(optimiser)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimiser)
        scaler.update()
        scheduler.step()
        total, seen = total + value.item() * len(index), seen + len(index)
    return total / max(1, seen)


def finetune(encoder: Encoder, fit: Labelled, validation: Labelled, recipe: Recipe) -> tuple[list[dict], int]:
    """Fine-tune in place, and leave the weights of the chosen epoch.

    Every epoch is judged by a bank rebuilt from the tuned encoder. Epoch 0 is the encoder as it came: another epoch
    takes its place only by a gain in Recall@5 larger than its paired standard error, so that chance on a small
    validation cannot pass for learning (the one-standard-error rule of Breiman et al. 1984).

    Returns:
        The rows of log.csv, and the chosen epoch.
    """
    views = recipe.views[:1]  # all views on the final judgement; one is enough to compare epochs
    start = judge(encoder, fit, validation, recipe, views)
    log = [log_row(0, "", 0.0, start.recalls)]
    say(f"epoch 0: {log_line(log[0])}")
    prototypes = start.bank.prototypes
    centre = -start.bank.layers[0].bias if recipe.centre else torch.zeros(prototypes.shape[1])
    loss = PrototypicalLoss(centre, prototypes, recipe).to(encoder.device)
    parameters = unfreeze(encoder.module, recipe.unfreeze)
    learning = [*parameters, *(parameter for parameter in loss.parameters() if parameter.requires_grad)]
    targets = torch.tensor(places_of(fit.class_ids, sort_ids(fit.class_ids)))
    batches = DataLoader(
        Support(fit.observations, encoder, recipe),
        batch_size=recipe.batch_size,
        shuffle=True,
        collate_fn=collate,
        num_workers=2,
        persistent_workers=True,
        generator=torch.Generator().manual_seed(recipe.seed),
    )
    optimiser = torch.optim.AdamW(learning, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * len(batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: warmup_cosine(step, steps, recipe.warmup))
    uses_fp16 = encoder.device.type == "cuda" and pick_dtype(encoder.device) == torch.float16
    scaler = torch.amp.GradScaler(encoder.device.type, enabled=uses_fp16)

    best, best_epoch, best_state = start, 0, copy_state(encoder.module)
    for epoch in range(1, recipe.epochs + 1):
        set_training(encoder.module, recipe.pretrained)
        mean_loss = train_epoch(encoder, loss, batches, targets, optimiser, scheduler, scaler)
        if not math.isfinite(mean_loss):
            say(f"epoch {epoch}: the loss is {mean_loss}; stopping with what was learnt before")
            break
        judged = judge(encoder, fit, validation, recipe, views)
        log.append(log_row(epoch, mean_loss, scheduler.get_last_lr()[0], judged.recalls))
        say(f"epoch {epoch}: loss {mean_loss:.4f}  {log_line(log[-1])}")
        if recall_at_5(judged) > recall_at_5(best):
            gain, error = paired_gain(judged.hits[:, 1], start.hits[:, 1])
            if gain > error:
                best, best_epoch, best_state = judged, epoch, copy_state(encoder.module)
        if epoch - max(range(len(log)), key=lambda row: log[row]["recall_at_5"]) >= recipe.patience:
            say(f"no better Recall@5 for {recipe.patience} epochs: stopping")
            break
    encoder.module.load_state_dict(best_state)
    encoder.module.requires_grad_(False).eval()
    say(f"chosen: epoch {best_epoch}" + ("" if best_epoch else ", the encoder as it came"))
    return log, best_epoch


def recall_at_5(judged: Judged) -> float:
    return judged.hits[:, 1].mean()


def log_row(epoch: int, loss: float | str, learning_rate: float, scores: dict[str, float]) -> dict:
    """A row of log.csv."""
    recalls = {f"recall_at_{count}": scores[f"recall_at_{count}"] for count in GUESSES}
    return {"epoch": epoch, "loss": loss, "learning_rate": learning_rate, **recalls}


def log_line(row: dict) -> str:
    """What an epoch's line on the console says of the validation."""
    return "validation " + "  ".join(f"Recall@{count} {row[f'recall_at_{count}']:.3f}" for count in GUESSES)


def copy_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights in memory."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
