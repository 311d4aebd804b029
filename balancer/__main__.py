"""python -m balancer: one balancer process."""

import argparse
import logging
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import uvloop

from balancer import process
from balancer.config import Config
from balancer.contract.listing import ReplicaListing
from balancer.errors import ConfigError
from balancer.inherited import settle
from balancer.relay.listen import handed_over
from balancer.spec import service_file, text_file
from balancer.spec.loopback import is_loopback_name
from balancer.spec.settings import PolicyName, ReadinessProbe, Settings
from balancer.spec.tree import value_of
from balancer.workers import supervisor

MOST_WORKERS = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until told to stop. Returns 0 after a clean end and 1 if it cannot start; exits with 2 for wrong usage."""
    settle()
    options = parse(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="groundserve: %(levelname)s: %(message)s")
    logging.getLogger("groundserve").setLevel(logging.INFO)
    try:
        _take_over_addresses(options)
        config = config_from(options)
        if config.workers > 1:
            return supervisor.run(config, reread=lambda: config_from(options, patience=0))
        uvloop.run(process.run(config, reread=lambda: config_from(options, patience=0)))
    except ConfigError as error:
        print(f"groundserve: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags; a flag that is not given takes its value from its environment variable."""
    return _parser().parse_args(arguments)


def config_from(options: argparse.Namespace, patience: float = text_file.PATIENCE) -> Config:
    """The process's configuration; raises ConfigError with one line.

    `patience` is for how many seconds to wait for a pipe's contents; a process that is serving cannot wait.
    """
    described = service_file.load(options.service, patience=patience) if options.service else None
    values: dict[str, Any] = described.settings.model_dump(exclude_unset=True) if described else {}
    for pair in options.set:
        key, found, value = pair.partition("=")
        if not found:
            raise ConfigError(f"--set {pair}: write --set key=value")
        values[key.strip()] = value_of(value, f"--set {key.strip()}")
    settings = Settings.from_mapping(values, "--set" if options.set else "x-groundserve")
    listen, admin = _address(options.listen, "--listen"), _address(options.admin, "--admin")
    if not is_loopback_name(_joined(listen)) and not options.open and not options.api_keys and not options.state:
        raise ConfigError(
            f"--listen {options.listen} is not loopback: give --api-keys FILE or --state FOLDER, or say --open to let "
            "everyone who reaches it use it"
        )
    admin_key = _key(options.admin_key, "--admin-key", patience)
    if not is_loopback_name(_joined(admin)) and not options.open and admin_key is None:
        raise ConfigError(
            f"--admin {options.admin} is not loopback: give --admin-key FILE, or say --open to let everyone who "
            "reaches it look"
        )
    tls_cert, tls_key = _path(options.tls_cert), _path(options.tls_key)
    if described and described.tls and not tls_cert and not tls_key:
        tls_cert, tls_key = described.tls
    if bool(tls_cert) != bool(tls_key):
        raise ConfigError("--tls-cert and --tls-key belong together: give both or neither")
    sources = _sources(options.replica, options.discover)
    own_name = described.name if described else "groundserve"
    (first_name, (replicas, discover)), *others = sources.items()
    config = Config(
        listen=listen,
        admin=admin,
        listen_fd=options.listen_fd,
        admin_fd=options.admin_fd,
        published=options.published,
        admin_published=options.admin_published,
        accept_when_ready=options.accept_when_ready,
        policy=options.policy or (described.policy if described else None) or "round_robin",
        target_qps=_target_qps(described),
        replicas=replicas,
        discover=discover,
        name=first_name or own_name,
        service_file=_path(options.service),
        settings=settings,
        readiness=(described.readiness_probe if described else None) or ReadinessProbe(),
        replica_key=_key(options.replica_key, "--replica-key", patience),
        admin_key=admin_key,
        api_keys=_path(options.api_keys),
        state=_path(options.state),
        wants_keys=bool(options.api_keys) or not (options.open or is_loopback_name(_joined(listen))),
        tls_cert=tls_cert,
        tls_key=tls_key,
        replica_ca=_path(options.replica_ca),
        is_log_json=options.log_format == "json",
        otlp=options.otlp,
        workers=options.workers,
    )
    return replace(
        config,
        others=tuple(
            replace(config, name=name, replicas=replicas, discover=discover) for name, (replicas, discover) in others
        ),
    )


def _sources(
    urls: Sequence[str], discovered: Sequence[str]
) -> dict[str, tuple[tuple[ReplicaListing, ...], str | None]]:
    """Each service's replicas and discovery source, by the service's name; a single service may have an empty name.

    Raises ConfigError if the flags contradict each other.
    """
    replicas: dict[str, list[str]] = {}
    for url in urls:
        name, address = _named(url)
        replicas.setdefault(name, []).append(address)
    names = dict(_named(source) for source in discovered)
    if len(names) < len(discovered):
        raise ConfigError("--discover: write NAME=dns://HOST:PORT, each with a name of its own, for several services")
    if both := replicas.keys() & names.keys():
        of = f" of {min(both)}" if min(both) else ""
        raise ConfigError(f"--replica and --discover{of} exclude each other: give one of them")
    if "" in (*replicas, *names) and len(replicas) + len(names) > 1:
        raise ConfigError("--replica and --discover: write NAME=ADDRESS for all of them, or for none")
    listed: dict[str, tuple[tuple[ReplicaListing, ...], str | None]] = {
        name: ((), source) for name, source in names.items()
    }
    for name, addresses in replicas.items():
        prefix = name or "replica"
        listings = (ReplicaListing(f"{prefix}-{n}", _http(url), id=n) for n, url in enumerate(addresses, 1))
        listed[name] = (tuple(listings), None)
    return listed or {"": ((), None)}


