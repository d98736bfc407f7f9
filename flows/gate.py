"""The gate: may one of these challengers take the champion's place, judged on the same later, unseen rows?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flows.certainty import Bounds, bounds
from flows.scoring import (
    MIN_CLASS_ROWS,
    MIN_DIFFERING_ROWS,
    Answers,
    Floats,
    Metric,
    Values,
    canonical,
    differing_rows,
    metric_of,
    numbers,
    proper_values,
    row_values,
)
from flows.segments import regressions
from flows.verdict import Check, Standing, Verdict, comparison, interval, plain, refusal, signed
from monitors.settings import GateSettings


@dataclass(frozen=True, eq=False)
class Holdout:
    """The labelled rows that decide, in event-time order; times are seconds since the epoch."""

    labels: Values
    event_times: Floats


def judge(
    settings: GateSettings,
    kind: str,
    holdout: Holdout,
    challengers: Sequence[Answers],
    champion: Answers | None,
    *,
    trained_until: float,
    segments: Values | None = None,
    seed: int = 0,
    tried: int = 0,
) -> Verdict:
    """
    Promote only a challenger that is surely better; whatever is not sure keeps the champion.

    All models answer the same rows, all later than `trained_until`, the last event time that any
    challenger was trained on. The lower bound of the paired improvement, good for all challengers at
    once, must be above zero (above `-margin` for non-inferiority), a challenger's own lower bound must
    reach the floor, and it must be surely worse in none of the `segments` (one per row, None: of none).
    Of those that show all this the best is chosen. Without a champion the floor alone decides.

    Accuracy counts hits, which tell little of each row. Where all models state probabilities of all
    classes, the improvement is proved by their Brier scores instead, which see the same difference
    with fewer rows, and the accuracy itself must be the higher one, too.

    `tried` is how many candidates there were, if some were dropped for their answers to these rows.
    """
    metric = metric_of(settings, kind)
    contest = _Contest(settings, metric, holdout, champion, segments, seed, max(tried, len(challengers)))
    common = tuple(_preconditions(contest, trained_until))
    if failed := next((check for check in common if not check.passed), None):
        return refusal(metric, failed.detail, rows=len(holdout.labels), checks=common)
    standings = _standings(contest, challengers)
    return _verdict(contest, common, standings)


@dataclass(frozen=True, eq=False)
class _Contest:
    """What every candidate meets alike."""

    settings: GateSettings
    metric: Metric
    holdout: Holdout
    champion: Answers | None
    segments: Values | None
    seed: int
    tried: int

    @property
    def rows(self) -> int:
        return len(self.holdout.labels)

    @property
    def sign(self) -> float:
        """What turns a difference of scores into an improvement."""
        return -1.0 if self.metric == "mae" else 1.0

    def proofs(self, challengers: Sequence[Answers]) -> list[Floats] | None:
        """Per row and challenger the improvement by a proper score; None where the metric has to do."""
        if self.champion is None or self.metric != "accuracy" or self.settings.mode != "superiority":
            return None
        found = [proper_values(self.holdout.labels, one) for one in (self.champion, *challengers)]
        known = [values for values in found if values is not None]
        return [values - known[0] for values in known[1:]] if len(known) == len(found) else None

    def values(self, answers: Answers) -> Floats:
        """Per row; their mean is the score."""
        return row_values(self.metric, self.holdout.labels, answers)

    def worst(self, values: Sequence[Floats]) -> list[float | None]:
        """The least that each candidate's own score surely is, if a floor asks for it."""
        if self.settings.floor is None:
            return [None] * len(values)
        found = self.bounds(values)
        return [float(bound) for bound in (found.high if self.metric == "mae" else found.low)]

    def bounds(self, rows: Sequence[Floats]) -> Bounds:
        settings = self.settings
        return bounds(np.stack(rows), settings.confidence, settings.resamples, self.seed, self.tried)


# What must hold before anything is compared


def _preconditions(contest: _Contest, trained_until: float) -> Iterator[Check]:
    rows, needed = contest.rows, contest.settings.min_holdout_rows
    enough = rows >= max(needed, 1)
    yield Check("rows", enough, f"{'' if enough else 'only '}{rows} holdout rows, {needed} needed")
    if not enough:
        return
    later = bool(contest.holdout.event_times.min() > trained_until)
    yield Check("later", later, f"the holdout is {'' if later else 'not '}later than the training rows")
    if contest.metric in ("balanced_accuracy", "auc"):
        yield _classes(contest.metric, contest.holdout.labels)
    if contest.champion is not None:
        yield _answered(contest.metric, "champion", rows, contest.champion)


