"""Surroundings: a folder, an environment and a log that are the demo's alone."""

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from flows.demo.daemon_process import DemoFailed
from flows.demo.options import Options

# What a shell says for other servers and other daemons must not reach these.
FOREIGN = ("PREFECT_", "RETRAIN_DAEMON_", "MLFLOW_")
QUIET = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    # Small models train faster on one core than in a crowd, and the same on every machine.
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def demo_folder(options: Options) -> Iterator[Path]:
    """A folder for everything: the chosen one, which stays, or a temporary one, which goes unless kept."""
    chosen = options.folder
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        if any(chosen.iterdir()):
            raise DemoFailed(f"{chosen} is not empty; give --folder an empty or a new folder")
        yield chosen.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="retrain-daemon-demo-"))
    try:
        yield folder
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def own_log(path: Path) -> Iterator[None]:
    """What the parts log in this process goes to a file: the terminal is for the story."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    try:
        yield
    finally:
        structlog.reset_defaults()
        logging.captureWarnings(False)
        root.removeHandler(handler)
        handler.close()


@contextmanager
def private_environment(folder: Path) -> Iterator[None]:
    """This process and all it starts know nothing of the user's Prefect, MLflow or daemon settings."""
    before = dict(os.environ)
    home = folder / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    for name in before:
        if name.startswith(FOREIGN):
            del os.environ[name]
    os.environ.update(QUIET)
    os.environ.update({"PREFECT_HOME": str(home), "PREFECT_PROFILES_PATH": str(home / "profiles.toml")})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def deaf() -> Iterator[None]:
    """No signal interrupts the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
