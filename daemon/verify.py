"""Verify: does the log, read again, lead to the very decisions that the ledger holds?"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

import msgspec

from daemon.case import Case, Window, open_case, read_window
from daemon.evidently_worker import EvidentlyEngine, EvidentlyWorker
from daemon.grounds import Grounds, digest_of, rows_digest
from daemon.ledger import Ledger, RequestRow, StoredWindow
from daemon.replay import Log, Reread, reread
from daemon.retrace import Untraceable, retrace
from daemon.wire.references import CorruptReference, ReferenceStore
from monitors.baseline import Baseline
from monitors.concentration import suspects
from monitors.confirmation import fall_back
from monitors.drift import DriftReport, DriftScore, SegmentShift
from monitors.drift_engine import CompiledReference, compile_reference
from monitors.episodes import Judged, Occasion, episode_id, performance_episode, request_of
from monitors.events import OffsetRange, RetrainRequest
from monitors.policy import Decision, Phase, PolicyState, Verdict, step
from monitors.records import Decoder, Partition
from monitors.reference import PREDICTION, InvalidReference, Reference
from monitors.settings import ModelSettings
from monitors.windows import EPOCH, MICROSECOND

# Read together, so that a long episode costs few connections and little memory.
WINDOWS_AT_ONCE = 16

Part = Literal[
    "evidence",
    "ledger",
    "grounds",
    "settings",
    "offsets",
    "rows",
    "reference",
    "score",
    "finding",
    "segment",
    "verdict",
    "phase",
    "clause",
    "episode",
    "request",
]


class Difference(msgspec.Struct, frozen=True):
    """One thing that is not as the ledger has it; `detail` holds names, numbers and offsets only."""

    part: Part
    detail: str


class WindowCheck(msgspec.Struct, frozen=True):
    """What came out for one window; the first difference is the cause of those after it."""

    version: str
    key: int
    start: str
    end: str
    rows: int
    differences: tuple[Difference, ...]


class Verification(msgspec.Struct, frozen=True):
    """What came out for one episode."""

    episode: str
    model: str
    number: int
    equal: bool
    windows: tuple[WindowCheck, ...]
    requests: int
    differences: tuple[Difference, ...]


def verify(
    ledger: Ledger,
    models: list[str],
    name: str,
    log: Log,
    decoder: Decoder,
    store: ReferenceStore,
    group: str,
) -> Verification:
    """
    Judge an episode's windows once more, from the log, the references and the settings of then.

    The policy's state before its first window is folded from the reports of the version's earlier
    windows as they are stored; where retention has taken the oldest, from the last calm one left.
    Requests follow from the steps of the model's state: windows as they are judged now, and what is not in
    the log (second judgements, outcomes) as the ledger has it, in the ledger's order; where retention has
    taken some of them, from the window that asked.
    """
    case = open_case(ledger, models, name)
    worker = EvidentlyWorker()
    try:
        trial = _Trial(case, ledger, log, decoder, _Judges(store, worker))
        windows = tuple(trial.windows())
        origin = f"{log.cluster_id()}|{group}"
        differences = tuple(trial.episode(origin))
        # Where that is another episode, so are its requests.
        differences += tuple(trial.requests("" if differences else origin))
    finally:
        worker.close()
    equal = not differences and not any(window.differences for window in windows)
    episode = case.episode
    return Verification(
        episode.id, episode.model, episode.number, equal, windows, len(case.requests), differences
    )


class _Unlike(Exception):
    """Nothing more can be recomputed of this window."""

    def __init__(self, part: Part, detail: str) -> None:
        super().__init__(detail)
        self.difference = Difference(part, detail)


class _Judges:
    """The engines of then: compiled from a reference and settings that are what they were."""

    def __init__(self, store: ReferenceStore, worker: EvidentlyWorker) -> None:
        self._store = store
        self._worker = worker
        self._found: dict[tuple[str, str], tuple[bytes, str] | CorruptReference | None] = {}
        self._compiled: dict[tuple[str, str], tuple[CompiledReference, EvidentlyEngine]] = {}

    def judge(self, judged: Judged, grounds: Grounds, settings: ModelSettings, again: Reread) -> DriftReport:
        compiled, evidently = self._engines(judged, grounds, settings)
        records = again.rows.records
        if grounds.engine == "evidently":
            return evidently.judge(records)
        report = compiled.judge(records)
        if not grounds.evidently:
            return report
        theirs = evidently.judge(records)
        report = fall_back(report, theirs, grounds.evidently)
        if PREDICTION not in grounds.evidently:
            return report
        return msgspec.structs.replace(report, prediction=theirs.prediction)

    def locate(
        self,
        judged: Judged,
        grounds: Grounds,
        settings: ModelSettings,
        again: Reread,
        columns: Sequence[str],
    ) -> tuple[SegmentShift, ...]:
        compiled, _ = self._engines(judged, grounds, settings)
        return compiled.locate(again.rows.records, columns)

    def _engines(
        self, judged: Judged, grounds: Grounds, settings: ModelSettings
    ) -> tuple[CompiledReference, EvidentlyEngine]:
        data = self._data(judged.model, judged.version, grounds.reference)
        place = grounds.reference, grounds.settings
        if place not in self._compiled:
            try:
                reference = Reference.from_bytes(data)
            except InvalidReference as error:
                raise _Unlike("reference", f"version {judged.version}: {error}") from error
            terms = settings.drift, settings.quality, settings.kind
            compiled = compile_reference(reference, *terms)
            self._compiled[place] = compiled, EvidentlyEngine(self._worker, data, *terms)
        return self._compiled[place]

    def baseline(self, model: str, version: str, digest: str) -> Baseline | None:
        """How well a version did when it was made."""
        try:
            return Reference.from_bytes(self._data(model, version, digest)).baseline
        except InvalidReference as error:
            raise _Unlike("reference", f"version {version}: {error}") from error

    def _data(self, model: str, version: str, digest: str) -> bytes:
        if (model, version) not in self._found:
            try:
                self._found[model, version] = self._store.read(model, version)
            except CorruptReference as error:
                self._found[model, version] = error
        found = self._found[model, version]
        if isinstance(found, CorruptReference):
            raise _Unlike("reference", str(found))
        if found is None:
            where = self._store.url_of(model, version)
            raise _Unlike("reference", f"version {version} has none any more at {where}")
        if found[1] != digest:
            raise _Unlike(
                "reference",
                f"version {version} was judged by {digest[:16]}, and {self._store.url_of(model, version)} "
                f"holds {found[1][:16]}",
            )
        return found[0]


class _Fold:
    """The policy's state of one version, window after window; None while it is not known."""

    def __init__(self, pruned: bool = False) -> None:
        self._pruned = pruned
        self.state = None if pruned else PolicyState()
        self.learned: int | None = None if pruned else 0

    def take_stored(self, judged: Judged, settings: ModelSettings) -> None:
        """An earlier window: its report is believed, its decision is not asked for."""
        if judged.decision.verdict is Verdict.LEARNING:
            self.learn(judged.sampled)
        elif self.state is not None:
            suffice = judged.seen >= settings.window.min_rows
            self.state, _ = step(settings.policy, self.state, judged.start, suffice, judged.report)
        elif judged.decision.phase is Phase.INACTIVE:
            self.state = PolicyState()

    def learn(self, rows: int) -> int | None:
        self.learned = None if self.learned is None else self.learned + rows
        return self.learned

    def decide(self, judged: Judged, settings: ModelSettings, seen: int, report: DriftReport) -> Decision:
        if self._pruned and settings.policy.method == "budget":
            return judged.decision  # evidence adds up from the first window on, and that is gone
        suffice = seen >= settings.window.min_rows
        before = self.state or PolicyState()
        after, decision = step(settings.policy, before, judged.start, suffice, report)
        stored = judged.decision
        if self.state is not None:
            self.state = after
            return decision
        if settings.policy.method == "budget":
            return stored  # evidence adds up from the first window on, and that is gone
        # A window that it depends on is gone: verdict and clause don't depend on it, the phase is believed.
        self.state = PolicyState() if stored.phase is Phase.INACTIVE else None
        return Decision(decision.verdict, stored.phase, decision.clause, stored.since)


