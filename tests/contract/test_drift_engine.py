"""Both drift engines give the same report of the same window: Evidently itself, and the compiled form."""

import math
import random
import sys
from collections.abc import Iterator
from datetime import UTC, datetime

import msgspec
import pytest

from daemon.evidently_worker import EvidentlyEngine, EvidentlyWorker
from monitors.confirmation import confirm
from monitors.drift import DriftEngine, DriftReport
from monitors.drift_engine import compile_reference
from monitors.evidently_report import EvidentlyReference
from monitors.records import Partition, PredictionRecord, Scalar
from monitors.reference import Reference
from monitors.settings import DriftSettings, QualitySettings

ENGINES = ["compiled", "evidently"]
AT = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def worker() -> Iterator[EvidentlyWorker]:
    worker = EvidentlyWorker()
    yield worker
    worker.close()


def window(seed: int, size: int, moved: float = 0.0) -> list[PredictionRecord]:
    """All kinds of columns at once; `moved` changes some of them."""
    dice = random.Random(seed)

    def row(index: int) -> dict[str, Scalar]:
        return {
            "amount": dice.gauss(moved, 1.0),
            "items": dice.randrange(30 + int(10 * moved)),
            "age": None if dice.random() < 0.1 else 30.0 + dice.gauss(0.0, 9.0),
            "half": dice.choice([0.0, 0.5]),
            "plan": dice.choice(["free", "plus", "pro"] if moved < 1 else ["free", "plus", "plus", "gift"]),
            "stars": dice.choice([1, 2, 3, 4, 5]),
            "member": dice.random() < 0.5 + moved / 4,
            "id": f"customer-{seed}-{index}",
            "nothing": None,
        }

    return [
        PredictionRecord("m", "1", str(i), AT, row(i), dice.choice([0, 1]), Partition("log", 0), i)
        for i in range(size)
    ]


def engine(
    name: str,
    worker: EvidentlyWorker,
    before: list[PredictionRecord],
    drift: DriftSettings | None = None,
    kind: str = "classification",
) -> DriftEngine:
    drift, quality = drift or DriftSettings(), QualitySettings()
    reference = Reference.from_rows(
        "m", "1", [one.features for one in before], [one.prediction for one in before], drift
    )
    if name == "compiled":
        return compile_reference(reference, drift, quality, kind)
    return EvidentlyEngine(worker, reference.to_bytes(), drift, quality, kind)


def both(
    worker: EvidentlyWorker,
    before: list[PredictionRecord],
    now: list[PredictionRecord],
    drift: DriftSettings | None = None,
    kind: str = "classification",
) -> DriftReport:
    """The compiled report, after Evidently's was found to say the same."""
    compiled, evidently = (engine(name, worker, before, drift, kind).judge(now) for name in ENGINES)
    assert confirm(compiled, evidently) == ()
    assert compiled.findings == evidently.findings
    for ours, theirs in zip(compiled.scores, evidently.scores, strict=True):
        assert math.isclose(ours.score, theirs.score, rel_tol=1e-12, abs_tol=1e-14)
        assert theirs == msgspec.structs.replace(ours, score=theirs.score, engine="evidently")
    assert compiled.drifted_columns == evidently.drifted_columns
    return compiled


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_scored_and_what_is_found(name: str, worker: EvidentlyWorker) -> None:
    report = engine(name, worker, window(1, 1200)).judge(window(2, 800, moved=1.0))
    assert {score.column: score.drifted for score in report.scores} == {
        "amount": True,
        "items": True,
        "age": False,
        "half": False,
        "plan": True,
        "stars": False,
        "member": True,
    }
    assert {score.engine for score in report.scores} == {name}
    assert [(one.column, one.code) for one in report.findings if one.code == "unscored"] == [
        ("id", "unscored"),
        ("nothing", "unscored"),
    ]
    assert report.prediction is not None and not report.prediction.drifted


