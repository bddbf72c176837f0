"""Inside a program: servers that it starts, and tasks that are its own functions."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import datetime
import decimal
import enum
import functools
import gc
import inspect
import io
import itertools
import json
import logging
import os
import pathlib
import pydoc
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Iterator
from typing import Any, List, Literal, Optional  # noqa: UP035
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
            ({"x": "true"}, {"bind": "0.0.0.0"}, "other machines can reach 0.0.0.0.* allow it by no_auth="),
            ({"x": None}, {}, "command 'x': it must be a command line, a list of arguments or a callable: None"),
            ({"x": {"command": "df"}}, {}, "command 'x': it must be a command line.*'df'"),
            ({"x": ["df", 5]}, {}, "command 'x': it must be a command line.*5"),
            ({5: "df"}, {}, "a command's name is letters.*: 5"),
            ({}, {"port": 70000}, "port must be a number from 0 to 65535: 70000"),
            ({}, {"port": "8000"}, "port must be a number.*: '8000'"),
            ({}, {"port": True}, "port must be a number.*: True"),
            ({}, {"log": "1M"}, "log must be a number of bytes: '1M'"),
            ({}, {"timeout_seconds": "1"}, "timeout_seconds must be a number of seconds.*: '1'"),
            ({}, {"grace_seconds": -1}, "grace_seconds must be a number of seconds.*: -1"),
            ({}, {"max_runs": 0}, "max_runs must be a whole number above 0: 0"),
            ({}, {"max_runs": 2.5}, "max_runs must be a whole number above 0: 2.5"),
            ({}, {"allow_hosts": "a.example"}, "allow_hosts must be a list.*: 'a.example'"),
            ({}, {"allow_hosts": ["a:5"]}, "allow_hosts must be a host name, without a port: 'a:5'"),
            ({}, {"allow_origins": 5}, "allow_origins must be a list.*: 5"),
            ({}, {"bind": 5}, "bind must be text: 5"),
            ({}, {"token": None}, "token must be text: None"),
            ({}, {"no_auth": "yes"}, "no_auth must be True or False: 'yes'"),
            ({}, {"tls_key": "x"}, "set tls_cert="),
            ({}, {"terminal_size": 80}, r"terminal_size must be columns and lines, as in \(80, 24\): 80"),
            ({}, {"child_nofile": ("a", "b")}, "child_nofile must be .soft, hard., two whole numbers"),
            ({}, {"terminal_size": (80.5, 24)}, "terminal_size must be columns and lines"),
            ({}, {"max_output_bytes": 1.5}, "max_output_bytes must be a number of bytes: 1.5"),
            ("df -h", {}, "the commands must be a dict of names and commands: 'df -h'"),
            ({}, {"child_nofile": 80}, "child_nofile must be .soft, hard., two whole numbers: 80"),
        ):
            with self.subTest(told=told), self.assertRaisesRegex(ConfigError, told):
                streamlog.start(typing.cast(Any, commands), **typing.cast(Any, {"port": 0, **settings}))
        with self.assertRaises(OSError):
            streamlog.start({}, bind="192.0.2.1", token="t", port=0)
        for bind in ("nosuch.invalid", "unix:/nonexistent/x"):
            with self.assertRaisesRegex(OSError, bind):
                streamlog.start({}, bind=bind, token="t")
        with self.assertRaisesRegex(OSError, "Address already in use: .* give port=0 .* or bind=f'unix:"):
            streamlog.start({}, port=self.start({}).port)

    def test_mistakes_in_a_command_name_its_option(self) -> None:
        for options, told in (
            ({"env": {"a b": "c"}}, "env must be a dict of names and texts"),
            ({"env": {"A": 5}}, "env must be a dict of names and texts"),
            ({"env": None}, "env must be a dict of names and texts: None"),
            ({"env": ""}, "env must be a dict of names and texts: ''"),
            ({"method": ["x"]}, "method must be GET or POST"),
            ({"type": None}, "type must be a Content-Type"),
            ({"shared": ""}, "shared must be True or False: ''"),
            ({"timeout": "5"}, "timeout must be a number of seconds.*: '5'"),
            ({"max": "2"}, "max must be a whole number above 0: '2'"),
            ({"stdin": "yes"}, "stdin must be True or False: 'yes'"),
            ({"pty": "yes"}, "pty must be True, False or 'echo': 'yes'"),
            ({"terminal": 132}, "terminal must be columns and lines.*: 132"),
            ({"terminal": "132x40"}, "terminal must be columns and lines.*: '132x40'"),
            ({"method": "PUT"}, "method must be GET or POST: 'PUT'"),
            ({"about": None}, "about must be text: None"),
            ({"cwd": 5}, "cwd must be the name of a directory: 5"),
            ({"type": "text"}, "type must be a Content-Type"),
            ({"stderr": True}, "stderr must be merge, separate or discard: True"),
        ):
            with self.subTest(options=options), self.assertRaisesRegex(ConfigError, told):
                Command("true", **typing.cast(Any, options))
        for options in ({"env": {"A": "b"}}, {"cwd": "/"}, {"stdin": True}, {"pty": True}):
            with self.subTest(options=options), self.assertRaisesRegex(ConfigError, "a task has no process"):
                Command(paint, **typing.cast(Any, options))

    def test_paths_are_taken_as_texts_are(self) -> None:
        (self.folder / "x").write_text("this\n")
        server = self.start({"x": Command(["cat", pathlib.Path("x")], cwd=self.folder)}, transcripts=self.folder)
        self.assertEqual(self.fetch(server, "/x").body, b"this\n")

    def test_commands_can_be_replaced_as_they_were_given(self) -> None:
        server = self.start({"x": "echo x"})
        server.replace({"y": "echo y", "z": ["echo", "z"], "paint": paint})
        self.assertEqual([self.fetch(server, path).body for path in ("/y", "/z")], [b"y\n", b"z\n"])
        with self.assertRaisesRegex(ConfigError, "command 'bad': "):
            server.replace({"bad": 5})
        self.assertEqual(self.fetch(server, "/y").body, b"y\n")

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
            out, err = program.communicate(timeout=100)
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
            f"server = streamlog.start({{'x': '!echo $$ | tee {note}.run; exec sleep 300'}}, port=0,"
            "    grace_seconds=0.2)\n"
            "ask(server, '/x?async=1')\n"
            "wait_until(lambda: b'  0 bytes' not in ask(server, '/-/runs'))  # it has a watchdog, too\n"
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

    def test_each_process_of_multiprocessing_has_servers_and_streams_of_its_own(self) -> None:
        (self.folder / "work.py").write_text(
            "import multiprocessing, os, streamlog\n"
            "def work(queue):\n"
            "    run = streamlog.stream('!echo $$; exec sleep 300')\n"
            "    queue.put(int(next(run)))\n"
            "    with streamlog.start({'x': 'echo x'}, port=0): pass\n"
            "if __name__ == '__main__':\n"
            "    with streamlog.start({'x': 'echo x'}, port=0, log=1000), streamlog.stream('cat') as own:\n"
            "        for method in ('fork', 'spawn', 'forkserver'):\n"
            "            context = multiprocessing.get_context(method)\n"
            "            queue = context.Queue()\n"
            "            process = context.Process(target=work, args=(queue,))\n"
            "            process.start(); print(queue.get(timeout=20)); process.join(20); print(process.exitcode)\n"
            "        own.write(b'still'); own.close_stdin(); print(b''.join(own).decode())\n"
        )
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        done = subprocess.run([sys.executable, "work.py"], cwd=self.folder, env=env, stdout=-1, text=True, timeout=60)
        *said, last = done.stdout.split()
        self.assertEqual((said[1::2], last), (["0", "0", "0"], "still"))
        self.assertFalse(any(is_alive(int(pid)) for pid in said[::2]))

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

    def test_parameters_may_be_of_many_types(self) -> None:
        def show(  # type: ignore[no-untyped-def]
            real: float = 0.5,
            flag: bool = False,
            path: pathlib.Path = pathlib.Path("/tmp"),
            maybe: Optional[int] = None,
            colour: Optional[Colour] = None,
            many: List[int] = [1, 2],  # noqa: B006, UP006
            modes: List[Literal["a", "b"]] = [],  # noqa: B006, UP006
            some=3,
            loose=False,
        ) -> str:
            return repr((real, flag, path, maybe, colour, many, modes, some, loose))

        defaults = [0.5, False, pathlib.Path("/tmp"), None, None, [1, 2], [], 3, False]
        server = self.start({"x": show, "y": functools.partial(show, maybe=7, some=8)})
        for query, changed in (
            ("", {}),
            ("real=-1e3&flag=yes&path=a/b", {0: -1000.0, 1: True, 2: pathlib.Path("a/b")}),
            ("flag=ON&loose=1", {1: True, 8: True}),
            ("maybe=5&colour=GREEN", {3: 5, 4: Colour.GREEN}),
            ("maybe=&colour=&many=", {5: []}),
            ("many=3&many=-4&modes=b&modes=a&some=9", {5: [3, -4], 6: ["b", "a"], 7: 9}),
        ):
            with self.subTest(query=query):
                expected = [changed.get(index, value) for index, value in enumerate(defaults)]
                self.assertEqual(self.fetch(server, f"/x?{query}").body.decode(), repr(tuple(expected)))
        self.assertIn(", 7, None, [1, 2], [], 8, False)", self.fetch(server, "/y").body.decode())
        for query in ("real=x", "flag=maybe", "path=../x", "path=a%00", "maybe=x", "colour=blue", "many=1&many=x"):
            with self.subTest(query=query):
                answer = self.fetch(server, f"/x?{query}")
                self.assertEqual((answer.status, answer.body[:10]), (400, b"parameter "))
        self.assertIn(b"is given twice", self.fetch(server, "/x?real=1&real=2").body)
        self.assertIn(b"'maybe' of 'y' must be int", self.fetch(server, "/y?maybe=x").body)
        page = self.fetch(server, "/", headers=["Accept: text/html"]).body.decode()
        self.assertRegex(page, r'<textarea [^>]*name="many"[^>]*>1\n2</textarea>')

    def test_a_method_and_an_object_that_can_be_called_keep_their_hints(self) -> None:
        class Thing:
            def __call__(self, count: int = 1) -> str:
                return f"{count!r}"

            def method(self, count: int = 1) -> Unknown:  # type: ignore[name-defined] # noqa: F821
                """Count once."""
                return f"{count!r}"

        class Later:
            async def __call__(self) -> None: ...

        server = self.start({"x": Thing(), "y": Command(Thing().method, method="POST")})
        self.assertEqual(self.fetch(server, "/x?count=5").body, b"5")
        self.assertEqual(self.fetch(server, "/x?count=y").status, 400)
        self.assertEqual(Command(Thing().method, method="POST").about, "Count once.")
        for task in (Later(), functools.partial(Later())):
            with self.assertRaisesRegex(ConfigError, "it cannot be a coroutine"):
                Command(task)
            with self.assertRaisesRegex(ConfigError, "it cannot be a coroutine"):
                streamlog.stream(task)

    def test_results_become_json(self) -> None:
        @dataclasses.dataclass
        class Point:
            x: int
            y: Any

        def task() -> Iterator[object]:
            yield {
                "when": datetime.datetime(2024, 1, 2, 3),
                "path": pathlib.Path("/x"),
                "set": {1},
                "enum": Colour.GREEN,
            }
            yield  # type: ignore[misc]
            yield Point(1, [Point(2, float("nan")), (float("inf"), 1j)])
            yield {datetime.date(2024, 1, 2): None, 5: True, "decimal": decimal.Decimal("1.10"), "range": range(2)}
            yield "text\n"
            yield b"bytes\n"

        lines = self.fetch(self.start({"x": task}), "/x").body.decode().splitlines()
        self.assertEqual(lines[3:], ["text", "bytes"])
        self.assertEqual(
            [json.loads(line, parse_constant=self.fail) for line in lines[:3]],
            [
                {"when": "2024-01-02T03:00:00", "path": "/x", "set": [1], "enum": 2},
                {"x": 1, "y": [{"x": 2, "y": None}, [None, "1j"]]},
                {"2024-01-02": None, "5": True, "decimal": "1.10", "range": [0, 1]},
            ],
        )

    def test_what_a_task_ends_with_that_has_no_text_is_told_and_costs_nothing(self) -> None:
        class Odd(streamlog.Error):
            def __str__(self) -> str:
                raise ValueError("no words")

        def leave() -> None:
            raise SystemExit(Odd(""))

        def refuse() -> None:
            raise Odd("")

        server = self.start({"leave": leave, "refuse": refuse}, max_runs=1)
        for path in ("/leave", "/refuse", "/leave"):
            answer = self.fetch(server, path)
            self.assertEqual((answer.status, answer.trailers), (200, {"Exit-Code": "1"}))
            self.assertIn(b"no words", answer.body)

    def test_the_page_of_a_task_comes_with_its_first_output_though_nothing_can_be_seen_of_it(self) -> None:
        gate = threading.Event()
        self.addCleanup(gate.set)

        def task() -> Iterator[str]:
            yield "\x1b[2J"
            gate.wait(20)

        with self.connect(self.start({"x": task})) as client:
            client.get("/x?format=html")
            self.assertEqual(client.read_head()[0], 200)
            gate.set()
            client.read_until(b"</html>")

    def test_an_error_has_a_status_of_answers_with_a_text(self) -> None:
        for status in (200, 204, 304, 999):
            with self.assertRaises(ValueError):
                streamlog.Error("no", status)
        self.assertEqual(streamlog.Error("there", 303, {"Location": "/"}).status, 303)

    def test_an_error_before_any_output_is_the_answer(self) -> None:
        def refuse(seconds: float = 0) -> None:
            time.sleep(seconds)
            raise streamlog.Error("there is no such customer", 409, {"Retry-After": "7"})

        def late() -> Iterator[str]:
            yield "begun\n"
            raise streamlog.Error("too late")

        server = self.start({"refuse": refuse, "late": late})
        for query in ("", "seconds=0.5", "format=html", "format=sse", "format=ndjson", "wait=1"):
            with self.subTest(query=query), self.assertLogs("streamlog", "INFO") as logged:
                answer = self.fetch(server, f"/refuse?{query}")
                told = (answer.status, answer.headers["retry-after"], answer.body)
                self.assertEqual(told, (409, "7", b"there is no such customer\n"))
                wait_until(lambda logged=logged: logged.output, "it is logged")  # type: ignore[misc]
                self.assertIn("status=409 exit=1 ", logged.output[-1])
        answer = self.fetch(server, "/late")
        self.assertEqual((answer.status, answer.body), (200, b"begun\ntoo late\n"))
        kept = "/" + self.fetch(server, "/refuse?async=1").headers["location"]
        wait_until(lambda: self.fetch(server, kept).body == b"there is no such customer\n", "it is kept")
        self.assertEqual(self.fetch(server, f"{kept}?wait=1").headers["exit-code"], "1")
        self.assertEqual(list(streamlog.stream(refuse)), [b"there is no such customer\n"])

    def test_the_head_of_a_silent_task_comes_with_its_heartbeat(self) -> None:
        gate = threading.Event()
        server = self.start({"x": lambda: str(gate.wait(20))})
        self.addCleanup(gate.set)
        with self.connect(server) as client:
            client.get("/x?heartbeat=0.2")
            self.assertEqual(client.read_head()[0], 200)
            self.assertIn(b"[still running", client.read_chunk() or b"")

    def test_a_task_prints_to_its_output(self) -> None:
        def task() -> None:
            print("to a file", file=streamlog.output())
            streamlog.output().writelines(["one\n", "tw\u20ac\n"])
            with contextlib.redirect_stdout(streamlog.output()):
                print("redirected")
            kept.append(streamlog.output())
            raise SystemExit("the end")

        kept: list[Any] = []
        self.assertIs(streamlog.output(), sys.stdout)
        run = streamlog.stream(task)
        self.assertEqual(b"".join(run).decode(), "to a file\none\ntw\u20ac\nredirected\nthe end\n")
        self.assertEqual(run.exit_code, 1)
        with self.assertRaises(BrokenPipeError):
            kept[0].write("more")

    def test_a_task_ends_with_the_code_or_the_text_that_sys_exit_is_given(self) -> None:
        given: Any
        for given, code, text in ((None, 0, b""), (3, 3, b""), ("no", 1, b"no\n"), (ValueError("bad"), 1, b"bad\n")):
            with self.subTest(given=given), streamlog.stream(functools.partial(sys.exit, given)) as run:
                self.assertEqual((b"".join(run), run.exit_code), (text, code))

    def test_a_task_that_fails_is_in_the_program_s_log_with_its_traceback(self) -> None:
        def task() -> None:
            raise ValueError("broken")

        server = self.start({"x": task}, log=10_000)
        with self.assertLogs("streamlog.task", "ERROR") as logged:
            self.assertIn(b"ValueError: broken\n", self.fetch(server, "/x").body)
        self.assertRegex(logged.output[0], r"(?s)task .*task\(\) failed\nTraceback.*\nValueError: broken")
        self.assertIn(b"ValueError: broken\n", self.fetch(server, "/log?follow=0&tail=1").body)

    def test_what_cannot_be_a_task_is_told_at_start(self) -> None:
        async def coroutine() -> None: ...

        def wrong(x: dict) -> None: ...  # type: ignore[type-arg]

        def many(*args: str) -> None: ...

        def none(x: int = "3 ") -> None: ...  # type: ignore[assignment]

        def unknown(x: Missing) -> None: ...  # type: ignore[name-defined] # noqa: F821

        for task, told in (
            (coroutine, "cannot be a coroutine"),
            (wrong, "must be a str, int, float, bool, Path, Literal or Enum"),
            (many, "must be one that is given by its name"),
            (none, "default or choice of parameter 'x' must be int: '3 '"),
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
        self.assertTrue(closed.wait(10))
        wait_until(lambda: b'runs_active{command="x"} 0' in self.fetch(server, "/-/metrics").body, "its slot is free")

    def test_a_plain_callable_is_told_when_its_client_leaves(self) -> None:
        told = threading.Event()

        def task() -> None:
            begun.set()
            while not streamlog.stopping():
                time.sleep(0.01)
            told.set()

        begun = threading.Event()
        self.assertFalse(streamlog.stopping())
        with self.connect(self.start({"x": task})) as client:
            client.get("/x")
            self.assertTrue(begun.wait(10))
        self.assertTrue(told.wait(10))

    def test_a_task_that_does_not_look_up_keeps_its_slot_until_it_does(self) -> None:
        gate, waits = threading.Event(), threading.Event()
        self.addCleanup(gate.set)

        def task() -> Iterator[str]:
            yield "begun\n"
            waits.set()
            gate.wait(20)

        server = self.start({"x": Command(task, max=1)}, grace_seconds=0.1)
        with mock.patch.object(streamlog, "_ABANDON_SECONDS", 0.1), self.assertLogs("streamlog", "WARNING"):
            with self.connect(server) as client:
                client.get("/x")
                client.read_head()
                self.assertTrue(waits.wait(5))
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
        logs = threading.Thread(target=logging.getLogger("other").warning, args=["is not held up"])
        logs.start()
        logs.join(10)
        self.assertFalse(logs.is_alive())


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
        self.assertEqual(sorted(found), list("abcd"))
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
        # Until somebody configures logging, logging.warning does; a handler of ours must not take that away.
        self.assertEqual(done.stderr, "WARNING:root:from a task\nWARNING:root:afterwards\n")
        self.assertTrue(done.stdout.startswith("b'WARNING root: from a task\\n'"), done.stdout)


class SlowFile(io.FileIO):
    """Is held up between the look at its number and the system call, as any thread may be."""

    is_held_up = threading.Event()

    def write(self, data: Any) -> int:
        number = self.fileno()
        self.is_held_up.set()
        time.sleep(0.3)
        return os.write(number, data)


class Streams(EmbeddingCase):
    def test_input_never_reaches_what_was_opened_meanwhile(self) -> None:
        def spawn(*arguments: Any, real: Any = streamlog._spawn) -> Any:
            process = real(*arguments)
            with process.stdin as stdin:
                process.stdin = SlowFile(os.dup(stdin.fileno()), "wb")
            return process

        for end in (streamlog.Stream.close, streamlog.Stream.close_stdin):
            with self.subTest(end.__name__), mock.patch("streamlog._spawn", spawn), streamlog.stream("sleep 9") as run:
                writer = threading.Thread(target=run.write, args=(b"secret",))
                SlowFile.is_held_up.clear()
                writer.start()
                self.assertTrue(SlowFile.is_held_up.wait(10))
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
        gate = self.make_gate()
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
            wait_until(lambda pid=pid: not is_alive(pid), f"it is gone: {way}")  # type: ignore[misc]

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
            self.assertLess(time.monotonic() - started, 10)
            reader.join(10)
        self.assertEqual(got, [b"a"])

    def test_a_task_can_be_streamed_too(self) -> None:
        with streamlog.stream(paint, name="x", times=2, colour=Colour.GREEN) as run:
            self.assertEqual((b"".join(run), run.exit_code), (b"x Colour.GREEN dry\n" * 2, 0))

    def test_a_run_is_waited_for_and_signalled_as_a_popen_is(self) -> None:
        with streamlog.stream("!trap 'echo told; exit 3' USR1; echo ready; read nothing") as run:
            self.assertEqual(next(run), b"ready\n")
            self.assertTrue(is_alive(run.pid or 0))
            started = time.monotonic()
            with self.assertRaises(subprocess.TimeoutExpired):
                run.wait(0.2)
            self.assertLess(time.monotonic() - started, 10)
            run.send_signal(signal.SIGUSR1)
            self.assertEqual((run.wait(5), run.exit_code, run.reason, b"".join(run)), (3, 3, "", b"told\n"))
        with streamlog.stream("sleep 300") as run:
            threading.Timer(0.2, run.stop).start()
            self.assertEqual((run.wait(), run.reason), (143, "stopped"))
        with streamlog.stream("head -c 3000000 /dev/zero") as run:  # more than is kept while somebody waits
            with self.assertRaises(subprocess.TimeoutExpired):
                run.wait(0.3)
            self.assertEqual(sum(map(len, run)), 3_000_000)
        self.assertIsNone(streamlog.stream(lambda: "x").pid)

    def test_any_thread_may_stop_or_close_a_run_that_another_reads(self) -> None:
        for end in (streamlog.Stream.stop, streamlog.Stream.close):
            got: list[bytes] = []
            run = streamlog.stream("!echo ready; exec sleep 300")
            reader = threading.Thread(target=got.extend, args=(run,))
            reader.start()
            wait_until(lambda got=got: got, "it reads")  # type: ignore[misc]
            end(run)
            reader.join(5)
            self.assertEqual((reader.is_alive(), got, run.exit_code), (False, [b"ready\n"], 143))

    def test_values_reach_a_task_as_they_are(self) -> None:
        given = object()
        self.assertEqual(b"".join(streamlog.stream(lambda x, y=2: repr([x, y]), x=given)), repr([given, 2]).encode())
        for values, told in (({}, "missing a required argument: 'x'"), ({"x": 1, "z": 2}, "unexpected keyword.*'z'")):
            with self.assertRaisesRegex(streamlog.Error, told):
                streamlog.stream(lambda x: x, **typing.cast(Any, values))

    def test_the_exit_code_is_known_without_reading(self) -> None:
        with streamlog.stream("!echo x; exit 3") as run:
            wait_until(lambda: run.exit_code == 3, "it has ended")
            self.assertEqual(list(run), [b"x\n"])

    def test_values_of_a_command_are_written_as_a_url_has_them(self) -> None:
        run = streamlog.stream("echo {a} {b:path}", a=True, b=pathlib.Path("/x"))
        self.assertEqual(b"".join(run), b"yes /x\n")
        with self.assertRaisesRegex(streamlog.Error, "parameter 'a'.* must be word.*: ''"):
            streamlog.stream("echo {a}", a=None)
        made = Command(lambda x: [x], timeout=5)
        self.assertEqual(b"".join(streamlog.stream(made, x=None)), b"[null]\n")


class EventLoops(EmbeddingCase):
    """Everything here happens in the loop's one thread, and must not hold it up."""

    def test_many_runs_are_read_at_a_time_in_one_thread(self) -> None:
        async def read() -> bytes:
            return b"".join([piece async for piece in streamlog.stream("!for i in 1 2 3; do echo $i; sleep 0.1; done")])

        async def main() -> list[bytes]:
            before = threading.active_count()
            reading = asyncio.gather(*(read() for _ in range(30)))
            await asyncio.sleep(0.1)
            self.assertEqual(threading.active_count(), before)
            return await reading

        self.assertEqual(asyncio.run(main()), [b"1\n2\n3\n"] * 30)

    def test_a_reader_that_is_cancelled_stops_its_run_and_nobody_waits(self) -> None:
        async def main() -> None:
            run = streamlog.stream("!trap '' TERM; echo ready; sleep 311 & sleep 312")
            self.assertEqual(await run.__anext__(), b"ready\n")
            reader = asyncio.ensure_future(run.__anext__())
            await asyncio.sleep(0.05)
            reader.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await reader
            pid = run.pid or 0
            del run, reader
            gc.collect()
            self.assertTrue(is_alive(pid), "nobody has waited for its end")
            while is_alive(pid):
                await asyncio.sleep(0.05)

        with mock.patch.object(streamlog, "Settings", functools.partial(streamlog.Settings, grace_seconds=3)):
            asyncio.run(asyncio.wait_for(main(), 30))

    def test_it_can_be_left_in_any_way(self) -> None:
        async def main() -> None:
            pids = []
            for way in ("break", "aclose", "del", "timeout"):
                run = streamlog.stream("!trap '' TERM; echo ready; while :; do sleep 1; done")
                pids.append(run.pid or 0)
                started = time.monotonic()
                if way == "timeout":
                    with self.assertRaises(asyncio.TimeoutError):
                        await asyncio.wait_for(self.drain(run), 0.3)
                else:
                    async for _ in run:
                        break
                if way == "aclose":
                    await run.aclose()
                del run
                self.assertLess(time.monotonic() - started, 2.5)
            gc.collect()
            while any(map(is_alive, pids)):
                await asyncio.sleep(0.01)

        with mock.patch.object(streamlog, "Settings", functools.partial(streamlog.Settings, grace_seconds=3)):
            asyncio.run(asyncio.wait_for(main(), 30))

    def test_another_thread_may_close_what_is_read(self) -> None:
        async def one(number: int) -> None:
            run = streamlog.stream("yes" if number % 2 else "sleep 300")
            threading.Timer(number / 1000, run.close).start()
            await asyncio.wait_for(self.drain(run), 30)

        async def main() -> None:
            await asyncio.gather(*map(one, range(40)))

        asyncio.run(main())

    async def drain(self, run: streamlog.Stream) -> None:
        async for _ in run:
            pass

    def test_tasks_input_and_exit_codes_are_there_too(self) -> None:
        async def main() -> None:
            run = streamlog.stream(lambda: iter(["one\n", "two\n"]))
            self.assertEqual(b"".join([piece async for piece in run]), b"one\ntwo\n")
            run = streamlog.stream("!read x; echo got $x; exit 4")
            run.write(b"this\n")
            self.assertEqual((b"".join([piece async for piece in run]), run.exit_code), (b"got this\n", 4))
            run = streamlog.stream("head -c 3000000 /dev/zero")
            self.assertEqual(sum([len(piece) async for piece in run]), 3_000_000)

        asyncio.run(main())

    def test_the_end_of_a_program_ends_what_it_streams(self) -> None:
        for way in (
            "pool = concurrent.futures.ThreadPoolExecutor(); pool.submit(list, run); time.sleep(0.2)",
            "threading.Thread(target=list, args=(run,), daemon=True).start(); time.sleep(0.2)",
            "del run",
            "async def main(): asyncio.ensure_future(run.__anext__()); await asyncio.sleep(0.1)\nasyncio.run(main())",
        ):
            script = (
                "import asyncio, concurrent.futures, streamlog, threading, time\n"
                "run = streamlog.stream('!echo $$; exec sleep 300'); print(next(run).decode())\n" + way
            )
            started = time.monotonic()
            done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=-1, stderr=-1, text=True, timeout=20)
            with self.subTest(way):
                self.assertLess(time.monotonic() - started, 10)
                self.assertFalse(is_alive(int(done.stdout)), done.stderr)


