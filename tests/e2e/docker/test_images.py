"""What the images and compose files are made of."""

import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.docker.conftest import CPU_FILES, LAB_FILES
from tests.e2e.docker.project import ROOT, TAG, CommandError, Project, docker

pytestmark = pytest.mark.docker

MB = 1_000_000
DOCKERFILES = sorted(ROOT.glob("docker/*.Dockerfile")) + sorted((ROOT / "tests").rglob("*.Dockerfile"))
OVERLAYS = tuple(f"docker/compose.{name}.yaml" for name in ("cpu", "keys", "monitoring", "tls", "two-models"))
COMBINATIONS = [some for count in range(6) for some in itertools.combinations(OVERLAYS, count)]


def inspect_image(name: str) -> dict[str, Any]:
    return dict(json.loads(docker("image", "inspect", name))[0])


def config(*overlays: str, **environ: str) -> dict[str, Any]:
    """What Compose makes of compose.yaml and overlays."""
    files = ("compose.yaml", *overlays)
    project = Project(
        "groundserve-test-config",
        files,
        {
            "TLS_DIR": "/certificates",
            "KEYS_DIR": "/some-keys",
            "MODEL_2": "a/second",
            **dict.fromkeys(("PORT", "ADMIN_PORT", "LEASE_VOLUME"), ""),
        },
    )
    return dict(json.loads(project.compose("config", "--format", "json", **environ)))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, dockerfile], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_balancer_image_is_small(lab_images: Project) -> None:
    """The balancer's image adds less than 150 MB to its base, and contains nothing of replica or command."""
    assert lab_images.files == LAB_FILES
    base, image = inspect_image("python:3.11-slim"), inspect_image(f"groundserve/balancer:{TAG}")
    added = (image["Size"] - base["Size"]) / MB
    assert 1 < added < 150
    listing = "import json, os; print(json.dumps([sorted(os.listdir('.')), sorted(os.listdir('balancer'))]))"
    run = ("run", "--rm", "--network", "none", "--read-only", "--entrypoint", "python3", image["Id"], "-c", listing)
    here, package = json.loads(docker(*run))
    assert here == ["balancer", "healthcheck.py"]
    assert "app.py" in package
    assert {"operate", "cli.py"}.isdisjoint(package), "the command that starts services is not the balancer's"
    assert "__pycache__" in package, "compiled at the build, since a read-only file system cannot be written to"


