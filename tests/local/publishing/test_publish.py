"""The way to Kaggle and back, by Kaggle's own client against a Kaggle at home that fails where it is asked to.

python -m pytest tests/local/publishing/test_publish.py
"""

import csv
import io
import json
import re
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bundle import bundle
from kernel.inputs import InputError, sha256
from kernel.manifest import MANIFEST
from local.base.files import write_json
from local.base.kaggle_image import IMAGE
from local.bundling.metadata import PLACEHOLDER, write_metadata
from local.bundling.record import PLAIN, RECORD, ScenarioResult, record_results
from local.publish import publish
from local.publishing.credentials import find_credentials
from local.publishing.preflight import SECRETS
from local.rehearsal.report import rehearse
from tests.conftest import command, kernel_metadata, trained_with
from tests.local.publishing.loopback import KEY, OWNER, TOKEN, Loopback, http, saying

DATASET, KERNEL = f"{OWNER}/few-shot-species-weights", f"{OWNER}/few-shot-species"
OTHERS = {"slug": "autumn-fungi", "title": "Autumn fungi", "competition": "plantclef-2026"}


@pytest.fixture(scope="module")
def rehearsed(trained, drawn, tmp_path_factory) -> Path:
    """A folder with a kernel-metadata.json of the tester's and a bundle that was really rehearsed."""
    folder = tmp_path_factory.mktemp("publish")
    run = trained_with(trained, folder / "runs" / trained.name, IMAGE["timm"])  # so that no wheel travels
    bundle([run], folder / "build", kernel_metadata(folder / "kernel-metadata.json", OWNER))
    assert not rehearse(drawn.competition, folder / "build", drawn.solution).failed
    return folder


@dataclass
class World:
    """A competitor's folder, a Kaggle to publish to, and a clock that jumps."""

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

    def publish(self, **options) -> None:
        """What the command does."""
        from local.publishing.client import Clock

        clock = Clock(lambda: sum(self.slept), self.slept.append)
        files = {"metadata": self.folder / "kernel-metadata.json", "ledger": self.folder / "runs" / "submissions.csv"}
        publish(self.build, clock=clock, **files, **options)

    def refusal(self, **options) -> str:
        """The one line that the command ends with, which gives no secret away."""
        with pytest.raises(InputError) as refused:
            self.publish(**options)
        message = str(refused.value)
        assert "\n" not in message
        assert KEY not in message
        assert TOKEN not in message
        return message

    def change(self, key: str, value: object) -> None:
        """Change kernel-metadata.json."""
        path = self.folder / "kernel-metadata.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value}), encoding="utf-8")

    def describe(self, **metadata: str) -> dict:
        """Write another kernel-metadata.json, as before bundling; what it says."""
        path = kernel_metadata(self.folder / "kernel-metadata.json", **metadata)
        write_metadata(self.build, found := json.loads(path.read_text(encoding="utf-8")))
        return found

    def bundle_again(self, **changes: object) -> None:
        """Another bundle, rehearsed as well: its manifest has other entries, and its script takes them."""
        manifest, script = self.build / "weights" / MANIFEST, self.build / "kernel.py"
        before, content = sha256(manifest), json.loads(manifest.read_text(encoding="utf-8"))
        manifest.write_text(json.dumps({**content, **(changes or {"note": "another"})}), encoding="utf-8")
        script.write_text(script.read_text(encoding="utf-8").replace(before, sha256(manifest)), encoding="utf-8")
        self.kaggle.log = self.kaggle.log.replace(before, sha256(manifest))
        self.record(plain=True)

    def record(self, **scenarios: bool) -> None:
        record_results(self.build, [ScenarioResult(name, ok, 1.0, "") for name, ok in scenarios.items()])


