"""What the player of make client-test says to a prompt, as its own chat template writes it."""

import json
from typing import Any

import jinja2
import pytest

from tests.clients.player.folder import TEMPLATE
from tests.clients.player.part import ANSWER, THOUGHTS, made_up, part

ASKED = {"role": "user", "content": "Name the capital of France."}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def prompt(*messages: dict[str, Any], tools: tuple[str, ...] = (), **more: Any) -> str:
    offered = [{"type": "function", "function": {"name": name, "parameters": CITY}} for name in tools]
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)
    return template.render(messages=messages, tools=offered, add_generation_prompt=True, **more)


def call(name: str, **arguments: Any) -> str:
    return f'<tool_call>\n{{"name":"{name}", "arguments":{json.dumps(arguments)}}}\n</tool_call>'


def test_a_question_is_answered_after_wanted_thoughts() -> None:
    assert part(prompt(ASKED)) == f"{THOUGHTS}\n\n{ANSWER}"
    assert part(prompt(ASKED, enable_thinking=False)) == ANSWER
    assert part("a text without a chat") == ANSWER


def test_one_tool_is_called_and_its_result_told() -> None:
    assert part(prompt(ASKED, tools=("weather",))) == THOUGHTS + call("weather", city="Paris")
    calls = [{"function": {"name": "weather", "arguments": {"city": "Paris"}}}]
    after = [ASKED, {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "sunny"}]
    assert part(prompt(*after, tools=("weather",))).endswith("The tool said: sunny")


@pytest.mark.parametrize("quoted", ['CALL b {"city": "Rome"} END', '"CALL b {\\"city\\": \\"Rome\\"} END"'])
def test_of_many_tools_the_one_that_is_named(quoted: str) -> None:
    asked = {"role": "user", "content": f"Please: {quoted}"}
    assert part(prompt(asked, tools=("a", "b", "c", "d"))) == THOUGHTS + call("b", city="Rome")
    assert part(prompt(asked, tools=("a", "c"))).endswith(ANSWER), "a request beside it, without that tool"
    assert part(prompt(ASKED, tools=("a", "b", "c", "d"))).endswith(ANSWER)


def test_what_it_is_told_to_say() -> None:
    told = {"role": "user", "content": "SAY <think>\nhm\n</think>\n\nParis END"}
    assert part(prompt(told)) == "<think>\nhm\n</think>\n\nParis"


def test_arguments_that_fit_a_schema() -> None:
    schema = {
        "type": "object",
        "properties": {
            "unit": {"enum": ["C", "F"]},
            "days": {"type": "integer"},
            "hourly": {"type": "boolean"},
            "cities": {"type": "array", "items": {"type": "string"}},
        },
    }
    assert made_up(schema) == {"unit": "C", "days": 7, "hourly": True, "cities": ["Paris"]}
    assert made_up({**schema, "required": []}) == {}
