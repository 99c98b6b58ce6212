"""Draws fungi: made-up species, their specimens, and photos of them, from seeds alone.

Called by local/generate.py, and by whoever wants a photo without a download. Knows numpy and Pillow; touches no file
but the one `contact_sheet` is asked to write. Family decides the form, genus the shape and the base colour, species
the fine marks: species of one genus look alike and still differ in at least a few of the things a mycologist looks at.

A cap is a solid of revolution between two height profiles, seen by a camera that may stand anywhere: rays are traced
against the profiles at half the resolution, the surface is textured and lit at the full one. The forest behind is cut
from a few large tiles that every process draws once.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

Array = np.ndarray
Colour = tuple[float, float, float]

LONGEST_DRAWN = 1000  # pixels; larger photos are enlarged from this: a lens resolves no more, and grain hides the rest
TILE = 1024  # pixels a side of a background tile
TILES_PER_KIND = 3
PATTERN = 256  # pixels a side of a cap pattern
PROFILE_STEPS = 512  # a profile is a table over the squared radius, so that no ray takes a square root
PROFILE_REACH = 4.0  # squared radius at which the table ends; the cap itself ends at 1

FORMS = ("agaric", "agaric", "agaric", "agaric", "bolete", "funnel", "bracket", "puffball", "cup", "coral", "club")
MARKS = ("plain", "warts", "scales", "fibrils", "zones", "cracks")
# hue, saturation, value of the caps one meets: vermilion, orange, ochre (twice), chrome, tawny (twice), chestnut,
# umber, cream (twice), ivory, grey, olive, violet, rose, verdigris
HUES = (
    (0.015, 0.74, 0.72), (0.065, 0.72, 0.80), (0.095, 0.52, 0.76), (0.11, 0.46, 0.70), (0.135, 0.66, 0.84),
    (0.07, 0.58, 0.58), (0.08, 0.48, 0.52), (0.04, 0.55, 0.46), (0.055, 0.42, 0.38), (0.11, 0.20, 0.88),
    (0.10, 0.28, 0.80), (0.12, 0.10, 0.92), (0.08, 0.08, 0.60), (0.16, 0.40, 0.50), (0.80, 0.26, 0.54),
    (0.97, 0.34, 0.72), (0.44, 0.20, 0.58),
)  # fmt: skip


@dataclass(frozen=True)
class Traits:
    """What all specimens of one species share. Lengths are in cap radii, colours RGB in 0..1."""

    form: str  # agaric, bolete, funnel, bracket, puffball, cup, coral, club
    ground: str  # moss, litter, grass, needles, wood
    company: int  # 1 single, 2 in troops, 3 clustered
    size: float  # of the fungus against leaves and grass, 1 is ordinary
    height: float  # of the cap over its margin
    roundness: float  # exponent of the radius in the profile: 1 a cone, 2 a dome, 4 a plate
    steepness: float  # exponent of the whole profile: small falls off only at the margin
    umbo: float  # bump (or, negative, dimple) at the centre
    lift: float  # margin above (or, negative, below) the centre
    underside: str  # gills, pores, ridges, smooth
    gill_count: int
    cap_colour: Colour
    centre_colour: Colour
    mark_colour: Colour
    under_colour: Colour
    stem_colour: Colour
    mark: str  # one of MARKS
    mark_scale: int  # 0 fine, 1 coarse
    margin: str  # smooth, striate, edged
    gloss: float  # 0 matt, 1 slimy
    stem_length: float
    stem_width: float
    bulb: float
    ring: bool
    volva: bool
    marks: tuple[int, ...]  # the discrete choices that tell the species of a genus apart


def traits(family: str, genus: str, species: str, seed: int = 0) -> Traits:
    """Traits of a species. The same names and seed give the same traits, on every machine and Python."""
    of_family = _rng("family", family, seed)
    of_genus = _rng("genus", family, genus, seed)
    of_species = _rng("species", family, genus, species, seed)
    form = FORMS[of_family.integers(len(FORMS))]
    shape = _family_shape(form, of_family)
    shape |= _genus_shape(form, shape, of_genus)
    return Traits(form=form, **_species_marks(shape, of_genus, of_species))


def _rng(*parts: object) -> np.random.Generator:
    # crc32, not hash(): Python salts the hashes of strings anew in every process
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in parts])


def _family_shape(form: str, rng: np.random.Generator) -> dict:
    wooden = form == "bracket"
    grounds = ["wood"] if wooden else ["moss", "litter", "litter", "grass", "needles", "wood"]
    profiles = {  # height, roundness, steepness, umbo, lift
        "convex": (0.62, 2.0, 0.55, 0.0, 0.0),
        "bell": (1.15, 1.5, 0.75, 0.06, 0.0),
        "flat": (0.26, 3.2, 0.6, 0.0, 0.06),
        "bolete": (0.66, 2.3, 0.5, 0.0, 0.0),
        "funnel": (0.16, 3.0, 0.8, -0.12, 0.55),
        "bracket": (0.34, 1.7, 0.7, 0.0, 0.04),
        "puffball": (0.92, 2.0, 0.5, 0.0, 0.0),
        "cup": (0.05, 2.0, 1.0, 0.0, 0.75),
        "coral": (1.0, 2.0, 0.5, 0.0, 0.0),
        "club": (1.0, 2.0, 0.5, 0.0, 0.0),
    }
    cap = ("convex", "bell", "flat")[rng.integers(3)] if form == "agaric" else form
    names = ("height", "roundness", "steepness", "umbo", "lift")
    underside = {"agaric": "gills", "bolete": "pores", "funnel": "ridges", "bracket": "pores"}.get(form, "smooth")
    stem_width = {"bolete": 0.34, "funnel": 0.24}.get(form, 0.10 if cap == "bell" else 0.16)
    return dict(zip(names, profiles[cap], strict=True)) | {
        "ground": grounds[rng.integers(len(grounds))],
        "company": {"bracket": 3, "club": 3, "cup": 2, "bolete": 1}.get(form, int(rng.choice([1, 1, 2, 3]))),
        "underside": underside,
        "stem_width": stem_width,
        "stem_length": 1.3 if form == "bolete" else 1.1 if form == "funnel" else float(rng.uniform(1.6, 2.3)),
        "ring": form == "agaric" and bool(rng.random() < 0.35),
        "volva": form == "agaric" and bool(rng.random() < 0.2),
    }


def _genus_shape(form: str, base: dict, rng: np.random.Generator) -> dict:
    return {
        "size": float(rng.choice([0.6, 0.8, 1.0, 1.25])),
        "height": base["height"] * rng.uniform(0.85, 1.2),
        "roundness": base["roundness"] * rng.uniform(0.9, 1.15),
        "umbo": base["umbo"] + (rng.choice([0.0, 0.0, 0.1, -0.08]) if form == "agaric" else 0.0),
        "lift": base["lift"] * rng.uniform(0.75, 1.25),
        "stem_length": base["stem_length"] * rng.uniform(0.88, 1.12),
        "stem_width": base["stem_width"] * rng.uniform(0.8, 1.25),
        "bulb": float(rng.choice([0.0, 0.2, 0.6])) + (0.5 if base["volva"] else 0.0),
        "gill_count": int(rng.choice([34, 46, 62]) if base["underside"] == "gills" else rng.choice([20, 26])),
        "gloss": float(rng.choice([0.05, 0.15, 0.5])),
        "ring": base["ring"] and bool(rng.random() < 0.7),
    }


def _species_marks(shape: dict, of_genus: np.random.Generator, rng: np.random.Generator) -> dict:
    hue, saturation, value = HUES[of_genus.integers(len(HUES))]
    repertoire = of_genus.choice(len(MARKS), 3, replace=False)  # relatives share a repertoire of marks
    under_hue = HUES[of_genus.choice([2, 5, 9, 9, 10, 11, 12, 15])]
    pale_marks = bool(of_genus.random() < 0.5)
    hue_step, tone, pick = int(rng.integers(-2, 3)), int(rng.integers(-1, 2)), int(rng.integers(3))
    mark_scale, margin, build, stem = (int(rng.integers(n)) for n in (2, 3, 3, 3))
    hue, value = hue + 0.030 * hue_step + rng.normal(0, 0.004), value * (1 + 0.22 * tone) + rng.normal(0, 0.01)
    saturation *= 1 + 0.18 * rng.uniform(-1, 1)
    cap = _rgb(hue, saturation, value)
    centre = _rgb(hue - 0.02, saturation * 1.1, value * float(rng.choice([0.62, 0.85, 1.12])))
    mark = _rgb(0.11, 0.14, 0.95) if pale_marks else _rgb(hue - 0.03, min(1.0, saturation * 1.2), value * 0.42)
    if abs(_luma(mark) - _luma(cap)) < 0.2:  # pale marks on a pale cap cannot be seen
        mark = _rgb(hue - 0.03, min(1.0, saturation + 0.25), value * 0.45)
    stem_colour = (_rgb(0.11, 0.12, 0.88), _rgb(hue, saturation * 0.7, min(0.95, value * 1.05)), _rgb(0.06, 0.4, 0.36))
    return shape | {
        "height": shape["height"] * (1.18, 1.0, 0.8)[build],
        "stem_length": shape["stem_length"] * (0.78, 1.0, 1.28)[build],
        "stem_width": shape["stem_width"] * (1.3, 1.0, 0.78)[build],
        "cap_colour": cap,
        "centre_colour": centre,
        "mark_colour": mark,
        "under_colour": _rgb(under_hue[0], under_hue[1] * 0.7, min(0.95, under_hue[2] * rng.uniform(0.95, 1.1))),
        "stem_colour": stem_colour[stem],
        "mark": MARKS[repertoire[pick]],
        "mark_scale": mark_scale,
        "margin": ("smooth", "striate", "edged")[margin],
        "marks": (hue_step, tone, int(repertoire[pick]), mark_scale, margin, build, stem),
    }


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    h, s, v = (hue % 1.0) * 6, float(np.clip(saturation, 0, 1)), float(np.clip(value, 0.08, 0.96))
    return tuple(v - v * s * max(0.0, min((n + h) % 6, 4 - (n + h) % 6, 1.0)) for n in (5, 3, 1))


def _luma(colour: Colour) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


# --- a specimen and a shot ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fruitbody:
    """One cap (or club, or cup) of a specimen; place is in cap radii: right, away from the camera."""

    x: float
    away: float
    scale: float
    bend: float  # sideways lean of the stem over its length
    spin: float  # radians; turns the pattern
    wave: tuple[float, float]  # undulation of the margin
    seed: int


@dataclass(frozen=True)
class Shot:
    """How a photo is taken. Angles in radians; the light is a unit vector: right, up, towards the camera."""

    elevation: float
    roll: float
    radius: float  # of the cap, as a share of the shorter side
    centre: tuple[float, float]
    backdrop: str
    light: tuple[float, float, float]
    sunlight: float  # 0 overcast, 1 direct
    balance: Colour
    exposure: float
    blur: float
    grain: float


def _specimen(species: Traits, rng: np.random.Generator) -> tuple[Traits, list[Fruitbody]]:
    """The species with small individual differences, and the fruit bodies that stand together."""
    age = rng.random()
    shift = rng.normal(0, 0.018, 3) + rng.normal(0, 0.02)
    individual = {**species.__dict__,
        "height": species.height * (1.14 - 0.3 * age) * rng.uniform(0.95, 1.05),
        "lift": species.lift + 0.06 * age * (species.form == "agaric"),
        "stem_length": species.stem_length * rng.uniform(0.9, 1.1),
        "stem_width": species.stem_width * rng.uniform(0.9, 1.1),
        "cap_colour": _tinted_colour(species.cap_colour, shift),
        "centre_colour": _tinted_colour(species.centre_colour, shift),
    }  # fmt: skip
    count = (int(rng.choice([1, 1, 2])), int(rng.integers(2, 5)), int(rng.integers(4, 8)))[species.company - 1]
    spread = 1.5 if species.company == 3 else 2.4
    bodies: list[Fruitbody] = []
    for n in range(count):
        angle = rng.uniform(0, 2 * np.pi)
        reach = 0.0 if n == 0 else spread * rng.uniform(0.55, 1.15)
        bodies.append(Fruitbody(
            x=reach * np.cos(angle), away=reach * np.sin(angle), scale=1.0 if n == 0 else rng.uniform(0.45, 0.95),
            bend=rng.normal(0, 0.12) + 0.18 * reach * np.cos(angle) * (species.company == 3), spin=rng.uniform(0, 6.28),
            wave=(rng.normal(0, 0.05), rng.normal(0, 0.06)), seed=int(rng.integers(1 << 30)),
        ))  # fmt: skip
    return Traits(**individual), bodies


def _tinted_colour(colour: Colour, shift: Array) -> Colour:
    red, green, blue = np.clip(np.add(colour, shift), 0.03, 0.97)
    return float(red), float(green), float(blue)


def _shot(species: Traits, rng: np.random.Generator) -> Shot:
    views = {"side": (4, 16), "oblique": (22, 46), "above": (52, 72), "below": (-62, -28)}
    weights = {
        "puffball": (4, 4, 2, 0),
        "cup": (0, 6, 4, 0),
        "bracket": (3, 4, 0, 3),
        "coral": (5, 5, 0, 0),
        "club": (5, 5, 0, 0),
    }
    chances = np.array(weights.get(species.form, (4, 3, 1.5, 2)), float)
    view = list(views)[rng.choice(4, p=chances / chances.sum())]
    elevation = np.radians(rng.uniform(*views[view]))
    backdrop = species.ground if rng.random() < 0.8 else str(rng.choice(["moss", "litter", "grass", "needles"]))
    picked = species.form != "bracket" and (view == "below" or rng.random() < 0.06)
    if picked:
        backdrop = str(rng.choice(["paper", "litter", "moss", "needles"] if view == "below" else ["paper"]))
    if species.form == "bracket":
        backdrop = "trunk"
    radius = rng.uniform(0.21, 0.31) / (1.0, 1.25, 1.3)[species.company - 1]
    radius *= {"coral": 1.15, "club": 0.8, "puffball": 1.15, "bracket": 1.15}.get(species.form, 1.0)
    side = rng.uniform(-1.0, 1.0)
    light = np.array([side, rng.uniform(0.45, 1.0), rng.uniform(0.35, 0.9)])
    warmth = rng.normal(0, 0.035)
    return Shot(
        elevation=elevation, roll=rng.uniform(-2.6, 2.6) if picked else rng.normal(0, 0.07), radius=radius,
        centre=(0.5 + rng.normal(0, 0.05), 0.5 + rng.normal(0, 0.04)), backdrop=backdrop,
        light=tuple(light / np.linalg.norm(light)), sunlight=float(rng.choice([0.1, 0.3, 0.8])),
        balance=(1 + warmth, 1.0 + rng.normal(0, 0.012), 1 - warmth), exposure=float(np.exp(rng.normal(0.06, 0.13))),
        blur=rng.choice([0.0, 0.0, 0.5, 0.8]), grain=rng.uniform(0.006, 0.024),
    )  # fmt: skip


def draw(species: Traits, specimen_seed: int, photo_seed: int, size: tuple[int, int] = (400, 300)) -> Image.Image:
    """An RGB photo, `size` = (width, height) pixels.

    Photos with one `specimen_seed` show one specimen: the same fruit bodies, differing in camera, light and backdrop.
    """
    if max(size) > LONGEST_DRAWN:
        shrink = LONGEST_DRAWN / max(size)
        small = draw(
            species, specimen_seed, photo_seed, (max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink)))
        )
        return _enlarge(small, size, _rng("grain", photo_seed))
    individual, bodies = _specimen(species, _rng("specimen", specimen_seed))
    rng = _rng("photo", specimen_seed, photo_seed)
    shot = _shot(species, rng)
    canvas = _backdrop(individual, shot, size, rng)
    placed = _place(individual, bodies, shot, size)
    _cast_shadows(canvas, individual, placed, shot)
    front = canvas.copy()
    for body, x, y, radius in placed:
        _paint(canvas, front, individual, body, shot, x, y, radius)
    return _develop(canvas, shot, rng)


def _enlarge(image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """`image` at `size`, with fresh grain: without it an enlarged photo is smooth and far smaller on disk."""
    large = image.resize(size, Image.Resampling.BICUBIC)
    grain = Image.new("L", size)
    tile = Image.fromarray(np.clip(rng.normal(8, 3.5, (512, 512)), 0, 16).astype(np.uint8))
    for left in range(0, size[0], 512):
        for top in range(0, size[1], 512):
            grain.paste(tile.transpose(Image.Transpose(int(rng.integers(7)))), (left, top))
    return ImageChops.add(large, Image.merge("RGB", (grain, grain, grain)), offset=-8)


def _place(species: Traits, bodies: list[Fruitbody], shot: Shot, size: tuple[int, int]) -> list[tuple]:
    """(fruit body, x, y of its cap's centre, radius) in pixels, the farthest first."""
    width, height = size
    unit = shot.radius * min(size)
    sin, cos = np.sin(shot.elevation), np.cos(shot.elevation)
    picked = shot.backdrop == "paper" or (shot.elevation < 0 and species.form != "bracket")
    stemless = species.form in ("puffball", "cup", "bracket", "coral", "club")
    stem = 0.0 if stemless else species.stem_length * cos
    up = (np.sin(shot.roll), -np.cos(shot.roll))  # the fungus' up on the canvas, whose y points down
    right = (np.cos(shot.roll), np.sin(shot.roll))
    unit = min(unit, 0.86 * min(size) / (1.2 + stem)) if not stemless else unit
    middle = (shot.centre[0] * width, shot.centre[1] * height)
    placed = []
    for body in bodies[:2] if picked and species.company < 3 else bodies:
        if species.form == "bracket":  # tiers on an upright trunk
            across, rise = 0.55 * body.x, 0.75 * body.away
        else:
            across, rise = body.x, body.away * max(0.18, abs(sin)) * (0.8 if stemless else 1.0)
        own_stem = stem * body.scale
        lean = body.bend * own_stem
        base = -0.5 * stem + rise
        offset = (across + lean, base + own_stem)
        x = middle[0] + unit * (offset[0] * right[0] + offset[1] * up[0])
        y = middle[1] + unit * (offset[0] * right[1] + offset[1] * up[1])
        placed.append((rise if shot.elevation > 0 else -rise, (body, x, y, unit * body.scale)))
    return [item for _, item in sorted(placed, key=lambda pair: -pair[0])]


# --- a fruit body ------------------------------------------------------------------------------------------------


def _paint(
    canvas: Array, front: Array, species: Traits, body: Fruitbody, shot: Shot, x: float, y: float, radius: float
) -> None:
    if species.form == "coral":
        _paint_coral(canvas, species, body, shot, x, y, radius)
    elif species.form == "club":
        _paint_clubs(canvas, species, body, shot, x, y, radius)
    elif species.form in ("bracket", "puffball", "cup"):
        _paint_cap(canvas, species, body, shot, x, y, radius)
    elif shot.elevation >= 0:
        _paint_stem(canvas, species, body, shot, x, y, radius)
        _paint_cap(canvas, species, body, shot, x, y, radius)
    else:
        _paint_cap(canvas, species, body, shot, x, y, radius)
        _paint_stem(canvas, species, body, shot, x, y, radius)
    if species.form != "bracket" and shot.elevation >= 0 and shot.backdrop != "paper":
        _bury_base(canvas, front, species, body, shot, x, y, radius)


def _profile(species: Traits) -> tuple[Array, Array, Array, Array]:
    """Height of the upper and lower surface and slope / radius of each, tables over the squared radius."""
    squared = np.linspace(0, PROFILE_REACH, PROFILE_STEPS, dtype=np.float32)
    radius = np.sqrt(squared)
    inner = np.minimum(radius, 1.0)
    dome = species.height * (1 - inner**species.roundness) ** species.steepness
    bowl = species.lift * inner ** (1.4 if species.form == "funnel" else 2.2)
    top = dome + bowl + species.umbo * np.exp(-((inner / 0.22) ** 2))
    if species.form == "puffball":
        under = -0.75 * np.sqrt(1 - inner**2) * (1 - 0.12 * inner)
    elif species.form == "cup":
        under = bowl - 0.10 - 0.25 * (1 - inner**2)
    elif species.form == "funnel":
        under = bowl - 0.07 - 0.35 * (1 - inner) ** 1.5
    elif species.form == "bracket":
        under = -0.08 - 0.22 * (1 - inner)
    else:
        thick = 0.10 if species.underside == "pores" else 0.05
        under = bowl - thick + (0.42 if species.underside == "gills" else -0.1) * dome
    outside = np.maximum(radius - 1, 0)
    top, under = top - 7 * outside, under + 7 * outside
    slope = [np.gradient(surface, squared) * 2 for surface in (top, under)]  # df/dr / r = 2 df/d(r^2)
    return tuple(np.clip(table, -8, 8).astype(np.float32) for table in (top, under, *slope))


def _grid(
    canvas: Array, x: float, y: float, reach: float, roll: float, foot: tuple[float, float] | None = None
) -> tuple[slice, slice, Array, Array] | None:
    """The pixels of `canvas` within `reach` of (x, y) and of `foot`: rows, columns, offsets right and up, rolled."""
    height, width = canvas.shape[:2]
    foot_x, foot_y = foot or (x, y)
    top, bottom = max(0, int(min(y, foot_y) - reach)), min(height, int(max(y, foot_y) + reach) + 1)
    left, right = max(0, int(min(x, foot_x) - reach)), min(width, int(max(x, foot_x) + reach) + 1)
    if bottom - top < 4 or right - left < 4:
        return None
    across = (np.arange(left, right, dtype=np.float32) - np.float32(x))[None, :]
    rise = (np.float32(y) - np.arange(top, bottom, dtype=np.float32))[:, None]
    cos, sin = np.float32(np.cos(roll)), np.float32(np.sin(roll))
    return slice(top, bottom), slice(left, right), across * cos - rise * sin, across * sin + rise * cos


def _gaps(
    profile: tuple[Array, ...], species: Traits, body: Fruitbody, elevation: float, x: Array, s: Array, depth: Array
) -> tuple[Array, Array]:
    """How far points at `depth` along the rays (x right, s up) lie above the upper and below the lower surface."""
    sin, cos = np.float32(np.sin(elevation)), np.float32(np.cos(elevation))
    away, up = s * sin + depth * cos, s * cos - depth * sin
    across_squared, away_squared = x * x, away * away
    squared = across_squared + away_squared
    bend, twist = np.float32(body.wave[0]), np.float32(body.wave[1])
    up = up - bend * (across_squared - away_squared) - twist * x * (across_squared - 3 * away_squared)
    index = np.minimum(squared * ((PROFILE_STEPS - 1) / PROFILE_REACH), PROFILE_STEPS - 1).astype(np.int16)
    above, below = up - profile[0][index], profile[1][index] - up
    if species.form == "bracket":
        above[away > 0.02] = 9.0  # behind the bark
    return above, below


def _trace(
    profile: tuple[Array, ...], species: Traits, body: Fruitbody, elevation: float, x: Array, s: Array
) -> tuple[Array, Array, Array]:
    """Depth along each ray (x right, s up, in radii) where it enters the cap, whether it does, and whether on top."""
    steps = np.linspace(-1.45, 1.35, 27, dtype=np.float32)
    step = steps[1] - steps[0]
    above, below = _gaps(profile, species, body, elevation, x, s, steps[:, None, None])
    gap = np.maximum(above, below)
    inside = gap < 0
    hit = inside.any(0)
    entry = np.maximum(np.where(hit, inside.argmax(0), gap.argmin(0)), 1)[None]
    before, after = np.take_along_axis(gap, entry - 1, 0)[0], np.take_along_axis(gap, entry, 0)[0]
    share = np.where(hit, before / np.maximum(before - after, 1e-4), 1.0)
    on_top = np.take_along_axis(above, entry - 1, 0)[0] >= np.take_along_axis(below, entry - 1, 0)[0]
    depth = steps[entry[0] - 1] + np.clip(share, 0, 1).astype(np.float32) * step
    # a margin thinner than a step is missed by some rays and would look torn: those near it look again, more closely
    near = np.nonzero(~hit & (np.minimum(before, after) < 0.7))
    closer = depth[near] + np.linspace(-step, step, 12, dtype=np.float32)[:, None]
    above, below = _gaps(profile, species, body, elevation, x[near], s[near], closer)
    inside = np.maximum(above, below) < 0
    first, ray = inside.argmax(0), np.arange(len(near[0]))
    hit[near] = inside.any(0)
    depth[near] = np.where(hit[near], closer[first, ray], depth[near])
    on_top[near] = np.where(hit[near], above[first, ray] >= below[first, ray], on_top[near])
    return depth, hit, on_top


def _paint_cap(canvas: Array, species: Traits, body: Fruitbody, shot: Shot, x: float, y: float, radius: float) -> None:
    roll = shot.roll - 0.5 * body.bend * (species.form not in ("bracket", "cup"))
    grid = _grid(canvas, x, y, radius * 1.36, roll)
    if grid is None or radius < 3:
        return
    rows, columns, across, rise = grid
    profile = _profile(species)
    across, rise = across / radius, rise / radius
    coarse = 2 if radius > 12 else 1
    found = _trace(profile, species, body, shot.elevation, across[::coarse, ::coarse], rise[::coarse, ::coarse])
    if not found[1].any():
        return
    fine = [_stretch(layer, coarse, across.shape) for layer in found]
    used = tuple(slice(max(0, coarse * (n[0] - 1)), coarse * (n[-1] + 2)) for n in map(np.unique, np.nonzero(found[1])))
    rows, columns = (slice(whole.start + part.start, min(whole.stop, whole.start + part.stop))
                     for whole, part in zip((rows, columns), used, strict=True))  # fmt: skip
    across, rise, *fine = (layer[used] for layer in (across, rise, *fine))
    depth, cover, on_top = fine[0], np.clip((fine[1] - 0.5) * 2 + 0.5, 0, 1), fine[2]
    sin, cos = np.float32(np.sin(shot.elevation)), np.float32(np.cos(shot.elevation))
    away, up = rise * sin + depth * cos, rise * cos - depth * sin
    squared = across * across + away * away
    index = np.minimum(squared * ((PROFILE_STEPS - 1) / PROFILE_REACH), PROFILE_STEPS - 1).astype(np.int16)
    light = _turned_light(shot, roll)
    point = (across, away, up, np.sqrt(squared))
    colour = _top_colour(species, body, point, light)
    lit = _lit(profile[2][index], across, away, light, 1.0, species.gloss, shot)
    colour = colour * lit[0][..., None] + lit[1][..., None]
    if (on_top < 0.99).any():
        below = _under_colour(species, body, point)
        lit = _lit(profile[3][index], across, away, light, -1.0, 0.0, shot)
        below *= lit[0][..., None]
        colour = below + (colour - below) * on_top[..., None]
    region = canvas[rows, columns]
    region += (colour - region) * cover[..., None]


def _stretch(layer: Array, factor: int, shape: tuple[int, int]) -> Array:
    if factor == 1:
        return layer.astype(np.float32)
    image = Image.fromarray(layer.astype(np.float32))
    box = (0, 0, shape[1] / factor, shape[0] / factor)
    # a coarse sample sits on the first of its fine pixels, half a fine pixel left of where resize puts it
    shift = 0.5 - 0.5 / factor
    box = (shift, shift, min(box[2] + shift, image.width), min(box[3] + shift, image.height))
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR, box=box))


