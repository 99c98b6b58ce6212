"""Draw fungi: made-up species, their specimens, and photos of them, from seeds alone.

A fungus is a stack of discs, as if turned on a lathe. Painted from back to front as the camera sees them, the discs
give the outline and, for each pixel, a point of the surface, which is then coloured and lit. The family decides form
and ground, the genus proportions and colours, the species the details: relatives look alike.
"""

import colorsys
import math
import zlib
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CANVAS = 350  # pixels of the shorter side while drawing; the photo is resized from it
TILE = 640  # pixels of a side of a background tile
PATTERN = 128  # pixels of a side of a cap pattern
STEM, UNDER, CAP, HOLLOW = range(4)  # parts of a fungus
FORMS = {  # cap height, exponent of its outline, stem length and width, underside, company (0: any), chances of VIEWS
    "dome": (0.65, 2.0, 1.8, 0.16, "gills", 0, (0.4, 0.3, 0.1, 0.2)),
    "bell": (1.15, 1.5, 2.1, 0.10, "gills", 0, (0.4, 0.3, 0.1, 0.2)),
    "plate": (0.28, 3.0, 1.7, 0.15, "gills", 0, (0.4, 0.3, 0.1, 0.2)),
    "bolete": (0.70, 2.3, 1.3, 0.34, "pores", 1, (0.4, 0.3, 0.1, 0.2)),
    "funnel": (0.75, 1.8, 0.8, 0.16, "gills", 0, (0.4, 0.3, 0.1, 0.2)),
    "bracket": (0.40, 1.8, 0.0, 0.0, "pores", 3, (0.3, 0.4, 0.0, 0.3)),
    "puffball": (1.55, 2.0, 0.0, 0.0, "smooth", 0, (0.4, 0.4, 0.2, 0.0)),
    "cup": (0.70, 0.6, 0.0, 0.3, "smooth", 2, (0.0, 0.6, 0.4, 0.0)),
    "coral": (2.2, 1.0, 0.0, 0.13, "smooth", 1, (0.5, 0.5, 0.0, 0.0)),
    "club": (2.4, 1.0, 0.0, 0.24, "smooth", 3, (0.5, 0.5, 0.0, 0.0)),
}
VIEWS = ((6, 16), (22, 46), (50, 70), (-60, -28))  # degrees above the ground: side, oblique, above, below
MARKS = ("plain", "warts", "scales", "fibrils", "zones", "cracks")
# hue, saturation and value of common caps: red, orange, ochre, yellow, tawny, chestnut, umber, cream, ivory, grey,
# olive, violet, pink, greenish
CAP_COLOURS = (
    (0.015, 0.74, 0.72), (0.065, 0.72, 0.80), (0.10, 0.50, 0.74), (0.135, 0.66, 0.84), (0.07, 0.55, 0.56),
    (0.04, 0.55, 0.46), (0.055, 0.42, 0.38), (0.11, 0.22, 0.86), (0.12, 0.10, 0.92), (0.08, 0.08, 0.60),
    (0.16, 0.40, 0.50), (0.80, 0.26, 0.54), (0.97, 0.34, 0.72), (0.44, 0.20, 0.58),
)  # fmt: skip
# darkest and palest soil; layers of leaves and blades: colour, number, length in tiles, width in lengths, how upright
GROUNDS = {
    "moss": ((14, 22, 8), (44, 58, 22), ((92, 118, 38), 1600, 0.06, 0.22, 0.0), ((140, 100, 60), 14, 0.12, 0.4, 0.0)),
    "litter": ((26, 18, 12), (64, 46, 32), ((142, 94, 56), 420, 0.13, 0.36, 0.0)),
    "grass": ((16, 22, 8), (52, 56, 26), ((110, 140, 56), 900, 0.22, 0.05, 0.8), ((164, 146, 90), 90, 0.2, 0.04, 0.6)),
    "needles": ((28, 20, 14), (74, 54, 38), ((150, 102, 62), 1700, 0.12, 0.04, 0), ((92, 112, 50), 120, 0.05, 0.2, 0)),
    "wood": ((30, 23, 18), (104, 86, 68), ((118, 100, 82), 900, 0.25, 0.05, 1), ((128, 140, 104), 50, 0.04, 0.6, 0)),
    "paper": ((180, 176, 168), (206, 202, 194), ((90, 80, 64), 60, 0.012, 0.6, 0.0)),
    "forest": ((24, 32, 18), (116, 132, 82)),
}


