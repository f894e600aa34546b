"""A real browser, headless Chromium, driven through its own pipe: no package, no port.

Messages of the DevTools protocol are JSON objects that end with a zero byte
(`--remote-debugging-pipe`: the browser reads file descriptor 3 and writes 4).
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Final, Literal

NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT: Final = 60.0

Scheme = Literal["light", "dark"]


class BrowserError(RuntimeError):
    """There is no browser, or it does not do as it is told."""


def executable() -> str:
    """The browser.

    Raises:
        BrowserError: none is installed.
    """
    asked = os.environ.get("FORGE_BROWSER")
    found = asked or next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise BrowserError(
            "these tests look at pages in a real browser and none is here: install one (Debian: "
            "apt-get install chromium) or name it in FORGE_BROWSER"
        )
    return found


class Browser:
    """One process with one page after the other.

    Args:
        place: a folder for its profile.
    """

    def __init__(self, place: Path) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        inheritable = {3: to_browser, 4: from_browser}
        # above 4, so that a shell can put them where the browser looks for them
        moved = {number: fcntl.fcntl(one, fcntl.F_DUPFD, 10) for number, one in inheritable.items()}
        command = [
            executable(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--remote-debugging-pipe", f"--user-data-dir={place}", "about:blank",
        ]  # fmt: skip

        script = f'exec 3<&{moved[3]} 4>&{moved[4]}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=tuple(moved.values()), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for one in (*moved.values(), to_browser, from_browser):
            os.close(one)
        os.set_blocking(self._read, False)
        self._rest = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        """The next message, or None when none came in time."""
        while b"\0" not in self._rest:
            try:
                chunk = os.read(self._read, 1 << 20)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.005)
                continue
            if not chunk:
                raise BrowserError(f"the browser has ended with status {self._process.poll()}")
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        data: dict[str, Any] = json.loads(message)
        return data

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol and its answer; events that come meanwhile are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + WAIT
        while (answer := self._receive(deadline)) is not None:
            if answer.get("id") != self._number:
                self.events.append(answer)
                continue
            if "error" in answer:
                raise BrowserError(f"{method}: {answer['error']['message']}")
            return answer["result"]  # type: ignore[no-any-return]
        raise BrowserError(f"{method} was not answered in {WAIT:.0f} s")

    def listen(self, seconds: float) -> None:
        """Take in what comes within a time."""
        deadline = time.monotonic() + seconds
        while (answer := self._receive(deadline)) is not None:
            self.events.append(answer)

    def page(self, width: int = 1280, height: int = 900, scheme: Scheme = "light") -> Page:
        """An empty page."""
        return Page(self, width, height, scheme)

    def close(self) -> None:
        """End the process."""
        try:
            self.call("Browser.close")
        except (BrowserError, OSError):
            self._process.kill()
        self._process.wait(WAIT)
        os.close(self._read)
        os.close(self._write)


class Page:
    """One page: what it asked for, what it complained of, how it looks."""

    def __init__(self, browser: Browser, width: int, height: int, scheme: Scheme) -> None:
        self._browser = browser
        self._width, self._height = width, height
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=target, flatten=True)
        self._target, self._session = target, attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.size(width, height)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command for this page."""
        return self._browser.call(method, self._session, **parameters)

    def size(self, width: int, height: int) -> None:
        """Make the window so large."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def open(self, address: str) -> None:
        """Go there and wait until everything is loaded."""
        self.call("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise BrowserError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + WAIT
        while not self.evaluate(expression):
            if time.monotonic() > deadline:
                raise BrowserError(f"never became true: {expression}")
            self._browser.listen(0.05)

    def _of(self, *methods: str) -> list[dict[str, Any]]:
        self._browser.listen(0.1)
        return [
            event["params"]
            for event in self._browser.events
            if event.get("sessionId") == self._session and event["method"] in methods
        ]

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, violations of the page's own policy."""
        found = [
            str(event["entry"]["text"])
            for event in self._of("Log.entryAdded")
            if event["entry"]["level"] in ("error", "warning")
        ]
        found += [
            str(event["args"])
            for event in self._of("Runtime.consoleAPICalled")
            if event["type"] in ("error", "warning", "assert")
        ]
        return found + [
            str(event["exceptionDetails"]) for event in self._of("Runtime.exceptionThrown")
        ]

    @property
    def requests(self) -> list[str]:
        """Addresses that were asked for."""
        return [str(event["request"]["url"]) for event in self._of("Network.requestWillBeSent")]

    def picture(self, file: Path, *, whole: bool = True) -> Path:
        """A PNG of the page, to its end or as far as the window shows it."""
        if whole:
            height = int(self.evaluate("document.documentElement.scrollHeight"))
            self.size(self._width, min(16_000, max(self._height, height)))
        data = self.call("Page.captureScreenshot", format="png")["data"]
        file.write_bytes(base64.b64decode(data))
        self.size(self._width, self._height)
        return file

    def close(self) -> None:
        """Close it."""
        self._browser.call("Target.closeTarget", targetId=self._target)


def started() -> tuple[Browser, Any]:
    """A browser with a profile of its own, and the folder that is to be cleaned up after it."""
    executable()  # before anything is made
    place = tempfile.TemporaryDirectory(prefix="forge-browser-", ignore_cleanup_errors=True)
    return Browser(Path(place.name)), place
