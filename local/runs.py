"""List the runs of a folder with their validation scores, newest first.

Every held-out observation is predicted with settings that the others chose. The scores are weighted as for the choice
of a bank, and the last column has them without weights. metrics.json also has those of the settings that all of them
chose.

python local/runs.py            lists runs/
python local/runs.py FOLDER
"""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from local.base.console import aligned, command_parser, run, say
from local.base.runs import list_runs


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="default: %(default)s"
    )
    for line in aligned(list_runs(parser.parse_args().folder)):
        say(line)


if __name__ == "__main__":
    run(main)
