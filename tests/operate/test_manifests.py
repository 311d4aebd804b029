"""`groundserve manifests`: what it prints is valid for each version of Kubernetes, and says what the file says."""

import base64
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from balancer import cli
from balancer.operate.engines.kubernetes import objects, replica_pods, standing
from balancer.operate.recipe.recipe import Recipe, recipe
from balancer.spec.service_file import parse

VERSIONS = [f"1.{minor}" for minor in range(25, 38)]
FILE = """\
name: llava
service: {readiness_probe: /health, replicas: 2}
resources: {accelerators: "L4:2", memory: 32, cpus: 4}
envs: {PRICE: "$(5)"}
secrets: {HF_TOKEN: }
x-groundserve:
  drain_timeout: 100
  kubernetes:
    image: registry.lab/groundserve/replica:0.2
    balancer_image: registry.lab/groundserve/balancer:0.2
    controller_image: registry.lab/groundserve/controller:0.2
    namespace: models
    models: {claim: models}
    pull_secret: registry
    runtime_class: nvidia
    tolerations: [{key: gpu, operator: Exists}]
run: python -m replica --model llava-v1.6-vicuna-7b
"""
ON_TWO = FILE.replace("run: python", "num_nodes: 2\nrun: python")
SECRET = "it's a \\ secret"

