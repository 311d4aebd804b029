"""replica/tenant.py and tenant_api.py: the states, with real locks and an engine that notes what it is told."""

import asyncio
import json
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from replica.tenant import LIGHT, WEIGHTS, Limits, State, Tenant
from replica.tenant_api import Alive, Gate
from replica.turn import Turn

GIB = 2**30


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Gpu:
    """One card of which its engines take memory."""

    def __init__(self, free: int = 100 * GIB) -> None:
        self.free = free


class FakeEngine:
    """Dies as SGLang does: of a release while something runs, and of running without memory."""

    POOL, WEIGHT = 30 * GIB, 13 * GIB

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.gpu.free -= self.POOL + self.WEIGHT
        self.started = True
        self.leaving = False
        self.held = 0
        self.is_paused = False
        self.is_busy_after_pause = False
        self.fails = ""
        self.meanwhile: Callable[[], None] = lambda: None
        self.released: set[str] = set()
        self.done: list[str] = []
        self.is_dead = False

    def has_started(self) -> bool:
        return self.started

    def is_leaving(self) -> bool:
        return self.leaving

    def requests(self) -> int:
        return self.held

    async def pause(self) -> bool:
        self._do("pause")
        self.is_paused = True
        return not self.is_busy_after_pause

    async def release(self, what: Sequence[str]) -> None:
        self.meanwhile()
        self._do(f"release {'+'.join(what)}")
        assert self.is_paused
        self.released |= set(what)
        self.gpu.free += self._size(what)

    async def resume(self, what: Sequence[str]) -> None:
        self._do(f"resume {'+'.join(what)}")
        assert self.released == set(what)
        self.released = set()
        self.gpu.free -= self._size(what)
        assert self.gpu.free >= 0

    async def go_on(self) -> None:
        self._do("go on")
        assert not self.released
        self.is_paused = False

    def free_memory(self, gpu: str) -> int | None:
        return self.gpu.free

    def die(self) -> None:
        self.is_dead = True

    def _do(self, what: str) -> None:
        self.done.append(what)
        if what == self.fails:
            raise RuntimeError("CUDA error")

    def _size(self, what: Sequence[str]) -> int:
        return self.POOL * ("kv_cache" in what) + self.WEIGHT * ("weights" in what)


class Stage:
    """Tenants of one GPU, which step when they are told to, at a time that stands still meanwhile."""

    def __init__(self, directory: Path) -> None:
        self.clock = Clock()
        self.gpu = Gpu()
        self.directory = directory
        self.turns: list[Turn] = []

    def tenant(self, note: str, **limits: Any) -> tuple[Tenant, FakeEngine]:
        turn = Turn.join(self.directory, ["GPU-a"], note, self.clock())
        assert turn.take(self.clock())
        self.turns.append(turn)
        engine = FakeEngine(self.gpu)
        return Tenant(turn, engine, Limits(**limits), self.clock, self.clock), engine

    def later(self, seconds: float) -> None:
        self.clock.now += seconds

    def close(self) -> None:
        for turn in self.turns:
            turn.leave()


@pytest.fixture
def stage(tmp_path: Path) -> Any:
    made = Stage(tmp_path)
    yield made
    made.close()


def run(*steps: Coroutine[Any, Any, Any]) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return [await step for step in steps]

    return asyncio.run(all_of_them())


async def steps(*tenants: Tenant) -> None:
    for tenant in tenants:
        await tenant.step()


def pair(stage: Stage) -> tuple[Tenant, FakeEngine, Tenant, FakeEngine]:
    """Two tenants, the first dozing, the second awake."""
    first, its = stage.tenant("first")
    first.wanted = State.DOZING
    run(steps(first))
    second, others = stage.tenant("second")
    run(steps(second))
    assert (first.state, second.state) == (State.DOZING, State.AWAKE)
    its.done.clear()
    return first, its, second, others


def test_doze_and_wake_order(stage: Stage) -> None:
    """A doze pauses then releases and a wake resumes then goes on."""
    tenant, engine = stage.tenant("mine")

    async def life() -> None:
        await tenant.step()
        assert tenant.state is State.AWAKE
        tenant.wanted = State.DOZING
        await tenant.step()
        assert tenant.state is State.DOZING
        assert not stage.turns[0].is_mine
        tenant.wanted = State.AWAKE
        await tenant.step()
        assert tenant.state is State.AWAKE
        assert stage.turns[0].is_mine

    run(life())
    light = "+".join(LIGHT)
    assert engine.done == ["pause", f"release {light}", f"resume {light}", "go on"]
    assert tenant.swaps.wakes == 1


