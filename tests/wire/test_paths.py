"""Which paths reach a replica, in any spelling, and which the balancer answers by itself."""

from collections.abc import Iterator

import orjson
import pytest

from tests.lab.replica import LabReplica
from tests.support.client import chat, request
from tests.support.until import until
from tests.wire.running import House, in_house, kept, on_uvloop, serving

SERVED = [
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/responses", "/v1/rerank", "/v1/score", "/v1/classify", "/v1/decisions", "/v1/models", "/v1/models/org%2Fname",
    "/v1/tokenize", "/v1/audio/transcriptions", "/v1/images/edits",
    "/generate", "/classify", "/encode", "/rerank", "/score", "/tokenize", "/detokenize", "/model_info",
    "/get_model_info", "/v1/models/x%2Fy?a=%2F&b=//../c",
    "/v1/models/%20x", "/v1/models?key=flush_cache", "/v1/models/a;b=c", "/v1/models/~x", "/v1/models/%C3%A4",
]  # fmt: skip

# What OpenAI keeps for its clients, and no replica does.
KEPT = [
    "/v1/files", "/v1/files/file-1/content", "/v1/uploads", "/v1/batches", "/v1/batches/b/cancel", "/v1/conversations",
    "/v1/conversations/c/items", "/v1/assistants", "/v1/threads/t/runs", "/v1/vector_stores", "/v1/fine_tuning/jobs",
    "/v1/responses/abc", "/v1/responses/abc/cancel", "/v1/responses/abc/input_items",
]  # fmt: skip

# Every route of SGLang's that is not public (sglang.srt.entrypoints.http_server), and some that do not exist.
ADMIN = [
    "/flush_cache", "/abort_request", "/start_profile", "/stop_profile", "/update_weights_from_disk", "/metrics",
    "/update_weights_from_tensor", "/update_weights_from_distributed", "/init_weights_update_group",
    "/get_weights_by_name", "/release_memory_occupation", "/resume_memory_occupation", "/slow_down",
    "/configure_logging", "/load_lora_adapter", "/unload_lora_adapter", "/open_session", "/close_session",
    "/pause_generation", "/continue_generation", "/set_internal_state", "/get_load", "/health_generate",
    "/start_expert_distribution_record", "/v1/loads", "/", "/docs",
    "/openapi.json", "/v1", "/v2/models", "/lab/knobs", "/v1/whatever",
    "/v1/load_lora_adapter", "/v1/chat", "/v1/filesystem",
]  # fmt: skip

SPELLINGS = [
    "//flush_cache", "///flush_cache", "/./flush_cache", "/flush_cache/", "/flush_cache//", "/v1/../flush_cache",
    "/v1/models/../../flush_cache", "/%66lush_cache", "/%66%6C%75%73%68%5f%63%61%63%68%65",
    "/v1/%2e%2e/flush_cache", "/v1/%2E./flush_cache", "/v1/..%2fflush_cache", "/v1%2f..%2fflush_cache",
    "/%2e/flush_cache", "/v1\\..\\flush_cache", "/v1/..\\flush_cache", "/v1/..%5cflush_cache", "\\flush_cache",
    "/flush_cache?/v1/models", "/flush_cache%3F/v1/models", "/flush_cache%23/v1/models", "/flush_cache;/v1/models",
    "/FLUSH_CACHE", "/Flush_Cache", "/flush_cache%00", "/flush_cache%20", "/flush_cache%0d%0a", "/%2566lush_cache",
    "//wire.test/flush_cache", "http://wire.test/flush_cache", "HTTP://wire.test//flush_cache",
    "http://wire.test/v1/../flush_cache", "http://wire.test:80/%66lush_cache", "https://user@wire.test/flush_cache",
    "http://wire.test", "http://wire.test?/v1", "/v1/loads/", "/v1/%6Coads", "/v1//loads", "/v1/./loads",
    "/v1/loads?include=core", "/v1/loads/x", "/V1/loads",
]  # fmt: skip


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with kept({"api_key": "s3cret"}, config={"replica_key": "s3cret"}) as house:
        yield house


