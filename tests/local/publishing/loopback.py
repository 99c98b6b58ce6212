"""A local Kaggle: a small HTTP server with the API that Kaggle's client uses, and the client's proxy.

`Loopback.environment` directs the client to it. It stores what it receives, answers from that, and fails where a test
asks for it. Requests for any other address are refused and recorded.
"""

import json
import threading
from base64 import b64encode
from collections import defaultdict
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

OWNER, KEY, TOKEN = "tester", "5" * 32, "KGAT_" + "0123456789abcdef" * 2  # a key and a token in Kaggle's format


class Refusal(Exception):
    """An HTTP error to answer with."""

    def __init__(self, code: int, message: str = "as the test demands"):
        self.code, self.message = code, message


class Loopback:
    """The state of this Kaggle.

    Attributes:
        requests: names of the methods called, in order; "PUT" for uploads, "GET" for downloads.
        bodies: the bodies sent to each method, in order.
        foreign: requested addresses that are not this server's.
        blobs: name and received bytes of each upload, by token.
        datasets: versions of each dataset, by reference; a version is the contents of its files by name.
        processing: states of a dataset, one per question; the last one stays.
        running: the same for a kernel's run.
        scoring: the same for a submission.
        output: files that a run writes, by name.
        limits: submissions that are left today.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.bodies: dict[str, list[dict]] = defaultdict(list)
        self.foreign: list[str] = []
        self.blobs: dict[str, tuple[str, bytearray]] = {}
        self.sizes: dict[str, int] = {}
        self.datasets: dict[str, list[dict[str, bytes]]] = {}
        self.processing, self.running = ["READY"], ["QUEUED", "RUNNING", "COMPLETE"]
        self.scoring = ["PENDING", "COMPLETE"]
        self.output: dict[str, bytes] = {}
        self.log = ""
        self.versions, self.submitted, self.limits = 0, [], 5
        self.competition = {"id": 1, "ref": "c", "userHasEntered": True, "isKernelsSubmissionsOnly": True}
        self.faults: dict[str, list[Callable[[dict], dict | None]]] = defaultdict(list)
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"kaggle": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True

    def __enter__(self) -> "Loopback":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """Environment variables that direct Kaggle's client to this server, and to no other."""
        proxies = {f"{kind}_proxy": self.address for kind in ("http", "https")}
        return {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            **proxies, **{name.upper(): value for name, value in proxies.items()},
            **dict.fromkeys(("NO_PROXY", "no_proxy"), ""),
            **dict.fromkeys(("HOME", "KAGGLE_CONFIG_DIR", "TMPDIR"), str(home)),
            "KAGGLE_USERNAME": OWNER, "KAGGLE_KEY": KEY,
        }  # fmt: skip

    def fail(self, method: str, *answers: Callable[[dict], dict | None]) -> None:
        """Answer the next calls of a method by functions of the body; if one returns None, the call succeeds."""
        self.faults[method] += answers

    def count(self, method: str) -> int:
        return self.requests.count(method)

    def stored(self, reference: str) -> dict[str, bytes]:
        """The files of a dataset's latest version."""
        return self.datasets[reference][-1]

    def answer(self, method: str, body: dict) -> dict:
        """The answer to a call.

        Raises:
            Refusal: an error instead.
        """
        with self._lock:
            self.requests.append(method)
            self.bodies[method].append(body)
            fault = self.faults[method].pop(0) if self.faults[method] else None
        answer = fault(body) if fault else None
        return answer if answer is not None else getattr(self, f"_{method}")(body)

    def _StartBlobUpload(self, body: dict) -> dict:
        token = f"token-{len(self.blobs)}"
        self.blobs[token] = body.get("name") or body["fileName"], bytearray()
        self.sizes[token] = body["contentLength"]
        return {"token": token, "createUrl": f"{self.address}/upload/{token}"}

    _StartSubmissionUpload = _StartBlobUpload

    def _GetDatasetStatus(self, body: dict) -> dict:
        if f"{body['ownerSlug']}/{body['datasetSlug']}" not in self.datasets:
            raise Refusal(404, "no such dataset")
        return {"status": next_state(self.processing)}

    def _GetDataset(self, body: dict) -> dict:
        versions = len(self.datasets[f"{body['ownerSlug']}/{body['datasetSlug']}"])
        return {"id": 7, "ref": body["datasetSlug"], "currentVersionNumber": versions}

    def _CreateDataset(self, body: dict) -> dict:
        return self._add_version(f"{body['ownerSlug']}/{body['slug']}", body["files"])

    def _CreateDatasetVersion(self, body: dict) -> dict:
        return self._add_version(f"{body['ownerSlug']}/{body['datasetSlug']}", body["body"]["files"])

    def _add_version(self, reference: str, files: Iterable[dict]) -> dict:
        files = dict(self.blobs[file["token"]] for file in files)
        self.datasets.setdefault(reference, []).append({name: bytes(content) for name, content in files.items()})
        return {"status": "ok", "url": f"https://www.kaggle.com/datasets/{reference}", "error": ""}

    def _SaveKernel(self, body: dict) -> dict:
        self.versions += 1
        return {"ref": body["slug"], "url": "https://www.kaggle.com/code/it", "versionNumber": self.versions}

    def _GetKernelSessionStatus(self, body: dict) -> dict:
        state = next_state(self.running)
        return {"status": state, **({"failureMessage": "out of memory"} if state == "ERROR" else {})}

    def _ListKernelSessionOutput(self, body: dict) -> dict:
        files = [{"fileName": name, "url": f"{self.address}/output/{name}"} for name in self.output]
        return {"files": files, "log": self.log}

    def _IntrospectToken(self, body: dict) -> dict:
        return {"active": body["token"] == TOKEN, "username": OWNER}

    def _GetCompetition(self, body: dict) -> dict:
        return self.competition

    def _GetSubmissionLimits(self, body: dict) -> dict:
        return {"numToday": 5 - self.limits, "numAllowedNow": self.limits}

    def _ListSubmissions(self, body: dict) -> dict:
        if not self.submitted:
            return {"submissions": []}
        state = next_state(self.scoring)
        score = {"publicScore": "0.5310"} if state == "COMPLETE" else {}
        reason = {"errorDescription": "Notebook Timeout"} if state == "ERROR" else {}
        found = [{"ref": number, "description": text} for number, text in enumerate(self.submitted)]
        return {"submissions": [{**one, "status": state, **score, **reason} for one in reversed(found)]}

    def _CreateCodeSubmission(self, body: dict) -> dict:
        self.submitted.append(body["submissionDescription"])
        self.limits -= 1
        return {"message": "Successfully submitted", "ref": len(self.submitted)}

    _CreateSubmission = _CreateCodeSubmission


