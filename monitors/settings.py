"""Settings: what a user states about a model, as frozen values that both sides read."""

from typing import Literal

import msgspec

from monitors.passwords import without_passwords

_SECRETS = frozenset({"sasl_password", "webhook_url"})


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every section; unknown keys are errors, and secrets are not shown."""

    def __repr__(self) -> str:
        """Like any struct's, but for passwords and the addresses that are secrets themselves."""
        shown = (f"{name}={_shown(name, getattr(self, name))}" for name in self.__struct_fields__)
        return f"{type(self).__name__}({', '.join(shown)})"


def _shown(name: str, value: object) -> str:
    if name in _SECRETS and value:
        return "'***'"
    return without_passwords(repr(value)) if isinstance(value, str) else repr(value)


class KafkaSettings(Settings, frozen=True):
    """How to reach Kafka. A `*_file` names a file whose content is the secret; it wins over none."""

    bootstrap_servers: str = "localhost:9092"
    topic: str | tuple[str, ...] = "predictions"
    labels_topic: str = ""
    dead_letter_topic: str = "retrain-daemon.dead-letters"
    group: str = "retrain-daemon"
    sharing: Literal["one-active", "by-model"] = "one-active"
    client_id: str = "retrain-daemon"
    start: Literal["earliest", "latest"] = "latest"
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = ""
    sasl_username: str = ""
    sasl_password: str = ""
    sasl_password_file: str = ""
    ssl_cafile: str = ""
    ssl_certfile: str = ""
    ssl_keyfile: str = ""
    connect_timeout_seconds: float = 10.0
    session_timeout_seconds: float = 30.0

    @property
    def topics(self) -> tuple[str, ...]:
        """The prediction topics, always as a tuple."""
        return (self.topic,) if isinstance(self.topic, str) else self.topic


class FieldSettings(Settings, frozen=True):
    """
    Where each field of a record comes from.

    `a.b` is a path in the payload, `@key` the Kafka key, `@header:NAME` a header, `@timestamp` the
    Kafka timestamp, `@fixed:VALUE` a constant, and the empty string: the field is not there.
    """

    model: str = "model"
    model_version: str = "model_version"
    id: str = "id"
    event_time: str = "event_time"
    event_time_unit: Literal["rfc3339", "seconds", "milliseconds"] = "rfc3339"
    features: str = "features"
    prediction: str = "prediction"
    probability: str = "probability"
    label: str = "label"
    segment: str = "segment"


class LimitSettings(Settings, frozen=True):
    """Bounds that no record can push the daemon past."""

    max_record_bytes: int = 1_048_576
    max_features: int = 2_000
    max_versions_per_model: int = 8
    max_ahead_seconds: float = 3_600.0


class WindowSettings(Settings, frozen=True):
    """Which records belong together: `rows` of one partition, or `seconds` of event time."""

    rows: int | None = None
    seconds: float | None = None
    grace_seconds: float = 60.0
    idle_seconds: float = 300.0
    min_rows: int = 100
    max_rows: int = 20_000


class DriftSettings(Settings, frozen=True):
    """
    How a column is scored, and what a window of it is held against.

    `types` and `methods` overrule what the reference suggests. With a season (say 604,800 seconds in 168
    slots) the budget's policy holds a window against the reference's rows, and the quiet windows since, of
    its own slot; a slot that nobody has seen is learned. Zero seconds, or one slot: no season.
    """

    types: dict[str, Literal["numeric", "categorical"]] = {}
    methods: dict[str, str] = {}
    thresholds: dict[str, float] = {}
    ignore: tuple[str, ...] = ()
    season_seconds: float = 0.0
    season_slots: int = 1


class QualitySettings(Settings, frozen=True):
    """Shares of a window's rows (0 to 1) from which on a column counts as broken, not drifted."""

    missing_share: float = 0.5
    null_share_rise: float = 0.2
    wrong_type_share: float = 0.05
    infinite_share: float = 0.01
    out_of_range_share: float = 0.1
    unseen_category_share: float = 0.9


