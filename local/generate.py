"""Generates a competition shaped like FungiCLEF 2025: drawn fungi, the competition's folders, file names and columns.

    python local/generate.py --out data/generated --species 60 --seed 0
    python local/generate.py --out data/full-size --metadata PATH/TO/fungiclef2025

The first makes up species and observations. The second takes the competition's own metadata, which must lie at PATH,
and draws a photo for every row of it. Both leave `competition/` (what a competitor downloads), `solution.csv` (the test
answers, outside of it) and `contact-sheet.png`. Called by local/demo.py through `generate`; touches nothing outside
--out.
"""

import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from kernel.mounts import InputError
from kernel.observations import RESOLUTIONS
from local.console import command_parser, counted, run, say
from local.fungi import HUES, Traits, contact_sheet, draw, traits

SUBSET = "FungiTastic-FewShot"
SAMPLE = "FungiCLEF25-SAMPLE_SUBMISSION.csv"
COLUMNS = (
    "eventDate", "year", "month", "day", "habitat", "countryCode", "scientificName", "kingdom", "phylum", "class",
    "order", "family", "genus", "specificEpithet", "hasCoordinate", "species", "iucnRedListCategory", "substrate",
    "latitude", "longitude", "coorUncert", "observationID", "region", "district", "filename", "category_id",
    "metaSubstrate", "poisonous", "elevation", "landcover", "biogeographicalRegion",
)  # fmt: skip
HIDDEN_COLUMNS = (
    "scientificName", "kingdom", "phylum", "class", "order", "family", "genus", "specificEpithet", "species",
    "iucnRedListCategory", "category_id", "poisonous",
)  # fmt: skip
# share of classes with 1, 2, 3, ... observations
TRAIN_TAIL = (0.50, 0.22, 0.12, 0.06, 0.04, 0.02, 0.014, 0.01, 0.006, 0.004, 0.003, 0.003)
EVALUATION_TAIL = (0.56, 0.21, 0.12, 0.045, 0.026, 0.016, 0.014, 0.009)  # Val's own: 320, 119, 69, 26, ... of 570
PHOTOS_PER_OBSERVATION = (0.45, 0.30, 0.15, 0.10)
FEW_PHOTOS = 48  # below this, starting processes takes longer than drawing
JPEG_QUALITY = 88


@dataclass(frozen=True)
class Generated:
    """Where the parts of a generated competition lie."""

    competition: Path  # the folder that a competitor downloads
    solution: Path  # CSV: observationId, category_id of every test observation
    contact_sheet: Path  # PNG


@dataclass(frozen=True)
class _Photo:
    """One photo to draw; everything a process needs to know, so that the result does not depend on which one draws."""

    path: Path
    species: Traits
    specimen_seed: int
    photo_seed: int
    size: tuple[int, int]
    caption: Path


def generate(
    out: Path, species: int = 60, seed: int = 0, resolution: str = "300p", processes: int | None = None
) -> Generated:
    """Makes up a competition of `species` classes (2 to 2,427) under `out`, which must not exist.

    `resolution` is one of RESOLUTIONS; `processes` defaults to the number of cores and does not change the result, byte
    for byte. Raises InputError.
    """
    if not 2 <= species <= 2427:
        raise InputError(f"--species {species}: out of range; choose 2 to 2427")
    rng = np.random.default_rng([seed, 1])
    taxa = _taxa(species, seed, rng)
    tables = {
        "Train": _observations(taxa, np.arange(species), TRAIN_TAIL, 2021, rng),
        "Val": _observations(taxa, _share(species, 0.6, rng), EVALUATION_TAIL, 2022, rng),
        "Test": _observations(taxa, _share(species, 0.8, rng), EVALUATION_TAIL, 2023, rng),
    }
    known = {taxon.category_id: taxon.traits for taxon in taxa}

    def write_tables(competition: Path) -> None:
        folder = competition / "metadata" / SUBSET
        folder.mkdir(parents=True)
        for split, table in tables.items():
            shown = table.drop(columns=list(HIDDEN_COLUMNS)) if split == "Test" else table
            shown.to_csv(folder / f"{SUBSET}-{split}.csv", index=False, lineterminator="\n")
        ids = " ".join(str(i) for i in rng.choice(list(known), min(10, species), replace=False))
        observations = tables["Test"].observationID.drop_duplicates()
        sample = pd.DataFrame({"observationId": observations, "predictions": ids})
        sample.to_csv(competition / SAMPLE, index=False, lineterminator="\n")

    return _write(Path(out), tables, known, write_tables, seed, resolution, processes)


