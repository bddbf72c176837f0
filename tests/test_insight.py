"""What a program that has streamlog inside tells of itself: its log, its threads' stacks, its loggers' levels."""

from __future__ import annotations

import asyncio
import datetime
import gc
import json
import logging
import logging.config
import os
import re
import subprocess
import sys
import threading
import time
from typing import Any
from unittest import mock

import streamlog
from streamlog import Command

from .support import ROOT, SOAK, Raw, wait_until
from .test_embedding import EmbeddingCase


class InsightCase(EmbeddingCase):
    def setUp(self) -> None:
        super().setUp()
        self.logger = self.make_logger("of.program")

    def make_logger(self, name: str, propagate: bool = True) -> logging.Logger:
        """A logger that is gone, as far as logging knows, when the test is over."""
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        logger.propagate = propagate
        self.addCleanup(logging.Logger.manager.loggerDict.pop, name)
        return logger

    def watch(self, server: streamlog.Server, query: str = "") -> Raw:
        """A client that follows the log: the head of the answer is sent once it does."""
        client = self.connect(server)
        client.get(f"/log?{query}")
        client.read_head()
        return client

    def said(self, client: Raw) -> str:
        """The next chunk, without the times."""
        chunk = client.read_chunk() or b""
        return re.sub(r"(?m)^\d{4}-\S+ ", "", chunk.decode())