@pytest.fixture
def world(rehearsed, tmp_path, monkeypatch):
    shutil.copytree(rehearsed, tmp_path / "competitor")
    with Loopback() as kaggle:
        (tmp_path / "home").mkdir()
        for name in ("KAGGLE_API_TOKEN", "KAGGLE_KERNEL_RUN_TYPE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in kaggle.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(tempfile, "tempdir", None)  # so that TMPDIR is looked up again
        from kaggle.api.kaggle_api_extended import KaggleApi

        monkeypatch.setattr(KaggleApi, "args", ["--local"])  # what the environment says, whenever it was imported
        plain = tmp_path / "competitor" / "build" / PLAIN
        kaggle.output["submission.csv"] = plain.read_bytes()
        kaggle.log = plain.with_name("kernel.log").read_text(encoding="utf-8")
        yield World(tmp_path / "competitor", kaggle)
        assert not kaggle.foreign


def test_the_whole_way_sends_the_bundle_privately_and_brings_the_score_into_the_ledger(world, capfd):
    world.publish(submits=True)
    kaggle, build = world.kaggle, world.build
    sent = {path.name: path.read_bytes() for path in (build / "weights").iterdir()}
    del sent["dataset-metadata.json"]  # which the client reads, and does not send
    assert kaggle.stored(DATASET) == sent
    [created], [pushed], [submitted] = (
        kaggle.bodies[name] for name in ("CreateDataset", "SaveKernel", "CreateCodeSubmission")
    )
    assert created["isPrivate"] is True
    assert created["licenseName"] == "other"
    assert pushed["text"] == (build / "kernel.py").read_text(encoding="utf-8")
    assert (pushed["slug"], pushed["newTitle"]) == (KERNEL, "Few-shot species")
    assert (pushed["isPrivate"], pushed["enableGpu"], pushed["enableInternet"]) == (True, True, False)
    assert pushed["datasetDataSources"] == [DATASET]
    assert pushed["competitionDataSources"] == ["fungi-clef-2025"]
    assert (submitted["kernelOwner"], submitted["kernelSlug"]) == tuple(KERNEL.split("/"))
    assert (submitted["kernelVersion"], submitted["fileName"]) == (1, "submission.csv")
    assert (build / "kaggle" / "submission.csv").read_bytes() == (build / PLAIN).read_bytes()
    [row] = world.ledger
    rows = len((build / PLAIN).read_text(encoding="utf-8").splitlines()) - 1
    assert (row["status"], row["public"], row["private"], row["observations"]) == ("complete", "0.5310", "", str(rows))
    assert (row["runs"], row["version"], row["metric"]) == ("tiny", "1", "recall_at_5")
    assert row["manifest"] == sha256(build / "weights" / MANIFEST)
    assert float(row["low"]) <= float(row["local"]) <= float(row["high"])
    said = capfd.readouterr()
    assert "public score 0.5310" in said.out
    assert "| done: " in said.out  # the last line of the log
    assert KEY not in said.out + said.err
    assert "0123456789abcdef" not in said.out + said.err


def test_the_same_command_again_sends_nothing_twice(world):
    world.publish()
    assert world.kaggle.count("CreateCodeSubmission") == 0
    for _ in range(2):
        world.publish(submits=True)
    for method in ("CreateDataset", "SaveKernel", "CreateCodeSubmission"):
        assert world.kaggle.count(method) == 1, method
    assert world.kaggle.count("CreateDatasetVersion") == 0
    assert len(world.ledger) == 1


def test_other_weights_become_a_version_and_the_kernel_another(world):
    world.publish(submits=True)
    world.bundle_again()
    world.publish(submits=True)
    [version] = world.kaggle.bodies["CreateDatasetVersion"]
    assert version["datasetSlug"] == "few-shot-species-weights"
    assert sha256(world.build / "weights" / MANIFEST) in version["body"]["versionNotes"]
    assert world.kaggle.stored(DATASET)[MANIFEST] == (world.build / "weights" / MANIFEST).read_bytes()
    assert [row["version"] for row in world.ledger] == ["1", "2"]


def test_a_version_that_somebody_else_sent_is_followed_by_these_weights(world):
    world.publish()
    world.kaggle.datasets[DATASET].append({"manifest.json": b"another"})
    world.publish()
    assert world.kaggle.stored(DATASET)[MANIFEST] == (world.build / "weights" / MANIFEST).read_bytes()
    assert world.kaggle.count("SaveKernel") == 2  # a kernel keeps the version that it was pushed with


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(world, capsys):
    world.publish(is_dry=True, submits=True)
    said = capsys.readouterr().out
    for name in (DATASET, KERNEL, "fungi-clef-2025", "1-encoder.safetensors", "manifest.json", "private", "plain"):
        assert name in said
    assert world.kaggle.requests == []


def test_nothing_is_public_unless_it_is_wished(world, capsys):
    world.publish(is_public=True)
    assert "isPrivate" not in world.kaggle.bodies["CreateDataset"][0]  # false is the wire's default
    assert not world.kaggle.bodies["SaveKernel"][0].get("isPrivate", False)
    world.publish()
    assert world.kaggle.bodies["SaveKernel"][1]["isPrivate"] is True


@pytest.mark.parametrize("owner", [OWNER, PLACEHOLDER])
@pytest.mark.parametrize("names", [{}, OTHERS])
def test_any_owner_slug_title_and_competition_goes_the_whole_way(world, owner, names):
    """The repository's kernel-metadata.json is the user's to change; nothing depends on what it says as it comes."""
    slug = world.describe(owner=owner, **names)["id"].partition("/")[2]
    world.kaggle.log = world.kaggle.log.replace("few-shot-species", slug)
    before = (world.folder / "kernel-metadata.json").read_bytes()
    world.publish(submits=True)
    [created], [pushed] = (world.kaggle.bodies[name] for name in ("CreateDataset", "SaveKernel"))
    assert (created["ownerSlug"], created["slug"]) == (OWNER, f"{slug}-weights")
    assert (pushed["slug"], pushed["datasetDataSources"]) == (f"{OWNER}/{slug}", [f"{OWNER}/{slug}-weights"])
    competition = names.get("competition", "fungi-clef-2025")
    assert pushed["competitionDataSources"] == [competition]
    assert [row["competition"] for row in world.ledger] == [competition]
    assert (world.folder / "kernel-metadata.json").read_bytes() == before
    world.publish(submits=True)
    assert world.kaggle.count("SaveKernel") == 1


def test_a_competition_of_another_kind_than_the_runs_is_not_answered(world):
    world.describe(owner=OWNER, competition="herbarium-2020-fgvc7")
    assert "attaches herbarium-2020-fgvc7, but the run was trained on" in world.refusal()
    assert world.kaggle.requests == []


def test_a_rehearsal_without_observations_is_not_published(world):
    submission = world.build / PLAIN
    header, *_ = submission.read_text(encoding="utf-8").splitlines(keepends=True)
    submission.write_text(header, encoding="utf-8")
    record = json.loads((world.build / RECORD).read_text(encoding="utf-8"))
    write_json(record | {"submission": sha256(submission)}, world.build / RECORD)
    assert "has no observations" in world.refusal()
    assert world.kaggle.requests == []


def test_with_a_token_alone_the_owner_is_whom_kaggle_names(world, monkeypatch, capsys):
    swap_credentials(world, monkeypatch, KAGGLE_API_TOKEN=TOKEN)
    world.describe()
    world.publish(is_dry=True)
    assert f"{PLACEHOLDER} stands for your Kaggle name" in capsys.readouterr().out
    world.publish()
    assert world.kaggle.bodies["SaveKernel"][0]["slug"] == KERNEL
    assert list(world.kaggle.datasets) == [DATASET]
    written = json.loads((world.build / "kernel-metadata.json").read_text(encoding="utf-8"))
    assert (written["id"], written["code_file"]) == (KERNEL, "kernel.py")
    result = command("-m", "kaggle", "kernels", "push", "-p", "build", cwd=world.folder)
    assert "successfully pushed" in result.stdout


def test_a_bundle_is_of_whom_the_credentials_name(trained, tmp_path, monkeypatch):
    for name, value in {"KAGGLE_USERNAME": OWNER, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    for name in ("KAGGLE_KEY", "KAGGLE_API_TOKEN", "KAGGLE_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    bundle([trained], tmp_path / "build", kernel_metadata(tmp_path / "kernel-metadata.json"))
    for name, reference in (("kernel-metadata.json", KERNEL), ("weights/dataset-metadata.json", DATASET)):
        assert json.loads((tmp_path / "build" / name).read_text(encoding="utf-8"))["id"] == reference


def append(name: str, text: str) -> Callable[[World], None]:
    def change(world: World) -> None:
        with (world.build / name).open("a", encoding="utf-8") as file:
            file.write(text)

    return change


def swap_credentials(world: World, monkeypatch, **environment: str) -> None:
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda world: world.change("id", "another/few-shot-species"), "belong to tester"),
        (lambda world: world.change("title", "Another title"), "title"),
        (lambda world: world.change("dataset_sources", [f"{OWNER}/other-weights"]), "bundle again"),
        (lambda world: (world.build / "kernel.py").unlink(), "python bundle.py"),
        (append("kernel.py", "#" * 1_000_000), "less than 1,000,000"),
        (append("kernel.py", "# changed"), "was changed after its rehearsal"),
        (append("weights/manifest.json", "\n"), "does not belong to the weights"),
        (append("weights/1-bank.safetensors", "x"), "SHA-256"),
        (lambda world: (world.build / "weights" / "1-bank.safetensors").unlink(), "missing"),
        (append("weights/notes.txt", "x"), "does not belong to the bundle"),
        (lambda world: (world.build / RECORD).unlink(), "has not been rehearsed"),
        (append("rehearsal/plain/submission.csv", "x"), "not the submission of the rehearsal"),
        (lambda world: world.record(hostile=False), "failed in hostile"),
        (lambda world: (world.bundle_again(), (world.build / RECORD).unlink(), world.record(gone=True)), "gone only"),
    ],
)
def test_what_is_not_fit_to_be_sent_is_refused_before_the_first_request(world, change, says):
    change(world)
    assert says in world.refusal()
    assert world.kaggle.requests == []