@pytest.mark.parametrize(("before", "now"), [(150, 60), (1000, 400), (1001, 900), (3000, 500)])
@pytest.mark.parametrize("moved", [0.0, 0.3, 1.0])
def test_both_give_the_same_report(worker: EvidentlyWorker, before: int, now: int, moved: float) -> None:
    both(worker, window(before, before), window(now, now, moved))


@pytest.mark.parametrize("method", ["psi", "jensenshannon", "kl_div"])
def test_both_follow_stated_methods_and_thresholds(worker: EvidentlyWorker, method: str) -> None:
    drift = DriftSettings(
        methods={"amount": method, "plan": method, "stars": method, "age": "ks", "items": "wasserstein"},
        thresholds={"amount": 10.0, "age": 0.9, "prediction": 0.01},
        ignore=("half",),
        types={"stars": "numeric"},
    )
    report = both(worker, window(5, 1300), window(6, 700, moved=0.5), drift)
    thresholds = {score.column: (score.method, score.threshold, score.drifted) for score in report.scores}
    assert thresholds["amount"] == (method, 10.0, False)
    assert thresholds["age"][:2] == ("ks", 0.9)


def broken(now: list[PredictionRecord]) -> list[PredictionRecord]:
    for index, one in enumerate(now):
        if index % 100 == 0:
            one.features.update({"amount": math.inf, "items": "many", "plan": 7, "stars": 10**30})
        if index % 2:
            del one.features["half"]
        one.features.update({"age": str(index), "member": int(one.features["member"] or 0), "new": 1})
    return now


def test_both_find_the_same_things_wrong(worker: EvidentlyWorker) -> None:
    report = both(worker, window(7, 1200), broken(window(8, 800)))
    found = {(one.column, one.code, one.broken) for one in report.findings}
    assert found >= {
        ("new", "new", False),
        ("age", "wrong_type", True),
        ("age", "unscored", False),
        ("half", "missing", True),
        ("half", "unscored", False),
        ("amount", "infinite", True),
        ("items", "wrong_type", False),
        ("plan", "wrong_type", False),
        ("stars", "unseen_category", False),
    }
    assert {score.column for score in report.scores} == {"items", "plan", "stars", "member"}


def test_both_judge_numbers_that_are_predicted(worker: EvidentlyWorker) -> None:
    before, now = (
        [msgspec.structs.replace(one, prediction=index / 7) for index, one in enumerate(window(seed, 1100))]
        for seed in (1, 2)
    )
    report = both(worker, before, now, kind="regression")
    assert report.prediction is not None and report.prediction.method == "wasserstein"


def test_both_take_a_feature_called_prediction_for_a_feature(worker: EvidentlyWorker) -> None:
    before, now = window(1, 1100), window(2, 500)
    for one in now:
        one.features["prediction"] = 2.5
    for index, one in enumerate(before):
        one.features["prediction"] = float(index % 50)
    report = both(worker, before, now)
    assert "prediction" in report.drifted_columns
    assert report.prediction is not None and not report.prediction.drifted


def test_both_know_a_column_of_numbers_and_text(worker: EvidentlyWorker) -> None:
    drift = DriftSettings(types={"mixed": "categorical"})
    before, now = window(1, 1100), window(2, 500)
    for records, values in ((before, [1, "1", "x", True]), (now, [1.0, "1", "1", "y"])):
        for index, one in enumerate(records):
            one.features["mixed"] = values[index % 4]
    assert "mixed" in both(worker, before, now, drift).drifted_columns


def test_both_have_nothing_to_say_of_an_empty_window(worker: EvidentlyWorker) -> None:
    report = both(worker, window(1, 300), [])
    assert report.scores == () and report.prediction is None and report.drift_share == 0.0


def test_an_evidently_that_is_not_there_disputes_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    before, drift = window(1, 60), DriftSettings()
    reference = Reference.from_rows(
        "m", "1", [one.features for one in before], [one.prediction for one in before], drift
    )
    missing = EvidentlyReference(reference, drift, QualitySettings(), "classification")
    monkeypatch.setitem(sys.modules, "evidently", None)
    with pytest.raises(ImportError):
        missing.judge(window(2, 60))
