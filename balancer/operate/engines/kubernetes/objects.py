"""A service as Kubernetes' objects: what stands in a cluster, and the pod of one replica. Pure; API 1.20 to 1.37.

Everything of a service bears its name, and the labels by which `kubectl get -l` finds it. Replicas are bare pods,
because a Deployment cannot stop a certain one. The ConfigMap owns them: where it is deleted, they go too.
"""

import base64
import hashlib
import math
import re
from collections.abc import Mapping
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
# The names of the keys in the Secret, and of the files in its volume.
ADMIN_KEY, REPLICA_KEY, API_KEYS = "admin.key", "replica.key", "api-keys"
# Set in the pod of `controller`, which Kubernetes starts again. Other pods may have this command, too, for people.
IS_KEPT_UP = "GROUNDSERVE_IS_KEPT_UP"
# In the other Secret: all of its names and values as a file, for --secret-file.
_AS_A_FILE = "secrets.env"
# Seconds that a pod gets beyond what it may need to end in order.
_MARGIN = 30
# SkyPilot's label of a node with GPUs, which names their kind.
_KIND = "skypilot.co/accelerator"
# The newest version of Kubernetes whose PodDisruptionBudget is policy/v1beta1; from the next one on there is policy/v1.
_LAST_BETA = (1, 20)


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


def selector(name: str, component: str) -> str:
    """For `kubectl get -l`."""
    return ",".join(f"{key}={value}" for key, value in _labels(name, component).items())


def everything_of(name: str) -> str:
    """For `kubectl delete -l`."""
    return f"app.kubernetes.io/name=groundserve,app.kubernetes.io/instance={name}"


def pod_name(name: str, id: int) -> str:
    return f"{name}-{id}"


def config_map_name(name: str) -> str:
    return f"{name}-service"


def balancers_name(name: str) -> str:
    return f"{name}-balancer"


def file_of_balancer(recipe: Recipe) -> str:
    """The service file of the balancers."""
    return recipe.spec.for_balancer(recipe.readiness_probe)


def endpoint(spec: Spec) -> str:
    """HOST:PORT within the cluster."""
    return f"{spec.name}.{of(spec).namespace}.svc:{ENDPOINT_PORT}"


