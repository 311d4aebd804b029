"""The table of what goes wrong, in docs/troubleshooting.md: each message in it is, word by word, what somebody says."""

import importlib.util
import itertools
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from balancer import errors
from balancer.errors import ConfigError
from balancer.operate.engines.addresses import AddressFlags, open_listeners
from balancer.relay.listen import listening
from replica import gpu, lease, machine
from replica.options import Options
from replica.placement import Want
from replica.presets import PRESETS

ROOT = Path(__file__).parents[1]
TABLE = re.search(
    r"^\| what one sees \|.*?(?:\n\n|\Z)", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE | re.DOTALL
)
QUOTED = [message for row in TABLE[0].splitlines()[2:] for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]

# Said by programs that are not at hand here: Docker, NVIDIA's container toolkit, CUDA's own libraries.
BY_OTHERS = {
    'could not select device driver "nvidia" with capabilities: [[gpu]]',
    "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.0, please update your driver ...",
    "torch.OutOfMemoryError: CUDA out of memory",
    "Error while creating shared memory segment /dev/shm/nccl-...",
    "container ...-replica-1 is unhealthy",
    "bind: address already in use",
    "port is already allocated",
}
# Said in situations that a test cannot wait for or has no network for, so read where it stands in the code.
IN_CODE = {
    "port ... is kept for a replica of another service here": "balancer.operate.engines.local.engine",
    "while it started, port ... was taken": "balancer.operate.engines.local.engine",
    "it is not this replica's turn yet (...)": "replica.lease",
    "a replica that shares its GPU has to say how much of it is its own ...": "replica.sharing",
    "it cannot wake: ...": "replica.tenant",
    "nvidia-smi does not answer within 60 s": "replica.gpu",
    "Not enough memory. Please try to increase --mem-fraction-static.": "sglang.srt.model_executor.pool_configurator",
    "scheduler died during initialization (exit code: -9).": "sglang.srt.entrypoints.engine",
    "You are trying to access a gated repo.": "transformers.utils.hub",
    "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files.": (
        "transformers.utils.hub"
    ),
    "PermissionError at /huggingface/hub when downloading ...": "transformers.utils.hub",
}
VALUE = re.compile(r"\.\.\.|https://huggingface\.co|/huggingface/hub|-9|:\d+:")


def is_in(message: str, text: str) -> bool:
    """Are the message's words in the text, in their order, whatever stands at the values?"""
    words = [re.escape(part) for part in VALUE.split(message) if part]
    return re.search(".*".join(words), text, re.DOTALL) is not None


def source(module: str) -> str:
    """The code of a module that need not be importable here, with literals that go on in the next line joined."""
    folder = importlib.util.find_spec(module.partition(".")[0]).submodule_search_locations[0]
    code = Path(folder, *module.split(".")[1:]).with_suffix(".py").read_text()
    return re.sub(r'"\s*\n\s*f?"', "", code)


def nvidia_smi(folder: Path, *lines: str) -> None:
    """Puts a driver into the folder that answers so."""
    program = folder / "nvidia-smi"
    program.write_text("\n".join(("#!/bin/sh", *lines)))
    program.chmod(0o755)


@pytest.fixture
def complaints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What this project's programs say where something is wrong."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    refusals = (
        errors.no_replica(),
        errors.wait_too_long(75, 60, 90),
        errors.queue_full(1024, 5),
        errors.queue_timeout(60, 5),
        errors.buffers_full(),
        errors.lost_twice(),
        errors.kills_replicas(60),
        errors.foreign_host("llm.example"),
    )
    heard = [refusal.message for refusal in refusals]

    def hear(program: Callable[[], object]) -> None:
        with pytest.raises((gpu.GpuError, lease.LeaseError, machine.MachineError, ConfigError)) as refusal:
            program()
        heard.append(str(refusal.value))

    def soon() -> Callable[[], float]:
        return itertools.count(step=60).__next__

    four = gpu.list_gpus({gpu.PRETEND: "4"})
    held = [lease.take(four, Want(1), tmp_path, wait=0, note="llava") for _ in four]
    hear(lambda: lease.take(four, Want(1), tmp_path, wait=60, note="one too many", clock=soon()))
    for one in held:
        one.release()
    hear(lambda: lease.take([], Want(1), tmp_path, wait=60, note="no GPU"))
    hear(lambda: machine.check_memory(PRESETS["smollm2-135m"], available=1.0))
    hear(lambda: machine.check_token(PRESETS["llama-2-7b-chat"], Options(), {"HF_HOME": str(tmp_path)}))
    nvidia_smi(tmp_path, "echo Driver/library version mismatch", "exit 18")
    hear(lambda: gpu.list_gpus({}))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        hear(lambda: listening("127.0.0.1", taken.getsockname()[1]))
        hear(lambda: open_listeners(AddressFlags(f"127.0.0.1:{taken.getsockname()[1]}")))
    nvidia_smi(tmp_path, 'case "$1" in *apps*) echo GPU-a, 7, 9000, x ;; *) echo 0, GPU-a, L4, 9999, 9000, N/A ;; esac')
    machine.wait_for_memory(gpu.list_gpus({}), 8, environ={}, clock=soon(), pause=lambda _: None)
    heard.append(capsys.readouterr().err)
    return heard


def test_each_message_of_ours_is_what_we_say(complaints: list[str]) -> None:
    ours = [message for message in QUOTED if message not in BY_OTHERS | IN_CODE.keys()]
    assert len(ours) >= 8
    assert [message for message in ours if not any(is_in(message, said) for said in complaints)] == []
    assert [said for said in complaints if not any(is_in(message, said) for message in ours)] == []


@pytest.mark.parametrize(("message", "module"), IN_CODE.items(), ids=IN_CODE.values())
def test_each_message_of_a_package_is_what_it_says(message: str, module: str) -> None:
    assert message in QUOTED
    assert is_in(message, source(module))


def test_no_message_is_listed_here_that_stands_there_no_more() -> None:
    assert set(QUOTED) >= BY_OTHERS
