"""Corrects the environment of a replica: variables that are missing, or that were meant for other programs.

A proxy is for outside addresses: a replica also sends requests to itself as it warms up, and those must not use one.
"""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from replica import scratch

_LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
_ANY = ("0.0.0.0", "::")


def set_right(environ: Mapping[str, str], host: str) -> dict[str, str]:
    """`environ`, corrected for a server on `host`. A missing or read-only home is replaced by a new folder."""
    made = {**environ, **no_proxy(environ, host)}
    if not _takes_files(environ.get("TMPDIR")):
        made.pop("TMPDIR", None)
    home = environ.get("HOME") or _home()
    if not _takes_files(home):
        # For compiler caches and the like. Downloads stay where they are.
        downloads = f"{home}/.cache/huggingface"
        if home and Path(downloads).is_dir():
            made = {"HF_HOME": downloads, **made}
        home = tempfile.mkdtemp(dir=made.get("TMPDIR"))
    # The names and prompts of models do not depend on the machine's locale.
    return {**made, "HOME": str(home), "PYTHONUTF8": "1"}


def with_scratch(environ: Mapping[str, str], host: str) -> dict[str, str]:
    """The same, with a temporary folder of its own that is removed after the replica has ended."""
    named = environ.get("TMPDIR")
    folder = scratch.take(Path(named if named and _takes_files(named) else tempfile.gettempdir()))
    if folder is None:
        return set_right(environ, host)
    made = set_right({**environ, "TMPDIR": str(folder)}, host)
    # Compiled kernels would go there as well, but are worth keeping.
    return {"TORCHINDUCTOR_CACHE_DIR": f"{made['HOME']}/.cache/torchinductor", **made}


def no_proxy(environ: Mapping[str, str], host: str) -> dict[str, str]:
    """Both spellings of NO_PROXY, with this machine added; existing entries stay."""
    said = [part for name in ("no_proxy", "NO_PROXY") for part in re.split(r"[\s,]+", environ.get(name, "")) if part]
    own = (*_LOOPBACK, *(() if host in _ANY else (host.strip("[]"),)))
    parts = ["*"] if "*" in said else list(dict.fromkeys([*said, *own]))
    return dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(parts))


def _home() -> str | None:
    try:
        return str(Path.home())
    except RuntimeError:  # a container's user without a passwd entry
        return None


def _takes_files(folder: str | None) -> bool:
    if not folder:
        return False
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
