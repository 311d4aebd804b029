"""python3 -m tests.gpu --out FOLDER [--only STEP ...]: the proof, step by step, and REPORT.md of what came of it.

Each step stands alone: one that fails is reported with its reason, and the next goes on.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx

from tests.bench.stats import median, quantile
from tests.bench.workload import png
from tests.gpu import serving, shapes
from tests.gpu.serving import Process, balancer, begin_load, cpu_seconds, finish, load, replica, wait_ready

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 50), "blue": (35, 60, 220), "yellow": (240, 220, 40)}
COLOURS |= {"black": (12, 12, 12), "white": (245, 245, 245), "orange": (245, 140, 25), "purple": (130, 40, 170)}
POOL = 65_536  # tokens of KV that each of two replicas on one GPU gets: 32 GiB of Llama-2-7b's
START = 240.0  # seconds a replica may take


class Proof:
    """The steps' common ground: where files lie, what was said."""

    def __init__(self, out: Path, models: Path, work: Path) -> None:
        self.out, self.models, self.work = out, models, work
        self.lines: list[str] = []
        self.figures: dict[str, Any] = {}
        self.began = time.monotonic()

    def say(self, line: str = "") -> None:
        print(f"[{time.monotonic() - self.began:6.1f}] {line}", flush=True)
        self.lines.append(line)

    def write(self) -> None:
        (self.out / "REPORT.md").write_text("\n".join(self.lines) + "\n")
        (self.out / "report.json").write_text(json.dumps(self.figures, indent=1))


def environment(proof: Proof) -> None:
    """What machine this is."""
    smi = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    gpus = subprocess.run(smi, capture_output=True, text=True, check=True).stdout.strip()
    versions = {name: metadata.version(name) for name in ("sglang", "torch", "triton", "transformers")}
    proof.say(f"{gpus}; Python {sys.version.split()[0]}; " + ", ".join(f"{n} {v}" for n, v in versions.items()))
    listed = subprocess.run(
        [sys.executable, "-m", "replica", "--list-gpus"], capture_output=True, text=True, check=True
    )
    proof.say(f"`python -m replica --list-gpus`: {len(json.loads(listed.stdout))} GPU")
    proof.figures["environment"] = {"gpus": gpus, **versions}


def chat(url: str, model: str, content: Any, **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, **more}
    answer = httpx.post(url + "/v1/chat/completions", json=body, timeout=60, trust_env=False)
    answer.raise_for_status()
    return dict(answer.json())


def text(proof: Proof) -> None:
    """smollm2-135m with real weights: right answers, and a prefix reused by RadixAttention."""
    one = replica("smollm2", "smollm2-135m", proof.work)
    try:
        seconds = wait_ready(one, START)
        said = chat(one.url, "smollm2-135m", "What is the capital of France?", max_tokens=24)
        words = said["choices"][0]["message"]["content"]
        if "Paris" not in words:
            raise RuntimeError(f"asked for the capital of France it said: {words}")
        long = "Read this. " + " ".join(f"Line {n} says {n * n}." for n in range(150))
        first, second = (
            chat(one.url, "smollm2-135m", f"{long} {end}", max_tokens=4)["usage"] for end in ("One?", "Two?")
        )
        cached = second["prompt_tokens_details"]["cached_tokens"]
        if cached < 0.9 * second["prompt_tokens"]:
            raise RuntimeError(f"of {second['prompt_tokens']} prompt tokens only {cached} were cached")
        proof.say(f'smollm2-135m ready after {seconds:.0f} s; capital of France: "{words.strip()}"')
        proof.say(f"the second question on a prompt of {first['prompt_tokens']} tokens: {cached} cached")
        command = next(line for line in one.log.read_text().splitlines() if line.startswith("replica: "))
        proof.say(f"its lease and command: `{command.split(' --served')[0]} ...`")
        try:
            surplus = serving.replica(
                "surplus", "smollm2-135m", proof.work, LEASE_DIR=str(proof.work / "leases-smollm2"), LEASE_WAIT="2"
            )
            status = surplus.popen.wait(60)
            proof.say(f'a second replica with the same leases: exit status {status}, "{surplus.tail(1)}"')
            if status == 0:
                raise RuntimeError("a surplus replica was not refused")
        finally:
            surplus.stop()
        proof.figures["text"] = {"ready_seconds": seconds, "cached": cached, "prompt": second["prompt_tokens"]}
    finally:
        one.stop()


