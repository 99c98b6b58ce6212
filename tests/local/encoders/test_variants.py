"""Another input size and another pooling: as the libraries themselves give them, and rebuilt by the description.

python -m pytest tests/local/encoders/test_variants.py
"""

import copy

import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import normalize

from bundle import bundle
from kernel.encoders import build_module, open_encoder
from kernel.manifest import read_manifest, read_weights
from kernel.views import VIEWS
from local.encoders.load import enable_larger_view, load_encoder
from local.encoders.variants import pooled_parts
from local.recipes.recipe import make_recipe
from local.training.adaptation import group_by_layer, unfreeze
from local.training.run import train_run
from tests.local.encoders.models import (
    CLIP,
    RESNET,
    VISION,
    assert_rebuilds,
    assert_same,
    change_config,
    embed,
    embed_with_timm,
    randomise,
    refusal,
    write_clip,
    write_timm,
)

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
VIT, BEIT, DINOV3 = "vit_tiny_patch16_224", "beit_base_patch16_224", "vit_small_patch16_dinov3"
# Architecture, arguments, its own size, and another one.
TRANSFORMERS = [
    (VIT, SMALL | {"img_size": 64}, 64, 96),
    ("vit_small_patch14_dinov2", SMALL | {"img_size": 70}, 70, 56),
    (BEIT, SMALL | {"img_size": 64}, 64, 96),
    ("deit_tiny_distilled_patch16_224", SMALL | {"img_size": 64}, 64, 96),
    (DINOV3, SMALL | {"img_size": 64, "global_pool": "avg"}, 64, 96),
    (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
        64,
        128,
    ),
]
POOLS = {"token": [0], "avg": [1], "token+avg": [0, 1]}


@pytest.mark.parametrize(("architecture", "arguments", "own", "size"), TRANSFORMERS)
def test_a_transformer_of_timm_at_another_size_is_that_of_timms_img_size(
    tmp_path, photos, architecture, arguments, own, size
):
    write_timm(tmp_path, architecture, arguments, input_size=[3, own, own])
    module, described = load_encoder(str(tmp_path), image_size=size)
    expected = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **arguments | {"img_size": size}).eval()
    assert_same(
        embed(module, described, photos), embed_with_timm(expected, RESNET | {"input_size": (3, size, size)}, photos)
    )
    assert_rebuilds(module, described, photos)
    assert (described.preprocessing.size, described.arguments["img_size"]) == (size, size)
    assert load_encoder(str(tmp_path), image_size=own)[1] == load_encoder(str(tmp_path))[1]


@pytest.mark.parametrize(
    "vision",
    [
        VISION,
        {"timm_model_name": "test_vit2", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160},
        {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64},
    ],
    ids=["its own transformer", "a transformer of timm", "a convolutional network of timm"],
)
def test_a_tower_of_open_clip_at_another_size_is_that_of_open_clips_force_image_size(tmp_path, photos, vision):
    folder, size = write_clip(tmp_path / "clip", vision_cfg=vision), 2 * vision["image_size"]
    module, described = load_encoder(str(folder), image_size=size)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", force_image_size=size)
    with torch.inference_mode():
        pixels = torch.stack([transform(Image.open(path)) for path in photos])
        expected = model.eval().encode_image(pixels, normalize=True)
    assert_same(embed(module, described, photos), expected)
    assert_rebuilds(module, described, photos)
    assert described.preprocessing.size == size


def test_an_encoder_at_another_size_has_the_view_larger_of_that_size(tmp_path):
    write_timm(tmp_path, VIT, SMALL | {"img_size": 64}, input_size=[3, 64, 64])
    _, enlarged = enable_larger_view(*load_encoder(str(tmp_path), image_size=96))
    assert (enlarged.preprocessing.size, enlarged.preprocessing.larger_size) == (96, 128)


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("vit_tiny_patch16_224", 500, "expected a multiple of its patch size, 16, such as 496 or 512"),
        ("vit_small_patch14_dinov2", 384, "expected a multiple of its patch size, 14, such as 378 or 392"),
        ("levit_128s", 320, "only its own size, 224; leave it at 0"),
        ("resmlp_12_224", 320, "only its own size, 224; leave it at 0"),
        ("cait_xxs24_224", 320, "only its own size, 224; leave it at 0"),  # timm does not resample its positions
        ("crossvit_tiny_240", 480, "only its own size, 240; leave it at 0"),  # it would shrink the photos
    ],
)
def test_a_size_that_an_architecture_does_not_accept_is_refused_before_the_weights_are_loaded(name, size, reason):
    message = refusal(f"timm:{name}", image_size=size)  # the weights would be a download
    assert message == f"image_size = {size}: timm:{name} does not accept photos of {size} pixels: {reason}"


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("ViT-B-32/openai", 250, "expected a multiple of its patch size, 32, such as 224 or 256"),
        ("RN50/openai", 320, "only its own size, 224; leave it at 0"),
    ],
)
def test_a_size_that_an_open_clip_architecture_does_not_accept_is_refused_before_the_weights_are_loaded(
    name, size, reason
):
    message = refusal(f"open_clip:{name}", image_size=size)
    assert message == f"image_size = {size}: open_clip:{name} does not accept photos of {size} pixels: {reason}"


