"""A replica on each GPU, up to a rack's eight: a public workload at its true size, and ten models by need."""

import os
import signal
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx

from replica import gpu
from replica.presets import PREFILL_GRAPHS
from tests.bench.process_tree import cpu_seconds
from tests.bench.stats import quantile
from tests.gpu import shapes
from tests.gpu.pair import LLAMA, starts
from tests.gpu.proof import START, Proof
from tests.gpu.serving import Process, balancer, flush, load, services, wait_ready
from tests.gpu.sharing import everywhere, mixed, order, tell

FULL = 8  # GPUs that the workload is made for; fewer get as much less of it
POOL = 320_000  # tokens of KV of each replica: 40 GiB of Llama-3-8B's
# llm-d's guide: groups of prompts that share a long beginning, come at growing rates, and are asked again and again.
GROUPS, QUESTIONS = 150, 5
STAGES = ((3, 20), (10, 20), (20, 20), (40, 20), (60, 20))  # requests a second on eight GPUs, and for how many seconds
SHAPE = {"prefix_tokens": 6000, "question_tokens": 1200, "answer_tokens": 1000}
LIMIT = 300.0  # seconds for one answer
NAMES = ("ash", "beech", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine")
TOTAL_RATE = 8.0  # requests a second to all ten; each model gets a third less than the one before
TEN_SECONDS = 45.0
TEN_SHARE = 0.83  # of a card, for the one that is awake: what is left holds some of the others' weights


def eight(proof: Proof) -> None:
    """A replica on each GPU of up to eight: 150 groups of 5 at growing rates beside smg; ten models over all GPUs."""
    there = gpu.list_gpus(os.environ)[:FULL]
    environ = {"LEASE_DIR": str(proof.work / "leases-eight"), "LEASE_WAIT": "30"}
    environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(one.index) for one in there)
    flags = ["--load-format", "dummy", "--max-total-tokens", str(POOL), "--cuda-graph-max-bs-decode", "256"]
    flags += PREFILL_GRAPHS
    members = [proof.replica(f"eight-{n}", proof.llama_3(), flags, **environ) for n in range(len(there))]
    try:
        seconds = [wait_ready(one, START) for one in members]
        proof.say(f"{len(members)} replicas ready after {max(seconds):.0f} s, a GPU each")
        for one in members:  # kernels that are compiled at first use are nobody's cost
            load(
                proof.work,
                url=one.url,
                seed=899,
                groups=2,
                requests=64,
                at_once=32,
                **LLAMA,
                **SHAPE | {"answer_tokens": 32},
            )
        at_rates(proof, members, len(members) / FULL, SHAPE, proof.speed)
    finally:
        for one in members:
            one.stop(signal.SIGKILL)
    proof.write()
    ten(proof)


def at_rates(
    proof: Proof, members: Sequence[Process], scale: float, shape: Mapping[str, int], speed: float = 1.0
) -> None:
    """The workload through each policy and smg. `scale`: of its groups and rates; `speed`: stages so much shorter."""
    fronts = starts(proof, members, {})  # smg with as many threads as it likes
    fronts["prefix_aware, 2 workers"] = partial(balancer, proof.work, "prefix_aware", members, 2)
    job: dict[str, Any] = {**LLAMA, **shape, "groups": max(1, round(GROUPS * scale)), "questions": QUESTIONS}
    job |= {"stages": [(rate * scale, seconds / speed) for rate, seconds in STAGES], "limit": LIMIT, "seed": 1}
    stages = ", ".join(f"{rate * scale:g}" for rate, _ in STAGES)
    proof.say(f"{job['groups']} groups of {QUESTIONS}, {stages} a second for {STAGES[0][1] / speed:g} s each:")
    proof.say()
    proof.say(
        "| policy | seconds | tokens/s | TTFT mean s | TTFT p99 s | cached share | errors | cores of the balancer |"
    )
    proof.say("|---|---|---|---|---|---|---|---|")
    for name, begin in fronts.items():
        for one in members:
            flush(one)
        front = begin()
        try:
            before = cpu_seconds(front.popen.pid)
            figures = load(proof.work, within=2 * LIMIT, url=front.url, **job)
            cores = (cpu_seconds(front.popen.pid) - before) / figures["seconds"]
        finally:
            front.stop()
        ttft = figures["ttft"] or [0.0]
        cached = figures["cached_tokens"] / max(1, figures["prompt_tokens"])
        proof.say(
            f"| {name} | {figures['seconds']:.0f} | {figures['completion_tokens'] / figures['seconds']:,.0f} |"
            f" {sum(ttft) / len(ttft):.2f} | {quantile(ttft, 0.99):.2f} | {cached:.2f} | {len(figures['errors'])} |"
            f" {cores:.2f} |"
        )
        proof.keep(f"eight {name}", figures)
        proof.figures[f"cores {name}"] = cores
        proof.write()
    proof.say()


