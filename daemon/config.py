"""Configuration: what the user states, read once into frozen values, or refused with all its problems."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from daemon.config_rules import Rules, shared_problems
from daemon.config_tree import ENVIRONMENT_PREFIX, ConfigError, Problem, Tree
from monitors.passwords import passwords_in
from monitors.settings import (
    FieldSettings,
    FlowSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    PrefectSettings,
    RegistrySettings,
    Settings,
)

DEFAULT_PATH = Path("retrain-daemon.toml")
DEFAULT_WINDOW_SECONDS = 3_600.0
SECRET_FILES = {
    "kafka.sasl_password": "kafka.sasl_password_file",
    "prefect.webhook_url": "prefect.webhook_url_file",
    "ledger.url": "ledger.url_file",
}


class LedgerSettings(Settings, frozen=True):
    """Where decisions and positions are kept, how often they are written and how long they stay."""

    url: str = "sqlite:///retrain-daemon/ledger.db"
    url_file: str = ""
    checkpoint_seconds: float = 5.0
    retention_seconds: float = 7_776_000.0


class ReportSettings(Settings, frozen=True):
    """Where drift reports are written; `url` is how people reach that folder, if not through the daemon."""

    folder: str = "retrain-daemon/reports"
    url: str = ""


class HttpSettings(Settings, frozen=True):
    """Where the daemon answers; port 0 takes any free one."""

    host: str = "127.0.0.1"
    port: int = 8321


class LogSettings(Settings, frozen=True):
    """How the daemon logs; `auto` is pretty on a terminal and JSON elsewhere."""

    format: Literal["auto", "pretty", "json"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"


class EngineSettings(Settings, frozen=True):
    """Who scores windows: the compiled reference, or Evidently itself."""

    engine: Literal["compiled", "evidently"] = "compiled"


class Config(Settings, frozen=True):
    """Everything that is configured. Paths are absolute, secrets are read, windows have a size."""

    mode: Literal["observe", "retrain"] = "observe"
    kafka: KafkaSettings = KafkaSettings()
    fields: FieldSettings = FieldSettings()
    topics: dict[str, FieldSettings] = msgspec.field(default_factory=dict)
    limits: LimitSettings = LimitSettings()
    prefect: PrefectSettings = PrefectSettings()
    registry: RegistrySettings = RegistrySettings()
    ledger: LedgerSettings = LedgerSettings()
    reports: ReportSettings = ReportSettings()
    http: HttpSettings = HttpSettings()
    log: LogSettings = LogSettings()
    drift: EngineSettings = EngineSettings()
    models: dict[str, ModelSettings] = msgspec.field(default_factory=dict)

    @property
    def mappings(self) -> dict[str, FieldSettings]:
        """The mapping of every topic that is read, predictions first."""
        labels = (self.kafka.labels_topic,) if self.kafka.labels_topic else ()
        return {topic: self.topics.get(topic, self.fields) for topic in (*self.kafka.topics, *labels)}

    def flow_settings(self, model: str) -> FlowSettings:
        """
        What a retraining of the model needs, without any secret.

        Workers take the Kafka password from `RETRAIN_DAEMON_KAFKA__SASL_PASSWORD` or from the file.
        """
        return FlowSettings(
            model=model,
            settings=self.models[model],
            kafka=msgspec.structs.replace(self.kafka, sasl_password=""),
            fields=self.mappings,
            limits=self.limits,
            registry=self.registry,
        )

    def secrets(self) -> tuple[str, ...]:
        """The values that must never be shown."""
        passwords = passwords_in(f"{self.ledger.url} {self.prefect.api_url}")
        values = (self.kafka.sasl_password, self.prefect.webhook_url, *passwords)
        return tuple(value for value in values if value)


def load(path: Path | None, environ: Mapping[str, str]) -> Config:
    """
    Read the file, if any, and then the environment, which wins.

    Relative paths count from the file's folder. Raises `ConfigError` with every problem there is.
    """
    folder = path.absolute().parent if path is not None else Path.cwd()
    tree = Tree(Config)
    if path is not None:
        tree.read_file(path)
    tree.read_environment(environ)
    tree.raise_problems()
    _inherit_fields(tree.values)
    _read_secrets(tree, folder)
    config = _with_window_sizes(msgspec.convert(tree.values, Config))
    rules = Rules(tree.place_of)
    rules.check(config)
    shared_problems(config, rules)
    if rules.problems:
        raise ConfigError(rules.problems)
    return _anchored(config, folder)


def environment_name(key: str) -> str:
    """
    The environment's name of a dotted key.

    >>> environment_name("kafka.topic")
    'RETRAIN_DAEMON_KAFKA__TOPIC'
    """
    return ENVIRONMENT_PREFIX + "__".join(re.sub(r"\W", "_", part) for part in key.split(".")).upper()


def _inherit_fields(values: dict[str, Any]) -> None:
    """A topic's mapping says only what differs from `[fields]`."""
    for topic, mapping in values.get("topics", {}).items():
        values["topics"][topic] = {**values.get("fields", {}), **mapping}


