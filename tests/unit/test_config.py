"""The configuration: read strictly, refused with place, key and remedy."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from daemon.config import Config, environment_name, load
from daemon.config_rules import RANGES
from daemon.config_tree import ConfigError, _leaves
from monitors.settings import FieldSettings

MODEL = "[models.fraud]\n"
SASL = 'security_protocol = "SASL_SSL"\nsasl_mechanism = "PLAIN"\nsasl_username = "u"\n'


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "retrain-daemon.toml"
        path.write_text(text)
        return path

    return write


def refusals(path: Path | None, environ: dict[str, str] | None = None) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        load(path, environ or {})
    assert caught.value.exit_code == 2
    return [(problem.key, problem.text) for problem in caught.value.problems]


def only_refusal(path: Path | None, environ: dict[str, str] | None = None) -> tuple[str, str]:
    (refusal,) = refusals(path, environ)
    return refusal


def test_a_model_is_enough(write: Any) -> None:
    config = load(write(MODEL), {})
    assert config.mode == "observe"
    assert (config.models["fraud"].window.seconds, config.models["fraud"].window.rows) == (3_600.0, None)


def test_no_model_is_none(write: Any) -> None:
    assert only_refusal(write("")) == ("models", "names no model; add a [models.NAME] section")


def test_the_message_names_place_key_and_nearest_key(write: Any) -> None:
    path = write(MODEL + '[kafka]\nbootstrap_server = "a:1"\n')
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert str(caught.value) == (
        f"{path} [kafka]: kafka.bootstrap_server is no setting; did you mean kafka.bootstrap_servers?"
    )


def test_a_key_in_the_wrong_section_is_shown_where_it_belongs(write: Any) -> None:
    key, text = only_refusal(write("[models.fraud]\ngrace_seconds = 5\n"))
    assert (key, "models.NAME.window.grace_seconds" in text) == ("models.fraud.grace_seconds", True)


def test_all_problems_come_at_once(write: Any) -> None:
    path = write('mode = "watch"\n[kafka]\ntopik = "x"\n[models.fraud.window]\nrows = "many"\n')
    environ = {"RETRAIN_DAEMON_HTTP__PORT": "high", "RETRAIN_DAEMON_KAFKA__TOPIK": "x"}
    assert [key for key, _ in refusals(path, environ)] == [
        "mode",
        "kafka.topik",
        "models.fraud.window.rows",
        "http.port",
        "RETRAIN_DAEMON_KAFKA__TOPIK",
    ]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[models.fraud.window]\nrows = 200\nseconds = 60\n", "models.fraud.window"),
        ("[models.fraud.window]\nrows = 50\n", "models.fraud.window.min_rows"),
        ("[models.fraud.window]\nrows = 30000\n", "models.fraud.window.rows"),
        ("[models.fraud.window]\nmin_rows = 30000\n", "models.fraud.window.max_rows"),
        ("[models.fraud.window]\nseconds = 0\n", "models.fraud.window.seconds"),
        ("[models.fraud.window]\nseconds = nan\n", "models.fraud.window.seconds"),
        ("[models.fraud.window]\nidle_seconds = inf\n", "models.fraud.window.idle_seconds"),
        ("[models.fraud.window]\ngrace_seconds = -1\n", "models.fraud.window.grace_seconds"),
        ("[models.fraud.window]\ngrace_seconds = 1e12\n", "models.fraud.window.grace_seconds"),
        ("[models.fraud.policy]\ndrift_share = 0\n", "models.fraud.policy.drift_share"),
        ("[models.fraud.policy]\ndrift_share = 1.5\n", "models.fraud.policy.drift_share"),
        ("[models.fraud.policy]\nfor_windows = 0\n", "models.fraud.policy.for_windows"),
        (
            '[models.fraud.policy]\ncolumns = ["a"]\n[models.fraud.drift]\nignore = ["a"]\n',
            "models.fraud.policy.columns",
        ),
        ("[models.fraud.drift.thresholds]\nage = 0\n", "models.fraud.drift.thresholds.age"),
        ("[models.fraud.drift]\nseason_slots = 24\n", "models.fraud.drift.season_slots"),
        ("[models.fraud.drift]\nseason_seconds = 86400\n", "models.fraud.drift.season_slots"),
        (
            "[models.fraud.drift]\nseason_seconds = 86400\nseason_slots = 48\n",
            "models.fraud.drift.season_slots",
        ),
        (
            "[models.fraud.drift]\nseason_seconds = 86400\nseason_slots = 5\n",
            "models.fraud.drift.season_slots",
        ),
        ('[models.fraud.gate]\nmetric = "mae"\n', "models.fraud.gate.metric"),
        ('[models.fraud.gate]\nmode = "non_inferiority"\n', "models.fraud.gate.margin"),
        ("[models.fraud.gate]\nsegment_margin = -0.1\n", "models.fraud.gate.segment_margin"),
        ('[models.fraud.data]\nsource = "folder"\n', "models.fraud.data.path"),
        ('[models.fraud.data]\nsource = "callable"\n', "models.fraud.data.callable"),
        ('[models.fraud.data]\nsource = "callable"\ncallable = "rows"\n', "models.fraud.data.callable"),
        ('[models.fraud]\nschedule = "daily"\n', "models.fraud.schedule"),
        (MODEL + '[fields]\nlabel = ""\n', "models.fraud.data.source"),
        ('[models."a/b"]\n', 'models."a/b"'),
        (MODEL + "[http]\nport = 70000\n", "http.port"),
        (MODEL + '[kafka]\nbootstrap_servers = "broker"\n', "kafka.bootstrap_servers"),
        (MODEL + '[kafka]\nbootstrap_servers = "a:1, b:99999"\n', "kafka.bootstrap_servers"),
        (MODEL + "[kafka]\ntopic = []\n", "kafka.topic"),
        (MODEL + '[kafka]\ntopic = ["a", "a"]\n', "kafka.topic"),
        (MODEL + '[kafka]\ntopic = "a b"\n', "kafka.topic"),
        (MODEL + '[kafka]\nlabels_topic = "predictions"\n', "kafka.labels_topic"),
        (MODEL + '[kafka]\nsharing = "by-model"\n', "kafka.sharing"),
        (MODEL + '[kafka]\nsasl_username = "u"\n', "kafka.sasl_username"),
        (MODEL + "[kafka]\n" + SASL, "kafka.sasl_password"),
        (MODEL + '[fields]\nid = "@timestamp"\n', "fields.id"),
        (MODEL + '[fields]\nfeatures = ""\n', "fields.features"),
        (MODEL + '[topics.other]\nid = "x"\n', "topics.other"),
        (MODEL + '[topics.predictions]\nid = "a..b"\n', "topics.predictions.id"),
        (MODEL + '[ledger]\nurl = "mysql://h/d"\n', "ledger.url"),
        (MODEL + '[registry]\ntracking_uri = "postgresql://u:p@h/d"\n', "registry.tracking_uri"),
        (MODEL + '[prefect]\napi_url = "localhost:4200"\n', "prefect.api_url"),
        (MODEL + '[prefect]\nwebhook_url_file = "nowhere"\n', "prefect.webhook_url_file"),
        (MODEL + "kind = true\n", "models.fraud.kind"),
        (MODEL + "window = 5\n", "models.fraud.window"),
        ('[models]\nfraud = "yes"\n', "models.fraud"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_key(write: Any, text: str, key: str) -> None:
    assert only_refusal(write(text))[0] == key


def test_every_range_is_of_a_key_that_exists() -> None:
    known = {".".join(key).replace("NAME", "*") for key in _leaves(Config)}
    assert {key.removesuffix(".*") for key in RANGES} <= known


@pytest.mark.parametrize("text", [b"[kafka", b"\xff", b"mode = 'observe'\nmode = 'retrain'"])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(text)
    assert only_refusal(path)[0] == "configuration"
    assert "retrain-daemon init" in only_refusal(tmp_path / "absent.toml")[1]


def test_the_environment_wins_over_the_file(write: Any) -> None:
    path = write(MODEL + '[kafka]\ntopic = "a"\n[models.fraud.window]\nrows = 500\n')
    config = load(
        path, {"RETRAIN_DAEMON_KAFKA__TOPIC": "b", "RETRAIN_DAEMON_MODELS__FRAUD__WINDOW__ROWS": "700"}
    )
    assert (config.kafka.topic, config.models["fraud"].window.rows) == ("b", 700)


def test_the_environment_alone_can_state_everything() -> None:
    assert (
        load(None, {"RETRAIN_DAEMON_MODELS__FRAUD__KIND": "regression"}).models["fraud"].kind == "regression"
    )


def test_variables_know_no_case_and_no_punctuation(write: Any) -> None:
    path = write('[models."Fraud-v2.EU"]\n')
    name = environment_name("models.Fraud-v2_EU.reference_rows")
    assert load(path, {name: "7"}).models["Fraud-v2.EU"].reference_rows == 7


@pytest.mark.parametrize(
    ("name", "text", "key", "value"),
    [
        ("KAFKA__TOPIC", "a, b", "kafka.topic", ("a", "b")),
        ("KAFKA__TOPIC", '["a", "b"]', "kafka.topic", ("a", "b")),
        ("MODELS__FRAUD__DRIFT__IGNORE", "a", "models.fraud.drift.ignore", ("a",)),
        ("MODELS__FRAUD__DRIFT__THRESHOLDS", '{"a": 0.2}', "models.fraud.drift.thresholds", {"a": 0.2}),
        ("MODELS__FRAUD__DRIFT__THRESHOLDS__AGE", ".2", "models.fraud.drift.thresholds", {"age": 0.2}),
        ("MODELS__FRAUD__TRAINING__PARAMETERS__DEPTH", "3", "models.fraud.training.parameters", {"depth": 3}),
        (
            "MODELS__FRAUD__TRAINING__PARAMETERS__LOSS",
            "log",
            "models.fraud.training.parameters",
            {"loss": "log"},
        ),
        ("MODELS__FRAUD__GATE__FLOOR", "0.5", "models.fraud.gate.floor", 0.5),
        ("MODELS__FRAUD__GATE__FLOOR", "null", "models.fraud.gate.floor", None),
        ("PREFECT__WEBHOOK_ALLOW_PRIVATE", "true", "prefect.webhook_allow_private", True),
        ("HTTP__PORT", "0", "http.port", 0),
        ("MODE", "retrain", "mode", "retrain"),
        ("TOPICS__PREDICTIONS__ID", "@key", "topics.predictions.id", "@key"),
    ],
)
def test_variables_are_read_in_the_type_of_their_key(
    write: Any, name: str, text: str, key: str, value: Any
) -> None:
    found: Any = load(write(MODEL), {f"RETRAIN_DAEMON_{name}": text})
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


def test_every_key_has_a_variable(write: Any) -> None:
    path = write(MODEL)
    default = msgspec.to_builtins(load(path, {}))
    for key in _leaves(Config):
        if key[0] == "topics":
            continue
        names = ["fraud" if part == "NAME" else part for part in key]
        value: Any = default
        for part in names:
            value = value[part]
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        again = load(path, {environment_name(".".join(names)): text})
        assert msgspec.to_builtins(again) == default, names


@pytest.mark.parametrize("name", ["CONFIG", "PORT", "PORT_8321_TCP_ADDR", "SERVICE_HOST"])
def test_what_kubernetes_sets_by_itself_is_no_setting(write: Any, name: str) -> None:
    load(write(MODEL), {f"RETRAIN_DAEMON_{name}": "tcp://10.0.0.1:8321"})


def test_topics_state_only_what_differs(write: Any) -> None:
    config = load(
        write(
            MODEL
            + '[kafka]\nlabels_topic = "labels"\n[fields]\nid = "@key"\n[topics.labels]\nlabel = "truth"\n'
        ),
        {},
    )
    assert config.mappings == {
        "predictions": FieldSettings(id="@key"),
        "labels": FieldSettings(id="@key", label="truth"),
    }


def test_relative_paths_count_from_the_file(write: Any, tmp_path: Path) -> None:
    config = load(write(MODEL + '[models.fraud.data]\nsource = "folder"\npath = "rows"\n'), {})
    assert config.ledger.url == f"sqlite:///{tmp_path}/retrain-daemon/ledger.db"
    assert config.registry.tracking_uri == f"sqlite:///{tmp_path}/retrain-daemon/mlflow.db"
    assert config.registry.references_url == f"{tmp_path}/retrain-daemon/references"
    assert config.reports.folder == f"{tmp_path}/retrain-daemon/reports"
    assert config.models["fraud"].data.path == f"{tmp_path}/rows"


@pytest.mark.parametrize(
    "url", ["sqlite:////var/lib/x.db", "sqlite://", "sqlite:///:memory:", "postgresql://h/d"]
)
def test_other_ledger_urls_stay_as_they_are(write: Any, url: str) -> None:
    assert load(write(MODEL + f'[ledger]\nurl = "{url}"\n'), {}).ledger.url == url


def test_secrets_come_from_files_and_are_never_shown(write: Any, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("hunter-two\n")
    (tmp_path / "ledger").write_text("postgresql://u:pg-secret@h/d\n")
    path = write(
        MODEL + "[kafka]\n" + SASL + 'sasl_password_file = "password"\n[ledger]\nurl_file = "ledger"\n'
        '[prefect]\nwebhook_url = "https://hooks.example/T0/secret-path"\n'
    )
    config = load(path, {})
    assert config.kafka.sasl_password == "hunter-two"
    assert config.secrets() == ("hunter-two", "https://hooks.example/T0/secret-path", "pg-secret")
    flow = config.flow_settings("fraud")
    stored = msgspec.json.encode(flow).decode()
    for secret in ("hunter-two", "secret-path", "pg-secret"):
        assert secret not in repr(config) + repr(flow) + stored
    assert flow.kafka.sasl_password_file == str(tmp_path / "password")


def test_a_secret_is_given_once(write: Any, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("a")
    path = write(MODEL + "[kafka]\n" + SASL + 'sasl_password_file = "password"\n')
    refusal = only_refusal(path, {"RETRAIN_DAEMON_KAFKA__SASL_PASSWORD": "b"})
    assert refusal == ("kafka.sasl_password", "is given beside kafka.sasl_password_file; remove one of them")


def test_refusals_never_hold_what_was_written(write: Any) -> None:
    path = write(MODEL + '[kafka]\nsasl_password = ["s3cr3t"]\n')
    assert "s3cr3t" not in str(refusals(path))


def test_flow_settings_survive_json(write: Any) -> None:
    flow = load(write(MODEL), {}).flow_settings("fraud")
    assert msgspec.json.decode(msgspec.json.encode(flow), type=type(flow)) == flow
