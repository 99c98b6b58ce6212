"""What this project asks of Kaggle, through its own client. Called by all that talks to Kaggle.

Importing this module imports the client, which signs in immediately: import it only when something is to be sent.
"""

import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from kagglesdk.competitions.types.competition_api_service import ApiGetCompetitionRequest
from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelRequest
from requests import RequestException

from kernel.inputs import InputError, shorten
from kernel.progress import clock_time
from local.base.console import say
from local.base.files import write_json
from local.publishing.credentials import TOKENS
from local.publishing.strict_api import (
    MODEL_METADATA,
    Interrupted,
    StrictApi,
    as_utf8,
    explain,
    get_retry_after,
    in_short,
    silently,
)

# Kaggle's list of licences for models has none for "not said", so the one that permits least.
MODEL_LICENCE = "Attribution-NonCommercial-NoDerivatives 4.0 International (CC BY-NC-ND 4.0)"
ATTEMPTS = 6
FIRST_DELAY, MAX_DELAY = 2.0, 120.0  # seconds between attempts; each delay is twice the one before
REPEAT_LINE = 600  # seconds after which an unchanged state is printed again, if the output is not a terminal
AGAIN_LATER = "run the same command again later"
MAX_SESSION, MAX_QUEUE = 12 * 3600 - 60, 24 * 3600  # seconds that a session may run; that one may wait to start
LIVE = ("QUEUED", "RUNNING")  # states of a run that is not over
LATEST = 10  # kernels that are asked whether they run; each costs a request
WHEN_BUSY = "wait until a session ends, stop one at https://www.kaggle.com/code, or give --wait"
DONE = re.compile(r"^done: .* views, ([0-9.]+) s, ", re.MULTILINE)  # the last line of the kernel
ALL_RUN = re.compile("maximum batch|session count|quota", re.IGNORECASE)  # of the refusals that pass


@dataclass(frozen=True)
class Clock:
    """The time, in seconds. Tests use one that does not wait."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class DatasetStatus(NamedTuple):
    """The status of a dataset, such as "ready", and the number of its current version."""

    status: str
    version: int


class KernelVersion(NamedTuple):
    """The current version of a kernel: its number, its script, and whether it runs on a GPU."""

    number: int
    script: str
    uses_gpu: bool

    def has_script(self, text: str) -> bool:
        """Whether this is its script, apart from line ends."""
        return self.script.strip().splitlines() == text.strip().splitlines()


class GpuQuota(NamedTuple):
    """The GPU time of this week in seconds: what is left, what is allowed; and when it is renewed, in words."""

    left: float
    allowed: float
    renewed: str

    def __str__(self) -> str:
        hours = f"{self.left / 3600:.1f} of {self.allowed / 3600:.0f} hours of GPU time"
        return f"{hours} are left, renewed {self.renewed}"


class NotFound(InputError):
    """Kaggle does not have it, or does not show it to this user."""


class Unavailable(InputError):
    """Kaggle did not answer, or answered with an error that passes."""


class Busy(InputError):
    """As many sessions run as Kaggle permits at once, or the week's quota is spent."""


