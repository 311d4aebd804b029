"""What a large body asks for, and a stream from which the token counts are taken out."""

import pytest

from balancer.relay.asked import asked, most_tokens
from balancer.relay.hidden_usage import HiddenUsage
from balancer.routing.body import HEAVY_BODY


@pytest.mark.parametrize("wrong", [b'"n": 007', b'"model": "\xff"', b'"model": "a\nb"'])
def test_a_large_body_that_is_no_json_is_still_read(wrong: bytes) -> None:
    body = b'{"text": "' + b"x" * HEAVY_BODY + b'", ' + wrong + b', "max_tokens": 7}'
    assert asked([body], len(body)) == {"max_tokens": 7, "stream": False}


def test_no_request_asks_for_more_tokens_than_makes_sense() -> None:
    assert most_tokens("/v1/completions", {"max_tokens": 2**63, "n": 1000}) == 10**9


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_only_the_counts_are_taken_out(end: bytes) -> None:
    text, done = b'data: {"choices":[{"delta":{}}]}' + end, b"data: [DONE]" + end
    counts = b'data: {"choices":[],"usage":{"prompt_tokens":1}}' + end
    assert HiddenUsage().take(text + counts + done) == text + done
