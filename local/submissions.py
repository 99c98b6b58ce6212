"""Print the ledger of submissions, and plot local against leaderboard scores.

python local/submissions.py                  runs/submissions.csv, which local/publish.py writes, and a plot beside it
python local/submissions.py --csv table.csv --plot plot.svg

For each submission it shows the cross-validated local scores with and without weights, the leaderboard's, the GPU time
of the kernel's run, and what changed in the recipe since the submission before. It says which gains are within the
noise of the leaderboard, and how much of this week's GPU quota is left, if Kaggle can be asked.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from kernel.inputs import InputError
from local.base.console import command_parser, counted, run, say
from local.base.files import refuse_unwritable_file, write_table
from local.publishing.comparison import (
    EXPORTED,
    compare_submissions,
    describe_changes,
    export_rows,
    format_ledger,
    plot_submissions,
    refuse_no_picture,
)
from local.publishing.ledger import LEDGER, read_ledger
from local.publishing.quota import describe_quota


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("ledger", nargs="?", type=Path, default=LEDGER, metavar="LEDGER", help="default: %(default)s")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="default: beside the ledger, as .png")
    options = parser.parse_args()
    plot = options.plot or options.ledger.with_suffix(".png")
    if options.csv:
        refuse_unwritable_file(options.csv)
        if options.csv.resolve() == options.ledger.resolve():
            raise InputError(f"--csv {options.csv} would replace the ledger: give another file")
    if options.plot:
        refuse_no_picture(options.plot)
    rows = read_ledger(options.ledger)
    if rows:
        for line in format_ledger(rows):
            say(line)
        for row, change in zip(rows, describe_changes(rows), strict=True):
            say(f"{row.name}: {change}")
        for line in compare_submissions(rows):
            say(line)
        count = plot_submissions(rows, plot)
        say(
            f"{plot}: {counted(count, 'submission')} with both scores" if count else "no submission has both scores yet"
        )
    else:
        say(f"{options.ledger} has no submission yet: python local/publish.py --submit makes one")
    if options.csv:
        write_table(export_rows(rows), options.csv, EXPORTED)
        say(f"{options.csv}: {counted(len(rows), 'submission')}")
    say(describe_quota())


if __name__ == "__main__":
    run(main)
