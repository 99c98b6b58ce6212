"""Find the runs in a folder, and describe them."""

from datetime import datetime
from pathlib import Path

from kernel.inputs import InputError
from kernel.manifest import MANIFEST, Weights, read_manifest, read_weights

MAX_LISTED = 8  # runs in a message
SCORES = {"recall_at_1": "Recall@1", "recall_at_5": "Recall@5", "macro_f1": "macro-F1"}
UNWEIGHTED = "the three unweighted"  # a column


def open_run(folder: Path) -> Weights:
    """The weights of a run.

    Raises:
        InputError: there is no run in `folder`; the message lists those beside it.
    """
    if (folder / MANIFEST).is_file():
        return read_weights(folder)
    problem = f"{folder} is not a run: it has no {MANIFEST}" if folder.exists() else f"no such run: {folder}"
    runs = sorted(str(path.parent) for path in folder.parent.glob(f"[!.]*/{MANIFEST}"))
    if not runs:
        raise InputError(f"{problem}; train one with local/train.py")
    more = f" and {len(runs) - MAX_LISTED} more" if len(runs) > MAX_LISTED else ""
    raise InputError(f"{problem}; there are {', '.join(runs[:MAX_LISTED])}{more}")


def list_runs(folder: Path) -> list[dict[str, str]]:
    """One row of the table of runs for each, newest first.

    Raises:
        InputError: there is no run.
    """
    manifests = sorted(folder.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime, reverse=True)
    rows = [row for row in map(describe_run, manifests) if row]
    if not rows:
        raise InputError(f"{folder} holds no run: train one with local/train.py, or give another folder")
    return rows


def describe_run(path: Path) -> dict[str, str] | None:
    """The row of one run, by column; None if its manifest cannot be read. Without held-out data it has no scores."""
    try:
        manifest = read_manifest(path)
    except InputError:
        return None
    member = manifest.members[0]
    scores, recipe = member.validation, member.recipe
    return {
        "run": path.parent.name,
        "trained": datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M"),
        "data": f"{manifest.competition.name} {member.data_sha256[:6]}",
        "encoder": " + ".join(Path(name).name for name in encoder_names(recipe["encoder"])),
        "reference": recipe["reference"],
        **{
            label: f"{scores[name]:.3f} [{scores[name + '_low']:.3f}, {scores[name + '_high']:.3f}]" if scores else "-"
            for name, label in SCORES.items()
        },
        UNWEIGHTED: " / ".join(f"{scores[f'unweighted_{name}']:.3f}" for name in SCORES) if scores else "-",
    }


def encoder_names(encoder: str | list[str]) -> list[str]:
    """The setting `encoder` of a run's recipe as a list, also where the run has one encoder."""
    return [encoder] if isinstance(encoder, str) else encoder
