"""Measure time and memory of all that comes after the encoder, as the photos become more and the classes stay.

Drawn embeddings are put into the cache instead of an encoder's. From there on it is the real path: the cache is
read, folds are made, a bank is chosen, fitted and saved, and the kernel reads it, ranks the classes of a test set with
an eighth as many photos, and writes and checks the submission. Called by local/benchmark.py.
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from kernel.bank import read_banks
from kernel.competitions import competition_named
from kernel.competitions.competition import Competition
from kernel.forward import Encoder
from kernel.manifest import Preprocessing
from kernel.observations import Observation, TestTable
from kernel.ranking import rank
from kernel.submission import write_submission
from local.banks.estimators import l2_normalize, save_banks
from local.banks.selection import BankSelection, plan_bank
from local.base.console import counted, progress, say
from local.base.run_folder import REFERENCE_FILE
from local.data.cache import DIGESTS, EmbeddingCache, as_keys, file_keys
from local.data.concatenated_encoders import ConcatenatedEncoders
from local.data.observations import LabelledObservations, split_for_validation
from local.data.shards import KEY_BYTES, ShardFolder
from local.recipes.settings import BankSettings
from local.training.export import write_reference

FEATURES = 768  # of a ViT-B
TEST = 8  # times fewer observations to predict, as in Herbarium
WRITTEN = 32_768  # photos whose embeddings are drawn at once
NOISE = 0.9  # of a photo around the centre of its class, of length 1: about half of the queries are right
BANK_FILE = "bank.safetensors"
SAMPLED = 0.05  # seconds between two readings of the memory
REPEATS, SHORT = 10, 5.0  # runs of a step, fewer if they take this many seconds in all
SETTINGS = BankSettings(views=("plain",), resize_mode="crop", genus_weight=0.25, class_prior_exponent=0.25)
CHOOSE = ("whitening",)  # the slowest to choose; so every size evaluates the same five candidates


Result = TypeVar("Result")


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


class Measurement:
    """The steps for one number of photos, a row for each.

    Attributes:
        rows: what was measured.
    """

    def __init__(self, photos: int, classes: int) -> None:
        self.photos, self.classes, self.rows = photos, classes, []

    def run(self, step: str, work: Callable[[], Result], repeats: int = REPEATS) -> Result:
        """Run a step, print its time and memory, and return its result.

        Short steps are repeated, and the fastest run counts: all that disturbs a machine makes it slower.
        """
        memory, times, result = Memory(), [], None
        memory.start()
        while not times or (len(times) < repeats and sum(seconds for seconds, _ in times) < SHORT):
            result = None  # the memory of the run before
            start, cpu_start = time.perf_counter(), time.process_time()
            result = work()
            times.append((time.perf_counter() - start, time.process_time() - cpu_start))
        memory.ended.set()
        memory.join()
        seconds, cpu_seconds = (min(each) for each in zip(*times, strict=True))
        row = {"photos": self.photos, "classes": self.classes, "step": step, "seconds": seconds}
        self.rows.append(row | {"cpu_seconds": cpu_seconds, "peak_gb": memory.peak})
        say(f"| {self.photos:,} | {step} | {seconds:.2f} | {cpu_seconds:.2f} | {memory.peak:.2f} |")
        return result


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
        self.labels, self.classes, self.features = labels, classes, features

    def parts(self) -> Iterator[tuple[slice, np.ndarray]]:
        """A slice of the photos and their (photos, features), of length 1."""
        centres_of_classes = np.random.default_rng(0).standard_normal((self.classes, self.features), dtype=np.float32)
        for number, first in enumerate(range(0, len(self.labels), WRITTEN)):
            part = slice(first, first + WRITTEN)
            centres = centres_of_classes[self.labels[part]]
            noise = np.random.default_rng((1, number)).standard_normal(centres.shape, dtype=np.float32)
            # A shared direction, as in all embeddings of encoders, and centres that the noise nearly hides.
            yield part, l2_normalize(0.3 + 0.25 * centres + NOISE * noise)

    def whole(self) -> torch.Tensor:
        """(photos, features) float32."""
        return torch.cat([torch.from_numpy(values.astype(np.float32)) for _, values in self.parts()])


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
    measurement, rng = Measurement(photos, classes), np.random.default_rng(0)
    competition, labels = competition_named("herbarium-2021"), draw_labels(photos, classes, rng)
    labelled = LabelledObservations(
        folder=folder,
        competition=competition,
        resolution="300p",
        observations=[Observation(str(number), (Path(f"/nowhere/{number}.jpg"),)) for number in range(photos)],
        class_ids=np.array([str(label) for label in labels], dtype=object),
        is_val=np.zeros(photos, dtype=bool),
        taxa={str(label): ("", "", "", str(label // 50), str(label // 5)) for label in range(classes)},
        species={},
        poisonous={},
    )
    measure_training(measurement, labelled, DrawnEmbeddings(labels, classes, features))
    del labelled  # the kernel has no such thing
    test = draw_labels(max(classes, photos) // TEST, classes, rng)[: photos // TEST]
    measure_prediction(measurement, folder, competition, DrawnEmbeddings(test, classes, features))
    return measurement.rows


def measure_training(measurement: Measurement, labelled: LabelledObservations, drawn: DrawnEmbeddings) -> None:
    """From the cache to the bank, which is saved in the folder of the observations."""
    folder, encoder = labelled.folder, draw_encoder(drawn.features)
    paths = [photo for observation in labelled.observations for photo in observation.photos]
    measurement.run("write the cache", lambda: fill_cache(EmbeddingCache(folder, encoder), paths, drawn), repeats=1)
    split = split_for_validation(labelled, 0)
    plan = measurement.run("make the folds", lambda: plan_bank(split, "train+val", is_tuned=False, is_macro=True))

    def read() -> BankSelection:
        selection = BankSelection(SETTINGS, CHOOSE, plan, ConcatenatedEncoders((encoder,)), folder)
        selection.embed_all()
        return selection

    selection = measurement.run("read the cache", read)
    if plan.folds:
        chosen = measurement.run("choose and evaluate the settings", selection.evaluate, repeats=1)
    else:  # with one photo of each class nothing can be held out, and nothing chosen
        chosen = selection.evaluate()
    # Once, because the selection keeps what it has fitted.
    bank = measurement.run("fit the bank", lambda: selection.fit(chosen), repeats=1)

    def save() -> None:
        save_banks(bank.banks[-1], folder / BANK_FILE)
        write_reference(plan, selection.embed_reference(bank.settings), folder / REFERENCE_FILE)

    measurement.run("save the bank", save)


def measure_prediction(
    measurement: Measurement, folder: Path, competition: Competition, drawn: DrawnEmbeddings
) -> None:
    """From the embeddings of the test set to the submission."""
    embeddings = measurement.run("read and pool the test set", drawn.whole)
    ranked = measurement.run(
        "rank the classes", lambda: rank([read_banks(folder / BANK_FILE)], [1.0], [embeddings], competition.guesses)[0]
    )
    class_ids = sorted(map(str, range(measurement.classes)), key=int)
    table = TestTable(folder, competition, [Observation(str(number), ()) for number in range(len(embeddings))])

    def write() -> None:
        answers = ({class_ids[index]: 1.0 for index in indices} for indices in ranked.tolist())
        write_submission(folder / "submission.csv", table, answers, class_ids)

    measurement.run("write the submission", write)


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
