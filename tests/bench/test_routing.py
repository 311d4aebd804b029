"""The routing measurement is held to what is known; the replicas are the lab's, so no model is loaded."""

import asyncio
import base64
import io
from collections import Counter
from collections.abc import Sequence

import pytest
from PIL import Image

from tests.bench.ask import Run
from tests.bench.routing import PREFIX_AWARE, ROUND_ROBIN, ROUTER, measure_run, medians, share, table, verdict
from tests.bench.workload import FORMS, workload
from tests.lab.model import ModelSettings
from tests.lab.replica import LabReplica


def beginnings(form: str, seed: int = 1) -> list[str]:
    """What the requests of a workload share: the system prompt, or the image."""
    if form == "text":
        return [messages[0]["content"] for messages in workload(form, 8, 40, seed)]
    return [messages[0]["content"][0]["image_url"]["url"] for messages in workload(form, 8, 40, seed)]


@pytest.mark.parametrize("form", ["text", "image"])
def test_a_workload_is_eight_groups_that_share_a_beginning_each(form: str) -> None:
    assert sorted(Counter(beginnings(form)).values()) == [5] * 8
    assert beginnings(form) == beginnings(form)
    assert not set(beginnings(form, seed=1)) & set(beginnings(form, seed=2))
    asked = [str(messages) for messages in workload(form, 8, 40, seed=1)]
    assert len(set(asked)) == 40


def test_images_differ_and_the_text_behind_them_does_not() -> None:
    requests = workload("image", 8, 8, seed=1)
    texts = {messages[0]["content"][1]["text"] for messages in requests}
    assert len(texts) == 1
    assert len(next(iter(texts)).split()) > FORMS["image"].prefix_tokens
    data = beginnings("image")[0].removeprefix("data:image/png;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    assert (image.size, image.mode) == ((56, 56), "RGB")


def test_a_run_through_our_balancer_finds_what_replicas_cached(tmp_path) -> None:
    settings = ModelSettings(prefill_rate=20_000, itl_base=0.001, max_total_tokens=20_000)
    requests = workload("text", 4, 16, seed=1)

    async def scenario() -> tuple[Run, list[int]]:
        async with LabReplica(model=settings) as one, LabReplica(model=settings) as two:
            urls = (one.url, two.url)
            run = await asyncio.to_thread(measure_run, PREFIX_AWARE, FORMS["text"], urls, requests, tmp_path, tmp_path)
            return run, [replica.seen.generations_started for replica in (one, two)]

    run, seen = asyncio.run(scenario())
    assert run.errors == []
    assert len(run.ttft) == 16
    assert min(run.ttft) > 0
    # Each group is cold once, and the shared beginning is nearly all of a prompt.
    assert 0.6 < share(run) < 0.8
    assert min(seen) > 0
    assert sum(seen) == 17  # and the one that asked whether there is an answer


def test_an_answer_that_is_not_whole_is_an_error(tmp_path) -> None:
    async def scenario() -> Run:
        async with LabReplica() as one, LabReplica() as two:
            requests = workload("text", 1, 1, seed=1)
            for replica in (one, two):
                replica.set(tokens=3)
            return await asyncio.to_thread(
                measure_run, ROUND_ROBIN, FORMS["text"], (one.url, two.url), requests, tmp_path, tmp_path
            )

    run = asyncio.run(scenario())
    assert run.ttft == []
    assert run.errors == ["ValueError: 3 tokens came, not 16"]


def test_figures_are_medians_over_rounds() -> None:
    runs = [
        Run(10.0, [1.0, 3.0], [100, 100], 50),
        Run(30.0, [2.0, 2.0], [100, 100], 100),
        Run(20.0, [4.0, 0.5], [200], 0),
    ]
    assert medians(runs) == {"total": 20.0, "ttft_mean": 2.0, "ttft_p50": 1.0, "cached": 0.25}


def rounds(seconds: Sequence[float]) -> list[Run]:
    return [Run(total, [total / 20, total / 20], [100, 100], 100) for total in seconds]


@pytest.mark.parametrize(
    ("seconds", "router", "round_robin", "kept"),
    [
        ([25.0], [25.0], [40.0], [True, True, True]),
        ([26.0], [25.0], [40.0], [True, False, True]),
        ([28.0], [25.0], [40.0], [False, False, False]),
        # A machine that slows down.
        ([18.0, 27.0, 36.0], [20.0, 30.0, 40.0], [40.0, 60.0, 80.0], [True, True, True]),
        # Slower in most rounds is slower, though the median is less.
        ([21.0, 42.0, 30.0], [20.0, 38.0, 40.0], [40.0, 80.0, 80.0], [True, False, True]),
        ([25.0], None, [40.0], [None, None, True]),
        ([25.0], [25.0], None, [True, True, None]),
    ],
)
def test_the_verdict_holds_prefix_aware_to_its_three_promises(seconds, router, round_robin, kept) -> None:
    found = {PREFIX_AWARE: seconds, ROUTER: router, ROUND_ROBIN: round_robin}
    runs = {name: rounds(totals) for name, totals in found.items() if totals}
    assert [fact for fact, _ in verdict("text", runs)] == kept


def test_without_prefix_aware_nothing_is_judged() -> None:
    assert [fact for fact, _ in verdict("text", {ROUTER: rounds([25.0])})] == [None] * 3


def test_the_table_shows_totals_beside_round_robin() -> None:
    lines = table({PREFIX_AWARE: rounds([20.0, 50.0]), ROUND_ROBIN: rounds([40.0, 100.0])}).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        PREFIX_AWARE,
        "35.0",
        "1.75",
        "1.75",
        "0.50",
        "0.50",
    ]
