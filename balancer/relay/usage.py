"""Token counts of an answer, read only from the fields that hold them: generated text that quotes such fields does not
count.

An answer is parsed when it is over. Before that, a long one is trimmed now and then to what is still needed.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import orjson

# Bytes of an answer that are kept to look for the counts; also the largest event or list that is parsed for them.
LARGEST = 1 << 20
KEPT_EVENTS = 4  # at the end of a stream: after the event with the counts come a stop, a [DONE], a comment
SOON: Final = 64 << 10  # trim after at least this many more bytes,
FEW: Final = 64  # or after at least this many more pieces
# Events before the first token of a stream, by its path.
OPENING_EVENTS = {"/v1/chat/completions": 1, "/v1/messages": 2, "/v1/responses": 4}
NO_TOKEN = (b":", b"event: error", b'data: {"error"')  # beginnings of pieces that we or a failing server add
MOST: Final = 10**9  # tokens of one answer: a figure above it is not believed, and no sum goes beyond
# SGLang's own paths report each text of a batch separately. No field name there is chosen by a user or a model, and
# quotes within a text are escaped, so whatever looks like a field is one.
NATIVE: Final = frozenset(("/generate", "/encode"))
OLLAMA: Final = frozenset(("/api/chat", "/api/generate"))  # their streams are lines of JSON, and the last one counts
_FIELD = re.compile(rb'"(prompt|completion|cached)_tokens":\s*(\d{1,15})(?=[,}\s])')
_LONGEST_FIELD = 64
_UNFINISHED = re.compile(rb'"finish_reason":\s*null')
_TRIES: Final = 8
_BACKSLASH: Final = 0x5C


@dataclass(slots=True, init=False)
class Counts:
    """Tokens of one answer; None is unknown. `texts` is over how many prompts they are summed, as far as known.

    `__init__` is written out, because mypyc compiles that, and not what `dataclass` makes.
    """

    prompt: int | None
    completion: int | None
    cached: int | None
    texts: int

    def __init__(
        self, prompt: int | None = None, completion: int | None = None, cached: int | None = None, texts: int = 1
    ) -> None:
        self.prompt = prompt
        self.completion = completion
        self.cached = cached
        self.texts = texts


class Tail:
    """The part of an answer's body that is kept while it is relayed. After adding to `pieces`, call `trim` if there are
    more than `most` of them or the body is longer than `until` bytes.

    Of an event stream it keeps the last whole events, of another answer its end; never much more than `LARGEST` bytes.
    """

    __slots__ = (
        "_finals",
        "_has_dropped",
        "_is_stream",
        "_joined",
        "_lines",
        "_native",
        "_opening",
        "_path",
        "most",
        "pieces",
        "until",
    )

    def __init__(self, path: str) -> None:
        self.pieces: list[bytes] = []
        self.most = FEW
        self.until = SOON
        self._path = path
        self._is_stream = False
        self._joined = 0  # pieces that came and are not in `pieces` as such any more
        self._lines = 0  # of an Ollama answer, in what was dropped
        self._has_dropped = False
        self._opening = b""  # the first event, in which Anthropic's streams report the prompt
        self._finals: dict[Any, Counts] | None = None  # counts of the finished texts of a native stream
        self._native: Counts | None = None  # counts so far of a native answer that is no stream

    def begin(self, is_stream: bool) -> None:
        self._is_stream = is_stream

    def trim(self, size: int) -> None:
        """Drops what cannot matter any more; `size` is the body's length so far, in bytes."""
        before = len(self.pieces)
        if self._is_stream:
            kept = self._trim_events(b"".join(self.pieces))
        elif self._path in NATIVE:
            kept = self._trim_native(b"".join(self.pieces))
        else:
            kept = self._trim_end()
        self._joined += before - len(self.pieces)
        self.most = len(self.pieces) + FEW + kept // 256
        self.until = size + max(SOON, kept // 2)

    def _trim_events(self, body: bytes) -> int:
        cut = _last_events(body)
        if cut and not self._has_dropped:
            self._opening = body[: _first_end(body)] + b"\n\n" if self._path == "/v1/messages" else b""
            self._has_dropped = True
        if self._path in NATIVE:
            self._note_finals(body[:cut])
        body = body[max(cut, len(body) - LARGEST) :]
        self.pieces = [body]
        return len(body)

    def _trim_native(self, body: bytes) -> int:
        end = max(self._count_native(body), len(body) - _LONGEST_FIELD)
        self.pieces = [body[end:]]
        return len(body) - end

    def _trim_end(self) -> int:
        pieces, kept, first = self.pieces, 0, len(self.pieces)
        while first and kept < LARGEST:
            first -= 1
            kept += len(pieces[first])
        self._has_dropped = self._has_dropped or first > 0
        if self._path in OLLAMA:
            self._lines += _lines(pieces[:first])
        del pieces[:first]
        if len(pieces) > FEW and kept < len(pieces) * 256:
            self.pieces = [b"".join(pieces)]
        return kept

    def is_at_boundary(self) -> bool:
        """Does what was sent so far end with a complete event?"""
        end = b"".join(self.pieces[-4:])[-4:]
        return not end or end.endswith(b"\n\n") or end == b"\r\n\r\n"

    def counts(self) -> Counts:
        """The counts of the whole answer. Call it once: it empties the tail."""
        self._joined += len(self.pieces)
        self._lines += _lines(self.pieces) if self._path in OLLAMA else 0
        body = b"".join(self.pieces)
        self.pieces = []
        if self._is_stream and self._path in NATIVE:
            self._note_finals(body)
            return _sum((self._finals or {}).values())
        if self._is_stream:
            return _of_events(self._opening + body, is_told_twice=self._path == "/v1/messages")
        if self._path in OLLAMA:
            return _of_lines(body, self._lines)
        if self._path in NATIVE:
            self._count_native(body)
            return self._native if self._native and self._native.texts else Counts()
        return _of_whole(body, self._has_dropped)

    def delivered(self) -> Counts:
        """The counts of a stream that ended early, or told none: else a token for each piece of text.

        Call it once. Servers send an event for each token, and each in a piece of its own.
        """
        pieces = self._joined + sum(not piece.startswith(NO_TOKEN) for piece in self.pieces)
        if self._is_stream and self._path in NATIVE:
            self._note_finals(b"".join(self.pieces), with_unfinished=True)
            self.pieces = []
            return self.counts()
        found = self.counts()
        if self._path in OLLAMA:
            pieces = self._lines
        if found.completion is None or self._path == "/v1/messages":  # there the first event counts one token
            found.completion = max(0, pieces - OPENING_EVENTS.get(self._path, 0))
        return found

    def _count_native(self, body: bytes) -> int:
        """Adds up the fields of a body or part of one; returns where the last field ended."""
        native = self._native = self._native or Counts(texts=0)
        end = 0
        for field in _FIELD.finditer(body):
            figure, end = int(field[2]), field.end()
            match field[1]:
                case b"prompt":
                    native.prompt = min((native.prompt or 0) + figure, MOST)
                    native.texts += 1
                case b"completion":
                    native.completion = min((native.completion or 0) + figure, MOST)
                case _:
                    native.cached = min((native.cached or 0) + figure, MOST)
        return end

    def _note_finals(self, events: bytes, with_unfinished: bool = False) -> None:
        """Keeps the counts of each text's last event: in a stream of several texts they end one by one."""
        finals = self._finals = self._finals or {}
        for event in _events(events):
            if not with_unfinished and _UNFINISHED.search(event):
                continue
            said = _parsed(event)
            if isinstance(said, dict) and isinstance(meta := said.get("meta_info"), dict):
                finals[said.get("index")] = _of_usage(meta)


def _last_events(body: bytes) -> int:
    """Where the last `KEPT_EVENTS` whole events and whatever follows them begin; 0 if there are no events before."""
    for mark in (b"\n\n", b"\r\n\r\n"):
        at = len(body)
        for _ in range(KEPT_EVENTS + 1):
            at = body.rfind(mark, 0, at)
            if at < 0:
                break
        else:
            return at + len(mark)
    return 0


def _first_end(body: bytes) -> int:
    ends = [at for mark in (b"\n\n", b"\r\n\r\n") if (at := body.find(mark)) >= 0]
    return min(ends, default=0)


def _events(body: bytes) -> Iterator[bytes]:
    """The data of each event."""
    for event in body.replace(b"\r\n", b"\n").split(b"\n\n"):
        lines = [line[5:] for line in event.split(b"\n") if line.startswith(b"data:")]
        if lines:
            yield b"\n".join(lines)


def _of_events(body: bytes, is_told_twice: bool) -> Counts:
    """The counts of a stream's last event that has any; for Anthropic's streams also those that only its first has."""
    if b'_tokens"' not in body:  # quotes within a text are escaped
        return Counts()
    found: dict[str, Any] = {}
    for data in reversed(list(_events(body))):
        if b'_tokens"' in data and isinstance(said := _parsed(data), dict):
            for holder in (said, said.get("response"), said.get("message")):
                if isinstance(holder, dict) and isinstance(usage := holder.get("usage"), dict):
                    found = usage | found
        if found and not is_told_twice:
            break
    return _of_usage(found)


def _of_whole(body: bytes, is_cut: bool) -> Counts:
    """The counts of an answer that is no stream, or of its end: from `usage` or `meta_info` of the outermost object, or
    the sums of a list's `meta_info`.

    `{` followed by the rest of the body from a field on is valid JSON if the field belongs to the outermost object; if
    it belongs to a nested one, there are too many closing braces.
    """
    end = len(body)
    for _ in range(_TRIES if is_cut else 1):
        end = body.rfind(b'"usage":', 0, end)
        if end < 0:
            break
        if end and body[end - 1] == _BACKSLASH:
            continue
        said = _parsed(b"{" + body[end:])
        if isinstance(said, dict) and isinstance(usage := said.get("usage"), dict):
            return _of_usage(usage)
    if is_cut or b'_tokens"' not in body:  # quotes within a text are escaped
        return Counts()
    said = _parsed(body)
    if isinstance(said, dict):
        usage = said.get("usage") or said.get("meta_info")
        return _of_usage(usage) if isinstance(usage, dict) else Counts()
    items = said if isinstance(said, list) else []
    metas = [meta for item in items if isinstance(item, dict) and isinstance(meta := item.get("meta_info"), dict)]
    return _sum(map(_of_usage, metas))


def _lines(pieces: Iterable[bytes]) -> int:
    return sum(piece.count(b"\n") for piece in pieces)


def _of_lines(body: bytes, lines: int) -> Counts:
    """The counts of an Ollama answer's last line. SGLang tells none in streams, so there each line is a token."""
    said = _parsed(body.rstrip().rpartition(b"\n")[2])
    if not isinstance(said, dict):
        return Counts()
    completion = _figure(said, "eval_count")
    is_uncounted = completion is None and said.get("done") is True and lines > 1
    return Counts(_figure(said, "prompt_eval_count"), lines - 1 if is_uncounted else completion)


def _parsed(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return None


def _of_usage(usage: dict[str, Any]) -> Counts:
    """The counts of a `usage` object in OpenAI's or Anthropic's format, or of SGLang's own `meta_info`."""
    if "prompt_tokens" in usage or "completion_tokens" in usage:
        details = usage.get("prompt_tokens_details")
        cached = _figure(details if isinstance(details, dict) else usage, "cached_tokens")
        return Counts(_figure(usage, "prompt_tokens"), _figure(usage, "completion_tokens"), cached)
    prompt, read = _figure(usage, "input_tokens"), _figure(usage, "cache_read_input_tokens")
    details = usage.get("input_tokens_details")
    cached = _figure(details, "cached_tokens") if isinstance(details, dict) else read
    if prompt is not None:  # Anthropic's format counts cached tokens separately, OpenAI's includes them here
        prompt = min(prompt + (read or 0) + (_figure(usage, "cache_creation_input_tokens") or 0), MOST)
    return Counts(prompt, _figure(usage, "output_tokens"), cached)


def _figure(holder: dict[str, Any], name: str) -> int | None:
    value = holder.get(name)
    return value if type(value) is int and 0 <= value <= MOST else None


def _sum(parts: Iterable[Counts]) -> Counts:
    known = list(parts)

    def total(figures: Iterable[int | None]) -> int | None:
        told = [figure for figure in figures if figure is not None]
        return min(sum(told), MOST) if told else None

    return Counts(
        total(part.prompt for part in known),
        total(part.completion for part in known),
        total(part.cached for part in known),
        max(len(known), 1),
    )
