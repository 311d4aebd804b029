"""What the tests take from whoever runs them, and what not; and which of them run in one process (`pytest -n 3`)."""

import signal
from pathlib import PurePath
from typing import Any

import httpx
import pytest


def pytest_configure() -> None:
    """A signal that was ignored when we started (nohup, a shell's &) would stay so in the programs under test."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Unless told otherwise, httpx gives up after 5 s, which a busy machine may take to start what is to answer.
    for part in ("connect", "read", "write", "pool"):
        setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, part, 60.0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For --dist loadfile: a file's tests run in one process, and so do all of files with real replicas.

    Those are started once then, and leave some processor to the others.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ReplicasTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "real replicas" if has_real_replicas(PurePath(file)) else file

    return ReplicasTogether(config, log)


def has_real_replicas(file: PurePath) -> bool:
    if file.match("tests/e2e/test_*.py"):
        return file.name != "test_debian_13.py"
    return file.match("tests/e2e/page/test_real.py")
