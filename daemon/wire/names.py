"""What the things of a model are called in Prefect, on either side of the wire."""

import hashlib
import re

FLOW = "retrain-daemon"
CLAIM_PREFIX = "retrain-daemon-claim-"
CHAMPION_PREFIX = "retrain-daemon-champion-"

_SLUG = re.compile(r"[a-z0-9_-]{1,120}")
_BANNED_IN_NAMES = frozenset("/%&<>")


def variable_slug(model: str) -> str:
    """
    The model's name in the letters that Prefect's variables may have (`a-z 0-9 _ -`).

    A name that is usable stays as it is; any other gets `__` and a digest. Names that hold `__`
    themselves get a digest too, so that no two models ever share a slug.

    >>> variable_slug("fraud_v2")
    'fraud_v2'
    >>> variable_slug("Fraud")
    'fraud__1baabd4791ec1e2c'
    """
    if _SLUG.fullmatch(model) and "__" not in model:
        return model
    return f"{_readable(model, keep='_')}__{_digest(model)}"


def block_name(model: str) -> str:
    """The name of the model's webhook block; blocks know only `a-z 0-9 -`, hence always a digest."""
    return f"retrain-daemon-{_readable(model)}-{_digest(model)}"


def deployment_name(model: str) -> str:
    """The model's name, unless it holds what Prefect forbids in a deployment's name."""
    usable = model.strip("' \"") and not _BANNED_IN_NAMES & set(model)
    return model if usable else variable_slug(model)


def full_deployment_name(model: str) -> str:
    """Flow and deployment, as Prefect's command line and `PrefectApi.deployment` take them."""
    return f"{FLOW}/{deployment_name(model)}"


def claim_variable(request: str, fence: int) -> str:
    """The variable whose creation claims the request."""
    return f"{CLAIM_PREFIX}{request}-{fence}"


def champion_variable(model: str) -> str:
    """The variable that tells the daemon which version serves since when."""
    return f"{CHAMPION_PREFIX}{variable_slug(model)}"


def _readable(model: str, keep: str = "") -> str:
    return re.sub(f"[^a-z0-9{keep}]+", "-", model.lower())[:60].strip("-_") or "model"


def _digest(model: str) -> str:
    return hashlib.sha256(model.encode()).hexdigest()[:16]
