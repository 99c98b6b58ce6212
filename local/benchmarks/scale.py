"""Measure time and memory of all that comes after the encoder, as the photos become more and the classes stay.

Drawn embeddings are put into the cache instead of an encoder's. From there on it is the real path: the cache is
read, folds are made, a bank is chosen, fitted and saved, and the kernel reads it, ranks the classes of a test set with
an eighth as many photos, and writes and checks the submission. Called by local/benchmark.py.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kernel.bank import rank, read_banks
from kernel.competitions import competition_named
from kernel.encoders import Encoder
from kernel.manifest import Preprocessing
from kernel.observations import Observation, TestTable
from kernel.submission import write_submission
from local.banks.estimators import l2_normalize, save_banks
from local.banks.selection import BankSelection, plan_bank
from local.base.console import counted, progress, say
from local.base.run_folder import REFERENCE_FILE
from local.data.cache import DIGESTS, EmbeddingCache, as_keys, file_keys
from local.data.observations import LabelledObservations, split_for_validation
from local.data.shards import KEY_BYTES, ShardFolder
from local.data.weighted_encoders import WeightedEncoders
from local.recipes.settings import BankSettings
from local.training.export import write_reference

FEATURES = 768  # of a ViT-B
TEST = 8  # times fewer observations to predict, as in Herbarium
WRITTEN = 32_768  # photos whose embeddings are drawn at once
NOISE = 0.9  # of a photo around the centre of its class, of length 1: about half of the queries are right
SAMPLED = 0.05  # seconds between two readings of the memory
SETTINGS = BankSettings(views=("plain",), resize_mode="crop", genus_weight=0.25, class_prior_exponent=0.25)
CHOOSE = ("whitening",)  # the slowest to choose; so every size evaluates the same five candidates


class Memory(threading.Thread):
    """The largest memory of this process while a step runs, without files that are mapped into it.

    The system can take the pages of such files back at any time. Only Linux tells; elsewhere it is NaN.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.ended = self.now(), threading.Event()

    @staticmethod
    def now() -> float:
        """GB."""
        try:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        except OSError:
            return float("nan")
        sizes = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
        return sum(sizes) * 1024 / 1e9

    def run(self) -> None:
        while not self.ended.wait(SAMPLED):
            self.peak = max(self.peak, self.now())


@contextmanager
def measured(rows: list[dict], photos: int, classes: int, step: str) -> Iterator[None]:
    """Append a row with the time and the memory of a step, and print it."""
    memory, start, cpu_start = Memory(), time.perf_counter(), time.process_time()
    memory.start()
    yield
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    memory.ended.set()
    memory.join()
    row = {"photos": photos, "classes": classes, "step": step, "seconds": seconds, "cpu_seconds": cpu_seconds}
    rows.append(row | {"peak_gb": memory.peak})
    say(f"| {photos:,} | {step} | {seconds:.1f} | {cpu_seconds:.1f} | {memory.peak:.2f} |")


def draw_labels(photos: int, classes: int, rng: np.random.Generator) -> np.ndarray:
    """(photos,) class of each: one photo of every class, and a long tail, as 1 / rank."""
    weights = 1 / np.arange(1, classes + 1)
    more = rng.choice(classes, max(0, photos - classes), p=weights / weights.sum())
    return rng.permutation(np.concatenate([np.arange(classes), more])[:photos])


class DrawnEmbeddings:
    """Embeddings of photos that resemble the centre of their class, drawn a part at a time.

    Args:
        labels: (photos,) class of each.
    """

    def __init__(self, labels: np.ndarray, classes: int, features: int):
        self.labels, self.features = labels, features
        self.centres = np.random.default_rng(0).normal(size=(classes, features)).astype(np.float32)

    def parts(self) -> Iterator[tuple[slice, np.ndarray]]:
        """A slice of the photos and their (photos, features), of length 1."""
        for number, first in enumerate(range(0, len(self.labels), WRITTEN)):
            part = slice(first, first + WRITTEN)
            centres = self.centres[self.labels[part]]
            noise = np.random.default_rng((1, number)).standard_normal(centres.shape, dtype=np.float32)
            # A shared direction, as in all embeddings of encoders, and centres that the noise nearly hides.
            yield part, l2_normalize(0.3 + 0.25 * centres + NOISE * noise)


def draw_encoder(features: int) -> Encoder:
    """An encoder that is never called."""
    preprocessing = Preprocessing(224, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "crop")
    return Encoder(nn.Identity(), preprocessing, features, [torch.device("cpu")])


def fill_cache(cache: EmbeddingCache, paths: Sequence[Path], drawn: DrawnEmbeddings) -> None:
    """Put drawn embeddings where those of the photos would be, as if the photos had been read before."""
    folder, known = cache.view("plain"), ShardFolder(cache.root / DIGESTS, KEY_BYTES, np.uint8)
    for part, values in drawn.parts():
        keys = as_keys(file_keys(paths[part]))  # of their paths alone, because they are missing
        known.add(keys, keys)
        folder.add(keys, values.astype(np.float16))
    known.join()
    folder.join()


