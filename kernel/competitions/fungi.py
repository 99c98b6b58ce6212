"""FungiCLEF 2025, and FungiTastic, the data set from which it was taken.

FungiCLEF25-SAMPLE_SUBMISSION.csv                          observationId,predictions: ten class ids
metadata/FungiTastic-FewShot/FungiTastic-FewShot-Test.csv  a row per photo; Train and Val have category_id too
images/FungiTastic-FewShot/test/300p/1-42.JPG              also 500p, 720p and fullsize

FungiTastic has the folders metadata/SUBSET and SUBSET/test/300p, and tables with the labels of the test set too.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kernel.competitions.competition import AnswerForm, Competition, CompetitionFolder, LabelledPhoto, PhotoRow
from kernel.inputs import InputError
from kernel.tables import (
    RESOLUTIONS,
    TAXONOMY,
    clean_id,
    format_table,
    is_blank,
    iterate_table,
    photo_name,
    read_table,
    visible,
)

METADATA = (
    "year", "month", "day", "latitude", "longitude", "elevation", "landcover", "countryCode", "district",
    "biogeographicalRegion", "habitat", "substrate", "metaSubstrate",
)  # fmt: skip
# Columns that tell the class of an observation. FungiCLEF's test table lacks them.
LABELS = (
    "category_id", "scientificName", "species", "specificEpithet", *TAXONOMY, "kingdom", "poisonous",
    "iucnRedListCategory",
)  # fmt: skip


def _read_rows(found: CompetitionFolder, left_out: Counter) -> list[PhotoRow]:
    rows = read_table(found.table, ("observationID", "filename"), filled=("observationID",), left_out=left_out)
    # A row that breaks off before the file's name still needs a prediction.
    return [
        PhotoRow(clean_id(row["observationID"]), "" if is_blank(row["filename"]) else photo_name(row["filename"]), row)
        for row in rows
    ]


# The kernel does not need the functions below. Training reads the labelled photos, and the rehearsal writes test sets.


def _read_labelled(found: CompetitionFolder, resolution: str, left_out: Counter) -> list[LabelledPhoto]:
    table, needed = found.table, ("observationID", "filename", "category_id")
    tables = {
        "train": table.with_name(table.name.replace("-ClosedSet", "").replace("-Test", "-Train")),
        "val": table.with_name(table.name.replace("-Test", "-Val")),
    }
    photos: list[LabelledPhoto] = []
    shared: dict = {}  # equal texts, taxa and metadata are one object each: they repeat in thousands of rows
    for split, path in tables.items():
        if split == "val" and not path.is_file():
            continue
        folder, metadata, too_long = found.photo_folder(split, resolution), {}, None
        for row in iterate_table(path, needed, filled=needed, left_out=left_out):
            if any(row.get(None, ())):  # cells beyond the header, so that the others may be in wrong columns
                too_long = too_long or row["observationID"]
            texts = [shared.setdefault(text, text) for text in [row.get(column) or "" for column in METADATA]]
            if texts != list(metadata.values()):  # photos of one observation follow one another
                metadata = dict(zip(METADATA, texts, strict=True))
            taxa, species = tuple(row.get(rank) or "" for rank in TAXONOMY), row.get("species") or ""
            species, class_id = species or row.get("scientificName") or "", clean_id(row["category_id"])
            photo = LabelledPhoto(
                split,
                clean_id(row["observationID"]),
                shared.setdefault(class_id, class_id),
                folder / photo_name(row["filename"]),
                metadata,
                shared.setdefault(taxa, taxa),
                shared.setdefault(species, species),
                row.get("poisonous") or "",
            )
            photos.append(photo)
        if too_long:
            raise InputError(
                f"{path}, observation {too_long}: the row has more cells than columns; put quotes around the cell "
                "with a comma"
            )
    return photos


def _format_tables(found: CompetitionFolder, rows: Sequence[PhotoRow]) -> dict[Path, bytes]:
    cells = [{**row.cells, "observationID": row.observation, "filename": row.photo} for row in rows]
    return {found.table: format_table(list(cells[0]), cells)}


def _visible_tables(found: CompetitionFolder) -> dict[Path, bytes | None]:
    """Kaggle mounts the tables of all splits."""
    tables = {}
    for path in visible(found.table.parent.glob("*.csv")):
        tables[path] = None
        if path.name.endswith("-Test.csv"):
            rows = read_table(path, ())
            columns = list(rows[0]) if rows else []
            if set(columns) & set(LABELS):
                tables[path] = format_table([name for name in columns if name not in LABELS], rows)
    return tables


_FUNGICLEF = Competition(
    name="fungiclef",
    slug="fungi-clef-2025",
    table="metadata/*/*-Test.csv",
    photos="images/{subset}/{split}",
    resolutions=RESOLUTIONS,
    sample="*SAMPLE_SUBMISSION*.csv",
    form=AnswerForm(("observationId", "predictions"), guesses=10),  # the metadata spells it observationID
    metric="recall_at_5",
    time_limit=12 * 3600,
    leaderboard=(226, 773),
    solution_columns=("observationID", "category_id"),
    metadata=METADATA,
    read_rows=_read_rows,
    read_labelled=_read_labelled,
    format_tables=_format_tables,
    visible_tables=_visible_tables,
)
# The tables of all subsets are downloaded together, their photos one by one. [!A] passes over DNA-Test, and
# ClosedSet-Test comes before OpenSet-Test. FungiTastic's benchmark reports top-1 accuracy first
# (https://bohemianvra.github.io/FungiTastic/benchmarks/closed).
COMPETITIONS = (
    _FUNGICLEF,
    *(
        replace(
            _FUNGICLEF,
            name=subset.lower(),
            slug="",
            table=f"metadata/{subset}/*[!A]-Test.csv",
            photos="{subset}/{split}",
            metric="recall_at_1",
            time_limit=9 * 3600,
            leaderboard=(),
        )
        for subset in ("FungiTastic", "FungiTastic-Mini", "FungiTastic-FewShot")
    ),
)