SECRET_LINES = [
    f"token = '{KEY}'",
    TOKEN,
    "hf_" + "a1B2" * 9,
    "-----BEGIN RSA PRIVATE KEY-----",
    '"key": "' + "6" * 32 + '"',
]


@pytest.mark.parametrize("secret", SECRET_LINES)
def test_no_secret_is_sent_in_the_script(world, secret):
    append("kernel.py", f"# {secret}\n")(world)
    world.record(plain=True)
    lines = len((world.build / "kernel.py").read_text(encoding="utf-8").splitlines())
    message = world.refusal()
    assert f"{world.build / 'kernel.py'} has what looks like a secret in line {lines}" in message
    assert secret not in message
    assert world.kaggle.requests == []


@pytest.mark.parametrize(
    "name",
    [
        "fungitastic-multitask-convnext-384-lr1e-4-seed1",
        "desk-top_risk-averse_mask-rcnn-resnext101-32x8d",
        "bookshelf_convnextlargemlpclip320laion2b",
        "xKGAT_0123456789abcdef0123456789abcdef",
    ],
)
def test_a_name_with_the_letters_of_a_token_inside_a_word_is_no_secret(world, name):
    world.bundle_again(note=name)
    world.publish(is_dry=True)


@pytest.mark.parametrize("before", [' "', "=", ":", "\n", "(", "Bearer "])
@pytest.mark.parametrize("token", ["sk-proj-" + "a1B2" * 9, "ghp_" + "a1B2" * 9, "AKIA" + "A1B2" * 4])
def test_a_token_at_the_border_of_a_word_is_a_secret(before, token):
    assert SECRETS.search(f'{before}{token}"'.encode())