def _classes(metric: Metric, labels: Values) -> Check:
    names, counts = np.unique(canonical(labels).astype(str), return_counts=True)
    fewest = int(counts.min())
    if len(names) < 2 or (metric == "auc" and len(names) > 2):
        wanted = "exactly two" if metric == "auc" else "at least two"
        return Check("classes", False, f"{metric} needs {wanted} classes, the holdout has {len(names)}")
    enough = fewest >= MIN_CLASS_ROWS
    return Check(
        "classes", enough, f"{fewest} holdout rows of the rarest class, {metric} needs {MIN_CLASS_ROWS}"
    )


def _answered(metric: Metric, role: str, rows: int, answers: Answers) -> Check:
    name = f"{role} answers"
    if len(answers.predictions) != rows:
        return Check(name, False, f"the {role} answered {len(answers.predictions)} of {rows} rows")
    if metric == "auc":
        if answers.probabilities is None:
            return Check(name, False, f"auc needs probabilities, and there are none of the {role}")
        known = np.isfinite(numbers(answers.probabilities))
    elif metric == "mae":
        known = np.isfinite(numbers(answers.predictions))
    else:
        known = np.array([value is not None for value in canonical(answers.predictions)])
    unknown = int(rows - known.sum())
    return Check(name, not unknown, f"the {role} has no usable answer for {unknown} of {rows} rows")


def _signature(challenger: Answers, champion: Answers) -> Check:
    """Whoever calls the champion goes on calling: what it reads must be read, what it answers answered."""
    lacks = [*_missing_columns(challenger, champion), *_missing_classes(challenger, champion)]
    detail = (
        f"{challenger.source} {' and '.join(lacks)}" if lacks else "reads and answers what the champion does"
    )
    return Check("signature", not lacks, detail)


def _missing_columns(challenger: Answers, champion: Answers) -> Iterator[str]:
    if challenger.columns is None or champion.columns is None:
        return
    if missing := [name for name in champion.columns if name not in challenger.columns]:
        yield f"does not read {_named(missing)}, as the champion does"
    for name, type_ in champion.columns.items():
        if challenger.columns.get(name, type_) != type_:
            yield f"reads {name} as {challenger.columns[name]}, the champion as {type_}"


def _missing_classes(challenger: Answers, champion: Answers) -> Iterator[str]:
    if challenger.classes is None or champion.classes is None:
        return
    if missing := [name for name in champion.classes if name not in challenger.classes]:
        yield f"never answers {_named(missing)}, as the champion does"


