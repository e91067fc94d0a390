"""A real Chromium, driven over the pipe of its DevTools protocol: a page, what it says, and what it asks the network for.

Nothing but the standard library: see docs/dependencies.md. https://chromedevtools.github.io/devtools-protocol has the methods.
"""

import base64
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest

WAIT_S = 60
"""For what must happen. Nothing waits so long unless something is broken."""
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REQUIRED = "STEPGRAPH_TESTS_NEED_CHROMIUM"
"""Set where its lack is a failure: in CI."""
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",  # no network but this host's own
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--no-proxy-server",
)
_KEYS = {
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "Tab": (9, ""),
    "ArrowLeft": (37, ""),
    "ArrowRight": (39, ""),
    "Home": (36, ""),
}


def find_chromium() -> str | None:
    """The program, if there is one."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


def need_chromium() -> None:
    """Skip the test without a browser, or fail where there must be one."""
    if find_chromium() is not None:
        return
    if os.environ.get(REQUIRED):
        pytest.fail("there is no Chromium, and here there must be: apt-get install chromium")
    pytest.skip("there is no Chromium to look at the page with: apt-get install chromium")


class Chromium:
    """A running browser without windows. Commands go out one at a time; events are kept for whoever asks for them."""

    def __init__(self, program: str, profile: Path):
        (to_browser, self._out), (self._in, from_browser) = os.pipe(), os.pipe()
        flags = [*_FLAGS, f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        # the browser reads from descriptor 3 and writes to 4: copies beyond both: placing one shall not lose the other
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_browser, from_browser)]
        self._pid = os.posix_spawn(
            program,
            [program, *flags, "about:blank"],
            {**os.environ, "HOME": str(profile), "TZ": "UTC", "LANG": "en_US.UTF-8"},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                *((os.POSIX_SPAWN_OPEN, output, os.devnull, os.O_WRONLY, 0) for output in (1, 2)),
                *((os.POSIX_SPAWN_DUP2, end, place) for place, end in enumerate(ends, start=3)),
            ],
        )
        for end in (to_browser, from_browser, *ends):
            os.close(end)
        self._number = 0
        self._answers: Queue[dict[str, Any]] = Queue()
        self._listeners: dict[str | None, Callable[[str, dict[str, Any]], None]] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command, and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._out, content) :]
        try:
            answer = self._answers.get(timeout=WAIT_S)
        except Empty:
            raise AssertionError(f"Chromium does not answer {method}") from None
        assert answer.get("id") == self._number, (method, answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def listen(self, session: str, listener: Callable[[str, dict[str, Any]], None]) -> None:
        """Have the events of a session told, on a thread of the browser's."""
        self._listeners[session] = listener

    def forget(self, session: str) -> None:
        """No more events of a session."""
        del self._listeners[session]

    def close(self) -> None:
        """End it."""
        os.close(self._out)  # at the end of its pipe, the browser ends
        deadline = time.monotonic() + 20
        while os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                break
            time.sleep(0.02)
        self._reader.join(timeout=20)
        os.close(self._in)

    def _read(self) -> None:
        rest = b""
        while content := os.read(self._in, 1 << 16):
            *messages, rest = (rest + content).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._answers.put(message)
                elif (listener := self._listeners.get(message.get("sessionId"))) is not None:
                    listener(message["method"], message["params"])
        self._answers.put({"id": None, "error": "the browser ended"})


class Tab:
    """A page in a context of its own: no key, no theme, no cache of another's.

    Attributes:
        requests: the address of every request that it made.
        complaints: exceptions and errors of its console, violations of its Content-Security-Policy among them.
    """

    def __init__(self, browser: Chromium, *, width: int, height: int, dark: bool, downloads: Path | None):
        self._browser = browser
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context = browser.call("Target.createBrowserContext")["browserContextId"]
        target = browser.call(
            "Target.createTarget", url="about:blank", browserContextId=self.context, width=width, height=height
        )["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        browser.listen(self._session, self._hear)
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.set_size(width, height)
        self.set_dark(dark)
        if downloads is not None:
            behaviour = {"behavior": "allow", "browserContextId": self.context, "downloadPath": str(downloads)}
            browser.call("Browser.setDownloadBehavior", **behaviour)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of DevTools about this page."""
        return self._browser.call(method, self._session, **parameters)

    def set_size(self, width: int, height: int, *, scale: float = 1) -> None:
        """What the page has to show itself in, in pixels of the style sheet."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )

    def set_dark(self, dark: bool) -> None:
        """What the system prefers."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def open(self, url: str) -> None:
        """Go there, and wait until the page runs."""
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives there, awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    def text(self, selector: str) -> str:
        """What an element shows."""
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector: str) -> list[str]:
        """What each of these elements shows."""
        return self.value(f"[...document.querySelectorAll({json.dumps(selector)})].map((each) => each.innerText)")

    def wait(self, expression: str) -> Any:
        """Wait until an expression is true, which must happen; returns its value."""
        deadline = time.monotonic() + WAIT_S
        while not (found := self.value(expression)):
            assert time.monotonic() < deadline, (expression, self.value("document.body.innerText"), self.complaints)
            time.sleep(0.03)
        return found

    def wait_text(self, selector: str, part: str) -> None:
        """Wait until an element shows some text."""
        self.wait(f"document.querySelector({json.dumps(selector)})?.innerText.includes({json.dumps(part)})")

    def wait_frame(self) -> None:
        """Wait until what the page has to draw now is drawn."""
        self.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def click(self, selector: str, x: float | None = None, y: float | None = None) -> None:
        """A press of the mouse on an element: in its middle, or at a place in it."""
        box = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'nearest'}});"
            " const {left, top, width, height} = e.getBoundingClientRect(); return [left, top, width, height] })()"
        )
        assert 0 not in box[2:], f"{selector} cannot be seen"
        place = {"x": box[0] + (box[2] / 2 if x is None else x), "y": box[1] + (box[3] / 2 if y is None else y)}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, **place)

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """One key: a character, or its name."""
        code, text = _KEYS[key] if key in _KEYS else (ord(key.upper()), key)
        named = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **named, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def save_screenshot(self, path: Path) -> None:
        """What can be seen, as PNG or, by the path's end, WebP."""
        form = {"format": "webp", "quality": 80} if path.suffix == ".webp" else {"format": "png"}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **form)["data"]))

    def close(self) -> None:
        """Leave it."""
        self._browser.forget(self._session)
        self._browser.call("Target.disposeBrowserContext", browserContextId=self.context)

    def _hear(self, method: str, told: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(told["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] == "error" and told["entry"]["source"] != "network":
            self.complaints.append(told["entry"]["text"])


@contextmanager
def running_chromium(profile: Path) -> Iterator[Chromium]:
    """A browser that ends with the block."""
    program = find_chromium()
    assert program is not None, "there is no Chromium"
    browser = Chromium(program, profile)
    try:
        yield browser
    finally:
        browser.close()


@contextmanager
def opened_tab(
    browser: Chromium, *, width: int = 1280, height: int = 900, dark: bool = False, downloads: Path | None = None
) -> Iterator[Tab]:
    """A page that ends with the block."""
    tab = Tab(browser, width=width, height=height, dark=dark, downloads=downloads)
    try:
        yield tab
    finally:
        tab.close()
