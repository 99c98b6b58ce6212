"""Draw a competition of made-up fungi, with the folders and tables of FungiCLEF 2025.

    python local/generate.py --out data/generated --species 60 --seed 0
    python local/generate.py --out data/full-size --metadata PATH/TO/fungiclef2025

The first makes up species and observations. The second draws a photo for every row of the competition's own tables.
Both write `competition/` (what a competitor downloads) and `solution.csv` (the test labels).
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
    parser.add_argument("--out", type=Path, required=True, help="new folder to write")
    parser.add_argument("--species", type=int, default=60, help="how many to make up (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: %(default)s)")
    parser.add_argument(
        "--resolution", choices=RESOLUTIONS[:-1], default=RESOLUTIONS[0], help="of the photos (default: %(default)s)"
    )
    parser.add_argument("--metadata", type=Path, help="folder of the competition: draw every row of its tables")
    options = vars(parser.parse_args())
    if options["metadata"]:
        del options["species"]
        generated = generate_from_metadata(**options)
    else:
        del options["metadata"]
        generated = generate(**options)
    print(f"competition  {generated.competition}\nsolution     {generated.solution}")


if __name__ == "__main__":
    run(main)
