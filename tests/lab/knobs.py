"""The behaviour of a lab replica: every latency, fault and answer that a test can ask for."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

Cut = Literal["", "before_head", "mid_head", "after_head", "after_tokens", "mid_event", "mid_chunk", "after_bytes"]
Hang = Literal["", "before_head", "after_head", "after_tokens"]
How = Literal["reset", "close"]
Framing = Literal["auto", "content-length", "chunked", "close", "http/1.0", "http/1.0+length"]


class BadKnob(ValueError):
    """A knob that does not exist, or a value that it cannot take."""


@dataclass(frozen=True, slots=True)
class Knobs:
    """One behaviour. Times are seconds. The defaults are a healthy, fast replica."""

    # Timing of an answer to a generating request (plain mode; in faithful mode the model adds its own).
    head_delay: float = 0.0  # from the whole request to the response head
    first_token_delay: float = 0.0  # from the head to the first token
    token_interval: float = 0.0  # between tokens
    tokens: int = 0  # tokens of an answer; 0: the request's max_tokens, else 8

    # Answers on serving paths.
    status: int = 0  # 0: the ordinary 200; from 400 on with SGLang's error body
    retry_after: str = ""  # Retry-After header, verbatim; empty: none
    headers: tuple[tuple[str, str], ...] = ()  # extra response headers, in order; repeated ones stay separate
    body: str | None = None  # this body instead of the ordinary one
    body_mib: float = 0.0  # this many MiB of body at full speed instead of the ordinary one
    content_type: str = ""  # instead of the ordinary one
    framing: Framing = "auto"  # auto: chunked for streams, else content-length
    connection_close: bool = False  # send Connection: close, and close
    interim: tuple[int, ...] = ()  # interim responses before the head: 100, 102, 103
    early: Literal["", "read", "close"] = ""  # answer before the request's body: then read and drop it, or just close
    raw: str | None = None  # these bytes (latin-1) instead of any response
    raw_then: Literal["close", "keep", "reset", "hang"] = "close"  # what follows raw
    split: int = 0  # at most this many bytes a write; 0: whole events
    event_end: str = "\n\n"  # what ends an SSE event

    # Reasoning, in chats only.
    thinks: int = 0  # tokens of it before the answer, its closing tag not counted
    opens_thinking: bool = False  # the chat template writes the opening tag; otherwise the model does
    reasoning_parser: str = ""  # as /server_info has it; without one, tags and reasoning are part of the answer

    # Faults on serving paths.
    cut: Cut = ""  # where the connection ends
    cut_after: int = 1  # tokens sent before that (after_tokens, mid_event, mid_chunk) or body bytes (after_bytes)
    cut_by: How = "reset"
    hang: Hang = ""  # where it falls silent for ever
    hang_after: int = 1  # tokens sent before that (after_tokens)
    race: bool = False  # resets a reused connection just as its next request arrives, which nobody reads

    poison: str = ""  # a request with this text in its body kills the replica, like one that makes a GPU fail

    # Faults on every path.
    black_hole: bool = False  # new connections are accepted and never read
    keep_alive: float = 5.0  # an idle connection is closed after this long (SGLang: 5)

    # Probes.
    template: Literal["continues", "ends", "hang", "404"] = "continues"  # a begun answer; or what /tokenize does
    ready: int | Literal["hang", "reset"] = 200  # /ready: 200, 503, 404, ...
    ready_delay: float = 0.0
    health: int | Literal["hang", "reset"] = 200  # /health and /health_generate
    health_delay: float = 0.0
    service_status: int | Literal["hang", "reset"] = 200  # /server_info, /v1/loads, /model_info, /v1/models, /metrics

    # What it says about itself.
    served_model: str = "lab"
    api_key: str = ""  # required as a bearer token, and shown in clear by /server_info
    random_seed: int = 0  # 0: drawn at each start
    max_running_requests: int = 64  # plain mode; in faithful mode the model's
    max_total_tokens: int = 65536  # plain mode; in faithful mode the model's

    # How it aborts requests whose client left, and how it checks its health (SGLang: 2, 4, 20).
    abort_delay_stream: float = 0.0  # from the client's leaving to the abort of a streaming request
    abort_delay: float = 0.0  # the same for one that is not streamed
    health_timeout: float = 20.0  # faithful mode: /health without any token for this long is a failure
    stuck: bool = False  # faithful mode: the scheduler hangs, but the server still answers

    def change(self, **changes: Any) -> "Knobs":
        """These knobs with changes. Raises BadKnob with the nearest known name, or with the type of the value."""
        known = {field.name: field for field in dataclasses.fields(self)}
        values: dict[str, Any] = {}
        for name, value in changes.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise BadKnob(f"no knob {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            values[name] = _checked(name, value, known[name].type)
        return dataclasses.replace(self, **values)

    def abort_delay_for(self, stream: bool) -> float:
        return self.abort_delay_stream if stream else self.abort_delay


# SGLang's real values, where the defaults above are chosen for quick tests.
FAITHFUL = Knobs(abort_delay_stream=2.0, abort_delay=4.0)


def _checked(name: str, value: Any, kind: Any) -> Any:
    if name in ("headers", "interim"):
        if not isinstance(value, (list, tuple)):
            raise BadKnob(f"knob {name!r} wants a list, not {value!r}")
        return tuple(tuple(item) if isinstance(item, (list, tuple)) else item for item in value)
    if get_origin(kind) is Literal:
        accepted = value in get_args(kind)
    elif name in ("ready", "health", "service_status"):
        accepted = value in ("hang", "reset") or type(value) is int
    elif kind is float:
        accepted = type(value) in (int, float)
    else:
        accepted = isinstance(value, kind) and (type(value) is not bool or kind is bool)
    if not accepted:
        raise BadKnob(f"knob {name!r} cannot be {value!r}: it is {kind}")
    return value
