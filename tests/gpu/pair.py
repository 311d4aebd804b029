"""Two replicas of Llama-3-8B's shape, on one GPU or on one each: routing, a drain, a death; and one replica on both."""

import importlib.util
import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from replica import gpu
from replica.presets import PREFILL_GRAPHS
from tests.bench.peers import ONE_THREAD
from tests.bench.stats import quantile
from tests.gpu.proof import ROW, START, Proof, chat, row
from tests.gpu.serving import Process, balancer, begin_load, cpu_seconds, finish, flush, load, router, wait_ready

POOL = 160_000  # tokens of KV of each replica: 20 GiB of Llama-3-8B's
NEED = 15 + 20 + 4  # GiB: weights, that pool, and what a prefill takes
# Public workloads in which prompts share their beginnings, scaled to two GPUs.
WORKLOADS: dict[str, dict[str, Any]] = {
    "38 groups of 5, 5,200 shared + 1,000 own": {
        "groups": 38, "requests": 190, "at_once": 24, "prefix_tokens": 5200, "question_tokens": 1000,
    },
    "one prefix for all 160, 2,200 shared + 6,200 own": {
        "groups": 1, "requests": 160, "at_once": 32, "prefix_tokens": 2200, "question_tokens": 6200,
    },
    "24 groups of 20, 1,700 shared + 60 own": {
        "groups": 24, "requests": 480, "at_once": 32, "prefix_tokens": 1700, "question_tokens": 60,
    },
}  # fmt: skip
ANSWER = 32  # tokens
ROUTER = "smg"
POLICIES = ("round_robin", "prefix_aware")
LLAMA = {"model": "llama-3-8b"}


class Pair:
    """Both replicas. `on_one`: they share a GPU, and each has a lease folder of its own; else `environ` names one."""

    def __init__(self, proof: Proof, total: int, *, on_one: bool, environ: Mapping[str, str]) -> None:
        """total: MiB of a GPU's memory."""
        self.proof, self.total, self.on_one, self.environ = proof, total, on_one, dict(environ)
        self.members: list[Process] = []
        self._started = 0

    def start(self, place: int) -> float:
        """Starts the replica of that place (0 or 1), in the place of one that ended; seconds until it was ready."""
        return wait_ready(self.launch(place), START)

    def launch(self, place: int) -> Process:
        # SGLang's share is of all the GPU's memory (0.5.16: of what is free at its start), so the second one on a GPU
        # must be allowed what the first one has as well. The pool is the same: --max-total-tokens caps it.
        share = NEED * 1024 / self.total * (place + 1 if self.on_one else 1)
        flags = ["--load-format", "dummy", "--max-total-tokens", str(POOL), "--cuda-graph-max-bs-decode", "160"]
        flags += ["--mem-fraction-static", f"{min(0.9, share):.2f}", *PREFILL_GRAPHS]
        self._started += 1
        one = self.proof.replica(f"pair-{self._started}", self.proof.llama_3(), flags, **self.environ)
        self.members[place : place + 1] = [one]
        return one

    def stop(self) -> None:
        for one in self.members:
            one.stop()


def routing(proof: Proof) -> None:
    """Two replicas on one GPU, groups that share 2,000-token prompts: more than one pool holds, less than both."""
    there = gpu.list_gpus(os.environ)
    pair = Pair(proof, there[0].memory_total, on_one=True, environ={"CUDA_VISIBLE_DEVICES": str(there[0].index)})
    try:
        first, second = pair.start(0), pair.start(1)
        proof.say(f"two replicas on one GPU, ready after {first:.0f} s and {second:.0f} s")
        compare(proof, "routing", pair.members)
        leave(proof, "one GPU", pair)
    finally:
        pair.stop()


