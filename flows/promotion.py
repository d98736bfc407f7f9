"""Promotion: the reference first, then the alias, so that no champion is ever without its reference."""

import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from daemon.wire.references import ReferenceStore
from flows.audit import AuditRecord, Move
from flows.data import plain_scalar
from flows.earlier import is_earlier
from flows.evaluation import Evaluation, own_baseline
from flows.provenance import constraints_digest, git_commit
from flows.registry import ModelVersion, NewModel, Registry
from flows.rows import LabelledRows
from flows.training import Challenger, fit_span
from monitors.baseline import Baseline
from monitors.events import NAMESPACE
from monitors.reference import Reference
from monitors.settings import FlowSettings, ModelSettings

if TYPE_CHECKING:
    import pandas as pd


def register(
    settings: FlowSettings,
    registry: Registry,
    challenger: Challenger,
    rows: LabelledRows,
    request: str,
    run: str,
    evaluation: Evaluation | None = None,
    baseline: Baseline | None = None,
    model_version: str = "",
) -> ModelVersion:
    """Put a challenger into the registry, with everything it was made from and judged by."""
    candidates = evaluation.candidates if evaluation else challenger.candidates
    baseline = evaluation.baseline if evaluation else baseline
    tags = {
        "kind": settings.settings.kind,
        "git_commit": git_commit(),
        "constraints_digest": constraints_digest(),
        "parameters": msgspec.json.encode(dict(challenger.parameters)).decode(),
        "data_fingerprint": rows.fingerprint,
        "data_rows": str(len(rows)),
        "offsets": msgspec.json.encode(rows.offsets).decode(),
        "span": challenger.span,
        "candidates": msgspec.json.encode(candidates).decode(),
        "training_rows": str(challenger.rows),
        "trained_from": repr(challenger.trained_from),
        "trained_until": repr(challenger.trained_until),
        "baseline": msgspec.json.encode(baseline).decode(),
    }
    return registry.register(
        NewModel(
            estimator=challenger.estimator,
            schema=challenger.schema,
            request=request,
            run=run,
            tags=tags,
            parameters=challenger.parameters,
            model_version=model_version,
            naming=lambda number: _free_name(settings, number, request),
        )
    )


def _free_name(settings: FlowSettings, number: str, request: str) -> str:
    """
    The registry's number, unless the log knows a version of that name already.

    Models were served before this registry was there, often as version 1: a second one would be
    held against the first one's reference, and the daemon could not tell them apart.
    """
    known = ReferenceStore(settings.registry.references_url).read(settings.model, number)
    return number if known is None else f"{number}-{request[:8]}"


def promote(
    settings: FlowSettings,
    registry: Registry,
    made: ModelVersion,
    rows: LabelledRows,
    evaluation: Evaluation,
    request: str,
    run: str,
    fence: Callable[[], None],
) -> AuditRecord:
    """Make the judged version the champion, if the champion is still the one it was judged against."""
    write_reference(settings, registry, made, rows)
    verdict = evaluation.verdict
    move = Move(
        action="promoted",
        version=made.version,
        expected=evaluation.champion,
        reason=verdict.sentence,
        at=datetime.now(UTC),
        request=request,
        run=run,
        metric=verdict.metric,
        challenger_score=verdict.challenger_score,
        champion_score=verdict.champion_score,
    )
    return registry.move(move, fence)


def write_reference(
    settings: FlowSettings, registry: Registry, made: ModelVersion, rows: LabelledRows, timed: bool = True
) -> str:
    """
    Keep the newest training rows, and what the version itself says of them, for the monitors.

    Not `timed`: the rows' event times only say in which order they came.
    """
    newest = reference_rows(settings.settings, made, rows)
    predictions = registry.load(made.version).predict(newest.features)
    baseline = baseline_in(made.tags)
    reference = make_reference(settings, made.model_version, newest, predictions, baseline, timed)
    store = ReferenceStore(settings.registry.references_url)
    digest = store.write(settings.model, made.model_version, reference.to_bytes())
    registry.describe(made.version, {"reference_digest": digest, "reference_rows": str(len(newest))})
    return digest


def baseline_in(tags: Mapping[str, str]) -> Baseline | None:
    """How a version did on rows that it had not seen, as it was registered; None where that is unknown."""
    try:
        return msgspec.json.decode(tags.get("baseline", "null"), type=Baseline | None)
    except msgspec.DecodeError:
        return None


def reference_rows(settings: ModelSettings, made: ModelVersion, rows: LabelledRows) -> LabelledRows:
    """
    The newest rows that a version was trained on, as many as a reference has.

    Of an earlier champion that is back, the newest of all: it is back because it knows these.
    """
    if is_earlier(made.tags.get("span", "")):
        return rows.between(max(0, len(rows) - settings.reference_rows), len(rows))
    trained = rows.between(rows.first_at(made.trained_from), rows.first_after(made.trained_until))
    # A run that entered late may no longer find the training rows; the nearest ones have to do.
    trained = trained if len(trained) else rows
    return trained.between(max(0, len(trained) - settings.reference_rows), len(trained))


def make_reference(
    settings: FlowSettings,
    model_version: str,
    rows: LabelledRows,
    predictions: Iterable[Any],
    baseline: Baseline | None = None,
    timed: bool = True,
) -> Reference:
    """A version's reference: these rows, what the version itself says of them, and how well it does."""
    reference = Reference.from_rows(
        settings.model,
        model_version,
        _records(rows.features),
        [plain_scalar(prediction) for prediction in predictions],
        settings.settings.drift,
        [datetime.fromtimestamp(at, UTC) for at in rows.event_times.tolist()] if timed else None,
        segments=[None if segment is None else str(segment) for segment in rows.segments.tolist()],
    )
    return msgspec.structs.replace(reference, baseline=baseline)


def bootstrap(
    settings: FlowSettings,
    registry: Registry,
    frame: "pd.DataFrame",
    labels: "pd.Series",
    model_version: str,
) -> str:
    """The first champion, from all these rows; there is nothing to hold it against."""
    count = len(frame)
    nothing: list[Any] = [None] * count
    truth = [plain_scalar(label) for label in labels.tolist()]
    rows = LabelledRows.sorted(frame, truth, [float(index) for index in range(count)], nothing, nothing)
    request = str(uuid.uuid5(NAMESPACE, f"{settings.model}|bootstrap|{rows.fingerprint}|{model_version}"))
    made = registry.find_request(request) or register(
        settings,
        registry,
        fit_span(settings.settings, rows),
        rows,
        request,
        run="",
        baseline=own_baseline(settings.settings, rows),
        model_version=model_version,
    )
    write_reference(settings, registry, made, rows, timed=False)
    move = Move(
        action="promoted",
        version=made.version,
        expected="",
        reason=f"the first champion, from {count} rows",
        at=datetime.now(UTC),
        request=request,
    )
    registry.move(move, lambda: None)
    return made.version


def _records(features: "pd.DataFrame") -> list[dict[str, Any]]:
    names = [str(name) for name in features.columns]
    columns = [[plain_scalar(value) for value in features[name].tolist()] for name in features.columns]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
