"""What the ledger promises on every database that it may be on."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from daemon import ledger_database
from daemon import ledger_tables as tables
from daemon.errors import LedgerAway, StaleOwner
from daemon.ledger import Checkpoint, Ledger, Position
from daemon.ledger_database import Database
from monitors.events import Event, Kind
from monitors.records import Partition

PLACE = Partition("predictions", 0)
MANY = 6

Open = Callable[[str], Ledger]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens ledgers, and closes them at the end."""
    ledgers: list[Ledger] = []

    def open_(url: str) -> Ledger:
        ledgers.append(Ledger(url))
        return ledgers[-1]

    yield open_
    for ledger in ledgers:
        ledger.close()


def at(offset: int) -> Checkpoint:
    """A checkpoint that has read up to there."""
    return Checkpoint({PLACE: Position(offset, datetime(2026, 1, 1, tzinfo=UTC))}, {})


def event(subject: str, text: str = "") -> Event:
    return Event(kind=Kind.DATA_LOST, model="fraud", subject=subject, payload={"text": text})


def test_what_is_written_is_there_for_the_next(ledger_url: str, opened: Open) -> None:
    first = opened(ledger_url)
    first.take_over("g", "first")
    first.checkpoint(at(7))
    assert opened(ledger_url).restore().positions == dict(at(7).positions)


def test_a_new_ledger_may_be_made_by_many_at_once(ledger_url: str, opened: Open) -> None:
    with ThreadPoolExecutor(MANY) as pool:
        ledgers = list(pool.map(opened, [ledger_url] * MANY))
    assert [ledger.counters() for ledger in ledgers] == [{}] * MANY


def test_of_many_that_take_over_at_once_one_is_the_owner(ledger_url: str, opened: Open) -> None:
    ledgers = [opened(ledger_url) for _ in range(MANY)]
    with ThreadPoolExecutor(MANY) as pool:
        epochs = list(pool.map(lambda ledger: ledger.take_over("g", "m"), ledgers))
    assert sorted(epochs) == list(range(1, MANY + 1))
    for ledger, epoch in zip(ledgers, epochs, strict=True):
        if epoch == MANY:
            ledger.checkpoint(at(1))
        else:
            with pytest.raises(StaleOwner, match="another member owns 'g'"):
                ledger.checkpoint(at(2))
    assert ledgers[0].restore().positions[PLACE].next_offset == 1


def test_an_owner_that_was_replaced_can_write_nothing(ledger_url: str, opened: Open) -> None:
    first, second = opened(ledger_url), opened(ledger_url)
    first.take_over("g", "first")
    first.checkpoint(Checkpoint({}, {}, events=[event("e")]))
    (row,) = first.waiting_events()
    second.take_over("g", "second")
    for write in (
        lambda: first.checkpoint(at(1)),
        lambda: first.add_events([event("another")]),
        lambda: first.mark_posted(row),
        lambda: first.prune(datetime.now(UTC)),
    ):
        with pytest.raises(StaleOwner):
            write()
    assert second.waiting_events() == [row]
    assert second.restore().positions == {}


def test_an_event_is_written_once_and_comes_back_as_it_was(ledger_url: str, opened: Open) -> None:
    ledger = opened(ledger_url)
    ledger.take_over("g", "m")
    text = "\x00 ' \" \\ % é 漢 🙂"
    ledger.add_events([event("e", text)])
    (first,) = ledger.waiting_events()
    ledger.add_events([event("e", "something else")])
    assert ledger.waiting_events() == [first]
    assert msgspec.json.decode(first.body)["payload"]["text"] == text


def test_of_many_who_send_a_letter_back_one_may(ledger_url: str, opened: Open) -> None:
    ledgers = [opened(ledger_url) for _ in range(MANY)]
    with ThreadPoolExecutor(MANY) as pool:
        got = list(pool.map(lambda ledger: ledger.claim_redrive("t/0/7"), ledgers))
    assert sorted(got) == [False] * (MANY - 1) + [True]
    assert ledgers[0].redrives() == {"t/0/7": "sending"}


def test_who_reads_sees_one_moment(ledger_url: str, opened: Open) -> None:
    ledger = opened(ledger_url)
    ledger.take_over("g", "m")
    ledger.checkpoint(at(1))
    database = Database(ledger_url)
    query = sa.select(tables.positions.c.next_offset)
    with database.reading() as tx:
        before = tx.execute(query).scalar_one()
        ledger.checkpoint(at(2))
        after = tx.execute(query).scalar_one()
    database.close()
    assert (before, after) == (1, 1)


