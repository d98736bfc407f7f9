"""The replay of a file: each row answered by the champion of that moment, its label told when it is due."""

from dataclasses import dataclass

import msgspec
import numpy as np

from flows.backtest.happened import Happened
from flows.backtest.progress import Advance, still
from flows.backtest.references import MemoryReferences
from flows.backtest.replay import Replay
from flows.backtest.stream import Said, Stream
from flows.registry import LoadedModel, MemoryRegistry
from flows.rows import LabelledRows
from monitors.episodes import Judged
from monitors.reading import Reading
from monitors.records import LabelRecord, Partition, PredictionRecord, Scalar
from monitors.settings import FlowSettings, ModelSettings

ORIGIN = "backtest"
PREDICTIONS, LABELS = Partition("predictions", 0), Partition("labels", 0)
# Nothing is ever there that was not told.
_ALL_READ = Reading((PREDICTIONS,), (LABELS,))
# Where windows are times, how many rows may be answered at once.
_BLOCK_ROWS = 500


@dataclass(frozen=True, eq=False)
class Replayed:
    """What a policy did on a stream: everything that happened, what was answered, and by which version."""

    happened: Happened
    said: Said
    never: Said
    promotions: tuple[tuple[int, str], ...]


class FileReplay:
    """
    Feeds a stream's live rows to a replay.

    The labels of window t are told when window t + `label_lag` has closed, and before that nobody
    who decides or trains sees them.
    """

    def __init__(
        self,
        settings: FlowSettings,
        stream: Stream,
        label_lag: int,
        advance: Advance = still,
    ) -> None:
        model = settings.settings
        horizon = _horizon(model, stream, label_lag)
        model = msgspec.structs.replace(model, label_horizon_seconds=horizon)
        self._settings = msgspec.structs.replace(settings, settings=model)
        self._stream = stream
        self._lag = label_lag
        self._advance = advance
        references = MemoryReferences(model)
        self._replay = Replay(self._settings, ORIGIN, references, MemoryRegistry())
        self._said = Said.nothing(len(stream))
        self._ends: list[int] = []
        self._labels_told = stream.reference_rows

    def run(self) -> Replayed:
        """From the first live row to the last."""
        stream, first = self._stream, self._stream.reference_rows
        champion = self._replay.retrainer.first(stream.labelled(0, first))
        never = self._never(champion)
        promotions = [(first, champion.model_version)]
        row = first
        while row < len(stream):
            end = min(row + self._block(row), len(stream))
            promoted, row = self._serve(champion, row, end)
            if promoted is not None:
                champion = promoted
                promotions.append((row, champion.model_version))
        return Replayed(self._replay.happened, self._said, never, tuple(promotions))

    def _serve(self, champion: LoadedModel, start: int, end: int) -> tuple[LoadedModel | None, int]:
        """Rows `start <= row < end`, or up to the one after which another champion serves."""
        stream = self._stream
        answers = champion.answers(stream.features.iloc[start:end])
        self._said.put(start, answers.predictions, answers.probabilities)
        for row, features in zip(range(start, end), stream.records(start, end), strict=True):
            self._replay.observe(self._record(row, features, champion.model_version))
            if self._close() and (promoted := self._learn_and_settle(row)):
                self._forget(row + 1, end)
                self._advance(row + 1 - start)
                return promoted, row + 1
        self._advance(end - start)
        return None, end

    def _learn_and_settle(self, row: int) -> LoadedModel | None:
        """The labels that are due first, then what was asked for: a run reads the log when it starts."""
        due = self._known_until
        for told in range(self._labels_told, due):
            if self._stream.known[told]:
                self._replay.observe(self._label(told, row))
        self._labels_told = max(due, self._labels_told)
        self._close()
        return self._replay.settle(self._known)

    def _close(self) -> int:
        return self._replay.close(lambda: _ALL_READ, self._end_row)

    def _end_row(self, judged: Judged) -> int:
        end = self._stream.reference_rows + max(span.end for span in judged.spans)
        if not self._ends or end > self._ends[-1]:
            self._ends.append(end)
        return end

    @property
    def _known_until(self) -> int:
        """The first row whose label nobody knows yet."""
        closed = len(self._ends) - self._lag
        return self._ends[closed - 1] if closed > 0 else self._stream.reference_rows

    def _known(self) -> LabelledRows:
        rows = self._stream.labelled(0, self._known_until, self._said)
        newest = self._settings.settings.data.max_rows
        return rows.between(max(0, len(rows) - newest), len(rows))

    def _record(self, row: int, features: dict[str, Scalar], version: str) -> PredictionRecord:
        probability = float(self._said.probabilities[row])
        return PredictionRecord(
            model=self._settings.model,
            model_version=version,
            id=str(row),
            event_time=self._stream.times[row],
            features=features,
            prediction=self._said.predictions[row],
            partition=PREDICTIONS,
            offset=row - self._stream.reference_rows,
            probability=None if probability != probability else probability,
            segment=self._stream.segments[row],
        )

    def _label(self, row: int, now: int) -> LabelRecord:
        return LabelRecord(
            model=self._settings.model,
            id=str(row),
            label=self._stream.labels[row],
            event_time=self._stream.times[now],
            partition=LABELS,
            offset=row - self._stream.reference_rows,
        )

    def _never(self, champion: LoadedModel) -> Said:
        first = self._stream.reference_rows
        answers = champion.answers(self._stream.features.iloc[first:])
        said = Said.nothing(len(self._stream))
        said.put(first, answers.predictions, answers.probabilities)
        return said

    def _forget(self, start: int, end: int) -> None:
        """What the last champion would have said of rows that the next one answers."""
        self._said.predictions[start:end] = None
        self._said.probabilities[start:end] = np.nan

    def _block(self, row: int) -> int:
        """Rows until the next window of rows ends: no champion changes before."""
        rows = self._settings.settings.window.rows
        if rows is None:
            return _BLOCK_ROWS
        return rows - (row - self._stream.reference_rows) % rows


def _horizon(settings: ModelSettings, stream: Stream, label_lag: int) -> float:
    """As long as labels ever take: they all count, and missing ones are not waited for any longer."""
    live = stream.seconds[stream.reference_rows :]
    window = settings.window
    if window.rows is None:
        gap = float(np.diff(live).max()) if len(live) > 1 else 0.0
        return (label_lag + 1) * (window.seconds or 0.0) + window.grace_seconds + gap + 1.0
    ends = live[window.rows - 1 :: window.rows]
    waits = ends[label_lag:] - ends[: len(ends) - label_lag]
    return float(waits.max(initial=0.0)) + 1.0
