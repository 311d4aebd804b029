"""Answers of reasoning models: the text that the model wrote, from the two parts in which the client got it.

SGLang's reasoning parsers cut the model's text in two at a tag and drop the tags. A replica that continues a chat puts
the text so far right behind the prompt, and its parser looks for the closing tag in it: it needs that text as it was.
"""

from dataclasses import dataclass

_THINK = ("<think>", "</think>")
# The tags of those of SGLang's parsers that drop nothing else; others rewrite the text, which cannot be undone.
_TAGS = {
    **dict.fromkeys(
        (
            *("deepseek-r1", "deepseek-v3", "deepseek-v4", "deepseek-v41", "dots", "gigachat35", "glm45", "hunyuan"),
            *("interns1", "iquest_q1", "kimi_k2", "ling3", "mimo", "minimax", "nanbeige", "nemotron_3", "poolside_v1"),
            *("qwen3", "qwen3-thinking", "step3", "step3p5"),
        ),
        _THINK,
    ),
    "k2_horizon": ("<ifm|think>", "</ifm|think>"),
    "kimi": ("◁think▷", "◁/think▷"),
    "mistral": ("[THINK]", "[/THINK]"),
}


@dataclass(frozen=True, slots=True)
class Tags:
    """What begins and ends a model's reasoning."""

    start: str
    end: str


def tags_of(parser: str | None) -> Tags | None:
    """The tags of a replica's reasoning parser; None if the model's text cannot be restored."""
    tags = _TAGS.get(parser or "")
    return Tags(*tags) if tags else None


def is_opened(prompt: list[int], tag: list[int]) -> bool | None:
    """Does the prompt end with the opening tag, perhaps with a line end behind it? Then the model does not write it.

    Both are token ids. None if that cannot be told, because the tag is not a token of its own.
    """
    return tag[0] in prompt[-3:] if len(tag) == 1 else None
