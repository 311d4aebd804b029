"""A replica whose model is still on its way."""

from pathlib import Path

import pytest

from balancer.operate.engines.fetching import Fetching
from tests.operate.command_line import LAB, Groundserve

PROGRESS = "fetching org/one: 1.0 GB of 2.0 GB (50 %), 200 MB/s, about 5 s left"


def test_a_download_does_not_eat_the_time_to_become_ready(groundserve: Groundserve, tmp_path: Path) -> None:
    """It takes twice `initial_delay_seconds` here; the status says how far it is."""
    gate = tmp_path / "gate"
    script = f"echo 'replica: {PROGRESS}'\nwhile [ ! -e {gate} ]; do sleep 0.1; done\necho loading\n{LAB}"
    file = groundserve.service("lab", script, replicas=1)
    file.write_text(file.read_text().replace('"path": "/health"', '"path": "/health", "initial_delay_seconds": 4'))
    up = groundserve.up(file)
    up.until("FETCHING")
    shown = groundserve.until("lab", lambda status: status["replicas"][0]["launched_seconds"] > 8)
    assert [(row["status"], row["reason"]) for row in shown["replicas"]] == [("FETCHING", PROGRESS)]
    assert f"lab-1: {PROGRESS}" in groundserve("status", "lab", code=4)
    gate.touch()
    up.until_up()
    assert "ended" not in up.text


@pytest.mark.parametrize(
    ("lines", "progress"),
    [
        ((), ""),
        (("replica: CPU: python -m sglang.launch_server",), ""),
        ((f"replica: {PROGRESS}",), PROGRESS),
        ((f"replica: {PROGRESS}", "replica: GPU 0: python -m sglang.launch_server"), ""),
        ((f"replica: {PROGRESS}", "[2026-11-29] server_args=..."), ""),
    ],
)
def test_the_last_line_of_this_life_tells(lines: tuple[str, ...], progress: str, tmp_path: Path) -> None:
    log = tmp_path / "replica.log"
    log.write_text("replica: fetching org/one: of an earlier life\n")
    fetching = Fetching(log)
    with log.open("a") as out:
        out.writelines(f"{line}\n" for line in lines)
    assert fetching.progress() == progress


def test_nobody_looks_once_sglang_has_begun(tmp_path: Path) -> None:
    log = tmp_path / "replica.log"
    fetching = Fetching(log)
    assert fetching.progress() == ""
    for line in ("loading weights", f"replica: {PROGRESS}"):
        log.write_text(f"{line}\n")
        assert fetching.progress() == ""
