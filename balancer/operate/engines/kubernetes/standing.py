"""What stands in a cluster for as long as a service does: balancers, Services, keys, the controller. Pure."""

import base64
import hashlib
import math
from collections.abc import Mapping

from balancer.errors import ConfigError
from balancer.operate.engines.kubernetes.objects import (
    ADMIN_KEY,
    ADMIN_PORT,
    API_KEYS,
    DESIRED,
    DIGEST,
    ENDPOINT_PORT,
    IS_KEPT_UP,
    MARGIN,
    PORT,
    REPLICA_KEY,
    Object,
    balancers_name,
    check,
    config_map_name,
    has_replica_key,
    labels_of,
    locked_down,
    named,
    owned_by,
    pull_secret,
    replicas_name,
    secrets_name,
    state_name,
)
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state import keys
from balancer.spec.kubernetes import Kubernetes
from balancer.spec.service_file import Spec

# In the Secret with the service's own: all of its names and values as a file, for --secret-file.
_AS_A_FILE = "secrets.env"
# The newest version of Kubernetes whose PodDisruptionBudget is policy/v1beta1; from the next one on there is policy/v1.
_LAST_BETA = (1, 20)


def without_controller(
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
        named("v1", "ConfigMap", config_map_name(spec.name), spec, data=data),
        _secret(f"{spec.name}-keys", spec, secret),
        named(
            "v1",
            "Service",
            replicas_name(spec.name),
            spec,
            "replica",
            spec={
                # Each replica's own address; the balancers probe for themselves which of them is ready.
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": labels_of(spec.name, "replica"),
                "ports": [{"name": "http", "port": PORT}],
            },
        ),
        named(
            "v1",
            "Service",
            spec.name,
            spec,
            "balancer",
            spec={
                "type": section.service_type,
                "selector": labels_of(spec.name, "balancer"),
                "ports": [{"name": "http", "port": ENDPOINT_PORT}],
            },
        ),
        _balancers(recipe, section, is_open=is_open),
    ]
    if section.balancers > 1:
        version = "policy/v1beta1" if api is not None and api <= _LAST_BETA else "policy/v1"
        budget = {"minAvailable": 1, "selector": {"matchLabels": labels_of(spec.name, "balancer")}}
        objects.append(named(version, "PodDisruptionBudget", f"{spec.name}-balancer", spec, "balancer", spec=budget))
    return objects


def secrets_of(recipe: Recipe) -> dict[str, str]:
    """The service's secrets by the names of a pod's variables; those that flags of `run:` carry are among them."""
    envs = recipe.envs(0, PORT)
    return {name: envs[name] for name in sorted(recipe.secrets) if name in envs}


def secret_of_pods(name: str, recipe: Recipe, values: Mapping[str, str], owner: str) -> Object:
    """The Secret of one recipe, which goes with the service's ConfigMap. `owner` is the uid of that."""
    made = _secret(name, recipe.spec, values)
    made["metadata"]["labels"][DIGEST] = recipe.digest
    made["metadata"]["ownerReferences"] = [owned_by(recipe.spec.name, owner)]
    return made


def secret_beside_the_file(recipe: Recipe) -> list[Object]:
    """The one Secret of a service with a controller in the cluster, if it has secrets: each under its name, for pods,
    and the file's, for the controller.
    """
    spec, values = recipe.spec, secrets_of(recipe)
    given = {name: spec.envs[name] for name in sorted(spec.secrets) if name in spec.envs}
    escaped = {name: value.replace("\\", "\\\\").replace("'", "\\'") for name, value in given.items()}
    lines = "".join(f"{name}='{value}'\n" for name, value in escaped.items())
    return [_secret(secrets_name(spec.name), spec, {**values, _AS_A_FILE: lines})] if values else []


def file_of_balancer(recipe: Recipe) -> str:
    """The service file of the balancers."""
    return recipe.spec.for_balancer(recipe.readiness_probe)


