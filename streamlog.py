#!/usr/bin/env python3
"""streamlog: run a command per URL and stream its output live, to curl and to a plain browser tab.

usage: streamlog [OPTION]... [[METHOD:]NAME=COMMAND LINE | COMMAND LINE]...

  python streamlog.py                             this machine's own diagnostics
  python streamlog.py 'disk=df -h' 'logs=tail -n {lines:int=100} -F /var/log/syslog'
  curl -N 'localhost:8000/logs?lines=20'          live; Ctrl-C ends the remote tail too

options:
  -p, --port PORT      listen on this port (8000); 0 picks a free one and prints it
  -b, --bind ADDRESS   listen on this address (127.0.0.1), or on unix:PATH
  -c, --config FILE    read commands from this file, before those given as arguments
      --timeout SEC    stop a run after so many seconds (0: no limit)
      --grace SEC      seconds from SIGTERM to SIGKILL when a run is stopped (5)
      --stall SEC      stop a run whose client takes nothing for so many seconds (0: no limit)
      --max-output N   stop a run after so many bytes of output, or 10K, 10M, 10G (0: no limit)
      --max-runs N     runs at a time; one more gets a 503 (64)
      --token-file FILE
                       demand the token that stands in this file; or set STREAMLOG_TOKEN
      --tls-cert FILE  speak TLS, with the certificate in this PEM file
      --tls-key FILE   its key, if that is in a file of its own
      --no-auth        listen on an address that others reach without a token all the same
      --allow-host NAME
                       take this host name for the server's own; may be given again
      --allow-origin ORIGIN
                       let pages of this origin use the server; may be given again
      --terminal COLUMNSxLINES
                       the size of the terminal of a command that has one (80x24)
      --transcripts DIR
                       keep transcripts of runs in this directory (TMPDIR, or /var/tmp)
      --transcript-size N, --transcripts-size N
                       bytes of one (16M) and of all (256M), the newest of each run
      --keep-runs N, --keep SEC
                       ended runs that are kept (100), and for how long (3600)
      --linger SEC     seconds that a shared run goes on for without a viewer (5)
      --check          print the commands as they were understood, and exit
  -v, --verbose        also log each start of a command
  -q, --quiet          print the address alone at start, and log warnings only
  -h, --help           print this text and exit
      --version        print the version and exit

commands:
  A command line is split as a shell would and run without one; a leading ! asks for /bin/sh.
  {name} is a required parameter of the URL's query, {name=default} an optional one, and
  {name:type} has a type: word (the default), int, path, text, a choice such as nginx|redis,
  or a regular expression that the value must match in full. A value is one argument, and
  never an option. {{name}} stands for {name} itself. POST:NAME=... is run by POST only.
  NAME=-, or -, is this program's standard input, for any number of viewers.

commands file:
  A section for each command, [NAME], with the options command = COMMAND LINE, about (a
  description), method (GET or POST), timeout (seconds; 0 for no limit), max (runs of it at a
  time), stderr (merge, separate or discard), stdin (yes: the body of a POST or PUT is its
  input), pty (yes: it runs on a terminal; echo: on one that echoes its input), shared (yes: a
  client joins the run that goes on with the same values), cwd (directory), env (NAME=value, one
  a line) and type (Content-Type of output that is not plain text). [DEFAULT] holds options for
  all. SIGHUP reads it again, and the certificate; at a terminal it ends the server, as TERM does.

what a client sees:
  The output is the body, byte for byte, as it comes; the trailer Exit-Code ends a run that
  ended by itself. A run that the server ended is cut without the final chunk (curl exits 18).
  When the client leaves, the command's process group gets SIGTERM, then SIGKILL.
  To a command that takes input, curl -T FILE URL or --data-binary @FILE sends it, and
  curl -sN -T . URL is a live session: what you type is its input, what it says comes back.
  ?format=html is a page, sse are events, ndjson is an object a line (or by Accept). In text and
  html ?timestamps=1 puts the time before each line, ?hostname=1 this machine's name (in ndjson
  too), and ?heartbeat=SEC says after so long a silence that the run goes on. ?footer=1 adds a
  last line with exit code and duration, as a browser gets; ?footer=0 omits it. In a browser, /
  has a form for each command.

runs that outlive a connection:
  ?async=1 starts a run and answers with its address, /-/runs/ID: GET replays and follows it
  (?tail=N lines, ?follow=0, Range), in JSON its state; DELETE stops it; /-/runs lists them.
  ?wait answers when the run has ended, with its exit code in a header, by 500 if it failed.
"""

from __future__ import annotations

import os
import sys

if os.name != "posix" or sys.version_info < (3, 9):  # said before an import below fails for that reason
    _NEEDS = "streamlog needs Python 3.9 or newer on a POSIX system (Linux, macOS; on Windows, WSL)"
    if os.path.basename(sys.argv[0]).startswith("streamlog"):
        sys.exit(_NEEDS)
    raise ImportError(_NEEDS)

import atexit
import base64
import bisect
import codecs
import collections
import contextlib
import contextvars
import dataclasses
import datetime
import email.utils
import enum
import errno
import fcntl
import functools
import html
import http
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import queue
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import socketserver
import stat
import struct
import subprocess
import termios
import threading
import time
import traceback
import typing
import urllib.parse
import weakref
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Any, Callable, Literal, NamedTuple, NoReturn, Optional, Union

if TYPE_CHECKING:
    import argparse
    import ssl
    from typing import TypedDict, Unpack

    class _SettingsGiven(TypedDict, total=False):
        """The fields of Settings, for type checkers."""

        bind: str
        port: int
        timeout_seconds: Optional[float]
        grace_seconds: float
        drain_seconds: float
        stall_seconds: float
        max_runs: int
        max_output_bytes: int
        tls_cert: str
        tls_key: str
        token: str
        no_auth: bool
        allow_hosts: Sequence[str]
        allow_origins: Sequence[str]
        head_seconds: float
        idle_seconds: float
        refusal_seconds: float
        keepalive_seconds: int
        child_nofile: Optional[tuple[int, int]]
        terminal_size: tuple[int, int]
        transcripts: str
        transcript_bytes: int
        transcripts_bytes: int
        kept_runs: int
        kept_seconds: float
        linger_seconds: float
        insight: bool
        log: int


__version__ = "0.1.0"
__all__ = [
    "Command",
    "ConfigError",
    "Error",
    "Server",
    "Settings",
    "Stream",
    "serve",
    "start",
    "stopping",
    "stream",
    "wsgi",
]

_log = logging.getLogger("streamlog")


# ---------------------------------------------------------------------------------------------
# errors and settings: every refusal is an Error, raised where it is found and answered in one place


class Error(Exception):
    """A refusal, as one sentence that says what to do, with the HTTP status and headers to answer it by."""

    def __init__(self, message: str, status: int = 400, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class ConfigError(Error):
    """A mistake in a command or a setting, found at start."""


class _ClientGone(Exception):
    """The client has left, or took too long to say what it wants: there is nobody to answer."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server is told once, at start. Durations are in seconds."""

    bind: str = "127.0.0.1"  # an address, a host name, or unix:PATH
    port: int = 8000
    timeout_seconds: Optional[float] = None
    grace_seconds: float = 5.0
    drain_seconds: float = 2.0
    stall_seconds: float = 0.0  # for a client to take something of what waits for it; 0: no limit
    max_runs: int = 64
    max_output_bytes: int = 0  # of one run; 0: no limit
    tls_cert: str = ""  # PEM files; the key may stand in the certificate's
    tls_key: str = ""
    token: str = dataclasses.field(default="", repr=False)
    no_auth: bool = False
    allow_hosts: Sequence[str] = ()
    allow_origins: Sequence[str] = ()
    head_seconds: float = 10.0
    idle_seconds: float = 60.0
    refusal_seconds: float = 1.0  # until the answer to a wrong token
    keepalive_seconds: int = 15
    child_nofile: Optional[tuple[int, int]] = None  # (soft, hard) RLIMIT_NOFILE for commands; None: as ours
    terminal_size: tuple[int, int] = (80, 24)  # columns and lines, of a command that has a terminal
    transcripts: str = ""  # the folder that kept runs are recorded in; "": TMPDIR, or /var/tmp
    transcript_bytes: int = 16 << 20  # of one run's output, the newest
    transcripts_bytes: int = 256 << 20  # of all
    kept_runs: int = 100  # that have ended, and for so long after that
    kept_seconds: float = 3600.0
    linger_seconds: float = 5.0  # that a shared run goes on for without a viewer
    insight: bool = True  # serve /log, /stacks and /level of this program
    log: int = 0  # bytes of this program's newest records that are kept for /log; 0: none

    @property
    def scheme(self) -> str:
        """The scheme of its URLs."""
        return "https" if self.tls_cert else "http"


# ---------------------------------------------------------------------------------------------
# commands: what may run, and how a value from a URL becomes one argument of it. No I/O but the file

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_WORD = r"[A-Za-z0-9_.,:@%+=-]+"
_TYPES = {"word": _WORD, "int": r"-?[0-9]+", "path": r"[A-Za-z0-9_.,:@%+=/-]+", "text": r"(?s:.*)"}
_DEMANDS = {
    "word": "must be word (letters, digits and _.,:@%+=-)",
    "int": "must be int",
    "path": "must be path (letters, digits and _.,:@%+=-/)",
    "text": "must be printable text",
}
_CHOICE = re.compile(rf"{_WORD}(?:\|{_WORD})+")
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)(?=[}:=])")
_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ksh", "mksh", "ash", "rbash", "csh", "tcsh", "fish"})
_HIDDEN_ENVIRONMENT = re.compile(r"STREAMLOG_.*|LISTEN_.*|NOTIFY_SOCKET|CREDENTIALS_DIRECTORY")
_PLAIN_TEXT = "text/plain; charset=utf-8"
# Of the values of a request, each as often as it is used: half of what Linux takes for one argument or variable
# (MAX_ARG_STRLEN, execve(2)), so that what stands beside it in the command line has room.
_VALUE_BYTES = 64 * 1024


# A placeholder in a line that is being read: \0, its index, \0. No argument can hold a NUL, and shlex and the
# shell scanner take one for an ordinary character, so that a placeholder's own text is never split or unquoted.
_MARK = re.compile("\0([0-9]+)\0")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A placeholder of a command: what a URL may say for it."""

    name: str
    type: str
    pattern: re.Pattern[str]
    default: Optional[str] = None

    @property
    def choices(self) -> list[str]:
        """The values of a choice; empty for any other type."""
        return self.type.split("|") if _CHOICE.fullmatch(self.type) else []

    def problem(self, value: str, starts_argument: bool, is_shell: bool) -> str:
        """What is wrong with a value where it is to stand, or an empty string."""
        if not self.pattern.fullmatch(value) or "\0" in value:
            return _DEMANDS.get(self.type, f"must be {self.type}" if self.choices else f"must match {self.type}")
        if self.type == "text" and not value.isprintable():
            return _DEMANDS["text"]
        if self.type in ("word", "path") and ".." in value.split("/"):
            return "must not contain '..'"
        if (starts_argument or is_shell) and value.startswith("-"):
            return "must not begin with '-'"
        if self.type == "path" and not starts_argument and value.startswith("/"):
            return "must be a relative path"
        return ""


def _make_parameter(name: str, type_: str, default: Optional[str]) -> Parameter:
    if type_ in _TYPES:
        pattern = _TYPES[type_]
    elif _CHOICE.fullmatch(type_):
        pattern = "|".join(map(re.escape, type_.split("|")))
    elif re.fullmatch(r"[A-Za-z0-9_-]+", type_):
        raise ConfigError(
            f"parameter {name!r} has an unknown type: {type_!r}; known are {', '.join(_TYPES)}, "
            f"choices such as on|off, and regular expressions (a literal brace is doubled: {{{{{name}...}}}})"
        )
    else:
        pattern = type_
    try:
        return Parameter(name, type_, re.compile(pattern, re.ASCII), default)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        raise ConfigError(f"parameter {name!r} has a bad regular expression: {error}: {type_!r}") from None


def _parse_parameter(line: str, start: int, name: str) -> tuple[int, Parameter]:
    """Read the placeholder whose brace opens at `start`; return where it ends, and the parameter."""
    at = colon = start + 1 + len(name)
    equals, braces, parentheses, in_class = None, 0, 0, False
    while at < len(line):
        char = line[at]
        if char == "\\":
            at += 1
        elif in_class and equals is None:
            in_class = char != "]"
        elif char == "}" and not braces:
            type_ = line[colon + 1 : at if equals is None else equals]
            return at + 1, _make_parameter(name, type_ or "word", None if equals is None else line[equals + 1 : at])
        elif char in "{}":
            braces += 1 if char == "{" else -1
        elif char == "=" and equals is None and not braces and not parentheses:
            equals = at
        elif char in "()":
            parentheses += 1 if char == "(" else -1
        else:
            in_class = char == "["
        at += 1
    raise ConfigError(f"placeholder '{{{name}' has no closing brace: write {{{{{name}}}}} if it is not one")


def _mark_placeholders(line: str, found: list[Parameter]) -> str:
    """Find the placeholders of a raw line; return it with a mark for each, and add their parameters to the list."""
    if not line.isascii() and any("\ud800" <= char <= "\udfff" for char in line):
        raise ConfigError(f"the command line must be UTF-8: {line!r}")
    if "\0" in line:
        raise ConfigError("a command line cannot hold a NUL character")
    out: list[str] = []
    at = 0
    for brace in re.finditer(r"\$?\{", line):
        if brace.start() < at:
            continue
        out.append(line[at : brace.start()])
        at = brace.end()
        is_doubled = line.startswith("{{", brace.start())
        match = _PLACEHOLDER.match(line, brace.start() + is_doubled)
        if not match:
            out.append(brace[0])
            continue
        end, parameter = _parse_parameter(line, match.start(), match[1])
        if is_doubled and line.startswith("}", end):
            out.append(line[match.start() : end])
            at = end + 1
        elif is_doubled:
            out.append("{")
        else:
            out.append(f"\0{len(found)}\0")
            found.append(parameter)
            at = end
    return "".join([*out, line[at:]])


def _by_name(found: Sequence[Parameter]) -> dict[str, Parameter]:
    """The parameters of a command; one named twice must say the same twice, or only its name again."""
    named: dict[str, Parameter] = {}
    for parameter in found:
        first = named.setdefault(parameter.name, parameter)
        if parameter != first and (parameter.type, parameter.default) != ("word", None):
            raise ConfigError(f"parameter {parameter.name!r} is described twice, and differently")
    return named


# A script is followed only as far as its quotes can be told without being a shell. What is beyond that is no error by
# itself, but no parameter may come behind it: misread quotes would let a value fall apart into words.
_SHELL_TOKEN = re.compile(
    r"\\[^\0]"  # an escaped character
    r"|\$\{[^{}'\"`\\$()\0]*\}"  # an expansion with nothing special in it
    r"|\$\(\(|\$\(|[\"'()]|\0[0-9]+\0"
    r"|[\s;&|]+"  # the end of a word
    r"|\\|`|\$\{|<<|\$'|\bcase\b|#",
    re.DOTALL,
)
_SINGLE_QUOTED_TOKEN = re.compile("'|\0[0-9]+\0")
_SHELL_C = re.compile(rf"(?:^|[\s;&|(/])(?:{'|'.join(_SHELLS)})\s[^;&|\n]*-[A-Za-z]*c[A-Za-z]*\s+(?:[-+]\S*\s+)*$")
# What may be open around a parameter ("(" is a subshell or a substitution, "((" arithmetic), what closes it, and how
# the parameter is written there. In arithmetic quotes are not special, and only an int is safe.
_SHELL_CLOSES = {"(": ")", "((": ")", '"': '"', "'": "'"}
_EXPANSIONS = {"(": '"${arg_%s}"', "((": "${arg_%s}", '"': "${arg_%s}", "'": "'\"${arg_%s}\"'"}


_IN_SHELL_TEXT = "inside the script of a shell's -c would be read as shell text"


def _check_place(parameter: Parameter, lost: str, context: str, before: str) -> None:
    """Refuse a parameter whose value could fall apart, or be evaluated, where it stands in a script."""
    if lost:
        raise ConfigError(
            f"parameter {parameter.name!r} comes behind {lost!r} in the script, where its quotes cannot be told: "
            f'take it into a variable before, as in x={{{parameter.name}}}; ... "$x"'
        )
    if context == "((" and parameter.type != "int":
        raise ConfigError(f"parameter {parameter.name!r} stands in arithmetic, which evaluates it: make it an int")
    if _SHELL_C.search(before):
        raise ConfigError(f'parameter {parameter.name!r} {_IN_SHELL_TEXT}: pass it behind the script, and use "$1"')


def _follow(token: str, context: str, stack: list[str]) -> bool:
    """Note what a token of a script opens or closes; False if the script cannot be followed any further."""
    if stack and token == _SHELL_CLOSES[context]:
        stack.pop()
    elif token in ("$(", "$(("):
        stack += ["(("] * 2 if token == "$((" else ["("]
    elif context == "((" and token == "(":
        stack.append("((")
    elif context == "(" and token in ('"', "'", "("):
        stack.append(token)
    elif context == "(" and (token in ("<<", "$'") or (token == "case" and stack)):
        return False
    return token not in ("`", "${", "\\")


def _shell_script(marked: str, found: Sequence[Parameter]) -> str:
    """Turn each mark of a script into an expansion that stays one word where it stands (sh(1), quoting).

    Raises ConfigError for a parameter where that cannot be made sure.
    """
    out: list[str] = []
    stack: list[str] = []
    lost = ""  # what the script could not be followed beyond
    at = word_start = 0
    while True:
        context = stack[-1] if stack else "("
        match = (_SINGLE_QUOTED_TOKEN if context == "'" else _SHELL_TOKEN).search(marked, at)
        if not match:
            return "".join([*out, marked[at:]])
        out.append(marked[at : match.start()])
        token, at = match[0], match.end()
        if token[0] == "\0":
            parameter = found[int(token[1:-1])]
            _check_place(parameter, lost, context, marked[:word_start])
            token = _EXPANSIONS[context] % parameter.name
        elif token == "#" and context == "(" and match.start() == word_start:
            at = (marked + "\n").index("\n", at)
            token = _MARK.sub("", marked[match.start() : at])
        elif not _follow(token, context, stack):
            lost = lost or token
        if context == "(" and re.fullmatch(r"[\s;&|]+|\$?[()]", token):
            word_start = at
        out.append(token)


_Argument = tuple[Union[str, Parameter], ...]


def _part_argument(marked: str, found: Sequence[Parameter]) -> _Argument:
    """An argument as a tuple of literal text and parameters."""
    parts = enumerate(_MARK.split(marked))
    return tuple(found[int(part)] if at % 2 else part for at, part in parts if part or at % 2)


def _split_arguments(marked: str, found: Sequence[Parameter]) -> tuple[_Argument, ...]:
    """The arguments of a command line, split as a shell would."""
    try:
        words = shlex.split(marked)
    except ValueError as error:
        raise ConfigError(f"cannot be split into arguments: {str(error).lower()}") from None
    return tuple(_part_argument(word, found) for word in words)


def _script_argument(arguments: Sequence[_Argument]) -> _Argument:
    """The script among a shell's arguments, if -c (or a cluster such as -ec) asks for one."""
    has_c = takes_value = False
    for argument in arguments:
        text = str(argument[0]) if argument else ""
        if takes_value:
            takes_value = False
        elif len(text) > 1 and text[0] in "-+":
            has_c = has_c or bool(re.fullmatch(r"-[A-Za-z]*c[A-Za-z]*", text))
            takes_value = text in ("--rcfile", "--init-file") or bool(re.match(r"[-+][A-Za-z]*[oO]", text))
        else:
            return argument if has_c else ()
    return ()


def _check_program(arguments: Sequence[_Argument]) -> None:
    """Refuse what would let a value from a URL choose the program or write shell text."""
    if not arguments or not arguments[0]:
        raise ConfigError("the command line is empty")
    if any(isinstance(part, Parameter) for part in arguments[0]):
        raise ConfigError("the program itself cannot be a parameter")
    for at, argument in enumerate(arguments):
        if os.path.basename(str(argument[0] if argument else "")) in _SHELLS:
            script = _script_argument(arguments[at + 1 :])
            if any(isinstance(part, Parameter) for part in script):
                raise ConfigError(
                    f"a parameter {_IN_SHELL_TEXT}: "
                    "write the command line as !SCRIPT, where values travel in the environment"
                )


_Pty = Union[bool, Literal["echo"]]


class Launch(NamedTuple):
    """One execution of a program to be started: what subprocess needs to know."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Optional[str]
    stderr: str
    has_input: bool = False  # standard input is a pipe, or the terminal, and not empty
    pty: _Pty = False

    def __str__(self) -> str:
        return shlex.join(self.argv)


class Call(NamedTuple):
    """One execution of a task to be started."""

    function: Callable[..., object]
    arguments: Mapping[str, object]

    def __str__(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{getattr(self.function, '__qualname__', self.function)}({said})"


def _describe_annotation(name: str, annotation: Any) -> tuple[str, dict[str, object]]:
    """The type of a task's parameter, and for a choice what each of its texts stands for."""
    if annotation in (str, int, inspect.Parameter.empty):
        return "int" if annotation is int else "text", {}
    choices: dict[str, object] = {}
    if typing.get_origin(annotation) is typing.Literal:
        choices = {str(value): value for value in typing.get_args(annotation)}
    elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        choices = {member.value if isinstance(member.value, str) else member.name: member for member in annotation}
    if not choices or not all(re.fullmatch(_WORD, choice) for choice in choices):
        raise ConfigError(f"parameter {name!r} of a task must be a str, an int, a Literal or an Enum: {annotation!r}")
    return "|".join(choices), choices


def _read_signature(task: Callable[..., object]) -> Iterator[tuple[Parameter, Callable[[str], object]]]:
    """The parameters of a task, and how each is made of a text. Raises ConfigError for what cannot come by a URL."""
    if inspect.iscoroutinefunction(task) or inspect.isasyncgenfunction(task):
        raise ConfigError("a task runs in a thread of its own: it cannot be a coroutine (wrap it in asyncio.run)")
    try:
        signature = inspect.signature(task)
        hints = typing.get_type_hints(task if hasattr(task, "__globals__") else type(task).__call__)
    except (NameError, TypeError, ValueError) as error:
        raise ConfigError(f"the signature of the task cannot be read: {error}") from None
    for name, parameter in signature.parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"parameter {name!r} of a task must be one that is given by its name")
        type_, choices = _describe_annotation(name, hints.get(name, parameter.empty))
        convert = choices.__getitem__ if choices else {"int": int}.get(type_, str)
        default = None
        if parameter.default is not parameter.empty:
            texts = {value: text for text, value in choices.items()}
            default = texts.get(parameter.default, parameter.default if choices else str(parameter.default))
            is_other = not choices and (type_ == "text") != isinstance(parameter.default, str)
            if is_other or not isinstance(default, str):
                raise ConfigError(f"the default of parameter {name!r} is not of its type: {parameter.default!r}")
        if len(choices) == 1:  # a pattern like any other, but for a single word
            yield Parameter(name, type_, re.compile(re.escape(type_)), default), convert
        else:
            yield _make_parameter(name, type_, default), convert


def _count_ups(path: str) -> int:
    """How often a path goes up."""
    return path.split("/").count("..")


def _starts_word(marked: str, at: int) -> bool:
    """Whether a shell's word begins here, as far as the text right before tells."""
    return bool(re.search(r"(?:^|[\s<>;&|(])[\"']?$", marked[:at]))


@dataclasses.dataclass(frozen=True)
class Command:
    """What a name runs. Raises ConfigError where a mistake can be seen without running it.

    command: a command line with placeholders, split by shlex and run without a shell, or `!` and a script
        for /bin/sh; a list of arguments, with placeholders in them; or a task: a callable, called in a thread
        of its own with the values that its signature names. about: a description. method: GET or POST; None: GET,
        or for one that takes input POST. timeout: seconds, 0 for no limit, None for the server's. max: runs at a
        time, or None. stderr: merge, separate or discard; None: merge in text, where order counts, and separate in
        the formats that tell it apart. stdin: whether the body of a POST or PUT is its standard input. pty: whether
        it runs on a terminal; "echo": on one that echoes its input, and turns the ends of lines into CRLF. shared:
        whether a client joins the run that goes on with the same values. cwd: the directory to run in. env:
        variables to add to this program's environment, as it is when the Command is made. type: the Content-Type of
        the output.
    """

    command: Union[str, Sequence[str], Callable[..., object]]
    about: str = ""
    method: Optional[str] = None
    timeout: Optional[float] = None
    max: Optional[int] = None
    stderr: Optional[str] = None
    stdin: bool = False
    pty: _Pty = False
    shared: bool = False
    cwd: Optional[str] = None
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    type: str = _PLAIN_TEXT
    parameters: Mapping[str, Parameter] = dataclasses.field(init=False, repr=False, default_factory=dict)
    _arguments: Sequence[_Argument] = dataclasses.field(init=False, repr=False, default=())
    _uses: Sequence[tuple[Parameter, bool]] = dataclasses.field(init=False, repr=False, default=())
    _converts: Mapping[str, Callable[[str], object]] = dataclasses.field(init=False, repr=False, default_factory=dict)
    _environment: Mapping[str, str] = dataclasses.field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.method is None:
            object.__setattr__(self, "method", "POST" if self.stdin else "GET")
        self._check_options()
        found: list[Parameter] = []
        uses: list[tuple[Parameter, bool]]
        arguments: tuple[_Argument, ...] = ()
        if self.is_source:
            object.__setattr__(self, "shared", True)
        if callable(self.command):
            converts = {parameter.name: (parameter, convert) for parameter, convert in _read_signature(self.command)}
            found = [parameter for parameter, _ in converts.values()]
            named = _by_name(found)
            uses = [(parameter, False) for parameter in found]
            object.__setattr__(self, "_converts", {name: convert for name, (_, convert) in converts.items()})
        elif self.is_shell:
            marked = _mark_placeholders(str(self.command), found).lstrip()[1:]
            named = _by_name(found)
            found = [named[parameter.name] for parameter in found]
            if not marked.strip():
                raise ConfigError("the script is empty")
            uses = [(found[int(mark[1])], _starts_word(marked, mark.start())) for mark in _MARK.finditer(marked)]
            arguments = (("/bin/sh",), ("-c",), (_shell_script(marked, found),))
        else:
            words = [self.command] if isinstance(self.command, str) else self.command
            lines = [_mark_placeholders(word, found) for word in words]
            named = _by_name(found)
            found = [named[parameter.name] for parameter in found]
            if isinstance(self.command, str):
                arguments = _split_arguments(lines[0], found)
            else:
                arguments = tuple(_part_argument(word, found) for word in lines)
            _check_program(arguments)
            parts = [(part, not at) for argument in arguments for at, part in enumerate(argument)]
            uses = [(part, is_first) for part, is_first in parts if isinstance(part, Parameter)]
        self._check_defaults(uses)
        object.__setattr__(self, "parameters", MappingProxyType(named))
        object.__setattr__(self, "_arguments", arguments)
        object.__setattr__(self, "_uses", uses)
        inherited = {key: value for key, value in os.environ.items() if not _HIDDEN_ENVIRONMENT.fullmatch(key)}
        # A prompt of Python's that draws itself anew with each key is of no use by curl.
        terminal = {"TERM": "xterm-256color", "PYTHON_BASIC_REPL": "1"} if self.pty else {}
        environment = {**inherited, "PYTHONUNBUFFERED": "1", **terminal, **self.env}
        object.__setattr__(self, "_environment", environment)

    def _check_options(self) -> None:
        for option, known in (("method", ("GET", "POST")), ("stderr", (None, "merge", "separate", "discard"))):
            if getattr(self, option) not in known:
                raise ConfigError(f"{option} must be {' or '.join(filter(None, known))}: {getattr(self, option)!r}")
        if self.pty not in (False, True, "echo"):
            raise ConfigError(f"pty must be yes, no or echo: {self.pty!r}")
        if self.is_task and (self.stdin or self.pty):
            raise ConfigError("a task has neither standard input nor a terminal")
        if self.shared and self.stdin:
            raise ConfigError("a command that is shared takes no input: whose would it be?")
        if self.timeout is not None and not 0 <= self.timeout < math.inf:
            raise ConfigError(f"timeout must be a number of seconds, or 0 for no limit: {self.timeout!r}")
        if self.max is not None and self.max < 1:
            raise ConfigError(f"max must be a whole number above 0: {self.max!r}")
        if not re.fullmatch(r"[!-~]+/[!-~]+( *;[ -~]+)?", self.type):
            raise ConfigError(f"type must be a Content-Type such as text/csv: {self.type!r}")
        for name, value in self.env.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\0" in value:
                raise ConfigError(f"env must be NAME=value, one a line: {name!r}")

    def _check_defaults(self, uses: Sequence[tuple[Parameter, bool]]) -> None:
        """Hold defaults and choices to the rules that the values from a URL are held to."""
        for parameter, starts_argument in uses:
            for value in [*parameter.choices, *([] if parameter.default is None else [parameter.default])]:
                problem = parameter.problem(value, starts_argument, self.is_shell)
                if problem:
                    raise ConfigError(f"default or choice of parameter {parameter.name!r} {problem}: {value!r}")

    @property
    def methods(self) -> Sequence[str]:
        """The methods that it is run by."""
        methods = (self.method or "", "POST", "PUT") if self.stdin else (self.method or "",)
        return tuple(dict.fromkeys(methods))

    @property
    def is_shell(self) -> bool:
        """Whether the command is a script for /bin/sh."""
        return isinstance(self.command, str) and self.command.lstrip().startswith("!")

    @property
    def is_task(self) -> bool:
        """Whether the command is a callable of this program."""
        return callable(self.command)

    @property
    def is_source(self) -> bool:
        """Whether it is the server's own standard input."""
        return self.command == "-"

    @property
    def line(self) -> str:
        """The command, as a line to be read."""
        if callable(self.command):
            return f"{str(getattr(self.command, '__name__', self.command)).lstrip('_')}({', '.join(self.parameters)})"
        return self.command if isinstance(self.command, str) else shlex.join(self.command)

    @property
    def is_plain_text(self) -> bool:
        """Whether the output is text that a note of the server's own may follow."""
        return self.type.partition(";")[0].strip().lower() == "text/plain"

    @property
    def program(self) -> str:
        """The program that is started, as written."""
        return str(self._arguments[0][0])

    def call(self, name: str, values: Mapping[str, str]) -> Call:
        """Give a task its values. Raises Error as `bind` does."""
        assert callable(self.command)
        bound = self._check_values(name, values)
        try:
            return Call(self.command, {key: self._converts[key](value) for key, value in bound.items()})
        except ValueError as error:  # Python reads no int of thousands of digits
            raise Error(f"a value of {name!r} cannot be taken: {error}") from None

    def bind(self, name: str, values: Mapping[str, str], stderr: str = "merge") -> Launch:
        """Put values in their places. Raises Error for one that is missing or refused; `name` is for its text.

        `stderr` is where standard error goes unless the command itself says so.
        """
        bound = self._check_values(name, values)
        argv = []
        for argument in self._arguments:
            text = ""
            for part in argument:
                if isinstance(part, Parameter):  # where what stands before is empty, it starts the argument after all
                    self._check_value(name, part, bound[part.name], starts_argument=not text)
                text += bound[part.name] if isinstance(part, Parameter) else part
            if _count_ups(text) > _count_ups("".join(part if isinstance(part, str) else "x" for part in argument)):
                self._check_ups(name, argument, text)
            argv.append(text)
        variables = {f"arg_{key}": value for key, value in bound.items()} if self.is_shell else {}
        where = self.stderr or ("merge" if self.pty else stderr)
        return Launch(argv, {**self._environment, **variables}, self.cwd, where, pty=self.pty)

    @staticmethod
    def _check_ups(name: str, argument: _Argument, text: str) -> None:
        """Refuse a '..' that values make up with what stands beside them, though none has one by itself."""
        if all(part.type in ("word", "path") for part in argument if isinstance(part, Parameter)):
            raise Error(f"the values of {name!r} must not make up '..': {text[:200]!r}")

    def _check_values(self, name: str, values: Mapping[str, str]) -> dict[str, str]:
        """The value of every parameter. Raises Error for what cannot be taken."""
        bound: dict[str, str] = {}
        for parameter in self.parameters.values():
            value = values.get(parameter.name, parameter.default)
            if value is None:
                raise Error(f"parameter {parameter.name!r} of {name!r} is required: give it as {parameter.name}=...")
            bound[parameter.name] = value
        for parameter, starts_argument in self._uses:
            self._check_value(name, parameter, bound[parameter.name], starts_argument)
        if sum(len(bound[parameter.name].encode(errors="replace")) for parameter, _ in self._uses) > _VALUE_BYTES:
            raise Error(f"the values of {name!r} may have {_VALUE_BYTES} bytes at most, each as often as it is used")
        return bound

    def _check_value(self, name: str, parameter: Parameter, value: str, starts_argument: bool) -> None:
        problem = parameter.problem(value, starts_argument, self.is_shell)
        if problem:
            raise Error(f"parameter {parameter.name!r} of {name!r} {problem}: {value[:200]!r}")


