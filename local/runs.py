"""List the runs of a folder with their validation scores, newest first.

The scores are weighted as the choice of a bank weighs the held-out observations; metrics.json has the unweighted ones.

python local/runs.py            of runs/
python local/runs.py elsewhere
"""

import sys
from datetime import datetime
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from kernel.inputs import InputError
from kernel.manifest import MANIFEST, Weights, read_manifest, read_weights
from local.base.console import aligned, command_parser, run, say

NAMED = 8  # runs that a message lists
SCORES = {"recall_at_1": "Recall@1", "recall_at_5": "Recall@5", "macro_f1": "macro-F1"}


def list_runs(folder: Path) -> list[dict[str, str]]:
    """A row per run, newest first; a run without anything held out has no scores.

    Raises:
        InputError: there is no run.
    """
    manifests = sorted(folder.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime, reverse=True)
    rows = [row for row in map(describe_run, manifests) if row]
    if not rows:
        raise InputError(f"{folder} holds no run: train one with local/train.py, or give another folder")
    return rows


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
    more = f" and {len(runs) - NAMED} more" if len(runs) > NAMED else ""
    raise InputError(f"{problem}; there are {', '.join(runs[:NAMED])}{more}")


def describe_run(path: Path) -> dict[str, str] | None:
    """One row; None where there is no manifest of a run at the path."""
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
        "encoder": Path(recipe["encoder"]).name,
        "reference": recipe["reference"],
        **{
            label: f"{scores[name]:.3f} [{scores[name + '_low']:.3f}, {scores[name + '_high']:.3f}]" if scores else "-"
            for name, label in SCORES.items()
        },
    }


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="default: %(default)s"
    )
    rows = list_runs(parser.parse_args().folder)
    for line in aligned(rows):
        say(line)


if __name__ == "__main__":
    run(main)
