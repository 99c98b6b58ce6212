"""The way of a bundle to Kaggle and back, in steps that each can be resumed. Called by `local/publish.py`.

What is done is kept in `build`/kaggle/state.json, and what only Kaggle knows is asked: so the same command, run again,
goes on where the last one stopped, and sends nothing twice.
"""

import json
from pathlib import Path

from kernel.inputs import InputError, shorten
from kernel.observations import TestTable
from kernel.submission import check_submission
from local.base.console import counted, say
from local.base.files import write_json
from local.publishing.client import Kaggle, accept_rules
from local.publishing.ledger import note, row_of
from local.publishing.preflight import Bundle

OUTPUT = "submission.csv"  # that the kernel leaves
STATE = Path("kaggle", "state.json")
PROCESSED, RUN, SCORED = (30, 3600), (30, 24 * 3600), (30, 24 * 3600)  # seconds between questions, and to wait at most
BROKEN = ("failed", "deleted")  # states of a dataset that will not become ready
ENDED = ("COMPLETE", "ERROR", "CANCEL_REQUESTED", "CANCEL_ACKNOWLEDGED")
TAIL = 20  # lines of a failed run's log that are shown
LEAST_AGREEMENT = 0.5  # share of first guesses that a GPU in half precision gives as the rehearsal did; it is near 1


