"""
The compiled engine: the drift report of a window, from a reference that was taken apart once.

Both engines share everything up to the scores: `examine` says which values of which columns can be
scored and what is wrong with the others, and Evidently is then asked about exactly those.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from monitors import quality
from monitors.baseline import Baseline
from monitors.columns import (
    MISSING,
    Cell,
    Columns,
    Counts,
    Key,
    Kind,
    Numbers,
    keyer,
    kind_of,
    read_counts,
    read_numbers,
)
from monitors.concentration import FEWEST_ROWS, concentration
from monitors.drift import DriftReport, DriftScore, Finding, SegmentShift
from monitors.records import PredictionRecord
from monitors.reference import PREDICTION, Reference, ReferenceColumn, Rows, finite_floats, unscored
from monitors.seasons import Season
from monitors.segments import Segments
from monitors.settings import DriftSettings, QualitySettings
from monitors.shifts import Calendar, CategoricalYardstick, NumericYardstick, Shift
from monitors.statistics import (
    FEW_VALUES,
    ON_COUNTS,
    ON_SHARES,
    ON_SORTED,
    Floats,
    Method,
    bin_edges,
    default_method,
    method_named,
    scale_of,
    shares_in_bins,
)

_MAX_DISTINCT_BY_VALUE = 20


@dataclass(frozen=True, slots=True)
class NumericReference:
    """A numeric column of the reference: its values sorted, and counted where they are few."""

    values: Floats
    scale: float
    distinct: Floats
    counts: Floats

    @classmethod
    def of(cls, values: Floats) -> "NumericReference":
        """Compiles finite values in any order."""
        ordered = np.sort(values)
        distinct, counts = np.unique(ordered, return_counts=True)
        # Summed in the order of the rows, as Evidently does.
        return cls(ordered, scale_of(values), distinct, counts.astype(np.float64))

    @property
    def rows(self) -> int:
        """Usable values."""
        return self.values.size

    def default_method(self, current: Floats) -> Method:
        """Evidently's choice for these sorted, finite values."""
        distinct = self.distinct.size
        if distinct <= FEW_VALUES:
            distinct = np.union1d(self.distinct, current).size
        return default_method("numeric", self.rows, distinct)

    def score(self, method: Method, current: Floats) -> float:
        """The score of sorted, finite values."""
        if method.name in ON_SORTED:
            score = ON_SORTED[method.name](self.values, current)
            return score / self.scale if method.name == "wasserstein" else score
        if method.name in ON_SHARES and self.distinct.size > _MAX_DISTINCT_BY_VALUE:
            edges = bin_edges(self.values, current)
            return ON_SHARES[method.name](shares_in_bins(self.values, edges), shares_in_bins(current, edges))
        distinct, counts = np.unique(current, return_counts=True)
        keys = np.union1d(self.distinct, distinct)
        before, now = np.zeros(keys.size), np.zeros(keys.size)
        before[np.searchsorted(keys, self.distinct)] = self.counts
        now[np.searchsorted(keys, distinct)] = counts
        return _score_of_counts(method, before, now)


@dataclass(frozen=True, slots=True)
class CategoricalReference:
    """A categorical column of the reference: how often each category occurred."""

    counts: dict[Key, int]
    kinds: frozenset[Kind]
    rows: int

    @classmethod
    def of(cls, counts: dict[Key, int], kinds: frozenset[Kind]) -> "CategoricalReference":
        """Compiles counted categories of one kind, or of both as JSON texts."""
        return cls(dict(sorted(counts.items())), kinds, sum(counts.values()))

    def default_method(self, current: dict[Key, int]) -> Method:
        """Evidently's choice for these categories."""
        return default_method("categorical", self.rows, len(self.counts.keys() | current.keys()))

    def score(self, method: Method, current: dict[Key, int]) -> float:
        """The score of counted categories, unseen ones included."""
        keys = sorted(self.counts.keys() | current.keys())
        before = np.array([self.counts.get(key, 0) for key in keys], dtype=np.float64)
        now = np.array([current.get(key, 0) for key in keys], dtype=np.float64)
        return _score_of_counts(method, before, now)


def _score_of_counts(method: Method, before: Floats, now: Floats) -> float:
    if method.name in ON_SHARES:
        return ON_SHARES[method.name](before / before.sum(), now / now.sum())
    return ON_COUNTS[method.name](before, now)


@dataclass(frozen=True, slots=True)
class Examined:
    """One column of a window: what is wrong with it, and its usable values if it can be scored."""

    column: str
    findings: tuple[Finding, ...]
    usable: Numbers | Counts | None = None


