"""Send a bundle to Kaggle, and get its output and score back. Called by `local/publish.py`.

Each step can be resumed. `build`/kaggle/state.json stores what was done, and the rest is read from Kaggle. So the same
command, run again, continues where the last one stopped, and sends nothing twice.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kernel.inputs import InputError, shorten
from kernel.observations import TestTable
from kernel.submission import check_submission
from local.base.console import counted, say
from local.base.files import write_json
from local.publishing.client import DatasetStatus, Kaggle, accept_rules
from local.publishing.ledger import make_submission, save_submission
from local.publishing.preflight import Bundle

OUTPUT = "submission.csv"  # that the kernel writes
STATE = Path("kaggle", "state.json")
POLL_SECONDS = 30
MAX_PROCESSING, MAX_QUEUE, MAX_SCORING = 3600, 24 * 3600, 24 * 3600  # seconds to wait at most
BROKEN = ("failed", "deleted")  # states of a dataset that will not become ready
ENDED = ("COMPLETE", "ERROR", "CANCEL_REQUESTED", "CANCEL_ACKNOWLEDGED")
LOG_LINES = 20  # of a failed run's log that are printed
MIN_AGREEMENT = 0.5  # of the first guesses with the rehearsal's; half precision on a GPU gives nearly 1


@dataclass(frozen=True)
class SentWeights:
    """Weights that are on Kaggle: their dataset, the SHA-256 of their manifest, and the dataset's version."""

    dataset: str
    manifest: str
    version: int


@dataclass(frozen=True)
class SentKernel:
    """A kernel that was pushed: all that it was made from, and the version and URL that Kaggle gave it."""

    metadata: dict
    script: str
    weights: SentWeights
    version: int
    url: str


@dataclass(frozen=True)
class State:
    """What was sent already; None where it was not, or has to be sent again."""

    weights: SentWeights | None = None
    kernel: SentKernel | None = None


