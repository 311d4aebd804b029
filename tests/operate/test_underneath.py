"""What happens to a service when something underneath fails for a while: the disk, its controller's own work."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from balancer.contract.listing import Listing, ReplicaListing
from balancer.contract.status import ReplicaRow, ServiceRow, Snapshot
from balancer.contract.words import ServiceStatus, Status
from balancer.errors import ConfigError
from balancer.operate.commands import change
from balancer.operate.controller import controller, plan
from balancer.operate.controller.controller import Controller
from balancer.operate.controller.plan import Replica, Stage
from balancer.operate.controller.troubles import Troubles
from balancer.operate.controller.wanted import Wanted
from balancer.operate.engines.engine import CannotStart, Ended, Survivor
from balancer.operate.engines.typed import typed
from balancer.operate.recipe.recipe import Recipe, recipe
from balancer.spec.schema import Operation
from balancer.spec.service_file import parse
from tests.operate.command_line import LAB, Groundserve
from tests.operate.streaming import streaming
from tests.support.needed import lacking
from tests.support.until import until, wait_until

# A full disk


@pytest.fixture
def disk(groundserve: Groundserve) -> Iterator[Path]:
    """The state folder on a small disk of its own."""
    folder = groundserve.folder / "state"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode != 0:
        lacking(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    groundserve.stop_all()
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """Leaves no room, and returns the file to remove for some."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return ballast


def processes(groundserve: Groundserve, words: str) -> list[int]:
    return [pid for pid, line in groundserve.processes().items() if words in line and "leash" not in line]


def test_an_update_on_a_full_disk_ends_nothing(groundserve: Groundserve, disk: Path) -> None:
    up = groundserve.up(groundserve.service("lab")).until_up()
    endpoint = groundserve.status("lab")["service"]["endpoint"]
    ballast = fill(disk)
    with streaming(endpoint, clients=2) as seen:
        groundserve("update", "lab", groundserve.service("lab", f"export NEW=1\n{LAB}", queue_size=7))
        full = groundserve.until("lab", lambda status: "No space left on device" in status["service"].get("reason", ""))
        assert "since" in full["service"]["reason"]
        ballast.unlink()
        groundserve.until("lab", lambda status: not status["service"].get("reason"))
    assert seen.failed == []
    assert up.check_alive()
    assert "works again" in up.text


def test_settings_that_cannot_be_written_are_no_update(groundserve: Groundserve, disk: Path) -> None:
    groundserve.up(groundserve.service("lab")).until_up()
    ballast = fill(disk)
    said = groundserve("update", "lab", groundserve.service("lab", queue_size=7), code=1)
    assert "lab stays at version 1" in said
    assert "No space left on device" in said
    status = groundserve.status("lab")
    assert (status["service"]["version"], status["service"]["ready"]) == ("1", 2)
    ballast.unlink()
    groundserve("update", "lab", groundserve.service("lab", queue_size=7))


def test_a_balancer_that_dies_on_a_full_disk_comes_back(groundserve: Groundserve, disk: Path) -> None:
    groundserve.up(groundserve.service("lab")).until_up()
    endpoint = groundserve.status("lab")["service"]["endpoint"]
    fill(disk)
    replicas = sorted(processes(groundserve, "tests.lab.replica"))
    (balancer,) = processes(groundserve, "-m balancer ")
    os.kill(balancer, signal.SIGKILL)
    wait_until(lambda: processes(groundserve, "-m balancer "), fits=lambda found: found and found != [balancer])
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert httpx.post(f"{endpoint}/v1/chat/completions", json=chat, timeout=60).status_code == 200
    assert sorted(processes(groundserve, "tests.lab.replica")) == replicas


# An outage that is longer than the patience of a first start


def test_what_served_once_is_started_again_for_ever(groundserve: Groundserve) -> None:
    store = groundserve.folder / "store"
    store.touch()
    script = f"[ -e {store} ] || exit 1\n{LAB}"
    patience = {"restart_backoff": 0.02, "max_restart_backoff": 0.1, "restart_limit": 2}
    up = groundserve.up(groundserve.service("lab", script, replicas=1, **patience)).until_up()
    store.unlink()
    os.kill(processes(groundserve, "tests.lab.replica")[0], signal.SIGKILL)
    wait_until(lambda: up.text.count("starts again in"), fits=lambda count: count > 6)
    assert groundserve.status("lab")["service"]["status"] != "FAILED"
    store.touch()
    groundserve.until("lab", lambda status: status["service"]["ready"] == 1)
    assert "given up" not in up.text