def test_sleep(stage: Stage) -> None:
    """Asleep it gives its weights too and takes all again."""
    tenant, engine = stage.tenant("mine")
    before = stage.gpu.free

    async def life() -> None:
        tenant.wanted = State.ASLEEP
        released, turns_at = engine.release, []

        async def release(what: Sequence[str]) -> None:
            turns_at.append(stage.turns[0].is_mine)
            await released(what)

        engine.release = release  # type: ignore[method-assign]
        await tenant.step()
        assert turns_at == [True, True]  # whoever is next finds all of the memory
        assert not stage.turns[0].is_mine
        assert tenant.state is State.ASLEEP
        assert stage.gpu.free == before + engine.POOL + engine.WEIGHT
        tenant.wanted = State.AWAKE
        await tenant.step()

    run(life())
    assert tenant.state is State.AWAKE
    assert engine.done[-2:] == [f"resume {'+'.join((*LIGHT, *WEIGHTS))}", "go on"]
    assert stage.gpu.free == before


def test_yields_by_itself(stage: Stage) -> None:
    """By itself it yields after its slice to one that waits and gets its turn back."""
    first, its, second, others = pair(stage)
    others.held = 3
    its.held = 1
    run(steps(first, second))
    assert stage.turns[0].waiting_since
    stage.later(1.9)
    run(steps(first, second))
    assert second.state is State.AWAKE
    stage.later(0.2)
    run(steps(first, second, first))
    assert (first.state, second.state) == (State.AWAKE, State.DOZING)
    run(steps(second))  # it has requests still
    stage.later(2.1)
    run(steps(second, first, second))
    assert (first.state, second.state) == (State.DOZING, State.AWAKE)


def test_idle_yields_at_once(stage: Stage) -> None:
    """One that is idle yields at once and one that nobody waits for stays."""
    first, its, second, _ = pair(stage)
    stage.later(100)
    run(steps(first, second))
    assert second.state is State.AWAKE
    its.held = 1
    run(steps(first, second, first))
    assert (first.state, second.state) == (State.AWAKE, State.DOZING)


def test_heard_balancer(stage: Stage) -> None:
    """A balancer that is heard orders alone except for strangers."""
    first, its, second, others = pair(stage)
    others.held = its.held = 1

    async def ordered() -> None:
        first.heard("balancer")
        second.heard("balancer")
        await first.step()
        assert not stage.turns[0].waiting_since  # it was not told to wake
        first.wanted = State.AWAKE
        await first.step()
        assert stage.turns[0].waiting_since
        stage.later(3)
        first.heard("balancer")
        second.heard("balancer")
        await second.step()
        assert second.state is State.AWAKE  # the one that waits is its own balancer's
        first.heard("another")
        await first.step()
        await second.step()
        assert second.state is State.DOZING  # now a stranger waits

    run(ordered())


def test_silent_balancer(stage: Stage) -> None:
    """Without a word from its balancer for five seconds it sees to itself."""
    first, its, second, others = pair(stage)
    others.held = its.held = 1

    async def left_alone() -> None:
        first.heard("balancer")
        second.heard("balancer")
        stage.later(4.9)
        await first.step()
        assert first.is_ordered
        stage.later(0.2)
        assert not first.is_ordered
        await first.step()
        await second.step()
        await first.step()

    run(left_alone())
    assert (first.state, second.state) == (State.AWAKE, State.DOZING)


def test_leaving_wakes_first(stage: Stage) -> None:
    """One that was told to end wakes for what it has ahead of the others."""
    first, its, second, others = pair(stage)
    third, thirds = stage_third(stage, second)
    others.held = thirds.held = 1
    run(steps(third, second))
    stage.later(1)
    its.held, its.leaving = 1, True

    async def ordered() -> None:
        first.heard("balancer")
        await first.step()
        stage.later(1.5)
        for tenant in (third, second, third, first):
            await tenant.step()

    run(ordered())
    assert (first.state, third.state) == (State.AWAKE, State.DOZING)


def stage_third(stage: Stage, awake: Tenant) -> tuple[Tenant, FakeEngine]:
    """Another one that dozes; the one that is awake has its turn again afterwards."""
    awake.wanted = State.DOZING
    run(steps(awake))
    third, engine = stage.tenant("third")
    third.wanted = State.DOZING
    run(steps(third))
    awake.wanted = State.AWAKE
    run(steps(awake))
    assert awake.state is State.AWAKE
    return third, engine


