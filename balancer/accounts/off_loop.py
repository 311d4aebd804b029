"""Runs what may block on the disk beside the event loop, in a daemon thread that holds up no exit."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def off_loop(work: Callable[[], T]) -> T:
    """What `work` returns or raises. If the waiting is cancelled, the work still goes on to its end."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(set_it: Callable[[], None]) -> None:
        def unless_over() -> None:
            if not done.done():
                set_it()

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(unless_over)

    def run() -> None:
        try:
            result = work()
        except Exception as failure:
            error = failure
            tell(lambda: done.set_exception(error))
        else:
            tell(lambda: done.set_result(result))

    threading.Thread(target=run, daemon=True, name="accounts").start()
    return await done
