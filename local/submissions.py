"""Print the ledger of submissions, and plot local against leaderboard scores.

python local/submissions.py          runs/submissions.csv, which local/publish.py keeps; the plot lies beside it

It also says which gains are within the noise of the leaderboard.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from local.base.console import command_parser, counted, run, say
from local.publishing.ledger import LEDGER, compare, noise, number, read_ledger, table


def plot_submissions(rows: Sequence[dict[str, str]], path: Path) -> int:
    """Local against leaderboard score of each submission that has both, with 95% intervals; how many these are.

    Args:
        rows: of the ledger. Without one that has both scores, nothing is drawn.
    """
    scored = [row for row in rows if number(row["local"]) is not None and number(row["public"]) is not None]
    if not scored:
        return 0
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(6.5, 6), layout="constrained")
    axis = figure.subplots()
    for place, competition in enumerate(dict.fromkeys(row["competition"] for row in scored)):
        for row in (row for row in scored if row["competition"] == competition):
            local, public = float(row["local"]), float(row["public"])
            spread = [[local - (number(row["low"]) or local)], [(number(row["high"]) or local) - local]]
            axis.errorbar(
                local, public, noise(row["metric"], public, int(row["observations"])), spread, "o", color=f"C{place}"
            )
            name = f"{row['runs']} v{row['version']}"
            axis.annotate(name, (local, public), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.plot([], [], "o", color=f"C{place}", label=competition)
    low, high = (pick(*axis.get_xlim(), *axis.get_ylim()) for pick in (min, max))
    axis.plot([low, high], [low, high], ":", color="grey", label="equal")
    axis.set(xlabel="local score, cross-validated", ylabel="public leaderboard score")
    axis.legend(frameon=False)
    axis.set_title("Local against leaderboard, 95% intervals", loc="left")
    figure.savefig(path, dpi=120)
    return len(scored)


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("ledger", nargs="?", type=Path, default=LEDGER, metavar="CSV", help="default: %(default)s")
    options = parser.parse_args()
    rows = read_ledger(options.ledger)
    if not rows:
        say(f"{options.ledger} has no submission yet: python local/publish.py --submit makes one")
        return
    for line in (*table(rows), *compare(rows)):
        say(line)
    picture = options.ledger.with_suffix(".png")
    drawn = plot_submissions(rows, picture)
    say(f"{picture}: {counted(drawn, 'submission')} with both scores" if drawn else "no submission has both scores yet")


if __name__ == "__main__":
    run(main)