@dataclass(frozen=True, slots=True)
class CompiledColumn:
    """A column that can be scored, with what the settings state about it."""

    name: str
    reference: NumericReference | CategoricalReference
    yardstick: NumericYardstick | CategoricalYardstick
    null_before: float
    stated: Method | None
    threshold: float | None

    def examine(self, cells: Sequence[Cell], limits: QualitySettings) -> Examined:
        """A column that is broken, or of which too little is left, is not scored, and that is a finding."""
        usable: Numbers | Counts
        if isinstance(self.reference, NumericReference):
            usable = read_numbers(cells)
            known = quality.Range(float(self.reference.values[0]), float(self.reference.values[-1]))
            odd = quality.find_out_of_range(self.name, usable, known, limits)
        else:
            usable = read_counts(cells, self.reference.kinds)
            odd = quality.find_unseen(self.name, usable, self.reference.counts, limits)
        findings = quality.find_gaps(self.name, usable.tally, self.null_before, limits) + odd
        if reason := _reason_against(findings, usable.tally.usable, usable.tally.rows):
            return Examined(self.name, (*findings, unscored(self.name, reason)))
        return Examined(self.name, tuple(findings), usable)

    def judge(self, examined: Examined) -> DriftScore | Finding:
        """The score and its verdict; what is not a finite number is a finding, never "no drift"."""
        reference, usable = self.reference, examined.usable
        if isinstance(reference, NumericReference) and isinstance(usable, Numbers):
            method = self.stated or reference.default_method(usable.values)
            score = reference.score(method, usable.values)
        elif isinstance(reference, CategoricalReference) and isinstance(usable, Counts):
            method = self.stated or reference.default_method(usable.counts)
            score = reference.score(method, usable.counts)
        else:
            raise TypeError(f"column {self.name} has nothing to score, or was read as another type")
        return self.verdict(method, score, usable.tally.usable)

    def measure(self, examined: Examined, slot: int) -> tuple[Shift, ...]:
        """How far the column's features lie from the reference; nothing of a column that is not scored."""
        yardstick, usable = self.yardstick, examined.usable
        if isinstance(yardstick, NumericYardstick) and isinstance(usable, Numbers):
            return yardstick.measure(self.name, usable.values, slot)
        if isinstance(yardstick, CategoricalYardstick) and isinstance(usable, Counts):
            return yardstick.measure(self.name, usable.counts, slot)
        return ()

    def measure_cells(self, cells: Sequence[Cell]) -> tuple[Shift, ...]:
        """How far the usable ones of these cells lie from the reference."""
        usable: Numbers | Counts
        if isinstance(self.reference, NumericReference):
            usable = read_numbers(cells)
        else:
            usable = read_counts(cells, self.reference.kinds)
        return self.measure(Examined(self.name, (), usable), slot=-1)

    def verdict(self, method: Method, score: float, rows: int) -> DriftScore | Finding:
        """Holds a score against the stated threshold, or the method's own."""
        if not math.isfinite(score):
            return unscored(self.name, f"{method.name} gave no finite number")
        threshold = method.threshold if self.threshold is None else self.threshold
        return DriftScore(
            column=self.name,
            method=method.name,
            score=score,
            threshold=threshold,
            comparison=method.comparison,
            drifted=method.says_drift(score, threshold),
            reference_rows=self.reference.rows,
            current_rows=rows,
            implementation=method.implementation,
        )


def _reason_against(findings: Sequence[Finding], usable: int, rows: int) -> str:
    broken = [finding.code for finding in findings if finding.broken]
    if broken:
        return f"broken: {', '.join(broken)}"
    if quality.too_few(usable, rows):
        return f"only {usable} of {rows} rows have a usable value"
    return ""


