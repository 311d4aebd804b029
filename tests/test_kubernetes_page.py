"""docs/kubernetes.md keeps up with the schema, and its example is a service file."""

import re
from pathlib import Path

from pydantic_core import PydanticUndefined

from balancer.operate.engines.kubernetes import replica_pods
from balancer.operate.recipe.recipe import recipe
from balancer.spec.kubernetes import Kubernetes
from balancer.spec.service_file import parse

PAGE = (Path(__file__).parents[1] / "docs/kubernetes.md").read_text()


def test_each_key_is_on_the_page() -> None:
    rows = []
    for name, field in Kubernetes.model_fields.items():
        is_needed = field.default is PydanticUndefined
        default = "" if is_needed else "none" if field.default in (None, {}, []) else field.default
        rows.append((name, str(default), field.description))
    assert re.findall(r"^\| `(\w+)` \| ?(.*?) ?\| (.*) \|$", PAGE, re.MULTILINE) == rows


def test_its_example_can_be_served() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (pod,) = replica_pods.pods_of(1, recipe(parse(text, source="llava.yaml")), "uid", "llava-secrets")
    assert pod["spec"]["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "1"}
