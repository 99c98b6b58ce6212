"""Recipes and `--set` become one validated Recipe, or one line that says what is wrong.

python -m pytest tests/local/recipes/test_recipe.py
"""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from kernel.inputs import InputError
from local.recipes.recipe import FOLDER, Recipe, make_recipe, read_recipe, write_recipe

NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))


def recipe_file(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(name: str, *settings: str) -> str:
    with pytest.raises(InputError) as refused:
        read_recipe(name, settings)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_there_are_recipes() -> None:
    assert {"demo", "fungiclef-baseline", "fungiclef-protonet"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_reads_by_its_name_and_by_its_path(name: str) -> None:
    assert isinstance(read_recipe(name), Recipe)
    assert read_recipe(str(FOLDER / f"{name}.toml")) == read_recipe(name)


def test_a_recipe_is_its_file_over_the_defaults(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, 'epochs = 3\nviews = ["plain"]\n')
    assert read_recipe(path) == replace(Recipe(), epochs=3, views=("plain",))
    assert read_recipe(recipe_file(tmp_path, "")) == Recipe()


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("epochs=7", "epochs", 7),
        ("learning_rate=2e-3", "learning_rate", 0.002),
        ("temperature=1", "temperature", 1.0),
        ("centre=false", "centre", False),
        ("reference=train", "reference", "train"),
        ('reference="train"', "reference", "train"),
        ("reference=train+val", "reference", "train+val"),
        ("resolution=300p", "resolution", "300p"),
        ("encoder=timm:resnet10t", "encoder", "timm:resnet10t"),
        ("encoder=open_clip:ViT-B-32/a=b", "encoder", "open_clip:ViT-B-32/a=b"),
        ("views=hflip,plain", "views", ("hflip", "plain")),
        ('views=["hflip"]', "views", ("hflip",)),
        ("views=plain", "views", ("plain",)),
        (" epochs = 7 ", "epochs", 7),
    ],
)
def test_a_setting_is_read_as_toml_where_it_is_toml_and_else_as_text(setting: str, key: str, value: object) -> None:
    found = getattr(read_recipe("fungiclef-baseline", [setting]), key)
    assert found == value
    assert type(found) is type(value)


def test_of_two_settings_of_a_key_the_last_counts_and_both_beat_the_file(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "epochs = 1\nseed = 5\n")
    recipe = read_recipe(path, ["epochs=2", "epochs=3"])
    assert (recipe.epochs, recipe.seed) == (3, 5)


def test_the_encoder_of_the_command_line_beats_the_files_and_the_settings() -> None:
    assert read_recipe("demo", ["encoder=timm:resnet18"], "timm:resnet34").encoder == "timm:resnet34"
    assert read_recipe("demo", ["encoder=timm:resnet18"]).encoder == "timm:resnet18"


@pytest.mark.parametrize(
    ("typed", "meant"), [("epoch", "epochs"), ("learning-rate", "learning_rate"), ("labelsmoothing", "label_smoothing")]
)
def test_an_unknown_key_names_the_nearest(typed: str, meant: str) -> None:
    message = refusal("demo", f"{typed}=1")
    assert repr(typed) in message
    assert repr(meant) in message


