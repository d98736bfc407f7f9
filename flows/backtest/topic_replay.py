"""The replay of a topic: what was logged, until a champion of the replay's own answers instead."""

from collections import deque
from collections.abc import Collection
from typing import TYPE_CHECKING

import msgspec

from flows.backtest.file_replay import Replayed
from flows.backtest.history import Begin
from flows.backtest.progress import Advance, still
from flows.backtest.references import Look, MemoryReferences, StoredReference
from flows.backtest.replay import Replay
from flows.backtest.stream import Said, Stream
from flows.backtest.topic_log import TopicLog
from flows.data import joined, plain_scalar, rank, truth, usable
from flows.registry import LoadedModel, MemoryRegistry
from flows.rows import LabelledRows
from monitors.episodes import Judged
from monitors.reading import Reading
from monitors.records import InvalidRecord, LabelRecord, Partition, PredictionRecord, Scalar
from monitors.settings import FlowSettings

if TYPE_CHECKING:
    import pandas as pd

_BLOCK_ROWS = 500


def replay_topic(
    settings: FlowSettings, log: TopicLog, look: Look, begin: Begin, advance: Advance = still
) -> tuple[Stream, Replayed]:
    """
    Replay the log; references and the versions of before are looked up and never written.

    A version whose reference was learned from these very records learns it again, at the same record.
    """
    stored: frozenset[str] = frozenset()
    while True:
        try:
            references = MemoryReferences(settings.settings, look, stored)
            return TopicReplay(settings, log, references, begin(), advance).run()
        except StoredReference as found:
            stored |= {found.version}


