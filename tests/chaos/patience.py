"""Patience: how long nothing may go on before a play is given up, and what it was at just then."""

import faulthandler
import signal
from types import FrameType
from typing import Self

# Many times what any single thing takes on a loaded machine: only what hangs comes to it.
PATIENCE_SECONDS = 900
# What is left of a play that was given up has so long to be taken down.
STOP_SECONDS = 120


class Hung(Exception):
    """Nothing went on for too long; the message says what was waited for, the traceback where."""


class Patience:
    """
    An alarm that is set anew with all that is begun.

    It goes off in the main thread wherever that hangs, inside of a library too, so that everything is
    taken down on the way out; should that hang as well, the process says where and ends.
    """

    def __init__(self) -> None:
        self._doing = "beginning"

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGALRM, self._give_up)
        self.begin(self._doing)
        return self

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, self._before)

    def begin(self, doing: str) -> None:
        """From now on this is what is being done, and its time begins."""
        self._doing = doing
        signal.alarm(PATIENCE_SECONDS)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        faulthandler.dump_traceback_later(STOP_SECONDS, exit=True)
        raise Hung(f"{self._doing}: not after {PATIENCE_SECONDS} s")
