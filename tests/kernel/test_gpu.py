"""A GPU gives what the CPU gives: with batches in flight, little memory, several GPUs, and in training."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernel.__main__ import embed_test_set, write_predictions
from kernel.budget import UNLIMITED, Budget
from kernel.embeddings import Batch, Limits, embed_batches, embed_observations
from kernel.encoders import build_module, make_encoder, open_encoder, pick_devices
from kernel.forward import Encoder
from kernel.loader import PhotoLoader, pin_array
from kernel.manifest import read_weights
from kernel.observations import Observation, find_test_table
from kernel.photos import decode
from kernel.start import Setup
from kernel.views import VIEWS
from tests.conftest import photo
from tests.kernel.test_encoders import SPEC, saved
from tests.kernel.test_forward import Large

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
AT_224 = replace(SPEC, preprocessing=replace(SPEC.preprocessing, size=224))
GIBIBYTE = 1 << 30


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("weights"), build_module("timm", "test_resnet", {}))


@pytest.fixture
def one_gibibyte() -> Iterator[None]:
    """A GPU whose memory is this small."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(GIBIBYTE / torch.cuda.get_device_properties(GPU).total_memory, GPU)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, GPU)


def random_photos(*shape: int, side: int) -> torch.Tensor:
    """(*shape, 3, side, side) uint8 of 4 x 4 colours, with the memory layout of decoded photos."""
    colours = torch.randint(0, 256, (*shape, 4, 4, 3), dtype=torch.uint8)
    return colours.repeat_interleave(side // 4, -2).repeat_interleave(side // 4, -3).movedim(-1, -3)


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The directions of embeddings in half and in full precision differ by little."""
    assert found.shape == expected.shape
    assert (torch.cosine_similarity(found, expected, dim=-1) > 0.995).all()


def test_batches_queued_on_all_gpus_give_the_embeddings_of_the_cpu(weights):
    on_cpu, on_gpus = open_encoder(weights, SPEC, [CPU]), open_encoder(weights, SPEC, pick_devices())
    photos = random_photos(4, 33, side=64)
    submitted = [on_gpus.submit(batch.pin_memory(), VIEWS.values()) for batch in photos]
    for batch, each in zip(submitted, photos, strict=True):
        found = batch.result()
        assert (found.device.type, found.dtype, batch.seconds > 0) == ("cpu", torch.float32, True)
        assert_alike(found, on_cpu.embed(each, VIEWS.values()))


def test_batches_in_flight_give_what_each_gives_alone(weights):
    """Memory that is reused too early, pinned or on the GPU, would mix batches."""
    encoder, names = open_encoder(weights, AT_224, [GPU]), list(VIEWS)
    photos = random_photos(8, 64, side=224)
    alone = [encoder.embed(batch, VIEWS.values()) for batch in photos]
    # Nothing but `embed_batches` holds a batch.
    batches = (Batch(list(range(64)), batch.pin_memory(), names) for batch in photos)
    for (_, found), expected in zip(embed_batches(encoder, batches), alone, strict=True):
        assert torch.allclose(found, expected, atol=1e-3)
        assert not torch.isclose(found, expected.roll(1, dims=0), atol=1e-2).all(dim=-1).any()


def test_two_replicas_share_each_batch(weights):
    one = open_encoder(weights, SPEC, [GPU])
    two = make_encoder(open_encoder(weights, SPEC, [CPU]).module, SPEC, [GPU, GPU])
    assert two.batch_size == 2 * one.batch_size
    for count in (1, 2, 33):
        photos = random_photos(count, side=64)
        assert_alike(two.embed(photos, VIEWS.values()), one.embed(photos, VIEWS.values()))


class Hungry(torch.nn.Module):
    """Needs a 20th of a gibibyte for a photo."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        torch.empty(len(photos), GIBIBYTE // 20, dtype=torch.uint8, device=photos.device)
        return self.inner(photos)


@pytest.mark.parametrize("replicas", [1, 2])
def test_when_the_memory_of_a_gpu_runs_out_the_batch_is_halved(weights, one_gibibyte, capsys, replicas):
    plain = open_encoder(weights, SPEC, [GPU])
    hungry = Encoder(Hungry(plain.module), SPEC.preprocessing, SPEC.features, [GPU] * replicas)
    photos, views = random_photos(2, 32 * replicas, side=64), [VIEWS["plain"], VIEWS["hflip"]]
    submitted = [hungry.submit(batch, views) for batch in photos]
    for batch, each in zip(submitted, photos, strict=True):
        assert_alike(batch.result(), plain.embed(each, views))
    assert hungry.batch_size in (16, 16 * replicas)  # two replicas on one GPU may need their memory at once
    assert "out of memory: continuing with batches of" in capsys.readouterr().out


def test_an_encoder_for_which_a_gpu_has_no_memory_runs_on_the_cpu(weights, one_gibibyte, capsys):
    spec = replace(SPEC, preprocessing=replace(SPEC.preprocessing, size=1024))
    torch.cuda.set_per_process_memory_fraction(0.0, GPU)
    encoder = open_encoder(weights, spec, [GPU])
    assert encoder.devices == [CPU]
    assert encoder.embed(random_photos(1, side=1024), [VIEWS["plain"]]).isfinite().all()
    assert capsys.readouterr().out.splitlines()[-1] == "continuing on the CPU"


def test_an_overflow_in_half_precision_is_computed_again_in_full_precision(encoder, capsys):
    half = Encoder(Large().half().requires_grad_(False).to(GPU), encoder.preprocessing, 3, [GPU])
    full = Encoder(Large().requires_grad_(False), encoder.preprocessing, 3, [CPU])
    bright, black = random_photos(3, side=64), torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    batches = (black, bright, black, bright)
    submitted = [half.submit(photos, [VIEWS["plain"]]) for photos in batches]
    for batch, photos in zip(submitted, batches, strict=True):
        assert torch.allclose(batch.result(), full.embed(photos, [VIEWS["plain"]]), atol=1e-2)
    assert capsys.readouterr().out.count("overflows") == 1


@pytest.mark.parametrize("limit", [float("inf"), 1000.0])
def test_observations_are_embedded_as_on_the_cpu(weights, tmp_path, limit):
    paths = [photo(tmp_path / f"{seed}.jpg", seed) for seed in range(60)]  # enough for worker processes
    observations = [Observation(str(index), tuple(paths[2 * index : 2 * index + 2])) for index in range(30)]
    on_cpu, on_gpus = open_encoder(weights, SPEC, [CPU]), open_encoder(weights, SPEC, pick_devices())
    on_gpus.batch_size = 8  # many batches
    limits = Limits(UNLIMITED if limit == float("inf") else Budget(limit, 0.0, lambda: 0.0))
    found = embed_observations(on_gpus, observations, ["plain", "hflip"], limits=limits)
    assert (found.late, found.views, found.unreadable) == (0, {2: 60}, [])
    assert_alike(found.values, embed_observations(on_cpu, observations, ["plain", "hflip"]).values)


@pytest.mark.parametrize("unreadable", [[], ["missing.jpg"]])
def test_a_gpu_gets_its_photos_in_pinned_memory(weights, tmp_path, unreadable):
    encoder = open_encoder(weights, SPEC, [GPU])
    paths = [photo(tmp_path / f"{seed}.jpg", seed) for seed in range(70)] + [tmp_path / name for name in unreadable]
    with PhotoLoader.for_encoder(paths, encoder) as loader:
        assert all(pixels.is_pinned() for _, pixels in loader.batches(encoder))


def test_an_embedding_does_not_depend_on_the_other_photos_of_its_batch(weights):
    encoder = open_encoder(weights, SPEC, [GPU])
    photos = random_photos(20, side=64)
    whole = encoder.embed(photos, [VIEWS["plain"]])
    assert torch.equal(encoder.embed(photos[:3], [VIEWS["plain"]]), whole[:3])
    assert torch.equal(encoder.embed(photos[19:], [VIEWS["plain"]]), whole[19:])


def test_a_worker_that_replaces_a_killed_one_decodes_into_pinned_memory(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("kernel.loader.decode", decode_or_be_killed)
    paths = [photo(tmp_path / f"{seed}.jpg", seed) for seed in range(200)]
    deadly = photo(tmp_path / "deadly.jpg", 0)
    observations = [Observation(str(index), (path,)) for index, path in enumerate([*paths[:100], deadly, *paths[100:]])]
    on_gpu, on_cpu = open_encoder(weights, SPEC, [GPU]), open_encoder(weights, SPEC, [CPU])
    on_gpu.batch_size = 8  # many batches
    found = embed_observations(on_gpu, observations, ["plain"])
    assert (found.late, found.unreadable) == (0, [(deadly, "SIGKILL")])
    assert_alike(found.values[101:], embed_observations(on_cpu, observations[101:], ["plain"]).values)


def decode_or_be_killed(path, preprocessing):
    if path.name == "deadly.jpg":
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(path, preprocessing)


def test_memory_that_cannot_be_pinned_costs_no_photo(weights, tmp_path, monkeypatch):
    encoder = open_encoder(weights, SPEC, [GPU])
    paths = [photo(tmp_path / f"{seed}.jpg", seed) for seed in range(70)]
    observations = [Observation(str(index), (path,)) for index, path in enumerate(paths)]
    expected = embed_observations(encoder, observations, ["plain"]).values

    def fail_to_pin(array):
        assert pin_array(array)
        assert not pin_array(array)  # a second time is an error of CUDA, as too little memory is
        torch.cuda.cudart().cudaHostUnregister(array.ctypes.data)
        return 0

    monkeypatch.setattr("kernel.loader.pin_array", fail_to_pin)
    assert torch.equal(embed_observations(encoder, observations, ["plain"]).values, expected)


def test_a_run_trained_on_a_gpu_predicts_there_as_on_a_cpu(trained, drawn, tmp_path, monkeypatch):
    setup = Setup(read_weights(trained), find_test_table(drawn.competition), UNLIMITED, tmp_path, False)
    guesses, values = [], []
    for devices in (pick_devices(), [CPU]):
        monkeypatch.setattr("kernel.__main__.pick_devices", lambda devices=devices: devices)
        embedded, device = embed_test_set(setup)
        assert device == devices[0]
        assert write_predictions(setup, embedded, device) == 0
        values.append(embedded[0].values)
        guesses.append([line.split(",")[1].split()[0] for line in (tmp_path / "submission.csv").open()])
    assert_alike(*values)
    same = sum(one == other for one, other in zip(*guesses, strict=True))
    assert same >= 0.9 * len(guesses[0])
