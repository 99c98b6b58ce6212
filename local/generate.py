"""Draws a competition in FungiCLEF 2025's layout: made-up fungi, and the competition's folders and columns.

    python local/generate.py --out data/generated --species 60 --seed 0
    python local/generate.py --out data/full-size --metadata PATH/TO/fungiclef2025

The first makes up species and observations. The second draws a photo for every row of the competition's own tables.
Both leave `competition/` (what a competitor downloads), `solution.csv` (the test labels) and `contact-sheet.png`.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from kernel.tables import RESOLUTIONS
from local.base.console import command_parser, run
from local.drawing.competition import generate, generate_from_metadata


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--species", type=int, default=60, help="classes to make up, without --metadata (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: 0)")
    parser.add_argument("--resolution", choices=RESOLUTIONS, default="300p", help="of the photos (default: 300p)")
    parser.add_argument("--metadata", type=Path, help="the competition's folder: draw every row of its tables")
    parser.add_argument("--processes", type=int, help="that draw (default: one per core if there are many photos)")
    options = vars(parser.parse_args())
    if options["metadata"]:
        del options["species"]
        generated = generate_from_metadata(**options)
    else:
        del options["metadata"]
        generated = generate(**options)
    for name in ("competition", "solution", "contact_sheet"):
        print(f"{name.replace('_', ' '):14}{getattr(generated, name)}")


if __name__ == "__main__":
    run(main)