def ten(proof: Proof) -> None:
    """Ten models of Llama-3.2-1B's shape behind one endpoint, over all GPUs by need; most asleep in host memory."""
    there = gpu.list_gpus(os.environ)[:FULL]
    environ = {"GPU_SHARE": "yes", "LEASE_DIR": str(proof.work / "leases-ten"), "LEASE_WAIT": "580"}
    environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(one.index) for one in there)
    flags = ["--load-format", "dummy", "--mem-fraction-static", f"{TEN_SHARE}", "--disable-prefill-cuda-graph"]
    flags += ["--cuda-graph-max-bs-decode", "16"]
    tenants: dict[str, Process] = {}
    try:
        for name in NAMES:
            folder = shapes.llama(proof.models / "smollm2-135m", proof.work / name, shapes.LLAMA_3_1B)
            tenants[name] = proof.replica(f"ten-{name}", str(folder), flags, **environ)
        seconds = started(tenants.values())
        proof.say(
            f"{len(tenants)} models on {len(there)} GPU, the first ready after {seconds[0]:.0f} s, the last after"
            f" {seconds[-1]:.0f} s"
        )
        front = services(proof.work, tenants)
        try:
            by_need(proof, front.url, TEN_SECONDS)
        finally:
            front.stop()
        states = [state(one) for one in tenants.values()]
        proof.say("at the end: " + ", ".join(f"{states.count(each)} {each}" for each in sorted(set(states))))
        used = ", ".join(f"{one.memory_used / 1024:.0f}" for one in gpu.list_gpus(os.environ)[:FULL])
        proof.say(f"in use then: {used} GiB")
    finally:
        for one in tenants.values():
            one.stop(signal.SIGKILL)


def by_need(proof: Proof, url: str, limit: float) -> None:
    """Each model asked twice in turn, so that it wakes from host memory; then all of them at rates that fall."""
    first = [tell(url, name, 8)[1] for _ in range(2) for name in NAMES]
    proof.say(f"each asked in turn, twice: first token after {min(first):.2f} to {max(first):.2f} s")
    whole = sum((2 / 3) ** place for place in range(len(NAMES)))
    rates = {name: TOTAL_RATE * (2 / 3) ** place / whole for place, name in enumerate(NAMES)}
    times = mixed(proof, everywhere(url), rates, limit)
    every = [each for model in times.values() for each in model]
    proof.say(f"of all: first token p50 {quantile(every, 0.5):.2f} s, p99 {quantile(every, 0.99):.2f} s")
    proof.figures["by need"] = {"in turn": first}


def started(tenants: Collection[Process]) -> list[float]:
    """Seconds until each was ready, sorted. Their weights are in host memory then, so that the next one can start."""

    def wait(one: Process) -> float:
        seconds = wait_ready(one, 4 * START)
        order(one, "sleep")
        return seconds

    with ThreadPoolExecutor(len(tenants)) as at_once:
        return sorted(at_once.map(wait, tenants))


def state(one: Process) -> str:
    """What it says of its part in the turns."""
    return str(httpx.get(f"{one.url}/lease", timeout=30, trust_env=False).json()["state"])
