"""What is asked of a service, from one of the balancer's snapshots to the next."""

from balancer.operate.wanted import Load
from balancer.views.status import Snapshot


class Traffic:
    """Adds up what arrived between two looks; the balancer counts by replica, and replicas come and go."""

    def __init__(self) -> None:
        self._totals: dict[tuple[int, str], int] = {}
        self._load = Load()

    def note(self, snapshot: Snapshot) -> None:
        totals = {(row.id, row.endpoint): row.requests_total for row in snapshot.replicas}
        arrived = 0
        for key, total in totals.items():
            before = self._totals.get(key, 0)
            # A balancer that started anew counts from 0 again.
            arrived += total - before if total >= before else total
        self._totals = totals
        service = snapshot.service
        self._load = Load(self._load.arrived + arrived, service.in_flight, service.queue_depth)

    def take(self) -> Load:
        """The load since the last call."""
        load, self._load = self._load, Load(0, self._load.in_flight, self._load.queued)
        return load