def _named(names: Sequence[str], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


# The comparison


@dataclass(frozen=True, eq=False)
class _Measured:
    """One candidate's numbers; improvements are positive when better."""

    answers: Answers
    sign: float
    score: float
    worst: float | None
    champion: float | None = None
    differing: float = 0.0
    low: float | None = None
    high: float | None = None
    proof: "_Proof | None" = None

    @property
    def told(self) -> str:
        said = comparison(self.score, self.champion, self.low, self.high)
        return f"{said}{self.proof.told}" if self.proof is not None else said

    @property
    def improved(self) -> bool:
        return self.champion is None or self.sign * (self.score - self.champion) > 0.0


@dataclass(frozen=True)
class _Proof:
    """The mean improvement that superiority is judged by, and its bounds; `proper`: of Brier scores."""

    gain: float
    low: float
    high: float
    proper: bool

    @property
    def surety(self) -> float:
        """The improvement as a share of what it would have to be."""
        reach = self.gain - self.low
        return self.gain / reach if reach > 0.0 else 0.0

    @property
    def told(self) -> str:
        return f", Brier {signed(self.gain)}, CI {interval(self.low, self.high)}" if self.proper else ""


def _standings(contest: _Contest, challengers: Sequence[Answers]) -> tuple[Standing, ...]:
    entries = [tuple(_entry(contest, challenger)) for challenger in challengers]
    able = [all(check.passed for check in checks) for checks in entries]
    fit = [challenger for challenger, fits in zip(challengers, able, strict=True) if fits]
    measured = iter(_measured(contest, fit) if fit else ())
    return tuple(
        _standing(contest, checks, next(measured))
        if fits
        else Standing(source=challenger.source, checks=checks)
        for challenger, checks, fits in zip(challengers, entries, able, strict=True)
    )


def _entry(contest: _Contest, challenger: Answers) -> Iterator[Check]:
    if contest.champion is not None:
        yield _signature(challenger, contest.champion)
    yield _answered(contest.metric, "challenger", contest.rows, challenger)


def _measured(contest: _Contest, challengers: Sequence[Answers]) -> Iterator[_Measured]:
    values = [contest.values(challenger) for challenger in challengers]
    worst = contest.worst(values)
    if contest.champion is None:
        for ours, challenger, bound in zip(values, challengers, worst, strict=True):
            yield _Measured(challenger, contest.sign, float(ours.mean()), bound)
        return
    rival = contest.values(contest.champion)
    gains = contest.bounds([contest.sign * (ours - rival) for ours in values])
    proofs = contest.proofs(challengers)
    proved = gains if proofs is None else contest.bounds(proofs)
    for place, challenger in enumerate(challengers):
        yield _Measured(
            challenger,
            contest.sign,
            float(values[place].mean()),
            worst[place],
            champion=float(rival.mean()),
            differing=differing_rows(contest.metric, contest.holdout.labels, challenger, contest.champion),
            low=float(gains.low[place]),
            high=float(gains.high[place]),
            proof=_Proof(
                float(proved.means[place]),
                float(proved.low[place]),
                float(proved.high[place]),
                proofs is not None,
            ),
        )


def _standing(contest: _Contest, entry: tuple[Check, ...], measured: _Measured) -> Standing:
    return Standing(
        source=measured.answers.source,
        score=measured.score,
        low=measured.low,
        high=measured.high,
        surety=None if measured.proof is None else measured.proof.surety,
        merit=measured.sign * measured.score if measured.proof is None else measured.proof.gain,
        told=measured.told,
        checks=entry + tuple(_outcomes(contest, measured)),
    )


def _outcomes(contest: _Contest, measured: _Measured) -> Iterator[Check]:
    if contest.settings.floor is not None and measured.worst is not None:
        yield _floor(contest.settings.floor, contest.metric, measured.score, measured.worst)
    if contest.champion is None or measured.low is None:
        return
    against = list(_against(contest, measured, measured.low))
    yield from against
    # Segments take their time, and who has failed already has nothing to lose in them.
    if contest.segments is not None and all(check.passed for check in against):
        yield _segments(contest, contest.segments, measured, contest.champion)


def _against(contest: _Contest, measured: _Measured, low: float) -> Iterator[Check]:
    if contest.settings.mode == "non_inferiority":
        yield _non_inferior(contest.settings.margin, measured.told, low)
    else:
        yield from _superior(measured)


def _floor(floor: float, metric: Metric, score: float, worst: float) -> Check:
    passed = worst <= floor if metric == "mae" else worst >= floor
    reach = "up to" if metric == "mae" else "from"
    verb = "keeps" if passed else "misses"
    sentence = f"{plain(score)}, CI {reach} {plain(worst)}, {verb} the floor {floor:g}"
    return Check("floor", passed, sentence)


def _superior(measured: _Measured) -> Iterator[Check]:
    proof = measured.proof
    enough = measured.differing >= MIN_DIFFERING_ROWS
    differ = f"the two differ on {measured.differing:.0f} holdout rows, {MIN_DIFFERING_ROWS} needed"
    yield Check("differing rows", enough, differ if enough else f"{measured.told}: {differ}")
    yield Check("superior", proof is not None and proof.low > 0.0 and measured.improved, measured.told)


def _non_inferior(margin: float, told: str, low: float) -> Check:
    passed = low > -margin
    verb = "no worse" if passed else "perhaps worse"
    return Check("non-inferior", passed, f"{told}: {verb} than the margin of {margin:g} allows")


def _segments(contest: _Contest, segments: Values, measured: _Measured, champion: Answers) -> Check:
    settings = contest.settings
    judged, worse = regressions(
        settings, contest.metric, contest.holdout.labels, segments, measured.answers, champion
    )
    if not worse:
        return Check("segments", True, f"surely worse in none of {judged} segments")
    allowed = f", {settings.segment_margin:g} allowed" if settings.segment_margin else ""
    found = "; ".join(str(one) for one in worse)
    return Check("segments", False, f"{measured.told}, but worse in segment {found}{allowed}")


# What is said of it


def _verdict(contest: _Contest, common: tuple[Check, ...], standings: tuple[Standing, ...]) -> Verdict:
    chosen = _chosen(contest, standings)
    best = standings[chosen]
    refused = best.failed
    champion = contest.champion
    score = float(contest.values(champion).mean()) if champion else None
    return Verdict(
        action="refused" if refused else "promoted",
        sentence=(refused.detail if refused else best.told) + _among(standings, best),
        metric=contest.metric,
        rows=contest.rows,
        chosen=chosen,
        challenger_score=best.score,
        champion_score=score,
        champion=champion.source if champion else "",
        low=best.low,
        high=best.high,
        surety=best.surety,
        checks=common + best.checks,
        candidates=standings,
    )


def _chosen(contest: _Contest, standings: Sequence[Standing]) -> int:
    """The best of those that may be promoted, else of those that were judged, else the first."""

    def merit(place: int) -> tuple[bool, float, int]:
        standing = standings[place]
        merit = -np.inf if standing.merit is None else standing.merit
        return standing.failed is None, float(merit), -place

    return max(range(len(standings)), key=merit)


def _among(standings: Sequence[Standing], best: Standing) -> str:
    return f" ({best.source}, of {len(standings)} candidates)" if len(standings) > 1 else ""
