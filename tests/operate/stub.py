"""A replica of a few lines for tests of starting and stopping: ready after --warm-up seconds; dies on request.

GET /v1/models, /health and /ready answer; POST /v1/chat/completions answers after "delay" seconds of its JSON body;
POST /v1/die ends the process at once with exit code 7.
"""

import argparse
import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    warm_at = 0.0

    def do_GET(self) -> None:
        is_warm = time.monotonic() >= Handler.warm_at
        self.answer(200 if is_warm else 503, {"data": [{"id": "stub"}], "pid": os.getpid()})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.path == "/v1/die":
            print("told to die", flush=True)
            os._exit(7)
        time.sleep(body.get("delay", 0))
        self.answer(200, {"pid": os.getpid(), "id": os.environ["SKYPILOT_SERVE_REPLICA_ID"]})

    def answer(self, status: int, body: object) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--warm-up", type=float, default=0.0)
    options = parser.parse_args()
    Handler.warm_at = time.monotonic() + options.warm_up
    print("stub listens", flush=True)
    ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()
