"""Tells those who keep something of finished requests."""

from balancer.observe.access_log import AccessLog
from balancer.observe.record import Record
from balancer.observe.tally import InterTokenHistogram, Tallies


class Observer:
    """Passes the record of each finished request to the access log and the metrics."""

    def __init__(self, log: AccessLog, tallies: Tallies) -> None:
        self._log = log
        self._tallies = tallies

    def inter_token(self, replica: str) -> InterTokenHistogram:
        return self._tallies.inter_token(replica)

    def finished(self, record: Record) -> None:
        self._log.finished(record)
        self._tallies.finished(record)
