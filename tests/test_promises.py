"""The promises that every change keeps, one test each, by clients as people have them."""

from __future__ import annotations

import ast
import hashlib
import http.client
import os
import re
import shutil
import subprocess
import sys
import time
import unittest
import urllib.parse
from pathlib import Path

import streamlog
from streamlog import Command

from .support import (
    PROGRAM,
    ROOT,
    Program,
    ServerCase,
    is_alive,
    pids_in,
    processor_seconds,
    resident_bytes,
    wait_until,
)

CURL = shutil.which("curl")


class Promises(ServerCase):
    def test_1_live_a_byte_of_any_kind_comes_at_once(self) -> None:
        script = self.python(
            "import sys\n"
            "for part in (b'no newline', b'\\r 10%', b'\\r 20%', b'\\xff\\xfe\\x00', b'\\n'):\n"
            "    sys.stdout.buffer.write(part); sys.stdout.buffer.flush(); sys.stdin.read(1)\n"
        )
        server = self.serve({"x": Command(script, stdin=True)})
        with self.connect(server) as client:
            client.get("/x", "POST", ["Transfer-Encoding: chunked"])
            client.read_head()
            for expected in (b"no newline", b"\r 10%", b"\r 20%", b"\xff\xfe\x00", b"\n"):
                self.assertEqual(client.read_chunk(), expected)
                client.send(b"1\r\n.\r\n")

    @unittest.skipUnless(CURL, "curl is not installed")
    def test_2_exact_the_body_is_the_output_byte_for_byte(self) -> None:
        data = os.urandom(3_000_001) + b"last line without an end"
        (self.folder / "data").write_bytes(data)
        server = self.serve({"x": f"cat {self.folder}/data"})
        for options in ([], ["--http1.0"]):
            got = subprocess.run(
                ["curl", "-sN", *options, f"{server.url}/x"], stdout=subprocess.PIPE, check=True
            ).stdout
            self.assertEqual(hashlib.sha256(got).digest(), hashlib.sha256(data).digest())

    @unittest.skipUnless(CURL, "curl is not installed")
    def test_3_honest_endings_a_cut_run_is_told_from_a_finished_one(self) -> None:
        server = self.serve(
            {"ok": "echo x", "fail": "!echo x; exit 3", "cut": Command("!echo x; sleep 300", timeout=0.2)}
        )
        for path, code, exit_code in (("ok", 0, "0"), ("fail", 0, "3"), ("cut", 18, "")):
            for asks in (True, False):
                with self.subTest(path=path, asks=asks):
                    options = ["-siN", *(["-H", "TE: trailers"] if asks else [])]
                    done = subprocess.run(["curl", *options, f"{server.url}/{path}"], stdout=subprocess.PIPE, text=True)
                    self.assertEqual(done.returncode, code)
                    trailers = [f"Exit-Code: {exit_code}"] if asks and exit_code else []
                    self.assertEqual(re.findall("(?m)^Exit-Code: .*$", done.stdout), trailers)
        for path, exit_code in (("ok", "0"), ("fail", "3")):
            self.assertEqual(self.fetch(server, f"/{path}?wait").headers["exit-code"], exit_code)
        self.assertNotEqual(subprocess.run(["curl", "-s", "--http1.0", f"{server.url}/cut"], stdout=-1).returncode, 0)
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", "/cut")
        answer = connection.getresponse()
        with self.assertRaises(http.client.IncompleteRead):
            answer.read()
        connection.close()

    def test_4_nothing_left_behind_the_whole_group_goes_with_its_run(self) -> None:
        tree = (
            "!sleep 300 & (trap '' TERM; sleep 300; sleep 300) & sleep 300 >/dev/null 2>&1 & "
            "echo $$ $(ps -A -o pid= -o pgid= | grep \" $$$\" | sed 's/ [0-9]*$//')"
        )
        server = self.serve(
            {"over": tree, "held": tree + "; wait", "t": Command(tree + "; wait", timeout=2)},
            grace_seconds=0.4,
            drain_seconds=0.4,
        )
        pids: list[int] = []
        for path in ("/over", "/t"):
            pids += pids_in(self.fetch(server, path + "?footer=0").body)
        for is_left in (True, False):
            client = self.connect(server)
            client.get("/held")
            client.read_head()
            pids += pids_in(client.read_chunk() or b"")
            if is_left:
                client.sock.close()
        self.assertGreater(len(pids), 8)
        server.close()
        wait_until(lambda: not any(map(is_alive, pids)), "every process is gone")

    def test_5_bounded_a_reader_that_stops_leaves_memory_flat(self) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}  # which takes room
        with Program("-p", "0", "yes=yes", env=env) as program, program.connect() as client:
            client.get("/yes")
            client.read_head()
            client.read_chunk()
            pid = program.process.pid
            wait_until(lambda: self.is_quiet(pid), "the server waits for its client")
            before = resident_bytes(pid)
            time.sleep(1)  # time in which memory would grow
            self.assertLess(resident_bytes(pid) - before, 1 << 20)
            self.assertLess(before, 40 << 20)

    def is_quiet(self, pid: int) -> bool:
        """Whether a process uses no processor time for a moment."""
        before = processor_seconds(pid)
        time.sleep(0.1)
        return processor_seconds(pid) == before

    def test_6_allow_listed_no_value_is_read_as_shell_text_or_an_option(self) -> None:
        mark = self.folder / "mark"
        server = self.serve(
            {"argv": "printf %s {v:text}", "shell": "!v={v:text}; printf %s \"$v\"; printf %s '{n=1}' >/dev/null"}
        )
        for value in (
            f"; touch {mark}",
            f"$(touch {mark})",
            f"`touch {mark}`",
            f"' ; touch {mark} ; '",
            f'" ; touch {mark} ; "',
            f"| touch {mark}",
            f"& touch {mark} &",
            f"${{IFS}}touch${{IFS}}{mark}",
            f"\\'; touch {mark}; \\'",
            f"> {mark}",
            "* ? [a-z] ~ {a,b} !!",
        ):
            for name in ("argv", "shell"):
                with self.subTest(value=value, name=name):
                    answer = self.fetch(server, f"/{name}?v={urllib.parse.quote(value)}")
                    self.assertEqual((answer.status, answer.body), (200, value.encode()))
        for value in ("-x", "--help", "-%25s"):
            for name in ("argv", "shell"):
                self.assertEqual(self.fetch(server, f"/{name}?v={value}").status, 400)
        self.assertFalse(mark.exists())

    def test_7_closed_by_default_strangers_hosts_and_sites_are_refused(self) -> None:
        mark = self.folder / "mark"
        server = self.serve({"x": f"touch {mark}"})
        self.assertEqual(server.server_address[0], "127.0.0.1")
        for lines in (
            ["Host: evil.test"],
            ["Host: localhost", "Sec-Fetch-Site: cross-site"],
            ["Host: localhost", "Origin: http://evil.test"],
        ):
            with self.subTest(lines=lines), self.connect(server) as client:
                client.send("\r\n".join(["GET /x HTTP/1.1", *lines, "", ""]).encode())
                self.assertEqual(client.read_answer().status, 403)
        with self.assertRaises(streamlog.ConfigError):
            streamlog.Server({}, streamlog.Settings(bind="0.0.0.0", port=0))
        self.assertFalse(mark.exists())

    def test_8_no_javascript_no_dependency_one_file(self) -> None:
        tree = ast.parse(Path(PROGRAM).read_text())
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(str(node.module).partition(".")[0])
        if sys.version_info >= (3, 10):
            self.assertLessEqual(modules, sys.stdlib_module_names)
        # Without site-packages and without the folder it lies in: by its text alone.
        with open(PROGRAM, "rb") as source:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-", "--check"], stdin=source, stdout=subprocess.PIPE, cwd=self.folder
            )
        self.assertEqual(done.returncode, 0)
        page = self.fetch(self.serve({"x": "true"}), "/", headers=["Accept: text/html"])
        self.assertNotIn(b"<script", page.body)
        self.assertNotIn("script-src", page.headers["content-security-policy"])

    def test_9_a_guest_importing_it_touches_nothing(self) -> None:
        script = (
            "import logging, os, signal, sys, threading\n"
            "def state():\n"
            "    handlers = [signal.getsignal(number) for number in signal.valid_signals()]\n"
            "    log = [logging.root.handlers, logging.root.level]\n"
            "    process = [dict(os.environ), sys.stdout, os.listdir('/proc/self/fd'), os.umask(0o22)]\n"
            "    return handlers, log, process, threading.active_count()\n"
            "os.umask(0o22); before = state()\n"
            "import streamlog\n"
            "assert state() == before and not logging.getLogger('streamlog').handlers\n"
            "with streamlog.Server({'x': streamlog.Command('true')}, streamlog.Settings(port=0)).start(): pass\n"
            "assert state() == before\n"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