@pytest.mark.parametrize("changes", [{"image_size": 96}, {"pool": "token"}])
def test_a_wrong_configuration_is_refused_as_such_also_for_another_size_or_pooling(tmp_path, changes):
    write_timm(tmp_path / "timm", VIT, SMALL | {"img_size": 64}, input_size=[3, 64, 64])
    change_config(tmp_path / "timm" / "config.json", model_args={"no_such_argument": 1})
    assert "no_such_argument" in refusal(tmp_path / "timm", **changes)
    clip = write_clip(tmp_path / "clip")
    change_config(clip / "open_clip_config.json", model_cfg=CLIP | {"vision_cfg": {"no_such_argument": 1}})
    assert "no_such_argument" in refusal(clip, **changes)


@pytest.mark.parametrize(
    ("architecture", "size", "own"),
    [
        ("vit_base_patch14_dinov2", 434, 518),
        ("beit_base_patch16_224", 384, 224),
        ("vit_large_patch14_dinov2", 518, 518),
        ("samvit_huge_patch16", 1024, 1024),
        ("samvit_huge_patch16", 512, 1024),
    ],
)
def test_the_sizes_of_the_published_systems_are_accepted(architecture, size, own):
    with torch.device("meta"):
        _, described = load_encoder(f"timm:{architecture}", pretrained=False, image_size=size)
    assert described.preprocessing.size == size
    assert ("img_size" in described.arguments) == (size != own and "sam" not in architecture)


def unit_parts(parts: list[torch.Tensor]) -> torch.Tensor:
    """The concatenation of (batch, features) of several poolings, each of length 1; a single one as it is."""
    return torch.cat([normalize(part) for part in parts], dim=1) if len(parts) > 1 else parts[0]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("architecture", "arguments"), [case[:2] for case in TRANSFORMERS[:5]])
def test_a_transformer_of_timm_is_pooled_over_its_tokens(tmp_path, photos, architecture, arguments, pool):
    size = arguments["img_size"]
    write_timm(tmp_path, architecture, arguments, input_size=[3, size, size])
    module, described = load_encoder(str(tmp_path), pool=pool)
    plain = load_encoder(str(tmp_path))[0].eval()
    pixels = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        tokens = plain.forward_features(pixels)
        prefix = plain.num_prefix_tokens
        pooled = [plain.fc_norm(tokens[:, 0]), plain.fc_norm(tokens[:, prefix:].mean(dim=1))]
        expected = unit_parts([pooled[index] for index in POOLS[pool]])
        assert torch.allclose(module.eval()(pixels), expected, atol=1e-6)
    assert (described.pool, described.features) == (pool, expected.shape[1])
    assert_rebuilds(module, described, photos)


@pytest.mark.parametrize("architecture", [VIT, DINOV3])
def test_a_pooling_is_that_of_timm_where_timm_has_it(tmp_path, architecture):
    write_timm(tmp_path, architecture, SMALL | {"img_size": 64}, input_size=[3, 64, 64])
    pixels = torch.randn(2, 3, 64, 64)
    module, described = load_encoder(str(tmp_path), pool="token")
    own = build_module("timm", architecture, described.arguments | {"global_pool": "token"}).eval()
    own.load_state_dict(module.state_dict())
    with torch.inference_mode():
        assert torch.equal(module.eval()(pixels), own(pixels))


