"""python -m balancer with its metrics taken out, to measure what they cost; flags as there. Not for use."""

import sys

from balancer import __main__, process
from balancer.app import Balancer
from balancer.fleet.member import Member
from balancer.relay.record import Record, Spans
from balancer.views.access_log import AccessLog


class NoSpans:
    def note(self, value: float) -> None:
        pass


class LogOnly:
    """Tells the access log, as ever, and counts nothing."""

    def __init__(self, log: AccessLog) -> None:
        self._log = log
        self._gaps = NoSpans()

    def finished(self, record: Record) -> None:
        self._log.finished(record)

    def gaps(self, member: Member) -> Spans:
        return self._gaps


class Unmetered(Balancer):
    def __init__(self, *arguments, **named) -> None:
        super().__init__(*arguments, **named)
        self.proxy.observer = LogOnly(self.access_log)


if __name__ == "__main__":
    process.Balancer = Unmetered
    sys.exit(__main__.main())
