"""Path tricks: no spelling gets to SGLang's admin routes, and none gets past the keys."""

from pathlib import Path

import pytest

from tests.lab.replica import LabReplica
from tests.support.client import CHAT, chat, request
from tests.wire.running import each, on_uvloop, serving

# SGLang 0.5.23's routes that change it, or show what is not the client's.
ADMIN = [
    "/flush_cache",
    "/start_profile",
    "/stop_profile",
    "/update_weights_from_disk",
    "/update_weights_from_tensor",
    "/update_weights_from_distributed",
    "/init_weights_update_group",
    "/get_weights_by_name",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/abort_request",
    "/pause_generation",
    "/continue_generation",
    "/load_lora_adapter",
    "/unload_lora_adapter",
    "/open_session",
    "/close_session",
    "/configure_logging",
    "/set_internal_state",
    "/get_internal_state",
    "/freeze_gc",
    "/slow_down",
    "/dump_expert_distribution_record",
    "/get_load",
    "/v1/loads",
    "/metrics",
    "/docs",
    "/openapi.json",
]

SPELLINGS = {
    "as it is": "{}",
    "with a slash": "{}/",
    "with two": "/{}",
    "with a query": "{}?a=/v1/models",
    "with a fragment": "{}#/v1/models",
    "with a parameter": "{};x=/v1/models",
    "under v1 and up": "/v1/..{}",
    "under v1 and up, encoded": "/v1/%2e%2e{}",
    "under v1 and up, slashes encoded": "/v1%2f..%2f{}",
    "under a model and up": "/v1/models/../..{}",
    "with dots": "/./././{}",
    "with a backslash": "/v1\\..{}",
    "with an encoded backslash": "/v1/%5c..%5c..{}",
    "in upper case": "{upper}",
    "with a letter encoded": "/%{hex}{rest}",
    "encoded twice": "/%25{hex}{rest}",
    "with a NUL": "{}%00",
    "with a NUL before": "/v1/models%00/..{}",
    "with a line end": "{}%0d%0aX:%20y",
    "with a line feed last": "{}%0a",
    "in absolute form": "http://replica{}",
    "in absolute form of another scheme": "HTTPS://replica{}",
    "with an empty authority": "http://{}",
    "without a slash": "{bare}",
    "with spaces encoded": "%20{}",
    "with overlong dots": "/v1/%c0%ae%c0%ae{}",
}


@pytest.mark.parametrize("spelling", **each(SPELLINGS))
@on_uvloop
async def test_no_spelling_gets_to_an_admin_route(spelling: str) -> None:
    async with LabReplica() as lab, serving(lab) as house:
        for path in ADMIN:
            forms = {"upper": path.upper(), "hex": f"{ord(path[1]):02x}", "rest": path[2:], "bare": path[1:]}
            target = spelling.format(path, **forms)
            answer = await house.ask(request("GET", target), "GET")
            reached = [seen.target for seen in lab.seen.requests]
            # What is passed on goes as it came, and SGLang, which takes no such detours, has no route of that name.
            assert path not in [target.partition("?")[0].rstrip("/") for target in reached], target
            if answer.status not in (400, 404):
                assert reached, target
                assert reached[-1].startswith("/v1"), target
            lab.seen.requests.clear()


@pytest.mark.parametrize("spelling", **each(SPELLINGS))
@on_uvloop
async def test_no_spelling_gets_past_the_keys(spelling: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-right\n")
    async with LabReplica() as lab, serving(lab, config={"api_keys": tmp_path / "keys"}) as house:
        for path in (CHAT, "/generate", "/server_info", "/health/../v1/models", "/ready/%2e%2e/generate"):
            forms = {"upper": path.upper(), "hex": f"{ord(path[1]):02x}", "rest": path[2:], "bare": path[1:]}
            target = spelling.format(path, **forms)
            answer = await house.ask(request("POST", target, body=chat()))
            assert answer.status in (400, 401, 404, 405), target
        assert lab.seen.requests == []


@on_uvloop
async def test_connect_trace_and_upgrades_lead_nowhere() -> None:
    async with LabReplica() as lab, serving(lab) as house:
        for method in ("CONNECT", "TRACE"):
            target = "replica:8000" if method == "CONNECT" else CHAT
            answer = await house.ask(request(method, target), method)
            assert answer.status in (400, 405), method
        upgrade = (("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Key", "x"))
        answer = await house.ask(request("GET", "/v1/models", headers=upgrade), "GET")
        assert answer.status == 200
        assert lab.seen.requests == []
        assert lab.seen.probes[-1].header("upgrade") is None
