"""Finds which model a request asks for without parsing the whole body."""

import re
from collections.abc import Collection, Iterator

import orjson

from balancer.relay.request import Request

# A string, with the colon after it if it is a key; or a bracket. A string without an end takes all that follows, and
# nothing is tried twice: the time is linear in the body, whatever is in it.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"(\s*+:)?|\\?\Z)|[{}\[\]]', re.DOTALL)
_STRING = re.compile(rb'\s*+("[^"\\]*+(?:\\.[^"\\]*+)*+")', re.DOTALL)
MOST_TOKENS = 500_000  # strings and brackets that are looked at: a third of a second
_NULL = re.compile(rb"\s*null\b")
# A part's disposition, and the first line of its content. More header lines than these no client sends.
_PART = re.compile(
    rb"^content-disposition:([^\r\n]*+)\r\n(?:[^\r\n]++\r\n){0,16}+\r\n([^\r\n]*+)", re.IGNORECASE | re.MULTILINE
)
# Blanks may stand around the equals sign, and some replicas read RFC 2231's name*=utf-8''model.
_NAMES_MODEL = re.compile(rb'\bname[^\w*=;"]*+(?:\*|=[^\w";]*+"?model"?)', re.IGNORECASE)


def requested_model(request: Request) -> str:
    """The name in the X-Model header, in the path, in a JSON body or in a form; empty if there is none."""
    if request.model:
        return request.model.decode("latin-1")
    if request.path.startswith("/v1/models/"):
        return request.path.removeprefix("/v1/models/")
    body = request.body[0] if len(request.body) == 1 else b"".join(request.body)
    if body.lstrip()[:1] == b"{":
        return model_in_json(body)
    return next(models_in_form(body), "") if body.startswith(b"--") else ""


def model_in_json(body: bytes) -> str:
    """The string under the key "model" of the outermost JSON object; empty if there is none."""
    found = next(fields_in_json(body, ("model",)), None)
    return found if isinstance(found, str) else ""


def fields_in_json(body: bytes, names: Collection[str]) -> Iterator[str | bool | None]:
    """The values under these keys of the outermost JSON object, duplicates included: a string, None for null, or False
    for anything else. The last is False if the body is too long to be looked through.
    """
    depth = 0
    for count, token in enumerate(_TOKEN.finditer(body)):
        if count == MOST_TOKENS:
            yield False
            return
        first = token[0][:1]
        if first in b"{[":
            depth += 1
        elif first in b"}]":
            depth -= 1
        elif depth == 1 and token[1] is not None and _text(token[0][: -len(token[1])]) in names:
            value = _STRING.match(body, token.end())
            yield _text(value[1]) if value else None if _NULL.match(body, token.end()) else False


def models_in_form(body: bytes) -> Iterator[str]:
    """The values of all fields of a form whose names begin with "model"."""
    for part in _PART.finditer(body):
        if _NAMES_MODEL.search(part[1]):
            yield part[2].decode("utf-8", "replace")


def _text(literal: bytes) -> str:
    try:
        return str(orjson.loads(literal))
    except ValueError:
        return ""
