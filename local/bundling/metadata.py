"""Check kernel-metadata.json, fill in its owner, and write the dataset's metadata from it.

The rules are those of Kaggle's client and server. The server applies some of them only after the push.
"""

import re
from pathlib import Path

from slugify import slugify

from kernel.inputs import InputError
from local.base.files import read_json, write_json

OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*")
REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[a-z0-9][a-z0-9-]{4,}")  # owner/slug
COMPETITION = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*")  # a slug; those of the first competitions have capitals
PLACEHOLDER = "your-kaggle-username"  # the owner in the repository's file; replaced by the owner of the credentials
# A T4 machine has two T4; the others are open to some competitions only. Kaggle accepts the retired P100, too, on which
# the torch of its image fails.
MACHINES = (
    *("NvidiaTeslaT4", "NvidiaTeslaT4Highmem", "NvidiaL4", "NvidiaL4X1", "NvidiaTeslaA100", "NvidiaH100"),
    "NvidiaRtxPro6000",
)
KERNEL_METADATA, DATASET_METADATA = "kernel-metadata.json", "dataset-metadata.json"


def read_kernel_metadata(path: Path) -> dict:
    """Read and check kernel-metadata.json.

    Raises:
        InputError: the file breaks a rule; the message gives the key and what it must be.
    """
    metadata = read_json(path)

    def need(is_met: bool, key: str, rule: str) -> None:
        if not is_met:
            raise InputError(f"{path}: {key} is {metadata.get(key)!r}: it must be {rule}")

    reference, title = str(metadata.get("id", "")), str(metadata.get("title", ""))
    need(bool(REFERENCE.fullmatch(reference)), "id", "owner/slug, with a slug of at least 5 of a-z, 0-9 and -")
    need(5 <= len(title) <= 50, "title", "5 to 50 characters long")
    slug = reference.partition("/")[2]
    need(slugify(title) == slug, "title", f"a title with the slug of id, {slug!r}; it has {slugify(title)!r}")
    need(metadata.get("code_file") == "build/kernel.py", "code_file", "'build/kernel.py', which bundle.py writes")
    need(metadata.get("language") == "python", "language", "'python'")
    need(metadata.get("kernel_type") == "script", "kernel_type", "'script'")
    need(metadata.get("is_private") is True, "is_private", "true: local/publish.py --public publishes")
    need(metadata.get("enable_gpu") is True, "enable_gpu", "true")
    need(metadata.get("enable_internet") is False, "enable_internet", "false; without the key it would be on")
    machine = metadata.get("machine_shape", MACHINES[0])
    need(
        machine in MACHINES, "machine_shape", f"{MACHINES[0]}, which is two T4, or another of {', '.join(MACHINES[1:])}"
    )
    datasets, competitions = metadata.get("dataset_sources"), metadata.get("competition_sources")
    is_list = isinstance(datasets, list) and bool(datasets) and all(REFERENCE.fullmatch(str(name)) for name in datasets)
    need(is_list, "dataset_sources", "a list of owner/slug, the weights first")
    slug = datasets[0].partition("/")[2]
    need(6 <= len(slug) <= 50, "dataset_sources", "a list whose first slug has 6 to 50 letters")
    is_named = isinstance(competitions, list) and bool(competitions)
    is_named = is_named and all(isinstance(name, str) and COMPETITION.fullmatch(name) for name in competitions)
    rule = "a list of the competition's slug, the last part of its URL, such as 'fungi-clef-2025'"
    need(is_named, "competition_sources", f"{rule}: letters, digits and hyphens")
    return metadata


def with_owner(metadata: dict, owner: str | None) -> dict:
    """Kernel metadata with a Kaggle name in place of PLACEHOLDER; another owner is left as it is, and so is
    the placeholder where no name is known.

    Raises:
        InputError: `owner` cannot be a Kaggle name.
    """
    if owner and not OWNER.fullmatch(owner):
        raise InputError(f"{owner!r} is not a Kaggle name: check KAGGLE_USERNAME, and the username in kaggle.json")

    def fill_in(reference: str) -> str:
        current, _, slug = reference.partition("/")
        return f"{owner}/{slug}" if owner and current == PLACEHOLDER else reference

    return {
        **metadata,
        "id": fill_in(metadata["id"]),
        "dataset_sources": [fill_in(reference) for reference in metadata["dataset_sources"]],
    }


def has_owner(metadata: dict) -> bool:
    """Whether every owner in kernel metadata is known."""
    references = [metadata["id"], *metadata["dataset_sources"]]
    return all(reference.partition("/")[0] != PLACEHOLDER for reference in references)


def dataset_metadata(metadata: dict) -> dict:
    """dataset-metadata.json for the weights: the first of the kernel's dataset sources."""
    reference = metadata["dataset_sources"][0]
    title = reference.partition("/")[2].replace("-", " ").capitalize()
    return {"title": title, "id": reference, "licenses": [{"name": "other"}]}


def write_metadata(build: Path, metadata: dict) -> None:
    """Write the files that Kaggle's client reads: kernel-metadata.json, and dataset-metadata.json for the weights."""
    write_json({**metadata, "code_file": "kernel.py"}, build / KERNEL_METADATA)
    write_json(dataset_metadata(metadata), build / "weights" / DATASET_METADATA)
