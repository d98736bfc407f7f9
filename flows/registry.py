"""The registry: which versions of a model exist, which one is the champion, and how it came to be."""

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec
import structlog

from flows.audit import AuditRecord, Move, already_done, previous_champion, require_expected
from flows.errors import FlowError
from flows.schema import Schema
from flows.scoring import Answers
from monitors.settings import FlowSettings

if TYPE_CHECKING:
    import pandas as pd

log = structlog.get_logger()

TAG = "retrain_daemon."
CHAMPION = "champion"


class RegistryUnavailable(FlowError):
    """The registry gave no usable answer; the same call may work later."""


class ModelUnloadable(FlowError):
    """A version is there and cannot be trusted or read; whoever needs it has to do without."""


class UntrustedTypes(ModelUnloadable):
    """A model holds classes that nobody has allowed to be loaded."""


@dataclass(frozen=True, eq=False)
class NewModel:
    """
    A fitted estimator on its way into the registry; `tags` go without our prefix.

    `naming` says what a version calls itself in the prediction log, given its number; a stated
    `model_version` wins.
    """

    estimator: Any
    schema: Schema
    request: str
    run: str
    tags: Mapping[str, str]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    model_version: str = ""
    naming: Callable[[str], str] = str


class ModelVersion(msgspec.Struct, frozen=True):
    """One version: the registry's number, what it calls itself in the prediction log, and its tags."""

    version: str
    model_version: str
    tags: dict[str, str]

    @property
    def trained_until(self) -> float:
        """The event time, in seconds, of the last row it was trained on."""
        return float(self.tags["trained_until"])

    @property
    def trained_from(self) -> float:
        """The event time, in seconds, of the first row it was trained on."""
        return float(self.tags["trained_from"])


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A version in memory; `predict` takes features as they're logged, in any order."""

    version: str
    model_version: str
    estimator: Any
    schema: Schema

    def predict(self, features: "pd.DataFrame") -> Any:
        """One prediction per row."""
        return self.answers(features).predictions

    def answers(self, features: "pd.DataFrame", source: str = "") -> Answers:
        """Predictions, with probabilities where the model states any."""
        from flows.training import answers

        return answers(source or f"version {self.version}", self.schema, self.estimator, features)


class Registry(Protocol):
    """
    One model's versions. Each form keeps these promises, through crashes too.

    `register` is idempotent by the request. `move` compares and sets the champion under a lock, asks
    `fence` right before, and leaves an audit record; a request's own promotion is made only once.
    """

    def register(self, new: NewModel) -> ModelVersion: ...
    def find(self, version: str) -> ModelVersion | None: ...
    def find_request(self, request: str) -> ModelVersion | None: ...
    def load(self, version: str) -> LoadedModel: ...
    def describe(self, version: str, tags: Mapping[str, str], card: str = "") -> None: ...
    def champion_version(self) -> str: ...
    def audit(self) -> tuple[AuditRecord, ...]: ...
    def move(self, move: Move, fence: Callable[[], None]) -> AuditRecord: ...


def open_registry(settings: FlowSettings) -> Registry:
    """The MLflow form, where the settings say."""
    from flows.mlflow_registry import MlflowRegistry

    trusted = settings.settings.training.trusted_types
    return MlflowRegistry(settings.registry, settings.model, trusted)


class MemoryRegistry:
    """The registry of one process: for replays and tests; its versions are numbered after those before."""

    def __init__(self, numbers_before: int = 0) -> None:
        self._numbers_before = numbers_before
        self._lock = threading.Lock()
        self._versions: list[tuple[ModelVersion, NewModel]] = []
        self._audit: tuple[AuditRecord, ...] = ()
        self._champion = ""
        self.cards: dict[str, str] = {}

    def register(self, new: NewModel) -> ModelVersion:
        """Add a version, or return the one that this request has already made."""
        with self._lock:
            if known := self.find_request(new.request):
                return known
            number = str(self._numbers_before + len(self._versions) + 1)
            tags = {**new.tags, "request": new.request, "run": new.run}
            made = ModelVersion(number, new.model_version or new.naming(number), tags)
            self._versions.append((made, new))
            return made

    def find(self, version: str) -> ModelVersion | None:
        """The version, if it exists."""
        return next((made for made, _ in self._versions if made.version == version), None)

    def find_request(self, request: str) -> ModelVersion | None:
        """The version that a request has made, if it has."""
        return next((made for made, new in self._versions if new.request == request), None)

    def load(self, version: str) -> LoadedModel:
        """The model, ready to answer."""
        for made, new in self._versions:
            if made.version == version:
                return LoadedModel(version, made.model_version, new.estimator, new.schema)
        raise ModelUnloadable(f"version {version} does not exist")

    def describe(self, version: str, tags: Mapping[str, str], card: str = "") -> None:
        """Add tags, and set the card."""
        with self._lock:
            for made, _ in self._versions:
                if made.version == version:
                    made.tags.update(tags)
            self.cards[version] = card or self.cards.get(version, "")

    def champion_version(self) -> str:
        """The champion's number, empty if there is none."""
        return self._champion

    def audit(self) -> tuple[AuditRecord, ...]:
        """Every move that took place, the first one first."""
        return self._audit

    def move(self, move: Move, fence: Callable[[], None]) -> AuditRecord:
        """Compare and set the champion."""
        with self._lock:
            if done := already_done(self._audit, move):
                return done
            require_expected(move, self._champion)
            fence()
            record = audit_record(self, len(self._audit) + 1, move)
            self._champion = move.version
            self._audit = (*self._audit, record)
            return record


