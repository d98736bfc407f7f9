"""The first configuration: short enough to read, complete enough to start."""

from pathlib import Path

from daemon.config_tree import dotted
from daemon.errors import UsageError

TEMPLATE = """\
# What retrain-daemon watches. Every key with its default and unit: retrain-daemon.example.toml
mode = "observe"  # only tells; "retrain" also asks for retrainings

[kafka]
bootstrap_servers = {servers}
topic = {topic}
labels_topic = ""  # where labels come later; empty: they are in the prediction records
start = "earliest"  # or "latest": where to begin when nothing was read yet

[{section}]
kind = "classification"  # or "regression"
reference_rows = 5000  # a version that brings no reference learns it from its first rows
label_horizon_seconds = 86400  # how long labels may take

[{section}.window]
seconds = 3600  # of event time; or rows = 1000, with all of the model in one partition
min_rows = 100  # fewer say nothing

[{section}.policy]
drift_share = 0.5  # of the columns must drift,
for_windows = 2  # in as many windows in a row
"""


def write_config(path: Path, model: str, bootstrap_servers: str, topic: str) -> None:
    """Write a configuration; one that exists is never overwritten."""
    text = TEMPLATE.format(
        servers=_quoted(bootstrap_servers), topic=_quoted(topic), section=dotted(("models", model))
    )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{path}: exists already; remove it or name another with --config") from None
    except OSError as error:
        reason = error.strerror or "unknown reason"
        raise UsageError(f"{path}: cannot be written ({reason}); name another with --config") from None


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
