"""The kit's own source as one zip: what runs on Kaggle is what is here. Called by training.py."""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

from local.base.repository import KIT_FILE, ROOT, commit

FOLDERS = ("kernel", "local")
SUFFIXES = (".py", ".toml", ".html", ".css", ".js")
KIT = "kit.zip"


@dataclass(frozen=True)
class Kit:
    """The kit's source.

    Attributes:
        files: all that is sent, by their paths in the repository.
        digest: SHA-256 of the names and contents of the files, and of the commit.
    """

    files: dict[str, Path]
    commit: str
    digest: str

    def write(self, folder: Path) -> None:
        """Write the zip; the same files give the same bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        contents = {name: path.read_bytes() for name, path in self.files.items()}
        contents[KIT_FILE] = json.dumps({"commit": self.commit, "digest": self.digest}).encode()
        with zipfile.ZipFile(folder / KIT, "w") as archive:
            for name, content in contents.items():
                archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)


def read_kit() -> Kit:
    """The source as it is now, with changes that are not committed."""
    files = {
        path.relative_to(ROOT).as_posix(): path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in SUFFIXES and path.is_file()
    }
    made_from = commit()
    digest = hashlib.sha256(made_from.encode())
    for name, path in files.items():
        digest.update(f"\n{name} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return Kit(files, made_from, digest.hexdigest())
