import os
import sys
from pathlib import Path

import pytest

from balancer.errors import ConfigError
from balancer.operate.recipe.recipe import Recipe, recipe
from balancer.spec.service_file import parse


def made(text: str, **envs: str) -> Recipe:
    return recipe(parse(text, source="x.yaml", envs=envs))


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as raised:
        made(text)
    return str(raised.value)


def test_an_sglang_command_becomes_a_replica_of_our_own() -> None:
    command = made(
        "service: {}\nenvs: {M: a/b}\nrun: A=1 python -m sglang.launch_server --model-path $M --tp 2 --x y --port 8000"
    ).invocation(3, 20500)
    assert command.argv == (
        *(sys.executable, "-P", "-m", "replica", "--model", "a/b", "--port", "20500", "--gpus", "2"),
        *("--", "--x", "y"),
    )
    assert {k: command.envs[k] for k in ("M", "A", "SKYPILOT_SERVE_REPLICA_ID", "GROUNDSERVE_PORT")} == {
        "M": "a/b",
        "A": "1",
        "SKYPILOT_SERVE_REPLICA_ID": "3",
        "GROUNDSERVE_PORT": "20500",
    }
    # Wherever it is started, Python finds the project's packages.
    assert (Path(command.envs["PYTHONPATH"].split(os.pathsep)[0]) / "replica/__main__.py").is_file()


def test_gpus_a_replica_are_those_of_the_accelerators() -> None:
    two = made("service: {}\nresources: {accelerators: {L4: 2}}\nrun: sglang serve --model-path a/b")
    assert two.gpus == 2
    run = "sglang serve --model-path a/b --tp $SKYPILOT_NUM_GPUS_PER_NODE"
    assert made(f"service: {{}}\nresources: {{accelerators: 'L4:4'}}\nrun: {run}").gpus == 4


def test_a_folder_of_a_model_is_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    launch = made(f"service: {{}}\nworkdir: {tmp_path}\nrun: sglang serve --model-path model")
    assert launch.invocation(1, 1).argv[5] == str(tmp_path / "model")


def test_a_replica_starts_in_the_folder_that_its_script_goes_to(tmp_path: Path) -> None:
    (tmp_path / "sub/llama").mkdir(parents=True)
    text = f"service: {{}}\nworkdir: {tmp_path}\nrun: cd sub && sglang serve ./llama --chat-template ./x.jinja"
    command = made(text).invocation(1, 1)
    assert command.workdir == tmp_path / "sub"
    assert command.argv[5:] == (str(tmp_path / "sub/llama"), "--port", "1", "--", "--chat-template", "./x.jinja")
    away = f"service: {{}}\nworkdir: {tmp_path}\nrun: cd /srv/../srv; sglang serve a/b"
    assert made(away).invocation(1, 1).workdir == Path("/srv")


def test_port_of_each_replica() -> None:
    """Each replica has its own port wherever the script uses it."""
    run = "export LOG=log-$GROUNDSERVE_PORT; sglang serve a/b --port $GROUNDSERVE_PORT --x $GROUNDSERVE_PORT"
    command = made(f"service: {{replicas: 2}}\nrun: {run}").invocation(1, 20500)
    assert command.argv[5:] == ("a/b", "--port", "20500", "--", "--x", "20500")
    assert command.envs["LOG"] == "log-20500"


def test_scripts_that_are_not_understood() -> None:
    """A script with SGLang that is not understood runs unchanged, with a warning that says why."""
    run = "sglang serve a/b --port ${GROUNDSERVE_PORT:-8000} 2>&1 | tee log"
    why = "run: it starts SGLang in a way that is not understood: it has a > in it"
    piped = made(f"service: {{replicas: 2}}\nrun: {run}")
    assert (piped.launch, piped.notes) == (None, (f"x.yaml: {why}, so bash runs it as it is",))
    fixed = "service: {replicas: 2}\nresources: {ports: 8000}\nrun: sglang serve a/b --port 8000 | tee log"
    assert refusal(fixed).endswith(
        "or ask for one replica (it starts SGLang in a way that is not understood: it has a | in it)"
    )
    assert made("service: {}\nrun: vllm serve --port $GROUNDSERVE_PORT | tee log").notes == ()


