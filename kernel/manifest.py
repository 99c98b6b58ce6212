"""The weights and their manifest: how a run was trained, and all that is needed to predict with it.

Training writes a manifest, bundling joins those of several runs into one, and the kernel reads it. Its JSON is read,
checked and written here alone; everything else sees these dataclasses.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from kernel.inputs import InputError, find_folders, sha256, shorten

FORMAT = "few-shot-species/1"  # the manifest's "format"; raised when a kernel could no longer read older weights
MANIFEST = "manifest.json"
# The digest of the one manifest that the script accepts, set by bundle.py; empty accepts any.
MANIFEST_SHA256 = ""


@dataclass(frozen=True)
class Preprocessing:
    """How a photo becomes the square that an encoder was trained on.

    Attributes:
        size: side of the square, pixels.
        mean, std: per channel, of values in 0..1.
        interpolation: of the resize.
        scale: the shorter side is resized to `size / scale` before the centre is cut out (timm's crop_pct).
        fit: "crop" keeps the aspect ratio and loses the margins, "squash" keeps all and loses the aspect ratio.
        larger: side of the square of the view `larger`, pixels; 0 where the views do not include it.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"]
    scale: float
    fit: Literal["crop", "squash"]
    larger: int = 0

    @property
    def decoded(self) -> int:
        """Side of the square that a photo is decoded to, from which all its views are made; pixels."""
        return max(self.size, self.larger)


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """An encoder, described well enough to rebuild it offline from this and its weights file.

    Attributes:
        library: that builds it.
        architecture: the library's name of it.
        arguments: keyword arguments with which the library builds it.
        packages: versions of the Python packages that it was built with, by name.
        preprocessing: of the photos.
        features: length of an embedding.
        precision: "half" is the fastest type that keeps embeddings on a device, "full" is fp32 everywhere.
        learnt_from: digest of a competition's observations -> digest of the part of them that the encoder was trained
            on, and the seed by which another part was held out. Observations that it has seen cannot validate it.
        file: its weights, in the folder of the manifest; empty while it has none.
    """

    library: Literal["timm", "open_clip"]
    architecture: str
    arguments: dict[str, Any]
    packages: dict[str, str] = field(default_factory=dict)
    preprocessing: Preprocessing
    features: int
    precision: Literal["half", "full"]
    learnt_from: dict[str, tuple[str, int]] = field(default_factory=dict)
    file: str


@dataclass(frozen=True, kw_only=True)
class GivenSettings:
    """The settings that a run was started with, by which `--resume` recognises it.

    Attributes:
        recipe: before anything in it was resolved or chosen.
        weights: digest of the files of the encoder; empty where it was given by its name.
    """

    recipe: dict[str, Any]
    weights: str


@dataclass(frozen=True, kw_only=True)
class Member:
    """One trained encoder with its bank. A run has one member, an ensemble several.

    Attributes:
        name: for the log.
        encoder: see `EncoderSpec`.
        views: names of the test-time views, in order of worth.
        pooling: how the photos of an observation are combined.
        bank: its file.
        metadata_prior: its file; None without one.
        metadata_prior_weight: of the metadata's log-probabilities, beside those of the photos.
        weight: of the member's log-probabilities in the ensemble.
        validation: scores on held-out observations; empty where nothing could be held out.
        recipe: the settings, with all that was resolved and chosen.
        given: the settings as they were given; empty in older runs.
        data_sha256: digest of the data that it was trained on.
        versions: of Python and of libraries in training, by name.
        run: name of the run's folder, in a bundle.
    """

    name: str
    encoder: EncoderSpec
    views: tuple[str, ...]
    pooling: str
    bank: str
    metadata_prior: str | None = field(metadata={"earlier": "prior"})
    metadata_prior_weight: float = field(metadata={"earlier": "prior_weight"})
    weight: float
    validation: dict[str, float]
    recipe: dict[str, Any]
    given: GivenSettings = GivenSettings(recipe={}, weights="")
    data_sha256: str
    versions: dict[str, str]
    run: str | None = None


@dataclass(frozen=True, kw_only=True)
class CompetitionSpec:
    """The competition that the weights were trained on.

    Attributes:
        name: see `kernel.competitions`.
        resolution: of the photos, where the competition ships several.
        observations_sha256: digest of all its labelled observations; empty in older runs.
        time_limit: for a kernel, seconds.
    """

    name: str = field(metadata={"earlier": "layout"})
    resolution: str
    observations_sha256: str = ""
    time_limit: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What lies in a folder of weights, a run's or a bundle's.

    Attributes:
        format: see FORMAT.
        commit: of the repository in training; None in a bundle, whose script names its own.
        competition: see `CompetitionSpec`.
        class_ids: of all classes, in the order of the banks.
        fallback_classes: ids of the commonest classes, which are predicted where no photo can be read.
        members: the best first, since a kernel short of time drops the last.
        files: name -> SHA-256 of every other file in the folder.
    """

    format: str = FORMAT
    commit: str | None = None
    competition: CompetitionSpec
    class_ids: tuple[str, ...]
    fallback_classes: tuple[str, ...] = field(metadata={"earlier": "prior"})
    members: tuple[Member, ...]
    files: dict[str, str]


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest. Keys that are not known are ignored.

    Raises:
        InputError: the file cannot be read, is of another format, or lacks a key; or a value has the wrong type.
    """
    values = _read_json(path)
    try:
        manifest = _from_json(Manifest, values, "")
        empty = [name for name in ("class_ids", "fallback_classes", "members") if not getattr(manifest, name)]
        if empty:
            raise ValueError(f"{empty[0]} is empty")
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}; train or bundle again") from error
    return manifest


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest in one step: a reader finds the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(to_json(manifest), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def to_json(value: object) -> Any:
    """A dataclass of this module as the JSON that stands for it; an optional value that is None is left out."""
    if not is_dataclass(value):
        return [to_json(one) for one in value] if isinstance(value, tuple) else value
    known = {one.name: (getattr(value, one.name), one.default) for one in fields(value)}
    return {name: to_json(own) for name, (own, default) in known.items() if own is not None or default is not None}


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({shorten(error)}): give a folder that training left") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError(f"{path} is not of format {FORMAT}: train or bundle again with this version")
    return values


def _from_json(kind: Any, value: Any, key: str) -> Any:
    """A value of the JSON as the type of its field.

    Args:
        kind: the type; a dataclass, or what their fields are annotated with.
        key: of the value, for messages, such as `members[0].encoder`.

    Raises:
        ValueError: a key is missing, or a value has another type.
    """
    inner, outer = get_args(kind), get_origin(kind) or kind

    def expect(is_right: bool, what: str) -> None:
        if not is_right:
            raise ValueError(f"expected {what} for {key}, got {shorten(repr(value), 60)}")

    if outer is Any:
        return value
    if outer is UnionType:  # with None
        return None if value is None else _from_json(inner[0], value, key)
    if outer is Literal:
        expect(value in inner, " or ".join(map(repr, inner)))
        return value
    if outer is tuple:
        expect(isinstance(value, list), "a list")
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        expect(len(value) == len(kinds), f"{len(kinds)} values")
        return tuple(
            _from_json(one, own, f"{key}[{at}]") for at, (one, own) in enumerate(zip(kinds, value, strict=True))
        )
    if outer is dict:
        expect(isinstance(value, dict), "an object")
        return {name: _from_json(inner[1], own, f"{key}.{name}") for name, own in value.items()}
    if is_dataclass(outer):
        expect(isinstance(value, dict), "an object")
        return outer(**_fields_from_json(outer, value, f"{key}." if key else ""))
    words, types = {str: ("a string", str), int: ("an int", int), float: ("a number", (int, float))}[outer]
    expect(isinstance(value, types) and not isinstance(value, bool), words)
    return value


def _fields_from_json(kind: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The arguments of a dataclass, of an object of the JSON; what is not there keeps its default."""
    found = {}
    for one in fields(kind):
        names = [name for name in (one.name, one.metadata.get("earlier")) if name in values]
        if names:
            found[one.name] = _from_json(one.type, values[names[0]], prefix + names[0])
        elif one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f"{prefix}{one.name} is missing")
    return found


@dataclass(frozen=True)
class Weights:
    """A folder of weights, and what its manifest says of them."""

    folder: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """The path of a weights file, once its content has been found to be what the manifest promised.

        Raises:
            InputError: the file is missing or its SHA-256 differs.
        """
        path = self.folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing: upload all of the bundle's weights again")
        expected, found = self.manifest.files.get(name, "no digest"), sha256(path)
        if found != expected:
            raise InputError(f"{path} has SHA-256 {found}, the manifest says {expected}: upload the weights again")
        return path

    def wheels(self) -> list[Path]:
        """The wheels among the files, each checked as by `file`."""
        return [self.file(name) for name in sorted(self.manifest.files) if name.endswith(".whl")]


def find_weights(root: Path, digest: str = MANIFEST_SHA256) -> Weights:
    """The weights that this kernel was bundled with.

    Raises:
        InputError: none are attached, several are and any would do, or those attached belong to another bundle.
    """
    found: dict[Path, str] = {}
    for folder in find_folders(root, _holds_weights):
        found[folder] = sha256(folder / MANIFEST)
        if found[folder] == digest:  # there is no need to list the photos, which lie deeper
            return read_weights(folder)
    if not found:
        raise InputError(f"no weights under {root}: attach the dataset made from build/weights (it holds {MANIFEST})")
    first = next(iter(found))
    if digest:
        raise InputError(
            f"the weights in {first} have manifest {found[first]}, this kernel was bundled with {digest}: "
            "attach the matching version of the dataset, or bundle again"
        )
    if len(set(found.values())) > 1:
        raise InputError(f"several weights under {root} ({', '.join(map(str, found))}): leave one")
    return read_weights(first)


def read_weights(folder: Path) -> Weights:
    """The weights in one folder: a bundle's, or a run's.

    Raises:
        InputError: see `read_manifest`.
    """
    return Weights(folder, read_manifest(folder / MANIFEST))


def _holds_weights(folder: Path) -> bool:
    """Whether a folder has a manifest of this format, complete or not."""
    try:
        _read_json(folder / MANIFEST)
    except InputError:
        return False
    return True
