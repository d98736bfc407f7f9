"""The status is read while checkpoints are written: a window that it counts has led to what it shows."""

from pathlib import Path
from typing import Any

import pytest

from daemon.ledger import Ledger
from daemon.status import ledger_status
from monitors.settings import ModelSettings

MODELS = {"fraud": ModelSettings()}
WHAT_FOLLOWS = {"model_states", "requests"}


def test_windows_are_counted_before_what_they_led_to_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    read: list[str] = []
    for name in ("window_count", "windows", *WHAT_FOLLOWS):
        method = getattr(ledger, name)

        def noted(*given: Any, name: str = name, method: Any = method, **named: Any) -> Any:
            read.append(name)
            return method(*given, **named)

        monkeypatch.setattr(ledger, name, noted)
    status = ledger_status(ledger, MODELS)
    ledger.close()
    assert status["models"]["fraud"]["windows"] == 0
    first = min(read.index(name) for name in WHAT_FOLLOWS)
    assert max(read.index(name) for name in ("window_count", "windows")) < first
