"""Configuration: what the demo's daemon and its flow are told, written down as anybody would."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from flows.demo.scoreboard import Metric
from flows.demo.stream import Stream
from monitors.settings import (
    DataSettings,
    FieldSettings,
    FlowSettings,
    GateSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    PolicySettings,
    PrefectSettings,
    RegistrySettings,
    WindowSettings,
)


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """Everything stated about the one model of a demo; all of it lies under `folder`."""

    folder: Path
    model: str
    settings: ModelSettings
    kafka: KafkaSettings
    prefect: PrefectSettings
    http_port: int

    @property
    def registry(self) -> RegistrySettings:
        """The embedded registry and the references beside it."""
        return RegistrySettings(
            tracking_uri=f"sqlite:///{self.folder / 'mlflow.db'}",
            references_url=str(self.folder / "references"),
        )

    @property
    def daemon_url(self) -> str:
        """Where the daemon answers."""
        return f"http://127.0.0.1:{self.http_port}"

    def flow_settings(self) -> FlowSettings:
        """The same, in the form that flows take."""
        topics = (*self.kafka.topics, self.kafka.labels_topic)
        return FlowSettings(
            model=self.model,
            settings=self.settings,
            kafka=self.kafka,
            fields={topic: FieldSettings() for topic in topics},
            limits=LimitSettings(),
            registry=self.registry,
        )

    def toml(self) -> str:
        """The configuration file; only what differs from the defaults."""
        sections = {
            "": {"mode": "retrain"},
            "kafka": _stated(self.kafka),
            "prefect": _stated(self.prefect),
            "registry": _stated(self.registry),
            "ledger": {"url": f"sqlite:///{self.folder / 'ledger.db'}", "checkpoint_seconds": 0.2},
            "reports": {"folder": str(self.folder / "reports"), "url": f"{self.daemon_url}/reports"},
            "http": {"host": "127.0.0.1", "port": self.http_port},
            "log": {"format": "json"},
        }
        sections.update(_model_sections(f"models.{_key(self.model)}", _stated(self.settings)))
        return "\n".join(_section(name, values) for name, values in sections.items())

    def write(self) -> Path:
        """Write the file; returns its path."""
        path = self.folder / "retrain-daemon.toml"
        path.write_text(self.toml(), encoding="utf-8")
        return path


def model_settings(stream: Stream, metric: Metric) -> ModelSettings:
    """
    The defaults, sized by the stream.

    The staged acts ask one window later than the default: by then two windows since the change have
    their labels, which is all that their challengers are trained on.
    """
    rows = stream.window_rows
    staged = bool(stream.acts)
    return ModelSettings(
        kind=stream.kind,
        serving_version="1",
        reference_rows=len(stream.reference),
        label_horizon_seconds=2.0 * rows * stream.row_seconds,
        window=WindowSettings(rows=rows, min_rows=min(rows, WindowSettings().min_rows)),
        policy=PolicySettings(method="thresholds", for_windows=3 if staged else 2),
        data=DataSettings(
            max_rows=2 * rows if staged else len(stream.reference),
            min_rows=min(rows, DataSettings().min_rows),
        ),
        gate=GateSettings(metric=metric),
    )


def _stated(settings: msgspec.Struct) -> dict[str, Any]:
    """A section without the keys that are at their default."""
    default = msgspec.to_builtins(type(settings)())
    return {key: value for key, value in msgspec.to_builtins(settings).items() if value != default[key]}


def _model_sections(prefix: str, model: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield prefix, {key: value for key, value in model.items() if not isinstance(value, dict)}
    defaults = msgspec.to_builtins(ModelSettings())
    for key, section in model.items():
        if isinstance(section, dict):
            changed = {name: value for name, value in section.items() if value != defaults[key][name]}
            yield f"{prefix}.{key}", changed


def _section(name: str, values: Mapping[str, Any]) -> str:
    lines = [f"[{name}]"] if name else []
    # JSON's strings, numbers, booleans and arrays are TOML's too.
    lines += [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if name.replace("-", "").replace("_", "").isalnum() and name.isascii() else json.dumps(name)
