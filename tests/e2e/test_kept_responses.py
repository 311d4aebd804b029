"""What SGLang's own store of responses keeps is found again by a balancer that was killed and started anew."""

from pathlib import Path

import httpx
import pytest

from tests.e2e.running import Balancer, Replica
from tests.support.until import wait_until

ASKED = {"model": "smollm2-135m", "temperature": 0, "max_output_tokens": 12}


def respond(url: str, **more: object) -> httpx.Response:
    return httpx.post(f"{url}/v1/responses", json={**ASKED, **more}, timeout=120)


def test_answers_are_found_after_a_kill(replicas: list[Replica], tmp_path: Path) -> None:
    state = ("--state", str(tmp_path / "state"))
    first = Balancer(tmp_path / "first.log", replicas, *state)
    try:
        first.wait_all_ready()
        made: dict[str, str] = {}  # by replica, the id of an answer that it keeps
        while len(made) < 2:
            said = respond(first.url, input="My name is Ada. Say hello.")
            assert said.status_code == 200, said.text
            made[said.headers["x-replica-id"]] = said.json()["id"]
        usage = f"{first.admin_url}/usage?by=key"
        wait_until(lambda: httpx.get(usage).json()["data"][0]["requests"] >= 2, "what it noted is written")
        first.process.kill()
        first.process.wait(timeout=30)
    finally:
        first.close()
    second = Balancer(tmp_path / "second.log", replicas, *state)
    try:
        second.wait_all_ready()
        for name, id_ in made.items():
            for _ in range(2):
                answer = respond(second.url, input="What is my name?", previous_response_id=id_)
                assert (answer.status_code, answer.headers["x-replica-id"]) == (200, name), answer.text
                assert answer.json()["previous_response_id"] == id_
            kept = httpx.get(f"{second.url}/v1/responses/{id_}", timeout=30)
            assert (kept.status_code, kept.json()["id"], kept.headers["x-replica-id"]) == (200, id_, name)
        unknown = respond(second.url, input="x", previous_response_id="resp_nobody_has_it")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (400, "previous_response_not_found")
    finally:
        second.close()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_sglang_goes_on_from_what_it_keeps(endpoint: str, stream: bool) -> None:
    """The second answer is made of the first one's conversation too: its prompt is longer than what was sent."""
    before = respond(endpoint, input="My name is Ada.").json()
    alone = respond(endpoint, input="What is my name?").json()
    asked = {"input": "What is my name?", "previous_response_id": before["id"], "stream": stream}
    said = respond(endpoint, **asked)
    assert said.status_code == 200, said.text
    if stream:
        assert '"type":"response.completed"' in said.text or '"type":"response.incomplete"' in said.text
    else:
        assert said.json()["usage"]["input_tokens"] > alone["usage"]["input_tokens"] + 10
