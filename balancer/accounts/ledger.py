"""Adds up usage, notes who keeps which answer, and writes both to the store once a second, off the event loop."""

import asyncio
import logging
import time
from collections.abc import Callable

from balancer.accounts.off_loop import off_loop
from balancer.accounts.store import HOUR, MOST_ANSWERS, Keeper, Store

log = logging.getLogger("groundserve")

EVERY = 1.0  # seconds between two writes, and what a killed process loses at most
AFTER_FAILURE = 5.0
SAID_AGAIN = 60.0
LAST_WORDS = 5.0  # seconds that the last write may take when the process ends


class Ledger:
    """What it cannot write stays in memory and is tried again: a full disk stops no request and loses no count.

    `clock` gives seconds since 1970.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._rows: dict[tuple[int, str, str], list[int]] = {}
        self._answers: dict[str, Keeper] = {}  # by id; since the last write that succeeded
        self._being_written: dict[str, Keeper] = {}
        self._task: asyncio.Task[bool] | None = None
        self._next = 0.0
        self._said = -SAID_AGAIN

    def note(self, key: str, model: str, *figures: int) -> None:
        """One request, with its FIGURES from store.py."""
        row = (int(self._clock()) // HOUR, key, model)
        if (sums := self._rows.get(row)) is None:
            self._rows[row] = list(figures)
        else:
            for index, figure in enumerate(figures):
                sums[index] += figure

    def note_answer(self, id_: str, keeper: Keeper) -> None:
        """Notes who keeps an answer, for the processes that come after this one."""
        if len(self._answers) < MOST_ANSWERS:
            self._answers[id_] = keeper

    def noted(self, id_: str) -> Keeper | None:
        """What `note_answer` was told and is not on the disk yet."""
        return self._answers.get(id_) or self._being_written.get(id_)

    def flush(self, now: float) -> None:
        """Starts a write if one is due and none is under way; `now` is the loop's time. For the sweep."""
        if (self._rows or self._answers) and now >= self._next and (self._task is None or self._task.done()):
            self._next = now + EVERY
            self._task = asyncio.ensure_future(self._write())

    async def written(self) -> None:
        """Waits until what was noted before is written, or a write has failed."""
        if self._task is not None and not self._task.done():
            await asyncio.shield(self._task)
        if self._rows or self._answers:
            self._task = asyncio.ensure_future(self._write())
            await asyncio.shield(self._task)

    async def close(self) -> None:
        """Writes what is left; gives up after a few seconds."""
        try:
            async with asyncio.timeout(LAST_WORDS):
                await self.written()
        except TimeoutError:
            log.warning("%s: the last figures of usage could not be written in time", self._store.path)
        if self._task is not None:
            self._task.cancel()

    async def _write(self) -> bool:
        rows, self._rows = self._rows, {}
        answers, self._answers = self._answers, {}
        self._being_written = answers
        try:
            figures = ((*row, *sums) for row, sums in rows.items())
            await off_loop(lambda: self._store.write(figures, answers))  # type: ignore[arg-type]
        except Exception as failure:  # such as a disk that is full, or no thread to be had
            self._take_back(rows)
            self._answers = answers | self._answers
            now = asyncio.get_running_loop().time()
            self._next = now + AFTER_FAILURE
            if now - self._said >= SAID_AGAIN:
                self._said = now
                log.warning("%s: usage cannot be written (%s); it is kept and tried again", self._store.path, failure)
            return False
        finally:
            self._being_written = {}
        return True

    def _take_back(self, rows: dict[tuple[int, str, str], list[int]]) -> None:
        for row, sums in rows.items():
            later = self._rows.get(row)
            self._rows[row] = sums if later is None else [a + b for a, b in zip(sums, later, strict=True)]