class _Trial:
    """One case, tried again."""

    def __init__(self, case: Case, ledger: Ledger, log: Log, decoder: Decoder, judges: _Judges) -> None:
        self._case = case
        self._ledger = ledger
        self._log = log
        self._decoder = decoder
        self._judges = judges
        self._settings: dict[str, ModelSettings | _Unlike] = {}
        self._bounds: dict[str, Mapping[Partition, tuple[int, int]]] = {}
        self._folds: dict[str, _Fold] = {}
        self._again: dict[int, Judged] = {}

    # --- windows ---------------------------------------------------------------------------------

    def windows(self) -> Iterator[WindowCheck]:
        unknown = self._before()
        windows = self._case.windows
        for begin in range(0, len(windows), WINDOWS_AT_ONCE):
            some = windows[begin : begin + WINDOWS_AT_ONCE]
            rows = self._read(some)
            for window in some:
                yield self._check(window, rows.get(window.stored.id), unknown)
                unknown = ()

    def _before(self) -> tuple[Difference, ...]:
        """Fold the policy's state; what it cannot be folded from is told with the first window."""
        unknown: list[Difference] = []
        for window in self._case.before:
            try:
                judged, grounds = _read_evidence(window)
                self._fold(judged.version).take_stored(judged, self._settings_of(grounds))
            except _Unlike as error:
                what = f"earlier window that ends {window.stored.end}: {error.difference.detail}"
                unknown.append(Difference(error.difference.part, what))
        # An episode begins with a drifted window after a calm one, whatever was before.
        fold = self._fold(self._case.episode.version)
        fold.state = fold.state or PolicyState()
        return tuple(unknown)

    def _read(self, windows: Sequence[Window]) -> dict[int, Reread]:
        wanted: list[tuple[int, Judged, int]] = []
        for window in windows:
            try:
                judged, grounds = _read_evidence(window)
                settings = self._settings_of(grounds)
                self._require_offsets(judged.spans)
            except _Unlike:
                continue
            capacity = settings.window.rows or settings.window.max_rows
            wanted.append((window.stored.id, judged, capacity))
        pairs = [(judged, capacity) for _, judged, capacity in wanted]
        again = reread(pairs, self._log.read, self._decoder)
        return {id: one for (id, _, _), one in zip(wanted, again, strict=True)}

    def _check(self, window: Window, again: Reread | None, earlier: tuple[Difference, ...]) -> WindowCheck:
        stored = window.stored
        differences = list(earlier)
        try:
            judged, grounds = _read_evidence(window)
            differences += _unlike_columns(stored, judged)
            differences += self._compared(window, judged, grounds, again)
        except _Unlike as error:
            differences.append(error.difference)
            self._go_on_after(window)
        rows = again.seen if again is not None else 0
        return WindowCheck(stored.version, stored.key, stored.start, stored.end, rows, tuple(differences))

    def _go_on_after(self, window: Window) -> None:
        """The windows after one that cannot be recomputed are not to be blamed for it."""
        fold = self._fold(window.stored.version)
        try:
            judged, grounds = _read_evidence(window)
            fold.take_stored(judged, self._settings_of(grounds))
        except _Unlike:
            fold.state = None

    def _compared(
        self, window: Window, judged: Judged, grounds: Grounds, again: Reread | None
    ) -> list[Difference]:
        settings = self._settings_of(grounds)
        self._require_offsets(judged.spans)
        assert again is not None
        differences = list(_unlike_rows(judged, grounds, settings, again))
        try:
            report = self._report(judged, grounds, settings, again)
        except _Unlike as error:
            # The decision is still held against the scores that there are.
            differences.append(error.difference)
            report = judged.report
        decision = self._decision(judged, grounds, settings, again, report)
        start, end, key = _placed(judged, settings, again)
        found = Judged(
            model=judged.model,
            version=judged.version,
            key=key,
            start=start,
            end=end,
            seen=again.seen,
            sampled=len(again.rows.records),
            spans=again.spans,
            report=report,
            decision=decision,
            segments=self._segments(judged, grounds, settings, again, report),
        )
        differences += _unlike_segments(judged, found)
        differences += _unlike_reports(judged.report, report)
        differences += _unlike_decisions(judged.decision, decision)
        if not differences and msgspec.json.encode(found).decode() != window.stored.evidence:
            differences.append(Difference("evidence", "is not written as it was, though it reads the same"))
        self._again[window.stored.id] = found
        return differences

    def _report(
        self, judged: Judged, grounds: Grounds, settings: ModelSettings, again: Reread
    ) -> DriftReport:
        if not grounds.reference or again.seen < settings.window.min_rows:
            return DriftReport(())
        return self._judges.judge(judged, grounds, settings, again)

    def _segments(
        self, judged: Judged, grounds: Grounds, settings: ModelSettings, again: Reread, report: DriftReport
    ) -> tuple[SegmentShift, ...]:
        """Of what the ledger says fired: whether that was right is looked at beside."""
        columns = suspects(report, judged.decision)
        if not columns or not grounds.reference:
            return ()
        return self._judges.locate(judged, grounds, settings, again, columns)

    def _decision(
        self,
        judged: Judged,
        grounds: Grounds,
        settings: ModelSettings,
        again: Reread,
        report: DriftReport,
    ) -> Decision:
        fold = self._fold(judged.version)
        if grounds.reference:
            return fold.decide(judged, settings, again.seen, report)
        learned = fold.learn(len(again.rows.records))
        if learned is None:
            return judged.decision
        needed = settings.reference_rows
        clause = f"learning the reference: {min(learned, needed)} of {needed} rows"
        return Decision(Verdict.LEARNING, (fold.state or PolicyState()).phase, clause)

    # --- what windows share ----------------------------------------------------------------------

    def _fold(self, version: str) -> _Fold:
        if version not in self._folds:
            self._folds[version] = _Fold(version in self._case.pruned)
        return self._folds[version]

    def _settings_of(self, grounds: Grounds) -> ModelSettings:
        return self._settings_under(grounds.settings)

    def _settings_under(self, digest: str) -> ModelSettings:
        if digest not in self._settings:
            self._settings[digest] = self._read_settings(digest)
        found = self._settings[digest]
        if isinstance(found, _Unlike):
            raise found
        return found

    def _read_settings(self, digest: str) -> ModelSettings | _Unlike:
        body = self._ledger.settings_of(digest)
        if body is None:
            return _Unlike("settings", f"the ledger holds none under {digest[:16]}")
        if digest_of(body.encode("utf-8", "surrogatepass")) != digest:
            return _Unlike("settings", f"those under {digest[:16]} are not what was written")
        try:
            return msgspec.json.decode(body, type=ModelSettings)
        except msgspec.DecodeError as error:
            return _Unlike("settings", f"those under {digest[:16]} are of another retrain-daemon: {error}")

    def _require_offsets(self, spans: Sequence[OffsetRange]) -> None:
        gone = [what for span in spans for what in self._gone(span)]
        if gone:
            raise _Unlike("offsets", "; ".join(gone))

    def _gone(self, span: OffsetRange) -> Iterator[str]:
        if span.topic not in self._bounds:
            self._bounds[span.topic] = self._log.bounds(span.topic)
        where = f"{span.topic}/{span.partition}"
        bounds = self._bounds[span.topic].get(Partition(span.topic, span.partition))
        if bounds is None:
            yield f"{where} is not there any more"
            return
        first, end = bounds
        if span.start < first:
            yield f"{where}: {span.start} to {min(first, span.end) - 1} are gone, the log begins at {first}"
        if span.end > end:
            yield f"{where}: {max(end, span.start)} to {span.end - 1} are not there, the log ends at {end}"

    # --- the episode and its requests ------------------------------------------------------------

    def episode(self, origin: str) -> Iterator[Difference]:
        """Its id follows from the window that opened it."""
        episode = self._case.episode
        phase = None if episode.opened_by == "performance" else Phase.FIRING
        opening = self._window_at(episode.version, episode.opened_at, phase)
        if opening is None:
            yield Difference("episode", f"no window of it ends {episode.opened_at.isoformat()} and fires")
            return
        by_labels = episode.opened_by == "performance"
        expected = performance_episode(origin, opening) if by_labels else str(episode_id(origin, opening))
        if expected != episode.id:
            yield Difference(
                "episode",
                f"cluster, group and offsets give the id {expected}: is this the Kafka cluster, and "
                "kafka.group, that it was found in?",
            )
        # Labels may have told more of the change point since; they are not in these windows.
        told_by_drift = episode.signal == episode.opened_by != "performance"
        if told_by_drift and (opening.decision.since or opening.start) != episode.since:
            yield Difference("episode", f"it is said to begin {episode.since.isoformat()}")

    def requests(self, origin: str) -> Iterator[Difference]:
        """What was asked for follows from the window that asked, or from what labels led to."""
        retraced = self._retraced(origin) if origin else None
        known = {row.id for row in self._case.requests}
        for request in (retraced or {}).values():
            if request.episode == self._case.episode.id and request.request not in known:
                yield Difference(
                    "request", f"{request.request}: attempt {request.attempt} is not in the ledger"
                )
        for row in self._case.requests:
            try:
                asked = msgspec.json.decode(row.payload, type=RetrainRequest)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                yield Difference("request", f"{row.id}: its payload cannot be read: {error}")
                continue
            differences = list(self._unlike_request(row, asked))
            if not differences and retraced is not None:
                differences += _unlike_retraced(row, asked, retraced.get(row.id))
            yield from differences

    def _retraced(self, origin: str) -> dict[str, RetrainRequest] | None:
        """The model's requests as its steps lead to them; None where the ledger has not all of these."""
        model, ledger = self._case.episode.model, self._ledger
        stored = {(one.version, one.key): one for one in ledger.stored_windows(model)}
        if len(stored) < sum(ledger.judged_count(model, one) for one in ledger.versions_seen(model)):
            return None  # retention has taken windows and their steps alike
        windows = {place: read_window(one) for place, one in stored.items()}
        again = {(one.version, one.key): one for one in self._again.values()}
        judged = {place: again.get(place, one.judged) for place, one in windows.items()}
        baselines: dict[tuple[str, str], Baseline | None] = {}

        def baseline_of(place: tuple[str, int]) -> Baseline | None:
            reference = _read_evidence(windows[place])[1].reference
            at = place[0], reference
            if at not in baselines:
                baselines[at] = self._judges.baseline(model, *at) if reference else None
            return baselines[at]

        try:
            return retrace(
                model,
                origin,
                ledger.steps(model),
                {place: one for place, one in judged.items() if one is not None},
                self._settings_under,
                baseline_of,
            )
        except (Untraceable, _Unlike):
            return None

    def _unlike_request(self, row: RequestRow, asked: RetrainRequest) -> Iterator[Difference]:
        by_labels = asked.basis == "labels"
        judged = self._window_at(asked.model_version, asked.window_end, None if by_labels else Phase.FIRING)
        if judged is None:
            yield Difference("request", f"{row.id}: no firing window ends {asked.window_end.isoformat()}")
            return
        # Where a report is, is no decision.
        wanted = request_of(self._case.episode, row.attempt, Occasion.of(judged, asked.report_url))
        if by_labels:
            # Why and since when it was asked follows from labels, which are not read again.
            wanted = msgspec.structs.replace(
                wanted,
                basis=asked.basis,
                reason=asked.reason,
                signal=asked.signal,
                suspected_since=asked.suspected_since,
                drift_share=asked.drift_share,
                drifted_columns=asked.drifted_columns,
            )
        if row.id != wanted.request:
            yield Difference(
                "request", f"{row.id}: attempt {row.attempt} of this episode is {wanted.request}"
            )
        parts = _unlike_fields(asked, wanted)
        if parts:
            yield Difference("request", f"{row.id}: {', '.join(parts)} are not those of its window")
        elif row.payload != msgspec.json.encode(msgspec.to_builtins(wanted)).decode():
            yield Difference("request", f"{row.id}: is not written as it was, though it reads the same")

    def _window_at(self, version: str, end: Any, phase: Phase | None) -> Judged | None:
        """The recomputed window, or the stored one where it could not be recomputed; None: of any phase."""
        for window in self._case.windows:
            judged = self._again.get(window.stored.id, window.judged)
            if (
                judged is not None
                and (judged.version, judged.end) == (version, end)
                and phase in (None, judged.decision.phase)
            ):
                return judged
        return None


