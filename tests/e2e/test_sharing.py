"""Two real SGLang replicas that share one seat: by turns of their own, and as a balancer orders them."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from balancer.operate.engines.ports import free_ports
from tests.e2e.running import Balancer, Replica, is_running
from tests.support.program import BalancerProgram
from tests.support.until import wait_until

PROMPT = "The history of Rome began"
ORDERS = {"X-Balancer": "a test"}


class Tenant(Replica):
    """A replica on the machine's one seat, which wants a key of its clients."""

    key = "sk-0123456789abcdef"

    def __init__(self, port: int, log: Path, models: str, leases: Path, key_file: Path) -> None:
        # In float32 a prompt that is computed again gives the very same numbers as at first; a turn lasts long enough
        # that a busy machine gets something done in it.
        shares = {"GPU_SHARE": "yes", "GPU_SLICE": "3", "LEASE_DIR": str(leases), "LEASE_WAIT": "480"}
        flags = {"SGLANG_ARGS": "--dtype float32", "SGLANG_API_KEY_FILE": str(key_file), "MODELS_DIR": models}
        super().__init__("smollm2-135m", port, log, **shares, **flags)
        self.client = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=300)

    def state(self) -> str:
        return str(self.client.get("/lease").json()["state"])

    def order(self, what: str) -> dict[str, Any]:
        answer = self.client.post(f"/lease/{what}?within=120", headers=ORDERS)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def generate(self, tokens: int) -> str:
        answer = self.client.post("/generate", json=_asking(tokens))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["text"])


def _asking(tokens: int, **more: Any) -> dict[str, Any]:
    return {"text": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}, **more}


@pytest.fixture(scope="module")
def seat(models: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tenant, Tenant]]:
    """Both started, one after the other, as the seat's turn is."""
    folder = tmp_path_factory.mktemp("seat")
    key_file = folder / "replica.key"
    key_file.write_text(Tenant.key)
    one, two = (
        Tenant(port, folder / f"{name}.log", models, folder / "leases", key_file)
        for name, port in zip(("one", "two"), free_ports(2), strict=True)
    )
    try:
        one.wait_ready()
        two.wait_ready()
        yield one, two
    finally:
        for tenant in (one, two):
            tenant.close()
            tenant.client.close()


def awake(seat: tuple[Tenant, Tenant]) -> list[str]:
    return sorted(tenant.state() for tenant in seat)


def forget_the_balancer(seat: tuple[Tenant, Tenant]) -> None:
    for tenant in seat:
        wait_until(lambda: tenant.client.get("/lease").json()["ordered_by"] is None, "no balancer is heard", 30)  # noqa: B023


def test_turns_without_balancer(seat: tuple[Tenant, Tenant]) -> None:
    """Without a balancer requests to both are answered by turns."""
    wait_until(lambda: awake(seat) == ["AWAKE", "DOZING"], lambda: awake(seat), 30)  # it is ready before it says so
    whole = {tenant.port: tenant.generate(12) for tenant in seat}
    for _ in range(3):
        assert [tenant.generate(12) for tenant in seat] == [whole[tenant.port] for tenant in seat]
    with ThreadPoolExecutor(6) as at_once:
        asked = [(tenant.port, at_once.submit(tenant.generate, 12)) for tenant in seat * 3]
        assert [answer.result() for _, answer in asked] == [whole[port] for port, _ in asked]
    assert "AWAKE" in awake(seat)
    assert seat[0].client.get("/lease").json()["swaps"]["wakes"] >= 2


def test_two_endpoints(seat: tuple[Tenant, Tenant], tmp_path: Path) -> None:
    """Two endpoints share the seat though neither knows of the other."""
    (tmp_path / "key").write_text(Tenant.key)
    flags = ("--replica-key", str(tmp_path / "key"))
    balancers = [Balancer(tmp_path / f"balancer-{tenant.port}.log", [tenant], *flags) for tenant in seat]
    try:
        for balancer in balancers:
            wait_until(lambda: serves(balancer), lambda: balancer.statuses())  # noqa: B023
        with ThreadPoolExecutor(6) as at_once:
            post = [(f"{balancer.url}/generate", _asking(8)) for balancer in balancers * 3]
            answers = list(at_once.map(lambda asked: httpx.post(asked[0], json=asked[1], timeout=300), post))
        assert [answer.status_code for answer in answers] == [200] * 6
        assert len({answer.json()["text"] for answer in answers}) == 1  # it is the same model
        assert all(serves(balancer) for balancer in balancers)
    finally:
        for balancer in balancers:
            balancer.close()


