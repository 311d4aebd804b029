"""The measurements themselves are held to what is known."""

import asyncio
import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from xml.etree import ElementTree

import pytest

from balancer.operate.engines.ports import free_ports
from tests.bench import load, messages, process_tree, relay, report
from tests.bench.chart import chart
from tests.bench.figures import Figure, Figures, check_counts, figure, figures, ratio
from tests.bench.install import Unavailable, call
from tests.bench.peers import PEERS, ROOT, Launch
from tests.bench.running import counts, replicas, running
from tests.bench.stats import median, quantile, spread
from tests.bench.streams import gaps

# Burns CPU in a thread of its own and in a child, says how much, and waits.
BUSY = """
import os, sys, threading, time
def burn(seconds):
    start = time.thread_time()
    while time.thread_time() - start < seconds: sum(range(1000))
child = os.fork()
thread = threading.Thread(target=burn, args=(0.3,)); thread.start(); thread.join()
if child == 0:
    burn(0.2); os.write(1, b"%.3f\\n" % time.process_time()); sys.stdin.read()
else:
    os.write(1, b"%.3f\\n" % time.process_time()); sys.stdin.read(); os.waitpid(child, 0)
"""
GROW = "import sys; print(flush=True); sys.stdin.readline(); a = b'x' * (64 << 20); print(flush=True); sys.stdin.read()"


