"""What the README says of proxies, systemd and many boxes, taken from it and tried."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import unittest
import urllib.request
from pathlib import Path
from typing import Any, Optional, Union

from streamlog import Command

from . import browser
from .support import (
    CERTIFICATE,
    IS_ROOT,
    PROGRAM,
    ROOT,
    SOAK,
    Raw,
    ServerCase,
    is_alive,
    pids_in,
    trusting,
    wait_until,
)
from .test_browser import BrowserCase

README = (ROOT / "README.md").read_text()
NGINX, HAPROXY = (shutil.which(name) or shutil.which(name, path="/usr/sbin") for name in ("nginx", "haproxy"))
TOKEN = "a-long-token-of-the-tests"


def block(kind: str, mark: str = "") -> str:
    """The README's block of code of a kind that has a mark in it."""
    return next(found[1] for found in re.finditer(rf"^```{kind}\n(.*?)^```", README, re.M | re.S) if mark in found[1])


def free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as sock:
        return int(sock.getsockname()[1])


def start_proxy(case: ServerCase, port: int, *command: str) -> None:
    """Start a proxy, and wait until it listens."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    case.addCleanup(process.wait, 10)
    case.addCleanup(process.terminate)

    def is_up() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    wait_until(is_up, f"{command[0]} listens")


def front(case: ServerCase, address: str, buffers_input: bool = False) -> int:
    """Start nginx with the README's location before another address; its port."""
    port = free_port()
    location = block("nginx", "proxy_pass").replace("http://127.0.0.1:8000/", address)
    if buffers_input:
        location = location.replace("proxy_request_buffering off", "proxy_request_buffering on")
    folder = Path(tempfile.mkdtemp(dir=case.folder))
    (folder / "conf").write_text(
        f"daemon off; error_log stderr; pid {folder}/pid; worker_processes 1; events {{}}\n"
        + ("user root;\n" if IS_ROOT else "")
        + f"http {{ access_log off; proxy_temp_path {folder}/proxy; client_body_temp_path {folder}/body;\n"
        f"fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n"
        f"server {{ listen 127.0.0.1:{port};\n{location}}} }}\n"
    )
    start_proxy(case, port, str(NGINX), "-c", str(folder / "conf"))
    return port


