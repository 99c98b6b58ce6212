"""Recipes: how to train, as a TOML file of differences from the defaults in `settings.py`."""

import dataclasses
import difflib
import json
import os
import textwrap
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kernel.inputs import InputError, shorten
from local.recipes.settings import (
    AugmentSettings,
    BankSettings,
    EncoderSettings,
    OptimSettings,
    SearchSettings,
    Setting,
    TrainSettings,
)

FOLDER = Path(__file__).parent
# Settings had other names in recipes and runs made before there were tables.
FORMER_NAMES = {
    "fit": "resize_mode",
    "most_parameters": "max_parameters",
    "genus": "genus_weight",
    "family": "family_weight",
    "nearest": "nearest_neighbour_weight",
    "shots": "class_prior_exponent",
    "metadata": "metadata_weight",
    "classes": "max_classes",
    "lora": "lora_rank",
    "probe": "head_only_epochs",
    "hidden": "hidden_features",
    "arcface": "arcface_margin",
    "class_weights": "class_weight_exponent",
    "optimiser": "optimizer",
    "clip": "grad_clip_norm",
    "decay": "plateau_factor",
    "decay_patience": "plateau_patience",
    "ema": "ema_decay",
}
# Settings that are gone, at the values that changed nothing.
REMOVED = {"centre": True, "restarts": 0, "cosface": 0.0, "subcentres": 1}


@dataclass(frozen=True)
class Recipe:
    """Every setting of a run, in one table per room."""

    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    bank: BankSettings = field(default_factory=BankSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)

    @property
    def keeps_head(self) -> bool:
        """Whether the bank is the head that was trained with the encoder."""
        return self.bank.matcher == "head"


TABLES: dict[str, type] = {table.name: table.default_factory for table in dataclasses.fields(Recipe)}
TABLE_OF = {setting.name: name for name, table in TABLES.items() for setting in dataclasses.fields(table)}


@dataclass(frozen=True)
class Given:
    """A value that a recipe or a command line gives to a setting, and where: a path, `--set epochs=3`, ..."""

    value: object
    source: str


def read_recipe(name: str, settings: Sequence[str] = (), encoder: str | None = None) -> Recipe:
    """A recipe by the name of a file in local/recipes or by path, with `key=value` settings on top.

    Raises:
        InputError: no such recipe; an unknown key; a value of the wrong type or out of range.
    """
    return build_recipe(read_given(name, settings, encoder))


def make_recipe(values: Mapping, where: str, ignores_removed: bool = False) -> Recipe:
    """A validated recipe from settings, in tables or without.

    Args:
        where: the settings come from, to be named in errors.
        ignores_removed: for a finished run, of which other settings are to be read.

    Raises:
        InputError: see `read_recipe`.
    """
    if ignores_removed:
        values = {name: value for name, value in values.items() if name not in REMOVED}
    return build_recipe(_flatten(values, where))