@pytest.mark.parametrize("secret", [KEY, TOKEN])
@pytest.mark.parametrize("name", [MANIFEST, "1-bank.safetensors"])
def test_no_secret_is_sent_with_the_weights(world, secret, name):
    if name == MANIFEST:
        world.bundle_again(note=secret)
    else:
        path = world.build / "weights" / name
        save_file(load_file(path), path, metadata={"made by": secret})
        manifest = json.loads((world.build / "weights" / MANIFEST).read_text(encoding="utf-8"))
        world.bundle_again(files={**manifest["files"], name: sha256(path)})
    message = world.refusal()
    assert f"{world.build / 'weights' / name} has what looks like a secret" in message
    assert world.kaggle.requests == []


def test_a_token_serves_as_well_as_a_key_and_is_not_printed_either(world, monkeypatch, capfd):
    swap_credentials(world, monkeypatch, KAGGLE_API_TOKEN=TOKEN)
    world.publish(submits=True)
    assert len(world.kaggle.submitted) == 1
    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err


def test_a_dry_run_does_not_even_sign_in(world, monkeypatch):
    """Kaggle's client shows a token to Kaggle as soon as it is imported."""
    swap_credentials(world, monkeypatch, KAGGLE_API_TOKEN=TOKEN)
    asked = "from pathlib import Path; from local.publish import publish; "
    asked += f"publish(Path('{world.build}'), is_dry=True, metadata=Path('{world.folder}/kernel-metadata.json'))"
    result = command("-c", asked)
    assert result.returncode == 0, result.stderr
    assert "nothing was sent" in result.stdout
    assert world.kaggle.requests == []


