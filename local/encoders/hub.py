"""Model folders in the formats of timm and open_clip: download them from the hub and find their weights."""

import argparse
from collections.abc import Callable
from pathlib import Path

import timm
import torch

from kernel.inputs import InputError, shorten
from local.base.files import read_json
from local.encoders.source import OPEN_CLIP, SUFFIXES, TIMM, WEIGHTS, find_format

# Width of a vision transformer -> the word for it in timm's names.
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1152: "so400m", 1280: "huge", 1536: "giant", 4096: "7b"}


def download(spec: str, repository: str, formats: tuple[str, ...], check: Callable[[Path], None]) -> Path:
    """Download a model's configuration and weights into the hub's cache.

    Without a network, and with HF_HUB_OFFLINE=1, the files in the cache are used.

    Args:
        spec: for messages.
        repository: OWNER/NAME or OWNER/NAME@REVISION.
        formats: configuration files to look for, the preferred one first.
        check: is called with the configuration before the weights are downloaded.

    Returns:
        The folder in the cache.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    name, _, revision = repository.partition("@")
    unreachable = None  # the error of a file that is not in the cache and could not be requested

    def fetch(file: str) -> Path | None:
        nonlocal unreachable
        try:
            return Path(hf_hub_download(name, file, revision=revision or None))
        except LocalEntryNotFoundError as error:  # other files may still be in the cache
            unreachable = error
        except EntryNotFoundError:
            pass
        return None

    try:
        for kind in formats:
            config = fetch(kind)
            if config and kind == TIMM:
                refuse_transformers(read_json(config), spec)
            if config:
                check(config)
            if config and any(fetch(file) for file in WEIGHTS[kind]):
                return config.parent
    except GatedRepoError as error:
        copies = "; timm's copies of DINOv3 are not gated, such as timm:vit_small_patch16_dinov3.lvd1689m"
        raise InputError(
            f"{spec} is gated: accept its terms on huggingface.co and log in with `hf auth login`"
            + copies * ("dinov3" in name)
        ) from error
    except (HfHubHTTPError, HFValidationError, RepositoryNotFoundError, OSError) as error:
        unreachable = error
    if unreachable and constants.HF_HUB_OFFLINE:
        raise InputError(f"{spec} is not in the cache: download it once without HF_HUB_OFFLINE=1")
    if unreachable:
        raise InputError(f"{spec} cannot be downloaded: {shorten(unreachable)}; check the name and the network")
    raise InputError(f"{spec} has no weights with {' or '.join(formats)}: choose another repository")


def find_readable_format(folder: Path, formats: tuple[str, ...]) -> str:
    """The first of `formats` in a folder.

    Raises:
        InputError: there is none, or the folder is in the format of transformers.
    """
    kind = find_format(folder, formats)
    if kind == TIMM:
        refuse_transformers(read_json(folder / kind), str(folder))
    return kind


def find_weights_file(folder: Path, kind: str) -> Path:
    """The weights in a folder: under one of the hub's names, otherwise the first file with a known suffix.

    Raises:
        InputError: there are none.
    """
    named = [folder / name for library in (kind, OPEN_CLIP, TIMM) for name in WEIGHTS[library]]
    others = [path for suffix in SUFFIXES for path in sorted(folder.glob(f"*{suffix}"))]
    path = next((path for path in (*named, *others) if path.is_file()), None)
    if path is None:
        names = ", ".join((*WEIGHTS[kind], *(f"*{suffix}" for suffix in SUFFIXES)))
        raise InputError(f"{folder} contains no weights: looked for {names}")
    return path


def read_weights_file(path: Path) -> dict[str, torch.Tensor]:
    """Read the named tensors of a file, or of the model in a training checkpoint. No code in a pickle is run.

    Raises:
        InputError: it cannot be read, or has no named tensors.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options in checkpoints of timm's trainer
            state = timm.models.load_state_dict(str(path), weights_only=True)  # prefers a moving average
        if not state:
            raise ValueError("it has no named tensors")
    except Exception as error:  # safetensors, pickle and zip raise errors of their own
        raise InputError(f"{path} cannot be read as weights: {shorten(error)}; download it again") from error
    return state


def refuse_transformers(config: dict, where: str) -> None:
    """Raise an InputError if a config.json is in the format of transformers, with timm's names for the same family."""
    if "architecture" in config or not ("model_type" in config or "architectures" in config):
        return
    kind, vision = str(config.get("model_type")), config.get("vision_config")
    width = (vision if isinstance(vision, dict) else config).get("hidden_size")
    size = SIZES.get(width, "") if isinstance(width, int) else ""
    family = kind.partition("_")[0]
    pattern = f"*{size}*{family}*" if size else f"*{family}*"
    names = timm.list_pretrained(pattern) if kind.isidentifier() else []
    listed = ", ".join(f"timm:{name}" for name in names)
    search = f"look for the same weights in timm.list_pretrained({repr(pattern) if names else ''})"
    raise InputError(
        f"{where} is in the format of transformers (model_type {shorten(kind, 40)}), expected that of timm or "
        f"open_clip: {f'timm has {listed}' if 0 < len(names) <= 8 else f'{search} and open_clip.list_pretrained()'}"
    )
