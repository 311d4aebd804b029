"""Which processes a process has below it. leash.py imports this without site packages, so no other library is here."""

import contextlib
from pathlib import Path


def descendants(of: int) -> list[int]:
    """All living descendants of this process, and with them the orphans that it adopts."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                # "PID (NAME) STATE PPID ...": NAME may hold anything, even a parenthesis.
                state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(entry.name))
    found = list(children.get(of, ()))
    for process in found:
        found.extend(children.get(process, ()))
    return found