@contextmanager
def program(text: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", text]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        try:
            yield process
        finally:
            process.stdin.close()


@contextmanager
def server_that_says(answer: bytes, after: float = 0.0) -> Iterator[str]:
    """A server that answers whatever comes, so many seconds later, with the same bytes and closes."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            time.sleep(after)
            self.request.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def generate(mode: str, url: str, **options: float) -> dict:
    """What the load generator finds, in this process."""
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return asyncio.run(load.run(load.parse([mode, url, *flags])))


def test_quantiles_are_samples_that_enough_others_do_not_exceed() -> None:
    samples = [float(n) for n in range(100, 0, -1)]
    assert [quantile(samples, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert quantile([7.0], 0.99) == 7.0
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert spread([90.0, 100.0, 120.0]) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="no samples"):
        quantile([], 0.5)


def test_cpu_time_is_that_of_all_threads_and_children() -> None:
    with program(BUSY) as process:
        burnt = sum(float(process.stdout.readline()) for _ in range(2))
        # What each of the two uses after it told is not in what it told.
        assert process_tree.cpu_seconds(process.pid) == pytest.approx(burnt, abs=0.06)
        assert burnt > 0.75
        assert len(process_tree.members(process.pid)) == 2


def test_memory_grows_by_what_a_program_takes() -> None:
    with program(GROW) as process:
        process.stdout.readline()
        before = process_tree.memory_bytes(process.pid)
        process.stdin.write("\n")
        process.stdout.readline()
        assert process_tree.memory_bytes(process.pid) - before == pytest.approx(64 << 20, rel=0.05)


def test_a_process_that_is_gone_has_no_cpu_time() -> None:
    with program("") as process:
        process.wait()
    with pytest.raises(ProcessLookupError):
        process_tree.cpu_seconds(process.pid)


def test_messages_have_the_sizes_that_the_table_names() -> None:
    assert len(messages.small_request()) == messages.REQUEST_BYTES == 400
    assert len(messages.small_answer()) == messages.ANSWER_BYTES == 600
    assert {len(messages.event(number)) for number in (0, 9, 999999)} == {messages.EVENT_BYTES}
    assert json.loads(messages.event(3).removeprefix(b"data: "))["choices"][0]["delta"]["content"] == " 000003"


def test_gaps_are_between_events_inside_the_phase() -> None:
    arrivals = [(1.0, 1), (2.0, 2), (2.5, 4), (9.0, 5)]
    assert gaps(arrivals, start=1.5, end=3.0) == [1.0, 0.5, 0.0]


def test_every_request_and_event_that_the_load_counts_arrived() -> None:
    with replicas() as urls:
        loop = generate("requests", urls[1], count=8, seconds=0.5, warmup=0.1)
        assert loop["errors"] == {}
        assert counts(urls[0]) == [0, loop["sent"]]
        assert 0 < loop["count"] < loop["sent"]
        assert loop["cpu_seconds"] is None

        streams = generate("streams", urls[1], count=20, seconds=0.5, warmup=0.2)
        assert streams["errors"] == {}
        assert streams["sent"] == 20
        assert 0 < streams["count"] <= 20 * (0.2 + 1.25 * 0.5 + 0.25) * 50
        assert streams["gap_p99"] >= 1 / 50

        idle = generate("idle", urls[0], count=60, seconds=0, warmup=0, pid=os.getpid())
        assert (idle["count"], idle["errors"]) == (60, {})
        assert idle["before"] > 1 << 20


@pytest.mark.parametrize(
    ("mode", "answer", "complaint"),
    [
        ("requests", b"HTTP/1.1 500 Oh\r\ncontent-length: 2\r\n\r\nno", "status 500, body b'no'"),
        ("requests", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "status 200, body b'{}'"),
        ("requests", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}", "connection lost within an answer"),
        ("requests", b"nonsense\r\n\r\n", "not HTTP"),
        ("streams", b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nno!", "at byte 0 of the body: b'no!'"),
        ("streams", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", "ended after 0 events"),
        ("streams", b"HTTP/1.1 200 OK\r\n\r\n" + messages.event(0), "connection lost within an answer"),
    ],
)
def test_a_wrong_answer_is_an_error_not_a_fast_one(mode: str, answer: bytes, complaint: str) -> None:
    with server_that_says(answer) as url:
        result = generate(mode, url, count=1, seconds=0.05, warmup=0.05)
    assert complaint in next(iter(result["errors"]))
    assert not result.get("count")


def test_a_phase_goes_on_until_something_is_answered() -> None:
    body = messages.small_answer()
    answer = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    with server_that_says(answer, after=0.5) as url:
        result = generate("requests", url, count=1, seconds=0.05, warmup=0.05)
    assert result["errors"] == {}
    assert result["count"] == 1
    assert result["end"] - result["start"] > 0.3


def test_nobody_there_is_an_error() -> None:
    result = generate("requests", f"http://127.0.0.1:{free_ports(1)[0]}", count=1, seconds=0.05, warmup=0.05)
    assert "connect" in next(iter(result["errors"]))


@pytest.mark.parametrize(
    ("seen", "complaint"),
    [
        ((50, 50), None),
        ((50, 51), "100 requests were sent, the replicas saw 101"),
        ((20, 80), "round robin gave the replicas 20 and 80 requests"),
    ],
)
def test_what_the_replicas_saw_is_checked(seen: tuple[int, int], complaint: str | None) -> None:
    assert next(iter(check_counts({"errors": {}, "sent": 100}, seen)["errors"]), None) == complaint


def a_round(cpu: float | None, ttft: float, error: str | None = None) -> dict[str, dict]:
    fine = {"cpu_seconds": cpu, "count": 1000, "start": 0.0, "end": 2.0, "errors": {error: 1} if error else {}}
    return {
        "requests": fine,
        "streams": {**fine, "ttft_p50": ttft, "ttft_p99": ttft * 2, "gap_p99": 0.02, "events_per_read": 1.0},
    }


MEMORY = {"before": 10 << 20, "after": 30 << 20, "count": 1024, "errors": {}}


def test_figures_are_medians_over_rounds() -> None:
    """Figures are medians over rounds, each relative to direct requests in the same round."""
    rounds = [a_round(0.1, 0.003), a_round(0.3, 0.004), a_round(0.2, 0.008)]
    direct = [a_round(None, 0.001), a_round(None, 0.001), a_round(None, 0.004)]
    row = figures(rounds, direct, MEMORY)
    cost = row.cpu_per_request_us
    assert (cost.value, cost.low, cost.high) == (pytest.approx(200), pytest.approx(100), pytest.approx(300))
    assert cost.samples == pytest.approx((100, 300, 200))
    assert row.requests_a_second.value == 500
    assert row.ttft_p50_added_ms.value == pytest.approx(3)
    assert row.idle_mib.value == 10
    assert row.stream_kib.value == 20


def test_one_bad_round_leaves_no_figure() -> None:
    rounds = [a_round(0.1, 0.003), a_round(0.1, 0.003, "status 500")]
    row = figures(rounds, [a_round(None, 0.001)] * 2, {**MEMORY, "errors": {"refused": 3}})
    assert row.cpu_per_request_us == Figure(None, reason="round 2: status 500 (1 times)")
    assert row.stream_kib.reason == "refused (3 times)"
    assert "peer: FAILED: round 2: status 500 (1 times)" in report.problems({"peer": row}, {})
    assert "failed" in chart({"peer": row})


def rows(**microseconds: float) -> dict[str, Figures]:
    measured = figures([a_round(0.1, 0.003)], [a_round(None, 0.001)], MEMORY)
    found = {}
    for name, value in microseconds.items():
        cost = figure([value])
        both = {"cpu_per_request_us": cost, "cpu_per_event_us": cost}
        found[name.replace("_", "-")] = Figures(**{**vars(measured), **both})
    return found


def judged(found: list[tuple[bool | None, str]]) -> dict[str, list[bool | None]]:
    """The verdicts by build, in the order in which they are said."""
    said: dict[str, list[bool | None]] = {}
    for kept, text in found:
        said.setdefault(text.partition(":")[0], []).append(kept)
    return said


def test_each_build_is_held_to_its_own_promises() -> None:
    peers = {"envoy": 100, "sglang_router": 200, "vllm_router": 130, "nginx": 20}
    good = report.verdict(rows(groundserve=104, groundserve_compiled=94, **peers))
    assert judged(good) == {"groundserve": [True, True], "groundserve-compiled": [True, True, True]}
    assert "CPU per request at most 0.85 times the better Rust router's: 0.72 times" in good[3][1]
    dearer = report.verdict(rows(groundserve=106, groundserve_compiled=111, **peers))
    assert judged(dearer) == {"groundserve": [True, False], "groundserve-compiled": [True, False, False]}
    assert judged(report.verdict(rows(groundserve=201, **peers))) == {"groundserve": [False, False]}


def test_promises_without_the_peer_are_not_judged() -> None:
    assert judged(report.verdict(rows(groundserve=50, nginx=20))) == {"groundserve": [None, None]}
    assert judged(report.verdict(rows(envoy=50, nginx=20))) == {}
    assert ratio(Figure(None, reason="failed"), [figure([1.0])]) is None


def test_goals_are_told_beside_the_promises() -> None:
    """A goal that is missed is said, and breaks nothing."""
    found = rows(groundserve=102, groundserve_compiled=99, envoy=100)
    assert judged(report.goals(found)) == {"groundserve": [False, False], "groundserve-compiled": [True, True]}
    assert all("at most Envoy's" in text for _, text in report.goals(found))
    assert False not in judged(report.verdict(found))["groundserve"]


def test_a_ratio_is_taken_within_each_round() -> None:
    ours = figure([18.0, 27.0, 36.0])  # the machine slows down
    assert ratio(ours, [figure([20.0, 30.0, 40.0])]) == pytest.approx(0.9)
    assert ratio(ours, [figure([20.0, 30.0, 40.0]), figure([9.0, 13.5, 90.0])]) == pytest.approx(2.0)


def test_tables_and_plot_show_every_balancer() -> None:
    measured = rows(groundserve=45, envoy=90, sglang_router=120)
    launches = {name: Launch([], "1.2.3", "on") for name in measured}
    table = report.cost_table(measured, launches).splitlines()
    assert len({len(line) for line in table}) == 1
    assert [cell.strip() for cell in table[2].split("|")[4:7]] == ["45.0 (45.0-45.0)", "0.38", "0.50"]
    assert [line.split("|")[1].strip() for line in report.delay_table(measured).splitlines()[2:]] == [
        "**groundserve**",
        "envoy",
        "sglang-router",
    ]
    texts = [node.text for node in ElementTree.fromstring(chart(measured)).iter() if node.tag.endswith("text")]
    assert {"groundserve", "envoy", "sglang-router", "45", "90", "120"} <= set(texts)


def test_program_that_ends_or_is_missing(tmp_path) -> None:
    """A program that ends early or is missing is reported with its last output."""
    broken = Launch([sys.executable, "-c", "raise SystemExit('no such flag')"], "1", "off")
    with (
        pytest.raises(Unavailable, match="peer ended with 1: no such flag"),
        running("peer", broken, free_ports(1)[0], tmp_path / "log"),
    ):
        pass
    missing = Launch(["/nonexistent/program"], "1", "off")
    with (
        pytest.raises(Unavailable, match="peer does not start"),
        running("peer", missing, free_ports(1)[0], tmp_path / "log"),
    ):
        pass
    with pytest.raises(Unavailable, match=r"sh -c .* failed: ERROR: no such package"):
        call(["sh", "-c", "echo 'ERROR: no such package' >&2; echo more >&2; exit 1"])


def test_a_short_run_measures_our_balancer_from_end_to_end(tmp_path, capsys) -> None:
    short = ["--rounds", "1", "--seconds", "0.3", "--connections", "4", "--streams", "10", "--idle-streams", "20"]
    assert relay.main(["--only", "groundserve", *short, "--out", str(tmp_path), "--cache", str(tmp_path)]) == 0
    figures_ = json.loads((tmp_path / "relay.json").read_text())["figures"]["groundserve"]
    assert 1 < figures_["cpu_per_request_us"]["value"] < 100_000
    assert figures_["cpu_per_event_us"]["reason"] is None
    assert "not judged" in capsys.readouterr().out
    ElementTree.parse(tmp_path / "relay.svg")


def test_only_peers_that_exist_are_asked_for(capsys) -> None:
    with pytest.raises(SystemExit):
        relay.parse(["--only", "haproxy"])
    complaint = capsys.readouterr().err
    assert all(name in complaint for name in PEERS)


# Starts a program as the measurements do, says both process ids, and waits for what ends it.
STARTER = """
import signal, sys
from pathlib import Path
from tests.bench.peers import Launch
from tests.bench.running import started, stop_on_sigterm
stop_on_sigterm()
with started("peer", Launch([sys.executable, "-c", "import time; time.sleep(60)"]), Path(sys.argv[1])) as process:
    print(process.pid, flush=True)
    signal.pause()
"""


def test_a_measurement_that_is_stopped_stops_what_it_started(tmp_path) -> None:
    command = [sys.executable, "-c", STARTER, str(tmp_path / "log")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        started = int(process.stdout.readline())
        process.terminate()
    assert process.returncode == 143
    with pytest.raises(ProcessLookupError):
        os.kill(started, 0)
