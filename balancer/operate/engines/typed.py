"""Commands that an engine types as a person would: run to their end, their output returned, their failure one line."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence

from balancer.operate.engines.engine import CannotStart


async def typed(
    command: Sequence[str], environ: Mapping[str, str], timeout: float, silence: str, given: str = ""
) -> str:
    """What it prints. Raises CannotStart with its last line if it fails, or with `silence` after `timeout` seconds.

    `silence` may have a {} for these seconds. `given` is its standard input.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environ,
            stdin=asyncio.subprocess.PIPE if given else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # Only we react to Ctrl-C at our terminal, and then stop everything in order.
            start_new_session=True,
        )
    except OSError as failure:
        raise CannotStart(f"{command[0]}: {failure.strerror}") from None
    try:
        # Not wait_for: before Python 3.12 it loses a cancellation that comes as the command ends.
        async with asyncio.timeout(timeout):
            out, error = await process.communicate(given.encode() if given else None)
    except (asyncio.CancelledError, TimeoutError) as failure:
        with contextlib.suppress(ProcessLookupError):  # with its plug-in, which is a process of its own
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        if isinstance(failure, TimeoutError):
            raise CannotStart(silence.format(timeout)) from None
        raise
    if process.returncode != 0:
        raise CannotStart(last_line(error.decode(errors="replace"), command[0]))
    return out.decode(errors="replace")


def last_line(text: str, program: str = "docker") -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else f"{program} failed and said nothing"
