"""`groundserve keys` and `groundserve usage`."""

import csv
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from balancer.contract.account import KEY_NAME, KeyTerms, new_secret
from balancer.contract.moment import moment
from balancer.errors import ConfigError
from balancer.operate.columns import aligned
from balancer.operate.commands.admin_port import AdminPort

_COUNT = re.compile(r"(\d{1,15})([kMG]?)")
_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_LIMITS = ("max_in_flight", "requests_per_minute", "requests_per_day", "tokens_per_minute", "tokens_per_day")
_NONE = "none"  # takes a limit away
_NO_LIMITS = KeyTerms()


@dataclass(frozen=True, slots=True)
class Wish:
    """The limits of a key, as typed: 200k, 5M, none; models as globs with commas between them. None was not typed."""

    max_in_flight: str | None = None
    requests_per_minute: str | None = None
    requests_per_day: str | None = None
    tokens_per_minute: str | None = None
    tokens_per_day: str | None = None
    priority: str | None = None
    models: str | None = None
    expires: str | None = None

    def terms(self, before: KeyTerms = _NO_LIMITS) -> KeyTerms:
        """`before`, less what is typed anew. Raises ConfigError."""
        typed: dict[str, Any] = {}
        for name in _LIMITS:
            if (text := getattr(self, name)) is not None:
                typed[name] = _count(text, "--" + name.replace("_", "-"))
        if self.priority is not None:
            typed["priority"] = self.priority
        if self.models is not None:
            typed["models"] = tuple(name.strip() for name in self.models.split(",") if name.strip())
        if self.expires is not None:
            typed["expires"] = None if self.expires == _NONE else self.expires
        return replace(before, **typed)


def _count(text: str, flag: str) -> int | None:
    if text == _NONE:
        return None
    found = _COUNT.fullmatch(text)
    if found is None or not int(found[1]):
        raise ConfigError(f"{flag} {text}: write a number above 0, like 600, 200k or 5M, or none")
    return int(found[1]) * _FACTORS[found[2]]


def add(ports: Sequence[AdminPort], name: str, wish: Wish) -> int:
    """Prints the secret, alone on standard output, so that it can go into a file or a variable.

    Each balancer gets its digest only; an older one, which knows no digests, draws a secret of its own.
    """
    path, terms = f"/keys/{_checked(name)}", wish.terms().to_json()
    secret = new_secret()
    digest = sha256(secret.encode()).hexdigest()
    if taken := [port.url for port in ports if name in _in_use(port)]:
        raise ConfigError(f"there is a key {name} already at {taken[0]}: change it, rotate it, or choose another name")
    for port in ports:
        secret = port.ask("POST", path, json=terms, params={"digest": digest})["key"] or secret
    return _show_secret(secret, f"the key of {name}, which is shown this once")


def change(ports: Sequence[AdminPort], name: str, wish: Wish) -> int:
    """Gives a key the limits that are typed; its others stay, and so does its secret."""
    path = f"/keys/{_checked(name)}"
    if wish == Wish():
        raise ConfigError("say what to change, as in --tokens-per-minute 400k; `none` takes a limit away")
    known = {port: _in_use(port) for port in ports}
    for port in [port for port in ports if name in known[port]] or ports:
        before = known[port].get(name, {})
        terms = KeyTerms(**(before | {"models": tuple(before.get("models", ()))}))
        port.ask("PUT", path, json=wish.terms(terms).to_json())
    print(f"{name} has these limits from now on; groundserve keys list shows them")
    return 0


def rotate(ports: Sequence[AdminPort], name: str) -> int:
    """Gives it to a balancer as well that does not know it, as another does."""
    path, secret = f"/keys/{_checked(name)}", new_secret()
    digest = {"digest": sha256(secret.encode()).hexdigest()}
    known = {port.url: _in_use(port) for port in ports}
    terms = next((rows[name] for rows in known.values() if name in rows), None)
    for port in ports:
        if name in known[port.url] or terms is None:
            secret = port.ask("POST", f"{path}/rotate", params=digest)["key"] or secret
        else:
            secret = port.ask("POST", path, json=terms, params=digest)["key"] or secret
    return _show_secret(secret, f"the new key of {name}, which is shown this once; the old one is refused now")