def image(proof: Proof) -> None:
    """tiny-llava with real weights: names plain colours, and reuses an image's KV."""
    one = replica("tiny-llava", "tiny-llava", proof.work)
    try:
        seconds = wait_ready(one, START)
        right = []
        for name, rgb in COLOURS.items():
            picture = {"url": "data:image/png;base64," + png(56, 56, bytes(rgb) * 56 * 56)}
            ask = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": "What color is it?"}]
            said = chat(one.url, "tiny-llava", ask, max_tokens=16)
            if name in said["choices"][0]["message"]["content"].lower():
                right.append(name)
            again = chat(one.url, "tiny-llava", [*ask[:1], {"type": "text", "text": "And now?"}], max_tokens=2)["usage"]
        cached = again["prompt_tokens_details"]["cached_tokens"]
        proof.say(f"tiny-llava ready after {seconds:.0f} s; {len(right)} of {len(COLOURS)} colours named right")
        proof.say(f"another question on the same image: {cached} of {again['prompt_tokens']} tokens cached")
        proof.figures["image"] = {"right": right, "cached": cached}
        if len(right) < 6:
            raise RuntimeError(f"only {right} were named right")
    finally:
        one.stop()


def _llama(proof: Proof) -> str:
    folder = proof.work / "llama-2-7b"
    if not (folder / "config.json").exists():
        shapes.llama(proof.models / "smollm2-135m", folder)
    return str(folder)


def _row(name: str, figures: dict[str, Any]) -> str:
    ttft, gaps = figures["ttft"], figures["gaps"]
    return (
        f"| {name} | {figures['completion_tokens'] / figures['seconds']:,.0f} | {1e3 * median(ttft):.1f} |"
        f" {1e3 * quantile(ttft, 0.99):.1f} | {1e3 * median(gaps):.2f} | {1e3 * quantile(gaps, 0.99):.2f} |"
        f" {len(figures['errors'])} |"
    )


def cost(proof: Proof) -> None:
    """One replica with Llama-2-7b's shape, direct and through the balancer."""
    flags = ["--load-format", "dummy", "--mem-fraction-static", "0.8", "--cuda-graph-max-bs", "256"]
    one = replica("llama", _llama(proof), proof.work, flags)
    try:
        proof.say(f"Llama-2-7b's shape ready after {wait_ready(one, START):.0f} s")
        front = balancer(proof.work, "round_robin", [one])
        try:
            proof.say()
            proof.say("| in flight | tokens/s | TTFT p50 ms | TTFT p99 ms | gap p50 ms | gap p99 ms | errors |")
            proof.say("|---|---|---|---|---|---|---|")
            for at_once, requests in ((1, 6), (16, 48), (64, 192), (256, 768)):
                for name, url in (("direct", one.url), ("through the balancer", front.url)):
                    before = cpu_seconds(front)
                    httpx.post(one.url + "/flush_cache", timeout=30, trust_env=False)
                    figures = load(
                        proof.work,
                        url=url,
                        model="llama-2-7b",
                        seed=at_once,
                        groups=0,
                        requests=requests,
                        at_once=at_once,
                        prefix_tokens=300,
                        question_tokens=50,
                        answer_tokens=128,
                    )
                    used = cpu_seconds(front) - before
                    proof.say(_row(f"{at_once}, {name}", figures))
                    events = len(figures["gaps"]) + len(figures["ttft"])
                    summary = {k: figures[k] for k in ("seconds", "completion_tokens")} | {"events": events}
                    proof.figures[f"cost {at_once} {name}"] = summary | {"balancer_cpu_seconds": used}
                    if name != "direct":
                        share = 100 * used / figures["seconds"]
                        each = 1e6 * used / max(1, events)
                        note = f"balancer at {at_once}: {share:.0f} % of one core, {each:.0f} us an event"
                        proof.figures[f"note {at_once}"] = note
                    if figures["errors"]:
                        proof.say(f"first error: {figures['errors'][0]}")
            proof.say()
            for at_once in (1, 16, 64, 256):
                proof.say(proof.figures[f"note {at_once}"] + "  ")
        finally:
            front.stop()
    finally:
        one.stop()


