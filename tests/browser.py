"""A real browser without a window, told what to do by Chromium's own protocol; for tests of pages."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
"""The browser; None where there is none."""

ANSWER_S = 30.0


class Page:
    """A page in the browser.

    Args:
        connection: to the page's own socket.
    """

    def __init__(self, connection: aiohttp.ClientWebSocketResponse) -> None:
        self._connection = connection
        self._calls = 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls the protocol; see chromedevtools.github.io/devtools-protocol."""
        self._calls += 1
        number = self._calls
        await self._connection.send_json({"id": number, "method": method, "params": parameters})
        while True:
            answer = json.loads((await asyncio.wait_for(self._connection.receive(), ANSWER_S)).data)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    async def value(self, expression: str) -> Any:
        """The value of an expression in JavaScript."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str, seconds: float = ANSWER_S) -> Any:
        """Waits until an expression is true, and gives its value."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not (found := await self.value(expression)):
            assert asyncio.get_running_loop().time() < deadline, f"still not: {expression}"
            await asyncio.sleep(0.1)
        return found

    async def drop(self, selector: str, file: Path) -> None:
        """Drops a file on an element, as a user does from another window."""
        box = await self.value(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            await self.call("Input.dispatchDragEvent", type=kind, x=box[0], y=box[1], data=data)

    async def picture(self) -> bytes:
        """What is seen, as a PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot"))["data"])


@contextlib.asynccontextmanager
async def opened(address: str) -> AsyncIterator[Page]:
    """A page in a browser of its own, which is ended afterwards."""
    assert CHROMIUM is not None, "a test is skipped where there is no browser"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--remote-debugging-port=0", f"--user-data-dir={profile}", "--window-size=1000,900", "about:blank",
        ]  # fmt: skip
        browser = subprocess.Popen([CHROMIUM, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = await _port(Path(profile, "DevToolsActivePort"))
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    pages = [one for one in await answer.json() if one["type"] == "page"]
                async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as connection:
                    page = Page(connection)
                    await page.call("Page.navigate", url=address)
                    await page.until("document.readyState === 'complete'")
                    yield page
        finally:
            browser.terminate()
            browser.wait(20)


async def _port(file: Path) -> int:
    """The port that the browser says it listens on."""
    for _ in range(int(ANSWER_S / 0.1)):
        if file.exists() and (lines := file.read_text().split()):
            return int(lines[0])
        await asyncio.sleep(0.1)
    raise AssertionError("the browser did not start")