def _turned_light(shot: Shot, roll: float) -> Array:
    """The light in the fungus' own frame: right, away, up."""
    right, rise, near = shot.light
    right, rise = right * np.cos(roll) - rise * np.sin(roll), right * np.sin(roll) + rise * np.cos(roll)
    sin, cos = np.sin(shot.elevation), np.cos(shot.elevation)
    return np.array([right, rise * sin - near * cos, rise * cos + near * sin], np.float32)


def _lit(
    slope: Array, x: Array, away: Array, light: Array, facing: float, gloss: float, shot: Shot
) -> tuple[Array, Array]:
    """(factor on the colour, highlight to add) for a surface of revolution of that slope / radius."""
    scale = facing / np.sqrt(1 + slope * slope * (x * x + away * away))
    nx, na, nu = -slope * x * scale, -slope * away * scale, scale
    diffuse = nx * light[0] + na * light[1] + nu * light[2]
    toward = -na * np.float32(np.cos(shot.elevation)) + nu * np.float32(np.sin(shot.elevation))
    # what is seen from below is lit by the ground, or lies upside down: its sky is where the camera is
    picked = shot.elevation < 0 and shot.backdrop != "trunk"
    sky = 0.5 + 0.5 * (toward if picked or facing < 0 else nu)
    key = 0.35 + 0.45 * shot.sunlight
    factor = (1.02 - key) * (0.5 + 0.6 * sky) + 1.15 * key * np.clip(diffuse * 0.8 + 0.2, 0, None)
    factor = factor * (0.72 + 0.28 * np.clip(toward * 1.8, 0, 1))  # edges that turn away from the camera darken
    if not gloss:
        return factor, np.zeros_like(factor)
    half = np.clip((diffuse + toward) / np.sqrt(2 + 2 * shot.light[2]), 0, 1)
    shine = half**8
    return factor, gloss * (0.22 * shine + 0.6 * shine**5) * (0.4 + 0.8 * shot.sunlight)


