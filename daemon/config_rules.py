"""Config rules: which values make sense, alone and beside each other."""

import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from daemon.config_tree import Problem, dotted
from monitors.passwords import passwords_in
from monitors.settings import FieldSettings, ModelSettings
from monitors.sources import mapping_problems

if TYPE_CHECKING:
    from daemon.config import Config

# A hundred years: what no interval here can mean, and what datetimes still bear.
LONGEST_SECONDS = 3_155_760_000.0

_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}")
_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_SERVER = re.compile(r"(\[[0-9A-Fa-f:]+\]|[^\s:\[\]/]+):(\d{1,5})")
_CRON_FIELD = re.compile(r"[0-9A-Za-z*/,#?LW-]+")


class Range(msgspec.Struct, frozen=True):
    """Which numbers are allowed, and how to say so."""

    holds: Callable[[float], bool]
    text: str


ABOVE_0 = Range(lambda number: number > 0, "more than 0")
FROM_0 = Range(lambda number: number >= 0, "0 or more")
FROM_1 = Range(lambda number: number >= 1, "1 or more")
SHARE = Range(lambda number: 0 < number <= 1, "more than 0 and at most 1")
PART = Range(lambda number: 0 < number < 1, "more than 0 and less than 1")
PORT = Range(lambda number: 0 <= number <= 65_535, "0 to 65535")
ENOUGH_RESAMPLES = Range(lambda number: number >= 100, "100 or more")

SLOTS = Range(lambda number: 1 <= number <= 10_000, "1 to 10000")

RANGES = {
    "kafka.connect_timeout_seconds": ABOVE_0,
    "kafka.session_timeout_seconds": ABOVE_0,
    "limits.max_record_bytes": FROM_1,
    "limits.max_features": FROM_1,
    "limits.max_versions_per_model": FROM_1,
    "prefect.start_deadline_seconds": ABOVE_0,
    "prefect.serve_deadline_seconds": ABOVE_0,
    "prefect.heartbeat_seconds": ABOVE_0,
    "prefect.poll_seconds": ABOVE_0,
    "ledger.checkpoint_seconds": ABOVE_0,
    "ledger.retention_seconds": ABOVE_0,
    "http.port": PORT,
    "models.*.reference_rows": FROM_1,
    "models.*.label_horizon_seconds": ABOVE_0,
    "models.*.max_pending_rows": FROM_1,
    "models.*.max_pending_seconds": ABOVE_0,
    "models.*.window.rows": FROM_1,
    "models.*.window.seconds": ABOVE_0,
    "models.*.window.idle_seconds": ABOVE_0,
    "models.*.window.min_rows": FROM_1,
    "models.*.window.max_rows": FROM_1,
    "models.*.drift.thresholds.*": ABOVE_0,
    "models.*.drift.season_seconds": FROM_0,
    "models.*.drift.season_slots": SLOTS,
    "models.*.quality.missing_share": SHARE,
    "models.*.quality.null_share_rise": SHARE,
    "models.*.quality.wrong_type_share": SHARE,
    "models.*.quality.infinite_share": SHARE,
    "models.*.quality.out_of_range_share": SHARE,
    "models.*.quality.unseen_category_share": SHARE,
    "models.*.policy.windows_between_false_retrainings": FROM_1,
    "models.*.policy.first_attempt_windows": FROM_1,
    "models.*.policy.retrain_share": ABOVE_0,
    "models.*.policy.baseline_windows": FROM_1,
    "models.*.policy.drift_share": SHARE,
    "models.*.policy.for_windows": FROM_1,
    "models.*.policy.keep_firing_windows": FROM_0,
    "models.*.policy.backoff_windows": FROM_0,
    "models.*.policy.max_attempts": FROM_1,
    "models.*.data.max_rows": FROM_1,
    "models.*.data.min_rows": FROM_1,
    "models.*.training.holdout_share": PART,
    "models.*.training.folds": FROM_1,
    "models.*.training.seed": FROM_0,
    "models.*.gate.confidence": PART,
    "models.*.gate.probation_confidence": PART,
    "models.*.gate.resamples": ENOUGH_RESAMPLES,
    "models.*.gate.min_holdout_rows": FROM_1,
    "models.*.gate.margin": FROM_0,
    "models.*.gate.segment_margin": FROM_0,
    "models.*.gate.min_segment_rows": FROM_1,
    "models.*.gate.probation_windows": FROM_0,
    "models.*.gate.probation_rise": FROM_0,
}


