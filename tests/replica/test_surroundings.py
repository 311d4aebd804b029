"""replica/surroundings.py: variables that were meant for other programs do not keep a replica from serving."""

import urllib.request
from pathlib import Path

import pytest
import requests.utils

from replica.surroundings import no_proxy, set_right


@pytest.mark.parametrize(
    ("environ", "host", "wanted"),
    [
        ({}, "127.0.0.1", "localhost,127.0.0.1,::1,[::1]"),
        ({}, "0.0.0.0", "localhost,127.0.0.1,::1,[::1]"),
        ({}, "10.0.0.7", "localhost,127.0.0.1,::1,[::1],10.0.0.7"),
        ({"NO_PROXY": "corp.example"}, "::", "corp.example,localhost,127.0.0.1,::1,[::1]"),
        ({"no_proxy": "a, 127.0.0.1", "NO_PROXY": "b"}, "localhost", "a,127.0.0.1,b,localhost,::1,[::1]"),
        ({"no_proxy": "*"}, "10.0.0.7", "*"),
    ],
)
def test_this_machine_is_never_asked_through_a_proxy(environ: dict[str, str], host: str, wanted: str) -> None:
    assert no_proxy(environ, host) == {"no_proxy": wanted, "NO_PROXY": wanted}


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000/", "http://localhost/", "http://[::1]:8000/", "http://10.0.0.7/"]
)
def test_the_libraries_that_sglang_asks_with_take_it_so(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for name, value in {"http_proxy": "http://proxy.example:3128", **no_proxy({}, "10.0.0.7")}.items():
        monkeypatch.setenv(name, value)
    assert requests.utils.get_environ_proxies(url) == {}
    assert urllib.request.proxy_bypass(url.split("/")[2])
    assert requests.utils.get_environ_proxies("http://huggingface.co/")


def test_surroundings_that_are_right_stay(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PATH": "/bin"}
    made = set_right(environ, "127.0.0.1")
    assert {name: made[name] for name in environ} == environ
    assert made["PYTHONUTF8"] == "1"


@pytest.mark.parametrize("home", ["/proc", "/no/such/folder", "/dev/null"])
def test_a_home_that_takes_no_files_is_replaced(tmp_path: Path, home: str) -> None:
    made = set_right({"HOME": home, "TMPDIR": str(tmp_path)}, "127.0.0.1")
    assert Path(made["HOME"]).parent == tmp_path
    (Path(made["HOME"]) / "x").touch()


def test_downloads_in_a_read_only_home(tmp_path: Path) -> None:
    """Models that were downloaded into a home that is now read-only are still found."""
    downloads = tmp_path / "home/.cache/huggingface"
    downloads.mkdir(parents=True)
    (tmp_path / "home").chmod(0o500)
    made = set_right({"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}, "127.0.0.1")
    # For root no folder is read-only.
    assert made.get("HF_HOME", str(downloads)) == str(downloads)
    assert made["HOME"] == str(tmp_path / "home") or "HF_HOME" in made


def test_a_temporary_folder_that_is_not_there_is_not_named() -> None:
    assert "TMPDIR" not in set_right({"HOME": "/", "TMPDIR": "/no/such/folder"}, "127.0.0.1")
