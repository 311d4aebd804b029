"""SGLang's own loaders of images, sound and video, with the plug-in in place: none asks where the policy forbids it."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(600)  # importing SGLang takes minutes on a busy machine
# In a process of its own: SGLang's imports have effects that do not go away.
LOAD = """
import json, sys
from replica import plugin
plugin.activate()
plugin.register_hooks()
from sglang.srt.entrypoints.systemone import serving as systemone
from sglang.srt.multimodal.cache import identity
from sglang.srt.utils import common, ImageData

LOADERS = {
    "image": common.load_image,
    "image bytes": common.get_image_bytes,
    "image of a list": lambda source: common.load_image(ImageData(url=source)),
    "image of systemone": lambda source: systemone._read_image(0, ImageData(url=source)),
    "sound": common.load_audio,
    "video": common.load_video,
    "video bytes": common.get_video_bytes,
    "video of a list": lambda source: common.load_video(common.VideoData(url=source)),
    "any download": lambda source: common.download_remote_media(source, timeout=3),
}
seen = {}
for source in sys.argv[1:]:
    for name, load in LOADERS.items():
        try:
            load(source)
            seen[f"{name} {source}"] = "loaded"
        except Exception as error:
            seen[f"{name} {source}"] = f"{type(error).__name__}: {error}"
print(json.dumps(seen))
"""


class Site:
    """A web server on loopback, at /to/URL a redirect to that URL. `asked` lists the paths that were asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                is_redirect = self.path.startswith("/to/")
                self.send_response(302 if is_redirect else 404)
                if is_redirect:
                    self.send_header("Location", self.path.removeprefix("/to/"))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    one = Site()
    yield one
    one.close()


def loaded(*sources: str, **environ: str) -> dict[str, str]:
    """What each loader says of each source, by "LOADER SOURCE"."""
    command = [sys.executable, "-W", "ignore", "-c", LOAD, *sources]
    around = {"SGLANG_USE_CPU_ENGINE": "1", "PATH": os.environ["PATH"], **environ}
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=around, check=False)
    assert answer.returncode == 0, answer.stderr
    told: dict[str, str] = json.loads(answer.stdout.splitlines()[-1])
    return told


def test_no_loader_asks_this_machine_or_reads_its_files(site: Site, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    web = [f"http://127.0.0.1:{site.port}/a", f"http://localhost:{site.port}/a", "http://169.254.169.254/latest"]
    files = [str(secret), f"file://{secret}"]
    said = loaded(*web, *files)
    assert len(said) == 9 * 5
    for source in web:
        refused = {
            name for name, text in said.items() if name.endswith(source) and "not on the public Internet" in text
        }
        assert len(refused) == 9, {name: text for name, text in said.items() if name.endswith(source)}
    for name, text in said.items():
        if name.endswith(tuple(files)) and not name.startswith("any download"):  # that one knows only the web
            assert "ALLOWED_LOCAL_MEDIA_PATH" in text, (name, text)
    assert site.asked == []


OLLAMA = """
import asyncio, json, sys
from replica import plugin
plugin.activate()
plugin.register_hooks()
from sglang.srt.entrypoints.ollama.protocol import OllamaChatRequest, OllamaGenerateRequest
from sglang.srt.entrypoints.ollama.serving import OllamaServing
from sglang.srt.managers.io_struct import GenerateReqInput

class Manager:
    served_model_name = "m"
    tokenizer = property(lambda self: self)
    apply_chat_template = staticmethod(lambda *_, **__: [1, 2])
    seen = []
    async def generate_request(self, asked, raw):
        self.seen.append([asked.image_data, asked.video_data, asked.audio_data])
        yield {"text": "x", "meta_info": {}}

async def main(image):
    serving = OllamaServing(Manager())
    message = {"role": "user", "content": "hi", "images": [image]}
    await serving.handle_chat(OllamaChatRequest(model="m", messages=[message], stream=False), None)
    await serving.handle_generate(OllamaGenerateRequest(model="m", prompt="hi", images=[image], stream=False), None)
    refused = {}
    for kind in ("image", "video", "audio"):
        try:
            GenerateReqInput(text="hi", **{f"{kind}_data": ["file:///etc/passwd"]})
        except ValueError as error:
            refused[kind] = str(error)
    print(json.dumps([Manager.seen, refused]))

asyncio.run(main(sys.argv[1]))
"""


def test_ollamas_images_go_nowhere_and_files_are_no_media() -> None:
    """SGLang 0.5.23 leaves out the images of Ollama's paths: should it ever read them, the policy must apply."""
    command = [sys.executable, "-W", "ignore", "-c", OLLAMA, "http://127.0.0.1:9/flush_cache"]
    around = {"SGLANG_USE_CPU_ENGINE": "1", "PATH": os.environ["PATH"]}
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=around, check=False)
    assert answer.returncode == 0, answer.stderr
    seen, refused = json.loads(answer.stdout.splitlines()[-1])
    assert seen == [[None, None, None]] * 2
    assert refused.keys() == {"image", "video", "audio"}
    assert all("ALLOWED_LOCAL_MEDIA_PATH" in text for text in refused.values())


def test_no_loader_follows_a_redirect_elsewhere(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0)
        target = f"http://localhost:{other.getsockname()[1]}/flush_cache"
        source = f"http://127.0.0.1:{site.port}/to/{target}"
        said = loaded(source, ALLOWED_MEDIA_DOMAINS="127.0.0.1", ALLOW_PRIVATE_MEDIA="1")
        assert len(said) == 9
        assert [text for text in said.values() if "the operator allows media from 127.0.0.1 only" not in text] == []
        assert len(site.asked) >= 9
        with pytest.raises(BlockingIOError):
            other.accept()
