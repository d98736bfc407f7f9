"""Ledgers of older programs: brought up to date whole, once, and with everything that they held."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from daemon.errors import LedgerError, StaleOwner
from daemon.ledger import Ledger
from daemon.ledger_database import Database
from daemon.migrations import MIGRATIONS, SCHEMA, Migration, prepare
from monitors.records import Partition

# Written by the code of schema 1, with something in every table, and dumped by sqlite3's `iterdump`.
FIRST_RELEASE = Path(__file__).parents[1] / "data" / "ledger-schema-1.sql"


@pytest.fixture
def old(tmp_path: Path) -> Iterator[str]:
    """The URL of a ledger that the first release left."""
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        connection.executescript(FIRST_RELEASE.read_text())
    yield f"sqlite:///{tmp_path / 'ledger.db'}"


def described(url: str) -> dict[str, Any]:
    """All that a database says of its tables, in an order of ours."""
    engine = sa.create_engine(url)
    inspector = sa.inspect(engine)
    found = {
        table: {
            "columns": {
                column["name"]: (str(column["type"]), column["nullable"], column["primary_key"])
                for column in inspector.get_columns(table)
            },
            "indexes": sorted(
                (str(one["name"]), one["column_names"]) for one in inspector.get_indexes(table)
            ),
            "unique": sorted(one["column_names"] for one in inspector.get_unique_constraints(table)),
        }
        for table in inspector.get_table_names()
    }
    engine.dispose()
    return found


def schema(url: str) -> int:
    with closing(sqlite3.connect(sa.engine.make_url(url).database or "")) as connection:
        return int(connection.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()[0])


def test_a_migrated_ledger_has_the_tables_of_a_new_one(old: str, tmp_path: Path) -> None:
    Ledger(old).close()
    new = f"sqlite:///{tmp_path / 'new.db'}"
    Ledger(new).close()
    assert described(old) == described(new)
    assert schema(old) == schema(new) == SCHEMA


def test_what_the_first_release_wrote_is_all_there(old: str) -> None:
    ledger = Ledger(old)
    restored = ledger.restore()
    assert restored.positions[Partition("predictions", 0)].next_offset == 178
    assert restored.positions[Partition("labels", 0)].next_offset == 27
    assert ledger.counters() == {"records": 205, "dead_letters": 1}
    model = restored.models["fraud"]
    assert (model.state.stage, model.state.episodes) == ("open", 1)
    assert {version: len(saved.rows) for version, saved in model.versions.items()} == {"1": 1, "2": 1}
    assert len(model.pending) == 7 and len(model.pending[1].labels) == 5
    assert all(list(window.segments.parts()) == [] for window in model.pending), "of which nobody knew then"
    assert len(model.early) == 22
    first, second = ledger.requests("fraud")
    assert (first.state, first.outcome and first.outcome.sentence) == ("ended", "no better")
    assert (second.state, second.attempt, second.held) == ("waiting", 2, None)
    assert [row.request for row in ledger.waiting_events()] == [second.id]
    assert [judged.decision.verdict for judged in ledger.evidence("fraud")][4:] == ["drifted"] * 4
    assert [row["stage"] for row in ledger.episodes("fraud")] == ["open"]
    assert set(ledger.silences()) == {"fraud"} and ledger.redrives() == {"predictions/0/7": "sent"}
    (window, *_) = ledger.stored_windows("fraud")
    assert window.grounds and ledger.judged_count("fraud", "1") == 8 and window.performance is None
    assert ledger.counted_windows("fraud") == (0, None)
    ledger.close()


def test_the_migrated_ledger_is_carried_on(old: str) -> None:
    """Writing to it works like before: the owner goes on counting, and nobody else may write."""
    ledger, stale = Ledger(old), Ledger(old)
    assert ledger.take_over("g", "new") == 2
    (waiting,) = ledger.waiting_events()
    ledger.mark_posted(waiting)
    ledger.hold(waiting.request, "paused")
    assert [(row.state, row.held) for row in ledger.requests("fraud")][1] == ("posted", "paused")
    with pytest.raises(StaleOwner, match="another member owns"):
        stale.hold(waiting.request, None)
    ledger.close()
    stale.close()


def test_a_migration_that_fails_leaves_the_ledger_as_it_was(old: str) -> None:
    before = described(old)

    def break_halfway(tx: sa.Connection) -> None:
        tx.execute(sa.text("ALTER TABLE requests ADD COLUMN half TEXT"))
        tx.execute(sa.text("DELETE FROM windows"))
        tx.execute(sa.text("ALTER TABLE ghosts ADD COLUMN age TEXT"))

    database = Database(old)
    with pytest.raises(LedgerError, match="no such table: ghosts"):
        prepare(database, (Migration("it breaks", break_halfway),))
    database.close()
    assert described(old) == before and schema(old) == 1
    ledger = Ledger(old)
    assert ledger.window_count("fraud") == 8, "and the next start tries again"
    ledger.close()


def test_migrations_run_in_order_each_by_itself(old: str) -> None:
    seen: list[int] = []
    steps = tuple(
        Migration("it is counted", lambda tx, number=number: seen.append(number))  # type: ignore[misc]
        for number in (2, 3, 4)
    )
    database = Database(old)
    prepare(database, steps[:1])
    assert (seen, schema(old)) == ([2], 2)
    prepare(database, steps)
    assert (seen, schema(old)) == ([2, 3, 4], 4)
    prepare(database, steps)
    assert seen == [2, 3, 4], "once"
    database.close()


def test_two_that_start_at_once_migrate_once(old: str) -> None:
    applied: list[str] = []

    def slow(tx: sa.Connection) -> None:
        tx.execute(sa.text("ALTER TABLE requests ADD COLUMN once TEXT"))
        applied.append(threading.current_thread().name)

    failures: list[Exception] = []

    def start() -> None:
        database = Database(old)
        try:
            prepare(database, (Migration("it happens once", slow),))
        except LedgerError as error:
            failures.append(error)
        database.close()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(applied), failures) == (1, [])


def test_a_newer_ledger_is_refused_untouched_and_the_remedy_is_said(old: str) -> None:
    Ledger(old).close()
    database = Database(old)
    with database.writing() as tx:
        tx.execute(sa.text(f"UPDATE meta SET value = '{SCHEMA + 1}' WHERE key = 'schema'"))
        tx.execute(sa.text("DROP TABLE silences"))
    database.close()
    with pytest.raises(LedgerError, match=r"start the newer retrain-daemon that wrote it, or name another"):
        Ledger(old)
    assert "silences" not in described(old)


def test_every_migration_says_what_it_is_for() -> None:
    assert all(migration.why for migration in MIGRATIONS)
