"""The script that is pushed to Kaggle: it finds the kit, and calls on_kaggle.py. Called by training.py."""

import pprint
from dataclasses import fields

from local.base.repository import KIT_FILE
from local.remote.kit import KIT, Kit
from local.remote.on_kaggle import Plan

SCRIPT = '''"""Train a run as local/train.py does at home, and pack its folder.

`local/train.py --on kaggle` pushed this, waits for it, and puts the run folder in place at home.
The code is that of commit {kit.commit}.
"""

import json
import sys
import tempfile
import zipfile
from pathlib import Path

OPTIONS = dict(zip(sys.argv[1::2], sys.argv[2::2]))
INPUT, WORKING = Path(OPTIONS.get("--input", "/kaggle/input")), Path(OPTIONS.get("--working", "/kaggle/working"))
KIT, DIGEST = {reference!r}, {kit.digest!r}


def find(name):
    """A file of the kit's dataset, wherever Kaggle mounts it; it unpacks a zip, or does not."""
    mounts = INPUT / "datasets" / KIT, INPUT / KIT.partition("/")[2]
    return next((path for mount in mounts for path in mount.rglob(name)), None)


archive, described = find({archive!r}), find({described!r})
if archive and not described:
    zipfile.ZipFile(archive).extractall(folder := tempfile.mkdtemp())
    described = Path(folder, {described!r})
if not described or json.loads(described.read_text())["digest"] != DIGEST:
    sys.exit(f"error: the dataset {{KIT}} is not mounted, or is another version of the kit: push again")
sys.path.insert(0, str(described.parent))

from local.remote.on_kaggle import LocalEncoder, Plan, train

train(
    Plan(
{plan_lines}
    ),
    INPUT,
    WORKING,
)
'''


def write_script(plan: Plan, kit: Kit, reference: str) -> str:
    """The script for a plan; `reference` is owner/slug of the kit's dataset."""
    lines = [
        f"{one.name}={pprint.pformat(value, width=100, sort_dicts=False)},"
        for one in fields(Plan)
        if (value := getattr(plan, one.name)) not in ("", None)
    ]
    indented = "\n".join(" " * 8 + line for line in "\n".join(lines).splitlines())
    return SCRIPT.format(plan=plan, kit=kit, reference=reference, archive=KIT, described=KIT_FILE, plan_lines=indented)
