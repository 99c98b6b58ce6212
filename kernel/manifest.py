"""The weights and their manifest: how a run was trained, and what is needed to predict with it.

Training writes a manifest, bundling merges the manifests of several runs, and the kernel reads it. Only this module
reads, checks and writes the JSON; the rest of the code uses these dataclasses.
"""

import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from kernel.inputs import InputError, find_folders, sha256, shorten

FORMAT = "few-shot-species/5"  # the manifest's "format"; increase it when older manifests can no longer be read
MANIFEST = "manifest.json"
# The SHA-256 of the only manifest that the script accepts. bundle.py sets it; an empty string accepts any manifest.
MANIFEST_SHA256 = ""


@dataclass(frozen=True)
class Preprocessing:
    """How a photo becomes the square input of an encoder.

    Attributes:
        size: side of the input, in pixels.
        mean, std: per channel, for pixel values in [0, 1].
        interpolation: method of the resize.
        crop_pct: the photo is resized to `size / crop_pct` before the centre crop, as in timm.
        resize_mode: "crop" resizes the shorter side and crops the centre, which loses the margins. "squash" resizes
            both sides, which loses the aspect ratio. "pad" resizes the longer side to `size` and repeats the pixels of
            the edges beside the shorter one, which loses detail.
        larger_size: side of the input in the view `larger`, in pixels; 0 if the views do not include it.
        cropped_size: side of the square from which crops and tiles are cut; 0 if there are none.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"]
    crop_pct: float
    resize_mode: Literal["crop", "squash", "pad"]
    larger_size: int = 0
    cropped_size: int = 0

    @property
    def decoded_size(self) -> int:
        """Side of the square to which a photo is decoded, in pixels. All views are made from that square."""
        return max(self.size, self.larger_size, self.cropped_size)


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """All that is needed to rebuild an encoder offline from its weights file.

    Attributes:
        library: the library that builds it.
        architecture: its name in that library.
        arguments: keyword arguments for the library. They include another input size than that of its training.
        pool: what is returned of a class token and patches: the token, the mean of the patches, or both, concatenated.
            "stages" is the final features and the means of the last feature maps, concatenated. "auto" is what the
            library returns.
        packages: name -> version of the Python packages with which it was built.
        preprocessing: of the photos.
        features: length of an embedding.
        precision: "half" is half precision on a GPU and fp32 on a CPU; "full" is fp32 everywhere.
        learnt_from: digest of a competition's observations -> (digest of those that the encoder was trained on, seed of
            the split that held out the others). An encoder cannot be validated on observations of its training.
        file: name of the weights file, in the folder of the manifest; empty if it is not saved yet.
    """

    library: Literal["timm", "open_clip"]
    architecture: str
    arguments: dict[str, Any]
    pool: Literal["auto", "token", "avg", "token+avg", "stages"] = "auto"
    packages: dict[str, str] = field(default_factory=dict)
    preprocessing: Preprocessing
    features: int
    precision: Literal["half", "full"]
    learnt_from: dict[str, tuple[str, int]] = field(default_factory=dict)
    file: str


@dataclass(frozen=True, kw_only=True)
class GivenSettings:
    """The settings with which a run was started. `--resume` compares them.

    Attributes:
        recipe: the settings before any of them was resolved or chosen.
        weights: digest of the encoder's files; empty if the encoder was given by name.
    """

    recipe: dict[str, Any]
    weights: str


@dataclass(frozen=True, kw_only=True)
class Member:
    """One or several encoders and their bank. A run has one member, an ensemble has several.

    Attributes:
        name: for the log.
        encoders: whose embeddings are concatenated.
        views: names of the test-time views, the most useful first.
        pooling: how the embeddings of an observation's photos are combined; "none" for a photo in tiles.
        banks: names of their files: over the embeddings of the first encoder, of the first two, and so on. A kernel
            that has no time for the last encoders uses an earlier one.
        metadata_prior: name of its file; None if there is no metadata prior.
        metadata_prior_weight: weight of the log-probabilities by metadata, which are added to those by photos.
        weight: of the member's log-probabilities: the inverse of their temperature, times the weight in an ensemble.
        validation: scores on held-out observations; empty if none could be held out.
        reference_counts: how many "observations" and "photos" the bank is made of.
        recipe: the settings, including those that were resolved and chosen.
        given: the settings as they were given.
        data_sha256: digest of the training data.
        versions: name -> version of Python and of the libraries used in training.
        run: name of the run's folder; only in a bundle.
    """

    name: str
    encoders: tuple[EncoderSpec, ...]
    views: tuple[str, ...]
    pooling: str
    banks: tuple[str, ...]
    metadata_prior: str | None
    metadata_prior_weight: float
    weight: float
    validation: dict[str, float]
    recipe: dict[str, Any]
    given: GivenSettings = GivenSettings(recipe={}, weights="")
    data_sha256: str
    versions: dict[str, str]
    reference_counts: dict[str, int] = field(default_factory=dict)
    run: str | None = None


@dataclass(frozen=True, kw_only=True)
class CompetitionSpec:
    """The competition that the weights were trained on.

    Attributes:
        name: see `kernel.competitions`.
        resolution: of the photos, where the competition has several.
        observations_sha256: digest of all its labelled observations.
        time_limit: for a kernel, seconds.
        settings: those that were found in its folder, such as names of columns; none where nothing had to be found.
    """

    name: str
    resolution: Literal["300p", "500p", "720p", "fullsize"]
    observations_sha256: str = ""
    time_limit: float
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a folder of weights: a run or `build/weights`.

    Attributes:
        commit: the repository's commit in training; None in a bundle, whose script names it.
        class_ids: ids of all classes, in the order of the banks.
        fallback_classes: ids of the most common classes, predicted for an observation without a readable photo.
        class_counts: observations of each class in the reference; none in weights of an earlier version.
        threshold: where an answer is a set of classes, it has those with at least this probability; None elsewhere.
        members: the best first, because a kernel that is short of time skips the last.
        validation: scores of an ensemble on held-out observations; None for one member, which has its own, and where
            they are not known.
        files: name -> SHA-256 of every other file in the folder.
    """

    format: str = FORMAT
    commit: str | None = None
    competition: CompetitionSpec
    class_ids: tuple[str, ...]
    fallback_classes: tuple[str, ...]
    class_counts: tuple[int, ...] = ()
    threshold: float | None = None
    members: tuple[Member, ...]
    validation: dict[str, float] | None = None
    files: dict[str, str]


