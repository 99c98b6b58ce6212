"""The real thing on a small competition: train, bundle, and run the bundle where nothing else lies."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from bundle import bundle
from kernel.inputs import InputError, sha256
from kernel.manifest import MANIFEST, read_manifest
from local import train
from local.base.console import run
from local.bundling.wheels import IMAGE, is_newer
from local.encoders.load import load_encoder
from local.predict import predict
from local.recipes.recipe import make_recipe
from local.rehearsal.rehearsal import Rehearsal
from local.rehearsal.report import play_all, rehearse
from local.training.checkpoints import read_checkpoint
from local.training.checks import CHECKPOINTS
from local.training.run import train_run
from tests.conftest import LEARNING, ROOT, TINY, command, photo
from tests.layouts import SPECIES, fungitastic, herbarium, plantclef, table


@pytest.fixture(scope="module")
def built(trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built")
    bundle([trained], out)
    return out


@pytest.fixture
def kaggle(built, drawn, tmp_path) -> Path:
    """An empty machine: the competition and the weights as mounted, the script alone in a folder."""
    (tmp_path / "input" / "competitions").mkdir(parents=True)
    (tmp_path / "input" / "competitions" / "fungi").symlink_to(drawn.competition)
    shutil.copytree(built / "weights", tmp_path / "input" / "weights")
    (tmp_path / "src").mkdir()
    shutil.copy(built / "kernel.py", tmp_path / "src" / "script.py")
    return tmp_path


def run_script(kaggle: Path, name: str = "working", **environment: str) -> subprocess.CompletedProcess:
    """Run the script as Kaggle would, in a folder of its own."""
    folders = ["--input", kaggle / "input", "--working", kaggle / name]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("KAGGLE")}
    return command("-P", kaggle / "src" / "script.py", *folders, cwd=kaggle, env={**kept, **environment})


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_the_run_folder_says_all_that_made_it(trained):
    for name in ("recipe.toml", MANIFEST, "metrics.json", "log.csv", "training-curve.png", "class-distribution.png"):
        assert (trained / name).stat().st_size > 0, name
    manifest = json.loads((trained / MANIFEST).read_text())
    assert {"bank.safetensors", "encoder.safetensors"} == set(manifest["files"])
    assert all(sha256(trained / name) == digest for name, digest in manifest["files"].items())
    assert manifest["members"][0]["recipe"]["seed"] == 0
    assert len(manifest["members"][0]["data_sha256"]) == 64
    assert not list(trained.parent.glob(".*.partial"))


def test_the_bundle_alone_in_an_empty_folder_predicts_every_observation(kaggle, drawn):
    result = run_script(kaggle)
    assert result.returncode == 0, result.stderr
    written, sample = rows(kaggle / "working" / "submission.csv"), rows(next(drawn.competition.glob("*SAMPLE*.csv")))
    assert written[0] == sample[0] == ["observationId", "predictions"]
    assert [row[0] for row in written] == [row[0] for row in sample]
    assert all(len(set(row[1].split())) == 10 for row in written[1:])
    assert len({row[1] for row in written[1:]}) > len(written) / 2  # not the fallback
    assert result.stdout.splitlines()[-1].startswith("done: ")
    assert os.listdir(kaggle / "working") == ["submission.csv"]


def test_the_package_and_the_script_write_the_same_bytes(kaggle):
    assert run_script(kaggle).returncode == 0
    result = command("-m", "kernel", "--input", kaggle / "input", "--working", kaggle / "package")
    assert result.returncode == 0, result.stderr
    script, package = kaggle / "working" / "submission.csv", kaggle / "package" / "submission.csv"
    assert script.read_bytes() == package.read_bytes()


def test_two_bundles_of_one_run_are_byte_identical(built, trained, tmp_path):
    bundle([trained], tmp_path)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert Path("kernel.py") in files
    assert files == sorted(path.relative_to(built) for path in built.rglob("*") if path.is_file())
    assert all((tmp_path / name).read_bytes() == (built / name).read_bytes() for name in files)


@pytest.mark.slow
def test_an_ensemble_of_a_run_with_itself_predicts_as_the_run_alone(trained, kaggle, tmp_path):
    assert run_script(kaggle).returncode == 0
    bundle([trained, trained], tmp_path / "twice")
    shutil.copy(tmp_path / "twice" / "kernel.py", kaggle / "src" / "script.py")
    shutil.rmtree(kaggle / "input" / "weights")
    shutil.copytree(tmp_path / "twice" / "weights", kaggle / "input" / "weights")
    result = run_script(kaggle, "twice")
    assert result.returncode == 0, result.stderr
    assert (kaggle / "twice" / "submission.csv").read_text() == (kaggle / "working" / "submission.csv").read_text()


def test_runs_of_two_versions_of_a_library_that_would_travel_are_not_bundled_together(trained, tmp_path):
    for version in ("99.0", "99.1"):
        shutil.copytree(trained, tmp_path / version)
        manifest = json.loads((tmp_path / version / MANIFEST).read_text())
        manifest["members"][0]["versions"]["timm"] = version
        (tmp_path / version / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"timm 99\.0 and .* with 99\.1"):
        bundle([tmp_path / "99.0", tmp_path / "99.1"], tmp_path / "build")
    with pytest.raises(InputError, match=r"pip install timm==99\.1, or train again"):
        bundle([tmp_path / "99.1"], tmp_path / "build")
    assert not list((tmp_path / "build").glob("**/*"))


def test_a_seed_trains_the_same_weights_twice(drawn, trained, tmp_path):
    settings = [f"--set={key}={str(value).lower()}" for key, value in TINY.items() if key != "encoder"]
    settings += [f"--set={key}={value}" for key, value in LEARNING.items()]
    recipe = ["--recipe", "fungiclef-baseline", "--encoder", TINY["encoder"]]
    result = command("local/train.py", *recipe, *settings, "--data", drawn.competition, "--out", tmp_path / "again")
    assert result.returncode == 0, result.stderr
    assert sha256(tmp_path / "again" / "encoder.safetensors") == sha256(trained / "encoder.safetensors")
    # The encoder may be the one before training; the checkpoint holds the weights of the trained epoch.
    first, second = (read_checkpoint(run / CHECKPOINTS).part("best") for run in (trained, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    torch.manual_seed(0)
    initial = load_encoder(TINY["encoder"], False, TINY["image_size"])[0].state_dict()
    assert not torch.equal(first["encoder.conv1.0.weight"], initial["conv1.0.weight"])


def test_weights_that_do_not_match_the_script_are_refused_with_both_digests(kaggle):
    manifest = kaggle / "input" / "weights" / MANIFEST
    expected = sha256(manifest)
    manifest.write_text(manifest.read_text() + "\n")
    result = run_script(kaggle)
    assert result.returncode == 2
    assert expected in result.stderr
    assert sha256(manifest) in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert len(rows(kaggle / "working" / "submission.csv")) > 1  # the sample submission's answer


def test_a_photo_that_cannot_be_read_costs_only_itself(kaggle, drawn):
    assert run_script(kaggle).returncode == 0
    before = rows(kaggle / "working" / "submission.csv")
    (kaggle / "input" / "competitions" / "fungi").unlink()
    shutil.copytree(drawn.competition, kaggle / "input" / "competitions" / "fungi")
    table = rows(next((kaggle / "input").rglob("*-Test.csv")))
    column = {name: index for index, name in enumerate(table[0])}
    fallback = json.loads((kaggle / "input" / "weights" / MANIFEST).read_text())["fallback_classes"]
    spoilt = next(name for name, predictions in before[1:] if predictions.split() != fallback)
    for row in table[1:]:
        if row[column["observationID"]] == spoilt:
            photo = next((kaggle / "input").rglob(row[column["filename"]]))
            photo.write_bytes(photo.read_bytes()[:100])
    result = run_script(kaggle, "after")
    assert result.returncode == 0, result.stderr
    assert "1 on the fallback" in result.stdout
    after = rows(kaggle / "after" / "submission.csv")
    assert [row for row, old in zip(after, before, strict=True) if row != old] == [[spoilt, " ".join(fallback)]]


def test_a_rehearsal_runs_the_bundle_offline_and_scores_it(built, drawn):
    report = rehearse(drawn.competition, built, drawn.solution)
    assert not report.failed, report
    assert report.scores["recall_at_5_low"] <= report.scores["recall_at_5"] <= report.scores["recall_at_5_high"]
    assert report.photos_per_second > 0
    assert report.peak_memory_mb > 100
    left = sorted(path.name for path in (built / "rehearsal" / "plain").iterdir())
    assert left == ["kernel.log", "submission.csv"]
    assert not list(built.glob(".*"))


def test_a_rehearsal_shows_the_script_no_label_of_the_test(built, drawn, tmp_path):
    """A script that looks for answers finds none, even where the user keeps the solution beside the data."""
    data = tmp_path / "data"
    shutil.copytree(drawn.competition, data)
    shutil.copy(drawn.solution, data / "solution.csv")
    spy = "import pathlib, sys\nfor path in sorted(pathlib.Path(sys.argv[2]).rglob('*.csv')): print(path.name)\n"
    copied = tmp_path / "build"
    shutil.copytree(built, copied)
    (copied / "kernel.py").write_text(spy)
    report = rehearse(data, copied)
    assert report.failed == ["plain"]
    assert "submission.csv" in report.scenarios[0].reason
    seen = (copied / "rehearsal" / "plain" / "kernel.log").read_text().split()
    assert any(name.endswith("-Test.csv") for name in seen)
    assert "solution.csv" not in seen


def open_clip_folder(folder: Path) -> Path:
    """A tiny open_clip model in the hub's own format."""
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    model = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir()
    preprocess = {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.3, 0.2, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    config = {"model_cfg": model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(CLIP(**model).state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.slow
def test_an_open_clip_encoder_runs_from_the_wheels_in_its_weights(drawn, tmp_path):
    """Kaggle's image lacks open_clip: here a package that cannot be imported stands in the environment's place."""
    encoder = open_clip_folder(tmp_path / "clip")
    recipe = ["--recipe", "fungiclef-baseline", "--encoder", encoder, "--set", "reference=train"]
    result = command("local/train.py", *recipe, "--data", drawn.competition, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    result = command("bundle.py", tmp_path / "run", "--out", tmp_path / "build")
    assert result.returncode == 0, result.stderr
    wheels = sorted(path.name.partition("-")[0] for path in (tmp_path / "build" / "weights" / "wheels").iterdir())
    assert wheels == ["ftfy", "open_clip_torch", *(["timm"] if is_newer(timm.__version__, IMAGE["timm"]) else [])]
    travels = load_file(tmp_path / "build" / "weights" / "1-encoder.safetensors")
    whole = load_file(encoder / "open_clip_model.safetensors")
    assert set(travels) == {key.removeprefix("visual.") for key in whole if key.startswith("visual.")} != set(whole)

    for library in ("open_clip", "ftfy"):
        (tmp_path / "absent" / library).mkdir(parents=True)
        (tmp_path / "absent" / library / "__init__.py").write_text(f"raise ImportError('no {library} here')")
    folders = ["--input", tmp_path / "input", "--working", tmp_path / "working"]
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "fungi").symlink_to(drawn.competition)
    (tmp_path / "input" / "weights").symlink_to(tmp_path / "build" / "weights")
    absent = {**os.environ, "PYTHONPATH": str(tmp_path / "absent")}
    assert command("-c", "import open_clip", cwd=tmp_path, env=absent).returncode == 1
    result = command(tmp_path / "build" / "kernel.py", *folders, cwd=tmp_path, env=absent)
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path / "working") == ["submission.csv"]
    report = rehearse(drawn.competition, tmp_path / "build", drawn.solution)
    assert not report.failed, report
    assert (tmp_path / "working" / "submission.csv").read_bytes() == (
        tmp_path / "build" / "rehearsal" / "plain" / "submission.csv"
    ).read_bytes()


def lose_the_labels(data: Path) -> list[str]:
    table = next(data.rglob("*-Train.csv"))
    table.write_text(table.read_text().replace("category_id", "class", 1))
    return ["--encoder", "timm:test_resnet", "--set", "pretrained=false"]


def claim_another_architecture(data: Path) -> list[str]:
    config = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": {}}
    (data / "wrong.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(1)}, data / "wrong.safetensors")
    return ["--encoder", str(data / "wrong")]


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (lose_the_labels, "lacks the column 'category_id'"),
        (claim_another_architecture, "wrong.safetensors does not match"),
    ],
)
def test_a_mistake_that_only_training_finds_is_one_line_and_leaves_nothing_behind(
    drawn, tmp_path, monkeypatch, capsys, mistake, says
):
    """Those that are found without torch are in test_startup.py."""
    data = tmp_path / "data"
    shutil.copytree(drawn.competition, data)
    arguments = ["--recipe", "fungiclef-baseline", *mistake(data), "--data", str(data), "--out", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        run(train.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(error.splitlines()) == 1
    assert says in error
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_damaged_run_is_not_bundled_and_the_old_bundle_stays(built, trained, tmp_path):
    out = tmp_path / "build"
    shutil.copytree(built, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "bank.safetensors").write_bytes(b"damaged")
    result = command("bundle.py", tmp_path / "run", "--out", out)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "bank.safetensors" in result.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    result = command("bundle.py", tmp_path / "absent", "--out", out)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert str(tmp_path / "absent") in result.stderr


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def rebuilt(built, trained, tmp_path) -> tuple[Path, Path]:
    """A bundle, and another run to bundle in its place."""
    shutil.copytree(built, tmp_path / "build", ignore=shutil.ignore_patterns("rehearsal"))
    shutil.copytree(trained, tmp_path / "other")
    return tmp_path / "build", tmp_path / "other"


@pytest.mark.parametrize("step", [0, 1, 2])
def test_script_and_weights_are_replaced_together_or_not_at_all(rebuilt, monkeypatch, step):
    (out, other), replace, steps = rebuilt, os.replace, []

    def failing(source, target):
        steps.append(target)
        if len(steps) == step + 1:
            raise PermissionError(13, "Permission denied", str(target))
        replace(source, target)

    before = snapshot(out)
    monkeypatch.setattr("bundle.os.replace", failing)
    with pytest.raises(InputError, match=r"cannot bundle into .*Permission denied.*what was there before is unchanged"):
        bundle([other], out)
    monkeypatch.undo()
    assert snapshot(out) == before
    bundle([other], out)
    after = snapshot(out)
    assert set(after) == set(before)
    assert after["kernel.py"] != before["kernel.py"]
    assert after["weights/manifest.json"] != before["weights/manifest.json"]


def test_a_first_bundle_that_fails_leaves_nothing_of_itself(trained, tmp_path):
    (tmp_path / "kernel.py").mkdir()
    (tmp_path / "kernel.py" / "notes.txt").write_text("the user's own")
    with pytest.raises(InputError, match="what was there before is unchanged"):
        bundle([trained], tmp_path)
    assert snapshot(tmp_path) == {"kernel.py/notes.txt": b"the user's own"}


@pytest.mark.parametrize("killed", ["before the weights", "before the script", "before the end"])
def test_what_a_killed_bundling_left_is_put_in_order_by_the_next(rebuilt, tmp_path, killed):
    """The next one fails, so that nothing but the putting in order is seen."""
    out, other = rebuilt
    old = snapshot(out)
    bundle([other], tmp_path / "new")
    new = snapshot(tmp_path / "new")
    (out / "weights").rename(out / ".weights.before")
    (out / ".weights.partial").mkdir()
    if killed != "before the weights":
        shutil.copytree(tmp_path / "new" / "weights", out / "weights")
    if killed == "before the end":
        shutil.copy(tmp_path / "new" / "kernel.py", out / "kernel.py")
    (other / "bank.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="bank"):
        bundle([other], out)
    assert snapshot(out) == (new if killed == "before the end" else old)
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    "script", ["bundle.py", "local/train.py", "local/benchmark.py", "local/publish.py", "local/submissions.py"]
)
def test_commands_run_as_scripts_from_anywhere(script, tmp_path):
    assert "usage:" in command(ROOT / script, "--help", cwd=tmp_path).stdout


def test_commands_run_as_modules_too(tmp_path):
    result = command("-m", "local.train", "--recipe", "fungiclef-baseline", "--data", tmp_path)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "no supported competition found in" in result.stderr


def test_class_folders_with_one_photo_each_go_all_the_way(tmp_path):
    """Nothing can be held out for validation, and a class's name may have a space."""
    data = tmp_path / "data"
    names = ("apple", "bell pepper", "carrot")
    for seed, name in enumerate(names):
        photo(data / "train" / name / "1.png", seed)
        photo(data / "test" / f"like {name}.png", seed)
    (data / "sample_submission.csv").write_text("Id,species\n" + "".join(f"like {name}.png,carrot\n" for name in names))
    recipe = ["--recipe", "fungiclef-baseline", "--encoder", "timm:test_resnet", "--set", "pretrained=false"]
    result = command("local/train.py", *recipe, "--data", data, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["validation"] == {}
    bundle([tmp_path / "run"], tmp_path / "build")
    report = rehearse(data, tmp_path / "build")
    assert not report.failed, report
    assert rows(tmp_path / "build" / "rehearsal" / "plain" / "submission.csv") == [
        ["Id", "species"],
        ["like apple.png", "apple"],
        ["like bell pepper.png", "bell pepper"],
        ["like carrot.png", "carrot"],
    ]
    result = command("local/train.py", *recipe, "--set", "epochs=2", "--data", data, "--out", tmp_path / "tuned")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "has nothing to validate a training on: there is no val" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fungitastic", "herbarium-2021", "herbarium-2022"])
def test_other_competitions_go_all_the_way(name, tmp_path, capsys):
    """The photos of a class are alike, so that every answer can be right."""
    data, year = tmp_path / "data", name.partition("-")[2]
    solution = herbarium(data, int(year)) if year else fungitastic(data)
    recipe = make_recipe({**TINY, "epochs": 0}, "the tests")
    train_run(recipe, data, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / MANIFEST).read_text())
    assert manifest["competition"]["name"] == (name if year else "fungitastic-mini")
    assert manifest["class_ids"] == list(SPECIES)
    bundle([tmp_path / "run"], tmp_path / "build")
    assert ("room for 10 classes" in capsys.readouterr().out) == (not year)  # there are three
    report = rehearse(data, tmp_path / "build", solution)
    assert not report.failed, report
    assert report.scores["recall_at_1"] == 1
    header, first, *_ = rows(tmp_path / "build" / "rehearsal" / "plain" / "submission.csv")
    assert (header, len(first[1].split())) == (
        (["Id", "Predicted"], 1) if year else (["observationId", "predictions"], 3)
    )


@pytest.mark.slow
def test_a_table_competition_with_probabilities_goes_all_the_way(tmp_path, capsys):
    """The photos of a class are alike, so that the true class is always the most probable."""
    data, labels = tmp_path / "data", ("boletus edulis", "amanita", "morchella")
    solution = table(data, "probabilities", labels)
    train_run(make_recipe({**TINY, "epochs": 0}, "the tests"), data, tmp_path / "run")
    said = capsys.readouterr().out
    validation = read_manifest(tmp_path / "run" / MANIFEST).members[0].validation
    assert "scored by log_loss, unless another metric is in competition.toml" in said
    assert read_manifest(tmp_path / "run" / MANIFEST).members[0].weight != 1  # the inverse temperature
    assert f": log-loss {validation['log_loss']:.3f} [" in said
    bundle([tmp_path / "run"], tmp_path / "build")
    with Rehearsal(data, tmp_path / "build", solution) as rehearsal:
        report = play_all(rehearsal, ["plain", "one-row", "weights-missing"])
    assert not report.failed, report
    assert report.scores["recall_at_1"] == 1
    assert report.scores["log_loss"] < math.log(3)
    header, *answers = rows(tmp_path / "build" / "rehearsal" / "plain" / "submission.csv")
    assert header == ["specimen", *labels]
    assert [row[0] for row in answers] == [row[0] for row in rows(data / "sample_submission.csv")[1:]]
    assert all(sum(map(float, row[1:])) == pytest.approx(1, abs=1e-4) for row in answers)
    # Without weights, the sample submission's own answers.
    assert rows(tmp_path / "build" / "rehearsal" / "weights-missing" / "submission.csv")[1][1:] == ["0.333333"] * 3
    predict([tmp_path / "build"], 3, tmp_path / "p.csv", None, together=False, data=data)
    by_kernel = {row[0]: max(zip(map(float, row[1:]), labels, strict=True))[1] for row in answers}
    assert {row[0]: row[2] for row in rows(tmp_path / "p.csv")[1:]} == by_kernel


def test_the_species_of_quadrats_are_found_from_photos_of_single_plants(tmp_path, capsys):
    data, run, build = tmp_path / "data", tmp_path / "run", tmp_path / "build"
    solution = plantclef(data)
    train_run(
        make_recipe({**TINY, "reference": "train+val", "epochs": 0, "choose": ["transduction"]}, "the tests"), data, run
    )
    said, manifest = capsys.readouterr().out, read_manifest(run / MANIFEST)
    assert "transduction is 0, since test photos are cut into tiles" in said
    assert re.search(r"to choose a threshold: \d+ quadrats of 2 to 6 classes", said)
    assert f"chosen: threshold = {manifest.threshold}, on the same quadrats with F1 per observation" in said
    assert manifest.members[0].validation["sample_f1"] > 0
    bundle([run], build)
    script = (build / "kernel.py").read_text()
    assert re.findall(r"kernel/competitions/(\w+)\.py", script).count("plantclef")
    assert not re.search(r"kernel/competitions/(fungi|herbarium|table|class_folders)\.py", script)
    with Rehearsal(data, build, solution) as rehearsal:
        report = play_all(rehearsal, ["plain"])
    assert not report.failed, report
    header, *answers = rows(build / "rehearsal" / "plain" / "submission.csv")
    assert header == ["quadrat_id", "species_ids"]
    assert [row[0] for row in answers] == [row[0] for row in rows(data / "sample_submission.csv")[1:]]
    assert report.scores["sample_f1"] > 0.9  # of the fallback .33, of all three species in each row .65
    predict([build], 3, tmp_path / "p.csv", None, together=False, data=data)
    by_predict = {one[0]: f"[{', '.join(filter(None, one[2::3][:3]))}]" for one in rows(tmp_path / "p.csv")[1:]}
    assert by_predict == dict(answers)
