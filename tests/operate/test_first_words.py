"""A replica whose model is still on its way."""

from pathlib import Path

import pytest

from balancer.contract.words import State
from balancer.operate.engines.first_words import FirstWords
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
    words = FirstWords(log)
    with log.open("a") as out:
        out.writelines(f"{line}\n" for line in lines)
    assert words.state() == ((State.FETCHING, progress) if progress else (State.RUNNING, ""))


def test_nobody_looks_once_sglang_has_begun(tmp_path: Path) -> None:
    log = tmp_path / "replica.log"
    words = FirstWords(log)
    assert words.state() == (State.RUNNING, "")
    with log.open("a") as out:
        for line in ("loading weights", f"replica: {PROGRESS}"):
            out.write(f"{line}\n")
            out.flush()
            assert words.state() == (State.RUNNING, "")


WAITS = "waits for 1 GPU of kind L4 (GPU 0: held by other: llava on port 8001)"


def test_what_it_waits_for_and_what_it_leased(tmp_path: Path) -> None:
    log = tmp_path / "replica.log"
    words = FirstWords(log)
    log.write_text(f"replica: {WAITS}\n")
    assert (words.state(), words.leased) == ((State.PROVISIONING, WAITS), "")
    with log.open("a") as out:
        out.write("replica: GPU 2 (L4, GPU-a1), GPU 3 (L4, GPU-b2): python -m sglang.launch_server --x (y)\nloading\n")
    assert words.state() == (State.RUNNING, "")
    assert (words.leased, words.resources) == ("GPU 2 (L4, GPU-a1), GPU 3 (L4, GPU-b2)", "2x L4")
    later = FirstWords.of_running(log)
    assert (later.state(), later.resources) == ((State.RUNNING, ""), "2x L4")


FETCHES, LEASE = f"replica: {PROGRESS}", "replica: GPU 0 (L4, GPU-a1): python -m sglang.launch_server"
LOADED = (State.RUNNING, "")


@pytest.mark.parametrize(
    ("before", "now", "then"),
    [
        ((FETCHES,), (State.FETCHING, PROGRESS), "1x L4"),
        ((LEASE, "loading", FETCHES), (State.FETCHING, PROGRESS), "1x L4"),
        ((f"replica: {WAITS}",), (State.PROVISIONING, WAITS), "1x L4"),
        ((FETCHES, LEASE), LOADED, "1x L4"),
        ((FETCHES, LEASE, "loading"), LOADED, "1x L4"),
        ((FETCHES, "loading"), LOADED, ""),
    ],
)
@pytest.mark.parametrize("earlier", ["", "loading\n" * (200 << 10)], ids=["short", "long"])
def test_the_next_controller_reads_on(
    before: tuple[str, ...], now: tuple[State, str], then: str, earlier: str, tmp_path: Path
) -> None:
    """A download goes on under it, after the words of earlier processes or none."""
    log = tmp_path / "replica.log"
    log.write_text("".join([earlier, *(f"{line}\n" for line in before)]))
    words = FirstWords.of_running(log)
    assert words.state() == now
    if now[0] is not State.RUNNING:
        assert words.leased == ""
    with log.open("a") as out:
        out.write(f"{LEASE}\nloading\n")
    assert (words.state(), words.resources) == (LOADED, then)
