"""Makes the second replica's events part of the first answer: its names, its counts, and no second opening."""

from typing import Any, Protocol

from balancer.relay.continuation.delivered import CannotContinue, Delivered
from balancer.relay.continuation.events import DONE, data_of, end_of_last, parsed, written, written_with_name
from balancer.relay.continuation.follow_up import FollowUp
from balancer.relay.continuation.stops import Seam

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Format(Protocol):
    """How the events of one format are continued."""

    def translated(self, said: dict[str, Any]) -> bytes: ...

    def ended(self) -> bytes:
        """What replaces the second answer's last event, [DONE]."""

    def cut(self) -> bytes | None:
        """All that follows a stop string found across the seam; None while there is none."""


class Translation:
    """Takes the second answer as it arrives and returns what the client gets of it.

    `is_over`: a stop string was found across the seam, and the client has all; the replica would not stop there.
    """

    def __init__(self, path: str, so_far: Delivered, follow: FollowUp) -> None:
        self._format: Format = _FORMATS[path](so_far, follow)
        self._unread = b""
        self.is_over = False

    def take(self, data: bytes) -> bytes:
        """Raises CannotContinue if the second answer cannot continue the first."""
        data = self._unread + data
        end = end_of_last(data)
        whole, self._unread = data[:end], data[end:]
        if not whole:
            return b""
        got: list[bytes] = []
        try:
            for event in data_of(whole):
                got.append(self._event(event))
                if (ending := self._format.cut()) is not None:
                    self.is_over = True
                    got.append(ending)
                    break
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise CannotContinue("unreadable") from None
        return b"".join(got)

    def _event(self, data: bytes) -> bytes:
        return self._format.ended() if data == DONE else self._format.translated(parsed(data))


class _OpenAI:
    """Chat and text completions."""

    def __init__(self, so_far: Delivered, follow: FollowUp) -> None:
        self._so_far = so_far
        self._follow = follow
        self._seam = Seam(follow.stops, so_far.text, follow.keeps_stop)
        self._is_finished = so_far.finish is not None
        self._usage_at_stop = b""  # the event with the usage, at a stop string across the seam

    def translated(self, said: dict[str, Any]) -> bytes:
        if "error" in said:
            return written(said)
        said |= self._so_far.names
        choices = said["choices"]
        goes_on = not choices or self._goes_on(choices[0])
        if usage := said.get("usage"):
            said["usage"] = _whole_usage(usage, self._follow)
            if choices and self._seam.is_stop():
                self._usage_at_stop = written(said | {"choices": []})
            if choices and not self._follow.tells_usage_often:
                said["usage"] = None  # only we asked for it
        return written(said) if goes_on else b""

    def ended(self) -> bytes:
        return b"data: [DONE]\n\n"

    def cut(self) -> bytes | None:
        if not self._seam.is_stop() or (self._follow.tells_usage and not self._usage_at_stop):
            return None
        return (self._usage_at_stop if self._follow.tells_usage else b"") + self.ended()

    def _goes_on(self, choice: dict[str, Any]) -> bool:
        """Makes the choice part of the first answer; False if none of it is for the client."""
        if self._is_finished:
            return False
        delta = choice.get("delta")
        if delta is not None and "role" in delta:
            if not self._so_far.has_opened:
                return True
            del delta["role"]
        if delta is not None and delta.get("reasoning_content") and self._so_far.text:
            raise CannotContinue("reasoning")
        holder, name = (choice, "text") if delta is None else (delta, "content")
        text = "" if self._follow.is_muted else self._seam.pass_on(holder.get(name) or "")
        finish = choice.get("finish_reason")
        if self._seam.is_stop():
            finish, choice["matched_stop"] = "stop", self._seam.matched
        elif finish is not None and self._follow.is_muted:
            finish, choice["matched_stop"] = _finish_of_muted(self._follow), None
        elif finish is not None:
            text += self._seam.rest()
        choice["finish_reason"] = finish
        self._is_finished = finish is not None
        if text or name == "text":
            holder[name] = text
        else:
            holder.pop(name, None)
        says_else = delta is not None and (delta.get("tool_calls") or delta.get("reasoning_content"))
        return bool(text or self._is_finished or says_else)


def _finish_of_muted(follow: FollowUp) -> str:
    return "length" if follow.most is not None and follow.tokens >= follow.most else "stop"


