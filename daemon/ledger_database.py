"""The ledger's database: whole transactions on one URL, and what to do when it fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects import postgresql, sqlite

from daemon.errors import LedgerAway, LedgerError

# By the beginning of SQLite's name for the error; the first that fits.
_REMEDIES = {
    "SQLITE_FULL": "there is no room left: make room on that disk and start again",
    "SQLITE_IOERR": "the disk does not take or give it (full, over a quota, broken): mend it and start again",
    "SQLITE_READONLY": "it may not be written: make the file and its folder writable for this user",
    "SQLITE_CANTOPEN": "it cannot be opened: make the file and its folder writable for this user",
    "SQLITE_PERM": "it may not be written: make the file and its folder writable for this user",
    "SQLITE_BUSY": "another process keeps it locked: end that process",
}
_DAMAGED = (
    "it is damaged: put a backup in its place, or move it away (README, `A damaged or lost ledger`, "
    "says what a new one begins with)"
)
_ANY = "check that ledger.url is reachable, writable and not full"
BUSY_SECONDS = 30.0
# A member that was stopped in the middle of a transaction holds what it locked for so long and no longer.
IDLE_SECONDS = 10.0
# What libpq is told, unless the URL says otherwise: a server that vanished is noticed.
_LIBPQ = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}


class Database:
    """
    One SQLAlchemy URL; a transaction holds all of its reads and writes or none, on SQLite, too.

    May be used from several threads: every transaction has a connection of its own.
    """

    def __init__(self, url: str) -> None:
        self._url = sa.engine.make_url(url)
        self._engine = self._sqlite() if self.is_sqlite else self._server()

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file of this host."""
        return self._url.get_backend_name() == "sqlite"

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return self._url.render_as_string(hide_password=True)

    def close(self) -> None:
        """Let go of all connections."""
        self._engine.dispose()

    def inspect(self) -> None:
        """Raise `LedgerError` if the file's structure is damaged; a second for each gigabyte or so."""
        if not self.is_sqlite:
            return
        with self.reading() as tx:
            found = str(tx.exec_driver_sql("PRAGMA quick_check(1)").scalar_one())
        if found != "ok":
            raise LedgerError(f"the ledger {self.shown}: {_DAMAGED} ({found})")

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that sees one moment; it waits for nobody. Raises `LedgerError`."""
        with self._transaction(writes=False) as tx:
            yield tx

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that is written as a whole or not at all. Raises `LedgerError`."""
        with self._transaction(writes=True) as tx:
            yield tx

    @contextmanager
    def _transaction(self, writes: bool) -> Iterator[sa.Connection]:
        try:
            with self._connect(writes) as connection, connection.begin():
                yield connection
        except exc.SQLAlchemyError as error:
            reason = getattr(error, "orig", None) or error
            kind = LedgerAway if self._may_pass(error) else LedgerError
            said = " ".join(str(reason).split())  # Postgres says it in several lines
            raise kind(f"the ledger {self.shown} failed: {said}: {_remedy(reason)}") from error
        except msgspec.MsgspecError as error:
            raise LedgerError(
                f"the ledger {self.shown} cannot be understood ({error}): {_DAMAGED}"
            ) from error

    def _connect(self, writes: bool) -> sa.Connection:
        options: dict[str, Any] = {"writes": writes}
        if not writes and not self.is_sqlite:
            options["isolation_level"] = "REPEATABLE READ"
        return self._engine.connect().execution_options(**options)

    def _may_pass(self, error: exc.SQLAlchemyError) -> bool:
        """Whether it is about a server and its connections, and not about what was asked of it."""
        passing = (exc.OperationalError, exc.InterfaceError, exc.InternalError, exc.TimeoutError)
        return not self.is_sqlite and isinstance(error, passing)

    def _sqlite(self) -> sa.Engine:
        self._make_folder()
        engine = sa.create_engine(self._url)
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine

    def _server(self) -> sa.Engine:
        libpq = self._url.get_driver_name() in ("psycopg", "psycopg2")
        told = {name: value for name, value in _LIBPQ.items() if libpq and name not in self._url.query}
        # Asked before it is used: a connection from before the server's restart is no error of ours.
        engine = sa.create_engine(self._url, pool_pre_ping=True, connect_args=told)
        if self._url.get_backend_name() == "postgresql":
            sa.event.listen(engine, "connect", _prepare_postgres)
        return engine

    def _make_folder(self) -> None:
        file = self._url.database or ""
        if not file or file.startswith(("file:", ":memory:")):
            return
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(
                f"the ledger's folder {Path(file).parent} cannot be made ({error.strerror}): "
                "make it, writable for this user, or name another ledger.url"
            ) from error


def insert_or(tx: sa.Connection, table: sa.Table) -> Any:
    """An INSERT that can be told what to do `on_conflict`, the same for SQLite and Postgres."""
    return (sqlite if tx.dialect.name == "sqlite" else postgresql).insert(table)


def _remedy(reason: object) -> str:
    name = str(getattr(reason, "sqlite_errorname", ""))
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return _DAMAGED
    return next((remedy for code, remedy in _REMEDIES.items() if name.startswith(code)), _ANY)


def _prepare_sqlite(connection: Any, _: Any) -> None:
    # Python's own idea of when a transaction begins leaves reads and new tables outside of it.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1_000:.0f}")
    cursor.execute("PRAGMA journal_mode=WAL")
    # FULL: a checkpoint that Kafka's commit follows must survive a power cut.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _prepare_postgres(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_SECONDS * 1_000:.0f}ms'")
    cursor.execute(f"SET lock_timeout = '{BUSY_SECONDS * 1_000:.0f}ms'")
    cursor.close()
    connection.commit()


def _begin_sqlite(connection: sa.Connection) -> None:
    """A writer takes its lock at once: one that read first could be refused it later."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
