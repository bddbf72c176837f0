"""The README's applications of Flask, Django, FastAPI and others, run by the servers that people run them by.

Skipped where those are not installed; STREAMLOG_FRAMEWORKS names a Python that has them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import unittest
from unittest import mock

from . import browser
from .support import ROOT, Answer, Raw, ServerCase, wait_until
from .test_browser import BrowserCase
from .test_deployment import block, free_port

PYTHON = os.environ.get("STREAMLOG_FRAMEWORKS", "")
NAMES = ("flask", "gunicorn", "django", "fastapi", "uvicorn", "celery", "pytest")
IS_THERE = bool(PYTHON) or all(map(importlib.util.find_spec, NAMES))
SERVERS = {
    "werkzeug": ["flask", "--app", "app", "run", "--port", "PORT"],
    "gunicorn": ["gunicorn", "--worker-class", "gthread", "--threads", "16", "--bind", "127.0.0.1:PORT", "app"],
    "uvicorn": ["uvicorn", "app:app", "--port", "PORT", "--timeout-graceful-shutdown", "1"],
    "uvicorn for Django": ["uvicorn", "app:asgi", "--port", "PORT"],
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
        process = self.process = subprocess.Popen(
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

    def watch(self, port: int, path: str, first: bytes, last: bytes) -> None:
        """See that a line arrives long before the last one does, and hear it out: who hangs up earlier ends the run."""
        with Raw(("127.0.0.1", port)) as client:
            client.get(path)
            client.read_until(first)
            started = time.monotonic()
            self.assertNotIn(last, client.buffer)
            client.read_until(last)
            self.assertGreater(time.monotonic() - started, 0.5)
            client.read_until(b"0\r\n\r\n")

    def ended(self, port: int, kind: str) -> int:
        """How many builds have ended in a way."""
        found = re.search(
            rb'runs_total{command="build",outcome="%b"} (\d+)' % kind.encode(), self.ask(port, METRICS).body
        )
        return int(found[1]) if found else 0


METRICS = "/ops/-/metrics"


SLEEP = "sleep 3601.25"  # which nobody else runs


def sleepers() -> list[str]:
    """The processes that a test's applications have left asleep."""
    return subprocess.run(["pgrep", "-fx", SLEEP], stdout=-1, text=True).stdout.split()


class Flask(FrameworkCase):
    def check(self, server: str) -> None:
        port = self.start(block("python", "DispatcherMiddleware"), server)
        self.assertEqual(self.ask(port, "/count/3").body, b"1\n2\n3\n")
        refused = self.ask(port, "/count/x")
        self.assertEqual((refused.status, refused.body), (400, b"parameter 'upto' of 'stream' must be int: 'x'\n"))
        self.watch(port, "/ops/build", b"step 1\n", b"step 6\n")
        wait_until(lambda: self.ended(port, "ok") == 1, "it has ended by itself")
        with Raw(("127.0.0.1", port)) as client:
            client.get("/ops/build")
            client.read_until(b"step 2\n")
        wait_until(lambda: self.ended(port, "client_gone") == 1, "it ends with the next output")
        self.assertEqual(self.ask(port, "/ops").status, 308)

    def test_the_small_one_of_the_recipes(self) -> None:
        port = self.start(block("python", "mimetype").partition("/count/")[0], "werkzeug")
        answer = self.ask(port, "/disk")
        self.assertEqual(answer.headers["content-type"], "text/plain; charset=utf-8")
        self.assertIn(b"Filesystem", answer.body)

    def test_it_streams_under_werkzeug(self) -> None:
        self.check("werkzeug")

    def test_it_streams_under_gunicorn(self) -> None:
        self.check("gunicorn")

    def test_ctrl_c_ends_gunicorn_at_once_with_what_its_threads_wait_for(self) -> None:
        application = block("python", "DispatcherMiddleware")
        application += f"@app.get('/s')\ndef s(): return flask.Response(streamlog.stream('{SLEEP}'))\n"
        port = self.start(application, "gunicorn")
        with Raw(("127.0.0.1", port)) as client:
            client.get("/s")
            wait_until(sleepers, "it runs")
            started = time.monotonic()
            self.process.send_signal(signal.SIGINT)
            self.process.wait(20)
            self.assertLess(time.monotonic() - started, 8)  # it would wait for 30 s
        self.assertEqual(sleepers(), [])

    def test_under_gunicorn_a_silent_page_is_found_to_have_been_left(self) -> None:
        application = f"import streamlog\napp = streamlog.wsgi({{'s': '{SLEEP}'}}, heartbeat_seconds=0.5)\n"
        port = self.start(application, "gunicorn")
        for path in ("/s?format=html", "/s"):
            with Raw(("127.0.0.1", port)) as client:
                client.get(path)
                client.read_until(b"[still running, silent for ")
            wait_until(lambda: not sleepers(), "it has ended", 15)

    def test_each_worker_of_gunicorn_has_diagnostics_of_its_own(self) -> None:
        hooks = block("python", "post_worker_init").replace("/tmp/app-", f"{self.folder}/app-")
        (self.folder / "gunicorn.conf.py").write_text(hooks)
        with mock.patch.dict(SERVERS, {"gunicorn": [*SERVERS["gunicorn"][:-1], "-w", "2", "app"]}):
            self.start(block("python", "DispatcherMiddleware"), "gunicorn")
        wait_until(lambda: len(list(self.folder.glob("app-*.sock"))) == 2, "each listens")
        pids = set()
        for path in self.folder.glob("app-*.sock"):
            with Raw(str(path)) as client:
                client.get("/stacks")
                self.assertIn(b"gunicorn", client.read_answer().body)
            pids.add(path.stem)
        self.assertEqual(len(pids), 2)
        self.process.terminate()
        self.process.wait(10)
        self.assertEqual(list(self.folder.glob("app-*.sock")), [])


