"""What a large body asks for, and a stream from which the token counts are taken out."""

import pytest

from balancer.relay.asked import asked, most_tokens, prompt_of
from balancer.relay.hidden_usage import HiddenUsage
from balancer.relay.request import Request
from balancer.routing.body import HEAVY_BODY


@pytest.mark.parametrize("wrong", [b'"n": 007', b'"model": "\xff"', b'"model": "a\nb"'])
def test_a_large_body_that_is_no_json_is_still_read(wrong: bytes) -> None:
    body = b'{"text": "' + b"x" * HEAVY_BODY + b'", ' + wrong + b', "stream": true}'
    assert asked([body], len(body)) == {"stream": True}
    assert most_of(body) is None


def most_of(body: bytes, path: str = "/v1/responses") -> int | None:
    """The most tokens that a request with this body may ask for."""
    request = Request(b"POST", path.encode(), "1.1", 0.0)
    request.path, request.body, request.body_size = path, [body], len(body)
    return most_tokens(request, asked(request.body, len(body)), prompt_of(request))


def test_no_request_asks_for_more_tokens_than_makes_sense() -> None:
    assert most_of(b'{"max_tokens": 9223372036854775807, "n": 1000}', "/v1/completions") == 10**9


LONG = b'"input": "' + b"x" * HEAVY_BODY + b'"'
DECOY = b'{"metadata": {"max_output_tokens": 1}, '


@pytest.mark.parametrize(
    ("body", "most"),
    [
        (b"{" + LONG + b"}", None),
        (b"{" + LONG + b', "max_output_tokens": 900}', 900),
        (b'{"max_output_tokens": 900, ' + LONG + b', "metadata": {"max_output_tokens": 1}}', 900),
        (DECOY + LONG + b', "max_output_tokens": 900}', 900),
        (DECOY + LONG + b', "max_output_tokens": 900, "a": ["' + b'x y", "' * HEAVY_BODY + b'"]}', 900),
        (DECOY + LONG + b', "max_output_tokens": 9000000000}', 10**9),
        (DECOY + LONG + b', "max_output_tokens": "900"}', None),
        (DECOY + LONG + b', "max_output_tokens": 9e2}', None),
        (DECOY + LONG + b', "max_\\u006futput_tokens": 900}', None),
        (b'{"a": "C:\\\\u006f", "tools": [{"max_output_tokens": {}}], "max_output_tokens": 7, ' + LONG + b"}", 7),
    ],
)
def test_of_what_a_large_body_says_the_most_counts(body: bytes, most: int | None) -> None:
    """None, as without a limit, where one may be told in a way that is not read here."""
    assert most_of(body) == most


def test_answers_of_a_large_body_are_counted() -> None:
    body = b'{"n": 1, "sampling_params": {"max_new_tokens": 30, "n": 4}, ' + LONG + b', "n": 2}'
    assert most_of(body, "/generate") == 120


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_only_the_counts_are_taken_out(end: bytes) -> None:
    text, done = b'data: {"choices":[{"delta":{}}]}' + end, b"data: [DONE]" + end
    counts = b'data: {"choices":[],"usage":{"prompt_tokens":1}}' + end
    assert HiddenUsage().take(text + counts + done) == text + done