class Publication:
    """A bundle on its way.

    Attributes:
        state: "weights" and "kernel", each with what was sent and the version that Kaggle gave it.
    """

    def __init__(self, bundle: Bundle, kaggle: Kaggle, is_public: bool = False):
        """Ask what Kaggle can refuse before anything is sent.

        Raises:
            InputError: there is no such competition.
        """
        self.bundle, self.kaggle, self.is_public = bundle, kaggle, is_public
        self.path = bundle.build / STATE
        try:
            self.state = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.state = {}
        self.competition = kaggle.competition(bundle.competition)
        if not self.competition.user_has_entered:
            say(f"Kaggle does not list you in {bundle.competition}: {accept_rules(bundle.competition)}")

    def deliver_weights(self) -> None:
        """Have the weights on Kaggle, processed; sent only where they are not there yet.

        Raises:
            InputError: they cannot be sent, or are not ready in time.
        """
        dataset, digest = self.bundle.dataset, self.bundle.digests["manifest"]
        found, sent = self.kaggle.dataset(dataset), self.state.get("weights", {})
        # A version beyond the one that was noted is somebody else's doing, and may hold anything.
        is_noted = (sent.get("dataset"), sent.get("manifest")) == (dataset, digest)
        if found and found[0] not in BROKEN and is_noted and found[1] <= sent["version"]:
            say(f"{dataset}: version {sent['version']} holds these weights already")
        else:
            if found and found[0] not in BROKEN:
                self._wait_for_dataset(found[1])  # Kaggle refuses a version while it processes another
            before = found and self.kaggle.dataset(dataset)[1]
            description = f"manifest {digest}, runs {', '.join(self.bundle.runs)}"
            version = self.kaggle.send_dataset(self.bundle.weights, dataset, before, description, self.is_public)
            self._note("weights", {"dataset": dataset, "manifest": digest, "version": version})
            say(f"{dataset}: version {version} sent")
        self._wait_for_dataset(self.state["weights"]["version"])

    def push_kernel(self) -> None:
        """Have the kernel running on Kaggle with these weights; pushed only where it is not yet.

        Raises:
            InputError: Kaggle refuses it, or any of what it attaches.
        """
        metadata = {**self.bundle.metadata, "is_private": not self.is_public}
        wanted = {"metadata": metadata, "script": self.bundle.digests["kernel"], "weights": self.state["weights"]}
        pushed = self.state.get("kernel", {})
        if pushed.get("sent") == wanted:
            say(f"{metadata['id']}: version {pushed['version']} is this one already, {pushed['url']}")
            return
        version, url = self.kaggle.push(metadata, self.bundle.script)
        self._note("kernel", {"sent": wanted, "version": version, "url": url})
        say(f"{metadata['id']}: version {version} pushed, {url}")
        self.kaggle.clock.sleep(RUN[0])  # Kaggle is asked for the latest run, which a moment ago was the one before

    def collect_output(self) -> Path:
        """Wait for the run, bring its log and its CSV, and check the CSV: its path.

        Raises:
            InputError: the run failed, or what it left is not what the rehearsal promises.
        """
        kernel, version = self.bundle.metadata["id"], self.state["kernel"]["version"]
        what = f"{kernel}, version {version}"

        def ask() -> tuple[tuple[str, str] | None, str]:
            state, failure = self.kaggle.kernel_status(kernel)
            return (state, failure) if state in ENDED else None, state.lower()

        every, queue = RUN
        state, failure = self.kaggle.wait(what, ask, every, queue + self.bundle.manifest.competition.time_limit)
        output, log = self.kaggle.download_output(kernel, OUTPUT, self.path.parent)
        lines = [line for line in log.splitlines() if line.strip()]
        if state != "COMPLETE" or output is None:
            for line in lines[-TAIL:]:
                say(f"  | {line}")
            self._note("kernel", None)  # so that the next command pushes it again
            reason = f"ended with {state.lower()}" if state != "COMPLETE" else f"left no {OUTPUT}"
            raise InputError(f"{what} {reason}{failure and f' ({failure})'}: see its log in {self.path.parent}")
        for line in lines[-1:]:
            say(f"  | {line}")
        if self.bundle.digests["manifest"] not in log:
            raise InputError(f"{what}: the log is of a run with other weights: run the same command again in a minute")
        check_submission(output, self.bundle.table, self.bundle.manifest.class_ids)
        share = agreement(self.bundle.rehearsed, output, self.bundle.table)
        rows = counted(len(self.bundle.table.observations), "row")
        say(f"{output}: {rows}, {share:.1%} with the rehearsal's first guess")
        if share < LEAST_AGREEMENT:
            raise InputError(
                f"{output} agrees with {self.bundle.rehearsed} in {share:.1%} of the first guesses alone: "
                "compare both logs, and rehearse again with the competition's time limit"
            )
        return output

    def submit(self, output: Path, ledger: Path) -> None:
        """Submit the kernel, or the CSV where the competition takes these, wait for the score, and keep the ledger.

        Raises:
            InputError: no submission is left today, Kaggle refuses it, or cannot score it.
        """
        name, version = self.bundle.competition, self.state["kernel"]["version"]
        row = row_of(self.bundle, version)
        kernel, made_of = self.bundle.metadata["id"], shorten(row["runs"], 100)
        description = f"{made_of}, {kernel} version {version}, manifest {row['manifest'][:16]}"  # found again by it
        if not self._find(description):
            left = self.kaggle.submissions_left(name)
            if left < 1:
                raise InputError(f"{name} allows no further submission today: run the same command after midnight UTC")
            say(f"{name}: {counted(left, 'submission')} left today, one of which is made now")
            takes_kernels = self.competition.is_kernels_submissions_only
            self.kaggle.submit(name, description, output, kernel if takes_kernels else None, version)
        note(row, ledger)

        def ask() -> tuple[object | None, str]:
            found = self._find(description)
            state = found.status.name.lower() if found else "not listed yet"
            return found if state in ("complete", "error") else None, state

        scored = self.kaggle.wait(f"submission to {name}", ask, *SCORED)
        scores = {"public": scored.public_score or "", "private": scored.private_score or ""}
        note({**row, "status": scored.status.name.lower(), **scores}, ledger)
        if scored.status.name != "COMPLETE":
            self._note("kernel", None)
            reason = scored.error_description or "no reason given"
            raise InputError(f"{name} could not score version {version} ({reason}): mend that, then bundle again")
        say(f"{name}: public score {scores['public'] or 'not shown'}, private score {scores['private'] or 'not shown'}")

    def _find(self, description: str) -> object | None:
        found = self.kaggle.submissions(self.bundle.competition)
        return next((submission for submission in found if submission.description == description), None)

    def _wait_for_dataset(self, version: int) -> None:
        dataset = self.bundle.dataset

        def ask() -> tuple[bool | None, str]:
            status, current = self.kaggle.dataset(dataset) or ("not there yet", 0)
            if status in BROKEN:
                self._note("weights", None)
                raise InputError(f"{dataset}: Kaggle's processing {status}: run the same command to send it again")
            is_ready = status == "ready" and not 0 < current < version
            return is_ready or None, status if is_ready or status != "ready" else f"ready, but as version {current}"

        self.kaggle.wait(dataset, ask, *PROCESSED)

    def _note(self, key: str, value: dict | None) -> None:
        self.state = {**self.state, key: value} if value else {k: v for k, v in self.state.items() if k != key}
        write_json(self.state, self.path)


def agreement(rehearsed: Path, returned: Path, table: TestTable) -> float:
    """The share of observations for which two submissions over the same table have the same first guess."""
    firsts = [[answer[0] for _, answer in table.competition.read_submission(path)] for path in (rehearsed, returned)]
    return sum(a == b for a, b in zip(*firsts, strict=True)) / len(table.observations)