def _read_secrets(tree: Tree, folder: Path) -> None:
    problems = [
        problem
        for key, file_key in SECRET_FILES.items()
        if (problem := _read_secret(tree, key, file_key, folder))
    ]
    if problems:
        raise ConfigError(problems)


def _read_secret(tree: Tree, key: str, file_key: str, folder: Path) -> Problem | None:
    name = tree.get(file_key)
    if not name:
        return None
    if tree.get(key):
        return Problem(key, tree.place_of(key), f"is given beside {file_key}; remove one of them")
    file = folder / name
    try:
        secret = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        return Problem(
            file_key, tree.place_of(file_key), f"cannot read {file} ({reason}); mend its path or mode"
        )
    if not secret:
        return Problem(file_key, tree.place_of(file_key), f"{file} is empty; write the secret into it")
    tree.set(key, secret, tree.place_of(file_key))
    return None


def _with_window_sizes(config: Config) -> Config:
    models = {name: _with_window_size(model) for name, model in config.models.items()}
    return msgspec.structs.replace(config, models=models)


def _with_window_size(model: ModelSettings) -> ModelSettings:
    if model.window.rows is not None or model.window.seconds is not None:
        return model
    window = msgspec.structs.replace(model.window, seconds=DEFAULT_WINDOW_SECONDS)
    return msgspec.structs.replace(model, window=window)


def _anchored(config: Config, folder: Path) -> Config:
    """The same with absolute paths: daemon and workers need not run in the same folder."""
    at = _Anchor(folder)
    replace: Callable[..., Any] = msgspec.structs.replace
    models = {
        name: replace(model, data=replace(model.data, path=at.path(model.data.path)))
        for name, model in config.models.items()
    }
    kafka, registry = config.kafka, config.registry
    files = ("sasl_password_file", "ssl_cafile", "ssl_certfile", "ssl_keyfile")
    anchored: Config = replace(
        config,
        kafka=replace(kafka, **{name: at.path(getattr(kafka, name)) for name in files}),
        registry=replace(
            registry,
            tracking_uri=at.url(registry.tracking_uri),
            references_url=at.url(registry.references_url),
        ),
        ledger=replace(
            config.ledger, url=at.url(config.ledger.url), url_file=at.path(config.ledger.url_file)
        ),
        prefect=replace(config.prefect, webhook_url_file=at.path(config.prefect.webhook_url_file)),
        reports=replace(config.reports, folder=at.path(config.reports.folder)),
        models=models,
    )
    return anchored


class _Anchor:
    """The folder that relative paths count from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, path: str) -> str:
        return str(self._folder / path) if path else ""

    def url(self, url: str) -> str:
        """Of URLs only SQLite's can be relative; anything without a scheme is a path."""
        scheme, mark, rest = url.partition("://")
        if not mark:
            return self.path(url)
        if scheme.startswith("sqlite") and rest.startswith("/") and rest not in ("/", "/:memory:"):
            return f"{scheme}:///{self._folder / rest[1:]}"
        return url