def replica(id: int, recipe: Recipe, owner: str) -> Object:
    """The pod of one replica. `owner` is the uid of the ConfigMap."""
    spec, section = recipe.spec, check(recipe)
    container: Object = {
        "name": "replica",
        "image": section.image,
        "args": [_literal(part) for part in recipe.arguments(PORT)],
        "env": _environment(id, recipe),
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
        "terminationGracePeriodSeconds": math.ceil(spec.settings.drain_timeout) + _MARGIN,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "containers": [container],
        "volumes": volumes,
        **_pull_secret(section),
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
    made = _object("v1", "Pod", pod_name(spec.name, id), spec, "replica", spec=pod)
    made["metadata"]["labels"] |= labels
    owned = {"apiVersion": "v1", "kind": "ConfigMap", "name": config_map_name(spec.name), "uid": owner}
    made["metadata"]["ownerReferences"] = [owned]
    return made


def has_replica_key(recipe: Recipe) -> bool:
    """Do its replicas require a key of ours? Not where the file configures keys itself."""
    return not keys.brings_its_own(recipe, {})


def standing(
    recipe: Recipe,
    secret: Mapping[str, str],
    *,
    is_open: bool,
    text: str | None = None,
    api: tuple[int, int] | None = None,
) -> list[Object]:
    """What stands in the cluster for as long as the service does, without its controller.

    `secret` is the content of the Secret with keys: ADMIN_KEY, REPLICA_KEY, API_KEYS. `text` is the service file, for a
    controller in the cluster. `api` is the cluster's version; None: one that has policy/v1.
    """
    spec, section = recipe.spec, check(recipe)
    data = {"balancer.yaml": file_of_balancer(recipe)}
    if text is not None:
        data["service.yaml"] = text
    objects = [
        _object("v1", "ConfigMap", config_map_name(spec.name), spec, data=data),
        _secret(f"{spec.name}-keys", spec, secret),
        *secret_objects(recipe),
        _object(
            "v1",
            "Service",
            f"{spec.name}-replica",
            spec,
            "replica",
            spec={
                # Each replica's own address; the balancers probe for themselves which of them is ready.
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": _labels(spec.name, "replica"),
                "ports": [{"name": "http", "port": PORT}],
            },
        ),
        _object(
            "v1",
            "Service",
            spec.name,
            spec,
            "balancer",
            spec={
                "type": section.service_type,
                "selector": _labels(spec.name, "balancer"),
                "ports": [{"name": "http", "port": ENDPOINT_PORT}],
            },
        ),
        _balancers(recipe, section, is_open=is_open),
    ]
    if section.balancers > 1:
        version = "policy/v1beta1" if api is not None and api <= _LAST_BETA else "policy/v1"
        budget = {"minAvailable": 1, "selector": {"matchLabels": _labels(spec.name, "balancer")}}
        objects.append(_object(version, "PodDisruptionBudget", f"{spec.name}-balancer", spec, "balancer", spec=budget))
    return objects


def secrets_of(recipe: Recipe) -> dict[str, str]:
    """The service's secrets by the names of a pod's variables; those that flags of `run:` carry are among them."""
    envs = recipe.envs(0, PORT)
    return {name: envs[name] for name in sorted(recipe.secrets) if name in envs}


def secret_objects(recipe: Recipe) -> list[Object]:
    """The Secret with them, if there are any: each under its name, for pods, and the file's, for the controller."""
    spec, values = recipe.spec, secrets_of(recipe)
    given = {name: spec.envs[name] for name in sorted(spec.secrets) if name in spec.envs}
    escaped = {name: value.replace("\\", "\\\\").replace("'", "\\'") for name, value in given.items()}
    lines = "".join(f"{name}='{value}'\n" for name, value in escaped.items())
    return [_secret(f"{spec.name}-secrets", spec, {**values, _AS_A_FILE: lines})] if values else []


def controller(recipe: Recipe, text: str, *, is_open: bool) -> list[Object]:
    """The controller as a Deployment of 1, and what it may do: look after pods, and read the ConfigMap's uid."""
    spec, section = recipe.spec, check(recipe)
    if section.controller_image is None:
        raise ConfigError(
            f"{spec.source}: x-groundserve.kubernetes.controller_image is missing: the controller's image"
        )
    name = f"{spec.name}-controller"
    rules = [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "create", "delete"]},
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
        {
            "apiGroups": [""],
            "resources": ["configmaps"],
            "resourceNames": [config_map_name(spec.name)],
            "verbs": ["get"],
        },
    ]
    access = ["--open"] if is_open else ["--api-keys", f"/keys/{API_KEYS}"]
    arguments = ["up", "/service/service.yaml", "-n", spec.name, "--on", "kubernetes"]
    container: Object = {
        "name": "controller",
        "image": section.controller_image,
        "args": [*arguments, "--admin-key", f"/keys/{ADMIN_KEY}", *access],
        "env": [
            {"name": "XDG_STATE_HOME", "value": "/state"},
            {"name": "HOME", "value": "/state"},
            {"name": IS_KEPT_UP, "value": "1"},
            {"name": keys.KEY_FILE, "value": f"/keys/{REPLICA_KEY}"},
        ],
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
        "securityContext": _locked_down(),
        "volumeMounts": [
            {"name": "service", "mountPath": "/service", "readOnly": True},
            {"name": "keys", "mountPath": "/keys", "readOnly": True},
            {"name": "state", "mountPath": "/state"},
            {"name": "scratch", "mountPath": "/tmp"},
        ],
    }
    volumes: list[Object] = [
        {"name": "service", "configMap": {"name": config_map_name(spec.name)}},
        {"name": "keys", "secret": {"secretName": f"{spec.name}-keys"}},
        {"name": "state", "emptyDir": {}},
        {"name": "scratch", "emptyDir": {}},
    ]
    if spec.secrets:
        items = [{"key": _AS_A_FILE, "path": _AS_A_FILE}]
        volumes.append({"name": "secrets", "secret": {"secretName": f"{spec.name}-secrets", "items": items}})
        container["volumeMounts"].append({"name": "secrets", "mountPath": "/secrets", "readOnly": True})
        container["args"] += ["--secret-file", f"/secrets/{_AS_A_FILE}"]
    pod = {
        "serviceAccountName": name,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": _MARGIN,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000},
        "containers": [container],
        "volumes": volumes,
        **_pull_secret(section),
    }
    template = {
        "metadata": {
            "labels": _labels(spec.name, "controller"),
            # Another file is taken up by another controller, which replaces the replicas one after the other.
            "annotations": {"groundserve.file": hashlib.sha256(text.encode()).hexdigest()[:16]},
        },
        "spec": pod,
    }
    deployment = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},  # two controllers would each start replicas
        "selector": {"matchLabels": _labels(spec.name, "controller")},
        "template": template,
    }
    group = "rbac.authorization.k8s.io"
    subject = {"kind": "ServiceAccount", "name": name, "namespace": section.namespace}
    return [
        _object("v1", "ServiceAccount", name, spec, "controller"),
        _object(f"{group}/v1", "Role", name, spec, "controller", rules=rules),
        _object(
            f"{group}/v1",
            "RoleBinding",
            name,
            spec,
            "controller",
            roleRef={"apiGroup": group, "kind": "Role", "name": name},
            subjects=[subject],
        ),
        _object("apps/v1", "Deployment", name, spec, "controller", spec=deployment),
    ]


