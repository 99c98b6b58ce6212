"""Embed the names of classes with the text tower of a CLIP, in the space of its embeddings of photos.

Only training does this: the class prototypes contain what comes of it, and the kernel needs no text tower.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from kernel.forward import is_out_of_memory
from kernel.inputs import InputError, shorten
from local.base.console import progress
from local.encoders.hub import download, find_readable_format, find_weights_file
from local.encoders.source import OPEN_CLIP, find_source

# Two of CLIP's templates, whose embeddings are averaged (Radford et al. 2021, https://arxiv.org/abs/2103.00020).
NAME_TEMPLATES = ("a photo of {}.", "a close-up photo of {}.")
# BioCLIP learnt names after those of their taxa (Stevens et al. 2024, https://arxiv.org/abs/2311.18803).
TAXA_TEMPLATES = ("a photo of {}.",)
BATCH = 128  # texts


def write_texts(name: str, taxa: Sequence[str]) -> list[str]:
    """The texts about one class.

    Args:
        name: of the class, such as "Amanita muscaria"; "" gives no text.
        taxa: the names of its taxa, the highest rank first; those of unknown ranks are "".
    """
    if not name:
        return []
    texts = [template.format(name) for template in NAME_TEMPLATES]
    known = list(filter(None, taxa))
    if known and known[-1].casefold() == name.split()[0].casefold():  # a species begins with its genus
        known.pop()
    return texts + [template.format(" ".join([*known, name])) for template in TAXA_TEMPLATES if known]


def embed_classes(spec: str, texts: Sequence[Sequence[str]], device: torch.device) -> np.ndarray:
    """Embed the texts about each class with the text tower of an encoder.

    Args:
        spec: of the encoder; see `local.encoders.load.load_encoder`.
        texts: of each class; none for a class without a name.

    Returns:
        (classes, features) float32, the means over the texts, of length 1; zeros for a class without a text.

    Raises:
        InputError: fewer than two classes have a text, or the encoder has no text tower that can be loaded.
    """
    labels = np.repeat(np.arange(len(texts)), [len(own) for own in texts])
    if len(np.unique(labels)) < 2:
        raise InputError("fewer than two classes have a name other than a number")
    tower, tokenizer = load_text_tower(spec)
    tower, lines = tower.to(device), [text for own in texts for text in own]
    parts = range(0, len(lines), BATCH)
    totals = torch.zeros(0)
    with torch.inference_mode():
        for first in progress(parts, "embedding the names of the classes", unit="batch"):
            tokens = tokenizer(lines[first : first + BATCH]).to(device)
            embedded = normalize(tower.encode_text(tokens).float(), dim=1).cpu()
            totals = totals if len(totals) else torch.zeros(len(texts), embedded.shape[1])
            totals.index_add_(0, torch.tensor(labels[first : first + BATCH]), embedded)
    if not totals.isfinite().all():
        raise InputError(f"the text tower of {spec} gives embeddings that are not finite")
    return normalize(totals, dim=1).numpy()


def load_text_tower(spec: str) -> tuple[nn.Module, Callable[[list[str]], torch.Tensor]]:
    """Load a CLIP without its vision tower, and its tokenizer.

    Raises:
        InputError: the encoder is no CLIP of open_clip, or its text tower or tokenizer cannot be loaded.
    """
    source = find_source(spec)
    if source.form not in ("open_clip", "hub", "folder"):
        what = "a run keeps the image tower alone" if source.form == "run" else "only encoders of open_clip have one"
        raise InputError(f"{spec} has no text tower: {what}")
    if source.form == "hub":
        folder = download(spec, source.name, source.formats, lambda config: None)
    elif source.form == "folder":
        folder = Path(source.name)
    if source.form != "open_clip" and find_readable_format(folder, source.formats) != OPEN_CLIP:
        raise InputError(f"{spec} has no text tower: only encoders of open_clip have one")
    import open_clip

    from local.encoders.from_open_clip import load_both_towers

    try:
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, which must not change what comes after
            if source.form == "open_clip":
                name, _, tag = source.name.partition("/")
                model = open_clip.create_model(name, pretrained=tag, require_pretrained=True)
            else:
                name, model = f"local-dir:{folder}", load_both_towers(folder, find_weights_file(folder, OPEN_CLIP))
        del model.visual
        tokenizer = open_clip.get_tokenizer(name)
        with torch.inference_mode():
            model.eval().encode_text(tokenizer(["a photo"]))  # a GPU cannot be used after a token that is not known
    except Exception as error:  # its type depends on what is wrong; some tokenizers need other libraries
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"the text tower of {spec} cannot be loaded: {shorten(f'{type(error).__name__}: {error}')}"
        ) from error
    return model, tokenizer
