"""
Migrations: how the ledger of an older program becomes one of today's, step by step and never half.

To change the tables: change them in `daemon/ledger_tables.py`, and append a `Migration` to
`MIGRATIONS` whose `apply` makes the same change to a ledger of the schema before, data included.
It runs in one transaction with the new schema number: if it fails or the process dies, the ledger
is as it was, and the next start tries again. It has to say itself what it needs (SQL, or tables
written out): the tables of this module's neighbour are those of today, and tomorrow's are others.
Use only what SQLite and Postgres both know, e.g. `ALTER TABLE ... ADD COLUMN`, `CREATE TABLE`.
`tests/unit/test_migrations.py` takes a ledger of the first release through all of them and holds
the result against a new one; what a migration does to rows needs a test beside it.
"""

from collections.abc import Callable, Sequence

import msgspec
import sqlalchemy as sa
import structlog

from daemon import ledger_tables as tables
from daemon.errors import LedgerError
from daemon.ledger_database import Database

log = structlog.get_logger()

FIRST_SCHEMA = 1
# Any number will do, as long as nothing else that uses the database takes it.
_POSTGRES_LOCK = 7_215_305_012


class Migration(msgspec.Struct, frozen=True):
    """One step from the schema before; `why` completes the sentence `migrated, so that ...`."""

    why: str
    apply: Callable[[sa.Connection], None]


def _hold_of_requests(tx: sa.Connection) -> None:
    tx.execute(sa.text("ALTER TABLE requests ADD COLUMN held TEXT"))


def _logs_of_positions(tx: sa.Connection) -> None:
    tx.execute(sa.text("ALTER TABLE positions ADD COLUMN log VARCHAR(64) NOT NULL DEFAULT ''"))


def _homes_of_models(tx: sa.Connection) -> None:
    tx.execute(
        sa.text(
            "CREATE TABLE homes (model VARCHAR(255) NOT NULL, topic VARCHAR(255) NOT NULL, "
            '"partition" INTEGER NOT NULL, PRIMARY KEY (model))'
        )
    )


def _counts_of_windows(tx: sa.Connection) -> None:
    tx.execute(sa.text("ALTER TABLE windows ADD COLUMN counted INTEGER"))


def _performances_of_windows(tx: sa.Connection) -> None:
    tx.execute(sa.text("ALTER TABLE windows ADD COLUMN performance TEXT"))


def _steps(tx: sa.Connection) -> None:
    number = "SERIAL" if tx.dialect.name == "postgresql" else "INTEGER"
    tx.execute(
        sa.text(
            f"CREATE TABLE steps (id {number} NOT NULL, model VARCHAR(255) NOT NULL, "
            "settings VARCHAR(64) NOT NULL, body TEXT NOT NULL, taken_at VARCHAR(40) NOT NULL, "
            "PRIMARY KEY (id))"
        )
    )
    tx.execute(sa.text("CREATE INDEX steps_of ON steps (model)"))


# In order: the first leads from schema 1 to 2.
MIGRATIONS = (
    Migration("what holds a request up can be seen", _hold_of_requests),
    Migration("a topic that was made anew is told from the old one", _logs_of_positions),
    Migration("members can share models by partition", _homes_of_models),
    Migration("a budget of needless alarms can be accounted for", _counts_of_windows),
    Migration("what labels said of each segment can be seen", _performances_of_windows),
    Migration("what labels led to can be recomputed", _steps),
)
SCHEMA = FIRST_SCHEMA + len(MIGRATIONS)


def prepare(database: Database, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """
    Make a new ledger, or an older one like a new one; one that is right is only read.

    Raises `LedgerError` for one that a newer program wrote, untouched.
    """
    wanted = FIRST_SCHEMA + len(migrations)
    with database.reading() as tx:
        found = _schema(tx)
    while found != wanted:
        with database.writing() as tx:
            _lock(tx)
            # Somebody else may have been faster.
            found = _step(tx, migrations, database.shown)


def _step(tx: sa.Connection, migrations: Sequence[Migration], shown: str) -> int:
    """One transaction's worth; returns the schema that it leaves."""
    found, wanted = _schema(tx), FIRST_SCHEMA + len(migrations)
    if found is None:
        tables.metadata.create_all(tx)
        _write_schema(tx, wanted)
        return wanted
    if found > wanted:
        raise LedgerError(
            f"the ledger {shown} has schema {found}, this program knows up to {wanted}: "
            "start the newer retrain-daemon that wrote it, or name another ledger.url"
        )
    if found == wanted:
        return found
    migration = migrations[found - FIRST_SCHEMA]
    migration.apply(tx)
    _write_schema(tx, found + 1)
    log.info("ledger_migrated", ledger=shown, schema=found + 1, why=migration.why)
    return found + 1


def _schema(tx: sa.Connection) -> int | None:
    """The schema that the ledger has; None: there is none yet."""
    if not sa.inspect(tx).has_table(tables.meta.name):
        return None
    row = tx.execute(sa.select(tables.meta.c.value).where(tables.meta.c.key == "schema")).first()
    # The first release wrote the number after the tables, and could be killed in between.
    return FIRST_SCHEMA if row is None else int(row.value)


def _write_schema(tx: sa.Connection, schema: int) -> None:
    tx.execute(sa.delete(tables.meta).where(tables.meta.c.key == "schema"))
    tx.execute(sa.insert(tables.meta).values(key="schema", value=str(schema)))


def _lock(tx: sa.Connection) -> None:
    """One at a time; SQLite's writers are alone anyway."""
    if tx.dialect.name == "postgresql":
        tx.execute(sa.select(sa.func.pg_advisory_xact_lock(_POSTGRES_LOCK)))
