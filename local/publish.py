"""Publish the bundle: the weights as a dataset, the script as a kernel, its output back, its score into the ledger.

python local/publish.py --dry-run    print what would be sent
python local/publish.py              send what is not there yet, wait for the run, check its output
python local/publish.py --submit     also submit that version, and wait for the score

Every step can be resumed: run the same command again. All is private unless --public.

Before anything is sent, it checks that
- kernel-metadata.json follows Kaggle's rules;
- script and weights are complete and belong together;
- this very bundle has passed a rehearsal;
- there are credentials, and they are those of the kernel's owner;
- no file contains a secret.

Credentials: make a token at https://www.kaggle.com/settings/api and put it into ~/.kaggle/access_token; kaggle.json and
Kaggle's environment variables work too. your-kaggle-username in kernel-metadata.json stands for the owner of the token.
For another competition write its name into competition_sources; nothing else needs to be edited.

Kaggle's client exits with 0 for some failures. This command reads every field of the answers instead: an error inside a
200, an invalid source, a file that was left out and a run that ended badly are errors that say what to do. Where a
competition takes CSV files and no kernels, the CSV that the kernel left is submitted; Kaggle is asked which.

By hand, with Kaggle's own commands (read what they print, for the reason above):

export KAGGLE_USERNAME=your-name && python bundle.py runs/best
kaggle datasets create -p build/weights -r zip     # later: kaggle datasets version -p build/weights -r zip -m NOTE
kaggle kernels push -p build                       # when the dataset's page says that it is ready
"""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from kernel.inputs import InputError
from local.base.console import command_parser, counted, run, say
from local.publishing.ledger import LEDGER
from local.publishing.metadata import PLACEHOLDER, has_owner, write_metadata
from local.publishing.preflight import Bundle, check_owner, find_credentials, find_owner, find_secret, inspect

METADATA = Path(__file__).resolve().parents[1] / "kernel-metadata.json"


def publish(
    build: Path,
    submits: bool = False,
    is_public: bool = False,
    is_dry: bool = False,
    metadata: Path = METADATA,
    ledger: Path = LEDGER,
    **kaggle,
) -> None:
    """Take a bundle to Kaggle and bring back what it left.

    Args:
        is_dry: say what would be sent, and send nothing.
        metadata: kernel-metadata.json.
        kaggle: of `local.publishing.client.Kaggle`.

    Raises:
        InputError: a check or a step failed; nothing that is done already will be done again.
    """
    inspected, credentials = inspect(build, metadata), find_credentials()
    bundle = inspected.owned_by(find_owner())
    check_owner(bundle, credentials.owner, credentials.source)
    find_secret(bundle, credentials)
    describe(bundle, is_public)
    if is_dry:
        say("dry run: nothing was sent")
        return
    # Kaggle's client signs in when it is imported, so only what has passed the checks comes as far.
    from local.publishing.client import Kaggle
    from local.publishing.publication import Publication

    user = Kaggle(credentials.source, **kaggle)
    bundle = inspected.owned_by(user.name)
    check_owner(bundle, user.name, credentials.source)
    if not has_owner(bundle.metadata):
        raise InputError(f"Kaggle does not say whose the credentials in {credentials.source} are: set KAGGLE_USERNAME")
    write_metadata(build, bundle.metadata)
    publication = Publication(bundle, user, is_public)
    publication.deliver_weights()
    publication.push_kernel()
    output = publication.collect_output()
    if submits:
        publication.submit(output, ledger)
    else:
        say("run again with --submit to submit this version")


def describe(bundle: Bundle, is_public: bool) -> None:
    """Say what goes where, and what is known of it."""
    seen = "public" if is_public else "private"
    size = sum(path.stat().st_size for path in bundle.files[1:])
    if not has_owner(bundle.metadata):
        say(f"owner        {PLACEHOLDER} stands for your Kaggle name, which is known once you are signed in")
    say(f"kernel       {bundle.metadata['id']}, {seen}: {bundle.script}, {bundle.script.stat().st_size:,} bytes")
    say(f"dataset      {bundle.dataset}, {seen}: {counted(len(bundle.files) - 1, 'file')}, {size / 1e6:.1f} MB")
    for path in bundle.files[1:]:
        say(f"               {path.relative_to(bundle.weights)}, {path.stat().st_size:,} bytes")
    rows = counted(len(bundle.table.observations), "observation")
    say(f"competition  {bundle.competition}, {rows} in the table as rehearsed")
    say(f"runs         {', '.join(bundle.runs)}, bundled from commit {bundle.commit}")
    say(f"rehearsal    {bundle.record['when']} UTC, passed: {', '.join(bundle.record['scenarios'])}")


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--build", type=Path, default=Path("build"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--submit", action="store_true", help="submit to the competition, wait for the score")
    parser.add_argument("--dry-run", action="store_true", help="say what would be sent, and send nothing")
    parser.add_argument(
        "--public", action="store_true", help="show the kernel, and a dataset that is new, to everybody"
    )
    options = parser.parse_args()
    publish(options.build, options.submit, options.public, options.dry_run)


if __name__ == "__main__":
    run(main)
