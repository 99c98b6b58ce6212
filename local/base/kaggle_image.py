"""Versions of Python and of libraries in Kaggle's image, as far as this kit depends on them."""

import re

# As of August 2026. The image has no open_clip_torch and no ftfy.
IMAGE = {"python": "3.12", "torch": "2.10.0", "torchvision": "0.25.0", "timm": "1.0.26", "pillow": "11.3.0"}


def is_newer(version: str, than: str) -> bool:
    """Whether a version is newer than another, by their numbers; 1.0.26.post1 counts as newer than 1.0.26."""
    one, other = ([int(number) for number in re.findall(r"\d+", text.partition("+")[0])] for text in (version, than))
    length = max(len(one), len(other))
    return one + [0] * (length - len(one)) > other + [0] * (length - len(other))
