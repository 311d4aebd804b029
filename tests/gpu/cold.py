"""Where the time of a cold start goes, by SGLang's own log, and what its settings save of it."""

import re
import signal
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from replica.presets import PREFILL_GRAPHS, PREFILL_SIZES
from tests.gpu.proof import ROW, START, Proof, row
from tests.gpu.serving import flush, load, wait_ready

STARTS: Mapping[str, Sequence[str]] = {
    "as it comes, nothing cached": (),
    "as it comes": (),
    f"{len(PREFILL_SIZES)} prefill graphs, as a preset": PREFILL_GRAPHS,
    "no prefill graphs": ("--disable-prefill-cuda-graph",),
}
STAMP = re.compile(r"^\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[^\]]*\] (.*)")
LEAST = 2.0  # seconds that a phase must have taken to be told


def cold(proof: Proof) -> None:
    """A cold start of Llama-2-7b's shape by its phases, as SGLang comes and with its settings; their throughput."""
    home = proof.work / "home-cold"  # with caches of its own: kernels are compiled once, and then lie there
    home.mkdir(exist_ok=True)
    table = [f"| start | ready after s | in flight {ROW}", "|---|---|---|---|---|---|---|---|---|"]
    for number, (name, flags) in enumerate(STARTS.items()):
        more = ["--load-format", "dummy", "--mem-fraction-static", "0.8", "--cuda-graph-max-bs-decode", "160", *flags]
        began = time.time()
        one = proof.replica(f"cold-{number}", proof.llama(), more, HOME=str(home))
        try:
            seconds = wait_ready(one, START)
            proof.say(f"{name}: ready after {seconds:.0f} s  ")
            for phase in phases(one.log, began, began + seconds):
                proof.say(f"- {phase}")
            proof.say()
            proof.figures[f"cold {name}"] = {"seconds": seconds, "flags": list(flags)}
            if number:
                for at_once, requests in ((1, 16), (16, 128), (128, 512)):
                    figures = throughput(proof, one.url, at_once, requests)
                    proof.keep(f"cold {name} {at_once}", figures)
                    table.append(row(f"{name} | {seconds:.0f} | {at_once}", figures))
                    flush(one)
        finally:
            one.stop(signal.SIGKILL)
    for line in table:
        proof.say(line)


def throughput(proof: Proof, url: str, at_once: int, requests: int) -> dict[str, Any]:
    job: dict[str, Any] = {"model": "llama-2-7b", "groups": 0, "prefix_tokens": 300, "question_tokens": 50}
    job |= {"answer_tokens": 128, "url": url, "at_once": at_once}
    load(proof.work, seed=80 + at_once, requests=at_once, **job)  # what is compiled at first use is nobody's cost
    return load(proof.work, seed=180 + at_once, requests=requests, **job)


def phases(log: Path, began: float, ready: float) -> list[str]:
    """What took at least LEAST seconds of a start, named by the lines of the log before and after it.

    `began`, `ready`: seconds since the epoch. The log has whole seconds.
    """
    told = [found for line in log.read_text(errors="replace").splitlines() if (found := STAMP.match(line))]
    stamps = [(datetime.fromisoformat(found[1]).timestamp(), found[2][:60]) for found in told]
    stamps += [(began, "the start"), (ready, "ready")]
    return [
        f"{after - before:.0f} s from `{here}` to `{there}`"
        for (before, here), (after, there) in pairwise(sorted(stamps, key=lambda stamp: stamp[0]))
        if after - before >= LEAST
    ]
