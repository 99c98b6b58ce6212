"""The figures of a report follow from the held-out answers, and metrics.json has all of them.

python -m pytest tests/local/report/test_figures.py
"""

import csv
import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from sklearn.metrics import f1_score

from kernel.competitions import COMPETITIONS
from kernel.inputs import InputError
from local.banks.ensemble import read_predictions
from local.banks.evaluation import evaluate_predictions
from local.base.metrics import GUESSES, METRIC_NAMES, interval_of
from local.data.competition import read_competition
from local.data.observations import names_of
from local.evaluate import describe_scores, report
from local.recipes.recipe import make_recipe
from local.report import page, pictures
from local.report.advice import advise
from local.report.closeup import Closeup
from local.report.duplicates import score_duplicates
from local.report.evidence import Rank, evaluate_answers, name_ranks, read_evidence
from local.report.failures import (
    confuse_groups,
    find_classes,
    find_deadly,
    focus_on,
    list_mistakes,
    score_hierarchy,
)
from local.report.figures import Figures, compute_figures
from local.report.pictures import shorten
from local.report.scores import (
    Estimate,
    bootstrap_counts,
    compare_with,
    gain_in,
    predict_leaderboard,
    resampled_f1,
    sampling_noise,
    score_answers,
    value_of,
    weighted_f1,
)
from local.report.trust import best_temperature, calibrate, risk_coverage
from local.training.run import train_run
from tests.conftest import TINY
from tests.layouts import SMALLEST


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> Path:
    """A copy of the trained run, that was evaluated on val, to write into."""
    return Path(shutil.copytree(trained, tmp_path_factory.mktemp("reported") / "tiny"))


@pytest.fixture(scope="module")
def folded(drawn, tmp_path_factory) -> Path:
    """A run whose bank is made of train and val, so that its queries were held out in folds."""
    out = tmp_path_factory.mktemp("folded") / "folded"
    train_run(make_recipe({**TINY, "epochs": 0, "reference": "train+val"}, "the tests"), drawn.competition, out)
    return out


@pytest.fixture(scope="module")
def evidence(run, drawn):
    return read_evidence(run, drawn.competition)


@pytest.fixture(scope="module")
def from_folds(folded, drawn):
    return read_evidence(folded, drawn.competition)


@pytest.fixture(scope="module")
def written(run, folded, drawn, evidence) -> tuple[dict, str]:
    """metrics.json and report.html of a run with all options."""
    html = report(run, drawn.competition, [folded], [evidence.names[0]])
    return json.loads((run / "metrics.json").read_text()), html.read_text(encoding="utf-8")


def test_the_headline_is_the_score_that_training_printed_and_follows_from_the_answers(written, evidence):
    metrics, _ = written
    found = metrics["evaluation"]["headline"]
    computed = score_answers(evidence.truth, evidence.outcome, evidence.classes, evidence.weights)
    for name in METRIC_NAMES:
        assert found[name] == interval_of(metrics["validation"], name)
        assert found[name] == pytest.approx(dataclasses.asdict(computed[name]))
    assert found["macro_f1"]["low"] <= found["macro_f1"]["value"] <= found["macro_f1"]["high"]


def test_the_species_have_the_same_scores_and_intervals_in_the_table_of_ranks(written):
    figures = written[0]["evaluation"]
    for name in ("recall_at_1", "recall_at_5", "macro_f1"):
        assert figures["ranks"][-1][name] == figures["headline"][name]


def test_the_headline_of_a_run_with_a_choice_is_nested_and_the_score_of_the_choice_is_a_footnote(drawn, tmp_path):
    choice = {"epochs": 0, "reference": "train+val", "choose": ["whitening"]}
    train_run(make_recipe({**TINY, **choice}, "the tests"), drawn.competition, tmp_path / "chosen")
    html = report(tmp_path / "chosen", drawn.competition, [tmp_path / "chosen"]).read_text(encoding="utf-8")
    metrics = json.loads((tmp_path / "chosen" / "metrics.json").read_text())
    figures, optimistic = metrics["evaluation"], metrics["validation_of_the_chosen_settings"]
    answers = read_predictions(tmp_path / "chosen")
    hits = evaluate_predictions(answers.log_probabilities, answers.truth).ranks < 1
    nested = figures["headline"]["recall_at_1"]["value"]
    assert nested == pytest.approx(np.average(hits, weights=answers.weights))
    assert figures["against"][0]["scores"]["recall_at_1"]["value"] == pytest.approx(nested)
    assert figures["optimistic"] == optimistic
    assert f"Recall@1 {optimistic['recall_at_1']:.3f}" in html
    assert [line.split(":")[0] for line in describe_scores(figures)] == [
        "39 held-out observations",
        "the same, unweighted",
        "minus chosen, on 39",
    ]


