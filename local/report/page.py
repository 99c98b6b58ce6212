"""Show the figures of a report on one page that needs nothing beside itself. Adds photos and plots, and no number."""

import base64
import io
import json
import re
from pathlib import Path

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image, ImageOps

from kernel.photos import read_photo
from local.base.console import progress
from local.report import pictures

TEMPLATES = Path(__file__).parent
SMALL, LARGE = 96, 208  # sides of a photo, pixels: in a table, on its own
PHOTOS_MOST = 10_000_000  # characters of photos on a page; the classes that were not asked go without first
DATA_COLUMNS = (
    "id",
    "name",
    "lineage",
    "poisonous",
    "shots",
    "asked",
    "guessed",
    "recall_at_1",
    "recall_at_5",
    "f1",
    "probability",
)


class Album:
    """The photos of a page, each once, as small as they are shown.

    Args:
        folder: of the competition.
    """

    def __init__(self, folder: Path):
        self.folder, self.places, self.photos, self.size = folder, {}, [], 0

    def add(self, photo: str, side: int = LARGE) -> int | None:
        """A photo's place among `photos`; None for one that cannot be read, or has no room any more."""
        if (photo, side) not in self.places:
            said = self._encode(self.folder / photo, side) if self.size < PHOTOS_MOST else ""
            self.places[photo, side] = len(self.photos) if said else None
            self.photos += [said] if said else []
            self.size += len(said)
        return self.places[photo, side]

    @staticmethod
    def _encode(path: Path, side: int) -> str:
        file = io.BytesIO()
        try:
            ImageOps.fit(read_photo(path, side), (side, side), Image.Resampling.BICUBIC).save(file, "WEBP", quality=55)
        except Exception:  # as wide as the kernel's own guard: a photo that fails is listed, and costs only itself
            return ""
        return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def render(figures: dict, folder: Path) -> str:
    """The page.

    Args:
        figures: what `local.report.figures` computed.
        folder: of the competition, for the photos.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bounds": bounds, "number": number, "signed": signed, "share": share, "code": code}
    environment.globals |= {
        name: plain_svg(getattr(pictures, name)) for name in dir(pictures) if name.startswith("draw_")
    }
    album = Album(folder)
    species = {row["class"]: row for row in figures["species"]}
    first = environment.get_template("report.html").render(
        f=figures, species=species, photo=album.add, source=source, small=SMALL
    )
    # The classes come last, those that were asked before the others, so that what has no room is what matters least.
    order = sorted(figures["species"], key=lambda row: not (row["asked"] or row["guessed"]))
    photos = {row["class"]: album.add(row["photo"], SMALL) for row in progress(order, "photos") if row["photo"]}
    data = {
        "ranks": [rank["rank"] for rank in figures["ranks"][:-1]],
        "columns": DATA_COLUMNS,
        "classes": {row["class"]: [compact(row[name]) for name in DATA_COLUMNS] for row in figures["species"]},
        "order": [row["class"] for row in figures["species"]],
        "mistaken": figures["mistaken"],
        "photo_of": {place: photo for place, photo in photos.items() if photo is not None},
        "photos": album.photos,
    }
    return first.replace("@DATA@", embedded_json(data))


def plain_svg(drawing):
    """A drawing for the template, which would escape text that is not marked as SVG."""

    def drawn(*given: object) -> Markup:
        with matplotlib.rc_context(pictures.STYLE):
            return Markup(drawing(*given))

    return drawn


def embedded_json(data: dict) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def compact(value: object) -> object:
    """A number with the digits that a table shows."""
    return round(value, 4) if isinstance(value, float) else value


def source(name: str) -> Markup:
    """A file of the page, as it is."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def number(value: float | None, digits: int = 3) -> str:
    """`0.319`, or a dash for what there is not."""
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float) -> str:
    """`+0.012`."""
    return f"{value:+.3f}"


def share(value: float | None) -> str:
    """`32 %`; what is not quite nothing or all does not look like it."""
    if value is None:
        return "–"
    text = "< 1 %" if 0 < value < 0.01 else "> 99 %" if 0.99 < value < 1 else f"{100 * value:.0f} %"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def code(text: str) -> Markup:
    """Text with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def bounds(value: dict | None, sign: str = "") -> Markup:
    """`0.319 [0.292, 0.346]`, or a dash for what there is not."""
    if value is None:
        return Markup("–")
    middle, low, high = (f"{value[key]:{sign}.3f}" for key in ("value", "low", "high"))
    return Markup(f'{middle} <small class="interval">[{low}, {high}]</small>')