def _named(text: str) -> tuple[str, str]:
    """Splits NAME=ADDRESS; the name is empty if there is none."""
    found = re.fullmatch(r"([A-Za-z0-9][\w.-]{0,62})=(.+)", text, re.ASCII)
    return (found[1], found[2]) if found else ("", text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m balancer",
        description="One endpoint in front of SGLang replicas.",
        epilog="Every flag has an environment twin: --listen is BALANCER_LISTEN, and so on.",
        allow_abbrev=False,
    )

    def flag(name: str, default: str | None = None, **more: Any) -> None:
        twin = "BALANCER_" + name.lstrip("-").replace("-", "_").upper()
        if more.get("action") == "append":
            more["default"] = os.environ.get(twin, "").split()
        elif more.get("action") == "store_true":
            more["default"] = os.environ.get(twin, "").lower() in ("1", "true", "yes")
        else:
            more["default"] = os.environ.get(twin) or default
        parser.add_argument(name, **more)

    flag("--listen", "127.0.0.1:30001", metavar="HOST:PORT", help="the endpoint (default: %(default)s)")
    flag("--admin", "127.0.0.1:30002", metavar="HOST:PORT", help="status and drain (default: %(default)s)")
    flag("--listen-fd", type=int, metavar="N", help="a descriptor of a socket that listens, in place of --listen")
    flag("--admin-fd", type=int, metavar="N", help="the same in place of --admin")
    flag(
        "--published",
        metavar="HOST",
        help="in a container: the host's address at which the endpoint is published; on loopback, public names in Host "
        "are refused as they are without a container",
    )
    flag("--admin-published", metavar="HOST", help="the same of the admin port")
    flag(
        "--accept-when-ready",
        "0",
        type=_seconds,
        metavar="SECONDS",
        help="let clients wait until a replica is ready, for so long at most (default: %(default)s)",
    )
    flag("--policy", choices=get_args(PolicyName), help="which replica gets a request (default: round_robin)")
    flag(
        "--replica",
        action="append",
        metavar="[NAME=]URL",
        help="a replica, http://HOST:PORT; may be repeated; a NAME says of which service, where there are several",
    )
    flag(
        "--discover",
        action="append",
        metavar="[NAME=]dns://HOST:PORT",
        help="find the replicas by DNS instead; may be repeated, for services with a NAME each",
    )
    flag(
        "--service",
        metavar="FILE",
        help="a service file: readiness probe, policy, x-groundserve; looked at anew when it changes",
    )
    flag("--set", action="append", metavar="KEY=VALUE", help="one setting; may be repeated")
    flag("--api-keys", metavar="FILE", help="who may use the endpoint: a line each, NAME:SHA256 or the key itself")
    flag("--state", metavar="FOLDER", help="keep keys and usage there, on a local disk (groundserve keys, usage)")
    flag("--open", action="store_true", help="listen beyond loopback for everyone, without keys")
    flag(
        "--admin-key",
        metavar="FILE",
        help="the key required to change anything on the admin port, and to see keys and usage",
    )
    flag("--replica-key", metavar="FILE", help="the replicas' own API key")
    flag("--tls-cert", metavar="FILE", help="the endpoint's certificate chain, PEM; with --tls-key it speaks https")
    flag("--tls-key", metavar="FILE", help="the certificate's private key, PEM")
    flag("--replica-ca", metavar="FILE", help="certificates, PEM, that https replicas are checked by")
    flag(
        "--workers",
        "1",
        type=_workers,
        metavar="N",
        help="processes that relay, each on a core of its own; auto: one for each core (default: %(default)s)",
    )
    flag("--log-format", "text", choices=("text", "json"), help="of the line a request (default: %(default)s)")
    flag(
        "--otlp", metavar="URL", help="an OpenTelemetry collector that gets a trace of each request, by OTLP over HTTP"
    )
    return parser


def _take_over_addresses(options: argparse.Namespace) -> None:
    """Sets --listen and --admin to the addresses of the sockets that our parent handed to us; raises ConfigError."""
    for name in ("listen", "admin"):
        descriptor = getattr(options, f"{name}_fd")
        if descriptor is not None:
            listener = handed_over(descriptor, f"--{name}-fd")
            host, port = listener.getsockname()[:2]
            listener.detach()
            setattr(options, name, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise ValueError
    return seconds


def _workers(text: str) -> int:
    if text == "auto":
        return min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    if not text.isdecimal() or not 1 <= int(text) <= MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 1 to {MOST_WORKERS} nor auto")
    return int(text)


def _target_qps(described: service_file.Spec | None) -> dict[str, float]:
    policy = described.service.replica_policy if described else None
    target = policy.target_qps_per_replica if policy else None
    return dict(target) if isinstance(target, dict) else {}


def _address(text: str, flag: str) -> tuple[str, int]:
    host, found, port = text.rpartition(":")
    if not found or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{flag} {text}: write HOST:PORT, as in 127.0.0.1:30001")
    return host.strip("[]") or "127.0.0.1", int(port)


def _http(url: str) -> str:
    return url.rstrip("/") if "://" in url else f"http://{url.rstrip('/')}"


def _joined(address: tuple[str, int]) -> str:
    return f"[{address[0]}]" if ":" in address[0] else address[0]


def _path(text: str | None) -> Path | None:
    return Path(text).expanduser() if text else None


def _key(path: str | None, flag: str, patience: float) -> str | None:
    if path is None:
        return None
    key = text_file.read(path, f"{flag} {path}", "a file with a key", patience).strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(f"{flag} {path}: one line with a key is wanted there")
    return key


if __name__ == "__main__":
    sys.exit(main())
