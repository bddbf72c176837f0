"""The site as a WSGI application, served by the standard library's wsgiref."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import socketserver
import subprocess
import sys
import threading
import time
import typing
import wsgiref.simple_server
import wsgiref.validate
from typing import Any
from unittest import mock

import streamlog
from streamlog import Command, ConfigError

from .support import ROOT, Raw, at_once, is_alive, pids_in, wait_until
from .test_embedding import EmbeddingCase


class _Threads(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True


class _Silent(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def get_stderr(self) -> Any:
        return io.StringIO()


class WsgiCase(EmbeddingCase):
    def mount(self, commands: Any, **settings: Any) -> int:
        """Serve the application, checked for how it keeps to the standard; the port."""
        self.app = streamlog.wsgi(commands, **{"insight": False, **settings})
        self.addCleanup(self.app.close)
        checked = wsgiref.validate.validator(self.app)
        server = wsgiref.simple_server.make_server("127.0.0.1", 0, checked, _Threads, _Silent)
        self.addCleanup(server.server_close)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        self.addCleanup(thread.join)
        self.addCleanup(server.shutdown)
        thread.start()
        return int(server.server_port)

    def ask(self, port: int, path: str, method: str = "GET", headers: Any = (), body: bytes = b"") -> Any:
        with Raw(("127.0.0.1", port)) as client:
            client.get(path, method, [*headers, *([f"Content-Length: {len(body)}"] if body else [])])
            client.send(body)
            return client.read_answer(method)

    def call(self, **environ: Any) -> tuple[str, dict[str, str], bytes]:
        """Call the application as a server does."""
        told: list[Any] = []
        given = {"REQUEST_METHOD": "GET", "HTTP_HOST": "localhost", "wsgi.url_scheme": "http", **environ}
        body = self.app({**given, "wsgi.input": io.BytesIO(b"x=1")}, lambda *arguments: told.extend(arguments))
        return told[0], dict(told[1]), b"".join(body)


class Wsgi(WsgiCase):
    def test_output_comes_as_it_is_written(self) -> None:
        gate = self.make_gate()
        port = self.mount({"x": f"!echo one; read line < {gate}; echo two"})
        with Raw(("127.0.0.1", port)) as client:
            client.get("/x")
            status, headers = client.read_head()
            self.assertEqual((status, headers["content-type"]), (200, "text/plain; charset=utf-8"))
            self.assertEqual(client.read_until(b"\n"), b"one\n")
            gate.write_text("\n")
            self.assertEqual(client.read_until(b"\n"), b"two\n")
            self.assertTrue(client.is_closed())

    def test_it_has_the_pages_the_formats_and_the_errors_of_the_server(self) -> None:
        port = self.mount({"x": "echo {n:int=1}", "post": Command("echo {x}", method="POST")})
        form = ["Content-Type: application/x-www-form-urlencoded"]
        for method, path, headers, body, status, told in (
            ("GET", "/", [], b"", 200, b"curl -N 'http://localhost/x?n=1'"),
            ("GET", "/", ["Accept: text/html"], b"", 200, b'<form action="x"'),
            ("GET", "/x?n=2&format=ndjson", [], b"", 200, b'"line": "2"'),
            ("GET", "/x?footer=1", [], b"", 200, b"1\n[exit 0, "),
            ("POST", "/post", form, b"x=a+b", 400, b"must be word"),
            ("POST", "/post", form, b"x=ab", 200, b"ab\n"),
            ("GET", "/post", [], b"", 405, b"takes OPTIONS, POST"),
            ("POST", "/post", form, b"x=" + b"a" * 70_000, 413, b"65536 bytes at most"),
            ("GET", "/x?n=y", [], b"", 400, b"must be int"),
            ("GET", "/%00", [], b"", 400, b"control character"),
            ("GET", "/nothing", [], b"", 404, b"the commands are: x, post"),
            ("GET", "/-/metrics", [], b"", 200, b'streamlog_runs_total{command="post",outcome="ok"} 1'),
            ("HEAD", "/x", [], b"", 200, b""),
        ):
            with self.subTest(method=method, path=path):
                answer = self.ask(port, path, method, headers, body)
                self.assertEqual(answer.status, status, answer.body)
                self.assertIn(told, answer.body)
                self.assertEqual(answer.headers["x-content-type-options"], "nosniff")

    def test_a_chunked_body_is_read_whole_or_refused_and_never_left_out(self) -> None:
        self.mount({"x": Command("cat", stdin=True)})
        given: Any = {"REQUEST_METHOD": "POST", "PATH_INFO": "/x", "HTTP_TRANSFER_ENCODING": "chunked"}
        self.assertEqual(self.call(**given, **{"wsgi.input_terminated": True})[::2], ("200 OK", b"x=1"))
        status, _, body = self.call(**given)
        self.assertEqual(status, "411 Length Required")
        self.assertIn(b"with a Content-Length", body)

    def test_a_client_that_leaves_ends_the_run_at_the_next_output(self) -> None:
        port = self.mount({"x": "!echo $$; while :; do sleep 0.1; echo more; done"})
        with Raw(("127.0.0.1", port)) as client:
            client.get("/x")
            client.read_head()
            (pid,) = pids_in(client.read_until(b"\n"))
        wait_until(lambda: not is_alive(pid), "it is gone", 5)
        wait_until(lambda: b'outcome="client_gone"} 1' in self.ask(port, "/-/metrics").body, "it is counted")

    def test_a_silent_one_that_is_given_a_heartbeat_ends_too(self) -> None:
        port = self.mount({"x": "!echo pid $$; exec sleep 300"})
        with Raw(("127.0.0.1", port)) as client:
            client.get("/x?heartbeat=0.2")
            client.read_until(b"pid ")
            (pid,) = pids_in(client.read_until(b"\n"))
        wait_until(lambda: not is_alive(pid), "it is gone", 5)

    def test_a_silent_task_that_is_given_a_heartbeat_ends_too(self) -> None:
        told = threading.Event()

        def task() -> None:
            while not streamlog.stopping():
                time.sleep(0.01)
            told.set()

        port = self.mount({"x": task})
        with Raw(("127.0.0.1", port)) as client:
            client.get("/x?heartbeat=0.2")
            self.assertEqual(client.read_head()[0], 200)
            self.assertIn(b"[still running", client.read_until(b"\n"))
        self.assertTrue(told.wait(5))

    def test_a_run_that_is_cut_raises_behind_its_last_line(self) -> None:
        self.mount({"x": "!echo a; exec yes"}, max_output_bytes=2)
        told: list[Any] = []
        body = iter(self.app({"REQUEST_METHOD": "GET", "PATH_INFO": "/x", "HTTP_HOST": "localhost",
                              "wsgi.url_scheme": "http"}, lambda *arguments: told.extend(arguments)))  # fmt: skip
        self.assertEqual((next(body), next(body)), (b"", b"a\n"))
        self.assertIn(b"[stopped: output limit of 2 bytes", next(body))
        with self.assertRaisesRegex(ConnectionAbortedError, "x was stopped: output limit of 2 bytes"):
            next(body)

    def test_hosts_of_this_machine_alone_are_answered_unless_it_is_told_who_may(self) -> None:
        basic = "Basic OnNlY3JldA=="
        for settings, host, authorization, status in (
            ({}, "localhost:80", "", "200 OK"),
            ({}, "[::1]", "", "200 OK"),
            ({}, "192.0.2.1", "", "403 Forbidden"),
            ({}, "evil.example", "", "403 Forbidden"),
            ({"allow_hosts": ["ops.example"]}, "ops.example", "", "200 OK"),
            ({"allow_hosts": ["ops.example"]}, "evil.example", "", "403 Forbidden"),
            ({"token": "secret"}, "any.example", "", "401 Unauthorized"),
            ({"token": "secret"}, "any.example", basic, "200 OK"),
            ({}, "", "", "400 Bad Request"),
        ):
            with self.subTest(settings=settings, host=host):
                self.app = streamlog.wsgi({"x": "echo x"}, **settings)
                said = self.call(PATH_INFO="/", HTTP_HOST=host, HTTP_AUTHORIZATION=authorization)
                self.assertEqual(said[0], status)

    def test_pages_of_other_sites_are_refused_and_its_own_are_told_by_the_scheme(self) -> None:
        self.app = streamlog.wsgi({"x": "echo x"})
        for scheme, origin, status in (
            ("https", "https://localhost", "200 OK"),
            ("https", "http://localhost", "403 Forbidden"),
            ("http", "http://evil.example", "403 Forbidden"),
        ):
            said = self.call(**{"PATH_INFO": "/", "wsgi.url_scheme": scheme, "HTTP_ORIGIN": origin})
            self.assertEqual(said[0], status)

    def test_under_a_prefix_links_and_lines_lead_there(self) -> None:
        self.app = streamlog.wsgi({"x": "echo x"})
        self.assertEqual(self.call(SCRIPT_NAME="/o p", PATH_INFO="")[:2][0], "308 Permanent Redirect")
        self.assertEqual(self.call(SCRIPT_NAME="/o p", PATH_INFO="")[1]["Location"], "/o%20p/")
        self.assertIn(b"curl -N http://localhost/ops/x\n", self.call(SCRIPT_NAME="/ops", PATH_INFO="/")[2])
        self.assertEqual(self.call(SCRIPT_NAME="/ops", PATH_INFO="/x")[2], b"x\n")
        self.assertEqual(self.call(PATH_INFO="")[0], "200 OK")

    def test_a_command_is_told_its_client_and_takes_forms_and_json(self) -> None:
        told = streamlog.Command("!echo $REMOTE_ADDR $REMOTE_USER $HTTP_X_A {x=0}", method="POST", headers=["X-A"])
        port = self.mount({"x": told, "in": streamlog.Command("cat", stdin=True)}, token="secret", read_token="look")
        json_ = ["Authorization: Bearer secret", "Content-Type: application/json", "X-A: b"]
        self.assertEqual(self.ask(port, "/x", "POST", json_, b'{"x": 1}').body, b"127.0.0.1 token b 1\n")
        self.assertEqual(self.ask(port, "/x", "POST", ["Authorization: Bearer look"], b"x=1").status, 403)
        form = ["Authorization: Bearer secret", "Content-Type: application/x-www-form-urlencoded"]
        self.assertEqual(self.ask(port, "/in?-=form", "POST", form, b"-=a%0D%0Ab").body, b"a\nb")
        self.app = streamlog.wsgi({"x": "!echo [$REMOTE_ADDR]"})
        self.addCleanup(self.app.close)
        for environ, address in (
            ({"REMOTE_ADDR": "192.0.2.1", "REMOTE_PORT": 80}, b"[192.0.2.1]\n"),  # as werkzeug has it
            ({"REMOTE_ADDR": "192.0.2.1", "REMOTE_PORT": "80"}, b"[192.0.2.1]\n"),
            ({"REMOTE_ADDR": "192.0.2.1"}, b"[192.0.2.1]\n"),
            ({"REMOTE_ADDR": "2001:db8::7"}, b"[2001:db8::7]\n"),
            ({"REMOTE_ADDR": ""}, b"[]\n"),  # as gunicorn has it on a unix socket
            ({}, b"[]\n"),
        ):
            with self.subTest(environ=environ):
                self.assertEqual(self.call(PATH_INFO="/x", **environ)[2], address)

    def test_a_task_refuses_here_too(self) -> None:
        def task() -> None:
            time.sleep(0.1)
            raise streamlog.Error("not now", 409, {"Retry-After": "7"})

        self.app = streamlog.wsgi({"x": task})
        status, headers, body = self.call(PATH_INFO="/x")
        self.assertEqual((status, headers["Retry-After"], body), ("409 Conflict", "7", b"not now\n"))
        self.assertIn(b'command="x",outcome="failed"} 1\n', self.call(PATH_INFO="/-/metrics")[2])

    def test_a_silence_is_broken_where_the_format_allows_it_or_it_is_asked_for(self) -> None:
        with mock.patch.object(streamlog, "_SSE_COMMENT_SECONDS", 0.1):
            for settings, format_, expected in (
                ({}, "html", b"[still running, silent for "),
                ({}, "ndjson", b'"silent_seconds": '),
                ({}, "text", b""),
                ({"heartbeat_seconds": 0.2}, "text", b"[still running, silent for "),
            ):
                commands = {"x": "sleep 1", "task": lambda: time.sleep(1)}
                self.app = streamlog.wsgi(commands, **typing.cast(Any, settings))

                def call(path: str, format_: str = format_, expected: bytes = expected) -> None:
                    body = self.call(PATH_INFO=path, QUERY_STRING=f"format={format_}")[2]
                    self.assertIn(expected, body)
                    self.assertEqual(bool(body), bool(expected))

                with self.subTest(settings=settings, format_=format_):
                    at_once(self, call, ("/x",), ("/task",))

    def test_a_body_is_read_as_far_as_it_goes(self) -> None:
        self.app = streamlog.wsgi({"x": Command("echo {x}", method="POST")})
        form = {"REQUEST_METHOD": "POST", "PATH_INFO": "/x", "CONTENT_TYPE": "application/x-www-form-urlencoded"}
        chunked: Any = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
        self.assertEqual(self.call(**form, CONTENT_LENGTH="3")[2], b"1\n")
        self.assertEqual(self.call(**form, **chunked)[2], b"1\n")
        self.assertIn(b"shorter than it says", self.call(**form, CONTENT_LENGTH="4")[2])
        self.assertIn(b"must be a number", self.call(**form, CONTENT_LENGTH="-1")[2])

    def test_a_body_is_a_command_s_input_and_one_that_breaks_off_is_no_end_of_file(self) -> None:
        port = self.mount({"x": Command("sha256sum", stdin=True), "y": Command("true", stdin=True)})
        data = os.urandom(1_000_000)
        digest = hashlib.sha256(data).hexdigest().encode()
        self.assertEqual(self.ask(port, "/x", "PUT", [], data).body, digest + b"  -\n")
        self.assertEqual(self.ask(port, "/y", "PUT", [], b"abc").body, b"")
        done = self.folder / "done"
        port = self.mount({"x": Command(f"!echo $$; cat >/dev/null && touch {done}", stdin=True)})
        with Raw(("127.0.0.1", port)) as client:
            client.get("/x", "PUT", ["Content-Length: 100"])
            client.send(b"x" * 50)
            client.read_head()
            (pid,) = pids_in(client.read_until(b"\n"))
        wait_until(lambda: not is_alive(pid), "it is gone", 5)
        self.assertFalse(done.exists())
        wait_until(
            lambda: not any(thread.name == "streamlog-input" for thread in threading.enumerate()), "so is its thread"
        )

    def test_settings_of_a_socket_are_refused(self) -> None:
        with self.assertRaisesRegex(ConfigError, "the setting 'port' belongs to the server"):
            streamlog.wsgi({}, port=80)

    def test_a_server_that_refuses_the_head_leaves_no_run(self) -> None:
        self.app = streamlog.wsgi({"x": "sleep 300"})
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/x", "HTTP_HOST": "localhost", "wsgi.url_scheme": "http"}
        with self.assertRaises(OSError):
            self.app(environ, mock.Mock(side_effect=OSError))
        self.assertFalse(self.app._site.runs.active)

    def test_the_log_is_there_too(self) -> None:
        port = self.mount({}, insight=True, log=1000)
        logging.getLogger("of.program").warning("told")
        self.assertRegex(self.ask(port, "/log?follow=0").body, rb"WARNING of\.program: told\n$")

    def test_the_end_of_the_program_ends_what_is_open(self) -> None:
        script = (
            "import streamlog\n"
            "app = streamlog.wsgi({'x': '!echo $$; exec sleep 300'})\n"
            "environ = {'REQUEST_METHOD': 'GET', 'PATH_INFO': '/x', 'HTTP_HOST': 'localhost', 'wsgi.url_scheme': ''}\n"
            "body = app(environ, lambda *_: None); next(body); print(next(body).decode())\n"
            "def read():\n"
            "    try: list(body)\n"
            "    except ConnectionAbortedError: pass\n"
            "import threading; threading.Thread(target=read, daemon=True).start()\n"
            "run = streamlog.stream('!echo $$; exec sleep 300'); print(next(run).decode())\n"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=-1, stderr=-1, timeout=20)
        self.assertEqual(done.stderr, b"")
        pids = list(pids_in(done.stdout))
        self.assertEqual(len(pids), 2)
        self.assertFalse(any(map(is_alive, pids)))

    def test_a_forked_worker_leaves_its_parent_s_streams_alone(self) -> None:
        script = (
            "import os, streamlog, sys\n"
            "run = streamlog.stream('!echo $$; read x; echo more; exec sleep 300'); print(next(run).decode())\n"
            "if not os.fork(): run.close(); del run; sys.exit()\n"
            "os.wait(); run.write(b'x\\n'); print(next(run).decode(), run.exit_code)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=-1, stderr=-1, text=True, timeout=20)
        self.assertEqual((done.stderr, done.stdout.split()[-2:]), ("", ["more", "None"]))