class Log(InsightCase):
    def test_records_are_followed_as_they_come(self) -> None:
        server = self.start({})
        client = self.watch(server)
        for number in range(3):
            self.logger.info("record %d", number)
            self.assertEqual(self.said(client), f"INFO of.program: record {number}\n")

    def test_a_record_has_its_time_and_its_traceback(self) -> None:
        client = self.watch(self.start({}))
        try:
            raise ValueError("broken")
        except ValueError:
            self.logger.exception("it is", stack_info=True)
        chunk = client.read_chunk() or b""
        self.assertRegex(
            chunk, rb"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d ERROR of\.program: it is\nTraceback "
        )
        self.assertIn(b"\nValueError: broken\nStack (most recent call last):\n", chunk)

    def test_logging_is_watched_only_while_somebody_looks(self) -> None:
        server = self.start({})
        before = logging.Logger.callHandlers
        with self.watch(server) as one, self.watch(server) as two:
            self.assertIsNot(logging.Logger.callHandlers, before)
            one.sock.close()
            self.logger.info("seen")
            self.assertEqual(self.said(two), "INFO of.program: seen\n")
        wait_until(lambda: logging.Logger.callHandlers is before, "it is gone")

    def test_the_newest_records_come_first_where_they_are_kept(self) -> None:
        server = self.start({}, log=10_000)
        for number in range(100):
            self.logger.info("record %d", number)
        self.assertEqual(self.fetch(server, "/log?tail=2&follow=0").body.count(b"\n"), 2)
        client = self.watch(server, "tail=2")
        said = ""
        while "record 99\n" not in said:
            said += self.said(client)
        self.assertEqual(said, "INFO of.program: record 98\nINFO of.program: record 99\n")
        self.logger.info("record 100")
        self.assertEqual(self.said(client), "INFO of.program: record 100\n")

    def test_what_is_kept_is_bounded_by_bytes_and_of_a_record_too(self) -> None:
        server = self.start({}, log=10_000)
        self.logger.info("y" * 1_000_000)
        self.assertEqual(self.fetch(server, "/log?tail=1&follow=0").body.count(b"y"), 64 * 1024)
        for number in range(20_000):
            self.logger.info("%s %d", "x" * 100, number)
        body = self.fetch(server, "/log?tail=99999&follow=0").body
        numbers = [int(line.split()[-1]) for line in body.splitlines()]
        self.assertEqual(numbers, list(range(numbers[0], 20_000)))
        self.assertTrue(900_000 < len(body) <= 1 << 20, len(body))

    def test_a_look_at_much_that_is_kept_holds_up_no_logging(self) -> None:
        server = self.start({}, log=1 << 20)
        for number in range(100):
            (self.logger if number % 2 else logging.root).info("kept")
        is_looking, is_logged = threading.Event(), threading.Event()
        waited: list[bool] = []

        def read(*arguments: Any, real: Any = streamlog.Transcript.read) -> Any:
            if not is_looking.is_set():
                is_looking.set()
                waited.append(is_logged.wait(10))
            return real(*arguments)

        with mock.patch.object(streamlog.Transcript, "read", read):
            thread = threading.Thread(target=self.fetch, args=(server, "/log?tail=1&follow=0"))
            thread.start()
            self.assertTrue(is_looking.wait(10))
            self.logger.info("meanwhile")
            is_logged.set()
            thread.join()
        self.assertEqual(waited, [True])

    def test_level_and_logger_choose_and_change_nothing(self) -> None:
        other = self.make_logger("other")
        below = self.make_logger("of.program.part")
        self.make_logger("of.programming").propagate = True
        server = self.start({})
        self.logger.setLevel(logging.INFO)
        by_level = self.watch(server, "level=warning")
        by_number = self.watch(server, "level=30")
        by_logger = self.watch(server, "logger=of.program&level=DEBUG")
        for logger in (self.logger, other, below, logging.getLogger("of.programming")):
            logger.debug("d")
            logger.warning("w")
        said = {"of.program": "", "other": "", "level": "", "number": ""}
        while "programming: w\n" not in said["level"]:
            said["level"] += self.said(by_level)
        while "programming: w\n" not in said["number"]:
            said["number"] += self.said(by_number)
        while "part: w\n" not in said["of.program"]:
            said["of.program"] += self.said(by_logger)
        names = ("of.program", "other", "of.program.part", "of.programming")
        self.assertEqual(said["level"], "".join(f"WARNING {name}: w\n" for name in names))
        self.assertEqual(said["number"], said["level"])
        wanted = "WARNING of.program: w\nDEBUG of.program.part: d\nWARNING of.program.part: w\n"
        self.assertEqual(said["of.program"], wanted)
        self.assertEqual(self.logger.level, logging.INFO)

    def test_a_logger_that_passes_nothing_on_is_followed_where_it_is_named(self) -> None:
        self.make_logger("closed", propagate=False)
        before = logging.Logger.callHandlers
        server = self.start({})
        with self.watch(server, "logger=closed.below") as client:
            below = self.make_logger("closed.below")
            below.info("seen")
            self.assertEqual(self.said(client), "INFO closed.below: seen\n")
        wait_until(lambda: logging.Logger.callHandlers is before, "it is gone")

    def test_mistakes_are_told(self) -> None:
        server = self.start({})
        for query, told in (
            ("level=loud", b"a level is DEBUG, INFO"),
            ("tail=x", b"must be int"),
            ("follow=2", b"must be 1|0"),
            ("lines=1", b"no parameter 'lines'"),
        ):
            with self.subTest(query=query):
                answer = self.fetch(server, f"/log?{query}")
                self.assertEqual(answer.status, 400)
                self.assertIn(told, answer.body)

    def test_all_formats_hold_for_the_log(self) -> None:
        server = self.start({}, log=1000)
        self.logger.error("<told>")
        query = "/log?follow=0&format="
        self.assertIn(b"ERROR of.program: &lt;told&gt;\n</samp>", self.fetch(server, f"{query}html").body)
        self.assertIn(b"ERROR of.program: <told>\n\n", self.fetch(server, f"{query}sse").body)
        answer = self.fetch(server, f"{query}ndjson")
        lines = [json.loads(line) for line in answer.body.splitlines()]
        known = {key: lines[0][key] for key in ("level", "logger", "thread", "line")}
        told = {"level": "ERROR", "logger": "of.program", "thread": "MainThread", "line": "<told>"}
        self.assertEqual(known, told)
        self.assertEqual((lines[1]["exit_code"], answer.trailers), (0, {"Exit-Code": "0"}))

    def test_its_own_access_log_is_seen_only_where_it_is_asked_for(self) -> None:
        own = logging.getLogger("streamlog")
        self.addCleanup(own.setLevel, own.level)
        own.setLevel(logging.DEBUG)
        server = self.start({"x": "true"}, log=10_000)
        everything, asked = self.watch(server), self.watch(server, "logger=streamlog")
        for _ in range(3):
            self.fetch(server, "/x")
        self.logger.info("afterwards")
        self.assertEqual(self.said(everything), "INFO of.program: afterwards\n")
        said = ""
        while said.count('request="GET /x HTTP/1.1"') < 3:
            said += self.said(asked)
        time.sleep(0.2)  # whatever would come of that is there by then
        self.logger.info("the end")
        self.assertEqual(self.said(everything), "INFO of.program: the end\n")
        self.assertNotIn("GET /log", said)

    def test_a_slow_viewer_is_told_how_many_bytes_it_lost_and_nobody_waits(self) -> None:
        server = self.start({})
        client = self.connect(server, receive_buffer=4096)
        client.get("/log")
        client.read_head()
        count = 60_000
        slowest = 0.0
        for number in range(count):
            started = time.perf_counter()
            self.logger.info("%06d %s", number, "x" * 100)
            slowest = max(slowest, time.perf_counter() - started)
            if number % 1000 == 0:
                time.sleep(0.005)
        self.logger.info("the end")
        self.assertLess(slowest, 10)
        got = b""
        while b"the end\n" not in got:
            got += client.read_chunk() or b""
        lost = sum(map(int, re.findall(rb"\[(\d+) bytes are no longer kept\]\n", got)))
        found = re.sub(rb"\n?\[\d+ bytes are no longer kept\]\n", b"", got)
        size = len(re.search(rb"(?m)^2\d{3}-.* 000000 x+\n", got)[0])  # type: ignore[index]
        self.assertGreater(lost, 0)
        self.assertLess(abs(len(found) + lost - count * size), 2 * size)  # the last record is shorter
        self.logger.info("again")
        wait_until(lambda: b"again" in (client.read_chunk() or b""), "it goes on")

    def test_a_hundred_viewers_see_every_record_once_and_in_order(self) -> None:
        server = self.start({}, max_runs=200)
        clients = [self.watch(server) for _ in range(100 if SOAK >= 1000 else 20)]

        def log(name: str) -> None:
            for number in range(50):
                self.logger.info("%s %d", name, number)
                time.sleep(0.001)

        threads = [threading.Thread(target=log, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for client in clients:
            lines: list[str] = []
            while len(lines) < 150:
                lines += self.said(client).splitlines()
            for name in "abc":
                mine = [line for line in lines if line.split()[2] == name]
                self.assertEqual(mine, [f"INFO of.program: {name} {number}" for number in range(50)])

    def test_logging_goes_on_as_it_was(self) -> None:
        script = (
            "import logging, streamlog, socket, sys\n"
            "def look(server):\n"
            "    client = socket.create_connection(('127.0.0.1', server.port))\n"
            "    client.sendall(b'GET /log?level=ERROR HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n')\n"
            "    while b'\\r\\n\\r\\n' not in client.recv(9999, socket.MSG_PEEK): pass\n"
            "    return client\n"
            "with streamlog.start({}, port=0) as one, streamlog.start({}, port=0, log=1000) as two:\n"
            "    clients = [look(one), look(two)]\n"
            "    logging.getLogger('x').warning('once')\n"
            "    logging.getLogger('x').info('never')\n"
            "    class Plain(logging.Formatter):\n"
            "        def formatException(self, info): return 'mine'\n"
            "    handler = logging.StreamHandler(); handler.setFormatter(Plain())\n"
            "    logging.root.addHandler(handler)\n"
            "    try: 1 / 0\n"
            "    except ZeroDivisionError: logging.exception('told')\n"
            "    logging.root.removeHandler(handler)\n"
            "    logging.warning('%d', 'x')\n"
            "print(logging.root.handlers, logging.root.level)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=-1, stderr=-1, text=True, timeout=20)
        self.assertTrue(done.stderr.startswith("once\ntold\nmine\n--- Logging error ---\n"), done.stderr)
        self.assertEqual(done.stderr.count("Logging error"), 1)
        self.assertEqual(done.stdout, "[<StreamHandler <stderr> (NOTSET)>] 30\n")  # which logging itself has made

    def test_records_that_do_not_propagate_are_seen_too(self) -> None:
        closed = self.make_logger("closed.off", propagate=False)

        def task() -> None:
            closed.info("from a task")

        server = self.start({"task": task}, log=10_000)
        with self.watch(server) as client:
            self.assertEqual(self.fetch(server, "/task").body, b"INFO closed.off: from a task\n")
            self.assertEqual(self.said(client), "INFO closed.off: from a task\n")
            closed_off = {"closed.off": {"propagate": False, "level": "INFO"}}
            logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "loggers": closed_off})
            closed.info("afterwards")
            self.assertEqual(self.said(client), "INFO closed.off: afterwards\n")

    def test_a_patch_of_logging_that_is_taken_back_does_not_deafen_tasks(self) -> None:
        def task() -> None:
            patch.stop()
            self.logger.info("first")

        server = self.start({"first": task, "second": lambda: self.logger.info("second")})
        patch = mock.patch.object(logging.Logger, "callHandlers", logging.Logger.callHandlers)
        patch.start()
        self.fetch(server, "/first")
        self.assertEqual(self.fetch(server, "/second").body, b"INFO of.program: second\n")

    def test_each_line_of_ndjson_has_what_its_record_has(self) -> None:
        server = self.start({}, log=10_000)
        record = logging.makeLogRecord(
            {"created": 86400.25, "levelno": 30, "levelname": "WARNING", "msg": "a INFO b: c\nd"}
        )
        record.name, record.threadName = "of.program", "some thread"
        self.logger.handle(record)
        lines = self.fetch(server, "/log?follow=0&format=ndjson").body.splitlines()
        times = {json.loads(line)["time"] for line in lines[:2]}
        self.assertEqual({datetime.datetime.fromisoformat(time).timestamp() for time in times}, {86400.25})
        told = [{key: json.loads(line)[key] for key in ("level", "logger", "thread", "line")} for line in lines[:2]]
        common = {"level": "WARNING", "logger": "of.program", "thread": "some thread"}
        self.assertEqual(told, [{**common, "line": "a INFO b: c"}, {**common, "line": "d"}])

    def test_logging_that_is_configured_anew_is_followed_all_the_same(self) -> None:
        before = list(logging.root.handlers)
        self.addCleanup(setattr, logging.root, "handlers", before)
        server = self.start({}, log=10_000)
        with self.watch(server):
            logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "root": {"handlers": []}})
        client = self.watch(server)
        self.logger.info("seen")
        self.assertEqual(self.said(client), "INFO of.program: seen\n")

    def test_a_forked_worker_keeps_a_log_of_its_own(self) -> None:
        script = (
            "import logging, os, streamlog\n"
            "app = streamlog.wsgi({}, log=1000)\n"
            "def ask():\n"
            "    environ = {'REQUEST_METHOD': 'GET', 'PATH_INFO': '/log', 'QUERY_STRING': 'follow=0',\n"
            "               'HTTP_HOST': 'localhost', 'wsgi.url_scheme': 'http'}\n"
            "    return ' '.join(b''.join(app(environ, lambda *_: None)).decode().split()[3::4])\n"
            "logging.warning('before')\n"
            "pid = os.fork()\n"
            "if pid: os.waitpid(pid, 0)\n"
            "logging.warning('parent' if pid else 'child')\n"
            "print(len(logging.root.handlers), ask(), flush=True)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=-1, stderr=-1, text=True, timeout=20)
        self.assertEqual(done.stdout, "1 child\n1 before parent\n", done.stderr)


class Stacks(InsightCase):
    def test_every_thread_is_shown_with_its_name_and_where_it_is(self) -> None:
        gate = threading.Event()

        def hang_here() -> None:
            gate.wait(10)

        thread = threading.Thread(target=hang_here, name="the one that hangs", daemon=True)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(gate.set)
        server = self.start({})
        shown = r"\nthe one that hangs \(daemon\), thread \d+\n(?s:.*)in hang_here\n    gate\.wait\(10\)\n"
        body = wait_until(lambda: self.look(server, shown), "it hangs")
        self.assertTrue(body.startswith("MainThread, thread "), body[:100])

    def look(self, server: streamlog.Server, pattern: str) -> str:
        """The stacks, once something is to be seen in them."""
        body = self.fetch(server, "/stacks").body.decode()
        return body if re.search(pattern, body) else ""

    def test_every_asyncio_task_is_shown_with_where_it_waits(self) -> None:
        async def inner(event: asyncio.Event) -> None:
            await event.wait()

        async def outer(event: asyncio.Event) -> None:
            await inner(event)

        async def program(ready: threading.Event, done: threading.Event) -> None:
            event = asyncio.Event()
            tasks = [asyncio.create_task(outer(event)) for _ in range(2)]
            for task in tasks:
                task.set_name("the one that waits")
            await asyncio.sleep(0)
            ready.set()
            while not done.is_set():
                await asyncio.sleep(0.01)
            event.set()
            await asyncio.gather(*tasks)

        async def busy(ready: threading.Event, done: threading.Event) -> None:
            ready.set()
            done.wait(10)

        server, done = self.start({}), threading.Event()
        threads = []
        for main in (program, busy):
            ready = threading.Event()
            threads.append(threading.Thread(target=lambda main=main, ready=ready: asyncio.run(main(ready, done))))
            threads[-1].start()
            self.assertTrue(ready.wait(5))
        body = wait_until(lambda: self.look(server, r"runs\n(?s:.*)done\.wait\(10\)"), "one is busy")
        done.set()
        for thread in threads:
            thread.join()
        shown = body.split("\n\n")
        waiting = [one for one in shown if one.startswith("the one that waits, asyncio task, waits\n")]
        self.assertEqual(len(waiting), 2, body)
        for one in waiting:
            self.assertRegex(one, r"(?s)in outer\n    await inner\(event\)\n.*in inner\n    await event\.wait\(\)\n")
        self.assertTrue(any(re.match(r"Task-\d+, asyncio task, runs\n(?s:.*)done\.wait\(10\)", one) for one in shown))
        self.assertNotRegex(self.fetch(server, "/stacks").body, b"(?m)^.*, asyncio task, (waits|runs)$", "all are over")

    def test_values_of_tasks_do_not_show(self) -> None:
        gate, begun = threading.Event(), threading.Semaphore(0)

        def task(password: str) -> None:
            begun.release()
            gate.wait(10)

        server = self.start({"task": task})
        client = self.connect(server)
        client.get("/task?password=hunter2")
        self.assertEqual(self.fetch(server, "/task?password=hunter3&async=1").status, 202)
        begun.acquire(timeout=10), begun.acquire(timeout=10)
        body = self.fetch(server, "/stacks").body
        gate.set()
        self.assertEqual(body.count(b"<locals>.task (daemon)"), 2, body)
        self.assertNotIn(b"hunter", body)

    def test_it_answers_while_locks_of_logging_are_held_and_all_slots_are_taken(self) -> None:
        server = self.start({"x": Command("sleep 60")}, max_runs=1)
        client = self.connect(server)
        client.get("/x")
        client.read_head()
        handler = logging.FileHandler(os.devnull)
        self.addCleanup(handler.close)
        logging.root.addHandler(handler)
        self.addCleanup(logging.root.removeHandler, handler)
        lock: Any = logging._lock  # type: ignore[attr-defined]
        gc.collect()  # logging forgets a handler that is collected under its lock, in whatever thread that happens
        handler.acquire()
        lock.acquire()
        try:
            self.assertIn(b"MainThread", self.fetch(server, "/stacks").body)
        finally:
            lock.release()
            handler.release()

    def test_it_shows_a_program_that_hangs_in_c(self) -> None:
        script = (
            "import streamlog, time\n"
            "def stuck(): print(server.port, flush=True); time.sleep(60)\n"
            "server = streamlog.start({}, port=0); stuck()\n"
        )
        process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=-1, text=True)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        assert process.stdout
        with Raw(("127.0.0.1", int(process.stdout.readline()))) as client:
            client.get("/stacks")
            self.assertIn(b"in stuck\n", client.read_answer().body)


