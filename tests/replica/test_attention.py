"""replica/plugin.py's attention hook against SGLang's own, on random tensors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: importing SGLang's backend has effects that do not go away. Prints, for each batch, the
# largest difference between the hook's output and the stock one's, and whether the stock one was called by the hook.
COMPARE = """
import json, sys
from replica import plugin
plugin.activate()
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

stock = TorchNativeAttnBackend._run_sdpa_forward_extend
backend = TorchNativeAttnBackend.__new__(TorchNativeAttnBackend)
called = []

def counted(*arguments):
    called.append(1)
    return stock(*arguments)

torch.manual_seed(0)
for lengths, heads, kv_heads, options in json.loads(sys.argv[1]):
    prefixes = torch.tensor([prefix for prefix, _ in lengths])
    new = torch.tensor([fresh for _, fresh in lengths])
    total = prefixes + new
    size, slots = 64, int(total.sum()) + 7
    order = torch.randperm(slots)
    pages = torch.zeros(len(lengths) + 2, int(total.max()), dtype=torch.int64)
    rows = torch.randperm(len(lengths) + 2)[: len(lengths)]
    start = 0
    for row, length in zip(rows.tolist(), total.tolist()):
        pages[row, :length] = order[start : start + length]
        start += length
    query = torch.randn(int(new.sum()), heads, size)
    keys, values = torch.randn(slots, kv_heads, size), torch.randn(slots, kv_heads, size)
    rest = (keys, values, pages, rows, total, prefixes, new)
    options = {"scaling": size**-0.5, "enable_gqa": heads != kv_heads, "causal": True, **options}
    theirs, ours = torch.full_like(query, 9.0), torch.full_like(query, 9.0)
    stock(backend, query, theirs, *rest, **options)
    called.clear()
    plugin.extend_new_rows(counted, backend, query, ours, *rest, **options)
    print(json.dumps([float((theirs - ours).abs().max()), len(called)]))
"""

BATCHES = {
    "a whole prompt": [[(0, 33)], 4, 4, {}],
    "new rows on a cached prefix": [[(40, 9)], 4, 4, {}],
    "one new row": [[(40, 1)], 4, 4, {}],
    "a single token": [[(0, 1)], 4, 4, {}],
    "several requests in one batch": [[(0, 17), (64, 1), (31, 12), (5, 40)], 4, 4, {}],
    "fewer heads for keys than for queries": [[(20, 7), (0, 11)], 9, 3, {}],
}
LEFT_ALONE = {
    "a sliding window": [[(20, 7)], 4, 4, {"sliding_window_size": 8}],
    "attention that is not causal": [[(0, 7)], 4, 4, {"causal": False}],
}


@pytest.fixture(scope="module")
def compared() -> dict[str, list[float]]:
    batches = {**BATCHES, **LEFT_ALONE}
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPARE, json.dumps(list(batches.values()))],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env={"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    lines = [line for line in answer.stdout.splitlines() if line.startswith("[")]
    return {name: json.loads(line) for name, line in zip(batches, lines, strict=True)}


@pytest.mark.parametrize("batch", BATCHES)
def test_the_hook_gives_the_stock_result(compared: dict[str, list[float]], batch: str) -> None:
    difference, stock_calls = compared[batch]
    assert difference < 1e-5
    assert stock_calls == 0


@pytest.mark.parametrize("batch", LEFT_ALONE)
def test_what_the_hook_does_not_know_is_left_to_the_stock_one(compared: dict[str, list[float]], batch: str) -> None:
    difference, stock_calls = compared[batch]
    assert difference == 0
    assert stock_calls == 1
