"""The house keeps its plan: imports go in one direction, and the two programs meet only over HTTP."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Whoever stands further right may import whoever stands further left, or beside it in the same place.
ORDER = [
    {"errors", "inherited"},
    {"spec"},
    {"contract"},
    {"accounts"},
    {"fleet"},
    {"routing"},
    {"config"},
    {"service"},
    {"observe"},
    {"relay"},
    {"admin"},
    {"operate", "services", "turn_taking"},
    {"app"},
    {"process"},
    {"workers"},
    {"cli", "__main__"},
]
PLACE = {name: place for place, names in enumerate(ORDER) for name in names}
MODULES = sorted((ROOT / "balancer").rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path: Path) -> str:
    inside = path.relative_to(ROOT / "balancer")
    return inside.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_only_to_the_left(path: Path) -> None:
    own = part_of(path)
    if own == "__init__":
        assert list(imported(path)) == []
        return
    assert own in PLACE, f"balancer/{own} has no place in the order of this test and of ARCHITECTURE.md"
    for name in imported(path):
        if name.startswith("balancer."):
            other = name.split(".")[1]
            assert PLACE.get(other, 99) <= PLACE[own], f"{own} imports {name}, which stands to its right"


@pytest.mark.parametrize("path", sorted((ROOT / "balancer" / "relay").glob("*.py")), ids=lambda path: path.name)
def test_the_relay_knows_the_replicas_through_its_places_alone(path: Path) -> None:
    """Its own paths (health, server_info) tell of the service itself."""
    behind = {f"balancer.fleet.{name}" for name in ("fleet", "member", "claim", "outliers")}
    behind |= {"balancer.routing.admission.Admission", "balancer.routing.policies", "balancer.service"}
    assert path.name == "own_paths.py" or not behind & set(imported(path))


OPERATE = {"errors", "inherited", "spec", "contract", "operate"}


@pytest.mark.parametrize("path", [path for path in MODULES if part_of(path) == "operate"], ids=lambda path: path.name)
def test_operate_imports_nothing_of_the_balancer(path: Path) -> None:
    """operate imports nothing of the balancer process.

    They meet over HTTP, in the types of balancer/contract.
    """
    others = {name.split(".")[1] for name in imported(path) if name.startswith("balancer.")}
    assert others <= OPERATE


def test_the_balancer_process_needs_nothing_of_the_command() -> None:
    """Its image carries neither balancer/operate nor balancer/cli.py. Imports inside functions count, too."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
    needed = ["balancer.__main__"]
    for name in needed:
        needed += [other for other in imported(files[name]) if other in files and other not in needed]
    assert {"balancer.app", "balancer.spec.service_file"} <= set(needed)
    assert [name for name in needed if part_of(files[name]) in ("operate", "cli")] == []


@pytest.mark.parametrize(("program", "other"), [("balancer", "replica"), ("replica", "balancer")])
def test_replica_and_balancer_never_import_each_other(program: str, other: str) -> None:
    for path in (ROOT / program).rglob("*.py"):
        assert not [name for name in imported(path) if name.split(".")[0] == other], path


@pytest.mark.parametrize("module", ["balancer.__main__", "balancer.cli"])
def test_the_balancer_runs_with_neither_torch_nor_sglang(module: str) -> None:
    program = (
        "import sys\n"
        "sys.modules.update({name: None for name in ('torch', 'sglang', 'transformers', 'numpy')})\n"
        f"import {module} as m\n"
        "m.main(['--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_the_architecture_page_names_every_file() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    missing = [
        str(path.relative_to(ROOT))
        for program in ("balancer", "replica")
        for path in (ROOT / program).rglob("*.py")
        if path.name != "__init__.py" and path.name not in page
    ]
    assert missing == []


def test_names_of_tests_are_short() -> None:
    """A test's name has at most 60 characters; its docstring has room for the sentence."""
    names = [
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    assert len(names) > 1000
    assert [name for name in names if len(name) > 60] == []
