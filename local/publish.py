"""Publish the bundle: upload the weights as a dataset, push the script as a kernel, collect its output, submit it.

python local/publish.py --dry-run    print what would be sent; needs no credentials
python local/publish.py              send what is not on Kaggle yet, wait for the run, check its output
python local/publish.py --submit     also submit that version, and wait for the score
python local/publish.py --weights model    send the weights as a Kaggle Model, and attach that version of it

If it is interrupted, run the same command again: it continues where it stopped. Everything is private unless --public.

Before a push it looks at the week's GPU quota, the sessions that run and the submissions left today. If something is
missing, it says so and sends no kernel; with --wait it waits. The kernel's log is printed as it comes. A kernel that
crashed but that Kaggle goes on billing is deleted if it has no earlier version; otherwise the message says where to
cancel it. After Ctrl-C you are asked whether to end it.

Before anything is sent, it checks that
- kernel-metadata.json follows Kaggle's rules;
- script and weights are complete and belong together;
- the bundle passed a rehearsal and was not changed since;
- there are credentials, and they belong to the kernel's owner;
- no file contains a secret.

Credentials: make a token at https://www.kaggle.com/settings/api and put it into ~/.kaggle/access_token. kaggle.json and
Kaggle's environment variables work too. your-kaggle-username in kernel-metadata.json stands for the owner of the token.
For another competition, write its name into competition_sources; nothing else needs to be edited.

Kaggle's client exits with 0 for some failures. This command checks every field of the answers instead: an error inside
a 200, an ignored source, a missing file or a failed run ends it with a message that says what to do. If a competition
takes CSV files instead of kernels, the CSV that the kernel wrote is submitted.

To publish by hand with Kaggle's own commands (read what they print, for the reason above):

export KAGGLE_USERNAME=your-name && python bundle.py runs/best
kaggle datasets create -p build/weights -r zip     # later: kaggle datasets version -p build/weights -r zip -m NOTE
kaggle kernels push -p build                       # when the dataset's page says that it is ready
"""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from local.base.console import command_parser, counted, run, say
from local.bundling.metadata import PLACEHOLDER, has_owner, write_metadata
from local.publishing.ledger import LEDGER, read_ledger
from local.publishing.preflight import Bundle, check_credentials, check_signed_in, inspect

METADATA = Path(__file__).resolve().parents[1] / "kernel-metadata.json"


def publish(
    build: Path,
    submits: bool = False,
    is_public: bool = False,
    is_dry: bool = False,
    waits: bool = False,
    as_model: bool = False,
    metadata: Path = METADATA,
    ledger: Path = LEDGER,
    **kaggle,
) -> None:
    """Publish a bundle.

    Args:
        is_dry: only print what would be sent.
        waits: wait until there is GPU quota, a session can start, and a submission is left.
        as_model: send the weights as a Kaggle Model instead of a dataset.
        metadata: kernel-metadata.json.
        kaggle: arguments of `local.publishing.client.Kaggle`.

    Raises:
        InputError: a check or a step failed. Steps that are done will not be repeated.
    """
    inspected = inspect(build, metadata)
    bundle, credentials = check_credentials(inspected, is_optional=is_dry)
    describe(bundle, is_public, as_model)
    if is_dry:
        say("dry run: nothing was sent")
        return
    if submits:
        read_ledger(ledger)  # a file that is no ledger must not be noticed after the submission
    # Kaggle's client signs in when it is imported, so it is imported after the checks.
    from local.publishing.client import Kaggle
    from local.publishing.publication import Publication

    user = Kaggle(credentials.source, **kaggle)
    bundle = inspected.owned_by(user.name)
    check_signed_in(bundle.metadata, user.name, credentials.source)
    write_metadata(build, bundle.metadata)
    publication = Publication(bundle, user, is_public)
    kernel = publication.push_kernel(publication.send_weights(as_model), submits, waits)
    output = publication.collect_output(kernel.version)
    if submits:
        publication.submit(output, kernel.version, ledger, waits)
    else:
        say("run again with --submit to submit this version")


def describe(bundle: Bundle, is_public: bool, as_model: bool) -> None:
    """Print what will be sent, and where to."""
    visibility = "public" if is_public else "private"
    weights = bundle.files[1:]
    size = sum(path.stat().st_size for path in weights)
    if not has_owner(bundle.metadata):
        say(f"owner        {PLACEHOLDER} stands for your Kaggle name, which is known after signing in")
    say(f"kernel       {bundle.metadata['id']}, {visibility}: {bundle.script}, {bundle.script.stat().st_size:,} bytes")
    kind = "model  " if as_model else "dataset"
    say(f"{kind}      {bundle.dataset}, {visibility}: {counted(len(weights), 'file')}, {size / 1e6:.1f} MB")
    for path in weights:
        say(f"               {path.relative_to(bundle.weights)}, {path.stat().st_size:,} bytes")
    rows = counted(len(bundle.table.observations), "observation")
    say(f"competition  {bundle.competition}, {rows} in the rehearsal's test set")
    say(f"runs         {', '.join(bundle.runs)}, bundled from commit {bundle.commit}")
    say(f"rehearsal    {bundle.record.when} UTC, passed: {', '.join(bundle.record.scenarios)}")


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--build", type=Path, default=Path("build"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--submit", action="store_true", help="submit to the competition, and wait for the score")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be sent")
    parser.add_argument("--public", action="store_true", help="make the kernel, and a new dataset, public")
    parser.add_argument("--wait", action="store_true", help="wait for GPU quota, a free session and a submission")
    parser.add_argument(
        "--weights",
        choices=["dataset", "model"],
        default="dataset",
        help="what the weights become (default: %(default)s)",
    )
    options = parser.parse_args()
    as_model = options.weights == "model"
    publish(options.build, options.submit, options.public, options.dry_run, options.wait, as_model)


if __name__ == "__main__":
    run(main)
