"""Images through the balancer to tiny-llava: a true LLaVA pipeline whose toy eyes tell plain colours apart."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.e2e.images import PLAIN, data_url, png, seen_in


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    """A web server that has each image at /COLOUR.png."""

    class Images(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = png(self.path.strip("/").removesuffix(".png"))
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Images) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_colours_are_named_right_by_data_url(eyes: str) -> None:
    seen = {name: seen_in(eyes, data_url(name)) for name in PLAIN}
    assert sum(name == said for name, said in seen.items()) >= 6, seen


def test_colours_are_named_right_by_http_url(eyes: str, web: str) -> None:
    seen = {name: seen_in(eyes, f"{web}/{name}.png") for name in PLAIN}
    assert sum(name == said for name, said in seen.items()) >= 6, seen
