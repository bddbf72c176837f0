"""Run by test_runs in a namespace of its own, where the number of the next process can be set.

Again and again a run ends, a stranger is given its number, and whatever could still signal the group is called.
"""

from __future__ import annotations

import os
import subprocess
import sys

from streamlog import Command, Run, Settings


def set_next_pid(pid: int) -> None:
    with open("/proc/sys/kernel/ns_last_pid", "w", encoding="ascii") as file:
        file.write(str(pid - 1))


def main(count: int) -> None:
    survived = 0
    while survived < count:
        run = Run(Command("true").bind("x", {}), Settings(grace_seconds=0.1), None, lambda: None)
        while not run.is_over:
            for descriptor in run.wait({}):
                run.read(descriptor)
        set_next_pid(run.pid)
        stranger = subprocess.Popen(["sleep", "300"], start_new_session=True)
        if stranger.pid == run.pid:  # else somebody else was faster
            run.kill()
            run._terminate()
            run.close()
            assert stranger.poll() is None, "the stranger was hit"
            survived += 1
        os.killpg(stranger.pid, 9)
        stranger.wait()
    print(survived, "survived")


if __name__ == "__main__":
    main(int(sys.argv[1]))
