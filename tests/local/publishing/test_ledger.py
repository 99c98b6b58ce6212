"""The ledger stores every submission, loses none, and distinguishes a gain from noise."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from kernel.competitions import competition_named
from kernel.competitions.competition import Competition
from kernel.inputs import InputError
from kernel.observations import Observation, TestTable
from local.bundling.record import BundleDigests, RehearsalRecord
from local.publishing.comparison import (
    compare_submissions,
    describe_changes,
    export_rows,
    format_ledger,
    half_interval,
    plot_submissions,
)
from local.publishing.ledger import COLUMNS, NEW_COLUMNS, Submission, make_submission, read_ledger, save_submission
from local.publishing.preflight import Bundle
from tests import manifests
from tests.conftest import ROOT, command
from tests.local.publishing.conftest import set_credentials
from tests.local.publishing.loopback import KEY


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
        "unweighted": "0.5400",
        "unweighted_low": "0.5100",
        "unweighted_high": "0.5700",
        **more,
    }
    return Submission(**values)


def members(**recipes: dict) -> str:
    """Submitted runs with these recipes, as the ledger has them."""
    runs = [{"name": name, "files": "f", "recipe": recipe, "given": recipe} for name, recipe in recipes.items()]
    return json.dumps(runs)


def test_at_one_half_the_noise_of_fungiclefs_public_leaderboard_is_six_and_a_half_points() -> None:
    assert half_interval("recall_at_5", 0.5, 226) == pytest.approx(0.065, abs=0.0005)


@pytest.mark.parametrize("metric", ["macro_f1", ""])
def test_only_a_recall_has_known_noise(metric: str) -> None:
    assert half_interval(metric, 0.5, 226) is None
    [line] = compare_submissions([row(1, "0.5000", metric=metric), row(2, "0.5100", metric=metric)])
    assert line.startswith("run2 (v2) is +0.010 compared with run1 (v1); the noise of ")
    assert "is not known" in line
    assert "±" not in line


def scores(start: float) -> dict[str, float]:
    """Scores of a run or an ensemble, each another number."""
    names = [f"{kind}{name}" for kind in ("", "unweighted_") for name in ("recall_at_1", "recall_at_5", "macro_f1")]
    ends = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    return {name: start + number / 1000 for number, name in enumerate(ends)}


def bundle_of(competition: Competition, observations: int, runs: tuple[str, ...] = ("run",), **changes) -> Bundle:
    """A bundle of runs with scores for a competition."""
    table = TestTable(Path(), competition, [Observation(str(number), ()) for number in range(observations)])
    metadata = {"competition_sources": ["a-competition"]}
    members = tuple(manifests.member(run=name, validation=scores(0.1)) for name in runs)
    manifest = manifests.manifest(members=members, **changes)
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
    with pytest.raises(InputError, match="is not a ledger, it lacks the column 'when'"):
        save_submission(row(1), path)
    assert path.read_text() == "a,b\n1,2\n"


DAMAGES = {
    "cut": b"2026-11-09 10:00:00,fungi-clef-2025,ru",
    "too many cells": b",".join([b"1"] * 40),
    "open quote": b'"2026-11-09,fungi',
    "not UTF-8": b"\xff\xfe" + b",1" * (len(COLUMNS) - 1),
    "no number": ",".join(dataclasses.astuple(row(9, observations="many"))).encode(),
    "no version": ",".join(dataclasses.astuple(dataclasses.replace(row(9), version=""))).encode(),
    "no JSON": ",".join(dataclasses.astuple(row(9, members="[{]"))).encode(),
    "NUL": b"\0\0\0",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_named_in_one_line_and_stays_in_the_file(tmp_path: Path, damage: str, capsys) -> None:
    path = tmp_path / "submissions.csv"
    save_submission(row(1), path)
    path.write_bytes(path.read_bytes() + DAMAGES[damage] + b"\n")
    save_submission(row(2), path)
    assert capsys.readouterr().out == ""
    assert [one.version for one in read_ledger(path)] == ["1", "2"]
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {path}, line 3 is left out (")
    save_submission(row(1, "0.5000"), path)
    assert path.read_bytes().split(b"\n")[2] == DAMAGES[damage]
    assert [one.public for one in read_ledger(path)] == ["0.5000", ""]


def test_a_ledger_of_an_earlier_version_and_added_columns_are_kept(tmp_path: Path, capsys) -> None:
    path, old = tmp_path / "submissions.csv", [name for name in COLUMNS if name not in NEW_COLUMNS]
    cells = [getattr(row(1, "0.5100", runs="a + b"), name) for name in old]
    path.write_bytes("\r\n".join(["\ufeff" + ",".join([*old, "mine"]), ",".join([*cells, "a note"])]).encode())
    save_submission(row(2), path)
    first, second = read_ledger(path)
    assert "mine" in path.read_text().splitlines()[0]
    assert path.read_text().splitlines()[1].endswith(",a note")
    assert (first.public, first.local, second.unweighted) == ("0.5100", "0.5200", "0.5400")
    assert first.weighted_score is None  # that of its best run


def test_a_line_break_in_a_name_does_not_break_the_ledger(tmp_path: Path) -> None:
    save_submission(row(1, runs='a\nb,"c" \udcff'), tmp_path / "submissions.csv")
    [one] = read_ledger(tmp_path / "submissions.csv")
    assert one.runs == 'a\\nb,"c" \\udcff'


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_an_empty_ledger(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "submissions.csv").write_bytes(content)
    save_submission(row(1), tmp_path / "submissions.csv")
    assert len(read_ledger(tmp_path / "submissions.csv")) == 1


def test_the_score_of_an_ensemble_is_its_own_or_not_known(monkeypatch) -> None:
    monkeypatch.setattr(Bundle, "commit", "c")
    fungi = competition_named("fungiclef")
    alone = make_submission(bundle_of(fungi, 999), 1, 754.0)
    known = make_submission(bundle_of(fungi, 999, ("a", "b"), validation=scores(0.6)), 2)
    unknown = make_submission(bundle_of(fungi, 999, ("a", "b")), 3)
    assert (alone.local, alone.unweighted, alone.unweighted_low) == ("0.1030", "0.1120", "0.1130")
    assert (known.local, known.unweighted, known.unweighted_high) == ("0.6030", "0.6120", "0.6140")
    assert (unknown.local, unknown.unweighted) == ("", "")
    lines = format_ledger([alone, known, unknown])
    assert "0.112 [0.113, 0.114]  0.103 [0.104, 0.105]" in lines[1]
    assert "12:34" in lines[1]
    assert "0.612 [0.613, 0.614]  0.603 [0.604, 0.605]" in lines[2]
    assert lines[3].count("not known") == 3  # both scores, and the GPU time
    assert [one.name for one in known.submitted_runs] == ["a", "b"]


def test_each_recipe_is_described_by_what_changed_since_the_submission_before() -> None:
    one, two = {"epochs": 0, "seed": 1}, {"epochs": 3, "seed": 1}
    rows = [
        row(1, members=members(a=one)),
        row(2, members=members(b=two)),
        row(3, members=members(a=one), competition="another"),
        row(4, members=members(b=two, c=one)),
        row(5, members=members(b=one, c=one)),
        row(6, members=members(c=one)),
        row(7, members=members(c=one).replace('"f"', '"g"')),
        row(8),
        row(9, members=members(c=one)),
    ]
    first, *others = describe_changes(rows)
    assert "seed = 1" in first
    assert others == [
        "epochs was 0, is 3",
        describe_changes(rows[2:3])[0],
        "with c",
        "b: epochs was 3, is 0",
        "without b",
        "the same recipe, trained again",
        "its recipe is not known",
        "the recipe of the one before is not known",
    ]


def test_thousands_of_excluded_observations_are_one_short_text(monkeypatch) -> None:
    monkeypatch.setattr(Bundle, "commit", "c")
    many = {"exclude": [str(number) for number in range(20_000)]}
    found = bundle_of(competition_named("fungiclef"), 999)
    changed = dataclasses.replace(found.manifest.members[0], recipe=many)
    kept = make_submission(dataclasses.replace(found, manifest=manifests.manifest(members=(changed,))), 1)
    assert kept.submitted_runs[0].recipe["exclude"].startswith("20,000 observations with SHA-256 ")


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


def test_the_command_prints_exports_and_plots_the_ledger_and_the_quota(tmp_path: Path, kaggle) -> None:
    path = tmp_path / "submissions.csv"
    save_submission(row(1, "0.5000", private="0.4880", members=members(a={"epochs": 1})), path)
    save_submission(row(2, "0.5100", local="", low="", high="", members=members(b={"epochs": 2})), path)
    save_submission(row(3), path)
    result = command("local/submissions.py", path, "--csv", tmp_path / "new" / "table.csv")
    assert result.returncode == 0, result.stderr
    header, first, *_, last = result.stdout.splitlines()
    assert header.split()[-2:] == ["GPU", "time"]
    assert "0.540 [0.510, 0.570]  0.520 [0.490, 0.550]  0.5000  0.4880" in first
    assert "warning: within the noise" in result.stdout
    assert "run2 (v2): epochs was 1, is 2" in result.stdout
    assert last == "GPU quota: 17.5 of 30 hours of GPU time are left, renewed on 2026-11-28 at 00:00 UTC"
    assert Image.open(tmp_path / "submissions.png").size[0] > 300
    with (tmp_path / "new" / "table.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(one["unweighted"], one["weighted"], one["public"]) for one in table[:2]] == [
        ("0.54", "0.52", "0.5000"), ("0.54", "", "0.5100"),
    ]  # fmt: skip
    assert (table[0]["public_noise"], table[2]["public_noise"]) == ("0.0652", "")
    assert table[1]["recipe"] == "epochs was 1, is 2"


def test_without_credentials_the_quota_is_unknown_and_all_else_works(tmp_path: Path, kaggle, monkeypatch) -> None:
    set_credentials(monkeypatch)
    result = command("local/submissions.py", tmp_path / "none.csv")
    assert (result.returncode, result.stderr) == (0, "")
    empty, quota = result.stdout.splitlines()
    assert "local/publish.py --submit" in empty
    assert quota.startswith("GPU quota: unknown: no Kaggle credentials")
    assert kaggle.requests == []


def test_without_network_the_quota_is_unknown_after_one_attempt(tmp_path: Path, kaggle, monkeypatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    result = command("local/submissions.py", tmp_path / "none.csv")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1].startswith("GPU quota: unknown: asking for the GPU quota failed")
    assert KEY not in result.stdout


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--plot", "plot.xyz"), "plot.xyz has none of the endings .png, .svg"),
        (("--csv", "."), "cannot be written as a file"),
        (("--csv", "runs/submissions.csv"), "would replace the ledger"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path, flags: tuple[str, str], says: str) -> None:
    save_submission(row(1, "0.5"), tmp_path / "runs" / "submissions.csv")
    result = command(ROOT / "local/submissions.py", tmp_path / "runs" / "submissions.csv", *flags, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_submissions_with_both_scores_are_plotted(tmp_path: Path) -> None:
    none = {name: "" for name in ("low", "high", "unweighted", "unweighted_low", "unweighted_high")}
    rows = [row(1, "0.5"), row(2, "1.0", competition="other", metric="macro_f1", **none), row(3)]
    assert plot_submissions(rows, tmp_path / "plot.svg") == 2
    drawn = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert drawn.count("<!-- noise of its 226 observations -->") == 2  # a panel with, and one without weights
    assert plot_submissions(rows[2:], tmp_path / "none.png") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["plot.svg"]


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_score_of_all_or_none_has_noise_too(score: float) -> None:
    assert 0.005 < half_interval("recall_at_5", score, 226) < 0.01
    assert export_rows([row(1, str(score))])[0]["public_noise"] > 0
