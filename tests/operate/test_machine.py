from pathlib import Path
from typing import Any

import pytest

from balancer.errors import ConfigError
from balancer.operate.engines.local.machine import Gpu, fitted, gpus, placed
from balancer.operate.recipe.recipe import Recipe, recipe
from balancer.spec.service_file import parse

L4 = Gpu("NVIDIA L4", is_split=False, held_by=None)
A100 = Gpu("NVIDIA A100-SXM4-80GB", is_split=False, held_by=None)
MIG = Gpu("NVIDIA A100-SXM4-80GB", is_split=True, held_by=None)


def made(more: str = "", run: str = "sglang serve --model-path a/b", service: str = "{}") -> Recipe:
    return recipe(parse(f"service: {service}\nrun: {run}\n{more}", source="x.yaml"))


def box(*holders: str | None) -> tuple[Gpu, ...]:
    """A machine with an L4 for each, held or free."""
    return tuple(Gpu("NVIDIA L4", False, holder, index, 23034, 4602) for index, holder in enumerate(holders))


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


def uses(recipe: Recipe, there: tuple[Gpu, ...]) -> list[str]:
    each = fitted(recipe, 0, there, 99)[0]
    lines = [line.partition("): ") for line in placed(each, there)]
    assert [line[0] for line in lines] == [
        f"GPU {gpu.index} (NVIDIA L4" + (", 18 of 22 GiB free" if gpu.memory_total else "") for gpu in there
    ]
    return [line[2] for line in lines]


def test_each_gpu_is_listed_with_who_has_it_or_gets_it() -> None:
    two = made(service="{replicas: 2}")
    assert uses(two, box(None, "llava on port 8001", None, None)) == [
        "for replica 1",
        "held by llava on port 8001",
        "for replica 2",
        "stays free",
    ]
    policy = "{replica_policy: {min_replicas: 1, max_replicas: 2, target_qps_per_replica: 1}}"
    later = "for when the load asks for more"
    assert uses(made(service=policy), box(None, None, None)) == ["for replica 1", later, "stays free"]
    unbounded = policy.replace("max_replicas: 2, ", "")
    assert uses(made(service=unbounded), box(None, None, None)) == ["for replica 1", later, later]


def test_gpus_side_by_side_are_taken_together_as_the_lease_does() -> None:
    pair = made("resources: {accelerators: {L4: 2}}", service="{replicas: 2}")
    alone = "stays free: a replica takes 2 that lie side by side"
    assert uses(pair, box(None, "x", None, None, None)) == [alone, "held by x", "for replica 1", "for replica 1", alone]
    split = Gpu("NVIDIA L4", is_split=True, held_by=None, index=9)
    assert uses(made(), (split, *box(None))) == ["split by MIG, which no replica takes", "for replica 1"]


def test_gpus_that_others_hold_are_warned_of_but_not_our_own_in_an_update() -> None:
    two = made(service="{replicas: 2}")
    there = box("llava on port 8001", None, None)
    assert fitted(two, 2, there, 99)[1] == []
    there = box("llava on port 8001", "llava on port 8002", None)
    assert fitted(two, 2, there, 99)[1] == [
        "x.yaml: others hold GPUs, so that 1 of 2 replicas can start now: groundserve check x.yaml says who holds them"
    ]
    assert fitted(two, 2, there, 99, running=2)[1] == []


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


def test_this_machine_can_be_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REPLICA_PRETEND_GPUS", "3")
    monkeypatch.setenv("LEASE_DIR", str(tmp_path))
    assert gpus() == tuple(Gpu("pretended GPU", False, None, index, 81920, 0) for index in range(3))
    monkeypatch.setenv("REPLICA_PRETEND_GPUS", "many")
    with pytest.raises(ConfigError, match="REPLICA_PRETEND_GPUS=many is not a number of GPUs"):
        gpus()
