"""The allow-list, and that no route of SGLang's is on it by oversight."""

import importlib.util
import random
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest

from balancer.relay.paths import GENERATING, OWN, PLAIN, PathKind, kind_of, normalise
from tests.support.needed import lacking

# What SGLang serves that everybody may use; every other route of its is its operator's.
FOR_EVERYBODY = {
    PathKind.GENERATING: {
        "/generate", "/classify", "/encode", "/v1/audio/transcriptions", "/v1/chat/completions", "/v1/classify",
        "/v1/completions", "/v1/decisions", "/v1/embeddings", "/v1/messages", "/v1/realtime", "/v1/rerank",
        "/v1/responses", "/v1/score", "/v1/systemone",
    },
    PathKind.PLAIN: {
        "/detokenize", "/get_model_info", "/model_info", "/tokenize", "/v1/detokenize", "/v1/messages/count_tokens",
        "/v1/models", "/v1/models/{model:path}", "/v1/tokenize",
    },
    PathKind.OWN: {"/health", "/ready", "/server_info", "/get_server_info"},
}  # fmt: skip


def test_the_page_on_the_endpoint_has_each_path_once() -> None:
    page = Path(__file__).parents[2].joinpath("docs/endpoint.md").read_text()
    rows = re.findall(r"^\| (`/.*?) \| ", page, re.MULTILINE)
    listed = [path for row in rows for path in re.findall(r"`([^`]+)`", row)]
    by_name = {"/v1/models/NAME", "/v1/responses/ID", "/v1/responses/ID/cancel"}
    assert sorted(listed) == sorted(GENERATING | PLAIN | OWN | by_name)
    for path in by_name:
        assert kind_of(path.replace("ID", "resp_1").encode())[1] is PathKind.PLAIN


def test_only_these_routes_of_the_real_sglang_are_reachable() -> None:
    """A new version's new route is nobody's, unless it is under /v1/: then it must be decided on, here."""
    found = importlib.util.find_spec("sglang")
    if found is None or not found.submodule_search_locations:
        lacking("no SGLang installed here; make install brings it")
    source = Path(found.submodule_search_locations[0], "srt/entrypoints/http_server.py").read_text()
    routes = set(re.findall(r'@app\.(?:get|post|put|patch|delete|api_route|head|websocket)\(\s*"([^"]+)"', source))
    assert len(routes) > 50
    for kind, expected in FOR_EVERYBODY.items():
        assert {route for route in routes if kind_of(route.encode())[1] is kind} == expected, kind


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"/v1/models", "/v1/models"),
        (b"/", "/"),
        (b"//", "/"),
        (b"///a//b///", "/a/b"),
        (b"/a/./b/.", "/a/b"),
        (b"/a/../b", "/b"),
        (b"/../../a", "/a"),
        (b"/a/b/..", "/a"),
        (b"/%61/%2e%2e/b", "/b"),
        (b"/a%2fb", "/a/b"),
        (b"/a%5cb", "/a/b"),
        (b"\\a", "/a"),
        (b"/a%252fb", "/a%2fb"),
        (b"/%zz", "/%zz"),
        (b"/%", "/%"),
        (b"/%C3%A4", "/\xc3\xa4"),
        (b"/a%00", "/a\0"),
        (b"*", "/*"),
        (b"", "/"),
    ],
)
def test_normalise(raw: bytes, path: str) -> None:
    assert normalise(raw) == path


@pytest.mark.parametrize(
    "raw", [b"/v1/models", b"/flush_cache", b"/v1/" + b"x" * 200, b"/" + b"../" * 60 + b"generate"]
)
def test_what_is_remembered_is_what_would_be_found(raw: bytes) -> None:
    assert kind_of(raw) == kind_of(raw)
    assert kind_of(raw)[0] == normalise(raw)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_sent_decodes_to_what_was_decided_on(seed: int) -> None:
    random_ = random.Random(seed)
    parts = [b"/", b"//", b"v1", b"%2f", b"%2F", b"%66", b".", b"..", b"%2e", b"\\", b"%5c", b"%", b"%25", b"%zz", b"*"]
    parts += [b"models", b"\xff", b"%ff", b";a=b", b"~", b"%7e", b"%00", b" ", b":", b"@"]
    for _ in range(500):
        raw = b"/" + b"".join(random_.choices(parts, k=random_.randrange(12)))
        path, kind, sent = kind_of(raw)
        assert unquote_to_bytes(sent).decode("latin-1") == path
        assert kind_of(sent) == (path, kind, sent), "and is decided on alike by the next balancer"


@pytest.mark.parametrize("raw", [b"/v1/loads%0A", b"/v1/responses/resp_1/cancel%0a", b"/v1/models%00", b"/v1/x%7f"])
def test_a_path_with_a_control_character_is_not_served(raw: bytes) -> None:
    assert kind_of(raw)[1] is PathKind.ADMIN
