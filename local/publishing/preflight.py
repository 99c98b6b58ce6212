"""Everything that can be checked before the first byte leaves for Kaggle. Called by publication.py; offline.

Nothing here imports Kaggle's client, which signs in as soon as it is imported.
"""

import codecs
import json
import mmap
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from kernel.competitions import COMPETITIONS, competition_named
from kernel.inputs import InputError, sha256
from kernel.manifest import MANIFEST, Manifest, read_weights
from kernel.observations import Observation, TestTable
from kernel.submission import check_submission
from local.publishing.metadata import (
    DATASET_METADATA,
    PLACEHOLDER,
    dataset_metadata,
    read_kernel_metadata,
    with_owner,
)
from local.rehearsal.record import PLAIN, check_bundle, read_record

MOST_BYTES = 1_000_000  # of a script; the server refuses larger ones
TOKENS = "https://www.kaggle.com/settings/api"
# A token begins at the border of a word: the run's name `multitask-convnext-384` holds no OpenAI key.
SECRETS = re.compile(
    rb"(?<!\w)(?:KGAT_[0-9A-Za-z]{16,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{20,}|AKIA[0-9A-Z]{16})"
    rb"|(?<![\w-])sk-[A-Za-z0-9_-]{20,}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----|\"key\"\s*:\s*\"[0-9a-f]{32}\"|://[^/\s:@]+:[^/\s:@]+@"
)


@dataclass(frozen=True)
class Credentials:
    """Who the user is to Kaggle.

    Attributes:
        source: where they were found: a file or the environment.
        owner: the user's Kaggle name, or None where only Kaggle can tell.
        secrets: what must never be sent in a file, or printed.
    """

    source: str
    owner: str | None
    secrets: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Bundle:
    """A bundle that is fit to be sent.

    Attributes:
        metadata: of the kernel, as `kernel-metadata.json` has it, with the owner where it is known.
        manifest: of the weights.
        digests: SHA-256 of "kernel" and "manifest".
        table: the observations that the rehearsal predicted, without their photos.
        rehearsed: the submission that the rehearsal left.
        record: of the rehearsal.
    """

    build: Path
    metadata: dict
    manifest: Manifest
    digests: dict[str, str]
    table: TestTable
    rehearsed: Path
    record: dict

    @property
    def dataset(self) -> str:
        """owner/slug of the weights."""
        return self.metadata["dataset_sources"][0]

    @property
    def competition(self) -> str:
        return self.metadata["competition_sources"][0]

    @property
    def script(self) -> Path:
        return self.build / "kernel.py"

    @property
    def weights(self) -> Path:
        return self.build / "weights"

    @property
    def files(self) -> list[Path]:
        """All that travels, but for the kernel's metadata."""
        return [self.script, *sorted(path for path in self.weights.rglob("*") if path.is_file())]

    def owned_by(self, owner: str | None) -> "Bundle":
        """The bundle with a Kaggle name in place of the placeholder.

        Raises:
            InputError: it cannot be a Kaggle name.
        """
        return replace(self, metadata=with_owner(self.metadata, owner))

    @property
    def runs(self) -> list[str]:
        """The names of the runs that it is made of."""
        return list(dict.fromkeys(member.run or member.name for member in self.manifest.members))

    @property
    def commit(self) -> str:
        """What the script's banner says of its origin."""
        found = re.search(r"^commit +(.+)$", self.script.read_text(encoding="utf-8"), re.MULTILINE)
        return found.group(1) if found else "unknown"


def inspect(build: Path, metadata_path: Path) -> Bundle:
    """Check a bundle and its metadata against all that Kaggle, or a competitor, would regret.

    Args:
        metadata_path: kernel-metadata.json.

    Raises:
        InputError: something is wrong, missing, or of another bundle.
    """
    metadata = read_kernel_metadata(metadata_path)
    check_bundle(build)
    manifest, digest = inspect_weights(build / "weights", metadata)
    inspect_script(build / "kernel.py", digest)
    record = read_record(build)
    competition, attached = competition_named(manifest.competition.name), metadata["competition_sources"][0]
    if next((one for one in COMPETITIONS if one.slug == attached), competition) != competition:
        raise InputError(
            f"{metadata_path} attaches {attached}, but the run was trained on {competition.name}: "
            "correct competition_sources"
        )
    rows = competition.read_submission(build / PLAIN)
    if not rows:
        raise InputError(f"{build / PLAIN} has no observation: rehearse on the competition with its test set")
    table = TestTable(build, competition, [Observation(identity, ()) for identity, _ in rows])
    check_submission(build / PLAIN, table, manifest.class_ids)
    return Bundle(build, metadata, manifest, record["bundle"], table, build / PLAIN, record)