def _parse_variable(line: str) -> tuple[str, str]:
    name, equals, value = line.strip().partition("=")
    if not equals:
        raise ConfigError(f"env must be NAME=value, one a line: {name!r}")
    return name, value


def _read_switch(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false", "on", "off", "1", "0"):
        raise ConfigError(f"a switch is yes or no: {text!r}")
    return text.lower() in ("yes", "true", "on", "1")


_OPTIONS: Mapping[str, Callable[[str], object]] = {
    "command": str,
    "about": str,
    "method": str.upper,
    "timeout": float,
    "max": int,
    "stderr": str,
    "stdin": _read_switch,
    "shared": _read_switch,
    "pty": lambda text: "echo" if text == "echo" else _read_switch(text),
    "cwd": str,
    "env": lambda text: dict(_parse_variable(line) for line in text.splitlines() if line.strip()),
    "type": str,
}


def _make_command(name: str, options: Mapping[str, str]) -> Command:
    """A command from its options as text; an error names the command and the place."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"a command's name is letters, digits, '.', '_' and '-' (NAME=COMMAND LINE): {name!r}")
    values: dict[str, object] = {}
    for key in options:
        if key not in _OPTIONS:
            raise ConfigError(f"command {name!r}: unknown option {key!r}; known are {', '.join(_OPTIONS)}")
    if "command" not in options:
        raise ConfigError(f"command {name!r}: 'command = ...' is missing")
    try:
        for key, text in options.items():
            values[key] = _OPTIONS[key](text)
        return Command(**values)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"command {name!r}: {error}") from None
    except ValueError:
        raise ConfigError(f"command {name!r}: {key} must be a number: {text!r}") from None


def _parse_command_argument(text: str) -> tuple[str, Command]:
    """The name and command of `[METHOD:]NAME=COMMAND LINE`, or of a bare command line."""
    match = re.match(rf"(?:([A-Za-z]+):)?({_NAME.pattern})=", text)
    if match:
        options = {"command": text[match.end() :]}
        if match[1]:
            options["method"] = match[1]
        return match[2], _make_command(match[2], options)
    program = text.lstrip().lstrip("!").split(maxsplit=1)[:1]
    name = "stdin" if text == "-" else os.path.basename(program[0]) if program else ""
    return name, _make_command(name, {"command": text})


def _read_config(path: str) -> Iterator[tuple[str, Command]]:
    """The commands of a file, in its order (configparser, without interpolation)."""
    import configparser

    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    try:
        with open(path, encoding="utf-8-sig") as file:
            parser.read_file(file)
    except OSError as error:
        raise ConfigError(f"cannot read {path!r}: {error.strerror}") from None
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not parser.sections():
        raise ConfigError(f"{path}: there is no command in it: a command is a section, [NAME]")
    for name in parser.sections():
        try:
            yield name, _make_command(name, dict(parser[name]))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


def _collect(commands: Iterator[tuple[str, Command]]) -> dict[str, Command]:
    """Commands by name. A name that comes twice is a mistake."""
    collected: dict[str, Command] = {}
    for name, command in commands:
        if name in collected:
            raise ConfigError(f"command {name!r} is given twice: give one of them another name (NAME=COMMAND LINE)")
        collected[name] = command
    return collected


# The read-only diagnostics that are served when no command is given: a name, what it shows, and ways to show it.
# The first way is taken whose program is found, and whose absolute paths exist (one that is only looked for stands in
# front, in brackets), so that Linux, macOS, busybox and a container that has nothing but Python each get theirs.
_IS_MACOS = sys.platform == "darwin"
_DIAGNOSTICS: Sequence[tuple[str, str, Sequence[str]]] = (
    ("uptime", "How long the machine is up, and its load", ["uptime", "{cat} /proc/uptime /proc/loadavg"]),
    ("load", "Load averages, once a second (live)", ["{load}"]),
    ("system", "Kernel and architecture", ["uname -a", "{cat} /proc/version"]),
    ("release", "Operating system release", ["{cat} /etc/os-release", "sw_vers"]),
    ("cpu", "Processors", ["lscpu", "sysctl hw.ncpu machdep.cpu.brand_string", "{cat} /proc/cpuinfo"]),
    ("memory", "Memory in use", ["free -m", "vm_stat", "{cat} /proc/meminfo"]),
    ("disk", "Space on file systems", ["df -h", "{df}"]),
    ("inodes", "Inodes on file systems", ["df -i"]),
    ("mounts", "What is mounted where", ["{cat} /proc/mounts", "mount"]),
    ("processes", "All processes", ["ps aux", "[/proc/self/cmdline] {ps}"]),
    ("top", "The busiest processes (live)", ["top -l 0 -s 2 -n 20" if _IS_MACOS else "top -b -d 2"]),
    ("vmstat", "Processor, memory and paging, once a second (live)", ["vmstat 1", "vm_stat 1"]),
    ("iostat", "Disk activity, every two seconds (live)", ["iostat -w 2" if _IS_MACOS else "iostat 2"]),
    ("journal", "The system journal (live)", ["[/run/systemd/journal] journalctl -n {lines:int=50} -f"]),
    (
        "syslog",
        "The system log (live)",
        [f"tail -n {{lines:int=50}} -F /var/log/{name}" for name in ("syslog", "messages", "system.log")],
    ),
    ("dmesg", "Kernel messages", ["dmesg"]),
    ("services", "Running services", ["[/run/systemd/system] systemctl list-units --state=running --no-pager"]),
    ("failed", "Failed units", ["[/run/systemd/system] systemctl list-units --failed --no-pager"]),
    ("users", "Who is logged in", ["who"]),
    ("addresses", "Network interfaces and addresses", ["ip address", "ifconfig -a", "{cat} /proc/net/dev"]),
    ("routes", "Routing table", ["ip route", "netstat -rn", "{cat} /proc/net/route"]),
    ("sockets", "Listening and open sockets", ["ss -tunap", "netstat -an", "{cat} /proc/net/tcp /proc/net/tcp6"]),
    ("ping", "Reach a host (live)", ["ping -c {count:int=5} {host}"]),
    ("lookup", "Look a name up", ["getent ahosts {name}", "dscacheutil -q host -a name {name}", "nslookup {name}"]),
)
# What Python shows where there is no program for it.
_SCRIPTS = {
    "{cat}": "import sys\nfor name in sys.argv[1:]: print(open(name, errors='replace').read(), end='')",
    "{df}": "import os\nfs = os.statvfs('/')\nprint(fs.f_bavail * fs.f_frsize >> 20, 'MiB are free on /')",
    "{load}": "import os, time\nwhile True:\n"
    " print(time.strftime('%T'), *('%.2f' % load for load in os.getloadavg()))\n time.sleep(1)",
    "{ps}": "import glob\nfor name in glob.glob('/proc/[0-9]*/cmdline'):\n"
    " try: print(name[6:-8], open(name, errors='replace').read().replace('\\0', ' '))\n except OSError: pass",
}


def _diagnostics() -> Iterator[tuple[str, Command]]:
    """The built-in commands that this machine can run."""
    for name, about, ways in _DIAGNOSTICS:
        for way in ways:
            needed = re.findall(r"(?<=[ \[])/[^ \]]+", way)
            line = way.rpartition("] ")[2]
            for mark, script in _SCRIPTS.items():
                line = line.replace(mark, shlex.join([sys.executable, "-u", "-S", "-c", script]))
            command = Command(line, about)
            if shutil.which(command.program) and all(map(os.path.exists, needed)):
                yield name, command
                break


# ---------------------------------------------------------------------------------------------
# requests: bytes to a request, strictly (RFC 9112), because a process is started on their strength. Pure

# Room for a URL of 8000 octets (RFC 9112 section 3) with any method; and for the headers that browsers, proxies
# and cookies of other services on the same host add up to. Past these a client is broken or hostile.
_LINE_BYTES = 16 * 1024
_HEAD_BYTES = 64 * 1024
_HEADER_COUNT = 100
_FORM_BYTES = 64 * 1024
_CHUNK_LINE_BYTES = 1024  # a chunk's size with its extensions
_TRAILER_BYTES = 8 * 1024


_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/([0-9])\.([0-9])")
_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)")  # two repetitions in a row: quadratic
_STRAY_LINE_END = re.compile(rb"(?<!\r)\n|\r[^\n]")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_PORT = re.compile(r":[0-9]*$")
_CONTROL_CHARACTER = re.compile(r"[\0-\x1f\x7f]")
_UNPRINTABLE = re.compile(rb"[^ !#-\[\]-~]")
_SINGLE_HEADERS = frozenset({"host", "content-length", "content-type", "origin", "authorization", "expect"})


@dataclasses.dataclass(frozen=True)
class Request:
    """A request as it was read: `path` is decoded, `query` is not, header names are in lower case."""

    method: str
    path: str
    query: str
    authority: str
    headers: Mapping[str, str]
    is_http_1_0: bool = False
    scheme: str = ""  # where it is not the server's own, which takes it
    prefix: str = ""  # of the URL, before the path: where the site is mounted in another

    @property
    def host(self) -> str:
        """The host of the authority, without its port, in lower case."""
        return _PORT.sub("", self.authority).lower()

    @property
    def is_chunked(self) -> bool:
        """Whether the body comes in chunks, its length unknown."""
        return "transfer-encoding" in self.headers

    @property
    def body_bytes(self) -> int:
        """The length of a body that tells it."""
        return int(self.headers.get("content-length", "0"))

    @property
    def has_body(self) -> bool:
        """Whether a body follows the head."""
        return self.is_chunked or self.body_bytes > 0

    @property
    def wants_close(self) -> bool:
        """Whether the client asked for the connection to end with the answer (RFC 9112 section 9.6)."""
        tokens = self.headers.get("connection", "").lower().split(",")
        return self.is_http_1_0 or "close" in (token.strip(" \t") for token in tokens)

    @functools.cached_property
    def accepted(self) -> dict[str, float]:
        """The media types and ranges that Accept names, with their weights (RFC 9110 section 12.5.1)."""
        found = {}
        for item in re.sub(r"[ \t]", "", self.headers.get("accept", "").lower()).split(","):
            name, *options = item.split(";")
            weight = next((option[2:] for option in options if option.startswith("q=")), "1")
            if name and re.fullmatch(r"[01](\.[0-9]{0,3})?", weight) and float(weight) > 0:
                found[name] = float(weight)
        return found


def _find_head(inbox: bytearray, seen: int = 0) -> int:
    """Where the head ends, with its empty line; 0 while more must come. Raises Error for what can be no head.

    The first `seen` bytes were looked at before: else one byte at a time would cost the square of a head's length.
    """
    end = inbox.find(b"\r\n\r\n", max(0, seen - 3)) + 4
    size = end if end > 3 else len(inbox)
    if _STRAY_LINE_END.search(inbox, max(0, seen - 2), size):
        raise Error("lines of a request end in CRLF")
    if size >= _LINE_BYTES and inbox.find(b"\r\n", 0, _LINE_BYTES) < 0:
        raise Error(f"the request line is longer than {_LINE_BYTES} bytes: shorten the URL", 414)
    if size > _HEAD_BYTES:
        raise Error(f"the request's head is longer than {_HEAD_BYTES} bytes: send fewer or shorter headers", 431)
    return end if end > 3 else 0


def _parse_headers(lines: Sequence[bytes]) -> dict[str, str]:
    """Header lines by lower-case name; repeated ones are joined as lists (RFC 9110 section 5.3)."""
    if len(lines) > _HEADER_COUNT:
        raise Error(f"the request has more than {_HEADER_COUNT} headers", 431)
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER_LINE.fullmatch(line)
        if not match:
            raise Error("a header line must be a name, a colon and a value")
        name, value = match[1].decode("ascii").lower(), match[2].decode("latin-1").strip(" \t")
        if name in headers and name in _SINGLE_HEADERS:
            raise Error(f"the header {name} may be sent once only")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if "transfer-encoding" in headers:
        if "content-length" in headers:
            raise Error("a body has a Content-Length or comes in chunks, and not both")
        if headers["transfer-encoding"].lower() != "chunked":
            raise Error("the only transfer encoding that is taken is chunked", 501)
    if "content-length" in headers and not re.fullmatch(r"[0-9]{1,15}", headers["content-length"]):
        raise Error("Content-Length must be a number")
    return headers


def _unquote(text: str) -> str:
    """Percent-decode once, strictly (RFC 3986 section 2.1)."""
    if "%" not in text:
        return text
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise Error("a '%' in the URL must be followed by two hexadecimal digits")
    try:
        return urllib.parse.unquote_to_bytes(text).decode("utf-8")
    except UnicodeDecodeError:
        raise Error("the URL must be UTF-8, percent-encoded") from None


def _parse_target(method: str, target: str) -> tuple[str, str, str]:
    """The authority (empty but in absolute form), decoded path and raw query of a request target."""
    authority = ""
    if target == "*" and method == "OPTIONS":
        return "", "*", ""
    absolute = re.match(r"https?://([^/?]+)(?=[/?]|$)", target, re.IGNORECASE) if target[:1] != "/" else None
    if absolute:
        authority, target = absolute[1], target[absolute.end() :] or "/"
        if not _AUTHORITY.fullmatch(authority):
            raise Error("the URL's host is malformed")
    if not target.startswith("/") or "#" in target:
        raise Error("the URL must be a path that begins with '/'")
    path, _, query = target.partition("?")
    path = _unquote(path)
    if _CONTROL_CHARACTER.search(path):
        raise Error("the URL's path holds a control character")
    return authority, path, query


def _parse_head(head: bytes) -> Request:
    """Read a head, empty line included. Raises Error: nothing that is unclear is guessed at."""
    first, *lines = head.split(b"\r\n")[:-2]
    match = _REQUEST_LINE.fullmatch(first)
    if not match:
        raise Error("the request line must be METHOD, URL and HTTP/1.1, with one space between")
    method, target, major, minor = (part.decode("ascii") for part in match.groups())
    if major != "1":
        raise Error("this server speaks HTTP/1.1", 505)
    headers = _parse_headers(lines)
    authority, path, query = _parse_target(method, target)
    host = headers.get("host")
    if host is None or not _AUTHORITY.fullmatch(host):
        raise Error("the request needs one Host header that names a host")
    if minor == "0" and "transfer-encoding" in headers:
        raise Error("HTTP/1.0 has no transfer encodings")
    return Request(method, path, query, authority or host, headers, is_http_1_0=minor == "0")


class _Chunks:
    """A chunked body taken apart (RFC 9112 section 7.1): what has come in, the body out. Extensions and trailers are
    read over."""

    def __init__(self) -> None:
        self.is_over = False
        self._left: Optional[int] = None  # of the chunk's data and its line end; None where a chunk begins
        self._is_in_trailers = False
        self._trailer_bytes = 0

    def take(self, inbox: bytearray) -> bytes:
        """Take what can be taken off the front of the inbox; the part of the body in it. Raises Error."""
        body = bytearray()
        while not self.is_over and (self._take_line(inbox) if self._left is None else self._take_data(inbox, body)):
            pass
        return bytes(body)

    def _take_data(self, inbox: bytearray, body: bytearray) -> bool:
        assert self._left is not None
        if self._left > 2:
            data = inbox[: self._left - 2]
            body += data
            self._left -= len(data)
            del inbox[: len(data)]
        if self._left > 2 or len(inbox) < 2:
            return False
        if inbox[:2] != b"\r\n":
            raise Error("a chunk of the body is not as long as it says")
        del inbox[:2]
        self._left = None
        return True

    def _take_line(self, inbox: bytearray) -> bool:
        end = inbox.find(b"\n", 0, _CHUNK_LINE_BYTES)
        if end < 0:
            if len(inbox) >= _CHUNK_LINE_BYTES:
                raise Error(f"a line between the chunks of the body is longer than {_CHUNK_LINE_BYTES} bytes")
            return False
        line = bytes(inbox[: end + 1])
        del inbox[: end + 1]
        if self._is_in_trailers:
            self._trailer_bytes += len(line)
            is_sound = line == b"\r\n" or (line[-2:] == b"\r\n" and _HEADER_LINE.fullmatch(line[:-2]))
            if not is_sound or self._trailer_bytes > _TRAILER_BYTES:
                raise Error(f"what follows the body must be header lines, and {_TRAILER_BYTES} bytes at most")
            self.is_over = line == b"\r\n"
            return True
        match = re.fullmatch(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t -~\x80-\xff]*)?\r\n", line)
        if not match:
            raise Error("a chunk of the body must begin with its size in hexadecimal digits")
        size = int(match[1], 16)
        self._is_in_trailers = size == 0
        self._left = size + 2 if size else None
        return True


def _parse_query(query: str) -> Iterator[tuple[str, str]]:
    """The fields of a query or a form (application/x-www-form-urlencoded), blank ones included."""
    for field in query.split("&"):
        if field:
            key, _, value = field.replace("+", " ").partition("=")
            yield _unquote(key), _unquote(value)


def _printable(text: bytes) -> str:
    """A client's bytes for a log line: nothing in them can end the line, close the quotes or drive a terminal."""
    return _UNPRINTABLE.sub(lambda match: b"\\x%02x" % match[0][0], text[:1000]).decode("ascii")


# ---------------------------------------------------------------------------------------------
# formats: how output is written for a client. Pure: (stream, bytes) to bytes, and at the end an outcome to bytes

# A read starts at a page or few, so that an idle stream costs nothing, and grows with the flow: fewer wake-ups of
# either side for each byte. By tests/bench.py half of its end is 8 to 9 % slower, and twice that 6 to 9 % faster; but
# a stalled client would hold twice as much, and 16 pipes of that size are a user's whole share (pipe(7)).
_BLOCK_MIN_BYTES = 16 * 1024
_BLOCK_MAX_BYTES = 512 * 1024
# A line of a tagged format is held until it is whole, or for so long with nothing following, as behind a prompt.
_PARTIAL_SECONDS = 0.25
# Proxies drop connections that are silent for a minute or less; EventSource's standard suggests 15 s.
_SSE_COMMENT_SECONDS = 15.0
# A line that does not end, and an escape sequence that does not, are held no further than this.
_LINE_CHARACTERS = 64 * 1024
_ESCAPE_CHARACTERS = 1024
# Lines of a page in one block: what a line does to those beside it, a browser need not look for any further.
_BLOCK_LINES = 200


# Why a run may be ended by the server; or for its own doing: "timeout after ...", "output limit of ...".
_CLIENT_GONE = "client gone"
_CLIENT_STALLED = "client stalled"
_SHUTTING_DOWN = "the server is shutting down"
_FORKED = "it is another process's"
_OVERTAKEN = "what was asked for is no longer kept"
_UNWATCHED = "nobody watches it any more"
_ASKED = "on request"
_KINDS = {
    _CLIENT_GONE: "client_gone",
    _CLIENT_STALLED: "client_stalled",
    _SHUTTING_DOWN: "shutdown",
    "timeout": "timeout",
    "output limit": "output_limit",
}


_Piece = Union[bytes, memoryview]  # of output; a view is good until the next read


class Outcome(NamedTuple):
    """How a run ended: `reason` is why the server ended it, and empty when it ended by itself."""

    exit_code: int
    reason: str
    seconds: float
    signal: Optional[int] = None
    is_known: bool = True  # not where only a part of what it has put out was asked for

    @property
    def kind(self) -> str:
        """The end, as one of few words: ok, failed, or why the server ended the run."""
        if not self.reason:
            return "failed" if self.exit_code else "ok"
        return next((kind for said, kind in _KINDS.items() if self.reason.startswith(said)), "stopped")

    @property
    def note(self) -> str:
        """The end, as a line for people."""
        if not self.is_known:
            return "[not the end]"
        said = f"stopped: {self.reason}" if self.reason else f"exit {self.exit_code}"
        return f"[{said}, {self.seconds:.1f} s]"


class Options(NamedTuple):
    """What a request says about how it wants its output. `notes`: when a last line follows (never, cut, always)."""

    format: str = "text"
    notes: str = "cut"
    timestamps: bool = False
    hostname: str = ""  # to say where a line is from
    heartbeat_seconds: float = math.inf
    offset: int = 0  # in the output, of the first byte that is fed
    title: str = ""


_PLAIN = Options()


def _skipped(count: int) -> str:
    return f"[{count} bytes are no longer kept]"


def _timestamp(moment: float) -> str:
    """A time (time.time()) as RFC 3339 has it, with milliseconds and zone."""
    return datetime.datetime.fromtimestamp(moment).astimezone().isoformat(timespec="milliseconds")


class Format:
    """Output as it is; the other formats build on it.

    A format is fed what comes. When the moment `due` has passed (time.monotonic()), `pause` has something to say.
    """

    block_bytes = _BLOCK_MAX_BYTES  # how much it takes at a time: less, where it writes much more than it is fed
    can_skip = False  # whether it can say that something is left out

    def __init__(
        self,
        options: Options = _PLAIN,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._clock = clock
        self._timer = timer
        self._heard = self._said = timer()  # when the run has put something out, and when we have written, at last

    @property
    def due(self) -> float:
        """The moment from which `pause` is to be called, unless something is fed before."""
        return self._said + self._options.heartbeat_seconds

    def start(self) -> bytes:
        """What stands before the output."""
        return b""

    def feed(self, stream: str, data: _Piece) -> _Piece:
        """Output of the run, as the client gets it."""
        self._heard = self._said = self._timer()
        return data

    def skip(self, count: int) -> bytes:
        """What is said of so many bytes of output that are left out here."""
        return b""

    def pause(self) -> bytes:
        """What is said of a silence."""
        self._said = self._timer()
        return b""

    def end(self, outcome: Outcome) -> bytes:
        """What follows the output."""
        return b""

    def _stamp(self) -> str:
        return _timestamp(self._clock())

    def _still_running(self) -> str:
        self._said = self._timer()
        return f"[still running, silent for {self._said - self._heard:.1f} s]"


class Text(Format):
    """Output as it is, for curl and for a browser tab, with notes and timestamps if they are asked for."""

    can_skip = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._at_line_start = True
        self._has_prefix = self._options.timestamps or bool(self._options.hostname)
        if self._has_prefix:
            self.block_bytes = _BLOCK_MIN_BYTES

    def feed(self, stream: str, data: _Piece) -> _Piece:
        super().feed(stream, data)
        starts_line, self._at_line_start = self._at_line_start, data[-1:] == b"\n"
        if not self._has_prefix:
            return data
        data = bytes(data)
        words = (self._options.timestamps and self._stamp(), self._options.hostname)
        prefix = "".join(f"{word} " for word in words if word).encode()
        body = data[:-1] if self._at_line_start else data
        return (prefix if starts_line else b"") + body.replace(b"\n", b"\n" + prefix) + data[len(body) :]

    def skip(self, count: int) -> bytes:
        return self._note(_skipped(count)) if self._options.notes != "never" else b""

    def pause(self) -> bytes:
        return self._note(self._still_running())

    def end(self, outcome: Outcome) -> bytes:
        is_wanted = self._options.notes == "always" or (self._options.notes == "cut" and outcome.reason)
        return self._note(outcome.note) if is_wanted else b""

    def _note(self, note: str) -> bytes:
        line_end = "" if self._at_line_start else "\n"
        self._at_line_start = True
        return f"{line_end}{note}\n".encode()


class _Lane:
    """What is kept of one stream between two pieces of it: a character, a line or an escape sequence may be split."""

    def __init__(self, errors: str) -> None:
        self.decode = codecs.getincrementaldecoder("utf-8")(errors).decode
        self.held = ""
        self.held_since = math.inf
        self.is_in_line = False
        self.style: dict[str, str] = {}
        self.css = ""


class _Lanes(dict[str, _Lane]):
    """The lanes of a run, by stream. What is not UTF-8 is decoded as `errors` says."""

    def __init__(self, errors: str) -> None:
        self._errors = errors

    def __missing__(self, stream: str) -> _Lane:
        return self.setdefault(stream, _Lane(self._errors))


class _Lines(Format):
    """Whole lines, each with its stream: for programs. Subclasses write them.

    A line that is not finished goes out, marked where the format can, after a quarter of a second in which its stream
    is silent; what follows of it is a line again. Bytes that are not UTF-8 become lone surrogates (PEP 383) on the way.
    """

    block_bytes = _BLOCK_MIN_BYTES
    can_skip = True
    comment_seconds = math.inf

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lanes = _Lanes("surrogateescape")

    @property
    def due(self) -> float:
        moments = [lane.held_since + _PARTIAL_SECONDS for lane in self._lanes.values()]
        return min([*moments, self._said + self.comment_seconds])

    def feed(self, stream: str, data: _Piece) -> bytes:
        super().feed(stream, data)
        lane = self._lanes[stream]
        *lines, lane.held = (lane.held + lane.decode(data)).split("\n")
        lane.held_since = self._heard if lane.held else math.inf
        written = self._write(stream, lines) if lines else ""
        return (written + (self._flush(stream) if len(lane.held) > _LINE_CHARACTERS else "")).encode()

    def pause(self) -> bytes:
        super().pause()
        late = [stream for stream, lane in self._lanes.items() if lane.held_since + _PARTIAL_SECONDS <= self._said]
        return "".join(map(self._flush, late)).encode()

    def end(self, outcome: Outcome) -> bytes:
        for lane in self._lanes.values():
            lane.held += lane.decode(b"", True)
        return ("".join(map(self._flush, self._lanes)) + (self._close(outcome) if outcome.is_known else "")).encode()

    def skip(self, count: int) -> bytes:
        for lane in self._lanes.values():
            lane.held += lane.decode(b"", True)
        return ("".join(map(self._flush, self._lanes)) + self._leave_out(count)).encode()

    def _leave_out(self, count: int) -> str:
        raise NotImplementedError

    def _flush(self, stream: str) -> str:
        """Write what is there of an unfinished line."""
        lane = self._lanes[stream]
        held, lane.held, lane.held_since = lane.held, "", math.inf
        return self._write(stream, [held], is_partial=True) if held else ""

    def _write(self, stream: str, lines: Sequence[str], is_partial: bool = False) -> str:
        raise NotImplementedError

    def _close(self, outcome: Outcome) -> str:
        raise NotImplementedError


class Ndjson(_Lines):
    """One JSON object a line: time, stream, line, and partial where it is unfinished; last the end."""

    def _write(self, stream: str, lines: Sequence[str], is_partial: bool = False) -> str:
        quote = json.encoder.encode_basestring_ascii
        host = f'"host": {quote(self._options.hostname)}, ' if self._options.hostname else ""
        head = f'{{"time": "{self._stamp()}", {host}"stream": "{stream}", "line": '
        tail = ', "partial": true}\n' if is_partial else "}\n"
        return head + f"{tail}{head}".join(map(quote, lines)) + tail

    def _leave_out(self, count: int) -> str:
        return json.dumps({"time": self._stamp(), "skipped_bytes": count}) + "\n"

    def _close(self, outcome: Outcome) -> str:
        end: dict[str, object] = {"time": self._stamp(), "exit_code": outcome.exit_code}
        if self._options.hostname:
            end["host"] = self._options.hostname
        if outcome.signal is not None:
            end["signal"] = outcome.signal
        return json.dumps({**end, "seconds": round(outcome.seconds, 3), "reason": outcome.reason or "exit"}) + "\n"


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


class Sse(_Lines):
    """Server-sent events (WHATWG HTML, section 9.2). An id is the number of bytes of output up to there."""

    comment_seconds = _SSE_COMMENT_SECONDS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._offset = self._options.offset

    def start(self) -> bytes:
        # With an id from the start every reconnect of an EventSource has a Last-Event-ID, and starts nothing.
        return b"id: %d\n\n" % self._offset

    def pause(self) -> bytes:
        return super().pause() or b": still running\n\n"

    def _write(self, stream: str, lines: Sequence[str], is_partial: bool = False) -> str:
        text = "\n".join(lines)
        lengths = map(len, lines) if text.isascii() else (len(_to_bytes(line)) for line in lines)
        ids = itertools.accumulate((length + (not is_partial) for length in lengths), initial=self._offset)
        next(ids)
        if "\r" in text:  # it would end the field (a line of data has none)
            lines = [line.strip("\r").replace("\r", "\ndata: ") for line in lines]
        if not text.isascii():
            lines = [_to_bytes(line).decode(errors="replace") for line in lines]
        event = "event: stderr\n" if stream == "stderr" else ""
        events = []
        for line, self._offset in zip(lines, ids):
            events.append(f"{event}id: {self._offset}\ndata: {line}\n\n")
        return "".join(events)

    def _leave_out(self, count: int) -> str:
        self._offset += count
        return f"event: skipped\nid: {self._offset}\ndata: {count}\n\n"

    def _close(self, outcome: Outcome) -> str:
        stopped = f"event: stopped\ndata: {outcome.reason}\n\n" if outcome.reason else ""
        return f"{stopped}event: exit\nid: {self._offset}\ndata: {outcome.exit_code}\n\n"


# What is special to a terminal: ends of a line other than \n, escape sequences (ECMA-48) in their two spellings, and
# the other control characters but tab. A sequence that never ends is cut short, and what remains of it is text.
_CSI = f"(?:\x1b\\[|\x9b)([0-?]{{0,{_ESCAPE_CHARACTERS}}})([ -/]{{0,8}})([@-~])"
_STRING_PART = f"(?:\x1b[PX\\]^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x90\x98\x9c-\x9f\n]{{0,{_ESCAPE_CHARACTERS}}}"
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_TERMINAL = re.compile(f"\r+\n?|{_CSI}|{_STRING_PART}(?:\x07|\x1b\\\\|\x9c)|\x1b[ -/]{{0,8}}[0-~]?|.")
_UNFINISHED = re.compile(
    f"(?:\r+|(?:\x1b\\[|\x9b)[0-?]{{0,{_ESCAPE_CHARACTERS}}}[ -/]{{0,8}}|\x1b[ -/]{{0,8}}|{_STRING_PART}\x1b?)\\Z"
)
_UNFINISHED_CHARACTERS = _ESCAPE_CHARACTERS + 16
_LEVELS = (0, 95, 135, 175, 215, 255)  # of xterm's colour cube
_ATTRIBUTES = {
    1: ("bold", "font-weight:bold"),
    2: ("dim", "opacity:.7"),
    3: ("italic", "font-style:italic"),
    4: ("underline", "underline"),
    7: ("inverse", "inverse"),
    9: ("strike", "line-through"),
    39: ("color", ""),
    49: ("background", ""),
}
for _name, _first, _bright in (("color", 30, 0), ("background", 40, 0), ("color", 90, 8), ("background", 100, 8)):
    _ATTRIBUTES.update({_first + n: (_name, str(_bright + n)) for n in range(8)})
_ATTRIBUTES_OFF = {22: ("bold", "dim"), 23: ("italic",), 24: ("underline",), 27: ("inverse",), 29: ("strike",)}
# A terminal's sixteen colours, for text on one of them: the page's own are made to be read on the page.
_CLASSIC = (
    *("#000000", "#a40000", "#006b00", "#7a5c00", "#0037a6", "#75006b", "#006b75", "#d3d7cf"),
    *("#555753", "#cc0000", "#2e8b00", "#ffe14d", "#2a6fd6", "#ad4fa8", "#00a5a5", "#ffffff"),
)


def _take_colour(codes: Optional[list[int]], groups: list[list[int]]) -> str:
    """An extended colour: 5 and an index of 256, or 2 and red, green, blue; by default from the front of the groups."""
    if codes is None:
        kind = groups.pop(0)[0] if groups else 0
        codes = [kind, *(group[0] for group in groups[: {2: 3, 5: 1}.get(kind, len(groups))])]
        del groups[: len(codes) - 1]
    if codes[0] == 2 and len(codes) == 4:
        return "#" + bytes(min(level, 255) for level in codes[1:]).hex()
    if codes[0] != 5 or len(codes) != 2 or codes[1] > 255:
        return ""
    index = codes[1]
    if index < 16:
        return str(index)
    if index < 232:
        return "#" + bytes(_LEVELS[(index - 16) // step % 6] for step in (36, 6, 1)).hex()
    return "#" + bytes([8 + 10 * (index - 232)] * 3).hex()


def _set_style(style: dict[str, str], parameters: str) -> None:
    """Act on the parameters of a Select Graphic Rendition sequence (ECMA-48 section 8.3.117; colours by ISO 8613-6)."""
    if not re.fullmatch(r"[0-9;:]*", parameters):  # xterm's own sequences, which only look like one
        return
    groups = [[int(code[:5] or 0) for code in group.split(":")] for group in parameters.split(";")]
    while groups:
        code, *more = groups.pop(0)
        if code == 0:
            style.clear()
        elif code in (38, 48, 58):
            colour = _take_colour(more[:1] + (more[-3:] if more[:1] == [2] else more[1:]) if more else None, groups)
            if code != 58:  # an underline's
                style["color" if code == 38 else "background"] = colour
        elif code == 4 and more == [0]:
            style.pop("underline", None)
        elif code in _ATTRIBUTES:
            name, value = _ATTRIBUTES[code]
            style[name] = value
        for name in _ATTRIBUTES_OFF.get(code, ()):
            style.pop(name, None)


def _classic(colour: str) -> str:
    return _CLASSIC[int(colour)] if colour.isdigit() else colour


def _css(style: Mapping[str, str]) -> str:
    """A style as the value of a style attribute."""
    colour, background = style.get("color", ""), style.get("background", "")
    if background:
        colour, background = _classic(colour), _classic(background)
        red, green, blue = bytes.fromhex(background[1:])
        colour = colour or ("#000000" if 2 * red + 5 * green + blue > 1000 else "#ffffff")
    colour, background = (f"var(--c{given})" if given.isdigit() else given for given in (colour, background))
    if "inverse" in style:
        colour, background = background or "var(--page)", colour or "var(--text)"
    lines = " ".join(style[name] for name in ("underline", "strike") if name in style)
    rules = [colour and f"color:{colour}", background and f"background:{background}"]
    rules += [style.get(name, "") for name in ("bold", "dim", "italic")]
    return ";".join(filter(None, [*rules, lines and f"text-decoration:{lines}"]))


def _fill(template: str, parts: Mapping[str, str]) -> str:
    """Replace words of a template, all at once, so that no part is looked into for the others."""
    return re.sub("|".join(map(re.escape, parts)), lambda match: parts[match[0]], template)


# Colours of a terminal, dark enough on light and light enough on dark.
_COLOURS = """
:root { color-scheme: light dark; --page: #fff; --text: #1a1a1a; --soft: #666; --line: #d8d8d8; --accent: #0b57d0;
  --c0: #000; --c1: #b3261e; --c2: #146c2e; --c3: #7a5900; --c4: #0b57d0; --c5: #8430ce; --c6: #00687a; --c7: #767676;
  --c8: #555; --c9: #dc362e; --c10: #198639; --c11: #946f00; --c12: #1b6ef3; --c13: #a142f4; --c14: #00818f;
  --c15: #999 }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --text: #e3e3e3; --soft: #9a9a9a; --line: #3a3d43;
  --accent: #a8c7fa;
  --c0: #6b6b6b; --c1: #f2857d; --c2: #6dd58c; --c3: #e0b94f; --c4: #7cacf8; --c5: #d1a3ff; --c6: #4fd8eb;
  --c7: #c7c7c7; --c8: #8f8f8f; --c9: #ffb4ab; --c10: #98f0af; --c11: #ffd97a; --c12: #b3cdff; --c13: #e6c8ff;
  --c14: #9aefff; --c15: #fff } }
"""
# The view is a reversed column: its scroll position counts from the end, so it follows what comes, until the reader
# scrolls up. On the body itself the upper part could not be scrolled to.
_VIEW_STYLE = """
body { margin: 0; height: 100vh; height: 100dvh; display: flex; flex-direction: column; background: var(--page);
  color: var(--text); font: .85rem/1.4 ui-monospace, monospace }
header { padding: .4rem 1ch; border-bottom: 1px solid var(--line); color: var(--soft) }
h1 { font-size: 1em; margin: 0; color: var(--text); white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
header p { margin: 0; font-family: system-ui, sans-serif; font-size: .8rem }
@media (max-height: 30rem) { header p { display: none } }
main { flex: 1; min-height: 0; overflow: auto; display: flex; flex-direction: column-reverse }
main > div { margin-bottom: auto; padding: .3rem 0; counter-reset: line }
samp { display: block; font: inherit; padding: 0 1ch 0 8ch; text-indent: -8ch; white-space: pre-wrap;
  overflow-wrap: anywhere; min-height: 1.4em; tab-size: 8 }
samp::before { counter-increment: line; content: counter(line); display: inline-block; width: 6ch; text-indent: 0;
  margin-right: 2ch; text-align: right; color: var(--soft); user-select: none }
samp.n::before { counter-increment: none; content: "" }
samp.n { color: var(--soft) }
samp.e { color: var(--c1) }
samp:has(+ .r), samp.z { display: none }
time, b { color: var(--soft) }
"""
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>STYLE</style></head>
<body><header><h1 title="TITLE">TITLE</h1>
<p>Each line is shown as it comes, standard error in its own colour. The view follows the newest line; scroll up and
it stays where you are, scroll to the end and it follows again. Leaving this page, or pressing Stop in the browser,
ends the command.</p></header>
<main tabindex="0" aria-label="Output"><div><div>
"""


class Html(Format):
    """A page for people: colours, numbered lines, a view that follows the newest one.

    What it writes depends on what it was fed and not on how that was cut into pieces. A line is a <samp>. One that a
    carriage return begins anew is hidden by the rule `samp:has(+ .r)`, so that a progress bar shows its latest state.
    The end of a line stands inside its element, where it is copied with it.
    """

    block_bytes = _BLOCK_MIN_BYTES
    can_skip = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lanes = _Lanes("replace")
        self._lines = 0  # in this block
        self._open = ""  # the stream whose line is open
        self._css = ""  # the style of the <span> that is open in it
        self._is_returned = False  # a carriage return has come in it, and nothing to show after that

    def start(self) -> bytes:
        parts = {"TITLE": html.escape(self._options.title), "STYLE": _COLOURS + _VIEW_STYLE}
        return _fill(_PAGE, parts).encode()

    def feed(self, stream: str, data: _Piece) -> bytes:
        super().feed(stream, data)
        lane = self._lanes[stream]
        text = lane.held + lane.decode(data)
        unfinished = _UNFINISHED.search(text, max(0, len(text) - _UNFINISHED_CHARACTERS))
        lane.held = unfinished[0] if unfinished else ""
        return self._advance(stream, text[: len(text) - len(lane.held)])

    def skip(self, count: int) -> bytes:
        return self._note("n", _skipped(count))

    def pause(self) -> bytes:
        return self._note("n", self._still_running())

    def end(self, outcome: Outcome) -> bytes:
        rest = [self._advance(stream, lane.held + lane.decode(b"", True)) for stream, lane in self._lanes.items()]
        note = self._note("n", outcome.note) if self._options.notes != "never" else self._close_line().encode()
        return b"".join(rest) + note + b"</div></div></main></body></html>\n"

    def _note(self, classes: str, note: str) -> bytes:
        return f'{self._close_line()}<samp class="{classes}">{html.escape(note)}\n</samp>'.encode()

    def _advance(self, stream: str, text: str) -> bytes:
        """Write text with what is meant for a terminal in it."""
        out: list[str] = []
        at = 0
        control = _CONTROL.search(text)
        while control:
            self._add(out, stream, text[at : control.start()])
            match = _TERMINAL.match(text, control.start())
            assert match  # it takes any character
            if match[0][0] == "\r":
                self._is_returned = self._open == stream
                if match[0][-1] == "\n":
                    self._add(out, stream, "\n")
            elif match[3] == "m" and not match[2]:
                lane = self._lanes[stream]
                _set_style(lane.style, match[1])
                lane.css = _css(lane.style)
            at = match.end()
            control = _CONTROL.search(text, at)
        self._add(out, stream, text[at:])
        return "".join(out).encode()

    def _add(self, out: list[str], stream: str, text: str) -> None:
        """Write text without anything special in it but ends of lines."""
        if not text:
            return
        lane = self._lanes[stream]
        first, *lines = html.escape(text, quote=False).split("\n")
        self._add_piece(out, stream, first)
        if not lines:
            return
        # A line that another stream has broken off is closed already, and its end is nothing to show.
        if self._open != stream and not lane.is_in_line:
            out.append(self._open_line(stream))
        if self._open == stream:
            out.append(self._close_line())
        lane.is_in_line = False
        *lines, last = lines
        if lines:
            self._add_lines(out, stream, lines)
        self._add_piece(out, stream, last)

    def _add_lines(self, out: list[str], stream: str, lines: Sequence[str]) -> None:
        """Write whole lines, a block at a time."""
        at = 0
        while at < len(lines):
            first = self._open_line(stream)
            after = "</span>" if self._css else ""
            block = lines[at : at + _BLOCK_LINES - self._lines + 1]
            self._lines += len(block) - 1
            out.append(first + f"\n{after}</samp>{self._line_tag(stream)}".join(block) + self._close_line())
            at += len(block)

    def _add_piece(self, out: list[str], stream: str, text: str) -> None:
        """Write a part of a line; open the line, or begin it anew, if that is due."""
        if not text:
            return
        lane = self._lanes[stream]
        if self._open != stream or self._is_returned:
            out.append(self._open_line(stream))
        lane.is_in_line = True
        if lane.css != self._css:
            out.append(("</span>" if self._css else "") + self._span(stream))
        out.append(text)

    def _open_line(self, stream: str) -> str:
        """Close what is open, and open a line; after a carriage return in the same stream, one in its place."""
        is_returned = self._is_returned and self._open == stream
        before = self._close_line()
        self._open = stream
        if self._lines == _BLOCK_LINES:
            # The last line of a block that is begun anew in the next one is hidden by a line that is never seen.
            before += ('<samp class="r z"></samp>' if is_returned else "") + "</div><div>"
            self._lines, is_returned = 0, False
        self._lines += 1
        return before + self._line_tag(stream, "r" if is_returned else "")

    def _line_tag(self, stream: str, returned: str = "") -> str:
        classes = " ".join(filter(None, ["e" if stream == "stderr" else "", returned]))
        stamp = f"<time>{self._stamp()}</time> " if self._options.timestamps else ""
        if self._options.hostname:
            stamp += f"<b>{html.escape(self._options.hostname)}</b> "
        return (f'<samp class="{classes}">' if classes else "<samp>") + stamp + self._span(stream)

    def _span(self, stream: str) -> str:
        self._css = self._lanes[stream].css
        return f'<span style="{self._css}">' if self._css else ""

    def _close_line(self) -> str:
        """Close the line that is open, and forget a carriage return at its end."""
        closed = ("\n" if self._open else "") + ("</span>" if self._css else "") + ("</samp>" if self._open else "")
        self._open = self._css = ""
        self._is_returned = False
        return closed


_FORMATS: Mapping[str, tuple[type[Format], str]] = {
    "text": (Text, _PLAIN_TEXT),
    "html": (Html, "text/html; charset=utf-8"),
    "sse": (Sse, "text/event-stream"),
    "ndjson": (Ndjson, "application/x-ndjson"),
}


# ---------------------------------------------------------------------------------------------
# runs: a process group or a task's thread, its pipes, and the one place that ends both

_SET_PIPE_SIZE = getattr(fcntl, "F_SETPIPE_SZ", 1031 if sys.platform == "linux" else None)


# How long a process may take to be gone after SIGKILL (it can be stuck in the kernel, on a dead network disk)
# before its run is given up, and how often a group whose leader has gone is looked at: nothing tells of that by event.
_ABANDON_SECONDS = 2.0
_GROUP_CHECK_SECONDS = 0.05
_GROUP_CHECK_MAX_SECONDS = 0.4
_HANG_UP_SECONDS = 0.3  # for who cleans up on SIGTERM, before the terminal hangs up
_REMIND_SECONDS = 0.25


_POLL_MAX_MILLISECONDS = 2**31 - 1  # a C int: callers look at the clock again


_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM})


def _poll(watched: Mapping[int, int], deadline: float = math.inf) -> dict[int, int]:
    """Wait until a descriptor is ready or time.monotonic() passes the deadline (poll(2): descriptor to events)."""
    poller = select.poll()
    for descriptor, events in watched.items():
        poller.register(descriptor, events)
    if deadline == math.inf:
        return dict(poller.poll())
    milliseconds = (deadline - time.monotonic()) * 1000
    return dict(poller.poll(max(0, math.ceil(min(milliseconds, _POLL_MAX_MILLISECONDS)))))


def _shortage(error: OSError) -> Error:
    return Error(f"the machine is short of resources ({error.strerror}): try again later", 503, {"Retry-After": "1"})


def _busy(what: str) -> Error:
    return Error(f"{what}: try again when one has ended", 503, {"Retry-After": "1"})


def _start_error(launch: Launch, error: Exception) -> Error:
    if isinstance(error, OSError) and error.errno in _SHORTAGES:
        return _shortage(error)
    where = f" in {launch.cwd!r}" if launch.cwd is not None else ""
    why = error.strerror if isinstance(error, OSError) else error  # a ValueError: the locale cannot encode a value
    if isinstance(error, OSError) and error.errno == errno.ENOEXEC:
        why = f"{why} (a script needs a #! line)"
    return Error(f"cannot start {launch.argv[0]!r}{where}: {why}", 500)


# A process that is to have a terminal must take it for its own (TIOCSCTTY, ioctl_tty(2)) when it leads its session and
# is not the program yet. That is no work for a preexec_fn, which can hang where there are threads.
_TAKE_TERMINAL = """
import fcntl, os, signal, sys, termios
status = int(sys.argv[1])
os.set_inheritable(status, False)
os.environ.pop("LC_CTYPE", None)
if sys.argv[2]:
    os.environ["LC_CTYPE"] = sys.argv[2]
for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores them, and that is inherited
    signal.signal(getattr(signal, name), signal.SIG_DFL)
try:
    fcntl.ioctl(1, termios.TIOCSCTTY, 0)
    os.execvp(sys.argv[3], sys.argv[3:])
except OSError as error:
    os.write(status, b"%d" % error.errno)
    os._exit(127)
"""
_EXEC_SECONDS = 10.0


def _open_terminal(size: tuple[int, int], has_echo: bool) -> tuple[int, int]:
    """A new terminal (pty(7)): the descriptors of our end and of the command's."""
    ours, theirs = os.openpty()
    try:
        columns, lines = size
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        if not has_echo:
            modes = termios.tcgetattr(theirs)
            modes[1] &= ~termios.OPOST  # of output: the ends of lines are left alone
            modes[3] &= ~(termios.ECHO | termios.ECHONL)
            termios.tcsetattr(theirs, termios.TCSANOW, modes)
    except BaseException:
        os.close(ours)
        os.close(theirs)
        raise
    return ours, theirs


def _start_on_terminal(launch: Launch, options: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    """Start a program whose session has a terminal. Raises OSError if it cannot be started."""
    status, told = os.pipe()
    with open(status, "rb", buffering=0) as reader:
        with open(told, "wb", buffering=0):
            # The start is Python, which may set LC_CTYPE where a program would not find it (PEP 538).
            own = [str(told), launch.env.get("LC_CTYPE", "")]
            argv = [sys.executable or "python3", "-I", "-S", "-c", _TAKE_TERMINAL, *own, *launch.argv]
            process = subprocess.Popen(argv, pass_fds=[told], **options)
        try:
            # What it inherits of that pipe is closed once it is the program.
            said = reader.read(16) if _poll({status: select.POLLIN}, time.monotonic() + _EXEC_SECONDS) else b""
            if said:
                raise OSError(int(said), os.strerror(int(said)))
        except BaseException:
            process.kill()
            process.wait()
            raise
    return process


class _Ends(NamedTuple):
    """Our ends of a process's pipes, or its terminal."""

    outputs: dict[int, str]  # streams, by the descriptors to read them from
    stdin: Optional[int]


def _spawn(launch: Launch, terminal_size: tuple[int, int]) -> tuple[subprocess.Popen[bytes], _Ends]:
    """Start a process in a session of its own.

    Raises Error: 500 if it cannot be started, 503 if it cannot be for now.
    """
    outputs: dict[int, str] = {}
    stdin = None
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        try:
            writers = []
            for stream in ("stdout", "stderr") if launch.stderr == "separate" else ("stdout",):
                is_terminal = launch.pty and stream == "stdout"
                reader, writer = _open_terminal(terminal_size, launch.pty == "echo") if is_terminal else os.pipe()
                ours.callback(os.close, reader)
                theirs.callback(os.close, writer)
                os.set_blocking(reader, False)
                outputs[reader] = stream
                writers.append(writer)
            options: dict[str, Any] = {
                "stdin": subprocess.DEVNULL,
                "stdout": writers[0],
                "stderr": subprocess.DEVNULL if launch.stderr == "discard" else writers[-1],
                "cwd": launch.cwd,
                "env": launch.env,
                "start_new_session": True,
            }
            if launch.has_input:
                options["stdin"], stdin = (writers[0], os.dup(next(iter(outputs)))) if launch.pty else os.pipe()
                ours.callback(os.close, stdin)
                if not launch.pty:
                    theirs.callback(os.close, options["stdin"])
            if launch.pty:
                columns, lines = map(str, terminal_size)
                options["env"] = {**launch.env, "COLUMNS": columns, "LINES": lines}
                process = _start_on_terminal(launch, options)
            else:
                process = subprocess.Popen(launch.argv, **options)
        except (OSError, ValueError) as error:
            raise _start_error(launch, error) from None
        ours.pop_all()
    return process, _Ends(outputs, stdin)


def _watch_exit_by_kqueue(pid: int) -> int:  # pragma: no cover (not on Linux)
    with contextlib.closing(select.kqueue()) as queue:  # type: ignore[attr-defined,unused-ignore]
        event = select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)  # type: ignore[attr-defined,unused-ignore]
        try:
            queue.control([event], 0, 0)
        except ProcessLookupError:  # it has exited already
            return os.open(os.devnull, os.O_RDONLY)
        return os.dup(queue.fileno())


def _watch_exit_by_thread(pid: int) -> int:
    reader, writer = os.pipe()

    def wait() -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        os.close(writer)

    try:
        threading.Thread(target=wait, name=f"streamlog-exit-{pid}", daemon=True).start()
    except RuntimeError:
        os.close(reader)
        os.close(writer)
        raise OSError(errno.EAGAIN, "cannot start a thread") from None
    return reader


def _watch_exit(pid: int) -> int:
    """A descriptor that turns readable when a child exits, and leaves the child to be reaped."""
    if hasattr(select, "kqueue"):  # macOS and the BSDs, kqueue(2): a queue can itself be polled
        return _watch_exit_by_kqueue(pid)
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError) as error:  # pidfd_open(2) is of Linux 5.3, and may be filtered in a container
        if isinstance(error, OSError) and error.errno in _SHORTAGES:
            raise
        return _watch_exit_by_thread(pid)


_Release = Callable[[], None]


def _count_bytes(descriptor: int, queue: int) -> int:
    """How much is in a descriptor's queue, which is termios.FIONREAD or TIOCOUTQ."""
    return int(struct.unpack("i", fcntl.ioctl(descriptor, queue, b"\0" * 4))[0])


def _living_group(pid: int) -> tuple[int, int]:
    """The group and session of a process; of one that has gone, or is a zombie without a thread that lives, (0, 0).

    By proc_pid_stat(5).
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    state, group, session, threads = fields[0], int(fields[2]), int(fields[3]), int(fields[17])
    return (0, 0) if state in (b"Z", b"X") and threads <= 1 else (group, session)


_HAS_PROC = os.path.exists("/proc/self/stat")


class _Processes:
    """Which process groups have members that live: one look at /proc serves all the runs that end at a time.

    An orphan's zombie is its group's until process 1 reaps it, which takes seconds in some containers, or for ever.
    What cannot be read is taken for living; without a /proc, as on macOS, kill(2) does not count zombies anyway.
    """

    def __init__(self) -> None:
        # guards the rest, and lets one thread look while the others wait for what it sees
        self._lock = threading.Lock()
        self._looked_at = -math.inf
        self._groups: Optional[Mapping[int, int]] = None

    def groups(self, session: int, since: float) -> Optional[set[int]]:
        """The groups of a session that have members, by a look that is fresh, and not from before a moment.

        None where that is not to be known.
        """
        with self._lock:
            now = time.monotonic()
            if self._looked_at < max(since, now - _GROUP_CHECK_SECONDS):
                self._looked_at, self._groups = now, self._look()
            groups = self._groups
        return None if groups is None else {group for group, found in groups.items() if session in (group, found)}

    @staticmethod
    def _look() -> Optional[Mapping[int, int]]:
        try:
            pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
            groups = dict(map(_living_group, pids))
        except OSError:
            return None
        return groups if pids else None


_processes = _Processes()


class _Stdin:
    """Our end of a command's standard input, which never blocks. One who stops writing in the middle lets go of it only
    when the command has ended, or that would take what it got for all of it."""

    def __init__(self, descriptor: int, on_end: Optional[Callable[[], None]]) -> None:
        self._descriptor = descriptor
        self._on_end = on_end  # of a terminal's
        self._is_in_line = False
        os.set_blocking(descriptor, False)

    def fileno(self) -> int:
        return self._descriptor

    def end_mark(self, last: bytes) -> bytes:
        """What tells the end behind the last piece: on a terminal VEOF, within a line twice (termios(3))."""
        is_in_line = not last.endswith(b"\n") if last else self._is_in_line
        return b"\x04\x04"[: 1 + is_in_line] if self._on_end else b""

    def write(self, data: memoryview) -> memoryview:
        """Write what goes; the rest is returned. Raises BrokenPipeError once nobody reads it."""
        try:
            count = os.write(self._descriptor, data)
        except BlockingIOError:
            return data
        except OSError as error:  # of a terminal EIO
            raise BrokenPipeError("the command takes no more input") from error
        self._is_in_line = data[count - 1] != 10
        return data[count:]

    def end(self) -> None:
        """Close it, all having been written."""
        if self._on_end and self._descriptor >= 0:
            self._on_end()
        self.close()

    def close(self) -> None:
        """Let go of it. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Run:
    """One execution of a command, from its start until all of it is gone: what processes and tasks have in common.

    The thread that starts a run owns it: it alone waits, reads and closes. Any thread may stop or kill it.
    """

    def __init__(self, settings: Settings, timeout: Optional[float], release: _Release) -> None:
        self.outputs: dict[int, str] = {}  # streams, by the descriptors to read them from
        self.stream = ""  # of what was read last
        self.skipped_bytes = 0  # of output that was not kept for long enough to be read, before that
        self._exit_watch: Optional[int] = None  # a descriptor that turns readable when the run has ended
        self._settings = settings
        self._timeout = timeout
        self._release: Optional[_Release] = release  # gives the slot back; None once it has been
        self._lock = threading.RLock()  # re-entrant: a signal handler may kill what its own thread is stopping
        self._owed: dict[int, float] = {}  # bytes of an output that are still to come, where that is known
        self._left_bytes: float = settings.max_output_bytes or math.inf  # of all output; below 0 what was too much
        self._block = _BLOCK_MIN_BYTES
        self._room = memoryview(b"")  # for blocks that are read as views
        self.started = time.monotonic()
        self.seconds = 0.0
        self.reason = ""
        self.exit_code: Optional[int] = None
        self._is_asked = self._is_drained = False
        self._due: dict[Callable[[], None], float] = {}  # what is to be done, by time.monotonic()
        if timeout:
            self._due[self._time_out] = self.started + timeout

    def _ask(self) -> None:
        """Ask it to end."""
        raise NotImplementedError

    def _force(self) -> None:
        """End it by force."""
        raise NotImplementedError

    def _reap(self) -> None:
        """Learn the exit code."""
        raise NotImplementedError

    @property
    def outcome(self) -> Outcome:
        """How a run that is over has ended."""
        return Outcome(self.exit_code or 0, self.reason, self.seconds)

    def take_input(self) -> Optional[_Stdin]:
        """Its standard input, where it has one; it is the caller's from now on."""
        return None

    @property
    def is_over(self) -> bool:
        """Whether it has ended and no output is left to read. Others of a process's group may still be ending."""
        return self.exit_code is not None and not self.outputs

    def wait(self, others: Mapping[int, int], is_paused: bool = False, deadline: float = math.inf) -> dict[int, int]:
        """Wait for output, for the end, for a moment when something is due, or for any other descriptor.

        Returns the descriptors that are ready; none when the deadline is over. A paused run is not watched for
        output: its pipe fills up, and then the command waits.
        """
        self._do_what_is_due()
        if self.is_over:
            return {}
        watched = dict(others)
        if not is_paused:
            watched.update(dict.fromkeys(self.outputs, select.POLLIN))
        if self._exit_watch is not None:
            watched[self._exit_watch] = select.POLLIN
        # No longer than the grace time: another thread may stop the run meanwhile, which does not wake this one.
        limit = time.monotonic() + max(_GROUP_CHECK_MAX_SECONDS, self._settings.grace_seconds)
        ready = _poll(watched, min(deadline, self._deadline, limit))
        if self._exit_watch is not None and ready.pop(self._exit_watch, 0):
            self._note_exit()
        return ready

    @property
    def _deadline(self) -> float:
        return min(self._due.values(), default=math.inf)

    def _do_what_is_due(self) -> None:
        for action, moment in list(self._due.items()):
            if time.monotonic() >= moment and self._due.pop(action, 0.0):
                action()
        if self._exit_watch is None and self.exit_code is None and (self._is_drained or not self.outputs):
            self._reap()
        if self.reason and self.exit_code is not None:  # it owes nothing more: its answer is cut anyway
            self._drop_outputs()

    def read(self, descriptor: int, limit: int = _BLOCK_MAX_BYTES) -> bytes:
        """The next block of an output that is ready. Empty at its end, or when there was nothing after all."""
        return bytes(self.view(descriptor, limit))

    def view(self, descriptor: int, limit: int = _BLOCK_MAX_BYTES) -> _Piece:
        """The same, good until the next read: memory that is used again is cheaper than what is new each time."""
        owed = self._owed.get(descriptor, math.inf)
        self.stream = self.outputs[descriptor]
        try:
            data = self._take(descriptor, int(min(self._block, owed, limit)))
        except BlockingIOError:
            return b""
        self._owed[descriptor] = owed - len(data)
        self._left_bytes -= len(data)
        if self._left_bytes < 0:  # told before the output may close, and the run be over
            self.stop(f"output limit of {self._settings.max_output_bytes} bytes")
        if not data or len(data) == owed:
            self._close_output(descriptor)
        elif len(data) == self._block < _BLOCK_MAX_BYTES:
            self._block *= 2
            self._widen(descriptor)
        elif len(data) < self._block // 4:
            self._block = max(_BLOCK_MIN_BYTES, self._block // 2)
            self._room = memoryview(b"")
        surplus = int(max(0, -self._left_bytes))
        return data[: max(0, len(data) - surplus)] if surplus else data

    def _widen(self, descriptor: int) -> None:
        if _SET_PIPE_SIZE is not None:
            with contextlib.suppress(OSError):  # the user's share of pipe memory may be spent
                # A pipe counts pages, which a writer of other sizes does not fill; and he goes on while we read.
                fcntl.fcntl(descriptor, _SET_PIPE_SIZE, min(2 * self._block, _BLOCK_MAX_BYTES))

    def _take(self, descriptor: int, size: int) -> _Piece:
        """Up to so many bytes of an output. Raises BlockingIOError where there is nothing yet."""
        try:
            if size <= _BLOCK_MIN_BYTES:
                return os.read(descriptor, size)
            if len(self._room) < size:
                self._room = memoryview(bytearray(self._block))
            return self._room[: os.readv(descriptor, [self._room[:size]])]
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal's, which nobody has open any more
                raise
            return b""

    def stop(self, reason: str) -> None:
        """Ask it to end, and force it after the grace time. The first reason is the one that counts."""
        with self._lock:
            if not self.reason and not self.is_over:
                self.reason = reason
                self._due.pop(self._time_out, None)
                self._terminate()

    def kill(self) -> None:
        """End it at once, where something of it is left."""
        if self._release is not None:
            self._due.pop(self.kill, None)
            self._due.setdefault(self._abandon, time.monotonic() + _ABANDON_SECONDS)
            self._force()

    def close(self) -> None:
        """Stop the run if it goes on, wait until all of it is gone, and free what it holds. May be called twice.

        Takes the grace time at most, and the time to give up. Output that still comes is dropped, but not cut
        off: a command that is cleaning up may print.
        """
        self.stop("closed")
        while self._release is not None:
            for descriptor in self.wait({}):
                self.read(descriptor)
            if self.is_over and self._release is not None:
                _poll({}, self._deadline)
        self._drop_outputs()

    def _time_out(self) -> None:
        self.stop(f"timeout after {self._timeout:g} s")

    def _terminate(self) -> None:
        if not self._is_asked:
            self._is_asked = True
            self._due[self.kill] = time.monotonic() + self._settings.grace_seconds
            self._ask()

    def _note_exit(self) -> None:
        """It has ended. What is in the pipes, or comes in the drain time, still belongs to the answer."""
        self._drop_exit_watch()
        self._due.pop(self._time_out, None)
        self._due[self._end_drain] = time.monotonic() + self._settings.drain_seconds

    def _end_drain(self) -> None:
        """Take what is in the pipes now for the rest: whoever else holds them open is not waited for."""
        self._is_drained = True
        for descriptor in list(self.outputs):
            self._owed[descriptor] = _count_bytes(descriptor, termios.FIONREAD)
            if not self._owed[descriptor]:
                self._close_output(descriptor)

    def _set_exit_code(self, code: int) -> None:
        self.seconds = time.monotonic() - self.started
        self.exit_code = code

    def _abandon(self) -> None:
        """Give up on what no force ends: a process stuck in the kernel, a task that does not look up."""
        _log.warning("%s does not end: given up", self)
        if self.exit_code is None:
            self._note_exit()
            self._set_exit_code(128 + signal.SIGKILL)
        if self.outputs:
            self.reason = self.reason or "it does not end"
            self._drop_outputs()
        self._finish()

    def _finish(self) -> None:
        self._due.clear()
        release, self._release = self._release, None
        if release is not None:
            release()

    def disown(self) -> None:
        """Close its descriptors, in a process that was forked off: what runs, and its slot, are the parent's."""
        self.reason, self._release = self.reason or _FORKED, None
        self._lock = threading.RLock()  # some other thread of the parent may have it
        self._drop_outputs()
        self._drop_exit_watch()

    def _drop_exit_watch(self) -> None:
        watch, self._exit_watch = self._exit_watch, None
        if watch is not None:
            os.close(watch)

    def _drop_outputs(self) -> None:
        for descriptor in list(self.outputs):
            self._close_output(descriptor)

    def _close_output(self, descriptor: int) -> None:
        del self.outputs[descriptor]  # first: a fork in between would find it closed
        os.close(descriptor)
        self._room = memoryview(b"")


class Process(Run):
    """A run that is a process group.

    The lock guards the group's number: no signal is sent while another thread reaps. That number is the leader's pid.
    The group is signalled before its leader is reaped, because until then nobody else can be given the number; and it
    stays taken for as long as anyone is left in the group (fork(3p)).
    """

    def __init__(self, launch: Launch, settings: Settings, timeout: Optional[float], release: _Release) -> None:
        super().__init__(settings, timeout, release)
        self._process, ends = _spawn(launch, settings.terminal_size)
        self.outputs, self._stdin = ends
        self._terminal = next(iter(self.outputs)) if launch.pty else None
        self._groups = {self._process.pid}  # of its session, where that has a terminal
        self._reaped_at = math.inf
        self._check_seconds = _GROUP_CHECK_SECONDS
        if settings.child_nofile and hasattr(resource, "prlimit"):
            with contextlib.suppress(OSError):  # it may have ended already
                resource.prlimit(self.pid, resource.RLIMIT_NOFILE, settings.child_nofile)
        try:
            self._exit_watch = _watch_exit(self.pid)
        except OSError as error:
            self._undo_start()
            raise _shortage(error) from None

    def take_input(self) -> Optional[_Stdin]:
        stdin, self._stdin = self._stdin, None
        if stdin is None:
            return None
        return _Stdin(stdin, self._watch_terminal if self._terminal is not None else None)

    def _watch_terminal(self) -> None:
        """Tell the end of the input again to a program that has made the terminal its own since: what was said of it
        before is lost then (termios(3), ICANON)."""
        if self._terminal in self.outputs:
            with contextlib.suppress(OSError, termios.error):
                if not termios.tcgetattr(self._terminal)[3] & termios.ICANON:
                    os.write(self._terminal, b"\x04")
            self._due[self._watch_terminal] = time.monotonic() + _REMIND_SECONDS

    def _finish(self) -> None:
        super()._finish()
        stdin, self._stdin = self._stdin, None
        if stdin is not None:
            os.close(stdin)

    def _undo_start(self) -> None:
        self._release = None
        self._signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ABANDON_SECONDS)
        self.close()

    @property
    def pid(self) -> int:
        """The number of the leader and of its group."""
        return self._process.pid

    def __str__(self) -> str:
        return f"process group {self.pid}"

    @property
    def outcome(self) -> Outcome:
        """How a run that is over has ended."""
        returncode = self._process.returncode
        return Outcome(self.exit_code or 0, self.reason, self.seconds, -returncode if (returncode or 0) < 0 else None)

    def _ask(self) -> None:
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)  # a process that is stopped acts on SIGTERM only once it goes on
        if self._terminal is not None:
            self._due[self._hang_up] = time.monotonic() + _HANG_UP_SECONDS

    def _hang_up(self) -> None:
        """End an interactive shell: it does when its terminal goes, and not by SIGTERM."""
        self._signal(signal.SIGHUP)

    def _force(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        """Signal the group, and on a terminal the others of the session: a shell makes one of each job."""
        with self._lock:
            if self._process.returncode is not None and self._is_number_reused():
                return
            if self._terminal is not None:  # or, where there is no looking now, those that were there before
                self._groups = {self.pid} | (_processes.groups(self.pid, time.monotonic()) or self._groups)
            for group in self._groups:
                # It may be empty, and may hold processes that are another user's (kill(2)).
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, number)

    def _is_number_reused(self) -> bool:
        """Whether a stranger has the reaped leader's number, which says that the group was empty before."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def _reap(self) -> None:
        """Learn the exit code; whoever is left of the group is asked to end first, while its number is safe."""
        with self._lock:
            self._terminate()
            code = self._process.wait()
            self._reaped_at = time.monotonic()
            self._set_exit_code(code if code >= 0 else 128 - code)
        self._check_group()

    def _check_group(self) -> None:
        if self._is_group_empty():
            self._finish()
        else:
            if self._abandon in self._due:  # it was to be killed: what has come, or come to light, since is too
                self._force()
            self._due[self._check_group] = time.monotonic() + self._check_seconds
            self._check_seconds = min(2 * self._check_seconds, _GROUP_CHECK_MAX_SECONDS)

    def _is_group_empty(self) -> bool:
        """Whether the group has gone; to be asked once its leader is reaped, who counts as long as he is not."""
        with self._lock, contextlib.suppress(ChildProcessError, PermissionError):
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                if self._terminal is None:
                    return True
                living = _processes.groups(self.pid, self._reaped_at)
                return not living if living is not None else not _HAS_PROC
            if self._is_number_reused():
                return True
        living = _processes.groups(self.pid, self._reaped_at)
        if living is None or (living if self._terminal is not None else self.pid in living):
            return False
        self._signal(signal.SIGKILL)  # for one that forked on while it was looked for; zombies do not mind
        with self._lock, contextlib.suppress(ChildProcessError):
            while os.waitpid(-self.pid, os.WNOHANG)[0]:  # orphans come to us where we are process 1: reap them
                pass
        return True


def _encode(value: object) -> bytes:
    """A piece of a task's output: text and bytes as they are, anything else as a line of JSON."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    return (value if isinstance(value, str) else json.dumps(value) + "\n").encode("utf-8", "surrogateescape")


class Task(Run):
    """A run that is a call of a function of this program, in a thread of its own.

    What it returns, yields and logs goes through a pipe, so that a client that does not read holds up its own task and
    nothing else. A thread cannot be ended by force: a task that never looks up keeps its slot until it does.
    """

    def __init__(self, call: Call, settings: Settings, timeout: Optional[float], release: _Release) -> None:
        super().__init__(settings, timeout, release)
        self.is_stopping = False
        self._is_forced = False
        self._result = 1
        self._has_ended = False
        self._late_release: Optional[_Release] = None
        self._write_lock = threading.Lock()  # guards the writer: others may log in the context that the task started
        descriptors: list[int] = []
        try:
            descriptors += os.pipe()
            descriptors += os.pipe()
            reader, self._writer, self._exit_watch, self._exit_writer = descriptors
            os.set_blocking(reader, False)
            self.outputs[reader] = "stdout"
            context = contextvars.copy_context()
            thread = threading.Thread(target=context.run, args=(self._perform, call), daemon=True, name=f"task {call}")
            thread.start()
        except (OSError, RuntimeError) as error:
            for descriptor in descriptors:
                os.close(descriptor)
            raise _shortage(error if isinstance(error, OSError) else OSError(errno.EAGAIN, str(error))) from None
        self._thread = thread

    def __str__(self) -> str:
        return self._thread.name

    def write(self, data: bytes) -> None:
        """Put data out. Raises BrokenPipeError once nobody waits for it any more."""
        with self._write_lock:
            view = memoryview(data)
            while view and self._writer >= 0:
                if self._is_forced:
                    raise BrokenPipeError("this run has ended")
                view = view[os.write(self._writer, view) :]

    def disown(self) -> None:
        super().disown()
        if not self._has_ended:
            os.close(self._writer)
            os.close(self._exit_writer)
            self._writer = -1

    def _perform(self, call: Call) -> None:
        _task.set(self)
        try:
            with _records:
                self._put_out(call.function(**call.arguments))
            self._result = 0
        except BaseException as error:
            trace = error.__traceback__
            while trace and trace.tb_frame.f_code.co_filename == __file__:
                trace = trace.tb_next
            with contextlib.suppress(OSError):
                self.write("".join(traceback.format_exception(type(error), error, trace)).encode(errors="replace"))
        finally:
            self._end()

    def _put_out(self, result: object) -> None:
        if not isinstance(result, Iterator):
            if result is not None:
                self.write(_encode(result))
            return
        try:
            for piece in result:
                self.write(_encode(piece))
                if self.is_stopping:
                    break
        finally:
            close = getattr(result, "close", None)  # a generator's
            if close:
                close()

    def _end(self) -> None:
        with self._write_lock:
            os.close(self._writer)
            self._writer = -1
        with self._lock:
            self._has_ended = True
            release, self._late_release = self._late_release, None
        os.close(self._exit_writer)
        if release:
            release()

    def _ask(self) -> None:
        self.is_stopping = True

    def _force(self) -> None:
        self._is_forced = True

    def _reap(self) -> None:
        self._set_exit_code(self._result)
        self._finish()

    def _finish(self) -> None:
        with self._lock:
            if not self._has_ended:  # given up: the slot is free once the thread is
                self._late_release, self._release = self._release, None
        super()._finish()


class _Source(Run):
    """A run that is the reading of a descriptor to its end: this program's own standard input."""

    def __init__(self, descriptor: int, settings: Settings, timeout: Optional[float], release: _Release) -> None:
        super().__init__(settings, timeout, release)
        self.outputs[os.dup(descriptor)] = "stdout"  # left to block: others may have it open, and would find it changed

    def __str__(self) -> str:
        return "standard input"

    def _ask(self) -> None:
        self._due[self._drop_outputs] = time.monotonic()  # by its owner, who may be waiting for it now

    _force = _ask

    def _reap(self) -> None:
        self._set_exit_code(0)
        self._finish()


_task: contextvars.ContextVar[Optional[Task]] = contextvars.ContextVar("streamlog_task", default=None)


def stopping() -> bool:
    """Whether the task that calls this is to end: its client has left, its time is over, or the server closes.

    A generator need not ask, as it is closed where it yields. False outside a task.
    """
    task = _task.get()
    return task is not None and task.is_stopping


class _View(Run):
    """A run that only shows to one client what comes from elsewhere in this program.

    Its output is a pipe, with a byte in it while there is something to be taken; closed on our side at the end.
    """

    def __init__(self, settings: Settings, timeout: Optional[float], release: _Release) -> None:
        super().__init__(settings, timeout, release)
        self._guard = threading.RLock()  # guards what follows, and what is to be taken; re-entrant for signal handlers
        self._is_awake = False
        try:
            reader, self._waker = os.pipe()
        except OSError as error:
            raise _shortage(error) from None
        os.set_blocking(reader, False)
        self.outputs[reader] = "stdout"

    def __str__(self) -> str:
        return "a view"

    def _widen(self, descriptor: int) -> None:
        pass  # there is only a byte in it

    def _wake(self) -> None:
        """Tell the owner that there is something. To be called with the guard."""
        if not self._is_awake and self._waker >= 0:
            os.write(self._waker, b"\n")
            self._is_awake = True

    def _sleep(self, descriptor: int) -> None:
        """Take that back, once nothing is left. To be called with the guard."""
        if self._is_awake:
            os.read(descriptor, 1)
            self._is_awake = False

    def _leave(self) -> None:
        """Have nothing sent here any more. May be called twice."""
        raise NotImplementedError

    def _ask(self) -> None:
        self._leave()
        with self._guard:
            self._close_waker()

    _force = _ask

    def _close_waker(self) -> None:
        if self._waker >= 0:
            os.close(self._waker)
            self._waker = -1

    def _reap(self) -> None:
        self._set_exit_code(0)
        self._finish()

    def disown(self) -> None:
        super().disown()
        self._close_waker()


class _Guest(logging.Handler):
    """A handler that a program does not notice among its own."""

    def handle(self, record: logging.LogRecord) -> bool:
        """Not under the lock that handlers have: a task whose client does not read must not stop all logging."""
        try:
            self.emit(record)
        except Exception:
            self.handleError(record)
        # With a handler of ours there is one, and so logging would no longer do this by itself.
        if logging.lastResort and record.levelno >= logging.lastResort.level and self._is_alone(record.name):
            logging.lastResort.handle(record)
        return True

    def _is_alone(self, name: str) -> bool:
        """Whether only guests get the records of a logger, and this is the first of them."""
        logger: object = logging.Logger.manager.loggerDict.get(name, logging.root)
        handlers = []
        while isinstance(logger, logging.Logger):
            handlers += logger.handlers
            logger = logger.parent if logger.propagate else None
        return handlers[:1] == [self] and all(isinstance(handler, _Guest) for handler in handlers)


def _record_text(record: logging.LogRecord) -> str:
    """What a record says, with its traceback. (A Formatter would leave its traceback in it, for all others to use.)"""
    try:
        text = record.getMessage()
    except Exception as error:  # arguments that do not fit; the program's own handlers tell where
        text = f"{record.msg!r} cannot be formatted: {error!r}"
    if record.exc_info and record.exc_info[0]:
        text += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
    return f"{text}\n{record.stack_info}" if record.stack_info else text


class _Records(_Guest):
    """Sends each record to the run of the task that it was logged by. On the root logger while any task runs."""

    def __init__(self) -> None:
        super().__init__()
        self._guard = threading.Lock()  # guards the count
        self._count = 0

    def __enter__(self) -> None:
        with self._guard:
            self._count += 1
            if self._count == 1:
                logging.getLogger().addHandler(self)

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._count -= 1
            if not self._count:
                logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        task = _task.get()
        if task is not None:
            line = f"{record.levelname} {record.name}: {_record_text(record)}\n"
            with contextlib.suppress(OSError):
                task.write(line.encode(errors="backslashreplace"))


_records = _Records()


# ---------------------------------------------------------------------------------------------
# kept runs: what a run has put out, on disk, for any number of clients at any place in it

# Room that a transcript has from the start, so that a disk that fills up, or others that take all that there is for
# transcripts, leave it the newest output at least.
_TRANSCRIPT_MIN_BYTES = 64 * 1024
_CHANGES_MAX = 16 * 1024  # of stream, in what is kept of a run: each is remembered
_TAIL_BLOCK_BYTES = 64 * 1024


class Transcript:
    """What a run has put out: one writes, any number read, each at its own place. Offsets count bytes of output.

    It is a ring in a file without a name: the byte at an offset is at the offset modulo the ring's size. The newest are
    kept; `start` is the offset of the oldest that is. The writer never waits for a reader: one who is overtaken is told
    where it goes on.
    """

    def __init__(self, size: int, folder: str, grow: Callable[[int], bool]) -> None:
        import tempfile

        self._grow = grow  # asks for more room, in bytes
        self._size = max(size, _TRANSCRIPT_MIN_BYTES)
        self._lock = threading.RLock()  # guards what follows; re-entrant, as a signal handler may stop views
        self.start = self.end = 0
        self.outcome: Optional[Outcome] = None
        self._room = _TRANSCRIPT_MIN_BYTES  # what it may use of the disk
        self._changes = [0]  # offsets at which the stream changes, and to which
        self._streams = ["stdout"]
        self._waiting: set[_Replay] = set()
        if not grow(_TRANSCRIPT_MIN_BYTES):
            raise _busy("there is no room for another transcript")
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed by `close`)
            self._file.write(bytes(_TRANSCRIPT_MIN_BYTES))
        except OSError as error:
            grow(-_TRANSCRIPT_MIN_BYTES)
            why = f"cannot keep a transcript in {folder!r} ({error.strerror})"
            raise Error(
                f"{why}: make room, or set another folder with --transcripts", 503, {"Retry-After": "1"}
            ) from None

    def write(self, stream: str, data: bytes) -> None:
        """Add output, and wake who waits for it. What the disk does not take is left out, and the run goes on."""
        end = self.end + len(data)
        if self._room < min(end, self._size) and not self._grow(min(end, self._size) - self._room):
            self._size = self._room
        self._room = max(self._room, min(end, self._size))
        with self._lock:
            if self._streams[-1] != stream:
                self._changes.append(self.end)
                self._streams.append(stream)
        try:
            self._put(end, data)
        except OSError as error:
            self._shrink(error)
            try:
                self._put(end, data)
            except OSError:  # what the disk does not take now is lost
                with self._lock:
                    self._forget(end)
        with self._lock:
            self.end = end
            self._wake()

    def _shrink(self, error: OSError) -> None:
        """Do with what the disk has taken, from here on."""
        room = max(self.end, _TRANSCRIPT_MIN_BYTES)
        if room < self._size:
            said = "a transcript cannot grow (%s): the newest %d bytes of that run are kept"
            _log.warning(said, error.strerror, room)
            self._grow(room - self._room)
            self._size = self._room = room

    def _put(self, end: int, data: bytes) -> None:
        """Write data that ends at an offset, over the oldest."""
        with self._lock:
            self._forget(end - self._size)
        view = memoryview(data)[-self._size :]
        while view:
            at = (end - len(view)) % self._size
            view = view[os.pwrite(self._file.fileno(), view[: self._size - at], at) :]

    def _forget(self, start: int) -> None:
        """Keep nothing from before an offset. To be called with the lock."""
        if len(self._changes) > _CHANGES_MAX:
            start = max(start, self._changes[_CHANGES_MAX // 2])
        self.start = max(self.start, start)
        if len(self._changes) > 1 and self._changes[1] <= self.start:
            passed = bisect.bisect_right(self._changes, self.start) - 1
            del self._changes[:passed], self._streams[:passed]

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, set()
        for view in waiting:
            view.wake()

    def finish(self, outcome: Outcome) -> None:
        """Say how the run has ended: nothing more will come."""
        with self._lock:
            self.outcome = outcome
            self._wake()

    def read(self, offset: int, limit: int, behind: float = math.inf) -> tuple[int, str, bytes]:
        """Output from an offset on, and not from `behind` on, of one stream: the offset of its first byte, which is
        later if that is no longer kept, the stream, and the bytes; none at the end."""
        while True:
            with self._lock:
                at = max(offset, self.start)
                index = bisect.bisect_right(self._changes, at)
                stop = int(min([*self._changes[index : index + 1], self.end, at + limit, behind]))
                stream = self._streams[index - 1]
            data = self._get(at, stop - at) if stop > at else b""
            if at >= self.start:  # or else it was overwritten meanwhile
                return at, stream, data

    def _get(self, offset: int, count: int) -> bytes:
        at = offset % self._size
        data = os.pread(self._file.fileno(), min(count, self._size - at), at)
        return data + os.pread(self._file.fileno(), count - len(data), 0) if len(data) < count else data

    def wait(self, view: _Replay, offset: float) -> bool:
        """Wake a view when there is something behind an offset, or the end; whether it has to wait for that."""
        with self._lock:
            has_to = self.end <= offset and self.outcome is None
            if has_to:
                self._waiting.add(view)
            return has_to

    def forget_view(self, view: _Replay) -> None:
        """Wake a view no more."""
        with self._lock:
            self._waiting.discard(view)

    def find_tail(self, lines: int) -> int:
        """The offset of the last lines, or of the oldest one that is kept."""
        stop = self.end
        count = lines + self._get(stop - 1, 1).endswith(b"\n") if stop > self.start else 0
        while stop > self.start and count:
            at = max(self.start, stop - _TAIL_BLOCK_BYTES)
            block = self._get(at, stop - at)
            while count:
                found = block.rfind(b"\n", 0, stop - at)
                if found < 0:
                    break
                stop, count = at + found, count - 1
            else:
                return max(self.start, stop + 1)
            stop = at
        return max(self.start, stop)

    def close(self) -> None:
        """Give its room back. May be called twice."""
        room, self._room = self._room, 0
        self._grow(-room)
        self._file.close()


class Kept:
    """A run that may outlive its client, with its transcript. A thread of its own reads the one into the other."""

    def __init__(
        self, name: str, command: Command, values: Mapping[str, str], linger_seconds: float = math.inf
    ) -> None:
        self.id = base64.urlsafe_b64encode(os.urandom(16)).decode().rstrip("=")
        self.name = name
        self.command = command
        self.values = values
        self.linger_seconds = linger_seconds  # that it goes on for without a view; 0: it is its client's alone
        self.started_at = time.time()
        self.ended_at: Optional[float] = None
        self.transcript: Transcript
        self.run: Run
        self.thread: threading.Thread
        self.lock = threading.RLock()  # guards what follows; re-entrant, as a signal handler may stop runs
        self.views = 0
        self.is_dropped = False
        self._left_at = time.monotonic()  # when the last view has gone
        self._wakes = self._waker = -1

    def start(self, shelf: _Shelf, run: Run) -> None:
        """Read the run out, in a thread. Raises OSError or RuntimeError if it cannot be had."""
        self.run = run
        self.thread = threading.Thread(target=self._record, args=(shelf,), daemon=True, name=f"streamlog-kept {run}")
        self._wakes, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        try:
            self.thread.start()
        except RuntimeError:
            self._close_waker()
            raise

    def _close_waker(self) -> None:
        with self.lock:
            for descriptor in (self._wakes, self._waker):
                os.close(descriptor)
            self._wakes = self._waker = -1

    def _record(self, shelf: _Shelf) -> None:
        run = self.run
        try:
            while not run.is_over:
                ready = run.wait({self._wakes: select.POLLIN}, deadline=self._check_views())
                if ready.pop(self._wakes, 0):
                    os.read(self._wakes, 1024)
                for descriptor in ready:
                    data = run.read(descriptor)
                    if data:
                        self.transcript.write(run.stream, data)
        except Exception:
            _log.exception("a bug: kept run of %s", self.name)
        finally:
            run.close()
            self._close_waker()
            self.ended_at = time.time()
            self.transcript.finish(run.outcome)
            shelf.end(self)

    def _check_views(self) -> float:
        """Stop the run if it has been without a view for too long; the moment to look again."""
        with self.lock:  # who enters by it either keeps the run from this, or finds that it is ending
            deadline = self._left_at + self.linger_seconds
            if not self.views and time.monotonic() >= deadline:
                self.run.stop(_UNWATCHED)
            return math.inf if self.views or self.run.reason else deadline

    def stop(self, reason: str) -> None:
        """Ask it to end. Any thread may; its own is woken, to look after the grace time."""
        self.run.stop(reason)
        self._wake()

    def kill(self) -> None:
        """End it at once."""
        self.run.stop(_SHUTTING_DOWN)
        self.run.kill()
        self._wake()

    def _wake(self) -> None:
        with self.lock, contextlib.suppress(BlockingIOError):
            if self._waker >= 0:
                os.write(self._waker, b"\n")

    def enter(self) -> None:
        """Count a view."""
        with self.lock:
            self.views += 1

    def leave(self) -> None:
        """Count a view that has gone."""
        with self.lock:
            self.views -= 1
            self._left_at = time.monotonic()
            is_last = not self.views and self.is_dropped
        if is_last:
            self.transcript.close()
        else:
            self._wake()

    def drop(self) -> None:
        """Give the transcript up, once nobody looks at it."""
        with self.lock:
            is_unused = not self.views and not self.is_dropped
            self.is_dropped = True
        if is_unused:
            self.transcript.close()

    def disown(self) -> None:
        """Let go of all descriptors, in a process that was forked off."""
        self.lock = threading.RLock()
        self.run.disown()
        self.transcript.close()
        if self._waker >= 0:
            self._close_waker()

    @property
    def key(self) -> tuple[str, frozenset[tuple[str, str]]]:
        """What another run must have in common with it, for both to be one."""
        return self.name, frozenset(self.values.items())

    @property
    def state(self) -> dict[str, object]:
        """What there is to say of it, as JSON has it. Times are RFC 3339, sizes are in bytes."""
        outcome, transcript = self.transcript.outcome, self.transcript
        return {
            "id": self.id,
            "command": self.name,
            "values": dict(self.values),
            "state": "ended" if outcome else "running",
            "started": _timestamp(self.started_at),
            "ended": _timestamp(self.ended_at) if outcome and self.ended_at else None,
            "seconds": round((outcome.seconds if outcome else time.time() - self.started_at), 3),
            "exit_code": outcome.exit_code if outcome else None,
            "signal": outcome.signal if outcome else None,
            "reason": (outcome.reason or "exit") if outcome else None,
            "bytes": transcript.end,
            "first_byte": transcript.start,
        }


class _Replay(_View):
    """What a kept run has put out, and goes on to, from an offset on: to its end, or to the offset `stop`."""

    def __init__(self, kept: Kept, offset: int, stop: Optional[int], settings: Settings) -> None:
        super().__init__(settings, None, lambda: None)
        self._kept = kept
        self._offset = offset
        self._stop = math.inf if stop is None else stop
        self._has_left = False
        kept.enter()
        self.wake()

    def wake(self) -> None:
        """Look again: there is more, or the end."""
        with self._guard:
            self._wake()

    def wait_for_end(self, others: Mapping[int, int]) -> dict[int, int]:
        """Wait until the kept run has ended, or another descriptor is ready; which are."""
        while self._kept.transcript.outcome is None:
            (reader,) = self.outputs
            with self._guard:
                self._sleep(reader)
            if self._kept.transcript.wait(self, math.inf):
                ready = _poll({reader: select.POLLIN, **others})
                if ready.keys() - {reader}:
                    return ready
        self.wake()
        return {}

    def _take(self, descriptor: int, size: int) -> bytes:
        transcript = self._kept.transcript
        while not self.reason:  # or else nobody wants to see more
            at, self.stream, data = transcript.read(self._offset, size, self._stop)
            self.skipped_bytes += max(0, at - self._offset)
            self._offset = at + len(data)
            if data or self._offset >= self._stop or self._waker < 0:
                return data
            with self._guard:
                self._sleep(descriptor)
            if transcript.wait(self, self._offset):
                raise BlockingIOError
            if transcript.outcome and transcript.end <= self._offset:
                return b""
            self.wake()
        return b""

    def _leave(self) -> None:
        self._kept.transcript.forget_view(self)
        with self._guard:
            has_left, self._has_left = self._has_left, True
        if not has_left:
            self._kept.leave()

    def _finish(self) -> None:
        self._ask()
        super()._finish()

    @property
    def outcome(self) -> Outcome:
        """How the kept run has ended, if this goes to its end."""
        kept = self._kept.transcript.outcome
        if self.reason or kept is None or self._offset >= self._stop:
            return Outcome(0, self.reason, self.seconds, is_known=bool(self.reason))
        return kept


# What ends the kept runs of a server that was killed, and so could not: it is told of each by a line of its standard
# input, and sees the end of that. A group is known by its leader and when that started (proc_pid_stat(5)): the number
# of one that has gone may be another's by then.
_GUARD = """
import os, signal, sys, time
def since(pid):
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19]
    except OSError:
        return b""
groups = {}
for line in sys.stdin:
    pid = int(line[1:])
    if line[0] == "+":
        groups[pid] = since(pid)
    else:
        groups.pop(pid, None)
for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGKILL) if groups else ():
    if number == signal.SIGKILL:
        time.sleep(float(sys.argv[1]))
    for pid, started in groups.items():
        try:
            if since(pid) in (b"", started):
                os.killpg(pid, number)
        except OSError:
            pass
"""


class _Guard:
    """A process that ends kept runs if this one is killed. It is started with the first of them."""

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._lock = threading.Lock()  # guards the process

    def tell(self, sign: str, run: Run) -> None:
        """Say that a process group is to be ended ("+"), or has ended ("-"). Without a guard it does without."""
        if not isinstance(run, Process):
            return
        with self._lock, contextlib.suppress(OSError):
            if self._process is None:
                argv = [sys.executable or "python3", "-I", "-S", "-c", _GUARD, str(self._grace_seconds)]
                self._process = subprocess.Popen(
                    argv,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,
                )
                assert self._process.stdin
                os.set_blocking(self._process.stdin.fileno(), False)
            assert self._process.stdin
            os.write(self._process.stdin.fileno(), f"{sign}{run.pid}\n".encode())

    def close(self) -> None:
        """Have it end what is left, and itself. May be called twice."""
        with self._lock:
            process, self._process = self._process, None
        if process and process.stdin:
            process.stdin.close()
            try:
                process.wait(self._grace_seconds + _ABANDON_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def disown(self) -> None:
        """Let go of it, in a process that was forked off."""
        self._lock = threading.Lock()
        if self._process and self._process.stdin:
            self._process.stdin.close()
            self._process.returncode = 0  # it is no child of this one
            self._process = None


class _Shelf:
    """The kept runs of a site, and what bounds them: bytes on disk, ended ones, and their age."""

    def __init__(self, settings: Settings, on_end: Callable[[Kept], None]) -> None:
        self._settings = settings
        self._on_end = on_end
        self._lock = threading.RLock()  # guards the rest
        self._kept: dict[str, Kept] = {}  # by id, the oldest first
        self._shared: dict[tuple[str, frozenset[tuple[str, str]]], Kept] = {}  # that go on, by command and values
        self._used_bytes = 0
        self._is_closed = False
        self._guard = _Guard(settings.grace_seconds)

    def keep(self, kept: Kept, make: Callable[[], Run]) -> Kept:
        """Start a run and keep it. Raises Error."""
        settings = self._settings
        try:
            kept.transcript = Transcript(settings.transcript_bytes, _transcript_folder(settings), self._grow)
            try:
                run = make()
                try:
                    self._guard.tell("+", run)
                    with self._lock:
                        if self._is_closed:
                            raise _busy(_SHUTTING_DOWN)
                        kept.start(self, run)
                        self._kept[kept.id] = kept
                        if self._is_closed:  # meanwhile
                            kept.stop(_SHUTTING_DOWN)
                except BaseException:
                    run.close()
                    self._guard.tell("-", run)
                    raise
            except BaseException:
                kept.transcript.close()
                raise
        except (OSError, RuntimeError) as error:
            raise _shortage(error if isinstance(error, OSError) else OSError(errno.EAGAIN, str(error))) from None
        return kept

    def share(self, kept: Kept, make: Callable[[], Run]) -> Kept:
        """The run of a command with these values that goes on, or else a new one. It is entered: `leave` it."""
        with self._lock:
            found = self.find_shared(kept.name, kept.values)
            if found:
                found.enter()
                if self.find_shared(kept.name, kept.values):
                    return found
                found.leave()
            kept.enter()
            self._shared[kept.key] = self.keep(kept, make)
            return kept

    def find_shared(self, name: str, values: Mapping[str, str]) -> Optional[Kept]:
        """The shared run of a command with these values, if one goes on."""
        found = self._shared.get((name, frozenset(values.items())))
        goes_on = found and (found.command.is_source or not (found.run.reason or found.ended_at))
        return found if goes_on else None

    def end(self, kept: Kept) -> None:
        """Take note of a run that has ended."""
        self._guard.tell("-", kept.run)
        with self._lock:
            if self._shared.get(kept.key) is kept and not kept.command.is_source:  # which cannot be begun anew
                del self._shared[kept.key]
            if not kept.linger_seconds:
                self._drop(kept)
        self.expire()
        self._on_end(kept)

    def find(self, id_: str) -> Kept:
        """The kept run of an id, entered: `leave` it. Raises Error."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{22}", id_):
            raise Error("there is no such run: an id has 22 letters, digits, '-' and '_'", 404)
        with self._lock:
            self.expire()
            kept = self._kept.get(id_)
            if kept is None:
                raise Error("that run is no longer kept, or was another server's: /-/runs has those that are", 410)
            kept.enter()
        return kept

    def runs(self) -> list[Kept]:
        """The kept runs, the newest first."""
        self.expire()
        with self._lock:
            return [kept for kept in self._kept.values() if kept.linger_seconds][::-1]

    def expire(self) -> None:
        """Drop those that have ended and are too old, or too many."""
        with self._lock:
            ended = self._ended()
            surplus = len(ended) - self._settings.kept_runs
            for at, kept in enumerate(ended):
                if at < surplus or time.time() - (kept.ended_at or 0) > self._settings.kept_seconds:
                    self._drop(kept)

    def _ended(self) -> list[Kept]:
        """Those that have ended, the first to do so first; but for standard input, which cannot be begun anew."""
        ended = [kept for kept in self._kept.values() if kept.ended_at and not kept.command.is_source]
        return sorted(ended, key=lambda kept: kept.ended_at or 0.0)

    def _drop(self, kept: Kept) -> None:
        if self._kept.pop(kept.id, None):
            kept.drop()

    def _grow(self, count: int) -> bool:
        """Take more room for a transcript, if need be from the oldest that has ended; whether there is."""
        with self._lock:
            ended = (kept for kept in self._ended() if not kept.views)
            while count > 0 and self._used_bytes + count > self._settings.transcripts_bytes:
                oldest = next(ended, None)
                if oldest is None:
                    return False
                self._drop(oldest)
            self._used_bytes += count
            return True

    def shutdown(self) -> None:
        """Stop every run, and take no more."""
        self._is_closed = True
        for kept in list(self._kept.values()):
            kept.stop(_SHUTTING_DOWN)

    def kill(self) -> None:
        """End every run at once."""
        for kept in list(self._kept.values()):
            kept.kill()

    def join(self, deadline: float) -> bool:
        """Wait for the runs to end; whether they have in time."""
        threads = [kept.thread for kept in list(self._kept.values())]
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def close(self) -> None:
        """Drop all transcripts."""
        with self._lock:
            for kept in list(self._kept.values()):
                self._drop(kept)
        self._guard.close()

    def disown(self) -> None:
        """Let go of all descriptors, in a process that was forked off."""
        self._lock = threading.RLock()  # some other thread of the parent may have it
        for kept in self._kept.values():
            kept.disown()
        self._kept.clear()
        self._guard.disown()


def _transcript_folder(settings: Settings) -> str:
    """Where transcripts are kept: /tmp is in memory on many machines, and /var/tmp is not (file-hierarchy(7))."""
    return (
        settings.transcripts or os.environ.get("TMPDIR") or ("/var/tmp" if os.access("/var/tmp", os.W_OK) else "/tmp")
    )


# ---------------------------------------------------------------------------------------------
# insight: the log, the log levels and the stacks of the program that has this module inside

_QUEUE_RECORDS = 10_000  # that are still to be handed out: more are dropped, and counted
_BEHIND_BYTES = 1 << 20  # of records that a viewer may be behind
_RECORD_CHARACTERS = 64 * 1024  # more of a record are cut off
# Time for more records to come, once some were handed out: a hundred viewers are woken a hundred times a second at
# most, whatever is logged, or they would take the interpreter from those who log.
_GATHER_SECONDS = 0.01

_Maker = Callable[[Settings, Optional[float], _Release], Run]


class _Entry(NamedTuple):
    """A record as it is passed on; its line is made by whoever hands it out."""

    level: int
    logger: str
    level_name: str
    moment: float  # time.time()
    text: str

    @property
    def line(self) -> bytes:
        said = f"{_timestamp(self.moment)} {self.level_name} {self.logger}: {self.text}\n"
        return said.encode(errors="backslashreplace")

    @property
    def size(self) -> int:
        """Bytes of memory, roughly: of the text, and of the rest."""
        return sys.getsizeof(self.text) + 200


class _Wanted(NamedTuple):
    """Which records somebody wants: of a logger and those below it, from a level up; and how many of the newest."""

    logger: str
    level: int
    tail: int
    is_followed: bool

    def admits(self, level: int, logger: str) -> bool:
        """Whether records of a level and a logger are among them. Our own are only where they are asked for."""
        is_below = not self.logger or logger == self.logger or logger.startswith(f"{self.logger}.")
        return is_below and level >= self.level and (logger != _log.name or self.logger == _log.name)


class _LogView(_View):
    """The program's log, for one viewer. Who does not keep up loses records, and is told so."""

    def __init__(
        self, log: _ProgramLog, wanted: _Wanted, settings: Settings, timeout: Optional[float], release: _Release
    ) -> None:
        super().__init__(settings, timeout, release)
        self.wanted = wanted
        self._log = log
        self._queue: collections.deque[memoryview] = collections.deque()
        self._queued_bytes = 0
        self._lost = 0
        try:
            log.attach(self)
        except RuntimeError as error:
            self.disown()
            raise _shortage(OSError(errno.EAGAIN, str(error))) from None
        if not wanted.is_followed:
            self._ask()

    def feed(self, lines: bytes, count: int) -> None:
        """Take in so many records, or lose them."""
        with self._guard:
            if self._lost or (self._queue and self._queued_bytes + len(lines) > _BEHIND_BYTES):
                self._lost += count
            elif lines:
                self._put(lines)

    def lose(self, count: int) -> None:
        """Take note of records that were lost on the way here."""
        self.feed(b"[%d records lost]\n" % count, count)

    def _put(self, lines: bytes) -> None:
        self._queue.append(memoryview(lines))
        self._queued_bytes += len(lines)
        self._wake()

    def _take(self, descriptor: int, size: int) -> bytes:
        with self._guard:
            if not self._queue:
                return os.read(descriptor, 1)  # it is the end, or nothing is there yet
            block = self._queue.popleft()
            lines = bytes(block[:size])
            self._queued_bytes -= len(lines)
            if len(block) > size:
                self._queue.appendleft(block[size:])
            elif self._lost and not self._queue:
                self._put(b"[%d records lost]\n" % self._lost)
                self._lost = 0
            if not self._queue:
                self._sleep(descriptor)
            return lines

    def _leave(self) -> None:
        self._log.detach(self)


def _find_logger(name: str) -> logging.Logger:
    """The logger of a name, or else the nearest above it. (To ask logging for one would create it.)"""
    while name:
        found = logging.Logger.manager.loggerDict.get(name)
        if isinstance(found, logging.Logger):
            return found
        name = name.rpartition(".")[0]
    return logging.root


class _ProgramLog(_Guest):
    """The program's records, for those who watch; the newest of them are kept, where that is asked for.

    A logging call leaves its record in a queue and goes on: to put something there neither waits for anybody nor lets
    go of the interpreter's lock. While somebody watches, a thread hands the records out. The handler stands on
    the loggers where the records end up: on the root, and on those that do not pass on what they get.
    """

    def __init__(self, keep_bytes: int) -> None:
        super().__init__()
        self._keep_bytes = keep_bytes
        self._kept: collections.deque[_Entry] = collections.deque()
        self._kept_bytes = 0
        self._forget_views()
        if keep_bytes:
            logging.root.addHandler(self)

    def _forget_views(self) -> None:
        self._queue: queue.SimpleQueue[Optional[_Entry]] = queue.SimpleQueue()
        self._guard = (
            threading.Lock()
        )  # guards the views, the thread and what is kept; never held where records come in
        self._views: dict[_LogView, logging.Logger] = {}  # and where the handler stands for them
        self._thread: Optional[threading.Thread] = None
        self._drop_guard = threading.Lock()
        self._dropped: Counter[tuple[int, str]] = Counter()  # records for which the queue had no room

    def emit(self, record: logging.LogRecord) -> None:
        if self._queue.qsize() >= _QUEUE_RECORDS:
            with self._drop_guard:
                self._dropped[record.levelno, record.name] += 1
            return
        text = _record_text(record)[:_RECORD_CHARACTERS]
        self._queue.put(_Entry(record.levelno, record.name, record.levelname, record.created, text))
        if self._thread is None and self._guard.acquire(blocking=False):  # who fails leaves it to the next
            try:
                self._hand_out()
            finally:
                self._guard.release()

    def follow(self, tail: int = 10, level: str = "", logger: str = "", follow: Literal[1, 0] = 1) -> _Maker:
        """Follow this program's log, first its newest records where they are kept (live)"""
        wanted = _Wanted("" if logger == "root" else logger, _read_level(level or "NOTSET"), max(0, tail), bool(follow))
        return functools.partial(_LogView, self, wanted)

    def attach(self, view: _LogView) -> None:
        """Feed a view, first with the newest records. Raises RuntimeError if a thread cannot be had."""
        with self._guard:
            self._hand_out()
            newest = (entry.line for entry in reversed(self._kept) if view.wanted.admits(entry.level, entry.logger))
            lines = list(itertools.islice(newest, min(view.wanted.tail, len(self._kept))))
            view.feed(b"".join(reversed(lines)), len(lines))
            if self._thread is None:
                thread = threading.Thread(target=self._serve, name="streamlog-log", daemon=True)
                thread.start()
                self._thread = thread
            place = _find_logger(view.wanted.logger)
            while place.propagate and place.parent:
                place = place.parent
            self._views[view] = place
            place.addHandler(self)

    def detach(self, view: _LogView) -> None:
        """Feed a view no more. May be called twice."""
        with self._guard:
            place = self._views.pop(view, None)
            if place:
                self._leave(place)
                if not self._views:
                    self._queue.put(None)

    def _leave(self, place: logging.Logger) -> None:
        """Take the handler away from where it is of no more use."""
        if place not in self._views.values() and not (self._keep_bytes and place is logging.root):
            place.removeHandler(self)

    def _serve(self) -> None:
        while True:
            first = self._queue.get()
            with self._guard:
                self._hand_out(first)
                if not self._views:
                    self._thread = None
                    return
            time.sleep(_GATHER_SECONDS)

    def _hand_out(self, first: Optional[_Entry] = None) -> None:
        """Give what is in the queue to the views, and keep it. To be called with the guard."""
        entries = [first] if first else []
        with contextlib.suppress(queue.Empty):
            while len(entries) < _QUEUE_RECORDS:
                entry = self._queue.get_nowait()
                entries += [entry] if entry else []
        with self._drop_guard:
            dropped, self._dropped = self._dropped, Counter()
        if self._keep_bytes:
            self._keep(entries)
        groups: defaultdict[_Wanted, list[_LogView]] = defaultdict(list)
        for view in self._views:
            groups[view.wanted].append(view)
        for wanted, views in groups.items():
            lines = [entry.line for entry in entries if wanted.admits(entry.level, entry.logger)]
            block = b"".join(lines)
            lost = sum(count for (level, logger), count in dropped.items() if wanted.admits(level, logger))
            for view in views:
                view.feed(block, len(lines))
                if lost:
                    view.lose(lost)

    def _keep(self, entries: Sequence[_Entry]) -> None:
        for entry in entries:
            self._kept.append(entry)
            self._kept_bytes += entry.size
        while self._kept_bytes > self._keep_bytes:
            self._kept_bytes -= self._kept.popleft().size

    def end(self) -> None:
        """Keep no more records. May be called twice. (Not `close`: logging calls that, when it is configured anew.)"""
        with self._guard:
            self._keep_bytes = 0
            self._leave(logging.root)

    def disown(self) -> None:
        """Forget the views, in a process that was forked off; what is kept goes on to be."""
        places = set(self._views.values())
        self._forget_views()
        for place in places:
            self._leave(place)


def _read_level(text: str) -> int:
    """A level by its name, in any case, or its number. Raises Error."""
    for name in (text, text.upper()):
        level = logging.getLevelName(name)
        if isinstance(level, int):
            return level
    if re.fullmatch(r"[0-9]{1,4}", text):
        return int(text)
    raise Error(f"a level is DEBUG, INFO, WARNING, ERROR, CRITICAL, NOTSET or a number: {text[:200]!r}")


def _show_levels(logger: str = "") -> str:
    """Show the level of a logger; or of the root, and of those that have one of their own"""
    there = logging.Logger.manager.loggerDict
    if logger and logger != "root" and logger not in there:
        raise Error(f"there is no logger {logger[:200]!r} (yet)", 404)
    own = sorted(name for name, found in there.copy().items() if isinstance(found, logging.Logger) and found.level)
    levels = [(name, _find_logger(name).getEffectiveLevel()) for name in ([logger] if logger else ["root", *own])]
    return "".join(f"{name} {logging.getLevelName(level)}\n" for name, level in levels)


def _set_level(level: str, logger: str = "root") -> str:
    """Set the level of a logger; NOTSET has it take that of the one above (GET shows the levels)"""
    number = _read_level(level)
    said = _show_levels(logger)  # which refuses one that is not there
    logging.getLogger(logger if logger != "root" else None).setLevel(number)
    return said.partition(" ")[0] + " set to " + logging.getLevelName(number) + "\n"


def _show_stacks() -> str:
    """Show what each thread is doing"""
    threads = {thread.ident: thread for thread in threading.enumerate()}
    stacks: dict[int, list[tuple[str, int, str, None]]] = {}
    for ident, top in sys._current_frames().items():  # they go on meanwhile: the source is looked up once all are noted
        frame: Optional[FrameType] = top
        stacks[ident] = []
        while frame:
            stacks[ident].append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, None))
            frame = frame.f_back
    del frame, top
    shown = []
    for ident in sorted(stacks, key=lambda ident: (ident != threading.main_thread().ident, ident)):
        thread = threads.get(ident)
        said = f"{thread.name}{' (daemon)' if thread.daemon else ''}" if thread else "(not started by threading)"
        shown.append(f"{said}, thread {ident}\n" + "".join(traceback.format_list(stacks[ident][::-1])))
    return "\n".join(shown)


# ---------------------------------------------------------------------------------------------
# access: who may. A request passes before anything is looked up or run on its behalf

# What a browser says of a request that nobody has asked for yet: it fetches a page ahead, in case it is.
_AHEAD_HEADERS = ("sec-purpose", "purpose", "x-purpose", "x-moz")
_AHEAD = re.compile("prefetch|prerender|preview")
_CORS_HEADERS = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, DELETE, OPTIONS",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID, Prefer, Range",
    "Access-Control-Expose-Headers": "Retry-After, Location, Exit-Code, Content-Range",
    "Access-Control-Max-Age": "600",
}


class Reach(enum.Enum):
    """From where a server can be reached."""

    UNIX = "a unix socket"  # whose mode says who may connect
    LOOPBACK = "this machine"
    NETWORK = "other machines"


class Access:
    """Who may: the rules for Host, Origin and token."""

    def __init__(self, settings: Settings, reach: Reach) -> None:
        self._token = settings.token.encode()
        if self._token:
            import hmac  # brings OpenSSL with it, as hashlib does

            self._is_same = hmac.compare_digest
        self._scheme = settings.scheme
        self._origins = frozenset(origin.lower() for origin in settings.allow_origins)
        self._reach = reach
        self._hosts = {"localhost", *(host.lower().rstrip(".") for host in settings.allow_hosts)}
        if reach is Reach.NETWORK:
            self._hosts.add(socket.gethostname().lower())

    def check(self, request: Request) -> None:
        """Raise Error for a request that may not be answered: before anything is looked up on its behalf."""
        self._check_host(request.host)
        self._check_site(request)
        if self._token and not self.is_preflight(request) and request.path != "/-/healthy":
            self._check_token(request.headers.get("authorization", ""))

    def is_preflight(self, request: Request) -> bool:
        """Whether the browser of an allowed page asks what it may: without a token, so that it is told nothing else."""
        asks = request.method == "OPTIONS" and {"origin", "access-control-request-method"} <= request.headers.keys()
        return asks and self._is_allowed_origin(request)

    def headers(self, request: Optional[Request]) -> dict[str, str]:
        """What an answer says of the pages that may use it: of other origins, and in frames."""
        ancestors = " ".join(["'self'", *sorted(self._origins)])
        headers = {"Content-Security-Policy": f"frame-ancestors {ancestors}"}
        if self._origins:
            headers["Vary"] = "Origin"
        else:
            headers["Cross-Origin-Resource-Policy"] = "same-origin"
        if request and "origin" in request.headers and self._is_allowed_origin(request):
            headers["Access-Control-Allow-Origin"] = request.headers["origin"]
            headers.update(_CORS_HEADERS)
        return headers

    def _check_host(self, host: str) -> None:
        """Refuse a name that is not this server's: a stranger could point his own here (DNS rebinding).

        He has no token for it, though, and behind a proxy names are the proxy's: with a token any name will do
        where others reach the server anyway. No name can be pointed at a unix socket.
        """
        if self._reach is Reach.UNIX or (self._token and self._reach is Reach.NETWORK):
            return
        name = host.rstrip(".")
        if name in self._hosts or name.endswith(".localhost"):
            return
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(name.strip("[]"))
            if address.is_loopback or self._reach is Reach.NETWORK:
                return
        raise Error(f"the host {host[:200]!r} is not this server's: use localhost or an address, or --allow-host", 403)

    def _check_site(self, request: Request) -> None:
        """Refuse what another site's page has asked for, and what a browser asks for ahead of its user."""
        ahead = " ".join(request.headers.get(name, "") for name in _AHEAD_HEADERS).lower()
        if _AHEAD.search(ahead):
            raise Error("nothing is run ahead of being asked for", 503, {"Retry-After": "1"})
        site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
        if site is not None:
            is_own = site in ("same-origin", "none") or self._is_visit(request)
        else:
            is_own = (
                origin is None or origin.lower() == f"{request.scheme or self._scheme}://{request.authority.lower()}"
            )
        if not is_own and not self._is_allowed_origin(request):
            who = _printable((origin or site or "").encode())
            raise Error(f"a page of another site ({who}) may not use this server: --allow-origin would let it", 403)

    def _is_allowed_origin(self, request: Request) -> bool:
        """Whether the page that asks is of an allowed origin. For a frame or an image only the referrer tells."""
        referrer = re.match(r"https?://[^/]+", request.headers.get("referer", ""), re.IGNORECASE)
        origin = request.headers.get("origin") or (referrer[0] if referrer else "")
        return origin.lower() in self._origins

    @staticmethod
    def _is_visit(request: Request) -> bool:
        """Whether somebody followed a link to the index page, which runs nothing."""
        return request.path == "/" and request.headers.get("sec-fetch-mode") == "navigate"

    def _check_token(self, authorization: str) -> None:
        """Refuse a request without the token, as Bearer or as the password of Basic (RFC 6750, RFC 7617)."""
        scheme, _, given = authorization.partition(" ")
        offered = given.strip(" \t").encode("latin-1")
        if scheme.lower() == "basic":
            try:
                offered = base64.b64decode(offered, validate=True).partition(b":")[2]
            except ValueError:
                offered = b""
        if scheme.lower() not in ("basic", "bearer") or not self._is_same(offered, self._token):
            challenge = {"WWW-Authenticate": 'Basic realm="streamlog", charset="UTF-8", Bearer realm="streamlog"'}
            raise Error("the token is missing or wrong: give it as curl -u :TOKEN does", 401, challenge)


# ---------------------------------------------------------------------------------------------
# site: a request to a reply. Knows nothing of sockets

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_FORMAT_OPTIONS = ("format", "footer", "timestamps", "hostname", "heartbeat")
_SERVER_OPTIONS = (*_FORMAT_OPTIONS, "tail", "wait", "async")
_REPLAY_OPTIONS = (*_FORMAT_OPTIONS, "tail", "wait", "follow")
# Where a range has no end yet a very large one is said (RFC 8673 section 2.2).
_RANGE_MAX = 1 << 53
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_NDJSON_TYPES = frozenset({"application/x-ndjson", "application/jsonl", "application/json"})


class Reply(NamedTuple):
    """An answer: a whole body, or a run whose output is the body, and the format that writes it."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    run: Optional[Run] = None
    format: Optional[Format] = None
    name: str = ""  # the command's; empty where the run is counted elsewhere
    length: Optional[int] = None  # of the output, in bytes, where that is known
    later: Optional[Callable[[], Reply]] = None  # what this is to be once the kept run has ended


def _text_reply(text: str, status: int = 200, headers: Mapping[str, str] = MappingProxyType({})) -> Reply:
    return Reply(status, {"Content-Type": _PLAIN_TEXT, **headers}, text.encode())


class _Target(NamedTuple):
    """How curl reaches the server: its URL, and options written for a shell."""

    url: str
    options: str = ""


def _target(url: str, token: str, path: str = "") -> _Target:
    """The target at a URL, or at the path of a unix socket."""
    options = ' -u ":$STREAMLOG_TOKEN"' if token else ""
    if path:
        options += f" --unix-socket {shlex.quote(path)}"
    return _Target(url, options)


def _curl_line(target: _Target, name: str, command: Command) -> str:
    """A line for a shell that runs the command, with every parameter to be seen and changed."""
    query = urllib.parse.urlencode(
        {
            parameter.name: (parameter.choices or [parameter.name.upper()])[0]
            if parameter.default is None
            else parameter.default
            for parameter in command.parameters.values()
        },
        safe="/:,@",
    )
    words = []
    if command.stdin:
        words += ["-T", "."]
    elif "POST" in command.methods:
        words += ["-d", query] if query else ["-X", "POST"]
        query = ""
    words.append(f"{target.url}/{name}" + (f"?{query}" if query else ""))
    return f"curl -N{target.options} {shlex.join(words)}"


# Output may set styles of its own by escape sequences, and nothing else; the index page has the style that it was
# sent with, told by its hash, and forms and a frame of this server's.
_VIEW_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
_INDEX_POLICY = (
    "default-src 'none'; style-src 'sha256-HASH'; img-src data:; form-action 'self'; frame-src 'self'; base-uri 'none'"
)
_INDEX_STYLE = """
* { box-sizing: border-box }
body { margin: 0; height: 100vh; height: 100dvh; display: grid; background: var(--page); color: var(--text);
  font: 1rem/1.45 system-ui, sans-serif; grid: "top" auto "list" 1fr "view" 45% / minmax(0, 1fr) }
header { grid-area: top; padding: .6rem 1rem; border-bottom: 1px solid var(--line) }
main { grid-area: list; overflow: auto; padding: 0 1rem }
aside { grid-area: view; border-top: 1px solid var(--line); min-height: 0 }
iframe { display: block; width: 100%; height: 100%; border: 0 }
iframe.runs { height: 12rem }
h1 { font-size: 1.15rem; margin: 0 }
h2 { font-size: 1rem; margin: 0 }
p { margin: .15rem 0 }
header p { color: var(--soft); font-size: .85rem }
section { padding: .7rem 0; border-bottom: 1px solid var(--line) }
code { font: .8rem/1.4 ui-monospace, monospace; overflow-wrap: anywhere; color: var(--soft); display: -webkit-box;
  -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden }
code:focus { -webkit-line-clamp: none }
form, .row { display: flex; flex-wrap: wrap; gap: .4rem .6rem; align-items: end; margin: .4rem 0 0 }
.row { flex-basis: 100%; margin: 0 0 .3rem }
label { display: grid; font-size: .8rem; color: var(--soft) }
input, select, button { font: inherit; font-size: .9rem; padding: .25rem .5rem; border: 1px solid var(--soft);
  border-radius: .3rem; background: var(--page); color: var(--text); min-height: 2rem; max-width: 100% }
label input { width: 11rem }
button { cursor: pointer }
button.start { background: var(--accent); border-color: var(--accent); color: var(--page) }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 1px }
input.curl { width: 100%; font: .8rem ui-monospace, monospace; color: var(--soft); border-color: var(--line) }
summary { font-size: .8rem; color: var(--soft); cursor: pointer }
.post { font-size: .7rem; border: 1px solid var(--soft); border-radius: .3rem; padding: 0 .3rem; color: var(--soft) }
@media (min-width: 60rem) { body { grid: "top top" auto "list view" 1fr / 27rem minmax(0, 1fr) }
  aside { border-top: 0; border-left: 1px solid var(--line) } }