def test_the_unweighted_scores_stand_beside_the_weighted_ones(written):
    metrics, html = written
    found, validation = metrics["evaluation"]["unweighted"], metrics["validation"]
    for count in GUESSES:
        assert found[f"recall_at_{count}"]["value"] == pytest.approx(validation[f"unweighted_recall_at_{count}"])
    assert any(validation[f"unweighted_recall_at_{count}"] != validation[f"recall_at_{count}"] for count in GUESSES)
    assert "Without weights: " in html


def test_what_training_left_in_the_metrics_stays_there(written, trained):
    by_training = json.loads((trained / "metrics.json").read_text())
    assert by_training.items() <= written[0].items()


@pytest.fixture(scope="module")
def figures(written, evidence, folded) -> Figures:
    return compute_figures(evidence, [folded], [evidence.names[0]])


def test_near_duplicates_are_shown_as_pairs_with_the_scores_without_them(figures, evidence, drawn):
    plain = np.eye(len(evidence.embedded.photos))
    owners, copied = evidence.embedded.photo_observations, len(evidence.queries)
    plain[np.flatnonzero(owners == 0)[0]] = plain[np.flatnonzero(owners == copied)[0]]
    changed = dataclasses.replace(evidence)
    changed.__dict__["embedded"] = dataclasses.replace(evidence.embedded, plain=plain)
    found = dataclasses.replace(figures, duplicates=score_duplicates(changed))
    html = page.render(found, drawn.competition)
    assert "1 held-out photo of" in html
    for observation in (evidence.queries[0], evidence.embedded.observations[copied]):
        assert f"observation {observation.id}</span>" in html
    without = found.duplicates.without_duplicates["recall_at_1"]
    assert f"{without.value:.3f}" in html
    lines = list(describe_scores(json.loads(json.dumps(dataclasses.asdict(found)))))
    [line] = [line for line in lines if line.startswith("without 1 observation with near-duplicates in the bank: ")]
    assert f"Recall@1 {without.value:.3f}" in line
    assert len(list(describe_scores(dataclasses.asdict(figures)))) == len(lines) - 1


def test_metrics_json_holds_the_figures_of_the_page(written, figures, drawn):
    metrics, html = written
    assert json.loads(json.dumps(dataclasses.asdict(figures), allow_nan=False)) == metrics["evaluation"]
    assert page.render(figures, drawn.competition) == html


def test_a_second_report_is_the_same_and_leaves_nothing_half_written(written, run, folded, drawn, evidence):
    report(run, drawn.competition, [folded], [evidence.names[0]])
    assert json.loads((run / "metrics.json").read_text()) == written[0]
    assert not list(run.glob(".*.partial"))


def test_every_held_out_observation_is_in_the_groups_and_in_the_classes(written):
    figures = written[0]["evaluation"]
    for rows in (figures["groups"]["shots"], figures["groups"]["photos"]):
        assert sum(row["observations"] for row in rows) == figures["observations"]
    assert sum(row["queries"] for row in figures["species"]) == figures["observations"]
    assert sum(row["guessed"] for row in figures["species"]) == figures["observations"]
    for confusion in figures["confusions"]:
        assert sum(cell[2] for cell in confusion["cells"]) == figures["observations"]


def test_a_group_is_as_probable_as_its_species_together():
    rank = Rank("genus", ["a", "b", "c"], np.array([2, 0, 2, 1]), np.ones(3, dtype=bool))
    pooled = rank.sum_probabilities(np.array([[0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0, 0.0]]))
    assert pooled == pytest.approx(np.array([[0.2, 0.4, 0.4], [0.0, 0.0, 1.0]]))


def test_ranks_end_with_the_species_and_relatives_are_neighbours(evidence):
    assert evidence.ranks[-1].names[evidence.ranks[-1].groups[0]] == evidence.names[0]
    order = np.argsort(evidence.ranks[-1].groups)
    for rank in evidence.ranks:
        assert (np.diff(rank.groups[order]) >= 0).all()


