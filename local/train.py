"""Train a run: an encoder, fine-tuned or as it is, and the bank that ranks the classes.

python local/train.py --recipe fungiclef-baseline --data data/fungi-clef-2025 --out runs/baseline
python local/train.py --recipe fungiclef-protonet --data data/fungi-clef-2025 --encoder hf-hub:imageomics/bioclip
python local/train.py --recipe fungiclef-best --explain
torchrun --nproc-per-node 2 local/train.py --recipe fungiclef-protonet --data data/fungi-clef-2025 --resume

local/recipes/README.md says what each recipe does and how a bank is chosen.

--encoder takes a model of the hub (hf-hub:imageomics/bioclip), open_clip:ARCHITECTURE/PRETRAINED, timm:NAME, the common
  stem of a .safetensors and a .json file, a folder in the hub's format (its weights may be a training checkpoint), or a
  run. The observations that such a run was trained on are not used to score the new one. HF_HUB_OFFLINE=1 loads what
  was downloaded before. Weights that a hub offers only as .bin are read as tensors alone, and saved as safetensors. The
  encoder is saved, and opened as the kernel will open it, before the first photo is embedded. --set image_size=434 runs
  it at another input size, and --set pool=token+avg takes the class token of a transformer and the mean of its patches.
  Given several times, --encoder concatenates the embeddings of frozen encoders.

Before photos are embedded, a line says how many, in how many views, and about how long that takes on this device.

--resume continues from the last checkpoint, or starts if there is none. On a CPU the result is the same, bit for bit,
  as without the interruption. Ctrl-C and SIGTERM lose nothing. A training that is killed loses at most the last five
  minutes, or twenty times what the last checkpoint took to write, and the batch or the evaluation that it was at; a
  damaged checkpoint loses the time since the one before. A finished run is trained further with --resume --set
  epochs=30 --set learning_rate=1e-5. If the data, the encoder, the seed or another setting would make another run,
  --resume says what differs and changes nothing. A full disk, a loss that is not a number and too little memory end
  with one line, not with a traceback.

Under torchrun, every process trains on a part of each batch and embeds a part of the photos. All of them need the
  same runs/ folder. On two machines with eight GPUs each, run on both: torchrun --nnodes 2 --nproc-per-node 8
  --rdzv-backend c10d --rdzv-endpoint FIRST:29500 --max-restarts 3 local/train.py ... If a process dies, all start
  again from the last checkpoint.

--exclude leaves out the observations that a CSV lists in its column "observation", such as the marks of mislabelled
  and duplicate photos that a report saves. The run keeps their ids in its recipe.

--on kaggle trains with the same arguments on Kaggle's GPUs. It sends this code as a private dataset, pushes a private
  kernel with the competition of kernel-metadata.json, and prints the log as it comes. Then the run folder is put in
  place here, with its part of the embedding cache. --data is not needed. An encoder that is a path is sent too. With
  --set epochs=0 Kaggle only embeds, and banks can be chosen here. If this command is interrupted, or the session ends
  at its limit, run it again with --resume. --wait waits until there is GPU quota and one of two sessions is free.

--seeds 5 trains five runs, RUN-seed0 to RUN-seed4, one after another. With --resume, those that are finished are left
  as they are. bundle.py makes an ensemble of them.

A run folder keeps its recipe, the versions, the digest of the data, log.csv, the training curve, and TensorBoard's
events (tensorboard --logdir runs). Of the seconds of an epoch, log.csv gives those spent on waiting for photos, on
validation and on writing checkpoints; the rest are forward and backward passes and optimizer steps. oof.csv has the
held-out predictions, to mix with those of other models. local/runs.py lists runs with their scores and your notes.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from kernel.inputs import InputError
from local.base.console import command_parser, run, say
from local.recipes.recipe import Given, build_recipe, explain, list_recipes, read_excluded, read_given
from local.training.checks import check_start, is_first, is_restarted, named
from local.training.run import train_run


def parse_options() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.epilog = list_recipes()
    parser.add_argument("--recipe", required=True, metavar="NAME|FILE", help="one of those below, or a .toml file")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the competition, as downloaded")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run folder (default: runs/RECIPE)")
    parser.add_argument(
        "--encoder",
        action="append",
        metavar="SPEC",
        help="hf-hub:..., open_clip:A/P, timm:NAME, or a path; given again, the embeddings are concatenated",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the recipe"
    )
    parser.add_argument(
        "--exclude", type=Path, metavar="CSV", help="observations to leave out, such as a report's marks"
    )
    parser.add_argument(
        "--explain", action="store_true", help="print every setting, its value and meaning; no training"
    )
    parser.add_argument("--on", choices=["kaggle"], help="train on Kaggle's GPUs, and bring the run back")
    parser.add_argument("--wait", action="store_true", help="with --on kaggle: wait for GPU quota and a free session")
    parser.add_argument("--seeds", type=int, metavar="N", help="train N runs, with seeds 0 to N-1, for an ensemble")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint, if there is one")
    options = parser.parse_args()
    if not options.data and not options.explain and not options.on:
        parser.error("the following arguments are required: --data")
    if options.wait and not options.on:
        parser.error("--wait is for --on kaggle only")
    if options.seeds is not None and options.seeds < 2:
        parser.error(f"argument --seeds: expected 2 or more, got {options.seeds}")
    if options.seeds and options.on:
        parser.error("--seeds trains here: with --on kaggle, give --set seed=0, then --set seed=1, and so on")
    return options


def main() -> None:
    options = parse_options()
    given = read_given(options.recipe, options.set, options.encoder)
    if options.exclude:
        given["exclude"] = Given(read_excluded(options.exclude), f"--exclude {options.exclude}")
    if options.explain:
        say(explain(given))
        return
    recipe = build_recipe(given)
    out = options.out or Path("runs") / Path(options.recipe).stem
    resumes = options.resume or is_restarted()
    if options.seeds:
        train_seeds(given, options.seeds, options.data, named(out), resumes)
        return
    if options.on:
        from local.remote.order import Order, train_on_kaggle  # imports what a training here does not need

        settings = [*options.set, *([f"exclude={json.dumps(recipe.train.exclude)}"] if options.exclude else [])]
        order = Order(options.recipe, settings, options.encoder or (), recipe, options.data, out)
        train_on_kaggle(order, options.resume, options.wait)
        return
    train_run(recipe, options.data, out, resumes=resumes)


def train_seeds(given: Mapping[str, Given], count: int, data: Path, out: Path, resumes: bool) -> None:
    """Train runs that differ in their seed alone, each in a folder of its own, and print how to bundle them.

    Raises:
        InputError: the runs would be the same, the seed is given too, or `train_run` refuses one of them.
    """
    if "seed" in given and given["seed"].source.startswith("--set"):
        raise InputError(f"{given['seed'].source} and --seeds both give the seed: remove one of them")
    if not build_recipe(given).is_random:
        raise InputError(
            "--seeds: the runs would be the same, because nothing that this recipe trains is random; set epochs, or "
            'matcher = "projection"'
        )
    seeds = [Given(seed, f"--seeds {count}") for seed in range(count)]
    recipes = {out.with_name(f"{out.name}-seed{seed.value}"): build_recipe({**given, "seed": seed}) for seed in seeds}
    for path, recipe in recipes.items():  # before the first of them is trained
        check_start(recipe, data, path, resumes)
    for path, recipe in recipes.items():
        train_run(recipe, data, path, resumes=resumes)
    if is_first():
        say(f"to make an ensemble of them: {shlex.join(['python', 'bundle.py', *map(str, recipes)])}")


if __name__ == "__main__":
    run(main)