@media (max-height: 30rem) { body { display: block; height: auto } aside { height: 60vh } header p { display: none } }
"""
_INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>streamlog on HOST</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>STYLE</style></head>
<body><header><h1>streamlog on HOST</h1>
<p>Start shows a command's output in the frame as it comes; Stop, or starting another one there, ends it. A browser
allows six live connections to a host: with six tabs that show output, a seventh waits.</p></header>
<main aria-label="Commands">
COMMANDS</main>
<aside aria-label="Output"><iframe name="view" title="Output" src="-/idle"></iframe></aside>
</body></html>
"""
_COMMAND = """<section aria-labelledby="NAME"><h2 id="NAME">NAME POST</h2>
<p>ABOUT</p>
<p><code tabindex="0">LINE</code></p>FORM
<details><summary>curl</summary><input class="curl" readonly aria-label="curl line for NAME" value="CURL"></details>
</section>
"""
# A form cannot send a body as it is: a command that takes one has the line for curl alone.
_FORM = """
<form action="NAME" method="METHOD" target="view">FIELDS
<div class="row"><button class="start" aria-label="Start NAME">Start</button>
<button formaction="-/idle" formmethod="get" formnovalidate aria-label="Stop NAME">Stop</button>
<button formtarget="_blank" aria-label="Open NAME in its own tab">Own tab</button>KEEP</div></form>"""
_KEEP = """
<button name="async" value="1" aria-label="Start NAME in the background">Background</button>"""
_RUNS_FRAME = """<section aria-labelledby="-runs"><h2 id="-runs">Runs that are kept</h2>
<iframe class="runs" title="Runs that are kept" src="-/runs"></iframe></section>
"""
_IDLE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Idle</title><link rel="icon" href="data:,">
<style>STYLE</style></head>
<body><p>Nothing is running here. Start a command to see its output.</p></body></html>
"""
_RUNS = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Runs</title><link rel="icon" href="data:,">
<meta http-equiv="refresh" content="3"><style>STYLE</style></head>
<body>RUNS</body></html>
"""
_RUN = """<p><a href="runs/ID?format=html" target="view">WHAT</a> <span>SINCE, STATE, BYTES bytes</span>STOP</p>
"""
_STOP = """
<form action="runs/ID" method="post"><button aria-label="Stop WHAT">Stop</button></form>"""
_RUNS_STYLE = """
body { font: .85rem/1.4 system-ui, sans-serif; margin: 0; background: var(--page); color: var(--text) }
p { margin: .2rem 0 }
a { color: var(--accent); overflow-wrap: anywhere }
span { color: var(--soft) }
form { display: inline }
button { font: inherit; background: var(--page); color: var(--text); border: 1px solid var(--soft);
  border-radius: .3rem; cursor: pointer }
"""
_IDLE_STYLE = "body { font: 1rem system-ui, sans-serif; padding: 1rem; background: var(--page); color: var(--soft) }"


