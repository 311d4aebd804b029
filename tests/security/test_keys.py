"""API keys: who gets in, who does not, and what either of them learns."""

import asyncio
import hashlib
import os
import re
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from balancer.__main__ import config_from, parse
from balancer.errors import ConfigError, ServeError
from balancer.relay.auth import Keys, bears, read_keys
from tests.lab.replica import LabReplica
from tests.support.client import CHAT, chat, request
from tests.support.until import until
from tests.wire.running import each, on_uvloop, serving

ALICE, BOB = "sk-alice-0123456789", "sk-bob-9876543210"


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# who may come in\nalice:{hashed(ALICE)} max_in_flight=1\n\n{BOB}\n")
    return path


def bearing(key: str) -> tuple[tuple[str, str], ...]:
    return (("Authorization", f"Bearer {key}"),)


def guarded(keys: Path, *replicas: LabReplica, settings: dict[str, Any] | None = None, **config: Any) -> Any:
    return serving(*replicas, config={"api_keys": keys, **config}, **(settings or {}))


WRONG = {
    "none": (),
    "empty": (("Authorization", ""),),
    "no token": (("Authorization", "Bearer"),),
    "an empty token": (("Authorization", "Bearer   "),),
    "another scheme": (("Authorization", f"Basic {BOB}"),),
    "no scheme": (("Authorization", BOB),),
    "a beginning of a key": bearing(BOB[:-1]),
    "a key and more": bearing(BOB + "0"),
    "the digest of a key": bearing(hashed(ALICE)),
    "the name and the digest": bearing(f"alice:{hashed(ALICE)}"),
    "another case": bearing(BOB.upper()),
    "two keys": bearing(f"{BOB}, {BOB}"),
    "a key in the wrong field": (("X-Auth", BOB),),
    "bytes beyond ASCII": bearing("schlüssel\xff"),
    "a long one": bearing("x" * 60000),
}


@pytest.mark.parametrize("fields", **each(WRONG))
@on_uvloop
async def test_without_a_right_key_nothing_passes(fields: tuple[tuple[str, str], ...], keys: Path) -> None:
    async with LabReplica() as lab, guarded(keys, lab) as house:
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/server_info"), ("OPTIONS", CHAT)):
            answer = await house.ask(request(method, path, headers=fields), method)
            assert answer.status == 401, path
            assert answer.error["code"] == "invalid_api_key"
            assert answer.header("www-authenticate") == "Bearer"
        assert lab.seen.requests == []


RIGHT = {
    "bearer": bearing(BOB),
    "lower case": (("authorization", f"bearer {BOB}"),),
    "hashed in the file": bearing(ALICE),
    "as Anthropic's clients send it": (("x-api-key", BOB),),
    "both, and bearer counts": (("x-api-key", "nonsense"), *bearing(BOB)),
    "both, and the other counts": (("x-api-key", BOB), *bearing("nonsense")),
    "a proxy's password before it": (("Authorization", "Basic bm9uc2Vuc2U="), ("x-api-key", BOB)),
    "the second of two": (*bearing("nonsense"), *bearing(BOB)),
    "the first of two": (*bearing(BOB), *bearing("nonsense")),
    "the second of two others": (("x-api-key", "nonsense"), ("X-API-Key", BOB)),
}


@pytest.mark.parametrize("fields", **each(RIGHT))
@on_uvloop
async def test_a_right_key_passes_and_goes_no_further(fields: tuple[tuple[str, str], ...], keys: Path) -> None:
    async with LabReplica() as lab, guarded(keys, lab) as house:
        answer = await house.ask(request(body=chat(), headers=fields))
        assert answer.status == 200
        seen = lab.seen.last
        assert seen.header("authorization") is None
        assert seen.header("x-api-key") is None
        assert all(key not in str(seen.headers) for key in (ALICE, BOB, "nonsense"))


@on_uvloop
async def test_the_replicas_own_key_takes_its_place_and_is_never_shown(keys: Path) -> None:
    async with (
        LabReplica(api_key="sk-of-the-replica") as lab,
        guarded(keys, lab, replica_key="sk-of-the-replica") as house,
    ):
        assert (await house.ask(request(body=chat(), headers=bearing(BOB)))).status == 200
        assert lab.seen.last.headers_named("authorization") == ["Bearer sk-of-the-replica"]
        info = await house.ask(request("GET", "/server_info", headers=bearing(BOB)), "GET")
        assert info.status == 200
        assert b"random_seed" in info.body
        assert b"sk-of" not in info.body
        assert "sk-of" not in repr(house.log())


