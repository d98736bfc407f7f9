"""The monitor: records go in, judged windows and events come out. Everything decided, nothing done."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal, Protocol

import msgspec

from monitors import probation, steps
from monitors.concentration import suspects
from monitors.drift import DriftEngine, DriftReport, SegmentShift, WindowRows
from monitors.episodes import Circumstances, Judged, ModelState, on_champion
from monitors.events import Event, Outcome
from monitors.performance import EarlyLabel, LabelChanges, Labels, Patience, PendingWindow, Performance
from monitors.policy import Decision, PolicyState, Verdict, step
from monitors.reading import Place, Reading
from monitors.records import InvalidRecord, LabelRecord, Partition, PredictionRecord
from monitors.settings import LimitSettings, ModelSettings
from monitors.steps import Closed, Heard, Taken, is_quiet
from monitors.windows import ClosedWindow, StreamTimes, Windows, WindowsState, closing_time, make_windows

# How many windows' worth of labels may wait for their window to close.
EARLY_WINDOWS = 10
# How far the labels have come where none come later.
_NO_MORE_LABELS = datetime.max.replace(tzinfo=UTC)

_BY_INDEX = (
    'kafka.sharing = "by-model" needs all records of a model in partitions of one index, and those of this '
    'model are in {where}; key predictions and labels by model, or share "one-active"'
)

Learn = Callable[[Sequence[PredictionRecord]], DriftEngine]


class References(Protocol):
    """What a version's windows are held against. Both give an engine that is bound to a reference."""

    def find(self, model: str, version: str) -> DriftEngine | None:
        """The engine of a version that has a reference; None: it has to be learned."""

    def learn(self, model: str, version: str, rows: Sequence[PredictionRecord]) -> DriftEngine:
        """Keep these rows as the version's reference; the same rows again give the same reference."""


class VersionState(msgspec.Struct, frozen=True):
    """What a checkpoint holds of a version beside its rows."""

    windows: WindowsState = WindowsState()
    policy: PolicyState = PolicyState()
    judged: int = 0
    learning: bool = False


class VersionChanges(msgspec.Struct, frozen=True):
    """What a checkpoint must add: `rows` by window key, `gone` the keys of windows that were closed."""

    state: VersionState
    rows: dict[int, list[PredictionRecord]]
    gone: tuple[int, ...]
    learned_rows: list[PredictionRecord]


class ModelChanges(msgspec.Struct, frozen=True):
    """
    Everything about one model that is not as the last checkpoint has it.

    `counted` are the windows, by (version, key), that count for a budget: those of the version in service
    that something was decided on.
    """

    state: ModelState
    versions: dict[str, VersionChanges]
    labels: LabelChanges
    counted: tuple[tuple[str, int], ...] = ()


class VersionSaved(msgspec.Struct, frozen=True):
    """A version as a checkpoint has it."""

    state: VersionState
    rows: dict[int, list[PredictionRecord]]
    learned_rows: list[PredictionRecord]


class ModelSaved(msgspec.Struct, frozen=True):
    """A model as a checkpoint has it."""

    state: ModelState
    versions: dict[str, VersionSaved]
    pending: tuple[PendingWindow, ...] = ()
    early: tuple[EarlyLabel, ...] = ()
    early_end: int = 0


class Result(msgspec.Struct, frozen=True):
    """
    What some steps led to, in the order of the ledger; `rows` are those of `judged`, in step.

    `steps` are the windows and the second judgements as they were taken, each with the name of its model.
    """

    judged: tuple[Judged, ...] = ()
    rows: tuple[WindowRows, ...] = ()
    events: tuple[Event, ...] = ()
    performances: tuple[tuple[str, Performance], ...] = ()
    steps: tuple[tuple[str, Taken], ...] = ()

    def then(self, later: "Result") -> "Result":
        """Both, one after the other."""
        return Result(
            self.judged + later.judged,
            self.rows + later.rows,
            self.events + later.events,
            self.performances + later.performances,
            self.steps + later.steps,
        )


class _Steps:
    """A result in the making."""

    def __init__(self) -> None:
        self.judged: list[Judged] = []
        self.rows: list[WindowRows] = []
        self.events: list[Event] = []
        self.performances: list[tuple[str, Performance]] = []
        self.steps: list[tuple[str, Taken]] = []

    def result(self) -> Result:
        parts = self.judged, self.rows, self.events, self.performances, self.steps
        return Result(*map(tuple, parts))  # type: ignore[arg-type]


