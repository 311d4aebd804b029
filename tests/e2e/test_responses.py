"""POST /v1/responses through the balancer, on real replicas as `make install` installs them."""

import json

import httpx
import openai

ASKED = {
    "model": "smollm2-135m",
    "input": "Name the capital of France.",
    "temperature": 0,
    "max_output_tokens": 20,
}


def test_a_response_is_created(endpoint: str) -> None:
    answer = httpx.post(f"{endpoint}/v1/responses", json=ASKED, timeout=120)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    (message,) = (item for item in said["output"] if item["type"] == "message")
    assert "Paris" in message["content"][0]["text"]
    assert said["usage"]["output_tokens"] > 0


def test_a_response_is_streamed_from_created_to_completed(endpoint: str) -> None:
    with httpx.stream("POST", f"{endpoint}/v1/responses", json={**ASKED, "stream": True}, timeout=120) as answer:
        assert answer.status_code == 200
        events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line.startswith("data: {")]
    kinds = [event["type"] for event in events]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert "Paris" in "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


def test_openais_own_client_reads_it(endpoint: str) -> None:
    with openai.OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0) as client:
        said = client.responses.create(model="smollm2-135m", input="Name the capital of France.", max_output_tokens=20)
    assert said.output_text
