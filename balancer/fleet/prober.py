"""Keeps a watch over every member: each is asked on its own schedule, so that one that hangs delays nobody."""

import asyncio
import functools
import random
import ssl

from balancer.fleet.dial import Dialer
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member
from balancer.fleet.member_watch import Watch
from balancer.fleet.probe_connection import Line


class Prober:
    """Watches the members of a fleet as they come and go.

    `api_key` is what the replicas themselves want, `tls` how https replicas are checked, `seed` that of the jitter,
    `dialer` what connects to them.
    """

    def __init__(
        self,
        fleet: Fleet,
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
        seed: int | None = None,
        dialer: Dialer | None = None,
    ) -> None:
        self._fleet = fleet
        fields = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._line_to = functools.partial(Line, tls=tls, fields=fields, dialer=dialer or Dialer())
        self._jitter = random.Random(seed)
        self._watches: dict[Member, Watch] = {}
        fleet.when_joined.append(self._joined)
        fleet.when_left.append(self._left)
        fleet.when_refused.append(self._refused)
        fleet.when_doubted.append(self._doubted)

    def start(self) -> None:
        """Begins to watch the members that are there already; later ones are watched as they join."""
        for member in self._fleet.members.values():
            self._joined(member)

    async def stop(self) -> None:
        watches, self._watches = list(self._watches.values()), {}
        for watch in watches:
            watch.stop()
        await asyncio.gather(*(task for watch in watches for task in watch.tasks), return_exceptions=True)

    def _joined(self, member: Member) -> None:
        if member not in self._watches:
            self._watches[member] = Watch(member, self._fleet, self._line_to, self._jitter)

    def _left(self, member: Member) -> None:
        if watch := self._watches.pop(member, None):
            watch.stop()

    def _doubted(self, member: Member) -> None:
        if watch := self._watches.get(member):
            watch.doubted.set()

    def _refused(self, member: Member) -> None:
        if watch := self._watches.get(member):
            watch.refused()
