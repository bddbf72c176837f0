"""The server over real sockets: streaming, endings, connections, limits and clients that behave badly."""

from __future__ import annotations

import ast
import contextlib
import errno
import hashlib
import html
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
import urllib.request
from typing import Any
from unittest import mock

import streamlog
from streamlog import Command

from .support import (
    IS_ROOT,
    ROOT,
    SOAK,
    Program,
    Raw,
    ServerCase,
    at_once,
    children,
    is_alive,
    is_held_back,
    pids_in,
    processor_seconds,
    resident_bytes,
    wait_until,
)

# Writes until neither the pipe nor the reader has taken anything for a while, and ends.
FILL = """import os, select
os.set_blocking(1, False)
while select.select([], [1], [], 2)[1]:
    os.write(1, bytes(65536))
"""
BROWSER = "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


class Answers(ServerCase):
    def test_a_run_is_a_live_chunked_answer_with_the_exit_code_as_its_trailer(self) -> None:
        answer = self.fetch(self.serve({"x": "!echo hi; exit 3"}), "/x")
        self.assertEqual((answer.status, answer.body, answer.trailers), (200, b"hi\n", {"Exit-Code": "3"}))
        for name, value in (
            ("content-type", "text/plain; charset=utf-8"),
            ("x-content-type-options", "nosniff"),
            ("cache-control", "no-cache, no-store, no-transform"),
            ("x-accel-buffering", "no"),
            ("transfer-encoding", "chunked"),
            ("trailer", "Exit-Code"),
            ("vary", "Accept"),
        ):
            self.assertEqual(answer.headers.get(name), value)

    def test_http_1_0_gets_the_same_ended_by_close(self) -> None:
        answer = self.fetch(self.serve({"x": "echo hi"}), "/x", version="1.0")
        self.assertEqual((answer.status, answer.body, answer.is_whole), (200, b"hi\n", True))
        self.assertNotIn("transfer-encoding", answer.headers)
        self.assertNotIn("trailer", answer.headers)
        self.assertEqual(answer.headers["connection"], "close")

    def test_a_run_that_the_server_ends_is_cut_with_a_last_line(self) -> None:
        server = self.serve({"x": Command("!printf a; sleep 300", timeout=1)})
        answer = self.fetch(server, "/x")
        self.assertRegex(answer.body, rb"^a\n\[stopped: timeout after 1 s, [0-9.]+ s\]\n$")
        self.assertFalse(answer.is_whole)
        self.assertEqual(self.fetch(server, "/x?footer=0").body, b"a")

    def test_a_cut_answer_of_http_1_0_ends_in_a_reset(self) -> None:
        answer = self.fetch(self.serve({"x": "sleep 300"}, timeout_seconds=0.2), "/x", version="1.0")
        self.assertFalse(answer.is_whole)

    def test_a_person_at_a_browser_gets_a_footer_and_curl_does_not(self) -> None:
        server = self.serve({"x": "!printf a", "csv": Command("echo a", type="text/csv")})
        footer = rb"a\n\[exit 0, [0-9.]+ s\]\n"
        for path, headers, expected in (
            ("/x", [], rb"a"),
            ("/x", ["Accept: */*"], rb"a"),
            ("/x", [BROWSER], footer),
            ("/x?footer=0", [BROWSER], rb"a"),
            ("/x?footer=1", [], footer),
            ("/csv", [BROWSER], rb"a\n"),
            ("/csv?footer=1", [], rb"a\n"),
        ):
            with self.subTest(path=path, headers=headers):
                self.assertRegex(self.fetch(server, path, headers=headers).body, rb"^" + expected + rb"$")
        self.assertEqual(self.fetch(server, "/csv").headers["content-type"], "text/csv")
        self.assertEqual(self.fetch(server, "/x?footer=2").status, 400)

    def test_errors_are_one_sentence_of_plain_text_and_run_nothing(self) -> None:
        mark = self.folder / "mark"
        server = self.serve(
            {
                "get": f"!echo {{x:int=1}} {{y=a}} >> {mark}",
                "post": Command(f"!echo {{x:int}} >> {mark}", method="POST"),
                "missing": "no-such-program",
            }
        )
        for method, path, status, told in (
            ("GET", "/nothing", 404, "there is nothing at '/nothing'; the commands are: get, post, missing"),
            ("GET", "/get/", 404, "nothing at '/get/'"),
            ("GET", "/GET", 404, "nothing at '/GET'"),
            ("GET", "/%67et%00", 400, "holds a control character"),
            ("GET", "/get%1b[2J", 400, "holds a control character"),
            ("GET", "//get", 404, "nothing at '//get'"),
            ("GET", "/-/nothing", 404, "nothing at"),
            (
                "GET",
                "/get?z=1",
                400,
                "'get' has no parameter 'z'; known are: x, y, format, footer, timestamps, hostname, heartbeat",
            ),
            ("GET", "/get?x=1&x=2", 400, "parameter 'x' of 'get' is given twice"),
            ("GET", "/get?footer=1&footer=1", 400, "parameter 'footer' of 'get' is given twice"),
            ("GET", "/get?x=a", 400, "parameter 'x' of 'get' must be int: 'a'"),
            ("GET", "/get?y=-v", 400, "parameter 'y' of 'get' must not begin with '-': '-v'"),
            ("GET", "/get?x", 400, "parameter 'x' of 'get' must be int: ''"),
            ("GET", "/get?%zz", 400, "must be followed by two hexadecimal digits"),
            ("HEAD", "/get?x=a", 400, ""),
            ("POST", "/get", 405, "/get takes GET, HEAD, OPTIONS, not POST"),
            ("BREW", "/get", 501, "this server has no method BREW"),
            ("GET", "/post", 405, "/post takes OPTIONS, POST, not GET"),
            ("HEAD", "/post", 405, ""),
            ("POST", "/post", 400, "parameter 'x' of 'post' is required"),
            ("PUT", "/", 405, "/ takes"),
            ("GET", "/missing", 500, "cannot start 'no-such-program': No such file or directory"),
        ):
            with self.subTest(method=method, path=path):
                answer = self.fetch(server, path, method)
                self.assertEqual(answer.status, status)
                self.assertIn(told, answer.body.decode())
                self.assertEqual(answer.body.count(b"\n"), 1 if told else 0)
                self.assertEqual(answer.headers["content-type"], "text/plain; charset=utf-8")
                if status == 405:
                    self.assertIn("OPTIONS", answer.headers["allow"])
        self.assertFalse(mark.exists())

    def test_what_could_never_work_runs_nothing(self) -> None:
        mark = self.folder / "mark"
        server = self.serve({"x": f"touch {mark}", "p": Command(f"touch {mark}", method="POST")})
        for method, path, headers, status in (
            ("GET", "/x", ["Range: bytes=1-"], 416),  # wget goes on so where an answer broke off
            ("GET", "/x", ["Range: bytes=0012345678901234567890-"], 416),
            ("POST", "/p", ["Range: bytes=7-", "User-Agent: Wget/1.21"], 416),
            ("GET", "/x", ["Connection: Upgrade", "Upgrade: websocket"], 400),
            ("GET", "/x", ["Connection: Upgrade", "Upgrade: h2c, WebSocket", "Sec-WebSocket-Version: 13"], 400),
        ):
            with self.subTest(headers=headers):
                self.assertEqual(self.fetch(server, path, method, headers).status, status)
        self.assertFalse(mark.exists())
        for headers in (["Range: bytes=0-"], ["Range: bytes=1-", "If-Range: x"], ["Upgrade: h2c"]):
            mark.unlink(missing_ok=True)
            self.assertEqual(self.fetch(server, "/x", "GET", headers).status, 200)
            self.assertTrue(mark.exists(), headers)

    def test_a_health_check_needs_no_host(self) -> None:
        server = self.serve({"x": "true"})
        for request, status in (
            (b"GET /-/healthy HTTP/1.0\r\n\r\n", 200),
            (b"HEAD /-/healthy HTTP/1.0\r\n\r\n", 200),
            (b"GET /-/healthy HTTP/1.0\r\nHost: evil.test\r\n\r\n", 403),
            (b"GET /x HTTP/1.0\r\n\r\n", 400),
        ):
            with self.connect(server) as client:
                client.send(request)
                self.assertEqual(client.read_head()[0], status, request)

    def test_the_format_is_what_accept_prefers(self) -> None:
        server = self.serve({"x": "echo x"})
        for accept, type_ in (
            ("application/json;q=0.1, */*", "text/plain"),
            ("application/json, */*;q=0.1", "application/x-ndjson"),
            ("text/event-stream;q=.5, */*; q=.4", "text/event-stream"),
            ("text/event-stream; q=.3, */*; q=.4", "text/plain"),
            ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", "text/plain"),  # Java's own
        ):
            answer = self.fetch(server, "/x", headers=[f"Accept: {accept}"])
            self.assertEqual(answer.headers["content-type"].partition(";")[0], type_, accept)

    def test_head_and_options_run_nothing(self) -> None:
        mark = self.folder / "mark"
        server = self.serve({"x": f"touch {mark}", "p": Command(f"touch {mark}", method="POST")})
        head = self.fetch(server, "/x", "HEAD")
        self.assertEqual((head.status, head.headers["content-type"]), (200, "text/plain; charset=utf-8"))
        for path, allow in (("/x", "GET, HEAD, OPTIONS"), ("/p", "OPTIONS, POST"), ("/", "GET, HEAD, OPTIONS")):
            answer = self.fetch(server, path, "OPTIONS")
            self.assertEqual((answer.status, answer.headers["allow"], answer.body), (204, allow, b""))
        with self.connect(server) as client:
            client.send(b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertEqual(client.read_answer("OPTIONS").status, 204)
        self.assertFalse(mark.exists())

    def test_every_answer_carries_the_headers_that_keep_a_browser_in_bounds(self) -> None:
        server = self.serve({"x": "true", "busy": Command("sleep 300", max=1), "none": "no-such-program"}, token="t")
        right = "Authorization: Bearer t"
        holder = self.connect(server)
        holder.get("/busy", headers=[right])
        holder.read_head()
        for path, headers, status in (
            ("/", [right], 200),
            ("/x", [right], 200),
            ("/favicon.ico", [right], 204),
            ("/x?a=b", [right], 400),
            ("/x%", [right], 400),
            ("/", [], 401),
            ("/", ["Origin: null"], 403),
            ("/nothing", [right], 404),
            ("/" + "x" * 20000, [right], 414),
            ("/", ["X: " + "x" * 70000], 431),
            ("/none", [right], 500),
            ("/busy", [right], 503),
        ):
            answer = self.fetch(server, path, headers=headers)
            self.assertEqual(answer.status, status)
            for name, value in (
                ("x-content-type-options", "nosniff"),
                ("x-frame-options", "SAMEORIGIN"),
                ("content-security-policy", "frame-ancestors 'self'"),
                ("cross-origin-resource-policy", "same-origin"),
                ("cross-origin-opener-policy", "same-origin"),
                ("referrer-policy", "same-origin"),
                ("cache-control", "no-cache, no-store, no-transform"),
            ):
                self.assertIn(value, answer.headers.get(name, ""), f"{name} of {status}")

    def test_a_path_has_one_spelling(self) -> None:
        mark = self.folder / "mark"
        server = self.serve({"x": f"touch {mark}"}, token="t")
        for path in (
            "/%2578",
            "/a/../x",
            "/%2e%2e/x",
            "/./x",
            "/x%2f",
            "/%2fx",
            "/x;y",
            "/X",
            "/-/healthy/../x",
            "//x",
        ):
            for headers, status in (([], 401), (["Authorization: Bearer t"], 404)):
                self.assertEqual(self.fetch(server, path, headers=headers).status, status, path)
        self.assertFalse(mark.exists())

    def test_headers_and_bare_queries_reach_no_command(self) -> None:
        server = self.serve({"env": "env", "sh": '!a={PATH:text=a}; echo "$PATH $a"'})
        lies = ["Proxy: http://evil", "X-Forwarded-For: evil", "X-Forwarded-Host: evil", "Forwarded: host=evil"]
        self.assertNotIn(b"evil", self.fetch(server, "/env", headers=lies).body)
        self.assertTrue(self.fetch(server, "/sh?PATH=evil").body.startswith(os.environ["PATH"].encode()))
        self.assertEqual(self.fetch(server, "/env?-s").status, 400)

    def test_a_clock_that_jumps_ends_nothing(self) -> None:
        gate = self.folder / "gate"
        script = f"!echo; until [ -e {gate} ]; do sleep 0.05; done; echo done"
        server = self.serve({"x": Command(script, timeout=30)}, idle_seconds=30)
        with self.connect(server) as client:
            client.get("/x")
            client.read_head()
            client.read_chunk()
            with mock.patch("time.time", return_value=time.time() + 1e6):
                gate.touch()
                self.assertEqual((client.read_chunk(), client.read_chunk()), (b"done\n", None))

    def test_the_health_address_says_two_bytes(self) -> None:
        self.assertEqual(self.fetch(self.serve({}), "/-/healthy").body, b"ok")

    def test_what_browsers_and_crawlers_ask_for_unasked_has_a_fixed_answer(self) -> None:
        server = self.serve({})
        self.assertEqual(self.fetch(server, "/favicon.ico").status, 204)
        self.assertEqual(self.fetch(server, "/robots.txt").body, b"User-agent: *\nDisallow: /\n")


class Forms(ServerCase):
    FORM = "Content-Type: application/x-www-form-urlencoded"

    def setUp(self) -> None:
        super().setUp()
        busy = Command("sleep 300", method="POST", max=1)
        self.server = self.serve({"p": Command("echo {a} {b:text=none}", method="POST"), "busy": busy})

    def test_a_command_that_is_replaced_while_its_form_comes_is_run_all_the_same(self) -> None:
        with self.connect(self.server) as client:
            client.get("/p", "POST", [self.FORM, "Expect: 100-continue", "Content-Length: 3"])
            self.assertEqual(client.read_head()[0], 100)
            self.server.replace({"other": "true"})
            client.send(b"a=1")
            self.assertEqual(client.read_answer("POST").body, b"1 none\n")

    def test_a_form_s_fields_are_parameters(self) -> None:
        for body in (b"a=1&b=x+y%21", b"b=x+y%21&a=1"):
            answer = self.fetch(self.server, "/p", "POST", [self.FORM + "; charset=utf-8"], body)
            self.assertEqual((answer.status, answer.body), (200, b"1 x y!\n"))
        self.assertEqual(self.fetch(self.server, "/p?a=1", "POST", [self.FORM], b"b=z").body, b"1 z\n")
        self.assertEqual(self.fetch(self.server, "/p?a=1", "POST").body, b"1 none\n")

    def test_a_form_may_come_in_chunks(self) -> None:
        chunked = [self.FORM, "Transfer-Encoding: chunked"]
        for data, status, body in (
            (b"5\r\na=1&b\r\n2\r\n=z\r\n0\r\n\r\n", 200, b"1 z\n"),
            (b"3\r\na=1&\r\n", 400, None),
            (b"11000\r\n" + b"a" * 0x11000 + b"\r\n", 413, None),
        ):
            with self.subTest(data=data[:30]), self.connect(self.server) as client:
                client.get("/p", "POST", chunked)
                client.send(data)
                answer = client.read_answer()
                self.assertEqual(answer.status, status)
                if body:
                    self.assertEqual(answer.body, body)
                self.assertTrue(client.is_closed())

    def test_a_request_behind_a_chunked_body_is_not_run(self) -> None:
        mark = self.folder / "mark"
        server = self.serve({"x": f"touch {mark}"})
        for method in ("GET", "POST"):
            with self.connect(server) as client:
                client.get("/none" if method == "POST" else "/-/healthy", method, ["Transfer-Encoding: chunked"])
                client.send(b"0\r\n\r\nGET /x HTTP/1.1\r\nHost: localhost\r\n\r\n")
                self.assertIn(client.read_answer().status, (400, 404))
                self.assertTrue(client.is_closed())
                self.assertEqual(client.buffer, b"")
        self.assertFalse(mark.exists())

    def test_what_is_no_form_is_refused(self) -> None:
        for headers, path, body, status in (
            ([self.FORM], "/p?a=1", b"a=2", 400),
            ([self.FORM], "/p", b"a=\xff", 400),
            ([self.FORM], "/p", b"a=1&c=2", 400),
            ([self.FORM], "/p", b"a=1&-=2", 400),
            (["Content-Type: multipart/form-data; boundary=x"], "/p", b"a=1", 415),
            (["Content-Type: application/xml"], "/p", b"{}", 415),
            ([], "/p", b"a=1", 415),
            ([self.FORM], "/p", b"a=" + b"1" * 70_000, 413),
            ([self.FORM, "Expect: 200-ok"], "/p", b"a=1", 417),
            ([self.FORM, "Transfer-Encoding: gzip, chunked"], "/p", b"", 501),
        ):
            with self.subTest(headers=headers, body=body[:10]):
                self.assertEqual(self.fetch(self.server, path, "POST", headers, body).status, status)

    def test_a_body_that_is_waited_for_is_asked_for_only_once_all_else_is_right(self) -> None:
        with self.connect(self.server) as client:
            client.get("/p", "POST", [self.FORM, "Expect: 100-continue", "Content-Length: 3"])
            self.assertEqual(client.read_head()[0], 100)
            client.send(b"a=1")
            self.assertEqual(client.read_answer().body, b"1 none\n")
        holder = self.connect(self.server)
        holder.get("/busy", "POST")
        holder.read_head()
        for path, length, status in (("/none", 3, 404), ("/p", 10**9, 413), ("/p?nope=1", 3, 400), ("/busy", 3, 503)):
            with self.connect(self.server) as client:
                client.get(path, "POST", [self.FORM, "Expect: 100-continue", f"Content-Length: {length}"])
                self.assertEqual(client.read_answer().status, status)
        with self.connect(self.server) as client:  # HTTP/1.0 knows no interim answers
            client.get("/p", "POST", [self.FORM, "Expect: 100-continue", "Content-Length: 3"], "1.0")
            client.send(b"a=1")
            self.assertEqual(client.read_answer().status, 200)

    def test_nothing_behind_a_refused_body_is_run(self) -> None:
        mark = self.folder / "mark"
        server = self.serve({"mark": f"touch {mark}", "p": Command("true", method="POST")})
        tail = b"GET /mark HTTP/1.1\r\nHost: localhost\r\n\r\n"
        length = f"Content-Length: {len(tail)}"
        for method, path, lines in (
            ("PUT", "/p", [length]),
            ("TRACE", "/mark", [length]),
            ("GET", "/mark", [length]),
            ("POST", "/p", [length, "Origin: http://evil.test"]),
            ("POST", "/p", [length, "Expect: x"]),
            ("POST", "/p", ["Transfer-Encoding: gzip"]),
            ("POST", "/p", ["Transfer-Encoding: chunked", length]),
            ("POST", "/p", [self.FORM, "Content-Length: 0"]),  # sound: what follows is the next request
        ):
            with self.subTest(method=method, lines=lines), self.connect(server) as client:
                client.get(path, method, lines)
                is_sound = lines[-1].endswith(" 0")
                client.send(tail.replace(b"/mark", b"/none") if is_sound else tail)
                client.sock.shutdown(socket.SHUT_WR)
                self.assertTrue(client.is_closed())
                self.assertLessEqual(client.buffer.count(b"HTTP/1.1 "), 1 + is_sound)
        self.assertFalse(mark.exists())

    def test_an_aborted_form_runs_nothing(self) -> None:
        with self.assertLogs("streamlog") as logged, self.connect(self.server) as client:
            client.get("/p?a=1", "POST", [self.FORM, "Content-Length: 100"])
            client.send(b"b=2")
            client.sock.shutdown(socket.SHUT_WR)
            self.assertTrue(client.is_closed())
            self.assertEqual(client.buffer, b"")
            streamlog._log.info("end")
        self.assertEqual(len(logged.output), 1)

    def test_a_body_where_none_belongs_is_not_taken_for_the_next_request(self) -> None:
        smuggled = b"GET /p HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for path, method in (("/p", "POST"), ("/none", "POST"), ("/", "GET"), ("/", "OPTIONS"), ("/p", "HEAD")):
            with self.subTest(path=path, method=method), self.connect(self.server) as client:
                client.get(path, method, [f"Content-Length: {len(smuggled)}"])
                client.send(smuggled)
                self.assertEqual(client.read_answer(method).headers.get("connection"), "close")
                self.assertTrue(client.is_closed())
                self.assertEqual(client.buffer.count(b"HTTP/1.1"), 0)

    def test_an_early_refusal_of_a_long_upload_can_be_read(self) -> None:
        for _ in range(5):
            with self.connect(self.server) as client:
                client.get("/none", "POST", [self.FORM, "Content-Length: 100000000"])
                client.sock.settimeout(0.5)
                with contextlib.suppress(OSError):
                    for _ in range(20):
                        client.send(bytes(1_000_000))
                client.sock.settimeout(5)
                self.assertEqual(client.read_answer().status, 404)

    def test_a_head_that_is_too_long_is_refused_while_more_comes(self) -> None:
        with self.connect(self.server) as client:
            client.send(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 12000)
            for _ in range(20):
                client.send(b"A: b\r\n" * 100)  # a reset would break this off
                time.sleep(0.01)
            self.assertEqual(client.read_answer().status, 431)


class Variables(ServerCase):
    def test_headers_that_are_named_become_variables_and_no_others(self) -> None:
        script = self.folder / "script.py"
        script.write_text(
            "import os\nprint({k: v for k, v in os.environb.items() if k.startswith((b'HTTP_', b'REMOTE_'))}, end='')"
        )
        command = Command([sys.executable, script], headers=["X-GitHub-Event", "User-Agent", "X-None"])
        server = self.serve({"x": command, "y": Command([sys.executable, script])})
        sent = [
            "X-GitHub-Event: push",
            "User-Agent: caf\xc3\xa9; $(id)",
            "Proxy: http://evil",
            "Cookie: a=b",
            "X-Other: 1",
        ]
        with self.connect(server) as client:
            client.send("\r\n".join(["GET /x HTTP/1.1", "Host: localhost", *sent, "", ""]).encode("latin-1"))
            got = ast.literal_eval(client.read_answer().body.decode())
        self.assertEqual(
            got,
            {
                b"HTTP_X_GITHUB_EVENT": b"push",
                b"HTTP_USER_AGENT": "café; $(id)".encode(),
                b"HTTP_X_NONE": b"",
                b"REMOTE_ADDR": b"127.0.0.1",
                b"REMOTE_USER": b"",
            },
        )
        got = ast.literal_eval(self.fetch(server, "/y", headers=["User-Agent: x"]).body.decode())
        self.assertEqual(got, {b"REMOTE_ADDR": b"127.0.0.1", b"REMOTE_USER": b""})

    def test_credentials_cannot_be_named(self) -> None:
        for name in (
            "Proxy",
            "authorization",
            "Cookie",
            "Proxy-Authorization",
            "Set-Cookie",
            "Cookie2",
            "a b",
            "A_B",
            "",
            "é",
        ):
            with self.subTest(name=name), self.assertRaisesRegex(streamlog.ConfigError, "headers must be names"):
                Command("true", headers=["User-Agent", name])
        for wrong in ("User-Agent", 3, [b"User-Agent"]):
            with self.subTest(wrong=wrong), self.assertRaisesRegex(streamlog.ConfigError, "headers must be names"):
                Command("true", headers=wrong)  # type: ignore[arg-type]

    def test_an_ipv6_client_and_one_of_a_unix_socket_are_told_as_what_they_are(self) -> None:
        command = {"x": "!echo $REMOTE_ADDR"}
        try:
            server = self.serve(command, bind="::1")
        except OSError:  # a machine without IPv6
            pass
        else:
            with urllib.request.urlopen(f"http://[::1]:{server.port}/x") as answer:
                self.assertEqual(answer.read(), b"::1\n")
        path = str(self.folder / "sock")
        self.serve(command, bind=f"unix:{path}")
        with Raw(path) as client:
            client.get("/x")
            self.assertEqual(client.read_answer().body, b"unix\n")


class Index(ServerCase):
    def setUp(self) -> None:
        super().setUp()
        self.server = self.serve(
            {
                "logs": Command("tail -n {lines:int=100} {file:syslog|auth.log} {<}", about="Follow <a> log"),
                "go": Command("true {unit} {note:text=a b}", method="POST"),
                "stop": Command("true", method="POST"),
            }
        )

    def test_curl_gets_a_line_for_each_command(self) -> None:
        answer = self.fetch(self.server, "/")
        self.assertEqual(answer.headers["content-type"], "text/plain; charset=utf-8")
        text = answer.body.decode()
        self.assertIn("# Follow <a> log\ncurl -N 'http://localhost/logs?lines=100&file=syslog'\n", text)
        self.assertIn("curl -N -d 'unit=UNIT&note=a+b' http://localhost/go\n", text)
        self.assertIn("curl -N -X POST http://localhost/stop\n", text)

    def test_json_tells_all_that_a_program_needs(self) -> None:
        answer = self.fetch(self.server, "/", headers=["Accept: application/json"])
        self.assertEqual(answer.headers["content-type"], "application/json")
        logs = json.loads(answer.body)["commands"][0]
        self.assertEqual((logs["name"], logs["method"], logs["url"]), ("logs", "GET", "http://localhost/logs"))
        lines, file = logs["parameters"]
        self.assertEqual(lines, {"name": "lines", "type": "int", "choices": [], "default": "100", "required": False})
        self.assertEqual((file["choices"], file["required"]), (["syslog", "auth.log"], True))

    def test_a_browser_gets_a_page_of_forms(self) -> None:
        answer = self.fetch(self.server, "/", headers=[BROWSER])
        self.assertEqual(answer.headers["content-type"], "text/html; charset=utf-8")
        self.assertIn("default-src 'none'", answer.headers["content-security-policy"])
        page = answer.body.decode()
        self.assertIn("Follow &lt;a&gt; log", page)
        self.assertIn('<form action="logs" method="get" target="view">', page)
        self.assertIn('<input type="number" value="100" name="lines" title="must be int" required>', page)
        self.assertIn('<select name="file"><option>syslog</option>', page)
        self.assertRegex(page, r'<input type="text" value="" name="unit" title="must be word \(letters, digits')
        self.assertNotIn("<script", page)

    def test_an_error_is_a_page_for_a_browser_and_a_line_for_curl(self) -> None:
        for path, method, status, header in (
            ("/none<b>", "GET", 404, ""),
            ("/logs?file=a<b>", "GET", 400, ""),
            ("/go?unit=<b>", "GET", 405, "allow"),
            ("/logs?file=syslog", "DELETE", 405, "allow"),
            ("/-/runs/x/y/z", "GET", 404, ""),
        ):
            with self.subTest(path=path):
                text = self.fetch(self.server, path, method)
                page = self.fetch(self.server, path, method, headers=[BROWSER])
                self.assertEqual((text.status, page.status), (status, status))
                self.assertEqual(text.headers["content-type"], "text/plain; charset=utf-8")
                self.assertEqual(text.body.count(b"\n"), 1)
                self.assertEqual(page.headers["content-type"], "text/html; charset=utf-8")
                self.assertIn("form-action 'self'", page.headers["content-security-policy"])
                self.assertIn(html.escape(text.body.decode().rstrip()).encode(), page.body)
                back = "../" * (path.count("/") - 1) or "./"
                self.assertIn(f'<a href="{back}" target="_top">'.encode(), page.body)
                self.assertNotIn(b"<b>", page.body)
                self.assertEqual(page.headers.get(header), text.headers.get(header))

    def test_a_get_of_what_takes_post_is_told_the_line_that_works(self) -> None:
        for path, line in (
            ("/go", "curl -N -d 'unit=UNIT&note=a+b' http://localhost/go"),
            ("/stop", "curl -N -X POST http://localhost/stop"),
        ):
            answer = self.fetch(self.server, path)
            self.assertEqual((answer.status, answer.headers["allow"]), (405, "OPTIONS, POST"))
            self.assertEqual(answer.body.decode(), f"{path} takes OPTIONS, POST, not GET; try: {line}\n")

    def test_addresses_begin_with_the_url_that_is_given(self) -> None:
        server = self.serve({"x": "echo {y=1}", "p": Command("true", method="POST")}, url="https://box.example/ops/")
        self.assertIn(b"curl -N 'https://box.example/ops/x?y=1'\n", self.fetch(server, "/").body)
        self.assertIn(b"https://box.example/ops/x?y=1", self.fetch(server, "/", headers=[BROWSER]).body)
        self.assertIn(b"-X POST https://box.example/ops/p\n", self.fetch(server, "/p").body)
        answer = self.fetch(server, "/x?async=1")
        self.assertRegex(answer.body, rb"^https://box\.example/ops/-/runs/[^/]+\n$")
        self.assertEqual(answer.headers["location"], answer.body.decode().strip())
        page = self.fetch(server, "/x?async=1", headers=["Accept: text/html"])
        self.assertRegex(page.headers["location"], r"^-/runs/", "a browser stays where it is")
        for bad in ("box.example", "ftp://box.example", "https://a b"):
            with self.assertRaisesRegex(streamlog.ConfigError, "url must be a URL"):
                streamlog.Settings(url=bad)

    def test_a_location_is_relative_so_that_a_prefix_does_no_harm(self) -> None:
        server = self.serve({"x": "true"})
        for headers in ([], ["Accept: application/json"], ["Accept: text/html"]):
            self.assertRegex(self.fetch(server, "/x?async=1", headers=headers).headers["location"], r"^-/runs/[^/]+$")

    def test_the_address_that_a_proxy_tells_is_logged_and_trusted_for_nothing(self) -> None:
        server = self.serve({"x": "!echo $REMOTE_ADDR"})
        with self.log_of() as logged:
            headers = ['X-Forwarded-For: 192.0.2.7, "evil\xe9', "X-Forwarded-For: 10.0.0.1"]
            self.assertEqual(self.fetch(server, "/x", headers=headers).body, b"127.0.0.1\n")
            wait_until(lambda: logged.output, "the first is logged")
            self.fetch(server, "/x")
            wait_until(lambda: len(logged.output) == 2, "both are logged")
        told = r'client=127\.0\.0\.1:\d+ forwarded="192\.0\.2\.7, \\x22evil\\xc3\\xa9, 10\.0\.0\.1" request="GET /x'
        self.assertRegex(logged.output[0], told)
        self.assertNotIn("forwarded", logged.output[1])

    def test_the_lines_that_are_printed_can_be_run(self) -> None:
        if not shutil.which("curl"):
            self.skipTest("curl is not installed")
        server = self.serve({"a": "echo {x:text=it's $HOME}", "b": Command("echo {x}", method="POST")})
        with self.connect(server) as client:
            client.send(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
            text = client.read_answer().body.decode()
        lines = "\n".join(line for line in text.splitlines() if line.startswith("curl"))
        self.assertEqual(subprocess.run(["sh", "-c", lines], capture_output=True).stdout, b"it's $HOME\nX\n")


class Streaming(ServerCase):
    def test_a_byte_comes_while_the_command_goes_on(self) -> None:
        script = "import sys\nfor c in 'abc':\n    print(c, end=''); sys.stdin.read(1)"
        server = self.serve({"x": Command(self.python(script), stdin=True)})
        with self.connect(server) as client:
            client.get("/x", "POST", ["Transfer-Encoding: chunked"])
            client.read_head()
            for expected in (b"a", b"b", b"c"):
                self.assertEqual(client.read_chunk(), expected)
                client.send(b"1\r\n.\r\n")

    def test_the_head_comes_before_any_output(self) -> None:
        server = self.serve({"x": "sleep 300"})
        with self.connect(server) as client:
            client.get("/x")
            self.assertEqual(client.read_head()[0], 200)

    def test_a_megabyte_at_once_comes_in_few_chunks(self) -> None:
        server = self.serve({"x": "dd if=/dev/zero bs=1M count=8 status=none"})
        with self.connect(server) as client:
            client.get("/x")
            client.read_head()
            sizes = [len(chunk) for chunk in iter(client.read_chunk, None)]
        self.assertEqual(sum(sizes), 8 << 20)
        self.assertGreater(max(sizes), 65536)

    def test_a_short_answer_does_not_wait_for_a_delayed_acknowledgement(self) -> None:
        server, seconds = self.serve({"x": Command(lambda: "x\n")}), []
        with self.connect(server) as client:
            for _ in range(21):
                started = time.monotonic()
                client.get("/x")
                client.read_answer()
                seconds.append(time.monotonic() - started)
        self.assertLess(sorted(seconds)[10], 0.03, "an acknowledgement is delayed by 40 ms")

    def test_three_hundred_connections_at_the_same_moment_are_all_answered(self) -> None:
        server = self.serve({})
        start = threading.Barrier(300)
        found = []

        def fetch() -> None:
            start.wait()
            found.append(self.fetch(server, "/-/healthy").status)

        threads = [threading.Thread(target=fetch) for _ in range(300)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(found, [200] * 300)

    def test_two_hundred_clients_at_once_each_get_their_own(self) -> None:
        arguments = ("-q", "-p", "0", "--max-runs", "200", "x=!echo {n:int}; sleep 0.2; echo {n}")
        with Program(*arguments) as program, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(program.connect()) for _ in range(200)]
            for number, client in enumerate(clients):
                client.get(f"/x?n={number}")
            for number, client in enumerate(clients):
                self.assertEqual(client.read_answer().body, b"%d\n%d\n" % (number, number))

    def test_a_reader_that_stops_reading_holds_its_own_command_and_nothing_else(self) -> None:
        server = self.serve({"yes": "!echo $$; exec yes", "x": "echo x"})
        with self.connect(server, receive_buffer=4096) as stuck:
            stuck.get("/yes")
            stuck.read_head()
            pid = next(pids_in(stuck.read_chunk() or b""))
            wait_until(lambda: is_held_back(pid), "the command is held back")
            before = resident_bytes()
            for _ in range(20):
                self.assertEqual(self.fetch(server, "/x").body, b"x\n")
            self.assertLess(resident_bytes() - before, 4 << 20)
            self.assertTrue(stuck.more())

    def test_a_slow_reader_gets_all_of_it_in_the_end(self) -> None:
        server = self.serve({"x": "!seq 1 2000000; sleep 300 & exit 2"}, drain_seconds=0.2)
        with self.connect(server, receive_buffer=4096) as client:
            client.get("/x")
            client.read_head()
            time.sleep(0.5)  # far longer than it takes to fill every buffer
            client.buffer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + client.buffer
            answer = client.read_answer()
        self.assertEqual(answer.body, b"".join(b"%d\n" % n for n in range(1, 2000001)))
        self.assertEqual(answer.trailers, {"Exit-Code": "2"})

    def test_pipelined_requests_are_answered_one_after_the_other(self) -> None:
        server = self.serve({"x": "!echo {n:int}; sleep 0.1"})
        with self.connect(server) as client:
            for number in range(5):
                client.get(f"/x?n={number}")
            for number in range(5):
                self.assertEqual(client.read_answer().body, b"%d\n" % number)

    def test_a_client_that_sends_far_ahead_is_held_back_and_its_reset_is_noticed(self) -> None:
        server = self.serve({"x": "!echo $$; exec sleep 300"})
        client = self.connect(server)
        client.get("/x")
        client.read_head()
        (pid,) = pids_in(client.read_chunk() or b"")
        before, sent = resident_bytes(), 0
        client.sock.settimeout(0.5)
        with self.assertRaises(OSError):
            while True:
                sent += client.sock.send(bytes(1 << 16))
        self.assertLess(sent, 40 << 20)
        self.assertLess(resident_bytes() - before, 1 << 20)
        self.assertTrue(is_alive(pid))
        client.reset()
        wait_until(lambda: not is_alive(pid), "it is gone")


class Departures(ServerCase):
    def test_a_silent_command_is_stopped_within_a_second_of_its_client_s_leaving(self) -> None:
        server, seconds = self.serve({"x": "!sleep 300 & echo $$ $!; wait"}), []
        for leave in ("close", "shutdown", "reset"):
            with self.subTest(leave=leave), self.assertLogs("streamlog") as logged:
                client = self.connect(server)
                client.get("/x")
                client.read_head()
                pids = list(pids_in(client.read_chunk() or b""))
                self.assertEqual(len(pids), 2)
                started = time.monotonic()
                if leave == "reset":
                    client.reset()
                elif leave == "close":
                    client.sock.close()
                else:
                    client.sock.shutdown(socket.SHUT_WR)
                wait_until(lambda pids=pids: not any(map(is_alive, pids)), "both are gone")  # type: ignore[misc]
                seconds.append(time.monotonic() - started)
                wait_until(lambda: logged.output, "it is logged")
                self.assertIn("exit=143", logged.output[0])
                self.assertIn('end="client gone"', logged.output[0])
        self.assertLess(sorted(seconds)[1], 1)  # the middle one: the machine may hold up another

    def test_a_client_that_leaves_while_it_is_stuck_is_noticed_too(self) -> None:
        server = self.serve({"x": "!echo $$; exec yes"})
        client = self.connect(server, receive_buffer=4096)
        client.get("/x")
        client.read_head()
        pid = next(pids_in(client.read_chunk() or b""))
        wait_until(lambda: is_held_back(pid), "the command is held back")
        client.reset()
        wait_until(lambda: not is_alive(pid), "yes is gone")

    def test_where_poll_reports_no_hang_up_a_silent_command_is_stopped_too(self) -> None:
        server = self.serve({"x": "!echo $$; exec sleep 300"})
        for leave in ("close", "shutdown", "reset"):
            with self.subTest(leave=leave), mock.patch.object(streamlog, "_HANG_UP", 0):
                client = self.connect(server)
                client.get("/x")
                client.read_head()
                (pid,) = pids_in(client.read_chunk() or b"")
                if leave == "shutdown":
                    client.sock.shutdown(socket.SHUT_WR)
                else:
                    (client.reset if leave == "reset" else client.sock.close)()
                wait_until(lambda pid=pid: not is_alive(pid), "it is gone")  # type: ignore[misc]

    def test_where_poll_reports_no_hang_up_a_byte_sent_ahead_is_no_departure_and_costs_nothing(self) -> None:
        gate = self.make_gate()
        server = self.serve({"x": f"!read _ <> {gate}; echo x", "y": "echo y"})
        with mock.patch.object(streamlog, "_HANG_UP", 0), self.connect(server) as client:
            client.get("/x")
            client.read_head()
            client.send(b"G")
            used = time.process_time()
            time.sleep(0.5)  # time in which it could spin
            gate.write_text("\n")
            self.assertEqual((client.read_chunk(), client.read_chunk()), (b"x\n", None))
            self.assertLess(time.process_time() - used, 0.2, "it does not spin")
            client.read_until(b"\r\n\r\n")
            client.send(b"ET /y HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertEqual(client.read_answer().body, b"y\n")

    def test_a_stop_while_the_client_of_two_outputs_is_stuck_leaves_nothing(self) -> None:
        def stick(way: str, format_: str) -> None:
            note = self.folder / f"{way} {format_}"
            command = Command(f"!yes >&2 & echo $$ $! > '{note}'; exec yes", stderr="separate")
            command.timeout = 4 if way == "timeout" else None
            server = self.serve({"x": command}, drain_seconds=0.1)
            client = self.connect(server, receive_buffer=4096)
            client.get(f"/x?format={format_}")
            client.read_head()
            wait_until(lambda: note.exists() and note.read_bytes().endswith(b"\n"), "both have started")
            time.sleep(0.3)  # far longer than it takes to fill every buffer
            pids = list(pids_in(note.read_bytes()))
            self.assertTrue(all(map(is_alive, pids)))
            if way == "reset":
                client.reset()
            elif way == "close":
                server.close()
            wait_until(lambda: not any(map(is_alive, pids)), "both are gone")
            if way == "timeout":
                time.sleep(0.2)  # the drain time, after which the outputs are closed
                self.assertTrue(client.is_closed())
                self.assertIn(b"timeout", client.buffer[-500:])
            client.sock.close()
            server.close()

        formats = ("text", "html", "sse", "ndjson")
        with self.assertLogs("streamlog") as logged:
            at_once(self, stick, *itertools.product(("timeout", "close", "reset"), formats))
        self.assertFalse([line for line in logged.output if not line.startswith("INFO:")])

    def test_a_command_that_cleans_up_may_print_after_its_client_has_left(self) -> None:
        note = self.folder / "note"
        script = f"!trap 'seq 1 100000; echo done > {note}; exit' TERM; echo; while :; do sleep 0.05; done"
        server = self.serve({"x": script})
        client = self.connect(server)
        client.get("/x")
        client.read_head()
        client.read_chunk()
        client.sock.close()
        wait_until(note.exists, "the command has cleaned up")

    def test_a_head_that_is_never_finished_runs_nothing(self) -> None:
        mark = self.folder / "mark"
        server = self.serve({"x": f"touch {mark}"})
        for data in (
            b"",
            b"GET",
            b"GET /x HTTP/1.1\r\nHost: localhost\r\nX-Tok",
            b"GET /x HTTP/1.1\r\nHost: localhost\r\n",
        ):
            with self.subTest(data=data), self.connect(server) as client:
                client.send(data)
                client.sock.shutdown(socket.SHUT_WR)
                self.assertTrue(client.is_closed())
                self.assertEqual(client.buffer, b"")
        self.assertFalse(mark.exists())

    def test_heads_and_idle_connections_have_their_time(self) -> None:
        with self.connect(self.serve({}, head_seconds=0.2)) as slow:
            slow.send(b"GET")
            self.assertEqual(slow.read_answer().status, 408)
        with self.connect(self.serve({}, idle_seconds=0.2)) as idle:
            self.assertTrue(idle.is_closed())
            self.assertEqual(idle.buffer, b"")

    def test_a_form_that_never_comes_has_its_time(self) -> None:
        server = self.serve({"p": Command("true", method="POST")})
        with mock.patch.object(streamlog, "_BODY_SECONDS", 0.2), self.connect(server) as client:
            client.get("/p", "POST", [Forms.FORM, "Content-Length: 5"])
            self.assertEqual(client.read_answer().status, 408)

    @unittest.skipUnless(IS_ROOT and shutil.which("ip"), "needs root and ip(8) for a network that can be cut")
    def test_a_client_that_vanishes_is_noticed_by_probes_or_by_what_it_does_not_take(self) -> None:
        def vanish(line: str, stall_seconds: str) -> None:
            done = subprocess.run(
                [sys.executable, "-m", "tests.vanish", line, stall_seconds],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            if done.returncode == 77:
                self.skipTest(done.stdout)
            self.assertEqual((done.returncode, done.stdout), (0, "gone\n"), done.stderr)

        at_once(self, vanish, ("sleep 300", "0"), ("!while echo more; do sleep 0.1; done", "3"))

    def test_clients_that_misbehave_print_no_traceback_and_hurt_nobody(self) -> None:
        server = self.serve({"yes": "yes", "sleep": "sleep 300", "x": "echo x"})
        dice = random.Random(1)
        heads = [
            b"GET /yes",
            b"GET /sleep",
            b"GET /x",
            b"\0\xff" * 20,
            b"POST /x",
            b"\r\n\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
        ]
        with self.assertLogs("streamlog") as logged:
            for _ in range(SOAK):
                client = self.connect(server)
                client.send(dice.choice(heads))
                if dice.random() < 0.7:
                    client.send(b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
                if dice.random() < 0.5:
                    client.sock.settimeout(0.02)
                    with contextlib.suppress(OSError):
                        client.more()
                (client.reset if dice.random() < 0.5 else client.sock.close)()
            wait_until(lambda: self.has_no_clients(server), "all are gone")
            self.assertEqual(self.fetch(server, "/x").body, b"x\n")
        self.assertFalse([line for line in logged.output if "Traceback" in line or "INFO" not in line])


class Limits(ServerCase):
    def test_one_run_more_than_the_limit_is_told_to_come_again(self) -> None:
        server = self.serve({"x": Command("sleep 300", max=1), "y": "sleep 300"}, max_runs=2)
        with self.connect(server) as first, self.connect(server) as second:
            first.get("/x")
            first.read_head()
            answer = self.fetch(server, "/x")
            self.assertEqual((answer.status, answer.headers["retry-after"]), (503, "1"))
            self.assertIn(b"1 of 1 runs of 'x' are going on", answer.body)
            second.get("/y")
            second.read_head()
            self.assertIn(b"2 of 2 runs are going on", self.fetch(server, "/y").body)
        wait_until(lambda: not self.active_runs(server, "x") + self.active_runs(server, "y"), "the slots are free")
        with self.connect(server) as third:
            third.get("/x")
            self.assertEqual(third.read_head()[0], 200)

    def test_the_slot_is_free_once_the_client_knows_the_end(self) -> None:
        server = self.serve({"x": Command("true", max=1)})
        for _ in range(50):
            self.assertEqual(self.fetch(server, "/x").status, 200)

    def test_a_command_that_cannot_start_gives_its_slot_back(self) -> None:
        server = self.serve({"x": Command("no-such-program", max=1)})
        for _ in range(3):
            self.assertEqual(self.fetch(server, "/x").status, 500)

    def test_the_longest_idle_connection_makes_room_for_a_new_one(self) -> None:
        server = self.serve({"x": "!echo; sleep 300"})
        server._client_max = 3
        with self.connect(server) as busy:
            busy.get("/x")
            busy.read_head()
            idle = []
            for _ in range(2):
                client = self.connect(server)
                client.get("/")
                client.read_answer()
                idle.append(client)
                wait_until(lambda: len(server._idle) == len(idle), "its thread waits for the next request")
            self.assertEqual(self.fetch(server, "/-/healthy").body, b"ok")
            self.assertTrue(idle[0].is_closed())
            idle[1].get("/-/healthy")
            self.assertEqual(idle[1].read_answer().body, b"ok")
            self.assertTrue(busy.read_chunk())

    def test_where_every_connection_is_busy_a_new_one_is_refused(self) -> None:
        server = self.serve({"x": "!echo; sleep 300"})
        server._client_max = 2
        with self.connect(server) as one, self.connect(server) as two:
            for client in (one, two):
                client.get("/x")
                client.read_head()
                client.read_chunk()
            answer = self.fetch(server, "/")
            self.assertEqual((answer.status, answer.headers["retry-after"]), (503, "1"))

    def test_who_has_not_been_listened_to_yet_is_not_evicted(self) -> None:
        server = self.serve({"x": "echo x"})
        real, is_accepted, is_free = server.finish_request, threading.Event(), threading.Event()

        def finish(client: Any, address: Any) -> None:
            is_accepted.set()
            is_free.wait(10)
            real(client, address)

        with mock.patch.object(server, "_client_max", 1), mock.patch.object(server, "finish_request", finish):
            with self.connect(server) as client:
                client.get("/x")
                self.assertTrue(is_accepted.wait(10))
                self.assertEqual(self.fetch(server, "/x").status, 503)
                is_free.set()
                self.assertEqual(client.read_answer().body, b"x\n")

    def test_an_evicted_connection_does_not_run_what_it_asked_for_meanwhile(self) -> None:
        mark = self.folder / "mark"
        server = self.serve({"x": f"!echo x >> {mark}"})
        mark.touch()
        answered = 0
        with mock.patch.object(server, "_client_max", 1):
            for _ in range(SOAK):  # whether the request or the eviction comes first is left to chance
                client, rival = self.connect(server), threading.Thread(target=self.fetch, args=(server, "/-/healthy"))
                rival.start()
                with contextlib.suppress(OSError, EOFError):
                    client.get("/x")
                    answered += client.read_answer()[::4] == (200, True)
                rival.join()
                client.sock.close()
        wait_until(lambda: not self.active_runs(server, "x"), "all is over")
        self.assertEqual(mark.read_text().count("x"), answered)

    def test_a_thread_that_cannot_start_costs_its_connection_only(self) -> None:
        server = self.serve({"x": "echo x"})
        error = RuntimeError("can't start new thread")
        with mock.patch.object(threading.Thread, "start", side_effect=error), self.log_of("WARNING") as logged:
            for _ in range(3):
                self.assertEqual(self.fetch(server, "/x").status, 503)
        self.assertEqual(len(logged.output), 1)
        self.assertEqual(self.fetch(server, "/x").body, b"x\n")

    def test_no_thread_at_all_is_told_of(self) -> None:
        server = streamlog.Server({}, streamlog.Settings(port=0))
        self.addCleanup(server.close)
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError):
            self.assertRaises(RuntimeError, server.start)
        self.assertEqual(self.fetch(server.start(), "/-/healthy").body, b"ok")

    def test_a_bug_or_no_memory_at_a_connection_s_start_costs_that_only(self) -> None:
        for error in (MemoryError, ZeroDivisionError):
            server = self.serve({"x": "echo x"})
            with mock.patch.object(streamlog, "_Connection", side_effect=error):
                with self.assertLogs("streamlog", "WARNING") as logged, self.connect(server) as client:
                    client.get("/x")
                    self.assertTrue(client.is_closed())
                    wait_until(lambda: logged.output, "it is told of")
            self.assertIn(error.__name__, logged.output[0])
            self.assertEqual(self.fetch(server, "/x").body, b"x\n")

    def test_a_bug_in_an_answer_costs_its_connection_only(self) -> None:
        server = self.serve({"x": "yes"})
        with mock.patch.object(streamlog.Format, "feed", side_effect=ZeroDivisionError):
            with self.assertLogs("streamlog", "ERROR") as logged:
                self.assertFalse(self.fetch(server, "/x").is_whole)
                wait_until(lambda: self.has_no_clients(server), "it is gone")
        self.assertIn("ZeroDivisionError", logged.output[0])
        self.assertEqual(self.active_runs(server, "x"), 0)

    def test_a_bug_right_after_a_start_leaves_no_run(self) -> None:
        server = self.serve({"x": "sleep 300"})
        before = children()
        for target in ("streamlog.Access.headers", "streamlog._log.debug", "streamlog._Handler._send_head"):
            with mock.patch(target, side_effect=ZeroDivisionError), self.assertLogs("streamlog", "DEBUG") as logged:
                self.assertRaises(EOFError, self.fetch, server, "/x")
                wait_until(lambda logged=logged: "ERROR" in str(logged.output), "the bug is logged", 2)  # type: ignore[misc]
            self.assertLessEqual(children(), before, target)
            self.assertEqual(self.active_runs(server, "x"), 0)

    def test_a_header_is_never_broken_out_of(self) -> None:
        access = streamlog.Access(streamlog.Settings(), "loopback")
        request = streamlog.Request("GET", "/", "", "localhost", {})
        for value in ("a\r\nb", "a\nb", "a\0", "\x85"):
            with self.assertRaises(ValueError):
                access.headers(request, streamlog._text_reply("", headers={"X": value}))


class Log(ServerCase):
    def line(self, server: streamlog.Server, data: bytes) -> str:
        with self.assertLogs("streamlog") as logged, self.connect(server) as client:
            client.send(data)
            client.read_answer()
            wait_until(lambda: logged.output, "it is logged")
        return logged.output[0].split(":", 2)[2]

    def test_a_request_is_one_line_with_its_end(self) -> None:
        server = self.serve({"x": "!printf abc; exit 3", "t": Command("sleep 300", timeout=0.1)})
        for path, expected in (
            ("/x", r'request="GET /x HTTP/1.1" status=200 exit=3 bytes=3 seconds=[0-9.]+ end="exit"'),
            ("/t?footer=0", r'status=200 exit=143 bytes=0 seconds=[0-9.]+ end="timeout after 0\.1 s"'),
            ("/y", r'status=404 exit=- bytes=[0-9]+ seconds=[0-9.]+ end="answered"'),
        ):
            with self.subTest(path=path):
                line = self.line(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                self.assertRegex(line, r"^client=127\.0\.0\.1:[0-9]+ .*" + expected + "$")

    def test_nothing_a_client_sends_breaks_a_line_or_drives_a_terminal(self) -> None:
        line = self.line(self.serve({}), b'GET /\x1b[31m"\\\x9b\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n')
        self.assertIn(r'request="GET /\x1b[31m\x22\x5c\x9b\x00 HTTP/1.1" status=400', line)
        line = self.line(self.serve({}), b"A" * 60_000 + b"\r\n\r\n")
        self.assertLess(len(line), 1200)


class Metrics(ServerCase):
    def read(self, server: streamlog.Server) -> dict[str, float]:
        answer = self.fetch(server, "/-/metrics")
        self.assertEqual(answer.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8")
        lines = answer.body.decode().splitlines()
        families = [line.split()[2] for line in lines if line.startswith("# TYPE ")]
        self.assertEqual(len(families), len(set(families)))
        samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {name: float(value) for name, _, value in samples}

    def test_runs_are_counted_by_command_and_outcome(self) -> None:
        server = self.serve(
            {
                "ok": "printf abc",
                "bad": "false",
                "slow": Command("sleep 300", timeout=0.1),
                "live": "!echo; sleep 300",
                "missing": "no-such-program",
            }
        )
        for path in ("/ok", "/ok", "/bad", "/slow?footer=0", "/missing", "/none", "/ok?x=1"):
            self.fetch(server, path)
        with self.connect(server) as one, self.connect(server) as two:
            for client in (one, two):
                client.get("/live")
                client.read_head()
            self.assertEqual(self.read(server)['streamlog_runs_active{command="live"}'], 2)
            wait_until(lambda: self.read(server)["streamlog_clients"] == 3, "both and the one that asks are counted")
            one.sock.close()
            gone = 'streamlog_runs_total{command="live",outcome="client_gone"}'
            wait_until(lambda: gone in self.read(server), "it is counted")
            found = self.read(server)
        for sample, value in (
            ('streamlog_runs_total{command="ok",outcome="ok"}', 2),
            ('streamlog_runs_total{command="bad",outcome="failed"}', 1),
            ('streamlog_runs_total{command="slow",outcome="timeout"}', 1),
            ('streamlog_runs_total{command="missing",outcome="not_started"}', 1),
            (gone, 1),
            ('streamlog_runs_active{command="live"}', 1),
            ('streamlog_runs_active{command="ok"}', 0),
            ('streamlog_output_bytes_total{command="ok"}', 6),
        ):
            self.assertEqual(found[sample], value, sample)
        self.assertTrue(0.1 <= found['streamlog_run_seconds_total{command="slow"}'] < 10)

    def test_counts_of_a_million_are_written_out(self) -> None:
        server = self.serve({"x": "head -c 12345678 /dev/zero"})
        self.fetch(server, "/x")
        sample = 'streamlog_output_bytes_total{command="x"}'
        wait_until(lambda: self.read(server).get(sample) == 12345678, "all bytes are counted")


class Closings(ServerCase):
    def test_close_cuts_what_runs_tells_the_client_and_frees_the_port(self) -> None:
        server = self.serve({"x": "!echo $$; sleep 300"}, grace_seconds=30)
        with self.connect(server) as client, self.connect(server) as idle:
            client.get("/x")
            client.buffer = b""
            head = client.read_until(b"\r\n\r\n")
            (pid,) = pids_in(client.read_chunk() or b"")
            started = time.monotonic()
            server.close()
            self.assertLess(time.monotonic() - started, 10)
            self.assertFalse(is_alive(pid))
            client.buffer = head + client.buffer
            answer = client.read_answer()
            self.assertRegex(answer.body, rb"\[stopped: the server is shutting down, ")
            self.assertFalse(answer.is_whole)
            self.assertTrue(idle.is_closed())
        server.close()
        with self.assertRaises(ConnectionRefusedError):
            self.connect(server)

    def test_a_command_that_ignores_sigterm_does_not_hold_up_a_close(self) -> None:
        server = self.serve({"x": "!trap '' TERM; echo $$; while :; do sleep 0.05; done"}, grace_seconds=0.5)
        clients = [self.connect(server) for _ in range(20)]
        pids: list[int] = []
        for client in clients:
            client.get("/x")
            client.read_head()
            pids += pids_in(client.read_chunk() or b"")
        started = time.monotonic()
        server.close()
        self.assertLess(time.monotonic() - started, 5)
        wait_until(lambda: not any(map(is_alive, pids)), "they are gone")

    def test_two_hundred_runs_that_leave_orphans_end_at_once_in_a_close(self) -> None:
        server = self.serve({"x": "!sleep 300 & echo; wait"}, max_runs=200, grace_seconds=30)
        clients = [self.connect(server) for _ in range(200)]
        for client in clients:
            client.get("/x")
        for client in clients:
            client.read_head()
            client.read_chunk()
        started = time.monotonic()
        server.close()
        self.assertLess(time.monotonic() - started, 20, "zombies that process 1 has not reaped yet are not waited for")
        for client in clients:
            client.sock.close()

    def test_a_client_that_does_not_read_does_not_hold_up_a_close(self) -> None:
        commands = {"yes": "!echo $$; exec yes", "much": "!echo $$; exec head -c 9000000 /dev/zero"}
        server, pids = self.serve(commands, grace_seconds=10), []
        for path in ("/yes", "/much"):
            client = self.connect(server, receive_buffer=4096)
            client.get(path)
            client.read_head()
            pids.append(next(pids_in(client.read_chunk() or b"")))
        wait_until(lambda: all(map(is_held_back, pids)), "both are held back")
        started = time.monotonic()
        server.close()
        self.assertLess(time.monotonic() - started, 6)

    def test_an_answer_that_a_close_cuts_short_is_not_taken_for_whole(self) -> None:
        for version in ("1.0", "1.1"):
            with self.subTest(version=version):
                server = self.serve({"x": self.python(FILL)}, drain_seconds=0.1, grace_seconds=10)
                before = children()
                client = self.connect(server, receive_buffer=4096)
                client.get("/x", version=version)
                client.buffer = client.read_until(b"\r\n\r\n") + client.buffer
                wait_until(lambda before=before: children() <= before, "the command is over")  # type: ignore[misc]
                used = time.process_time()
                started = time.monotonic()
                with self.assertLogs("streamlog") as logged:
                    server.close()
                self.assertLess(time.monotonic() - started, 6)
                self.assertLess(time.process_time() - used, 1)
                self.assertIn('end="the server is shutting down"', "".join(logged.output))
                self.assertFalse(client.read_answer().is_whole)

    def test_a_client_that_does_not_read_a_long_page_does_not_hold_up_a_close(self) -> None:
        server = self.serve({f"c{n}": Command("true", about="x" * 5000) for n in range(800)}, grace_seconds=10)
        client = self.connect(server, receive_buffer=4096)
        client.get("/")
        client.read_head()
        time.sleep(0.3)  # far longer than it takes to fill every buffer
        started = time.monotonic()
        server.close()
        self.assertLess(time.monotonic() - started, 6)
        client.buffer = b"HTTP/1.1 200 OK\r\nContent-Length: 4000000\r\n\r\n" + client.buffer
        self.assertFalse(client.read_answer().is_whole)

    def test_kill_ends_without_grace(self) -> None:
        server = self.serve({"x": "!trap '' TERM; echo; while :; do sleep 0.05; done"}, grace_seconds=60)
        with self.connect(server) as client:
            client.get("/x")
            client.read_head()
            client.read_chunk()
            started = time.monotonic()
            server.shutdown()
            server._site.runs.kill()
            server.close()
            self.assertLess(time.monotonic() - started, 10)

    def test_a_server_is_a_context_and_serves_again_on_the_same_port(self) -> None:
        with streamlog.Server({}, streamlog.Settings(port=0)).start() as server:
            self.assertEqual(self.fetch(server, "/-/healthy").body, b"ok")
            self.assertEqual(server.url, f"http://127.0.0.1:{server.port}")
        with streamlog.Server({}, streamlog.Settings(port=server.port)).start() as again:
            self.assertEqual(self.fetch(again, "/-/healthy").body, b"ok")

    def test_a_bad_address_raises_and_leaves_nothing(self) -> None:
        with streamlog.Server({}, streamlog.Settings(port=0)) as server:
            with self.assertRaises(OSError) as caught:
                streamlog.Server({}, streamlog.Settings(port=server.port))
            self.assertEqual(caught.exception.errno, errno.EADDRINUSE)
        with self.assertRaises(OSError):
            streamlog.Server({}, streamlog.Settings(bind="no.such.host.invalid", port=0))

    def test_others_are_not_let_in_unless_that_is_said(self) -> None:
        with self.assertRaisesRegex(streamlog.ConfigError, "no_auth="):
            streamlog.Server({}, streamlog.Settings(bind="0.0.0.0", port=0))
        with streamlog.Server({}, streamlog.Settings(bind="0.0.0.0", port=0, no_auth=True)) as server:
            self.assertTrue(server.url.startswith("http://0.0.0.0:"))

    @unittest.skipUnless(socket.has_ipv6, "no IPv6")
    def test_ipv6_is_served_too(self) -> None:
        try:
            server = streamlog.Server({"x": Command("echo x")}, streamlog.Settings(bind="::1", port=0))
        except OSError:
            self.skipTest("no IPv6 loopback")
        with server.start(), socket.create_connection(("::1", server.port)) as sock:
            self.assertEqual(server.url, f"http://[::1]:{server.port}")
            sock.sendall(b"GET /-/healthy HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n")
            self.assertTrue(b"".join(iter(lambda: sock.recv(4096), b"")).endswith(b"ok"))


class Load(ServerCase):
    def test_a_hundred_commands_at_once_take_less_than_three_seconds_where_all_processors_are_busy(self) -> None:
        for _ in range(os.cpu_count() or 1):
            busy = subprocess.Popen([sys.executable, "-uc", "print()\nwhile True: pass"], stdout=subprocess.PIPE)
            assert busy.stdout
            for close in (busy.stdout.close, busy.wait, busy.kill):
                self.addCleanup(close)
            busy.stdout.readline()
        with streamlog.start({"x": "echo {n:int}"}, port=0, max_runs=100, insight=False) as server:
            # The best of three, as others may be at work: it is 0.9 s where nobody is. A server whose threads jostle
            # for the interpreter takes 4 to 40 s each time.
            self.assertLess(min(self.run_a_hundred(server) for _ in range(3)), 3)

    def run_a_hundred(self, server: streamlog.Server) -> float:
        """Ask for a hundred runs at the same moment. Returns the seconds until all are answered."""
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(self.connect(server)) for _ in range(100)]
            started = time.monotonic()
            for number, client in enumerate(clients):
                client.get(f"/x?n={number}")
            for number, client in enumerate(clients):
                self.assertEqual(client.read_answer().body, b"%d\n" % number)
            return time.monotonic() - started


class Soak(ServerCase):
    def test_a_binary_stream_is_exact_and_memory_flat(self) -> None:
        size = SOAK * 1024 * 1024
        script = self.python(
            "import hashlib, random, sys\n"
            "block = random.Random(5).getrandbits(8 << 20).to_bytes(1 << 20, 'big')\n"
            f"for n in range({size} // len(block)):\n    sys.stdout.buffer.write(n.to_bytes(4, 'big') + block[4:])\n"
        )
        server = self.serve({"x": script})
        direct = hashlib.sha256(subprocess.run(script.split(), stdout=subprocess.PIPE, check=True).stdout).hexdigest()
        before = resident_bytes()
        digest, count = hashlib.sha256(), 0
        with self.connect(server) as client:
            client.get("/x")
            client.read_head()
            for chunk in iter(client.read_chunk, None):
                digest.update(chunk)
                count += len(chunk)
                self.assertLess(resident_bytes() - before, 16 << 20)
        self.assertEqual((count, digest.hexdigest()), (size, direct))


class Shortages(ServerCase):
    """Limits of the real system, met by a server in a process of its own."""

    def start(self, *options: str) -> tuple[subprocess.Popen[str], int]:
        # Not measured for coverage: who has given up his rights cannot write what was measured.
        env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        command = [sys.executable, "-m", "tests.starved", *options]
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout and process.stderr
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process, int(process.stdout.readline())

    def test_a_server_out_of_descriptors_answers_again_once_there_are_some(self) -> None:
        process, port = self.start("--descriptors", "40")
        clients = []
        for _ in range(100):
            client = Raw(("127.0.0.1", port))
            client.get("/sleep")
            clients.append(client)
            self.addCleanup(client.sock.close)
        statuses = set()
        for client in clients[:8]:
            with contextlib.suppress(EOFError):  # one that has to wait for its thread may be evicted
                statuses.add(client.read_head()[0])
        self.assertLessEqual(statuses, {200, 503})

        def is_quiet() -> bool:
            used = processor_seconds(process.pid)
            time.sleep(0.5)
            return processor_seconds(process.pid) - used < 0.15

        wait_until(is_quiet, "it does not spin")
        for client in clients:
            client.sock.close()

        def works() -> bool:
            with Raw(("127.0.0.1", port)) as client:
                client.get("/x")
                return client.more() and client.read_answer().body == b"x\n"

        wait_until(works, "it answers again")

    def test_a_connection_is_served_and_told_where_no_process_can_be_forked(self) -> None:
        if not IS_ROOT:
            self.skipTest("needs root, for a user whose processes can be counted")
        process, port = self.start("--processes", "3")  # the two threads there are, and one for a connection
        with Raw(("127.0.0.1", port)) as client:
            client.get("/x")
            answer = client.read_answer()
            self.assertEqual((answer.status, answer.headers["retry-after"]), (503, "1"))
            self.assertIn(b"Resource temporarily unavailable", answer.body)
            with Raw(("127.0.0.1", port)) as second:
                second.get("/x")
                self.assertEqual(second.read_answer().status, 503)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(5), 0)
        assert process.stderr
        self.assertNotIn("Traceback", process.stderr.read())
