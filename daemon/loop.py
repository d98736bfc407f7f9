"""The loop: read, decide, checkpoint. The one place where the order of effects is decided."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from queue import Empty, SimpleQueue
from typing import Literal, Protocol

import msgspec
import structlog

from daemon.errors import LedgerAway, StaleOwner
from daemon.freed import give_back
from daemon.grounds import Grounds, JudgedBy, rows_digest
from daemon.ledger import Checkpoint, Ledger, Position, Restored, now
from daemon.news import ChampionMoved as ChampionMoved
from daemon.news import News as News
from daemon.news import RequestEnded as RequestEnded
from daemon.news import ScoresDisputed as ScoresDisputed
from daemon.notices import data_lost, data_stalled, place
from daemon.ownership import Ownership
from daemon.ports import IDLE_SECONDS, Assignment, DeadLetters, OffsetLoss, Source
from daemon.stalls import Stalls
from monitors.drift import WindowRows
from monitors.episodes import Circumstances, Judged
from monitors.events import Event, Kind
from monitors.monitor import Monitor, References, Result
from monitors.performance import Performance
from monitors.policy import Verdict
from monitors.reading import Reading
from monitors.records import (
    Decoder,
    InvalidRecord,
    LabelRecord,
    Partition,
    PredictionRecord,
    RawRecord,
)
from monitors.settings import LimitSettings, ModelSettings
from monitors.steps import Ended, Moved, Taken

log = structlog.get_logger()

# A partition with unread records that gives none for so long is stalled, or Kafka is gone.
STALL_SECONDS = 120.0
# Records end the wait at once; what is heard elsewhere waits for so long at most. Idling costs by it, so it
# is longer where there was nothing to read for a while.
POLL_SECONDS = 0.5
IDLE_POLL_SECONDS = 1.0
# How long a ledger that does not answer is left alone.
LEDGER_SECONDS = 1.0
# How many windows may wait for labels that are still to be read before no more predictions are.
MOST_BEHIND = 8
# What a busy minute needed is not kept for the months after it.
GIVE_BACK_SECONDS = 60.0

Decoded = PredictionRecord | LabelRecord | InvalidRecord


class LoopSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the loop was told by the configuration."""

    group: str
    member: str
    mode: Literal["observe", "retrain"]
    models: Mapping[str, ModelSettings]
    limits: LimitSettings
    labels_topic: str
    checkpoint_seconds: float
    sharing: Literal["one-active", "by-model"] = "one-active"


class Reviews(Protocol):
    """Who has Evidently look at judged windows, later and elsewhere."""

    def url_of(self, model: str, version: str, key: int) -> str:
        """Where the report of this window will be, whether or not it is ever drawn."""

    def offer(self, judged: Judged, rows: WindowRows, wanted: bool) -> None:
        """Confirm this window; `wanted`: something was told about it, so draw its report too."""


Role = Literal["joining", "standby", "waiting", "owner"]


class Observer:
    """Who is told what the loop does, and never asked. This one takes no notice; `Metrics` counts."""

    def polled(self, raws: Sequence[RawRecord]) -> None:
        """These were read."""

    def rejected(self, error: InvalidRecord) -> None:
        """One of them is a dead letter."""

    def kept(self, step: Checkpoint, seconds: float) -> None:
        """This is in the ledger now, and took so long to get there."""

    def cycled(self, role: Role, reachable: bool, lags: Mapping[Partition, int]) -> None:
        """A cycle is over; `reachable` is Kafka, `lags` are the records left to read."""


class Engines(References, Protocol):
    """The references, and the columns that are no longer trusted to the compiled scores."""

    def distrust(self, model: str, version: str, columns: Sequence[str]) -> None: ...
    def grounds(self, model: str, version: str, rows: str, settings: str) -> Grounds: ...


