"""The settings of a recipe: one dataclass per table, each setting with its meaning, default and limits beside it."""

import math
from dataclasses import dataclass, field, fields

from kernel.inputs import InputError
from kernel.tables import RESOLUTIONS

# Views are added in groups: a rotation to the left without the one to the right would favour one side.
VIEW_GROUPS = (
    ("hflip",),
    ("rotate90", "rotate270"),
    ("rotate15", "rotate345"),
    ("centre",),
    ("top-left", "top-right", "bottom-left", "bottom-right"),
    ("larger",),
)
VIEWS = ("plain", *(view for group in VIEW_GROUPS for view in group))  # as in kernel.views, which imports torch
MOST_WEIGHT = 1_000_000  # far larger ones overflow, and every prediction would be the same
MONITORS = ("recalls", "recall_at_1", "recall_at_5", "recall_at_10", "macro_f1", "weighted_f1", "log_loss")

TYPES = {tuple: "a list", int: "an int", float: "a float", bool: "true or false", str: "a str"}


@dataclass(frozen=True)
class Setting:
    """The meaning of a setting and the values that it accepts.

    Attributes:
        meaning: one or two sentences, for `train.py --explain`.
        choices: the values of a str, or of the items of a list, each at most once; empty for any value.
        least, above, most, below: limits (>=, >, <=, <) of a number, or of each number in a list.
        items: of a list without choices: str or float.
        lengths: the numbers of items that a list may have; empty for any number.
        is_per_encoder: whether a list of such values gives one per encoder; a single value is for all of them.
        candidates: the values that cross-validation tries if `choose` names the setting, the simplest first. For
            `views`, the groups of views that it tries to add.
    """

    meaning: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    items: type = str
    lengths: tuple[int, ...] = ()
    is_per_encoder: bool = False
    candidates: tuple = ()

    def check(self, name: str, value: object, default: object, where: str) -> object:
        """Convert a value to the type of the default, and check it; see also `is_per_encoder`.

        Args:
            where: source of the value, for messages.

        Raises:
            InputError: it has another type, or is not one of the choices or within the limits.
        """
        if self.is_per_encoder and isinstance(value, (list, tuple)) and value:
            values = tuple(self.check(name, item, default, where) for item in value)
            return values if len(values) > 1 else values[0]
        value = _convert(value, default)
        is_list = isinstance(value, tuple)
        items = value if is_list else (value,)
        got = f"got {list(value) if is_list else value!r} (in {where})"

        def expect(is_met: bool, what: str) -> None:
            if not is_met:
                raise InputError(f"expected {what}, {got}")

        expect(type(value) is type(default), f"{TYPES[type(default)]} for {name}")
        is_length = not self.lengths or len(items) in self.lengths
        if self.choices:
            are_known = all(isinstance(item, str) and item in self.choices for item in items)
            how, each = ("some", ", each once") if is_list else ("one", "")
            is_met = are_known and len(set(items)) == len(items) and (is_length or not is_list)
            expect(is_met, f"{how} of {', '.join(self.choices)} for {name}{each}")
        elif is_list:
            are_right = all(isinstance(item, self.items) for item in items)
            count = f"{' or '.join(map(str, self.lengths))} " if self.lengths else ""
            what = "numbers" if self.items is float else self.items.__name__
            expect(is_length and are_right, f"a list of {count}{what} for {name}")
        numbers = [item for item in items if isinstance(item, (int, float))]
        expect(all(math.isfinite(item) for item in numbers if isinstance(item, float)), f"finite numbers for {name}")
        expect(all(map(self.allows, numbers)), self.limits(name))
        return value

    def allows(self, number: float) -> bool:
        """Whether a number is within the limits."""
        return not (
            (self.least is not None and number < self.least)
            or (self.above is not None and number <= self.above)
            or (self.most is not None and number > self.most)
            or (self.below is not None and number >= self.below)
        )

    def limits(self, name: str) -> str:
        """The limits of a number, such as `0 < crop_scale <= 1`; only the name if there are none."""
        low = [(self.least, "<=", ">="), (self.above, "<", ">")]
        high = [(self.most, "<="), (self.below, "<")]
        left = [(f"{limit} {sign} ", f" {alone} {limit}") for limit, sign, alone in low if limit is not None]
        right = "".join(f" {sign} {limit}" for limit, sign in high if limit is not None)
        if left and not right:
            return name + left[0][1]
        return (left[0][0] if left else "") + name + right


