"""A run is complete or not there, and a training that is killed ends as if it had not been."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kernel.inputs import InputError
from kernel.manifest import read_manifest
from local.banks.ensemble import read_predictions
from local.banks.evaluation import evaluate_predictions
from local.base.run_folder import VALIDATION_FILE
from local.data.competition import read_competition
from local.encoders.load import load_encoder
from local.recipes.recipe import make_recipe
from local.report.evidence import read_evidence
from local.training.checkpoints import read_checkpoint
from local.training.checks import CHECKPOINTS
from local.training.run import train_run
from tests.conftest import LEARNING, ROOT, TINY, command
from tests.labelled import photo_rows

SETTINGS = {**TINY, **LEARNING, "epochs": 3, "patience": 9, "ema_decay": 0.9, "batch_size": 8}


def train(out, drawn, *more, **settings):
    """The arguments of a training of its own process."""
    pairs = [f"{key}={value}" for key, value in (SETTINGS | settings).items() if key != "encoder"]
    chosen = [
        argument for pair in pairs for argument in ("--set", pair.replace("True", "true").replace("False", "false"))
    ]
    data = ["--data", drawn.competition, "--out", out, "--encoder", (SETTINGS | settings)["encoder"]]
    return ["local/train.py", "--recipe", "demo", *map(str, data), *chosen, *more]


@pytest.fixture(scope="module")
def whole(drawn, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train_run(make_recipe(SETTINGS, "the test"), drawn.competition, out)
    return out


@pytest.mark.parametrize(
    ("views", "larger", "cropped"),
    [(["plain", "larger"], 96, 0), (["plain", "hflip"], 0, 0), (["plain", "centre", "larger"], 96, 98)],
)
def test_photos_are_decoded_larger_only_for_views_that_need_it(drawn, tmp_path, views, larger, cropped):
    train_run(make_recipe({**TINY, "epochs": 0, "views": views}, "the test"), drawn.competition, tmp_path / "run")
    member = json.loads((tmp_path / "run" / "manifest.json").read_text())["members"][0]
    assert member["views"] == views
    preprocessing = member["encoders"][0]["preprocessing"]
    assert (preprocessing["larger_size"], preprocessing["cropped_size"]) == (larger, cropped)


@pytest.mark.parametrize(
    ("monitor", "how"),
    [("recalls", "weighted to the shots of the whole reference"), ("macro_f1", "every class weighted the same")],
)
def test_a_training_ends_with_the_weighted_scores_and_then_the_unweighted_ones(drawn, tmp_path, capsys, monitor, how):
    train_run(make_recipe({**TINY, "epochs": 0, "monitor": monitor}, "the test"), drawn.competition, tmp_path / "run")
    *_, weighted, unweighted, _ = capsys.readouterr().out.splitlines()
    answers = read_predictions(tmp_path / "run")
    hits = evaluate_predictions(answers.log_probabilities, answers.truth).ranks < 5
    assert len(set(answers.weights.tolist())) > 1
    scores = json.loads((tmp_path / "run" / "manifest.json").read_text())["members"][0]["validation"]
    assert scores["recall_at_5"] == pytest.approx((answers.weights * hits).sum() / answers.weights.sum())
    assert scores["unweighted_recall_at_5"] == pytest.approx(hits.mean())
    assert f"held-out observations (val), {how}: " in weighted
    assert f"Recall@5 {scores['recall_at_5']:.3f}" in weighted
    assert unweighted.startswith("the same, unweighted: ")
    assert f"Recall@5 {scores['unweighted_recall_at_5']:.3f}" in unweighted
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["validation"] == scores


def changed_script(path, *lines):
    """local/train.py with some lines of Python before its own, in its first process alone."""
    body = [
        "from local.base.console import run",
        "from local.train import main",
        "from local.training.trainer import Trainer",
        *lines,
        "run(main)",
    ]
    head = f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nif __name__ == '__main__':\n"
    path.write_text(head + "".join(f"    {line}\n" for line in body))
    return path


def test_a_training_that_is_killed_between_checkpoints_ends_as_if_it_had_not_been(drawn, whole, tmp_path):
    """It has finished the best epoch since the checkpoint that it is resumed from, which has another best epoch."""
    out = tmp_path / "run"
    script = changed_script(
        tmp_path / "killed.py",
        "Trainer.is_save_due = lambda self: (self.epoch, self.batch) == (2, 1)",
        "forward_backward = Trainer.forward_backward",
        "def killed(self, batch, number):",
        "    if (self.epoch, number) == (3, 2):",
        "        os.kill(os.getpid(), signal.SIGKILL)",
        "    return forward_backward(self, batch, number)",
        "Trainer.forward_backward = killed",
    )
    assert command(script, *train(out, drawn)[1:]).returncode == -signal.SIGKILL
    left = read_checkpoint(tmp_path / ".run.partial" / CHECKPOINTS)
    assert (left.notes["epoch"], left.notes["batch"]) == (2, 1)
    train_run(make_recipe(SETTINGS, "the test"), drawn.competition, out, resumes=True)
    for name in ("encoder.safetensors", "bank.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    first, second = (read_checkpoint(run / CHECKPOINTS).tensors for run in (whole, out))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(left.tensors["best.head.prototypes"], second["best.head.prototypes"])
    logs = [pd.read_csv(run / "log.csv").drop(columns=["memory_gb"]) for run in (whole, out)]
    pd.testing.assert_frame_equal(*(log.loc[:, ~log.columns.str.endswith("seconds")] for log in logs))
    one, two = (json.loads((run / "metrics.json").read_text()) for run in (whole, out))
    assert (one["validation"], one["chosen_epoch"]) == (two["validation"], two["chosen_epoch"])
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_excluded_observations_are_neither_in_the_bank_nor_held_out(drawn, tmp_path, capsys):
    whole = read_competition(drawn.competition)
    out = [whole.ids[0], whole.ids[-1]]
    recipe = make_recipe({**TINY, "epochs": 0, "reference": "train+val", "exclude": out}, "the test")
    train_run(recipe, drawn.competition, tmp_path / "run")
    assert "exclude: 2 observations left out" in capsys.readouterr().out
    [member] = read_manifest(tmp_path / "run" / "manifest.json").members
    assert member.reference_counts["observations"] == len(whole) - 2
    assert not set(out) & set(read_predictions(tmp_path / "run").observations)
    assert read_evidence(tmp_path / "run", drawn.competition).reference.sum() == len(whole) - 2
    train_run(recipe, drawn.competition, tmp_path / "run", resumes=True)
    assert "is done already" in capsys.readouterr().out
    other = make_recipe({**TINY, "epochs": 0, "reference": "train+val"}, "the test")
    with pytest.raises(InputError, match="exclude was"):
        train_run(other, drawn.competition, tmp_path / "run", resumes=True)


@pytest.mark.slow
def test_a_training_that_is_killed_over_and_over_ends_with_the_same_weights_bit_for_bit(drawn, whole, tmp_path):
    """At any time, also while it writes one of its checkpoints."""
    out, rng = tmp_path / "run", random.Random(0)
    script = changed_script(tmp_path / "saving.py", "Trainer.is_save_due = lambda self: True")
    _, *arguments = train(out, drawn, "--resume")
    for _ in range(2):
        process = subprocess.Popen([sys.executable, script, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if re.match("epoch [1-9]|continuing", line):
                break
        time.sleep(rng.random() / 2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = command(*train(out, drawn, "--resume"))
    assert done.returncode == 0, done.stderr
    for name in ("encoder.safetensors", "bank.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not list(tmp_path.glob(".run*"))


def test_a_training_that_is_asked_to_stop_keeps_what_it_learnt_and_says_how_to_go_on(drawn, whole, tmp_path):
    out, pipe = tmp_path / "run", subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, *train(out, drawn)], cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    for line in process.stdout:
        if line.startswith("epoch 1"):
            break
    os.killpg(process.pid, signal.SIGTERM)  # as torchrun and a terminal do: to all of its processes
    _, errors = process.communicate()
    assert process.returncode == 130
    assert re.search("stopped.* --resume", errors)
    assert "Traceback" not in errors
    refused = command(*train(out, drawn))
    assert refused.returncode == 2
    assert "was interrupted: continue with --resume" in refused.stderr
    train_run(make_recipe(SETTINGS, "the test"), drawn.competition, out, resumes=True)
    assert (out / "encoder.safetensors").read_bytes() == (whole / "encoder.safetensors").read_bytes()


def test_a_finished_run_goes_on_with_more_epochs_and_another_learning_rate(drawn, whole, tmp_path, capsys):
    out = tmp_path / "run"
    train_run(make_recipe(SETTINGS | {"epochs": 2}, "the test"), drawn.competition, out)
    before = (out / "encoder.safetensors").read_bytes()
    train_run(make_recipe(SETTINGS | {"epochs": 2}, "the test"), drawn.competition, out, resumes=True)
    assert "is done already" in capsys.readouterr().out
    assert (out / "encoder.safetensors").read_bytes() == before
    more = make_recipe(SETTINGS | {"epochs": 4, "learning_rate": 5e-4}, "the test")
    train_run(more, drawn.competition, out, resumes=True)
    log = (out / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in log[1:]] == ["0", "1", "2", "3", "4"]
    assert json.loads((out / "manifest.json").read_text())["members"][0]["recipe"]["epochs"] == 4
    assert not list(tmp_path.glob(".run*"))


def test_what_would_be_another_training_is_no_resumption(drawn, tmp_path):
    out = tmp_path / "run"
    train_run(make_recipe(SETTINGS | {"epochs": 1}, "the test"), drawn.competition, out)
    other = command(*train(out, drawn, "--resume", epochs=2, temperature=0.3))
    assert other.returncode == 2
    assert "temperature was 0.1, is 0.3; give another --out" in other.stderr
    assert (out / "manifest.json").is_file()


@pytest.mark.parametrize("has_learnt", [True, False])
def test_an_encoder_is_evaluated_on_what_it_was_not_trained_on_in_an_earlier_run(drawn, tmp_path, has_learnt):
    first = make_recipe({**SETTINGS, "epochs": int(has_learnt), "matcher": "head" if has_learnt else "means"}, "it")
    train_run(first, drawn.competition, tmp_path / "first")
    recipe = make_recipe({"encoder": str(tmp_path / "first"), "epochs": 0, "reference": "train+val"}, "the test")
    train_run(recipe, drawn.competition, tmp_path / "run")
    with safe_open(tmp_path / "run" / VALIDATION_FILE, "pt") as file:
        queries = set(json.loads(file.metadata()["observations"]))
    trained_on = set(read_competition(drawn.competition).in_splits("train").ids)
    assert queries
    assert queries.isdisjoint(trained_on) == has_learnt


def test_without_val_an_encoder_that_learnt_here_keeps_its_seed(drawn, tmp_path):
    photos = tmp_path / "folders"
    for _, _, class_id, path in photo_rows(read_competition(drawn.competition)):
        target = photos / "train" / class_id / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (photos / "test").mkdir()
    shutil.copy(path, photos / "test" / "a.jpg")
    settings = {**SETTINGS, "epochs": 1, "seed": 1, "matcher": "head"}
    train_run(make_recipe(settings, "the test"), photos, tmp_path / "first")
    again = make_recipe({"encoder": str(tmp_path / "first"), "epochs": 0, "seed": 1}, "the test")
    train_run(again, photos, tmp_path / "second")
    with pytest.raises(InputError, match="give the seed and the subset of its training"):
        train_run(replace(again, train=replace(again.train, seed=2)), photos, tmp_path / "third")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="no program that makes a namespace")
def test_a_full_disk_costs_one_line_and_not_what_was_learnt(drawn, tmp_path):
    """The encoder fits, its checkpoint does not."""
    done = train_on_a_small_disk(tmp_path, "4m", drawn)
    assert re.fullmatch(r"error: the disk is full: .* --resume\n", done.stderr)


def train_on_a_small_disk(folder, size, drawn, **settings):
    """Train in a small file system of its own, which takes a namespace; stdout ends with what is left in it."""
    small = folder / "small"
    small.mkdir()
    inside = " ".join(map(str, [sys.executable, *train(small / "run", drawn, **settings)]))
    mount = f"mount -t tmpfs -o size={size} none {small} && {inside}; code=$?; ls -A {small}; exit $code"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount], cwd=ROOT, capture_output=True, text=True)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no file system of its own to fill: {done.stderr.strip()}")
    assert done.returncode == 2, done.stderr
    return done


@pytest.fixture(scope="module")
def plain(drawn, tmp_path_factory):
    """A run without training, of an encoder that is given by its path, with a setting that was chosen."""
    folder = tmp_path_factory.mktemp("plain")
    encoder_files(folder / "encoder", seed=0)
    train_run(make_recipe(plain_settings(folder), "the test"), drawn.competition, folder / "run")
    return folder


def plain_settings(folder):
    return {"encoder": str(folder / "encoder"), "image_size": 64, "choose": ["whitening"], "views": ["plain"]}


def encoder_files(stem, seed):
    """An encoder as a pair of files."""
    torch.manual_seed(seed)
    module = timm.create_model("test_resnet", num_classes=0)
    save_file(module.state_dict(), stem.with_name(f"{stem.name}.safetensors"))
    stem.with_name(f"{stem.name}.json").write_text(
        json.dumps({"architecture": "test_resnet", "num_classes": 0, "pretrained_cfg": {"input_size": [3, 64, 64]}})
    )


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"reference": "train"}, 'reference was "train+val", is "train"'),
        ({"genus_weight": 0.5}, "genus_weight was 0.0, is 0.5"),
        ({"whitening": 0.25}, "whitening was 0.0, is 0.25"),
        ({"choose": []}, 'choose was ["whitening"], is []'),
        ({"encoder": "timm:test_vit"}, 'encoder", is "timm:test_vit"'),
        ({"resolution": "720p"}, 'resolution was "auto", is "720p"'),
        ({"subset": 20}, "subset was 0, is 20"),
        ({"epochs": 2}, "epochs was 0, is 2"),
        ({"seed": 1, "genus_weight": 0.5}, "genus_weight was 0.0, is 0.5; seed was 0, is 1"),
    ],
)
def test_a_finished_run_is_not_done_already_for_other_settings(plain, drawn, changed, says):
    recipe = make_recipe(plain_settings(plain) | changed, "the test")
    before = (plain / "run" / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="is finished and holds no training that could be continued: ") as refused:
        train_run(recipe, drawn.competition, plain / "run", resumes=True)
    assert re.search(says.replace("[", r"\[").replace("+", r"\+"), str(refused.value))
    assert "give another --out" in str(refused.value)
    assert (plain / "run" / "manifest.json").read_bytes() == before
    assert not list(plain.glob(".run*"))


def test_a_finished_run_is_not_done_already_for_other_data_or_other_weights_at_the_same_path(plain, drawn, tmp_path):
    recipe = make_recipe(plain_settings(plain), "the test")
    data = tmp_path / "data"
    shutil.copytree(drawn.competition, data)
    next(data.rglob("train/300p/*")).write_bytes(b"another photo")
    with pytest.raises(InputError, match="is not the data that it was made of"):
        train_run(recipe, data, plain / "run", resumes=True)
    shutil.copytree(plain, tmp_path / "copy")
    encoder_files(tmp_path / "copy" / "encoder", seed=1)
    recipe = make_recipe(plain_settings(tmp_path / "copy"), "the test")
    with pytest.raises(InputError, match="which holds other weights"):
        train_run(recipe, drawn.competition, plain / "run", resumes=True)


def test_an_identical_run_is_done_already_however_its_path_and_settings_are_written(
    plain, drawn, tmp_path, monkeypatch, capsys
):
    given = plain_settings(plain)
    shutil.copytree(drawn.competition, tmp_path / "moved")
    monkeypatch.chdir(plain)
    resolution = json.loads((plain / "run" / "manifest.json").read_text())["members"][0]["recipe"]["resolution"]
    for same in (
        {},
        {"encoder": "encoder"},
        {"encoder": "./encoder"},
        {"resolution": resolution},
        {"resize_mode": "crop"},
    ):
        train_run(make_recipe(given | same, "the test"), tmp_path / "moved", plain / "run", resumes=True)
        assert "is done already, with the same settings and data" in capsys.readouterr().out


def test_a_setting_that_a_run_did_not_know_had_its_default(plain, drawn, tmp_path, capsys):
    shutil.copytree(plain, tmp_path / "old")
    manifest = tmp_path / "old" / "run" / "manifest.json"
    content = json.loads(manifest.read_text())
    member = content["members"][0]
    del member["recipe"]["hue"], member["given"]["recipe"]["hue"]
    manifest.write_text(json.dumps(content))
    recipe = make_recipe(plain_settings(plain), "the test")
    train_run(recipe, drawn.competition, tmp_path / "old" / "run", resumes=True)
    assert "is done already" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"hue was 0\.0, is 0\.5"):
        recipe = make_recipe(plain_settings(plain) | {"hue": 0.5}, "the test")
        train_run(recipe, drawn.competition, tmp_path / "old" / "run", resumes=True)


def test_a_trained_run_goes_on_with_another_bank_and_refuses_another_seed_or_fewer_epochs(
    drawn, whole, tmp_path, capsys
):
    shutil.copytree(whole, tmp_path / "run")
    for changed, says in (
        ({"seed": 1}, "cannot be continued: seed was 0, is 1; give another --out"),
        ({"epochs": 2}, "holds a training of 3 finished epochs, and epochs is 2: --resume cannot undo epochs; set"),
        ({"epochs": 0}, "epochs was 3, is 0"),
    ):
        with pytest.raises(InputError, match=says):
            train_run(make_recipe(SETTINGS | changed, "the test"), drawn.competition, tmp_path / "run", resumes=True)
    assert not list(tmp_path.glob(".run*"))
    recipe = make_recipe(SETTINGS | {"reference": "train+val"}, "the test")
    train_run(recipe, drawn.competition, tmp_path / "run", resumes=True)
    assert 'continuing its training; reference was "train", is "train+val"' in capsys.readouterr().out
    assert (tmp_path / "run/encoder.safetensors").read_bytes() == (whole / "encoder.safetensors").read_bytes()
    assert (tmp_path / "run/bank.safetensors").read_bytes() != (whole / "bank.safetensors").read_bytes()


def test_an_interrupted_training_is_not_continued_without_epochs_or_with_fewer(drawn, whole, tmp_path):
    shutil.copytree(whole / "checkpoints", tmp_path / ".run.partial" / "checkpoints")
    for epochs in (0, 2):
        with pytest.raises(InputError, match=f"of 3 finished epochs, and epochs is {epochs}: --resume cannot undo"):
            train_run(
                make_recipe(SETTINGS | {"epochs": epochs}, "x"), drawn.competition, tmp_path / "run", resumes=True
            )


def test_an_out_that_cannot_be_written_is_one_line_before_the_work(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr("local.training.inputs.load_encoder", lambda *given: pytest.fail("the work has begun"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", tmp_path / "file" / "deeper" / "run"):
        with pytest.raises(InputError, match=r"cannot be written \(.*file: it is a file, not a folder\): give another"):
            train_run(make_recipe(TINY, "the test"), drawn.competition, out)
    for out in (tmp_path / "new" / ("n" * 250), Path("/proc/run"), Path("/proc/new/run")):
        with pytest.raises(InputError, match=r"cannot be written \(.*\): give another --out"):
            train_run(make_recipe(TINY, "the test"), drawn.competition, out)
    (tmp_path / ".embeddings").write_text("")
    with pytest.raises(InputError, match=r"cannot be written \(.*embeddings.*: Not a directory\)"):
        train_run(make_recipe(TINY, "the test"), drawn.competition, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".embeddings", "file"]


def test_an_encoder_that_the_gpu_has_no_room_for_is_one_line_and_leaves_nothing(drawn, tmp_path, monkeypatch):
    module, spec = load_encoder("timm:test_resnet", False, 64)

    class NoRoom(type(module)):
        """A stand-in for an encoder on a GPU that is full."""

        def to(self, *given, **named):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    module.__class__ = NoRoom
    monkeypatch.setattr("local.training.inputs.load_encoder", lambda *given: (module, spec))
    with pytest.raises(InputError, match=r"^the GPU is out of memory while moving the encoder to cpu: close .*smaller"):
        train_run(make_recipe(TINY, "the test"), drawn.competition, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_loses_nothing_of_a_training(drawn, whole, tmp_path, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = make_recipe(SETTINGS, "the test")
    with monkeypatch.context() as patched:
        patched.setattr("local.training.export.write_manifest", full)
        with pytest.raises(InputError, match=r"the disk is full: .* keeps the last checkpoint.* with --resume$"):
            train_run(recipe, drawn.competition, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train_run(recipe, drawn.competition, tmp_path / "run", resumes=True)
    for name in ("encoder.safetensors", "bank.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_a_disk_without_room_for_the_checkpoints_to_continue_from_leaves_the_run_as_it_was(
    drawn, whole, tmp_path, monkeypatch
):
    def full(source, target):
        Path(target).mkdir(parents=True)
        raise shutil.Error([(str(source), str(target), f"[Errno {errno.ENOSPC}] No space left on device")])

    shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(InputError, match="the disk is full: "):
        train_run(make_recipe(SETTINGS | {"epochs": 4}, "x"), drawn.competition, tmp_path / "run", resumes=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_disk_that_is_too_small_for_a_run_without_training_is_one_line(drawn, tmp_path):
    done = train_on_a_small_disk(tmp_path, "300k", drawn, epochs=0)
    assert re.fullmatch(r"error: the disk is full: .* run the command again with --resume\n", done.stderr)
    # Found before the first photo is embedded, and nothing is left. On a slow machine loading says how long it takes.
    assert re.fullmatch(r"(loading torch and the other libraries: .*\n)*", done.stdout)


def test_photos_that_cannot_be_read_are_named_and_listed_and_beyond_a_quarter_end_the_work(drawn, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(drawn.competition, data)
    photos = sorted(data.glob("images/*/train/300p/*"))
    photos[3].write_bytes(b"<html>")
    recipe = make_recipe({**TINY, "epochs": 0, "views": ["plain"]}, "the test")
    train_run(recipe, data, tmp_path / "run")
    line = f"photos could not be read: {photos[3]} (UnidentifiedImageError); left out, and listed in unreadable.csv"
    assert line in capsys.readouterr().out
    assert (tmp_path / "run" / "unreadable.csv").read_text() == f"photo,cause\n{photos[3]},UnidentifiedImageError\n"
    for path in photos[: len(photos) // 2]:
        path.write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"photos could not be read: .*, \.\.\.; download them again"):
        train_run(recipe, data, tmp_path / "second")
    assert not (tmp_path / "second").exists()
