"""What a demo reports: the promises it checks, the one JSON object, the page and the options."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flows.demo.configuration import Configuration, model_settings
from flows.demo.evidence import row_of, strayed
from flows.demo.facts import Facts, Kill, Request, Run
from flows.demo.options import parse
from flows.demo.parcels import parcels
from flows.demo.scoreboard import Scoreboard
from flows.demo.story import broken_promises
from flows.demo.stream import Act
from flows.demo.summary import summary_page, write_summary
from monitors.settings import KafkaSettings, PrefectSettings

# The names of issue and README: a public contract.
JSON_KEYS = [
    "broker",
    "records",
    "windows",
    "episodes",
    "requests",
    "runs_by_automation",
    "runs_direct",
    "promoted",
    "refused",
    "kills",
    "metric",
    "metric_reference",
    "metric_drifted",
    "metric_after",
    "metric_never",
    "rows_after",
    "seconds_setup",
    "seconds_loop",
    "prefect_api",
    "run_ids",
]


def run(number: int, request: str, created_by: str = "automation") -> Run:
    return msgspec.convert(
        {"id": f"run-{number}", "name": "", "request": request, "created_by": created_by, "state": ""}, Run
    )


def request(number: int, row: int, action: str, **fields: Any) -> Request:
    known: dict[str, Any] = {
        "id": f"r{number}",
        "episode": f"e{number}",
        "episode_number": number,
        "attempt": 1,
        "asked_row": row,
        "since_row": row - 30,
        "action": action,
        "sentence": "0.880 against 0.512, CI +.31 to +.42",
        "event_in_feed": True,
        "runs": (run(number, f"r{number}"),),
    }
    return Request(**{**known, **fields})


def facts(requests: tuple[Request, ...] = (), **fields: Any) -> Facts:
    board = Scoreboard("accuracy")
    board.add("1", labels=[1] * 20, live=[1] * 20, never=[1] * 20)
    board.add("2", labels=[1] * 20, live=[1] * 20, never=[0] * 20)
    known: dict[str, Any] = {
        "broker": "development broker",
        "model": "parcels",
        "source": "rows & <columns>",
        "metric": "accuracy",
        "window_rows": 10,
        "records": 40,
        "judged_windows": 4,
        "episodes": len(requests),
        "scores": board.windows(10),
        "acts": (),
        "requests": requests,
        "runs": tuple(run for one in requests for run in one.runs),
        "kills": (),
        "metric_reference": 1.0,
        "metric_drifted": None,
        "metric_after": 1.0,
        "metric_never": 0.0,
        "rows_after": 20,
        "seconds_setup": 1.23,
        "seconds_loop": 4.56,
        "prefect_api": "http://127.0.0.1:1/api",
        "prefect_ui": "http://127.0.0.1:1",
        "registry": "sqlite:///mlflow.db",
    }
    return Facts(**{**known, **fields})


ACTS = (
    Act(1, "Calm", "", 0, 100, "silence"),
    Act(2, "Harmless", "", 100, 200, "refused"),
    Act(3, "Real", "", 200, 300, "promoted"),
    Act(4, "Killed", "", 300, 400, "killed"),
)
AS_TOLD = (request(1, 130, "refused"), request(2, 230, "promoted"), request(3, 330, "promoted"))


def test_a_story_that_went_as_told_breaks_no_promise() -> None:
    assert broken_promises(ACTS, AS_TOLD, [Kill(330, "r3")]) == ()


@pytest.mark.parametrize(
    ("requests", "kills", "said"),
    [
        ((request(9, 100, "refused"), *AS_TOLD), [Kill(330, "r3")], "Act 1"),
        ((request(1, 130, "promoted"), *AS_TOLD[1:]), [Kill(330, "r3")], "Act 2"),
        ((AS_TOLD[0], AS_TOLD[2]), [Kill(330, "r3")], "Act 3"),
        ((*AS_TOLD[:2], request(3, 330, "failed")), [Kill(330, "r3")], "Act 4"),
        (AS_TOLD, [], "not killed"),
        (AS_TOLD, [Kill(230, "r2")], "not killed"),
        ((*AS_TOLD[:2], request(3, 330, "promoted", runs=())), [Kill(330, "r3")], "0 runs"),
    ],
)
def test_whatever_did_not_happen_as_told_is_said(
    requests: tuple[Request, ...], kills: list[Kill], said: str
) -> None:
    sentences = broken_promises(ACTS, requests, kills)
    assert len(sentences) == 1
    assert said in sentences[0]


def test_evidence_that_strays_from_one_request_one_run_is_said() -> None:
    assert strayed(AS_TOLD, [run(1, "r1"), run(2, "r2"), run(3, "r3")]) == ()
    twice = request(1, 130, "refused", runs=(run(1, "r1"), run(2, "r1")))
    assert "has 2 runs" in strayed([twice], twice.runs)[0]
    unseen = request(1, 130, "refused", event_in_feed=False)
    assert "not in the feed" in strayed([unseen], unseen.runs)[0]
    assert "belongs to no request" in strayed([], [run(1, "")])[0]
    direct = request(1, 130, "refused", runs=(run(1, "r1", "direct"),))
    assert "not created by an automation" in strayed([direct], direct.runs)[0]


def test_a_row_is_found_by_its_event_time() -> None:
    stream = parcels(reference_rows=30, window_rows=10)
    assert [row_of(stream, stream.event_time(row)) for row in (0, 1, 249)] == [0, 1, 249]


def test_the_json_object_has_the_promised_keys_in_order() -> None:
    told = facts(AS_TOLD).json_object()
    assert list(told) == JSON_KEYS
    assert (told["requests"], told["promoted"], told["refused"]) == (3, 2, 1)
    assert (told["runs_by_automation"], told["runs_direct"]) == (3, 0)
    assert told["run_ids"] == ["run-1", "run-2", "run-3"]


def test_runs_are_counted_by_who_created_them() -> None:
    mixed = facts(runs=(run(1, "a"), run(2, "b", "direct"))).json_object()
    assert (mixed["runs_by_automation"], mixed["runs_direct"]) == (1, 1)


def test_without_a_promotion_there_is_nothing_to_compare_with() -> None:
    told = facts(metric_after=None, metric_never=None, rows_after=0).json_object()
    assert (told["metric_after"], told["metric_never"], told["rows_after"]) == (None, None, 0)
    assert json.loads(json.dumps(told)) == told


def test_the_page_loads_nothing_and_escapes_what_it_was_given(tmp_path: Path) -> None:
    page = write_summary(facts(AS_TOLD, acts=ACTS, kills=(Kill(330, "r3"),)), tmp_path).read_text()
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*['"]?\s*(?:https?:|//)""", page)
    assert "<script" not in page
    assert "rows &amp; &lt;columns&gt;" in page
    assert "prefers-color-scheme: dark" in page
    assert page.count('class="request promoted"') == 3  # two of them, and one in the legend
    assert "0.880 against 0.512, CI +.31 to +.42" in page