@on_uvloop
async def test_authorization_passes_without_keys() -> None:
    """Without API keys, the client's own Authorization is passed to the replica."""
    async with LabReplica() as lab, serving(lab) as house:
        await house.ask(request(body=chat(), headers=bearing("whatever")))
        assert lab.seen.last.headers_named("authorization") == ["Bearer whatever"]


PASSED_ON = {
    "one": (bearing("a"), "Bearer a"),
    "the other": ((("x-api-key", "b"),), "Bearer b"),
    "both": ((("x-api-key", "b"), *bearing("a")), "Bearer a"),
    "two": ((*bearing("a"), *bearing("c")), "Bearer a"),
    "a password and a key": ((("Authorization", "Basic cDpw"), ("x-api-key", "b")), "Bearer b"),
    "a password": ((("Authorization", "Basic cDpw"),), "Basic cDpw"),
    "nothing in it": ((("Authorization", "Bearer "), ("x-api-key", "b")), "Bearer b"),
}


@pytest.mark.parametrize("row", **each(PASSED_ON))
@on_uvloop
async def test_without_keys_here_a_replica_gets_one_of_them(row: tuple[tuple[tuple[str, str], ...], str]) -> None:
    fields, passed = row
    async with LabReplica() as lab, serving(lab) as house:
        await house.ask(request(body=chat(), headers=fields))
        assert lab.seen.last.headers_named("authorization") == [passed]
        assert lab.seen.last.header("x-api-key") is None


@on_uvloop
async def test_a_key_at_its_limit_gives_way_to_another(keys: Path) -> None:
    async with LabReplica(hang="before_head") as lab, guarded(keys, lab) as house:
        first = await house.client()
        await first.send(request(body=chat(), headers=bearing(ALICE)))
        await lab.seen.until(lambda seen: len(seen.requests) == 1)
        lab.set(hang="")
        assert (await house.ask(request(body=chat(), headers=(*bearing(ALICE), ("x-api-key", "x"))))).status == 429
        assert (await house.ask(request(body=chat(), headers=(*bearing(ALICE), ("x-api-key", BOB))))).status == 200
        first.leave()


@on_uvloop
async def test_health_needs_no_key(keys: Path) -> None:
    async with LabReplica() as lab, guarded(keys, lab) as house:
        for path in ("/health", "/ready"):
            answer = await house.ask(request("GET", path), "GET")
            assert answer.status == 200
            assert b"replica" not in answer.body


@on_uvloop
async def test_a_wrong_key_is_refused_before_the_body_comes(keys: Path) -> None:
    async with LabReplica() as lab, guarded(keys, lab) as house:
        client = await house.client()
        await client.send(request(headers=(*bearing("wrong"), ("Content-Length", str(60 << 20)))))
        answer = await client.answer()
        assert answer.status == 401
        assert answer.is_last
        assert house.balancer.doors.buffered == 0


@on_uvloop
async def test_preflight_needs_no_key(keys: Path) -> None:
    """A CORS preflight needs no key, and the answers say which origins may read them."""
    origin = ("Origin", "https://app.example")
    settings = {"cors_origins": ("https://app.example",)}
    async with LabReplica() as lab, guarded(keys, lab, settings=settings) as house:
        asked = (origin, ("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", "authorization"))
        answer = await house.ask(request("OPTIONS", CHAT, headers=asked), "OPTIONS")
        assert answer.status == 204
        assert answer.header("access-control-allow-headers") == "authorization"
        refused = await house.ask(request(headers=(origin,)))
        assert refused.status == 401
        assert refused.header("access-control-allow-origin") == "https://app.example"
        other = await house.ask(
            request("OPTIONS", CHAT, headers=(("Origin", "https://evil.example"), *asked[1:])), "OPTIONS"
        )
        assert other.status == 401
        assert other.header("access-control-allow-origin") is None


# A key's limit


