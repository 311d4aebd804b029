"""Which model a request asks for."""

import json
import time
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.relay import kept_responses
from balancer.relay.asked import names_of_models
from balancer.relay.kept_responses import RESPONSES, kept_id
from balancer.relay.request import Request
from balancer.relay.requested_model import model_in_json, requested_model

FORM = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\nRIFF\r\n'
    b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n--x--\r\n'
)


def asking(body: bytes = b"", path: str = "/v1/chat/completions", model: bytes = b"", pieces: int = 1) -> Request:
    request = Request(b"POST", path.encode(), "1.1", 0.0)
    request.path, request.model = path, model
    size = max(1, -(-len(body) // pieces))
    request.body = [body[start : start + size] for start in range(0, len(body), size)]
    return request


@pytest.mark.parametrize(
    ("request_", "model"),
    [
        (asking(b'{"model": "a", "messages": []}'), "a"),
        (asking(b' \n{"messages": [{"model": "no"}], "tools": {"model": "no"}, "model" : "b/c"}'), "b/c"),
        (asking(b'{"model": "a\\u00e9\\/b"}'), "a\u00e9/b"),
        (asking(b'{"mod\\u0065l": "a"}'), "a"),
        (asking(b'{"text": "\\"model\\": \\"no\\"", "model": "yes"}', pieces=9), "yes"),
        (asking(b'{"model": 7}'), ""),
        (asking(b'{"model": null}'), ""),
        (asking(b'{"messages": ["model", "a"]}'), ""),
        (asking(b'["model", "a"]'), ""),
        (asking(b'{"model'), ""),
        (asking(b"\xff\xfe"), ""),
        (asking(b""), ""),
        (asking(FORM, "/v1/audio/transcriptions"), "whisper-1"),
        (asking(b"--x\r\n\r\n", "/v1/audio/transcriptions"), ""),
        (asking(b'{"model": "a"}', model=b"b"), "b"),
        (asking(path="/v1/models/org/one"), "org/one"),
    ],
)
def test_the_model_is_found(request_: Request, model: str) -> None:
    assert requested_model(request_) == model


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": "' + b'\\"' * 500_000,
        b'{"a": ' + b"[" * 5_000_000,
        b'{"a": ' + b'"model":' * 300_000,
        b"--x\r\n" + b"name=model\r\n" * 100_000,
        b"--x\r\n" + b"name=model " * 100_000,
        b"--x\r\n" + b"content-disposition: form-data; name=model\r\n" * 20_000,
        b"--x\r\n" + b"content-disposition: form-data; name=model; " * 20_000,
        b"--x\r\ncontent-disposition: form-data; " + b"name=m" * 100_000 + b"name" + b" " * 500_000,
        b"\0{" + b"\xd8\0" * (32 << 20),
    ],
    ids=["string without end", "brackets", "keys", "lines", "one line", "headers", "header", "name", "surrogates"],
)
def test_no_body_keeps_all_others_waiting(body: bytes) -> None:
    began = time.process_time()
    requested_model(asking(body))
    list(names_of_models(asking(body)))
    kept_id(asking(body, RESPONSES))
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("escaped", "is_walked"),
    [
        (rb"caf\u00e9 \u2028 \\n", False),
        *((b"\\u%04x" % ord(letter), True) for letter in sorted(set("previous_response_id"))),
    ],
)
def test_a_body_is_walked_for_letters_of_the_name_only(
    escaped: bytes, is_walked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text in other languages, as most clients escape it, is not looked through."""
    walked: list[bytes] = []
    monkeypatch.setattr(kept_responses, "fields_in_json", lambda body, _: iter(walked.append(body) or ()))
    kept_id(asking(b'{"input": "%b"}' % escaped, RESPONSES))
    assert bool(walked) is is_walked


def test_a_body_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asking(b'{"previous_response_id": "resp_a"}', RESPONSES)
    assert kept_id(asked) == "resp_a"
    monkeypatch.setattr(kept_responses, "fields_in_json", None)
    assert kept_id(asked) == "resp_a"


@pytest.mark.parametrize(
    "name",
    [
        *('name = "model"', 'name="model"', "name=model", "NAME\t=\tmodel", 'name\xa0=\x1f"model"'),
        *("name*=utf-8''model", "name*0=mo; name*1=del", "name*0*=utf-8''%6dodel", 'name="a"; name="model"'),
    ],
)
def test_a_part_names_the_model_however_it_is_written(name: str) -> None:
    body = FORM.replace(b'name="model"', name.encode("latin-1"))
    assert list(names_of_models(asking(body))) == ["whisper-1"]


@pytest.mark.parametrize("name", ['name="language"', 'name="file"; filename="C:\\a.wav"', 'name="mode"', 'x="model"'])
def test_another_part_names_no_model(name: str) -> None:
    assert list(names_of_models(asking(FORM.replace(b'name="model"', name.encode())))) == []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_json_that_only_a_replica_reads_names_anything(encoding: str) -> None:
    body = '{"model": "base:adapter"}'.encode(encoding)
    assert json.loads(body) == {"model": "base:adapter"}
    assert list(names_of_models(asking(body))) == [False]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just("model"), inner, max_size=4),
    max_leaves=20,
)


@given(
    st.dictionaries(st.text() | st.just("model"), JSON, max_size=5),
    st.booleans(),
    st.sampled_from([None, 0, 3]),
)
def test_it_is_what_a_whole_parse_finds(body: dict[str, Any], ascii_only: bool, indent: int | None) -> None:
    data = json.dumps(body, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    try:
        orjson.loads(data)
    except ValueError:
        return  # SGLang would not read it either
    model = body.get("model")
    assert model_in_json(data) == (model if isinstance(model, str) else "")
