"""Check everything that can be checked offline before a bundle is sent to Kaggle. Called by publication.py.

Nothing here imports Kaggle's client, which signs in when it is imported.
"""

import mmap
import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kernel.competitions import COMPETITIONS, competition_of
from kernel.competitions.competition import Competition
from kernel.inputs import InputError, sha256
from kernel.manifest import MANIFEST, Manifest, read_weights
from kernel.observations import Observation, TestTable
from kernel.submission import check_submission
from local.base.console import say
from local.base.files import read_json
from local.bundling.metadata import (
    DATASET_METADATA,
    KERNEL_METADATA,
    PLACEHOLDER,
    has_owner,
    read_kernel_metadata,
    with_owner,
)
from local.bundling.record import PLAIN, RehearsalRecord, check_bundle, read_record
from local.bundling.weights import warn_of_few_classes
from local.publishing.credentials import Credentials, NoCredentials, find_credentials, find_owner

MAX_BYTES = 1_000_000  # of a script; the server refuses larger ones
# A token starts at a word boundary: the run's name `multitask-convnext-384` does not contain an OpenAI key.
SECRETS = re.compile(
    rb"(?<!\w)(?:KGAT_[0-9A-Za-z]{16,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{20,}|AKIA[0-9A-Z]{16})"
    rb"|(?<![\w-])sk-[A-Za-z0-9_-]{20,}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----|\"key\"\s*:\s*\"[0-9a-f]{32}\"|://[^/\s:@]+:[^/\s:@]+@"
)


@dataclass(frozen=True)
class Bundle:
    """A bundle that passed all checks.

    Attributes:
        metadata: of the kernel, as in `kernel-metadata.json`, with the owner if it is known.
        manifest: of the weights.
        table: the observations that the rehearsal predicted, without their photos.
        record: of its rehearsals.
    """

    build: Path
    metadata: dict
    manifest: Manifest
    table: TestTable
    record: RehearsalRecord

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
    def rehearsed(self) -> Path:
        """The submission of the rehearsal."""
        return self.build / PLAIN

    @property
    def files(self) -> list[Path]:
        """All files that are sent, except for the kernel's metadata; the script first."""
        return [self.script, *sorted(path for path in self.weights.rglob("*") if path.is_file())]

    @property
    def runs(self) -> list[str]:
        """The names of its runs."""
        return list(dict.fromkeys(member.run or member.name for member in self.manifest.members))

    @property
    def commit(self) -> str:
        """The commit that the script was made from, as its introduction says."""
        found = re.search(r"^ *commit +(.+)$", self.script.read_text(encoding="utf-8"), re.MULTILINE)
        return found.group(1) if found else "unknown"

    def owned_by(self, owner: str | None) -> "Bundle":
        """The bundle with a Kaggle name in place of the placeholder.

        Raises:
            InputError: `owner` cannot be a Kaggle name.
        """
        return replace(self, metadata=with_owner(self.metadata, owner))


def inspect(build: Path, metadata_path: Path) -> Bundle:
    """Check a bundle and its metadata for everything that Kaggle would refuse or the user would regret.

    Raises:
        InputError: something is wrong or missing, or belongs to another bundle.
    """
    metadata = read_kernel_metadata(metadata_path)
    check_bundle(build)
    manifest = check_weights(build / "weights", metadata)
    check_script(build / "kernel.py", sha256(build / "weights" / MANIFEST))
    record = read_record(build)
    competition = competition_of(manifest.competition)
    check_attached(metadata, competition, f"the run was trained on {competition.name}")
    rows = competition.read_submission(build / PLAIN)
    if not rows:
        raise InputError(f"{build / PLAIN} has no observations: rehearse on a competition that has its test set")
    table = TestTable(build, competition, [Observation(identity, ()) for identity, _ in rows])
    check_submission(build / PLAIN, table, manifest.class_ids)
    if warning := warn_of_few_classes(manifest):
        say(warning)
    return Bundle(build, metadata, manifest, table, record)


def check_attached(metadata: dict, competition: Competition, reason: str) -> None:
    """Check that a kernel attaches the right competition, as far as its slug is known.

    Raises:
        InputError: it attaches another one; `reason` says why that is wrong.
    """
    attached = metadata["competition_sources"][0]
    if next((one for one in COMPETITIONS if one.slug == attached), competition).name != competition.name:
        raise InputError(f"{KERNEL_METADATA} attaches {attached}, but {reason}: correct competition_sources")


