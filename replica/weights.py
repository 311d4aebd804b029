"""The GPU memory that a model's weights take, and a token of KV cache: from the files' headers, without loading them.

A safetensors file begins with the length of its header in eight bytes, followed by the header: JSON with the type and
the shape of each tensor. https://huggingface.co/docs/safetensors describes it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LONGEST_HEADER = 100 << 20  # bytes; safetensors' own limit
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_WIDE = {"F64", "F32"}
_HALF = {"F16", "BF16"}
# Of a model with layers that keep a state instead of keys and values, or only some of these.
_PARTIAL = {"mamba_d_state", "ssm_state_size", "linear_num_key_heads", "linear_attn_config", "layers_block_type"}
_PARTIAL |= {"hybrid_override_pattern", "attn_type_list", "index_topk", "attention_chunk_size"}
# Flags by which what is kept takes another place, or another size, than the files say.
_ELSEWHERE = {"--cpu-offload-gb", "--kv-cache-dtype", "--quantization", "--load-format", "--nnodes"}
# Quantisations that SGLang applies while it loads, and the bytes that each number of a matrix then takes.
_QUANTISED = {"fp8": 1, "w8a8_fp8": 1, "w8a8_int8": 1, "mxfp8": 1}


class WeighError(Exception):
    """The size of a model's weights cannot be found out; the message says why."""


@dataclass(frozen=True)
class Weights:
    """size: bytes in total; kv: bytes of KV cache per token, 0 if the config does not say."""

    size: int
    kv: int


def weigh(folder: Path, flags: Sequence[str] = ()) -> Weights:
    """The memory that SGLang with these flags takes for the model in `folder`. Raises WeighError."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeighError(f"{folder} has no safetensors files, whose headers say how large the weights are")
    given = _given(flags)
    config = config_of(folder)
    keeps_wide = given.get("--dtype") in ("float32", "float")
    quantised = None if "quantization_config" in config else _QUANTISED.get(given.get("--quantization", ""))
    size = sum(
        math.prod(shape) * _held(kind, len(shape), keeps_wide, quantised)
        for file in files
        for kind, shape in tensors(file)
    )
    each = 1 if "fp8" in given.get("--kv-cache-dtype", "") else 4 if keeps_wide else 2
    return Weights(math.ceil(size), each * _numbers_a_token(config))


def longest_context(folder: Path, flags: Sequence[str], memory: int) -> int:
    """The tokens for which there is room at the most, if that is fewer than the model's own limit; else 0.

    memory: bytes of all GPUs. 0 too where that cannot be told: some layers keep only part of a conversation, or weights
    lie elsewhere.
    """
    config = config_of(folder)
    nested = config.get("text_config")
    of = {**config, **nested} if isinstance(nested, dict) else config
    kinds = of.get("layer_types")
    keeps_all = set(kinds) == {"full_attention"} if isinstance(kinds, list) else not of.get("sliding_window")
    own = of.get("max_position_embeddings")
    if not keeps_all or _PARTIAL & of.keys() or not isinstance(own, int) or _ELSEWHERE & _given(flags).keys():
        return 0
    try:
        weights = weigh(folder, flags)
    except WeighError:
        return 0
    room = (memory - weights.size) // weights.kv if weights.kv else 0
    return room if 0 < room < own else 0


def tensors(file: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor in a safetensors file. Raises WeighError."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 0 < length <= _LONGEST_HEADER:
                raise WeighError(f"{file} is no safetensors file")
            header = json.loads(opened.read(length))
        return [
            (str(said["dtype"]), tuple(int(size) for size in said["shape"]))
            for name, said in header.items()
            if name != "__metadata__"
        ]
    except OSError as error:
        raise WeighError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WeighError(f"{file} is no safetensors file") from None


def _held(kind: str, dimensions: int, keeps_wide: bool, quantised: int | None) -> float:
    """Bytes that one number takes once loaded: wide types take 2 unless --dtype is float32; quantised ones less."""
    stored = _BYTES.get(kind, 1)
    if kind in _WIDE and not keeps_wide:
        stored = 2
    if quantised and dimensions >= 2 and (kind in _HALF or kind in _WIDE):
        return quantised
    return stored


def _numbers_a_token(config: Mapping[str, Any]) -> int:
    """Numbers in the KV cache per token, over all layers; 0 if the config does not say."""
    text = config.get("text_config")
    of = {**config, **text} if isinstance(text, dict) else config
    try:
        layers, heads = int(of["num_hidden_layers"]), int(of["num_attention_heads"])
        if rank := of.get("kv_lora_rank"):
            return layers * (int(rank) + int(of["qk_rope_head_dim"]))
        head = int(of.get("head_dim") or int(of["hidden_size"]) // heads)
        return 2 * layers * int(of.get("num_key_value_heads") or heads) * head
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return 0


def config_of(folder: Path) -> dict[str, Any]:
    """The model's config.json; empty if it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _given(flags: Sequence[str]) -> dict[str, str]:
    """The flags and their values; if one is repeated, its last value."""
    found = {}
    for at, flag in enumerate(flags):
        name, has_value, value = flag.partition("=")
        found[name] = value if has_value else "".join(flags[at + 1 : at + 2])
    return found
