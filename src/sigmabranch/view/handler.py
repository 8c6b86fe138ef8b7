"""One request to the page's server, and whether it may be answered.

Every page that a browser shows can send requests to this machine. Ours alone are answered:

- a foreign name that was made to point here (DNS rebinding) shows in the Host header;
- a foreign page that asks for something to be done shows in the Origin header;
- what can be had is a fixed set of files and numbers; no request names a path.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from sigmabranch.errors import SigmaBranchError, StorageError

if TYPE_CHECKING:
    from sigmabranch.view.server import Server

MOST_BYTES = 8_000_000  # of an uploaded picture
SILENCE_SECONDS = 30
UPLOAD_SECONDS = 60
JSON = "application/json"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_SAMPLE = re.compile(r"/samples/([0-9]{1,9})")
_LENGTH = re.compile(r"[0-9]{1,15}")


class _Refused(Exception):
    """A request that is not answered, and why."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """Answers one request out of what its server holds."""

    server: Server
    timeout = SILENCE_SECONDS
    server_version, sys_version = "sigmabranch", ""

    def do_GET(self) -> None:
        """The page, its files, and what it shows."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Everything that makes the networks run or forget."""
        self._answer(self._post)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """One line of JSON instead of the base class's page."""
        status = HTTPStatus(code)
        self._send(status, JSON, _json({"error": message or status.phrase}))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the page shows what happens."""

    def _answer(self, respond: Callable[[], tuple[str, bytes]]) -> None:
        try:
            self._check_host()
            self._send(HTTPStatus.OK, *respond())
        except _Refused as refused:
            self.send_error(refused.status, str(refused))
        except SigmaBranchError as error:
            ours = isinstance(error, StorageError)
            status = HTTPStatus.INTERNAL_SERVER_ERROR if ours else HTTPStatus.BAD_REQUEST
            self.send_error(status, str(error))
        except (ConnectionError, TimeoutError):  # the browser has gone away
            raise
        except Exception:
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, "this failed: the terminal says why")
            raise

    def _get(self) -> tuple[str, bytes]:
        path = self.path.partition("?")[0]
        if path == "/show":
            return JSON, _json({**self.server.show.described(), "most_bytes": MOST_BYTES})
        if path in self.server.assets:
            return self.server.assets[path]
        raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _post(self) -> tuple[str, bytes]:
        self._check_origin()
        if self.path == "/picture":
            with self._upload() as encoded:
                return JSON, _json(self.server.show.picture(encoded))
        if self.path == "/forget":
            return JSON, _json(self.server.show.forget())
        sample = _SAMPLE.fullmatch(self.path)
        if sample is None or int(sample[1]) >= self.server.show.inputs.samples:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing of this name or number")
        return JSON, _json(self.server.show.sample(int(sample[1])))

    def _check_host(self) -> None:
        named = self.headers.get_all("Host", [])
        if len(named) != 1 or named[0] not in self.server.hosts:
            raise _Refused(HTTPStatus.MISDIRECTED_REQUEST, "this server has another name")

    def _check_origin(self) -> None:
        named = self.headers.get_all("Origin", [])
        if not {*named} <= {f"http://{self.headers['Host']}"}:
            raise _Refused(HTTPStatus.FORBIDDEN, "another page asked for this")

    @contextmanager
    def _upload(self) -> Iterator[bytes]:
        """What was sent, while few others hold as much until they are answered."""
        if not self.server.uploads.acquire(blocking=False):
            raise _Refused(
                HTTPStatus.SERVICE_UNAVAILABLE, "other pictures are on their way: try again"
            )
        try:
            yield self._body()
        finally:
            self.server.uploads.release()

    def _body(self) -> bytes:
        """What was sent, never more than ``MOST_BYTES``."""
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not _LENGTH.fullmatch(length):
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "say how long the body is")
        if int(length) > MOST_BYTES:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"this is larger than {MOST_BYTES / 1e6:.0f} MB: give a smaller picture",
            )
        body, until = bytearray(), time.monotonic() + UPLOAD_SECONDS
        while (rest := int(length) - len(body)) and time.monotonic() < until:
            piece = self.rfile.read1(min(rest, 1 << 16))
            if not piece:
                raise _Refused(HTTPStatus.BAD_REQUEST, "the body is shorter than announced")
            body += piece
        if rest:
            raise _Refused(HTTPStatus.REQUEST_TIMEOUT, "the body takes too long")
        return bytes(body)

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False).encode() + b"\n"
