"""Drawn species can be distinguished, and relatives resemble each other.

python -m pytest tests/local/drawing/test_fungi.py
"""

import numpy as np
import pytest

from local.drawing.fungi import FORMS, draw, traits


def histogram(family: str, specimen: int) -> np.ndarray:
    """The square roots of the frequencies of 256 colours in the middle of a photo."""
    photo = draw(traits(family, "G", "s"), specimen, 0, (160, 120)).convert("HSV").crop((30, 20, 130, 100))
    colours = np.asarray(photo).reshape(-1, 3) // (16, 64, 64) @ (16, 4, 1)
    return np.sqrt(np.bincount(colours, minlength=256) / colours.size)


def test_species_of_a_genus_share_form_and_ground_and_differ_in_details() -> None:
    one, other = traits("Russulaceae", "Russula", "Russula rosea"), traits("Russulaceae", "Russula", "Russula nobilis")
    assert (one.form, one.ground, one.gills, one.bulb) == (other.form, other.ground, other.gills, other.bulb)
    assert one.mark != other.mark or not np.allclose(one.colours, other.colours)


def test_every_form_is_drawn_in_the_size_asked_for() -> None:
    species = [traits(f"F{n}", "G", "s") for n in range(60)]
    forms = {one.form: one for one in species}
    assert forms.keys() == FORMS.keys()
    for one, size in zip(forms.values(), [(1, 1), (7, 300), (225, 300), (1600, 1200)] * 3, strict=False):
        assert draw(one, 1, 1, size).size == size


def test_photos_of_a_specimen_differ_and_can_be_drawn_again() -> None:
    species = traits("F", "G", "s")
    first, again, other = (draw(species, 1, photo).tobytes() for photo in (0, 0, 1))
    assert first == again
    assert first != other


def test_photos_of_a_species_resemble_each_other_in_colour() -> None:
    families = [f"F{n}" for n in range(10)]
    prototypes = np.array([np.mean([histogram(family, n) for n in range(4)], axis=0) for family in families])
    queries = np.array([[histogram(family, n) for n in range(4, 7)] for family in families])
    accuracy = np.mean((queries @ prototypes.T).argmax(-1) == np.arange(10)[:, None])
    assert accuracy > 0.3  # by chance: 0.1


@pytest.mark.parametrize("number", range(3))
def test_a_photo_is_neither_black_nor_white(number: int) -> None:
    pixels = np.asarray(draw(traits(f"F{number}", "G", "s"), 1, number))
    assert 30 < pixels.mean() < 220
    assert pixels.std() > 10
