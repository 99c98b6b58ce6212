"""The ledger stores every submission, and distinguishes a gain from noise."""

from pathlib import Path

import pytest
from PIL import Image

from kernel.competitions import competition_named
from kernel.competitions.competition import Competition
from kernel.inputs import InputError
from kernel.observations import Observation, TestTable
from local.bundling.record import BundleDigests, RehearsalRecord
from local.publishing.ledger import (
    Submission,
    compare_submissions,
    half_interval,
    make_submission,
    plot_submissions,
    read_ledger,
    save_submission,
)
from local.publishing.preflight import Bundle
from tests import manifests
from tests.conftest import command


def row(version: int, public: str = "", **more: str) -> Submission:
    values = {
        "when": f"2026-11-0{version} 10:00:00",
        "competition": "fungi-clef-2025",
        "runs": f"run{version}",
        "commit": "0123456789abcdef",
        "kernel": "k",
        "manifest": "m",
        "version": str(version),
        "metric": "recall_at_5",
        "local": "0.5200",
        "low": "0.4900",
        "high": "0.5500",
        "observations": "226",
        "status": "complete" if public else "pending",
        "public": public,
        **more,
    }
    return Submission(**values)


def test_at_one_half_the_noise_of_fungiclefs_public_leaderboard_is_six_and_a_half_points() -> None:
    assert half_interval("recall_at_5", 0.5, 226) == pytest.approx(0.065, abs=0.0005)


@pytest.mark.parametrize("metric", ["macro_f1", ""])
def test_only_a_recall_has_known_noise(metric: str) -> None:
    assert half_interval(metric, 0.5, 226) is None
    [line] = compare_submissions([row(1, "0.5000", metric=metric), row(2, "0.5100", metric=metric)])
    assert line.startswith("run2 (v2) is +0.010 compared with run1 (v1); the noise of ")
    assert "is not known" in line
    assert "±" not in line


def bundle_of(competition: Competition, observations: int) -> Bundle:
    """A bundle for a competition, whose run has these scores."""
    names = ("recall_at_1", "recall_at_5", "recall_at_10", "macro_f1")
    values = {f"{name}{end}": number for number, name in enumerate(names) for end in ("", "_low", "_high")}
    table = TestTable(Path(), competition, [Observation(str(number), ()) for number in range(observations)])
    metadata = {"competition_sources": ["a-competition"]}
    manifest = manifests.manifest(members=(manifests.member(name="run", validation=values),))
    return Bundle(Path(), metadata, manifest, table, RehearsalRecord(BundleDigests("k", "m")))


def test_fungiclefs_public_score_is_of_226_observations(monkeypatch) -> None:
    monkeypatch.setattr(Bundle, "commit", "c")
    assert make_submission(bundle_of(competition_named("fungiclef"), 999), 1).observations == "226"
    assert make_submission(bundle_of(competition_named("fungitastic"), 999), 1).observations == "999"


def test_a_submission_is_one_row_that_is_updated_with_its_scores(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "submissions.csv"
    assert read_ledger(path) == []
    save_submission(row(1), path)
    save_submission(row(2), path)
    save_submission(row(1, "0.5310", when="2026-12-01 00:00:00"), path)
    save_submission(row(1), path)  # a resumed command knows less, and takes nothing away but the state
    first, second = read_ledger(path)
    assert (first.when, first.public, second.public) == ("2026-11-01 10:00:00", "0.5310", "")
    assert [path.name for path in path.parent.iterdir()] == ["submissions.csv"]


def test_another_table_is_refused_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "submissions.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="lacks the column"):
        save_submission(row(1), path)
    assert path.read_text() == "a,b\n1,2\n"


def test_a_gain_is_reported_as_within_or_beyond_the_noise() -> None:
    rows = [row(1, "0.5000"), row(2), row(3, "0.5600"), row(4, "0.4300"), row(5, "0.6400")]
    inside, worse, beyond = compare_submissions(rows)
    assert inside.startswith("run3 (v3) is +0.060 compared with run1 (v1); warning: within the noise")
    assert worse.startswith(
        "run4 (v4) is -0.130 compared with run3 (v3); beyond the noise of ±0.065 of 226 observations"
    )
    assert beyond.startswith("run5 (v5) is +0.080 compared with run3 (v3); beyond")


@pytest.mark.parametrize("public", ["nan", "inf", "–"])
def test_a_score_that_is_not_finite_is_not_compared(public: str) -> None:
    (line,) = compare_submissions([row(1, public), row(2, "0.5000"), row(3, public), row(4, "0.6400")])
    assert line.startswith("run4 (v4) is +0.140 compared with run2 (v2); beyond")


def test_submissions_to_different_competitions_are_not_compared() -> None:
    assert compare_submissions([row(1, "0.5"), row(2, "0.9", competition="herbarium-2020-fgvc7")]) == []


def test_the_command_prints_the_ledger_with_warnings_and_plots_it(tmp_path: Path) -> None:
    path = tmp_path / "submissions.csv"
    for one in (row(1, "0.5000", private="0.4880"), row(2, "0.5100", local="", low="", high=""), row(3)):
        save_submission(one, path)
    result = command("local/submissions.py", path)
    assert result.returncode == 0, result.stderr
    header, first, *_ = result.stdout.splitlines()
    assert header.split()[-4:] == ["local", "public", "private", "status"]
    assert "0.5200 [0.4900, 0.5500]  0.5000  0.4880" in first
    assert "run2 (v2) is +0.010 compared with run1 (v1); warning" in result.stdout
    assert "1 submission with both scores" in result.stdout
    assert Image.open(tmp_path / "submissions.png").size[0] > 300


def test_an_empty_ledger_says_how_to_fill_it(tmp_path: Path) -> None:
    result = command("local/submissions.py", tmp_path / "none.csv")
    assert (result.returncode, result.stderr) == (0, "")
    assert "local/publish.py --submit" in result.stdout


def test_submissions_with_both_scores_are_plotted(tmp_path: Path) -> None:
    rows = [row(1, "0.5"), row(2, "0.6", competition="other", low="", high="", metric="macro_f1"), row(3)]
    assert plot_submissions(rows, tmp_path / "plot.png") == 2
    assert plot_submissions(rows[2:], tmp_path / "none.png") == 0
    assert not (tmp_path / "none.png").exists()