class Rules:
    """Collects what is wrong, with the place of each key."""

    def __init__(self, place_of: Callable[[str], str]) -> None:
        self.problems: list[Problem] = []
        self._place_of = place_of

    def refuse(self, key: str, text: str) -> None:
        """Note one problem; the text completes the sentence that the key begins."""
        self.problems.append(Problem(key, self._place_of(key), text))

    def require(self, holds: bool, key: str, text: str) -> None:
        if not holds:
            self.refuse(key, text)

    def check(self, config: "Config") -> None:
        """Every number in its range."""
        for key, value in _numbers(config, ()):
            range_ = _range_of(key)
            if not math.isfinite(value) or not range_.holds(value):
                self.refuse(dotted(key), f"is {value}; it must be {range_.text}")
            elif key[-1].endswith("seconds") and value > LONGEST_SECONDS:
                self.refuse(dotted(key), f"is {value}; at most {LONGEST_SECONDS:.0f} (100 years) makes sense")


def shared_problems(config: "Config", rules: Rules) -> None:
    """What is wrong between keys, section by section."""
    _kafka(config, rules)
    _security(config, rules)
    _fields(config, rules)
    _addresses(config, rules)
    _models(config, rules)
    for name, model in config.models.items():
        _window(f"models.{dotted((name,))}.window", model, rules)
        _season(f"models.{dotted((name,))}.drift", model, rules)
        _pending(f"models.{dotted((name,))}", model, rules)
        _policy(f"models.{dotted((name,))}", model, rules)
        _training(f"models.{dotted((name,))}", model, config, rules)
        _gate(f"models.{dotted((name,))}", model, rules)


def _numbers(value: Any, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], float]]:
    if isinstance(value, msgspec.Struct):
        value = {name: getattr(value, name) for name in value.__struct_fields__}
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, (*above, name))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield above, value


def _range_of(key: tuple[str, ...]) -> Range:
    if key[0] == "models":
        rest = (*key[2:4], "*") if key[2:4] == ("drift", "thresholds") else key[2:]
        key = ("models", "*", *rest)
    if range_ := RANGES.get(".".join(key)):
        return range_
    return FROM_0 if key[-1].endswith("_seconds") else Range(lambda _: True, "a number")


def _kafka(config: "Config", rules: Rules) -> None:
    kafka = config.kafka
    for server in kafka.bootstrap_servers.split(","):
        match = _SERVER.fullmatch(server.strip())
        rules.require(
            match is not None and 0 < int(match[2]) <= 65_535,
            "kafka.bootstrap_servers",
            "must be host:port, several with commas between them",
        )
    rules.require(bool(kafka.topics), "kafka.topic", "names no topic; name at least one")
    rules.require(bool(kafka.group), "kafka.group", "is empty; give the consumer group a name")
    named = [("kafka.topic", topic) for topic in kafka.topics]
    named += [("kafka.labels_topic", kafka.labels_topic)] if kafka.labels_topic else []
    named.append(("kafka.dead_letter_topic", kafka.dead_letter_topic))
    for key, topic in named:
        legal = _TOPIC.fullmatch(topic) and topic not in (".", "..")
        rules.require(bool(legal), key, f"{topic!r} is no topic; use 1 to 249 of A-Z a-z 0-9 . _ -")
    names = [topic for _, topic in named]
    for number, (key, topic) in enumerate(named):
        rules.require(topic not in names[:number], key, f"{topic!r} is used twice; every topic has one use")
    rules.require(
        kafka.sharing == "one-active" or not config.ledger.url.startswith("sqlite"),
        "kafka.sharing",
        'is "by-model", which needs a ledger that members can share; set ledger.url to postgresql://...',
    )


