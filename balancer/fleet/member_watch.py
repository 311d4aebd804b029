"""The watch over one member: `/ready`, the service's readiness probe, the replica's queue, and its signs of life."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Protocol
from urllib.parse import quote, urljoin, urlsplit

import orjson

from balancer.contract.words import State
from balancer.fleet.chat_template import continues
from balancer.fleet.fleet import Fleet
from balancer.fleet.inspection import BALANCER, inspect, lease_of, read_lease, read_models, read_queue_length
from balancer.fleet.member import Member, Verdict
from balancer.fleet.probe_connection import CannotProbe, ConnectionRefused, NoResponse, ProbeConnection
from balancer.fleet.tenancy import Said

log = logging.getLogger("groundserve")

# SGLang answers these by generating a token.
TOKEN_PATHS = ("/health", "/health_generate")
# Seconds to the next probe while the service's probe does not pass, or failed the last time.
SOON = 1.0
# Seconds before each attempt to try its chat template, until one is answered.
TEMPLATE_TRIALS = (0, 2, 10, 60)
# However urgent it is, /ready is asked at most once in this many seconds.
MIN_INTERVAL = 0.02
# A replica that shares its GPUs hears from its balancer at least once in this many seconds; after 5 s without it takes
# turns by itself.
HEARTBEAT = 2.0
# Seconds that the answer to an order may take beyond the time that the order gives: a wake that has its turn is waited
# for, on a CPU up to a minute.
ANSWER = 70.0

REDIRECTING = (301, 302, 303, 307, 308)
SAME_METHOD = (307, 308)
MAX_REDIRECTS = 10
NOT_CONTINUED = "its chat template does not put a begun answer right behind the prompt, or /tokenize does not say"
LOADS = "it accepts no connections yet"
SILENT = "it holds requests, is silent, and does not say that it is at work"


def _redirected(member: Member, path: str, location: str) -> str:
    """The path to which the member redirects; empty where that is on another server."""
    try:
        parts = urlsplit(urljoin(f"{member.url}{path}", location))
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return ""
    if (parts.scheme == "https", parts.hostname, port) != (member.is_https, member.host, member.port):
        return ""
    query = f"?{parts.query}" if parts.query else ""
    return quote(f"{parts.path or '/'}{query}", safe="%/?:@!$&'()*+,;=-._~[]")


class ConnectTo(Protocol):
    def __call__(self, member: Member, *, when_broken: Callable[[], None] | None = None) -> ProbeConnection: ...


class MemberWatch:
    """Probes one member until it is stopped, and reports to the fleet."""

    def __init__(
        self, member: Member, fleet: Fleet, connect_to: ConnectTo, jitter: random.Random, balancer: str
    ) -> None:
        self._hurry = asyncio.Event()  # ask /ready now
        self.doubted = asyncio.Event()  # ask for a sign of life now
        self._member = member
        self._fleet = fleet
        self._connect_to = connect_to
        self._jitter = jitter
        self._balancer = balancer
        self._came_up = asyncio.Event()  # /ready began to pass: run the service's probe now
        self._was_refused = False
        self._said_503 = False  # the last answer of /ready, by a replica that shares its GPUs
        self._is_stopped = False
        self._trouble = ""  # why it could not be probed, as last logged
        self._ready_connection = connect_to(member, when_broken=self._hurry.set)
        self._service_connection = connect_to(member)
        self._queue_connection = connect_to(member)
        self._life_connection = connect_to(member)
        self._order_connection = connect_to(member)
        self._asked_lease: int | None = None  # the ready connection's `breaks` when it was last asked for a lease
        self._inspected: int | None = None  # the ready connection's `breaks` when we last knew which process answers
        loops = (
            self._watch_ready(),
            self._watch_service(),
            self._watch_queue(),
            self._watch_life(),
            self._try_template(),
        )
        self.tasks = [asyncio.ensure_future(loop) for loop in loops]

    def stop(self) -> None:
        self._is_stopped = True
        for task in self.tasks:
            task.cancel()
        self._order_connection.close()

    def refused(self) -> None:
        """A request found that nothing listens: ask again, over a new connection."""
        self._was_refused = True
        self._ready_connection.close()
        self._hurry.set()

    # Our own probe: /ready

    async def _watch_ready(self) -> None:
        settings = self._fleet.settings
        pause = settings.ready_interval * self._jitter.random()  # members that join together are not probed together
        with contextlib.closing(self._ready_connection):
            while True:
                self._hurry.clear()
                await self._safely(self._probe_ready)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._jittered(pause)):
                        await self._hurry.wait()
                        await asyncio.sleep(MIN_INTERVAL)
                pause = settings.ready_interval
                if self._member.tenancy is not None:
                    pause = min(pause, HEARTBEAT)

    async def _probe_ready(self) -> None:
        member, fleet = self._member, self._fleet
        if member.listing.state is not State.RUNNING:
            return
        if member.tenancy is not None and not await self._is_awake():
            return
        asked_at = fleet.clock()
        try:
            response = await self._ready_connection.request("/ready", fleet.settings.ready_timeout)
        except ConnectionRefused as error:
            self._was_refused = True
            said = f"GET /ready: {error}" if member.has_passed else LOADS
            fleet.note_probe(member, member.ready.surely_failed(fleet.clock(), said))
            return
        except NoResponse as error:
            fleet.note_probe(member, member.ready.failed(fleet.clock(), f"GET /ready: {error}"))
            return
        if self._rests():
            return  # it was told to doze meanwhile
        was_refusing = member.refusing
        if response.status == 503:
            if await self._is_away():
                return
            if member.tenancy is not None and not self._said_503:
                self._said_503 = True  # it may have dozed and woken since: it is asked once more
                self._hurry.set()
                return
            member.refusing = True
            fleet.note_probe(member, not was_refusing)
        elif response.status not in (200, 404):
            fleet.note_probe(member, member.ready.failed(fleet.clock(), f"GET /ready got {response.status}"))
        elif not await self._is_another():
            self._said_503 = False
            # 404 is an older SGLang without /ready: there the service's probe alone decides.
            member.refusing, member.passed_at = False, asked_at
            fleet.note_probe(member, member.ready.passed(fleet.clock()) or was_refusing)
            self._came_up.set()

    # Its turns, if it shares its GPUs

    async def _is_awake(self) -> bool:
        """Asks how it stands with its turn, on the connection that shows a crash at once; a dead one is found here.

        False: there is nothing more to ask.
        """
        member, fleet = self._member, self._fleet
        orders = member.tenancy.orders if member.tenancy else 0
        try:
            said = await read_lease(self._ready_connection, fleet.settings.ready_timeout, self._balancer)
        except ConnectionRefused as error:
            self._was_refused = True
            fleet.lost(member)
            fleet.note_probe(member, member.ready.surely_failed(fleet.clock(), f"GET /lease: {error}"))
            return False
        except NoResponse as error:
            has_changed = member.ready.failed(fleet.clock(), f"GET /lease: {error}")
            if member.ready.verdict is Verdict.FAILING:
                fleet.lost(member)
            fleet.note_probe(member, has_changed)
            return False
        if said is None:
            fleet.lost(member)
            return True
        self._take(said, orders)
        if not self._rests():
            return True
        # A balancer that has just begun may find it away, and must know which models it serves in order to wake it.
        if not await self._is_another():
            self._said_503 = False
            fleet.note_probe(member, member.ready.passed(fleet.clock()))
        return False

    async def _is_away(self) -> bool:
        """It says 503: because others have its GPU? It may have dozed since it was asked, or for another balancer."""
        if self._member.tenancy is not None:
            return not await self._is_awake()
        if self._asked_lease == self._ready_connection.breaks:
            return False
        try:
            said = await read_lease(self._ready_connection, self._fleet.settings.ready_timeout, self._balancer)
        except NoResponse:
            return False
        self._asked_lease = self._ready_connection.breaks
        if said is not None:
            self._take(said, 0)
        return self._rests()

    def _take(self, said: Said, orders: int) -> None:
        """Takes what it said, unless it has been told to change its state since it was asked."""
        tenancy = self._member.tenancy
        if tenancy is None or tenancy.orders == orders:
            self._fleet.said(self._member, said)

    def _rests(self) -> bool:
        return self._member.is_resting

    async def order(self, what: str, within: float, more: float = 0.0, memory: float | None = None) -> Said | None:
        """Tells it to `wake`, `doze` or `sleep` within so many seconds, and returns how it stands with its turn then.

        `more`: seconds by which its answer may be later, because a wake that has its turn is not given up. `memory`:
        how many seconds it waits for memory that others may be about to give back, None: as long as it likes. Returns
        None if it gave no answer that can be understood.
        """
        path, fields = f"/lease/{what}?within={within:g}", {BALANCER: self._balancer, "content-length": "0"}
        if memory is not None:
            path += f"&memory={memory:g}"
        try:
            response = await self._order_connection.request(path, within + more + ANSWER, "POST", fields)
        except (NoResponse, CannotProbe) as error:
            log.info("replica %s could not be told to %s: %s", self._member.name, what, error)
            self._hurry.set()
            return None
        return lease_of(response.body)

    async def _is_another(self) -> bool:
        """Does another process answer now than the one we knew? Then a new member has taken over.

        The replica is only asked when that is possible: at first, after a refused connection, after a broken one.
        """
        member, settings, breaks = self._member, self._fleet.settings, self._ready_connection.breaks
        if self._inspected == breaks and not self._was_refused:
            return False
        is_passing = member.ready.verdict is Verdict.PASSING
        # A long prefill must not keep a member that passes from its next /ready.
        timeout = min(settings.ready_interval, settings.ready_timeout) if is_passing else settings.ready_timeout
        with contextlib.closing(self._connect_to(member)) as connection:
            inspection = await inspect(connection, timeout)
            models = await read_models(connection, timeout) if inspection.is_whole else ()
            said = None
            if inspection.is_whole and member.tenancy is None:
                with contextlib.suppress(NoResponse):
                    said = await read_lease(connection, timeout, self._balancer)
        if inspection.identity and member.identity:
            is_another = inspection.identity != member.identity
        else:
            is_another = inspection.is_whole and self._was_refused and member.has_passed
        if is_another:
            self._fleet.restarted(member)
            return True
        if models:
            self._fleet.note_models(member, models)
        if inspection.is_whole:  # otherwise it is inspected again after the next /ready
            self._inspected, self._was_refused = breaks, False
            member.ranks = inspection.ranks
            member.reasoning_parser = inspection.reasoning_parser
        if said is not None:
            self._take(said, 0)
        member.identity = inspection.identity or member.identity
        member.capacity_tokens = inspection.capacity_tokens or member.capacity_tokens
        member.own_limit = inspection.limit or member.own_limit
        member.limit = self._fleet.limit_of(member)
        return False

    # The service's own readiness probe

    async def _watch_service(self) -> None:
        member = self._member
        with contextlib.closing(self._service_connection):
            while True:
                if member.ready.verdict is not Verdict.PASSING:
                    self._came_up.clear()
                    await self._came_up.wait()
                await self._safely(self._probe_service)
                interval = self._fleet.readiness.endpoint_probe_interval_seconds
                is_sure = member.service.verdict is Verdict.PASSING and not member.service.failures
                await asyncio.sleep(self._jittered(interval if is_sure else min(interval, SOON)))

    async def _probe_service(self) -> None:
        """Three cases: it holds requests and has been silent for too long, so it must show that it is alive; it is
        busy, so a probe that costs a token is left out; else the probe is sent.
        """
        member, fleet = self._member, self._fleet
        if self._rests():
            return
        if self._is_silent_too_long():
            await self._judge_silence()
            return
        if self._costs_a_token() and member.service.verdict is Verdict.PASSING:
            if self._has_sent_lately():
                fleet.note_probe(member, member.service.passed(fleet.clock()))
                return
            if self._may_be_prefilling():
                return
        try:
            failure = await self._ask_service(self._service_connection)
        except NoResponse as error:
            if self._may_be_prefilling():
                return  # a long prefill keeps everything waiting
            failure = f"the readiness probe {fleet.readiness.path}: {error}"
        if self._rests():
            return  # it was told to doze meanwhile
        now = fleet.clock()
        fleet.note_probe(member, member.service.failed(now, failure) if failure else member.service.passed(now))

    async def _judge_silence(self) -> None:
        """It holds requests and has not sent a byte for long: does its scheduler hang, or is it in a long prefill?

        SGLang answers /server_info between two steps of its scheduler, however long a step takes. (/health_generate
        waits for at most 20 s and then declares its own server unhealthy, so a long prefill would make it fail.)
        """
        member, fleet = self._member, self._fleet
        is_alive = await self._is_alive(self._service_connection, fleet.settings.silence_timeout)
        if self._rests():
            return
        now = fleet.clock()
        if is_alive:
            member.alive_at = now
        fleet.note_probe(member, member.service.passed(now) if is_alive else member.service.surely_failed(now, SILENT))

    async def _is_alive(self, connection: ProbeConnection, timeout: float) -> bool:
        try:
            response = await connection.request("/server_info", timeout)
            return response.status == 200 or not await self._ask_service(connection)
        except NoResponse:
            return False

    def _costs_a_token(self) -> bool:
        """Does the service's probe make the replica generate?"""
        return self._fleet.readiness.path in TOKEN_PATHS or self._fleet.readiness.post_data is not None

    def _has_sent_lately(self) -> bool:
        """Bytes of an answer prove as much as a token that is generated for a probe."""
        return self._fleet.clock() - self._member.last_byte_at < self._fleet.readiness.endpoint_probe_interval_seconds

    def _may_be_prefilling(self) -> bool:
        """It holds requests and is silent, as in a long prefill: it is left alone for a while."""
        return self._member.generating > 0 and not self._is_silent_too_long()

    def _is_silent_too_long(self) -> bool:
        member = self._member
        heard_at = max(member.last_byte_at, member.busy_since, member.alive_at)
        return member.generating > 0 and self._fleet.clock() - heard_at > self._fleet.settings.silence_timeout

    async def _ask_service(self, connection: ProbeConnection) -> str:
        """What the service's probe got instead of a 200; empty if it passes. Raises NoResponse.

        Redirects to the replica itself are followed, as SkyServe does.
        """
        probe = self._fleet.readiness
        path = quote(probe.path, safe="%/?:@!$&'()*+,;=-._~[]")
        method, fields, body = "GET", probe.headers, b""
        if probe.post_data is not None:
            method, fields = "POST", {"content-type": "application/json"} | probe.headers
            body = orjson.dumps(probe.post_data)
        for _ in range(MAX_REDIRECTS):
            response = await connection.request(path, probe.timeout_seconds, method, fields, body)
            if response.status == 200:
                return ""
            target = _redirected(self._member, path, response.location) if response.status in REDIRECTING else ""
            if not target:
                break
            path = target
            if response.status not in SAME_METHOD:
                method, fields, body = "GET", probe.headers, b""
        location = f", to {response.location[:200]}" if response.location else ""
        return f"the readiness probe {probe.path} got {response.status}{location}"

    # Signs of life, asked for when one of its answers has stalled

    async def _watch_life(self) -> None:
        with contextlib.closing(self._life_connection):
            while True:
                await self.doubted.wait()
                await self._safely(self._ask_for_life)
                self.doubted.clear()

    async def _ask_for_life(self) -> None:
        if await self._is_alive(self._life_connection, self._fleet.settings.idle_timeout):
            self._member.alive_at = self._fleet.clock()
        else:
            await asyncio.sleep(SOON)

    # Its chat template, once

    async def _try_template(self) -> None:
        """Finds out, once it has become ready, whether it can continue a chat that another replica began."""
        member, settings = self._member, self._fleet.settings
        await self._came_up.wait()
        for pause in TEMPLATE_TRIALS:
            await asyncio.sleep(pause)
            try:
                with contextlib.closing(self._connect_to(member)) as connection:
                    member.continues = await continues(connection, settings.ready_timeout)
                break
            except (NoResponse, CannotProbe) as error:
                log.info("replica %s did not tokenize: %s", member.name, error)
        if not member.continues:
            log.info("replica %s cannot continue a chat that broke elsewhere: %s", member.name, NOT_CONTINUED)
        member.continues_known.set()

    # Its own queue, where requests are held back here

    async def _watch_queue(self) -> None:
        member, settings = self._member, self._fleet.settings
        with contextlib.closing(self._queue_connection):
            while True:
                await asyncio.sleep(self._jittered(settings.ready_interval))
                if settings.max_pending is not None and member.pending:
                    await self._safely(self._ask_queue)

    async def _ask_queue(self) -> None:
        # On a connection and a loop of its own: SGLang answers between two steps of its scheduler, perhaps after 20 s.
        waiting = await read_queue_length(self._queue_connection, self._fleet.settings.silence_timeout)
        if waiting is not None:
            self._fleet.note_queue(self._member, waiting)

    # All of them

    async def _safely(self, probe: Callable[[], Awaitable[None]]) -> None:
        """Goes on whatever happens: if a watch ended, its member would stay as it is for ever."""
        try:
            await probe()
            self._trouble = ""
        except Exception as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                is_bug = type(error) is not CannotProbe
                log.warning("replica %s could not be asked: %s", self._member.name, error, exc_info=is_bug)
        if self._is_stopped:
            # A probe that finds another process stops its own watch. asyncio.timeout would take a cancellation that is
            # still on its way for its own, if the loop is late.
            raise asyncio.CancelledError

    def _jittered(self, seconds: float) -> float:
        return seconds * self._jitter.uniform(0.8, 1.0)