def _top_colour(species: Traits, body: Fruitbody, point: tuple[Array, ...], light: Array) -> Array:
    x, away, up, radius = point
    colour = np.empty((*x.shape, 3), np.float32)
    colour[:] = species.cap_colour
    colour += np.exp(-((radius / 0.42) ** 2))[..., None] * np.subtract(
        species.centre_colour, species.cap_colour, dtype=np.float32
    )
    if species.form == "puffball":  # seen from the side too, so the pattern is wrapped around instead of dropped on top
        spread = 0.62 / np.maximum(0.35, 1.0 + up)
        x, away = x * spread, away * spread
    cos, sin = np.cos(body.spin), np.sin(body.spin)
    half = PATTERN / 2 - 1
    column = np.clip((x * cos - away * sin) * half + half, 2, PATTERN - 3).astype(np.int16)
    row = np.clip((x * sin + away * cos) * half + half, 2, PATTERN - 3).astype(np.int16)
    mottle = _mottle(body.seed % 3)[row, column]
    colour *= (1 + 0.16 * mottle)[..., None]
    if species.margin == "edged":
        edge = np.clip((radius - 0.84) * 10, 0, 1)
        colour += edge[..., None] * 0.6 * (np.float32(species.mark_colour) - colour)
    if species.mark != "plain":
        pattern = _pattern(species.mark, species.mark_scale, body.seed % 3)
        amount = pattern[row, column]
        colour += (0.85 * amount)[..., None] * (np.float32(species.mark_colour) - colour)
        dx, dy = light[0] * cos - light[1] * sin, light[0] * sin + light[1] * cos
        lee = pattern[row + np.int16(round(2 * dy)), column + np.int16(round(2 * dx))]
        colour *= (1 + 0.35 * (amount - lee))[..., None]  # raised marks catch the light and throw a little shade
    if species.margin == "striate":
        teeth = np.cos(np.arctan2(away, x) * 44 + 6 * mottle)
        colour *= (1 - 0.26 * np.clip((radius - 0.55) * 3, 0, 1) * (0.5 - 0.5 * teeth))[..., None]
    return colour


