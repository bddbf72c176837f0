"""Inside a program: servers that it starts, and tasks that are its own functions."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import enum
import functools
import inspect
import io
import itertools
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Iterator
from typing import Any, Literal
from unittest import mock

import streamlog
from streamlog import Command, ConfigError, Settings

from .support import ROOT, SOAK, Raw, ServerCase, is_alive, try_connect, wait_until


class Colour(enum.Enum):
    RED = "red"
    GREEN = 2


def paint(name: str, times: int = 2, colour: Colour = Colour.RED, how: Literal["wet", "dry"] = "dry") -> Iterator[str]:
    """Paint a name.

    More of it is not shown.
    """
    for _ in range(times):
        yield f"{name} {colour} {how}\n"


# What programs that fork begin with.
FORKING = """
import logging, os, signal, socket, streamlog, threading, time, urllib.request
def ask(server, path): return urllib.request.urlopen(server.url + path, timeout=10).read()
def wait_until(condition):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if condition(): return True
        time.sleep(0.005)
    return False
def fork_off():
    pid = os.fork()
    if not pid: time.sleep(60); os._exit(0)
    return pid
def is_alive(pid): return os.waitpid(pid, os.WNOHANG)[0] == 0
def end(pid): os.kill(pid, 9); os.waitpid(pid, 0)
"""


class EmbeddingCase(ServerCase):
    def setUp(self) -> None:
        super().setUp()
        silence = logging.NullHandler()  # else what tasks log goes to stderr, as of a program that has no handler
        logging.getLogger().addHandler(silence)
        self.addCleanup(logging.getLogger().removeHandler, silence)

    def start(self, commands: Any, **settings: Any) -> streamlog.Server:
        server = streamlog.start(commands, **{"port": 0, "grace_seconds": 1.0, **settings})
        self.addCleanup(server.close)
        return server


class Starting(EmbeddingCase):
    def test_a_server_runs_beside_the_program_until_it_is_closed(self) -> None:
        with streamlog.start({"disk": "echo disk", "argv": ["echo", "a b", "{x=1}"], "task": paint}, port=0) as server:
            self.assertEqual(server.url, f"http://127.0.0.1:{server.port}")
            self.assertEqual(self.fetch(server, "/disk").body, b"disk\n")
            self.assertEqual(self.fetch(server, "/argv?x=2").body, b"a b 2\n")
            self.assertEqual(self.fetch(server, "/task?name=x&times=1").body, b"x Colour.RED dry\n")
        with self.assertRaises(ConnectionRefusedError):
            Raw(("127.0.0.1", server.port))
        server.close()

    def test_mistakes_are_raised_before_anything_listens(self) -> None:
        for commands, settings, told in (
            ({"x y": "true"}, {}, "a command's name is letters"),
            ({"x": "true {a:"}, {}, "command 'x': placeholder"),
            ({"x": ["true", "{a:foo}"]}, {}, "command 'x': parameter 'a' has an unknown type"),
            ({"x": []}, {}, "the command line is empty"),
            ({"x": "true"}, {"bind": "0.0.0.0"}, "other machines can reach 0.0.0.0"),
        ):
            with self.subTest(told=told), self.assertRaisesRegex(ConfigError, told):
                streamlog.start(typing.cast(Any, commands), **typing.cast(Any, {"port": 0, **settings}))
        with self.assertRaises(OSError):
            streamlog.start({}, bind="192.0.2.1", token="t", port=0)

    def test_the_keywords_that_checkers_are_told_are_settings_with_their_types_and_defaults(self) -> None:
        fields = {field.name: field for field in dataclasses.fields(Settings)}
        keywords = dict(inspect.signature(streamlog.start).parameters)
        self.assertEqual(keywords.pop("settings").kind, inspect.Parameter.VAR_KEYWORD)
        del keywords["commands"]
        told = [(name, one.annotation, one.default) for name, one in keywords.items()]
        self.assertEqual(told, [(name, fields[name].type, fields[name].default) for name in keywords])

    def test_what_is_heavy_is_imported_only_where_it_is_used(self) -> None:
        heavy = ["configparser", "argparse", "sqlite3", "asyncio", "multiprocessing"]
        script = (
            f"import sys, streamlog\nheavy = {heavy}\n"
            "with streamlog.start({'x': 'true'}, port=0): print([name for name in heavy if name in sys.modules])\n"
        )
        env = {
            name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")
        }  # which has its own
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, stdout=-1, text=True, timeout=20)
        self.assertEqual(done.stdout, "[]\n")

    def test_several_servers_live_side_by_side(self) -> None:
        servers = [self.start({"x": f"echo {number}"}) for number in range(5)]
        self.assertEqual([self.fetch(server, "/x").body for server in servers], [b"%d\n" % n for n in range(5)])

    def test_the_end_of_the_program_ends_its_runs(self) -> None:
        script = (
            "import streamlog, socket\n"
            "server = streamlog.start({'x': '!echo $$; exec sleep 300'}, port=0)\n"
            "client = socket.create_connection(('127.0.0.1', server.port))\n"
            "client.sendall(b'GET /x HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n')\n"
            "got = b''\n"
            "while not got.endswith(b'\\n\\r\\n') or got.endswith(b'\\r\\n\\r\\n'): got += client.recv(999)\n"
            "print(got.split()[-1].decode())\n"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=-1, stderr=-1, text=True, timeout=20)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertFalse(is_alive(int(done.stdout)))

    def run_script(self, script: str) -> str:
        """Run a program to its end; what it prints."""
        command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING + script]  # 3.12 warns of forks
        program = subprocess.Popen(command, cwd=ROOT, text=True, stdin=-3, stdout=-1, stderr=-1, start_new_session=True)
        try:
            out, err = program.communicate(timeout=40)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, 9)  # with its forks
            program.communicate()
        self.assertEqual((program.returncode, err), (0, ""))
        return out

    def test_a_forked_worker_does_not_hold_its_parent_s_port(self) -> None:
        note = self.folder / "count"
        said = self.run_script(
            "server = streamlog.start({'x': 'echo x'}, port=0)\n"
            "pid = os.fork()\n"
            "if not pid:\n"
            "    count = len(os.listdir('/proc/self/fd'))\n"
            f"    open('{note}', 'w').write(str(count)); time.sleep(60); os._exit(0)\n"
            "port = server.port; server.close()\n"
            "def can_start():\n"
            "    try: return not streamlog.start({'x': 'echo again'}, port=port).close()\n"
            "    except OSError: return False  # the fork has not let go yet\n"
            "print(wait_until(can_start), is_alive(pid))\n"
            f"wait_until(lambda: os.path.exists('{note}') and open('{note}').read()); end(pid)\n"
        )
        self.assertEqual((said, note.read_text()), ("True True\n", "4"))

    def test_a_fork_that_leaves_the_block_of_a_server_ends(self) -> None:
        said = self.run_script(
            "with streamlog.Server({}, streamlog.Settings(port=0)) as server:\n"
            "    threading.Thread(target=server.serve_forever).start()\n"
            "    ask(server, '/-/healthy')\n"
            "    pid = os.fork()\n"
            "if pid: print(os.waitpid(pid, 0)[1])\n"
        )
        self.assertEqual(said, "0\n")

    def test_processes_that_are_forked_while_all_threads_are_busy_log_and_end(self) -> None:
        said = self.run_script(
            "logging.getLogger().addHandler(logging.NullHandler())\n"
            "server = streamlog.start({'x': 'echo x', 'k': streamlog.Command('echo k', shared=True),\n"
            "    't': lambda: logging.warning('task')}, port=0, log=1000)\n"
            "over = threading.Event()\n"
            "def work(path):\n"
            "    while not over.is_set(): ask(server, path); logging.warning(path)\n"
            "threads = [threading.Thread(target=work, args=(path,)) for path in ('/x', '/k', '/t', '/x?wait')]\n"
            "for thread in threads: thread.start()\n"
            "for _ in range(40):\n"
            "    pid = os.fork()\n"
            "    if not pid: logging.warning('child'); server.close(); break\n"
            "    ended = wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0])\n"
            "    if not ended: os.kill(pid, 9); os.waitpid(pid, 0); print('hangs')\n"
            "if pid:\n"
            "    over.set()\n"
            "    for thread in threads: thread.join()\n"
            "    print('over')\n"
        )
        self.assertEqual(said, "over\n")

    def test_a_fork_keeps_no_pipe_of_a_command_that_takes_an_upload_open(self) -> None:
        said = self.run_script(
            "server = streamlog.start({'x': streamlog.Command('!cat; echo end', stdin=True)}, port=0)\n"
            "client = socket.create_connection(('127.0.0.1', server.port), 10)\n"
            "head = 'POST /x HTTP/1.1', 'Host: localhost', 'Transfer-Encoding: chunked', 'Connection: close', '', ''\n"
            "client.sendall('\\r\\n'.join(head).encode() + b'2\\r\\na\\n\\r\\n')\n"
            "while b'a\\n' not in client.recv(9999): pass\n"
            "pid = fork_off()\n"
            "client.sendall(b'0\\r\\n\\r\\n')\n"
            "body = b''.join(iter(lambda: client.recv(9999), b''))\n"
            "print(body.endswith(b'end\\n\\r\\n0\\r\\n\\r\\n'), is_alive(pid)); end(pid)\n"
        )
        self.assertEqual(said, "True True\n")

    def test_a_fork_keeps_no_pipe_of_a_stream_open(self) -> None:
        said = self.run_script(
            "run = streamlog.stream('cat')\n"
            "run.write(b'a'); print(next(run))\n"
            "pid = fork_off()\n"
            "run.close_stdin(); print(list(run), run.exit_code, is_alive(pid)); end(pid)\n"
        )
        self.assertEqual(said, "b'a'\n[] 0 True\n")

    def test_a_fork_does_not_keep_the_kept_runs_of_a_program_that_is_killed(self) -> None:
        note = self.folder / "pids"
        script = (
            f"server = streamlog.start({{'x': '!echo $$ > {note}.run; exec sleep 300'}}, port=0, grace_seconds=0.2)\n"
            "ask(server, '/x?async=1')\n"
            f"wait_until(lambda: os.path.exists('{note}.run')); time.sleep(0.2)\n"
            f"open('{note}', 'w').write(str(fork_off())); os.kill(os.getpid(), 9)\n"
        )
        done = subprocess.run([sys.executable, "-c", FORKING + script], cwd=ROOT, timeout=20, check=False)
        self.assertEqual(done.returncode, -9)
        run, fork = int((self.folder / "pids.run").read_text()), int(note.read_text())
        self.addCleanup(os.kill, fork, 9)
        wait_until(lambda: not is_alive(run), "the run has ended", 5)
        self.assertTrue(is_alive(fork))

    def test_a_fork_that_ends_while_another_thread_reads_a_stream_ends(self) -> None:
        said = self.run_script(
            "run = streamlog.stream('sleep 300')\n"
            "reader = threading.Thread(target=list, args=(run,)); reader.start(); time.sleep(0.2)\n"
            "pid = os.fork()\n"
            "if not pid: run.close()\n"
            "else:\n"
            "    print(wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0]), run.exit_code)\n"
            "    run.close(); reader.join(); print(run.exit_code)\n"
        )
        self.assertEqual(said, "True None\n143\n")

    def test_a_task_s_fork_logs_for_itself(self) -> None:
        said = self.run_script(
            "logging.getLogger().addHandler(logging.NullHandler())\n"
            "def task():\n"
            "    pid = os.fork()\n"
            "    if not pid: logging.warning('child'); os._exit(streamlog.stopping())\n"
            "    logging.warning('parent'); return str(os.waitpid(pid, 0)[1])\n"
            "with streamlog.start({'x': task}, port=0) as server: print(ask(server, '/x'))\n"
        )
        self.assertEqual(said, "b'WARNING root: parent\\n0'\n")

    def test_of_processes_that_serve_by_one_listener_one_may_die_at_any_moment(self) -> None:
        said = self.run_script(
            "streamlog.wsgi({}).close()  # from now on forks are watched\n"
            "server = streamlog.Server({'x': streamlog.Command('echo x')}, streamlog.Settings(port=0))\n"
            "def work(dies):\n"
            "    pid = os.fork()\n"
            "    if not pid:\n"
            "        if dies: socket.socket.accept = lambda _: os.kill(os.getpid(), 9)\n"
            "        server.serve_forever(); os._exit(0)\n"
            "    return pid\n"
            "pids = [work(False), work(True)]\n"
            "print(all([ask(server, '/x') == b'x\\n' for _ in range(200)]))\n"
            "end(pids[0])\n"
            "print(os.waitpid(pids[1], 0)[1])\n"
        )
        self.assertEqual(said, "True\n9\n")

    def test_of_processes_that_serve_by_one_listener_each_shuts_down_for_itself(self) -> None:
        said = self.run_script(
            "streamlog.wsgi({}).close()  # from now on forks are watched\n"
            "server = streamlog.Server({'x': streamlog.Command('echo x')}, streamlog.Settings(port=0))\n"
            "def work():\n"
            "    pid = os.fork()\n"
            "    if not pid:\n"
            "        signal.signal(signal.SIGTERM, lambda *_: server.shutdown())\n"
            "        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])\n"
            "        server.serve_forever(); server.close(); os._exit(5)\n"
            "    return pid\n"
            "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until it is handled\n"
            "pids = [work(), work()]\n"
            "for pid in pids:\n"
            "    print(all([ask(server, '/x') == b'x\\n' for _ in range(20)]))\n"
            "    os.kill(pid, signal.SIGTERM); print(os.waitpid(pid, 0)[1] >> 8)\n"
        )
        self.assertEqual(said, "True\n5\nTrue\n5\n")

    def test_serve_is_its_blocking_twin(self) -> None:
        script = (
            "import signal, streamlog\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # it may be ignored where tests run
            "print('ready', flush=True); streamlog.serve({'x': 'echo x'}, bind='unix:socket', port=0)\n"
        )
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-c", script], cwd=self.folder, env=env, stderr=-1, stdout=-1)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        path = self.folder / "socket"
        with wait_until(lambda: try_connect(str(path)), "it listens") as client:
            client.get("/x")
            self.assertEqual(client.read_answer().body, b"x\n")
        process.send_signal(2)
        self.assertIn(b"KeyboardInterrupt", process.communicate(timeout=10)[1])
        self.assertFalse(path.exists())


class Tasks(EmbeddingCase):
    def test_parameters_come_from_the_signature(self) -> None:
        server = self.start({"paint": paint})
        many = [("name=a&times=" + "9" * 5000, 400, "a value of 'paint' cannot be read")]
        for query, status, body in (
            ("name=a+b", 200, "a b Colour.RED dry\n" * 2),
            ("name=&times=1&colour=GREEN&how=wet", 200, " Colour.GREEN wet\n"),
            ("name=-x&times=-1", 200, ""),
            ("times=1", 400, "parameter 'name' of 'paint' is required"),
            ("name=a&times=x", 400, "parameter 'times' of 'paint' must be int: 'x'"),
            *(many if sys.version_info >= (3, 11) else []),
            ("name=a&colour=blue", 400, "parameter 'colour' of 'paint' must be red|GREEN: 'blue'"),
            ("name=a&other=1", 400, "'paint' has no parameter 'other'"),
            ("name=%00", 400, "must be printable text"),
        ):
            with self.subTest(query=query):
                answer = self.fetch(server, f"/paint?{query}")
                self.assertEqual(answer.status, status)
                self.assertIn(body, answer.body.decode())
        listed = json.loads(self.fetch(server, "/", headers=["Accept: application/json"]).body)["commands"][0]
        self.assertEqual((listed["about"], listed["command"]), ("Paint a name.", "paint(name, times, colour, how)"))

    def test_what_cannot_be_a_task_is_told_at_start(self) -> None:
        async def coroutine() -> None: ...

        def wrong(x: dict) -> None: ...  # type: ignore[type-arg]

        def many(*args: str) -> None: ...

        def none(x: str = 3) -> None: ...  # type: ignore[assignment]

        def unknown(x: Missing) -> None: ...  # type: ignore[name-defined] # noqa: F821

        for task, told in (
            (coroutine, "cannot be a coroutine"),
            (wrong, "must be a str, an int, a Literal or an Enum"),
            (many, "must be one that is given by its name"),
            (none, "the default of parameter 'x' is not of its type"),
            (unknown, "cannot be read: name 'Missing'"),
        ):
            with self.subTest(told=told), self.assertRaisesRegex(ConfigError, f"command 'x': .*{told}"):
                streamlog.start({"x": task}, port=0)

    def test_what_is_returned_is_the_output(self) -> None:
        for value, body in (
            ("text", b"text"),
            (b"\xff", b"\xff"),
            (None, b""),
            ({"a": [1, None]}, b'{"a": [1, null]}\n'),
            (iter(["a", b"b", 3]), b"ab3\n"),
        ):
            server = self.start({"x": functools.partial(lambda given: given, value)})
            answer = self.fetch(server, "/x")
            self.assertEqual((answer.body, answer.trailers), (body, {"Exit-Code": "0"}))
            server.close()

    def test_pieces_come_as_they_are_yielded(self) -> None:
        gate = threading.Event()

        def task() -> Iterator[str]:
            yield "one"
            gate.wait(10)
            yield "two"

        with self.connect(self.start({"x": task})) as client:
            client.get("/x")
            client.read_head()
            self.assertEqual(client.read_chunk(), b"one")
            gate.set()
            self.assertEqual(client.read_chunk(), b"two")
            self.assertEqual(client.read_until(b"\r\n\r\n"), b"0\r\nExit-Code: 0\r\n\r\n")

    def test_an_exception_ends_it_with_its_traceback_and_exit_code_1(self) -> None:
        def task() -> Iterator[str]:
            yield "before\n"
            raise ValueError("broken\x1b")

        answer = self.fetch(self.start({"x": task, "json": object}), "/x")
        self.assertEqual((answer.is_whole, answer.trailers), (True, {"Exit-Code": "1"}))
        self.assertTrue(answer.body.startswith(b"before\nTraceback (most recent call last):\n"))
        self.assertIn(b"ValueError: broken", answer.body)
        self.assertNotIn(b"streamlog.py", answer.body)

    def test_all_formats_hold_for_tasks(self) -> None:
        server = self.start({"x": lambda: "a\nb\n"})
        self.assertIn(b"<samp>a\n</samp>", self.fetch(server, "/x?format=html").body)
        self.assertIn(b"data: a\n\n", self.fetch(server, "/x?format=sse").body)
        self.assertIn(b'"line": "b"', self.fetch(server, "/x?format=ndjson").body)

    def test_a_generator_is_closed_when_its_client_leaves(self) -> None:
        closed = threading.Event()

        def task() -> Iterator[str]:
            try:
                while True:
                    yield "x"
                    time.sleep(0.01)
            finally:
                closed.set()

        server = self.start({"x": task})
        with self.connect(server) as client:
            client.get("/x")
            client.read_head()
            client.read_chunk()
        self.assertTrue(closed.wait(2))
        wait_until(lambda: b'runs_active{command="x"} 0' in self.fetch(server, "/-/metrics").body, "its slot is free")

    def test_a_plain_callable_is_told_when_its_client_leaves(self) -> None:
        told = threading.Event()

        def task() -> None:
            while not streamlog.stopping():
                time.sleep(0.01)
            told.set()

        self.assertFalse(streamlog.stopping())
        with self.connect(self.start({"x": task})) as client:
            client.get("/x")
            client.read_head()
        self.assertTrue(told.wait(2))

    def test_a_task_that_does_not_look_up_keeps_its_slot_until_it_does(self) -> None:
        gate = threading.Event()
        self.addCleanup(gate.set)
        server = self.start({"x": Command(lambda: str(gate.wait(20)), max=1)}, grace_seconds=0.1)
        with mock.patch.object(streamlog, "_ABANDON_SECONDS", 0.1), self.assertLogs("streamlog", "WARNING"):
            with self.connect(server) as client:
                client.get("/x")
                client.read_head()
            wait_until(lambda: not server._clients, "its connection is gone", 5)
        self.assertEqual(self.fetch(server, "/x").status, 503)
        gate.set()
        wait_until(lambda: self.fetch(server, "/x").status == 200, "the slot is free again")

    def test_a_task_runs_into_its_timeout_and_its_output_limit(self) -> None:
        def endless() -> Iterator[str]:
            while True:
                yield "x" * 100
                time.sleep(0.001)

        limited = self.start({"x": endless}, max_output_bytes=5000)
        self.assertIn(b"[stopped: output limit of 5000 bytes", self.fetch(limited, "/x").body)
        timed = self.start({"x": Command(endless, timeout=0.2)})
        self.assertIn(b"[stopped: timeout after 0.2 s", self.fetch(timed, "/x").body)

    def test_a_client_that_does_not_read_holds_up_its_own_task_and_no_logging(self) -> None:
        count = 0

        def task() -> Iterator[bytes]:
            nonlocal count
            while True:
                yield bytes(10000)
                logging.getLogger("of.task").warning("logged")
                count += 1

        client = self.connect(self.start({"x": task}), receive_buffer=4096)
        client.get("/x")
        client.read_head()
        before = -1
        while before != count:
            before = count
            time.sleep(0.2)  # until it is held up
        started = time.monotonic()
        logging.getLogger("other").warning("is not held up")
        self.assertLess(time.monotonic() - started, 0.1)


class TaskRecords(EmbeddingCase):
    def test_a_task_s_records_are_its_output_and_nobody_else_s(self) -> None:
        start = threading.Barrier(4)

        def task(name: str) -> Iterator[str]:
            start.wait(10)
            for number in range(SOAK // 4):
                logging.getLogger("of.task").warning("%s %d", name, number)
                if number % 10 == 0:
                    yield f"{name} yields\n"

        server = self.start({"x": task, "y": task})
        found: dict[str, bytes] = {}

        def fetch(path: str, name: str) -> None:
            found[name] = self.fetch(server, f"/{path}?name={name}").body

        threads = [threading.Thread(target=fetch, args=pair) for pair in zip("xxyy", "abcd")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, body in found.items():
            lines = body.decode().splitlines()
            records = [line for line in lines if line.startswith("WARNING of.task: ")]
            self.assertEqual(records, [f"WARNING of.task: {name} {number}" for number in range(SOAK // 4)])
            self.assertEqual(set(lines) - set(records), {f"{name} yields"})

    def test_the_context_that_it_starts_belongs_to_it(self) -> None:
        def task() -> None:
            context = contextvars.copy_context()
            logger = logging.getLogger("of.task")
            inside = threading.Thread(target=context.run, args=(logger.warning, "inside"))
            outside = threading.Thread(target=contextvars.Context().run, args=(logger.warning, "outside"))
            for thread in (inside, outside):
                thread.start()
                thread.join()

        body = self.fetch(self.start({"x": task}), "/x").body
        self.assertEqual(body, b"WARNING of.task: inside\n")

    def test_the_program_s_logging_is_as_it_was(self) -> None:
        script = (
            "import logging, streamlog, sys, urllib.request\n"
            "def task(): logging.warning('from a task'); logging.info('not wanted')\n"
            "with streamlog.start({'x': task}, port=0) as server:\n"
            "    body = urllib.request.urlopen(server.url + '/x').read()\n"
            "logging.warning('afterwards')\n"
            "print(body, logging.root.handlers, logging.root.level)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=-1, stderr=-1, text=True, timeout=20)
        # Until somebody configures logging, its last resort prints; a handler of ours must not take that away.
        self.assertEqual(done.stderr, "from a task\nWARNING:root:afterwards\n")
        self.assertTrue(done.stdout.startswith("b'WARNING root: from a task\\n'"), done.stdout)


class SlowFile(io.FileIO):
    """Is held up between the look at its number and the system call, as any thread may be."""

    def write(self, data: Any) -> int:
        number = self.fileno()
        time.sleep(0.3)
        return os.write(number, data)


class Streams(EmbeddingCase):
    def test_input_never_reaches_what_was_opened_meanwhile(self) -> None:
        def spawn(*arguments: Any, real: Any = streamlog._spawn) -> Any:
            process, terminal = real(*arguments)
            with process.stdin as stdin:
                process.stdin = SlowFile(os.dup(stdin.fileno()), "wb")
            return process, terminal

        for end in (streamlog.Stream.close, streamlog.Stream.close_stdin):
            with self.subTest(end.__name__), mock.patch("streamlog._spawn", spawn), streamlog.stream("sleep 9") as run:
                writer = threading.Thread(target=run.write, args=(b"secret",))
                writer.start()
                time.sleep(0.1)
                end(run)
                # One of these takes the number, as the connection of another client would.
                pairs = [socket.socketpair() for _ in range(10)]
                writer.join(10)
                for one, other in [*pairs, *(pair[::-1] for pair in pairs)]:
                    one.shutdown(socket.SHUT_WR)
                    self.assertEqual(other.recv(100), b"")
                for sock in itertools.chain(*pairs):
                    sock.close()

    def test_a_writer_whose_input_another_thread_ends_is_told_so(self) -> None:
        for _ in range(20):
            with streamlog.stream("cat") as run:
                told: list[Any] = []

                def write(run: streamlog.Stream = run, told: list[Any] = told) -> None:
                    try:
                        while True:
                            run.write(bytes(300_000))
                    except Exception:
                        told.append(sys.exc_info()[1])

                thread = threading.Thread(target=write)
                thread.start()
                next(run)
                run.close_stdin()
                for _ in run:
                    pass
                thread.join(10)
                self.assertEqual([type(error) for error in told], [BrokenPipeError])

    def test_output_comes_piece_by_piece_and_then_the_exit_code(self) -> None:
        gate = self.folder / "gate"
        os.mkfifo(gate)
        with streamlog.stream(f"!echo one; read line < {gate}; echo {{x}} >&2; exit 3", x="two") as run:
            self.assertEqual((next(run), run.exit_code), (b"one\n", None))
            gate.write_text("\n")
            self.assertEqual((b"".join(run), run.exit_code), (b"two\n", 3))
            self.assertEqual(list(run), [])

    def test_mistakes_are_raised_at_once(self) -> None:
        for command, values, told in (
            ("echo {x:int}", {"x": "y"}, "must be int"),
            ("echo {x}", {}, "is required"),
            ("echo", {"x": 1}, "has no parameter 'x'"),
            ("no-such-program", {}, "cannot start"),
            ("echo {x:y", {}, "no closing brace"),
        ):
            with self.subTest(told=told), self.assertRaisesRegex(streamlog.Error, told):
                streamlog.stream(command, **values)

    def test_closing_it_stops_the_run(self) -> None:
        for way in ("close", "with", "del"):
            run = streamlog.stream("!echo $$; sleep 300")
            pid = int(next(run))
            if way == "close":
                run.close()
                run.close()
            elif way == "with":
                with run:
                    pass
            else:
                del run
            wait_until(lambda pid=pid: not is_alive(pid), f"it is gone: {way}", 2)  # type: ignore[misc]

    def test_after_stop_the_rest_can_be_read(self) -> None:
        with streamlog.stream("!trap 'echo bye; exit 4' TERM; echo hi; while :; do sleep 0.05; done") as run:
            self.assertEqual(next(run), b"hi\n")
            threading.Thread(target=run.stop).start()
            said = b"".join(run)  # a shell may say that its sleep was terminated
            self.assertEqual((said[-4:], run.exit_code), (b"bye\n", 4))

    def test_stop_by_another_thread_leads_to_a_kill(self) -> None:
        with mock.patch.object(streamlog, "Settings", functools.partial(Settings, grace_seconds=0.5)):
            run = streamlog.stream("!trap '' TERM; echo $$; while :; do sleep 1 & wait; done")
            self.addCleanup(run.close)
            next(run)
            reader = threading.Thread(target=list, args=(run,))
            reader.start()
            time.sleep(0.1)
            run.stop()
            reader.join(5)
            self.assertFalse(reader.is_alive())
            self.assertEqual(run.exit_code, 137)

    def test_a_long_running_child_is_launched_talked_to_and_ended(self) -> None:
        with streamlog.stream(
            [sys.executable, "-iqu"],
        ) as run:
            for asked, answer in ((b"2+2\n", b"4"), (b"len('foobar')\n", b"6")):
                run.write(asked)
                said = b""
                while answer + b"\n" not in said:
                    said += next(run)
            run.write(b"exit(7)\n")
            list(run)
            self.assertEqual(run.exit_code, 7)
            with self.assertRaises(BrokenPipeError):
                run.write(b"more")

    def test_more_than_the_pipes_hold_goes_through_it(self) -> None:
        data = os.urandom(700_000)
        with streamlog.stream("cat") as run:
            run.write(data)
            run.close_stdin()
            self.assertEqual(b"".join(run), data)

    def test_one_thread_reads_while_another_writes(self) -> None:
        data, got = os.urandom(3_000_000), list[bytes]()
        with streamlog.stream("cat") as run:
            reader = threading.Thread(target=lambda: got.extend(run))
            reader.start()
            for at in range(0, len(data), 100_000):
                run.write(data[at : at + 100_000])
            run.close_stdin()
            reader.join(10)
            self.assertFalse(reader.is_alive())
            self.assertEqual((b"".join(got), run.exit_code), (data, 0))

    def test_a_thread_that_waits_for_output_holds_up_no_writer(self) -> None:
        got: list[bytes] = []
        with streamlog.stream("cat") as run:
            reader = threading.Thread(target=lambda: got.extend(run))
            reader.start()
            time.sleep(0.1)  # until it waits
            started = time.monotonic()
            run.write(b"a")
            run.close_stdin()
            self.assertLess(time.monotonic() - started, 1)
            reader.join(10)
        self.assertEqual(got, [b"a"])

    def test_a_task_can_be_streamed_too(self) -> None:
        with streamlog.stream(paint, name="x", times=2, colour="GREEN") as run:
            self.assertEqual((b"".join(run), run.exit_code), (b"x Colour.GREEN dry\n" * 2, 0))


class PublicSurface(EmbeddingCase):
    def test_the_public_names_are_few_and_each_is_typed_and_documented(self) -> None:
        self.assertLessEqual(len(streamlog.__all__), 12)
        self.assertEqual(sorted(streamlog.__all__), streamlog.__all__)
        for name in streamlog.__all__:
            public = getattr(streamlog, name)
            self.assertTrue(inspect.getdoc(public), name)
            members = [public]
            if isinstance(public, type):
                members = [
                    member.fget if isinstance(member, property) else member
                    for key, member in vars(public).items()
                    if not key.startswith("_") and (callable(member) or isinstance(member, property))
                ]
            for member in members:
                with self.subTest(name=name, member=member):
                    self.assertTrue(inspect.getdoc(member))
                    signature = inspect.signature(member)
                    self.assertIsNot(signature.return_annotation, signature.empty)
                    for parameter in list(signature.parameters.values()):
                        if parameter.name != "self":
                            self.assertIsNot(parameter.annotation, parameter.empty, parameter.name)

    def test_a_program_that_uses_all_of_it_runs(self) -> None:
        source = (ROOT / "tests" / "program.py").read_text()
        for name in streamlog.__all__:
            self.assertRegex(source, rf"import [^\n]*\b{name}\b")
            self.assertGreater(len(re.findall(rf"\b{name}\b", source)), 1, name)
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, ROOT / "tests" / "program.py"], env=env, stdout=-1, stderr=-2, text=True, timeout=30
        )
        for said in (
            "True 1\n2\n3\n",
            "WARNING index: part 1, full, dry\n2 of 2 done\n",
            "from Server\n",
            "to cat\n 0\n",
            "[] 143\n",
            "400 parameter 'x' of 'stream' must be int: 'nonsense'\n",
            "a command's name is letters",
        ):
            self.assertIn(said, done.stdout)