@pytest.mark.parametrize("other", [State.DOZING, State.ASLEEP])
def test_an_overtaken_wake_waits_no_more(stage: Stage, other: State) -> None:
    """A wake that waits for the turn ends with the next order, and holds up nobody who waits after it."""
    first, _, _, _ = pair(stage)

    async def orders() -> list[bool]:
        given = []
        for wanted in (State.AWAKE, other):
            given.append(asyncio.create_task(first.order(wanted, 1e9)))
            await asyncio.sleep(0)  # now it has its wish
            await first.step()
            assert first.to_json()["waits"] == (wanted is State.AWAKE)
        return await asyncio.gather(*given)

    assert run(orders()) == [[False, True]]
    third = Turn.join(stage.directory, ["GPU-a"], "third", stage.clock())
    stage.turns.append(third)
    stage.turns[1].give_up()
    assert third.take(stage.clock())


def test_requests_that_have_gone_are_no_reason_to_wake(stage: Stage) -> None:
    first, its, second, others = pair(stage)
    its.held = others.held = 1
    run(steps(first))
    assert stage.turns[0].waiting_since
    its.held = 0
    run(steps(first))
    assert not stage.turns[0].waiting_since
    stage.later(10)
    run(steps(second))
    assert second.state is State.AWAKE


def test_wake_waits_for_memory(stage: Stage) -> None:
    """A wake waits for the memory that a killed one has still."""
    tenant, engine = stage.tenant("mine", memory=1.0)

    async def life() -> None:
        tenant.wanted = State.DOZING
        await tenant.step()
        stage.gpu.free = 5 * GIB
        tenant.wanted = State.AWAKE
        waking = asyncio.create_task(tenant.step())
        await asyncio.sleep(0.05)
        assert not waking.done()
        assert tenant.state is State.DOZING
        stage.gpu.free = 60 * GIB
        await waking

    run(life())
    assert tenant.state is State.AWAKE
    assert not engine.is_dead


def test_wake_without_memory(stage: Stage) -> None:
    """A wake without memory gives the turn up and says what is missing."""
    tenant, engine = stage.tenant("mine", memory=0.0)

    async def life() -> None:
        tenant.wanted = State.DOZING
        await tenant.step()
        stage.gpu.free = 5 * GIB
        tenant.wanted = State.AWAKE
        await tenant.step()
        assert tenant.state is State.DOZING
        assert not stage.turns[0].is_mine
        assert tenant.problem == "it cannot wake: GPU-a has 5.0 GiB free and it takes 30.0 GiB"
        assert not engine.is_dead
        stage.gpu.free = 60 * GIB
        await tenant.step()
        assert tenant.state is State.DOZING  # a second must pass first
        stage.later(1.1)
        await tenant.step()

    run(life())
    assert tenant.state is State.AWAKE
    assert tenant.problem == ""


def test_sizes_measured_while_another_was_killed(stage: Stage) -> None:
    """Memory that a killed tenant loses amid a sleep is not taken for one's own for ever."""
    tenant, engine = stage.tenant("mine", memory=0.0, share=FakeEngine.POOL + FakeEngine.WEIGHT)

    async def life() -> None:
        tenant.wanted = State.DOZING
        await tenant.step()
        stage.gpu.free -= 30 * GIB  # another's
        engine.meanwhile = lambda: setattr(stage.gpu, "free", stage.gpu.free + 30 * GIB)
        tenant.wanted = State.ASLEEP
        while tenant.state is not State.ASLEEP:
            await tenant.step()
        stage.gpu.free = 50 * GIB
        tenant.wanted = State.AWAKE
        await tenant.step()

    run(life())
    assert tenant.problem == ""
    assert tenant.state is State.AWAKE


async def living_short_of_memory(stage: Stage, tenant: Tenant) -> asyncio.Task[None]:
    """It lives on, and dozes where too little memory is left for it to wake."""
    tenant.wanted = State.DOZING
    await tenant.step()
    stage.gpu.free = 5 * GIB
    return asyncio.create_task(tenant.live())


