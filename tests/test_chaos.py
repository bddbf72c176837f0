"""Chaos: clients, signals, reloads and shortages of all kinds at once, by dice; then nothing may be left, or wrong.

The seed STREAMLOG_SEED throws the same dice again, though not at the same moments.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import threading
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from random import Random
from time import monotonic, sleep
from typing import Optional

from .support import SOAK, THREADS, Answer, Program, Raw, ServerCase, children, count_threads, descriptors, wait_until
from .test_fuzz import SEED

# MARK tells the processes of our commands from others. Those of a victim get signals that end them.
COUNT = "!i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done"
COMMANDS = "[DEFAULT]\nenv = CHAOS=MARK\n" + re.sub(
    r"(?m)^(\w+)((?: \w+=[^ ]+)*) \| (.*)$",
    lambda found: f"[{found[1]}]\ncommand = {found[3]}" + found[2].replace(" ", "\n"),
    f"""
version | echo VERSION
binary | cat FOLDER/binary
lines | seq 2000
both | !seq 400; seq 3 500 >&2
tree | !sleep 300 >/dev/null 2>&1 & seq 100
jobs pty=yes | !sleep 300 >/dev/null 2>&1 & seq 100
terminal pty=yes | !seq 900; sleep 0.05; seq 9000
slow | !for i in 1 2 3 4 5 6 7 8; do seq $i 300; sleep 0.05; done
joined shared=yes | !: {{n:int}}; for i in 1 2 3 4 5 6 7 8; do seq $i 300; sleep 0.05; done
victim env=CHAOS=MARK/victim | !for i in 1 2 3 4 5 6 7 8; do seq $i 300; sleep 0.05; done
endless | !i=0; while :; do i=$((i+1)); echo $i; done
shared shared=yes | !: {{n:int}}; {COUNT[1:]}
stubborn | !trap '' TERM HUP; {COUNT[1:]}
screen pty=yes | !trap '' HUP; {COUNT[1:]}
limited timeout=0.2 | {COUNT}
cat stdin=yes | cat
sum stdin=yes | sha256sum
sink stdin=yes | !cat >/dev/null && echo end >>FOLDER/ends
session stdin=yes pty=yes | cat
""",
)
FORMATS = ("text", "text", "html", "sse", "ndjson")
NONSENSE = (b"GET", b"\0" * 99, b"GET / HTTP/1.1\r\n\r\n", b"A" * 20_000, b"\r\n" * 9, b"GET /x HTTP/3.0\r\n\r\n")
BROKEN = ("[lines]\ncommand = seq {x:}\nnone = 1\n", "no section\n", "[x]\ncommand = true\nmax = many\n", "[x]\n[x]\n")


def seq(first: int, last: int) -> bytes:
    return b"".join(b"%d\n" % number for number in range(first, last + 1))


SLOW = b"".join(seq(first, 300) for first in range(1, 9))
ENDLESS = seq(1, 300_000)  # a beginning
WHOLE = {
    "binary": Random(1).randbytes(300_000),
    "lines": seq(1, 2000),
    "both": seq(1, 400) + seq(3, 500),
    "tree": seq(1, 100),
    "jobs": seq(1, 100),
    "terminal": seq(1, 900) + seq(1, 9000),
    "slow": SLOW,
}
LEFT = ["endless", "shared?n=1", "shared?n=2", "stubborn", "screen", "limited", *WHOLE, "joined?n=1", "victim"]
OTHERS = (
    *(("HEAD", "/lines", 200), ("OPTIONS", "/lines", 204), ("PUT", "/lines", 405), ("GET", "/none", 404)),
    *(("GET", "/lines?x=1", 400), ("GET", "/", 200), ("GET", "/-/healthy", 200), ("GET", "/-/runs", 200)),
)


def lines_of(format_: str, body: bytes) -> list[bytes]:
    """The lines of standard output, and then those of standard error."""
    if format_ == "text":
        return body.splitlines()
    if format_ == "html":
        found = re.findall(rb'<samp(?: class="(e)")?>([^<]*)\n<', body)
    elif format_ == "sse":
        found = re.findall(rb"(?m)^(event: stderr\n)?id: .*\ndata: (.*)\n", re.sub(rb"event: exit\n(.*\n)*", b"", body))
    else:
        objects = [one for one in map(json.loads, body.splitlines()) if "line" in one]
        found = [(b"e" * (one["stream"] == "stderr"), one["line"].encode()) for one in objects]
    return [line for _, line in sorted(found, key=lambda one: bool(one[0]))]


class Slow(Raw):
    def more(self) -> bool:
        sleep(0.002)
        return super().more()


class Kept:
    """A run in the background, of known output."""

    is_stopped = False

    def __init__(self, path: str, wanted: bytes, started: float) -> None:
        self.path, self.wanted, self.started = path, wanted, started


class Chaos(ServerCase):
    def test_under_all_of_it_at_once_every_answer_is_right_and_nothing_is_left(self) -> None:
        seconds = SOAK * (0.06 if SOAK >= 1000 else 0.015)
        self.seen: Counter[str] = Counter()
        self.lock, self.is_over, self.failures = threading.Lock(), threading.Event(), list[str]()
        self.kept: list[Kept] = []
        self.idle: list[Raw] = []
        self.version, self.excused_until = 0, 0.0
        (self.folder / "binary").write_bytes(WHOLE["binary"])
        (self.folder / "ends").touch()
        self.load(COMMANDS)
        env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        options = ["-p0", "--keep=1", "--keep-runs=5", "--linger=0.3", "--grace=1", "--max-runs=14", "-c"]
        log = self.enterContext_((self.folder / "log").open("w"))
        config = str(self.folder / "config")
        try:
            with Program(*options, config, env=env, stderr=log, start_new_session=True) as self.program:
                self.pid = self.program.process.pid
                self.limits = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
                wait_until(lambda: count_threads(self.pid) == THREADS, "it is idle")
                before = descriptors(self.pid), children(self.pid)
                self.rage(seconds)
                self.calm(*before)
                self.end()
        except BaseException as error:
            line = f"STREAMLOG_SEED={shlex.quote(SEED)} STREAMLOG_SOAK={SOAK} python -m unittest {self.id()}"
            strays = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in self.find("")}
            for pid in strays:
                os.kill(pid, signal.SIGKILL)
            said = re.sub(r"(?m)^\S+ (client=|kept=|the commands|read ).*\n", "", (self.folder / "log").read_text())
            raise AssertionError(f"{error}\nstrays: {strays}\n{line}\n{said[-5000:]}") from error

    def rage(self, seconds: float) -> None:
        """Let all of it loose for a while."""
        clients = [
            self.live,
            self.live,
            self.leave,
            self.leave,
            self.upload,
            self.break_off,
            self.spoil,
            self.background,
        ]
        clients += [self.join, self.join, self.stop, self.endless, self.shared, self.late, self.others, self.idler]
        # Before this was in subprocess, it lost descriptors when it got too few for a program (cpython issue 87474).
        shortages = [[self.starve]] if hasattr(subprocess.Popen, "_on_error_fd_closer") else []
        crowd = [clients] * 10 + [[self.reload, self.hurt, self.hurt], *shortages]

        def act(number: int) -> None:
            dice = Random(f"{SEED} {number}")
            while not self.is_over.is_set():
                action = dice.choice(crowd[number])
                try:
                    action(dice)
                except Exception:
                    self.failures.append(f"{action.__name__} of {number}: {traceback.format_exc()}")
                    self.is_over.set()

        threads = [threading.Thread(target=act, args=[number]) for number in range(len(crowd))]
        for thread in threads:
            thread.start()
        self.is_over.wait(seconds)
        self.is_over.set()
        for thread in threads:
            thread.join(30)
        for client in self.idle:
            client.sock.close()
        if self.failures:
            raise AssertionError("\n".join(self.failures))
        self.assertFalse([thread for thread in threads if thread.is_alive()])
        self.assertLessEqual({"live", "upload", "join", "shared"} if SOAK >= 1000 else {"live"}, set(self.seen))
        self.assertEqual((self.folder / "ends").read_text().count("end"), self.seen["sink"])

    def calm(self, opened: set[str], born: set[int]) -> None:
        """Without clients nothing of the runs is left, and it serves what it read last."""

        def left() -> list[object]:
            sleep(0.05)
            metrics = self.program.fetch("/-/metrics").body.decode()
            found: list[object] = re.findall(r"(?m)^streamlog_runs_active.* [1-9].*", metrics)
            found += [] if "\nstreamlog_clients 1\n" in metrics else ["clients"]
            found += [f"kept: {line!r}" for line in self.program.fetch("/-/runs").body.splitlines()]
            found += [*(descriptors(self.pid) ^ opened), *(children(self.pid) ^ born), *self.find("")]
            return found + [f"threads: {count_threads(self.pid)}"] * (count_threads(self.pid) != THREADS)

        self.load(COMMANDS)
        self.program.process.send_signal(signal.SIGHUP)
        deadline = monotonic() + 20  # the grace time, that of a kept run, and the drain time, are 2.3 s
        while found := left():
            self.assertLess(monotonic(), deadline, f"left: {found}")
        wait_until(lambda: self.program.fetch("/version").body == b"%d\n" % self.version, "it has read them")

    def end(self) -> None:
        """SIGTERM ends it and all its runs."""
        with self.program.connect() as one, self.program.connect() as other:
            for client, path in ((one, "/stubborn"), (other, "/endless")):
                client.get(path)
                self.assertEqual(client.read_head()[0], 200)
            self.assertEqual(self.program.fetch("/screen?async=1").status, 202)
            self.program.process.terminate()
            self.assertEqual(self.program.process.wait(10), 0)
        wait_until(lambda: not list(self.find("")), "no process is left", 5)
        said = (self.folder / "log").read_text()
        self.assertFalse(re.findall("Traceback|a bug|given up|Warning", said))

    # what clients do

    def exchange(
        self, path: str, method: str = "GET", headers: Sequence[str] = (), body: bytes = b"", is_slow: bool = False
    ) -> Optional[Answer]:
        """An answer. None if there was no room for a run, or none at all because of a shortage."""

        def send() -> None:
            with contextlib.suppress(OSError):
                client.send(body)

        sender, started = threading.Thread(target=send), monotonic()
        try:
            with (Slow if is_slow else Raw)(("127.0.0.1", self.program.port), 4096 * is_slow) as client:
                client.get(path, method, headers)
                sender.start()
                answer = client.read_answer(method)
                sender.join()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.assertLess(started, self.excused_until, "no answer, and no shortage")
            return None
        if answer.status == 503:
            self.assertIn("retry-after", answer.headers)
        self.count(f"{answer.status}")
        return None if answer.status == 503 else answer

    def count(self, what: str) -> None:
        with self.lock:
            self.seen[what] += 1

    def check(self, what: str, answer: Optional[Answer], wanted: bytes, format_: str = "text") -> None:
        """Whether an answer, if there is one, is all that was wanted."""
        if not answer:
            return
        self.assertEqual((answer.status, answer.is_whole), (200, True), answer)
        self.assertEqual({**answer.headers, **answer.trailers}.get("Exit-Code", "0"), "0", answer.body[-500:])
        if format_ == "text":
            self.assertTrue(answer.body == wanted, (len(answer.body), len(wanted), answer.body[-200:]))
        self.assertTrue(lines_of(format_, answer.body) == wanted.splitlines(), answer.body[-500:])
        self.count(what)

    def live(self, dice: Random) -> None:
        name = dice.choice([*WHOLE, "limited", "victim"])
        format_ = dice.choice(FORMATS) if name != "binary" and name in WHOLE else "text"
        answer = self.exchange(f"/{name}?format={format_}", is_slow=dice.random() < 0.2)
        if name in WHOLE:
            self.check("live", answer, WHOLE[name], format_)
        elif answer and name == "victim":
            self.assertTrue(answer.is_whole, answer)
        elif answer:
            body, stopped, _ = answer.body.partition(b"[stopped: timeout")
            self.assertTrue(stopped and not answer.is_whole and ENDLESS.startswith(body), answer)

    def leave(self, dice: Random) -> None:
        """Read a little, and go."""
        name, size = dice.choice(LEFT), dice.choice((0, 1, 1000, 50_000))
        body = b""
        with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError), self.program.connect() as client:
            client.get(f"/{name}")
            if dice.random() < 0.8 and client.read_head()[0] == 200:
                deadline = monotonic() + 0.3
                while len(body) < size and monotonic() < deadline and (chunk := client.read_chunk()):
                    body += chunk
            sleep(dice.random() * 0.1)
            (client.reset if dice.random() < 0.5 else client.sock.close)()
        wanted = WHOLE.get(name) or (SLOW if "joined" in name else b"" if name == "victim" else ENDLESS)
        body = body.partition(b"[stopped: timeout")[0] if name == "limited" else body
        self.assertTrue(not wanted or wanted.startswith(body[: len(ENDLESS)]), (name, body[-200:]))

    def input(self, dice: Random) -> tuple[str, bytes, str, bytes]:
        """A command, its input, and that as a body, with its header."""
        name = dice.choice(("cat", "sum", "sink", "session"))
        size = dice.choice((1, 1000, 20_000 if name == "session" else 300_000))
        data = seq(1, size // 5 + 1) if name == "session" else dice.randbytes(dice.randrange(size) + 1)
        if dice.random() < 0.5:
            return name, data, f"Content-Length: {len(data)}", data
        step = dice.choice((7, 1000, 100_000)) if size < 9999 else 50_000
        pieces = [data[at : at + step] for at in range(0, len(data), step)]
        framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        return name, data, "Transfer-Encoding: chunked", framed + b"0\r\n\r\n"

    def upload(self, dice: Random) -> None:
        name, data, header, body = self.input(dice)
        answer = self.exchange(f"/{name}", "POST", [header], body, is_slow=dice.random() < 0.2)
        outputs = {"sum": sha256(data).hexdigest().encode() + b"  -\n", "sink": b""}
        self.check("sink" if name == "sink" else "upload", answer, outputs.get(name, data))

    def break_off(self, dice: Random) -> None:
        name, _, header, body = self.input(dice)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError), self.program.connect() as client:
            client.get(f"/{name}", "POST", [header])
            client.sock.settimeout(0.2)
            with contextlib.suppress(OSError):
                client.send(body[: dice.randrange(len(body))])
            sleep(dice.random() * 0.1)
            (client.reset if dice.random() < 0.5 else client.sock.close)()

    def spoil(self, dice: Random) -> None:
        """Send a body that is wrong somewhere."""
        answer = self.exchange("/sink", "POST", ["Transfer-Encoding: chunked"], b"3\r\nabc\r\nno size\r\n")
        self.assertFalse(answer and answer.is_whole, answer)

    def keep(self, name: str, wanted: bytes) -> Optional[Kept]:
        started = monotonic()
        answer = self.exchange(f"/{name}?async=1")
        if not answer:
            return None
        self.assertEqual(answer.status, 202, answer)
        self.kept.append(Kept("/" + answer.headers["location"], wanted, started))
        return self.kept[-1]

    def background(self, dice: Random) -> None:
        self.keep("slow", SLOW)

    def join(self, dice: Random) -> None:
        """View a run from somewhere, or poll it."""
        if not self.kept:
            return
        kept = dice.choice(self.kept[-4:])
        start, way = (
            dice.randrange(len(SLOW) if kept.wanted is SLOW else 99),
            dice.choice(("range", "range", "now", "tail", "state")),
        )
        query = {"now": "?follow=0", "tail": "?tail=20"}.get(way, "")
        header = {"range": f"Range: bytes={start}-", "state": "Accept: application/json"}.get(way, "A: b")
        answer = self.exchange(kept.path + query, headers=[header], is_slow=dice.random() < 0.2)
        if not answer:
            return
        if answer.status == 410:  # it has ended, and had to make room
            self.assertTrue(kept.is_stopped or monotonic() > kept.started + 0.35, answer)
        elif way == "state":
            self.assertEqual(json.loads(answer.body)["first_byte"], 0)
        elif answer.status == 416:
            self.assertTrue(way == "range" and start, answer)
        elif way == "range":
            self.assertEqual(answer.status, 206, answer)
            self.assertTrue(kept.wanted[start:].startswith(answer.body), answer.body[-200:])
            self.assertTrue(kept.is_stopped or (answer.is_whole and kept.wanted is SLOW), "cut")
            self.assertTrue(not answer.is_whole or kept.wanted[start:] == answer.body, len(answer.body))
            self.count("join")
        elif way == "now":
            self.assertTrue(answer.is_whole and kept.wanted.startswith(answer.body), answer)
        elif answer.is_whole:
            self.assertTrue(SLOW.endswith(answer.body), answer)

    def stop(self, dice: Random, kept: Optional[Kept] = None) -> None:
        kept = kept or (dice.choice(self.kept[-9:]) if self.kept else None)
        while kept:
            kept.is_stopped = True
            answer = self.exchange(kept.path, "DELETE")
            if answer:
                self.assertIn(answer.status, (202, 410))
                break

    def endless(self, dice: Random) -> None:
        kept = self.keep(dice.choice(("stubborn", "screen")), ENDLESS)
        sleep(dice.random() * 0.3)
        self.stop(dice, kept)

    def shared(self, dice: Random) -> None:
        format_ = dice.choice(FORMATS)
        answer = self.exchange(f"/joined?n={dice.randrange(2)}&format={format_}", is_slow=dice.random() < 0.2)
        self.check("shared", answer, SLOW, format_)

    def late(self, dice: Random) -> None:
        name = dice.choice(list(WHOLE))
        self.check("late", self.exchange(f"/{name}?wait"), WHOLE[name])

    def others(self, dice: Random) -> None:
        for method, path, status in dice.sample(OTHERS, 3):
            answer = self.exchange(path, method)
            self.assertTrue(not answer or answer.status == status, (path, answer))

    def idler(self, dice: Random) -> None:
        """What is no request, or never will be."""
        client = self.program.connect()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.send(dice.choice((b"", b"GET /lines HTT", b"GET /lines HTTP/1.1\r\nHost: ", *NONSENSE)))
        self.idle.append(client)
        if len(self.idle) > 20:
            self.idle.pop(0).sock.close()

    # what else happens

    def load(self, commands: str) -> None:
        """Rewrite the commands file."""
        self.version += 1
        texts = {"FOLDER": self.folder, "MARK": self.folder, "VERSION": self.version}
        (self.folder / "new").write_text(re.sub("|".join(texts), lambda found: str(texts[found[0]]), commands))
        os.replace(self.folder / "new", self.folder / "config")

    def reload(self, dice: Random) -> None:
        self.load(dice.choice((COMMANDS, *BROKEN)))
        os.kill(self.pid, signal.SIGHUP)
        sleep(dice.random() * 0.2)

    def find(self, kind: str) -> Iterator[int]:
        """The processes of the commands, or of victims among them."""
        mark = f"CHAOS={self.folder}{kind}".encode()
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if mark in Path(f"/proc/{pid}/environ").read_bytes():
                    yield int(pid)

    def hurt(self, dice: Random) -> None:
        """Send signals: to a victim what ends it, to any other what it survives."""
        kind = dice.choice(("", "/victim"))
        found = list(self.find(kind))
        with contextlib.suppress(ProcessLookupError):
            if found:
                pid = dice.choice(found)
                if kind and dice.random() < 0.7:
                    os.kill(pid, dice.choice((signal.SIGTERM, signal.SIGKILL)))
                else:
                    os.kill(pid, signal.SIGSTOP)
                    sleep(dice.random() * 0.2)
                    os.kill(pid, signal.SIGCONT)
        sleep(0.02)

    def starve(self, dice: Random) -> None:
        """Let it have few descriptors for a moment."""
        sleep(dice.random() * 0.5)
        self.excused_until = math.inf
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (dice.randrange(12, 70), self.limits[1]))
        sleep(dice.random() * 0.3)
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, self.limits)
        self.excused_until = monotonic() + 1
