"""The staged stream: parcels that arrive late or not, through a calm, a fashion, a strike and a flood."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import Generator

from flows.demo.stream import Act, Row, Stream
from monitors.records import Scalar

CARRIERS = ("road", "rail", "air", "bike")
PAYMENTS = ("card", "invoice", "wallet")
DEVICES = ("phone", "desktop", "tablet")

# Four features decide whether a parcel is late, four do not: when only the latter move, half of all
# columns drift and nothing is wrong with the model.
NUMERIC = {
    "distance_km": (220.0, 60.0),
    "traffic": (0.50, 0.12),
    "load_kg": (14.0, 4.0),
    "basket_eur": (75.0, 20.0),
    "minutes_on_site": (9.0, 2.5),
}


class Regime(NamedTuple):
    """How the world is for a while: where the inputs lie, and what makes a parcel late."""

    shifts: Mapping[str, float]
    carriers: Sequence[float]
    payments: Sequence[float]
    devices: Sequence[float]
    weights: Mapping[str, float]
    carrier_delay: Sequence[float]


CALM = Regime(
    shifts={},
    carriers=(0.45, 0.25, 0.20, 0.10),
    payments=(0.60, 0.25, 0.15),
    devices=(0.55, 0.35, 0.10),
    weights={"distance_km": 1.5, "traffic": 1.3, "load_kg": 0.5},
    carrier_delay=(0.6, -0.5, -1.0, 0.8),
)
# A sales campaign: other baskets, other visitors, the same roads.
FASHION = CALM._replace(
    shifts={"basket_eur": 1.1, "minutes_on_site": -1.0},
    payments=(0.25, 0.20, 0.55),
    devices=(0.85, 0.10, 0.05),
)
# A drivers' strike: long hauls go by rail and are on time, short ones wait for a lorry.
STRIKE = Regime(
    shifts={"distance_km": 0.9, "traffic": -1.0, "load_kg": 0.8, "basket_eur": 0.5},
    carriers=(0.12, 0.58, 0.20, 0.10),
    payments=CALM.payments,
    devices=CALM.devices,
    weights={"distance_km": 0.2, "traffic": -0.5, "load_kg": 1.8},
    carrier_delay=(1.6, -0.2, 0.2, 0.4),
)
# A flood: bridges are closed, heavy parcels wait, and light ones fly.
FLOOD = Regime(
    shifts={"distance_km": -0.5, "traffic": 0.6, "load_kg": -0.5, "basket_eur": -0.6, "minutes_on_site": 0.6},
    carriers=(0.25, 0.08, 0.55, 0.12),
    payments=CALM.payments,
    devices=CALM.devices,
    weights={"distance_km": 1.8, "traffic": 0.4, "load_kg": -0.8},
    carrier_delay=(-0.4, 1.4, 0.5, -0.8),
)


class Scene(NamedTuple):
    """A stretch of whole windows under one regime."""

    regime: Regime
    windows: int


class ActText(NamedTuple):
    """An act before it is known at which row it starts."""

    title: str
    sentence: str
    expect: Literal["silence", "refused", "promoted", "killed"]
    scenes: tuple[Scene, ...]


ACTS = (
    ActText(
        "A calm stretch",
        "Parcels come as they came in training. Nothing may happen.",
        "silence",
        (Scene(CALM, 4),),
    ),
    ActText(
        "A harmless shift",
        "A sales campaign moves half of the columns, none of which makes a parcel late. "
        "Drift is real, a better model is not to be had: the challenger must be refused.",
        "refused",
        (Scene(FASHION, 3), Scene(CALM, 4)),
    ),
    ActText(
        "A real drift",
        "A strike changes the inputs and what makes a parcel late. A better model must be promoted.",
        "promoted",
        (Scene(STRIKE, 7),),
    ),
    ActText(
        "A real drift, and kill -9",
        "A flood. The daemon is killed between the event and the confirmation of its run, and "
        "restarted: one request, one run.",
        "killed",
        (Scene(FLOOD, 7),),
    ),
)


def parcels(*, seed: int = 7, reference_rows: int = 2_000, window_rows: int = 500) -> Stream:
    """
    The four acts, the same rows for the same arguments.

    >>> stream = parcels(reference_rows=20, window_rows=10)
    >>> len(stream.live), stream.live == parcels(reference_rows=20, window_rows=10).live
    (250, True)
    """
    rng = np.random.default_rng(seed)
    reference = tuple(_rows(rng, CALM, reference_rows))
    live = tuple(
        row
        for act in ACTS
        for scene in act.scenes
        for row in _rows(rng, scene.regime, scene.windows * window_rows)
    )
    return Stream(
        model="parcels",
        source=f"generated, seed {seed}",
        kind="classification",
        window_rows=window_rows,
        reference=reference,
        live=live,
        acts=tuple(_acts(window_rows)),
    )


def _acts(window_rows: int) -> Iterator[Act]:
    ends = np.cumsum([sum(scene.windows for scene in act.scenes) for act in ACTS]) * window_rows
    bounds = pairwise([0, *(int(end) for end in ends)])
    for number, (act, (start, end)) in enumerate(zip(ACTS, bounds, strict=True), start=1):
        yield Act(number, act.title, act.sentence, start, end, act.expect)


def _rows(rng: Generator, regime: Regime, count: int) -> Iterator[Row]:
    normal = {name: rng.standard_normal(count) + regime.shifts.get(name, 0.0) for name in NUMERIC}
    carriers = rng.choice(len(CARRIERS), count, p=regime.carriers)
    payments = rng.choice(len(PAYMENTS), count, p=regime.payments)
    devices = rng.choice(len(DEVICES), count, p=regime.devices)
    delay = np.asarray(regime.carrier_delay)[carriers] + rng.logistic(0.0, 0.35, count)
    for name, weight in regime.weights.items():
        # Relative to where this regime's inputs lie, so that about half of the parcels are late in each.
        delay = delay + weight * (normal[name] - regime.shifts.get(name, 0.0))
    for index in range(count):
        features: dict[str, Scalar] = {
            name: round(mean + sd * float(normal[name][index]), 3) for name, (mean, sd) in NUMERIC.items()
        }
        features["carrier"] = CARRIERS[carriers[index]]
        features["payment"] = PAYMENTS[payments[index]]
        features["device"] = DEVICES[devices[index]]
        yield Row(features, int(delay[index] > 0.0))
