"""The life of one balancer process: what it prints at its start, its signals, and how it stops."""

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

    If the parent handed its sockets to us, it is a supervisor. A second SIGTERM is then ignored: a service manager
    sends SIGTERM to every process of a group, and the supervisor sends it to us as well; it can kill us if it is in a
    hurry. SIGUSR1 says that another process takes over: both ports are released before we drain.

    `look_up` resolves replicas' names; `reread` returns the configuration again after the service file has changed.
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
    # All objects that exist now stay, and requests leave no reference cycles, so the garbage collector may run rarely:
    # it took a twentieth of the time per request.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    tell(sys.stderr, f"listening on {balancer.endpoint}\nadmin on {balancer.admin_endpoint}")
    await leaving.wait()
    await balancer.leave(hurry)
    await balancer.stop()


def wait_for_no_reader() -> None:
    """Makes writes to a terminal or pipe that nobody reads (Ctrl-S, a hanging connection) fail instead of block.

    Each is reopened, because setting O_NONBLOCK on the inherited descriptor would affect the shell too.
    """
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # closed, or it belongs to another user: leave it as it is
            if os.isatty(descriptor) or stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                fresh = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
                os.dup2(fresh, descriptor)
                os.close(fresh)
