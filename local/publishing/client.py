"""Kaggle's own client, made strict: what it prints and forgets is an error here. Called by publication.py.

Importing this module imports the client, which signs in at once: so it is imported only when something is to be sent.
"""

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaggle.api.kaggle_api_extended import KaggleApi, ResumableUploadResult
from kagglesdk.competitions.types.competition_api_service import ApiGetCompetitionRequest
from requests import HTTPError, RequestException, Response
from requests.adapters import HTTPAdapter

from kernel.inputs import InputError, shorten
from local.base.console import counted, say
from local.publishing.preflight import DATASET_METADATA, TOKENS

ATTEMPTS = 6
FIRST_DELAY, LONGEST_DELAY = 2.0, 120.0  # seconds between attempts; each is twice the one before
SILENCE = 300.0  # seconds without a sign of life after which a connection is given up
TELL_EVERY = 600  # seconds between two lines of a wait in which nothing changes, where the output is no terminal


@dataclass(frozen=True)
class Clock:
    """How time is told and spent; tests bring another one."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class NotFound(InputError):
    """Kaggle knows no such thing, or shows it to others only."""


class Interrupted(RequestException):
    """An upload that is not complete; what has arrived need not be sent again."""


def impatient(send: Callable[..., Response]) -> Callable[..., Response]:
    """Give every request a timeout: the client has none, and would wait for ever for a connection that has died."""

    def limited(adapter: HTTPAdapter, *arguments: Any, timeout: Any = None, **named: Any) -> Response:
        return send(adapter, *arguments, timeout=timeout or SILENCE, **named)

    return limited


HTTPAdapter.send = impatient(HTTPAdapter.send)  # the client makes sessions where nobody else can reach them


class StrictApi(KaggleApi):
    """Makes an incomplete upload an error that can be tried again.

    kaggle 2.2.4 leaves a file that did not arrive out of the dataset and says so only if not quiet; 2.2.5 stops at it
    with a ValueError, as for a mistake of the user.
    """

    def __init__(self) -> None:
        super().__init__()
        self.incomplete: dict[str, Any] = {}  # the last result of each upload that has not ended

    def upload_complete(self, path, url, quiet, resume=False):
        result = super().upload_complete(path, url, quiet, resume)
        self.incomplete[path] = result
        if result == ResumableUploadResult.COMPLETE:
            del self.incomplete[path]
        return result

    def upload_files(self, request, resources, folder, blob_type, upload_context, *arguments, **named):
        self.incomplete.clear()
        try:
            super().upload_files(request, resources, folder, blob_type, upload_context, *arguments, **named)
        except ValueError:
            if not self.incomplete:
                raise
        for path, result in self.incomplete.items():
            if result == ResumableUploadResult.FAILED:  # it cannot be resumed: the next attempt starts it again
                Path(upload_context.get_upload_info_file_path(path)).unlink(missing_ok=True)
        expected = sum(path.name != DATASET_METADATA for path in Path(folder).iterdir())
        if len(request.files) < expected:
            raise Interrupted(f"{expected - len(request.files)} of {counted(expected, 'file')} did not arrive")


class Kaggle:
    """A signed-in user. Every request is tried again where that can help, and else fails with what to do.

    Attributes:
        name: the user's, on Kaggle.
    """

    def __init__(self, source: str, clock: Clock = Clock()):
        """Sign in.

        Args:
            source: where the credentials are, for messages.

        Raises:
            InputError: Kaggle does not take the credentials.
        """
        self.api, self.clock, self.source = StrictApi(), clock, source
        self.is_quiet = not sys.stderr.isatty()
        try:
            self.call("signing in", self.api.authenticate)
        except SystemExit as stop:  # after a page of the client's own advice
            raise InputError(self._refused()) from stop
        self.name = self.api.get_config_value("username")

    def call(self, what: str, function: Callable, *arguments: Any, forbidden: str = "", **named: Any) -> Any:
        """What a function of the client returns; tried again after network failures, 408, 429 and 5xx.

        Args:
            what: the attempt in words, for messages: "sending the weights".
            forbidden: what to do when Kaggle answers 403.

        Raises:
            NotFound: Kaggle answered 404.
            InputError: any other failure that trying again does not mend, or has not mended.
        """
        delay = FIRST_DELAY
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return function(*arguments, **named)
            except (RequestException, json.JSONDecodeError) as error:
                code, reason = explain(error)
                if code == 401:
                    raise InputError(self._refused()) from error
                if code == 403:
                    raise InputError(f"{what}: Kaggle forbids it ({reason}){forbidden and ': ' + forbidden}") from error
                if code == 404:
                    raise NotFound(f"{what}: Kaggle does not find it ({reason})") from error
                if code and code not in (408, 429) and code < 500:
                    raise InputError(f"{what}: Kaggle refuses it ({reason})") from error
                if attempt < ATTEMPTS:
                    pause = min(max(delay, retry_after(error)), LONGEST_DELAY)
                    say(f"{what}: {reason}; trying again in {pause:.0f} s")
                    self.clock.sleep(pause)
                    delay *= 2
            except KeyError as error:  # a state of which the client knows nothing
                raise InputError(f"{what}: kaggle does not know {error}: pip install --upgrade kaggle") from error
            except ValueError as error:  # the client's own words for what it refuses
                raise InputError(f"{what}: {shorten(error)}") from error
        raise InputError(f"{what} failed {ATTEMPTS} times, at last by {reason}: run the same command again later")

    def wait(self, what: str, ask: Callable[[], tuple[Any, str]], every: float, limit: float) -> Any:
        """Ask until there is an answer, showing the state.

        Args:
            ask: returns the answer, or None for none yet, and the state in a word.
            every: seconds between two questions.
            limit: seconds after which to give up.

        Raises:
            InputError: there is no answer within the limit.
        """
        started, told, last = self.clock.now(), 0.0, None
        while True:
            answer, state = ask()
            waited = self.clock.now() - started
            if sys.stdout.isatty():
                line = f"{what}: {state}, {minutes(waited)}"
                print(f"\r{line:<79}", end="" if answer is None else "\n", flush=True)
            elif state != last or waited - told >= TELL_EVERY:
                say(f"{what}: {state}, {minutes(waited)}")
                last, told = state, waited
            if answer is not None:
                return answer
            if waited >= limit:
                raise InputError(f"{what}: still {state} after {minutes(waited)}: run the same command again later")
            self.clock.sleep(every)

    def dataset(self, reference: str) -> tuple[str, int] | None:
        """The status of a dataset and its current version, or None where the user has none of that name."""
        what = f"asking for the dataset {reference}"
        try:
            answer = self.call(what, permitted(self.api.dataset_status), reference, format="json")
        except NotFound:
            return None
        found = json.loads(answer)
        return found["status"], found["current_version_number"] or 0

    def send_dataset(self, folder: Path, reference: str, before: int | None, note: str, is_public: bool) -> int:
        """Create the dataset of a folder or add a version to it; the version's number.

        What an earlier attempt has uploaded completely or in part is not uploaded again.

        Args:
            before: the dataset's current version, None where there is no dataset.
        """
        what, quiet, path = f"sending {folder}", self.is_quiet, str(folder.resolve())  # uploads are resumed by path
        # Kaggle answers 403 to a version that comes while the one before is processed, too.
        forbidden = f"a dataset needs a verified phone number; is {reference} yours, and its latest version ready?"

        def attempt() -> None:
            now = self.dataset(reference)
            if now and (before is None or now[1] > before):
                return  # an attempt did arrive whose answer was lost
            if now:
                result = self.api.dataset_create_version(path, version_notes=note, quiet=quiet, dir_mode="zip")
            else:
                result = self.api.dataset_create_new(path, public=is_public, quiet=quiet, dir_mode="zip")
            refuse_errors(what, result)

        self.call(what, attempt, forbidden=forbidden)
        return (before or 0) + 1

    def push(self, metadata: dict, script: Path) -> tuple[int, str]:
        """Push a kernel, which then runs: the number of its version and its address.

        Args:
            metadata: as in kernel-metadata.json, whatever its code_file.
        """
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / script.name).write_bytes(script.read_bytes())
            described = json.dumps({**metadata, "code_file": script.name})
            (Path(folder) / "kernel-metadata.json").write_text(described, encoding="utf-8")
            forbidden = "a kernel needs a verified phone number, your own name as its owner, and the rules accepted"
            result = self.call(f"pushing {metadata['id']}", self.api.kernels_push, folder, forbidden=forbidden)
        refuse_errors(f"pushing {metadata['id']}", result)
        if not result.version_number:
            raise InputError(f"pushing {metadata['id']}: Kaggle names no version: look at {result.url or 'its page'}")
        return result.version_number, result.url

    def kernel_status(self, reference: str) -> tuple[str, str]:
        """The state of a kernel's latest run, such as RUNNING, and what Kaggle says of its failure."""
        found = self.call(f"asking for {reference}", self.api.kernels_status, reference)
        return found.status.name, found.failure_message or ""

    def download_output(self, reference: str, name: str, folder: Path) -> tuple[Path | None, str]:
        """Bring one file of a run's output, in the place of an earlier one, and the log: its path, and the log's text.

        The path is None where the run left no such file.
        """
        what, log = f"downloading the output of {reference}", f"{reference.partition('/')[2]}.log"
        folder.mkdir(parents=True, exist_ok=True)
        for old in (name, log):
            (folder / old).unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            wanted = rf"^{re.escape(name)}$"
            self.call(what, self.api.kernels_output, reference, partial, file_pattern=wanted, force=True)
            for path in Path(partial).iterdir():
                path.replace(folder / path.name)
        text = read_log(folder / log) if (folder / log).is_file() else ""
        return folder / name if (folder / name).is_file() else None, text

    def competition(self, name: str) -> Any:
        """What Kaggle says of a competition: `user_has_entered`, `is_kernels_submissions_only` and more."""
        request = ApiGetCompetitionRequest()
        request.competition_name = name

        def ask() -> Any:
            with self.api.build_kaggle_client() as client:
                return client.competitions.competition_api_client.get_competition(request)

        return self.call(f"asking for the competition {name}", ask, forbidden=accept_rules(name))

    def submissions_left(self, competition: str) -> int:
        """How many submissions the user's team may still make today."""
        what = f"asking how many submissions {competition} allows"
        limits = self.call(
            what, self.api.competition_get_submission_limits, competition, forbidden=accept_rules(competition)
        )
        return limits.num_allowed_now

    def submissions(self, competition: str) -> list:
        """The latest submissions of the user's team, newest first."""
        what = f"asking for the submissions to {competition}"
        found = self.call(
            what, self.api.competition_submissions, competition, page_size=100, forbidden=accept_rules(competition)
        )
        return [submission for submission in found or () if submission]

    def submit(self, competition: str, description: str, output: Path, kernel: str | None, version: int) -> None:
        """Submit a kernel's version, or the file itself where `kernel` is None.

        A submission costs one of the day's: before another attempt Kaggle is asked whether the last one did arrive.
        """

        def attempt() -> None:
            if any(submission.description == description for submission in self.submissions(competition)):
                return
            if kernel:
                self.api.competition_submit_code(output.name, description, competition, kernel, version, quiet=True)
                return
            result = self.api.competition_submit(str(output), description, competition, quiet=self.is_quiet)
            if result.message == self.api.COMPETITION_SUBMIT_UPLOAD_FAILED_MESSAGE:
                raise Interrupted(f"{output} did not arrive")

        self.call(f"submitting to {competition}", attempt, forbidden=accept_rules(competition))

    def _refused(self) -> str:
        return f"Kaggle does not accept the credentials in {self.source}: make a new token at {TOKENS} and put it there"


