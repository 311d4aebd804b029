"""The load of a service, computed from successive snapshots of the balancer."""

from balancer.contract.status import Snapshot
from balancer.operate.controller.wanted import Load


class Traffic:
    """Counts each generating request that arrived between two calls of `take` once, whether served or not."""

    def __init__(self) -> None:
        self._arrived: int | None = None  # the balancer's total in the last snapshot; None before the first one
        self._turned_away = 0
        self._load = Load()

    def note(self, snapshot: Snapshot) -> None:
        service = snapshot.service
        before = service.arrived_total if self._arrived is None else self._arrived
        if service.arrived_total < before:  # a balancer that has restarted counts from 0 again
            before = self._turned_away = 0
        self._load = Load(
            self._load.arrived + service.arrived_total - before,
            service.generating,
            service.generating_queued,
            self._load.turned_away
            + max(0, service.turned_away_total - self._turned_away) * (self._arrived is not None),
        )
        self._arrived, self._turned_away = service.arrived_total, service.turned_away_total

    def take(self) -> Load:
        """The load since the last call."""
        load, self._load = self._load, Load(0, self._load.in_flight, self._load.queued)
        return load
