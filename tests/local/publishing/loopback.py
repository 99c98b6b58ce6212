"""A local Kaggle: a small HTTP server with the API that Kaggle's client uses, and the client's proxy.

`Loopback.environment` directs the client to it. It stores what it receives, answers from that, and fails where a test
asks for it. Requests for any other address are refused and recorded.
"""

import json
import threading
from base64 import b64encode
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

OWNER, KEY, TOKEN = "tester", "5" * 32, "KGAT_" + "0123456789abcdef" * 2  # a key and a token in Kaggle's format
SIGNATURE = "X-Goog-Signature=0123abcd"  # of addresses for uploads and downloads, which open the file for anybody
SECRETS = (KEY, TOKEN, SIGNATURE)  # what no message may contain


class Refusal(Exception):
    """An HTTP error to answer with."""

    def __init__(self, code: int, message: str = "as the test demands", is_html: bool = False):
        self.code, self.message, self.is_html = code, message, is_html


class Loopback:
    """The state of this Kaggle.

    Attributes:
        requests: names of the methods called, in order; "PUT" for uploads, "GET" for downloads, which may fail too.
        bodies: the bodies sent to each method, in order.
        foreign: requested addresses that are not this server's.
        blobs: name and received bytes of each upload, by token.
        datasets: versions of each dataset, by reference; a version is the contents of its files by name.
        models: the same for the one variation of each model.
        processing: states of a dataset, one per question; the last one stays.
        running: the same for a kernel's run.
        scoring: the same for a submission.
        output: files that a run writes, by name.
        limits: submissions that are left today.
        kernels: bodies of the pushes of each kernel, by reference; deleting a kernel removes it.
        live: pieces of the log that each connection to a running session gets; the last list stays. After a list ending
            with None the connection breaks, otherwise the log ends. Without any, there is no log until the run ends.
        hours: GPU hours used this week.
        others: states of the user's other kernels, by reference.
        on_push: called with the body of each push; may run the script, and set `running`, `log` and `output`.
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
        self.models: dict[str, list[dict[str, bytes]]] = {}
        self.submitted, self.limits = [], 5
        self.kernels: dict[str, list[dict]] = {}
        self.live: list[list[str | None]] = []
        self.state, self.hours = "QUEUED", 12.5
        self.others: dict[str, str] = {}
        self.on_push: Callable[[dict], None] = lambda body: None
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
        return {"token": token, "createUrl": f"{self.address}/upload/{token}?{SIGNATURE}"}

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

    def _GetModel(self, body: dict) -> dict:
        if f"{body['ownerSlug']}/{body['modelSlug']}" not in self.models:
            raise Refusal(404, "no such model")
        return {"id": 8, "ref": body["modelSlug"]}

    def _CreateModel(self, body: dict) -> dict:
        self.models[f"{body['ownerSlug']}/{body['slug']}"] = []
        return {"id": 8, "ref": body["slug"], "url": "https://www.kaggle.com/models/it"}

    def _GetModelInstance(self, body: dict) -> dict:
        versions = self.models.get(f"{body['ownerSlug']}/{body['modelSlug']}")
        if not versions:
            raise Refusal(404, "no such variation")
        return {"id": 9, "slug": body["instanceSlug"], "versionNumber": len(versions)}

    def _CreateModelInstance(self, body: dict) -> dict:
        files = dict(self.blobs[file["token"]] for file in body["body"]["files"])
        self.models[f"{body['ownerSlug']}/{body['modelSlug']}"].append(
            {name: bytes(content) for name, content in files.items()}
        )
        return {"id": 9, "ref": body["modelSlug"], "url": "https://www.kaggle.com/models/it"}

    _CreateModelInstanceVersion = _CreateModelInstance

    def _SaveKernel(self, body: dict) -> dict:
        versions = self.kernels.setdefault(body["slug"], [])
        versions.append(body)
        self.on_push(body)
        return {"ref": body["slug"], "url": "https://www.kaggle.com/code/it", "versionNumber": len(versions)}

    def _GetKernel(self, body: dict) -> dict:
        reference = f"{body['userName']}/{body['kernelSlug']}"
        if reference in self.others:
            return {"metadata": {"ref": reference, "enableGpu": True}, "blob": {"source": "another"}}
        versions = self._versions(body)
        metadata = {"ref": reference, "currentVersionNumber": len(versions), "enableGpu": True}
        return {"metadata": metadata, "blob": {"source": versions[-1]["text"]}}

    def _versions(self, body: dict) -> list[dict]:
        """The versions of a kernel."""
        reference = f"{body['userName']}/{body['kernelSlug']}"
        if reference not in self.kernels:
            raise Refusal(404, "no such kernel")
        return self.kernels[reference]

    def _DeleteKernel(self, body: dict) -> dict:
        self._versions(body)
        del self.kernels[f"{body['userName']}/{body['kernelSlug']}"]
        return {}

    def _ListKernels(self, body: dict) -> dict:
        mine = [*self.kernels, *self.others]
        return {"kernels": [{"ref": one, "lastRunTime": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}Z"} for one in mine]}

    def _GetAcceleratorQuotaStatistics(self, body: dict) -> dict:
        quota = {"timeUsed": f"{round(self.hours * 3600)}s", "totalTimeAllowed": f"{30 * 3600}s"}
        return {"quotaRefreshTime": "2026-11-28T00:00:00Z", "gpuQuota": quota}

    def _GetKernelSessionStatus(self, body: dict) -> dict:
        other = self.others.get(f"{body['userName']}/{body['kernelSlug']}")
        if other:
            return {"status": other}
        versions, label = self._versions(body), body.get("versionLabel")
        if label not in (None, *(f"v{number}" for number in range(1, len(versions) + 1))):
            raise Refusal(404, "no such version")
        if label is None or label != f"v{len(versions)}":
            return {"status": "COMPLETE"}  # of an earlier version
        self.state = next_state(self.running)
        return {"status": self.state, **({"failureMessage": "out of memory"} if self.state == "ERROR" else {})}

    def _ListKernelSessionOutput(self, body: dict) -> dict:
        """One file on each page."""
        self._versions(body)
        names, page = list(self.output), int(body.get("pageToken") or 0)
        files = [
            {"fileName": name, "url": f"{self.address}/output/{name}?{SIGNATURE}"} for name in names[page : page + 1]
        ]
        more = {"nextPageToken": str(page + 1)} if page + 1 < len(names) else {}
        return {"files": files, "log": self.log, **more}

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


def http(code: int, message: str = "as the test demands", is_html: bool = False) -> Callable[[dict], dict]:
    """A fault that answers with an HTTP error, or a page of HTML with any code."""

    def refuse(body: dict) -> dict:
        raise Refusal(code, message, is_html)

    return refuse


def hang_up(body: dict) -> None:
    """A fault that closes the connection without an answer."""
    raise ConnectionAbortedError


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
            if refusal.is_html:
                self._reply(refusal.code, f"<html>{refusal.message}</html>".encode(), kind="text/html")
                return
            self._reply(refusal.code, json.dumps({"code": refusal.code, "message": refusal.message}).encode())
        except ConnectionAbortedError:  # a fault that hangs up
            self.close_connection = True
        else:
            self._reply(200, json.dumps(answer).encode())

    def do_PUT(self) -> None:
        """Receive a part of an upload; or, with `Content-Range: bytes */SIZE`, say how much has arrived."""
        token, sent = urlsplit(self.path).path.rpartition("/")[2], self.rfile.read(int(self.headers["Content-Length"]))
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
        if not self._is_for_this_server():
            return
        if "/logs/stream/" in self.path:
            self._stream_log()
        else:
            self._send_output(self.kaggle.output[unquote(urlsplit(self.path).path).partition("/output/")[2]])

    def _send_output(self, content: bytes) -> None:
        """A file of a run's output, of which a fault that hangs up lets half arrive."""
        self.kaggle.requests.append("GET")
        fault = self.kaggle.faults["GET"].pop(0) if self.kaggle.faults["GET"] else lambda body: None
        try:
            fault({})
        except Refusal as refusal:
            self._reply(refusal.code, b"{}")
        except ConnectionAbortedError:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self._reply(200, content, kind="text/csv")

    def _stream_log(self) -> None:
        """The log of a run: while it runs, events one by one; afterwards all at once."""
        kaggle = self.kaggle
        kaggle.requests.append("log")
        if kaggle.state != "RUNNING":
            self._reply(200, kaggle.log.encode(), kind="text/plain")
            return
        if not kaggle.live:
            self._reply(404, b"{}")
            return
        pieces = kaggle.live.pop(0) if len(kaggle.live) > 1 else kaggle.live[0]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        events = [json.dumps({"stream_name": "stdout", "time": 1.0, "data": piece}) for piece in pieces if piece]
        for event in [*events, *([] if None in pieces else ["END_OF_LOG"])]:
            content = f"data: {event}\n\n".encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(content), content))
        if None in pieces:
            self.close_connection = True  # without the last chunk
        else:
            self.wfile.write(b"0\r\n\r\n")

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
