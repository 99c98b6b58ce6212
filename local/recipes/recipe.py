"""Recipes say how to train. A recipe is a TOML file of differences from the defaults in `settings.py`."""

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import textwrap
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kernel.inputs import InputError, shorten
from kernel.tables import read_table
from local.recipes.settings import (
    AugmentSettings,
    BankSettings,
    EncoderSettings,
    OptimSettings,
    SearchSettings,
    Setting,
    TrainSettings,
    as_tuple,
)

FOLDER = Path(__file__).parent
PER_ENCODER = ("image_size", "pool", "encoder_weights")  # settings that may have a value per encoder


@dataclass(frozen=True)
class Recipe:
    """All settings of a run, in tables."""

    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    bank: BankSettings = field(default_factory=BankSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)

    @property
    def keeps_head(self) -> bool:
        """Whether the bank is the head trained with the encoder."""
        return self.bank.matcher == "head"

    @property
    def is_random(self) -> bool:
        """Whether another seed gives other embeddings or another bank, and not only other held-out observations."""
        return bool(self.train.epochs or not self.encoder.pretrained or self.bank.matcher == "projection")

    @property
    def text_obstacles(self) -> dict[str, str]:
        """Why the embeddings of class names cannot be used, if so, by the setting that excludes them."""
        matchers = {self.bank.matcher, *(("means",) if "matcher" in self.search.choose else ())}
        obstacles = {
            "encoder": (len(self.encoder.each) > 1, "several encoders have no text tower in common"),
            "epochs": (self.train.epochs, "an encoder that is trained leaves the space of its text tower"),
            "pool": (
                self.encoder.pool not in ("auto", "stages"),  # which leave an encoder with a text tower as it is
                f"pool = {self.encoder.pool} is not in the space of the text tower",
            ),
            "matcher": ("means" not in matchers, f'it shrinks class means, and the matcher is "{self.bank.matcher}"'),
        }
        return {name: reason for name, (is_there, reason) in obstacles.items() if is_there}


TABLES: dict[str, type] = {table.name: table.default_factory for table in dataclasses.fields(Recipe)}
TABLE_OF = {setting.name: name for name, table in TABLES.items() for setting in dataclasses.fields(table)}


@dataclass(frozen=True)
class Given:
    """A value of a setting, and its source for messages: a path, `--set epochs=3`, ..."""

    value: object
    source: str


