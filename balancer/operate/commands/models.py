"""groundserve pull, models, export and import: run by the replica's program, which knows where models are stored."""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence

from balancer.errors import ConfigError


def keep(command: str, arguments: Sequence[str]) -> int:
    """Runs one command of `python -m replica.store` and returns its exit code.

    Raises ConfigError if huggingface_hub, which it needs, is not installed.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(
            f"{command}: what keeps models comes with SGLang, which is not installed here: pip install '.[replica]', "
            "or with Docker: docker compose run --rm pull"
        )
    return subprocess.run([sys.executable, "-m", "replica.store", command, *arguments], check=False).returncode
