"""What a replica says of itself: who it is, how much it may hold, how large its KV pool is."""

from dataclasses import dataclass
from typing import Any

import httpx

from balancer.fleet.member import Member

LEAST_LIMIT = 16
TOKENS_PER_REQUEST = 256


@dataclass(frozen=True, slots=True)
class Facts:
    """`identity` changes with each start; `limit` is in requests, `capacity_tokens` in tokens; None: not said."""

    identity: str | None = None
    limit: int | None = None
    capacity_tokens: int | None = None


async def read_facts(client: httpx.AsyncClient, member: Member, timeout: float) -> Facts:
    """Asks SGLang's /server_info and /v1/loads; a replica that has neither is not an error."""
    info = await _read(client, member.url + "/server_info", timeout)
    loads = await _read(client, member.url + "/v1/loads?include=core", timeout)
    entries = loads.get("loads")
    first = entries[0] if isinstance(entries, list) and entries and isinstance(entries[0], dict) else loads
    seed = info.get("random_seed")
    capacity = _positive(info.get("max_total_num_tokens"))
    running = _positive(first.get("max_running_requests")) or _positive(info.get("max_running_requests"))
    return Facts(
        identity=None if seed is None else str(seed),
        limit=limit_of(running, capacity),
        capacity_tokens=capacity,
    )


def limit_of(max_running_requests: int | None, capacity_tokens: int | None) -> int | None:
    """How many generating requests a member may hold: what it runs at once, less where its KV pool is small."""
    if max_running_requests is None:
        return None
    if capacity_tokens is None:
        return max_running_requests
    return min(max_running_requests, max(LEAST_LIMIT, capacity_tokens // TOKENS_PER_REQUEST))


async def _read(client: httpx.AsyncClient, url: str, timeout: float) -> dict[str, Any]:
    try:
        answer = await client.get(url, timeout=timeout)
        body = answer.json() if answer.status_code == 200 else {}
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
