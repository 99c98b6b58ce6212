"""What a rehearsal leaves beside the bundle: of which bundle it was, and what came out.

Written by `local/rehearse.py`, read by `local/publishing/preflight.py`: only what was rehearsed as it
is now is sent to Kaggle.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

from kernel.inputs import InputError, sha256
from kernel.manifest import MANIFEST
from local.base.files import write_json

RECORD = Path("rehearsal", "record.json")
PLAIN = Path("rehearsal", "plain", "submission.csv")  # of the scenario that sees the whole test set


def write_record(build: Path, report: dict) -> None:
    """Keep the report of a rehearsal, as `rehearse` returns it, beside what other scenarios of this bundle gave."""
    try:
        record = json.loads((build / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    bundle = digests(build)
    if record.get("bundle") != bundle:
        record = {"bundle": bundle, "scenarios": {}}
    record["when"] = now()
    record["scenarios"] |= {result["name"]: result for result in report["scenarios"]}
    if (build / PLAIN).is_file() and any(result["name"] == "plain" for result in report["scenarios"]):
        record["submission"] = sha256(build / PLAIN)
        record["measured"] = {key: value for key, value in report.items() if key != "scenarios"}
    write_json(record, build / RECORD)


def read_record(build: Path) -> dict:
    """The record of a bundle that passed every scenario it was rehearsed in, `plain` among them, and is the same still.

    Raises:
        InputError: it did not, or is another one now.
    """
    again = "run python local/rehearse.py --data DIR"
    try:
        record = json.loads((build / RECORD).read_text(encoding="utf-8"))
        bundle, scenarios = record["bundle"], record["scenarios"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{build} has not been rehearsed: {again}") from error
    if bundle != digests(build):
        raise InputError(f"{build} was bundled again after its rehearsal of {record['when']}: {again}")
    failed = [name for name, result in scenarios.items() if not result["ok"]]
    if failed:
        raise InputError(f"the rehearsal of {record['when']} failed in {', '.join(failed)}: mend that, then {again}")
    if "plain" not in scenarios:
        raise InputError(f"{build} was rehearsed in {', '.join(scenarios)} alone, not over the whole test set: {again}")
    if not (build / PLAIN).is_file() or sha256(build / PLAIN) != record.get("submission"):
        raise InputError(f"{build / PLAIN} is not the submission of the rehearsal of {record['when']}: {again}")
    return record


def check_bundle(build: Path) -> None:
    """Check that there is a bundle.

    Raises:
        InputError: its script or its manifest is missing.
    """
    for path in (build / "kernel.py", build / "weights" / MANIFEST):
        if not path.is_file():
            raise InputError(f"no bundle in {build}, {path} is missing: run python bundle.py runs/NAME first")


def digests(build: Path) -> dict[str, str]:
    """SHA-256 of the two files that make a bundle this one; the manifest holds those of all others."""
    return {"kernel": sha256(build / "kernel.py"), "manifest": sha256(build / "weights" / MANIFEST)}


def now() -> str:
    """The time, as the records spell it: UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
