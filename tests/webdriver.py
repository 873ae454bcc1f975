"""A headless Chromium for tests, spoken to over chromedriver's WebDriver protocol with the standard library alone."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-color-profile=srgb",
)
KEYS = {"Escape": "\ue00c", "Enter": "\ue007", "Tab": "\ue004", "Space": " "}
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to an element
HOW = "no Chromium with its driver: apt-get install chromium chromium-driver"


def binaries() -> tuple[str, str] | None:
    """(chromium, chromedriver), or None where one is missing."""
    browser = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """One session. `close` ends it, its driver and its profile."""

    def __init__(self) -> None:
        found = binaries()
        if found is None:
            raise RuntimeError(HOW)
        self.profile = tempfile.TemporaryDirectory(prefix="bench-dfusion-chromium-", ignore_cleanup_errors=True)
        self.process = subprocess.Popen(
            [found[1], "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        self.base = ""
        try:
            for line in self.process.stdout:
                if port := re.search(r"started successfully on port (\d+)", line):
                    self.base = f"http://127.0.0.1:{port[1]}"
                    break
            else:
                raise RuntimeError("chromedriver did not start")
            options = {"binary": found[0], "args": [*FLAGS, f"--user-data-dir={self.profile.name}"]}
            logs = {"browser": "ALL", "performance": "ALL"}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
            made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self.base += f"/session/{made['sessionId']}"
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        try:
            self._ask("DELETE", "")
        finally:
            self._end()

    def _end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.profile.cleanup()

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(
            self.base + path, data, {"Content-Type": "application/json; charset=utf-8"}, method=method
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, page: Path) -> None:
        self._ask("POST", "/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of a function in the page; what it returns (awaited) comes back."""
        body = {"script": f"return (async function() {{ {script} }}).apply(null, arguments)", "args": list(arguments)}
        return self._ask("POST", "/execute/sync", body)

    def click(self, selector: str) -> None:
        """As a mouse does: scrolled to and clicked in its middle."""
        self._ask("POST", f"/element/{self._find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        self._ask("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def press(self, *names: str) -> None:
        """Keys, to whatever has the focus."""
        actions = [{"type": kind, "value": KEYS[n]} for n in names for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def _find(self, selector: str) -> str:
        return str(self._ask("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT])

    def until(self, script: str, *arguments: Any, seconds: float = 5.0) -> Any:
        """Wait until the script returns something true."""
        return _wait(lambda: self.run(script, *arguments), seconds, script)

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of the developer tools' protocol."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def size(self, width: int, height: int = 900, phone: bool = False, scale: float = 1) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=phone,
        )

    def scheme(self, name: str) -> None:
        """The system's colour scheme: light or dark."""
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def console(self) -> list[str]:
        """What the console said since the last call."""
        return [str(entry["message"]) for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """The addresses asked for since the last call."""
        messages = [json.loads(e["message"])["message"] for e in self._ask("POST", "/se/log", {"type": "performance"})]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path: Path, whole: bool = False) -> None:
        shot = self.command("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


def _wait(ready: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while not (found := ready()):
        if time.monotonic() > end:
            raise AssertionError(f"never came true in {seconds} s: {what}")
        time.sleep(0.05)
    return found
