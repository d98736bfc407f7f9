"""Serving: a service that scores rows with the registry's champion, and logs what it said."""

from collections.abc import Sequence
from typing import Any

import msgspec

from flows.demo.scoreboard import Scoreboard
from flows.demo.stream import Row, Stream
from flows.registry import LoadedModel, champion_version, load_champion
from monitors.records import Scalar
from monitors.settings import FlowSettings

FLUSH_SECONDS = 30.0


class NoChampion(Exception):
    """There is nothing to serve with: the registry has no champion."""

    exit_code = 1


class ServingSimulator:
    """
    What a user's service does, in small: answer, log the answer, look for a newer champion.

    It also asks the first champion about the same rows, which a service would not: that is how the
    demo knows what would have been without retraining. Labels are logged one window later.
    """

    def __init__(self, settings: FlowSettings, stream: Stream, producer: Any, board: Scoreboard) -> None:
        self._settings = settings
        self._stream = stream
        self._producer = producer
        self._board = board
        self._champion = _loaded(settings)
        self._first = self._champion

    @property
    def version(self) -> str:
        """What the serving model calls itself in the prediction log."""
        return self._champion.model_version

    def refresh(self) -> bool:
        """Look at the registry; true if another champion serves from now on."""
        if champion_version(self._settings) == self._champion.version:
            return False
        self._champion = _loaded(self._settings)
        return True

    def serve(self, start: int, end: int) -> None:
        """Score rows `start` to `end`, and log the labels that are known by then."""
        self._log_labels(start - self._stream.window_rows, end - self._stream.window_rows)
        rows = self._stream.live[start:end]
        said, probabilities = _ask(self._champion, rows)
        never = said if self._champion is self._first else _ask(self._first, rows)[0]
        labels = [row.label for row in rows]
        self._board.add(self.version, labels=labels, live=said, never=never)
        for offset, (row, prediction, probability) in enumerate(zip(rows, said, probabilities, strict=True)):
            self._log_prediction(start + offset, row, prediction, probability)
        self._producer.flush(timeout=FLUSH_SECONDS)

    def log_last_labels(self) -> None:
        """The labels of the last window, which nobody's prediction waits for."""
        self._log_labels(len(self._stream.live) - self._stream.window_rows, len(self._stream.live))
        self._producer.flush(timeout=FLUSH_SECONDS)

    def _log_prediction(self, number: int, row: Row, prediction: Scalar, probability: float | None) -> None:
        record: dict[str, Any] = {
            "model": self._stream.model,
            "model_version": self.version,
            "id": self._id(number),
            "event_time": self._stream.event_time(number),
            "features": row.features,
            "prediction": prediction,
        }
        if probability is not None:
            record["probability"] = probability
        self._send(self._settings.kafka.topics[0], record)

    def _log_labels(self, start: int, end: int) -> None:
        for number in range(max(start, 0), max(end, 0)):
            known_at = self._stream.event_time(number + self._stream.window_rows)
            self._send(
                self._settings.kafka.labels_topic,
                {
                    "model": self._stream.model,
                    "id": self._id(number),
                    "event_time": known_at,
                    "label": self._stream.live[number].label,
                },
            )

    def _id(self, number: int) -> str:
        return f"{self._stream.model}-{number}"

    def _send(self, topic: str, record: dict[str, Any]) -> None:
        # One key per model: all of a model's rows in one partition is what windows of rows need.
        self._producer.send(topic, key=self._stream.model.encode(), value=msgspec.json.encode(record))


def _loaded(settings: FlowSettings) -> LoadedModel:
    model = load_champion(settings)
    if model is None:
        raise NoChampion(f"there is no champion of {settings.model} in {settings.registry.tracking_uri}")
    return model


def _ask(model: LoadedModel, rows: Sequence[Row]) -> tuple[list[Scalar], list[float | None]]:
    import pandas as pd

    answers = model.answers(pd.DataFrame([row.features for row in rows]))
    predictions = [value.item() if hasattr(value, "item") else value for value in answers.predictions]
    if answers.probabilities is None:
        return predictions, [None] * len(rows)
    return predictions, [round(float(value), 6) for value in answers.probabilities]