def test_without_credentials_it_says_where_to_put_them(world, monkeypatch):
    swap_credentials(world, monkeypatch)
    assert str(Path.home() / ".kaggle" / "access_token") in world.refusal()
    assert world.kaggle.requests == []


def test_a_key_in_a_file_is_found_and_its_owner_is_told_apart(world, monkeypatch, tmp_path):
    swap_credentials(world, monkeypatch)
    path = tmp_path / "home" / "kaggle.json"
    path.write_text(json.dumps({"username": "somebody", "key": KEY}), encoding="utf-8")
    message = world.refusal(is_dry=True)
    assert "somebody" in message
    assert str(path) in message


KEY_FILE = json.dumps({"username": OWNER, "key": KEY})


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("access_token", TOKEN.encode("utf-16"), "UTF-16"),
        ("access_token", TOKEN.encode("utf-16-be"), "UTF-16"),
        ("access_token.txt", TOKEN.encode("utf-8-sig"), "UTF-8 text with a byte order mark"),
        ("access_token", TOKEN.encode("utf-32"), "UTF-32"),
        ("access_token", TOKEN.encode() + b"\xff", "not UTF-8"),
        ("kaggle.json", KEY_FILE.encode("utf-8-sig"), "UTF-8 text with a byte order mark"),
        ("kaggle.json", KEY_FILE.encode("utf-16-le"), "UTF-16"),
        ("kaggle.json", KEY_FILE[:-1].encode(), "cannot be read as JSON"),
        ("kaggle.json", b'{"username": "tester"}', "cannot be read as JSON with a username and a key"),
    ],
)
def test_credentials_that_the_client_cannot_read_are_named_as_what_they_are(name, content, kind, monkeypatch, tmp_path):
    for variable in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".kaggle" / name
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))} .*{kind}") as refused:
        find_credentials()
    assert not any(secret in str(refused.value) for secret in (TOKEN, KEY))
    path.write_bytes((TOKEN if name.startswith("access") else KEY_FILE).encode() + b"\r\n")
    found = find_credentials()
    assert (found.source, found.secrets) == (str(path), (TOKEN if name.startswith("access") else KEY,))


def test_credentials_that_kaggle_does_not_take_are_named_by_their_place(world, monkeypatch):
    monkeypatch.setenv("KAGGLE_KEY", "0" * 32)
    message = world.refusal()
    assert "KAGGLE_KEY" in message
    assert "settings/api" in message
    assert "CreateDataset" not in world.kaggle.requests


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("GetCompetition", "competitions/fungi-clef-2025/rules"),
        ("CreateDataset", "phone number"),
        ("SaveKernel", "rules accepted"),
        ("GetSubmissionLimits", "competitions/fungi-clef-2025/rules"),
        ("CreateCodeSubmission", "competitions/fungi-clef-2025/rules"),
    ],
)
def test_what_kaggle_forbids_comes_with_what_to_do(world, method, says):
    world.kaggle.fail(method, http(403, "Permission denied"))
    message = world.refusal(submits=True)
    assert "Permission denied" in message
    assert says in message
    assert world.kaggle.count(method) == 1


def hang_up(body: dict) -> None:
    raise ConnectionAbortedError


def be_slow(body: dict) -> None:
    time.sleep(0.2)


@pytest.mark.parametrize(
    "method", ["GetCompetition", "SaveKernel", "GetKernelSessionStatus", "ListKernelSessionOutput"]
)
def test_a_network_that_fails_for_a_while_is_waited_for(world, method, capsys):
    world.kaggle.fail(method, http(500), http(429), hang_up, http(503), be_slow)
    world.publish()
    assert world.slept[:4] == [2, 4, 8, 16] or method != "GetCompetition"
    assert capsys.readouterr().out.count("next attempt in") == 4
    assert world.kaggle.count("CreateDataset") == 1


