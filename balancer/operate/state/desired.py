"""What a service is meant to be, written down so that it can be resumed after its controller has ended."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

from pydantic import TypeAdapter, ValidationError

# Versions that served before and can be rolled back to.
HISTORY = 10


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a service: its file's text, and what the command line set in it. Of secrets only the names."""

    number: int
    text: str
    source: str
    envs: Mapping[str, str]
    secrets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Desired:
    """A service that is meant to exist.

    `base` is the folder that paths in its files are relative to; `listen` and `admin` are addresses, HOST:PORT;
    `api_keys` and `admin_key` are files. `versions` holds those that served, oldest first, and the one that is coming.
    """

    engine: str
    # May its replicas still run although no controller does?
    is_left: bool
    listen: str
    admin: str
    is_open: bool
    api_keys: str | None
    admin_key: str | None
    join: str | None
    base: str
    serving: int
    # How many replicas there are to be, and how many if the update fails.
    target: int
    before: int
    # The version that is being rolled out, if any.
    coming: int | None
    mode: Literal["rolling", "blue_green"]
    versions: tuple[Version, ...]
    # Does the balancer know of the coming version's replicas, in a blue-green update?
    is_switched: bool = False
    # Admin ports of balancers that somebody else started.
    balancers: tuple[str, ...] = ()

    @classmethod
    def from_text(cls, text: str) -> Self | None:
        """None if the text was not written by `to_text`."""
        try:
            made = _DESIRED.validate_json(text)
        except ValidationError:
            return None
        numbers = {version.number for version in made.versions}
        is_whole = made.serving in numbers and made.coming in {None, *numbers} and min(made.target, made.before) >= 0
        return made if is_whole else None  # type: ignore[return-value]

    def to_text(self) -> str:
        return _DESIRED.dump_json(self, indent=1).decode()

    def version(self, number: int) -> Version | None:
        return next((version for version in self.versions if version.number == number), None)


class Versions:
    """The files of a service's versions: those that have served, and those that may yet."""

    def __init__(self, files: Mapping[int, Version], newest: int) -> None:
        """`newest` is one of them: the file of every version whose own is unknown."""
        self._files = dict(files)
        self._newest = newest
        self._last = max(files)
        self.served = sorted(files.keys() - {newest})

    def next_number(self, newest: int) -> int:
        """A number that no version had, `newest` included."""
        self._last = max(self._last, newest) + 1
        return self._last

    def add(self, version: Version) -> None:
        self._files[version.number] = version

    def file_of(self, number: int) -> Version:
        return self._files.get(number) or replace(self._files[self._newest], number=number)

    def earlier(self, serving: int, number: int | None) -> Version | None:
        """The version with this number, or else the one that served before `serving`; None if there is none."""
        if number is not None:
            return self._files[number] if number in self.served else None
        return next((self._files[one] for one in reversed(self.served) if one < serving), None)

    def replaced(self, number: int) -> None:
        """A later version has the same file."""
        if number in self.served:
            self.served.remove(number)

    def note_serving(self, number: int) -> None:
        """This version serves, so it can be gone back to. Forgets files that can neither be gone back to nor come."""
        if number not in self.served:
            self.served = sorted({*self.served, number})[-HISTORY - 1 :]
        self._files[number] = self.file_of(number)
        self._files = {n: f for n, f in self._files.items() if n in self.served or n > number or n == self._newest}

    def to_keep(self, serving: int, coming: int | None) -> tuple[Version, ...]:
        """The files worth keeping while this version serves and that one is coming."""
        known = sorted({*self.served, serving, *([coming] if coming is not None else [])})
        return tuple(self.file_of(number) for number in known)


_DESIRED = TypeAdapter(Desired)
