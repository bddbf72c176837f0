#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""streamlog: run a command per URL and stream its output live, to curl and to a plain browser tab.

in a program:
  server = streamlog.start({"disk": "df -h", "sync": sync}, port=0)   # in threads; server.url says where
  for piece in streamlog.stream("ping -c 3 {host}", host="localhost"): # bytes, as they come
  async for piece in streamlog.stream(["make", "-k"]):                 # without a thread, in asyncio
  return StreamingResponse(streamlog.stream("make"), media_type="text/plain")    # Starlette, FastAPI
  application = streamlog.wsgi({"disk": "df -h"})                      # for gunicorn, or under a prefix

  A command is a line, a list of arguments, a function or a Command. A function is a task: what it
  returns, yields, logs and prints to output() goes to the client, its parameters are those of the
  URL, an Error that it raises first is the answer, and stopping() tells that it should end. /log
  follows this program's log, /stacks shows its threads. Settings describes what start, serve and
  wsgi take; Stream is what stream returns.

usage: streamlog [OPTION]... [[METHOD:]NAME=COMMAND LINE | COMMAND LINE]...

  python streamlog.py                             diagnostics of this machine
  python streamlog.py 'disk=df -h' 'hosts=tail -n {lines:int=5} -F /etc/hosts'
  curl -N 'localhost:8000/hosts?lines=2'          live; Ctrl-C ends the remote tail too

options:
OPTIONS
  -h                   print the usage and the options
      --help           print this text
      --version        print the version and exit
  Each option can also be set by the environment, --max-runs by STREAMLOG_MAX_RUNS (several
  values with spaces between). Options win.

commands:
  A command line is split as a shell would split it and run without one; a leading ! asks for
  /bin/sh. {name} is a required parameter of the URL's query, {name=default} an optional one,
  and {name:type} has a type: word (the default), int, float, path, text, a choice such as
  nginx|redis, or a regular expression that the value must match in full. A value is one
  argument, and never an option. {{name}} stands for {name} itself. In a ! script a text or a
  regular expression may stand only in assignments at the very beginning: !m={m:text}; echo "$m".
  POST:NAME=... is run by POST only. NAME=-, or -, is standard input, for any number of viewers.

commands file:
  A section for each command, [NAME], with command = COMMAND LINE and any of these options:
    about            a description
    method           GET or POST
    timeout, max     seconds that a run may take (0: any time); runs of it at a time
    stdin            yes: the body of a POST or PUT is its input
    pty, terminal    yes: run it on a terminal (echo: that echoes input); its size, as in 132x40
    stderr           merge, separate or discard
    shared           yes: a client joins the run that goes on with the same values
    stop             the signal that asks it to end: TERM, INT and so on
    headers          request headers that it gets as variables: User-Agent as HTTP_USER_AGENT
    cwd, env         its directory; variables, NAME=value, one a line
    type             Content-Type of output that is not plain text
  [DEFAULT] holds options for all. Lines that begin with # or ; are comments. The variables
  REMOTE_ADDR and REMOTE_USER (token or read-token) tell a command whose request it serves.
  SIGHUP reads the file and the certificate again; at a terminal it ends the server, as TERM does.

what a client sees:
  The output is the body, byte for byte, as it comes. When the client leaves, the command's
  process group gets SIGTERM, then SIGKILL. A run that the server ends is cut without the final
  chunk, so that curl exits with 18; only a page is not. A client that sends "TE: trailers" gets
  the exit code in the trailer Exit-Code. To a command that takes input, curl -T FILE URL or
  --data-binary @FILE sends it, and curl -sN -T . URL is a live session. The query takes, besides
  the command's own parameters:
    format=FORMAT    text, html (a page), sse (events) or ndjson (an object a line); or by Accept
    timestamps=1     the time before each line of text and html
    hostname=1       this machine's name before each line, or in each object
    heartbeat=SEC    after so long a silence, say that the run goes on
    footer=1         a last line with exit code and duration, as a browser gets; 0 omits it
    wait             answer when the run has ended: exit code in a header, 500 if it failed,
                     507 if its output is more than is kept
    async=1          start a run that outlives the connection, and answer with its address

addresses of the server:
  /                  the commands: a page with a row for each, or lines for curl
  /-/runs            the runs that go on, and those kept; a page can stop them
  /-/runs/ID         GET replays a kept run and follows it (tail=N lines, follow=0, Range); as JSON,
                     the state of any run. DELETE stops it, or drops it if it has ended
  /-/healthy, /-/metrics    for load balancers and for Prometheus

for developers:
  The file reads from top to bottom as a request travels; a callee stands below its caller.
    errors and settings   Error, Settings: one table for the API, the command line and --help
    server                Server accepts a client and gives it a thread; _Connection is its socket as
                          a file, where _poll waits; _Handler reads a request and sends the answer
    requests              bytes to a Request, strictly
    access                Access checks Host, Origin and token
    site                  Site turns a Request into a Reply; _Entry is a run as it lists it
    commands              Command puts the values of a URL in their places
    runs                  Run: a Process, a Task or a _Replay, with output to poll and read
    formats               Format, Html, Sse, Ndjson: output to bytes; then wfile.write sends them
    transcripts, insight, pages, embedding, WSGI, command line
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the start without a traceback
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        del sys.path[0]  # a file beside this one, perhaps in a shared folder, must not pass for a module of Python's
if os.name != "posix" or sys.version_info < (3, 9):  # checked first: an import below would fail with less help
    _NEEDS = "streamlog needs Python 3.9 or newer on a POSIX system (Linux, macOS; on Windows, WSL)"
    if __name__ == "__main__":
        sys.exit(_NEEDS)
    raise ImportError(_NEEDS)

import _thread
import atexit
import base64
import codecs
import collections
import contextvars
import dataclasses
import datetime
import enum
import errno
import fcntl
import gc
import glob
import hashlib
import hmac
import html
import http.server
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import re
import resource
import secrets
import select
import shlex
import shutil
import socket
import socketserver
import ssl
import stat
import string
import struct
import subprocess
import tempfile
import termios
import threading
import time
import traceback
import typing
import unicodedata
import urllib.parse
from bisect import bisect_right
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from http import HTTPStatus
from logging import Logger, LogRecord
from math import inf
from mmap import ACCESS_COPY, mmap
from select import POLLIN, POLLOUT
from threading import Condition, Lock, RLock, Thread
from time import monotonic
from types import MappingProxyType, SimpleNamespace
from typing import IO, Any, Callable, Literal, NamedTuple, Optional, TextIO, Union
from weakref import WeakSet

__version__ = "0.1.0"
__all__ = ["Command", "ConfigError", "Error", "Server", "Settings", "Stream"]
__all__ += ["output", "serve", "start", "stopping", "stream", "wsgi"]

_log = logging.getLogger("streamlog")

_Texts = Mapping[str, str]
_Fields = list[tuple[str, str]]  # names and values, in their order
_Events = dict[int, int]  # descriptors to events (poll(2))
_Function = Callable[..., object]
_Commands = Mapping[str, "Command"]
_Runnable = Union[str, Sequence[Union[str, os.PathLike[str]]], _Function]
# From where a server can be reached. The mode of a unix socket decides who may connect.
_Reach = Literal["unix", "loopback", "network"]

_NO_TEXTS: _Texts = MappingProxyType({})


# ---------------------------------------------------------------------------------------------
# errors and settings: every refusal is an Error, raised where it is found and answered in one place


class Error(Exception):
    """A refusal: one sentence that says what to do, with the HTTP status and headers of the answer."""

    def __init__(self, message: str, status: int = 400, headers: _Texts = _NO_TEXTS) -> None:
        super().__init__(message)
        if HTTPStatus(status) < 300 or status == 304:  # which have no such body
            raise ValueError(f"the status of an error is 300 or more, but not 304: {status}")
        self.status = status
        self.headers = headers


class ConfigError(Error):
    """A mistake in a command or a setting, found at start."""


class _Rule(NamedTuple):
    """How a setting or an option of a command is read from text, when its value is right, and what an error demands, of
    a text and of a program."""

    read: Callable[[str], Any]
    is_right: Callable[[Any], object]
    demand: str
    value_demand: str = ""

    def check(self, name: str, value: object) -> None:
        """Raises ConfigError unless a value that a program gives is right."""
        kind = _KINDS.get(self.read, object)
        with suppress(AttributeError, TypeError):
            is_truth = kind is not object and isinstance(value, bool)  # which is an int, too
            if isinstance(value, kind) and self.is_right(value) and not is_truth:
                return
        raise ConfigError(f"{name} must be {self.value_demand or self.demand}: {value!r}")

    def parse(self, name: str, text: str) -> Any:
        """The value of a text. Raises ConfigError."""
        with suppress(ValueError):
            value = self.read(text)
            if self.is_right(value):
                return value
        raise ConfigError(f"{name} must be {self.demand}: {text!r}")


def _read_size(text: str) -> int:
    unit = " KMGT".find(text[-1:].upper())
    return int(text[:-1]) << 10 * unit if unit > 0 else int(text)


# What a program gives for a value that is read by these; anything for others.
_KINDS: Any = {float: (int, float), int: int, _read_size: int, str: str, os.fspath: (str, os.PathLike)}


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and [*map(type, value)] == [int, int]


def _read_switch(text: str) -> Any:
    import configparser

    return configparser.ConfigParser.BOOLEAN_STATES.get(text.lower(), text)


_SWITCH_RULE = _Rule(_read_switch, (True, False).__contains__, "yes or no", "True or False")
_TEXT = _Rule(str, lambda text: True, "text")
_PAIR = _Rule(tuple, _is_pair, "(soft, hard), two whole numbers")
_FILE = _Rule(os.fspath, bool, "the name of a file")
_FOLDER = _Rule(os.fspath, bool, "the name of a directory")
_SECONDS = _Rule(float, lambda seconds: 0 <= seconds < 1e9, "a number of seconds, 0 or more")
_COUNT = _Rule(int, range(1_000_000).__contains__, "a whole number")
_COUNT_1 = _Rule(int, range(1, 1_000_000).__contains__, "a whole number above 0")
_PORT = _Rule(int, range(65536).__contains__, "a number from 0 to 65535")
_SIZE = _Rule(_read_size, lambda size: size >= 0, "a number of bytes, or of K, M, G or T of them", "a number of bytes")
_TERMINAL = _Rule(
    lambda text: tuple(map(int, text.lower().split("x"))),
    lambda size: _is_pair(size) and 0 < min(size) <= max(size) < 10000,
    "COLUMNSxLINES, as in 80x24",
    "columns and lines, as in (80, 24)",
)
_HOST_PATTERN = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)"
_HOST = _Rule(str, re.compile(_HOST_PATTERN).fullmatch, "a host name, without a port")
_URL = _Rule(str, re.compile(r"(?i:https?)://[!$-~]+").fullmatch, "a URL, as in https://example.com/ops")
_ORIGIN = _Rule(
    str,
    re.compile(f"(?i:https?)://{_HOST_PATTERN}(:[0-9]{{1,5}})?").fullmatch,
    "http://HOST or https://HOST, with a port if it has one",
)


def _setting(default: Any, flag: str, rule: _Rule = _TEXT, is_shown: bool = True) -> Any:
    """A field. `flag` is how the command line sets it, if it can, and what it does; {} stands for the default."""
    flag, _, about = flag.format(default).partition(" | ")
    return dataclasses.field(default=default, repr=is_shown, metadata={"flag": flag, "about": about, "rule": rule})


@dataclass(frozen=True)
class Settings:
    """What a server is told once, at start. Durations are in seconds. Raises ConfigError."""

    port: int = _setting(8000, "-p, --port PORT | listen on this port ({}); 0 picks a free one", _PORT)
    bind: str = _setting("127.0.0.1", "-b, --bind ADDRESS | listen on this address ({}), or on unix:PATH")
    timeout_seconds: Optional[float] = _setting(None, "--timeout SEC | stop a run after so long (0: never)", _SECONDS)
    grace_seconds: float = _setting(5.0, "--grace SEC | seconds that a run has to end before SIGKILL ({:g})", _SECONDS)
    drain_seconds: float = _setting(2.0, " | seconds to read what others hold open after the exit ({:g})", _SECONDS)
    stall_seconds: float = _setting(0.0, "--stall SEC | stop a run whose client takes nothing for so long", _SECONDS)
    max_output_bytes: int = _setting(0, "--max-output N | stop a run after N bytes, or 10K, 10M, 10G (0: never)", _SIZE)
    max_runs: int = _setting(64, "--max-runs N | runs at a time; one more gets a 503 ({})", _COUNT_1)
    token: str = _setting("", " | what each request must carry, as a bearer or a password", _TEXT, False)
    read_token: str = _setting("", " | another that may only look: no POST, PUT or DELETE, no ?async", _TEXT, False)
    tls_cert: str = _setting("", "--tls-cert FILE | speak TLS, with the certificate in this PEM file", _FILE)
    tls_key: str = _setting("", "--tls-key FILE | its key, if that is in a file of its own", _FILE)
    url: str = _setting("", "--url URL | what printed addresses begin with, behind a proxy", _URL)
    no_auth: bool = _setting(
        False, "--no-auth | allow an address that other machines reach, without a token", _SWITCH_RULE
    )
    allow_hosts: Sequence[str] = _setting((), "--allow-host NAME | accept this server name; may be repeated", _HOST)
    allow_origins: Sequence[str] = _setting(
        (), "--allow-origin ORIGIN | let pages of this origin use the server; may be repeated", _ORIGIN
    )
    heartbeat_seconds: Optional[float] = _setting(
        None,
        " | silence before a note that a run goes on (by default, 15 in pages and ndjson under WSGI)",
        _SECONDS,
    )
    head_seconds: float = _setting(10.0, " | seconds for a request's head to arrive ({:g})", _SECONDS)
    idle_seconds: float = _setting(60.0, " | seconds that a connection may wait for its next request ({:g})", _SECONDS)
    keepalive_seconds: int = _setting(15, " | silence after which a client is probed, by tcp(7) ({})", _COUNT_1)
    child_nofile: Optional[tuple[int, int]] = _setting(None, " | (soft, hard) RLIMIT_NOFILE of commands", _PAIR)
    terminal_size: tuple[int, int] = _setting(
        (80, 24), "--terminal COLUMNSxLINES | size of the terminal of commands that have one (80x24)", _TERMINAL
    )
    transcripts: str = _setting(
        "", "--transcripts DIR | keep transcripts in this directory (TMPDIR, or /var/tmp)", _FOLDER
    )
    transcript_bytes: int = _setting(16 << 20, "--transcript-size N | bytes kept of a run, the newest (16M)", _SIZE)
    transcripts_bytes: int = _setting(256 << 20, "--transcripts-size N | bytes kept of all runs (256M)", _SIZE)
    input_bytes: int = _setting(1 << 20, "--max-input N | bytes of input that ?async takes (1M)", _SIZE)
    kept_runs: int = _setting(100, "--keep-runs N | ended runs that are kept ({})", _COUNT)
    kept_seconds: float = _setting(3600.0, "--keep SEC | seconds that an ended run is kept for ({:g})", _SECONDS)
    linger_seconds: float = _setting(5.0, "--linger SEC | seconds a shared run outlives its viewers ({:g})", _SECONDS)
    insight: bool = _setting(True, " | serve /log, /stacks and /level of this program", _SWITCH_RULE)
    log: int = _setting(0, " | bytes of this program's newest log records that are kept for /log (0: none)", _SIZE)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            rule = field.metadata["rule"]
            if value != field.default:
                values = value if field.default == () else [value]
                if isinstance(values, str) or not isinstance(values, Iterable):
                    raise ConfigError(f"{field.name} must be a list; each item must be {rule.demand}: {value!r}")
                for one in values:
                    rule.check(field.name, one)
        if self.read_token and self.token in ("", self.read_token):
            raise ConfigError("a token that may only look needs another beside it, which may do all")
        if self.tls_key and not self.tls_cert:
            raise ConfigError(f"a TLS key needs its certificate: set {self._name('tls_cert')}")

    def _name(self, field: str) -> str:
        """A setting, as whoever made these settings gives it: a keyword, or an option of the command line."""
        return f"{field}="


for _field in dataclasses.fields(Settings):
    Settings.__doc__ = f"{Settings.__doc__}\n\n    {_field.name}: {_field.metadata['about']}"


# ---------------------------------------------------------------------------------------------
# server: the listener, a client's connection, and the handler that reads requests from it and sends the answers

_DESCRIPTORS_MAX = 65536  # one machine has no use for more threads than this
# A new thread must find this much memory, its stack of 8 MiB included: Thread.start waits for ever for one that fails
# before it runs (cpython 140746).
_THREAD_BYTES = 16 << 20
_SWEEP_SECONDS = 60.0  # between looks for runs that are kept no longer
_BUSY_ANSWER = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Server(http.server.ThreadingHTTPServer):
    """The commands, behind a listening socket. Binds at once: raises OSError or ConfigError if it cannot.

    commands: by name. settings: see Settings. listener: a socket that listens already, in place of one at
    `settings.bind`; it is closed with the server. `url` and `port` say where it listens. `serve_forever` serves until
    `shutdown`; `start` does so in threads. Close it with `close`, or use it as a context manager.
    """

    request_queue_size = 4096  # the system caps it (listen(2)); a connection beyond it is delayed by a second
    allow_reuse_port = False  # a second server at the same address is a mistake
    _made_socket: os.stat_result | None = None  # the socket's file, if it is ours to remove
    _thread: Thread | None = None
    _is_closing = False
    _warned_at = -inf

    def __init__(
        self, commands: _Commands, settings: Settings = Settings(), listener: Optional[socket.socket] = None
    ) -> None:
        self.address_family, address, self._reach = _find_address(settings, listener)
        self._tls_context = _make_tls_context(settings)
        self._scheme = "https" if self._tls_context else "http"
        self._settings = settings
        self._socket_path = os.fsdecode(address) if self._reach == "unix" else ""
        self.port = 0
        self.url = f"unix:{self._socket_path}"  # others are known once they are bound
        self._closing = _Bell()  # every thread polls it beside its own work
        self._site = Site(commands, settings, self._reach, self._socket_path, self._closing)
        self._owner = os.getpid()
        self._changed = Condition()  # guards the clients
        self._clients = self._site.clients
        self._idle = collections.OrderedDict[_Connection, bool]()  # the longest idle first
        # Half of the descriptors are for clients, or the runs could shut all others out.
        self._client_max = _descriptor_limit(resource.getrlimit(resource.RLIMIT_NOFILE)[0]) // 2
        self._site.runs.limit(self._client_max)
        super().__init__(address, _Handler, bind_and_activate=False)
        try:
            if listener is None:
                self.server_bind()
                self.server_activate()
            else:
                self.socket.close()
                self.socket = listener
            self.socket.setblocking(False)
            if not self._socket_path:
                host, self.port = self.socket.getsockname()[:2]
                self.url = f"{self._scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"
            self._site.open_source()
        except BaseException:
            self.close()
            raise

    def server_bind(self) -> None:
        """Bind to the address, or make the file of a unix socket. (http.server's own would ask the DNS for a name.)"""
        path = self._socket_path
        if path:
            _clear_socket(path)
        socketserver.TCPServer.server_bind(self)
        if path:
            self._made_socket = os.stat(path)
            os.chmod(path, 0o600)  # in time: nobody can connect before it listens

    def start(self) -> Server:
        """Serve in threads of its own, and return at once. The end of the program closes it too."""
        if self._is_closing:
            raise RuntimeError("this server is closed: make another one")
        _watch_program()
        _open.add(self)
        _files.add(self.socket)
        self._thread = _start_thread("streamlog", self.serve_forever)
        return self

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until shutdown. The main thread looks up at intervals: a signal that comes right before it waits would
        else be acted on only after the next event."""
        interval = poll_interval if threading.current_thread() is threading.main_thread() else inf
        if self._owner != os.getpid():  # one of several processes that share a listener ends by itself
            self._owner = os.getpid()
            self._closing = _Bell()
            self._site.runs._closing = self._closing
        sweep = 0.0
        while not self._is_closing:
            try:
                if monotonic() >= sweep:  # what is too old goes even if nobody looks
                    self._site.runs.listed()
                    sweep = monotonic() + _SWEEP_SECONDS
                watched = {self._closing.descriptor: POLLIN, self.fileno(): POLLIN}
                if self.fileno() in _poll(watched, min(sweep, monotonic() + interval)):
                    self._accept()
            except (BlockingIOError, ConnectionAbortedError):  # the client has left already
                pass
            except Exception as error:  # whatever happens to one client, the next one is accepted
                with suppress(Exception):  # memory may be short here, too
                    self._make_room(error)

    def _accept(self) -> None:
        """Serve a new client in a thread, if need be in the place of the one that has been idle for longest."""
        sock, address = self.socket.accept()
        try:
            client: Any = _Connection(sock, self)
        except BaseException:
            sock.close()
            raise
        if len(self._clients) >= self._client_max and not self._evict():
            client.turn_away()
            return
        with self._changed:
            self._clients.add(client)
        try:
            mmap(-1, _THREAD_BYTES, access=ACCESS_COPY).close()
            self.process_request(client, f"{address[0]}:{address[1]}" if address else "unix")
        except BaseException:  # most likely no memory or thread is left
            client.turn_away()
            self.shutdown_request(client)
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a bug. It costs its connection only."""
        _log.exception("a bug: client=%s", client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a client's socket."""
        request.close()
        with self._changed:
            self._clients.discard(request)
            self._changed.notify_all()

    def _make_room(self, error: Exception) -> None:
        """Evict an idle client, do not spin meanwhile, and log the shortage now and then."""
        if self._is_closing:  # the listener may be closed already
            return
        self._evict()
        time.sleep(0.1)
        if monotonic() >= self._warned_at + 60:
            self._warned_at = monotonic()
            _log.warning("cannot serve a new connection: %r", error)  # a host program may have filters that fail

    def _evict(self) -> bool:
        """Close the connection that has been idle for longest; False if none is idle."""
        with suppress(KeyError, OSError):
            client, _ = self._idle.popitem(last=False)
            client.sock.shutdown(socket.SHUT_RDWR)  # its thread wakes up and closes it
            return True
        return False

    def replace(self, commands: _AllGiven) -> None:
        """Serve these commands from now on, and read the certificate again. On a ConfigError nothing changes."""
        made = _make_commands(commands)
        self._tls_context = _make_tls_context(self._settings)
        self._site.commands = made  # runs go on, and counts stay

    def __repr__(self) -> str:
        return f"<streamlog.Server at {self.url}>"

    def shutdown(self) -> None:
        """Begin to close: accept no more clients, stop every run. Returns at once; a signal handler may call it."""
        self._is_closing = True
        self._closing.ring()

    def close(self) -> None:
        """Shut down and wait, for the grace time and a second at most. May be called twice.

        Steps: 1. no more clients are accepted; 2. the file of a unix socket is removed, if it is still ours; 3. each
        thread stops its run, tells its client, and ends; 4. runs that outlast their grace time are killed; 5. the
        transcripts and the bell are closed.
        """
        if self._owner != os.getpid():  # a fork's copy
            return
        count = len(self._site.runs.active)
        if count:
            _log.info("closing: %d runs are asked to end, and killed after %g s", count, self._settings.grace_seconds)
        self.shutdown()
        if self._thread:
            self._thread.join()
        super().server_close()
        made, self._made_socket = self._made_socket, None
        with suppress(OSError):
            if made and os.path.samestat(made, os.lstat(self._socket_path)):
                os.unlink(self._socket_path)
        if not self._wait_until_idle(self._settings.grace_seconds + 0.5):
            self._site.runs.kill()
            self._wait_until_idle(0.5)
        self._site.close()
        if not self._clients:
            self._closing.close()

    def server_close(self) -> None:
        """Close, as a `with` block does."""
        self.close()

    def _wait_until_idle(self, seconds: float) -> bool:
        """Wait until all clients and kept runs are gone; False if some are left after so long."""
        deadline = monotonic() + seconds
        with self._changed:
            are_gone = self._changed.wait_for(lambda: not self._clients, seconds)
        return self._site.runs.join(deadline) and are_gone


def _find_address(settings: Settings, listener: socket.socket | None) -> tuple[int, Any, _Reach]:
    """The address family, the address in it, and from where that can be reached.

    Raises OSError, and ConfigError for an address that needs a token.
    """
    if listener:
        family = listener.family
        address = listener.getsockname()
    elif settings.bind.startswith("unix:"):
        family = socket.AF_UNIX
        address = settings.bind[5:]
        if not address or "\0" in address:
            raise ConfigError(f"a unix socket needs a path, as in unix:/run/streamlog.sock: {settings.bind!r}")
    else:
        # What this machine can use comes first (RFC 6724): it may have no IPv6, or nothing else.
        family, *_, address = socket.getaddrinfo(settings.bind, settings.port, type=socket.SOCK_STREAM)[0]
    if family == socket.AF_UNIX:
        return family, address, "unix"
    is_loopback = ipaddress.ip_address(address[0]).is_loopback
    if not (is_loopback or settings.token or settings.no_auth):
        raise ConfigError(
            f"other machines can reach {address[0]} and could run every command: set a token (by "
            f"{settings._name('token')}), bind (or ListenStream=) 127.0.0.1 and connect through ssh -L, or allow it by "
            f"{settings._name('no_auth')}"
        )
    return family, address, "loopback" if is_loopback else "network"


def _clear_socket(path: str) -> None:
    """Remove the socket of a dead server (unix(7)). Raises OSError if the server lives, or the file is no socket."""
    with suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
        found = os.lstat(path)
        if not stat.S_ISSOCK(found.st_mode):
            raise OSError(errno.EEXIST, "there is a file that is no socket")
        probe.settimeout(1)
        with suppress(ConnectionRefusedError):
            probe.connect(path)
            raise OSError(errno.EADDRINUSE, "another server is using it")
        if os.path.samestat(found, os.lstat(path)):  # and not one that another server has just made
            os.unlink(path)


def _make_tls_context(settings: Settings) -> ssl.SSLContext | None:
    """TLS 1.2 or newer, for HTTP/1.1, if there is a certificate. Raises ConfigError for files that cannot be used."""
    cert = settings.tls_cert
    key = settings.tls_key or cert
    if not cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)  # LibreSSL lacks it
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key, lambda: "")  # or OpenSSL would ask the terminal for a pass phrase
    except OSError as error:
        raise ConfigError(
            f"cannot use the certificate {cert!r} with the key {key!r}: both must be readable PEM, belong together and "
            f"have no pass phrase; {settings._name('tls_key')} names a key that is not beside the certificate ({error})"
        ) from None
    return context


def _descriptor_limit(limit: int) -> int:
    """A limit of RLIMIT_NOFILE as a number to reckon with."""
    return _DESCRIPTORS_MAX if limit == resource.RLIM_INFINITY else min(limit, _DESCRIPTORS_MAX)


def _start_thread(name: str, function: _Function, *arguments: object) -> Thread:
    """Call a function in a thread of its own, which the end of the program does not wait for. Raises RuntimeError."""
    thread = Thread(target=function, args=arguments, daemon=True, name=name)
    thread.start()
    return thread


_CUT_SECONDS = 0.5  # for the rest of an answer to reach the client while the server closes
# poll reports by this that the client has closed, even while unread data waits. Elsewhere we look (MSG_PEEK).
_HANG_UP = getattr(select, "POLLRDHUP", 0)
# TLS may have to write before it can read, and to read before it can write.
_TLS_EVENTS: Any = {ssl.SSLWantReadError: POLLIN, ssl.SSLWantWriteError: POLLOUT}


def _poll(watched: _Events, deadline: float = inf) -> _Events:
    """Wait until a descriptor is ready or monotonic() passes the deadline. Maps descriptors to events (poll(2))."""
    poller = select.poll()
    for descriptor, events in watched.items():
        poller.register(descriptor, events)
    seconds = max(0.0, min(deadline - monotonic(), 1e6))  # a caller looks again after that
    return dict(poller.poll(math.ceil(seconds * 1000)))


class _Gone(Exception):
    """The client cannot be talked to any more; the text says why."""


class _Late(_Gone):
    """It has not sent or taken anything in time."""


