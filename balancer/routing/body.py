"""A request's body as it is read for routing: without its images, and only if that does not delay other requests.

A body is parsed on the event loop, so its cost is estimated first, by counting what is expensive to parse; a body that
costs too much is not read at all.
"""

import os
import re
from typing import Any

import orjson
from xxhash import xxh3_64_digest

# A secret seed: nobody can craft prompts that hash alike, to draw others' requests to a replica or push them off it.
SEED = int.from_bytes(os.urandom(8))
# The cost of a larger body is estimated before it is parsed, in a turn of its own. A smaller one takes at most 2 ms.
HEAVY_BODY = 32 << 10
# A body larger than this without its images is not parsed. 4 MiB are a million tokens of English; no prompt is larger.
MAX_PARSED = 4 << 20
# Nanoseconds of CPU on a Zen 4 core to parse, read and free an object, an array, a value, a quote (a string has two)
# and a byte. The kinds of JSON that were tried, 4 MiB each, took 0.2 to 1.4 times the resulting estimate.
PRICES = {b"{": 250.0, b"[": 130.0, b",": 60.0, b'"': 100.0}
PER_BYTE = 3.0
MAX_NANOSECONDS = 40e6

IMAGE_MARK = "\x00image:"
# An image is a string of at least this many letters of base64; what follows them is checked only roughly.
LEAST_IMAGE = 1024
_STRIDE = LEAST_IMAGE // 2  # bytes from probe to probe: in every image one probe finds enough letters to match this:
_LETTERS = re.compile(rb"[A-Za-z0-9+/=_\\-]{%d}" % (_STRIDE // 4))
_LONGEST_SCHEME = 200
_IMAGE = re.compile(rb'"(?:data:[^", ]{0,%d},)?[A-Za-z0-9+/=_\\-]{%d}' % (_LONGEST_SCHEME, LEAST_IMAGE))


def parsed(raw: bytes) -> Any:
    """The body's JSON with a mark and a digest for each image; None if parsing would cost too much or it is no JSON."""
    left = without_images(raw)
    if left is None or (len(left) > HEAVY_BODY and nanoseconds(left) > MAX_NANOSECONDS):
        return None
    try:
        return orjson.loads(left)
    except orjson.JSONDecodeError:
        return None


def nanoseconds(raw: bytes) -> float:
    """An estimate of the time to parse and read this JSON; refined only if it seems too much.

    The content of strings counts too, since nothing here knows where they end. The refinement leaves out JSON within
    strings: there braces and commas come before a backslash, and quotes after one, as they never do outside strings.
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

    Whether a string is an image depends on that string alone, so that a message looks the same in every body. If `raw`
    is JSON, so is the result. None if more than `MAX_PARSED` bytes would be left.
    """
    pieces: list[bytes | memoryview] = []
    view = memoryview(raw)
    done = gone = 0  # bytes already handled, and how many of those were images
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
    """The position of the closing quote of an image whose opening quote may be at `begin`; -1 if it is no image."""
    if raw[begin - 1 : begin] == b"\\":
        return -1  # an escaped quote within a string
    if not (found := _IMAGE.match(raw, begin)):
        return -1
    end = raw.find(b'"', found.end())
    if end < 0 or raw.find(b" ", begin, end) >= 0:
        return -1
    if raw.find(b"\\", begin, end) < 0:  # takes a tenth of the time of a count that finds none
        return end
    # Backslashes may only escape slashes, as in PHP's JSON; any other means escaped text, or escapes this quote.
    escapes = raw.count(b"\\", begin, end)
    return end if escapes == raw.count(b"\\/", begin, end) else -1


def image_digest(raw: bytes, begin: int, end: int) -> bytes:
    """A hexadecimal digest of those bytes; the same whether or not slashes are escaped."""
    if raw.find(b"\\", begin, end) >= 0:
        return xxh3_64_digest(raw[begin:end].replace(b"\\/", b"/"), SEED).hex().encode()
    return xxh3_64_digest(memoryview(raw)[begin:end], SEED).hex().encode()
