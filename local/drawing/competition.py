"""Draw a competition in the layout of FungiCLEF 2025.

`generate` makes up species, observations and metadata; `generate_from_metadata` takes those of the competition. Both
write `competition/` (what a competitor downloads) and `solution.csv` (the test labels).
"""

import itertools
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kernel.inputs import InputError
from kernel.tables import RESOLUTIONS
from local.base.console import progress
from local.drawing.fungi import Traits, draw, traits

if TYPE_CHECKING:
    import pandas as pd

SUBSET = "FungiTastic-FewShot"
SAMPLE = "FungiCLEF25-SAMPLE_SUBMISSION.csv"
SPLITS = ("Train", "Val", "Test")
MAX_SPECIES = 2427
COLUMNS = (
    "eventDate year month day habitat countryCode scientificName kingdom phylum class order family genus "
    "specificEpithet hasCoordinate species iucnRedListCategory substrate latitude longitude coorUncert observationID "
    "region district filename category_id metaSubstrate poisonous elevation landcover biogeographicalRegion"
)
# fractions of classes with 1, 2, 3, ... observations, as in the competition
TRAIN_TAIL = (0.50, 0.22, 0.12, 0.06, 0.04, 0.02, 0.014, 0.01, 0.006, 0.004, 0.003, 0.003)
EVALUATION_TAIL = (0.56, 0.21, 0.12, 0.045, 0.026, 0.016, 0.014, 0.009)
PHOTOS_PER_OBSERVATION = (0.45, 0.30, 0.15, 0.10)  # fractions of observations with 1, 2, 3, 4 photos
FEW_PHOTOS = 1000  # fewer are drawn faster in one process
STEMS = "Vel Lact Myc Amar Coral Pseud Rub Fulv Cort Lep Hygr Ino Tric Clav Psil Ram Entol Phyl Gal Xer Stro Gymn"
LINKS = "uti ari o ino ello eri u osti imo ado"
ENDINGS = "cybe loma porus myces peziza phora ella omphalia derma stachys naria"
EPITHETS = """alba aurea rubescens viridula cinerea lutea fulva nigripes squamosa velutina gracilis robusta striata
    maculata autumnalis vernalis silvatica pratensis montana borealis umbrina pallida obscura splendens"""
# by ground: substrate, metaSubstrate, habitats
SURROUNDINGS = {
    "moss": ("mosses", "mosses", ("Bog woodland", "Forest bog", "coniferous woodland/plantation")),
    "litter": ("leaf or needle litter", "plant material", ("Deciduous woodland", "park/churchyard", "garden")),
    "grass": ("soil", "jord", ("natural grassland", "meadow", "lawn", "park/churchyard", "roadside")),
    "needles": ("leaf or needle litter", "plant material", ("coniferous woodland/plantation", "heath")),
    "wood": ("dead wood (including bark)", "wood", ("Deciduous woodland", "Willow scrubland", "garden")),
}
DISTRICTS = (  # region, district, latitude, longitude
    ("Hovedstaden", "Gribskov", 55.95, 12.3), ("Sjælland", "Næstved", 55.23, 11.68),
    ("Midtjylland", "Silkeborg", 56.17, 9.55), ("Nordjylland", "Aalborg", 57.02, 9.92),
    ("Syddanmark", "Svendborg", 55.06, 10.6), ("Midtjylland", "Syddjurs", 56.25, 10.5),
)  # fmt: skip


@dataclass(frozen=True)
class Generated:
    """A competition as a competitor downloads it, and the CSV of its test labels: observationId, category_id."""

    competition: Path
    solution: Path


@dataclass(frozen=True)
class Species:
    """A made-up species."""

    columns: dict  # of the tables; they are the labels, and missing in the test table
    traits: Traits
    habitats: list[str]  # the usual one first
    month: int  # in which most are found


def generate(out: Path, species: int = 60, seed: int = 0, resolution: str = RESOLUTIONS[0]) -> Generated:
    """Make up a competition of 2 to 2,427 species in the new folder `out`. The same seed gives the same bytes.

    Raises:
        InputError: a value is out of range, or `out` exists.
    """
    check_numbers(species, seed)
    _check_is_new(out)
    import pandas as pd  # here, because it takes half a second, and mistakes must be answered immediately

    rng = np.random.default_rng([seed, 1])
    kinds = _species(species, seed, rng)
    evaluated = [rng.choice(kinds, round(fraction * species), replace=False) for fraction in (0.6, 0.8)]
    tables = {
        "Train": _observations(kinds, TRAIN_TAIL, 2021, rng),
        "Val": _observations(evaluated[0], EVALUATION_TAIL, 2022, rng),
        "Test": _observations(evaluated[1], EVALUATION_TAIL, 2023, rng),
    }
    tables = {split: pd.DataFrame(rows)[COLUMNS.split()] for split, rows in tables.items()}
    looks = {kind.columns["category_id"]: kind.traits for kind in kinds}
    ids = " ".join(map(str, rng.choice(list(looks), min(10, species), replace=False)))
    sample = pd.DataFrame({"observationId": tables["Test"].observationID.unique(), "predictions": ids})
    files = {_table(split): table for split, table in tables.items()} | {SAMPLE: sample}
    files[_table("Test")] = tables["Test"].drop(columns=list(kinds[0].columns))
    texts = {path: table.to_csv(index=False, lineterminator="\n").encode() for path, table in files.items()}
    return _write(out, texts, tables, looks, seed, resolution)


