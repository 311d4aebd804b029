"""replica/families.py: the parsers of each family, by name or config."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from replica.families import AUTO, FAMILIES, family_of, parsers


def known_to_sglang(module: str) -> set[str]:
    """The names in one of SGLang's lists of parsers, which import nothing."""
    found = importlib.util.find_spec("sglang")
    assert found is not None
    assert found.submodule_search_locations
    source = Path(found.submodule_search_locations[0], "srt", f"{module}.py").read_text()
    return set(re.findall(r'^    "([^"]+)",$', source, re.MULTILINE))


@pytest.mark.parametrize(
    ("model", "tools", "reasoning"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen", AUTO),
        ("/models/Qwen2.5-VL-7B-Instruct-AWQ/", "qwen", AUTO),
        ("Qwen/QwQ-32B", "qwen", "deepseek-r1"),
        ("Qwen/Qwen3-8B", "qwen", AUTO),
        ("Qwen/Qwen3-30B-A3B-Thinking-2507", "qwen", "qwen3-thinking"),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "qwen3_coder", AUTO),
        ("Qwen/Qwen3.5-9B", AUTO, AUTO),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3", AUTO),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3", AUTO),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "pythonic", AUTO),
        ("mistralai/Mistral-Small-3.2-24B-Instruct-2506", "mistral", AUTO),
        ("mistralai/Magistral-Small-2509", "mistral", "mistral"),
        ("deepseek-ai/DeepSeek-V3-0324", "deepseekv3", AUTO),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseekv3", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama3", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "qwen", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", "qwen", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-V3.1-Terminus", "deepseekv31", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-V3.2-Exp", "deepseekv31", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-V3.2", "deepseekv32", "deepseek-v3"),
        ("zai-org/GLM-4.6", "glm", "glm45"),
        ("zai-org/GLM-4.7-Flash", "glm47", "glm45"),
        ("openai/gpt-oss-20b", "gpt-oss", "gpt-oss"),
        ("moonshotai/Kimi-K2-Instruct-0905", "kimi_k2", AUTO),
        ("NousResearch/Hermes-3-Llama-3.1-8B", "hermes", AUTO),
        ("NousResearch/Hermes-2-Pro-Mistral-7B", "hermes", AUTO),
        ("meta-llama/Llama-2-7b-chat-hf", AUTO, AUTO),
        ("liuhaotian/llava-v1.6-vicuna-7b", AUTO, AUTO),
    ],
)
def test_parsers_by_name(model: str, tools: str, reasoning: str) -> None:
    assert parsers(family_of(model)) == (tools, reasoning)


@pytest.mark.parametrize(
    ("config", "tools"),
    [({"model_type": "qwen2"}, "qwen"), ({"model_type": "llama"}, AUTO), ({"model_type": ["x"]}, AUTO), ({}, AUTO)],
)
def test_parsers_by_config(config: dict[str, Any], tools: str) -> None:
    """A folder of any name is known by its config.json, and by its name first."""
    assert parsers(family_of("/models/ours", config))[0] == tools
    assert parsers(family_of("/models/hermes-3-ours", config))[0] == "hermes"


def test_sglang_has_all_of_these_parsers() -> None:
    tools, reasoning = (
        known_to_sglang(f"{name}_names") for name in ("function_call/parser", "parser/reasoning_parser")
    )
    assert len(tools) > 30
    assert {family.tools for family in FAMILIES} - {AUTO} <= tools
    assert {family.reasoning for family in FAMILIES} - {AUTO} <= reasoning