def test_an_unknown_key_of_a_file_names_the_file(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "epoch = 1\n")
    assert path in refusal(path)


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("epochs=many", "an int"),
        ("epochs=1.5", "an int"),
        ("epochs=true", "an int"),
        ("learning_rate=fast", "a float"),
        ("centre=1", "true or false"),
        ("centre=yes", "true or false"),
        ("encoder=5", "a str"),
        ("views=1", "a list"),
        ("reference=[]", "a str"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_the_type_that_is_wanted(setting: str, wanted: str) -> None:
    assert refusal("demo", setting).startswith(f"expected {wanted} for {setting.partition('=')[0]}, got ")


def test_a_message_about_a_setting_names_where_the_setting_was_given(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "epochs = 3\nlearning_rate = 0.0\n")
    assert refusal("demo", "epochs=x").endswith("got 'x' (in --set epochs=x)")
    assert "in --set epoch=3:" in refusal(path, "learning_rate=1", "epoch=3")
    assert "in --set seed=-1:" in refusal(path, "learning_rate=1", "seed=-1")
    assert f"learning_rate = 0.0 in {path}:" in refusal(path, "epochs=4")
    with pytest.raises(InputError, match="in --encoder 5"):
        make_recipe({"encoder": 5}, path, {"encoder": "--encoder 5"})


def test_a_message_about_two_settings_names_both_sources(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, 'matcher = "head"\nepochs = 3\n')
    assert refusal(path, "epochs=0").endswith(f"(in {path} and --set epochs=0)")
    assert refusal(recipe_file(tmp_path, ""), "probe=5").endswith("(in --set probe=5)")


@pytest.mark.parametrize("key", ["resolution", "fit", "pooling", "reference", "prototypes"])
def test_a_wrong_choice_is_refused_with_those_that_there_are(key: str) -> None:
    message = refusal("demo", f"{key}=sideways")
    assert message.startswith(f"{key} = 'sideways'")
    assert getattr(Recipe(), key) in message


@pytest.mark.parametrize("number", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("key", [field.name for field in fields(Recipe) if type(field.default) is float])
def test_no_number_of_a_recipe_is_infinite_or_nan(key: str, number: str) -> None:
    message = refusal("demo", f"{key}={number}")
    assert message.startswith(f"{key} = {number} in ")
    assert "finite" in message


def test_no_number_of_a_list_is_infinite() -> None:
    assert "finite" in refusal("demo", "rank_weights=[0.1, 0.1, 0.1, 0.1, inf]")


@pytest.mark.parametrize(
    "views", ["sideways", "plain,sideways", "plain,plain", "[]", "plain,", "[1]", '[["plain"]]', "[{a = 1}]"]
)
def test_views_that_there_are_not_are_refused_with_those_that_there_are(views: str) -> None:
    message = refusal("demo", f"views={views}")
    assert message.startswith("views = ")
    assert "hflip" in message


@pytest.mark.parametrize(
    "setting",
    [
        "temperature=0",
        "temperature=-0.1",
        "batch_size=0",
        "photos_per_observation=-1",
        "learning_rate=0",
        "learning_rate=nan",
        "crop_scale=0",
        "crop_scale=2",  # a share of the photo
        "patience=0",
        "layer_decay=0",
        "layer_decay=1.5",  # a share: higher layers learn no more slowly
        "lora=-1",
        "probe=-1",
        "ema=-0.1",
        "ema=1",  # would never leave the start
        "rand_augment=-1",
        "rand_augment=11",  # RandAugment's scale ends at 10
        "epochs=-1",
        "image_size=-5",
        "warmup=-0.5",
        "warmup=2",  # a share of the steps
        "label_smoothing=2",  # torch takes 0 to 1
        "label_smoothing=-1",
        "weight_decay=-1",
        "weight_decay=nan",
        "colour_jitter=-1",
        "seed=-1",  # numpy takes no negative one
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(setting: str) -> None:
    assert refusal("demo", setting).startswith(f"{setting.partition('=')[0]} = ")


@pytest.mark.parametrize(
    "setting", ["label_smoothing=0", "weight_decay=0", "warmup=0", "crop_scale=1", "unfreeze=-1", "colour_jitter=0"]
)
def test_a_value_at_the_end_of_its_range_is_taken(setting: str) -> None:
    key, _, value = setting.partition("=")
    assert getattr(read_recipe("demo", [setting]), key) == float(value)


def test_a_probe_is_refused_where_nothing_would_move_in_it() -> None:
    assert refusal("fungiclef-protonet", "probe=5").startswith("probe: nothing learns")
    assert read_recipe("fungiclef-protonet", ["probe=5", "prototypes=learned"]).probe == 5


def test_a_setting_without_a_value_is_refused_with_how_to_write_it() -> None:
    message = refusal("demo", "epochs")
    assert "--set epochs" in message
    assert "key=value" in message


def test_an_unknown_recipe_is_refused_with_those_that_there_are() -> None:
    message = refusal("fungi")
    assert "no recipe fungi" in message
    assert all(name in message for name in NAMES)


def test_a_file_that_is_no_toml_is_refused_with_its_path(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "epochs: 3\n")
    assert f"{path} is not TOML" in refusal(path)
    (tmp_path / "mine.toml").write_bytes(b'encoder = "\xff"\n')
    assert f"{path} is not TOML" in refusal(path)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        replace(Recipe(), learning_rate=1e-05, views=("hflip",), centre=False, unfreeze=-1, encoder='a "b" \\ c'),
        replace(Recipe(), encoder="/models/Pfifferling é ✓"),
        replace(Recipe(), encoder="/models/\N{MUSHROOM}"),
        *map(read_recipe, NAMES),
    ],
)
def test_a_written_recipe_reads_back_as_it_was(tmp_path: Path, recipe: Recipe) -> None:
    path = tmp_path / "recipe.toml"
    write_recipe(recipe, path)
    assert read_recipe(str(path)) == recipe
    assert all(f"{field.name} = " in path.read_text(encoding="utf-8") for field in fields(Recipe))


def test_settings_made_by_a_program_name_where_they_come_from() -> None:
    with pytest.raises(InputError, match="in the tests"):
        make_recipe({"epoch": 1}, "the tests")


def test_only_what_has_candidates_can_be_left_to_the_choice():
    from local.banks.search import CANDIDATES
    from local.recipes.recipe import CHOOSABLE

    assert set(CHOOSABLE) == {"views", *CANDIDATES}
    assert make_recipe({"choose": ["whitening", "views"]}, "x").choose == ("whitening", "views")
    with pytest.raises(InputError, match="'seed' cannot be"):
        make_recipe({"choose": ["seed"]}, "x")
