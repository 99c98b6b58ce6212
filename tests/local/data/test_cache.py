"""Every photo is embedded once, whatever happens to the process."""

import os
import shutil
import signal
import socket
import time
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import load_file, save_file

from kernel.embeddings import embed_observations
from kernel.encoders import build_module
from kernel.forward import Encoder
from kernel.manifest import Preprocessing
from kernel.observations import Observation
from local.banks.estimators import pool
from local.base.distributed import process_group
from local.data import cache as module
from local.data.cache import EmbeddingCache, PartWriter, encoder_digest
from tests.conftest import photo
from tests.processes import FORKS

VIEWS = ("plain", "hflip")


@pytest.fixture
def observations(tmp_path):
    paths = [photo(tmp_path / "photos" / f"{number}.jpg", number) for number in range(7)]
    return [Observation("a", tuple(paths[:3])), Observation("b", tuple(paths[3:]))]


@pytest.fixture
def passes(encoder, monkeypatch):
    """Counts the photos that the encoder embeds."""
    counted, submit = [], type(encoder).submit
    monkeypatch.setattr(
        type(encoder), "submit", lambda self, photos, views: counted.append(len(photos)) or submit(self, photos, views)
    )
    return counted


def test_it_embeds_as_the_kernel_does(encoder, observations, tmp_path):
    photos = EmbeddingCache(tmp_path / "cache", encoder).embed(observations, VIEWS)
    kernel = embed_observations(encoder, observations, VIEWS).values.numpy()
    assert np.allclose(pool(photos.values, photos.observations, 2), kernel, atol=1e-3)


def test_a_photo_is_embedded_once_also_under_another_name(encoder, observations, passes, tmp_path):
    first = EmbeddingCache(tmp_path / "cache", encoder).embed(observations, VIEWS)
    assert sum(passes) == 7
    moved = tmp_path / "moved.jpg"
    shutil.copy(observations[0].photos[0], moved)
    again = EmbeddingCache(tmp_path / "cache", encoder).embed([Observation("c", (moved,)), *observations], VIEWS)
    assert sum(passes) == 7
    assert np.array_equal(again.values[1:], first.values)
    assert np.array_equal(again.values[0], first.values[0])


def test_progress_counts_the_photos_after_each_batch(encoder, observations, passes, tmp_path, monkeypatch):
    progress, advance = {}, module.Progress.advance

    def recorded(self, count=1):
        advance(self, count)
        progress.setdefault(self, []).append((sum(passes), self.done))

    monkeypatch.setattr(module.Progress, "advance", recorded)
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    many = [*observations, Observation("c", tuple(photo(tmp_path / f"{seed}.jpg", seed) for seed in range(10, 20)))]
    EmbeddingCache(tmp_path / "cache", encoder).embed([*many, Observation("d", (tmp_path / "broken.jpg",))], VIEWS)
    (embedding,) = [bar for bar in progress if bar.what.startswith("embedding")]
    assert (embedding.total, embedding.unit) == (18, "photo")
    assert [done for _, done in progress[embedding]] == [8, 17]  # and one that cannot be read
    assert all(done <= passed for passed, done in progress[embedding])
    assert progress[embedding][-1][0] == 17


def test_an_added_view_costs_that_view_alone(encoder, observations, monkeypatch, tmp_path):
    embedded, submit = [], type(encoder).submit
    monkeypatch.setattr(
        type(encoder), "submit", lambda self, photos, views: embedded.append(len(views)) or submit(self, photos, views)
    )
    first = EmbeddingCache(tmp_path / "cache", encoder).embed(observations, VIEWS)
    assert set(embedded) == {2}
    embedded.clear()
    views = ("rotate90", *VIEWS)
    more = EmbeddingCache(tmp_path / "cache", encoder).embed(observations, views)
    assert set(embedded) == {1}
    fresh = EmbeddingCache(tmp_path / "fresh", encoder).embed(observations, views)
    assert np.array_equal(more.values[:, 1:], first.values)
    assert np.allclose(more.values, fresh.values, atol=2e-3)


