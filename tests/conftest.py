"""What several tests share: generated photos, a tiny encoder, a small competition, and a run trained on it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

# Before torch is imported. The tests run side by side, each on one core; threads that wait in a spin, and threads of
# which only some get a core, would hold up each other and the processes that tests start.
os.environ |= {"GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": "1"} | os.environ

from kernel.inputs import prepare_torch

prepare_torch()  # as the commands that tests compare with

import numpy as np
import pytest
import timm
import torch
from filelock import FileLock
from PIL import Image

# The tests run on the CPU, also beside GPUs: they compare numbers in full precision. Those marked `gpu` run in a
# process that sees the GPUs (tests/test_gpus.py). Processes of pytest-xdist, and those that tests start, inherit this.
if "GPUS_OF_TESTS" not in os.environ:
    os.environ["GPUS_OF_TESTS"] = os.environ.get("CUDA_VISIBLE_DEVICES", "all") if torch.cuda.device_count() else ""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

from kernel.forward import Encoder
from kernel.manifest import MANIFEST, Preprocessing
from local.drawing.competition import Generated, generate
from local.recipes.recipe import make_recipe
from local.training.run import train_run
from tests.processes import ROOT, command  # noqa: F401


def kernel_metadata(
    path: Path,
    owner: str = "your-kaggle-username",
    slug: str = "few-shot-species",
    title: str = "Few-shot species",
    competition: str = "fungi-clef-2025",
    **changes: object,
) -> Path:
    """Write a kernel-metadata.json that passes; what the repository's own says, its user may change."""
    metadata = {
        "id": f"{owner}/{slug}",
        "title": title,
        "code_file": "build/kernel.py",
        "language": "python",
        "kernel_type": "script",
        "is_private": True,
        "enable_gpu": True,
        "enable_tpu": False,
        "enable_internet": False,
        "machine_shape": "NvidiaTeslaT4",
        "dataset_sources": [f"{owner}/{slug}-weights"],
        "competition_sources": [competition],
        "kernel_sources": [],
        "model_sources": [],
        **changes,
    }
    path.write_text(json.dumps(metadata), encoding="utf-8")
    return path


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (80, 60), **options) -> Path:
    """Write a photo of smooth random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, **options)
    return path


def make_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first of the processes that run the tests makes, and all of them read."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with FileLock(root / f"{name}.lock"):
        if not (root / name).exists():
            make(root / f"{name}.partial")
            os.replace(root / f"{name}.partial", root / name)
    return root / name


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """A tiny encoder with random weights; 64 pixels, on the CPU."""
    torch.manual_seed(0)
    module = timm.create_model("test_resnet", num_classes=0).eval().requires_grad_(False)
    preprocessing = Preprocessing(64, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear", 1.0, "crop")
    return Encoder(module, preprocessing, module.num_features, [torch.device("cpu")])


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Generated:
    """A competition of twelve drawn species."""
    folder = make_once(tmp_path_factory, "drawn", lambda folder: generate(folder, species=12, seed=1))
    return Generated(folder / "competition", folder / "solution.csv")


TINY = {"encoder": "timm:test_resnet", "pretrained": False, "image_size": 64, "reference": "train", "epochs": 1}
# Several steps in an epoch, since the learning rate of the last one is 0.
LEARNING = {"unfreeze": -1, "prototypes": "learned", "learning_rate": 1e-3, "batch_size": 8}


@pytest.fixture(scope="session")
def trained(drawn, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the drawn competition."""
    recipe = make_recipe({**TINY, **LEARNING}, "the tests")
    runs = make_once(tmp_path_factory, "runs", lambda folder: train_run(recipe, drawn.competition, folder / "tiny"))
    return runs / "tiny"


def trained_with(trained: Path, run: Path, timm: str) -> Path:
    """A copy of a run that says that it was trained with another timm."""
    shutil.copytree(trained, run)
    manifest = json.loads((run / MANIFEST).read_text(encoding="utf-8"))
    manifest["members"][0]["versions"]["timm"] = manifest["members"][0]["encoders"][0]["packages"]["timm"] = timm
    (run / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return run
