"""Run by test_server in a process of its own: a server that is short of descriptors or of processes."""

from __future__ import annotations

import argparse
import os
import resource
import signal

from streamlog import Command, Server, Settings


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--descriptors", type=int)
    parser.add_argument("--processes", type=int)
    options = parser.parse_args()
    if options.descriptors:
        resource.setrlimit(resource.RLIMIT_NOFILE, (options.descriptors, options.descriptors))
    server = Server({"x": Command("echo x"), "sleep": Command("sleep 300")}, Settings(port=0, grace_seconds=1)).start()
    if options.processes:
        # A user of whom there is nothing else: the limit counts all of his processes and threads, and root has none.
        resource.setrlimit(resource.RLIMIT_NPROC, (options.processes, options.processes))
        os.setuid(61234)
    stop = {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    print(server.port, flush=True)
    signal.sigwait(stop)
    server.close()


if __name__ == "__main__":
    main()
