"""How a service was brought up, for whoever has to do it again: the arguments of `groundserve up`, without secrets."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from balancer.operate.state.state_file import broken, read_whole, write_whole


@dataclass(frozen=True, slots=True)
class Beginning:
    """`file` and the key files are absolute paths; `folder` is where it was typed. Addresses are those it got."""

    file: str
    name: str
    folder: str
    engine: str
    envs: Mapping[str, str]
    secrets: tuple[str, ...]  # their names
    listen: str
    admin: str
    is_open: bool = False
    api_keys: str | None = None
    admin_key: str | None = None
    join: str | None = None
    # Seconds that it may take to end: answers in flight are finished, then the replicas stop.
    stop_seconds: float = 0.0

    def arguments(self) -> list[str]:
        """For `groundserve`."""
        words = ["up", self.file, "-n", self.name, "--on", self.engine]
        for name, value in self.envs.items():
            words += ["--env", f"{name}={value}"]
        if self.join is not None:
            return [*words, "--join", self.join]
        words += ["--listen", self.listen, "--admin", self.admin]
        words += ["--api-keys", self.api_keys] if self.api_keys else []
        words += ["--admin-key", self.admin_key] if self.admin_key else []
        return [*words, *(["--open"] if self.is_open else [])]

    def write(self, path: Path) -> None:
        """Raises BrokenState."""
        write_whole(path, json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """None if there is none; raises BrokenState."""
        text = read_whole(path)
        if text is None:
            return None
        try:
            fields = json.loads(text)
            return cls(**{**fields, "secrets": tuple(fields["secrets"])})
        except (ValueError, TypeError, LookupError):
            raise broken(path, "it is not whole") from None