def check_weights(folder: Path, metadata: dict) -> Manifest:
    """Check that the weights are complete, undamaged, and the dataset that the kernel attaches; their manifest.

    Raises:
        InputError: a file is missing, damaged or unknown, or the weights are another dataset.
    """
    weights = read_weights(folder)
    for name in weights.manifest.files:
        weights.file(name)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    unknown = present - {*weights.manifest.files, MANIFEST, DATASET_METADATA}
    if unknown:
        raise InputError(f"{folder / min(unknown)} does not belong to the bundle: remove it, or bundle again")
    reference = metadata["dataset_sources"][0]
    written = str(read_json(folder / DATASET_METADATA).get("id"))
    if written.partition("/")[2] != reference.partition("/")[2]:  # publishing fills in the owner
        raise InputError(
            f"{folder / DATASET_METADATA} does not name {reference}, which the kernel attaches: bundle again"
        )
    return weights.manifest


def check_script(path: Path, manifest_digest: str) -> None:
    """Check that Kaggle takes a script of this size, and that the script accepts these weights.

    Raises:
        InputError: it is too large, or was bundled with other weights.
    """
    size = path.stat().st_size
    if size >= MAX_BYTES:
        raise InputError(f"{path} has {size:,} bytes, Kaggle takes less than {MAX_BYTES:,}: bundle again")
    if f'MANIFEST_SHA256 = "{manifest_digest}"'.encode() not in path.read_bytes():
        raise InputError(
            f"{path} does not belong to the weights beside it, which have manifest {manifest_digest}: bundle again"
        )


def check_credentials(bundle: Bundle, is_optional: bool = False) -> tuple[Bundle, Credentials]:
    """Find the user's credentials, and check that they fit the bundle and are in none of its files.

    Args:
        is_optional: without credentials, look for anybody's secrets only.

    Returns:
        The bundle with its owner filled in, if that is known without signing in, and the credentials.

    Raises:
        InputError: there are no credentials, they belong to somebody else than the kernel, or a file has a secret.
    """
    try:
        credentials = find_credentials()
    except NoCredentials:
        if not is_optional:
            raise
        credentials = Credentials("none", None, ())
    owned = bundle.owned_by(find_owner())
    check_owner(owned.metadata, credentials.owner, credentials.source)
    find_secret(owned.files, credentials)
    return owned, credentials


def check_owner(metadata: dict, owner: str | None, source: str) -> None:
    """Check that the kernel is pushed under the user's own name.

    Args:
        owner: the user's Kaggle name; None if only Kaggle knows it.
        source: where the credentials are.

    Raises:
        InputError: kernel-metadata.json names somebody else.
    """
    named = metadata["id"].partition("/")[0]
    if owner and owner.lower() != named.lower():
        raise InputError(
            f"kernel-metadata.json names {named} as the owner, but the credentials in {source} belong to {owner}: "
            f"write {PLACEHOLDER} there, or use the credentials of {named}"
        )


def check_signed_in(metadata: dict, owner: str | None, source: str) -> None:
    """Check, after signing in, that the owner is known, and is the user; see `check_owner`."""
    check_owner(metadata, owner, source)
    if not has_owner(metadata):
        raise InputError(f"Kaggle does not say who owns the credentials in {source}: set KAGGLE_USERNAME")


def find_secret(files: Iterable[Path], credentials: Credentials, fix: str = "bundle again") -> None:
    """Search files that would be sent for the user's credentials, and for what looks like anybody's.

    Raises:
        InputError: a secret was found; the message gives its file and line only.
    """
    own = [secret.encode() for secret in credentials.secrets if len(secret) >= 8]
    for path in filter(os.path.getsize, files):  # an empty file cannot be mapped
        if zipfile.is_zipfile(path):  # compressed, a secret looks like anything, and anything like a secret
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    refuse_secret(f"{path}/{name}", archive.read(name), own, fix)
        else:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                refuse_secret(str(path), content, own, fix)


def refuse_secret(name: str, content: bytes | mmap.mmap, own: Sequence[bytes], fix: str) -> None:
    """Raise an InputError if the content of a file has one of the user's own secrets, or what looks like anybody's."""
    offsets = [content.find(secret) for secret in own]
    # Weights are text only in their JSON header, whose length is in the first eight bytes.
    end = 8 + int.from_bytes(content[:8], "little") if name.endswith(".safetensors") else len(content)
    offsets += [found.start() for found in SECRETS.finditer(content[:end])]
    first = min((offset for offset in offsets if offset >= 0), default=None)
    if first is not None:
        line = content[:first].count(b"\n") + 1
        raise InputError(f"{name} has what looks like a secret in line {line}: remove it, then {fix}")