def generate_from_metadata(metadata: Path, out: Path, seed: int = 0, resolution: str = RESOLUTIONS[0]) -> Generated:
    """Draw a photo for every row of the tables in the competition's folder `metadata`, and copy the tables.

    The test labels are not public; they are made up with the tail of val.

    Raises:
        InputError: a table is missing; see also `generate`.
    """
    check_numbers(MAX_SPECIES, seed)
    sources = {path: metadata / path for path in (*map(_table, SPLITS), SAMPLE)}
    for path in sources.values():
        if not path.is_file():
            raise InputError(f"--metadata: {path} does not exist; give the competition's folder as downloaded")
    _check_is_new(out)
    import pandas as pd  # see `generate`

    tables = {split: pd.read_csv(sources[_table(split)]) for split in SPLITS}
    train, val, test = tables.values()
    rng = np.random.default_rng([seed, 2])
    counts = val.groupby("category_id").observationID.nunique().to_numpy()
    classes = rng.permutation(train.category_id.unique())
    observations = rng.permutation(test.observationID.unique())
    labels = np.resize(np.repeat(classes, rng.choice(counts, len(classes))), len(observations))
    labels = test.observationID.map(dict(zip(observations, labels, strict=True)))
    tables["Test"] = test.assign(category_id=labels.astype(int))
    rows = pd.concat([train, val]).drop_duplicates("category_id").fillna({"family": "", "genus": ""})
    looks = {  # the id is part of the name, because a few classes share a name
        row.category_id: traits(row.family or row.genus, row.genus, f"{row.species} {row.category_id}", seed)
        for row in rows.itertuples()
    }
    texts = {name: path.read_bytes() for name, path in sources.items()}
    return _write(out, texts, tables, looks, seed, resolution)


def check_numbers(species: int, seed: int) -> None:
    """Raise an InputError if a number is out of range."""
    if not 2 <= species <= MAX_SPECIES:
        raise InputError(f"--species: expected 2 to {MAX_SPECIES}, got {species}")
    if seed < 0:
        raise InputError(f"--seed: expected 0 or more, got {seed}")


def _check_is_new(out: Path) -> None:
    if out.exists():
        raise InputError(f"--out: {out} exists already; remove it or choose another folder")


def _table(split: str) -> str:
    return f"metadata/{SUBSET}/{SUBSET}-{split}.csv"


def _names(rng: np.random.Generator) -> Iterable[tuple[str, str, str, int]]:
    """Family, genus, epithet and month of the genus: one to three genera a family, one to five species a genus."""
    parts = itertools.product(STEMS.split(), LINKS.split(), ENDINGS.split())
    genera_left = 0
    for genus in rng.permutation(["".join(name) for name in parts]).tolist():
        if not genera_left:
            family, genera_left = genus.rstrip("aeiou"), rng.integers(1, 4)
        genera_left -= 1
        month, size = rng.choice([5, 8, 9, 9, 10, 10, 11]), rng.choice([1, 2, 3, 4, 5], p=[0.4, 0.22, 0.18, 0.12, 0.08])
        for epithet in rng.choice(EPITHETS.split(), size, replace=False).tolist():
            yield family, genus, epithet, month


def _species(count: int, seed: int, rng: np.random.Generator) -> list[Species]:
    kinds = []
    ids = rng.choice(MAX_SPECIES, count, replace=False).tolist()  # in no order and with gaps
    for category_id, (family, genus, epithet, month) in zip(ids, _names(rng), strict=False):
        name = f"{genus} {epithet}"
        look = traits(family, genus, name, seed)
        phylum = "Ascomycota" if look.form in ("cup", "club") else "Basidiomycota"
        columns = {
            "scientificName": f"{name} Fr.", "kingdom": "Fungi", "phylum": phylum,
            "class": phylum.replace("mycota", "mycetes"), "order": f"{family}ales", "family": f"{family}aceae",
            "genus": genus, "specificEpithet": epithet, "species": name, "iucnRedListCategory": "NE",
            "category_id": category_id, "poisonous": 0,
        }  # fmt: skip
        habitats = rng.permutation(SURROUNDINGS[look.ground][2])[:2].tolist()
        kinds.append(Species(columns, look, habitats, int(np.clip(month + rng.integers(-1, 2), 1, 12))))
    return kinds


