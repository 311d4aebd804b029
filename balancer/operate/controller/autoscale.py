"""How many replicas the load asks for. Pure: clock and load are passed in, times in seconds.

SkyServe's rule is one replica for each `target_qps_per_replica` of the last minute's request rate, and a change only
after the load asked for it `upscale_delay_seconds` or `downscale_delay_seconds` long without a break: one look the
other way begins anew. Here the load has to ask for it in four fifths of that time, so that jitter delays nothing, and
a burst that is shorter than that changes nothing.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from balancer.spec.service_file import Spec

# Seconds over which requests are counted: SkyServe's AUTOSCALER_QPS_WINDOW_SIZE_SECONDS.
WINDOW = 60.0
# Share of a delay in which the load must have asked for the change.
SHARE = 0.8
# Seconds for which a request that was refused says that all is full.
FULL = 10.0


@dataclass(frozen=True, slots=True)
class Rule:
    """What `replica_policy` and `x-groundserve` say. One of the two targets is given."""

    least: int
    # The most that file and machine allow; None: no limit.
    most: int | None
    requests_per_second: float | None = None
    in_flight: float | None = None
    upscale_delay: float = 300.0
    downscale_delay: float = 1200.0
    # Replicas to have beyond what the load asks for.
    spare: int = 0


def rule_for(spec: Spec, fits: int | None, resources: str) -> Rule | None:
    """None where the file does not leave the number to the load.

    `fits` is how many replicas the machine holds; `resources`, like "1x L4", picks one of the targets by GPU type.
    """
    policy = spec.service.replica_policy
    if policy is None or not spec.autoscales:
        return None
    target = policy.target_qps_per_replica
    limits = [limit for limit in (policy.max_replicas, fits) if limit is not None]
    return Rule(
        least=policy.min_replicas,
        most=max(policy.min_replicas, min(limits)) if limits else None,
        requests_per_second=_of_type(target, resources) if isinstance(target, Mapping) else target,
        in_flight=spec.operation.target_in_flight_per_replica,
        upscale_delay=policy.upscale_delay_seconds,
        downscale_delay=policy.downscale_delay_seconds,
        spare=policy.num_overprovision,
    )


def _of_type(targets: Mapping[str, float], resources: str) -> float:
    """The target for our GPU, written "L4" or "L4:1"; the most cautious one where the file does not name it."""
    count, _, kind = resources.partition("x ")
    return targets.get(f"{kind}:{count}", targets.get(kind, min(targets.values())))


class Autoscaler:
    """Remembers what the load asked for, as long as the longest delay."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._arrivals: deque[tuple[float, int]] = deque()
        # What was asked for, from when on.
        self._asked: deque[tuple[float, int]] = deque()
        # What was asked for before there were as many replicas is no reason to have fewer again.
        self._rose_at = -math.inf
        self._full_until = -math.inf

    def target(self, now: float, current: int, arrived: int, in_flight: int, queued: int, turned_away: int = 0) -> int:
        """How many replicas there should be. Call it every second or so.

        `arrived` are the requests since the last call, `in_flight` those at replicas, `queued` those that wait,
        `turned_away` those that were refused since the last call because all was full: whatever the target says, such a
        load asks for one replica more.
        """
        self._arrivals.append((now, arrived))
        while self._arrivals[0][0] <= now - WINDOW:
            self._arrivals.popleft()
        asked = self._asked_for(in_flight + queued)
        if turned_away:
            self._full_until = now + FULL
        if now < self._full_until:
            asked = self._clipped(max(asked, current + 1))
        self._note(now, asked)
        wanted = self._wanted(now, current, asked, is_waiting=queued > 0 or arrived > 0)
        if wanted > current:
            self._rose_at = now
        return wanted

    def _wanted(self, now: float, current: int, asked: int, is_waiting: bool) -> int:
        if current == 0 and is_waiting:
            return self._clipped(max(1, asked))
        if (up := self._at_least(now, self.rule.upscale_delay)) > current:
            return up
        if (down := self._at_most(now, self.rule.downscale_delay)) is not None and down < current:
            return down
        return self._clipped(max(current, self.rule.least + self.rule.spare))

    def _asked_for(self, present: int) -> int:
        if self.rule.in_flight is not None:
            count = math.ceil(present / self.rule.in_flight)
        else:
            assert self.rule.requests_per_second is not None
            rate = sum(count for _, count in self._arrivals) / WINDOW
            count = math.ceil(rate / self.rule.requests_per_second)
        return self._clipped(max(count, self.rule.least) + self.rule.spare)

    def _clipped(self, count: int) -> int:
        return max(self.rule.least, count if self.rule.most is None else min(count, self.rule.most))

    def _note(self, now: float, asked: int) -> None:
        if not self._asked or self._asked[-1][1] != asked:
            self._asked.append((now, asked))
        horizon = now - max(self.rule.upscale_delay, self.rule.downscale_delay)
        while len(self._asked) > 1 and self._asked[1][0] <= horizon:
            self._asked.popleft()

    def _at_least(self, now: float, delay: float) -> int:
        """The most that was asked for, or more, in its share of the last `delay` seconds; 0 when nothing was."""
        time = 0.0
        for count, seconds in sorted(self._times(now, now - delay).items(), reverse=True):
            time += seconds
            if time >= SHARE * delay:
                return count
        return 0

    def _at_most(self, now: float, delay: float) -> int | None:
        """The least that was asked for, or less, in its share of the last `delay` seconds; None when nothing was."""
        time = 0.0
        for count, seconds in sorted(self._times(now, max(now - delay, self._rose_at)).items()):
            time += seconds
            if time >= SHARE * delay:
                return count
        return None

    def _times(self, now: float, since: float) -> dict[int, float]:
        """How long each number was asked for since then, in seconds; what is asked for now is there in any case."""
        times = {self._asked[-1][1]: 0.0}
        end = now
        for began, count in reversed(self._asked):
            if end <= since:
                break
            times[count] = times.get(count, 0.0) + end - max(began, since)
            end = began
        return times
