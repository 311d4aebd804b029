"""The pods of one replica. Pure.

They are bare, because a Deployment cannot stop a certain one. The service's ConfigMap owns them: where it is deleted,
they go too.
"""

import math
from collections.abc import Mapping

from balancer.operate.engines.kubernetes.objects import (
    DIGEST,
    ID,
    MARGIN,
    NODES,
    PART,
    PORT,
    RANK,
    REPLICA_KEY,
    VERSION,
    Object,
    check,
    has_replica_key,
    named,
    owned_by,
    pod_name,
    pull_secret,
    replicas_name,
)
from balancer.operate.recipe.recipe import NODE_RANK, Recipe
from balancer.operate.state import keys
from balancer.spec.kubernetes import MODELS, Kubernetes

_MEETING_PORT = 20000
# SkyPilot's label of a node with GPUs, which names their kind.
_KIND = "skypilot.co/accelerator"


def pods_of(id: int, recipe: Recipe, owner: str, secret: str) -> list[Object]:
    """The pods of one replica, one for each node that it runs on; the first one serves. `owner` is the uid of the
    ConfigMap, `secret` the name of the Secret with the recipe's variables that are secrets.
    """
    return [_pod(id, rank, recipe, owner, secret) for rank in range(recipe.spec.num_nodes)]


def _pod(id: int, rank: int, recipe: Recipe, owner: str, secret: str) -> Object:
    spec, section = recipe.spec, check(recipe)
    meeting = f"{pod_name(spec.name, id)}.{replicas_name(spec.name)}:{_MEETING_PORT}"
    container: Object = {
        "name": "replica",
        "image": section.image,
        "args": [_literal(part) for part in (*recipe.arguments(PORT), *recipe.among_nodes(str(rank), meeting))],
        "env": _environment(id, recipe, secret),
        "ports": [{"containerPort": PORT}],
        "resources": _resources(recipe, section),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        # Its last words, for the reason of its end.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "leases", "mountPath": "/leases"},
        ],
    }
    # SGLang's processes pass tensors through shared memory, and a container's own has 64 MB.
    volumes: list[Object] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": section.shared_memory}},
        {"name": "leases", "emptyDir": {}},
    ]
    if has_replica_key(recipe):
        items = [{"key": REPLICA_KEY, "path": REPLICA_KEY}]
        volumes.append({"name": "keys", "secret": {"secretName": f"{spec.name}-keys", "items": items}})
        container["volumeMounts"].append({"name": "keys", "mountPath": "/keys", "readOnly": True})
        container["env"].append({"name": keys.KEY_FILE, "value": f"/keys/{REPLICA_KEY}"})
    if (models := section.models) is not None:
        source: Object = {"persistentVolumeClaim": {"claimName": models.claim}}
        if models.host_path is not None:
            source = {"hostPath": {"path": models.host_path}}
        volumes.append({"name": "models", **source})
        container["volumeMounts"].append({"name": "models", "mountPath": MODELS})
    pod: Object = {
        "restartPolicy": "Never",  # only the controller starts replicas again, with a pause and a limit
        # A replica that is told to end finishes its answers first.
        "terminationGracePeriodSeconds": math.ceil(spec.settings.drain_timeout) + MARGIN,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "containers": [container],
        "volumes": volumes,
        **pull_secret(section),
    }
    if section.runtime_class is not None:
        pod["runtimeClassName"] = section.runtime_class
    if section.node_selector:
        pod["nodeSelector"] = section.node_selector
    elif spec.accelerators and recipe.gpus:
        pod["affinity"] = _of_kind(spec.accelerators)
    if section.tolerations:
        pod["tolerations"] = [toleration.as_in_a_pod() for toleration in section.tolerations]
    labels = {ID: str(id), VERSION: str(recipe.version), DIGEST: recipe.digest}
    if spec.num_nodes > 1:
        labels |= {NODES: str(spec.num_nodes), RANK: str(rank)}
        container["env"].append({"name": NODE_RANK, "value": str(rank)})
        if rank:
            # A part that somebody tells to end, in a drain, stays until the first one has finished its answers.
            staying = ["sleep", str(math.ceil(spec.settings.drain_timeout))]
            container["lifecycle"] = {"preStop": {"exec": {"command": staying}}}
        # The first pod's name in DNS, which the headless Service gives it, is where all of them meet.
        pod |= {"hostname": pod_name(spec.name, id, rank), "subdomain": replicas_name(spec.name)}
        pod["affinity"] = pod.get("affinity", {}) | _apart(spec.name, id)
    made = named("v1", "Pod", pod_name(spec.name, id, rank), spec, PART if rank else "replica", spec=pod)
    made["metadata"]["labels"] |= labels
    # `kubectl drain` leaves alone what nobody is said to control, and gives up.
    made["metadata"]["ownerReferences"] = [owned_by(spec.name, owner) | {"controller": True}]
    return made


def _environment(id: int, recipe: Recipe, secret: str) -> list[Object]:
    """Its variables; those that are secrets come from the Secret, so that a pod does not show them."""
    return [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name}}}
        if name in recipe.secrets
        else {"name": name, "value": _literal(value)}
        for name, value in recipe.envs(id, PORT).items()
    ]


def _resources(recipe: Recipe, section: Kubernetes) -> Object:
    requests: Object = {}
    if recipe.spec.cpus is not None:
        requests["cpu"] = f"{recipe.spec.cpus:g}"
    if recipe.spec.memory is not None:
        requests["memory"] = f"{math.ceil(recipe.spec.memory)}G"
    gpus = {section.gpu_resource: str(recipe.gpus)} if recipe.gpus else {}
    return {**({"requests": requests} if requests else {}), **({"limits": gpus} if gpus else {})}


def _of_kind(accelerators: Mapping[str, int]) -> Object:
    """Nodes that SkyPilot labelled with one of these kinds, or that bear no such label."""
    kinds = sorted(kind.lower() for kind in accelerators)
    terms = [
        {"matchExpressions": [{"key": _KIND, "operator": "In", "values": kinds}]},
        {"matchExpressions": [{"key": _KIND, "operator": "DoesNotExist"}]},
    ]
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


def _apart(name: str, id: int) -> Object:
    """On a node that has no other pod of this replica."""
    labels = {"app.kubernetes.io/instance": name, ID: str(id)}
    term = {"labelSelector": {"matchLabels": labels}, "topologyKey": "kubernetes.io/hostname"}
    return {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def _literal(text: str) -> str:
    """Escapes dollars: Kubernetes expands $(NAME)."""
    return text.replace("$", "$$")
