"""The ledger: one transaction holds everything that a restart, an audit or the outbox needs."""

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from itertools import zip_longest
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import exc

from daemon import ledger_tables as tables
from daemon.errors import LedgerError as LedgerError
from daemon.errors import StaleOwner
from daemon.grounds import Grounds
from daemon.ledger_database import Database, insert_or
from daemon.migrations import prepare
from monitors.episodes import Judged, ModelState
from monitors.events import Event, Kind, Outcome
from monitors.monitor import ModelChanges, ModelSaved, VersionChanges, VersionSaved, VersionState
from monitors.performance import EarlyLabel, PendingWindow, Performance
from monitors.policy import PolicyState
from monitors.records import Partition, PredictionRecord, Scalar
from monitors.steps import Taken

_encode = msgspec.msgpack.Encoder().encode
_rows_decoder = msgspec.msgpack.Decoder(list[PredictionRecord])
_labels_decoder = msgspec.msgpack.Decoder(dict[str, Scalar])
_early_decoder = msgspec.msgpack.Decoder(list[EarlyLabel])
_pending_decoder = msgspec.msgpack.Decoder(PendingWindow)
_state_decoder = msgspec.msgpack.Decoder(ModelState)
_version_decoder = msgspec.msgpack.Decoder(VersionState)
_DROP_CHUNK = sa.delete(tables.chunks).where(
    tables.chunks.c.model == sa.bindparam("of_model"),
    tables.chunks.c.version == sa.bindparam("of_version"),
    tables.chunks.c.kind == sa.bindparam("of_kind"),
    tables.chunks.c.key == sa.bindparam("of_key"),
)
_END_EPISODES = (
    sa.update(tables.episodes)
    .where(
        tables.episodes.c.model == sa.bindparam("of_model"),
        tables.episodes.c.id != sa.bindparam("current"),
        tables.episodes.c.ended_at.is_(None),
    )
    .values(
        stage=sa.case((tables.episodes.c.stage == "futile", "futile"), else_="resolved"),
        ended_at=sa.bindparam("at"),
    )
)


class Position(msgspec.Struct, frozen=True):
    """Where a partition goes on, its stream time, and the id of the log that the offset is of."""

    next_offset: int
    stream_time: datetime | None
    log: str = ""


class Checkpoint(msgspec.Struct, frozen=True):
    """
    Everything that becomes true at once; `grounds` go with `judged`, `settings` are by digest.

    `steps` are those that led to it, in order, each with its model and its settings; `counters` are what is
    to be added.
    """

    positions: Mapping[Partition, Position]
    models: Mapping[str, ModelChanges]
    judged: Sequence[tuple[Judged, str]] = ()
    grounds: Sequence[Grounds] = ()
    settings: Mapping[str, str] = {}
    performances: Sequence[tuple[str, Performance]] = ()
    events: Sequence[Event] = ()
    ended: Sequence[tuple[str, Outcome]] = ()
    steps: Sequence[tuple[str, str, Taken]] = ()
    counters: Mapping[str, int] = {}


class Restored(msgspec.Struct, frozen=True):
    """What the last checkpoint left."""

    positions: dict[Partition, Position]
    models: dict[str, ModelSaved]
    homes: dict[str, Partition]


class OutboxRow(msgspec.Struct, frozen=True):
    """An event that waits to be posted."""

    number: int
    id: str
    kind: str
    model: str
    request: str
    body: str
    failures: int


class StoredWindow(msgspec.Struct, frozen=True, kw_only=True):
    """One judged window as the ledger has it, texts undecoded: what an audit compares."""

    id: int
    model: str
    version: str
    key: int
    start: str
    end: str
    verdict: str
    drift_share: float
    evidence: str
    grounds: str
    report: str
    judged_at: str
    performance: str | None = None


class RequestRow(msgspec.Struct, frozen=True, kw_only=True):
    """One retraining request and how far it has come."""

    id: str
    episode: str
    model: str
    attempt: int
    state: str
    payload: str
    posted_at: datetime | None
    posts: int
    run: str | None
    created_by: str | None
    outcome: Outcome | None
    ended_at: datetime | None
    served: str | None
    held: str | None = None


def now() -> datetime:
    """Wall time, aware and in UTC."""
    return datetime.now(UTC)


