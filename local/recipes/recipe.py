"""Recipes: how to train, as a TOML file of differences from the defaults below."""

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel.embeddings import POOLINGS
from kernel.inputs import InputError
from kernel.observations import RESOLUTIONS
from kernel.views import VIEWS

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """Every setting of a run; each is a key of the TOML file and of `--set key=value`."""

    # What sees the photos.
    encoder: str = "hf-hub:imageomics/bioclip"
    pretrained: bool = True  # false: the architecture with random weights, to train from scratch
    image_size: int = 0  # pixels; 0: the encoder's own
    resolution: str = "auto"  # one of FungiCLEF's folders; auto: the smallest that the encoder does not enlarge
    fit: str = "encoder"  # "crop", "squash", or what the encoder was trained with
    precision: str = "half"  # of the encoder on a GPU; "full" for one that loses by it
    views: tuple[str, ...] = ("plain", "hflip")
    pooling: str = "mean"  # over an observation's photos

    # What the bank is made of.
    reference: str = "train+val"  # "train" keeps val out of the bank, so that a score on val or test compares
    centre: bool = True  # subtract the reference's mean before cosines
    whitening: float = 0.0  # exponent: 0 only centres, 1 evens out all variation within classes
    matcher: str = "means"  # a class's mean, "several" prototypes, a linear classifier, or trained networks
    genus: float = 0.0  # a class's relatives in its genus weigh as much as so many of its observations
    family: float = 0.0  # the same of the other genera of its family, each the mean of its classes
    nearest: float = 0.0  # share of the nearest observation in the probabilities
    shots: float = 0.0  # a class is likelier by its number of observations to this power
    transduction: float = 0.0  # how much the test's own observations move the prototypes
    metadata: float = 0.0  # weight of what place, season and substrate say, against what the photos say
    choose: tuple[str, ...] = ()  # keys of this part, and views, that cross-validation chooses: matching/choice.py

    # Training; none with epochs = 0.
    epochs: int = 0
    unfreeze: int = 2  # groups of layers from the top that learn, as timm and open_clip group them; 0: none; -1: all
    lora: int = 0  # rank of what their matrices learn; 0: they learn in full
    gradient_checkpointing: bool = False  # a third slower, with a fraction of the memory
    classes: int = 0  # learn from so many classes of the most observations alone; 0: all
    subset: int = 0  # of so many observations, drawn at random, to try a recipe in a minute; 0: all
    most_parameters: int = 0  # an encoder and head with more are refused; 0: no limit
    # The head, which is a bank: `matcher = "head"` keeps it, any other makes a bank of the tuned embeddings.
    prototypes: str = "fixed"  # at the class means as they came; "updated" every epoch; "learned"; "episodic"
    subcentres: int = 1  # prototypes of each class, of which the nearest counts
    hidden: int = 0  # units of a layer in between; 0: none
    dropout: float = 0.0  # of the embedding
    hidden_dropout: float = 0.0
    temperature: float = 0.1  # of squared distances between unit vectors
    probe: int = 0  # epochs before the others in which the head learns alone
    # The loss.
    label_smoothing: float = 0.0
    arcface: float = 0.0  # margin in radians by which the true class must be nearer
    cosface: float = 0.0  # the same in cosine
    class_weights: float = 0.0  # a class's part in the loss falls with its observations to this power; 1: all equal
    rank_weights: tuple[float, ...] = ()  # of the coarser ranks beside the species' 1, the widest first
    # What is seen.
    batch_size: int = 32  # observations
    accumulate: int = 1  # batches to a step
    photos_per_observation: int = 4  # seen of one observation in one step
    balance: float = 0.0  # classes are drawn as often as their observations to the power of 1 minus this
    ways: int = 20  # classes of an episode
    support: int = 1  # observations of each that make its prototype, and ...
    queries: int = 3  # ... that are asked; of a smaller class as many as there are
    crop_scale: float = 0.6  # smallest share of a photo's area in a random crop
    flip: bool = True  # left and right alike
    rotate: float = 0.0  # degrees, at most
    translate: float = 0.0  # share of the side, at most; also by which a photo shrinks or grows
    colour_jitter: float = 0.1
    hue: float = 0.0
    rand_augment: int = 0  # magnitude of RandAugment's two random operations, up to 10
    erase: float = 0.0  # share of photos of which a random rectangle is erased
    mixup: float = 0.0  # alpha; 0: none
    cutmix: float = 0.0
    # How it learns.
    optimiser: str = "adamw"
    learning_rate: float = 1e-4
    layer_decay: float = 1.0  # factor of the learning rate from one layer to the one below
    weight_decay: float = 0.05
    clip: float = 1.0  # length of the gradient, at most; 0: no limit
    schedule: str = "cosine"  # down to 0; "plateau": down by `decay` when validation stands still; "constant"
    warmup: float = 0.1  # share of the steps
    restarts: int = 0  # of the cosine
    decay: float = 0.2
    decay_patience: int = 3  # epochs
    ema: float = 0.0  # decay per step of the moving average of the weights that is judged and kept; 0: none
    monitor: str = "recalls"  # of the validation: their mean, or a column of log.csv; by macro_f1 banks are chosen too
    patience: int = 4  # epochs without a better one
    seed: int = 0