class _Version:
    """One model version: its open windows, its reference (or the rows it learns one from), its policy."""

    def __init__(
        self, settings: ModelSettings, engine: DriftEngine | None, saved: VersionSaved | None
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.windows: Windows = make_windows(settings.window)
        self.learned: list[PredictionRecord] = []
        self.policy = PolicyState()
        self.judged = 0
        self._gone: list[int] = []
        self._learned_before = 0
        if saved is not None:
            self.windows.restore(saved.state.windows, saved.rows)
            self.learned = list(saved.learned_rows)
            self._learned_before = len(self.learned)
            self.policy, self.judged = saved.state.policy, saved.state.judged

    def close(self, stream_time: datetime | None) -> list[ClosedWindow]:
        closed = self.windows.close(stream_time)
        self._gone += [window.key for window in closed]
        return closed

    def judge(
        self, window: ClosedWindow, learn: Learn
    ) -> tuple[DriftReport, Decision, tuple[SegmentShift, ...]]:
        self.judged += 1
        if self.engine is None:
            return DriftReport(()), self._learn(window, learn), ()
        suffice = window.seen >= self.settings.window.min_rows
        report = self.engine.judge(window.rows.records) if suffice else DriftReport(())
        self.policy, decision = step(self.settings.policy, self.policy, window.rows.start, suffice, report)
        columns = suspects(report, decision)
        located = self.engine.locate(window.rows.records, columns) if columns else ()
        return report, decision, located

    def _learn(self, window: ClosedWindow, learn: Learn) -> Decision:
        self.learned += window.rows.records
        needed = self.settings.reference_rows
        clause = f"learning the reference: {min(len(self.learned), needed)} of {needed} rows"
        if len(self.learned) >= needed:
            self.engine = learn(self.learned[:needed])
            self.learned, self._learned_before = [], 0
        return Decision(Verdict.LEARNING, self.policy.phase, clause)

    def take_changes(self) -> VersionChanges:
        fresh, self._learned_before = self.learned[self._learned_before :], len(self.learned)
        gone, self._gone = tuple(self._gone), []
        state = VersionState(self.windows.state(), self.policy, self.judged, self.engine is None)
        return VersionChanges(state, self.windows.take_added(), gone, fresh)


class ModelMonitor:
    """One model: its versions, its labels, its episode."""

    def __init__(
        self,
        name: str,
        settings: ModelSettings,
        references: References,
        max_versions: int,
        saved: ModelSaved | None = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self.state = saved.state if saved else ModelState(serving=settings.serving_version)
        self._references = references
        self._max_versions = max_versions
        self._versions: dict[str, _Version] = {}
        self._touched: set[str] = set()
        self._counted: list[tuple[str, int]] = []
        self._saved: set[str] = set()
        capacity = EARLY_WINDOWS * (settings.window.rows or settings.window.max_rows)
        self._labels = Labels(settings.kind, capacity, _patience(settings))
        if saved is not None:
            self._restore(saved)

    @property
    def versions(self) -> Collection[str]:
        """The versions that were met so far."""
        return self._versions.keys()

    @property
    def met(self) -> bool:
        """Whether there is a version that no checkpoint knows of."""
        return not self._versions.keys() <= self._saved

    def late(self, version: str) -> int:
        """
        How many records of a version came after their window was closed, so far.

        Not part of the evidence: how many came *before the next window was judged* depends on how
        the partitions were interleaved.
        """
        return self._versions[version].windows.late

    def observe(self, record: PredictionRecord, earlier: datetime) -> None:
        """Take one prediction. Raises `InvalidRecord` where it would be a version too many."""
        version = self._versions.get(record.model_version) or self._meet(record.model_version)
        version.windows.add(record, earlier)
        self._touched.add(record.model_version)

    def keep_home(self, record: PredictionRecord) -> None:
        """Raises `InvalidRecord` where count windows would be made of two partitions."""
        home = self.state.home
        if home is None:
            home = record.partition
            self.state = msgspec.structs.replace(self.state, home=home)
        if record.partition != home:
            raise InvalidRecord(
                "second_partition",
                f"window.rows needs all records of a model in one partition, and those of this model are in "
                f"{home.topic}/{home.index}; key the records by model, or use window.seconds",
            )

    def label(self, record: LabelRecord, earlier: datetime | None) -> None:
        """Take one label; `earlier` is the stream time of its partition before it."""
        self._labels.add(record, earlier)

    def due(self, stream_time: datetime | None) -> list[datetime]:
        """When the windows that are done had to close."""
        return [time for one in self._versions.values() for time in one.windows.due(stream_time)]

    def close(self, stream_time: datetime) -> list[tuple[str, ClosedWindow]]:
        """The windows that are done by then, with their versions, in no particular order."""
        return [
            (name, window)
            for name, version in self._versions.items()
            for window in version.close(stream_time)
        ]

    def judge(
        self, around: Circumstances, name: str, window: ClosedWindow
    ) -> tuple[Judged, tuple[Event, ...]]:
        """Decide on one closed window."""
        version = self._versions[name]
        self._touched.add(name)
        report, decision, segments = version.judge(
            window, lambda rows: self._references.learn(self.name, name, rows)
        )
        rows = window.rows
        sound = not report.damaged
        self._labels.expect(name, window.key, rows.start, rows.end, rows.records, window.spans, sound)
        judged = Judged(
            model=self.name,
            version=name,
            key=window.key,
            start=window.rows.start,
            end=window.rows.end,
            seen=window.seen,
            sampled=len(window.rows.records),
            spans=window.spans,
            report=report,
            decision=decision,
            segments=segments,
        )
        if self._counts(judged):
            self._counted.append((name, window.key))
        baseline = None if version.engine is None else version.engine.baseline
        self.state, events = steps.on_window(around, self.settings, self.state, judged, baseline)
        if self.state.probation is not None:
            served = probation.Served(name, judged.start, judged.end, judged.spans)
            # Who only observes asks for nothing, not even for a comparison.
            observing = around.mode == "observe"
            self._try_out(None if observing else probation.on_window(self.state.probation, served))
        return judged, events

    def _counts(self, judged: Judged) -> bool:
        decided = judged.decision.verdict in (Verdict.CALM, Verdict.DRIFTED)
        return decided and judged.version == (self.state.serving or judged.version)

    def closing_time(self, event_time: datetime) -> datetime:
        """The stream time that closes the window of an event time."""
        return closing_time(self.settings.window, event_time)

    def pass_labels(self, label_time: datetime | None) -> None:
        """No label of an earlier time is to come: what has no others any more is judged on those it has."""
        if label_time is not None:
            self._labels.pass_labels(label_time)

    def pass_predictions(self, prediction_time: datetime) -> None:
        """Windows of a time have closed: what waited for labels for too long by then is given up."""
        self._labels.pass_predictions(prediction_time)

    def take_performances(self) -> list[Performance]:
        """The second judgements since this was last asked for, in order."""
        return self._labels.take_judged()

    def matured(self, around: Circumstances, performance: Performance) -> tuple[Event, ...]:
        """A window's labels are there, and were judged: what that says of a champion on probation."""
        if self.state.probation is None:
            return ()
        gate, origin = self.settings.gate, around.origin
        rise = None if steps.is_quiet(around) else steps.rise(self.settings, self.state, performance)
        tried, events = probation.on_labels(self.state.probation, gate, origin, performance, rise)
        self._try_out(tried)
        return events

    def performed(self, around: Circumstances, performance: Performance) -> tuple[Event, ...]:
        """What a second judgement leads to."""
        self.state, events = steps.on_performance(around, self.settings, self.name, self.state, performance)
        return events

    def outcome(self, request: str, outcome: Outcome) -> tuple[Event, ...]:
        """A request of this model ended."""
        before = self.state
        self.state, events = steps.on_outcome(self.settings, before, request, outcome)
        if self.state.probation is not None:
            gate = self.settings.gate
            self._try_out(probation.on_outcome(self.state.probation, gate, request, outcome))
        # An outcome that is told again changes nothing, and begins nothing anew.
        if self.state is not before and outcome.action == "promoted":
            self._try_out(probation.begin(self.name, request, outcome, self.settings.gate))
        return events

    def champion(self, version: str, action: Literal["promoted", "rolled-back"]) -> tuple[Event, ...]:
        """The champion moved without a request of ours."""
        self.state, events = on_champion(self.settings.policy, self.state, version, action)
        if self.state.probation is not None and version:
            self._try_out(probation.on_champion(self.state.probation, version))
        return events

    def _try_out(self, tried: probation.Probation | None) -> None:
        if tried != self.state.probation:
            self.state = msgspec.structs.replace(self.state, probation=tried)

    def take_changes(self) -> ModelChanges:
        """What a checkpoint must add to the one before."""
        touched, self._touched = sorted(self._touched), set()
        self._saved.update(touched)
        counted, self._counted = tuple(self._counted), []
        return ModelChanges(
            state=self.state,
            versions={name: self._versions[name].take_changes() for name in touched},
            labels=self._labels.take_changes(),
            counted=counted,
        )

    def _meet(self, name: str) -> _Version:
        engine = self._references.find(self.name, name)
        unknown = sum(version.engine is None for version in self._versions.values())
        if engine is None and unknown >= self._max_versions:
            raise InvalidRecord(
                "too_many_versions",
                f"model has {unknown} versions without a reference, "
                "and limits.max_versions_per_model allows no more",
            )
        version = self._versions[name] = _Version(self.settings, engine, None)
        return version

    def _restore(self, saved: ModelSaved) -> None:
        for name, version in saved.versions.items():
            engine = None if version.state.learning else self._references.find(self.name, name)
            self._versions[name] = _Version(self.settings, engine, version)
        self._saved.update(saved.versions)
        self._labels.restore(saved.pending, saved.early, saved.early_end)


class Monitor:
    """
    The models that a member is the owner of, and the stream times of its partitions.

    The same records give the same windows and decisions, however partitions are interleaved and
    wherever the process was killed and restored from its checkpoint. To that end steps are taken in an
    order that the log gives: windows close at the stream time that ends them, and the labels known by
    then are heard before, so that each second judgement has its place between two windows. Whoever
    drives a monitor says with `note` how far the log was read, hands over the labels that are not `ahead`,
    calls `close`, and begins again as long as that led to anything.

    `by_index`: a model is at home in one partition index, and its windows wait for the partitions of
    that index alone, so that they do not depend on what else the member owns. Only the models with a
    home are watched; others have to be admitted when they are met.
    """

    def __init__(
        self,
        models: Mapping[str, ModelSettings],
        references: References,
        limits: LimitSettings,
        saved: Mapping[str, ModelSaved] | None = None,
        homes: Mapping[str, Partition] | None = None,
        by_index: bool = False,
    ) -> None:
        self._settings = models
        self._references = references
        self._max_versions = limits.max_versions_per_model
        self._by_index = by_index
        self._homes: dict[str, Partition] = dict(homes or {})
        self.models = {
            name: self._model(name, (saved or {}).get(name))
            for name in models
            if not by_index or name in self._homes
        }
        self.times = StreamTimes()
        self._reading = Reading((), None)
        # As of the last `note`, by group: the stream time, when the next window is to close (if one is), its
        # models, and the partitions that labels come from.
        self._passed: dict[int | None, datetime | None] | None = None
        self._due: dict[int | None, datetime] = {}
        self._members: dict[int | None, list[ModelMonitor]] = {}
        self._sources: dict[int | None, list[Partition]] = {}

    @property
    def met(self) -> bool:
        """
        Whether a version was met since the last checkpoint; then the next has to come before `close`.

        A reference outlives the process that learned it. Whoever comes after that process has to know
        that it was being learned, and not given.
        """
        return any(model.met for model in self.models.values())

    def note(self, reading: Reading) -> None:
        """How far the log was read by now, which decides on the steps that may be taken."""
        self._reading = reading
        self._passed = self._passed_by(reading.predictions)
        self._sources = {}
        for partition in sorted(reading.labels or ()):
            self._sources.setdefault(self._group(partition), []).append(partition)
        self._note_due()

    def ahead(self, record: LabelRecord) -> bool:
        """
        Whether a label at the head of its line has to wait, because other steps come first.

        For one, the window of its time has to close. Only a closed window knows which rows it sampled: a
        label taken before would be one of a limited number that are kept, and which of them last would
        depend on how much was read at once. Then, all the labels that come before it have to be known.
        """
        if self._passed is None:
            return True
        group = self._group(record.partition)
        if group not in self._passed:
            return False  # nothing is ever predicted there
        place = self._place(record)
        return not self._is_reached(record, place.time) or any(
            self._may_bring_earlier(group, other, place)
            for other in self._sources.get(group, ())
            if other != record.partition
        )

    @property
    def waits(self) -> bool:
        """Whether a step is held back by what there may still be to read."""
        return any(self._unheard(group) for group in self._due) or any(
            self._is_tied(head, self._place(head).time) for head in self._reading.heads.values()
        )

    def behind(self, partition: Partition) -> int:
        """How many windows wait for labels that are not read yet, in the group of this partition."""
        group = self._group(partition)
        if group not in self._due or not self._unheard(group):
            return 0
        assert self._passed is not None
        return sum(len(model.due(self._passed.get(group))) for model in self._members.get(group, ()))

    def homeless(self, record: PredictionRecord | LabelRecord) -> bool:
        """Whether this is a prediction of a model of which it is not known where it is at home."""
        return self._by_index and isinstance(record, PredictionRecord) and record.model not in self._homes

    def admit(self, model: str, home: Partition, saved: ModelSaved | None) -> None:
        """A model was met that is at home there; it is watched from now on."""
        self._homes[model] = home
        self.models[model] = self._model(model, saved)

    def at_home(self, partition: Partition) -> list[str]:
        """The models that the records of this partition are about, as far as is known."""
        if not self._by_index:
            return list(self.models)
        return [name for name in self.models if self._homes[name].index == partition.index]

    def observe(self, record: PredictionRecord | LabelRecord) -> None:
        """Take one record. Raises `InvalidRecord` for one that no window may take."""
        model = self._watched(record)
        if isinstance(record, LabelRecord):
            self._label(model, record)
        else:
            model.observe(record, self.times.of(record.partition) or record.event_time)
            self.times.advance(record.partition, record.event_time)

    def close(self, circumstances: Callable[[str, str, int], Circumstances]) -> Result:
        """
        Take what the labels led to, then judge the windows that have to close next, if they may.

        Those of one stream time are judged in (end, model, version, key) order; nothing that closes later
        is touched: labels may come in between.
        """
        taken = _Steps()
        closed = [
            (window.rows.end, name, version, window)
            for name, time in self._closing().items()
            for version, window in self.models[name].close(time)
        ]
        closed.sort(key=lambda entry: (entry[0], entry[1], entry[2], entry[3].key))
        concerned = {name: self._due[self._group_of(name)] for _, name, _, _ in closed}
        self._pass_labels(concerned)
        self._perform(taken, circumstances, self.models)
        for _, name, version, window in closed:
            around = circumstances(name, version, window.key)
            one, told = self.models[name].judge(around, version, window)
            taken.steps.append((name, Closed(version, window.key, is_quiet(around))))
            taken.judged.append(one)
            taken.rows.append(window.rows)
            taken.events += told
        self._pass_labels(concerned)
        for name, time in concerned.items():
            self.models[name].pass_predictions(time)
        self._perform(taken, circumstances, concerned)
        return taken.result()

    def _closing(self) -> dict[str, datetime]:
        """The models of which windows may close now, and up to which stream time."""
        due = {group: time for group, time in self._due.items() if self._may_close(group, time)}
        groups = {name: self._group_of(name) for name in self.models} if due else {}
        return {name: due[group] for name, group in groups.items() if group in due}

    def _pass_labels(self, closing: Iterable[str]) -> None:
        """Between two windows all labels known by then have been heard."""
        for name in closing:
            self.models[name].pass_labels(self._label_time(self._group_of(name)))

    def _perform(
        self, taken: _Steps, circumstances: Callable[[str, str, int], Circumstances], names: Iterable[str]
    ) -> None:
        """Take the second judgements that have become possible."""
        for name in names:
            model = self.models[name]
            for performance in model.take_performances():
                around = circumstances(name, performance.version, performance.key)
                taken.performances.append((name, performance))
                taken.steps.append((name, Heard(performance, is_quiet(around))))
                taken.events += model.performed(around, performance)
                taken.events += model.matured(around, performance)

    # --- the order of steps ----------------------------------------------------------------------

    def _label(self, model: ModelMonitor, record: LabelRecord) -> None:
        """
        Where labels come from one partition, they have passed a time with the first that is later.

        Where from several, only once the window of that time is over for all of them: until then it would
        depend on which of them was read first.
        """
        partition, group = record.partition, self._group(record.partition)
        alone = len(self._sources.get(group, ())) <= 1
        before = self._label_time(group)
        if not alone and before is not None and record.event_time > before:
            for one in self._members.get(group, ()):
                if one.closing_time(before) < one.closing_time(record.event_time):
                    one.pass_labels(before)
        model.label(record, self.times.of(partition))
        self.times.advance(partition, record.event_time)
        if alone:
            for one in self._members.get(group, ()):
                one.pass_labels(self.times.of(partition))

    def _note_due(self) -> None:
        """When the next window of each group has to close, where one is done; and whose it may be."""
        self._due, self._members = {}, {}
        for name, model in self.models.items():
            group = self._group_of(name)
            self._members.setdefault(group, []).append(model)
            times = model.due((self._passed or {}).get(group))
            if times:
                self._due[group] = min(*times, self._due.get(group, times[0]))

    def _may_close(self, group: int | None, time: datetime) -> bool:
        """Whether all labels that come before windows which close then have been heard."""
        heads = self._reading.heads
        return not self._unheard(group) and all(
            self._place(heads[one]).time >= time for one in self._sources.get(group, ()) if one in heads
        )

    def _unheard(self, group: int | None) -> bool:
        """Whether there may be labels of this group that nobody has seen."""
        reading = self._reading
        return any(one in reading.unread and one not in reading.heads for one in self._sources.get(group, ()))

    def _is_reached(self, record: LabelRecord, time: datetime) -> bool:
        """Whether all windows that close by the time of this label have closed."""
        group = self._group(record.partition)
        passed, due = (self._passed or {}).get(group), self._due.get(group)
        if passed is None or passed < time or (due is not None and due <= time):
            return False
        return not self._is_tied(record, time)

    def _is_tied(self, record: LabelRecord, time: datetime) -> bool:
        """Whether a window of so many rows may yet be filled at this very time."""
        group, reading = self._group(record.partition), self._reading
        return (
            self._settings[record.model].window.rows is not None
            and (self._passed or {}).get(group) == time
            and any(one in reading.unread and self._group(one) == group for one in reading.predictions)
        )

    def _may_bring_earlier(self, group: int | None, other: Partition, place: Place) -> bool:
        """Whether another partition has, or may have, a label that comes before this place."""
        head = self._reading.heads.get(other)
        if head is not None:
            return self._place(head) < place
        # Read to its end, it may be written to all the same: until the next window has to close, we wait.
        return other in self._reading.unread or group not in self._due

    def _place(self, record: LabelRecord) -> Place:
        """After the windows that end at the closing time of what its partition has reached with it."""
        reached = max(record.event_time, self.times.of(record.partition) or record.event_time)
        return Place(closing_time(self._settings[record.model].window, reached), record.partition)

    def _label_time(self, group: int | None) -> datetime | None:
        """The newest label's: with the labels of a time all are heard, whichever partition they are in."""
        if self._reading.labels is None:
            return _NO_MORE_LABELS
        times = [self.times.of(partition) for partition in self._sources.get(group, ())]
        return max((time for time in times if time is not None), default=None)

    # --- models and partitions -------------------------------------------------------------------

    def _model(self, name: str, saved: ModelSaved | None) -> ModelMonitor:
        return ModelMonitor(name, self._settings[name], self._references, self._max_versions, saved)

    def _watched(self, record: PredictionRecord | LabelRecord) -> ModelMonitor:
        """The model that the record is for, if this is where its records have to be."""
        model = self.models.get(record.model)
        if model is None:
            raise InvalidRecord("second_partition", _BY_INDEX.format(where="another one, or not met yet"))
        if self._by_index and record.partition.index != self._homes[record.model].index:
            where = str(self._homes[record.model].index)
            raise InvalidRecord("second_partition", _BY_INDEX.format(where=where))
        if isinstance(record, PredictionRecord) and model.settings.window.rows is not None:
            model.keep_home(record)
        return model

    def _passed_by(self, partitions: Collection[Partition]) -> dict[int | None, datetime | None]:
        """The time that all partitions of each group have reached; only groups that have any."""
        groups: dict[int | None, list[Partition]] = {}
        for partition in partitions:
            groups.setdefault(self._group(partition), []).append(partition)
        return {group: self.times.passed(members) for group, members in groups.items()}

    def _group(self, partition: Partition) -> int | None:
        """Which partitions are waited for together: those of an index, or all there are."""
        return partition.index if self._by_index else None

    def _group_of(self, model: str) -> int | None:
        return self._homes[model].index if self._by_index else None


def _patience(settings: ModelSettings) -> Patience:
    return Patience(
        horizon=timedelta(seconds=settings.label_horizon_seconds),
        longest=timedelta(seconds=settings.max_pending_seconds),
        rows=settings.max_pending_rows,
    )