@dataclass(frozen=True)
class Traits:
    """What all specimens of a species share. Lengths are in cap radii, colours are RGB in 0..1."""

    form: str  # a key of FORMS
    ground: str  # a key of GROUNDS
    company: int  # 1: alone, 2: several, 3: a cluster
    sizes: np.ndarray  # (4,): cap height, exponent of its outline, stem length, stem width
    colours: np.ndarray  # (5, 3): stem, underside, cap, centre of the cap, mark
    bulb: float  # at the foot of the stem
    ring: bool
    gills: int  # how many
    gloss: float
    mark: tuple[str, bool]  # one of MARKS, and whether it is coarse
    edged: bool  # the margin of the cap has the colour of the mark


class Shot(NamedTuple):
    """How a photo is taken."""

    elevation: float  # radians; negative shows the underside of a picked fungus
    light: np.ndarray  # unit vector: right, up, towards the camera
    sun: float  # 0 overcast, 1 direct
    zoom: float
    backdrop: str  # a key of GROUNDS


def _rng(*parts: object) -> np.random.Generator:
    # crc32, because hash() of a string differs between processes
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in parts])


def traits(family: str, genus: str, species: str, seed: int = 0) -> Traits:
    """The traits of a species: the same for the same names and seed."""
    of_family, of_genus = _rng("family", family, seed), _rng("genus", family, genus, seed)
    rng = _rng("species", family, genus, species, seed)
    form = list(FORMS)[int(len(FORMS) * of_family.random() ** 1.4)]  # the first are more frequent, as in nature
    *sizes, underside, company, _ = FORMS[form]
    ground = "wood" if form == "bracket" else ("moss", "litter", "grass", "needles", "wood")[of_family.integers(5)]
    hue, saturation, value = CAP_COLOURS[of_genus.integers(len(CAP_COLOURS))]
    pale_marks, marks = value < 0.8 and of_genus.random() < 0.5, of_genus.choice(len(MARKS), 3, replace=False)
    under = CAP_COLOURS[of_genus.choice([2, 4, 7, 7, 8, 9, 12])]

    step, tone, mark, coarse, edged, build, stem = rng.integers((5, 3, 3, 2, 4, 3, 3))
    hue, saturation, value = hue + 0.03 * (step - 2), saturation * rng.uniform(0.85, 1.15), value * (0.8 + 0.2 * tone)
    stem_colours = ((0.11, 0.12, 0.88), (hue, saturation * 0.7, value * 1.05), (0.06, 0.4, 0.36))
    cap, centre = (hue, saturation, value), (hue - 0.02, saturation * 1.1, value * rng.choice([0.6, 0.85, 1.15]))
    mark_colour = (0.11, 0.14, 0.95) if pale_marks else (hue - 0.03, saturation + 0.15, value * 0.42)
    colours = stem_colours[stem], (under[0], under[1] * 0.7, under[2]), cap, centre, mark_colour
    proportions = of_genus.uniform(0.82, 1.22, 4) * (1.2 - 0.2 * build, 1, 0.75 + 0.25 * build, 1.3 - 0.27 * build)
    return Traits(
        form, ground, company or int(of_family.choice([1, 1, 2, 3])), sizes * proportions,
        np.array([colorsys.hsv_to_rgb(h % 1, min(s, 1), np.clip(v, 0.08, 0.96)) for h, s, v in colours]),
        bulb=of_genus.choice([0.0, 0.3, 0.9]), ring=underside == "gills" and of_family.random() < 0.35,
        gills=of_genus.choice([26, 38, 54]), gloss=float(of_genus.choice([0.05, 0.2, 0.6])),
        mark=(MARKS[marks[mark]], bool(coarse)), edged=bool(edged == 3),
    )  # fmt: skip


