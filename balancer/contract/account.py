"""What a key may do, and what was used with it: the admin port's /keys and /usage, and the commands of that name."""

import secrets
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from balancer.contract.listing import StrictInt
from balancer.contract.moment import moment
from balancer.errors import ConfigError

Count = Annotated[StrictInt, Field(ge=1, le=10**15)]
KEY_NAME = r"[A-Za-z0-9_.-]{1,64}"
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # SHA-256 of a secret
KeyName = Annotated[str, Field(pattern=f"^{KEY_NAME}$")]
Pattern = Annotated[str, Field(min_length=1, max_length=200)]
Priority = Literal["interactive", "bulk"]
BY = ("key", "model", "day", "hour")  # what usage can be summed by


def new_secret() -> str:
    """The secret of a new key, which only its holder keeps."""
    return "sk-" + secrets.token_urlsafe(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTerms:
    """The limits of one key; None is no limit.

    `models` are globs; empty: all models. `expires` is an ISO date or time, UTC unless it says otherwise. Raises
    ConfigError for an `expires` that is none.
    """

    max_in_flight: Count | None = None
    requests_per_minute: Count | None = None
    requests_per_day: Count | None = None
    tokens_per_minute: Count | None = None
    tokens_per_day: Count | None = None
    priority: Priority = "interactive"
    models: Annotated[tuple[Pattern, ...], Field(max_length=100)] = ()
    expires: str | None = None

    def __post_init__(self) -> None:
        self.expires_at()

    def expires_at(self) -> float | None:
        """Seconds since 1970."""
        if self.expires is None:
            return None
        try:
            return moment(self.expires)
        except ValueError:
            raise ConfigError(f"expires: {self.expires[:40]!r} is no date: write it like 2027-01-31") from None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRow:
    """One key as it is listed. Its secret is known to nobody but its holder."""

    name: str
    created: str  # ISO time, UTC
    revoked: str | None  # the same
    terms: KeyTerms

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "created": self.created, "revoked": self.revoked, **self.terms.to_json()}
