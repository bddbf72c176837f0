"""Run by test_server as root: a client on another host of our own making, whose cable is pulled while a command runs.

Exits with 77 where the system does not let us make a network namespace.
"""

from __future__ import annotations

import os
import subprocess
import sys

from streamlog import Command, Process, Server, Settings

from .support import is_alive, wait_until

CLIENT = """
import socket
sock = socket.create_connection(("{host}", {port}))
sock.sendall(b"GET /x HTTP/1.1\\r\\nHost: {host}\\r\\n\\r\\n")
print(sock.recv(100)[:12].decode(), flush=True)
while sock.recv(1 << 20):
    pass
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def main(line: str, stall_seconds: str) -> int:
    name = f"slog{os.getpid()}"
    network = f"198.{18 + os.getpid() // 256 % 2}.{os.getpid() % 256}"  # of those for tests (RFC 2544)
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        print(error)
        return 77
    try:
        ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
        ip("addr", "add", f"{network}.1/24", "dev", f"{name}a")
        ip("link", "set", f"{name}a", "up")
        ip("-n", name, "addr", "add", f"{network}.2/24", "dev", f"{name}b")
        ip("-n", name, "link", "set", f"{name}b", "up")
        settings = Settings(
            bind=f"{network}.1",
            port=0,
            no_auth=True,
            keepalive_seconds=1,
            grace_seconds=1,
            stall_seconds=float(stall_seconds),
        )
        with Server({"x": Command(line)}, settings).start() as server:
            script = CLIENT.format(host=f"{network}.1", port=server.port)
            inside = ["ip", "netns", "exec", name, sys.executable, "-c", script]
            client = subprocess.Popen(inside, stdout=subprocess.PIPE, text=True)
            assert client.stdout and client.stdout.readline() == "HTTP/1.1 200\n"
            (held,) = server._clients
            assert isinstance(held.run, Process)
            pid = held.run.pid
            assert is_alive(pid), "it is there"
            ip("-n", name, "link", "set", f"{name}b", "down")
            wait_until(lambda: not is_alive(pid), "the command is stopped", 15)
            client.kill()
            client.wait()
    finally:
        subprocess.run(["ip", "link", "delete", f"{name}a"], check=False)
        subprocess.run(["ip", "netns", "delete", name], check=False)
    print("gone")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
