"""Compare methods, from the rule of the public starter notebook to the best recipe, on the same photos and encoders.

Called by local/benchmark.py. Nothing may be chosen by these scores: they are of the test set.
"""

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from kernel.inputs import InputError
from kernel.manifest import read_weights
from kernel.tables import RESOLUTIONS
from local.base.console import counted, say
from local.base.files import write_json
from local.base.metrics import GUESSES, METRIC_NAMES, bounded, gained, hit_matrix, interval_of, score
from local.benchmarks.methods import (
    RECIPES,
    SPARSE_OBSERVATIONS,
    TOGETHER,
    MethodAnswers,
    Task,
    label,
    read_task,
    run_methods,
)
from local.drawing.competition import generate
from local.recipes.recipe import read_recipe
from local.training.run import train_run

SPECIES = 60  # of the competition that is drawn without --data
MOST_SHOTS = 4  # classes with so many reference observations or more are one group


def accuracy(
    folders: Sequence[Path],
    encoders: Sequence[str],
    reference: str,
    out: Path | None = None,
    recipes: Sequence[str] = (),
) -> dict:
    """Print the scores of all methods on every dataset: over all queries, on sparse test sets, and by shots.

    Args:
        folders: competitions as downloaded, with the test labels as `solution.csv`, or else with a val split to score
            on. Without folders, a competition is drawn.
        encoders: as in `--encoder`; several are also scored as an ensemble, and together in one run. The default is the
            encoder of the recipes, or for a drawn competition one that is trained on other drawn fungi.
        reference: "train" or "train+val".
        recipes: of the runs; empty: all of RECIPES and TOGETHER.
        out: the folder in which to keep runs and embeddings; None keeps none.

    Returns:
        The figures, for `--json`.

    Raises:
        InputError: a folder is not a competition or has nothing to score on; an encoder cannot be found.
    """
    folders, encoders = list(folders), list(encoders)
    require_unique("--data", [data.resolve().name for data in folders])
    require_unique("--encoder", [label(spec) for spec in encoders])
    with nullcontext(out) if out else tempfile.TemporaryDirectory() as kept, tempfile.TemporaryDirectory() as drawn:
        if not folders:
            say("no --data: drawing a competition of fungi")
            folders = [draw_competition(Path(drawn))]
            encoders = encoders or [pretrain(Path(drawn))]
        tasks = [read_task(data.resolve(), reference) for data in folders]
        reports = []
        for task in tasks:
            every = encoders or [read_recipe(RECIPES[0]).encoder.each[0].name]
            answers = run_methods(task, every, Path(kept), recipes or (*RECIPES, *TOGETHER))
            reports.append(score_methods(task, answers))
            tables = (method_table, sparse_table, shots_table)
            say("\n" + "\n".join(line for table in tables for line in (*table(reports[-1]), "")))
    return {"datasets": reports}


def require_unique(option: str, names: Sequence[str]) -> None:
    """Check that no two names are the same, because runs are named after them."""
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{option}: two values are named {name}, and so would be their runs; rename one")


def draw_competition(folder: Path) -> Path:
    drawn = generate(folder / "fungi", species=SPECIES)
    shutil.copyfile(drawn.solution, drawn.competition / "solution.csv")
    return drawn.competition.rename(folder / "drawn-fungi")


def pretrain(folder: Path) -> str:
    """Train the encoder of the demo on other species, as a model from a hub is. Returns its SPEC."""
    say("no --encoder: training a small one on other drawn fungi")
    others = generate(folder / "others", species=SPECIES, seed=1)
    train_run(read_recipe("demo"), others.competition, folder / "demo")
    return export_encoder(folder / "demo", folder / "other-fungi")


def export_encoder(run: Path, stem: Path) -> str:
    """Write the timm encoder of a run as a pair of .safetensors and .json for `--encoder`. Returns its SPEC."""
    weights = read_weights(run)
    [spec] = weights.manifest.members[0].encoders
    how = spec.preprocessing
    config = {"input_size": [3, how.size, how.size], "crop_pct": how.crop_pct, "interpolation": how.interpolation}
    crop_mode = {"crop": "center", "squash": "squash"}[how.resize_mode]
    config |= {"mean": how.mean, "std": how.std, "crop_mode": crop_mode}
    shutil.copyfile(weights.file(spec.file), stem.with_name(f"{stem.name}.safetensors"))
    description = {"architecture": spec.architecture, "num_classes": 0, "model_args": spec.arguments}
    write_json(description | {"pretrained_cfg": config}, stem.with_name(f"{stem.name}.json"))
    return str(stem)


