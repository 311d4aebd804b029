"""Waiting for something to happen: in a test's own event loop, or in another process."""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def until(look: Callable[[], T], what: object = "", within: float = 10.0) -> T:
    """The first true value of `look`, which is called again and again while the event loop runs.

    Raises AssertionError after `within` seconds, with `what` (a callable is called then) and the last value.
    """
    give_up = time.monotonic() + within
    while not (seen := look()):
        assert time.monotonic() < give_up, _late(within, what, seen)
        await asyncio.sleep(0.002)
    return seen


def wait_until(look: Callable[[], T], what: object = "", within: float = 60.0, fits: Callable[[T], object] = bool) -> T:
    """The same for other processes: the first value of `look` that `fits`. Blocks this thread meanwhile."""
    give_up = time.monotonic() + within
    while not fits(seen := look()):
        assert time.monotonic() < give_up, _late(within, what, seen)
        time.sleep(0.05)
    return seen


def _late(within: float, what: object, seen: object) -> str:
    return f"not within {within:g} s: {what() if callable(what) else what} (last seen: {seen!r})"
