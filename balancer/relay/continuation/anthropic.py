"""Translates a request for /v1/messages into one for /v1/chat/completions, the way SGLang itself does.

SGLang's /v1/messages turns a final assistant message into a user message, so an answer cannot continue there.
"""

from typing import Any

from balancer.relay.continuation.delivered import CannotContinue

SAMPLING = ("model", "max_tokens", "temperature", "top_p", "top_k")
# Fields that change the answer in ways that only SGLang's own translation knows.
ITS_OWN = {"thinking": "reasoning", "output_config": "guided output"}


def as_chat(request: dict[str, Any]) -> dict[str, Any]:
    """Raises CannotContinue for a request with thinking, guided output, tool calls or documents."""
    for name, reason in ITS_OWN.items():
        if request.get(name):
            raise CannotContinue(reason)
    messages = [_message(message) for message in request["messages"]]
    if system := _system(request.get("system")):
        messages.insert(0, {"role": "system", "content": system})
    chat = {name: request[name] for name in SAMPLING if request.get(name) is not None}
    if (stops := request.get("stop_sequences")) is not None:
        chat["stop"] = stops
    # The same options as in SGLang's own translation.
    usage = {"include_usage": True, "continuous_usage_stats": True}
    return chat | {"messages": messages, "stream": True, "stream_options": usage}


def _system(said: Any) -> str:
    if isinstance(said, str):
        return said if said.strip() else ""
    return "\n".join(block["text"] for block in said or () if block["type"] == "text" and block["text"])


def _message(message: dict[str, Any]) -> dict[str, Any]:
    role, content = message["role"], message["content"]
    if role not in ("user", "assistant"):
        raise CannotContinue("format")
    if isinstance(content, str):
        return {"role": role, "content": content}
    parts = [_part(block) for block in content]
    if len(parts) == 1 and parts[0]["type"] == "text":
        return {"role": role, "content": parts[0]["text"]}
    return {"role": role, "content": parts or ""}


def _part(block: dict[str, Any]) -> dict[str, Any]:
    match block["type"]:
        case "text":
            return {"type": "text", "text": block["text"]}
        case "image":
            return {"type": "image_url", "image_url": {"url": _url(block["source"])}}
        case "tool_use" | "tool_result":
            raise CannotContinue("tools")
        case _:
            raise CannotContinue("format")


def _url(source: dict[str, Any]) -> str:
    if source["type"] == "base64":
        return f"data:{source.get('media_type', 'image/png')};base64,{source['data']}"
    return str(source["url"])
