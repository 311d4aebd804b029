"""Pictures that the page's tests send, and those that they keep of the page."""

import zlib
from pathlib import Path

SCREENSHOTS = Path(__file__).parents[3] / ".screenshots"


def png(colour: tuple[int, int, int], size: int = 48) -> bytes:
    """An image of one colour, `size` pixels wide and high."""

    def part(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    rows = (b"\0" + bytes(colour) * size) * size
    head = size.to_bytes(4, "big") * 2 + bytes((8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


def keep(name: str, picture: bytes) -> None:
    """Writes a screenshot to .screenshots/, for people and for the README."""
    SCREENSHOTS.mkdir(exist_ok=True)
    (SCREENSHOTS / name).write_bytes(picture)
