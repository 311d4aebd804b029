"""Streams of a real SGLang that is killed continue at another one."""

import asyncio
import itertools
import json
import os
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.e2e.images import data_url
from tests.e2e.running import Balancer, Replica
from tests.lab.replica import LabReplica
from tests.wire.running import ReplicaListing, on_uvloop, serving

STREAMS = 40
TOKENS = 32
BEGUN = 4  # events of a stream, after which its replica may be killed
CHAT, TEXT, OWN, MESSAGES = "/v1/chat/completions", "/v1/completions", "/generate", "/v1/messages"
FORMATS = (CHAT, TEXT, OWN, MESSAGES)
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
# One in the test suite; SEEDS=10 plays ten.
SEEDS = range(1, 1 + int(os.environ.get("SEEDS", "1")))
# Tokens whose logarithms of probability differ by less are as likely: bfloat16 puts now one first, now another.
TIE = 0.5
FORMS = (
    "Tell me a story about {}.",
    "Write a poem about {}, please.",
    "What do you know about {}?",
    "{}のお話をして。",
)
SUBJECTS = (
    "a river",
    "the sea",
    "café owners",
    "two old 🐈 friends",
    "むかしむかし",
    "snow in June",
    "the moon",
    "bread",
)


def wish(path: str, prompt: str) -> dict[str, Any]:
    """A stream at temperature 0; what is no chat gets a beginning that a small model goes on with."""
    told = [{"role": "user", "content": prompt}]
    match path:
        case "/generate":
            sampling = {"max_new_tokens": TOKENS, "temperature": 0, "stop": ["not in it"]}
            return {"text": begun(prompt), "sampling_params": sampling, "stream": True}
        case "/v1/completions":
            return {"model": "any", "prompt": begun(prompt), "max_tokens": TOKENS, "temperature": 0, **USAGE}
        case "/v1/messages":
            return {"model": "any", "messages": told, "max_tokens": TOKENS, "temperature": 0, "stream": True}
        case _:
            stop = {"stop": ["not in it"]}
            return {"model": "any", "messages": told, "max_tokens": TOKENS, "temperature": 0, **stop, **USAGE}


def begun(prompt: str) -> str:
    return f"{prompt} Once upon a time, there was"


@dataclass
class Told:
    """What one stream said, as far as it came."""

    path: str
    replica: str = ""
    comments: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    before: str = ""  # its text when another replica went on
    is_done: bool = False

    def line(self, line: str) -> None:
        if line.startswith(": "):
            self.before = self.text if self.events else ""
            self.comments.append(line)
        elif line == "data: [DONE]":
            self.is_done = True
        elif line.startswith("data: "):
            self.events.append(json.loads(line[6:]))
            self.is_done = self.is_done or self.events[-1].get("type") == "message_stop"

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def pieces(self) -> list[str]:
        """The text by events, each of which is a token's, or those of one character."""
        if self.path == OWN:
            texts = ["", *(str(said["text"]) for said in self.events)]
            return [after[len(before) :] for before, after in itertools.pairwise(texts)]
        if self.path == MESSAGES:
            return [said["delta"].get("text", "") for said in self.events if "delta" in said]
        choices = [choice for said in self.events for choice in said["choices"]]
        return [choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices]

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


@dataclass
class Trial:
    """Streams by what they were asked: undisturbed, and while one of two replicas is killed, and which one stayed."""

    asked: list[tuple[str, str]]
    whole: list[Told]
    heard: list[Told]
    survivor: Replica


