"""The README says what the program does: its blocks are compared with it, and its examples are run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import streamlog

from . import test_browser
from .support import ROOT, Program

README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", README)


@unittest.skipUnless(README, "an installed copy has no README")
class Readme(unittest.TestCase):
    def test_the_usage_is_the_help(self) -> None:
        done = subprocess.run([sys.executable, ROOT / "streamlog.py", "--help"], stdout=subprocess.PIPE, text=True)
        self.assertIn(done.stdout, blocks("text"))

    def test_the_commands_file_is_sound_and_each_option_in_it_is_known(self) -> None:
        text = blocks("ini")[0]
        with tempfile.NamedTemporaryFile("w", suffix=".ini") as file:
            file.write(text)
            file.flush()
            done = subprocess.run(
                [sys.executable, ROOT / "streamlog.py", "--check", "-c", file.name], stdout=subprocess.PIPE, text=True
            )
        self.assertEqual(done.returncode, 0)
        self.assertIn("POST /restart", done.stdout)

    @unittest.skipUnless(shutil.which("curl"), "curl is not installed")
    def test_the_line_that_puts_the_exit_code_into_a_variable_works(self) -> None:
        (line,) = [line for line in README.splitlines() if line.strip().startswith("code=$(curl")]
        with Program("-p", "0", "disk=!echo out; exit 3") as program, tempfile.TemporaryDirectory() as folder:
            script = f"{line.strip().replace('8000', str(program.port))}; echo $code"
            done = subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, cwd=folder)
            self.assertEqual(done.stdout, b"3\n")
            self.assertEqual((Path(folder) / "out").read_bytes(), b"out\n")
            url = f"localhost:{program.port}/disk?wait"
            for path in (url, f"localhost:{program.port}/{program.fetch('/disk?async=1').headers['location']}?wait"):
                done = subprocess.run(["curl", "-sS", "--fail-with-body", path], capture_output=True)
                self.assertEqual((done.returncode, done.stdout), (22, b"out\n"))

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

    def shown(self, path: str) -> str:
        """What the README shows as the answer to a curl of a path."""
        found = re.search(rf"(?m)^\$ curl [^\n]*{re.escape(path)}'?\n([^$`\n].*\n)", README)
        self.assertIsNotNone(found, path)
        return found[1] if found else ""

    def test_the_examples_for_programs_do_what_is_said_of_them(self) -> None:
        inside, streaming, looping, *_ = blocks("python")
        fetch = "import urllib.request as u; print(u.urlopen(server.url + '/reindex?parts=1').read().decode())"
        done = subprocess.run(
            [sys.executable, "-c", inside.replace("...  # the program goes on", fetch)],
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

    def test_each_test_that_it_names_is_there(self) -> None:
        named = re.findall(r"`(test_\w+)(?:\.(\w+))?`(?: ([0-9]))?", README)
        self.assertGreater(len(named), 15)
        for module, class_, number in named:
            path = Path(__file__).with_name(f"{module}.py")
            if class_ == "py":  # a path, as of a file to look at
                continue
            self.assertTrue(path.exists(), module)
            wanted = f"class {class_}(" if class_ else f"def test_{number}_" if number else "class "
            self.assertIn(wanted, path.read_text(), module)
