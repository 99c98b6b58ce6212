"""Labelled observations are selected, split, grouped and identified without leaks.

python -m pytest tests/local/data/test_observations.py
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kernel.inputs import InputError
from kernel.observations import Observation
from kernel.tables import TAXONOMY
from local.data.competition import read_competition
from local.data.observations import (
    LabelledObservations,
    encode_labels,
    select_observations,
    sort_ids,
    split_for_validation,
    words_of,
)
from tests.conftest import photo
from tests.labelled import make_labelled, of_rows

SIZES = {str(name): size for name, size in enumerate([1, 2, 3, 1, 7, 11, 1])}


def of_sizes(sizes: dict[str, int]) -> LabelledObservations:
    """So many observations of each class, in random order, without a val."""
    class_ids = np.random.default_rng(0).permutation([name for name, size in sizes.items() for _ in range(size)])
    return of_rows([("train", f"observation {number}", name) for number, name in enumerate(class_ids)])


def on_disk(folder: Path, **changes: object) -> LabelledObservations:
    """Two observations of train and one of val, with a photo each."""
    observations = []
    for name in ("a", "b", "c"):
        (folder / f"{name}.jpg").write_text(f"photo {name}", encoding="utf-8")
        observations.append(Observation(name, (folder / f"{name}.jpg",), {"habitat": "bog"}))
    taxa = {"1": ("Basidiomycota", "", "", "", ""), "2": ("",) * 5}
    labelled = make_labelled(observations, ["1", "2", "1"], [False, False, True], taxa)
    return replace(labelled, **{"folder": folder, **changes})


def test_class_ids_sort_by_number_where_all_are_numbers_and_stay_text() -> None:
    assert sort_ids(["10", "9", "0100", "9", "2"]) == ["2", "9", "10", "0100"]
    assert sort_ids(["10", "9", "elm"]) == ["10", "9", "elm"]
    assert sort_ids(["oak", "elm", "oak"]) == ["elm", "oak"]


def test_labels_are_indices_into_the_classes_and_minus_one_without_the_class() -> None:
    assert encode_labels(["b", "x", "a"], ["a", "b"]).tolist() == [1, -1, 0]


def test_a_subset_keeps_what_belongs_to_each_observation() -> None:
    labelled = of_rows([("train", "a", "1"), ("train", "b", "2"), ("val", "c", "1")])
    for selected in (np.array([True, False, True]), np.array([2, 0])):
        part = labelled.subset(selected)
        found = list(zip(part.ids, part.class_ids, part.is_val.tolist(), strict=True))
        assert sorted(found) == [("a", "1", False), ("c", "1", True)]
    assert part.ids == ["c", "a"]
    assert labelled.in_splits("val").ids == ["c"]
    assert labelled.in_splits("train", "val").ids == labelled.ids


def test_the_competitions_own_val_is_the_validation() -> None:
    labelled = of_rows([("train", "a", "1"), ("val", "b", "1"), ("train", "c", "2")])
    split = split_for_validation(labelled, seed=0)
    assert split.labelled.ids == ["a", "c", "b"]
    assert split.train_set.ids == ["a", "c"]
    assert split.validation_set.ids == ["b"]


def test_without_a_val_one_observation_in_five_validates() -> None:
    split = split_for_validation(of_sizes({"3": 10, "20": 25, "100": 5}), seed=0)
    assert Counter(split.validation_set.class_ids) == {"3": 2, "20": 5, "100": 1}
    assert Counter(split.train_set.class_ids) == {"3": 8, "20": 20, "100": 4}


@pytest.mark.parametrize("seed", range(3))
def test_every_class_keeps_an_observation_to_train_on(seed: int) -> None:
    split = split_for_validation(of_sizes(SIZES), seed)
    train, validation = (Counter(part.class_ids) for part in (split.train_set, split.validation_set))
    assert set(train) == set(SIZES)
    assert train + validation == SIZES
    assert validation


@pytest.mark.parametrize("seed", range(3))
def test_the_split_shares_no_observation_and_loses_none(seed: int) -> None:
    labelled = of_sizes(SIZES)
    split = split_for_validation(labelled, seed)
    class_of = dict(zip(labelled.ids, labelled.class_ids, strict=True))
    assert sorted(split.train_set.ids + split.validation_set.ids) == sorted(labelled.ids)
    for part in (split.train_set, split.validation_set):
        assert [class_of[name] for name in part.ids] == part.class_ids.tolist()


def test_the_seed_decides_which_observations_validate() -> None:
    first, same, other = (split_for_validation(of_sizes(SIZES), seed).validation_set.ids for seed in (1, 1, 2))
    assert first == same != other


def test_the_largest_classes_are_those_of_most_observations() -> None:
    split = split_for_validation(of_sizes(SIZES), 0)
    kept = split.largest_classes(2)
    assert set(kept.train_set.class_ids) == {"4", "5"}
    assert set(kept.validation_set.class_ids) == {"4", "5"}
    assert split.largest_classes(0) is split


def test_a_sample_is_of_so_many_observations_of_train_and_a_fifth_as_many_of_val() -> None:
    rows = [("train", f"t{number}", "1") for number in range(30)] + [("val", f"v{number}", "1") for number in range(9)]
    one, same, other = (of_rows(rows).sample(10, seed) for seed in (0, 0, 1))
    assert (len(one.in_splits("train")), len(one.in_splits("val"))) == (10, 2)
    assert one.ids == same.ids != other.ids
    assert of_rows(rows).sample(300, 0).ids == of_rows(rows).ids


def test_ranks_group_the_classes_and_one_without_any_taxon_is_none() -> None:
    taxa = {"a": ("", "", "", "Russulaceae", "Russula"), "b": ("", "", "", "Russulaceae", ""), "c": ("",) * 5}
    labelled = make_labelled([Observation(name, ()) for name in taxa], list(taxa), taxa=taxa)
    groups = labelled.group_by_rank(["a", "b", "c", "not in the tables"])
    assert list(groups) == list(TAXONOMY)
    assert groups["order"] is None
    family = groups["family"]
    assert family[0] == family[1]
    assert len(set(family.tolist())) == len({*family[1:].tolist()}) == 3
    assert len(set(groups["genus"].tolist())) == 4
    taxonomy = labelled.taxonomy(["a", "b", "c"])
    assert taxonomy.family[0] == taxonomy.family[1] != taxonomy.family[2]
    assert len(set(taxonomy.genus.tolist())) == 3


def test_without_taxa_every_class_is_alone_in_its_genus_and_family() -> None:
    taxonomy = of_rows([("train", "a", "1"), ("train", "b", "2")]).taxonomy(["1", "2"])
    assert len(set(taxonomy.genus)) == len(set(taxonomy.family)) == 2


def test_the_digest_is_the_same_wherever_the_folder_is(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    assert on_disk(tmp_path / "here").digest() == on_disk(tmp_path / "there").digest()


def test_the_digest_is_another_for_another_label_taxon_metadata_split_or_photo(tmp_path: Path) -> None:
    labelled = on_disk(tmp_path)
    without = [replace(labelled.observations[0], metadata={}), *labelled.observations[1:]]
    digests = {
        labelled.digest(),
        on_disk(tmp_path, class_ids=np.array(["1", "2", "2"], dtype=object)).digest(),
        on_disk(tmp_path, taxa={"1": ("Ascomycota", "", "", "", "")}).digest(),
        on_disk(tmp_path, observations=without).digest(),
        on_disk(tmp_path, is_val=np.array([False, False, False])).digest(),
    }
    (tmp_path / "b.jpg").write_text("another photo", encoding="utf-8")
    digests.add(replace(labelled).digest())
    (tmp_path / "b.jpg").unlink()
    digests.add(replace(labelled).digest())
    assert len(digests) == 7


def test_the_digest_of_the_observations_is_of_the_labels_of_train_alone(tmp_path: Path) -> None:
    labelled = on_disk(tmp_path)
    digest = labelled.observations_digest()
    assert labelled.in_splits("train").observations_digest() == digest
    (tmp_path / "a.jpg").unlink()
    assert replace(labelled).observations_digest() == digest
    assert replace(labelled, class_ids=np.array(["2", "1", "1"], dtype=object)).observations_digest() != digest


def test_every_photo_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled, asked, stat = on_disk(tmp_path), [], Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **options: asked.append(path) or stat(path, **options))
    labelled.digest()
    assert labelled.photo_sizes[tmp_path / "a.jpg"] == len("photo a")
    labelled.digest()
    assert sorted(asked) == sorted(labelled.photos)


def test_excluded_observations_leave_the_sample_as_it_is_otherwise():
    whole = of_rows([("train", str(number), "ab"[number % 2]) for number in range(20)])
    sample = select_observations(whole, True, 10, 0).ids
    assert select_observations(whole, True, 10, 0, [sample[0], f"{sample[3]}.0"]).ids == [*sample[1:3], *sample[4:]]


def test_an_excluded_observation_that_the_data_lack_is_named():
    whole = of_rows([("train", "1", "a"), ("train", "2", "b"), ("train", "3", "b")])
    with pytest.raises(InputError, match="exclude names observation '4'"):
        select_observations(whole, True, 0, 0, ["1", "4"])
    with pytest.raises(InputError, match="fewer than two classes"):
        select_observations(whole, True, 0, 0, ["1"])


def test_the_words_for_a_class_are_its_species_and_never_a_number():
    species = {"1": "Amanita muscaria", "2": "", "3": "unknown", "4": "17", "5": "n01440764", "6": " Boletus_edulis"}
    labelled = replace(of_rows([("train", "a", "1"), ("train", "b", "7")]), species=species)
    words = words_of(labelled, list("1234567"))
    assert words == ["Amanita muscaria", "", "", "", "", "Boletus edulis", ""]


def test_the_words_for_a_class_without_tables_are_the_name_of_its_folder(tmp_path):
    folders = ["001.Black_footed_Albatross", "black-footed albatross", "42", "__", "Löwenzahn"]
    for name in folders:
        photo(tmp_path / "train" / name / "a.png", 1)
    words = words_of(read_competition(tmp_path), folders)
    assert words == ["Black footed Albatross", "black-footed albatross", "", "", "Löwenzahn"]
