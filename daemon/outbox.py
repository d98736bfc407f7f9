"""The outbox: posts what the ledger says is to be told, in order, for as long as it takes."""

from collections.abc import Callable, Collection
from typing import Any

import msgspec
import structlog

from daemon.ledger import Ledger
from daemon.wire.prefect import PrefectError, PrefectRefused

log = structlog.get_logger()

# Said of the event itself (0: by ourselves). Any other refusal, of a password or an address, can be mended.
ABOUT_THE_EVENT = frozenset({0, 400, 413, 422})


class Outbox:
    """
    Posts waiting events, oldest first, and stops at the first that Prefect cannot take now.

    A crash between a post and its mark posts the same event again, under the same id: the server
    and the claim tell the two apart from two requests.
    """

    def __init__(self, ledger: Ledger, post: Callable[[dict[str, Any]], None]) -> None:
        self._ledger = ledger
        self._post = post
        self._failures = 0

    @property
    def retry_seconds(self) -> float:
        """How long to leave Prefect alone after failures in a row: 0, 1, 2, 4 ... 30 seconds."""
        return 0.0 if not self._failures else min(30.0, 2.0 ** (self._failures - 1))

    def deliver(self, models: Collection[str] | None = None) -> int:
        """Post what is in line (about these models); returns how many events were acknowledged."""
        posted = 0
        while rows := self._ledger.waiting_events(models=models):
            for row in rows:
                try:
                    self._post(msgspec.json.decode(row.body))
                except PrefectError as error:
                    if isinstance(error, PrefectRefused) and error.status in ABOUT_THE_EVENT:
                        # Nothing that waits behind it may wait for ever; the ledger keeps it with the reason.
                        self._ledger.mark_refused(row, str(error))
                        log.error("event_refused", kind=row.kind, id=row.id, error=str(error))
                        continue
                    self._failures += 1
                    self._ledger.mark_failed(row)
                    log.warning("event_not_posted", kind=row.kind, id=row.id, error=str(error))
                    return posted
                self._failures = 0
                self._ledger.mark_posted(row)
                posted += 1
                log.info("event_posted", kind=row.kind, model=row.model, id=row.id)
        self._failures = 0
        return posted