@pytest.mark.parametrize("model", ["x" * 300, "~nobody-of-that-name/x", "a" * 5000 + "/b"])
def test_a_model_that_can_be_no_folder_is_a_name(model: str) -> None:
    assert made(f"service: {{}}\nrun: sglang serve '{model}'").invocation(1, 1).argv[5] == model


def test_any_other_script_is_run_as_it_is() -> None:
    script = made("service: {}\nworkdir: /srv\nenvs: {A: 1}\nrun: serve --port ${GROUNDSERVE_PORT:-8000}\n")
    command = script.invocation(2, 20501)
    assert command.argv == ("bash", "-c", "serve --port ${GROUNDSERVE_PORT:-8000}")
    assert command.workdir == Path("/srv")
    assert (command.envs["A"], command.envs["GROUNDSERVE_PORT"]) == ("1", "20501")
    assert "PYTHONPATH" not in command.envs
    assert script.fixed_port is None


def test_a_script_with_a_port_of_its_own_can_have_one_replica() -> None:
    assert made("service: {ports: 8000}\nrun: serve").fixed_port == 8000
    two = "service: {replicas: 2}\nresources: {ports: 8000}\nrun: serve"
    assert "all replicas would listen on port 8000" in refusal(two)
    unbounded = "service: {ports: 8000, replica_policy: {min_replicas: 1, target_qps_per_replica: 1}}\nrun: serve"
    assert "all replicas would listen on port 8000" in refusal(unbounded)
    assert "nothing says where a replica listens" in refusal("service: {}\nrun: serve")


def test_default_readiness_probe() -> None:
    """Without a readiness probe in the file, SGLang's own is used."""
    assert made("service: {}\nrun: sglang serve --model-path a/b").readiness_probe.path == "/health"
    assert made("service: {ports: 1}\nrun: serve").readiness_probe.path == "/"
    assert made("service: {ports: 1, readiness_probe: /up}\nrun: serve").readiness_probe.path == "/up"


def test_a_variable_without_a_value_is_asked_for() -> None:
    text = "service: {}\nenvs: {HF_TOKEN: }\nrun: sglang serve --model-path a/b"
    assert refusal(text) == "x.yaml: HF_TOKEN has no value: give it with --env HF_TOKEN=VALUE"
    assert made(text, HF_TOKEN="x").invocation(1, 1).envs["HF_TOKEN"] == "x"


def test_no_secret_is_in_a_recipes_repr() -> None:
    text = "service: {}\nenvs: {HF_TOKEN: }\nrun: sglang serve --model-path a/b"
    token = made(text, HF_TOKEN="hush")
    assert "hush" not in repr(token) + repr(token.invocation(1, 1))


SHARES = "service: {}\nx-groundserve: {gpu_share: true}\nrun: "


def test_service_that_shares_gpus() -> None:
    """A service that shares GPUs tells its replicas so and gives them time for a turn."""
    envs = made(f"{SHARES}sglang serve --model-path a/b --port 8000").envs(1, 8000)
    assert (envs["GPU_SHARE"], envs["LEASE_WAIT"]) == ("yes", "30")
    assert "GPU_SHARE" not in made("service: {}\nrun: sglang serve --model-path a/b --port 8000").envs(1, 8000)


def test_a_program_that_cannot_give_its_memory_back_cannot_share() -> None:
    said = refusal(f"{SHARES}vllm serve a/b --port ${{GROUNDSERVE_PORT:-8000}}")
    assert "x-groundserve.gpu_share: only SGLang as groundserve starts it can give its memory back" in said
