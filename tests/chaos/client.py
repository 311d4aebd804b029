"""One request as a client sees it, byte for byte: what it received, and how the answer ended."""

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.support.client import BadAnswer, Client, Ended, request

# How an answer ended. whole: complete in its framing. broken: a stream that ended early, with the promised error event.
# cut: an answer that is no stream and ended early. ugly: a stream that ended early in any other way. left: the client
# went away. hung: not whole in time. no door: the balancer refused the connection, or closed it unanswered.
End = Literal["whole", "broken", "cut", "ugly", "left", "hung", "no door"]
LONGEST = 15.0


@dataclass(frozen=True, slots=True)
class Wish:
    """The request to send. `leaves_after`: the client goes away after that many bytes of the answer's body."""

    id: str
    method: str
    path: str
    body: bytes = b""
    stream: bool = False
    leaves_after: int | None = None
    text: str | None = None  # expected of a whole answer, if known


@dataclass(slots=True)
class Got:
    """The result of a wish. Times are CLOCK_MONOTONIC."""

    wish: Wish
    began: float
    ended: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    end: End = "no door"
    why: str = ""

    @property
    def replica(self) -> str:
        return self.headers.get("x-replica-id", "")

    @property
    def code(self) -> str:
        """The code of an error answer or of a broken stream's error event, or the empty string."""
        try:
            error = json.loads(self.body.rstrip().rpartition(b"data: ")[2])["error"]
        except (ValueError, KeyError, TypeError):
            return ""
        if self.end == "broken" and "code" not in error:  # Anthropic's errors have none
            is_slow = "first_byte_timeout" in error["message"]
            return "first_byte_timeout" if is_slow else "stream_broken"
        return str(error.get("code", ""))

    def __str__(self) -> str:
        wish = self.wish
        said = f"{self.status} {self.code} {self.end} {self.why}".strip()
        return f"{wish.id} {wish.method} {wish.path}{' (stream)' if wish.stream else ''}: {said} from {self.replica}"


async def ask(port: int, wish: Wish, longest: float = LONGEST) -> Got:
    """Send one request to the balancer on this port and read its answer to the end, within so many seconds."""
    got = Got(wish, time.monotonic())
    try:
        async with asyncio.timeout(longest):
            await _exchange(port, got)
    except TimeoutError:
        got.end, got.why = "hung", f"nothing whole within {longest:g} s; so far {got.body[-80:]!r}"
    except OSError as error:
        got.end, got.why = "no door", str(error)
    got.ended = time.monotonic()
    return got


async def _exchange(port: int, got: Got) -> None:
    wish = got.wish
    client = await Client.open(f"http://127.0.0.1:{port}")
    try:
        fields = (("X-Request-Id", wish.id), *((("Content-Type", "application/json"),) if wish.body else ()))
        with contextlib.suppress(ConnectionError):  # an answer, if there is one, has already arrived
            await client.send(request(wish.method, wish.path, wish.body or None, fields, host="localhost"))
        try:
            await _read(client, got)
        except Ended as ended:
            got.body += ended.rest
            got.end, got.why = ("no door", "closed without an answer") if not got.status else ended_early(got)
        except BadAnswer as bad:
            got.end, got.why = "ugly", str(bad)
    finally:
        client.leave("reset")


async def _read(client: Client, got: Got) -> None:
    got.status, fields = await client.head()
    got.headers = {name.lower(): value for name, value in fields}
    got.end = "whole"
    if got.wish.method == "HEAD" or got.status == 204:
        return
    if got.headers.get("transfer-encoding") == "chunked":
        while size := int(await client.until(b"\r\n"), 16):
            await _body(client, got, size)
            await client.exactly(2)
            if got.end == "left":
                return
        await client.exactly(2)
    else:
        await _body(client, got, int(got.headers["content-length"]))
    if got.status == 200 and got.wish.stream and not is_finished(got):
        got.end, got.why = "ugly", f"a whole stream without its end: {got.body[-80:]!r}"


async def _body(client: Client, got: Got, size: int) -> None:
    got.body += await client.exactly(size)
    if got.status == 200 and got.wish.leaves_after is not None and len(got.body) >= got.wish.leaves_after:
        got.end = "left"


def is_finished(got: Got) -> bool:
    end = b"event: message_stop" if got.wish.path == "/v1/messages" else b"data: [DONE]"
    return end in got.body[-200:]


def ended_early(got: Got) -> tuple[End, str]:
    """How an answer ended that is not whole. A stream must end at an event boundary, with an error event."""
    if not got.wish.stream or got.status != 200:
        return "cut", ""
    if is_finished(got):
        return "ugly", "after its last event"
    relayed, _, last = got.body.removesuffix(b"\n\n").rpartition(b"\n\n")
    if got.body.endswith(b"\n\n"):
        error = last.removeprefix(b"event: error\n").removeprefix(b"data: ")
        try:
            message = json.loads(error)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            return "ugly", f"ended at an event boundary without a word: {last[-80:]!r}"
        if last.startswith(b"event: error") != (got.wish.path == "/v1/messages"):
            return "ugly", f"an error event of the wrong kind: {last[:80]!r}"
        return "broken", str(message)
    if not got.body:
        return "ugly", "broke off before its first event without a word"
    return "ugly", f"amid an event, after {len(relayed)} bytes"


def text_of(got: Got) -> str:
    """The text of a whole answer, streamed or not."""
    if not got.wish.stream:
        return _text(json.loads(got.body))
    events = [event.rpartition("data: ")[2] for event in got.body.decode().split("\n\n") if "data: {" in event]
    texts = [_text(json.loads(event)) for event in events]
    return texts[-1] if got.wish.path == "/generate" else "".join(texts)


def _text(said: dict[str, Any]) -> str:
    """The text of an answer or event of any format."""
    if choices := said.get("choices"):
        spoken = choices[0].get("message") or choices[0].get("delta") or choices[0]
        return spoken.get("content") or spoken.get("text") or ""
    if isinstance(content := said.get("content"), list):
        return "".join(block["text"] for block in content)
    delta = said.get("delta")
    return str(delta.get("text", "") if isinstance(delta, dict) else said.get("text", ""))
