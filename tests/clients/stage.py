"""What the clients talk to: a real SGLang with the player as its model, and the balancer in front."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from balancer.operate.engines.ports import free_ports
from replica import models
from replica.options import models_dir
from tests.clients.player import folder as player
from tests.e2e.running import Balancer, Replica
from tests.support.program import ROOT


@dataclass(frozen=True)
class Stage:
    url: str  # of the endpoint
    model: str


@contextlib.contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    """Starts both, with their files in `folder`, and yields once requests are served."""
    models.ensure("smollm2-135m", models_dir(os.environ))
    made = player.make(models_dir(os.environ) / "smollm2-135m", folder)
    environ = {**player.environ(made), "PYTHONPATH": str(ROOT)}
    with Replica(str(made), *free_ports(1), folder / "replica.log", **environ) as replica:
        replica.wait_ready()
        with Balancer(folder / "balancer.log", [replica]) as balancer:
            balancer.wait_all_ready()
            yield Stage(balancer.url, player.NAME)


if __name__ == "__main__":  # for trying a client by hand: python -m tests.clients.stage FOLDER
    with stage(Path(sys.argv[1])) as running:
        print(json.dumps({"url": running.url, "model": running.model}), flush=True)
        sys.stdin.read()
