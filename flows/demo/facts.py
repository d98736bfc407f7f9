"""Facts: what happened in a demo, as the daemon and Prefect tell it, and what is reported of it."""

from typing import Any, Literal

import msgspec

from flows.demo.scoreboard import Metric, WindowScore
from flows.demo.stream import Act


class Run(msgspec.Struct, frozen=True):
    """One flow run of the deployment; `created_by` is what Prefect's API says of it."""

    id: str
    name: str
    request: str
    created_by: Literal["automation", "direct"]
    state: str
    ended: bool = True
    url: str = ""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One retraining request and what came of it; rows are live row numbers."""

    id: str
    episode: str
    episode_number: int
    attempt: int
    asked_row: int
    since_row: int
    action: str
    sentence: str = ""
    model_version: str = ""
    drift_share: float | None = None
    drifted_columns: tuple[str, ...] = ()
    event_in_feed: bool = False
    event_url: str = ""
    report_url: str = ""
    runs: tuple[Run, ...] = ()


class Kill(msgspec.Struct, frozen=True):
    """One `kill -9` of the daemon, at a row, with a request posted and not yet confirmed."""

    row: int
    request: str


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All of it; `broken_promises` says in words what did not happen as an act had told."""

    broker: str
    model: str
    source: str
    metric: Metric
    window_rows: int
    records: int
    judged_windows: int
    episodes: int
    scores: tuple[WindowScore, ...]
    acts: tuple[Act, ...]
    requests: tuple[Request, ...]
    runs: tuple[Run, ...]
    kills: tuple[Kill, ...]
    metric_reference: float | None
    metric_drifted: float | None
    metric_after: float | None
    metric_never: float | None
    rows_after: int
    seconds_setup: float
    seconds_loop: float
    prefect_api: str
    prefect_ui: str
    registry: str
    broken_promises: tuple[str, ...] = ()

    @property
    def promoted(self) -> tuple[Request, ...]:
        """The requests whose challenger became the champion."""
        return tuple(request for request in self.requests if request.action == "promoted")

    @property
    def refused(self) -> tuple[Request, ...]:
        """The requests whose challenger was not better."""
        return tuple(request for request in self.requests if request.action == "refused")

    def json_object(self) -> dict[str, Any]:
        """The one object that `--json` prints; a public contract."""
        return {
            "broker": self.broker,
            "records": self.records,
            "windows": self.judged_windows,
            "episodes": self.episodes,
            "requests": len(self.requests),
            "runs_by_automation": sum(run.created_by == "automation" for run in self.runs),
            "runs_direct": sum(run.created_by == "direct" for run in self.runs),
            "promoted": len(self.promoted),
            "refused": len(self.refused),
            "kills": len(self.kills),
            "metric": self.metric,
            "metric_reference": _rounded(self.metric_reference),
            "metric_drifted": _rounded(self.metric_drifted),
            "metric_after": _rounded(self.metric_after),
            "metric_never": _rounded(self.metric_never),
            "rows_after": self.rows_after,
            "seconds_setup": round(self.seconds_setup, 1),
            "seconds_loop": round(self.seconds_loop, 1),
            "prefect_api": self.prefect_api,
            "run_ids": [run.id for run in self.runs],
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
