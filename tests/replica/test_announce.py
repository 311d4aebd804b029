"""A job's program, with a scontrol that is a script."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from replica import announce

ROOT = Path(__file__).parents[2]
MARK = "groundserve,of=0,id=1,version=1,digest=d,start=s"


@pytest.fixture
def scontrol(tmp_path: Path) -> Path:
    """Notes what it is asked, and fails twice as it does while slurmctld is not there."""
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        f"[ $(wc -l < {tmp_path}/asked) -gt 2 ] || {{ echo 'Unable to contact slurm controller' >&2; exit 1; }}\n"
    )
    script.chmod(0o755)
    return script


def job(folder: Path, script: str) -> Path:
    file = folder / "job.json"
    argv = [sys.executable, "-c", script, announce.PORT_MARK]
    envs = {"TOKEN": "sesame", "PORT": announce.PORT_MARK, "CUDA_VISIBLE_DEVICES": "7"}
    file.write_text(json.dumps({"argv": argv, "workdir": str(folder), "mark": MARK, "envs": envs}))
    return file


def run(file: Path, path: str, **environ: str) -> subprocess.CompletedProcess[str]:
    own = {"PATH": f"{path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "17", **environ}
    program = "import replica.announce as it, sys, os; it._AGAIN = 0.05; it.main(it.Path(sys.argv[1]), os.environ)"
    return subprocess.run(
        [sys.executable, "-c", program, str(file)], env=own, capture_output=True, text=True, timeout=60, check=False
    )


def test_it_tells_its_address_and_becomes_the_command(scontrol: Path, tmp_path: Path) -> None:
    """Only once Slurm has taken the address; and what Slurm says of GPUs goes before the file."""
    variables = "*(os.environ[name] for name in ('PORT', 'TOKEN', 'CUDA_VISIBLE_DEVICES'))"
    says = f"import os, sys; print(sys.argv[1], {variables}, os.getcwd())"
    done = run(job(tmp_path, says), str(scontrol.parent), CUDA_VISIBLE_DEVICES="1")
    assert done.returncode == 0, done.stderr
    *waited, last = done.stdout.splitlines()
    assert waited == ["replica: waits for Slurm to take its address: Unable to contact slurm controller"]
    port, variable, token, gpus, folder = last.split()
    assert (variable, token, gpus, folder) == (port, "sesame", "1", str(tmp_path))
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(set(asked)) == 1
    assert asked[0].startswith(f"update JobId=17 Comment={MARK},at=http://")
    assert asked[0].endswith(f":{port}")
    assert "sesame" not in asked[0]


def test_what_cannot_be_started_is_told_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    for text in ("", "[]", '{"argv": ["a"]}'):
        file.write_text(text)
        with pytest.raises(announce.AnnounceError, match="does not say what to start here"):
            announce.Job.read(file)
    with pytest.raises(announce.AnnounceError, match="it has to be on each node's PATH"):
        announce._failure_of(["/nowhere/scontrol"])


def test_a_port_is_the_jobs_own_while_it_loads(scontrol: Path, tmp_path: Path) -> None:
    takes = (
        "from socket import *; import sys; socket(AF_UNIX, SOCK_DGRAM).bind(f'{chr(0)}groundserve port {sys.argv[1]}')"
    )
    done = run(job(tmp_path, takes), str(scontrol.parent))
    assert "Address already in use" in done.stderr


def test_a_port_that_is_taken_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as other:
        free, port = other.getsockname()[1], taken.getsockname()[1]
        other.close()
        monkeypatch.setattr(announce.random, "sample", lambda *_: [port, free])
        assert announce.free_port("127.0.0.1") == free
        monkeypatch.setattr(announce.random, "sample", lambda *_: [free, *range(20000, 20010)])
        assert announce.free_port("127.0.0.1") != free, "it is kept for another job"
