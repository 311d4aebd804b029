"""What official SDKs of Python and those built on them do with an endpoint: one JSON line a check.

Runs in the environment of tests/clients/pins/python.txt, knowing nothing of this project: `python sdks.py URL MODEL`.
"""

import json
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import anthropic
import ollama
import openai
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

URL, MODEL = sys.argv[1:3]
E = TypeVar("E", bound=Exception)
ASKED = "Name the capital of France."
WEATHER = {
    "name": "weather",
    "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
FUNCTION = {"type": "function", "function": WEATHER}
CALLED = {"city": "Paris"}
CHECKS: dict[str, dict[str, Callable[[], object]]] = {}

one = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
two = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
three = ollama.Client(host=URL)
four = ChatOpenAI(base_url=f"{URL}/v1", api_key="none", model=MODEL, max_retries=0)


class City(BaseModel):
    """A city."""

    city: str


def check(suite: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    def add(test: Callable[[], object]) -> Callable[[], object]:
        CHECKS.setdefault(suite, {})[test.__name__] = test
        return test

    return add


def user(text: str = ASKED) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def refusal(kind: type[E], ask: Callable[[], object]) -> E:
    try:
        ask()
    except kind as error:
        return error
    raise AssertionError("it was not refused")


def text_of(message: anthropic.types.Message) -> str:
    (text,) = (block.text for block in message.content if block.type == "text")
    return text


def is_there(text: object) -> None:
    assert isinstance(text, str), text
    assert "Paris" in text, text


@check("openai (Python)")
def models() -> None:
    assert MODEL in [model.id for model in one.models.list()]


@check("openai (Python)")
def chat() -> None:
    said = one.chat.completions.create(model=MODEL, messages=user())
    is_there(said.choices[0].message.content)
    assert said.usage.completion_tokens > 0


@check("openai (Python)")
def chat_stream() -> None:
    asked = {"model": MODEL, "messages": user(), "stream_options": {"include_usage": True}}
    chunks = list(one.chat.completions.create(stream=True, **asked))
    is_there("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))
    assert chunks[-1].usage.completion_tokens > 0


@check("openai (Python)")
def chat_tool_call() -> None:
    said = one.chat.completions.create(model=MODEL, messages=user(), tools=[FUNCTION])
    (call,) = said.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", CALLED)
    assert said.choices[0].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    after = [*user(), said.choices[0].message.to_dict(), result]
    said = one.chat.completions.create(model=MODEL, messages=after, tools=[FUNCTION])
    assert "sunny" in said.choices[0].message.content


@check("openai (Python)")
def chat_tool_call_stream() -> None:
    chunks = one.chat.completions.create(model=MODEL, messages=user(), tools=[FUNCTION], stream=True)
    pieces = [piece for chunk in chunks for choice in chunk.choices for piece in choice.delta.tool_calls or []]
    assert [piece.function.name for piece in pieces if piece.function.name] == ["weather"]
    assert json.loads("".join(piece.function.arguments or "" for piece in pieces)) == CALLED


@check("openai (Python)")
def chat_reasoning() -> None:
    said = one.chat.completions.create(model=MODEL, messages=user("SAY <think>\nhm\n</think>\n\nParis END"))
    assert said.choices[0].message.reasoning_content.strip() == "hm"
    is_there(said.choices[0].message.content)


@check("openai (Python)")
def completion() -> None:
    is_there(one.completions.create(model=MODEL, prompt=ASKED, max_tokens=20).choices[0].text)


@check("openai (Python)")
def responses() -> None:
    is_there(one.responses.create(model=MODEL, input=ASKED).output_text)


@check("openai (Python)")
def responses_stream() -> None:
    with one.responses.stream(model=MODEL, input=ASKED) as stream:
        kinds = [event.type for event in stream]
        is_there(stream.get_final_response().output_text)
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")


@check("openai (Python)")
def responses_tool_call() -> None:
    said = one.responses.create(model=MODEL, input=ASKED, tools=[{"type": "function", **WEATHER}])
    (call,) = (item for item in said.output if item.type == "function_call")
    assert (call.name, json.loads(call.arguments)) == ("weather", CALLED)


@check("openai (Python)")
def no_such_model() -> None:
    assert refusal(openai.NotFoundError, lambda: one.models.retrieve("no-such-model")).request_id


@check("openai (Python)")
def nothing_is_kept() -> None:
    for ask in (one.files.list, one.batches.list, lambda: one.conversations.retrieve("conv_1")):
        assert refusal(openai.NotFoundError, ask).code == "not_found"


@check("anthropic (Python)")
def message() -> None:
    said = two.messages.create(model=MODEL, max_tokens=50, messages=user())
    is_there(text_of(said))
    assert said._request_id
    assert said.usage.output_tokens > 0


@check("anthropic (Python)")
def message_stream() -> None:
    with two.messages.stream(model=MODEL, max_tokens=50, messages=user()) as stream:
        is_there("".join(stream.text_stream))
        assert stream.get_final_message().stop_reason == "end_turn"


@check("anthropic (Python)")
def message_tool_call() -> None:
    tools = [{"name": "weather", "description": "weather", "input_schema": WEATHER["parameters"]}]
    said = two.messages.create(model=MODEL, max_tokens=90, messages=user(), tools=tools)
    (call,) = (block for block in said.content if block.type == "tool_use")
    assert (call.name, call.input, said.stop_reason) == ("weather", CALLED, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    after = [
        *user(),
        {"role": "assistant", "content": said.to_dict()["content"]},
        {"role": "user", "content": [result]},
    ]
    said = two.messages.create(model=MODEL, max_tokens=90, messages=after, tools=tools)
    assert "sunny" in text_of(said)


@check("anthropic (Python)")
def message_tool_call_stream() -> None:
    tools = [{"name": "weather", "description": "weather", "input_schema": WEATHER["parameters"]}]
    with two.messages.stream(model=MODEL, max_tokens=90, messages=user(), tools=tools) as stream:
        said = stream.get_final_message()
    (call,) = (block for block in said.content if block.type == "tool_use")
    assert (call.name, call.input) == ("weather", CALLED)


@check("anthropic (Python)")
def message_thinking() -> None:
    thinks = user("SAY <think>\nhm\n</think>\n\nParis END")
    thinking = {"type": "enabled", "budget_tokens": 1024}
    said = two.messages.create(model=MODEL, max_tokens=2000, messages=thinks, thinking=thinking)
    assert [block.type for block in said.content] == ["thinking", "text"]


@check("anthropic (Python)")
def count_tokens() -> None:
    assert two.messages.count_tokens(model=MODEL, messages=user()).input_tokens > 5


@check("anthropic (Python)")
def mistake() -> None:
    asked = {"model": MODEL, "max_tokens": -1, "messages": user()}
    error = refusal(anthropic.BadRequestError, lambda: two.messages.create(**asked))
    assert error.body["error"]["type"] == "invalid_request_error"
    assert error.request_id


@check("LangChain")
def invoke() -> None:
    is_there(four.invoke(ASKED).content)


@check("LangChain")
def stream() -> None:
    is_there("".join(str(chunk.content) for chunk in four.stream(ASKED)))


@check("LangChain")
def bind_tools() -> None:
    @tool
    def weather(city: str) -> str:
        """The weather of a city."""
        return city

    (call,) = four.bind_tools([weather]).invoke(ASKED).tool_calls
    assert (call["name"], call["args"]) == ("weather", CALLED)


@check("LangChain")
def structured_output() -> None:
    assert four.with_structured_output(City, method="function_calling").invoke(ASKED) == City(city="Paris")


@check("LangChain")
def responses_api() -> None:
    using = ChatOpenAI(base_url=f"{URL}/v1", api_key="none", model=MODEL, max_retries=0, use_responses_api=True)
    is_there(using.invoke(ASKED).text)


@check("ollama (Python)")
def ollama_models() -> None:
    assert any(model.model.startswith(MODEL) for model in three.list().models)


@check("ollama (Python)")
def ollama_chat() -> None:
    is_there(three.chat(MODEL, messages=user()).message.content)


@check("ollama (Python)")
def ollama_chat_stream() -> None:
    parts = list(three.chat(MODEL, messages=user(), stream=True))
    is_there("".join(part.message.content or "" for part in parts))
    assert parts[-1].done


@check("ollama (Python)")
def ollama_generate() -> None:
    is_there(three.generate(MODEL, prompt=ASKED).response)


@check("ollama (Python)")
def ollama_show() -> None:
    assert three.show(MODEL).modelinfo is not None


for suite, checks in CHECKS.items():
    for name, test in checks.items():
        problem = ""
        try:
            test()
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__}: {str(error) or where.line}"[:400]
        print(json.dumps({"suite": suite, "check": name, "problem": problem}), flush=True)