def controller(recipe: Recipe, text: str, *, is_open: bool) -> list[Object]:
    """The controller as a Deployment of 1, and what it may do: look after pods, read the ConfigMap's uid, and write
    down what the service is meant to be in a ConfigMap of its own.
    """
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
        {
            "apiGroups": [""],
            "resources": ["configmaps"],
            "resourceNames": [state_name(spec.name)],
            "verbs": ["get", "patch"],
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
        "securityContext": locked_down(),
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
        {"name": "written-down", "configMap": {"name": state_name(spec.name), "optional": True}},
        {"name": "scratch", "emptyDir": {}},
    ]
    folder = f"/state/groundserve/{spec.name}"
    # A pod that takes the place of another goes on with what that one was told, such as a scale.
    recall: Object = {
        "name": "recall",
        "image": section.controller_image,
        "command": ["sh", "-c", f"mkdir -p {folder}; cp -n /written-down/{DESIRED} {folder} 2>/dev/null || true"],
        "securityContext": locked_down(),
        "volumeMounts": [
            {"name": "written-down", "mountPath": "/written-down", "readOnly": True},
            {"name": "state", "mountPath": "/state"},
        ],
    }
    if spec.secrets:
        items = [{"key": _AS_A_FILE, "path": _AS_A_FILE}]
        volumes.append({"name": "secrets", "secret": {"secretName": secrets_name(spec.name), "items": items}})
        container["volumeMounts"].append({"name": "secrets", "mountPath": "/secrets", "readOnly": True})
        container["args"] += ["--secret-file", f"/secrets/{_AS_A_FILE}"]
    pod = {
        "serviceAccountName": name,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": MARGIN,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000},
        "initContainers": [recall],
        "containers": [container],
        "volumes": volumes,
        **pull_secret(section),
    }
    template = {
        "metadata": {
            "labels": labels_of(spec.name, "controller"),
            # Another file is taken up by another controller, which replaces the replicas one after the other.
            "annotations": {"groundserve.file": hashlib.sha256(text.encode()).hexdigest()[:16]},
        },
        "spec": pod,
    }
    deployment = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},  # two controllers would each start replicas
        "selector": {"matchLabels": labels_of(spec.name, "controller")},
        "template": template,
    }
    group = "rbac.authorization.k8s.io"
    subject = {"kind": "ServiceAccount", "name": name, "namespace": section.namespace}
    return [
        *secret_beside_the_file(recipe),
        named("v1", "ConfigMap", state_name(spec.name), spec, "controller"),
        named("v1", "ServiceAccount", name, spec, "controller"),
        named(f"{group}/v1", "Role", name, spec, "controller", rules=rules),
        named(
            f"{group}/v1",
            "RoleBinding",
            name,
            spec,
            "controller",
            roleRef={"apiGroup": group, "kind": "Role", "name": name},
            subjects=[subject],
        ),
        named("apps/v1", "Deployment", name, spec, "controller", spec=deployment),
    ]


def _balancers(recipe: Recipe, section: Kubernetes, *, is_open: bool) -> Object:
    spec, settings = recipe.spec, recipe.spec.settings
    labels = labels_of(spec.name, "balancer")
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
            *("--discover", f"dns://{replicas_name(spec.name)}:{PORT}"),
            *("--admin-key", f"/keys/{ADMIN_KEY}", *replica_key, *access),
        ],
        "ports": [{"name": "http", "containerPort": ENDPOINT_PORT}, {"name": "admin", "containerPort": ADMIN_PORT}],
        "readinessProbe": {**is_ready, "periodSeconds": 2, "timeoutSeconds": 5},
        "livenessProbe": {**is_reached, "periodSeconds": 10, "timeoutSeconds": 10, "failureThreshold": 6},
        "resources": {"requests": {"cpu": "250m", "memory": "256Mi"}},
        "securityContext": locked_down(),
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
        "terminationGracePeriodSeconds": math.ceil(settings.drain_grace + settings.drain_timeout) + MARGIN,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000},
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [apart]}},
        "containers": [container],
        "volumes": [
            {"name": "service", "configMap": {"name": config_map_name(spec.name)}},
            {"name": "keys", "secret": {"secretName": f"{spec.name}-keys"}},
        ],
        **pull_secret(section),
    }
    deployment = {
        "replicas": section.balancers,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    return named("apps/v1", "Deployment", balancers_name(spec.name), spec, "balancer", spec=deployment)


def _secret(name: str, spec: Spec, content: Mapping[str, str]) -> Object:
    data = {key: base64.b64encode(value.encode()).decode() for key, value in content.items()}
    return named("v1", "Secret", name, spec, type="Opaque", data=data)
