"""Keeps a watch over every member: each is probed on a schedule of its own, so that one that hangs delays no other."""

import asyncio
import functools
import random
import ssl

from balancer.fleet.dial import Dialer
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member
from balancer.fleet.member_watch import MemberWatch
from balancer.fleet.probe_connection import ProbeConnection
from balancer.fleet.tenancy import Said


class Prober:
    """Watches the members of a fleet as they come and go.

    `api_key` is sent to the replicas, `tls` checks the certificates of https replicas, `seed` makes the jitter
    repeatable, and `dialer` connects. Replicas that share their GPUs know this process by the name `balancer`.
    """

    def __init__(
        self,
        fleet: Fleet,
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
        seed: int | None = None,
        dialer: Dialer | None = None,
        balancer: str = "groundserve",
    ) -> None:
        self._fleet = fleet
        self._balancer = balancer
        fields = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._connect_to = functools.partial(ProbeConnection, tls=tls, fields=fields, dialer=dialer or Dialer())
        self._jitter = random.Random(seed)
        self._watches: dict[Member, MemberWatch] = {}
        fleet.when_joined.append(self._joined)
        fleet.when_left.append(self._left)
        fleet.when_refused.append(self._refused)
        fleet.when_doubted.append(self._doubted)

    def start(self) -> None:
        """Starts to watch the members that the fleet has; later ones are watched as they join."""
        for member in self._fleet.members.values():
            self._joined(member)

    async def stop(self) -> None:
        watches, self._watches = list(self._watches.values()), {}
        for watch in watches:
            watch.stop()
        await asyncio.gather(*(task for watch in watches for task in watch.tasks), return_exceptions=True)

    def _joined(self, member: Member) -> None:
        if member not in self._watches:
            self._watches[member] = MemberWatch(member, self._fleet, self._connect_to, self._jitter, self._balancer)

    async def order(
        self, member: Member, what: str, within: float, more: float = 0.0, memory: float | None = None
    ) -> Said | None:
        """Tells a member to `wake`, `doze` or `sleep`; see MemberWatch.order."""
        watch = self._watches.get(member)
        return await watch.order(what, within, more, memory) if watch else None

    def _left(self, member: Member) -> None:
        if watch := self._watches.pop(member, None):
            watch.stop()

    def _doubted(self, member: Member) -> None:
        if watch := self._watches.get(member):
            watch.doubted.set()

    def _refused(self, member: Member) -> None:
        if watch := self._watches.get(member):
            watch.refused()
