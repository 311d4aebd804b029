"""Reverse proxies in front of the endpoint, set up as docs/proxies.md says: what clients get through them.

Each stands before a balancer of its own with a simulated replica, whose answers take their time.
"""

import asyncio
import contextlib
import itertools
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvloop

from balancer.operate.engines.ports import free_ports
from tests.bench.install import Unavailable, call, debian_nginx
from tests.clients.outcome import Outcome
from tests.lab.replica import LabReplica
from tests.support.program import ROOT
from tests.support.until import until
from tests.wire.running import House, serving

PAGE = ROOT / "docs/proxies.md"
CLIENT = "127.0.0.2"  # from where clients come; the proxy itself comes from 127.0.0.1
INTERVAL = 0.25  # seconds between events
CHAT = {"model": "lab", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 6}


@dataclass(frozen=True)
class Place:
    """What a proxy needs: its port, the endpoint's address, a folder for its files, the cache of what is installed."""

    port: int
    endpoint: str
    folder: Path
    cache: Path


def run(folder: Path, cache: Path) -> Iterator[Outcome]:
    for name, command in PROXIES.items():
        place = folder / command.__name__
        place.mkdir()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            yield from runner.run(_checked(name, command, place, cache))


async def _checked(name: str, command: Callable[[Place], list[str]], folder: Path, cache: Path) -> list[Outcome]:
    settings = {"trusted_proxies": ["127.0.0.1/32"], "base_path": "/llm"}
    async with LabReplica(token_interval=INTERVAL) as replica, serving(replica, **settings) as house:
        place = Place(*free_ports(1), house.url.removeprefix("http://"), folder, cache)
        try:
            argv = command(place)
        except Unavailable as missing:
            return [Outcome(name, "starts", str(missing))]
        found: list[Outcome] = []
        url = f"http://127.0.0.1:{place.port}"
        with _running(argv, place):
            try:
                await until(lambda: _listens(place.port), "", 30)
            except AssertionError:
                return [Outcome(name, "starts", (folder / "log").read_text(errors="replace")[-400:])]
            for check, test in CHECKS.items():
                try:
                    await asyncio.wait_for(test(url, house), 60)
                    found.append(Outcome(name, check))
                except (AssertionError, httpx.HTTPError, TimeoutError, OSError) as error:
                    found.append(Outcome(name, check, f"{type(error).__name__}: {error}"))
        await house.at_rest()
        return found


@contextlib.contextmanager
def _running(argv: list[str], place: Place) -> Iterator[None]:
    with (place.folder / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env={**os.environ, "HOME": str(place.folder)})
    try:
        yield
    finally:
        process.terminate()  # killed, nginx would leave its workers behind
        process.wait(timeout=30)


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        tried.settimeout(1)
        return tried.connect_ex(("127.0.0.1", port)) == 0


@contextlib.asynccontextmanager
async def _client() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.AsyncHTTPTransport(local_address=CLIENT)
    async with httpx.AsyncClient(transport=transport, timeout=30) as client:
        yield client


async def _events_one_by_one(url: str, _: House) -> None:
    async with _client() as client, client.stream("POST", f"{url}/v1/chat/completions", json=CHAT) as answer:
        assert answer.status_code == 200, answer.status_code
        came = [time.monotonic() async for line in answer.aiter_lines() if line.startswith("data: {")]
    assert len(came) > 6, f"{len(came)} events"
    longest = max(after - before for before, after in itertools.pairwise(came))
    assert longest < 3 * INTERVAL, f"nothing for {longest:.2f} s"
    assert came[-1] - came[0] > 4 * INTERVAL, "all events at once"


async def _clients_address(url: str, house: House) -> None:
    house.log()
    async with _client() as client:
        assert (await client.get(f"{url}/v1/models", params={"x": 1})).status_code == 200
    await until(lambda: any(line["path"] == "/v1/models" for line in house.log()), "a log line")
    (line,) = (line for line in house.log() if line["path"] == "/v1/models")
    assert line["client"] == CLIENT, line["client"]


async def _a_client_that_leaves(url: str, house: House) -> None:
    seen = house.replicas[0].seen
    aborted = seen.generations_aborted
    asked = {**CHAT, "max_tokens": 500}
    async with _client() as client, client.stream("POST", f"{url}/v1/chat/completions", json=asked) as answer:
        async for _ in answer.aiter_lines():
            break
    await seen.until(lambda seen: seen.generations_aborted == aborted + 1)


