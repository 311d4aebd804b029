"""The active readiness loops: each member is asked on its own schedule, so that one that hangs delays nobody."""

import asyncio
import contextlib
import random
from typing import Any

import httpx

from balancer.fleet.fleet import Fleet
from balancer.fleet.inspection import read_facts
from balancer.fleet.member import Member, Verdict

TOKEN_PATHS = ("/health", "/health_generate")
SILENT_PATH = "/health_generate"
RETRY_UNREADY = 1.0


class Prober:
    """Asks every member of a fleet two questions: ours (`/ready`) and the service's own readiness probe.

    `api_key` is what the replicas themselves want, or None; `verify` is httpx's, for replicas behind TLS.
    """

    def __init__(self, fleet: Fleet, api_key: str | None = None, verify: Any = True, seed: int | None = None) -> None:
        self.fleet = fleet
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.AsyncClient(
            headers=headers, verify=verify, trust_env=False, limits=httpx.Limits(max_connections=None)
        )
        self._jitter = random.Random(seed)
        self._watches: dict[Member, _Watch] = {}
        fleet.when_joined.append(self._joined)
        fleet.when_left.append(self._left)
        fleet.when_refused.append(self._refused)

    def start(self) -> None:
        """Begins to watch the members that are there already; later ones are watched as they join."""
        for member in self.fleet.members.values():
            self._joined(member)

    async def stop(self) -> None:
        watches, self._watches = list(self._watches.values()), {}
        for watch in watches:
            watch.stop()
        await asyncio.gather(*(task for watch in watches for task in watch.tasks), return_exceptions=True)
        await self._client.aclose()

    def _joined(self, member: Member) -> None:
        if member not in self._watches:
            self._watches[member] = _Watch(member, self.fleet, self._client, self._jitter)

    def _left(self, member: Member) -> None:
        if watch := self._watches.pop(member, None):
            watch.stop()

    def _refused(self, member: Member) -> None:
        if watch := self._watches.get(member):
            watch.hurry.set()


class _Watch:
    """The two loops of one member."""

    def __init__(self, member: Member, fleet: Fleet, client: httpx.AsyncClient, jitter: random.Random) -> None:
        self.member = member
        self.fleet = fleet
        self.client = client
        self.jitter = jitter
        self.hurry = asyncio.Event()  # ask /ready now
        self.came_up = asyncio.Event()  # /ready began to pass: ask the service's question now
        self.was_refused = False
        self.tasks = [
            asyncio.ensure_future(self._watch_ready()),
            asyncio.ensure_future(self._watch_service()),
        ]

    def stop(self) -> None:
        for task in self.tasks:
            task.cancel()

    # Ours: /ready

    async def _watch_ready(self) -> None:
        settings = self.fleet.settings
        while True:
            await self._ask_ready()
            self.hurry.clear()
            await self._pause(settings.ready_interval, self.hurry)

    async def _ask_ready(self) -> None:
        member, fleet = self.member, self.fleet
        if member.listed.state != "RUNNING":
            return
        try:
            answer = await self.client.get(member.url + "/ready", timeout=fleet.settings.ready_timeout)
        except httpx.ConnectError:
            self.was_refused = self.was_refused or member.has_passed
            self._turned(member.ready.refused(fleet.clock()))
            return
        except (httpx.HTTPError, httpx.InvalidURL):
            self._turned(member.ready.failed(fleet.clock()))
            return
        if answer.status_code == 503:
            if not member.refusing:
                member.refusing = True
                fleet.changed()
            return
        passes = answer.status_code in (
            200,
            404,
        )  # 404: an SGLang without /ready; the service's probe stands in
        if passes and member.ready.verdict is not Verdict.PASSING and await self._is_another():
            return
        changed = member.ready.passed(fleet.clock()) if passes else member.ready.failed(fleet.clock())
        if passes and changed:
            self.came_up.set()
        if passes and member.refusing:
            member.refusing = False
            changed = True
        self._turned(changed)

    async def _is_another(self) -> bool:
        """Is what answers now the process that we knew? If not, a new member takes over."""
        member = self.member
        facts = await read_facts(self.client, member, self.fleet.settings.ready_timeout)
        known, member.identity = member.identity, facts.identity or member.identity
        if self.fleet.settings.max_in_flight is None and facts.limit:
            member.limit = facts.limit
        member.capacity_tokens = facts.capacity_tokens or member.capacity_tokens
        is_another = known != facts.identity if known and facts.identity else self.was_refused
        if is_another:
            self.fleet.restarted(member)
        return is_another

    # The service's: readiness_probe

    async def _watch_service(self) -> None:
        member, probe = self.member, self.fleet.readiness
        while True:
            if member.ready.verdict is not Verdict.PASSING:
                self.came_up.clear()
                await self.came_up.wait()
            if self._flows():
                self._turned(member.service.passed(self.fleet.clock()))
            elif not self._is_at_work():
                if await self._is_another():
                    return
                await self._ask_service()
            passing = member.service.verdict is Verdict.PASSING
            wait = probe.endpoint_probe_interval_seconds
            self.came_up.clear()
            await self._pause(wait if passing else min(wait, RETRY_UNREADY), self.came_up)

    def _makes_token(self) -> bool:
        return self.fleet.readiness.path in TOKEN_PATHS and self.fleet.readiness.post_data is None

    def _flows(self) -> bool:
        """Bytes that came from it lately prove as much as a made-up token would."""
        if not self._makes_token() or self.member.service.verdict is not Verdict.PASSING:
            return False
        return self.fleet.clock() - self.member.last_byte_at < self.fleet.readiness.endpoint_probe_interval_seconds

    def _is_at_work(self) -> bool:
        """It holds requests and is silent: a long prefill looks like that, so it is left alone for a while."""
        if not self._makes_token() or self.member.service.verdict is not Verdict.PASSING:
            return False
        return self.member.generating > 0 and not self._is_too_silent()

    def _is_too_silent(self) -> bool:
        silent_since = max(self.member.last_byte_at, self.member.busy_since)
        return self.member.generating > 0 and (self.fleet.clock() - silent_since > self.fleet.settings.silence_timeout)

    async def _ask_service(self) -> None:
        member, probe = self.member, self.fleet.readiness
        path, timeout = probe.path, probe.timeout_seconds
        if self._makes_token() and self._is_too_silent():
            path, timeout = SILENT_PATH, self.fleet.settings.silence_timeout
        method = "GET" if probe.post_data is None else "POST"
        try:
            answer = await self.client.request(
                method, member.url + path, json=probe.post_data, headers=probe.headers, timeout=timeout
            )
            passes = answer.status_code == 200
        except (httpx.HTTPError, httpx.InvalidURL):
            passes = False
        now = self.fleet.clock()
        self._turned(member.service.passed(now) if passes else member.service.failed(now))

    # Both

    def _turned(self, changed: bool) -> None:
        member = self.member
        if not member.has_passed and member.probe is Verdict.PASSING and not member.refusing:
            member.has_passed = changed = True
        if changed:
            self.fleet.changed()

    async def _pause(self, seconds: float, cut_short: asyncio.Event) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds * self.jitter.uniform(0.9, 1.1)):
                await cut_short.wait()