def score_methods(task: Task, answers: Sequence[MethodAnswers]) -> dict:
    """The scores of every method with 95% intervals and gains: of all queries, of sparse test sets, and by shots."""
    support = task.support(RESOLUTIONS[0])
    truth = [task.truth[query.id] for query in task.queries(RESOLUTIONS[0])]
    counts = Counter(support.class_ids.tolist())
    shots = np.minimum([counts[class_id] for class_id in truth], MOST_SHOTS)
    hits = {one.name: hit_matrix(truth, one.guesses)[:, GUESSES.index(5)] for one in answers}
    rows = []
    for one in answers:
        row = {"method": one.name, **score(truth, one.guesses), "log_loss": None, "gain": None}
        if one.losses is not None:
            row["log_loss"] = bounded(one.losses[~np.isnan(one.losses)])
        if one.baseline:
            row["gain"] = {"over": one.baseline.name, **gained(hits[one.name], hits[one.baseline.name])}
        rows.append(row)
    return {
        "data": task.data.name,
        "scored_on": task.split,
        "observations": len(truth),
        "reference": task.reference,
        "reference_observations": len(support),
        "classes": len(counts),
        "methods": rows,
        "sparse": score_sparse(task.draws, truth, answers),
        "by_shots": [
            {
                "shots": f"{count} or more" if count == MOST_SHOTS else str(count),
                "observations": int((shots == count).sum()),
                "recall_at_5": {name: bounded(own[shots == count]) for name, own in hits.items()},
            }
            for count in np.unique(shots).tolist()
        ],
    }


def score_sparse(draws: Sequence[np.ndarray], truth: Sequence[str], answers: Sequence[MethodAnswers]) -> dict:
    """The recalls of every method on the sparse test sets, and its gain over its baseline, with 95% intervals.

    The draws share queries, so their spread is not the uncertainty of their mean. Of each query the hits are averaged
    over the draws that have it; these means, weighted by the number of draws, are bootstrapped over queries.

    Args:
        draws: of `draw_sparse`.
        truth: class id of each query.
    """
    sizes = [len(rows) for rows in draws]
    weights = np.bincount(np.concatenate(draws), minlength=len(truth)).astype(float)
    hits, rows = {one.name: sparse_hits(draws, truth, one) for one in answers}, []
    for one in answers:
        row = {"method": one.name}
        for index, name in enumerate(f"recall_at_{count}" for count in GUESSES):
            found = bounded(hits[one.name][:, index], weights)
            row |= {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
        row["gain"] = None
        if one.baseline:
            gains = (hits[one.name] - hits[one.baseline.name])[:, GUESSES.index(5)]
            row["gain"] = {"over": one.baseline.name, **bounded(gains, weights)}
        rows.append(row)
    return {
        "draws": len(draws),
        "classes": len({truth[row] for row in draws[0]}),
        "observations": float(np.mean(sizes)),
        "methods": rows,
    }


def sparse_hits(draws: Sequence[np.ndarray], truth: Sequence[str], answers: MethodAnswers) -> np.ndarray:
    """(queries, GUESSES) the hits of each query, averaged over the draws that have it; 0 for one that none has."""
    total, times = np.zeros((len(truth), len(GUESSES))), np.zeros((len(truth), 1))
    for number, rows in enumerate(draws):
        guesses = answers.sparse[number] if answers.sparse else [answers.guesses[row] for row in rows]
        total[rows] += hit_matrix([truth[row] for row in rows], guesses)
        times[rows] += 1
    return total / np.maximum(times, 1)


def method_table(report: dict) -> list[str]:
    queries, reference = (counted(report[key], "observation") for key in ("observations", "reference_observations"))
    lines = [
        f"{report['data']}: {queries} of {report['scored_on']}, 95% intervals; reference: "
        f"{report['reference']}, {reference} of {counted(report['classes'], 'class')}",
        "",
        *heading("method", *METRIC_NAMES.values(), "log-loss", "gain in Recall@5"),
    ]
    for row in report["methods"]:
        cells = [cell(interval_of(row, name)) for name in METRIC_NAMES]
        cells += [cell(row["log_loss"]), cell(row["gain"], "+")]
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return lines


def sparse_table(report: dict) -> list[str]:
    sparse, names = report["sparse"], [f"recall_at_{count}" for count in GUESSES]
    lines = [
        f"sparse test sets: {sparse['classes']} of {counted(report['classes'], 'class')}, 1 or {SPARSE_OBSERVATIONS} "
        f"observations of each, {sparse['observations']:.0f} in all; mean of {counted(sparse['draws'], 'draw')}, "
        "95% intervals",
        "",
        *heading("method", *(METRIC_NAMES[name] for name in names), "gain in Recall@5"),
    ]
    for row in sparse["methods"]:
        cells = [*(cell(interval_of(row, name)) for name in names), cell(row["gain"], "+")]
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return lines


def shots_table(report: dict) -> list[str]:
    lines = ["Recall@5 by shots (observations of the true class in the reference set):", ""]
    lines += heading("shots", "n", *(row["method"] for row in report["methods"]))
    for row in report["by_shots"]:
        cells = [cell(value) for value in row["recall_at_5"].values()]
        lines.append(f"| {row['shots']} | {row['observations']} | {' | '.join(cells)} |")
    return lines


def heading(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def cell(value: dict | None, sign: str = "") -> str:
    """`.654 [.612, .696]`, or a dash for None."""
    if value is None:
        return "–"
    mean, low, high = (re.sub(r"^([+-]?)0\.", r"\1.", f"{value[name]:{sign}.3f}") for name in ("value", "low", "high"))
    return f"{mean} [{low}, {high}]"
