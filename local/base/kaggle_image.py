"""Kaggle's image: the versions that a kernel meets there, as far as this kit depends on them."""

import re

# Read in August 2026. open_clip_torch and ftfy are absent from the image.
IMAGE = {"python": "3.12", "torch": "2.10.0", "torchvision": "0.25.0", "timm": "1.0.26", "pillow": "11.3.0"}


def is_newer(version: str, than: str) -> bool:
    """Whether a version is newer than another, by their numbers; what is made after a release counts as newer."""
    one, other = ([int(number) for number in re.findall(r"\d+", text.partition("+")[0])] for text in (version, than))
    length = max(len(one), len(other))
    return one + [0] * (length - len(one)) > other + [0] * (length - len(other))
