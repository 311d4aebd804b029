"""README and docs/ keep up with the code and with each other: settings, models, commands, files and links."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from balancer.spec.schema import Operation
from balancer.spec.settings import Settings
from replica.presets import PRESETS, Preset
from tests.docs import MADE
from tests.docs.cli_page import PROGRAMS

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
# What a person who uses it reads, README first.
DOCS = "\n".join(text for name, text in PAGES.items() if name == "README.md" or name.startswith("docs/"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def shown(default: object) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if default is None:
        return "none"
    if default == ():
        return "[]"
    return f"{default:g}" if isinstance(default, float) else str(default)


def shown_on(name: str, page: str) -> set[str]:
    """The pictures of a page, as paths from the root."""
    targets = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    return {os.path.normpath(Path(name).parent / target) for target in targets}


def anchors(page: str) -> set[str]:
    """What GitHub calls the page's headings in links."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    ("model", "name"), [(model, name) for model in (Settings, Operation) for name in model.model_fields]
)
def test_each_setting_stands_there_with_its_default_and_meaning(model: type[BaseModel], name: str) -> None:
    field = model.model_fields[name]
    assert field.description
    assert f"| `{name}` | {shown(field.default)} | {field.description} |" in PAGES["docs/settings.md"]


def test_no_other_setting_stands_there() -> None:
    named = re.findall(r"^\| `(\w+)` \|", PAGES["docs/settings.md"], re.MULTILINE)
    assert sorted(named) == sorted([*Settings.model_fields, *Operation.model_fields])


def test_each_make_target_that_they_name_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?\bmake ([a-z-]+)`?", DOCS)) <= targets


@pytest.mark.parametrize("program", [program for program in PROGRAMS if " " in program])
def test_each_flag_of_our_commands_exists(program: str) -> None:
    sections = PAGES["docs/cli.md"].split("\n## ")
    said = "".join(text for text in sections if re.match(rf"{program}[ \n]", text))  # with its own commands
    pages = "\n".join(text for name, text in PAGES.items() if name != "docs/cli.md")
    commands = re.findall(rf"(?<![\w-]){program}(?= )([^`\n#|)]*)", pages)
    flags = {flag for command in commands for flag in re.findall(r"(?<= )--?[a-z][\w-]*", command)}
    assert [flag for flag in sorted(flags) if f"{flag} " not in said and f"{flag}," not in said] == []


def test_each_file_that_they_name_exists() -> None:
    named = re.findall(r"(?<![\w./-])(?:docker|docs|services|tests|balancer|replica)/[\w./-]*\w", DOCS)
    assert "services/llava.yaml" in named
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", PAGES)
def test_each_link_leads_somewhere(name: str) -> None:
    for link in LINK.findall(PAGES[name]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_each_page_can_be_reached_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall(PAGES["README.md"])}
    assert {name for name in PAGES if name.startswith("docs/")} <= linked


@pytest.mark.parametrize("name", MADE)
def test_what_is_written_from_the_code_is_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text() == MADE[name](), "make docs writes it anew"


def test_each_picture_is_shown_on_a_page() -> None:
    shown = {target for name, text in PAGES.items() for target in shown_on(name, text)}
    assert {name for name in MADE if name.endswith(".svg")} <= shown


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    labels = {
        path.name: re.findall(r'image\.version="([^"]+)"', path.read_text())
        for path in ROOT.glob("docker/*.Dockerfile")
    }
    assert set(labels) == {f"{image}.Dockerfile" for image in ("balancer", "controller", "replica", "replica-cpu")}
    assert [name for name, said in labels.items() if said != [version]] == []
    heading = re.search(r"^## \[(\S+)\] - (.+)$", PAGES["CHANGELOG.md"], re.MULTILINE)
    assert heading is not None
    assert heading[1] == version.removesuffix(".dev0")
    assert (heading[2] == "Unreleased") == version.endswith(".dev0")


def test_the_readme_fits_on_a_page_or_two() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 120


def test_service_files_are_still_found_where_they_were() -> None:
    assert (ROOT / "docker/services").resolve() == ROOT / "services"
    kept = subprocess.run(["git", "ls-files", "-s", "docker/services"], cwd=ROOT, capture_output=True, text=True)
    assert kept.stdout.startswith("120000 ") or not (ROOT / ".git").exists()


def test_variables_of_docker_commands() -> None:
    """Each variable that a page's Docker commands set, or that a Compose file reads, is explained."""
    commands = re.findall(r"^(.*?)\bdocker compose\b", DOCS, re.MULTILINE)
    named = {name for line in commands for name in re.findall(r"\b([A-Z_\d]{2,})=", line)}
    assert {"MODEL", "HF_CACHE"} <= named
    files = (ROOT / "compose.yaml", *ROOT.glob("docker/compose*.yaml"))
    read = {name for file in files for name in re.findall(r"\$\{([A-Z_\d]+)", file.read_text())}
    explained = set(re.findall(r"^#([A-Z_\d]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert sorted((named | read) - explained) == []


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: str(preset.name))
def test_models_in_the_docs(preset: Preset) -> None:
    """The docs list each model with its name in requests and the memory that it takes."""
    (row,) = [line for line in PAGES["docs/models.md"].splitlines() if re.match(rf"\|.*`{preset.name}`.*\|.*\|", line)]
    _, _, requests_say, takes, _ = row.split("|")
    assert takes.strip() == f"{preset.gpu_gib:g} GiB"
    assert requests_say.strip() == ("the same" if preset.is_embedded else f"`{preset.served_name}`")