class TopicReplay:
    """
    Feeds a log to a replay. Labels wait until the window of their time has closed, as they do live; those of
    other models wait as if they were windowed like this one.

    A record that the replay's own champion would have answered, and that another version was logged
    for, is answered by that champion; all others are taken as they were logged.
    """

    def __init__(
        self,
        settings: FlowSettings,
        log: TopicLog,
        references: MemoryReferences,
        registry: MemoryRegistry,
        advance: Advance = still,
    ) -> None:
        self._settings = settings
        self._log = log
        self._advance = advance
        self._ours = [record for record in log.predictions if record.model == settings.model]
        first = self._ours[0].model_version
        self._replay = Replay(settings, log.origin, references, registry)
        self._lines = {partition: deque(line) for partition, line in log.lines.items()}
        self._left = _counts(log)
        self._labels: dict[str, Scalar] = {}
        self._fed: list[PredictionRecord] = []
        self._champion: LoadedModel | None = None
        self._answered: dict[int, tuple[Scalar, float | None]] = {}
        self._promotions = [(0, first)]
        self._next: PredictionRecord | None = None

    def run(self) -> tuple[Stream, Replayed]:
        """From the first record to the last; the stream are the rows that the model was asked for."""
        following = [*self._log.predictions[1:], None]
        for record, after in zip(self._log.predictions, following, strict=True):
            self._next = after
            self._left[record.partition] -= 1
            if record.model == self._settings.model:
                self._observe(self._served(record))
                self._advance(1)
            else:
                self._replay.monitor.times.advance(record.partition, record.event_time)
            self._close()
        return self._stream(), Replayed(
            self._replay.happened, self._said(self._fed), self._said(self._ours), tuple(self._promotions)
        )

    def _observe(self, record: PredictionRecord) -> None:
        self._fed.append(record)
        if record.label is not None:
            self._labels.setdefault(record.id, record.label)
        try:
            self._replay.observe(record)
        except InvalidRecord:
            # A version, or a partition, too many: the daemon's windows do without it, too.
            return

    def _close(self) -> None:
        """Judge what is done, in turn with the labels that are due; then carry out what was asked for."""
        self._replay.close(self._reading, self._end_row, self._take_labels)
        promoted = self._replay.settle(self._known)
        if promoted is not None:
            self._champion, self._answered = promoted, {}
            self._promotions.append((len(self._fed), promoted.model_version))

    def _reading(self) -> Reading:
        heads = {partition: self._ours_alike(line[0]) for partition, line in self._lines.items() if line}
        following = self._next
        times = self._replay.monitor.times
        # Until a later time is read, there may be more of the time that was reached.
        stands = following is not None and following.event_time <= (
            times.of(following.partition) or following.event_time
        )
        unread = (following.partition,) if following is not None and stands else ()
        return Reading(self._predicting(), self._labelling(), unread, heads)

    def _take_labels(self) -> int:
        taken = 0
        monitor = self._replay.monitor
        for _, line in sorted(self._lines.items()):
            while line and not monitor.ahead(self._ours_alike(line[0])):
                record = line.popleft()
                taken += 1
                if record.model != self._settings.model:
                    monitor.times.advance(record.partition, record.event_time)
                    continue
                self._labels[record.id] = record.label
                self._replay.observe(record)
        return taken

    def _ours_alike(self, record: LabelRecord) -> LabelRecord:
        """Other models' labels stand in the same lines; how their windows are made is not known here."""
        if record.model == self._settings.model:
            return record
        return msgspec.structs.replace(record, model=self._settings.model)

    def _predicting(self) -> Collection[Partition]:
        """The partitions that windows wait for: those that still have records, or all at the very end."""
        mine = [one for one in self._left if self._waited_for(one)]
        return [one for one in mine if self._left[one]] or mine

    def _labelling(self) -> Collection[Partition] | None:
        """All that labels come from; None where they come with the predictions alone."""
        if not self._settings.kafka.labels_topic:
            return None
        return [one for one in self._lines if self._waited_for(one)]

    def _waited_for(self, partition: Partition) -> bool:
        """A model that is shared with others waits for the partitions of its own index alone."""
        shared = self._settings.kafka.sharing == "by-model"
        return not shared or partition.index == self._ours[0].partition.index

    def _end_row(self, judged: Judged) -> int:
        return len(self._fed)

    def _served(self, record: PredictionRecord) -> PredictionRecord:
        champion = self._champion
        if champion is None or record.model_version == champion.model_version:
            return record
        place = len(self._fed)
        if place not in self._answered:
            self._answer(champion, place)
        prediction, probability = self._answered[place]
        return msgspec.structs.replace(
            record, model_version=champion.model_version, prediction=prediction, probability=probability
        )

    def _answer(self, champion: LoadedModel, start: int) -> None:
        """Some rows at once, for a model takes hardly longer to answer many."""
        rows = self._ours[start : start + _BLOCK_ROWS]
        answers = champion.answers(_frame(rows))
        for place, prediction in enumerate(answers.predictions):
            probability = None if answers.probabilities is None else float(answers.probabilities[place])
            self._answered[start + place] = plain_scalar(prediction), probability

    def _known(self) -> LabelledRows:
        """The newest rows whose label has been told, joined as the flow joins them."""
        kind, newest = self._settings.settings.kind, self._settings.settings.data.max_rows
        serving = self._promotions[-1][1]
        rows: dict[str, PredictionRecord] = {}
        for record in reversed(self._fed):
            if len(rows) >= newest:
                break
            if usable(truth(record, self._labels), kind):
                held = rows.get(record.id)
                if held is None or rank(record, serving) > rank(held, serving):
                    rows[record.id] = record
        return joined(rows.values(), self._labels, (), newest)

    def _stream(self) -> Stream:
        """All rows with all labels, for whoever adds up."""
        import numpy as np

        labels = np.empty(len(self._fed), dtype=object)
        told = {**self._labels, **{label.id: label.label for line in self._lines.values() for label in line}}
        kind = self._settings.settings.kind
        found = [truth(record, told) for record in self._fed]
        labels[:] = [label if usable(label, kind) else None for label in found]
        return Stream(
            case=self._settings.model,
            kind=kind,
            features=_frame(self._fed),
            labels=labels,
            times=tuple(record.event_time for record in self._fed),
            segments=tuple(record.segment for record in self._fed),
            reference_rows=0,
        )

    def _said(self, records: Collection[PredictionRecord]) -> Said:
        import numpy as np

        said = Said.nothing(len(records))
        probabilities = [np.nan if one.probability is None else one.probability for one in records]
        predictions = np.empty(len(records), dtype=object)
        predictions[:] = [one.prediction for one in records]
        said.put(0, predictions, np.array(probabilities, dtype=float))
        return said


def _frame(records: Collection[PredictionRecord]) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame.from_records([record.features for record in records])


def _counts(log: TopicLog) -> dict[Partition, int]:
    counts: dict[Partition, int] = {}
    for record in log.predictions:
        counts[record.partition] = counts.get(record.partition, 0) + 1
    return counts
