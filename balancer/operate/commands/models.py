"""groundserve pull, models, export and import: run by the replica's program, which knows where models are stored."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from balancer.errors import ConfigError
from balancer.operate.commands.begin import spec_of
from balancer.operate.recipe.launch import understand
from balancer.operate.state.desired import Version
from balancer.operate.state.service_folder import folders, state_root


def keep(command: str, arguments: Sequence[str], told: str = "") -> int:
    """Runs one command of `python -m replica.store` and returns its exit code; `told` is its standard input, if any.

    Raises ConfigError if huggingface_hub, which it needs, is not installed.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(
            f"{command}: what keeps models comes with SGLang, which is not installed here: pip install '.[replica]', "
            "or with Docker: docker compose run --rm pull"
        )
    program = [sys.executable, "-m", "replica.store", command, *arguments]
    return subprocess.run(program, input=told or None, text=True, check=False).returncode


def remove(names: Sequence[str], *, is_forced: bool) -> int:
    """Removes models; unless forced, none that a service uses which is meant to exist. Raises ConfigError."""
    if is_forced:
        return keep("remove", ["--", *names])
    # Not as arguments: others could read those, and a command in a service file may have a key in it.
    return keep("remove", ["--used", "--", *names], json.dumps(used(state_root())))


def used(root: Path) -> dict[str, list[str]]:
    """By service that is meant to exist: the words of its file that may name a model. Raises ConfigError."""
    words: dict[str, list[str]] = {}
    for folder in folders(root):
        if (desired := folder.desired) is not None:
            versions = [one for one in desired.versions if one.number in (desired.serving, desired.coming)]
            words[folder.name] = [word for one in versions for word in _words(one, folder.name, Path(desired.base))]
    return words


def _words(version: Version, name: str, base: Path) -> list[str]:
    try:
        spec = spec_of(version, name, dict.fromkeys(version.secrets, "unknown"), base)
        launch = understand(spec.run, spec.envs)
        values = (spec.run, *spec.envs.values()) if launch is None else (launch.model, *launch.flags)
    except ConfigError:  # as one of another version of ours may be
        values = (version.text, *version.envs.values())
    return re.findall(r"[\w./-]+", " ".join(values))
