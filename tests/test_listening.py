"""How it is started, told to read again and watched over by systemd or something like it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
from typing import Any

from .support import CERTIFICATE, PROGRAM, ROOT, Program, Raw, ServerCase, is_alive, pids_in, trusting, wait_until

ACTIVATE = shutil.which("systemd-socket-activate")


def activate(listener: socket.socket, *arguments: str, count: str = "1", pid: str = "$$") -> list[str]:
    """A command line that starts the program as systemd does: the socket as descriptor 3, the variables set."""
    program = shlex.join([sys.executable, PROGRAM, *arguments])
    return ["sh", "-c", f"LISTEN_FDS={count} LISTEN_PID={pid} exec {program} 3<&{listener.fileno()}"]


class Activation(ServerCase):
    """By a socket that is handed over, as sd_listen_fds(3) has it."""

    def listener(self, path: str = "") -> socket.socket:
        sock = self.enterContext_(contextlib.closing(socket.socket(socket.AF_UNIX if path else socket.AF_INET)))
        sock.bind(path or ("127.0.0.1", 0))
        sock.listen()
        return sock  # type: ignore[no-any-return]

    def start(self, command: list[str], sock: socket.socket) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, pass_fds=[sock.fileno()], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout and process.stderr
        for close in (process.stdout.close, process.stderr.close, process.wait, process.kill):
            self.addCleanup(close)
        return process

    def test_a_socket_that_is_handed_over_is_served_and_survives_the_server(self) -> None:
        for path in ("", str(self.folder / "socket")):
            with self.subTest(path=path):
                sock = self.listener(path)
                early = Raw(sock.getsockname())  # it waits in the queue until somebody serves
                self.addCleanup(early.sock.close)
                early.get("/fds")
                script = "import os; print(sorted(os.listdir('/proc/self/fd'))); print(sorted(os.environ))"
                command = activate(sock, "-p", "1", f'fds={sys.executable} -S -c "{script}"')
                process = self.start(command, sock)
                answer = early.read_answer()
                self.assertTrue(answer.body.startswith(b"['0', '1', '2', '3']\n"), answer)  # 3: the folder itself
                self.assertNotIn(b"LISTEN_", answer.body)
                process.send_signal(signal.SIGTERM)
                self.assertEqual(process.wait(10), 0)
                self.assertTrue(not path or os.path.exists(path))
                Raw(sock.getsockname()).sock.close()  # it still listens

    def test_variables_that_are_for_another_process_are_left_alone(self) -> None:
        sock = self.listener()
        process = self.start(activate(sock, "-p", "0", "x=echo x", pid="1"), sock)
        assert process.stdout
        line = process.stdout.readline()
        self.assertNotIn(f":{sock.getsockname()[1]}\n", line)
        self.assertIn("listening on http://127.0.0.1:", line)

    def test_what_cannot_be_served_is_told(self) -> None:
        datagram = self.enterContext_(contextlib.closing(socket.socket(type=socket.SOCK_DGRAM)))
        datagram.bind(("127.0.0.1", 0))
        deaf = self.enterContext_(contextlib.closing(socket.socket()))
        everywhere = self.enterContext_(contextlib.closing(socket.create_server(("0.0.0.0", 0))))
        cases = [
            (self.listener(), "2", "only one socket from systemd can be used, and there are 2"),
            (datagram, "1", "the socket from systemd must listen"),
            (deaf, "1", "the socket from systemd must listen"),
            (everywhere, "1", "other machines can reach 0.0.0.0"),
        ]
        if sys.platform == "linux":
            abstract = self.listener(f"\0streamlog-test{os.getpid()}")
            cases.append((abstract, "1", "the socket from systemd must listen, and have a port"))
        for sock, count, told in cases:
            with self.subTest(told=told):
                process = self.start(activate(sock, "x=echo x", count=count), sock)
                _, stderr = process.communicate(timeout=10)
                self.assertEqual((process.returncode, stderr.count("\n")), (2, 1), stderr)
                self.assertIn(told, stderr)

    def test_a_socket_that_everybody_may_connect_to_is_warned_of(self) -> None:
        path = self.folder / "socket"
        sock = self.listener(str(path))
        path.chmod(0o666)
        process = self.start(activate(sock, "x=echo x"), sock)
        assert process.stdout and process.stderr
        process.stdout.readline()
        self.assertIn("warning: every user can connect", process.stderr.readline())

    @unittest.skipUnless(ACTIVATE, "systemd-socket-activate is not installed")
    def test_systemd_s_own_tool_starts_it_at_the_first_connection(self) -> None:
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
            port = free.getsockname()[1]
        for address, listen in (
            (("127.0.0.1", port), f"127.0.0.1:{port}"),
            (str(self.folder / "s"), str(self.folder / "s")),
        ):
            with self.subTest(listen=listen):
                command = [str(ACTIVATE), "-l", listen, sys.executable, PROGRAM, "-q", "x=echo x"]
                process = subprocess.Popen(command, stdout=-1, stderr=-1)
                self.addCleanup(process.wait)
                self.addCleanup(process.kill)
                assert process.stdout and process.stderr
                self.addCleanup(process.stdout.close)
                self.addCleanup(process.stderr.close)

                def connect(address: Any = address) -> Any:
                    with contextlib.suppress(OSError):
                        return Raw(address)
                    return None

                with wait_until(connect, "it listens") as client:
                    client.get("/x")
                    self.assertEqual(client.read_answer().body, b"x\n")
                process.terminate()
                self.assertEqual(process.wait(10), 0)


class Notices(ServerCase):
    def test_systemd_is_told_when_it_is_ready_and_when_it_ends(self) -> None:
        names = [str(self.folder / "notify")]
        if sys.platform == "linux":
            names.append(f"\0streamlog-notify{os.getpid()}")
        for name in names:
            with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
                sock.settimeout(10)
                sock.bind(name)
                env = {**os.environ, "NOTIFY_SOCKET": name.replace("\0", "@")}
                with Program("-p", "0", "x=env", env=env) as program:
                    self.assertEqual(sock.recv(100), b"READY=1")
                    self.assertNotIn(b"NOTIFY_SOCKET", program.fetch("/x").body)
                    program.process.terminate()
                    self.assertEqual(sock.recv(100), b"STOPPING=1")

    def test_a_notice_that_nobody_takes_is_no_reason_not_to_serve(self) -> None:
        with Program("-p", "0", "x=echo x", env={**os.environ, "NOTIFY_SOCKET": "/nowhere"}) as program:
            self.assertEqual(program.fetch("/x").body, b"x\n")


class Hangups(ServerCase):
    """SIGHUP, by whether there are a commands file and a terminal."""

    def setUp(self) -> None:
        super().setUp()
        self.config = self.folder / "commands.ini"
        self.write("old")

    def write(self, *names: str) -> None:
        self.config.write_text("".join(f"[{name}]\ncommand = echo {name}\n" for name in names))

    def start(self, *options: str, **how: Any) -> Program:
        """Start it without a terminal, as a service manager does."""
        return self.enterContext_(Program("-p", "0", *options, start_new_session=True, **how))  # type: ignore[no-any-return]

    def status(self, program: Program, path: str) -> int:
        return program.fetch(path).status

    def test_without_a_terminal_it_reads_the_commands_file_again_and_runs_go_on(self) -> None:
        self.config.write_text("[old]\ncommand = !echo $$; read line < /dev/null; sleep 300\n")
        program = self.start("-c", str(self.config), "arg=echo arg")
        with program.connect() as client:
            client.get("/old")
            client.read_head()
            (pid,) = pids_in(client.read_chunk() or b"")
            self.write("new")
            program.process.send_signal(signal.SIGHUP)
            wait_until(lambda: self.status(program, "/new") == 200, "the new command is served")
            self.assertEqual((self.status(program, "/old"), self.status(program, "/arg")), (404, 200))
            self.assertTrue(is_alive(pid))
        program.process.terminate()
        self.assertIn("commands.ini again: 2 commands", program.end()[1])

    def test_a_bad_file_leaves_the_commands_in_force_and_says_why(self) -> None:
        program = self.start("-c", str(self.config))
        assert program.process.stderr
        for text, told in (
            ("[x]\ncommand = echo\nnothing = 1\n", "unknown option 'nothing'"),
            ("[x]\nabout = nothing\n", "'command = ...' is missing"),
            ("", "there is no command in it"),
            ("[x]\ncommand = echo {x:a{99999999999999999999}}\n", "has a bad regular expression"),
            ("[x]\ncommand = echo {x:" + "(" * 3000 + ")" * 3000 + "}\n", "has no closing brace"),
            ("[x]\ncommand = echo\n[x]\ncommand = echo\n", "already exists"),
            (None, "it is no file"),
        ):
            if text is None:
                self.config.unlink()
            else:
                self.config.write_text(text)
            program.process.send_signal(signal.SIGHUP)
            line = program.process.stderr.readline()
            self.assertIn("the commands stay as they were", line)
            self.assertIn(told, line)
            self.assertEqual(self.status(program, "/old"), 200)
            program.process.stderr.readline()  # of the request
        self.write("new")
        program.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.status(program, "/new") == 200, "the file is right again")

    def test_a_file_that_has_become_a_fifo_holds_nothing_up(self) -> None:
        program = self.start("-c", str(self.config))
        self.config.unlink()
        os.mkfifo(self.config)
        program.process.send_signal(signal.SIGHUP)
        self.assertEqual(self.status(program, "/old"), 200)
        program.process.terminate()
        self.assertEqual(program.end()[0], 0)

    def test_hundreds_of_hangups_under_load_lose_no_request(self) -> None:
        program = self.start("-q", "-c", str(self.config))
        for _ in range(200):
            program.process.send_signal(signal.SIGHUP)
            self.assertEqual(self.status(program, "/old"), 200)

    def test_a_signal_that_does_not_interrupt_the_main_thread_is_heeded(self) -> None:
        # As one that arrives just before a poll: here another thread takes it.
        script = f"""if 1:
            import signal, sys, threading
            sys.path.insert(0, {str(ROOT)!r})
            import streamlog
            def send():
                for line in sys.stdin:
                    signal.pthread_kill(threading.get_ident(), getattr(signal, line.strip()))
            threading.Thread(target=send, daemon=True).start()
            sys.exit(streamlog.main(["-p", "0", "-c", {str(self.config)!r}]))
        """
        command = [sys.executable, "-c", script]
        with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True, start_new_session=True) as process:
            assert process.stdin and process.stdout and process.stderr
            timer = threading.Timer(20, process.kill)
            timer.start()
            self.addCleanup(timer.cancel)
            self.assertIn("listening", process.stdout.readline())
            process.stdin.write("SIGHUP\n")
            process.stdin.flush()
            self.assertIn("again: 1 commands", process.stderr.readline())
            self.assertEqual((process.communicate("SIGTERM\n", timeout=10), process.returncode)[1], 0)

    def test_the_certificate_is_read_again_too(self) -> None:
        pem = self.folder / "pem"
        shutil.copy(CERTIFICATE, pem)
        program = self.start("-c", str(self.config), "--tls-cert", str(pem))
        assert program.process.stderr
        pem.write_text("no certificate")
        program.process.send_signal(signal.SIGHUP)
        self.assertIn("the commands stay as they were: cannot use the certificate", program.process.stderr.readline())
        with Raw(("127.0.0.1", program.port), tls=trusting()) as client:
            client.get("/old")
            self.assertEqual(client.read_answer().status, 200)
        program.process.stderr.readline()
        shutil.copy(CERTIFICATE, pem)
        program.process.send_signal(signal.SIGHUP)
        self.assertIn("1 commands", program.process.stderr.readline())

    def test_without_a_commands_file_it_ends_the_server(self) -> None:
        program = self.start("x=echo x")
        program.process.send_signal(signal.SIGHUP)
        self.assertEqual(program.end()[0], 0)

    def test_where_it_was_inherited_as_ignored_it_stays_so_but_for_reading_the_file(self) -> None:
        for options, logged in ((["x=echo old"], False), (["-c", str(self.config)], True)):
            command = ["nohup", sys.executable, PROGRAM, "-p", "0", *options]
            process = subprocess.Popen(
                command, stdin=-3, stdout=-1, stderr=-1, text=True, start_new_session=True, cwd=self.folder
            )
            assert process.stdout and process.stderr
            port = int(process.stdout.readline().rpartition(":")[2])
            process.send_signal(signal.SIGHUP)
            if logged:
                self.assertIn("again: 1 commands", process.stderr.readline())
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.3)
            with Raw(("127.0.0.1", port)) as client:
                client.get("/-/healthy")
                self.assertEqual(client.read_answer().body, b"ok")
            process.terminate()
            process.communicate(timeout=10)
            self.assertEqual(process.returncode, 0)

    def test_at_a_terminal_it_ends_the_server_though_there_is_a_file(self) -> None:
        import pty

        pid, terminal = pty.fork()
        if not pid:
            os.execv(sys.executable, [sys.executable, PROGRAM, "-p", "0", "-c", str(self.config)])
        try:
            said = b""
            while b"curl" not in said:
                said += os.read(terminal, 1000)
            port = int(re.findall(rb":([0-9]+)", said)[0])
            with Raw(("127.0.0.1", port)) as client:
                client.get("/old")
                self.assertEqual(client.read_answer().status, 200)
        finally:
            os.close(terminal)  # which hangs up
        deadline = time.monotonic() + 10
        done = (0, 0)
        while not done[0] and time.monotonic() < deadline:
            done = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)
        self.assertEqual(done, (pid, 0))