MONITORS = ("recalls", "recall_at_1", "recall_at_5", "recall_at_10", "macro_f1", "weighted_f1", "log_loss")
CHOICES = {
    "resolution": ("auto", *RESOLUTIONS),
    "fit": ("encoder", "crop", "squash"),
    "precision": ("half", "full"),
    "pooling": POOLINGS,
    "reference": ("train", "train+val"),
    "prototypes": ("fixed", "updated", "learned", "episodic"),
    "matcher": ("means", "several", "ridge", "random-ridge", "logistic", "projection", "head"),
    "optimiser": ("adamw", "adam", "sgd"),
    "schedule": ("cosine", "plateau", "constant"),
    "monitor": MONITORS,
}
BANK = ("whitening", "genus", "family", "nearest", "shots", "transduction", "metadata")
CHOOSABLE = ("fit", "views", "matcher", *BANK)
POSITIVE = (
    "subcentres",
    "temperature",
    "batch_size",
    "accumulate",
    "photos_per_observation",
    "support",
    "queries",
    "crop_scale",
    "learning_rate",
    "layer_decay",
    "decay",
    "patience",
)
SHARES = (
    "nearest",
    "dropout",
    "hidden_dropout",
    "label_smoothing",
    "balance",
    "crop_scale",
    "translate",
    "erase",
    "layer_decay",
    "warmup",
    "decay",
    "ema",
)
BELOW_ONE = ("dropout", "hidden_dropout", "ema")  # at 1 nothing would be left to learn
MOST = {"rand_augment": 10, "hue": 0.5}
SIGNED = ("unfreeze",)