class CompiledReference:
    """
    Judges windows against one reference; a `DriftEngine` that has nothing to wait for.

    The report depends on which records there are, never on their order.
    """

    def __init__(
        self,
        columns: Sequence[CompiledColumn],
        prediction: CompiledColumn | Finding,
        unscored: Sequence[Finding],
        ignored: Sequence[str],
        limits: QualitySettings,
        baseline: Baseline | None = None,
        season: Season | None = None,
        rows: Reference | None = None,
    ) -> None:
        self.baseline = baseline
        self._season = season
        self._rows = rows
        self._by_segment: dict[str, dict[str, dict[str, Shift]]] = {}
        self.columns = tuple(columns)
        self.prediction = prediction
        self.unscored = tuple(unscored)
        self.limits = limits
        known = [finding.column for finding in unscored]
        self._columns = Columns([column.name for column in columns], [*known, *ignored])

    def examine(self, records: Sequence[PredictionRecord]) -> list[Examined]:
        """What each column of the window is like, in the reference's order; then new and unscored ones."""
        rows = [record.features for record in records]
        examined = [
            column.examine(cells, self.limits)
            for column, cells in zip(self.columns, self._columns.cells(rows), strict=True)
        ]
        strange = quality.find_new(self._columns.unknown(rows), len(rows))
        others = [Examined(finding.column, (finding,)) for finding in (*strange, *self.unscored)]
        return examined + others

    def examine_prediction(self, records: Sequence[PredictionRecord]) -> Examined:
        """What the window's predictions are like."""
        if isinstance(self.prediction, Finding):
            return Examined(PREDICTION, (self.prediction,))
        return self.prediction.examine([record.prediction for record in records], self.limits)

    def judge(self, records: Sequence[PredictionRecord]) -> DriftReport:
        """Findings and scores of one window."""
        features, prediction = self.examine(records), self.examine_prediction(records)
        by_name = {column.name: column for column in self.columns}
        with np.errstate(over="ignore", invalid="ignore"):
            judged = [by_name[one.column].judge(one) for one in features if one.usable is not None]
            output = None
            if prediction.usable is not None and isinstance(self.prediction, CompiledColumn):
                output = self.prediction.judge(prediction)
        return self.with_shifts(assemble(features, prediction, judged, output), features, prediction, records)

    def locate(self, records: Sequence[PredictionRecord], columns: Sequence[str]) -> tuple[SegmentShift, ...]:
        """Of which segments the columns' shifts are; nothing where either side names no segments."""
        segments = Segments.of([record.segment for record in records])
        if not (self._rows and self._rows.segments and segments.names):
            return ()
        known = {column.name: column for column in self.columns}
        found: list[SegmentShift] = []
        for name in columns:
            if name in known:
                cells: Sequence[Cell] = [record.features.get(name, MISSING) for record in records]
                found += self._located(known[name], cells, segments)
            elif name == PREDICTION and isinstance(self.prediction, CompiledColumn):
                cells = [record.prediction for record in records]
                found += self._located(self.prediction, cells, segments)
        return tuple(found)

    def _located(
        self, column: CompiledColumn, cells: Sequence[Cell], segments: Segments
    ) -> tuple[SegmentShift, ...]:
        assert self._rows is not None
        assert self._rows.segments
        before = self._by_segment.get(column.name)
        if before is None:
            before = self._by_segment[column.name] = _segments_of(column, self._rows, self._rows.segments)

        def measure(rows: Sequence[int]) -> tuple[Shift, ...]:
            return column.measure_cells([cells[row] for row in rows])

        return concentration(column.name, measure, segments, before, self._rows.segments.complete)

    def with_shifts(
        self,
        report: DriftReport,
        features: Sequence[Examined],
        prediction: Examined,
        records: Sequence[PredictionRecord],
    ) -> DriftReport:
        """The report with the shifts of what could be scored; they are ours whoever gave the scores."""
        by_name = {column.name: column for column in self.columns}
        slot = -1
        if self._season is not None and records:
            slot = self._season.slot_of_window(record.event_time for record in records)
        output: tuple[Shift, ...] = ()
        if isinstance(self.prediction, CompiledColumn):
            output = self.prediction.measure(prediction, slot)
        shifts = [
            shift
            for one in features
            if one.usable is not None
            for shift in by_name[one.column].measure(one, slot)
        ]
        return msgspec.structs.replace(report, shifts=tuple(shifts), prediction_shifts=output)


def assemble(
    features: Sequence[Examined],
    prediction: Examined,
    judged: Sequence[DriftScore | Finding],
    output: DriftScore | Finding | None,
) -> DriftReport:
    """One report of what both engines say alike and what the one at hand scored."""
    findings = [finding for one in (*features, prediction) for finding in one.findings]
    findings += [one for one in (*judged, output) if isinstance(one, Finding)]
    return DriftReport(
        scores=tuple(one for one in judged if isinstance(one, DriftScore)),
        findings=tuple(findings),
        prediction=output if isinstance(output, DriftScore) else None,
    )