@unittest.skipUnless(browser.IS_THERE, "no Chromium with its driver")
class FlaskInABrowser(FrameworkCase, BrowserCase):
    def test_its_page_starts_and_stops_a_background_command_and_shows_stdout_and_stderr(self) -> None:
        port = self.start(block("python", "DispatcherMiddleware"), "gunicorn")
        self.browser.open(f"http://localhost:{port}/ops/")
        self.see("document.title.startsWith('streamlog')", "the page")
        self.browser.click("[aria-label='Start build']")
        self.see("/step 2/.test(frames.view.document.body.innerText)", "standard output")
        self.assertEqual(self.browser.run("frames.view.document.querySelector('samp.e').innerText.trim()"), "note 1")
        self.browser.run("frames.view.document.querySelector('header button').click()")
        self.see("/Start a command/.test(frames.view.document.body.innerText)", "the idle page")
        wait_until(lambda: self.ended(port, "client_gone") == 1, "it is stopped")
        self.assertEqual(self.ended(port, "ok"), 0)

    def test_its_eventsource_page_follows_a_command_to_its_end(self) -> None:
        port = self.start(block("python", "DispatcherMiddleware"), "werkzeug")
        self.browser.open(f"http://localhost:{port}/")
        self.see("/^step 1(?!.*step 6)/s.test(log.textContent)", "the first line, and not the last")
        self.see("log.textContent.endsWith('step 6\\n')", "the last")
        self.see("source.readyState == EventSource.CLOSED", "the end")
        self.assertEqual((self.ended(port, "ok"), self.ended(port, "client_gone")), (1, 0))
        self.assertEqual(self.ask(port, "/ops/build?format=ndjson").body.count(b'"stream": "stderr"'), 6)


class Django(FrameworkCase):
    def test_a_view_streams_the_log_of_a_long_operation(self) -> None:
        port = self.start(block("python", "django.urls"), "gunicorn")
        self.watch(port, "/migrate/4", b"WARNING migrate: step 1 of 4\n", b"WARNING migrate: step 4 of 4\n")
        self.assertEqual(self.ask(port, "/migrate/1").body, b"WARNING migrate: step 1 of 1\n")

    def test_a_coroutine_streams_too(self) -> None:
        port = self.start(block("python", "django.urls"), "uvicorn for Django")
        self.watch(port, "/build", b"step 1\n", b"step 6\n")


