"""The ledger's disk is full, its file read-only, damaged or gone: said, survived, and nothing done twice."""

import os
import resource
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from daemon.wire.local_prefect import LocalPrefectServer

pytestmark = [pytest.mark.kafka, pytest.mark.prefect]


@pytest.fixture
def site(site_of: Callable[..., Any], prefect_server: LocalPrefectServer) -> Any:
    # Nothing is unconfirmed, however long a run takes: what is told does not depend on the machine.
    return site_of(prefect_server, start_deadline_seconds=3_600.0)


def decided(site: Any) -> tuple[Any, ...]:
    """What the ledger says was decided and told, ids included."""
    with site.ledger() as ledger:
        told = [(row["id"], row["kind"]) for row in ledger.events()]
        return ledger.evidence(site.model), told, [row.id for row in ledger.requests()], ledger.counters()


def lose_ledger(site: Any) -> None:
    for file in site.folder.glob("ledger.db*"):
        file.unlink()


@pytest.mark.slow
def test_a_full_disk_ends_the_daemon_and_what_follows_is_as_if_it_never_was(site: Any) -> None:
    site.predict(10)
    daemon = site.start_daemon()
    site.eventually(lambda: site.windows() == 10)
    # From now on no file of the process may grow.
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (4_096, resource.RLIM_INFINITY))
    site.predict(3, shift=60.0)
    assert site.exit_code() == 1
    said = site.last_words()
    assert "failed: " in said and "start again" in said and str(site.ledger_file) in said
    assert site.windows() == 10
    site.predict(2)
    site.start_daemon()
    site.eventually(lambda: site.windows() == 15)
    found = decided(site)
    site.kill_daemon()

    lose_ledger(site)
    site.start_daemon(REGISTRY__REFERENCES_URL=str(site.folder / "other-references"))
    site.eventually(lambda: site.windows() == 15)
    for one, other in zip(found, decided(site), strict=True):
        assert one == other


def test_a_ledger_that_may_not_be_written_is_refused_and_carried_on_later(site: Any) -> None:
    mere_owner = ()
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everything, and setpriv is not there to take that away")
        mere_owner = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-all")
    with site.ledger() as ledger:
        ledger.take_over(site.settings.group, "somebody")
    site.ledger_file.chmod(0o444)
    before = site.ledger_file.read_bytes()
    site.start_daemon(*mere_owner)
    assert site.exit_code() == 1
    said = site.last_words()
    assert "make the file and its folder writable for this user" in said and str(site.ledger_file) in said
    assert site.ledger_file.read_bytes() == before

    site.ledger_file.chmod(0o644)
    site.predict(2)
    site.start_daemon(*mere_owner)
    site.eventually(lambda: site.windows() == 2)


def test_a_damaged_ledger_is_refused_with_the_remedy_and_left_alone(site: Any) -> None:
    with site.ledger() as ledger:
        ledger.take_over(site.settings.group, "somebody")
    whole = site.ledger_file.read_bytes()
    damaged = whole[:8_192] + bytes(4_096) + whole[12_288:]
    site.ledger_file.write_bytes(damaged)
    site.start_daemon()
    assert site.exit_code() == 1
    assert "it is damaged: put a backup in its place, or move it away" in site.last_words()
    assert site.ledger_file.read_bytes() == damaged


def test_without_its_ledger_it_begins_where_kafka_start_says_and_says_so(site: Any) -> None:
    site.predict(3)
    site.start_daemon()
    site.eventually(lambda: site.windows() == 3)
    site.kill_daemon()
    lose_ledger(site)
    site.start_daemon(KAFKA__START="latest")
    site.eventually(lambda: site.page("/readyz") == "ready: owner\n")
    site.predict(2)
    site.eventually(lambda: site.windows() == 2)
    with site.ledger() as ledger:
        (span,) = ledger.evidence(site.model)[0].spans
    assert span.start == 3 * 20
    site.kill_daemon()
    starts = [one["offsets"] for one in site.logged("positions_missing")]
    assert starts == [{f"{site.topic}/0": 0}, {f"{site.topic}/0": 3 * 20}]


@pytest.mark.slow
def test_a_request_that_was_acted_on_is_not_acted_on_again_for_a_lost_ledger(site: Any) -> None:
    site.deploy()
    site.start_worker()
    site.predict(10)
    site.predict(3, shift=60.0)
    site.start_daemon()
    site.eventually(lambda: site.requests() and site.requests()[0].state == "ended")
    (request,) = site.requests()
    assert site.acted() == [request.id]
    site.kill_daemon()
    first = decided(site)

    lose_ledger(site)
    site.start_daemon()
    site.eventually(lambda: site.requests() and site.requests()[0].state == "ended")
    (again,) = site.requests()
    assert (again.id, again.outcome, again.run) == (request.id, request.outcome, request.run)
    site.eventually(lambda: all(one["posted"] for one in site.told()))
    site.predict(1)
    site.eventually(lambda: site.windows() == 14)
    assert site.acted() == [request.id]
    judged, told, *_ = decided(site)
    # The reference outlived the ledger: the windows it was learned from are judged as well, by now.
    assert judged[5:13] == first[0][5:] and told[: len(first[1])] == first[1]