def read_given(name: str, settings: Sequence[str] = (), encoder: str | None = None) -> dict[str, Given]:
    """What a recipe's file, `--set` and `--encoder` give, by setting. Of two values of a setting the last counts.

    Raises:
        InputError: no such recipe; an unknown key; a setting without a value.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not os.path.isfile(path):  # unlike Path's, it takes any name
        known = ", ".join(recipe.stem for recipe in sorted(FOLDER.glob("*.toml")))
        raise InputError(f"no recipe {name}: known are {known}, or the path of a .toml file")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    given = _flatten(values, str(path))
    for text in settings:
        source = f"--set {shorten(text)}"
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{source} has no value: write --set key=value")
        given[_resolve(key.strip(), source)] = Given(_parse(value.strip()), source)
    if encoder:
        given["encoder"] = Given(encoder, f"--encoder {encoder}")
    return given


def build_recipe(given: Mapping[str, Given]) -> Recipe:
    """A validated recipe.

    Raises:
        InputError: a value of the wrong type or out of range; two settings that do not go together.
    """
    tables: dict[str, dict] = {name: {} for name in TABLES}
    for name, (one, default) in settings_by_name().items():
        if name in given:
            tables[TABLE_OF[name]][name] = one.check(name, given[name].value, default, given[name].source)
    recipe = Recipe(**{name: table(**tables[name]) for name, table in TABLES.items()})
    _check_together(recipe, given)
    return recipe


def settings_by_name() -> dict[str, tuple[Setting, object]]:
    """Every setting with its default."""
    return {
        one.name: (one.metadata["setting"], one.default)
        for table in TABLES.values()
        for one in dataclasses.fields(table)
    }


def _check_together(recipe: Recipe, given: Mapping[str, Given]) -> None:
    train, augment = recipe.train, recipe.augment
    is_learned, is_episodic = train.prototypes == "learned", train.prototypes == "episodic"
    mixes = augment.mixup or augment.cutmix
    for is_wrong, names, why in (
        (
            train.head_only_epochs and not is_learned,
            "head_only_epochs prototypes",
            'head_only_epochs needs a head that is trained: set prototypes = "learned"',
        ),
        (
            train.hidden_features and not is_learned,
            "hidden_features prototypes",
            'hidden_features needs a head that is trained: set prototypes = "learned"',
        ),
        (
            recipe.keeps_head and is_episodic,
            "matcher prototypes",
            'matcher = "head" does not work with episodes, which train no head: set prototypes = "learned" or another '
            "matcher",
        ),
        (
            recipe.keeps_head and not train.epochs,
            "matcher epochs",
            'matcher = "head" needs a head that is trained: set epochs, or another matcher',
        ),
        (
            mixes and train.photos_per_observation > 1,
            "mixup cutmix photos_per_observation",
            "mixup and cutmix mix photos, not observations: set photos_per_observation = 1",
        ),
        (
            mixes and is_episodic,
            "mixup cutmix prototypes",
            "mixup and cutmix do not work with episodes: set them to 0, or other prototypes",
        ),
        (is_episodic and train.ways < 2, "ways prototypes", "expected ways >= 2 for episodes"),
    ):
        if is_wrong:
            sources = dict.fromkeys(given[name].source for name in names.split() if name in given)
            raise InputError(f"{why} (in {' and '.join(sources)})")


def _flatten(values: Mapping, where: str) -> dict[str, Given]:
    """The settings of tables, and of a file without tables under their present names."""
    given: dict[str, Given] = {}

    def add(name: str, value: object) -> None:
        if name in given:
            raise InputError(f"{name} is given twice (in {where}): remove one of them")
        given[name] = Given(value, where)

    for key, value in values.items():
        if isinstance(value, dict):
            if key not in TABLES:
                raise InputError(
                    f"unknown table [{key}] (in {where}): the nearest known one is [{_nearest(key, TABLES)}]"
                )
            for name, one in value.items():
                add(_resolve(f"{key}.{name}", where), one)
        elif key in REMOVED:
            if value != REMOVED[key]:
                raise InputError(f"{key} = {value!r} is no longer supported (in {where}): remove it")
        else:
            add(_resolve(FORMER_NAMES.get(key, key), where), _renamed(key, value))
    return given


def _renamed(key: str, value: object) -> object:
    """The value of `choose`, a list of settings, under their present names; any other value as it is."""
    if key != "choose" or not isinstance(value, (list, tuple)):
        return value
    return [FORMER_NAMES.get(name, name) if isinstance(name, str) else name for name in value]


def _resolve(key: str, where: str) -> str:
    """The name of a setting written as `name` or `table.name`.

    Raises:
        InputError: there is none.
    """
    table, dot, name = key.rpartition(".")
    if dot and table not in TABLES:
        raise InputError(f"unknown table {table!r} (in {where}): the nearest known one is {_nearest(table, TABLES)!r}")
    if name not in TABLE_OF:
        if name in FORMER_NAMES:
            raise InputError(f"unknown key {name!r} (in {where}): it is now called {FORMER_NAMES[name]!r}")
        if name in REMOVED:
            raise InputError(f"unknown key {name!r} (in {where}): it is no longer supported")
        raise InputError(f"unknown key {name!r} (in {where}): the nearest known one is {_nearest(name, TABLE_OF)!r}")
    if dot and TABLE_OF[name] != table:
        raise InputError(f"unknown key {key!r} (in {where}): {name} is in the table {TABLE_OF[name]!r}")
    return name


def _nearest(name: str, known: Collection[str]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _parse(text: str) -> object:
    """A value of `--set`: as TOML where it is TOML, else as text, so that nobody has to quote for the shell."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def list_recipes() -> str:
    """The recipes of local/recipes, each with the first line of its comment."""
    paths = sorted(FOLDER.glob("*.toml"))
    width = max(len(path.stem) for path in paths)
    first_lines = (path.read_text(encoding="utf-8").partition("\n")[0] for path in paths)
    lines = [f"  {path.stem:{width}}  {line.lstrip('# ')}" for path, line in zip(paths, first_lines, strict=True)]
    return "\n".join(["recipes:", *lines])


