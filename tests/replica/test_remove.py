"""Models are removed from this machine: what is asked for, all of it, and nothing that is needed or lies elsewhere."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica import lock_file
from replica.presets import PRESETS
from replica.store.cache import Cache
from replica.store.errors import StoreError
from replica.store.remove import remove
from tests.support.program import ROOT

ONE, TWO = "org/one", "org/two"
LLAVA = PRESETS["llava-v1.6-vicuna-7b"]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    cache = Cache(tmp_path / "hub")
    for repo in (ONE, TWO):
        lay(cache, repo)
    return cache


def lay(cache: Cache, repo: str) -> Path:
    """A model of 3 MB as the hub's own client leaves it."""
    folder = cache.of_repo(repo)
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs/abc").write_bytes(b"x" * 3_000_000)
    (folder / "snapshots/c0ffee").mkdir(parents=True)
    (folder / "snapshots/c0ffee/model.safetensors").symlink_to("../../blobs/abc")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("c0ffee")
    return folder


def removed(cache: Cache, *names: str, used: dict[str, list[str]] | None = None) -> list[str]:
    said: list[str] = []
    remove(names, cache, cache.folder.parent / "embedded", used or {}, said.append)
    return said


def test_a_model_goes_and_says_what_that_frees(cache: Cache) -> None:
    assert removed(cache, ONE) == ["org/one is removed: 3.0 MB"]
    assert cache.repos() == [TWO]
    assert not cache.of_repo(ONE).exists()


def test_several_go_at_once_or_none_does(cache: Cache) -> None:
    with pytest.raises(StoreError, match="org/three is not here: here are org/one, org/two"):
        removed(cache, ONE, "org/three")
    assert cache.repos() == [ONE, TWO]
    said = removed(cache, ONE, TWO, ONE)
    assert said == ["org/one is removed: 3.0 MB", "org/two is removed: 3.0 MB", "6.0 MB are free now"]
    with pytest.raises(StoreError, match="org/one is not here: no model is"):
        removed(cache, ONE)


def test_a_preset_goes_with_the_models_that_it_needs(cache: Cache) -> None:
    for repo in LLAVA.hub_parts:
        lay(cache, repo)
    said = removed(cache, LLAVA.name)
    assert [line.split()[0] for line in said[:-1]] == list(LLAVA.hub_parts)
    assert cache.repos() == [ONE, TWO]


def test_a_part_that_a_service_uses_stays(cache: Cache) -> None:
    for repo in LLAVA.hub_parts:
        lay(cache, repo)
    said = removed(cache, LLAVA.name, used={"eyes": ["--model-path", str(LLAVA.tower)]})
    assert f"{LLAVA.tower} is used by eyes, and stays" in said
    assert cache.repos() == sorted([str(LLAVA.tower), ONE, TWO])


@pytest.mark.parametrize("word", [ONE, "/x/hub/models--org--one/snapshots/c0ffee"])
def test_one_that_a_service_uses_stays(cache: Cache, word: str) -> None:
    with pytest.raises(StoreError, match=r"org/one is used by a, b: .*groundserve down a b.* or say --force"):
        removed(cache, TWO, ONE, used={"a": ["x", word], "b": [word], "c": [TWO + "-large"]})
    assert cache.repos() == [ONE, TWO]


@pytest.mark.parametrize("word", [LLAVA.name, str(LLAVA.model)])
def test_a_service_with_a_preset_uses_all_its_parts(cache: Cache, word: str) -> None:
    lay(cache, str(LLAVA.tokenizer))
    with pytest.raises(StoreError, match="is used by eyes"):
        removed(cache, str(LLAVA.tokenizer), used={"eyes": [word]})


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_what_is_being_fetched_stays(cache: Cache) -> None:
    """By us, or by the hub's own client, as SGLang would."""
    theirs = cache.folder / ".locks/models--org--one/abc.lock"
    for path in (cache.lock(ONE), theirs):
        with locked(path), pytest.raises(StoreError, match="org/one is being fetched right now"):
            removed(cache, TWO, ONE)
        assert cache.repos() == [ONE, TWO]
    removed(cache, ONE)
    assert cache.repos() == [TWO]


def test_nothing_goes_that_a_link_leads_to(cache: Cache, tmp_path: Path) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "file").write_bytes(b"y" * 5_000_000)
    folder = cache.of_repo(ONE)
    (folder / "blobs/def").symlink_to(elsewhere / "file")
    (folder / "snapshots/linked").symlink_to(elsewhere)
    os.link(elsewhere / "file", folder / "blobs/twice")
    assert removed(cache, ONE) == ["org/one is removed: 3.0 MB"]
    assert (elsewhere / "file").stat().st_size == 5_000_000
    cache.of_repo("org/linked").symlink_to(elsewhere)
    with pytest.raises(StoreError, match="is a link"):
        removed(cache, "org/linked")
    (folder := cache.of_repo(TWO) / "snapshots").rename(elsewhere / "snapshots")
    folder.symlink_to(elsewhere / "snapshots")
    removed(cache, TWO)
    assert sorted(path.name for path in elsewhere.iterdir()) == ["file", "snapshots"]


@pytest.mark.parametrize("name", ["../elsewhere", "org/../../elsewhere", "..", "", ".", "/etc", "org"])
def test_no_name_leads_out_of_the_cache(cache: Cache, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(StoreError, match="is not here"):
        removed(cache, name)
    assert (tmp_path / "elsewhere").is_dir()


def test_an_embedded_model_goes_too(cache: Cache, tmp_path: Path) -> None:
    (made := tmp_path / "embedded/tiny-llava").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(b"z" * 2_000_000)
    with pytest.raises(StoreError, match="tiny-llava is used by a"):
        removed(cache, "tiny-llava", used={"a": ["tiny-llava"]})
    with (
        lock_file.held(tmp_path / "embedded/.lock", lambda: None),
        pytest.raises(StoreError, match="being made right now"),
    ):
        removed(cache, "tiny-llava")
    assert removed(cache, "tiny-llava") == ["tiny-llava is removed: 2.0 MB"]
    assert not made.exists()


def test_the_program_is_told_who_uses_what(cache: Cache, tmp_path: Path) -> None:
    environ = {**os.environ, "HF_HUB_CACHE": str(cache.folder), "MODELS_DIR": str(tmp_path / "embedded")}

    def store(*arguments: str, used: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "replica.store", "remove", *arguments]
        return subprocess.run(
            command, input=used, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )

    done = store("--used", "--", ONE, used=json.dumps({"a": [ONE]}))
    assert (done.returncode, "org/one is used by a" in done.stderr) == (1, True)
    done = store(ONE)
    assert (done.returncode, done.stdout) == (0, "org/one is removed: 3.0 MB\n")
