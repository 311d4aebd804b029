"""Plain images, and what tiny-llava says of them."""

import base64
import io
import re

import httpx
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


def data_url(colour: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(colour)).decode()}"