class FastApi(FrameworkCase):
    def application(self) -> str:
        more = f"@app.get('/s')\nasync def s(): return StreamingResponse(streamlog.stream('{SLEEP}'))\n"
        return block("python", "fastapi") + more + "@app.get('/other')\ndef other(): return 'ok'\n"

    def test_it_streams_and_refuses(self) -> None:
        port = self.start(self.application(), "uvicorn")
        self.watch(port, "/ping?host=127.0.0.1&count=3", b"seq=1", b"seq=3")
        refused = self.ask(port, "/ping?host=-x")
        self.assertEqual(refused.status, 400)
        self.assertIn(b"parameter 'host' of 'stream' must not begin with '-'", refused.body)

    def test_clients_of_silent_commands_that_leave_take_nothing_with_them(self) -> None:
        port = self.start(self.application(), "uvicorn")
        clients = [Raw(("127.0.0.1", port)) for _ in range(45)]
        for client in clients:
            self.addCleanup(client.sock.close)
            client.get("/s")
            client.read_head()
        self.assertEqual(len(sleepers()), 45)
        self.assertEqual(self.ask(port, "/other").body, b'"ok"')  # the thread pool is free
        for client in clients:
            client.sock.close()
        wait_until(lambda: not sleepers(), "all have ended", 15)
        self.assertEqual(self.ask(port, "/other").body, b'"ok"')

    def test_ctrl_c_ends_it(self) -> None:
        port = self.start(self.application(), "uvicorn")
        with Raw(("127.0.0.1", port)) as client:
            client.get("/s")
            client.read_head()
            self.process.send_signal(signal.SIGINT)
            self.process.wait(10)
        self.assertEqual(sleepers(), [])


STARLETTE = """
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route
import streamlog
async def build(request):
    run = streamlog.stream("!for i in 1 2 3 4 5 6; do echo step $i; sleep 0.5; done")
    return StreamingResponse(run, media_type="text/plain")
app = Starlette(routes=[Route("/build", build)])
"""


class Starlette(FrameworkCase):
    def test_it_streams(self) -> None:
        self.watch(self.start(STARLETTE, "uvicorn"), "/build", b"step 1\n", b"step 6\n")


PYTEST = f"""
import logging, pytest, streamlog, urllib.request
def task():
    logging.getLogger("app").warning("from a task")
@pytest.fixture
def server():
    with streamlog.start({{"task": task}}, port=0) as server:
        yield server
def test_it(server, caplog):
    assert urllib.request.urlopen(server.url + "/task").read() == b"WARNING app: from a task\\n"
    assert "from a task" in caplog.text
left = streamlog.stream("{SLEEP}")
"""


class Pytest(FrameworkCase):
    def test_a_server_is_a_fixture_and_what_is_left_open_ends_with_the_tests(self) -> None:
        (self.folder / "test_it.py").write_text(PYTEST)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        words = [PYTHON or sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
        done = subprocess.run(words, cwd=self.folder, env=env, stdout=-1, stderr=-2, timeout=60)
        self.assertIn(b"1 passed", done.stdout)
        self.assertEqual((done.returncode, sleepers()), (0, []))


CELERY = """
import os, sys
import celery, celery.signals, streamlog
app = celery.Celery(broker="filesystem://")
app.conf.broker_transport_options = dict.fromkeys(("data_folder_in", "data_folder_out", "control_folder"), "FOLDER")
@celery.signals.worker_process_init.connect
def begin(**_):
    global server
    server = streamlog.start({"who": f"echo {os.getpid()}"}, bind=f"unix:FOLDER/{os.getpid()}.sock")
@celery.signals.worker_process_shutdown.connect
def end(**_):
    server.close()
if __name__ == "__main__":
    app.worker_main(["worker", "-c", "2"])
"""


class Celery(FrameworkCase):
    def test_each_process_of_a_prefork_pool_has_diagnostics_of_its_own(self) -> None:
        (self.folder / "app.py").write_text(CELERY.replace("FOLDER", str(self.folder)))
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{self.folder}", "PYTHONDONTWRITEBYTECODE": "1"}
        worker = subprocess.Popen([PYTHON or sys.executable, "app.py"], cwd=self.folder, env=env, stdout=-3, stderr=-3)
        self.addCleanup(worker.wait, 10)
        self.addCleanup(worker.terminate)
        wait_until(lambda: len(list(self.folder.glob("*.sock"))) == 2, "each listens", 20)
        for path in self.folder.glob("*.sock"):
            with Raw(str(path)) as client:
                client.get("/who")
                self.assertEqual(client.read_answer().body, f"{path.stem}\n".encode())