@unittest.skipUnless(NGINX, "nginx is not installed")
class Nginx(ServerCase):
    """The snippet, with the address alone changed; before a port and before a unix socket."""

    def join(self, port: int, path: str, *headers: str, host: str = "box.example") -> Raw:
        client = Raw(("127.0.0.1", port))
        self.addCleanup(client.sock.close)
        client.send("\r\n".join([f"GET {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]).encode())
        return client

    def test_output_comes_as_it_is_written_and_a_cut_stays_a_cut(self) -> None:
        gate = self.make_gate()
        commands: dict[str, Union[str, Command]] = {
            "x": f"!echo one; read line < {gate}; echo two",
            "cut": Command("!echo one; sleep 300", timeout=0.3),
            "pid": "!echo $$; sleep 300",
        }
        by_port = self.serve(commands, allow_hosts=["box.example"])
        by_socket = self.serve(commands, bind=f"unix:{self.folder / 'socket'}")
        for address in (f"{by_port.url}/", f"http://unix:{by_socket._socket_path}:/"):
            with self.subTest(address=address):
                port = front(self, address)
                client = self.join(port, "/box/x")
                self.assertEqual(client.read_head()[0], 200)
                self.assertEqual(client.read_chunk(), b"one\n")
                gate.write_text("\n")
                self.assertEqual(client.read_chunk(), b"two\n")
                self.assertIsNone(client.read_chunk())
                self.assertFalse(self.join(port, "/box/cut").read_answer().is_whole)
                client = self.join(port, "/box/pid")
                client.read_head()
                (pid,) = pids_in(client.read_chunk() or b"")
                client.sock.close()
                wait_until(lambda pid=pid: not is_alive(pid), "the silent run is stopped")  # type: ignore[misc]

    def test_hosts_origins_and_the_token_are_checked_behind_it_too(self) -> None:
        server = self.serve({"x": "echo x"}, allow_hosts=["box.example"], token=TOKEN)
        port = front(self, f"{server.url}/")
        right = f"Authorization: Bearer {TOKEN}"
        for headers, host, status in (
            ([right], "box.example", 200),
            ([right, "Origin: http://box.example"], "box.example", 200),
            ([right, "Origin: http://evil.test"], "box.example", 403),
            ([right], "evil.test", 403),
            ([], "box.example", 401),
        ):
            self.assertEqual(self.join(port, "/box/x", *headers, host=host).read_answer().status, status, headers)


@unittest.skipUnless(NGINX and browser.IS_THERE, "nginx, Chromium or its driver is not installed")
class NginxInABrowser(BrowserCase):
    def test_the_page_works_under_its_prefix(self) -> None:
        note = self.folder / "pid"
        post = Command(f"!echo $$ > {note}; echo hello; exec sleep 300", method="POST")
        port = front(self, f"{self.serve({'x': post}).url}/")
        self.browser.open(f"http://localhost:{port}/box/")
        self.see("document.title.startsWith('streamlog')", "the page")
        self.browser.run("document.querySelector('button.start').click()")
        self.see("frames.view.document.body.textContent.includes('hello')", "the output")
        pid = self.pid(note)
        self.browser.run("frames.view.document.querySelector('button').click()")
        wait_until(lambda: not is_alive(pid), "the run is stopped")
        self.see("frames.view.document.querySelector('main').textContent.includes('[stopped, ')", "the end")
        self.browser.click("[aria-label='More of x']")
        self.browser.click("[aria-label='Start x in the background']")
        self.see("/goes on without you/.test(frames.view.document.body.innerText)", "the page of the run")
        self.browser.run("frames.view.document.querySelector('header a').click()")
        self.see("document.querySelector('[aria-label=\"Stop x\"]')", "the runs")
        self.browser.click("[aria-label='Stop x']")
        self.see("document.querySelector('[aria-label=\"Drop x\"]')", "it has ended")
        self.browser.click("[aria-label='Drop x']")
        self.see("/No command is running/.test(document.body.innerText)", "it is dropped")
        self.browser.run("document.querySelector('[href=\"../\"]').click()")
        self.see("document.querySelector('[aria-label=\"Start x\"]')", "the commands")
        self.browser.open(f"http://localhost:{port}/box/x?y=1")
        self.see("/Bad|Not Allowed/.test(document.title)", "the error")
        self.browser.run("document.querySelector('body > header a').click()")
        self.see("document.querySelector('[aria-label=\"Start x\"]')", "the commands again")


HAPROXY_CONF = """
global
    stats socket {folder}/stats
defaults
    mode http
    timeout connect 10s
    timeout client 1m
    timeout server 1m
    timeout check 10s
frontend front
    bind 127.0.0.1:{port}
    default_backend back
backend back
    option httpchk GET /-/healthy
    default-server check inter 100ms fall 1 rise 1
    server box 127.0.0.1:{server.port}
"""


@unittest.skipUnless(shutil.which("curl"), "curl is not installed")
class Uploads(ServerCase):
    """20 MB at a time, of known and of unknown length, by clients that wait to be asked for them and that do not."""

    LENGTHS = (["-T", "data"], ["-T", "-"])
    EXPECTATIONS: tuple[list[str], ...] = ([], ["-H", "Expect: 100-continue"], ["-H", "Expect:"])

    def setUp(self) -> None:
        super().setUp()
        self.data = os.urandom(20_000_000)
        (self.folder / "data").write_bytes(self.data)
        self.server = self.serve({"sum": Command("sha256sum", stdin=True), "cat": Command("cat", stdin=True)})

    def upload(self, url: str, expected: bytes) -> None:
        """Upload the data in every way, and expect the same answer each time."""
        ways = [[*length, *expectation] for length in self.LENGTHS for expectation in self.EXPECTATIONS]
        for way in ways * (10 if SOAK >= 1000 else 2):
            command = ["curl", "-sS", "--max-time", "30", "-w", "%{http_code}", *way, url]
            with open(self.folder / "data", "rb") as data:
                done = subprocess.run(command, stdin=data, capture_output=True, cwd=self.folder)
            answer, status = done.stdout[:-3], done.stdout[-3:]
            self.assertEqual((done.returncode, status, done.stderr), (0, b"200", b""), way)
            self.assertTrue(answer == expected, f"{way}: {len(answer)} bytes: {answer[:100]!r}")

    def digest(self) -> bytes:
        return f"{hashlib.sha256(self.data).hexdigest()}  -\n".encode()

    @unittest.skipUnless(NGINX, "nginx is not installed")
    def test_through_nginx_that_passes_input_on_as_it_comes(self) -> None:
        self.upload(f"http://127.0.0.1:{front(self, f'{self.server.url}/')}/box/sum", self.digest())

    @unittest.skipUnless(NGINX, "nginx is not installed")
    def test_through_nginx_that_buffers_input(self) -> None:
        port = front(self, f"{self.server.url}/", buffers_input=True)
        self.upload(f"http://127.0.0.1:{port}/box/sum", self.digest())

    @unittest.skipUnless(HAPROXY, "haproxy is not installed")
    def test_through_haproxy_which_finds_the_server_healthy(self) -> None:
        port = free_port()
        (self.folder / "conf").write_text(HAPROXY_CONF.format(folder=self.folder, port=port, server=self.server))
        start_proxy(self, port, str(HAPROXY), "-db", "-f", str(self.folder / "conf"))

        def health() -> tuple[str, str, str]:
            """The state of the server, what the last check has found, and how many have failed."""
            with Raw(f"{self.folder}/stats") as client:
                client.send(b"show stat back 4 -1\n")  # the servers of a backend
                client.is_closed()
            (row,) = csv.DictReader(client.buffer.decode().strip("# \n").splitlines())
            return row["status"], row["check_status"].lstrip("* "), row["chkfail"]  # a * while the next check goes on

        wait_until((self.folder / "stats").exists, "it can be asked")
        wait_until(lambda: health()[1] != "INI", "the server is checked")
        self.assertEqual(health(), ("UP", "L7OK", "0"))
        self.upload(f"http://127.0.0.1:{port}/sum", self.digest())
        self.upload(f"http://127.0.0.1:{port}/cat", self.data)  # its output begins before the input ends
        self.assertEqual(health(), ("UP", "L7OK", "0"))


class Units(ServerCase):
    """The unit files, with paths and the port alone changed."""

    def setUp(self) -> None:
        super().setUp()
        (self.folder / "token").write_text(TOKEN)
        (self.folder / "token").chmod(0o400)
        shutil.copy(CERTIFICATE, self.folder / "pem")
        (self.folder / "streamlog.ini").write_text("[x]\ncommand = echo x\n")

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    def test_systemd_finds_no_fault_with_them(self) -> None:
        for name in ("socket", "service"):
            text = block("ini", f"streamlog.{name}").replace("/usr/local/bin/streamlog.py", PROGRAM)
            (self.folder / f"streamlog.{name}").write_text(text)
        paths = [str(self.folder / f"streamlog.{name}") for name in ("socket", "service")]
        done = subprocess.run(["systemd-analyze", "--man=no", "verify", *paths], capture_output=True, text=True)
        complaints = [line for line in done.stderr.splitlines() if "streamlog" in line]
        self.assertEqual(complaints, [])

    @unittest.skipUnless(shutil.which("systemd-socket-activate"), "systemd-socket-activate is not installed")
    def test_the_service_starts_by_its_socket_and_reads_its_commands_again(self) -> None:
        service = block("ini", "streamlog.service").replace("\\\n", " ")
        line = re.findall(r"^ExecStart=(.*)", service, re.M)[0]
        for old, new in (
            ("/usr/bin/python3", sys.executable),
            ("/usr/local/bin/streamlog.py", PROGRAM),
            ("/etc/streamlog.ini", f"{self.folder}/streamlog.ini"),
            ("${CREDENTIALS_DIRECTORY}", str(self.folder)),
        ):
            self.assertIn(old, line)
            line = line.replace(old, new)
        port = free_port()
        process = subprocess.Popen(
            ["systemd-socket-activate", "-l", f"127.0.0.1:{port}", *line.split()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.addCleanup(process.wait, 10)
        self.addCleanup(process.kill)

        def status(path: str) -> int:
            request = urllib.request.Request(f"https://localhost:{port}{path}")
            request.add_header("Authorization", f"Bearer {TOKEN}")
            try:
                with urllib.request.urlopen(request, context=trusting(), timeout=10) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                with error:
                    return int(error.code)
            except OSError:
                return 0

        wait_until(lambda: status("/x") == 200, "it serves")
        (self.folder / "streamlog.ini").write_text("[y]\ncommand = echo y\n")
        reload = re.findall(r"^ExecReload=(.*)", service, re.M)[0].replace("$MAINPID", str(process.pid))
        subprocess.run(reload.split(), check=True)
        wait_until(lambda: status("/y") == 200, "the new command is there")
        self.assertEqual(status("/x"), 404)
        process.terminate()
        self.assertEqual(process.wait(10), 0)


@unittest.skipUnless(IS_ROOT and shutil.which("unshare") and shutil.which("curl"), "needs root, unshare and curl")
class ManyBoxes(ServerCase):
    """Three servers, each with a host name of its own, at three addresses."""

    BOXES = ("web1", "web2", "db1")

    def setUp(self) -> None:
        super().setUp()
        self.port = free_port()
        env = {**os.environ, "STREAMLOG_TOKEN": TOKEN}
        for number, name in enumerate(self.BOXES):
            options = ["-p", str(self.port), "-b", f"127.0.0.{number + 1}", "--tls-cert", CERTIFICATE]
            options += ["--allow-host", name, "disk=df -h /", "journal=!echo start; sleep 300"]
            script = 'hostname "$0"; exec "$@"'
            command = ["unshare", "--uts", "sh", "-c", script, name, sys.executable, PROGRAM, *options]
            process = subprocess.Popen(command, env=env, stdout=-1, stderr=subprocess.DEVNULL, text=True)
            assert process.stdout
            for close in (process.stdout.close, process.wait, process.terminate):
                self.addCleanup(close)
            self.assertIn("listening", process.stdout.readline())
        self.env = env

    def run_line(self, mark: str, **how: Any) -> subprocess.Popen[str]:
        """Run a line of the README; names and certificate alone are told by options that are no part of it."""
        resolve = [
            word
            for number, name in enumerate(self.BOXES)
            for word in ("--connect-to", f"{name}:8000:127.0.0.{number + 1}:{self.port}")
        ]
        shutil.copy(CERTIFICATE, self.folder / "ca.pem")
        (self.folder / "curlrc").write_text("insecure\n")  # the certificate has other names in it
        lines = block("sh", mark).replace("\\\n", " ").splitlines()
        line = next(line for line in lines if mark in line).replace(
            "curl ", "curl -K curlrc " + " ".join(resolve) + " "
        )
        return subprocess.Popen(
            line, shell=True, env=self.env, cwd=self.folder, stdout=-1, text=True, start_new_session=True, **how
        )

    def test_one_curl_follows_them_all_and_each_line_says_where_it_is_from(self) -> None:
        with self.run_line("/journal?hostname=1") as curl:
            assert curl.stdout
            lines = {curl.stdout.readline() for _ in self.BOXES}
            self.assertEqual(lines, {f"{name} start\n" for name in self.BOXES})
            os.killpg(curl.pid, 15)

    @unittest.skipUnless(shutil.which("jq"), "jq is not installed")
    def test_the_same_as_data(self) -> None:
        with self.run_line("format=ndjson") as curl:
            lines = curl.communicate(timeout=20)[0].splitlines()
        self.assertEqual({line.partition(": ")[0] for line in lines}, set(self.BOXES))
        self.assertEqual(sum("Filesystem" in line for line in lines), 3)

    def test_which_are_there(self) -> None:
        with self.run_line("/-/healthy") as curl:
            lines = curl.communicate(timeout=20)[0].splitlines()
        self.assertEqual(sorted(lines), sorted(f"200 https://{name}:8000/-/healthy" for name in self.BOXES))

    @unittest.skipUnless(shutil.which("prometheus"), "prometheus is not installed")
    def test_prometheus_scrapes_them(self) -> None:
        text = block("yaml", "scrape_configs")
        (self.folder / "token").write_text(TOKEN)
        for number, name in enumerate(self.BOXES):
            self.assertIn(f"{name}:8000", text)
            text = text.replace(f"{name}:8000", f"127.0.0.{number + 1}:{self.port}")
        text = text.replace("/etc/prometheus/streamlog.token", "token").replace("/etc/prometheus/ca.pem", CERTIFICATE)
        text = text.replace("ca_file:", "server_name: localhost\n      ca_file:")
        (self.folder / "prometheus.yml").write_text("global: {scrape_interval: 1s}\n" + text)
        port = free_port()
        process = subprocess.Popen(
            [
                "prometheus",
                "--config.file=prometheus.yml",
                "--storage.tsdb.path=data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            cwd=self.folder,
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(process.wait, 20)
        self.addCleanup(process.terminate)

        def answer() -> Optional[list[Any]]:
            url = f"http://127.0.0.1:{port}/api/v1/query?query=streamlog_clients"
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as found:
                result = json.load(found)["data"]["result"]
                return result if len(result) == len(self.BOXES) else None
            return None

        found = wait_until(answer, "all are scraped", 30)
        instances = {entry["metric"]["instance"] for entry in found}
        self.assertEqual(instances, {f"127.0.0.{number}:{self.port}" for number in (1, 2, 3)})
