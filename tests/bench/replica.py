"""The replicas of the measurements: `python -m tests.bench.replica` serves two, until its stdin closes.

They answer with bytes built beforehand, so that the machine's time goes to what stands in front of them. One
process serves both, each on a port of its own; the first line on stdout is {"replicas": [URL, URL]}.
"""

import asyncio
import json
import sys
from functools import cache, partial

import httptools
import orjson
import uvloop

from tests.bench import messages

EVENTS_A_SECOND = 50.0

HEAD = b"HTTP/1.1 200 OK\r\ndate: Mon, 24 Nov 2025 12:00:00 GMT\r\nserver: uvicorn\r\n"
STREAM_HEAD = HEAD + (
    b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"

# What routers and balancers ask an SGLang replica before and while they use it.
MODEL = {"id": "bench", "object": "model", "created": 1764000000, "owned_by": "sglang", "max_model_len": 4096}
MODEL_INFO = {"model_path": "bench", "tokenizer_path": "bench", "is_generation": True}
SERVER_INFO = {
    **MODEL_INFO,
    "served_model_name": "bench",
    "max_total_num_tokens": 1 << 20,
    "max_running_requests": 4096,
    "tp_size": 1,
    "dp_size": 1,
    "version": "0.5.23",
}
LOADS = {"loads": [{"dp_rank": 0, "num_running_reqs": 0, "num_waiting_reqs": 0, "max_running_requests": 4096}]}
PAGES = {
    "/health": {},
    "/health_generate": {},
    "/ready": {},
    "/v1/models": {"object": "list", "data": [MODEL]},
    "/model_info": MODEL_INFO,
    "/get_model_info": MODEL_INFO,
    "/server_info": SERVER_INFO,
    "/get_server_info": SERVER_INFO,
    "/v1/loads": LOADS,
}
# SkyServe's load balancer learns its replicas by posting here, to its controller.
SKYSERVE_SYNC = "/controller/load_balancer_sync"
# How many chat requests each replica has seen: what a balancer sent twice, or all to one, shows here.
COUNTS = "/bench/counts"


def json_answer(body: bytes) -> bytes:
    return HEAD + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@cache
def event_chunks(events: int) -> tuple[bytes, ...]:
    """The chunks of a whole stream: its events, [DONE], the last chunk."""
    return (*(chunk(messages.event(n)) for n in range(events)), chunk(messages.DONE) + LAST_CHUNK)


@cache
def read_chat(body: bytes) -> tuple[int, bool, float] | None:
    """(events, idle, events a second) of a streaming chat request, None for a plain one; each is parsed once."""
    request = orjson.loads(body)
    if not request.get("stream"):
        return None
    # sglang-router says it in OpenAI's newer words.
    events = request.get("max_tokens") or request["max_completion_tokens"]
    seed = request["seed"]
    return events, seed == messages.IDLE_SEED, messages.SLOW_EVENTS if seed == messages.SLOW_SEED else EVENTS_A_SECOND


class Replica(asyncio.Protocol):
    """One connection to a replica. Each stream keeps time from its own start, so they are not in step."""

    SMALL = json_answer(messages.small_answer())

    def __init__(self, place: int, counts: list[int], pages: dict[str, bytes]) -> None:
        self.place = place
        self.counts = counts
        self.pages = pages
        self.loop = asyncio.get_running_loop()
        self.parser = httptools.HttpRequestParser(self)
        self.url = ""
        self.body: list[bytes] = []
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    def on_message_begin(self) -> None:
        self.url = ""
        self.body.clear()

    def on_url(self, url: bytes) -> None:
        self.url += url.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        path = self.url.partition("?")[0]  # SkyServe adds a bare question mark
        if path == COUNTS:
            self.transport.write(json_answer(orjson.dumps(self.counts)))
            return
        if path != messages.CHAT_PATH:
            self.transport.write(self.pages.get(path, NOT_FOUND))
            return
        self.counts[self.place] += 1
        stream = read_chat(b"".join(self.body))
        if stream is None:
            self.transport.write(self.SMALL)
            return
        events, idle, self.pace = stream
        self.chunks = event_chunks(events)
        self.last = events if idle else len(self.chunks)
        self.start = self.loop.time()
        self.sent = 1
        # SGLang's server, uvicorn, writes the head by itself too.
        self.transport.write(STREAM_HEAD)
        self.transport.write(self.chunks[0])
        self.wait()

    def wait(self) -> None:
        if self.sent < self.last:
            self.timer = self.loop.call_at(self.start + self.sent / self.pace, self.send)

    def send(self) -> None:
        self.transport.write(self.chunks[self.sent])
        self.sent += 1
        self.wait()


async def serve() -> None:
    loop = asyncio.get_running_loop()
    pages = {path: json_answer(orjson.dumps(page)) for path, page in PAGES.items()}
    counts = [0, 0]
    urls = []
    for place in range(len(counts)):
        make = partial(Replica, place, counts, pages)
        server = await loop.create_server(make, "127.0.0.1", 0, backlog=4096)
        urls.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    pages[SKYSERVE_SYNC] = json_answer(orjson.dumps({"replica_info": {url: {} for url in urls}}))
    print(json.dumps({"replicas": urls}), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