def audit_record(registry: Registry, sequence: int, move: Move) -> AuditRecord:
    """What the audit will say of a move; both versions must exist."""
    made = registry.find(move.version)
    if made is None:
        raise ModelUnloadable(f"version {move.version} does not exist (any more), it can't be champion")
    before = registry.find(move.expected) if move.expected else None
    return AuditRecord(
        sequence=sequence,
        move=move,
        model_version=made.model_version,
        previous_model_version=before.model_version if before else "",
    )


# What serving, the command line and the demo ask for


def champion_version(settings: FlowSettings) -> str:
    """The champion's number, empty if there is none: milliseconds, for whoever polls."""
    return open_registry(settings).champion_version()


def load_champion(settings: FlowSettings) -> LoadedModel | None:
    """The champion, verified and ready to answer; None if there is none."""
    registry = open_registry(settings)
    version = registry.champion_version()
    return registry.load(version) if version else None


def bootstrap_champion(
    settings: FlowSettings,
    frame: "pd.DataFrame",
    labels: "pd.Series",
    model_version: str | None = None,
) -> str:
    """
    Train, register and promote the very first champion, with its reference; its number is returned.

    All rows are trained on, in their order. Doing it again with the same rows changes nothing.
    """
    from flows.promotion import bootstrap

    version: str = bootstrap(settings, open_registry(settings), frame, labels, model_version or "")
    return version


def champion_moves(settings: FlowSettings) -> dict[str, Any]:
    """The champion, and every move of its alias that was recorded, as plain values; it only reads."""
    registry = open_registry(settings)
    uri = settings.registry.tracking_uri
    moves = [
        {
            "request": record.move.request,
            "action": record.move.action,
            "version": record.move.version,
            "expected": record.move.expected,
            "at": record.move.at.isoformat(),
            "run": record.move.run,
            "reason": record.move.reason,
        }
        for record in registry.audit()
    ]
    url = f"{uri.rstrip('/')}/#/models/{settings.model}" if uri.startswith(("http://", "https://")) else ""
    return {"champion": registry.champion_version(), "moves": moves, "url": re.sub("//[^/@]*@", "//", url)}


class Rollback(msgspec.Struct, frozen=True, kw_only=True):
    """How a rollback ended; named like an `Outcome`, whose kinds it is none of."""

    sentence: str
    registry_version: str
    model_version: str
    champion_before: str
    action: Literal["rolled-back"] = "rolled-back"


def rollback(settings: FlowSettings, reason: str) -> Rollback:
    """
    Make the champion before this one the champion again, and tell Prefect if there is one.

    Which one it was is read from the audit record of the present champion's promotion.
    """
    from flows.announcements import announce_rollback

    registry = open_registry(settings)
    champion = registry.champion_version()
    target = previous_champion(registry.audit(), champion)
    # A champion that can't be loaded would leave serving with nothing.
    registry.load(target)
    move = Move(action="rolled-back", version=target, expected=champion, reason=reason, at=datetime.now(UTC))
    record = registry.move(move, lambda: None)
    log.info("champion_rolled_back", model=settings.model, version=target, champion_before=champion)
    announce_rollback(settings, record)
    return Rollback(
        sentence=f"version {target} is the champion again, in place of {champion}: {reason}",
        registry_version=target,
        model_version=record.model_version,
        champion_before=champion,
    )
