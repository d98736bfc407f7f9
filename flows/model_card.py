"""The model card: what a retraining came to, as markdown for Prefect's artifact and the registry."""

from collections.abc import Sequence

import msgspec

from flows.verdict import Verdict, interval
from monitors.events import OffsetRange, Outcome, RetrainRequest
from monitors.settings import FlowSettings


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """All that a card tells; what is empty is left out."""

    settings: FlowSettings
    outcome: Outcome
    request_id: str
    request: RetrainRequest | None = None
    verdict: Verdict | None = None
    version: str = ""
    tags: dict[str, str] = {}
    run_url: str = ""
    tracking_uri: str = ""
    registered_name: str = ""

    def markdown(self) -> str:
        """The verdict first, then the numbers, where to look further, and how to get the model."""
        parts = [self._headline(), self._scores(), self._training(), self._links(), self._retrieval()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _headline(self) -> str:
        outcome = self.outcome
        champion = outcome.champion_before or "none"
        return "\n".join(
            [
                f"# {self.settings.model}: {outcome.action}",
                "",
                *table(
                    ("Verdict", "Gate", "Challenger", "Champion before"),
                    [(f"**{outcome.action}**", outcome.sentence, self.version or "none", champion)],
                ),
            ]
        )

    def _scores(self) -> str:
        verdict = self.verdict
        if verdict is None:
            return ""
        rows = [
            ("challenger", _number(verdict.challenger_score)),
            (f"champion ({verdict.champion or 'none'})", _number(verdict.champion_score)),
        ]
        if verdict.low is not None and verdict.high is not None:
            rows.append(("improvement, positive is better", f"CI {interval(verdict.low, verdict.high)}"))
        checks = [
            (check.name, "passed" if check.passed else "**failed**", check.detail) for check in verdict.checks
        ]
        title = f"## Scores: {verdict.metric} on {verdict.rows} later, unseen rows"
        lines = [title, "", *table(("Model", "Score"), rows), *_candidates(verdict)]
        return "\n".join([*lines, "", *table(("Check", "Result", "Detail"), checks)])

    def _training(self) -> str:
        told = [
            ("span", "span"),
            ("training rows", "training_rows"),
            ("hyperparameters", "parameters"),
            ("data fingerprint (SHA-256)", "data_fingerprint"),
            ("git commit", "git_commit"),
            ("constraints (SHA-256)", "constraints_digest"),
            ("reference (SHA-256)", "reference_digest"),
        ]
        rows = [(name, f"`{self.tags[key]}`") for name, key in told if self.tags.get(key)]
        return "\n".join(["## Training", "", *table(("What", "Value"), rows)]) if rows else ""

    def _links(self) -> str:
        offsets = self.tags.get("offsets", "")
        ranges = msgspec.json.decode(offsets, type=list[OffsetRange]) if offsets else []
        rows = [
            ("request", f"`{self.request_id}`"),
            ("run", _link(self.outcome.run, self.run_url)),
            ("drift report", _link("report", self.request.report_url) if self.request else ""),
            ("asked because", self.request.reason if self.request else "asked for by hand"),
            ("registry version", f"`{self.registered_name}` {self.version}" if self.version else ""),
            ("rows read", ", ".join(_range(one) for one in ranges)),
        ]
        return "\n".join(["## Links", "", *table(("What", "Where"), [row for row in rows if row[1]])])

    def _retrieval(self) -> str:
        if not self.tracking_uri:
            return ""
        code = retrieval(self.tracking_uri, self.registered_name)
        return f"## Get the champion\n\n```python\n{code}```"


def _candidates(verdict: Verdict) -> list[str]:
    if len(verdict.candidates) < 2:
        return []
    rows = [
        (
            f"**{one.source}**" if place == verdict.chosen else one.source,
            _number(one.score),
            "" if one.low is None or one.high is None else interval(one.low, one.high),
            one.failed.detail if one.failed else "",
        )
        for place, one in enumerate(verdict.candidates)
    ]
    return ["", *table(("Candidate", "Score", "Improvement", "Failed"), rows)]


def retrieval(tracking_uri: str, registered_name: str) -> str:
    """Python that loads the champion with MLflow alone, by its number so that it can be logged."""
    return f'''import mlflow

mlflow.set_tracking_uri("{tracking_uri}")
version = mlflow.MlflowClient().get_model_version_by_alias("{registered_name}", "champion").version
model = mlflow.sklearn.load_model(f"models:/{registered_name}/{{version}}")
'''


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """
    A markdown table, line by line; nothing in a cell can break out of it.

    >>> table(("a", "b"), [("1|2", "3")])
    ['| a | b |', '|---|---|', '| 1\\\\|2 | 3 |']
    """
    return [_row(head), "|" + "---|" * len(head), *(_row(row) for row in rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.6g}"


def _link(text: str, url: str) -> str:
    return f"[{text}]({url})" if url else (f"`{text}`" if text and text != "report" else "")


def _range(read: OffsetRange) -> str:
    return f"`{read.topic}[{read.partition}] {read.start} to {read.end}`"
