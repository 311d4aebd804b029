"""Requests one path from this container's own HTTP server; exit status 0 if it can take requests.

    python3 -I -S healthcheck.py PORT PATH

For a replica that shares its GPU (GPU_SHARE=yes) it requests /alive instead: such a replica may be not ready, and yet
healthy, while others have their turn.

It runs every few seconds in every container, so it imports almost nothing: most of its cost is starting Python.
"""

import os
import socket
import sys

TIMEOUT = 4.0  # seconds; less than the timeout of the images' HEALTHCHECK

# 404: an SGLang version without /ready, which listens only after it has loaded its model.
HEALTHY = (b"200", b"404")


def status(port: int, path: str) -> bytes:
    """The three digits of the status code. Raises OSError if no answer arrives in time."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head = b""
        while b"\r\n" not in head and (data := connection.recv(4096)):
            head += data
    return head[9:12]


if __name__ == "__main__":
    try:
        path = "/alive" if os.environ.get("GPU_SHARE", "").lower() == "yes" else sys.argv[2]
        answer = status(int(sys.argv[1]), path)
    except OSError as error:
        sys.exit(f"no answer on port {sys.argv[1]}: {error}")
    if answer not in HEALTHY:
        sys.exit(f"{path} says {answer.decode(errors='replace') or 'nothing'}")