class _Connection(io.RawIOBase):
    """A client's socket as a file, and as the `wfile` of its handler.

    It frames what is written, and never blocks in a system call. All waiting is done in `attempt`, which also sees the
    client leave and the server close, and looks after the run whose output is sent. Raises _Gone.
    """

    run: Run | None = None  # whose output is being written
    deadline = inf  # for reading and writing
    is_chunked = False  # whether what is written goes out in chunks
    body_bytes = 0  # that were written since the head
    _has_unread = False  # known only where poll does not report a hang-up
    _cut_at = inf  # when an answer that is still being sent is cut, because the server closes
    status = 0  # of the last answer that was sent

    def __init__(self, sock: socket.socket, server: Server) -> None:
        self.sock = sock
        self._server = server
        self._lock = Lock()  # TLS objects serve one thread at a time
        _files.add(self)
        sock.setblocking(False)
        seconds = server._settings.keepalive_seconds  # of silence, before the client is probed (tcp(7))
        options = {
            socket.TCP_NODELAY: 1,  # or the end of an answer would wait for the acknowledgement of its head: 40 ms
            getattr(socket, "TCP_KEEPIDLE", 0x10): seconds,  # TCP_KEEPALIVE on macOS
            socket.TCP_KEEPINTVL: max(1, seconds // 3),
            socket.TCP_KEEPCNT: 3,
            # Of what is sent slowly the system takes all, for hours, though the client has vanished. 0: its own time
            getattr(socket, "TCP_USER_TIMEOUT", -1): min(int(server._settings.stall_seconds * 1500), 1 << 30),
        }
        with suppress(OSError):  # a unix socket has no such options, and a client may have left already
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in options.items():
                sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        """Read what has come, at least a byte; 0 at the end."""
        if monotonic() >= self.deadline:  # though there is always something to read
            raise _Late(_CLIENT_STALLED)
        size: int = self.attempt(partial(self.sock.recv_into, room), POLLIN)
        self._has_unread = False
        return size

    def write(self, data: Any) -> int:
        """Send all of the data, as one chunk if the body is chunked. Waits for a slow client."""
        size = len(data)
        if size:  # an empty chunk would end the body
            self.body_bytes += size
            self.send(*([b"%x\r\n" % size, data, b"\r\n"] if self.is_chunked else [data]))
        return size

    def send(self, *parts: bytes) -> None:
        """Send bytes without a frame of ours, and without copying them if the socket can do that."""
        is_tls = isinstance(self.sock, ssl.SSLSocket)  # which has no sendmsg
        views = [memoryview(part) for part in ([b"".join(parts)] if is_tls else parts)]
        while views:
            step = partial(self.sock.send, views[0]) if is_tls else partial(self.sock.sendmsg, views)
            sent = self.attempt(step, POLLOUT)
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def attempt(self, step: _Action, events: int) -> Any:
        """Do a step as soon as the socket can be read (POLLIN) or written (POLLOUT). Raises _Late at the deadline, and
        _Gone because of an OSError. What a run has written is sent by its owner, who looks after it meanwhile."""
        run = self.run if events == POLLOUT else None
        stall = monotonic() + ((run and self._server._settings.stall_seconds) or inf)
        attempts = 0
        while True:
            try:
                with self._lock:
                    return step()
            except (BlockingIOError, *_TLS_EVENTS) as error:
                watched = self.watched(_TLS_EVENTS.get(type(error), events))
            except OSError as error:
                raise _Gone(_CLIENT_GONE) from error
            attempts += 1
            if attempts == 2 and self in self._server._idle:  # records of TLS that bring nothing may go on for ever
                stall = monotonic() + self._server._settings.head_seconds
            deadline = min(self.deadline, self._cut_at, stall)
            if monotonic() >= deadline:
                raise _Late(_CLIENT_STALLED if self._cut_at == inf else _SHUTTING_DOWN)
            self.react(run.wait(watched, deadline, is_paused=True) if run else _poll(watched, deadline))

    def watched(self, events: int = 0) -> _Events:
        """What to poll beside anything else that is waited for."""
        watched = {self.sock.fileno(): events | (_HANG_UP or (0 if self._has_unread else POLLIN))}
        if self._cut_at == inf:
            watched[self._server._closing.descriptor] = POLLIN
        return watched

    def react(self, ready: _Events) -> None:
        """Act on what poll reported of that, and take it out."""
        if ready.pop(self._server._closing.descriptor, 0):
            self._cut_at = monotonic() + _CUT_SECONDS
            if self.run:
                self.run.stop(_SHUTTING_DOWN)
            elif self.status and self in self._server._idle:  # a client that was accepted just now gets an answer
                raise _Gone(_SHUTTING_DOWN)
        events = ready.pop(self.sock.fileno(), 0)
        if events & ~(POLLIN | POLLOUT) or (events & POLLIN and not _HANG_UP and self._has_left()):
            raise _Gone(_CLIENT_GONE)

    def _has_left(self) -> bool:
        """Whether the end of what the client sends is next in the socket (recv(2), MSG_PEEK)."""
        with self._lock, suppress(OSError):  # another thread may be reading
            self._has_unread = bool(socket.socket.recv(self.sock, 1, socket.MSG_PEEK))
            return not self._has_unread
        return False

    def turn_away(self) -> None:
        """Refuse the client without waiting. Its request is read, because otherwise the close would be a reset."""
        with suppress(OSError):
            self.sock.send(_BUSY_ANSWER)
            self.sock.recv(_HEAD_BYTES)
        self.close()

    def close(self) -> None:
        self.sock.close()
        super().close()


_LINGER_SECONDS = 2.0  # for a client to read an answer that ends in a close (RFC 9112 section 9.6)
_BODY_SECONDS = 30.0  # for a form to arrive, and for a client to take an answer without a run

_PLAIN_HTTP_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    b"this port speaks TLS: use https\n"
)


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection: request after request, in a thread of its own. What is written to `wfile` is sent at once."""

    server: Server
    wfile: _Connection  # type: ignore[assignment]
    _feeder: Thread | None = None  # passes a request's body on to its command
    _is_body_coming = False
    _is_to_be_reset = False

    def setup(self) -> None:
        self.wfile = self.request
        self.rfile: io.BufferedReader = io.BufferedReader(self.request)

    def handle(self) -> None:
        """Serve requests until the connection is to be closed."""
        client = self.wfile
        context = self.server._tls_context
        try:
            if context:
                client.deadline = monotonic() + self.server._settings.head_seconds
                wrap = partial(context.wrap_socket, client.sock, server_side=True, do_handshake_on_connect=False)
                client.sock = client.attempt(wrap, POLLIN)
                client.attempt(client.sock.do_handshake, POLLIN)  # type: ignore[attr-defined]
            super().handle()
        except _Gone as gone:
            error = gone.__cause__
            if isinstance(error, ssl.SSLError):
                _log.debug("TLS: client=%s %s", self.client_address, error)
                if error.reason == "HTTP_REQUEST":
                    with suppress(OSError):
                        socket.socket.send(client.sock, _PLAIN_HTTP_ANSWER)

    def handle_one_request(self) -> None:
        """Read a request, answer it, and log it."""
        client = self.wfile
        settings = self.server._settings
        request = _UNREAD
        line = ""
        self.close_connection = True
        # A connection may idle for a while, but a head must arrive quickly.
        with self._within(settings.idle_seconds):
            self.rfile.peek(1)
        started = monotonic()
        try:
            with self._within(settings.head_seconds, "head"):
                lines = _read_head(self.rfile)
            line = _printable(lines[0])
            request = _parse_head(lines)
            self.close_connection = request.is_last
            request.pieces = self._read_quickly(request)
            request.client = str(self.client_address)
            request.scheme = self.server._scheme
            reply = self.server._site.answer(request)
        except Error as error:
            reply = _error_reply(error, request)
        chain = request.header("x-forwarded-for")
        forwarded = f' forwarded="{_printable(chain)}"' if chain else ""
        outcome = self._send_run(request, reply, reply.run) if reply.run else self._send_whole(request, reply)
        _log.info(
            f'client={self.client_address}{forwarded} request="{line}" status={client.status} '
            f"exit={outcome.exit_code if outcome.is_final else '-'} bytes={client.body_bytes} "
            f'seconds={monotonic() - started:.3f} end="{outcome.reason or "exit"}"'
        )

    def _read_quickly(self, request: Request) -> Iterator[bytes]:
        """The body of a request that is answered only when all of it is there."""
        self._ask_for_body(request)
        with self._within(_BODY_SECONDS, "body"):
            yield from _read_body(self.rfile, request)

    @contextmanager
    def _within(self, seconds: float, part: str = "") -> Iterator[None]:
        """Let the client send for so long. Meanwhile it may be evicted. Raises Error if a part of a request is late,
        and _Gone for other clients."""
        client = self.wfile
        idle = self.server._idle
        client.deadline = monotonic() + seconds
        idle[client] = True
        try:
            yield
        except _Late:
            if not part:
                raise
            if not self.server._is_closing:
                raise Error(f"the request's {part} must arrive within {seconds:g} s", 408) from None
        finally:
            client.deadline = inf
            if not idle.pop(client, False):
                raise _Gone(_CLIENT_GONE)
        if part and self.server._is_closing:
            raise _busy(_SHUTTING_DOWN, "try again in a moment")

    def _ask_for_body(self, request: Request) -> None:
        """Ask for the body if the client waits for that (RFC 9110 section 10.1.1)."""
        if "expect" in request.headers and not request.is_http_1_0:
            self.wfile.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _send_run(self, request: Request, reply: Reply, run: Run) -> Outcome:
        """Send the output of a run, as it comes or when the run has ended. Returns how the run ended."""
        client = self.wfile
        client.run = run
        try:
            if run.takes_input:
                self._start_feeder(request, run)
            if reply.spool:
                self._send_late(request, reply, run)
            else:
                self._send_live(request, reply, run)
            outcome = run.outcome
            # A client can tell a cut answer by the absence of this chunk. A browser would drop the end, which tells it.
            if client.is_chunked and (not outcome.reason or isinstance(reply.format, Html)):
                has_trailer = request.wants_trailers and outcome.is_final
                client.send(b"0\r\n", b"Exit-Code: %d\r\n" % outcome.exit_code if has_trailer else b"", b"\r\n")
        except Error as refusal:  # of a task, whose run keeps it: a traceback would keep the run
            self._send_whole(request, _error_reply(refusal.with_traceback(None), request))
            outcome = run.outcome
        except _Gone as gone:
            run.stop(str(gone))
            run.close()
            outcome = run.outcome._replace(reason=str(gone))
        finally:
            run.close()
            client.run = None
        if reply.name:
            self.server._site.runs.count_end(reply.name, outcome, client.body_bytes)
        if outcome.reason:
            self.close_connection = True
            self._is_to_be_reset = request.is_http_1_0 and reply.length is None and not reply.spool
        return outcome

    def _start_feeder(self, request: Request, run: Any) -> None:
        """Pass the request's body on to the command, in a thread beside this one, which sends the output."""
        self._ask_for_body(request)

        def feed() -> None:
            run.feed(request.input or _read_body(self.rfile, request))
            self._is_body_coming = False
            run.bell.ring()

        self._is_body_coming = True
        try:
            self._feeder = _start_thread("streamlog-input", feed)
        except RuntimeError as error:
            raise _Gone(str(error)) from None

    def _send_live(self, request: Request, reply: Reply, run: Run) -> None:
        """Send output as it comes. While a body is coming, the head waits for the first output: a proxy takes an
        earlier one for the end of the upload."""
        pieces = run.pieces(reply.format, self.wfile)
        for ahead in itertools.accumulate(pieces):  # noqa: B007
            if run.output_bytes or run.is_over or not self._is_body_coming:
                break
        self._send_head(request, reply)
        for piece in itertools.chain([ahead], pieces):
            self.wfile.write(piece)

    def _send_late(self, request: Request, reply: Reply, run: Run) -> None:
        """Send output when the run has ended, with its length and the exit code in the head."""
        spool: Any = reply.spool
        for piece in run.pieces(reply.format, self.wfile):
            spool.write("stdout", piece)
        outcome = run.outcome
        end = {"Exit-Code": str(outcome.exit_code)}
        if spool.start:  # the beginning is lost
            text = (
                f"the answer has {spool.end} bytes, more than is kept: leave out ?wait, or raise "
                f"{self.server._settings._name('transcript_bytes')}\n"
            )
            self._send_whole(request, _text_reply(text, 507, end))
            return
        status = 200 if outcome.kind == "ok" else 500
        self._send_head(request, reply._replace(status=status, headers={**reply.headers, **end}, length=spool.end))
        spool.file.seek(0)
        shutil.copyfileobj(spool.file, self.wfile, _BLOCK_MAX_BYTES)

    def _send_whole(self, request: Request, reply: Reply) -> Outcome:
        """Send an answer without a run."""
        end = "answered"
        self.wfile.deadline = monotonic() + _BODY_SECONDS
        try:
            self._send_head(request, reply)
            self.wfile.write(b"" if request.method == "HEAD" else reply.body)
        except _Gone as gone:
            self.close_connection = True
            end = str(gone)
        return Outcome(0, end, 0, is_final=False)

    def _send_head(self, request: Request, reply: Reply) -> None:
        """Send the head of an answer."""
        client = self.wfile
        client.is_chunked = False
        lines = [f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}", f"Date: {self.date_time_string()}"]
        if reply.run and reply.length is None and not request.is_http_1_0:
            client.is_chunked = True
            lines += ["Transfer-Encoding: chunked"]
            if request.wants_trailers:
                lines += ["Trailer: Exit-Code"]
        if self.close_connection and not self._is_body_coming:  # said too early, it breaks an upload through a proxy
            lines += ["Connection: close"]
        lines += map(": ".join, self.server._site.access.headers(request, reply))
        client.send("\r\n".join([*lines, "\r\n"]).encode("latin-1"))
        client.status = reply.status
        client.body_bytes = 0

    def finish(self) -> None:
        """Let the client read the answer: closing while it still sends would reset what it has not read."""
        client = self.wfile
        sock = client.sock
        feeder = self._feeder
        seconds = 0.0 if self._is_to_be_reset else _LINGER_SECONDS
        client.deadline = monotonic() + seconds
        with suppress(OSError, ValueError):
            if seconds and isinstance(sock, ssl.SSLSocket) and not self._is_body_coming:
                sock.unwrap()  # to a feeder that still reads, it would do harm
        with suppress(OSError):
            if seconds:
                sock.shutdown(socket.SHUT_WR)
            else:  # HTTP/1.0 takes any other end for that of the body
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if feeder:
            feeder.join(seconds)
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RD)
            feeder.join()  # or it might read from another client, whose connection has got the number of this one
        elif self.server._is_closing:
            return
        with suppress(_Gone):
            while client.readinto(bytearray(_BLOCK_MIN_BYTES)):
                pass


# ---------------------------------------------------------------------------------------------
# requests: bytes to a Request, strictly (RFC 9112), because a process is started on their strength. Pure

# Room for a URL of 8000 octets (RFC 9112 section 3), and for the headers that browsers, proxies and the cookies of
# other services on the same host add up to. A client that exceeds them is broken or hostile.
_LINE_BYTES = 16 * 1024
_HEAD_BYTES = 64 * 1024
_HEADER_COUNT = 100
_FORM_BYTES = 64 * 1024
_CHUNK_LINE_BYTES = 1024  # a chunk's size with its extensions
_TRAILER_BYTES = 8 * 1024

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([!-~]+) HTTP/([0-9])\.([0-9])")
_HEADER_LINE = re.compile(rf"({_TOKEN}):([\t -~\x80-\xff]*)")
_CHUNK_VALUE = rf'{_TOKEN}|"(?:[^"\\\x00-\x1f\x7f]|\\[\t -~])*"'
_CHUNK_LINE = re.compile(rf"([0-9A-Fa-f]{{1,8}})(?:[ \t]*;[ \t]*{_TOKEN}(?:[ \t]*=[ \t]*(?:{_CHUNK_VALUE}))?)*")
_AUTHORITY = r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?"
_TARGET = re.compile(rf"(?:(?i:https?)://({_AUTHORITY}))?(/[^?#]*|\Z|\A\*\Z)(?:\?([^#]*))?")
_SINGLE_HEADER = re.compile("host|content-length|content-type|origin|authorization|expect")
# A media type or a range and its weight, which is not 0, between other parameters; blanks are gone.
_ACCEPTED = re.compile(r"([^;]+)(?:;(?!q=)[^;]*)*(?:;q=(?!0?(?:\.0*)?(?:;|$))([01]?(?:\.[0-9]*)?)(?:;.*)?)?")


@dataclass
class Request:
    """A request as it was read: `path` is decoded, `query` is not; header names are in lower case."""

    method: str
    path: str
    query: str
    authority: str
    headers: _Texts
    is_http_1_0: bool = False
    scheme: str = "http"  # of the URL; the server sets it
    prefix: str = ""  # where the site is mounted

    def __post_init__(self) -> None:
        header = self.header
        self.host = re.sub(":[0-9]*$", "", self.authority).lower()
        self.origin = header("origin").lower()
        self.is_chunked = "transfer-encoding" in self.headers
        self.body_bytes = int(header("content-length") or 0)
        self.has_body = self.is_chunked or self.body_bytes > 0
        # RFC 9112 section 9.6; what is left of a body must not be read as a request
        self.is_last = self.is_http_1_0 or self.has_body or "close" in _split_list(header("connection"))
        self.wants_trailers = "trailers" in _split_list(header("te"))
        self.fields = _parse_query(self.query)
        self.root = "../" * (self.path.count("/") - 1) or "./"  # the site, as a relative URL
        self.client = self.user = ""  # its address, and the token that it has
        self.input: list[bytes] = []  # of the command, if it is a field of a form
        self.options: _Texts = {}  # the server's own among the fields, once the site has told them apart
        # Our answers have no validator, so no If-Range is met (RFC 9110 section 13.1.5).
        self.range = "" if self.method == "HEAD" or "if-range" in self.headers else header("range")
        # media types and ranges, with their weights (RFC 9110 section 12.5.1)
        accepted = map(_ACCEPTED.fullmatch, _split_list(re.sub("[ \t]", "", header("accept"))))
        self.accepted = {match[1]: float(match[2] or 1) for match in accepted if match}
        self.wants_page = "text/html" in self.accepted
        self.pieces: Any = None  # of the body, as they come; the server sets it

    def header(self, name: str) -> str:
        """The value of a header; empty if it was not sent."""
        return self.headers.get(name, "")

    def read_body(self, most: int) -> bytes:
        """The body in full. Raises Error if it is too long, before any of it is read if its length is known."""
        body = bytearray()
        with closing(self.pieces):
            for piece in itertools.chain([b""], self.pieces):
                body += piece
                if max(len(body), self.body_bytes) > most:
                    raise Error(f"the body may have {most} bytes at most", 413)
        return bytes(body)


def _read_head(file: io.BufferedIOBase) -> list[str]:
    """The lines of a head, without their ends. Raises Error for what cannot be one, and _Gone if it breaks off."""
    lines: list[str] = []
    room = _HEAD_BYTES
    too_long = f"the request line is longer than {_LINE_BYTES} bytes: shorten the URL", 414
    while True:
        line = _read_line(file, room if lines else min(room, _LINE_BYTES), *too_long)
        room -= len(line) + 2
        if line:
            lines.append(line)
            too_long = f"the request's head is longer than {_HEAD_BYTES} bytes: send fewer or shorter headers", 431
        elif lines:  # an empty line before the head follows the body of some clients (RFC 9112 section 2.2)
            return lines


def _read_line(file: io.BufferedIOBase, limit: int, too_long: str, status: int = 400) -> str:
    """A line without its end, which counts too. Raises Error if it exceeds the limit, and _Gone if it breaks off."""
    line = file.readline(limit).decode("latin-1")
    if line.endswith("\r\n"):
        return line[:-2]
    if line.endswith("\n"):
        raise Error("lines of a request end in CRLF")
    raise Error(too_long, status) if len(line) == limit else _Gone(_CLIENT_GONE)


def _parse_head(head: Sequence[str]) -> Request:
    """Make a request of the lines of a head. Raises Error: nothing that is unclear is guessed at."""
    match = _REQUEST_LINE.fullmatch(head[0])
    if not match:
        raise Error(
            "the request line must be METHOD, URL and HTTP/1.1, with one space between, and the URL percent-encoded, "
            "as curl -G --data-urlencode NAME=VALUE does"
        )
    method, target, major, minor = match.groups()
    if major != "1":
        raise Error("this server speaks HTTP/1.1", 505)
    if method not in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
        raise Error(f"this server has no method {method[:200]}", 501)
    headers = _parse_headers(head[1:])
    match = _TARGET.fullmatch(target)
    if not match or (target == "*" and method != "OPTIONS"):
        raise Error("the URL must be a path that begins with '/', behind http://HOST at most")
    authority, path, query = match.groups("")
    path = _unquote(path or "/")
    if re.search(r"[\0-\x1f\x7f]", path):
        raise Error("the URL's path holds a control character")
    host = headers.get("host", "")
    is_probe = minor == "0" and path == "/-/healthy" and not host  # as HAProxy sends it
    if not (is_probe or re.fullmatch(_AUTHORITY, host)):
        raise Error("the request needs one Host header that names a host")
    if minor == "0" and "transfer-encoding" in headers:
        raise Error("HTTP/1.0 has no transfer encodings")
    return Request(method, path, query, authority or host, headers, is_http_1_0=minor == "0")


def _parse_headers(lines: Sequence[str]) -> _Texts:
    """Header lines by lower-case name; repeated ones are joined as lists (RFC 9110 section 5.3)."""
    if len(lines) > _HEADER_COUNT:
        raise Error(f"the request has more than {_HEADER_COUNT} headers", 431)
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER_LINE.fullmatch(line)
        if not match:
            raise Error("a header line must be a name, a colon and a value")
        name = match[1].lower()
        value = match[2].strip(" \t")
        if name in headers:
            if _SINGLE_HEADER.fullmatch(name):
                raise Error(f"the header {name} may be sent once only")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    *others, last = _split_list(headers.get("transfer-encoding", "chunked"))
    if others or last != "chunked":  # without it at the end, and there alone, nobody knows where the body ends
        status = 501 if last == "chunked" not in others else 400
        raise Error("the only transfer encoding that this server accepts is chunked", status)
    if {"transfer-encoding", "content-length"} <= headers.keys():
        raise Error("a body has a Content-Length or comes in chunks, not both")
    if not re.fullmatch("[0-9]{1,15}", headers.get("content-length", "0")):
        raise Error("Content-Length must be a number")
    return headers


def _unquote(text: str, decode: _Function = urllib.parse.unquote) -> Any:
    """Percent-decode once, strictly (RFC 3986 section 2.1)."""
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise Error("a '%' in the URL must be followed by two hexadecimal digits")
    try:
        return decode(text, errors="strict")
    except UnicodeDecodeError:
        raise Error("the URL must be UTF-8, percent-encoded") from None


def _parse_query(query: str) -> _Fields:
    """The fields of a query or a form (application/x-www-form-urlencoded), blank ones included."""
    return list(_unquote(query, partial(urllib.parse.parse_qsl, keep_blank_values=True)))


def _split_list(value: str) -> list[str]:
    """The items of a header that is a list, in lower case (RFC 9110 section 5.6.1)."""
    return [item.strip(" \t") for item in value.lower().split(",")]  # a pattern would take quadratic time for blanks


def _read_body(file: io.BufferedIOBase, request: Request) -> Iterator[bytes]:
    """The body of a request, in pieces, as it comes (RFC 9112 section 7.1); extensions and trailers are skipped.

    Raises Error for a malformed body, and _Gone if it breaks off.
    """
    left = _read_chunk_size(file) if request.is_chunked else request.body_bytes
    while left:
        piece = file.read1(min(left, _BLOCK_MIN_BYTES))
        if not piece:
            raise _Gone(_CLIENT_GONE)
        yield piece
        left -= len(piece)
        if request.is_chunked and not left:
            _read_line(file, 2, "a chunk of the body is not as long as it says")
            left = _read_chunk_size(file)
    room = _TRAILER_BYTES + 2  # for the empty line
    demand = f"what follows the body must be header lines, and {_TRAILER_BYTES} bytes at most"
    while request.is_chunked and (line := _read_line(file, min(room, _CHUNK_LINE_BYTES), demand)):
        room -= len(line) + 2
        if not _HEADER_LINE.fullmatch(line):
            raise Error(demand)


def _read_chunk_size(file: io.BufferedIOBase) -> int:
    demand = "a chunk of the body must begin with its size in hexadecimal digits"
    match = _CHUNK_LINE.fullmatch(_read_line(file, _CHUNK_LINE_BYTES, demand))
    if not match:
        raise Error(demand)
    return int(match[1], 16)


_UNREAD = Request("", "", "", "", {})


def _printable(text: str) -> str:
    """A client's text for a log line: nothing in it can end the line, close the quotes or drive a terminal."""
    return re.sub(r"[^ !#-\[\]-~]", lambda match: f"\\x{ord(match[0]):02x}", text[:1000])


# ---------------------------------------------------------------------------------------------
# access: who may use the server. A request passes before anything is looked up or run for it

# A browser marks what it fetches before its user has asked for it.
_AHEAD = re.compile("((sec-|x-)?purpose|x-moz):.*(?i:prefetch|prerender|preview)")
_CORS_HEADERS = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, DELETE, OPTIONS",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID, Prefer, Range",
    "Access-Control-Expose-Headers": "Retry-After, Location, Exit-Code, Content-Range",
    "Access-Control-Max-Age": "600",
}
_MAY_ONLY_LOOK = "the read token may only look: this needs the other token", 403


class Access:
    """The rules for Host, Origin and token."""

    def __init__(self, settings: Settings, reach: _Reach) -> None:
        tokens = {"token": settings.token, "read-token": settings.read_token}
        self._tokens = {name: token.encode() for name, token in tokens.items() if token}
        self._name = settings._name
        self._origins = {origin.lower() for origin in settings.allow_origins}
        self._headers = {
            "Server": "streamlog",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "SAMEORIGIN",
            "Cross-Origin-Opener-Policy": "same-origin",
            # Without a referrer a browser sends `Origin: null` even to the page's own server.
            "Referrer-Policy": "same-origin",
            "Cache-Control": "no-cache, no-store, no-transform",
            "Content-Security-Policy": " ".join(["frame-ancestors 'self'", *sorted(self._origins)]),
            **({"Vary": "Origin"} if self._origins else {"Cross-Origin-Resource-Policy": "same-origin"}),
        }
        self._is_on_network = reach == "network"
        self._hosts = {"localhost", *(host.lower().rstrip(".") for host in settings.allow_hosts)}
        if self._is_on_network:
            self._hosts.add(socket.gethostname().lower())
        # DNS cannot point at a unix socket, and an attacker's page has no token: unless names are listed, any will do.
        self._checks_host = settings.allow_hosts or reach == "loopback" or (self._is_on_network and not self._tokens)

    def check(self, request: Request) -> bool:
        """Raise Error for a request that must not be answered. Returns whether a browser asks what a page of an allowed
        origin may do (a preflight), which is answered without a token."""
        asks = request.method == "OPTIONS" and "access-control-request-method" in request.headers
        is_preflight = asks and request.origin in self._origins
        if self._checks_host and request.authority:
            self._check_host(request.host)
        self._check_site(request)
        if self._tokens and not is_preflight and request.path != "/-/healthy":
            request.user = self._find_token(request.header("authorization"))
            if request.user == "read-token" and request.method not in ("GET", "HEAD", "OPTIONS"):
                raise Error(*_MAY_ONLY_LOOK)
        return is_preflight

    def _check_host(self, host: str) -> None:
        """Refuse a name that is not this server's: an attacker could point a name of theirs here (DNS rebinding)."""
        name = host.rstrip(".")
        if name in self._hosts or name.endswith(".localhost"):
            return
        with suppress(ValueError):
            if ipaddress.ip_address(name.strip("[]")).is_loopback or self._is_on_network:
                return
        way = self._name("allow_hosts")
        raise Error(f"the host {host[:200]!r} is not this server's: use localhost, an address, or {way}", 403)

    def _check_site(self, request: Request) -> None:
        """Refuse what another site's page has asked for, and what a browser fetches before its user asks."""
        if any(_AHEAD.match(f"{name}:{value}") for name, value in request.headers.items()):
            raise Error("commands are not run for prefetching", 503, {"Retry-After": "1"})
        get = request.headers.get
        site = get("sec-fetch-site")
        if site is None:
            own_origin = f"{request.scheme}://{request.authority.lower()}"
            is_own = get("origin", own_origin).lower() == own_origin
        else:
            is_visit = request.path == "/" and get("sec-fetch-mode") == "navigate"  # which runs nothing
            is_own = is_visit or site in ("same-origin", "none")
        if not is_own and request.origin not in self._origins:
            who = _printable(get("origin") or site or "")
            way = self._name("allow_origins")
            raise Error(f"a page of another site ({who}) may not use this server: {way} would let it", 403)

    def _find_token(self, authorization: str) -> str:
        """Which token a request has, as Bearer or as the password of Basic (RFC 6750, RFC 7617). Raises Error."""
        scheme, _, given = authorization.encode("latin-1").partition(b" ")
        scheme, given = scheme.lower(), given.strip(b" \t")
        offered = given if scheme == b"bearer" else b""
        with suppress(ValueError):
            if scheme == b"basic":
                offered = base64.b64decode(given, validate=True).partition(b":")[2]
        for name, token in self._tokens.items():
            if hmac.compare_digest(offered, token):
                return name
        challenge = {"WWW-Authenticate": 'Basic realm="streamlog", charset="UTF-8", Bearer realm="streamlog"'}
        raise Error("the token is missing or wrong: give it as curl -u :TOKEN does", 401, challenge)

    def headers(self, request: Request, reply: Reply) -> _Fields:
        """The headers of an answer; some say which pages may read and frame it. Raises ValueError rather than let a
        value break out of its line."""
        headers = [*self._headers.items(), *reply.headers.items()]
        if request.origin in self._origins:
            headers += [("Access-Control-Allow-Origin", request.headers["origin"]), *_CORS_HEADERS.items()]
        if reply.length is not None:
            headers += [("Content-Length", str(reply.length))]
        if not "".join(itertools.chain(*headers)).isprintable():
            raise ValueError(f"a header holds a control character: {headers!r}")
        return headers


# ---------------------------------------------------------------------------------------------
# site: a Request to a Reply. It knows commands and runs, and no sockets

