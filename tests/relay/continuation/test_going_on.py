"""A stream that is cut anywhere and goes on elsewhere is, to its client, the stream that was not cut."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.relay.continuation.delivered import CONTINUED, CUMULATIVE, Delivered, delivered
from balancer.relay.continuation.events import data_of
from balancer.relay.continuation.follow_up import FollowUp, ending, follow_up
from balancer.relay.continuation.going_on import GoingOn
from balancer.relay.continuation.keeper import Keeper
from balancer.relay.continuation.translation import Translation
from balancer.relay.request import Request
from tests.relay.continuation.answering import events, plain, request_for

PATHS = sorted(CONTINUED)
paths = st.sampled_from(PATHS)


def pieces_of(stream: bytes, size: int) -> list[bytes]:
    return [stream[at : at + size] for at in range(0, len(stream), size)]


def kept(path: str, stream: bytes, size: int) -> tuple[bytes, list[bytes]]:
    """What the client gets of a stream that comes in pieces of that size, and what is kept of it."""
    keeper = Keeper(1 << 20, path in CUMULATIVE)
    got = b"".join([keeper.take(piece) for piece in pieces_of(stream, size)])
    return got, keeper.pieces


def gone_on(path: str, request: dict[str, Any], so_far: Delivered, size: int) -> tuple[bytes, FollowUp]:
    """What the client gets of the second replica."""
    tokens = so_far.completion_tokens or len(so_far.text) // 4
    follow = follow_up(path, request, so_far, tokens)
    translation = Translation(path, so_far, follow)
    second = b"".join(events(follow.path, follow.body))
    return b"".join([translation.take(piece) for piece in pieces_of(second, size)]), follow


@given(paths, st.integers(1, 12), st.data())
def test_cut_anywhere(path: str, tokens: int, data: st.DataObject) -> None:
    """Wherever a stream is cut, and in whatever pieces it comes, first and second part are the whole one."""
    request = request_for(path, tokens)
    whole = b"".join(events(path, orjson.dumps(request)))
    cut = data.draw(st.integers(0, len(whole)))
    first, pieces = kept(path, whole[:cut], data.draw(st.integers(1, 400)))
    assert whole.startswith(first)
    assert first.endswith(b"\n\n") or not first
    so_far = delivered(path, pieces)
    if (rest := ending(path, request, so_far)) is None:
        if path == "/v1/messages" and not so_far.has_opened:
            return  # it is asked for again as it was
        rest, follow = gone_on(path, request, so_far, data.draw(st.integers(1, 400)))
        wanted = orjson.loads(follow.body)
        left = tokens - len(so_far.text) // 4
        assert wanted.get("max_tokens", wanted.get("sampling_params", {}).get("max_new_tokens")) == max(left, 1)
    assert plain(first + rest) == plain(whole)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_cut_before_the_last_event(path: str) -> None:
    """Usage that the client has is not sent again."""
    request = request_for(path, 3)
    whole = b"".join(events(path, orjson.dumps(request)))
    last = b"data: [DONE]\n\n"
    assert whole.endswith(last)
    assert b'"usage":{' in whole
    first, pieces = kept(path, whole.removesuffix(last), 100)
    assert (first + last, ending(path, request, delivered(path, pieces))) == (whole, last)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_cut_before_usage_that_only_we_want(path: str) -> None:
    """A client that lacks only counts that it did not ask for lacks nothing; one that asked waits for them."""
    body = orjson.dumps(request_for(path, 3))
    whole = b"".join(events(path, body))
    first = whole[: whole.index(b"\n\n", whole.index(b'"finish_reason":"')) + 2]
    assert b'"choices":[]' not in first
    request = Request(b"POST", path.encode(), "1.1", 0.0)
    request.path, request.body, request.body_size = path, [body], len(body)
    assert GoingOn(request, [first], hides_usage=True).ending == b"data: [DONE]\n\n"
    assert GoingOn(request, [first]).ending is None


@pytest.mark.parametrize("path", PATHS)
def test_names(path: str) -> None:
    """Every event has the id of the first answer, and no second beginning."""
    request = request_for(path, 4)
    first = b"".join(list(events(path, orjson.dumps(request)))[:3])
    so_far = delivered(path, [first])
    rest, _ = gone_on(path, request, so_far, 64)
    assert so_far.text
    told = [orjson.loads(data) for data in data_of(rest) if data != b"[DONE]"]
    if path == "/v1/messages":
        assert all("message" not in said for said in told), "one message_start is enough"
        return
    assert {said.get("meta_info", said)["id"] for said in told} == {so_far.names["id"]}
    assert path != "/v1/chat/completions" or all("role" not in c["delta"] for said in told for c in said["choices"])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stop_string_where_usage_comes_last(path: str) -> None:
    """A replica that does not tell its usage in each event is heard to its end, and nothing comes twice."""
    request = request_for(path, 9) | {"stop": "2 t0"}
    first = b"".join(list(events(path, orjson.dumps(request)))[: 3 + (path != "/v1/completions")])
    so_far = delivered(path, [first])
    assert so_far.text == " t00 t01 t02"
    follow = follow_up(path, request, so_far, 3)
    wish = orjson.loads(follow.body) | {"stream_options": {"include_usage": True}}
    translation = Translation(path, so_far, follow)
    rest = b"".join([translation.take(event) for event in events(path, orjson.dumps(wish))])
    assert not translation.is_over
    assert (rest.count(b'"stop"'), rest.count(b'"completion_tokens":9'), rest.count(b"[DONE]")) == (1, 1, 1)
    assert b"t03" not in rest


def test_other_line_ends() -> None:
    """Events with other line ends are read and kept in the same way."""
    path = "/v1/chat/completions"
    stream = b"".join(events(path, orjson.dumps(request_for(path, 3)))).replace(b"\n", b"\r\n")
    got, pieces = kept(path, stream[:-30], 7)
    assert got.endswith(b"\r\n\r\n")
    assert delivered(path, pieces).text == " t00 t01 t02"


def test_characters_of_several_bytes() -> None:
    """Characters of several bytes stay whole, however the stream is split."""
    path = "/v1/completions"
    said = {"id": "x", "choices": [{"index": 0, "text": "日本 🎏", "finish_reason": None}]}
    stream = b"data: " + orjson.dumps(said) + b"\n\n"
    for size in range(1, len(stream)):
        got, pieces = kept(path, stream + stream[:-3], size)
        assert got == stream
        assert delivered(path, pieces).text == "日本 🎏"


# What is kept


def test_kept_by_reference() -> None:
    """A piece is kept as it came, and not copied."""
    keeper = Keeper(100, is_cumulative=False)
    piece = b"data: 1\n\n"
    assert keeper.take(piece) is piece
    assert keeper.pieces[0] is piece


def test_held_back() -> None:
    """The beginning of an event waits for its end."""
    keeper = Keeper(100, is_cumulative=False)
    assert keeper.take(b"data: 1\n\nda") == b"data: 1\n\n"
    assert keeper.take(b"ta: 2\n") == b""
    assert keeper.take(b"\n") == b"data: 2\n\n"
    assert (keeper.held, keeper.size) == (b"", 18)


@given(st.lists(st.sampled_from([b"data: 1", b"\n", b"\n\n", b"\r\n\r\n", b"\r"]), max_size=30), st.integers(1, 90))
def test_all_passed_on(parts: list[bytes], most: int) -> None:
    """Nothing is lost and nothing comes twice, whatever comes; what is kept is counted."""
    keeper, got = Keeper(most, is_cumulative=False), b""
    for part in parts:
        got += part if keeper.is_over else keeper.take(part)
        assert keeper.size <= most
        assert keeper.is_over or keeper.size == len(got + keeper.held) == len(b"".join([*keeper.pieces, keeper.held]))
    assert got + keeper.held == b"".join(parts)


def test_too_much() -> None:
    """Of a stream beyond the limit nothing is kept."""
    keeper = Keeper(20, is_cumulative=False)
    keeper.take(b"data: 1\n\n")
    assert keeper.take(b"data: 2\n\ndata: 3") == b"data: 2\n\ndata: 3"
    assert (keeper.is_over, keeper.pieces, keeper.size) == (True, [], 0)


def test_cumulative() -> None:
    """Of events that say everything each time the last one is kept."""
    keeper = Keeper(20, is_cumulative=True)
    for number in range(100):
        keeper.take(b"data: %d\n\n" % number)
    assert (keeper.pieces, keeper.is_over) == ([b"data: 99\n\n"], False)
