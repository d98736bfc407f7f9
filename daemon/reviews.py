"""Reviews: Evidently's own word on judged windows, and its report, without making the reading wait."""

import threading
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Literal
from urllib.parse import quote
from zlib import crc32

import structlog

from daemon.engines import StoredEngines
from daemon.evidently_worker import EvidentlyFailed
from daemon.ledger import Ledger, LedgerError
from daemon.loop import ScoresDisputed
from daemon.wire.references import file_name_of
from monitors.confirmation import Disagreement, confirm
from monitors.drift import WindowRows
from monitors.episodes import Judged
from monitors.policy import Verdict

log = structlog.get_logger()

SAMPLE_EVERY = 20
CAPACITY = 16
# How many windows are looked through, after a start, for reports that a crash kept from being drawn.
MENDED_WINDOWS = 200


ReviewResult = Literal["agreed", "disagreed", "failed", "postponed"]


def report_name(model: str, version: str, key: int) -> str:
    """The file name, without its ending, of a window's report."""
    return f"{file_name_of(model)}-{file_name_of(version)}-{key}"


class EvidentlyReviews:
    """
    Confirms windows in a thread, through Evidently's process; draws reports of those that were told of.

    A column on which Evidently disagrees is told to the loop, which stops trusting its compiled score.
    """

    def __init__(
        self,
        engines: StoredEngines,
        ledger: Ledger,
        folder: Path,
        base_url: str,
        tell: Callable[[ScoresDisputed], None],
        reread: Callable[[Judged], WindowRows],
        count: Callable[[str, ReviewResult], object] = lambda model, result: None,
    ) -> None:
        self._engines = engines
        self._ledger = ledger
        self._folder = folder
        self._base_url = base_url
        self._tell = tell
        self._reread = reread
        self._count = count
        self._queue: Queue[tuple[Judged, WindowRows, bool]] = Queue(CAPACITY)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reviews", daemon=True)
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Stop after the review in progress; what is not drawn is drawn after the next start."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def url_of(self, model: str, version: str, key: int) -> str:
        return f"{self._base_url}/{quote(report_name(model, version, key))}.html"

    def offer(self, judged: Judged, rows: WindowRows, wanted: bool) -> None:
        if judged.decision.verdict not in (Verdict.CALM, Verdict.DRIFTED, Verdict.BROKEN):
            return
        if not wanted and not (_sampled(judged) and self._queue.empty()):
            return
        try:
            self._queue.put_nowait((judged, rows, wanted))
        except Full:
            self._count(judged.model, "postponed")
            log.warning("review_postponed", model=judged.model, end=judged.end.isoformat())

    def _run(self) -> None:
        self._draw_missing()
        while not self._stop.is_set():
            try:
                judged, rows, wanted = self._queue.get(timeout=0.5)
            except Empty:
                continue
            self._review(judged, rows, wanted)

    def _review(self, judged: Judged, rows: WindowRows, wanted: bool) -> None:
        evidently = self._engines.evidently(judged.model, judged.version)
        if evidently is None:
            return
        try:
            disputed = confirm(judged.report, evidently.judge(rows.records))
            if wanted:
                self._draw(judged, rows)
        except EvidentlyFailed as error:
            self._count(judged.model, "failed")
            log.warning("review_failed", model=judged.model, end=judged.end.isoformat(), error=str(error))
            return
        self._count(judged.model, "disagreed" if disputed else "agreed")
        if disputed:
            self._tell(_news(judged, disputed))
        log.info(
            "window_reviewed",
            model=judged.model,
            end=judged.end.isoformat(),
            agreed=not disputed,
            drawn=wanted,
        )

    def _draw(self, judged: Judged, rows: WindowRows) -> None:
        evidently = self._engines.evidently(judged.model, judged.version)
        if evidently is not None:
            name = report_name(judged.model, judged.version, judged.key)
            evidently.draw(rows.records, self._folder, name)

    def _draw_missing(self) -> None:
        """A crash between a decision and its report leaves a link to nothing: read the rows again."""
        try:
            reported = self._ledger.reported(MENDED_WINDOWS)
        except LedgerError as error:
            log.warning("reports_not_mended", error=str(error))
            return
        for judged in reported:
            if self._stop.is_set():
                return
            name = report_name(judged.model, judged.version, judged.key)
            if (self._folder / f"{name}.html").exists():
                continue
            try:
                rows = self._reread(judged)
                if len(rows.records) < judged.sampled:
                    log.warning("report_lost", model=judged.model, rows=len(rows.records), of=judged.sampled)
                    continue
                if self._engines.evidently(judged.model, judged.version) is None:
                    self._engines.find(judged.model, judged.version)
                self._draw(judged, rows)
                log.info("report_mended", model=judged.model, end=judged.end.isoformat())
            except Exception as error:  # noqa: BLE001 - a report is a courtesy, the decisions are elsewhere
                log.warning("report_not_mended", model=judged.model, error=f"{type(error).__name__}: {error}")


def _sampled(judged: Judged) -> bool:
    """One window in `SAMPLE_EVERY`, the same ones after a restart."""
    return crc32(report_name(judged.model, judged.version, judged.key).encode()) % SAMPLE_EVERY == 0


def _news(judged: Judged, disputed: tuple[Disagreement, ...]) -> ScoresDisputed:
    return ScoresDisputed(
        model=judged.model,
        version=judged.version,
        key=judged.key,
        columns=tuple(one.column for one in disputed),
        details=tuple(_detail(one) for one in disputed),
    )


def _detail(one: Disagreement) -> str:
    ours = "none" if one.compiled is None else f"{one.compiled.method} {one.compiled.score!r}"
    theirs = "none" if one.evidently is None else f"{one.evidently.method} {one.evidently.score!r}"
    return f"{one.column}: {one.about}: compiled {ours}, Evidently {theirs}"