@pytest.mark.parametrize(("pool", "changes"), [("token", {}), ("avg", {"pool_type": "avg"})])
@pytest.mark.parametrize("final_ln_after_pool", [False, True])
def test_a_pooling_is_that_of_open_clip_where_open_clip_has_it(tmp_path, photos, pool, changes, final_ln_after_pool):
    vision = VISION | {"final_ln_after_pool": final_ln_after_pool}
    folder = write_clip(tmp_path / "clip", vision_cfg=vision)
    module, described = load_encoder(str(folder), pool=pool)
    both = load_encoder(str(folder), pool="token+avg")[0].eval()
    own = build_module("open_clip", "", described.arguments | {"vision_cfg": vision | changes}).eval()
    own.load_state_dict(module.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(module.eval()(pixels), own(pixels))
        half = {"token": slice(None, 24), "avg": slice(24, None)}[pool]
        assert torch.allclose(both(pixels)[:, half], normalize(own(pixels)), atol=1e-6)
    assert_rebuilds(module, described, photos)


def test_the_transformer_of_timm_in_a_tower_of_open_clip_is_pooled_before_its_projection(tmp_path, photos):
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
    folder, pixels = write_clip(tmp_path / "clip", vision_cfg=vision), torch.randn(2, 3, 160, 160)
    plain, (both, described) = load_encoder(str(folder))[0].eval(), load_encoder(str(folder), pool="token+avg")
    with torch.inference_mode():
        tokens = plain.trunk.forward_features(pixels)
        expected = [plain.head(tokens[:, 0]), plain.head(tokens[:, plain.trunk.num_prefix_tokens :].mean(dim=1))]
        assert torch.allclose(both.eval()(pixels), unit_parts(expected), atol=1e-5)
    assert described.features == 48
    assert_rebuilds(both, described, photos)


@pytest.mark.parametrize(
    ("architecture", "pool", "parts"),
    [
        ("test_vit", "token+avg", {"token": 0, "avg": 1}),
        ("test_resnet", "stages", {"final": 0}),
        ("test_vit", "avg", {}),
    ],
)
def test_a_part_of_a_pooling_is_what_an_encoder_that_is_pooled_so_gives(tmp_path, architecture, pool, parts):
    write_timm(tmp_path, architecture)
    (module, described), pixels = load_encoder(str(tmp_path), pool=pool), torch.randn(3, 3, 160, 160)
    found = pooled_parts(described)
    assert sum(found.values()) == described.features
    assert list(found)[: len(parts)] == (list(parts) or [""])[: len(parts)]
    with torch.inference_mode():
        whole = module.eval()(pixels)
        for name, position in parts.items():
            alone = load_encoder(str(tmp_path), pool={"final": "auto"}.get(name, name))[0].eval()(pixels)
            own = whole.split(list(found.values()), dim=1)[position]
            assert torch.allclose(normalize(own), normalize(alone), atol=1e-6)


def test_both_tokens_take_one_forward_pass_and_a_copy_pools_with_its_own_weights(tmp_path):
    write_timm(tmp_path, BEIT, SMALL | {"img_size": 64}, input_size=[3, 64, 64])
    module, pixels, passes = load_encoder(str(tmp_path), pool="token+avg")[0].eval(), torch.randn(2, 3, 64, 64), []
    module.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    with torch.inference_mode():
        before = module(pixels)
        assert len(passes) == 1
        copied = copy.deepcopy(module)
        randomise(module.fc_norm)
        assert torch.equal(copied(pixels), before)
        assert not torch.allclose(module(pixels), before)


def test_a_pooled_encoder_is_trained_by_its_layers_and_named_by_its_pooling(tmp_path):
    """Its weights keep their names. What str() says of it tells its cached embeddings from those of another pooling."""
    write_timm(tmp_path, VIT, SMALL | {"img_size": 64}, input_size=[3, 64, 64])
    plain, pooled = (load_encoder(str(tmp_path), pool=pool)[0] for pool in ("auto", "token+avg"))
    assert list(plain.state_dict()) == list(pooled.state_dict())
    assert len(unfreeze(plain, 2)) == len(unfreeze(pooled, 2)) > 0
    assert "token_pool" not in str(plain)
    assert "TokenPool(token+avg" in str(pooled)
    optim = make_recipe({}, "the test").optim
    assert len(group_by_layer(plain, optim)) == len(group_by_layer(pooled, optim))


@pytest.mark.parametrize("architecture", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_of_stages_the_final_features_and_the_means_of_the_last_two_are_taken_in_one_forward_pass(
    tmp_path, photos, architecture
):
    write_timm(tmp_path, architecture)
    plain, (module, described) = load_encoder(str(tmp_path))[0].eval(), load_encoder(str(tmp_path), pool="stages")
    pixels, passes = torch.randn(2, 3, 64, 64), []
    last = [stage["module"] for stage in plain.feature_info[-2:]]
    hooks = [
        plain.get_submodule(name).register_forward_hook(lambda layer, inputs, maps: passes.append(maps.mean((2, 3))))
        for name in last
    ]
    assert len(hooks) == 2
    with torch.inference_mode():
        expected = torch.cat([normalize(part) for part in (plain(pixels), *passes)], dim=1)
        assert torch.allclose(module.eval()(pixels), expected, atol=1e-6)
        copied = copy.deepcopy(module)
        randomise(module)
        assert torch.allclose(copied(pixels), expected, atol=1e-6)
    assert (described.pool, described.features) == ("stages", expected.shape[1])
    assert list(plain.state_dict()) == list(module.state_dict())
    assert "StagePool" in str(module)  # the cache distinguishes encoders by it
    assert_rebuilds(module, described, photos)


def test_an_encoder_without_stages_keeps_its_own_pooling(tmp_path):
    write_timm(tmp_path / "timm", VIT, SMALL | {"img_size": 64}, input_size=[3, 64, 64])
    for folder in (tmp_path / "timm", write_clip(tmp_path / "clip")):
        assert load_encoder(str(folder), pool="stages")[1] == load_encoder(str(folder))[1]


@pytest.mark.parametrize(
    "spec",
    [
        "timm:resnet18",
        "timm:swin_tiny_patch4_window7_224",
        "timm:vit_base_patch16_siglip_224",
        "open_clip:RN50/openai",
        "open_clip:coca_ViT-B-32/laion2b_s13b_b90k",
    ],
)
def test_an_encoder_without_a_class_token_refuses_a_pooling_before_its_weights_are_loaded(spec):
    assert refusal(spec, pool="token") == (
        f"pool = token: {spec} does not have both a class token and patches; leave it at auto"
    )


def test_of_a_dinov3_the_class_token_is_taken_unless_another_pooling_is_named(tmp_path):
    pixels = torch.randn(2, 3, 64, 64)
    for arguments, pool in ((SMALL, "token"), (SMALL | {"global_pool": "avg"}, "auto")):
        write_timm(tmp_path, DINOV3, arguments | {"img_size": 64}, input_size=[3, 64, 64])
        module, described = load_encoder(str(tmp_path))
        assert described.pool == pool
        with torch.inference_mode():
            tokens = module.eval().forward_features(pixels)
            expected = tokens[:, 0] if pool == "token" else tokens[:, 5:].mean(dim=1)
            assert torch.allclose(module(pixels), expected, atol=1e-6)
    assert load_encoder(str(tmp_path), pool="token")[1].pool == "token"


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_a_run_at_another_size_and_pooling_is_bundled_and_its_kernel_embeds_as_the_training(
    drawn, tmp_path, photos, library
):
    folder = tmp_path / library
    if library == "timm":
        original = randomise(timm.create_model(VIT, num_classes=3, **SMALL, img_size=32))
        timm.models.save_for_hf(original, folder, model_args=SMALL | {"img_size": 32}, safe_serialization=True)
    else:
        write_clip(folder)
    settings = {"encoder": str(folder), "image_size": 64, "pool": "token+avg", "reference": "train", "subset": 10}
    train_run(make_recipe(settings, "the test"), drawn.competition, tmp_path / "runs" / "run")
    bundle([tmp_path / "runs" / "run"], tmp_path / "build")
    weights = read_weights(tmp_path / "build" / "weights")
    spec = weights.manifest.members[0].encoders[0]
    assert (spec.preprocessing.size, spec.pool) == (64, "token+avg")
    opened = open_encoder(weights.file(spec.file), spec, [torch.device("cpu")])
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    module, described = load_encoder(str(folder), image_size=64, pool="token+avg")
    with torch.inference_mode():
        expected = normalize(module.eval()(opened.normalise(pixels, torch.device("cpu"))), dim=1)
    assert torch.allclose(opened.embed(pixels, [VIEWS["plain"]])[:, 0], expected, atol=1e-6)
    assert_rebuilds(module, described, photos)


def test_a_run_continues_at_another_size_with_its_own_weights(trained):
    module, described = load_encoder(str(trained), image_size=96)
    weights = load_file(trained / "encoder.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    kept = read_manifest(trained / "manifest.json").members[0].encoders[0]
    assert (described.preprocessing.size, described.learnt_from) == (96, kept.learnt_from)