def _balancers(recipe: Recipe, section: Kubernetes, *, is_open: bool) -> Object:
    spec, settings = recipe.spec, recipe.spec.settings
    labels = _labels(spec.name, "balancer")
    access = ["--open"] if is_open else ["--api-keys", f"/keys/{API_KEYS}"]
    replica_key = ["--replica-key", f"/keys/{REPLICA_KEY}"] if has_replica_key(recipe) else []
    # A service that sleeps has no replica that is ready, and yet is to be reached, which wakes it.
    is_reached = {"tcpSocket": {"port": ENDPOINT_PORT}}
    is_ready = (
        is_reached
        if spec.autoscales and not spec.min_replicas
        else {"httpGet": {"path": "/ready", "port": ENDPOINT_PORT}}
    )
    container = {
        "name": "balancer",
        "image": section.balancer_image,
        "args": [
            *("--service", "/service/balancer.yaml"),
            *("--listen", f"0.0.0.0:{ENDPOINT_PORT}", "--admin", f"0.0.0.0:{ADMIN_PORT}"),
            *("--discover", f"dns://{spec.name}-replica:{PORT}"),
            *("--admin-key", f"/keys/{ADMIN_KEY}", *replica_key, *access),
        ],
        "ports": [{"name": "http", "containerPort": ENDPOINT_PORT}, {"name": "admin", "containerPort": ADMIN_PORT}],
        "readinessProbe": {**is_ready, "periodSeconds": 2, "timeoutSeconds": 5},
        "livenessProbe": {**is_reached, "periodSeconds": 10, "timeoutSeconds": 10, "failureThreshold": 6},
        "resources": {"requests": {"cpu": "250m", "memory": "256Mi"}},
        "securityContext": _locked_down(),
        "volumeMounts": [
            {"name": "service", "mountPath": "/service", "readOnly": True},
            {"name": "keys", "mountPath": "/keys", "readOnly": True},
        ],
    }
    apart = {
        "weight": 100,
        "podAffinityTerm": {"labelSelector": {"matchLabels": labels}, "topologyKey": "kubernetes.io/hostname"},
    }
    pod = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # After SIGTERM its port stays open for drain_grace, because Kubernetes takes a moment to send nobody there.
        "terminationGracePeriodSeconds": math.ceil(settings.drain_grace + settings.drain_timeout) + _MARGIN,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000},
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [apart]}},
        "containers": [container],
        "volumes": [
            {"name": "service", "configMap": {"name": config_map_name(spec.name)}},
            {"name": "keys", "secret": {"secretName": f"{spec.name}-keys"}},
        ],
        **_pull_secret(section),
    }
    deployment = {
        "replicas": section.balancers,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    return _object("apps/v1", "Deployment", balancers_name(spec.name), spec, "balancer", spec=deployment)


def _environment(id: int, recipe: Recipe) -> list[Object]:
    """Its variables; those that are secrets come from the Secret, so that a pod does not show them."""
    secret = f"{recipe.spec.name}-secrets"
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


def _object(api: str, kind: str, name: str, of_service: Spec, component: str = "", **content: Any) -> Object:
    metadata = {"name": name, "namespace": of(of_service).namespace, "labels": _labels(of_service.name, component)}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **content}


def _labels(name: str, component: str = "") -> dict[str, str]:
    labels = {"app.kubernetes.io/name": "groundserve", "app.kubernetes.io/instance": name}
    return {**labels, "app.kubernetes.io/component": component} if component else labels


def _secret(name: str, spec: Spec, content: Mapping[str, str]) -> Object:
    data = {key: base64.b64encode(value.encode()).decode() for key, value in content.items()}
    return _object("v1", "Secret", name, spec, type="Opaque", data=data)


def _pull_secret(section: Kubernetes) -> Object:
    return {"imagePullSecrets": [{"name": section.pull_secret}]} if section.pull_secret is not None else {}


def _locked_down() -> Object:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _literal(text: str) -> str:
    """Escapes dollars: Kubernetes expands $(NAME)."""
    return text.replace("$", "$$")
