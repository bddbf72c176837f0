"""The README's applications of Flask, Django and Starlette, run by the servers that people run them by.

Skipped where those are not installed; STREAMLOG_FRAMEWORKS names a Python that has them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
import unittest

from . import browser
from .support import ROOT, Answer, Raw, ServerCase, wait_until
from .test_browser import BrowserCase
from .test_deployment import block, free_port

PYTHON = os.environ.get("STREAMLOG_FRAMEWORKS", "")
NAMES = ("flask", "gunicorn", "django", "starlette", "uvicorn")
IS_THERE = bool(PYTHON) or all(map(importlib.util.find_spec, NAMES))
SERVERS = {
    "werkzeug": ["flask", "--app", "app", "run", "--port", "PORT"],
    "gunicorn": ["gunicorn", "--worker-class", "gthread", "--threads", "16", "--bind", "127.0.0.1:PORT", "app"],
    "uvicorn": ["uvicorn", "app:app", "--port", "PORT"],
}


@unittest.skipUnless(IS_THERE, "the frameworks are not installed")
class FrameworkCase(ServerCase):
    def start(self, application: str, server: str) -> int:
        """Run an application of the README's; its port."""
        (self.folder / "app.py").write_text(application)
        port = free_port()
        words = [word.replace("PORT", str(port)) for word in SERVERS[server]]
        if server == "gunicorn" and "\napp = " in application:
            words[-1] = "app:app"
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{self.folder}", "PYTHONDONTWRITEBYTECODE": "1"}
        log = open(self.folder / "log", "wb")  # noqa: SIM115
        self.addCleanup(log.close)
        process = subprocess.Popen(
            [PYTHON or sys.executable, "-m", *words], cwd=self.folder, env=env, stdout=log, stderr=log
        )

        def end() -> None:
            process.terminate()
            try:
                process.wait(10)
            finally:
                process.kill()
                process.wait()

        self.addCleanup(end)

        def is_listening() -> bool:
            if process.poll() is not None:
                raise AssertionError((self.folder / "log").read_text())
            try:
                Raw(("127.0.0.1", port)).sock.close()
            except ConnectionRefusedError:
                return False
            return True

        wait_until(is_listening, f"{server} listens", 20)
        return port

    def ask(self, port: int, path: str) -> Answer:
        with Raw(("127.0.0.1", port)) as client:
            client.get(path)
            return client.read_answer()

    def watch(self, port: int, path: str, first: bytes, last: bytes, seconds: float) -> None:
        """See that a line arrives long before the last one does, and hear it out: who hangs up earlier ends the run."""
        with Raw(("127.0.0.1", port)) as client:
            client.get(path)
            client.read_until(first)
            started = time.monotonic()
            self.assertNotIn(last, client.buffer)
            client.read_until(last)
            self.assertGreater(time.monotonic() - started, seconds)
            client.read_until(b"0\r\n\r\n")

    def ended(self, port: int, kind: str) -> int:
        """How many builds have ended in a way."""
        found = re.search(
            rb'runs_total{command="build",outcome="%b"} (\d+)' % kind.encode(), self.ask(port, METRICS).body
        )
        return int(found[1]) if found else 0


METRICS = "/ops/-/metrics"


class Flask(FrameworkCase):
    def check(self, server: str) -> None:
        port = self.start(block("python", "flask.Flask"), server)
        self.assertEqual(self.ask(port, "/count/3").body, b"1\n2\n3\n")
        refused = self.ask(port, "/count/x")
        self.assertEqual((refused.status, refused.body), (400, b"parameter 'upto' of 'stream' must be int: 'x'\n"))
        self.watch(port, "/ops/build", b"step 1\n", b"step 6\n", 2)
        wait_until(lambda: self.ended(port, "ok") == 1, "it has ended by itself")
        with Raw(("127.0.0.1", port)) as client:
            client.get("/ops/build")
            client.read_until(b"step 2\n")
        wait_until(lambda: self.ended(port, "client_gone") == 1, "it ends with the next output", 3)
        self.assertEqual(self.ask(port, "/ops").status, 308)

    def test_it_streams_under_werkzeug(self) -> None:
        self.check("werkzeug")

    def test_it_streams_under_gunicorn(self) -> None:
        self.check("gunicorn")


@unittest.skipUnless(browser.IS_THERE, "no Chromium with its driver")
class FlaskInABrowser(FrameworkCase, BrowserCase):
    def test_its_page_starts_and_stops_a_background_command_and_shows_stdout_and_stderr(self) -> None:
        port = self.start(block("python", "flask.Flask"), "gunicorn")
        self.browser.open(f"http://localhost:{port}/ops/")
        self.see("document.title.startsWith('streamlog')", "the page")
        self.browser.click("[aria-label='Start build']")
        self.see("/step 2/.test(frames.view.document.body.innerText)", "standard output")
        self.assertEqual(self.browser.run("frames.view.document.querySelector('samp.e').innerText.trim()"), "note 1")
        self.browser.click("[aria-label='Stop build']")
        wait_until(lambda: self.ended(port, "client_gone") == 1, "it is stopped", 5)
        self.assertEqual(self.ended(port, "ok"), 0)

    def test_its_eventsource_page_follows_a_command_to_its_end(self) -> None:
        port = self.start(block("python", "flask.Flask"), "werkzeug")
        self.browser.open(f"http://localhost:{port}/")
        self.see("log.textContent == 'step 1\\n'", "the first line, alone")
        self.see("log.textContent.endsWith('step 6\\n')", "the last")
        self.see("source.readyState == EventSource.CLOSED", "the end")
        self.assertEqual((self.ended(port, "ok"), self.ended(port, "client_gone")), (1, 0))
        self.assertEqual(self.ask(port, "/ops/build?format=ndjson").body.count(b'"stream": "stderr"'), 6)


class Django(FrameworkCase):
    def test_a_view_streams_the_log_of_a_long_operation(self) -> None:
        port = self.start(block("python", "django.urls"), "gunicorn")
        self.watch(port, "/migrate/4", b"WARNING migrate: step 1 of 4\n", b"WARNING migrate: step 4 of 4\n", 1)
        self.assertEqual(self.ask(port, "/migrate/1").body, b"WARNING migrate: step 1 of 1\n")


class Starlette(FrameworkCase):
    def test_a_response_streams_a_command(self) -> None:
        port = self.start(block("python", "starlette"), "uvicorn")
        self.watch(port, "/build", b"step 1\n", b"step 6\n", 2)
