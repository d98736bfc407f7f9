"""The stage: every process a demo needs, started privately and surely stopped."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import msgspec

from daemon.wire.kafka_client import admin, ensure_topics, make_producer
from daemon.wire.local_kafka import LocalKafkaError, free_port
from daemon.wire.local_prefect import LocalPrefectServer, LocalPrefectWorker
from flows.demo.configuration import Configuration, model_settings
from flows.demo.daemon_process import DaemonProcess, DemoFailed, last_words
from flows.demo.options import Options
from flows.demo.progress import Progress
from flows.demo.stream import Stream
from flows.demo.surroundings import deaf
from flows.registry import bootstrap_champion
from monitors.settings import KafkaSettings, PrefectSettings

DEPLOY_SECONDS = 180.0
CLOSE_SECONDS = 5.0
# The least that a broker with default settings allows.
SESSION_SECONDS = 6.0


def deploy(config: Path, environment: Mapping[str, str], log: Path) -> str:
    """`retrain-daemon deploy`, as a user would run it; returns what it said."""
    command = [sys.executable, "-P", "-m", "daemon.cli", "deploy", "--config", str(config)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=DEPLOY_SECONDS,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DemoFailed(f"`retrain-daemon deploy` did not end in {DEPLOY_SECONDS:.0f} s") from error
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        raise DemoFailed(f"`retrain-daemon deploy` ended with code {done.returncode}; {last_words(log)}")
    return done.stdout


class Stage:
    """
    What is running for a demo, from nothing to a daemon that reads.

    Broker, Prefect server and the first champion are made side by side: each waits for the disk or
    the network most of the time.
    """

    def __init__(self, folder: Path, stream: Stream, options: Options, progress: Progress) -> None:
        self.folder = folder
        self.broker = ""
        self.configuration = first_configuration(folder, stream, options)
        self.daemon: DaemonProcess
        self.producer: Any
        self._stream = stream
        self._options = options
        self._progress = progress
        self._stack = ExitStack()
        self._server = LocalPrefectServer(folder, ui=progress.live and not options.json)

    @property
    def prefect_url(self) -> str:
        """Where Prefect's API answers."""
        return self._server.url

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def _close(self) -> None:
        """Stop everything, the last started first; a second Ctrl-C would cut that short."""
        self._progress.waiting("stopping everything")
        with deaf():
            self._stack.close()
        self._progress.done()

    def _start(self) -> None:
        self._progress.waiting("starting a broker and a Prefect server, training the first champion")
        with ThreadPoolExecutor(max_workers=2) as side:
            server = side.submit(_timed, self._start_server)
            broker = side.submit(_timed, self._start_broker)
            champion = _timed(self._bootstrap)
            self._ready("first champion", f"trained on {len(self._stream.reference):,} rows", champion)
            seconds = broker.result()
            self._ready(self.broker, f"at {self.configuration.kafka.bootstrap_servers}", seconds)
            self._progress.waiting("starting a Prefect server")
            seconds = server.result()
            self._ready("Prefect server", f"at {self.prefect_url}", seconds)
        self._state("prefect", PrefectSettings(api_url=self.prefect_url, poll_seconds=0.5))
        self._progress.waiting("deploying")
        config = self.configuration.write()
        seconds = _timed(lambda: deploy(config, self._server.environment, self.folder / "deploy.log"))
        self._ready("deployment and automation", "by `retrain-daemon deploy`", seconds)
        self._progress.waiting("starting a worker and the daemon")
        seconds = _timed(lambda: self._start_worker_and_daemon(config))
        self._ready("retrain-daemon", f"a process of its own, at {self.configuration.daemon_url}", seconds)

    def _start_server(self) -> None:
        self._stack.callback(self._server.stop)
        self._server.start()

    def _start_broker(self) -> None:
        if self._options.kafka:
            self.broker, servers = "your broker", self._options.kafka
        else:
            broker = self._own_broker()
            self._stack.callback(broker.stop)
            self.broker, servers = broker.kind, broker.bootstrap_servers
        self._state("kafka", msgspec.structs.replace(self.configuration.kafka, bootstrap_servers=servers))
        kafka = self.configuration.kafka
        topics = (*kafka.topics, kafka.labels_topic, kafka.dead_letter_topic)
        # Retention goes by the time of a record, and these tell of a world that is long gone.
        ensure_topics(kafka, dict.fromkeys(topics, 1), {"retention.ms": "-1"})
        if self._options.kafka and not self._options.keep:
            self._stack.callback(_delete_topics, kafka, topics)
        self.producer = make_producer(kafka, linger_ms=20)
        self._stack.callback(self.producer.close, timeout=CLOSE_SECONDS)

    def _own_broker(self) -> Any:
        """A real one where it is to be had; Java and Maven may be there, and Maven's repository not."""
        # By name, as the command line loads flows: the two sides share only the wire.
        brokers = import_module("daemon.dev_broker")
        try:
            return brokers.start_broker(self.folder / "kafka")
        except LocalKafkaError as error:
            self._progress.warn(f"{str(error).splitlines()[0]}; the development broker takes its place")
            return brokers.DevBroker().start()

    def _bootstrap(self) -> None:
        import pandas as pd

        rows = self._stream.reference
        frame = pd.DataFrame([row.features for row in rows])
        bootstrap_champion(
            self.configuration.flow_settings(), frame, pd.Series([row.label for row in rows]), "1"
        )

    def _start_worker_and_daemon(self, config: Path) -> None:
        pool = self.configuration.prefect.work_pool
        worker = LocalPrefectWorker(self.folder, pool=pool, environment=self._server.environment)
        self._stack.callback(worker.stop)
        worker.start()
        self.daemon = DaemonProcess(
            config, self.configuration.daemon_url, self._stream.model, self.folder / "daemon.log"
        )
        self._stack.callback(self.daemon.stop)
        self.daemon.start()

    def _state(self, section: str, settings: msgspec.Struct) -> None:
        self.configuration = msgspec.structs.replace(self.configuration, **{section: settings})

    def _ready(self, what: str, detail: str, seconds: float) -> None:
        self._progress.done()
        self._progress.ready(what, f"{detail}, {seconds:.1f} s")


def first_configuration(folder: Path, stream: Stream, options: Options) -> Configuration:
    """The configuration before it is known where anything listens."""
    # On a broker of the user's, nothing may meet what is there.
    prefix = f"retrain-daemon-demo-{uuid.uuid4().hex[:8]}." if options.kafka else ""
    return Configuration(
        folder=folder,
        model=stream.model,
        settings=model_settings(stream, options.metric_for(stream)),
        kafka=KafkaSettings(
            topic=f"{prefix}predictions",
            labels_topic=f"{prefix}labels",
            dead_letter_topic=f"{prefix}dead-letters",
            group=f"{prefix}retrain-daemon",
            start="earliest",
            # After its kill -9 the daemon has to wait until the group has given its dead self up.
            session_timeout_seconds=SESSION_SECONDS,
        ),
        prefect=PrefectSettings(),
        http_port=free_port(),
    )


def _delete_topics(kafka: KafkaSettings, topics: tuple[str, ...]) -> None:
    with admin(kafka) as client:
        client.delete_topics(list(topics))


def _timed(step: Callable[[], object]) -> float:
    started = time.monotonic()
    step()
    return time.monotonic() - started