def explain(error: Exception) -> tuple[int | None, str]:
    """The HTTP status of an answer, or None where there was none, and the reason in one line."""
    response = getattr(error, "response", None)
    if not isinstance(error, HTTPError) or response is None:
        return None, "an answer that is no JSON" if isinstance(error, ValueError) else shorten(error)
    code = response.status_code
    with suppress(ValueError, KeyError, TypeError):
        code = int(response.json()["code"])
    return code, f"{code}: {shorten(error)}"


def retry_after(error: Exception) -> float:
    """Seconds that Kaggle asks to wait, 0 if it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:
        return 0.0


def refuse_errors(what: str, answer: Any) -> None:
    """An answer may say 200 and yet tell of an error, or of parts that were left out.

    Raises:
        InputError: it does.
    """
    if answer.error or str(getattr(answer, "status", "ok") or "ok").lower() == "error":
        raise InputError(f"{what}: Kaggle says {shorten(answer.error or 'error')!r}: nothing runs; mend that first")
    left_out = [
        f"{name.replace('_', ' ')} {', '.join(map(str, value))}"
        for name in dir(answer)
        if name.startswith("invalid_") and (value := getattr(answer, name))
    ]
    if left_out:
        raise InputError(f"{what}: Kaggle left out {'; '.join(left_out)}: correct the names in kernel-metadata.json")


def permitted(function: Callable) -> Callable:
    """A function for which 403 means that there is nothing: so Kaggle answers for what does not exist, too."""

    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except HTTPError as error:
            code, reason = explain(error)
            if code == 403:
                raise NotFound(reason) from error
            raise

    return call


def read_log(path: Path) -> str:
    """The text of a kernel's log, which Kaggle gives as JSON pieces."""
    text = path.read_text(encoding="utf-8")
    try:
        return "".join(piece["data"] for piece in json.loads(text))
    except (ValueError, KeyError, TypeError):
        return text


def accept_rules(competition: str) -> str:
    return f"accept the rules at https://www.kaggle.com/competitions/{competition}/rules"


def minutes(seconds: float) -> str:
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s" if seconds >= 60 else f"{seconds:.0f} s"