def _pair(proof: Proof) -> list[Process]:
    """Two replicas of Llama-2-7b's shape on the one GPU, each with leases of its own."""
    common = ["--load-format", "dummy", "--max-total-tokens", str(POOL), "--cuda-graph-max-bs", "64"]
    pair = []
    for number, share in ((1, "0.40"), (2, "0.70")):
        one = replica(f"pair-{number}", _llama(proof), proof.work, [*common, "--mem-fraction-static", share])
        pair.append(one)
        wait_ready(one, START)
    return pair


def routing(proof: Proof) -> None:
    """Two replicas, 48 groups that share 2,000-token prompts: more than one pool holds, less than both."""
    pair = _pair(proof)
    try:
        proof.say(f"two replicas on one GPU, KV pools of {POOL} tokens; 48 groups, 32 in flight, 480 requests:")
        proof.say()
        proof.say("| policy | seconds | tokens/s | TTFT mean ms | TTFT p50 ms | TTFT p99 ms | cached share | errors |")
        proof.say("|---|---|---|---|---|---|---|---|")
        for turn in range(3):
            for policy in ("round_robin", "least_load", "prefix_aware"):
                for one in pair:
                    httpx.post(one.url + "/flush_cache", timeout=30, trust_env=False)
                front = balancer(proof.work, policy, pair)
                try:
                    figures = load(
                        proof.work,
                        url=front.url,
                        model="llama-2-7b",
                        seed=900 + turn,
                        groups=48,
                        requests=480,
                        at_once=32,
                        prefix_tokens=2000,
                        question_tokens=40,
                        answer_tokens=32,
                    )
                finally:
                    front.stop()
                proof.figures.setdefault(f"routing {policy}", []).append(
                    {k: figures[k] for k in ("seconds", "completion_tokens", "prompt_tokens", "cached_tokens", "ttft")}
                    | {"errors": len(figures["errors"])}
                )
        for policy in ("round_robin", "least_load", "prefix_aware"):
            runs = sorted(proof.figures[f"routing {policy}"], key=lambda run: run["seconds"])
            middle = runs[1]
            mean = sum(middle["ttft"]) / len(middle["ttft"])
            proof.say(
                f"| {policy} | {middle['seconds']:.1f} | {middle['completion_tokens'] / middle['seconds']:,.0f} |"
                f" {1e3 * mean:.0f} | {1e3 * median(middle['ttft']):.0f} | {1e3 * quantile(middle['ttft'], 0.99):.0f} |"
                f" {middle['cached_tokens'] / middle['prompt_tokens']:.2f} | {sum(run['errors'] for run in runs)} |"
            )
        proof.say()
        proof.say("(the run in the middle of three, by seconds; errors of all three)")
        kill(proof, pair)
    finally:
        for one in pair:
            one.stop()


