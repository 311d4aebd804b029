from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from balancer.errors import ConfigError
from balancer.operate.engines.capacity import Gpu, fit, fitted, gpus, of_kind, placed
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


def seated(there: tuple[Gpu, ...], each: int = 1, *kinds: str) -> tuple[Gpu, ...]:
    """As `python -m replica` seats them: neighbours together, of the kinds that are wanted where there are any."""
    kinds_of = [tuple(kind for kind in kinds if kind in gpu.name) for gpu in there]
    whole = [at for at, gpu in enumerate(there) if not gpu.is_split and not gpu.problem]
    mine = [at for at in whole if kinds_of[at]] or whole
    seats = {at: place // each for place, at in enumerate(mine) if place // each < len(mine) // each}
    return tuple(replace(gpu, kinds=kinds_of[at], seat=seats.get(at)) for at, gpu in enumerate(there))


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


def test_a_replica_on_several_machines_is_refused_here() -> None:
    with pytest.raises(ConfigError, match="num_nodes: one replica on 2 machines runs on Slurm or Kubernetes only"):
        fit(made("num_nodes: 2"))


def test_too_few_cores_are_a_warning() -> None:
    (warning,) = fitted(made("resources: {cpus: 4096}"), 1, (), 99)[1]
    assert "1 replica of x want 4096 cores; here are" in warning


def test_too_few_gpus_are_refused_with_what_there_is() -> None:
    wants = made("resources: {accelerators: {L4: 2, A100: 2}}")
    assert fitted(wants, 1, seated((L4, L4), 2, "L4", "A100"), 99)[0].gpus == 2
    assert refusal(wants, 2, seated((L4, L4, L4), 2, "L4", "A100"), 99) == (
        "2 replicas of x want 2 GPUs each (L4, A100); this machine has 3: run fewer replicas"
    )
    assert refusal(wants, 1, (), 99).endswith("this machine has none: smollm2 and tiny-llava run without")
    assert refusal(wants, 1, seated((L4,), 2, "L4", "A100"), 99).endswith(
        "this machine has 1: give each replica fewer GPUs"
    )
    assert "this machine has none and 1 split by MIG" in refusal(wants, 1, seated((MIG,)), 99)
    lost = replace(L4, index=1, problem="GPU is lost")
    assert "this machine has 1, and GPU 1 (GPU is lost) cannot be used: run fewer replicas" in refusal(
        made(), 2, seated((L4, lost)), 99
    )


def uses(recipe: Recipe, there: tuple[Gpu, ...]) -> list[str]:
    there = seated(there, recipe.gpus or 1, *recipe.spec.accelerators)
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


def test_held_gpus_are_warned_of() -> None:
    """GPUs that others hold cause a warning; in an update, the service's own do not."""
    two = made(service="{replicas: 2}")
    there = seated(box("llava on port 8001", None, None))
    assert fitted(two, 2, there, 99)[1] == []
    there = seated(box("llava on port 8001", "llava on port 8002", None))
    assert fitted(two, 2, there, 99)[1] == [
        "x.yaml: others hold GPUs, so that 1 of 2 replicas can start now: groundserve check x.yaml says who holds them"
    ]
    assert fitted(two, 2, there, 99, running=2)[1] == []


def test_sglang_takes_a_gpu_where_there_is_one() -> None:
    assert fitted(made(), 1, (), 99)[0].resources == "1x CPU"
    on_gpu = fitted(made(), 1, seated((L4,)), 99)[0]
    assert (on_gpu.gpus, on_gpu.resources) == (1, "1x L4")
    assert "want 1 GPU each" in refusal(made(), 2, seated((L4,)), 99)


def test_gpu_of_another_kind() -> None:
    """If no GPU is of a requested kind, another kind is used, with a warning."""
    here, warnings = fitted(made("resources: {accelerators: A100}"), 1, seated((A100,), 1, "A100"), 99)
    assert (here.resources, warnings) == ("1x A100", [])
    here, warnings = fitted(made("resources: {accelerators: H100}"), 1, seated((A100,), 1, "H100"), 99)
    assert here.resources == "1x A100-SXM4-80GB"
    assert warnings == [f"x.yaml: resources.accelerators: none of H100 is here; {A100.name} is used"]


def test_only_requested_kinds_count() -> None:
    """Only GPUs of the requested kind are counted and shown."""
    wants = made("resources: {accelerators: L4}")
    there = seated((A100, replace(L4, index=1)), 1, "L4")
    assert placed(fitted(wants, 1, there, 99)[0], there) == [
        f"GPU 0 ({A100.name}): stays free: it is no L4",
        "GPU 1 (NVIDIA L4): for replica 1",
    ]
    assert "(L4); this machine has 1 of L4: run fewer replicas" in refusal(wants, 2, there, 99)


@pytest.mark.parametrize(
    ("there", "gpus"),
    [((L4,) * 8, 8), ((A100,) * 4, 1), ((A100, *(L4,) * 8), 1), ((L4,) * 4, 8), ((), 1)],
)
def test_first_sufficient_kind(there: tuple[Gpu, ...], gpus: int) -> None:
    """Of several kinds, the first that this machine has enough of decides how many GPUs a replica takes."""
    wants = made("resources: {accelerators: {A100: 1, L4: 8}}")
    assert of_kind(wants, seated(there, 1, "A100", "L4")).gpus == gpus


def test_a_script_that_is_no_sglang_gets_a_lease_too() -> None:
    script = made("resources: {accelerators: {L4: 2}}", run="serve $GROUNDSERVE_PORT")
    argv = script.invocation(1, 8001).argv
    assert argv[argv.index("-m") + 1 :] == (
        *("replica", "--gpus", "2", "--gpu-kinds", "L4", "--port", "8001", "--exec"),
        *("--", "bash", "-c", "serve $GROUNDSERVE_PORT"),
    )
    assert "want 2 GPUs each (L4)" in refusal(script, 2, seated((L4, L4), 2, "L4"), 99)
    for run in ("python -m replica --gpus 1 --exec -- serve $GROUNDSERVE_PORT & wait", "serve $GROUNDSERVE_PORT"):
        wants = "resources: {accelerators: L4}" if "replica" in run else ""
        assert made(wants, run=run).invocation(1, 8001).argv == ("bash", "-c", run)


def test_this_machine_can_be_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REPLICA_PRETEND_GPUS", "3")
    monkeypatch.setenv("LEASE_DIR", str(tmp_path))
    assert gpus(kinds=["L4"]) == tuple(
        Gpu("pretended GPU", index=index, memory_total=81920, seat=index) for index in range(3)
    )
    assert [gpu.seat for gpu in gpus(each=2)] == [0, 0, None]
    monkeypatch.setenv("REPLICA_PRETEND_GPUS", "many")
    with pytest.raises(ConfigError, match="REPLICA_PRETEND_GPUS=many is not a number of GPUs"):
        gpus()
