"""replica/plugin.py: the drain on a stand-in for SGLang's tokenizer manager, keys, and the stand-in for sgl_kernel.

tests/e2e/test_drain.py holds the drain to the real one.
"""

import argparse
import asyncio
import enum
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from balancer.spec.schema import Operation
from replica.gpu import Gpu
from replica.lease import holder
from replica.options import OptionsError
from replica.plugin import DRAIN_GRACE, _broken_import, drain, encode_as_projected, fill_in_key, mask_keys


class Status(enum.Enum):
    Up = "Up"
    Starting = "Starting"
    UnHealthy = "UnHealthy"


@dataclass
class Manager:
    """What the drain sees of a TokenizerManager."""

    server_status: Status = Status.Up
    gracefully_exit: bool = False
    rid_to_state: dict[str, object] = field(default_factory=dict)
    last_receive_tstamp: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    ended_with: list[tuple[Status, int]] = field(default_factory=list)

    async def stock(self, _: object) -> None:
        self.ended_with.append((self.server_status, len(self.rid_to_state)))
        self.ended.set()


def drained(manager: Manager, grace: float = 0.0, hung: float = 60.0) -> "asyncio.Task[None]":
    return asyncio.create_task(drain(manager.stock, manager, grace=grace, hung=hung))


def test_nothing_ends_before_sigterm() -> None:
    async def run() -> None:
        manager = Manager()
        task = drained(manager)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(manager.ended.wait(), 0.5)
        manager.gracefully_exit = True
        await asyncio.wait_for(task, 5)
        assert manager.ended_with == [(Status.Up, 0)]

    asyncio.run(run())


def test_an_idle_server_serves_on_for_the_grace() -> None:
    async def run() -> None:
        manager = Manager(gracefully_exit=True)
        began = time.monotonic()
        await asyncio.wait_for(drained(manager, grace=0.7), 5)
        assert time.monotonic() - began >= 0.7
        assert manager.ended_with == [(Status.Up, 0)]

    asyncio.run(run())


def test_a_request_that_comes_during_the_grace_is_finished() -> None:
    async def run() -> None:
        manager = Manager(gracefully_exit=True)
        task = drained(manager, grace=0.3)
        manager.rid_to_state["late"] = object()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(manager.ended.wait(), 1.0)
        del manager.rid_to_state["late"]
        await asyncio.wait_for(task, 5)
        assert manager.ended_with == [(Status.Up, 0)]

    asyncio.run(run())


def test_a_failed_health_check_does_not_cut_what_still_runs() -> None:
    async def run() -> None:
        manager = Manager(Status.UnHealthy, gracefully_exit=True, rid_to_state={"one": object()})
        task = drained(manager)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(manager.ended.wait(), 1.0)
        manager.rid_to_state.clear()
        await asyncio.wait_for(task, 5)
        # Up, or the stock watchdog would dump its requests and call it a forced exit.
        assert manager.ended_with == [(Status.Up, 0)]

    asyncio.run(run())


def test_unhealthy_server_is_given_up() -> None:
    """An unhealthy server that has produced no token for long is given up."""

    async def run() -> None:
        manager = Manager(Status.UnHealthy, gracefully_exit=True, rid_to_state={"stuck": object()})
        manager.last_receive_tstamp = time.time() - 1000
        await asyncio.wait_for(drained(manager, hung=0.5), 5)
        assert manager.ended_with == [(Status.UnHealthy, 1)]

    asyncio.run(run())


def test_a_server_that_never_served_ends_at_once() -> None:
    async def run() -> None:
        manager = Manager(Status.Starting, gracefully_exit=True)
        await asyncio.wait_for(drained(manager, grace=3600), 5)
        assert manager.ended_with == [(Status.Starting, 0)]

    asyncio.run(run())


