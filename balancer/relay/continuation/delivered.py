"""What a client has of a streamed answer, read from the kept pieces once the replica has broken."""

from dataclasses import dataclass, field
from typing import Any

from balancer.relay.continuation.events import DONE, data_of, parsed


class CannotContinue(Exception):
    """The answer cannot continue elsewhere; `reason` is the word or two that metrics and the log use for it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True)
class Delivered:
    """The answer so far. `is_done`: only the end of the HTTP response was missing."""

    text: str = ""
    pieces: list[str] = field(default_factory=list)  # the text by events, but for /generate
    reasoning: str = ""  # which came before the text, without its tags
    has_opened: bool = False  # the opening event, before any text, has arrived
    has_usage: bool = False  # the event with the usage has arrived, which nothing follows but the end
    finish: Any = None  # why it ended, in its format's own words
    is_block_open: bool = False  # in Anthropic's format, a text block
    blocks: int = 0  # in Anthropic's format, text blocks begun
    is_done: bool = False
    # What every event of an answer repeats to identify it
    names: dict[str, Any] = field(default_factory=dict)
    # For /generate only, whose events contain them
    output_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def is_empty(self) -> bool:
        """Has the client received nothing that was generated?"""
        return not self.text and not self.reasoning and self.finish is None and not self.completion_tokens

    def add(self, text: str) -> None:
        """The text of one event."""
        if text:
            self.text += text
            self.pieces.append(text)


def delivered(path: str, pieces: list[bytes]) -> Delivered:
    """Reads the whole events that were passed on; raises CannotContinue if they cannot be continued or read."""
    so_far = Delivered()
    note = _NOTES[path]
    try:
        for data in data_of(b"".join(pieces)):
            if data == DONE:
                so_far.is_done = True
                continue
            said = parsed(data)
            if "error" in said:
                raise CannotContinue("error")
            note(so_far, said)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise CannotContinue("unreadable") from None
    return so_far


def _note_openai(so_far: Delivered, said: dict[str, Any]) -> None:
    so_far.names = so_far.names or {name: said[name] for name in ("id", "created", "model") if name in said}
    so_far.has_usage = so_far.has_usage or not said["choices"]
    for choice in said["choices"]:
        if choice["index"]:
            raise CannotContinue("several answers")
        _note_choice(so_far, choice)


def _note_choice(so_far: Delivered, choice: dict[str, Any]) -> None:
    if choice.get("logprobs"):
        raise CannotContinue("logprobs")
    delta = choice.get("delta")
    if delta is None:
        so_far.add(choice["text"])
    else:
        if delta.get("tool_calls"):
            raise CannotContinue("tools")
        if reasoning := delta.get("reasoning_content"):
            if so_far.text:
                raise CannotContinue("reasoning")  # begun anew, in a way that its parser hides
            so_far.reasoning += reasoning
        so_far.has_opened = so_far.has_opened or "role" in delta
        so_far.add(delta.get("content") or "")
    so_far.finish = choice.get("finish_reason") or so_far.finish


def _note_generate(so_far: Delivered, said: dict[str, Any]) -> None:
    meta = said["meta_info"]
    if said.get("index"):
        raise CannotContinue("several answers")
    so_far.names = {"id": meta["id"]}
    so_far.text = said["text"]
    so_far.output_ids = said["output_ids"]
    so_far.finish = meta["finish_reason"]
    so_far.prompt_tokens, so_far.completion_tokens = meta["prompt_tokens"], meta["completion_tokens"]
    if len(so_far.output_ids) != so_far.completion_tokens:
        raise CannotContinue("not cumulative")  # SGLang can be configured to stream only what is new


def _note_messages(so_far: Delivered, said: dict[str, Any]) -> None:
    match said["type"]:
        case "message_start":
            so_far.has_opened = True
            so_far.names = {name: said["message"][name] for name in ("id", "model")}
        case "content_block_start":
            kind = said["content_block"]["type"]
            if kind != "text":
                raise CannotContinue("reasoning" if "thinking" in kind else "tools")
            so_far.is_block_open = True
            so_far.blocks += 1
        case "content_block_delta":
            so_far.add(said["delta"]["text"])
        case "content_block_stop":
            so_far.is_block_open = False
        case "message_delta":
            so_far.finish = said["delta"]["stop_reason"]
        case "message_stop":
            so_far.is_done = True


_NOTES = {
    "/v1/chat/completions": _note_openai,
    "/v1/completions": _note_openai,
    "/generate": _note_generate,
    "/v1/messages": _note_messages,
}
# Paths whose answers are streamed in a format that can continue elsewhere.
CONTINUED = frozenset(_NOTES)
CUMULATIVE = frozenset(("/generate",))