def generate_from_metadata(
    metadata: Path, out: Path, seed: int = 0, resolution: str = "300p", processes: int | None = None
) -> Generated:
    """Draws a photo for every row of the competition's own CSVs, found under `metadata` and copied as they are.

    The test observations' classes are not public: seeded ones are made up, with a long tail like Val's. Parameters and
    errors are those of `generate`.
    """
    source = Path(metadata)
    paths = {split: source / "metadata" / SUBSET / f"{SUBSET}-{split}.csv" for split in ("Train", "Val", "Test")}
    missing = [str(path) for path in (*paths.values(), source / SAMPLE) if not path.is_file()]
    if missing:
        raise InputError(f"--metadata {source}: no {missing[0]}; give the competition's folder as downloaded")
    tables = {split: pd.read_csv(path) for split, path in paths.items()}
    tables["Test"] = tables["Test"].assign(category_id=_hidden_classes(tables, np.random.default_rng([seed, 2])))
    classes = (
        pd.concat([tables["Train"], tables["Val"]]).drop_duplicates("category_id").fillna({"family": "", "genus": ""})
    )
    known = {
        int(row.category_id): traits(row.family or row.genus, row.genus, f"{row.species} {row.category_id}", seed)
        for row in classes.itertuples()  # the id is in the name because 14 species names carry two
    }

    def copy_tables(competition: Path) -> None:
        (competition / "metadata" / SUBSET).mkdir(parents=True)
        for path in paths.values():
            shutil.copyfile(path, competition / "metadata" / SUBSET / path.name)
        shutil.copyfile(source / SAMPLE, competition / SAMPLE)

    return _write(Path(out), tables, known, copy_tables, seed, resolution, processes)


def _hidden_classes(tables: dict[str, pd.DataFrame], rng: np.random.Generator) -> pd.Series:
    """A class for each row of Test, the same for all photos of an observation."""
    counts = tables["Val"].groupby("category_id").observationID.nunique().to_numpy()
    classes = rng.permutation(np.unique(tables["Train"].category_id))
    observations = rng.permutation(tables["Test"].observationID.unique())
    drawn = np.repeat(classes, rng.choice(counts, len(classes)))[: len(observations)]
    drawn = np.resize(drawn, len(observations))
    return tables["Test"].observationID.map(dict(zip(observations, drawn, strict=True))).astype(int)


# --- made-up species and observations ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Taxon:
    family: str
    genus: str
    epithet: str
    category_id: int
    traits: Traits
    habitats: tuple[str, ...]
    month: int  # in which it is seen most
    red_list: str
    poisonous: int


