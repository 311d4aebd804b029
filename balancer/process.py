"""The life of one balancer process: what it says at its start, its signals, and how it leaves."""

import asyncio
import contextlib
import gc
import os
import signal
import stat
import sys

from balancer.app import Balancer
from balancer.config import Config, Reread
from balancer.fleet.discovery import Resolve, resolve
from balancer.inherited import ending, tell
from balancer.relay import listen


async def run(config: Config, look_up: Resolve = resolve, reread: Reread | None = None) -> None:
    """Serves until SIGTERM, SIGINT or SIGHUP, then drains; a second signal ends at once.

    Where our starter handed its sockets to us, it is a supervisor: SIGTERM once more changes nothing, because a service
    manager sends it to every process of a group, we get it from the supervisor too, and that can kill us when it is in
    a hurry. And SIGUSR1 says that another process takes over: both ports are released before we drain.

    `look_up` resolves replicas' names; `reread` is asked for the configuration anew when the service file changed.
    """
    listen.raise_file_limit()
    wait_for_no_reader()
    loop = asyncio.get_running_loop()
    leaving, hurry = asyncio.Event(), asyncio.Event()

    is_supervised = config.listen_fd is not None
    balancer = Balancer(config, loop, look_up=look_up, reread=reread)

    def signalled(number: signal.Signals) -> None:
        is_repeated = leaving.is_set() and not (is_supervised and number == signal.SIGTERM)
        (hurry if is_repeated else leaving).set()

    def taken_over() -> None:
        balancer.release_ports()
        leaving.set()

    for number in ending():
        loop.add_signal_handler(number, signalled, number)
    if is_supervised:
        loop.add_signal_handler(signal.SIGUSR1, taken_over)
    await balancer.start(leaving)
    # What is here now stays; and requests leave no cycles, so the collector may look seldom: it took a twentieth of
    # the time per request.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    tell(sys.stderr, f"listening on {balancer.endpoint}\nadmin on {balancer.admin_endpoint}")
    await leaving.wait()
    await balancer.leave(hurry)
    await balancer.stop()


def wait_for_no_reader() -> None:
    """Makes writing to a terminal or a pipe that nobody reads (Ctrl-S, a connection that hangs) fail instead of wait.

    Each is opened anew, since how the inherited one waits is the shell's business too.
    """
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # closed, or another user's: it stays as it is
            if os.isatty(descriptor) or stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                fresh = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
                os.dup2(fresh, descriptor)
                os.close(fresh)
