"""Whether a replica still fetches its model: its own program says so, at the end of its log, before SGLang begins."""

from pathlib import Path

from balancer.operate.engines.child import tail

# How the lines of `python -m replica` begin, and those of a download.
OURS, FETCHING = "replica: ", "replica: fetching "


class Fetching:
    """One life of a replica, from now on. Once SGLang has said a word, nobody looks any more."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._before = self._size()  # what the log holds of earlier lives, in bytes
        self._is_over = False

    def progress(self) -> str:
        """How far it is, in its own words; empty where it does not fetch."""
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
