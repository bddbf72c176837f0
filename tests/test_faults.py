"""Faults that do not come from a client: a lack of descriptors or disk, killed helpers, and the moments of an end."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import streamlog
from streamlog import Command

from .support import (
    CERTIFICATE,
    IS_ROOT,
    PROGRAM,
    ROOT,
    Program,
    ServerCase,
    at_once,
    children,
    descriptors,
    is_alive,
    pids_in,
    try_connect,
    wait_until,
)

LIBSSL = ctypes.util.find_library("ssl")


def limited(descriptor_count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptor_count, descriptor_count))


def can_unshare(*flags: str) -> bool:
    with open(os.devnull, "w") as null:
        return bool(
            IS_ROOT
            and shutil.which("unshare")
            and subprocess.run(["unshare", *flags, "true"], stderr=null, check=False).returncode == 0
        )


class Kept(ServerCase):
    def test_ended_runs_do_not_use_up_the_descriptors(self) -> None:
        with Program("-p", "0", "-q", "x=echo x", preexec_fn=lambda: limited(64)) as program:
            for _ in range(100):
                path = "/" + program.fetch("/x?async=1").headers["location"]
                wait_until(lambda path=path: program.fetch(f"{path}?wait").status == 200, "it ends")  # type: ignore[misc]
            clients = [program.connect() for _ in range(10)]
            for client in clients:
                client.get("/-/healthy")
                self.assertEqual(client.read_answer().status, 200)
                client.sock.close()
            self.assertEqual(program.fetch("/x").body, b"x\n")

    def test_they_go_by_the_clock_though_nobody_looks(self) -> None:
        with mock.patch.object(streamlog, "_SWEEP_SECONDS", 0.1):
            server = self.serve({"x": "echo x"}, kept_seconds=2, transcripts=str(self.folder))
            location = "/" + self.fetch(server, "/x?async=1").headers["location"]
            self.assertEqual(self.fetch(server, f"{location}?wait").status, 200)
            self.assertIn(str(self.folder), str(descriptors()))
            wait_until(lambda: str(self.folder) not in str(descriptors()), "its transcript is closed")

    def test_a_clock_that_is_set_changes_neither_ages_nor_durations(self) -> None:
        server = self.serve({"x": "sleep 0.2"})
        for shift in (86_400, -86_400):
            location = "/" + self.fetch(server, "/x?async=1").headers["location"]
            moment = time.time() + shift
            with mock.patch("time.time", lambda moment=moment: moment):
                answer = self.fetch(server, f"{location}?wait&footer=1")
                self.assertRegex(answer.body, rb"^\[exit 0, \d\.\d s\]\n$")
                self.assertEqual(self.fetch(server, location).status, 200)

    @unittest.skipUnless(can_unshare("--mount"), "no file system can be mounted")
    def test_the_oldest_makes_room_on_a_full_disk(self) -> None:
        disk = self.folder / "disk"
        disk.mkdir()
        script = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
        prefix = ["unshare", "--mount", "sh", "-c", script, str(disk)]
        arguments = ["--transcripts", str(disk), "x=head -c {n:int} /dev/zero", "-p", "0", "-q"]
        with Program(*arguments, prefix=prefix) as program:
            first = "/" + program.fetch("/x?async=1&n=2000000").headers["location"]
            wait_until(lambda: b"are no longer kept" in program.fetch(first).body, "the disk is full")
            second = "/" + program.fetch("/x?async=1&n=900000").headers["location"]
            answer = program.fetch(second)
            self.assertEqual((answer.status, answer.body.count(b"\0"), len(answer.body)), (200, 900_000, 900_000))
            self.assertEqual(program.fetch(first).status, 410)


class Memory(ServerCase):
    @unittest.skipUnless(hasattr(resource, "prlimit"), "needs prlimit(2)")
    def test_after_a_lack_of_memory_it_serves_again(self) -> None:
        with Program("-p", "0", "-q", "x=echo x", start_new_session=True) as program:
            pid = program.process.pid
            self.assertEqual(program.fetch("/x").body, b"x\n")
            free = resource.prlimit(pid, resource.RLIMIT_AS)
            for more in (0, 1 << 20, 9 << 20, 17 << 20):  # a thread's stack has 8 MiB
                size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
                resource.prlimit(pid, resource.RLIMIT_AS, (size + more, free[1]))
                clients = [program.connect() for _ in range(40)]
                for client in clients:
                    with contextlib.suppress(OSError):
                        client.get("/x")
                time.sleep(0.3)
                resource.prlimit(pid, resource.RLIMIT_AS, free)
                for client in clients:
                    client.sock.close()
                wait_until(lambda: self.metric(program.connect(), "streamlog_clients") == 1, "they are gone", 20)
                self.assertEqual(program.fetch("/x").body, b"x\n")


class Strangers(ServerCase):
    @unittest.skipUnless(IS_ROOT and shutil.which("setpriv"), "needs root, and setpriv")
    def test_a_run_says_that_a_part_of_it_could_not_be_signalled(self) -> None:
        other = "setpriv --reuid=61234 --clear-groups sh -c 'echo $$; exec sleep 300'"
        prefix = ["setpriv", "--bounding-set=-kill", "--inh-caps=-kill"]  # root that may not signal other users
        arguments = ["-p", "0", "-q", "--timeout", "3", "--grace", "0.3", f"group=!{other} & wait", f"alone={other}"]
        with Program(*arguments, prefix=prefix) as program:

            def run(name: str) -> None:
                started = time.monotonic()
                pid, said = program.fetch(f"/{name}").body.splitlines()
                os.kill(int(pid), signal.SIGKILL)
                self.assertLess(time.monotonic() - started, 15)
                why = rb"\[stopped: timeout after 3 s, but processes of another user may go on, \d\.\d s\]"
                self.assertRegex(said, why)
                kind = b'streamlog_runs_total{command="%s",outcome="timeout"} 1' % name.encode()
                self.assertIn(kind, program.fetch("/-/metrics").body)

            at_once(self, run, ("group",), ("alone",))


class Numbers(ServerCase):
    def test_any_time_to_stall_is_one(self) -> None:
        for seconds in (0.001, 2e6, 9e8):
            self.assertEqual(self.fetch(self.serve({"x": "echo x"}, stall_seconds=seconds), "/healthy").status, 404)


class Delays(ServerCase):
    def test_a_run_whose_thread_comes_late_ends_all_the_same(self) -> None:
        wait = streamlog.Run.wait

        def late(run: streamlog.Run, *given: Any, **named: Any) -> Any:
            time.sleep(0.06)  # as on a busy machine
            return wait(run, *given, **named)

        server = self.serve({"x": "!(trap '' TERM; sleep 0.5) >/dev/null 2>&1 & echo x"})
        with mock.patch.object(streamlog.Run, "wait", late):
            for path in ("/x", "/" + self.fetch(server, "/x?async=1").headers["location"]):
                self.assertEqual(self.fetch(server, path).body, b"x\n")
            wait_until(lambda: not server._site.runs.active, "both are gone", 5)
            wait_until(lambda: b"running" not in self.fetch(server, "/-/runs").body, "it has ended", 5)


class Watchdogs(ServerCase):
    def test_one_that_is_killed_is_replaced_and_leaves_no_zombie(self) -> None:
        note = self.folder / "pid"
        with Program("-p", "0", "-q", "--grace", "0.3", f"x=!echo $$ > {note}; exec sleep 300") as program:
            program.fetch("/x?async=1")
            wait_until(lambda: note.exists() and note.read_text(), "it runs")
            (pid,) = pids_in(note.read_bytes())
            for _ in range(3):
                theirs = wait_until(lambda: children(program.process.pid) - {pid}, "there is a watchdog")
                (dog,) = theirs
                os.kill(dog, signal.SIGKILL)
                wait_until(lambda dog=dog: not os.path.exists(f"/proc/{dog}"), "it is reaped")  # type: ignore[misc]
            wait_until(lambda: children(program.process.pid) - {pid}, "there is another")
            self.assertTrue(is_alive(pid))
            program.process.kill()
            program.end()
        wait_until(lambda: not is_alive(pid), "the run has ended", 5)

    def test_it_uses_the_signal_of_its_command(self) -> None:
        told = self.folder / "told"
        (self.folder / "c.ini").write_text(
            "[x]\nstop = INT\n"
            f"command = !trap 'echo int > {told}; exit' INT; echo $$ > {told}; while :; do sleep 0.05; done\n"
        )
        with Program("-p", "0", "-q", "-c", str(self.folder / "c.ini")) as program:
            program.fetch("/x?async=1")
            wait_until(told.exists, "it runs")
            (pid,) = pids_in(wait_until(told.read_bytes, "its number"))
            wait_until(lambda: children(program.process.pid) - {pid}, "there is a watchdog")
            program.process.kill()
            program.end()
        wait_until(lambda: not is_alive(pid), "the run has ended")
        self.assertEqual(told.read_text(), "int\n")

    def test_one_lives_until_all_of_its_run_is_gone(self) -> None:
        note = self.folder / "pid"
        line = f"x=!trap '' TERM; sleep 300 >/dev/null 2>&1 & echo $$ $! > {note}"
        with Program("-p", "0", "-q", "--grace", "4", line) as program:
            program.fetch("/x?async=1")
            wait_until(lambda: note.exists() and note.read_text().endswith("\n"), "it runs")
            leader, pid = pids_in(note.read_bytes())
            wait_until(lambda: not is_alive(leader), "its leader has exited")
            wait_until(lambda: children(program.process.pid) - {leader}, "there is a watchdog")
            program.process.kill()
            program.end()
        wait_until(lambda: not is_alive(pid), "the rest has ended", 15)

    @unittest.skipUnless(shutil.which("bash"), "bash is not installed")
    def test_jobs_of_a_terminal_end_with_a_server_that_is_killed(self) -> None:
        note = self.folder / "pids"
        script = self.folder / "jobs"
        script.write_text(
            f"trap '' HUP\nsleep 321 & sleep 322 &\necho $$ $(jobs -p) > {note}.new; mv {note}.new {note}; wait\n"
        )
        (self.folder / "c.ini").write_text(f"[x]\ncommand = bash -m {script}\npty = yes\n")
        with Program("-p", "0", "-q", "--grace", "0.3", "-c", str(self.folder / "c.ini")) as program:
            program.fetch("/x?async=1")
            wait_until(note.exists, "it runs")
            pids = set(pids_in(note.read_bytes()))
            self.assertEqual(len(pids), 3)
            wait_until(lambda: children(program.process.pid) - pids, "there is a watchdog")
            program.process.kill()
            program.end()
        wait_until(lambda: not any(map(is_alive, pids)), "all of it has ended", 5)


class Ends(ServerCase):
    def test_a_client_that_was_accepted_gets_an_answer_while_the_server_closes(self) -> None:
        server = self.serve({"x": "echo x"})
        self.enterContext_(mock.patch.object(streamlog, "_CUT_SECONDS", 10))
        new, idle = self.connect(server), self.connect(server)
        idle.get("/x")
        idle.read_answer()
        wait_until(lambda: len(server._clients) == 2, "both are accepted")
        server.shutdown()
        self.assertTrue(idle.is_closed())
        new.get("/x")
        answer = new.read_answer()
        self.assertEqual((answer.status, answer.headers["retry-after"]), (503, "1"))
        self.assertTrue(new.is_closed())

    def test_what_comes_too_late_runs_nothing(self) -> None:
        mark = self.folder / "mark"
        server = self.serve({"x": Command("touch {x:path}", method="POST")})
        self.enterContext_(mock.patch.object(streamlog, "_CUT_SECONDS", 3))
        clients = [self.connect(server) for _ in range(3)]
        form = ["Content-Type: application/x-www-form-urlencoded", f"Content-Length: {len(str(mark)) + 2}"]
        for client in clients[:2]:
            client.get("/x", "POST", [*form, "Expect: 100-continue"])
            self.assertEqual(client.read_head()[0], 100)
        clients[2].send(b"GET /x HTTP/1.1\r\nHost:")
        wait_until(lambda: len(server._idle) == 3, "they are waited for")
        server.shutdown()
        wait_until(lambda: all(client._cut_at < math.inf for client in list(server._clients)), "each has seen it")
        clients[0].send(f"x={mark}".encode())
        for client in clients:
            self.assertEqual(client.read_answer().status, 503)
        self.assertFalse(mark.exists())

    def test_one_that_sends_nothing_holds_nothing_up(self) -> None:
        server = self.serve({"x": "echo x"}, grace_seconds=20)
        clients = [self.connect(server) for _ in range(3)]
        wait_until(lambda: len(server._clients) == 3, "they are accepted")
        started = time.monotonic()
        server.close()
        self.assertLess(time.monotonic() - started, 10)
        self.assertTrue(all(client.is_closed() for client in clients))

    def test_the_exit_code_is_0_whatever_has_become_of_its_output(self) -> None:
        for stream in ("stdout", "stderr"):
            for kind in ("full", "broken"):
                with self.subTest(stream=stream, kind=kind):
                    reader, writer = os.pipe()
                    if kind == "full":
                        os.close(writer)
                        writer = os.open("/dev/full", os.O_WRONLY)
                    with socket.create_server(("127.0.0.1", 0)) as free:
                        port = free.getsockname()[1]
                    os.close(reader)
                    given: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: writer}
                    process = subprocess.Popen([sys.executable, PROGRAM, "-p", str(port), "x=echo x"], **given)
                    self.addCleanup(process.wait, 10)
                    self.addCleanup(process.kill)
                    os.close(writer)
                    client = wait_until(lambda port=port: try_connect(("127.0.0.1", port)), "it listens")  # type: ignore[misc]
                    with client:
                        client.get("/x")
                        self.assertEqual(client.read_answer().body, b"x\n")
                    process.terminate()
                    self.assertEqual(process.wait(10), 0)

    def test_an_interrupt_while_it_starts_is_no_traceback(self) -> None:
        fifo = self.folder / "fifo"
        os.mkfifo(fifo)
        process = subprocess.Popen([sys.executable, PROGRAM, "-c", str(fifo)], stderr=-1, cwd=ROOT)
        self.addCleanup(process.wait, 10)
        self.addCleanup(process.kill)
        with open(fifo, "w"):  # now it reads the file
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.communicate(timeout=10)[1], b"")
        self.assertEqual(process.returncode, -signal.SIGINT)

    @unittest.skipUnless(can_unshare("--net", "--mount") and shutil.which("ip"), "no network can be made")
    def test_a_name_stands_for_the_first_address_that_this_machine_has(self) -> None:
        hosts = self.folder / "hosts"
        hosts.write_text("127.0.0.1 localhost\n::1 localhost\n")
        script = f'mount --bind {hosts} /etc/hosts && ip link set lo up && ip addr del 127.0.0.1/8 dev lo && exec "$@"'
        arguments = [sys.executable, "-u", PROGRAM, "-q", "-b", "localhost", "-p", "8000", "x=true"]
        prefix = ["unshare", "--net", "--mount", "sh", "-c", script, "sh"]
        with subprocess.Popen(
            [*prefix, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as program:
            self.addCleanup(program.kill)
            assert program.stdout and program.stderr
            line = program.stdout.readline()
            self.assertEqual(line, "http://[::1]:8000\n", line or program.stderr.read())
            program.terminate()


class OwnModules(ServerCase):
    def test_a_file_beside_the_program_does_not_pass_for_a_module(self) -> None:
        copy = self.folder / "streamlog.py"
        copy.write_bytes(Path(PROGRAM).read_bytes())
        for name in ("html", "argparse", "configparser", "asyncio", "json"):
            (self.folder / f"{name}.py").write_text("raise SystemExit('taken in')\n")
        (self.folder / "c.ini").write_text("[x]\ncommand = echo x\n")
        env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        for how in ([str(copy)], ["-m", "streamlog"], ["-"], ["-I", str(copy)]):
            with open(copy) as program:
                found = subprocess.run(
                    [sys.executable, *how, "--check", "-c", "c.ini"],
                    cwd=self.folder,
                    env=env,
                    stdin=program,
                    capture_output=True,
                    text=True,
                    check=False,
                )
            self.assertEqual((found.returncode, found.stderr), (0, ""), how)
            self.assertIn("echo x", found.stdout)


@unittest.skipUnless(LIBSSL, "there is no libssl to speak to by hand")
class KeyUpdates(ServerCase):
    """RFC 8446 section 4.6.3: a client may change its keys at any time, and have the server change its own."""

    def test_a_client_that_sends_nothing_else_is_closed(self) -> None:
        lib = ctypes.CDLL(LIBSSL)
        pointer = ctypes.c_void_p
        for name, result, *arguments in (
            ("TLS_client_method", pointer),
            ("SSL_CTX_new", pointer, pointer),
            ("SSL_new", pointer, pointer),
            ("SSL_set_fd", ctypes.c_int, pointer, ctypes.c_int),
            ("SSL_connect", ctypes.c_int, pointer),
            ("SSL_do_handshake", ctypes.c_int, pointer),
            ("SSL_key_update", ctypes.c_int, pointer, ctypes.c_int),
            ("SSL_free", None, pointer),
            ("SSL_CTX_free", None, pointer),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        server = self.serve({"x": "echo x"}, tls_cert=CERTIFICATE, head_seconds=3)

        def send(wants_answer: int) -> None:
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                context = lib.SSL_CTX_new(lib.TLS_client_method())
                connection = lib.SSL_new(context)
                lib.SSL_set_fd(connection, sock.fileno())
                self.assertEqual(lib.SSL_connect(connection), 1)
                started = time.monotonic()
                while lib.SSL_key_update(connection, wants_answer) == lib.SSL_do_handshake(connection) == 1:
                    time.sleep(0.001)
                    self.assertLess(time.monotonic() - started, 30, "it goes on for ever")
                self.assertGreater(time.monotonic() - started, 1, "but not at once")
                lib.SSL_free(connection)
                lib.SSL_CTX_free(context)

        with mock.patch.object(streamlog, "_LINGER_SECONDS", 0.2):
            at_once(self, send, (0,), (1,))
        wait_until(lambda: not server._clients, "they are gone")


if __name__ == "__main__":
    unittest.main()