class Kaggle:
    """A signed-in user. Requests that fail for a temporary reason are repeated; other failures say what to do.

    Attributes:
        name: the user's name on Kaggle.
    """

    def __init__(self, source: str, clock: Clock = Clock(), attempts: int = ATTEMPTS):
        """Sign in.

        Args:
            source: where the credentials are, for messages.
            attempts: of a request that fails for a temporary reason.

        Raises:
            InputError: Kaggle does not accept the credentials.
        """
        self.api, self.clock, self.source, self.attempts = StrictApi(), clock, source, attempts
        self.is_quiet = not sys.stderr.isatty()
        try:
            self.call("signing in", self.api.authenticate)
        except SystemExit as stop:  # after a page of the client's own advice
            raise self._unauthorized() from stop
        self.name = self.api.get_config_value("username")

    def call(
        self,
        what: str,
        function: Callable,
        *args: Any,
        forbidden: str | None = "",
        attempts: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call a function of the client; repeat it after network failures and the status codes 408, 429 and 5xx.

        Args:
            what: description for messages, such as "sending the weights".
            forbidden: what to do when Kaggle answers 403; None if 403, like 404, means that it does not exist.
            attempts: None for the user's.

        Returns:
            What the function returns.

        Raises:
            NotFound: it does not exist.
            Unavailable: a temporary failure lasted for all attempts.
            InputError: any other failure.
        """
        attempts = attempts or self.attempts
        for attempt in range(1, attempts + 1):
            try:
                return function(*args, **kwargs)
            except (RequestException, json.JSONDecodeError) as error:
                code, reason = explain(error)
                if code and code not in (408, 429) and code < 500:
                    raise self._permanent(what, code, reason, forbidden) from error
                if attempt < attempts:
                    delay = min(max(FIRST_DELAY * 2 ** (attempt - 1), get_retry_after(error)), MAX_DELAY)
                    say(f"{what}: {reason}; next attempt in {delay:.0f} s")
                    self.clock.sleep(delay)
            except KeyError as error:  # a state that this version of the client does not know
                raise InputError(f"{what}: kaggle does not know {error}: pip install --upgrade kaggle") from error
            except ValueError as error:  # the client itself refuses something
                raise InputError(f"{what}: {in_short(error)}") from error
            except OSError as error:  # of a file; the client does not always say which one
                raise InputError(f"{what}: {shorten(error)}: check the disk and its permissions") from error
        times = f"{attempts} times, the last time with {reason}" if attempts > 1 else reason
        raise Unavailable(f"{what} failed {times}: {AGAIN_LATER}")

    def _permanent(self, what: str, code: int, reason: str, forbidden: str | None) -> InputError:
        """The error for a status code that no repetition changes."""
        if code == 401:
            return self._unauthorized()
        if code == 404 or (code == 403 and forbidden is None):
            return NotFound(f"{what}: Kaggle does not find it ({reason})")
        if code == 412:
            return Busy(f"{what}: Kaggle cannot do it now ({reason}): {WHEN_BUSY}")
        if code == 403:
            return InputError(f"{what}: Kaggle does not permit it ({reason}){forbidden and ': ' + forbidden}")
        return InputError(f"{what}: Kaggle refuses it ({reason})")

    def wait(self, what: str, poll: Callable[[], tuple[Any, str]], interval: float, limit: float) -> Any:
        """Poll until there is an answer, and show the state.

        Args:
            poll: returns the answer, or None if there is none yet, and the state. What follows a comma in it is
                printed, but is no other state.
            interval: seconds between two polls.
            limit: seconds after which to give up.

        Raises:
            InputError: there was no answer within the limit.
        """
        started, printed_at, printed = self.clock.now(), 0.0, None
        while True:
            answer, state = poll()
            waited = self.clock.now() - started
            if sys.stdout.isatty():
                line = f"{what}: {state}, {clock_time(waited)}"
                print(f"\r{line:<79}", end="" if answer is None else "\n", flush=True)
            elif state.partition(",")[0] != printed or waited - printed_at >= REPEAT_LINE:
                say(f"{what}: {state}, {clock_time(waited)}")
                printed, printed_at = state.partition(",")[0], waited
            if answer is not None:
                return answer
            if waited >= limit:
                raise InputError(f"{what}: still {state} after {clock_time(waited)}: {AGAIN_LATER}")
            self.clock.sleep(interval)

    def dataset_status(self, reference: str) -> DatasetStatus | None:
        """The status of a dataset, or None if the user has none of that name."""
        what = f"asking for the dataset {reference}"
        try:
            answer = json.loads(self.call(what, self.api.dataset_status, reference, forbidden=None, format="json"))
        except NotFound:
            return None
        return DatasetStatus(answer["status"], answer["current_version_number"] or 0)

    def send_dataset(self, folder: Path, reference: str, before: int | None, note: str, is_public: bool) -> int:
        """Create a dataset from a folder, or add a version to it; returns the number of the version.

        What an earlier attempt has uploaded is not uploaded again.

        Args:
            before: the dataset's current version; None if there is no dataset yet.
        """
        what, quiet, path = f"sending {folder}", self.is_quiet, str(folder.resolve())  # uploads are resumed by path
        # Kaggle also answers 403 while it processes the version before.
        forbidden = f"a dataset needs a verified phone number; is {reference} yours, and its latest version ready?"

        def attempt() -> None:
            now = self.dataset_status(reference)
            if now and (before is None or now.version > before):
                return  # an earlier attempt arrived, only its answer was lost
            if now:
                result = self.api.dataset_create_version(path, version_notes=note, quiet=quiet, dir_mode="zip")
            else:
                result = self.api.dataset_create_new(path, public=is_public, quiet=quiet, dir_mode="zip")
            check_answer(what, result)

        self.call(what, attempt, forbidden=forbidden)
        return (before or 0) + 1

    def model_version(self, reference: str) -> int | None:
        """The current version of a model's variation, owner/model/framework/variation; None if there is no such one."""
        what = f"asking for the model {reference}"
        try:
            return self.call(what, self.api.model_instance_get, reference, forbidden=None).version_number
        except NotFound:
            return None

    def send_model(self, folder: Path, reference: str, before: int | None, note: str, is_public: bool) -> int:
        """Create a model's variation from a folder, and the model if need be, or add a version; returns its number.

        Args:
            reference: owner/model/framework/variation.
            before: the variation's current version; None if there is none yet.
        """
        what, quiet, path = f"sending {folder}", self.is_quiet, str(folder.resolve())
        owner, model, framework, variation = reference.split("/")
        if before is None:
            self.create_model(owner, model, is_public)

        def attempt() -> None:
            now = self.model_version(reference)
            if now is not None and (before is None or now > before):
                return  # an earlier attempt arrived, only its answer was lost
            if now is not None:
                result = self.api.model_instance_version_create(reference, path, note, quiet=quiet, dir_mode="zip")
            else:
                result = self.api.model_instance_create(path, quiet=quiet, dir_mode="zip")
            check_answer(what, result)

        described = {"ownerSlug": owner, "modelSlug": model, "instanceSlug": variation, "framework": framework}
        write_json({**described, "licenseName": MODEL_LICENCE, "overview": note}, folder / MODEL_METADATA)
        try:
            self.call(what, attempt, forbidden="a model needs a verified phone number")
        finally:
            (folder / MODEL_METADATA).unlink()
        return (before or 0) + 1

    def create_model(self, owner: str, model: str, is_public: bool) -> None:
        """Create a model without variations, unless there is one of this name."""
        what = f"creating the model {owner}/{model}"
        described = {"ownerSlug": owner, "slug": model, "title": model.replace("-", " ").capitalize()}
        described |= {"isPrivate": not is_public, "description": "Weights of a few-shot species classifier."}

        def attempt() -> None:
            with suppress(NotFound):
                self.call(what, self.api.model_get, f"{owner}/{model}", forbidden=None)
                return
            check_answer(what, self.api.model_create_new(folder))

        with tempfile.TemporaryDirectory() as folder:
            write_json(described, Path(folder) / "model-metadata.json")
            self.call(what, attempt, forbidden="a model needs a verified phone number")

    def push(self, metadata: dict, script: Path, session_limit: float) -> tuple[int, str]:
        """Push a kernel, which starts its run; returns the number of its version and its URL.

        A push that failed may have arrived all the same. So each further attempt first looks for a version that was not
        there before and has this script.

        Args:
            metadata: as in kernel-metadata.json; its code_file is ignored.
            session_limit: seconds after which Kaggle ends the run.

        Raises:
            Busy: no further session can run now.
            InputError: Kaggle refuses the kernel, or one of its sources.
        """
        kernel, text = metadata["id"], script.read_text(encoding="utf-8")
        forbidden = "a kernel needs a verified phone number, your own name as its owner, and the rules accepted"
        what, is_first = f"pushing {kernel}", True
        try:
            before: float = self.kernel_version(kernel).number
        except NotFound:
            before = 0
        except Unavailable:
            before = math.inf  # then a version that is found later proves nothing

        def attempt() -> tuple[int, str]:
            nonlocal is_first
            if not is_first:
                with suppress(NotFound):
                    now = self.kernel_version(kernel)
                    if now.number > before and now.has_script(text):
                        say(f"{what}: it had arrived, as version {now.number}")
                        return now.number, kernel_page(kernel)
            is_first = False
            result = self.api.kernels_push(folder, timeout=str(int(session_limit)))
            check_answer(what, result)
            if not result.version_number:
                where = result.url or "its page"
                raise InputError(f"{what}: Kaggle did not give a version number: look at {where}")
            return result.version_number, result.url

        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / script.name).write_text(text, encoding="utf-8")
            described = json.dumps({**metadata, "code_file": script.name})
            (Path(folder) / "kernel-metadata.json").write_text(described, encoding="utf-8")
            return self.call(what, attempt, forbidden=forbidden)

    def kernel_version(self, reference: str) -> KernelVersion:
        """The current version of a kernel.

        Raises:
            NotFound: the user has none of that name.
        """
        request = ApiGetKernelRequest()
        request.user_name, _, request.kernel_slug = reference.partition("/")

        def request_kernel() -> Any:
            with self.api.build_kaggle_client() as client:
                return client.kernels.kernels_api_client.get_kernel(request)

        answer = self.call(f"asking for the kernel {reference}", request_kernel, forbidden=None)
        found, script = answer.metadata, answer.blob.source if answer.blob else ""
        uses_gpu = found.enable_gpu or found.machine_shape.startswith("Nvidia")
        return KernelVersion(found.current_version_number, script, uses_gpu)

    def kernel_status(self, reference: str, attempts: int | None = None) -> tuple[str, str]:
        """The state of a run, such as RUNNING, and the message of its failure.

        Args:
            reference: owner/slug for the latest run of a kernel, owner/slug/version for that of a version.
        """
        answer = self.call(f"asking for {reference}", self.api.kernels_status, reference, attempts=attempts)
        return answer.status.name, answer.failure_message or ""

    def delete_kernel(self, reference: str) -> None:
        """Delete a kernel with all its versions and their output, which also ends the session that it runs.

        Kaggle cancels a session by an id that its public API does not tell.
        """
        with suppress(NotFound):
            what, delete = f"deleting {reference}", self.api.kernels_delete
            self.call(what, silently, delete, reference, no_confirm=True, forbidden="is it yours?")

    def log_events(self, reference: str) -> Iterator[str]:
        """The log of a run from its beginning, piece by piece, until it ends.

        Raises:
            Unavailable: there is no log yet, the connection was cut, or nothing came for `LOG_TIMEOUT`.
        """
        try:
            for event in self.api.kernels_logs_stream(reference):
                if event.get("data"):
                    yield as_utf8(str(event["data"]))
        except (RequestException, ValueError) as error:
            raise Unavailable(f"reading the log of {reference}: {in_short(error)}") from error

    def gpu_quota(self) -> GpuQuota | None:
        """The GPU time of this week; None if Kaggle does not say."""
        answer = self.call("asking for the GPU quota", self.api.quota_view)
        quota = answer.gpu_quota
        if quota is None or quota.total_time_allowed is None:
            return None
        used = quota.time_used.total_seconds() if quota.time_used else 0.0
        reserved = quota.time_reserved.total_seconds() if quota.time_reserved else 0.0
        allowed, renewed = quota.total_time_allowed.total_seconds(), answer.quota_refresh_time
        when = f"on {renewed:%Y-%m-%d at %H:%M} UTC" if renewed else "weekly"
        return GpuQuota(max(0.0, allowed - used - reserved), allowed, when)

    def running_kernels(self) -> list[str]:
        """Those of the user's kernels that run, or are queued to run, on a GPU; of the `LATEST` that ran last."""
        what = "asking for your kernels"
        listed = self.call(what, self.api.kernels_list, mine=True, sort_by="dateRun", page_size=LATEST) or ()
        now, running = datetime.now(UTC).replace(tzinfo=None), []
        for reference in [
            kernel.ref
            for kernel in listed
            if not kernel.last_run_time or (now - kernel.last_run_time).total_seconds() < MAX_QUEUE + MAX_SESSION
        ]:
            with suppress(NotFound):
                if self.kernel_status(reference)[0] in LIVE and self.kernel_version(reference).uses_gpu:
                    running.append(reference)
        return running

    def download_output(self, reference: str, name: str, folder: Path) -> tuple[Path | None, str]:
        """Download one file of a run's output, and the log; earlier ones are replaced.

        Args:
            reference: owner/slug, or owner/slug/version.

        Returns:
            The file's path, or None if the run wrote no such file; and the text of the log.
        """
        log = f"{reference.split('/')[1]}.log"
        folder.mkdir(parents=True, exist_ok=True)
        for old in (name, log):
            (folder / old).unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            self.download_matching(reference, rf"^{re.escape(name)}$", Path(partial))
            for path in Path(partial).iterdir():
                path.replace(folder / path.name)
        text = read_log(folder / log) if (folder / log).is_file() else ""
        return folder / name if (folder / name).is_file() else None, text

    def download_matching(self, reference: str, pattern: str, folder: Path) -> None:
        """Download the files of a run's output whose paths match a regular expression, and the log, into a folder."""
        what = f"downloading the output of {reference}"
        output = self.api.kernels_output
        # Kaggle also answers 403 for the address of a file when that has expired.
        self.call(what, output, reference, str(folder), file_pattern=pattern, force=True, forbidden=AGAIN_LATER)

    def competition(self, name: str) -> Any:
        """Kaggle's description of a competition: `user_has_entered`, `is_kernels_submissions_only` and more."""
        request = ApiGetCompetitionRequest()
        request.competition_name = name

        def request_competition() -> Any:
            with self.api.build_kaggle_client() as client:
                return client.competitions.competition_api_client.get_competition(request)

        return self.call(f"asking for the competition {name}", request_competition, forbidden=accept_rules(name))

    def submissions_left(self, competition: str) -> int:
        """How many submissions the user's team may still make today."""
        what, rules = f"asking how many submissions {competition} allows", accept_rules(competition)
        return self.call(what, self.api.competition_get_submission_limits, competition, forbidden=rules).num_allowed_now

    def find_submission(self, competition: str, description: str) -> Any | None:
        """The latest submission of the user's team with a description, if Kaggle lists it."""
        what, rules = f"asking for the submissions to {competition}", accept_rules(competition)
        answer = self.call(what, self.api.competition_submissions, competition, page_size=100, forbidden=rules)
        return next((one for one in answer or () if one and one.description == description), None)

    def submit(self, competition: str, description: str, output: Path, kernel: str | None, version: int) -> None:
        """Submit a kernel's version, or the file itself if `kernel` is None.

        The number of submissions per day is limited. So each attempt first asks Kaggle whether an earlier one arrived.
        """

        def attempt() -> None:
            if self.find_submission(competition, description):
                return
            if kernel:
                self.api.competition_submit_code(output.name, description, competition, kernel, version, quiet=True)
                return
            result = self.api.competition_submit(str(output), description, competition, quiet=self.is_quiet)
            if result.message == self.api.COMPETITION_SUBMIT_UPLOAD_FAILED_MESSAGE:
                raise Interrupted(f"{output} did not arrive")

        self.call(f"submitting to {competition}", attempt, forbidden=accept_rules(competition))

    def _unauthorized(self) -> InputError:
        return InputError(
            f"Kaggle does not accept the credentials in {self.source}: make a new token at {TOKENS} and put it there"
        )