def compile_reference(
    reference: Reference, drift: DriftSettings, limits: QualitySettings, kind: str
) -> CompiledReference:
    """
    Takes a reference apart under the settings of today.

    >>> from datetime import datetime, UTC
    >>> from monitors.records import Partition
    >>> rows = [{"age": float(age)} for age in range(200)]
    >>> reference = Reference.from_rows("churn", "7", rows, [0, 1] * 100, DriftSettings())
    >>> engine = compile_reference(reference, DriftSettings(), QualitySettings(), "classification")
    >>> def record(age):
    ...     return PredictionRecord(
    ...         "churn", "7", "id", datetime.now(UTC), {"age": age + 90.0}, age % 2, Partition("log", 0), age
    ...     )
    >>> engine.judge([record(age) for age in range(200)]).drifted_columns
    ('age',)
    """
    check_methods(drift)
    season = Season.of(drift)
    calendar = None if season is None else Calendar(season, reference.slots(season))
    columns: list[CompiledColumn] = []
    findings: list[Finding] = []
    for column in reference.columns:
        if column.name in drift.ignore:
            continue
        compiled = _compile(column.retyped(drift.types.get(column.name)), drift, calendar)
        (columns if isinstance(compiled, CompiledColumn) else findings).append(compiled)  # type: ignore[arg-type]
    findings += [
        unscored(name, "ignored when the reference was made")
        for name in reference.ignored
        if name not in drift.ignore
    ]
    prediction = _compile(_typed_by(kind, reference.predictions), drift, calendar)
    ignored = [*reference.ignored, *drift.ignore]
    return CompiledReference(
        columns, prediction, findings, ignored, limits, reference.baseline, season, rows=reference
    )


def _segments_of(
    column: CompiledColumn, reference: Reference, segments: Segments
) -> dict[str, dict[str, Shift]]:
    """What each feature of a column was in each segment of the reference."""
    named = [one for one in reference.columns if one.name == column.name]
    values = (named[0] if named else reference.predictions).values()
    return {
        segment: {shift.key: shift for shift in column.measure_cells([values[row] for row in rows])}
        for segment, rows in segments.parts()
        if len(rows) >= FEWEST_ROWS
    }


def check_methods(drift: DriftSettings) -> None:
    """Raises `UnknownMethod` for the first stated method that does not exist."""
    for column, name in drift.methods.items():
        method_named(name, column)


def _typed_by(kind: str, predictions: ReferenceColumn) -> ReferenceColumn:
    """Classes are categories however many, unless nearly every prediction is one of its own."""
    if kind == "regression":
        return predictions.retyped("numeric")
    typed = predictions.retyped("categorical")
    values = [value for value in typed.values() if value is not None]
    if len(values) >= quality.ENOUGH_ROWS and len(set(values)) > 0.5 * len(values):
        detail = 'more than half of the predictions differ: is it a score? State kind = "regression"'
        return _without_type(typed, detail)
    return typed


def _without_type(column: ReferenceColumn, detail: str) -> ReferenceColumn:
    return ReferenceColumn(
        column.name, None, detail, column.numbers, column.integers, column.texts, column.foreign
    )


def _compile(
    column: ReferenceColumn, drift: DriftSettings, calendar: Calendar | None
) -> CompiledColumn | Finding:
    if column.type is None:
        return unscored(column.name, column.detail)
    stated = drift.methods.get(column.name)
    method = method_named(stated, column.name) if stated is not None else None
    if method is not None and column.type not in method.types:
        remedy = f"state another method or drift.types.{column.name}"
        return unscored(
            column.name,
            f"{method.name} is for {method.types[0]} columns, this one is {column.type}: {remedy}",
        )
    compiled: NumericReference | CategoricalReference
    yardstick: NumericYardstick | CategoricalYardstick
    if column.type == "numeric":
        values, rows = finite_floats(column)
        if values.size == 0:
            return unscored(column.name, "the reference holds no finite number")
        compiled = NumericReference.of(values)
        yardstick = NumericYardstick.of(values, calendar and calendar.of_rows(rows))
    else:
        kinds = column.kinds()
        counts = read_counts(column.values(), kinds).counts
        compiled = CategoricalReference.of(counts, kinds)
        keys, rows = _keys(column, kinds)
        yardstick = CategoricalYardstick.of(keys, counts, calendar and calendar.of_rows(rows))
    if quality.too_few(compiled.rows, column.rows):
        return unscored(
            column.name, f"only {compiled.rows} of {column.rows} rows of the reference have a usable value"
        )
    null_before = sum(value is None for value in column.values()) / column.rows
    threshold = drift.thresholds.get(column.name)
    return CompiledColumn(column.name, compiled, yardstick, null_before, method, threshold)


def _keys(column: ReferenceColumn, kinds: frozenset[Kind]) -> tuple[list[Key], Rows]:
    """The categories and their rows, without the rows that hold none."""
    key = keyer(kinds)
    held = [(row, key(value)) for row, value in enumerate(column.values()) if kind_of(value) in kinds]
    return [value for _, value in held], np.array([row for row, _ in held], dtype=np.int64)