def test_all_ranks_together_are_right_no_more_often_than_the_worst_rank(evidence, written):
    ranks = written[0]["evaluation"]["ranks"]
    assert score_hierarchy(evidence)["accuracy"].value <= min(rank["recall_at_1"]["value"] for rank in ranks) + 1e-9


def test_two_classes_of_one_name_have_their_ids_beside_it_and_are_found_together(evidence):
    species = {**evidence.labelled.species, **dict.fromkeys(evidence.classes[:2], "Twin")}
    names = names_of(dataclasses.replace(evidence.labelled, species=species), evidence.classes)
    assert names[:2] == [f"Twin #{one}" for one in evidence.classes[:2]]
    assert find_classes(dataclasses.replace(evidence, names=names), "twin") == [0, 1]


@pytest.mark.parametrize("is_weighted", [False, True])
def test_weighted_f1_is_scikit_learns_within_its_interval(is_weighted):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 30, 300)
    guesses = np.where(rng.random(300) < 0.6, truth, rng.integers(0, 30, 300))
    weights = rng.choice([0.0, 0.1, 2.0], 300) if is_weighted else None
    value, drawn = weighted_f1(truth, guesses, weights)
    expected = f1_score(truth, guesses, average="weighted", sample_weight=weights, zero_division=0)
    assert value == pytest.approx(expected, abs=1e-6)
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert low < value < high < value + 0.15


def test_macro_f1_over_drawn_observations_is_scikit_learns():
    rng = np.random.default_rng(1)
    truth, guesses = rng.integers(0, 9, 40), rng.integers(0, 12, 40)
    (weights,) = bootstrap_counts(len(truth), 25)
    assert (weights.sum(axis=1) == 25).all()
    found = resampled_f1("macro", truth, guesses, 25)
    for counts, value in list(zip(weights.astype(int), found, strict=True))[:50]:
        drawn = np.repeat(np.arange(40), counts)
        assert value == pytest.approx(f1_score(truth[drawn], guesses[drawn], average="macro", zero_division=0))


@pytest.mark.parametrize("observations", [150, 600])
def test_the_noise_of_macro_f1_is_its_scatter_over_leaderboards_of_that_size(evidence, observations):
    """Twenty classes, some of them easy; leaderboards are drawn as the held-out observations are."""
    rng = np.random.default_rng(2)
    skill = rng.uniform(0.2, 0.9, 20)

    def draw_answers(count: int) -> tuple[np.ndarray, np.ndarray]:
        truth = rng.integers(0, 20, count)
        return truth, np.where(rng.random(count) < skill[truth], truth, rng.integers(0, 20, count))

    truth, guesses = draw_answers(4000)
    answers = np.full((4000, 20), -9.0, dtype=np.float32)
    answers[np.arange(4000), guesses] = 0.0
    held_out = dataclasses.replace(evidence, truth=truth, log_probabilities=answers)
    boards = [f1_score(*draw_answers(observations), average="macro") for _ in range(400)]
    assert sampling_noise(held_out, "macro_f1", observations) == pytest.approx(1.96 * np.std(boards), rel=0.12)
    recall = (truth == guesses).mean()
    assert sampling_noise(held_out, "recall_at_1", 226) == pytest.approx(1.96 * np.sqrt(recall * (1 - recall) / 226))


@pytest.mark.parametrize("competition", COMPETITIONS, ids=lambda competition: competition.name)
def test_the_leaderboard_has_the_metric_and_the_size_of_each_competition(evidence, tmp_path, competition):
    SMALLEST[competition.name](tmp_path)
    trained = dataclasses.replace(evidence.manifest.competition, name=competition.name)
    manifest = dataclasses.replace(evidence.manifest, competition=trained)
    own = dataclasses.replace(evidence, labelled=read_competition(tmp_path), manifest=manifest)
    if competition.form.is_set:  # the leaderboard scores photos of several classes
        assert own.metric == "macro_f1"
        assert predict_leaderboard(own, [], 0.5) == []
        return
    value = value_of(own.metric, evidence.truth, evidence.outcome)
    [board] = predict_leaderboard(own, [], value)
    assert (board.part, board.observations) == ("whole test", 12)
    ranked = np.argsort(-evidence.log_probabilities, axis=1)
    hits = ranked == evidence.truth[:, None]
    expected = {
        "recall_at_1": hits[:, 0].mean(),
        "recall_at_5": hits[:, :5].any(axis=1).mean(),
        "macro_f1": f1_score(evidence.truth, ranked[:, 0], average="macro", zero_division=0),
    }
    assert board.expected.value == value == pytest.approx(expected[competition.metric])


