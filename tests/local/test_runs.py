"""Runs are listed with what they scored."""

import csv
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from kernel.inputs import InputError
from kernel.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from local.base.files import write_tensors
from local.base.runs import open_run, read_note, write_note
from local.publishing.ledger import COLUMNS, Submission, describe_member, save_submission
from local.remote.order import Session, State, save_state
from local.training.checks import CHECKPOINTS
from local.training.folder import put_in_place
from tests.conftest import command


def copy_run(trained: Path, folder: Path, changed: float = 1e9, **validation: float) -> Path:
    """A copy of a run, with another time and other scores."""
    shutil.copytree(trained, folder)
    manifest = read_manifest(folder / MANIFEST)
    member = dataclasses.replace(manifest.members[0], validation=manifest.members[0].validation | validation)
    write_manifest(dataclasses.replace(manifest, members=(member,)), folder / MANIFEST)
    os.utime(folder / MANIFEST, (changed, changed))
    return folder


def table(*arguments: object) -> list[dict[str, str]]:
    """The rows that local/runs.py writes as CSV."""
    with tempfile.TemporaryDirectory() as folder:
        done = command("local/runs.py", *arguments, "--csv", Path(folder, "table.csv"))
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        with Path(folder, "table.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))


def submission(manifest: Manifest, *runs: str, version: int = 1, **changes: str) -> Submission:
    """The ledger's row of a bundle of runs that are all like one of a manifest."""
    members = [dataclasses.asdict(describe_member(manifest, dataclasses.replace(manifest.members[0], run=run)))
               for run in runs]  # fmt: skip
    values = dict.fromkeys(COLUMNS, "") | {
        "when": "2026-11-01 10:00:00", "runs": " + ".join(runs), "version": str(version), "observations": "226",
        "metric": "recall_at_5", "local": "0.7000", "unweighted": "0.6500", "public": "0.5310", "status": "complete",
        "members": json.dumps(members),
    }  # fmt: skip
    return Submission(**{**values, **changes})


def test_runs_are_listed_newest_first_with_their_scores(trained, tmp_path):
    for age, name in enumerate(("newest", "older", "oldest")):
        copy_run(trained, tmp_path / name, 1e9 - age)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{}")
    os.utime(tmp_path / "broken" / "manifest.json", (1e8, 1e8))
    warning, *lines = command("local/runs.py", tmp_path).stdout.splitlines()
    assert warning.startswith(f"warning: {tmp_path}/broken/manifest.json has format None")
    assert [line.split()[0] for line in lines] == ["run", "newest", "older", "oldest", "broken"]
    assert lines[0].split()[3:8] == ["R@1", "R@5", "R@10", "macro-F1", "unweighted"]
    assert "2001-09-0" in lines[1]
    assert "demo, encoder = " in lines[1]
    assert lines[1].count("[") == 4
    scores = read_manifest(trained / "manifest.json").members[0].validation
    unweighted = [scores[f"unweighted_{name}"] for name in ("recall_at_1", "recall_at_5", "recall_at_10", "macro_f1")]
    assert unweighted[0] != scores["recall_at_1"]
    assert "  " + " / ".join(f"{score:.3f}" for score in unweighted) + "  " in lines[1]
    assert "cannot be read" in lines[4]


def test_the_csv_has_all_digits_and_whole_texts_and_any_column_sorts(trained, tmp_path):
    for number, name in enumerate("abc"):
        copy_run(trained, tmp_path / name, recall_at_5=(0.25, 0.75, 0.5)[number])
    [first, *_] = by_score = table(tmp_path, "--sort", "R@5")
    assert [row["run"] for row in by_score] == ["b", "c", "a"]
    assert [row["run"] for row in table(tmp_path, "--sort", "run")] == ["a", "b", "c"]
    copy_run(trained, tmp_path / "d", log_loss=1.5)
    assert table(tmp_path, "--sort", "log-loss")[0]["run"] == "d"
    scores = read_manifest(tmp_path / "b" / MANIFEST).members[0].validation
    assert scores.keys() - first.keys() <= {"observations"}
    for name in scores.keys() & first.keys():
        assert float(first[name]) == scores[name], name
    assert first["recipe"].startswith('demo, encoder = "timm:test_resnet", image_size = 64, reference = "train"')
    done = command("local/runs.py", tmp_path, "--sort", "R@3")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "no such column; there are run, state, trained, R@1" in done.stderr


def test_a_note_is_kept_in_the_run_and_listed(trained, tmp_path):
    copy_run(trained, tmp_path / "runs" / "best")
    for text, shown in (("first", "first"), ("Güte,\nzwei \udcff", "Güte,\nzwei ?")):
        assert command("local/runs.py", tmp_path / "runs" / "best", "--note", text).stdout.endswith("best: noted\n")
        assert [row["note"] for row in table(tmp_path / "runs")] == [shown]
    assert "Güte,\\nzwei ?" in command("local/runs.py", tmp_path / "runs").stdout
    command("local/runs.py", tmp_path / "runs" / "best", "--note", "")
    assert [row["note"] for row in table(tmp_path / "runs" / "best")] == [""]
    done = command("local/runs.py", tmp_path / "runs" / "lost", "--note", "x")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no such run: {tmp_path}/runs/lost; there are ")


def test_a_note_stays_when_the_run_is_trained_further(tmp_path):
    for name, text in ((".run.partial", ""), ("run", "good")):
        (tmp_path / name).mkdir()
        write_note(tmp_path / name, text)
    put_in_place(tmp_path / ".run.partial", tmp_path / "run")
    assert read_note(tmp_path / "run") == "good"


def test_interrupted_runs_and_those_on_kaggle_are_listed(trained, tmp_path):
    copy_run(trained, tmp_path / "done")
    notes = {"settings": {"encoder": ["timm:vit", "a/b"]}, "trained": 3}
    for name in ("cut", "done"):
        checkpoint = tmp_path / f".{name}.partial" / CHECKPOINTS / "000001.0123.safetensors"
        write_tensors({"x": torch.zeros(1)}, checkpoint, {"notes": json.dumps(notes)})
    (tmp_path / ".killed.partial" / CHECKPOINTS).mkdir(parents=True)
    (tmp_path / ".killed.partial" / CHECKPOINTS / "000001.0123.safetensors").write_bytes(b"damaged")
    save_state(State(Session("ann/train-away", 2, 60, "digest")), tmp_path / ".kaggle" / "away")
    states = {row["run"]: row["state"] for row in table(tmp_path)}
    assert states == {
        "done": "done, then interrupted",
        "cut": "interrupted or in training, 3 epochs done",
        "killed": "interrupted or in training",
        "away": "on Kaggle: ann/train-away version 2",
    }
    assert [row["encoder"] for row in table(tmp_path, "--sort", "run") if row["run"] == "cut"] == ["timm:vit + b"]
    assert command("local/runs.py", tmp_path / "cut", "--note", "why").stdout.endswith("cut: noted\n")
    assert [row["note"] for row in table(tmp_path) if row["run"] == "cut"] == ["why"]


def test_a_submission_is_in_the_row_of_the_run_that_was_submitted(trained, tmp_path):
    """A run that was trained again under its name is another one; an ensemble has a row of its own."""
    copy_run(trained, tmp_path / "a-copy")
    run = copy_run(trained, tmp_path / "best")
    manifest = read_manifest(run / MANIFEST)
    again = dataclasses.replace(manifest, files=manifest.files | {"encoder.safetensors": "0" * 64})
    ledger = tmp_path / "submissions.csv"
    save_submission(submission(manifest, "best", version=1, public="0.4000"), ledger)
    save_submission(submission(manifest, "best", version=2, private="0.5200"), ledger)
    save_submission(submission(again, "best", version=3, public="0.9000"), ledger)
    save_submission(submission(manifest, "best", "other", version=4, public="", status="pending"), ledger)
    save_submission(submission(manifest, "earlier", version=5, members="", public="0.3"), ledger)
    rows = table(tmp_path, "--sort", "public")
    assert [(row["run"], row["state"], row["public"], row["private"]) for row in rows] == [
        ("best", "submitted, then removed or trained again", "0.9000", ""),
        ("best", "done", "0.5310", "0.5200"),
        ("earlier", "submitted, then removed or trained again", "0.3", ""),
        ("best + other", "ensemble", "pending", ""),
        ("a-copy", "done", "", ""),
    ]
    assert (rows[3]["recall_at_5"], rows[3]["unweighted_recall_at_5"]) == ("0.7", "0.65")
    assert rows[1]["recall_at_5"] != "0.7"


def test_of_leaderboard_scores_the_lower_log_loss_comes_first(trained, tmp_path):
    for version, (name, public) in enumerate((("worse", "0.9"), ("better", "0.4"), ("pending", "")), 1):
        run = copy_run(trained, tmp_path / name, log_loss=1.0, log_loss_low=0.9, log_loss_high=1.1)
        manifest = read_manifest(run / MANIFEST)
        manifest = dataclasses.replace(manifest, files=manifest.files | {"encoder.safetensors": name})
        write_manifest(manifest, run / MANIFEST)
        row = submission(manifest, name, version=version, public=public, status="complete" if public else "pending")
        save_submission(row, tmp_path / "submissions.csv")
    assert [row["public"] for row in table(tmp_path, "--sort", "public")] == ["0.4", "0.9", "pending"]


def test_a_damaged_ledger_costs_no_run(trained, tmp_path):
    copy_run(trained, tmp_path / "best")
    save_submission(submission(read_manifest(trained / MANIFEST), "best"), tmp_path / "submissions.csv")
    with (tmp_path / "submissions.csv").open("a") as file:
        file.write("half a li")
    done = command("local/runs.py", tmp_path)
    warning, _, line = done.stdout.splitlines()
    assert "line 3 is left out (it has 1 cell, expected 20)" in warning
    assert "0.5310" in line
    (tmp_path / "submissions.csv").write_text("a,b\n")
    warning, _, line = command("local/runs.py", tmp_path).stdout.splitlines()
    assert "is not a ledger" in warning
    assert line.startswith("best ")


def test_a_folder_without_runs_is_one_line(tmp_path):
    done = command("local/runs.py", tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} holds no run: train one with local/train.py, or give another folder\n"


def test_for_a_missing_run_the_existing_ones_are_listed(tmp_path):
    with pytest.raises(InputError, match=r"no such run: .*best; train one with local/train.py"):
        open_run(tmp_path / "best")
    for name in ("best", "baseline", ".other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    (tmp_path / "data").mkdir()
    runs = f"there are {tmp_path}/baseline, {tmp_path}/best"
    for name, problem in (("bets", f"no such run: {tmp_path}/bets"), ("data", f"{tmp_path}/data is not a run")):
        with pytest.raises(InputError) as error:
            open_run(tmp_path / name)
        assert str(error.value).startswith(problem)
        assert str(error.value).endswith(runs)


def test_of_many_runs_only_the_first_are_listed(tmp_path):
    for number in range(11):
        (tmp_path / f"{number:02}").mkdir()
        (tmp_path / f"{number:02}" / "manifest.json").touch()
    with pytest.raises(InputError, match=r"/07 and 3 more$"):
        open_run(tmp_path / "absent")
