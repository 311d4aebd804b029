"""Asks the admin port of a service that is up here, or of the balancer at GROUNDSERVE_ADMIN."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from balancer.errors import ConfigError
from balancer.operate.commands.show import ADMIN_VARIABLE, DEFAULT_ADMIN, up_folders
from balancer.operate.state import control_socket, keys
from balancer.operate.state.service_folder import ServiceFolder

TIMEOUT = 30.0  # seconds


@dataclass(frozen=True, slots=True)
class AdminPort:
    """A URL, and the file with the admin key."""

    url: str
    key_file: Path | None

    @classmethod
    def all_of(cls, service: str | None, key_file: str | None) -> "list[AdminPort]":
        """Those of the balancers of the named service, or of all that are up here, if they have one endpoint; without
        any, of GROUNDSERVE_ADMIN. Raises ConfigError.
        """
        given = Path(key_file) if key_file else None
        folders, failures = up_folders([service] if service else [])
        if failures and not folders:
            raise failures[0]
        if not folders:
            return [cls(os.environ.get(ADMIN_VARIABLE, DEFAULT_ADMIN).rstrip("/"), given)]
        found = [cls._of(folder, given) for folder in folders]
        if any(ports != found[0] for ports in found):
            raise ConfigError(f"several services are up here: say which by -n: {', '.join(f.name for f in folders)}")
        return found[0]

    @classmethod
    def _of(cls, folder: ServiceFolder, given: Path | None) -> "list[AdminPort]":
        if folder.is_detached and (left := folder.desired) is not None:
            return [cls(f"http://{left.admin}", given or folder.admin_key_file)]
        try:
            where = control_socket.ask(folder.socket, {"do": "balancer"})
        except control_socket.NotUp:
            raise ConfigError(f"{folder.name} is just starting or ending: try again in a moment") from None
        desired = folder.desired
        addresses = (desired.balancers if desired is not None else ()) or (where["admin"],)
        return [cls(f"http://{address}", given or Path(where["key_file"])) for address in addresses]

    def ask(self, method: str, path: str, **more: Any) -> Any:
        """Its answer's JSON. Raises ConfigError for anything but success."""
        headers = keys.bearing(keys.given(self.key_file, "--admin-key")) if self.key_file is not None else {}
        try:
            answer = httpx.request(method, self.url + path, headers=headers, timeout=TIMEOUT, trust_env=False, **more)
            said = answer.json()
        except (httpx.HTTPError, httpx.InvalidURL):
            raise ConfigError(f"no admin port answers at {self.url}: set {ADMIN_VARIABLE} to its URL") from None
        except ValueError:
            raise ConfigError(f"what answers at {self.url} is no admin port of ours: set {ADMIN_VARIABLE}") from None
        if answer.is_success:
            return said
        why = said.get("error", {}).get("message", "") if isinstance(said, dict) else ""
        if answer.status_code == 404 and not why.startswith("No keys"):
            why = f"the balancer at {self.url} knows no keys and no usage: it is of an older version"
        raise ConfigError(why or f"the admin port answered {answer.status_code}")
