"""The page in a real browser, with a whole balancer and lab replicas behind it. A JavaScript error fails any test."""

import asyncio
import base64
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from balancer.accounts.store import HOUR, Store
from balancer.app import Balancer
from tests.contract.altered import Altered
from tests.e2e.page.browser import Browser, browser
from tests.e2e.page.pictures import keep, png
from tests.lab.knobs import Knobs
from tests.lab.model import ModelSettings
from tests.lab.replica import LabReplica
from tests.lab.tenant import Seat
from tests.observe.serving import CHAT, chat, client_of, run, serving, stream
from tests.support.until import until

READY = "document.querySelectorAll('#cards .badge.ready').length === arguments[0]"
ANSWERED = "!document.querySelector('[aria-busy]') && document.querySelectorAll('.theirs').length === arguments[0]"


@asynccontextmanager
async def page(
    folder: Path, *replicas: LabReplica, expected: str = "", **config: Any
) -> AsyncIterator[tuple[Balancer, Browser]]:
    """A balancer before `replicas`, and a browser that shows its page: with nothing to complain of but `expected`."""
    async with AsyncExitStack() as stack:
        for replica in replicas:
            await stack.enter_async_context(replica)
        balancer = await stack.enter_async_context(serving(*replicas, **config))
        tab = await stack.enter_async_context(browser(folder / "profile"))
        await tab.open(balancer.admin_endpoint + "/")
        await tab.until("document.body.dataset.live === 'yes'")
        await tab.until(READY, len(replicas))
        yield balancer, tab
        assert [said for said in await tab.complaints() if not expected or expected not in said] == []


def asked(replica: LabReplica) -> dict[str, Any]:
    return dict(json.loads(replica.seen.last.body))


def test_it_shows_the_service_and_its_replicas(tmp_path: Path) -> None:
    async def main() -> None:
        shown = page(tmp_path, LabReplica(), LabReplica(), name="colours")
        async with shown as (balancer, tab), client_of(balancer) as client:
            assert await tab.text("#service-name") == "colours"
            assert await tab.texts("#cards h3") == ["replica-1", "replica-2"]
            facts = await tab.text("#service")
            assert balancer.endpoint in facts
            assert "2 of 2" in facts
            for _ in range(3):
                await client.post(CHAT, json=stream())
            await tab.until("document.querySelectorAll('#rows tr').length >= 3")
            first = (await tab.texts("#rows tr"))[0]
            assert re.search(r"/v1/chat/completions\s+replica-[12]\s+in turn\s+200\s+1\s", first)
            # The lines are there with the first samples, and say in words what they show.
            await tab.until("document.querySelectorAll('.spark path[d*=M]').length >= 5")
            label = await tab.run("return document.querySelector('.card .spark svg').getAttribute('aria-label')")
            assert re.fullmatch(r"Tokens/s: now [\d.,]+, highest in 15 minutes [\d.,]+", label)
            assert await tab.run("return document.title") == "colours: ready"

    run(main())


def test_it_shows_a_new_fact_by_one_line_more(tmp_path: Path) -> None:
    altered = Altered(tmp_path)

    async def main(admin: str) -> None:
        async with browser(tmp_path / "profile") as tab:
            await tab.open(f"{admin}/")
            await tab.until("document.querySelector('.card .about')?.innerText.includes('r7')")

    with altered.balancer() as admin:
        httpx.put(f"{admin}/replicas", json=altered.told(), trust_env=False).raise_for_status()
        run(main(admin))


def test_it_shows_who_had_a_shared_gpu(tmp_path: Path) -> None:
    async def main() -> None:
        seat = Seat(tmp_path / "leases", note="mine")
        seat.directory.mkdir()
        async with page(tmp_path, replica := LabReplica(seat=seat)) as (balancer, tab):
            await tab.until("document.querySelector('#strips .lane path')?.getAttribute('d').includes('M')")
            assert await tab.text("#strips figcaption") == "GPU-a"
            told = {"id": 1, "name": "replica-1", "endpoint": replica.url, "leased": "GPU 3 (L4, GPU-a)"}
            async with client_of(balancer) as client:
                put = await client.put(f"{balancer.admin_endpoint}/replicas", json={"replicas": [told]})
                put.raise_for_status()
            await tab.until("document.querySelector('#strips figcaption').textContent === 'GPU 3 (L4, GPU-a)'")
            label = await tab.run("return document.querySelector('#strips svg').getAttribute('aria-label')")
            assert label.startswith("replica-1 has it now, and had it for ")

    run(main())