def test_a_page_without_requests_or_windows_is_a_page_too() -> None:
    page = summary_page(facts(scores=(), metric_after=None, metric_never=None))
    assert "no window drifted" in page
    assert "nan" not in page


def test_a_promise_that_was_broken_is_on_the_page() -> None:
    assert "the run was too quick" in summary_page(facts(broken_promises=("the run was too quick",)))


def test_the_scoreboard_keeps_both_models_apart() -> None:
    board = Scoreboard("mae")
    board.add("1", labels=[1.0, 2.0], live=[1.0, 2.0], never=[2.0, 2.0])
    board.add("2", labels=[3.0], live=[5.0], never=[3.0])
    assert (board.live(0, 3), board.never(0, 3)) == (2 / 3, 1 / 3)
    assert board.first_row_of_another() == 2
    assert board.live_over([(0, 1), (0, 2), (2, 9)]) == 2 / 3


def test_classes_are_the_same_class_in_every_spelling() -> None:
    board = Scoreboard("accuracy")
    board.add("1", labels=["1", True, 0, "no"], live=[1, 1, 0.0, "no"], never=[0, 0, 1, "yes"])
    assert (board.live(0, 4), board.never(0, 4)) == (1.0, 0.0)


def test_the_configuration_file_says_what_the_flow_is_told(tmp_path: Path) -> None:
    from daemon.config import load

    stream = parcels(reference_rows=300, window_rows=200)
    configuration = Configuration(
        folder=tmp_path,
        model=stream.model,
        settings=model_settings(stream, "accuracy"),
        kafka=KafkaSettings(bootstrap_servers="127.0.0.1:1", topic="a", labels_topic="b"),
        prefect=PrefectSettings(api_url="http://127.0.0.1:1/api"),
        http_port=8_000,
    )
    path = configuration.write()
    assert tomllib.loads(path.read_text())["mode"] == "retrain"
    assert load(path, {}).flow_settings(stream.model) == configuration.flow_settings()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--label", "y"],
        ["--data", "x.csv"],
        ["--window-rows", "10"],
        ["--window-rows", "0", "--data", "x.csv", "--label", "y"],
        ["--metric", "mae"],
        ["--pace", "hurry"],
    ],
)
def test_arguments_that_cannot_be_meant_end_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2


def test_ignored_columns_are_a_list() -> None:
    options = parse(["--data", "x.csv", "--label", "y", "--ignore", "a,b,"])
    assert options.ignore == ("a", "b")
    assert (options.pace, options.json, options.metric) == ("wait", False, "auto")
