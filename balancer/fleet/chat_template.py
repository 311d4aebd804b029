"""Whether a replica's chat template lets a begun answer continue: tried once after each of its starts.

Two prompts are compared as token ids: that of a question, and that of the question with the first words of an answer to
be continued. The second must be the first, followed by those words: only then does a replica go on as if they were its
own.
"""

from typing import Any

import orjson

from balancer.fleet.probe_connection import NoResponse, ProbeConnection

QUESTION = [{"role": "user", "content": "Hello"}]
BEGUN = "So it is"
_FIELDS = {"content-type": "application/json"}


async def continues(connection: ProbeConnection, timeout: float) -> bool:
    """Asks SGLang's /tokenize, `timeout` seconds for each of three answers; raises NoResponse. No GPU works for it."""
    before = await _tokens(connection, timeout, messages=QUESTION)
    if before is None:
        return False
    answer = {"role": "assistant", "content": BEGUN}
    after = await _tokens(connection, timeout, messages=[*QUESTION, answer], continue_final_message=True)
    begun = await _tokens(connection, timeout, prompt=BEGUN, add_special_tokens=False)
    return after is not None and begun is not None and after == before + begun


async def _tokens(connection: ProbeConnection, timeout: float, **what: Any) -> list[Any] | None:
    """Token ids; None if the replica has none for that. A 5xx is no answer: the replica may have one later."""
    response = await connection.request("/tokenize", timeout, "POST", _FIELDS, orjson.dumps(what))
    if response.status >= 500:
        raise NoResponse(f"/tokenize got {response.status}")
    try:
        tokens = orjson.loads(response.body)["tokens"] if response.status == 200 else None
    except (ValueError, KeyError, TypeError):
        return None
    return tokens if isinstance(tokens, list) else None
