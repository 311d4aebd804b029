"""One child process with a log, run under leash.py so that it never outlives us."""

import asyncio
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from balancer.operate.engines.engine import CannotStart
from balancer.operate.recipe.recipe import Invocation

_LEASH = str(Path(__file__).with_name("leash.py"))


class Child:
    """One process. `code` is None while it runs, then its exit code, or 128 + the signal that ended it."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, on_end: Callable[[], None]) -> None:
        self.log = log
        self._process = process
        self._watch = asyncio.create_task(self._wait(on_end))

    @classmethod
    async def start(
        cls, invocation: Invocation, log: Path, on_end: Callable[[], None], pass_fds: Sequence[int] = ()
    ) -> "Child":
        """Starts it with its output appended to `log`, whose size the leash bounds.

        `log` is an absolute path. `on_end` is called when the process has ended. The process inherits the descriptors
        `pass_fds` under the same numbers. Raises CannotStart.
        """
        leash = (sys.executable, "-I", "-S", _LEASH, str(os.getpid()), f"--log={log}")
        try:
            with _opened(log) as output:  # for messages of the leash itself
                process = await asyncio.create_subprocess_exec(
                    *leash,
                    *invocation.argv,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=asyncio.subprocess.STDOUT,
                    cwd=invocation.workdir,
                    env={**os.environ, **invocation.envs},
                    # Only we react to Ctrl-C at our terminal, and then stop everything in order.
                    start_new_session=True,
                    pass_fds=pass_fds,
                )
        except OSError as failure:
            raise CannotStart(f"{failure.filename or log}: {failure.strerror}") from None
        return cls(process, log, on_end)

    @property
    def pid(self) -> int:
        """Of the leash, below which all that it started is."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        code = self._process.returncode
        return code if code is None or code >= 0 else 128 - code

    async def stop(self, grace: float | None, number: signal.Signals = signal.SIGTERM) -> None:
        """Signals it, kills it after `grace` seconds if given, and returns when it and all that it started are gone."""
        self.signal(number)
        try:
            await asyncio.wait_for(asyncio.shield(self._watch), grace)
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        self.signal(signal.SIGHUP)
        await self.ended()

    async def ended(self) -> None:
        """Returns when it is gone."""
        await asyncio.shield(self._watch)

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def _wait(self, on_end: Callable[[], None]) -> None:
        await self._process.wait()
        on_end()


def _opened(log: Path) -> BinaryIO:
    """Opened for appending; a disk that has no room for a new file keeps nothing from running."""
    try:
        return log.open("ab")
    except OSError as failure:
        if failure.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        return Path(os.devnull).open("ab")


def tail(log: Path, lines: int) -> list[str]:
    """The last lines of a log that are not blank; empty if there is no log yet."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 64 * 1024))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]
