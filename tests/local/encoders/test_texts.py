"""The names of classes are embedded as open_clip embeds them.

python -m pytest tests/local/encoders/test_texts.py
"""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch

from kernel.inputs import InputError
from local.encoders.texts import embed_classes, write_texts
from tests.local.encoders.models import TEXT, write_clip, write_timm

CPU = torch.device("cpu")
READS_WORDS = {**TEXT, "vocab_size": 49408, "context_length": 20}  # of open_clip's tokenizer
TEXTS = [["a photo of a fox.", "a fox"], [], ["a photo of a hen."]]


def test_a_species_is_described_by_its_name_and_by_that_after_its_taxa():
    assert write_texts("Amanita muscaria", ["Basidiomycota", "", "Agaricales", "Amanitaceae", "Amanita"]) == [
        "a photo of Amanita muscaria.",
        "a close-up photo of Amanita muscaria.",
        "a photo of Basidiomycota Agaricales Amanitaceae Amanita muscaria.",
    ]
    assert write_texts("fly agaric", ["", "Amanita"])[2] == "a photo of Amanita fly agaric."
    assert len(write_texts("fly agaric", [])) == len(write_texts("Amanita muscaria", ["", "Amanita"])) == 2
    assert write_texts("", ["Agaricales"]) == []


@pytest.mark.parametrize("changes", [{}, {"custom_text": True}, {"quick_gelu": True}])
def test_a_class_has_the_mean_of_open_clips_embeddings_of_its_texts(tmp_path, changes):
    if changes.get("custom_text"):
        folder = write_custom(tmp_path / "clip")
    else:
        folder = write_clip(tmp_path / "clip", text_cfg=READS_WORDS, **changes)
    found = embed_classes(str(folder), TEXTS, CPU)
    model, tokenizer = open_clip.create_model(f"local-dir:{folder}").eval(), open_clip.get_tokenizer("ViT-B-32")
    with torch.inference_mode():
        own = model.encode_text(tokenizer([*TEXTS[0], *TEXTS[2]], context_length=20), normalize=True)
        mean = torch.nn.functional.normalize(own[:2].mean(dim=0), dim=0)
    assert not torch.allclose(own[0], own[1], atol=1e-3)
    assert np.allclose(found, torch.stack([mean, torch.zeros(24), own[2]]), atol=1e-6)


def write_custom(folder):
    """A CLIP whose text tower is a module of its own, as in CoCa and SigLIP."""
    write_clip(folder, text_cfg=READS_WORDS)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["custom_text"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def test_texts_are_embedded_in_parts_and_leave_the_random_numbers_alone(tmp_path, monkeypatch):
    folder = write_clip(tmp_path / "clip", text_cfg=READS_WORDS)
    texts = [[f"a photo of number {number}", f"the {number}"] for number in range(5)]
    torch.manual_seed(0)
    whole, drawn = embed_classes(str(folder), texts, CPU), torch.rand(1)
    monkeypatch.setattr("local.encoders.texts.BATCH", 3)
    assert np.allclose(embed_classes(str(folder), texts, CPU), whole, atol=1e-6)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)


def refusal(spec, texts=TEXTS) -> str:
    with pytest.raises(InputError) as refused:
        embed_classes(str(spec), texts, CPU)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_an_encoder_without_a_text_tower_is_refused_in_one_line(tmp_path, trained):
    write_timm(tmp_path / "timm")
    for spec in ("timm:test_resnet", tmp_path / "timm"):
        assert refusal(spec) == f"{spec} has no text tower: only encoders of open_clip have one"
    assert refusal(trained) == f"{trained} has no text tower: a run keeps the image tower alone"


def test_a_text_tower_that_cannot_be_loaded_is_refused_in_one_line(tmp_path):
    library = {**TEXT, "hf_tokenizer_name": "nobody/would-be-downloaded"}
    folder, other = write_clip(tmp_path / "tokenizer", text_cfg=library), write_clip(tmp_path / "other")
    assert refusal(folder).startswith(f"the text tower of {folder} cannot be loaded: ")
    wide = write_clip(tmp_path / "wide", text_cfg={**TEXT, "width": 32})
    shutil.copy(other / "open_clip_model.safetensors", wide)
    assert refusal(wide).startswith(f"the text tower of {wide} cannot be loaded: ")
    assert refusal(other).startswith(f"the text tower of {other} cannot be loaded: IndexError: ")  # 64 tokens


def test_fewer_than_two_names_tell_no_classes_apart(tmp_path):
    assert refusal("timm:test_resnet", [["a photo of a fox."], []]).startswith("fewer than two classes have a name")
