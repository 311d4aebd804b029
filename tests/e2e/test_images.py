"""Images through the balancer to tiny-llava: a true LLaVA pipeline whose toy eyes tell plain colours apart."""

import base64
import io
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from PIL import Image

# As tiny_llava.COLOURS has them, but not quite: eyes that only know their lessons by heart would miss.
PLAIN = {
    "red": (200, 40, 35),
    "green": (40, 150, 60),
    "blue": (45, 70, 210),
    "yellow": (235, 215, 60),
    "purple": (120, 50, 160),
    "black": (20, 20, 20),
    "white": (240, 240, 240),
    "orange": (240, 140, 35),
}
WORDS = re.compile("|".join([*PLAIN, "pink", "gray", "brown"]))


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (120, 80), PLAIN[colour]).save(file, "PNG")
    return file.getvalue()


def seen_in(endpoint: str, url: str) -> str:
    """The first colour that the model names."""
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What color is this image?"},
    ]
    body = {
        "model": "tiny-llava",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 16,
    }
    answer = httpx.post(f"{endpoint}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    said = answer.json()["choices"][0]["message"]["content"].lower()
    named = WORDS.search(said)
    return named[0] if named else said


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
    seen = {name: seen_in(eyes, f"data:image/png;base64,{base64.b64encode(png(name)).decode()}") for name in PLAIN}
    assert sum(name == said for name, said in seen.items()) >= 6, seen


def test_colours_are_named_right_by_http_url(eyes: str, web: str) -> None:
    seen = {name: seen_in(eyes, f"{web}/{name}.png") for name in PLAIN}
    assert sum(name == said for name, said in seen.items()) >= 6, seen