class Ledger:
    """
    The ledger behind one SQLAlchemy URL; a SQLite file by default.

    One object may be used from several threads: every call is a transaction of its own.
    """

    def __init__(self, url: str) -> None:
        self._database = Database(url)
        self._epochs: dict[str, int] = {}
        # Set once something is in line to be delivered, so that whoever delivers need not ask all the time.
        self.in_line = threading.Event()
        prepare(self._database)

    def close(self) -> None:
        """Let go of all connections."""
        self._database.close()

    def inspect(self) -> None:
        """Raise `LedgerError` with the remedy if the ledger is damaged."""
        self._database.inspect()

    # --- ownership -------------------------------------------------------------------------------

    def take_over(self, group: str, member: str, indexes: Collection[int] | None = None) -> int:
        """
        Become the owner of a group's decisions; whoever was it before is stale from now on.

        With `indexes`, of those about the models at home in these partition indexes.
        """
        owned = [group] if indexes is None else [_scope(group, index) for index in sorted(indexes)]
        with self._database.writing() as tx:
            _retire(tx, group, by_index=indexes is None)
            epochs = {scope: _raise_epoch(tx, scope, member) for scope in owned}
        self._epochs = epochs
        return max(epochs.values())

    def homes(self) -> dict[str, Partition]:
        """Where each model was met first."""
        with self._database.reading() as tx:
            return _homes(tx)

    def claim_home(self, model: str, partition: Partition) -> Partition:
        """Where a model is at home: in this partition, unless it was met elsewhere before."""
        place = {"topic": partition.topic, "partition": partition.index}
        with self._owned() as tx:
            claim = insert_or(tx, tables.homes).values(model=model, **place)
            tx.execute(claim.on_conflict_do_nothing(index_elements=["model"]))
            return _homes(tx)[model]

    # --- the loop --------------------------------------------------------------------------------

    def restore(self, indexes: Collection[int] | None = None) -> Restored:
        """Read the last checkpoint; with `indexes`, only the models at home in these."""
        with self._database.reading() as tx:
            positions = {
                Partition(row.topic, row.partition): Position(
                    row.next_offset, _time(row.stream_time), row.log
                )
                for row in tx.execute(sa.select(tables.positions))
            }
            homes = _homes(tx)
            models = {
                row.model: _saved_model(tx, row)
                for row in tx.execute(sa.select(tables.models)).all()
                if indexes is None or (row.model in homes and homes[row.model].index in indexes)
            }
        return Restored(positions, models, homes)

    def restore_model(self, model: str) -> ModelSaved | None:
        """What the last checkpoint left of one model, if there was any."""
        with self._database.reading() as tx:
            row = tx.execute(sa.select(tables.models).where(tables.models.c.model == model)).first()
            return None if row is None else _saved_model(tx, row)

    def checkpoint(self, step: Checkpoint) -> None:
        """Write all of it or nothing. Raises `StaleOwner` if another member took over."""
        at = _text(now())
        with self._owned() as tx:
            for partition, position in step.positions.items():
                _write_position(tx, partition, position)
            for model, changes in step.models.items():
                _write_model(tx, model, changes, at)
            _write_windows(tx, step, at)
            for model, performance in step.performances:
                _write_performance(tx, model, performance)
            _write_steps(tx, step.steps, at)
            for request, outcome in step.ended:
                _end_request(tx, request, outcome, at)
            for event in step.events:
                _write_event(tx, event, at)
            for name in sorted(step.counters):
                _count(tx, name, step.counters[name])
        if step.events:
            self.in_line.set()

    def prune(self, before: datetime) -> int:
        """
        Forget evidence, events, requests and episodes that were over by then; returns how many rows.

        What a model's present state stands on is never older than its open episode, and stays.
        """
        then = _text(before)
        old = (
            sa.delete(tables.windows).where(tables.windows.c.judged_at < then),
            sa.delete(tables.steps).where(tables.steps.c.taken_at < then),
            sa.delete(tables.outbox).where(tables.outbox.c.posted_at < then),
            sa.delete(tables.requests).where(tables.requests.c.ended_at < then),
            sa.delete(tables.episodes).where(tables.episodes.c.ended_at < then),
        )
        with self._owned() as tx:
            return sum(tx.execute(statement).rowcount for statement in old)

    # --- the outbox ------------------------------------------------------------------------------

    def waiting_events(self, limit: int = 20, models: Collection[str] | None = None) -> list[OutboxRow]:
        """Events (of these models) that were not acknowledged yet, oldest first."""
        query = sa.select(tables.outbox).where(*_waiting(models)).order_by(tables.outbox.c.number)
        with self._database.reading() as tx:
            rows = tx.execute(query.limit(limit))
            return [
                OutboxRow(row.number, row.id, row.kind, row.model, row.request, row.body, row.failures)
                for row in rows
            ]

    def mark_posted(self, row: OutboxRow) -> None:
        """Prefect acknowledged the event."""
        at = _text(now())
        with self._owned() as tx:
            tx.execute(
                sa.update(tables.outbox).where(tables.outbox.c.number == row.number).values(posted_at=at)
            )
            _count_posting(tx, row, at)

    def mark_failed(self, row: OutboxRow) -> None:
        """Prefect could not be reached; the event stays in line."""
        with self._owned() as tx:
            tx.execute(
                sa.update(tables.outbox)
                .where(tables.outbox.c.number == row.number)
                .values(failures=row.failures + 1)
            )

    def mark_refused(self, row: OutboxRow, reason: str) -> None:
        """
        Prefect will never take this event; it is kept, with the reason, and no longer tried.

        A request has been posted all the same: what it asks for is still to be proved.
        """
        with self._owned() as tx:
            refused = sa.update(tables.outbox).where(tables.outbox.c.number == row.number)
            tx.execute(refused.values(refusal=reason))
            _count_posting(tx, row, _text(now()))

    def post_again(self, request: str) -> None:
        """Put a request's event in line once more: same id, same body, same `occurred`."""
        with self._owned() as tx:
            tx.execute(
                sa.update(tables.outbox)
                .where(
                    tables.outbox.c.request == request, tables.outbox.c.kind == str(Kind.RETRAIN_REQUESTED)
                )
                .values(posted_at=None, refusal=None)
            )
        self.in_line.set()

    def add_events(self, events: Sequence[Event]) -> None:
        """Put events in line that no window led to."""
        at = _text(now())
        with self._owned() as tx:
            for event in events:
                _write_event(tx, event, at)
        self.in_line.set()

    # --- requests --------------------------------------------------------------------------------

    def requests(self, model: str = "", open_only: bool = False) -> list[RequestRow]:
        """Requests in the order they were made."""
        query = sa.select(tables.requests).order_by(tables.requests.c.asked_at, tables.requests.c.attempt)
        if model:
            query = query.where(tables.requests.c.model == model)
        if open_only:
            query = query.where(tables.requests.c.state != "ended")
        with self._database.reading() as tx:
            return [_request_row(row) for row in tx.execute(query)]

    def unserved_promotions(self) -> list[RequestRow]:
        """Promotions of which it is not yet known whether the new version is served."""
        query = sa.select(tables.requests).where(
            tables.requests.c.state == "ended", tables.requests.c.served.is_(None)
        )
        with self._database.reading() as tx:
            rows = [_request_row(row) for row in tx.execute(query)]
        return [row for row in rows if row.outcome is not None and row.outcome.action == "promoted"]

    def mark_served(self, request: str, served: str) -> None:
        """`yes`, or `unserved` once that was told."""
        with self._owned() as tx:
            tx.execute(
                sa.update(tables.requests).where(tables.requests.c.id == request).values(served=served)
            )

    def confirm(self, request: str, run: str, created_by: str) -> None:
        """A run was proved to have started for this request."""
        with self._owned() as tx:
            tx.execute(
                sa.update(tables.requests)
                .where(tables.requests.c.id == request, tables.requests.c.state != "ended")
                .values(state="confirmed", run=run, created_by=created_by, held=None)
            )

    def hold(self, request: str, reason: str | None) -> None:
        """Write down what holds an open request up, or (None) that nothing does any more."""
        with self._owned() as tx:
            tx.execute(sa.update(tables.requests).where(tables.requests.c.id == request).values(held=reason))

    # --- dead letters ----------------------------------------------------------------------------

    def redrives(self) -> dict[str, str]:
        """The letters that were sent back (`sent`), or of which nobody saw the end (`sending`)."""
        with self._database.reading() as tx:
            return {row.letter: row.state for row in tx.execute(sa.select(tables.redrives))}

    def claim_redrive(self, letter: str) -> bool:
        """Mark a letter `sending` that nobody has marked yet; of many who try, one gets True."""
        try:
            with self._database.writing() as tx:
                values = {"letter": letter, "state": "sending", "at": _text(now())}
                tx.execute(sa.insert(tables.redrives).values(**values))
        except LedgerError as error:
            if isinstance(error.__cause__, exc.IntegrityError):
                return False
            raise
        return True

    def mark_redrive(self, letter: str, state: str) -> None:
        """Write down how far a letter has come on its way back."""
        with self._database.writing() as tx:
            _put(tx, tables.redrives, {"letter": letter}, {"state": state, "at": _text(now())})

    def forget_redrive(self, letter: str) -> None:
        """Kafka did not take the letter: it may be sent another time."""
        with self._database.writing() as tx:
            tx.execute(sa.delete(tables.redrives).where(tables.redrives.c.letter == letter))

    # --- people ----------------------------------------------------------------------------------

    def silence(self, model: str, until: datetime) -> None:
        """No requests for this model until then; windows are judged and told as before."""
        with self._database.writing() as tx:
            _put(tx, tables.silences, {"model": model}, {"until": _text(until)})

    def silences(self) -> dict[str, datetime]:
        """Until when each silenced model stays so; past ones included."""
        with self._database.reading() as tx:
            rows = tx.execute(sa.select(tables.silences)).all()
        return {row.model: datetime.fromisoformat(row.until) for row in rows}

    def versions_seen(self, model: str) -> dict[str, datetime]:
        """The versions of a model, with the wall time each was first written down."""
        with self._database.reading() as tx:
            rows = tx.execute(sa.select(tables.versions).where(tables.versions.c.model == model)).all()
        return {row.version: datetime.fromisoformat(row.first_seen) for row in rows}

    def windows(self, model: str, limit: int = 0) -> list[dict[str, Any]]:
        """A model's judged windows in ledger order (the newest `limit` of them), evidence included."""
        query = (
            sa.select(tables.windows)
            .where(tables.windows.c.model == model)
            .order_by(tables.windows.c.id.desc())
        )
        with self._database.reading() as tx:
            rows = tx.execute(query.limit(limit) if limit else query).all()
        return [{**row._mapping, "evidence": msgspec.json.decode(row.evidence)} for row in reversed(rows)]

    def evidence(self, model: str) -> list[Judged]:
        """A model's judged windows as the monitor gave them, in ledger order."""
        query = (
            sa.select(tables.windows.c.evidence)
            .where(tables.windows.c.model == model)
            .order_by(tables.windows.c.id)
        )
        with self._database.reading() as tx:
            return [msgspec.json.decode(row.evidence, type=Judged) for row in tx.execute(query)]

    def reported(self, limit: int) -> list[Judged]:
        """The newest windows, of all models, for which a report was promised."""
        query = sa.select(tables.windows.c.evidence).where(tables.windows.c.report != "")
        with self._database.reading() as tx:
            rows = tx.execute(query.order_by(tables.windows.c.id.desc()).limit(limit)).all()
        return [msgspec.json.decode(row.evidence, type=Judged) for row in rows]

    def window_count(self, model: str) -> int:
        """How many windows of a model were judged."""
        query = sa.select(sa.func.count()).select_from(tables.windows).where(tables.windows.c.model == model)
        with self._database.reading() as tx:
            return int(tx.execute(query).scalar_one())

    def counted_windows(self, model: str) -> tuple[int, datetime | None]:
        """How many of the windows that are kept count for the budget, and when the first of them began."""
        query = sa.select(sa.func.count(), sa.func.min(tables.windows.c.start)).where(*_counted(model))
        with self._database.reading() as tx:
            count, start = tx.execute(query).one()
        return int(count), _time(start)

    def newest_counted(self, model: str) -> Judged | None:
        """The newest window that counts for the budget, as the monitor gave it."""
        query = sa.select(tables.windows.c.evidence).where(*_counted(model))
        with self._database.reading() as tx:
            row = tx.execute(query.order_by(tables.windows.c.id.desc()).limit(1)).first()
        return None if row is None else msgspec.json.decode(row.evidence, type=Judged)

    def policy_state(self, model: str, version: str) -> PolicyState:
        """Where a version's drift policy stands as of the last checkpoint."""
        query = sa.select(tables.versions.c.state).where(
            tables.versions.c.model == model, tables.versions.c.version == version
        )
        with self._database.reading() as tx:
            row = tx.execute(query).first()
        return PolicyState() if row is None else _version_decoder.decode(row.state).policy

    def episodes(self, model: str) -> list[dict[str, Any]]:
        """A model's episodes, oldest first."""
        query = (
            sa.select(tables.episodes)
            .where(tables.episodes.c.model == model)
            .order_by(tables.episodes.c.number)
        )
        with self._database.reading() as tx:
            return [dict(row._mapping) for row in tx.execute(query)]

    def stored_windows(self, model: str) -> list[StoredWindow]:
        """A model's judged windows as they are written, in ledger order; nothing of them is decoded."""
        names = StoredWindow.__struct_fields__
        query = sa.select(*(tables.windows.c[name] for name in names)).where(tables.windows.c.model == model)
        with self._database.reading() as tx:
            return [StoredWindow(**row._mapping) for row in tx.execute(query.order_by(tables.windows.c.id))]

    def steps(self, model: str) -> list[tuple[str, str]]:
        """What moved a model's state, in order: the digest of the settings, and the step undecoded."""
        query = sa.select(tables.steps.c.settings, tables.steps.c.body).where(tables.steps.c.model == model)
        with self._database.reading() as tx:
            return [(row.settings, row.body) for row in tx.execute(query.order_by(tables.steps.c.id))]

    def judged_count(self, model: str, version: str) -> int:
        """How many windows of a version were ever judged, those that were pruned since included."""
        query = sa.select(tables.versions.c.state).where(
            tables.versions.c.model == model, tables.versions.c.version == version
        )
        with self._database.reading() as tx:
            row = tx.execute(query).first()
        return 0 if row is None else _version_decoder.decode(row.state).judged

    def settings_of(self, digest: str) -> str | None:
        """The settings under this digest, as written; None if there are none."""
        with self._database.reading() as tx:
            row = tx.execute(
                sa.select(tables.settings.c.body).where(tables.settings.c.digest == digest)
            ).first()
        return None if row is None else str(row.body)

    def find_episodes(self, prefix: str) -> list[dict[str, Any]]:
        """The episodes whose id begins so."""
        query = sa.select(tables.episodes).where(tables.episodes.c.id.startswith(prefix, autoescape=True))
        with self._database.reading() as tx:
            return [dict(row._mapping) for row in tx.execute(query)]

    def events_of(self, episode: str) -> list[dict[str, Any]]:
        """What was put in line about an episode, oldest first."""
        query = sa.select(tables.outbox).where(tables.outbox.c.body.contains(f'"{episode}"', autoescape=True))
        with self._database.reading() as tx:
            return [dict(row._mapping) for row in tx.execute(query.order_by(tables.outbox.c.number))]

    def model_states(self) -> dict[str, ModelState]:
        """Where each model stands as of the last checkpoint."""
        with self._database.reading() as tx:
            return {
                row.model: _state_decoder.decode(row.state) for row in tx.execute(sa.select(tables.models))
            }

    def events(self, limit: int = 0) -> list[dict[str, Any]]:
        """Everything that was put in line, oldest first, with when it was posted."""
        query = sa.select(tables.outbox).order_by(tables.outbox.c.number.desc())
        with self._database.reading() as tx:
            rows = tx.execute(query.limit(limit) if limit else query).all()
        return [dict(row._mapping) for row in reversed(rows)]

    def counters(self) -> dict[str, int]:
        """Running totals."""
        with self._database.reading() as tx:
            return {row.name: row.value for row in tx.execute(sa.select(tables.counters))}

    def waiting_count(self, models: Collection[str] | None = None) -> int:
        """How many events (of these models) are in line."""
        return self._count_events(*_waiting(models))

    def refused_count(self, models: Collection[str] | None = None) -> int:
        """How many events (of these models) Prefect will never take."""
        return self._count_events(tables.outbox.c.refusal.is_not(None), *_of(models))

    def newest_window(self, model: str, version: str, labelled: bool = False) -> dict[str, Any] | None:
        """A version's newest window that was scored, or that has its labels; without the evidence."""
        columns = [column for column in tables.windows.c if column is not tables.windows.c.evidence]
        scored = tables.windows.c.verdict.in_(("calm", "drifted", "broken"))
        query = (
            sa.select(*columns)
            .where(tables.windows.c.model == model, tables.windows.c.version == version)
            .where(tables.windows.c.score.is_not(None) if labelled else scored)
            .order_by(tables.windows.c.id.desc())
            .limit(1)
        )
        with self._database.reading() as tx:
            row = tx.execute(query).first()
        return None if row is None else dict(row._mapping)

    # --- inside ----------------------------------------------------------------------------------

    def _count_events(self, *conditions: sa.ColumnElement[bool]) -> int:
        query = sa.select(sa.func.count()).select_from(tables.outbox).where(*conditions)
        with self._database.reading() as tx:
            return int(tx.execute(query).scalar_one())

    @contextmanager
    def _owned(self) -> Iterator[sa.Connection]:
        """A transaction in which all that this member owns is its own, and stays so until the end."""
        epochs, owners = self._epochs, tables.owners
        query = sa.select(owners.c.scope, owners.c.epoch).where(owners.c.scope.in_(epochs))
        with self._database.writing() as tx:
            # In order, lest two that lock several wait for each other.
            found = {
                row.scope: row.epoch for row in tx.execute(query.order_by(owners.c.scope).with_for_update())
            }
            if not epochs or found != epochs:
                lost = ", ".join(repr(scope) for scope in epochs if found.get(scope) != epochs[scope])
                raise StaleOwner(
                    f"another member owns {lost or 'everything'} by now in the ledger "
                    f"{self._database.shown}: this one stops; nothing is lost"
                )
            yield tx


