"""What a request names as an image never makes a real replica read its files or ask where it may not; it is a 400."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.images import data_url, png
from tests.e2e.running import Balancer, Replica

MODEL = "tiny-llava"


def chat(image: str) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What color is it?"}]
    return {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": content}]}


def responses(image: str) -> dict[str, Any]:
    content = [{"type": "input_image", "image_url": image}, {"type": "input_text", "text": "What color is it?"}]
    return {"model": MODEL, "max_output_tokens": 4, "input": [{"role": "user", "content": content}]}


def messages(image: str) -> dict[str, Any]:
    source = {"type": "url", "url": image}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What color is it?"}]
    return {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": content}]}


def generate(image: str) -> dict[str, Any]:
    return {"text": "<image>\nWhat color is it?", "image_data": image, "sampling_params": {"max_new_tokens": 4}}


def batch(image: str) -> dict[str, Any]:
    one = generate(image)
    return {**one, "text": [one["text"], one["text"]], "image_data": [[data_url("red")], [image]]}


def spoken(kind: str, source: str) -> dict[str, Any]:
    """A chat with a sound or a video; `kind` is audio or video."""
    content = [{"type": f"{kind}_url", f"{kind}_url": {"url": source}}, {"type": "text", "text": "What is it?"}]
    return {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": content}]}


def raw(kind: str, source: str) -> dict[str, Any]:
    return {"text": "What is it?", f"{kind}_data": source, "sampling_params": {"max_new_tokens": 4}}


WAYS = {
    "/v1/chat/completions": [chat],
    "/v1/responses": [responses],
    "/v1/messages": [messages],
    "/generate": [generate, batch],
}


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("home") / "private.png"
    file.write_bytes(png("blue"))
    return file


@pytest.mark.parametrize(("path", "body"), [(path, body) for path, bodies in WAYS.items() for body in bodies])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_files_and_unnamed_hosts_are_refused(eyes: str, path: str, body: Any, stream: bool, private: Path) -> None:
    asked = {**body(data_url("blue")), "stream": stream}
    assert httpx.post(f"{eyes}{path}", json=asked, timeout=120).status_code == 200
    for image in (f"file://{private}", str(private), "file:///no/such/file.png", "~/private.png"):
        answer = httpx.post(f"{eyes}{path}", json={**body(image), "stream": stream}, timeout=120)
        assert answer.status_code == 400, (image, answer.text)
        assert "ALLOWED_LOCAL_MEDIA_PATH" in answer.text


@pytest.mark.parametrize("path", WAYS)
def test_a_host_that_is_not_named_is_refused(eyes: str, tiny_llava: Replica, path: str) -> None:
    (body, *_) = WAYS[path]
    inner = f"http://localhost:{tiny_llava.port}/flush_cache"
    answer = httpx.post(f"{eyes}{path}", json=body(inner), timeout=120)
    assert answer.status_code == 400, answer.text
    assert "the operator allows media from 127.0.0.1 only" in answer.text


def test_link_without_an_image(eyes: str, tiny_llava: Replica, in_front_of_eyes: Balancer) -> None:
    """A link that gives no image is the client's mistake and ejects no replica."""
    for _ in range(6):
        answer = httpx.post(f"{eyes}/v1/chat/completions", json=chat(f"{tiny_llava.url}/no.png"), timeout=120)
        assert answer.status_code == 400, answer.text
        assert "cannot be fetched" in answer.text
    assert in_front_of_eyes.statuses() == ["READY"]


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", spoken), ("/generate", raw)])
@pytest.mark.parametrize("kind", ["audio", "video"])
def test_sound_and_video_come_from_nowhere_else(eyes: str, kind: str, path: str, body: Any, private: Path) -> None:
    """As for images: files are refused, and a host that is not named is not asked, even if the model hears nothing."""
    for source in (f"file://{private}", str(private)):
        answer = httpx.post(f"{eyes}{path}", json=body(kind, source), timeout=120)
        assert answer.status_code == 400, answer.text
        assert "ALLOWED_LOCAL_MEDIA_PATH" in answer.text
    with unasked() as there:
        assert httpx.post(f"{eyes}{path}", json=body(kind, there), timeout=120).status_code < 500


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_ollamas_images_are_no_addresses(eyes: str, path: str, private: Path) -> None:
    """SGLang 0.5.23 leaves them out; should it ever read them, an address or a file must not be among them."""
    with unasked() as there:
        for image in (there, f"file://{private}", str(private)):
            message = {"role": "user", "content": "What color is it?", "images": [image]}
            asked = (
                {"messages": [message]} if path == "/api/chat" else {"prompt": message["content"], "images": [image]}
            )
            asked |= {"model": MODEL, "stream": False, "options": {"num_predict": 4, "temperature": 0}}
            answer = httpx.post(f"{eyes}{path}", json=asked, timeout=120)
            assert answer.status_code in (200, 400), answer.text
            assert "blue" not in answer.text.lower()


@contextlib.contextmanager
def unasked() -> Iterator[str]:
    """An address on this machine by a name that the operator did not name; fails if anybody connects."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        yield f"http://localhost:{trap.getsockname()[1]}/a"
        trap.settimeout(0)
        with pytest.raises(BlockingIOError):
            trap.accept()