def two_gpus(proof: Proof) -> None:
    """Two GPUs: two replicas that share a lease folder, a third one; a drain, a death; one replica on both."""
    two = _two(proof)
    if not two:
        return
    environ = _leases(proof, two)
    pair = Pair(proof, two[0].memory_total, on_one=False, environ=environ)
    try:
        seconds = [wait_ready(one, START) for one in (pair.launch(0), pair.launch(1))]
        own_gpus(proof, pair.members, seconds, [one.uuid for one in two])
        surplus(proof, "surplus-third", proof.llama(), **environ | {"LEASE_WAIT": "2"})
        leave(proof, "a GPU each", pair)
    finally:
        pair.stop()
    proof.write()
    on_both(proof, environ)


def beside_smg(proof: Proof) -> None:
    """Two GPUs, a replica each: what the balancer costs at 256 in flight, then public workloads beside smg."""
    two = _two(proof)
    if not two:
        return
    pair = Pair(proof, two[0].memory_total, on_one=False, environ=_leases(proof, two))
    try:
        seconds = [wait_ready(one, START) for one in (pair.launch(0), pair.launch(1))]
        proof.say("started at once, ready after " + " and ".join(f"{each:.0f} s" for each in seconds))
        share_of_a_core(proof, pair.members)
        compare(proof, "two_gpus", pair.members)
    finally:
        pair.stop()


def _two(proof: Proof) -> list[gpu.Gpu]:
    there = gpu.list_gpus(os.environ)
    if len(there) < 2:
        proof.say(f"not run: this machine has {len(there)} GPU")
        return []
    return there[:2]


def _leases(proof: Proof, two: Sequence[gpu.Gpu]) -> dict[str, str]:
    visible = ",".join(str(one.index) for one in two)
    return {"LEASE_DIR": str(proof.work / "leases-two"), "LEASE_WAIT": "30", "CUDA_VISIBLE_DEVICES": visible}


def share_of_a_core(proof: Proof, pair: Sequence[Process]) -> None:
    """What the balancer uses of a core while 256 streams, which it could continue elsewhere, pass through it."""
    front = balancer(proof.work, "prefix_aware", pair)
    job: dict[str, Any] = {**LLAMA, "groups": 0, "at_once": 256, "prefix_tokens": 300, "question_tokens": 50}
    try:
        load(proof.work, url=front.url, seed=70, requests=256, answer_tokens=16, **job)  # compiles kernels
        before = cpu_seconds(front)
        figures = load(proof.work, url=front.url, seed=71, requests=1024, answer_tokens=256, **job)
        used = cpu_seconds(front) - before
    finally:
        front.stop()
    events = len(figures["gaps"]) + len(figures["ttft"])
    proof.say(
        f"256 in flight: {figures['completion_tokens'] / figures['seconds']:,.0f} tokens/s, {len(figures['errors'])}"
        f" errors; the balancer used {100 * used / figures['seconds']:.0f} % of a core, {1e6 * used / events:.0f} us an"
        " event"
    )
    proof.keep("share of a core", figures)
    proof.figures["balancer at 256"] = {"cpu_seconds": used, "seconds": figures["seconds"], "events": events}


def own_gpus(proof: Proof, members: Sequence[Process], seconds: Sequence[float], uuids: Sequence[str]) -> None:
    """Says what each leased and what is used on each GPU. Raises RuntimeError unless each has one of its own."""
    leases = [lease(one) for one in members]
    for one, leased, ready in zip(members, leases, seconds, strict=True):
        proof.say(f"{one.name}: {leased}, ready after {ready:.0f} s  ")
    processes = gpu.list_processes()
    used = {one.uuid: one.memory_used for one in gpu.list_gpus(os.environ)}
    for uuid in uuids:
        pids = [str(process.pid) for process in processes if process.gpu == uuid]
        proof.say(
            f"nvidia-smi on {uuid}: {used[uuid]:,} MiB in use; compute processes: {', '.join(pids) or 'not told'}  "
        )
    proof.figures["own_gpus"] = {"leases": leases, "used": [used[uuid] for uuid in uuids]}
    if sorted(re.findall(r"GPU-[\w-]+", " ".join(leases))) != sorted(uuids):
        raise RuntimeError(f"they do not have a GPU each: {leases}")
    if min(used[uuid] for uuid in uuids) < 1024 * NEED / 2:
        raise RuntimeError("one of the two GPUs is not used")


