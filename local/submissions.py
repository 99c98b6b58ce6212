"""Print the ledger of submissions, and plot local against leaderboard scores.

python local/submissions.py          runs/submissions.csv, which local/publish.py writes; the plot is written beside it

It also says which gains are within the noise of the leaderboard.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from local.base.console import command_parser, counted, run, say
from local.publishing.ledger import LEDGER, compare_submissions, format_ledger, plot_submissions, read_ledger


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("ledger", nargs="?", type=Path, default=LEDGER, metavar="CSV", help="default: %(default)s")
    options = parser.parse_args()
    rows = read_ledger(options.ledger)
    if not rows:
        say(f"{options.ledger} has no submission yet: python local/publish.py --submit makes one")
        return
    for line in (*format_ledger(rows), *compare_submissions(rows)):
        say(line)
    plot = options.ledger.with_suffix(".png")
    count = plot_submissions(rows, plot)
    say(f"{plot}: {counted(count, 'submission')} with both scores" if count else "no submission has both scores yet")


if __name__ == "__main__":
    run(main)
