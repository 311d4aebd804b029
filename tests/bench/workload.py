"""The requests of the routing measurement: groups that share a long beginning, in text or behind an image."""

import base64
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import orjson

ANSWER_TOKENS = 16
# Each is one token of SmolLM2's vocabulary.
WORDS = """
time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work government number night point home water room
mother area money story fact month lot right study book eye job word business issue side kind head house
service
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Form:
    """What a workload is made of: the model, tokens of each group's beginning, and of a replica's KV pool.

    The pool holds four of eight groups beside what is running, so that it pays to keep each group on one replica.
    """

    model: str
    prefix_tokens: int
    pool_tokens: int


# The image and its template's system message add 60 tokens, so that a group's beginning is as long in both forms.
FORMS = {"text": Form("smollm2-135m", 1000, 4600), "image": Form("tiny-llava", 940, 4600)}
QUESTIONS = (
    "What is it about?",
    "Which word comes first?",
    "Is there a number in it?",
    "How would you shorten it?",
    "What would a child ask?",
    "Who might have written it?",
    "Which word is the longest?",
    "What comes after it?",
)


Messages = list[dict]


def text_group(length: int, chance: random.Random) -> Callable[[str], Messages]:
    """A system prompt that is this group's own from the first words on."""
    system = " ".join(chance.choices(WORDS, k=length))
    return lambda question: [{"role": "system", "content": system}, {"role": "user", "content": question}]


def image_group(length: int, chance: random.Random) -> Callable[[str], Messages]:
    """An image of the group's own, then the same long instruction for all groups.

    What a replica has cached of the instruction is of no use behind another image: only a router that sees images
    can keep the groups apart.
    """
    pixels = bytes(chance.randrange(256) for _ in range(3 * 56 * 56))
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + png(56, 56, pixels)}}
    common = " ".join(random.Random(0).choices(WORDS, k=length))
    return lambda question: [
        {"role": "user", "content": [image, {"type": "text", "text": f"{common} {question}"}]},
    ]


def workload(form: str, groups: int, requests: int, seed: int) -> list[Messages]:
    """Messages of `requests` requests, as many (give or take one) of each group, in an order drawn by `seed`."""
    chance = random.Random(seed)
    make = image_group if form == "image" else text_group
    asks = [make(FORMS[form].prefix_tokens, chance) for _ in range(groups)]
    order = [asks[n % groups](QUESTIONS[n // groups % len(QUESTIONS)]) for n in range(requests)]
    chance.shuffle(order)
    return order


def hello(form: Form) -> bytes:
    """The body of a request so small that it tells only whether there is an answer."""
    return orjson.dumps({"model": form.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1})


def png(width: int, height: int, pixels: bytes) -> str:
    """An RGB image as base64 PNG (RFC 2083): signature, IHDR, IDAT, IEND."""

    def part(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + pixels[3 * width * y : 3 * width * (y + 1)] for y in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()
