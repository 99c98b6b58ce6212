"""The workflow for GitHub: its commands exist and know their flags, and nothing in it is public or tells a secret."""

import argparse
import json
import re
import runpy
import shlex
import shutil
import string
import sys

import pytest
import yaml

from local.publishing.credentials import find_credentials
from local.recipes.recipe import read_recipe
from tests.conftest import ROOT
from tests.local.publishing.conftest import set_credentials
from tests.local.publishing.loopback import TOKEN

TEXT = (ROOT / "local" / "publishing" / "github-workflow.yml").read_text(encoding="utf-8")
WORKFLOW = yaml.safe_load(TEXT)
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
INSTALLED = {"pip", "pytest", "ruff", "rm"}  # commands of others, of which only the name is checked


def commands() -> list[list[str]]:
    """The words of every command of the jobs, with the workflow's variables filled in."""
    lines = [line for step in STEPS for line in step.get("run", "").splitlines()]
    return [shlex.split(string.Template(line).substitute(WORKFLOW["env"])) for line in lines]


def kaggle_commands() -> list[list[str]]:
    """Those of Kaggle's client, also the ones that the comments suggest."""
    words = " ".join(line.lstrip("# -") for line in TEXT.splitlines() if line.startswith("#"))
    suggested = re.findall(r"kaggle (?:datasets|competitions) [^,.:()]*?-p \S+", words)
    assert len(suggested) == 3
    return [words for words in (*commands(), *map(shlex.split, suggested)) if words[0] == "kaggle"]


class Parsed(Exception):
    """The flags of a command were understood."""


@pytest.fixture
def parse(monkeypatch):
    """Starts a command, which ends when its own parser has read the flags; returns what the parser found."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(parser, *given, **named):
        raise Parsed(original(parser, *given, **named))

    def parse(start, words: list[str]) -> argparse.Namespace:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(Parsed) as parsed:
            start()
        return parsed.value.args[0]

    return parse


@pytest.mark.parametrize("words", [words for words in commands() if words[0] == "python"], ids=" ".join)
def test_the_flags_of_the_kits_commands_are_known(words, parse):
    if words[1] == "-m":
        assert words[2:4] == ["zipfile", "-e"]
        return
    options = parse(lambda: runpy.run_path(str(ROOT / words[1]), run_name="__main__"), words[1:])
    if words[1] == "local/train.py":
        read_recipe(options.recipe, options.set, options.encoder)
        assert options.on == "kaggle"


@pytest.mark.parametrize("words", kaggle_commands(), ids=" ".join)
def test_the_flags_of_kaggles_commands_are_known(words, parse, kaggle):
    from kaggle.cli import main

    parse(main, words)
    assert kaggle.requests == []


def test_every_command_is_one_that_the_runner_has():
    for words in commands():
        assert words[0] in {"python", "kaggle"} | INSTALLED
        assert shutil.which(words[0]), words[0]


def test_the_jobs_train_bundle_rehearse_and_publish_the_same_run_of_the_same_competition():
    kit = [words[1:] for words in commands() if words[0] == "python" and words[1] != "-m"]
    train, bundle, rehearse, publish = kit
    assert [words[0] for words in kit] == ["local/train.py", "bundle.py", "local/rehearse.py", "local/publish.py"]
    assert bundle[1] == train[train.index("--out") + 1]
    metadata = json.loads((ROOT / "kernel-metadata.json").read_text(encoding="utf-8"))
    assert rehearse[rehearse.index("--data") + 1] == f"data/{metadata['competition_sources'][0]}"
    assert "--submit" in publish


def test_only_a_tag_publishes_and_only_after_the_tests():
    triggers = WORKFLOW[True]  # YAML 1.1 reads `on` as true
    assert list(triggers) == ["push"]  # not pull_request, with which somebody else's code would see the token
    assert WORKFLOW["jobs"]["publish"]["needs"] == "tests"
    assert WORKFLOW["jobs"]["publish"]["if"] == "github.ref_type == 'tag'"


def test_nothing_is_public_and_the_job_may_only_read():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in WORKFLOW["jobs"].values())
    assert not any("--public" in words for words in commands())
    used = {step["uses"].partition("@")[0] for step in STEPS if "uses" in step}
    assert used == {f"actions/{name}" for name in ("checkout", "setup-python", "cache/restore", "cache/save")}


def test_the_token_comes_from_the_secrets_and_only_to_steps_that_ask_kaggle(monkeypatch, kaggle):
    secrets = re.findall(r"\$\{\{\s*secrets\.(\w+)\s*\}\}", TEXT)
    asking = [step for step in STEPS if step.get("env")]
    assert len(secrets) == TEXT.count("secrets.") == len(asking) == 3
    for step in asking:
        assert step["env"] == {"KAGGLE_API_TOKEN": "${{ secrets.KAGGLE_API_TOKEN }}"}
        assert re.search(r"^kaggle |train\.py|publish\.py", step["run"], re.MULTILINE)
        assert "TOKEN" not in step["run"]
    assert all("secrets" not in json.dumps(job.get("env", {})) for job in (WORKFLOW, *WORKFLOW["jobs"].values()))
    set_credentials(monkeypatch, KAGGLE_API_TOKEN=TOKEN)  # the name by which the kit and Kaggle's client find it
    assert find_credentials().secrets == (TOKEN,)


def test_what_is_kept_for_the_next_attempt_is_what_it_restores():
    restore, save = (step for step in STEPS if "cache/" in step.get("uses", ""))
    assert restore["with"]["path"] == save["with"]["path"] == "runs\nbuild/kaggle\n"
    assert save["with"]["key"].startswith(restore["with"]["restore-keys"])
    assert save["if"] == "always()"
