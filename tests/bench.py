"""Measures what a server costs on this machine, by hand and with nothing else going on: python tests/bench.py [WORK]...

Works: log (what a logging call costs the program, by viewers of /log).
"""

from __future__ import annotations

import contextlib
import logging
import socket
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import streamlog

ROUNDS = 3


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
            while len(server.site.log._views) <= number:
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
    took.sort()
    return statistics.median(took), took[len(took) * 99 // 100], took[-1]


def log() -> None:
    """Microseconds of a logging call: nobody watches, records are kept, one viewer, a hundred."""
    logging.getLogger().addHandler(logging.NullHandler())  # as of a program that has configured logging
    print("µs of a logging call           median      p99      max")
    for viewers, keep in ((0, 0), (0, 1 << 20), (1, 0), (100, 0)):
        for pause, pace in ((0.001, "1000/s"), (0.0, "flat out")):
            rounds = [cost_of_logging(viewers, keep, pause) for _ in range(ROUNDS)]
            best = [1e6 * statistics.median(column) for column in zip(*rounds)]
            name = f"{viewers} viewers{', kept' if keep else ''}, {pace}"
            print(f"{name:28}", *(f"{value:8.1f}" for value in best))


WORKS: dict[str, Callable[[], None]] = {"log": log}

if __name__ == "__main__":
    for name in sys.argv[1:] or WORKS:
        WORKS[name]()
