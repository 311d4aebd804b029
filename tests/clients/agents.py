"""Coding agents, without a person: each is asked to have a tool called, and to say what came of it.

They are set up as docs/agents.md says, in a home of their own. The model plays what the prompt says
(tests/clients/player/part.py), so what is tried is each agent's protocol: its own prompt and tools, the call of a tool
as it streams in, the tool's result on its way back.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.clients import loopback
from tests.clients.outcome import Outcome

PAGE = Path(__file__).parents[2] / "docs/agents.md"
PATIENCE = 240.0  # seconds for one agent
# Where the page has the reader's own endpoint and model.
URL, MODEL = "http://localhost:30001", "your-model"
PROMPT = "Name the capital of France."
MARK = "groundserve was here"
# Each agent's tool that runs a command, and its parameter.
TOOLS = {"Claude Code": ("Bash", "command"), "Codex": ("exec_command", "cmd"), "opencode": ("bash", "command")}


def recipes(page: str) -> dict[str, tuple[dict[str, str], str]]:
    """What the page says of each agent: the files that its home needs, by path, and the command."""
    found = {}
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0].strip()
        blocks = re.findall(r"(?:^In `~/([^`]+)`:\n\n)?^```\w*\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        files = {path: text for path, text in blocks if path}
        commands = [text for path, text in blocks if not path]
        found[title] = (files, commands[-1] if commands else "")
    return found


def run(url: str, model: str, node: Path, folder: Path) -> Iterator[Outcome]:
    """Yields an outcome for each of Claude Code, Codex and opencode."""
    told = recipes(PAGE.read_text())
    for name, (tool, field) in TOOLS.items():
        files, command = told[name]
        home = folder / name.replace(" ", "-").lower()
        work = home / "work"
        work.mkdir(parents=True)
        for path, text in files.items():
            (home / path).parent.mkdir(parents=True, exist_ok=True)
            (home / path).write_text(text.replace(URL, url).replace(MODEL, model))
        command = command.replace(URL, url).replace(MODEL, model).replace(PROMPT, _asked(tool, field))
        yield Outcome(name, "calls a tool", _problem(command, home, work, node))


def _problem(command: str, home: Path, work: Path, node: Path) -> str:
    environ = {
        **loopback.ENVIRON,
        "HOME": str(home),
        "PATH": f"{node / 'node_modules/.bin'}{os.pathsep}{os.environ['PATH']}",
        "LANG": "C.UTF-8",
        "SHELL": "/bin/bash",
    }
    said = home / "said"
    with said.open("wb") as output:
        try:
            subprocess.run(
                ["/bin/bash", "-c", command],
                cwd=work,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"it did not end within {PATIENCE:g} s: {_end(said)}"
    made = work / "made.txt"
    if not made.is_file() or made.read_text().strip() != MARK:
        return f"the tool was not called: {_end(said)}"
    if "The tool said:" not in said.read_text(errors="replace"):
        return f"the tool's result did not come back: {_end(said)}"
    return ""


def _end(file: Path) -> str:
    lines: Iterable[str] = file.read_text(errors="replace").splitlines()
    return " / ".join(line.strip() for line in lines if line.strip())[-600:]


def _asked(tool: str, field: str) -> str:
    """A prompt that has a command run by the agent's tool; between the double quotes of a shell."""
    arguments = json.dumps({field: f"echo {MARK} > made.txt", "description": "leaves a mark"})
    return f"CALL {tool} {arguments} END".replace('"', '\\"')
