"""The load of a service, computed from successive snapshots of the balancer."""

from balancer.contract.status import ServiceRow, Snapshot
from balancer.operate.controller.wanted import Load

# Seconds between two snapshots after which what arrived meanwhile is no longer counted: it came at an unknown time.
_SILENCE = 5.0


class Traffic:
    """Counts each generating request that arrived between two calls of `take` once, whether served or not."""

    def __init__(self) -> None:
        self._last: ServiceRow | None = None  # what the balancer said last; None if that is nothing, or too long ago
        self._load: Load | None = None  # since the last call; None if nothing was noted
        self._noted_at = 0.0

    def note(self, snapshot: Snapshot, now: float) -> None:
        """`now` is in seconds."""
        service, load = snapshot.service, self._load or Load()
        unknown = 0.0
        if self._last is not None and now - self._noted_at > _SILENCE:
            unknown, self._last = now - self._noted_at, None
        self._noted_at = now
        arrived, turned_away = (0, 0) if self._last is None else service.came_since(self._last)
        self._load = Load(
            load.arrived + arrived,
            service.generating,
            service.generating_queued,
            load.turned_away + turned_away,
            load.unknown_seconds + unknown,
        )
        self._last = service

    def take(self) -> Load | None:
        """The load since the last call; None if nothing is known of it, which is not the same as no load."""
        load, self._load = self._load, None
        return load