def test_a_version_that_served_is_never_given_up() -> None:
    operation = Operation(restart_backoff=1, max_restart_backoff=8, restart_limit=2)
    replica, now = Replica(1, 1), 0.0
    for over in [Ended(1, "it died"), Ended(1, "not found", is_hopeless=True)] * 50:
        replica = plan.ended(plan.started(replica, now), over, now, operation, has_served=True)
        assert replica.stage is Stage.WAITING
        assert 0 < replica.start_at - now <= 8
        now = replica.start_at


def test_a_balancer_that_hangs_is_shown_and_replaced(groundserve: Groundserve) -> None:
    groundserve.up(groundserve.service("lab", replicas=1)).until_up()
    endpoint = groundserve.status("lab")["service"]["endpoint"]
    (balancer,) = processes(groundserve, "-m balancer ")
    os.kill(balancer, signal.SIGSTOP)
    hung = groundserve.until("lab", lambda status: status["service"]["status"] == "NO_BALANCER")
    assert "its balancer has not answered since" in hung["service"]["reason"]
    assert hung["service"]["ready"] == 0
    groundserve("status", code=4)
    wait_until(lambda: processes(groundserve, "-m balancer "), fits=lambda found: found and balancer not in found)
    groundserve.until("lab", lambda status: status["service"]["ready"] == 1 and not status["service"].get("reason"))
    assert httpx.get(f"{endpoint}/health", timeout=60).status_code == 200


def test_a_controller_that_hangs_is_taken_down(groundserve: Groundserve, monkeypatch: pytest.MonkeyPatch) -> None:
    up = groundserve.up(groundserve.service("lab", replicas=1)).until_up()
    up.signal(signal.SIGSTOP)
    monkeypatch.setenv("XDG_STATE_HOME", groundserve.environ["XDG_STATE_HOME"])
    for name in ("_SILENCE", "_LOOK", "_PATIENCE"):
        monkeypatch.setattr(change, name, 1.0)
    assert change.down(["lab"], None) == 0
    assert up.wait() == -signal.SIGKILL
    groundserve.until_nothing_runs()


# Work of the controller that fails


class Underneath:
    """An engine and a balancer that do nothing, except that a method named in `broken` raises what is there."""

    name = "nothing"
    most_replicas = 9
    outlives_controller = False
    endpoint = admin = "nowhere"
    is_leaving = False
    has_answered = True
    starts = 1
    fields: Mapping[str, str] = {}

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.broken: dict[str, Exception] = {}
        self.replicas: dict[int, ReplicaListing] = {}
        self.drained: set[int] = set()
        self.is_renewing = False
        self.renewed: list[int] = []
        self.holds_renewals = asyncio.Event()
        self.holds_renewals.set()
        self.holds_starts = asyncio.Event()
        self.holds_starts.set()
        self.told = 0
        self.left: dict[int, Recipe] = {}
        self.facts: dict[int, dict[str, float]] = {}
        self.pending: set[int] = set()
        self.started: list[int] = []
        self.listed: list[set[int | None]] = []

    def _may(self, work: str) -> None:
        if work in self.broken:
            raise self.broken[work]

    async def found(self) -> tuple[Survivor, ...]:
        self._may("found")
        self.replicas = {
            id: replace(one_of(id, recipe), **self.facts.get(id, {}))  # type: ignore[arg-type]
            for id, recipe in self.left.items()
        }
        return tuple(Survivor(id, self.replicas[id], recipe.digest) for id, recipe in self.left.items())

    async def start(self, id: int, recipe: Recipe) -> None:
        self._may("start")
        await self.holds_starts.wait()
        self.started.append(id)
        self.replicas[id] = one_of(id, recipe)

    async def stop(self, what: object, grace: float = 0) -> None:
        if isinstance(what, int):
            self._may("stop")
            self.replicas.pop(what, None)

    def running(self) -> Mapping[int, ReplicaListing]:
        return dict(self.replicas)

    def ended(self) -> tuple[Ended, ...]:
        self._may("ended")
        return ()

    def lost(self, suspects: object) -> Mapping[int, str]:
        return {}

    async def close(self) -> None:
        self._may("close")

    async def keep_up(self) -> None:
        self._may("keep_up")

    async def renew(self, recipe: Recipe) -> None:
        assert not self.is_renewing, "older settings may arrive after newer ones"
        self.is_renewing = True
        try:
            await asyncio.sleep(0)
            await self.holds_renewals.wait()
            self._may(f"renew {recipe.version}")
        finally:
            self.is_renewing = False
        self.renewed.append(recipe.version)

    async def replace(self) -> None:
        pass

    async def drain(self, id: int) -> bool:
        self.drained.add(id)
        return True

    def _status(self, id: int | None) -> Status:
        if id in self.drained:
            return Status.SHUTTING_DOWN
        return Status.STARTING if id in self.pending else Status.READY

    async def tell(self, listing: Listing) -> Snapshot | None:
        if "tell" in self.broken:
            return None
        self.told += 1
        self.listed.append({one.id for one in listing.replicas})
        reason = listing.service.reason if listing.service else ""
        rows = tuple(
            ReplicaRow.of(
                one,
                id=one.id,
                launched_seconds=0.0,
                status=self._status(one.id),
            )
            for one in listing.replicas
        )
        service = ServiceRow("x", "1", ServiceStatus.READY, 1.0, "", "", len(rows), len(rows), 0, 0, reason=reason)
        return Snapshot(service, rows)


