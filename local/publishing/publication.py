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
from local.base.files import write_json, write_text
from local.bundling.metadata import KERNEL_METADATA
from local.publishing.client import MAX_SESSION, Kaggle, NotFound, accept_rules, read_seconds
from local.publishing.ledger import make_submission, save_submission
from local.publishing.preflight import Bundle
from local.publishing.session import LAST_LINES, STOPPED, STUCK, Watch, start_session
from local.publishing.uploads import SentFiles, Upload, is_model, send

VARIATION = "pyTorch/weights"  # framework and variation of a model
OUTPUT = "submission.csv"  # that the kernel writes
STATE = Path("kaggle", "state.json")
POLL_SECONDS = 30
SUBMISSION_SECONDS = 600  # between two looks whether a submission is left
MAX_SCORING = 24 * 3600  # seconds to wait at most
SESSION_MARGIN = 600  # seconds that a session may take beyond the kernel's budget, for its start and its end
MIN_AGREEMENT = 0.5  # of the first guesses with the rehearsal's; half precision on a GPU gives nearly 1


@dataclass(frozen=True)
class SentKernel:
    """A kernel that was pushed: all that it was made from, and the version and URL that Kaggle gave it."""

    metadata: dict
    script: str
    weights: SentFiles
    version: int
    url: str


@dataclass(frozen=True)
class State:
    """What was sent already; None where it was not, or has to be sent again."""

    weights: SentFiles | None = None
    kernel: SentKernel | None = None


