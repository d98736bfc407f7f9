"""The daemon's own pages: on this machine only, unless told otherwise, and no file but a report."""

import socket
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from daemon.config import HttpSettings
from daemon.health import Health
from daemon.http import HttpServer


def serve(folder: Path, host: str) -> HttpServer:
    pages = HttpServer(host, 0, folder, dict, Health(), lambda _: (b"metrics", "text/plain"))
    pages.start()
    return pages


@pytest.fixture
def by_default(tmp_path: Path) -> Iterator[HttpServer]:
    """A server where the settings put it when nothing is stated."""
    (tmp_path / "fraud-1-0.html").write_text("a report")
    (tmp_path / "ledger.db").write_text("not for everybody")
    (tmp_path.parent / "beside.html").write_text("not for everybody")
    pages = serve(tmp_path, HttpSettings().host)
    yield pages
    pages.close()


def port_of(pages: HttpServer) -> int:
    return int(pages.url.rpartition(":")[2])


def test_by_default_nobody_else_on_the_network_gets_an_answer(by_default: HttpServer) -> None:
    assert by_default.url.startswith("http://127.0.0.1:")
    # All of 127.0.0.0/8 is this machine; whoever listens on every address answers on 127.0.0.2, too.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port_of(by_default)), timeout=10)


def test_told_to_it_listens_on_every_address(tmp_path: Path) -> None:
    pages = serve(tmp_path, "0.0.0.0")
    try:
        socket.create_connection(("127.0.0.2", port_of(pages)), timeout=10).close()
    finally:
        pages.close()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/healthz", 200),
        ("/metrics", 200),
        ("/reports/fraud-1-0.html", 200),
        ("/reports/ledger.db", 404),
        ("/reports/../beside.html", 404),
        ("/reports/%2e%2e%2fbeside.html", 404),
        ("/reports/%2e%2e/beside.html", 404),
        ("/reports//etc/passwd", 404),
        ("/reports/", 404),
        ("/reports/a%00.html", 404),
        ("/", 404),
    ],
)
def test_only_its_pages_and_reports_are_served(by_default: HttpServer, path: str, status: int) -> None:
    connection = HTTPConnection("127.0.0.1", port_of(by_default), timeout=30)
    connection.request("GET", path)
    assert connection.getresponse().status == status
    connection.close()
