"""Asks this container's own HTTP server one path; exit status 0 when it may be given requests.

    python3 -I -S healthcheck.py PORT PATH

Runs each few seconds in every container, so it imports next to nothing: most of its cost is Python's start.
"""

import socket
import sys

TIMEOUT = 4.0  # seconds; below the time that the images' HEALTHCHECK gives it

# 404: an SGLang that is older than /ready, and that listens once it has loaded its model.
WELL = (b"200", b"404")


def status(port: int, path: str) -> bytes:
    """The answer's three digits; raises OSError when nobody answers in time."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head = b""
        while b"\r\n" not in head and (data := connection.recv(4096)):
            head += data
    return head[9:12]


if __name__ == "__main__":
    try:
        answer = status(int(sys.argv[1]), sys.argv[2])
    except OSError as error:
        sys.exit(f"no answer on port {sys.argv[1]}: {error}")
    if answer not in WELL:
        sys.exit(f"{sys.argv[2]} says {answer.decode(errors='replace') or 'nothing'}")
