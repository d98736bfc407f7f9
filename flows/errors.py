"""Every error a retraining run raises on purpose. Each message says what, where and what to do."""


class FlowError(Exception):
    """Base of them all; the run ends Failed, and its state's message is this one."""

    exit_code = 1


class NotRetrainable(FlowError):
    """There is nothing wrong, and no challenger either: the request is refused, the champion stays."""


class Fenced(FlowError):
    """Another run has taken the request over: whatever is left to do is that run's business."""
