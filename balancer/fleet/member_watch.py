"""The watch over one member: loops for our own question (`/ready`), the service's readiness probe, and its queue."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Protocol
from urllib.parse import quote, urljoin, urlsplit

import orjson

from balancer.contract.words import State
from balancer.fleet.fleet import Fleet
from balancer.fleet.inspection import read_facts, read_waiting
from balancer.fleet.member import Member, Verdict
from balancer.fleet.probe_connection import Line, NotAsked, Refused, Unheard

log = logging.getLogger("groundserve")

# SGLang answers these by making a token.
TOKEN_PATHS = ("/health", "/health_generate")
# Time to the next question while the service's answer is not (or no longer surely) a pass, in seconds.
SOON = 1.0
# However much hurries, /ready is not asked more often than once in this many seconds.
LEAST_GAP = 0.02


REDIRECTING = (301, 302, 303, 307, 308)
SAME_METHOD = (307, 308)
REDIRECTS = 10
SILENT = "it holds requests, is silent, and does not say that it is at work"


def _onward(member: Member, path: str, location: str) -> str:
    """The path that a redirect of the member leads to; empty where it leads elsewhere."""
    try:
        parts = urlsplit(urljoin(f"{member.url}{path}", location))
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return ""
    if (parts.scheme == "https", parts.hostname, port) != (member.is_https, member.host, member.port):
        return ""
    query = f"?{parts.query}" if parts.query else ""
    return quote(f"{parts.path or '/'}{query}", safe="%/?:@!$&'()*+,;=-._~[]")


class LineTo(Protocol):
    def __call__(self, member: Member, *, when_broken: Callable[[], None] | None = None) -> Line: ...


class Watch:
    """Asks one member until it is stopped, and tells the fleet. `line_to` makes a line to it."""

    def __init__(self, member: Member, fleet: Fleet, line_to: LineTo, jitter: random.Random) -> None:
        self._hurry = asyncio.Event()  # ask /ready now
        self.doubted = asyncio.Event()  # ask for a sign of life now
        self._member = member
        self._fleet = fleet
        self._line_to = line_to
        self._jitter = jitter
        self._came_up = asyncio.Event()  # /ready began to pass: ask the service's question now
        self._was_refused = False
        self._trouble = ""  # why it could not be asked, as last logged
        self._ready_line = line_to(member, when_broken=self._hurry.set)
        self._service_line = line_to(member)
        self._queue_line = line_to(member)
        self._life_line = line_to(member)
        self._inspected: int | None = None  # the ready line's breaks when we last knew who answers
        loops = (self._watch_ready(), self._watch_service(), self._watch_queue(), self._watch_life())
        self.tasks = [asyncio.ensure_future(loop) for loop in loops]

    def stop(self) -> None:
        for task in self.tasks:
            task.cancel()

    def refused(self) -> None:
        """A request found nothing listening: ask again, and not on a connection from before."""
        self._was_refused = True
        self._ready_line.close()
        self._hurry.set()

    # Ours: /ready

    async def _watch_ready(self) -> None:
        settings = self._fleet.settings
        pause = settings.ready_interval * self._jitter.random()  # members that joined together are soon asked apart
        with contextlib.closing(self._ready_line):
            while True:
                self._hurry.clear()
                await self._safely(self._ask_ready)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._jittered(pause)):
                        await self._hurry.wait()
                        await asyncio.sleep(LEAST_GAP)
                pause = settings.ready_interval

    async def _ask_ready(self) -> None:
        member, fleet = self._member, self._fleet
        if member.listing.state is not State.RUNNING:
            return
        try:
            answer = await self._ready_line.ask("/ready", fleet.settings.ready_timeout)
        except Refused as error:
            self._was_refused = True
            fleet.noted(member, member.ready.surely_failed(fleet.clock(), f"GET /ready: {error}"))
            return
        except Unheard as error:
            fleet.noted(member, member.ready.failed(fleet.clock(), f"GET /ready: {error}"))
            return
        was_refusing = member.refusing
        if answer.status == 503:
            member.refusing = True
            fleet.noted(member, not was_refusing)
        elif answer.status not in (200, 404):
            fleet.noted(member, member.ready.failed(fleet.clock(), f"GET /ready got {answer.status}"))
        elif not await self._is_another():
            # 404 is an older SGLang, without /ready: there the service's probe alone decides.
            member.refusing = False
            fleet.noted(member, member.ready.passed(fleet.clock()) or was_refusing)
            self._came_up.set()

    async def _is_another(self) -> bool:
        """Is what answers now not the process that we knew? Then a new member has taken over.

        The replica is only asked where it may be so: at first, after a refusal, after the line broke.
        """
        member, settings, breaks = self._member, self._fleet.settings, self._ready_line.breaks
        if self._inspected == breaks and not self._was_refused:
            return False
        is_passing = member.ready.verdict is Verdict.PASSING
        # A member that passes is not kept from its next /ready by a long prefill.
        timeout = min(settings.ready_interval, settings.ready_timeout) if is_passing else settings.ready_timeout
        with contextlib.closing(self._line_to(member)) as line:
            facts = await read_facts(line, timeout)
        if facts.identity and member.identity:
            is_another = facts.identity != member.identity
        else:
            is_another = facts.is_whole and self._was_refused and member.has_passed
        if is_another:
            self._fleet.restarted(member)
            return True
        if facts.is_whole:  # else who it is will be asked again after the next /ready
            self._inspected, self._was_refused = breaks, False
            member.ranks = facts.ranks
        member.identity = facts.identity or member.identity
        member.capacity_tokens = facts.capacity_tokens or member.capacity_tokens
        member.own_limit = facts.limit or member.own_limit
        member.limit = self._fleet.limit_of(member)
        return False

    # The service's: readiness_probe

    async def _watch_service(self) -> None:
        member = self._member
        with contextlib.closing(self._service_line):
            while True:
                if member.ready.verdict is not Verdict.PASSING:
                    self._came_up.clear()
                    await self._came_up.wait()
                await self._safely(self._judge_service)
                interval = self._fleet.readiness.endpoint_probe_interval_seconds
                is_sure = member.service.verdict is Verdict.PASSING and not member.service.failures
                await asyncio.sleep(self._jittered(interval if is_sure else min(interval, SOON)))

    async def _judge_service(self) -> None:
        member, fleet = self._member, self._fleet
        if self._is_too_silent():
            await self._judge_silence()
            return
        if self._makes_tokens() and member.service.verdict is Verdict.PASSING:
            if self._flows():
                fleet.noted(member, member.service.passed(fleet.clock()))
                return
            if self._is_at_work():
                return
        try:
            got = await self._ask_service(self._service_line)
        except Unheard as error:
            if self._is_at_work():
                return  # a long prefill keeps anything waiting
            got = f"the readiness probe {fleet.readiness.path}: {error}"
        now = fleet.clock()
        fleet.noted(member, member.service.failed(now, got) if got else member.service.passed(now))

    async def _judge_silence(self) -> None:
        """It holds requests and has not said a byte for long: does its scheduler hang, or is a prefill that long?

        SGLang answers /server_info between two steps of its scheduler, whenever that is. (/health_generate waits for
        20 s at most; then it declares its own server unhealthy, so that a long prefill would take it out.)
        """
        member, fleet = self._member, self._fleet
        is_alive = await self._is_alive(self._service_line, fleet.settings.silence_timeout)
        now = fleet.clock()
        if is_alive:
            member.alive_at = now
        fleet.noted(member, member.service.passed(now) if is_alive else member.service.surely_failed(now, SILENT))

    async def _is_alive(self, line: Line, timeout: float) -> bool:
        try:
            answer = await line.ask("/server_info", timeout)
            return answer.status == 200 or not await self._ask_service(line)
        except Unheard:
            return False

    def _makes_tokens(self) -> bool:
        """Does the service's question cost the replica a generation?"""
        return self._fleet.readiness.path in TOKEN_PATHS or self._fleet.readiness.post_data is not None

    def _flows(self) -> bool:
        """Bytes that came from it lately prove as much as a made-up token would."""
        return self._fleet.clock() - self._member.last_byte_at < self._fleet.readiness.endpoint_probe_interval_seconds

    def _is_at_work(self) -> bool:
        """It holds requests and is silent: a long prefill looks like that, so it is left alone for a while."""
        return self._member.generating > 0 and not self._is_too_silent()

    def _is_too_silent(self) -> bool:
        member = self._member
        heard_at = max(member.last_byte_at, member.busy_since, member.alive_at)
        return member.generating > 0 and self._fleet.clock() - heard_at > self._fleet.settings.silence_timeout

    async def _ask_service(self, line: Line) -> str:
        """What the service's probe got instead of a 200; empty where it passes. Raises Unheard.

        Redirects to the replica itself are followed, as SkyServe does.
        """
        probe = self._fleet.readiness
        path = quote(probe.path, safe="%/?:@!$&'()*+,;=-._~[]")
        method, fields, body = "GET", probe.headers, b""
        if probe.post_data is not None:
            method, fields = "POST", {"content-type": "application/json"} | probe.headers
            body = orjson.dumps(probe.post_data)
        for _ in range(REDIRECTS):
            answer = await line.ask(path, probe.timeout_seconds, method, fields, body)
            if answer.status == 200:
                return ""
            onward = _onward(self._member, path, answer.location) if answer.status in REDIRECTING else ""
            if not onward:
                break
            path = onward
            if answer.status not in SAME_METHOD:
                method, fields, body = "GET", probe.headers, b""
        aside = f", to {answer.location[:200]}" if answer.location else ""
        return f"the readiness probe {probe.path} got {answer.status}{aside}"

    # Its word on a silent answer, whatever others it sends

    async def _watch_life(self) -> None:
        with contextlib.closing(self._life_line):
            while True:
                await self.doubted.wait()
                await self._safely(self._ask_for_life)
                self.doubted.clear()

    async def _ask_for_life(self) -> None:
        if await self._is_alive(self._life_line, self._fleet.settings.idle_timeout):
            self._member.alive_at = self._fleet.clock()
        else:
            await asyncio.sleep(SOON)

    # Its own queue, where requests are held here rather than there

    async def _watch_queue(self) -> None:
        member, settings = self._member, self._fleet.settings
        with contextlib.closing(self._queue_line):
            while True:
                await asyncio.sleep(self._jittered(settings.ready_interval))
                if settings.max_pending is not None and member.pending:
                    await self._safely(self._ask_queue)

    async def _ask_queue(self) -> None:
        # A line and a loop of its own: SGLang answers between two steps of its scheduler, be that after 20 s.
        waiting = await read_waiting(self._queue_line, self._fleet.settings.silence_timeout)
        if waiting is not None:
            self._fleet.reported(self._member, waiting)

    # All

    async def _safely(self, ask: Callable[[], Awaitable[None]]) -> None:
        """A watch that ended would leave its member as it is for ever: so it goes on, whatever happens."""
        try:
            await ask()
            self._trouble = ""
        except Exception as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.warning(
                    "replica %s could not be asked: %s", self._member.name, error, exc_info=type(error) is not NotAsked
                )

    def _jittered(self, seconds: float) -> float:
        return seconds * self._jitter.uniform(0.8, 1.0)