def _convert(value: object, default: object) -> object:
    """Convert an int to a float, and a list or comma-separated string to a tuple, if the default has that type."""
    if isinstance(default, float) and type(value) is int:
        return _to_float(value)
    if isinstance(default, tuple):
        if isinstance(value, str):
            value = value.split(",") if value else []
        if isinstance(value, (list, tuple)):
            return tuple(_to_float(item) if type(item) is int else item for item in value)
    return value


def _to_float(number: int) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def setting(default: object, meaning: str, **limits):
    """A dataclass field with its `Setting`, which documents the limits."""
    return field(default=default, metadata={"setting": Setting(meaning, **limits)})


@dataclass(frozen=True)
class OneEncoder:
    """One of a recipe's encoders: how it is named, the side of its input, and its pooling."""

    name: str
    image_size: int
    pool: str


@dataclass(frozen=True)
class EncoderSettings:
    """The encoder, and the photos that it gets."""

    encoder: str | tuple[str, ...] = setting(
        "hf-hub:imageomics/bioclip",
        "hf-hub:OWNER/NAME, open_clip:ARCHITECTURE/PRETRAINED, timm:NAME, or a path: of a run, of a folder in the "
        "hub's format, or of a .safetensors and a .json, without the suffix. --encoder sets it too. Of a list, the "
        "embeddings are concatenated.",
        is_per_encoder=True,
    )
    pretrained: bool = setting(True, "Use the pretrained weights. false: random weights, to train from scratch.")
    image_size: int | tuple[int, ...] = setting(
        0,
        "Side of the encoder's input in pixels, for which position embeddings are resampled. 0: that of its training.",
        least=0,
        most=2048,
        is_per_encoder=True,
    )
    pool: str | tuple[str, ...] = setting(
        "auto",
        "What a transformer with a class token returns. token: that token. avg: the mean of the patches. token+avg: "
        "both, concatenated. auto: what the library returns, but the class token of a DINOv3. stages: the final "
        "features of a convolutional network and the means of its last two stages, concatenated; of another encoder, "
        "as auto.",
        choices=("auto", "token", "avg", "token+avg", "stages"),
        is_per_encoder=True,
    )
    resolution: str = setting(
        "auto",
        "Which of FungiCLEF's image folders to read. auto: the smallest whose photos are not enlarged.",
        choices=("auto", *RESOLUTIONS),
    )
    precision: str = setting(
        "half", "Of the encoder on a GPU. Use full if half loses accuracy.", choices=("half", "full")
    )
    max_parameters: int = setting(0, "Refuse an encoder and head with more parameters. 0: no limit.", least=0)

    @property
    def each(self) -> tuple[OneEncoder, ...]:
        """The encoders, in their order."""
        names = as_tuple(self.encoder)
        sizes, pools = (as_tuple(values) for values in (self.image_size, self.pool))
        return tuple(
            OneEncoder(name, sizes[index % len(sizes)], pools[index % len(pools)]) for index, name in enumerate(names)
        )

    @property
    def name(self) -> str:
        """The names of all encoders, for messages."""
        return " + ".join(one.name for one in self.each)


def as_tuple(value: object) -> tuple:
    """A setting that may have a value per encoder, as a tuple."""
    return value if isinstance(value, tuple) else (value,)


