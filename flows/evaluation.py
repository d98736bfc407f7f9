"""Evaluation: challengers and champion on the same later rows, which none of them has seen."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from flows.earlier import again, earlier_answers, is_earlier
from flows.errors import NotRetrainable
from flows.gate import Holdout, judge
from flows.registry import ModelUnloadable, Registry, RegistryUnavailable
from flows.rows import LabelledRows
from flows.scoring import Answers, Values, losses, metric_of
from flows.training import (
    ALL,
    MIN_SPAN_ROWS,
    Candidate,
    Challenger,
    answers,
    fit_span,
    refit,
    walk_forward,
)
from flows.verdict import Verdict, refusal
from monitors.baseline import Baseline
from monitors.settings import FlowSettings, ModelSettings
from monitors.statistics import long_run_deviation

LOGGED = "logged predictions"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """
    The gate's verdict, and the champion (empty: none) that it holds against.

    `span` is the one that was chosen, or came nearest; `baseline` how its models did on the holdout.
    `reached` is the level that performance is held against from now on.
    """

    verdict: Verdict
    champion: str
    span: str = ALL
    baseline: Baseline | None = None
    candidates: tuple[Candidate, ...] = ()
    reached: Baseline | None = None


class _NoChampionToAsk(Exception):
    """The champion exists and can't answer; the message is the gate's sentence."""


def evaluate(
    settings: FlowSettings,
    registry: Registry,
    rows: LabelledRows,
    since: datetime | None = None,
    only: str = "",
) -> Evaluation:
    """
    Judge each span's models on the newest rows, which neither they nor the champion have seen.

    Where the registry has no champion, what the serving model logged for these rows stands for it,
    so that the first challenger has to beat the model that serves too.
    """
    model = settings.settings
    champion = registry.champion_version()
    known_champion = registry.find(champion) if champion else None
    after = known_champion.trained_until if known_champion else None
    trial = walk_forward(model, rows, since, after, only)
    holdout, challengers = trial.holdout, trial.answers
    earlier = earlier_answers(model.kind, registry, champion, trial.before, holdout, only)
    if is_earlier(only) and not earlier:
        raise NotRetrainable(f"{only} was chosen before, and can't be asked any more")
    challengers = earlier if is_earlier(only) else (*challengers, *earlier)
    if not champion:
        known = _answered(holdout)
        holdout = holdout.where(known)
        challengers = tuple(one.only(known) for one in challengers)
    try:
        rival = _rival(registry, champion, holdout)
    except _NoChampionToAsk as error:
        return Evaluation(refusal(metric_of(model.gate, model.kind), str(error)), champion, trial.spans[0])
    verdict = judge(
        model.gate,
        model.kind,
        Holdout(holdout.labels, holdout.event_times),
        challengers,
        rival,
        trained_until=trial.trained_until,
        segments=holdout.segments,
        seed=model.training.seed,
    )
    chosen = challengers[verdict.chosen or 0]
    baseline = baseline_of(model.kind, holdout.labels, chosen)
    served = None if rival is None else baseline_of(model.kind, holdout.labels, rival)
    candidates = [
        Candidate(one.source, len(holdout), one.score, one.low, one.high) for one in verdict.candidates
    ]
    return Evaluation(
        verdict,
        champion,
        chosen.source,
        baseline,
        tuple(candidates),
        level_after(verdict.action, baseline, served),
    )


def level_after(action: str, candidate: Baseline | None, champion: Baseline | None) -> Baseline | None:
    """
    The level of the loss after an attempt, from what both lost on the same rows.

    After a refusal it is not known which of the two is the better one. The champion's own loss would hide
    what a candidate may be better by, and the candidate's, the best of several by chance, would call a
    champion fallen that never was: so it lies between them.
    """
    if action == "promoted" or candidate is None or champion is None or champion.loss <= candidate.loss:
        return candidate
    return Baseline((candidate.loss + champion.loss) / 2.0, candidate.deviation, candidate.rows)


def made_of(
    registry: Registry, settings: ModelSettings, rows: LabelledRows, span: str, since: datetime | None
) -> Challenger:
    """The model that a candidate stands for: fitted up to now, or an earlier champion as it was."""
    return again(registry, span) if is_earlier(span) else refit(settings, rows, span, since)


def baseline_of(kind: str, labels: Values, said: Answers) -> Baseline | None:
    """How a model did on rows not seen before, in time order; a few rows without a mistake promise none."""
    costs = losses(kind, labels, said)
    if not costs.size:
        return None
    deviation = long_run_deviation(costs)
    if kind == "classification":
        # Jeffreys' estimate of the share of mistakes, which is never nothing.
        share = (float(costs.sum()) + 0.5) / (costs.size + 1.0)
        deviation = max(deviation, (share * (1.0 - share)) ** 0.5)
    return Baseline(float(costs.mean()), deviation, int(costs.size))


def own_baseline(settings: ModelSettings, rows: LabelledRows) -> Baseline | None:
    """How the first champion does: a model of its older rows on the newest quarter of them."""
    cut = rows.first_at(float(rows.event_times[round(0.75 * len(rows))])) if len(rows) else 0
    if min(cut, len(rows) - cut) < MIN_SPAN_ROWS:
        return None
    try:
        made = fit_span(settings, rows.between(0, cut))
    except NotRetrainable:
        return None
    later = rows.between(cut, len(rows))
    return baseline_of(
        settings.kind, later.labels, answers("older rows", made.schema, made.estimator, later.features)
    )


def _answered(holdout: LabelledRows) -> npt.NDArray[np.bool_]:
    """Which rows have a logged prediction; all of them if none has."""
    known = np.array([prediction is not None for prediction in holdout.predictions], dtype=bool)
    return known if known.any() else np.ones(len(holdout), dtype=bool)


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
