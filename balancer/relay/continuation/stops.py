"""Stop strings that stand across the seam: begun by the replica that broke, ended by the one that went on."""

from typing import Any


def stop_strings(said: Any) -> tuple[str, ...]:
    """Of a request's `stop`, one or a list."""
    told = [said] if isinstance(said, str) else said if isinstance(said, list) else []
    return tuple(stop for stop in told if isinstance(stop, str) and stop)


class Seam:
    """Watches the first characters after the seam; `before` is the text that the client got.

    A replica looks for stop strings in what it has generated itself, so it sees all but those that begin before that.
    """

    def __init__(self, stops: tuple[str, ...], before: str, keeps_stop: bool = False) -> None:
        self._stops = stops
        longest = max(map(len, stops), default=0)
        self._before = before[-(longest - 1) :] if longest > 1 else ""
        self._held = ""
        self._keeps_stop = keeps_stop
        self.matched: str | None = None  # the stop string that was found; nothing follows it

    def is_stop(self) -> bool:
        """Was one found?"""
        return self.matched is not None

    def pass_on(self, text: str) -> str:
        """More of the text; what of it, and of what was held back, the client may get now."""
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
        """What is held back, when nothing more comes."""
        held, self._held, self._before = self._held, "", ""
        return held