# Comparing


def _read_evidence(window: Window) -> tuple[Judged, Grounds]:
    if window.judged is None:
        raise _Unlike("evidence", f"cannot be read: {window.problem}")
    text = window.stored.grounds
    if not text:
        raise _Unlike("grounds", "it was not kept what this window was judged from")
    try:
        grounds = msgspec.json.decode(text, type=Grounds)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _Unlike("grounds", f"cannot be read: {error}") from error
    if msgspec.json.encode(grounds).decode() != text:
        raise _Unlike("grounds", "are not written as they were")
    return window.judged, grounds


def _unlike_columns(stored: StoredWindow, judged: Judged) -> Iterator[Difference]:
    """What the ledger's columns repeat of the evidence; whose window it is must be sure to go on."""
    if (stored.model, stored.version) != (judged.model, judged.version):
        raise _Unlike("ledger", f"the evidence in its line is of {judged.model} version {judged.version}")
    repeated: dict[str, tuple[object, object]] = {
        "key": (stored.key, judged.key),
        "start": (stored.start, judged.start.isoformat()),
        "end": (stored.end, judged.end.isoformat()),
        "verdict": (stored.verdict, str(judged.decision.verdict)),
        "drift_share": (stored.drift_share, judged.report.drift_share),
    }
    for name, (column, evidence) in repeated.items():
        if column != evidence:
            yield Difference("ledger", f"column {name} has {column}, the evidence {evidence}")


