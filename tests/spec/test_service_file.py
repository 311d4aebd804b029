from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from balancer.errors import ConfigError
from balancer.spec.document import NoMeaning, Refused
from balancer.spec.schema import LoadBalancer, Operation, Probe, ReplicaPolicy, Resources, Service, Task, Tls
from balancer.spec.service_file import Spec, load, parse
from balancer.spec.settings import ReadinessProbe, Settings

ROOT = Path(__file__).parents[2]


def spec(text: str, **more: Any) -> Spec:
    return parse(text, source="a/file.yaml", **more)


def refusal(text: str, **more: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        spec(text, **more)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_every_field_of_a_full_file_is_honoured() -> None:
    full = spec(
        """
        name: full
        service:
          readiness_probe:
            path: /v1/chat/completions
            post_data: {model: $MODEL, messages: [{role: user, content: hi}]}
            headers: {Authorization: "Bearer ${KEY}"}
            initial_delay_seconds: 60
            timeout_seconds: 5
            endpoint_probe_interval_seconds: 2
            consecutive_failure_threshold_timeout: 30
          replica_policy:
            min_replicas: 1
            max_replicas: 4
            target_qps_per_replica: 2.5
            upscale_delay_seconds: 10
            downscale_delay_seconds: 20
            num_overprovision: 1
          load_balancing_policy: Least_Load
          load_balancer: {stream_timeout_seconds: 45}
          tls: {keyfile: key.pem, certfile: cert.pem}
          ports: 9000
        resources: {accelerators: {L4: 2, A100-80GB: 2}, cpus: 4+, memory: 16+, ports: 8000}
        envs: {MODEL: tiny, SIZE: 7}
        secrets: {KEY: abc}
        workdir: /srv
        run: serve
        x-groundserve: {queue_size: 5, restart_limit: 2}
        """
    )
    assert full.name == "full"
    assert full.readiness_probe is not None
    expected = ReadinessProbe(
        path="/v1/chat/completions",
        post_data={"model": "tiny", "messages": [{"role": "user", "content": "hi"}]},
        headers={"Authorization": "Bearer abc"},
        initial_delay_seconds=60,
        timeout_seconds=5,
        endpoint_probe_interval_seconds=2,
        consecutive_failure_threshold_timeout=30,
    )
    assert full.readiness_probe.model_dump() == expected.model_dump()
    assert full.service.replica_policy == ReplicaPolicy(
        min_replicas=1,
        max_replicas=4,
        target_qps_per_replica=2.5,
        upscale_delay_seconds=10,
        downscale_delay_seconds=20,
        num_overprovision=1,
    )
    assert (full.min_replicas, full.max_replicas, full.autoscales) == (1, 4, True)
    assert full.policy == "least_load"
    assert full.service.tls is not None
    assert (full.service.tls.keyfile, full.service.tls.certfile) == ("key.pem", "cert.pem")
    assert full.port == 9000
    assert full.accelerators == {"L4": 2, "A100-80GB": 2}
    assert (full.cpus, full.memory) == (4, 16)
    assert full.envs == {"MODEL": "tiny", "SIZE": "7", "KEY": "abc"}
    assert (full.workdir, full.run) == (Path("/srv"), "serve")
    assert full.settings == Settings(queue_size=5, idle_timeout=45)
    assert full.operation == Operation(restart_limit=2)
    assert full.warnings == ()


def test_defaults_are_sky_serves() -> None:
    least = spec("service: {readiness_probe: /}")
    assert (least.min_replicas, least.max_replicas, least.autoscales, least.policy) == (1, 1, False, None)
    assert least.readiness_probe is not None
    times = least.readiness_probe.model_dump(exclude={"path", "post_data", "headers"})
    assert list(times.values()) == [1200, 15, 10, 180]


def test_x_groundserve_wins_over_stream_timeout_seconds() -> None:
    both = spec("service: {load_balancer: {stream_timeout_seconds: 45}}\nx-groundserve: {idle_timeout: 7}")
    assert both.settings.idle_timeout == 7


def test_post_data_may_be_json_in_a_string() -> None:
    probe = spec("service: {readiness_probe: {path: /v1, post_data: '{\"a\": [1]}'}}").readiness_probe
    assert probe is not None
    assert probe.post_data == {"a": [1]}


# Names


def test_the_name_is_the_given_one_else_the_files_else_its_stem() -> None:
    assert spec("name: x\nservice: {}", name="given").name == "given"
    assert spec("name: x\nservice: {}").name == "x"
    assert spec("service: {}").name == "file"


@pytest.mark.parametrize("name", ["../x", "a b", "-a", "a" * 64, "ä"])
def test_a_name_that_could_be_no_folder_is_refused(name: str) -> None:
    assert "cannot name a service" in refusal("service: {}", name=name)


# Variables


def test_variables_are_filled_in_as_sky_serve_does() -> None:
    text = "service: {readiness_probe: {path: '/$A/${B}/$C', headers: {$A: x}}}\nenvs: {A: a, B: 2}"
    probe = spec(text, envs={"B": "b"}).readiness_probe
    assert probe is not None
    assert (probe.path, probe.headers) == ("/a/b/$C", {"a": "x"})


def test_a_number_may_come_from_a_variable() -> None:
    text = "service: {replicas: $N}\nenvs: {N: 2}"
    assert spec(text).min_replicas == 2
    assert spec(text, envs={"N": "3"}).min_replicas == 3
    assert refusal(text, envs={"N": "many"}) == (
        "a/file.yaml:1: service.replicas should be a valid integer, unable to parse string as an integer (it is '$N')"
    )


def test_variables_without_a_value_are_named() -> None:
    text = "service: {}\nenvs: {HF_TOKEN: }\nsecrets: [OTHER]"
    assert spec(text).missing == {"HF_TOKEN": "--env", "OTHER": "--secret"}
    assert spec(text, envs={"HF_TOKEN": "x"}, secrets={"OTHER": "y"}).missing == {}


def test_secrets_are_in_no_repr_and_no_balancers_file() -> None:
    secret = spec("service: {readiness_probe: /}\nenvs: {A: hush}", secrets={"B": "hush"})
    assert secret.readiness_probe is not None
    assert "hush" not in repr(secret) + secret.for_balancer(secret.readiness_probe)


def test_errors_show_no_secrets() -> None:
    """An error message quotes the file's own text, not the secret that was filled in."""
    message = refusal("service: {ports: $KEY}\nsecrets: {KEY: hush}")
    assert "$KEY" in message
    assert "hush" not in message


@pytest.mark.parametrize("section", ["envs", "secrets"])
def test_a_variable_has_a_name_and_one_value(section: str) -> None:
    assert f"a/file.yaml:3: {section}.1A is not a name" in refusal(f"service: {{}}\n{section}:\n  1A: x")
    assert f"a/file.yaml:3: {section}.A should be a single value" in refusal(f"service: {{}}\n{section}:\n  A: [x]")
    assert f"a/file.yaml:2: {section} should be names" in refusal(f"service: {{}}\n{section}: x")


# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("service: {replica: 2}", "a/file.yaml:1: service.replica is unknown; the nearest known key is 'replicas'"),
        ("service: {}\nresource: {}", "a/file.yaml:2: resource is unknown; the nearest known key is 'resources'"),
        (
            "service:\n  readiness_probe:\n    path: /\n    timeout: 3",
            "a/file.yaml:4: service.readiness_probe.timeout is unknown; the nearest known key is 'timeout_seconds'",
        ),
        (
            "service:\n  replica_policy:\n    min_replica: 3",
            "a/file.yaml:3: service.replica_policy.min_replica is unknown; the nearest known key is 'min_replicas'",
        ),
        (
            "service: {}\nresources:\n  any_of:\n  - cloud: gcp\n  - memry: 3",
            "a/file.yaml:5: resources.any_of[1].memry is unknown; the nearest known key is 'memory'",
        ),
        (
            "service: {}\nx-groundserve:\n  queue_siz: 3",
            "a/file.yaml:3: x-groundserve.queue_siz is unknown; the nearest known key is 'queue_size'",
        ),
        (
            "service: {}\nx-groundserve:\n  restart_limits: 3",
            "a/file.yaml:3: x-groundserve.restart_limits is unknown; the nearest known key is 'restart_limit'",
        ),
    ],
)
def test_unknown_key(text: str, message: str) -> None:
    """An unknown key is refused with its line and the nearest known key."""
    assert refusal(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "a service YAML is a mapping"),
        ("", "a service YAML is a mapping"),
        ("name: x", "there is no `service:` section"),
        ("service:\n  a: [", "a/file.yaml:2: not valid YAML: "),
        ("a: \t- b", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML: but found another document"),
        ("service: {}\nname: a\nname: b", "a/file.yaml:3: name is given twice"),
        ("service: {replicas: 20000}", "1: service.replicas should be less than or equal to 10000 (it is 20000)"),
        ("service: {replicas: -1}", "a/file.yaml:1: service.replicas should be greater than or equal to 0 (it is -1)"),
        ("service: {replicas: yes}", "service.replicas should be a number, not true or false (it is True)"),
        ("service: {replicas: 1.5}", "service.replicas should be a valid integer"),
        (
            "service: {readiness_probe: health}",
            "service.readiness_probe should start with a slash (/) (it is 'health')",
        ),
        ("service: {readiness_probe: {headers: {}}}", "service.readiness_probe lacks 'path'"),
        (
            "service: {readiness_probe: {path: /, post_data: '{'}}",
            "post_data should be an object, or a string that holds JSON",
        ),
        ("service: {replica_policy: {max_replicas: 2}}", "service.replica_policy lacks 'min_replicas'"),
        ("service: {load_balancing_policy: random}", "should be 'round_robin', 'least_load', 'prefix_aware'"),
        ("service: {tls: {keyfile: x}}", "service.tls lacks 'certfile'"),
        ("service: {ports: 70000}", "service.ports should be less than or equal to 65535"),
        ("service: {load_balancer: {stream_timeout_seconds: 0}}", "stream_timeout_seconds should be greater than 0"),
        ("service:", "a/file.yaml:1: service should be keys with their values (it is None)"),
        ("service: {}\nresources:", "a/file.yaml:2: resources should be keys with their values (it is None)"),
        ("service: {load_balancer: 5}", "service.load_balancer should be keys with their values (it is 5)"),
        ("pool: {workers: 2}", "a/file.yaml:1: pool cannot be used here: job pools have no endpoint to serve"),
        ("service: {}\nnum_nodes: 0", "a/file.yaml:2: num_nodes should be greater than or equal to 1 (it is 0)"),
        ("service: {}\nworkdir: {url: x}", "a/file.yaml:2: workdir should be a folder: nothing is cloned here"),
        ("service: {}\nresources: {ports: [1, 2]}", "resources.ports should be the one port"),
        ("service: {}\nresources: {ports: 8000-8010}", "resources.ports should be the one port"),
        ("service: {}\nresources: {memory: lots}", "resources.memory should be a number, or like '4+'"),
        ("service: {}\nresources: {accelerators: 4}", "resources.accelerators should be like"),
        ("service: {}\nresources: {accelerators: {L4: 0.5}}", "asks for 0.5 of L4: a replica takes whole GPUs"),
        ("service: {}\nx-groundserve: {queue_size: many}", "x-groundserve.queue_size should be a valid integer"),
        ("service: {}\nx-groundserve: {restart_limit: 0}", "x-groundserve.restart_limit should be greater than"),
    ],
)
def test_a_wrong_file_gets_one_line_that_says_what_is_wrong(text: str, message: str) -> None:
    assert message in refusal(text)


