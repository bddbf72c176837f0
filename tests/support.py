"""What the tests share: a server to talk to, a client that can send any bytes, and ways to look for what is left."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Union
from unittest import mock

import streamlog

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = str(ROOT / "streamlog.py")
THREADS = 2  # of streamlog.py without clients: one heeds signals, one accepts
SOAK = int(os.environ.get("STREAMLOG_SOAK", "200"))
IS_ROOT = os.geteuid() == 0
CERTIFICATE = str(ROOT / "tests" / "localhost.pem")


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 10.0) -> Any:
    """Wait for a condition that nothing tells of by event; fail when the deadline has passed."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.005)


def at_once(case: unittest.TestCase, function: Callable[..., None], *arguments: Sequence[Any]) -> None:
    """Call a function for each of some arguments, all at the same time, as most of what it does is to wait."""
    with ThreadPoolExecutor(len(arguments)) as pool:
        for future, each in [(pool.submit(function, *each), each) for each in arguments]:
            with case.subTest(each):
                future.result()


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return not os.path.exists("/proc/self")
    return False


def descriptors(pid: Union[int, str] = "self") -> set[str]:
    """What a process has open, for comparison."""
    found = set()
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.add(f"{entry}: {os.readlink(f'/proc/{pid}/fd/{entry}')}")
    return found


def resident_bytes(pid: Union[int, str] = "self") -> int:
    """The resident set of a process now."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def processor_seconds(pid: int) -> float:
    """What a process has had of the processors, for itself and within the system (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_held_back(pid: int) -> bool:
    """Whether a process that writes all the time has written nothing for a while (proc_pid_io(5))."""

    def written() -> bytes:
        return re.findall(rb"wchar: ([0-9]+)", Path(f"/proc/{pid}/io").read_bytes())[0]  # type: ignore[no-any-return]

    before = written()
    time.sleep(0.2)
    return written() == before


def count_threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def children(pid: Union[int, str] = "self") -> set[int]:
    """The children of a process, zombies included."""
    found: set[int] = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            found.update(map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split()))
    return found