def test_requests_with_one_id_are_a_row_each(tmp_path: Path) -> None:
    """Clients choose their ids, and one that asks again may well say the same."""

    async def main() -> None:
        async with page(tmp_path, LabReplica()) as (balancer, tab), client_of(balancer) as client:
            for _ in range(3):
                await client.post(CHAT, json=chat(), headers={"X-Request-Id": "again"})
            rows = "document.querySelectorAll('#rows tr')"
            await tab.until(f"{rows}.length >= 4")  # the page itself asked for the models
            await tab.until(f"parseInt({rows}[0].innerText) >= 3")  # a few states later
            assert len(await tab.texts("#rows tr")) == 4

    run(main())


def test_it_shows_at_once_that_a_replica_died_came_back_or_left(tmp_path: Path) -> None:
    async def main() -> None:
        two = LabReplica()
        async with page(tmp_path, LabReplica(), two) as (balancer, tab):
            two.refuse()
            two.drop_connections()
            await tab.until("document.querySelector('#cards .badge.unavailable')?.innerText === 'NOT_READY'")
            assert "replica-2 is not ready" in await tab.run("return document.getElementById('announcer').innerText")
            assert "1 of 2" in await tab.text("#service")
            await two.accept()
            await tab.until(READY, 2)
            balancer.service.fleet.reconcile([m.listing for m in balancer.service.fleet.members.values() if m.id == 1])
            await tab.until("document.querySelectorAll('.card').length === 1")
            balancer.service.fleet.reconcile([])
            await tab.until("!document.getElementById('no-replicas').hidden")
            two.refuse()  # its second listener is not taken for something left behind

    run(main())


def test_a_chat_streams_and_says_who_answered(tmp_path: Path) -> None:
    async def main() -> None:
        lab = LabReplica(model=ModelSettings(prefill_rate=100_000.0, itl_base=0.02))
        async with page(tmp_path, lab) as (_, tab):
            await tab.until("document.getElementById('model').value === 'lab'")
            await tab.type("#prompt", "A long question that will be cached. " * 8)
            await tab.press("\ue007")  # Enter
            await tab.until("document.querySelector('.theirs p')?.innerText.length > 3")
            assert await tab.run("return document.getElementById('stop').hidden") is False, "it shows while it streams"
            await tab.until(ANSWERED, 1, timeout=30)
            words = await tab.text(".theirs p")
            assert len(words.split()) == 256
            how = await tab.text(".theirs .how")
            assert re.search(
                r"from replica-1 · chosen: in turn · first token after [\d.]+ m?s · \d+ prompt tokens", how
            )
            assert re.search(r"256 tokens in [\d.]+ s", how)
            assert asked(lab)["model"] == "lab"
            # The second turn carries the first one along, so most of it is cached.
            await tab.run("document.getElementById('most').value = 4")
            await tab.type("#prompt", "And now?")
            await tab.click("#send")
            await tab.until(ANSWERED, 2)
            roles = [message["role"] for message in asked(lab)["messages"]]
            assert roles == ["user", "assistant", "user"]
            cached = re.search(r"(\d+) of them cached", (await tab.texts(".theirs .how"))[1])
            assert cached
            assert int(cached[1]) > 50
            await tab.click("#anew")
            assert await tab.texts(".said") == []

    run(main())


