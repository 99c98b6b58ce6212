"""Where `--encoder SPEC` takes an encoder from. Loads nothing, so that a wrong path is answered at once."""

from dataclasses import dataclass
from pathlib import Path

from kernel.inputs import InputError
from kernel.manifest import MANIFEST

OPEN_CLIP, TIMM = "open_clip_config.json", "config.json"  # the configurations by which the two formats are known
# File names of the hub, in the order in which both libraries look for them; a folder may have any other name.
WEIGHTS = {
    OPEN_CLIP: ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    TIMM: ("model.safetensors", "pytorch_model.bin"),
}
SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".bin", ".pt")


@dataclass(frozen=True)
class Source:
    """Where an encoder comes from.

    Attributes:
        form: "timm", "open_clip", "hub", "run", "folder", or "pair", which is a .safetensors and a .json.
        name: of a model, or OWNER/NAME of a repository of the hub, with @REVISION if need be; or a path.
        formats: configurations that a repository or a folder is searched for, the preferred one first.
    """

    form: str
    name: str
    formats: tuple[str, ...] = ()


def find_source(spec: str, pretrained: bool = True, image_size: int = 0) -> Source:
    """Read an encoder's SPEC; see `local.encoders.load.load_encoder`.

    Raises:
        InputError: the form is unknown, nothing is at the path, or the form has no random weights or no other size.
    """
    kind, _, name = spec.partition(":")
    formats = tuple(WEIGHTS)
    if kind in ("timm", "open_clip") and name.partition(":")[0] in ("hf-hub", "hf_hub", "local-dir"):
        formats = (TIMM,) if kind == "timm" else (OPEN_CLIP,)
        kind, _, name = name.partition(":")
    if kind == "timm":
        return Source("timm", name)
    if not pretrained:
        raise InputError(f"pretrained = false with the encoder {spec}: random weights are for timm:NAME alone")
    if kind == "open_clip":
        refuse_size(spec, image_size)
        return Source("open_clip", name)
    if kind in ("hf-hub", "hf_hub"):
        return Source("hub", name, formats)
    path = Path(name if kind == "local-dir" else spec)
    if (path / MANIFEST).is_file():
        return Source("run", str(path))
    if path.is_dir():
        return Source("folder", str(path), formats)
    if all(path.with_name(path.name + suffix).is_file() for suffix in (".json", ".safetensors")):
        return Source("pair", str(path))
    raise InputError(
        f"no encoder {spec}: give hf-hub:OWNER/NAME, open_clip:ARCHITECTURE/PRETRAINED, timm:NAME, the stem of a "
        ".safetensors and a .json, a folder with open_clip_config.json or config.json, or a run"
    )


def refuse_size(spec: str, image_size: int) -> None:
    """Refuse another input size than an open_clip tower's own."""
    if image_size:
        raise InputError(f"image_size = {image_size} with {spec}: an open_clip tower takes its own size; leave it at 0")