def _unlike_rows(
    judged: Judged, grounds: Grounds, settings: ModelSettings, again: Reread
) -> Iterator[Difference]:
    start, end, key = _placed(judged, settings, again)
    found: dict[str, tuple[object, object]] = {
        "key": (judged.key, key),
        "start": (judged.start.isoformat(), start.isoformat()),
        "end": (judged.end.isoformat(), end.isoformat()),
        "records": (judged.seen, again.seen),
        "sampled rows": (judged.sampled, len(again.rows.records)),
        "offsets": (_shown(judged.spans), _shown(again.spans)),
    }
    for name, (then, now) in found.items():
        if then != now:
            yield Difference("rows", f"{name}: {then} in the ledger, {now} in the log")
    digest = rows_digest(again.rows)
    if digest != grounds.rows:
        yield Difference("rows", f"their digest is {grounds.rows[:16]} in the ledger, {digest[:16]} now")


def _placed(judged: Judged, settings: ModelSettings, again: Reread) -> tuple[datetime, datetime, int]:
    """Start, end and key as the window's kind makes them; a count window's key is only its number."""
    if settings.window.rows is None:
        size = timedelta(seconds=settings.window.seconds or 3_600.0)
        start = EPOCH + (judged.start - EPOCH) // size * size
        return start, start + size, (start - EPOCH) // MICROSECOND
    times = [row.event_time for row in again.rows.records]
    if not times:
        return judged.start, judged.end, judged.key
    return min(times), max(times) + MICROSECOND, judged.key