class PublicSurface(EmbeddingCase):
    def test_help_tells_what_to_call_and_what_to_set(self) -> None:
        told = re.sub("\b.", "", pydoc.render_doc(streamlog))  # which prints bold letters twice
        self.assertLess(told.index("streamlog.start("), told.index("usage:"))
        self.assertIn("StreamingResponse(streamlog.stream(", told)
        for field in dataclasses.fields(Settings):
            self.assertRegex(inspect.getdoc(Settings) or "", rf"(?m)^{field.name}: \S")

    def test_hints_can_be_had_at_run_time(self) -> None:
        for name in streamlog.__all__:
            public = getattr(streamlog, name)
            members = {"": public, **(vars(public) if isinstance(public, type) else {})}
            for key, member in members.items():
                if inspect.isfunction(member) and (key == "__init__" or not key.startswith("_")):
                    typing.get_type_hints(member)
        self.assertEqual(typing.get_type_hints(streamlog.start)["return"], streamlog.Server)

    def test_a_server_tells_where_it_is_and_starts_once(self) -> None:
        server = self.start({})
        self.assertEqual(repr(server), f"<streamlog.Server at {server.url}>")
        server.close()
        with self.assertRaisesRegex(RuntimeError, "this server is closed"):
            server.start()

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
            self.assertRegex(source, rf"import \([^)]*\b{name}\b")
            self.assertGreater(len(re.findall(rf"\b{name}\b", source)), 1, name)
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, ROOT / "tests" / "program.py"], env=env, stdout=-1, stderr=-2, text=True, timeout=30
        )
        for said in (
            "True 1\n2\n3\n",
            'WARNING index: part 1, full, dry\n2 of 2 done\n{"done": 2}\n',
            "from Server\n",
            "to cat\n 0 0  True\n",
            "b'1\\n2\\n3\\n'\n",
            "[] 143\n",
            "400 parameter 'x' of 'stream' must be int: 'nonsense'\n",
            "a command's name is letters",
        ):
            self.assertIn(said, done.stdout)
