"""Recipes and `--set` become one validated Recipe, or one line that says what is wrong.

python -m pytest tests/local/recipes/test_recipe.py
"""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from kernel.inputs import InputError
from local.recipes.recipe import (
    FOLDER,
    TABLE_OF,
    TABLES,
    Recipe,
    explain,
    list_recipes,
    make_recipe,
    read_given,
    read_recipe,
    settings_by_name,
    write_recipe,
)
from local.recipes.settings import CANDIDATES, RESOLUTIONS, VIEWS, BankSettings

NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))


def value_of(recipe: Recipe, key: str) -> object:
    return getattr(getattr(recipe, TABLE_OF[key]), key)


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
    path = recipe_file(tmp_path, '[train]\nepochs = 3\n[bank]\nviews = ["plain"]\n')
    assert read_recipe(path) == make_recipe({"epochs": 3, "views": ["plain"]}, "the test")
    assert read_recipe(path).bank == BankSettings(views=("plain",))
    assert read_recipe(recipe_file(tmp_path, "")) == Recipe()


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("epochs=7", "epochs", 7),
        ("learning_rate=2e-3", "learning_rate", 0.002),
        ("temperature=1", "temperature", 1.0),
        ("train.epochs=7", "epochs", 7),
        ("choose=[]", "choose", ()),
        ("choose=", "choose", ()),
        ("flip=false", "flip", False),
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
    found = value_of(read_recipe("fungiclef-baseline", [setting]), key)
    assert found == value
    assert type(found) is type(value)


def test_of_two_settings_of_a_key_the_last_counts_and_both_beat_the_file(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "[train]\nepochs = 1\nseed = 5\n")
    recipe = read_recipe(path, ["epochs=2", "epochs=3"])
    assert (recipe.train.epochs, recipe.train.seed) == (3, 5)


def test_the_encoder_of_the_command_line_beats_the_files_and_the_settings() -> None:
    assert read_recipe("demo", ["encoder=timm:resnet18"], "timm:resnet34").encoder.encoder == "timm:resnet34"
    assert read_recipe("demo", ["encoder=timm:resnet18"]).encoder.encoder == "timm:resnet18"


@pytest.mark.parametrize(
    ("typed", "meant"), [("epoch", "epochs"), ("learning-rate", "learning_rate"), ("labelsmoothing", "label_smoothing")]
)
def test_an_unknown_key_names_the_nearest(typed: str, meant: str) -> None:
    message = refusal("demo", f"{typed}=1")
    assert repr(typed) in message
    assert repr(meant) in message


def test_an_unknown_key_of_a_file_names_the_file(tmp_path: Path) -> None:
    for text in ("epoch = 1\n", "[train]\nepoch = 1\n"):
        path = recipe_file(tmp_path, text)
        assert refusal(path) == f"unknown key 'epoch' (in {path}): the nearest known one is 'epochs'"


