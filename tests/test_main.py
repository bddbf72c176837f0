"""The command line: what it prints, what it refuses, and how the program ends."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import streamlog

from .support import PROGRAM, ROOT, Program, Raw, ServerCase, is_alive, pids_in, run_program, wait_until


def call(*arguments: str) -> tuple[int, str, str]:
    """Call main in this process; its exit code, and what it printed to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = streamlog.main(arguments)
        except SystemExit as error:
            code = int(error.code or 0)
    return code, out.getvalue(), err.getvalue()


# What a shell would act on, and what it would not, or only looks so.
SHELL = (
    "*.log",
    "a?",
    "~",
    "~/x",
    "~root/x",
    "$HOME",
    "${HOME}",
    "$(date)",
    "a;",
    "hi;ls",
    "a&&b",
    ";",
    "`date`",
    "[ab]*",
)
NO_SHELL = (
    r"find . -exec ls -l {} \;",
    "awk '{print $NF}' f",
    "awk '{ x = $1 * 2; print x }' f",
    "sed -e 's/a/b/; s/c/d/' f",
    'grep -E "foo .* $bar" f',
    r"expr 2 \* 3",
    "sh -c 'echo hi; ls'",
    "curl http://e.test/?a=1&b=*",
    "echo {x:[ab]*}",
    "echo a-b=c,d:e@f%g+h",
)


