"""A Kaggle that lies at home: a small HTTP server that speaks the wire of Kaggle's client, and is its proxy.

The client is pointed at it by the environment that `Loopback.environment` gives. It keeps what it is sent, answers from
what it keeps, and fails where a test asks it to. A request for any other address is refused and remembered.
"""

import json
import threading
from base64 import b64encode
from collections import defaultdict
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

OWNER, KEY, TOKEN = "tester", "5" * 32, "KGAT_" + "0123456789abcdef" * 2  # a key and a token as Kaggle spells them


class Refusal(Exception):
    """An HTTP error to answer with."""

    def __init__(self, code: int, message: str = "as the test wants it"):
        self.code, self.message = code, message


class Loopback:
    """The state of this Kaggle.

    Attributes:
        requests: names of the methods called, in order; "PUT" for what is uploaded, "GET" for what is downloaded.
        bodies: of each method, what it was sent, in order.
        foreign: addresses that were asked for and are not this server's.
        blobs: of each upload's token, its name and the bytes that arrived.
        datasets: of each reference, its versions; each has the contents of its files by name.
        processing: states that a dataset goes through, one per question, after each version; the last one stays.
        running: the same of a kernel's run.
        scoring: the same of a submission.
        output: files that a run leaves, by name.
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
        """What makes Kaggle's client speak to this server, and to nobody else."""
        proxies = {f"{kind}_proxy": self.address for kind in ("http", "https")}
        return {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            **proxies, **{name.upper(): value for name, value in proxies.items()},
            **dict.fromkeys(("NO_PROXY", "no_proxy"), ""),
            **dict.fromkeys(("HOME", "KAGGLE_CONFIG_DIR", "TMPDIR"), str(home)),
            "KAGGLE_USERNAME": OWNER, "KAGGLE_KEY": KEY,
        }  # fmt: skip

    def fail(self, method: str, *answers: Callable[[dict], dict | None]) -> None:
        """Answer the next calls of a method by these functions of the body; one that returns None lets it pass."""
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
        return {"status": following(self.processing)}

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
        state = following(self.running)
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
        state = following(self.scoring)
        score = {"publicScore": "0.5310"} if state == "COMPLETE" else {}
        reason = {"errorDescription": "Notebook Timeout"} if state == "ERROR" else {}
        found = [{"ref": place, "description": text} for place, text in enumerate(self.submitted)]
        return {"submissions": [{**one, "status": state, **score, **reason} for one in reversed(found)]}

    def _CreateCodeSubmission(self, body: dict) -> dict:
        self.submitted.append(body["submissionDescription"])
        self.limits -= 1
        return {"message": "Successfully submitted", "ref": len(self.submitted)}

    _CreateSubmission = _CreateCodeSubmission


def following(states: list[str]) -> str:
    """The next of some states; the last one stays."""
    return states.pop(0) if len(states) > 1 else states[0]


def http(code: int, message: str = "as the test wants it") -> Callable[[dict], dict]:
    """A fault that answers with an HTTP error."""

    def refuse(body: dict) -> dict:
        raise Refusal(code, message)

    return refuse


def saying(**answer: object) -> Callable[[dict], dict]:
    """A fault that answers 200 with something else."""
    return lambda body: answer


class _Handler(BaseHTTPRequestHandler):
    kaggle: Loopback
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet: in two, each answer would wait for an acknowledgement

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        if not self._is_at_home():
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
        """A part of an upload, or with `Content-Range: bytes */SIZE` the question how much of it has arrived."""
        token, sent = self.path.rpartition("/")[2], self.rfile.read(int(self.headers["Content-Length"]))
        kaggle, (name, content) = self.kaggle, self.kaggle.blobs[token]
        is_question = self.headers.get("Content-Range", "").startswith("bytes */")
        kaggle.requests.append("asked how much" if is_question else "PUT")
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
        if self._is_at_home():
            self.kaggle.requests.append("GET")
            self._reply(200, self.kaggle.output[self.path.rpartition("/")[2]], kind="text/csv")

    def do_CONNECT(self) -> None:
        self.kaggle.foreign.append(self.path)
        self._reply(403, b"")

    def _is_at_home(self) -> bool:
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
