"""Fine-tune an encoder as a prototypical network, and judge it at every epoch as the kernel would use it."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from timm.data.auto_augment import rand_augment_transform
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.lr_scheduler import LambdaLR
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

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the tuned weights in the encoder; 0 leaves it as it came
PROBE_RATE = 10.0  # times the learning rate: a head alone may go faster than an encoder that has much to lose


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

    @property
    def worth(self) -> np.ndarray:
        """(validation observations,) the mean of the recalls: one of them alone would choose by a few hits."""
        return self.hits.mean(axis=1)


@dataclass(frozen=True)
class Tuning:
    """What fine-tuning came to.

    Attributes:
        log: the rows of log.csv, one per epoch.
        epoch: whose weights were mixed in; 0 where the encoder stays as it came.
        share: of them in the encoder, one of SHARES.
    """

    log: list[dict]
    epoch: int
    share: float


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
        jitter, strength = recipe.colour_jitter, recipe.rand_augment
        fill = tuple(round(255 * value) for value in self.preprocessing.mean)
        policy = [rand_augment_transform(f"rand-m{strength}-n2-mstd0.5-inc1", {"img_mean": fill})] if strength else []
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(self.preprocessing.size, scale=(recipe.crop_scale, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                *policy,
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
        layers = group_parameters(module, module.group_matcher(coarse=False))
        learning = {name for layer in sorted(layers)[-groups:] for name in layers[layer]} if groups else set()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in learning)
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class LowRank(nn.Module):
    """W -> W + up @ down, of which up and down alone learn (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Args:
        weight: (features out, ...), a matrix once all but the first dimension are one.
    """

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, weight[0].numel(), device=weight.device))
        self.up = nn.Parameter(torch.zeros(len(weight), rank, device=weight.device))  # so that training starts at W
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def add_low_rank(module: nn.Module, rank: int) -> None:
    """Let every matrix that learns do so by a low-rank addition, and freeze all else.

    Matrices are those of linear layers, of attention, and of convolutions over all channels, when larger than the rank.
    """
    learning = [
        (layer, name)
        for layer in module.modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)) and getattr(layer, "groups", 1) == 1
        for name, weight in layer.named_parameters(recurse=False)
        if weight.requires_grad and weight.ndim > 1 and min(len(weight), weight[0].numel()) > rank
    ]
    module.requires_grad_(False)
    for layer, name in learning:
        parametrize.register_parametrization(layer, name, LowRank(getattr(layer, name), rank))


def group_by_layer(module: nn.Module, recipe: Recipe) -> list[dict]:
    """What learns of an encoder as AdamW's parameter groups, the learning rate smaller by `layer_decay` per layer."""
    if hasattr(getattr(module, "transformer", None), "resblocks"):  # open_clip's transformers, in timm's terms
        blocks = [(r"^transformer\.resblocks\.(\d+)", None), (r"^(?:ln_post|proj)", (99999,))]
        module.group_matcher = lambda coarse: {
            "stem": r"^(?:conv1|class_embedding|positional|ln_pre)",
            "blocks": blocks,
        }
    groups = param_groups_layer_decay(module, recipe.weight_decay, layer_decay=recipe.layer_decay)
    return [{**group, "lr": recipe.learning_rate * group.pop("lr_scale")} for group in groups]


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


class Optimising:
    """AdamW over parameter groups, with its schedule over so many steps, and gradients scaled where fp16 needs it."""

    def __init__(self, groups: list[dict], steps: int, recipe: Recipe, device: torch.device):
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.scheduler = LambdaLR(self.optimiser, lambda step: warmup_cosine(step, steps, recipe.warmup))
        uses_fp16 = device.type == "cuda" and pick_dtype(device) == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=uses_fp16)
        self.parameters = [parameter for group in groups for parameter in group["params"]]

    def step(self, loss: torch.Tensor) -> None:
        """Follow the gradient of a loss."""
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.scheduler.step()


def train_epoch(
    encoder: Encoder,
    loss: PrototypicalLoss,
    batches: DataLoader,
    targets: torch.Tensor,
    optimising: Optimising,
    average: ModelEmaV3 | None = None,
) -> float:
    """One pass over the observations. Returns the mean loss."""
    total, seen, device = 0.0, 0, encoder.device
    for photos, owners, index in progress(batches, "training"):
        if not len(index):
            continue
        with torch.autocast(device.type, pick_dtype(device), enabled=device.type == "cuda"):
            embeddings = encoder.forward(encoder.normalise(photos, device), encoder.module)
        value = loss(embeddings, owners.to(device), targets[index].to(device))
        optimising.step(value)
        if average:
            average.update(encoder.module, optimising.scheduler.last_epoch)
        total, seen = total + value.item() * len(index), seen + len(index)
    return total / max(1, seen)


