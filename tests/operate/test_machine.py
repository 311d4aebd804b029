from pathlib import Path
from typing import Any

import pytest

from balancer.errors import ConfigError
from balancer.operate.machine import Gpu, available_gb, fitted, gpus
from balancer.operate.recipe import Recipe, recipe
from balancer.spec import parse

L4 = Gpu("NVIDIA L4", is_split=False, held_by=None)
A100 = Gpu("NVIDIA A100-SXM4-80GB", is_split=False, held_by=None)
MIG = Gpu("NVIDIA A100-SXM4-80GB", is_split=True, held_by=None)


def made(more: str = "", run: str = "sglang serve --model-path a/b") -> Recipe:
    return recipe(parse(f"service: {{}}\nrun: {run}\n{more}", source="x.yaml"))


def refusal(*arguments: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        fitted(*arguments)
    return str(raised.value)


def test_memory_for_all_replicas_is_wanted_at_once() -> None:
    hungry = made("resources: {memory: 4+}")
    assert fitted(hungry, 2, (), 8.0)[1] == []
    assert refusal(hungry, 2, (), 7.9) == (
        "2 replicas of x want 8 GB of memory, 7.9 GB are free: stop something, or run fewer replicas"
    )


def test_too_few_cores_are_a_warning() -> None:
    (warning,) = fitted(made("resources: {cpus: 4096}"), 1, (), 99)[1]
    assert "1 replica of x want 4096 cores; here are" in warning


def test_too_few_gpus_are_refused_with_what_there_is() -> None:
    wants = made("resources: {accelerators: {L4: 2, A100: 2}}")
    assert fitted(wants, 1, (L4, L4), 99)[0].gpus == 2
    assert refusal(wants, 2, (L4, L4, L4), 99) == (
        "2 replicas of x want 2 GPUs each (L4, A100); this machine has 3: run fewer replicas"
    )
    assert refusal(wants, 1, (), 99).endswith("this machine has none: smollm2 and tiny-llava run without")
    assert "this machine has none and 1 split by MIG" in refusal(wants, 1, (MIG,), 99)


def test_sglang_takes_a_gpu_where_there_is_one() -> None:
    assert fitted(made(), 1, (), 99)[0].resources == "1x CPU"
    on_gpu = fitted(made(), 1, (L4,), 99)[0]
    assert (on_gpu.gpus, on_gpu.resources) == (1, "1x L4")
    assert "want 1 GPU each" in refusal(made(), 2, (L4,), 99)


@pytest.mark.parametrize(
    ("kind", "there", "resources", "is_known"),
    [
        ("L4", L4, "1x L4", True),
        ("A100-80GB", A100, "1x A100-80GB", True),
        ("A100", A100, "1x A100", True),
        ("a100", A100, "1x a100", True),
        ("H100", A100, "1x A100-SXM4-80GB", False),
        ("L40", L4, "1x L4", False),
    ],
)
def test_the_gpu_that_was_asked_for_is_recognised(kind: str, there: Gpu, resources: str, is_known: bool) -> None:
    here, warnings = fitted(made(f"resources: {{accelerators: {kind}}}"), 1, (there,), 99)
    assert here.resources == resources
    assert warnings == (
        [] if is_known else [f"x.yaml: resources.accelerators: none of {kind} is here; {there.name} is used"]
    )


def test_a_script_that_is_no_sglang_is_told_that_its_gpus_are_not_kept_apart() -> None:
    script = made("resources: {accelerators: L4}", run="serve $GROUNDSERVE_PORT")
    assert "nothing keeps its GPUs apart" in fitted(script, 2, (L4, L4), 99)[1][0]
    assert fitted(script, 1, (L4,), 99)[1] == []


def test_this_machine_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICA_PRETEND_GPUS", "3")
    assert [(gpu.name, gpu.is_split, gpu.held_by) for gpu in gpus()] == [("pretended GPU", False, None)] * 3
    monkeypatch.setenv("REPLICA_PRETEND_GPUS", "many")
    with pytest.raises(ConfigError, match="REPLICA_PRETEND_GPUS=many is not a number of GPUs"):
        gpus()


def test_free_memory_is_the_kernels_own_estimate(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  24000000 kB\nMemFree: 1 kB\nMemAvailable: 2000000 kB\n")
    assert available_gb(tmp_path / "meminfo") == 2.048
