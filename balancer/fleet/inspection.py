"""What a replica reports about itself: its identity, how many requests it can run, how large its KV pool is."""

from dataclasses import dataclass
from typing import Any

import orjson

from balancer.fleet.member import UNKNOWN_LIMIT
from balancer.fleet.probe_connection import NoResponse, ProbeConnection
from balancer.fleet.tenancy import Said

BALANCER = "x-balancer"
MIN_LIMIT = 16
TOKENS_PER_REQUEST = 256


@dataclass(frozen=True, slots=True)
class Inspection:
    """`identity` changes with every start; `limit` is in requests, `capacity_tokens` in tokens, both for all `ranks`
    (data-parallel ones) together. None means that the replica does not say.

    `is_whole` is False where no answer came. SGLang's scheduler has to give it, and does so between two steps.
    """

    identity: str | None = None
    limit: int | None = None
    capacity_tokens: int | None = None
    is_whole: bool = True
    ranks: int = 1
    reasoning_parser: str | None = None


async def read_queue_length(connection: ProbeConnection, timeout: float) -> int | None:
    """How many requests wait in the replica's own queue; None if it does not say so within `timeout` seconds."""
    ranks = _ranks(await _read(connection, "/v1/loads?include=core", timeout) or {})
    values = [rank.get("num_waiting_reqs") for rank in ranks]
    numbers = [value for value in values if type(value) is int and value >= 0]
    return sum(numbers) if numbers and len(numbers) == len(values) else None


async def inspect(connection: ProbeConnection, timeout: float) -> Inspection:
    """Asks SGLang's /v1/loads and /server_info, `timeout` seconds each; a replica that has neither is no error."""
    loads = await _read(connection, "/v1/loads?include=core", timeout)
    info = await _read(connection, "/server_info", timeout)
    is_whole = loads is not None and info is not None
    loads, info = loads or {}, info or {}
    ranks = _ranks(loads)
    count = len(ranks) or _sum([info], "dp_size") or 1
    of_one = _sum([info], "max_total_num_tokens")  # /server_info speaks of one rank
    capacity = _sum(ranks, "max_total_num_tokens") or (of_one and of_one * count)
    running = _sum(ranks, "max_running_requests") or _sum([info], "max_running_requests")
    parser = info.get("reasoning_parser")
    parser = parser if isinstance(parser, str) else None
    return Inspection(_identity(info), limit_of(running, capacity), capacity, is_whole, count, parser)


async def read_lease(connection: ProbeConnection, timeout: float, balancer: str) -> Said | None:
    """How the replica stands with its turn; None if it shares no GPU. Raises NoResponse.

    It hears the name of its `balancer`, and leaves its turns to it for 5 s.
    """
    response = await connection.request("/lease", timeout, fields={BALANCER: balancer})
    return lease_of(response.body) if response.status == 200 else None


def lease_of(body: bytes) -> Said | None:
    try:
        said = orjson.loads(body)
    except ValueError:
        return None
    return Said.of(said) if isinstance(said, dict) else None


async def read_models(connection: ProbeConnection, timeout: float) -> tuple[dict[str, Any], ...]:
    """The models that the replica serves, LoRA adapters too, as its own /v1/models lists them."""
    entries = (await _read(connection, "/v1/models", timeout) or {}).get("data")
    listed = entries if isinstance(entries, list) else []
    return tuple(entry for entry in listed if isinstance(entry, dict) and isinstance(entry.get("id"), str))


def _ranks(loads: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each data-parallel rank."""
    entries = loads.get("loads")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _identity(info: dict[str, Any]) -> str | None:
    """SGLang draws a random seed at each start. Where the seed is configured, the time that the start took tells two
    starts apart.
    """
    seed, took = info.get("random_seed"), info.get("startup_time")
    if seed is None:
        return None
    return f"{seed} {took.get('scheduler_e2e')}" if isinstance(took, dict) else str(seed)


def limit_of(max_running_requests: int | None, capacity_tokens: int | None) -> int | None:
    """How many generating requests a member may hold: as many as it runs at once, fewer where its KV pool is small."""
    if capacity_tokens is None:
        return max_running_requests
    return min(max_running_requests or UNKNOWN_LIMIT, max(MIN_LIMIT, capacity_tokens // TOKENS_PER_REQUEST))


async def _read(connection: ProbeConnection, path: str, timeout: float) -> dict[str, Any] | None:
    """The JSON object at this path, empty if there is none; None if no response came."""
    try:
        response = await connection.request(path, timeout)
    except NoResponse:
        return None
    try:
        body = orjson.loads(response.body) if response.status == 200 else {}
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _sum(entries: list[dict[str, Any]], name: str) -> int | None:
    """None unless every entry has this field, as a whole number above zero."""
    values = [entry.get(name) for entry in entries]
    numbers = [value for value in values if type(value) is int and value > 0]
    return sum(numbers) if numbers and len(numbers) == len(values) else None