def read_state(path: Path) -> State:
    """The stored state; an empty one if there is none, or it cannot be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        weights, kernel = values["weights"], values["kernel"]
        return State(
            weights and SentWeights(**weights),
            kernel and SentKernel(**{**kernel, "weights": SentWeights(**kernel["weights"])}),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return State()


class Publication:
    """A bundle that is being published."""

    def __init__(self, bundle: Bundle, kaggle: Kaggle, is_public: bool = False):
        """Ask Kaggle for the competition, before anything is sent.

        Raises:
            InputError: there is no such competition.
        """
        self.bundle, self.kaggle, self.is_public = bundle, kaggle, is_public
        self.path = bundle.build / STATE
        self.state = read_state(self.path)
        self.competition = kaggle.competition(bundle.competition)
        if not self.competition.user_has_entered:
            say(f"Kaggle does not list you in {bundle.competition}: {accept_rules(bundle.competition)}")

    def send_weights(self) -> SentWeights:
        """Upload the weights, unless Kaggle has them already, and wait until they are processed.

        Raises:
            InputError: they cannot be sent, or are not ready in time.
        """
        dataset, manifest, sent = self.bundle.dataset, self.bundle.record.bundle.manifest, self.state.weights
        current = self.kaggle.dataset_status(dataset)
        is_usable = current is not None and current.status not in BROKEN
        is_same = sent is not None and (sent.dataset, sent.manifest) == (dataset, manifest)
        # A version newer than the stored one was made by somebody else, and may contain anything.
        if is_usable and is_same and current.version <= sent.version:
            say(f"{dataset}: version {sent.version} has these weights already")
        else:
            if is_usable:
                self._wait_for_dataset(current.version)  # Kaggle refuses a version while it processes another
            before = self.kaggle.dataset_status(dataset).version if current else None
            note = f"manifest {manifest}, runs {', '.join(self.bundle.runs)}"
            version = self.kaggle.send_dataset(self.bundle.weights, dataset, before, note, self.is_public)
            sent = SentWeights(dataset, manifest, version)
            self._save(weights=sent)
            say(f"{dataset}: version {version} sent")
        self._wait_for_dataset(sent.version)
        return sent

    def push_kernel(self, weights: SentWeights) -> SentKernel:
        """Push the kernel, which starts its run, unless this version was pushed already.

        Raises:
            InputError: Kaggle refuses the kernel, or one of its sources.
        """
        metadata = {**self.bundle.metadata, "is_private": not self.is_public}
        script, pushed = self.bundle.record.bundle.kernel, self.state.kernel
        if pushed and (pushed.metadata, pushed.script, pushed.weights) == (metadata, script, weights):
            say(f"{metadata['id']}: version {pushed.version} is this script already, {pushed.url}")
            return pushed
        version, url = self.kaggle.push(metadata, self.bundle.script)
        pushed = SentKernel(metadata, script, weights, version, url)
        self._save(kernel=pushed)
        say(f"{metadata['id']}: version {version} pushed, {url}")
        self.kaggle.clock.sleep(POLL_SECONDS)  # for a moment, Kaggle's latest run is still the one before
        return pushed

    def collect_output(self, version: int) -> Path:
        """Wait for the run, download its log and its CSV, and check the CSV; returns the CSV's path.

        Raises:
            InputError: the run failed, or its output does not fit the rehearsal.
        """
        what = f"{self.bundle.metadata['id']}, version {version}"
        log = self._wait_for_run(what)
        output = self.path.parent / OUTPUT
        if self.bundle.record.bundle.manifest not in log:
            raise InputError(f"{what}: the log is of a run with other weights: run the same command again in a minute")
        check_submission(output, self.bundle.table, self.bundle.manifest.class_ids)
        agreement = compute_agreement(self.bundle.rehearsed, output, self.bundle.table)
        rows = counted(len(self.bundle.table.observations), "row")
        say(f"{output}: {rows}, {agreement:.1%} with the same first guess as in the rehearsal")
        if agreement < MIN_AGREEMENT:
            raise InputError(
                f"{output} has only {agreement:.1%} of the first guesses in common with {self.bundle.rehearsed}: "
                "compare both logs, and rehearse again with the competition's time limit"
            )
        return output

    def _wait_for_run(self, what: str) -> str:
        """Wait for the run, and download its output; returns its log."""
        kernel = self.bundle.metadata["id"]

        def poll() -> tuple[tuple[str, str] | None, str]:
            state, failure = self.kaggle.kernel_status(kernel)
            return (state, failure) if state in ENDED else None, state.lower()

        limit = MAX_QUEUE + self.bundle.manifest.competition.time_limit
        state, failure = self.kaggle.wait(what, poll, POLL_SECONDS, limit)
        output, log = self.kaggle.download_output(kernel, OUTPUT, self.path.parent)
        is_complete = state == "COMPLETE" and output is not None
        for line in [line for line in log.splitlines() if line.strip()][-1 if is_complete else -LOG_LINES :]:
            say(f"  | {line}")
        if not is_complete:
            self._save(kernel=None)  # so that the next command pushes it again
            reason = f"ended with {state.lower()}" if state != "COMPLETE" else f"wrote no {OUTPUT}"
            raise InputError(f"{what} {reason}{failure and f' ({failure})'}: see its log in {self.path.parent}")
        return log

    def submit(self, output: Path, version: int, ledger: Path) -> None:
        """Submit the kernel, or the CSV if the competition takes CSV files; wait for the score; update the ledger.

        Raises:
            InputError: no submission is left today, or Kaggle refuses or cannot score this one.
        """
        name, kernel = self.bundle.competition, self.bundle.metadata["id"]
        submission = make_submission(self.bundle, version)
        # The submission is found again by its description.
        description = (
            f"{shorten(submission.runs, 100)}, {kernel} version {version}, manifest {submission.manifest[:16]}"
        )
        if not self.kaggle.find_submission(name, description):
            left = self.kaggle.submissions_left(name)
            if left < 1:
                raise InputError(f"{name} allows no more submissions today: run the same command after midnight UTC")
            say(f"{name}: {counted(left, 'submission')} left today, this one included")
            takes_kernels = self.competition.is_kernels_submissions_only
            self.kaggle.submit(name, description, output, kernel if takes_kernels else None, version)
        save_submission(submission, ledger)

        def poll() -> tuple[object | None, str]:
            found = self.kaggle.find_submission(name, description)
            state = found.status.name.lower() if found else "not listed yet"
            return found if state in ("complete", "error") else None, state

        scored = self.kaggle.wait(f"submission to {name}", poll, POLL_SECONDS, MAX_SCORING)
        status, public, private = scored.status.name.lower(), scored.public_score or "", scored.private_score or ""
        save_submission(replace(submission, status=status, public=public, private=private), ledger)
        if status != "complete":
            self._save(kernel=None)
            reason = scored.error_description or "Kaggle gives no reason"
            raise InputError(f"{name} could not score version {version} ({reason}): fix it, then bundle again")
        say(f"{name}: public score {public or 'not shown'}, private score {private or 'not shown'}")

    def _wait_for_dataset(self, version: int) -> None:
        """Wait until a version of the weights, or a later one, is ready."""
        dataset = self.bundle.dataset

        def poll() -> tuple[bool | None, str]:
            found = self.kaggle.dataset_status(dataset) or DatasetStatus("not there yet", 0)
            if found.status in BROKEN:
                self._save(weights=None)
                raise InputError(f"{dataset}: its processing {found.status}: run the same command to send it again")
            if found.status != "ready":
                return None, found.status
            if 0 < found.version < version:
                return None, f"ready, but still version {found.version}"
            return True, found.status

        self.kaggle.wait(dataset, poll, POLL_SECONDS, MAX_PROCESSING)

    def _save(self, **changes: object) -> None:
        self.state = replace(self.state, **changes)
        write_json(asdict(self.state), self.path)


def compute_agreement(rehearsed: Path, returned: Path, table: TestTable) -> float:
    """The fraction of observations for which two submissions of the same table have the same first guess."""
    firsts = [[answer[0] for _, answer in table.competition.read_submission(path)] for path in (rehearsed, returned)]
    return sum(a == b for a, b in zip(*firsts, strict=True)) / len(table.observations)
