"""A ledger that fails says what, where and what to do, and what it did not take never happened."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from daemon.errors import LedgerError
from daemon.ledger import Ledger


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A ledger with a model in it, closed: all of it is in the one file."""
    file = tmp_path / "ledger.db"
    dump = Path(__file__).parents[1] / "data" / "ledger-schema-1.sql"
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(dump.read_text())
    Ledger(f"sqlite:///{file}").close()
    return file


def decided(ledger: Ledger) -> tuple[Any, ...]:
    told = [(row["id"], row["kind"]) for row in ledger.events()]
    return ledger.evidence("fraud"), told, [row.id for row in ledger.requests()], ledger.counters()


def limit(ledger: Ledger, pages: int) -> None:
    """The disk has room for so many pages and no more."""
    engine = ledger._database._engine
    engine.dispose()
    sa.event.listen(
        engine, "connect", lambda connection, _: connection.execute(f"PRAGMA max_page_count={pages}")
    )


def test_what_a_full_disk_did_not_take_is_done_by_the_next_process(watched: Any, tmp_path: Path) -> None:
    watched.predict(200)
    watched.predict(150, shift=60.0)
    watched.label(range(300), at=340)
    failures, rooms = 0, (30, 40, 50, 60, 80, 100)
    for pages in rooms:
        watched.log.members.clear()
        member = watched.member()
        limit(member.ledger, pages)
        try:
            member.cycles()
        except LedgerError as error:
            failures += 1
            assert "full: there is no room left: make room on that disk and start again" in str(error)
            assert str(tmp_path / "ledger.db") in str(error)
    assert failures > 0, "the disk was full at least once"
    watched.log.members.clear()
    last = watched.member()
    last.cycles()

    whole = type(watched)(tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    whole.log = watched.log
    watched.log.members.clear()
    undisturbed = whole.member()
    undisturbed.cycles()
    assert decided(last.ledger) == decided(undisturbed.ledger)
    assert len(last.ledger.requests()) == 1
    whole.close()


def test_a_ledger_for_reading_only_can_be_looked_at_and_not_owned(file: Path) -> None:
    ledger = Ledger(f"sqlite:///file:{file}?mode=ro&uri=true")
    assert ledger.window_count("fraud") == 8
    with pytest.raises(LedgerError, match="make the file and its folder writable for this user"):
        ledger.take_over("g", "m")
    ledger.close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "a-file").touch()
    with pytest.raises(LedgerError, match=r"a-file/folder cannot be made .*: make it, writable for this"):
        Ledger(f"sqlite:///{tmp_path}/a-file/folder/ledger.db")


def test_what_is_no_ledger_is_called_damaged(file: Path) -> None:
    file.write_bytes(b"\xff" * 4_096 + file.read_bytes()[4_096:])
    with pytest.raises(LedgerError, match="not a database: it is damaged: put a backup in its place"):
        Ledger(f"sqlite:///{file}")


def test_a_damaged_page_is_found_before_anything_is_decided(file: Path) -> None:
    whole = file.read_bytes()
    pages = len(whole) // 4_096
    found = 0
    for page in range(1, pages):
        file.write_bytes(whole[: page * 4_096] + bytes(4_096) + whole[(page + 1) * 4_096 :])
        with pytest.raises(LedgerError, match="it is damaged: put a backup in its place, or move it away"):
            _open(file)
        found += 1
    assert found == pages - 1 > 20


def _open(file: Path) -> None:
    ledger = Ledger(f"sqlite:///{file}")
    try:
        ledger.inspect()
    finally:
        ledger.close()


def test_a_truncated_ledger_is_called_damaged(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8_192])
    with pytest.raises(LedgerError, match="it is damaged"):
        _open(file)


def test_a_state_that_cannot_be_understood_is_called_damaged(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE models SET state = x'ffff'")
    ledger = Ledger(f"sqlite:///{file}")
    ledger.inspect()
    with pytest.raises(LedgerError, match=r"cannot be understood .*: it is damaged: put a backup"):
        ledger.restore()
    ledger.close()


def test_a_whole_ledger_passes(file: Path) -> None:
    _open(file)