def _shown(spans: Sequence[OffsetRange]) -> str:
    return ", ".join(f"{span.topic}/{span.partition}:{span.start}-{span.end}" for span in spans)


def _unlike_reports(stored: DriftReport, found: DriftReport) -> Iterator[Difference]:
    theirs = {score.column: score for score in found.scores}
    ours = {score.column: score for score in stored.scores}
    for column in dict.fromkeys([*ours, *theirs]):
        yield from _unlike_scores(column, ours.get(column), theirs.get(column))
    if list(ours) != list(theirs) and ours.keys() == theirs.keys():
        yield Difference("score", "the columns are in another order")
    yield from _unlike_scores(f"{PREDICTION} (output)", stored.prediction, found.prediction)
    for finding in stored.findings:
        if finding not in found.findings:
            yield Difference("finding", f"{finding.column}: {finding.code} is not found again")
    for finding in found.findings:
        if finding not in stored.findings:
            yield Difference("finding", f"{finding.column}: {finding.code} is not in the ledger")


def _unlike_segments(stored: Judged, found: Judged) -> Iterator[Difference]:
    if "segments" in _unlike_fields(stored, found):
        then, now = (
            ", ".join(f"{one.column} in {one.segment} {one.effect!r}" for one in judged.segments) or "none"
            for judged in (stored, found)
        )
        yield Difference("segment", f"{then} in the ledger, {now} recomputed")