def draw(species: Traits, specimen_seed: int, photo_seed: int, size: tuple[int, int] = (400, 300)) -> Image.Image:
    """Draw an RGB photo of `size` (width, height) pixels.

    Photos with the same `specimen_seed` show the same specimen with another camera, light and background.
    """
    scale = min(CANVAS / min(size), 2 * CANVAS / max(size))
    specimen, bodies = _specimen(species, _rng("specimen", specimen_seed))
    rng = _rng("photo", specimen_seed, photo_seed)
    shot = _shot(specimen, rng)
    backdrop = _backdrop(shot, tuple(max(1, round(side * scale)) for side in size), rng)
    canvas = np.array(backdrop, np.float32) / 255
    _paint_bodies(canvas, specimen, bodies, shot, rng)
    return _develop(canvas, size, rng)


def _specimen(species: Traits, rng: np.random.Generator) -> tuple[Traits, list[tuple]]:
    """The species with individual differences, and its fruit bodies: position right of and behind the first, scale,
    lean and spin."""
    colours = species.colours.copy()
    colours[2:4] += rng.normal(0, 0.035, 3) + rng.normal(0, 0.06)
    sizes = species.sizes * rng.uniform((0.85, 1, 0.85, 0.85), (1.15, 1, 1.15, 1.15))
    fewest, below, reach = ((1, 3, 2.2), (2, 5, 2.2), (4, 7, 1.4))[species.company - 1]
    reach = 0.8 if species.form == "club" else reach
    bodies = []
    for n in range(rng.integers(fewest, below)):
        angle, distance, scale = rng.uniform((0, 0.6 * reach, 0.5), (2 * np.pi, 1.1 * reach, 0.95))
        x, away, scale = (distance * np.cos(angle), distance * np.sin(angle), scale) if n else (0.0, 0.0, 1.0)
        if species.form == "coral":  # a bush of clubs from one foot
            leans, scales = rng.uniform(-0.5, 0.5, 12), scale * rng.uniform(0.5, 1, 12)
            bodies += [(x + 0.2 * lean, away, size, lean, 0.0) for lean, size in zip(leans, scales, strict=True)]
        else:
            lean = rng.normal(0, 0.1) + 0.1 * x * (species.company == 3)
            bodies.append((x, away, scale, lean, rng.uniform(0, 2 * np.pi)))
    return replace(species, colours=np.clip(colours, 0.03, 0.97), sizes=sizes), bodies


def _shot(species: Traits, rng: np.random.Generator) -> Shot:
    view = rng.choice(4, p=FORMS[species.form][-1])
    others = ["moss", "litter", "needles", "paper" if view == 3 else "grass"]
    backdrop = species.ground if (view < 3 and rng.random() < 0.6) or species.form == "bracket" else rng.choice(others)
    light = rng.uniform((-1, 0.45, 0.3), (1, 1, 0.8))
    light = np.float32(light / np.linalg.norm(light))
    low, high = VIEWS[view]
    elevation, sun, zoom = rng.uniform((low, 0.3, 0.5), (high, 1, 1.0)).tolist()
    return Shot(math.radians(elevation), light, sun, zoom, str(backdrop))