def serves(balancer: Balancer) -> bool:
    return balancer.check_alive() and set(balancer.statuses()) <= {"READY", "DOZING"}


class OneEndpoint(BalancerProgram):
    """A balancer that has a service for each of the two, `one` and `two`, and orders their turns."""

    def __init__(self, seat: tuple[Tenant, Tenant], folder: Path) -> None:
        (folder / "key").write_text(Tenant.key)
        urls = [f"{name}={tenant.url}" for name, tenant in zip(("one", "two"), seat, strict=True)]
        # A replica of SGLang that was killed is back after 20 s, on a slow machine after 90.
        flags = ("--replica-key", str(folder / "key"), "--set", "gpu_slice=1", "--set", "queue_timeout=300")
        super().__init__(urls, *flags, log=folder / "balancer.log")
        wait_until(self.is_listening, "the balancer listens", 30)
        wait_until(lambda: sorted(map(self.status, ("one", "two"))) == ["DOZING", "READY"], self.tail, 120)

    def status(self, service: str) -> str:
        said = httpx.get(f"{self.admin_url}/status?service={service}", timeout=10).json()
        return str(said["replicas"][0]["status"]) if said["replicas"] else ""

    def generate(self, service: str, tokens: int) -> str:
        asked = {"json": _asking(tokens), "headers": {"X-Model": service}}
        answer = httpx.post(f"{self.url}/generate", timeout=300, **asked)  # type: ignore[arg-type]
        assert answer.status_code == 200, answer.text
        return str(answer.json()["text"])

    def stream(self, service: str, tokens: int, pieces: list[str]) -> None:
        """Reads a stream into `pieces`, the last of which is the whole text."""
        asked = {"json": _asking(tokens, stream=True), "headers": {"X-Model": service}}
        with httpx.stream("POST", f"{self.url}/generate", timeout=300, **asked) as answer:  # type: ignore[arg-type]
            pieces.extend(json.loads(line[6:])["text"] for line in answer.iter_lines() if line.startswith("data: {"))


def test_one_endpoint(seat: tuple[Tenant, Tenant], tmp_path: Path) -> None:
    """The balancer orders the turns: by turns, at once, and with a stream that is interrupted, all texts are whole."""
    whole = seat[0].generate(60)
    with OneEndpoint(seat, tmp_path) as balancer:
        for _ in range(3):
            assert all(whole.startswith(balancer.generate(service, 12)) for service in ("one", "two"))
        with ThreadPoolExecutor(6) as at_once:
            texts = list(at_once.map(lambda service: balancer.generate(service, 12), ("one", "two") * 3))
        assert len(set(texts)) == 1
        assert whole.startswith(texts[0])
        pieces: list[str] = []
        reader = threading.Thread(target=balancer.stream, args=("one", 60, pieces))
        reader.start()
        wait_until(lambda: len(pieces) > 5, "the stream has begun", 120)
        assert whole.startswith(balancer.generate("two", 6))
        reader.join()
        assert pieces[-1] == whole
        assert seat[0].client.get("/lease").json()["ordered_by"].startswith("one-")


def test_balancer_killed(seat: tuple[Tenant, Tenant], tmp_path: Path) -> None:
    """When the balancer is killed amid a turn, nobody is stuck, and the next one orders on."""
    with OneEndpoint(seat, tmp_path) as balancer:
        balancer.generate("one", 6)
        with ThreadPoolExecutor(2) as beside:
            cut = beside.submit(balancer.generate, "one", 500)
            waits = beside.submit(seat[1].generate, 6)
            wait_until(lambda: sum(one.client.get("/lease").json()["requests"] for one in seat) == 2, "both have one")
            balancer.process.kill()
            assert waits.result()
            with pytest.raises(httpx.HTTPError):
                cut.result()
        assert seat[0].generate(6)
        balancer.wait()
        balancer.log.write_text("")
        balancer.restart()
        wait_until(balancer.is_listening, "the balancer listens again", 30)
        assert [bool(balancer.generate(service, 6)) for service in ("one", "two")] == [True, True]


