"""Whether a replica is still fetching its model, which it reports at the end of its log before SGLang starts."""

from pathlib import Path

from balancer.operate.engines.child import tail

# How the lines of `python -m replica` begin, and its lines about a download.
OURS, FETCHING = "replica: ", "replica: fetching "


class Fetching:
    """Watches the log of one replica process, from before its start until SGLang prints its first line."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._before = self._size()  # bytes of log from earlier processes
        self._is_over = False

    def progress(self) -> str:
        """Its last line about the download; empty if it is not fetching."""
        if self._is_over or self._size() == self._before:
            return ""
        last = next(iter(tail(self._log, 1)), OURS)
        self._is_over = not last.startswith(OURS)
        return last.removeprefix(OURS) if last.startswith(FETCHING) else ""

    def _size(self) -> int:
        try:
            return self._log.stat().st_size
        except OSError:
            return 0
