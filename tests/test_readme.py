"""The README says what the program does: its blocks are compared with it, and its examples are run."""

from __future__ import annotations

import json
import logging
import os
import re
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

import streamlog

from . import test_browser
from .support import PROGRAM, ROOT, Program, run_program

README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", README)


def recipes() -> dict[str, str]:
    """The recipes, by their titles."""
    part = README.partition("## Recipes")[2].partition("\n## ")[0]
    return dict(re.findall(r"(?ms)^### (.*?)\n(.*?)(?=^### |\Z)", part))


@unittest.skipUnless(README, "an installed copy has no README")
class Readme(unittest.TestCase):
    def test_the_usage_is_the_help(self) -> None:
        done = subprocess.run([sys.executable, ROOT / "streamlog.py", "--help"], stdout=subprocess.PIPE, text=True)
        self.assertIn(done.stdout, blocks("text"))

    def test_the_commands_file_is_sound_and_each_option_in_it_is_known(self) -> None:
        text = "\n".join(block for block in blocks("ini") if "command = " in block and "ExecStart" not in block)
        with tempfile.NamedTemporaryFile("w", suffix=".ini") as file:
            file.write(text)
            file.flush()
            done = subprocess.run(
                [sys.executable, ROOT / "streamlog.py", "--check", "-c", file.name], stdout=subprocess.PIPE, text=True
            )
        self.assertEqual(done.returncode, 0)
        self.assertEqual(done.stdout.count("\nPOST /"), 3)

    def test_the_thirty_second_start_gives_what_it_shows(self) -> None:
        line, listening, *ready = blocks("console")[0].splitlines()
        words = shlex.split(line)
        self.assertEqual(words[:3], ["$", "python", "streamlog.py"])
        with Program("-p", "0", *words[3:]) as program:
            assert program.process.stdout
            for shown in [listening, *ready]:
                printed = program.first_line if shown == listening else program.process.stdout.readline()
                self.assertEqual(printed, shown.replace(":8000", f":{program.port}") + "\n")
            for path in ("greet?name=-n", "dist"):
                self.assertEqual(program.fetch(f"/{path}").body.decode(), self.shown(path))
            self.assertEqual(program.fetch("/greet").body, b"hello world\n")
            self.assertIn(f"{self.shown('disk').split()[0]} ", program.fetch("/disk").body.decode())
            with program.connect() as client, open("/etc/hosts", "rb") as file:
                client.get("/hosts?lines=1")
                client.read_until(file.read().splitlines(keepends=True)[-1])

    def shown(self, path: str) -> str:
        """What the README shows as the answer to a curl of a path."""
        found = re.search(rf"(?m)^\$ curl [^\n]*{re.escape(path)}'?\n([^$`\n].*\n)", README)
        self.assertIsNotNone(found, path)
        return found[1] if found else ""

    def test_the_examples_for_programs_do_what_is_said_of_them(self) -> None:
        inside, streaming, looping = (
            next(block for block in blocks("python") if mark in block) for mark in ("reindex", "count=2", "async for")
        )
        inside = inside.replace("reindex})", "reindex}, port=0)")
        fetch = "import urllib.request as u; print(u.urlopen(server.url + '/reindex?parts=1').read().decode())"
        done = subprocess.run(
            [sys.executable, "-c", re.sub(r"input\(.*", lambda _: fetch, inside)],
            cwd=ROOT,
            stdout=-1,
            text=True,
            stderr=-1,
        )
        self.assertRegex(done.stdout, r"^http://127.0.0.1:\d+\nWARNING root: part 0, quick\n1 of 1 done\n")
        done = subprocess.run([sys.executable, "-c", looping], cwd=ROOT, stdout=-1, text=True)
        self.assertEqual(done.stdout, "1\n2\n3\n")
        if shutil.which("ping"):
            done = subprocess.run([sys.executable, "-c", streaming], cwd=ROOT, stdout=-1, text=True)
            self.assertRegex(done.stdout, r"(?s)2 packets transmitted.*exit code 0\n$")

    @unittest.skipUnless(shutil.which("curl"), "curl is not installed")
    def test_a_program_shows_its_log_its_stacks_and_its_levels(self) -> None:
        lines = next(block for block in blocks("console") if "/stacks" in block).replace("$ ", "").splitlines()
        with streamlog.start({}, port=0) as server:
            log, *others = (["timeout", "10", *shlex.split(line, comments=True), "-sS"] for line in lines)
            for command, expected in zip(others, ("main", "root")):
                shown = [word.replace("8000", str(server.port)) for word in command]
                self.assertIn(expected, subprocess.run(shown, stdout=subprocess.PIPE, text=True).stdout.lower())
            command = [word.replace("8000", str(server.port)) for word in log]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
                assert curl.stdout
                self.addCleanup(curl.kill)
                logger = logging.getLogger("app.test")
                logger.setLevel("INFO")
                self.addCleanup(logger.setLevel, logging.NOTSET)
                deadline = time.monotonic() + 10
                while not select.select([curl.stdout], [], [], 0.1)[0] and time.monotonic() < deadline:
                    logger.info("here")  # until curl watches
                self.assertRegex(curl.stdout.readline(), "INFO.*here")
                curl.terminate()

    def test_short_help_fits_a_screen_and_has_three_examples(self) -> None:
        short = run_program("-h").stdout
        self.assertLessEqual(short.count("\n"), 50)
        self.assertTrue(run_program("--help").stdout.startswith(short.rstrip("\n")))
        self.assertEqual(len(re.findall(r"(?m)^  (python|curl) ", short)), 3)

    @unittest.skipUnless(shutil.which("curl") and shutil.which("openssl"), "curl or openssl is not installed")
    def test_a_token_and_a_certificate_are_made_and_used_as_it_says(self) -> None:
        script = next(block for block in blocks("sh") if "openssl req" in block)
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        script = script.replace("python streamlog.py", f"{sys.executable} {PROGRAM} -q -p {port}").replace(
            "8000", str(port)
        )
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                ["sh", "-c", f"{script}code=$?; kill $!; exit $code"],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=30,
            )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("Filesystem", done.stdout)

    def test_the_page_with_an_eventsource_is_the_one_that_is_tested(self) -> None:
        self.assertEqual(blocks("html"), [test_browser.Events.PAGE])

    def test_each_limit_has_the_number_that_it_is_given(self) -> None:
        for number, value in (
            ("16 KiB", streamlog._LINE_BYTES / 1024),
            ("64 KiB", streamlog._HEAD_BYTES / 1024),
            ("64 KiB", streamlog._FORM_BYTES / 1024),
            ("64 KiB", streamlog._VALUE_BYTES / 1024),
            ("100 headers", streamlog._HEADER_COUNT),
            ("10 s", streamlog.Settings().head_seconds),
            ("60 s", streamlog.Settings().idle_seconds),
            ("30 s", streamlog._BODY_SECONDS),
            ("64 runs", streamlog.Settings().max_runs),
            ("2 s", streamlog.Settings().drain_seconds),
            ("512 KiB", streamlog._BLOCK_MAX_BYTES / 1024),
        ):
            with self.subTest(number=number):
                self.assertEqual(float(number.split()[0]), value)
                self.assertIn(number, README)

    def test_each_promise_of_security_has_its_tests(self) -> None:
        part = README.partition("## Security")[2].partition("\n## ")[0]
        self.assertEqual([text.rstrip(".:") for text in re.findall(r"(?m)^- \*\*(.*?)\*\*", part)], list(PROMISES))
        for names in PROMISES.values():
            for name in names.split():
                module, _, class_ = name.partition(".")
                self.assertIn(f"class {class_}(", Path(__file__).with_name(f"{module}.py").read_text(), name)