def tile_names(grids: Sequence[int]) -> tuple[str, ...]:
    """The views that are the tiles of grids of n x n, row after row of each, such as "tile-3-0-2"."""
    return tuple(f"tile-{n}-{row}-{column}" for n in grids for row in range(n) for column in range(n))


def tiled(preprocessing: Preprocessing, grids: Sequence[int]) -> Preprocessing:
    """How a photo is decoded for its tiles: whole, as a crop would lose its margins, and with the detail of a tile."""
    size = preprocessing.size
    return replace(preprocessing, crop_pct=1.0, resize_mode="squash", larger_size=0, cropped_size=size * max(grids))


def in_tiles(manifest: Manifest, grids: Sequence[int]) -> Manifest:
    """The manifest for test photos that are cut into tiles, each embedded alone; itself without grids.

    Args:
        grids: of the competition.
    """
    if not grids:
        return manifest
    members = []
    for member in manifest.members:
        encoders = tuple(replace(one, preprocessing=tiled(one.preprocessing, grids)) for one in member.encoders)
        members.append(replace(member, encoders=encoders, views=tile_names(grids), pooling="none"))
    return replace(manifest, members=tuple(members))


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest. Unknown keys are ignored.

    Raises:
        InputError: the file cannot be read or has another format, a key is missing, or a value has the wrong type.
    """
    values = _read_json(path)
    try:
        manifest = from_json(Manifest, values, "")
        empty = [name for name in ("class_ids", "fallback_classes", "members") if not getattr(manifest, name)]
        if empty:
            raise ValueError(f"{empty[0]} is empty")
        if len(manifest.class_counts) not in (0, len(manifest.class_ids)):
            raise ValueError("class_counts needs a count for each class")
        for member in manifest.members:
            if not len(member.encoders) == len(member.banks) > 0:
                raise ValueError(f"{member.name} needs as many banks as encoders")
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}; train or bundle again") from error
    return manifest


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest atomically: a reader sees the old file or the new one, never a part of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(to_json(manifest), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def to_json(value: object) -> Any:
    """Convert a dataclass of this module to JSON. An optional field is left out if it is None."""
    if not is_dataclass(value):
        return [to_json(item) for item in value] if isinstance(value, tuple) else value
    values = {one.name: (getattr(value, one.name), one.default) for one in fields(value)}
    return {name: to_json(own) for name, (own, default) in values.items() if own is not None or default is not None}


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({shorten(error)}): give a run, or train again") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise InputError(f"{path} has format {shorten(repr(found), 60)}, expected {FORMAT!r}: train or bundle again")
    return values


def from_json(kind: Any, value: Any, key: str) -> Any:
    """Convert a JSON or TOML value to the type of its field. A missing key leaves the field's default, if it has one.

    Args:
        kind: the type: one of the dataclasses, or the annotation of one of their fields.
        key: name of the value in messages, such as `members[0].views`.

    Raises:
        ValueError: a key is missing, or a value has another type.
    """
    inner, outer = get_args(kind), get_origin(kind) or kind

    def expect(is_right: bool, what: str) -> None:
        if not is_right:
            raise ValueError(f"expected {what} for {key}, got {shorten(repr(value), 60)}")

    if outer is Any:
        return value
    if outer is UnionType:  # of one type and None
        return None if value is None else from_json(inner[0], value, key)
    if outer is Literal:
        expect(value in inner, " or ".join(map(repr, inner)))
        return value
    if outer is tuple:
        expect(isinstance(value, list), "a list")
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        expect(len(value) == len(kinds), f"{len(kinds)} values")
        pairs = enumerate(zip(kinds, value, strict=True))
        return tuple(from_json(kind, item, f"{key}[{index}]") for index, (kind, item) in pairs)
    if outer is dict:
        expect(isinstance(value, dict), "an object")
        return {name: from_json(inner[1], own, f"{key}.{name}") for name, own in value.items()}
    if is_dataclass(outer):
        expect(isinstance(value, dict), "an object")
        prefix = f"{key}." if key else ""
        for one in fields(outer):
            if one.name not in value and one.default is MISSING and one.default_factory is MISSING:
                raise ValueError(f"{prefix}{one.name} is missing")
        given = [one for one in fields(outer) if one.name in value]
        return outer(**{one.name: from_json(one.type, value[one.name], prefix + one.name) for one in given})
    numbers = {int: ("an int", int), float: ("a number", (int, float)), bool: ("true or false", bool)}
    what, types = {str: ("a string", str), **numbers}[outer]
    expect(isinstance(value, types) and isinstance(value, bool) == (outer is bool), what)
    return value


@dataclass(frozen=True)
class Weights:
    """A folder of weights and its manifest.

    Attributes:
        digests: the SHA-256 of files, as far as they are computed in a thread.
    """

    folder: Path
    manifest: Manifest
    digests: dict[str, Future] = field(default_factory=dict, repr=False, compare=False)

    def start_checks(self) -> None:
        """Read the encoders' files in a thread, for `file`: it takes as long as importing torch."""

        def compute() -> None:
            for name, digest in self.digests.items():
                try:
                    digest.set_result(sha256(self.folder / name))
                except Exception as error:
                    digest.set_exception(error)

        names = [spec.file for member in self.manifest.members for spec in member.encoders]
        self.digests.update({name: Future() for name in names})
        threading.Thread(target=compute, name="digest", daemon=True).start()  # the process does not wait for it

    def file(self, name: str) -> Path:
        """The path of a weights file, after a check of its SHA-256.

        Raises:
            InputError: the file is missing, or its SHA-256 is not the manifest's.
        """
        path = self.folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing: copy or upload the whole folder again")
        expected = self.manifest.files.get(name, "no digest")
        found = self.digests[name].result() if name in self.digests else sha256(path)
        if found != expected:
            raise InputError(f"{path} has SHA-256 {found}, the manifest says {expected}: copy or upload it again")
        return path

    def wheels(self) -> list[Path]:
        """The paths of the wheels, each checked as in `file`."""
        return [self.file(name) for name in sorted(self.manifest.files) if name.endswith(".whl")]


def find_weights(root: Path, digest: str = MANIFEST_SHA256) -> Weights:
    """Find the weights that this kernel was bundled with.

    Args:
        digest: SHA-256 of their manifest; an empty string accepts any weights.

    Raises:
        InputError: no weights are attached, or only those of another bundle; or several are attached and `digest` is
            empty.
    """
    found: dict[Path, str] = {}
    for folder in find_folders(root, _holds_weights):
        found[folder] = sha256(folder / MANIFEST)
        if found[folder] == digest:  # stop here: searching deeper would list the folders of photos
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
        raise InputError(f"several weights under {root} ({', '.join(map(str, found))}): attach only one")
    return read_weights(first)


def read_weights(folder: Path) -> Weights:
    """The weights in a folder: a run or `build/weights`.

    Raises:
        InputError: as `read_manifest`.
    """
    return Weights(folder, read_manifest(folder / MANIFEST))


def _holds_weights(folder: Path) -> bool:
    """Whether a folder has a manifest in this format, complete or not."""
    try:
        _read_json(folder / MANIFEST)
    except InputError:
        return False
    return True
