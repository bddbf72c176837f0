"""Measures this server against what people would pick instead, by hand and with nothing else going on:

  python tests/bench.py [--rounds N] [--peers NAME,...] [--peer NAME=COMMAND LINE]... [WORK]...

Works: first (a new connection to the first byte of echo), short (true, by 8 clients that keep their connections),
bulk (1 GiB of zeros), lines (4 million of 80 bytes, in the blocks of 4 KiB that stdio makes), latency (a line a
millisecond, from the write in the command to the read in the client), many (1,000 streams of a line a second),
fan-out (one run, 1,000 viewers), formats (lines as html, sse and ndjson), start (of the process to its first answer),
import, memory (100 GiB through one stream, and a day of lines in each format) and log (what a logging call costs a
program, by viewers of /log). All but the last three print a table of Markdown: medians of the rounds, and their ratio
to `direct`, a server that does no more than give a command the socket for its standard output (of formats to Flask, of
start to http.server). The peers take turns in each round, so that a machine whose speed drifts is the same for all.
Flask and gunicorn run a generator over lines, as their recipes do.

A script starts more slowly than `python -m streamlog`, or than the command that pip installs: Python keeps what it has
compiled of a module, and never of a script. http.server, nginx, lighttpd, busybox and websocketd run CGI scripts, so a
shell each time. http.server's queue of five connections overflows in `short`; it hands the command the socket, as
`direct` does. What varies: in other runs of the same day streamlog had 0.76 to 0.99 of direct's rate in bulk, and 1.9
to 2.9 times its median latency.

Peers that are not installed are left out. Flask and gunicorn may be in the Python that STREAMLOG_FRAMEWORKS names.
--peer adds one: $port is where it listens, $folder has an executable for each of echo, true, bulk, lines, ticks and
fed, $folder/cgi-bin the same as CGI scripts; it runs them for the paths /echo, /true and so on.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import logging
import os
import platform
import re
import resource
import selectors
import shlex
import shutil
import signal
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import streamlog  # noqa: E402

MARK = b"first-output"
BULK = 1 << 30
LINES = 4_000_000  # of 80 bytes each
FEW_LINES = 1_000_000  # for what takes Flask minutes otherwise
MANY = 1000

# Not the Python that is measured: http.server runs CGI as nobody, who may not enter the folder that one is in.
PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
LINES_SCRIPT = """
import os, sys
block = (b"x" * 79 + b"\\n") * 51
for _ in range(int(sys.argv[1]) // 51):
    os.write(1, block)
os.write(1, block[: int(sys.argv[1]) % 51 * 80])
"""
TICKS_SCRIPT = """
import os, sys, time
pause, count = float(sys.argv[1]), int(sys.argv[2])
due = time.monotonic()
for _ in range(count):
    due += pause
    time.sleep(max(0, due - time.monotonic()))
    os.write(1, b"%020d\\n" % time.monotonic_ns())
"""
# A thousand processes that wait for the clock would be measured themselves: here one does, and writes its lines to as
# many that wait for it, in turn. (As all processes of the bench know it.)
FIFO = os.environ.setdefault("STREAMLOG_BENCH", os.path.join(tempfile.gettempdir(), f"streamlog-bench-{os.getpid()}"))
TICK = re.compile(rb"(\d{20})\n")
COMMANDS = {
    "echo": ["echo", MARK.decode()],
    "true": ["true"],
    "bulk": ["head", "-c", str(BULK), "/dev/zero"],
    "lines": [PYTHON, "-ISc", LINES_SCRIPT, str(LINES)],
    "few-lines": [PYTHON, "-ISc", LINES_SCRIPT, str(FEW_LINES)],
    "ticks": [PYTHON, "-ISc", TICKS_SCRIPT, "0.001", "3000"],
    "fed": ["cat", FIFO],
    "seconds": [PYTHON, "-ISc", TICKS_SCRIPT, "1", "86400"],
    "day": [PYTHON, "-ISc", TICKS_SCRIPT, "0.0001", "86400"],
    "endless": ["head", "-c", str(100 << 30), "/dev/zero"],
}

FLASK = f"""
import subprocess
from flask import Flask, Response
app = Flask(__name__)
COMMANDS = {COMMANDS!r}

@app.get("/<name>")
def run(name):
    child = subprocess.Popen(COMMANDS[name], stdout=subprocess.PIPE)
    def output():
        with child:
            if name == "bulk":  # without a single line
                yield from iter(lambda: child.stdout.read1(65536), b"")
            else:
                yield from child.stdout
    return Response(output(), mimetype="text/plain")
"""
LIGHTTPD = """
server.modules = ("mod_cgi")
server.document-root = "$folder"
server.bind = "127.0.0.1"
server.port = $port
server.max-fds = 8192
server.max-connections = 4096
server.stream-response-body = 2
cgi.assign = ("" => "")
"""
NGINX = """
user root;
daemon off;
error_log $folder/nginx.err;
pid $folder/nginx.pid;
events { worker_connections 8192; }
http {
    access_log off;
    server {
        listen 127.0.0.1:$port;
        location / {
            fastcgi_pass unix:$folder/fcgiwrap;
            fastcgi_buffering off;
            fastcgi_param NO_BUFFERING 1;
            fastcgi_param REQUEST_METHOD $$request_method;
            fastcgi_param SCRIPT_FILENAME $folder$$uri;
        }
    }
}
"""
SHARED = "[shared]\ncommand = $folder/seconds\nshared = yes\n"
WEBHOOK = json.dumps(
    [
        {
            "id": name,
            "execute-command": program,
            "pass-arguments-to-command": [{"source": "string", "name": argument} for argument in arguments],
            "include-command-output-in-response": True,
        }
        for name, (program, *arguments) in COMMANDS.items()
    ]
)


@dataclass
class Peer:
    """Who else serves the commands: by a command line, with configuration files, where $port and $folder stand."""

    name: str
    line: str
    path: str = "/"
    files: dict[str, str] = field(default_factory=dict)
    is_live: bool = True  # it sends output as it comes, not when the command has ended
    needs: str = ""  # a program, or python:module

    def is_there(self) -> bool:
        kind, _, module = self.needs.partition(":")
        if module:
            check = [kind, "-c", f"import {module}"]
            return not subprocess.run(check, stderr=subprocess.DEVNULL).returncode
        return not kind or shutil.which(kind) is not None


def our_line() -> str:
    commands = [shlex.quote(f"{name}={shlex.join(argv)}") for name, argv in COMMANDS.items()]
    words = [sys.executable, "-m", "streamlog", "--port", "$port", "--max-runs", "2000"]
    words += ["--config", "shared.ini", *commands]
    return " ".join(words)


WITH_FLASK = os.environ.get("STREAMLOG_FRAMEWORKS", sys.executable)
PEERS = [
    Peer("streamlog", our_line(), files={"shared.ini": SHARED}),
    Peer("direct", f"{sys.executable} {__file__} --serve-direct $port"),
    Peer("http.server", f"{sys.executable} -m http.server --cgi --bind 127.0.0.1 --directory $folder $port",
         "/cgi-bin/", needs=f"{sys.executable}:http.server; http.server.CGIHTTPRequestHandler"),
    Peer("Flask", f"{WITH_FLASK} -m flask --app app run --port $port", files={"app.py": FLASK},
         needs=f"{WITH_FLASK}:flask"),
    Peer("gunicorn", f"{WITH_FLASK} -m gunicorn -k gthread -w 2 --threads 1100 -b 127.0.0.1:$port app:app",
         files={"app.py": FLASK}, needs=f"{WITH_FLASK}:flask, gunicorn"),
    Peer("lighttpd", "lighttpd -D -f lighttpd.conf", "/cgi-bin/", {"lighttpd.conf": LIGHTTPD}, needs="lighttpd"),
    Peer("busybox", "busybox httpd -f -p 127.0.0.1:$port -h $folder", "/cgi-bin/", needs="busybox"),
    Peer("nginx", f"sh -c 'fcgiwrap -c {MANY + 100} -s unix:$folder/fcgiwrap & exec nginx -c $folder/nginx.conf'",
         "/cgi-bin/", {"nginx.conf": NGINX}, needs="fcgiwrap"),
    Peer("webhook", "webhook -ip 127.0.0.1 -port $port -hooks hooks.json", "/hooks/", {"hooks.json": WEBHOOK},
         is_live=False, needs="webhook"),
    Peer("websocketd", "websocketd --address=127.0.0.1 --port=$port --cgidir=$folder/cgi-bin", needs="websocketd"),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- servers


def serve_direct(port: int) -> None:
    """The limit: each command's standard output is the socket."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for one
    listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    while True:
        client, _ = listener.accept()
        with client:
            words = client.recv(65536).split(maxsplit=2)
            if not words:
                continue  # a look at whether it listens
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n")
            subprocess.Popen(COMMANDS[words[1][1:].decode()], stdin=subprocess.DEVNULL, stdout=client.fileno())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def make_executable(path: Path, argv: Sequence[str], head: str = "") -> None:
    path.write_text(f"#!/bin/sh\n{head}exec {shlex.join(argv)}\n")
    path.chmod(0o755)


@dataclass
class Server:
    """A peer that runs, in a folder of its own."""

    peer: Peer
    port: int
    folder: Path
    process: subprocess.Popen[bytes]

    def request(self, name: str, more: str = "Connection: close\r\n") -> bytes:
        return f"GET {self.peer.path}{name} HTTP/1.1\r\nHost: localhost\r\n{more}\r\n".encode()

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        return sock

    def ask(self, name: str, more: str = "Connection: close\r\n") -> socket.socket:
        sock = self.connect()
        sock.sendall(self.request(name, more=more))
        return sock

    def memory(self) -> int:
        """Bytes of memory of their own that the processes of the server hold, not those of its commands."""
        total = 0
        for pid in family(self.process.pid):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
                if not line.startswith((b"cat\0", b"head\0", f"{PYTHON}\0-ISc".encode())):
                    found = re.search(r"RssAnon:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
                    total += int(found[1]) * 1024 if found else 0
        return total


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = path.read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{str(process.args)[:200]}... does not listen") from None
        time.sleep(0.001)


ENV = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
ENV["PYTHONPATH"] = str(ROOT)


def launch(peer: Peer, folder: Path, port: int) -> subprocess.Popen[bytes]:
    values = {"port": str(port), "folder": str(folder)}
    argv = [string.Template(word).substitute(values) for word in shlex.split(peer.line)]
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(argv, cwd=folder, env=ENV, stdout=log, stderr=log, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)


def furnish(peer: Peer, folder: Path, port: int) -> None:
    folder.chmod(0o755)  # nobody reads it
    (folder / "cgi-bin").mkdir()
    for name, argv in COMMANDS.items():
        make_executable(folder / name, argv)
        make_executable(folder / "cgi-bin" / name, argv, "printf 'Content-Type: text/plain\\r\\n\\r\\n'\n")
    for name, text in peer.files.items():
        (folder / name).write_text(string.Template(text).substitute(port=port, folder=folder))


@contextlib.contextmanager
def run(peer: Peer) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        furnish(peer, folder, port)
        process = launch(peer, folder, port)
        try:
            wait_for_port(port, process)
            server = Server(peer, port, folder, process)
            deadline = time.monotonic() + 5  # for what stands behind the port, such as fcgiwrap
            while MARK not in (answer := ask_for_all(server, "echo")):
                if time.monotonic() > deadline:
                    log = (folder / "log").read_text()
                    raise SystemExit(f"{peer.name} does not run echo: {answer[:200]!r} {log[-500:]}")
                time.sleep(0.01)
            yield server
        finally:
            end(process)


# --------------------------------------------------------------------------------------------------------- works

Figures = Optional[Sequence[float]]


def read_all(sock: socket.socket) -> bytes:
    answer = b""
    with contextlib.suppress(ConnectionResetError):  # busybox ends an answer so
        while data := sock.recv(65536):
            answer += data
    return answer


def ask_for_all(server: Server, name: str) -> bytes:
    with server.ask(name) as sock:
        return read_all(sock)


def first(server: Server, count: int = 200) -> Figures:
    """Seconds from a new connection to the first byte of output."""
    took = []
    request = server.request("echo")
    for _ in range(count):
        started = time.perf_counter()
        with server.connect() as sock:
            sock.sendall(request)
            answer = b""
            while MARK[:1] not in answer.partition(b"\r\n\r\n")[2]:
                data = sock.recv(65536)
                if not data:
                    raise SystemExit(f"{server.peer.name}: an answer without output, {answer!r}")
                answer += data
            took.append(time.perf_counter() - started)
            read_all(sock)
    return [statistics.median(took)]


def is_whole(answer: bytes) -> bool:
    """Whether an answer on a connection that is kept has ended; true's has no output."""
    head, blank, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head, re.I)
    if length:
        return len(body) >= int(length[1])
    return bool(blank) and b"chunked" in head and (body.endswith(b"\r\n\r\n") or body == b"0\r\n\r\n")


def short(server: Server, clients: int = 8, seconds: float = 3.0) -> Figures:
    """Answers a second."""
    request = server.request("true", more="")
    count = 0
    with selectors.DefaultSelector() as selector:

        def ask() -> None:
            sock = server.connect()
            sock.sendall(request)
            selector.register(sock, selectors.EVENT_READ, bytearray())

        for _ in range(clients):
            ask()
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            for key, _ in selector.select(10):
                sock, answer = key.fileobj, key.data
                assert isinstance(sock, socket.socket)
                data = sock.recv(65536)
                answer += data
                if data and not is_whole(answer):
                    continue
                if b" 200 " not in answer[:20] and b" 204 " not in answer[:20]:
                    raise SystemExit(f"{server.peer.name}: not an answer to true, {bytes(answer)!r}")
                count += 1
                if data and b"connection: close" not in answer.lower():
                    answer.clear()
                    sock.sendall(request)
                else:
                    selector.unregister(sock)
                    sock.close()
                    ask()
        took = time.perf_counter() - started
        for key in list(selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
    return [count / took]


def rate(server: Server, name: str, size: int) -> float:
    """Bytes of a command's output a second."""
    room = bytearray(1 << 18)
    total = 0
    started = time.perf_counter()
    with server.ask(name) as sock:
        while count := sock.recv_into(room):
            total += count
        took = time.perf_counter() - started
    if total < size:
        raise SystemExit(f"{server.peer.name}: {total} bytes of {size}")
    return size / took


def bulk(server: Server) -> Figures:
    return [rate(server, "bulk", BULK)] if server.peer.is_live else None


def lines(server: Server) -> Figures:
    if not server.peer.is_live:
        return None
    is_slow = FLASK in server.peer.files.values()  # a quarter is enough to tell its rate
    return [rate(server, "few-lines", FEW_LINES * 80) if is_slow else rate(server, "lines", LINES * 80)]


class Clock:
    """Takes what a client reads, and how old each tick in it is."""

    def __init__(self) -> None:
        self.ages: list[float] = []
        self._rest = b""

    def take(self, data: bytes) -> None:
        now = time.monotonic_ns()
        data = self._rest + data
        end = 0
        for found in TICK.finditer(data):
            self.ages.append((now - int(found[1])) / 1e9)
            end = found.end()
        self._rest = data[max(end, len(data) - 20) :]

    def figures(self) -> Sequence[float]:
        return percentiles(self.ages)


def percentiles(values: Sequence[float]) -> Sequence[float]:
    ranked = sorted(values)
    return [statistics.median(ranked), ranked[len(ranked) * 99 // 100]]


def latency(server: Server) -> Figures:
    """Seconds from a line's write to its read: median and 99th percentile."""
    if not server.peer.is_live:
        return None
    clock = Clock()
    with server.ask("ticks") as sock:
        while data := sock.recv(65536):
            clock.take(data)
    assert len(clock.ages) > 2900, f"{server.peer.name}: {len(clock.ages)} lines"  # a chunk's end may stand in one
    return clock.figures()


@contextlib.contextmanager
def streams(server: Server, name: str, count: int) -> Iterator[selectors.DefaultSelector]:
    """Connections with a run each, once all of them run."""
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for _ in range(count):
            sock = stack.enter_context(server.ask(name))
            sock.recv(1)  # the head, so that no more than one starts at a time
            selector.register(sock, selectors.EVENT_READ, Clock())
        yield selector


def watch(selector: selectors.DefaultSelector, seconds: float) -> Sequence[float]:
    """How old the lines of so many seconds were."""
    clocks: list[Clock] = [key.data for key in selector.get_map().values()]
    for clock in clocks:
        clock.ages.clear()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for key, _ in selector.select(1):
            assert isinstance(key.fileobj, socket.socket)
            key.data.take(key.fileobj.recv(65536))
    return percentiles([age for clock in clocks for age in clock.ages])


@contextlib.contextmanager
def feed(pause: float) -> Iterator[None]:
    """Write a tick each so many seconds to those who read from the FIFO."""
    os.mkfifo(FIFO)
    try:
        with open(os.open(FIFO, os.O_RDWR), "wb") as fifo:
            argv = [PYTHON, "-ISc", TICKS_SCRIPT, str(pause), "1000000"]
            with subprocess.Popen(argv, stdout=fifo) as process:
                try:
                    yield
                finally:
                    process.kill()
    finally:
        os.unlink(FIFO)


def many(server: Server) -> Figures:
    """Bytes of memory a stream, median and 99th percentile of a line's age in seconds."""
    if not server.peer.is_live:
        return None
    with run(server.peer) as fresh, feed(1 / MANY):  # what was freed by another round would not be seen to be taken
        with streams(fresh, "fed", 1) as one:
            watch(one, 1)
            before = fresh.memory()
        with streams(fresh, "fed", MANY) as all_:
            watch(all_, 3)  # what has piled up meanwhile
            ages = watch(all_, 5)
            return [(fresh.memory() - before) / MANY, *ages]


def formats(server: Server) -> Figures:
    """Bytes of lines a second, as html, sse and ndjson; as they are by those who have no formats."""
    if server.peer.name == "streamlog":
        names = [f"few-lines?format={name}" for name in ("html", "sse", "ndjson")]
        return [rate(server, name, FEW_LINES * 80) for name in names]
    return [rate(server, "few-lines", FEW_LINES * 80)] * 3


def fan_out(server: Server) -> Figures:
    """Bytes of memory a viewer of one run, median and 99th percentile of a line's age in seconds."""
    with run(server.peer) as fresh, streams(fresh, "shared", 1) as one:
        watch(one, 2)
        before = fresh.memory()
        with streams(fresh, "shared", MANY) as all_:
            watch(all_, 3)
            ages = watch(all_, 5)
            return [(fresh.memory() - before) / MANY, *ages]


def start(server: Server) -> Figures:
    """Seconds from the start of another such process to the first byte of its answer; and of one run as a script."""
    lines = [server.peer.line] * 2
    if server.peer.name == "streamlog":
        lines = [f"{sys.executable} {how} --port $port true" for how in ("-m streamlog", ROOT / "streamlog.py")]
    return [start_once(server, replace(server.peer, line=line)) for line in lines]


def start_once(server: Server, peer: Peer) -> float:
    port = free_port()
    started = time.perf_counter()
    process = launch(peer, server.folder, port)
    try:
        wait_for_port(port, process)
        with socket.create_connection(("127.0.0.1", port), 20) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert sock.recv(1)
        return time.perf_counter() - started
    finally:
        end(process)


# ------------------------------------------------------------------------------------------------ works on their own


def import_(rounds: int) -> None:
    """What an import takes a Python that has compiled the module before, over its bare start."""
    code = {"bare": "", "streamlog": "import streamlog", "http.server": "import http.server"}
    took: dict[str, list[float]] = {name: [] for name in code}
    for _ in range(10 * rounds + 1):
        for name, line in code.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", line], env=ENV, check=True)
            took[name].append(time.perf_counter() - started)
    bare, *others = (statistics.median(values[1:]) for values in took.values())
    print("import:", ", ".join(f"{name} {1e3 * (value - bare):.1f} ms" for name, value in zip(list(code)[1:], others)))


def memory(_: int) -> None:
    """What the server holds while 100 GiB go through one stream, and the 86,400 lines of a day in each format."""
    with run(PEERS[0]) as server:
        for name in ("echo", "endless", *(f"day?format={name}" for name in ("text", "html", "sse", "ndjson"))):
            started = time.perf_counter()
            room = bytearray(1 << 18)
            total, most, looked_at = 0, server.memory(), started
            with server.ask(name) as sock:
                while count := sock.recv_into(room):
                    total += count
                    if time.perf_counter() > looked_at + 0.5:
                        most, looked_at = max(most, server.memory()), time.perf_counter()
            took = time.perf_counter() - started
            print(f"memory: at most {kibibytes(most)} in {name}, {total} bytes in {took:.0f} s", flush=True)


def drain(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it was closed
        while sock.recv(1 << 20):
            pass


def cost_of_logging(viewers: int, keep_bytes: int, pause: float, count: int = 5000) -> tuple[float, float, float]:
    """What a logging call takes, in seconds: median, 99th percentile, maximum. Paced by a pause between calls."""
    logger = logging.getLogger("bench")
    logger.setLevel(logging.INFO)
    took = []
    with streamlog.start({}, port=0, max_runs=1000, log=keep_bytes) as server:
        clients = []
        for number in range(viewers):
            client = socket.create_connection(("127.0.0.1", server.port))
            client.sendall(b"GET /log HTTP/1.1\r\nHost: localhost\r\n\r\n")
            threading.Thread(target=drain, args=(client,), daemon=True).start()
            clients.append(client)
            while len(server._site.runs.active) <= number:
                time.sleep(0.001)
        for number in range(count):
            started = time.perf_counter()
            logger.info("record %d of the bench", number)
            took.append(time.perf_counter() - started)
            if pause:
                time.sleep(pause)
        for client in clients:
            client.shutdown(socket.SHUT_RDWR)
            client.close()
    median, slow = percentiles(took)
    return median, slow, max(took)


def log(rounds: int) -> None:
    """Microseconds of a logging call: nobody watches, records are kept, one viewer, a hundred."""
    logging.getLogger().addHandler(logging.NullHandler())  # as of a program that has configured logging
    print("µs of a logging call           median      p99      max")
    for viewers, keep in ((0, 0), (0, 1 << 20), (1, 0), (100, 0)):
        for pause, pace in ((0.001, "1000/s"), (0.0, "flat out")):
            costs = [cost_of_logging(viewers, keep, pause) for _ in range(rounds)]
            best = [1e6 * statistics.median(column) for column in zip(*costs)]
            name = f"{viewers} viewers{', kept' if keep else ''}, {pace}"
            print(f"{name:28}", *(f"{value:8.1f}" for value in best))


# -------------------------------------------------------------------------------------------------------- tables


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"


def each_second(count: float) -> str:
    return f"{count:.0f}/s"


def bytes_each_second(count: float) -> str:
    return f"{count / 1e6:.0f} MB/s"


def kibibytes(count: float) -> str:
    return f"{count / 1024:.0f} KiB"


@dataclass
class Work:
    """What is measured of each server in a round: a figure for each row of the table."""

    measure: Callable[[Server], Figures]
    rows: dict[str, Callable[[float], str]]
    limit: str = "direct"  # the peer that the others are held against
    peers: Sequence[str] = ()  # those that can do it, where not all can
    warm_ups: int = 1


def say(*cells: str) -> None:
    print("|", " | ".join(cells), "|", flush=True)


def compare(work: Work, peers: Sequence[Peer], rounds: int) -> None:
    """A row for each figure: the medians of the rounds, and their ratio to the limit's."""
    peers = [peer for peer in peers if not work.peers or peer.name in work.peers]
    figures: dict[str, list[Sequence[float]]] = {peer.name: [] for peer in peers}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(run(peer)) for peer in peers]
        for number in range(work.warm_ups + rounds):
            for server in servers:
                try:
                    found = work.measure(server)
                except (TimeoutError, socket.timeout):  # gunicorn may not have a thread for each of a thousand
                    found = None
                if found and number >= work.warm_ups:
                    figures[server.peer.name].append(found)
    say("", *figures)
    say(*["---"] * (len(peers) + 1))
    for row, (name, text) in enumerate(work.rows.items()):
        whole = {peer: found for peer, found in figures.items() if len(found) == rounds}
        medians = {peer: statistics.median(one[row] for one in found) for peer, found in whole.items()}
        limit = medians.get(work.limit)
        cells = []
        for peer in figures:
            value = medians.get(peer)
            ratio = f" ({value / limit:.2f})" if value is not None and limit and peer != work.limit else ""
            cells.append("-" if value is None else text(value) + ratio)
        say(name, *cells)
    print(flush=True)


COMPARED = {
    "first": Work(first, {"first": duration}),
    "short": Work(short, {"short": each_second}),
    "bulk": Work(bulk, {"bulk": bytes_each_second}),
    "lines": Work(lines, {"lines": bytes_each_second}),
    "latency": Work(latency, {"latency, p50": duration, "latency, p99": duration}),
    "many": Work(many, {"many, memory": kibibytes, "many, p50": duration, "many, p99": duration}, warm_ups=0),
    "fan-out": Work(
        fan_out,
        {"fan-out, memory": kibibytes, "fan-out, p50": duration, "fan-out, p99": duration},
        peers=["streamlog"],
        warm_ups=0,
    ),
    "formats": Work(
        formats,
        dict.fromkeys(["html", "sse", "ndjson"], bytes_each_second),
        limit="Flask",
        peers=["streamlog", "Flask", "gunicorn"],
    ),
    "start": Work(
        start,
        {"start": duration, "start, as a script": duration},
        limit="http.server",
        peers=["streamlog", "http.server", "Flask", "gunicorn", "webhook"],
    ),
}
ALONE: dict[str, Callable[[int], None]] = {"import": import_, "memory": memory, "log": log}


def machine() -> str:
    model = platform.machine()
    with contextlib.suppress(OSError, IndexError):
        model = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    return f"{os.cpu_count()} cores of {model}, {platform.platform(terse=True)}, Python {platform.python_version()}"


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=",".join(peer.name for peer in PEERS), metavar="NAME,...")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND LINE")
    parser.add_argument("--serve-direct", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_direct:
        serve_direct(options.serve_direct)
    works = options.works or [*COMPARED, *ALONE]
    for name in works:
        if name not in COMPARED and name not in ALONE:
            parser.error(f"there is no work {name}; there are {', '.join([*COMPARED, *ALONE])}")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    peers = [peer for peer in PEERS if peer.name in options.peers.split(",") and peer.is_there()]
    peers += [Peer(*text.split("=", 1)) for text in options.peer]
    print(f"{machine()}, {datetime.date.today()}, medians of {options.rounds} rounds\n", flush=True)
    for name in works:
        if name in COMPARED:
            compare(COMPARED[name], peers, options.rounds)
        else:
            ALONE[name](options.rounds)


if __name__ == "__main__":
    main()
