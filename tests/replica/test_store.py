"""Models on disk: fetched once, resumed, verified, listed, and carried to machines without a network."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from balancer.operate.engines.ports import free_ports
from replica.presets import resolve
from replica.store import archive, cache, download, hub, pull
from replica.store.cache import Cache, File, Manifest
from replica.store.errors import StoreError
from replica.store.progress import Progress
from tests.lab.hub import COMMIT, Hub, Model, etag_of
from tests.support.until import wait_until

ROOT = Path(__file__).parents[2]
REPO = "org/one"
_random = random.Random(7)
FILES = {
    "config.json": b"{}",
    "model-00001.safetensors": _random.randbytes(700_000),
    "model-00002.safetensors": _random.randbytes(300_000),
    "pytorch_model.bin": _random.randbytes(400_000),
    "onnx/model.onnx": _random.randbytes(20_000),
    "nested/tokenizer.txt": b"a\nb\n",
}
FETCHED = {path for path in FILES if not path.endswith((".bin", ".onnx"))}


@pytest.fixture
def served() -> Iterator[Hub]:
    with Hub({REPO: Model(dict(FILES))}) as hub:
        yield hub


class Machine:
    """A home for models, and the program that keeps them."""

    def __init__(self, home: Path, hub: Hub | None) -> None:
        self.cache = Cache(home / "hub")
        self.environ = {**os.environ, "HF_HOME": str(home), "MODELS_DIR": str(home / "embedded")}
        self.environ["HF_ENDPOINT"] = hub.url if hub else "http://127.0.0.1:9"

    def store(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "replica.store", *arguments]
        return subprocess.run(
            command, env={**self.environ, **environ}, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "replica.store", *arguments]
        return subprocess.Popen(command, env=self.environ, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def files(self, repo: str = REPO) -> dict[str, bytes]:
        """What SGLang would find, by path."""
        snapshot = self.cache.of_repo(repo) / "snapshots" / COMMIT
        return {str(path.relative_to(snapshot)): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()}


@pytest.fixture
def machine(tmp_path: Path, served: Hub) -> Machine:
    return Machine(tmp_path, served)


def test_pull_brings_what_sglang_loads(machine: Machine, served: Hub) -> None:
    """Weights in one format, and their hub's own client finds them without a network."""
    done = machine.store("pull", REPO)
    assert done.returncode == 0, done.stderr
    assert machine.files() == {path: FILES[path] for path in FETCHED}
    assert "licence: apache-2.0" in done.stdout
    assert f"{REPO} is here: 1.0 MB in 4 files" in done.stdout
    program = f"import huggingface_hub as h; print(h.snapshot_download({REPO!r}))"
    offline = {**machine.environ, "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", program], env=offline, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip(), "config.json").read_bytes() == b"{}"
    asked = len(served.asked)
    assert machine.store("pull", REPO).returncode == 0
    assert len(served.asked) == asked  # nothing is fetched twice


def test_pull_goes_on_where_the_network_broke_off(machine: Machine, served: Hub) -> None:
    served.cuts = [200_000, 200_000]
    done = machine.store("pull", REPO)
    assert done.returncode == 0, done.stderr
    assert machine.files() == {path: FILES[path] for path in FETCHED}
    assert [path for path, asked in served.asked if asked], "nobody asked for the rest alone"


def test_pull_goes_on_where_a_killed_one_was(machine: Machine, served: Hub) -> None:
    served.piece_seconds = 0.2
    process = machine.start("pull", REPO)
    wait_until(lambda: served.sent > 300_000, "a part came")
    process.kill()
    process.communicate(timeout=20)
    served.piece_seconds, asked = 0.0, len(served.asked)
    partial = {path.stat().st_size for path in machine.cache.of_repo(REPO).glob("blobs/*.incomplete")}
    assert partial
    assert machine.store("pull", REPO).returncode == 0
    assert machine.files() == {path: FILES[path] for path in FETCHED}
    assert {asked for _, asked in served.asked[asked:]} >= {f"bytes={size}-" for size in partial}


def test_of_two_that_want_it_one_fetches(machine: Machine, served: Hub) -> None:
    served.piece_seconds = 2.0
    first = machine.start("pull", REPO)
    wait_until(lambda: served.sent > 0, "the first began")
    second = machine.start("pull", REPO)
    assert second.stdout is not None
    said = iter(second.stdout.readline, "")
    assert any("waiting for it" in line for line in said)
    served.piece_seconds = 0.0
    for process in (first, second):
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert sorted(path for path, _ in served.asked) == sorted(FETCHED)


def test_wrong_bytes_never_count(machine: Machine, served: Hub) -> None:
    served.wrong = 1
    assert machine.store("pull", REPO).returncode == 0
    assert machine.files() == {path: FILES[path] for path in FETCHED}