def _under_colour(species: Traits, body: Fruitbody, point: tuple[Array, ...]) -> Array:
    x, away, _, radius = point
    colour = np.empty((*x.shape, 3), np.float32)
    if species.underside == "smooth":
        colour[:] = np.multiply(species.cap_colour, 0.55) + np.multiply(species.stem_colour, 0.3)
        return colour
    colour[:] = species.under_colour
    if species.underside == "pores":
        half = PATTERN / 2 - 1
        tile = _pores(species.gill_count > 22)
        dots = tile[
            np.clip(away * half + half, 0, PATTERN - 1).astype(int),
            np.clip(x * half + half, 0, PATTERN - 1).astype(int),
        ]
        return colour * (1.05 - 0.4 * dots)[..., None]
    angle = np.arctan2(away, x) + 0.05 * np.sin(9 * radius + body.spin)
    blades = 0.5 + 0.5 * np.cos(angle * species.gill_count)
    short = (0.5 + 0.5 * np.cos(angle * species.gill_count * 2)) * (
        radius > 0.62
    )  # short gills fill the gaps at the margin
    blades = np.maximum(blades, 0.8 * short) if species.underside == "gills" else blades**0.7
    colour *= (0.42 + 0.6 * blades)[..., None]
    return colour * (0.7 + 0.3 * np.clip(radius, 0, 1))[..., None]


