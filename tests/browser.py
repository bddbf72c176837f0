"""A real browser for the tests: headless Chromium, told what to do through its driver (W3C WebDriver over HTTP)."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, Optional

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
IS_THERE = bool(CHROMIUM and DRIVER)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id, by the standard


class Browser:
    """One window of a browser."""

    def __init__(self, port: int, dark: bool = False) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self._profile = tempfile.TemporaryDirectory()
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            f"--user-data-dir={self._profile.name}",
            *(["--force-dark-mode"] if dark else []),
        ]
        options = {"binary": CHROMIUM, "args": arguments}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}, "pageLoadStrategy": "none"}
        wanted["acceptInsecureCerts"] = True  # the tests' own certificate
        answer = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{answer['sessionId']}"

    def _call(self, method: str, path: str, body: Optional[dict[str, Any]] = None) -> Any:
        self._connection.request(method, path, json.dumps(body) if body is not None else None)
        value = json.loads(self._connection.getresponse().read())["value"]
        if isinstance(value, dict) and "error" in value:
            raise RuntimeError(f"{value['error']}: {value['message'].splitlines()[0]}")
        return value

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._call("DELETE", self._session)
        self._connection.close()
        self._profile.cleanup()

    def open(self, url: str) -> None:
        """Go to an address, and do not wait until it is loaded: live pages are not for long."""
        self._call("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a JavaScript expression, in the page or in the frame that is chosen."""
        body = {"script": f"return {script}", "args": list(arguments)}
        return self._call("POST", f"{self._session}/execute/sync", body)

    def find(self, selector: str) -> str:
        """The element for a CSS selector."""
        body = {"using": "css selector", "value": selector}
        return str(self._call("POST", f"{self._session}/element", body)[_ELEMENT])

    def click(self, selector: str) -> None:
        self._call("POST", f"{self._session}/element/{self.find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        element = self.find(selector)
        self._call("POST", f"{self._session}/element/{element}/clear", {})
        self._call("POST", f"{self._session}/element/{element}/value", {"text": text})

    def key(self, name: str) -> None:
        """Press a key where the focus is: Tab or Enter."""
        value = {"Tab": "\ue004", "Enter": "\ue007"}[name]
        keys = [{"type": kind, "value": value} for kind in ("keyDown", "keyUp")]
        self._call("POST", f"{self._session}/actions", {"actions": [{"type": "key", "id": "keys", "actions": keys}]})

    def frame(self, selector: str = "") -> None:
        """Choose a frame, or with none the page itself."""
        target = {_ELEMENT: self.find(selector)} if selector else None
        self._call("POST", f"{self._session}/frame", {"id": target})

    def windows(self) -> list[str]:
        return list(self._call("GET", f"{self._session}/window/handles"))

    def window(self, handle: str) -> None:
        self._call("POST", f"{self._session}/window", {"handle": handle})

    def close_window(self) -> None:
        self._call("DELETE", f"{self._session}/window")

    def resize(self, width: int, height: int) -> None:
        """Set the size of what is shown, which is smaller than the window's and may be smaller than one can be."""
        body = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", body)

    def scheme(self, name: str) -> None:
        """Prefer light or dark."""
        self.devtools("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": name}]})

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        body = {"cmd": command, "params": parameters}
        return self._call("POST", f"{self._session}/goog/cdp/execute", body)

    def screenshot(self) -> bytes:
        """A picture of the window (PNG)."""
        return base64.b64decode(self._call("GET", f"{self._session}/screenshot"))

    def errors(self) -> list[str]:
        """What the console has said since it was asked last."""
        entries = self._call("POST", f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]


@contextlib.contextmanager
def driver() -> Iterator[int]:
    """Run the driver; gives its port."""
    process = subprocess.Popen([str(DRIVER), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    try:
        for line in process.stdout:
            if "started successfully on port" in line:
                yield int(line.rpartition("port ")[2].strip(". \n"))
                break
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