def test_order_without_memory(stage: Stage) -> None:
    """An order to wake is answered as soon as memory is known to be missing, not when its time is over."""
    tenant, _ = stage.tenant("mine", memory=0.0)

    async def life() -> None:
        living = await living_short_of_memory(stage, tenant)
        async with asyncio.timeout(20):
            assert not await tenant.order(State.AWAKE, 600)
        living.cancel()

    run(life())
    assert (tenant.state, tenant.wanted) == (State.DOZING, State.DOZING)
    assert "it cannot wake" in tenant.problem


def test_order_that_waits_for_no_memory(stage: Stage) -> None:
    """It is answered at once, with what is missing."""
    tenant, _ = stage.tenant("mine", memory=600.0)

    async def life() -> None:
        living = await living_short_of_memory(stage, tenant)
        async with asyncio.timeout(20):
            assert not await tenant.order(State.AWAKE, 600, memory=0.0)
        assert tenant.to_json()["lacks_bytes"] == {"GPU-a": 25 * GIB}
        stage.gpu.free = 60 * GIB
        async with asyncio.timeout(20):  # who orders it again has reason to
            assert await tenant.order(State.AWAKE, 600)
        assert tenant.to_json()["lacks_bytes"] is None
        living.cancel()

    run(life())


def test_one_that_waits_for_its_turn_makes_room_for_a_start(stage: Stage) -> None:
    """Without a balancer it wants to wake for a request; the one that starts has the turn, and goes first."""
    tenant, engine = stage.tenant("mine")
    tenant.wanted = State.DOZING
    run(steps(tenant))
    starts = Turn.join(stage.directory, ["GPU-a"], "starts", stage.clock())
    stage.turns.append(starts)
    assert starts.take(stage.clock())
    engine.held = 1
    run(steps(tenant))
    assert (tenant.state, tenant.wanted) == (State.DOZING, State.AWAKE)
    stage.later(1)
    starts.say(stage.clock(), lacks={"GPU-a": stage.clock()})
    run(steps(tenant))
    assert tenant.state is State.ASLEEP
    starts.give_up()
    stage.later(1)
    run(steps(tenant, tenant))
    assert tenant.state is State.AWAKE


def test_a_step_that_fails_is_tried_again(stage: Stage) -> None:
    tenant, _ = stage.tenant("mine")
    step, failures = tenant.step, [ValueError("what nobody expected"), OSError(5, "Input/output error")]

    async def fails_at_first() -> None:
        if failures:
            raise failures.pop()
        await step()

    async def life() -> None:
        tenant.step = fails_at_first  # type: ignore[method-assign]
        living = asyncio.create_task(tenant.live())
        async with asyncio.timeout(20):
            assert await tenant.order(State.DOZING, 600)
        living.cancel()

    run(life())
    assert not failures


def test_order_outlasts_its_time_with_the_turn(stage: Stage) -> None:
    """A wake that has its turn is not cancelled because its order's time is over."""
    tenant, engine = stage.tenant("mine")
    may_resume = asyncio.Event()
    resume = engine.resume

    async def slow(what: Sequence[str]) -> None:
        await may_resume.wait()
        await resume(what)

    async def life() -> None:
        tenant.wanted = State.DOZING
        await tenant.step()
        engine.resume = slow  # type: ignore[method-assign]
        order = asyncio.create_task(tenant.order(State.AWAKE, 1.0))
        living = asyncio.create_task(tenant.live())
        while not stage.turns[0].is_mine:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        stage.later(2.0)
        await asyncio.sleep(0.3)
        assert not order.done()
        may_resume.set()
        async with asyncio.timeout(20):
            assert await order
        living.cancel()

    run(life())


def test_busy_after_pause(stage: Stage) -> None:
    """One that runs on after a pause is not made to release."""
    tenant, engine = stage.tenant("mine")
    engine.is_busy_after_pause = True
    run(steps(tenant))
    tenant.wanted = State.DOZING
    run(steps(tenant))
    assert tenant.state is State.AWAKE
    assert engine.done == ["pause", "go on"]
    assert "still had something running" in tenant.problem
    assert stage.turns[0].is_mine


@pytest.mark.parametrize("fails", ["pause", f"release {'+'.join(LIGHT)}", f"resume {'+'.join(LIGHT)}", "go on"])
def test_a_server_whose_memory_nobody_knows_of_ends(stage: Stage, fails: str) -> None:
    tenant, engine = stage.tenant("mine")

    async def life() -> None:
        await tenant.step()
        tenant.wanted = State.DOZING
        engine.fails = fails if fails.startswith(("pause", "release")) else ""
        await tenant.step()
        engine.fails = fails
        tenant.wanted = State.AWAKE
        await tenant.step()

    with pytest.raises(RuntimeError):
        run(life())
    assert engine.is_dead
    assert tenant.state is State.BROKEN
    assert "CUDA error" in tenant.problem


