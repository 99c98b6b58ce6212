"""Send a folder to Kaggle as a dataset or a model, unless it has that already, and wait until it is processed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kernel.inputs import InputError
from local.base.console import say
from local.publishing.client import DatasetStatus, Kaggle

POLL_SECONDS = 30
MAX_PROCESSING = 3600  # seconds to wait at most
BROKEN = ("failed", "deleted")  # states of a dataset that will not become ready


@dataclass(frozen=True)
class SentFiles:
    """Files that are on Kaggle.

    Attributes:
        reference: owner/slug of the dataset, or owner/model/framework/variation.
        digest: identifies the files.
        version: of the dataset or the variation.
    """

    reference: str
    digest: str
    version: int


@dataclass(frozen=True)
class Upload:
    """A folder that is to be a dataset or a model.

    Attributes:
        folder: for a dataset with dataset-metadata.json. An upload that was interrupted is resumed by its path.
        reference: owner/slug of the dataset, or owner/model/framework/variation.
        digest: identifies the content.
        note: of the version, for those who read the dataset's page.
    """

    folder: Path
    reference: str
    digest: str
    note: str
    is_public: bool = False


def send(kaggle: Kaggle, upload: Upload, sent: SentFiles | None, save: Callable[[SentFiles | None], None]) -> SentFiles:
    """Send a folder unless it was sent before, and wait until Kaggle has processed it.

    Args:
        sent: what was sent last, as stored by `save`.
        save: stores what was sent, or None if it has to be sent again.

    Raises:
        InputError: it cannot be sent, or is not ready in time.
    """
    reference = upload.reference
    if is_model(reference):
        return send_model(kaggle, upload, sent, save)
    current = kaggle.dataset_status(reference)
    is_usable = current is not None and current.status not in BROKEN
    is_same = sent is not None and (sent.reference, sent.digest) == (reference, upload.digest)
    # A version newer than the stored one was made by somebody else, and may contain anything.
    if is_usable and is_same and current.version <= sent.version:
        say(f"{reference}: version {sent.version} has these files already")
    else:
        if is_usable:
            wait_until_ready(
                kaggle, reference, current.version, save
            )  # Kaggle refuses a version while it processes one
        before = kaggle.dataset_status(reference).version if current else None
        version = kaggle.send_dataset(upload.folder, reference, before, upload.note, upload.is_public)
        sent = SentFiles(reference, upload.digest, version)
        save(sent)
        say(f"{reference}: version {version} sent")
    wait_until_ready(kaggle, reference, sent.version, save)
    return sent


def is_model(reference: str) -> bool:
    return reference.count("/") == 3


def send_model(
    kaggle: Kaggle, upload: Upload, sent: SentFiles | None, save: Callable[[SentFiles | None], None]
) -> SentFiles:
    """`send` for a model."""
    reference, current = upload.reference, kaggle.model_version(upload.reference)
    is_same = sent is not None and (sent.reference, sent.digest) == (reference, upload.digest)
    # A kernel names the version, so that a newer one does no harm.
    if is_same and current is not None and current >= sent.version:
        say(f"{reference}: version {sent.version} has these files already")
        return sent
    version = kaggle.send_model(upload.folder, reference, current, upload.note, upload.is_public)
    sent = SentFiles(reference, upload.digest, version)
    save(sent)
    say(f"{reference}: version {version} sent")

    def poll() -> tuple[bool | None, str]:
        now = kaggle.model_version(reference) or 0
        return (True, "ready") if now >= version else (None, "not ready yet")

    kaggle.wait(reference, poll, POLL_SECONDS, MAX_PROCESSING)
    return sent


def wait_until_ready(kaggle: Kaggle, reference: str, version: int, save: Callable[[SentFiles | None], None]) -> None:
    """Wait until a version of a dataset, or a later one, is ready."""

    def poll() -> tuple[bool | None, str]:
        found = kaggle.dataset_status(reference) or DatasetStatus("not there yet", 0)
        if found.status in BROKEN:
            save(None)
            raise InputError(f"{reference}: its processing {found.status}: run the same command to send it again")
        if found.status != "ready":
            return None, found.status
        if 0 < found.version < version:
            return None, f"ready, but still version {found.version}"
        return True, found.status

    kaggle.wait(reference, poll, POLL_SECONDS, MAX_PROCESSING)
