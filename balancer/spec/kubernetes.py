"""`x-groundserve.kubernetes:` of a service file: where on a cluster its pods go, and of what they are made."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

# Where the images keep models (docker/replica.Dockerfile).
MODELS = "/huggingface"


def _label(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", text):
        raise ValueError("should be a name of Kubernetes: lower-case letters, digits and '-', at most 63")
    return text


def _image(text: str) -> str:
    if not re.fullmatch(r"[\w][\w.:/@-]*", text, re.ASCII):
        raise ValueError("should be the name of an image, as in registry.lab/groundserve/replica:0.2")
    return text


Name = Annotated[str, AfterValidator(_label)]
Image = Annotated[str, AfterValidator(_image)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Models(_Part):
    """Where pods find the models: a PersistentVolumeClaim that several nodes may mount, or a folder of each node."""

    claim: Name | None = Field(None, description="name of a PersistentVolumeClaim in the namespace")
    host_path: str | None = Field(None, pattern=r"^/", description="folder on each node")

    @model_validator(mode="after")
    def _one_of_them(self) -> "Models":
        if (self.claim is None) == (self.host_path is None):
            raise ValueError("should have either claim or host_path")
        return self


class Toleration(_Part):
    """As in a pod."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    def as_in_a_pod(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class Kubernetes(_Part):
    """The section. No image has a default: in a public registry, the name could belong to anybody."""

    image: Image = Field(description="image of a replica")
    balancer_image: Image = Field(description="image of the balancer")
    controller_image: Image | None = Field(None, description="image of the controller, for `groundserve manifests`")
    namespace: Name = Field("default", description="namespace of everything")
    context: str | None = Field(None, description="context of kubectl's configuration; none: its current one")
    pull_secret: Name | None = Field(None, description="Secret with the registry's password")
    balancers: int = Field(2, ge=1, le=10, description="how many balancers")
    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field(
        "ClusterIP", description="who reaches the endpoint: the cluster, its nodes' addresses, or a load balancer's"
    )
    models: Models | None = Field(None, description="where pods find the models; none: each fetches its own")
    gpu_resource: str = Field("nvidia.com/gpu", description="the device plugin's name for a GPU")
    runtime_class: Name | None = Field(None, description="RuntimeClass of replicas, like nvidia on k3s")
    node_selector: dict[str, str] = Field({}, description="labels of the nodes that may run replicas")
    tolerations: list[Toleration] = Field([], description="taints of nodes that may run replicas all the same")
    shared_memory: str = Field("16Gi", pattern=r"^\d+[MG]i$", description="size of a replica's /dev/shm")
