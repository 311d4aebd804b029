"""Finds which model a request asks for without parsing the whole body."""

import re
from collections.abc import Collection, Iterator

import orjson

from balancer.relay.request import Request

# A string, with the colon after it if it is a key; or a bracket.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"(\s*:)?|[{}\[\]]', re.DOTALL)
_STRING = re.compile(rb'\s*("[^"\\]*(?:\\.[^"\\]*)*")', re.DOTALL)
_NULL = re.compile(rb"\s*null\b")
FORM_FIELD = re.compile(rb'\bname="?model"?[^\r\n]*\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]*)', re.IGNORECASE)


def requested_model(request: Request) -> str:
    """The name in the X-Model header, in the path, in a JSON body or in a form; empty if there is none."""
    if request.model:
        return request.model.decode("latin-1")
    if request.path.startswith("/v1/models/"):
        return request.path.removeprefix("/v1/models/")
    body = request.body[0] if len(request.body) == 1 else b"".join(request.body)
    if body.lstrip()[:1] == b"{":
        return model_in_json(body)
    found = FORM_FIELD.search(body) if body.startswith(b"--") else None
    return found[1].decode("utf-8", "replace") if found else ""


def model_in_json(body: bytes) -> str:
    """The string under the key "model" of the outermost JSON object; empty if there is none."""
    found = next(fields_in_json(body, ("model",)), None)
    return found if isinstance(found, str) else ""


def fields_in_json(body: bytes, names: Collection[str]) -> Iterator[str | bool | None]:
    """The values under these keys of the outermost JSON object, duplicates included: a string, None for null, or False
    for anything else.
    """
    depth = 0
    for token in _TOKEN.finditer(body):
        first = token[0][:1]
        if first in b"{[":
            depth += 1
        elif first in b"}]":
            depth -= 1
        elif depth == 1 and token[1] is not None and _text(token[0][: -len(token[1])]) in names:
            value = _STRING.match(body, token.end())
            yield _text(value[1]) if value else None if _NULL.match(body, token.end()) else False


def _text(literal: bytes) -> str:
    try:
        return str(orjson.loads(literal))
    except ValueError:
        return ""