def lease(one: Process) -> str:
    """What its first line says that it leased: `GPU 0 (L4, GPU-...)`."""
    found = re.search(r"^replica: (.*?): ", one.log.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{one.name} does not say what it leased:\n{one.tail()}")
    return found[1]


def surplus(proof: Proof, name: str, model: str, **environ: str) -> None:
    """One replica more than there are GPUs: says how it was refused. Raises RuntimeError when it was not."""
    one = proof.replica(name, model, **environ)
    try:
        status = one.popen.wait(60)
        proof.say(f'a replica more, with LEASE_WAIT={environ["LEASE_WAIT"]}: exit status {status}, "{one.tail(1)}"')
        if status == 0 or "no GPU free" not in one.tail(1):
            raise RuntimeError("a surplus replica was not refused with a clear line")
    finally:
        one.stop()


def starts(proof: Proof, members: Sequence[Process], environ: Mapping[str, str]) -> dict[str, Callable[[], Process]]:
    """What is compared, by name: each starts the balancer with a policy, or smg, which `environ` is for."""
    found: dict[str, Callable[[], Process]] = {
        policy: partial(balancer, proof.work, policy, members) for policy in POLICIES
    }
    if importlib.util.find_spec(ROUTER) is not None:
        found[ROUTER] = partial(router, proof.work, members, environ)
    else:
        proof.say(f"{ROUTER} is not installed here: left out")
    return found


def compare(proof: Proof, name: str, pair: Sequence[Process]) -> None:
    """The same requests through each policy, and through smg where it is, in another order each round."""
    fronts = starts(proof, pair, ONE_THREAD)
    warm = {**LLAMA, "groups": 2, "requests": 32, "at_once": 16, "prefix_tokens": 5000, "question_tokens": 1000}
    for one in pair:  # kernels that are compiled at first use are nobody's cost
        load(proof.work, url=one.url, seed=899, answer_tokens=ANSWER, **warm)
    done = 0
    while done < proof.rounds and (done == 0 or proof.seconds < proof.until):
        order = list(fronts)[done % len(fronts) :] + list(fronts)[: done % len(fronts)]
        for workload, shape in WORKLOADS.items():
            for policy in order:
                for one in pair:
                    flush(one)
                front = fronts[policy]()
                try:
                    figures = load(proof.work, url=front.url, seed=900 + done, answer_tokens=ANSWER, **LLAMA, **shape)
                finally:
                    front.stop()
                proof.keep(f"{name} {workload} {policy}", figures)
                print(
                    f"[{proof.seconds:6.1f}] {done + 1}: {workload}: {policy}: {figures['seconds']:.1f} s", flush=True
                )
        done += 1
        proof.write()
    proof.say(f"KV pools of {POOL} tokens; {done} rounds; of its runs by seconds the middle one, of two the slower:")
    proof.say()
    proof.say("| workload | policy | seconds | all runs | TTFT mean ms | TTFT p99 ms | cached share | errors |")
    proof.say("|---|---|---|---|---|---|---|---|")
    for workload in WORKLOADS:
        for policy in fronts:
            proof.say(f"| {workload} | {policy} | {_compared(proof.figures[f'{name} {workload} {policy}'])} |")
    proof.say()


def _compared(runs: Sequence[dict[str, Any]]) -> str:
    ordered = sorted(runs, key=lambda run: float(run["seconds"]))
    middle = ordered[len(runs) // 2]
    ttft = middle["ttft"] or [0.0]
    seconds = ", ".join(f"{run['seconds']:.1f}" for run in runs)
    return (
        f"{middle['seconds']:.1f} | {seconds} |"
        f" {1e3 * sum(ttft) / len(ttft):.0f} | {1e3 * quantile(ttft, 0.99):.0f} |"
        f" {middle['cached_tokens'] / max(1, middle['prompt_tokens']):.2f} |"
        f" {sum(run['error_count'] for run in runs)}"
    )


def leave(proof: Proof, name: str, pair: Pair) -> None:
    """Under load one replica is stopped by SIGTERM; then, started anew, killed with -9. No request may notice."""
    job: dict[str, Any] = {**LLAMA, "groups": 0, "requests": 160, "at_once": 160, "prefix_tokens": 200}
    job |= {"question_tokens": 20, "answer_tokens": 256, "keep_texts": True, "seed": 42}
    front = balancer(proof.work, "least_load", pair.members)
    try:
        undisturbed = [load(proof.work, url=front.url, **job)["texts"] for _ in range(2)]
        running = begin_load(proof.work, url=front.url, **job)
        time.sleep(3)
        status = pair.members[1].stop(signal.SIGTERM, patience=120)
        figures = finish(running)
    finally:
        front.stop()
    lost = figures["errors"]
    proof.say()
    proof.say(f"SIGTERM to one of two under 160 streams: {160 - len(lost)} of 160 requests whole, exit status {status}")
    proof.figures[f"sigterm, {name}"] = {"lost": lost, "status": status}
    if lost:
        raise RuntimeError(f"a drain lost requests: {lost[0]}")
    seconds = pair.start(1)
    front = balancer(proof.work, "least_load", pair.members)
    try:
        running = begin_load(proof.work, url=front.url, **job)
        time.sleep(3)
        pair.members[1].stop(signal.SIGKILL)
        figures = finish(running)
    finally:
        front.stop()
    lost = figures["errors"]
    same, usual = _same(figures["texts"], undisturbed[0]), _same(undisturbed[1], undisturbed[0])
    proof.say(
        f"kill -9 of one of two under 160 streams (ready {seconds:.0f} s after its start): {160 - len(lost)} of 160"
        f" whole; the text of an undisturbed run: {same}, and of two undisturbed runs each other's: {usual}"
    )
    for line in sorted({error[:110] for error in lost})[:3]:
        proof.say(f"- {line}")
    proof.figures[f"kill -9, {name}"] = {"lost": lost}
    if lost:
        raise RuntimeError(f"{len(lost)} streams broke: {lost[0]}")


def _same(texts: Mapping[str, str], others: Mapping[str, str]) -> int:
    return sum(text == others.get(number) for number, text in texts.items())


def on_both(proof: Proof, environ: Mapping[str, str]) -> None:
    """GPUS_PER_REPLICA=2: one replica on both GPUs, as tensor parallel ranks."""
    flags = ["--load-format", "dummy", "--mem-fraction-static", "0.8", "--cuda-graph-max-bs-decode", "16"]
    one = proof.replica("both", proof.llama(), flags, **{**environ, "GPUS_PER_REPLICA": "2"})
    try:
        seconds = wait_ready(one, START)
        said = chat(one.url, "llama-2-7b", "Hello?", max_tokens=16, ignore_eos=True)
        proof.say()
        proof.say(f"GPUS_PER_REPLICA=2: {lease(one)}, ready after {seconds:.0f} s")
        proof.say(f"one chat request: {said['usage']['completion_tokens']} tokens, finished by {_reason(said)}")
        proof.say()
        proof.say(f"| in flight {ROW}")
        proof.say("|---|---|---|---|---|---|---|")
        job: dict[str, Any] = {"model": "llama-2-7b", "groups": 0, "prefix_tokens": 300, "question_tokens": 50}
        job["answer_tokens"] = 128
        for at_once, requests in ((1, 6), (16, 48)):
            figures = load(proof.work, url=one.url, seed=60 + at_once, requests=requests, at_once=at_once, **job)
            proof.keep(f"on_both {at_once}", figures)
            proof.say(row(str(at_once), figures))
            if figures["errors"]:
                raise RuntimeError(f"first error: {figures['errors'][0]}")
    finally:
        one.stop()


def _reason(said: dict[str, Any]) -> str:
    return str(said["choices"][0]["finish_reason"])