def test_an_unchanged_photo_is_not_read_again_and_a_changed_one_is(encoder, observations, monkeypatch, tmp_path):
    read, digest = [], module.content_digest
    monkeypatch.setattr(module, "content_digest", lambda path: read.append(path) or digest(path))
    paths = [path for observation in observations for path in observation.photos]
    for path in paths:
        os.utime(path, (1e9, 1e9))
    first = EmbeddingCache(tmp_path / "cache", encoder).embed(observations, VIEWS)
    assert len(read) == 7
    again = EmbeddingCache(tmp_path / "cache", encoder).embed(observations, VIEWS)
    assert len(read) == 7
    assert np.array_equal(first.values, again.values)
    size = paths[0].stat().st_size
    photo(paths[0], 99)
    paths[0].write_bytes(paths[0].read_bytes().ljust(size, b"\0"))
    changed = EmbeddingCache(tmp_path / "cache", encoder).embed(observations, VIEWS)
    assert read[7:] == [paths[0]]
    assert not np.array_equal(first.values[0], changed.values[0])
    assert np.array_equal(first.values[1:], changed.values[1:])


def test_a_photo_that_may_still_change_within_its_time_is_read_again(encoder, observations, monkeypatch, tmp_path):
    path, now = observations[0].photos[0], time.time()
    os.utime(path, (now, now))
    first = EmbeddingCache(tmp_path / "cache", encoder).embed(observations, VIEWS)
    size = path.stat().st_size
    photo(path, 99)
    path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size])
    os.utime(path, (now, now))
    changed = EmbeddingCache(tmp_path / "cache", encoder).embed(observations, VIEWS)
    assert not np.array_equal(first.values[0], changed.values[0])


def test_a_cache_of_an_earlier_format_is_ignored(encoder, observations, passes, monkeypatch, tmp_path):
    first = EmbeddingCache(tmp_path / "cache", encoder).embed(observations, VIEWS)
    monkeypatch.setattr(module, "FORMAT", 3)
    again = EmbeddingCache(tmp_path / "cache", encoder)
    digests = np.array([list(bytes.fromhex("00" * 32))], dtype=np.uint8)
    (again.folder / "plain").mkdir(parents=True)
    save_file(
        {"photos": digests, "values": np.ones((1, encoder.features), np.float16)}, again.folder / "plain/a.safetensors"
    )
    assert np.array_equal(again.embed(observations, VIEWS).values, first.values)
    assert sum(passes) == 14


def test_many_parts_become_one_file_per_view(encoder, observations, monkeypatch, tmp_path):
    whole = EmbeddingCache(tmp_path / "whole", encoder).embed(observations, VIEWS)
    monkeypatch.setattr(module, "PART", 1)
    parts = EmbeddingCache(tmp_path / "parts", encoder).embed(observations, VIEWS)
    assert np.array_equal(whole.values, parts.values)
    assert len(list((tmp_path / "parts").rglob("plain/*.safetensors"))) == 1


def test_other_views_weights_or_preprocessing_are_other_embeddings(encoder, observations, passes, tmp_path):
    import copy
    import dataclasses

    EmbeddingCache(tmp_path / "cache", encoder).embed(observations, VIEWS)
    EmbeddingCache(tmp_path / "cache", encoder).embed(observations, ("plain", "rotate90"))
    assert sum(passes) == 14
    squashed = copy.copy(encoder)
    squashed.preprocessing = dataclasses.replace(encoder.preprocessing, resize_mode="squash")
    EmbeddingCache(tmp_path / "cache", squashed).embed(observations, VIEWS)
    assert sum(passes) == 21
    tuned = copy.copy(encoder)
    tuned.module = copy.deepcopy(encoder.module)
    next(tuned.module.parameters()).add_(0.01)
    EmbeddingCache(tmp_path / "cache", tuned).embed(observations, VIEWS)
    assert sum(passes) == 28


