"""The load of a service, computed from successive snapshots of the balancer."""

from balancer.contract.status import Snapshot
from balancer.operate.controller.wanted import Load

# Seconds between two snapshots after which what arrived meanwhile is no longer counted: it came at an unknown time.
_SILENCE = 5.0


class Traffic:
    """Counts each generating request that arrived between two calls of `take` once, whether served or not."""

    def __init__(self) -> None:
        self._arrived: int | None = None  # the balancer's total in the last snapshot; None before the first one
        self._turned_away = 0
        self._load: Load | None = None  # since the last call; None if nothing was noted
        self._noted_at = 0.0

    def note(self, snapshot: Snapshot, now: float) -> None:
        """`now` is in seconds."""
        service, load = snapshot.service, self._load or Load()
        unknown = 0.0
        if self._arrived is not None and now - self._noted_at > _SILENCE:
            unknown, self._arrived = now - self._noted_at, None
        self._noted_at = now
        before = service.arrived_total if self._arrived is None else self._arrived
        if service.arrived_total < before:  # a balancer that has restarted counts from 0 again
            before = self._turned_away = 0
        self._load = Load(
            load.arrived + service.arrived_total - before,
            service.generating,
            service.generating_queued,
            load.turned_away + max(0, service.turned_away_total - self._turned_away) * (self._arrived is not None),
            load.unknown_seconds + unknown,
        )
        self._arrived, self._turned_away = service.arrived_total, service.turned_away_total

    def take(self) -> Load | None:
        """The load since the last call; None if nothing is known of it, which is not the same as no load."""
        load, self._load = self._load, None
        return load