def test_a_folder_without_a_test_set_has_no_leaderboard(evidence, tmp_path):
    competition = dataclasses.replace(evidence.labelled, folder=tmp_path)
    assert predict_leaderboard(dataclasses.replace(evidence, labelled=competition), [], 0.5) == []


def test_a_run_gains_nothing_on_itself(evidence, run):
    found = compare_with(evidence, run)
    assert found.observations == len(evidence.queries)
    assert set(found.gain.values()) == {Estimate(0, 0, 0)}


def ensemble_advice(evidence, figures) -> list[str]:
    """What the report finds of ensembles."""
    return [one.what for one in advise(evidence, figures) if one.what.startswith("Together with")]


def test_one_common_observation_is_no_evidence(evidence, run, figures):
    alone = {name: getattr(evidence, name)[:1] for name in ("queries", "truth", "log_probabilities")}
    single = dataclasses.replace(evidence, **alone)
    found = compare_with(single, run)
    assert (found.observations, found.is_evidence) == (1, False)
    certain = {"recall_at_5": Estimate(1.0, 1.0, 1.0)}
    lucky = dataclasses.replace(found, run="lucky", gain=certain, ensemble_gain=certain)
    assert ensemble_advice(single, dataclasses.replace(figures, against=[lucky])) == []
    assert ensemble_advice(single, dataclasses.replace(figures, against=[dataclasses.replace(lucky, is_evidence=True)]))
    boards = predict_leaderboard(single, [lucky], 0.5)
    assert [board.wrong_order["lucky"] for board in boards] == [0.5] * len(boards)


def test_an_ensemble_is_advised_by_the_metric_of_the_competition(evidence, figures):
    better, worse = Estimate(0.2, 0.1, 0.3), Estimate(-0.2, -0.3, -0.1)
    gains = {"recall_at_1": worse, "recall_at_5": worse, "recall_at_10": worse, "macro_f1": better}
    other = dataclasses.replace(figures.against[0], ensemble_gain=gains, is_evidence=True)
    compared = dataclasses.replace(figures, against=[other])
    assert ensemble_advice(evidence, compared) == []
    (found,) = ensemble_advice(evidence, dataclasses.replace(compared, metric="macro_f1"))
    assert "macro-F1 is +0.200" in found


def test_a_gain_in_macro_f1_is_the_difference_of_scikit_learns(evidence, from_folds):
    truth = evidence.truth[:6]
    new, old = (evaluate_answers(logs[:6], truth) for logs in (evidence.log_probabilities, -evidence.log_probabilities))
    expected = np.subtract(*(f1_score(truth, one.top[:, 0], average="macro", zero_division=0) for one in (new, old)))
    assert gain_in("macro_f1", truth, new, old).value == pytest.approx(expected)
    assert value_of("macro_f1", truth, new) - value_of("macro_f1", truth, old) == pytest.approx(expected)


def test_a_smaller_log_loss_is_a_gain(evidence, from_folds):
    truth, logs = evidence.truth, evidence.log_probabilities
    new, old = (evaluate_answers(values, truth) for values in (logs, logs - 1))
    assert gain_in("log_loss", truth, new, old).value == pytest.approx(1)
    assert value_of("log_loss", truth, new) - value_of("log_loss", truth, old) == pytest.approx(1)
    assert sampling_noise(evidence, "log_loss", 100) == pytest.approx(0.196 * evidence.outcome.losses.std())


def test_runs_are_compared_on_the_observations_that_both_held_out(written, evidence, from_folds):
    (found,) = written[0]["evaluation"]["against"]
    common = {query.id for query in evidence.queries} & {query.id for query in from_folds.queries}
    assert found["observations"] == len(common) > 0
    positions = {query.id: position for query, position in zip(evidence.queries, evidence.outcome.ranks, strict=True)}
    other = {query.id: position for query, position in zip(from_folds.queries, from_folds.outcome.ranks, strict=True)}
    weights = {query.id: weight for query, weight in zip(evidence.queries, evidence.weights, strict=True)}
    gains = [(positions[one] < 5) - float(other[one] < 5) for one in common]
    gain = np.average(gains, weights=[weights[one] for one in common])
    assert found["gain"]["recall_at_5"]["value"] == pytest.approx(gain)