def one_of(id: int, recipe: Recipe) -> ReplicaListing:
    return ReplicaListing(f"x-{id}", "http://nowhere", id=id, version=recipe.version, launched_seconds=0.0)


def two(version: int = 1, program: str = "x") -> Recipe:
    text = f"service: {{replicas: 2}}\nrun: {program} --port $GROUNDSERVE_PORT\n"
    return recipe(parse(text, source="x.yaml", name="x"), version)


def controlled(
    work: Callable[[Controller, Underneath, list[str]], object],
    at_the_end: dict[str, Exception] | None = None,
    wanted: Wanted | None = None,
) -> list[str]:
    """Runs a controller, of two replicas unless `wanted` says otherwise, while `work` goes on; returns what it said.

    `at_the_end`: what is broken while it ends; then something may be left.
    """
    said: list[str] = []

    async def run() -> None:
        under = Underneath()
        meant = wanted or Wanted(two())
        made = Controller("x", meant, under, under, said.append, lambda _: None, lambda _: None)  # type: ignore[arg-type]
        running = asyncio.create_task(made.run())
        try:
            await work(made, under, said)  # type: ignore[misc]
        finally:
            under.broken = dict(at_the_end or {})
            made.close()
            await asyncio.wait_for(running, 30)
        assert under.replicas == {}
        assert made.is_cleared is not bool(at_the_end)

    asyncio.run(run())
    return said


@pytest.mark.parametrize("what", ["ended", "keep_up"])
@pytest.mark.parametrize(
    "failure", [RuntimeError("unheard of"), OSError(28, "No space left on device"), CannotStart("Docker is away")]
)
def test_a_step_that_raises_is_tried_again(what: str, failure: Exception) -> None:
    async def work(made: Controller, under: Underneath, said: list[str]) -> None:
        await until(lambda: made.snapshot.service.ready == 2)
        under.broken[what] = failure
        await until(lambda: (failure.args[-1] in made.snapshot.service.reason) or what == "ended", within=30)
        await until(lambda: any(failure.args[-1] in line for line in said), within=30)
        assert under.replicas.keys() == {1, 2}
        under.broken.clear()
        await until(lambda: any("works again" in line for line in said), within=60)
        await until(lambda: not made.snapshot.service.reason, within=60)

    said = controlled(work)
    assert sum(failure.args[-1] in line for line in said) == 1, "it is said once, not with each attempt"


def test_a_start_that_raises_is_one_replicas_affair() -> None:
    async def work(made: Controller, under: Underneath, said: list[str]) -> None:
        await until(lambda: made.snapshot.service.ready == 2)
        under.broken["start"] = OSError(5, "Input/output error")
        made.scale(3)
        await until(lambda: any("x-3 ended" in line for line in said), within=30)
        assert made.snapshot.service.ready >= 2
        under.broken.clear()
        await until(lambda: len(under.replicas) == 3, within=60)

    controlled(work)


def test_what_could_not_be_removed_is_not_forgotten() -> None:
    """A Docker that is away at the end keeps its containers: `status` and `down` have to know of them."""

    async def work(made: Controller, _under: Underneath, _: list[str]) -> None:
        await until(lambda: made.snapshot.service.ready == 2)

    said = controlled(work, {"close": CannotStart("Docker is away")})
    assert any("x may have left something running: groundserve down x removes it" in line for line in said)


def test_more_replicas_than_an_engine_can_have() -> None:
    async def work(made: Controller, under: Underneath, _: list[str]) -> None:
        with pytest.raises(ConfigError, match="x with 10 replicas: with --on nothing it can have 9 at most"):
            made.scale(10)
        assert made.wanted.target == 2
        made.scale(9)
        await until(lambda: len(under.replicas) == 9)

    controlled(work)


