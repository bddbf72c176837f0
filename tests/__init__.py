"""The tests. `python -m unittest` runs them in a few processes at once, as most of them wait most of the time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Optional

from .support import SOAK

# The modules that run beside all others, each line in a process of its own; each takes about as long.
BESIDE = [
    {"browser", "deployment", "promises", "readme", "wsgi"},
    {"faults", "listening", "main", "server"},
    {"access", "chaos", "embedding", "insight", "kept", "runs"},
]
# The classes that measure how a server does under an attack: they come last, when those have ended.
ALONE = {"attacks.Attacks", "server.Load"}


def load_tests(loader: unittest.TestLoader, _: unittest.TestSuite, pattern: Optional[str]) -> unittest.TestSuite:
    """Called by unittest when it looks for all tests."""
    here, alone = unittest.TestSuite(), unittest.TestSuite()
    groups = [] if SOAK >= 1000 else BESIDE  # the full sizes keep a machine busy by themselves
    beside: list[list[str]] = [[] for _ in groups]
    place = {module: names for names, modules in zip(beside, groups) for module in modules}
    for test in each(loader.discover(os.path.dirname(__file__), pattern or "test*.py")):
        name = f"{type(test).__module__}.{type(test).__name__}".rpartition("test_")[2]
        module = name.partition(".")[0]
        if name in ALONE:
            alone.addTest(test)
        elif module in place:
            place[module].append(test.id())
        else:
            here.addTest(test)
    return unittest.TestSuite([Processes(here, list(filter(None, beside))), alone])


def each(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from each(test)
        else:
            yield test


class Processes(unittest.TestSuite):
    """Tests, and the names of those that other processes run meanwhile."""

    def __init__(self, here: unittest.TestSuite, beside: list[list[str]]) -> None:
        super().__init__(here)
        self.beside = beside

    def countTestCases(self) -> int:
        return super().countTestCases() + sum(map(len, self.beside))

    def run(self, result: unittest.TestResult, debug: bool = False) -> unittest.TestResult:
        with ExitStack() as stack:
            started = []
            for names in self.beside:
                file = stack.enter_context(tempfile.TemporaryFile("w+"))
                command = [sys.executable, "-m", "unittest", *names]
                process = stack.enter_context(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
                stack.callback(process.kill)
                started.append((process, file))
            super().run(result, debug)
            for process, file in started:
                process.wait(900)
                file.seek(0)
                add_outcome(result, process.returncode, file.read())
        return result


def add_outcome(result: unittest.TestResult, exit_code: int, said: str) -> None:
    """Add what another process says of its tests."""

    def end() -> None:
        if exit_code:
            raise AssertionError(f"another process, exit code {exit_code}:\n{said}")

    def number(pattern: str) -> int:
        found = re.search(pattern, said, re.MULTILINE)
        return int(found[1]) if found else 0

    outcome = unittest.FunctionTestCase(end, description="another process")
    outcome.run(result)
    result.testsRun += number(r"^Ran (\d+) tests?") - 1
    result.skipped += [(outcome, "in another process")] * number(r"skipped=(\d+)")
