"""Every scenario passes a correct kernel, and fails one with the fault that it checks for."""

import json
import os
import shutil
import zipfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from bundle import bundle
from kernel.inputs import InputError, sha256
from kernel.manifest import MANIFEST, CompetitionSpec
from kernel.observations import find_test_table
from local.bundling.record import ScenarioResult
from local.bundling.wheels import IMAGE, is_newer
from local.data.competition import read_competition
from local.rehearsal.rehearsal import Rehearsal, check_competition
from local.rehearsal.report import Report, play_all
from local.rehearsal.scenarios import SCENARIOS, play
from local.rehearsal.staging import fingerprint
from tests.conftest import command, trained_with


@pytest.fixture(scope="module")
def built(trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built")
    bundle([trained], out)
    return out


@pytest.fixture(scope="module")
def report(built, drawn) -> Report:
    """The report of all scenarios with the real bundle."""
    before = fingerprint(drawn.competition), fingerprint(built / "weights")
    with Rehearsal(drawn.competition, built, drawn.solution, kills=1) as rehearsal:
        report = play_all(rehearsal, list(SCENARIOS))
    assert (
        fingerprint(drawn.competition),
        fingerprint(built / "weights"),
    ) == before  # although hard-linked
    assert not list(built.glob(".*"))
    return report


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_bundle_survives(report, built, name):
    result = next(result for result in report.scenarios if result.name == name)
    assert result.ok, result
    if name == "kaggle-image" and result.is_skipped:
        pytest.skip(result.reason)  # no package index
    assert result.seconds > 0
    assert name == "memory" or (built / "rehearsal" / name / "kernel.log").stat().st_size > 0


@pytest.mark.slow
def test_the_report_gives_what_happened(report, drawn):
    observations = find_test_table(drawn.competition, None).observations
    photos = sum(len(observation.photos) for observation in observations)
    reasons = {result.name: result.reason for result in report.scenarios}
    assert list(reasons) == list(SCENARIOS)
    assert f"{len(observations)} observations" in reasons["new-mounts"]
    assert f"{3 * len(observations)} observations" in reasons["larger"]
    assert "1 photo of 1 observation" in reasons["one-row"]
    assert "8 spoiled" in reasons["hostile"]
    assert f"2 of {len(observations)} observations" in reasons["gone"]
    assert reasons["throttled"].startswith(("left out", "skipped: nothing had to be left out"))
    assert f"{photos} photos opened late" in reasons["slow-disk"]
    assert "/kaggle/input" in reasons["weights-missing"]
    assert "complete submission" in reasons["killed"]
    assert report.scores["recall_at_5"] > 0
    assert report.photos_per_second > 0


# A kernel that uses the standard library only. It is correct in all that the scenarios check, except that its guesses
# are random. Each test below breaks one thing in it.
MINIATURE = """
import csv, hashlib, json, os, socket, sys, time, zlib
from pathlib import Path

STARTED = time.monotonic()
INPUTS, WORKING, LIMIT = Path(sys.argv[2]), Path(sys.argv[4]), float(sys.argv[6])
IS_RERUN = "KAGGLE_IS_COMPETITION_RERUN" in os.environ
TABLE = next(INPUTS.rglob("*-Test.csv"))
FOLDER = TABLE.parents[2]
PHOTOS, KEPT = {}, []
for row in csv.DictReader(TABLE.open(encoding="utf-8")):
    PHOTOS.setdefault(row["observationID"], []).append(next(FOLDER.glob("images/*/test/*")) / row["filename"])

def write(guesses):
    partial = WORKING / "submission.partial"
    with partial.open("w") as file:
        file.write("observationId,predictions\\n")
        for observation, row in guesses.items():
            file.write(f"{observation},{' '.join(row)}\\n")
    os.replace(partial, WORKING / "submission.csv")

def refuse(why):
    print("error: " + why, flush=True)
    sys.exit(0 if IS_RERUN else 2)

manifest = next(INPUTS.rglob("manifest.json"), None)
sample = next(csv.DictReader(next(FOLDER.glob("*SAMPLE*")).open()))["predictions"].split()
prior = json.loads(manifest.read_text())["fallback_classes"] if manifest else sample
guesses = dict.fromkeys(PHOTOS, prior)
write(guesses)
print("the fallback submission is written", flush=True)
if not manifest:
    refuse("no weights: attach them")
for name, digest in (json.loads(manifest.read_text())["files"] | {"manifest.json": DIGEST}).items():
    if hashlib.sha256((manifest.parent / name).read_bytes()).hexdigest() != digest:
        refuse(name + " differs: attach the right weights")
total, unreadable, late = sum(map(len, PHOTOS.values())), 0, 0
print(f"miniature: 1 of 1 views of {total} photos", flush=True)
for observation, files in PHOTOS.items():
    if time.monotonic() - STARTED > 0.7 * LIMIT:
        late += 1
        continue
    for file in files:
        try:
            start, content = time.monotonic(), file.read_bytes()
            if content[-2:] != b"\\xff\\xd9":
                raise ValueError("no end of a JPEG")
        except (OSError, ValueError):
            unreadable += 1
            continue
        busy = time.process_time() + 0.01
        while time.process_time() < busy:
            pass
        turn = zlib.crc32(content) % 10
        guesses[observation] = prior[turn:] + prior[:turn]
write(guesses)
print(f"done: {total} photos ({unreadable} unreadable), {len(guesses)} observations (0 on the fallback"
      f", {late} too late), 1 views, 1.0 s, {total:.1f} photos/s", flush=True)
"""
IN_TIME = "if time.monotonic() - STARTED > 0.7 * LIMIT:"
CODE = "sys.exit(0 if IS_RERUN else 2)"
BREAK = {
    "writes a short CSV": ("in guesses.items()", "in list(guesses.items())[:-1]"),
    "writes other ids": ('f"{observation},', 'f"0{observation},'),
    "forgets the header": ('file.write("observationId,predictions\\n")', "pass"),
    "leaves no CSV": ('os.replace(partial, WORKING / "submission.csv")', "pass"),
    "knows one mount": ('INPUTS.rglob("*-Test.csv")', 'INPUTS.glob("competitions/*/metadata/*/*-Test.csv")'),
    "knows the size": ("write(guesses)\nprint(f", "assert 2 < len(guesses) < 30\nwrite(guesses)\nprint(f"),
    "stops at a bad photo": ("except (OSError, ValueError)", "except KeyError"),
    "counts no bad photo": ("unreadable += 1", "pass"),
    "shifts its rows": (
        "write(guesses)\nprint(f",
        "if unreadable: guesses = dict(zip(guesses, [*list(guesses.values())[1:], prior]))\n"
        "for key in guesses:\n    if not any(file.exists() for file in PHOTOS[key]): guesses[key] = prior\n"
        "write(guesses)\nprint(f",
    ),
    "guesses where it saw nothing": ("            continue\n        busy", "        busy"),
    "is impatient": ("busy = time", "late += time.monotonic() - start > 0.02\n        busy = time"),
    "ignores the limit": (IN_TIME, "if False:"),
    "never predicts": ("guesses[observation] = prior[turn:] + prior[:turn]", "pass"),
    "keeps its photos": ("turn = ", "KEPT.append(bytearray(2_000_000))\n        turn = "),
    "ends well in the visible run": (CODE, "sys.exit(0)"),
    "fails in the scored rerun": (CODE, "sys.exit(2)"),
    "ends with a traceback": (CODE, "raise RuntimeError(why)"),
    "says two errors": ('print("error: " + why', 'print("error: once\\nerror: " + why'),
    "leaves a part": (CODE, '(WORKING / "submission.partial").touch(); ' + CODE),
    "removes the fallback": (CODE, '(WORKING / "submission.csv").unlink(); ' + CODE),
    "takes any weights": ("!= digest:", "!= digest and False:"),
    "writes in place": (
        "os.replace(partial, WORKING / \"submission.csv\")",
        'with open(WORKING / "submission.csv", "w") as file:\n'
        "        for line in partial.open():\n"
        '            file.write(line); file.flush(); time.sleep(0.05 * ("total" in globals()))\n'
        "    partial.unlink()",
    ),
    "announces nothing": ('print("the fallback submission is written", flush=True)', ""),
    "connects": ("write(guesses)\nprint(f", "try: socket.socket().connect(('127.0.0.1', 9))\n"
        "except OSError: pass\nwrite(guesses)\nprint(f"),
    "asks for an address": ("write(guesses)\nprint(f", "try: socket.getaddrinfo('huggingface.co', 443)\n"
        "except OSError: pass\nwrite(guesses)\nprint(f"),
}  # fmt: skip


@pytest.fixture
def miniature(built, tmp_path):
    """Replaces the kernel by the miniature, broken or not; returns the build."""

    def make(breakage: str = "", photo_seconds: float = 0.01) -> Path:
        source = MINIATURE.replace("process_time() + 0.01", f"process_time() + {photo_seconds}")
        old, new = BREAK[breakage] if breakage else ("", "")
        assert old in source
        build = tmp_path / "build"
        shutil.copytree(built / "weights", build / "weights")
        digest = f"DIGEST = {sha256(build / 'weights' / MANIFEST)!r}\n"
        (build / "kernel.py").write_text(digest + (source.replace(old, new) if old else source))
        return build

    return make


def result_of(build: Path, drawn, name: str, **options) -> ScenarioResult:
    with Rehearsal(drawn.competition, build, **options) as rehearsal:
        return play(rehearsal, name)


QUICK = [name for name in SCENARIOS if name not in ("throttled", "kaggle-image")]  # the second needs a package index


def test_the_correct_miniature_passes(miniature, drawn):
    with Rehearsal(drawn.competition, miniature(), kills=3) as rehearsal:
        report = play_all(rehearsal, QUICK)
    assert not report.failed, report
    assert not any(result.is_skipped for result in report.scenarios)


@pytest.mark.parametrize(
    ("breakage", "scenario", "reason"),
    [
        ("writes a short CSV", "plain", "rows that are not the"),
        ("writes other ids", "plain", "observations in order"),
        ("forgets the header", "plain", "header"),
        ("leaves no CSV", "plain", "no submission.csv"),
        ("writes a short CSV", "new-mounts", "rows that are not the"),
        ("knows one mount", "old-mounts", "exit code 1: StopIteration"),
        ("knows the size", "larger", "exit code 1: AssertionError"),
        ("knows the size", "one-row", "exit code 1: AssertionError"),
        ("stops at a bad photo", "hostile", "exit code 1"),
        ("counts no bad photo", "hostile", "0 photos are counted as unreadable: 4 are"),
        ("shifts its rows", "gone", "has all its photos, but its row changed"),
        ("guesses where it saw nothing", "gone", "has no photo, but its row is not the fallback"),
        ("is impatient", "slow-disk", "too late, although there was enough time"),
        pytest.param("ignores the limit", "throttled", "the limit was", marks=pytest.mark.slow),
        pytest.param("never predicts", "throttled", "no better than the fallback", marks=pytest.mark.slow),
        ("keeps its photos", "memory", "memory grows with the number of photos"),
        ("ends well in the visible run", "weights-missing", "exit code 0, expected 2"),
        ("ends with a traceback", "weights-missing", "exit code 1, expected 2"),
        ("says two errors", "weights-truncated", "2 error lines"),
        ("leaves a part", "weights-truncated", "left submission.csv, submission.partial in the working folder"),
        ("fails in the scored rerun", "weights-other", "in the scored rerun: exit code 2"),
        ("removes the fallback", "weights-other", "in the scored rerun: it left no submission.csv"),
        ("takes any weights", "weights-other", "exit code 0, expected 2"),
        ("writes in place", "killed", "killed after"),
        ("announces nothing", "killed", "did not print"),
        ("connects", "network", "1 attempt to connect, the first: socket.connect ('127.0.0.1', 9)"),
        ("asks for an address", "network", "socket.getaddrinfo huggingface.co"),
        ("writes a short CSV", "slow-disk", "no run to compare with"),
    ],
)
def test_a_kernel_fails_that(miniature, drawn, breakage, scenario, reason):
    photo_seconds = 0.04 if scenario == "throttled" else 0.01  # in a limit of a second, chance decides
    result = result_of(miniature(breakage, photo_seconds), drawn, scenario, solution=drawn.solution, kills=10)
    assert not result.ok, result
    assert reason in result.reason
    assert "\n" not in result.reason


@pytest.mark.parametrize("name", ["weights-missing", "weights-truncated", "weights-other"])
def test_without_a_sample_submission_wrong_weights_are_refused_and_no_fallback_is_expected(
    built, drawn, tmp_path, name
):
    shutil.copytree(drawn.competition, tmp_path / "data", copy_function=os.link)
    for sample in (tmp_path / "data").glob("*SAMPLE*"):
        sample.unlink()
    with Rehearsal(tmp_path / "data", built) as rehearsal:
        result = play(rehearsal, name)
    assert result.ok, result
    assert result.reason.startswith("error: ")
    assert result.reason.endswith("; no fallback, since there is no sample submission")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with a library that claims to be the timm of Kaggle's image."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))

    def publish(source: str) -> None:
        version = IMAGE["timm"]
        with zipfile.ZipFile(tmp_path / "index" / f"timm-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("timm/__init__.py", f"__version__ = {version!r}\n{source}")
            info = f"timm-{version}.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: timm\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", f"{info}/RECORD,,\n")

    return publish


OLD_TIMM = "def create_model(name, **arguments): raise RuntimeError(f'Unknown model ({name})')\n"


@pytest.mark.skipif(version("timm") == IMAGE["timm"], reason="the installed timm is that of Kaggle's image")
def test_a_bundle_without_a_wheel_of_timm_is_run_with_the_timm_of_kaggles_image(trained, drawn, index, tmp_path):
    bundle([trained_with(trained, tmp_path / "run", IMAGE["timm"])], tmp_path / "build")
    assert result_of(tmp_path / "build", drawn, "kaggle-image").reason.startswith("skipped: timm==")
    index(OLD_TIMM)
    result = result_of(tmp_path / "build", drawn, "kaggle-image")
    assert not result.ok
    assert f"cannot be built by timm {IMAGE['timm']}" in result.reason


@pytest.mark.slow
@pytest.mark.skipif(not is_newer(version("timm"), IMAGE["timm"]), reason="the installed timm is not newer")
def test_a_bundle_with_a_newer_timm_has_it_as_a_wheel(built, drawn, index):
    index(OLD_TIMM)
    result = result_of(built, drawn, "kaggle-image")
    assert result.ok, result
    assert result.reason.startswith(f"timm {version('timm')}, from a wheel in the weights; 0 of ")


def test_the_last_line_can_be_trusted():
    def verdict(results: list[ScenarioResult]) -> str:
        return Report(tuple(results)).verdict

    results = [ScenarioResult(name, True, 1.0, "") for name in SCENARIOS]
    assert verdict(results) == "ready to push"
    assert "ready to push" in verdict(results[:1])
    assert not verdict(results[:1]).startswith("ready")
    assert verdict([replace(results[0], reason="skipped: no such signal"), *results[1:]]).endswith("(skipped: plain)")
    failed = [*results[:-1], replace(results[-1], ok=False)]
    assert verdict(failed) == f"not ready to push: {results[-1].name} failed"


def test_the_command_writes_the_report_and_ends_with_1_when_a_scenario_failed(miniature, drawn, tmp_path):
    options = ["--data", drawn.competition, "--build", miniature("connects"), "--json", tmp_path / "report.json"]
    result = command("local/rehearse.py", *options, "--scenario", "network")
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout.splitlines()[-1] == "not ready to push: network failed"
    report = json.loads((tmp_path / "report.json").read_text())
    assert [set(result) for result in report["scenarios"]] == [{"name", "ok", "seconds", "reason"}]
    result = command("local/rehearse.py", *options, "--scenario", "one-row")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("absent", ["everything", "kernel.py", "weights/manifest.json"])
def test_rehearsing_before_bundling_says_so(miniature, drawn, tmp_path, absent):
    build = tmp_path / "nothing" if absent == "everything" else miniature()
    if absent != "everything":
        (build / absent).unlink()
    with pytest.raises(InputError, match=r"no bundle in .* is missing: run python bundle.py runs/NAME first"):
        Rehearsal(drawn.competition, build)


def test_a_rehearsal_removes_the_folder_of_one_that_was_killed_and_not_of_one_that_runs(miniature, drawn):
    build = miniature()
    killed, running = build / ".rehearsal-99999999-a", build / f".rehearsal-{os.getpid()}-b"
    for folder in (killed, running):
        (folder / "plain").mkdir(parents=True)
    with Rehearsal(drawn.competition, build):
        assert (killed.exists(), running.exists()) == (False, True)


@pytest.mark.parametrize("rows", ["", "1,2\n"])
def test_a_solution_of_other_observations_is_refused_before_the_rehearsal(miniature, drawn, tmp_path, rows):
    (tmp_path / "other.csv").write_text(f"observationID,category_id\n{rows}")
    with pytest.raises(InputError, match="lacks observation"):
        Rehearsal(drawn.competition, miniature(), tmp_path / "other.csv")


def test_a_bundle_is_rehearsed_only_on_the_competition_that_it_was_trained_on(drawn, tmp_path):
    competition = read_competition(drawn.competition)
    digest = competition.observations_digest()
    trained = CompetitionSpec(name="fungiclef", resolution="300p", observations_sha256=digest, time_limit=43200)
    check_competition(drawn.competition, trained)
    for other in ("class-folders", "herbarium"):
        with pytest.raises(InputError, match=f"is of fungiclef, but the bundle was trained on {other}"):
            check_competition(drawn.competition, replace(trained, name=other))
    folder = tmp_path / "relabelled"
    shutil.copytree(drawn.competition / "metadata", folder / "metadata")
    table = next(folder.rglob("*-Train.csv"))
    header, first, *rest = table.read_text(encoding="utf-8").splitlines(keepends=True)
    observation = first.split(",")[header.split(",").index("observationID")]
    table.write_text("".join([header, *(row for row in rest if observation not in row)]), encoding="utf-8")
    with pytest.raises(InputError, match=r"training observations of .* are not those"):
        check_competition(folder, trained)