@on_uvloop
async def test_a_key_has_no_more_requests_going_than_it_may(keys: Path) -> None:
    async with LabReplica(hang="before_head") as lab, guarded(keys, lab) as house:
        first = await house.client()
        await first.send(request(body=chat(), headers=bearing(ALICE)))
        await lab.seen.until(lambda seen: len(seen.requests) == 1)
        # Refused at the head: of this body, nothing is waited for.
        answer = await house.ask(request(headers=(*bearing(ALICE), ("Content-Length", "1000000"))))
        assert answer.status == 429
        assert answer.error["code"] == "key_at_limit"
        assert answer.header("retry-after") == "1"
        lab.set(hang="")
        assert (await house.ask(request(body=chat(), headers=bearing(BOB)))).status == 200, "another key has its own"
        first.leave()
        await house.at_rest()
        assert (await house.ask(request(body=chat(), headers=bearing(ALICE)))).status == 200


@on_uvloop
async def test_heads_that_come_together_do_not_outwit_the_limit(keys: Path) -> None:
    async with LabReplica(head_delay=0.2) as lab, guarded(keys, lab) as house:
        body = chat()
        clients = [await house.client() for _ in range(5)]
        for client in clients:
            await client.send(request(body=body, headers=bearing(ALICE))[: -len(body)])
        await until(lambda: len(house.balancer.doors.connections) == 5)
        await asyncio.sleep(0.05)  # all heads are through the door, no body is
        for client in clients:
            await client.send(body)
        answers = [await client.answer() for client in clients]
        assert sorted(answer.status for answer in answers) == [200, 429, 429, 429, 429]
        assert len(lab.seen.requests) == 1


@on_uvloop
async def test_no_way_to_end_leaves_a_place_taken(keys: Path) -> None:
    async with LabReplica() as lab, guarded(keys, lab) as house:
        (alice,) = [key for key in house.balancer.keys or () if key.name == "alice"]
        ends: tuple[dict[str, Any], ...] = ({}, {"status": 500}, {"cut": "before_head"}, {"cut": "after_tokens"})
        for knobs in ends:
            lab.next(1, **knobs)
            await house.ask(request(body=chat(stream=True), headers=bearing(ALICE)))
            await until(lambda: alice.in_flight == 0)
        client = await house.client()
        await client.send(request(headers=(*bearing(ALICE), ("Content-Length", "100"))) + b"half a b")
        client.leave("reset")
        await until(lambda: not house.balancer.doors.connections)
        assert alice.in_flight == 0


# The file


def rewrite(keys: Path, text: str) -> None:
    keys.write_text(text)


def move_in(keys: Path, text: str) -> None:
    other = keys.with_name("other")
    other.write_text(text)
    other.replace(keys)


def remove(keys: Path) -> None:
    keys.unlink()


@on_uvloop
async def test_a_mounted_file_that_was_replaced_outside_lets_nobody_in(keys: Path) -> None:
    # A file by its inode, whatever has its name since: what a container sees of a file that is mounted into it.
    with keys.open() as mounted:
        inside = Path(f"/proc/{os.getpid()}/fd/{mounted.fileno()}")
        async with LabReplica() as lab, guarded(inside, lab) as house:
            assert (await house.ask(request(body=chat(), headers=bearing(BOB)))).status == 200
            move_in(keys, f"alice:{hashed(ALICE)}\n")
            await until(lambda: repr(house.balancer.keys) == "<Keys >")
            for key in (ALICE, BOB):
                assert (await house.ask(request(body=chat(), headers=bearing(key)))).status == 401
            (said,) = house.complaints
            house.complaints.clear()
    assert "mount the folder it lies in rather than the file" in said


@on_uvloop
async def test_the_file_is_taken_up_when_it_changes(keys: Path) -> None:
    async with LabReplica() as lab, guarded(keys, lab) as house:

        async def status(key: str) -> int:
            return (await house.ask(request(body=chat(), headers=bearing(key)))).status

        assert [await status(ALICE), await status("sk-new")] == [200, 401]
        rewrite(keys, f"carol:{hashed('sk-new')}\n")
        await until(lambda: repr(house.balancer.keys) == "<Keys carol>")
        assert [await status(ALICE), await status("sk-new")] == [401, 200]
        # As an editor, or Kubernetes, does it: another file moved into its place.
        move_in(keys, f"{ALICE}\n")
        await until(lambda: repr(house.balancer.keys) == "<Keys line-1>")
        assert [await status(ALICE), await status("sk-new")] == [200, 401]


