"""Streams of a real SGLang that is killed continue at another one."""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.e2e.images import data_url
from tests.e2e.running import Balancer, Replica
from tests.lab.replica import LabReplica
from tests.wire.running import ReplicaListing, on_uvloop, serving

TOKENS = 32
BEGUN = 4  # events of a stream, after which its replica may be killed
CHAT, TEXT, OWN, MESSAGES = "/v1/chat/completions", "/v1/completions", "/generate", "/v1/messages"
PROMPTS = ("Tell me a story about a river.", "Write a poem about the sea, please.", "むかしむかし、あるところに")
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def wish(path: str, prompt: str) -> dict[str, Any]:
    """A stream at temperature 0; what is no chat gets a beginning that a small model goes on with."""
    told = [{"role": "user", "content": prompt}]
    match path:
        case "/generate":
            sampling = {"max_new_tokens": TOKENS, "temperature": 0, "stop": ["not in it"]}
            return {"text": f"{prompt} Once upon a time, there was", "sampling_params": sampling, "stream": True}
        case "/v1/completions":
            text = f"{prompt} Once upon a time, there was"
            return {"model": "any", "prompt": text, "max_tokens": TOKENS, "temperature": 0, **USAGE}
        case "/v1/messages":
            return {"model": "any", "messages": told, "max_tokens": TOKENS, "temperature": 0, "stream": True}
        case _:
            stop = {"stop": ["not in it"]}
            return {"model": "any", "messages": told, "max_tokens": TOKENS, "temperature": 0, **stop, **USAGE}


@dataclass
class Told:
    """What one stream said, as far as it came."""

    path: str
    replica: str = ""
    comments: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    is_done: bool = False

    def line(self, line: str) -> None:
        if line.startswith(": "):
            self.comments.append(line)
        elif line == "data: [DONE]":
            self.is_done = True
        elif line.startswith("data: "):
            self.events.append(json.loads(line[6:]))
            self.is_done = self.is_done or self.events[-1].get("type") == "message_stop"

    @property
    def text(self) -> str:
        if self.path == OWN:
            return str(self.events[-1]["text"])
        if self.path == MESSAGES:
            return "".join(said["delta"].get("text", "") for said in self.events if "delta" in said)
        choices = [choice for said in self.events for choice in said["choices"]]
        return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)

    @property
    def end(self) -> tuple[Any, ...]:
        """Why it ended, and the tokens that it counts."""
        if self.path == OWN:
            meta = self.events[-1]["meta_info"]
            ids = len(self.events[-1]["output_ids"])
            return meta["finish_reason"]["type"], meta["prompt_tokens"], meta["completion_tokens"], ids
        if self.path == MESSAGES:
            last = next(said for said in self.events if said["type"] == "message_delta")
            return last["delta"]["stop_reason"], last["usage"]["output_tokens"]
        usage = self.events[-1]["usage"]
        finish = [choice["finish_reason"] for said in self.events for choice in said["choices"]][-1]
        return finish, usage["prompt_tokens"], usage["completion_tokens"]

    @property
    def ids(self) -> set[str]:
        return {str(said.get("meta_info", said).get("id")) for said in self.events}


async def listen(client: httpx.AsyncClient, base: str, path: str, prompt: str, told: Told) -> Told:
    async with client.stream("POST", base + path, json=wish(path, prompt)) as answer:
        assert answer.status_code == 200
        told.replica = answer.headers.get("x-replica-id", "")
        async for line in answer.aiter_lines():
            told.line(line)
    return told


async def killed_amid(base: str, replicas: list[Replica]) -> tuple[list[Told], list[Told]]:
    """All answers undisturbed, and with the replica killed that has most of them."""
    asked = [(path, prompt) for path in (CHAT, TEXT, OWN, MESSAGES) for prompt in PROMPTS]
    async with httpx.AsyncClient(timeout=300) as client:
        direct = replicas[0].url
        whole = await asyncio.gather(*(listen(client, direct, *one, Told(one[0])) for one in asked))
        heard = [Told(path) for path, _ in asked]
        tasks = [
            asyncio.ensure_future(listen(client, base, *one, told)) for one, told in zip(asked, heard, strict=True)
        ]
        while True:
            await asyncio.sleep(0.02)
            flowing = Counter(told.replica for told in heard if len(told.events) >= BEGUN and not told.is_done)
            if flowing.total() >= 8:
                break
            assert not all(task.done() for task in tasks)
        victim = int(flowing.most_common(1)[0][0].rpartition("-")[2])
        replicas[victim - 1].process.kill()
        await asyncio.gather(*tasks)
    return whole, heard


@pytest.mark.last
def test_killed(balancer: Balancer, replicas: list[Replica]) -> None:
    """kill -9 of one of two replicas: every stream in every format ends as it would have, at temperature 0 alike."""
    whole, heard = asyncio.run(killed_amid(balancer.url, replicas))
    continued = [(one, told) for one, told in zip(whole, heard, strict=True) if told.comments]
    assert {told.path for _, told in continued} == {CHAT, TEXT, OWN, MESSAGES}
    for one, told in zip(whole, heard, strict=True):
        assert told.is_done, told
        assert told.path == MESSAGES or len(told.ids) == 1, "an answer has one id"
        if told.text == one.text:
            assert told.end == one.end
    # The tokens of a text may be others than those that made it, and a batch of another size rounds otherwise.
    others = [(one.text, told.text) for one, told in continued if one.text != told.text]
    print(f"{len(continued)} continued, {len(others)} of them with another text:", *others, sep="\n")
    assert len(others) <= len(continued) / 2
    metrics = httpx.get(f"{balancer.admin_url}/metrics", timeout=10).text.splitlines()
    assert f"groundserve_continued_total {float(len(continued))}" in metrics


def test_image(tiny_llava: Replica, key_file: Any) -> None:
    """A real vision model continues an answer to an image that another replica began; its counts are of the whole."""
    image = {"type": "image_url", "image_url": {"url": data_url("red")}}
    told = [{"role": "user", "content": [{"type": "text", "text": "Which colour is this?"}, image]}]
    body = {"model": "any", "messages": told, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **USAGE}
    key = key_file.read_text().strip()

    @on_uvloop
    async def main() -> None:
        async with LabReplica(cut="after_tokens", cut_after=2) as first:
            listed = (ReplicaListing("lab", first.url), ReplicaListing("real", tiny_llava.url))
            settings = {"replicas": listed, "replica_key": key, "policy": "round_robin"}
            async with serving(ready=2, config=settings) as house, httpx.AsyncClient(timeout=50) as client:
                headers = {"Authorization": f"Bearer {key}"}
                ones = []
                for base in (tiny_llava.url, house.url):
                    if base == house.url:
                        house.member("lab").turn = -1
                    one = Told(CHAT)
                    async with client.stream("POST", base + CHAT, json=body, headers=headers) as answer:
                        async for line in answer.aiter_lines():
                            one.line(line)
                    ones.append(one)
                whole, continued = ones
                assert continued.comments == [": continued on real"]
                assert continued.text.startswith(" t00 t01")
                assert continued.is_done
                assert continued.end == whole.end == ("length", whole.end[1], 12)

    main()