@dataclass(frozen=True)
class BankSettings:
    """How observation embeddings are made and classified: class prototypes, and what is added to their scores."""

    views: tuple[str, ...] = setting(
        ("plain", "hflip"),
        "Variants of each photo whose embeddings are averaged.",
        choices=VIEWS,
        lengths=tuple(range(1, len(VIEWS) + 1)),
        candidates=VIEW_GROUPS,
    )
    resize_mode: str = setting(
        "encoder",
        "crop: resize the shorter side and cut out the centre. squash: resize both sides. pad: resize the longer side "
        "and repeat the edges beside the shorter one. encoder: as it was trained.",
        choices=("encoder", "crop", "squash", "pad"),
        candidates=("crop", "squash", "pad"),
    )
    encoder_weights: tuple[float, ...] = setting(
        (),
        "Weights of the embeddings of several encoders, of which only the ratios count. Empty: all have the same.",
        items=float,
        above=0,
        most=MOST_WEIGHT,
        candidates=(1.0, 0.7, 0.5, 0.35),
    )
    pool_part: str = setting(
        "all",
        "Which part of an embedding is used. token or avg: of an encoder with pool = token+avg. final: of one with "
        "pool = stages. all: everything, also of an encoder without that part.",
        choices=("all", "token", "avg", "final"),
        candidates=("all", "token", "avg", "final"),
    )
    pooling: str = setting("mean", "How an observation's photos become one embedding.", choices=("mean", "max"))
    reference: str = setting(
        "train+val",
        "The splits that the bank is made of. train: without val, so that a score on val or test is comparable.",
        choices=("train", "train+val"),
    )
    whitening: float = setting(
        0.0,
        "Exponent of the whitening of the variation within classes. 0: subtract the mean only. 1: whiten fully.",
        least=0,
        most=2,  # above, the variances to this power soon overflow 32 bits
        candidates=(0.0, 0.25, 0.5, 0.75, 1.0),
    )
    matcher: str = setting(
        "means",
        "means: a prototype per class, its mean. logistic: logistic regression, for many photos per class. projection: "
        "an ensemble of trained projections. head: the head trained with the encoder.",
        choices=("means", "logistic", "projection", "head"),
        candidates=("means", "logistic"),
    )
    genus_weight: float = setting(
        0.0,
        "Shrink a class mean towards the mean of its genus, which counts as this many observations.",
        least=0,
        most=MOST_WEIGHT,
        candidates=(0.0, 0.25, 0.5, 1.0),
    )
    family_weight: float = setting(
        0.0,
        "Shrink a class mean towards the mean of the other genera of its family, which counts as this many "
        "observations.",
        least=0,
        most=MOST_WEIGHT,
        candidates=(0.0, 0.25, 0.5),
    )
    text_weight: float = setting(
        0.0,
        "Shrink a class mean towards the embedding of the class's name, which counts as this many observations. Only "
        "for an encoder of open_clip that is not trained: its text tower embeds the names.",
        least=0,
        most=MOST_WEIGHT,
        candidates=(0.0, 0.5, 1.0, 2.0),
    )
    nearest_neighbour_weight: float = setting(
        0.0,
        "Mixture weight of a classifier by the nearest observation of each class.",
        least=0,
        most=1,
        candidates=(0.0, 0.2, 0.4),
    )
    hubness_weight: float = setting(
        0.0,
        "Weight of a correction for prototypes that are near to observations of many other classes.",
        least=0,
        most=10,
        candidates=(0.0, 0.25, 0.5),
    )
    class_prior_exponent: float = setting(
        0.0,
        "The prior probability of a class is its number of observations to this power.",
        least=0,
        most=10,
        candidates=(0.0, 0.25, 0.5),
    )
    transduction: float = setting(
        0.0,
        "Strength with which the test observations move the prototypes.",
        least=0,
        most=MOST_WEIGHT,
        candidates=(0.0, 0.125, 0.25, 0.5, 1.0),
    )
    metadata_weight: float = setting(
        0.0,
        "Weight of the log-probabilities by location, season and substrate, added to those by the photos.",
        least=0,
        most=MOST_WEIGHT,
        candidates=(0.0, 0.25, 0.5, 0.75, 1.0),
    )


CANDIDATES: dict[str, tuple] = {
    one.name: one.metadata["setting"].candidates for one in fields(BankSettings) if one.metadata["setting"].candidates
}


@dataclass(frozen=True)
class SearchSettings:
    """How the bank is selected."""

    choose: tuple[str, ...] = setting(
        (),
        "Settings of [bank] that cross-validation chooses, in this order. Of views it keeps those that help.",
        choices=tuple(CANDIDATES),
    )


