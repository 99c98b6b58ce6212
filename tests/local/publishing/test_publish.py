"""A bundle goes to Kaggle and comes back with a score, through Kaggle's own client and a local Kaggle."""

import json
import re

import pytest

from kernel.inputs import sha256
from kernel.manifest import MANIFEST, read_manifest
from local.bundling.metadata import PLACEHOLDER
from local.bundling.record import PLAIN
from tests.conftest import command
from tests.local.publishing.conftest import DATASET, KERNEL, set_credentials
from tests.local.publishing.loopback import KEY, OWNER, TOKEN

OTHERS = {"slug": "autumn-fungi", "title": "Autumn fungi", "competition": "plantclef-2026"}


def test_the_bundle_is_sent_privately_and_its_score_gets_into_the_ledger(world, capfd):
    world.publish(submits=True)
    kaggle, build = world.kaggle, world.build
    assert kaggle.stored(DATASET) == world.weights
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
    scores = read_manifest(build / "weights" / MANIFEST).members[0].validation
    for column, name in (
        ("local", "recall_at_5"),
        ("unweighted", "unweighted_recall_at_5"),
        ("low", "recall_at_5_low"),
    ):
        assert float(row[column]) == pytest.approx(scores[name], abs=5e-5)
    assert float(row["gpu_seconds"]) > 0  # the last line of the kernel says it
    assert json.loads(row["members"])[0]["recipe"]["seed"] == 0
    said = capfd.readouterr()
    assert "public score 0.5310" in said.out
    assert "| done: " in said.out  # the last line of the log
    assert KEY not in said.out + said.err
    assert "0123456789abcdef" not in said.out + said.err


def test_the_same_command_sends_nothing_twice(world):
    world.publish()
    assert world.kaggle.count("CreateCodeSubmission") == 0
    for _ in range(2):
        world.publish(submits=True)
    for method in ("CreateDataset", "SaveKernel", "CreateCodeSubmission"):
        assert world.kaggle.count(method) == 1, method
    assert world.kaggle.count("CreateDatasetVersion") == 0
    assert len(world.ledger) == 1


def test_other_weights_become_a_new_version_of_the_dataset_and_of_the_kernel(world):
    world.publish(submits=True)
    world.bundle_again()
    world.publish(submits=True)
    [version] = world.kaggle.bodies["CreateDatasetVersion"]
    assert version["datasetSlug"] == "few-shot-species-weights"
    assert sha256(world.build / "weights" / MANIFEST) in version["body"]["versionNotes"]
    assert world.kaggle.stored(DATASET)[MANIFEST] == (world.build / "weights" / MANIFEST).read_bytes()
    assert [row["version"] for row in world.ledger] == ["1", "2"]


def test_a_version_that_somebody_else_sent_is_replaced(world):
    world.publish()
    world.kaggle.datasets[DATASET].append({"manifest.json": b"another"})
    world.publish()
    assert world.kaggle.stored(DATASET)[MANIFEST] == (world.build / "weights" / MANIFEST).read_bytes()
    assert world.kaggle.count("SaveKernel") == 2  # a kernel keeps the version that it was pushed with


def test_everything_is_private_unless_public_is_given(world, capsys):
    world.publish(is_public=True)
    assert "isPrivate" not in world.kaggle.bodies["CreateDataset"][0]  # false is the wire's default
    assert not world.kaggle.bodies["SaveKernel"][0].get("isPrivate", False)
    world.publish()
    assert world.kaggle.bodies["SaveKernel"][1]["isPrivate"] is True


@pytest.mark.parametrize("owner", [OWNER, PLACEHOLDER])
@pytest.mark.parametrize("names", [{}, OTHERS])
def test_any_owner_slug_title_and_competition_can_be_published(world, owner, names):
    """The user may change kernel-metadata.json; nothing depends on its original content."""
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


def test_with_a_token_that_is_not_printed_kaggle_says_who_the_owner_is(world, monkeypatch, capfd):
    set_credentials(monkeypatch, KAGGLE_API_TOKEN=TOKEN)
    world.describe()
    world.publish(is_dry=True)
    assert f"{PLACEHOLDER} stands for your Kaggle name" in capfd.readouterr().out
    world.publish()
    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err
    assert world.kaggle.bodies["SaveKernel"][0]["slug"] == KERNEL
    assert list(world.kaggle.datasets) == [DATASET]
    written = json.loads((world.build / "kernel-metadata.json").read_text(encoding="utf-8"))
    assert (written["id"], written["code_file"]) == (KERNEL, "kernel.py")


