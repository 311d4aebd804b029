"""Which parsers for tool calls and reasoning fit a model, by its family; pure.

SGLang 0.5.23 detects a parser by the chat template, which says enough for models that reason and too little for others:
it finds none for Qwen2.5, Llama 3 and 4, Hermes or Mistral's that do not reason, and takes DeepSeek V3 and R1 for V3.1.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AUTO = "auto"  # SGLang detects it by the chat template


@dataclass(frozen=True)
class Family:
    """name: what the last part of a model's id or folder has in it, lower case; kinds: `model_type` in config.json."""

    title: str
    name: str
    tools: str
    reasoning: str = AUTO
    kinds: tuple[str, ...] = ()


# The first that fits, by name, else by kind: so what is made of another family's model comes before that family.
FAMILIES = (
    Family("Hermes", r"hermes-?\d", "hermes"),
    Family("Qwen3-Coder", r"qwen3-?coder", "qwen3_coder"),
    # Distilled models think as R1 does, and are Qwen's or Llama's otherwise.
    Family("DeepSeek-R1 in Qwen", r"(?=.*deepseek-r1).*qwen", "qwen", "deepseek-r1"),
    Family("DeepSeek-R1 in Llama", r"(?=.*deepseek-r1).*llama", "llama3", "deepseek-r1"),
    Family("DeepSeek-R1", r"deepseek-r1", "deepseekv3", "deepseek-r1"),
    Family("DeepSeek-V3.1", r"deepseek-v3\.1", "deepseekv31", "deepseek-v3"),
    Family("DeepSeek-V3.2-Exp", r"deepseek-v3\.2-exp", "deepseekv31", "deepseek-v3"),
    Family("DeepSeek-V3.2", r"deepseek-v3\.2", "deepseekv32", "deepseek-v3"),
    Family("DeepSeek-V3", r"deepseek-v3(?!\.)", "deepseekv3"),
    Family("QwQ", r"qwq", "qwen", "deepseek-r1"),
    Family("Qwen3 that always thinks", r"qwen3-.*thinking", "qwen", "qwen3-thinking"),
    Family("Qwen3", r"qwen3(?!\.)", "qwen", kinds=("qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe")),
    Family("Qwen2", r"qwen2", "qwen", kinds=("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl")),
    Family("Llama 4", r"llama-?4", "pythonic", kinds=("llama4", "llama4_text")),
    Family("Llama 3", r"llama-?3", "llama3"),
    Family("Magistral", r"magistral", "mistral", "mistral"),
    Family("Mistral", r"mistral|mixtral|ministral|devstral", "mistral", kinds=("mistral", "mistral3", "mixtral")),
    Family("GLM-4.7", r"glm-4\.7", "glm47", "glm45"),
    Family("GLM-4.5", r"glm-4\.[56]", "glm", "glm45", kinds=("glm4_moe",)),
    Family("gpt-oss", r"gpt-oss", "gpt-oss", "gpt-oss", kinds=("gpt_oss",)),
    Family("Kimi K3", r"kimi-k3", "kimi_k3", "kimi_k3", kinds=("kimi_k3",)),
    Family("Kimi K2", r"kimi-k2", "kimi_k2", kinds=("kimi_k2",)),
)


def family_of(model: str, config: Mapping[str, Any] | None = None) -> Family | None:
    """The family of a model, by its id or folder, else by its config.json where that is known."""
    name = model.rstrip("/").rpartition("/")[2].lower()
    for family in FAMILIES:
        if re.search(family.name, name):
            return family
    kind = (config or {}).get("model_type")
    for family in FAMILIES:
        if kind in family.kinds:
            return family
    return None


def parsers(family: Family | None) -> tuple[str, str]:
    """The values of SGLang's --tool-call-parser and --reasoning-parser."""
    return (family.tools, family.reasoning) if family else (AUTO, AUTO)
