"""What a replica says in its log before it becomes SGLang: that it fetches its model, that it waits, what it leased."""

import re
from pathlib import Path

from balancer.contract.words import State

# How the lines of `python -m replica` begin, and its lines about a download and about GPUs that others have.
OURS, FETCHING, WAITING = "replica: ", "replica: fetching ", "replica: waits for "
_LEASED = re.compile(r"replica: (GPU \d+ \(.*?\)): ")
_GPU = re.compile(r"GPU \d+ \(([^()]*), [\w-]+\)")
_MOST = 1 << 20  # bytes read at a look
_END = 64 << 10  # bytes at the end of a log, among which its last line is


class FirstWords:
    """Reads the log of one replica process, from its start until SGLang prints its first line.

    `leased`: its GPUs, as in `GPU 0 (L4, GPU-...)`; `resources`: `1x L4`. Both are empty as long as it has none.
    """

    def __init__(self, log: Path) -> None:
        self.leased = self.resources = ""
        self._log = log
        self._at = self._size()  # bytes of log that have been read, or are of earlier processes
        self._last = ""
        self._is_over = False

    @classmethod
    def of_running(cls, log: Path) -> "FirstWords":
        """Of a process that an earlier controller started, and that writes into this log: it may still fetch, or wait.

        What it leased stands somewhere in its log, before which there may be the words of earlier processes.
        """
        words = cls(log)
        size = words._at
        for start in (0, size - _END) if size > _MOST else (0,):
            for line in words._read(start):
                words._note(line)
        return words

    def state(self) -> tuple[State, str]:
        """Its state and what it says about it; RUNNING, with nothing said, once it has all that it needs."""
        if not self._is_over and self._size() > self._at:
            for line in self._read(self._at):
                if self._note(line):
                    break
        for start, state in ((FETCHING, State.FETCHING), (WAITING, State.PROVISIONING)):
            if self._last.startswith(start) and not self._is_over:
                return state, self._last.removeprefix(OURS)
        return State.RUNNING, ""

    def _note(self, line: str) -> bool:
        """Was it the last of its first words?"""
        is_ours = line.startswith(OURS)
        if is_ours and self._last and not self._last.startswith(OURS):
            self.leased = self.resources = ""  # another process begins
        if found := _LEASED.match(line):
            self.leased = found[1]
            kinds = _GPU.findall(found[1])
            self.resources = f"{len(kinds)}x {kinds[0]}" if kinds else ""
        self._last = line
        self._is_over = not is_ours or bool(self.leased)
        return self._is_over

    def _read(self, start: int) -> list[str]:
        """The whole lines from there on that are not blank."""
        try:
            with self._log.open("rb") as file:
                file.seek(start)
                text = file.read(_MOST)
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._at = start + len(whole)
        return [line for line in whole.decode(errors="replace").splitlines() if line.strip()]

    def _size(self) -> int:
        try:
            return self._log.stat().st_size
        except OSError:
            return 0