async def killed_amid(seed: int, base: str, replicas: list[Replica]) -> Trial:
    """Kills the replica that has most of the streams, some moment after enough of them flow."""
    chance = random.Random(seed)
    prompts = [form.format(subject) for form in FORMS for subject in SUBJECTS]
    asked = [(path, prompt) for path in FORMATS for prompt in chance.sample(prompts, STREAMS // len(FORMATS))]
    enough, amid = chance.randint(STREAMS // 4, STREAMS // 2), chance.randint(BEGUN, TOKENS // 2)
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=STREAMS)) as client:
        whole = await asyncio.gather(*(listen(client, base, *one, Told(one[0])) for one in asked))
        heard = [Told(path) for path, _ in asked]
        tasks = [
            asyncio.ensure_future(listen(client, base, *one, told)) for one, told in zip(asked, heard, strict=True)
        ]
        while True:
            await asyncio.sleep(0.02)
            flowing = [told for told in heard if len(told.events) >= BEGUN and not told.is_done]
            if len(flowing) >= enough and max(len(told.events) for told in flowing) >= amid:
                break
            assert not all(task.done() for task in tasks)
        victim = int(Counter(told.replica for told in flowing).most_common(1)[0][0].rpartition("-")[2]) - 1
        replicas[victim].process.kill()
        await asyncio.gather(*tasks)
    return Trial(asked, whole, heard, replicas[1 - victim])


def gap(replica: Replica, path: str, prompt: str, told: Told) -> float:
    """How far apart two tokens were in likelihood where this answer and that of the replica alone part; 0 if nowhere.

    The replica is asked for what comes after the tokens that the client had when its first one died. In natural
    logarithms of probabilities.
    """

    def ask(path: str, **body: Any) -> Any:
        return httpx.post(replica.url + path, json=body, timeout=300).raise_for_status().json()

    is_chat = path in (CHAT, MESSAGES)
    how = {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": begun(prompt)}
    lengths = list(itertools.accumulate(len(piece) for piece in told.pieces))
    before = [piece for piece, length in zip(told.pieces, lengths, strict=True) if length <= len(told.before)]
    each = ask("/tokenize", prompt=["", *before], add_special_tokens=False)["tokens"]
    ids = ask("/tokenize", **how)["tokens"] + list(itertools.chain(*each))
    sampling = {"max_new_tokens": TOKENS, "temperature": 0}
    made = ask("/generate", input_ids=ids, sampling_params=sampling, return_logprob=True, top_logprobs_num=2)
    rest = told.text.removeprefix(told.before).removesuffix("\ufffd")  # half a character at its end
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(rest, made["text"], strict=False))
    if (shared := sum(1 for _ in alike)) == len(rest):
        return 0.0
    tops, said = made["meta_info"]["output_top_logprobs"], made["output_ids"]
    gaps = [float(first - second) for (first, *_), (second, *_) in tops]
    begins = None  # the first of the tokens of the character where they part; any of these may be the other one
    for number in range(len(said)):
        text = ask("/detokenize", tokens=said[: number + 1])["text"]
        if len(text) > shared:
            begins = number if begins is None else begins
            if text[shared] != "\ufffd":
                return min(gaps[begins : number + 1])
    return min(gaps[begins:]) if begins is not None else gaps[-1]  # it ended there, and the answer did not


@pytest.mark.last
@pytest.mark.parametrize("seed", SEEDS)
def test_killed(seed: int, balancer: Balancer, replicas: list[Replica]) -> None:
    """kill -9 of one of two replicas: every stream in every format ends as it would have, at temperature 0 alike.

    An undisturbed answer may have another text when it is asked for again, because a batch of another size rounds
    otherwise. So a text that is another one has to be what the replica that goes on makes by itself of the tokens that
    were there, up to where two tokens are as likely.
    """
    continued_before = continued_total(balancer)
    trial = asyncio.run(killed_amid(seed, balancer.url, replicas))
    continued = [told for told in trial.heard if told.comments]
    assert {told.path for told in continued} == set(FORMATS)
    others = []
    for (path, prompt), whole, told in zip(trial.asked, trial.whole, trial.heard, strict=True):
        assert told.is_done, told
        assert path == MESSAGES or len(told.ids) == 1, "an answer has one id"
        if told.text == whole.text:
            assert told.end == whole.end
        else:
            others.append((gap(trial.survivor, path, prompt, told), bool(told.comments), path, whole.text, told.text))
    print(f"seed {seed}: {len(trial.heard)} streams, {len(continued)} continued, {len(others)} with another text")
    print(*others, sep="\n")
    assert all(most < TIE for most, *_ in others)
    assert continued_total(balancer) - continued_before == len(continued)


def continued_total(balancer: Balancer) -> float:
    lines = httpx.get(f"{balancer.admin_url}/metrics", timeout=10).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("groundserve_continued_total"))


# What the model made of a word that its tokenizer reads as "hall" and "owness".
MADE = ("In", " twilight", "'s", " hallow", "ness")


def made_so_far(path: str, ids: list[int]) -> list[dict[str, Any]]:
    """The events of an answer that has come so far."""
    if path == OWN:
        meta = {"id": "x", "finish_reason": None, "prompt_tokens": 9, "completion_tokens": len(ids)}
        return [{"text": "".join(MADE), "output_ids": ids, "meta_info": meta}]
    if path == MESSAGES:
        block = {"type": "text", "text": ""}
        begun = [{"type": "message_start", "message": {"id": "x", "model": "any"}}]
        begun += [{"type": "content_block_start", "index": 0, "content_block": block}]
        deltas = ({"type": "text_delta", "text": text} for text in MADE)
        return begun + [{"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas]
    said = [{"text": text} if path == TEXT else {"delta": {"content": text}} for text in MADE]
    return [{"id": "x", "choices": [{"index": 0, "finish_reason": None, **choice}]} for choice in said]


@pytest.mark.parametrize("path", FORMATS)
def test_other_tokens(path: str, replicas: list[Replica]) -> None:
    """An answer continues from the tokens that it has, also if its text would be read as others."""
    real, prompt = replicas[0], "Write a poem about むかしむかし, please."

    def ask(path: str, **body: Any) -> Any:
        return httpx.post(real.url + path, json=body, timeout=100).raise_for_status().json()

    each = ask("/tokenize", prompt=["".join(MADE), *MADE], add_special_tokens=False)["tokens"]
    read, made = each[0], list(itertools.chain(*each[1:]))
    assert read != made
    how = {"messages": [{"role": "user", "content": prompt}]} if path in (CHAT, MESSAGES) else {"prompt": begun(prompt)}
    before = ask("/tokenize", **how)["tokens"]
    left = {"max_new_tokens": TOKENS - len(made), "temperature": 0}
    from_ids, from_text = (ask(OWN, input_ids=before + ids, sampling_params=left)["text"] for ids in (made, read))
    assert from_ids != from_text, "it makes a difference"
    told = Told(path)

    @on_uvloop
    async def main() -> None:
        async with LabReplica() as first:
            listed = (ReplicaListing("lab", first.url), ReplicaListing("real", real.url))
            settings = {"replicas": listed, "policy": "round_robin"}
            async with serving(ready=2, config=settings) as house, httpx.AsyncClient(timeout=100) as client:
                body = "".join(f"data: {json.dumps(said)}\n\n" for said in made_so_far(path, made))
                head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                first.next(1, raw=f"{head}{len(body):x}\r\n{body}\r\n", raw_then="reset")
                house.member("lab").turn = -1
                await listen(client, house.url, path, prompt, told)

    main()
    assert told.comments == [": continued on real"]
    assert told.text == "".join(MADE) + from_ids
    assert told.is_done
    assert TOKENS in told.end


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
