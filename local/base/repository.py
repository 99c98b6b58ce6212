"""Which code made a file: the commit of this repository, and the versions of the packages."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "timm", "numpy", "pandas", "pillow", "scikit-learn", "safetensors")  # what computes


def versions() -> dict[str, str]:
    """The versions of Python and of PACKAGES."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def commit(*parts: str) -> str:
    """The current commit, marked if these folders have changed since; "unknown" without a working git.

    Args:
        parts: folders of the repository; none stands for `kernel` and `local`, all that computes anything.
    """
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    options = {"capture_output": True, "text": True, "errors": "replace", "timeout": 60}
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], **options)
        changed = subprocess.run([*git, "status", "--porcelain", "--", *(parts or ("kernel", "local"))], **options)
    except (OSError, subprocess.SubprocessError):  # no git on PATH, or one that does not answer
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + (" with changes" if changed.returncode or changed.stdout.strip() else "")