def test_hanging_doze(stage: Stage) -> None:
    """A doze that hangs ends the server though the event loop is stuck."""
    tenant, engine = stage.tenant("mine", give_back=0.05)

    async def stuck(_: Sequence[str]) -> None:
        while not engine.is_dead:
            time.sleep(0.01)  # noqa: ASYNC251 - the event loop is to be stuck

    engine.release = stuck  # type: ignore[method-assign]
    tenant.wanted = State.DOZING
    run(steps(tenant))
    assert "could not doze: not done within 0.05 s" in tenant.problem or engine.is_dead


Answer = tuple[int, dict[str, Any]]


async def ask(app: Any, path: str, method: str = "GET", balancer: str = "") -> Answer:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    path, _, query = path.partition("?")
    headers = [(b"x-balancer", balancer.encode())] if balancer else []
    scope = {"type": "http", "path": path, "method": method, "headers": headers, "query_string": query.encode()}
    await app(scope, None, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


async def stock(_scope: Any, _receive: Any, send: Any) -> None:
    """SGLang's own routes."""
    await send({"type": "http.response.start", "status": 299, "headers": []})
    await send({"type": "http.response.body", "body": b'{"from": "sglang"}'})


SGLANG: Answer = (299, {"from": "sglang"})


def test_gate_while_awake(stage: Stage) -> None:
    """Awake all of sglang answers but its routes to its memory."""
    tenant, _ = stage.tenant("mine")
    gate = Gate(stock, tenant)

    async def asked() -> None:
        await tenant.step()
        for path in ("/v1/chat/completions", "/health", "/ready", "/flush_cache", "/"):
            assert await ask(gate, path) == SGLANG
        for path in ("/release_memory_occupation", "/pause_generation", "/continue_generation/"):
            assert (await ask(gate, path, "POST"))[0] == 403

    run(asked())


def test_gate_while_dozing(stage: Stage) -> None:
    """Not awake it is well takes requests and refuses what would kill it."""
    tenant, engine = stage.tenant("mine")
    gate = Gate(stock, tenant)

    async def asked() -> None:
        tenant.wanted = State.DOZING
        await tenant.step()
        assert await ask(gate, "/health") == (200, {"state": "DOZING"})
        assert await ask(gate, "/health_generate") == (200, {"state": "DOZING"})
        assert await ask(gate, "/ready") == (200, {"state": "DOZING"})  # it wakes by itself
        tenant.heard("balancer")
        assert await ask(gate, "/ready") == (503, {"state": "DOZING"})
        for path in ("/v1/chat/completions", "/generate", "/v1/models", "/server_info", "/metrics"):
            assert await ask(gate, path) == SGLANG
        for path in ("/flush_cache", "/update_weights_from_disk", "/get_weights_by_name", "/start_profile", "/v1x"):
            assert (await ask(gate, path, "POST"))[0] == 503
        assert (await ask(gate, "/resume_memory_occupation", "POST"))[0] == 403
        engine.leaving = True
        assert await ask(gate, "/ready") == SGLANG  # which says 503 from now on
        assert (await ask(gate, "/flush_cache", "POST"))[0] == 503

    run(asked())


def test_orders_come_over_http_and_say_what_became_of_them(stage: Stage) -> None:
    tenant, _ = stage.tenant("mine")
    gate = Gate(stock, tenant)

    async def asked() -> None:
        living = asyncio.create_task(tenant.live())
        status, said = await ask(gate, "/lease/doze", "POST", "balancer")
        assert (status, said["state"], said["ordered_by"]) == (200, "DOZING", "balancer")
        status, said = await ask(gate, "/lease")
        assert (status, said["gpus"], said["swaps"]["wakes"]) == (200, ["GPU-a"], 0)
        assert said["pool_bytes"] == {"GPU-a": FakeEngine.POOL}
        stranger = Turn.join(stage.directory, ["GPU-a"], "stranger", 0.0)
        assert stranger.take(0.0)
        # The clock of the stage stands still, so that a wait of none is the one that ends.
        status, said = await ask(gate, "/lease/wake?within=0", "POST", "balancer")
        assert (status, said["state"], said["waits"]) == (503, "DOZING", False)
        assert [other["note"] for other in said["others"]] == ["stranger"]
        stranger.leave()
        status, said = await ask(gate, "/lease/wake", "POST", "balancer")
        assert (status, said["state"]) == (200, "AWAKE")
        status, said = await ask(gate, "/lease/sleep", "POST", "balancer")
        assert (status, said["state"]) == (200, "ASLEEP")
        assert (await ask(gate, "/lease/wake?within=soon", "POST"))[0] == 400
        assert (await ask(gate, "/lease/wake?memory=-1", "POST"))[0] == 400
        assert (await ask(gate, "/lease/wake"))[0] == 405
        assert (await ask(gate, "/lease/dance", "POST"))[0] == 404
        living.cancel()

    run(asked())


def test_alive_says_so_in_every_state_but_broken(stage: Stage) -> None:
    tenant, engine = stage.tenant("mine")
    around = Alive(stock, tenant)

    async def asked() -> None:
        engine.started = False
        assert await ask(around, "/alive") == (200, {"state": "STARTING"})
        assert await ask(around, "/anything") == SGLANG
        tenant.state = State.BROKEN
        assert await ask(around, "/alive") == (503, {"state": "BROKEN"})

    run(asked())


class Life:
    """One replica after another at one place, which is killed and starts again; what it is asked stays with it."""

    def __init__(self, stage: Stage, note: str) -> None:
        self.stage = stage
        self.note = note
        self.waits_since: float | None = None
        self.longest = 0.0
        self.tenant: Tenant | None = None
        self._start()

    def _start(self) -> None:
        self.turn = Turn.join(self.stage.directory, ["GPU-a"], self.note, self.stage.clock())
        self.waits_since = None

    def kill(self) -> None:
        """Its memory is free with it; what it was asked is lost with it, too."""
        if self.tenant is not None:
            held = {"kv_cache", "weights"} - self.engine.released
            self.stage.gpu.free += self.engine._size(sorted(held))
        self.turn.leave()
        self.tenant = None
        self._start()

    async def step(self) -> None:
        clock = self.stage.clock
        if self.tenant is None:
            if self.turn.take(clock()):
                self.engine = FakeEngine(self.stage.gpu)
                assert self.stage.gpu.free >= 0
                self.tenant = Tenant(self.turn, self.engine, Limits(), clock, clock)
            return
        await self.tenant.step()
        if self.tenant.state is State.AWAKE:
            if self.waits_since is not None:
                self.longest = max(self.longest, clock() - self.waits_since)
            self.waits_since = None
        elif self.engine.held and self.waits_since is None:
            self.waits_since = clock()


@pytest.mark.parametrize("seed", range(12))
def test_three_tenants_in_chaos(stage: Stage, seed: int) -> None:
    """Whatever is asked, killed or ordered: one is awake at the most, its memory is there, and nobody starves."""
    chance = random.Random(seed)
    stage.gpu.free = 3 * FakeEngine.WEIGHT + FakeEngine.POOL  # not a byte more than one turn takes

    async def live() -> list[Life]:
        lives = [Life(stage, name) for name in ("a", "b", "c")]
        for _ in range(400):
            stage.later(0.1)
            for life in lives:
                if life.tenant is not None:
                    if chance.random() < 0.05:
                        life.engine.held += chance.randint(1, 5)
                    if life.tenant.state is State.AWAKE and life.engine.held and chance.random() < 0.3:
                        life.engine.held -= 1
                    if chance.random() < 0.01:
                        life.tenant.heard("a balancer that orders nothing and soon is gone")
                if chance.random() < 0.002:
                    life.kill()
                await life.step()
                up = [one.note for one in lives if one.tenant is not None and one.tenant.is_up]
                assert len(up) <= 1, up
                assert sum(one.turn.is_mine for one in lives) <= 1
                assert stage.gpu.free >= 0
        return lives

    lives = asyncio.run(live())
    assert sum(life.tenant.swaps.wakes for life in lives if life.tenant is not None) >= 2
    for life in lives:
        if life.waits_since is not None:
            life.longest = max(life.longest, stage.clock() - life.waits_since)
        # Two others' slices, and the five seconds in which nobody knows that the balancer has gone, of each.
        assert life.longest <= 2 * (2.0 + 0.5) + 3 * 5.0, life.note
        assert life.tenant is None or not life.engine.is_dead
        life.turn.leave()
