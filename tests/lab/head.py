"""A strict parser of request heads: it refuses what a server must refuse, and names the reason."""

import re
from dataclasses import dataclass

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


class Malformed(Exception):
    """The bytes received are no HTTP/1.1 request."""


@dataclass(frozen=True, slots=True)
class Head:
    method: str
    target: str
    version: str
    headers: list[tuple[str, str]]
    length: int
    chunked: bool
    keep_alive: bool
    expects_continue: bool


def parse_head(data: bytes) -> Head:
    """A request head without its empty line. Raises Malformed with what is wrong."""
    first, *lines = data.split(b"\r\n")
    parts = first.split(b" ")
    if len(parts) != 3 or not _TOKEN.fullmatch(parts[0]) or parts[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise Malformed(f"request line {first!r}")
    headers: list[tuple[str, str]] = []
    lengths: set[str] = set()
    codings: list[str] = []
    hosts = 0
    options = ""
    expects_continue = False
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _TOKEN.fullmatch(name) or b"\n" in value or b"\r" in value or b"\0" in value:
            raise Malformed(f"header line {line!r}")
        text = value.strip(b" \t").decode("latin-1")
        headers.append((name.decode("ascii"), text))
        match name.lower():
            case b"content-length":
                lengths.add(text)
            case b"transfer-encoding":
                codings.append(text.lower())
            case b"host":
                hosts += 1
            case b"connection":
                options += "," + text.lower()
            case b"expect":
                expects_continue = text.lower() == "100-continue"
    version = parts[2].decode()
    if version == "HTTP/1.1" and hosts != 1:
        raise Malformed(f"{hosts} Host headers")
    if codings and (lengths or codings != ["chunked"]):
        raise Malformed(f"Transfer-Encoding {codings} with Content-Length {sorted(lengths)}")
    if len(lengths) > 1 or not all(length.isascii() and length.isdigit() for length in lengths):
        raise Malformed(f"Content-Length {sorted(lengths)}")
    said = {option.strip() for option in options.split(",")}
    keep_alive = "close" not in said if version == "HTTP/1.1" else "keep-alive" in said
    return Head(
        method=parts[0].decode(),
        target=parts[1].decode("latin-1"),
        version=version,
        headers=headers,
        length=int(lengths.pop()) if lengths else 0,
        chunked=bool(codings),
        keep_alive=keep_alive,
        expects_continue=expects_continue,
    )
