"""Predict photos of your own with a run, several runs or a bundle.

python local/predict.py runs/best photo.jpg more/
python local/predict.py runs/best runs/second photos/ --csv predictions.csv --html predictions.html
python local/predict.py build photos/ --together
python local/predict.py build --data data/fungi-clef-2025 --csv test.csv --top 20

Prints a line for each photo: its best classes with their probabilities, and the photo of the bank that speaks for the
first. The photos of a sub-folder are one observation and have one line; with --together, all photos are. Photos that
cannot be read are named. The classes and their order are those of the kernel, without metadata. Several runs are
weighted as bundle.py weights them. A long list is predicted in parts: the CSV has the rows of all parts that are done.

A run of quadrats (PlantCLEF) gives the species of each photo that are as probable as in an answer, --top at most. Its
photos are never grouped.

With --data, the test set of a competition is predicted instead, with its ids and metadata, as the kernel predicts it: a
table of classes and probabilities to mix with other models. oof.csv in a run is the same for its held-out observations.
"""

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from kernel.competitions import competition_of
from kernel.competitions.class_folders import find_photos
from kernel.inputs import InputError
from kernel.manifest import MANIFEST, Weights, read_weights
from kernel.observations import Observation, find_test_table
from kernel.tables import RESOLUTIONS, describe_left_out
from local.base.console import Progress, command_parser, counted, run, say
from local.base.files import refuse_unwritable_file, write_text

if TYPE_CHECKING:
    from local.prediction.model import Prediction


def split_paths(paths: Sequence[Path], takes_photos: bool = True) -> tuple[list[Weights], list[Path]]:
    """The weights of the runs, or of the bundle, among some paths, and the photos and folders.

    Args:
        takes_photos: whether there must be photos, or else must not be.

    Raises:
        InputError: a path does not exist, runs or photos are missing, or a bundle is not alone.
    """
    weights, photos = [], []
    for path in paths:
        folder = path / "weights" if (path / "weights" / MANIFEST).is_file() else path
        if (folder / MANIFEST).is_file():
            weights.append(read_weights(folder))
        elif path.exists():
            photos.append(path)
        else:
            raise InputError(f"{path} does not exist: give runs or a bundle, then photos or folders of photos")
    if not weights:
        raise InputError(f"none of {', '.join(map(str, paths))} is a run or a bundle: give one, such as runs/best")
    if photos and not takes_photos:
        raise InputError(f"{photos[0]} is not a run or a bundle: give photos, or the test set of --data, not both")
    if takes_photos and not photos:
        raise InputError("no photo is given: give photos or folders of photos after the runs")
    if len(weights) > 1 and any(len(own.manifest.members) > 1 or own.folder.name == "weights" for own in weights):
        raise InputError("a bundle cannot be combined with other runs: give one bundle, or runs only")
    return weights, photos


def group_photos(paths: Sequence[Path], together: bool, are_grouped: bool = True) -> list[Observation]:
    """Observations of photos: each photo alone, or all of a sub-folder if they `are_grouped`, or all `together`.

    Raises:
        InputError: there is no photo.
    """
    groups, left_out = {}, Counter()
    for path in paths:
        for photo in find_photos(path, left_out) if path.is_dir() else [path]:
            name = photo.parent if are_grouped and photo.parent != path and photo != path else photo
            groups.setdefault(paths[0] if together else name, {})[photo] = None
    if left_out:
        say(f"{', '.join(map(str, paths))}{describe_left_out(left_out)}")
    if not groups:
        raise InputError(f"no photo in {', '.join(map(str, paths))}: give photos or folders of photos")
    return [Observation(str(name), tuple(photos)) for name, photos in groups.items()]


def read_test_set(data: Path, weights: Sequence[Weights]) -> list[Observation]:
    """The test observations of a competition, with photos of the resolution that a bundle of the runs would read.

    Raises:
        InputError: it is not the competition of the runs, or has no test set.
    """
    trained = [own.manifest.competition for own in weights]
    resolution = max((one.resolution for one in trained), key=RESOLUTIONS.index)
    return list(find_test_table(data, trained[0].name, resolution, trained[0].settings).observations)


