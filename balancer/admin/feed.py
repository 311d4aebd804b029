"""What the page shows, live: server-sent events with the service, its replicas, and its routing decisions."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import orjson
from fastapi import APIRouter, HTTPException
from fastapi.responses import StreamingResponse

from balancer.fleet.fleet import Fleet
from balancer.observe.history import INTERVAL, KEPT, History
from balancer.observe.record import Record
from balancer.observe.snapshot import take_snapshot
from balancer.observe.tally import Tallies
from balancer.routing.admission import Admission
from balancer.service import ServiceFacts

PERIOD = 1.0  # seconds between two events
MAX_VIEWERS = 64
SHOWN_TURNS = 300.0  # seconds of turns on shared GPUs
MAX_TEXT = 120  # characters of a path or a reason


class Feed:
    """The events for each viewer: `history` once, then `state` every second and `sample` every five."""

    def __init__(
        self,
        facts: ServiceFacts,
        fleet: Fleet,
        admission: Admission,
        tallies: Tallies,
        history: History,
        fleets: Callable[[], Mapping[str, Fleet]] = dict,
        *,
        keeps_usage: bool = False,
    ) -> None:
        """`fleets`: those of all services behind the endpoint, by name, which may share GPUs with this one.

        `keeps_usage`: the balancer has an answer to GET /usage.
        """
        self._facts = facts
        self._fleet = fleet
        self._admission = admission
        self._tallies = tallies
        self._history = history
        self._fleets = fleets
        self._keeps_usage = keeps_usage
        self._closing = asyncio.Event()
        self._viewers = 0
        self._state_event = b""
        self._state_at = -PERIOD

    def close(self) -> None:
        """Ends every stream; viewers reconnect, perhaps to the next process."""
        self._closing.set()

    @property
    def service(self) -> str:
        """The name of the service that it is about."""
        return self._facts.name

    @property
    def is_full(self) -> bool:
        return self._viewers >= MAX_VIEWERS

    async def events(self) -> AsyncIterator[bytes]:
        """The events of one viewer, until it leaves or the balancer shuts down."""
        self._viewers += 1
        try:
            seen = self._history.taken
            yield _event("history", self._whole_history())
            while not self._closing.is_set():
                if self._history.taken != seen:
                    seen = self._history.taken
                    yield _event("sample", self._last_sample())
                yield self._latest_state()
                try:
                    async with asyncio.timeout(PERIOD):
                        await self._closing.wait()
                except TimeoutError:
                    continue
        finally:
            self._viewers -= 1

    def _latest_state(self) -> bytes:
        """The state, at most half a second old: it is built once for all viewers."""
        now = self._fleet.clock()
        if now - self._state_at >= PERIOD / 2:
            self._state_event, self._state_at = _event("state", self._state(now)), now
        return self._state_event

    def _state(self, now: float) -> dict[str, Any]:
        snapshot = take_snapshot(self._facts, self._fleet, self._admission)
        state = snapshot.to_json()
        state["service"]["phase"] = snapshot.service.status.phase
        state["service"]["expected_wait_seconds"] = round(self._admission.expected_wait(), 1)
        for replica, row in zip(snapshot.replicas, state["replicas"], strict=True):
            member = self._fleet.members[replica.id]
            history = self._history.replicas.get(member.id)
            row["phase"] = replica.status.phase
            row["limit"] = member.limit
            row["draining"] = member.draining
            row |= {} if history is None else {**history.lately().to_json(), "in_flight": member.in_flight}
            row.pop("turns", None)
        state["turns"] = self._turns(now)
        state["keeps_usage"] = self._keeps_usage
        self._tallies.count()
        newest_first = enumerate(reversed(self._tallies.recent))
        state["decisions"] = [_decision(self._tallies.routed - n, record, now) for n, record in newest_first]
        return state

    def _turns(self, now: float) -> list[dict[str, Any]]:
        """Who had which of this service's shared GPUs, and how many seconds ago each turn began and ended."""
        mine = {gpu for member in self._fleet.members.values() if member.tenancy for gpu in member.tenancy.gpus}
        return [
            {
                "gpu": gpu,
                "service": name,
                "replica": member.name,
                "turns": [
                    (round(now - began, 1), round(now - ended, 1))
                    for began, ended in tenancy.turns(now)
                    if now - ended < SHOWN_TURNS
                ],
            }
            for name, fleet in (self._fleets().items() if mine else ())
            for member in fleet.members.values()
            if (tenancy := member.tenancy) is not None
            for gpu in tenancy.gpus
            if gpu in mine
        ]

    def _whole_history(self) -> dict[str, Any]:
        return {
            "interval_seconds": INTERVAL,
            "kept": KEPT,
            "service": [sample.to_json() for sample in self._history.service],
            "replicas": {
                str(number): [sample.to_json() for sample in history.samples]
                for number, history in self._history.replicas.items()
            },
        }

    def _last_sample(self) -> dict[str, Any]:
        replicas = self._history.replicas.items()
        return {
            "service": self._history.service[-1].to_json(),
            # A viewer sees by the number of samples that a replica has restarted.
            "replicas": {
                str(n): {"count": len(history.samples), **history.samples[-1].to_json()} for n, history in replicas
            },
        }


def feed_router(feeds: Sequence[Feed]) -> APIRouter:
    """`GET /feed`; the first feed is for those who name no service."""
    router = APIRouter()

    @router.get(
        "/feed",
        responses={
            404: {"description": "no such service"},
            503: {"description": "the maximum number of viewers is connected"},
        },
    )
    async def events(service: str | None = None) -> StreamingResponse:
        """What `GET /status` says, and more, as a server-sent event every second."""
        feed = next((feed for feed in feeds if service in (None, feed.service)), None)
        if feed is None:
            raise HTTPException(404, f"There is no service {service!r}.")
        if feed.is_full:
            raise HTTPException(503, f"{MAX_VIEWERS} viewers are here already; close a page, or read /status.")
        return StreamingResponse(
            feed.events(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    return router


def _decision(number: int, record: Record, now: float) -> dict[str, Any]:
    return {
        "number": number,  # unique, unlike an id, which the client may choose
        "id": record.id,
        "ago_seconds": round(now - record.received_at - record.duration, 1),
        "path": _cut(record.path),
        "status": record.status,
        "replica": record.member,
        "reason": _cut(record.reason),
        "attempts": record.attempts,
        "queued_seconds": round(record.queued, 3),
        "ttft_seconds": None if record.first_byte is None else round(record.first_byte, 3),
        "duration_seconds": round(record.duration, 3),
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "predicted_share": None if record.matched is None else round(record.matched, 3),
        "key": record.key,
    }


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(data))
