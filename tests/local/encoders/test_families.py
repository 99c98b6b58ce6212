"""Every family of timm and every vision tower of open_clip gives one vector per photo, or is refused in one line.

They are built on the meta device, without weights. python -m pytest tests/local/encoders/test_families.py -m ""
"""

import json
import re

import open_clip
import pytest
import timm
import torch

from kernel.inputs import InputError
from local.encoders.from_open_clip import describe_open_clip_file
from local.encoders.load import load_encoder
from local.encoders.variants import Variant, count_features, vary

SMALL = re.compile(r"test|nano|atto|tiny|small|_xs|_s\b|18|pico|femto|xxs")
TYPICAL = ("beit", "convnext", "eva", "maxxvit", "resnet", "vision_transformer")


def small_model(family: str) -> str:
    """The last small model of a family of timm by name, and so often a recent one."""
    names = timm.list_models(module=family)
    return ([name for name in names if SMALL.search(name)] or names)[-1]


FAMILIES = [pytest.param(family, marks=() if family in TYPICAL else pytest.mark.slow) for family in timm.list_modules()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_timm_gives_one_vector_per_photo_or_one_clear_line(family):
    name = f"timm:{small_model(family)}"
    try:
        with torch.device("meta"):
            module, described = load_encoder(name, pretrained=False)
    except InputError as error:
        assert re.fullmatch(r"\S+ (returns|was trained with) [^\n]+, expected [^\n]+: choose [^\n]+", str(error))
        return
    assert described.features > 0
    stages = vary(described, Variant(name, pool="stages"))
    assert (count_features(stages, described.preprocessing.size) > described.features) == (stages.pool == "stages")
    if not module.pretrained_cfg.get("fixed_input_size") or family == "sequencer":  # of an LSTM, every step is tried
        return
    size = described.preprocessing.size
    for changes, expected in (
        ({"image_size": size * 2}, {described.features}),
        ({"pool": "token+avg"}, {2 * described.features}),
    ):
        try:
            varied = vary(described, Variant(name, **changes))
        except InputError as error:
            key, value = next(iter(changes.items()))
            assert re.fullmatch(
                rf"{key} = {re.escape(str(value))}: {name} does not [^\n]+; leave it at \w+", str(error)
            )
        else:
            assert count_features(varied, varied.preprocessing.size) in expected


TOWERS_OF_TIMM = ("convnext_base", "swin_base_patch4_window7_224", "ViT-B-16-SigLIP", "ViTamin-S")  # one of a kind


def model_config(name: str) -> dict:
    """The configuration of an open_clip model. Its own transformers get one layer: all their layers are alike."""
    config = open_clip.get_model_config(name)
    is_own = "timm_model_name" not in config["vision_cfg"] and isinstance(config["vision_cfg"].get("layers"), int)
    return config | {"vision_cfg": config["vision_cfg"] | ({"layers": 1} if is_own else {})}


def vision_towers() -> list[str]:
    """An architecture of open_clip for each vision tower: many have the same, with another text tower."""
    names = sorted(open_clip.list_models(), key=len, reverse=True)
    configs = {name: model_config(name) for name in names}
    towers = {json.dumps([config["embed_dim"], config["vision_cfg"]]): name for name, config in configs.items()}
    return sorted(towers.values())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("RN50", "ViT-B-32") else pytest.mark.slow) for name in vision_towers()],
)
def test_a_tower_of_open_clip_gives_one_vector_per_photo_and_its_own_transformers_at_twice_the_size(tmp_path, name):
    config = {"model_cfg": model_config(name), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    described = describe_open_clip_file(tmp_path / "open_clip_config.json", name)
    size, features = described.preprocessing.size, config["model_cfg"]["embed_dim"]
    assert count_features(described, size) == features
    if "timm_model_name" in config["model_cfg"]["vision_cfg"] and name not in TOWERS_OF_TIMM:
        return
    try:
        varied = vary(described, Variant(name, image_size=2 * size))
    except InputError as error:
        line = rf"image_size = {2 * size}: {re.escape(name)} does not accept photos of {2 * size} pixels: [^\n]+"
        assert re.fullmatch(line, str(error))
    else:
        assert count_features(varied, 2 * size) == features
