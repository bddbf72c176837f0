"""A user's program with every public name in it: a test runs it, and mypy --strict holds it against their types."""

from __future__ import annotations

import asyncio
import enum
import logging
import urllib.request
import wsgiref.simple_server
from collections.abc import Iterator
from typing import Literal, Optional

from streamlog import (
    Command,
    ConfigError,
    Error,
    Server,
    Settings,
    Stream,
    output,
    serve,
    start,
    stopping,
    stream,
    wsgi,
)


class Mode(enum.Enum):
    QUICK = "quick"
    FULL = "full"


def reindex(parts: int = 2, mode: Mode = Mode.QUICK, how: Literal["dry", "wet"] = "dry") -> Iterator[object]:
    """Build the index anew."""
    for part in range(parts):
        if stopping():
            return
        logging.getLogger("index").warning("part %d, %s, %s", part, mode.value, how)
        print(f"{part + 1} of {parts} done", file=output())
        yield {"done": part + 1}


async def count() -> bytes:
    run = stream("seq 3")
    return b"".join([piece async for piece in run])


def fetch(server: Server, path: str) -> str:
    with urllib.request.urlopen(f"{server.url}{path}") as answer:
        return str(answer.read().decode())


def main() -> None:
    commands = {
        "disk": "df -h /",
        "count": ["seq", "{upto:int=3}"],
        "reindex": reindex,
        "slow": Command("sleep 10", about="Takes a while", timeout=20, max=1),
    }
    with start(commands, port=0, max_runs=8, log=100_000) as server:
        port: int = server.port
        print(port > 0, fetch(server, "/count"), fetch(server, "/reindex?mode=full"))

    with Server({"x": Command("echo from Server")}, Settings(port=0)).start() as server:
        print(fetch(server, "/x"))

    run: Stream = stream("cat")
    with run:
        pid: Optional[int] = run.pid
        run.write(b"to cat\n")
        run.close_stdin()
        code: int = run.wait(timeout=10)
        text: bytes = b"".join(run)
    print(text.decode(), code, run.exit_code, run.reason, pid is not None)
    print(asyncio.run(count()))
    with stream("sleep 60") as run:
        run.stop()
        print(list(run), run.exit_code)

    try:
        stream("echo {x:int}", x="nonsense")
    except Error as error:
        print(error.status, error)
    try:
        serve({"bad name": "true"})
    except ConfigError as error:
        print(error)

    with wsgiref.simple_server.make_server("127.0.0.1", 0, wsgi({"x": "echo x"}, token="secret")) as other:
        print(other.server_port > 0)


if __name__ == "__main__":
    main()