def test_nothing_can_be_asked_of_a_service_that_ends() -> None:
    """Nobody would act on it any more, so whoever waits for what comes of it would wait for ever."""

    async def work(made: Controller, under: Underneath, _: list[str]) -> None:
        await until(lambda: made.snapshot.service.ready == 2)
        made.close()
        await until(lambda: not under.replicas)
        for late in (made.update(two(2, "y"), "rolling"), made.update(two(2), "rolling"), made.replace_balancer()):
            with pytest.raises(ConfigError, match="x is being taken down"):
                await asyncio.wait_for(late, 5)
        for ask in (lambda: made.scale(3), lambda: made.replace_replica(1), made.abort):
            with pytest.raises(ConfigError, match="x is being taken down"):
                ask()

    controlled(work)


def test_a_start_that_takes_long_keeps_nothing_waiting() -> None:
    """A balancer that hears nothing for 10 s looks for replicas by itself."""

    async def work(made: Controller, under: Underneath, _: list[str]) -> None:
        await until(lambda: made.snapshot.service.ready == 2)
        under.holds_starts.clear()
        made.scale(3)
        await until(lambda: made.snapshot.service.wanted == 3)
        before = under.told
        await until(lambda: under.told > before + 3)
        assert under.replicas.keys() == {1, 2}
        under.holds_starts.set()
        await until(lambda: under.replicas.keys() == {1, 2, 3})

    controlled(work)


