"""`resources:` and the rest of a task in the forms that SkyPilot 0.14.1 takes."""

import pytest

from balancer.errors import ConfigError
from balancer.spec.service_file import Spec, parse


def spec(text: str) -> Spec:
    return parse(text, source="x.yaml")


@pytest.mark.parametrize(
    ("memory", "gigabytes"),
    [
        *(("16", 16), ("16+", 16), ("'16'", 16), ("1.5", 1.5), ("16GB", 16), ("16gb+", 16), ("16Gi", 16), ("4GiB", 4)),
        *(("512MB", 0.5), ("1TB", 1024), ("2048MiB+", 2), ("4 GB", 4), ("1e2", 100)),
    ],
)
def test_memory_in_each_form(memory: str, gigabytes: float) -> None:
    assert spec(f"service: {{}}\nresources: {{memory: {memory}}}").memory == gigabytes


def test_memory_for_each_core() -> None:
    assert spec("service: {}\nresources: {memory: 8x, cpus: 4+}").memory == 32
    without = spec("service: {}\nresources: {memory: 8x}")
    assert without.memory is None
    assert without.warnings == ("x.yaml:2: resources.memory is per core, but cpus is not given, so it is not checked",)


def test_alternatives_ask_for_what_the_least_of_them_asks() -> None:
    text = "service: {}\nresources: {memory: 8, any_of: [{memory: 64+}, {memory: 32+, cpus: 4}, {accelerators: L4}]}"
    assert (spec(text).memory, spec(text).cpus) == (8, None)
    text = "service: {}\nresources: {cpus: 2, ordered: [{memory: 64+}, {memory: 32+, cpus: 4}]}"
    assert (spec(text).memory, spec(text).cpus) == (32, 2)


@pytest.mark.parametrize("memory", ["0", "-1", "16XB", "x", "GB", "16G+B", "++", "''"])
def test_what_is_no_amount_of_memory_is_refused_with_its_line(memory: str) -> None:
    with pytest.raises(ConfigError, match=r"x\.yaml:3: resources\.memory should be a number, or like"):
        spec(f"service: {{}}\nresources:\n  memory: {memory}")
    with pytest.raises(ConfigError, match=r"x\.yaml:5: resources\.any_of\[1\]\.memory should be a number, or like"):
        spec(f"service: {{}}\nresources:\n  any_of:\n  - memory: 4\n  - memory: {memory}")


@pytest.mark.parametrize(
    ("accelerators", "found"),
    [
        ("24GB+", {"24GB+": 1}),
        ("'24GB+:2'", {"24GB+": 2}),
        ("'nvidia:80GB'", {"nvidia:80GB": 1}),
        ("'nvidia:80GB+:4'", {"nvidia:80GB+": 4}),
        ("'RTX6000-Ada:2'", {"RTX6000-Ada": 2}),
        ("[A100-80GB:8, 40GB+]", {"A100-80GB": 8, "40GB+": 1}),
    ],
)
def test_accelerators_by_their_memory(accelerators: str, found: dict[str, int]) -> None:
    assert spec(f"service: {{}}\nresources: {{accelerators: {accelerators}}}").accelerators == found


@pytest.mark.parametrize(
    "accelerators", ["'L4:'", "'L4:1+'", "'L4,A10G'", "'L4:1:1'", "['L4:1,A10G:1']", "{'L4:1': 1}", "':1'"]
)
def test_what_is_no_type_of_gpu_is_refused_with_its_line(accelerators: str) -> None:
    """As a type of which there is none here, it would go unnoticed: another GPU would be used."""
    with pytest.raises(ConfigError, match=r"x\.yaml:2: resources\.accelerators has .*: write a type and how many"):
        spec(f"service: {{}}\nresources: {{accelerators: {accelerators}}}")


@pytest.mark.parametrize("ports", ["8000", "'8000'", "[8000]", "['8000']"])
def test_the_port_in_each_form(ports: str) -> None:
    assert spec(f"service: {{}}\nresources: {{ports: {ports}}}").port == 8000
    assert spec(f"service: {{}}\nresources: {{any_of: [{{ports: {ports}}}]}}").port == 8000


def test_nothing_of_a_task_is_dropped_without_a_word() -> None:
    task = spec(
        """
        service: {readiness_probe: /}
        resources:
          image_id: docker:x/y
          autostop: {idle_minutes: 5, down: true}
          job_recovery: {strategy: FAILOVER, max_restarts_on_errors: 3}
          disk_size: 100GB
          labels: {a: b}
        setup: pip install x
        file_mounts: {/a: {name: x, mode: COPY}, /b: s3://x}
        volumes: {/c: v}
        config: {docker: {run_options: [-v, /a:/b]}}
        event_callback: echo done
        inputs: {s3://x: 1}
        run: serve
        """
    )
    named = [warning.split(": ")[1].split(" ")[0] for warning in task.warnings]
    assert sorted(named) == [
        *("config", "event_callback", "file_mounts", "inputs", "resources.autostop", "resources.disk_size"),
        *("resources.image_id", "resources.job_recovery", "resources.labels", "setup", "volumes"),
    ]