_SWITCH = ("[01]?", "0 or 1")
# The server's own options of a query: what they look like, and what an error demands.
_FORMAT_OPTIONS = {
    "format": ("text|html|sse|ndjson", "text, html, sse, ndjson"),
    "footer": _SWITCH,
    "timestamps": _SWITCH,
    "hostname": _SWITCH,
    "heartbeat": (r"[1-9][0-9]{0,4}|0\.[1-9]", "seconds, from 0.1 to 99999"),
    "tail": ("[0-9]{1,9}", "a number of lines"),
    "wait": _SWITCH,
}
_RUN_OPTIONS = {**_FORMAT_OPTIONS, "async": _SWITCH}
_INPUT_OPTIONS = {**_RUN_OPTIONS, "-": ("form", "form")}  # no parameter can be called so
_REPLAY_OPTIONS = {**_FORMAT_OPTIONS, "follow": _SWITCH}
_STOP_OPTIONS = {"drop": _SWITCH, "quiet": _SWITCH}
_NEGOTIATED = {
    "text/event-stream": "sse",
    "application/x-ndjson": "ndjson",
    "application/jsonl": "ndjson",
    "application/json": "ndjson",
}


class Reply(NamedTuple):
    """An answer: a whole body, or a run whose output is the body, and the format that writes it."""

    status: int
    headers: _Texts
    body: bytes = b""
    run: Run | None = None
    format: Format | None = None
    name: str = ""  # the command's; empty if the run is counted elsewhere
    length: int | None = None  # of the body in bytes, if there is one and it is known
    spool: Transcript | None = None  # for the output of a run whose end decides on the status


_NO_CONTENT = Reply(204, {})


def _text_reply(text: str, status: int = 200, headers: _Texts = _NO_TEXTS) -> Reply:
    body = text.encode()
    return Reply(status, {"Content-Type": _PLAIN_TEXT, "Vary": "Accept", **headers}, body, length=len(body))


def _error_reply(error: Error, request: Request) -> Reply:
    """A refusal: a line of text, or a page with a way back for a browser."""
    if not request.wants_page:
        return _text_reply(f"{error}\n", error.status, error.headers)
    markup = {"ROOT": request.root, "TEXT": html.escape(str(error))}
    return _page_reply(HTTPStatus(error.status).phrase, _ERROR, markup, error.headers, error.status)


def _json_reply(value: object, status: int = 200, headers: _Texts = _NO_TEXTS) -> Reply:
    return _text_reply(json.dumps(value, indent=1) + "\n", status, {"Content-Type": "application/json", **headers})


class Site:
    """The commands behind their URLs. Without a `closing` bell, as under WSGI, no run outlives its client."""

    def __init__(
        self,
        commands: _Commands,
        settings: Settings,
        reach: _Reach,
        socket_path: str = "",
        closing: _Bell | None = None,
    ) -> None:
        if sum(command.is_source for command in commands.values()) > 1:
            raise ConfigError("standard input can be served only once: leave one NAME=-")
        self.commands = commands
        self._settings = settings
        self._socket_path = socket_path
        self._can_keep = closing is not None
        self.access = Access(settings, reach)
        self.runs = _Runs(settings, closing)
        self.clients: set[Any] = set() if closing else self.runs.active  # the server's; under WSGI, each has a run
        self._pages = {
            "/": self._index,
            "/-/metrics": lambda _: _text_reply(self.runs.metrics(len(self.clients)), 200, _METRICS_HEADERS),
            "/-/healthy": lambda _: _text_reply("ok"),
            "/-/idle": lambda _: _page_reply("Idle", _IDLE, {}),
            "/robots.txt": lambda _: _text_reply("User-agent: *\nDisallow: /\n"),
            "/favicon.ico": lambda _: _NO_CONTENT,  # browsers ask for it by themselves
            "*": lambda _: _NO_CONTENT,
        }
        if self._can_keep:
            self._pages["/-/runs"] = self._list_runs
        self._own = _own_commands(settings.token) if settings.insight else []
        self._log = ExitStack()
        if settings.insight and settings.log:
            self._log.enter_context(_program_log.watch(settings.log))

    def open_source(self) -> None:
        """Begin to read standard input, if that is one of the commands: ask for it, and leave at once. Raises Error."""
        for name, command in self.commands.items():
            if command.is_source:
                reply: Any = self._run(name, command, _UNREAD)
                reply.run.close()

    def close(self) -> None:
        """Drop what is kept of runs and of the log."""
        self._log.close()
        with self.runs._lock:
            self.runs._kept = []

    def answer(self, request: Request) -> Reply:
        """Answer a request. Raises Error for a refusal; nothing has been run then.

        The request's body is read only when everything else has been found right.
        """
        if self.access.check(request):
            return _NO_CONTENT
        answers = self._find(request.path)
        if not answers:
            names = ", ".join(self._listed()) or "(none)"
            raise Error(f"there is nothing at {request.path[:200]!r}; the commands are: {names}", 404)
        if "GET" in answers:
            answers["HEAD"] = answers["GET"]
        allow = ", ".join(sorted([*answers, "OPTIONS"]))
        answers["OPTIONS"] = lambda _: Reply(204, {"Allow": allow})
        if request.method not in answers:
            text = f"{request.path} takes {allow}, not {request.method[:200]}"
            name = request.path[1:]
            if name in self._listed():
                text += f"; try: {self.curl_line(self._url(request), name, self._listed()[name])}"
            raise Error(text, 405, {"Allow": allow})
        if request.headers.get("expect", "100-continue").lower() != "100-continue":
            raise Error("the only expectation that this server can meet is 100-continue", 417)
        if "websocket" in _split_list(request.header("upgrade")):
            raise Error("this server speaks no WebSocket: fetch the URL, or open it as an EventSource")
        if request.has_body and request.method not in ("POST", "PUT"):
            raise Error(f"a {request.method} request takes no body: put parameters into the URL's query")
        return answers[request.method](request)

    def _find(self, path: str) -> dict[str, Callable[[Request], Reply]]:
        """What answers at a path, by method. A command comes before a page or a command of our own."""
        name = path[1:]
        command = self.commands.get(name)
        commands = [command] if command else [own for own_name, own in self._own if own_name == name]
        if commands:
            return {method: partial(self._run, name, one) for one in commands for method in one.methods}
        if path.startswith("/-/runs/") and self._can_keep:
            return dict.fromkeys(("GET", "POST", "DELETE"), self._answer_kept)
        return {"GET": self._pages[path]} if path in self._pages else {}

    def _run(self, name: str, command: Command, request: Request) -> Reply:
        """Run a command, and answer with its output."""
        sort = partial(_sort_fields, name, command.parameters, known=_INPUT_OPTIONS if command.stdin else _RUN_OPTIONS)
        values, request.options = sort(request.fields)
        takes_input = command.stdin and request.has_body
        if request.has_body:
            self.runs.check_slot(name, command)  # before any of it is asked for
            if not command.stdin or "-" in request.options:
                fields = _parse_form(request)
                if command.stdin:
                    request.input = [dict(fields).get("-", "").replace("\r\n", "\n").encode()]
                    fields = [field for field in fields if field[0] != "-"]
                values, request.options = sort(request.fields + fields)
            elif request.header("content-type").lower().startswith("multipart/form-data"):
                raise Error("the body is passed to the command as it is: send it as curl -T or --data-binary does", 415)
        entry = _Entry(name, command, values, request.client)
        options, headers = self._read_options(entry, request)
        keeping = self._find_keeping(entry, request)
        if re.fullmatch("bytes=0*[1-9][0-9]*-", request.range):
            raise Error("a new run cannot continue an earlier one, so nothing was run: ask without Range", 416)
        spool = _open_transcript(self._settings) if _is_on(request, "wait") else None
        stderr = "merge" if options.format == "text" and not keeping else "separate"
        launch: Any = command.bind(name, values, stderr, takes_input, _variables(command, request))
        is_own = (name, command) in self._own
        is_reconnect = options.format == "sse" and "last-event-id" in request.headers
        if is_reconnect and not (is_own or self.runs.find_shared(entry)):
            return _NO_CONTENT  # an EventSource whose run has ended must not start another
        if request.method == "HEAD":
            return Reply(200, headers)
        # One of our own is called at once, and returns text or what makes a run.
        made = launch() if is_own else _maker(launch)
        if isinstance(made, str):
            return _text_reply(made)
        entry.make = made
        if keeping:
            if takes_input and not request.input:
                request.input = [request.read_body(self._settings.input_bytes)]
            return self._keep(keeping, entry, request)
        run = self.runs.start(entry)
        return Reply(200, headers, run=run, format=_FORMATS[options.format](options), name=name, spool=spool)

    def _find_keeping(self, entry: _Entry, request: Request) -> str:
        """How the run is kept: "async", "shared", or not at all. Raises Error if it cannot be kept as asked."""
        can_keep = self._can_keep and entry.name in self.commands and not entry.command.is_source
        prefers_async = can_keep and "respond-async" in _split_list(request.header("prefer"))
        is_async = _is_on(request, "async", "1" if prefers_async else "0")
        waits = _is_on(request, "wait")
        if (is_async or waits) and not can_keep:
            raise Error("parameters 'wait' and 'async' are not available here")
        if is_async and request.user == "read-token":
            raise Error(*_MAY_ONLY_LOOK)
        keeping = "async" if is_async else "shared" if self._can_keep and entry.command.shared and not waits else ""
        if "tail" in request.options and keeping != "shared":
            raise Error(f"parameter 'tail' is not available: {entry.name!r} is not shared")
        return keeping

    def _keep(self, keeping: str, entry: _Entry, request: Request) -> Reply:
        """Start a run that is kept, or join a shared one, and answer from its transcript."""
        if keeping == "async":
            self.runs.keep(entry, request.input)
            path = f"-/runs/{entry.id}"
            format_ = request.options.get("format")
            if request.wants_page:
                return Reply(303, {"Location": f"{path}?format={format_}" if format_ else path}, length=0)
            headers = {"Location": f"{self._url(request)}/{path}" if self._settings.url else path}
            if "application/json" in request.accepted:
                return _json_reply(entry.state, 202, headers)
            return _text_reply(f"{self._url(request)}/{path}\n", 202, headers)
        entry = self.runs.share(entry)
        try:
            return self._replay(entry, request)
        finally:
            entry.leave()

    def _answer_kept(self, request: Request) -> Reply:
        """Show a kept run, tell the state of another, or stop it; what is kept of one that has ended is dropped."""
        entry = self.runs.find(request.path.removeprefix("/-/runs/"))
        stops = request.method in ("DELETE", "POST")
        _, request.options = _sort_fields("/-/runs", {}, request.fields, _STOP_OPTIONS if stops else _REPLAY_OPTIONS)
        if stops:
            if entry.ended and (request.method == "DELETE" or _is_on(request, "drop")):
                self.runs.drop_ended(entry)
            entry.run.stop(_ON_REQUEST)
            if _is_on(request, "quiet"):  # a page goes on to show the run
                return _NO_CONTENT
            if request.wants_page:
                return Reply(303, {"Location": "../runs"}, length=0)
            return _json_reply(entry.state, 202)
        if not entry.transcript or ("application/json" in request.accepted and "format" not in request.options):
            return _json_reply(entry.state)
        return self._replay(entry, request)

    def _replay(self, entry: _Entry, request: Request) -> Reply:
        """Answer with what a kept run has written, and goes on to write. A range, bytes=N-, is that of a run, as at the
        address of a shared command it would name another each time; others are ignored (RFC 9110 section 14.2)."""
        transcript = entry.transcript
        outcome = transcript.outcome
        end = transcript.end
        options, headers = self._read_options(entry, request)
        waits = _is_on(request, "wait")
        follows = waits or _is_on(request, "follow", "1")
        is_plain = options.format == "text" and options.notes != "always"
        is_bare = is_plain and not (waits or options.timestamps or options.hostname)
        can_range = is_bare and request.path.startswith("/-/runs/")
        wanted = re.fullmatch(r"bytes=([0-9]{1,15})-", request.range) if can_range else None
        start = int(wanted[1]) if wanted else _find_start(transcript, request)
        # What has no end yet, or was cut, may go on behind the last byte.
        is_open = follows and (not outcome or bool(outcome.reason))
        if wanted and not transcript.start <= start < end + is_open:
            what = f"there are only {end} bytes"
            if start < transcript.start:
                what = f"what is before byte {transcript.start} is not kept"
            raise Error(f"that range cannot be had: {what}", 416, {"Content-Range": f"bytes */{end}"})
        if options.format == "sse" and outcome and "last-event-id" in request.headers and start >= end:
            return _NO_CONTENT
        if outcome:
            headers["Exit-Code"] = str(outcome.exit_code)
        # Plain bytes have a length if their end is known and nothing of ours is added.
        length = end - start if is_bare and not is_open and transcript.start <= start else None
        if wanted:  # one without an end as yet is said to end far away (RFC 8673 section 2.2)
            last = (1 << 53 if length is None else end) - 1
            headers["Content-Range"] = f"bytes {start}-{last}/{end if outcome and not is_open else '*'}"
        if can_range:
            headers["Accept-Ranges"] = "bytes"
        if request.method == "HEAD":
            return Reply(200, headers, length=length)
        spool = _open_transcript(self._settings) if waits else None
        run = _Replay(transcript, start, entry.leave, inf if follows else end)  # before the viewer counts: it may fail
        entry.enter()
        format_ = None  # the bytes as they are, if their offsets or their number are told
        if not wanted and length is None:
            format_ = _FORMATS[options.format](options._replace(offset=start), lambda: run.moment)
        return Reply(206 if wanted else 200, headers, run=run, format=format_, length=length, spool=spool)

    def _read_options(self, entry: _Entry, request: Request) -> tuple[Options, dict[str, str]]:
        """How a request wants its output, by the server's own options or else by its Accept header; and the headers
        that describe it. Raises Error."""
        command = entry.command
        given = request.options
        # The last one is for nginx, which would collect the output.
        headers = {"Content-Type": command.type, "Vary": "Accept", "X-Accel-Buffering": "no"}
        if not command.is_plain_text:
            if given.get("format", "text") != "text":
                raise Error(f"parameter 'format' is not available: the output is {command.type}, and sent as it is")
            return Options(notes="never"), headers
        # A person wants to see the end; to a program the output is whole without a line of ours.
        notes = "always" if request.wants_page else "cut"
        if "footer" in given:
            notes = "always" if _is_on(request, "footer") else "never"
        format_ = given.get("format") or _negotiate(request.accepted)
        usual = self._settings.heartbeat_seconds
        if usual is None:  # a WSGI server tells by a failing write that the client has left
            usual = inf if self._can_keep or format_ in ("text", "sse") else _SSE_COMMENT_SECONDS
        if format_ != "text":  # whose type may have parameters of its own
            headers["Content-Type"] = _FORMATS[format_].type
        page = ""
        if format_ == "html":
            headers["Content-Security-Policy"] = _VIEW_POLICY
            page = _view_page(entry, request, self._can_keep)
        return Options(
            format_,
            notes,
            timestamps=_is_on(request, "timestamps"),
            hostname=socket.gethostname() if _is_on(request, "hostname") else "",
            heartbeat_seconds=float(given.get("heartbeat", usual)),
            page=page,
            columns=(command.terminal or self._settings.terminal_size)[0],
        ), headers

    def _list_runs(self, request: Request) -> Reply:
        """The runs: as a page that reloads itself, as JSON, or one a line."""
        entries = self.runs.listed()
        if request.wants_page:
            rows = "".join(map(_run_row, entries)) or _NO_RUNS
            is_paused = ("follow", "0") in request.fields
            markup = {"ROWS": rows, "HOW": _FOLLOW if is_paused else _PAUSE}
            headers = {} if is_paused else {"Refresh": "5"}
            return _page_reply(f"Runs on {socket.gethostname()}", _RUNS, markup, headers)
        if "application/json" in request.accepted:
            return _json_reply({"runs": [entry.state for entry in entries]})
        text = ""
        for one in entries:
            line = (
                f"{one.id}  {_timestamp(one.started_at)}  {one.client}  {one.run.output_bytes} bytes  {one}  {one.note}"
            )
            text += f"{_printable(line)}\n"
        return _text_reply(text)

    def _listed(self) -> _Commands:
        """The commands of the index, by name. A command hides one of our own, which come last."""
        return {**self.commands, **dict(self._own), **self.commands}

    def _index(self, request: Request) -> Reply:
        """The commands: as a page, as JSON, or as lines for a shell."""
        url = self._url(request)
        commands = self._listed()
        lines = {name: self.curl_line(url, name, command) for name, command in commands.items()}
        if request.wants_page:
            return _index_page(commands, lines, self.commands if self._can_keep else ())
        if "application/json" in request.accepted:
            return _json_reply({"commands": [_describe_json(url, *item) for item in commands.items()]})
        text = f"# streamlog {__version__} on {socket.gethostname()}: each line runs a command\n"
        for name, command in commands.items():
            about = "\n# ".join((command.about or command.line).splitlines())
            text += f"\n# {about}\n{lines[name]}\n"
        return _text_reply(text)

    def _url(self, request: Request) -> str:
        return self._settings.url.rstrip("/") or f"{request.scheme}://{request.authority}{request.prefix}"

    def curl_line(self, url: str, name: str, command: Command) -> str:
        """A line for a shell that runs a command of the site at a URL, with every parameter to be seen and changed."""
        values = {
            one.name: (one.choices or [one.name.upper()])[0] if one.default is None else one.default
            for one in command.parameters.values()
        }
        query = urllib.parse.urlencode(values, safe="/:,@")
        options = ' -u ":$STREAMLOG_TOKEN"' if self._settings.token else ""
        if self._socket_path and url.endswith("//localhost"):  # another name is that of a proxy
            options += f" --unix-socket {shlex.quote(self._socket_path)}"
        if command.stdin:
            options += " -T ." if command.pty else " -T FILE"  # . sends as it is typed
        elif "POST" in command.methods:
            options += f" -d {shlex.quote(query)}" if query else " -X POST"
            query = ""
        target = f"{url}/{name}?{query}".rstrip("?")
        return f"curl -N{options} {shlex.quote(target)}"


def _sort_fields(
    name: str, parameters: _Parameters, fields: _Fields, known: Mapping[str, tuple[str, str]]
) -> tuple[_Texts, _Texts]:
    """Part the fields of a request into values of parameters and the server's own options. Raises Error."""
    values: dict[str, str] = {}
    options: dict[str, str] = {}
    for key, value in fields:
        target = values if key in parameters else options
        if key in target:
            if target is options or not parameters[key].is_list:
                raise Error(f"parameter {key[:200]!r} of {name!r} is given twice")
            target[key] += f"\n{value}"
            continue
        if target is options:
            if key not in known:
                raise Error(f"{name!r} has no parameter {key[:200]!r}; known are: {', '.join([*parameters, *known])}")
            if not re.fullmatch(known[key][0], value):
                raise Error(f"parameter {key!r} must be {known[key][1]}: {value[:200]!r}")
        target[key] = value
    return values, options


def _variables(command: Command, request: Request) -> _Texts:
    """What a command is told of the request, as CGI does (RFC 3875 section 4.1)."""
    told = {"REMOTE_ADDR": request.client.rpartition(":")[0] or request.client, "REMOTE_USER": request.user}
    for name in command.headers:
        told[f"HTTP_{name.upper().replace('-', '_')}"] = os.fsdecode(request.header(name.lower()).encode("latin-1"))
    return told


def _is_on(request: Request, switch: str, default: str = "0") -> bool:
    """Whether an option that is yes or no is on."""
    return request.options.get(switch, default) != "0"


def _parse_form(request: Request) -> _Fields:
    """The fields of a form, or of a JSON object. Raises Error."""
    kind = re.match(r"(?i)application/(?:(json)|x-www-form-urlencoded)\s*(?:;|$)", request.header("content-type"))
    if not kind:
        raise Error("the body must be a form (application/x-www-form-urlencoded), as curl -d sends it, or JSON", 415)
    body = request.read_body(_FORM_BYTES)
    try:
        if not kind[1]:
            return _parse_query(body.decode())
        pairs = json.loads(body, object_pairs_hook=tuple, parse_int=str, parse_float=str)  # numbers as they are written
        if not isinstance(pairs, tuple):
            raise TypeError
        fields = [(key, str(value).lower() if isinstance(value, bool) else value) for key, value in pairs]
        "".join(itertools.chain(*fields)).encode()  # all are text, and none has half of a surrogate pair
        return fields
    except UnicodeDecodeError:
        raise Error("the body must be UTF-8") from None
    except (TypeError, ValueError, RecursionError):
        raise Error("the body must be a JSON object whose values are strings, numbers or booleans") from None


def _negotiate(accepted: Mapping[str, float]) -> str:
    """The format for an Accept header. A browser that navigates accepts anything, and gets text, as curl does."""
    plain = max(map(accepted.get, ("text/plain", "text/*", "*/*"), itertools.repeat(0.001)))
    for type_, format_ in _NEGOTIATED.items():
        if accepted.get(type_, 0) >= plain:
            return format_
    return "html" if "text/html" in accepted and plain == 0.001 else "text"


def _find_start(transcript: Transcript, request: Request) -> int:
    """The offset in a transcript to begin at."""
    given = request.options
    last_id = request.header("last-event-id")
    if given.get("format", "sse") == "sse" and re.fullmatch(r"[0-9]{1,15}", last_id):
        return min(int(last_id), transcript.end)
    return transcript.find_tail(int(given["tail"])) if "tail" in given else 0


class _Entry:
    """A run as the site lists it. A kept run has a transcript, and a thread that writes it."""

    make: _Maker  # starts the run
    run: Run
    transcript: Any = None  # a Transcript, of a kept run
    thread: Thread
    key: object = None  # what a request must have in common with the run to share it
    ended = 0.0  # monotonic() of the end of a kept run
    outcome: Outcome | None = None  # then
    linger_seconds = inf  # how long the run goes on after its last viewer has left
    viewers = 0

    def __init__(self, name: str, command: Command, given: _Texts, client: str) -> None:
        self.id = secrets.token_urlsafe(16)
        self.name = name
        self.command = command
        self.values = {**command.defaults, **given}
        self.client = client  # that asked for it
        self.started_at = time.time()
        self._lock = Lock()  # guards the viewers

    def __str__(self) -> str:
        return self.name + "".join(f" {name}={value}" for name, value in self.values.items())

    @property
    def note(self) -> str:
        """The state, for people."""
        return f"[{self.outcome.note}]" if self.outcome else "stopping" if self.run.is_stopping else "running"

    @property
    def state(self) -> dict[str, object]:
        """The state, for JSON. Times are RFC 3339, sizes are bytes."""
        outcome = self.outcome
        transcript = self.transcript
        seconds = outcome.seconds if outcome else monotonic() - self.run.started
        return {
            "id": self.id,
            "command": self.name,
            "values": self.values,
            "client": self.client,
            "state": "ended" if outcome else "running",
            "started": _timestamp(self.started_at),
            "ended": outcome and _timestamp(self.started_at + seconds),
            "seconds": round(seconds, 3),
            "exit_code": outcome and outcome.exit_code,
            "signal": outcome and outcome.signal,
            "reason": outcome and (outcome.reason or "exit"),
            "bytes": transcript.end if transcript else self.run.output_bytes,  # which may not be written yet
            "first_byte": transcript and transcript.start,
            "kept": bool(transcript),
        }

    @property
    def goes_on(self) -> bool:
        """Whether a viewer may still join the run. Standard input is served even when it has ended."""
        return self.command.is_source or not (self.run.reason or self.ended)

    def enter(self) -> None:
        """Count a viewer. `leave` must follow."""
        with self._lock:
            self.viewers += 1

    def leave(self) -> None:
        """Count a viewer that has left. Without another one, the run is stopped after a while."""
        with self._lock:
            self.viewers -= 1
        self.run.later(self.linger_seconds, self._check_viewers)
        self.run.bell.ring()

    def _check_viewers(self) -> None:
        with self._lock:  # a viewer that enters either prevents the stop, or finds that the run is ending
            if not self.viewers:
                self.run.stop("it has no viewer any more")


# ---------------------------------------------------------------------------------------------
# commands: what may run, and how values from a URL get into their places. No I/O except for the commands file

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_WORD = r"[A-Za-z0-9_.,:@%+=-]+"
_CHOICE = re.compile(rf"{_WORD}(?:\|{_WORD})+")
_TYPES = {  # the pattern of a value, and what an error demands
    "word": (_WORD, "must be word (letters, digits and _.,:@%+=-)"),
    "int": (r"-?[0-9]+", "must be int"),
    "float": (r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", "must be float"),
    "path": (r"[A-Za-z0-9_.,:@%+=/-]+", "must be path (letters, digits and _.,:@%+=-/)"),
    "text": (r"(?s:.*)", "must be printable text"),
}
_PLAIN_TEXT = "text/plain; charset=utf-8"
# Of the values of a request, each counted as often as it is used: half of what Linux takes for one argument or variable
# (MAX_ARG_STRLEN, execve(2)), so that the rest of the command line has room.
_VALUE_BYTES = 64 * 1024
_UP = re.compile(r"(?a)(?<![\w.])\.\.(?![\w.])")  # a path that goes up

# A placeholder. Its type may be a regular expression, and a = in brackets or parentheses is part of that.
_PLACEHOLDER = r"""\{ (?P<name> [A-Za-z_][A-Za-z0-9_]* )
    (?: : (?P<type> (?: \\. | \[ (?: \\. | [^\]\\] )* \] | \{ [^{}]* \}
        | \( (?: \\. | [^()\\] | \( (?: \\. | [^()\\] )* \) )* \) | [^{}=\[(\\] )* ) )?
    (?: = (?P<default> (?: \\. | \{ [^{}]* \} | [^{}\\] )* ) )? \}"""
# The braces of a command line: the shell's ${, a literal {{name}}, a placeholder, and one that is never closed.
_BRACE = re.compile(
    r"(?xs) \$\{ | \{ (?P<literal> " + re.sub(r"\?P<\w+>", "?:", _PLACEHOLDER) + r" ) \} | " + _PLACEHOLDER +
    r" | (?P<open> \{ [A-Za-z_][A-Za-z0-9_]* ) (?= [}:=] )"
)  # fmt: skip
# Stands for a placeholder: \0, an underscore (the name may be a keyword of the shell), its name, \1. No argument can
# hold a NUL, and shlex takes both for ordinary characters, so it never splits or unquotes the text of a placeholder.
_MARK = re.compile("\0_(\\w+)\1")

# Scripts are not parsed. A shell neither splits nor expands a word, int, path or choice, wherever it stands; any other
# value is safe only in the assignments at the beginning, where a shell does not split (sh(1), simple commands).
_SAFE = "[\\w.,:/%@+-]|\0\\w+\1"
_ASSIGNMENTS = re.compile(rf'(?a)\s*(?:[A-Za-z_]\w*=(?:(?:{_SAFE})*|"(?:[ ]|{_SAFE})*")(?:[ \t]*[;\n]\s*|[ \t]+|$))*')
# bash and ksh evaluate names in arithmetic: the word `x` would evaluate what the variable x holds. So do they in the
# offset of ${name:1}, in a subscript, and ksh around -eq.
_ARITHMETIC = re.compile(
    r"\(\(|\[\[|\$\[|\blet\b|\binteger\b|\b(?:declare|typeset|local|export|readonly)\s+(?:-\w+\s+)*-\w*i"
    r"|\$\{[!#]?(?:\w+|[@*])(?:\[[@*]\])?:(?![-=?+])|\$\{[!#]?\w+\[(?![@*]\])|\b\w+\[[^\]\n]*\]\+?=|\w\[[^\]\n]*\0"
    r"|\[[\"']?\0|\0\w+\x01[\"']?\s+-(?:eq|ne|[lg][te])\b|\s-(?:eq|ne|[lg][te])\s+[\"']?\0"
    r"|\b(?:S?RANDOM|SECONDS|OPTIND|HISTCMD)=[\"']?\0"
)
_PROGRAM_PLACE = re.compile(
    r"(?:^|[;&|({`!]|(?<!\\)\n|\b(?:then|do|else|if|elif|while|until|time|exec|eval|command))\s*[\"']?\0_(\w+)"
    # behind assignments and redirections, and as a part of the name
    r"|(?:^|;|(?<!\\)\n|&&|\|\|)\s*(?:(?:\w+=|[0-9]*[<>]+&?[ ]*)(?:\"[^\"]*\"|[^\s;\"])*[ \t]+)*\"?[\w./~-]*\0_(\w+)"
)


_Parameters = dict[str, "Parameter"]


class Parameter(NamedTuple):
    """A placeholder of a command: what a URL may give for it."""

    name: str
    type: str
    pattern: re.Pattern[str]
    choices: Sequence[str]
    default: str | None = None
    is_list: bool = False  # whether it may be given more than once: each value is a line
    read: _Function = str  # what a task gets

    def find_problem(self, value: str, starts_argument: bool = True, may_be_option: bool = False) -> str:
        """What is wrong with a value where it is to stand, or an empty string."""
        for one in value.splitlines() if self.is_list else [value]:
            if not self.pattern.fullmatch(one) or "\0" in one or (self.type == "text" and not one.isprintable()):
                return _TYPES.get(self.type, ("", f"must {'be' if self.choices else 'match'} {self.type}"))[1]
            if self.type != "text" and _UP.search(one):
                return "must not contain '..'"
            if one.startswith("-") and not may_be_option:
                return "must not begin with '-'"
            if self.type == "path" and not starts_argument and one.startswith("/"):
                return "must be a relative path"
        return ""


def _make_parameter(name: str, type_: str, choices: Sequence[str] = ()) -> Parameter:
    if _CHOICE.fullmatch(type_):
        choices = type_.split("|")
    pattern = "|".join(map(re.escape, choices)) or _TYPES.get(type_, [type_])[0]
    if not choices and re.fullmatch(r"[\w ,?*+-]*", pattern):
        raise ConfigError(
            f"parameter {name!r} has an unknown type: {type_!r}; known are {', '.join(_TYPES)}, "
            f"choices such as on|off, and regular expressions (a literal brace is doubled: {{{{{name}...}}}})"
        )
    try:
        return Parameter(name, type_, re.compile(pattern, re.ASCII), choices)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        raise ConfigError(f"parameter {name!r} has a bad regular expression: {error}: {type_!r}") from None


def _mark_placeholders(line: str, parameters: _Parameters) -> str:
    """Put a mark in the place of each placeholder of a line, and add its parameter to the others."""
    if re.search("[\0\ud800-\udfff]", line):
        raise ConfigError(f"the command line must be UTF-8, without a NUL character: {line!r}")

    def mark(match: re.Match[str]) -> str:
        if match["open"]:
            raise ConfigError(f"placeholder '{match[0]}' has no closing brace: write {{{match[0]}}}}} if it is not one")
        if not match["name"]:
            return match["literal"] or match[0]
        one = _make_parameter(match["name"], match["type"] or "word")._replace(default=match["default"])
        # If it stands twice, it must say the same twice, or only its name again.
        if one != parameters.setdefault(one.name, one) and (one.type, one.default) != ("word", None):
            raise ConfigError(f"parameter {one.name!r} is described twice, and differently")
        return f"\0_{one.name}\1"

    return _BRACE.sub(mark, line)


def _check_script(marked: str, parameters: _Parameters) -> None:
    """Refuse a parameter whose value a shell could split, expand, evaluate or run where it stands."""
    for name in _MARK.findall(_ASSIGNMENTS.sub("", marked, count=1)):
        one = parameters[name]
        if one.type not in ("word", "int", "float", "path") and not one.choices:
            raise ConfigError(
                f"parameter {name!r} of type {one.type} may stand only in assignments at the beginning of the "
                f'script, where a shell does not split it: !{name}={{{name}:{one.type}}}; ... "${name}"'
            )
    for one in parameters.values() if _ARITHMETIC.search(marked) else ():
        if one.type != "int" and not one.choices:
            raise ConfigError(f"the script has arithmetic, which evaluates names: make parameter {one.name!r} an int")
    for name in map("".join, _PROGRAM_PLACE.findall(marked)):
        if parameters[name].type != "int":
            raise ConfigError(f"the program itself cannot be a parameter: {name!r}")


class Launch(NamedTuple):
    """One execution of a command's program that is to be started."""

    command: Command
    argv: Sequence[str]
    env: _Texts
    stderr: str
    takes_input: bool  # by a pipe, or the terminal if it runs on one


_HIDDEN = "STREAMLOG_.*|LISTEN_.*|NOTIFY_SOCKET|CREDENTIALS_DIRECTORY"  # variables that no command gets
_PASSED_HEADER = re.compile("(?i)(?!(?:proxy|(?:proxy-)?authorization|(?:set-)?cookie2?)$)[a-z0-9-]+")
_OPTIONS = {  # of a command
    "command": _TEXT,
    "about": _TEXT,
    "method": _Rule(str.upper, ("GET", "POST").__contains__, "GET or POST"),
    "timeout": _Rule(float, lambda seconds: 0 <= seconds < inf, "a number of seconds, or 0 for no limit"),
    "max": _COUNT_1,
    "stderr": _Rule(str, ("merge", "separate", "discard").__contains__, "merge, separate or discard"),
    "stdin": _SWITCH_RULE,
    "pty": _Rule(_read_switch, (True, False, "echo").__contains__, "yes, no or echo", "True, False or 'echo'"),
    "terminal": _TERMINAL,
    "shared": _SWITCH_RULE,
    "stop": _Rule(
        lambda text: text.upper().removeprefix("SIG"),
        lambda name: f"SIG{name}" in signal.Signals.__members__,
        "the name of a signal, as in INT",
    ),
    "headers": _Rule(
        lambda text: [name.strip() for name in text.split(",")],
        lambda names: not isinstance(names, str) and all(map(_PASSED_HEADER.fullmatch, names)),
        "names of request headers, with commas between, and no credentials",
    ),
    "cwd": _FOLDER,
    "env": _Rule(
        lambda text: dict(line.split("=", 1) for line in text.splitlines() if line),  # blanks are gone
        lambda env: all(
            re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) and "\0" not in value for name, value in env.items()
        ),
        "NAME=value, one a line",
        "a dict of names and texts",
    ),
    "type": _Rule(str, re.compile(r"[!-~]+/[!-~]+( *;[ -~]+)?").fullmatch, "a Content-Type such as text/csv"),
}


