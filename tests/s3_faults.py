"""A proxy between a client and an S3 server that breaks chosen requests, as networks and servers do."""

import http.client
import socket
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

HOP_BY_HOP = {"connection", "expect", "transfer-encoding", "content-length", "keep-alive"}


@dataclass
class Fault:
    """What happens to the next ``times`` requests of a method whose path and query contain ``where``.

    ``kind``: ``refuse`` answers with ``status`` and ``error`` (S3's code) instead of asking the server; ``cut request``
    closes the connection when half the content has arrived; ``lose answer`` passes the request on and closes the
    connection; ``cut answer`` sends half of it; ``alter answer`` flips the last byte; ``delay`` waits ``seconds`` first.
    """

    kind: str
    method: str = ""
    where: str = ""
    times: int = 1
    status: int = 503
    error: str = "SlowDown"
    details: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0


class FaultyProxy:
    """Listens on loopback and passes everything on to ``url``, except what its faults say."""

    def __init__(self, url: str) -> None:
        self.target = urlsplit(url).netloc
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def next_fault(self, method: str, path: str) -> Fault | None:
        """Note a request and take the fault that is meant for it."""
        with self._lock:
            self.seen.append(f"{method} {path}")
            for fault in self.faults:
                if fault.times > 0 and fault.method in {"", method} and fault.where in path:
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that break are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultyProxy

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """The tests' output is not the place."""

    def answer(self) -> None:
        fault = self.owner.next_fault(self.command, self.path) or Fault("none")
        length = int(self.headers.get("Content-Length", 0))
        if fault.kind == "cut request":
            self.rfile.read(length // 2)
            self._hang_up()
            return
        content = self.rfile.read(length)
        if fault.kind == "delay":
            time.sleep(fault.seconds)
        if fault.kind == "refuse":
            text = f"<Error><Code>{fault.error}</Code><Message>told by the test</Message>{fault.details}</Error>".encode()
            head = [("Content-Type", "application/xml"), ("Date", self.date_time_string()), *fault.headers]
            self._send(fault.status, head, b"" if self.command == "HEAD" else text, len(text))
            return
        try:
            status, head, body, size = self._forward(content)
        except OSError:  # the server is down
            self._hang_up()
            return
        if fault.kind == "lose answer":
            self._hang_up()
        elif fault.kind == "cut answer":
            self._send(status, head, body[: len(body) // 2], size)
            self._hang_up()
        elif fault.kind == "alter answer":
            self._send(status, head, body[:-1] + bytes([body[-1] ^ 0xFF]), size)
        else:
            self._send(status, head, body, size)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815 - http.server's names

    def _forward(self, content: bytes) -> tuple[int, list[tuple[str, str]], bytes, int]:
        connection = http.client.HTTPConnection(self.owner.target, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
            headers["Content-Length"] = str(len(content))
            connection.request(self.command, self.path, content, headers)
            response = connection.getresponse()
            body = response.read()
            size = int(response.headers.get("Content-Length", len(body)))
            head = [(name, value) for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP]
        except http.client.HTTPException as error:
            raise ConnectionError from error
        else:
            return response.status, head, body, size
        finally:
            connection.close()

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes, size: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if status not in {204, 304}:
            self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