def _scope(group: str, index: int) -> str:
    """Under which name one partition index of a group has its owner."""
    return f"{group}#{index}"


def _retire(tx: sa.Connection, group: str, by_index: bool) -> None:
    """Nobody who shares the group's work in the other way writes any more: not by index, or not the one."""
    scope = tables.owners.c.scope
    others = scope.startswith(f"{group}#", autoescape=True) if by_index else scope == group
    tx.execute(sa.update(tables.owners).where(others).values(epoch=tables.owners.c.epoch + 1))


def _homes(tx: sa.Connection) -> dict[str, Partition]:
    return {row.model: Partition(row.topic, row.partition) for row in tx.execute(sa.select(tables.homes))}


def _of(models: Collection[str] | None) -> list[sa.ColumnElement[bool]]:
    return [] if models is None else [tables.outbox.c.model.in_(models)]


def _waiting(models: Collection[str] | None) -> list[sa.ColumnElement[bool]]:
    return [tables.outbox.c.posted_at.is_(None), tables.outbox.c.refusal.is_(None), *_of(models)]


def _counted(model: str) -> list[sa.ColumnElement[bool]]:
    return [tables.windows.c.model == model, tables.windows.c.counted == 1]


def _text(time: datetime) -> str:
    return time.astimezone(UTC).isoformat()


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _raise_epoch(tx: sa.Connection, scope: str, member: str) -> int:
    """One more than it was; several members may do this at once, and each gets a number of its own."""
    by = {"member": member, "since": _text(now())}
    first = insert_or(tx, tables.owners).values(scope=scope, epoch=1, **by)
    raised = {"epoch": tables.owners.c.epoch + 1, **by}
    tx.execute(first.on_conflict_do_update(index_elements=["scope"], set_=raised))
    epoch: int = tx.execute(
        sa.select(tables.owners.c.epoch).where(tables.owners.c.scope == scope)
    ).scalar_one()
    return epoch


