import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.lab.model import ModelSettings
from tests.lab.record import REFUSED, REQUESTS, answer_shape, ask, shape
from tests.lab.replica import LabReplica

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("recorded.json").read_text())
# Answers in which the lab has fewer fields than SGLang: the same names in the same places, but not all of them.
PARTIAL = {"generate", "generate stream", "model_info", "server_info", "loads", "metrics"}


@pytest.fixture(scope="module")
def lab() -> dict[str, Any]:
    """The shapes of the lab's answers to the requests that were recorded with the real SGLang."""

    async def main() -> dict[str, Any]:
        settings = ModelSettings(max_running_requests=1, max_queued_requests=1, itl_base=0.04)
        async with (
            LabReplica(model=settings, abort_delay_stream=0.0) as replica,
            httpx.AsyncClient(base_url=replica.url, timeout=30.0) as client,
        ):
            return await ask(client, patience=0.2)

    return asyncio.run(main())


def lacks(lab: Any, real: Any) -> list[str]:
    """Where the lab's answer has something that the real server's does not."""
    if isinstance(lab, dict) and isinstance(real, dict):
        return [f"{key}: not in SGLang's answer" for key in lab if key not in real] + [
            f"{key}.{where}" for key in lab if key in real for where in lacks(lab[key], real[key])
        ]
    if isinstance(lab, list) and isinstance(real, list) and len(lab) == len(real):
        return [where for one, other in zip(lab, real, strict=True) for where in lacks(one, other)]
    # A null says nothing about the type that the field has at other times.
    return [] if lab == real or None in (lab, real) else [f"{lab!r} for {real!r}"]


@pytest.mark.parametrize("name", [name for name, *_ in REQUESTS] + [name for name, _ in REFUSED])
def test_answers_have_the_shape_of_sglangs(lab: dict[str, Any], name: str) -> None:
    mine, real = lab[name], RECORDED[name]
    assert (mine["status"], mine["content-type"]) == (real["status"], real["content-type"])
    if name == "metrics":
        assert set(mine["body"]) <= set(real["body"])
        assert "sglang:num_aborted_requests_total{engine_type,model_name}" in mine["body"]
    elif name in PARTIAL:
        assert lacks(mine["body"], real["body"]) == []
    else:
        assert mine["body"] == real["body"]
        assert mine["headers"] == real["headers"]


def test_a_shape_keeps_names_and_types_and_nulls() -> None:
    assert shape({"a": 1, "b": [{"c": None}, {}], "d": "x", "e": []}) == {
        "a": "int",
        "b": [{"c": None}],
        "d": "str",
        "e": [],
    }


def test_the_shape_of_a_stream_is_that_of_each_event() -> None:
    answer = httpx.Response(
        200, headers={"content-type": "text/event-stream"}, text='data: {"a": 1.5}\n\ndata: [DONE]\n\n'
    )
    assert answer_shape(answer)["body"] == [{"a": "float"}, "[DONE]"]