def _discs(species: Traits) -> np.recarray:
    """The discs from foot to top: radius, height, part, distance from the apex (0..1), outward and upward normal."""
    (height, outline, length, width), t, segments = species.sizes, np.linspace(0, 1, 40), []

    def add(radius, up, part, apex, normal=None):
        if normal is None:
            along = np.gradient(up) + 1j * np.gradient(radius)
            normal = along.real / (abs(along) + 1e-9), -along.imag / (abs(along) + 1e-9)
        segments.append(np.broadcast_arrays(np.maximum(radius, 0.004), up, part, apex, *normal))

    if species.form in ("club", "coral"):
        radius = width * (0.6 + (0.4 if species.form == "club" else -0.15) * t) * np.sqrt(1 - t**8)
        add(radius, height * t, np.where(t < 0.25, STEM, CAP), 1 - t)
    elif species.form == "puffball":
        angle = np.pi * (0.12 + 0.88 * t)
        add(np.sin(angle) ** 0.8, height * (1 - np.cos(angle)) / 2, CAP, 1 - t)
    else:
        ring = 0.13 * (species.ring & (abs(t - 0.72) < 0.03))
        add(width * (1 + species.bulb * np.exp(-((5 * t) ** 2))) + ring, length * t, STEM, 1 - t)
        if species.form in ("funnel", "cup"):
            add(width + (1 - width) * t**outline, length + height * t, UNDER, t)
            add(np.ones(1), length + height, HOLLOW, 1.0, (-0.75, 0.65))
        else:
            radius = np.cos(t * np.pi / 2)
            add(np.ones(1), length, UNDER, 1.0, (0.0, -1.0))
            add(radius, length + height * (1 - radius**outline) ** 0.6, CAP, radius)
    columns = [np.concatenate(column).astype(np.float32) for column in zip(*segments, strict=True)]
    return np.rec.fromarrays(columns, names="radius,height,part,apex,out,up")


def _paint_bodies(
    canvas: np.ndarray, species: Traits, bodies: list[tuple], shot: Shot, rng: np.random.Generator
) -> None:
    discs, sine, on_trunk = _discs(species), np.sin(shot.elevation), species.form == "bracket"
    x, away, scales, leans, spins = np.array(bodies).T
    across, lift = (0.5 * x, 0.8 * away) if on_trunk else (x, away * sine)
    # the rectangle that the bodies cover, in cap radii around the foot of the first, is fitted into the photo
    tops, reach = np.cos(shot.elevation) * discs.height, np.array([[-1], [1]]) * discs.radius
    rise = (scales[:, None, None] * (tops + reach * abs(sine)) + lift[:, None, None]).ravel()
    spread = (scales[:, None, None] * reach + across[:, None, None]).ravel()
    height, width = canvas.shape[:2]
    radius = shot.zoom * min(height / np.ptp(rise), width / np.ptp(spread), min(height, width) / 1.6)
    feet_x = width * rng.normal(0.5, 0.04) + radius * (across - (spread.min() + spread.max()) / 2)
    feet_y = height * rng.normal(0.5, 0.04) - radius * (lift - (rise.min() + rise.max()) / 2)
    size = radius * scales[:, None] * discs.radius.max()
    dx = (np.arange(width) - feet_x[:, None]) / size + 0.5 * shot.light[0]
    dy = (np.arange(height) - feet_y[:, None]) / (size * max(0.3, abs(sine))) - 0.1
    shadow = np.einsum("nh,nw->hw", np.float32(np.exp(-dy * dy)), np.float32(np.exp(-dx * dx)))
    canvas /= 1 + 1.2 * shadow[..., None]
    for n in np.argsort(lift * np.sign(sine) * (1 if on_trunk else -1), kind="stable"):
        body = [float(part) for part in (feet_x[n], feet_y[n], radius * scales[n], leans[n], spins[n])]
        _paint(canvas, species, discs, body, shot, rng)


