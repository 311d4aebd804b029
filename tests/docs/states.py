"""A replica's states and what leads from one to another. Each step is taken by a real fleet before it is drawn."""

from collections.abc import Iterator
from dataclasses import dataclass

from balancer.contract.words import State, Status
from balancer.fleet.ejection import CONSECUTIVE
from balancer.fleet.fleet import Fleet
from balancer.fleet.tenancy import Said, TenantState
from balancer.spec.settings import ReadinessProbe, Settings
from tests.docs.svg import Picture, Point
from tests.support.fleets import Clock, claimed, fail, fleet_of, listed, make_ready

WIDE, HIGH = 190, 50
PLACES: dict[Status, Point] = {
    Status.PROVISIONING: (22, 146),
    Status.FETCHING: (147, 62),
    Status.STARTING: (272, 146),
    Status.READY: (522, 146),
    Status.DOZING: (462, 62),
    Status.ASLEEP: (712, 62),
    Status.DRAINING: (784, 146),
    Status.FAILED: (22, 276),
    Status.NOT_READY: (370, 276),
    Status.EJECTED: (576, 276),
    Status.SHUTTING_DOWN: (784, 276),
    Status.FAILED_INITIAL_DELAY: (160, 396),
    Status.FAILED_PROBING: (370, 396),
}
KINDS = {Status.READY: "mine"} | dict.fromkeys((s for s in Status if s.startswith("FAILED")), "bad")
KINDS |= dict.fromkeys((Status.DOZING, Status.ASLEEP, Status.NOT_READY, Status.EJECTED), "wait")


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
    Step(Status.PROVISIONING, Status.FETCHING, ((180, 146), (180, 112)), (172, 134), ("its model is not here",), "s e"),
    Step(Status.FETCHING, Status.STARTING, ((304, 112), (304, 146)), (312, 134), ("all of it is",), "s"),
    Step(Status.PROVISIONING, Status.STARTING, ((212, 171), (272, 171)), (242, 162), ("it runs",)),
    Step(Status.STARTING, Status.READY, ((462, 171), (522, 171)), (491, 162), ("ready",)),
    Step(Status.READY, Status.DOZING, ((560, 146), (560, 112)), (550, 134), ("others have its GPU",), "s e"),
    Step(Status.DOZING, Status.READY, ((590, 112), (590, 146)), (600, 134), ("its turn",), "s"),
    Step(Status.DOZING, Status.ASLEEP, ((652, 87), (712, 87)), (681, 78), ("idle",)),
    Step(Status.ASLEEP, Status.READY, ((742, 112), (742, 129), (690, 129), (690, 146)), (0, 0), ()),
    Step(Status.READY, Status.DRAINING, ((712, 171), (784, 171)), (748, 162), ("drain",)),
    Step(
        Status.DRAINING,
        Status.SHUTTING_DOWN,
        ((879, 196), (879, 276)),
        (888, 232),
        ("its last answer", "has ended"),
        "s",
    ),
    Step(
        Status.READY,
        Status.NOT_READY,
        ((532, 196), (532, 276)),
        (522, 232),
        ("a connection refused,", "or two probes failed"),
        "s e",
    ),
    Step(Status.NOT_READY, Status.READY, ((550, 276), (550, 196)), (0, 0), ()),
    Step(
        Status.READY,
        Status.EJECTED,
        ((640, 196), (640, 276)),
        (671, 346),
        (
            f"{CONSECUTIVE} failures in a row, or bad",
            "answers where others give good ones;",
            f"back after {SETTINGS.ejection_time:g} s, later each time",
        ),
    ),
    Step(Status.EJECTED, Status.READY, ((662, 276), (662, 196)), (0, 0), ()),
    Step(
        Status.STARTING,
        Status.FAILED_INITIAL_DELAY,
        ((330, 196), (330, 396)),
        (320, 338),
        (f"not ready in {DELAY}",),
        "s e",
    ),
    Step(
        Status.NOT_READY,
        Status.FAILED_PROBING,
        ((465, 326), (465, 396)),
        (456, 366),
        (f"failing for {PATIENCE}",),
        "s e",
    ),
    Step(
        Status.STARTING,
        Status.FAILED,
        ((300, 196), (300, 234), (117, 234), (117, 276)),
        (128, 256),
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
    fleet.reconcile([listed(3, state=State.FETCHING), listed(1), listed(2)])
    yield before, (before := now(fleet))
    fleet.reconcile([listed(3), listed(1), listed(2)])
    yield before, now(fleet)
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
    before = now(fleet)
    for state in (TenantState.DOZING, TenantState.AWAKE, TenantState.DOZING, TenantState.ASLEEP, TenantState.AWAKE):
        fleet.said(fleet.members[3], Said(state, ("GPU",)))
        yield before, (before := now(fleet))
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
    p = Picture(996, 468, "The states of a replica", "; ".join(f"{s.start} to {s.end}" for s in STEPS) + ".")
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