def read_recipe(name: str, settings: Sequence[str] = (), encoder: str | None = None) -> Recipe:
    """A recipe by the name of a file in local/recipes or by path, with `key=value` settings on top.

    Raises:
        InputError: no such recipe; an unknown key; a value of the wrong type or out of range.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in FOLDER.glob("*.toml")))
        raise InputError(f"no recipe {name}: known are {known}, or the path of a .toml file")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from error
    sources = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals:
            raise InputError(f"--set {setting} has no value: write --set key=value")
        values[key], sources[key] = _parse(text.strip()), f"--set {setting}"
    if encoder:
        values["encoder"], sources["encoder"] = encoder, f"--encoder {encoder}"
    return make_recipe(values, str(path), sources)


def make_recipe(values: dict, where: str, sources: Mapping[str, str] | None = None) -> Recipe:
    """A validated recipe from settings.

    Args:
        where: the settings come from, to be named in errors.
        sources: where single settings come from instead, by key, such as `--set epochs=3`.

    Raises:
        InputError: see `read_recipe`.
    """
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    sources = {key: where for key in values} | dict(sources or {})
    checked = {}
    for key, value in values.items():
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown key {key!r} in {sources[key]}: the nearest known one is {nearest!r}")
        checked[key] = _check(key, value, fields[key].default, sources[key])
    recipe = Recipe(**checked)
    is_learned, is_episodic = recipe.prototypes == "learned", recipe.prototypes == "episodic"
    mixes = recipe.mixup or recipe.cutmix
    for wrong, keys, why in (
        (recipe.probe and not is_learned, "probe prototypes", 'probe: nothing learns, set prototypes = "learned"'),
        (recipe.hidden and not is_learned, "hidden prototypes", 'hidden: it needs prototypes = "learned"'),
        (recipe.subcentres > 1 and not is_learned, "subcentres prototypes", 'subcentres: set prototypes = "learned"'),
        (
            recipe.matcher == "head" and is_episodic,
            "matcher prototypes",
            'matcher = "head": episodes leave no head, set prototypes = "learned" or another matcher',
        ),
        (
            recipe.matcher == "head" and not recipe.epochs,
            "matcher epochs",
            'matcher = "head": with epochs = 0 there is no head, set epochs or another matcher',
        ),
        (
            mixes and recipe.photos_per_observation > 1,
            "mixup cutmix photos_per_observation",
            "mixup and cutmix mix photos, not observations: set photos_per_observation = 1",
        ),
        (
            mixes and is_episodic,
            "mixup cutmix prototypes",
            "mixup and cutmix do not work with episodes: set them to 0, or other prototypes",
        ),
        (is_episodic and recipe.ways < 2, "ways prototypes", "ways: an episode needs at least two classes"),
    ):
        if wrong:
            given = dict.fromkeys(sources[key] for key in keys.split() if key in sources)
            raise InputError(f"{why} (in {' and '.join(given)})")
    return recipe


def _check(key: str, value: object, default: object, where: str) -> object:
    if isinstance(default, tuple):
        if isinstance(value, (str, list)):
            value = tuple(value.split(",") if isinstance(value, str) else value)
        if key == "rank_weights" and isinstance(value, tuple):
            value = tuple(float(weight) if type(weight) is int else weight for weight in value)
    elif isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        kinds = {tuple: "a list", int: "an int", float: "a float", bool: "true or false", str: "a str"}
        raise InputError(f"expected {kinds[type(default)]} for {key}, got {value!r} (in {where})")
    if key in CHOICES and value not in CHOICES[key]:
        raise InputError(f"{key} = {value!r} in {where}: choose from {', '.join(CHOICES[key])}")
    if key == "views" and (not value or len([view for view in VIEWS if view in value]) < len(value)):
        raise InputError(f"views = {list(value)} in {where}: choose some of {', '.join(VIEWS)}, each once")
    for name in value if key == "choose" else ():
        if name not in CHOOSABLE:
            raise InputError(f"choose = {list(value)} in {where}: {name!r} cannot be; {', '.join(CHOOSABLE)} can")
    if key == "rank_weights" and not (
        len(value) in (0, 5) and all(isinstance(weight, float) and weight >= 0 for weight in value)
    ):
        raise InputError(f"rank_weights = {list(value)} in {where}: give five numbers, none negative, or none")
    numbers = [number for number in (value if isinstance(value, tuple) else (value,)) if isinstance(number, float)]
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"{key} = {value!r} in {where}: expected finite numbers, not inf or nan")
    if not isinstance(value, (int, float)):
        return value
    if key in POSITIVE and not value > 0:
        raise InputError(f"{key} = {value} in {where}: it must be larger than 0")
    if key not in SIGNED and not value >= 0:
        raise InputError(f"{key} = {value} in {where}: it must not be negative")
    if key in SHARES and value > 1:
        raise InputError(f"{key} = {value} in {where}: it is a share, at most 1")
    if key in BELOW_ONE and value == 1:
        raise InputError(f"{key} = {value} in {where}: it must be smaller than 1, or nothing is learnt")
    if key in MOST and value > MOST[key]:
        raise InputError(f"{key} = {value} in {where}: its scale ends at {MOST[key]}")
    return value


def _parse(text: str) -> object:
    """A value of `--set`: as TOML where it is TOML, else as text, so that nobody has to quote for the shell."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write every setting as TOML; `read_recipe` gives the same recipe back."""
    # JSON's strings, numbers, booleans and lists are TOML's too.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in dataclasses.asdict(recipe).items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def settings_of(recipe: Recipe, but: Collection[str] = ()) -> dict:
    """Every setting as JSON gives it back, but for some keys."""
    settings = {key: value for key, value in dataclasses.asdict(recipe).items() if key not in but}
    return json.loads(json.dumps(settings))


def differences(was: Mapping, now: Mapping, weights: tuple[str, str] = ("", "")) -> dict[str, str]:
    """What differs between the settings of two runs: by key, `KEY was X, is Y`.

    Args:
        was, now: by key, as `settings_of` gives them; a key that one of them lacks is not compared.
        weights: digests of both encoders' files, where they are known. Then these are compared, since one file has many
            paths, and other weights may lie at the same one.
    """
    found = {
        key: f"{key} was {json.dumps(was[key], ensure_ascii=False)}, is {json.dumps(now[key], ensure_ascii=False)}"
        for key in was
        if key in now and was[key] != now[key]
    }
    if all(weights):
        found.pop("encoder", None)
        if weights[0] != weights[1]:
            found["encoder"] = f"encoder was {was['encoder']}, is {now['encoder']}, which holds other weights"
    elif "encoder" in found and Path(was["encoder"]).resolve() == Path(now["encoder"]).resolve():
        del found["encoder"]  # one path, written in two ways
    return found