@dataclass
class Command:
    """What a name runs. Raises ConfigError for a mistake that can be seen without running it.

    command: a command line with placeholders, split by shlex and run without a shell, or `!` and a script for /bin/sh;
        a list of arguments, with placeholders in them; or a task: a callable, called in a thread of its own with the
        values that its signature names. about: a description. method: GET or POST; None: POST if it takes input, or
        else GET. timeout: seconds, 0 for no limit, None for the server's. max: runs at a time, or None. stderr: merge,
        separate or discard; None: merge in text, where order counts, and separate in the formats that tell it apart.
        stdin: whether the body of a POST or PUT is its standard input. pty: whether it runs on a terminal; "echo": on
        one that echoes its input, and ends lines by CRLF. terminal: its columns and lines, or None. shared: whether a
        client joins the run that goes on with the same values. stop: the signal that asks it to end. headers: request
        headers that it gets as variables, User-Agent as HTTP_USER_AGENT. cwd: the directory to run in. env: variables
        to add to this program's environment, as it is when the Command is made. type: the Content-Type of the output.
    """

    command: _Runnable
    about: str = ""
    method: Optional[str] = None
    timeout: Optional[float] = None
    max: Optional[int] = None
    stderr: Optional[str] = None
    stdin: bool = False
    pty: Union[bool, Literal["echo"]] = False
    terminal: Optional[tuple[int, int]] = None
    shared: bool = False
    stop: str = "TERM"
    headers: Sequence[str] = ()
    cwd: Union[str, os.PathLike[str], None] = None
    env: _Texts = dataclasses.field(default_factory=dict)
    type: str = _PLAIN_TEXT
    is_report = False  # whether a page of it opens at its beginning, and does not follow its end
    program = ""  # a task has none

    def __post_init__(self) -> None:
        self._check_options()
        given: Any = self.command
        is_text = isinstance(given, str)
        if not (is_text or callable(given)):
            try:
                given = list(map(os.fsdecode, [given] if isinstance(given, Mapping) else given))
            except TypeError:
                raise ConfigError(f"it must be a command line, a list of arguments or a callable: {given!r}") from None
            self.command = given
        self.is_source = given == "-"  # the server's own standard input
        self.is_shell = is_text and given.lstrip().startswith("!")
        self.shared = self.shared or self.is_source
        if self.shared and (self.stdin or self.headers):
            raise ConfigError("a shared command can have neither stdin nor headers: it serves more than one request")
        self.method = self.method or ("POST" if self.stdin else "GET")
        self.methods = sorted({self.method, *(("POST", "PUT") if self.stdin else ())})
        self.is_plain_text = bool(re.match("(?i)text/plain *(;|$)", self.type))  # a note of ours may follow
        self.parameters: _Parameters = {}
        if callable(given):
            if self.stdin or self.pty or self.env or self.cwd or self.headers:
                raise ConfigError("a task has no process: stdin, pty, env, headers and cwd are not for it")
            self.about = self.about or (inspect.getdoc(given) or "").partition("\n")[0]
            _read_signature(given, self.parameters)
            self._arguments = [f"\0_{name}\1" for name in self.parameters]
            name = str(getattr(given, "__name__", given)).lstrip("_")
            self.line = f"{name}({', '.join(self.parameters)})" if name.isidentifier() else name
        else:
            self.line = given if is_text else shlex.join(given)
            self._arguments = self._read_words(["cat" if self.is_source else given] if is_text else given)
            self.program = "/bin/sh" if self.is_shell else self._arguments[0]
        self.defaults = {one.name: one.default for one in self.parameters.values()}
        for one in self.parameters.values():
            for value in [*one.choices, one.default]:
                try:
                    if value is not None:
                        list(map(partial(self._complete, "", {one.name: value}), self._arguments))
                except Error as error:
                    raise ConfigError(f"default or choice of {error}") from None
        inherited = {key: value for key, value in os.environ.items() if not re.fullmatch(_HIDDEN, key)}
        # Python's newer prompt redraws itself with each key, which curl cannot show.
        terminal = {"TERM": "xterm-256color", "PYTHON_BASIC_REPL": "1"} if self.pty else {}
        if self.pty and not self.stdin:  # nobody could press a key
            terminal |= dict.fromkeys(("PAGER", "GIT_PAGER", "MANPAGER", "SYSTEMD_PAGER"), "cat")
        self._environment = {**inherited, "PYTHONUNBUFFERED": "1", **terminal, **self.env}

    def _check_options(self) -> None:
        for name, rule in _OPTIONS.items():
            value = getattr(self, name)
            if name != "command" and value != Command.__dataclass_fields__[name].default:
                rule.check(name, value)

    def _read_words(self, words: Sequence[str]) -> list[str]:
        """The arguments of a command line, a script or a list of words, with marks for the parameters."""
        marked = [_mark_placeholders(word, self.parameters) for word in words]
        if self.is_shell:
            marked = [marked[0].lstrip()[1:].lstrip()]
            _check_script(marked[0], self.parameters)
        elif isinstance(self.command, str):
            try:
                marked = shlex.split(marked[0])
            except ValueError as error:
                raise ConfigError(f"cannot be split into arguments: {str(error).lower()}") from None
        if not any(marked[:1]):
            raise ConfigError("the command line is empty")
        if "\0" in marked[0] and not self.is_shell:
            raise ConfigError("the program itself cannot be a parameter")
        return marked

    def bind(
        self, name: str, values: _Texts, stderr: str = "merge", takes_input: bool = False, variables: _Texts = _NO_TEXTS
    ) -> Union[Launch, partial[Any]]:
        """Put values in their places. Raises Error for one that is missing or refused; `name` is for its text.

        `stderr` is where standard error goes unless the command itself says so, and `variables` are added to the
        environment.
        """
        bound: Any = {key: values.get(key, default) for key, default in self.defaults.items()}
        for key, value in bound.items():
            if value is None:
                raise Error(f"parameter {key!r} of {name!r} is required: give it as {key}=...")
        argv = [self._complete(f" of {name!r}", bound, argument) for argument in self._arguments]
        uses = _MARK.findall("".join(self._arguments))
        if sum(len(bound[use].encode(errors="replace")) for use in uses) > _VALUE_BYTES:
            raise Error(f"the values of {name!r} may have {_VALUE_BYTES} bytes at most, each as often as it is used")
        if callable(self.command):
            try:
                return partial(self.command, **{key: self.parameters[key].read(value) for key, value in bound.items()})
            except ValueError as error:  # Python reads no int of thousands of digits
                raise Error(f"a value of {name!r} cannot be read: {error}") from None
        env = {**self._environment, **variables}
        if self.is_shell:
            argv = ["/bin/sh", "-c", _MARK.sub(r"${arg_\1}", self._arguments[0])]
            env |= {f"arg_{key}": value for key, value in bound.items()}
        stderr = self.stderr or ("merge" if self.pty else stderr)
        return Launch(self, argv, env, stderr, takes_input)

    def _complete(self, of: str, bound: _Texts, argument: str) -> str:
        """Put values into an argument, or into a script. Raises Error for one that must not stand there."""
        if "\0" not in argument:
            return argument
        text, *rest = _MARK.split(argument)
        for name, literal in zip(rest[::2], rest[1::2]):
            if name in bound:
                starts = bool(re.search(r"(?:^|[\s<>;&|(])[\"']?$", text)) if self.is_shell else not text
                may_be_option = callable(self.command) or not (starts or self.is_shell)
                problem = self.parameters[name].find_problem(bound[name], starts, may_be_option)
                if problem:
                    raise Error(f"parameter {name!r}{of} {problem}: {bound[name][:200]!r}")
            text += bound.get(name, "x") + literal
        # Behind a letter, as in -Idir, a path may begin too; and a shell removes quotes.
        plain = re.sub(r"[\"'\\]", "", argument) if self.is_shell else argument
        apart = re.sub(r"(?<=[^\W_])(?=\.?\0)", "/", plain)
        paths = {key: value for key, value in bound.items() if self.parameters[key].type != "text"}
        filled = _MARK.sub(lambda mark: paths.get(mark[1], "x"), apart)
        if len(_UP.findall(filled)) > len(_UP.findall(_MARK.sub("x", apart))):
            raise Error(f"the values{of} must not make up '..': {text[:200]!r}")
        return text


def _read_signature(task: Any, parameters: _Parameters) -> None:
    """Add the parameters of a task to the others. Raises ConfigError."""
    function = _find_function(task)
    try:
        signature = inspect.signature(task)
        given = {one.name: one.annotation for one in signature.parameters.values() if one.annotation is not one.empty}
        known = getattr(inspect.unwrap(function), "__globals__", {})
        hints = typing.get_type_hints(SimpleNamespace(__annotations__=given), known)  # without that of the result
    except (NameError, TypeError, ValueError) as error:
        raise ConfigError(f"the signature of the task cannot be read: {error}") from None
    for name, parameter in signature.parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"parameter {name!r} of a task must be one that is given by its name")
        default = parameter.default
        annotation = hints.get(name, str if default in (None, parameter.empty) else type(default))
        try:
            made = _read_annotation(name, annotation if default is not None else Optional[annotation])
        except (LookupError, TypeError, ValueError):
            raise ConfigError(
                f"parameter {name!r} of a task must be a str, int, float, bool, Path, Literal or Enum, or an Optional "
                f"or a list of one: {annotation!r}"
            ) from None
        parameters[name] = made._replace(default=None if default is parameter.empty else _text_of(default))


def _find_function(task: Any) -> _Function:
    """The function of a task, which may be a partial or an object. Raises ConfigError for a coroutine."""
    while isinstance(task, partial):
        task = task.func
    if not hasattr(task, "__globals__"):
        task = type(task).__call__
    if inspect.iscoroutinefunction(task) or inspect.isasyncgenfunction(task):
        raise ConfigError("a task runs in a thread of its own: it cannot be a coroutine (wrap it in asyncio.run)")
    return task  # type: ignore[no-any-return]


def _read_annotation(name: str, annotation: Any) -> Parameter:
    """A parameter for values of a type. Raises LookupError, TypeError or ValueError for a type that is not known."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if type(None) in arguments:  # empty text stands for None, as a form sends it
        [inner] = set(arguments) - {type(None)}
        made = _read_annotation(name, inner)
        pattern = re.compile(f"(?:{made.pattern.pattern})?", made.pattern.flags)
        choices = made.choices and ["", *made.choices]
        return made._replace(pattern=pattern, choices=choices, read=lambda text: made.read(text) if text else None)
    if list in (origin, annotation):
        made = _read_annotation(name, *(arguments or [str]))
        return made._replace(is_list=True, read=lambda text: [*map(made.read, text.splitlines())])
    if annotation is bool:
        pattern = re.compile("1|0|yes|no|true|false|on|off", re.IGNORECASE)
        return _make_parameter(name, "yes|no")._replace(pattern=pattern, read=_read_switch)
    if origin is Literal or isinstance(annotation, enum.EnumMeta):
        known = {_text_of(value): value for value in arguments or annotation}
        return _make_parameter(name, "|".join(known), list(known))._replace(read=known.__getitem__)
    is_path = isinstance(annotation, type) and issubclass(annotation, os.PathLike)
    type_ = "path" if is_path else {str: "text", int: "int", float: "float"}[annotation]
    return _make_parameter(name, type_)._replace(read=annotation)


def _text_of(value: Any) -> str:
    """A value as a URL has it."""
    if isinstance(value, (list, tuple)):
        return "\n".join(map(_text_of, value))
    if isinstance(value, enum.Enum):
        return value.value if isinstance(value.value, str) else value.name
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _make_command(name: str, options: _Texts, where: str = "") -> Command:
    """A command from its options as text. An error names the command and the place."""
    try:
        if not _NAME.fullmatch(name):
            raise ConfigError("its name must be letters, digits, '.', '_' and '-' (NAME=COMMAND LINE)")
        if "command" not in options:
            raise ConfigError("'command = ...' is missing")
        for key in options:
            if key not in _OPTIONS:
                raise ConfigError(f"unknown option {key!r}; known are {', '.join(_OPTIONS)}")
        return Command(**{key: _OPTIONS[key].parse(key, text) for key, text in options.items()})
    except ConfigError as error:
        raise ConfigError(f"{where}command {name!r}: {error}") from None


def _parse_command_argument(text: str) -> tuple[str, Command]:
    """The name and command of `[METHOD:]NAME=COMMAND LINE`, or of a bare command line."""
    [(method, name, line)] = re.findall(rf"(?s)^(?:(?:([A-Za-z]+):)?({_NAME.pattern})=)?(.*)", text)
    if not name:
        name = "stdin" if line == "-" else os.path.basename(re.findall(r"[^!\s]\S*|$", line)[0])
    return name, _make_command(name, {"command": line, "method": method or "GET"})


def _read_config(path: str) -> Iterator[tuple[str, Command]]:
    """The commands of a file, in its order (configparser, without interpolation). Raises ConfigError."""
    import configparser

    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    try:
        parser.read_string(re.sub("(?m)^;", "#", _read_text(path)), path)  # a script may have more, behind blanks
    except configparser.Error as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not parser.sections():
        raise ConfigError(f"{path}: there is no command in it: a command is a section, [NAME]")
    for name in parser.sections():
        yield name, _make_command(name, dict(parser[name]), f"{path}: ")


def _read_text(path: str) -> str:
    """What is in a file. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"cannot read {path!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None


# The read-only diagnostics that are served if no command is given: a name, what it shows, and ways to show it. The
# first way is taken whose program is found, and whose absolute paths exist (a path in brackets is only looked for), so
# that Linux, macOS, busybox and a container that has nothing but Python each get theirs. A way that is only paths is a
# task that shows these files.
_DIAGNOSTICS = """
uptime | How long the machine is up, and its load | uptime | /proc/uptime /proc/loadavg
load | Load averages, once a second (live) | _load
system | Kernel and architecture | uname -a | /proc/version
release | Operating system release | /etc/os-release | sw_vers
cpu | Processors | lscpu | sysctl hw.ncpu machdep.cpu.brand_string | /proc/cpuinfo
memory | Memory in use | free -m | vm_stat | /proc/meminfo
disk | Space on file systems | df -h | _disk
inodes | Inodes on file systems | df -i
mounts | What is mounted where | /proc/mounts | mount
processes | All processes | ps aux | /proc/[0-9]*/cmdline
top | The busiest processes (live) | [/usr/lib/*/libproc*] top -b -w -d 2 | [/usr/lib*/libproc*] top -b -w -d 2 | \
[/proc/stat] top -b -d 2 | top -l 0 -s 2 -n 20
vmstat | Processor, memory and paging, once a second (live) | vmstat 1 | vm_stat 1
iostat | Disk activity, every two seconds (live) | [/proc/stat] iostat 2 | iostat -w 2
journal | The system journal (live) | [/run/systemd/journal] journalctl -n {lines:int=50} -f
syslog | The system log (live) | tail -n {lines:int=50} -F /var/log/syslog | tail -n {lines:int=50} -F /var/log/messages
dmesg | Kernel messages | dmesg
services | Running services | [/run/systemd/system] systemctl list-units --state=running --no-pager
failed | Failed units | [/run/systemd/system] systemctl list-units --failed --no-pager
users | Who is logged in | who
addresses | Network interfaces and addresses | ip address | ifconfig -a | /proc/net/dev
routes | Routing table | ip route | netstat -rn | /proc/net/route
sockets | Listening and open sockets | ss -tunap | netstat -an | /proc/net/tcp /proc/net/tcp6
ping | Reach a host (live) | ping -c {count:int=5} {host}
lookup | Look a name up | getent ahosts {name} | dscacheutil -q host -a name {name} | nslookup {name}
"""


def _diagnostics() -> Iterator[tuple[str, Command]]:
    """The built-in commands that this machine can run."""
    for line in _DIAGNOSTICS.strip().splitlines():
        name, about, *ways = line.split(" | ")
        for way in ways:
            needed = re.findall(r"(?<![^ \[])/[^ ]+?(?=\]? |\]?$)", way)
            shown = way.rpartition("] ")[2]
            task = {"_load": _load, "_disk": _disk}.get(shown) or (_reading(shown) if shown[0] == "/" else None)
            if all(map(glob.glob, needed)) and (task or shutil.which(shown.split()[0])):
                # procps takes these for the size of a sample where -w is given; any other top shows all.
                command = Command(task or shown, about, env={"COLUMNS": "100", "LINES": "27"} if name == "top" else {})
                command.is_report = "(live)" not in about
                yield name, command
                break


def _reading(paths: str) -> _Function:
    """A task that shows files; those of a pattern with their names."""

    def read() -> Iterator[str]:
        for pattern in paths.split():
            for path in glob.glob(pattern):
                with suppress(OSError), open(path, errors="replace") as file:  # the process has ended
                    text = file.read().replace("\0", " ")
                    yield f"{path}: {text}\n" if "*" in pattern else text

    read.__name__ = f"read {paths}"
    return read


def _load() -> Iterator[str]:
    while True:
        yield time.strftime("%T {:.2f} {:.2f} {:.2f}\n").format(*os.getloadavg())
        time.sleep(1)


def _disk() -> str:
    found = shutil.disk_usage("/")
    return f"{found.free >> 20} MiB of {found.total >> 20} MiB are free on /\n"


# ---------------------------------------------------------------------------------------------
# runs: their slots and entries; then a process group or a task's thread, and the one place that ends both

_RUN_DESCRIPTORS = 6  # of a run: its outputs, its bell, its exit, and the transcript and watchdog of a kept one
_ABANDON_SECONDS = 2.0  # for a process to be gone after SIGKILL: it can be stuck in the kernel
_LOOK_SECONDS = 0.05  # between looks at what no event reports
_REMIND_SECONDS = 0.25
_HANG_UP_SECONDS = 0.3  # after SIGTERM, for a program on a terminal to clean up
# A read starts small, so that an idle stream costs nothing, and grows to the largest pipe once one has been full.
_BLOCK_MIN_BYTES = 16 * 1024
_BLOCK_MAX_BYTES = 512 * 1024
_SET_PIPE_SIZE = 1031  # F_SETPIPE_SZ, which Python has since 3.10; systems other than Linux refuse it
# In the spelling that every shell takes. The jobs of a terminal are groups of the same session (proc_pid_stat(5)).
_WATCHDOG = """read -r _; kill -$2 -$0; sleep $1; kill -KILL -$0
for f in /proc/[0-9]*/stat; do read -r l <$f && set -- ${l##*\\) } && [ $4 = $0 ] && kill -KILL -$3; done"""
# Why the server ends a run, besides its timeout and its output limit.
_CLIENT_GONE = "client gone"
_CLIENT_STALLED = "client stalled"
_SHUTTING_DOWN = "the server is shutting down"
_OVERTAKEN = "what was asked for is no longer kept"
_ON_REQUEST = "on request"
_BEYOND = ", but processes of another user may go on"

_Action = Callable[[], object]
_Maker = Callable[[Settings, Optional[float], _Action], "Run"]


def _maker(launch: Launch | partial[Any]) -> _Maker:
    return partial(Process, launch) if isinstance(launch, Launch) else partial(Task, launch)


def _busy(what: str, advice: str = "try again when one has ended") -> Error:
    return Error(f"{what}: {advice}", 503, {"Retry-After": "1"})


def _shortage(error: Exception) -> Error:
    return _busy(f"the machine is short of resources ({getattr(error, 'strerror', None) or error})", "try again later")


class Outcome(NamedTuple):
    """How a run ended: `reason` is why the server ended it, and empty if it ended by itself."""

    exit_code: int
    reason: str
    seconds: float
    signal: int | None = None
    is_final: bool = True  # False for an answer that ends before the run does, as with ?follow=0

    @property
    def kind(self) -> str:
        """The end in a word: ok, failed, or why the server ended the run."""
        if not self.reason:
            return "failed" if self.exit_code else "ok"
        if self.reason.startswith(_SHUTTING_DOWN):
            return "shutdown"
        known = re.match(f"timeout|output limit|{_CLIENT_GONE}|{_CLIENT_STALLED}", self.reason)
        return known[0].replace(" ", "_") if known else "stopped"

    @property
    def note(self) -> str:
        """The end as a line for people."""
        end = f"stopped: {self.reason}" if self.reason else f"exit {self.exit_code}"
        end = "stopped" if self.reason == _ON_REQUEST else end
        return f"{end}, {self.seconds:.1f} s" if self.is_final else "not the end"


# The series of /-/metrics: name, type and description.
_METRICS = """\
runs_total counter Runs that have ended.
runs_active gauge Runs that are going on.
viewers gauge Readers of kept runs.
output_bytes_total counter Bytes of output that were sent.
run_seconds_total counter Time that runs have taken.
clients gauge Open connections."""
_METRICS_HEADERS = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}