@pytest.mark.parametrize("what", ["torch.__version__", "timm.__version__", "PIL.__version__"])
def test_another_version_of_what_computes_is_another_cache(encoder, observations, passes, monkeypatch, tmp_path, what):
    EmbeddingCache(tmp_path / "cache", encoder).embed(observations, VIEWS)
    EmbeddingCache(tmp_path / "cache", encoder).embed(observations, VIEWS)
    assert sum(passes) == 7
    monkeypatch.setattr(what, "0.0.1")
    EmbeddingCache(tmp_path / "cache", encoder).embed(observations, VIEWS)
    assert sum(passes) == 14


def test_another_version_of_the_pixels_is_another_cache_and_other_source_text_is_not(encoder, monkeypatch):
    digest = module.encoder_digest(encoder)
    monkeypatch.setattr("inspect.getsource", lambda _: "with a comment")
    assert module.encoder_digest(encoder) == digest
    monkeypatch.setattr(module, "PIXELS_VERSION", module.PIXELS_VERSION + 1)
    assert module.encoder_digest(encoder) != digest


def test_an_unreadable_photo_costs_only_itself(encoder, observations, tmp_path):
    observations[0].photos[1].write_bytes(b"no photo")
    missing = Observation("c", (tmp_path / "missing.jpg",))
    photos = EmbeddingCache(tmp_path / "cache", encoder).embed([*observations, missing], VIEWS)
    assert photos.observations.tolist() == [0, 0, 1, 1, 1, 1]
    assert Counter(cause for _, cause in photos.unreadable) == {"UnidentifiedImageError": 1, "FileNotFoundError": 1}


def test_every_unreadable_photo_is_named_with_its_own_cause(encoder, observations, tmp_path):
    first, second, third = observations[0].photos
    first.write_bytes(b"no photo")
    second.unlink()
    third.write_bytes(b"nor is this")
    photos = EmbeddingCache(tmp_path / "cache", encoder).embed(observations, VIEWS)
    assert photos.unreadable == [
        (first, "UnidentifiedImageError"),
        (second, "FileNotFoundError"),
        (third, "UnidentifiedImageError"),
    ]
    assert Counter(cause for _, cause in photos.unreadable) == {"UnidentifiedImageError": 2, "FileNotFoundError": 1}


@pytest.mark.parametrize(
    "damage",
    [
        lambda part: part.write_bytes(part.read_bytes()[:100]),
        lambda part: save_file({"other": np.zeros(3)}, part),
        lambda part: save_file(load_file(part) | {"values": load_file(part)["values"][:4]}, part),
        lambda part: save_file(load_file(part) | {"values": load_file(part)["values"][:, :32].copy()}, part),
        lambda part: save_file(load_file(part) | {"values": load_file(part)["values"].astype(np.float32)}, part),
        lambda part: part.write_bytes(b""),
        lambda part: part.write_bytes(b"\xff" * 1000),
    ],
    ids=["cut off", "other tensors", "too few rows", "too few features", "other precision", "empty", "no header"],
)
def test_a_damaged_part_is_embedded_again(encoder, observations, passes, tmp_path, damage):
    first = EmbeddingCache(tmp_path / "cache", encoder).embed(observations, VIEWS)
    damage(next((tmp_path / "cache").rglob("plain/*.safetensors")))
    again = EmbeddingCache(tmp_path / "cache", encoder).embed(observations, VIEWS)
    assert np.array_equal(first.values, again.values)
    assert sum(passes) == 14


