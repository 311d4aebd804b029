"""A balancer that discovers its replicas by DNS names, which a file resolves instead of a name server.

`python -m tests.chaos.names CONFIG`, a JSON file: {"names": FILE, "discover": "dns://...", "settings": {...},
"readiness": {...}}. FILE holds {"addresses": [...]} or {"error": "nxdomain" | "servfail" | "timeout"} and may change
at any time. On SIGUSR1 it writes the tasks in its event loop to FILE.tasks, a JSON list of what each runs.
"""

import asyncio
import json
import logging
import signal
import socket
import sys
from pathlib import Path

import uvloop

from balancer import process
from balancer.config import Config
from balancer.spec.settings import ReadinessProbe, Settings


class Names:
    """Answers as getaddrinfo would through balancer.fleet.discovery.resolve."""

    def __init__(self, file: Path) -> None:
        self.file = file

    async def __call__(self, name: str, port: int) -> list[str]:
        said = json.loads(self.file.read_text())
        match said.get("error"):
            case "nxdomain":
                return []
            case "servfail":
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            case "timeout":
                await asyncio.sleep(0.5)
                raise TimeoutError
            case _:
                return sorted(said["addresses"])


async def serve(file: Path, config: Config) -> None:
    def tell() -> None:
        spare = file.with_suffix(".new")
        spare.write_text(json.dumps([getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks()]))
        spare.replace(file.with_suffix(".tasks"))

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, tell)
    await process.run(config, Names(file))


def main(path: str) -> None:
    said = json.loads(Path(path).read_text())
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="groundserve: %(levelname)s: %(message)s")
    config = Config(
        listen=("127.0.0.1", 0),
        admin=("127.0.0.1", 0),
        discover=said["discover"],
        settings=Settings.from_mapping(said["settings"]),
        readiness=ReadinessProbe(**said["readiness"]),
        is_log_json=True,
    )
    uvloop.run(serve(Path(said["names"]), config))


if __name__ == "__main__":
    main(sys.argv[1])
