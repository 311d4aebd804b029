"""Sends streamed chat requests, so many at a time or at rates, and times every piece that comes back.

A process of its own (`python3 -m tests.gpu.load JOB.json`), so that its work is not the balancer's.
"""

import asyncio
import json
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvloop

WORDS = "time year people way day man thing woman life child world school state family student group country".split()  # noqa: SIM905
LIMIT = 120.0  # seconds for one answer, unless the job says otherwise


def prompt(tokens: int, seed: int) -> str:
    """About that many tokens, alike for one seed from the first word on."""
    return " ".join(random.Random(seed).choices(WORDS, k=tokens))


def bodies(job: dict[str, Any]) -> Iterator[bytes]:
    """`requests` bodies: a system prompt of one of `groups` groups (0: each its own), then a question of its own.

    With `questions` each group has only so many, which come again and again.
    """
    chance = random.Random(job["seed"])
    groups, questions = job["groups"], job.get("questions", 0)
    order = list(range(job["requests"]))
    chance.shuffle(order)
    systems: dict[int, str] = {}
    for place, index in enumerate(order):
        group = index % groups if groups else index
        number = index % (groups * questions) if questions else place
        system = systems.setdefault(group, prompt(job["prefix_tokens"], 7_000_000 + job["seed"] * 10_000 + group))
        yield json.dumps(
            {
                "model": job["model"],
                "messages": [
                    {"role": "system", "content": system},
                    {"role": "user", "content": prompt(job["question_tokens"], job["seed"] * 100_000 + number)},
                ],
                "max_tokens": job["answer_tokens"],
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()


async def run(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds in all, TTFT and gaps in seconds, tokens, cached tokens, errors; texts by number if the job says so.

    `at_once`: so many requests all the time. `stages` instead: [requests a second, seconds] one after the other, by
    chance within each; `requests` is then how many these give.
    """
    stages = job.get("stages")
    starts = arrivals(random.Random(job["seed"]), stages) if stages else []
    if stages:
        job = job | {"requests": len(starts)}
    # At rates, making a body takes time that the next request's start does not have.
    waiting = enumerate(list(bodies(job)) if stages else bodies(job))
    figures: dict[str, Any] = {
        "ttft": [],
        "gaps": [],
        "completion_tokens": 0,
        "prompt_tokens": 0,
        "cached_tokens": 0,
        "errors": [],
        "texts": {} if job.get("keep_texts") else None,
    }
    where = urlsplit(job["url"])

    async def ask(number: int, body: bytes) -> None:
        try:
            async with asyncio.timeout(job.get("limit", LIMIT)):
                await answer(where.hostname or "", where.port or 80, number, body, figures)
        except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
            figures["errors"].append(f"{type(error).__name__}: {error}"[:200])

    async def work() -> None:
        for number, body in waiting:
            await ask(number, body)

    async def come(at: float, number: int, body: bytes) -> None:
        await asyncio.sleep(at)
        await ask(number, body)

    start = time.monotonic()
    if stages:
        await asyncio.gather(*(come(at, number, body) for at, (number, body) in zip(starts, waiting, strict=True)))
    else:
        await asyncio.gather(*(work() for _ in range(job["at_once"])))
    return figures | {"seconds": time.monotonic() - start}


def arrivals(chance: random.Random, stages: Iterable[tuple[float, float]]) -> list[float]:
    """When requests come, in seconds from the start, by Poisson's law in each stage."""
    times: list[float] = []
    began = 0.0
    for rate, seconds in stages:
        at = began + chance.expovariate(rate)
        while at < began + seconds:
            times.append(at)
            at += chance.expovariate(rate)
        began += seconds
    return times


async def answer(host: str, port: int, number: int, body: bytes, figures: dict[str, Any]) -> None:
    """One answer on a connection of its own. Raises ValueError when it is not whole."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: lab\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        sent = last = time.monotonic()
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise ValueError(f"{head[:80]!r} {(await reader.read(300))!r}")
        tail = b""
        pieces: list[bytes] = []
        first = True
        while piece := await reader.read(65536):
            now = time.monotonic()
            if b"data: {" in piece:
                (figures["ttft"] if first else figures["gaps"]).append(now - (sent if first else last))
                first, last = False, now
            tail = (tail + piece)[-2000:]
            if figures["texts"] is not None:
                pieces.append(piece)
        if b"data: [DONE]" not in tail:
            raise ValueError(f"the stream was cut: it ends with {tail[-100:]!r}")
        for name in ("completion_tokens", "prompt_tokens", "cached_tokens"):
            found = re.findall(rb'"%b":\s*(\d+)' % name.encode(), tail)
            figures[name] += int(found[-1]) if found else 0
        if figures["texts"] is not None:
            figures["texts"][number] = text(b"".join(pieces))
    finally:
        writer.close()


def text(answered: bytes) -> str:
    """What the events of a chunked answer say together. A chunk is an event or several, so that its lines are whole."""
    events = [json.loads(line[6:]) for line in answered.splitlines() if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    json.dump(uvloop.run(run(job)), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
