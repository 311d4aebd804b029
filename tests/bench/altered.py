"""python -m balancer with a part taken out, to measure what the part costs: `altered.py PART FLAGS...`. Not for use."""

import sys
from collections.abc import Sequence

from balancer import __main__, process
from balancer.app import Balancer
from balancer.fleet.member import Member
from balancer.observe.access_log import AccessLog
from balancer.observe.record import Record, Spans
from balancer.routing.policies import Choice, RoundRobin
from balancer.routing.prompt import Prompt


class NoSpans:
    def note(self, value: float) -> None:
        pass


class LogOnly:
    """Tells the access log, as ever, and counts nothing."""

    def __init__(self, log: AccessLog) -> None:
        self._log = log
        self._inter_token = NoSpans()

    def finished(self, record: Record) -> None:
        self._log.finished(record)

    def inter_token(self, replica: str) -> Spans:
        return self._inter_token


class WithoutMetrics(Balancer):
    def __init__(self, *arguments, **named) -> None:
        super().__init__(*arguments, **named)
        self.proxy.observer = LogOnly(self.access_log)


class CutsOnly(RoundRobin):
    """Cuts each prompt into routing blocks, and then takes turns."""

    reads_prompts = True

    def choose(self, members: Sequence[Member], prompt: Prompt) -> Choice:
        assert prompt.blocks
        return super().choose(members, prompt)


class WithoutChoice(Balancer):
    def __init__(self, *arguments, **named) -> None:
        super().__init__(*arguments, **named)
        self.service.admission.policy = CutsOnly()


if __name__ == "__main__":
    process.Balancer = {"metrics": WithoutMetrics, "choice": WithoutChoice}[sys.argv.pop(1)]
    sys.exit(__main__.main())