class Mistakes(unittest.TestCase):
    def test_a_mistake_is_one_line_and_exit_code_2_before_anything_listens(self) -> None:
        with tempfile.TemporaryDirectory() as folder, socket.socket() as busy:
            busy.bind(("127.0.0.1", 0))
            busy.listen()
            port = str(busy.getsockname()[1])
            bad = Path(folder, "bad.ini")
            bad.write_text("[x]\ncommand = echo {x:nope}\n")
            binary = Path(folder, "binary.ini")
            binary.write_bytes(b"\xff\xfe")
            for arguments, told in (
                (["--nonsense"], "there is no option --nonsense: see --help"),
                (["--port"], "expected one argument"),
                (["-p", "abc"], "must be a number from 0 to 65535: 'abc'"),
                (["-p", "65536"], "must be a number from 0 to 65535: '65536'"),
                (["--timeout", "-1"], "must be a number of seconds, 0 or more: '-1'"),
                (["--grace", "nan"], "must be a number of seconds, 0 or more: 'nan'"),
                (["--max-runs", "0"], "must be a whole number above 0: '0'"),
                (["--max-runs", "1.5"], "must be a whole number above 0: '1.5'"),
                (["x=echo {y:nope}"], "command 'x': parameter 'y' has an unknown type: 'nope'"),
                (["x=true", "x=false"], "command 'x' is given twice"),
                (["PUT:x=true"], "command 'x': method must be GET or POST: 'PUT'"),
                (["-c", "/nowhere.ini"], "cannot read '/nowhere.ini': No such file"),
                (["-c", folder], "cannot read"),
                (["-c", str(bad)], f"{bad}: command 'x': parameter 'x' has an unknown type"),
                (["-c", str(binary)], f"{binary}: "),
                (["-p", port, "true"], f"cannot listen on 127.0.0.1:{port}: Address already in use"),
                (["-b", "192.0.2.1", "--no-auth", "true"], "cannot listen on 192.0.2.1:8000: "),
                (["-b", "no.such.host.invalid", "true"], "cannot listen on no.such.host.invalid:8000: "),
                (["-b", "a..b", "true"], "cannot listen on a..b:8000: "),
                (["-b", "0.0.0.0", "true"], "--no-auth"),
                (["-c", ""], "cannot read '': No such file"),
            ):
                with self.subTest(arguments=arguments):
                    code, out, err = call(*arguments)
                    self.assertEqual((code, out, err.count("\n")), (2, "", 1))
                    self.assertTrue(err.startswith("streamlog: "))
                    self.assertIn(told, err)

    def test_a_command_line_that_is_not_quoted_is_shown_quoted(self) -> None:
        for arguments, line in (
            (["df", "-h"], "'df -h'"),
            (["tail", "-f", "x y"], "'tail -f x y'"),
            (["disk=df", "-h"], "'disk=df -h'"),
            (["-p", "9000", "ls", "--all"], "'ls --all'"),
            (["uptime", "--help"], "'uptime --help'"),
        ):
            with self.subTest(arguments=arguments):
                code, out, err = call(*arguments)
                self.assertEqual((code, out, err.count("\n")), (2, "", 1))
                self.assertIn("quote the command line, so that it is one argument: ", err)
                self.assertTrue(err.endswith(f"{line}\n"), err)

    def test_other_mistyped_starts_are_asked_about(self) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".ini") as file:
            self.assertIn(f"is not executable: did you mean -c {file.name}?", call(file.name)[2])
        self.assertIn("did you mean --bind?", call("--host", "0.0.0.0")[2])
        self.assertIn("did you mean --bind?", call("df", "--host=0.0.0.0")[2])
        self.assertIn("there is no option --prot: see --help", call("--prot", "80")[2])
        self.assertIn("there is no option --prot: see --help", call("disk=df -h", "--prot", "80")[2])
        for words in (["disk=df -h", "-h"], ["-vh"], ["-hq", "--check"]):
            self.assertIn("usage: streamlog", call(*words)[1])
        with mock.patch.dict(os.environ, {"STREAMLOG_PORT": "tcp://10.0.0.1:80"}):
            self.assertEqual(call("--help")[0], 0)
            self.assertEqual(call("-p", "1", "--check", "x=true")[0], 0)

    def test_each_option_has_a_variable_and_the_option_wins(self) -> None:
        def options(*arguments: str, **variables: str) -> streamlog._Flags:
            with mock.patch.dict(os.environ, variables):
                return streamlog._parse_arguments(arguments)

        given = options(
            STREAMLOG_PORT="9000",
            STREAMLOG_BIND="::1",
            STREAMLOG_MAX_OUTPUT="10K",
            STREAMLOG_NO_AUTH="yes",
            STREAMLOG_QUIET="0",
            STREAMLOG_ALLOW_HOST="a.example b.example",
            STREAMLOG_CONFIG="one.ini",
            STREAMLOG_TERMINAL="132x40",
            STREAMLOG_TIMEOUT="",
        )
        self.assertEqual((given.port, given.bind, given.max_output_bytes), (9000, "::1", 10240))
        self.assertEqual((given.no_auth, given.quiet, given.allow_hosts), (True, False, ["a.example", "b.example"]))
        self.assertEqual((given.config, given.terminal_size, given.timeout_seconds), (["one.ini"], (132, 40), None))
        self.assertEqual(options("-p", "1", STREAMLOG_PORT="9000").port, 1)
        self.assertEqual(options("-c", "two.ini", STREAMLOG_CONFIG="one.ini").config, ["two.ini"])
        for field in dataclasses.fields(streamlog._Flags):
            for name in re.findall("--([a-z-]+)", field.metadata.get("flag", "")):
                variable = f"STREAMLOG_{name.replace('-', '_').upper()}"
                if field.metadata["rule"] is not streamlog._TEXT and field.metadata["rule"] not in (
                    streamlog._FILE,
                    streamlog._FOLDER,
                ):
                    with self.subTest(variable=variable), self.assertRaisesRegex(streamlog.ConfigError, variable):
                        options(**{variable: "not!right"})
        with mock.patch.dict(os.environ, {"STREAMLOG_PORT": "0"}), Program("x=echo [$STREAMLOG_PORT]") as program:
            self.assertEqual(program.fetch("/x").body, b"[$STREAMLOG_PORT]\n")

    def test_the_process_itself_exits_with_2(self) -> None:
        done = run_program("-p", "x")
        self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (2, "", 1))

    def test_what_is_most_likely_a_mistake_is_a_warning(self) -> None:
        for line, told in (
            ("no-such-program", "program not found, or not executable: 'no-such-program'"),
            ("/etc/passwd", "program not found, or not executable: '/etc/passwd'"),
            ("ls | wc", "'|' means nothing without a shell: a leading ! asks for one"),
            ("ls 2>/dev/null", "'2>/dev/null' means nothing without a shell: a leading ! asks for one"),
            ("ls && df", "'&&' means nothing without a shell: a leading ! asks for one"),
            *((f"echo {word}", f"{word!r} means nothing without a shell: a leading ! asks for one") for word in SHELL),
            *((line, "") for line in NO_SHELL),
            ("!ls | wc", ""),
            ("echo {x:a|b}", ""),
        ):
            with self.subTest(line=line):
                code, _, err = call("--check", f"x={line}", "y=true")
                self.assertEqual((code, err), (0, told and f"streamlog: warning: command 'x': {told}\n"))
        with tempfile.NamedTemporaryFile("w", suffix=".ini") as file:
            file.write("[x]\ncommand = true\ncwd = /nowhere\n")
            file.flush()
            self.assertIn("command 'x': no such directory: '/nowhere'", call("--check", "-c", file.name)[2])

    def test_a_foreign_system_is_told_in_one_line_what_is_needed(self) -> None:
        script = (
            "import os, runpy, sys; os.name = 'nt'; sys.argv = ['streamlog.py'];"
            f"runpy.run_path({PROGRAM!r}, run_name='__main__')"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1))
        self.assertIn("POSIX system", done.stderr)
        script = "import os; os.name = 'nt'; import streamlog"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
        self.assertIn("ImportError: streamlog needs", done.stderr)