def test_an_engine_and_a_balancer_that_are_both_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where both are reached through an API server, which does not answer."""
    monkeypatch.setattr(controller, "_SILENCE", 0.1)

    async def work(made: Controller, under: Underneath, _: list[str]) -> None:
        await until(lambda: made.snapshot.service.ready == 2)
        under.broken["tell"] = CannotStart("nobody answers")
        under.replicas[1] = replace(under.replicas[1], reason="it is unknown whether it runs")
        await until(lambda: made.snapshot.service.status is ServiceStatus.NO_BALANCER, within=30)
        assert [row.reason for row in made.snapshot.replicas] == ["it is unknown whether it runs", ""]

    controlled(work)


def test_nothing_starts_before_it_is_known_what_runs() -> None:
    async def work(_: Controller, under: Underneath, said: list[str]) -> None:
        under.broken["found"] = CannotStart("Docker is away")
        await until(lambda: any("Docker is away" in line for line in said), within=30)
        assert under.replicas == {}
        under.broken.clear()
        await until(lambda: len(under.replicas) == 2, within=30)

    controlled(work)


def test_what_the_earlier_controller_drained_goes() -> None:
    """It was killed amid a scale from 4 to 2. Until the balancer says who drains, everybody may be needed."""

    async def work(made: Controller, under: Underneath, _: list[str]) -> None:
        under.left, under.drained = dict.fromkeys((1, 2, 3, 4), two()), {1, 2}
        under.broken["tell"] = TimeoutError()
        await until(lambda: len(made.replicas) == 4)
        made.replace_replica(3)
        await asyncio.sleep(1.2)
        assert under.replicas.keys() == {1, 2, 3, 4}
        assert under.drained == {1, 2}
        under.broken.clear()
        await until(lambda: under.replicas.keys() == {4, 5})
        await until(lambda: made.snapshot.service.ready == 2)

    controlled(work)


def test_what_serves_is_known_before_anything_is_drained() -> None:
    """The balancer is new, too, and looks at all of them anew. Two were told to end already and will not be ready."""

    async def work(_made: Controller, under: Underneath, _: list[str]) -> None:
        under.left, under.pending = dict.fromkeys((1, 2, 3, 4), two()), {1, 2, 3, 4}
        await until(lambda: under.told > 2)
        assert under.drained == set()
        under.pending = {1, 2}
        await until(lambda: under.replicas.keys() == {3, 4}, within=30)
        assert under.drained == {1, 2}

    controlled(work)


def test_a_successor_outlives_the_controller_that_started_it() -> None:
    """The first one has a quarter of an hour of its day left, and the second one loads its model."""

    async def work(made: Controller, under: Underneath, _: list[str]) -> None:
        under.left = {1: one, 2: one}
        under.pending.add(2)
        under.facts[1] = {"launched_seconds": 85_500.0, "ends_in_seconds": 900.0}
        await until(lambda: made.snapshot.service.total == 2)
        await asyncio.sleep(0.7)
        assert under.replicas.keys() == {1, 2}
        assert under.drained == set()
        under.pending.clear()
        await until(lambda: under.replicas.keys() == {2})

    one = two()
    controlled(work, wanted=Wanted(one, 1))


def test_a_drain_of_somebody_else_is_left_alone() -> None:
    """He may undrain it."""

    async def work(made: Controller, under: Underneath, _: list[str]) -> None:
        under.left = {1: two(), 2: two()}
        await until(lambda: made.snapshot.service.ready == 2)
        under.drained.add(1)
        await until(lambda: made.replicas[1].is_leaving)
        await asyncio.sleep(1.2)
        assert under.replicas.keys() == {1, 2}
        under.drained.clear()
        await until(lambda: made.replicas[1].is_ready)

    controlled(work)


def test_a_blue_green_update_goes_on_after_its_switch() -> None:
    """The version that serves stays known to the balancer, and nothing of the old one starts again."""

    async def work(made: Controller, under: Underneath, _: list[str]) -> None:
        under.left, under.drained = {1: two(), 2: two(), 3: new, 4: new}, {1, 2}
        under.broken["tell"] = TimeoutError()
        await asyncio.sleep(0.7)
        under.broken.clear()
        await until(lambda: under.replicas.keys() == {3, 4})
        await until(lambda: made.wanted.coming is None)
        assert under.started == []
        assert all({3, 4} <= listed for listed in under.listed)

    new = two(2, "y")
    controlled(work, wanted=Wanted(two(), 2, new, "blue_green", 2, is_switched=True))


def test_a_replica_that_cannot_be_stopped_is_tried_again() -> None:
    async def work(made: Controller, under: Underneath, said: list[str]) -> None:
        await until(lambda: made.snapshot.service.ready == 2)
        under.broken["stop"] = CannotStart("Docker is away")
        made.replace_replica(1)
        await until(lambda: any("stopping x-1" in line for line in said), within=30)
        under.broken.clear()
        await until(lambda: under.replicas.keys() == {2, 3}, within=30)

    controlled(work)


def test_settings_reach_the_balancer_one_after_the_other() -> None:
    async def work(made: Controller, under: Underneath, _: list[str]) -> None:
        await until(lambda: made.snapshot.service.ready == 2)
        under.holds_renewals.clear()
        first = made.wanted.serving
        updates = [asyncio.create_task(made.update(replace(first, version=number), "rolling")) for number in (2, 3)]
        await until(lambda: under.is_renewing)
        await asyncio.sleep(0.1)
        under.holds_renewals.set()
        await asyncio.gather(*updates)
        assert under.renewed == [2, 3]
        assert made.wanted.serving.version == 3

    controlled(work)


def test_a_failed_renewal_takes_no_later_version_back() -> None:
    async def work(made: Controller, under: Underneath, _: list[str]) -> None:
        await until(lambda: made.snapshot.service.ready == 2)
        under.holds_renewals.clear()
        under.broken["renew 2"] = OSError(28, "No space left on device")
        first = made.wanted.serving
        updates = [asyncio.create_task(made.update(replace(first, version=number), "rolling")) for number in (2, 3)]
        await until(lambda: under.is_renewing)
        under.holds_renewals.set()
        with pytest.raises(ConfigError, match="No space left"):
            await updates[0]
        await updates[1]
        assert made.wanted.serving.version == 3
        await until(lambda: under.renewed[-1:] == [3])

    controlled(work)


def test_a_look_that_is_cancelled_as_it_ends_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who ends an engine waits for the end of its looks: one that went on would hold it up for ever."""
    looks: list[asyncio.Task[None]] = []

    class Ends:
        returncode = 0

        async def communicate(self, _: object) -> tuple[bytes, bytes]:
            looks[0].cancel()
            return b"", b""

    async def begins(*_: object, **__: object) -> Ends:
        return Ends()

    async def look() -> None:
        while True:
            await typed(["kubectl"], {}, 5, "silence")
            await asyncio.sleep(0.01)

    async def run() -> None:
        looks.append(asyncio.create_task(look()))
        await asyncio.sleep(0.2)
        assert looks[0].done()

    monkeypatch.setattr(asyncio, "create_subprocess_exec", begins)
    asyncio.run(run())


def test_troubles_back_off_and_say_since_when() -> None:
    now, tried = [0.0], [0]
    troubles = Troubles(lambda _: None, lambda: now[0])

    async def fails() -> None:
        tried[0] += 1
        raise OSError(28, "No space left on device", "/x")

    async def run() -> None:
        for step in range(1000):
            now[0] = step / 10
            await troubles.attempt("writing", fails)

    asyncio.run(run())
    assert 10 < tried[0] < 20
    assert troubles.reason.startswith("writing, since ")
    assert troubles.reason.endswith("/x: No space left on device")