def next_state(states: list[str]) -> str:
    """The next state of a list; the last one stays."""
    return states.pop(0) if len(states) > 1 else states[0]


def http(code: int, message: str = "as the test demands") -> Callable[[dict], dict]:
    """A fault that answers with an HTTP error."""

    def refuse(body: dict) -> dict:
        raise Refusal(code, message)

    return refuse


def saying(**answer: object) -> Callable[[dict], dict]:
    """A fault that answers 200 with another body."""
    return lambda body: answer


class _Handler(BaseHTTPRequestHandler):
    kaggle: Loopback
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # header and body in one packet; in two, each answer would wait for an acknowledgement

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        if not self._is_for_this_server():
            return
        try:
            kind, _, credentials = self.headers.get("Authorization", "").partition(" ")
            if credentials != (TOKEN if kind == "Bearer" else b64encode(f"{OWNER}:{KEY}".encode()).decode()):
                raise Refusal(401, "Unauthenticated")
            answer = self.kaggle.answer(urlsplit(self.path).path.rpartition("/")[2], body)
        except Refusal as refusal:
            self._reply(refusal.code, json.dumps({"code": refusal.code, "message": refusal.message}).encode())
        except ConnectionAbortedError:  # a fault that hangs up
            self.close_connection = True
        else:
            self._reply(200, json.dumps(answer).encode())

    def do_PUT(self) -> None:
        """Receive a part of an upload; or, with `Content-Range: bytes */SIZE`, say how much has arrived."""
        token, sent = self.path.rpartition("/")[2], self.rfile.read(int(self.headers["Content-Length"]))
        kaggle, (name, content) = self.kaggle, self.kaggle.blobs[token]
        is_question = self.headers.get("Content-Range", "").startswith("bytes */")
        kaggle.requests.append("size question" if is_question else "PUT")
        if not is_question:
            del content[self._start() :]
            fault = kaggle.faults["PUT"].pop(0) if kaggle.faults["PUT"] else None
            if fault:
                try:
                    content += fault({"name": name, "sent": sent})["kept"]
                except Refusal as refusal:
                    self._reply(refusal.code, b"{}")
                except ConnectionAbortedError:
                    self.close_connection = True
                else:
                    self._reply(503, b"{}")
                return
            content += sent
        if len(content) == kaggle.sizes[token]:
            self._reply(200, b"{}")
        else:
            self._reply(308, b"", **({"Range": f"bytes=0-{len(content) - 1}"} if content else {}))

    def do_GET(self) -> None:
        if self._is_for_this_server():
            self.kaggle.requests.append("GET")
            self._reply(200, self.kaggle.output[self.path.rpartition("/")[2]], kind="text/csv")

    def do_CONNECT(self) -> None:
        self.kaggle.foreign.append(self.path)
        self._reply(403, b"")

    def _is_for_this_server(self) -> bool:
        if urlsplit(self.path).hostname in (None, "localhost", "127.0.0.1"):
            return True
        self.kaggle.foreign.append(self.path)
        self._reply(403, b"")
        return False

    def _start(self) -> int:
        return int(self.headers.get("Content-Range", "bytes 0-").removeprefix("bytes ").partition("-")[0])

    def _reply(self, code: int, content: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
