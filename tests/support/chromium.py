"""Headless Chromium over the DevTools protocol: open a page, ask it things, see its errors and requests, take pictures."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

BINARIES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0",
    "--remote-allow-origins=*",
)  # fmt: skip
START_SECONDS = 300.0


def find_chromium() -> str | None:
    """The first Chromium on the PATH, or None."""
    return next((path for name in BINARIES if (path := shutil.which(name))), None)


class Page:
    """One tab. `errors` holds console errors and uncaught exceptions, `requests` the URLs asked for beyond the page itself."""

    def __init__(self, binary: str) -> None:
        from websocket import create_connection

        self._profile = tempfile.mkdtemp(prefix="chromium-profile-")
        self._process = subprocess.Popen(
            [binary, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._next_id = 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._events: list[dict[str, Any]] = []
        try:
            self._socket = create_connection(self._debugger_url(), timeout=240, suppress_origin=True)
            target = self._send("Target.createTarget", url="about:blank")["targetId"]
            self._session: str | None = None
            self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self._send(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    _session: str | None = None

    def _debugger_url(self) -> str:
        port_file = Path(self._profile) / "DevToolsActivePort"
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if port_file.is_file() and len(lines := port_file.read_text().split()) >= 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            if self._process.poll() is not None:
                raise RuntimeError(f"Chromium ended with status {self._process.returncode} before it listened")
            time.sleep(0.05)
        raise TimeoutError(f"Chromium did not listen within {START_SECONDS:g} s")

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        self._next_id += 1
        message: dict[str, Any] = {"id": self._next_id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            reply = json.loads(self._socket.recv())
            if reply.get("id") == self._next_id:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']}")
                return reply["result"]
            self._note(reply)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method", ""), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details.get("text", "exception"))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description", ""))) for a in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        self._events.append(event)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression (a promise is awaited); RuntimeError when it throws."""
        result = self._send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"].get("exception", {}).get("description", "exception"))
        return result["result"].get("value")

    def view(self, width: int, height: int = 900, *, dark: bool = False, phone: bool = False) -> None:
        """Set the viewport (CSS pixels) and the system's colour preference."""
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self._send("Emulation.setTouchEmulationEnabled", enabled=phone)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._send("Emulation.setEmulatedMedia", features=features)

    def open(self, path: Path, ready: str = "document.documentElement?.dataset.ready === 'true'", timeout: float = 120.0) -> None:
        """Load a local file and wait until `ready` holds."""
        self.goto(path.resolve().as_uri(), ready, timeout)

    def goto(self, url: str, ready: str = "document.documentElement?.dataset.ready === 'true'", timeout: float = 120.0) -> None:
        """Load an address and wait until `ready` holds."""
        self._send("Page.navigate", url=url)
        self.wait(ready, timeout)

    def type(self, text: str) -> None:
        """Put `text` where the keyboard's focus is, as an input method does."""
        self._send("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """One key, such as ("Enter", 13) or ("Escape", 27)."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            more = text if kind == "keyDown" else {}
            self._send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def click(self, selector: str) -> None:
        """A press of the mouse in the middle of the first element of `selector`."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = self.evaluate(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
        self.mouse("mouseMoved", x, y)
        self.mouse("mousePressed", x, y, clicks=1)
        self.mouse("mouseReleased", x, y, clicks=1)

    def grant_clipboard(self) -> None:
        """Let pages read and write the clipboard without asking."""
        session, self._session = self._session, None
        self._send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        self._session = session

    def wait(self, condition: str, timeout: float = 120.0) -> None:
        deadline = time.monotonic() + timeout
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{condition} did not hold within {timeout:g} s; errors: {self.errors[:3]}")
            time.sleep(0.05)

    def screenshot(self, path: Path, *, full: bool = True) -> None:
        options: dict[str, Any] = {"format": "png", "captureBeyondViewport": full}
        if full:
            size = self._send("Page.getLayoutMetrics")["cssContentSize"]
            options["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot", **options)["data"]))

    def pdf(self, path: Path) -> None:
        data = self._send("Page.printToPDF", printBackground=True, preferCSSPageSize=False, paperWidth=8.27, paperHeight=11.69)[
            "data"
        ]
        path.write_bytes(base64.b64decode(data))

    def mouse(self, kind: str, x: float, y: float, clicks: int = 0) -> None:
        """kind: mouseMoved, mousePressed or mouseReleased, at CSS pixels of the viewport."""
        self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left" if clicks else "none", clickCount=clicks)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def __enter__(self) -> Page:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