def read_state(path: Path) -> State:
    """The stored state; an empty one if there is none, or it cannot be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        weights, kernel = values["weights"], values["kernel"]
        return State(
            weights and SentFiles(**weights),
            kernel and SentKernel(**{**kernel, "weights": SentFiles(**kernel["weights"])}),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return State()


def attach(metadata: dict, weights: SentFiles) -> dict:
    """Kernel metadata that attach the weights; a model with its version instead of the dataset."""
    if not is_model(weights.reference):
        return metadata
    models = [*metadata.get("model_sources", ()), f"{weights.reference}/{weights.version}"]
    return {**metadata, "dataset_sources": metadata["dataset_sources"][1:], "model_sources": models}


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

    def send_weights(self, as_model: bool = False) -> SentFiles:
        """Upload the weights, unless Kaggle has them already, and wait until they are processed.

        Args:
            as_model: as a Kaggle Model instead of a dataset.

        Raises:
            InputError: they cannot be sent, or are not ready in time.
        """
        bundle, digest = self.bundle, self.bundle.record.bundle.manifest
        note = f"manifest {digest}, runs {', '.join(bundle.runs)}"
        reference = f"{bundle.dataset}/{VARIATION}" if as_model else bundle.dataset
        upload = Upload(bundle.weights, reference, digest, note, self.is_public)
        return send(self.kaggle, upload, self.state.weights, lambda sent: self._save(weights=sent))

    @property
    def session_limit(self) -> float:
        """Seconds after which Kaggle is to end the run: the kernel's budget and a margin."""
        return min(self.bundle.manifest.competition.time_limit + SESSION_MARGIN, MAX_SESSION)

    def push_kernel(self, weights: SentFiles, submits: bool, waits: bool) -> SentKernel:
        """Push the kernel, which starts its run, unless this version was pushed already.

        Args:
            submits: whether its output is to be submitted; then a submission must be left today.
            waits: wait until there is quota, a session can start and a submission is left.

        Raises:
            Busy: no session can start now.
            InputError: no submission is left, or Kaggle refuses the kernel or one of its sources.
        """
        metadata = {**attach(self.bundle.metadata, weights), "is_private": not self.is_public}
        write_json({**metadata, "code_file": "kernel.py"}, self.bundle.build / KERNEL_METADATA)
        script, pushed = self.bundle.record.bundle.kernel, self.state.kernel
        if pushed and (pushed.metadata, pushed.script, pushed.weights) == (metadata, script, weights):
            say(f"{metadata['id']}: version {pushed.version} is this script already, {pushed.url}")
            return pushed
        if submits:
            self._wait_for_submission(waits)
        version, url = start_session(
            self.kaggle, waits, lambda _: self.kaggle.push(metadata, self.bundle.script, self.session_limit)
        )
        pushed = SentKernel(metadata, script, weights, version, url)
        self._save(kernel=pushed)
        say(f"{metadata['id']}: version {version} pushed, {url}")
        return pushed

    def collect_output(self, version: int) -> Path:
        """Wait for the run, download its log and its CSV, and check the CSV; returns the CSV's path.

        Raises:
            InputError: the run failed, or its output does not fit the rehearsal.
        """
        what = f"{self.bundle.metadata['id']}, version {version}"
        log = self._wait_for_run(what, version)
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

    def _wait_for_run(self, what: str, version: int) -> str:
        """Wait for the run, and download its output; returns its log."""
        kernel = self.bundle.metadata["id"]
        # Earlier versions may have been submitted: a kernel with any is not deleted.
        watch = Watch(self.kaggle, kernel, version, self.session_limit, can_delete=version == 1)
        try:
            state, reason = watch.wait()
        except NotFound as gone:
            self._save(kernel=None)
            raise InputError(f"{gone}; the same command starts it again") from gone
        if state in (STUCK, STOPPED):
            self._save(kernel=None)
            write_text(
                "".join(f"{line}\n" for line in watch.lines), self.path.parent / f"{kernel.partition('/')[2]}.log"
            )
            raise InputError(f"{what}: {reason}; the same command starts it again")
        output, log = self.kaggle.download_output(watch.reference, OUTPUT, self.path.parent)
        is_complete = state == "COMPLETE" and output is not None
        if not watch.lines:  # the log did not come while it ran
            watch.show(watch.add(log)[-LAST_LINES:])
        if not is_complete:
            self._save(kernel=None)  # so that the next command pushes it again
            problem = f"ended with {state.lower()}" if state != "COMPLETE" else f"wrote no {OUTPUT}"
            raise InputError(f"{what} {problem}{reason and f' ({reason})'}: see its log in {self.path.parent}")
        return log

    def submit(self, output: Path, version: int, ledger: Path, waits: bool) -> None:
        """Submit the kernel, or the CSV if the competition takes CSV files; wait for the score; update the ledger.

        Raises:
            InputError: no submission is left today, or Kaggle refuses or cannot score this one.
        """
        name, kernel = self.bundle.competition, self.bundle.metadata["id"]
        log = self.path.parent / f"{kernel.partition('/')[2]}.log"
        submission = make_submission(self.bundle, version, read_seconds(log))
        # The submission is found again by its description.
        description = (
            f"{shorten(submission.runs, 100)}, {kernel} version {version}, manifest {submission.manifest[:16]}"
        )
        if not self.kaggle.find_submission(name, description):
            left = self._wait_for_submission(waits)
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

    def _wait_for_submission(self, waits: bool) -> int:
        """How many submissions are left today; waits for the first, or raises an InputError if there is none."""
        name = self.bundle.competition

        def poll() -> tuple[int | None, str]:
            left = self.kaggle.submissions_left(name)
            if left < 1 and not waits:
                raise InputError(
                    f"{name} allows no more submissions today: run the same command after midnight UTC, or give --wait"
                )
            return left or None, counted(left, "submission")

        left, _ = poll()
        return left or self.kaggle.wait(f"submissions left for {name}", poll, SUBMISSION_SECONDS, MAX_SCORING)

    def _save(self, **changes: object) -> None:
        self.state = replace(self.state, **changes)
        write_json(asdict(self.state), self.path)


def compute_agreement(rehearsed: Path, returned: Path, table: TestTable) -> float:
    """The fraction of observations for which two submissions of the same table have the same first guess."""
    firsts = [
        [next(iter(answer)) for _, answer in table.competition.read_submission(path)] for path in (rehearsed, returned)
    ]
    return sum(a == b for a, b in zip(*firsts, strict=True)) / len(table.observations)