def _put(tx: sa.Connection, table: sa.Table, key: dict[str, Any], values: dict[str, Any]) -> None:
    """Update the row with this key, or insert it; the same on every database."""
    if _update(tx, table, key, values) == 0:
        tx.execute(sa.insert(table), key | values)


def _update(tx: sa.Connection, table: sa.Table, key: dict[str, Any], values: dict[str, Any]) -> int:
    """Update the rows with this key; returns how many there are."""
    statement = _update_by(table, tuple(key), tuple(values))
    return tx.execute(statement, {f"of_{name}": value for name, value in key.items()} | values).rowcount


@cache
def _update_by(table: sa.Table, key: tuple[str, ...], names: tuple[str, ...]) -> sa.Update:
    """Made once: to make a statement costs several times what SQLite needs to carry it out."""
    where = [table.c[name] == sa.bindparam(f"of_{name}") for name in key]
    return sa.update(table).where(*where).values({name: sa.bindparam(name) for name in names})


def _count(tx: sa.Connection, name: str, more: int) -> None:
    """Add to a running total, to which other members add, too."""
    first = insert_or(tx, tables.counters).values(name=name, value=more)
    added = {"value": tables.counters.c.value + more}
    tx.execute(first.on_conflict_do_update(index_elements=["name"], set_=added))


