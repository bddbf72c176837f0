"""Run by test_server as root: a client on another host of our own making, whose cable is pulled.

Exits with 77 where the system does not let us make a network namespace.
"""

from __future__ import annotations

import subprocess
import sys
import time

from streamlog import Command, Server, Settings

from .support import is_alive, wait_until

CLIENT = """
import socket
sock = socket.create_connection(("10.213.7.1", {port}))
sock.sendall(b"GET /x HTTP/1.1\\r\\nHost: 10.213.7.1\\r\\n\\r\\n")
print(sock.recv(100)[:12].decode(), flush=True)
sock.recv(1 << 20), sock.recv(1 << 20)
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def main() -> int:
    name = "streamlog-test"
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        print(error)
        return 77
    try:
        ip("link", "add", "slog0", "type", "veth", "peer", "name", "slog1", "netns", name)
        ip("addr", "add", "10.213.7.1/24", "dev", "slog0")
        ip("link", "set", "slog0", "up")
        ip("-n", name, "addr", "add", "10.213.7.2/24", "dev", "slog1")
        ip("-n", name, "link", "set", "slog1", "up")
        settings = Settings(bind="10.213.7.1", port=0, no_auth=True, keepalive_seconds=1, grace_seconds=1)
        with Server({"x": Command("sleep 300")}, settings).start() as server:
            script = CLIENT.format(port=server.port)
            inside = ["ip", "netns", "exec", name, sys.executable, "-c", script]
            client = subprocess.Popen(inside, stdout=subprocess.PIPE, text=True)
            assert client.stdout and client.stdout.readline() == "HTTP/1.1 200\n"
            (held,) = server._clients
            assert held.run
            pid = held.run.pid
            ip("-n", name, "link", "set", "slog1", "down")
            time.sleep(0.5)
            assert is_alive(pid), "it was still there"
            wait_until(lambda: not is_alive(pid), "the command is stopped", 15)
            client.kill()
            client.wait()
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False)
    print("gone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