def finetune(encoder: Encoder, fit: Labelled, validation: Labelled, recipe: Recipe) -> Tuning:
    """Fine-tune in place: the head first where the recipe probes, then the layers that it unfreezes.

    Every epoch is judged by a bank rebuilt from the tuned encoder, and the best one's weights are mixed with those that
    the encoder came with, in a share that validation chooses; with a share of 0 the encoder stays as it came.
    """

    def judged(candidate: Encoder) -> Judged:
        return judge(candidate, fit, validation, recipe, recipe.views[:1])  # one view is enough to compare

    encoder.module.requires_grad_(False).eval()
    start = judged(encoder)
    log = [log_row(0, "", 0.0, start.recalls)]
    say(f"epoch 0: {log_line(start)}")
    prototypes = start.bank.prototypes
    centre = -start.bank.layers[0].bias if recipe.centre else torch.zeros(prototypes.shape[1])
    loss = PrototypicalLoss(centre, prototypes, recipe).to(encoder.device)
    batches = DataLoader(
        Support(fit.observations, encoder, recipe),
        batch_size=recipe.batch_size,
        shuffle=True,
        collate_fn=collate,
        num_workers=2,
        persistent_workers=True,
        generator=torch.Generator().manual_seed(recipe.seed),
    )
    targets = torch.tensor(places_of(fit.class_ids, sort_ids(fit.class_ids)))
    probe(encoder, loss, batches, targets, recipe)

    tuned = with_module(encoder, copy.deepcopy(encoder.module))
    unfreeze(tuned.module, recipe.unfreeze)
    if recipe.lora:
        add_low_rank(tuned.module, recipe.lora)
    # The average starts short and lengthens, since a few shots make few steps.
    average = ModelEmaV3(tuned.module, recipe.ema, use_warmup=True) if recipe.ema else None
    kept = with_module(encoder, average.module) if average else tuned
    groups = [*group_by_layer(tuned.module, recipe), *head_groups(loss)]
    optimising = Optimising(groups, recipe.epochs * len(batches), recipe, encoder.device)
    epochs, best_state = [start], {}
    for epoch in range(1, recipe.epochs + 1):
        set_training(tuned.module, recipe.pretrained)
        mean_loss = train_epoch(tuned, loss, batches, targets, optimising, average)
        if not math.isfinite(mean_loss):
            say(f"epoch {epoch}: the loss is {mean_loss}; stopping with what was learnt before")
            break
        present = judged(kept)
        log.append(log_row(epoch, mean_loss, max(optimising.scheduler.get_last_lr()), present.recalls))
        say(f"epoch {epoch}: loss {mean_loss:.4f}  {log_line(present)}")
        epochs.append(present)
        if best_of(epochs[1:]) == epoch - 1:
            best_state = copy_state(kept.module)
        if epoch - best_of(epochs) >= recipe.patience:
            say(f"no better recalls for {recipe.patience} epochs: stopping")
            break

    if not best_state:
        return Tuning(log, 0, 0.0)
    best_epoch = best_of(epochs[1:]) + 1
    before, mixes = copy_state(encoder.module), []
    for share in SHARES[1:-1]:
        encoder.module.load_state_dict(interpolate(before, best_state, share))
        mixes.append(judged(encoder))
        say(f"{share:.0%} of epoch {best_epoch}: {log_line(mixes[-1])}")
    share = choose_share([start, *mixes, epochs[best_epoch]])
    encoder.module.load_state_dict(interpolate(before, best_state, share))
    say(f"chosen: {share:.0%} of epoch {best_epoch}" if share else "chosen: the encoder as it came")
    return Tuning(log, best_epoch if share else 0, share)


def probe(encoder: Encoder, loss: PrototypicalLoss, batches: DataLoader, targets: torch.Tensor, recipe: Recipe) -> None:
    """Train the head alone, so that its first large errors do not distort the features.

    LP-FT (Kumar et al. 2022, https://arxiv.org/abs/2202.10054).
    """
    if recipe.probe:
        groups = [{**group, "lr": recipe.learning_rate * PROBE_RATE} for group in head_groups(loss)]
        optimising = Optimising(groups, recipe.probe * len(batches), recipe, encoder.device)
        for epoch in range(recipe.probe):
            say(f"probe {epoch + 1}: loss {train_epoch(encoder, loss, batches, targets, optimising):.4f}")


def head_groups(loss: PrototypicalLoss) -> list[dict]:
    """What learns of the head as AdamW's parameter groups."""
    return [{"params": [parameter]} for parameter in loss.parameters() if parameter.requires_grad]


def choose_share(judged: Sequence[Judged]) -> float:
    """The best of SHARES, if its gain over the encoder as it came is larger than its paired standard error.

    So chance on a small validation cannot pass for learning (the one-standard-error rule of Breiman et al. 1984).
    """
    best = best_of(judged)
    gain, error = paired_gain(judged[best].worth, judged[0].worth)
    return SHARES[best] if gain > error else 0.0


def best_of(judged: Sequence[Judged]) -> int:
    """The place of the best, the first of equals."""
    return int(np.argmax([one.worth.mean() for one in judged]))


def interpolate(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], share: float) -> dict:
    """Weights on the line between two encoders, which are often better than either and forget less.

    WiSE-FT (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903).
    """
    return {
        name: value.lerp(after[name], share) if value.is_floating_point() else after[name] if share else value
        for name, value in before.items()
    }


def with_module(encoder: Encoder, module: nn.Module) -> Encoder:
    """The same encoder with other weights."""
    return Encoder(module, encoder.preprocessing, encoder.features, [encoder.device])


def log_row(epoch: int, loss: float | str, learning_rate: float, scores: dict[str, float]) -> dict:
    """A row of log.csv."""
    recalls = {f"recall_at_{count}": scores[f"recall_at_{count}"] for count in GUESSES}
    return {"epoch": epoch, "loss": loss, "learning_rate": learning_rate, **recalls}


def log_line(judged: Judged) -> str:
    """What a line on the console says of the validation."""
    recalls = zip(GUESSES, judged.recalls.values(), strict=True)
    return "validation " + "  ".join(f"Recall@{count} {recall:.3f}" for count, recall in recalls)


def copy_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights in memory, under their own names; low-rank additions are added to theirs."""
    own = {name: value for name, value in module.state_dict().items() if ".parametrizations." not in name}
    for path, layer in module.named_modules():
        if parametrize.is_parametrized(layer):
            own |= {f"{path}.{name}": getattr(layer, name) for name in layer.parametrizations}
    return {name: value.detach().clone() for name, value in own.items()}
