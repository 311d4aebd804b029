"""The clients' own environments, made on first use in a cache folder, with exactly what pins/ lists."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from tests.bench.install import Unavailable, call, environment
from tests.clients import open_webui
from tests.clients.suites import FORMATS

PINS = Path(__file__).with_name("pins")
# What these packages run when they are installed: each puts its program for this machine in its place. No other
# package's script runs.
STEPS = ("@anthropic-ai/claude-code/install.cjs", "opencode-ai/postinstall.mjs")


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/groundserve-clients, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "groundserve-clients"


def python(cache: Path) -> Path:
    """The bin folder of an environment with the clients of Python. Raises Unavailable."""
    return environment("python", cache, PINS) / "bin"


def node(cache: Path) -> Path:
    """The folder that holds node_modules with the clients of Node. Raises Unavailable."""
    if not shutil.which("npm") or not shutil.which("node"):
        raise Unavailable("there is no npm on this machine: install Node.js 20 or newer")
    digest = hashlib.sha256((PINS / "package-lock.json").read_bytes()).hexdigest()[:12]
    folder = cache / f"node-{digest}"
    if (folder / "complete").exists():
        return folder
    print(f"  installing the clients of Node into {folder} (once)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(PINS / name, folder / name)
        # Not `npm ci`, which wants the builds for all other systems to be in the lock too, and in the registry.
        call(["npm", "install", "--ignore-scripts", "--no-save", "--no-audit", "--no-fund"], cwd=str(folder))
        for step in STEPS:
            call(["node", str(folder / "node_modules" / step)], cwd=str(folder))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    (folder / "complete").touch()
    return folder


def versions() -> dict[str, str]:
    """The pinned version of what each suite is, by the suite's name."""
    python = dict(line.split("==") for line in (PINS / "python.txt").read_text().split())
    node = json.loads((PINS / "package.json").read_text())["dependencies"]
    return {
        "openai (Python)": python["openai"],
        "anthropic (Python)": python["anthropic"],
        "LangChain": python["langchain-openai"],
        "ollama (Python)": python["ollama"],
        "openai (Node)": node["openai"],
        "anthropic (Node)": node["@anthropic-ai/sdk"],
        **dict.fromkeys((f"llm-comply {name}" for name in FORMATS), python["llm-comply"]),
        "compatcanary": node["compatcanary"],
        open_webui.SUITE: open_webui.VERSION,
        "Claude Code": node["@anthropic-ai/claude-code"],
        "Codex": node["@openai/codex"],
        "opencode": node["opencode-ai"],
    }
