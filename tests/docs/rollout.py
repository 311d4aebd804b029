"""A rolling update in time: the project's own rules, played with replicas that take a minute to load."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from balancer.contract.words import Status
from balancer.operate.controller import plan, rollout
from balancer.operate.controller.plan import Drain, Forget, Replica, Stage, Start, Stop
from balancer.operate.controller.rollout import RolloutStatus
from balancer.spec.schema import Operation
from tests.docs.svg import Picture

TOTAL = 3
LOAD, FINISH, END, AFTER = 60, 20, 3, 20  # seconds to load a model, to finish answers, to end; and shown after it all
LEFT, WIDE, ROW = 132, 760, 26
OPERATION = Operation()
KINDS = {"STARTING": "w", "READY": "g", "DRAINING": "l", "STOPPING": "p"}


@dataclass(frozen=True, slots=True)
class Seen:
    """What a replica did in one second."""

    second: int
    id: int
    version: int
    word: str


def played(surge: int) -> Iterator[Seen]:
    """Second by second, from the update's beginning until a little after only the new version is left."""
    replicas = {
        id: Replica(id, 1, Stage.RUNNING, status=Status.READY, ready_since=-1e6, was_ready=True)
        for id in range(1, TOTAL + 1)
    }
    since: dict[int, int] = {}
    now, end, last = 0, None, TOTAL
    while end is None or now < end + AFTER:
        for id, replica in list(replicas.items()):
            if replica.stage is Stage.RUNNING:
                is_loaded = now - replica.launched_at >= LOAD or replica.version == 1
                status = Status.READY if is_loaded else Status.STARTING
                replicas[id] = plan.observed(replica, status, 0, now, OPERATION)
            elif replica.stage is Stage.DRAINING and now - replica.drained_at >= FINISH:
                replicas[id] = replace(replica, status=Status.SHUTTING_DOWN)
            elif replica.stage is Stage.STOPPING and now - since[id] >= END:
                del replicas[id]
        step = rollout.next_step("rolling", replicas.values(), 2, TOTAL, surge)
        if step.status is RolloutStatus.DONE and end is None:
            end = now
        for action in plan.decide(replicas.values(), {1: step.old, 2: step.new}, last + 1, now, 600.0):
            match action:
                case Start(id, version):
                    last = max(last, id)
                    replicas[id] = plan.started(replicas.get(id, Replica(id, version)), now)
                case Drain(id):
                    replicas[id] = replace(plan.drained(replicas[id], now), status=Status.DRAINING)
                case Stop(id):
                    replicas[id], since[id] = replace(replicas[id], stage=Stage.STOPPING), now
                case Forget(id):
                    del replicas[id]
        for replica in replicas.values():
            word = "STOPPING" if replica.stage is Stage.STOPPING else replica.status or "STARTING"
            yield Seen(now, replica.id, replica.version, "DRAINING" if word == "SHUTTING_DOWN" else word)
        now += 1


def panel(p: Picture, top: float, title: str, seen: Sequence[Seen], longest: int) -> None:
    ids = sorted({one.id for one in seen})
    ready = [sum(one.word == "READY" for one in seen if one.second == second) for second in range(seen[-1].second + 1)]
    p.text(22, top, title, "b")
    p.text(LEFT + WIDE, top, f"never fewer than {min(ready)} ready; done after {len(ready) - AFTER} s", "s e")
    for tick in range(0, longest + 1, 30):
        x = LEFT + WIDE * tick / longest
        p.line((x, top + 14), (x, top + 18 + ROW * len(ids)))
        p.text(x, top + 32 + ROW * len(ids), f"{tick} s", "s m")
    for row, id in enumerate(ids):
        mine = [one for one in seen if one.id == id]
        y = top + 16 + ROW * row
        p.text(LEFT - 10, y + 15, f"{id} · version {mine[0].version}", "s e")
        start = 0
        for at in range(1, len(mine) + 1):
            if at == len(mine) or mine[at].word != mine[start].word:
                x, width = LEFT + WIDE * mine[start].second / longest, WIDE * (at - start) / longest
                p.bar(x, y, width - 0.6, ROW - 6, KINDS[mine[start].word], f"replica {id}: {mine[start].word}")
                start = at


def picture() -> str:
    spare, full = list(played(1)), list(played(0))
    longest = -(-max(spare[-1].second, full[-1].second) // 30) * 30
    heights = [16 + ROW * len({one.id for one in seen}) + 60 for seen in (spare, full)]
    p = Picture(
        920,
        74 + sum(heights),
        "A rolling update in time",
        f"{TOTAL} replicas that take {LOAD} s to load and {FINISH} s to finish their answers are replaced one by one, "
        "with a spare GPU and without.",
    )
    p.text(22, 38, f"A rolling update of {TOTAL} replicas", "h")
    x = 360
    for word, kind in (("loading", "w"), ("ready", "g"), ("finishing its answers", "l"), ("ending", "p")):
        p.bar(x, 27, 14, 14, kind)
        p.text(x + 20, 38, word, "s")
        x += 46 + 7.2 * len(word)
    panel(p, 78, "with a spare GPU", spare, longest)
    panel(p, 78 + heights[0], "without", full, longest)
    return p.document()
