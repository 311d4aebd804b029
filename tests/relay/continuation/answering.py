"""Answers of the lab's replica as streams of bytes, in each format that goes on elsewhere."""

from collections.abc import Iterator
from typing import Any

import orjson

from tests.lab import answers
from tests.lab.asked import Asked
from tests.lab.knobs import Knobs
from tests.lab.prompts import prompt_tokens
from tests.lab.serving import GENERATING

MESSAGES = [{"role": "system", "content": "Count."}, {"role": "user", "content": "go"}]
USAGE = {"stream_options": {"include_usage": True}}
# What differs from one answer to the next: names and times.
ITS_OWN = ("id", "created", "weight_versions", "e2e_latency")


def request_for(path: str, tokens: int) -> dict[str, Any]:
    """A request for a stream of that many tokens, its usage told where that is to be asked for."""
    match path:
        case "/generate":
            return {"text": "go", "sampling_params": {"max_new_tokens": tokens, "temperature": 0}, "stream": True}
        case "/v1/completions":
            return {"model": "lab", "prompt": "go", "max_tokens": tokens, "stream": True, **USAGE}
        case "/v1/messages":
            user = [{"role": "user", "content": [{"type": "text", "text": "go"}]}]
            return {"model": "lab", "system": "Count.", "messages": user, "max_tokens": tokens, "stream": True}
        case _:
            return {"model": "lab", "messages": MESSAGES, "max_tokens": tokens, "stream": True, **USAGE}


def events(path: str, body: bytes) -> Iterator[bytes]:
    """The events with which a lab replica answers that request, each whole."""
    asked = Asked.read(GENERATING[path], body, Knobs())
    prompt = len(prompt_tokens(asked, 1)) // 4
    made = answers.Generation(asked, answers.words(asked.tokens, asked.begin))
    told = [
        *answers.first(made, answers.Usage(prompt, 1, 0)),
        *(answers.token(made, at, answers.Usage(prompt, at + 1, 0), 0.1) for at in range(asked.tokens)),
        *answers.last(made, answers.Usage(prompt, asked.tokens, 0)),
    ]
    return (event + b"\n\n" for event in told)


def plain(stream: bytes) -> list[Any]:
    """A stream's events, less comments and what differs from one answer to the next."""
    said = []
    for event in stream.decode().replace("\r\n", "\n").split("\n\n"):
        name, _, data = event.rpartition("data: ")
        if not data or event.startswith(":"):
            continue
        told = data if data == "[DONE]" else orjson.loads(data)
        for holder in (told, told.get("message"), told.get("meta_info")) if isinstance(told, dict) else ():
            for field in ITS_OWN if holder else ():
                holder.pop(field, None)
        said.append((name, told))
    return said