def check_answer(what: str, answer: Any) -> None:
    """Check an answer of status 200, which may still contain an error, or sources that Kaggle ignored.

    Raises:
        Busy: no further session can run now.
        InputError: it does.
    """
    if ALL_RUN.search(answer.error or ""):
        raise Busy(f"{what}: Kaggle answers {shorten(answer.error)!r}: nothing was started; {WHEN_BUSY}")
    if answer.error or str(getattr(answer, "status", "ok") or "ok").lower() == "error":
        raise InputError(f"{what}: Kaggle answers {shorten(answer.error or 'error')!r}: nothing runs; fix it first")
    ignored = [
        f"{name.replace('_', ' ')} {', '.join(map(str, value))}"
        for name in dir(answer)
        if name.startswith("invalid_") and (value := getattr(answer, name))
    ]
    if ignored:
        raise InputError(f"{what}: Kaggle ignored {'; '.join(ignored)}: correct the names in kernel-metadata.json")


def read_log(path: Path) -> str:
    """The text of a kernel's log, which Kaggle stores as JSON pieces."""
    text = path.read_text(encoding="utf-8")
    try:
        return "".join(piece["data"] for piece in json.loads(text))
    except (ValueError, KeyError, TypeError):
        return text


def read_seconds(path: Path) -> float | None:
    """How long a kernel ran, from its log: the time of its last piece, or what its last line says; None if unknown."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    with suppress(ValueError, KeyError, TypeError):
        return max(float(piece["time"]) for piece in json.loads(text))
    found = DONE.search(text)
    return float(found[1]) if found else None


def kernel_page(reference: str) -> str:
    return f"https://www.kaggle.com/code/{reference}"


def accept_rules(competition: str) -> str:
    return f"accept the rules at https://www.kaggle.com/competitions/{competition}/rules"