def _observations(kinds: Sequence[Species], tail: Sequence[float], year: int, rng: np.random.Generator) -> list[dict]:
    """A row for each photo; `tail` is the distribution of observations per class."""
    counts = 1 + rng.choice(len(tail), len(kinds), p=np.divide(tail, sum(tail)))
    labels = rng.permutation(np.repeat(np.arange(len(kinds)), counts))
    numbers = year * 1_000_000 + np.sort(rng.choice(1_000_000, len(labels), replace=False))
    rows = []
    for number, label in zip(numbers.tolist(), labels, strict=True):
        row = kinds[label].columns | _metadata(kinds[label], year, rng) | {"observationID": number}
        photos = 1 + rng.choice(len(PHOTOS_PER_OBSERVATION), p=PHOTOS_PER_OBSERVATION)
        rows += [row | {"filename": f"{n}-{number}.JPG"} for n in range(photos)]
    return rows


def _metadata(kind: Species, year: int, rng: np.random.Generator) -> dict:
    substrate, meta_substrate, _ = SURROUNDINGS[kind.traits.ground]
    # Only train has earlier years, and has integers.
    year = year - int(rng.integers(8)) if year == 2021 else float(year)
    month, day = np.clip(round(rng.normal(kind.month, 0.9)), 1, 12), rng.integers(1, 29)
    region, district, latitude, longitude = DISTRICTS[rng.integers(len(DISTRICTS))]
    return {
        "eventDate": f"{year:.0f}-{month:02.0f}-{day:02.0f}", "year": year, "month": float(month), "day": float(day),
        "habitat": kind.habitats[int(rng.random() < 0.3)], "countryCode": "DK", "hasCoordinate": True,
        "substrate": rng.choice([substrate, "soil", None], p=[0.8, 0.14, 0.06]), "metaSubstrate": meta_substrate,
        "latitude": round(latitude + rng.normal(0, 0.08), 6), "longitude": round(longitude + rng.normal(0, 0.12), 6),
        "coorUncert": float(rng.choice([5, 10, 25, 50, 250])), "region": region, "district": district,
        "elevation": float(rng.integers(90)), "landcover": float(rng.choice([1, 5, 8, 9, 10, 12, 17])),
        "biogeographicalRegion": "continental" if longitude > 9.6 else "atlantic",
    }  # fmt: skip


def _write(
    out: Path, files: dict[str, bytes], tables: "dict[str, pd.DataFrame]", looks: dict[int, Traits], seed: int,
    resolution: str,
) -> Generated:  # fmt: skip
    """Write all into a folder beside `out` and rename it at the end, so that `out` is complete or absent."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    photos = {split: partial / "competition" / "images" / SUBSET / split.lower() / resolution for split in SPLITS}
    try:
        for folder in (*photos.values(), (partial / "competition" / _table("Test")).parent):
            folder.mkdir(parents=True)
        for path, text in files.items():
            (partial / "competition" / path).write_bytes(text)
        _draw_all([job for split in SPLITS for job in _jobs(photos[split], tables[split], looks, seed)])
        labels = tables["Test"].drop_duplicates("observationID")[["observationID", "category_id"]]
        labels = labels.rename(columns={"observationID": "observationId"})
        labels.to_csv(partial / "solution.csv", index=False, lineterminator="\n")
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Generated(out / "competition", out / "solution.csv")


def _jobs(photos: Path, table: "pd.DataFrame", looks: dict[int, Traits], seed: int) -> Iterable[tuple]:
    """The path of each photo and the arguments of `draw`."""
    for row in table.itertuples():
        number = int(row.filename.split("-")[0])
        camera = np.random.default_rng([seed, 3, row.observationID])  # the same for all photos of an observation
        ratio = camera.choice([4 / 3, 3 / 2, 16 / 9, 1.0], p=[0.62, 0.24, 0.09, 0.05])
        shorter = int(photos.name.removesuffix("p"))
        size = round(shorter * ratio), shorter
        upright = np.random.default_rng([seed, 4, row.observationID, number]).random() < 0.33
        specimen = seed * 2**40 + row.observationID
        yield photos / row.filename, looks[row.category_id], specimen, number, size[::-1] if upright else size


def _draw_all(jobs: list[tuple]) -> None:
    # spawn, because the threads of the caller must not be forked
    pool = ProcessPoolExecutor(mp_context=get_context("spawn")) if len(jobs) >= FEW_PHOTOS else None
    with pool or nullcontext():
        drawn = pool.map(_draw_one, jobs, chunksize=16) if pool else map(_draw_one, jobs)
        for _ in progress(drawn, "drawing", len(jobs), unit="photo"):
            pass


def _draw_one(job: tuple) -> None:
    path, *arguments = job
    draw(*arguments).save(path, "JPEG", quality=88)