class Texts(unittest.TestCase):
    def test_help_is_the_manual_and_names_every_option(self) -> None:
        code, out, _ = call("--help")
        manual = re.sub(r"(?s)\n(in a program|for developers):.*?(?=\nusage:|\Z)", "", streamlog.__doc__ or "")
        before, after = manual.split("OPTIONS\n")
        self.assertEqual((code, out[: len(before)], out[-len(after) :]), (0, before, after))
        flags = (field.metadata.get("flag", "") for field in dataclasses.fields(streamlog._Flags))
        known = {"--help", "--version", *(name for flag in flags for name in re.findall(r"--[a-z-]+", flag))}
        usage = out.partition("options:")[2].partition("commands:")[0]
        self.assertEqual(set(re.findall(r"--[a-z-]+", usage)), known)

    def test_version(self) -> None:
        self.assertEqual(call("--version")[:2], (0, f"streamlog {streamlog.__version__}\n"))

    def test_check_prints_the_commands_as_they_were_understood(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "x.ini")
            path.write_text(
                "[go]\ncommand = echo {unit:a|b} {n:int=3}\nabout = Go on\nmethod = POST\ntimeout = 5\n"
                "max = 2\nstderr = discard\ncwd = /\nenv = A=1\ntype = text/csv\n"
            )
            code, out, err = call("--check", "-c", str(path), "disk=df -h")
        self.assertEqual((code, err), (0, ""))
        self.assertEqual(
            out,
            f"POST /go  echo {{unit:a|b}} {{n:int=3}}\n     about: Go on\n     program: {shutil.which('echo')}\n"
            "     parameter unit: a|b, required\n     parameter n: int, default '3'\n     timeout: 5.0\n     max: 2\n"
            "     stderr: discard\n     cwd: /\n     type: text/csv\n     env: A=1\n"
            f"GET  /disk  df -h\n     program: {shutil.which('df')}\n",
        )

    def test_a_terminal_that_cannot_show_a_character_gets_it_escaped(self) -> None:
        done = run_program("--check", "x=echo é", env={**os.environ, "PYTHONIOENCODING": "ascii"})
        self.assertEqual((done.returncode, done.stdout.splitlines()[0]), (0, "GET  /x  echo \\xe9"))

    def test_check_without_commands_shows_this_machine_s_diagnostics(self) -> None:
        code, out, _ = call("--check")
        self.assertEqual(code, 0)
        self.assertIn("GET  /disk  df -h", out)