@pytest.mark.parametrize("target", SERVED)
@in_house
async def test_a_serving_path_is_relayed_as_it_was_spelled(house: House, target: str) -> None:
    client = await house.client()
    await client.send(request("OPTIONS", target))
    assert (await client.answer("OPTIONS")).header("x-replica-id") == "a"
    seen = house.replicas[0].seen
    assert target in (seen.probes[-1].target, seen.requests[-1].target if seen.requests else "")


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("/v1//score", "/v1/score"),
        ("//v1/score", "/v1/score"),
        ("/v1/score/", "/v1/score"),
        ("/v1/score//?a=//b/", "/v1/score?a=//b/"),
        ("/v1/./score/x/..", "/v1/score"),
        ("/v1/%73core", "/v1/score"),
        ("/v1/%2e%2e/v1/%73core", "/v1/score"),
        ("/v1/models/%25%3f%20//x", "/v1/models/%25%3F%20/x"),
        ("/v1\\score", "/v1/score"),
        ("http://wire.test//v1/score", "/v1/score"),
    ],
)
@in_house
async def test_what_a_replica_gets_is_what_was_decided_on(house: House, target: str, sent: str) -> None:
    assert (await house.ask(request("PUT", target), "PUT")).status == 200
    assert house.replicas[0].seen.last.target == sent


@pytest.mark.parametrize("target", ["http://wire.test/v1/score?a=/b", "HTTPS://wire.test:1/v1/score?a=/b"])
@in_house
async def test_an_absolute_target_is_relayed_as_its_path(house: House, target: str) -> None:
    assert (await house.ask(request("GET", target), "GET")).status == 200
    assert house.replicas[0].seen.last.target == "/v1/score?a=/b"


@pytest.mark.parametrize("target", ADMIN + SPELLINGS)
@in_house
async def test_any_other_path_is_404_and_reaches_no_replica(house: House, target: str) -> None:
    probes = house.replicas[0].seen.connections_accepted, len(house.replicas[0].seen.probes)
    for method in ("GET", "POST"):
        answer = await house.ask(request(method, target), method)
        if answer.status != 400:  # an invalid target
            assert (answer.status, answer.error["code"]) == (404, "not_found")
            assert "Serving paths are" in answer.error["message"]
    seen = house.replicas[0].seen
    assert seen.requests == []
    assert all(probe.header("x-forwarded-for") is None for probe in seen.probes[probes[1] :])


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PROPFIND", "MKCOL", "PURGE"])
@pytest.mark.parametrize("target", ["/v1/models", "wire.test:443", "/flush_cache"])
@in_house
async def test_other_methods_are_405_and_say_which_are_not(house: House, method: str, target: str) -> None:
    answer = await house.ask(request(method, target), method)
    if ":" in target and method != "CONNECT":
        assert answer.status == 400
        return
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert answer.header("allow") == "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
    assert house.replicas[0].seen.requests == []