async def _a_path_that_is_kept(url: str, _: House) -> None:
    async with _client() as client:
        assert (await client.get(f"{url}/llm/v1/models")).status_code == 200


async def _a_large_image(url: str, _: House) -> None:
    asked = {**CHAT, "stream": False, "max_tokens": 1, "image": "x" * (8 << 20)}
    async with _client() as client:
        answer = await client.post(f"{url}/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.status_code


CHECKS: dict[str, Callable[[str, House], Awaitable[None]]] = {
    "events one by one": _events_one_by_one,
    "the client's address in the log": _clients_address,
    "a client that leaves": _a_client_that_leaves,
    "a path that is kept": _a_path_that_is_kept,
    "8 MiB of image": _a_large_image,
}


def blocks(language: str) -> str:
    """The page's block in that language."""
    found = re.search(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/proxies.md has no block in {language}"
    return found[1]


def nginx(place: Place) -> list[str]:
    """The page's block, without its certificate."""
    said = re.sub(r"^ *ssl_.*\n", "", blocks("nginx"), flags=re.MULTILINE)
    said = said.replace("listen 443 ssl;", f"listen 127.0.0.1:{place.port};")
    return _nginx(place, said.replace("127.0.0.1:30001", place.endpoint))


def plain_nginx(place: Place) -> list[str]:
    """With `proxy_pass` alone, and what images need."""
    told = (
        f"proxy_pass http://{place.endpoint}; client_max_body_size 64m; proxy_set_header X-Forwarded-For $remote_addr;"
    )
    return _nginx(place, f"server {{ listen 127.0.0.1:{place.port}; location / {{ {told} }} }}\n")


def _nginx(place: Place, servers: str) -> list[str]:
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {place.folder}/{kind}; " for kind in kinds)
    user = "user root;\n" if os.geteuid() == 0 else ""
    config = place.folder / "nginx.conf"
    config.write_text(
        f"{user}daemon off; worker_processes 1; pid {place.folder}/pid;\nevents {{}}\n"
        f"http {{ {temporary} access_log off;\n{servers}}}\n"
    )
    program = str(debian_nginx(place.cache))
    return [program, "-e", "stderr", "-c", str(config), "-p", str(place.folder)]


def caddy(place: Place) -> list[str]:
    said = blocks("caddyfile").replace("llm.example.com", f"http://127.0.0.1:{place.port}")
    config = place.folder / "Caddyfile"
    config.write_text("{\n    admin off\n}\n" + said.replace("127.0.0.1:30001", place.endpoint))
    return [_debian("caddy", "usr/bin/caddy", place.cache), "run", "--config", str(config), "--adapter", "caddyfile"]


def haproxy(place: Place) -> list[str]:
    said = re.sub(r"bind :443 ssl crt \S+", f"bind 127.0.0.1:{place.port}", blocks("haproxy"))
    config = place.folder / "haproxy.cfg"
    config.write_text(said.replace("127.0.0.1:30001", place.endpoint))
    program = _debian(
        "haproxy", "usr/sbin/haproxy", place.cache, "liblua5.3-0", "libopentracing-c-wrapper0", "libopentracing1"
    )
    found = sorted({str(file.parent) for file in (place.cache / "haproxy").rglob("*.so*")})
    return ["env", f"LD_LIBRARY_PATH={':'.join(found)}", program, "-db", "-f", str(config)]


def _debian(package: str, path: str, cache: Path, *libraries: str) -> str:
    """The program on this machine, else from Debian's package in the cache, so that no service is started."""
    if present := shutil.which(Path(path).name):
        return present
    program = cache / package / path
    if not program.exists():
        if not shutil.which("apt-get"):
            raise Unavailable(f"there is neither {package} on this machine nor apt-get to fetch Debian's: install it")
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            try:
                call(["apt-get", "download", package, *libraries], cwd=folder)
            except Unavailable:
                if os.geteuid() != 0:
                    raise
                call(["apt-get", "update"])  # a fresh container has no package lists yet
                call(["apt-get", "download", package, *libraries], cwd=folder)
            for file in Path(folder).glob("*.deb"):
                call(["dpkg-deb", "--extract", str(file), str(Path(folder) / "all")])
            (Path(folder) / "all").rename(cache / package)
    return str(program)


PROXIES: dict[str, Callable[[Place], list[str]]] = {
    "nginx": nginx,
    "nginx, proxy_pass alone": plain_nginx,
    "Caddy": caddy,
    "HAProxy": haproxy,
}
