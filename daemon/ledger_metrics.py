"""Ledger metrics: where models, requests and events stand, read when Prometheus asks."""

import threading
from collections import Counter as Tally
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, get_args, get_type_hints

import msgspec
import structlog
from prometheus_client.core import GaugeMetricFamily

from daemon.account import FATES, account_of
from daemon.ledger import Ledger, LedgerError, RequestRow, now
from daemon.ownership import Ownership, Term
from monitors.episodes import ModelState, Stage
from monitors.events import Outcome
from monitors.settings import ModelSettings

log = structlog.get_logger()

OUTCOMES: tuple[str, ...] = get_args(get_type_hints(Outcome)["action"])
# How long a scrape waits for one that is still reading the ledger.
READING_SECONDS = 5.0


class LedgerMetrics:
    """
    What the ledger knows, so that a restart forgets none of it.

    Only the owner tells, and of what it owns: several members may share a ledger. One reading at a
    time: while the ledger hangs, what comes from elsewhere is still told.
    """

    def __init__(
        self,
        ledger: Ledger,
        models: Mapping[str, ModelSettings],
        start_deadline_seconds: float,
        owner: Ownership,
        prefect_reachable: Callable[[], bool],
    ) -> None:
        self._ledger = ledger
        self._configured = models
        self._models: Collection[str] = models
        # Whose events count; None: everybody's, those of models that are configured no more included.
        self._in_line: frozenset[str] | None = None
        self._deadline = start_deadline_seconds
        self._owner = owner
        self._prefect_reachable = prefect_reachable
        self._reading = threading.Lock()

    def describe(self) -> list[Any]:
        """None by name: prometheus-client would ask the ledger for them."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Everything, or what is left of it where the ledger does not answer."""
        if (term := self._owner.term) is None:
            return
        yield _gauge("prefect_reachable", "Whether Prefect answered lately.", {(): self._prefect_reachable()})
        families: list[GaugeMetricFamily] = []
        if self._reading.acquire(timeout=READING_SECONDS):
            try:
                self._choose(term)
                families = [
                    *self._outbox(),
                    *self._states(),
                    *self._scores(),
                    *self._budgets(),
                    *self._requests(),
                ]
            except LedgerError as error:
                log.warning("metrics_incomplete", error=str(error))
            finally:
                self._reading.release()
        yield _gauge("ledger_readable", "Whether the ledger could be read just now.", {(): bool(families)})
        yield from families

    def _choose(self, term: Term) -> None:
        if term.indexes is not None:
            ours = term.models(self._ledger.homes(), self._configured) or frozenset()
            self._models, self._in_line = [one for one in self._configured if one in ours], ours

    def _outbox(self) -> Iterator[GaugeMetricFamily]:
        oldest = self._ledger.waiting_events(1, self._in_line)
        age = _age(msgspec.json.decode(oldest[0].body)["occurred"]) if oldest else 0.0
        waiting, refused = (
            self._ledger.waiting_count(self._in_line),
            self._ledger.refused_count(self._in_line),
        )
        yield _gauge("outbox_waiting_events", "Events that Prefect has not taken yet.", {(): waiting})
        yield _gauge("outbox_refused_events", "Events that Prefect will never take.", {(): refused})
        yield _gauge("outbox_oldest_event_age_seconds", "Age of the oldest event that waits.", {(): age})

    def _states(self) -> Iterator[GaugeMetricFamily]:
        states = self._known()
        silences = self._ledger.silences()
        silenced = {(model,): model in silences and silences[model] > now() for model in self._models}
        stages = {
            (model, str(stage)): state.stage is stage for model, state in states.items() for stage in Stage
        }
        serving = {(model, state.serving): 1 for model, state in states.items() if state.serving}
        broken = {(model,): state.serving in state.broken for model, state in states.items()}
        yield _gauge("stage", "1 for where a model's episode stands.", stages, "model", "stage")
        yield _gauge("serving_info", "The version in service.", serving, "model", "version")
        yield _gauge("data_broken", "Whether the data of the version in service is broken.", broken, "model")
        yield _gauge("silenced", "Whether somebody asked that nothing be requested.", silenced, "model")

    def _scores(self) -> Iterator[GaugeMetricFamily]:
        shares, ends, scores = {}, {}, {}
        for model, state in self._known().items():
            if (window := self._ledger.newest_window(model, state.serving)) is not None:
                shares[model,] = window["drift_share"]
                ends[model,] = datetime.fromisoformat(window["end"]).timestamp()
            if (window := self._ledger.newest_window(model, state.serving, labelled=True)) is not None:
                scores[model, window["metric"]] = window["score"]
        share = "Share of the columns that drifted, in the last window scored of the version in service."
        end = "Event time at which that window ended."
        score = "How right the version in service was, in its last window with labels."
        yield _gauge("drift_share", share, shares, "model")
        yield _gauge("last_window_end_timestamp_seconds", end, ends, "model")
        yield _gauge("performance_score", score, scores, "model", "metric")

    def _budgets(self) -> Iterator[GaugeMetricFamily]:
        known = {
            model: account
            for model, state in self._known().items()
            if (account := account_of(self._ledger, model, self._configured[model].policy, state)) is not None
        }
        alarms = {(model, fate): getattr(account, fate) for model, account in known.items() for fate in FATES}
        evidence = {
            (model, signal): share
            for model, account in known.items()
            for signal, share in account.evidence.items()
        }

        def each(name: str) -> dict[tuple[str], float]:
            return {(model,): getattr(account, name) for model, account in known.items()}

        certified = {(model,): account.certainty == "certified" for model, account in known.items()}
        stated = "Windows that may lie between two needless alarms, as stated."
        windows = "Windows in the ledger that count for the budget: those of the version in service."
        exceeded = "Whether there were more needless alarms in these windows than a kept budget explains."
        yield _gauge("budget_stated_windows", stated, each("stated"), "model")
        yield _gauge("budget_counted_windows", windows, each("windows"), "model")
        yield _gauge("budget_alarms", "Episodes opened in these windows.", alarms, "model", "fate")
        yield _gauge("budget_exceeded", exceeded, each("exceeded"), "model")
        yield _gauge("budget_certified", "Whether the budget is certified.", certified, "model")
        yield _gauge(
            "budget_evidence_share", "Evidence now, as a share of the budget.", evidence, "model", "signal"
        )

    def _requests(self) -> Iterator[GaugeMetricFamily]:
        rows = [row for row in self._ledger.requests() if row.model in self._models]
        keys = [
            *((state, "") for state in ("waiting", "posted", "confirmed")),
            *(("ended", action) for action in OUTCOMES),
        ]
        found = Tally((row.model, row.state, _outcome(row)) for row in rows)
        counts = {(model, *key): found[model, *key] for model in self._models for key in keys}
        late = Tally((row.model,) for row in rows if self._unconfirmed(row))
        held = Tally((row.model,) for row in rows if row.held)
        unserved = {(model,): self._unserved(model, rows) for model in self._models}
        yield _gauge("requests", "Retraining requests in the ledger.", counts, "model", "state", "outcome")
        yield _gauge(
            "unconfirmed_requests",
            "Requests that were posted, and of which no run is proved to have started in time.",
            {(model,): late[model,] for model in self._models},
            "model",
        )
        yield _gauge(
            "held_requests",
            "Requests that wait for an operator: `retrain-daemon status` says for what.",
            {(model,): held[model,] for model in self._models},
            "model",
        )
        yield _gauge(
            "promotion_unserved",
            "Whether the version promoted last was not seen in the log in time, and was not since.",
            unserved,
            "model",
        )

    def _known(self) -> dict[str, ModelState]:
        """The configured models as of the last checkpoint; a new one stands at the beginning."""
        states = self._ledger.model_states()
        return {model: states.get(model, ModelState()) for model in self._models}

    def _unserved(self, model: str, rows: Sequence[RequestRow]) -> bool:
        promoted = [row for row in rows if row.model == model and _outcome(row) == "promoted"]
        if not promoted or promoted[-1].served != "unserved" or promoted[-1].outcome is None:
            return False
        return promoted[-1].outcome.model_version not in self._ledger.versions_seen(model)

    def _unconfirmed(self, row: RequestRow) -> bool:
        if row.state != "posted" or row.posted_at is None:
            return False
        return row.posts > 1 or _age(row.posted_at.isoformat()) > self._deadline


def _gauge(name: str, text: str, values: Mapping[Any, float], *labels: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"retrain_daemon_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, float(value))
    return family


def _outcome(row: RequestRow) -> str:
    return "" if row.outcome is None else row.outcome.action


def _age(time_: str) -> float:
    return max(0.0, (now() - datetime.fromisoformat(time_)).total_seconds())