def inspect_weights(folder: Path, metadata: dict) -> tuple[Manifest, str]:
    """The manifest of complete and undamaged weights that name the dataset which the kernel attaches, and its digest.

    Raises:
        InputError: a file is missing, damaged, or none of theirs.
    """
    weights = read_weights(folder)
    for name in weights.manifest.files:
        weights.file(name)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    strangers = present - {*weights.manifest.files, MANIFEST, DATASET_METADATA}
    if strangers:
        raise InputError(f"{folder / min(strangers)} is none of the bundle's files: remove it, or bundle again")
    try:
        named = json.loads((folder / DATASET_METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / DATASET_METADATA} cannot be read ({error}): bundle again") from error
    # Not compared by owner, whom publishing fills in.
    if not isinstance(named, dict) or slug_of(named.get("id")) != slug_of(dataset_metadata(metadata)["id"]):
        raise InputError(
            f"{folder / DATASET_METADATA} is not that of {metadata['dataset_sources'][0]}, which the kernel attaches: "
            "bundle again"
        )
    return weights.manifest, sha256(folder / MANIFEST)


def slug_of(reference: object) -> str:
    """The slug of an owner/slug."""
    return str(reference).partition("/")[2]


def inspect_script(path: Path, digest: str) -> None:
    """A script of a size that Kaggle takes, which accepts these weights.

    Raises:
        InputError: it is missing, too large, or was bundled with others.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): run python bundle.py runs/NAME") from error
    size = len(text.encode())
    if size >= MOST_BYTES:
        raise InputError(f"{path} has {size:,} bytes, Kaggle takes less than {MOST_BYTES:,}: bundle again")
    if f'MANIFEST_SHA256 = "{digest}"' not in text:
        raise InputError(f"{path} does not belong to the weights beside it, of manifest {digest}: bundle again")


def find_credentials() -> Credentials:
    """The credentials that Kaggle's client will use, in its order of preference.

    Raises:
        InputError: there are none, or the client cannot read the file that they are in.
    """
    home = Path.home() / ".kaggle"
    token = os.environ.get("KAGGLE_API_TOKEN", "")
    if token:
        is_file = len(token) < 4096 and Path(token).is_file()
        return Credentials("KAGGLE_API_TOKEN", None, (read_secret(Path(token)) if is_file else token,))
    for path in (home / "access_token", home / "access_token.txt"):
        if secret := read_secret(path):
            return Credentials(str(path), None, (secret,))
    owner, key = os.environ.get("KAGGLE_USERNAME"), os.environ.get("KAGGLE_KEY")
    if owner and key:
        return Credentials("KAGGLE_USERNAME and KAGGLE_KEY", owner, (key,))
    for folder in (Path(os.environ.get("KAGGLE_CONFIG_DIR") or home), Path.home() / ".config" / "kaggle"):
        path = folder / "kaggle.json"
        if not (secret := read_secret(path)):
            continue
        try:
            content = json.loads(secret)
            return Credentials(str(path), str(content["username"]), (str(content["key"]),))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} cannot be read as JSON with a username and a key: make a new one at {TOKENS}"
            ) from error
    if read_secret(home / "credentials.json"):
        return Credentials(str(home / "credentials.json"), None, ())
    raise InputError(f"no Kaggle credentials: make a token at {TOKENS} and put it into {home / 'access_token'}")


def find_owner() -> str | None:
    """The user's Kaggle name as far as it is known without signing in."""
    try:
        owner = find_credentials().owner
    except InputError:  # bundling needs none; publishing will say what is wrong with them
        owner = None
    return owner or os.environ.get("KAGGLE_USERNAME") or None


def read_secret(path: Path) -> str:
    """The content of a file of credentials; nothing where there is no file.

    Raises:
        InputError: it is there, and Kaggle's client cannot read it, which would call it absent or end in a traceback.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): make it a file that you may read") from error
    if kind := foreign_encoding(content):
        raise InputError(
            f"{path} is {kind}, which Kaggle's client cannot read: save it as UTF-8 without a byte order mark"
        )
    return content.decode("utf-8").strip()


def foreign_encoding(content: bytes) -> str:
    """What a text is where it is not plain UTF-8, in words; otherwise an empty string."""
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32 text"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        return "UTF-16 text"
    if content.startswith(codecs.BOM_UTF8):
        return "UTF-8 text with a byte order mark"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8 text"
    return ""


def check_owner(bundle: Bundle, owner: str | None, source: str) -> None:
    """The kernel is pushed in the user's own name.

    Args:
        owner: the user's Kaggle name, None where only Kaggle can tell.
        source: where the credentials are.

    Raises:
        InputError: it is another's.
    """
    named = bundle.metadata["id"].partition("/")[0]
    if owner and owner.lower() != named.lower():
        raise InputError(
            f"kernel-metadata.json names {named} as the owner, the credentials in {source} are of {owner}: "
            f"write {PLACEHOLDER} there, or use the credentials of {named}"
        )


def find_secret(bundle: Bundle, credentials: Credentials) -> None:
    """Search all that would be sent for the user's own credentials, and for what looks like anybody's.

    Raises:
        InputError: one was found; the message says where, and never what.
    """
    own = [secret.encode() for secret in credentials.secrets if len(secret) >= 8]
    for path in bundle.files:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            places = [content.find(secret) for secret in own]
            # Of weights only the JSON header, whose length comes first, can be read; then there are numbers.
            end = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
            places += [found.start() for found in SECRETS.finditer(content[:end])]
            first = min((place for place in places if place >= 0), default=None)
            if first is not None:
                line = content[:first].count(b"\n") + 1
                raise InputError(f"{path} holds what looks like a secret in line {line}: remove it, then bundle again")