def _page_reply(template: str, style: str, parts: Mapping[str, str] = MappingProxyType({})) -> Reply:
    """A page of the server's own. The parts are HTML already, by the words of the template that they replace."""
    import hashlib

    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": _INDEX_POLICY.replace("HASH", digest),
        "Vary": "Accept",
    }
    return Reply(200, headers, _fill(template, {"STYLE": style, **parts}).encode())


def _parse_form(request: Request, read_body: Callable[[int], bytes]) -> Iterator[tuple[str, str]]:
    type_ = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if type_ != "application/x-www-form-urlencoded":
        raise Error("the body must be a form (application/x-www-form-urlencoded), as curl -d sends it", 415)
    try:
        return _parse_query(read_body(_FORM_BYTES).decode("utf-8"))
    except UnicodeDecodeError:
        raise Error("the form must be UTF-8") from None


def _negotiate(accepted: Mapping[str, float]) -> str:
    """The format for an Accept header. A browser's navigation admits anything, and gets text, as curl does."""
    plain = accepted.get("text/plain", 0)
    for format_, types in (("sse", {"text/event-stream"}), ("ndjson", _NDJSON_TYPES)):
        if any(accepted.get(type_, 0) >= (plain or 0.001) for type_ in types):
            return format_
    return "html" if "text/html" in accepted and not accepted.keys() & {"text/plain", "text/*", "*/*"} else "text"


