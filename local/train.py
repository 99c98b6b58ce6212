"""Train a run: an encoder, tuned or as it came, and the bank that the kernel matches against.

python local/train.py --recipe fungiclef-baseline --data data/fungi-clef-2025 --out runs/baseline
python local/train.py --recipe fungiclef-protonet --data data/fungi-clef-2025 --encoder hf-hub:imageomics/bioclip
python local/train.py --recipe fungiclef-best --explain
torchrun --nproc-per-node 2 local/train.py --recipe fungiclef-protonet --data data/fungi-clef-2025 --resume
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from local.base.console import command_parser, run, say
from local.recipes.recipe import build_recipe, explain, list_recipes, read_given
from local.training.checks import check_start, is_restarted


def parse_options() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.epilog = list_recipes()
    parser.add_argument("--recipe", required=True, metavar="NAME|FILE", help="one of those below, or a .toml file")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the competition, as downloaded")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run folder (default: runs/RECIPE)")
    parser.add_argument("--encoder", metavar="SPEC", help="hf-hub:..., open_clip:A/P, timm:NAME, or a path")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the recipe"
    )
    parser.add_argument(
        "--explain", action="store_true", help="print every setting, its value and meaning; no training"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    options = parser.parse_args()
    if not options.data and not options.explain:
        parser.error("the following arguments are required: --data")
    return options


def main() -> None:
    options = parse_options()
    given = read_given(options.recipe, options.set, options.encoder)
    if options.explain:
        say(explain(given))
        return
    recipe = build_recipe(given)
    out = options.out or Path("runs") / Path(options.recipe).stem
    resumes = options.resume or is_restarted()
    check_start(recipe, options.data, out, resumes)
    # Imported here, since torch and what is built on it take seconds, and a mistake is to be answered at once.
    from local.training import distributed
    from local.training.run import train_run

    with distributed.joined():
        train_run(recipe, options.data, out, resumes=resumes)


if __name__ == "__main__":
    run(main)