def test_preempted_stream(
    seat: tuple[Tenant, Tenant],
) -> None:
    """A stream that is taken off amid its answer ends with the undisturbed text."""
    one, two = seat
    whole = one.generate(60)
    two.order("doze")
    one.order("wake")
    pieces: list[str] = []

    def read() -> None:
        with one.client.stream("POST", "/generate", json=_asking(60, stream=True)) as answer:
            pieces.extend(json.loads(line[6:])["text"] for line in answer.iter_lines() if line.startswith("data: {"))

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: len(pieces) > 5, "the stream has begun", 120)
    said = one.order("doze")
    assert (said["state"], said["requests"], said["ordered_by"]) == ("DOZING", 1, "a test")
    so_far = len(pieces)
    two.order("wake")
    assert whole.startswith(two.generate(6))  # it is the same model
    # Whatever reaches the one that dozes does it no harm.
    assert one.client.get("/health").json() == {"state": "DOZING"}
    assert one.client.get("/ready").status_code == 503
    assert httpx.get(f"{one.url}/alive").json() == {"state": "DOZING"}
    assert httpx.post(f"{one.url}/lease/wake").status_code == 401
    assert one.client.post("/pause_generation", json={}).status_code == 403
    assert one.client.post("/flush_cache").status_code == 503
    assert len(pieces) <= so_far + 1  # one may have been on its way
    with ThreadPoolExecutor(1) as beside:
        direct = beside.submit(one.generate, 6)  # waits for its turn
        two.order("doze")
        one.order("wake")
        assert whole.startswith(direct.result())
    reader.join()
    assert len(pieces) == 60
    assert pieces[-1] == whole
    assert one.order("sleep")["state"] == "ASLEEP"
    assert one.order("wake")["state"] == "AWAKE"
    assert one.generate(60) == whole


def test_doze_while_grammars_compile(
    seat: tuple[Tenant, Tenant],
) -> None:
    """A grammar that is being compiled does not kill the replica that is to doze."""
    one, two = seat
    two.order("doze")
    one.order("wake")
    schema = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(40)}}
    body = {"text": PROMPT, "sampling_params": {"max_new_tokens": 8, "json_schema": json.dumps(schema)}}
    with ThreadPoolExecutor(4) as at_once:
        asked = [at_once.submit(one.client.post, "/generate", json=body) for _ in range(4)]
        for _ in range(5):
            one.order("doze")
            one.order("wake")
        assert [answer.result().status_code for answer in asked] == [200] * 4


def awake_after(tenant: Tenant, killed: float) -> float:
    """Seconds from then until it was awake, by its own clock; a second, on a machine with nothing else to do."""

    def since() -> float | None:
        told = tenant.client.get("/lease").json()
        return time.monotonic() - told["for"] if told["state"] == "AWAKE" else None

    return wait_until(since, "the other is awake", 30) - killed


@pytest.mark.last
def test_killed_awake_behind_balancer(seat: tuple[Tenant, Tenant], tmp_path: Path) -> None:
    """One killed amid the turn that the balancer gave it leaves the seat to the other."""
    one, two = seat
    with OneEndpoint(seat, tmp_path) as balancer, ThreadPoolExecutor(2) as beside:
        balancer.generate("two", 4)
        cut = beside.submit(balancer.generate, "two", 100)
        wait_until(lambda: two.client.get("/lease").json()["requests"] == 1, "it generates", 60)
        waiting = beside.submit(balancer.generate, "one", 4)
        two.process.kill()
        assert awake_after(one, time.monotonic()) < 5
        assert waiting.result()
        two.wait()
        two.restart()
        two.wait_ready()
        assert cut.result(), "it waited for its replica to come back"
        wait_until(lambda: balancer.status("two") in ("READY", "DOZING"), "it is back", 60)
        assert balancer.generate("two", 4)


@pytest.mark.last
def test_killed_awake(seat: tuple[Tenant, Tenant]) -> None:
    """One killed amid its turn leaves the seat to the other."""
    one, two = seat
    one.order("doze")
    two.order("wake")
    with ThreadPoolExecutor(2) as beside:
        cut = beside.submit(two.client.post, "/generate", json=_asking(500))
        waiting = beside.submit(one.generate, 4)
        forget_the_balancer(seat)
        two.process.kill()
        assert awake_after(one, time.monotonic()) < 5
        assert waiting.result()
        with pytest.raises(httpx.HTTPError):
            cut.result()


@pytest.mark.last
def test_sigterm_while_dozing(seat: tuple[Tenant, Tenant]) -> None:
    """One that dozes ends when it is told to and answers what it has first."""
    one, _ = seat
    one.order("doze")
    children = one.offspring()
    with ThreadPoolExecutor(1) as beside:
        last = beside.submit(one.generate, 4)
        wait_until(lambda: one.client.get("/lease").json()["requests"] == 1, "the request is there", 30)
        one.process.send_signal(signal.SIGTERM)
        assert last.result()
    assert one.process.wait(timeout=120) == 0
    wait_until(lambda: not any(is_running(pid) for pid in children), "its children are gone too", 30)
