"""The player's folder, as SGLang loads models from: SmolLM2's tokenizer, a template of its own, and no weights."""

import json
import shutil
from pathlib import Path

# A model of this name gets the parsers of its family.
NAME = "Qwen3-Player"
CONTEXT = 131072
CONFIG = {
    "architectures": ["PlayerForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "hidden_size": 64,
    "head_dim": 64,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "max_position_embeddings": CONTEXT,
    "vocab_size": 49154,
    "dtype": "float32",
}
# SmolLM2 has no reasoning; a server's grammars begin at the token that ends it.
THINK = {"<think>": 49152, "</think>": 49153}
TEMPLATE = """\
{%- if tools %}<|im_start|>system
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
# It sees each prompt whole, and computes nothing that would need memory.
FLAGS = (
    "--load-format dummy --disable-radix-cache --chunked-prefill-size -1 --max-prefill-tokens 131072 "
    "--mem-fraction-static 0.5 --max-total-tokens 262144"
)


def make(smollm2: Path, parent: Path) -> Path:
    """Makes the folder NAME in `parent`, with the tokenizer of the folder `smollm2`."""
    folder = parent / NAME
    folder.mkdir(parents=True)
    shutil.copy(smollm2 / "tokenizer_config.json", folder)
    tokenizer = json.loads((smollm2 / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"] += [{"id": id, "content": text, **plain} for text, id in THINK.items()]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def environ(folder: Path) -> dict[str, str]:
    """Variables for `python -m replica --model FOLDER`."""
    return {
        "PLAYER_FOLDER": str(folder),
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "tests.clients.player",
        "SGLANG_ARGS": FLAGS,
    }