@pytest.mark.parametrize("target", [*KEPT, "/v1/responses/abc/", "/v1/responses//abc", "/v1/./files"])
@in_house
async def test_what_nobody_keeps_is_404_in_the_common_shape(house: House, target: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        answer = await house.ask(request(method, target), method)
        assert (answer.status, answer.error["code"]) == (404, "not_found")
        assert "nothing is kept" in answer.error["message"]
    assert house.replicas[0].seen.requests == []


@on_uvloop
async def test_without_a_replica_some_paths_are_answered_at_once() -> None:
    async with LabReplica() as a, serving(a) as house:
        await until(lambda: house.balancer.service.has_told_models)
        a.set(ready=503)
        await house.ready(0)
        for path in ("/v1/whatever", "/v1/files"):
            assert (await house.ask(request("POST", path, b"{}"))).status == 404
        answer = await house.ask(request("GET", "/v1/models"), "GET")
        assert answer.status == 200
        assert [model["id"] for model in orjson.loads(answer.body)["data"]] == [a.knobs.served_model, "groundserve"]
        assert [line["path"] for line in await house.logged(3)] == ["/v1/whatever", "/v1/files", "/v1/models"]
        assert all(line["duration"] < 1.5 for line in house.log())


# The balancer's own


@pytest.mark.parametrize("target", ["/health", "/ready", "/health/", "//ready", "/%72eady", "/health?x=y"])
@in_house
async def test_health_and_ready_are_the_balancers_own(house: House, target: str) -> None:
    answer = await house.ask(request("GET", target), "GET")
    assert (answer.status, orjson.loads(answer.body)) == (200, {"status": "ok", "ready": 1})
    head = await house.ask(request("HEAD", target), "HEAD")
    assert (head.status, head.header("content-length")) == (200, answer.header("content-length"))
    assert answer.header("x-request-id")


@pytest.mark.parametrize("method", ["POST", "DELETE"])
@pytest.mark.parametrize("target", ["/health", "/ready", "/server_info"])
@in_house
async def test_own_paths_refuse_other_methods(house: House, target: str, method: str) -> None:
    """The balancer's own paths refuse other methods with an error in the common format."""
    answer = await house.ask(request(method, target), method)
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")


@pytest.mark.parametrize(
    "target", ["/server_info", "/get_server_info", "/server_info/", "//server_info", "/%73erver_info"]
)
@in_house
async def test_server_info_is_shown_without_its_secrets(house: House, target: str) -> None:
    answer = await house.ask(request("GET", target), "GET")
    assert (answer.status, answer.header("x-replica-id")) == (200, "a")
    info = orjson.loads(answer.body)
    assert info["max_total_num_tokens"] == 65536
    assert b"s3cret" not in answer.body
    assert "api_key" not in info
    assert "api_key" not in info["internal_states"][0]


@on_uvloop
async def test_health_and_ready_are_503_while_nothing_could_be_served() -> None:
    async with LabReplica(ready=503) as a, serving(a, ready=0) as house:
        for path in ("/health", "/ready", "/server_info"):
            answer = await house.ask(request("GET", path), "GET")
            assert (answer.status, answer.error["code"], answer.header("retry-after")) == (503, "no_replica_ready", "5")


@pytest.mark.parametrize(("key", "status"), [("a-key", 200), ("another", 404), ("", 404)])
@on_uvloop
async def test_admin_paths_need_the_admin_key(key: str, status: int) -> None:
    """SGLang's admin paths need the admin key, if the service allows them at all."""
    async with LabReplica() as a, serving(a, admin_paths=True, config={"admin_key": "a-key"}) as house:
        fields = (("Authorization", f"Bearer {key}"),) if key else ()
        assert (await house.ask(request("POST", "/flush_cache", b"", fields))).status == status
        assert len(a.seen.requests) == (status == 200)
        if status == 200:
            assert a.seen.last.header("authorization") is None, "the key is not the replica's to know"


@in_house
async def test_a_generating_path_is_counted_by_its_normalised_form(house: House) -> None:
    assert (await house.ask(request("POST", "/v1//chat/./completions", chat()))).status == 200


@on_uvloop
async def test_a_base_path_is_taken_off() -> None:
    async with LabReplica() as a, serving(a, base_path="/llm") as house:
        for path in ("/llm/v1/chat/completions", "/v1/chat/completions", "/llm//v1/chat/./completions"):
            assert (await house.ask(request(path=path, body=chat()))).status == 200
        assert {seen.target for seen in a.seen.requests} == {"/v1/chat/completions"}
        assert (await house.ask(request("GET", "/llm/health?x=y"), "GET")).status == 200
        for path in ("/llmv1/chat/completions", "/llm/flush_cache", "/llm/../flush_cache", "/llm/llm/health", "/llm"):
            assert (await house.ask(request("GET", path), "GET")).status == 404, path
        assert len(a.seen.requests) == 3


@on_uvloop
async def test_the_paths_of_ollama_are_passed_on_and_counted() -> None:
    """SGLang serves them itself; of a stream it tells no counts."""
    whole = b'{"model":"m","done":true,"prompt_eval_count":9,"eval_count":4}'
    async with LabReplica(body=whole.decode()) as a, serving(a) as house:
        assert (await house.ask(request("POST", "/api/chat", b'{"model":"m","stream":false}'))).body == whole
        assert (await house.ask(request("POST", "/api/generate", b"{}"))).status == 200
        assert a.seen.last.header("content-type") == "application/json", (
            "as Ollama takes it, whose examples say nothing"
        )
        assert (await house.ask(request("GET", "/api/tags"), "GET")).status == 200
        assert (await house.ask(request("POST", "/api/show", b"{}"))).status == 200
        version = await house.ask(request("GET", "/api/version"), "GET")
        assert orjson.loads(version.body)["version"]
        missing = await house.ask(request("POST", "/api/pull", b"{}"))
        assert missing.status == 404
        assert "is not served here" in orjson.loads(missing.body)["error"]
        assert [seen.target for seen in a.seen.requests] == ["/api/chat", "/api/generate", "/api/tags", "/api/show"]
        lines = await house.logged(6)
        assert [(line["path"], line.get("completion_tokens")) for line in lines][:2] == [
            ("/api/chat", 4),
            ("/api/generate", 4),
        ]