def _whole_usage(usage: dict[str, Any], follow: FollowUp) -> dict[str, Any]:
    """The tokens that the client already had were in the second replica's prompt, but belong to the answer."""
    prompt = usage["prompt_tokens"] - follow.tokens
    completion = follow.tokens + (0 if follow.is_muted else usage["completion_tokens"])
    whole = usage | {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    if follow.reasoning_tokens and "reasoning_tokens" in usage:
        whole["reasoning_tokens"] = follow.reasoning_tokens
        whole["completion_tokens_details"] = {"reasoning_tokens": follow.reasoning_tokens}
    details = usage.get("prompt_tokens_details")
    if details:
        whole["prompt_tokens_details"] = details | {"cached_tokens": min(details.get("cached_tokens", 0), prompt)}
    return whole


class _Generate:
    """SGLang's own format: each event contains the whole answer so far."""

    def __init__(self, so_far: Delivered, follow: FollowUp) -> None:
        self._so_far = so_far
        self._follow = follow
        self._seam = Seam(follow.stops, so_far.text, follow.keeps_stop)
        self._read = 0  # characters of the second answer read so far
        self._text = ""  # the second answer's text as the client gets it

    def translated(self, said: dict[str, Any]) -> bytes:
        if "error" in said:
            return written(said)
        so_far, meta = self._so_far, said["meta_info"]
        finish = meta["finish_reason"]
        if self._follow.is_muted:
            if finish is None:
                return b""
            finish = {"type": "length", "length": so_far.completion_tokens}
            said["output_ids"], meta["completion_tokens"] = [], 0
        else:
            self._text += self._seam.pass_on(said["text"][self._read :])
            self._read = len(said["text"])
        if self._seam.is_stop():
            finish = {"type": "stop", "matched": self._seam.matched}
        elif finish is not None:
            self._text += self._seam.rest()
        completion = so_far.completion_tokens + meta["completion_tokens"]
        if finish is not None and finish["type"] == "length":
            finish |= {"length": completion}
        said["text"] = so_far.text + self._text
        said["output_ids"] = so_far.output_ids + said["output_ids"]
        prompt = so_far.prompt_tokens or meta["prompt_tokens"]
        meta |= so_far.names
        meta |= {"finish_reason": finish, "prompt_tokens": prompt, "completion_tokens": completion}
        meta["cached_tokens"] = min(meta.get("cached_tokens", 0), prompt)
        return written(said)

    def ended(self) -> bytes:
        return b"data: [DONE]\n\n"

    def cut(self) -> bytes | None:
        return self.ended() if self._seam.is_stop() else None


class _Messages:
    """Anthropic's events, made from those of a chat completion."""

    def __init__(self, so_far: Delivered, follow: FollowUp) -> None:
        self._so_far = so_far
        self._follow = follow
        self._seam = Seam(follow.stops, so_far.text)
        self._finish = "stop"
        self._completion = follow.tokens
        self._is_open = so_far.is_block_open

    def translated(self, said: dict[str, Any]) -> bytes:
        if (error := said.get("error")) is not None:
            return written_with_name({"type": "error", "error": {"type": "api_error", "message": error["message"]}})
        if usage := said.get("usage"):
            self._completion = _whole_usage(usage, self._follow)["completion_tokens"]
        return b"".join([self._choice(choice) for choice in said["choices"]])

    def _choice(self, choice: dict[str, Any]) -> bytes:
        if choice["delta"].get("reasoning_content"):
            raise CannotContinue("reasoning")
        text = "" if self._follow.is_muted else self._seam.pass_on(choice["delta"].get("content") or "")
        if finish := choice.get("finish_reason"):
            self._finish = _finish_of_muted(self._follow) if self._follow.is_muted else finish
            text += self._seam.rest()
        return self._text(text) if text else b""

    def _text(self, text: str) -> bytes:
        index = max(self._so_far.blocks - self._so_far.is_block_open, 0)
        opening = b""
        if not self._is_open:
            self._is_open = True
            block = {"type": "text", "text": ""}
            opening = written_with_name({"type": "content_block_start", "index": index, "content_block": block})
        delta = {"type": "text_delta", "text": text}
        return opening + written_with_name({"type": "content_block_delta", "index": index, "delta": delta})

    def ended(self) -> bytes:
        index = max(self._so_far.blocks - self._so_far.is_block_open, 0)
        finish = "stop" if self._seam.is_stop() else self._finish
        delta = {"stop_reason": STOP_REASONS.get(finish, "end_turn")}
        usage = {"output_tokens": self._completion}
        return b"".join(
            (
                written_with_name({"type": "content_block_stop", "index": index}) if self._is_open else b"",
                written_with_name({"type": "message_delta", "delta": delta, "usage": usage}),
                written_with_name({"type": "message_stop"}),
            )
        )

    def cut(self) -> bytes | None:
        return self.ended() if self._seam.is_stop() else None


_FORMATS: dict[str, type[_OpenAI] | type[_Generate] | type[_Messages]] = {
    "/v1/chat/completions": _OpenAI,
    "/v1/completions": _OpenAI,
    "/generate": _Generate,
    "/v1/messages": _Messages,
}