class Answer(NamedTuple):
    """An answer as it came over the wire; `is_whole` says whether its framing was brought to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    trailers: Mapping[str, str]
    is_whole: bool


class Raw:
    """A client that sends any bytes and reads answers with no help from a library.

    The address is a host and port, or the path of a unix socket.
    """

    def __init__(
        self, address: Union[tuple[str, int], str], receive_buffer: int = 0, tls: Optional[ssl.SSLContext] = None
    ) -> None:
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.sock.settimeout(15)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            self.sock.connect(address)
            if tls:
                self.sock = tls.wrap_socket(self.sock, server_hostname="localhost", suppress_ragged_eofs=False)
        except BaseException:
            self.sock.close()
            raise
        self.buffer = b""

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def get(self, path: str, method: str = "GET", headers: Sequence[str] = (), version: str = "1.1") -> None:
        lines = [f"{method} {path} HTTP/{version}", "Host: localhost", "TE: trailers", *headers, "", ""]
        self.send("\r\n".join(lines).encode())

    def more(self) -> bool:
        """Take in what comes next; False at the end."""
        try:
            data = self.sock.recv(65536)
        except (ConnectionResetError, ssl.SSLError):
            self.was_reset = True
            data = b""
        self.buffer += data
        return bool(data)

    was_reset = False

    def read_until(self, mark: bytes) -> bytes:
        """Everything up to and with a mark."""
        while mark not in self.buffer:
            if not self.more():
                raise EOFError(self.buffer[-500:])
        found, self.buffer = self.buffer.split(mark, 1)
        return found + mark

    def read_head(self) -> tuple[int, dict[str, str]]:
        first, *lines = self.read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        headers: dict[str, str] = {}
        for line in filter(None, lines):
            name, _, value = line.partition(": ")
            headers[name.lower()] = f"{headers[name.lower()]}, {value}" if name.lower() in headers else value
        return int(first.split()[1]), headers

    def read_chunk(self) -> Optional[bytes]:
        """A chunk; None for the final one, whose trailers are left to read."""
        size = int(self.read_until(b"\r\n"), 16)
        if not size:
            return None
        while len(self.buffer) < size + 2:
            if not self.more():
                raise EOFError
        data, self.buffer = self.buffer[:size], self.buffer[size + 2 :]
        return data

    def read_answer(self, method: str = "GET") -> Answer:
        status, headers = self.read_head()
        body, trailers, is_whole = b"", {}, True
        try:
            if method == "HEAD" or status == 204:
                pass
            elif headers.get("transfer-encoding") == "chunked":
                for chunk in iter(self.read_chunk, None):
                    body += chunk
                while True:
                    line = self.read_until(b"\r\n").decode()
                    if line == "\r\n":
                        break
                    trailers[line.partition(": ")[0]] = line.partition(": ")[2].strip()
            elif "content-length" in headers:
                while len(self.buffer) < int(headers["content-length"]):
                    if not self.more():
                        raise EOFError
                size = int(headers["content-length"])
                body, self.buffer = self.buffer[:size], self.buffer[size:]
            else:
                while self.more():
                    pass
                body, self.buffer, is_whole = self.buffer, b"", not self.was_reset
        except EOFError:
            is_whole = False
        return Answer(status, headers, body, trailers, is_whole)

    def is_closed(self) -> bool:
        """Wait until the server closes the connection; the socket's own time-out fails the test if it does not."""
        while self.more():
            pass
        return True

    def reset(self) -> None:
        """Leave by a reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()


Commands = Mapping[str, Union[str, streamlog.Command]]


class ServerCase(unittest.TestCase):
    """A case with servers of its own. At its end nothing of them may be left: no thread, descriptor or child."""

    def setUp(self) -> None:
        self.folder = Path(self.enterContext_(tempfile.TemporaryDirectory()))
        has_proc = os.path.exists("/proc/self/fd")
        before = (set(threading.enumerate()), descriptors() if has_proc else set(), children() if has_proc else set())

        def check() -> None:
            def left() -> list[object]:
                after = (
                    set(threading.enumerate()),
                    descriptors() if has_proc else set(),
                    children() if has_proc else set(),
                )
                return [found for old, new in zip(before, after) for found in new - old]  # type: ignore[operator]

            with contextlib.suppress(AssertionError):
                wait_until(lambda: not left(), "nothing is left")
            self.assertEqual(left(), [])

        self.addCleanup(check)

    def enterContext_(self, context: Any) -> Any:
        """enterContext, which is of Python 3.11."""
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    def serve(self, commands: Commands, **settings: Any) -> streamlog.Server:
        made = {name: streamlog.Command(given) if isinstance(given, str) else given for name, given in commands.items()}
        server = streamlog.Server(
            made, streamlog.Settings(**{"port": 0, "grace_seconds": 2.0, "insight": False, **settings})
        )

        def close() -> None:
            with mock.patch.object(streamlog, "_CUT_SECONDS", 0.01):  # of the test no client waits any more
                server.close()

        self.addCleanup(close)
        return server.start()

    def connect(self, server: streamlog.Server, **options: Any) -> Raw:
        client = Raw(server._socket_path or ("127.0.0.1", server.port), **options)
        self.addCleanup(client.sock.close)
        return client

    def fetch(
        self,
        server: streamlog.Server,
        path: str,
        method: str = "GET",
        headers: Sequence[str] = (),
        body: bytes = b"",
        version: str = "1.1",
    ) -> Answer:
        """One request on a connection of its own."""
        with self.connect(server) as client:
            if body:
                headers = [*headers, f"Content-Length: {len(body)}"]
            client.get(path, method, headers, version)
            if body:
                client.send(body)
            return client.read_answer(method)

    def metric(self, server: Union[streamlog.Server, Raw], sample: str) -> float:
        """A sample of /-/metrics; 0 if there is none. (`streamlog_clients` counts the client that asks too.)"""
        with self.connect(server) if isinstance(server, streamlog.Server) else server as client:
            client.get("/-/metrics")
            answer = client.read_answer()
        self.assertEqual(answer.status, 200)
        lines = answer.body.decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == sample)

    def active_runs(self, server: streamlog.Server, name: str) -> float:
        """How many runs of a command go on."""
        return self.metric(server, f'streamlog_runs_active{{command="{name}"}}')

    def has_no_clients(self, server: streamlog.Server) -> bool:
        """Whether the server has no client but the one that asks."""
        return self.metric(server, "streamlog_clients") == 1

    def python(self, script: str) -> str:
        """A command line that runs a Python script, unbuffered."""
        path = self.folder / f"script{len(list(self.folder.iterdir()))}.py"
        path.write_text(script)
        return f"{sys.executable} -u {path}"

    def make_gate(self) -> Path:
        """A FIFO where a command waits by `read _ <> GATE`, until the test writes a line into it.

        The test has it open, too: else its own opening would wait for ever for a command that never comes.
        """
        gate = self.folder / "gate"
        os.mkfifo(gate)
        self.addCleanup(os.close, os.open(gate, os.O_RDWR))
        return gate

    def log_of(self, server_level: str = "INFO") -> Any:
        """What the server logs within the block, as lines."""
        return self.assertLogs("streamlog", server_level)


class Program:
    """streamlog.py as a process of its own, perhaps behind the words of a program that executes it."""

    def __init__(self, *arguments: str, prefix: Sequence[str] = (), **options: Any) -> None:
        command = [*prefix, sys.executable, PROGRAM, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, **{"cwd": ROOT, **pipes, **options})
        assert self.process.stdout
        self.first_line = self.process.stdout.readline()
        found = re.search(r"https?://\S+:([0-9]+)|unix:", self.first_line)
        if not found:
            raise AssertionError(f"did not start: {self.first_line!r} {self.process.communicate(timeout=10)}")
        self.port = int(found[1] or 0)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise

    def connect(self) -> Raw:
        return Raw(("127.0.0.1", self.port))

    def fetch(self, path: str) -> Answer:
        with self.connect() as client:
            client.get(path)
            return client.read_answer()

    def end(self, seconds: float = 10) -> tuple[int, str]:
        """Wait for the end; the exit code and what it wrote to stderr."""
        _, stderr = self.process.communicate(timeout=seconds)
        return self.process.returncode, stderr


def trusting() -> ssl.SSLContext:
    """What a client speaks TLS with that trusts the tests' certificate."""
    context = ssl.create_default_context(cafile=CERTIFICATE)
    context.options &= ~0x80  # SSL_OP_IGNORE_UNEXPECTED_EOF, which Python 3.9 sets: it takes any cut for an end
    return context


def try_connect(address: Union[tuple[str, int], str]) -> Optional[Raw]:
    """A client, once somebody listens there."""
    try:
        return Raw(address)
    except OSError:
        return None


def run_program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run streamlog.py to its end."""
    return subprocess.run(
        [sys.executable, PROGRAM, *arguments],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 20, "check": False, **options},
    )


def pids_in(text: bytes) -> Iterator[int]:
    """The numbers that a command printed of its processes."""
    yield from map(int, re.findall(rb"[0-9]+", text))
