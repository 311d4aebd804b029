"""replica/fetch.py: each connection that a request's media cost is one that the policy allows, redirects included."""

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from replica.fetch import Unfetchable, Unreachable, fetch, guarded
from replica.media import MediaError, MediaPolicy


class Web(ThreadingHTTPServer):
    """A server on loopback that redirects from /to/URL, and otherwise says which Host it was asked as."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked: list[str] = []


class _Answers(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        body = f"{self.headers['Host']} {self.headers['Authorization']}".encode()
        self.send_response(302 if self.path.startswith("/to/") else 404 if self.path == "/gone" else 200)
        if self.path.startswith("/to/"):
            self.send_header("Location", self.path.removeprefix("/to/"))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@dataclass(frozen=True)
class Names(MediaPolicy):
    """Knows a public host, which is this machine in truth; every other look-up is the real one."""

    def addresses(self, host: str, port: int) -> list[str]:
        return ["127.0.0.1"] if host == "public.test" else super().addresses(host, port)


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(url: str, policy: MediaPolicy) -> str:
    with guarded(requests.Session(), policy) as session:
        return session.get(url, timeout=10).text


def test_connects_to_the_checked_address(web: Web) -> None:
    """A connection goes to exactly the address that was checked."""
    # No name server knows this name: whoever looked it up a second time would not get here.
    host = f"public.test:{web.server_port}"
    assert get(f"http://{host}/", Names()) == f"{host} None"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "127.1", "0"])
def test_this_machine_is_not_asked_and_nothing_connects(web: Web, host: str) -> None:
    with pytest.raises(MediaError, match="not on the public Internet"):
        get(f"http://{host}:{web.server_port}/flush_cache", MediaPolicy())
    assert web.asked == []
    assert get(f"http://{host}:{web.server_port}/image", MediaPolicy(private=True))


def test_redirect_to_this_machine(web: Web) -> None:
    """A redirect from a public host to this machine is not followed."""
    inner = f"http://127.0.0.1:{web.server_port}/flush_cache"
    with pytest.raises(MediaError, match="not on the public Internet"):
        get(f"http://public.test:{web.server_port}/to/{inner}", Names())
    assert web.asked == [f"/to/{inner}"]


def test_a_redirect_to_a_host_that_was_not_named_is_not_followed(web: Web) -> None:
    named = MediaPolicy(domains=frozenset({"127.0.0.1"}), private=True)
    with pytest.raises(MediaError, match=r"media from 127\.0\.0\.1 only"):
        get(f"http://127.0.0.1:{web.server_port}/to/http://localhost:{web.server_port}/x", named)
    assert len(web.asked) == 1


@pytest.mark.parametrize(
    ("policy", "through"),
    [(Names(), False), (Names(domains=frozenset({"public.test"})), True), (Names(private=True), True)],
)
def test_a_proxy_is_asked_only_for_what_the_operator_named(
    web: Web, monkeypatch: pytest.MonkeyPatch, policy: MediaPolicy, through: bool
) -> None:
    with Web() as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        for name in ("no_proxy", "NO_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
        get(f"http://public.test:{web.server_port}/a", policy)
        proxy.shutdown()
        thread.join()
    assert (len(proxy.asked), len(web.asked)) == ((1, 0) if through else (0, 1))


def test_a_password_comes_from_the_url_and_from_no_file(
    web: Web, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("home") / "netrc"
    file.write_text("machine 127.0.0.1 login operator password secret\n")
    monkeypatch.setenv("NETRC", str(file))
    url = f"127.0.0.1:{web.server_port}/"
    assert get(f"http://{url}", MediaPolicy(private=True)).endswith(" None")
    assert get(f"http://me:word@{url}", MediaPolicy(private=True)).endswith(" Basic bWU6d29yZA==")


def test_what_cannot_be_fetched_is_the_clients_mistake(web: Web) -> None:
    def download(url: str, timeout: float) -> bytes:
        with guarded(requests.Session(), MediaPolicy(private=True)) as session:
            answer = session.get(url, timeout=timeout)
            answer.raise_for_status()
            return answer.content

    here = f"http://127.0.0.1:{web.server_port}"
    assert fetch(download, f"{here}/image", timeout=10)
    with pytest.raises(Unfetchable, match=r"cannot be fetched: 404"):
        fetch(download, f"{here}/gone", timeout=10)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{mute.getsockname()[1]}/"
        with pytest.raises(Unreachable, match="no connection"):
            fetch(download, nobody, timeout=10)
        mute.listen()
        with pytest.raises(Unreachable, match="no answer in time"):
            fetch(download, nobody, timeout=0.3)
    with pytest.raises(MediaError, match="cannot be fetched"):
        fetch(download, "http://no.such.name.invalid/", timeout=10)
