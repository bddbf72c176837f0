"""Run by test_runs as process 1 of a namespace, where every orphan becomes a child of ours."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from streamlog import Command, Process, Settings

SCRIPTS = (
    "!(sleep 5; exit 1) >/dev/null 2>&1 & echo; exit 4",
    "!sleep 5 & (sleep 5; sleep 5) & echo x; exit 4",
    "!trap '' TERM; sleep 5 & exit 4",
)


def main(count: int) -> None:
    settings = Settings(grace_seconds=0.05, drain_seconds=0.02)
    for number in range(count):
        run = Process(Command(SCRIPTS[number % len(SCRIPTS)]).bind("x", {}), settings, None, lambda: None)  # type: ignore[arg-type]
        while not run.is_over:
            for descriptor in run.wait({}):
                run.read(descriptor)
        run.close()
        assert run.exit_code == 4, run.exit_code
    left = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.parent.name) != os.getpid():
                left.append(path.read_text())
    print(len(left), "left", *left)


if __name__ == "__main__":
    main(int(sys.argv[1]))