def test_bytes_that_stay_wrong_are_an_error_that_says_so(machine: Machine, served: Hub) -> None:
    served.wrong = 10
    done = machine.store("pull", REPO)
    assert done.returncode == 1
    assert "its hash is another" in done.stderr
    assert not any(path.endswith(".safetensors") for path in machine.files())


def test_a_hub_that_sends_all_again_is_understood(machine: Machine, served: Hub) -> None:
    served.cuts, served.ignores_ranges = [200_000], True
    assert machine.store("pull", REPO).returncode == 0
    assert machine.files() == {path: FILES[path] for path in FETCHED}


def test_a_hub_that_is_busy_is_asked_again(machine: Machine, served: Hub) -> None:
    served.statuses = [503, 429]
    assert machine.store("pull", REPO).returncode == 0


def test_what_cannot_be_fetched_is_kept_so_far(tmp_path: Path) -> None:
    """The error says that the next pull goes on there."""
    data = _random.randbytes(200_000)
    with Hub({REPO: Model({"w.safetensors": data})}, statuses=[500] * 50) as served:
        file = File("w.safetensors", len(data), etag_of(data))
        blob = tmp_path / file.etag
        blob.with_name(f"{blob.name}.groundserve.incomplete").write_bytes(data[:1000])
        url = f"{served.url}/{REPO}/resolve/main/w.safetensors"
        with pytest.raises(StoreError, match=r"500 Internal Server Error.*goes on there"):
            download.download(url, {}, file, blob, lambda _: None, pause=0.001)
        assert len(served.asked) == download.PATIENCE
        served.statuses.clear()
        came: list[int] = []
        download.download(url, {}, file, blob, came.append)
        assert blob.read_bytes() == data
        assert sum(came) == len(data) - 1000


@pytest.mark.parametrize(
    ("model", "token", "said"),
    [
        ("org/gated", "", "org/gated is gated: accept its licence"),
        ("org/none", "", "there is no model org/none on the hub"),
        ("nonsense", "", "unknown model nonsense"),
    ],
)
def test_what_may_not_be_had(model: str, token: str, said: str, machine: Machine, served: Hub) -> None:
    served.models["org/gated"] = Model(dict(FILES), token="hf_mine")
    done = machine.store("pull", model, HF_TOKEN=token)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert served.asked == []


def test_a_gated_model_comes_with_its_token(machine: Machine, served: Hub) -> None:
    served.models["org/gated"] = Model(dict(FILES), licence="llama2", token="hf_mine")
    done = machine.store("pull", "org/gated", HF_TOKEN="hf_mine")
    assert done.returncode == 0, done.stderr
    assert "licence: llama2" in done.stdout
    assert "hf_mine" not in done.stdout + done.stderr


def test_another_version_is_asked_for_by_name(machine: Machine) -> None:
    done = machine.store("pull", REPO, "--revision", "v9")
    assert done.returncode == 1
    assert "org/one has no version v9" in done.stderr


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    full = type(usage)(usage.total, usage.total, cache._RESERVE + 1000)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: full)


@pytest.mark.usefixtures("full_disk")
def test_a_disk_without_room_is_said_before_a_byte_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Manifest(REPO, "main", COMMIT, (File("w.safetensors", 5_000_000_000, "a" * 64),))
    monkeypatch.setattr(hub, "look_up", lambda *_: (wanted, ""))
    with pytest.raises(StoreError, match=r"takes 5\.0 GB more, and the disk of .* has 0\.0 MB to spare"):
        pull.pull(REPO, Cache(tmp_path / "hub"), None, lambda _: None)
    assert not (tmp_path / "hub/models--org--one").exists()


@pytest.mark.usefixtures("full_disk")
def test_a_disk_without_room_takes_in_no_part(machine: Machine, tmp_path: Path) -> None:
    tar = tmp_path / "one.tar"
    assert machine.store("pull", REPO).returncode == 0
    assert machine.store("export", REPO, str(tar)).returncode == 0
    with pytest.raises(StoreError, match=r"one\.tar takes 1\.0 MB more, and the disk of .* has 0\.0 MB to spare"):
        archive.read(tar, Cache(tmp_path / "other"), lambda _: None)
    assert not (tmp_path / "other").exists()


def test_without_a_network_what_was_pulled_is_enough(machine: Machine, tmp_path: Path) -> None:
    assert machine.store("pull", REPO).returncode == 0
    apart = Machine(tmp_path, None)
    done = apart.store("pull", REPO)
    assert done.returncode == 0, done.stderr
    assert "taken as it was fetched" in done.stdout
    other = apart.store("pull", "org/two")
    assert other.returncode == 1
    assert "the hub cannot be asked for org/two" in other.stderr


