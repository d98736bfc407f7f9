"""
Evidently itself: what does it say, and draw, about the values that the compiled engine scores?

The only file that imports Evidently, and only inside functions: that takes seven seconds of CPU and
280 MB, so it belongs in a child process (`daemon/evidently_worker.py`). Columns, types and usable values
are decided by `examine`, as for the compiled engine; Evidently gets a complete `DataDefinition` and never
has to guess.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from monitors.baseline import Baseline
from monitors.columns import MISSING, Cell, is_infinite, keyer, kind_of
from monitors.drift import DriftReport, DriftScore, Finding, SegmentShift
from monitors.drift_engine import (
    CompiledColumn,
    CompiledReference,
    Examined,
    NumericReference,
    assemble,
    compile_reference,
)
from monitors.records import PredictionRecord, Scalar
from monitors.reference import PREDICTION, Reference, unscored
from monitors.settings import DriftSettings, QualitySettings
from monitors.statistics import METHODS

if TYPE_CHECKING:
    import pandas as pd

_NAMES = {
    "K-S p_value": "ks",
    "Wasserstein distance (normed)": "wasserstein",
    "PSI": "psi",
    "Jensen-Shannon distance": "jensenshannon",
    "Kullback-Leibler divergence": "kl_div",
    "chi-square p_value": "chisquare",
    "Z-test p_value": "z",
}
"""Evidently shows a method that it chose by its display name, and one that was stated by its own."""

_OUTPUT = "prediction (output)"


class EvidentlyReference:
    """A `DriftEngine` whose scores are Evidently's; it also draws reports. Slow: about a second."""

    def __init__(
        self, reference: Reference, drift: DriftSettings, limits: QualitySettings, kind: str
    ) -> None:
        self.compiled: CompiledReference = compile_reference(reference, drift, limits, kind)
        names = {column.name for column in self.compiled.columns}
        self._output = _OUTPUT if PREDICTION in names else PREDICTION
        self._reference: dict[str, Sequence[Cell]] = {
            column.name: column.values() for column in reference.columns if column.name in names
        }
        self._reference[self._output] = reference.predictions.values()

    @property
    def baseline(self) -> Baseline | None:
        return self.compiled.baseline

    def judge(self, records: Sequence[PredictionRecord]) -> DriftReport:
        """The window's findings, and Evidently's scores of every column that can be scored."""
        features, prediction = self.compiled.examine(records), self.compiled.examine_prediction(records)
        scorable = self._scorable(features, prediction)
        judged = self._judged(scorable, records)
        output = judged.pop(self._output, None)
        report = assemble(features, prediction, list(judged.values()), output)
        return self.compiled.with_shifts(report, features, prediction, records)

    def locate(self, records: Sequence[PredictionRecord], columns: Sequence[str]) -> tuple[SegmentShift, ...]:
        """As the compiled engine: Evidently knows no segments."""
        return self.compiled.locate(records, columns)

    def draw(self, records: Sequence[PredictionRecord]) -> tuple[str, str]:
        """Evidently's drift report of the window, as one self-contained HTML page and as JSON."""
        features, prediction = self.compiled.examine(records), self.compiled.examine_prediction(records)
        columns = self._scorable(features, prediction)
        if not columns:
            return _NOTHING_TO_DRAW, '{"metrics": [], "tests": []}'
        from evidently import Report

        metrics = self._drawn({name: column for name, column in columns.items() if name != self._output})
        if self._output in columns:
            metrics.append(_metric(self._output, columns[self._output]))
        snapshot = Report(metrics, include_tests=True).run(*self._datasets(columns, records))
        return snapshot.get_html_str(as_iframe=False), snapshot.json()

    def _drawn(self, columns: dict[str, CompiledColumn]) -> list[Any]:
        """Evidently's preset, whose drift share is of the features alone, as ours is."""
        from evidently.presets import DataDriftPreset

        stated = {name: column.stated.name for name, column in columns.items() if column.stated is not None}
        thresholds = {
            name: column.threshold for name, column in columns.items() if column.threshold is not None
        }
        preset = DataDriftPreset(
            columns=list(columns), per_column_method=stated or None, per_column_threshold=thresholds or None
        )
        return [preset] if columns else []

    def _scorable(self, features: Sequence[Examined], prediction: Examined) -> dict[str, CompiledColumn]:
        """By the name that the column has in Evidently's frames."""
        usable = {one.column for one in features if one.usable is not None}
        columns = {column.name: column for column in self.compiled.columns if column.name in usable}
        if prediction.usable is not None and isinstance(self.compiled.prediction, CompiledColumn):
            columns[self._output] = self.compiled.prediction
        return columns

    def _judged(
        self, columns: dict[str, CompiledColumn], records: Sequence[PredictionRecord]
    ) -> dict[str, DriftScore | Finding]:
        """All columns in one run; if that fails, each in its own, so that one cannot spoil the others."""
        try:
            return self._scored(columns, records)
        except ImportError:
            raise
        except Exception:  # noqa: BLE001 - whatever Evidently raises, the next line finds out for which column
            return {name: self._scored_alone(name, column, records) for name, column in columns.items()}

    def _scored_alone(
        self, name: str, column: CompiledColumn, records: Sequence[PredictionRecord]
    ) -> DriftScore | Finding:
        try:
            return self._scored({name: column}, records)[name]
        except ImportError:
            raise  # An installation without Evidently says nothing of the scores.
        except Exception as error:  # noqa: BLE001 - its message may quote values, so only its name is kept
            return unscored(column.name, f"Evidently raised {type(error).__name__}")

    def _scored(
        self, columns: dict[str, CompiledColumn], records: Sequence[PredictionRecord]
    ) -> dict[str, DriftScore | Finding]:
        if not columns:
            return {}
        from evidently import Report

        metrics = [_metric(name, column) for name, column in columns.items()]
        current, reference = self._datasets(columns, records)
        said = Report(metrics, include_tests=True).run(current, reference).dict()
        failed = {
            test["metric_config"]["params"]["column"]
            for test in said["tests"]
            if getattr(test["status"], "value", test["status"]) == "FAIL"
        }
        rows = current.as_dataframe().count()
        return {
            name: _score(columns[name], metric["config"], metric["value"], name in failed, int(rows[name]))
            for metric in said["metrics"]
            if (name := metric["config"]["column"])
        }

    def _datasets(
        self, columns: dict[str, CompiledColumn], records: Sequence[PredictionRecord]
    ) -> tuple[Any, Any]:
        from evidently import DataDefinition, Dataset

        numeric = [name for name, column in columns.items() if isinstance(column.reference, NumericReference)]
        definition = DataDefinition(
            numerical_columns=numeric, categorical_columns=[name for name in columns if name not in numeric]
        )
        current: dict[str, Sequence[Cell]] = {
            name: [record.features.get(name, MISSING) for record in records]
            for name in columns
            if name != self._output
        }
        current[self._output] = [record.prediction for record in records]
        frames = [_frame(columns, cells) for cells in (current, self._reference)]
        made = [Dataset.from_pandas(frame, data_definition=definition) for frame in frames]
        return made[0], made[1]