@pytest.mark.parametrize("method", ["GetCompetition", "StartBlobUpload", "PUT"])
def test_a_connection_that_dies_in_silence_is_given_up(world, method, monkeypatch):
    """The client alone would wait for ever."""
    monkeypatch.setattr("local.publishing.client.REQUEST_TIMEOUT", 0.5)
    awake = threading.Event()

    def be_silent(body: dict) -> dict:
        awake.wait()
        raise ConnectionAbortedError

    world.kaggle.fail(method, be_silent)
    try:
        world.publish()
    finally:
        awake.set()
    stored = world.kaggle.stored(DATASET)
    assert all(stored[name] == (world.build / "weights" / name).read_bytes() for name in stored)


def test_a_network_that_stays_away_has_a_clear_last_word_and_the_command_goes_on_from_there(world):
    world.kaggle.fail("SaveKernel", *[http(502, "Bad gateway")] * 6)
    message = world.refusal()
    assert message.startswith(f"pushing {KERNEL} failed 6 times")
    assert "Bad gateway" in message
    assert world.slept == [2, 4, 8, 16, 32]
    world.publish()
    assert world.kaggle.count("CreateDataset") == 1
    assert world.kaggle.count("CreateDatasetVersion") == 0


def cut(body: dict) -> dict:
    """Of an upload, half arrives."""
    return {"kept": body["sent"][: len(body["sent"]) // 2]}


def test_an_upload_that_is_cut_goes_on_where_it_stopped(world):
    world.kaggle.fail("PUT", cut, cut)
    world.publish()
    stored = world.kaggle.stored(DATASET)
    assert all(stored[name] == (world.build / "weights" / name).read_bytes() for name in stored)
    assert len(stored) == world.kaggle.count("StartBlobUpload")
    assert world.kaggle.count("asked how much") == 2


def test_an_upload_that_never_ends_is_resumed_by_the_next_command(world):
    names = {path.name for path in (world.build / "weights").iterdir()} - {"dataset-metadata.json"}
    world.kaggle.fail("PUT", cut, *[lambda body: {"kept": b""}] * 1000)
    assert "files did not arrive" in world.refusal()
    assert world.kaggle.count("CreateDataset") == 0
    world.kaggle.faults["PUT"].clear()
    world.publish()
    assert world.kaggle.count("StartBlobUpload") == len(names)  # none was begun anew
    stored = world.kaggle.stored(DATASET)
    assert all(stored[name] == (world.build / "weights" / name).read_bytes() for name in names)


def test_what_the_client_itself_refuses_comes_without_advice_on_what_kaggle_forbids(world):
    from local.publishing.client import Kaggle

    def refuse() -> None:
        raise ValueError("Refusing to use upload state directory /tmp/x because it is a symlink.")

    with pytest.raises(InputError) as refused:
        Kaggle("the environment").call("sending weights", refuse, forbidden="a dataset needs a phone number")
    assert str(refused.value).startswith("sending weights: Refusing to use upload state directory")
    assert "phone" not in str(refused.value)


def test_wheels_travel_in_a_zip_that_kaggle_unpacks_into_their_folder(world):
    wheel = world.build / "weights" / "wheels" / "ftfy-6.3-py3-none-any.whl"
    wheel.parent.mkdir(exist_ok=True)
    wheel.write_bytes(b"a wheel")
    wheels = {path.name: path.read_bytes() for path in wheel.parent.iterdir()}  # a newer timm than Kaggle's is another
    manifest = json.loads((world.build / "weights" / MANIFEST).read_text(encoding="utf-8"))
    world.bundle_again(files={**manifest["files"], f"wheels/{wheel.name}": sha256(wheel)})
    world.publish()
    with zipfile.ZipFile(io.BytesIO(world.kaggle.stored(DATASET)["wheels.zip"])) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == wheels


def test_no_dataset_is_made_without_a_file_that_was_refused(world):
    """The client itself goes on without it."""
    world.kaggle.fail("PUT", http(400))
    world.publish()
    names = {path.name for path in (world.build / "weights").iterdir()} - {"dataset-metadata.json"}
    assert set(world.kaggle.stored(DATASET)) == names
    assert world.kaggle.count("CreateDataset") == 1


@pytest.mark.parametrize("method", ["CreateDataset", "CreateCodeSubmission"])
def test_what_did_arrive_is_not_sent_again_when_only_the_answer_was_lost(world, method):
    def lose_the_answer(body: dict) -> None:
        getattr(world.kaggle, f"_{method}")(body)
        raise ConnectionAbortedError

    # The client retries a lost connection by itself where it creates a dataset; what Kaggle then says is here a 500.
    world.kaggle.fail(method, lose_the_answer, *([http(500)] if method == "CreateDataset" else []))
    world.publish(submits=True)
    assert len(world.kaggle.datasets[DATASET]) == 1
    assert len(world.kaggle.submitted) == 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"error": "Maximum batch GPU session count of 2 reached."}, "Maximum batch GPU session count"),
        ({"versionNumber": 1, "url": "u", "invalidDatasetSources": [DATASET]}, f"invalid dataset sources {DATASET}"),
        ({"versionNumber": 1, "url": "u", "invalidCompetitionSources": ["f"]}, "invalid competition sources f"),
        ({"versionNumber": 1, "url": "u", "invalidKernelSources": ["k"]}, "invalid kernel sources k"),
        ({"versionNumber": 1, "url": "u", "invalidModelSources": ["m"]}, "invalid model sources m"),
        ({"versionNumber": 1, "url": "u", "invalidTags": ["t"]}, "invalid tags t"),
        ({"url": "u"}, "did not give a version number"),
    ],
)
def test_an_error_inside_a_200_is_one_and_the_next_command_pushes_again(world, answer, says):
    world.kaggle.fail("SaveKernel", saying(**answer))
    assert says in world.refusal()
    assert world.kaggle.count("GetKernelSessionStatus") == 0
    world.publish()
    assert world.kaggle.count("SaveKernel") == 2