class Levels(InsightCase):
    BEARER = "Authorization: Bearer secret"

    def test_a_level_is_shown_and_set(self) -> None:
        server = self.start({}, token="secret")
        self.make_logger("of.program.part").setLevel(logging.NOTSET)
        part = "/level?logger=of.program.part"
        self.assertEqual(self.fetch(server, part, headers=[self.BEARER]).body, b"of.program.part DEBUG\n")
        for method, path, body, told in (
            ("PUT", "/level?logger=of.program&level=error", b"", b"of.program ERROR\n"),
            ("POST", "/level", b"logger=of.program&level=15", b"of.program Level 15\n"),
            ("PUT", "/level?logger=of.program", b"level=INFO", b"of.program INFO\n"),
        ):
            headers = ["Content-Type: application/x-www-form-urlencoded"] if body else []
            answer = self.fetch(server, path, method, [self.BEARER, *headers], body)
            self.assertEqual(answer.status, 200)
            shown = self.fetch(server, "/level", headers=[self.BEARER]).body
            self.assertIn(told, shown)
            self.assertTrue(shown.startswith(b"root "))
        self.assertEqual(self.logger.level, logging.INFO)
        self.assertEqual(self.fetch(server, part, headers=[self.BEARER]).body, b"of.program.part INFO\n")

    def test_without_a_token_they_are_only_shown(self) -> None:
        server = self.start({})
        for method in ("PUT", "POST"):
            answer = self.fetch(server, "/level?logger=of.program&level=ERROR", method)
            self.assertEqual((answer.status, answer.headers["allow"]), (405, "GET, HEAD, OPTIONS"))
        self.assertEqual(self.logger.level, logging.DEBUG)
        self.assertIn(b"of.program DEBUG\n", self.fetch(server, "/level").body)
        page = self.fetch(server, "/", headers=["Accept: text/html"]).body
        self.assertIn(b"where there is a token", page)

    def test_what_is_wrong_sets_nothing(self) -> None:
        server = self.start({}, token="secret")
        for method, query, status, told in (
            ("PUT", "logger=of.program&level=loud", 400, b"a level is DEBUG"),
            ("PUT", "logger=of.program", 400, b"parameter 'level' of 'level' is required"),
            ("PUT", "logger=of.nobody&level=INFO", 404, b"there is no logger 'of.nobody' (yet)"),
            ("GET", "logger=of.nobody", 404, b"there is no logger"),
            ("GET", "logger=of.program&level=INFO", 400, b"no parameter 'level'"),
            ("DELETE", "", 405, b"takes GET, HEAD, OPTIONS, POST, PUT, not DELETE"),
        ):
            with self.subTest(method=method, query=query):
                answer = self.fetch(server, f"/level?{query}", method, [self.BEARER])
                self.assertEqual(answer.status, status)
                self.assertIn(told, answer.body)
        self.assertEqual(self.logger.level, logging.DEBUG)
        self.assertNotIn("of.nobody", logging.Logger.manager.loggerDict)

    def test_another_site_s_page_and_one_without_the_token_set_nothing(self) -> None:
        server = self.start({}, token="secret")
        path = "/level?logger=of.program&level=ERROR"
        self.assertEqual(self.fetch(server, path, "PUT").status, 401)
        headers = ["Authorization: Bearer secret", "Origin: http://evil.example"]
        self.assertEqual(self.fetch(server, path, "PUT", headers).status, 403)
        self.assertEqual(self.logger.level, logging.DEBUG)


class Names(InsightCase):
    def test_a_command_of_that_name_wins(self) -> None:
        server = self.start({"log": "echo mine", "level": "echo level"})
        self.assertEqual(self.fetch(server, "/log").body, b"mine\n")
        self.assertEqual(self.fetch(server, "/level", "PUT").status, 405)
        self.assertIn(b"MainThread", self.fetch(server, "/stacks").body)
        listed = json.loads(self.fetch(server, "/", headers=["Accept: application/json"]).body)["commands"]
        self.assertEqual([command["name"] for command in listed], ["log", "level", "stacks"])

    def test_they_can_be_left_out(self) -> None:
        server = self.start({"x": "true"}, insight=False)
        self.assertEqual(self.fetch(server, "/stacks").status, 404)

    def test_they_are_on_the_index_page_and_head_runs_nothing(self) -> None:
        server = self.start({})
        page = self.fetch(server, "/", headers=["Accept: text/html"]).body
        for name in (b"log", b"stacks", b"level"):
            self.assertIn(b'<form action="%b"' % name, page)
            answer = self.fetch(server, f"/{name.decode()}", "HEAD")
            self.assertEqual((answer.status, answer.body), (200, b""))