class Serving(ServerCase):
    def test_at_start_it_prints_its_address_and_a_line_for_each_command(self) -> None:
        with Program("-p", "0", "a=echo {x}", "POST:b=true") as program:
            assert program.process.stdout
            url = f"http://127.0.0.1:{program.port}"
            self.assertEqual(program.first_line, f"streamlog: listening on {url}\n")
            self.assertEqual(program.process.stdout.readline(), f"curl -N '{url}/a?x=X'\n")
            self.assertEqual(program.process.stdout.readline(), f"curl -N -X POST {url}/b\n")

    def test_quiet_prints_the_address_alone_and_logs_no_requests(self) -> None:
        with Program("-q", "-p", "0", "x=echo x") as program:
            self.assertEqual(program.fetch("/x").body, b"x\n")
            program.process.terminate()
            out, err = program.process.communicate(timeout=10)
        self.assertEqual((program.first_line, out, err), (f"http://127.0.0.1:{program.port}\n", "", ""))

    def test_verbose_logs_the_start_of_a_command_too(self) -> None:
        with Program("-v", "-p", "0", "x=echo a b") as program:
            program.fetch("/x")
            program.process.terminate()
            code, err = program.end()
        self.assertEqual(code, 0)
        self.assertRegex(
            err, r"(?m)^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} started x as process group \d+: echo a b \{\}$"
        )
        self.assertRegex(err, r'(?m)^\S+ client=127\.0\.0\.1:\d+ request="GET /x HTTP/1.1" status=200 exit=0 bytes=4 ')

    def test_options_reach_the_runs(self) -> None:
        with Program("-p", "0", "--timeout", "0.2", "--max-runs", "1", "x=sleep 300") as program:
            self.assertIn(b"[stopped: timeout after 0.2 s", program.fetch("/x").body)

    def test_the_config_file_is_served_together_with_the_arguments(self) -> None:
        path = self.folder / "commands.ini"
        path.write_text("[a]\ncommand = echo from file\n")
        with Program("-p", "0", "-c", str(path), "b=echo from line") as program:
            self.assertEqual((program.fetch("/a").body, program.fetch("/b").body), (b"from file\n", b"from line\n"))

    def test_it_serves_where_nobody_reads_what_it_prints(self) -> None:
        with Program("-p", "0", "x=echo x") as program:
            assert program.process.stdout
            program.process.stdout.close()
            self.assertEqual(program.fetch("/x").body, b"x\n")
            program.process.stdout = None
            program.process.terminate()
            self.assertEqual(program.end()[0], 0)

    def test_this_machine_s_diagnostics_are_served_when_no_command_is_given(self) -> None:
        with Program("-p", "0") as program:
            self.assertIn(b"/disk\n", program.fetch("/").body)
            self.assertIn(b"ilesystem", program.fetch("/disk").body)
            with program.connect() as client:  # a live one
                started = time.monotonic()
                client.get("/load")
                client.read_head()
                text = b""
                while text.count(b"\n") < 2:
                    text += client.read_chunk() or b""
                self.assertRegex(text, rb"^(\d\d:\d\d:\d\d( \d+\.\d\d){3}\n){2,}$")
                self.assertTrue(0.5 < time.monotonic() - started < 10)

    @unittest.skipUnless(sys.platform == "linux", "prlimit is of Linux")
    def test_the_descriptor_limit_is_raised_for_the_server_and_not_for_commands(self) -> None:
        def lower() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096))

        gate = self.make_gate()
        with Program("-p", "0", f"x=!read _ <> {gate}; ulimit -n", preexec_fn=lower) as program:
            limits = Path(f"/proc/{program.process.pid}/limits").read_text()
            self.assertRegex(limits, r"Max open files +4096 +4096")
            with program.connect() as client:
                client.get("/x")
                client.read_head()
                gate.write_text("\n")
                self.assertEqual(client.read_chunk(), b"256\n")

    def test_a_limit_that_cannot_be_raised_is_left(self) -> None:
        with mock.patch("resource.getrlimit", return_value=(256, resource.RLIM_INFINITY)):
            with mock.patch("resource.setrlimit", side_effect=ValueError):
                self.assertIsNone(streamlog._raise_descriptor_limit())
        with mock.patch("resource.getrlimit", return_value=(resource.RLIM_INFINITY, resource.RLIM_INFINITY)):
            self.assertIsNone(streamlog._raise_descriptor_limit())


