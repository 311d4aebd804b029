"""The load generator: `python -m tests.bench.load MODE URL` one load on one URL, its results as JSON.

It is a process of its own, so that it shares no event loop with what it measures, and it reads the CPU time of
the process tree --pid itself, at the edges of the phase that counts.
"""

import argparse
import asyncio
import json
from collections.abc import Sequence

import uvloop

from tests.bench import messages, streams
from tests.bench.closed_loop import ClosedLoop
from tests.bench.phase import Phase


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.load", description=__doc__)
    parser.add_argument("mode", choices=["requests", "streams", "idle"])
    parser.add_argument("url", help="http://HOST:PORT")
    parser.add_argument("--pid", type=int, help="root of the process tree under test")
    parser.add_argument("--count", type=int, default=32, help="connections or streams")
    parser.add_argument("--seconds", type=float, default=4.0, help="of the phase that counts")
    parser.add_argument("--warmup", type=float, default=1.0, help="seconds before it: warm-up, ramp, or settling")
    parser.add_argument("--seed", type=int, default=0, help="of the times at which streams start")
    parser.add_argument("--key", default="", help="API key that goes with each request")
    parser.add_argument("--prompt-kib", type=int, default=0, help="of the closed loop: prompts that share beginnings")
    parser.add_argument("--body-bytes", type=int, default=0, help="of the closed loop: bodies that are so long")
    parser.add_argument("--slow", action="store_true", help=f"streams of {messages.SLOW_EVENTS:.0f} events a second")
    return parser.parse_args(argv)


async def run(options: argparse.Namespace) -> dict[str, object]:
    phase = Phase(options.seconds, options.pid)
    if options.mode == "requests":
        small = [messages.small_request()]
        bodies = messages.long_requests(options.prompt_kib, options.seed) if options.prompt_kib else small
        bodies = messages.sized_requests(options.body_bytes, options.seed) if options.body_bytes else bodies
        return await ClosedLoop(options.url, options.count, bodies, options.key).run(options.warmup, phase)
    if options.mode == "streams":
        return await streams.paced(
            options.url, options.count, options.warmup, options.seed, phase, options.key, options.slow
        )
    return await streams.idle(options.url, options.count, options.pid, options.warmup)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(run(parse()))))
