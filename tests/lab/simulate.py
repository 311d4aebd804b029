"""`python -m tests.lab.simulate`: what the shipped policies bring, beside others and an oracle, in virtual time.

The fleet, admission and policies of the balancer run unchanged in front of replica models; only the time and the
replicas are simulated. Figures repeat exactly for a seed, except for the cost of a choice, which depends on the
machine. `prefix_aware@COMMIT` is that policy as it was at a commit, with everything else as it is today.
"""

import argparse
import dataclasses
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.lab.bars import bars
from tests.lab.model import ModelSettings
from tests.lab.published import PUBLISHED, trace
from tests.lab.scenario import Scenario
from tests.lab.simulator import POLICIES, Result, policy_named
from tests.lab.trace import Line, likeness, read
from tests.lab.workloads import WORKLOADS, Writer, groups

TRACE = "trace"
AT_ONCE = 16  # requests under way for each replica, unless --at-once says otherwise

# Two replicas of a model of Llama-2-7b's shape on one H200, as measured there, and two of SmolLM2-135M on a CPU.
H200 = ModelSettings(
    prefill_rate=16_000,
    itl_base=0.005,
    itl_per_request=0.0001,
    max_total_tokens=65_536,
    chunk_tokens=8192,
    max_running_requests=256,
)
CPU = ModelSettings(prefill_rate=700, itl_base=0.09, itl_per_request=0.01, max_total_tokens=4600, chunk_tokens=2048)


def h200(seed: int) -> Scenario:
    """48 groups with 2,000-token system prompts of 12 KB: more than one pool holds, less than two."""
    writer = Writer(random.Random(seed), bytes_per_token=6)
    return Scenario("two on an H200", 2, groups(writer, 48, 288, 2000, answer_tokens=32), 32, H200)


def tight(seed: int) -> Scenario:
    """The same with 24 groups and pools half as large, and long enough for copies to push each other out."""
    writer = Writer(random.Random(seed), bytes_per_token=6)
    settings = dataclasses.replace(H200, max_total_tokens=32_768)
    return Scenario("two tight pools", 2, groups(writer, 24, 480, 2000, answer_tokens=32), 32, settings)


def cpu(seed: int) -> Scenario:
    """Eight groups with 1,000-token system prompts; a pool holds four."""
    writer = Writer(random.Random(seed))
    return Scenario("two on a CPU", 2, groups(writer, 8, 40, 1000, answer_tokens=16), 4, CPU)


def new_prompt(replicas: int, seed: int) -> Scenario:
    """An application's new system prompt of 5,000 tokens: no replica has it, and now all requests begin with it."""
    writer = Writer(random.Random(seed))
    conversations = groups(writer, 1, 500 * replicas, 5000, answer_tokens=200)
    return Scenario("new prompt for all", replicas, conversations, 64 * replicas, H200)


def scenario(name: str, replicas: int, seed: int, at_once: int = AT_ONCE) -> Scenario:
    writer = Writer(random.Random(seed))
    return Scenario(name, replicas, WORKLOADS[name](writer, replicas), at_once * replicas)


def scenarios(replicas: Sequence[int], names: Sequence[str], seed: int, at_once: int) -> Iterator[Scenario]:
    if 2 in replicas and at_once == AT_ONCE:
        yield h200(seed)
        yield tight(seed)
        yield cpu(seed)
    for count in replicas:
        if at_once == AT_ONCE and count <= 8:
            yield new_prompt(count, seed)
        for name in names:
            yield scenario(name, count, seed, at_once)


