"""The whole story: write a valid submission, embed the photos, rank the classes, write the predictions."""

from kernel.start import handle_errors, remove_packages, start

if __name__ == "__main__":
    SETUP = start()  # writes the fallback submission, and unpacks the wheels, before torch and timm are imported

import traceback
from collections.abc import Sequence
from itertools import takewhile

import torch

from kernel.encoders import describe_versions, open_encoder, pick_devices
from kernel.start import Setup
from kernel.manifest import EncoderSpec, Member
from kernel.photos import UNREADABLE_FILE, UNREADABLE_LIMIT, describe_unreadable, write_unreadable
from kernel.loader import PhotoLoader
from kernel.embeddings import Embeddings, Limits, concatenate, embed_observations, list_photos
from kernel.metadata_prior import weighted_prior
from kernel.bank import read_banks
from kernel.ranking import make_answers, rank
from kernel.inputs import InputError
from kernel.submission import fallback_answer, write_submission


def embed_test_set(setup: Setup) -> tuple[list[Embeddings], torch.device]:
    """Embed the test set with each encoder of each member. Members with the same encoder and views share embeddings.

    Returns:
        The embeddings by each encoder that there was time for, and the first of the encoders' devices.
    """
    steps = [(member, spec) for member in setup.weights.manifest.members for spec in member.encoders]
    inputs = [(spec, member.views, member.pooling) for member, spec in steps]
    first_uses = [inputs.index(each) for each in inputs]
    distinct = sorted(set(first_uses))
    different = [steps[index] for index in distinct]
    # The processes of the loaders are forked before CUDA starts, and decode while the first encoder is opened.
    photos, gpus = list_photos(setup.table.observations), torch.cuda.device_count()
    loaders = [PhotoLoader.for_gpus(photos, spec.preprocessing, gpus, len(different)) for _, spec in different]
    try:
        devices = pick_devices()
        found = dict(zip(distinct, embed_in_steps(setup, different, loaders, devices), strict=False))
        return [found[index] for index in takewhile(found.__contains__, first_uses)], devices[0]
    finally:
        for loader in loaders:
            loader.close()


def embed_in_steps(
    setup: Setup,
    steps: Sequence[tuple[Member, EncoderSpec]],
    loaders: Sequence[PhotoLoader],
    devices: Sequence[torch.device],
) -> list[Embeddings]:
    """Embed the test set with one encoder after another, the best first, as far as time allows; at least with one.

    In the scored rerun an error costs only what is not embedded yet.

    Args:
        steps: each encoder with the member that it is of.
        loaders: of the photos, one for each encoder.
    """
    embedded: list[Embeddings] = []
    for index, ((member, spec), loader) in enumerate(zip(steps, loaders, strict=True)):
        name, encoder = spec.architecture, None  # frees the memory of the encoder before
        try:
            encoder = open_encoder(setup.weights.file(spec.file), spec, devices)
            name += f" on {' and '.join(map(str, encoder.devices))}"
            limits = Limits(
                setup.budget,
                fraction=1 / (len(steps) - index),
                is_optional=index > 0,
                tolerates_errors=setup.is_rerun,
            )
            embeddings = embed_observations(
                encoder, setup.table.observations, member.views, member.pooling, limits, name, loader
            )
        except Exception:
            if not (setup.is_rerun and embedded):
                raise
            traceback.print_exc()
            print(f"scored rerun: predicting without {name} and the encoders after it", flush=True)
            break
        if index and embeddings.late:
            print(f"{name}: no time for it and the encoders after it", flush=True)
            break
        embedded.append(embeddings)
        if embeddings.late:
            break
    return embedded


def write_predictions(setup: Setup, embedded: Sequence[Embeddings], device: torch.device) -> int:
    """Rank the classes of each observation, or of each tile of its photo, and write the submission.

    Args:
        embedded: by each encoder that there was time for.
        device: on which the classes are ranked.

    Returns:
        How many observations keep the fallback: those without an embedding, unless the metadata say something.
    """
    weights, table, manifest = setup.weights, setup.table, setup.weights.manifest
    class_ids, count = manifest.class_ids, table.competition.form.ranked(len(manifest.class_ids))
    members, banks, values, left = [], [], [], list(embedded)
    for member in manifest.members:
        own, left = left[: len(member.encoders)], left[len(member.encoders) :]
        if own:
            members.append(member)
            banks.append(read_banks(weights.file(member.banks[len(own) - 1])))
            values.append(concatenate([embeddings.pooled for embeddings in own]))
    metadata_prior = weighted_prior(weights, members, table.observations)
    ranked, probabilities = rank(banks, [member.weight for member in members], values, count, metadata_prior, device)
    is_predicted = torch.stack([embeddings.has_embedding for embeddings in embedded]).all(dim=0)
    if metadata_prior is not None:
        is_predicted = torch.ones_like(is_predicted)
    fallback = fallback_answer(table, manifest)
    is_predicted = is_predicted.view(len(table.observations), -1)  # a column for each tile
    answers = (
        {class_ids[index]: value for index, value in answer.items()} if answer else fallback
        for answer in make_answers(ranked, probabilities, is_predicted, manifest.threshold)
    )
    write_submission(setup.working / "submission.csv", table, answers, class_ids)
    return int((~is_predicted.any(dim=1)).sum())


def summarise(setup: Setup, embedded: Sequence[Embeddings], fallbacks: int, seconds: float) -> None:
    """Print what happened, in one line.

    Args:
        fallbacks: observations that kept the fallback.
        seconds: that embedding took.

    Raises:
        InputError: too many photos could not be read. The predictions are on disk all the same.
    """
    observations, first = setup.table.observations, embedded[0]
    photos = sum(len(observation.photos) for observation in observations)
    examples = describe_unreadable(first.unreadable)
    if examples:
        print(f"unreadable: {examples}; all in {UNREADABLE_FILE}", flush=True)
    causes = "".join(f", {count} {cause}" for cause, count in first.failures.most_common())
    views = " + ".join(
        "/".join(str(count) for count in sorted(embeddings.views, reverse=True)) or "0" for embeddings in embedded
    )
    unreadable = len(first.unreadable)
    print(
        f"done: {photos} photos ({unreadable} unreadable{causes}), "
        f"{len(observations)} observations ({fallbacks} on the fallback, {first.late} too late), "
        f"{views} views, {setup.budget.elapsed():.1f} s, {photos / max(seconds, 1e-9):.1f} photos/s",
        flush=True,
    )
    if unreadable > UNREADABLE_LIMIT * photos:
        found = f"{unreadable} of {photos} photos cannot be read{causes}, such as {examples}"
        raise InputError(f"{found}: attach the competition's data again")


def main(setup: Setup) -> None:
    """Replace the fallback submission by the predictions."""
    print(describe_versions(setup.weights.manifest.members), flush=True)
    began = setup.budget.elapsed()
    embedded, device = embed_test_set(setup)
    seconds = setup.budget.elapsed() - began
    fallbacks = write_predictions(setup, embedded, device)
    handle_errors(setup.working, setup.is_rerun, "the predictions")
    remove_packages(setup.working)
    write_unreadable(embedded[0].unreadable, setup.working / UNREADABLE_FILE)
    summarise(setup, embedded, fallbacks, seconds)


if __name__ == "__main__":
    main(SETUP)
