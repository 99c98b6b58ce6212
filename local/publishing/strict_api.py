"""Kaggle's own client, made strict: what it only prints becomes an error, and no request waits forever.

Importing this module imports the client, which signs in immediately: import it only when something is to be sent.
"""

import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from kaggle.api.kaggle_api_extended import KaggleApi, ResumableUploadResult
from requests import HTTPError, PreparedRequest, RequestException, Response
from requests.adapters import HTTPAdapter

from kernel.inputs import shorten
from local.base.console import counted
from local.bundling.metadata import DATASET_METADATA

MODEL_METADATA = "model-instance-metadata.json"
REQUEST_TIMEOUT = 300.0  # seconds without any data after which a connection is closed
LOG_TIMEOUT = 30.0  # the same for a log, of which a run may write nothing for a while


class Interrupted(RequestException):
    """An upload is incomplete. The next attempt sends only the rest."""


def with_timeout(send: Callable[..., Response]) -> Callable[..., Response]:
    """Give every request a timeout: the client sets none, and would wait forever for a connection that has died."""

    def send_with_timeout(
        adapter: HTTPAdapter, request: PreparedRequest, *args: Any, timeout: Any = None, **kwargs: Any
    ) -> Response:
        is_log = "text/event-stream" in request.headers.get("Accept", "")
        return send(adapter, request, *args, timeout=timeout or (LOG_TIMEOUT if is_log else REQUEST_TIMEOUT), **kwargs)

    return send_with_timeout


HTTPAdapter.send = with_timeout(HTTPAdapter.send)  # the client's sessions cannot be reached from outside


class StrictApi(KaggleApi):
    """Raises an error for an incomplete upload, and leaves retries to `Kaggle.call`.

    kaggle 2.2.4 leaves a file that did not arrive out of the dataset and says so only if not quiet. 2.2.5 raises a
    ValueError for it, as for a mistake of the user.
    """

    def __init__(self) -> None:
        super().__init__()
        self.incomplete: dict[str, Any] = {}  # path -> the last result of an upload that is not complete

    def with_retry(self, func, *_, **__):
        return func

    def upload_complete(self, path, url, quiet, resume=False):
        result = super().upload_complete(path, url, quiet, resume)
        self.incomplete[path] = result
        if result == ResumableUploadResult.COMPLETE:
            del self.incomplete[path]
        return result

    def upload_files(self, request, resources, folder, blob_type, upload_context, *args, **kwargs):
        self.incomplete.clear()
        try:
            super().upload_files(request, resources, folder, blob_type, upload_context, *args, **kwargs)
        except ValueError:
            if not self.incomplete:
                raise
        for path, result in self.incomplete.items():
            if result == ResumableUploadResult.FAILED:  # it cannot be resumed: the next attempt starts it again
                Path(upload_context.get_upload_info_file_path(path)).unlink(missing_ok=True)
        expected = sum(path.name not in (DATASET_METADATA, MODEL_METADATA) for path in Path(folder).iterdir())
        if len(request.files) < expected:
            raise Interrupted(f"{expected - len(request.files)} of {counted(expected, 'file')} did not arrive")


def explain(error: Exception) -> tuple[int | None, str]:
    """The HTTP status of an answer, or None if there was no answer, and the reason in one line."""
    response = getattr(error, "response", None)
    if not isinstance(error, HTTPError) or response is None:
        return None, "an answer that is not JSON" if isinstance(error, ValueError) else in_short(error)
    code = response.status_code
    with suppress(ValueError, KeyError, TypeError):
        code = int(response.json()["code"])
    return code, f"{code}: {in_short(error)}"


def in_short(error: Exception) -> str:
    """A message in one line, without the queries of addresses: with its signature anybody can open an uploaded file."""
    return re.sub(r"\?[^\s?'\")]*=[^\s'\")]*", "?…", shorten(error))


def get_retry_after(error: Exception) -> float:
    """Seconds that Kaggle asks to wait; 0 if it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:
        return 0.0


def silently(function: Callable, *args: Any, **kwargs: Any) -> None:
    """Call a function of the client without what it prints."""
    with redirect_stdout(io.StringIO()):
        function(*args, **kwargs)


def as_utf8(text: str) -> str:
    """Text whose UTF-8 was read as Latin-1: `requests` does so with a stream that does not name its encoding."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text
