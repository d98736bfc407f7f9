"""`retrain-daemon backtest FILE`: what it reads, what it answers, and what it says of what it cannot use."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from daemon.cli import main
from flows.backtest.table import read_table

KEYS = [
    *("case", "metric", "rows", "windows", "never", "schedule", "live", "started", "promoted", "refused"),
    *("episodes", "false_before_first_drift", "seconds", "comparisons", "came_back"),
]
REFERENCE, WINDOW = 400, 100
WORDS = ("--label", "late", "--reference-rows", str(REFERENCE), "--window-rows", str(WINDOW))


def stump(frame: pd.DataFrame, labels: "pd.Series[Any]", settings: Any) -> Any:
    """A user's trainer that is quick; `settings` hold the seed."""
    from sklearn.compose import make_column_transformer
    from sklearn.pipeline import make_pipeline
    from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

    numbers = settings.kind == "regression"
    tree = DecisionTreeRegressor if numbers else DecisionTreeClassifier
    model = tree(max_depth=3, random_state=settings.training.seed)
    return make_pipeline(make_column_transformer(("passthrough", ["push", "pull"])), model).fit(frame, labels)


def rows(count: int = 1_000, change: int = 600) -> pd.DataFrame:
    random = np.random.default_rng(4)
    values = random.normal(size=(count, 2))
    after = np.arange(count) >= change
    late = np.where(after, values[:, 0] < 0, values[:, 0] > 0).astype(int)
    values[after] = values[after] * 2.0 + 2.5
    return pd.DataFrame(values, columns=["push", "pull"]).assign(late=late)


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The function above, as a module of the user's working folder."""
    source = Path(__file__).read_text("utf-8")
    body = source[source.index("def stump") : source.index("def rows")]
    imports = "from typing import Any\nimport pandas as pd\n"
    (tmp_path / "backtest_stump.py").write_text(imports + body, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "backtest_stump:stump"


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["backtest", *words, "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1, "people are told on stderr"
    answer: dict[str, Any] = json.loads(out[0])
    return answer


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["backtest", *words]) == 2
    return capsys.readouterr().err


def test_the_last_line_says_it_all_and_the_same_each_time(
    tmp_path: Path, trainer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "parcels.csv"
    rows().to_csv(file, index=False)
    words = (str(file), *WORDS, "--trainer", trainer, "--drift-at", "600", "--seed", "7")
    one, again = told(capsys, *words), told(capsys, *words)
    assert list(one) == KEYS
    assert (one["case"], one["metric"], one["rows"], one["windows"]) == ("parcels", "accuracy", 1_000, 6)
    assert list(one["schedule"]) == ["1", "2", "4"]
    assert one["schedule"]["1"]["retrainings"] == 5
    assert one["false_before_first_drift"] == 0
    assert {**one, "seconds": 0} == {**again, "seconds": 0}


def test_csv_and_parquet_are_one_stream(
    tmp_path: Path, trainer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    frame = rows().assign(kind=["a", "b"] * 500)
    frame.to_csv(tmp_path / "parcels.csv", index=False)
    frame.to_parquet(tmp_path / "parcels.parquet")
    answers = [
        told(capsys, str(tmp_path / name), *WORDS, "--trainer", trainer)
        for name in ("parcels.csv", "parcels.parquet")
    ]
    assert {**answers[0], "seconds": 0} == {**answers[1], "seconds": 0}


@pytest.mark.parametrize("metric", ["balanced_accuracy", "auc", "mae"])
def test_any_metric_is_added_up(
    metric: str, tmp_path: Path, trainer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "parcels.csv"
    rows(change=1_000).to_csv(file, index=False)
    answer = told(capsys, str(file), *WORDS, "--trainer", trainer, "--metric", metric)
    assert answer["metric"] == metric
    good = answer["never"] < 0.2 if metric == "mae" else answer["never"] > 0.8
    assert good and answer["live"] == answer["never"]


def test_a_configuration_rules_and_the_command_line_overrules(
    tmp_path: Path, trainer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, config, other = (tmp_path / name for name in ("parcels.csv", "one.toml", "other.toml"))
    rows().to_csv(file, index=False)
    text = (
        f"[models.parcels]\nreference_rows = {REFERENCE}\n[models.parcels.window]\nrows = 200\n"
        f'[models.parcels.training]\ncallable = "{trainer}"\n'
    )
    config.write_text(text)
    other.write_text(text.replace("[models.parcels.window]", "[models.parcels.gate]\nconfidence = 0.99\n"
                                  "[models.parcels.window]"))  # fmt: skip
    words = (str(file), "--label", "late", "--config", str(config))
    assert told(capsys, *words)["windows"] == 3
    assert told(capsys, *words, "--window-rows", "100")["windows"] == 6
    compared = told(capsys, *words, "--compare", str(other))
    assert list(compared) == [*KEYS, "compare"]
    assert compared["compare"]["keys"] == {"gate.confidence": [0.95, 0.99]}
    assert list(compared["compare"]) == ["keys", *KEYS]
    assert main(["backtest", *words, "--compare", str(other)]) == 0
    assert "gate.confidence" in capsys.readouterr().out


def test_the_page_is_one_file_that_loads_nothing(
    tmp_path: Path, trainer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "parcels.csv", tmp_path / "report.html"
    rows().rename(columns={"pull": "<pull>"}).assign(pull=0.0).to_csv(file, index=False)
    told(capsys, str(file), *WORDS, "--trainer", trainer, "--report", str(page), "--drift-at", "600")
    text = page.read_text("utf-8")
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert "&lt;pull&gt;" in text and "<pull>" not in text
    for outside in ("http:", "https:", "src=", "@import", "<link", "<script"):
        assert outside not in text
    for drawn in (
        'class="live"',
        'class="never"',
        'class="schedule"',
        'class="known"',
        "prefers-color-scheme",
    ):
        assert drawn in text
    elsewhere = complaint(
        capsys, str(file), *WORDS, "--trainer", trainer, "--report", f"{tmp_path}/no/x.html"
    )
    assert "--report" in elsewhere and "name a file in a folder that is there" in elsewhere


# What is a stream


def test_times_segments_and_ignored_columns_are_no_features(tmp_path: Path) -> None:
    file = tmp_path / "parcels.csv"
    times = [f"2026-01-{day:02d}T00:00:00+02:00" for day in (3, 1, 5)]
    frame = rows(3).assign(ts=times, segment=[1.0, None, 2.0], note="x")
    frame.to_csv(file, index=False)
    stream = read_table(
        file, label="late", ignore=("note", "absent"), reference_rows=1, least_live=1, kind=None
    )
    assert list(stream.features.columns) == ["push", "pull"]
    assert stream.segments == ("1", None, "2")
    # Row order is time order: where the file's times fall, the row has the time of the one before it.
    assert [moment.isoformat() for moment in stream.times] == [
        "2026-01-02T22:00:00+00:00",
        "2026-01-02T22:00:00+00:00",
        "2026-01-04T22:00:00+00:00",
    ]
    numbered = read_table(file, label="late", ignore=("ts",), reference_rows=1, least_live=1, kind=None)
    assert [moment.second for moment in numbered.times] == [0, 1, 2]
    assert "ts" not in numbered.features.columns


@pytest.mark.parametrize(
    ("values", "kind", "first"),
    [
        ([1.0, 0.0, 1.0, 0.0], "classification", 1),
        (["no", "yes", "no", "yes"], "classification", "no"),
        ([True, False, True, False], "classification", True),
        ([0.5, 1.25, 2.0, 7.0], "regression", 0.5),
    ],
)
def test_labels_say_what_kind_of_model_it_is(
    values: list[Any], kind: str, first: Any, tmp_path: Path
) -> None:
    file = tmp_path / "parcels.csv"
    rows(4).assign(late=values).to_csv(file, index=False)
    stream = read_table(file, label="late", ignore=(), reference_rows=2, least_live=1, kind=None)
    assert (stream.kind, stream.labels[0], type(stream.labels[0])) == (kind, first, type(first))


# What is none


def test_an_unknown_label_is_told_with_the_nearest_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "parcels.csv"
    rows(20).rename(columns={"late": "was_late"}).to_csv(file, index=False)
    assert "no column 'was_lat' (--label): did you mean 'was_late'?" in complaint(
        capsys, str(file), "--label", "was_lat"
    )
    assert "it has 'push', 'pull', 'was_late'" in complaint(capsys, str(file), "--label", "zzz")


def test_what_cannot_be_a_stream_names_the_column_and_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(frame: pd.DataFrame, *words: str) -> str:
        file = tmp_path / "parcels.csv"
        frame.to_csv(file, index=False)
        return complaint(capsys, str(file), *WORDS, *words)

    whole = rows()
    assert "lower --reference-rows or --window-rows" in said(whole.head(450))
    assert "no feature column beside 'late'" in said(whole, "--ignore", "push,pull")
    assert "column 'ts' has no times" in said(whole.assign(ts="soon"))
    assert "take row numbers as the time with --ignore ts" in said(whole.assign(ts="soon"))
    assert "column 'ts' is empty in 1 rows" in said(whole.assign(ts=[None, *["2026-01-01"] * 999]))
    assert "column 'late' holds 1000 labels that are no numbers" in said(
        whole.assign(late="yes"), "--metric", "mae"
    )
    assert "no label in the first 400 rows" in said(whole.assign(late=[None] * 400 + [1] * 600))
    assert "--drift-at 5000: " in said(whole, "--drift-at", "5000")


def test_windows_of_time_need_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, config = tmp_path / "parcels.csv", tmp_path / "hourly.toml"
    rows().to_csv(file, index=False)
    config.write_text("[models.parcels]\nreference_rows = 400\n[models.parcels.window]\nseconds = 3600\n")
    told = complaint(capsys, str(file), "--label", "late", "--config", str(config))
    assert "has no column 'ts'" in told and "--window-rows" in told


def test_files_that_are_not_there_or_not_readable_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no file" in complaint(capsys, str(tmp_path / "none.parquet"), *WORDS)
    broken = tmp_path / "broken.parquet"
    broken.write_text("no parquet")
    assert "CSV files end in .csv" in complaint(capsys, str(broken), *WORDS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "say what to replay"),
        (("x.csv", "--topic"), "say what to replay"),
        (("--topic",), "--topic needs --config"),
        (("x.csv", "--from", "1d"), "give them with --topic"),
    ],
)
def test_words_that_do_not_go_together(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in complaint(capsys, *words)