Object = Mapping[str, Any]
Manifests = Callable[..., list[Object]]


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Manifests:
    """What the command prints for this file and these flags."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def manifests(*flags: str, text: str = FILE) -> list[Object]:
        file = tmp_path / "llava.yaml"
        file.write_text(text)
        secret = ("--secret", f"HF_TOKEN={SECRET}")
        assert cli.main(["manifests", str(file), *secret, *(flags or ("--open",))]) == 0, capsys.readouterr().err
        return list(yaml.safe_load_all(capsys.readouterr().out))

    return manifests


def made(text: str = FILE) -> Recipe:
    return recipe(parse(text, source="llava.yaml", secrets={"HF_TOKEN": SECRET}))


def named(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = (one for one in objects if one["kind"] == kind and one["metadata"]["name"] == name)
    return found


def check(object: Object, version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kubernetes_validate.validate(object, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_each_object_is_valid_for_kubernetes(printed: Manifests, version: str) -> None:
    printed_objects = printed("--open", "--kubernetes", version)
    assert len(printed_objects) == 12
    for one in (
        *printed_objects,
        *replica_pods.pods_of(1, made(), "uid", "llava-secrets"),
        standing.secret_of_pods("llava-secrets-0f3a", made(), {"HF_TOKEN": SECRET}, "uid"),
        *replica_pods.pods_of(1, made(ON_TWO), "uid", "llava-secrets"),
    ):
        check(one, version)


def test_a_typing_error_would_be_found() -> None:
    (pod,) = replica_pods.pods_of(1, made(), "uid", "llava-secrets")
    pod["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check(pod, "1.37")


def test_a_pod_has_what_the_file_asks_for() -> None:
    (pod,) = replica_pods.pods_of(7, made(), "uid", "llava-secrets")
    container, spec = pod["spec"]["containers"][0], pod["spec"]
    assert pod["metadata"]["name"] == "llava-7"
    assert container["resources"] == {"requests": {"cpu": "4", "memory": "32G"}, "limits": {"nvidia.com/gpu": "2"}}
    assert {"name": "PRICE", "value": "$$(5)"} in container["env"]
    assert spec["restartPolicy"] == "Never"
    assert spec["terminationGracePeriodSeconds"] == 130
    assert spec["runtimeClassName"] == "nvidia"
    assert {"name": "models", "persistentVolumeClaim": {"claimName": "models"}} in spec["volumes"]
    shared = next(volume for volume in spec["volumes"] if volume["name"] == "shared-memory")
    assert shared["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    (kinds, unlabelled) = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert kinds["matchExpressions"][0]["values"] == ["l4"]
    assert unlabelled["matchExpressions"][0]["operator"] == "DoesNotExist"


def test_a_pod_has_a_controller_so_that_a_drain_evicts_it() -> None:
    (pod,) = replica_pods.pods_of(7, made(), "uid", "llava-secrets")
    (owner,) = pod["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"], owner["controller"]) == (
        "ConfigMap",
        "llava-service",
        "uid",
        True,
    )


def test_a_replica_on_two_nodes_is_a_pod_on_each() -> None:
    """The first one serves and has a name, at which they meet; nobody else sends the other one a request."""
    first, other = replica_pods.pods_of(7, made(ON_TWO), "uid", "llava-secrets")
    assert [pod["metadata"]["name"] for pod in (first, other)] == ["llava-7", "llava-7-part1"]
    assert [pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in (first, other)] == ["replica", "part"]
    assert (first["spec"]["hostname"], first["spec"]["subdomain"]) == ("llava-7", "llava-replica")
    for rank, pod in enumerate((first, other)):
        container = pod["spec"]["containers"][0]
        meeting = ["--nnodes", "2", "--node-rank", str(rank), "--dist-init-addr", "llava-7.llava-replica:20000"]
        assert container["args"][-9:] == ["--", *meeting, "--tp-size", "4"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}
        assert {"name": "SKYPILOT_NODE_RANK", "value": str(rank)} in container["env"]
        (apart,) = pod["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert apart["labelSelector"]["matchLabels"] == {"app.kubernetes.io/instance": "llava", objects.ID: "7"}
        assert "nodeAffinity" in pod["spec"]["affinity"]
    stays = other["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert stays == ["sleep", "100"], "while the first one finishes its answers"
    assert "lifecycle" not in first["spec"]["containers"][0]


def test_a_secret_is_in_the_secret_and_nowhere_else(printed: Manifests) -> None:
    everything = printed()
    secret = named(everything, "Secret", "llava-secrets")["data"]
    assert base64.b64decode(secret["HF_TOKEN"]).decode() == SECRET
    assert base64.b64decode(secret["secrets.env"]).decode() == "HF_TOKEN='it\\'s a \\\\ secret'\n"
    others = yaml.safe_dump([one for one in everything if one["kind"] != "Secret"])
    (pod,) = replica_pods.pods_of(1, made(), "uid", "llava-secrets")
    assert "it's a" not in others + yaml.safe_dump(pod)
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "llava-secrets", "key": "HF_TOKEN"}}} in pod[
        "spec"
    ]["containers"][0]["env"]


def test_a_key_among_the_flags_is_in_the_secret_only(printed: Manifests) -> None:
    """A pod is shown to more people than a Secret."""
    text = f'{FILE.rstrip()} -- --admin-api-key "$HF_TOKEN"\n'
    everything = printed(text=text)
    assert (
        base64.b64decode(named(everything, "Secret", "llava-secrets")["data"]["GROUNDSERVE_SECRET_1"])
        == SECRET.encode()
    )
    pod = yaml.safe_dump(replica_pods.pods_of(1, made(text), "uid", "llava-secrets"))
    assert "it's a" not in pod + yaml.safe_dump([one for one in everything if one["kind"] != "Secret"])


def test_a_secret_in_the_file_is_printed_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without Secrets, the ConfigMap still has the whole file."""
    (tmp_path / "llava.yaml").write_text(FILE.replace("HF_TOKEN: }", "HF_TOKEN: sesame}"))
    assert cli.main(["manifests", str(tmp_path / "llava.yaml"), "--open", "--no-secrets"]) == 1
    assert "sesame" not in "".join(capsys.readouterr())