def test_an_error_inside_a_200_of_the_dataset_is_one(world):
    world.kaggle.fail("CreateDataset", saying(status="error", error="The title is in use"))
    assert "The title is in use" in world.refusal()
    assert world.kaggle.count("SaveKernel") == 0


def test_the_kernel_is_pushed_only_when_the_dataset_is_ready(world, capsys):
    world.kaggle.processing = ["NOT_YET_PERSISTED", "BLOBS_RECEIVED", "READY"]
    world.publish()
    assert "blobs_received" in capsys.readouterr().out
    assert world.kaggle.processing == ["READY"]


def test_a_dataset_that_never_gets_ready_is_given_up_and_waited_for_again_without_sending_it_again(world):
    world.kaggle.processing = ["BLOBS_RECEIVED"]
    assert "still blobs_received after 60 min" in world.refusal()
    assert world.kaggle.count("SaveKernel") == 0
    world.kaggle.processing = ["READY"]
    world.publish()
    assert world.kaggle.count("CreateDataset") + world.kaggle.count("CreateDatasetVersion") == 1


def test_a_dataset_that_kaggle_cannot_process_is_sent_again_by_the_next_command(world):
    world.kaggle.processing = ["FAILED"]
    assert "processing failed" in world.refusal()
    world.kaggle.processing = ["FAILED", "FAILED", "READY"]
    world.publish()
    assert world.kaggle.count("CreateDatasetVersion") == 1


@pytest.mark.parametrize("state", ["ERROR", "CANCEL_ACKNOWLEDGED"])
def test_a_run_that_fails_shows_the_end_of_its_log_and_the_next_command_pushes_again(world, state, capsys):
    pieces = [{"stream_name": "stderr", "time": 1.0, "data": f"line {number}\n"} for number in range(50)]
    world.kaggle.running, world.kaggle.log = ["RUNNING", state], json.dumps(pieces)
    message = world.refusal(submits=True)
    assert state.lower() in message
    assert ("out of memory" in message) == (state == "ERROR")
    assert re.findall(r"\| line (\d+)", capsys.readouterr().out) == [str(number) for number in range(30, 50)]
    assert (world.build / "kaggle" / "few-shot-species.log").is_file()
    assert world.kaggle.submitted == []
    world.kaggle.running = ["COMPLETE"]
    world.kaggle.log = (world.build / PLAIN).with_name("kernel.log").read_text(encoding="utf-8")
    world.publish()
    assert world.kaggle.count("SaveKernel") == 2
    assert world.kaggle.count("CreateDataset") == 1


