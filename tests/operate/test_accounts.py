"""`groundserve keys` and `groundserve usage`, as a person types them, against a service that is up here."""

import json
import shlex
from dataclasses import replace

import httpx
import pytest

from balancer.errors import ConfigError
from balancer.operate.commands.accounts import Wish
from balancer.operate.state import control_socket
from tests.operate.command_line import Groundserve


def test_keys_and_usage_of_a_service_that_is_up(groundserve: Groundserve) -> None:
    groundserve.up(groundserve.service("lab", replicas=1)).until_up()
    endpoint = groundserve.status("lab")["service"]["endpoint"]
    said = groundserve("keys", "add", "alice", "--tokens-per-minute", "200k", "--models", "*", "--priority", "bulk")
    key = said.splitlines()[0]
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "stream": True}

    def ask(key: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{endpoint}/v1/chat/completions", json=body, headers=headers, timeout=30, trust_env=False)

    assert ask(key).headers["x-ratelimit-limit-tokens"] == "200000"
    assert ask("sk-wrong").status_code == 401
    (row,) = json.loads(groundserve("usage", "--by", "key", "--json"))
    assert (row["key"], row["requests"], row["completion_tokens"]) == ("alice", 1, 5)
    assert groundserve("usage", "--by", "key", "--csv").splitlines()[1].startswith("alice,1,0,")
    assert "alice  1" in groundserve("usage", "--by", "key", "--since", "24h")
    (shown,) = json.loads(groundserve("keys", "list", "--json"))
    assert (shown["tokens_per_minute"], shown["priority"], shown["models"]) == (200_000, "bulk", ["*"])
    groundserve("keys", "change", "alice", "--tokens-per-minute", "400k", "--requests-per-day", "10k")
    assert ask(key).headers["x-ratelimit-limit-tokens"] == "400000"
    (shown,) = json.loads(groundserve("keys", "list", "--json"))
    assert (shown["requests_per_day"], shown["priority"], shown["models"]) == (10_000, "bulk", ["*"])
    groundserve("keys", "change", "alice", "--tokens-per-minute", "none", "--requests-per-day", "none")
    assert "x-ratelimit-limit-tokens" not in ask(key).headers
    assert "say what to change" in groundserve("keys", "change", "alice", code=1)
    assert "there is no key bob in use" in groundserve("keys", "change", "bob", "--max-in-flight", "1", code=1)
    fresh = groundserve("keys", "rotate", "alice").splitlines()[0]
    assert (ask(key).status_code, ask(fresh).status_code) == (401, 200)
    groundserve("keys", "revoke", "alice")
    assert ask(fresh).status_code == 401
    assert "revoked" in groundserve("keys", "list")
    assert "there is no key alice in use" in groundserve("keys", "revoke", "alice", code=1)
    assert "no name for a key" in groundserve("keys", "add", "a/rotate", code=1)
    assert "usage is not kept by 'week'" in groundserve("usage", "--by", "week", code=1)
    assert "since: 'tomorrow' is neither an age" in groundserve("usage", "--since", "tomorrow", code=1)
    assert "alice" in groundserve("usage", "--since", "90s")
    socket = groundserve.folder / "state/groundserve/lab/control.sock"
    elsewhere = Groundserve(groundserve.folder / "elsewhere")  # where nothing is up, as beside Docker Compose
    elsewhere.environ["GROUNDSERVE_ADMIN"] = f"http://{control_socket.ask(socket, {'do': 'balancer'})['admin']}"
    assert "admin key" in elsewhere("usage", code=1)
    key_file = groundserve("status", "lab", "--admin-key").strip()
    assert "alice" in elsewhere("usage", "--admin-key", key_file)
    assert "alice" in elsewhere("keys", "list", "--admin-key", key_file)
    groundserve("down", "lab")
    again = groundserve.up(groundserve.service("lab", replicas=1)).until_up()
    assert "key    groundserve keys add WHOSE -n lab   gives one out; nobody gets in without" in again.text
    example = shlex.split(again.text.partition("try    ")[2].partition("look ")[0])
    assert example[:3] == ["curl", f"{groundserve('status', '--endpoint').strip()}/v1/models", "-H"]
    assert example[3] == "Authorization: Bearer $KEY"


def test_without_a_service_it_says_where_it_looked(groundserve: Groundserve) -> None:
    assert "no admin port answers at http://127.0.0.1:9: set GROUNDSERVE_ADMIN" in groundserve("usage", code=1)
    assert "no service lab is up here" in groundserve("keys", "list", "-n", "lab", code=1)


def test_limits_are_typed_with_k_and_m() -> None:
    terms = Wish(
        max_in_flight="8", requests_per_day="10k", tokens_per_minute="200k", tokens_per_day="5M", models="llava, llama*"
    ).terms()
    assert (terms.max_in_flight, terms.tokens_per_minute, terms.tokens_per_day) == (8, 200_000, 5_000_000)
    assert terms.requests_per_day == 10_000
    assert terms.models == ("llava", "llama*")
    assert Wish(tokens_per_day="none").terms(terms) == replace(terms, tokens_per_day=None)
    assert Wish(models="llava", expires="none").terms(terms) == replace(terms, models=("llava",))
    for text in ("0", "-1", "5 M", "1.5M", "many", ""):
        with pytest.raises(ConfigError, match=r"--tokens-per-day .*: write a number above 0"):
            Wish(tokens_per_day=text).terms()
    with pytest.raises(ConfigError, match="is no date"):
        Wish(expires="soon").terms()