def test_a_query_is_never_compared_with_itself(from_folds):
    closeup = Closeup(from_folds)
    sizes = Counter(from_folds.embedded.classes[from_folds.embedded.is_reference])
    assert list(from_folds.shots) == [sizes[label] - 1 for label in from_folds.truth]
    for query, label in enumerate(from_folds.truth):
        assert closeup.nearest(query, label).observation != from_folds.queries[query].id


def test_the_views_of_an_observation_agree_with_its_first_guess_as_far_as_they_vote_for_it(from_folds):
    votes = np.array([[0, from_folds.guesses[0], 3], [0, 1 - min(from_folds.guesses[0], 1), 1]])
    voted = dataclasses.replace(from_folds, view_votes=votes)
    assert voted.agreement[0] == 0.75
    assert np.isnan(voted.agreement[1:]).all()
    assert voted.votes(0) == [tuple(votes[0, 1:]), tuple(votes[1, 1:])]


def test_a_rank_of_one_group_and_a_matrix_of_one_cell_are_left_out(evidence):
    taxa = {label: ("Basidiomycota", *lineage[1:]) for label, lineage in evidence.labelled.taxa.items()}
    ranks = name_ranks(dataclasses.replace(evidence.labelled, taxa=taxa), evidence.classes, evidence.names)
    assert "phylum" not in [rank.name for rank in ranks]
    single = Rank("kingdom", ["Fungi"], np.zeros(len(evidence.classes), dtype=int), np.ones(1, dtype=bool))
    found = confuse_groups(dataclasses.replace(evidence, ranks=[single, evidence.ranks[-1]]))
    assert [len(one.groups) > 1 for one in found] == [True]


def test_an_observation_that_was_held_out_in_turn_is_shown_once(from_folds):
    label = int(np.argmax(from_folds.reference))
    found = focus_on(from_folds, Closeup(from_folds), label)
    photos = [photo for photo, _ in found.photos]
    assert len(photos) == len(set(photos)) == from_folds.reference[label] > 1
    assert Counter(outcome for _, outcome in found.photos) == Counter(
        "recognised" if guess == label else "mistaken" for guess in from_folds.guesses[from_folds.truth == label]
    )


def test_a_poisonous_species_taken_for_an_edible_one_costs_a_hundred(evidence):
    poisonous = np.zeros(len(evidence.classes))
    poisonous[evidence.truth[evidence.guesses != evidence.truth][0]] = 1
    marked = dataclasses.replace(evidence, poisonous=poisonous)
    found = find_deadly(marked)
    true, guessed = poisonous[marked.truth] == 1, poisonous[marked.guesses] == 1
    cost = 100 * (true & ~guessed).sum() + (guessed & ~true).sum()
    assert found.cost.value == pytest.approx(cost / len(true))
    assert found.counts["poisonous taken for edible"] == (true & ~guessed).sum()
    assert (true & ~guessed).any()


def test_without_poisonous_species_there_are_no_deadly_confusions(evidence):
    harmless = dataclasses.replace(evidence, poisonous=np.full(len(evidence.classes), np.nan))
    assert find_deadly(harmless) is None


def test_every_error_is_listed_the_commonest_confusions_first(evidence):
    found = list_mistakes(evidence, Closeup(evidence))
    truth = {query.id: label for query, label in zip(evidence.queries, evidence.truth, strict=True)}
    ranks = {query.id: rank for query, rank in zip(evidence.queries, evidence.outcome.ranks, strict=True)}
    pairs = Counter((one.true, one.guessed) for one in found)
    assert {one.observation for one in found} == {name for name, rank in ranks.items() if rank}
    assert [one.count for one in found] == sorted((one.count for one in found), reverse=True)
    for one in found:
        assert (one.true, one.position) == (truth[one.observation], ranks[one.observation] + 1)
        assert one.count == pairs[one.true, one.guessed]


def test_calibration_tells_an_overconfident_run_from_a_calibrated_one():
    rng = np.random.default_rng(1)
    confidence = rng.random(2000)
    honest = calibrate(confidence, rng.random(2000) < confidence)
    overconfident = calibrate(confidence, rng.random(2000) < confidence**3)
    assert honest.error <= honest.chance < overconfident.error
    assert overconfident.confidence > overconfident.right


def test_the_best_temperature_undoes_what_was_done_to_the_logits(evidence):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3000, 10)) * 2
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = (chances.cumsum(axis=1) > rng.random((3000, 1))).argmax(axis=1)
    sharpened = dataclasses.replace(evidence, truth=truth, log_probabilities=(logits * 3).astype(np.float32))
    assert best_temperature(sharpened).value == pytest.approx(3, rel=0.1)