def test_a_state_that_the_client_does_not_know_is_no_traceback(world):
    world.kaggle.running = ["HIBERNATING"]
    message = world.refusal()
    assert "HIBERNATING" in message
    assert "pip install --upgrade kaggle" in message


def test_a_log_of_other_weights_is_not_taken_for_this_version(world):
    """Kaggle tells of a kernel's latest run, which may for a moment be the one before."""
    log, world.kaggle.log = world.kaggle.log, "done: 3 photos"
    assert "other weights" in world.refusal(submits=True)
    world.kaggle.log = log
    world.publish(submits=True)
    assert world.kaggle.count("SaveKernel") == 1


def test_on_a_terminal_the_wait_is_one_line(world, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    world.publish()
    [line] = [line for line in capsys.readouterr().out.split("\n") if "running" in line]
    assert [re.search("queued|running|complete", part).group() for part in line.split("\r")[1:]] == [
        "queued",
        "running",
        "complete",
    ]


def reverse_guesses(text: str) -> str:
    header, *rows = text.splitlines()
    pairs = [row.split(",") for row in rows]
    return "\n".join([header, *(f"{name},{' '.join(guesses.split()[::-1])}" for name, guesses in pairs)])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda text: text.replace("observationId", "observationID"), "header"),
        (lambda text: text[: len(text) // 2], "observation"),
        (lambda text: "\n".join(text.splitlines()[:-1]) + "\n", "not the"),
        (lambda text: "<html>Something went wrong</html>", "not a CSV"),
        (lambda text: "", "not a CSV"),
        (reverse_guesses, "of the first guesses in common"),
    ],
)
def test_a_csv_that_comes_back_wrong_is_not_submitted(world, spoil, says):
    world.kaggle.output["submission.csv"] = spoil((world.build / PLAIN).read_text(encoding="utf-8")).encode()
    assert says in world.refusal(submits=True)
    assert world.kaggle.submitted == []


def test_a_run_that_leaves_no_csv_is_a_failure_and_an_older_one_is_not_taken_for_its_own(world):
    world.publish()
    world.kaggle.output = {"other.csv": b"x", "../submission.csv": b"x"}
    assert "wrote no submission.csv" in world.refusal(submits=True)
    assert not (world.build / "kaggle" / "submission.csv").exists()


def test_no_submission_is_made_when_none_is_left_today(world):
    world.kaggle.limits = 0
    assert "midnight UTC" in world.refusal(submits=True)
    assert world.kaggle.submitted == []
    world.kaggle.limits = 1
    world.publish(submits=True)
    assert len(world.kaggle.submitted) == 1


def test_a_submission_that_cannot_be_scored_is_in_the_ledger_with_its_reason_told(world):
    world.kaggle.scoring = ["PENDING", "ERROR"]
    assert "Notebook Timeout" in world.refusal(submits=True)
    assert [row["status"] for row in world.ledger] == ["error"]


def test_a_competition_that_takes_csvs_gets_the_one_that_the_kernel_left(world):
    world.kaggle.competition["isKernelsSubmissionsOnly"] = False
    world.publish(submits=True)
    [submitted] = world.kaggle.bodies["CreateSubmission"]
    name, content = world.kaggle.blobs[submitted["blobFileTokens"]]
    assert name == "submission.csv"
    assert bytes(content) == (world.build / PLAIN).read_bytes()
    assert world.kaggle.count("CreateCodeSubmission") == 0


def test_the_clients_own_commands_work_where_the_repository_has_its_metadata(world, tmp_path):
    result = command("-m", "kaggle", "datasets", "create", "-p", "build/weights", "-r", "zip", cwd=world.folder)
    assert result.returncode == 0, result.stderr
    names = {path.name for path in (world.build / "weights").iterdir()} - {"dataset-metadata.json"}
    assert set(world.kaggle.stored(DATASET)) == names
    for more in ([], ["-p", "build"]):
        result = command("-m", "kaggle", "kernels", "push", *more, cwd=world.folder)
        assert result.returncode == 0, result.stderr
        assert "successfully pushed" in result.stdout
    for pushed in world.kaggle.bodies["SaveKernel"]:
        assert pushed["slug"] == KERNEL
        assert pushed["text"] == (world.build / "kernel.py").read_text(encoding="utf-8")
        assert pushed["enableInternet"] is False
