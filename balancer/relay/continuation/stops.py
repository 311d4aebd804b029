"""Stop strings that span the seam: begun by the replica that broke, completed by the one that continued."""

from typing import Any


def stop_strings(said: Any) -> tuple[str, ...]:
    """The stop strings of a request's `stop`, which is one string or a list."""
    told = [said] if isinstance(said, str) else said if isinstance(said, list) else []
    return tuple(stop for stop in told if isinstance(stop, str) and stop)


class Seam:
    """Watches the first characters after the seam; `before` is the text that the client already has.

    A replica looks for stop strings in its own output only, so it finds all except those that begin before the seam.
    """

    def __init__(self, stops: tuple[str, ...], before: str, keeps_stop: bool = False) -> None:
        self._stops = stops
        longest = max(map(len, stops), default=0)
        self._before = before[-(longest - 1) :] if longest > 1 else ""
        self._held = ""
        self._keeps_stop = keeps_stop
        self.matched: str | None = None  # the stop string that was found; nothing is passed on after it

    def is_stop(self) -> bool:
        """Was a stop string found?"""
        return self.matched is not None

    def pass_on(self, text: str) -> str:
        """Takes more text; returns what the client may get now, of it and of what was held back."""
        if self.matched is not None:
            return ""
        if not self._before:
            return text
        text = self._before + self._held + text
        seam = len(self._before)
        for stop in self._stops:
            at = text.find(stop, max(0, seam - len(stop) + 1))
            if 0 <= at < seam:
                self.matched, self._held = stop, ""
                return text[seam : at + len(stop)] if self._keeps_stop else ""
        if any(stop.startswith(text[at:]) for at in range(seam) for stop in self._stops):
            self._held = text[seam:]
            return ""
        self._before = self._held = ""
        return text[seam:]

    def rest(self) -> str:
        """Returns what was held back; call it when the text ends."""
        held, self._held, self._before = self._held, "", ""
        return held