def published(replicas: Sequence[int], names: Sequence[str], lines: Sequence[Line], seed: int) -> Iterator[Scenario]:
    for count in replicas:
        for name in names:
            yield trace(lines, count) if name == TRACE else PUBLISHED[name](count, seed)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.lab.simulate", description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="64 replicas too: minutes")
    parser.add_argument("--replicas", nargs="+", type=int, metavar="N", help="how many; default 2 and 8")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=[*WORKLOADS], metavar="NAME")
    parser.add_argument(
        "--published", nargs="*", choices=[*PUBLISHED, TRACE], metavar="NAME", help="instead: what others measure by"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="the trace that is played; else one like Mooncake's")
    parser.add_argument(
        "--policy",
        nargs="+",
        default=[*POLICIES],
        metavar="NAME",
        help=f"{', '.join(POLICIES)}, or prefix_aware@COMMIT: as it was then",
    )
    parser.add_argument("--pools", choices=["empty", "full"], nargs="+", default=["empty", "full"], help="at the start")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="data-parallel ones of a replica")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="so many from --seed on; figures are means")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, metavar="N", help="a replica, default %(default)s")
    parser.add_argument("--max-pending", type=int, metavar="N", help="hold requests back as the setting does")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures go there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="goodput as bars, an SVG document")
    options = parser.parse_args(argv)
    options.replicas = options.replicas or ([2, 8, 64] if options.full else [2, 8])
    if min(options.replicas) < 1:
        parser.error("--replicas: at least one")
    if options.seeds < 1:
        parser.error("--seeds: at least one")
    try:
        for name in options.policy:
            policy_named(name, lambda _: ())
    except ValueError as error:
        parser.error(f"--policy: {error}")
    if options.published == []:
        options.published = [*PUBLISHED, TRACE]
    options.lines = likeness(24_000, options.seed) if options.published and TRACE in options.published else []
    if options.trace:
        try:
            options.lines = read(options.trace)
        except (OSError, ValueError) as error:
            parser.error(f"--trace: {error}")
        options.published = options.published or [TRACE]
    return options


HEAD = (
    f"{'':16} {'goodput/s':>9} {'TTFT mean':>9} {'p50':>7} {'p99':>7} {'cached':>7} {'spread':>7} {'errors':>6}"
    f" {'choice us':>9}"
)


def line(policy: str, result: Result) -> str:
    return (
        f"{policy:16} {result.goodput:9.2f} {result.ttft_mean:9.3f} {result.ttft_p50:7.3f} {result.ttft_p99:7.3f}"
        f" {result.cached:7.3f} {result.spread:7.2f} {result.errors:6} {result.choice_us:9.1f}"
    )


def mean(results: Sequence[Result]) -> Result:
    """Of each figure, over the seeds; of counts a whole number."""
    rows = [dataclasses.asdict(result) for result in results]
    sums = {name: sum(row[name] for row in rows) for name in rows[0]}
    return Result(**{name: type(rows[0][name])(total / len(rows)) for name, total in sums.items()})


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    began = time.monotonic()
    rows: list[dict[str, object]] = []
    seeds = range(options.seed, options.seed + options.seeds)
    if options.published:
        plays = [published(options.replicas, options.published, options.lines, seed) for seed in seeds]
    else:
        plays = [scenarios(options.replicas, options.workload, seed, options.at_once) for seed in seeds]
    for same in (
        [dataclasses.replace(play.warm() if pools == "full" else play, ranks=options.ranks) for play in same]
        for same in zip(*plays, strict=True)  # one workload by all seeds
        for pools in options.pools
    ):
        one = same[0]
        print(f"\n{one.name}, {one.replicas} replicas, {one.at_once} at once\n{HEAD}", flush=True)
        for policy in options.policy:
            result = mean([scenario.run(policy, options.max_pending) for scenario in same])
            print(line(policy, result), flush=True)
            rows.append({"workload": one.name, "replicas": one.replicas, "policy": policy} | dataclasses.asdict(result))
    print(f"\nTTFT in s of virtual time, spread: busiest member to mean. {time.monotonic() - began:.0f} s.")
    if options.json:
        options.json.write_text(json.dumps({"seed": options.seed, "rows": rows}, indent=1) + "\n")
    if options.plot:
        options.plot.write_text(bars(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