def test_models_are_listed(machine: Machine, served: Hub) -> None:
    assert machine.store("pull", REPO).returncode == 0
    served.models["org/two"] = Model(dict(FILES))
    served.wrong = 10
    assert machine.store("pull", "org/two").returncode == 1
    (machine.cache.folder / "models--org--three/snapshots").mkdir(parents=True)
    rows = {line.split()[0]: line for line in machine.store("list").stdout.splitlines()}
    assert rows[REPO].endswith("here")
    assert "files are missing: pull it" in rows["org/two"]
    assert rows["org/three"].endswith("fetched by another program")


def test_a_model_goes_to_another_machine_in_one_file(machine: Machine, tmp_path: Path) -> None:
    tar = tmp_path / "one.tar"
    assert "pull it first" in machine.store("export", REPO, str(tar)).stderr
    assert machine.store("pull", REPO).returncode == 0
    done = machine.store("export", REPO, REPO, str(tar))  # once is enough, as of a part that two models share
    assert done.returncode == 0, done.stderr
    other = Machine(tmp_path / "other", None)
    (tmp_path / "file").touch()
    nowhere = other.store("import", str(tar), HF_HOME=str(tmp_path / "file"))
    assert f"{tar} cannot be taken in: {tmp_path / 'file'}/hub" in nowhere.stderr
    taken = other.store("import", str(tar))
    assert taken.returncode == 0, taken.stderr
    assert other.files() == machine.files()
    assert "taken as it was fetched" in other.store("pull", REPO).stdout


@pytest.mark.parametrize("damage", ["turned", "short", "empty", "path", "commit", "etag", "absolute", "foreign"])
def test_a_damaged_or_hostile_file_is_refused(machine: Machine, tmp_path: Path, damage: str) -> None:
    """Nothing of it counts, and nothing is written outside the cache."""
    tar = tmp_path / "one.tar"
    assert machine.store("pull", REPO).returncode == 0
    assert machine.store("export", REPO, str(tar)).returncode == 0
    data = tar.read_bytes()
    if damage == "turned":
        middle = data.index(FILES["model-00001.safetensors"]) + 1000
        tar.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif damage == "short":
        tar.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        tar.write_bytes(b"")
    else:
        file = {"path": "config.json", "size": 2, "etag": etag_of(b"{}")}
        manifest = {"repo": "org/x", "revision": "main", "commit": COMMIT, "files": [file]}
        out = "../../../escaped"
        if damage in ("commit", "absolute"):
            manifest["commit"] = out if damage == "commit" else str(tmp_path / "escaped")
        elif damage in ("path", "etag"):
            file[damage] = out if damage == "path" else f"{out}/{file['etag']}"
        with tarfile.open(tar, "w") as made:
            archive._add(made, "manifests.json", json.dumps([manifest]).encode())
            if damage == "foreign":
                link = tarfile.TarInfo("org/x/../../escaped")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc"
                made.addfile(link, io.BytesIO())
            else:
                archive._add(made, f"org/x/{file['etag']}", b"{}")
    other = Machine(tmp_path / "other", None)
    done = other.store("import", str(tar))
    assert done.returncode == 1
    assert done.stderr.startswith("groundserve: ")
    assert "Traceback" not in done.stderr
    assert not any((tmp_path / "other").rglob("snapshots"))
    assert not list(tmp_path.rglob("escaped"))


def test_presets_know_their_parts() -> None:
    assert resolve("llava-v1.6-vicuna-7b").hub_parts == {
        "liuhaotian/llava-v1.6-vicuna-7b": True,
        "llava-hf/llava-1.5-7b-hf": False,
        "openai/clip-vit-large-patch14-336": True,
    }
    assert resolve("smollm2-135m").hub_parts == {}
    files = tuple(File(path, len(data), etag_of(data)) for path, data in FILES.items())
    assert {file.path for file in hub.select(files, with_weights=False)} == {"config.json", "nested/tokenizer.txt"}


def test_a_replica_fetches_before_it_takes_a_gpu(machine: Machine, tmp_path: Path) -> None:
    """And says in its log how far it is; here SGLang then finds no model in these files, and ends."""
    (port,) = free_ports(1)
    log = tmp_path / "log"
    command = [sys.executable, "-m", "replica", "--model", REPO, "--port", str(port)]
    environ = {**machine.environ, "REPLICA_DEVICE": "cpu"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environ, cwd=ROOT, stdout=out, stderr=out)
    try:
        wait_until(lambda: machine.files().keys() == FETCHED, "all is here")
        assert f"replica: fetching {REPO}: 1.0 MB in 4 files" in log.read_text()
    finally:
        process.kill()
        process.wait(timeout=30)


def test_speed_and_rest_are_told() -> None:
    progress = Progress("m", 4_000_000_000, 1_000_000_000, lambda _: None)
    progress._here += 500_000_000
    said = progress.line(time.monotonic() + 5)
    assert said.startswith("fetching m: 1.5 GB of 4.0 GB (37 %), 1")
    assert said.endswith("about 25 s left")