STEMS = (
    "Vel", "Lact", "Myc", "Amar", "Coral", "Pseud", "Rub", "Fulv", "Cort", "Lep", "Hygr", "Ino", "Tric", "Clav",
    "Psil", "Ram", "Entol", "Phyl", "Gal", "Xer", "Leucop", "Stro", "Gymn", "Cystod", "Ombr", "Thel", "Poly",
    "Crep", "Hemim",
)  # fmt: skip
LINKS = ("uti", "ari", "o", "ino", "ello", "eri", "u", "osti", "imo", "ado")
ENDINGS = (
    "cybe", "loma", "porus", "myces", "peziza", "phora", "ella", "omphalia", "derma", "stachys", "naria",
    "glossum",
)  # fmt: skip
EPITHETS = (
    "alba", "aurea", "rubescens", "viridula", "cinerea", "lutea", "fulva", "nigripes", "squamosa", "velutina",
    "gracilis", "robusta", "striata", "maculata", "autumnalis", "vernalis", "silvatica", "pratensis", "montana",
    "borealis", "umbrina", "pallida", "obscura", "splendens", "granulosa", "fragilis", "odorata", "mutabilis",
    "zonata", "rimosa", "verrucosa", "paludosa", "nana", "elegans", "ambigua", "inversa", "pelianthina",
    "saniosa", "helvola", "tenera",
)  # fmt: skip
AUTHORS = ("(Fr.) P.Kumm.", "(Pers.) Quél.", "Fr.", "(Bull.) Gray", "P.Karst.", "(Schaeff.) Singer", "J.E.Lange")
# ground: substrate, metaSubstrate, habitats
PLACES = {
    "moss": ("mosses", "mosses", ("Bog woodland", "Forest bog", "coniferous woodland/plantation")),
    "litter": (
        "leaf or needle litter",
        "plant material",
        ("Deciduous woodland", "Unmanaged deciduous woodland", "park/churchyard"),
    ),
    "grass": ("soil", "jord", ("natural grassland", "meadow", "lawn", "park/churchyard", "roadside")),
    "needles": (
        "leaf or needle litter",
        "plant material",
        ("coniferous woodland/plantation", "Unmanaged coniferous woodland", "heath"),
    ),
    "wood": (
        "dead wood (including bark)",
        "wood",
        ("Deciduous woodland", "Mixed woodland (with coniferous and deciduous trees)", "Willow scrubland", "garden"),
    ),
}
REGIONS = (
    ("Hovedstaden", "Gribskov", 55.95, 12.3),
    ("Hovedstaden", "Rudersdal", 55.82, 12.5),
    ("Sjælland", "Næstved", 55.23, 11.68),
    ("Midtjylland", "Silkeborg", 56.17, 9.55),
    ("Nordjylland", "Aalborg", 57.02, 9.92),
    ("Syddanmark", "Svendborg", 55.06, 10.6),
    ("Midtjylland", "Syddjurs", 56.25, 10.5),
    ("Sjælland", "Vordingborg", 55.0, 11.9),
)


def _taxa(species: int, seed: int, rng: np.random.Generator) -> list[_Taxon]:
    """Families of a few genera, genera of one to five species, each with an id of its own in no order."""
    ids = rng.choice(2427, species, replace=False)  # with gaps: a class id is a name, not an index
    genera: set[str] = set()
    taxa: list[_Taxon] = []
    while len(taxa) < species:
        family = ""
        for _ in range(int(rng.choice([1, 2, 2, 3]))):
            genus = _new_name(genera, rng)
            family = family or genus.rstrip("aeiou") + "aceae"
            count = min(int(rng.choice([1, 2, 3, 4, 5], p=[0.4, 0.22, 0.18, 0.12, 0.08])), species - len(taxa))
            taxa += _siblings(family, genus, ids[len(taxa) : len(taxa) + count], seed, rng)
    return taxa


def _new_name(taken: set[str], rng: np.random.Generator) -> str:
    while True:
        name = "".join(str(rng.choice(part)) for part in (STEMS, LINKS, ENDINGS)).replace("oo", "o")
        if name not in taken:
            taken.add(name)
            return name


