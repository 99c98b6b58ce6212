"""Recipes: how to train, as a TOML file of differences from the defaults below."""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel.embeddings import POOLINGS
from kernel.mounts import InputError
from kernel.observations import RESOLUTIONS
from kernel.views import VIEWS

FOLDER = Path(__file__).parent / "recipes"


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
    family: float = 0.0  # the same of its family
    nearest: float = 0.0  # share of the nearest observation in the probabilities
    shots: float = 0.0  # a class is likelier by its number of observations to this power
    transduction: float = 0.0  # how much the test's own observations move the prototypes
    metadata: float = 0.0  # weight of what place, season and substrate say, against what the photos say
    choose: tuple[str, ...] = ()  # keys of this part, and views, that cross-validation chooses; see local/choice.py

    # Fine-tuning; none with epochs = 0.
    epochs: int = 0
    unfreeze: int = 2  # groups of layers from the top that learn, as timm and open_clip group them; -1: all
    lora: int = 0  # rank of what their matrices learn; 0: they learn in full
    prototypes: str = "fixed"  # at the class means of the untuned encoder; "learned": they move with the loss
    probe: int = 0  # epochs before the others in which learned prototypes alone move
    temperature: float = 0.1  # of squared distances between unit vectors
    batch_size: int = 32  # observations
    photos_per_observation: int = 4  # seen of one observation in one step
    learning_rate: float = 1e-4
    layer_decay: float = 1.0  # factor of the learning rate from one layer to the one below
    weight_decay: float = 0.05
    ema: float = 0.0  # decay per step of the moving average of the weights that is judged and kept; 0: none
    warmup: float = 0.1  # share of the steps
    label_smoothing: float = 0.0
    crop_scale: float = 0.6  # smallest share of a photo's area in a random crop
    colour_jitter: float = 0.1
    rand_augment: int = 0  # magnitude of RandAugment's two random operations, up to 10
    patience: int = 4  # epochs without better recalls on the validation
    seed: int = 0


CHOICES = {
    "resolution": ("auto", *RESOLUTIONS),
    "fit": ("encoder", "crop", "squash"),
    "precision": ("half", "full"),
    "pooling": POOLINGS,
    "reference": ("train", "train+val"),
    "prototypes": ("fixed", "learned"),
    "matcher": ("means", "several", "ridge", "random-ridge", "logistic", "projection"),
}
BANK = ("whitening", "genus", "family", "nearest", "shots", "transduction", "metadata")
CHOOSABLE = ("fit", "views", "matcher", *BANK)
POSITIVE = (
    "temperature",
    "batch_size",
    "photos_per_observation",
    "learning_rate",
    "layer_decay",
    "crop_scale",
    "patience",
)
NOT_NEGATIVE = (
    "image_size",
    "epochs",
    "lora",
    "probe",
    "weight_decay",
    "ema",
    "warmup",
    "label_smoothing",
    "colour_jitter",
    "rand_augment",
    "seed",
    *BANK,
)
SHARES = ("nearest", "layer_decay", "ema", "warmup", "label_smoothing", "crop_scale")


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
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting} has no value: write --set key=value")
        values[key.strip()] = _parse(text.strip())
    if encoder:
        values["encoder"] = encoder
    return make_recipe(values, str(path))


def make_recipe(values: dict, where: str) -> Recipe:
    """A validated recipe from settings; `where` they come from is named in errors.

    Raises:
        InputError: see `read_recipe`.
    """
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    checked = {}
    for key, value in values.items():
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown key {key!r} in {where}: the nearest known one is {nearest!r}")
        checked[key] = _check(key, value, fields[key].default, where)
    recipe = Recipe(**checked)
    if recipe.probe and recipe.prototypes == "fixed":
        raise InputError(f'probe = {recipe.probe} in {where}: nothing moves in it without prototypes = "learned"')
    return recipe


def _check(key: str, value: object, default: object, where: str) -> object:
    if isinstance(default, tuple):
        value = (
            tuple(value.split(",")) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
        )
    elif isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        kind = "list" if isinstance(default, tuple) else type(default).__name__
        raise InputError(f"{key} = {value!r} in {where}: a {kind} is wanted, such as {default!r}")
    if key in CHOICES and value not in CHOICES[key]:
        raise InputError(f"{key} = {value!r} in {where}: choose from {', '.join(CHOICES[key])}")
    if key == "views" and (not value or len([view for view in VIEWS if view in value]) < len(value)):
        raise InputError(f"views = {list(value)} in {where}: choose some of {', '.join(VIEWS)}, each once")
    for name in value if key == "choose" else ():
        if name not in CHOOSABLE:
            raise InputError(f"choose = {list(value)} in {where}: {name!r} cannot be; {', '.join(CHOOSABLE)} can")
    if key in POSITIVE and not value > 0:
        raise InputError(f"{key} = {value} in {where}: it must be larger than 0")
    if key in NOT_NEGATIVE and not value >= 0:
        raise InputError(f"{key} = {value} in {where}: it must not be negative")
    if key in SHARES and value > 1:
        raise InputError(f"{key} = {value} in {where}: it is a share, at most 1")
    if key == "ema" and value == 1:
        raise InputError(f"ema = {value} in {where}: it must be smaller than 1, or the average never moves")
    if key == "rand_augment" and value > 10:
        raise InputError(f"rand_augment = {value} in {where}: its scale ends at 10")
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
