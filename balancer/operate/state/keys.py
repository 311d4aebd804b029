"""The keys of a local service, which protect its balancer's admin port and its replicas.

Without them any user of the machine could use both, because everybody can connect to loopback. Each key is generated
once per service and kept in its folder, which only the owner can enter; output names the file, never the key.
"""

import os
import re
import secrets
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path

from balancer.errors import ConfigError
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state.state_file import broken, read_whole, write_whole
from balancer.spec import text_file

# The variable that gives `python -m replica` the file with the key that SGLang is to require.
KEY_FILE = "SGLANG_API_KEY_FILE"
_BALANCERS = "BALANCER_REPLICA_KEY"
# Flags that show that a script configures its keys itself.
_OWN = re.compile(r"--(admin-)?api-key(=.*)?|--config(=.*)?", re.DOTALL)


def drawn(path: Path, mode: int = 0o600) -> str:
    """The key in this file, generated if there is none; raises BrokenState."""
    key = (read_whole(path) or "").strip()
    if key and not usable(key):
        raise broken(path, "it holds no key")
    try:
        if not key:
            key = secrets.token_hex(32)  # no hyphen at its start, which a flag's value cannot have
            write_whole(path, key, mode)
        elif path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)
    except OSError as failure:
        raise broken(path, failure.strerror) from None
    return key


def given(path: Path, flag: str) -> str:
    """The key in a file that the user provides; raises ConfigError."""
    key = text_file.read(path, f"{flag} {path}", "a file with a key").strip()
    if not usable(key):
        raise ConfigError(f"{flag} {path}: one line with a key is wanted there")
    return key


def bearing(key: str) -> dict[str, str]:
    """The header that presents this key."""
    return {"Authorization": f"Bearer {key}"}


def usable(key: str) -> bool:
    return bool(key) and key.isascii() and key.isprintable()


def brings_its_own(recipe: Recipe, environ: Mapping[str, str] = os.environ) -> bool:
    """Does the service file configure API keys for its replicas itself?"""
    assert recipe.launch is not None
    more = {**environ, **recipe.envs(0, 0)}.get("SGLANG_ARGS", "")
    return any(_OWN.fullmatch(flag) for flag in (*recipe.launch.flags, *more.split()))


def for_replicas(recipe: Recipe, drawn_file: Path, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The file with the key that the service's replicas require: the one the user gave, else the service's own.

    None if they require no key of ours: a script that is not SGLang does not know it, some scripts set their own, and
    SGLang without our plug-in could not read the file. Raises ConfigError.
    """
    envs = {**environ, **recipe.envs(0, 0)}
    if recipe.launch is None or brings_its_own(recipe, environ) or not _reads_files(envs):
        return None
    if chosen := envs.get(KEY_FILE) or envs.get(_BALANCERS):
        path = recipe.workdir / Path(chosen).expanduser()
        given(path, KEY_FILE)
        return path
    drawn(drawn_file)
    return drawn_file


def _reads_files(environ: Mapping[str, str]) -> bool:
    """Does the SGLang here load our plug-in?"""
    chosen = environ.get("SGLANG_PLUGINS", "")
    return any(
        not chosen or point.name in chosen.split(",")
        for point in entry_points(group="sglang.srt.plugins")
        if point.value.startswith("replica.")
    )