def _read_options(command: Command, request: Request, given: Mapping[str, str]) -> Options:
    """What the request says of its output: by the server's own options, or else by its Accept header."""
    if given.get("format", "text") not in _FORMATS:
        raise Error(f"parameter 'format' must be {', '.join(_FORMATS)}: {given['format'][:200]!r}")
    if not command.is_plain_text and given.get("format", "text") != "text":
        raise Error(f"parameter 'format' is of no use: the output is {command.type} as it is")
    for switch in ("footer", "timestamps", "hostname", "wait", "async", "follow"):
        if given.get(switch, "1") not in ("", "0", "1"):
            raise Error(f"parameter {switch!r} must be 0 or 1: {given[switch][:200]!r}")
    if "tail" in given and not re.fullmatch(r"[0-9]{1,9}", given["tail"]):
        raise Error(f"parameter 'tail' must be a number of lines: {given['tail'][:200]!r}")
    heartbeat = given.get("heartbeat", "")
    if "heartbeat" in given and not re.fullmatch(r"[1-9][0-9]{0,4}|0\.[1-9]", heartbeat):
        raise Error(f"parameter 'heartbeat' must be seconds, from 0.1 to 99999: {heartbeat[:200]!r}")
    format_ = given.get("format") or (_negotiate(request.accepted) if command.is_plain_text else "text")
    # A person wants to see the end; to a program the output is whole without a line of ours.
    notes = "always" if "text/html" in request.accepted else "cut"
    if "footer" in given:
        notes = "never" if given["footer"] == "0" else "always"
    hostname = socket.gethostname() if given.get("hostname", "0") != "0" else ""
    return Options(format_, notes, given.get("timestamps", "0") != "0", hostname, float(heartbeat or "inf"))


# A regular expression that means the same to Python and to a browser, which reads it with the flag v: sets, escapes,
# groups and repetitions. Not: possessive repetitions, doubled punctuation in a set, negated escapes, lookaround.
_COMMON_PATTERN = re.compile(
    r"(?:\[\^?(?:[A-Za-z0-9]-[A-Za-z0-9]|\\[dw./|()\[\]{}\\-]|([_.,:;@%+= *?^$~#!<>])(?!\1)|[A-Za-z0-9\"'])+\]"
    r"|\\[dw./|()\[\]{}\\+*?^$-]|[A-Za-z0-9_,:;@%= ~#!\"<>'&.|-]|\((?:\?:|(?!\?))|\)|[*+?](?![+*?])"
    r"|\{[0-9]{1,3}(?:,[0-9]{0,3})?\}(?![+*?]))*"
)


