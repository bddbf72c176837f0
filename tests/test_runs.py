"""Runs: process groups that end as a whole, outputs that end with the leader, and nothing left of either."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import unittest
from pathlib import Path
from typing import Any, Callable, Optional
from unittest import mock

import streamlog
from streamlog import Command, Error, Process, Settings

from .support import ROOT, SOAK, ServerCase, descriptors, is_alive, pids_in, wait_until


class RunCase(ServerCase):
    def run_(self, line: str, timeout: Optional[float] = None, stderr: str = "merge", **settings: Any) -> Process:
        self.released = 0

        def release() -> None:
            self.released += 1

        launch: Any = Command(line, stderr=stderr).bind("x", {})
        run = Process(launch, Settings(**{"grace_seconds": 10.0, "drain_seconds": 0.5, **settings}), timeout, release)
        self.addCleanup(run.close)
        return run

    def read_all(self, run: Process) -> bytes:
        """Everything to the end of a run, as a client that keeps up would get it."""
        data = b""
        while not run.is_over:
            for descriptor in run.wait({}).keys() & run.outputs.keys():
                data += run.read(descriptor)
        return data

    def stall(self, run: Process, until: Callable[[], object]) -> None:
        """Take nothing, as a slow client does, until a condition holds."""
        deadline = time.monotonic() + 10
        while not until():
            self.assertLess(time.monotonic(), deadline)
            ready = run.wait({}, time.monotonic() + 0.01, is_paused=True)
            self.assertFalse(set(ready) & set(run.outputs))

    def stall_through_drain_time(self, run: Process) -> None:
        """Take nothing until the leader has exited, and the drain time, which is short here, has passed."""
        self.stall(run, lambda: run.exit_code is not None)
        moment = time.monotonic() + 0.3
        self.stall(run, lambda: time.monotonic() > moment)

    def read_some(self, run: Process, mark: bytes = b"\n") -> bytes:
        """Output up to a mark."""
        data = b""
        while mark not in data:
            for descriptor in run.wait({}).keys() & run.outputs.keys():
                data += run.read(descriptor)
        return data


class Stopping(RunCase):
    def test_the_signal_that_a_command_is_stopped_by_can_be_chosen(self) -> None:
        script = "!trap 'echo done; exit 3' {0}; trap 'echo wrong' TERM; echo ready; while :; do sleep 0.05; done"
        for name in ("INT", "HUP", "USR1"):
            with self.subTest(name=name):
                server = self.serve({"x": Command(script.format(name), stop=name)})
                with self.connect(server) as client:
                    client.get("/x?format=ndjson")
                    client.read_until(b"ready")
                    (run,) = json.loads(self.fetch(server, "/-/runs", headers=["Accept: application/json"]).body)[
                        "runs"
                    ]
                    self.fetch(server, f"/-/runs/{run['id']}", "DELETE")
                    self.assertIn(b'"done', client.read_until(b'"exit_code": 3'))
                    self.assertNotIn(b"wrong", client.buffer)

    def test_what_a_shell_left_in_the_background_is_asked_by_a_signal_that_it_does_not_ignore(self) -> None:
        server = self.serve({"x": Command("!sleep 60 & echo $!", stop="INT")}, drain_seconds=0.2, grace_seconds=30)
        started = time.monotonic()
        pid = int(self.fetch(server, "/x").body)
        wait_until(lambda: not is_alive(pid), "it is ended")
        self.assertLess(time.monotonic() - started, 10, "it has not waited for SIGKILL")

    def test_one_that_ignores_its_signal_is_killed_after_the_grace_time(self) -> None:
        command = Command("!trap '' INT; echo $$; while :; do sleep 0.05; done", stop="INT")
        server = self.serve({"x": command}, grace_seconds=0.3)
        with self.connect(server) as client:
            client.get("/x")
            client.read_head()
            pid = int(client.read_chunk() or b"")
        wait_until(lambda: not is_alive(pid), "it is killed")


class Endings(RunCase):
    def test_a_run_that_ends_by_itself_gives_all_its_output_and_its_exit_code(self) -> None:
        run = self.run_("!echo a; echo b >&2; printf c; exit 3")
        self.assertEqual(self.read_all(run), b"a\nb\nc")
        self.assertEqual((run.outcome.exit_code, run.outcome.reason, self.released), (3, "", 1))
        self.assertLess(run.outcome.seconds, 5)

    def test_a_death_by_signal_is_128_and_its_number(self) -> None:
        run = self.run_("!kill -9 $$")
        self.read_all(run)
        self.assertEqual(run.exit_code, 137)

    def test_stderr_goes_where_the_command_says(self) -> None:
        for stderr, expected in (("merge", b"ab"), ("discard", b"a"), ("separate", b"ab")):
            with self.subTest(stderr=stderr):
                run = self.run_("!printf a; printf b >&2", stderr=stderr)
                self.assertEqual(len(run.outputs), 2 if stderr == "separate" else 1)
                self.assertEqual(bytes(sorted(self.read_all(run))), expected)

    def test_the_exit_of_the_leader_ends_a_run_whose_output_was_closed_before(self) -> None:
        run = self.run_("!exec >&- 2>&-; sleep 0.2; exit 4")
        self.assertEqual((self.read_all(run), run.exit_code), (b"", 4))

    def test_a_grandchild_that_holds_the_pipe_is_waited_for_a_short_time_only(self) -> None:
        run = self.run_("!sleep 300 & echo $!")
        started = time.monotonic()
        (pid,) = pids_in(self.read_all(run))
        self.assertLess(time.monotonic() - started, 10)
        self.assertEqual((run.exit_code, run.reason), (0, ""))
        run.close()
        self.assertFalse(is_alive(pid))

    def test_what_a_grandchild_writes_in_the_drain_time_is_output_too(self) -> None:
        run = self.run_("!(sleep 0.2; echo late) & echo early", drain_seconds=10)
        self.assertEqual(self.read_all(run), b"early\nlate\n")

    def test_a_grandchild_without_the_pipe_is_stopped_and_not_waited_for(self) -> None:
        run = self.run_("!sleep 300 >/dev/null 2>&1 & echo $!", drain_seconds=60)
        (pid,) = pids_in(self.read_all(run))
        run.close()
        self.assertFalse(is_alive(pid))

    def test_a_grandchild_that_ignores_sigterm_is_killed_after_the_grace_time(self) -> None:
        run = self.run_(
            "!(trap '' TERM; echo; exec >/dev/null 2>&1; sleep 300) & sleep 0.2; echo $!",
            grace_seconds=0.3,
            drain_seconds=10,  # the pipe is closed once SIGTERM is ignored
        )
        (pid,) = pids_in(self.read_all(run))
        self.assertEqual((run.exit_code, self.released), (0, 0))
        self.assertTrue(is_alive(pid))
        run.close()
        self.assertFalse(is_alive(pid))
        self.assertEqual(self.released, 1)

    def test_a_grandchild_in_a_session_of_its_own_outlives_the_run_and_does_not_hold_it(self) -> None:
        run = self.run_(self.python(
            "import os, subprocess\n"
            "print(subprocess.Popen(['sleep', '300'], start_new_session=True).pid, flush=True)\n"
        ))  # fmt: skip
        (pid,) = pids_in(self.read_all(run))
        run.close()
        self.assertTrue(is_alive(pid))
        os.kill(pid, signal.SIGKILL)

    def test_output_that_the_leader_left_in_the_pipe_is_not_lost_to_a_slow_reader(self) -> None:
        run = self.run_("!head -c 60000 /dev/zero; sleep 300 & exit 0", drain_seconds=0.1)
        self.stall_through_drain_time(run)
        self.assertFalse(run.is_over)
        self.assertEqual(self.read_all(run), bytes(60000))

    def test_a_leader_that_has_exited_is_reaped_and_its_slot_freed_though_nobody_reads(self) -> None:
        run = self.run_("!head -c 1000 /dev/zero", drain_seconds=0.1)
        self.stall(run, lambda: self.released)
        self.assertEqual((run.exit_code, os.path.exists(f"/proc/{run.pid}")), (0, False))
        self.assertEqual(len(self.read_all(run)), 1000)


class Stops(RunCase):
    def test_stop_ends_the_whole_group_by_sigterm(self) -> None:
        run = self.run_("!sleep 300 & sleep 300 & echo $$ $! ; wait")
        pids = list(pids_in(self.read_some(run)))
        run.stop("enough")
        self.read_all(run)
        self.assertEqual((run.exit_code, run.reason), (143, "enough"))
        run.close()
        self.assertFalse(any(map(is_alive, pids)))

    def test_a_command_that_ignores_sigterm_gets_sigkill_after_the_grace_time(self) -> None:
        run = self.run_("!trap '' TERM; echo; while :; do sleep 0.1; done", grace_seconds=0.4)
        self.read_some(run)
        started = time.monotonic()
        run.stop("enough")
        self.read_all(run)
        self.assertEqual(run.exit_code, 137)
        self.assertTrue(0.3 < time.monotonic() - started < 10)

    def test_a_stopped_process_is_woken_to_act_on_sigterm(self) -> None:
        run = self.run_("!trap 'echo bye; exit 7' TERM; echo; kill -STOP $$; sleep 9", grace_seconds=30)
        self.read_some(run)
        stat = Path(f"/proc/{run.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the process is stopped")
        run.stop("enough")
        self.assertEqual((self.read_all(run), run.exit_code), (b"bye\n", 7))

    def test_a_group_has_the_grace_time_though_its_leader_has_gone(self) -> None:
        note = self.folder / "note"
        run = self.run_(
            f"!(trap 'sleep 0.3; echo saved > {note}; exit' TERM; echo; while :; do sleep 0.05; done) & wait"
        )
        self.read_some(run)
        run.stop("enough")
        run.close()
        self.assertEqual(note.read_text(), "saved\n")

    def test_output_of_a_command_that_is_cleaning_up_is_still_read(self) -> None:
        run = self.run_("!trap 'echo bye; exit 0' TERM; echo; while :; do sleep 0.05; done")
        self.read_some(run)
        run.stop("enough")
        self.assertTrue(self.read_all(run).endswith(b"bye\n"))
        self.assertEqual(run.reason, "enough")

    def test_a_timeout_stops_a_silent_command(self) -> None:
        run = self.run_("sleep 300", timeout=0.3)
        self.assertEqual((self.read_all(run), run.outcome.reason), (b"", "timeout after 0.3 s"))

    def test_a_timeout_is_over_once_the_leader_has_exited(self) -> None:
        run = self.run_("!sleep 300 & exit 0", timeout=1, drain_seconds=2)
        self.read_all(run)
        self.assertEqual((run.exit_code, run.reason), (0, ""))

    def test_the_first_reason_counts_and_later_stops_change_nothing(self) -> None:
        run = self.run_("sleep 300")
        run.stop("one")
        run.stop("two")
        self.read_all(run)
        run.stop("three")
        run.close()
        run.close()
        self.assertEqual((run.reason, self.released), ("one", 1))

    def test_close_stops_a_run_that_goes_on(self) -> None:
        run = self.run_("!sleep 300 & yes")
        pid = run.pid
        run.close()
        self.assertFalse(is_alive(pid))
        self.assertEqual((run.reason, self.released), ("closed", 1))

    def test_a_run_that_cannot_be_ended_is_given_up(self) -> None:
        run = self.run_("sleep 300", grace_seconds=0.1)
        real = os.killpg
        with mock.patch.object(streamlog, "_ABANDON_SECONDS", 0.2), self.assertLogs("streamlog", "WARNING"):
            with mock.patch.object(os, "killpg", side_effect=PermissionError):
                run.close()
        self.assertEqual((self.released, run.exit_code), (1, 137))
        real(run.pid, signal.SIGKILL)
        run._process.wait()

    def test_a_stop_while_a_slow_reader_is_still_owed_output_ends_it_cut(self) -> None:
        run = self.run_("!head -c 60000 /dev/zero; sleep 300 & exit 0", drain_seconds=0.1)
        self.stall_through_drain_time(run)
        self.assertFalse(run.is_over)
        run.stop("enough")
        run.wait({}, is_paused=True)
        self.assertEqual((run.is_over, run.outcome.exit_code, run.reason), (True, 0, "enough"))

    def test_output_that_is_given_up_makes_a_cut_answer(self) -> None:
        run = self.run_("!head -c 60000 /dev/zero; sleep 300 & exit 0", drain_seconds=0.1, grace_seconds=0.1)
        real = os.killpg
        with mock.patch.object(streamlog, "_ABANDON_SECONDS", 0.1), self.assertLogs("streamlog", "WARNING"):
            with mock.patch.object(os, "killpg", side_effect=PermissionError):
                self.stall(run, lambda: run.is_over)
        self.assertEqual((run.exit_code, run.reason), (0, "it does not end"))
        real(run.pid, signal.SIGKILL)

    STUBBORN = "!(trap '' TERM; exec >/dev/null 2>&1; sleep 300) & echo $!; sleep 0.02"

    def test_a_group_that_cannot_be_looked_at_is_taken_for_living(self) -> None:
        too_many = OSError(errno.EMFILE, "too many")
        for target, effect, has_proc in (
            ("os.listdir", too_many, True),
            ("builtins.open", too_many, True),
            ("os.listdir", [[]] * 99, False),  # as in a chroot(2) where it is an empty directory
        ):
            is_there = mock.patch.object(streamlog, "_HAS_PROC", has_proc)
            with is_there, mock.patch(target, side_effect=effect):
                run = self.run_(self.STUBBORN, grace_seconds=60, drain_seconds=10)
                (pid,) = pids_in(self.read_all(run))
                self.stall_through_drain_time(run)
            self.assertEqual((self.released, is_alive(pid)), (0, True))
            run.stop("enough", grace=0)

    def test_a_look_from_before_a_run_does_not_count_for_it(self) -> None:
        for _ in range(5):
            earlier = self.run_(self.STUBBORN, drain_seconds=10)
            self.read_all(earlier)  # which has looked for the rest of its group just now
            run = self.run_(self.STUBBORN, grace_seconds=60, drain_seconds=10)
            (pid,) = pids_in(self.read_all(run))
            self.assertEqual((self.released, is_alive(pid)), (0, True))
            earlier.stop("enough", grace=0)
            run.stop("enough", grace=0)

    def test_a_month_is_not_too_long_a_timeout(self) -> None:
        run = self.run_("echo x", timeout=3e6, grace_seconds=3e6)
        self.assertEqual((self.read_all(run), run.exit_code), (b"x\n", 0))

    def test_stop_raced_against_the_exit_signals_nobody_else(self) -> None:
        bystander = subprocess.Popen(["sleep", "300"], start_new_session=True)
        for _ in range(SOAK):
            run = self.run_("true")
            stopper = threading.Thread(target=run.stop, args=["raced"])
            stopper.start()
            self.read_all(run)
            stopper.join()
            run.close()
        self.assertIsNone(bystander.poll())
        bystander.kill()
        bystander.wait()

    @unittest.skipUnless(sys.platform == "linux", "a namespace of process numbers is of Linux")
    def test_a_stranger_who_gets_the_number_of_an_ended_group_is_not_hit(self) -> None:
        count = max(30, SOAK // 5)
        self.assertEqual(self.run_as_first("tests.reuse", count), f"{count} survived\n")

    @unittest.skipUnless(sys.platform == "linux", "a namespace of process numbers is of Linux")
    def test_as_process_1_it_reaps_what_its_runs_leave_in_their_groups(self) -> None:
        self.assertEqual(self.run_as_first("tests.first", max(30, SOAK // 5)), "0 left\n")

    def run_as_first(self, module: str, count: int) -> str:
        """Run a module as process 1 of a namespace of its own; what it prints."""
        unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
        try:
            found = subprocess.run([*unshare, "true"], stderr=subprocess.DEVNULL, check=False).returncode
        except FileNotFoundError:
            found = 1
        if found or not os.path.exists("/proc/sys/kernel/ns_last_pid"):
            self.skipTest("cannot make a namespace in which process numbers can be set")
        done = subprocess.run(
            [*unshare, sys.executable, "-m", module, str(count)], cwd=ROOT, capture_output=True, text=True, timeout=100
        )
        return done.stdout + done.stderr


class Starts(RunCase):
    def test_what_cannot_be_started_says_which_and_why(self) -> None:
        plain = self.folder / "plain"
        plain.write_text("x")
        empty = self.folder / "empty"
        empty.write_bytes(b"\x00")
        empty.chmod(0o755)
        for command, told in (
            (Command("no-such-program"), "cannot start 'no-such-program': No such file or directory"),
            (Command(str(plain)), f"cannot start '{plain}': Permission denied"),
            (Command(str(empty)), f"cannot start '{empty}': Exec format error (a script needs a #! line)"),
            (Command("true", cwd="/nowhere"), "cannot start 'true' in '/nowhere': No such file or directory"),
            (Command("true " + "x" * 200_000), "cannot start 'true': Argument list too long"),
        ):
            with self.subTest(told=told), self.assertRaises(Error) as caught:
                Process(command.bind("x", {}), Settings(), None, self.fail)  # type: ignore[arg-type]
            self.assertEqual((str(caught.exception), caught.exception.status), (told, 500))

    def test_a_shortage_is_a_503_and_leaves_nothing(self) -> None:
        before = descriptors()
        for target in ("subprocess.Popen", "os.pipe"):
            for number in (errno.EMFILE, errno.EAGAIN, errno.ENOMEM):
                with self.subTest(target=target, number=number), self.assertRaises(Error) as caught:
                    with mock.patch(target, side_effect=OSError(number, os.strerror(number))):
                        self.run_("sleep 300")
                self.assertEqual((caught.exception.status, caught.exception.headers), (503, {"Retry-After": "1"}))
        self.assertEqual(descriptors(), before)

    def test_a_command_sees_only_its_three_descriptors_and_a_session_of_its_own(self) -> None:
        run = self.run_(
            self.python("import os; print(sorted(os.listdir('/proc/self/fd'))[:-1], os.getsid(0) == os.getpid())")
        )
        self.assertEqual(self.read_all(run), b"['0', '1', '2'] True\n")

    def test_what_the_server_has_inherited_is_not_the_command_s(self) -> None:
        reader, writer = os.pipe()
        os.set_inheritable(writer, True)
        run = self.run_("sleep 300")
        os.close(writer)
        self.assertEqual(os.read(reader, 1), b"")
        os.close(reader)
        run.close()

    @unittest.skipUnless(sys.platform == "linux", "by /proc")
    def test_signals_that_python_ignores_are_not_ignored_by_the_command(self) -> None:
        run = self.run_("grep SigIgn /proc/self/status")
        ignored = int(self.read_all(run).split()[1], 16)
        self.assertFalse([number for number in (signal.SIGPIPE, signal.SIGXFSZ) if ignored >> (number - 1) & 1])

    def test_a_program_that_moves_is_found_again(self) -> None:
        folders = [self.folder / name for name in ("first", "second")]
        for folder in folders:
            folder.mkdir()
        command = Command("tool", env={"PATH": ":".join(map(str, folders)) + ":/bin:/usr/bin"})

        def run() -> bytes:
            process = Process(command.bind("x", {}), Settings(), None, lambda: None)  # type: ignore[arg-type]
            self.addCleanup(process.close)
            return self.read_all(process)

        with self.assertRaises(Error):
            run()
        for folder in [*reversed(folders), *reversed(folders)]:
            tool = folder / "tool"
            tool.write_text(f"#!/bin/sh\necho {folder.name}\n")
            tool.chmod(0o755)
            self.assertEqual(run(), f"{folder.name}\n".encode())
            tool.unlink()

    def test_standard_input_is_empty(self) -> None:
        self.assertEqual(self.read_all(self.run_("cat")), b"")

    def test_the_server_s_own_descriptor_limit_is_not_the_command_s(self) -> None:
        gate = self.make_gate()
        run = self.run_(f"!read _ <> {gate}; ulimit -n", child_nofile=(123, 456))
        gate.write_text("\n")
        self.assertEqual(self.read_all(run), b"123\n" if sys.platform == "linux" else b"")


@unittest.skipUnless(sys.platform == "linux", "the fallback is for Linux")
class ExitsWithoutPidfd(Endings):
    """The same endings where the system has no pidfd_open, or forbids it."""

    def setUp(self) -> None:
        super().setUp()
        self.enterContext_(mock.patch("os.pidfd_open", side_effect=PermissionError))


class Flow(RunCase):
    def test_blocks_grow_with_the_flow_and_shrink_when_it_is_over(self) -> None:
        run = self.run_("!dd if=/dev/zero bs=1M count=20; echo done", stderr="discard")
        sizes = []
        while not run.is_over:
            for descriptor in run.wait({}).keys() & run.outputs.keys():
                sizes += [len(run.read(descriptor))]
        self.assertLessEqual(sizes[0], streamlog._BLOCK_MIN_BYTES)
        self.assertGreater(max(sizes), 64 * 1024)
        self.assertLessEqual(max(sizes), streamlog._BLOCK_MAX_BYTES)
        self.assertEqual(sum(sizes), 20 * 1024 * 1024 + len("done\n"))

    def test_a_paused_run_is_not_read_but_its_end_is_seen(self) -> None:
        run = self.run_("!echo x; exit 5", drain_seconds=0.1)
        self.stall(run, lambda: run.exit_code is not None)
        self.assertEqual((run.exit_code, self.read_all(run)), (5, b"x\n"))

    def test_other_descriptors_are_watched_too(self) -> None:
        reader, writer = os.pipe()
        run = self.run_("sleep 300")
        os.close(writer)
        self.assertEqual(list(run.wait({reader: select.POLLIN})), [reader])
        os.close(reader)

    def test_nothing_to_read_after_all_is_not_the_end(self) -> None:
        run = self.run_("sleep 300")
        (descriptor,) = run.outputs
        self.assertEqual((run.read(descriptor), list(run.outputs)), (b"", [descriptor]))