def test_images_go_along_whether_chosen_or_dropped(tmp_path: Path) -> None:
    async def main() -> None:
        red, blue = png((200, 30, 30)), png((30, 30, 200))
        (chosen := tmp_path / "red.png").write_bytes(red)
        lab = LabReplica()
        async with page(tmp_path, lab) as (_, tab):
            await tab.type("#files", str(chosen))
            await tab.until("document.querySelectorAll('#pictures img').length === 1")
            await tab.run(
                """
                const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
                const data = new DataTransfer();
                data.items.add(new File([bytes], "blue.png", { type: "image/png" }));
                data.items.add(new File(["no image"], "notes.txt", { type: "text/plain" }));
                const event = new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
                document.getElementById("prompt").dispatchEvent(event);
                """,
                base64.b64encode(blue).decode(),
            )
            await tab.until("document.querySelectorAll('#pictures img').length === 2")
            await tab.until("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
            await tab.type("#prompt", "Which colours?")
            await tab.click("#send")
            await tab.until(ANSWERED, 1)
            *images, text = asked(lab)["messages"][0]["content"]
            sent = [base64.b64decode(image["image_url"]["url"].partition("base64,")[2]) for image in images]
            assert sent == [red, blue]
            assert text == {"type": "text", "text": "Which colours?"}
            assert await tab.run("return document.querySelectorAll('.mine img').length") == 2

    run(main())


def test_errors_are_shown_in_their_own_words(tmp_path: Path) -> None:
    async def main() -> None:
        lab = LabReplica()
        async with page(tmp_path, lab, expected="the server responded with a status of") as (_, tab):

            async def say_and_fail(number: int) -> str:
                await tab.type("#prompt", "hello")
                await tab.click("#send")
                await tab.until(ANSWERED, number)
                return (await tab.texts(".theirs .failure"))[-1]

            lab.next(1, status=400)
            assert await say_and_fail(1) == "what the test asked for"
            lab.next(1, cut="after_tokens", cut_after=2)
            assert "The stream ended early: the replica went away." in await say_and_fail(2)
            lab.refuse()
            lab.drop_connections()
            await tab.until("!document.querySelector('#cards .badge.ready')")
            assert "No replica is ready." in await say_and_fail(3)
            # A question that failed is no part of the conversation.
            await lab.accept()
            await tab.until(READY, 1)
            await tab.type("#prompt", "again")
            await tab.click("#send")
            await tab.until(ANSWERED, 4)
            assert [m["content"] for m in asked(lab)["messages"] if m["role"] == "user"] == ["hello", "again"]
            lab.refuse()

    run(main())


def test_stopping_an_answer_ends_it_at_the_replica(tmp_path: Path) -> None:
    async def main() -> None:
        lab = LabReplica(token_interval=0.05, tokens=200)
        async with page(tmp_path, lab) as (balancer, tab):
            await tab.type("#prompt", "hello")
            await tab.click("#send")
            await tab.until("document.querySelector('.theirs p')?.innerText.length > 3")
            await tab.click("#stop")
            await lab.seen.until(lambda seen: seen.generations_aborted == 1, timeout=2)
            await tab.until("document.querySelector('.theirs .failure')?.innerText === 'Stopped.'")
            await until(lambda: not balancer.service.fleet.members[1].in_flight)

    run(main())


def test_drain_and_undrain_want_the_admin_key(tmp_path: Path) -> None:
    async def main() -> None:
        shown = page(tmp_path, LabReplica(), LabReplica(), admin_key="open sesame", expected="status of 401")
        async with shown as (balancer, tab):
            drain = "[aria-label='Drain replica-2']"
            await tab.click(drain)
            await tab.until("document.getElementById('admin').open")
            await tab.type("#admin-key", "wrong")
            await tab.press("\ue007")
            await tab.until("document.getElementById('admin').open && !document.getElementById('admin-key').value")
            assert not balancer.service.fleet.members[2].draining
            await tab.type("#admin-key", "open sesame")
            await tab.click("#admin button[value=use]")
            await tab.until("document.querySelectorAll('.card .badge')[1].innerText === 'SHUTTING_DOWN'")
            assert balancer.service.fleet.members[2].draining
            # Known now, so it is not asked for again; and nowhere kept but in this page's memory.
            await tab.click("[aria-label='Undrain replica-2']")
            await tab.until(READY, 2)
            assert not balancer.service.fleet.members[2].draining
            kept = await tab.run("return [localStorage.length, sessionStorage.length, document.cookie]")
            assert kept == [0, 0, ""]
            assert "sesame" not in await tab.run("return document.documentElement.outerHTML + location.href")

    run(main())


def test_usage_is_shown_to_who_has_the_admin_key(tmp_path: Path) -> None:
    async def main() -> None:
        shown = page(tmp_path, LabReplica(), admin_key="sesame", state=tmp_path / "state", expected="status of 401")
        async with shown as (balancer, tab), client_of(balancer) as client:
            await client.post(CHAT, json=chat())
            await balancer.accounts.usage(["key"], 0)  # type: ignore[union-attr]
            await tab.click("#show-usage")
            await tab.until("document.getElementById('admin').open")
            assert await tab.texts("#used tr") == []
            await tab.type("#admin-key", "sesame")
            await tab.press("\ue007")
            await tab.until("document.querySelectorAll('#used tr').length === 1")
            assert (await tab.texts("#used tr"))[0].split()[:3] == ["–", "lab", "1"]

    run(main())


def test_usage_is_drawn_day_by_day(tmp_path: Path) -> None:
    """A bar for each day and key, as high as its tokens; the same in words for who does not see it."""

    async def main() -> None:
        now = int(time.time())
        today = datetime.fromtimestamp(now, UTC).date()
        store = Store(tmp_path / "state")
        hour = now // HOUR
        store.write([(hour, "ann", "lab", 4, 0, 300, 100, 0), (hour, "bob", "lab", 1, 0, 90, 10, 0)], {})
        store.write([(hour - 48, "ann", "lab", 1, 0, 150, 50, 0), (hour - 24 * 60, "ann", "lab", 1, 0, 9**9, 1, 0)], {})
        store.close()
        async with page(
            tmp_path, LabReplica(), admin_key="sesame", state=tmp_path / "state", expected="status of 4"
        ) as (_, tab):
            await tab.click("#show-usage")
            await tab.until("document.getElementById('admin').open")
            await tab.type("#admin-key", "sesame")
            await tab.press("\ue007")
            await tab.until("document.querySelectorAll('#chart rect').length === 3")
            read = "[node.getAttribute('class'), +node.getAttribute('height'), +node.getAttribute('x')]"
            bars = await tab.run(f"return [...document.querySelectorAll('#chart rect')].map((node) => {read})")
            (_, before, earlier), (ann, high, x), (bob, low, same) = bars
            assert (ann, bob, x) == ("shade-0", "shade-1", same)
            assert (x - earlier, high, low, before) == (40, 96, 24, 48)
            assert await tab.texts("#legend li") == ["ann", "bob"]
            label = await tab.run("return document.getElementById('chart').getAttribute('aria-label')")
            assert label == f"Tokens a day, last 30 days: 700 in all, most on {today}: 500"
            assert await tab.run("return document.getElementById('chart').getBoundingClientRect().height") > 80

    run(main())


def test_keys_are_issued_rotated_and_revoked(tmp_path: Path) -> None:
    async def main() -> None:
        shown = page(tmp_path, LabReplica(), admin_key="sesame", state=tmp_path / "state", expected="status of 4")
        async with shown as (balancer, tab), client_of(balancer) as client:

            async def status_with(key: str) -> int:
                return (await client.post(CHAT, json=chat(), headers={"Authorization": f"Bearer {key}"})).status_code

            async def secret(said: str) -> str:
                await tab.until("document.getElementById('secret-text').value.startsWith('sk-')")
                assert said in await tab.text("#secret")
                value = str(await tab.run("return document.getElementById('secret-text').value"))
                await tab.click("#secret-seen")
                assert await tab.run("return document.getElementById('secret-text').value") == ""
                return value

            await tab.click("#show-usage")
            await tab.until("document.getElementById('admin').open")
            await tab.type("#admin-key", "sesame")
            await tab.press("\ue007")
            await tab.until("!document.getElementById('keys').hidden")
            assert "No key has been issued" in await tab.text("#keys")
            await tab.click("#issue-box summary")
            await tab.type("#issue [name=name]", "alice")
            await tab.type("#issue [name=requests_per_day]", "50")
            await tab.type("#issue [name=models]", "lab, llama*")
            await tab.click("#issue-it")
            first = await secret("alice")
            assert (await tab.texts("#issued td"))[:10] == [
                *("alice", "in use", "–", "–", "50", "–", "–", "interactive", "lab, llama*", "–")
            ]
            assert [await status_with(first), await status_with("sk-other")] == [200, 401]
            await tab.click("#issued button[aria-label='Rotate alice']")
            assert await tab.text("#issued button[aria-label='Rotate alice']") == "Rotate: sure?"
            assert await status_with(first) == 200
            await tab.click("#issued button[aria-label='Rotate alice']")
            second = await secret("alice")
            assert [await status_with(first), await status_with(second)] == [401, 200]
            for _ in range(2):
                await tab.click("#issued button[aria-label='Revoke alice']")
            await tab.until("document.querySelector('#issued td:nth-child(2)').innerText === 'revoked'")
            assert await status_with(second) == 401
            assert not await tab.run("return [...document.querySelectorAll('#issued button')].some((b) => !b.hidden)")
            await tab.run("document.querySelector('#issue [name=name]').removeAttribute('pattern')")
            await tab.type("#issue [name=name]", "a b")
            await tab.click("#issue-it")
            await tab.until("!document.getElementById('keys-failure').hidden")

    run(main())


def test_limits_of_a_key_are_changed(tmp_path: Path) -> None:
    """The form shows what the key has; its secret stays, and the time of day at which it expires."""

    async def main() -> None:
        shown = page(tmp_path, LabReplica(), admin_key="sesame", state=tmp_path / "state", expected="status of 4")
        async with shown as (balancer, tab), client_of(balancer) as client:
            admin = {"Authorization": "Bearer sesame"}
            terms = {"requests_per_day": 50, "models": ["llama*"], "expires": "2099-01-31T12:30", "priority": "bulk"}
            url = f"{balancer.admin_endpoint}/keys/alice"
            key = (await client.post(url, json=terms, headers=admin)).raise_for_status().json()["key"]
            odd = {"expires": "20990131"}  # as the form's field does not know it
            (await client.post(url.replace("alice", "bob"), json=odd, headers=admin)).raise_for_status()
            await tab.click("#show-usage")
            await tab.until("document.getElementById('admin').open")
            await tab.type("#admin-key", "sesame")
            await tab.press("\ue007")
            await tab.until("document.querySelectorAll('#issued tr').length === 2")
            await tab.click("#issued button[aria-label='Change alice']")
            read = "return [...document.querySelectorAll('#issue input, #issue select')].map((one) => one.value)"
            assert await tab.run(read) == ["alice", "", "", "50", "", "", "bulk", "llama*", "2099-01-31"]
            assert await tab.text("#issue-what") == "Change alice"
            await tab.click("#change-none")
            assert await tab.run(read) == ["", "", "", "", "", "", "interactive", "", ""]
            await tab.click("#issued button[aria-label='Change alice']")
            await tab.run("document.querySelector('#issue [name=models]').value = 'lab'")
            await tab.type("#issue [name=tokens_per_day]", "9000")
            await tab.click("#issue-it")
            await tab.until("document.querySelector('#issued td:nth-child(7)').innerText === '9,000'")
            row, _ = (await client.get(f"{balancer.admin_endpoint}/keys", headers=admin)).json()
            assert (row["requests_per_day"], row["tokens_per_day"], row["models"]) == (50, 9000, ["lab"])
            assert (row["priority"], row["expires"]) == ("bulk", "2099-01-31T12:30")
            answer = await client.post(CHAT, json=chat(), headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 200
            assert await tab.text("#issue-what") == "Issue a key"
            await tab.click("#issued button[aria-label='Change bob']")
            await tab.type("#issue [name=tokens_per_day]", "7000")
            await tab.click("#issue-it")
            await tab.until("document.querySelector('#issued [data-key=bob] td:nth-child(7)').innerText === '7,000'")
            _, row = (await client.get(f"{balancer.admin_endpoint}/keys", headers=admin)).json()
            assert (row["tokens_per_day"], row["expires"]) == (7000, "20990131")

    run(main())


def test_a_change_that_is_refused_says_why(tmp_path: Path) -> None:
    async def main() -> None:
        async with page(tmp_path, LabReplica(), expected="status of 404") as (balancer, tab):
            # The replica left a moment before the click.
            await tab.run("document.querySelector('.card button').dataset.verb = '../../replicas/7/drain'")
            await tab.click(".card button")
            await tab.until("document.querySelector('.card .failure')?.hidden === false")
            assert await tab.text(".card .failure") == "There is no replica 7; known are: 1."
            assert not balancer.service.fleet.members[1].draining

    run(main())


HOSTILE = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"


def test_what_replicas_and_clients_say_never_becomes_markup(tmp_path: Path) -> None:
    async def main() -> None:
        delta = {"choices": [{"index": 0, "delta": {"content": HOSTILE}}], "usage": None}
        answer = f"data: {json.dumps(delta)}\n\ndata: [DONE]\n\n"
        lab = LabReplica(Knobs(served_model=HOSTILE))
        async with page(tmp_path, lab, name=HOSTILE) as (balancer, tab), client_of(balancer) as client:
            await client.get(f"/v1/models/{HOSTILE}", params={"q": HOSTILE})
            lab.next(1, body=answer, content_type="text/event-stream")
            await tab.type("#prompt", HOSTILE)
            await tab.click("#send")
            await tab.until(ANSWERED, 1)
            assert await tab.text(".theirs p") == HOSTILE
            assert await tab.text(".mine p") == HOSTILE
            assert await tab.text("#service-name") == HOSTILE
            assert await tab.run("return document.getElementById('model').value") == HOSTILE
            await tab.until("document.getElementById('rows').innerText.includes(arguments[0])", HOSTILE[:20])
            outside = "return document.querySelectorAll('main img, script:not([src]), iframe').length"
            assert await tab.run(outside) == 0
            assert await tab.run("return window.hacked ?? null") is None

    run(main())


def test_it_asks_nothing_of_any_other_origin(tmp_path: Path) -> None:
    async def main() -> None:
        async with page(tmp_path, LabReplica()) as (balancer, tab):
            loaded = await tab.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
            assert len(loaded) >= 8
            assert {url for url in loaded if not url.startswith(balancer.admin_endpoint + "/")} == set()

    run(main())


def test_it_comes_back_by_itself_when_the_balancer_does(tmp_path: Path) -> None:
    async def main() -> None:
        async with LabReplica() as lab, browser(tmp_path / "profile") as tab:
            async with serving(lab) as balancer:
                await tab.open(balancer.admin_endpoint + "/")
                await tab.until(READY, 1)
                port = int(balancer.admin_endpoint.rpartition(":")[2])
            await tab.until("document.getElementById('connection').innerText.includes('does not answer')")
            async with serving(lab, admin=("127.0.0.1", port), name="again"):
                await tab.until("document.getElementById('service-name').innerText === 'again'")
                assert await tab.text("#connection") == ""

    run(main())


# Every text a person sees, with the contrast of its colour to what is behind it (WCAG 2.2, 1.4.3).
FAINT = """
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
  .map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
const behind = (node) => {
  for (let n = node; n; n = n.parentElement) {
    const colour = rgb(getComputedStyle(n).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const faint = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest("noscript, option")) continue;
  const [a, b] = [light(rgb(getComputedStyle(node).color)), light(behind(node))];
  const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (contrast < 4.5) faint.push(`${contrast.toFixed(2)}: ${walker.currentNode.data.trim().slice(0, 40)}`);
}
return faint;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_reads_well_on_a_phone_and_a_desk_in_light_and_dark(tmp_path: Path, scheme: str) -> None:
    async def main() -> None:
        one, two = (LabReplica(first_token_delay=0.08, token_interval=0.01) for _ in range(2))
        gone = LabReplica()
        async with page(tmp_path, one, two, gone, name="colours") as (balancer, tab), client_of(balancer) as client:
            await tab.prefer(color_scheme=scheme)
            gone.refuse()
            gone.drop_connections()
            for number in range(6):
                await client.post(CHAT, json=stream(f"question {number}", max_tokens=20))
            two.next(1, status=500)
            while (await client.post(CHAT, json=chat())).status_code != 500:
                pass
            await tab.type("#prompt", "What does a balancer do?")
            await tab.click("#send")
            await tab.until(ANSWERED, 1)
            await tab.until("document.querySelectorAll('.spark path[d*=M]').length >= 5")
            for name, width, height in (("desk", 1200, 1000), ("phone", 390, 844)):
                await tab.resize(width, height)
                await tab.until("innerWidth === arguments[0]", width)
                wide = await tab.run("return document.documentElement.scrollWidth - innerWidth")
                assert wide <= 0, f"{name}: {wide} px stick out"
                assert await tab.run(FAINT) == []
                await tab.run("scrollTo(0, 0)")
                keep(f"page-{name}-{scheme}.png", await tab.screenshot())
            background = await tab.run("return getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", background))) < 150) is (scheme == "dark")

    run(main())


def test_it_can_be_used_by_keyboard_and_screen_reader(tmp_path: Path) -> None:
    async def main() -> None:
        lab = LabReplica()
        async with page(tmp_path, lab) as (_, tab):
            nodes = (await tab.tool("Accessibility.getFullAXTree"))["nodes"]
            spoken = {"button", "link", "textbox", "spinbutton", "combobox", "image", "img", "region", "article", "log"}
            seen = set()
            for node in nodes:
                role = node.get("role", {}).get("value", "")
                if not node.get("ignored") and role in spoken:
                    seen.add(role)
                    assert node.get("name", {}).get("value", "").strip(), f"a {role} without a name: {node}"
            assert {"button", "link", "textbox", "article"} <= seen
            levels = await tab.run("return [...document.querySelectorAll('h1,h2,h3')].map((h) => Number(h.tagName[1]))")
            assert levels[0] == 1
            assert all(after - before <= 1 for before, after in pairwise(levels))
            # Tab alone comes to everything, the first stop being the way past the rest.
            stops = []
            for _ in range(25):
                await tab.press("\ue004")
                stops.append(await tab.run("const a = document.activeElement; return a.id || a.className || a.tagName"))
            assert stops[0] == "skip"
            for wanted in ("prompt", "send", "files", "anew", "scroller"):
                assert wanted in stops, stops
            assert await tab.run(
                "document.getElementById('prompt').focus();"
                "return getComputedStyle(document.getElementById('prompt')).outlineStyle !== 'none'"
            )
            await tab.type("#prompt", "first line")
            await tab.run("document.getElementById('prompt').value += '\\nsecond'")
            await tab.press("\ue007")
            await tab.until(ANSWERED, 1)
            assert asked(lab)["messages"][0]["content"] == "first line\nsecond"

    run(main())


def test_fifty_replicas_and_many_viewers_are_no_trouble(tmp_path: Path) -> None:
    async def main() -> None:
        shown = page(tmp_path, LabReplica())
        async with shown as (balancer, tab), client_of(balancer) as client:
            (known,) = balancer.service.fleet.members.values()
            many = [replace(known.listing, name=f"replica-{n}", id=n) for n in range(1, 51)]
            balancer.service.fleet.reconcile(many)
            await tab.until("document.querySelectorAll('.card').length === 50")
            viewers = [asyncio.ensure_future(watch(client, balancer.admin_endpoint)) for _ in range(63)]
            done = await asyncio.gather(*viewers)
            assert all(done)
            await tab.until("document.querySelectorAll('.card .badge.ready').length === 50")

    run(main())


async def watch(client: Any, endpoint: str) -> bool:
    """Reads the feed until its first state; True when that has replicas in it."""
    async with client.stream("GET", endpoint + "/feed") as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data:") and '"decisions"' in line:
                return '"READY"' in line or '"STARTING"' in line
    return False