def _paint_stem(canvas: Array, species: Traits, body: Fruitbody, shot: Shot, x: float, y: float, radius: float) -> None:
    """A tapering cylinder from under the cap to the ground, with what it wears: a ring, a volva, a bulb."""
    cos, sin = abs(np.cos(shot.elevation)), abs(np.sin(shot.elevation))
    length = species.stem_length * cos * radius
    lean = body.bend * length
    drop = 0.04 * radius if species.form != "funnel" else -0.2 * radius * cos
    foot = (
        x - length * np.sin(shot.roll) - lean * np.cos(shot.roll),
        y + length * np.cos(shot.roll) - lean * np.sin(shot.roll),
    )
    reach = radius * (0.15 + 2.1 * species.stem_width * (1 + species.bulb))
    grid = _grid(canvas, x, y, reach, shot.roll, foot)
    if grid is None or radius < 3:
        return
    rows, columns, across, rise = grid
    along = (rise + length) / max(length, 1.0)  # 0 at the ground, 1 under the cap
    held = np.clip(along, 0, 1)
    wide = species.stem_width * radius * (1 + species.bulb * np.exp(-((held / 0.22) ** 2)) - 0.12 * held)
    if species.form == "funnel":
        wide = wide * (1 + 0.9 * held**4)
    middle = -lean * (1 - held) ** 1.6
    q = (across - middle) / wide
    # the ends are ellipses, for the cylinder is seen at an angle
    tip = np.clip(-(rise + length), 0, None) / (species.stem_width * radius * max(0.25, sin) * (1 + species.bulb))
    inside = np.clip((1 - np.sqrt(q * q + tip * tip)) * wide + 0.5, 0, 1) * (rise < -drop)
    shade = _stem_shade(q, shot, body)
    fibre = _mottle(1)[(np.clip(held, 0, 1) * 60 + 90).astype(int), (np.clip(q, -1, 1) * 100 + 127).astype(int)]
    dark = 1 - 0.45 * np.clip((held - 0.72) / 0.28, 0, 1) * (shot.elevation >= 0) - 0.15 * np.clip(1 - held * 5, 0, 1)
    colour = (shade * dark * (1 + 0.2 * fibre))[..., None] * np.float32(species.stem_colour)
    region = canvas[rows, columns]
    region += (colour - region) * inside[..., None]
    pale = 0.55 * np.float32(species.stem_colour) + 0.45 * np.float32((0.95, 0.93, 0.86))
    if species.volva:
        _wear(region, q / 1.45, held, shade, pale * 0.95, (-0.2, 0.17 + 0.03 * np.sin(9 * q + body.spin)), wide * 1.45)
    if species.ring:
        hang = 0.05 * np.sqrt(np.clip(1 - (q / 1.9) ** 2, 0, 1)) * (0.4 + sin)
        flare = 1.25 + 0.65 * np.clip((0.76 - held) / 0.14, 0, 1)
        _wear(
            region,
            q / flare,
            held,
            shade * (0.86 + 0.1 * np.cos(26 * q)),
            pale,
            (0.64 - hang, 0.78 - hang),
            wide * flare,
        )


def _stem_shade(q: Array, shot: Shot, body: Fruitbody) -> Array:
    q = np.clip(q, -1, 1)
    bulge = np.sqrt(1 - q * q)
    right = shot.light[0] * np.cos(shot.roll) - shot.light[1] * np.sin(shot.roll)
    key = 0.35 + 0.45 * shot.sunlight
    return (1.0 - key) * (0.5 + 0.45 * bulge) + 1.2 * key * np.clip(
        0.25 + 0.7 * (q * right + bulge * shot.light[2]), 0.08, None
    )


def _wear(
    region: Array,
    q: Array,
    held: Array,
    shade: Array,
    colour: Array,
    span: tuple[Array | float, Array | float],
    wide: Array,
) -> None:
    """Lays a piece of veil around the stem where `held` lies in `span`; `q` is across it, -1..1."""
    low, high = span
    cover = (
        np.clip((1 - np.abs(q)) * wide + 0.5, 0, 1)
        * np.clip((held - low) * 60, 0, 1)
        * np.clip((high - held) * 60, 0, 1)
    )
    rim = 1 - 0.3 * np.clip(1 - (held - low) * 30, 0, 1)
    region += ((shade * rim)[..., None] * colour - region) * cover[..., None]


def _paint_coral(
    canvas: Array, species: Traits, body: Fruitbody, shot: Shot, x: float, y: float, radius: float
) -> None:
    """Branches that fork upwards from one foot, drawn at twice the size, the farthest and darkest first."""
    rng = np.random.default_rng(body.seed)
    side = int(2 * 1.25 * radius)
    if side < 6:
        return
    image = Image.new("RGBA", (2 * side, 2 * side), (*(int(255 * c) for c in species.cap_colour), 0))
    pen = ImageDraw.Draw(image)
    generations = 4 + (species.mark_scale == 0) if radius > 20 else 4
    width = side * (0.16 + 0.25 * species.stem_width) * (0.8 if species.mark_scale == 0 else 1.2)
    layers: list[tuple[float, list]] = [
        (
            bright,
            _branches(
                (side, 1.75 * side), rng.normal(0, 0.5), side * 0.42 * species.height**0.3, width, generations, rng
            ),
        )
        for bright in (0.5, 0.65, 0.8, 1.0)
    ]
    tip = np.float32(species.mark_colour if species.margin != "smooth" else species.centre_colour)
    lean = 0.22 if shot.light[0] > 0 else -0.22
    for bright, twigs in layers:
        for x0, y0, x1, y1, thick, left in sorted(twigs, key=lambda twig: -twig[5]):
            base = np.float32(species.cap_colour) + (tip - np.float32(species.cap_colour)) * (
                0.75 if left == 0 else 0.2 if left == 1 else 0
            )
            for tone, share, shift in ((0.55, 1.0, 0.0), (0.85, 0.72, 0.5), (1.08, 0.36, 1.0)):
                fill = (*(min(255, int(255 * c * tone * bright)) for c in base), 255)
                move, half = shift * lean * thick, share * thick / 2
                pen.line((x0 + move, y0, x1 + move, y1), fill=fill, width=max(1, int(2 * half)))
                pen.ellipse((x1 + move - half, y1 - half, x1 + move + half, y1 + half), fill=fill)
    image = image.resize((side, side), Image.Resampling.BOX).rotate(-np.degrees(shot.roll), Image.Resampling.BILINEAR)
    _lay(canvas, image, x - side / 2, y - side * 0.6)


def _branches(
    foot: tuple[float, float], angle: float, length: float, width: float, left: int, rng: np.random.Generator
) -> list[tuple]:
    x1, y1 = foot[0] + np.sin(angle) * length, foot[1] - np.cos(angle) * length
    twigs = [(*foot, x1, y1, width, left)]
    if left > 0:
        for side in (-1, 1) if rng.random() < 0.8 else (-1, 0, 1):
            turn = 0.75 * angle + side * rng.uniform(0.18, 0.5)
            twigs += _branches((x1, y1), turn, length * rng.uniform(0.55, 0.8), width * 0.66, left - 1, rng)
    return twigs


def _lay(canvas: Array, image: Image.Image, left: float, top: float) -> None:
    height, width = canvas.shape[:2]
    x, y = int(left), int(top)
    x0, y0, x1, y1 = max(0, x), max(0, y), min(width, x + image.width), min(height, y + image.height)
    if x1 <= x0 or y1 <= y0:
        return
    piece = np.asarray(image.crop((x0 - x, y0 - y, x1 - x, y1 - y)), np.float32) / 255
    region = canvas[y0:y1, x0:x1]
    region += (piece[..., :3] - region) * piece[..., 3:]