def read_recipe(name: str, settings: Sequence[str] = (), encoder: str | Sequence[str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        name: name of a file in local/recipes, or path of a .toml file.
        settings: `key=value`, which replace those of the file.
        encoder: replaces the encoder, or several of them.

    Raises:
        InputError: the recipe does not exist, a key is unknown, or a value has the wrong type or is out of range.
    """
    return build_recipe(read_given(name, settings, encoder))


def make_recipe(values: Mapping, where: str) -> Recipe:
    """A checked recipe from settings, in tables or not.

    Args:
        where: source of the settings, for messages.

    Raises:
        InputError: see `read_recipe`.
    """
    return build_recipe(_flatten(values, where))


def read_given(name: str, settings: Sequence[str] = (), encoder: str | Sequence[str] | None = None) -> dict[str, Given]:
    """The settings given by a recipe's file, `--set` and `--encoder`. Later values replace earlier ones.

    Raises:
        InputError: the recipe does not exist, a key is unknown, or a setting has no value.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not os.path.isfile(path):  # Path.is_file raises an error for a name that is too long
        known = ", ".join(recipe.stem for recipe in sorted(FOLDER.glob("*.toml")))
        raise InputError(f"no recipe {name}: known are {known}, or the path of a .toml file")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not TOML: {shorten(error)}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    given = _flatten(values, str(path))
    if encoder:  # a list of values per encoder is about the encoders of the file
        given = {key: one for key, one in given.items() if key not in PER_ENCODER or not isinstance(one.value, list)}
    for text in settings:
        source = f"--set {shorten(text)}"
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{source} has no value: write --set key=value")
        given[_resolve(key.strip(), source)] = Given(_parse(value.strip()), source)
    if encoder:
        names = [encoder] if isinstance(encoder, str) else list(encoder)
        given["encoder"] = Given(names, " ".join(f"--encoder {name}" for name in names))
    return given


def read_excluded(path: Path) -> tuple[str, ...]:
    """The ids of the observations that a CSV lists in its column "observation".

    Raises:
        InputError: it is not such a CSV, or lists none.
    """
    ids = tuple(dict.fromkeys(row["observation"].strip() for row in read_table(path, ["observation"], ["observation"])))
    if not ids:
        raise InputError(f"{path} lists no observation: mark some in a report, or leave out --exclude")
    return ids


def build_recipe(given: Mapping[str, Given]) -> Recipe:
    """A checked recipe.

    Raises:
        InputError: a value has the wrong type or is out of range, or two settings cannot be combined.
    """
    tables: dict[str, dict] = {name: {} for name in TABLES}
    for name, (setting, default) in settings_by_name().items():
        if name in given:
            tables[TABLE_OF[name]][name] = setting.check(name, given[name].value, default, given[name].source)
    recipe = Recipe(**{name: table(**tables[name]) for name, table in TABLES.items()})
    _check_combinations(recipe, given)
    return recipe


def settings_by_name() -> dict[str, tuple[Setting, object]]:
    """Every setting with its default."""
    return {
        one.name: (one.metadata["setting"], one.default)
        for table in TABLES.values()
        for one in dataclasses.fields(table)
    }


def _check_combinations(recipe: Recipe, given: Mapping[str, Given]) -> None:
    """Raise an InputError that names both sources if two settings cannot be combined."""

    def refuse_if(is_wrong: object, names: str, reason: str) -> None:
        if is_wrong:
            sources = dict.fromkeys(given[name].source for name in names.split() if name in given)
            raise InputError(f"{reason} (in {' and '.join(sources)})")

    count = len(recipe.encoder.each)
    for name in PER_ENCODER:
        number = len(as_tuple(getattr(getattr(recipe, TABLE_OF[name]), name)))
        refuse_if(
            number not in ((0, count) if name == "encoder_weights" else (1, count)),
            f"{name} encoder",
            f"{name} has {number} values for {count} encoder{'s' * (count > 1)}: give one per encoder",
        )
    refuse_if(
        count > 1 and recipe.train.epochs,
        "epochs encoder",
        "several encoders are used as they are: set epochs = 0, or train each in a run of its own and give the runs",
    )
    refuse_if(
        recipe.keeps_head and recipe.bank.pool_part != "all",
        "pool_part matcher",
        'the trained head needs the whole embedding: set pool_part = "all"',
    )
    for name, reason in recipe.text_obstacles.items():
        refuse_if(
            recipe.bank.text_weight, f"text_weight {name}", f"text_weight does not work here: {reason}; set it to 0"
        )
    train, keeps_head, mixes = recipe.train, recipe.keeps_head, recipe.augment.mixup or recipe.augment.cutmix
    is_episodic = train.prototypes == "episodic"
    for name in ("head_only_epochs", "hidden_features"):
        needs_head = getattr(train, name) and train.prototypes != "learned"
        refuse_if(needs_head, f"{name} prototypes", f'{name} needs a head that is trained: set prototypes = "learned"')
    refuse_if(
        keeps_head and is_episodic,
        "matcher prototypes",
        'matcher = "head" does not work with episodes, which train no head: set prototypes = "learned" or another '
        "matcher",
    )
    refuse_if(
        keeps_head and not train.epochs,
        "matcher epochs",
        'matcher = "head" needs a head that is trained: set epochs, or another matcher',
    )
    refuse_if(
        mixes and train.photos_per_observation > 1,
        "mixup cutmix photos_per_observation",
        "mixup and cutmix mix photos, not observations: set photos_per_observation = 1",
    )
    refuse_if(
        mixes and is_episodic,
        "mixup cutmix prototypes",
        "mixup and cutmix do not work with episodes: set them to 0, or other prototypes",
    )


def _flatten(values: Mapping, where: str) -> dict[str, Given]:
    """The settings in the tables of a file, and those outside of tables."""
    given: dict[str, Given] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in TABLES:
            raise InputError(f"unknown table [{key}] (in {where}): the nearest known one is [{_nearest(key, TABLES)}]")
        own = {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
        for path, item in own.items():
            name = _resolve(path, where)
            if name in given:
                raise InputError(f"{name} is given twice (in {where}): remove one of them")
            given[name] = Given(item, where)
    return given


def _resolve(key: str, where: str) -> str:
    """The name of a setting that is written as `name` or `table.name`.

    Raises:
        InputError: the table or the name is unknown.
    """
    table, dot, name = key.rpartition(".")
    if dot and table not in TABLES:
        raise InputError(f"unknown table {table!r} (in {where}): the nearest known one is {_nearest(table, TABLES)!r}")
    if name not in TABLE_OF:
        raise InputError(f"unknown key {name!r} (in {where}): the nearest known one is {_nearest(name, TABLE_OF)!r}")
    if dot and TABLE_OF[name] != table:
        raise InputError(f"unknown key {key!r} (in {where}): {name} is in the table {TABLE_OF[name]!r}")
    return name


def _nearest(name: str, known: Collection[str]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _parse(text: str) -> object:
    """Parse a value of `--set` as TOML; if it is not TOML, it is a string, which then needs no quotes in a shell."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def list_recipes() -> str:
    """The recipes of local/recipes, each with the first line of its comment."""
    paths = sorted(FOLDER.glob("*.toml"))
    width = max(len(path.stem) for path in paths)
    first_lines = (path.read_text(encoding="utf-8-sig").partition("\n")[0] for path in paths)
    lines = [f"  {path.stem:{width}}  {line.lstrip('# ')}" for path, line in zip(paths, first_lines, strict=True)]
    return "\n".join(["recipes:", *lines])


def explain(given: Mapping[str, Given]) -> str:
    """Every setting of the recipe: its value, the source of the value, and its meaning."""
    lines, recipe = [], build_recipe(given)
    for name, table in TABLES.items():
        lines += ["", f"[{name}]  {table.__doc__.partition(chr(10))[0]}"]
        for one in dataclasses.fields(table):
            value = _dumps(getattr(getattr(recipe, name), one.name))
            source = given[one.name].source if one.name in given else "default"
            source = source if source == "default" or source.startswith("--") else "recipe"
            lines.append(f"{one.name} = {value}  ({source})")
            lines += textwrap.wrap(_meaning(one), 100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines[1:])


def _meaning(one: dataclasses.Field) -> str:
    """The meaning of a setting, and its choices or limits."""
    setting = one.metadata["setting"]
    known = ", ".join(setting.choices)
    if setting.choices:
        return f"{setting.meaning} {'Some' if isinstance(one.default, tuple) else 'One'} of: {known}."
    limits = setting.limits(one.name)
    # A lower limit of 0 is obvious for a size or a weight.
    return setting.meaning if limits in (one.name, f"{one.name} >= 0") else f"{setting.meaning} {limits}."


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write all settings as TOML. `read_recipe` reads the same recipe back."""
    lines = []
    for name, values in dataclasses.asdict(recipe).items():
        # Strings, numbers, booleans and lists are written alike in JSON and TOML.
        lines += [f"[{name}]", *(f"{key} = {_dumps(value)}" for key, value in values.items()), ""]
    path.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def settings_of(recipe: Recipe, but: Collection[str] = ()) -> dict:
    """All settings by name, without tables, as JSON stores them.

    Args:
        but: names to leave out.
    """
    settings = {name: value for table in dataclasses.asdict(recipe).values() for name, value in table.items()}
    return json.loads(json.dumps({name: value for name, value in settings.items() if name not in but}))


def differences(was: Mapping, now: Mapping, weights: tuple[str, str] = ("", "")) -> dict[str, str]:
    """The settings that differ between two runs: name -> `NAME was X, is Y`.

    Args:
        was, now: settings by name (see `settings_of`). A name that one of them lacks is not compared.
        weights: digests of both encoders' files, if known. They are compared instead of the encoders' paths, because a
            file may be moved or replaced.
    """
    found = {
        name: f"{name} was {_dumps(was[name])}, is {_dumps(now[name])}"
        for name in was
        if name in now and was[name] != now[name]
    }
    if all(weights):
        found.pop("encoder", None)
        if weights[0] != weights[1]:
            found["encoder"] = f"encoder was {was['encoder']}, is {now['encoder']}, which holds other weights"
    elif "encoder" in found and _resolve_paths(was["encoder"]) == _resolve_paths(now["encoder"]):
        del found["encoder"]  # the same paths, written in two ways
    return found


def describe_settings(settings: Mapping) -> str:
    """A run's settings as the nearest of the kit's recipes, and what is other than there: `demo, epochs = 3`.

    Args:
        settings: by name (see `settings_of`). One that is newer than the run had its default; one that this version
            does not have is not compared.
    """
    own = settings_of(Recipe()) | dict(settings)
    changes = {
        name: {key: own[key] for key, value in recipe.items() if own[key] != value}
        for name, recipe in _kit_recipes().items()
    }
    if not settings or not changes:
        return ""
    name = min(changes, key=lambda name: len(changes[name]))
    return ", ".join([name, *(f"{key} = {shorten(_dumps(value), 60)}" for key, value in changes[name].items())])


@functools.cache
def _kit_recipes() -> dict[str, dict]:
    """The settings of each recipe of the kit."""
    recipes = {}
    for path in sorted(FOLDER.glob("*.toml")):
        with contextlib.suppress(InputError):  # one that its user is writing
            recipes[path.stem] = settings_of(read_recipe(path.stem))
    return recipes


def _resolve_paths(encoder: str | Sequence[str]) -> list[Path]:
    return [Path(name).resolve() for name in ([encoder] if isinstance(encoder, str) else encoder)]
