"""The card opens with the verdict, and nothing that it quotes breaks out of its place."""

from flows.model_card import Card, retrieval
from flows.verdict import Check, Verdict
from monitors.events import Outcome
from monitors.settings import FlowSettings, KafkaSettings, LimitSettings, ModelSettings, RegistrySettings

SETTINGS = FlowSettings(
    model="fraud",
    settings=ModelSettings(),
    kafka=KafkaSettings(),
    fields={},
    limits=LimitSettings(),
    registry=RegistrySettings(),
)
VERDICT = Verdict(
    action="promoted",
    sentence="0.931 against 0.874, CI +.03 to +.08",
    metric="accuracy",
    rows=336,
    challenger_score=0.931,
    champion_score=0.874,
    champion="version 4",
    low=0.031,
    high=0.079,
    checks=(Check("rows", True, "336 holdout rows, 100 needed"),),
)


def card(sentence: str = VERDICT.sentence, verdict: Verdict | None = VERDICT, uri: str = "") -> str:
    outcome = Outcome(action="promoted", sentence=sentence, run="run-a", champion_before="4")
    made = Card(
        settings=SETTINGS,
        outcome=outcome,
        request_id="request-1",
        verdict=verdict,
        version="5",
        tags={
            "git_commit": "abc",
            "offsets": '[{"topic":"predictions","partition":1,"start":7,"end":99}]',
        },
        run_url="http://127.0.0.1:4200/runs/flow-run/run-a",
        tracking_uri=uri,
        registered_name="fraud",
    )
    return made.markdown()


def test_the_verdict_comes_first() -> None:
    lines = card().splitlines()
    assert lines[0] == "# fraud: promoted"
    assert lines[2] == "| Verdict | Gate | Challenger | Champion before |"
    assert lines[4] == "| **promoted** | 0.931 against 0.874, CI +.03 to +.08 | 5 | 4 |"


def test_scores_links_and_what_it_was_made_from_follow() -> None:
    text = card()
    assert "## Scores: accuracy on 336 later, unseen rows" in text
    assert "| champion (version 4) | 0.874 |" in text
    assert "| improvement, positive is better | CI +.03 to +.08 |" in text
    assert "| rows | passed | 336 holdout rows, 100 needed |" in text
    assert "| run | [run-a](http://127.0.0.1:4200/runs/flow-run/run-a) |" in text
    assert "| rows read | `predictions[1] 7 to 99` |" in text
    assert "| git commit | `abc` |" in text


def test_a_message_of_many_lines_stays_in_its_cell() -> None:
    lines = card("broken | pipe\n# and a title").splitlines()
    assert lines[4] == "| **promoted** | broken \\| pipe # and a title | 5 | 4 |"


def test_without_scores_or_registry_those_parts_are_left_out() -> None:
    text = card(verdict=None)
    assert "## Scores" not in text and "```" not in text


def test_the_snippet_is_python_that_names_the_registry() -> None:
    code = retrieval("sqlite:////srv/mlflow.db", "fraud")
    compile(code, "snippet", "exec")
    assert f"```python\n{code}```" in card(uri="sqlite:////srv/mlflow.db")
