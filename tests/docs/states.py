"""A replica's states and what leads from one to another. Each step is taken by a real fleet before it is drawn."""

from collections.abc import Iterator
from dataclasses import dataclass

from balancer.contract.words import State, Status
from balancer.fleet.ejection import CONSECUTIVE
from balancer.fleet.fleet import Fleet
from balancer.spec.settings import ReadinessProbe, Settings
from tests.docs.svg import Picture, Point
from tests.support.fleets import Clock, claimed, fail, fleet_of, listed, make_ready

WIDE, HIGH = 190, 50
PLACES: dict[Status, Point] = {
    Status.PROVISIONING: (22, 70),
    Status.STARTING: (272, 70),
    Status.READY: (522, 70),
    Status.DRAINING: (784, 70),
    Status.FAILED: (22, 200),
    Status.NOT_READY: (370, 200),
    Status.EJECTED: (576, 200),
    Status.SHUTTING_DOWN: (784, 200),
    Status.FAILED_INITIAL_DELAY: (160, 320),
    Status.FAILED_PROBING: (370, 320),
}
KINDS = {Status.READY: "mine"} | dict.fromkeys((s for s in Status if s.startswith("FAILED")), "bad")
KINDS |= dict.fromkeys((Status.NOT_READY, Status.EJECTED), "wait")


@dataclass(frozen=True, slots=True)
class Step:
    """One arrow: its way, and its words with the place where they begin (or end, or their middle, by `kind`)."""

    start: Status
    end: Status
    way: tuple[Point, ...]
    at: Point
    says: tuple[str, ...]
    kind: str = "s m"


PROBE, SETTINGS = ReadinessProbe(), Settings()
DELAY, PATIENCE = f"{PROBE.initial_delay_seconds:g} s", f"{PROBE.consecutive_failure_threshold_timeout:g} s"
STEPS = (
    Step(Status.PROVISIONING, Status.STARTING, ((212, 95), (272, 95)), (242, 86), ("it runs",)),
    Step(Status.STARTING, Status.READY, ((462, 95), (522, 95)), (491, 86), ("ready",)),
    Step(Status.READY, Status.DRAINING, ((712, 95), (784, 95)), (748, 86), ("drain",)),
    Step(
        Status.DRAINING,
        Status.SHUTTING_DOWN,
        ((879, 120), (879, 200)),
        (888, 156),
        ("its last answer", "has ended"),
        "s",
    ),
    Step(
        Status.READY,
        Status.NOT_READY,
        ((532, 120), (532, 200)),
        (522, 156),
        ("a connection refused,", "or two probes failed"),
        "s e",
    ),
    Step(Status.NOT_READY, Status.READY, ((550, 200), (550, 120)), (0, 0), ()),
    Step(
        Status.READY,
        Status.EJECTED,
        ((640, 120), (640, 200)),
        (671, 270),
        (
            f"{CONSECUTIVE} failures in a row, or bad",
            "answers where others give good ones;",
            f"back after {SETTINGS.ejection_time:g} s, later each time",
        ),
    ),
    Step(Status.EJECTED, Status.READY, ((662, 200), (662, 120)), (0, 0), ()),
    Step(
        Status.STARTING,
        Status.FAILED_INITIAL_DELAY,
        ((330, 120), (330, 320)),
        (320, 262),
        (f"not ready in {DELAY}",),
        "s e",
    ),
    Step(
        Status.NOT_READY,
        Status.FAILED_PROBING,
        ((465, 250), (465, 320)),
        (456, 290),
        (f"failing for {PATIENCE}",),
        "s e",
    ),
    Step(
        Status.STARTING,
        Status.FAILED,
        ((300, 120), (300, 158), (117, 158), (117, 200)),
        (128, 180),
        ("its starts fail",),
        "s",
    ),
)


def taken() -> Iterator[tuple[Status, Status]]:
    """The steps that a fleet's record takes, each by what the picture says leads to it."""
    clock = Clock()

    def pair(**first: str) -> Fleet:
        fleet = fleet_of(2, clock)
        fleet.reconcile([listed(3, **first), *(member.listing for member in fleet.members.values())])
        return fleet

    def now(fleet: Fleet) -> Status:
        return fleet.members[3].status(clock())

    fleet = pair(state=State.PROVISIONING)
    before = now(fleet)
    fleet.reconcile([listed(3), listed(1), listed(2)])
    yield before, (before := now(fleet))
    make_ready(fleet, fleet.members[3])
    yield before, (before := now(fleet))
    fail(fleet, fleet.members[3])
    yield before, (before := now(fleet))
    clock.move(fleet.settings.ejection_time)
    yield before, (before := now(fleet))
    fleet.refused(fleet.members[3])
    yield before, (before := now(fleet))
    make_ready(fleet, fleet.members[3])
    yield before, (before := now(fleet))
    with claimed(fleet, fleet.members[1], fleet.members[2]) as member:
        fleet.drain(member)
        yield before, (before := now(fleet))
    yield before, now(fleet)
    fleet = pair()
    make_ready(fleet, fleet.members[3])
    fleet.refused(fleet.members[3])
    before = now(fleet)
    clock.move(PROBE.consecutive_failure_threshold_timeout + 1)
    yield before, now(fleet)
    fleet = pair()
    before = now(fleet)
    fleet.reconcile([listed(3, state=State.FAILED), listed(1), listed(2)])
    yield before, now(fleet)
    fleet = pair()
    before = now(fleet)
    clock.move(PROBE.initial_delay_seconds + 1)
    yield before, now(fleet)


def picture() -> str:
    real, drawn = set(taken()), {(step.start, step.end) for step in STEPS}
    if real != drawn or PLACES.keys() != set(Status):
        raise ValueError(f"tests/docs/states.py draws other steps than a fleet takes: {sorted(real ^ drawn)}")
    p = Picture(996, 392, "The states of a replica", "; ".join(f"{s.start} to {s.end}" for s in STEPS) + ".")
    p.text(22, 38, "The states of a replica", "h")
    p.text(974, 38, "requests go only to replicas that are READY", "s e")
    for step in STEPS:
        kind = (
            "fail" if step.end in KINDS and KINDS[step.end] == "bad" else "path" if step.end is Status.READY else "line"
        )
        p.arrow(step.way, kind)
        for number, line in enumerate(step.says):
            p.text(step.at[0], step.at[1] + 15 * number, line, step.kind)
    for status, (x, y) in PLACES.items():
        p.box(x, y, WIDE, HIGH, (status,), KINDS.get(status, "card"))
    return p.document()
