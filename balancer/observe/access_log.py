"""One line per request, written in batches off the hot path. It never contains a header value, body, query or key."""

import os
import select
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache

import orjson

from balancer.observe.record import Record

MAX_WAITING = 20_000
TOO_SLOW = "the reader of this log is too slow"
PIECES = 16  # writes per call
SAFE_WRITE = 4096  # bytes that a pipe which polls as writable takes without blocking


class AccessLog:
    """Records each request at once and writes it later; call `flush` a few times a second.

    A slow reader never delays a request: beyond `MAX_WAITING` waiting lines, new ones are dropped, and a line says how
    many. `wall_clock` gives the timestamps.
    """

    def __init__(self, descriptor: int, is_json: bool, wall_clock: Callable[[], float] = time.time) -> None:
        self._descriptor = descriptor
        self._line, self._dropped_line = (_json_line, _json_dropped) if is_json else (_text_line, _text_dropped)
        self._wall_clock = wall_clock
        self._records: deque[tuple[float, Record]] = deque()
        self._unwritten = b""
        self._dropped = 0
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def finished(self, record: Record) -> None:
        if len(self._records) < MAX_WAITING:
            self._records.append((self._wall_clock(), record))
        else:
            self._dropped += 1

    def flush(self) -> None:
        """Writes as much as the reader takes without blocking."""
        while self.flush_some():
            pass

    def flush_some(self) -> bool:
        """Writes for a few milliseconds at most. True if the reader may take more."""
        for _ in range(PIECES):
            if not (self._records or self._unwritten or self._dropped):
                return False
            if not self._unwritten:
                self._unwritten = self._next_lines()
            if not self._poll.poll(0):
                return False  # the reader is slow: the lines wait
            try:
                # Whole lines, because other processes may write to it as well.
                size = self._unwritten.rfind(b"\n", 0, SAFE_WRITE) + 1 or SAFE_WRITE
                written = os.write(self._descriptor, self._unwritten[:size])
            except BlockingIOError:
                return False  # a terminal may accept less than poll promised
            except OSError:  # the reader is gone
                self._records.clear()
                self._unwritten, self._dropped = b"", 0
                return False
            self._unwritten = self._unwritten[written:]
        return True

    def _next_lines(self) -> bytes:
        lines = []
        if self._dropped and not self._records:
            lines.append(self._dropped_line(self._wall_clock(), self._dropped))
            self._dropped = 0
        while self._records and len(lines) < 64:
            at, record = self._records.popleft()
            lines.append(self._line(at, record))
        return b"".join(lines)


# JSON


def _json_line(at: float, record: Record) -> bytes:
    fields = {
        "time": round(at, 3),
        "id": record.id,
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "member": record.member or None,
        "attempts": record.attempts,
        "retries": ",".join(record.retries) or None,
        "not_continued": record.not_continued or None,
        "queued": round(record.queued, 6),
        "ttft": None if record.first_byte is None else round(record.first_byte, 6),
        "duration": round(record.duration, 6),
        "bytes_in": record.bytes_in,
        "bytes_out": record.bytes_out,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "cached_tokens": record.cached_tokens,
        "reason": record.reason or None,
        "matched": None if record.matched is None else round(record.matched, 3),
        "client": record.client or None,
        "key": record.key or None,
        "error": record.error or None,
    }
    known = {name: value for name, value in fields.items() if value is not None}
    return orjson.dumps(known, option=orjson.OPT_APPEND_NEWLINE)


def _json_dropped(at: float, count: int) -> bytes:
    return orjson.dumps({"time": round(at, 3), "dropped": count, "error": TOO_SLOW}, option=orjson.OPT_APPEND_NEWLINE)


# Text: the same fields in the same order. Written out in full, because building a line from a table takes three times
# as long.


def _text_line(at: float, record: Record) -> bytes:
    words = [_stamp(int(at)), f"id={record.id} method={record.method} path={_word(record.path)} status={record.status}"]
    if record.member:
        words.append(f"member={_our_word(record.member)}")
    words.append(f"attempts={record.attempts}")
    if record.retries:
        words.append(f"retries={','.join(record.retries)}")
    if record.not_continued:
        words.append(f"not_continued={_our_word(record.not_continued)}")
    words.append(f"queued={record.queued:.6f}")
    if record.first_byte is not None:
        words.append(f"ttft={record.first_byte:.6f}")
    words.append(f"duration={record.duration:.6f} bytes_in={record.bytes_in} bytes_out={record.bytes_out}")
    if record.prompt_tokens is not None:
        words.append(f"prompt_tokens={record.prompt_tokens}")
    if record.completion_tokens is not None:
        words.append(f"completion_tokens={record.completion_tokens}")
    if record.cached_tokens is not None:
        words.append(f"cached_tokens={record.cached_tokens}")
    if record.reason:
        words.append(f"reason={_our_word(record.reason)}")
    if record.matched is not None:
        words.append(f"matched={record.matched:.3f}")
    if record.client:
        words.append(f"client={record.client}")
    if record.key:
        words.append(f"key={_our_word(record.key)}")
    if record.error:
        words.append(f"error={record.error}")
    return (" ".join(words) + "\n").encode("utf-8", "replace")


def _text_dropped(at: float, count: int) -> bytes:
    return f"{_stamp(int(at))} dropped={count} error={_word(TOO_SLOW)}\n".encode()


@lru_cache(maxsize=4)
def _stamp(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))


def _word(text: str) -> str:
    """The text, quoted if it holds anything that could end the line or look like another field."""
    if text.isascii() and text.isprintable() and " " not in text:
        return text
    return orjson.dumps(text).decode()


# Only for words of our own: clients could fill the cache with paths.
_our_word = lru_cache(maxsize=512)(_word)