def _write_position(tx: sa.Connection, partition: Partition, position: Position) -> None:
    time = None if position.stream_time is None else _text(position.stream_time)
    _put(
        tx,
        tables.positions,
        {"topic": partition.topic, "partition": partition.index},
        {"next_offset": position.next_offset, "stream_time": time, "log": position.log},
    )


def _write_model(tx: sa.Connection, model: str, changes: ModelChanges, at: str) -> None:
    values = {"state": _encode(changes.state), "early_end": changes.labels.early_end}
    _put(tx, tables.models, {"model": model}, values)
    for version, change in changes.versions.items():
        _write_version(tx, model, version, change, at)
    _write_labels(tx, model, changes)
    if changes.state.episode is not None:
        _write_episode(tx, changes.state, at)
    _end_episodes(tx, model, changes.state, at)


def _write_version(tx: sa.Connection, model: str, version: str, change: VersionChanges, at: str) -> None:
    key = {"model": model, "version": version}
    state = {"state": _encode(change.state)}
    if _update(tx, tables.versions, key, state) == 0:
        tx.execute(sa.insert(tables.versions), key | state | {"first_seen": at})
    _drop_chunks(tx, model, version, "rows", change.gone)
    _add_chunks(tx, model, version, "rows", change.rows)
    if change.learned_rows:
        _add_chunks(tx, model, version, "learned", {0: change.learned_rows})
    if not change.state.learning:
        _drop_chunks(tx, model, version, "learned", (0,))


