"""Evaluation: challenger and champion on the rows that neither the challenger nor the choice has seen."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from flows.gate import Holdout, judge
from flows.registry import ModelUnloadable, ModelVersion, Registry, RegistryUnavailable
from flows.rows import LabelledRows
from flows.scoring import Answers, metric_of
from flows.verdict import Verdict, refusal
from monitors.settings import FlowSettings

LOGGED = "logged predictions"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The gate's verdict, and the champion (empty: none) that it holds against."""

    verdict: Verdict
    champion: str


class _NoChampionToAsk(Exception):
    """The champion exists and can't answer; the message is the gate's sentence."""


def evaluate(
    settings: FlowSettings, registry: Registry, made: ModelVersion, rows: LabelledRows
) -> Evaluation:
    """
    Judge the version as it lies in the registry, on every row later than its training.

    Where the registry has no champion, what the serving model logged for these rows stands for it,
    so that the first challenger has to beat the model that serves too.
    """
    model = settings.settings
    champion = registry.champion_version()
    holdout = rows.between(rows.first_after(made.trained_until), len(rows))
    if not champion:
        holdout = _answered(holdout)
    challenger = registry.load(made.version).answers(holdout.features) if len(holdout) else _silent()
    try:
        rival = _rival(registry, champion, holdout)
    except _NoChampionToAsk as error:
        return Evaluation(refusal(metric_of(model.gate, model.kind), str(error)), champion)
    verdict = judge(
        model.gate,
        model.kind,
        Holdout(holdout.labels, holdout.event_times),
        [challenger],
        rival,
        trained_until=made.trained_until,
        segments=holdout.segments,
        seed=model.training.seed,
    )
    return Evaluation(verdict, champion)


def _answered(holdout: LabelledRows) -> LabelledRows:
    """The rows with a logged prediction, if there are any."""
    known = np.array([prediction is not None for prediction in holdout.predictions], dtype=bool)
    return holdout.where(known) if known.any() else holdout


def _rival(registry: Registry, champion: str, holdout: LabelledRows) -> Answers | None:
    if champion:
        return _champion_answers(registry, champion, holdout)
    if not len(holdout) or holdout.predictions[0] is None:
        return None
    probabilities: Any = holdout.probabilities
    return Answers(LOGGED, holdout.predictions, None if np.isnan(probabilities).any() else probabilities)


def _champion_answers(registry: Registry, champion: str, holdout: LabelledRows) -> Answers:
    try:
        return registry.load(champion).answers(holdout.features, f"version {champion}")
    except RegistryUnavailable:
        raise
    except ModelUnloadable as error:
        raise _NoChampionToAsk(f"the champion can't be loaded, and is kept: {error}") from error
    except Exception as error:
        # Whatever an estimator may raise: not knowing how good the champion is keeps it.
        reason = f"{type(error).__name__}: {error}"
        raise _NoChampionToAsk(
            f"champion version {champion} can't answer these rows, and is kept: {reason}"
        ) from error


def _silent() -> Answers:
    return Answers("challenger", np.empty(0, dtype=object))
