"""What git knows of this repository."""

import subprocess
from pathlib import Path


def commit(part: str = ".") -> str:
    """The repository's present commit, marked when a part of it has changed since; "unknown" where git cannot tell."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    options = {"capture_output": True, "text": True, "errors": "replace", "timeout": 60}
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], **options)
        changed = subprocess.run([*git, "status", "--porcelain", part], **options)
    except (OSError, subprocess.SubprocessError):  # no git on PATH, or one that does not answer
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + (" with changes" if changed.returncode or changed.stdout.strip() else "")
