"""Where the image, sound or video of a request may come from: the request itself, the web, or what the operator allows.

A client's string must not make the replica read its own files or contact addresses that only its own network can reach.
"""

import base64
import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from replica.own_address import is_own

DOMAINS = "ALLOWED_MEDIA_DOMAINS"
LOCAL_PATH = "ALLOWED_LOCAL_MEDIA_PATH"
PRIVATE = "ALLOW_PRIVATE_MEDIA"

# Keys of a dict whose strings SGLang takes for a source, whatever they look like.
_SOURCE_KEYS = {"url", "image", "video", "audio", "video_path", "path"}
_WORD = re.compile(r"[\w .+-]{0,64}")
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_WEB = re.compile("https?://", re.IGNORECASE)
_JPEG = "/9j/"  # every JPEG begins so in base64; no path does
_MAX_PATH = 4096
_MAX_DEPTH = 16  # lists in lists
_FIRST = 4096  # letters of a data: URL that tell most media from a playlist
# What FFmpeg finds anywhere in a text: DASH, SDP, IMF.
_PLAYLISTS = (b"<mpd", b"c=in ip", b"<compositionplaylist")
# An ID3v2 tag: its flags, and its length, 7 bits a byte. FFmpeg skips as many as there are before it looks.
_TAG = re.compile(rb"ID3[^\xff]{2}(.)([\0-\x7f]{4})", re.DOTALL)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class MediaError(ValueError):
    """Media that the replica refuses to load; the message is for the client. SGLang answers a ValueError with 400."""


@dataclass(frozen=True)
class MediaPolicy:
    """What the operator allows beyond data: URLs and the public web.

    domains: if not empty, the only hosts that media are fetched from. local: a folder whose files may be read.
    private: addresses outside the public Internet may be contacted as well.
    """

    domains: frozenset[str] = frozenset()
    local: Path | None = None
    private: bool = False

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "MediaPolicy":
        """The policy from its three variables. Raises ValueError that names the variable."""
        folder = environ.get(LOCAL_PATH)
        if folder and not Path(folder).is_dir():
            raise ValueError(f"{LOCAL_PATH}={folder}: this is not a folder")
        private = environ.get(PRIVATE) or "0"
        if private not in ("0", "1"):
            raise ValueError(f"{PRIVATE}={private}: use 0 or 1")
        return cls(
            frozenset(_host(part) for part in re.split(r"[\s,]+", environ.get(DOMAINS) or "") if part),
            Path(folder).resolve() if folder else None,
            private == "1",
        )

    def environ(self) -> dict[str, str]:
        """The variables from which `read` makes this policy."""
        return {
            DOMAINS: " ".join(sorted(self.domains)),
            LOCAL_PATH: str(self.local or ""),
            PRIVATE: str(int(self.private)),
        }

    def settle(self, source: str) -> str:
        """`source` in an unambiguous form: a data: URL, an http(s) URL, or the real path of a file.

        Raises MediaError for everything else, and for a file outside the folder. The host and address of a URL are
        checked when it is fetched (replica/fetch.py).
        """
        if source.startswith("data:"):
            _check_data(source)
            return source
        if web := _WEB.match(source):
            return web[0].lower() + source[web.end() :]
        is_file = source[:5].lower() == "file:" or (source.startswith("/") and not source.startswith(_JPEG))
        if not is_file and _BASE64.fullmatch(source, 0, _MAX_PATH):
            return self.settle(f"data:;base64,{source}")  # spelled out, it cannot be taken for a file
        if self.local is None:
            raise MediaError(
                f"{_shown(source)}: media must be data: or http(s) URLs; files of the replica are not read "
                f"(its operator may allow a folder of them with {LOCAL_PATH})"
            )
        try:
            file = Path(unquote(urlsplit(source).path) if source[:5].lower() == "file:" else source).resolve()
            # The answer reveals whether a file exists only for files in this folder.
            exists = file.is_relative_to(self.local) and file.is_file()
        except (OSError, ValueError, RuntimeError):
            exists = False
        if not is_file or not exists:
            raise MediaError(f"{_shown(source)}: no such file in the folder that the operator allows")
        return str(file)

    def settle_all(self, value: Any, depth: int = 0) -> Any:
        """`value` with every source in it settled: strings, SGLang's ImageData and similar, lists and dicts of them.

        Changes it in place where possible. Raises MediaError.
        """
        if depth > _MAX_DEPTH:
            raise MediaError(f"media are nested more than {_MAX_DEPTH} lists deep")
        if isinstance(value, str):
            return self.settle(value)
        if isinstance(value, list):
            for place, item in enumerate(value):
                if not isinstance(item, int | float):
                    value[place] = self.settle_all(item, depth + 1)
        elif isinstance(value, tuple):
            return tuple(self.settle_all(item, depth + 1) for item in value)
        elif isinstance(value, dict):
            for key, item in value.items():
                if not isinstance(item, str) or key in _SOURCE_KEYS or not _WORD.fullmatch(item):
                    value[key] = self.settle_all(item, depth + 1)
        elif isinstance(getattr(value, "url", None), str):
            value.url = self.settle(value.url)
        return value

    def check_host(self, host: str, url: str) -> None:
        """Raises MediaError if the policy lists hosts and this is not one of them."""
        if self.domains and _host(host) not in self.domains:
            raise MediaError(f"{_shown(url)}: the operator allows media from {', '.join(sorted(self.domains))} only")

    def addresses(self, host: str, port: int) -> list[str]:
        """The addresses of `host` that may be contacted. Connect to exactly these: a second look-up may differ.

        Raises MediaError if none is allowed, OSError if the name cannot be resolved.
        """
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        known = list(dict.fromkeys(str(address[0]) for *_, address in found))
        allowed = [address for address in known if self.private or is_public(address)]
        if not allowed:
            raise MediaError(
                f"{host} is not on the public Internet, and media are fetched only from there "
                f"(the replica's operator may allow more with {PRIVATE}=1)"
            )
        return allowed


def check_content(content: bytes) -> None:
    """Raises MediaError for playlists: FFmpeg would open the files and addresses that they list by itself."""
    start = 0
    while start < len(content):
        end = content.find(b"\0", start)
        text = content[start : len(content) if end < 0 else end].lower()  # of real media, only a few bytes
        if text.startswith((b"#extm3u", b"ffconcat")) or any(mark in text for mark in _PLAYLISTS):
            raise MediaError("this is a playlist, not an image, video or sound: send what it lists")
        if not (tag := _TAG.match(content, start)):
            return
        start = tag.end() + sum(part << shift for part, shift in zip(tag[2], (21, 14, 7, 0), strict=True))
        start += 10 if tag[1][0] & 0x10 else 0  # a footer


def _check_data(source: str) -> None:
    start = source.find(",") + 1
    if not start or source.find(",", start) >= 0:
        # SGLang's loaders do not agree which part is meant.
        raise MediaError(f"{_shown(source)}: a data: URL has one comma, before its content")
    for length in (_FIRST, len(source)):
        try:
            content = base64.b64decode(source[start : start + length], validate=True)
        except ValueError:
            raise MediaError(f"{_shown(source)}: the content of a data: URL must be base64, without spaces") from None
        if b"\0" in content and not _TAG.match(content):
            break
    check_content(content)


def is_public(address: str) -> bool:
    """Is this a public Internet address of another machine, in whatever IPv6 form it is written?"""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not is_own(ip)


def _host(name: str) -> str:
    return name.strip("[]").rstrip(".").lower()


def _shown(source: str) -> str:
    return repr(source if len(source) <= 100 else f"{source[:100]}...")