def _security(config: "Config", rules: Rules) -> None:
    kafka = config.kafka
    if not kafka.security_protocol.startswith("SASL"):
        for name in ("sasl_mechanism", "sasl_username", "sasl_password"):
            rules.require(
                not getattr(kafka, name),
                f"kafka.{name}",
                "has no effect; set security_protocol to SASL_SSL or SASL_PLAINTEXT, or leave it out",
            )
        return
    rules.require(
        bool(kafka.sasl_mechanism),
        "kafka.sasl_mechanism",
        f'is missing; {kafka.security_protocol} needs one of "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"',
    )
    rules.require(bool(kafka.sasl_username), "kafka.sasl_username", "is missing; SASL needs a user")
    rules.require(
        bool(kafka.sasl_password),
        "kafka.sasl_password",
        "is missing; set RETRAIN_DAEMON_KAFKA__SASL_PASSWORD or kafka.sasl_password_file",
    )


def _fields(config: "Config", rules: Rules) -> None:
    for topic in config.topics:
        known = ", ".join(config.mappings)
        rules.require(
            topic in config.mappings,
            dotted(("topics", topic)),
            f"is the mapping of a topic that is not read; kafka.topic and kafka.labels_topic say: {known}",
        )
    for topic, mapping in config.mappings.items():
        section = dotted(("topics", topic)) if topic in config.topics else "fields"
        _mapping(section, mapping, topic == config.kafka.labels_topic, rules)


def _mapping(section: str, mapping: FieldSettings, labels: bool, rules: Rules) -> None:
    for field, text in mapping_problems(mapping, labels):
        problem = (f"{section}.{field}", text)
        if problem not in [(known.key, known.text) for known in rules.problems]:
            rules.refuse(*problem)


def _addresses(config: "Config", rules: Rules) -> None:
    for key, url in (
        ("prefect.api_url", config.prefect.api_url),
        ("prefect.webhook_url", config.prefect.webhook_url),
        ("reports.url", config.reports.url),
    ):
        rules.require(not url or _is_http(url), key, "must be an http:// or https:// address")
    backend = config.ledger.url.partition(":")[0].partition("+")[0]
    rules.require(
        backend in ("sqlite", "postgresql"),
        "ledger.url",
        "must begin with sqlite:/// or postgresql://, the databases that a ledger can be in",
    )
    for key, url in (
        ("registry.tracking_uri", config.registry.tracking_uri),
        ("registry.references_url", config.registry.references_url),
    ):
        rules.require(
            not passwords_in(url),
            key,
            "holds a password, which deployments would show; give it to daemon and workers as "
            "MLFLOW_TRACKING_PASSWORD, PGPASSWORD or the store's own variable",
        )
        rules.require(bool(url), key, "is empty; name a folder or a URL")
    rules.require(
        bool(config.http.host), "http.host", "is empty; 127.0.0.1 is this machine, 0.0.0.0 all of it"
    )
    rules.require(bool(config.prefect.work_pool), "prefect.work_pool", "is empty; give the pool a name")
    rules.require(bool(config.reports.folder), "reports.folder", "is empty; name a folder")


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _models(config: "Config", rules: Rules) -> None:
    rules.require(bool(config.models), "models", "names no model; add a [models.NAME] section")
    for name in config.models:
        rules.require(
            bool(_MODEL.fullmatch(name)),
            dotted(("models", name)),
            "is no model name; use 1 to 100 of A-Z a-z 0-9 . _ - and space, a letter or digit first",
        )


def _window(key: str, model: ModelSettings, rules: Rules) -> None:
    window = model.window
    rules.require(
        window.rows is None or window.seconds is None,
        key,
        "has both rows and seconds; keep one of them",
    )
    if window.rows is not None:
        rules.require(
            window.min_rows <= window.rows,
            f"{key}.min_rows",
            f"is {window.min_rows}, more than rows ({window.rows}) ever gives; set at most {window.rows}",
        )
        rules.require(
            window.rows <= window.max_rows,
            f"{key}.rows",
            f"is {window.rows}, more than max_rows ({window.max_rows}) keeps; raise max_rows or lower rows",
        )
    rules.require(
        window.min_rows <= window.max_rows,
        f"{key}.max_rows",
        f"is {window.max_rows}, less than min_rows ({window.min_rows}); raise it",
    )


