"""`groundserve keys` and `groundserve usage`."""

import csv
import json
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from balancer.contract.account import KEY_NAME, KeyTerms
from balancer.contract.moment import moment
from balancer.errors import ConfigError
from balancer.operate.columns import aligned
from balancer.operate.commands.admin_port import AdminPort

_COUNT = re.compile(r"(\d{1,15})([kMG]?)")
_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_LIMITS = ("max_in_flight", "requests_per_minute", "tokens_per_minute", "tokens_per_day")


@dataclass(frozen=True, slots=True)
class Wish:
    """The limits of a new key, as typed: 200k, 5M; models as globs with commas between them."""

    max_in_flight: str | None = None
    requests_per_minute: str | None = None
    tokens_per_minute: str | None = None
    tokens_per_day: str | None = None
    priority: str = "interactive"
    models: str = ""
    expires: str | None = None

    def terms(self) -> KeyTerms:
        """Raises ConfigError."""
        limits = {name: _count(getattr(self, name), "--" + name.replace("_", "-")) for name in _LIMITS}
        models = tuple(name.strip() for name in self.models.split(",") if name.strip())
        return KeyTerms(**limits, priority=self.priority, models=models, expires=self.expires)  # type: ignore[arg-type]


def _count(text: str | None, flag: str) -> int | None:
    if text is None:
        return None
    found = _COUNT.fullmatch(text)
    if found is None or not int(found[1]):
        raise ConfigError(f"{flag} {text}: write a number above 0, like 600, 200k or 5M")
    return int(found[1]) * _FACTORS[found[2]]


def add(port: AdminPort, name: str, wish: Wish) -> int:
    """Prints the secret, alone on standard output, so that it can go into a file or a variable."""
    said = port.ask("POST", f"/keys/{_checked(name)}", json=wish.terms().to_json())
    return _show_secret(said["key"], f"the key of {name}, which is shown this once")


def rotate(port: AdminPort, name: str) -> int:
    said = port.ask("POST", f"/keys/{_checked(name)}/rotate")
    return _show_secret(said["key"], f"the new key of {name}, which is shown this once; the old one is refused now")


def revoke(port: AdminPort, name: str) -> int:
    port.ask("DELETE", f"/keys/{_checked(name)}")
    print(f"{name} is revoked")
    return 0


def _checked(name: str) -> str:
    if not re.fullmatch(KEY_NAME, name) or not name.strip("."):
        raise ConfigError(f"{name[:80]!r} is no name for a key: up to 64 letters, digits, dots, hyphens, underscores")
    return name


def show_keys(port: AdminPort, as_json: bool) -> int:
    rows = port.ask("GET", "/keys")
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    head = ("NAME", "STATUS", "IN_FLIGHT", "REQUESTS/MIN", "TOKENS/MIN", "TOKENS/DAY", "PRIORITY", "MODELS", "EXPIRES")
    now = datetime.now(UTC).timestamp()
    cells = [(row["name"], _status(row, now), *_limits(row)) for row in rows] or [("(none)",) + ("",) * 8]
    print(*aligned(head, cells), sep="\n")
    return 0


def _status(row: dict[str, Any], now: float) -> str:
    if row["revoked"]:
        return "revoked"
    return "expired" if row["expires"] is not None and moment(row["expires"]) <= now else "in use"


def _limits(row: dict[str, Any]) -> tuple[str, ...]:
    limits = ["-" if row[name] is None else str(row[name]) for name in _LIMITS]
    return (*limits, row["priority"], ",".join(row["models"]) or "-", row["expires"] or "-")


def usage(port: AdminPort, by: str, since: str, form: str) -> int:
    """`form`: table, json or csv."""
    rows = port.ask("GET", "/usage", params={"by": by, "since": since})["data"]
    if form == "json":
        print(json.dumps(rows, indent=2))
        return 0
    head = list(rows[0]) if rows else [*by.split(","), "requests", "prompt_tokens", "completion_tokens"]
    if form == "csv":
        out = csv.writer(sys.stdout, lineterminator="\n")
        out.writerow(head)
        out.writerows([[row[name] for name in head] for row in rows])
    else:
        cells = [[str(row[name]) or "-" for name in head] for row in rows]
        print(*aligned([name.upper() for name in head], cells), sep="\n")
    return 0


def _show_secret(secret: str, what: str) -> int:
    print(what, file=sys.stderr)
    print(secret)
    return 0
