"""replica/weights.py: safetensors headers, and what is made of them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from replica.weights import WeighError, Weights, longest_context, weigh

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}


def model(folder: Path, config: dict[str, Any], **tensors: tuple[str, list[int]]) -> Path:
    """A folder with a header and no tensors behind it: nothing else is read."""
    header = {name: {"dtype": kind, "shape": shape, "data_offsets": [0, 0]} for name, (kind, shape) in tensors.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ([], 2 * (1000 * 100 + 1000) + 2 * 50 * 10 + 8),
        (["--dtype", "float32"], 2 * (1000 * 100 + 1000) + 4 * 50 * 10 + 8),
        (["--quantization=fp8"], 1000 * 100 + 2 * 1000 + 50 * 10 + 8),
    ],
)
def test_weigh(tmp_path: Path, flags: list[str], size: int) -> None:
    """Numbers count as SGLang holds them: wide ones halved, matrices quantised where it is told to."""
    found = model(
        tmp_path, LLAMA, a=("BF16", [1000, 100]), norm=("F16", [1000]), wide=("F32", [50, 10]), index=("I64", [1])
    )
    assert weigh(found, flags).size == size


@pytest.mark.parametrize(
    ("config", "flags", "kv"),
    [
        (LLAMA, [], 2 * 32 * 8 * 128 * 2),
        (LLAMA, ["--kv-cache-dtype", "fp8_e4m3"], 2 * 32 * 8 * 128),
        ({"text_config": {**LLAMA, "head_dim": 64}}, [], 2 * 32 * 8 * 64 * 2),
        ({**LLAMA, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, [], 32 * 576 * 2),
        ({}, [], 0),
        ({"num_hidden_layers": "many", "num_attention_heads": 0}, [], 0),
    ],
)
def test_kv_per_token(tmp_path: Path, config: dict[str, Any], flags: list[str], kv: int) -> None:
    """Bytes of KV cache a token, by the config; 0 where it does not say."""
    assert weigh(model(tmp_path, config, a=("BF16", [1])), flags) == Weights(2, kv)


LONG = {**LLAMA, "max_position_embeddings": 131072}


@pytest.mark.parametrize(
    ("config", "flags", "tokens"),
    [
        (LONG, [], 50_000),
        ({**LONG, "max_position_embeddings": 8192}, [], 0),
        ({**LONG, "layer_types": ["full_attention", "full_attention"]}, [], 50_000),
        ({**LONG, "layer_types": ["full_attention", "sliding_attention"]}, [], 0),
        ({**LONG, "sliding_window": 4096}, [], 0),
        ({**LONG, "mamba_d_state": 128}, [], 0),
        (LONG, ["--kv-cache-dtype", "fp8_e5m2"], 0),
        (LONG, ["--cpu-offload-gb=8"], 0),
        (LLAMA, [], 0),
    ],
)
def test_longest_context(tmp_path: Path, config: dict[str, Any], flags: list[str], tokens: int) -> None:
    """As many tokens as there is room for beside the weights, if all layers keep all; 0 for the model's own limit."""
    folder = model(tmp_path, config, a=("BF16", [1000, 1000]))
    memory = 2 * 1000 * 1000 + 50_000 * (2 * 32 * 8 * 128 * 2)
    assert longest_context(folder, flags, memory) == tokens
    assert longest_context(folder, flags, 1000) == 0, "weights that do not fit are SGLang's to tell"


@pytest.mark.parametrize("written", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"\x09" + b"\0" * 7 + b'{"a": {}}'])
def test_no_safetensors(tmp_path: Path, written: bytes) -> None:
    """What only looks like weights is told, and does no harm."""
    (tmp_path / "model.safetensors").write_bytes(written)
    with pytest.raises(WeighError, match="is no safetensors file"):
        weigh(tmp_path)


def test_weigh_command(tmp_path: Path) -> None:
    """`python -m replica --weigh` tells the same as JSON, and why it cannot."""

    def told(path: str) -> dict[str, Any]:
        flags = ("--weigh", "--model", path)
        done = subprocess.run([sys.executable, "-m", "replica", *flags], cwd=ROOT, capture_output=True, check=True)
        return dict(json.loads(done.stdout))

    assert told(str(model(tmp_path / "m", LLAMA, a=("BF16", [8])))) == {"weights": 16, "kv_per_token": 131072}
    nowhere = told("nobody/has-this")
    assert nowhere["weights"] is None
    assert "has no safetensors files" in nowhere["problem"]
