"""The replay: a monitor, what it asks for and what came of it, whoever feeds the records."""

from collections.abc import Callable

import msgspec

from flows.backtest.happened import Happened
from flows.backtest.references import MemoryReferences
from flows.backtest.retraining import Retrainer
from flows.registry import LoadedModel, MemoryRegistry
from flows.rows import LabelledRows
from monitors.episodes import Circumstances, Judged
from monitors.events import Event, Kind, RetrainRequest
from monitors.monitor import Monitor
from monitors.reading import Reading
from monitors.records import LabelRecord, PredictionRecord
from monitors.settings import FlowSettings


class Replay:
    """
    One model's monitor over a stream that has already happened.

    A request is carried out at once, by what was known when it was asked for, and its outcome is
    told to the monitor before another record is read.
    """

    def __init__(
        self, settings: FlowSettings, origin: str, references: MemoryReferences, registry: MemoryRegistry
    ) -> None:
        self.happened = Happened()
        self.retrainer = Retrainer(settings, references, registry)
        self.monitor = Monitor({settings.model: settings.settings}, references, settings.limits)
        self._model = self.monitor.models[settings.model]
        self._around = Circumstances(origin=origin, mode="retrain")
        self._asked: list[RetrainRequest] = []

    def observe(self, record: PredictionRecord | LabelRecord) -> None:
        """Take one record."""
        self.monitor.observe(record)

    def close(
        self,
        read: Callable[[], Reading],
        end_row: Callable[[Judged], int],
        take_labels: Callable[[], int] = lambda: 0,
    ) -> int:
        """Take all the steps that can be taken; returns how many windows have closed."""
        before = len(self.happened.windows)
        while True:
            self.monitor.note(read())
            taken = take_labels()
            result = self.monitor.close(self._circumstances)
            for judged in result.judged:
                self.happened.judge(judged, end_row(judged))
            self._tell(result.events)
            self.happened.performances += [performance for _, performance in result.performances]
            if not taken and not result.judged:
                return len(self.happened.windows) - before

    def settle(self, known: Callable[[], LabelledRows]) -> LoadedModel | None:
        """Carry out what was asked for since the last time; returns the newest champion, if there is one."""
        champion = None
        while self._asked:
            request = self._asked.pop(0)
            if request.kind == "probation":
                champion = self._reviewed(request, known()) or champion
                continue
            retrained = self.retrainer.carry_out(request, known())
            self.happened.ask(request, retrained.outcome, retrained.verdict)
            self._tell(self._model.outcome(request.request, retrained.outcome))
            champion = retrained.champion or champion
        return champion

    def _reviewed(self, request: RetrainRequest, rows: LabelledRows) -> LoadedModel | None:
        """The champion that came back, where the one on probation did not last."""
        found, before = self.retrainer.review(request, rows)
        self.happened.compare(request, found.outcome, found.verdict)
        self._tell(self._model.outcome(request.request, found.outcome))
        if before is not None:
            self._tell(self._model.champion(before.model_version, "rolled-back"))
        return before

    def _circumstances(self, model: str, version: str, key: int) -> Circumstances:
        return self._around

    def _tell(self, events: tuple[Event, ...]) -> None:
        self.happened.tell(events)
        self._asked += [
            msgspec.convert(event.payload, RetrainRequest)
            for event in events
            if event.kind is Kind.RETRAIN_REQUESTED
        ]