def test_the_controller_may_look_after_pods_only(printed: Manifests) -> None:
    rules = named(printed(), "Role", "llava-controller")["rules"]
    assert {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]} == {
        *(("pods", verb) for verb in ("get", "list", "create", "delete")),
        ("pods/log", "get"),
        ("configmaps", "get"),
        ("configmaps", "patch"),
    }
    (written,) = (rule for rule in rules if "patch" in rule["verbs"])
    assert written["resourceNames"] == ["llava-state"]
    assert "data" not in named(printed(), "ConfigMap", "llava-state"), (
        "applied again, it stays as the controller left it"
    )


@pytest.mark.parametrize(
    ("version", "api"), [("1.20", "policy/v1beta1"), ("v1.21.3", "policy/v1"), ("1.37", "policy/v1")]
)
def test_the_disruption_budget_is_of_the_api_that_has_it(printed: Manifests, version: str, api: str) -> None:
    budget = named(printed("--open", "--kubernetes", version), "PodDisruptionBudget", "llava-balancer")
    assert budget["apiVersion"] == api


def test_the_same_keys_are_printed_each_time(printed: Manifests) -> None:
    assert printed() == printed()
    assert not [one for one in printed("--open", "--no-secrets") if one["kind"] == "Secret"]


def test_without_secrets_it_takes_no_keys_yet_lets_nobody_in(printed: Manifests, tmp_path: Path) -> None:
    objects = printed("--no-secrets")
    assert not [one for one in objects if one["kind"] == "Secret"]
    (tmp_path / "keys.txt").write_text("a-key")
    assert objects == printed("--no-secrets", "--api-keys", str(tmp_path / "keys.txt"))
    for name in ("llava-balancer", "llava-controller"):
        (container,) = named(objects, "Deployment", name)["spec"]["template"]["spec"]["containers"]
        assert "--open" not in container["args"]
        assert "/keys/api-keys" in container["args"]


def test_a_service_that_sleeps_is_reached_without_a_replica(printed: Manifests) -> None:
    policy = "replica_policy: {min_replicas: 0, max_replicas: 2, target_qps_per_replica: 1}"
    deployment = named(printed(text=FILE.replace("replicas: 2", policy)), "Deployment", "llava-balancer")
    assert "tcpSocket" in deployment["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name: llava", "name: My_Model"), "My_Model cannot be a name on Kubernetes"),
        (("    models: {claim: models}", "    models: {}"), "should have either claim or host_path"),
        (("    image: registry.lab/groundserve/replica:0.2\n", ""), "lacks 'image'"),
        (("    namespace: models", "    namespce: models"), "the nearest known key is 'namespace'"),
        (("    namespace: models", "    namespace: My Models"), "should be a name of Kubernetes"),
        (("HF_TOKEN: }", "HF_TOKEN: abc}"), "secrets.HF_TOKEN has its value in the file"),
        (("envs: {", "envs: {WANDB_KEY: abc, "), "envs.WANDB_KEY has its value in the file"),
        (("run: python -m replica", "run: SGLANG_API_KEY=abc python -m replica"), "run: has a key in it"),
        (("--model llava-v1.6-vicuna-7b", "--model /srv/llava"), "a pod has models under /huggingface only"),
        (("run: python -m replica --model llava-v1.6-vicuna-7b", "run: echo"), "nothing says where a replica listens"),
        (("  drain_timeout: 100", "  gpu_share: true"), "pods do not share GPUs"),
    ],
)
def test_a_file_that_cannot_be_served_is_refused(
    change: tuple[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "llava.yaml").write_text(FILE.replace(*change))
    assert cli.main(["manifests", str(tmp_path / "llava.yaml"), "--secret", "HF_TOKEN=x", "--open"]) == 1
    assert message in capsys.readouterr().err


def test_who_may_use_it_has_to_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "llava.yaml").write_text(FILE)
    assert cli.main(["manifests", str(tmp_path / "llava.yaml"), "--secret", "HF_TOKEN=x"]) == 1
    assert "give --api-keys FILE, or say --open" in capsys.readouterr().err
