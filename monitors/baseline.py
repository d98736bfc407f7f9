"""Baseline: how well a model does where nothing has changed."""

import msgspec


class Baseline(msgspec.Struct, frozen=True):
    """
    The mean loss of a model on `rows` that it was not trained on.

    `deviation` is the long-run standard deviation of one row's loss.
    """

    loss: float
    deviation: float
    rows: int