def test_an_unknown_table_and_a_key_in_another_table_are_refused_with_the_right_one(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "[trian]\nepochs = 1\n")
    assert refusal(path) == f"unknown table [trian] (in {path}): the nearest known one is [train]"
    assert "the nearest known one is 'train'" in refusal("demo", "trian.epochs=1")
    path = recipe_file(tmp_path, "[optim]\nepochs = 1\n")
    assert refusal(path) == f"unknown key 'optim.epochs' (in {path}): epochs is in the table 'train'"
    assert refusal("demo", "optim.epochs=1").endswith("epochs is in the table 'train'")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("epochs=many", "an int"),
        ("epochs=1.5", "an int"),
        ("epochs=true", "an int"),
        ("learning_rate=fast", "a float"),
        ("flip=1", "true or false"),
        ("flip=yes", "true or false"),
        ("encoder=5", "a str"),
        ("views=1", "a list"),
        ("reference=[]", "a str"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_the_expected_type(setting: str, expected: str) -> None:
    assert refusal("demo", setting).startswith(f"expected {expected} for {setting.partition('=')[0]}, got ")


def test_a_message_about_a_setting_names_where_the_setting_was_given(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "epochs = 3\nlearning_rate = 0.0\n")
    assert refusal("demo", "epochs=x").endswith("got 'x' (in --set epochs=x)")
    assert "(in --set epoch=3)" in refusal(path, "learning_rate=1", "epoch=3")
    assert refusal(path, "learning_rate=1", "seed=-1") == "expected 0 <= seed <= 4294967295, got -1 (in --set seed=-1)"
    assert refusal(path, "epochs=4") == f"expected learning_rate > 0, got 0.0 (in {path})"


def test_a_message_about_two_settings_names_both_sources(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, 'matcher = "head"\nepochs = 3\n')
    assert refusal(path, "epochs=0").endswith(f"(in {path} and --set epochs=0)")
    assert refusal(recipe_file(tmp_path, ""), "head_only_epochs=5").endswith("(in --set head_only_epochs=5)")


@pytest.mark.parametrize("key", ["resolution", "resize_mode", "pooling", "reference", "prototypes"])
def test_a_wrong_choice_is_refused_with_those_that_there_are(key: str) -> None:
    message = refusal("demo", f"{key}=sideways")
    assert message.startswith("expected one of ")
    assert message.endswith(f" for {key}, got 'sideways' (in --set {key}=sideways)")
    assert str(value_of(Recipe(), key)) in message


@pytest.mark.parametrize("number", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("key", [key for key, (_, default) in settings_by_name().items() if type(default) is float])
def test_no_number_of_a_recipe_is_infinite_or_nan(key: str, number: str) -> None:
    message = refusal("demo", f"{key}={number}")
    assert message.startswith(f"expected finite numbers for {key}, got {number} ")


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize("setting", ["seed", "learning_rate", "rank_weights"])
def test_a_number_of_hundreds_of_digits_is_refused_in_one_line(setting: str, digits: int) -> None:
    number = "1" + "0" * digits
    value = f"[{', '.join([number] * 5)}]" if setting == "rank_weights" else number
    assert refusal("demo", f"{setting}={value}").startswith("expected ")


def test_no_number_of_a_list_is_infinite() -> None:
    assert "finite" in refusal("demo", "rank_weights=[0.1, 0.1, 0.1, 0.1, inf]")


@pytest.mark.parametrize(
    "views", ["sideways", "plain,sideways", "plain,plain", "[]", "plain,", "[1]", '[["plain"]]', "[{a = 1}]"]
)
def test_views_that_there_are_not_are_refused_with_those_that_there_are(views: str) -> None:
    message = refusal("demo", f"views={views}")
    assert message.startswith("expected some of plain, hflip, ")
    assert " for views, each once, got [" in message


@pytest.mark.parametrize(
    "setting",
    [
        "temperature=0",
        "batch_size=0",
        "learning_rate=nan",
        "crop_scale=2",  # a fraction of the photo
        "layer_decay=1.5",  # the learning rate does not rise from layer to layer
        "ema_decay=1",  # the average would never leave the start
        "rand_augment=11",  # RandAugment's scale ends at 10
        "image_size=-5",
        "translate=1",  # the zoom would reach 0
        "warmup=2",  # a fraction of the steps
        "label_smoothing=-1",  # torch takes 0 to 1
        "ways=1",  # an episode needs two classes
        "seed=-1",  # numpy takes no negative one
        "seed=4294967296",  # scikit-learn takes 32 bits
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key_and_its_range(setting: str) -> None:
    key, _, value = setting.partition("=")
    message = refusal("demo", setting)
    assert message.startswith("expected ")
    assert key in message
    assert message.endswith(f"(in --set {setting})")
    assert value == "nan" or any(sign in message for sign in ("<", ">"))


@pytest.mark.parametrize(
    "setting",
    [
        "whitening=1000",  # variances to this power are infinite in 32 bits
        "hubness_weight=1e308",
        "genus_weight=1e308",
        "family_weight=1e308",
        "text_weight=1e308",
        "class_prior_exponent=1e308",
        "transduction=1e308",
        "metadata_weight=1e308",
        "encoder_weights=[1e308, 1]",
        "temperature=1e-300",
        "temperature=1e300",
        "class_weight_exponent=1e308",
        "rank_weights=[1e308, 1, 1, 1, 1]",
        "mixup=1e308",  # numpy's beta distribution of it is 0
        "cutmix=1e308",
    ],
)
def test_a_value_that_overflows_or_underflows_is_refused(setting: str) -> None:
    key = setting.partition("=")[0]
    message = refusal("demo", setting)
    assert key in message
    assert "<" in message


@pytest.mark.parametrize(
    "setting", ["label_smoothing=0", "weight_decay=0", "warmup=0", "crop_scale=1", "unfreeze=-1", "colour_jitter=0"]
)
def test_a_value_at_the_end_of_its_range_is_taken(setting: str) -> None:
    key, _, value = setting.partition("=")
    assert value_of(read_recipe("demo", [setting]), key) == float(value)


def test_head_only_epochs_are_refused_where_the_head_does_not_learn() -> None:
    assert refusal("fungiclef-protonet", "head_only_epochs=5").startswith(
        "head_only_epochs needs a head that is trained"
    )
    recipe = read_recipe("fungiclef-protonet", ["head_only_epochs=5", "prototypes=learned"])
    assert recipe.train.head_only_epochs == 5


def test_a_setting_without_a_value_is_refused_with_how_to_write_it() -> None:
    message = refusal("demo", "epochs")
    assert "--set epochs" in message
    assert "key=value" in message


def test_an_unknown_recipe_is_refused_with_those_that_there_are() -> None:
    message = refusal("fungi")
    assert "no recipe fungi" in message
    assert all(name in message for name in NAMES)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("epochs = 3\n", encoding="utf-8-sig")  # as Notepad saves it
    assert read_recipe(str(path)).train.epochs == 3


def test_a_file_that_is_no_toml_is_refused_with_its_path(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "epochs: 3\n")
    assert f"{path} is not TOML" in refusal(path)
    for content in (b'encoder = "\xff"\n', b"seed = 1" + b"0" * 5000, b"views = " + b"[" * 5000):
        (tmp_path / "mine.toml").write_bytes(content)
        assert f"{path} is not TOML" in refusal(path)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        make_recipe({"learning_rate": 1e-05, "views": ["hflip"], "unfreeze": -1, "encoder": 'a "b" \\ c'}, "the test"),
        make_recipe({"encoder": "/models/Pfifferling é ✓"}, "the test"),
        make_recipe({"encoder": "/models/\N{MUSHROOM}"}, "the test"),
        *map(read_recipe, NAMES),
    ],
)
def test_a_written_recipe_reads_back_as_it_was(tmp_path: Path, recipe: Recipe) -> None:
    path = tmp_path / "recipe.toml"
    write_recipe(recipe, path)
    assert read_recipe(str(path)) == recipe
    assert all(f"\n{key} = " in path.read_text(encoding="utf-8") for key in TABLE_OF)


def test_settings_made_by_a_program_name_where_they_come_from() -> None:
    with pytest.raises(InputError, match="in the tests"):
        make_recipe({"epoch": 1}, "the tests")


def test_only_what_has_candidates_can_be_left_to_the_choice() -> None:
    recipe = make_recipe({"choose": ["whitening", "views"]}, "x")
    assert recipe.search.choose == ("whitening", "views")
    message = refusal("demo", "choose=seed")
    assert all(name in message for name in CANDIDATES)


@pytest.mark.parametrize("name", [name for name in CANDIDATES if name not in ("views", "encoder_weights")])
def test_every_candidate_is_a_value_that_its_setting_takes_and_the_first_changes_least(name: str) -> None:
    for value in CANDIDATES[name]:
        assert value_of(make_recipe({name: value}, "the test"), name) == value
    default = value_of(Recipe(), name)
    assert CANDIDATES[name][0] == ("crop" if default == "encoder" else default)


def test_every_setting_has_a_name_of_its_own_a_meaning_and_a_default_that_it_takes() -> None:
    names = [one.name for table in TABLES.values() for one in fields(table)]
    assert len(set(names)) == len(names)
    for name, (setting, default) in settings_by_name().items():
        assert setting.meaning.endswith(".")
        assert setting.check(name, default, default, "the test") == default


def test_views_and_resolutions_are_those_of_the_kernel() -> None:
    from kernel.tables import RESOLUTIONS as OF_KERNEL
    from kernel.views import VIEWS as KNOWN

    assert set(VIEWS) == set(KNOWN)
    assert RESOLUTIONS == OF_KERNEL


def test_a_setting_that_a_file_gives_twice_is_refused(tmp_path: Path) -> None:
    assert "is given twice" in refusal(recipe_file(tmp_path, "epochs = 1\n[train]\nepochs = 2\n"))


def test_a_name_that_no_file_can_have_and_a_setting_of_two_lines_are_one_line_too() -> None:
    assert refusal("x" * 5000 + ".toml").startswith("no recipe xxx")
    assert refusal("demo", "epochs=\nx").endswith("(in --set epochs= x)")


def test_explain_says_of_every_setting_what_it_means_and_where_its_value_comes_from() -> None:
    lines = explain(read_given("demo", ["seed=3"], "timm:vit")).splitlines()
    assert 'encoder = "timm:vit"  (--encoder timm:vit)' in lines
    assert "seed = 3  (--set seed=3)" in lines
    assert "epochs = 20  (recipe)" in lines
    assert "weight_decay = 0.05  (default)" in lines
    assert [line.partition("]")[0][1:] for line in lines if line.startswith("[")] == list(TABLES)
    for key in TABLE_OF:
        index = next(number for number, line in enumerate(lines) if line.startswith(f"{key} = "))
        assert lines[index + 1].startswith("    ")


def test_every_recipe_is_listed_with_one_sentence() -> None:
    title, *rows = list_recipes().splitlines()
    assert title == "recipes:"
    assert [row.split()[0] for row in rows] == NAMES
    assert all(row.endswith(".") for row in rows)


def test_recipes_are_read_without_torch_and_pandas() -> None:
    script = (
        "import json, sys; from local.recipes.recipe import read_recipe; read_recipe('demo'); "
        "print(json.dumps([name for name in ('torch', 'pandas', 'numpy', 'timm') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
