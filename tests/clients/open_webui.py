"""The requests that open-webui 0.12.4 makes, played from its source (`open_webui/routers/openai.py`, `tasks.py`).

The program itself wants several gigabytes of packages, so it is not installed here.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from tests.clients.outcome import Outcome

SUITE, VERSION = "open-webui's requests", "0.12.4"
PATIENCE = 60.0  # seconds
# As it calls its task models, for the title of a chat.
TITLE = "### Task: Generate a concise title for this chat. SAY A title END"


def run(url: str, model: str) -> Iterator[Outcome]:
    """One outcome for each of its requests to a connection of the kind OpenAI."""
    with httpx.Client(base_url=f"{url}/v1", timeout=PATIENCE, headers={"Authorization": "Bearer none"}) as client:
        for check in (_lists_models, _streams, _goes_on, _makes_a_title, _shows_errors):
            yield Outcome(SUITE, check.__name__.strip("_").replace("_", "-"), _problem(check, client, model))


def _problem(check: Callable[[httpx.Client, str], None], client: httpx.Client, model: str) -> str:
    try:
        check(client, model)
    except (AssertionError, httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        return f"{type(error).__name__}: {error}"[:400]
    return ""


def _lists_models(client: httpx.Client, model: str) -> None:
    """At its start, and whenever somebody opens the list: it reads `data`, and the ids in it."""
    answer = client.get("/models")
    assert answer.status_code == 200, answer.text
    assert [one["id"] for one in answer.json()["data"]] == [model]


def _streams(client: httpx.Client, model: str) -> None:
    """A chat as it is typed. It asks for no usage unless the model's settings say so, and must get none."""
    said, events = _streamed(client, model, [{"role": "user", "content": "Name the capital of France."}])
    assert "Paris" in said
    assert not [event for event in events if event.get("usage")], "counts that nobody asked for"


def _goes_on(client: httpx.Client, model: str) -> None:
    """The whole conversation is sent again, its own thoughts in a `details` block as it keeps them."""
    kept = '<details type="reasoning" done="true">\nHm.\n</details>\nThe capital of France is Paris.'
    told = [
        *({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name the capital of France."}),
        *({"role": "assistant", "content": kept}, {"role": "user", "content": "SAY Once more END"}),
    ]
    assert "Once more" in _streamed(client, model, told)[0]


def _makes_a_title(client: httpx.Client, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": TITLE}], "stream": False}
    answer = _post(client, body)
    assert answer.status_code == 200, answer.text
    assert "A title" in answer.json()["choices"][0]["message"]["content"]


def _shows_errors(client: httpx.Client, model: str) -> None:
    """It shows `error.message` of a JSON answer; as an event stream, a refusal would be hidden from its log."""
    answer = _post(client, {"model": model, "messages": [], "stream": True})
    assert 400 <= answer.status_code < 500
    assert answer.headers["content-type"].startswith("application/json")
    said = answer.json()
    assert said.get("error", said)["message"]


def _post(client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    """It serialises the body by itself."""
    return client.post("/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})


def _streamed(client: httpx.Client, model: str, messages: list[dict[str, str]]) -> tuple[str, list[dict[str, Any]]]:
    """The text of a streamed answer, and its events."""
    body = json.dumps({"model": model, "messages": messages, "stream": True})
    headers = {"Content-Type": "application/json"}
    with client.stream("POST", "/chat/completions", content=body, headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    events: list[dict[str, Any]] = [json.loads(line) for line in lines[:-1]]
    deltas = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
    return "".join(deltas), events
