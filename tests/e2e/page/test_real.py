"""The page before real SGLang replicas: a chat that is answered, an image whose colour is named."""

import asyncio
import json
import re
from pathlib import Path

import httpx

from tests.e2e.page.browser import browser
from tests.e2e.page.pictures import keep, png
from tests.e2e.running import Balancer, Replica
from tests.observe.serving import CHAT

ANSWERED = "!document.querySelector('[aria-busy]') && document.querySelectorAll('.theirs').length === 1"
SYSTEM = "You are the librarian of a small town. You are patient, exact and kind, and you answer in one sentence. "


async def talk(client: httpx.AsyncClient, number: int) -> None:
    """A question on a long system prompt that others share, streamed to its end."""
    question = f"Which shelf has the books about the number {number}?"
    messages = [{"role": "system", "content": SYSTEM * 8}, {"role": "user", "content": question}]
    body = {"model": "smollm2-135m", "messages": messages, "max_tokens": 24}
    answer = await client.post(CHAT, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.status_code == 200


def test_a_real_model_answers_and_the_page_shows_how(balancer: Balancer, tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            browser(tmp_path / "profile") as tab,
            httpx.AsyncClient(base_url=balancer.url, timeout=300) as client,
        ):
            await tab.resize(1100, 1180)
            await tab.open(balancer.admin_url + "/")
            await tab.until("document.querySelectorAll('#cards .badge.ready').length === 2")
            for number in range(12):
                await talk(client, number)
            await tab.until("document.getElementById('model').value === 'smollm2-135m'")
            await tab.run(
                "document.getElementById('temperature').value = 0; document.getElementById('most').value = 40"
            )
            await tab.type("#prompt", "Name the capital of France.")
            await tab.click("#send")
            await tab.until(ANSWERED, timeout=240)
            assert "Paris" in await tab.text(".theirs p")
            how = await tab.text(".theirs .how")
            assert re.search(
                r"from replica-[12] · chosen: in turn · first token after [\d.]+ m?s · \d+ prompt tokens", how
            )
            # A sample after the last answer, so that the cards show the cache that the shared prompt filled.
            await tab.until(
                "[...document.querySelectorAll('.card')].every((card) => /\\b[5-9]\\d %/.test(card.innerText))"
            )
            await tab.run("document.activeElement.blur(); scrollTo(0, 0)")
            keep("real-chat.png", await tab.screenshot())
            assert await tab.complaints() == []

    asyncio.run(main())


def test_a_real_model_names_the_colour_of_a_dropped_image(tiny_llava: Replica, key_file: Path, tmp_path: Path) -> None:
    async def main(balancer: Balancer) -> None:
        (tmp_path / "picture.png").write_bytes(png((220, 30, 30), 336))
        async with browser(tmp_path / "profile") as tab:
            await tab.resize(420, 900, 2)
            await tab.open(balancer.admin_url + "/")
            await tab.until("document.getElementById('model').value === 'tiny-llava'")
            await tab.type("#files", str(tmp_path / "picture.png"))
            await tab.until("document.querySelectorAll('#pictures img').length === 1")
            await tab.run("document.getElementById('temperature').value = 0; document.getElementById('most').value = 8")
            await tab.type("#prompt", "What color is this image?")
            await tab.click("#send")
            await tab.until(ANSWERED, timeout=240)
            assert "red" in (await tab.text(".theirs p")).lower()
            await tab.run("document.activeElement.blur(); document.getElementById('playground').scrollIntoView()")
            keep("real-image.png", await tab.screenshot())
            assert await tab.complaints() == []

    balancer = Balancer(tmp_path / "balancer.log", [tiny_llava], "--replica-key", str(key_file))
    try:
        balancer.wait_all_ready()
        asyncio.run(main(balancer))
        assert key_file.read_text().strip() not in json.dumps(balancer.tail(1000))
    finally:
        balancer.close()