@on_uvloop
async def test_a_mistake_in_the_file_leaves_the_keys_as_they_were(keys: Path) -> None:
    async with LabReplica() as lab, guarded(keys, lab) as house:
        for text in ("not a key at all, and a secret\n", "", "# nobody\n"):
            rewrite(keys, text)
            await until(lambda: house.complaints)
            (said,) = house.complaints
            assert str(keys) in said
            assert "the keys stay as they were" in said
            assert "a secret" not in said
            house.complaints.clear()
        remove(keys)
        await until(lambda: house.complaints)
        house.complaints.clear()
        assert (await house.ask(request(body=chat(), headers=bearing(ALICE)))).status == 200


@on_uvloop
async def test_a_request_of_a_key_that_is_taken_away_is_finished(keys: Path) -> None:
    async with LabReplica(token_interval=0.1) as lab, guarded(keys, lab) as house:
        client = await house.client()
        await client.send(request(body=chat(6, stream=True), headers=bearing(ALICE)))
        await client.until(b"data:")
        rewrite(keys, f"{BOB}\n")
        await until(lambda: repr(house.balancer.keys) == "<Keys line-1>")
        assert (await client.until(b"[DONE]")).count(b"data:") >= 6


BAD = {
    "nothing": ("", "no key in it"),
    "comments only": ("# x\n\n", "no key in it"),
    "a digest too short": ("alice:abc123\n", "line 1"),
    "a plain key with a name": (f"alice:{ALICE}\n", "line 1"),
    "a bad option": (f"{ALICE}\n{BOB} limit=3\n", "line 2: after the key only max_in_flight=N"),
    "a limit of nothing": (f"{ALICE} max_in_flight=0\n", "line 1"),
    "a name with room for tricks": (f'a"b:{hashed(ALICE)}\n', "line 1"),
    "beyond ASCII": ("schlüssel\n", "line 1"),
    "the same key again": (
        f"{ALICE}\nalice:{hashed(ALICE)}\n",
        "line 2: a key or a name stands there that came before",
    ),
    "the same name again": (f"a:{hashed(ALICE)}\na:{hashed(BOB)}\n", "line 2"),
}


@pytest.mark.parametrize("row", **each(BAD))
def test_bad_key_file(row: tuple[str, str], tmp_path: Path) -> None:
    """A bad key file is refused with the line number, and its content is never shown."""
    text, said = row
    (path := tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError) as refusal:
        read_keys(path)
    assert said in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert all(secret not in str(refusal.value) for secret in (ALICE, BOB, hashed(ALICE), "schl"))
    path.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        read_keys(path)


def test_key_file_of_windows(tmp_path: Path) -> None:
    """A byte order mark and Windows line ends are not part of a key."""
    (path := tmp_path / "keys").write_bytes(f"\ufeff{ALICE}\r\nbob:{hashed(BOB)}\r\n".encode())
    assert {key.digest for key in read_keys(path).values()} == {
        hashlib.sha256(key.encode()).digest() for key in (ALICE, BOB)
    }
    for flag, name in (("--admin-key", "admin_key"), ("--replica-key", "replica_key")):
        path.write_bytes(f"\ufeff{ALICE}\r\n".encode())
        assert getattr(config_from(parse([flag, str(path)])), name) == ALICE
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match=f"{flag} {path}:1: not UTF-8 text"):
            config_from(parse([flag, str(path)]))


# What is learned by guessing


def test_a_guess_takes_as_long_however_near_it_is(tmp_path: Path) -> None:
    real = "sk-" + "a" * 45
    (path := tmp_path / "keys").write_text(real + "\n" + "\n".join(f"sk-{n:045}" for n in range(500)) + "\n")
    known = Keys(path)
    far, near = b"Bearer zz-" + b"b" * 45, b"Bearer " + real[:-1].encode() + b"b"

    def guess(authorization: bytes) -> float:
        start = time.perf_counter()
        for _ in range(200):
            try:
                known.admit(authorization)
            except ServeError:
                continue
            raise AssertionError("that is no key")
        return time.perf_counter() - start

    # Taken in turns, and the least of each counts, so that a busy machine disturbs both alike.
    pairs = [(guess(far), guess(near)) for _ in range(60)]
    quickest_far, quickest_near = (min(times) for times in zip(*pairs, strict=True))
    assert quickest_near == pytest.approx(quickest_far, rel=0.1)
    ratio = statistics.median(near / far for far, near in pairs)
    assert 0.9 < ratio < 1.1


