"""Shows the progress of a download: on a terminal, or line by line in a log, where the controller reads it."""

import sys
import threading
import time
from collections.abc import Callable

_BETWEEN_LINES = 5.0  # seconds, in a log
_BETWEEN_LOOKS = 0.5  # on a terminal


class Progress:
    """Counts the received bytes of `total`; may be called from several threads. `say` takes lines for a log."""

    def __init__(self, what: str, total: int, here: int, say: Callable[[str], None]) -> None:
        self._what = what
        self._total = total
        self._here = here
        self._began_with = here
        self._began = time.monotonic()
        self._said = 0.0
        self._say = say
        self._lock = threading.Lock()

    def came(self, count: int) -> None:
        with self._lock:
            self._here += count
            now = time.monotonic()
            is_terminal = sys.stdout.isatty()
            if now - self._said < (_BETWEEN_LOOKS if is_terminal else _BETWEEN_LINES):
                return
            self._said = now
            line = self.line(now)
            if is_terminal:
                print(f"\r\033[K{line}", end="", flush=True)
            else:
                self._say(line)

    def line(self, now: float) -> str:
        """How much is done, how fast it is, and how long it will take."""
        done = 100 * self._here // self._total if self._total else 100
        text = f"fetching {self._what}: {gigabytes(self._here)} of {gigabytes(self._total)} ({done} %)"
        seconds = now - self._began
        speed = (self._here - self._began_with) / seconds if seconds > 1 else 0
        if speed > 0:
            text += f", {speed / 1e6:.3g} MB/s, about {_span((self._total - self._here) / speed)} left"
        return text

    def end(self) -> None:
        if sys.stdout.isatty():
            print("\r\033[K", end="", flush=True)


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
