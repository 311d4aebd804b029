"""What the player says to a prompt; pure."""

import json
import re
from typing import Any

# As the chat template in folder.py writes them.
TOOLS, END_OF_TOOLS, RESULT = "<tools>\n", "\n</tools>", "<|im_start|>tool\n"
# A program that offers more tools than this is an agent, which is told in its prompt what to have called.
FEW = 3
_WANTED = re.compile(r"CALL (\S+) (\{.*?\}) END", re.DOTALL)
_SAY = re.compile(r"SAY (.*?) END", re.DOTALL)
TURN = "<|im_start|>assistant\n"
THOUGHTS = "<think>\nThis is a play.\n</think>"
ANSWER = "The capital of France is Paris."


def part(prompt: str) -> str:
    """The text that comes after this prompt, thoughts first where the template leaves room for them."""
    said = _part(prompt)
    if not prompt.endswith(TURN) or said.startswith("<think>"):
        return said
    return THOUGHTS + ("" if said.startswith("<tool_call>") else "\n\n") + said


def _part(prompt: str) -> str:
    """What is said.

    `CALL name {arguments} END` in a prompt calls that tool if it is offered, and is answered with its result when that
    has come; `SAY text END` is answered with the text. Where few tools are offered and nothing is said of them, the
    first is called, with arguments made up from its schema.
    """
    told, _, result = prompt.rpartition(RESULT)
    if told:
        return f"The tool said: {result.partition('<|im_end|>')[0].strip()[:400]}"
    tools = _tools(prompt)
    wanted = _WANTED.findall(prompt)
    for name, arguments in reversed(wanted):
        if name in tools:
            return _call(name, json.loads(arguments.replace('\\"', '"')))  # some agents quote what they are told
    if tools and len(tools) <= FEW and not wanted:
        name, parameters = next(iter(tools.items()))
        return _call(name, made_up(parameters))
    said = _SAY.findall(prompt)
    return said[-1] if said else ANSWER


def made_up(schema: dict[str, Any]) -> Any:
    """A value that fits a JSON schema of the plain kind that tools have."""
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            required = schema.get("required", list(schema.get("properties", {})))
            return {name: made_up(schema["properties"][name]) for name in required}
        case "array":
            return [made_up(schema.get("items", {}))]
        case "integer" | "number":
            return 7
        case "boolean":
            return True
        case _:
            return "Paris"


def _tools(prompt: str) -> dict[str, dict[str, Any]]:
    """The parameters of each tool that is offered."""
    _, found, rest = prompt.partition(TOOLS)
    if not found:
        return {}
    offered = [json.loads(line) for line in rest.partition(END_OF_TOOLS)[0].split("\n")]
    functions = [one.get("function", one) for one in offered]
    return {one["name"]: one.get("parameters") or {} for one in functions}


def _call(name: str, arguments: Any) -> str:
    # Spaced as SGLang's grammar for a call that is required has it.
    return f'<tool_call>\n{{"name":"{name}", "arguments":{json.dumps(arguments)}}}\n</tool_call>'
