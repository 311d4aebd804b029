"""docs/service-file.md keeps up with the schema: its keys, their defaults, and what its examples say."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from balancer.spec.document import NoMeaning, Refused
from balancer.spec.schema import Probe, ReplicaPolicy, Resources, Service, Task
from balancer.spec.service_file import parse

PAGE = (Path(__file__).parents[1] / "docs/service-file.md").read_text()
SECTIONS = {"": Task, "service": Service, "replica_policy": ReplicaPolicy, "resources": Resources}


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def keys(model: type[BaseModel], mark: type | None) -> set[str]:
    """The model's keys as a file has them, with that mark; None: those that mean something here."""
    marked = {mark} if mark else {NoMeaning, Refused}
    found = set()
    for name, field in model.model_fields.items():
        has = any(type(note) in marked for note in field.metadata)
        if has == (mark is not None):
            found.add(field.alias or name)
    return found


def first_cells(text: str) -> set[str]:
    """The names in the first cell of each row of a table."""
    return {name for row in re.findall(r"^\|([^|]*)\|", text, re.MULTILINE) for name in re.findall(r"`([\w-]+)`", row)}


@pytest.mark.parametrize(
    ("title", "model"),
    [
        ("Keys", Task),
        ("`service`", Service),
        ("`service.readiness_probe`", Probe),
        ("`service.replica_policy`", ReplicaPolicy),
        ("`resources`", Resources),
    ],
)
def test_each_key_stands_in_its_table_and_no_other(title: str, model: type[BaseModel]) -> None:
    assert first_cells(section(title)) == keys(model, None)


@pytest.mark.parametrize("model", [Probe, ReplicaPolicy])
def test_each_number_of_a_table_is_the_default(model: type[BaseModel]) -> None:
    for name in sorted(keys(model, None)):
        field = model.model_fields[name]
        (shown,) = re.findall(rf"^\| `{name}` \| ?([^|]*?) ?\|", PAGE, re.MULTILINE)
        default = "" if field.default is PydanticUndefined else field.default
        if name == "path":
            default = "/health"  # where the file says nothing at all; an object has to name it
        expected = "none" if default in (None, {}) else f"{default:g}" if isinstance(default, float) else str(default)
        assert shown == expected, name


def test_each_key_without_a_meaning_is_listed() -> None:
    rows = dict(re.findall(r"^\| (?:`(\w+)`|top) \| (.*) \|$", section("Known, without a meaning here"), re.MULTILINE))
    assert {where: set(re.findall(r"`(\w+)`", named)) for where, named in rows.items()} == {
        where: found for where, model in SECTIONS.items() if (found := keys(model, NoMeaning))
    }
    refused = PAGE.partition("Refused, because")[2].partition(". A key")[0]
    assert set(re.findall(r"`(\w+)`", refused)) == keys(Task, Refused) | keys(Service, Refused)


def test_each_example_is_a_service_file() -> None:
    examples = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    chat, sleeper = (parse(text, source="example.yaml") for text in examples)
    assert (chat.name, chat.policy, chat.settings.queue_size, dict(chat.missing)) == (
        "chat",
        "prefix_aware",
        256,
        {"HF_TOKEN": "--secret"},
    )
    assert (sleeper.min_replicas, sleeper.max_replicas, sleeper.autoscales) == (0, 4, True)
    assert chat.warnings == sleeper.warnings == ()
