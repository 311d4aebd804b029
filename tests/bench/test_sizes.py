"""The measurement by the size of a request and of a fleet is held to what is known."""

import os
import subprocess
from pathlib import Path

import orjson
import pytest

from tests.bench import sizes
from tests.bench.messages import sized_requests
from tests.bench.sizes import SIZES, lag_buckets, lag_quantile


@pytest.mark.parametrize("size", SIZES.values())
def test_size_of_a_request(size: int) -> None:
    """A request has the requested size and differs from the others."""
    requests = sized_requests(size, seed=1)
    assert {len(body) for body in requests} == {size}
    assert len(set(requests)) == len(requests) >= 8
    prompts = [orjson.loads(body)["messages"][0]["content"] for body in requests[:2]]
    assert prompts[0][: len(prompts[0]) // 4] == prompts[1][: len(prompts[0]) // 4]


def test_the_loops_lag_is_what_was_seen_between_two_scrapes() -> None:
    def text(*counts: int) -> str:
        bounds = ("0.001", "0.01", "+Inf")
        lines = zip(bounds, counts, strict=True)
        return "".join(f'groundserve_loop_lag_seconds_bucket{{le="{bound}"}} {count}.0\n' for bound, count in lines)

    assert lag_buckets(text(1, 2, 3)) == [(0.001, 1.0), (0.01, 2.0), (float("inf"), 3.0)]
    assert lag_quantile(text(100, 100, 100), text(190, 199, 200), 0.5) == 0.001
    assert lag_quantile(text(100, 100, 100), text(190, 199, 200), 0.99) == 0.01
    assert lag_quantile(text(0, 0, 0), text(190, 198, 200), 1.0) == float("inf")


def test_a_short_run_measures_all_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "SIZES", {name: SIZES[name] for name in ("200 B", "128 KiB")})
    flags = ["--only", "bodies", "streams", "fleets"]
    flags += ["--seconds", "0.3", "--streams", "20", "--fleets", "2", "--out", str(tmp_path)]
    assert sizes.main(flags) == 0
    told = (tmp_path / "sizes.md").read_text()
    assert told in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in told.splitlines() if line[:1] == "|"]
    by_name = {row[0]: row[1:] for row in rows}
    assert all(float(cell.replace(",", "")) > 0 for size in sizes.SIZES for cell in by_name[size])
    streams = by_name["round_robin, TLS"]
    assert float(streams[0]) > 0
    assert float(streams[-1]) >= 1
    assert float(by_name["2"][0].removesuffix("%")) < 100
    assert "load average" in told


def measured_workers(tmp_path: Path, *more: str) -> dict[str, list[float]]:
    flags = ["--only", "workers", "--seconds", "0.3", "--streams", "20", "--out", str(tmp_path), *more]
    assert sizes.main(flags) == 0
    lines = (tmp_path / "sizes.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return {row[0]: [float(cell.replace(",", "")) for cell in row[1:]] for row in rows if row[0].isdigit()}


def test_several_relays_are_measured_beside_one(tmp_path: Path) -> None:
    by_count = measured_workers(tmp_path, "--workers", "1", "2")
    assert set(by_count) == {"1", "2"}
    assert [by_count["1"][column] for column in (2, 3, 6, 7)] == [1, 1, 1, 1]
    assert all(figure > 0 for figures in by_count.values() for figure in figures)


def test_relays_may_have_cores_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = sorted(os.sched_getaffinity(0))
    with sizes.pinned([first]):
        said = subprocess.run(["nproc"], capture_output=True, text=True, check=True).stdout
        assert said == "1\n"
        with pytest.raises(SystemExit):
            measured_workers(tmp_path, "--workers", "1", "--own-cores")
        assert "--own-cores: needs more cores than the most relays" in capsys.readouterr().err
    assert sorted(os.sched_getaffinity(0)) == [first, *others]
    if not others:
        pytest.skip("one core cannot be shared out")
    assert all(figure > 0 for figure in measured_workers(tmp_path, "--workers", "1", "--own-cores")["1"])
