"""Find out what `--encoder SPEC` refers to. Nothing is loaded, so that a wrong path is reported immediately."""

import difflib
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from kernel.inputs import InputError
from kernel.manifest import MANIFEST

OPEN_CLIP, TIMM = "open_clip_config.json", "config.json"  # the configuration file of each format
# The hub's names for weights in each format, in the libraries' order of preference. A local folder may use others.
WEIGHTS = {
    OPEN_CLIP: ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    TIMM: ("model.safetensors", "pytorch_model.bin"),
}
REPOSITORY = re.compile(r"[^/@]+/[^/@]+(@.+)?")  # OWNER/NAME or OWNER/NAME@REVISION
SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".bin", ".pt")


@dataclass(frozen=True)
class Source:
    """What a SPEC refers to.

    Attributes:
        form: "timm", "open_clip", "hub", "run", "folder", or "pair" (a .safetensors and a .json).
        name: a model's name, OWNER/NAME or OWNER/NAME@REVISION of a repository on the hub, or a path.
        formats: configuration files to look for in a repository or folder, the preferred one first.
    """

    form: str
    name: str
    formats: tuple[str, ...] = ()


def find_source(spec: str, pretrained: bool = True) -> Source:
    """Parse a SPEC; see `local.encoders.load.load_encoder`.

    Raises:
        InputError: the form is unknown, the path does not exist, or the form does not support `pretrained` = False.
    """
    kind, _, name = spec.partition(":")
    formats = tuple(WEIGHTS)
    if kind in ("timm", "open_clip") and name.partition(":")[0] in ("hf-hub", "hf_hub", "local-dir"):
        formats = (TIMM,) if kind == "timm" else (OPEN_CLIP,)
        kind, _, name = name.partition(":")
    if kind == "timm":
        refuse_unknown_timm(name)
        return Source("timm", name)
    if not pretrained:
        raise InputError(f"pretrained = false with the encoder {spec}: only timm:NAME can have random weights")
    if kind == "open_clip":
        return Source("open_clip", name)
    if kind in ("hf-hub", "hf_hub") and REPOSITORY.fullmatch(name):
        return Source("hub", name, formats)
    path = Path(name if kind == "local-dir" else spec)
    if (path / MANIFEST).is_file():
        return Source("run", str(path))
    if path.is_dir():
        find_format(path, formats)
        return Source("folder", str(path), formats)
    if all(path.with_name(path.name + suffix).is_file() for suffix in (".json", ".safetensors")):
        return Source("pair", str(path))
    raise InputError(
        f"no encoder {spec}: give hf-hub:OWNER/NAME, open_clip:ARCHITECTURE/PRETRAINED, timm:NAME, the stem of a "
        ".safetensors and a .json, a folder with open_clip_config.json or config.json, or a run"
    )


def find_format(folder: Path, formats: tuple[str, ...]) -> str:
    """The first of `formats` in a folder.

    Raises:
        InputError: there is none.
    """
    kind = next((kind for kind in formats if (folder / kind).is_file()), None)
    if kind is None:
        raise InputError(f"{folder} contains no {' and no '.join(formats)}: give a folder in the hub's format")
    return kind


def refuse_unknown_timm(name: str) -> None:
    """Check a model's name against timm's source code, because importing timm takes seconds.

    A name that occurs anywhere in it passes; loading the model decides.

    Raises:
        InputError: it does not occur.
    """
    architecture, timm = name.partition(".")[0], find_spec("timm")
    folder = Path(timm.origin).parent / "models"
    code = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")))
    if not re.search(rf"\b{re.escape(architecture)}\b", code):
        models = re.findall(r"^@register_model\s+def (\w+)", code, re.MULTILINE)
        near = ", ".join(difflib.get_close_matches(architecture, models, n=5, cutoff=0.0))
        raise InputError(f"timm has no model {name}: the nearest are {near}")


def refuse_unsupported(architecture: str, key: str, value: object, supported: tuple[str, ...]) -> None:
    """Raise an InputError if the kernel does not support an encoder's preprocessing."""
    if value not in supported:
        raise InputError(
            f"{architecture} was trained with {key} {value}, expected {' or '.join(supported)}: choose another encoder"
        )
