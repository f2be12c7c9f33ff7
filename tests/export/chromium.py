"""A headless Chromium over its DevTools pipe: what a page looks like, asks for and complains of. Nothing to install."""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from select import select
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # a container's root has none; the one page shown is our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "about:blank",
)
_IN_AND_OUT = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3])
os.dup2(read, 3), os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""DevTools reads descriptor 3 and writes descriptor 4, whatever numbers the pipes have here."""


def found() -> str | None:
    """The path of a browser on this machine, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def browser(program: str) -> Iterator["Tab"]:
    """A tab of a fresh profile; the browser has ended afterwards, and its profile is gone."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        to_read, ours_out = os.pipe()
        ours_in, to_write = os.pipe()
        ends = (str(to_read), str(to_write))
        words = [sys.executable, "-c", _IN_AND_OUT, *ends, program, f"--user-data-dir={profile}", *FLAGS]
        process = subprocess.Popen(
            words, pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        try:
            with Tab(ours_in, ours_out) as tab:
                yield tab
                tab.command("Browser.close", everywhere=True)
            process.wait(20)
        finally:
            process.kill()
            process.wait()


class Tab:
    """One page. `events` has all that the browser told of it, in order."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._number, self._rest, self._session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.command("Target.createTarget", everywhere=True, url="about:blank")["targetId"]
        attached = self.command("Target.attachToTarget", everywhere=True, targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for room in ("Page", "Network", "Runtime", "Log"):
            self.command(f"{room}.enable")

    def __enter__(self) -> "Tab":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        os.close(self._reading)
        os.close(self._writing)

    def command(self, method: str, *, everywhere: bool = False, **words: Any) -> Mapping[str, Any]:
        """What the browser answers. everywhere: to the browser, not to this page."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": words}
        if not everywhere:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, page: Path) -> None:
        """The page is loaded whole."""
        seen = len(self.events)
        self.command("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events[seen:]):
            self.events.append(self._next())

    def look(self, width: int, *, height: int = 900, dark: bool = False, phone: bool = False) -> None:
        """From now on the window is this large, in CSS pixels."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])

    def value(self, expression: str) -> Any:
        """What this JavaScript expression is on the page."""
        answer = self.command("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def picture(self) -> bytes:
        """All of the page as PNG."""
        return base64.b64decode(self.command("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def printed(self) -> bytes:
        """The page as PDF, on the paper that it asks for."""
        answer = self.command("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        return base64.b64decode(answer["data"])

    def _next(self, timeout_s: float = 60.0) -> dict[str, Any]:
        until = time.monotonic() + timeout_s
        while b"\0" not in self._rest:
            if not select([self._reading], [], [], max(until - time.monotonic(), 0))[0]:
                raise TimeoutError(f"the browser said nothing for {timeout_s:.0f} s")
            if not (more := os.read(self._reading, 1 << 20)):
                raise ConnectionError("the browser ended")
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
