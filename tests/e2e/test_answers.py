"""What clients of SGLang and of the OpenAI API ask for, answered through the balancer by real replicas."""

import json
from typing import Any

import httpx
import openai

MODEL = "smollm2-135m"
# Asked with the model's usual system prompt, the first token of the answer is a tie in bfloat16, which CPUs and GPUs
# round differently; with this one "The" leads by 0.75.
CAPITAL = [
    {"role": "system", "content": "You answer questions about geography."},
    {"role": "user", "content": "What is the capital of France?"},
]


def chat(endpoint: str, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 20, **more}
    answer = httpx.post(f"{endpoint}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    return whole


def test_a_chat_completion_is_right(endpoint: str) -> None:
    answer = chat(endpoint, CAPITAL)
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["model"] == MODEL


def test_the_question_that_up_prints_is_answered_right(endpoint: str) -> None:
    answer = chat(endpoint, [{"role": "user", "content": "Name the capital of France."}])
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_a_stream_ends_with_usage_and_done(endpoint: str) -> None:
    body = {
        "model": MODEL,
        "messages": CAPITAL,
        "temperature": 0,
        "max_tokens": 20,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with httpx.stream("POST", f"{endpoint}/v1/chat/completions", json=body, timeout=120) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]"
    parts = [json.loads(event) for event in events[:-1]]
    text = "".join(choice["delta"].get("content") or "" for part in parts for choice in part["choices"])
    assert "Paris" in text
    assert len(parts) > 4
    assert parts[-1]["usage"]["completion_tokens"] > 4


def test_generate_answers(endpoint: str) -> None:
    body = {"text": "The capital of France is", "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
    answer = httpx.post(f"{endpoint}/generate", json=body, timeout=120)
    assert answer.status_code == 200
    assert "Paris" in answer.json()["text"]


def test_output_follows_a_json_schema(endpoint: str) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "is_capital": {"type": "boolean"}},
        "required": ["city", "is_capital"],
        "additionalProperties": False,
    }
    answer = chat(
        endpoint,
        [{"role": "user", "content": "Paris is the capital of France. Describe Paris as JSON."}],
        max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )
    said = json.loads(answer["choices"][0]["message"]["content"])
    assert set(said) == {"city", "is_capital"}
    assert isinstance(said["city"], str)
    assert isinstance(said["is_capital"], bool)


def test_the_openai_client_works_whole_and_streamed(endpoint: str) -> None:
    with openai.OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0, timeout=120) as client:
        assert [model.id for model in client.models.list().data] == [MODEL]
        question: Any = {"model": MODEL, "messages": CAPITAL, "temperature": 0, "max_tokens": 20}
        whole = client.chat.completions.create(**question)
        assert "Paris" in whole.choices[0].message.content
        stream = client.chat.completions.create(**question, stream=True)
        assert whole.choices[0].message.content == "".join(part.choices[0].delta.content or "" for part in stream)


def test_a_refused_request_comes_back_as_the_replica_said(endpoint: str) -> None:
    body = {"model": MODEL, "messages": "not a list"}
    answer = httpx.post(f"{endpoint}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 400


def test_a_prompt_that_a_replica_has_seen_is_cached(endpoint: str) -> None:
    rules = " ".join(f"Rule {n}: answer politely and name the {n}. reason." for n in range(40))
    question = [{"role": "system", "content": rules}, *CAPITAL]
    # Two replicas in turn: the third answer comes from one that has seen the prompt.
    usages = [chat(endpoint, question, max_tokens=4)["usage"] for _ in range(3)]
    prompt = usages[0]["prompt_tokens"]
    assert prompt > 400
    assert usages[0]["prompt_tokens_details"]["cached_tokens"] < prompt / 2
    assert usages[2]["prompt_tokens_details"]["cached_tokens"] >= prompt - 1
