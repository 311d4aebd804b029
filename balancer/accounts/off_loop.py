"""Runs work that may block on the disk in a thread, off the event loop. The thread does not delay the exit."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def off_loop(work: Callable[[], T]) -> T:
    """Returns or raises what `work` does. If the caller is cancelled, the work is still finished."""
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
