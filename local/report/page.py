"""Render the figures of a report as one HTML file that works offline. Adds photos and plots, but computes no figure."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import astuple, fields
from operator import attrgetter
from pathlib import Path

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup, escape
from PIL import Image, ImageOps

from kernel.manifest import MANIFEST
from kernel.photos import read_photo
from local.base.console import Progress, progress
from local.base.metrics import headline_names
from local.data.duplicates import MAX_BACKGROUND
from local.report import pictures
from local.report.failures import ClassScores, Mistake
from local.report.figures import Figures
from local.report.scores import SCORE_NAMES, Estimate

SMALL, LARGE = 96, 208  # pixels of the sides of a photo: in a table, on its own
MAX_CHARACTERS = 10_000_000  # of the photos and the table of classes, which a browser opens in a second
ERRORS_FRACTION = 0.7  # of the characters of photos at most, before the photos of the classes are added
CLASS_COLUMNS = [field.name for field in fields(ClassScores) if field.name not in ("label", "photo")]
ERROR_COLUMNS = [field.name for field in fields(Mistake) if field.name not in ("photo", "nearest")]


class Album:
    """The photos of a page, each stored once in each size in which it is shown.

    Args:
        folder: of the competition.
        limit: characters of all photos.
    """

    def __init__(self, folder: Path, limit: int = MAX_CHARACTERS):
        self.folder, self.limit, self.indices, self.photos, self.size = folder, limit, {}, [], 0

    def add(self, photo: str, side: int = LARGE, fraction: float = 1.0) -> int | None:
        """The index of a photo in `photos`; None if it is unreadable, or this fraction of the limit is used already."""
        if (photo, side) not in self.indices:
            if self.size >= fraction * self.limit:
                return None
            encoded = self._encode(self.folder / photo, side)
            self.indices[photo, side] = len(self.photos) if encoded else None
            self.photos += [encoded] if encoded else []
            self.size += len(encoded)
        return self.indices[photo, side]

    @staticmethod
    def _encode(path: Path, side: int) -> str:
        file = io.BytesIO()
        try:
            ImageOps.fit(read_photo(path, side), (side, side), Image.Resampling.BICUBIC).save(file, "WEBP", quality=55)
        except Exception:  # whatever a decoder raises: an unreadable photo is listed, and costs only itself
            return ""
        return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def render(figures: Figures, folder: Path) -> str:
    """The HTML of the page; `folder` is that of the competition, for the photos."""
    options = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, **options)
    environment.filters |= {one.__name__: one for one in (bounds, number, percent, duration, code, breakable)}
    environment.globals |= {name: draw for name, draw in vars(pictures).items() if name.startswith("draw_")}
    environment.globals |= {"headline_names": headline_names, "score_names": SCORE_NAMES, "small": SMALL}
    environment.globals["max_background"] = MAX_BACKGROUND
    environment.globals |= {"map_colours": (*pictures.GROUPS, pictures.OTHERS)}
    classes = class_rows(figures)
    album = Album(folder, MAX_CHARACTERS - len(dump_json(classes)))
    species = {row.label: row for row in figures.species}
    with Progress("drawing the page"), matplotlib.rc_context(pictures.STYLE):
        html = environment.get_template("report.html").render(f=figures, species=species, photo=album.add)
    return html.replace("@DATA@", dump_json(table_data(figures, classes, album)))


def dump_json(value: dict) -> str:
    """Compact JSON that is safe inside HTML."""
    return htmlsafe_json_dumps(value, ensure_ascii=False, separators=(",", ":"))


def class_rows(figures: Figures) -> dict[int, list]:
    """By label, the cells of CLASS_COLUMNS, in the order of the taxonomy."""
    cells_of = attrgetter(*CLASS_COLUMNS)
    return {row.label: round_cells(cells_of(row)) for row in figures.species}


def round_cells(cells: Sequence) -> list:
    """The cells of a row, numbers with four digits."""
    return [round(cell, 4) if isinstance(cell, float) else cell for cell in cells]


def table_data(figures: Figures, classes: dict[int, list], album: Album) -> dict:
    """What the script of the page shows: the tables of classes and of errors, and all photos."""
    errors = [
        [
            *attrgetter(*ERROR_COLUMNS)(one),
            album.add(one.photo, SMALL, ERRORS_FRACTION),
            one.nearest and album.add(one.nearest.photo, SMALL, ERRORS_FRACTION),
        ]
        for one in progress(figures.mistakes, "photos of the errors", unit="error")
    ]
    # If the page gets full, the classes that were neither held out nor guessed have no photo.
    order = sorted(figures.species, key=lambda row: not (row.queries or row.guessed))
    photos = {
        row.label: album.add(row.photo, SMALL)
        for row in progress(order, "photos of the classes", unit="class")
        if row.photo
    }
    return {
        "id": figures.origin.digests[MANIFEST],
        "ranks": [rank.rank for rank in figures.ranks[:-1]],
        "columns": CLASS_COLUMNS,
        "classes": classes,
        "order": list(classes),
        "error_columns": [*ERROR_COLUMNS, "photo", "nearest"],
        "errors": list(map(round_cells, errors)),
        "photo_of": {label: photo for label, photo in photos.items() if photo is not None},
        "photos": album.photos,
    }


def number(value: float | None, digits: int = 3) -> str:
    """`0.319`, or a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """`32 %`, or a dash for None; only exactly 0 and 1 are shown as 0 % and 100 %."""
    if value is None:
        return "–"
    text = "< 1 %" if 0 < value < 0.01 else "> 99 %" if 0.99 < value < 1 else f"{100 * value:.0f} %"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def duration(seconds: float) -> str:
    """`12 s`, `2 min` or `1 h 5 min`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def breakable(name: str) -> Markup:
    """A name that may break after an underscore or a slash, and never inside a word."""
    return Markup(re.sub(r"([_/])", r"\1<wbr>", str(escape(name))))


def code(text: str) -> Markup:
    """Text in which the parts between backticks become code elements."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def bounds(estimate: Estimate | None, sign: str = "") -> Markup:
    """`0.319 [0.292, 0.346]`, or a dash for None."""
    if estimate is None:
        return Markup("–")
    value, low, high = (f"{one:{sign}.3f}" for one in astuple(estimate))
    return Markup(f'{value} <small class="interval">[{low}, {high}]</small>')