@dataclass(frozen=True)
class TrainSettings:
    """What is trained, on which observations, and with which loss."""

    epochs: int = setting(0, "Epochs in which the encoder is trained. 0: do not train it.", least=0)
    seed: int = setting(
        0, "Of everything random: initial weights, splits, batches, augmentation.", least=0, most=2**32 - 1
    )
    subset: int = setting(
        0, "Use this many observations, drawn at random, to try a recipe in a minute. 0: all.", least=0
    )
    exclude: tuple[str, ...] = setting(
        (),
        "Ids of observations to leave out, such as mislabelled ones. --exclude reads them from a CSV.",
    )
    max_classes: int = setting(0, "Train on this many classes, those with the most observations. 0: all.", least=0)
    unfreeze: int = setting(
        2, "Groups of layers to train, counted from the output, as timm groups them. 0: none. -1: all.", least=-1
    )
    lora_rank: int = setting(0, "Rank of low-rank updates (LoRA), trained in place of the weights. 0: none.", least=0)
    gradient_checkpointing: bool = setting(False, "Recompute activations: a third slower, with much less memory.")
    prototypes: str = setting(
        "fixed",
        "The head's prototypes. fixed: the class means before training. updated: the class means after every epoch. "
        "learned: trained by gradient descent. episodic: the means of each episode's support set.",
        choices=("fixed", "updated", "learned", "episodic"),
    )
    head_only_epochs: int = setting(0, "Epochs before the others in which the head alone is trained.", least=0)
    hidden_features: int = setting(0, "Width of a hidden layer in the head. 0: no hidden layer.", least=0)
    dropout: float = setting(0.0, "Dropout of the embedding.", least=0, below=1)
    hidden_dropout: float = setting(0.0, "Dropout of the hidden layer.", least=0, below=1)
    temperature: float = setting(
        0.1,
        "Divides the squared distances between embeddings and prototypes, both of length 1.",
        least=0.001,
        most=1000,
    )
    label_smoothing: float = setting(0.0, "Probability spread evenly over all classes in the target.", least=0, most=1)
    arcface_margin: float = setting(0.0, "Additive angular margin of ArcFace, in radians.", least=0)
    class_weight_exponent: float = setting(
        0.0,
        "A class is weighted by its number of observations to minus this power. 1: all classes count alike.",
        least=0,
        most=10,
    )
    rank_weights: tuple[float, ...] = setting(
        (),
        "Weights of the losses of phylum, class, order, family and genus, beside 1 for the species. Empty: none.",
        items=float,
        lengths=(0, 5),
        least=0,
        most=MOST_WEIGHT,
    )
    batch_size: int = setting(32, "Observations per batch.", least=1)
    accumulate: int = setting(1, "Batches per optimizer step.", least=1)
    photos_per_observation: int = setting(4, "At most so many photos of an observation per epoch, at random.", least=1)
    balance: float = setting(
        0.0,
        "0: every observation once per epoch. 1: every class equally often. Between: a class is drawn by "
        "its size to the power of 1 - balance.",
        least=0,
        most=1,
    )
    ways: int = setting(20, "Classes per episode.", least=2)
    support: int = setting(1, "Support observations per class of an episode.", least=1)
    queries: int = setting(3, "Query observations per class of an episode, or as many as there are.", least=1)
    monitor: str = setting(
        "recalls",
        "The validation score that selects the epoch; recalls: the mean of Recall@1, 5 and 10. With macro_f1 the bank "
        "is selected by a mean over classes too.",
        choices=MONITORS,
    )
    patience: int = setting(4, "Stop after this many epochs without a better score.", least=1)


@dataclass(frozen=True)
class AugmentSettings:
    """How training photos are varied."""

    crop_scale: float = setting(0.6, "Smallest fraction of a photo's area in a random crop.", above=0, most=1)
    flip: bool = setting(True, "Flip half of the photos left to right.")
    rotate: float = setting(0.0, "Rotate by up to this many degrees.", least=0)
    translate: float = setting(
        0.0, "Translate by up to this fraction of the side, and zoom by up to the same.", least=0, below=1
    )
    colour_jitter: float = setting(0.1, "Vary brightness, contrast and saturation by up to this factor.", least=0)
    hue: float = setting(0.0, "Vary the hue by up to this fraction of the colour circle.", least=0, most=0.5)
    rand_augment: int = setting(0, "Magnitude of RandAugment, two operations per photo. 0: none.", least=0, most=10)
    erase: float = setting(0.0, "Probability of erasing a random rectangle.", least=0, most=1)
    mixup: float = setting(0.0, "Alpha of mixup. 0: none.", least=0, most=1000)
    cutmix: float = setting(0.0, "Alpha of CutMix. 0: none.", least=0, most=1000)


@dataclass(frozen=True)
class OptimSettings:
    """The optimizer and the learning rate."""

    optimizer: str = setting("adamw", "sgd has Nesterov momentum.", choices=("adamw", "adam", "sgd"))
    learning_rate: float = setting(1e-4, "Peak learning rate.", above=0)
    layer_decay: float = setting(
        1.0, "Factor of the learning rate from each layer to the one below it.", above=0, most=1
    )
    weight_decay: float = setting(0.05, "Weight decay of the encoder.", least=0)
    grad_clip_norm: float = setting(1.0, "Clip the gradient to this norm. 0: do not clip.", least=0)
    schedule: str = setting(
        "cosine",
        "cosine: down to 0 over all epochs. plateau: times plateau_factor when validation stops improving. constant.",
        choices=("cosine", "plateau", "constant"),
    )
    warmup: float = setting(0.1, "Fraction of the steps in which the learning rate rises from 0.", least=0, most=1)
    plateau_factor: float = setting(0.2, "Factor of the learning rate at a plateau.", above=0, most=1)
    plateau_patience: int = setting(3, "Epochs without a better score that make a plateau.", least=0)
    ema_decay: float = setting(
        0.0,
        "Decay per step of the moving average of the weights, which is validated and kept. 0: no average.",
        least=0,
        below=1,
    )
