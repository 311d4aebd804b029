"""Flags of `sky serve` that groundserve does not have: what to write instead, or why they have no effect here."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from balancer.spec.document import NoMeaning
from balancer.spec.schema import Resources

# What to do instead; {} is the flag's value.
_OF_A_FILE = {
    "--workdir": "write `workdir: {}` in the service file",
    "--gpus": "write `resources: {{accelerators: {}}}` in the service file",
    "--cpus": "write `resources: {{cpus: {}}}` in the service file",
    "--memory": "write `resources: {{memory: {}}}` in the service file",
    "--ports": "write `resources: {{ports: {}}}` in the service file",
    "--num-nodes": "write `num_nodes: {}` in the service file; --on slurm and --on kubernetes take more than 1",
    "--git-url": "clone {} and give the path of a service file in it",
    "--git-ref": "check {} out and give the path of a service file in it",
}
_OF_SKYPILOT = {"--config": "leave it out: it concerns SkyPilot's own machinery"}
_WAITS = {"--async": "end the line with &: this command waits until it is done"}
_INSTEAD: Mapping[str, Mapping[str, str]] = {
    "up": {**_OF_SKYPILOT, **_OF_A_FILE, "--async": "use -d: it goes on in the background once the service is up"},
    "update": {**_OF_SKYPILOT, **_OF_A_FILE, **_WAITS},
    "down": {**_OF_SKYPILOT, **_WAITS},
    "logs": {
        **_OF_SKYPILOT,
        **dict.fromkeys(("-s", "--sync-down"), "redirect what this prints: the logs are on this machine"),
    },
    "status": _OF_SKYPILOT,
}
# Flags without effect, for the same reason as the key of this name under `resources:`.
_OF_A_CLOUD = {
    "--infra": "infra",
    "--cloud": "cloud",
    "--region": "region",
    "--zone": "zone",
    "-t": "instance_type",
    "--instance-type": "instance_type",
    "--image-id": "image_id",
    "--use-spot": "use_spot",
    "--no-use-spot": "use_spot",
    "--disk-size": "disk_size",
    "--disk-tier": "disk_tier",
    "--network-tier": "network_tier",
    "--local-disk": "local_disk",
}
_WITHOUT_VALUE = {"--async", "-s", "--sync-down", "--use-spot", "--no-use-spot"}


def accept(parser: argparse.ArgumentParser, command: str) -> None:
    """Makes the parser of one command recognize these flags, without showing them in its help."""
    known: dict[str, type[_Answer]] = dict.fromkeys(_INSTEAD.get(command, ()), _Instead)
    if command in ("up", "update"):
        known |= dict.fromkeys(_OF_A_CLOUD, _NoEffect)
    for flag, action in known.items():
        count = 0 if flag in _WITHOUT_VALUE else None
        parser.add_argument(flag, action=action, nargs=count, const=command, help=argparse.SUPPRESS)
    if "--async" in known:
        parser.add_argument("--no-async", action="store_true", help=argparse.SUPPRESS)


class _Answer(argparse.Action):
    """An action that stores nothing in the parsed options; `const` is the command."""

    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, **more)


class _Instead(_Answer):
    def __call__(
        self, parser: argparse.ArgumentParser, options: object, values: object, flag: str | None = None
    ) -> None:
        assert flag is not None
        parser.error(f"{flag} is not for groundserve: {_INSTEAD[self.const][flag].format(values)}")


class _NoEffect(_Answer):
    def __call__(
        self, parser: argparse.ArgumentParser, options: object, values: object, flag: str | None = None
    ) -> None:
        assert flag is not None
        marks = Resources.model_fields[_OF_A_CLOUD[flag]].metadata
        why = next(mark.why for mark in marks if isinstance(mark, NoMeaning))
        print(f"warning: {flag} has no effect here: {why}", file=sys.stderr)
