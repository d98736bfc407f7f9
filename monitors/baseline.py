"""Baseline: how well a model does where nothing has changed."""

import msgspec


class Baseline(msgspec.Struct, frozen=True):
    """Mean loss on `rows` that a model was not trained on, and the long-run standard deviation of one row's."""

    loss: float
    deviation: float
    rows: int
