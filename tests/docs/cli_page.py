"""docs/cli.md: what each program's --help prints."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
KEYS = ("add", "change", "list", "rotate", "revoke")
COMMANDS = (
    *("up", "status", "scale", "update", "rollback", "restart", "logs", "events", "down", "check", "manifests"),
    *(
        "enable",
        "disable",
        "keys",
        *(f"keys {action}" for action in KEYS),
        "usage",
        "pull",
        "models",
        "models remove",
        "export",
        "import",
    ),
)
PROGRAMS = {
    "groundserve": ("balancer.cli",),
    **{f"groundserve {command}": ("balancer.cli", *command.split()) for command in COMMANDS},
    "python -m balancer": ("balancer",),
    "python -m replica": ("replica",),
}
TOP = """\
# Commands

`make docs` writes this page from what the programs print. `groundserve` starts and changes services. It runs
`python -m balancer` and `python -m replica` for you, and so do the Docker images: you need those two only to build
something of your own. Flags of `sky serve` that are not listed here are understood, too, and say what to use instead.
"""


def page() -> str:
    parts = [TOP]
    for program, (module, *arguments) in PROGRAMS.items():
        command = [sys.executable, "-m", module, *arguments, "--help"]
        environ = {"PATH": os.environ["PATH"], "COLUMNS": "100"}
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=True)
        parts.append(f"## {program}\n\n```\n{done.stdout.rstrip()}\n```\n")
    return "\n".join(parts)
