"""The first lines of the bundled script: what it is, the model in words, and the formula."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from kernel.competitions import competition_of
from kernel.inputs import InputError, shorten
from kernel.manifest import Member, Weights, in_tiles
from local.base.console import counted

INTRODUCTION = """\
An offline Kaggle kernel for few-shot species recognition, made by bundle.py from kernel/.

It ranks the classes for every observation of the competition's test set, and writes the best of them, or the
probabilities of all, into submission.csv. An observation is one or more photos of one specimen. A valid submission,
with the commonest classes everywhere, is on disk before torch is imported. The script accepts only the weights that it
was bundled with, needs no network, and gives every photo as many views as the time limit allows.

The model
{model}

The formula
  {embedding}
  x            = normalize(layers(embedding))
  score(c)     = logit_scale * max over the prototypes p of class c of <x, p> + bias(c)
  log p(c)     = log_softmax(score)(c)
  {ranking}

Made from
  commit       {commit}
  manifest     {digest}
"""


EMBEDDING = "embedding    = normalize(mean over an observation's photos and their views of normalize(encoder(view)))"
CONCATENATED = """mean_e       = mean over an observation's photos and their views of normalize(encoder_e(view))
  embedding    = normalize(concatenation over the encoders e of a member of mean_e); the layers weight the encoders"""
POOLED = {
    "token": "the class token",
    "avg": "the mean of the patches",
    "token+avg": "the class token and the mean of the patches, concatenated",
    "stages": "the final features and the means of the last feature maps, concatenated",
}
USED_PARTS = {  # of a pooling, by pool_part
    ("token+avg", "token"): ", of which the bank uses the class token",
    ("token+avg", "avg"): ", of which the bank uses the mean of the patches",
    ("stages", "final"): ", of which the bank uses the final features",
}


def introduce(weights: Weights, digest: str, commit: str) -> str:
    """The introduction of the script that goes with a bundle's weights.

    Raises:
        InputError: the file of a bank is damaged, or of an earlier version.
    """
    grids = competition_of(weights.manifest.competition).grids
    manifest = in_tiles(weights.manifest, grids)
    members, spec = manifest.members, manifest.competition
    lines = [f"  competition  {spec.name}, {counted(len(manifest.class_ids), 'class')}"]
    for number, member in enumerate(members, 1):
        if len(members) > 1:
            run = shorten(member.run, 60)
            lines.append(f"  member {number} of {len(members)}, weight {member.weight:.3g}, from the run {run}")
        lines += [f"  {name:11}  {text}" for name, text in describe_member(member, weights.folder)]
    factor = "" if members[0].weight == 1 else f"{members[0].weight:.3g} * "
    terms = [f"{factor}log p(c)"] if len(members) == 1 else ["the sum over the members of weight * log p(c)"]
    if any(member.metadata_prior for member in members):
        terms.append("the weighted log p(c | metadata)")
    ranking = f"The classes are ranked by {' + '.join(terms)}."
    if grids:
        sizes = ", ".join(f"{n} x {n}" for n in grids)
        lines.append(f"  tiles        {sizes}; an answer has the classes of p(c) >= {manifest.threshold:.3g} in a tile")
    is_single = all(len(member.encoders) == 1 for member in members)
    embedding = EMBEDDING if is_single else CONCATENATED
    if grids:
        embedding = embedding.replace("mean over an observation's photos and their views of ", "")
    return INTRODUCTION.format(
        model="\n".join(lines), embedding=embedding, ranking=ranking, commit=commit, digest=digest
    )


def describe_member(member: Member, folder: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of what a member consists of."""
    weights = member.recipe.get("encoder_weights") or [1.0] * len(member.encoders)
    for encoder, weight in zip(member.encoders, weights, strict=True):
        size, resize_mode = encoder.preprocessing.size, encoder.preprocessing.resize_mode
        precision = "half precision on a GPU" if encoder.precision == "half" else "full precision"
        weighted = f", weight {weight:.3g} in the bank" if len(member.encoders) > 1 else ""
        yield (
            "encoder",
            f"{encoder.architecture} of {encoder.library}, {encoder.features:,} features, {precision}{weighted}",
        )
        if encoder.pool != "auto":
            yield "pooling", POOLED[encoder.pool] + USED_PARTS.get((encoder.pool, member.recipe.get("pool_part")), "")
        yield "photos", f"{size} x {size} pixels, resize_mode {resize_mode}"
    first = ", the most useful first" if len(member.views) > 1 else ""
    names = "tiles, each ranked alone" if member.pooling == "none" else ", ".join(member.views)
    yield "views", f"{len(member.views)}{first}: {names}"
    if member.reference_counts:
        observations, photos = (counted(member.reference_counts[f"{one}s"], one) for one in ("observation", "photo"))
        yield "reference", f"{member.recipe.get('reference', 'train')}: {observations}, {photos}"
    if member.pooling == "max":
        yield "pooling", f"{member.pooling} over an observation's photos, instead of the mean"
    try:
        banks = list(describe_banks(folder / member.banks[-1]))
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"the bank of the run {member.run or member.name} is not of this version ({shorten(error)}): train it again"
        ) from error
    methods = [f"{member.recipe.get('matcher', 'bank')}"] * len(banks)
    if member.recipe.get("nearest_neighbour_weight"):
        methods[-1] = "nearest neighbour"
    for method, bank in zip(methods, banks, strict=True):
        yield "bank", f"{method}: {bank}"
    if member.metadata_prior:
        yield "metadata", f"log p(c | metadata) with weight {member.metadata_prior_weight:.3g}"


def describe_banks(path: Path) -> Iterator[str]:
    """Each bank of a file in words; only its shapes and scalars are read, without torch.

    Raises:
        SafetensorError, OSError: the file is damaged, or of an earlier version.
    """
    with safe_open(path, "numpy") as file:
        names = list(file.keys())
        banks = sum(name.endswith(".prototypes") for name in names)
        for index in range(banks):
            logit_scale, mixture_weight, transduction = (
                float(file.get_tensor(f"{index}.{name}")) for name in ("logit_scale", "mixture_weight", "transduction")
            )
            prototypes, features = file.get_slice(f"{index}.prototypes").get_shape()
            layers = sum(name.startswith(f"{index}.layers.") and name.endswith(".weight") for name in names)
            parts = [f"{counted(prototypes, 'prototype')} of {counted(features, 'feature')}"]
            if layers:
                parts.append(f"after {counted(layers, 'layer')}")
            parts.append(f"logit_scale {logit_scale:.3g}")
            if transduction:
                parts.append(f"transduction {transduction:.3g}")
            if banks > 1:
                parts.append(f"{mixture_weight:.0%} of the probability")
            yield ", ".join(parts)