# What README says of security, and where it is tested.
PROMISES = {
    "Only this machine can connect": "test_access.Options test_transports.Unix",
    "Only your commands run": "test_commands.Placeholders test_fuzz.Parameters",
    "The token": "test_access.Tokens test_access.ReadToken test_browser.Tokens",
    "No other site's page can use it": "test_access.Headers test_browser.Events",
    "DNS rebinding fails": "test_access.Headers",
    "Requests are read strictly": "test_requests.Heads test_server.Forms test_fuzz.Heads",
    "Command output cannot inject scripts": "test_browser.LivePage test_formats.HtmlFormat test_server.Log",
    "It stays up": "test_attacks.Attacks test_server.Shortages",
}


# Programs that not every machine has, or that would change it.
STAND_INS = {
    "systemctl": 'echo "$@"',
    "docker": "printf '%s\\n' \"$*\"",
    "git": 'echo "git $*"',
    "make": 'echo "make $*"',
    "logger": 'echo "$*"',
    "ssh": 'shift 3; exec "$@"',
}


@unittest.skipUnless(README and shutil.which("curl"), "an installed copy has no README, and curl is needed")
class Recipes(unittest.TestCase):
    """Each recipe is run as it is written, but for the port and for folders that a machine may not have."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        (self.folder / "bin").mkdir()
        for name, script in STAND_INS.items():
            (self.folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
            (self.folder / "bin" / name).chmod(0o755)
        self.path = f"{self.folder}/bin:{os.environ['PATH']}"

    def local(self, text: str) -> str:
        """A text of the README with folders of the test."""
        for place in ("/srv/app", "/srv/backup", "/usr/local/bin", "/var/log"):
            text = text.replace(place, str(self.folder))
        return text

    def serve(self, title: str) -> Program:
        """A server with the commands of a recipe."""
        config = self.folder / "commands.ini"
        config.write_text(self.local("\n".join(re.findall(r"(?ms)^```ini\n(.*?)^```$", recipes()[title]))))
        program = Program("-p", "0", "-c", str(config), env={**os.environ, "PATH": self.path})
        self.addCleanup(program.__exit__)
        return program

    def run_lines(self, title: str, port: int, seconds: float = 20) -> list[tuple[int, str]]:
        """The exit codes and the outputs of the lines of a recipe, which share their variables."""
        (script,) = re.findall(r"(?ms)^```sh\n(.*?)^```$", recipes()[title])
        env = {**os.environ, "PATH": self.path}
        told: list[tuple[int, str]] = []
        lines = [line for line in script.replace("8000", str(port)).splitlines() if line]
        mark = "printf '\\n%s\\036' $?"
        marked = "".join(
            f"trap {shlex.quote(mark)} EXIT; {line}\n" if "exit " in line[:5] else f"{line}\n{mark}\n" for line in lines
        )
        done = subprocess.run(
            ["sh", "-c", marked],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=self.folder,
            env=env,
            timeout=seconds,
        )
        for part in done.stdout.split("\036")[:-1]:
            output, _, code = part.rpartition("\n")
            told.append((int(code), output.lstrip("\n") if told else output))
        self.assertEqual(len(told), len(lines))
        return told

    def test_a_log_is_chosen_from_a_list(self) -> None:
        (self.folder / "dpkg.log").write_text("one\n")
        program = self.serve("Follow a log chosen from a list")
        path = recipes()["Follow a log chosen from a list"].partition("localhost:8000")[2].partition("'")[0]
        with program.connect() as client:
            client.get(path)
            self.assertIn(b"one\n", client.read_until(b"one\n"))
            with (self.folder / "dpkg.log").open("a") as file:
                file.write("two\n")
            client.read_until(b"two\n")
        self.assertEqual(program.fetch("/logs?file=shadow").status, 400)

    def test_a_service_is_restarted_by_post(self) -> None:
        program = self.serve("Restart a service")
        self.assertEqual(self.run_lines("Restart a service", program.port), [(0, "restart nginx\n")])
        self.assertEqual(program.fetch("/restart?unit=nginx").status, 405)

    def test_containers_are_listed_followed_and_restarted(self) -> None:
        program = self.serve("Look after containers")
        told = self.run_lines("Look after containers", program.port)
        shown = "ps --format table {{.Names}}\\t{{.Status}}\n"
        self.assertEqual(told, [(0, shown), (0, "logs --tail 100 -f web\n"), (0, "restart web\n")])

    def test_a_deployment_tells_how_it_ended(self) -> None:
        program = self.serve("Deploy from CI")
        ((code, output),) = self.run_lines("Deploy from CI", program.port)
        self.assertEqual((code, output), (0, "git fetch\ngit checkout v1.2\nmake install\n"))
        (self.folder / "bin" / "make").write_text("#!/bin/sh\necho failed; exit 2\n")
        ((code, output),) = self.run_lines("Deploy from CI", program.port)
        self.assertEqual((code, output), (22, "git fetch\ngit checkout v1.2\nfailed\n"))

    def test_a_webhook_is_answered_at_once_and_its_script_gets_the_json(self) -> None:
        (self.folder / "on-alert.py").write_text("import sys, time; time.sleep(0.5); print(repr(sys.stdin.read()))")
        program = self.serve("Run a script for a webhook")
        ((code, output),) = self.run_lines("Run a script for a webhook", program.port)
        self.assertEqual(code, 0)
        path = output[output.index("/-/runs/") :].strip()
        self.assertEqual(program.fetch(f"{path}?wait").body, b'\'{"status": "firing"}\'\n')

    def test_metrics_are_of_the_type_that_prometheus_wants(self) -> None:
        title = "Serve a script's output as Prometheus metrics"
        program = self.serve(title)
        self.assertIn("root_used_percent", self.run_lines(title, program.port)[0][1])
        answer = program.fetch("/metrics")
        self.assertEqual(answer.headers["content-type"], "text/plain; version=0.0.4")
        self.assertRegex(answer.body, rb"^# TYPE root_used_percent gauge\nroot_used_percent \d+\n$")

    def test_a_file_is_converted(self) -> None:
        (self.folder / "notes.txt").write_bytes("é\n".encode("latin-1"))
        program = self.serve("Convert a file")
        self.assertEqual(self.run_lines("Convert a file", program.port), [(0, "")])
        self.assertEqual((self.folder / "notes-utf8.txt").read_text(encoding="utf-8"), "é\n")

    def test_a_backup_is_whole(self) -> None:
        program = self.serve("Back up to your own disk")
        told = self.run_lines("Back up to your own disk", program.port)
        self.assertEqual([(code, output.strip().lower()) for code, output in told], [(0, ""), (0, "exit-code: 0")])
        listed = subprocess.run(["tar", "tzf", self.folder / "etc.tar.gz"], stdout=subprocess.PIPE, text=True)
        self.assertIn("./passwd\n", listed.stdout)

    def test_a_long_job_is_left_and_come_back_to(self) -> None:
        title = "Start a long job, leave, and come back"
        program = self.serve(title)
        told = self.run_lines(title, program.port)
        steps = "step 1\nstep 2\nstep 3\n"
        self.assertEqual([output for _, output in told[:3]], ["", steps, steps])
        self.assertEqual([code for code, _ in told], [0] * 5 + [3])
        self.assertEqual((self.folder / "build.log").read_text(), steps)
        self.assertIn('"exit_code": 3', told[4][1])

    def test_a_build_is_shared(self) -> None:
        script = re.findall(r"(?ms)^```sh\n(.*?)^```$", recipes()["Share one build"])[0]
        self.assertEqual(script, "make 2>&1 | python streamlog.py -\n")
        reader, writer = os.pipe()
        with open(writer, "w") as build, Program("-p", "0", "-", stdin=reader) as program:
            os.close(reader)
            build.write("one\n")
            build.flush()
            for _ in range(2):
                with program.connect() as client:
                    client.get("/stdin")
                    self.assertIn(b"one\n", client.read_until(b"one\n"))

    def test_a_note_is_one_argument_whatever_is_in_it(self) -> None:
        config = self.folder / "commands.ini"
        config.write_text(next(block for block in blocks("ini") if block.startswith("[note]")))
        with Program("-p", "0", "-c", str(config), env={**os.environ, "PATH": self.path}) as program:
            self.assertEqual(program.fetch("/note?msg=$(id)%20%22x").body, b'-t web -- $(id) "x\n')

    def test_another_machine_is_looked_at_without_a_copy(self) -> None:
        (line,) = (block for block in blocks("sh") if block.startswith("ssh "))
        line = line.replace("python3 - -p 8000", f"{sys.executable} -u - -p 0").replace(
            "< streamlog.py", f"< {PROGRAM}"
        )
        with subprocess.Popen(
            ["sh", "-c", f"exec {line}"],
            env={**os.environ, "PATH": self.path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            self.addCleanup(process.kill)
            assert process.stdout
            self.assertIn("listening on http://127.0.0.1:", process.stdout.readline())
            process.terminate()

    def test_the_command_of_the_container_starts(self) -> None:
        text = recipes()["Run it in a container"]
        (words,) = re.findall(r"(?m)^CMD (\[.*\])$", text)
        (self.folder / "commands.ini").write_text("[x]\ncommand = echo x\n")
        (self.folder / "token").write_text("0123456789abcdef")
        (self.folder / "token").chmod(0o600)
        program, *arguments = json.loads(words)[1:]
        self.assertEqual(program, "/streamlog.py")
        given = [word.replace("/commands.ini", f"{self.folder}/commands.ini") for word in arguments]
        given = [word.replace("/run/secrets/token", f"{self.folder}/token") for word in given]
        self.assertEqual(self.run_lines("Run it in a container", 8000)[0], (0, "build -t image .\n"))
        with Program("-p", "0", *given) as server, server.connect() as client:
            client.get("/x", headers=["Authorization: Bearer 0123456789abcdef"])
            self.assertEqual(client.read_answer().body, b"x\n")