def test_a_member_stopped_in_a_transaction_keeps_nobody_out_for_long(
    postgres: Any, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process may sleep for hours with the connection open: its server has to let go."""
    monkeypatch.setattr(ledger_database, "IDLE_SECONDS", 1.0)
    url = postgres.database()
    stopped, other = opened(url), opened(url)
    stopped.take_over("g", "stopped")
    with pytest.raises(LedgerAway), stopped._owned():
        began = time.monotonic()
        other.take_over("g", "other")
        assert time.monotonic() - began > 0.5, "it was waited for"
        other.checkpoint(at(2))
    with pytest.raises(StaleOwner):
        stopped.checkpoint(at(1))
    assert other.restore().positions[PLACE].next_offset == 2


def test_a_server_that_comes_back_is_gone_on_with(own_postgres: Any, opened: Open) -> None:
    ledger = opened(own_postgres.database())
    ledger.take_over("g", "m")
    ledger.checkpoint(at(1))
    own_postgres.kill()
    with pytest.raises(LedgerAway, match=r"the ledger postgresql://.*check that ledger\.url is reachable"):
        ledger.checkpoint(at(2))
    own_postgres.start()
    ledger.checkpoint(at(3))
    assert ledger.restore().positions[PLACE].next_offset == 3


def test_a_server_that_was_restarted_between_two_transactions_is_no_error(
    own_postgres: Any, opened: Open
) -> None:
    ledger = opened(own_postgres.database())
    ledger.take_over("g", "m")
    own_postgres.kill()
    own_postgres.start()
    ledger.checkpoint(at(1))
    assert ledger.restore().positions[PLACE].next_offset == 1


# --- members that share by partition index -----------------------------------------------------------


def test_members_own_what_is_in_their_indexes_and_nothing_else(ledger_url: str, opened: Open) -> None:
    first, second, third = (opened(ledger_url) for _ in range(3))
    first.take_over("g", "first", {0, 1})
    second.take_over("g", "second", {2, 3})
    first.checkpoint(at(1))
    second.checkpoint(at(2))
    third.take_over("g", "third", {1})
    with pytest.raises(StaleOwner, match="another member owns 'g#1' by now"):
        first.checkpoint(at(3))
    second.checkpoint(at(4))
    third.checkpoint(at(5))


def test_who_shares_in_one_way_fences_those_who_shared_in_the_other(ledger_url: str, opened: Open) -> None:
    alone, part, again = (opened(ledger_url) for _ in range(3))
    alone.take_over("g", "alone")
    part.take_over("g", "part", {0})
    with pytest.raises(StaleOwner):
        alone.checkpoint(at(1))
    part.checkpoint(at(2))
    again.take_over("g", "again")
    with pytest.raises(StaleOwner):
        part.checkpoint(at(3))
    again.checkpoint(at(4))


def test_of_many_that_meet_a_model_at_once_one_gives_it_its_home(ledger_url: str, opened: Open) -> None:
    ledgers = [opened(ledger_url) for _ in range(MANY)]
    for index, ledger in enumerate(ledgers):
        ledger.take_over("g", "m", {index})
    places = [Partition("predictions", index) for index in range(MANY)]
    with ThreadPoolExecutor(MANY) as pool:
        homes = list(pool.map(lambda ledger, place: ledger.claim_home("fraud", place), ledgers, places))
    assert set(homes) == {ledgers[0].homes()["fraud"]}


def test_what_members_count_adds_up(ledger_url: str, opened: Open) -> None:
    ledgers = [opened(ledger_url) for _ in range(MANY)]

    def count(index: int) -> None:
        ledgers[index].take_over("g", "m", {index})
        for _ in range(5):
            ledgers[index].checkpoint(Checkpoint({}, {}, counters={"records": 2, "dead_letters": 1}))

    with ThreadPoolExecutor(MANY) as pool:
        list(pool.map(count, range(MANY)))
    assert ledgers[0].counters() == {"records": 10 * MANY, "dead_letters": 5 * MANY}


def test_events_are_asked_for_by_model(ledger_url: str, opened: Open) -> None:
    ledger = opened(ledger_url)
    ledger.take_over("g", "m", {0})
    ledger.add_events([event("e")])
    assert [row.model for row in ledger.waiting_events(models={"fraud"})] == ["fraud"]
    assert ledger.waiting_events(models={"churn"}) == []
    assert (ledger.waiting_count({"fraud"}), ledger.waiting_count({"churn"}), ledger.waiting_count()) == (
        1,
        0,
        1,
    )
