"""The daemon: puts the parts together, starts them, and takes them down in order."""

import os
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from daemon.config import Config
from daemon.delivery import Delivery
from daemon.engines import StoredEngines
from daemon.evidently_worker import EvidentlyWorker
from daemon.health import Health
from daemon.http import HttpServer
from daemon.ledger import Ledger
from daemon.ledger_metrics import LedgerMetrics
from daemon.loop import Loop, LoopSettings
from daemon.metrics import Metrics
from daemon.replay import rows_of
from daemon.reviews import EvidentlyReviews
from daemon.status import ledger_status
from daemon.wire.references import ReferenceStore
from monitors.decoding import make_decoder
from monitors.drift import WindowRows
from monitors.episodes import Judged

if TYPE_CHECKING:
    from daemon.ports import DeadLetters, Source

log = structlog.get_logger()


def run(config: Config) -> int:
    """Run until SIGTERM or SIGINT: the first finishes the cycle, the second ends the process at once."""
    stop = threading.Event()
    _obey_signals(stop)
    Daemon(config).run(stop)
    return 0


class Daemon:
    """All parts of the process, in the order in which they are needed."""

    def __init__(self, config: Config) -> None:
        # Prefect's address and Kafka's topics are looked at before anything is promised.
        from daemon.wire.kafka import KafkaSource
        from daemon.wire.kafka_dead_letters import KafkaDeadLetters

        self._config = config
        self._ledger = Ledger(config.ledger.url)
        # What a damaged page led to could not be told from a decision.
        self._ledger.inspect()
        self._worker = EvidentlyWorker()
        store = ReferenceStore(config.registry.references_url)
        self._engines = StoredEngines(store, config.models, config.drift.engine, self._worker)
        self._decoder = make_decoder(
            config.mappings, config.kafka.labels_topic, list(config.models), config.limits
        )
        folder = Path(config.reports.folder)
        health = Health()
        self._metrics = Metrics(config.models, config.mappings, health)
        self._http = HttpServer(
            config.http.host, config.http.port, folder, self._status, health, self._metrics.render
        )
        self._reviews = EvidentlyReviews(
            self._engines,
            self._ledger,
            folder,
            config.reports.url.rstrip("/") or f"{self._http.url}/reports",
            lambda news: self._loop.news.put(news),
            self._reread,
            self._metrics.reviewed,
        )
        self._source: Source = KafkaSource(config.kafka)
        self._dead_letters: DeadLetters = KafkaDeadLetters(config.kafka)
        self._loop = Loop(
            _loop_settings(config),
            self._source,
            self._decoder,
            self._dead_letters,
            self._ledger,
            self._engines,
            self._reviews,
            self._metrics,
        )
        self._delivery = Delivery(
            self._ledger,
            config.prefect,
            config.models,
            self._loop.owner,
            self._loop.news.put,
            config.ledger.retention_seconds,
        )
        self._metrics.registry.register(
            LedgerMetrics(
                self._ledger,
                config.models,
                config.prefect.start_deadline_seconds,
                self._loop.owner,
                lambda: self._delivery.reachable,
            )
        )

    def run(self, stop: threading.Event) -> None:
        """Start, loop, and stop; what is under way is finished or left to the next start."""
        log.info(
            "daemon_started",
            mode=self._config.mode,
            models=list(self._config.models),
            topics=list(self._config.mappings),
            http=self._http.url,
        )
        self._http.start()
        self._reviews.start()
        self._delivery.start()
        try:
            self._loop.run(stop)
        finally:
            log.info("daemon_stopping", waiting_for="delivery, reviews, Kafka")
            self._delivery.close()
            self._reviews.close()
            self._worker.close()
            self._dead_letters.close()
            self._source.close()
            self._http.close()
            self._ledger.close()
        log.info("daemon_stopped")

    def _status(self) -> dict[str, Any]:
        state = "running" if self._loop.owner.is_set() else "standby"
        return {
            "state": state,
            "mode": self._config.mode,
            "prefect_reachable": self._delivery.reachable,
            **ledger_status(self._ledger, self._config.models),
        }

    def _reread(self, judged: Judged) -> WindowRows:
        from daemon.wire.kafka import read_ranges

        window = self._config.models[judged.model].window
        return rows_of(
            judged,
            lambda spans: read_ranges(self._config.kafka, spans),
            self._decoder,
            window.rows or window.max_rows,
        )


def _loop_settings(config: Config) -> LoopSettings:
    return LoopSettings(
        group=config.kafka.group,
        member=f"{socket.gethostname()}:{os.getpid()}",
        mode=config.mode,
        models=config.models,
        limits=config.limits,
        labels_topic=config.kafka.labels_topic,
        checkpoint_seconds=config.ledger.checkpoint_seconds,
        sharing=config.kafka.sharing,
    )


def _obey_signals(stop: threading.Event) -> None:
    """Handlers only set a flag: closing a consumer inside one breaks it."""

    def handle(number: int, _: object) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
