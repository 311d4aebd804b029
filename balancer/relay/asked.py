"""What a generating request asks for, as far as it affects the cost: model, stream, token limit, number of answers.

A small body is parsed. Of a large one mostly the ends are looked at, where clients put these fields, beside `messages`:
quotes within a text are escaped, so whatever looks like a field is one, though perhaps of an inner object. Limits are
looked for everywhere, and the largest counts: else a decoy would make a request cheap.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import orjson

from balancer.relay.request import Request
from balancer.relay.requested_model import fields_in_json, models_in_form
from balancer.routing.body import HEAVY_BODY, without_images

END = 2 << 10  # bytes at each end of a large body
_FIELDS = re.compile(rb'"(model|stream|stream_options|include_usage)"\s*:\s*(true|false|\{|"[^"\\]{0,256}")')
_STREAM = re.compile(rb'"stream"\s*:\s*true')
# What limits an answer's tokens, by path: the object that holds it, and its names. A replica ignores all others, and of
# two, SGLang holds to the first.
USUAL_LIMIT = ("", ("max_completion_tokens", "max_tokens"))
LIMITS = {
    "/v1/chat/completions": USUAL_LIMIT,
    "/v1/completions": ("", ("max_tokens",)),
    "/v1/responses": ("", ("max_output_tokens",)),
    "/generate": ("sampling_params", ("max_new_tokens",)),
    "/api/chat": ("options", ("num_predict",)),
    "/api/generate": ("options", ("num_predict",)),
}
# By name: the field with a whole number, or with what is none for sure, or with anything else.
_NUMBERS = {
    name: re.compile(rb'"%b"\s*+:\s*+(?:(\d{1,18}+)(?=[,}\s])|([{\[ntf]))?' % name.encode())
    for name in ("n", *(name for _, names in LIMITS.values() for name in names))
}
# A letter of such a name, written as an escape; not where a backslash before it is escaped.
_ESCAPED = re.compile(rb"\\u00(?:5[fF]|6[1-9a-fA-F]|7[0-9aA])(?<!\\\\u00..)")
MANY = 1000  # fields of one name in a large body: so many are no limits
MOST_ANSWERS = 1024
MOST = 10**9  # tokens that a request is taken to ask for
USAGE = {"include_usage": True}
MODEL_FIELDS = ("model", "lora_path")


def may_stream(body: Sequence[bytes]) -> bool:
    """Could the request ask for a stream? A quick look, before it is read."""
    return len(body) != 1 or len(body[0]) > HEAVY_BODY or b'"stream"' in body[0]


def asked(body: Sequence[bytes], size: int) -> dict[str, Any]:
    """The outermost fields of a JSON body of `size` bytes; of a large one those that are known here. Empty if none."""
    if size > HEAVY_BODY:
        return _of_ends(body)
    try:
        said = orjson.loads(body[0] if len(body) == 1 else b"".join(body))
    except orjson.JSONDecodeError:
        return {}
    return said if isinstance(said, dict) else {}


def _of_ends(body: Sequence[bytes]) -> dict[str, Any]:
    head, tail = body[0][:END], b"".join(body[-2:])[-END:]
    said: dict[str, Any] = {}
    for part in (head, tail):
        for found in _FIELDS.finditer(part):
            name = found[1].decode()
            with contextlib.suppress(orjson.JSONDecodeError):  # not JSON: refusing the body is left to the replica
                said.setdefault(name, {} if found[2] == b"{" else orjson.loads(found[2]))
    if "stream" not in said:
        said["stream"] = any(map(_STREAM.search, body))
    if "stream_options" in said:
        said["stream_options"] = {"include_usage": said.get("include_usage") is True}
    return said


def most_tokens(request: Request, said: dict[str, Any], prompt: bytes) -> int | None:
    """The most tokens that all its answers together may have; None if it sets no limit, or none that is read here.

    `prompt` is what `prompt_of` gives.
    """
    within, names = LIMITS.get(request.path, USUAL_LIMIT)
    if request.body_size > HEAVY_BODY:
        return _most_of_large(prompt, names)
    inner = said.get(within)
    holder = inner if isinstance(inner, dict) else said
    told = [most for name in names if type(most := holder.get(name)) is int and most >= 0]
    return min(max(told) * _answers(said, holder), MOST) if told else None


def _most_of_large(body: bytes, names: Sequence[str]) -> int | None:
    if _ESCAPED.search(body):
        return None
    limits, counts = _numbers(body, names), _numbers(body, ("n",))
    if not limits or counts is None:
        return None
    return min(max(limits) * min(max([1, *counts]), MOST_ANSWERS), MOST)


def _numbers(body: bytes, names: Sequence[str]) -> list[int] | None:
    """The numbers of these fields, wherever they are; None if one may be told in a way that is not read here."""
    numbers: list[int] = []
    for name in names:
        found = list(islice(_NUMBERS[name].finditer(body), MANY))
        if len(found) == MANY or any(one[1] is None and one[2] is None for one in found):
            return None
        numbers += [int(one[1]) for one in found if one[1] is not None]
    return numbers


def _answers(said: dict[str, Any], holder: dict[str, Any]) -> int:
    prompts = said.get("prompt") if "prompt" in said else said.get("text")
    texts = len(prompts) if isinstance(prompts, list) and prompts and isinstance(prompts[0], (str, list)) else 1
    count = holder.get("n")
    return min(texts * (count if type(count) is int and count > 0 else 1), MOST_ANSWERS)


def prompt_of(request: Request) -> bytes:
    """The body without embedded images."""
    body = b"".join(request.body)
    left = without_images(body) if request.body_size > HEAVY_BODY else body
    return body if left is None else left


def with_usage(request: Request, said: dict[str, Any]) -> bool:
    """Makes a streaming request ask for token counts if it does not; returns whether it had to be changed.

    The field is put last: where a name occurs twice, every common parser takes the last.
    """
    options = said.get("stream_options")
    options = options if isinstance(options, dict) else {}
    if options.get("include_usage"):
        return False
    last = request.body[-1].rstrip() if request.body else b""
    if last[-1:] != b"}" or last == b"}":
        return False
    piece = last[:-1] + b',"stream_options":' + orjson.dumps(options | USAGE) + b"}"
    request.body_size += len(piece) - len(request.body[-1])
    request.body[-1] = piece
    return True


def names_of_models(request: Request) -> Iterator[Any]:
    """Everything by which the request may choose a model or an adapter, duplicates included; reads the whole body.

    False stands for what cannot be read here. Replicas also read JSON with a byte order mark, in UTF-16 and in UTF-32.
    """
    if request.model:
        yield request.model.decode("latin-1")
    body = b"".join(request.body)
    if body.lstrip()[:1] == b"{" and b"\0" not in body[:4]:
        yield from fields_in_json(body, MODEL_FIELDS)
    elif body.startswith(b"--"):
        yield from models_in_form(body)
    elif body.strip():
        yield False
