"""What a replica says of itself: who it is, how much it may hold, how large its KV pool is."""

from dataclasses import dataclass
from typing import Any

import orjson

from balancer.fleet.member import UNKNOWN_LIMIT
from balancer.fleet.probe_connection import Line, Unheard

LEAST_LIMIT = 16
TOKENS_PER_REQUEST = 256


@dataclass(frozen=True, slots=True)
class Facts:
    """`identity` changes with each start; `limit` is in requests, `capacity_tokens` in tokens, both of all its `ranks`
    (data-parallel ones) together; None: not said.

    `is_whole` is False where the replica did not come to say who it is: SGLang's scheduler has to, between two steps.
    """

    identity: str | None = None
    limit: int | None = None
    capacity_tokens: int | None = None
    is_whole: bool = True
    ranks: int = 1


async def read_waiting(line: Line, timeout: float) -> int | None:
    """How many requests wait in the replica's own queue; None where it does not say so within `timeout` seconds."""
    ranks = _ranks(await _read(line, "/v1/loads?include=core", timeout) or {})
    values = [rank.get("num_waiting_reqs") for rank in ranks]
    numbers = [value for value in values if type(value) is int and value >= 0]
    return sum(numbers) if numbers and len(numbers) == len(values) else None


async def read_facts(line: Line, timeout: float) -> Facts:
    """Asks SGLang's /v1/loads and /server_info, `timeout` seconds each; a replica that has neither is no error."""
    loads = await _read(line, "/v1/loads?include=core", timeout)
    info = await _read(line, "/server_info", timeout)
    is_whole = loads is not None and info is not None
    loads, info = loads or {}, info or {}
    ranks = _ranks(loads)
    count = len(ranks) or _sum([info], "dp_size") or 1
    of_one = _sum([info], "max_total_num_tokens")  # /server_info tells one rank's
    capacity = _sum(ranks, "max_total_num_tokens") or (of_one and of_one * count)
    running = _sum(ranks, "max_running_requests") or _sum([info], "max_running_requests")
    return Facts(_identity(info), limit_of(running, capacity), capacity, is_whole, count)


def _ranks(loads: dict[str, Any]) -> list[dict[str, Any]]:
    """An entry for each data-parallel rank."""
    entries = loads.get("loads")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _identity(info: dict[str, Any]) -> str | None:
    """SGLang draws a seed at each start; where one is given to it, the time that its start took tells starts apart."""
    seed, took = info.get("random_seed"), info.get("startup_time")
    if seed is None:
        return None
    return f"{seed} {took.get('scheduler_e2e')}" if isinstance(took, dict) else str(seed)


def limit_of(max_running_requests: int | None, capacity_tokens: int | None) -> int | None:
    """How many generating requests a member may hold: what it runs at once, less where its KV pool is small."""
    if capacity_tokens is None:
        return max_running_requests
    return min(max_running_requests or UNKNOWN_LIMIT, max(LEAST_LIMIT, capacity_tokens // TOKENS_PER_REQUEST))


async def _read(line: Line, path: str, timeout: float) -> dict[str, Any] | None:
    """The JSON object there, empty where there is none; None: no answer came."""
    try:
        answer = await line.ask(path, timeout)
    except Unheard:
        return None
    try:
        body = orjson.loads(answer.body) if answer.status == 200 else {}
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _sum(entries: list[dict[str, Any]], name: str) -> int | None:
    """None where an entry has no such whole number above zero."""
    values = [entry.get(name) for entry in entries]
    numbers = [value for value in values if type(value) is int and value > 0]
    return sum(numbers) if numbers and len(numbers) == len(values) else None
