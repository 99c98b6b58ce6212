"""A page of photos with their guesses that works offline."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from local.base.console import progress
from local.prediction.model import Prediction
from local.report.page import LARGE, SMALL, Album, percent


def render(predictions: Sequence[Prediction]) -> str:
    """The HTML of the page, in the style of a report."""
    album = Album(Path())

    def add_first(photos: Sequence[Path]) -> int | None:
        return album.add(str(photos[0]), LARGE) if photos else None

    rows = [
        (one, add_first(one.observation.photos), one.reference and album.add(str(one.reference), SMALL))
        for one in progress(predictions, "photos of the page", unit="observation")
    ]
    style = (Path(__file__).parents[1] / "report" / "report.css").read_text(encoding="utf-8")
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters["percent"] = percent
    return environment.get_template("predictions.html").render(rows=rows, photos=album.photos, style=style)
