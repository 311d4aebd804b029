"""`groundserve manifests`: a service as plain YAML for Kubernetes, its controller included."""

import re
from pathlib import Path
from typing import Any

import yaml

from balancer.errors import ConfigError
from balancer.operate.commands.begin import Source
from balancer.operate.engines.kubernetes import objects, standing
from balancer.operate.recipe.recipe import recipe
from balancer.operate.state import keys
from balancer.operate.state.service_folder import ServiceFolder, state_root
from balancer.spec import text_file
from balancer.spec.service_file import parse, read


def manifests(source: Source, *, api_keys: str | None, is_open: bool, version: str, with_secrets: bool) -> int:
    """Prints them. `version` is the cluster's, as in 1.32. Raises ConfigError.

    Without `with_secrets`, the API keys come from a Secret of the user's, and the balancers want one all the same.
    """
    if (is_open and api_keys is not None) or (with_secrets and not is_open and api_keys is None):
        raise ConfigError(
            "manifests: give --api-keys FILE, or say --open to let all pods of the cluster use the endpoint"
        )
    text = read(source.path)
    spec = parse(text, source=source.path, name=source.name, envs=source.envs, secrets=source.secrets)
    if named := sorted(spec.secrets_in_file):
        name = named[0].partition(".")[2]
        raise ConfigError(
            f"{source.path}: {named[0]} has its value in the file, which whoever may look at a ConfigMap sees: write "
            f"it under secrets: without a value, and give --secret {name}=VALUE"
        )
    if source.envs:
        raise ConfigError("manifests: --env: write the value into the file, which the controller in the cluster reads")
    made = recipe(spec)
    for name, value in standing.secrets_of(made).items():
        if name not in spec.secrets and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", spec.run):
            raise ConfigError(
                f"{source.path}: run: has a key in it, which whoever may look at a ConfigMap sees: write $NAME "
                "instead, NAME under secrets: without a value, and give --secret NAME=VALUE"
            )
    secret = _keys(ServiceFolder(state_root(), spec.name), api_keys) if with_secrets else {}
    stands = standing.without_controller(made, secret, is_open=is_open, text=text, api=_numbers(version))
    wanted = [*stands, *standing.controller(made, text, is_open=is_open)]
    if not with_secrets:
        wanted = [one for one in wanted if one["kind"] != "Secret"]
    print(yaml.dump_all(wanted, Dumper=_Dumper, sort_keys=False, width=120), end="")
    return 0


def _keys(folder: ServiceFolder, api_keys: str | None) -> dict[str, str]:
    """The keys of the service: those in its folder, drawn the first time, so that every run prints the same."""
    try:
        folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as failure:
        raise ConfigError(f"{folder.path}: {failure.strerror}") from None
    found = {
        objects.ADMIN_KEY: keys.drawn(folder.admin_key_file),
        objects.REPLICA_KEY: keys.drawn(folder.replica_key_file),
    }
    if api_keys is not None:
        found[objects.API_KEYS] = text_file.read(Path(api_keys), f"--api-keys {api_keys}", "a file with keys")
    return found


def _numbers(version: str) -> tuple[int, int]:
    found = re.fullmatch(r"v?1\.(\d+)(\..*)?", version)
    if not found or int(found[1]) < 20:
        raise ConfigError(f"--kubernetes {version}: write a version from 1.20 on, as kubectl version says it")
    return 1, int(found[1])


class _Dumper(yaml.SafeDumper):
    """Longer texts as blocks, as people write them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