class PolicySettings(Settings, frozen=True):
    """
    When drift becomes an episode, and an episode a request.

    `method = "budget"`: the user states how many windows may lie between two needless alarms, and three
    detectors (data drift, prediction drift, performance) keep to it together. A fall of performance asks
    as soon as `first_attempt_windows` of labels follow the change, and again after twice as many; drift
    alone asks when labelled rows worth `retrain_share` of `reference_rows` have come. Without a known
    baseline the first `baseline_windows` labelled windows are it.

    `method = "thresholds"`: a share of drifted columns, or one of `columns`, for `for_windows` windows.
    """

    method: Literal["budget", "thresholds"] = "budget"
    windows_between_false_retrainings: float = 100.0
    first_attempt_windows: int = 2
    retrain_share: float = 0.5
    baseline_windows: int = 5
    drift_share: float = 0.5
    columns: tuple[str, ...] = ()
    for_windows: int = 2
    keep_firing_windows: int = 2
    cooldown_seconds: float = 0.0
    backoff_windows: int = 2
    max_attempts: int = 3


class DataSettings(Settings, frozen=True):
    """Where labelled training rows come from. `callable` is `module:function`; `path` a folder or file."""

    source: Literal["topics", "folder", "callable"] = "topics"
    path: str = ""
    callable: str = ""
    max_rows: int = 20_000
    min_rows: int = 200


class TrainingSettings(Settings, frozen=True):
    """
    How a challenger is trained. `callable` is `module:function`; empty means our default.

    `trusted_types` are the classes, by full name, that a model of that callable may bring into the
    process that loads it; those of our default trainer need no mention.
    """

    callable: str = ""
    trusted_types: tuple[str, ...] = ()
    holdout_share: float = 0.5
    folds: int = 4
    seed: int = 0
    parameters: dict[str, bool | int | float | str] = {}


class GateSettings(Settings, frozen=True):
    """
    What a challenger must show. Empty `metric` means accuracy for classes and mae for numbers.

    `margin` is how much worse than the champion a challenger may be with `mode = "non_inferiority"`,
    and `segment_margin` how much worse it may be in any one segment; both in the metric's own unit.
    After `probation_windows` windows of labels a new champion is held against the old one (0: never), and
    against all before it whenever a window's loss lies `probation_rise` deviations above what is known to be
    reachable (0: never). Champions all, they are compared with `probation_confidence`: keeping the worse
    one costs as much as taking it back.
    """

    metric: Literal["", "accuracy", "balanced_accuracy", "auc", "mae"] = ""
    mode: Literal["superiority", "non_inferiority"] = "superiority"
    margin: float = 0.0
    floor: float | None = None
    confidence: float = 0.95
    resamples: int = 5_000
    min_holdout_rows: int = 25
    segment_margin: float = 0.0
    min_segment_rows: int = 100
    probation_windows: int = 0
    probation_rise: float = 1.0
    probation_confidence: float = 0.8


class RegistrySettings(Settings, frozen=True):
    """Where models and references are kept. The tag maps a registry version to a logged one."""

    tracking_uri: str = "sqlite:///retrain-daemon/mlflow.db"
    references_url: str = "retrain-daemon/references"
    model_version_tag: str = "retrain_daemon.model_version"


class ModelSettings(Settings, frozen=True):
    """Everything stated about one model. Empty `serving_version`: that of the first window closed."""

    kind: Literal["classification", "regression"] = "classification"
    serving_version: str = ""
    reference_rows: int = 5_000
    label_horizon_seconds: float = 86_400.0
    max_pending_rows: int = 500_000
    max_pending_seconds: float = 2_592_000.0
    schedule: str = ""
    window: WindowSettings = WindowSettings()
    drift: DriftSettings = DriftSettings()
    quality: QualitySettings = QualitySettings()
    policy: PolicySettings = PolicySettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    gate: GateSettings = GateSettings()


class FlowSettings(Settings, frozen=True):
    """What a retraining run needs, as it stands in its deployment's parameters. Never a secret."""

    model: str
    settings: ModelSettings
    kafka: KafkaSettings
    fields: dict[str, FieldSettings]
    limits: LimitSettings
    registry: RegistrySettings


class PrefectSettings(Settings, frozen=True):
    """How retrainings are asked for. An empty `api_url` means the active Prefect profile's."""

    api_url: str = ""
    work_pool: str = "retrain-daemon"
    start_deadline_seconds: float = 120.0
    serve_deadline_seconds: float = 3_600.0
    heartbeat_seconds: float = 30.0
    poll_seconds: float = 2.0
    webhook_url: str = ""
    webhook_url_file: str = ""
    webhook_allow_private: bool = False
