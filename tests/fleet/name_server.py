"""A name server on 127.0.0.1:53 of a network of its own, and what the machine's resolver makes of its answers.

`unshare --map-root-user --net --mount python -m tests.fleet.name_server FOLDER NAME...` prints, as JSON, what
balancer.fleet.discovery.resolve says of each name: its addresses, or the error.
"""

import asyncio
import fcntl
import ipaddress
import json
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

from balancer.fleet.discovery import resolve

A, AAAA = 1, 28
NXDOMAIN, SERVFAIL, TRUNCATED = 3, 2, 0x0200
MANY = [f"10.1.{number // 250}.{number % 250 + 1}" for number in range(60)]
ADDRESSES = {
    "one.test": ["10.0.0.1"],
    "both.test": ["10.0.0.2", "10.0.0.1", "fd00::1"],
    "six.test": ["fd00::2"],
    "many.test": MANY,
    "nodata.test": [],
}
CODES = {"broken.test": SERVFAIL}
SILENT = "silent.test"
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


def answer(query: bytes, limit: int) -> bytes | None:
    """The answer to one query, cut to `limit` bytes as UDP demands; None: silence."""
    name, rest = "", query[12:]
    while length := rest[0]:
        name += rest[1 : length + 1].decode() + "."
        rest = rest[length + 1 :]
    (kind,) = struct.unpack("!H", rest[1:3])
    question = query[12 : len(query) - len(rest) + 5]
    name = name.rstrip(".").lower()
    if name == SILENT:
        return None
    code = CODES.get(name, 0 if name in ADDRESSES else NXDOMAIN)
    records = b""
    count = 0
    for text in ADDRESSES.get(name, []):
        address = ipaddress.ip_address(text)
        if kind == (A if address.version == 4 else AAAA):
            count += 1
            records += struct.pack("!HHHIH", 0xC00C, kind, 1, 600, len(address.packed)) + address.packed
    flags = 0x8180 | code
    if 12 + len(question) + len(records) > limit:
        flags, count, records = flags | TRUNCATED, 0, b""
    return query[:2] + struct.pack("!HHHHH", flags, 1, count, 0, 0) + question + records


def serve_datagrams(door: socket.socket) -> None:
    while True:
        query, client = door.recvfrom(4096)
        if said := answer(query, 512):
            door.sendto(said, client)


def serve_streams(door: socket.socket) -> None:
    while True:
        with door.accept()[0] as client, client.makefile("rb") as reader:
            while prefix := reader.read(2):  # both families are asked on one connection
                if said := answer(reader.read(*struct.unpack("!H", prefix)), 65535):
                    client.sendall(struct.pack("!H", len(said)) + said)


def main(folder: Path, names: list[str]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(control, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | IFF_UP))
    own = folder / "resolv.conf"
    own.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    subprocess.run(["mount", "--bind", str(own), str(Path("/etc/resolv.conf").resolve())], check=True)
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", 53))
    streams = socket.create_server(("127.0.0.1", 53))
    for target, door in ((serve_datagrams, datagrams), (serve_streams, streams)):
        threading.Thread(target=target, args=(door,), daemon=True).start()
    said: dict[str, list[str] | str] = {}
    for name in names:
        try:
            said[name] = asyncio.run(resolve(name, 8000))
        except OSError as error:
            said[name] = type(error).__name__
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
