"""Verdicts: what the gate says of the candidates, in numbers and in one sentence."""

from collections.abc import Sequence
from typing import Literal

import msgspec


class Check(msgspec.Struct, frozen=True):
    """One condition and whether it held; `detail` has the numbers."""

    name: str
    passed: bool
    detail: str


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """
    How one candidate did. Without a score it could not be judged, and `checks` say why.

    `low` and `high` bound its improvement over the champion, positive being better whatever the
    metric, each one-sidedly at the asked confidence for all candidates together. `surety` is how far the
    proof of superiority came: at 1 the improvement is sure. By `merit` candidates are compared with each
    other, more being better. `told` has it all in words.
    """

    source: str
    score: float | None = None
    low: float | None = None
    high: float | None = None
    surety: float | None = None
    merit: float | None = None
    told: str = ""
    checks: tuple[Check, ...] = ()

    @property
    def failed(self) -> Check | None:
        """The first condition that did not hold."""
        return next((check for check in self.checks if not check.passed), None)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """
    What the gate says, and every number it says it from.

    `chosen` is the place among the candidates of the one that is promoted or, if none is, that came
    nearest; None if there was nothing to judge. Score, bounds and checks are those of the chosen.
    """

    action: Literal["promoted", "refused"]
    sentence: str
    metric: str
    rows: int = 0
    chosen: int | None = None
    challenger_score: float | None = None
    champion_score: float | None = None
    champion: str = ""
    low: float | None = None
    high: float | None = None
    surety: float | None = None
    checks: tuple[Check, ...] = ()
    candidates: tuple[Standing, ...] = ()


def refusal(metric: str, sentence: str, *, rows: int = 0, checks: Sequence[Check] = ()) -> Verdict:
    """A verdict for want of something to judge; the champion stays."""
    told = tuple(checks) or (Check("judgeable", False, sentence),)
    return Verdict(action="refused", sentence=sentence, metric=metric, rows=rows, checks=told)


def comparison(score: float, champion: float | None, low: float | None, high: float | None) -> str:
    """
    Both scores and the bounds of the improvement, in one clause.

    >>> comparison(0.931, 0.874, 0.031, 0.079)
    '0.931 against 0.874, CI +.03 to +.08'
    """
    if champion is None or low is None or high is None:
        return f"{plain(score)}, and no champion to compare with"
    return f"{plain(score)} against {plain(champion)}, CI {interval(low, high)}"


def interval(low: float, high: float) -> str:
    """
    Bounds of an improvement, signed, with as many decimals as it takes to tell them from zero.

    >>> interval(0.031, 0.0789), interval(-0.02, 0.004), interval(1.234, 20.0)
    ('+.03 to +.08', '-.020 to +.004', '+1.23 to +20')
    """
    decimals = 2
    while decimals < 5 and any(bound and not round(bound, decimals) for bound in (low, high)):
        decimals += 1
    return f"{signed(low, decimals)} to {signed(high, decimals)}"


def signed(value: float, decimals: int = 3) -> str:
    """
    A difference, with its sign.

    >>> signed(-0.0412), signed(12.0)
    ('-.041', '+12')
    """
    if abs(value) >= 1.0:
        return f"{value:+.2f}" if abs(value) < 10.0 else f"{value:+.4g}"
    return f"{value:+.{decimals}f}".replace("0.", ".", 1)


def plain(value: float) -> str:
    """
    A score.

    >>> plain(0.93149), plain(43.81234)
    ('0.931', '43.81')
    """
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"
