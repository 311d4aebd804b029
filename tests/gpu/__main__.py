"""python3 -m tests.gpu --out FOLDER [--only STEP ...]: the proof, step by step, and REPORT.md of what came of it.

Each step stands alone: one that fails is reported with its reason, and the next goes on.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from replica import gpu
from tests.bench.stats import median
from tests.bench.workload import png
from tests.gpu import shapes
from tests.gpu.cold import cold
from tests.gpu.eight import eight, ten
from tests.gpu.pair import beside_smg, routing, surplus, two_gpus
from tests.gpu.proof import ROW, START, Proof, chat, row
from tests.gpu.serving import balancer, cpu_seconds, flush, load, wait_ready
from tests.gpu.sharing import asleep, sharing, split, whole

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 50), "blue": (35, 60, 220), "yellow": (240, 220, 40)}
COLOURS |= {"black": (12, 12, 12), "white": (245, 245, 245), "orange": (245, 140, 25), "purple": (130, 40, 170)}


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


def text(proof: Proof) -> None:
    """smollm2-135m with real weights: right answers, and a prefix reused by RadixAttention."""
    one = proof.replica("smollm2", "smollm2-135m")
    try:
        seconds = wait_ready(one, START)
        said = chat(one.url, "smollm2-135m", "Name the capital of France.", max_tokens=24)
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
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", str(gpu.list_gpus(os.environ)[0].index))
        leases = {"LEASE_DIR": str(proof.work / "leases-smollm2"), "LEASE_WAIT": "2"}
        surplus(proof, "surplus", "smollm2-135m", CUDA_VISIBLE_DEVICES=seen, **leases)
        proof.figures["text"] = {"ready_seconds": seconds, "cached": cached, "prompt": second["prompt_tokens"]}
    finally:
        one.stop()


def image(proof: Proof) -> None:
    """tiny-llava with real weights: names plain colours, and reuses an image's KV."""
    one = proof.replica("tiny-llava", "tiny-llava")
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


def cost(proof: Proof) -> None:
    """One replica with Llama-2-7b's shape, direct and through the balancer."""
    flags = ["--load-format", "dummy", "--mem-fraction-static", "0.8", "--cuda-graph-max-bs-decode", "256"]
    one = proof.replica("llama", proof.llama(), flags)
    try:
        proof.say(f"Llama-2-7b's shape ready after {wait_ready(one, START):.0f} s")
        front = balancer(proof.work, "round_robin", [one])
        try:
            proof.say()
            proof.say(f"| in flight {ROW}")
            proof.say("|---|---|---|---|---|---|---|")
            for at_once, requests in ((1, 6), (16, 48), (64, 192), (256, 768)):
                for name, url in (("direct", one.url), ("through the balancer", front.url)):
                    before = cpu_seconds(front)
                    flush(one)
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
                    proof.say(row(f"{at_once}, {name}", figures))
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


def llava(proof: Proof) -> None:
    """LLaVA-1.6-vicuna-7b's shape, random weights through the real loader: images of 672 x 672 in tiles."""
    folder = proof.work / "llava-v1.6-vicuna-7b"
    began = time.monotonic()
    shapes.llava(proof.models / "tiny-llava", folder)
    proof.say(f"LLaVA-1.6-vicuna-7b's shape written in {time.monotonic() - began:.0f} s")
    one = proof.replica("llava", str(folder), ["--mem-fraction-static", "0.8"])
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
    step.__name__: step
    for step in (
        environment,
        text,
        image,
        cost,
        cold,
        routing,
        two_gpus,
        beside_smg,
        llava,
        sharing,
        split,
        asleep,
        whole,
        ten,
        eight,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--models", type=Path, default=Path(".models"), help="embedded models; made if missing")
    parser.add_argument("--work", type=Path, default=Path("/tmp/groundserve-gpu"), help="logs and model folders")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--flags", default="", metavar='"FLAG ..."', help="SGLang's, for each replica (none)")
    parser.add_argument("--rounds", type=int, default=3, help="of each routing comparison (3)")
    parser.add_argument("--until", type=float, default=330, help="seconds after which no such round begins (330)")
    parser.add_argument("--speed", type=float, default=1, help="stages of the workload at rates, so much shorter (1)")
    options = parser.parse_args()
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    more = {"flags": shlex.split(options.flags), "rounds": options.rounds, "until": options.until}
    more["speed"] = options.speed
    proof = Proof(options.out, options.models, options.work, **more)
    failed = []
    for name in options.only:
        step = STEPS[name]
        proof.say()
        proof.say(f"## {(step.__doc__ or name).rstrip('.')}")
        proof.say()
        began = proof.seconds
        try:
            step(proof)
        except Exception as error:  # the next step may still prove something
            failed.append(name)
            proof.say(f"FAILED: {type(error).__name__}: {error}")
        proof.say()
        proof.say(f"(this step took {proof.seconds - began:.0f} s)")
        proof.write()
    print(f"failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
