"""The command line: what it answers, with which exit code, and what it imports for that."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from daemon.cli import CONFIG_VARIABLE, main, parse_until
from daemon.config import load
from daemon.errors import UsageError
from daemon.ledger import Ledger

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 1, 1, tzinfo=UTC)
HEAVY = {
    "prefect",
    "mlflow",
    "evidently",
    "pandas",
    "numpy",
    "sklearn",
    "kafka",
    "sqlalchemy",
    "rich",
    "httpx",
}
COMMANDS = (
    *("init", "check", "deploy", "start", "status", "retrain", "silence", "rollback"),
    *("explain", "verify", "dlq", "doctor", "backtest"),
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("RETRAIN_DAEMON_"):
            monkeypatch.delenv(name)
    return tmp_path


def imported_by(*words: str) -> set[str]:
    """The top-level modules of a process that ran one command."""
    code = (
        "import sys\nfrom daemon.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('MODULES', *{name.partition('.')[0] for name in sys.modules})"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, check=True
    )
    return set(done.stdout.rpartition("MODULES ")[2].split())


def test_help_imports_next_to_nothing() -> None:
    assert imported_by("--help") & (HEAVY | {"msgspec", "structlog", "flows", "asyncio"}) == set()


def test_checking_offline_imports_nothing_heavy() -> None:
    main(["init", "--model", "fraud"])
    assert imported_by("check") & (HEAVY | {"flows"}) == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_it_does_with_defaults_and_three_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert CONFIG_VARIABLE in said
    assert said.rpartition("examples:\n")[2].count(f"retrain-daemon {command}") == 3


def test_init_writes_a_config_that_loads_and_checks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--model", "fraud v2", "--topic", "served", "--bootstrap-servers", "k:1"]) == 0
    config = load(folder / "retrain-daemon.toml", {})
    assert (list(config.models), config.kafka.topic, config.kafka.bootstrap_servers) == (
        ["fraud v2"],
        "served",
        "k:1",
    )
    assert len((folder / "retrain-daemon.toml").read_text().splitlines()) <= 24
    assert main(["check"]) == 0
    assert "failed" not in capsys.readouterr().out


def test_init_never_overwrites(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.toml").write_text("precious")
    assert main(["init", "--config", "mine.toml"]) == 2
    assert (folder / "mine.toml").read_text() == "precious"
    assert "mine.toml: exists already" in capsys.readouterr().err


def test_a_config_problem_is_one_line_and_exit_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "retrain-daemon.toml").write_text('[kafka]\ntopik = "a"\n[models.fraud]\n')
    assert main(["check"]) == 2
    assert capsys.readouterr().err == (
        "retrain-daemon: retrain-daemon.toml [kafka]: kafka.topik is no setting; did you mean kafka.topic?\n"
    )


def test_without_a_config_it_says_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 2
    assert "retrain-daemon init" in capsys.readouterr().err


def test_the_config_is_named_by_option_then_variable(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        main(["init", "--model", name, "--config", f"{name}.toml"])
    monkeypatch.setenv(CONFIG_VARIABLE, "one.toml")
    for words, model in (
        (["check"], "one"),
        (["check", "--config", "two.toml"], "two"),
        (["--config", "two.toml", "check"], "two"),
    ):
        capsys.readouterr()
        assert main(words) == 0
        assert f"models: {model}\n" in capsys.readouterr().out


def test_no_file_is_needed_where_the_environment_names_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RETRAIN_DAEMON_MODELS__FRAUD__KIND", "regression")
    assert main(["check"]) == 0
    assert "models: fraud\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [[], ["unheard-of"], ["silence", "fraud"], ["--log-level", "loud", "check"]]
)
def test_a_wrong_command_is_exit_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    "words",
    [
        ["retrain", "other"],
        ["silence", "other", "--until", "1h"],
        ["rollback", "other"],
        ["deploy", "--model", "other"],
    ],
)
def test_an_unknown_model_is_refused_by_name(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["init", "--model", "fraud"])
    assert main(words) == 2
    assert "other: is no configured model; there are fraud" in capsys.readouterr().err


def test_silence_is_kept_in_the_ledger_and_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["init", "--model", "fraud"])
    assert main(["silence", "fraud", "--until", "2099-01-01T00:00:00+01:00"]) == 0
    ledger = Ledger(load(folder / "retrain-daemon.toml", {}).ledger.url)
    assert ledger.silences() == {"fraud": datetime(2098, 12, 31, 23, tzinfo=UTC)}
    ledger.close()
    capsys.readouterr()
    assert main(["status", "--json"]) == 0
    status: Any = json.loads(capsys.readouterr().out)
    assert status["models"]["fraud"]["silenced_until"] == "2098-12-31T23:00:00+00:00"
    assert main(["status"]) == 0
    assert "fraud" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("now", NOW),
        ("90m", datetime(2026, 1, 1, 1, 30, tzinfo=UTC)),
        ("1d12h", datetime(2026, 1, 2, 12, tzinfo=UTC)),
        ("30s", datetime(2026, 1, 1, 0, 0, 30, tzinfo=UTC)),
        ("2026-02-01T00:00:00Z", datetime(2026, 2, 1, tzinfo=UTC)),
        ("2026-02-01T00:00:00-05:00", datetime(2026, 2, 1, 5, tzinfo=UTC)),
    ],
)
def test_silences_end_at_a_time_or_after_a_while(text: str, moment: datetime) -> None:
    assert parse_until(text, NOW) == moment


@pytest.mark.parametrize("text", ["", "soon", "2", "h", "2h30", "2026-02-01T00:00:00", "9999999999d", "1h2d"])
def test_what_is_no_time_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"--until .*(use|end it)"):
        parse_until(text, NOW)


def test_a_defect_is_one_line_without_a_traceback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["init", "--model", "fraud"])
    text = (
        folder / "retrain-daemon.toml"
    ).read_text() + '[ledger]\nurl = "postgresql+nodriver://u:pg-pass@h/d"\n'
    (folder / "retrain-daemon.toml").write_text(text)
    assert main(["silence", "fraud", "--until", "1h"]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "pg-pass" not in said
    with pytest.raises(Exception, match="nodriver"):
        main(["silence", "fraud", "--until", "1h", "--log-level", "debug"])


def test_telemetry_is_off_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY", "PREFECT_SERVER_ANALYTICS_ENABLED"):
        monkeypatch.delenv(name, raising=False)
    main(["check"])
    assert (os.environ["DO_NOT_TRACK"], os.environ["MLFLOW_DISABLE_TELEMETRY"]) == ("true", "true")
