"""What all of a service's objects in Kubernetes share: their names, labels and ports. Pure; API 1.20 to 1.37.

Everything of a service bears its name, and the labels by which `kubectl get -l` finds it.
"""

import json
import re
from collections.abc import Collection
from typing import Any

from balancer.errors import ConfigError
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state import keys
from balancer.spec.kubernetes import MODELS, Kubernetes
from balancer.spec.service_file import Spec

Object = dict[str, Any]

# Ports of the images: a replica's, the balancer's endpoint and its admin port.
PORT, ENDPOINT_PORT, ADMIN_PORT = 8000, 30001, 30002
# A replica's labels, as Compose's engine has them.
ID, VERSION, DIGEST = "groundserve.id", "groundserve.version", "groundserve.digest"
# Of a replica on several nodes, also how many these are. The pod of each one but the first has a component of its own,
# so that nobody sends it a request, and its rank.
NODES, RANK, PART = "groundserve.nodes", "groundserve.rank", "part"
# The names of the keys in the Secret, and of the files in its volume.
ADMIN_KEY, REPLICA_KEY, API_KEYS = "admin.key", "replica.key", "api-keys"
# Set in the pod of the cluster's own controller, which Kubernetes starts again.
IS_KEPT_UP = "GROUNDSERVE_IS_KEPT_UP"
# In the ConfigMap that the controller writes: what the service is meant to be, which outlives the controller's pod.
DESIRED = "desired.json"
# What the section says of a replica's pod, and not only of how it comes to its image.
_OF_A_POD = {
    "image", "models", "gpu_resource", "runtime_class", "node_selector", "tolerations", "shared_memory",
}  # fmt: skip
# Seconds that a pod gets beyond what it may need to end in order.
MARGIN = 30


def of(spec: Spec) -> Kubernetes:
    """The file's section about Kubernetes. Raises ConfigError if there is none, or the service cannot run there."""
    section = spec.operation.kubernetes
    if section is None:
        raise ConfigError(
            f"{spec.source}: x-groundserve.kubernetes is missing: it names at least the image and the balancer_image"
        )
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", spec.name):
        raise ConfigError(
            f"{spec.source}: {spec.name} cannot be a name on Kubernetes: give -n NAME with lower-case letters, digits "
            "and '-', at most 40"
        )
    if spec.tls is not None:
        raise ConfigError(f"{spec.source}: service.tls: on Kubernetes, an Ingress has the certificate: leave it out")
    if spec.operation.gpu_share:
        raise ConfigError(f"{spec.source}: x-groundserve.gpu_share: pods do not share GPUs: use --on local or compose")
    return section


def check(recipe: Recipe) -> Kubernetes:
    """The same for a service that is to be started: its `run:` has to start SGLang, with a model that pods have."""
    section = of(recipe.spec)
    if recipe.launch is None:
        raise ConfigError(
            f"{recipe.spec.source}: run: starts no SGLang that is understood, and a pod runs the replica's image: use "
            "--on local"
        )
    model = recipe.launch.model
    if model.startswith(("/", ".", "~")) and not model.startswith(f"{MODELS}/"):
        raise ConfigError(
            f"{recipe.spec.source}: run: a pod has models under {MODELS} only, where x-groundserve.kubernetes.models "
            f"puts them, and not {model}"
        )
    return section


def surroundings(recipe: Recipe) -> str:
    """What of the file goes into a pod besides its command and variables: with another of these it is another pod.

    Defaults are left out: with another key that nobody has used yet it is the same pod.
    """
    section = of(recipe.spec).model_dump(mode="json", include=_OF_A_POD, exclude_defaults=True)
    return json.dumps([recipe.spec.cpus, recipe.spec.memory, section], sort_keys=True)


def everything_of(name: str) -> str:
    """For `kubectl delete -l`."""
    return f"app.kubernetes.io/name=groundserve,app.kubernetes.io/instance={name}"


def pod_name(name: str, id: int, rank: int = 0) -> str:
    return f"{name}-{id}-part{rank}" if rank else f"{name}-{id}"


def config_map_name(name: str) -> str:
    return f"{name}-service"


def state_name(name: str) -> str:
    return f"{name}-state"


def secrets_name(name: str) -> str:
    return f"{name}-secrets"


def secrets_but(name: str, digests: Collection[str]) -> str:
    """For `kubectl delete -l`: the Secrets of all recipes but those with one of these digests."""
    others = f",{DIGEST} notin ({','.join(sorted(digests))})" if digests else ""
    return f"{everything_of(name)},{DIGEST}{others}"


def replicas_name(name: str) -> str:
    return f"{name}-replica"


def balancers_name(name: str) -> str:
    return f"{name}-balancer"


def endpoint(spec: Spec) -> str:
    """HOST:PORT within the cluster."""
    return f"{spec.name}.{of(spec).namespace}.svc:{ENDPOINT_PORT}"


def has_replica_key(recipe: Recipe) -> bool:
    """Do its replicas require a key of ours? Not where the file configures keys itself."""
    return not keys.brings_its_own(recipe, {})


def named(api: str, kind: str, name: str, of_service: Spec, component: str = "", **content: Any) -> Object:
    metadata = {"name": name, "namespace": of(of_service).namespace, "labels": labels_of(of_service.name, component)}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **content}


def owned_by(name: str, uid: str) -> Object:
    """Says that something goes with the service's ConfigMap, which has this uid."""
    return {"apiVersion": "v1", "kind": "ConfigMap", "name": config_map_name(name), "uid": uid}


def labels_of(name: str, component: str = "") -> dict[str, str]:
    labels = {"app.kubernetes.io/name": "groundserve", "app.kubernetes.io/instance": name}
    return {**labels, "app.kubernetes.io/component": component} if component else labels


def pull_secret(section: Kubernetes) -> Object:
    return {"imagePullSecrets": [{"name": section.pull_secret}]} if section.pull_secret is not None else {}


def locked_down() -> Object:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
