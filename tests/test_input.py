"""A request's body as a command's input, terminals, and sessions by both."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import unittest
from typing import Any
from unittest import mock

import streamlog
from streamlog import Command, ConfigError

from .support import (
    CERTIFICATE,
    SOAK,
    Program,
    Raw,
    ServerCase,
    at_once,
    is_alive,
    pids_in,
    resident_bytes,
    run_program,
    wait_until,
)

CURL = shutil.which("curl")
FORM = "Content-Type: application/x-www-form-urlencoded"


def taking(command: str, **options: Any) -> Command:
    return Command(command, stdin=True, **options)


PAGERS = (b"PAGER", b"GIT_PAGER", b"MANPAGER", b"SYSTEMD_PAGER")


class InputCase(ServerCase):
    def begin(self, server: streamlog.Server, path: str, *headers: str, method: str = "PUT", **options: Any) -> Raw:
        """A client that has sent the head of a request with a body."""
        client = self.connect(server, **options)
        client.get(path, method, headers or ("Transfer-Encoding: chunked",))
        return client

    def send(self, client: Raw, data: bytes) -> None:
        client.send(b"%x\r\n%b\r\n" % (len(data), data))


class Bodies(InputCase):
    def test_a_body_is_the_command_s_input_whatever_it_calls_itself(self) -> None:
        server = self.serve({"cat": taking("cat"), "count": taking("wc {option=c}", method="GET")})
        for method, headers in (
            ("POST", [FORM]),
            ("PUT", ["Content-Type: application/json"]),
            ("POST", []),
            ("PUT", ["Expect: 100-continue"]),
        ):
            with self.subTest(method=method, headers=headers):
                with self.begin(server, "/cat", "Content-Length: 7", *headers, method=method) as client:
                    if "Expect: 100-continue" in headers:
                        self.assertEqual(client.read_until(b"\r\n\r\n"), b"HTTP/1.1 100 Continue\r\n\r\n")
                    client.send(b"a=1&b=2")
                    answer = client.read_answer()
                self.assertEqual((answer.body, answer.trailers), (b"a=1&b=2", {"Exit-Code": "0"}))
        with self.begin(server, "/cat") as client:
            self.send(client, b"chunked")
            client.send(b"0\r\nTrailer: x\r\n\r\n")
            self.assertEqual(client.read_answer().body, b"chunked")

    def test_parameters_come_from_the_query_alone(self) -> None:
        server = self.serve({"x": taking("tr a {to}")})
        self.assertEqual(self.fetch(server, "/x?to=b", "POST", [FORM], b"to=c").body, b"to=c")
        self.assertEqual(self.fetch(server, "/x", "POST", [FORM], b"to=c").status, 400)

    def test_which_methods_it_takes(self) -> None:
        server = self.serve({"x": taking("wc -c"), "y": taking("wc -c", method="GET"), "z": "wc -c"})
        for path, method, body, status, told in (
            ("/x", "GET", b"", 405, b"takes OPTIONS, POST, PUT, not GET"),
            ("/x", "POST", b"", 200, b"0\n"),
            ("/x", "PUT", b"", 200, b"0\n"),
            ("/y", "GET", b"", 200, b"0\n"),
            ("/y", "PUT", b"abc", 200, b"3\n"),
            ("/y", "GET", b"abc", 400, b"takes no body"),
            ("/z", "PUT", b"abc", 405, b"takes GET, HEAD, OPTIONS"),
        ):
            with self.subTest(path=path, method=method):
                answer = self.fetch(server, path, method, [], body)
                self.assertEqual(answer.status, status)
                self.assertIn(told, answer.body)

    def test_a_field_of_a_form_is_the_input(self) -> None:
        server = self.serve({"x": Command("!tag={tag=none}; echo $tag; cat", stdin=True)})
        for query, form, output in (
            ("-=form", b"tag=a&-=one%0D%0Atwo+%26+%C3%A9", b"a\none\ntwo & \xc3\xa9"),
            ("-=form&tag=b", b"-=", b"b\n"),
            ("-=form", b"tag=c", b"c\n"),
            ("-=form&format=text", b"-=" + b"x" * 60_000, b"none\n" + b"x" * 60_000),
            ("", b"tag=a&-=one", b"none\ntag=a&-=one"),  # as ever: to curl the body is the input
        ):
            with self.subTest(query=query, form=form[:40]):
                answer = self.fetch(server, f"/x?{query}", "POST", [FORM], form)
                self.assertEqual((answer.status, answer.body), (200, output))
        for form, headers, status in (
            (b"other=a&-=one", [FORM], 400),
            (b"-=" + b"x" * 70_000, [FORM], 413),
            (b"-=one", ["Content-Type: text/plain"], 415),
            (b"-=%ff", [FORM], 400),
        ):
            with self.subTest(form=form[:40]):
                self.assertEqual(self.fetch(server, "/x?-=form", "POST", headers, form).status, status)

    def test_a_json_object_is_parameters(self) -> None:
        server = self.serve({"x": Command("echo {a=none} {b:text=} {n:float=0}", method="POST")})
        json_ = "Content-Type: application/json"
        for type_, body, output in (
            (json_, b'{"a": "x", "b": "two words \\u00e9", "n": 1.50}', "x two words é 1.50\n"),
            ("Content-Type: application/json; charset=utf-8", b' {"a": true, "n": 3e2} ', "true  3e2\n"),
            (json_, b'{"a": false, "b": ""}', "false  0\n"),
            (json_, b"{}", "none  0\n"),
        ):
            with self.subTest(body=body):
                answer = self.fetch(server, "/x", "POST", [type_], body)
                self.assertEqual((answer.status, answer.body.decode()), (200, output))
        for body, told in (
            (b'{"a": {"b": 1}}', "a JSON object whose values are strings, numbers or booleans"),
            (b'{"a": ["x"]}', "a JSON object whose values are strings, numbers or booleans"),
            (b'{"a": null}', "a JSON object whose values are strings, numbers or booleans"),
            (b'{"n": NaN}', "a JSON object whose values are strings, numbers or booleans"),
            (b'[["a", "x"]]', "a JSON object whose values are strings, numbers or booleans"),
            (b'["ab"]', "a JSON object whose values are strings, numbers or booleans"),
            (b'"ab"', "a JSON object whose values are strings, numbers or booleans"),
            (b"1", "a JSON object whose values are strings, numbers or booleans"),
            (b"null", "a JSON object whose values are strings, numbers or booleans"),
            (b" ", "a JSON object whose values are strings, numbers or booleans"),
            (b"{", "a JSON object whose values are strings, numbers or booleans"),
            (b'{"a": "x", }', "a JSON object whose values are strings, numbers or booleans"),
            (b"[" * 60_000, "a JSON object whose values are strings, numbers or booleans"),
            (b'{"b": "\\ud800"}', "a JSON object whose values are strings, numbers or booleans"),
            (b'{"b": "\xff"}', "must be UTF-8"),
            (b'{"a": "x", "a": "y"}', "parameter 'a' of 'x' is given twice"),
            (b'{"a": "-x"}', "must not begin with '-'"),
            (b'{"c": "x"}', "has no parameter 'c'"),
            (b'{"n": ' + b"9" * 30_000 + b"e}", "a JSON object whose values are strings, numbers or booleans"),
        ):
            with self.subTest(body=body[:40]):
                answer = self.fetch(server, "/x", "POST", [json_], body)
                self.assertEqual(answer.status, 400)
                self.assertIn(told, answer.body.decode())
        self.assertEqual(self.fetch(server, "/x", "POST", ["Content-Type: application/jsonl"], b"{}").status, 415)
        big = b'{"b": "' + b"x" * 70_000 + b'"}'
        self.assertEqual(self.fetch(server, "/x", "POST", [json_], big).status, 413)

    def test_json_to_a_command_with_input_is_its_input(self) -> None:
        server = self.serve({"x": Command("cat", stdin=True)})
        answer = self.fetch(server, "/x", "POST", ["Content-Type: application/json"], b'{"a": [1]}')
        self.assertEqual((answer.status, answer.body), (200, b'{"a": [1]}'))

    def test_a_multipart_form_is_refused(self) -> None:
        server = self.serve({"x": taking("wc -c")})
        answer = self.fetch(server, "/x", "POST", ["Content-Type: multipart/form-data; boundary=x"], b"--x")
        self.assertEqual((answer.status, b"curl -T" in answer.body), (415, True))

    def test_a_line_is_answered_before_the_next_is_sent(self) -> None:
        server = self.serve({"x": taking("!while read line; do echo got $line; done")})
        with self.begin(server, "/x") as client:
            for line in (b"one", b"two", b"three"):
                self.send(client, line + b"\n")
                if line == b"one":
                    client.read_head()
                self.assertEqual(client.read_chunk(), b"got " + line + b"\n")
            client.send(b"0\r\n\r\n")
            self.assertEqual(client.read_until(b"\r\n\r\n"), b"0\r\nExit-Code: 0\r\n\r\n")

    def test_a_command_that_does_not_read_gives_a_whole_answer(self) -> None:
        server = self.serve(
            {
                "none": taking("echo whole"),
                "some": taking("head -c 3"),
                "closed": taking("!exec <&-; sleep 0.3; echo whole"),
            }
        )
        data = bytes(20_000_000)
        for path in ("/none", "/some", "/closed"):
            with self.subTest(path=path), self.begin(server, path, f"Content-Length: {len(data)}") as client:

                def send(client: Raw = client) -> None:
                    with contextlib.suppress(OSError):
                        client.send(data)

                sender = threading.Thread(target=send)
                sender.start()
                answer = client.read_answer()
                self.assertTrue(answer.is_whole)
                self.assertEqual(answer.body, bytes(3) if path == "/some" else b"whole\n")
                client.reset()
                sender.join()

    def test_a_client_that_aborts_its_upload_ends_the_run_without_an_end_of_file(self) -> None:
        got = self.folder / "got"
        server = self.serve({"x": taking(f"!echo $$; cat > {got} && touch {self.folder}/done")})
        for start, part in (
            (("Content-Length: 100",), b"x" * 50),
            (("Transfer-Encoding: chunked",), b"32\r\n" + b"x" * 50 + b"\r\n"),
            (("Transfer-Encoding: chunked",), b"32\r\n" + b"x" * 20),
        ):
            for way in ("close", "reset", "half"):
                with self.subTest(start=start, way=way), self.begin(server, "/x", *start) as client:
                    client.read_head()
                    (pid,) = pids_in(client.read_chunk() or b"")
                    client.send(part)
                    wait_until(lambda: got.exists() and got.stat().st_size, "it has some of it")
                    if way == "reset":
                        client.reset()
                    elif way == "half":
                        client.sock.shutdown(socket.SHUT_WR)
                    else:
                        client.sock.close()
                    wait_until(lambda pid=pid: not is_alive(pid), "it is gone", 5)  # type: ignore[misc]
                    self.assertFalse((self.folder / "done").exists())
                got.unlink()

    def test_a_client_whose_command_does_not_read_is_seen_to_leave(self) -> None:
        server = self.serve({"x": taking("!echo $$; exec sleep 300")})
        with self.begin(server, "/x", f"Content-Length: {1 << 30}") as client:
            client.read_head()
            (pid,) = pids_in(client.read_chunk() or b"")
            client.send(bytes(150_000))  # more than the way to the command holds; the system has the rest
            time.sleep(0.2)  # until the way is full
        wait_until(lambda: not is_alive(pid), "it is gone")

    def test_an_upload_that_never_ends_is_cut_with_its_run(self) -> None:
        for version in ("1.0", "1.1"):
            server = self.serve({"x": taking("!echo; cat > /dev/null", timeout=0.3)})
            with self.subTest(version), self.connect(server) as client:
                client.get("/x", "POST", [f"Content-Length: {1 << 40}"], version)
                client.read_head()
                started = time.monotonic()
                with self.assertRaises(OSError):
                    while time.monotonic() - started < 10:
                        client.send(bytes(65536))
                threads = [thread for thread in threading.enumerate() if thread.name == "streamlog-input"]
                wait_until(lambda threads=threads: not any(map(threading.Thread.is_alive, threads)), "it is gone")  # type: ignore[misc]

    def test_where_poll_reports_no_hang_up_it_shows_when_there_is_output(self) -> None:
        with mock.patch.object(streamlog, "_HANG_UP", 0):
            server = self.serve({"x": taking("!echo $$; while sleep 0.2; do echo more; done")})
            with self.begin(server, "/x", f"Content-Length: {1 << 30}") as client:
                client.read_head()
                (pid,) = pids_in(client.read_chunk() or b"")
                client.sock.settimeout(0.3)
                with self.assertRaises(OSError):
                    while True:
                        client.send(bytes(65536))
            wait_until(lambda: not is_alive(pid), "it is gone", 5)

    def test_where_poll_reports_no_hang_up_a_command_that_reads_is_stopped_too(self) -> None:
        with mock.patch.object(streamlog, "_HANG_UP", 0):
            server = self.serve({"x": taking("!echo $$; cat > /dev/null")})
            for leave in ("close", "reset"):
                client = self.begin(server, "/x")
                client.read_head()
                (pid,) = pids_in(client.read_chunk() or b"")
                self.send(client, bytes(100_000))
                (client.reset if leave == "reset" else client.sock.close)()
                wait_until(lambda pid=pid: not is_alive(pid), "it is gone")  # type: ignore[misc]

    def test_neither_side_is_read_from_faster_than_the_other_takes_it(self) -> None:
        server = self.serve({"x": taking("cat")})
        before = resident_bytes()
        with self.begin(server, "/x", f"Content-Length: {1 << 30}", receive_buffer=4096) as client:
            client.sock.settimeout(0.5)
            sent = 0
            with self.assertRaises(OSError):  # it does not read what comes back
                while True:
                    sent += client.sock.send(bytes(65536))
            self.assertLess(sent, 40 << 20)
            self.assertLess(resident_bytes() - before, 8 << 20)

    def test_what_is_malformed_ends_the_run(self) -> None:
        server = self.serve({"x": taking("!echo $$; cat")})
        with self.begin(server, "/x") as client, self.log_of() as logged:
            client.read_head()
            (pid,) = pids_in(client.read_chunk() or b"")
            client.send(b"zz\r\n")
            self.assertTrue(client.is_closed())
            wait_until(lambda: not is_alive(pid), "it is gone")
            wait_until(lambda: logged.output, "it is logged")
        self.assertIn('end="a chunk of the body must begin with its size', logged.output[0])

    def test_nothing_is_passed_on_behind_what_is_malformed(self) -> None:
        got = self.folder / "got"
        script = f"!trap '' TERM; (while :; do echo tick; sleep 0.05; done) & cat > {got}; echo end >> {got}; sleep 1"
        server = self.serve({"x": taking(script)}, grace_seconds=0.5)
        with self.begin(server, "/x") as client:
            client.read_head()
            self.send(client, b"first")
            wait_until(lambda: got.exists() and got.read_bytes() == b"first", "it has come")
            client.send(b"ZZ\r\n5\r\nworld\r\n0\r\n\r\n")
            self.assertTrue(client.is_closed())
        self.assertEqual(got.read_bytes(), b"first")

    def test_http_1_0_and_timeouts_hold(self) -> None:
        server = self.serve({"x": taking("cat"), "slow": taking("!cat; sleep 300", timeout=2)})
        self.assertEqual(self.fetch(server, "/x", "POST", [], b"abc", version="1.0").body, b"abc")
        answer = self.fetch(server, "/slow", "POST", [], b"abc\n")
        self.assertFalse(answer.is_whole)
        self.assertIn(b"abc\n[stopped: timeout", answer.body)

    def test_many_uploads_at_once_are_kept_apart(self) -> None:
        server = self.serve({"x": taking("cat")})
        count = max(10, SOAK // 20)
        failed: list[int] = []

        def upload(number: int) -> None:
            data = hashlib.sha256(b"%d" % number).digest() * 20_000
            with self.begin(server, "/x", f"Content-Length: {len(data)}") as client:
                sender = threading.Thread(target=client.send, args=(data,))
                sender.start()
                if client.read_answer().body != data:
                    failed.append(number)
                sender.join()

        at_once(self, upload, *([number] for number in range(count)))
        self.assertEqual(failed, [])


@unittest.skipUnless(CURL, "curl is not installed")
class Curl(InputCase):
    """By curl, over TCP, TLS and a unix socket."""

    commands = {
        "cat": taking("cat"),
        "wc": taking("wc -c"),
        "true": taking("true"),
        "untar": taking("tar xv -C {to:path}"),
        "python": taking(f"{sys.executable} -i"),
        "sh": taking("sh"),
        "terminal": taking("sh -i", pty=True),
        **({"bc": taking("bc")} if shutil.which("bc") else {}),
    }

    def servers(self) -> list[tuple[str, list[str]]]:
        """For each way to get there, the URL and curl's options."""
        path = self.folder / "socket"
        return [
            (self.serve(self.commands, drain_seconds=0.2).url, []),
            (
                self.serve(self.commands, tls_cert=CERTIFICATE, drain_seconds=0.2).url.replace(
                    "127.0.0.1", "localhost"
                ),
                ["--cacert", CERTIFICATE],
            ),
            (
                "http://localhost",
                ["--unix-socket", str(path)]
                if self.serve(self.commands, bind=f"unix:{path}", drain_seconds=0.2)
                else [],
            ),
        ]

    def curl(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["curl", "-sSN", *arguments], stdout=-1, stderr=-1, **options)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                self.addCleanup(pipe.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def test_files_go_up_and_what_comes_of_them_down(self) -> None:
        data = os.urandom(3_000_000)
        (self.folder / "data").write_bytes(data)
        for url, options in self.servers():
            for given in (["--data-binary", f"@{self.folder}/data"], ["-T", f"{self.folder}/data"]):
                with self.subTest(url=url, given=given):
                    self.assertEqual(self.curl(*options, *given, f"{url}/cat").communicate(timeout=20), (data, b""))
                    process = self.curl(*options, *given, f"{url}/true")
                    self.assertEqual(process.communicate(timeout=20), (b"", b""))
                    self.assertEqual(process.returncode, 0)
            (self.folder / "to").mkdir(exist_ok=True)
            tar = subprocess.Popen(["tar", "c", "-C", str(self.folder), "data"], stdout=-1)
            untar = self.curl(*options, "-T", "-", f"{url}/untar?to={self.folder}/to", stdin=tar.stdout)
            assert tar.stdout
            tar.stdout.close()
            self.assertEqual(untar.communicate(timeout=20), (b"data\n", b""))
            tar.wait()
            self.assertEqual((self.folder / "to" / "data").read_bytes(), data)

    def test_uploads_over_tls_that_nobody_reads_end_well(self) -> None:
        (self.folder / "data").write_bytes(bytes(3_000_000))
        (self.folder / "config").write_text("[x]\ncommand = true\nstdin = yes\n")
        with Program("-p", "0", "-q", "--tls-cert", CERTIFICATE, "-c", str(self.folder / "config")) as program:
            for _ in range(SOAK // 5):
                url = f"https://localhost:{program.port}/x"
                ways = [self.curl("--cacert", CERTIFICATE, "-T", f"{self.folder}/data", url) for _ in range(3)]
                for way in ways:
                    self.assertEqual((way.communicate(timeout=20), way.returncode), ((b"", b""), 0))
            self.assertIsNone(program.process.poll())

    def test_a_gibibyte_goes_through_cat_and_the_server_stays_flat(self) -> None:
        size = 1 << 30 if SOAK >= 1000 else 1 << 26
        (url, _), *_ = self.servers()
        before = resident_bytes()
        script = f"head -c {size} /dev/zero | curl -sSN -T - {url}/cat | sha256sum"
        done = subprocess.run(["sh", "-c", script], stdout=-1, timeout=120)
        block = bytes(1 << 20)
        digest = hashlib.sha256()
        for _ in range(size >> 20):
            digest.update(block)
        self.assertEqual(done.stdout.split()[0].decode(), digest.hexdigest())
        self.assertLess(resident_bytes() - before, 4 << 20)

    def session(self, url: str, options: list[str], name: str) -> tuple[subprocess.Popen[bytes], Any]:
        process = self.curl(*options, "-T", ".", f"{url}/{name}", stdin=-1)
        assert process.stdin
        return process, process.stdin

    def say(self, process: subprocess.Popen[bytes], line: bytes, answer: bytes) -> None:
        assert process.stdin
        assert process.stdout
        process.stdin.write(line + b"\n")
        process.stdin.flush()
        said = b""
        while answer not in said:
            piece = os.read(process.stdout.fileno(), 4096)
            self.assertTrue(piece, said)
            said += piece

    def test_sessions_answer_each_line_and_leave_nothing(self) -> None:
        for url, options in self.servers():
            for name, lines in (
                ("python", ((b"2+2", b"4\n"), (b"len('foobar')", b"6\n"))),
                ("sh", ((b"echo $((2+2))", b"4\n"), (b"sleep 301 & echo started", b"started\n"))),
                ("terminal", ((b"echo $((2+2))", b"4\n"), (b"tty", b"/dev/"), (b"sleep 302 & echo go", b"go\n"))),
                ("bc", ((b"2+2", b"4\n"), (b"3*4", b"12\n"))),
            ):
                if name not in self.commands:
                    continue
                for end in ("by itself", "by the client"):
                    with self.subTest(url=url, name=name, end=end):
                        process, stdin = self.session(url, options, name)
                        for line, answer in lines:
                            self.say(process, line, answer)
                        if end == "by itself":
                            stdin.close()
                            process.wait(10)
                            self.assertEqual(process.returncode, 0)
                        else:
                            process.kill()
                            process.wait()
                            stdin.close()
                        left = ["pgrep", "-f", "^(sleep 30[12]|bc|sh -i|sh|.*python[0-9.]* -i)$"]
                        wait_until(lambda left=left: not subprocess.run(left, stdout=-1).stdout, "all is gone", 8)  # type: ignore[misc]


class Terminals(InputCase):
    def test_the_command_has_a_terminal_of_the_size_that_is_set(self) -> None:
        script = (
            "!test -t 1 && test -t 2 && stty size < /dev/tty; echo $COLUMNS $LINES $TERM; test -t 0 || echo no input"
        )
        server = self.serve({"x": Command(script, pty=True)}, terminal_size=(100, 30))
        self.assertEqual(self.fetch(server, "/x").body, b"30 100\n100 30 xterm-256color\nno input\n")

    def test_a_command_has_a_size_of_its_own_and_no_pager_that_waits_for_keys(self) -> None:
        script = "!stty size </dev/tty; echo $PAGER $GIT_PAGER $MANPAGER $SYSTEMD_PAGER"
        server = self.serve(
            {
                "x": Command(script, pty=True, terminal=(132, 40)),
                "input": Command(script, pty=True, stdin=True, env={"PAGER": "less"}),
                "mine": Command(script, pty=True, env={"PAGER": "less"}),
            }
        )
        self.assertEqual(self.fetch(server, "/x").body, b"40 132\ncat cat cat cat\n")
        self.assertEqual(self.fetch(server, "/input", "POST").body.split()[2:3], [b"less"])
        self.assertEqual(self.fetch(server, "/mine").body, b"24 80\nless cat cat cat\n")

    def test_it_is_the_controlling_terminal_and_the_command_leads_its_session(self) -> None:
        script = "import os; print(os.getsid(0) == os.getpid() == os.tcgetpgrp(1), open('/dev/tty', 'w').isatty())"
        server = self.serve({"x": Command([sys.executable, "-c", script], pty=True)})
        self.assertEqual(self.fetch(server, "/x").body, b"True True\n")

    def test_output_is_as_it_was_written_unless_echo_is_asked_for(self) -> None:
        server = self.serve({"plain": taking("cat", pty=True), "echo": taking("cat", pty="echo")})
        self.assertEqual(self.fetch(server, "/plain", "POST", [], b"a\nb").body, b"a\nb")
        self.assertEqual(self.fetch(server, "/echo", "POST", [], b"a\n").body, b"a\r\na\r\n")

    def test_all_of_a_long_output_arrives(self) -> None:
        server = self.serve({"x": Command("seq 1 200000", pty=True)})
        with self.connect(server, receive_buffer=4096) as client:
            client.get("/x")
            client.read_head()
            time.sleep(0.3)  # it has ended by then, but for what it could not write
            body = b"".join(iter(client.read_chunk, None))
        self.assertEqual(
            hashlib.sha256(body).digest(), hashlib.sha256("".join(f"{n}\n" for n in range(1, 200001)).encode()).digest()
        )

    def test_a_program_that_hides_colours_and_buffers_without_one_does_not(self) -> None:
        code = "import os, time; w = os.fdopen(1, 'w'); w.write('first\\n'); time.sleep(60)"
        server = self.serve(
            {
                "ls": Command("ls --color=auto /", pty=True),
                "slow": Command([sys.executable, "-c", code], pty=True, env={"PYTHONUNBUFFERED": ""}),
            }
        )
        self.assertIn(b"\x1b[", self.fetch(server, "/ls").body)
        with self.connect(server) as client:
            client.get("/slow")
            client.read_head()
            self.assertEqual(client.read_chunk(), b"first\n")

    def test_exit_codes_and_signals_are_told(self) -> None:
        server = self.serve({"x": Command("!exit 3", pty=True), "y": Command("!kill -9 $$", pty=True)})
        self.assertEqual(self.fetch(server, "/x").trailers, {"Exit-Code": "3"})
        self.assertEqual(self.fetch(server, "/y").trailers, {"Exit-Code": "137"})

    def test_a_program_that_closes_its_terminal_before_it_exits_is_not_hung_up_on(self) -> None:
        line = "!echo out; exec <&- >&- 2>&-; sleep 0.3; exit 3"
        for stdin in (False, True):
            server = self.serve({"x": Command(line, pty=True, stdin=stdin)})
            answer = self.fetch(server, "/x", "POST" if stdin else "GET")
            self.assertEqual((answer.body, answer.trailers["Exit-Code"]), (b"out\n", "3"))

    def test_a_program_that_is_missing_is_a_500(self) -> None:
        text = self.folder / "text"
        text.write_text("no program\n")
        server = self.serve(
            {
                "x": Command("no-such-program", pty=True),
                "y": Command([str(text)], pty=True),
                "z": Command("true", pty=True, cwd="/nowhere"),
            }
        )
        for path, told in (("/x", "No such file"), ("/y", "cannot start"), ("/z", "in '/nowhere'")):
            answer = self.fetch(server, path)
            self.assertEqual((answer.status, told in answer.body.decode()), (500, True), answer.body)

    def test_the_signals_are_as_a_program_expects_them(self) -> None:
        script = "import signal; print(signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN)"  # Python ignores it itself
        check = "!grep SigIgn /proc/self/status"
        server = self.serve({"x": Command(check, pty=True), "y": Command([sys.executable, "-c", script], pty=True)})
        self.assertEqual(int(self.fetch(server, "/x").body.split()[-1], 16), 0)

    def test_a_client_that_leaves_hangs_up_and_ends_jobs_too(self) -> None:
        bash = shutil.which("bash")
        if not bash:
            self.skipTest("bash is not installed")
        server = self.serve({"x": taking("bash --norc -i", pty=True)}, grace_seconds=3.0)
        with self.begin(server, "/x") as client:
            client.read_head()
            self.send(
                client,
                b"sleep 303 & (trap '' HUP TERM; exec sleep 304) & echo $$ $! started; nohup sleep 305 >/dev/null &\n",
            )
            said = b""
            while b" started" not in said:
                said += client.read_chunk() or b""
        left = ["pgrep", "-f", "^sleep 30[345]$"]
        wait_until(lambda: not subprocess.run(left, stdout=-1).stdout, "all of the session is gone", 8)

    def test_control_characters_act_as_typed(self) -> None:
        server = self.serve(
            {
                "x": taking(
                    "sh -c 'trap \"echo caught; exit 4\" INT; echo ready; while :; do sleep 0.05; done'", pty=True
                )
            }
        )
        with self.begin(server, "/x") as client:
            client.read_head()
            self.assertEqual(client.read_chunk(), b"ready\n")
            self.send(client, b"\x03")
            answer = client.read_until(b"\r\n\r\n")
        self.assertIn(b"caught\n", answer)
        self.assertIn(b"Exit-Code: 4", answer)

    def test_the_end_of_the_input_reaches_a_shell_that_takes_the_terminal_over(self) -> None:
        bash = shutil.which("bash")
        if not bash:
            self.skipTest("bash is not installed")
        server = self.serve({"x": taking("bash --norc -i", pty=True), "py": taking(f"{sys.executable} -i", pty=True)})
        for path, line, said in (("/x", b"echo $((40+2))\n", b"42\n"), ("/py", b"print(40+2)\n", b"42\n")):
            started = time.monotonic()
            answer = self.fetch(server, path, "POST", [], line)
            self.assertIn(said, answer.body)
            self.assertEqual((answer.is_whole, time.monotonic() - started < 8), (True, True))

    def test_it_may_clean_up_on_sigterm_before_the_terminal_hangs_up(self) -> None:
        note = self.folder / "note"
        script = f"!trap 'echo cleaned > {note}; exit 3' TERM; echo up; while :; do sleep 0.05; done"
        server = self.serve({"x": Command(script, pty=True)}, grace_seconds=10)
        with mock.patch.object(streamlog, "_HANG_UP_SECONDS", 5), self.connect(server) as client:
            client.get("/x")
            client.read_head()
            client.read_chunk()
            client.sock.close()
            wait_until(lambda: note.exists() and note.read_text() == "cleaned\n", "it has cleaned up")

    def test_the_environment_is_as_without_a_terminal(self) -> None:
        for env in ({"LANG": "C"}, {"LC_CTYPE": "C"}, {"LC_ALL": "C"}):
            with mock.patch.dict(os.environ, {"LC_CTYPE": "", "LANG": ""}):
                os.environ.pop("LC_CTYPE")
                server = self.serve({"x": Command("env", env=env), "y": Command("env", env=env, pty=True)})
                plain, terminal = (set(self.fetch(server, path).body.splitlines()) for path in ("/x", "/y"))
            names = {line.partition(b"=")[0] for line in plain ^ terminal}
            self.assertLessEqual(names, {b"TERM", b"COLUMNS", b"LINES", b"PYTHON_BASIC_REPL"}.union(PAGERS))

    def test_jobs_are_found_though_their_processes_cannot_be_looked_at_in_a_moment(self) -> None:
        server = self.serve(
            {"x": Command("!set -m; (trap '' HUP TERM; exec sleep 306) & echo $!; wait", pty=True)}, grace_seconds=0.5
        )
        real, failures = os.listdir, [4]

        def listdir(path: str) -> list[str]:
            if path == "/proc" and failures[0]:
                failures[0] -= 1
                raise OSError(24, "too many")
            return real(path)

        with self.connect(server) as client:
            client.get("/x")
            client.read_head()
            pid = int((client.read_chunk() or b"").split()[0])
            patched = mock.patch.object(os, "listdir", listdir)
            patched.start()
            self.addCleanup(patched.stop)
        wait_until(lambda: not is_alive(pid), "it is found at last", 8)

    def test_mistakes_are_told_at_start(self) -> None:
        for options, told in (({"pty": "loud"}, "pty must be True, False or 'echo'"), ({"stdin": True}, None)):
            with self.subTest(options=options):
                if told:
                    with self.assertRaisesRegex(ConfigError, told):
                        Command("true", **options)
                else:
                    with self.assertRaisesRegex(ConfigError, "a task has no process"):
                        Command(lambda: None, **options)
        config = self.folder / "ini"
        for line, told in (
            ("pty = perhaps", "command 'x': pty must be yes, no or echo: 'perhaps'"),
            ("stdin = 2", "command 'x': stdin must be yes or no: '2'"),
        ):
            config.write_text(f"[x]\ncommand = true\n{line}\n")
            done = run_program("--check", "-c", str(config))
            self.assertEqual((done.returncode, told in done.stderr), (2, True), done.stderr)
        done = run_program("--terminal", "80", "true")
        self.assertIn("--terminal must be COLUMNSxLINES, as in 80x24: '80'", done.stderr)

    def test_no_terminal_is_left_open(self) -> None:
        server = self.serve({"x": Command("echo x", pty=True), "no": Command("no-such-program", pty=True)})
        for _ in range(20):
            self.fetch(server, "/x")
            self.fetch(server, "/no")  # setUp's check finds what is left

    def test_a_terminal_is_written_and_ended_through_stream(self) -> None:
        with streamlog.stream(taking("sh -i", pty=True, env={"PS1": "> "})) as run:
            run.write(b"tty && echo $((2+2))\n")
            said = b""
            while b"4\n" not in said:
                said += next(run)
            run.close_stdin()
            list(run)
            self.assertEqual(run.exit_code, 0)


class Buffering(ServerCase):
    def test_python_children_are_not_buffered(self) -> None:
        server = self.serve({"x": Command([sys.executable, "-c", "import time; print('first'); time.sleep(60)"])})
        with self.connect(server) as client:
            client.get("/x")
            client.read_head()
            client.read_until(b"first")
