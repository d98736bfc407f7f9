"""Delivery: the thread that talks to Prefect, so that an absent Prefect never stops the reading."""

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from traceback import format_exception

import structlog

from daemon.errors import StaleOwner
from daemon.ledger import Ledger, LedgerError, now
from daemon.loop import News
from daemon.outbox import Outbox
from daemon.ownership import Ownership, Term
from daemon.watcher import Watcher
from daemon.wire.prefect import PrefectApi, PrefectError, PrefectUnavailable
from monitors.events import Event, Kind
from monitors.settings import PrefectSettings

log = structlog.get_logger()

PRUNE_SECONDS = 3_600.0
# While nothing is in flight, a champion moves by a person's hand alone: so many times rarer is it looked for.
QUIET_POLLS = 5


class Delivery:
    """Posts, watches and sends heartbeats while this member is the active one."""

    def __init__(
        self,
        ledger: Ledger,
        settings: PrefectSettings,
        models: Mapping[str, object],
        owner: Ownership,
        tell: Callable[[News], None],
        retention_seconds: float,
    ) -> None:
        self._retention = timedelta(seconds=retention_seconds)
        self._ledger = ledger
        self._settings = settings
        self._models = models
        self._owner = owner
        self._tell = tell
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
        self._done_at: dict[str, float] = {}
        self._quiet = False
        # Made here, so that a missing address is an error of the start and not of a thread.
        self._api = PrefectApi(settings.api_url)
        self.reachable = False

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Finish the round in progress; what is still in line stays in the ledger."""
        self._stop.set()
        self._ledger.in_line.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def _run(self) -> None:
        with self._api as api:
            outbox = Outbox(self._ledger, api.post_event)
            watcher = Watcher(self._ledger, api, self._settings, self._models, self._tell)
            number = 0
            while not self._stop.is_set():
                if (term := self._owner.term) is None:
                    self._quiet = False
                else:
                    if term.number != number:
                        watcher.forget()
                        number = term.number
                    self._round(api, outbox, watcher, term)
                self._rest(outbox.retry_seconds)

    def _rest(self, retry_seconds: float) -> None:
        """Until there is something to deliver or to look at: asking all the time would cost without end."""
        if retry_seconds:
            self._stop.wait(retry_seconds)
        elif self._ledger.in_line.wait(min(self._poll_seconds, self._settings.heartbeat_seconds)):
            self._ledger.in_line.clear()
            self._quiet = False

    @property
    def _poll_seconds(self) -> float:
        return self._settings.poll_seconds * (QUIET_POLLS if self._quiet else 1)

    def _round(self, api: PrefectApi, outbox: Outbox, watcher: Watcher, term: Term) -> None:
        try:
            self.reachable = self._deliver(api, outbox, watcher, term)
        except (StaleOwner, LedgerError) as error:
            # The loop meets the same at its next checkpoint, and ends the process.
            log.error("delivery_held", error=str(error))
            self._stop.wait(2.0)
        except PrefectUnavailable as error:
            self._rest_from("prefect_unavailable", str(error), 2.0)
        except PrefectError as error:
            self._rest_from("prefect_refused", str(error), 5.0)
        except Exception as error:  # noqa: BLE001 - all it knows is in the ledger, and a dead thread tells nobody
            said = "".join(format_exception(error))
            self._rest_from("delivery_failed", said, 5.0)

    def _deliver(self, api: PrefectApi, outbox: Outbox, watcher: Watcher, term: Term) -> bool:
        """Everything that is due; False if Prefect takes nothing now."""
        models = None if term.indexes is None else term.models(self._ledger.homes(), self._models)
        outbox.deliver(models)
        if outbox.retry_seconds:
            return False
        if self._due("watch", self._settings.poll_seconds):
            self._quiet = not watcher.look(models)
        if self._due("prune", PRUNE_SECONDS):
            forgotten = self._ledger.prune(now() - self._retention)
            log.debug("ledger_pruned", rows=forgotten)
        if self._due("beat", self._settings.heartbeat_seconds):
            self._beat(api, models)
        return True

    def _rest_from(self, what: str, error: str, seconds: float) -> None:
        self.reachable = False
        log.error(what, error=error)
        self._stop.wait(seconds)

    def _due(self, what: str, seconds: float) -> bool:
        if time.monotonic() - self._done_at.get(what, 0.0) < seconds:
            return False
        self._done_at[what] = time.monotonic()
        return True

    def _beat(self, api: PrefectApi, models: frozenset[str] | None) -> None:
        """Heartbeats bypass the outbox: an old one is worth nothing."""
        for model in self._models if models is None else models & self._models.keys():
            event = Event(kind=Kind.HEARTBEAT, model=model, subject=str(uuid.uuid4()), payload={})
            api.post_event(event.body(now()))