def _paint_clubs(
    canvas: Array, species: Traits, body: Fruitbody, shot: Shot, x: float, y: float, radius: float
) -> None:
    """A club: a stem that swells upwards and carries no cap; marks and margin show on its head."""
    length = radius * species.stem_length * 0.95
    grid = _grid(canvas, x, y, 1.3 * length, shot.roll)
    if grid is None:
        return
    rows, columns, across, rise = grid
    along = rise / length + 0.5
    held = np.clip(along, 0, 1)
    head = 1 / (1 + np.exp(-(held - 0.5) * (26 if species.margin == "edged" else 9)))
    wide = radius * (0.7 * species.stem_width + 0.05) * (0.75 + (0.75 + 0.5 * species.height) * head)
    q = (across + body.bend * 2 * length * (0.5 - held) ** 2 - body.bend * length * held) / wide
    tip = np.clip(along - 0.84, 0, None) / 0.16
    inside = np.clip((1 - np.sqrt(q * q + tip * tip)) * wide + 0.5, 0, 1) * (along > 0)
    bulge = _stem_shade(np.clip(np.sqrt(q * q + 0.6 * tip * tip), 0, 1) * np.sign(q), shot, body)
    colour = np.float32(species.stem_colour) * 0.9 + head[..., None] * np.subtract(
        species.cap_colour, np.multiply(species.stem_colour, 0.9), dtype=np.float32
    )
    row = np.clip(held * 180 + 30, 0, PATTERN - 1).astype(int)
    column = np.clip(np.arcsin(np.clip(q, -1, 1)) * 60 + 127, 0, PATTERN - 1).astype(int)
    if species.mark != "plain":
        amount = _pattern(species.mark, species.mark_scale, body.seed % 3)[row, column] * head
        colour += (0.8 * amount)[..., None] * (np.float32(species.mark_colour) - colour)
    if species.margin == "striate":
        colour = colour * (1 - 0.2 * head * (0.5 + 0.5 * np.cos(14 * np.arcsin(np.clip(q, -1, 1)))))[..., None]
    colour = colour * (bulge * (1 + 0.2 * _mottle(2)[row, column]))[..., None]
    shine = species.gloss * np.exp(-(((q - 0.4 * np.sign(shot.light[0])) / 0.16) ** 2)) * head * 0.5
    region = canvas[rows, columns]
    region += (colour + shine[..., None] - region) * inside[..., None]