def test_a_key_is_read_from_its_file_into_the_arguments_only(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sk-1\n")
    argv = ["launch_server.py", "--api-key", f"@file:{file}", "--chat-template", f"@file:{file}"]
    assert fill_in_key(argv, {}) == ["launch_server.py", "--api-key=sk-1", "--chat-template", f"@file:{file}"]
    assert fill_in_key(["x", "--api-key", "plain"], {}) == ["x", "--api-key", "plain"]


def test_keys_come_from_variables_made_for_that_alone() -> None:
    environ = {"GROUNDSERVE_SECRET_1": "sk-1", "REPLICA_SECRET_1": "sk=2", "HOME": "/root"}
    argv = ["x", "--api-key", "@env:GROUNDSERVE_SECRET_1", "--admin-api-key=@env:REPLICA_SECRET_1", "--a", "@env:HOME"]
    assert fill_in_key(argv, environ) == ["x", "--api-key=sk-1", "--admin-api-key=sk=2", "--a", "@env:HOME"]
    with pytest.raises(OptionsError, match="GROUNDSERVE_SECRET_2, which --api-key wants, is not set"):
        fill_in_key(["x", "--api-key", "@env:GROUNDSERVE_SECRET_2"], environ)


def test_a_key_may_begin_with_a_hyphen(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("-k1")
    parser = argparse.ArgumentParser()
    parser.add_argument("--api-key")
    parser.add_argument("--admin-api-key")
    argv = ["--api-key", f"@file:{file}", "--admin-api-key", "@env:REPLICA_SECRET_1"]
    read = parser.parse_args(fill_in_key(argv, {"REPLICA_SECRET_1": "--k2"}))
    assert (read.api_key, read.admin_api_key) == ("-k1", "--k2")


def test_keys_are_masked_in_sglangs_own_log() -> None:
    shown = {"api_key": "sk-1", "admin_api_key": None, "ssl_keyfile_password": "p", "tokenizer_path": "t", "port": 1}
    assert mask_keys(lambda _: shown, object()) == {
        "api_key": "***",
        "admin_api_key": None,
        "ssl_keyfile_password": "***",
        "tokenizer_path": "t",
        "port": 1,
    }


FORK = """
import os, time
from pathlib import Path
from replica import gpu, lease, placement, plugin
plugin.end_forks_with_parent()
there = gpu.list_gpus({"REPLICA_PRETEND_GPUS": "1"})
held = lease.take(there, placement.Want(1), Path(os.environ["LEASES"]), wait=0, note="a parent")
if os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """A forked worker ends with its parent and frees the lease."""
    root = Path(__file__).resolve().parents[2]
    command, environ = [sys.executable, "-c", FORK], {"LEASES": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=environ) as parent:
        assert parent.stdout is not None
        child = Path(f"/proc/{parent.stdout.readline().strip()}/stat")
        assert child.exists()
        gpu = Gpu(0, "GPU-pretended-0", "pretended GPU", 81920, 0)
        assert holder(gpu, tmp_path) is not None
        parent.kill()
        parent.wait()
        give_up = time.monotonic() + 30
        # Z: ended, and not yet asked how by whoever has adopted it.
        while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < give_up
            time.sleep(0.05)
        assert holder(gpu, tmp_path) is None


FORK_AND_FORK = """
import os, time
from replica import plugin
plugin.end_forks_with_parent()
if child := os.fork():
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
elif grandchild := os.fork():
    time.sleep(1.5)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
else:
    time.sleep(1.5)
    os._exit(7)
"""


def test_a_forked_worker_may_fork_itself() -> None:
    root = Path(__file__).resolve().parents[2]
    told = subprocess.run([sys.executable, "-c", FORK_AND_FORK], capture_output=True, text=True, cwd=root, check=True)
    assert told.stdout == "7\n"


# In a process of its own: SGLang's imports have effects that do not go away.
OBSERVE = """
import json, os, sys
from replica import plugin
seen = {}

plugin.activate()
seen["on a gpu"] = "sgl_kernel" in sys.modules
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
seen["selected"] = plugin.activate()
import sgl_kernel
from sgl_kernel import build_tree_kernel_efficient_cpu
seen["others"] = hasattr(sgl_kernel, "fused_experts")
try:
    build_tree_kernel_efficient_cpu()
except NotImplementedError as error:
    seen["when called"] = str(error)
import torchvision
seen["torchvision"] = torchvision.__version__

from replica import media_hooks
from sglang.srt.plugins.hook_registry import HookRegistry
media = media_hooks.around({})
for case, cpu, switch in ("gpu", "0", "1"), ("cpu with stock attention", "1", "0"), ("cpu", "1", "1"):
    os.environ |= {"SGLANG_USE_CPU_ENGINE": cpu, "REPLICA_CPU_ATTENTION_HOOK": switch}
    HookRegistry.reset()
    plugin.register_hooks()
    seen[case] = sorted(name.rpartition(".")[2] for name in HookRegistry._hooks if name not in media)
seen["held in"] = sorted(set(media) - HookRegistry._patched)
try:
    plugin.hook({"sglang.srt.utils.common.no_such_function": print})
except SystemExit as end:
    seen["not there"] = end.code
print(json.dumps(seen))
"""


EVERYWHERE = ["_server_args_for_logging", "handle_websocket", "shm_path_for", "sigterm_watchdog"]


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What the plug-in does in a process that has the real SGLang."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "ignore", "-c", OBSERVE]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=root, env={}, check=False)
    assert answer.returncode == 0, answer.stderr
    told: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return told


def test_sgl_kernel_stands_in_on_a_cpu_and_says_so_when_called(seen: dict[str, Any]) -> None:
    assert "runs on a CPU without the compiled sgl_kernel" in seen["when called"]
    assert seen["others"] is False


def test_torchvision_imports_beside_a_torch_without_cuda(seen: dict[str, Any]) -> None:
    assert seen["torchvision"]


def test_on_a_gpu_nothing_is_stood_in_for(seen: dict[str, Any]) -> None:
    assert seen["on a gpu"] is False


def test_the_plug_in_selects_no_platform(seen: dict[str, Any]) -> None:
    assert seen["selected"] is None


@pytest.mark.parametrize(
    ("case", "hooked"),
    [
        ("gpu", EVERYWHERE),
        ("cpu", [*EVERYWHERE, "_run_sdpa_forward_extend", "encode_images"]),
        ("cpu with stock attention", [*EVERYWHERE, "encode_images"]),
    ],
)
def test_hooks(seen: dict[str, Any], case: str, hooked: list[str]) -> None:
    """The drain is hooked on every machine, and attention on a CPU, unless switched off."""
    assert seen[case] == sorted(hooked)


def test_media_are_held_in_everywhere(seen: dict[str, Any]) -> None:
    assert seen["held in"] == []


def test_an_sglang_without_what_is_hooked_is_not_served(seen: dict[str, Any]) -> None:
    assert "no sglang.srt.utils.common.no_such_function to hold on to" in seen["not there"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("halfway.inner.Server.run", "No module named 'no_such_package'"),
        ("halfway.outer.Server.run", ""),
        ("halfway.other.run", ""),
        ("no_such_package.run", ""),
    ],
)
def test_broken_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str, said: str) -> None:
    """A package that is missing behind a hooked function is named; a function that is not there is another matter."""
    (tmp_path / "halfway").mkdir()
    (tmp_path / "halfway/__init__.py").touch()
    (tmp_path / "halfway/inner.py").write_text("import no_such_package\n")
    (tmp_path / "halfway/outer.py").write_text("class Server: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert _broken_import(target) == said


def test_a_vision_tower_computes_in_the_projectors_number_type() -> None:
    class Model:
        vision_tower = torch.nn.Linear(3, 2, dtype=torch.float16)
        multi_modal_projector = torch.nn.Linear(2, 5, dtype=torch.float32)

    def stock(model: Model, pixels: Any) -> Any:
        return model.multi_modal_projector(model.vision_tower(pixels))

    encoded = encode_as_projected(stock, Model(), torch.ones(4, 3, dtype=torch.float16))
    assert encoded.dtype is torch.float32
    assert encoded.shape == (4, 5)


def test_stop_grace_of_the_local_engine() -> None:
    """The local engine waits long enough for the drain and for SGLang's own end."""
    # An idle replica takes 8.5 to 9 s on busy cores: the grace, and SGLang ending its processes one after the other.
    assert Operation().stop_grace >= 2 * (DRAIN_GRACE + 3.5)
