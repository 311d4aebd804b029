"""What `groundserve up` begins with: the service of a file, or one that is meant to exist and is resumed."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from balancer.errors import ConfigError
from balancer.inherited import tell
from balancer.operate.commands.division import divide
from balancer.operate.controller.rollout import Mode
from balancer.operate.controller.wanted import Wanted
from balancer.operate.engines.addresses import AddressFlags
from balancer.operate.engines.choose import AUTO, choose_engine
from balancer.operate.engines.engine import Engine
from balancer.operate.recipe.recipe import Recipe, recipe
from balancer.operate.state.desired import Desired, Version
from balancer.operate.state.service_folder import ServiceFolder, folders, state_root
from balancer.operate.state.state_file import BrokenState
from balancer.spec.service_file import Spec, parse, read


@dataclass(frozen=True, slots=True)
class Source:
    """A service file, and what the command line overrides in it; or the name of a service that is meant to exist."""

    path: str
    name: str | None = None
    envs: Mapping[str, str] = field(default_factory=dict, repr=False)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    text: str | None = field(default=None, repr=False)  # of the file, if it is read already: a pipe is read once
    is_planned: bool = False  # its share of GPUs is written down already, with those of others that come up with it

    @property
    def is_name(self) -> bool:
        """A word is the service of this name before it is a file: what lies in the folder changes no service."""
        if self.path.endswith((".yaml", ".yml")) or "/" in self.path:
            return False
        try:
            return ServiceFolder(state_root(), self.path).desired is not None or not Path(self.path).is_file()
        except BrokenState:
            return True


@dataclass(frozen=True, slots=True)
class Beginning:
    """A service as it is about to come up. `versions` holds the files of its versions by their numbers."""

    folder: ServiceFolder
    engine: Engine
    flags: AddressFlags
    wanted: Wanted
    versions: Mapping[int, Version]
    # What it was meant to be until now, if it was meant to exist.
    before: Desired | None
    secrets: Mapping[str, str] = field(repr=False)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def left(self) -> Desired | None:
        """What an earlier controller left running, if anything."""
        return self.before if self.before is not None and self.before.is_left else None


def beginning(source: Source, flags: AddressFlags, on: str) -> Beginning:
    """Raises ConfigError if the service cannot run here. Warnings go to stderr."""
    return _resumed(source, flags, on) if source.is_name else _from_file(source, flags, on)


def _from_file(source: Source, flags: AddressFlags, on: str) -> Beginning:
    text = source.text if source.text is not None else read(source.path)
    spec = parse(text, source=source.path, name=source.name, envs=source.envs, secrets=source.secrets)
    unfitted = recipe(spec)
    folder = ServiceFolder(state_root(), spec.name)
    engine = choose_engine(on, unfitted, folder)
    before = folder.desired
    if before is not None and folder.is_up():
        before = None
    left = before if before is not None and before.is_left else None
    served = {version.number: version for version in before.versions} if before is not None else {}
    file = Version(1, text, source.path, dict(source.envs), tuple(sorted(source.secrets)))
    if before is not None:
        newest = served[before.coming or before.serving]
        number = newest.number if replace(newest, number=1) == file else max(served) + 1
        file = replace(file, number=number)
    if not source.is_planned and not folder.is_up():
        _divide(unfitted)
    made = _fit(replace(unfitted, version=file.number), engine, left)
    wanted = Wanted(made)
    if before is not None and before.coming is None and file.number == before.serving:
        wanted = Wanted(made, before.target)
    elif left is not None and (old := _old(left, engine, spec, source.secrets)) is not None:
        target = left.target if spec.autoscales else spec.min_replicas
        mode = _mode(old, made, target + left.target)
        is_switched = left.is_switched and (left.coming, left.mode) == (file.number, mode)
        wanted = Wanted(old, target, made, mode, before=left.target, is_switched=is_switched)
    return Beginning(folder, engine, flags, wanted, {**served, file.number: file}, before, source.secrets)


def _resumed(source: Source, flags: AddressFlags, on: str) -> Beginning:
    folder = ServiceFolder(state_root(), source.path)
    if source.envs or source.name is not None:
        raise ConfigError(
            f"{folder.name} is resumed as it was: bring it up, then change it with groundserve update {folder.name}"
        )
    desired = folder.desired
    if Path(name := source.path).is_file():
        tell(sys.stderr, f"warning: {name} is resumed as it was; for the file {name} write ./{name}")
    if desired is None:
        names = ", ".join(other.name for other in folders(state_root()) if is_meant(other))
        there = f"there is {names}" if names else "none is"
        raise ConfigError(f"{source.path}: no such file, and no service of that name is meant to run here; {there}")
    _check_place(folder.name, flags, desired)
    left = desired if desired.is_left and not folder.is_up() else None
    base = Path(desired.base)
    served = {version.number: version for version in desired.versions}
    serving = recipe(spec_of(served[desired.serving], folder.name, source.secrets, base), desired.serving)
    engine = choose_engine(desired.engine if on == AUTO else on, serving, folder)
    if not folder.is_up():
        _divide(serving)
    coming = None
    if desired.coming is not None:
        try:
            spec = spec_of(served[desired.coming], folder.name, source.secrets, base)
            coming = _fit(recipe(spec, desired.coming), engine, left)
        except ConfigError as failure:
            tell(sys.stderr, f"warning: version {desired.coming}, which was coming, is left out: {failure}")
    mode: Mode = desired.mode
    is_switched = desired.is_switched and coming is not None
    wanted = Wanted(_fit(serving, engine, left), desired.target, coming, mode, desired.before, is_switched=is_switched)
    flags = AddressFlags(
        flags.listen or (desired.listen if desired.join is None else None),
        flags.admin or (desired.admin if desired.join is None and not desired.balancers else None),
        flags.is_open or desired.is_open,
        flags.api_keys or desired.api_keys,
        flags.admin_key or desired.admin_key,
        flags.join or desired.join,
        flags.balancers or desired.balancers,
    )
    return Beginning(folder, engine, flags, wanted, served, desired, source.secrets)


def _check_place(name: str, flags: AddressFlags, desired: Desired) -> None:
    """Raises ConfigError for flags that move a service to another endpoint, or that the shared one would not heed."""
    again = f"groundserve down {name}, and up with its file and these flags moves it"
    is_own = any([flags.listen, flags.admin, flags.api_keys, flags.is_open, flags.balancers])
    if desired.join is not None and flags.join is None and is_own:
        raise ConfigError(
            f"{name} shares the endpoint of {desired.join}: what is said of an endpoint is for that; {again}"
        )
    if flags.balancers and not desired.balancers:
        raise ConfigError(f"{name} has a balancer of its own, and stays behind it; {again}")
    if desired.balancers and flags.join is not None:
        raise ConfigError(f"{name} is behind the balancers {', '.join(desired.balancers)}: it joins nobody; {again}")


def spec_of(version: Version, name: str, secrets: Mapping[str, str], base: Path) -> Spec:
    """The service file of a version. Raises ConfigError if one of its secrets is not among these."""
    if missing := [secret for secret in version.secrets if secret not in secrets]:
        raise ConfigError(
            f"{name}: version {version.number} wants {missing[0]}, which is a secret and so was not written down: give "
            f"it again, with --secret {missing[0]} or --secret-file"
        )
    mine = {secret: secrets[secret] for secret in version.secrets}
    return parse(version.text, source=version.source, name=name, envs=version.envs, secrets=mine, base=base)


def is_meant(folder: ServiceFolder) -> bool:
    """Is the service meant to exist although nothing of it is up?"""
    try:
        return folder.desired is not None and not folder.is_up()
    except BrokenState:
        return False


def _old(left: Desired, engine: Engine, spec: Spec, secrets: Mapping[str, str]) -> Recipe | None:
    """The recipe of what an earlier controller left running; None if it cannot be made any more."""
    version = left.version(left.serving)
    assert version is not None
    try:
        made = recipe(spec_of(version, spec.name, secrets, Path(left.base)), version.number)
        return engine.fit(made, left.target)[0]
    except ConfigError:
        return None


def _mode(old: Recipe, new: Recipe, both: int) -> Mode:
    """Blue-green if the readiness probe changes, because the balancer probes all its replicas alike."""
    has_new_probe = old.readiness_probe != new.readiness_probe and not new.starts_like(old)
    has_room = (new.fits is None or new.fits >= both) and new.fixed_port is None
    return "blue_green" if has_new_probe and has_room else "rolling"


def _divide(made: Recipe) -> None:
    for line in divide([made]):
        tell(sys.stdout, line)


def _fit(made: Recipe, engine: Engine, left: Desired | None) -> Recipe:
    fitted, warnings = engine.fit(made, left.target if left is not None else 0)
    for warning in warnings:
        tell(sys.stderr, f"warning: {warning}")
    return fitted