def _bury_base(
    canvas: Array, front: Array, species: Traits, body: Fruitbody, shot: Shot, x: float, y: float, radius: float
) -> None:
    """Puts moss, grass or leaves of the bare scene `front` back over the foot: fungi stand in the ground, not on it."""
    below = {
        "puffball": 0.55,
        "cup": 0.25 + 0.3 * np.sin(shot.elevation),
        "coral": 0.72,
        "club": 0.42 * species.stem_length,
    }
    drop = below.get(species.form, species.stem_length * np.cos(shot.elevation) * 0.94) * radius
    reach = radius * (0.9 if species.form in ("puffball", "cup", "coral") else 3.2 * species.stem_width + 0.2)
    lean = 0 if species.form in below else body.bend * species.stem_length * np.cos(shot.elevation) * radius
    foot_x = x - lean - drop * np.sin(shot.roll)
    foot_y = y + drop * np.cos(shot.roll)
    height, width = canvas.shape[:2]
    left, right = max(0, int(foot_x - reach)), min(width, int(foot_x + reach))
    top, bottom = max(0, int(foot_y - 0.3 * radius)), min(height, int(foot_y + 0.8 * radius))
    if right - left < 2 or bottom - top < 2:
        return
    rng = np.random.default_rng(body.seed)
    ragged = np.repeat(rng.normal(0, 1, (right - left) // 2 + 5), 2)[: right - left + 8]
    ragged = np.convolve(ragged, np.hanning(9) / 4, "valid") * 0.09 * radius
    rows = np.arange(top, bottom, dtype=np.float32)[:, None]
    bow = 0.12 * radius * (1 - ((np.arange(left, right) - foot_x) / max(reach, 1)) ** 2)
    cover = np.clip((rows - (foot_y + ragged + bow - 0.06 * radius)[None]) / (0.05 * radius + 1) + 0.5, 0, 1)
    region = canvas[top:bottom, left:right]
    region += (front[top:bottom, left:right] * 0.92 - region) * cover[..., None].astype(np.float32)


# --- light and lens ----------------------------------------------------------------------------------------------


def _cast_shadows(canvas: Array, species: Traits, placed: list[tuple], shot: Shot) -> None:
    """Darkens the backdrop (height, width, 3) under the fruit bodies, in place; drawn at a quarter of the size."""
    height, width = canvas.shape[:2]
    mask = Image.new("L", (width // 4 + 1, height // 4 + 1))
    pen = ImageDraw.Draw(mask)
    stemless = species.form in ("puffball", "cup", "coral", "club", "bracket")
    for _, x, y, radius in placed:
        stem = 0.5 if stemless else species.stem_length * np.cos(shot.elevation)
        foot_x, foot_y = x - radius * stem * np.sin(shot.roll), y + radius * stem * np.cos(shot.roll)
        foot_x -= 0.45 * shot.light[0] * radius
        flat = max(0.22, abs(np.sin(shot.elevation))) * radius
        wide = radius * (0.7 if species.form == "club" else 1.05)
        pen.ellipse([v / 4 for v in (foot_x - wide, foot_y - flat, foot_x + wide, foot_y + flat)], fill=255)
    radius = max(radius for *_, radius in placed)
    mask = mask.filter(ImageFilter.GaussianBlur(max(0.6, float(radius) * 0.06))).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    canvas *= (1 - (0.45 + 0.2 * shot.sunlight) / 255 * np.asarray(mask, np.float32))[..., None]


def _develop(canvas: Array, shot: Shot, rng: np.random.Generator) -> Image.Image:
    """The lit scene (height, width, 3) as the camera writes it: sun flecks, vignette, white balance, tone, grain."""
    height, width = canvas.shape[:2]
    flecks = np.asarray(
        Image.fromarray(rng.random((4, 5)).astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    )
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)[None]
    shade = (
        shot.exposure * (1 - 0.2 * (x * x + y * y) * rng.uniform(0.3, 1.3)) * (1 + 0.5 * shot.sunlight * (flecks - 0.5))
    )
    canvas *= shade[..., None] * np.float32(shot.balance)
    top, left = rng.integers(0, 2 * TILE - height, endpoint=True), rng.integers(0, 2 * TILE - width, endpoint=True)
    canvas += _grain_tile()[top : top + height, left : left + width, None] * np.float32(shot.grain)
    np.clip(canvas, 0, 1.3, out=canvas)
    canvas *= 1.28 - 0.39 * canvas  # a camera's tone curve: highlights roll off
    image = Image.fromarray((canvas * 250).astype(np.uint8))
    if shot.blur:
        image = image.filter(ImageFilter.BoxBlur(float(shot.blur) * min(width, height) / 300))
    return image


@lru_cache(maxsize=1)
def _grain_tile() -> Array:
    return np.tile(_rng("film").normal(0, 1, (TILE, TILE)).astype(np.float32), (2, 2))


# --- the forest --------------------------------------------------------------------------------------------------


def _backdrop(species: Traits, shot: Shot, size: tuple[int, int], rng: np.random.Generator) -> Array:
    """The scene without fungus, (height, width, 3) in 0..1."""
    kind = {"wood": "bark", "trunk": "bark"}.get(shot.backdrop, shot.backdrop)
    tile = _tile(kind, int(rng.integers(TILES_PER_KIND)))
    if rng.random() < 0.5:
        tile = tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if shot.backdrop not in ("trunk", "paper") and 0 <= shot.elevation < np.radians(25):
        image = _standing_view(tile, species, size, rng)
    else:
        if kind == "bark" and shot.backdrop != "trunk":
            tile = tile.transpose(Image.Transpose.ROTATE_90)  # a fallen log
        flat = np.clip(np.sin(abs(shot.elevation)), 0.45, 1)
        width = min(0.62, 0.42 * species.size**-0.5 * rng.uniform(0.85, 1.2)) * TILE
        across, down = width, min(TILE - 1, width * size[1] / size[0] / flat)
        left, top = rng.uniform(0, TILE - across), rng.uniform(0, TILE - down)
        image = tile.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + across, top + down))
        if rng.random() < 0.6:
            image = image.filter(ImageFilter.BoxBlur(float(rng.uniform(0.4, 1.6)) * min(size) / 300))
    scene = np.array(image, np.float32)
    scene *= np.float32(rng.uniform(0.85, 1.25) / 255)
    return scene


def _standing_view(tile: Image.Image, species: Traits, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Ground that recedes to a blurred forest, as a camera held low sees it."""
    width, height = size
    horizon = height * rng.uniform(-0.05, 0.12)
    near = 0.26 * TILE * species.size**-0.3 * rng.uniform(0.85, 1.1)  # tile pixels across the lower edge
    rise = 0.42 * near
    middle, foot = TILE / 2 + rng.uniform(-80, 80), TILE * 0.98
    # with nearness d = h y + f, 1 at the lower edge and 0 at the horizon, a point of the ground is taken from
    # middle + near (x / width - 1/2) / d and foot - rise (1 / d - 1)
    h, f = 1 / (height - horizon), -horizon / (height - horizon) or 1e-6
    numerators = (near / width, middle * h, middle * f - near / 2, 0.0, (foot + rise) * h, (foot + rise) * f - rise)
    coefficients = (*(value / f for value in numerators), 0.0, h / f)
    ground = tile.transform(size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)
    far = _tile("forest", int(rng.integers(TILES_PER_KIND)))
    left, top = rng.uniform(0, TILE * 0.4), rng.uniform(0, TILE * 0.4)
    far = far.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + TILE * 0.6, top + TILE * 0.5))
    soft = ground.filter(ImageFilter.BoxBlur(max(1, min(size) // 90)))
    rows = (
        np.linspace(0, 1, height)[:, None]
        + 0.03 * np.sin(np.linspace(0, rng.uniform(4, 9), width) + rng.uniform(0, 6))[None]
    )
    focus = Image.fromarray((np.clip((rows - 0.55) * 6, 0, 1) * 255).astype(np.uint8))
    fade = Image.fromarray((np.clip((rows - rng.uniform(0.36, 0.46)) * 7, 0, 1) * 255).astype(np.uint8))
    return Image.composite(Image.composite(ground, soft, focus), far, fade)


@cache
def _tile(kind: str, number: int) -> Image.Image:
    """A square of ground (moss, litter, grass, needles, bark), of paper, or of blurred forest."""
    rng = _rng("tile", kind, number)
    draw_it = {"moss": _moss, "litter": _litter, "grass": _grass, "needles": _needles, "bark": _bark, "paper": _paper}
    return draw_it.get(kind, _forest)(rng)


def _noise(rng: np.random.Generator, cells: Sequence[tuple[int, int]], size: int = TILE) -> Array:
    """(size, size), about -1..1: octaves of smooth noise, the later the weaker."""
    total = np.zeros((size, size), np.float32)
    for n, (down, across) in enumerate(cells):
        grid = Image.fromarray(rng.uniform(-1, 1, (down, across)).astype(np.float32))
        total += np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)) * 0.62**n
    return total


def _tinted(
    rng: np.random.Generator, dark: Sequence[int], pale: Sequence[int], cells: Sequence[tuple[int, int]]
) -> Image.Image:
    share = np.clip(0.5 + 0.45 * _noise(rng, cells), 0, 1)[..., None]
    return Image.fromarray((np.float32(dark) * (1 - share) + np.float32(pale) * share).astype(np.uint8))


def _leaf(pen: ImageDraw.ImageDraw, x: float, y: float, length: float, colour: Array, rng: np.random.Generator) -> None:
    angle, slim = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.42)
    t = np.linspace(0, 1, 13)
    lobes = 1 + rng.choice([0.0, 0.0, 0.22]) * np.sin(t * 22)
    half = slim * np.sin(np.pi * t**0.85) * lobes
    curl = rng.uniform(-0.25, 0.25) * t * t
    cos, sin = np.cos(angle) * length, np.sin(angle) * length

    def outline(along: Array, over: Array) -> list[tuple[float, float]]:
        return list(zip(x + along * cos - over * sin, y + along * sin + over * cos, strict=True))

    left, right, rib = outline(t, curl + half), outline(t, curl - half), outline(t, curl)
    shade = [(px + 0.06 * length, py + 0.10 * length) for px, py in left + right[::-1]]
    tone = lambda k: tuple(int(v) for v in np.clip(colour * k, 0, 255))  # noqa: E731
    pen.polygon(shade, fill=tone(0.22))
    pen.polygon(left + rib[::-1], fill=tone(1.0))
    pen.polygon(right + rib[::-1], fill=tone(rng.uniform(0.72, 0.92)))
    for n in range(2, 11, 2):
        pen.line((rib[n], left[min(12, n + 2)]), fill=tone(0.8), width=1)
        pen.line((rib[n], right[min(12, n + 2)]), fill=tone(0.66), width=1)
    pen.line(rib, fill=tone(1.25), width=2)


def _litter(rng: np.random.Generator) -> Image.Image:
    image = _tinted(rng, (26, 18, 12), (64, 46, 32), ((9, 9), (40, 40), (200, 200)))
    pen = ImageDraw.Draw(image)
    browns = np.array(
        [(122, 84, 52), (96, 62, 40), (150, 112, 70), (84, 66, 54), (132, 78, 40), (168, 140, 96), (104, 92, 60)]
    )
    for n in range(420):
        tone = 0.45 + 0.6 * n / 420  # later leaves lie on top and in the light
        colour = browns[rng.integers(len(browns))] * tone * rng.uniform(0.8, 1.15)
        _leaf(pen, rng.uniform(-60, TILE), rng.uniform(-60, TILE), rng.uniform(60, 140), colour, rng)
        if n % 6 == 0:
            _strokes(pen, rng, 1, (60, 160), (110, 84, 60), 2.5)
    return _roughened(image, rng)


def _strokes(
    pen: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    count: int,
    length: tuple[float, float],
    colour: Sequence[float],
    width: float,
    upright: float = 0.0,
) -> None:
    """Blades, needles and twigs: tapering, curved, each in its own tone of `colour`; `upright` 1 points them all up."""
    x, y = rng.uniform(-30, TILE + 30, count), rng.uniform(-30, TILE + 60, count)
    angle = (
        rng.uniform(0, 2 * np.pi, count) * (1 - upright) - np.pi / 2 * upright + rng.normal(0, 0.35, count) * upright
    )
    size, curve = rng.uniform(*length, count), rng.normal(0, 0.35, count)
    tone = rng.uniform(0.6, 1.3, count)
    for n in range(count):
        cos, sin = np.cos(angle[n]) * size[n], np.sin(angle[n]) * size[n]
        half = width / 2 / size[n]
        shape = [(0, -half), (0.5, curve[n] * 0.3 - half), (1, curve[n]), (0.5, curve[n] * 0.3 + half), (0, half)]
        fill = tuple(int(min(255, c * tone[n])) for c in colour)
        pen.polygon([(x[n] + a * cos - o * sin, y[n] + a * sin + o * cos) for a, o in shape], fill=fill)


def _moss(rng: np.random.Generator) -> Image.Image:
    image = _tinted(rng, (14, 22, 8), (40, 54, 20), ((6, 6), (30, 30)))
    pen = ImageDraw.Draw(image)
    for tone in (0.5, 0.7, 0.9, 1.1):
        hue = np.array((88, 112, 34)) * tone + rng.uniform(-12, 12, 3) * (1, 0.6, 0.5)
        _strokes(pen, rng, 900, (16, 38), hue, 6)
    image = image.filter(ImageFilter.GaussianBlur(0.8))
    lumps = np.clip(1 + 0.4 * _noise(rng, ((7, 7), (18, 18))), 0.35, 1.5)[..., None]
    image = Image.fromarray(np.clip(np.asarray(image) * lumps, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(14):
        _leaf(
            pen,
            rng.uniform(0, TILE),
            rng.uniform(0, TILE),
            rng.uniform(50, 110),
            np.array((140, 100, 60)) * rng.uniform(0.6, 1.1),
            rng,
        )
    return _roughened(image, rng)


def _grass(rng: np.random.Generator) -> Image.Image:
    image = _tinted(rng, (16, 22, 8), (52, 56, 26), ((8, 8), (40, 40)))
    pen = ImageDraw.Draw(image)
    for tone in (0.45, 0.65, 0.85, 1.1):
        _strokes(pen, rng, 260, (90, 240), np.array((104, 134, 52)) * tone, 8, upright=0.75)
        _strokes(pen, rng, 70, (80, 200), np.array((164, 146, 90)) * tone, 6, upright=0.6)
    return _roughened(image.filter(ImageFilter.GaussianBlur(0.7)), rng)


def _needles(rng: np.random.Generator) -> Image.Image:
    image = _tinted(rng, (28, 20, 14), (74, 54, 38), ((8, 8), (60, 60), (220, 220)))
    pen = ImageDraw.Draw(image)
    for tone in (0.5, 0.75, 1.0):
        _strokes(pen, rng, 700, (60, 130), np.array((146, 98, 58)) * tone, 4)
        _strokes(pen, rng, 20, (80, 200), np.array((92, 74, 58)) * tone, 11)
        _strokes(pen, rng, 90, (20, 40), np.array((92, 112, 50)) * tone, 6)
    return _roughened(image, rng)


def _bark(rng: np.random.Generator) -> Image.Image:
    ridges = 1 - np.abs(_noise(rng, ((5, 26), (9, 60), (40, 120)))) * 1.5
    ridges += 0.25 * _noise(rng, ((120, 260), (400, 400)))
    light = ridges - np.roll(ridges, 5, axis=1)  # the sides of the furrows that face the light
    share = np.clip(0.18 + 0.45 * ridges + 0.8 * light, 0, 1)[..., None]
    colour = np.float32((30, 23, 18)) * (1 - share) + np.float32(rng.choice([(150, 128, 104), (128, 120, 112)])) * share
    lichen = np.clip(_noise(rng, ((5, 5), (30, 30), (120, 120))) * 1.6 - 0.9, 0, 0.7)[..., None]
    colour += (np.float32((128, 140, 104)) * (0.5 + 0.6 * share) - colour) * lichen
    return Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8))


def _paper(rng: np.random.Generator) -> Image.Image:
    base = np.float32(rng.choice([(206, 202, 194), (168, 170, 172), (188, 164, 128)]))
    shade = 1 + 0.07 * _noise(rng, ((3, 3), (5, 5))) + 0.02 * _noise(rng, ((300, 300), (512, 512)))
    image = Image.fromarray(np.clip(base * shade[..., None], 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(90):  # crumbs of soil come along with every picked fungus
        x, y, r = rng.uniform(0, TILE), rng.uniform(0, TILE), rng.exponential(2.0) + 0.6
        pen.ellipse((x - r, y - r * 0.7, x + r, y + r * 0.7), fill=tuple(int(v) for v in rng.uniform(0.25, 0.6) * base))
    return image


def _forest(rng: np.random.Generator) -> Image.Image:
    """What lies behind, out of focus: foliage, trunks, discs of light."""
    image = _tinted(rng, (22, 30, 16), (96, 112, 62), ((5, 5), (11, 11), (24, 24)))
    pen = ImageDraw.Draw(image, "RGBA")
    for _ in range(int(rng.integers(3, 8))):
        x, wide = rng.uniform(0, TILE), rng.uniform(20, 90)
        pen.rectangle((x, 0, x + wide, TILE), fill=(44, 36, 28, 150))
    for _ in range(60):
        x, y, r = rng.uniform(0, TILE), rng.uniform(0, TILE * 0.8), rng.uniform(14, 46)
        pen.ellipse(
            (x - r, y - r, x + r, y + r), fill=(int(rng.uniform(130, 220)), int(rng.uniform(160, 220)), 110, 46)
        )
    return image.filter(ImageFilter.GaussianBlur(7))


def _roughened(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    rough = 1 + 0.10 * _noise(rng, ((340, 340), (512, 512))) + 0.18 * _noise(rng, ((5, 5), (12, 12)))
    return Image.fromarray(np.clip(np.asarray(image) * rough[..., None], 0, 255).astype(np.uint8))


# --- what caps wear ----------------------------------------------------------------------------------------------


@cache
def _mottle(number: int) -> Array:
    """(256, 256), about -1..1: the unevenness of any surface."""
    return _noise(_rng("mottle", number), ((6, 6), (20, 20), (70, 70), (200, 200)), PATTERN) * 0.7


@cache
def _pattern(mark: str, coarse: int, number: int) -> Array:
    """(256, 256) in 0..1: how much of the mark's colour each point of a cap seen from above takes."""
    rng = _rng("pattern", mark, coarse, number)
    y, x = np.mgrid[-1 : 1 : PATTERN * 1j, -1 : 1 : PATTERN * 1j].astype(np.float32)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    rough = _noise(rng, ((9, 9), (30, 30)), PATTERN)
    if mark in ("warts", "scales"):
        return _dots(mark, coarse, rng)
    if mark == "fibrils":
        rays = _noise(rng, ((3, 60 if coarse else 130), (6, 200)), PATTERN)
        row = np.clip(radius * 180, 0, PATTERN - 1).astype(int)
        column = ((angle / (2 * np.pi) + 0.5) * (PATTERN - 1)).astype(int)
        return np.clip(rays[row, column] * 1.3 + 0.1, 0, 1) * np.clip(radius * 3, 0.2, 1) * 0.8
    if mark == "zones":
        rings = np.sin(radius * (16 if coarse else 30) + 0.9 * rough)
        return np.clip(0.4 + rings, 0, 1) * np.clip(0.75 + 0.5 * rough, 0, 1) * 0.6
    centres = rng.uniform(-1.1, 1.1, (40 if coarse else 130, 2)).astype(np.float32)
    gaps = np.hypot(x[..., None] - centres[:, 0] + 0.03 * rough[..., None], y[..., None] - centres[:, 1])
    nearest = np.partition(gaps, 1, axis=-1)
    return np.clip(1.1 - (nearest[..., 1] - nearest[..., 0]) * (22 if coarse else 32), 0, 1) * np.clip(
        0.7 + 0.7 * rough, 0.1, 0.9
    )


def _dots(mark: str, coarse: int, rng: np.random.Generator) -> Array:
    image = Image.new("L", (2 * PATTERN, 2 * PATTERN))
    pen = ImageDraw.Draw(image)
    count = {("warts", 0): 220, ("warts", 1): 60, ("scales", 0): 300, ("scales", 1): 110}[mark, coarse]
    radius = np.sqrt(rng.random(count)) if mark == "warts" else np.sort(rng.random(count)) ** 0.75
    angle = rng.uniform(0, 2 * np.pi, count) if mark == "warts" else np.arange(count) * 2.399963  # a sunflower's angle
    size = (0.085 if coarse else 0.042) * PATTERN * rng.uniform(0.5, 1.15, count)
    for r, a, s in zip(radius, angle, size, strict=True):
        x, y = PATTERN * (1 + r * np.cos(a)), PATTERN * (1 + r * np.sin(a))
        if mark == "warts":
            corners = [
                (x + s * rng.uniform(0.6, 1.1) * np.cos(t), y + s * rng.uniform(0.6, 1.1) * np.sin(t))
                for t in np.arange(0, 6.2, 0.9)
            ]
        else:  # a tile with its point outwards
            s *= 1.25 - 0.6 * r
            corners = [
                (x + s * m * np.cos(a + t), y + s * m * np.sin(a + t))
                for t, m in ((0, 1.4), (1.2, 0.8), (2.6, 0.9), (3.7, 0.9), (5.1, 0.8))
            ]
        pen.polygon(corners, fill=int(rng.uniform(190, 255)))
    return (
        np.asarray(
            image.filter(ImageFilter.GaussianBlur(1.6)).resize((PATTERN, PATTERN), Image.Resampling.BOX), np.float32
        )
        / 255
    )


@cache
def _pores(fine: bool) -> Array:
    """(256, 256) in 0..1: 1 in the mouths of the pores."""
    rng = _rng("pores", fine)
    image = Image.new("L", (2 * PATTERN, 2 * PATTERN))
    pen = ImageDraw.Draw(image)
    step = 20 if fine else 30
    for n, y in enumerate(range(0, 2 * PATTERN, int(step * 0.87))):
        for x in range((n % 2) * step // 2, 2 * PATTERN, step):
            r = step * rng.uniform(0.26, 0.4)
            cx, cy = x + rng.normal(0, 1.2), y + rng.normal(0, 1.2)
            pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
    return (
        np.asarray(
            image.filter(ImageFilter.GaussianBlur(1)).resize((PATTERN, PATTERN), Image.Resampling.BOX), np.float32
        )
        / 255
    )


# --- for people to look at ---------------------------------------------------------------------------------------


def contact_sheet(
    path: Path, rows: Sequence[tuple[str, Sequence[Image.Image]]], thumb: tuple[int, int] = (160, 120)
) -> Path:
    """Writes a PNG with a labelled row of photos for each (label, photos), in the order given; returns its path."""
    columns = max((len(photos) for _, photos in rows), default=1)
    gutter, name = 4, 210
    sheet = Image.new(
        "RGB", (name + columns * (thumb[0] + gutter), max(1, len(rows)) * (thumb[1] + gutter)), (250, 249, 246)
    )
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for n, (label, photos) in enumerate(rows):
        top = n * (thumb[1] + gutter)
        pen.multiline_text((10, top + 12), label, fill=(40, 36, 30), font=font, spacing=5)
        for column, photo in enumerate(photos):
            small = photo.copy()
            small.thumbnail(thumb)
            spare = ((thumb[0] - small.width) // 2, (thumb[1] - small.height) // 2)
            sheet.paste(small, (name + column * (thumb[0] + gutter) + spare[0], top + spare[1]))
    sheet.save(path)
    return path
