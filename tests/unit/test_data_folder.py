"""Labelled rows from a folder or a user's function, in event-time order and bounded."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from flows.data import UnreadableRows, extract
from flows.errors import NotRetrainable
from monitors.settings import (
    DataSettings,
    FlowSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    RegistrySettings,
)


def flow_settings(kind: Any = "classification", **data: Any) -> FlowSettings:
    return FlowSettings(
        model="fraud",
        settings=ModelSettings(kind=kind, data=DataSettings(**{"source": "folder", "min_rows": 1, **data})),
        kafka=KafkaSettings(),
        fields={},
        limits=LimitSettings(),
        registry=RegistrySettings(),
    )


def frame(rows: int = 6) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "event_time": pd.date_range("2026-01-01", periods=rows, freq="min", tz="UTC")[::-1],
            "amount": [float(index) for index in range(rows)],
            "label": [index % 2 for index in range(rows)],
            "prediction": [1] * rows,
            "model": ["fraud"] * rows,
            "id": [str(index) for index in range(rows)],
        }
    )


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_gives_rows_in_event_time_order_and_features_only(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    frame().to_csv(path, index=False) if suffix == "csv" else frame().to_parquet(path)
    rows = extract(flow_settings(path=str(path)), None)
    assert list(rows.features.columns) == ["amount"]
    assert rows.features["amount"].tolist() == [5, 4, 3, 2, 1, 0]
    assert rows.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert rows.predictions.tolist() == [1] * 6
    assert rows.event_times[0] == pd.Timestamp("2026-01-01", tz="UTC").timestamp()
    assert rows.segments.tolist() == [None] * 6


def test_segments_go_along_with_their_rows_and_are_no_features(tmp_path: Path) -> None:
    frame().assign(segment=["eu", "us", None, "eu", "us", "us"]).to_csv(tmp_path / "a.csv", index=False)
    rows = extract(flow_settings(path=str(tmp_path)), None)
    assert list(rows.features.columns) == ["amount"]
    assert rows.segments.tolist() == ["us", "us", "eu", None, "us", "eu"]
    assert rows.between(1, 4).segments.tolist() == ["us", "eu", None]


def test_a_folder_is_all_its_files_and_only_the_newest_rows_are_kept(tmp_path: Path) -> None:
    frame().iloc[:3].to_csv(tmp_path / "a.csv", index=False)
    frame().iloc[3:].to_csv(tmp_path / "b.csv", index=False)
    (tmp_path / "notes.txt").write_text("no rows")
    rows = extract(flow_settings(path=str(tmp_path), max_rows=4), None)
    assert rows.features["amount"].tolist() == [3, 2, 1, 0]


def test_rows_without_a_label_or_of_another_model_are_no_rows(tmp_path: Path) -> None:
    table = frame().astype({"label": float})
    table.loc[0, "label"] = None
    table.loc[1, "model"] = "churn"
    table.to_csv(tmp_path / "a.csv", index=False)
    assert len(extract(flow_settings(path=str(tmp_path)), None)) == 4


def test_without_event_times_the_order_of_rows_is_their_time(tmp_path: Path) -> None:
    frame().drop(columns="event_time").to_csv(tmp_path / "a.csv", index=False)
    assert extract(flow_settings(path=str(tmp_path)), None).event_times.tolist() == [0, 1, 2, 3, 4, 5]


def test_too_few_rows_refuse_the_request(tmp_path: Path) -> None:
    frame().to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(NotRetrainable, match="only 6 labelled rows, 200 needed"):
        extract(flow_settings(path=str(tmp_path), min_rows=200), None)


def test_the_fingerprint_sees_every_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    table = pd.concat([frame(1000)] * 25, ignore_index=True)
    prints = set()
    for changed in (None, 3, 24_999):
        if changed is not None:
            table.loc[changed, "amount"] = -1.0
        table.to_csv(path, index=False)
        prints.add(extract(flow_settings(path=str(path), max_rows=30_000), None).fingerprint)
    assert len(prints) == 3


def test_numbers_that_are_none_are_no_labels_of_a_regression(tmp_path: Path) -> None:
    table = frame().astype({"label": object})
    table.loc[0, "label"] = "n/a"
    table.to_csv(tmp_path / "a.csv", index=False)
    assert len(extract(flow_settings("regression", path=str(tmp_path)), None)) == 5


@pytest.mark.parametrize(
    ("content", "says"), [(None, "no .parquet or .csv file"), ("a,b\n1,2\n", "no column 'label'")]
)
def test_an_unusable_place_is_named(tmp_path: Path, content: str | None, says: str) -> None:
    if content:
        (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UnreadableRows, match=says):
        extract(flow_settings(path=str(tmp_path)), None)


def test_a_users_function_gives_the_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_rows_here.py").write_text(
        "import pandas as pd\n"
        "def rows(settings, request):\n"
        "    return pd.DataFrame({'label': ['a', 'b'], 'x': [settings.model, request]})\n"
    )
    monkeypatch.chdir(tmp_path)
    rows = extract(flow_settings(source="callable", callable="their_rows_here:rows"), None)
    assert rows.labels.tolist() == ["a", "b"]
    assert rows.features["x"].tolist()[0] == "fraud"
