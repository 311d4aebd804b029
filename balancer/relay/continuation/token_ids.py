"""Continues by token ids an answer whose tokens are not those that the tokenizer makes of its text.

A model now and then makes "hallow" and "ness" where its tokenizer would read "hall" and "owness". Each event of a
stream ends where a token ends, which tells them apart; those of /generate have the ids.
"""

from typing import Any

from balancer.relay.continuation.anthropic import as_chat

MOST_PIECES = 2_000  # different ones of an answer, each some 20 µs of work for the replica's tokenizer
MOST_BYTES = 4  # of a character; a token may be one of them
# What a chat's prompt is made from.
_RENDERED = ("messages", "tools", "tool_choice", "reasoning_effort", "chat_template_kwargs", "continue_final_message")


def different(pieces: list[str]) -> list[str]:
    """Each piece once; none if there are too many to ask for."""
    found = list(dict.fromkeys(pieces))
    return found if len(found) <= MOST_PIECES else []


def ids_of(pieces: list[str], known: dict[str, list[int]]) -> list[int]:
    """The ids of pieces that each begin and end with a token, by what each is made of; none if that is not known."""
    return [id for piece in pieces for id in known[piece]] if known else []


def beginnings(made: list[int]) -> list[list[int]]:
    """The tokens, and without the last ones, which may be a part of a character and not have become text yet."""
    return [made[: len(made) - short] for short in range(min(MOST_BYTES, len(made)))]


def prompt_of(path: str, request: dict[str, Any]) -> dict[str, Any] | None:
    """What /tokenize is asked for the ids of the prompt; None if there is more to it than ids can say."""
    match path:
        case "/generate":
            return None if request.get("image_data") else {"prompt": request["text"]}
        case "/v1/completions":
            return {"prompt": request["prompt"]}
        case _:
            chat = as_chat(request) if path == "/v1/messages" else request
            contents = [message.get("content") for message in chat["messages"]]
            if any(part["type"] != "text" for content in contents if isinstance(content, list) for part in content):
                return None
            return {name: chat[name] for name in _RENDERED if name in chat}


def with_ids(path: str, request: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    """The request with these ids as its prompt; one for /v1/messages as a chat."""
    match path:
        case "/generate":
            return {name: value for name, value in request.items() if name != "text"} | {"input_ids": ids}
        case "/v1/completions":
            return request | {"prompt": ids}
        case "/v1/messages":
            return as_chat(request) | {"input_ids": ids}
        case _:
            return request | {"input_ids": ids}
