"""The record of a bundle's rehearsals, in its folder `rehearsal`: which bundle was rehearsed, and with what result.

`local/rehearse.py` writes it. `local/publish.py` reads it, and sends only a bundle that passed and was not changed
since.
"""

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from kernel.inputs import InputError, sha256
from kernel.manifest import MANIFEST
from local.base.files import write_json

RECORD = Path("rehearsal", "record.json")
PLAIN = Path("rehearsal", "plain", "submission.csv")  # of the scenario that predicts the whole test set
REHEARSE = "run python local/rehearse.py --data DIR"


@dataclass(frozen=True)
class BundleDigests:
    """SHA-256 of the two files that identify a bundle; the manifest contains the digests of all other files."""

    kernel: str
    manifest: str


@dataclass(frozen=True)
class ScenarioResult:
    """The result of one scenario.

    Attributes:
        seconds: total run time of the script.
        reason: why it failed or was skipped, or a summary of its success; one line.
    """

    name: str
    ok: bool
    seconds: float
    reason: str

    @property
    def is_skipped(self) -> bool:
        return self.reason.startswith("skipped: ")


@dataclass(frozen=True)
class RehearsalRecord:
    """All rehearsals of one bundle.

    Attributes:
        when: time of the latest rehearsal, as of `now`.
        scenarios: the latest result of each scenario, by name.
        submission: SHA-256 of the submission of the scenario `plain`; empty before it was run.
    """

    bundle: BundleDigests
    when: str = ""
    scenarios: dict[str, ScenarioResult] = field(default_factory=dict)
    submission: str = ""


def record_results(build: Path, results: list[ScenarioResult]) -> None:
    """Add results to the record of a bundle. The results of an earlier bundle in the same folder are dropped."""
    bundle, record = compute_digests(build), _load(build)
    if record is None or record.bundle != bundle:
        record = RehearsalRecord(bundle)
    scenarios = record.scenarios | {result.name: result for result in results}
    submission = record.submission
    if any(result.name == "plain" for result in results) and (build / PLAIN).is_file():
        submission = sha256(build / PLAIN)
    write_json(asdict(RehearsalRecord(bundle, now(), scenarios, submission)), build / RECORD)


def read_record(build: Path) -> RehearsalRecord:
    """The record of a bundle that passed all its scenarios, `plain` among them, and was not changed since.

    Raises:
        InputError: the bundle was not rehearsed, failed, or was changed after its rehearsal.
    """
    record = _load(build)
    if record is None:
        raise InputError(f"{build} has not been rehearsed: {REHEARSE}")
    if record.bundle != compute_digests(build):
        raise InputError(f"{build} was changed after its rehearsal of {record.when}: {REHEARSE}")
    failed = [name for name, result in record.scenarios.items() if not result.ok]
    if failed:
        raise InputError(f"the rehearsal of {record.when} failed in {', '.join(failed)}: fix it, then {REHEARSE}")
    if "plain" not in record.scenarios:
        names = ", ".join(record.scenarios)
        raise InputError(f"{build} was rehearsed in {names} only, which is not the whole test set: {REHEARSE}")
    if not (build / PLAIN).is_file() or sha256(build / PLAIN) != record.submission:
        raise InputError(f"{build / PLAIN} is not the submission of the rehearsal of {record.when}: {REHEARSE}")
    return record


def _load(build: Path) -> RehearsalRecord | None:
    """The record as written; None if there is none, or it cannot be read."""
    try:
        values = json.loads((build / RECORD).read_text(encoding="utf-8"))
        scenarios = {name: ScenarioResult(**result) for name, result in values["scenarios"].items()}
        return RehearsalRecord(
            BundleDigests(**values["bundle"]), values["when"], scenarios, values.get("submission", "")
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def check_bundle(build: Path) -> None:
    """Check that there is a bundle.

    Raises:
        InputError: its script or its manifest is missing.
    """
    for path in (build / "kernel.py", build / "weights" / MANIFEST):
        if not path.is_file():
            raise InputError(f"no bundle in {build}, {path} is missing: run python bundle.py runs/NAME first")


def compute_digests(build: Path) -> BundleDigests:
    """The digests of the bundle as it is now."""
    return BundleDigests(sha256(build / "kernel.py"), sha256(build / "weights" / MANIFEST))


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