def _siblings(family: str, genus: str, ids: Sequence[int], seed: int, rng: np.random.Generator) -> list[_Taxon]:
    """Species of one genus, each differing from every other in two marks of the cap or more."""
    epithets = [str(epithet) for epithet in rng.permutation(EPITHETS)]
    chosen: list[tuple[str, Traits]] = []
    for category_id in ids:
        for epithet in epithets:
            look = traits(family, genus, f"{genus} {epithet} {category_id}", seed)
            if all(
                sum(a != b for a, b in zip(look.marks[:5], other.marks[:5], strict=True)) >= 2 for _, other in chosen
            ):
                break
        epithets.remove(epithet)
        chosen.append((epithet, look))
    month = int(rng.choice([5, 8, 9, 9, 10, 10, 11]))
    return [
        _Taxon(
            family=family,
            genus=genus,
            epithet=epithet,
            category_id=int(category_id),
            traits=look,
            habitats=tuple(str(h) for h in rng.permutation(PLACES[look.ground][2])[:2]),
            month=int(np.clip(month + rng.integers(-1, 2), 1, 12)),
            red_list=str(rng.choice(["NE", "LC", "NT", "VU"], p=[0.94, 0.02, 0.02, 0.02])),
            poisonous=int(rng.random() < 0.03),
        )
        for category_id, (epithet, look) in zip(ids, chosen, strict=True)
    ]