@pytest.mark.parametrize("name", ["groundserve/balancer", "groundserve-test/replica", "groundserve/replica-cpu"])
def test_images_metadata_user_and_healthcheck(lab_images: Project, cpu_images: Project, name: str) -> None:
    """Images have labels, run as an unprivileged user and check their health without a shell."""
    assert (lab_images.files, cpu_images.files) == (LAB_FILES, CPU_FILES)
    told = inspect_image(f"{name}:{TAG}")["Config"]
    assert told["User"] == "1000:1000"
    assert told["Healthcheck"]["Test"][:2] == ["CMD", "python3"]
    assert told["Labels"]["org.opencontainers.image.title"].startswith("groundserve")
    assert told["Labels"]["org.opencontainers.image.description"]
    assert told["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert told["Labels"]["org.opencontainers.image.version"] == project["version"]


def test_bases_and_third_party_images_are_pinned() -> None:
    for dockerfile in DOCKERFILES:
        defaults = re.findall(r"^ARG \w+_IMAGE=(\S+)", dockerfile.read_text(), re.MULTILINE)
        assert defaults
        assert all(re.search(r":\D*\d", default) or default.endswith(f":{TAG}") for default in defaults), defaults
    images = {name: service["image"] for name, service in config(*OVERLAYS)["services"].items()}
    for name in ("prometheus", "grafana"):
        assert re.search(r":v?\d+\.\d+\.\d+$", images[name]), images[name]


@pytest.mark.parametrize("overlays", COMBINATIONS, ids=lambda some: "+".join(Path(one).stem for one in some) or "none")
def test_compose_takes_each_combination_of_overlays(overlays: tuple[str, ...]) -> None:
    told = config(*overlays)
    services, replica, balancer = told["services"], told["services"]["replica"], told["services"]["balancer"]
    is_cpu = "docker/compose.cpu.yaml" in overlays
    devices = replica["deploy"].get("resources", {}).get("reservations", {}).get("devices")
    expected = None if is_cpu else [{"driver": "nvidia", "count": -1, "capabilities": ["gpu"]}]
    assert devices == expected
    assert replica.get("ipc") == (None if is_cpu else "host")
    assert replica["environment"]["MODEL"] == ("smollm2-135m" if is_cpu else "llava-v1.6-vicuna-7b")
    assert replica["build"]["dockerfile"] == f"docker/replica{'-cpu' if is_cpu else ''}.Dockerfile"
    for service in services.values():
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", []))
        assert service["restart"] == "unless-stopped"
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
    assert [port["published"] for port in balancer["ports"]] == ["30001", "30002"]
    assert balancer["read_only"] is True
    assert balancer["pull_policy"] == replica["pull_policy"] == "never", "nobody else's image of that name"
    assert ("BALANCER_TLS_CERT" in balancer["environment"]) == ("docker/compose.tls.yaml" in overlays)
    assert ({"prometheus", "grafana"} <= set(services)) == ("docker/compose.monitoring.yaml" in overlays)
    assert told["volumes"]["leases"]["name"] == "groundserve-leases", "one for all projects of the machine"


def test_a_file_of_variables_makes_another_service_of_it(tmp_path: Path) -> None:
    given = (
        "COMPOSE_PROJECT_NAME=llama",
        "COMPOSE_FILE=compose.yaml:docker/compose.cpu.yaml",
        "MODEL=tiny-llava",
        "PORT=8",
    )
    (tmp_path / "llama.env").write_text("\n".join(given))
    asked = docker("compose", "--env-file", str(tmp_path / "llama.env"), "config", "--format", "json")
    told = json.loads(asked)
    assert told["name"] == "llama"
    assert told["services"]["replica"]["image"].startswith("groundserve/replica-cpu:")
    assert told["services"]["replica"]["environment"]["MODEL"] == "tiny-llava"
    assert told["services"]["balancer"]["ports"][0]["published"] == "8"
    assert told["volumes"]["leases"]["name"] == "groundserve-leases"


def test_what_stops_has_longer_than_its_drain() -> None:
    services = config()["services"]
    drain_timeout = re.search(r"drain_timeout=(\d+)", services["balancer"]["environment"]["BALANCER_SET"])
    assert drain_timeout
    for service in services.values():
        minutes, seconds = re.fullmatch(r"(\d+)m(\d+)s", service["stop_grace_period"]).groups()
        assert int(minutes) * 60 + int(seconds) > 5 + int(drain_timeout[1]) + 5


def test_published_ports() -> None:
    """The endpoint is published at BIND's address, the admin port only on loopback."""
    balancer = config(BIND="0.0.0.0", PORT="8080")["services"]["balancer"]
    ports = {port["target"]: port for port in balancer["ports"]}
    assert (ports[30001]["host_ip"], ports[30001]["published"]) == ("0.0.0.0", "8080")
    assert ports[30002]["host_ip"] == "127.0.0.1"
    for told, where in ((balancer, "0.0.0.0"), (config()["services"]["balancer"], "127.0.0.1")):
        assert told["environment"]["BALANCER_PUBLISHED"] == where, "it refuses public names where it should"
        assert told["environment"]["BALANCER_ADMIN_PUBLISHED"] == "127.0.0.1"


def test_tls_without_a_folder_says_what_is_missing() -> None:
    project = Project("groundserve-test-config", ("compose.yaml", "docker/compose.tls.yaml"))
    with pytest.raises(CommandError, match="set TLS_DIR to the folder that holds the certificate and its key"):
        project.compose("config")


def test_env_example_explains_every_variable_and_no_other() -> None:
    used: dict[str, set[str]] = {}
    for file in ("compose.yaml", *OVERLAYS):
        for name, _, default in re.findall(r"\$\{([A-Z_\d]+)(:[-?+]([^{}]*))?\}", (ROOT / file).read_text()):
            used.setdefault(name, set()).add(default)
    explained = dict(re.findall(r"^#([A-Z_\d]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert set(explained) == set(used)
    # These show what could be given instead of the default.
    examples = {"SGLANG_ARGS", "SGLANG_ARGS_2", "BALANCER_SET", "LEASE_FOLDER", "OTLP"}
    for name, shown in explained.items():
        assert name in examples or not shown or shown in used[name], f"{name}={shown}, but the default is {used[name]}"


def test_the_gpu_image_prints_lease_and_command(lab_images: Project) -> None:
    """docker/replica.Dockerfile upon a stand-in for SGLang's image: all but SGLang and a GPU is real."""
    run = ("run", "--rm", "--no-deps", "-T")
    said = lab_images.compose(*run, "-e", "MODEL=llava-v1.6-vicuna-7b", "replica", "--dry-run", GPUS_PER_REPLICA="2")
    assert said.startswith("replica: GPU 0 (pretended GPU, GPU-pretended-0), GPU 1 (pretended GPU, GPU-pretended-1): ")
    assert "-m sglang.launch_server --model-path liuhaotian/llava-v1.6-vicuna-7b" in said
    assert "--host 0.0.0.0 --port 8000" in said
    assert "--tp-size 2" in said
    listed = "from importlib.metadata import entry_points as e; print([p.value for p in e(group='sglang.srt.plugins')])"
    found = lab_images.compose(*run, "--entrypoint", "python3", "replica", "-c", listed)
    assert yaml.safe_load(found) == ["replica.plugin:register_hooks"], "SGLang will find the plug-in"


def test_the_gpu_image_without_a_gpu_says_so(lab_images: Project) -> None:
    with pytest.raises(
        CommandError, match="0 NVIDIA GPUs can be leased here, but this replica needs 1: check nvidia-smi"
    ):
        lab_images.compose("run", "--rm", "--no-deps", "-T", "replica", "--dry-run", PRETEND_GPUS="0")
