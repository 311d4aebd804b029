"""Three models of Llama-2-7b's shape on one GPU, behind one endpoint."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from replica import gpu
from tests.bench.stats import median, quantile
from tests.gpu import shapes
from tests.gpu.proof import START, Proof
from tests.gpu.serving import Process, services, wait_ready

MODELS = ("ann", "bea", "cal")
RATES = (0.5, 1.5, 4.5)  # requests a second of each in the mixed load
POOL = 60.0  # GiB of KV cache for the one that is awake
WEIGHTS = 13.5
SWAPS, MIXED_SECONDS = 200, 40.0
LONG = 600  # tokens of the answer that is interrupted
ORDERS = {"X-Balancer": "the proof"}


def sharing(proof: Proof) -> None:
    """Three models that share one GPU behind one endpoint: swaps, an interrupted answer, mixed load, a kill."""
    total = gpu.list_gpus(os.environ)[0].memory_total / 1024
    flags = ["--load-format", "dummy", "--mem-fraction-static", f"{(WEIGHTS + POOL) / total:.3f}"]
    flags += ["--disable-prefill-cuda-graph", "--cuda-graph-max-bs-decode", "32"]
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
            for part in (swaps, interrupted, mixed):
                part(proof, front.url)
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


def mixed(proof: Proof, url: str) -> None:
    """Requests of 64 tokens to all three, as they come, at rates of 1:3:9."""
    chance, lock = random.Random(7), threading.Lock()
    times: dict[str, list[float]] = {name: [] for name in MODELS}
    errors: list[str] = []
    arrivals = sorted(
        (at, name) for name, rate in zip(MODELS, RATES, strict=True) for at in _poisson(chance, rate, MIXED_SECONDS)
    )

    def ask(name: str, number: int) -> None:
        try:
            _, first, _ = tell(url, name, 64, f"Story {number}: once upon a time")
        except (RuntimeError, httpx.HTTPError) as error:
            with lock:
                errors.append(f"{type(error).__name__}: {error}"[:200])
        else:
            with lock:
                times[name].append(first)

    began = time.monotonic()
    with ThreadPoolExecutor(256) as at_once:
        for number, (at, name) in enumerate(arrivals):
            time.sleep(max(0.0, began + at - time.monotonic()))
            at_once.submit(ask, name, number)
    seconds = time.monotonic() - began
    proof.say()
    proof.say(
        f"{len(arrivals)} requests of 64 tokens within {MIXED_SECONDS:g} s, answered after {seconds:.0f} s; errors:"
        f" {len(errors)}"
    )
    proof.say()
    proof.say("| model | requests | TTFT p50 s | p90 s | longest s |")
    proof.say("|---|---|---|---|---|")
    for name, each in times.items():
        figures = [median(each), quantile(each, 0.9), max(each)] if each else [0.0] * 3
        proof.say(f"| {name} | {len(each)} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    proof.say()
    proof.figures["mixed"] = {"ttft": times, "errors": errors[:5], "seconds": seconds}
    if errors:
        raise RuntimeError(f"first error: {errors[0]}")


def _poisson(chance: random.Random, rate: float, seconds: float) -> list[float]:
    times, at = [], chance.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += chance.expovariate(rate)
    return times


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