def _unlike_scores(column: str, stored: DriftScore | None, found: DriftScore | None) -> Iterator[Difference]:
    if stored is None or found is None:
        if stored is not found:
            yield Difference(
                "score", f"{column}: {'not scored now' if stored else 'not scored in the ledger'}"
            )
        return
    for name in _unlike_fields(stored, found):
        then, now = getattr(stored, name), getattr(found, name)
        yield Difference("score", f"{column}: {name} {then!r} in the ledger, {now!r} recomputed")


def _unlike_decisions(stored: Decision, found: Decision) -> Iterator[Difference]:
    parts: Mapping[str, Part] = {
        "verdict": "verdict",
        "phase": "phase",
        "clause": "clause",
        "since": "phase",
    }
    for name in _unlike_fields(stored, found):
        then, now = getattr(stored, name), getattr(found, name)
        yield Difference(
            parts.get(name, "evidence"), f"{name} {str(then)!r} in the ledger, {str(now)!r} recomputed"
        )


def _unlike_retraced(
    row: RequestRow, asked: RetrainRequest, wanted: RetrainRequest | None
) -> Iterator[Difference]:
    if wanted is None:
        yield Difference("request", f"{row.id}: the steps that the ledger holds do not lead to it")
        return
    # Where a report is, is no decision.
    wanted = msgspec.structs.replace(wanted, report_url=asked.report_url)
    if parts := _unlike_fields(asked, wanted):
        yield Difference("request", f"{row.id}: {', '.join(parts)} are not those that its steps lead to")
    elif row.payload != msgspec.json.encode(msgspec.to_builtins(wanted)).decode():
        yield Difference("request", f"{row.id}: is not written as it was, though it reads the same")


def _unlike_fields(one: msgspec.Struct, other: msgspec.Struct) -> list[str]:
    """The fields that are not written alike: to the last bit, the sign of zero included."""
    encode: Callable[[Any], bytes] = msgspec.json.encode
    return [
        name for name in one.__struct_fields__ if encode(getattr(one, name)) != encode(getattr(other, name))
    ]