def test_the_kernel_is_pushed_when_the_dataset_is_ready(world, capsys):
    world.kaggle.processing = ["NOT_YET_PERSISTED", "BLOBS_RECEIVED", "READY"]
    world.publish()
    assert "blobs_received" in capsys.readouterr().out
    assert world.kaggle.processing == ["READY"]


def test_a_dataset_that_is_not_ready_in_time_is_not_sent_again(world, monkeypatch):
    monkeypatch.setattr("local.publishing.uploads.POLL_SECONDS", 600)  # fewer questions
    world.kaggle.processing = ["BLOBS_RECEIVED"]
    assert "still blobs_received after 1:00:00" in world.refusal()
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
def test_a_failed_run_shows_the_end_of_its_log_and_is_pushed_again_by_the_next_command(world, state, capsys):
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


def test_the_log_of_an_earlier_run_is_not_accepted(world):
    """For a moment, Kaggle's latest run of a kernel is still the one before."""
    log, world.kaggle.log = world.kaggle.log, "done: 3 photos"
    assert "other weights" in world.refusal(submits=True)
    world.kaggle.log = log
    world.publish(submits=True)
    assert world.kaggle.count("SaveKernel") == 1


def test_on_a_terminal_the_wait_is_one_line(world, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    world.publish()
    states = re.findall(r"\r\S+, version 1: (\w+)", capsys.readouterr().out)
    assert states == ["queued", "running", "complete"]


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
def test_a_wrong_csv_is_not_submitted(world, spoil, says):
    world.kaggle.output["submission.csv"] = spoil((world.build / PLAIN).read_text(encoding="utf-8")).encode()
    assert says in world.refusal(submits=True)
    assert world.kaggle.submitted == []


def test_an_older_csv_is_not_used_for_a_run_that_wrote_none(world):
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


def test_the_gpu_time_is_that_of_the_last_piece_of_the_log(world):
    text = world.kaggle.log
    pieces = [{"stream_name": "stdout", "time": 61.5 * number, "data": f"{line}\n"}
              for number, line in enumerate(text.splitlines(), start=1)]  # fmt: skip
    world.kaggle.log = json.dumps(pieces)
    world.publish(submits=True)
    assert [row["gpu_seconds"] for row in world.ledger] == [f"{61.5 * len(pieces):.0f}"]


def test_a_ledger_that_is_none_is_refused_before_anything_is_sent(world):
    ledger = world.folder / "runs" / "submissions.csv"
    ledger.write_text("a;b\n1;2\n")
    assert "is not a ledger" in world.refusal(submits=True)
    assert world.kaggle.requests == []
    assert ledger.read_text() == "a;b\n1;2\n"


def test_a_submission_that_cannot_be_scored_is_in_the_ledger_and_its_reason_is_reported(world):
    world.kaggle.scoring = ["PENDING", "ERROR"]
    assert "Notebook Timeout" in world.refusal(submits=True)
    assert [row["status"] for row in world.ledger] == ["error"]


def test_a_competition_that_takes_csv_files_gets_the_one_of_the_kernel(world):
    world.kaggle.competition["isKernelsSubmissionsOnly"] = False
    world.publish(submits=True)
    [submitted] = world.kaggle.bodies["CreateSubmission"]
    name, content = world.kaggle.blobs[submitted["blobFileTokens"]]
    assert name == "submission.csv"
    assert bytes(content) == (world.build / PLAIN).read_bytes()
    assert world.kaggle.count("CreateCodeSubmission") == 0


def test_the_clients_own_commands_work_with_the_metadata_of_the_repository_and_of_the_build(world, tmp_path):
    result = command("-m", "kaggle", "datasets", "create", "-p", "build/weights", "-r", "zip", cwd=world.folder)
    assert result.returncode == 0, result.stderr
    assert world.kaggle.stored(DATASET) == world.weights
    for more in ([], ["-p", "build"]):
        result = command("-m", "kaggle", "kernels", "push", *more, cwd=world.folder)
        assert result.returncode == 0, result.stderr
        assert "successfully pushed" in result.stdout
    for pushed in world.kaggle.bodies["SaveKernel"]:
        assert pushed["slug"] == KERNEL
        assert pushed["text"] == (world.build / "kernel.py").read_text(encoding="utf-8")
        assert pushed["enableInternet"] is False
