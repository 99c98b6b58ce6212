"""Measure this kit and print the tables of local/benchmarks/RESULTS.md.

python local/benchmark.py speed  # photos, and matching
python local/benchmark.py speed --encoder timm:vit_base_patch16_224 --json build/speed.json
pip install pybioclip faiss-cpu && python local/benchmark.py speed  # compared with these too, offline
python local/benchmark.py accuracy  # on drawn fungi, with an encoder trained on others, in minutes
python local/benchmark.py accuracy --data data/fungi-clef-2025 --encoder hf-hub:imageomics/bioclip --out runs
python local/benchmark.py systems --data data/fungi-clef-2025 --encoder hf-hub:imageomics/bioclip
python local/benchmark.py omniglot --data data/omniglot
python local/benchmark.py scale  # 65,000 classes and up to a million photos: half an hour on a core, 10 GB of disk
python local/benchmark.py scale --classes 8000 --photos 16000 64000  # in minutes
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from kernel.inputs import InputError
from local.base.console import command_parser, counted, run
from local.base.files import refuse_unwritable_file
from local.data.folder import find_competition
from local.encoders.source import find_source
from local.recipes.recipe import read_recipe


def parse_options() -> argparse.Namespace:
    parser = command_parser(__doc__)
    tables = parser.add_subparsers(dest="name", required=True, parser_class=partial(type(parser), allow_abbrev=False))
    one = tables.add_parser("speed", help="photos per second, and matching, compared with other implementations")
    one.add_argument("--encoder", default="timm:mobilenetv2_100", metavar="SPEC", help="default: %(default)s")
    one = tables.add_parser("accuracy", help="methods from the public starter notebook to the best recipe")
    one.add_argument("--data", type=Path, nargs="+", default=[], metavar="DIR", help="competitions (default: draw one)")
    one.add_argument(
        "--encoder", nargs="+", default=[], metavar="SPEC", help="of several, also the ensemble, and all in one run"
    )
    one.add_argument("--reference", choices=("train", "train+val"), default="train", help="default: %(default)s")
    one.add_argument("--recipe", nargs="+", default=[], metavar="NAME", help="of the runs (default: all)")
    one.add_argument("--out", type=Path, metavar="DIR", help="keep the runs there")
    one = tables.add_parser("systems", help="recipes, compared with the published systems that they come from")
    one.add_argument("--data", type=Path, nargs="+", required=True, metavar="DIR", help="competitions")
    one.add_argument("--encoder", required=True, metavar="SPEC", help="of all systems")
    one.add_argument("--recipe", nargs="+", default=[], metavar="NAME", help="default: all")
    one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the recipes")
    one = tables.add_parser("omniglot", help="few-shot accuracy on an alphabet that training has not seen")
    one.add_argument("--data", type=Path, required=True, metavar="DIR", help="of alphabet/character/drawing.png")
    one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the recipe")
    one = tables.add_parser("scale", help="time and memory of all that follows the encoder, as photos become more")
    one.add_argument(
        "--photos", type=int, nargs="+", default=[65_000, 260_000, 1_040_000], metavar="COUNT",
        help="default: 65000 260000 1040000",
    )  # fmt: skip
    one.add_argument("--classes", type=int, default=65_000, metavar="COUNT", help="default: %(default)s")
    for table in tables.choices.values():
        table.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser.parse_args()


def check_each(folders: Sequence[Path], encoders: Sequence[str]) -> None:
    """Check that the folders are competitions and the encoders exist.

    Raises:
        InputError: one is not, or does not.
    """
    for data in folders:
        find_competition(data)
    for spec in encoders:
        find_source(spec)


def find_alphabets(folder: Path) -> list[Path]:
    """The folders of the alphabets in `folder`, which holds `alphabet/character/drawing.png`.

    Raises:
        InputError: there are fewer than two.
    """
    alphabets = sorted({drawing.parents[1] for drawing in folder.rglob("*/*/*.png")})
    if len(alphabets) < 2:
        raise InputError(
            f"{folder} holds {counted(len(alphabets), 'alphabet')}: give a folder of alphabet/character/drawing.png"
        )
    return alphabets


def check_sizes(photos: Sequence[int], classes: int) -> None:
    """Check that there are classes, and at least one photo of each.

    Raises:
        InputError: there are not.
    """
    if classes < 100:
        raise InputError(f"--classes {classes} is too few: give at least 100")
    if min(photos) < classes:
        raise InputError(f"--photos {min(photos)} is fewer than one of each of {classes} classes: give more photos")


def main() -> None:
    options = parse_options()
    if options.json:
        refuse_unwritable_file(options.json)
    # Each benchmark is imported after the checks: torch takes seconds, and mistakes must be answered immediately.
    if options.name == "speed":
        find_source(options.encoder)
        from local.benchmarks.speed import speed

        report = speed(options.encoder)
    elif options.name == "accuracy":
        check_each(options.data, options.encoder)
        for name in options.recipe:
            read_recipe(name)
        from local.benchmarks.accuracy import accuracy

        report = accuracy(options.data, options.encoder, options.reference, options.out, options.recipe)
    elif options.name == "systems":
        check_each(options.data, [options.encoder])
        for name in options.recipe or ["fungiclef-protonet"]:
            read_recipe(name, options.set)
        from local.benchmarks.systems import systems

        report = systems(options.data, options.encoder, options.recipe, options.set)
    elif options.name == "scale":
        check_sizes(options.photos, options.classes)
        from local.benchmarks.scale import scale

        report = scale(options.photos, options.classes)
    else:
        alphabets = find_alphabets(options.data)
        read_recipe("omniglot", options.set)
        from local.benchmarks.omniglot import omniglot

        report = omniglot(alphabets, options.set)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