def embed_in_parts_of_five(photos, folder):
    """What each of several processes does."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=0).eval().requires_grad_(False)
    preprocessing = Preprocessing(64, (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0, "crop")
    encoder = Encoder(network, preprocessing, network.num_features, [torch.device("cpu")])
    module.PART = 5
    EmbeddingCache(folder, encoder).embed([Observation(path.name, (path,)) for path in sorted(photos.iterdir())], VIEWS)


def test_a_killed_process_loses_only_its_part_and_two_at_once_agree(encoder, passes, tmp_path):
    paths = [photo(tmp_path / "photos" / f"{number:03}.jpg", number) for number in range(200)]
    work = {"target": embed_in_parts_of_five, "args": (tmp_path / "photos", tmp_path / "cache")}
    killed, *both = [FORKS.Process(**work) for _ in range(3)]
    killed.start()
    while not list((tmp_path / "cache").rglob("plain/*.safetensors")) and killed.is_alive():
        time.sleep(0.01)
    killed.kill()
    killed.join()
    written = [len(load_file(part)["keys"]) for part in (tmp_path / "cache").rglob("hflip/*.safetensors")]
    assert sum(written) < 200
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    photos = EmbeddingCache(tmp_path / "cache", encoder).embed([Observation("all", tuple(paths))], VIEWS)
    assert sum(passes) == 0
    fresh = EmbeddingCache(tmp_path / "fresh", encoder).embed([Observation("all", tuple(paths))], VIEWS)
    assert np.allclose(photos.values, fresh.values, atol=2e-3)
    assert module.PART > 5
    assert os.listdir(tmp_path / "cache")


def embed_under_torchrun(photos, folder, environment, parts):
    """What each process under torchrun does. It writes how many photos it embeds, and is killed after some parts."""
    os.environ |= environment
    submit, write = Encoder.submit, PartWriter.write

    def submit_counted(self, pixels, views):
        with (folder / f"passes-{environment['TORCHELASTIC_RESTART_COUNT']}").open("a") as file:
            file.write(f"{len(pixels)}\n")
        return submit(self, pixels, views)

    def write_and_die(self):
        nonlocal parts
        write(self)
        parts -= 1
        if not parts:
            os.kill(os.getpid(), signal.SIGKILL)

    Encoder.submit, PartWriter.write = submit_counted, write_and_die
    with process_group():
        embed_in_parts_of_five(photos, folder)


def start_as_torchrun(photos, folder, restart, parts):
    """Two processes of one group, of which the second is killed after so many parts; their exit codes."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    group = {"TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    group |= {"TORCHELASTIC_RESTART_COUNT": str(restart), "LOCAL_WORLD_SIZE": "2"}
    processes = [
        FORKS.Process(
            target=embed_under_torchrun,
            args=(photos, folder, group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, parts if rank else -1),
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes would need two GPUs")
def test_of_two_processes_under_torchrun_the_part_of_the_killed_one_alone_is_embedded_again(tmp_path):
    photos, cache = tmp_path / "photos", tmp_path / "cache"
    cache.mkdir()
    for number in range(200):
        photo(photos / f"{number:03}.jpg", number)
    codes = start_as_torchrun(photos, cache, 0, 2)
    assert codes[0] != 0
    assert codes[1] == -signal.SIGKILL
    written = sum(len(load_file(part)["keys"]) for part in cache.rglob("hflip/*.safetensors"))
    assert 100 < written < 200
    assert start_as_torchrun(photos, cache, 1, -1) == [0, 0]
    passes = [sum(map(int, (cache / f"passes-{restart}").read_text().split())) for restart in range(2)]
    assert passes[1] == 200 - written


def test_embeddings_of_another_pooling_are_others():
    preprocessing = Preprocessing(160, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear", 1.0, "crop")
    arguments = [({}, "auto"), ({"global_pool": "avg", "fc_norm": False}, "auto"), ({}, "token"), ({}, "avg")]
    modules = [build_module("timm", "test_vit", changes, pool) for changes, pool in arguments]
    for other in modules[1:]:
        other.load_state_dict(modules[0].state_dict())
    encoders = [Encoder(module, preprocessing, 64, [torch.device("cpu")]) for module in modules]
    assert len({encoder_digest(encoder) for encoder in encoders}) == len(encoders)