def test_risk_is_lower_if_only_the_confident_answers_are_given():
    curve = risk_coverage(np.linspace(1, 0, 100), np.arange(100) < 60)
    assert curve.points[0][1] == 0
    assert curve.points[-1] == (1.0, 0.4, 0.0)


def test_a_photo_that_cannot_be_read_is_listed_and_costs_only_itself(run, drawn, tmp_path, written):
    data = shutil.copytree(drawn.competition, tmp_path / "fungi")
    query = read_evidence(run, data).queries[0]
    damaged = query.photos[0]
    damaged.write_bytes(damaged.read_bytes()[:200])
    copy = shutil.copytree(run, tmp_path / "run")
    html = report(copy, data).read_text(encoding="utf-8")
    figures = json.loads((copy / "metrics.json").read_text())["evaluation"]
    (failed,) = figures["unreadable"]
    assert failed["observation"] == query.id
    assert failed["photo"] in html
    assert figures["headline"] == written[0]["evaluation"]["headline"]


def test_a_large_table_of_classes_leaves_no_room_for_photos(figures, drawn, monkeypatch):
    table = len(page.dump_json(page.class_rows(figures)))
    photos = []
    for limit in (table + 3000, table):
        monkeypatch.setattr(page, "MAX_CHARACTERS", limit)
        html = page.render(figures, drawn.competition)
        photos.append(json.loads(html.partition('id="data">')[2].partition("</script>")[0])["photos"])
    assert len(photos[0]) > 0
    assert photos[1] == []


def test_a_full_page_takes_no_more_photos(evidence):
    album = page.Album(evidence.labelled.folder, 3000)
    indices = [album.add(evidence.photo(query)) for query in evidence.queries[:8]]
    assert indices[0] == 0
    assert indices[-1] is None
    assert album.size < 20_000


def test_a_long_name_beside_a_plot_is_cut_after_a_whole_word():
    assert shorten("Temperate deciduous woodland", 30) == "Temperate deciduous woodland"
    assert shorten("Temperate deciduous woodland", 24) == "Temperate deciduous …"
    assert shorten("Pseudo-nitzschia_chain_of_cells", 24) == "Pseudo-nitzschia_chain …"
    assert shorten("Chaetoceros_chain", 8) == "Chaetoceros …"
    assert shorten("Skeletonemataceae", 8) == "Skeletonemataceae"


def test_text_of_the_tables_cannot_become_part_of_the_page(figures, drawn):
    evil = [dataclasses.replace(row, name="</script><script>alert(1)") for row in figures.species]
    assert "<script>alert" not in page.render(dataclasses.replace(figures, species=evil), drawn.competition)
    assert str(page.code("`<b>`")) == "<code>&lt;b&gt;</code>"


def test_a_dollar_in_a_name_is_no_formula():
    with matplotlib.rc_context(pictures.STYLE):
        figure, axis = pictures.subplots(2, 2)
        axis.set_title(r"$\frac$")
        assert r"$\frac$" in pictures.as_svg(figure, "dollar")


def test_a_species_that_is_unknown_is_one_line_with_the_nearest_names(evidence):
    with pytest.raises(InputError, match=f"nearest names are.*{evidence.names[0]}"):
        find_classes(evidence, evidence.names[0][:-1])


def test_the_data_of_another_competition_are_refused(run, drawn, tmp_path):
    data = shutil.copytree(drawn.competition, tmp_path / "fungi")
    next(data.glob("metadata/*/*-Val.csv")).unlink()
    with pytest.raises(InputError, match="give the data of the run"):
        read_evidence(run, data)


def test_a_class_that_the_data_gained_since_training_is_said_and_left_out(drawn, folded, tmp_path, capsys):
    run = Path(shutil.copytree(folded, tmp_path / "folded"))
    data = shutil.copytree(drawn.competition, tmp_path / "fungi")
    [table] = data.glob("metadata/*/*-Train.csv")
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    new = {**rows[0], "observationID": "999999", "category_id": "777"}
    with table.open("a", encoding="utf-8", newline="") as file:
        csv.DictWriter(file, list(new)).writerow(new)
    html = report(run, data, [], []).read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert "has 1 class that the run was not trained on, such as '777': left out of the report with 1 observ" in said
    assert "The run was trained on other data" in html
