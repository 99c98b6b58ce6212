"""What the tests of publishing share: a rehearsed bundle, a local Kaggle, and a clock that does not wait."""

import csv
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bundle import bundle
from kernel.inputs import InputError, sha256
from kernel.manifest import MANIFEST
from local.bundling.metadata import DATASET_METADATA, write_metadata
from local.bundling.record import PLAIN, ScenarioResult, record_results
from local.bundling.wheels import IMAGE
from local.publish import publish
from local.rehearsal.report import rehearse
from tests.conftest import kernel_metadata, trained_with
from tests.local.publishing.loopback import OWNER, SECRETS, Loopback

DATASET, KERNEL = f"{OWNER}/few-shot-species-weights", f"{OWNER}/few-shot-species"


@pytest.fixture(scope="session")
def rehearsed(trained, drawn, tmp_path_factory) -> Path:
    """A folder with the tester's kernel-metadata.json and a bundle that passed a real rehearsal."""
    folder = tmp_path_factory.mktemp("publish")
    run = trained_with(trained, folder / "runs" / trained.name, IMAGE["timm"])  # so that it needs no wheel
    bundle([run], folder / "build", kernel_metadata(folder / "kernel-metadata.json", OWNER))
    assert not rehearse(drawn.competition, folder / "build", drawn.solution).failed
    return folder


@dataclass
class World:
    """A competitor's folder, a Kaggle to publish to, and a clock that does not wait."""

    folder: Path
    kaggle: Loopback
    slept: list[float] = field(default_factory=list)

    @property
    def build(self) -> Path:
        return self.folder / "build"

    @property
    def ledger(self) -> list[dict[str, str]]:
        with (self.folder / "runs" / "submissions.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    @property
    def weights(self) -> dict[str, bytes]:
        """The files of the weights that Kaggle must get, by name; the client only reads their metadata."""
        files = (path for path in (self.build / "weights").iterdir() if path.name != DATASET_METADATA)
        return {path.name: path.read_bytes() for path in files}

    def publish(self, **options) -> None:
        """What the command does."""
        from local.publishing.client import Clock

        clock = Clock(lambda: sum(self.slept), self.slept.append)
        files = {"metadata": self.folder / "kernel-metadata.json", "ledger": self.folder / "runs" / "submissions.csv"}
        publish(self.build, clock=clock, **files, **options)

    def refusal(self, **options) -> str:
        """The error that the command ends with: one line that contains no secret."""
        with pytest.raises(InputError) as refused:
            self.publish(**options)
        message = str(refused.value)
        assert "\n" not in message
        assert not any(secret in message for secret in SECRETS)
        return message

    def append(self, name: str, text: str) -> None:
        """Append to a file of the bundle."""
        with (self.build / name).open("a", encoding="utf-8") as file:
            file.write(text)

    def change(self, key: str, value: object) -> None:
        """Change a key of kernel-metadata.json."""
        path = self.folder / "kernel-metadata.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value}), encoding="utf-8")

    def describe(self, **metadata: str) -> dict:
        """Write another kernel-metadata.json, as if before bundling; returns its content."""
        path = kernel_metadata(self.folder / "kernel-metadata.json", **metadata)
        write_metadata(self.build, found := json.loads(path.read_text(encoding="utf-8")))
        return found

    def bundle_again(self, **changes: object) -> None:
        """Replace the bundle by another rehearsed one: with changes in its manifest, and a script that accepts it."""
        manifest, script = self.build / "weights" / MANIFEST, self.build / "kernel.py"
        before, content = sha256(manifest), json.loads(manifest.read_text(encoding="utf-8"))
        manifest.write_text(json.dumps({**content, **(changes or {"note": "another"})}), encoding="utf-8")
        script.write_text(script.read_text(encoding="utf-8").replace(before, sha256(manifest)), encoding="utf-8")
        self.kaggle.log = self.kaggle.log.replace(before, sha256(manifest))
        self.record(plain=True)

    def record(self, **scenarios: bool) -> None:
        """Record the results of a rehearsal: whether each scenario passed."""
        record_results(self.build, [ScenarioResult(name, ok, 1.0, "") for name, ok in scenarios.items()])


@pytest.fixture
def world(rehearsed, kaggle, tmp_path):
    shutil.copytree(rehearsed, tmp_path / "competitor")
    plain = tmp_path / "competitor" / "build" / PLAIN
    kaggle.output["submission.csv"] = plain.read_bytes()
    kaggle.log = plain.with_name("kernel.log").read_text(encoding="utf-8")
    return World(tmp_path / "competitor", kaggle)


def set_credentials(monkeypatch, **environment: str) -> None:
    """Replace the credentials in the environment."""
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