class _Runs:
    """The runs of a site: a slot for each that goes on, the kept ones with their bounds, and what is counted."""

    def __init__(self, settings: Settings, closing: _Bell | None) -> None:
        self.max_runs, self._kept_max = settings.max_runs, settings.kept_runs
        self.active: set[_Entry] = set()  # with a slot each
        self._settings = settings
        self._closing: Any = closing  # None only where no run is kept
        self._sharing = Lock()  # held while a shared run is found or started, so that each is started once
        self._lock = RLock()  # guards the rest
        self._kept: list[_Entry] = []  # the oldest first; replaced at each change, as others may be looking at it
        self._transcripts: WeakSet[Transcript] = WeakSet()  # theirs, and those of runs that are being started
        self._counts: dict[str, float] = collections.defaultdict(float)  # by series, with its labels

    def limit(self, descriptors: int) -> None:
        """Allow no more runs than there are descriptors for; a fifth of them are for runs that have ended."""
        self._kept_max = min(self._kept_max, descriptors // 5)
        affordable = max(1, (descriptors - descriptors // 5) // _RUN_DESCRIPTORS - 2)
        if affordable < self.max_runs:
            _log.warning("there are descriptors for %d runs only, not %d: raise ulimit -n", affordable, self.max_runs)
            self.max_runs = affordable

    def check_slot(self, name: str, command: Command) -> None:
        """Refuse a run for which there is no slot now. Raises Error."""
        with self._lock:
            if len(self.active) >= self.max_runs:
                raise _busy(f"{self.max_runs} of {self.max_runs} runs are going on")
            if command.max and sum(entry.name == name for entry in list(self.active)) >= command.max:
                raise _busy(f"{command.max} of {command.max} runs of {name!r} are going on")

    def start(self, entry: _Entry) -> Run:
        """Take a slot, and start a run. Raises Error."""
        settings, timeout = self._settings, entry.command.timeout
        with self._lock:
            self.check_slot(entry.name, entry.command)
            self.active.add(entry)
            self._counts[f'runs_active{{command="{entry.name}"}}'] += 0  # shown from now on
        release = partial(self.active.discard, entry)
        run = None
        try:
            run = entry.run = entry.make(settings, settings.timeout_seconds if timeout is None else timeout, release)
            if _log.isEnabledFor(logging.DEBUG):
                started = _printable(f"{entry.command.line} {entry.values}")
                _log.debug("started %s as %s: %s", entry.name, run.name, started)
            return run
        except BaseException as error:
            if run:
                run.close()
            release()
            self._counts[f'runs_total{{command="{entry.name}",outcome="not_started"}}'] += 1
            if isinstance(error, (OSError, RuntimeError)):
                raise _shortage(error) from None
            raise

    def keep(self, entry: _Entry, given: Iterable[bytes] = ()) -> None:
        """Start a run that outlives its client, with its input. Raises Error."""
        size = self._settings.transcript_bytes
        with self._lock:  # or another could take the same room
            room = min(size, self.drop_ended(wanted_bytes=size))
            if room < min(_TRANSCRIPT_MIN_BYTES, size):
                raise _busy("there is no room for another transcript")
            entry.transcript = _open_transcript(self._settings, room)
            entry.transcript.drop_another = self._drop_another
            self._transcripts.add(entry.transcript)
        run: Any = self.start(entry)
        try:
            if run.takes_input:
                _start_thread("streamlog-input", run.feed, given)
            entry.thread = _start_thread(f"streamlog-kept {entry.name}", self._record, entry)
        except RuntimeError as error:
            run.close()
            raise _shortage(error) from None
        with self._lock:
            self._kept = [*self._kept, entry]

    def share(self, entry: _Entry) -> _Entry:
        """The run with the same command and values that goes on, or else a new one. It is entered: `leave` it."""
        with self._sharing:
            for found in self.find_shared(entry):
                found.enter()
                if found.goes_on:
                    return found
                found.leave()
            if not entry.command.is_source:
                entry.linger_seconds = self._settings.linger_seconds
            entry.key = entry.name, entry.values
            entry.enter()
            self.keep(entry)
            return entry

    def find_shared(self, entry: _Entry) -> list[_Entry]:
        """The shared run that goes on with the same command and values, if there is one."""
        return [one for one in self._kept if one.key == (entry.name, entry.values) and one.goes_on]

    def _record(self, entry: _Entry) -> None:
        """Write the output of a kept run into its transcript, until its end or the server's, and note how it ended."""
        run, transcript = entry.run, entry.transcript
        try:
            with closing(run):
                while not run.is_over:
                    with _watchdog(run) as dog:
                        self._copy(run, transcript, dog)
        except Exception:
            _log.exception("a bug: kept run of %s", entry.name)
        entry.ended = monotonic()
        outcome = transcript.outcome = entry.outcome = run.outcome
        transcript.wake()
        self.drop_ended()
        self.count_end(entry.name, outcome, transcript.end)
        _log.info(
            f"kept={entry.id} command={entry.name} exit={outcome.exit_code} bytes={transcript.end} "
            f'seconds={outcome.seconds:.3f} end="{outcome.reason or "exit"}"'
        )

    def _copy(self, run: Run, transcript: Transcript, dog: _Events) -> None:
        """Write output into a transcript, until its end or that of the watchdog."""
        others = {self._closing.descriptor: POLLIN, **dog}
        while not run.is_over:
            for descriptor in run.wait(others):
                if descriptor in dog:
                    time.sleep(_LOOK_SECONDS)  # in case that it cannot live
                    return
                if descriptor in others:
                    del others[descriptor]
                    run.stop(_SHUTTING_DOWN)
                else:
                    data = run.read(descriptor)
                    transcript.write(run.stream, data)
                    transcript.wake()
        run.close()  # while it has a watchdog

    def find(self, id_: str) -> _Entry:
        """The kept run of an id. Raises Error."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{22}", id_):
            raise Error("there is no such run: an id has 22 letters, digits, '-' and '_'", 404)
        for entry in self.listed():
            if entry.id == id_:
                return entry
        raise Error("that run has ended and is not kept, or belongs to another server: see /-/runs", 410)

    def listed(self) -> list[_Entry]:
        """The runs that go on, the oldest first, and the kept ones that have ended, the newest first."""
        self.drop_ended()
        going = (entry for entry in list(self.active) if hasattr(entry, "run"))
        return sorted(
            {*self._kept, *going}, key=lambda one: (-one.started_at, 0) if one.ended else (-inf, one.started_at)
        )

    def drop_ended(self, unwanted: _Entry | None = None, wanted_bytes: int = 0) -> int:
        """Drop ended runs that are unwanted, too old, too many, or in the way of a new transcript, the oldest first;
        but not standard input, which cannot be read again. Their files are closed with their last readers. Returns the
        bytes that are left for a transcript."""
        settings = self._settings
        with self._lock:
            free = settings.transcripts_bytes - sum(one.room for one in self._transcripts)
            ended = [entry for entry in self._kept if entry.ended and not entry.command.is_source]
            ended.sort(key=lambda entry: entry.ended)
            past = set()
            for index, entry in enumerate(ended):
                is_past = len(ended) - index > self._kept_max or monotonic() - entry.ended > settings.kept_seconds
                if is_past or entry is unwanted or (free < wanted_bytes and not entry.viewers):
                    past.add(entry)
                    free += entry.transcript.room
            self._kept = [entry for entry in self._kept if entry not in past]
            return free

    def _drop_another(self) -> bool:
        """Make room on the disk: drop the next ended run that nobody reads. False if there is none."""
        with self._lock:
            count = len(self._kept)
            self.drop_ended(wanted_bytes=self.drop_ended() + 1)
            return len(self._kept) < count

    def metrics(self, client_count: int) -> str:
        """The counts in Prometheus' text format (version 0.0.4)."""
        with self._lock:
            counts = self._counts.copy()
            for entry in list(self.active):
                counts[f'runs_active{{command="{entry.name}"}}'] += 1
        counts["clients"], counts["viewers"] = client_count, sum(entry.viewers for entry in self._kept)
        text = ""
        for line in _METRICS.split("\n"):
            name, type_, about = line.split(" ", 2)
            text += f"# HELP streamlog_{name} {about}\n# TYPE streamlog_{name} {type_}\n"
            text += "".join(f"streamlog_{key} {counts[key]:.10g}\n" for key in sorted(counts) if key.startswith(name))
        return text

    def kill(self) -> None:
        """Stop every run without a grace time."""
        for entry in list(self.active):
            if hasattr(entry, "run"):  # or else it is only being started
                entry.run.stop(_SHUTTING_DOWN, 0)

    def join(self, deadline: float) -> bool:
        """Wait for the kept runs to end; False if some have not by the deadline."""
        for entry in self._kept:
            entry.thread.join(max(0.0, deadline - monotonic()))
        return all(entry.ended for entry in self._kept)

    def count_end(self, name: str, outcome: Outcome, sent_bytes: int) -> None:
        """Count a run that has ended."""
        with self._lock:
            self._counts[f'runs_total{{command="{name}",outcome="{outcome.kind}"}}'] += 1
            self._counts[f'output_bytes_total{{command="{name}"}}'] += sent_bytes
            self._counts[f'run_seconds_total{{command="{name}"}}'] += outcome.seconds


class Run:
    """One execution, from its start until all of it is gone: what processes, tasks and replays have in common.

    The thread that starts a run owns it: only that one waits, reads and closes. Any thread may stop it.
    """

    name = "a replay"  # for the log
    _stop_signal: int = signal.SIGTERM  # that asks it to end
    takes_input = False
    stream = ""  # of what was read last
    output_bytes = 0  # that were read
    skipped_bytes = 0  # of output before what was read last, which was overwritten before it could be read
    seconds = 0.0
    reason = ""  # why it was ended, unless it ended by itself
    exit_code: int | None = None
    signal: int | None = None  # that it died of
    is_stopping = False  # whether it was asked to end
    is_gone = False  # whether nothing of it is left, or it was given up
    _block = _BLOCK_MIN_BYTES  # to read at a time
    _is_killed = False
    _is_drained = False

    def __init__(self, settings: Settings, timeout: float | None) -> None:
        self.outputs: dict[int, tuple[str, IO[bytes]]] = {}  # streams and files, by the descriptors to read from
        self.started = monotonic()
        try:
            self.bell = _Bell()
        except OSError as error:
            raise _shortage(error) from None
        self._exit = self.bell.descriptor  # turns readable at the exit
        self._held = ExitStack()  # what to close, and to call, once all is gone
        self._settings = settings
        self._owner = os.getpid()
        self._lock = RLock()  # guards the process and its input against other threads
        self._agenda: dict[_Action, float] = {}  # what is to be done, by monotonic()
        self._owed: dict[int, float] = {}  # bytes that are still to be read of an output, after the drain time
        self._timeout = timeout
        self.later(timeout or inf, self._time_out)

    @property
    def outcome(self) -> Outcome:
        """How a run that is over has ended."""
        return Outcome(self.exit_code or 0, self.reason, self.seconds, self.signal)

    @property
    def is_over(self) -> bool:
        """Whether it has ended and no output is left to read. Others of a process's group may still be ending."""
        return self.exit_code is not None and not self.outputs

    def pieces(self, given: Format | None, client: _Connection | None = None) -> Iterator[bytes]:
        """The body of an answer: the format's beginning, the output as it comes, the end. Raises _Gone.

        An empty piece lets the caller look around. The next output is read only when the client has taken the last, so
        that a slow client slows only its own command.
        """
        format_ = given or Format(Options(notes="never"))
        yield format_.beginning
        while not self.is_over:
            ready = self.wait(client.watched() if client else {}, format_.due)
            if client:
                client.react(ready)
            for descriptor in ready:
                data, skipped = self.read(descriptor, format_.block_bytes), self.skipped_bytes
                if skipped and not format_.can_skip:  # the client could not tell that something is missing
                    self.stop(_OVERTAKEN)
                    break
                yield format_.skip(skipped) if skipped else b""
                for part in format_.cut(data):
                    yield format_.feed(self.stream, part)
                data = part = b""  # the next block takes its place in memory
            yield format_.pause() if monotonic() >= format_.due else b""
        yield format_.end(self.outcome)

    def wait(self, others: _Events, deadline: float = inf, is_paused: bool = False) -> _Events:
        """Wait for output, for the end, for a moment when something is due, or for any other descriptor.

        Returns the descriptors that are ready. A paused run is not watched for output: its pipe fills up, and then the
        command waits.
        """
        watched, due = self.watched()
        own = watched - self.outputs.keys()  # a replay's output is its bell
        ready = _poll({**others, **dict.fromkeys(own if is_paused else watched, POLLIN)}, min(deadline, due))
        for descriptor in own & ready.keys():
            del ready[descriptor]
            self.bell.silence()
            self._look_for_exit()
        self._look_after()
        return ready

    def watched(self) -> tuple[set[int], float]:
        """The descriptors to read from for this run, and until when to wait for them (monotonic())."""
        return {self.bell.descriptor, self._exit, *self.outputs}, min(self._agenda.values(), default=inf)

    def later(self, seconds: float, action: _Action) -> None:
        """Have the thread that owns the run do something, unless all of the run is gone by then."""
        if not self.is_gone:
            self._agenda[action] = monotonic() + seconds

    def _look_after(self) -> None:
        """Do what is due, in its order: what has ended by itself is not given up."""
        now = monotonic()
        for action in sorted(self._agenda, key=self._agenda.__getitem__):
            if self._agenda.get(action, inf) <= now:
                del self._agenda[action]
                action()
        if self._is_drained and self.reason:  # its answer is cut anyway
            self._drop_outputs()
        if (self.is_over or self._is_drained) and not self.is_gone and self._end not in self._agenda:
            self._end()

    def read(self, descriptor: int, limit: int = _BLOCK_MAX_BYTES) -> bytes:
        """The next block of an output that is ready. Empty at its end, or if there is nothing after all."""
        self.skipped_bytes = 0
        if descriptor not in self.outputs:  # it was closed meanwhile
            return b""
        self.stream, _ = self.outputs[descriptor]
        owed = self._owed.setdefault(descriptor, inf)
        try:
            data = self._take(descriptor, int(min(self._block, owed, limit)))
        except BlockingIOError:
            return b""
        whole, room = len(data), (self._settings.max_output_bytes or inf) - self.output_bytes
        if whole > room:  # said before the output may close, and the run be over
            self.stop(f"output limit of {self._settings.max_output_bytes} bytes")
            data = data[: int(room)]
        self.output_bytes += len(data)
        self._owed[descriptor] -= whole
        if not whole or whole == owed:
            self._close_output(descriptor)
            self._look_after()
        elif whole == _BLOCK_MIN_BYTES:
            self._block = _BLOCK_MAX_BYTES
        return data

    def _take(self, descriptor: int, size: int) -> bytes:
        """Up to so many bytes of an output; none at its end. Raises BlockingIOError if there is nothing yet."""
        try:
            data = os.read(descriptor, size)
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal that nobody has open any more (pty(7))
                raise
            return b""
        if len(data) == _BLOCK_MIN_BYTES:
            with suppress(OSError):  # it is no pipe, or the user's memory for pipes is spent
                fcntl.fcntl(descriptor, _SET_PIPE_SIZE, _BLOCK_MAX_BYTES)
        return data

    def stop(self, reason: str, grace: float = inf) -> None:
        """Ask it to end, and kill it after the grace time, or sooner. The first reason is the one that counts."""
        if self._owner != os.getpid():  # a fork's copy: the run is its parent's
            return
        with self._lock:
            if not self.is_over:
                self.reason = self.reason or reason
            if not (self.is_gone or self._is_killed):
                if grace < inf or not self.is_stopping:
                    self.later(min(grace, self._settings.grace_seconds), self._kill)
                if not self.is_stopping:
                    self.is_stopping = True
                    # What a shell has in the background ignores SIGINT.
                    self._signal(self._stop_signal if self.exit_code is None else signal.SIGTERM)
        self.bell.ring()

    def _kill(self) -> None:
        self._is_killed = True
        self.later(_ABANDON_SECONDS, self._abandon)
        self._signal(signal.SIGKILL)
        if self.exit_code is not None:  # what was killed writes no more
            self._end_drain()

    def _signal(self, number: int) -> None:
        """Ask it to end, end it by force (SIGKILL), or see whether that can be done (0)."""

    def _look_for_exit(self) -> None:
        """Note the exit if it has happened."""

    def _time_out(self) -> None:
        if self.exit_code is None:  # the drain time is not the command's
            self.stop(f"timeout after {self._timeout:g} s")

    def _note_exit(self, code: int) -> None:
        """It has ended. What is in the pipes, or comes in the drain time, still belongs to the answer."""
        self.seconds, self.exit_code, self._exit = monotonic() - self.started, code, self.bell.descriptor
        self.later(0 if self._is_killed else self._settings.drain_seconds, self._end_drain)
        if self._is_killed:
            self.later(_ABANDON_SECONDS, self._abandon)

    def _end_drain(self) -> None:
        """Read only what is in the pipes now: another process that holds them open is not waited for."""
        self._is_drained = True
        self._signal(0)  # may what still holds the pipes be signalled?
        for descriptor in list(self.outputs):
            owed = self._owed[descriptor] = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))[0]
            if not owed:
                self._close_output(descriptor)

    def _abandon(self) -> None:
        """Give up on what no force ends: a process stuck in the kernel, or a task that does not look up."""
        self._look_for_exit()
        if self._abandon in self._agenda:  # it has ended, but nobody had looked
            return
        _log.warning("%s does not end: given up", self.name)
        if self.exit_code is None:
            self._note_exit(128 + signal.SIGKILL)
        if self.outputs:
            self.reason = self.reason or "it does not end"
        self._is_drained = True
        self._finish()

    def _finish(self) -> None:
        self.is_gone = True
        self._agenda.clear()
        with self._lock:
            self._held.close()

    _end = _finish  # after what its end has left has been ended, too

    def close(self) -> None:
        """Stop the run if it goes on, wait until all of it is gone, and free what it holds. May be called twice.

        Takes the grace time at most, and the time to give up. Output that still comes is dropped, but not cut off:
        a command that is cleaning up may print.
        """
        if not self.is_gone:
            self.stop("closed")
        while not self.is_gone:
            for descriptor in self.wait({}):
                self.read(descriptor)
        self._drop_outputs()
        self.bell.close()

    def _drop_outputs(self) -> None:
        for descriptor in list(self.outputs):
            self._close_output(descriptor)

    def _close_output(self, descriptor: int) -> None:
        self.outputs.pop(descriptor)[1].close()


_files: WeakSet[Any] = WeakSet()  # pipes, sockets and the like; a forked process closes its copies


def _own(descriptor: int, mode: str = "rb") -> io.FileIO:
    """Take a descriptor on, never blocking, as a file that can be closed twice."""
    os.set_blocking(descriptor, False)
    file = io.FileIO(descriptor, mode)
    _files.add(file)
    return file


class _Bell:
    """A descriptor that turns readable when any thread rings it, and stays so until it is silenced."""

    def __init__(self) -> None:
        self._lock = RLock()  # re-entrant, because a signal handler may ring
        self.descriptor, self.writing_descriptor = os.pipe()
        self._reader, self._writer = _own(self.descriptor), _own(self.writing_descriptor, "wb")

    def ring(self) -> None:
        with self._lock:
            if not self._writer.closed:
                self._writer.write(b"!")  # it is no matter if the pipe is full

    def silence(self) -> bytes:
        return self._reader.read(1024) or b""

    def close(self) -> None:
        with self._lock:
            self._reader.close()
            self._writer.close()


class Process(Run):
    """A run that is a process group; on a terminal, a session, where a shell makes a group of each job.

    The group's number is its leader's, and stays taken while anyone is left in the group (fork(3p)). Once it is free, a
    stranger may get it, and must not be signalled.
    """

    _is_in_line = False  # of what was written to a terminal

    def __init__(self, launch: Launch, settings: Settings, timeout: float | None, release: _Action) -> None:
        super().__init__(settings, timeout)
        try:
            self._stop_signal = signal.Signals[f"SIG{launch.command.stop}"]
            process = self._process = _spawn(launch, settings)
        except BaseException:
            self.bell.close()
            raise
        self._held.callback(release)
        self.pid = process.pid  # of the leader, and of its group
        self.name = f"process group {self.pid}"
        self._groups = {self.pid}
        self.takes_input = launch.takes_input
        self._stdin = process.stdin
        for stream in ("stdin", "stdout", "stderr"):
            file = getattr(process, stream)
            if file:
                _files.add(file)
                os.set_blocking(file.fileno(), False)
                if stream == "stdin":  # on a terminal its last copy: to close that earlier would hang up on a program
                    self._held.push(file)  # that has closed its files and is about to exit
                else:
                    self.outputs[file.fileno()] = stream, file
        self._terminal: Any = process.stdout if launch.command.pty else None  # our end of it
        if settings.child_nofile:
            with suppress(AttributeError, OSError, ValueError):  # it needs Linux; the process may have ended already
                resource.prlimit(self.pid, resource.RLIMIT_NOFILE, settings.child_nofile)
        try:
            self._exit = self._held.enter_context(_own(os.pidfd_open(self.pid))).fileno()
        except (AttributeError, OSError):  # it needs Linux 5.3, and may be forbidden in a container
            self._look_for_exit()

    def write(self, data: bytes, pause: Callable[[_Events, float], object] = _poll) -> None:
        """Give the command input, as it takes it. Raises BrokenPipeError if it takes no more."""
        view = memoryview(data)
        while view:
            stdin = self._stdin  # another thread may end the input
            try:
                if stdin is None or self.exit_code is not None:
                    raise BrokenPipeError
                with self._lock:  # or it could be closed under our hands, and its number be that of another file
                    view = view[stdin.write(view) or 0 :]
                    descriptor = stdin.fileno()
            except (OSError, ValueError) as error:  # EPIPE, EIO of a terminal, or closed meanwhile
                raise BrokenPipeError("the command takes no more input") from error
            self._is_in_line = data[-1:] != b"\n"
            if view:
                # The end of the run closes the bell, which wakes us up; or it is closed already, and a number reused.
                pause({descriptor: POLLOUT, self.bell.descriptor: 0}, monotonic() + 1)

    def end_input(self) -> None:
        """Tell it that no more comes: on a terminal by VEOF, within a line twice (termios(3))."""
        if self._terminal:
            with suppress(BrokenPipeError):
                self.write(b"\x04\x04"[: 1 + self._is_in_line])
            self.later(_REMIND_SECONDS, self._repeat_end)
            self.bell.ring()
            self._stdin = None
        if self._stdin:
            with self._lock:
                self._stdin.close()

    def _repeat_end(self) -> None:
        """Repeat Ctrl-D while the program reads keys raw: switching to raw mode has discarded the one that was sent."""
        if not self._terminal.closed:
            with suppress(OSError, termios.error):
                if not termios.tcgetattr(self._terminal)[3] & termios.ICANON:
                    os.write(self._terminal.fileno(), b"\x04")
            self.later(_REMIND_SECONDS, self._repeat_end)

    def feed(self, pieces: Iterable[bytes]) -> None:
        """Pass a body on to the command, and then its end. If the body breaks off, the run is stopped, and the command
        sees no end: it could take what it has for all."""
        try:
            with suppress(BrokenPipeError):
                for piece in pieces:
                    self.write(piece)
                self.end_input()
            for _ in pieces:  # the command may ignore the rest
                pass
        except Exception as error:  # each server has its own errors for a client that has left
            self.stop(str(error) if isinstance(error, Error) else _CLIENT_GONE)

    def _signal(self, number: int) -> None:
        if number == signal.SIGTERM and self._terminal:  # which an interactive shell ignores
            self.later(_HANG_UP_SECONDS, partial(self._signal, signal.SIGHUP))
        with self._lock:
            if self._process.returncode is not None and _exists(self.pid):  # a stranger's by now
                return
            if self._terminal:
                with suppress(OSError):  # without a look, the groups that are known must do
                    self._groups |= {group for group, session in _look(monotonic()) if session == self.pid}
            for group in self._groups:
                try:
                    os.killpg(group, number)
                    os.killpg(group, signal.SIGCONT)  # a stopped process acts on a signal only once it continues
                except ProcessLookupError:  # it is empty
                    pass
                except PermissionError:  # as behind sudo
                    if self.reason and _BEYOND not in self.reason:
                        self.reason += _BEYOND

    def _look_for_exit(self) -> None:
        with self._lock:
            code = self._process.poll()
        if code is None:
            if self._exit == self.bell.descriptor:
                self.later(_LOOK_SECONDS, self._look_for_exit)
        elif self.exit_code is None:
            if code < 0:
                self.signal, code = -code, 128 - code
            self._note_exit(code)

    def _end(self) -> None:
        """Ask the rest of the group to end too, and make sure that it does."""
        if self._is_empty():
            self._finish()
            return
        self.stop("")  # it has ended by itself
        if self._is_killed:  # also what was forked, or found, since
            self._signal(signal.SIGKILL)
        self.later(_LOOK_SECONDS, self._end)

    def _is_empty(self) -> bool:
        """Whether nobody lives in the group, once its leader is reaped, or in the terminal's session."""
        try:
            os.killpg(self.pid, 0)
            if _exists(self.pid):  # a stranger has the number by now
                return True
        except ProcessLookupError:
            if not (self._terminal and _HAS_PROC):
                return True
        except PermissionError:  # another user's processes are in it
            pass
        if not _HAS_PROC:
            return False
        try:
            living = _look(self.started)
        except OSError:  # take for living what cannot be looked at
            return False
        if any(self.pid in (group, self._terminal and session) for group, session in living):
            return False
        self._signal(signal.SIGKILL)  # for one that forked during the look; zombies do not mind
        with suppress(ChildProcessError):
            while os.waitpid(-self.pid, os.WNOHANG)[0]:  # if we are process 1, orphans come to us
                pass
        return True


_STDERR = {"merge": subprocess.STDOUT, "separate": subprocess.PIPE, "discard": subprocess.DEVNULL}
# A process that leads a session gets the first terminal that it opens (credentials(7)). A shell does it: Python would
# take thirty milliseconds, and a preexec_fn can deadlock in a program with threads.
_ON_TERMINAL = ("/bin/sh", "-c", ': <>"$0" && exec "$@"')


def _spawn(launch: Launch, settings: Settings) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, with pipes or on a terminal (pty(7)), of which it has our end in their
    place. Raises Error, 500 or 503."""
    command = launch.command
    argv, env, theirs = launch.argv, launch.env, subprocess.PIPE
    terminal = []
    try:
        if command.pty:
            if not shutil.which(argv[0], path=env.get("PATH")):
                raise FileNotFoundError(errno.ENOENT, "No such file or directory")
            ours, theirs = os.openpty()
            terminal.append(_own(ours))
            terminal.append(_own(os.dup(ours), "wb"))
            columns, lines = command.terminal or settings.terminal_size
            _set_terminal(theirs, lines, columns, command.pty == "echo")
            argv = [*_ON_TERMINAL, os.ttyname(theirs), *argv]
            env = {**env, "COLUMNS": f"{columns}", "LINES": f"{lines}"}
        process = subprocess.Popen(
            argv,
            bufsize=0,
            stdin=0 if command.is_source else theirs if launch.takes_input else subprocess.DEVNULL,
            stdout=theirs,
            stderr=_STDERR[launch.stderr],
            cwd=command.cwd,
            env=env,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        for file in terminal:
            file.close()
        number = getattr(error, "errno", 0)
        if number in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM):
            raise _shortage(error) from None
        where = f" in {os.fspath(command.cwd)!r}" if command.cwd else ""
        hint = " (a script needs a #! line)" if number == errno.ENOEXEC else ""
        why = f"{getattr(error, 'strerror', None) or error}{hint}"
        raise Error(f"cannot start {launch.argv[0]!r}{where}: {why}", 500) from None
    finally:
        if theirs != subprocess.PIPE:
            os.close(theirs)
    if terminal:
        process.stdout, process.stdin = terminal
    return process


def _set_terminal(descriptor: int, lines: int, columns: int, echoes: bool) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    if not echoes:
        modes = termios.tcgetattr(descriptor)
        modes[1] &= ~termios.OPOST  # leave the ends of output lines alone
        modes[3] &= ~(termios.ECHO | termios.ECHONL)
        termios.tcsetattr(descriptor, termios.TCSANOW, modes)


# One look at /proc (proc_pid_stat(5)) serves all the runs that are ending. An orphan's zombie stays in its group until
# process 1 reaps it, which takes seconds in some containers, or never happens.
_HAS_PROC = os.path.exists("/proc/self")
_look_lock = Lock()
_Living = set[tuple[int, int]]  # groups and sessions
_seen: tuple[float, _Living] = (-inf, set())  # the moment of the last look, and what it found


def _look(since: float) -> _Living:
    """The groups and sessions of living processes, seen after `since` and at most 50 ms ago. Raises OSError without a
    /proc; there, as on macOS, kill(2) does not count zombies anyway."""
    global _seen  # noqa: PLW0603
    with _look_lock:
        if _seen[0] < max(since, monotonic() - _LOOK_SECONDS):
            moment, living = monotonic(), set()
            for pid in filter(str.isdigit, os.listdir("/proc")):
                with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat", "rb") as file:
                    state, *fields = file.read().rpartition(b")")[2].split()
                    if state not in b"ZX" or int(fields[16]) > 1:  # a zombie leader may have living threads
                        living.add((int(fields[1]), int(fields[2])))
            _seen = moment, living
        return _seen[1]


def _exists(pid: int) -> bool:
    with suppress(ProcessLookupError):
        with suppress(PermissionError):  # it is another user's
            os.kill(pid, 0)
        return True
    return False


@contextmanager
def _watchdog(run: Run) -> Iterator[_Events]:
    """Have a shell end the run's process group if this program is killed, which ends the shell's input. Yields what to
    poll for the end of the shell."""
    with ExitStack() as stack:
        watched = {}
        if isinstance(run, Process):
            words = f"{run.pid}", f"{run._settings.grace_seconds}", f"{run._stop_signal:d}"
            argv, none, env = ["/bin/sh", "-c", _WATCHDOG, *words], subprocess.DEVNULL, {"PATH": os.defpath}
            try:
                dog = subprocess.Popen(  # unbuffered, or in a fork closing its input could wait for a lock for ever
                    argv, 0, stdin=subprocess.PIPE, stdout=none, stderr=none, cwd="/", env=env, start_new_session=True
                )
                pipe: Any = stack.enter_context(dog).stdin
                _files.add(pipe)
                stack.callback(dog.kill)  # before its input is closed
                watched[pipe.fileno()] = 0
            except OSError as error:
                _log.warning("%s has no watchdog: %s", run.name, error)
        yield watched


class Task(Run):
    """A run that is a call of a function of this program, in a thread of its own.

    What it returns, yields and logs goes through a pipe, so that a client that does not read holds up only its own
    task. A thread cannot be ended by force: a task that never looks up keeps its slot.
    """

    refusal: Error | None = None  # that it raised before it wrote anything
    has_written = False

    def __init__(self, call: partial[Any], settings: Settings, timeout: float | None, release: _Action) -> None:
        arguments = ", ".join(f"{name}={value!r}" for name, value in call.keywords.items())
        super().__init__(settings, timeout)
        self.name = f"task {getattr(call.func, '__qualname__', call.func)}({arguments})"
        self._write_lock = Lock()  # guards the writer: threads that the task starts may log, too
        reader, writer = os.pipe()
        self.outputs[reader] = "stdout", _own(reader)
        self._writer = io.FileIO(writer, "wb")  # a write to it waits for the client
        _files.add(self._writer)
        run = contextvars.copy_context().run
        name = getattr(call.func, "__qualname__", "")  # without values, for all see the names of threads
        try:
            _start_thread(f"streamlog-task {name}", run, self._perform, call, release)
        except RuntimeError:
            self._writer.close()
            self._drop_outputs()
            self.bell.close()
            raise

    def write(self, data: bytes) -> None:
        """Add to the output. Raises BrokenPipeError once nobody waits for it any more."""
        view = memoryview(data)
        with self._write_lock:
            while view:
                if self._is_killed or self._writer.closed:
                    raise BrokenPipeError("this run has ended")
                self.has_written = True
                view = view[self._writer.write(view) :]

    def pieces(self, given: Format | None, client: _Connection | None = None) -> Iterator[bytes]:
        """As of any run, but nothing comes before there is output, a heartbeat or the end. Raises the Error that the
        task has raised before any output; without a format, its text is the output."""
        pieces = super().pieces(given, client)
        for ahead in itertools.accumulate(pieces):
            if not given or ((self.has_written or len(ahead) > len(given.beginning)) and not self.refusal):
                break
        else:
            if self.refusal:
                raise self.refusal
        yield ahead
        yield from pieces

    def _perform(self, call: _Action, release: _Action) -> None:
        """Call the function, in its thread, which may outlast the run: it gives the slot back."""
        _task.set(self)
        code, text, failed = 1, "", None
        try:
            try:
                with _program_log.watch():
                    self._write_result(call())
                code = 0
            except SystemExit as error:  # None, a number or what to say, as for sys.exit
                if error.code is None or isinstance(error.code, int):
                    code = error.code or 0
                else:
                    text = f"{error.code}\n"
            except Error as error:  # before any output, it is the answer
                text = f"{error}\n"
                # Its traceback would hold all that it has met.
                self.refusal = None if self.has_written else error.with_traceback(None)
        except BaseException as error:  # also one of the two above that cannot be put into words
            trace = error.__traceback__
            while trace and trace.tb_frame.f_code.co_filename == __file__:
                trace = trace.tb_next
            failed = type(error), error, trace
            text = "".join(traceback.format_exception(*failed))
        with suppress(OSError):
            self.write(text.encode(errors="replace"))
        with self._write_lock:
            self._writer.close()
        if failed:  # /log shows it, unlike our own records
            _log.getChild("task").error("%s failed", self.name, exc_info=failed)
        release()
        self.later(-inf, partial(self._note_exit, code))  # before all else that is due
        self.bell.ring()

    def _write_result(self, result: object) -> None:
        """Write text and bytes as they are, anything else as a line of JSON."""
        pieces = result if isinstance(result, Iterator) else iter([result])
        with closing(pieces) if hasattr(pieces, "close") else nullcontext():  # type: ignore[type-var]
            for piece in pieces:
                if isinstance(piece, (bytes, bytearray, memoryview)):
                    self.write(bytes(piece))
                elif piece is not None:
                    _Output(self).write(piece if isinstance(piece, str) else json.dumps(_plain(piece)) + "\n")
                if self.is_stopping:
                    break


def _plain(value: Any) -> Any:
    """A value as JSON can say it; what nothing better is known for, as str() does."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(one) for key, one in value.items()}
    if isinstance(value, Collection) and not isinstance(value, bytes):
        return list(map(_plain, value))
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


class _Output(io.TextIOBase):
    """A text file that writes to the output of a task."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._task.write(text.encode("utf-8", "surrogateescape"))
        return len(text)


def output() -> TextIO:
    """A text file for the output of the task that calls this, as for print(..., file=...); outside a task, sys.stdout.

    What is written to it after the end of the run raises BrokenPipeError.
    """
    task: Any = _task.get()
    return _Output(task) if task else sys.stdout  # type: ignore[return-value]


_task: contextvars.ContextVar[Task | None] = contextvars.ContextVar("streamlog_task", default=None)


def stopping() -> bool:
    """Whether the task that calls this should end: its client has left, its time is over, or the server closes.

    A generator need not ask, because it is closed where it yields. False outside a task.
    """
    task = _task.get()
    return task is not None and task.is_stopping


# ---------------------------------------------------------------------------------------------
# formats: how output is written for a client. Pure: (stream, bytes) to bytes, and at the end an outcome to bytes

# A line of sse and ndjson is held until it is whole, or for this long after its first byte: it may be a prompt.
_PARTIAL_SECONDS = 0.25
# Proxies drop connections that are silent for a minute or less; the standard of EventSource suggests 15 s.
_SSE_COMMENT_SECONDS = 15.0
# A part of a line in sse and ndjson: written, it has at most 7 times the bytes, and readers such as Go's bufio.Scanner
# stop at 64 KiB. An escape sequence that does not end is held no further than this.
_PART_BYTES = 8 * 1024
_PARTS = re.compile(rb"(?s).{1,%d}[\x80-\xbf]{0,3}" % (_PART_BYTES - 3))
_ESCAPE_CHARACTERS = 1024
_BLOCK_LINES = 200  # of a page, in one block: a browser lays out a new line without looking at other blocks


class Options(NamedTuple):
    """How a request wants its output. `notes`: when a last line follows (never, cut, always)."""

    format: str = "text"
    notes: str = "cut"
    timestamps: bool = False
    hostname: str = ""  # to put before each line
    heartbeat_seconds: float = inf
    offset: int = 0  # in the output, of the first byte that is fed
    page: str = ""  # a page up to its output, as HTML
    columns: int = 80  # of the terminal that a page stands for


_PLAIN = Options()
_Clock = Callable[[], float]


def _timestamp(moment: float) -> str:
    """A time (time.time()) by RFC 3339, with milliseconds and zone."""
    return datetime.datetime.fromtimestamp(moment).astimezone().isoformat(timespec="milliseconds")


@dataclass
class Format:
    """Output as it is, for curl and for a browser tab, with notes and timestamps if they are asked for; the other
    formats build on it.

    A format is fed output as it comes. Once the moment `due` has passed (monotonic()), `pause` may add something.
    """

    options: Options = _PLAIN
    clock: _Clock = time.time
    timer: _Clock = monotonic
    type = _PLAIN_TEXT  # its Content-Type
    block_bytes = _BLOCK_MAX_BYTES  # to feed at a time; less for a format that writes much more than it is fed
    beginning = b""  # what stands before the output
    _quiet_seconds = inf  # of silence, after which a sign of life is due, if no heartbeat is asked for
    _last = b"\n"  # the byte that was written last

    def __post_init__(self) -> None:
        # Whether it can tell the client that output is missing: bare text has no place for that.
        self.can_skip = self.type != _PLAIN_TEXT or self.options.notes != "never"
        if self.options.heartbeat_seconds < inf:
            self._quiet_seconds = self.options.heartbeat_seconds
        self._note_output()
        self._host = f"{self.options.hostname} " if self.options.hostname else ""
        if self._host or self.options.timestamps:
            self.block_bytes = _BLOCK_MIN_BYTES

    def _note_output(self) -> None:
        self._last_output = self.timer()  # when the run last wrote
        self.due = self._last_output + self._quiet_seconds  # when `pause` is to be called

    def cut(self, data: bytes) -> Sequence[bytes]:
        """A block of output in parts that are short even when each byte of them has become a line of its own."""
        lines = 1 + data.count(b"\n") + data.count(b"\r") if self.block_bytes < _BLOCK_MAX_BYTES else 1
        size = max(1, len(data) * _BLOCK_LINES // max(lines, _BLOCK_LINES))
        return [data[at : at + size] for at in range(0, len(data), size)]

    def feed(self, stream: str, data: bytes) -> bytes:
        """Output of the run, as the client gets it."""
        self._note_output()
        last, self._last = self._last, data[-1:]
        if self.block_bytes == _BLOCK_MAX_BYTES:  # nothing is added
            return data
        stamp = f"{_timestamp(self.clock())} " if self.options.timestamps else ""
        prefix = f"{stamp}{self._host}".encode()
        # A carriage return that is not the first half of CRLF writes the line anew.
        return re.sub(rb"\n(?!\Z)|\r(?!\n|\Z)", rb"\g<0>" + prefix, last + data)[len(last) :]

    def skip(self, count: int) -> bytes:
        """Say that so many bytes of output are missing here."""
        return self._note(f"[{count} bytes are no longer kept]")

    def pause(self) -> bytes:
        """Say that the run goes on."""
        now = self.timer()
        self.due = now + self._quiet_seconds
        return self._note(f"[still running, silent for {now - self._last_output:.1f} s]")

    def end(self, outcome: Outcome) -> bytes:
        """What follows the output."""
        is_wanted = {"never": False, "cut": outcome.reason, "always": True}[self.options.notes]
        return self._note(f"[{outcome.note}]") if is_wanted else b""

    def _note(self, note: str) -> bytes:
        """A line of our own."""
        line_end = "" if self._last == b"\n" else "\n"
        self._last = b"\n"
        return f"{line_end}{note}\n".encode()


class Ndjson(Format):
    """Whole lines, each with its stream, for programs: one JSON object a line, with time, stream and line, and partial
    if it is unfinished; last the end. Bytes that are not UTF-8 become lone surrogates (PEP 383).

    A part of a line goes out a quarter of a second after its first byte. What follows is a line again.
    """

    type = "application/x-ndjson"
    block_bytes = _BLOCK_MIN_BYTES
    _record_time = ""  # of the last record of the program's log

    def __post_init__(self) -> None:
        super().__post_init__()
        self._held: dict[str, tuple[bytes, float]] = {}  # by stream, a part of a line, and the moment it goes out
        self._offset = self.options.offset
        self._quiet_due = self.due

    def feed(self, stream: str, data: bytes) -> bytes:
        now = self._last_output = self.timer()
        held, moment = self._held.pop(stream, (b"", now + _PARTIAL_SECONDS))
        *lines, rest = (held + data).split(b"\n")
        written = ""
        if lines and max(map(len, lines)) <= _PART_BYTES:
            written = self._write_lines(stream, b"\n".join(lines), False)
        else:  # one is too long
            for line in lines:
                parts, last = self._write_parts(stream, line)
                written += parts + self._write_lines(stream, last, False)
        parts, rest = self._write_parts(stream, rest)
        if rest:
            self._held[stream] = rest, now + _PARTIAL_SECONDS if lines or parts else moment
        return self._schedule(written + parts)  # `pause` follows at once if another part is late

    def pause(self) -> bytes:
        now = self.timer()
        silence = now >= self._quiet_due and self._write_silence(now - self._last_output)
        return self._schedule(self._flush(now) or silence or "")

    def _schedule(self, written: str) -> bytes:
        """Set the moment that something is due: a part of a line, or a sign of life after a silence of ours."""
        if written:
            self._quiet_due = self.timer() + self._quiet_seconds
        self.due = min([self._quiet_due, *(moment for _, moment in self._held.values())])
        return written.encode()

    def skip(self, count: int) -> bytes:
        return f"{self._flush()}{_json_line(self.clock(), skipped_bytes=count)}".encode()

    def end(self, outcome: Outcome) -> bytes:
        return (self._flush() + (self._write_end(outcome) if outcome.is_final else "")).encode()

    def _flush(self, now: float = inf) -> str:
        """Write the parts of lines that are to go out by now."""
        late = [stream for stream, (_, moment) in self._held.items() if moment <= now]
        return "".join(self._write_lines(stream, self._held.pop(stream)[0], True) for stream in late)

    def _write_parts(self, stream: str, line: bytes) -> tuple[str, bytes]:
        """Write what is too long of a line, in parts that end where a character does. Returns the rest too."""
        *parts, rest = _PARTS.findall(line) or [b""]
        return "".join(self._write_lines(stream, part, True) for part in parts), rest

    def _write_silence(self, seconds: float) -> str:
        return _json_line(time.time(), silent_seconds=round(seconds, 1))

    def _write_lines(self, stream: str, lines: bytes, is_partial: bool) -> str:
        if "\t" in stream:  # of the program's log
            return "".join(map(partial(self._write_record, stream), lines.decode(errors="replace").split("\n")))
        quote = json.encoder.encode_basestring_ascii
        host = f'"host": {quote(self.options.hostname)}, ' if self.options.hostname else ""
        head = f'{{"time": "{_timestamp(self.clock())}", {host}"stream": "{stream}", "line": '
        tail = ', "partial": true}\n' if is_partial else "}\n"
        texts = lines.decode(errors="surrogateescape").split("\n")
        return head + f"{tail}{head}".join(map(quote, texts)) + tail

    def _write_record(self, stream: str, text: str) -> str:
        """A line of a log record. Those behind its first one have its time, too."""
        _, level, logger, thread = stream.split("\t")
        time_, head, line = text.partition(f" {level} {logger}: ")
        if head and " " not in time_:
            self._record_time, text = time_, line
        record = {"time": self._record_time, "level": level, "logger": logger, "thread": thread, "line": text}
        return json.dumps(record) + "\n"

    def _write_end(self, outcome: Outcome) -> str:
        return _json_line(
            self.clock(),
            exit_code=outcome.exit_code,
            host=self.options.hostname or None,
            signal=outcome.signal,
            seconds=round(outcome.seconds, 3),
            reason=outcome.reason or "exit",
        )


def _json_line(moment: float, **fields: object) -> str:
    """A record of ndjson that is no line of output; a field that is None has no place in it."""
    told = {key: value for key, value in fields.items() if value is not None}
    return json.dumps({"time": _timestamp(moment), **told}) + "\n"


class Sse(Ndjson):
    """Server-sent events (WHATWG HTML, section 9.2). An id is the number of bytes of output up to there."""

    type = "text/event-stream"
    _quiet_seconds = _SSE_COMMENT_SECONDS

    def __post_init__(self) -> None:
        super().__post_init__()
        # With an id from the start, every reconnect of an EventSource has a Last-Event-ID, and starts nothing.
        self.beginning = b"id: %d\n\n" % self._offset
        make = codecs.getincrementaldecoder("utf-8")  # a part may end within a character
        self._decoders = make("replace"), make("replace")  # of standard output, and of standard error

    def _write_silence(self, seconds: float) -> str:
        return (
            f"event: heartbeat\ndata: {seconds:.1f}\n\n"
            if self.options.heartbeat_seconds < inf
            else ": still running\n\n"
        )

    def skip(self, count: int) -> bytes:
        flushed = self._flush()
        self._offset += count
        return f"{flushed}event: skipped\nid: {self._offset}\ndata: {count}\n\n".encode()

    def _write_lines(self, stream: str, lines: bytes, is_partial: bool) -> str:
        event = "event: stderr\n" * (stream == "stderr") + "partial: true\n" * is_partial
        texts = self._decoders[stream == "stderr"].decode(lines, not is_partial).split("\n")
        written = ""
        for line, text in zip(lines.split(b"\n"), texts):
            self._offset += len(line) + (not is_partial)
            data = text.strip("\r").replace("\r", "\ndata: ")  # a carriage return would end the field
            written += f"{event}id: {self._offset}\ndata: {data}\n\n"
        return written

    def _write_end(self, outcome: Outcome) -> str:
        stopped = f"event: stopped\ndata: {outcome.reason}\n\n" if outcome.reason else ""
        return f"{stopped}event: exit\nid: {self._offset}\ndata: {outcome.exit_code}\n\n"


# What is special to a terminal: escape sequences (ECMA-48) in both spellings, and the control characters except tab
# and newline. A sequence that never ends is cut short, and what remains of it is text.
_CSI_PART = f"(?:\x1b\\[|\x9b)[0-?]{{0,{_ESCAPE_CHARACTERS}}}[ -/]{{0,8}}"
_STRING_PART = f"(?:\x1b[PX\\]^_]|[\x90\x98\x9d-\x9f])[^\x07\x18\x1b\x90\x98\x9c-\x9f\n]{{0,{_ESCAPE_CHARACTERS}}}"
_TERMINAL_TOKEN = re.compile(
    "(?P<text>[^\x00-\x08\x0b-\x1f\x7f-\x9f]+)"
    f"|(?P<unfinished>(?:{_CSI_PART}|{_STRING_PART}\x1b?|\x1b[ -/]{{0,8}})\\Z)"
    f"|(?:\x1b\\[|\x9b)(?P<style>[0-;]{{0,{_ESCAPE_CHARACTERS}}})m"
    "|\x1b\\]8;[!-:<-~]{0,99};(?P<link>[^\x07\x18\x1b\n]{0,900})(?:\x07|\x1b\\\\)"
    f"|(?:\x1b\\[|\x9b)(?P<count>[0-9]{{0,4}})[0-;]{{0,{_ESCAPE_CHARACTERS}}}(?P<move>[@-~])"
    "|\r+(?=\n)|(?P<control>\x1b[8DEMc]|[\b\v\f\r\x84\x85\x8d])"
    f"|{_CSI_PART}[@-~]|{_STRING_PART}(?:\x07|\x1b\\\\|\x9c)|\x1b+(?=\x1b)|\x1b[ -/]{{0,8}}[0-~]?"
    "|[\x00-\x07\x0e-\x1a\x1c-\x1f\x7f]+|."
)
_Tagged = list[tuple[str, str]]  # text, and the tags that begin it
_BLANK = " ", ""  # a cell
_CELLS_MAX = 400  # of a line that is edited; of a longer one, the rest stays as it is


class _Lane:
    """What is kept of one stream between two pieces of it: a character, a line or an escape sequence may be split."""

    held = ""
    is_in_line = False
    link = ""
    span = ""  # the tag that begins text in this style, or of this link

    def __init__(self, tag: str) -> None:
        self.tag = tag  # of its lines
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.style = dict(_STYLES[0])


class Html(Format):
    """A page for people: colours, numbered lines, a view that follows the newest one.

    What it shows does not depend on how the output was cut into pieces. A line is a <samp>, and its end stands inside
    it, where it is copied with it. As on a terminal, text may be put over the line's own, or erased: then the line is
    written anew at the end of a block of output, and an <i> hides the one before. What moves the cursor to another line
    begins a new one, so nothing is hidden there.
    """

    type = "text/html; charset=utf-8"
    block_bytes = _BLOCK_MIN_BYTES
    _prefix = ""  # of each line
    _lines = 0  # in this block
    _number = 0  # of the last line, among those that are seen
    _end = ""  # what ends that line, if it is open
    _span = ""  # the tag that began the last text in it
    _column = 0  # of the cursor in it, before what follows
    _cells: _Tagged  # its characters, by columns
    _added: _Tagged  # text that is not yet in the cells
    _is_edited = False  # whether what was written of it differs from the cells

    def __post_init__(self) -> None:
        super().__post_init__()
        self._lanes = _Lane("<samp>"), _Lane('<samp class="e">')
        self._lane = self._lanes[0]  # of the last line
        self._close_line()
        self.beginning = self.options.page.encode()  # `end` writes the rest

    def feed(self, stream: str, data: bytes) -> bytes:
        self._note_output()
        stamp = f"<time>{_timestamp(self.clock())}</time> " if self.options.timestamps else ""
        self._prefix = f"{stamp}<b>{html.escape(self.options.hostname)}</b> " if self.options.hostname else stamp
        lane = self._lanes[stream == "stderr"]
        written = "".join(self._write(lane, lane.held + lane.decode(data))) + self._redraw()
        self._settle()
        return written.encode()

    def end(self, outcome: Outcome) -> bytes:
        rest = self.feed("stdout", b"\x18") + self.feed("stderr", b"\x18")  # CAN cancels an unfinished sequence
        note = self._note(f"[{outcome.note}]") if self.options.notes != "never" else self._close_line().encode()
        word = {"ok": "succeeded: ", "failed": "failed: "}.get(outcome.kind, "")
        state = f'<output class="{outcome.kind}">{word}{html.escape(outcome.note)}</output>' if outcome.is_final else ""
        return rest + note + f"</div></div></main>{state}</body></html>\n".encode()

    def _note(self, note: str) -> bytes:
        return f'{self._close_line()}<samp class="n">{html.escape(note)}\n</samp>'.encode()

    def _write(self, lane: _Lane, text: str) -> Iterator[str]:
        """Write text, and do what the escape sequences in it ask for."""
        lane.held = ""
        for token in _TERMINAL_TOKEN.finditer(text):
            kind = token.lastgroup
            if kind == "unfinished":
                lane.held = token[0]
            elif kind == "style":
                _set_style(lane.style, token[kind])
            elif kind == "link":  # OSC 8, of terminals
                lane.link = token[kind] if re.fullmatch("(?i)https?://[!-~]+", token[kind]) else ""
            elif kind:
                if lane is not self._lane:
                    yield self._close_line()
                    self._lane = lane
                if kind == "text":
                    lane.span = _span(lane.style, lane.link)
                    yield from self._add(token[0])
                else:
                    final = token["move"] or {"\b": "D", "\r": "G"}.get(token[0], "A")
                    yield self._move(final, int(token["count"] or 0))

    def _add(self, text: str) -> Iterator[str]:
        """Put text where the cursor is; whole lines a block at a time."""
        *lines, rest = text.split("\n")
        if lines and (self._lane.is_in_line or self._column):
            yield self._put(lines[0]) + self._redraw()
            # If the line was closed already, its newline would only add an empty one.
            lines[:1] = [] if self._lane.is_in_line else [""]
            yield self._close_line()
            self._lane.is_in_line = False
        at = 0
        while at < len(lines):
            count = min(len(lines) - at, _BLOCK_LINES - self._lines or _BLOCK_LINES)
            begin, end = self._open(count) + self._tags(self._lane.span), self._close_line()
            block = lines[at : at + count]
            at += count
            between = f"{end}{self._lane.tag}{self._prefix}{self._lane.span}"
            yield begin + html.escape("\n".join(block), False).replace("\n", between) + end
        yield self._put(rest)

    def _put(self, text: str) -> str:
        """Put text into the line: written at once at its end, by `_redraw` elsewhere."""
        if not text:
            return ""
        closed = self._close_line() if self._column != len(self._cells) >= _CELLS_MAX else ""
        self._lane.is_in_line = True
        self._is_edited |= self._column != len(self._cells)
        self._added.append((text, self._lane.span))
        if self._is_edited:
            return closed
        return closed + ("" if self._end else self._open()) + self._tags(self._lane.span) + html.escape(text, False)

    def _settle(self) -> None:
        """Put the text that was added into cells."""
        cells, at = self._cells, self._column
        for text, span in self._added:
            for one in text if self._is_edited else text[:_CELLS_MAX]:
                if one == "\t":
                    at += 8 - at % 8
                elif unicodedata.category(one) in ("Mn", "Me", "Cf") and 0 < at <= len(cells):
                    cells[at - 1] = cells[at - 1][0] + one, span  # it joins the character before it
                else:
                    cells.extend([_BLANK] * (at - len(cells)))
                    width = 1 + (unicodedata.east_asian_width(one) in "FW")
                    cells[at : at + width] = [(one, span), ("", span)][:width]
                    at += width
        if self._added and not self._is_edited:
            cells.extend([_BLANK] * (at - len(cells)))
            del cells[_CELLS_MAX:]
            at = min(at, _CELLS_MAX)
        self._column = at
        self._added.clear()

    def _move(self, final: str, count: int) -> str:
        """Move the cursor or edit the line, as a control sequence asks with its final character."""
        if final in "ABEFHLMSTdefru" or (final == "J" and count):
            return self._close_line()
        self._settle()
        written = self._redraw() if len(self._cells) > _CELLS_MAX else ""
        at, cells, step, edge = self._column, self._cells, max(1, count), self.options.columns - 1
        final = {"a": "C", "`": "G", "J": "K"}.get(final, final)
        moved = {"C": at + step, "D": at - step, "G": step - 1}.get(final)
        if moved is not None:
            self._column = max(0, min(moved, max(at, edge)))
        elif final in "KXP@" and len(cells) < _CELLS_MAX:
            ranges = {"K": [(at, None), (0, at + 1), (0, None)][count % 3], "@": (at, at)}
            part = slice(*ranges.get(final, (at, at + step)))
            if cells[part] or (final == "@" and cells[at:]):
                self._is_edited = True
                cells[part] = [_BLANK] * {"@": min(step, edge), "P": 0}.get(final, len(cells[part]))
        return written

    def _redraw(self) -> str:
        """Write the line anew, if it was edited; one that is all blank is not."""
        if not self._is_edited:
            return ""
        self._settle()
        self._is_edited = False
        begin, cells = self._end and f"{self._end}<i></i>", self._cells
        self._number -= bool(self._end)
        self._end = ""
        if all(cell == _BLANK for cell in cells):
            cells.clear()
        self._lane.is_in_line = bool(cells)
        begin += self._open() if cells else ""
        for span, group in itertools.groupby(cells, lambda cell: cell[1]):
            begin += self._tags(span) + html.escape("".join(one for one, _ in group), False)
        del cells[_CELLS_MAX:]
        self._column = min(self._column, _CELLS_MAX)
        return begin

    def _open(self, lines: int = 1) -> str:
        """Begin a line, and count those that follow it in the same block."""
        begin = ""
        if self._lines == _BLOCK_LINES:
            begin = f'</div><div><b style="counter-reset:line {self._number}"></b>'
            self._lines = 0
        self._lines += lines
        self._number += lines
        self._span, self._end = "", "\n</samp>"
        return begin + self._lane.tag + self._prefix

    def _tags(self, span: str) -> str:
        """The tags between the last text of a line and one that this tag begins."""
        tags = "" if span == self._span else _end_tag(self._span) + span
        self._span, self._end = span, f"\n{_end_tag(span)}</samp>"
        return tags

    def _close_line(self) -> str:
        """Close the last line, if it is open, and begin at the first column again."""
        end = self._redraw() + self._end
        self._cells, self._added, self._column, self._end = [], [], 0, ""
        return end


# What a parameter of Select Graphic Rendition (ECMA-48 section 8.3.117) changes in a style.
_STYLES = {
    int(code): dict(change.split("=") for change in changes)
    for code, *changes in map(
        str.split,
        """0 color= background= bold= dim= italic= underline= strike= inverse=
        1 bold=font-weight:bold
        2 dim=opacity:.7
        3 italic=font-style:italic
        4 underline=underline
        7 inverse=inverse
        9 strike=line-through
        22 bold= dim=
        23 italic=
        24 underline=
        27 inverse=
        29 strike=
        39 color=
        49 background=""".splitlines(),
    )
}
_COLOURED = {3: "color", 4: "background", 5: "line", 9: "color", 10: "background"}  # by the tens of a parameter
# The sixteen colours of a page, the cube of xterm, and its greys.
_PALETTE = [
    *(f"var(--c{index})" for index in range(16)),
    *(f"#{bytes(levels).hex()}" for levels in itertools.product(bytes.fromhex("005f87afd7ff"), repeat=3)),
    *("#" + f"{level:02x}" * 3 for level in range(8, 248, 10)),
]


def _set_style(style: dict[str, str], parameters: str) -> None:
    """Act on the parameters of a sequence. Those with colons (ISO 8613-6) are skipped."""
    codes = (int(code[:5] or 0) for code in parameters.split(";") if ":" not in code)
    for code in codes:
        tens, units = divmod(code, 10)
        if code in (38, 48, 58):
            style[_COLOURED[tens]] = _take_colour(codes)
        elif tens in _COLOURED and units < 8:
            style[_COLOURED[tens]] = _PALETTE[units + 8 * (tens > 8)]
        else:
            style.update(_STYLES.get(code, {}))


def _take_colour(codes: Iterator[int]) -> str:
    """An extended colour, off the front of the codes: 5 and an index of 256, or 2 and red, green, blue."""
    kind = next(codes, 0)
    if kind == 5:
        index = next(codes, 256)
        return _PALETTE[index] if index < 256 else ""
    levels = [min(level, 255) for level in itertools.islice(codes, 3 if kind == 2 else None)]
    return f"#{bytes(levels).hex()}" if kind == 2 and len(levels) == 3 else ""


def _end_tag(tag: str) -> str:
    return f"</{tag[1:].partition(' ')[0]}>" if tag else ""


def _span(style: _Texts, link: str) -> str:
    """The tag that begins text in a style, or of a link.

    Text on a background must be readable in light and in dark, so a colour of the page is replaced: on one of the
    sixteen colours by the page's background, on any other by black or white, whichever contrasts more (WCAG 2).
    """
    colour, background = style["color"], style["background"]
    if style["inverse"]:
        colour, background = colour and background, colour or "var(--text)"
    if background and not colour.startswith("#"):
        colour = "var(--page)"
        if background.startswith("#"):
            colour = "#000" if _luminance(background) > 0.18 else "#fff"
    elif colour.startswith("#") and not background:
        colour = _readable(colour)
    lines = f"{style['underline']} {style['strike']}".strip()
    rules = [
        colour and f"color:{colour}",
        background and f"background:{background}",
        style["bold"],
        style["dim"],
        style["italic"],
        lines and f"text-decoration:{lines}",
    ]
    css = ";".join(filter(None, rules))
    if link:
        return f'<a href="{html.escape(link)}" rel="noopener noreferrer" target="_blank" style="{css}">'
    return f'<span style="{css}">' if css else ""


def _luminance(colour: str) -> float:
    """The relative luminance of a colour, between 0 and 1 (WCAG 2)."""
    red, green, blue = (math.pow(level / 255, 2.2) for level in bytes.fromhex(colour[1:]))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _readable(colour: str) -> str:
    """A colour for text on the page: darker in light, lighter in dark, as far as a contrast of 4.5 needs."""
    light, levels = _luminance(colour), bytes.fromhex(colour[1:])
    on_light = bytes(int(level * min(1, 0.18 / (light or 1)) ** 0.45) for level in levels).hex()
    on_dark = bytes(level + (255 - level) * (light < 0.22) * 131 // 255 for level in levels).hex()
    return f"light-dark(#{on_light}, #{on_dark})"


_FORMATS = {"text": Format, "html": Html, "sse": Sse, "ndjson": Ndjson}


# ---------------------------------------------------------------------------------------------
# transcripts: kept output, for any number of readers, each at its own place

_TRANSCRIPT_MIN_BYTES = 64 * 1024
_CHANGES_MAX = 16 * 1024  # of the stream or the time, in what is kept: each is remembered


class Transcript:
    """Output that one thread writes and any number read. Offsets count bytes.

    It is a ring, in memory or in a file: the byte at an offset is at the offset modulo the ring's size. The newest
    bytes are kept; `start` is the offset of the oldest. The writer never waits for a reader: one that was overtaken is
    told where it goes on.
    """

    start = 0
    end = 0
    outcome: Outcome | None = None
    _time_seconds = 0.1  # between two times
    _is_failing = False  # which is logged once

    def __init__(self, size: int, file: IO[bytes] | None = None) -> None:
        self.size = size or 1
        self.file = file or io.BytesIO()
        self._lock = Lock()  # guards what follows, and the place in the file
        self._changes = [(0, "stdout", 0.0)]  # offsets at which the stream or the time changes, and to which
        self.drop_another: _Action = lambda: False  # to make room on a full disk; False if there is none
        self.waiting: WeakSet[_Bell] = WeakSet()  # of readers that have read all there is

    def __del__(self) -> None:
        self.file.close()

    @property
    def room(self) -> int:
        """The bytes that it takes, or may still take."""
        return self.size if self.outcome is None else self.end - self.start

    def write(self, stream: str, data: bytes) -> None:
        """Add output; `wake` tells the readers. What the disk does not take is lost, and readers are told so."""
        with self._lock:
            end, view = self.end + len(data), memoryview(data)[-self.size :]
            self._note_change(stream)
            self._forget(end - self.size)
            while view:
                at = (end - len(view)) % self.size
                try:
                    self.file.seek(at)
                    view = view[self.file.write(view[: self.size - at]) :]
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT) and self.drop_another():
                        continue
                    self._forget(end)
                    if not self._is_failing:
                        _log.warning("a transcript has lost output: %s", error)
                    self._is_failing = True
                    break
            self.end = end

    def _note_change(self, stream: str) -> None:
        """Remember where output of another stream begins, or of another time."""
        changes, now = self._changes, time.time()
        _, last, moment = changes[-1]
        if stream != last or abs(now - moment) > self._time_seconds:
            changes.append((self.end, stream, now))
        if len(changes) > _CHANGES_MAX:  # the times become coarser
            self._time_seconds *= 2
            changes[:] = [one for at, one in enumerate(changes) if at % 2 == 0 or one[1] != changes[at - 1][1]]
            if len(changes) > _CHANGES_MAX:
                self._forget(changes[_CHANGES_MAX // 2][0])

    def _forget(self, start: int) -> None:
        self.start = max(self.start, start)
        del self._changes[: bisect_right(self._changes, (self.start, "~")) - 1]

    def wake(self) -> None:
        """Ring for the readers that wait."""
        with self._lock:
            waiting, self.waiting = self.waiting, WeakSet()
        for bell in waiting:
            bell.ring()

    def read(
        self, offset: int, limit: int, stop: float = inf, bell: _Bell | None = None
    ) -> tuple[int, str, float, bytes]:
        """Output of one stream from an offset on, before `stop`: the offset of its first byte, which is later if that
        is no longer kept, the stream, when it was written (time.time()), and the bytes; none at the end. With a bell,
        raises BlockingIOError if nothing has come yet, not even the end; then the bell rings once something does."""
        with self._lock:
            if bell and self.outcome is None and self.end <= offset < stop:
                bell.silence()
                self.waiting.add(bell)
                raise BlockingIOError
            at = max(offset, self.start)
            index = bisect_right(self._changes, (at, "~"))
            changed = self._changes[index][0] if index < len(self._changes) else inf
            _, stream, moment = self._changes[index - 1]
            size = int(min(changed, self.end, at + limit, stop)) - at
            return at, stream, moment, self._get(at, max(0, size))

    def _get(self, offset: int, count: int) -> bytes:
        self.file.seek(offset % self.size)
        data = self.file.read(count)  # which ends where the ring does
        if len(data) < count:
            self.file.seek(0)
            data += self.file.read(count - len(data))
        return data

    def find_tail(self, lines: int) -> int:
        """The offset of the last lines, or of the oldest byte if fewer are kept."""
        with self._lock:
            at = self.end
            wanted = lines + (at > self.start and self._get(at - 1, 1) == b"\n")
            while at > self.start and wanted:
                size = min(_BLOCK_MAX_BYTES, at - self.start)
                at -= size
                block = self._get(at, size)
                found = block.count(b"\n")
                if found >= wanted:
                    return at + len(block.rsplit(b"\n", wanted)[0]) + 1
                wanted -= found
            return at


class _Replay(Run):
    """A viewer of a transcript, from an offset to its end, or to the offset `stop`. A stop ends only the viewing."""

    def __init__(
        self,
        transcript: Transcript,
        offset: int,
        release: _Action,
        stop: float,
        wants: Callable[[str], bool] | None = None,
    ) -> None:
        super().__init__(Settings(), None)
        self._held.callback(release)
        self._transcript, self._offset, self._stop, self._wants = transcript, offset, stop, wants
        self.moment = time.time()  # when what was read last had been written
        self.outputs[self.bell.descriptor] = "stdout", io.BytesIO()
        self.bell.ring()

    def _take(self, descriptor: int, size: int) -> bytes:
        at, stream, self.moment, data = self._transcript.read(self._offset, size, self._stop, self.bell)
        self.skipped_bytes, self._offset = at - self._offset, at + len(data)
        if not (data or self.skipped_bytes):
            self._note_exit(0)
        elif not data or (self._wants and not self._wants(stream)):
            raise BlockingIOError
        self.stream = stream
        return data

    def _signal(self, number: int) -> None:
        self._note_exit(0)
        self._is_drained = True

    @property
    def outcome(self) -> Outcome:
        """How the run has ended, if this goes to its end."""
        outcome = self._transcript.outcome
        if self.reason or outcome is None or self._offset >= self._stop:
            return super().outcome._replace(is_final=bool(self.reason or self._wants))  # a log has no other end
        return outcome


def _open_transcript(settings: Settings, size: int = 0) -> Transcript:
    """A transcript of the usual size, or of a smaller one, in a file without a name: /tmp is in memory on many
    machines, and /var/tmp is not (file-hierarchy(7)). Raises Error."""
    folder = settings.transcripts or os.environ.get("TMPDIR") or "/var/tmp"
    try:
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        _files.add(file)
        return Transcript(size or settings.transcript_bytes, file)
    except OSError as error:
        advice = f"make room, or set another by {settings._name('transcripts')}"
        raise _busy(f"cannot keep a transcript in {folder!r} ({error.strerror})", advice) from None


# ---------------------------------------------------------------------------------------------
# insight: the log, the log levels and the stacks of the program that embeds this module

_LOG_BYTES = 1 << 20  # that a viewer may be behind
_RECORD_CHARACTERS = 64 * 1024  # the rest of a longer record is cut off


def _own_commands(token: str) -> list[tuple[str, Command]]:
    """The commands that show the program itself, and their names. With a token there is one that sets a level, too; it
    comes last, so that the index shows its fields. Their functions are called at once, and return text, or what makes
    a run."""
    own = [("log", Command(_follow_log)), ("stacks", Command(_show_stacks)), ("level", Command(_show_levels))]
    if token:
        setter = Command(_set_level, method="POST")
        setter.methods = ["POST", "PUT"]
        own.append(("level", setter))
    return own


def _record_text(record: LogRecord) -> str:
    """A record's message and traceback. (A Formatter would leave its traceback in the record, for all to use.)"""
    try:
        text = record.getMessage()
    except Exception as error:  # arguments that do not fit the message; the program's own handlers report where
        text = f"{record.msg!r} cannot be formatted: {error!r}"
    if record.exc_info:
        text = f"{text}\n{''.join(traceback.format_exception(*record.exc_info)).rstrip()}"
    return (f"{text}\n{record.stack_info}" if record.stack_info else text)[:_RECORD_CHARACTERS]


class _ProgramLog:
    """The program's log records: in a transcript for viewers, and in the output of the task that logged them.

    While somebody views the log or a task runs, a record comes here from the logger itself, after its filters: what
    handlers there are, and which loggers propagate, does not matter, and may change.
    """

    transcript: Transcript | None = None
    _stands = False  # whether it stands in for Logger.callHandlers

    def __init__(self) -> None:
        self.let_go()
        self._kept: list[int] = []  # for each that watches, the bytes to keep
        self._call_handlers = self._original = Logger.callHandlers

    def let_go(self) -> None:
        """Begin anew in a forked process: a thread that is not in it may hold a lock."""
        self._lock = RLock()  # guards all else
        self._is_gathering = False
        self.transcript = Transcript(self.transcript.size) if self.transcript else None

    def emit(self, record: LogRecord) -> None:
        line = f"{record.levelname} {record.name}: {_record_text(record)}\n".encode(errors="backslashreplace")
        task = _task.get()
        if task:
            with suppress(OSError):
                task.write(line)
        with self._lock:
            if self.transcript:  # a stream is what its record says, for viewers to choose by
                line = f"{_timestamp(record.created)} ".encode() + line
                names = record.levelno, record.levelname, record.name, record.threadName
                self.transcript.write("\t".join(str(name).replace("\t", " ") for name in names), line)
                if self.transcript.waiting and not self._is_gathering:
                    _start_thread("streamlog-log", self._gather)
                    self._is_gathering = True

    def _gather(self) -> None:
        """Wake viewers a hundred times a second at most: more often, they would slow down the threads that log."""
        time.sleep(0.01)
        with self._lock:
            transcript, self._is_gathering = self.transcript, False
        if transcript:
            transcript.wake()

    @contextmanager
    def watch(self, keep_bytes: int = 0) -> Iterator[Any]:
        """See all records meanwhile, and keep so many bytes of the newest."""
        with self._lock:
            self._kept.append(keep_bytes)
            if not self._stands or Logger.callHandlers is self._original:  # put back by another that stood before us
                self._stands, self._call_handlers = True, Logger.callHandlers
                Logger.callHandlers = _call_handlers  # type: ignore[assignment,method-assign]
            if keep_bytes and not self.transcript:
                self.transcript = Transcript(max(keep_bytes, _LOG_BYTES))
        try:
            yield self.transcript
        finally:
            with self._lock:
                self._kept.remove(keep_bytes)
                if not any(self._kept):
                    self.transcript = None
                if not self._kept and Logger.callHandlers is _call_handlers:  # or else another stands before it
                    self._stands, Logger.callHandlers = False, self._call_handlers  # type: ignore[method-assign]


_program_log = _ProgramLog()


def _call_handlers(logger: Logger, record: LogRecord) -> None:
    """Logger.callHandlers, while somebody watches."""
    _program_log._call_handlers(logger, record)
    with suppress(Exception):
        _program_log.emit(record)


def _follow_log(tail: int = 10, level: str = "NOTSET", logger: str = "", follow: Literal[1, 0] = 1) -> _Maker:
    """This program's log, from its newest records on if they are kept (live)"""
    least = _read_level(level)

    def wants(stream: str) -> bool:
        """Whether a record is of the logger or below, at the level or above; our own are shown only on request."""
        number, _, name, _ = stream.split("\t")
        is_below = logger in ("", "root") or f"{name}.".startswith(f"{logger}.")
        return is_below and int(number) >= least and (name != _log.name or logger == _log.name)

    def make(settings: Settings, timeout: float | None, release: _Action) -> Run:
        with ExitStack() as stack:
            stack.callback(release)
            transcript = stack.enter_context(_program_log.watch(_LOG_BYTES))
            starts, at, end = collections.deque[int](maxlen=max(0, tail)), transcript.start, transcript.end
            while at < end:
                at, stream, _, data = transcript.read(at, transcript.size, end)
                if wants(stream):
                    starts.extend(at + match.start() for match in re.finditer(rb"(?m)^[0-9]{4}-[0-9-]{5}T", data))
                at += len(data)
            return _Replay(transcript, min(starts, default=end), stack.pop_all().close, inf if follow else end, wants)

    return make


def _find_logger(name: str) -> Logger:
    """The logger of a name, or else the nearest above it."""
    there = Logger.manager.loggerDict  # logging.getLogger would create a logger, and takes a lock
    while name and not isinstance(there.get(name), Logger):
        name = name.rpartition(".")[0]
    return there.get(name, logging.root)  # type: ignore[return-value]


def _read_level(text: str) -> int:
    """A level by its name, in any case, or by its number. Raises Error."""
    for name in (text, text.upper()):
        level = logging.getLevelName(name)
        if isinstance(level, int):
            return level
    if re.fullmatch(r"[0-9]{1,4}", text):
        return int(text)
    raise Error(f"a level is DEBUG, INFO, WARNING, ERROR, CRITICAL, NOTSET or a number: {text[:200]!r}")


def _show_levels(logger: str = "") -> str:
    """Levels of loggers that have their own, or of one (set by POST, where there is a token)"""
    there = Logger.manager.loggerDict
    if logger and logger != "root" and logger not in there:
        raise Error(f"there is no logger {logger[:200]!r} (yet)", 404)
    own = sorted(name for name, found in there.copy().items() if isinstance(found, Logger) and found.level)
    names = [logger] if logger else ["root", *own]
    return "".join(f"{name} {logging.getLevelName(_find_logger(name).getEffectiveLevel())}\n" for name in names)


def _set_level(level: str, logger: str = "root") -> str:
    """Set a logger's level; NOTSET makes it take that of the one above (GET shows the levels)"""
    number = _read_level(level)
    _show_levels(logger)  # it refuses a logger that is not there
    logging.getLogger(logger).setLevel(number)
    return f"{logger or 'root'} set to {logging.getLevelName(number)}\n"


def _show_stacks() -> str:
    """What each thread and each asyncio task of this program is doing"""
    main = threading.main_thread().ident
    names = {thread.ident: thread.name + " (daemon)" * thread.daemon for thread in threading.enumerate()}
    stacks = [
        f"{names.get(ident, '(not started by threading)')}, thread {ident}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    ]  # a variable here would hold its own frame, and with it what all the others hold
    return "\n".join([*stacks, *_show_tasks()])


def _show_tasks() -> Iterator[str]:
    """The tasks of all event loops, with the line where each of their coroutines waits."""
    asyncio = sys.modules.get("asyncio")
    if not asyncio:
        return
    loops = [one for one in gc.get_objects() if issubclass(type(one), asyncio.AbstractEventLoop)]
    for task in itertools.chain(*map(asyncio.all_tasks, loops)):
        inner, lines = task.get_coro(), []
        state = "runs" if getattr(inner, "cr_running", False) else "waits"
        while hasattr(inner, "cr_await"):
            frame, inner = inner.cr_frame, inner.cr_await
            lines += traceback.format_stack(frame, 1) if frame else []
        yield f"{_printable(task.get_name())}, asyncio task, {state}\n{''.join(lines)}"


# ---------------------------------------------------------------------------------------------
# pages: what a browser gets besides output, and the lines for curl; styles and templates stand together at the end


def _describe_json(url: str, name: str, command: Command) -> dict[str, object]:
    """A command for programs; `url` is the site's."""
    return {
        "name": name,
        "about": command.about,
        "method": command.methods[0],
        "stdin": command.stdin,
        "url": f"{url}/{name}",
        "command": command.line,
        "parameters": [
            {
                "name": one.name,
                "type": one.type,
                "choices": one.choices,
                "default": one.default,
                "required": one.default is None,
            }
            for one in command.parameters.values()
        ],
    }


def _fill(template: str, markup: _Texts, **texts: str) -> str:
    """Fill in a template's words in one pass, so that inserted text is never searched for them. Texts are escaped."""
    return string.Template(template).substitute(markup, **{word: html.escape(text) for word, text in texts.items()})


def _make_page(title: str, style: str, template: str, markup: _Texts) -> str:
    """A page whose body is made from a template; `markup` is HTML already."""
    return _fill(_FRAME.replace("$BODY", template), {**markup, "STYLE": _COLOURS + style}, TITLE=title)


def _page_reply(title: str, template: str, markup: _Texts, headers: _Texts = _NO_TEXTS, status: int = 200) -> Reply:
    """A page of the server's own."""
    headers = {**headers, "Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": _PAGE_POLICY}
    return _text_reply(_make_page(title, _PAGE_STYLE, template, markup), status, headers)


def _form_fields(command: Command) -> Iterator[str]:
    """A labelled field for each parameter; and what makes the frame show a page, and not bare text."""
    if command.is_plain_text and "format" not in command.parameters:
        yield '<input type="hidden" name="format" value="html">'
    for name, parameter in command.parameters.items():
        default = parameter.default or ""
        value, title = html.escape(default), html.escape(parameter.find_problem("\0"))
        about = f'name="{name}" title="{title}"{" required" * bool(parameter.find_problem(""))}'
        if parameter.choices:
            options = (
                f"<option{' selected' * (one == default)}>{html.escape(one)}</option>" for one in parameter.choices
            )
            field = f'<select name="{name}">{"".join(options)}</select>'
        elif parameter.is_list:
            field = f'<textarea rows="1" {about}>{value}</textarea>'
        else:
            field = f'<input type="{"number" if parameter.type == "int" else "text"}" value="{value}" {about}>'
        yield f"<label>{name}{field}</label>"
    if command.stdin:
        yield '<label>input<textarea name="-" rows="1"></textarea></label>'


def _index_page(commands: _Commands, lines: _Texts, keepable: Iterable[str]) -> Reply:
    """The commands as a page: a row for each and a frame for the output, without a script; `lines` are for curl."""
    rows = ""
    for name, command in commands.items():
        is_kept = name in keepable and not (command.is_source or "async" in command.parameters)
        method = "get" if command.methods == ["GET"] else "post"
        markup = {
            "QUERY": "?-=form" if command.stdin else "",
            "METHOD": method,
            "BADGE": "" if method == "get" else "<em>POST</em>",
            "FIELDS": "\n".join(_form_fields(command)),
        }
        template, line = _COMMAND.replace("$KEEP", _KEEP if is_kept else ""), command.line
        rows += _fill(template, markup, NAME=name, ABOUT=command.about or line, LINE=line, CURL=lines[name])
    markup = {"COMMANDS": rows, "RUNS": _RUNS_LINK if keepable else ""}
    return _page_reply(f"streamlog on {socket.gethostname()}", _INDEX, markup)


def _view_page(entry: _Entry, request: Request, is_listed: bool) -> str:
    """A page up to the output of a run: its title, what is special about it, and how it is stopped."""
    about = _GOES_ON if request.path.startswith("/-/") else _SHARED if entry.command.shared else ""
    stop = _STOP.replace("$ABOUT", about) if is_listed else _LEAVE
    markup = {"HEAD": _fill(stop, {"ROOT": request.root, "ID": entry.id})}
    style = _VIEW_STYLE + "main { display: block }" * entry.command.is_report
    return _make_page(str(entry), style, _VIEW, markup).partition("</body>")[0]


def _run_row(entry: _Entry) -> str:
    return _fill(
        _RUN.replace("$LINK", _RUN_LINK if entry.transcript else "$WHAT"),
        {"ID": entry.id, "DROP": "?drop=1" if entry.ended else "", "VERB": "Drop" if entry.ended else "Stop"},
        WHAT=str(entry),
        SINCE=_timestamp(entry.started_at)[:19].replace("T", " "),
        CLIENT=entry.client,
        BYTES=f"{entry.run.output_bytes:,}",
        KIND=entry.outcome.kind if entry.outcome else "running",
        STATE=entry.note.strip("[]"),
    )


_POLICY = "default-src 'none'; style-src %s; img-src data:; form-action 'self'; frame-src 'self'; base-uri 'none'"
_VIEW_POLICY = _POLICY % "'unsafe-inline'"  # output may set styles by escape sequences, and nothing else
# Colours of a terminal, dark enough on light and light enough on dark: the page's own, then sixteen.
_COLOURS = """:root { color-scheme: light dark;
  --page: light-dark(#fff, #16181c); --text: light-dark(#1a1a1a, #e3e3e3); --soft: light-dark(#666, #9a9a9a);
  --line: light-dark(#d8d8d8, #3a3d43); --accent: light-dark(#0b57d0, #a8c7fa);
  --c0: light-dark(#000, #828282); --c1: light-dark(#b3261e, #f2857d); --c2: light-dark(#146c2e, #6dd58c);
  --c3: light-dark(#7a5900, #e0b94f); --c4: light-dark(#0b57d0, #7cacf8); --c5: light-dark(#8430ce, #d1a3ff);
  --c6: light-dark(#00687a, #4fd8eb); --c7: light-dark(#767676, #c7c7c7); --c8: light-dark(#555, #8f8f8f);
  --c9: light-dark(#dc362e, #ffb4ab); --c10: light-dark(#198639, #98f0af); --c11: light-dark(#946f00, #ffd97a);
  --c12: light-dark(#1b6ef3, #b3cdff); --c13: light-dark(#a142f4, #e6c8ff); --c14: light-dark(#00818f, #9aefff);
  --c15: light-dark(#767676, #fff) }
"""
# A reversed column counts its scroll position from the end, so the view follows new lines until the reader scrolls up.
# On the body itself its upper part could not be scrolled to.
_VIEW_STYLE = """
body { margin: 0; height: 100vh; height: 100dvh; display: flex; flex-direction: column; background: var(--page);
  color: var(--text); font: .85rem/1.4 ui-monospace, monospace; position: relative }
header { display: grid; grid-template-columns: minmax(0, 1fr) auto; column-gap: 2ch; align-content: center;
  box-sizing: border-box; height: 2.75rem; padding: 0 1rem; border-bottom: 1px solid var(--line) }
h1, p { grid-column: 1; font-size: 1em; margin: 0; white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
p { color: var(--soft) } header a { color: var(--accent) } form { grid-area: 1 / 2 / span 2 }
header iframe, body:has(output) header :is(form, p) { display: none }
output { position: absolute; top: 0; right: 0; padding: 0 1rem; line-height: 2.7rem; font-weight: bold;
  background: var(--page) }
output, button { color: var(--c1) } output.ok { color: var(--c2) }
button { font: inherit; height: 2.5rem; padding: 0 2ch; border: 1px solid; border-radius: .3rem; background: none }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 1px }
@media (max-width: 40rem) { samp { white-space: pre; width: max-content; min-width: 100%; box-sizing: border-box } }
main { flex: 1; min-height: 0; overflow: auto; display: flex; flex-direction: column-reverse }
main > div { margin-bottom: auto; padding: .3rem 0; counter-reset: line }
main > div > div:nth-child(n+25) { content-visibility: auto; contain-intrinsic-height: auto 280em }
samp { display: block; font: inherit; padding: 0 1ch 0 8ch; text-indent: -8ch; white-space: pre-wrap;
  overflow-wrap: anywhere; min-height: 1.4em; tab-size: 8 }
samp::before { counter-increment: line; content: counter(line); display: inline-block; width: 6ch; text-indent: 0;
  margin-right: 2ch; text-align: right; color: var(--soft); user-select: none }
samp.n::before { counter-increment: none; content: "" } samp.n, time, b { color: var(--soft) }
samp.e { color: var(--c1) } samp:has(+ i), i { display: none }
"""
_VIEW = """<header><h1 title="$TITLE">$TITLE</h1>$HEAD</header>
<main tabindex="0" aria-label="Output"><div><div>
"""
# The answer to its form goes into a frame that nobody sees, so that the output goes on to its last line.
_STOP = """<p>$ABOUT</p><form action="$ROOT-/runs/$ID?quiet=1" method="post" target="quiet"><button>Stop</button></form>
<iframe name="quiet" title="Answer" tabindex="-1"></iframe>"""
_LEAVE = '<form action="$ROOT-/idle"><button>Stop</button></form>'
_GOES_ON = 'It goes on without you. <a href="$ROOT-/runs" target="_top">Runs</a>'
_SHARED = "This run is shared: Stop ends it for everyone."
_PAGE_STYLE = """
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: .9rem/1.35 system-ui, sans-serif }
body:has(aside) { height: 100vh; height: 100dvh; display: grid; transition: grid-template-rows .2s .3s;
  grid: "top" auto "list" 1fr "view" 12rem / minmax(0, 1fr) }
body:has(aside:focus-within, .start:focus) { grid-template-rows: auto 1fr 60% }
body > header { grid-area: top; padding: .1rem 1rem; border-bottom: 1px solid var(--line); display: flex;
  align-items: baseline; justify-content: space-between } body > header a { display: inline-block; padding: .5rem }
main { grid-area: list; overflow: auto } main > p { margin: 1rem } h1, h2, p, header p { margin: 0 }
aside { grid-area: view; border-top: 1px solid var(--line); min-height: 0 }
iframe { display: block; width: 100%; height: 100%; border: 0 }
h1 { font-size: 1.05rem } h2 { font-size: .95rem } label { font-size: .7rem } a { color: var(--accent) }
section p, label, code, td, th { color: var(--soft) } section p, td, th { font-size: .8rem }
section { border-bottom: 1px solid var(--line); padding: .35rem 1rem; position: relative }
.row { display: flex; flex-wrap: wrap; gap: .1rem .6rem; align-items: end; padding-right: 2.7rem; min-height: 2.5rem }
.row > header { flex: 1 1 8rem; min-width: 0 } h2 { flex: none; max-width: 100% }
.row:has(label ~ label ~ label) > header { flex-basis: 100%; display: flex; gap: .6rem; align-items: baseline }
em { font: bold .65rem system-ui; color: var(--c3); border: 1px solid; border-radius: .2rem; padding: 0 .3em }
label { display: grid; line-height: 1 } label :is(input, textarea) { width: 7rem }
label input[type=number] { width: 4.5rem } textarea { field-sizing: content; max-height: 12rem; vertical-align: top }
summary { cursor: pointer; display: grid; place-items: center; position: absolute; top: 1.25rem; right: 1rem }
section:has(details[open]) p { white-space: normal } details > :not(summary) { margin: .4rem 0 }
code, input.curl { font-family: ui-monospace, monospace; overflow-wrap: anywhere } input.curl { width: 100% }
input, select, textarea, button, summary { font: inherit; font-size: .85rem; padding: .15rem .5rem; min-height: 1.6rem;
  border: 1px solid var(--soft); border-radius: .3rem; background: var(--page); color: var(--text); max-width: 100% }
.start { background: var(--accent); border-color: var(--accent); color: var(--page) }
.row:has(em) .start { background: var(--page); border-color: var(--c3); color: var(--c3) }
table { border-collapse: collapse; width: 100% } td a { font-weight: bold } td.ok { color: var(--c2) }
td, th { text-align: left; padding: .3rem 1rem; border-bottom: 1px solid var(--line); white-space: nowrap }
td:first-child { color: var(--text); width: 50%; max-width: 0 } td:is(.failed, .stopped) { color: var(--c1) }
td:first-child, .row :is(h2, p) { white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 1px }
.skip:not(:focus) { position: absolute; left: -99rem }
@media (min-width: 60rem), (min-width: 40rem) and (max-height: 30rem) {
  body:has(aside), body:has(aside:focus-within, .start:focus) {
  grid: "top top" auto "list view" 1fr / minmax(0, 3fr) minmax(0, 4fr) }
  aside { border-top: 0; border-left: 1px solid var(--line) }
  .row:has(label ~ label ~ label) label * { width: 5.5rem } }
@media (max-width: 40rem) { .row:has(label) > header { flex-basis: 100% }
  label { flex: 1 0 6rem } label :is(input[type], textarea, select) { width: 100% }
  tr { display: flex; flex-wrap: wrap; padding: .3rem 1rem; gap: 0 1rem; border-bottom: 1px solid var(--line) }
  thead { display: none } td { border: 0; padding: 0 } td:first-child { width: 100%; max-width: none }
  td:last-child { margin-left: auto } }
@media (max-width: 40rem) and (max-height: 30rem) {
  body:has(aside) { display: block; height: auto } aside { height: 60vh } }
@media (pointer: coarse), (max-width: 40rem) { summary { top: .35rem }
  input, select, textarea, button, summary { min-height: 2.5rem } }
"""
# The pages have the style that they were sent with, named by its hash.
_STYLE_HASH = base64.b64encode(hashlib.sha256((_COLOURS + _PAGE_STYLE).encode()).digest()).decode()
_PAGE_POLICY = _POLICY % f"'sha256-{_STYLE_HASH}'"
_FRAME = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>$TITLE</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>$STYLE</style></head>
<body>$BODY</body></html>
"""
_IDLE = "<main><p>Start a command to see its output here.</p></main>"
_INDEX = """<header><h1>$TITLE</h1><a class="skip" href="#-view">Output</a>$RUNS</header>
<main aria-label="Commands">
$COMMANDS</main>
<aside id="-view" tabindex="-1" aria-label="Output"><iframe name="view" title="Output" src="-/idle"></iframe></aside>
"""
_ERROR = """<header><h1>$TITLE</h1><a href="$ROOT" target="_top">Commands</a></header><main><p>$TEXT</p></main>"""
_RUNS_LINK = '<a href="-/runs" target="runs">Runs</a>'
_COMMAND = """\
<section aria-labelledby="$NAME"><form action="$NAME$QUERY" method="$METHOD" target="view"><div class="row">
<header><h2 id="$NAME">$NAME $BADGE</h2><p title="$ABOUT">$ABOUT</p></header>
$FIELDS<button class="start" aria-label="Start $NAME">Start</button></div>
<details><summary aria-label="More of $NAME">…</summary><p><code>$LINE</code></p>
<p><input class="curl" readonly aria-label="curl line for $NAME" value="$CURL"></p>
<button formtarget="_blank" aria-label="Start $NAME in its own tab">Own tab</button>$KEEP</details></form></section>
"""
_KEEP = ' <button name="async" value="1" aria-label="Start $NAME in the background">Background</button>'
_RUNS = """<header><h1>$TITLE</h1><span>$HOW <a href="../">Commands</a></span></header>
<main><table><thead><tr><th>Command<th>Started<th>By<th>Output<th>State<th></thead><tbody>
$ROWS</tbody></table></main>
"""
_PAUSE, _FOLLOW = '<a href="runs?follow=0">Pause</a>', '<a href="runs">Follow</a>'
_NO_RUNS = '<tr><td colspan="6">No command is running, and no background run is kept.</tr>'
_RUN = """<tr><td title="$WHAT">$LINK<td>$SINCE<td>$CLIENT<td>$BYTES bytes<td class="$KIND">$STATE
<td><form action="runs/$ID$DROP" method="post"><button aria-label="$VERB $WHAT">$VERB</button></form></tr>
"""
_RUN_LINK = '<a href="runs/$ID?format=html">$WHAT</a>'


# ---------------------------------------------------------------------------------------------
# embedding: what a program calls that embeds this module

_Given = Union[_Runnable, Command]
_AllGiven = Mapping[str, Any]  # each a _Given; a checker would take a dict of several kinds for one of objects
_AHEAD_BYTES = 1 << 20  # of output that is kept while a program writes input

_open: WeakSet[Any] = WeakSet()  # servers, streams and applications of this program


@cache
def _watch_program() -> None:
    """Close what is open at the end of the program, and let go of it in a forked process."""

    def close() -> None:
        for owner in list(_open):
            owner.shutdown()
        for owner in list(_open):
            owner.close()
        _reap(waits=True)

    def let_go() -> None:
        global _look_lock, _reaping  # noqa: PLW0603
        _task.set(None)
        _open.clear()  # their runs are the parent's, and know it
        _left.clear()
        _reaping = Lock()
        for file in list(_files):
            file.close()
        _look_lock = Lock()  # a thread that is not in this process may have held it
        _program_log.let_go()

    import concurrent.futures.thread  # noqa: F401  # which joins its pools at the end: ours comes before, as the later one

    getattr(threading, "_register_atexit", atexit.register)(close)
    os.register_at_fork(after_in_child=let_go)


def _make_commands(commands: _AllGiven) -> dict[str, Command]:
    """Commands as a program gives them. Raises ConfigError, which names the command."""
    made = {}
    if not isinstance(commands, Mapping):
        raise ConfigError(f"the commands must be a dict of names and commands: {commands!r}")
    for name, given in commands.items():
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise ConfigError(f"a command's name is letters, digits, '.', '_' and '-': {name!r}")
        try:
            made[name] = given if isinstance(given, Command) else Command(given)
        except ConfigError as error:
            raise ConfigError(f"command {name!r}: {error}") from None
    return made


def start(  # noqa: PLR0913
    commands: _AllGiven,
    *,
    port: int = 8000,
    bind: str = "127.0.0.1",
    token: str = "",
    timeout_seconds: Optional[float] = None,
    max_runs: int = 64,
    log: int = 0,
    **settings: Any,
) -> Server:
    """Serve commands in threads of their own, and return at once; `close` the server that is returned.

    commands: by name; each a command line, a list of arguments, a callable (a task) or a Command. settings: the other
    fields of Settings. Raises ConfigError for a mistake in either, and OSError for an address that cannot be had.

    A task's parameters are those of its signature: str, int, float, bool (yes or no), Path, a Literal or an Enum, an
    Optional (empty is None) or a list of one (given more than once); without a hint, the type of the default counts.
    What it yields or returns goes to the client: str and bytes as they are, None not at all, anything else as a line of
    JSON. So do its log records, of its own thread and of the context that it started, and what it prints to `output()`.
    An `Error` before any output is the answer, and later a last line. `SystemExit(3)` ends it with that exit code;
    another exception ends it with 1 and its traceback, which the logger `streamlog.task` gets too. When its client
    leaves, a generator is closed where it yields, and a function asks `stopping()`. A thread cannot be ended by force:
    a task that does not look up keeps its slot until it does.

    Signals, the configuration of logging, the environment and stdout are left alone. With hundreds of clients at a
    time, `sys.setswitchinterval(0.05)` saves processor time. A process that is forked off lets go of the sockets.
    """
    settings.update(port=port, bind=bind, token=token, timeout_seconds=timeout_seconds, max_runs=max_runs, log=log)
    return _make_server(commands, settings).start()


def _make_server(commands: _AllGiven, given: Mapping[str, Any]) -> Server:
    settings = Settings(**given)
    try:
        return Server(_make_commands(commands), settings)
    except OSError as error:
        error.filename = f"{settings.bind}:{settings.port}"
        if error.errno == errno.EADDRINUSE:
            error.strerror = (
                f"{error.strerror}: where each of several processes serves, give port=0 (`url` tells which it got) or "
                "bind=f'unix:/tmp/streamlog-{os.getpid()}.sock'"
            )
        raise


def serve(commands: _AllGiven, **settings: Any) -> None:
    """Serve commands as `start` does, until KeyboardInterrupt or another exception ends it, and close."""
    with _make_server(commands, settings) as server:
        server.serve_forever()


def stream(command: _Given, /, **values: object) -> Stream:
    """Start a command at once; iterate over what is returned for its output, standard error included.

    command: as for `start`. values: of its parameters; those of a task are passed as they are, others are checked as
    values from a URL are. Raises Error for a value that is refused or a program that cannot be started, and ConfigError
    for a mistake in the command.

    Close the stream if you stop reading early; in a coroutine, await `aclose`. Cancelling a reader stops its run, and
    nothing waits for that. Streams that are open when the program ends are closed before Python waits for its thread
    pools. A command can be given input with `write` and `close_stdin`; what reads to the end of its input waits for the
    latter. Django collects an iterator that is not purely asynchronous: pass it `aiter(stream)`.
    """
    made = command if isinstance(command, Command) else None
    task: Any = made.command if made else command
    if callable(task):
        _find_function(task)
        try:
            inspect.signature(task).bind(**values)
        except TypeError as error:
            raise Error(f"the task cannot be called with these values: {error}") from None
        launch: Launch | partial[Any] = partial(task, **values)
    else:
        made = made or Command(task)
        texts, _ = _sort_fields("stream", made.parameters, [(name, _text_of(one)) for name, one in values.items()], {})
        launch = made.bind("stream", texts, takes_input=True)
    return Stream(_maker(launch)(Settings(), made.timeout if made else None, lambda: None))


class Stream(Iterator[bytes], AsyncIterator[bytes]):
    """The output of one run as it comes, in pieces of any size, and a handle on the run. Made by `stream`.

    It is a context manager, and closed at its end. `async for` reads it through the event loop (asyncio). One thread or
    coroutine reads; any thread may write, signal, stop or close it meanwhile (a signal handler may only stop it).
    `write` and `wait` read too: up to 1 MiB of output is kept for the next reading; a command that writes more waits.
    Ends and time limits are noticed only while somebody reads, waits, or asks for the exit code.
    """

    def __init__(self, run: Run, format_: Optional[Format] = None) -> None:
        self._run = run
        self._pieces = run.pieces(format_)
        self._ahead = collections.deque[bytes]()  # output that came while something else was waited for
        self._driving = Lock()  # held by the thread that looks after the run
        _watch_program()
        _open.add(self)

    def __next__(self) -> bytes:
        if not self._ahead:
            with self._driving:
                self._ahead.extend(itertools.islice(filter(None, self._pieces), not self._ahead))
        with suppress(IndexError):  # at the end, or when another thread has closed it meanwhile
            return self._ahead.popleft()
        self.close()
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:  # not self, which Django would read as an Iterator
        with suppress(StopAsyncIteration):
            while True:
                yield await self.__anext__()

    async def __anext__(self) -> bytes:
        try:
            while not (self._ahead or self._run.is_over):
                with suppress(OSError):  # another thread is closing it
                    await _wait_in_loop(*self._run.watched())
                self._read_ahead({}, -inf)
            with suppress(IndexError):
                return self._ahead.popleft()
            raise StopAsyncIteration
        except BaseException:  # the end, or most likely the reader was cancelled
            self._leave()
            raise

    @property
    def pid(self) -> Optional[int]:
        """The process group, and the leader of it; None for a task."""
        return getattr(self._run, "pid", None)

    @property
    def exit_code(self) -> Optional[int]:
        """The exit code, 128 + N for signal N; None while the run goes on."""
        self._read_ahead({}, -inf)
        return self._run.exit_code

    @property
    def reason(self) -> str:
        """Why it was ended; empty if it goes on, or ended by itself."""
        return self._run.reason

    def wait(self, timeout: Optional[float] = None) -> int:
        """Wait for the end; the exit code. Raises subprocess.TimeoutExpired after so many seconds."""
        deadline = monotonic() + (inf if timeout is None else timeout)
        while self._run.exit_code is None:
            if monotonic() > deadline:
                raise subprocess.TimeoutExpired(self._run.name, timeout or 0)
            self._read_ahead({}, min(deadline, monotonic() + _LOOK_SECONDS))
        return self._run.exit_code

    def write(self, data: bytes) -> None:
        """Give the command input. Raises BrokenPipeError if it takes none, or no more."""
        if not isinstance(self._run, Process):
            raise BrokenPipeError("the command takes no input")
        self._run.write(data, self._read_ahead)

    def _read_ahead(self, watched: _Events, deadline: float) -> None:
        """Wait, and keep output that comes meanwhile unless another thread reads it."""
        run = self._run
        if self._driving.acquire(blocking=False):
            try:
                if not run.is_gone and sum(map(len, list(self._ahead))) < _AHEAD_BYTES:
                    ready = run.wait(watched, deadline).keys() & run.outputs.keys()
                    self._ahead.extend(filter(None, map(run.read, ready)))
                    return
            finally:
                self._driving.release()
        _poll(watched, deadline)

    def close_stdin(self) -> None:
        """Tell the command that there is no more input."""
        if isinstance(self._run, Process):
            self._run.end_input()

    def send_signal(self, number: int) -> None:
        """Send a signal to the process group; a task does not notice."""
        self._run._signal(number)

    def stop(self) -> None:
        """Ask the run to end: SIGTERM to its group; for a task, `stopping()` turns true. What it still writes can be
        read."""
        self._run.stop("stopped")

    shutdown = stop

    def close(self) -> None:
        """Stop the run, and wait until all of it is gone: for the grace time of 5 s, and 2 s to give up. May be called
        twice."""
        if self._run._owner != os.getpid():  # a fork's copy: its files are closed, and the lock may be held for ever
            return
        self._run.stop("closed")
        with self._driving:
            self._ahead.clear()
            self._run.close()

    async def aclose(self) -> None:
        """Stop the run, and do not wait until it is gone."""
        self._leave()

    def _leave(self) -> None:
        if self._run.is_gone:
            self.close()
            return
        self._run.stop("closed")
        _left.append(self)
        with suppress(RuntimeError):  # no thread can be started: the end of the program closes it
            _thread.start_new_thread(_reap, ())

    __del__ = _leave


async def _wait_in_loop(watched: Iterable[int], due: float) -> None:
    """Wait in a coroutine, as `_poll` does in a thread; for a second at most."""
    import asyncio

    loop, woken = asyncio.get_running_loop(), asyncio.Event()
    timer = loop.call_later(min(due - monotonic(), 1.0), woken.set)
    try:
        for descriptor in watched:
            loop.add_reader(descriptor, woken.set)
        await woken.wait()
    finally:
        timer.cancel()
        for descriptor in watched:
            loop.remove_reader(descriptor)


# What has been left is closed by one thread, one after another: an event loop and the garbage collector cannot wait. As
# the latter may interrupt anything, Thread.start included, the thread is started by other means.
_left = collections.deque["Stream"]()
_reaping = Lock()


def _reap(waits: bool = False) -> None:
    """Close what has been left, unless another thread is at it, or wait for that one."""
    while _left and _reaping.acquire(blocking=waits):
        try:
            while _left:
                try:
                    _left[0].close()
                finally:
                    _left.popleft()
        finally:
            _reaping.release()


# ---------------------------------------------------------------------------------------------
# WSGI: the site in another server

_ELSEWHERE = re.compile("bind|port|no_auth|tls_(cert|key)|(stall|head|idle|keepalive)_seconds")
_Environ = dict[str, Any]


class wsgi:  # noqa: N801  # called as a function, as `start` is
    """The site as a WSGI application (PEP 3333), for a server such as gunicorn, or under a prefix of another one.

    commands and settings: as for `start`, except for those of a socket. Raises ConfigError.

    Each stream takes a worker or a thread of the server for as long as it lasts. A WSGI server notices that a client
    has left only when it writes: a silent run ends with the next sign of life. html, sse and ndjson have one every 15
    s, text only with `heartbeat_seconds=30` or `?heartbeat=30`. There are no background runs, no shared ones and no
    list of runs, because the server may have several processes; each has its own log, slots and metrics. There are no
    trailers: `?footer=1`, sse and ndjson tell the exit code. A run that is cut ends its answer in an error. Without a
    `token` or `allow_hosts` the application answers only to hosts of this machine, as it cannot see where its server
    listens.
    """

    def __init__(self, commands: _AllGiven, **settings: Any) -> None:
        for name in filter(_ELSEWHERE.fullmatch, settings):
            raise ConfigError(f"the setting {name!r} belongs to the server that runs the application: set it there")
        made = Settings(**settings)
        # It cannot see where its server listens. A client that has the token may come from anywhere.
        self._site = Site(_make_commands(commands), made, "network" if made.token else "loopback")
        _watch_program()

    def __call__(self, environ: _Environ, start_response: _Function) -> Iterable[bytes]:
        request = _UNREAD
        try:
            request = _read_environ(environ)
            request.pieces = _read_wsgi_body(environ, request)
            reply = self._site.answer(request)
            if reply.run:
                answer: Any = self._send(request, reply)
                next(answer)
        except Error as error:
            reply = _error_reply(error, request)
        if not reply.run:
            answer = [] if environ["REQUEST_METHOD"] == "HEAD" else [reply.body]
        try:
            status = f"{reply.status} {HTTPStatus(reply.status).phrase}"
            start_response(status, self._site.access.headers(request, reply))
        except BaseException:
            if reply.run:
                answer.close()
            raise
        return answer  # type: ignore[no-any-return]

    def _send(self, request: Request, reply: Reply) -> Iterator[bytes]:
        """The output of a run, as the body of an answer. A cut run raises, so that the server ends the connection
        without the final chunk."""
        run: Any = reply.run
        stream, sent_bytes = Stream(run, reply.format), 0
        try:
            if run.takes_input:
                _start_thread("streamlog-input", run.feed, request.input or request.pieces)
            first = next(stream._pieces)
            yield b""  # the application comes to here by itself, so that `finally` is sure to run
            for piece in itertools.chain([first], stream):  # most servers send the head at the first, though empty
                sent_bytes += len(piece)
                yield piece
            if run.reason:
                raise ConnectionAbortedError(f"{reply.name} was stopped: {run.reason}")
        finally:
            run.stop(_CLIENT_GONE)
            stream.close()
            self._site.runs.count_end(reply.name, run.outcome, sent_bytes)

    def close(self) -> None:
        """Keep no more of the program's log."""
        self._site.close()


def _read_environ(environ: _Environ) -> Request:
    """The request that a WSGI server has read (PEP 3333): its text is bytes, as Latin-1. Raises Error."""
    prefix, path = (
        urllib.parse.quote(environ.get(key) or "", encoding="latin-1") for key in ("SCRIPT_NAME", "PATH_INFO")
    )
    if prefix and not path:  # the index page's links are relative
        raise Error(f"the commands are at {prefix}/", 308, {"Location": f"{prefix}/"})
    lines = [f"{environ['REQUEST_METHOD']} {path or '/'}?{environ.get('QUERY_STRING', '')} HTTP/1.1"]
    lines += [
        f"{key.removeprefix('HTTP_').replace('_', '-')}: {value}"
        for key, value in environ.items()
        if value and re.match("HTTP_|CONTENT_(TYPE|LENGTH)$", key)
    ]
    request = _parse_head(lines)
    if request.is_chunked and not environ.get("wsgi.input_terminated"):
        raise Error("the server in front does not pass a chunked body on: send it with a Content-Length", 411)
    request.scheme, request.prefix = environ["wsgi.url_scheme"], prefix
    address = environ.get("REMOTE_ADDR") or ""
    request.client = address and f"{address}:{environ.get('REMOTE_PORT', '')}"
    return request


def _read_wsgi_body(environ: _Environ, request: Request) -> Iterator[bytes]:
    """The body of a request, in pieces. Raises Error if it is not as long as it says."""
    left = inf if request.is_chunked else request.body_bytes
    while left:
        piece = environ["wsgi.input"].read(min(left, _BLOCK_MIN_BYTES))
        if not piece:
            if request.is_chunked:
                return
            raise Error("the body is shorter than it says")
        left -= len(piece)
        yield piece


# ---------------------------------------------------------------------------------------------
# command line


@dataclass(frozen=True)
class _Flags(Settings):
    """The settings, and what else the command line tells."""

    config: Sequence[str] = _setting((), "-c, --config FILE | read commands from this file first; may be repeated")
    token_file: Optional[str] = _setting(None, "--token-file FILE | demand the token in it; or set STREAMLOG_TOKEN")
    read_token_file: Optional[str] = _setting(
        None, "--read-token-file FILE | also take the one in it, to look only; or set STREAMLOG_READ_TOKEN"
    )
    check: bool = _setting(False, "--check | print the commands as they were understood, and exit", _SWITCH_RULE)
    verbose: bool = _setting(False, "-v, --verbose | also log each start of a command", _SWITCH_RULE)
    quiet: bool = _setting(False, "-q, --quiet | print only the address at start, and log only warnings", _SWITCH_RULE)
    commands: Sequence[str] = _setting((), "")
    insight: bool = _setting(False, "")

    def _name(self, field: str) -> str:
        flag = self.__dataclass_fields__[field].metadata["flag"] or "--token-file"  # by which a token is given
        return re.findall("--[a-z-]+", flag)[0]  # type: ignore[no-any-return]


_HELP = re.compile("--help|-[a-z]*h")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command line; returns the exit code: 0, or 2 for a mistake in how it was called."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        options = _parse_arguments(argv)
        commands = _load_commands(options, _warn)
        if options.check:
            _print(*("\n     ".join(_describe(name, command)) for name, command in commands.items()))
        else:
            level = logging.WARNING if options.quiet else logging.DEBUG if options.verbose else logging.INFO
            logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z", level=level)
            _serve(_listen(commands, options), options)
    except Error as error:
        print(f"streamlog: {error}", file=sys.stderr)
        return 2
    return 0


def _warn(message: str) -> None:
    print(f"streamlog: warning: {message}", file=sys.stderr)


def _parse_arguments(argv: Sequence[str] | None) -> _Flags:
    """Read the environment and the command line. Raises ConfigError."""
    import argparse

    parser = argparse.ArgumentParser(
        allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False, exit_on_error=False
    )
    parser.add_argument("commands", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="version", version=f"streamlog {__version__}")
    variables = {}
    for name, field in _Flags.__dataclass_fields__.items():
        flags = re.findall(r"--?[a-z-]+", field.metadata["flag"])
        if flags:
            add = partial(parser.add_argument, *flags, dest=name)
            if isinstance(field.default, bool):
                add(action="store_true")
            else:
                parse = partial(field.metadata["rule"].parse, flags[-1])
                add(action="append" if field.default == () else "store", type=parse)
            variables[name] = f"STREAMLOG{flags[-1][1:].replace('-', '_').upper()}", field
    argv = sys.argv[1:] if argv is None else argv
    try:
        known, unknown = parser.parse_known_intermixed_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; see --help") from None
    given = vars(known)
    if given.pop("help", False):
        unknown += [word for word in argv if _HELP.match(word)]
    bare = [word for word in given.get("commands", ()) if not re.search(r"\s", word)]
    _check_words(parser.prog, argv, bare, unknown)
    for name, (variable, field) in variables.items():
        text = os.environ.get(variable)
        if text and name not in given:
            parse = partial(field.metadata["rule"].parse, variable)
            given[name] = list(map(parse, text.split())) if field.default == () else parse(text)
    return _Flags(**given)


def _check_words(program: str, argv: Sequence[str], bare: Sequence[str], unknown: Sequence[str]) -> None:
    """Ask about what was most likely meant. Raises ConfigError, or exits once help was printed."""
    if any(word.startswith("--host") for word in unknown):
        raise ConfigError("there is no option --host: did you mean --bind?")
    if unknown:
        behind = argv[argv.index(bare[0]) :] if bare else []
        if unknown[0] in behind:
            line = shlex.quote(" ".join(behind))
            raise ConfigError(f"quote the command line, so that it is one argument: {program} {line}")
        if _HELP.match(unknown[0]):
            _print(_manual() if "--help" in unknown else _manual().partition("\n\ncommands:")[0])
            sys.exit()
        raise ConfigError(f"there is no option {unknown[0]}: see --help")
    for word in bare:
        if os.path.isfile(word) and not shutil.which(word):
            raise ConfigError(f"{word!r} is not executable: did you mean -c {word}?")


def _manual() -> str:
    """What --help prints: this file's description without what is for programmers, and with the options."""
    options = ""
    for field in dataclasses.fields(_Flags):
        flag, about = field.metadata["flag"], field.metadata["about"]
        if flag:
            shown = f"{'  ' if flag[1] != '-' else '      '}{flag}"
            options += f"{shown:22} {about}\n" if len(shown) <= 22 else f"{shown}\n{'':22} {about}\n"
    manual = re.sub(r"(?s)\n(in a program|for developers):.*?(?=\nusage:|\Z)", "", __doc__ or "")
    return manual.rstrip().replace("OPTIONS\n", options)


def _load_commands(options: _Flags, warn: Callable[[str], object]) -> _Commands:
    """The commands of the files and of the command line; without any, this machine's diagnostics."""
    given = [*itertools.chain(*map(_read_config, options.config)), *map(_parse_command_argument, options.commands)]
    commands = {}
    for name, command in given or _diagnostics():  # a file without a command is refused
        if name in commands:
            raise ConfigError(f"command {name!r} is given twice: give one of them another name (NAME=COMMAND LINE)")
        commands[name] = command
        for warning in _warnings(command):
            warn(f"command {name!r}: {warning}")
    return commands


def _describe(name: str, command: Command) -> Iterator[str]:
    """A command as it was understood, for --check."""
    yield f"{', '.join(command.methods):4} /{name}  {command.line}"
    if command.about:
        yield f"about: {command.about}"
    if command.program:
        yield f"program: {_find_program(command) or 'not found'}"
    for parameter in command.parameters.values():
        default = "required" if parameter.default is None else f"default {parameter.default!r}"
        yield f"parameter {parameter.name}: {parameter.type}, {default}"
    for option in _OPTIONS:
        value = getattr(command, option)
        if option not in ("about", "method") and value != getattr(Command, option, value):
            separator = {"terminal": "x", "headers": ", "}.get(option)
            shown = separator.join(map(str, value)) if separator else value
            yield f"{option}: {'yes' if value is True else shown}"
    for key, value in command.env.items():
        yield f"env: {key}={value}"


def _find_program(command: Command) -> str | None:
    """Where the command's program is now."""
    path = os.path.join(command.cwd or "", command.program) if "/" in command.program else command.program
    return shutil.which(path, path=command.env.get("PATH"))


# What a shell would act on: operators, a home, a variable or a command in its place, a pattern of file names that is no
# URL. Quoted text and placeholders are not looked at.
_QUOTED = re.compile(r"'[^']*'|\"(?:\\.|[^\"\\])*\"|\\.|(?<!\$)\{[^{}]*\}")
_FOR_SHELL = re.compile(r"^[|&<>]+$|^[0-9]?>.|&&|\|\||[;`]|^~|\$[({A-Za-z_]|^(?!.*://).*[*?]")


def _warnings(command: Command) -> Iterator[str]:
    """Probable mistakes in a command."""
    if command.cwd and not os.path.isdir(command.cwd):
        yield f"no such directory: {command.cwd!r}"
    if command.program and not _find_program(command):
        yield f"program not found, or not executable: {command.program!r}"
    for word in _QUOTED.sub("''", command.line).split() if command.program and not command.is_shell else ():
        if _FOR_SHELL.search(word):
            yield f"{word!r} means nothing without a shell: a leading ! asks for one"
    for match in _BRACE.finditer(command.line) if command.is_shell else ():
        if match["name"] and command.line.count("'", 0, match.start()) % 2:
            yield f"{match[0]} stands in single quotes, where a shell does not expand it: use double quotes"


def _listen(commands: _Commands, options: _Flags) -> Server:
    """A server at its address. Raises ConfigError."""
    where = options.bind if options.bind.startswith("unix:") else f"{options.bind}:{options.port}"
    try:
        settings = dataclasses.replace(
            options,
            token=_load_token(options.token_file, "STREAMLOG_TOKEN"),
            read_token=_load_token(options.read_token_file, "STREAMLOG_READ_TOKEN"),
            child_nofile=_raise_descriptor_limit(),
        )
        server = Server(commands, settings, _take_listener())
        path = server._socket_path
        if path and os.stat(path).st_mode & 0o007:
            _warn(f"every user can connect to {path!r}: SocketMode=0600")
        return server
    except (OSError, UnicodeError) as error:  # the latter for a host name that cannot be one
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {where}: {why}; choose another address with -b and -p") from None


def _load_token(path: str | None, where: str) -> str:
    """The token of the file, or else of the environment; empty if neither is there."""
    token = os.environ.get(where)
    if path is not None:
        token, where = _read_text(path).strip(), path
        if os.stat(path).st_mode & 0o077:
            _warn(f"others can read {path!r}: chmod 600 {path}")
    if token is None:
        return ""
    if not (token and token.isprintable()):
        raise ConfigError(f"the token in {where} must be one line of printable characters, and not empty")
    if len(token) < 16:
        _warn(f"the token in {where} is short, and can be guessed: use at least 16 characters")
    return token


def _raise_descriptor_limit() -> tuple[int, int] | None:
    """Take as many descriptors as the hard limit allows; return the old limits, for the commands, if they differ."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _descriptor_limit(hard)
    if _descriptor_limit(soft) < wanted:
        with suppress(OSError, ValueError):  # macOS has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return soft, hard
    return None


def _take_listener() -> socket.socket | None:
    """The socket that systemd has opened for us, if it has (sd_listen_fds(3)). Raises ConfigError, or OSError."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = os.environ.get("LISTEN_FDS")
    if count != "1":
        raise ConfigError(f"only one socket from systemd can be used, and there are {count}: leave one ListenStream=")
    listener = socket.socket(fileno=3)
    # An abstract socket, whose name is bytes (unix(7)), has no mode that decides who may connect.
    is_abstract = isinstance(listener.getsockname(), bytes)
    if is_abstract or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ConfigError("the socket from systemd must listen, and have a port or a path: ListenStream=, Accept=no")
    return listener


def _serve(server: Server, options: _Flags) -> None:
    """Serve until a signal, or the end of the session that started us.

    The first signal shuts the server down, the second one kills; SIGHUP may read the commands again. Handlers do
    nothing: Python writes each signal's number into `signals` (set_wakeup_fd). The server's end rings it, as "!".
    """
    can_reload = bool(options.config or options.tls_cert) and not _has_terminal()
    # A thread that waits for the interpreter's lock asks for it at this interval. At the usual 5 ms, two thousand
    # clients that leave at once keep two processors busy with nothing else for seconds.
    sys.setswitchinterval(0.05)
    signals, handled = _take_signals(can_reload)
    watched = {signals.descriptor: POLLIN}
    if sys.argv[0] in ("", "-"):  # the program came by standard input, as over ssh: end when stderr has no reader
        watched[2] = 0  # poll reports a hang-up unasked

    def run() -> None:
        try:
            with server:
                server.serve_forever()
        finally:
            signals.ring()

    try:
        _start_thread("streamlog", run)
        _announce(server, options)
        _notify("READY=1")
        numbers = b""
        while b"!" not in numbers:
            if 2 in _poll(watched):
                del watched[2]
                server.shutdown()
            numbers = signals.silence()
            for number in numbers:
                if number == signal.SIGHUP and can_reload:
                    _reload(server, options)
                elif number in handled:
                    (server._site.runs.kill if server._is_closing else server.shutdown)()
            if server._is_closing:
                _notify("STOPPING=1")
    finally:
        server.close()
        for one in handled:  # another one would spoil the exit code
            signal.signal(one, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        signals.close()


def _take_signals(can_reload: bool) -> tuple[_Bell, set[signal.Signals]]:
    """Have Python write the number of each signal into a bell. Returns the bell, and the signals."""
    signals, handled = _Bell(), {signal.SIGINT, signal.SIGTERM}
    if can_reload or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        handled.add(signal.SIGHUP)
    signal.set_wakeup_fd(signals.writing_descriptor, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored, it would lose every exit code (wait(2))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
    for one in handled:  # commands would inherit an ignored signal, but not a handler
        signal.signal(one, lambda *_: None)
    return signals, handled


def _announce(server: Server, options: _Flags) -> None:
    """Print where the server listens, and how curl runs each command."""
    settings = server._settings
    if server._reach == "network" and not (settings.token and settings.tls_cert):
        _log.warning(
            "the token goes to %s in the clear: use --tls-cert, or a proxy with TLS in front"
            if settings.token
            else "anyone who reaches %s can run every command: those that change things should be POST",
            server.url,
        )
    url = settings.url.rstrip("/") or (f"{server._scheme}://localhost" if server._socket_path else server.url)
    lines = [server._site.curl_line(url, name, command) for name, command in server._site.commands.items()]
    if options.token_file:
        lines = [line.replace("$STREAMLOG_TOKEN", f"$(cat {shlex.quote(options.token_file)})", 1) for line in lines]
    _print(*([server.url] if options.quiet else [f"streamlog: listening on {server.url}", *lines]))


def _print(*lines: str) -> None:
    """Print at once. A reader that has gone is no reason not to serve."""
    with suppress(OSError):
        print(*lines, sep="\n", flush=True)


def _reload(server: Server, options: _Flags) -> None:
    """Read the commands again. After a mistake the old ones stay in force."""
    try:
        for path in options.config:
            if not os.path.isfile(path):  # reading a FIFO would block
                raise ConfigError(f"cannot read {path!r} again: it is no file")
        commands = _load_commands(options, _log.warning)
        server.replace(commands)
        _log.info("read %s again: %d commands", ", ".join(options.config) or options.tls_cert, len(commands))
    except Exception as error:  # whatever it is, the runs go on
        _log.error("the commands stay as they were: %s", error)


def _notify(state: str) -> None:
    """Tell systemd the state, if it wants to know (sd_notify(3))."""
    with suppress(OSError, KeyError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        sock.sendto(state.encode(), re.sub("^@", "\0", os.environ["NOTIFY_SOCKET"]))


def _has_terminal() -> bool:
    """Whether there is a terminal, whose end SIGHUP would report."""
    with suppress(OSError), open("/dev/tty"):
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