def _write_labels(tx: sa.Connection, model: str, changes: ModelChanges) -> None:
    labels = changes.labels
    for window in labels.expected:
        _add_chunks(tx, model, window.version, "pending", {window.key: window})
    for (version, key), matched in labels.matched.items():
        _add_chunks(tx, model, version, "matched", {key: matched})
    for version, key in labels.judged:
        _drop_chunks(tx, model, version, "pending", (key,))
        _drop_chunks(tx, model, version, "matched", (key,))
    if labels.early:
        _add_chunks(tx, model, "", "early", {labels.early_end: labels.early})
        tx.execute(
            sa.delete(tables.chunks).where(
                tables.chunks.c.model == model,
                tables.chunks.c.kind == "early",
                tables.chunks.c.key <= labels.early_start,
            )
        )


def _add_chunks(tx: sa.Connection, model: str, version: str, kind: str, values: Mapping[int, object]) -> None:
    of = {"model": model, "version": version, "kind": kind}
    rows = [of | {"key": key, "data": _encode(value)} for key, value in values.items()]
    if rows:
        tx.execute(sa.insert(tables.chunks), rows)


def _drop_chunks(tx: sa.Connection, model: str, version: str, kind: str, keys: Iterable[int]) -> None:
    of = {"of_model": model, "of_version": version, "of_kind": kind}
    rows = [of | {"of_key": key} for key in keys]
    if rows:
        tx.execute(_DROP_CHUNK, rows)