def explain(given: Mapping[str, Given]) -> str:
    """Every setting of the recipe that `given` makes: its value, where that comes from, and what it means."""
    lines, recipe = [], build_recipe(given)
    for name, table in TABLES.items():
        lines += ["", f"[{name}]  {table.__doc__.partition(chr(10))[0]}"]
        for one in dataclasses.fields(table):
            value = json.dumps(getattr(getattr(recipe, name), one.name), ensure_ascii=False)
            source = given[one.name].source if one.name in given else "default"
            source = source if source == "default" or source.startswith("--") else "recipe"
            lines.append(f"{one.name} = {value}  ({source})")
            lines += textwrap.wrap(_meaning(one), 100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines[1:])


def _meaning(one: dataclasses.Field) -> str:
    """What a setting means, and which values it takes."""
    setting = one.metadata["setting"]
    known = ", ".join(setting.choices)
    if setting.choices:
        return f"{setting.meaning} {'Some' if isinstance(one.default, tuple) else 'One'} of: {known}."
    limits = setting.limits(one.name)
    # That a size or a weight is not negative goes without saying.
    return setting.meaning if limits in (one.name, f"{one.name} >= 0") else f"{setting.meaning} {limits}."


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write every setting as TOML; `read_recipe` gives the same recipe back."""
    lines = []
    for name, values in dataclasses.asdict(recipe).items():
        # JSON's strings, numbers, booleans and lists are TOML's too.
        lines += [
            f"[{name}]",
            *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()),
            "",
        ]
    path.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")


def settings_of(recipe: Recipe, but: Collection[str] = ()) -> dict:
    """Every setting by its name alone, without tables, as JSON gives it back, but for some names."""
    settings = {name: value for table in dataclasses.asdict(recipe).values() for name, value in table.items()}
    return json.loads(json.dumps({name: value for name, value in settings.items() if name not in but}))


def current_names(settings: Mapping) -> dict:
    """The settings that a run recorded, see `settings_of`, under their present names."""
    return {FORMER_NAMES.get(name, name): _renamed(name, value) for name, value in settings.items()}


def differences(was: Mapping, now: Mapping, weights: tuple[str, str] = ("", "")) -> dict[str, str]:
    """What differs between the settings of two runs: by name, `NAME was X, is Y`.

    Args:
        was, now: by name, as `settings_of` gives them; a name that one of them lacks is not compared.
        weights: digests of both encoders' files, where they are known. Then these are compared, since one file has many
            paths, and other weights may lie at the same one.
    """
    found = {
        name: f"{name} was {json.dumps(was[name], ensure_ascii=False)}, is {json.dumps(now[name], ensure_ascii=False)}"
        for name in was
        if name in now and was[name] != now[name]
    }
    found |= {
        name: f"{name} was {json.dumps(was[name])}, which is no longer supported"
        for name in REMOVED
        if was.get(name, REMOVED[name]) != REMOVED[name]
    }
    if all(weights):
        found.pop("encoder", None)
        if weights[0] != weights[1]:
            found["encoder"] = f"encoder was {was['encoder']}, is {now['encoder']}, which holds other weights"
    elif "encoder" in found and Path(was["encoder"]).resolve() == Path(now["encoder"]).resolve():
        del found["encoder"]  # one path, written in two ways
    return found