def revoke(ports: Sequence[AdminPort], name: str) -> int:
    path = f"/keys/{_checked(name)}"
    there = [port for port in ports if name in _in_use(port)]
    for port in there or ports:
        port.ask("DELETE", path)
    print(f"{name} is revoked")
    return 0


def _in_use(port: AdminPort) -> dict[str, dict[str, Any]]:
    """The terms of the keys that are not revoked there, by name."""
    rows = port.ask("GET", "/keys")
    names = KeyTerms.__dataclass_fields__
    return {row["name"]: {name: row[name] for name in names if name in row} for row in rows if row["revoked"] is None}


def _checked(name: str) -> str:
    if not re.fullmatch(KEY_NAME, name) or not name.strip("."):
        raise ConfigError(f"{name[:80]!r} is no name for a key: up to 64 letters, digits, dots, hyphens, underscores")
    return name


def show_keys(ports: Sequence[AdminPort], as_json: bool) -> int:
    """Those of all balancers; says of a key that one of them does not have."""
    known = {port.url: {row["name"]: row for row in port.ask("GET", "/keys")} for port in ports}
    everywhere: dict[str, dict[str, Any]] = {}
    for there in known.values():
        for name, row in there.items():
            if name not in everywhere or everywhere[name]["revoked"]:
                everywhere[name] = row
    rows = [everywhere[name] for name in sorted(everywhere)]
    for url, there in known.items():
        for row in rows:
            if row["revoked"] is None and (row["name"] not in there or there[row["name"]]["revoked"]):
                print(f"{url} does not have {row['name']}: groundserve keys rotate {row['name']}", file=sys.stderr)
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    head = (
        "NAME",
        "STATUS",
        "IN_FLIGHT",
        "REQUESTS/MIN",
        "REQUESTS/DAY",
        "TOKENS/MIN",
        "TOKENS/DAY",
        "PRIORITY",
        "MODELS",
        "EXPIRES",
    )
    now = datetime.now(UTC).timestamp()
    cells = [(row["name"], _status(row, now), *_limits(row)) for row in rows] or [("(none)",) + ("",) * 9]
    print(*aligned(head, cells), sep="\n")
    return 0


def _status(row: dict[str, Any], now: float) -> str:
    if row["revoked"]:
        return "revoked"
    return "expired" if row["expires"] is not None and moment(row["expires"]) <= now else "in use"


def _limits(row: dict[str, Any]) -> tuple[str, ...]:
    limits = ["-" if row[name] is None else str(row[name]) for name in _LIMITS]
    return (*limits, row["priority"], ",".join(row["models"]) or "-", row["expires"] or "-")


def usage(ports: Sequence[AdminPort], by: str, since: str, form: str) -> int:
    """What all balancers have counted, summed. `form`: table, json or csv."""
    told = [port.ask("GET", "/usage", params={"by": by, "since": since})["data"] for port in ports]
    rows = told[0] if len(told) == 1 else _summed([row for rows in told for row in rows], by.split(","))
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


def _summed(rows: Sequence[dict[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of several balancers as those of one, in the order of what they are grouped by."""
    sums: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        group = tuple(row[name] for name in by if name in row)
        sum_ = sums.setdefault(group, dict.fromkeys(row, 0) | {name: row[name] for name in by if name in row})
        for name in row.keys() - set(by):
            sum_[name] += row[name]
    return [sums[group] for group in sorted(sums)]


def _show_secret(secret: str, what: str) -> int:
    print(what, file=sys.stderr)
    print(secret)
    return 0
