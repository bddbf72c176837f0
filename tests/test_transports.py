"""The same behaviour over plain TCP, TLS and a unix socket; and what is peculiar to each."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import unittest
import warnings
from pathlib import Path
from typing import Any, Optional

import streamlog
from streamlog import Command, ConfigError, Settings

from .support import (
    CERTIFICATE,
    IS_ROOT,
    SOAK,
    Program,
    Raw,
    ServerCase,
    at_once,
    is_alive,
    is_held_back,
    pids_in,
    resident_bytes,
    run_program,
    trusting,
    wait_until,
)


class Tcp(ServerCase):
    """Over plain TCP; and over the other two, which build on it."""

    tells_a_cut_of_http_1_0 = True

    def where(self) -> dict[str, Any]:
        """The settings that choose the transport."""
        return {}

    def listen(self, commands: Any, **settings: Any) -> streamlog.Server:
        return self.serve(commands, **self.where(), **settings)

    def join(self, server: streamlog.Server, **options: Any) -> Raw:
        return self.connect(server, **options)

    def test_output_comes_at_once_and_the_connection_is_used_again(self) -> None:
        gate = self.make_gate()
        client = self.join(self.listen({"x": f"!printf one; read line < {gate}; printf two", "y": "echo y"}))
        client.get("/x")
        client.read_head()
        self.assertEqual(client.read_chunk(), b"one")
        gate.write_text("\n")
        self.assertEqual(client.read_chunk(), b"two")
        self.assertEqual(client.read_until(b"\r\n\r\n"), b"0\r\nExit-Code: 0\r\n\r\n")
        client.get("/y")
        self.assertEqual(client.read_answer().body, b"y\n")

    def test_thirty_megabytes_are_exact_to_a_fast_and_to_a_slow_reader(self) -> None:
        data = os.urandom(1 << 20) * 30
        (self.folder / "data").write_bytes(data)
        server = self.listen({"x": f"cat {self.folder / 'data'}"})
        for receive_buffer in (0, 4096):
            client = self.join(server, receive_buffer=receive_buffer)
            client.get("/x")
            digest = hashlib.sha256()
            client.read_head()
            for chunk in iter(client.read_chunk, None):
                digest.update(chunk)
            self.assertEqual(digest.digest(), hashlib.sha256(data).digest())

    def test_a_silent_command_is_stopped_when_its_client_leaves(self) -> None:
        server = self.listen({"x": "!sleep 300 & echo $$ $!; wait"})
        for leave in ("close", "reset", "shutdown"):
            client = self.join(server)
            client.get("/x")
            client.read_head()
            pids = list(pids_in(client.read_chunk() or b""))
            self.assertEqual(len(pids), 2)
            if leave == "close":
                client.sock.close()
            elif leave == "reset":
                client.reset()
            else:
                client.sock.shutdown(socket.SHUT_WR)
            wait_until(lambda pids=pids: not any(map(is_alive, pids)), f"both are gone: {leave}")  # type: ignore[misc]

    def test_a_reader_that_stops_holds_up_its_own_command_and_nothing_else(self) -> None:
        server = self.listen({"yes": "!echo $$; exec yes", "x": "echo x"})
        stuck = self.join(server)
        stuck.get("/yes")
        stuck.read_head()
        pid = next(pids_in(stuck.read_chunk() or b""))
        wait_until(lambda: is_held_back(pid), "the command is held back")
        before = resident_bytes()
        time.sleep(0.3)  # time in which memory would grow
        other = self.join(server)
        other.get("/x")
        self.assertEqual(other.read_answer().body, b"x\n")
        self.assertLess(resident_bytes() - before, 2 << 20)

    def test_http_1_0_tells_an_end_from_a_cut(self) -> None:
        server = self.listen({"x": "echo x", "cut": "yes x"}, max_output_bytes=1000)
        for path, is_whole in (("/x", True), ("/cut", not self.tells_a_cut_of_http_1_0)):
            client = self.join(server)
            client.get(path, version="1.0")
            answer = client.read_answer()
            self.assertEqual(answer.is_whole, is_whole, path)
            self.assertTrue(answer.body.startswith(b"x\n") or client.was_reset)

    def test_a_close_cuts_what_runs(self) -> None:
        server = self.listen({"x": "!echo x; sleep 300"})
        client = self.join(server)
        client.get("/x")
        client.read_head()
        client.read_chunk()
        threading.Thread(target=server.close).start()
        self.assertIn(b"the server is shutting down", client.read_chunk() or b"")
        self.assertTrue(client.is_closed())

    def test_clients_that_leave_in_a_flood_of_output_leave_nothing(self) -> None:
        server = self.listen({"yes": "yes"}, max_runs=1000)

        def loop() -> None:
            for _ in range(max(10, SOAK // 2)):
                client = self.join(server)
                client.get("/yes")
                self.assertEqual(client.read_head()[0], 200)
                client.read_chunk()
                client.reset()

        at_once(self, loop, (), ())
        wait_until(lambda: self.metric(self.join(server), "streamlog_clients") == 1, "all are gone")
        self.assertEqual(self.metric(self.join(server), 'streamlog_runs_active{command="yes"}'), 0)

    def test_uploads_and_their_output_cross_exactly_under_load(self) -> None:
        server = self.listen({"cat": Command("cat", stdin=True), "yes": "yes"})
        for _ in range(2):  # keep the server busy
            loud = self.join(server)
            loud.get("/yes")
            reader = threading.Thread(target=self.drain, args=(loud,))
            reader.start()
            self.addCleanup(reader.join)
            self.addCleanup(loud.sock.shutdown, socket.SHUT_RDWR)
        found: list[bool] = []

        def upload() -> None:
            data = os.urandom(1 << 20) * max(4, SOAK // 100)
            client = self.join(server)
            client.get("/cat", "PUT", [f"Content-Length: {len(data)}", "Connection: close"])
            found.append(self.exchange(client, data) == data)

        threads = [threading.Thread(target=upload) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(found, [True] * 4)

    def drain(self, client: Raw) -> None:
        """Read to the end, and keep nothing of it."""
        with contextlib.suppress(OSError):
            while client.sock.recv(65536):
                pass

    def exchange(self, client: Raw, data: bytes) -> bytes:
        """Send data while the answer comes, and return its body. One thread does both, as TLS objects want it."""
        client.sock.setblocking(False)
        view, pieces = memoryview(data), [b"\0"]
        while pieces[-1]:
            select.select([client.sock], [client.sock] if view else [], [], 20)
            with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                while view:
                    view = view[client.sock.send(view[: 1 << 14]) :]
            with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                while pieces[-1]:
                    pieces.append(client.sock.recv(1 << 16))
        client.buffer = b"".join(pieces[1:])
        answer = client.read_answer()
        self.assertTrue(answer.is_whole)
        return answer.body


class Tls(Tcp):
    def where(self) -> dict[str, Any]:
        return {"tls_cert": CERTIFICATE}

    def join(self, server: streamlog.Server, tls: Optional[ssl.SSLContext] = None, **options: Any) -> Raw:
        return self.connect(server, tls=tls or trusting(), **options)

    def test_1_2_and_1_3_are_spoken_and_nothing_older(self) -> None:
        server = self.listen({"x": "echo x"})
        for version, is_spoken in (
            (ssl.TLSVersion.TLSv1_1, False),
            (ssl.TLSVersion.TLSv1_2, True),
            (ssl.TLSVersion.TLSv1_3, True),
        ):
            context = trusting()
            context.set_ciphers("ALL:@SECLEVEL=0")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_1, version
            if not is_spoken:
                with self.assertRaises(ssl.SSLError):
                    self.join(server, tls=context)
                continue
            client = self.join(server, tls=context)
            client.get("/x")
            self.assertEqual(client.read_answer().body, b"x\n")

    def test_who_connects_and_says_nothing_stops_nobody_and_is_let_go_in_time(self) -> None:
        server = self.listen({"x": "echo x"}, head_seconds=2)
        silent = [self.connect(server) for _ in range(20)]
        for client in silent[:10]:
            client.send(b"\x16\x03\x01\x02\x00\x01")  # a hello that goes no further
        client = self.join(server)
        client.get("/x")
        self.assertEqual(client.read_answer().body, b"x\n")
        self.assertEqual(select.select([each.sock for each in silent], [], [], 0)[0], [], "they are waited for")
        for each in silent:
            self.assertTrue(each.is_closed())

    def test_who_speaks_plain_http_is_told_to_use_https_and_runs_nothing(self) -> None:
        mark = self.folder / "mark"
        answer = self.fetch(self.listen({"x": f"touch {mark}"}), "/x")
        self.assertEqual((answer.status, answer.body), (400, b"this port speaks TLS: use https\n"))
        self.assertFalse(mark.exists())

    def test_what_is_no_tls_at_all_costs_its_connection_only(self) -> None:
        server = self.listen({"x": "echo x"})
        for junk in (b"\0" * 100, b"\x16\x03\x01\xff\xff" + b"x" * 5000, b"SSH-2.0-x\r\n", os.urandom(300)):
            with self.subTest(junk=junk[:9]), self.assertNoLogs_():
                client = self.connect(server)
                client.send(junk)
                client.sock.shutdown(socket.SHUT_WR)
                self.assertTrue(client.is_closed())
        client = self.join(server)
        client.get("/x")
        self.assertEqual(client.read_answer().body, b"x\n")

    @contextlib.contextmanager
    def assertNoLogs_(self) -> Any:
        """assertNoLogs, which is of Python 3.10."""
        with self.assertLogs("streamlog", "INFO") as logged:
            yield
            streamlog._log.info("so that there is one")
        self.assertEqual(len(logged.output), 1, logged.output)

    def test_plain_http_after_junk_leaves_no_traceback(self) -> None:
        server = self.listen({"x": "echo x"})
        with self.assertNoLogs_():
            client = self.connect(server)
            client.send(b"\0\1junk\r\n")
            time.sleep(0.1)  # until it has been looked at
            with contextlib.suppress(OSError):
                client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertTrue(client.is_closed())

    def test_a_broken_record_in_the_middle_ends_the_connection_at_the_end_of_the_run(self) -> None:
        server = self.listen({"x": "!echo one; sleep 0.3; echo two"})
        client = self.join(server)
        with self.log_of() as logged:
            client.get("/x")
            client.read_head()
            self.assertEqual(client.read_chunk(), b"one\n")
            os.write(client.sock.fileno(), b"\x17\x03\x03\x00\x20" + b"x" * 32)
            self.assertEqual((client.read_chunk(), client.read_chunk()), (b"two\n", None))
            self.assertTrue(client.is_closed())
        self.assertEqual(["GET /x" in line for line in logged.output], [True])

    def test_a_broken_record_in_a_body_ends_the_run(self) -> None:
        server = self.listen({"x": Command("!echo $$; cat", stdin=True)})
        client = self.join(server)
        client.get("/x", "PUT", ["Content-Length: 100"])
        client.read_head()
        (pid,) = pids_in(client.read_chunk() or b"")
        os.write(client.sock.fileno(), b"\x17\x03\x03\x00\x20" + b"x" * 32)
        wait_until(lambda: not is_alive(pid), "the run is stopped")

    def test_an_end_is_told_by_a_close_notify_also_where_nothing_was_asked_for(self) -> None:
        server = self.listen({"x": "echo x"}, idle_seconds=0.2)
        for request in (b"", b"GET /x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"):
            client = self.join(server)
            client.send(request)
            self.assertTrue(client.is_closed())
            self.assertFalse(client.was_reset)

    def test_a_page_of_its_own_is_of_an_https_origin(self) -> None:
        server = self.listen({"x": Command("echo x", method="POST")})
        for origin, status in (("https://localhost", 200), ("http://localhost", 403)):
            client = self.join(server)
            client.get("/x", "POST", [f"Origin: {origin}"])
            self.assertEqual(client.read_answer().status, status)

    @unittest.skipUnless(shutil.which("curl"), "curl is not installed")
    def test_the_lines_that_are_printed_can_be_run(self) -> None:
        with Program("-p", "0", "--tls-cert", CERTIFICATE, "x=echo x") as program:
            assert program.process.stdout
            line = program.process.stdout.readline()
            self.assertIn("https://127.0.0.1:", line)
            done = subprocess.run([*line.split(), "--cacert", CERTIFICATE], capture_output=True, text=True)
        self.assertEqual(done.stdout, "x\n", done)

    def test_mistakes_with_certificates_are_told(self) -> None:
        for name, pem in (("alien", "alien"), ("junk", "no certificate"), ("locked", LOCKED_KEY)):
            (self.folder / name).write_text(pem)
        certificate = Path(CERTIFICATE).read_text().partition("-----BEGIN PRIVATE")[0]
        (self.folder / "cert").write_text(certificate)
        for options, told in (
            (["--tls-cert", "/nowhere"], "cannot use the certificate '/nowhere' with the key '/nowhere'"),
            (["--tls-cert", CERTIFICATE, "--tls-key", "/nowhere"], "with the key '/nowhere'"),
            (["--tls-cert", "/nowhere"], "No such file"),
            (["--tls-cert", str(self.folder / "junk")], "cannot use the certificate"),
            (["--tls-cert", str(self.folder / "cert")], "cannot use the certificate"),
            (
                ["--tls-cert", str(self.folder / "cert"), "--tls-key", str(self.folder / "locked")],
                "have no pass phrase",
            ),
            (["--tls-key", CERTIFICATE], "a TLS key needs its certificate: set --tls-cert"),
            (["--tls-cert", ""], "--tls-cert must be the name of a file: ''"),
        ):
            with self.subTest(options=options):
                done = run_program("-p", "0", *options, "true", stdin=subprocess.DEVNULL)
                self.assertEqual((done.returncode, done.stderr.count("\n")), (2, 1), done.stderr)
                self.assertIn(told, done.stderr)


class Unix(Tcp):
    tells_a_cut_of_http_1_0 = False  # a unix socket has no resets

    def where(self) -> dict[str, Any]:
        return {"bind": f"unix:{self.folder / 'socket'}"}

    def test_only_its_owner_may_connect(self) -> None:
        server = self.listen({"x": "echo x"})
        self.assertEqual(stat.S_IMODE(os.stat(server._socket_path).st_mode), 0o600)

    @unittest.skipUnless(IS_ROOT, "only root can be somebody else")
    def test_another_user_is_refused(self) -> None:
        server = self.listen({"x": "echo x"})
        self.folder.chmod(0o755)
        script = "import os, socket, sys; os.setuid(65534); socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        done = subprocess.run([sys.executable, "-c", script, server._socket_path], capture_output=True, text=True)
        self.assertIn("PermissionError", done.stderr)

    def test_any_host_name_will_do_and_other_sites_are_refused_still(self) -> None:
        server = self.listen({"x": "echo x"})
        for lines, status in (
            (["Host: box.example"], 200),
            (["Host: x", "Origin: http://evil.test"], 403),
            (["Host: x", "Sec-Fetch-Site: cross-site"], 403),
        ):
            client = self.join(server)
            client.send("\r\n".join(["GET /x HTTP/1.1", *lines, "", ""]).encode())
            self.assertEqual(client.read_answer().status, status)

    def test_the_socket_of_a_dead_server_is_replaced_and_a_living_one_s_is_not(self) -> None:
        path = self.folder / "socket"
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as dead:
            dead.bind(str(path))
        server = self.listen({"x": "echo x"})
        with self.assertRaisesRegex(OSError, "another server is using it"):
            self.listen({})
        self.assertEqual(self.fetch(server, "/x").body, b"x\n")
        server.close()
        self.assertFalse(path.exists())

    def test_what_is_no_socket_is_left_alone(self) -> None:
        path = self.folder / "socket"
        path.write_text("precious")
        with self.assertRaisesRegex(OSError, "no socket"):
            self.listen({})
        self.assertEqual(path.read_text(), "precious")

    def test_at_its_end_it_leaves_a_successor_s_socket_alone(self) -> None:
        server = self.listen({})
        path = Path(server._socket_path)
        path.unlink()
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as successor:
            successor.bind(str(path))
            server.close()
            self.assertTrue(path.exists())

    def test_mistakes_are_told_in_a_line(self) -> None:
        for bind, told in (
            ("unix:", "a unix socket needs a path"),
            ("unix:" + "/tmp/" + "x" * 200, "AF_UNIX path too long"),
            ("unix:/nowhere/socket", "cannot listen on unix:/nowhere/socket: No such file or directory"),
        ):
            with self.subTest(bind=bind):
                done = run_program("-b", bind, "true")
                self.assertEqual((done.returncode, done.stderr.count("\n")), (2, 1), done.stderr)
                self.assertIn(told, done.stderr)
        with self.assertRaises(ConfigError):
            streamlog.Server({}, Settings(bind="unix:a\0b"))

    @unittest.skipUnless(shutil.which("curl"), "curl is not installed")
    def test_the_lines_that_are_printed_and_listed_can_be_run(self) -> None:
        path = self.folder / "a socket"
        with Program("-b", f"unix:{path}", "x=echo x") as program:
            assert program.process.stdout
            line = program.process.stdout.readline()
            self.assertEqual(subprocess.run(f"{line.strip()} -s", shell=True, stdout=-1, text=True).stdout, "x\n")
            curl = ["curl", "-s", "--unix-socket", str(path)]
            self.assertIn(line, subprocess.run([*curl, "http://localhost/"], stdout=-1, text=True).stdout)
            by_proxy = subprocess.run([*curl, "http://box.example/"], stdout=-1, text=True).stdout
            self.assertIn("curl -N http://box.example/x\n", by_proxy)
            program.process.terminate()
            self.assertIn("client=unix", program.end()[1])
        self.assertFalse(path.exists())


class TlsOverUnix(Tls):
    """Transports go together: TLS knows nothing of the socket below."""

    tells_a_cut_of_http_1_0 = True  # by a close_notify that does not come

    def where(self) -> dict[str, Any]:
        return {"tls_cert": CERTIFICATE, "bind": f"unix:{self.folder / 'socket'}"}


# PKCS #8 with a pass phrase, as `openssl pkcs8 -topk8` writes it.
LOCKED_KEY = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAiVIb8Rs46hFQICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEEhxePzO5ocTypJo+23bRfIEgZDz
oMMvVS85WEQO8ZE/2Q97JGRGAuk5tY5w6ageTrzLHMfeB7uxi0sUkqPEN1gs9jT1
XjsTbMlS2KEy5pjNUXFza9R1MlHO2BCpQXeorQodTiUBS9X8gmT9femSzegr9869
2+TQlyikGJFaJfUX6eT4dkCWwOV+5NpmW6CtIhYI5EugdIYgVtDBBARGgsR4+d8=
-----END ENCRYPTED PRIVATE KEY-----
"""
