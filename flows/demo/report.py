"""The report: everything that happened, made into the facts that are shown and kept."""

import time
from collections.abc import Sequence
from datetime import datetime

import msgspec
import numpy as np
import pandas as pd

from daemon.wire.prefect import PrefectApi
from flows.demo.evidence import Evidence, strayed
from flows.demo.facts import Facts, Request
from flows.demo.play import Play
from flows.demo.scoreboard import Metric, Scoreboard
from flows.demo.stage import Stage
from flows.demo.story import broken_promises
from flows.demo.stream import Stream
from flows.rows import LabelledRows
from flows.scoring import score
from flows.training import answers, fit_span
from monitors.settings import ModelSettings

SETTLE_SECONDS = 30.0
HOLDOUT_SHARE = 0.25


class Seconds(msgspec.Struct, frozen=True):
    """How long it took to set everything up, and to play."""

    setup: float
    loop: float


def facts_of(
    stage: Stage, stream: Stream, play: Play, board: Scoreboard, since: datetime, seconds: Seconds
) -> Facts:
    """Ask Prefect about each request, then add everything up."""
    with PrefectApi(stage.prefect_url) as api:
        evidence = _settled(api, stream, play, since)
        ui_url = api.ui_url
    requests = evidence.requests(play.asked.values(), stream)
    after = board.first_row_of_another()
    settings = stage.configuration.settings
    return Facts(
        broker=stage.broker,
        model=stream.model,
        source=stream.source,
        metric=board.metric,
        window_rows=stream.window_rows,
        records=play.records,
        judged_windows=play.status.windows if play.status else 0,
        episodes=play.status.episodes if play.status else 0,
        scores=board.windows(stream.window_rows),
        acts=stream.acts,
        requests=requests,
        runs=evidence.runs,
        kills=tuple(play.kills),
        metric_reference=reference_metric(settings, stream, board.metric),
        metric_drifted=board.live_over(drifted_rows(requests)),
        metric_after=None if after is None else board.live(after, len(board)),
        metric_never=None if after is None else board.never(after, len(board)),
        rows_after=0 if after is None else len(board) - after,
        seconds_setup=seconds.setup,
        seconds_loop=seconds.loop,
        prefect_api=stage.prefect_url,
        prefect_ui=ui_url,
        registry=stage.configuration.registry.tracking_uri,
        broken_promises=(
            *broken_promises(stream.acts, requests, play.kills),
            *strayed(requests, evidence.runs),
        ),
    )


def reference_metric(settings: ModelSettings, stream: Stream, metric: Metric) -> float:
    """
    What the first champion's recipe scores on reference rows it has not seen.

    The first champion itself is trained on all of them; here a model of the older three quarters
    answers the newest quarter.
    """
    rows = stream.reference
    nothing = [None] * len(rows)
    labelled = LabelledRows.sorted(
        pd.DataFrame([row.features for row in rows]),
        [row.label for row in rows],
        [float(number) for number in range(len(rows))],
        nothing,
        nothing,
    )
    cut = round(len(rows) * (1.0 - HOLDOUT_SHARE))
    model = fit_span(settings, labelled.between(0, cut))
    unseen = labelled.between(cut, len(rows))
    said = answers("reference", model.schema, model.estimator, unseen.features)
    return score(metric, np.asarray(unseen.labels), said)


def drifted_rows(requests: Sequence[Request]) -> list[tuple[int, int]]:
    """From where the drift was seen to where it was mended, for each promotion."""
    return [(request.since_row, request.asked_row) for request in requests if request.action == "promoted"]


def _settled(api: PrefectApi, stream: Stream, play: Play, since: datetime) -> Evidence:
    """A run's last state and the event feed come some seconds after the outcome."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        evidence = Evidence(api, stream.model, since)
        told = all(request.event_in_feed for request in evidence.requests(play.asked.values(), stream))
        if (told and evidence.ended) or time.monotonic() > deadline:
            return evidence
        time.sleep(0.5)
