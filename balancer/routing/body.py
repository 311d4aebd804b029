"""A request's body as it is read for routing: without the images in it, and only where that keeps nobody waiting.

A body is parsed on the event loop, so its cost is looked at before, by counting what makes it dear; one that costs too
much is not read at all.
"""

import os
import re
from typing import Any

import orjson
from xxhash import xxh3_64_digest

# Two prompts must not be made to look alike, so that nobody can draw others' requests to a replica, or push them off.
SEED = int.from_bytes(os.urandom(8))
# A larger body is looked at before it is parsed, and read in a turn of its own. A smaller one takes 2 ms at the most.
HEAVY_BODY = 32 << 10
# What is left without images is parsed up to here. 4 MiB are a million tokens of English; there are no larger prompts.
MAX_PARSED = 4 << 20
# Nanoseconds of CPU, on a Zen 4 core, to parse, to read and to free again: an object, an array, a value, a string (it
# has two quotes), a byte. Kinds of JSON of 4 MiB that were tried took 0.2 to 1.4 times what these say.
PRICES = {b"{": 250.0, b"[": 130.0, b",": 60.0, b'"': 100.0}
PER_BYTE = 3.0
MAX_NANOSECONDS = 40e6

IMAGE_MARK = "\x00image:"
# An image is a string that is all in the letters of base64, at least so many; the rest is looked at roughly.
LEAST_IMAGE = 1024
_STRIDE = LEAST_IMAGE // 2  # so each image has a place in it from which on there are as many letters as this looks for:
_LETTERS = re.compile(rb"[A-Za-z0-9+/=_\\-]{%d}" % (_STRIDE // 4))
_LONGEST_SCHEME = 200
_IMAGE = re.compile(rb'"(?:data:[^", ]{0,%d},)?[A-Za-z0-9+/=_\\-]{%d}' % (_LONGEST_SCHEME, LEAST_IMAGE))


def parsed(raw: bytes) -> Any:
    """The body's JSON with a mark and a digest for each image; None where it would cost too much, or is no JSON."""
    left = without_images(raw)
    if left is None or (len(left) > HEAVY_BODY and nanoseconds(left) > MAX_NANOSECONDS):
        return None
    try:
        return orjson.loads(left)
    except orjson.JSONDecodeError:
        return None


def nanoseconds(raw: bytes) -> float:
    """What it takes to parse and to read this JSON, at most; looked at closely only if it seems to be too much.

    What stands in strings counts too, for nothing here knows where they end, unless it is JSON itself: there braces and
    commas come before a backslash, and quotes behind one, which outside of strings they never do.
    """
    costs = {mark: raw.count(mark) * price for mark, price in PRICES.items()}
    basis = len(raw) * PER_BYTE
    for mark in sorted(costs, key=costs.__getitem__, reverse=True):
        if basis + sum(costs.values()) <= MAX_NANOSECONDS:
            break
        costs[mark] -= raw.count(b'\\"' if mark == b'"' else mark + b"\\") * PRICES[mark]
        if costs[mark] > MAX_NANOSECONDS:
            break
    return basis + sum(costs.values())


def without_images(raw: bytes) -> bytes | None:
    """The same JSON with each embedded image replaced by a digest of its bytes, which are read once and not copied.

    What is an image depends on its string alone, so that a message looks the same in every body. Where `raw` is JSON,
    so is this. None where more than `MAX_PARSED` bytes would be left.
    """
    pieces: list[bytes | memoryview] = []
    view = memoryview(raw)
    done = gone = 0  # what was looked at, and how much of that was images
    seen = at = 0  # no string that begins before `seen` is an image
    while at < len(raw) and at - gone <= MAX_PARSED:
        if not _LETTERS.match(raw, at):
            at += _STRIDE
            continue
        begin = raw.rfind(b'"', max(seen, at - LEAST_IMAGE), at + 1)
        end = _end_of_image(raw, begin) if begin >= 0 else -1
        if end < 0:
            seen = begin + 1 if begin >= 0 else seen
            at += _STRIDE
            continue
        pieces += view[done:begin], b'"\\u0000image:%b"' % image_digest(raw, begin + 1, end)
        gone += end - begin
        done = seen = at = end + 1
    if len(raw) - gone > MAX_PARSED:
        return None
    return b"".join([*pieces, view[done:]]) if done else raw


def _end_of_image(raw: bytes, begin: int) -> int:
    """Where the closing quote is of an image whose opening quote may be at `begin`; -1: it is none."""
    if raw[begin - 1 : begin] == b"\\":
        return -1  # a quote within a string; before one that opens a string there is none
    if not (found := _IMAGE.match(raw, begin)):
        return -1
    end = raw.find(b'"', found.end())
    if end < 0 or raw.find(b" ", begin, end) >= 0:
        return -1
    if raw.find(b"\\", begin, end) < 0:  # a tenth of the time of counting none
        return end
    # Of backslashes only those before a slash, as PHP writes it: all else is text in escapes, or the quote is in it.
    escapes = raw.count(b"\\", begin, end)
    return end if escapes == raw.count(b"\\/", begin, end) else -1


def image_digest(raw: bytes, begin: int, end: int) -> bytes:
    """A digest of what stands there, in hexadecimal letters; the same whether or not its slashes are escaped."""
    if raw.find(b"\\", begin, end) >= 0:
        return xxh3_64_digest(raw[begin:end].replace(b"\\/", b"/"), SEED).hex().encode()
    return xxh3_64_digest(memoryview(raw)[begin:end], SEED).hex().encode()
