"""Run by test_runs in a namespace of its own, where the number of the next process can be set.

Again and again a run's leader ends and its group is killed unseen; a stranger is given the number, and whatever could
still signal the group is called.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

from streamlog import Command, Process, Settings


def set_next_pid(pid: int) -> None:
    with open("/proc/sys/kernel/ns_last_pid", "w", encoding="ascii") as file:
        file.write(str(pid - 1))


def leave_group() -> Process:
    """A run whose leader is reaped, and which does not know that the rest of its group has gone."""
    script = "!(trap '' TERM; sleep 300) >/dev/null 2>&1 & sleep 0.01"
    run = Process(Command(script).bind("x", {}), Settings(grace_seconds=60), None, lambda: None)  # type: ignore[arg-type]
    while not run.is_over:
        for descriptor in run.wait({}).keys() & run.outputs.keys():
            run.read(descriptor)
    os.killpg(run.pid, 9)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-run.pid, 0)  # orphans come to us
    return run


def main(count: int) -> None:
    survived = 0
    while survived < count:
        run = leave_group()
        set_next_pid(run.pid)
        stranger = subprocess.Popen(["sleep", "300"], start_new_session=True)
        if stranger.pid == run.pid:  # else somebody else was faster
            run.stop("once more", grace=0)
            for _ in range(3):
                run.wait({}, time.monotonic())
            with contextlib.suppress(subprocess.TimeoutExpired):
                stranger.wait(0.02)
            assert stranger.poll() is None, "the stranger was hit"
            survived += 1
        run.close()
        os.killpg(stranger.pid, 9)
        stranger.wait()
    print(survived, "survived")


if __name__ == "__main__":
    main(int(sys.argv[1]))
