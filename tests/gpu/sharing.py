"""Three models of Llama-2-7b's shape on one GPU, behind one endpoint."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import httpx

from replica import gpu
from tests.bench.stats import median, quantile
from tests.gpu import shapes
from tests.gpu.load import arrivals
from tests.gpu.proof import START, Proof
from tests.gpu.serving import Process, load, services, wait_ready

MODELS = ("ann", "bea", "cal")
RATES = (0.5, 1.5, 4.5)  # requests a second of each in the mixed load
POOL = 60.0  # GiB of KV cache for the one that is awake
WEIGHTS = 13.5
SWAPS, MIXED_SECONDS = 200, 40.0
CONTEXT = 1.8  # GiB of a process beside its weights and KV cache
ALONE = 0.88  # of the card, for the one that has it: what is left is less than the weights of another
REST = 6.0  # GiB of the GPU that a static split leaves to what its passes need
KV_BYTES = 2 * 32 * 32 * 128 * 2  # of a token of Llama-2-7b's shape
GRAPHS = ["--disable-prefill-cuda-graph", "--cuda-graph-max-bs-decode", "96"]
BURST = {"groups": 0, "requests": 96, "at_once": 96, "prefix_tokens": 800, "question_tokens": 50, "answer_tokens": 256}
LONG = 600  # tokens of the answer that is interrupted
ORDERS = {"X-Balancer": "the proof"}


def sharing(proof: Proof) -> None:
    """Three models that share one GPU behind one endpoint: swaps, an interrupted answer, mixed load, a kill."""
    total = gpu.list_gpus(os.environ)[0].memory_total / 1024
    flags = ["--load-format", "dummy", "--mem-fraction-static", f"{(WEIGHTS + POOL) / total:.3f}"]
    flags += GRAPHS
    environ = {"GPU_SHARE": "yes", "LEASE_DIR": str(proof.work / "leases-shared"), "LEASE_WAIT": "400"}
    tenants = []
    try:
        for name in MODELS:
            folder = shapes.llama(proof.models / "smollm2-135m", proof.work / name)
            tenants.append(proof.replica(name, str(folder), flags, **environ))
        seconds = [wait_ready(one, len(MODELS) * START) for one in tenants]
        proof.say("started at once, ready one after the other after " + ", ".join(f"{each:.0f} s" for each in seconds))
        proof.say(f"in use then: {gpu.list_gpus(os.environ)[0].memory_used / 1024:.1f} of {total:.1f} GiB")
        by_hand(proof, tenants)
        front = services(proof.work, dict(zip(MODELS, tenants, strict=True)))
        try:
            for name in MODELS:
                tell(front.url, name, 1)
            swaps(proof, front.url)
            interrupted(proof, front.url)
            proof.write()
            mixed(proof, everywhere(front.url), dict(zip(MODELS, RATES, strict=True)), MIXED_SECONDS)
            burst(proof, front.url)
            proof.write()
            killed(proof, front.url, tenants)
        finally:
            front.stop()
    finally:
        for one in tenants:
            one.stop(signal.SIGKILL)


def tell(url: str, model: str, tokens: int, text: str = "Once upon a time") -> tuple[str, float, float]:
    """The answer's text, seconds to its first token, and in all. Raises RuntimeError if it is not whole."""
    body = {"model": model, "prompt": text, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    began, first, pieces, ended = time.monotonic(), 0.0, [], False
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=180, trust_env=False) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{model}: {answer.status_code} {answer.read()[:300]!r}")
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: {"):
                first = first or time.monotonic() - began
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(f"{model}: {event['error']}")
                pieces += [choice["text"] for choice in event["choices"]]
    if not ended:
        raise RuntimeError(f"{model}: the stream was cut after {len(pieces)} events")
    return "".join(pieces), first, time.monotonic() - began


def by_hand(proof: Proof, tenants: Sequence[Process]) -> None:
    """What each change of state takes, ordered of the replicas themselves."""
    one, two = tenants[:2]
    for other in tenants:
        order(other, "doze")
    times: dict[str, list[float]] = {}
    for what in ("wake", "doze", "wake", "doze", "wake", "doze", "sleep", "wake", "sleep", "wake", "doze"):
        name = what if what == "doze" or not times.get("last") else f"{what} after {times['last']}"
        times.setdefault(name, []).append(order(one, what))
        times["last"] = what  # type: ignore[assignment]
    times.pop("last")
    for name, each in times.items():
        proof.say(f"{name}: {', '.join(f'{seconds:.2f}' for seconds in each)} s  ")
    proof.figures["by_hand"] = times
    order(two, "wake")


def order(one: Process, what: str) -> float:
    """Seconds until the replica is in that state. Raises RuntimeError if it does not get there."""
    began = time.monotonic()
    answer = httpx.post(f"{one.url}/lease/{what}?within=60", headers=ORDERS, timeout=90, trust_env=False)
    if answer.status_code != 200:
        raise RuntimeError(f"{one.name}: {what}: {answer.status_code} {answer.text[:300]}")
    return time.monotonic() - began


def swaps(proof: Proof, url: str) -> None:
    """Requests to two models in turn, so that each of them needs the other's place."""
    texts = {name: tell(url, name, 8)[0] for name in MODELS[:2]}
    first, wrong = [], 0
    for number in range(SWAPS):
        name = MODELS[number % 2]
        text, ttft, _ = tell(url, name, 8)
        first.append(ttft)
        wrong += text != texts[name]
    said = (
        f"p50 {1e3 * median(first):.0f} ms, p99 {1e3 * quantile(first, 0.99):.0f} ms, longest {1e3 * max(first):.0f} ms"
    )
    proof.say(
        f"{SWAPS} requests to two models in turn, time to the first token: {said}; other texts than at first: {wrong}"
    )
    proof.figures["swaps"] = first


def interrupted(proof: Proof, url: str) -> None:
    """A long answer is interrupted by other models' requests, and ends with the undisturbed text."""
    whole, _, alone = tell(url, MODELS[0], LONG)
    waits: list[float] = []
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(tell, url, MODELS[0], LONG)
        time.sleep(0.5)
        while not running.done():
            waits.append(tell(url, MODELS[1 + len(waits) % 2], 8)[1])
        text, _, seconds = running.result()
    same = "yes" if text == whole else "no"
    proof.say(
        f"an answer of {LONG} tokens: {alone:.1f} s alone, {seconds:.1f} s with {len(waits)} requests to others amid"
        f" it; the same text: {same}; their first token came after {1e3 * median(waits):.0f} ms (median),"
        f" {1e3 * max(waits):.0f} ms at most"
    )
    proof.figures["interrupted"] = {"alone": alone, "seconds": seconds, "waits": waits, "same": text == whole}


def mixed(
    proof: Proof, where: Callable[[str], AbstractContextManager[str]], rates: Mapping[str, float], limit: float
) -> dict[str, list[float]]:
    """Requests of 64 tokens to all models, as they come at these rates; the seconds to each one's first token.

    `where`: waits until the model may be asked, and says at which URL.
    """
    chance, lock = random.Random(7), threading.Lock()
    times: dict[str, list[float]] = {name: [] for name in rates}
    errors: list[str] = []
    coming = sorted((at, name) for name, rate in rates.items() for at in arrivals(chance, [(rate, limit)]))

    def ask(name: str, number: int) -> None:
        came = time.monotonic()
        try:
            with where(name) as url:
                waited = time.monotonic() - came
                _, first, _ = tell(url, name, 64, f"Story {number}: once upon a time")
        except (RuntimeError, httpx.HTTPError) as error:
            with lock:
                errors.append(f"{type(error).__name__}: {error}"[:200])
        else:
            with lock:
                times[name].append(waited + first)

    began = time.monotonic()
    with ThreadPoolExecutor(512) as at_once:
        for number, (at, name) in enumerate(coming):
            time.sleep(max(0.0, began + at - time.monotonic()))
            at_once.submit(ask, name, number)
    seconds = time.monotonic() - began
    proof.say()
    proof.say(
        f"{len(coming)} requests of 64 tokens within {limit:g} s, answered after {seconds:.0f} s; errors: {len(errors)}"
    )
    proof.say()
    proof.say("| model | requests | TTFT p50 s | p90 s | longest s |")
    proof.say("|---|---|---|---|---|")
    for name, each in times.items():
        figures = [median(each), quantile(each, 0.9), max(each)] if each else [0.0] * 3
        proof.say(f"| {name} | {len(each)} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    proof.say()
    proof.figures.setdefault("mixed", []).append({"ttft": times, "errors": errors[:5], "seconds": seconds})
    if errors:
        raise RuntimeError(f"first error: {errors[0]}")
    return times


def everywhere(url: str) -> Callable[[str], AbstractContextManager[str]]:
    """One endpoint for all models, which makes its clients wait itself."""
    return lambda _: nullcontext(url)


def burst(proof: Proof, url: str) -> None:
    """Many long requests to one model at once, as much as the KV cache of a model that has the GPU for itself holds."""
    figures = load(proof.work, url=url, model=MODELS[0], seed=90, **BURST)
    ttft = figures["ttft"] or [0.0]
    proof.say(
        f"{BURST['requests']} requests at once to one model, {BURST['prefix_tokens'] + BURST['question_tokens']} tokens"
        f" in, {BURST['answer_tokens']} out: {figures['seconds']:.1f} s in all, first token after {median(ttft):.1f} s"
        f" (p50), {quantile(ttft, 0.9):.1f} s (p90), errors: {len(figures['errors'])}"
    )
    proof.keep("burst", figures)


def split(proof: Proof) -> None:
    """The same three models on one GPU, a third of it each all the time."""
    there = gpu.list_gpus(os.environ)[0]
    each = (there.memory_total / 1024 - REST) / len(MODELS) - WEIGHTS - CONTEXT
    # SGLang's share is of what is free at its start; so each may have all that is left, and the cap decides.
    flags = ["--load-format", "dummy", "--mem-fraction-static", "0.97", *GRAPHS]
    flags += ["--max-total-tokens", str(int(each * 2**30 / KV_BYTES))]
    tenants = {}
    try:
        for name in MODELS:
            folder = shapes.llama(proof.models / "smollm2-135m", proof.work / name)
            tenants[name] = proof.replica(f"split-{name}", str(folder), flags, CUDA_VISIBLE_DEVICES=str(there.index))
        seconds = [wait_ready(one, START) for one in tenants.values()]
        proof.say(f"a KV cache of {each:.0f} GiB each; ready after " + ", ".join(f"{ready:.0f} s" for ready in seconds))
        front = services(proof.work, tenants)
        try:
            for name in MODELS:
                tell(front.url, name, 1)
            mixed(proof, everywhere(front.url), dict(zip(MODELS, RATES, strict=True)), MIXED_SECONDS)
            burst(proof, front.url)
        finally:
            front.stop()
    finally:
        for one in tenants.values():
            one.stop(signal.SIGKILL)


def asleep(proof: Proof) -> None:
    """The same three models in turns where the card holds the weights of one: each swap goes through host memory."""
    flags = ["--load-format", "dummy", "--mem-fraction-static", f"{ALONE}", *GRAPHS]
    environ = {"GPU_SHARE": "yes", "LEASE_DIR": str(proof.work / "leases-asleep"), "LEASE_WAIT": "400"}
    tenants: dict[str, Process] = {}
    try:
        # One after the other: the next has no room to start before the weights of the one before are in host memory.
        for name in MODELS:
            folder = shapes.llama(proof.models / "smollm2-135m", proof.work / name)
            tenants[name] = proof.replica(f"asleep-{name}", str(folder), flags, **environ)
            wait_ready(tenants[name], START)
            order(tenants[name], "sleep")
        front = services(proof.work, tenants)
        try:
            for name in MODELS:
                tell(front.url, name, 1)
            mixed(proof, everywhere(front.url), dict(zip(MODELS, RATES, strict=True)), MIXED_SECONDS)
        finally:
            front.stop()
    finally:
        for one in tenants.values():
            one.stop(signal.SIGKILL)


def whole(proof: Proof) -> None:
    """The same three models, each in a process that has the GPU for itself: a swap ends one and starts another."""
    flags = ["--load-format", "dummy", "--mem-fraction-static", f"{ALONE}", *GRAPHS]
    visible = str(gpu.list_gpus(os.environ)[0].index)

    def start(name: str) -> Process:
        folder = shapes.llama(proof.models / "smollm2-135m", proof.work / name)
        one = proof.replica(f"whole-{name}", str(folder), flags, CUDA_VISIBLE_DEVICES=visible)
        wait_ready(one, START)
        return one

    processes = OneProcess(start)
    try:
        mixed(proof, processes.of, dict(zip(MODELS, RATES, strict=True)), MIXED_SECONDS)
        took = ", ".join(f"{seconds:.0f}" for seconds in processes.took)
        proof.say(f"{len(processes.took)} starts, the end of the one before included: {took} s")
        proof.figures["whole processes"] = processes.took
    finally:
        processes.stop()


class OneProcess:
    """One model's process at a time, the way of llama-swap. Who asks for another model waits until the answers under
    way have ended, and for a start; who comes later and asks for the one that runs waits for its next turn.

    `took`: seconds of each swap. For threads.
    """

    def __init__(self, start: Callable[[str], Process]) -> None:
        self.took: list[float] = []
        self._start = start
        self._starter = ThreadPoolExecutor(1)  # a simulated replica ends with the thread that started it
        self._changed = threading.Condition()
        self._name, self._process = "", None  # type: tuple[str, Process | None]
        self._asking = 0
        self._waiting: dict[str, int] = {}  # by model, in the order in which the first of each came
        self._may_ask = 0  # of those who waited for the one that runs now

    @contextmanager
    def of(self, name: str) -> Iterator[str]:
        """The URL of that model's process, which stays until the caller is done."""
        with self._changed:
            if name != self._name or self._waiting or self._may_ask:
                self._wait(name)
            self._asking += 1
            assert self._process is not None
            url = self._process.url
        try:
            yield url
        finally:
            with self._changed:
                self._asking -= 1
                self._changed.notify_all()

    def _wait(self, name: str) -> None:
        self._waiting[name] = self._waiting.get(name, 0) + 1
        while not (name == self._name and self._may_ask):
            if name in self._waiting and next(iter(self._waiting)) == name and not (self._asking or self._may_ask):
                self._swap(name)
            else:
                self._changed.wait()
        self._may_ask -= 1

    def _swap(self, name: str) -> None:
        if name != self._name:
            began = time.monotonic()
            self._end()
            self._process, self._name = self._starter.submit(self._start, name).result(), name
            self.took.append(time.monotonic() - began)
        self._may_ask = self._waiting.pop(name)
        self._changed.notify_all()

    def _end(self) -> None:
        if self._process is not None:
            self._process.stop()

    def stop(self) -> None:
        self._end()
        self._starter.shutdown()


def killed(proof: Proof, url: str, tenants: Sequence[Process]) -> None:
    """The one awake is killed amid an answer while another's request waits."""
    with ThreadPoolExecutor(2) as beside:
        cut = beside.submit(tell, url, MODELS[0], 4000)
        time.sleep(1)
        tenants[0].stop(signal.SIGKILL)
        began = time.monotonic()
        waiting = beside.submit(tell, url, MODELS[1], 8)
        waiting.result()
        seconds = time.monotonic() - began
        told = _told(cut)
    proof.say(
        f"kill -9 of the one awake: another model's request was answered {seconds:.2f} s later; its own client: {told}"
    )
    proof.figures["killed"] = {"seconds": seconds, "told": told}


def _told(cut: Any) -> str:
    try:
        cut.result()
    except (RuntimeError, httpx.HTTPError) as error:
        return f"{error}"[:160]
    return "got its whole answer"