def _write_windows(tx: sa.Connection, step: Checkpoint, at: str) -> None:
    for digest in sorted(step.settings):
        known = insert_or(tx, tables.settings).values(digest=digest, body=step.settings[digest])
        tx.execute(known.on_conflict_do_nothing(index_elements=["digest"]))
    counted = {(model, *place) for model, changes in step.models.items() for place in changes.counted}
    for (judged, report), grounds in zip_longest(step.judged, step.grounds):
        counts = (judged.model, judged.version, judged.key) in counted
        _write_judged(tx, judged, grounds, report, counts, at)


def _write_steps(tx: sa.Connection, steps: Sequence[tuple[str, str, Taken]], at: str) -> None:
    for model, settings, taken in steps:
        values = {"model": model, "settings": settings, "body": msgspec.json.encode(taken).decode()}
        tx.execute(sa.insert(tables.steps).values(**values, taken_at=at))


def _write_judged(
    tx: sa.Connection, judged: Judged, grounds: Grounds | None, report: str, counts: bool, at: str
) -> None:
    tx.execute(
        sa.insert(tables.windows).values(
            model=judged.model,
            version=judged.version,
            key=judged.key,
            start=_text(judged.start),
            end=_text(judged.end),
            verdict=str(judged.decision.verdict),
            drift_share=judged.report.drift_share,
            evidence=msgspec.json.encode(judged).decode(),
            grounds="" if grounds is None else msgspec.json.encode(grounds).decode(),
            report=report,
            counted=int(counts),
            judged_at=at,
        )
    )


def _write_performance(tx: sa.Connection, model: str, performance: Performance) -> None:
    key = {"model": model, "version": performance.version, "key": performance.key}
    values = {
        "metric": performance.metric,
        "score": performance.score,
        "labelled": performance.labelled,
        "performance": msgspec.json.encode(performance).decode(),
    }
    _update(tx, tables.windows, key, values)


def _write_episode(tx: sa.Connection, state: ModelState, at: str) -> None:
    episode = state.episode
    assert episode is not None
    _put(
        tx,
        tables.episodes,
        {"id": episode.id},
        {
            "model": episode.model,
            "version": episode.version,
            "number": episode.number,
            "stage": str(episode.stage),
            "state": msgspec.json.encode(episode).decode(),
            "opened_at": _text(episode.opened_at),
        },
    )


def _end_episodes(tx: sa.Connection, model: str, state: ModelState, at: str) -> None:
    """Every episode that is no longer the model's present one is over."""
    current = state.episode.id if state.episode else ""
    tx.execute(_END_EPISODES, {"of_model": model, "current": current, "at": at})