class Loop:
    """Turns records into decisions, and holds what it decided until the ledger has it."""

    def __init__(
        self,
        settings: LoopSettings,
        source: Source,
        decoder: Decoder,
        dead_letters: DeadLetters,
        ledger: Ledger,
        engines: Engines,
        reviews: Reviews,
        observer: Observer | None = None,
    ) -> None:
        self.settings = settings
        self.news: SimpleQueue[News] = SimpleQueue()
        self.owner = Ownership()
        self._source = source
        self._decoder = decoder
        self._dead_letters = dead_letters
        self._ledger = ledger
        self._engines = engines
        self._reviews = reviews
        self._observer = observer or Observer()
        self._judged_by = {name: JudgedBy.of(model) for name, model in settings.models.items()}
        self._role: Role = "joining"
        self._given = Assignment(())
        self._monitor: Monitor | None = None
        self._origin = ""
        self._next: dict[Partition, int] = {}
        self._moved: set[Partition] = set()
        self._heard: dict[Partition, float] = {}
        self._labels: dict[Partition, deque[tuple[RawRecord, Decoded]]] = {}
        self._held: frozenset[Partition] = frozenset()
        self._behind: frozenset[Partition] = frozenset()
        self._awaited: dict[Partition, float] = {}
        self._counted: dict[int | None, list[Partition]] = {}
        self._stalls = Stalls()
        self._counters: dict[str, int] = {}
        self._elsewhere: set[str] = set()
        self._pending: list[Event] = []
        self._heard_of: list[tuple[str, Taken]] = []
        self._saved_at = self._gave_back_at = time.monotonic()

    def run(self, stop: threading.Event) -> None:
        """Run until asked to stop; a cycle that began is always finished."""
        while not stop.is_set():
            self.run_once(IDLE_POLL_SECONDS if self._idle() else POLL_SECONDS)
            self._observer.cycled(self._role, self._source.reachable(), self._lags())
        self._keep_the_rest()
        log.info("loop_stopped")

    def run_once(self, timeout_seconds: float = POLL_SECONDS) -> Result:
        """One cycle. Nothing counts as read before everything it led to is in the ledger."""
        try:
            return self._cycle(timeout_seconds)
        except StaleOwner as error:
            self._step_down(error)
        except LedgerAway as error:
            self._wait_for_ledger(error)
        return Result()

    def _idle(self) -> bool:
        heard = max(self._heard.values(), default=time.monotonic())
        return time.monotonic() - heard >= IDLE_SECONDS

    def _cycle(self, timeout_seconds: float) -> Result:
        raws = self._source.poll(timeout_seconds)
        if (assignment := self._source.assignment()) is not None:
            self._given = assignment
            self._take_over(assignment)
            raws = ()
        elif self._role == "waiting":
            self._take_over(self._given)
            raws = ()
        if self._monitor is None:
            return Result()
        self._observer.polled(raws)
        for raw in raws:
            self._receive(raw)
        if self._monitor.met:
            self._checkpoint(Result())
        self._hear_losses(self._source.losses())
        self._notice_stalls()
        self._hear_news(self._monitor)
        result = self._close(self._monitor)
        due = time.monotonic() - self._saved_at >= self.settings.checkpoint_seconds
        if due or result.steps or self._pending or self._heard_of:
            self._checkpoint(result)
        if time.monotonic() - self._gave_back_at >= GIVE_BACK_SECONDS:
            give_back()
            self._gave_back_at = time.monotonic()
        return result

    # --- ownership -------------------------------------------------------------------------------

    def _take_over(self, assignment: Assignment) -> None:
        """Raise the epoch first, so that whoever had it can write no more, then go on from there."""
        if not assignment.partitions:
            self._stand_by()
            log.info("member_standby", group=self.settings.group)
            return
        indexes = self._indexes_of(assignment)
        epoch = self._ledger.take_over(self.settings.group, self.settings.member, indexes)
        restored = self._ledger.restore(indexes)
        self._origin = f"{self._source.cluster_id()}|{self.settings.group}"
        monitor = self._monitor_of(restored, indexes)
        for partition, position in restored.positions.items():
            if position.stream_time is not None:
                monitor.times.restore(partition, position.stream_time)
        owned = {
            partition: restored.positions[partition].next_offset
            for partition in assignment.partitions
            if partition in restored.positions
        }
        self._source.losses()  # what was found gone before belongs to a state that was dropped
        logs = {partition: restored.positions[partition].log for partition in owned}
        self._next = dict(self._source.seek(owned, logs))
        if missing := {f"{p.topic}/{p.index}": at for p, at in self._next.items() if p not in owned}:
            # A first start, a new partition, or a ledger that was lost: whoever runs it knows which.
            log.warning("positions_missing", offsets=missing, remedy="none: they begin as kafka.start says")
        self._moved = set(self._next)
        self._heard = dict.fromkeys(self._next, time.monotonic())
        self._counters = {}
        self._pending, self._heard_of = [], []
        self._labels, self._held, self._stalls = {}, frozenset(), Stalls()
        self._behind, self._awaited, self._counted = frozenset(), {}, {}
        self._source.hold(())
        self._monitor = monitor
        self._hear_losses(self._source.losses())
        self._checkpoint(Result())  # before anything is read: where "latest" was is now written down
        self._role = "owner"
        self.owner.begin(indexes)
        log.info("member_active", epoch=epoch, partitions=len(self._next), models=list(monitor.models))

    def _indexes_of(self, assignment: Assignment) -> frozenset[int] | None:
        """What is owned of the group's decisions: those of some partition indexes, or (None) all."""
        if self.settings.sharing == "one-active":
            return None
        return frozenset(partition.index for partition in assignment.partitions)

    def _monitor_of(self, restored: Restored, indexes: frozenset[int] | None) -> Monitor:
        settings = self.settings
        if indexes is None:
            return Monitor(settings.models, self._engines, settings.limits, restored.models)
        homes = {model: home for model, home in restored.homes.items() if home.index in indexes}
        self._elsewhere = restored.homes.keys() - homes.keys()
        return Monitor(settings.models, self._engines, settings.limits, restored.models, homes, by_index=True)

    def _stand_by(self, role: Role = "standby") -> None:
        self._monitor, self._role = None, role
        self.owner.end()

    def _step_down(self, error: StaleOwner) -> None:
        """
        Forget everything since the last checkpoint, which is another member's business, and carry on.

        This one was away for longer than its session and may not know it yet: the group has to say.
        """
        log.warning("member_fenced", group=self.settings.group, error=str(error))
        self._stand_by()
        self._source.rejoin()

    def _wait_for_ledger(self, error: LedgerAway) -> None:
        """
        Keep the place in the group, forget everything since the last checkpoint, and try again.

        Nobody knows whether a transaction that broke off was written: only the ledger, once it is back.
        """
        if self._role != "waiting":
            log.error("ledger_away", error=str(error))
        self._stand_by("waiting")
        time.sleep(LEDGER_SECONDS)

    # --- reading ---------------------------------------------------------------------------------

    def _receive(self, raw: RawRecord) -> None:
        """Predictions are taken at once; labels stand in line until their windows are closed."""
        self._heard[raw.partition] = time.monotonic()
        record = self._decoded(raw)
        if raw.partition.topic == self.settings.labels_topic:
            self._labels.setdefault(raw.partition, deque()).append((raw, record))
        else:
            self._observe(raw, record)

    def _decoded(self, raw: RawRecord) -> Decoded:
        try:
            return self._decoder.decode(raw)
        except InvalidRecord as error:
            return error.with_traceback(None)

    def _observe(self, raw: RawRecord, record: Decoded) -> None:
        """Take one record or reject it; what stands in line at a restart is rejected after it, once."""
        assert self._monitor is not None
        try:
            if isinstance(record, InvalidRecord):
                raise record
            self._make_home(self._monitor, record)
            self._monitor.observe(record)
        except InvalidRecord as error:
            self._reject(raw, error)
        self._next[raw.partition] = raw.offset + 1
        self._moved.add(raw.partition)
        self._count("records")

    def _make_home(self, monitor: Monitor, record: PredictionRecord | LabelRecord) -> None:
        """A model's first record says where all of them have to be: written down before it counts."""
        if record.model in self._elsewhere or not monitor.homeless(record):
            return
        home = self._ledger.claim_home(record.model, record.partition)
        if home.index in (owned := {partition.index for partition in self._next}):
            monitor.admit(record.model, home, self._ledger.restore_model(record.model))
            self.owner.begin(owned)
            log.info("model_met", model=record.model, partition=place(home))
        else:
            self._elsewhere.add(record.model)
            log.error(
                "model_elsewhere", model=record.model, partition=place(record.partition), home=place(home)
            )

    def _take_labels(self, monitor: Monitor) -> int:
        """Take the labels whose turn it is, and reject what stands in line before them."""
        taken = 0
        for _, line in sorted(self._labels.items()):
            while line:
                raw, record = line[0]
                if isinstance(record, LabelRecord) and monitor.ahead(record):
                    break
                line.popleft()
                self._observe(raw, record)
                taken += 1
        return taken

    def _hold(self, monitor: Monitor) -> None:
        """
        Read no further where labels stand in line, nor where windows pile up that wait for unread ones.

        What was held so far is heard of from now on: it could not be before.
        """
        held = frozenset(partition for partition, line in self._labels.items() if line)
        behind = frozenset(
            partition
            for partition in self._next
            if monitor.behind(partition) >= (1 if partition in self._behind else MOST_BEHIND)
            and partition.topic != self.settings.labels_topic
        )
        if (before := self._held | self._behind) != held | behind:
            self._source.hold(held | behind)
            self._heard |= dict.fromkeys(before - held - behind, time.monotonic())
        self._held, self._behind = held, behind

    def _reject(self, raw: RawRecord, error: InvalidRecord) -> None:
        self._dead_letters.put(raw, error)
        self._observer.rejected(error)
        self._count("dead_letters")
        log.debug("record_rejected", code=error.code, offset=raw.offset, topic=raw.partition.topic)

    def _count(self, name: str) -> None:
        self._counters[name] = self._counters.get(name, 0) + 1

    def _hear_losses(self, losses: Sequence[OffsetLoss]) -> None:
        for loss in losses:
            where, expected, available = place(loss.partition), loss.expected, loss.available
            log.error("records_lost", partition=where, expected=expected, available=available)
            # A checkpoint must never point back in front of what is gone.
            self._next[loss.partition] = max(self._next.get(loss.partition, 0), loss.available)
            if loss.available < loss.expected:
                self._next[loss.partition] = loss.available
            self._moved.add(loss.partition)
            self._pending += data_lost(self._origin, self._concerned(loss.partition), loss)

    def _notice_stalls(self) -> None:
        done = self._source.drained() | self._held | self._behind
        for partition, offset in self._stalls.notice(self._next, done, STALL_SECONDS):
            log.error("partition_stalled", partition=place(partition), next_offset=offset)
            models = self._concerned(partition)
            self._pending += data_stalled(self._origin, models, partition, offset, STALL_SECONDS)

    def _concerned(self, partition: Partition) -> list[str]:
        return [] if self._monitor is None else self._monitor.at_home(partition)

    def _hear_news(self, monitor: Monitor) -> None:
        while True:
            try:
                news = self.news.get_nowait()
            except Empty:
                return
            model = monitor.models.get(news.model)
            if model is None:
                continue
            if isinstance(news, RequestEnded):
                self._pending += model.outcome(news.request, news.outcome)
                self._heard_of.append((news.model, Ended(news.request, news.outcome)))
                log.info("request_ended", model=news.model, action=news.outcome.action, request=news.request)
            elif isinstance(news, ChampionMoved):
                self._pending += model.champion(news.version, news.action)
                self._heard_of.append((news.model, Moved(news.version, news.action)))
            else:
                self._dispute(news)

    def _dispute(self, news: ScoresDisputed) -> None:
        self._engines.distrust(news.model, news.version, news.columns)
        log.error("scores_disputed", model=news.model, columns=list(news.columns), details=list(news.details))
        self._pending.append(
            Event(
                kind=Kind.DRIFT_DISPUTED,
                model=news.model,
                subject=f"{self._origin}|{news.model}|{news.version}|{news.key}",
                version=news.version,
                payload={"columns": list(news.columns), "details": list(news.details)},
            )
        )

    # --- deciding --------------------------------------------------------------------------------

    def _close(self, monitor: Monitor) -> Result:
        """Take all steps that can be taken; Kafka is asked what is left only where one waits for that."""
        around = self._circumstances()
        result = self._step(monitor, around, frozenset(self._next))
        if monitor.waits:
            result = result.then(self._step(monitor, around, self._unread()))
        else:
            self._awaited = {}
        self._hold(monitor)
        return result

    def _step(
        self,
        monitor: Monitor,
        around: Callable[[str, str, int], Circumstances],
        unread: frozenset[Partition],
    ) -> Result:
        """Closings and labels in turn, in the order of their times."""
        labels_topic = self.settings.labels_topic
        labels = [partition for partition in self._next if partition.topic == labels_topic]
        predictions, result = self._predicting(), Result()
        while True:
            heads = {one: line[0][1] for one, line in self._labels.items() if line}
            known = {one: head for one, head in heads.items() if isinstance(head, LabelRecord)}
            rejects = heads.keys() - known.keys()
            monitor.note(Reading(predictions, labels if labels_topic else None, unread | rejects, known))
            taken = self._take_labels(monitor)
            step = monitor.close(around)
            result = result.then(step)
            if not taken and not step.judged:
                return result

    def _predicting(self) -> list[Partition]:
        """
        The partitions that windows wait for: those not silent, with nothing left to read.

        Where all of a group are silent, those that were the last to fall silent.
        """
        active: dict[int | None, list[Partition]] = {}
        for partition in self._active():
            if partition.topic != self.settings.labels_topic:
                group = partition.index if self.settings.sharing == "by-model" else None
                active.setdefault(group, []).append(partition)
        self._counted |= active
        return [partition for group in self._counted.values() for partition in group]

    def _active(self) -> list[Partition]:
        oldest = time.monotonic() - self._patience
        drained = self._source.drained()
        return [p for p in self._next if p not in drained or p in self._held or self._heard[p] >= oldest]

    def _unread(self) -> frozenset[Partition]:
        """The partitions with records that were not read, but for those that give none for too long."""
        drained, at = self._source.drained(fresh=True), time.monotonic()
        self._awaited = {
            one: max(self._awaited.get(one, at), self._heard[one]) for one in self._next if one not in drained
        }
        return frozenset(one for one, since in self._awaited.items() if at - since < self._patience)

    @property
    def _patience(self) -> float:
        return max(model.window.idle_seconds for model in self.settings.models.values())

    def _lags(self) -> dict[Partition, int]:
        """The records of each partition that could be taken and are not; labels may have to wait."""
        ends = self._source.ends()
        lags = {one: max(0, ends[one] - at) for one, at in self._next.items() if one in ends}
        return lags | dict.fromkeys(self._held & lags.keys(), 0)

    def _circumstances(self) -> Callable[[str, str, int], Circumstances]:
        silences: dict[str, datetime] | None = None

        def around(model: str, version: str, key: int) -> Circumstances:
            nonlocal silences
            if silences is None:
                silences = self._ledger.silences()
            return Circumstances(
                origin=self._origin,
                mode=self.settings.mode,
                silenced=model in silences and silences[model] > now(),
                report_url=self._reviews.url_of(model, version, key),
            )

        return around

    # --- keeping ---------------------------------------------------------------------------------

    def _keep_the_rest(self) -> None:
        """The last checkpoint before the end, if there is anything to keep that is ours."""
        if self._monitor is None:
            return
        try:
            self._checkpoint(Result())
        except StaleOwner as error:
            log.warning("member_fenced", group=self.settings.group, error=str(error))
        except LedgerAway as error:
            log.error("ledger_away", error=str(error))

    def _checkpoint(self, result: Result) -> None:
        """Dead letters first, then everything at once, then Kafka's offsets, which nothing depends on."""
        assert self._monitor is not None
        monitor, began = self._monitor, time.monotonic()
        self._dead_letters.flush()
        moved = {p: Position(self._next[p], monitor.times.of(p), self._source.log_id(p)) for p in self._moved}
        for model, performance in result.performances:
            self._give_up(model, performance)
        told = {event.payload.get("report_url") for event in result.events}
        urls = [self._reviews.url_of(one.model, one.version, one.key) for one in result.judged]
        reports = [url if url in told else "" for url in urls]
        taken = [*self._heard_of, *result.steps]
        step = Checkpoint(
            positions=moved,
            models={name: model.take_changes() for name, model in monitor.models.items()},
            judged=list(zip(result.judged, reports, strict=True)),
            grounds=list(map(self._grounds, result.judged, result.rows)),
            settings={by.digest: by.body for model, _ in taken for by in (self._judged_by[model],)},
            performances=result.performances,
            events=[*result.events, *self._pending],
            ended=[(one.request, one.outcome) for _, one in self._heard_of if isinstance(one, Ended)],
            steps=[(model, self._judged_by[model].digest, one) for model, one in taken],
            counters=self._counters,
        )
        self._ledger.checkpoint(step)
        self._pending, self._heard_of, self._moved, self._counters = [], [], set(), {}
        self._saved_at = time.monotonic()
        self._observer.kept(step, self._saved_at - began)
        self._source.commit({partition: position.next_offset for partition, position in moved.items()})
        for judged, rows, report in zip(result.judged, result.rows, reports, strict=True):
            _log_window(judged, monitor.models[judged.model].late(judged.version))
            self._reviews.offer(judged, rows, wanted=bool(report))
        for event in result.events:
            log.info("event_recorded", kind=str(event.kind), model=event.model, id=str(event.id))

    def _give_up(self, model: str, performance: Performance) -> None:
        """Predictions that waited for labels in vain are counted and told of, never just forgotten."""
        if not performance.expired:
            return
        counted, name = self._counters, "predictions_expired"
        counted[name] = counted.get(name, 0) + performance.expired
        found = {field: getattr(performance, field) for field in ("version", "key", "expired", "labelled")}
        log.warning(name, model=model, **found)

    def _grounds(self, judged: Judged, rows: WindowRows) -> Grounds:
        digest, by = rows_digest(rows), self._judged_by[judged.model].digest
        if judged.decision.verdict is Verdict.LEARNING:
            return Grounds(digest, by)
        return self._engines.grounds(judged.model, judged.version, digest, by)


def _log_window(judged: Judged, late: int) -> None:
    log.info(
        "window_evaluated",
        model=judged.model,
        version=judged.version,
        end=judged.end.isoformat(),
        verdict=str(judged.decision.verdict),
        phase=str(judged.decision.phase),
        drift_share=round(judged.report.drift_share, 4),
        rows=judged.seen,
        sampled=judged.sampled,
        late=late,
    )
