"""Order a training on Kaggle: everything that can be checked before signing in. Called by train.py.

Nothing here imports Kaggle's client, which signs in when it is imported.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kernel.competitions.table import SETTINGS_FILE
from kernel.inputs import InputError
from kernel.manifest import MANIFEST, read_manifest
from local.base.console import say
from local.base.files import write_json
from local.base.repository import ROOT
from local.bundling.metadata import KERNEL_METADATA, read_kernel_metadata, with_owner
from local.data.folder import find_competition
from local.publishing.credentials import find_credentials, find_owner
from local.publishing.preflight import check_attached, check_owner, check_signed_in
from local.recipes.recipe import Recipe, settings_of
from local.training.checks import check_start, named

STATE = "state.json"
FOLDER = ".kaggle"  # beside the runs: what was sent, and what runs on Kaggle


@dataclass(frozen=True)
class Order:
    """What to train, as given to train.py.

    Attributes:
        recipe: its name or path; `settings` and `encoders` are --set and --encoder.
        built: the recipe with them.
        data: the competition's folder, if it is here, to check that it is the one that is attached.
        out: the run folder.
    """

    recipe: str
    settings: Sequence[str]
    encoders: Sequence[str]
    built: Recipe
    data: Path | None
    out: Path

    @property
    def digest(self) -> str:
        """SHA-256 by which a session that trains the same is known again."""
        text = Path(self.recipe).read_text(encoding="utf-8") if self.is_own_recipe else self.recipe
        return hashlib.sha256(json.dumps([text, list(self.settings), list(self.encoders)]).encode()).hexdigest()

    @property
    def is_own_recipe(self) -> bool:
        """Whether the recipe is the path of a file, and not the name of one of the kit's."""
        return self.recipe.endswith(".toml")

    @property
    def folder(self) -> Path:
        """What is stored about the run: its state, its script, its log."""
        return self.out.parent / FOLDER / self.out.name


@dataclass(frozen=True)
class Session:
    """A session on Kaggle whose output has not been brought back.

    Attributes:
        kernel: owner/slug.
        limit: seconds after which Kaggle ends it.
        order: digest of what it trains; see `Order`.
    """

    kernel: str
    version: int
    limit: float
    order: str


@dataclass(frozen=True)
class State:
    """What is known of a run on Kaggle.

    Attributes:
        session: None if there is none to wait for.
        pushing: the session that is being pushed, of which it is not known whether it arrived; its version is 0.
        embeddings: parts of the cache that stopped sessions have left, for the next one.
    """

    session: Session | None = None
    pushing: Session | None = None
    embeddings: tuple[str, ...] = ()


def train_on_kaggle(
    order: Order, resumes: bool = False, waits: bool = False, metadata: Path = ROOT / KERNEL_METADATA, **kaggle
) -> None:
    """Train a run on Kaggle; `order.out` is then as if it had been trained here.

    Args:
        resumes: go on with a session that was not brought back, or with what an interrupted training has left.
        waits: wait until there is GPU quota and a session can start.
        metadata: kernel-metadata.json, which names the competition and the machine.
        kaggle: arguments of `local.publishing.client.Kaggle`.

    Raises:
        InputError: something that the user gave is wrong, or a step failed; --resume continues there.
    """
    order, described = replace(order, out=named(order.out)), read_kernel_metadata(metadata)
    check_order(order, described, state := read_state(order.folder), resumes)
    if not state.session and is_done(order):
        say(f"{order.out} is done already, with the same settings")
        return
    credentials = find_credentials()
    check_owner(with_owner(described, find_owner()), credentials.owner, credentials.source)
    # Kaggle's client signs in when it is imported, so it is imported after the checks.
    from local.publishing.client import Kaggle
    from local.remote.training import RemoteTraining

    user = Kaggle(credentials.source, **kaggle)
    owned = with_owner(described, user.name)
    check_signed_in(owned, user.name, credentials.source)
    training = RemoteTraining(order, state, owned, user)
    training.collect(training.find_session() or training.push(credentials, waits))


def check_order(order: Order, metadata: dict, state: State, resumes: bool) -> None:
    """Check an order, and whether it fits what runs on Kaggle already.

    Raises:
        InputError: something is wrong, or a session of this run was not brought back and `resumes` is false.
    """
    session = state.session
    if session and not resumes:
        raise InputError(
            f"{order.out} is being trained on Kaggle, by {session.kernel} version {session.version}: wait for it with "
            "--resume, or give another --out"
        )
    check_start(order.built, order.data, order.out, resumes)
    if order.data:
        competition = find_competition(order.data).competition
        if (order.data / SETTINGS_FILE).is_file():
            raise InputError(f"{order.data / SETTINGS_FILE} is not on Kaggle, and would not be used there: train here")
        check_attached(metadata, competition, f"{order.data} is {competition.name}")
    if session and session.order != order.digest:
        raise InputError(
            f"{session.kernel} version {session.version} trains {order.out} with another recipe, encoder or --set: "
            "give the same ones, or another --out"
        )


def is_done(order: Order) -> bool:
    """Whether the run is there already, with these settings. If the encoder is a path, only Kaggle can tell."""
    out = order.out
    return out.exists() and read_manifest(out / MANIFEST).members[0].given.recipe == settings_of(order.built)


def save_state(state: State, folder: Path) -> None:
    """Store the state of a run."""
    write_json(asdict(state), folder / STATE)


def read_state(folder: Path) -> State:
    """The stored state; an empty one if there is none, or it cannot be read."""
    try:
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
        session, pushing = (values[name] and Session(**values[name]) for name in ("session", "pushing"))
        return State(session, pushing, tuple(values["embeddings"]))
    except (OSError, ValueError, KeyError, TypeError):
        return State()