def _paint(canvas: np.ndarray, species: Traits, discs: np.recarray, body: list[float], shot: Shot, rng) -> None:
    """Paint a fruit body, given as the pixel that it stands on, the pixels of a cap radius, lean and spin."""
    x, y, scale, lean, spin = body  # Python's floats, which keep the arrays float32
    sine, cosine = math.sin(shot.elevation), math.cos(shot.elevation)
    centre_x, centre_y = x + scale * lean * discs.height**1.5, y - scale * cosine * discs.height
    radius_x, radius_y = scale * discs.radius, scale * abs(sine) * discs.radius
    radius_y = np.maximum(radius_y, abs(np.gradient(centre_y)) + 0.5)  # no gap between thin discs seen from the side
    left, top = max(0, int((centre_x - radius_x).min())), max(0, int((centre_y - radius_y).min()))
    right, bottom = int((centre_x + radius_x).max()) + 2, int((centre_y + radius_y).max()) + 2
    patch = canvas[top : max(top, bottom), left : max(left, right)]
    nearest = np.full(patch.shape[:2], -1, np.int16)
    order = np.arange(len(discs))[:: 1 if sine > 0 else -1]
    for n in order:
        first, last = max(0, int(centre_y[n] - radius_y[n]) - top), max(0, int(centre_y[n] + radius_y[n]) + 2 - top)
        rows = nearest[first:last]
        dy = np.arange(top + first, top + first + len(rows)) - centre_y[n]
        half = radius_x[n] ** 2 * (1 - (dy / radius_y[n]) ** 2)
        if species.form == "bracket":  # the half in front of the trunk
            half[dy * sine < 0] = -1
        dx = np.arange(left, left + rows.shape[1]) - centre_x[n]
        rows[dx * dx <= half[:, None]] = n
    if sine > 0 and species.form != "bracket":  # blades and leaves of the ground hide the foot
        edge = y + radius_y[0] - scale * 0.2 * rng.random(nearest.shape[1] // 3 + 1).repeat(3)[: nearest.shape[1]]
        low = discs.height[nearest] < 0.3 * discs.height[-1]
        nearest[low & (np.arange(top, top + len(nearest))[:, None] > edge)] = -1
    rows, columns = np.nonzero(nearest >= 0)
    index = nearest[rows, columns]
    point = discs[index]
    # a point lies between the rim of its disc and that of the disc painted next; the angle is counted from the back
    hidden = np.zeros(len(discs), np.float32)
    hidden[order[:-1]] = discs.radius[order[1:]]
    across = (np.float32(columns + left) - centre_x[index]) / scale
    away = (centre_y[index] - np.float32(rows + top)) / (scale * sine)
    reach = np.clip(np.hypot(across, away), np.minimum(hidden[index], point.radius), point.radius)
    angle = np.arctan2(across, np.copysign(np.sqrt(np.maximum(reach**2 - across**2, 0)), away))
    reach = reach / point.radius
    out, up = point.out * reach, point.up
    back, facing = out * np.cos(angle), up * sine - out * np.cos(angle) * cosine
    normal = out * np.sin(angle), up * cosine + back * sine, facing
    direct = np.maximum(sum(one * other for one, other in zip(normal, shot.light, strict=True)), 0)
    light = 0.6 - 0.2 * shot.sun + (0.4 + 0.35 * shot.sun) * direct + 0.15 * facing
    shine = 0.5 * species.gloss * (point.part == CAP) * direct**14
    patch[rows, columns] = _colour(species, point, reach, angle, spin) * light[:, None] + shine[:, None]


def _colour(species: Traits, point: np.recarray, reach: np.ndarray, angle: np.ndarray, spin: float) -> np.ndarray:
    """The colour of each point of the surface, (points, 3)."""
    stem, under, cap = point.part == STEM, point.part == UNDER, point.part >= CAP
    apex = point.apex * reach
    cell = tuple((((1 + apex * f(angle + spin)) * (PATTERN / 2 - 0.5)).astype(int)) for f in (np.cos, np.sin))
    number = int(spin * 100) % 2
    colour = species.colours.astype(np.float32)[np.minimum(point.part, CAP).astype(int)]
    wear = _pattern(*species.mark, number)[cell]
    if species.edged:
        wear = np.maximum(wear, 0.8 * (apex > 0.9))
    for amount, pigment in ((np.exp(-((apex / 0.4) ** 2)), species.colours[3]), (wear, species.colours[4])):
        colour += (amount * cap)[:, None] * (np.float32(pigment) - colour)
    shade = 1 + 0.12 * _pattern("mottle", False, number)[cell] - 0.5 * stem * np.exp(-((6 * point.apex) ** 2))
    shade *= np.where(point.part == HOLLOW, 0.6 + 0.4 * reach, 1)
    if FORMS[species.form][4] == "gills":
        shade -= 0.45 * under * np.clip(np.cos(angle * species.gills), 0, 1)
    elif FORMS[species.form][4] == "pores":
        shade -= 0.45 * under * _pattern("pores", species.gills < 40, 0)[cell]
    return colour * shade[:, None]


@cache
def _pattern(mark: str, coarse: bool, number: int) -> np.ndarray:
    """(PATTERN, PATTERN) in 0..1: how far each point of a cap, seen from above, takes the colour of the mark."""
    rng, size, side = _rng("pattern", mark, coarse, number), (PATTERN, PATTERN), np.linspace(-1, 1, PATTERN)
    x, y = np.meshgrid(np.float32(side), np.float32(side))
    radius, angle, rough = np.hypot(x, y), np.arctan2(y, x), _noise(rng, ((9, 9), (30, 30)), size)
    if mark in ("plain", "mottle"):
        return rough * (mark == "mottle")
    if mark == "fibrils":
        strands = _noise(rng, ((3, 50 if coarse else 100),), size)
        cell = np.minimum(radius * 90, PATTERN - 1).astype(int), ((angle / 6.284 + 0.5) * PATTERN).astype(int)
        return np.clip(strands[cell] * 1.3, 0, 1) * np.clip(radius * 3, 0.2, 1)
    if mark == "zones":
        return np.clip(0.3 + np.sin(radius * (14 if coarse else 26) + rough), 0, 1) * 0.7
    count = {"warts": 70, "scales": 130, "pores": 200, "cracks": 60}[mark] * (1 if coarse else 3)
    centres = rng.uniform(-1, 1, (count, 2)).astype(np.float32)
    if mark in ("scales", "pores"):  # in a sunflower's spiral
        turn, distance = 2.4 * np.arange(count), np.sqrt(np.linspace(0.01, 1, count))
        centres = np.stack([distance * np.cos(turn), distance * np.sin(turn)], 1).astype(np.float32)
    gaps = np.hypot(x[..., None] - centres[:, 0], y[..., None] - centres[:, 1])
    first, second = np.moveaxis(np.partition(gaps, 1, axis=-1)[..., :2], -1, 0) / (1.8 / np.sqrt(count))
    return np.clip(1 - (second - first) / 0.22, 0, 0.9) if mark == "cracks" else np.clip(3.4 - 8 * first, 0, 1)


def _noise(rng: np.random.Generator, cells: tuple[tuple[int, int], ...], size: tuple[int, int]) -> np.ndarray:
    """(height, width), about -1..1: octaves of smooth noise, given by their cells (down, across), each weaker."""
    grids = (Image.fromarray(rng.uniform(-1, 1, shape).astype(np.float32)) for shape in cells)
    return sum(0.62**n * np.asarray(grid.resize(size, Image.Resampling.BICUBIC)) for n, grid in enumerate(grids))


@cache
def _tile(kind: str, number: int) -> Image.Image:
    """A square of ground, seen from above."""
    rng, (dark, pale, *layers) = _rng("tile", kind, number), GROUNDS[kind]
    cells = ((8, 8), (40, 40), (200, 200)) if layers else ((6, 6), (13, 13))
    mix = np.clip(0.5 + 0.45 * _noise(rng, cells, (TILE, TILE)), 0, 1)[..., None]
    image = Image.fromarray((dark + np.subtract(pale, dark) * mix).astype(np.uint8))
    pen, t = ImageDraw.Draw(image), np.linspace(0, 1, 7)
    for colour, count, length, width, upright in layers:
        for n in range(count):
            angle = rng.normal(-np.pi / 2, 0.25) if rng.random() < upright else rng.uniform(0, 2 * np.pi)
            cos, sin = TILE * length * rng.uniform(0.6, 1.2) * np.array((np.cos(angle), np.sin(angle)))
            rib, half = rng.normal(0, 0.2) * t * t, width / 2 * np.sin(np.pi * t) * rng.uniform(0.7, 1.3)
            start = rng.uniform(-0.1, 1.05, 2) * TILE
            # later ones lie on top and in the light
            tone = np.array(colour) * (0.45 + 0.65 * n / count) * rng.uniform(0.8, 1.2) * rng.uniform(0.9, 1.1, 3)
            for one, other, light in ((half + 0.06, 0.06 - half, 0.3), (half, 0 * t, 1.0), (0 * t, -half, 0.8)):
                side, along = np.concatenate([rib + one, (rib + other)[::-1]]), np.concatenate([t, t[::-1]])
                points = np.stack([along * cos - side * sin, along * sin + side * cos], 1) + start
                pen.polygon(points.ravel().tolist(), fill=tuple(np.clip(tone * light, 0, 255).astype(int)))
    return image.filter(ImageFilter.GaussianBlur(0.6 if layers else 8))


def _backdrop(shot: Shot, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """The ground from above, or, to a camera near the ground, the ground below a forest out of focus."""
    width, height = size
    tile, smooth = _tile(shot.backdrop, int(rng.integers(2))), Image.Resampling.BILINEAR
    across, down = np.array(size) * TILE * rng.uniform(0.5, 0.8) / max(size)
    left, top = rng.uniform(0, TILE - across), rng.uniform(0, TILE - down)
    if not 0 < shot.elevation < np.radians(20) or shot.backdrop in ("wood", "paper"):
        return tile.resize(size, smooth, box=(left, top, left + across, top + down))
    corners = (0, top, left + 0.3 * across, top + down, left + 0.7 * across, top + down, TILE, top)
    horizon, ground = rng.uniform(0.4, 0.6), Image.new("RGB", size)
    near = tile.transform((width, max(1, round(height * (1.1 - horizon)))), Image.Transform.QUAD, corners, smooth)
    ground.paste(near, (0, height - near.height))
    far = _tile("forest", int(rng.integers(2))).resize(size, smooth, box=(left / 2, 0, left / 2 + TILE / 2, TILE / 2))
    rows = np.linspace(0, 1, height)[:, None] + 0.04 * _noise(rng, ((1, 12), (1, 60)), (width, 1))
    return Image.composite(ground, far, Image.fromarray((np.clip((rows - horizon) * 9, 0, 1) * 255).astype(np.uint8)))


def _develop(canvas: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """The photo of a scene: exposure, white balance, focus, tilt, and grain in the final pixels."""
    height, width = canvas.shape[:2]
    warmth, exposure = rng.normal(0, 0.08), np.exp(rng.normal(0.03, 0.2))
    canvas *= np.float32((1 + warmth, 1 + rng.normal(0, 0.015), 1 - warmth)) * np.float32(255 * exposure)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    image = image.filter(ImageFilter.BoxBlur(float(rng.choice([0.4, 0.4, 0.7, 1.2]))))
    # tilted, and cropped so far that no corner is empty
    zoom, tilt = 0.84 / size[0] * width, rng.uniform(-0.09, 0.09)
    cos, sin = zoom * np.cos(tilt), zoom * np.sin(tilt)
    left, top = width / 2 - (cos * size[0] - sin * size[1]) / 2, height / 2 - (sin * size[0] + cos * size[1]) / 2
    image = image.transform(size, Image.Transform.AFFINE, (cos, -sin, left, sin, cos, top), Image.Resampling.BILINEAR)
    pixels = np.asarray(image).astype(np.int16) + rng.integers(-7, 8, (*size[::-1], 1), np.int8)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
