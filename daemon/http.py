"""The daemon's own pages: health, metrics, status and reports; on loopback unless told otherwise."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from daemon.errors import RetrainDaemonError
from daemon.health import Answer, Health

TYPES = {".html": "text/html; charset=utf-8", ".json": "application/json"}


class HttpServer:
    """Serves /healthz, /readyz, /metrics, /status and /reports/NAME from threads of its own."""

    def __init__(
        self,
        host: str,
        port: int,
        reports: Path,
        status: Callable[[], dict[str, Any]],
        health: Health,
        metrics: Callable[[str], tuple[bytes, str]],
    ) -> None:
        pages = {"reports": reports, "status": status, "health": health, "metrics": metrics}
        handler = type("Handler", (_Handler,), pages)
        try:
            self._server = ThreadingHTTPServer((host, port), handler)
        except OSError as error:
            raise RetrainDaemonError(
                f"http.port {port} on {host} cannot be opened: {error.strerror}: "
                "name a free port in [http], or 0 for any"
            ) from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    reports: Path
    status: Callable[[], dict[str, Any]]
    health: Health
    metrics: Callable[[str], tuple[bytes, str]]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        cls = type(self)
        if path == "/healthz":
            self._judge(cls.health.alive())
        elif path == "/readyz":
            self._judge(cls.health.ready())
        elif path == "/metrics":
            self._answer(200, *cls.metrics(self.headers.get("Accept", "")))
        elif path == "/status":
            self._answer(200, msgspec.json.encode(cls.status()), "application/json")
        elif path.startswith("/reports/"):
            self._report(path.removeprefix("/reports/"))
        else:
            self._answer(404, b"there is /healthz, /readyz, /metrics, /status and /reports/NAME\n")

    def _judge(self, answer: Answer) -> None:
        well, why = answer
        self._answer(200 if well else 503, f"{why}\n".encode())

    def _report(self, name: str) -> None:
        file = self.reports / name
        if "/" in name or file.suffix not in TYPES or not file.is_file():
            self._answer(404, b"no such report: it is drawn some seconds after its window, if at all\n")
            return
        self._answer(200, file.read_bytes(), TYPES[file.suffix])

    def _answer(self, code: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are no news."""