def measure_scale(photos: int, classes: int, features: int, folder: Path) -> list[dict]:
    """A row per step.

    Args:
        folder: for the cache and the files of the run, which are removed with it.
    """
    rows: list[dict] = []
    rng = np.random.default_rng(0)
    labels = draw_labels(photos, classes, rng)
    competition, encoder = competition_named("herbarium-2021"), draw_encoder(features)
    paths = [Path(f"/nowhere/{number}.jpg") for number in range(photos)]
    labelled = LabelledObservations(
        folder=folder,
        competition=competition,
        resolution="300p",
        observations=[Observation(str(number), (path,)) for number, path in enumerate(paths)],
        class_ids=np.array([str(label) for label in labels], dtype=object),
        is_val=np.zeros(photos, dtype=bool),
        taxa={str(label): ("", "", "", str(label // 50), str(label // 5)) for label in range(classes)},
        species={},
        poisonous={},
    )
    with measured(rows, photos, classes, "write the cache"):
        fill_cache(EmbeddingCache(folder, encoder), paths, DrawnEmbeddings(labels, classes, features))
    with measured(rows, photos, classes, "make the folds"):
        plan = plan_bank(split_for_validation(labelled, 0), "train+val", is_tuned=False, is_macro=True)
    selection = BankSelection(SETTINGS, CHOOSE, plan, WeightedEncoders((encoder,)), folder)
    with measured(rows, photos, classes, "read the cache"):
        selection.embed_all()
    # With one photo of each class nothing can be held out, and nothing chosen.
    with measured(rows, photos, classes, "choose and evaluate the settings") if plan.folds else nullcontext():
        chosen = selection.evaluate()
    with measured(rows, photos, classes, "fit the bank"):
        bank = selection.fit(chosen)
    with measured(rows, photos, classes, "save the bank"):
        save_banks(bank.banks[-1], folder / "bank.safetensors")
        write_reference(plan, selection.embed_reference(bank.settings), folder / REFERENCE_FILE)
    del selection, plan
    test = draw_labels(max(classes, photos) // TEST, classes, rng)[: photos // TEST]
    with measured(rows, photos, classes, "read and pool the test set"):
        drawn = DrawnEmbeddings(test, classes, features)
        embeddings = torch.cat([torch.from_numpy(values.astype(np.float32)) for _, values in drawn.parts()])
    with measured(rows, photos, classes, "rank the classes"):
        banks = read_banks(folder / "bank.safetensors")
        ranked = rank([banks], [1.0], [embeddings], competition.guesses)
    class_ids = sorted(map(str, range(classes)), key=int)
    table = TestTable(folder, competition, [Observation(str(number), ()) for number in range(len(test))])
    with measured(rows, photos, classes, "write the submission"):
        answers = ({class_ids[index]: 1.0 for index in indices} for indices in ranked.tolist())
        write_submission(folder / "submission.csv", table, answers, class_ids)
    return rows


def scale(photos: Sequence[int], classes: int, features: int = FEATURES) -> dict:
    """Measure each number of photos, print the table, and how the steps grow.

    Returns:
        {"rows": [{"photos", "classes", "step", "seconds", "cpu_seconds", "peak_gb"}]}; cpu_seconds are those of the
        process, all its threads together, without its waiting for other programs and for the disk
    """
    rows: list[dict] = []
    say(f"{counted(classes, 'class')}, embeddings of {features} features")
    say("| photos | step | seconds | seconds of CPU | GB of memory beside mapped files |")
    say("|---|---|---|---|---|")
    for number in progress(photos, "measuring", unit="size"):
        with tempfile.TemporaryDirectory(dir="/var/tmp" if os.access("/var/tmp", os.W_OK) else None) as folder:
            rows += measure_scale(number, classes, features, Path(folder))
    for line in describe_growth(rows):
        say(line)
    return {"rows": rows}


def describe_growth(rows: Sequence[dict]) -> list[str]:
    """For each step and each size after the first, how many times as long it takes, beside how many more photos."""
    lines, seconds = [], {(row["photos"], row["step"]): row["cpu_seconds"] for row in rows}
    sizes, steps = list(dict.fromkeys(row["photos"] for row in rows)), list(dict.fromkeys(row["step"] for row in rows))
    for before, size in pairwise(sizes):
        both = [step for step in steps if {(before, step), (size, step)} <= set(seconds)]
        growth = [f"{step} {seconds[size, step] / max(seconds[before, step], 1e-9):.1f}" for step in both]
        lines.append(f"{size / before:.1f} times the photos ({size:,}), times the seconds of CPU: {', '.join(growth)}")
    return lines