def test_the_admin_key_is_compared_whole() -> None:
    assert bears(b"Bearer open sesame", "open sesame")
    assert bears(b"bearer  open sesame ", "open sesame")
    for wrong in (b"", b"Bearer ", b"Bearer open", b"Bearer open sesame!", b"Basic open sesame"):
        assert not bears(wrong, "open sesame")
        assert not bears(wrong, None)
    assert not bears(b"Bearer None", None)


# SGLang's own admin paths


@on_uvloop
async def test_admin_paths_want_both_the_setting_and_the_admin_key(keys: Path) -> None:
    async with LabReplica() as lab:
        for allowed, key, status in (
            (False, "the-admin-key", 404),
            (True, BOB, 404),
            (True, "the-admin-kez", 404),
            (True, "the-admin-key", 200),
        ):
            settings = {"admin_paths": allowed}
            async with guarded(keys, lab, settings=settings, admin_key="the-admin-key", replica_key="r") as house:
                answer = await house.ask(request(path="/flush_cache", body=b"", headers=bearing(key)))
                assert answer.status == status, (allowed, key)
                assert len(lab.seen.requests) == (status == 200)
        assert lab.seen.last.headers_named("authorization") == ["Bearer r"]


@on_uvloop
async def test_admin_paths_stay_shut_where_there_is_no_admin_key() -> None:
    async with LabReplica() as lab, serving(lab, admin_paths=True) as house:
        for fields in ((), bearing(""), bearing("None")):
            assert (await house.ask(request(path="/flush_cache", body=b"", headers=fields))).status == 404
        assert lab.seen.requests == []


@on_uvloop
async def test_the_admin_key_is_no_api_key(keys: Path) -> None:
    async with LabReplica() as lab, guarded(keys, lab, admin_key="the-admin-key") as house:
        assert (await house.ask(request(body=chat(), headers=bearing("the-admin-key")))).status == 401


# The log


@on_uvloop
async def test_the_log_has_the_keys_name_and_nothing_of_the_key(keys: Path) -> None:
    async with LabReplica() as lab, guarded(keys, lab) as house:
        await house.ask(request(body=chat(), headers=bearing(ALICE)))
        await house.ask(request(path=CHAT + f"?key={BOB}", body=chat(), headers=bearing(BOB)))
        await house.ask(request(body=chat(), headers=bearing("sk-wrong-1")))
        lines = await house.logged(3)
        assert [line.get("key") for line in lines] == ["alice", "line-4", None]
        assert not re.search("sk-|" + hashed(ALICE)[:16], repr(lines))


def test_a_key_that_comes_back_still_has_its_requests(keys: Path) -> None:
    """Taken out of the file and put back while a request is in progress, it has no second set of places."""
    text = keys.read_text()
    known = Keys(keys)
    known.admit(f"Bearer {ALICE}".encode()).in_flight += 1
    keys.write_text(BOB)
    assert known.reload()
    keys.write_text(text)
    assert known.reload()
    with pytest.raises(ServeError, match="1 requests in flight"):
        known.admit(f"Bearer {ALICE}".encode())


def test_a_key_that_moves_up_a_line_is_no_other(keys: Path) -> None:
    """One without a name is called by its line, but what is kept for it is that key's alone; a name may be rotated."""
    third = "sk-carol-5555555555"
    keys.write_text(f"{ALICE}\n{BOB}\ncarol:{hashed(third)}\n")
    known = Keys(keys)
    alice, bob, carol = (known.admit(f"Bearer {key}".encode()) for key in (ALICE, BOB, third))
    assert (alice.name, bob.name) == ("line-1", "line-2")
    before, carols = (alice.issue, bob.issue), carol.issue
    keys.write_text(f"{BOB}\ncarol:{hashed('another secret')}\n")
    assert known.reload()
    bob = known.admit(f"Bearer {BOB}".encode())
    assert (bob.name, bob.issue) == ("line-1", before[1])
    assert bob.issue != before[0]
    assert known.admit(b"Bearer another secret").issue == carols