def evidently_scores(
    reference: Reference,
    records: Sequence[PredictionRecord],
    drift: DriftSettings,
    limits: QualitySettings,
    kind: str,
) -> DriftReport:
    """Evidently's judgement of one window, in the form of the compiled engine's."""
    return EvidentlyReference(reference, drift, limits, kind).judge(records)


def evidently_report(
    reference: Reference,
    records: Sequence[PredictionRecord],
    drift: DriftSettings,
    limits: QualitySettings,
    kind: str,
) -> tuple[str, str]:
    """HTML and JSON of Evidently's drift report of one window."""
    return EvidentlyReference(reference, drift, limits, kind).draw(records)


def _metric(name: str, column: CompiledColumn) -> Any:
    from evidently.metrics import ValueDrift

    return ValueDrift(
        column=name, method=column.stated.name if column.stated else None, threshold=column.threshold
    )


def _score(
    column: CompiledColumn, config: dict[str, Any], score: float, failed: bool, rows: int
) -> DriftScore | Finding:
    """Evidently's own verdict, not ours on its score."""
    from evidently import __version__

    name = _NAMES.get(config["method"], config["method"])
    judged = column.verdict(METHODS[name], float(score), rows)
    if isinstance(judged, Finding):
        return judged
    return msgspec.structs.replace(
        judged,
        threshold=float(config["threshold"]),
        drifted=failed,
        implementation=f"evidently-{__version__}/{name}",
        engine="evidently",
    )


def _frame(columns: dict[str, CompiledColumn], cells: dict[str, Sequence[Cell]]) -> "pd.DataFrame":
    """Row by row, with nothing but null in place of what cannot be scored."""
    import pandas as pd

    return pd.DataFrame({name: _series(column, cells[name]) for name, column in columns.items()})


def _series(column: CompiledColumn, cells: Sequence[Cell]) -> "pd.Series[Any]":
    import pandas as pd

    if isinstance(column.reference, NumericReference):
        return pd.Series(np.array([_number(cell) for cell in cells], dtype=np.float64))
    key: Callable[[Cell], Scalar] = keyer(column.reference.kinds)
    kinds = column.reference.kinds
    return pd.Series(
        [
            key(cell) if cell is not MISSING and kind_of(cell) in kinds and not is_infinite(cell) else None
            for cell in cells
        ],
        dtype=object,
    )


def _number(cell: Cell) -> float:
    return float(cell) if type(cell) in (int, float) and not is_infinite(cell) else math.nan  # type: ignore[arg-type]


_NOTHING_TO_DRAW = "<!doctype html><title>Drift</title><p>No column of this window could be scored.</p>"
