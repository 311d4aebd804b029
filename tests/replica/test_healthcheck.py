"""docker/healthcheck.py: which path it asks of a replica."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docker/healthcheck.py"


class _Dozing(BaseHTTPRequestHandler):
    """A replica that a balancer has sent to doze: alive, and not ready."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/alive" else 503)
        self.end_headers()


@pytest.fixture
def port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), _Dozing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize(("shares", "code"), [("yes", 0), ("Yes", 0), ("no", 1), ("", 1)])
def test_path(port: int, shares: str, code: int) -> None:
    """/alive of a replica that shares its GPU, and what the image says of all others."""
    command = (sys.executable, "-I", "-S", str(SCRIPT), str(port), "/ready")
    done = subprocess.run(command, env={**os.environ, "GPU_SHARE": shares}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, "/ready says 503\n" if code else "")
