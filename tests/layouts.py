"""A small folder of every competition, as downloaded, with photos: three classes, four test observations of each."""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image

from tests.conftest import photo

# Of each class its phylum, class, order, family, genus and species.
SPECIES = {
    "7": ("Basidiomycota", "Agaricomycetes", "Agaricales", "Amanitaceae", "Amanita", "Amanita muscaria"),
    "12": ("Basidiomycota", "Agaricomycetes", "Boletales", "Boletaceae", "Boletus", "Boletus edulis"),
    "340": ("Ascomycota", "Pezizomycetes", "Pezizales", "Morchellaceae", "Morchella", "Morchella elata"),
}
COLUMNS = (
    "observationID", "filename", "habitat", "phylum", "class", "order", "family", "genus", "species", "category_id",
)  # fmt: skip
TEST_OBSERVATIONS = 4  # of each class


def write_csv(path: Path, rows: Iterable[Sequence[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def fungiclef(folder: Path) -> None:
    """FungiCLEF 2025. Observations have one photo or two, and come in no order; the test table has no labels."""
    subset = "FungiTastic-FewShot"
    counts = {"Train": ("train", 2), "Val": ("val", 1), "Test": ("test", TEST_OBSERVATIONS)}
    for first, (name, (split, count)) in enumerate(counts.items()):
        rows = []
        for number in range(count):
            for label, ranks in SPECIES.items():
                observation = f"{9 - number}{first}{label}"
                for index in range(1 + number % 2):
                    file = f"{index}-{observation}.JPG"
                    rows.append((observation, file, "garden", *ranks, label))
                    photo(folder / "images" / subset / split / "300p" / file, int(label), format="JPEG")
        columns = COLUMNS[:3] if split == "test" else COLUMNS
        write_csv(
            folder / "metadata" / subset / f"{subset}-{name}.csv", [columns, *(row[: len(columns)] for row in rows)]
        )
    answered = dict.fromkeys(row[0] for row in rows)
    sample = [("observationId", "predictions"), *((observation, "7 12 340") for observation in answered)]
    write_csv(folder / "FungiCLEF25-SAMPLE_SUBMISSION.csv", sample)


def fungitastic(folder: Path, subset: str = "FungiTastic-Mini", resolutions: Sequence[str] = ("300p",)) -> Path:
    """FungiTastic with the tables of all subsets and the photos of one; returns the labelled test table."""
    closed, opened = ("ClosedSet-", "OpenSet-") if subset == "FungiTastic" else ("", "")
    tables = {"Train": ("train", 2), f"{closed}Val": ("val", 1), f"{closed}Test": ("test", TEST_OBSERVATIONS)}
    for first, (name, (split, count)) in enumerate(tables.items()):
        rows = []
        for number in range(count):
            for label, ranks in SPECIES.items():
                observation = f"{first}{number}{label}"
                for index in range(1 + number % 2):
                    file = f"{index}-{observation}.JPG"
                    rows.append((observation, file, "garden", *ranks, label))
                    for resolution in resolutions:
                        photo(folder / subset / split / resolution / file, int(label), format="JPEG")
        write_csv(folder / "metadata" / subset / f"{subset}-{name}.csv", [COLUMNS, *rows])
    foreign = [("999", "0-999.JPG", "garden", *[""] * 6, "-1")]
    for name in ("DNA-Test", *([f"{opened}Val", f"{opened}Test"] if opened else [])):
        write_csv(folder / "metadata" / subset / f"{subset}-{name}.csv", [COLUMNS, *foreign])
    for other in {"FungiTastic-FewShot", "FungiTastic-Mini"} - {subset}:
        for name in ("Train", "Val", "Test"):
            write_csv(folder / "metadata" / other / f"{other}-{name}.csv", [COLUMNS, *foreign])
    return folder / "metadata" / subset / f"{subset}-{closed}Test.csv"


def herbarium(folder: Path, year: int) -> Path:
    """Herbarium 2020, 2021 or 2022, whose tables differ in path, encoding and the names of ids; returns a solution."""
    split_folder = {2020: "nybg2020/{}", 2021: "{}", 2022: "{}_images"}[year]
    identity = {"image": "image_id", "category": "category_id"} if year == 2022 else {"image": "id", "category": "id"}
    images, answers = {"train": [], "test": []}, []
    annotations = []
    for split, count in (("train", 3), ("test", TEST_OBSERVATIONS)):
        for number in range(count):
            for label in SPECIES:
                image = len(images[split]) if split == "test" or year != 2022 else f"{label:0>5}__{number:03}"
                name = f"000/{label}/{image}.jpg" if year == 2022 else f"images/000/{label}/{image}.jpg"
                images[split].append({identity["image"]: image, "file_name": name, "license": 0})
                photo(folder / split_folder.format(split) / name, int(label))
                if split == "train":
                    annotations.append({"image_id": image, "category_id": int(label), "institution_id": 0})
                else:
                    answers.append((str(image), label))
    named = {2020: ("family", "genus"), 2021: ("order", "family"), 2022: ("family", "genus", "species")}[year]
    ranks = ("phylum", "class", "order", "family", "genus", "species")
    categories = [
        {identity["category"]: int(label)} | {rank: dict(zip(ranks, taxa, strict=True))[rank] for rank in named}
        for label, taxa in SPECIES.items()
    ]
    institutions = [{"id": 0, "name": "Jardín Botánico"}]
    train = {"annotations": annotations, "categories": categories, "images": images["train"]}
    tables = {
        "train": train | {"institutions": institutions},
        "test": images["test"] if year == 2022 else {"images": images["test"], "info": {"description": "Café"}},
    }
    for split, table in tables.items():
        path = folder / (f"{split}_metadata.json" if year == 2022 else f"{split_folder.format(split)}/metadata.json")
        path.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8" if year == 2022 else "ISO-8859-1")
    write_csv(folder / "sample_submission.csv", [("Id", "Predicted"), *((image, "7") for image, _ in answers)])
    return write_csv(folder / "solution.csv", [("Id", "Predicted"), *answers])


COLOURS = {"7": (200, 40, 40), "12": (40, 150, 60), "340": (60, 60, 190)}  # of plants: parts of one look like the whole


def plants(path: Path, labels: Sequence[str], shade: int) -> None:
    """A photo of one plant, or of one beside the other, each in the colour of its species, brighter by a shade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (120, 120))
    width = 120 // len(labels)
    for index, label in enumerate(labels):
        colour = tuple(value + shade for value in COLOURS[label])
        picture.paste(colour, (index * width, 0, (index + 1) * width, 120))
    picture.save(path, quality=95)


def plantclef(
    folder: Path, has_test_table: bool = True, is_nested: bool = True, has_splits: bool = False, suffix: str = ""
) -> Path:
    """PlantCLEF with one or two photos of a plant, and quadrats of one or two species; returns a solution.

    Args:
        is_nested: whether the quadrats are in a folder within a folder of the same name.
        has_splits: whether the photos of plants are in folders of train, val and test.
        suffix: of the ids in the sample submission.
    """
    columns = ("image_name", "organ", "species_id", "obs_id", "species", "genus", "family", "learn_tag")
    rows = []
    for number in range(4):
        for label, (*_, family, genus, species) in SPECIES.items():
            tag = ("train", "train", "val", "test")[number]
            for index in range(2 - number % 2):
                name = f"{label}{number}{index}.jpg"
                root = folder / "plants" / "images_max_side_800" / (tag if has_splits else "")
                plants(root / label / name, [label], 8 * number + 4 * index)
                rows.append((name, "leaf", label, f"{number}{label}", f'"{species}" L.', genus, family, tag))
    path = folder / "PlantCLEF2024singleplanttrainingdata.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=";").writerows([columns, *rows])
    test = folder / "PlantCLEF2025_test_images"
    test = test / test.name if is_nested else test
    test.mkdir(parents=True)
    truth, labels = {}, list(SPECIES)
    for number in range(3 * TEST_OBSERVATIONS):
        name = f"CBN-{number:02}-2024"
        truth[name + suffix] = list(dict.fromkeys((labels[number % 3], labels[(number + number % 2) % 3])))
        plants(test / f"{name}.jpg", truth[name + suffix], number)
    if has_test_table:
        table = [f"{number};{name.removesuffix(suffix)}.jpg" for number, name in enumerate(truth)]
        (folder / "PlantCLEF2025_test.csv").write_text("\n".join(["number;file", *table]) + "\n")
    header = ("quadrat_id", "species_ids")
    write_csv(folder / "sample_submission.csv", [header, *((name, "[7]") for name in truth)])
    return write_csv(folder / "solution.csv", [header, *((name, f"[{', '.join(own)}]") for name, own in truth.items())])


def class_folders(folder: Path) -> None:
    """A folder per class, one with a space in its name, and a test folder."""
    for seed, name in enumerate(("apple", "bell pepper", "carrot")):
        for number in range(2):
            photo(folder / "train" / name / f"{number}.png", seed)
        for number in range(TEST_OBSERVATIONS):
            photo(folder / "test" / f"{name} {number}.jpg", seed)


ANSWERS = ("class", "several", "probabilities")  # the forms of a submission


def table(
    folder: Path,
    answer: str = "class",
    labels: Sequence[str] = ("boletus edulis", "amanita", "morchella"),
    names: str = "{}.jpg",
    folders: tuple[str, str] = ("train", "test"),
    has_test_table: bool = True,
    is_grouped: bool = True,
) -> Path:
    """A competition whose photos are listed in tables; returns a solution.

    Args:
        answer: one of ANSWERS.
        names: of photos in the tables; the files have the suffix .jpg.
        is_grouped: whether the test table names an observation for each photo, some of which have two photos.
    """
    rows, number = {"train": [], "test": []}, 0
    for (split, count), place in zip((("train", 3), ("test", TEST_OBSERVATIONS)), folders, strict=True):
        for index in range(count):
            for seed, label in enumerate(labels):
                observation = f"ö {number}" if is_grouped else ""
                for _ in range(1 + index % 2 if is_grouped else 1):
                    number += 1
                    photo(folder / place / f"img {number}.jpg", seed)
                    name = names.format(f"img {number}")
                    rows[split].append((name, observation or name, label, "wood" if seed else "soil", str(number % 3)))
    columns = ("image", "specimen", "label", "habitat", "fold")
    kept = [0, 1, 2, 3, 4] if is_grouped else [0, 2, 3, 4]
    write_csv(folder / "train.csv", [[row[index] for index in kept] for row in (columns, *rows["train"])])
    truth = {row[1]: row[2] for row in rows["test"]}
    identity = "specimen" if is_grouped else "image"
    if has_test_table:
        known = [index for index in kept if columns[index] not in ("label", "fold")]
        write_csv(folder / "test.csv", [[row[index] for index in known] for row in (columns, *rows["test"])])
    header, cells = {
        "class": (["label"], labels[:1]),
        "several": (["label"], [" ".join(labels[:2])]),
        "probabilities": ([*labels], [f"{1 / len(labels):.3f}"] * len(labels)),
    }[answer]
    write_csv(folder / "sample_submission.csv", [(identity, *header), *((name, *cells) for name in sorted(truth))])
    return write_csv(
        folder / "solution.csv",
        [("Usage", "label", identity), *(("Private", own, name) for name, own in truth.items())],
    )


# By the name of the competition.
SMALLEST: dict[str, Callable[[Path], object]] = {
    "fungiclef": fungiclef,
    "fungitastic": lambda folder: fungitastic(folder, "FungiTastic"),
    "fungitastic-mini": lambda folder: fungitastic(folder, "FungiTastic-Mini", ("300p", "500p")),
    "fungitastic-fewshot": lambda folder: fungitastic(folder, "FungiTastic-FewShot"),
    "herbarium": lambda folder: herbarium(folder, 2020),
    "herbarium-2021": lambda folder: herbarium(folder, 2021),
    "herbarium-2022": lambda folder: herbarium(folder, 2022),
    "plantclef": plantclef,
    "table": table,
    "class-folders": class_folders,
}
