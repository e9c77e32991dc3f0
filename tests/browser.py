"""A real browser for tests: Chromium without a window, spoken to over a pair of pipes.

Only what the tests of the report need of the Chrome DevTools Protocol, and nothing to install
beside the browser itself. The pages are loaded as they are, with scripts switched off.
"""

import base64
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip


def find_chromium() -> str | None:
    """The browser that $CHROMIUM names, or the first one on the path."""
    names = [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else NAMES
    return next((path for path in map(shutil.which, names) if path), None)


def _pipe() -> tuple[int, int]:
    """Both ends of a pipe, clear of the numbers that the browser wants."""
    ends = os.pipe()
    far = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return far[0], far[1]


class Browser:
    """One tab. `events` are all messages that the browser sent on its own."""

    def __init__(self, program: str, profile: Path) -> None:
        self.events: list[dict] = []
        self._number, self._session = 0, None
        theirs_in, self._out = _pipe()
        self._in, theirs_out = _pipe()
        # The browser reads from file descriptor 3 and writes to 4.
        files = [(os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4)]
        files += [(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
        command = [program, *_FLAGS, f"--user-data-dir={profile}"]
        self._pid = os.posix_spawn(program, command, os.environ, file_actions=files)
        os.close(theirs_in)
        os.close(theirs_out)
        self._left = b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setScriptExecutionDisabled", value=True)

    def close(self) -> None:
        self._session = None
        self.call("Browser.close")
        os.waitpid(self._pid, 0)
        os.close(self._in)
        os.close(self._out)

    def open(self, page: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Loads a file at a width in CSS pixels and forgets the events before."""
        self.events.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page, however long, as PNG."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def pdf(self) -> bytes:
        """The page as it goes onto paper of A4."""
        paper = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True}
        printed = self.call("Page.printToPDF", printBackground=True, **paper)
        return base64.b64decode(printed["data"])

    def call(self, method: str, **params: Any) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _read(self) -> dict:
        """The next message; one that is no answer is kept as an event."""
        while b"\0" not in self._left:
            piece = os.read(self._in, 1 << 16)
            if not piece:
                raise RuntimeError("the browser has ended")
            self._left += piece
        text, _, self._left = self._left.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message