@pytest.mark.parametrize(
    ("service", "message"),
    [
        ("replicas: 1, replica_policy: {min_replicas: 1}", "service.replicas exclude each other"),
        ("replica_policy: {min_replicas: 2, max_replicas: 1, target_qps_per_replica: 1}", "is less than min_replicas"),
        ("replica_policy: {min_replicas: 1, max_replicas: 2}", "give target_qps_per_replica"),
        ("replica_policy: {min_replicas: 1, max_replicas: 2, target_qps_per_replica: 0}", "should be more than 0"),
        ("replica_policy: {min_replicas: 1, target_qps_per_replica: {L4: 1}}", "need each other"),
        ("load_balancing_policy: instance_aware_least_load", "need each other"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(service: str, message: str) -> None:
    assert message in refusal(f"service: {{{service}}}")


def test_a_port_may_be_named_where_replicas_open_several() -> None:
    assert spec("service: {ports: 8000}\nresources: {ports: [8000, 9000-9010]}").port == 8000


def test_spare_replicas_of_a_fixed_number_are_run() -> None:
    fixed = spec("service: {replica_policy: {min_replicas: 2, num_overprovision: 1}}")
    assert (fixed.min_replicas, fixed.max_replicas, fixed.autoscales) == (3, 3, False)
    scaled = "{min_replicas: 2, max_replicas: 5, num_overprovision: 1, target_qps_per_replica: 1}"
    assert spec(f"service: {{replica_policy: {scaled}}}").min_replicas == 2


def test_scaling_on_requests_in_flight_needs_no_qps() -> None:
    policy = "{min_replicas: 0, max_replicas: 2}"
    scaled = spec(f"service: {{replica_policy: {policy}}}\nx-groundserve: {{target_in_flight_per_replica: 8}}")
    assert scaled.autoscales
    assert scaled.operation.target_in_flight_per_replica == 8


# What SkyServe 0.14.1 knows (get_task_schema, get_service_schema and get_resources_schema in sky/utils/schemas.py), but
# for keys that begin with _, which are its own.
SKY_SERVE: dict[type[BaseModel], str] = {
    Task: """name workdir event_callback num_nodes resources file_mounts service pool setup run envs secrets
        managed_secrets inputs outputs file_mounts_mapping config volumes volume_mounts api_server_access""",
    Service: """readiness_probe load_balancer pool replica_policy ports replicas workers load_balancing_policy tls""",
    Probe: """path initial_delay_seconds timeout_seconds endpoint_probe_interval_seconds post_data headers
        consecutive_failure_threshold_timeout""",
    LoadBalancer: "stream_timeout_seconds",
    ReplicaPolicy: """min_replicas max_replicas num_overprovision target_qps_per_replica dynamic_ondemand_fallback
        base_ondemand_fallback_replicas spot_placer upscale_delay_seconds downscale_delay_seconds""",
    Tls: "keyfile certfile",
    Resources: """cloud region zone infra cpus memory accelerators instance_type use_spot job_recovery volumes
        disk_size ephemeral_storage disk_tier network_tier local_disk max_hourly_cost ports labels accelerator_args
        image_id autostop priority priority_class any_of ordered""",
}


@pytest.mark.parametrize("model", SKY_SERVE, ids=lambda model: model.__name__)
def test_keys_are_those_of_sky_serve(model: type[BaseModel]) -> None:
    """Every key of sky serve is known, and only x-groundserve is an addition of ours."""
    known = {field.alias or name for name, field in model.model_fields.items()}
    assert known - {"x-groundserve"} == set(SKY_SERVE[model].split())


def marked(model: type[BaseModel], under: str, mark: type) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if any(isinstance(one, mark) for one in field.metadata):
            yield f"{under}{field.alias or name}"


SECTIONS: list[tuple[type[BaseModel], str]] = [
    (Task, ""),
    (Service, "service."),
    (ReplicaPolicy, "service.replica_policy."),
    (Resources, "resources."),
]


def file_with(key: str) -> str:
    """A valid file that uses this key and no other of its kind."""
    data: dict[str, Any] = {"service": {}}
    if "replica_policy" in key:
        data["service"]["replica_policy"] = {"min_replicas": 1}
    *sections, last = key.split(".")
    at = data
    for section in sections:
        at = at.setdefault(section, {})
    at[last] = "x"
    return yaml.safe_dump(data)


@pytest.mark.parametrize("key", [key for model, under in SECTIONS for key in marked(model, under, NoMeaning)])
def test_a_key_without_meaning_here_is_warned_of_by_name(key: str) -> None:
    (warning,) = spec(file_with(key)).warnings
    line = next(n for n, text in enumerate(file_with(key).splitlines(), 1) if f"{key.split('.')[-1]}:" in text)
    assert warning.startswith(f"a/file.yaml:{line}: {key} has no effect here: ")


@pytest.mark.parametrize("key", [key for model, under in SECTIONS for key in marked(model, under, Refused)])
def test_a_key_that_would_be_wrong_to_ignore_is_refused_by_name(key: str) -> None:
    assert f": {key} cannot be used here: " in refusal(file_with(key))


def test_there_are_keys_of_both_kinds() -> None:
    assert len([key for model, under in SECTIONS for key in marked(model, under, NoMeaning)]) > 20
    assert len([key for model, under in SECTIONS for key in marked(model, under, Refused)]) == 4


def test_alternatives_are_warned_of_too() -> None:
    (warning,) = spec("service: {}\nresources:\n  any_of:\n  - {accelerators: L4}\n  - {use_spot: true}").warnings
    assert warning.startswith("a/file.yaml:5: resources.any_of[1].use_spot has no effect here")


@pytest.mark.parametrize(
    ("accelerators", "found"),
    [
        ("L4", {"L4": 1}),
        ("'L4:2'", {"L4": 2}),
        ("{L4: 1, A10G: 1}", {"L4": 1, "A10G": 1}),
        ("['L4:2', A100]", {"L4": 2, "A100": 1}),
        ("{'V100:1', 'A100:1'}", {"V100": 1, "A100": 1}),
        ("{L4: 2.0}", {"L4": 2}),
        ("null", {}),
    ],
)
def test_accelerators_in_all_of_sky_serves_forms(accelerators: str, found: dict[str, int]) -> None:
    assert spec(f"service: {{}}\nresources: {{accelerators: {accelerators}}}").accelerators == found


@pytest.mark.parametrize("key", ["any_of", "ordered"])
def test_alternatives_bring_their_accelerators(key: str) -> None:
    text = f"service: {{}}\nresources: {{{key}: [{{accelerators: L4}}, {{accelerators: {{A100: 1}}}}], ports: 8000}}"
    assert spec(text).accelerators == {"L4": 1, "A100": 1}


# Files


def test_a_file_that_is_not_there_or_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file or directory"):
        load(tmp_path / "nowhere.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load(tmp_path / "x.yaml")


def test_the_balancers_file_says_all_that_the_balancer_needs(tmp_path: Path) -> None:
    first = spec(
        """
        service:
          readiness_probe: {path: /$P, headers: {a: b}}
          replica_policy: {min_replicas: 0, max_replicas: 2}
          load_balancing_policy: least_load
          tls: {keyfile: k, certfile: c}
        envs: {P: x}
        run: serve
        x-groundserve: {queue_size: 3, target_in_flight_per_replica: 2}
        """
    )
    assert first.readiness_probe is not None
    (tmp_path / "s.yaml").write_text(first.for_balancer(first.readiness_probe))
    second = load(tmp_path / "s.yaml")
    assert second.readiness_probe == first.readiness_probe
    assert (second.name, second.policy, second.settings) == (first.name, first.policy, first.settings)
    # TLS is a matter of flags: its files are relative to a folder that the balancer does not know.
    assert (first.tls, second.tls) == ((Path.cwd() / "c", Path.cwd() / "k"), None)
    assert (second.run, second.envs) == ("", {})


@pytest.mark.parametrize("path", sorted((ROOT / "services").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_projects_own_files_load(path: Path) -> None:
    known = load(path, envs={"HF_TOKEN": "x"})
    assert known.name == path.stem
    assert known.min_replicas == 2
    assert known.missing == {}
    # setup: is SkyServe's way to install SGLang.
    assert [warning for warning in known.warnings if ": setup " not in warning] == []