def kill(proof: Proof, pair: list[Process]) -> None:
    """Under load one replica is stopped by SIGTERM; then, started anew, killed with -9."""
    front = balancer(proof.work, "least_load", pair)
    job = {"url": front.url, "model": "llama-2-7b", "groups": 0, "at_once": 16, "prefix_tokens": 200}
    job |= {"question_tokens": 20, "answer_tokens": 256}
    try:
        running = begin_load(proof.work, seed=41, requests=160, **job)
        time.sleep(4)
        status = pair[1].stop(signal.SIGTERM, patience=120)
        figures = finish(running)
        proof.say()
        proof.say(
            f"SIGTERM to one of two under load: {160 - len(figures['errors'])} of 160 requests whole,"
            f" exit status {status}"
        )
        proof.figures["sigterm"] = {"lost": figures["errors"], "status": status}
        pair[1] = replica(
            "pair-3",
            _llama(proof),
            proof.work,
            ["--load-format", "dummy", "--max-total-tokens", str(POOL), "--mem-fraction-static", "0.70"],
        )
        seconds = wait_ready(pair[1], START)
    finally:
        front.stop()
    front = balancer(proof.work, "least_load", pair)
    try:
        running = begin_load(proof.work, seed=42, requests=160, **(job | {"url": front.url}))
        time.sleep(4)
        pair[1].stop(signal.SIGKILL)
        figures = finish(running)
        proof.say(
            f"kill -9 of one of two under load (ready {seconds:.0f} s after its start):"
            f" {160 - len(figures['errors'])} of 160 whole,"
            f" {len(figures['errors'])} were on the killed one and were told so"
        )
        for line in sorted({error[:110] for error in figures["errors"]})[:3]:
            proof.say(f"- {line}")
        proof.figures["kill -9"] = {"lost": figures["errors"]}
        if len(figures["errors"]) > 16:
            raise RuntimeError("more requests were lost than the killed replica can have held")
    finally:
        front.stop()


def llava(proof: Proof) -> None:
    """LLaVA-1.6-vicuna-7b's shape, random weights through the real loader: images of 672 x 672 in tiles."""
    folder = proof.work / "llava-v1.6-vicuna-7b"
    began = time.monotonic()
    shapes.llava(proof.models / "tiny-llava", folder)
    proof.say(f"LLaVA-1.6-vicuna-7b's shape written in {time.monotonic() - began:.0f} s")
    one = replica("llava", str(folder), proof.work, ["--mem-fraction-static", "0.8"])
    try:
        seconds = wait_ready(one, START)
        times, usages = [], []
        for number in range(4):
            shade = bytes((40 * number, 255 - 40 * number, 128))
            picture = {"url": "data:image/png;base64," + png(672, 672, shade * 672 * 672)}
            for question in ("Describe this image.", "What is in it?"):
                ask = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": question}]
                began = time.monotonic()
                usages.append(chat(one.url, folder.name, ask, max_tokens=16, ignore_eos=True)["usage"])
                times.append(time.monotonic() - began)
        fresh, again = times[0::2], times[1::2]
        cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages[1::2]]
        proof.say(
            f"ready after {seconds:.0f} s; an image is {usages[0]['prompt_tokens']} prompt tokens; 16 tokens on a"
            f" new image {1e3 * median(fresh):.0f} ms, on one seen before {1e3 * median(again):.0f} ms"
            f" ({median(cached):.0f} tokens cached)"
        )
        proof.figures["llava"] = {"fresh": fresh, "again": again, "cached": cached}
    finally:
        one.stop()
        shutil.rmtree(folder, ignore_errors=True)


STEPS: dict[str, Callable[[Proof], None]] = {
    step.__name__: step for step in (environment, text, image, cost, routing, llava)
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--models", type=Path, default=Path(".models"), help="embedded models; made if missing")
    parser.add_argument("--work", type=Path, default=Path("/tmp/groundserve-gpu"), help="logs and model folders")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    options = parser.parse_args()
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    proof = Proof(options.out, options.models, options.work)
    failed = []
    for name in options.only:
        step = STEPS[name]
        proof.say()
        proof.say(f"## {(step.__doc__ or name).rstrip('.')}")
        proof.say()
        try:
            step(proof)
        except Exception as error:  # the next step may still prove something
            failed.append(name)
            proof.say(f"FAILED: {type(error).__name__}: {error}")
        proof.write()
    print(f"failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