def _browser_pattern(parameter: Parameter) -> str:
    """The parameter's pattern for a form; empty where a browser might read it in another way."""
    pattern = {"word": r"[A-Za-z0-9_.,:@%+=\-]+", "path": r"[A-Za-z0-9_.,:@%+=\/\-]+"}.get(
        parameter.type, parameter.type
    )
    is_common = parameter.type not in ("int", "text") and _COMMON_PATTERN.fullmatch(pattern)
    return pattern if is_common else ""


def _form_fields(command: Command) -> Iterator[str]:
    """A labelled field for each parameter; and what makes the frame show a page, and not bare text."""
    if command.is_plain_text and "format" not in command.parameters:
        yield '<input type="hidden" name="format" value="html">'
    for parameter in command.parameters.values():
        name = parameter.name
        if parameter.choices:
            options = (
                f"<option{' selected' if choice == parameter.default else ''}>{html.escape(choice)}</option>"
                for choice in parameter.choices
            )
            yield f'<label>{name}<select name="{name}">{"".join(options)}</select></label>'
        else:
            attributes = {
                "type": "number" if parameter.type == "int" else "text",
                "name": name,
                "value": parameter.default or "",
                "title": parameter.problem("\0", True, False),
                "pattern": _browser_pattern(parameter),
            }
            written = " ".join(f'{key}="{html.escape(value)}"' for key, value in attributes.items() if value)
            required = "" if parameter.pattern.fullmatch("") else " required"
            yield f"<label>{name}<input {written}{required}></label>"


def _form(command: Command, can_keep: bool) -> str:
    """The template of a command's form, if one can send what it takes."""
    if command.stdin and "GET" not in command.methods:
        return ""
    return _FORM.replace("KEEP", _KEEP if can_keep and "async" not in command.parameters else "")


def _index_page(target: _Target, commands: Mapping[str, Command], keeps: Container[str]) -> Reply:
    """The commands as a page: a form for each and a frame for the output, without a script. `keeps`: those whose runs
    can be kept."""
    sections = [
        _fill(
            _COMMAND.replace("FORM", _form(command, name in keeps)),
            {
                "NAME": name,
                "POST": '<span class="post">POST</span>' if "GET" not in command.methods else "",
                "ABOUT": html.escape(command.about),
                "LINE": html.escape(command.line),
                "METHOD": "get" if "GET" in command.methods else "post",
                "FIELDS": "\n".join(_form_fields(command)),
                "CURL": html.escape(_curl_line(target, name, command)),
            },
        )
        for name, command in commands.items()
    ]
    parts = {"HOST": html.escape(socket.gethostname()), "COMMANDS": "".join(sections) + (_RUNS_FRAME if keeps else "")}
    return _page_reply(_INDEX, _COLOURS + _INDEX_STYLE, parts)


def _index_json(url: str, commands: Mapping[str, Command]) -> str:
    """The commands as {"commands": [{name, about, method, stdin, url, command, parameters: [{name, type, ...}]}]}."""
    described = [
        {
            "name": name,
            "about": command.about,
            "method": command.methods[0],
            "stdin": command.stdin,
            "url": f"{url}/{name}",
            "command": command.line,
            "parameters": [
                {
                    "name": parameter.name,
                    "type": parameter.type,
                    "choices": parameter.choices,
                    "default": parameter.default,
                    "required": parameter.default is None,
                }
                for parameter in command.parameters.values()
            ],
        }
        for name, command in commands.items()
    ]
    return json.dumps({"commands": described}, indent=1) + "\n"


def _index_text(target: _Target, commands: Mapping[str, Command]) -> str:
    """The commands as lines for a shell, each under its description."""
    lines = [f"# streamlog {__version__} on {socket.gethostname()}: each line runs a command\n"]
    for name, command in commands.items():
        lines.append(f"# {command.about or command.line}\n{_curl_line(target, name, command)}\n")
    return "\n".join(lines)


def _output_headers(command: Command, options: Options) -> dict[str, str]:
    """What is said of output as a format writes it."""
    headers = {"Content-Type": _FORMATS[options.format][1] if command.is_plain_text else command.type, "Vary": "Accept"}
    if options.format == "html":
        headers["Content-Security-Policy"] = _VIEW_POLICY
    return headers


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _is_on(given: Mapping[str, str], switch: str, default: str = "0") -> bool:
    return given.get(switch, default) != "0"


def _read_range(request: Request) -> Optional[tuple[int, Optional[int]]]:
    """The first offset that is asked for and the one behind the last (RFC 9110 section 14.1.2): of one range, not from
    the end. Any other is as good as none, which is allowed."""
    match = re.fullmatch(r"bytes=([0-9]{1,15})-([0-9]{1,19})?", request.headers.get("range", ""))
    if not match or (match[2] and int(match[2]) < int(match[1])):
        return None
    return int(match[1]), int(match[2]) + 1 if match[2] else None


class _Place(NamedTuple):
    """What of a transcript is asked for."""

    start: int
    stop: Optional[int]  # None: all that there is, and will be
    is_range: bool = False


def _find_place(kept: Kept, request: Request, given: Mapping[str, str], format_: str) -> _Place:
    """Where in a transcript to begin, and to end. Raises Error for what is not there."""
    transcript = kept.transcript
    end = transcript.end
    stop = None if _is_on(given, "follow", "1") else end
    wanted = _read_range(request) if format_ == "text" else None
    if wanted:
        first, behind = wanted
        stop = behind if stop is None else min(stop, behind or stop)
        is_beyond = first > end or (first == end and (transcript.outcome is not None or stop is not None))
        if is_beyond or first < transcript.start:
            what = f"there are {end} bytes" if is_beyond else f"what is before byte {transcript.start} is not kept"
            raise Error(f"that range cannot be had: {what}", 416, {"Content-Range": f"bytes */{end}"})
        if transcript.outcome and stop is not None:
            stop = min(stop, end)
        return _Place(first, stop, is_range=True)
    last_id = request.headers.get("last-event-id", "")
    if format_ == "sse" and re.fullmatch(r"[0-9]{1,15}", last_id):
        return _Place(min(int(last_id), end), stop)
    return _Place(transcript.find_tail(int(given["tail"])) if "tail" in given else 0, stop)


def _say_run(kept: Kept) -> str:
    return " ".join([kept.name, *(f"{name}={value}" for name, value in kept.values.items())])


def _say_state(kept: Kept) -> str:
    return kept.transcript.outcome.note if kept.transcript.outcome else "running"


def _runs_page(runs: Sequence[Kept]) -> Reply:
    """The kept runs as a page that fetches itself anew, to stand in a frame of the index page."""
    rows = []
    for kept in runs:
        parts = {
            "ID": kept.id,
            "WHAT": html.escape(_say_run(kept)),
            "SINCE": time.strftime("%H:%M:%S", time.localtime(kept.started_at)),
            "STATE": html.escape(_say_state(kept)),
            "BYTES": str(kept.transcript.end),
        }
        rows.append(_fill(_RUN.replace("STOP", "" if kept.transcript.outcome else _STOP), parts))
    return _page_reply(_RUNS, _COLOURS + _RUNS_STYLE, {"RUNS": "".join(rows) or "<p>None.</p>"})


def _runs_text(runs: Sequence[Kept]) -> str:
    """The kept runs, one a line."""
    rows = [(kept.id, _timestamp(kept.started_at), _say_run(kept), _say_state(kept)) for kept in runs]
    return "".join(f"{id_}  {since}  {what}  {state}\n" for id_, since, what, state in rows)


