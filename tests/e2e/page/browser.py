"""A headless Chromium, driven over WebDriver's plain HTTP: Debian's chromium and chromium-driver, nothing from PyPI."""

import asyncio
import base64
import contextlib
import os
import re
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

import httpx

from tests.support.needed import lacking

MISSING = "this test drives a browser: apt-get install chromium chromium-driver"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's own name for a reference to an element
FLAGS = [
    "--headless=new",
    "--no-sandbox",  # tests run as root in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-prefers-reduced-motion",  # a click must not miss what still scrolls
    "--window-size=1200,1000",
]


class Browser:
    """One tab. Everything the page logs as an error, and every exception in it, ends up in `complaints`."""

    def __init__(self, client: httpx.AsyncClient, session: str) -> None:
        self._client = client
        self._session = f"/session/{session}"
        self._logged: list[dict[str, Any]] = []

    async def open(self, url: str) -> None:
        await self._post("/url", url=url)

    async def run(self, script: str, *arguments: Any) -> Any:
        """What the script returns; a promise is waited for."""
        return await self._post("/execute/sync", script=script, args=list(arguments))

    async def text(self, selector: str) -> str:
        """The text that a person sees there; empty where there is no such element."""
        found = await self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)
        return str(found)

    async def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((node) => node.innerText)"
        return list(await self.run(script, selector))

    async def click(self, selector: str) -> None:
        """A click as a person does it: the browser refuses one on what is hidden or covered."""
        await self._post(f"/element/{await self._find(selector)}/click")

    async def type(self, selector: str, text: str) -> None:
        await self._post(f"/element/{await self._find(selector)}/value", text=text)

    async def press(self, keys: str) -> None:
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        await self._post("/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    async def tool(self, command: str, **parameters: Any) -> Any:
        """A command of Chromium's own DevTools protocol."""
        return await self._post("/goog/cdp/execute", cmd=command, params=parameters)

    async def resize(self, width: int, height: int, scale: float = 1) -> None:
        await self.tool(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )

    async def prefer(self, **features: str) -> None:
        """What the person's system says it prefers: `prefer(color_scheme="dark")`."""
        wanted = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        await self.tool("Emulation.setEmulatedMedia", features=wanted)

    async def screenshot(self) -> bytes:
        """What the tab shows, as PNG."""
        answer = await self._client.get(self._session + "/screenshot")
        return base64.b64decode(answer.raise_for_status().json()["value"])

    async def until(self, claim: str, *arguments: Any, timeout: float = 60.0) -> Any:
        """Waits until a JavaScript expression is true; fails with what the page shows."""
        try:
            async with asyncio.timeout(timeout):
                while not (found := await self.run(f"return {claim}", *arguments)):  # noqa: ASYNC110 - another program
                    await asyncio.sleep(0.05)
                return found
        except TimeoutError:
            shown = await self.run("return document.body.innerText")
            raise AssertionError(f"not within {timeout:g} s: {claim} {arguments}\nThe page shows:\n{shown}") from None

    async def complaints(self, but_for: Callable[[str], bool] = lambda _: False) -> list[str]:
        """Errors and warnings so far: exceptions, refused loads, breaches of the content security policy."""
        self._logged += await self._post("/se/log", type="browser")
        said = [entry["message"] for entry in self._logged if entry["level"] in ("SEVERE", "WARNING")]
        return [message for message in said if not but_for(message)]

    async def _find(self, selector: str) -> str:
        found = await self._post("/element", using="css selector", value=selector)
        return str(found[ELEMENT])

    async def _post(self, path: str, **body: Any) -> Any:
        answer = await self._client.post(self._session + path, json=body)
        value = answer.json()["value"]
        assert answer.status_code == 200, f"{path}: {value.get('error')}: {value.get('message', '').splitlines()[:1]}"
        return value


def driver() -> str:
    """Where chromedriver is."""
    found = shutil.which("chromedriver")
    if found is None or shutil.which("chromium") is None:
        lacking(MISSING)
    return found


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Browser]:
    """A fresh Chromium with a profile of its own in `folder`; it is gone when the block ends."""
    async with driven() as address, httpx.AsyncClient(base_url=address, timeout=60, trust_env=False) as client:
        options = {"args": [*FLAGS, f"--user-data-dir={folder}"], "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = await client.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
        session = answer.raise_for_status().json()["value"]["sessionId"]
        try:
            yield Browser(client, session)
        finally:
            await client.delete(f"/session/{session}")


@asynccontextmanager
async def driven() -> AsyncIterator[str]:
    """The address of a chromedriver. It takes a free port of IPv4, and gives up if IPv6 has it taken: so again."""
    for _ in range(5):
        # A file, because what Chromium leaves behind for a moment would hold a pipe open.
        with tempfile.TemporaryFile() as output:
            process = await asyncio.create_subprocess_exec(
                driver(), "--port=0", stdout=output, stderr=asyncio.subprocess.STDOUT, start_new_session=True
            )
            try:
                said, port = await _port(process, output)
                if port:
                    yield f"http://127.0.0.1:{port}"
                    return
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its own session: the driver, and a Chromium that stays
                await process.wait()
    raise AssertionError(f"chromedriver does not start: {said}")


async def _port(process: asyncio.subprocess.Process, output: IO[bytes]) -> tuple[str, int]:
    """What it said until it listened, or ended, and where it listens; 0 for nowhere."""
    async with asyncio.timeout(60):
        while True:
            has_ended = process.returncode is not None
            said = os.pread(output.fileno(), 65536, 0).decode(errors="replace")
            if found := re.search(r"started successfully on port (\d+)", said):
                return said, int(found[1])
            if has_ended:
                return said, 0
            await asyncio.sleep(0.02)
