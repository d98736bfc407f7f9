"""Events: what the daemon and the flows tell the world, and each other. A public, versioned contract."""

import uuid
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

import msgspec

from monitors.baseline import Baseline

SCHEMA = 1
NAMESPACE = uuid.UUID("8e0c1f0e-5f3c-5d36-9a57-0f6b5b7c2d11")
RESOURCE_PREFIX = "retrain-daemon.model."


class Kind(StrEnum):
    """Every event name. Names are promises: a rename keeps the old one for a minor version."""

    DRIFT_DETECTED = "retrain-daemon.drift.detected"
    DRIFT_RESOLVED = "retrain-daemon.drift.resolved"
    DRIFT_DISPUTED = "retrain-daemon.drift.disputed"
    RETRAIN_REQUESTED = "retrain-daemon.retrain.requested"
    RETRAIN_UNCONFIRMED = "retrain-daemon.retrain.unconfirmed"
    DATA_BROKEN = "retrain-daemon.data.broken"
    DATA_MENDED = "retrain-daemon.data.mended"
    DATA_STALLED = "retrain-daemon.data.stalled"
    DATA_LOST = "retrain-daemon.data.lost"
    CHALLENGER_PROMOTED = "retrain-daemon.challenger.promoted"
    CHALLENGER_REFUSED = "retrain-daemon.challenger.refused"
    PROMOTION_UNSERVED = "retrain-daemon.promotion.unserved"
    MODEL_ROLLED_BACK = "retrain-daemon.model.rolled-back"
    PROBATION_ENDED = "retrain-daemon.probation.ended"
    EPISODE_FUTILE = "retrain-daemon.episode.futile"
    HEARTBEAT = "retrain-daemon.heartbeat"


class Related(msgspec.Struct, frozen=True):
    """A resource that an event is also about; `role` as Prefect's feed shows it."""

    id: str
    role: Literal["deployment", "flow-run", "model-version", "report"]


class Event(msgspec.Struct, frozen=True):
    """
    One thing that happened to a model, before anybody says when it was written down.

    The id follows from (subject, kind, sequence), so that telling it twice is telling it once.
    """

    kind: Kind
    model: str
    subject: str
    payload: dict[str, Any]
    version: str = ""
    episode: str = ""
    request: str = ""
    sequence: int = 0
    related: tuple[Related, ...] = ()

    @property
    def id(self) -> uuid.UUID:
        """The same for the same subject, kind and sequence, in every process."""
        return uuid.uuid5(NAMESPACE, f"{self.subject}|{self.kind}|{self.sequence}")

    def body(self, occurred: datetime) -> dict[str, Any]:
        """The form that Prefect's events API takes. `occurred` is the wall time of the first writing."""
        resource = {
            "prefect.resource.id": f"{RESOURCE_PREFIX}{self.model}",
            "prefect.resource.name": self.model,
            "retrain-daemon.model": self.model,
        }
        for label in ("version", "episode", "request"):
            if value := getattr(self, label):
                resource[f"retrain-daemon.{label}"] = value
        return {
            "id": str(self.id),
            "occurred": occurred.isoformat(),
            "event": str(self.kind),
            "resource": resource,
            "related": [
                {"prefect.resource.id": other.id, "prefect.resource.role": other.role}
                for other in self.related
            ],
            "payload": {"schema": SCHEMA, **self.payload},
        }


class OffsetRange(msgspec.Struct, frozen=True):
    """Offsets `start <= offset < end` of one partition."""

    topic: str
    partition: int
    start: int
    end: int


class RetrainRequest(msgspec.Struct, frozen=True, kw_only=True):
    """
    The payload of `.retrain.requested`, and the `request` parameter of the run that it leads to.

    `offsets` are those of the window that asked; `suspected_since` is the start of the first window
    of the drifted stretch, `window_end` the end of the last. Times are RFC 3339 in UTC.

    A `probation` retrains nothing and belongs to no episode: it asks whether the champion is worse, on the
    rows since `suspected_since`, than the one that the request `promotion` put it in the place of, or,
    without one, than any of the last ones before it.
    """

    request: str
    episode: str
    episode_number: int
    attempt: int
    model: str
    model_version: str
    reason: str
    signal: str = "data drift"
    basis: Literal["window", "labels"] = "window"
    suspected_since: datetime
    window_start: datetime
    window_end: datetime
    offsets: tuple[OffsetRange, ...]
    drift_share: float
    drifted_columns: tuple[str, ...]
    report_url: str = ""
    kind: Literal["retrain", "probation"] = "retrain"
    promotion: str = ""
    schema: int = SCHEMA


def requested(asked: RetrainRequest, related: tuple[Related, ...] = ()) -> Event:
    """The event that asks for it."""
    return Event(
        kind=Kind.RETRAIN_REQUESTED,
        model=asked.model,
        subject=asked.request,
        version=asked.model_version,
        episode=asked.episode,
        request=asked.request,
        payload=msgspec.to_builtins(asked),
        related=related,
    )


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """
    How a retraining run ended, as its claim keeps it and the daemon reads it.

    `sentence` is the gate's; `model_version` is what the promoted model calls itself in the
    prediction log; `registry_version` is the registry's number for it. A probation ends `kept` or
    `rolled-back`; its challenger is the old champion.
    """

    action: Literal["promoted", "refused", "failed", "duplicate", "kept", "rolled-back"]
    sentence: str
    run: str = ""
    registry_version: str = ""
    model_version: str = ""
    champion_before: str = ""
    metric: str = ""
    challenger_score: float | None = None
    champion_score: float | None = None
    baseline: Baseline | None = None
    surety: float | None = None
    schema: int = SCHEMA
