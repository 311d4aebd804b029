"""The measurement of our own features is held to what is known."""

import json
from pathlib import Path

import orjson
import pytest

from balancer.routing.prompt import BLOCK_BYTES, Prompt
from tests.bench import features
from tests.bench.features import CUT, FLEET, KEYED, LIMITED, METERED, PREFIX, TURNS, UNMETERED, verdict
from tests.bench.figures import Figure
from tests.bench.messages import CHAT_PATH, long_requests
from tests.bench.running import fetch, replicas, running


def rows(bare: float, keyed: float, turns: float, cut: float, prefix: float) -> dict[str, dict[str, Figure]]:
    return {
        UNMETERED: {"requests": Figure(bare), "streams": Figure(20.0)},
        KEYED: {"requests": Figure(keyed), "streams": Figure(22.4)},
        LIMITED: {"requests": Figure(keyed * 1.05), "streams": Figure(22.4 * 1.2)},
        TURNS: {"requests": Figure(turns)},
        CUT: {"requests": Figure(cut)},
        PREFIX: {"requests": Figure(prefix)},
    }


def test_verdict_is_relative_cost() -> None:
    """The verdict is each feature's cost relative to the balancer without it."""
    found = verdict(rows(bare=100, keyed=109, turns=100, cut=110, prefix=135))
    assert [kept for kept, _ in found] == [True, True, False, False, True]
    assert "requests: metrics and keys cost +9%" in found[0][1]
    assert "requests: keys with limits cost +5%" in found[1][1]
    assert "streams: metrics and keys cost +12%" in found[2][1]
    assert "streams: keys with limits cost +20%" in found[3][1]
    assert "among 64 costs +25% of relaying" in found[4][1]
    assert "included: +35%" in found[4][1]
    assert [kept for kept, _ in verdict(rows(100, 111, 100, 110, 142))] == [False, True, False, False, False]


def test_long_prompts() -> None:
    """Long prompts have the requested length, and share half of it within their group."""
    bodies = long_requests(kib=4, seed=1, groups=2, count=6)
    for body in bodies:
        messages = orjson.loads(body)["messages"]
        assert sum(len(message["content"]) for message in messages) == 4096
    blocks = [Prompt(CHAT_PATH, [body]).blocks for body in bodies]
    same, other = [sum(a == b for a, b in zip(blocks[0], blocks[n], strict=True)) for n in (2, 1)]
    assert same >= 2048 // BLOCK_BYTES - 1, "2 KiB, less what stands before the text"
    assert other == 0


def test_what_is_measured_is_what_it_says(tmp_path: Path) -> None:
    with replicas() as urls:
        chosen = features.variants(urls, tmp_path, tmp_path)
        for name in (UNMETERED, KEYED, LIMITED, CUT):
            port, variant = chosen[name]
            assert variant.launch.census is not None
            admin = variant.launch.census.url.removesuffix("/status")
            with running(name, variant.launch, port, tmp_path / "log", key=variant.key):
                metrics = fetch(f"{admin}/metrics")[1].decode()
                counted = [line for line in metrics.splitlines() if line.startswith("groundserve_requests_total{")]
                assert bool(counted) is (name != UNMETERED), "one request was answered"
                status = json.loads(fetch(f"{admin}/status")[1])
                assert status["service"]["total"] == (FLEET if name == CUT else 2)
                without = fetch(f"http://127.0.0.1:{port}{CHAT_PATH}", b"{}")[0]
                assert (without == 401) is (name in (KEYED, LIMITED))


def test_a_short_run_measures_every_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features.main(["--rounds", "1", "--seconds", "0.3", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "features.json").read_text())["microseconds"]
    assert set(found) == {UNMETERED, METERED, KEYED, LIMITED, TURNS, CUT, PREFIX}
    assert all(figure["value"] > 0 for by in found.values() for figure in by.values())
    assert said.count("promised") == 5
