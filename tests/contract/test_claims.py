"""One run acts on a request: the same promises over Prefect's variables and over files of one host."""

import threading
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flows.claims import LAPSE, AlreadyRetraining, Claims, FolderVariables, Variables, beating
from flows.errors import Fenced
from monitors.events import Outcome

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DONE = Outcome(action="promoted", sentence="0.931 against 0.874, CI +.03 to +.08", run="run-a")


class Alive(FolderVariables):
    """Files, where the runs named in `states` are in these states."""

    states: Mapping[str, str] = {}

    def run(self, run_id: str) -> Mapping[str, Any] | None:
        state = self.states.get(run_id, "RUNNING")
        return None if state == "deleted" else {"id": run_id, "state": {"type": state}}


@pytest.fixture(params=["folder", pytest.param("prefect", marks=pytest.mark.prefect)])
def variables(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Variables]:
    if request.param == "folder":
        yield Alive(tmp_path)
        return
    yield request.getfixturevalue("prefect_api")


@pytest.fixture
def asked() -> str:
    return str(uuid.uuid4())


def claims(variables: Variables, seconds: float = 0.0) -> Claims:
    return Claims(variables, lambda: NOW + timedelta(seconds=seconds))


def test_the_first_run_claims_and_enters_again(variables: Variables, asked: str) -> None:
    first = claims(variables).claim(asked, "run-a")
    assert (first.run, first.fence, first.outcome) == ("run-a", 1, None)
    assert claims(variables, 9999).claim(asked, "run-a") == first


def test_the_variable_is_named_and_filled_as_the_daemon_reads_it(variables: Variables, asked: str) -> None:
    made = claims(variables).claim(asked, "run-a")
    claims(variables, 5).finish(made, DONE)
    value = variables.read_variable(f"retrain-daemon-claim-{asked}-1")
    assert value is not None
    assert (value["request"], value["run"], value["fence"]) == (asked, "run-a", 1)
    assert value["heartbeat"] == "2026-01-01T00:00:05Z"
    assert (value["outcome"]["action"], value["outcome"]["sentence"]) == ("promoted", DONE.sentence)


def test_a_second_run_sees_who_acts(variables: Variables, asked: str) -> None:
    first = claims(variables).claim(asked, "run-a")
    assert claims(variables, 10).claim(asked, "run-b") == first
    claims(variables).require(first)


def test_a_lapsed_heartbeat_is_taken_over_and_the_old_run_is_fenced(variables: Variables, asked: str) -> None:
    first = claims(variables).claim(asked, "run-a")
    beaten = claims(variables, 100).beat(first)
    late = LAPSE.total_seconds() + 90
    assert claims(variables, late).claim(asked, "run-b") == beaten
    taken = claims(variables, late + 20).claim(asked, "run-b")
    assert (taken.run, taken.fence) == ("run-b", 2)
    claims(variables).require(taken)
    with pytest.raises(Fenced, match="run-b has taken the request over"):
        claims(variables).require(first)


def test_a_run_that_has_an_outcome_is_never_taken_over(variables: Variables, asked: str) -> None:
    first = claims(variables).claim(asked, "run-a")
    finished = claims(variables).finish(first, DONE)
    assert claims(variables, 99_999).claim(asked, "run-b") == finished


def test_of_many_runs_at_once_one_claims(tmp_path: Path, asked: str) -> None:
    holders: list[str] = []

    def attempt(run: str) -> None:
        holders.append(claims(Alive(tmp_path)).claim(asked, run).run)

    threads = [threading.Thread(target=attempt, args=(f"run-{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(holders) == 8 and len(set(holders)) == 1


@pytest.mark.parametrize(
    ("state", "taken"),
    [("CRASHED", True), ("COMPLETED", True), ("FAILED", True), ("RUNNING", False), ("deleted", False)],
)
def test_only_a_run_that_is_over_is_taken_over_while_its_heart_beats(
    tmp_path: Path, asked: str, state: str, taken: bool
) -> None:
    files = Alive(tmp_path)
    files.states = {"run-a": state}
    claims(files).claim(asked, "run-a")
    assert (claims(files).claim(asked, "run-b").run == "run-b") == taken


def test_a_heartbeat_is_kept_up_by_a_thread_that_ends_before_the_outcome(
    tmp_path: Path, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.claims.HEARTBEAT_SECONDS", 0.01)
    made = claims(Alive(tmp_path)).claim(asked, "run-a")
    before = threading.active_count()
    with beating(made, lambda: Alive(tmp_path)):
        deadline = datetime.now(UTC) + timedelta(seconds=60)
        while claims(Alive(tmp_path)).holder(asked) == made and datetime.now(UTC) < deadline:
            threading.Event().wait(0.01)
    assert threading.active_count() == before
    beaten = claims(Alive(tmp_path)).holder(asked)
    assert beaten is not None and beaten.heartbeat > made.heartbeat


def test_an_endless_message_fits_into_a_variable(variables: Variables, asked: str) -> None:
    made = claims(variables).claim(asked, "run-a")
    claims(variables).finish(made, Outcome(action="failed", sentence="x" * 100_000))
    held = claims(variables).holder(asked)
    assert held is not None and held.outcome is not None and held.outcome.sentence.startswith("xxx")


def test_one_host_retrains_a_model_once_at_a_time(tmp_path: Path) -> None:
    with FolderVariables(tmp_path).only_run_here("fraud"):
        with pytest.raises(AlreadyRetraining, match="fraud is being retrained"):
            FolderVariables(tmp_path).only_run_here("fraud").__enter__()
        with FolderVariables(tmp_path).only_run_here("churn"):
            pass
    with FolderVariables(tmp_path).only_run_here("fraud"):
        pass
