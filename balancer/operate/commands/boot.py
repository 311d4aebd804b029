"""`groundserve enable` and `disable`: a systemd unit that brings a service up at boot, and again whenever it ends."""

import contextlib
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from balancer.errors import ConfigError
from balancer.operate.commands import variables
from balancer.operate.commands.begin import spec_of
from balancer.operate.recipe.recipe import python, with_packages
from balancer.operate.state.desired import Desired
from balancer.operate.state.service_folder import ServiceFolder, state_root
from balancer.operate.state.state_file import read_whole, write_whole

_SYSTEM = Path("/etc/systemd/system")
# Exists while systemd is process 1.
_RUNNING = Path("/run/systemd/system")
# Seconds that systemctl may take.
_PATIENCE = 60.0
# Seconds that systemd waits beyond those that the service may take to end, before it kills it.
_STOP_MARGIN = 30.0
_CREDENTIAL = "secrets"


def enable(name: str, *, is_users: bool, secret_files: Sequence[Path]) -> int:
    folder = ServiceFolder(state_root(), name)
    desired = folder.desired
    if desired is None:
        raise ConfigError(f"{name} is not meant to run here: groundserve up with its file first, then enable it")
    wanted = [version for version in desired.versions if version.number in (desired.serving, desired.coming)]
    if (named := sorted({secret for version in wanted for secret in version.secrets})) and not secret_files:
        raise ConfigError(
            f"{name} has secrets ({', '.join(named)}), which are kept nowhere: write K=V lines into a file "
            "that only you can read, and give it with --secret-file"
        )
    given = {secret for file in secret_files for secret in variables.of_file("--secret-file", file)}
    if missing := [secret for secret in named if secret not in given]:
        raise ConfigError(f"{name} wants {missing[0]}, and no --secret-file has it: it would not come up at boot")
    path = unit_file(name, is_users)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise ConfigError(f"{failure.filename or path}: {failure.strerror}") from None
    try:
        before = read_whole(path)
        write_whole(path, unit(name, desired, is_users=is_users, secret_files=secret_files), 0o644)
    except ConfigError as failure:
        hint = "" if is_users or os.geteuid() == 0 else ": be root, or say --user"
        raise ConfigError(f"{failure}{hint}") from None
    try:
        _systemctl(is_users, "enable", path.name)
    except BaseException:
        # Its file is what makes it enabled.
        with contextlib.suppress(ConfigError, OSError):
            path.unlink() if before is None else write_whole(path, before, 0o644)
        raise
    print(f"{name} comes up at boot: {path}")
    say_user = "--user " if is_users else ""
    if is_users:
        print("look   loginctl enable-linger   lets it start before you log in, and stay when you log out")
    if folder.is_up():
        print(f"next   groundserve down {name} && systemctl {say_user}start {path.stem}   hands it to systemd now")
    else:
        print(f"next   systemctl {say_user}start {path.stem}   starts it now")
    return 0


def disable(name: str, *, is_users: bool) -> int:
    path = unit_file(name, is_users)
    if not path.exists():
        hint = f"; there is {other}" if (other := unit_file(name, not is_users)).exists() else ""
        raise ConfigError(f"{name} is not enabled: there is no {path}{hint}")
    try:
        _systemctl(is_users, "disable", path.name)
        obstacle = None
    except ConfigError as failure:
        obstacle = failure  # its file goes all the same: as long as it is there, nothing ends the service for good
    try:
        path.unlink()
        (path.parent / f"{_target(is_users)}.wants" / path.name).unlink(missing_ok=True)
    except OSError as failure:
        raise ConfigError(f"{failure.filename or path}: {failure.strerror}") from None
    if obstacle is not None:
        raise ConfigError(f"{name} no longer comes up at boot: {path} is gone; but {obstacle}")
    if _is_running(is_users):
        _systemctl(is_users, "daemon-reload")
    print(f"{name} no longer comes up at boot; one that is up stays up")
    return 0


def is_enabled(name: str) -> bool:
    """Does systemd bring the service up at boot? Then it stays meant to exist after `down`."""
    return bool(how_to_disable(name))


def how_to_disable(name: str) -> str:
    """The commands that end it; empty if it is not enabled."""
    flags = [flag for flag, is_users in (("", False), (" --user", True)) if unit_file(name, is_users).exists()]
    return " && ".join(f"groundserve disable {name}{flag}" for flag in flags)


def said_of(name: str) -> str:
    """What `down` has to add for a service that systemd starts again; empty for any other."""
    for is_users in (False, True):
        path = unit_file(name, is_users)
        if path.exists() and _is_active(is_users, path.stem):
            user = "--user " if is_users else ""
            return f"; systemd brings it up again: systemctl {user}stop {path.stem} keeps it down"
    return ""