def _share(species: int, share: float, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(species, max(1, round(share * species)), replace=False)


def _observations(
    taxa: list[_Taxon], indices: Iterable[int], tail: Sequence[float], year: int, rng: np.random.Generator
) -> pd.DataFrame:
    """One row per photo, all of COLUMNS; `tail` is the distribution of observations per class."""
    owners = [taxa[i] for i in indices for _ in range(1 + rng.choice(len(tail), p=np.divide(tail, sum(tail))))]
    first = {2021: 2_237_000_000, 2022: 3_460_000_000, 2023: 4_100_000_000}[year]
    ids = first + np.sort(rng.choice(9_000_000, len(owners), replace=False))
    rows = []
    for number, owner in zip(ids, rng.permutation(len(owners)), strict=True):
        row = _row(owners[owner], int(number), year, rng)
        photos = 1 + rng.choice(len(PHOTOS_PER_OBSERVATION), p=PHOTOS_PER_OBSERVATION)
        rows += [row | {"filename": f"{n}-{number}.JPG"} for n in range(photos)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _row(taxon: _Taxon, number: int, year: int, rng: np.random.Generator) -> dict:
    substrate, meta_substrate, _ = PLACES[taxon.traits.ground]
    year -= int(rng.integers(0, 8)) if year == 2021 else 0
    month, day = int(np.clip(round(rng.normal(taxon.month, 0.9)), 1, 12)), int(rng.integers(1, 29))
    region, district, latitude, longitude = REGIONS[rng.integers(len(REGIONS))]
    name = f"{taxon.genus} {taxon.epithet}"
    return {
        "eventDate": f"{year}-{month:02d}-{day:02d}",
        "year": year if year < 2022 else float(year),
        "month": float(month),
        "day": float(day),
        "habitat": taxon.habitats[int(rng.random() < 0.3)],
        "countryCode": "DK",
        "scientificName": f"{name} {AUTHORS[taxon.category_id % len(AUTHORS)]}",
        "kingdom": "Fungi",
        "phylum": "Ascomycota" if taxon.traits.form in ("cup", "club") else "Basidiomycota",
        "class": {"cup": "Pezizomycetes", "club": "Geoglossomycetes"}.get(taxon.traits.form, "Agaricomycetes"),
        "order": taxon.family.removesuffix("aceae") + "ales",
        "family": taxon.family,
        "genus": taxon.genus,
        "specificEpithet": taxon.epithet,
        "hasCoordinate": True,
        "species": name,
        "iucnRedListCategory": taxon.red_list,
        "substrate": substrate if rng.random() < 0.8 else "soil" if rng.random() < 0.7 or year > 2021 else None,
        "latitude": round(latitude + rng.normal(0, 0.08), 6),
        "longitude": round(longitude + rng.normal(0, 0.12), 6),
        "coorUncert": float(rng.choice([5, 10, 25, 50, 250])),
        "observationID": number,
        "region": region,
        "district": district,
        "category_id": taxon.category_id,
        "metaSubstrate": meta_substrate,
        "poisonous": taxon.poisonous,
        "elevation": float(max(0, round(rng.normal(30, 30)))),
        "landcover": float(rng.choice([1, 5, 8, 9, 10, 12, 17])),
        "biogeographicalRegion": "continental" if longitude > 9.6 else "atlantic",
    }


# --- writing -----------------------------------------------------------------------------------------------------


def _write(
    out: Path,
    tables: dict[str, pd.DataFrame],
    known: dict[int, Traits],
    write_tables: Callable[[Path], None],
    seed: int,
    resolution: str,
    processes: int | None,
) -> Generated:
    """Writes all of `out` under another name beside it, then renames: what bears the name is complete."""
    if resolution not in RESOLUTIONS:
        raise InputError(f"--resolution {resolution}: unknown; choose one of {', '.join(RESOLUTIONS)}")
    if out.exists():
        raise InputError(f"--out {out}: exists already; remove it or choose another folder")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        competition = partial / "competition"
        write_tables(competition)
        jobs = [
            job for split, table in tables.items() for job in _jobs(competition, split, table, known, seed, resolution)
        ]
        _draw_all(jobs, processes)
        answers = tables["Test"].drop_duplicates("observationID")[["observationID", "category_id"]]
        answers = answers.rename(columns={"observationID": "observationId"})
        answers.to_csv(partial / "solution.csv", index=False, lineterminator="\n")
        _write_contact_sheet(partial / "contact-sheet.png", competition, tables, resolution)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Generated(out / "competition", out / "solution.csv", out / "contact-sheet.png")


def _jobs(
    competition: Path, split: str, table: pd.DataFrame, known: dict[int, Traits], seed: int, resolution: str
) -> list[_Photo]:
    images = competition / "images" / SUBSET / split.lower() / resolution
    captions = competition / "captions" / split.lower()
    images.mkdir(parents=True)
    captions.mkdir(parents=True)
    jobs = []
    for row in table.itertuples():
        rng = np.random.default_rng([seed, 3, row.observationID])  # one observation, one camera
        number = int(row.filename.split("-")[0])
        size = _size(resolution, split, rng, np.random.default_rng([seed, 4, row.observationID, number]))
        jobs.append(
            _Photo(
                path=images / row.filename,
                species=known[row.category_id],
                specimen_seed=seed * 2**40 + row.observationID,
                photo_seed=number,
                size=size,
                caption=captions / f"{row.filename}.json",
            )
        )
    return jobs


def _size(resolution: str, split: str, camera: np.random.Generator, photo: np.random.Generator) -> tuple[int, int]:
    """(width, height): the proportions of cameras and phones, landscape two times in three."""
    ratio = camera.choice([4 / 3, 3 / 2, 16 / 9, 1.0], p=[0.62, 0.24, 0.09, 0.05])
    if resolution == "fullsize":
        # fitted to the competition's: 1340 x 1037 on average in train, larger in test, rarely 6000 x 8000
        longer = min(4600.0, float(np.exp(camera.normal(np.log(1660 if split == "Test" else 1330), 0.33))))
        if camera.random() < 0.001:
            longer, ratio = 8000.0, 4 / 3
        shorter = round(longer / ratio)
    else:
        shorter = int(resolution.removesuffix("p"))
    longer = round(shorter * ratio)
    return (longer, shorter) if photo.random() < 0.67 else (shorter, longer)


def _draw_all(jobs: list[_Photo], processes: int | None) -> None:
    processes = processes or os.cpu_count() or 1
    if processes == 1 or len(jobs) < FEW_PHOTOS:
        _report(map(_draw_one, jobs), len(jobs))
        return
    # spawn everywhere: a caller that has torch's threads running must not be forked
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        _report(pool.map(_draw_one, jobs, chunksize=16), len(jobs))


def _draw_one(job: _Photo) -> None:
    image = draw(job.species, job.specimen_seed, job.photo_seed, job.size)
    image.save(job.path, "JPEG", quality=JPEG_QUALITY)
    job.caption.write_text(json.dumps(_caption(job.species)), encoding="utf-8")


def _report(drawn: Iterable[None], total: int) -> None:
    """Consumes `drawn`, showing progress: a bar on a terminal, a line for every tenth elsewhere."""
    if sys.stderr.isatty():
        for _ in tqdm(drawn, total=total, unit="photo", desc="drawing"):
            pass
        return
    for n, _ in enumerate(drawn, 1):
        if n * 10 // total != (n - 1) * 10 // total:
            print(f"drawing: {n} of {counted(total, 'photo')}", file=sys.stderr, flush=True)


def _caption(species: Traits) -> str:
    """What a caption model would say: the form and a broad colour, from which no class can be told."""
    names = (  # in the order of HUES
        "red", "orange", "ochre", "ochre", "yellow", "brown", "brown", "brown", "dark", "cream", "cream",
        "white", "grey", "olive", "violet", "pink", "greenish",
    )  # fmt: skip
    value = max(species.cap_colour)
    saturation = (value - min(species.cap_colour)) / value
    hue = (
        Image.new("RGB", (1, 1), tuple(int(255 * c) for c in species.cap_colour)).convert("HSV").getpixel((0, 0))[0]
        / 255
    )
    gaps = [
        abs((hue - h + 0.5) % 1 - 0.5) * 4 * min(s, saturation) + abs(saturation - s) + 0.7 * abs(value - v)
        for h, s, v in HUES
    ]
    noun = {
        "bracket": "bracket fungus",
        "puffball": "puffball",
        "cup": "cup fungus",
        "coral": "coral fungus",
        "club": "club fungus",
    }
    place = {"moss": "moss", "litter": "fallen leaves", "grass": "grass", "needles": "needle litter", "wood": "wood"}[
        species.ground
    ]
    many = ("A {} {} growing", "Several {} {}s growing", "A cluster of {} {}s growing")[species.company - 1]
    text = many.format(names[int(np.argmin(gaps))], noun.get(species.form, "mushroom")).replace("funguss", "fungi")
    text = text.replace("A o", "An o")
    return f"{text} among {place}." if place != "wood" else f"{text} on {place}."


def _write_contact_sheet(
    path: Path, competition: Path, tables: dict[str, pd.DataFrame], resolution: str, species: int = 24
) -> None:
    """The species of the richest genera, with the train and val photos they have."""
    table = pd.concat([tables[split].assign(split=split.lower()) for split in ("Train", "Val")])
    genera = table.groupby("genus").category_id.nunique().sort_values(ascending=False, kind="stable").index
    rows = []
    for genus in genera:
        for category_id, photos in table[table.genus == genus].groupby("category_id"):
            files = [
                competition / "images" / SUBSET / p.split / resolution / p.filename for p in photos.head(8).itertuples()
            ]
            rows.append(
                (
                    f"{photos.species.iloc[0]}\n{photos.family.iloc[0]}\nclass {category_id}",
                    [_thumbnail(f) for f in files],
                )
            )
        if len(rows) >= species:
            break
    contact_sheet(path, rows[:species])


def _thumbnail(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.draft("RGB", (320, 320))
        image.thumbnail((320, 320))
        return image.copy()


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--species", type=int, default=60, help="classes to make up, without --metadata (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: 0)")
    parser.add_argument("--resolution", choices=RESOLUTIONS, default="300p", help="of the photos (default: 300p)")
    parser.add_argument(
        "--metadata", type=Path, help="the competition's folder: draw every row of its CSVs (default: none)"
    )
    parser.add_argument("--processes", type=int, help="that draw (default: one for each core)")
    options = parser.parse_args()
    shared = {
        "out": options.out,
        "seed": options.seed,
        "resolution": options.resolution,
        "processes": options.processes,
    }
    if options.metadata:
        generated = generate_from_metadata(options.metadata, **shared)
    else:
        generated = generate(species=options.species, **shared)
    for name in ("competition", "solution", "contact_sheet"):
        say(f"{name.replace('_', ' '):14}{getattr(generated, name)}")


if __name__ == "__main__":
    run(main)
