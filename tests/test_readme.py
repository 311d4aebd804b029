"""The README keeps up with the code: settings and their defaults, models, commands and files."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from balancer.schema import Operation
from balancer.settings import Settings
from replica.presets import PRESETS, Preset

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def shown(default: object) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if default is None:
        return "none"
    if default == ():
        return "[]"
    return f"{default:g}" if isinstance(default, float) else str(default)


@pytest.mark.parametrize(
    ("model", "name"), [(model, name) for model in (Settings, Operation) for name in model.model_fields]
)
def test_each_setting_stands_there_with_its_default_and_meaning(model: type[BaseModel], name: str) -> None:
    field = model.model_fields[name]
    assert field.description
    assert f"| `{name}` | {shown(field.default)} | {field.description} |" in README


def test_no_other_setting_stands_there() -> None:
    table = README[README.index("## Settings") : README.index("## Looking at it")]
    named = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert named == set(Settings.model_fields) | set(Operation.model_fields)


def test_each_make_target_that_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?\bmake ([a-z-]+)`?", README)) <= targets


def test_each_file_that_it_names_exists() -> None:
    named = re.findall(r"\b(?:docker|tests|balancer|replica)/[\w./-]*\w", README)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_each_variable_that_its_docker_commands_set_is_explained() -> None:
    commands = re.findall(r"^(.*?)\bdocker compose\b", README, re.MULTILINE)
    named = {name for line in commands for name in re.findall(r"\b([A-Z_]{2,})=", line)}
    explained = set(re.findall(r"^#([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert {"MODEL", "HF_TOKEN", "HF_CACHE"} <= named
    assert named <= explained


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: str(preset.name))
def test_each_model_stands_there_with_what_requests_call_it_and_what_it_takes(preset: Preset) -> None:
    table = README[README.index("### Choosing a model") : README.index("**Gated models.**")]
    (row,) = [line for line in table.splitlines() if f"`{preset.name}`" in line]
    _, _, requests_say, takes, _ = row.split("|")
    assert takes.strip() == f"{preset.gpu_gib:g} GiB"
    assert requests_say.strip() == ("the same" if preset.is_embedded else f"`{preset.served_name}`")
