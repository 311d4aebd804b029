"""How many replicas the load needs. Pure: clock and load are passed in, times are in seconds.

SkyServe wants one replica for each `target_qps_per_replica` of the last minute's request rate, and changes the number
only after the load has called for it without a break for `upscale_delay_seconds` or `downscale_delay_seconds`: a single
reading to the contrary restarts the wait. Here four fifths of that time suffice, so that jitter delays no change, while
a shorter burst causes none.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from balancer.spec.schema import MOST_REPLICAS
from balancer.spec.service_file import Spec

# Seconds over which requests are counted: SkyServe's AUTOSCALER_QPS_WINDOW_SIZE_SECONDS.
WINDOW = 60.0
# Share of a delay during which the load must have called for the change.
SHARE = 0.8
# Seconds for which the service counts as full after it has refused a request.
FULL = 10.0


@dataclass(frozen=True, slots=True)
class Rule:
    """What `replica_policy` and `x-groundserve` say. One of the two targets is given."""

    least: int
    # The maximum that file and machine allow.
    most: int
    requests_per_second: float | None = None
    in_flight: float | None = None
    upscale_delay: float = 300.0
    downscale_delay: float = 1200.0
    # Replicas to have beyond what the load needs.
    spare: int = 0


def rule_for(spec: Spec, fits: int | None, resources: str) -> Rule | None:
    """The rule in a service file; None if the number of replicas does not depend on the load.

    `fits` is how many replicas the machine holds; `resources`, like "1x L4", picks one of the targets by GPU type.
    """
    policy = spec.service.replica_policy
    if policy is None or not spec.autoscales:
        return None
    target = policy.target_qps_per_replica
    limits = (limit for limit in (policy.max_replicas, fits) if limit is not None)
    return Rule(
        least=policy.min_replicas,
        most=max(policy.min_replicas, min(limits, default=MOST_REPLICAS)),
        requests_per_second=_of_type(target, resources) if isinstance(target, Mapping) else target,
        in_flight=spec.operation.target_in_flight_per_replica,
        upscale_delay=policy.upscale_delay_seconds,
        downscale_delay=policy.downscale_delay_seconds,
        spare=policy.num_overprovision,
    )


def _of_type(targets: Mapping[str, float], resources: str) -> float:
    """The target for our GPU, written "L4" or "L4:1"; the lowest one if the file does not name our GPU."""
    count, _, kind = resources.partition("x ")
    return targets.get(f"{kind}:{count}", targets.get(kind, min(targets.values())))


class Autoscaler:
    """Remembers how many replicas the load has called for, as far back as the longer delay."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._arrivals: deque[tuple[float, int]] = deque()
        # The number of replicas that the load called for, each with the time when it began to.
        self._asked: deque[tuple[float, int]] = deque()
        # When the target last rose: what the load called for before that is no reason to scale down.
        self._rose_at = -math.inf
        self._full_until = -math.inf
        self._skipped = 0.0

    def skip(self, seconds: float) -> None:
        """Nothing is known of so many seconds before now: they do not count as time with or without load."""
        self._skipped += seconds

    def target(self, now: float, current: int, arrived: int, in_flight: int, queued: int, turned_away: int = 0) -> int:
        """How many replicas there should be. Call it every second or so.

        `arrived` counts the requests since the last call, `in_flight` those at replicas, `queued` those that wait, and
        `turned_away` those refused since the last call because everything was full. After a refusal one more replica is
        called for, whatever the target says.
        """
        now -= self._skipped
        self._arrivals.append((now, arrived))
        while self._arrivals[0][0] <= now - WINDOW:
            self._arrivals.popleft()
        asked = self._asked_for(in_flight + queued)
        if turned_away:
            self._full_until = now + FULL
        if now < self._full_until:
            asked = self.clipped(max(asked, current + 1))
        self._note(now, asked)
        wanted = self._wanted(now, current, asked, is_waiting=queued > 0 or arrived > 0)
        if wanted > current:
            self._rose_at = now
        return wanted

    def _wanted(self, now: float, current: int, asked: int, is_waiting: bool) -> int:
        if current == 0 and is_waiting:
            return self.clipped(max(1, asked))
        if (up := self._at_least(now, self.rule.upscale_delay)) > current:
            return up
        if (down := self._at_most(now, self.rule.downscale_delay)) is not None and down < current:
            return down
        return self.clipped(max(current, self.rule.least + self.rule.spare))

    def _asked_for(self, present: int) -> int:
        if self.rule.in_flight is not None:
            count = math.ceil(present / self.rule.in_flight)
        else:
            assert self.rule.requests_per_second is not None
            rate = sum(count for _, count in self._arrivals) / WINDOW
            count = math.ceil(rate / self.rule.requests_per_second)
        return self.clipped(max(count, self.rule.least) + self.rule.spare)

    def clipped(self, count: int) -> int:
        """The number closest to `count` that the rule allows."""
        return max(self.rule.least, min(count, self.rule.most))

    def _note(self, now: float, asked: int) -> None:
        if not self._asked or self._asked[-1][1] != asked:
            self._asked.append((now, asked))
        horizon = now - max(self.rule.upscale_delay, self.rule.downscale_delay)
        while len(self._asked) > 1 and self._asked[1][0] <= horizon:
            self._asked.popleft()

    def _at_least(self, now: float, delay: float) -> int:
        """The highest number that the load called for, or exceeded, for SHARE of the last `delay` seconds; else 0."""
        time = 0.0
        for count, seconds in sorted(self._times(now, now - delay).items(), reverse=True):
            time += seconds
            if time >= SHARE * delay:
                return count
        return 0

    def _at_most(self, now: float, delay: float) -> int | None:
        """The lowest number that the load stayed at, or below, for SHARE of the last `delay` seconds; else None.

        Only the time since the target last rose counts.
        """
        time = 0.0
        for count, seconds in sorted(self._times(now, max(now - delay, self._rose_at)).items()):
            time += seconds
            if time >= SHARE * delay:
                return count
        return None

    def _times(self, now: float, since: float) -> dict[int, float]:
        """For how many seconds since `since` the load called for each number; always includes the current one."""
        times = {self._asked[-1][1]: 0.0}
        end = now
        for began, count in reversed(self._asked):
            if end <= since:
                break
            times[count] = times.get(count, 0.0) + end - max(began, since)
            end = began
        return times