def _write_event(tx: sa.Connection, event: Event, at: str) -> None:
    """The first writing fixes `occurred`; the same event again changes nothing."""
    known = tx.execute(sa.select(tables.outbox.c.number).where(tables.outbox.c.id == str(event.id))).first()
    if known is not None:
        return
    body = msgspec.json.encode(event.body(datetime.fromisoformat(at))).decode()
    tx.execute(
        sa.insert(tables.outbox).values(
            id=str(event.id), kind=str(event.kind), model=event.model, request=event.request, body=body
        )
    )
    if event.kind is Kind.RETRAIN_REQUESTED:
        tx.execute(
            sa.insert(tables.requests).values(
                id=event.request,
                episode=event.episode,
                model=event.model,
                attempt=event.payload["attempt"],
                state="waiting",
                payload=msgspec.json.encode(event.payload).decode(),
                asked_at=at,
            )
        )


def _count_posting(tx: sa.Connection, row: OutboxRow, at: str) -> None:
    """A request whose event was posted, or refused for good, is the watcher's from now on."""
    if row.kind == Kind.RETRAIN_REQUESTED:
        tx.execute(
            sa.update(tables.requests)
            .where(tables.requests.c.id == row.request, tables.requests.c.state.in_(("waiting", "posted")))
            .values(state="posted", posted_at=at, posts=tables.requests.c.posts + 1)
        )


def _end_request(tx: sa.Connection, request: str, outcome: Outcome, at: str) -> None:
    values: dict[str, Any] = {
        "state": "ended",
        "held": None,
        "outcome": msgspec.json.encode(outcome).decode(),
        "ended_at": at,
    }
    if outcome.run:
        values["run"] = outcome.run
    tx.execute(sa.update(tables.requests).where(tables.requests.c.id == request).values(**values))


def _request_row(row: Any) -> RequestRow:
    return RequestRow(
        id=row.id,
        episode=row.episode,
        model=row.model,
        attempt=row.attempt,
        state=row.state,
        payload=row.payload,
        posted_at=_time(row.posted_at),
        posts=row.posts,
        run=row.run,
        created_by=row.created_by,
        outcome=None if row.outcome is None else msgspec.json.decode(row.outcome, type=Outcome),
        ended_at=_time(row.ended_at),
        served=row.served,
        held=row.held,
    )


def _saved_model(tx: sa.Connection, row: Any) -> ModelSaved:
    return ModelSaved(
        state=_state_decoder.decode(row.state),
        versions=_saved_versions(tx, row.model),
        pending=_saved_pending(tx, row.model),
        early=_saved_early(tx, row.model),
        early_end=row.early_end,
    )


def _saved_versions(tx: sa.Connection, model: str) -> dict[str, VersionSaved]:
    rows = tx.execute(sa.select(tables.versions).where(tables.versions.c.model == model)).all()
    return {row.version: _saved_version(tx, model, row.version, row.state) for row in rows}


def _saved_version(tx: sa.Connection, model: str, version: str, state: bytes) -> VersionSaved:
    rows: dict[int, list[PredictionRecord]] = {}
    for chunk in _read_chunks(tx, model, "rows", version):
        rows.setdefault(chunk.key, []).extend(_rows_decoder.decode(chunk.data))
    learned = [
        record
        for chunk in _read_chunks(tx, model, "learned", version)
        for record in _rows_decoder.decode(chunk.data)
    ]
    return VersionSaved(_version_decoder.decode(state), rows, learned)


def _saved_pending(tx: sa.Connection, model: str) -> tuple[PendingWindow, ...]:
    windows = {
        (window.version, window.key): window
        for chunk in _read_chunks(tx, model, "pending")
        for window in (_pending_decoder.decode(chunk.data),)
    }
    for chunk in _read_chunks(tx, model, "matched"):
        windows[chunk.version, chunk.key].labels.update(_labels_decoder.decode(chunk.data))
    return tuple(windows.values())


def _saved_early(tx: sa.Connection, model: str) -> tuple[EarlyLabel, ...]:
    return tuple(
        label for chunk in _read_chunks(tx, model, "early") for label in _early_decoder.decode(chunk.data)
    )


def _read_chunks(tx: sa.Connection, model: str, kind: str, version: str | None = None) -> Sequence[Any]:
    query = (
        sa.select(tables.chunks)
        .where(tables.chunks.c.model == model, tables.chunks.c.kind == kind)
        .order_by(tables.chunks.c.id)
    )
    if version is not None:
        query = query.where(tables.chunks.c.version == version)
    return tx.execute(query).all()