def describe(prediction: "Prediction") -> str:
    """A line: the observation, its classes with their probabilities, the reference photo, and unreadable photos."""
    observation, guesses = prediction.observation, prediction.guesses
    many = f" ({len(observation.photos)} photos)" if len(observation.photos) > 1 else ""
    text = ", ".join(f"{one.name} {one.probability:.1%}" for one in guesses) or "no photo can be read"
    like = f"; like {prediction.reference}" if prediction.reference else ""
    failed = "".join(f"; unreadable: {path.name} ({cause})" for path, cause in prediction.unreadable)
    return f"{observation.id}{many}: {text}{like}{failed}"


def csv_row(prediction: "Prediction", top: int) -> list[str]:
    """The cells of a prediction, by `csv_header`."""
    cells = [cell for one in prediction.guesses for cell in (one.class_id, one.name, f"{one.probability:.6f}")]
    cells += [""] * (3 * top - len(cells))
    failed = "; ".join(f"{path} ({cause})" for path, cause in prediction.unreadable)
    photos = len(prediction.observation.photos)
    return [prediction.observation.id, str(photos), *cells, str(prediction.reference or ""), failed]


def csv_header(top: int) -> list[str]:
    guesses = [f"{name}_{rank}" for rank in range(1, top + 1) for name in ("class", "name", "probability")]
    return ["observation", "photos", *guesses, "reference", "unreadable"]


def predict(
    paths: Sequence[Path], top: int, table: Path | None, page: Path | None, together: bool, data: Path | None = None
) -> None:
    """Predict photos, or the test set of the competition `data`; see the module.

    Raises:
        InputError: a path is wrong, or a file cannot be written.
    """
    weights, photos = split_paths(paths, takes_photos=not data)
    for path in filter(None, (table, page)):
        refuse_unwritable_file(path)
    top = min(top, len(weights[0].manifest.class_ids))
    is_set = competition_of(weights[0].manifest.competition).form.is_set
    if together and is_set:
        raise InputError("--together is not for a run of quadrats, each of which is one photo: leave it out")
    observations = read_test_set(data, weights) if data else group_photos(photos, together, not is_set)
    shown: list[Prediction] = []
    with Progress("loading the encoders"):
        from local.prediction.model import Model  # imports torch

        model = Model(weights)
    if table:
        table.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        text = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}  # names of photos may be no UTF-8
        file = stack.enter_context(table.open("w", **text)) if table else None
        if file:
            csv.writer(file, lineterminator="\n").writerow(csv_header(top))
        bar = stack.enter_context(Progress("predicting", len(observations), "observation"))
        for part in model.predict(observations, top):
            bar.advance(min(model.chunk, len(observations) - bar.done))
            if file:
                csv.writer(file, lineterminator="\n").writerows(csv_row(one, top) for one in part)
                file.flush()
            for one in part:
                if not file or one.unreadable:
                    say(describe(one))
            shown += part if page else []
    if page:
        from local.prediction.page import render

        write_text(render(shown), page)
    for path in filter(None, (table, page)):
        say(f"{path}: {counted(len(observations), 'observation')}")


def parse_options() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN|PHOTO|DIR", help="runs or a bundle, then photos")
    parser.add_argument("--data", type=Path, metavar="DIR", help="predict the test set of this competition")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a row per observation, and print no lines")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page of the photos with their guesses")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes of each (default: %(default)s)")
    parser.add_argument("--together", action="store_true", help="all photos are of one observation")
    options = parser.parse_args()
    if options.top < 1:
        parser.error(f"expected --top of 1 or more, got {options.top}")
    if options.data and options.together:
        parser.error("--together is for photos of your own, not for the test set of --data")
    return options


def main() -> None:
    options = parse_options()
    predict(options.paths, options.top, options.csv, options.html, options.together, options.data)


if __name__ == "__main__":
    run(main)