class Site:
    """The commands behind their URLs, and the slots that bound how many of them run at a time."""

    def __init__(
        self, commands: Mapping[str, Command], settings: Settings, reach: Reach, socket_path: str = ""
    ) -> None:
        self._commands = dict(commands)
        self._settings = settings
        self.max_runs = settings.max_runs
        self._socket_path = socket_path
        self.access = Access(settings, reach)
        self._lock = threading.Lock()  # guards the slots
        self._runs: Counter[str] = Counter()
        self._ended: Counter[tuple[str, str]] = Counter()  # runs, by name and kind of end
        self._bytes: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self.count_clients: Callable[[], int] = lambda: 0  # told by whoever has them
        self._pages: Mapping[str, Callable[[Request], Reply]] = {
            "*": lambda _: Reply(204, {}),
            "/": self._index,
            "/-/healthy": lambda _: _text_reply("ok"),
            "/-/metrics": lambda _: Reply(200, {"Content-Type": _METRICS_TYPE}, self._metrics().encode()),
            "/-/idle": lambda _: _page_reply(_IDLE, _COLOURS + _IDLE_STYLE),
            "/favicon.ico": lambda _: Reply(204, {}),  # browsers ask for it unasked, and complain of a 404
            "/robots.txt": lambda _: _text_reply("User-agent: *\nDisallow: /\n"),
        }
        self.shelf: Optional[_Shelf] = None
        self.log = _ProgramLog(settings.log if settings.insight else 0)
        # By name and method. Their functions are called at once, and give text or the way to make a run.
        self._own: Mapping[str, Mapping[str, Command]] = {}
        if settings.insight:
            set_level = Command(_set_level, "Set a logger's level; GET shows the levels", "POST")
            self._own = {
                "log": {"GET": Command(self.log.follow, "This program's log (live)")},
                "stacks": {"GET": Command(_show_stacks, "What each thread of this program is doing")},
                "level": {"GET": Command(_show_levels), "PUT": set_level, "POST": set_level},
            }

    def keep_runs(self) -> _Shelf:
        """Have runs be kept, by a server that ends them with itself."""
        self.shelf = _Shelf(self._settings, self._record_kept)
        self._pages = {**self._pages, "/-/runs": self._list_runs}
        return self.shelf

    def open_sources(self) -> None:
        """Begin to read standard input, where it is one of the commands. Raises Error."""
        for name, command in self._commands.items():
            if command.is_source and self.shelf:
                launch, make = self._prepare(name, command, {}, is_merged=True)
                start = functools.partial(self._start, name, command, make, launch, {})
                self.shelf.share(Kept(name, command, {}), start).leave()

    def answer(self, request: Request, read_body: Callable[[int], bytes]) -> Reply:
        """Answer a request. Raises Error for what is refused; nothing has been run then.

        read_body(limit) gives the request's body, read only once all else has been found right; a longer one
        than the limit is an Error.
        """
        self.access.check(request)
        if self.access.is_preflight(request):
            return Reply(204, {})
        if self.shelf and request.path.startswith("/-/runs/"):
            return self._answer_kept(self.shelf, request)
        name = request.path[1:]
        commands = self._find(name)
        page = None if commands else self._pages.get(request.path)
        if not commands and page is None:
            names = ", ".join(self._listed) or "(none)"
            raise Error(f"there is nothing at {request.path[:200]!r}; the commands are: {names}", 404)
        methods = sorted({*commands, *(_SAFE_METHODS if page or "GET" in commands else ("OPTIONS",))})
        if request.method not in methods:
            allow = ", ".join(methods)
            raise Error(f"{request.path} takes {allow}, not {request.method[:200]}", 405, {"Allow": allow})
        if request.headers.get("expect", "100-continue").lower() != "100-continue":
            raise Error("the only expectation that can be met is 100-continue", 417)
        if request.has_body and request.method in _SAFE_METHODS:
            raise Error(f"a {request.method} request takes no body: put parameters into the URL's query")
        if request.method == "OPTIONS":
            return Reply(204, {"Allow": ", ".join(methods)})
        if page is not None:
            return page(request)
        return self._run(name, commands["GET" if request.method == "HEAD" else request.method], request, read_body)

    def _find(self, name: str) -> Mapping[str, Command]:
        """What a name runs, by method; one of our own only where no command has its name."""
        command = self._commands.get(name)
        return dict.fromkeys(command.methods, command) if command else self._own.get(name, {})

    @property
    def _listed(self) -> dict[str, Command]:
        """What there is to be run, by name; what takes parameters by POST is listed so."""
        own = {name: commands.get("POST") or commands["GET"] for name, commands in self._own.items()}
        return {**self._commands, **{name: command for name, command in own.items() if name not in self._commands}}

    def _run(self, name: str, command: Command, request: Request, read_body: Callable[[int], bytes]) -> Reply:
        fields = list(_parse_query(request.query))
        values, given = self._sort_fields(name, command.parameters, fields)
        if command.stdin:
            if request.headers.get("content-type", "").lower().lstrip().startswith("multipart/form-data"):
                raise Error("the body is the command's input as it is: send it as curl -T or --data-binary does", 415)
        elif request.has_body:
            with self._lock:
                if not command.shared:
                    self._check_slot(name, command)
            fields += _parse_form(request, read_body)
            values, given = self._sort_fields(name, command.parameters, fields)
        options = _read_options(command, request, given)._replace(title=f"{name}: {command.line}")
        way = self._find_way(name, command, request, given)
        launch, make = self._prepare(name, command, values, is_merged=options.format == "text" and not way)
        if isinstance(launch, Launch) and command.stdin and request.has_body:
            make = functools.partial(Process, launch._replace(has_input=True))
        bound = {key: values.get(key, parameter.default or "") for key, parameter in command.parameters.items()}
        headers = _output_headers(command, options)
        is_own = command is self._own.get(name, {}).get(request.method)
        can_resume = is_own or (way == "shared" and self.shelf and self.shelf.find_shared(name, bound))
        if options.format == "sse" and "last-event-id" in request.headers and not can_resume:
            # A reconnect of an EventSource: its run has ended with its connection, and it must not start another.
            return Reply(204, headers)
        if request.method == "HEAD":
            return Reply(200, headers)
        format_ = _FORMATS[options.format][0](options) if command.is_plain_text else Format()
        if is_own and isinstance(launch, Call):
            result = launch.function(**launch.arguments)
            if isinstance(result, str):
                parts = (format_.start(), format_.feed("stdout", result.encode()), format_.end(Outcome(0, "", 0.0)))
                return Reply(200, headers, b"".join(parts))
            make = typing.cast(_Maker, result)
        start = functools.partial(self._start, name, command, make, launch, values)
        if way:
            return self._keep(way, Kept(name, command, bound), start, request, given)
        return Reply(200, headers, run=start(), format=format_, name=name)

    def _prepare(
        self, name: str, command: Command, values: Mapping[str, str], is_merged: bool
    ) -> tuple[Union[Launch, Call], _Maker]:
        """What is to be started, with its values in place, and the way to start it."""
        if command.is_task:
            call = command.call(name, values)
            return call, functools.partial(Task, call)
        launch = command.bind(name, values, stderr="merge" if is_merged else "separate")
        return launch, functools.partial(_Source, 0) if command.is_source else functools.partial(Process, launch)

    def _find_way(self, name: str, command: Command, request: Request, given: Mapping[str, str]) -> str:
        """Whether the run is to be kept, and how: async, wait or shared. Raises Error where it cannot be."""
        can_keep = self.shelf is not None and name in self._commands and not (command.stdin and request.has_body)
        can_keep = can_keep and not command.is_source  # of which there is one run
        preferences = re.split("[,;]", request.headers["prefer"].lower()) if "prefer" in request.headers else ()
        is_preferred = "respond-async" in (preference.strip(" \t") for preference in preferences)
        way = "shared" if command.shared else ""
        for switch in ("wait", "async"):
            if _is_on(given, switch):
                way = switch
                if not can_keep:
                    raise Error(f"parameter {switch!r} is of no use: a run is kept by the server itself, without input")
        if is_preferred and can_keep and "async" not in given:  # a preference may be left aside (RFC 7240 section 2)
            way = "async"
        if "tail" in given and way != "shared":
            raise Error(f"parameter 'tail' is of no use: {name!r} is not shared")
        return way if self.shelf else ""

    def _keep(
        self, way: str, kept: Kept, start: Callable[[], Run], request: Request, given: Mapping[str, str]
    ) -> Reply:
        """Start a run that is kept, or join a shared one, and answer by it."""
        shelf = self.shelf
        assert shelf
        if way == "async":
            shelf.keep(kept, start)
            location = f"/-/runs/{kept.id}"
            if "text/html" in request.accepted:
                format_ = f"?format={given['format']}" if "format" in given else ""
                return Reply(303, {"Location": location + format_})
            if "application/json" in request.accepted:
                return Reply(202, {"Location": location, "Content-Type": "application/json"}, _json_bytes(kept.state))
            return _text_reply(f"{self._target(request).url}{location}\n", 202, {"Location": location})
        # A range is of one run: here it would be of another each time.
        headers = {key: value for key, value in request.headers.items() if key != "range"}
        request = dataclasses.replace(request, headers=headers)
        kept.linger_seconds = 0 if way == "wait" else self._settings.linger_seconds or 0.001
        if way == "shared":
            kept = shelf.share(kept, start)
        else:
            kept.enter()
            shelf.keep(kept, start)
        try:
            return self._replay(kept, request, given)
        finally:
            kept.leave()

    def _replay(self, kept: Kept, request: Request, given: Mapping[str, str]) -> Reply:
        """Answer by what a kept run has put out, and goes on to."""
        transcript, outcome = kept.transcript, kept.transcript.outcome
        options = _read_options(kept.command, request, given)
        place = _find_place(kept, request, given, options.format)
        options = options._replace(title=f"{kept.name}: {kept.command.line}", offset=place.start)
        headers = _output_headers(kept.command, options)
        if options.format == "sse" and outcome and "last-event-id" in request.headers and place.start >= transcript.end:
            return Reply(204, headers)
        if request.method == "HEAD":
            return Reply(200, headers)
        run = _Replay(kept, place.start, place.stop, self._settings)
        if _is_on(given, "wait") and not outcome:
            return Reply(200, headers, run=run, later=lambda: self._replay(kept, request, given))
        status = 200
        if outcome:
            headers["Exit-Code"] = str(outcome.exit_code)
            status = 500 if _is_on(given, "wait") and (outcome.exit_code or outcome.reason) else 200
        # Bytes alone, as many as can be told beforehand: of a range, or all of it, and nothing of ours with them.
        is_bare = options.format == "text" and not (options.timestamps or options.hostname or options.notes == "always")
        stop = place.stop if place.stop is not None else transcript.end if outcome else None
        is_whole = not outcome or not outcome.reason or place.is_range or status == 500
        length = None
        if is_bare and is_whole and stop is not None and transcript.start <= place.start <= stop <= transcript.end:
            length = stop - place.start
            whole, run = run, _Replay(kept, place.start, stop, self._settings)
            whole.close()
        if place.is_range:
            last = (stop if stop is not None else _RANGE_MAX) - 1
            headers["Content-Range"] = f"bytes {place.start}-{last}/{transcript.end if outcome else '*'}"
            status = 206
        if is_bare and request.path.startswith("/-/runs/"):
            headers["Accept-Ranges"] = "bytes"
        is_exact = place.is_range or length is not None or not kept.command.is_plain_text
        format_ = Format() if is_exact else _FORMATS[options.format][0](options)
        return Reply(status, headers, run=run, format=format_, length=length)

    def _answer_kept(self, shelf: _Shelf, request: Request) -> Reply:
        """Show a kept run, or stop it."""
        methods = ("DELETE", "GET", "HEAD", "OPTIONS", "POST")
        if request.method not in methods:
            allow = ", ".join(methods)
            raise Error(f"{request.path} takes {allow}, not {request.method[:200]}", 405, {"Allow": allow})
        if request.has_body and request.method != "POST":
            raise Error(f"a {request.method} request takes no body: put parameters into the URL's query")
        kept = shelf.find(request.path[len("/-/runs/") :])
        try:
            if request.method == "OPTIONS":
                return Reply(204, {"Allow": ", ".join(methods)})
            return self._show_or_stop(kept, request)
        finally:
            kept.leave()

    def _show_or_stop(self, kept: Kept, request: Request) -> Reply:
        _, given = self._sort_fields("/-/runs", (), list(_parse_query(request.query)), _REPLAY_OPTIONS)
        if request.method in ("DELETE", "POST"):
            kept.stop(_ASKED)
            if request.method == "POST" and "text/html" in request.accepted:
                return Reply(303, {"Location": "../runs"})
            return Reply(202, {"Content-Type": "application/json"}, _json_bytes(kept.state))
        if "application/json" in request.accepted and "format" not in given:
            return Reply(200, {"Content-Type": "application/json", "Vary": "Accept"}, _json_bytes(kept.state))
        return self._replay(kept, request, given)

    def _list_runs(self, request: Request) -> Reply:
        runs = self.shelf.runs() if self.shelf else []
        if "text/html" in request.accepted:
            return _runs_page(runs)
        headers = {"Vary": "Accept"}
        if "application/json" in request.accepted:
            headers["Content-Type"] = "application/json"
            return Reply(200, headers, _json_bytes({"runs": [kept.state for kept in runs]}))
        return _text_reply(_runs_text(runs), headers=headers)

    def _record_kept(self, kept: Kept) -> None:
        """Count a kept run that has ended, and log it."""
        outcome = kept.run.outcome
        self.record(kept.name, outcome, kept.transcript.end)
        _log.info(
            'kept=%s command=%s exit=%d bytes=%d seconds=%.3f end="%s"',
            *(kept.id, kept.name, outcome.exit_code, kept.transcript.end, outcome.seconds, outcome.reason or "exit"),
        )

    def _start(
        self, name: str, command: Command, make: _Maker, launch: Union[Launch, Call], values: Mapping[str, str]
    ) -> Run:
        timeout = self._settings.timeout_seconds if command.timeout is None else command.timeout
        with self._lock:
            self._check_slot(name, command)
            self._runs[name] += 1
        try:
            run = make(self._settings, timeout, lambda: self._free_slot(name))
        except BaseException:
            self._free_slot(name)
            with self._lock:
                self._ended[name, "not_started"] += 1
            raise
        try:
            if _log.isEnabledFor(logging.DEBUG):
                what = _printable(f"{launch} {values}".encode(errors="replace"))
                _log.debug("started %s as %s: %s", name, run, what)
        except BaseException:  # a program that embeds us may have filters of its own
            run.close()
            raise
        return run

    @staticmethod
    def _sort_fields(
        name: str,
        parameters: Container[str],
        fields: Sequence[tuple[str, str]],
        known: Sequence[str] = _SERVER_OPTIONS,
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Part the fields of a request into the command's parameters and the server's own options."""
        values: dict[str, str] = {}
        options: dict[str, str] = {}
        for key, value in fields:
            target = values if key in parameters else options
            if key in target:
                raise Error(f"parameter {key[:200]!r} of {name!r} is given twice")
            if target is options and key not in known:
                names = ", ".join([*(parameters if isinstance(parameters, Mapping) else ()), *known])
                raise Error(f"{name!r} has no parameter {key[:200]!r}; known are: {names}")
            target[key] = value
        return values, options

    def _check_slot(self, name: str, command: Command) -> None:
        """Refuse a run for which there is no slot now. To be called with the lock."""
        if sum(self._runs.values()) >= self.max_runs:
            raise _busy(f"{self.max_runs} of {self.max_runs} runs are going on")
        if command.max is not None and self._runs[name] >= command.max:
            raise _busy(f"{command.max} of {command.max} runs of {name!r} are going on")

    def _free_slot(self, name: str) -> None:
        with self._lock:
            self._runs[name] -= 1

    def replace(self, commands: Mapping[str, Command]) -> None:
        """Serve these commands from now on. Runs go on, and counts stay."""
        self._commands = dict(commands)

    def forget_runs(self) -> None:
        """Count no runs of a parent, in a process that was forked off."""
        self._lock = threading.Lock()
        self._runs.clear()

    def record(self, name: str, outcome: Outcome, sent_bytes: int) -> None:
        """Count a run that has ended, for the metrics."""
        with self._lock:
            self._ended[name, outcome.kind] += 1
            self._bytes[name] += sent_bytes
            self._seconds[name] += outcome.seconds

    def _metrics(self) -> str:
        """What has been counted, in Prometheus' text format (version 0.0.4)."""
        with self._lock:
            families = (
                ("runs_total", "counter", "Runs that have ended.", self._ended),
                ("runs_active", "gauge", "Runs that are going on.", self._runs),
                ("output_bytes_total", "counter", "Bytes of answers of runs.", self._bytes),
                ("run_seconds_total", "counter", "Time that runs have taken.", self._seconds),
            )
            lines = []
            for name, type_, about, counts in families:
                lines += [f"# HELP streamlog_{name} {about}", f"# TYPE streamlog_{name} {type_}"]
                for key, count in sorted(counts.items()):
                    labels = zip(("command", "outcome"), key if isinstance(key, tuple) else (key,))
                    written = ",".join(f'{label}="{value}"' for label, value in labels)
                    lines.append(f"streamlog_{name}{{{written}}} {count:.10g}")
        lines += ["# HELP streamlog_clients Connections that are open.", "# TYPE streamlog_clients gauge"]
        return "\n".join([*lines, f"streamlog_clients {self.count_clients()}", ""])

    def _target(self, request: Request) -> _Target:
        path = self._socket_path if request.host == "localhost" else ""  # by another name it was a proxy that asked
        url = f"{request.scheme or self._settings.scheme}://{request.authority}{request.prefix}"
        return _target(url, self._settings.token, path)

    def _index(self, request: Request) -> Reply:
        target = self._target(request)
        headers = {"Vary": "Accept"}
        if "text/html" in request.accepted:
            return _index_page(target, self._listed, self._commands if self.shelf else ())
        if "application/json" in request.accepted:
            headers["Content-Type"] = "application/json"
            return Reply(200, headers, _index_json(target.url, self._listed).encode())
        return _text_reply(_index_text(target, self._listed), headers=headers)


# ---------------------------------------------------------------------------------------------
# server: sockets. The listener, a thread for each connection, and the pump that moves output to a client

_RECEIVE_BYTES = 64 * 1024
# By this the end of a client shows before all that it has sent is read. Where there is none, it shows when more is read
# or written.
_PEER_CLOSED = getattr(select, "POLLRDHUP", 0)
# Time for a client to read an answer that ends in a close, while it may still be sending (RFC 9112 section 9.6).
_LINGER_SECONDS = 2.0
# Time for what is left of an answer to reach the client while the server closes.
_CUT_SECONDS = 0.5
_BODY_SECONDS = 30.0
_WAITING_MAX = 4  # threads that wait for the next client
_WARN_SECONDS = 60.0
_LOCK_SECONDS = 5.0
_REPLY_SECONDS = 30.0
# More threads than this are of no use on one machine; and a descriptor limit above it is not asked for.
_DESCRIPTORS_MAX = 65536
_AHEAD_BYTES = 1 << 20  # of output that is kept while a program writes input
_OWN_DESCRIPTORS = 16  # of the server itself, and of a run that is being started
_RUN_DESCRIPTORS = 6  # of a run that goes on: its outputs, the watch for its exit, and what a kept one has
_COMMON_HEADERS = (
    ("Server", "streamlog"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "SAMEORIGIN"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    (
        "Referrer-Policy",
        "same-origin",
    ),  # without a referrer a browser says `Origin: null` even to the page's own server
    ("Cache-Control", "no-cache, no-store"),
)


def _make_tls_context(settings: Settings) -> ssl.SSLContext:
    """What TLS is spoken with: 1.2 or newer, HTTP/1.1. Raises ConfigError for files that are of no use."""
    import ssl

    def refuse() -> str:
        raise ConfigError(f"the key in {key!r} is encrypted: write it without a pass phrase (openssl pkey), mode 600")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)  # which LibreSSL has not
    context.set_alpn_protocols(["http/1.1"])
    cert, key = settings.tls_cert, settings.tls_key or settings.tls_cert
    try:
        for path in (cert, key):
            open(path, "rb").close()  # else the error does not tell which of them is missing
        context.load_cert_chain(cert, key, refuse)
    except ssl.SSLError as error:
        said = f" ({error.reason})" if error.reason else ""
        raise ConfigError(
            f"cannot use the certificate {cert!r} with the key {key!r}: both must be PEM, and of a pair; "
            f"the key is looked for beside the certificate unless --tls-key names it{said}"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read {path!r}: {error.strerror}") from None
    return context


class _Tls:
    """One connection's TLS, without any I/O: what the socket has given in, what it is to be given out."""

    def __init__(self, context: ssl.SSLContext) -> None:
        import ssl

        self._not_yet, self._at_end = ssl.SSLWantReadError, ssl.SSLZeroReturnError
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.is_begun = False
        self.is_ready = False  # the handshake is over
        self.is_over = False  # the client has ended it

    def decrypt(self, data: bytes) -> bytes:
        """What the client says in what has come. What is owed to it for that is given out by `encrypt`."""
        self._incoming.write(data)
        self.is_begun = True
        text = b""
        try:
            if not self.is_ready:
                self._object.do_handshake()
                self.is_ready = True
            while not self.is_over:
                piece = self._object.read(_RECEIVE_BYTES)
                text += piece
                self.is_over = not piece
        except self._not_yet:
            pass
        except OSError as error:  # any SSLError: the end that TLS has for it, or something that is not TLS
            self.is_over = True
            if not isinstance(error, self._at_end):
                _log.debug("TLS: %s", error)
        return text

    def encrypt(self, data: bytes) -> bytes:
        """What the socket is to send, with everything that is owed. Raises OSError (ssl.SSLError)."""
        view = memoryview(data)
        while view:
            view = view[self._object.write(view) :]  # a record of 16 KiB at a time
        return self._outgoing.read()

    def end(self) -> bytes:
        """The close_notify, by which a client tells an end from a cut (RFC 8446 section 6.1)."""
        with contextlib.suppress(OSError):
            self._object.unwrap()
        return self._outgoing.read()


class _Client:
    """The other end of a connection: its socket, what it has sent ahead, and what it has not taken yet.

    The socket never blocks. That the client has gone shows as the end of what it sends, so it is read from all the
    while, into `inbox`: readable is not the same as gone, as it may only have sent its next request.
    """

    def __init__(self, sock: socket.socket, address: object, tls: Optional[_Tls], stall_seconds: float) -> None:
        self.sock = sock
        self.name = ":".join(map(str, address[:2])) if isinstance(address, tuple) else "unix"
        self.inbox = bytearray()
        self.outbox = memoryview(b"")
        self.lost = ""  # why there is nobody to talk to, once there is not
        self.is_evicted = False
        self.is_held = False  # not read from: the command does not take what it has sent
        self.idle_since: Optional[float] = None  # while it is being waited for, and not answered
        self.run: Optional[Run] = None
        self._tls = tls
        self._stall_seconds = stall_seconds or math.inf
        self._moved_at = 0.0  # when the outbox was filled, or something was taken, at last
        self._queued_bytes = 0  # of what was taken from the outbox, those that the system still held then
        sock.setblocking(False)

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def events(self) -> int:
        """What to poll the socket for."""
        return (_PEER_CLOSED if self.is_held else select.POLLIN) | (select.POLLOUT if self.outbox else 0)

    @property
    def deadline(self) -> float:
        """The moment until which it must have taken something of what waits for it."""
        return self._moved_at + self._stall_seconds if self.outbox else math.inf

    @property
    def is_ready(self) -> bool:
        """Whether it can be talked to: TLS is agreed on, where there is TLS."""
        return self._tls is None or self._tls.is_ready

    def turn(self, events: int) -> None:
        """Act on what poll has said of the socket. Raises Error for one who speaks plain HTTP where TLS is due."""
        if events & select.POLLOUT:
            self._flush()
        if events & ~select.POLLOUT:
            if self.is_held:
                self.lose()
            else:
                self._receive()
        if self.outbox and time.monotonic() >= self.deadline:
            self._check_stall()

    def send(self, *parts: _Piece) -> None:
        """Send what the socket takes, in one go; a copy of the rest waits in the outbox."""
        sent = 0
        try:
            if self._tls:
                parts = (self._tls.encrypt(b"".join(parts)),)
            if not self.outbox and any(parts):
                self._moved_at = time.monotonic()
                sent = self.sock.sendmsg(parts)
        except BlockingIOError:
            pass
        except OSError:
            self.lose()
            return
        if sent < sum(map(len, parts)):
            self.outbox = memoryview(b"".join((self.outbox, *parts))[sent:])
            self._flush()

    def end(self) -> None:
        """Say that nothing more will come."""
        tls, self._tls = self._tls, None  # what still comes is of no interest
        if tls and not self.lost:
            self.send(tls.end())
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def settle(self, deadline: float, closing: int) -> None:
        """Wait until the client has taken all, or has gone, or its time is over: soon, where the server closes."""
        others = {closing: select.POLLIN}
        while self.outbox and time.monotonic() < deadline:
            ready = _poll({self.fileno(): self.events, **others}, min(deadline, self.deadline))
            self.turn(ready.pop(self.fileno(), 0))
            if ready:
                others, deadline = {}, min(deadline, time.monotonic() + _CUT_SECONDS)

    def _flush(self) -> None:
        try:
            while self.outbox:
                self.outbox = self.outbox[self.sock.send(self.outbox) :]
                self._moved_at = time.monotonic()
        except BlockingIOError:
            self._queued_bytes = self._count_queued()
        except OSError:
            self.lose()

    def _check_stall(self) -> None:
        """Let the client go if it has taken nothing. The socket alone does not tell: it turns writable only once a good
        part of what the system holds has been taken, which from a slow client can be minutes."""
        before, self._queued_bytes, self._moved_at = self._queued_bytes, self._count_queued(), time.monotonic()
        if self._queued_bytes >= before:
            self.lose(_CLIENT_STALLED)

    def _count_queued(self) -> int:
        """What the system holds for the client, as far as it tells (tcp(7), SIOCOUTQ)."""
        with contextlib.suppress(OSError):
            return _count_bytes(self.fileno(), termios.TIOCOUTQ)
        return 0

    def _receive(self) -> None:
        """Take in what has come. One who sends on and on while he is being answered is as good as gone: he cannot be
        held back, for behind what is not read his leaving would not show."""
        try:
            data = self.sock.recv(_RECEIVE_BYTES) if len(self.inbox) <= _HEAD_BYTES else b""
        except BlockingIOError:
            return
        except OSError:
            data = b""
        is_over = not data
        if self._tls and data:
            if not self._tls.is_begun and _REQUEST_LINE.match(data):
                self._tls = None
                self.inbox += data
                raise Error("this port speaks TLS: use https")
            data = self._tls.decrypt(data)
            self.send(b"")
            is_over = self._tls.is_over
        self.inbox += data
        if is_over:
            self.lose()

    def lose(self, why: str = _CLIENT_GONE) -> None:
        """Give it up: there is nobody to talk to any more."""
        self.lost = self.lost or why
        self.outbox = memoryview(b"")

    def close(self, is_reset: bool = False) -> None:
        """Close the socket, by a reset if so asked (an HTTP/1.0 client takes any other end for a whole answer)."""
        with contextlib.suppress(OSError):
            if is_reset:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class _Upload:
    """A request's body on its way to the command: taken off the inbox a piece at a time, as the command takes it."""

    def __init__(self, request: Request, stdin: _Stdin) -> None:
        self._stdin: Optional[_Stdin] = stdin
        self._chunks = _Chunks() if request.is_chunked else None
        self._left = request.body_bytes
        self._held = memoryview(b"")
        self._is_whole = False

    @property
    def is_held_up(self) -> bool:
        """Whether the command has not taken yet what was taken for it."""
        return bool(self._held)

    @property
    def watched(self) -> dict[int, int]:
        """The descriptor to poll, where there is something to write."""
        return {self._stdin.fileno(): select.POLLOUT} if self._stdin and self._held else {}

    def take(self, inbox: bytearray) -> None:
        """Take the next piece, once the one before has gone; behind the last is the end. Raises Error."""
        if self._held or self._is_whole:
            return
        if self._chunks:
            piece = self._chunks.take(inbox)
            self._is_whole = self._chunks.is_over
        else:
            piece = bytes(inbox[: self._left])
            del inbox[: self._left]
            self._left -= len(piece)
            self._is_whole = not self._left
        if self._stdin:
            self._held = memoryview(piece + self._stdin.end_mark(piece) if self._is_whole else piece)
            self._pass_on()

    def turn(self, ready: dict[int, int]) -> None:
        """Act on what poll has said, and take that out."""
        if self._stdin and ready.pop(self._stdin.fileno(), 0):
            self._pass_on()

    def _pass_on(self) -> None:
        assert self._stdin
        try:
            if self._held:
                self._held = self._stdin.write(self._held)
        except BrokenPipeError:  # it wants no more, which is no mistake: the rest of the body is read over
            self._held = memoryview(b"")
            self.close()
        if self._is_whole and not self._held and self._stdin:
            self._stdin.end()
            self._stdin = None

    def close(self) -> None:
        """Let go of the command's standard input. May be called twice."""
        stdin, self._stdin = self._stdin, None
        if stdin:
            stdin.close()


def _join_headers(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, str]:
    """Headers of two sources; what both have is a list (RFC 9110 section 5.3), or more of a policy's rules."""
    joined = dict(one)
    for name, value in other.items():
        separator = "; " if name == "Content-Security-Policy" else ", "
        joined[name] = f"{one[name]}{separator}{value}" if name in one else value
    return joined


@functools.lru_cache(maxsize=1)
def _http_date(seconds: int) -> str:
    """A moment for the header Date (RFC 9110 section 5.6.7)."""
    return email.utils.formatdate(seconds, usegmt=True)


def _head_bytes(status: int, headers: Mapping[str, str], is_reusable: bool) -> bytes:
    """The head of an answer. Raises ValueError rather than let a value break out of its line."""
    fields = [("Date", _http_date(int(time.time()))), *_COMMON_HEADERS, *headers.items()]
    if not is_reusable:
        fields.append(("Connection", "close"))
    lines = [f"{name}: {value}" for name, value in fields]
    if not "".join(lines).isprintable():
        raise ValueError(f"a header holds a control character: {lines!r}")
    return "\r\n".join([f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", *lines, "\r\n"]).encode("latin-1")


class _Handler(socketserver.BaseRequestHandler):
    """One connection: request after request, in a thread that has no other. Its `request` is a _Client."""

    server: Server
    request: _Client

    def setup(self) -> None:
        self._client = self.request
        self._closing = self.server.closing
        self._body_bytes = 0  # of the answer that is being sent
        self._must_reset = False

    def handle(self) -> None:
        with contextlib.suppress(_ClientGone):
            is_reusable = True
            while is_reusable:
                self._client.idle_since = time.monotonic()
                is_reusable = self._serve_one()

    def finish(self) -> None:
        """Let the client read the answer first: closing while it is still sending resets what it has not read."""
        client = self._client
        if self._must_reset or client.lost == _CLIENT_STALLED:
            client.close(is_reset=True)
            return
        client.end()
        client.inbox.clear()  # one that is full would take its client for gone
        deadline = time.monotonic() + _LINGER_SECONDS
        with contextlib.suppress(_ClientGone):
            while self._receive(deadline):
                client.inbox.clear()

    def _serve_one(self) -> bool:
        """Read a request, answer and log it. Returns whether the connection may take another."""
        request = None
        first_line = b""
        try:
            head = self._read_head()
            started = time.monotonic()
            first_line = head.partition(b"\r\n")[0]
            request = parsed = _parse_head(head)
            reply = self.server.site.answer(request, lambda limit: self._read_body(parsed, limit))
        except Error as error:
            started = time.monotonic()
            first_line = first_line or bytes(self._client.inbox).partition(b"\r\n")[0]
            reply = _text_reply(f"{error}\n", error.status, error.headers)
        if request is not None and reply.status == 401 and "authorization" in request.headers:
            self._hold_back()
        self._body_bytes = 0
        is_reusable = request is not None and not request.wants_close and not request.has_body
        if reply.later and reply.run and request:
            reply = self._await_end(reply, reply.run)
        if reply.run is None or request is None:
            self._send_whole(request, reply, is_reusable)
            exit_code, end = "-", "answered"
        else:
            outcome = self._send_run(request, reply, reply.run, is_reusable)
            if self._client.lost:
                outcome = outcome._replace(reason=self._client.lost)
            if reply.name:
                self.server.site.record(reply.name, outcome, self._body_bytes)
            exit_code, end = str(outcome.exit_code) if outcome.is_known else "-", outcome.reason
            is_reusable = is_reusable and not end
        _log.info(
            'client=%s request="%s" status=%d exit=%s bytes=%d seconds=%.3f end="%s"',
            *(self._client.name, _printable(first_line), reply.status, exit_code, self._body_bytes),
            *(time.monotonic() - started, self._client.lost or end or "exit"),
        )
        return is_reusable and not self._client.lost

    def _receive(self, deadline: float) -> bool:
        """Wait for more from the client; whether it came in time. Raises _ClientGone at its end, or the server's."""
        client = self._client
        ready = _poll({client.fileno(): select.POLLIN, self._closing: select.POLLIN}, deadline)
        events = ready.pop(client.fileno(), 0)
        client.turn(events)
        if client.lost or ready:
            raise _ClientGone
        return bool(events)

    def _hold_back(self) -> None:
        """Make guesses at a token slow. Meanwhile the connection is one that makes room for others."""
        client = self._client
        client.idle_since = time.monotonic()
        watched = {self._closing: select.POLLIN, client.fileno(): 0}  # poll tells of its eviction unasked
        _poll(watched, time.monotonic() + self.server.settings.refusal_seconds)

    def _read_head(self) -> bytes:
        """The next head. A connection may be silent for the idle time; a head, once begun, must be whole in its own."""
        client, settings = self._client, self.server.settings
        deadline = time.monotonic() + settings.head_seconds
        while not client.is_ready:
            if not self._receive(deadline):
                raise _ClientGone
        deadline = time.monotonic() + settings.idle_seconds
        is_begun = False
        seen = 0
        while True:
            while client.inbox.startswith(b"\r\n"):  # some clients end a body so (RFC 9112 section 2.2)
                del client.inbox[:2]
            end = _find_head(client.inbox, seen)
            if end:
                break
            seen = len(client.inbox)
            if client.inbox and not is_begun:
                is_begun, deadline = True, min(deadline, time.monotonic() + settings.head_seconds)
            if not self._receive(deadline):
                if is_begun:
                    raise Error(f"the request's head must arrive within {settings.head_seconds:g} s", 408)
                raise _ClientGone
        if not self.server.claim(client):
            raise _ClientGone
        head = bytes(client.inbox[:end])
        del client.inbox[:end]
        return head

    def _read_body(self, request: Request, limit: int) -> bytes:
        """The request's body, in full."""
        client, size = self._client, request.body_bytes
        chunks = _Chunks() if request.is_chunked else None
        if size <= limit:
            self._ask_for_body(request)
        deadline = time.monotonic() + _BODY_SECONDS
        client.idle_since = time.monotonic()  # it makes room for others until its request is whole
        body = b""
        while True:
            body = body + chunks.take(client.inbox) if chunks else bytes(client.inbox[:size])
            if max(size, len(body)) > limit:
                raise Error(f"the body may have {limit} bytes at most", 413)
            if chunks.is_over if chunks else len(body) == size:
                break
            if not self._receive(deadline):
                raise Error(f"the request's body must arrive within {_BODY_SECONDS:g} s", 408)
        del client.inbox[:size]
        if not self.server.claim(client):
            raise _ClientGone
        return body

    def _ask_for_body(self, request: Request) -> None:
        """Ask for the body, if the client waits for that (RFC 9110 section 10.1.1)."""
        if "expect" in request.headers and not request.is_http_1_0 and not self._client.inbox:
            self._client.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _headers(self, request: Optional[Request], reply: Reply) -> dict[str, str]:
        """The headers of an answer: its own, and what is said of those who may use it."""
        return _join_headers(reply.headers, self.server.site.access.headers(request))

    def _send_whole(self, request: Optional[Request], reply: Reply, is_reusable: bool) -> None:
        """Send an answer that is known beforehand."""
        headers = self._headers(request, reply)
        is_head = request is not None and request.method == "HEAD"
        if reply.status != 204 and not (is_head and reply.status == 200):
            headers["Content-Length"] = str(len(reply.body))
        body = b"" if is_head else reply.body
        self._body_bytes = len(body)
        self._client.send(_head_bytes(reply.status, headers, is_reusable) + body)
        self._client.settle(time.monotonic() + _REPLY_SECONDS, self._closing)

    def _await_end(self, reply: Reply, run: Run) -> Reply:
        """Wait for a kept run to end; then its answer is known. Raises _ClientGone, or the server's end."""
        client = self._client
        assert isinstance(run, _Replay)
        assert reply.later
        try:
            while True:
                ready = run.wait_for_end({client.fileno(): select.POLLIN, self._closing: select.POLLIN})
                if not ready:
                    try:
                        return reply.later()
                    except Error as error:
                        return _text_reply(f"{error}\n", error.status, error.headers)
                client.turn(ready.pop(client.fileno(), 0))
                if client.lost or ready:
                    raise _ClientGone
        finally:
            run.close()

    def _send_run(self, request: Request, reply: Reply, run: Run, is_reusable: bool) -> Outcome:
        """Send what a run puts out, as it comes, and then how it ended, in the way the client can tell."""
        client, format_ = self._client, reply.format or Format()
        client.run = run
        stdin = run.take_input()
        upload = _Upload(request, stdin) if stdin else None
        is_chunked = not request.is_http_1_0 and reply.length is None
        framing = {"X-Accel-Buffering": "no"}  # else nginx collects the output
        if reply.length is not None:
            framing["Content-Length"] = str(reply.length)
        if is_chunked:
            framing.update({"Transfer-Encoding": "chunked", "Trailer": "Exit-Code"})
        try:
            # For HTTP/1.0 a close would be the proper end of any answer that does not say how long it is.
            self._must_reset = not is_chunked and reply.length is None
            if upload:
                self._ask_for_body(request)
            client.send(_head_bytes(reply.status, {**self._headers(request, reply), **framing}, is_reusable))
            self._write(format_.start(), is_chunked)
            self._pump(run, format_, is_chunked, upload)
            outcome = run.outcome
            self._write(format_.end(outcome), is_chunked)
            if reply.length not in (None, self._body_bytes):
                outcome = outcome._replace(reason=_OVERTAKEN)
            # Without the final chunk the client can tell a cut answer from a whole one (RFC 9112 section 8).
            if is_chunked and not outcome.reason:
                client.send(b"0\r\nExit-Code: %d\r\n\r\n" % outcome.exit_code if outcome.is_known else b"0\r\n\r\n")
            if outcome.reason:  # its slot does not wait for the client
                run.close()
            client.settle(time.monotonic() + _REPLY_SECONDS if outcome.reason else math.inf, self._closing)
            if client.outbox and not outcome.reason:
                outcome = outcome._replace(reason=_SHUTTING_DOWN)
            self._must_reset = bool(outcome.reason) and not is_chunked and reply.length is None
        finally:
            run.close()
            client.run, client.is_held = None, False
            if upload:
                upload.close()
        return outcome

    def _pump(self, run: Run, format_: Format, is_chunked: bool, upload: Optional[_Upload]) -> None:
        """Move output from the run to the client, and input from the client to the run, until the run is over.

        Nothing is read while the client has not taken all of what was read before, so that no more than a block is
        ever held here, and a slow client slows its own command and nothing else; nor is the client read from while
        its command does not take its input. A client that leaves ends the run, also when the command is silent; what
        still comes then is dropped.
        """
        client, closing = self._client, self._closing
        peer = client.fileno()
        while not run.is_over:
            if upload:
                self._take_input(upload)
            watched = {peer: client.events, **(upload.watched if upload else {})}
            if client.lost:
                watched = {}
                run.stop(client.lost)
            if not run.reason:
                watched[closing] = select.POLLIN
            is_paused = bool(client.outbox)
            ready = run.wait(watched, is_paused, client.deadline if is_paused else format_.due)
            if is_paused or peer in ready:
                client.turn(ready.pop(peer, 0))
            if upload:
                upload.turn(ready)
            if ready.pop(closing, 0):
                run.stop(_SHUTTING_DOWN)
                if self.server.is_killing:
                    run.kill()
            for descriptor in ready:
                self._write(self._take_output(run, descriptor, format_), is_chunked)
            if not is_paused and time.monotonic() >= format_.due:
                self._write(format_.pause(), is_chunked)

    @staticmethod
    def _take_output(run: Run, descriptor: int, format_: Format) -> _Piece:
        """The next piece of output, as the client gets it."""
        data = run.view(descriptor, format_.block_bytes)
        skipped, run.skipped_bytes = run.skipped_bytes, 0
        if skipped and not format_.can_skip:  # what follows would look like what is missing
            run.stop(_OVERTAKEN)
            return b""
        note = format_.skip(skipped) if skipped else b""
        piece = format_.feed(run.stream, data) if data else b""
        return note + piece if note else piece

    def _take_input(self, upload: _Upload) -> None:
        if self._client.lost:  # what follows something malformed would be taken for the rest
            return
        try:
            upload.take(self._client.inbox)
        except Error as error:
            self._client.lose(str(error))
        self._client.is_held = upload.is_held_up

    def _write(self, data: _Piece, is_chunked: bool) -> None:
        """Send a piece of the body, as one chunk in one send. An empty piece must not become one: that is the last."""
        if data and not self._client.lost:
            self._body_bytes += len(data)
            if is_chunked:
                self._client.send(b"%x\r\n" % len(data), data, b"\r\n")
            else:
                self._client.send(data)


def _descriptor_limit(limit: int) -> int:
    """A limit of RLIMIT_NOFILE as a number that can be counted on."""
    return _DESCRIPTORS_MAX if limit == resource.RLIM_INFINITY else min(limit, _DESCRIPTORS_MAX)


def _find_address(bind: str, port: int) -> tuple[int, Any]:
    """The address family, and the address in it: (host, port), or the path of a unix socket. Raises OSError."""
    if bind.startswith("unix:"):
        if not bind[5:] or "\0" in bind:
            raise ConfigError(f"a unix socket needs a path, as in unix:/run/streamlog.sock: {bind!r}")
        return socket.AF_UNIX, bind[5:]
    family, _, _, _, address = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return family, address[:2]


def _find_reach(family: int, address: Any) -> Reach:
    if family == socket.AF_UNIX:
        return Reach.UNIX
    is_loopback = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
    return Reach.LOOPBACK if is_loopback else Reach.NETWORK


@contextlib.contextmanager
def _lock_folder(path: str) -> Iterator[None]:
    """Hold off others that make a socket in the same folder: one that does not listen yet looks like a dead one's."""
    try:
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    except PermissionError:  # it may be written to and searched only: then there is no lock
        yield
        return
    deadline = time.monotonic() + _LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                _poll({}, time.monotonic() + 0.02)  # nothing tells by event that it is free
        yield
    finally:
        os.close(folder)


def _clear_socket(path: str) -> None:
    """Remove the socket of a server that has died (unix(7)). Raises OSError if there is one that lives."""
    with contextlib.suppress(FileNotFoundError), contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
        found = os.lstat(path)
        if not stat.S_ISSOCK(found.st_mode):
            raise OSError(errno.EEXIST, "there is a file that is no socket")
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            if os.path.samestat(found, os.lstat(path)):  # and not that of one that starts at the same time
                os.unlink(path)
        else:
            raise OSError(errno.EADDRINUSE, "another server is using it")


def _tune(sock: socket.socket, keepalive_seconds: int) -> None:
    """Send small pieces at once, and ask a silent peer whether it is still there (tcp(7))."""
    # Without TCP_NODELAY the end of an answer waits for the acknowledgement of its head, which comes 40 ms late.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", 0x10))  # the latter on macOS
    sock.setsockopt(socket.IPPROTO_TCP, idle, keepalive_seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, keepalive_seconds // 3))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


# What this program has open: servers in threads of their own, streams, applications.
_open: weakref.WeakSet[Union[Server, Stream, _Application]] = weakref.WeakSet()


@functools.cache
def _watch_program() -> None:
    """Have what is open closed when the program ends, and disowned where it forks."""

    def close() -> None:
        for owner in list(_open):
            owner.shutdown()
        for owner in list(_open):
            owner.close()

    def disown() -> None:
        for owner in list(_open):
            owner.disown()

    atexit.register(close)
    os.register_at_fork(after_in_child=disown)


class _Gate:
    """Where threads wait for a client, or for the server's end. Of those that wait one is let through, and the next one
    when that has reopened it (epoll_ctl(2), EPOLLONESHOT); where there is no epoll, each client lets all through."""

    def __init__(self, listener: int, closing: int) -> None:
        self._listener, self._closing = listener, closing
        self._epoll: Any = None

    def open(self) -> None:
        """To be called by the process that serves: those that share it could not pass when one of them had died."""
        if hasattr(select, "epoll"):
            self._epoll = select.epoll()
            self._epoll.register(self._closing, select.EPOLLIN)
            self._epoll.register(self._listener, select.EPOLLIN | select.EPOLLONESHOT)

    def wait(self) -> None:
        if self._epoll is None:
            _poll({self._listener: select.POLLIN, self._closing: select.POLLIN})
        else:
            self._epoll.poll(maxevents=1)

    def reopen(self) -> None:
        if self._epoll is not None:
            self._epoll.modify(self._listener, select.EPOLLIN | select.EPOLLONESHOT)

    def close(self) -> None:
        if self._epoll is not None:
            self._epoll.close()


class Server(socketserver.ThreadingTCPServer):
    """The commands, behind a listening socket. Binds at once: OSError or ConfigError where it may not.

    commands: by name. settings: see Settings. listener: a socket that listens already, in place of one at
    `settings.bind`; it is closed with the server. `url` and `port` say where it listens. `serve_forever` serves until
    `shutdown`; `start` does so in threads. Close it with `close`, or use it as a context manager.
    """

    # What http.server's ThreadingHTTPServer is; that would load http.client, and so ssl, where nobody speaks TLS.
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 4096  # at most what the system allows (listen(2)); beyond it, connecting takes a second
    allow_reuse_port = False  # a second server at the same address is a mistake

    def __init__(
        self,
        commands: Mapping[str, Command],
        settings: Settings = Settings(),
        listener: Optional[socket.socket] = None,
    ) -> None:
        if listener is None:
            self.address_family, address = _find_address(settings.bind, settings.port)
        else:
            self.address_family, address = listener.family, listener.getsockname()
        self.reach = _find_reach(self.address_family, address)
        if self.reach is Reach.NETWORK and not settings.token and not settings.no_auth:
            raise ConfigError(
                f"others reach {address[0]}, and could run every command: set a token (STREAMLOG_TOKEN or "
                "--token-file), bind (or ListenStream=) 127.0.0.1 and come by ssh -L, or say --no-auth to allow it"
            )
        self.settings = settings
        self.socket_path = os.fsdecode(address) if self.reach is Reach.UNIX else ""
        self._made_socket: Optional[os.stat_result] = None  # the file of it, if it is ours to remove
        if sum(command.is_source for command in commands.values()) > 1:
            raise ConfigError("standard input can be served once: leave one NAME=-")
        self.site = Site(commands, settings, self.reach, self.socket_path)
        self._shelf = self.site.keep_runs()
        self._tls_context = _make_tls_context(settings) if settings.tls_cert else None
        self.is_killing = False
        self._lock = threading.RLock()  # guards the clients; re-entrant for shutdown() in a signal handler
        self._clients: dict[_Client, threading.Thread] = {}
        self.site.count_clients = self._clients.__len__
        self._waiting: set[threading.Thread] = set()  # those that wait for a client
        self._is_begun = False
        self._warned_at = -math.inf
        super().__init__(address, _Handler, bind_and_activate=False)
        try:
            if listener is None:
                self.server_bind()
                self.server_activate()
            else:
                self.socket.close()
                self.socket = listener
                self.server_address = address
            self.socket.setblocking(False)
            # Every thread polls `closing` beside its own work: closing the writer wakes them all.
            self.closing, writer = os.pipe()
            self._gate = _Gate(self.fileno(), self.closing)
        except BaseException:
            self.server_close()
            raise
        self._closing_writer: Optional[int] = writer
        # Half the descriptors are for clients, and half for their runs: or runs could shut all others out.
        half = _descriptor_limit(resource.getrlimit(resource.RLIMIT_NOFILE)[0]) // 2
        self._client_max = half
        run_max = max(1, (half - _OWN_DESCRIPTORS) // _RUN_DESCRIPTORS)
        if run_max < settings.max_runs:
            _log.warning("of %d runs only %d have descriptors: ulimit -n", settings.max_runs, run_max)
            self.site.max_runs = run_max
        try:
            self.site.open_sources()
        except BaseException:
            self.close()
            raise

    def server_bind(self) -> None:
        """Bind to the address, or make the file of a unix socket."""
        if not self.socket_path:
            socketserver.TCPServer.server_bind(self)
            return
        with _lock_folder(self.socket_path):
            _clear_socket(self.socket_path)
            self.socket.bind(self.socket_path)
            self._made_socket = os.stat(self.socket_path)
            os.chmod(self.socket_path, 0o600)  # in time: nobody can connect before it listens
            self.server_activate()  # listen(2), which may be called again

    def server_close(self) -> None:
        """Close the listener, and remove the file of a unix socket if it is still ours."""
        super().server_close()
        made, self._made_socket = self._made_socket, None
        with contextlib.suppress(OSError):
            if made and os.path.samestat(made, os.lstat(self.socket_path)):
                os.unlink(self.socket_path)

    @property
    def port(self) -> int:
        """The port it listens on, also where port 0 was asked for; 0 for a unix socket."""
        return 0 if self.reach is Reach.UNIX else int(self.server_address[1])

    @property
    def url(self) -> str:
        """The address for a browser, without a slash at the end; for a unix socket, `unix:` and its path."""
        if self.reach is Reach.UNIX:
            return f"unix:{self.socket_path}"
        host = str(self.server_address[0])
        return f"{self.settings.scheme}://" + (f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}")

    @property
    def is_closing(self) -> bool:
        """Whether shutdown has been called."""
        return self._closing_writer is None

    def start(self) -> Server:
        """Serve in threads of its own, and return at once. The end of the program closes it too."""
        _watch_program()
        _open.add(self)
        self.begin()
        return self

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve, and return at shutdown. (Woken by a descriptor, so that there is no interval to poll at.)"""
        self.begin()
        self.wait({})

    def wait(self, others: Mapping[int, int]) -> dict[int, int]:
        """Wait for shutdown, or until any other descriptor is ready; which are."""
        return _poll({self.closing: select.POLLIN, **others})

    def begin(self) -> None:
        """Have clients taken from now on, in threads, if they are not yet. Raises Error if there is none to be had."""
        if not self._is_begun:
            self._gate.open()
            if not self._start_thread():
                raise Error("cannot start a thread: raise the limit of processes (ulimit -u), or end some")
            self._is_begun = True

    def replace(self, commands: Mapping[str, Command]) -> None:
        """Serve these commands from now on, and read the certificate again. Raises ConfigError; then all stays."""
        if self._tls_context is not None:
            self._tls_context = _make_tls_context(self.settings)
        self.site.replace(commands)

    def _start_thread(self) -> bool:
        """Have one more thread take clients; whether it could be had."""
        try:
            threading.Thread(target=self._take_clients, daemon=True, name="streamlog").start()
        except (RuntimeError, MemoryError) as error:
            self._warn_once(error)
            return False
        return True

    def _take_clients(self) -> None:
        """Wait for a client and serve it, then the next, for as long as few enough others wait.

        Who accepts a client serves it, as to wake another thread takes longer than all else before the command starts.
        The last one to wait is replaced first. A client is registered as its thread ceases to wait, or a close in
        between would miss it.
        """
        thread = threading.current_thread()
        while True:
            with self._lock:
                if self.is_closing or len(self._waiting) >= _WAITING_MAX:
                    return
                self._waiting.add(thread)
            client = self._wait_for_client()
            with self._lock:
                self._waiting.remove(thread)
                is_last = not self._waiting
                if client is not None:
                    self._clients[client] = thread
            if client is None:
                return
            if is_last and not self._start_thread():
                with self._lock:
                    del self._clients[client]
                self._refuse(client)
            else:
                self.process_request(client, client.name)

    def _wait_for_client(self) -> Optional[_Client]:
        """The next client; None at shutdown. Whatever happens to one, others are waited for."""
        client = None
        while client is None and not self.is_closing:
            self._gate.wait()
            try:
                client = None if self.is_closing else self._accept()
            except Exception as error:
                # No descriptor is left, most likely: make room, and do not spin on a listener that stays ready.
                self._warn_once(error)
                self._evict()
                _poll({self.closing: select.POLLIN}, time.monotonic() + 0.1)
            finally:
                self._gate.reopen()
        return client

    def _accept(self) -> Optional[_Client]:
        """Accept a client; None if it has gone already, or is turned away."""
        try:
            sock, address = self.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        try:
            if self.reach is not Reach.UNIX:
                with contextlib.suppress(OSError):  # it may have been reset already
                    _tune(sock, self.settings.keepalive_seconds)
            tls = _Tls(self._tls_context) if self._tls_context else None
            client = _Client(sock, address, tls, self.settings.stall_seconds)
        except BaseException:
            sock.close()
            raise
        if len(self._clients) >= self._client_max and not self._evict():
            self._refuse(client)
            return None
        return client

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a client in the thread that accepted it, and whatever happens close its socket."""
        try:
            self.finish_request(request, client_address)
        except Exception:
            _log.exception("a bug: client=%s", request.name)
        finally:
            request.close()
            with self._lock:
                del self._clients[request]

    def _warn_once(self, error: Exception) -> None:
        """Log a shortage now and then, and not at each connection that it costs."""
        if time.monotonic() >= self._warned_at + _WARN_SECONDS:
            self._warned_at = time.monotonic()
            is_bug = not isinstance(error, (OSError, RuntimeError, MemoryError))
            with contextlib.suppress(Exception):  # a program that embeds us may have filters of its own
                _log.warning("cannot serve a new connection: %s", str(error) or repr(error), exc_info=is_bug)

    def _refuse(self, client: _Client) -> None:
        """Turn a client away. What it has sent is read first, for a close would reset the connection otherwise."""
        if client.is_ready:
            client.turn(select.POLLIN)
            headers = {"Content-Length": "0", "Retry-After": "1", **self.site.access.headers(None)}
            client.send(_head_bytes(503, headers, is_reusable=False))
            client.end()
        client.close()

    def _evict(self) -> bool:
        """Close the connection that has been longest without a request; whether there was one."""
        with self._lock:
            idle = [client for client in self._clients if client.idle_since is not None and not client.is_evicted]
            if idle:
                longest = min(idle, key=lambda client: client.idle_since or 0.0)
                longest.is_evicted = True
                with contextlib.suppress(OSError):
                    longest.sock.shutdown(socket.SHUT_RDWR)  # which wakes its thread, and that closes it
        return bool(idle)

    def claim(self, client: _Client) -> bool:
        """Mark a client as having a request; not if it was evicted just now, so that no request is half served."""
        with self._lock:
            client.idle_since = None
            return not client.is_evicted

    def shutdown(self) -> None:
        """Begin to close: accept no more, stop every run. Returns at once; a signal handler may call it."""
        with self._lock:
            if self._closing_writer is not None:
                writer, self._closing_writer = self._closing_writer, None
                os.close(writer)
        self._shelf.shutdown()

    def kill(self) -> None:
        """Begin to close without grace: every process group is killed."""
        self.is_killing = True
        self.shutdown()
        with self._lock:
            runs = [client.run for client in self._clients if client.run]
        for run in runs:
            run.stop(_SHUTTING_DOWN)
            run.kill()
        self._shelf.kill()

    def close(self) -> None:
        """Shut down and wait, for the grace time and a second at most. May be called twice.

        Steps: 1. accept no more, and stop the kept runs; 2. each connection's thread stops its run, tells its client,
        and ends; 3. runs that outlast their grace time are killed; 4. the listener, the transcripts and what woke the
        threads are closed.
        """
        self.shutdown()
        self.site.log.end()
        for thread in list(self._waiting):
            # One that has just got a client waits no more, and is joined with the others; in a fork all have gone.
            while thread in self._waiting and thread.is_alive():
                thread.join(0.05)
        self._gate.close()
        self.server_close()
        runs = sum(client.run is not None for client in list(self._clients))
        if runs:
            _log.info("closing: %d runs are asked to end, and killed in %g s", runs, self.settings.grace_seconds)
        if not self._join(self.settings.grace_seconds + 0.5):
            self.kill()
            self._join(0.5)
        self._shelf.close()
        with self._lock:
            if not self._clients and self.closing >= 0:
                os.close(self.closing)
                self.closing = -1

    def __exit__(self, *_: object) -> None:
        self.close()

    def disown(self) -> None:
        """Let go of all descriptors, in a process that was forked off: they, and what runs, are its parent's."""
        self._lock = threading.RLock()  # some other thread of the parent may have it
        self._waiting.clear()
        self._gate.close()
        self.socket.close()
        for client in self._clients:
            client.sock.close()
            if client.run:
                client.run.disown()
        self._clients.clear()
        self._shelf.disown()
        self.site.log.disown()
        self.site.log.end()
        for descriptor in (self.closing, self._closing_writer):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._closing_writer, self.closing = None, -1

    def _join(self, seconds: float) -> bool:
        """Wait for the threads of all clients; whether they have ended in time."""
        deadline = time.monotonic() + seconds
        with self._lock:
            threads = list(self._clients.values())
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        has_ended = self._shelf.join(deadline)
        return has_ended and not any(thread.is_alive() for thread in threads)


# ---------------------------------------------------------------------------------------------
# embedding: what a program calls that has this module inside


_Given = Union[str, Sequence[str], Callable[..., object], Command]


def _make_commands(commands: Mapping[str, _Given]) -> dict[str, Command]:
    """Commands as a program gives them. Raises ConfigError, which names the command."""
    made = {}
    for name, given in commands.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"a command's name is letters, digits, '.', '_' and '-': {name!r}")
        try:
            about = (inspect.getdoc(given) or "").partition("\n")[0] if callable(given) else ""
            made[name] = given if isinstance(given, Command) else Command(given, about)
        except ConfigError as error:
            raise ConfigError(f"command {name!r}: {error}") from None
    return made


class Stream(Iterator[bytes]):
    """The output of one run as it comes, in pieces of any size, and a hold on the run. Made by `stream`.

    It is a context manager, and closed at its end. One thread at a time reads or writes; any may `stop` or `close`.
    """

    _closed_reason = "closed"

    def __init__(self, run: Run, stdin: Optional[_Stdin], settings: Settings, format_: Optional[Format] = None) -> None:
        self._run = run
        self._stdin = stdin
        self._settings = settings
        self._format = format_ or Format()
        self._ahead: collections.deque[bytes] = collections.deque()  # that came while something was written
        self._is_ended = False
        self._turn = threading.Lock()  # of the one thread that uses the run
        self._add(self._format.start())
        _watch_program()
        _open.add(self)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> bytes:
        with self._turn:
            while not self._ahead and not self._is_ended:
                self._read(self._run.wait({}, deadline=self._format.due))
                if self._run.is_over:
                    self._is_ended = True
                    self._add(self._format.end(self._run.outcome))
                elif time.monotonic() >= self._format.due:
                    self._add(self._format.pause())
            if self._ahead:
                return self._ahead.popleft()
        self.close()
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    @property
    def exit_code(self) -> Optional[int]:
        """The exit code, 128 + N for signal N; None while the run goes on."""
        return self._run.exit_code

    def write(self, data: bytes) -> None:
        """Give the command input. Raises BrokenPipeError where it takes none, or no more.

        While it does not take it, up to 1 MiB of its output is kept for the next reading; beyond that both wait.
        """
        view = memoryview(data)
        with self._turn:
            while view:
                if self._stdin is None or self._run.is_over:
                    raise BrokenPipeError("the command takes no input")
                is_full = sum(map(len, self._ahead)) >= _AHEAD_BYTES
                ready = self._run.wait({self._stdin.fileno(): select.POLLOUT}, is_paused=is_full)
                if ready.pop(self._stdin.fileno(), 0):
                    view = self._stdin.write(view)
                self._read(ready)

    def close_stdin(self) -> None:
        """Tell the command that there is no more input."""
        if self._stdin:
            with contextlib.suppress(BrokenPipeError):
                self.write(self._stdin.end_mark(b""))
                self._stdin.end()
        self._drop_stdin()

    def _drop_stdin(self) -> None:
        stdin, self._stdin = self._stdin, None
        if stdin:
            stdin.close()

    def stop(self) -> None:
        """Ask the run to end: SIGTERM to its group, or `stopping` to a task. What still comes can be read."""
        self._run.stop("stopped")

    shutdown = stop

    def close(self) -> None:
        """Stop the run, and wait until all of it is gone, for the grace time at most. May be called twice."""
        self._run.stop(self._closed_reason)
        has_turn = self._turn.acquire(timeout=self._settings.grace_seconds)
        if not has_turn:
            self._run.kill()
            has_turn = self._turn.acquire(timeout=_ABANDON_SECONDS)
        if has_turn:  # or else it is left to who has it, and does not return
            try:
                self._is_ended = True
                self._ahead.clear()
                self._run.close()
                self._drop_stdin()
            finally:
                self._turn.release()

    def disown(self) -> None:
        """Let go of it in a process that was forked off: the run is its parent's."""
        self._turn = threading.Lock()
        self._is_ended = True
        self._drop_stdin()
        self._run.disown()

    def _add(self, data: bytes) -> None:
        if data:
            self._ahead.append(data)

    def _read(self, ready: Mapping[int, int]) -> None:
        for descriptor in ready:
            data = self._run.read(descriptor, self._format.block_bytes)
            if data:
                self._add(bytes(self._format.feed(self._run.stream, data)))


def stream(command: _Given, /, **values: object) -> Stream:
    """Start a command at once; iterate over what is returned for its output, standard error included.

    command: as for `start`. values: of its parameters, which are checked as those of a URL are. Raises Error (for a
    value that is refused, or a program that cannot be started) or ConfigError.
    """
    made = _make_commands({"stream": command})["stream"]
    texts = {name: str(value) for name, value in values.items()}
    for name in texts:
        if name not in made.parameters:
            raise Error(f"the command has no parameter {name!r}; known are: {', '.join(made.parameters)}")
    settings = Settings()
    if made.is_task:
        return Stream(Task(made.call("stream", texts), settings, made.timeout, lambda: None), None, settings)
    launch = made.bind("stream", texts)._replace(has_input=True)
    run = Process(launch, settings, made.timeout, lambda: None)
    return Stream(run, run.take_input(), settings)


def start(commands: Mapping[str, _Given], **settings: Unpack[_SettingsGiven]) -> Server:
    """Serve commands in threads of their own, and return at once; `close` the server that is returned.

    commands: by name; each a command line, a list of arguments, a callable (a task) or a Command. settings: the fields
    of Settings. Raises ConfigError for a mistake in either, and OSError for an address that cannot be had.
    """
    return Server(_make_commands(commands), Settings(**settings)).start()


def serve(commands: Mapping[str, _Given], **settings: Unpack[_SettingsGiven]) -> None:
    """Serve commands, as `start` does, until KeyboardInterrupt or the like, and close."""
    with Server(_make_commands(commands), Settings(**settings)) as server:
        server.serve_forever()


# ---------------------------------------------------------------------------------------------
# WSGI: the site in another's server

_ELSEWHERE = frozenset({
    *("bind", "port", "tls_cert", "tls_key", "no_auth", "stall_seconds"),
    *("head_seconds", "idle_seconds", "refusal_seconds", "keepalive_seconds"),
})  # fmt: skip


def _read_environ(environ: Mapping[str, Any]) -> Request:
    """The request that a WSGI server has read (PEP 3333): text is bytes, as Latin-1. Raises Error."""
    headers = {key[5:].replace("_", "-").lower(): value for key, value in environ.items() if key.startswith("HTTP_")}
    for key in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        if environ.get(key):
            headers[key.replace("_", "-").lower()] = environ[key]
    if not re.fullmatch(r"[0-9]{1,15}", headers.get("content-length", "0")):
        raise Error("Content-Length must be a number")
    path = urllib.parse.quote(environ.get("PATH_INFO") or "/", encoding="latin-1")
    _, path, _ = _parse_target(environ["REQUEST_METHOD"], path)
    host = headers.get("host", "")
    if not _AUTHORITY.fullmatch(host):
        raise Error("the request needs one Host header that names a host")
    prefix = urllib.parse.quote(environ.get("SCRIPT_NAME", ""), encoding="latin-1")
    query, scheme = environ.get("QUERY_STRING", ""), environ["wsgi.url_scheme"]
    return Request(environ["REQUEST_METHOD"], path, query, host, headers, scheme=scheme, prefix=prefix)


def _read_input(environ: Mapping[str, Any], request: Request, limit: int) -> bytes:
    """The request's body. Raises Error if it is longer than the limit, or not as long as it says."""
    size = limit + 1 if request.is_chunked and environ.get("wsgi.input_terminated") else request.body_bytes
    if request.body_bytes > limit:
        raise Error(f"the body may have {limit} bytes at most", 413)
    body = bytes(environ["wsgi.input"].read(size))
    if len(body) > limit:
        raise Error(f"the body may have {limit} bytes at most", 413)
    if len(body) < request.body_bytes:
        raise Error("the body is shorter than it says")
    return body


class _Body(Stream):
    """The output of a run as the body of an answer. That it was cut is told by raising, so that its server ends the
    connection without the final chunk."""

    _closed_reason = _CLIENT_GONE

    def __init__(self, site: Site, settings: Settings, reply: Reply, environ: Mapping[str, Any]) -> None:
        assert reply.run
        super().__init__(reply.run, None, settings, reply.format)
        self._site = site
        self._name = reply.name
        self._sent_bytes = 0
        self._is_recorded = False
        self._ahead.appendleft(b"")  # at which most servers send the head
        stdin = reply.run.take_input()
        if stdin:
            arguments = (stdin, environ["wsgi.input"], int(environ.get("CONTENT_LENGTH") or -1))
            thread = threading.Thread(target=self._pass_on, args=arguments, daemon=True, name="streamlog-input")
            try:
                thread.start()
            except RuntimeError as error:
                stdin.close()
                self.close()
                raise _shortage(OSError(errno.EAGAIN, str(error))) from None

    def _pass_on(self, stdin: _Stdin, body: Any, left: int) -> None:
        """Give the command the request's body, and close its standard input if that was whole; in a thread."""
        with contextlib.closing(stdin), contextlib.suppress(BrokenPipeError):
            try:
                while left:
                    piece = body.read(min(left, _RECEIVE_BYTES) if left > 0 else _RECEIVE_BYTES)
                    if not piece and left > 0:
                        raise OSError("the body is shorter than it says")
                    left = left - len(piece) if left > 0 else -bool(piece)
                    self._put(stdin, piece if left else piece + stdin.end_mark(piece))
                stdin.end()
            except BrokenPipeError:
                raise
            except Exception:  # each server has errors of its own for a client that has left
                self._run.stop(_CLIENT_GONE)
                # Until nobody has it open any more: or the command would take this for the end of its input.
                while not self._is_ended and not _poll({stdin.fileno(): 0}, time.monotonic() + 1):
                    pass

    def _put(self, stdin: _Stdin, piece: bytes) -> None:
        view = memoryview(piece)
        while view and not self._is_ended:
            if _poll({stdin.fileno(): select.POLLOUT}, time.monotonic() + 1):
                view = stdin.write(view)

    def __next__(self) -> bytes:
        try:
            piece = super().__next__()
        except StopIteration:
            if self._run.reason:
                raise ConnectionAbortedError(f"{self._name} was stopped: {self._run.reason}") from None
            raise
        self._sent_bytes += len(piece)
        return piece

    def close(self) -> None:
        super().close()
        if not self._is_recorded:
            self._is_recorded = True
            self._site.record(self._name, self._run.outcome, self._sent_bytes)


class _Application:
    """A site as a WSGI application (PEP 3333). Made by `wsgi`."""

    def __init__(self, commands: Mapping[str, Command], settings: Settings) -> None:
        # Where its server listens is not to be seen here. Who has the token may come from anywhere.
        self._site = Site(commands, settings, Reach.NETWORK if settings.token else Reach.LOOPBACK)
        self._settings = settings
        self._bodies: weakref.WeakSet[_Body] = weakref.WeakSet()
        self._site.count_clients = self._bodies.__len__
        _watch_program()
        _open.add(self)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = None
        try:
            request = read = _read_environ(environ)
            if request.prefix and not environ.get("PATH_INFO"):  # the index page's links are relative
                reply = Reply(308, {"Location": f"{request.prefix}/"})
            else:
                reply = self._site.answer(request, lambda limit: _read_input(environ, read, limit))
        except Error as error:
            reply = _text_reply(f"{error}\n", error.status, error.headers)
        headers = {**_join_headers(reply.headers, self._site.access.headers(request)), **dict(_COMMON_HEADERS)}
        del headers["Server"]
        is_head = environ["REQUEST_METHOD"] == "HEAD"
        if reply.run:
            headers["X-Accel-Buffering"] = "no"
        elif reply.status != 204 and not (is_head and reply.status == 200):
            headers["Content-Length"] = str(len(reply.body))
        body = _Body(self._site, self._settings, reply, environ) if reply.run else None
        try:
            start_response(f"{reply.status} {http.HTTPStatus(reply.status).phrase}", list(headers.items()))
        except BaseException:
            if body:
                body.close()
            raise
        if body:
            self._bodies.add(body)
            return body
        return [] if is_head else [reply.body]

    def shutdown(self) -> None:
        """Keep no more of the program's log."""
        self._site.log.end()

    close = shutdown

    def disown(self) -> None:
        """Let go of what is the parent's, in a process that was forked off, and serve there."""
        self._site.log.disown()
        self._site.forget_runs()


def wsgi(commands: Mapping[str, _Given], **settings: Unpack[_SettingsGiven]) -> _Application:
    """The site as a WSGI application, for a server such as gunicorn, or under a prefix of another application.

    commands and settings: as for `start`, but for those of a socket. Without a `token` or `allow_hosts` it is answered
    to a Host of this machine's own only. Raises ConfigError.
    """
    for name in _ELSEWHERE & settings.keys():
        raise ConfigError(f"the setting {name!r} is that of the server which runs the application: leave it to that")
    return _Application(_make_commands(commands), Settings(**settings))


# ---------------------------------------------------------------------------------------------
# command line


def _read_host(text: str) -> str:
    if not _AUTHORITY.fullmatch(text) or ":" in text:
        raise ConfigError(f"--allow-host must be a host name, without a port: {text!r}")
    return text


def _read_size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)", text)
    if not match:
        raise ConfigError(f"a size must be a number of bytes, or of K, M, G or T of them: {text!r}")
    return int(match[1]) << 10 * " KMGT".index(match[2] or " ")


def _read_terminal_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", text)
    if not match:
        raise ConfigError(f"--terminal must be COLUMNSxLINES, as in 80x24: {text!r}")
    return int(match[1]), int(match[2])


def _read_origin(text: str) -> str:
    match = re.fullmatch(r"https?://([^/]+)", text, re.IGNORECASE)
    if not match or not _AUTHORITY.fullmatch(match[1]):
        raise ConfigError(f"--allow-origin must be http://HOST or https://HOST, with a port if it has one: {text!r}")
    return text


def _parse_arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Read the command line. Raises ConfigError for what is wrong with it."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def format_help(self) -> str:
            return __doc__ or ""

        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"{message} (a command line is one word: quote it; --help tells more)")

    def number(kind: Callable[[str], float], low: float, high: float, what: str) -> Callable[[str], float]:
        def read(text: str) -> float:
            with contextlib.suppress(ValueError):
                value = kind(text)
                if low <= value <= high:
                    return value
            raise argparse.ArgumentTypeError(f"must be {what}: {text!r}")

        return read

    seconds = number(float, 0, 1e9, "a number of seconds, 0 or more")
    parser = Parser(prog="streamlog", allow_abbrev=False)
    parser.add_argument("commands", nargs="*")
    parser.add_argument("-p", "--port", type=number(int, 0, 65535, "a port from 0 to 65535"), default=8000)
    parser.add_argument("-b", "--bind", default="127.0.0.1")
    parser.add_argument("-c", "--config")
    parser.add_argument("--timeout", type=seconds)
    parser.add_argument("--grace", type=seconds, default=5.0)
    parser.add_argument("--stall", type=seconds, default=0.0)
    parser.add_argument("--max-output", type=_read_size, default=0)
    parser.add_argument("--max-runs", type=number(int, 1, 1e6, "a whole number above 0"), default=64)
    parser.add_argument("--token-file")
    parser.add_argument("--tls-cert")
    parser.add_argument("--tls-key")
    parser.add_argument("--no-auth", action="store_true")
    parser.add_argument("--allow-host", action="append", default=[], type=_read_host)
    parser.add_argument("--allow-origin", action="append", default=[], type=_read_origin)
    parser.add_argument("--terminal", type=_read_terminal_size, default=(80, 24))
    parser.add_argument("--transcripts", default="")
    parser.add_argument("--transcript-size", type=_read_size, default=16 << 20)
    parser.add_argument("--transcripts-size", type=_read_size, default=256 << 20)
    parser.add_argument("--keep-runs", type=number(int, 0, 1e6, "a whole number"), default=100)
    parser.add_argument("--keep", type=seconds, default=3600.0)
    parser.add_argument("--linger", type=seconds, default=5.0)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("-q", "--quiet", action="store_true")
    parser.add_argument("--version", action="version", version=f"streamlog {__version__}")
    options = parser.parse_intermixed_args(argv)
    if "" in (options.tls_cert, options.tls_key):
        raise ConfigError("--tls-cert and --tls-key need the name of a file")
    if options.tls_key and not options.tls_cert:
        raise ConfigError("--tls-key needs a --tls-cert that it belongs to")
    return options


def _load_token(options: argparse.Namespace) -> str:
    """The token of the file, or else of the environment; empty if neither is there."""
    path = options.token_file
    if path is None:
        token, where = os.environ.get("STREAMLOG_TOKEN"), "STREAMLOG_TOKEN"
    else:
        try:
            with open(path, encoding="utf-8") as file:
                token, where = file.read().strip(), path
                if os.fstat(file.fileno()).st_mode & 0o077:
                    print(f"streamlog: warning: others can read {path!r}: chmod 600 {path}", file=sys.stderr)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path!r}: {getattr(error, 'strerror', None) or error}") from None
    if token is not None and (not token or not token.isprintable()):
        raise ConfigError(f"the token in {where} must be one line of printable characters, and not empty")
    return token or ""


def _load_commands(options: argparse.Namespace) -> dict[str, Command]:
    """The commands of the file and of the command line; where there are none of either, this machine's diagnostics."""
    if options.config is None and not options.commands:
        return _collect(_diagnostics())
    from_file = iter(()) if options.config is None else _read_config(options.config)
    return _collect(itertools.chain(from_file, map(_parse_command_argument, options.commands)))


def _find_program(command: Command) -> Optional[str]:
    """Where the command's program is now."""
    program = command.program
    path = os.path.join(command.cwd or "", program) if "/" in program else program
    return shutil.which(path, path=command.env.get("PATH"))


def _warnings(command: Command) -> Iterator[str]:
    """What is no mistake for certain, and most likely one."""
    if command.cwd and not os.path.isdir(command.cwd):
        yield f"no such directory: {command.cwd!r}"
    if not command.is_task and not command.is_source and not _find_program(command):
        yield f"program not found, or not executable: {command.program!r}"
    for word in command.line.split():
        if not command.is_shell and re.fullmatch(r"[|&;<>]+|[0-9]?>.+", word):
            yield f"{word!r} means nothing without a shell: a leading ! asks for one"


# Programs that keep what they print until it fills a block, unless they print to a terminal (setvbuf(3)), and what
# makes them print at once.
_BLOCKWISE = {
    "grep": "--line-buffered",
    "sed": "-u",
    "awk": "fflush()",
    "gawk": "fflush()",
    "mawk": "-W interactive",
    "jq": "--unbuffered",
    "tcpdump": "-l",
    **dict.fromkeys(("cut", "tr", "uniq", "fold", "nl"), "stdbuf -oL"),
}


def _steps(command: Command) -> Iterator[tuple[list[str], bool]]:
    """The programs of a command with their arguments, and whether each is the last of its pipeline."""
    words: list[str] = []
    tokens = shlex.shlex(command.line.lstrip().lstrip("!"), posix=True, punctuation_chars=command.is_shell)
    tokens.whitespace_split = True
    with contextlib.suppress(ValueError):  # quotes that only a shell can tell
        for token in tokens:
            if command.is_shell and re.fullmatch(r"[|&;<>()]+", token):
                yield words, not re.fullmatch(r"\|&?", token)
                words = []
            elif words or not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", token):
                words.append(token)
        yield words, True


def _notes(command: Command) -> Iterator[str]:
    """Why a command may stay silent while it has something to say."""
    for words, is_last in _steps(command):
        program = os.path.basename(words[0]) if words else ""
        remedy = _BLOCKWISE.get(program, "")
        flag = rf"-[A-Za-z]*{remedy[1:]}[A-Za-z]*" if re.fullmatch("-[a-z]", remedy) else ""
        has_it = any(re.fullmatch(flag, word) for word in words) if flag else remedy in " ".join(words)
        if not has_it and not (command.pty and is_last):
            other = ", or pty = yes" if is_last else ""
            yield f"{program} prints block by block where it is on no terminal: {remedy}{other}"


_DEFAULTS = Command("true")


def _describe(name: str, command: Command) -> str:
    """A command as it was understood, for --check."""
    lines = [f"{', '.join(command.methods):4} /{name}  {command.line}"]
    if command.about:
        lines.append(f"about: {command.about}")
    if not command.is_source:
        lines.append(f"program: {_find_program(command) or 'not found'}")
    for parameter in command.parameters.values():
        default = "required" if parameter.default is None else f"default {parameter.default!r}"
        lines.append(f"parameter {parameter.name}: {parameter.type}, {default}")
    for option in ("timeout", "max", "stderr", "stdin", "pty", "shared", "cwd", "type"):
        value = getattr(command, option)
        if value != getattr(_DEFAULTS, option):
            lines.append(f"{option}: {'yes' if value is True else value}")
    lines += [f"env: {key}={value}" for key, value in command.env.items()]
    lines += [f"note: {note}" for note in _notes(command)]
    return "\n     ".join(lines)


def _raise_descriptor_limit() -> Optional[tuple[int, int]]:
    """Take as many descriptors as we may; return the old limits, for the commands, if they were others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _descriptor_limit(hard)
    if _descriptor_limit(soft) >= wanted:
        return None
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # macOS has a lower limit of its own
        return None
    return soft, hard


def _make_settings(options: argparse.Namespace) -> Settings:
    return Settings(
        bind=options.bind,
        port=int(options.port),
        timeout_seconds=options.timeout,
        grace_seconds=options.grace,
        stall_seconds=options.stall,
        max_runs=int(options.max_runs),
        max_output_bytes=options.max_output,
        tls_cert=options.tls_cert or "",
        tls_key=options.tls_key or "",
        token=_load_token(options),
        no_auth=options.no_auth,
        allow_hosts=options.allow_host,
        allow_origins=options.allow_origin,
        child_nofile=_raise_descriptor_limit(),
        terminal_size=options.terminal,
        transcripts=options.transcripts,
        transcript_bytes=options.transcript_size,
        transcripts_bytes=options.transcripts_size,
        kept_runs=int(options.keep_runs),
        kept_seconds=options.keep,
        linger_seconds=options.linger,
        insight=False,
    )


def _configure_logging(options: argparse.Namespace) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    _log.addHandler(handler)
    _log.setLevel(logging.WARNING if options.quiet else logging.DEBUG if options.verbose else logging.INFO)


def _take_listener() -> Optional[socket.socket]:
    """The socket that systemd has opened for us, if it has (sd_listen_fds(3)). Raises ConfigError."""
    count = os.environ.get("LISTEN_FDS", "0")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or count == "0":
        return None
    if count != "1":
        raise ConfigError(f"one socket is taken from systemd, and {count} are given: leave one ListenStream=")
    try:
        os.set_inheritable(3, False)
        listener = socket.socket(fileno=3)
        is_right = listener.type == socket.SOCK_STREAM and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        path = os.fsdecode(listener.getsockname()) if listener.family == socket.AF_UNIX else ""
    except OSError as error:
        raise ConfigError(f"the socket from systemd cannot be used: {error.strerror}") from None
    if not is_right or path.startswith("\0"):  # an abstract socket has no mode that says who may connect
        raise ConfigError("the socket from systemd must listen, and have a port or a path: ListenStream=, Accept=no")
    if path and os.stat(path).st_mode & 0o007:
        print(f"streamlog: warning: every user can connect to {path!r}: SocketMode=0600", file=sys.stderr)
    return listener


def _notify(state: str) -> None:
    """Tell systemd how we are, if it wants to know (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with contextlib.suppress(OSError), contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
            sock.settimeout(1)
            sock.sendto(state.encode(), re.sub("^@", "\0", path))


def _has_terminal() -> bool:
    """Whether there is a terminal whose end would be told by SIGHUP."""
    with contextlib.suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        return True
    return False


def _handle_signals(server: Server, waker: int, can_reload: bool) -> None:
    """The first signal shuts the server down, the second one kills; SIGHUP leaves it to who reads from the waker.

    To handle TERM and INT also resets them for the commands, which would inherit them as ignored otherwise.
    """

    def on_signal(number: int, _frame: object) -> None:
        if not (can_reload and number == signal.SIGHUP):
            (server.kill if server.is_closing else server.shutdown)()

    # A handler in Python runs between two steps of the program: of a signal just before a poll it would wait for that.
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored, it would lose every exit code (wait(2))
    handled = {signal.SIGINT, signal.SIGTERM}
    if can_reload or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        handled.add(signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
    for number in handled:
        signal.signal(number, on_signal)


def _reload(server: Server, options: argparse.Namespace) -> None:
    """Read the commands again; those that are wrong leave the old ones in force."""
    try:
        if options.config is not None and not os.path.isfile(options.config):  # a FIFO would hold everything up
            raise ConfigError(f"cannot read {options.config!r} again: it is no file")
        commands = _load_commands(options)
        server.replace(commands)
    except Exception as error:  # whatever it is, no reason to end what runs
        _log.error("the commands stay as they were: %s", error)
        return
    for name, command in commands.items():
        for warning in _warnings(command):
            _log.warning("command %r: %s", name, warning)
    _log.info("read %s again: %d commands", options.config or options.tls_cert, len(commands))


def _print(*lines: str) -> None:
    """Print at once. A reader that has gone is no reason not to serve."""
    with contextlib.suppress(OSError):
        print(*lines, sep="\n", flush=True)


def _announce(server: Server, commands: Mapping[str, Command], is_quiet: bool) -> None:
    """Say where it listens, and how curl gets there."""
    if server.reach is Reach.NETWORK and not server.settings.token:
        _log.warning("anyone who reaches %s can run every command: those that change things should be POST", server.url)
    elif server.reach is Reach.NETWORK and not server.settings.tls_cert:
        _log.warning("the token goes to %s in the clear: use --tls-cert, or a proxy with TLS in front", server.url)
    if is_quiet:
        _print(server.url)
        return
    authority = "localhost" if server.socket_path else server.url.partition("//")[2]
    target = _target(f"{server.settings.scheme}://{authority}", server.settings.token, server.socket_path)
    lines = [_curl_line(target, name, command) for name, command in commands.items()]
    _print(f"streamlog: listening on {server.url}", *lines)


def _serve(server: Server, commands: Mapping[str, Command], options: argparse.Namespace) -> None:
    """Serve until a signal, or the end of the session that started us."""
    others = {}
    if sys.argv[0] in ("", "-"):  # this program came by standard input, as from ssh: end when its stderr has no reader
        others[2] = 0  # poll tells of a hang-up unasked
    # At this interval each thread that waits for the interpreter's lock looks for it. At the usual 5 ms, two thousand
    # clients that leave at once keep two processors busy with that alone for seconds; and on Python 3.10, where a start
    # keeps the lock, a hundred starts at once on a busy machine can take longer than half a minute.
    sys.setswitchinterval(0.05)
    reader, writer = os.pipe()
    try:
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        others[reader] = select.POLLIN
        can_reload = (options.config is not None or options.tls_cert) and not _has_terminal()
        _handle_signals(server, writer, can_reload)
        server.begin()
        _announce(server, commands, options.quiet)
        _notify("READY=1")
        while reader in server.wait(others) and not server.is_closing:
            if signal.SIGHUP in os.read(reader, 1024):
                _reload(server, options)
        _notify("STOPPING=1")
    finally:
        server.close()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # one more would spoil the exit code
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        os.close(reader)
        os.close(writer)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command line; returns the exit code: 0, or 2 for a mistake in how it was called."""
    for descriptor in (0, 1, 2):  # one that is closed would be taken by the next socket or file
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        options = _parse_arguments(argv)
        commands = _load_commands(options)
        if options.check:
            _print(*itertools.starmap(_describe, commands.items()))
        for name, command in commands.items():
            for warning in _warnings(command):
                print(f"streamlog: warning: command {name!r}: {warning}", file=sys.stderr)
        if options.check:
            return 0
        server = Server(commands, _make_settings(options), _take_listener())
    except Error as error:
        print(f"streamlog: {error}", file=sys.stderr)
        return 2
    except (OSError, UnicodeError) as error:  # the latter for a host name that can be none
        where = options.bind if options.bind.startswith("unix:") else f"{options.bind}:{options.port}"
        why = getattr(error, "strerror", None) or error
        is_taken = getattr(error, "errno", 0) in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL)
        advice = "; choose another with -b and -p" if is_taken else ""
        print(f"streamlog: cannot listen on {where}: {why}{advice}", file=sys.stderr)
        return 2
    _configure_logging(options)
    try:
        _serve(server, commands, options)
    except Error as error:
        print(f"streamlog: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
