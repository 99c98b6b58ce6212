"""A command answers `--help` and a mistake of the user immediately: it imports nothing heavy before it has work."""

import subprocess
import sys

import pytest

from kernel.manifest import MANIFEST, write_manifest
from kernel.views import VIEWS
from local.base.run_folder import VALIDATION_FILE
from local.recipes import settings
from tests.conftest import ROOT
from tests.manifests import manifest

HEAVY = {
    "torch", "torchvision", "timm", "open_clip", "sklearn", "scipy", "pandas", "matplotlib", "kaggle",
    "safetensors.torch", "huggingface_hub", "transformers",
}  # fmt: skip
KERNEL = ("-m", "kernel")
COMMANDS = [KERNEL, ("bundle.py",), *sorted((f"local/{path.name}",) for path in (ROOT / "local").glob("[!_]*.py"))]


def start(*arguments: object) -> tuple[int, str, str, set[str]]:
    """Exit code, output and errors of a command in a fresh process, and which of HEAVY it imported."""
    command = [sys.executable, "-X", "importtime", *map(str, arguments)]  # lists every import on stderr
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "argparse" in imported
    errors = [line for line in lines if not line.startswith("import time:")]
    return done.returncode, done.stdout, "\n".join(errors), imported & HEAVY


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(command):
    code, output, errors, imported = start(*command, "--help")
    assert (code, errors) == (0, "")
    assert output.startswith("usage:")
    assert imported == set()


# Runs a script that gets Ctrl-C while it imports its modules.
INTERRUPTED = """
import os, runpy, signal, sys
class Interrupt:
    def find_spec(name, *given):
        if name == "local.base.console":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("command", COMMANDS[1:], ids=" ".join)
def test_ctrl_c_during_the_imports_is_no_traceback(command):
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


TRAIN = ("local/train.py", "--recipe", "demo", "--out", "{folder}/new", "--data")

EVALUATE = ("local/evaluate.py", "{folder}/run", "--data", "{data}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("local/train.py", "--recipe", "demmo", "--data", "{data}"), "no recipe demmo"),
        ((*TRAIN, "{data}", "--set", "epoch=3"), "epoch"),
        ((*TRAIN, "{folder}/nowhere"), "nowhere does not exist"),
        ((*TRAIN, "{data}", "--out", "{folder}/run"), "run exists already"),
        ((*TRAIN, "{data}", "--out", "{folder}/link"), "link exists already"),
        ((*TRAIN, "{data}", "--out", "{folder}", "--resume"), "it is not a run, manifest.json is missing"),
        ((*TRAIN, "{data}", "--out", "{folder}/file/new"), "cannot be written"),
        ((*TRAIN, "{data}", "--encoder", "{folder}/nowhere", "--set", "pretrained=true"), "no encoder"),
        ((*TRAIN, "{data}", "--on", "kaggle"), "kernel-metadata.json attaches fungi-clef-2025, but"),
        ((*TRAIN, "{data}", "--out", "{folder}/run", "--on", "kaggle"), "run exists already"),
        (("local/evaluate.py", "{folder}/run", "--data", "{folder}/nowhere"), "nowhere does not exist"),
        (
            ("local/evaluate.py", "{folder}/run", "--data", "{data}", "--against", "{folder}/lost"),
            "no such run: {folder}/lost",
        ),
        (
            ("local/evaluate.py", "{folder}/run", "--data", "{data}", "--against", "{folder}/empty"),
            "{folder}/empty is not",
        ),
        (
            ("local/evaluate.py", "{folder}/run", "--data", "{data}", "--against", "{folder}/blind"),
            "{folder}/blind has no",
        ),
        (("local/evaluate.py", "{folder}/blind", "--data", "{data}"), "{folder}/blind has no validation"),
        (("bundle.py", "{folder}/nowhere"), "no such run"),
        (("local/rehearse.py", "--data", "{data}", "--solution", "{folder}/lost.csv"), "lost.csv"),
        (("local/demo.py", "--out", "{folder}/run"), "run exists"),
        (("local/publish.py", "--build", "{folder}/nowhere"), "nowhere"),
        (("local/runs.py", "{folder}/run", "--sort", "R@3"), "--sort R@3: no such column"),
        (("local/submissions.py", "{folder}/file/ledger.csv"), "ledger.csv cannot be read"),
        (("local/benchmark.py", "accuracy", "--data", "{folder}/nowhere"), "nowhere does not exist"),
        (("local/benchmark.py", "omniglot", "--data", "{folder}/empty"), "holds 0 alphabets"),
        ((*KERNEL, "--input", "{folder}/empty", "--working", "{folder}/out"), "no weights under"),
        ((*TRAIN, "{data}", "--encoder", "timm:resnet8"), "timm has no model resnet8: the nearest are resnet18"),
        ((*TRAIN, "{data}", "--encoder", "{folder}/empty", "--set", "pretrained=true"), "contains no open_clip_config"),
        ((*TRAIN, "{data}", "--encoder", ""), "encoder"),
        ((*TRAIN, "{folder}/two\nlines"), "{folder}/two\\nlines does not exist"),
        ((*TRAIN, "n" * 300), "File name too long"),
        (("local/evaluate.py", "n" * 300, "--data", "{data}"), "File name too long"),
        (("local/evaluate.py", "{folder}/run", "--data", "{data}"), "metrics.json cannot be read"),
        (("local/rehearse.py", "--data", "{data}", "--json", "{folder}/empty"), "empty cannot be written as a file"),
        (("local/rehearse.py", "--data", "{data}", "--json", "{folder}/file/new.json"), "cannot be written as a file"),
        (("local/benchmark.py", "speed", "--json", "{folder}/empty"), "empty cannot be written as a file"),
        (("local/generate.py", "--out", "{folder}/new", "--seed", "-1"), "--seed: expected 0 or more, got -1"),
        (("local/demo.py", "--out", "{folder}/new", "--species", "1"), "--species: expected 2 to 2427, got 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_imports_nothing_heavy(arguments, message, tmp_path):
    for path in ("empty", "data/train/amanita", "data/train/boletus", "run", "blind"):
        (tmp_path / path).mkdir(parents=True)
    for name in ("train/amanita/1.png", "train/boletus/1.png"):
        (tmp_path / "data" / name).touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for run in ("run", "blind"):
        write_manifest(manifest(), tmp_path / run / MANIFEST)
    (tmp_path / "run" / VALIDATION_FILE).touch()
    filled = [text.format(folder=tmp_path, data=tmp_path / "data") for text in arguments]
    code, _, errors, imported = start(*filled)
    assert code == 2, errors
    assert message.format(folder=tmp_path) in errors
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    assert imported == set()


def test_the_views_that_a_recipe_may_name_are_those_that_the_kernel_has():
    assert tuple(VIEWS) == settings.VIEWS