def _season(key: str, model: ModelSettings, rules: Rules) -> None:
    seconds, slots, window = model.drift.season_seconds, model.drift.season_slots, model.window.seconds
    rules.require(
        (seconds > 0) == (slots > 1),
        f"{key}.season_slots",
        f"is {slots} with season_seconds {seconds:g}; state both (604800 in 168 slots, say), or neither",
    )
    if seconds <= 0 or slots <= 1 or window is None:
        return
    each = seconds / slots / window
    rules.require(
        each >= 1.0 and math.isclose(each, round(each)),
        f"{key}.season_slots",
        f"is {slots}, so a slot has {seconds / slots:g} seconds, and windows of {window:g} do not divide it; "
        "choose slots of one or more whole windows",
    )


def _pending(key: str, model: ModelSettings, rules: Rules) -> None:
    rows = model.window.rows or model.window.max_rows
    rules.require(
        model.max_pending_seconds >= model.label_horizon_seconds,
        f"{key}.max_pending_seconds",
        f"is {model.max_pending_seconds}, less than label_horizon_seconds "
        f"({model.label_horizon_seconds}); raise it",
    )
    rules.require(
        model.max_pending_rows >= rows,
        f"{key}.max_pending_rows",
        f"is {model.max_pending_rows}, less than the {rows} rows of one window; raise it",
    )


def _policy(key: str, model: ModelSettings, rules: Rules) -> None:
    ignored = sorted(set(model.policy.columns) & set(model.drift.ignore))
    rules.require(
        not ignored,
        f"{key}.policy.columns",
        f"holds {', '.join(ignored)}, which drift.ignore leaves out; take it from one of them",
    )


def _training(key: str, model: ModelSettings, config: "Config", rules: Rules) -> None:
    data, training = model.data, model.training
    rules.require(
        data.min_rows <= data.max_rows,
        f"{key}.data.max_rows",
        f"is {data.max_rows}, less than min_rows ({data.min_rows}); raise it",
    )
    if data.source == "topics" and config.mappings:
        labelled = config.kafka.labels_topic or any(mapping.label for mapping in config.mappings.values())
        rules.require(
            bool(labelled),
            f"{key}.data.source",
            'is "topics" and nothing brings labels; set kafka.labels_topic or fields.label',
        )
    needed = {"folder": data.path, "callable": data.callable}.get(data.source, "unused")
    name = "path" if data.source == "folder" else "callable"
    rules.require(bool(needed), f"{key}.data.{name}", f'is missing; data.source is "{data.source}"')
    for name, value in (("data", data.callable), ("training", training.callable)):
        rules.require(
            not value or bool(_CALLABLE.fullmatch(value)),
            f"{key}.{name}.callable",
            "must be module:function, like my_package.training:train",
        )
    rules.require(
        not model.schedule or _is_cron(model.schedule),
        f"{key}.schedule",
        'must be cron with five fields, like "0 3 * * 1" for Mondays at 3',
    )


def _is_cron(schedule: str) -> bool:
    fields = schedule.split()
    return len(fields) == 5 and all(_CRON_FIELD.fullmatch(field) for field in fields)


def _gate(key: str, model: ModelSettings, rules: Rules) -> None:
    metrics = {"classification": ("accuracy", "balanced_accuracy", "auc"), "regression": ("mae",)}[model.kind]
    rules.require(
        model.gate.metric in ("", *metrics),
        f"{key}.gate.metric",
        f'is "{model.gate.metric}", which a {model.kind} model has not; use {" or ".join(metrics)}',
    )
    rules.require(
        model.gate.mode == "superiority" or model.gate.margin > 0,
        f"{key}.gate.margin",
        'is 0, and mode = "non_inferiority" needs one: state how much worse a challenger may be',
    )