def unit_file(name: str, is_users: bool) -> Path:
    folder = _SYSTEM
    if is_users:
        home = os.environ.get("XDG_CONFIG_HOME") or ""
        folder = (Path(home) if home.startswith("/") else Path("~/.config").expanduser()) / "systemd/user"
    return folder / f"groundserve-{re.sub(r'[^A-Za-z0-9._-]', '-', name)}.service"


def unit(name: str, desired: Desired, *, is_users: bool, secret_files: Sequence[Path] = ()) -> str:
    """The unit's text. Secrets come as credentials, which only the service can read, and in no argument."""
    command = [*python("balancer.cli"), "up", name]
    environment = {"PATH": os.environ.get("PATH", os.defpath), **with_packages({})}
    if state := os.environ.get("XDG_STATE_HOME"):
        environment["XDG_STATE_HOME"] = state
    credentials = [f"{_CREDENTIAL}{number}" for number, _ in enumerate(secret_files, 1)]
    start = " ".join([*map(_quoted, command), *(f"--secret-file %d/{credential}" for credential in credentials)])
    host = f" {unit_file(desired.join, is_users).name}" if desired.join else ""
    lines = [
        "[Unit]",
        f"Description=groundserve {_literal(name)}",
        "Wants=network-online.target",
        f"After=network-online.target docker.service nvidia-persistenced.service{host}",
        "# However long what it needs is away, it is tried again.",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "Type=exec",
        f"ExecStart={start}",
        f"WorkingDirectory={_literal(desired.base)}",
        *(f"Environment={_quoted(f'{name}={value}', is_command=False)}" for name, value in environment.items()),
        *(
            f"LoadCredential={credential}:{_literal(str(path.absolute()))}"
            for credential, path in zip(credentials, secret_files, strict=True)
        ),
        "# The controller alone is asked to end: it lets the answers in flight finish, and then ends the others.",
        "KillMode=mixed",
        f"TimeoutStopSec={_stop_seconds(name, desired) + _STOP_MARGIN:.0f}",
        "Restart=always",
        "RestartSec=5",
        "# A replica that runs out of memory is the controller's affair.",
        "OOMPolicy=continue",
        "TasksMax=infinity",
        "LimitMEMLOCK=infinity",
        "",
        "[Install]",
        f"WantedBy={_target(is_users)}",
    ]
    return "\n".join(lines) + "\n"


def _target(is_users: bool) -> str:
    """The target that brings it up at boot."""
    return "default.target" if is_users else "multi-user.target"


def _stop_seconds(name: str, desired: Desired) -> float:
    """How long it may take to end: answers in flight are finished, then the replicas stop."""
    version = desired.version(desired.serving)
    assert version is not None
    spec = spec_of(version, name, dict.fromkeys(version.secrets, "unknown"), Path(desired.base))
    return spec.settings.drain_timeout + spec.operation.stop_grace


def _literal(text: str) -> str:
    """Escapes percent signs, which systemd would expand."""
    return text.replace("%", "%%")


def _quoted(text: str, is_command: bool = True) -> str:
    """As systemd reads it: the text as one word, without expansion."""
    escaped = _literal(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    if is_command:
        escaped = escaped.replace("$", "$$")
    return f'"{escaped}"' if re.search(r"[^\w@%+=:,./$-]", escaped) or not escaped else escaped


def _is_running(is_users: bool) -> bool:
    """Is a systemd running that can take commands?"""
    if not is_users:
        return _RUNNING.is_dir()
    return Path(os.environ.get("XDG_RUNTIME_DIR", "/nowhere"), "systemd/private").exists()


def _is_active(is_users: bool, unit: str) -> bool:
    if not _is_running(is_users):
        return False
    command = ["systemctl", *(["--user"] if is_users else []), "is-active", "--quiet", unit]
    try:
        return subprocess.run(command, check=False, timeout=_PATIENCE, capture_output=True).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _systemctl(is_users: bool, *words: str) -> None:
    """Runs systemctl, also where no systemd runs at the moment; raises ConfigError."""
    command = ["systemctl", *(["--user"] if is_users else []), *words]
    environ = {**os.environ} if _is_running(is_users) else {**os.environ, "SYSTEMD_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, env=environ, check=False, capture_output=True, text=True, errors="replace", timeout=_PATIENCE
        )
    except OSError as failure:
        raise ConfigError(f"systemctl: {failure.strerror}: a systemd is needed for this") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{' '.join(command)}: no answer within {_PATIENCE:.0f} s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ConfigError(f"{' '.join(command)}: {said[-1]}")
