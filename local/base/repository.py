"""Which code made a file: the commit of this repository, and the versions of the packages."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KIT_FILE = "kit.json"  # in a copy of this repository that has no git, on Kaggle: which commit it was made from
PACKAGES = ("torch", "timm", "numpy", "pandas", "pillow", "scikit-learn", "safetensors")  # what computes


def versions() -> dict[str, str]:
    """The versions of Python and of PACKAGES."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def commit(*parts: str) -> str:
    """The current commit, marked if these folders have changed since; "unknown" without a working git.

    Args:
        parts: folders of the repository; none stands for `kernel` and `local`, all that computes anything.
    """
    if (ROOT / KIT_FILE).is_file():
        return json.loads((ROOT / KIT_FILE).read_text(encoding="utf-8"))["commit"]
    git = ["git", "-C", str(ROOT)]
    options = {"capture_output": True, "text": True, "errors": "replace", "timeout": 60}
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], **options)
        changed = subprocess.run([*git, "status", "--porcelain", "--", *(parts or ("kernel", "local"))], **options)
    except (OSError, subprocess.SubprocessError):  # no git on PATH, or one that does not answer
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + (" with changes" if changed.returncode or changed.stdout.strip() else "")