class Endings(ServerCase):
    STUB = "stub=!trap '' TERM; echo $$; while :; do sleep 0.05; done"

    def start_stub(self, program: Program) -> tuple[Raw, int]:
        client = program.connect()
        self.addCleanup(client.sock.close)
        client.get("/stub")
        client.read_head()
        return client, next(pids_in(client.read_chunk() or b""))

    def test_a_signal_ends_it_with_0_within_the_grace_time_and_a_second_and_nothing_is_left(self) -> None:
        seconds = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with self.subTest(number=number), Program("-p", "0", "--grace", "0.5", self.STUB) as program:
                client, pid = self.start_stub(program)
                started = time.monotonic()
                program.process.send_signal(number)
                code, err = program.end()
                seconds.append(time.monotonic() - started)
                self.assertEqual(code, 0)
                self.assertNotIn("Traceback", err)
                self.assertIn('end="the server is shutting down"', err)
                self.assertFalse(is_alive(pid))
                self.assertIn(b"[stopped: the server is shutting down", client.read_until(b" s]\n"))
        self.assertLess(sorted(seconds)[1], 0.5 + 1)  # the middle one: the machine may hold up another

    def test_a_second_signal_kills_all_groups_at_once(self) -> None:
        with Program("-p", "0", "--grace", "60", self.STUB) as program:
            client, pid = self.start_stub(program)
            program.process.send_signal(signal.SIGTERM)
            with self.assertRaises(ConnectionError):
                while True:  # until it no longer accepts
                    program.connect().sock.close()
            started = time.monotonic()
            program.process.send_signal(signal.SIGINT)
            code, err = program.end()
            self.assertLess(time.monotonic() - started, 10)
            self.assertEqual((code, is_alive(pid)), (0, False))
            self.assertNotIn("Traceback", err)
            self.assertIn("closing: 1 runs are asked to end, and killed after 60 s", err)
            self.assertIn("exit=137", err)
            self.assertIn(b"[stopped: the server is shutting down", client.read_until(b" s]\n"))

    def test_signals_at_random_moments_always_end_it(self) -> None:
        for delay in (0.0, 0.0, 0.0, 0.01, 0.03):
            with Program("-p", "0", self.STUB) as program:
                time.sleep(delay)
                program.process.send_signal(signal.SIGTERM)
                program.process.send_signal(signal.SIGTERM)
                code, err = program.end()
                self.assertEqual(code, 0, err)
                self.assertNotIn("Traceback", err)

    def test_commands_can_be_ended_though_the_server_was_started_with_signals_ignored(self) -> None:
        ignore = (
            "import os, signal, sys\nfor n in (1, 2, 15): signal.signal(n, 1)\nsignal.pthread_sigmask(0, [2, 15])\n"
        )
        command = [PROGRAM, "-p", "0", "x=grep -E Sig(Ign|Blk) /proc/self/status", "false"]
        script = f"{ignore}os.execv(sys.executable, [sys.executable, *{command!r}])"
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout
        port = int(process.stdout.readline().rpartition(":")[2])
        with Raw(("127.0.0.1", port)) as client:
            client.get("/x")
            masks = dict(re.findall(r"(Sig\w+):\s*(\w+)", client.read_answer().body.decode()))
        self.assertEqual(int(masks["SigBlk"], 16) & (1 << 14 | 1 << 1), 0)
        self.assertEqual(int(masks["SigIgn"], 16) & (1 << 14 | 1 << 1 | 1), 1)  # HUP stays ignored, for nohup
        process.send_signal(signal.SIGHUP)
        with Raw(("127.0.0.1", port)) as client:
            client.get("/false")  # its exit code would be lost with SIGCHLD ignored
            self.assertEqual(client.read_answer().trailers, {"Exit-Code": "1"})
        process.terminate()
        process.communicate(timeout=10)
        self.assertEqual(process.returncode, 0)

    def test_started_from_standard_input_it_ends_with_the_reader_of_its_stderr(self) -> None:
        reader, writer = os.pipe()
        with open(PROGRAM, "rb") as source:
            process = subprocess.Popen(
                [sys.executable, "-", "-p", "0", "x=!echo $$; sleep 300"],
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=writer,
                cwd=self.folder,
            )
        os.close(writer)
        assert process.stdout
        with process.stdout:
            port = int(process.stdout.readline().rpartition(b":")[2])
            with Raw(("127.0.0.1", port)) as client:
                client.get("/x")
                client.read_head()
                (pid,) = pids_in(client.read_chunk() or b"")
                os.close(reader)
                self.assertEqual(process.wait(10), 0)
                self.assertFalse(is_alive(pid))

    def test_killed_itself_it_leaves_its_port_free_and_commands_that_write_end_too(self) -> None:
        with Program("-p", "0", "x=!echo $$; exec yes") as program, program.connect() as client:
            client.get("/x")
            client.read_head()
            (pid,) = list(pids_in(client.read_chunk() or b""))[:1]
            program.process.kill()
            wait_until(lambda: not is_alive(pid), "yes dies by SIGPIPE")
            program.process.wait()
        with Program("-p", str(program.port), "x=echo x") as again:
            self.assertEqual(again.fetch("/x").body, b"x\n")
