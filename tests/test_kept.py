"""Runs that outlive a connection: transcripts, and what can be done with them by HTTP."""

from __future__ import annotations

import datetime
import errno
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from typing import Any
from unittest import mock

import streamlog
from streamlog import Command, ConfigError

from . import browser
from .support import (
    ROOT,
    SOAK,
    Program,
    Raw,
    ServerCase,
    at_once,
    children,
    descriptors,
    is_alive,
    pids_in,
    resident_bytes,
    run_program,
    wait_until,
)
from .test_browser import BrowserCase

HUNDRED_THOUSAND = b"".join(b"%d\n" % number for number in range(1, 100_001))
HTML = "Accept: text/html,*/*;q=0.8"
JSON = "Accept: application/json"
CURL = shutil.which("curl")


class Transcripts(unittest.TestCase):
    def transcript(self, size: int = 16 << 20) -> streamlog.Transcript:
        return streamlog.Transcript(size, tempfile.TemporaryFile(buffering=0))

    def read(self, transcript: streamlog.Transcript, offset: int = 0) -> tuple[int, bytes]:
        """All from an offset on, and the offset that it begins at."""
        first, _, _, data = transcript.read(offset, 1 << 30)
        while True:
            at, _, _, more = transcript.read(first + len(data), 1 << 30)
            if not more:
                return first, data
            self.assertEqual(at, first + len(data))
            data += more

    def test_what_was_written_is_read_at_any_offset_with_its_streams(self) -> None:
        dice = random.Random(1)
        transcript = self.transcript()
        written: list[tuple[str, bytes]] = []
        for _ in range(300):
            piece = (dice.choice(("stdout", "stderr")), dice.randbytes(dice.randrange(1, 3000)))
            transcript.write(*piece)
            written.append(piece)
        data = b"".join(piece for _, piece in written)
        streams = b"".join((b"o" if stream == "stdout" else b"e") * len(piece) for stream, piece in written)
        for _ in range(300):
            offset, limit = dice.randrange(len(data)), dice.randrange(1, 5000)
            at, stream, _, found = transcript.read(offset, limit)
            self.assertEqual((at, found), (offset, data[offset : offset + len(found)]))
            self.assertEqual(set(streams[offset : offset + len(found)]), {ord("o" if stream == "stdout" else "e")})
            self.assertGreater(len(found), 0)
        at, stream, _, found = transcript.read(len(data), 10)
        self.assertEqual((at, stream, found), (len(data), written[-1][0], b""))

    def test_the_newest_are_kept_where_there_are_too_many(self) -> None:
        dice = random.Random(2)
        transcript = self.transcript(size=100_000)
        data = b""
        for number in range(200):
            piece = dice.randbytes(
                dice.choice((1, 700, 5000, 150_000)) if number % 50 == 0 else dice.randrange(1, 4000)
            )
            transcript.write(dice.choice(("stdout", "stderr")), piece)
            data += piece
            start, kept = self.read(transcript)
            self.assertEqual((start, kept), (max(0, len(data) - 100_000), data[-100_000:]))

    def test_what_the_disk_does_not_take_is_lost_and_the_writer_goes_on(self) -> None:
        room = [100_000]

        class Full(io.BytesIO):
            def write(self, data: Any) -> int:
                left = room[0] - self.tell()
                if left <= 0:
                    raise OSError(errno.ENOSPC, "no space")
                return super().write(data[:left])

        transcript, data = streamlog.Transcript(300_000, Full()), os.urandom(600_000)
        with self.assertLogs("streamlog", "WARNING") as logged:
            for at in range(0, len(data), 7_000):
                transcript.write("stdout", data[at : at + 7_000])
                start, kept = self.read(transcript)
                end = at + len(data[at : at + 7_000])
                self.assertEqual((transcript.end, kept), (end, data[start:end]))
        self.assertEqual([line.rpartition(": ")[2] for line in logged.output], ["[Errno 28] no space"])
        room[0] = 300_000
        transcript.write("stdout", b"again")
        self.assertEqual(self.read(transcript), (600_000, b"again"))

    def test_times_become_coarser_where_there_are_too_many(self) -> None:
        moments = iter(range(1, 1 << 30))
        with mock.patch("time.time", lambda: float(next(moments))):
            transcript = self.transcript()
            for _ in range(40_000):
                transcript.write("stdout", b"x")
        self.assertEqual(self.read(transcript), (0, b"x" * 40_000), "nothing is lost for it")
        self.assertLess(len(transcript._changes), 17_000)
        for offset in (0, 1, 20_000, 39_999):
            self.assertAlmostEqual(transcript.read(offset, 1)[2], offset + 1, delta=8)

    def test_times_of_a_long_run_are_no_worse_at_its_beginning(self) -> None:
        now = 0.0
        with mock.patch("time.time", lambda: now):
            transcript = self.transcript()
            for _ in range(240_000):  # eight hours
                now += 0.12
                transcript.write("stdout", b"x")
        late = [(offset + 1) * 0.12 - transcript.read(offset, 1)[2] for offset in range(0, 240_000, 97)]
        self.assertLess(max(map(abs, late)), 4)

    def test_changes_of_stream_are_bounded_too(self) -> None:
        transcript = self.transcript()
        for number in range(50_000):
            transcript.write(("stdout", "stderr")[number % 2], b"x")
        self.assertEqual(self.read(transcript), (transcript.start, b"x" * (50_000 - transcript.start)))
        self.assertTrue(8_000 < transcript.end - transcript.start < 17_000)

    def test_the_last_lines_are_found(self) -> None:
        for data in (
            b"",
            b"a",
            b"\n",
            b"a\n",
            b"a\nb",
            b"a\nb\n",
            b"\n\n\n",
            b"x" * 200_000 + b"\ny\n",
            b"line\n" * 50_000,
        ):
            transcript = self.transcript()
            transcript.write("stdout", data)
            for count in (0, 1, 2, 3, 40_000):
                lines = data.splitlines(keepends=True)
                wanted = b"".join(lines[-count:]) if count else b""
                offset = transcript.find_tail(count)
                self.assertEqual(
                    self.read(transcript, offset)[1] if offset < len(data) else b"", wanted, (data[:20], count)
                )

    def test_readers_beside_a_writer_see_no_byte_that_is_not_theirs(self) -> None:
        transcript = self.transcript(size=70_000)
        data = b"".join(b"%08d" % number for number in range(100_000))
        wrong: list[int] = []

        def follow(offset: int) -> None:
            while offset < len(data):
                at, _, _, found = transcript.read(offset, 5_000)
                if found != data[at : at + len(found)]:
                    wrong.append(at)
                offset = at + len(found)

        threads = [threading.Thread(target=follow, args=(number * 1000,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for at in range(0, len(data), 1_000):
            transcript.write("stdout", data[at : at + 1_000])
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])

    def test_a_bounded_reader_that_is_overtaken_gets_nothing_from_beyond_its_end(self) -> None:
        transcript = self.transcript(size=64 * 1024)
        transcript.write("stdout", b"A" * 20_000)
        transcript.write("stdout", b"B" * 65_536)
        at, _, _, data = transcript.read(16_384, 1 << 20, 20_000)
        self.assertEqual((at, data), (20_000, b""))


class KeptCase(ServerCase):
    def keep(self, server: streamlog.Server, path: str) -> str:
        """Start a run that is kept; its path."""
        answer = self.fetch(server, f"{path}{'&' if '?' in path else '?'}async=1")
        self.assertEqual(answer.status, 202, answer.body)
        self.assertEqual(answer.body.decode(), f"http://localhost/{answer.headers['location']}\n")
        return f"/{answer.headers['location']}"

    def state(self, server: streamlog.Server, path: str) -> dict[str, Any]:
        return dict(json.loads(self.fetch(server, path, headers=[JSON]).body))

    def ended(self, server: streamlog.Server, path: str) -> dict[str, Any]:
        wait_until(lambda: self.state(server, path)["state"] == "ended", "it has ended")
        return self.state(server, path)


class Kept(KeptCase):
    def test_a_run_goes_on_without_its_client_and_is_replayed(self) -> None:
        gate = self.make_gate()
        server = self.serve({"x": f"!echo one; read line < {gate}; echo two; exit 3"})
        answer = self.fetch(server, "/x", headers=["Prefer: respond-async, wait=10"])
        path = "/" + answer.headers["location"]
        self.assertRegex(path, r"^/-/runs/[A-Za-z0-9_-]{22}$")
        with self.connect(server) as client:
            client.get(path)
            client.read_head()
            self.assertEqual(client.read_chunk(), b"one\n")
            gate.write_text("\n")
            self.assertEqual(client.read_chunk(), b"two\n")
            self.assertEqual(client.read_until(b"\r\n\r\n"), b"0\r\nExit-Code: 3\r\n\r\n")
        state = self.ended(server, path)
        self.assertEqual((state["command"], state["exit_code"], state["reason"], state["bytes"]), ("x", 3, "exit", 8))
        again = self.fetch(server, path)
        self.assertEqual(
            (again.body, again.headers["exit-code"], again.headers["content-length"]), (b"one\ntwo\n", "3", "8")
        )
        self.assertTrue(again.is_whole)

    def test_a_form_is_sent_to_its_run(self) -> None:
        server = self.serve({"x": Command("echo {x}", method="POST")})
        form = ["Content-Type: application/x-www-form-urlencoded", HTML]
        answer = self.fetch(server, "/x", "POST", form, b"x=a&async=1&format=html")
        self.assertEqual(answer.status, 303)
        self.assertRegex(answer.headers["location"], r"^-/runs/[^?]+\?format=html$")
        self.assertIn(b"<samp>a\n</samp>", self.fetch(server, "/" + answer.headers["location"]).body)

    def test_runs_are_listed_for_each_reader(self) -> None:
        server = self.serve({"x": "echo {x}", "y": "sleep 60"})
        one, two = self.keep(server, "/x?x=b"), self.keep(server, "/y")
        self.ended(server, one)
        text = self.fetch(server, "/-/runs").body.decode().splitlines()
        self.assertRegex(text[0], rf"^{two[8:]}  20\S+  127\.0\.0\.1:\d+  0 bytes  y  running$")
        self.assertRegex(text[1], rf"^{one[8:]}  20\S+  127\.0\.0\.1:\d+  2 bytes  x x=b  \[exit 0, [0-9.]+ s\]$")
        listed = json.loads(self.fetch(server, "/-/runs", headers=[JSON]).body)["runs"]
        self.assertEqual(
            [(run["command"], run["values"], run["state"]) for run in listed],
            [("y", {}, "running"), ("x", {"x": "b"}, "ended")],
        )
        page = self.fetch(server, "/-/runs", headers=[HTML]).body.decode()
        self.assertIn(f'<a href="runs/{one[8:]}?format=html">x x=b</a>', page)
        self.assertEqual(re.findall('aria-label="(.*?)"', page), ["Stop y", "Drop x x=b"])

    def test_input_is_kept_with_the_run_and_the_answer_comes_at_once(self) -> None:
        gate = self.make_gate()
        commands = {
            "x": Command(f"!read go < {gate}; wc -c; echo {{n=0}}", stdin=True),
            "cat": Command("cat", stdin=True),
        }
        server = self.serve(commands, input_bytes=300_000)
        for body in (b"x" * 300_000, b"", b"a"):
            with self.subTest(size=len(body)):
                answer = self.fetch(server, "/x?async=1&n=7", "POST", [], body)
                self.assertEqual(answer.status, 202)
                path = "/" + answer.headers["location"]
                self.assertEqual(self.state(server, path)["state"], "running")
                gate.write_text("\n")
                self.assertEqual(self.ended(server, path)["exit_code"], 0)
                self.assertEqual(self.fetch(server, path).body.split(), [b"%d" % len(body), b"7"])
        webhook = ["Content-Type: application/json"]
        answer = self.fetch(server, "/cat?async=1", "POST", webhook, b'{"ref": {"a": 1}}')
        path = "/" + answer.headers["location"]
        self.ended(server, path)
        self.assertEqual(self.fetch(server, path).body, b'{"ref": {"a": 1}}')
        with self.connect(server) as client:  # in chunks, so that its length is not known before
            client.send(b"PUT /cat?async=1 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(2):
                client.send(b"1f4\r\n" + b"y" * 500 + b"\r\n")
            client.send(b"0\r\n\r\n")
            path = "/" + client.read_answer().headers["location"]
        self.ended(server, path)
        self.assertEqual(self.fetch(server, path).body, b"y" * 1000)
        self.assertEqual(self.fetch(server, "/cat?async=1", "PUT", [], b"x" * 300_001).status, 413)
        self.assertEqual(json.loads(self.fetch(server, "/-/runs", headers=[JSON]).body)["runs"][0]["command"], "cat")

    def test_a_kept_run_that_does_not_read_its_input_ends_as_any_other(self) -> None:
        server = self.serve({"x": Command("true", stdin=True), "y": Command("sleep 60", stdin=True)})
        answer = self.fetch(server, "/x?async=1", "PUT", [], b"x" * 1_000_000)
        self.assertEqual(self.ended(server, "/" + answer.headers["location"])["exit_code"], 0)
        path = "/" + self.fetch(server, "/y?async=1", "PUT", [], b"x" * 1_000_000).headers["location"]
        self.fetch(server, path, "DELETE")
        self.assertEqual(self.ended(server, path)["reason"], "on request")

    def test_a_live_run_is_listed_too_and_stopped_by_its_address(self) -> None:
        note = self.folder / "pid"
        server = self.serve({"x": f"!echo $$ > {note}; echo {{x}}; exec sleep 60"})
        for method, headers, status in (("DELETE", [], 202), ("POST", [], 202), ("POST", [HTML], 303)):
            with self.subTest(method=method, headers=headers), self.connect(server) as client:
                client.get("/x?x=b")
                client.read_until(b"b\n")
                pid = int(note.read_text())
                (run,) = json.loads(self.fetch(server, "/-/runs", headers=[JSON]).body)["runs"]
                told = [run[key] for key in ("command", "values", "state", "bytes", "kept", "client")]
                address = f"127.0.0.1:{client.sock.getsockname()[1]}"
                self.assertEqual(told, ["x", {"x": "b"}, "running", 2, False, address])
                path = f"/-/runs/{run['id']}"
                self.assertEqual(self.state(server, path)["id"], run["id"])
                answer = self.fetch(server, path)
                self.assertEqual(answer.headers["content-type"], "application/json", "its output is its client's")
                self.assertEqual(self.fetch(server, path, method, headers).status, status)
                self.assertTrue(client.is_closed())
                self.assertRegex(client.buffer, rb"\[stopped, \d\.\d s\]\n\r\n$")
                self.assertFalse(is_alive(pid))
                wait_until(lambda path=path: self.fetch(server, path).status == 410, "it is gone")  # type: ignore[misc]
        self.assertEqual(self.fetch(server, "/-/runs").body, b"")

    def test_each_run_of_a_crowd_is_listed_until_it_ends(self) -> None:
        server = self.serve({"x": "sleep 60", "y": Command("cat", stdin=True)}, max_runs=100)
        clients = []
        for number in range(20):
            client = self.connect(server)
            client.get(f"/x?{'async=1' if number % 4 == 3 else ''}")
            client.read_head()
            clients.append(client)
        runs = json.loads(self.fetch(server, "/-/runs", headers=[JSON]).body)["runs"]
        self.assertEqual((len(runs), len({run["id"] for run in runs}), sum(run["kept"] for run in runs)), (20, 20, 5))
        started = [run["started"] for run in runs]
        self.assertEqual(started, sorted(started))
        for client in clients:
            client.sock.close()
        wait_until(lambda: self.fetch(server, "/-/runs").body.count(b"\n") == 5, "the others go with their clients")

    def test_an_ended_run_is_dropped_by_delete_and_a_running_one_is_not(self) -> None:
        server = self.serve({"x": "echo x", "y": "sleep 60"})
        for method, query, headers in (("DELETE", "", []), ("POST", "?drop=1", []), ("POST", "?drop=1", [HTML])):
            x, y = self.keep(server, "/x"), self.keep(server, "/y")
            self.ended(server, x)
            with self.connect(server) as reader:
                reader.get(f"{x}?format=ndjson")
                reader.read_until(b'"x')
                self.assertEqual(self.fetch(server, x + query, method, headers).status, 303 if headers else 202)
                self.assertEqual(self.fetch(server, x).status, 410)
            self.assertLess(self.fetch(server, y + query, method, headers).status, 400)
            self.assertEqual(self.ended(server, y)["reason"], "on request", "it is stopped, and kept")
            self.fetch(server, y, "DELETE")
        x = self.keep(server, "/x")
        self.ended(server, x)
        self.assertEqual(self.fetch(server, x, "POST").status, 202, "a page that is old has Stop")
        self.assertEqual(self.fetch(server, x).body, b"x\n")
        self.assertEqual(self.fetch(server, f"{x}?tail=1", "DELETE").status, 400)
        self.assertEqual(self.fetch(server, f"{x}?drop=1").status, 400)

    def test_a_value_cannot_drive_the_terminal_that_the_list_is_read_on(self) -> None:
        server = self.serve({"x": "echo {x:(?s:.*)}"})
        self.keep(server, "/x?x=a%0a%1b%5b31m%c2%9b2J%c3%a9")
        text = self.fetch(server, "/-/runs").body
        self.assertEqual(text.count(b"\n"), 1)
        self.assertIn(rb"x x=a\x0a\x1b[31m\x9b2J\xe9  ", text)

    def test_any_place_can_be_asked_for(self) -> None:
        server = self.serve({"x": "seq 1 1000"})
        path = self.keep(server, "/x")
        whole = b"".join(b"%d\n" % number for number in range(1, 1001))
        self.ended(server, path)
        for query, headers, status, body in (
            ("?tail=2", [], 200, b"999\n1000\n"),
            ("?follow=0", [], 200, whole),
            ("", ["Range: bytes=3890-"], 206, whole[3890:]),
            ("", ["Range: bytes=10-19"], 200, whole),
            ("", ["Range: bytes=-19"], 200, whole),
            ("", ["Range: bytes=5-1, 3-4"], 200, whole),
            ("", [f"Range: bytes={len(whole)}-"], 416, b"that range cannot be had: there are only 3893 bytes\n"),
            ("?tail=x", [], 400, b"parameter 'tail' must be a number of lines: 'x'\n"),
            ("?follow=2", [], 400, b"parameter 'follow' must be 0 or 1: '2'\n"),
            ("?x=1", [], 400, None),
        ):
            with self.subTest(query=query, headers=headers):
                answer = self.fetch(server, path + query, headers=headers)
                self.assertEqual(answer.status, status)
                if body is not None:
                    self.assertEqual(answer.body, body)
        self.assertEqual(
            self.fetch(server, path, headers=["Range: bytes=10-"]).headers["content-range"], "bytes 10-3892/3893"
        )
        self.assertEqual(
            self.fetch(server, path, headers=["Range: bytes=3893-"]).headers["content-range"], "bytes */3893"
        )
        head, get = self.fetch(server, path, "HEAD"), self.fetch(server, path)
        only_get = {"x-accel-buffering": "no"}
        self.assertEqual({**head.headers, **only_get, "date": ""}, {**get.headers, "date": ""})
        self.assertEqual((head.headers["content-length"], head.headers["accept-ranges"]), ("3893", "bytes"))
        both = ["Range: bytes=3890-", 'If-Range: "x"']
        self.assertEqual(self.fetch(server, path, headers=both).body, whole)

    def test_a_range_of_a_run_that_goes_on_follows_it(self) -> None:
        gate = self.make_gate()
        server = self.serve({"x": f"!echo one; read line < {gate}; echo two"})
        path = self.keep(server, "/x")
        wait_until(lambda: self.state(server, path)["bytes"] == 4, "the first line is there")
        snapshot = self.fetch(server, f"{path}?follow=0", headers=["Range: bytes=1-"])
        self.assertEqual(
            (snapshot.status, snapshot.body, snapshot.headers["content-range"]), (206, b"ne\n", "bytes 1-3/*")
        )
        self.assertEqual(self.fetch(server, f"{path}?follow=0", headers=["Range: bytes=4-"]).status, 416)
        with self.connect(server) as client:
            client.get(path, headers=["Range: bytes=4-"])
            status, headers = client.read_head()
            self.assertEqual((status, headers["content-range"]), (206, f"bytes 4-{(1 << 53) - 1}/*"))
            gate.write_text("\n")
            self.assertEqual(client.read_chunk(), b"two\n")

    def test_every_format_replays_with_its_streams(self) -> None:
        gate = self.make_gate()
        server = self.serve({"x": f"!echo out; read _ <> {gate}; echo err >&2; read _ <> {gate}; echo more"})
        path = self.keep(server, "/x")
        for count in (4, 8):
            wait_until(lambda count=count: self.state(server, path)["bytes"] == count, "it is kept")  # type: ignore[misc]
            gate.write_text("\n")
        self.ended(server, path)
        self.assertIn(b'<samp class="e">err\n</samp>', self.fetch(server, f"{path}?format=html").body)
        lines = [json.loads(line) for line in self.fetch(server, f"{path}?format=ndjson").body.splitlines()]
        self.assertEqual(
            [(line.get("stream"), line.get("line")) for line in lines[:3]],
            [("stdout", "out"), ("stderr", "err"), ("stdout", "more")],
        )
        self.assertEqual(lines[3]["exit_code"], 0)
        sse = self.fetch(server, path, headers=["Accept: text/event-stream"]).body
        self.assertIn(b"event: stderr\nid: 8\ndata: err\n\n", sse)
        resumed = self.fetch(server, path, headers=["Accept: text/event-stream", "Last-Event-ID: 8"]).body
        self.assertTrue(resumed.startswith(b"id: 8\n\nid: 13\ndata: more\n\nevent: exit\n"), resumed)
        done = self.fetch(server, path, headers=["Accept: text/event-stream", "Last-Event-ID: 13"])
        self.assertEqual(done.status, 204)
        snapshot = self.fetch(server, f"{path}?follow=0&format=ndjson").body
        self.assertNotIn(b"exit_code", snapshot)

    def test_times_are_those_at_which_it_was_written(self) -> None:
        gate = self.make_gate()
        server = self.serve({"x": f"!echo 1000; read _ <> {gate}; echo 2000"})
        with mock.patch("time.time", return_value=1000.0) as clock:
            path = self.keep(server, "/x")
            wait_until(lambda: self.state(server, path)["bytes"], "the first line is kept")
            clock.return_value = 2000.0
            gate.write_text("\n")
            self.ended(server, path)
        lines = self.fetch(server, f"{path}?timestamps=1").body.decode().splitlines()
        records = map(json.loads, self.fetch(server, f"{path}?format=ndjson").body.splitlines()[:-1])
        for stamp, moment in [*map(str.split, lines), *((record["time"], record["line"]) for record in records)]:
            self.assertEqual(datetime.datetime.fromisoformat(stamp).timestamp(), float(moment))

    def test_a_run_is_stopped_and_says_so(self) -> None:
        server = self.serve({"x": "!echo $$; exec sleep 300"})
        for method, headers, status in (("DELETE", [], 202), ("POST", [], 202), ("POST", [HTML], 303)):
            path = self.keep(server, "/x")
            wait_until(lambda path=path: self.state(server, path)["bytes"], "it runs")  # type: ignore[misc]
            (pid,) = pids_in(self.fetch(server, f"{path}?follow=0").body)
            self.assertEqual(self.fetch(server, path, method, headers).status, status)
            state = self.ended(server, path)
            self.assertEqual((state["exit_code"], state["signal"], state["reason"]), (143, 15, "on request"))
            self.assertFalse(is_alive(pid))
            answer = self.fetch(server, path)
            self.assertEqual(answer.is_whole, False)
            self.assertIn(b"\n[stopped, ", answer.body)

    def test_one_that_does_not_heed_sigterm_is_killed_after_the_grace_time(self) -> None:
        server = self.serve({"x": "!trap '' TERM; echo $$; while :; do sleep 0.1; done"}, grace_seconds=0.3)
        path = self.keep(server, "/x")
        wait_until(lambda: self.state(server, path)["bytes"], "it runs")
        self.fetch(server, path, "DELETE")
        self.assertEqual(self.ended(server, path)["exit_code"], 137)

    def test_a_hole_in_bytes_alone_is_a_cut(self) -> None:
        gate = self.make_gate()
        csv = Command(f"!read line < {gate}; head -c 20000000 /dev/zero; sleep 0.3", type="text/csv")
        server = self.serve({"x": csv, "y": Command(str(csv.command))}, transcript_bytes=64 * 1024)
        for path, headers in (("/x", []), ("/y", ["Range: bytes=0-"])):
            run = self.keep(server, path)
            with self.connect(server, receive_buffer=4096) as client:
                client.get(run, headers=headers)
                self.assertEqual(client.read_head()[0], 206 if headers else 200)
                gate.write_text("\n")
                self.ended(server, run)
                with self.assertRaises(EOFError):
                    while client.read_chunk() is not None:
                        pass

    def test_a_range_of_a_run_that_was_cut_short_is_cut(self) -> None:
        server = self.serve({"x": Command("!echo a; exec sleep 30", timeout=2)})
        path = self.keep(server, "/x")
        wait_until(lambda: self.state(server, path)["bytes"], "it has put something out")
        answer = self.fetch(server, path, headers=["Range: bytes=0-"])
        self.assertEqual((answer.status, answer.is_whole, answer.body), (206, False, b"a\n"))
        self.ended(server, path)
        for start, body in ((0, b"a\n"), (1, b"\n"), (2, b"")):
            answer = self.fetch(server, path, headers=[f"Range: bytes={start}-"])
            self.assertEqual((answer.status, answer.is_whole, answer.body), (206, False, body))
            self.assertEqual(answer.headers["content-range"], f"bytes {start}-{(1 << 53) - 1}/*")
        self.assertNotIn("content-length", self.fetch(server, path, "HEAD").headers)
        if CURL:
            for options in ([], ["-C", "-"], ["-C", "-"]):
                fetched = [CURL, "-s", *options, "-o", str(self.folder / "got"), f"{server.url}{path}?footer=0"]
                self.assertEqual(subprocess.run(fetched, check=False).returncode, 18, options)
            self.assertEqual((self.folder / "got").read_bytes(), b"a\n")

    def test_a_range_of_a_command_starts_and_ends_nothing(self) -> None:
        server = self.serve({"x": "!sleep 0.2; echo done", "s": Command("!sleep 0.2; echo done", shared=True)})
        for path in ("/x?wait", "/s"):
            answer = self.fetch(server, path, headers=["Range: bytes=2-99"])
            self.assertEqual((answer.status, answer.body), (200, b"done\n"))

    def test_what_has_just_ended_is_not_the_first_to_be_dropped(self) -> None:
        gate = self.make_gate()
        server = self.serve({"long": f"!read _ <> {gate}", "short": "true"}, kept_runs=1)
        long, short = self.keep(server, "/long"), self.keep(server, "/short")
        self.ended(server, short)
        gate.write_text("\n")
        self.assertEqual(self.ended(server, long)["exit_code"], 0)
        self.assertEqual(self.fetch(server, short).status, 410)

    def test_ids_that_are_not_known_or_malformed(self) -> None:
        server = self.serve({"x": "true"})
        for path, status in (
            ("/-/runs/" + "A" * 22, 410),
            ("/-/runs/..", 404),
            ("/-/runs/" + "A" * 21, 404),
            ("/-/runs/a%2Fb", 404),
            ("/-/runs/", 404),
        ):
            for method in ("GET", "DELETE"):
                self.assertEqual(self.fetch(server, path, method).status, status)
        self.assertEqual(self.fetch(server, "/-/runs/" + "A" * 22, "PUT").status, 405)

    def test_another_site_and_one_without_the_token_stop_nothing(self) -> None:
        server = self.serve({"x": "sleep 60"}, token="secret")
        bearer = "Authorization: Bearer secret"
        path = "/" + self.fetch(server, "/x?async=1", headers=[bearer]).headers["location"]
        self.assertEqual(self.fetch(server, path, "DELETE").status, 401)
        self.assertEqual(self.fetch(server, path, "POST", [bearer, "Origin: http://evil.example"]).status, 403)
        self.assertEqual(json.loads(self.fetch(server, path, headers=[bearer, JSON]).body)["state"], "running")

    def test_tasks_and_limits_hold(self) -> None:
        server = self.serve(
            {
                "t": Command(lambda: "from a task"),
                "y": "yes",
                "slow": Command("sleep 60", timeout=0.2),
                "one": Command("sleep 60", max=1),
            },
            max_output_bytes=100_000,
        )
        self.assertEqual(self.ended(server, self.keep(server, "/t"))["bytes"], 11)
        state = self.ended(server, self.keep(server, "/y"))
        self.assertEqual((state["bytes"], state["reason"]), (100_000, "output limit of 100000 bytes"))
        path = self.keep(server, "/slow")
        self.assertEqual(self.ended(server, path)["reason"], "timeout after 0.2 s")
        sample = 'streamlog_runs_total{command="slow",outcome="timeout"}'
        wait_until(lambda: self.metric(server, sample) == 1, "it is counted")
        self.keep(server, "/one")
        self.assertEqual(self.fetch(server, "/one?async=1").status, 503)

    def test_what_has_ended_is_dropped_by_number_age_and_bytes(self) -> None:
        server = self.serve({"x": "echo {n}"}, kept_runs=3)
        paths = []
        for number in range(5):
            paths.append(self.keep(server, f"/x?n={number}"))
            wait_until(lambda: b"running" not in self.fetch(server, "/-/runs").body, "it has ended")
        self.assertEqual([self.fetch(server, path).status for path in paths], [410, 410, 200, 200, 200])
        old = self.serve({"x": "echo x"}, kept_seconds=0.3)
        path = self.keep(old, "/x")
        wait_until(lambda: self.fetch(old, path).status == 410, "it is too old")
        small = self.serve({"x": "head -c 300000 /dev/zero"}, transcript_bytes=200_000, transcripts_bytes=500_000)
        paths = []
        for _ in range(3):
            paths.append(self.keep(small, "/x"))
            wait_until(lambda: b"running" not in self.fetch(small, "/-/runs").body, "it has ended")
        self.assertEqual([self.fetch(small, path).status for path in paths], [410, 200, 200])

    def test_runs_that_start_at_once_share_the_room_for_transcripts(self) -> None:
        server = self.serve({"x": "sleep 60"}, transcript_bytes=100_000, transcripts_bytes=250_000)
        statuses: list[int] = []

        def ask() -> None:
            statuses.append(self.fetch(server, "/x?async=1").status)

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(statuses), [202] * 2 + [503] * 10)

    def test_what_is_no_longer_kept_is_told(self) -> None:
        server = self.serve({"x": "head -c 300000 /dev/zero"}, transcript_bytes=100_000)
        path = self.keep(server, "/x")
        self.ended(server, path)
        answer = self.fetch(server, path)
        self.assertTrue(answer.body.startswith(b"[200000 bytes are no longer kept]\n\0"), answer.body[:50])
        self.assertEqual(len(answer.body), 100_034)
        self.assertEqual(self.fetch(server, path, headers=["Range: bytes=10-"]).status, 416)
        self.assertEqual(len(self.fetch(server, path, headers=["Range: bytes=200000-"]).body), 100_000)
        self.assertIn(b'{"time"', self.fetch(server, f"{path}?format=ndjson").body[:10])
        self.assertIn(b'"skipped_bytes": 200000', self.fetch(server, f"{path}?format=ndjson").body[:100])
        self.assertIn(
            b"event: skipped\nid: 200000\ndata: 200000\n\n", self.fetch(server, f"{path}?format=sse").body[:100]
        )
        self.assertIn(b"[200000 bytes are no longer kept]", self.fetch(server, f"{path}?format=html").body)

    def test_what_came_before_a_gap_goes_out_before_it(self) -> None:
        format_ = streamlog.Ndjson()
        written = format_.feed("stdout", b"abc") + format_.skip(1000) + format_.feed("stdout", b"def\nghi\n")
        told = [json.loads(line) for line in written.splitlines()]
        self.assertEqual([line.get("line", line.get("skipped_bytes")) for line in told], ["abc", 1000, "def", "ghi"])

    def test_closing_the_server_ends_its_kept_runs_and_leaves_nothing(self) -> None:
        server = self.serve({"x": "!trap '' TERM; echo $$; while :; do sleep 0.05; done"}, grace_seconds=0.2)
        path = self.keep(server, "/x")
        wait_until(lambda: self.state(server, path)["bytes"], "it runs")
        (pid,) = pids_in(self.fetch(server, f"{path}?follow=0").body)
        client = self.connect(server)
        client.get(path)
        client.read_head()
        server.close()
        wait_until(lambda: not is_alive(pid), "it is gone")
        self.assertFalse(client.read_until(b"\n") and client.is_closed() and client.buffer.endswith(b"0\r\n\r\n"))

    def test_a_viewer_that_leaves_an_endless_run_is_gone_at_once(self) -> None:
        server = self.serve({"x": "yes"})
        path = self.keep(server, "/x")
        with self.connect(server) as client:
            client.get(path)
            client.read_head()
            client.read_chunk()
        wait_until(lambda: not server._clients, "its thread has ended")

    def test_a_forked_worker_lets_go_of_all(self) -> None:
        script = (
            "import os, streamlog, time, urllib.request as u\n"
            "server = streamlog.start({'x': '!echo $$; exec sleep 300', 'y': 'echo y'}, port=0)\n"
            "get = lambda path: u.urlopen(server.url + path).read().decode()\n"
            "get('/y?async=1'); get('/x?async=1')\n"
            "while get('/-/runs').count('running') > 1 or '  0 bytes' in get('/-/runs'): time.sleep(0.01)\n"
            "if not os.fork(): print(len(os.listdir('/proc/self/fd')), flush=True); os._exit(0)\n"
            "os.wait(); print(get('/-/runs').count('running'))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, stdin=-3, stdout=-1, stderr=-3, text=True, timeout=20
        )
        self.assertEqual(done.stdout.split(), ["4", "1"])

    def test_where_nothing_is_kept_a_run_goes_on_all_the_same(self) -> None:
        server = self.serve({"x": "printf abc"}, transcript_bytes=0)
        path = self.keep(server, "/x")
        self.assertEqual(self.ended(server, path)["bytes"], 3)
        self.assertEqual(self.fetch(server, path).body, b"[2 bytes are no longer kept]\nc")
        self.assertEqual(self.fetch(server, "/x?wait").status, 507)

    def test_memory_stays_flat(self) -> None:
        server = self.serve({"x": "head -c 300000000 /dev/zero"})
        before = resident_bytes()
        path = self.keep(server, "/x")
        most = 0
        while self.state(server, path)["state"] == "running":
            most = max(most, resident_bytes())
        self.assertTrue(0 < most < before + (6 << 20))


class Waiting(KeptCase):
    def test_the_answer_comes_at_the_end_with_status_length_and_exit_code(self) -> None:
        server = self.serve({"x": "!echo out; sleep 0.2; exit {n:int=0}"})
        for n, status in ((0, 200), (3, 500)):
            answer = self.fetch(server, f"/x?n={n}&wait")
            self.assertEqual(
                (answer.status, answer.headers["exit-code"], answer.headers["content-length"]), (status, str(n), "4")
            )
            self.assertEqual(answer.body, b"out\n")
        path = self.keep(server, "/x?n=4")
        answer = self.fetch(server, f"{path}?wait=1")
        self.assertEqual((answer.status, answer.headers["exit-code"], answer.body), (500, "4", b"out\n"))
        self.assertEqual(len(json.loads(self.fetch(server, "/-/runs", headers=[JSON]).body)["runs"]), 1)

    def test_more_than_is_kept_is_no_plain_200(self) -> None:
        server = self.serve({"x": "head -c {n:int} /dev/zero"}, transcript_bytes=100_000)
        whole = self.fetch(server, "/x?wait&n=100000")
        self.assertEqual((whole.status, len(whole.body)), (200, 100_000))
        cut = self.fetch(server, "/x?wait&n=100001")
        self.assertEqual((cut.status, cut.headers["exit-code"]), (507, "0"))
        self.assertEqual(cut.headers["content-type"], "text/plain; charset=utf-8")
        self.assertIn(b"the answer has 100001 bytes, more than is kept", cut.body)

    def test_curl_fails_where_the_command_does(self) -> None:
        if not shutil.which("curl"):
            self.skipTest("curl is not installed")
        server = self.serve({"x": "!exit {n:int}"})
        for n, code in ((0, 0), (2, 22)):
            self.assertEqual(
                subprocess.run(["curl", "-sS", "--fail", f"{server.url}/x?n={n}&wait"], stderr=-3).returncode, code
            )

    def test_a_client_that_leaves_ends_the_run(self) -> None:
        note = self.folder / "pid"
        server = self.serve({"x": f"!echo $$ > {note}; exec sleep 300"})
        client = self.connect(server)
        client.get("/x?wait")
        wait_until(lambda: note.exists() and note.read_text(), "it runs")
        (pid,) = pids_in(note.read_bytes())
        client.sock.close()
        wait_until(lambda: not is_alive(pid), "it is gone")

    def test_a_command_with_input_can_be_waited_for_and_preferred_to_be_kept(self) -> None:
        server = self.serve({"x": Command("!cat; exit 3", stdin=True)})
        data = os.urandom(1_000_000)
        answer = self.fetch(server, "/x?wait", "PUT", [], data)
        self.assertEqual((answer.status, answer.headers["exit-code"], answer.body), (500, "3", data))
        kept = self.fetch(server, "/x", "PUT", ["Prefer: respond-async"], data)
        self.assertEqual(self.fetch(server, f"/{kept.headers['location']}?wait").body, data)

    def test_what_cannot_be_kept_is_told(self) -> None:
        server = self.serve({"y": "true"})
        self.assertIn(b"parameter 'tail' is not available: 'y' is not shared", self.fetch(server, "/y?tail=1").body)
        self.assertIn(b"must be 0 or 1", self.fetch(server, "/y?wait=2").body)


class Shared(KeptCase):
    def test_a_second_client_joins_the_run_with_equal_values(self) -> None:
        count, gate = self.folder / "count", self.make_gate()
        script = f"!echo run >> {count}; echo {{x=a}} first; read line < {gate}; echo last"
        server = self.serve({"x": Command(script, shared=True)})
        clients = []
        for path in ("/x", "/x?x=a", "/x?tail=0"):
            client = self.connect(server)
            client.get(path)
            client.read_head()
            if "tail" not in path:
                self.assertEqual(client.read_chunk(), b"a first\n")
            clients.append(client)
        self.assertEqual(count.read_text(), "run\n")
        gate.write_text("\n")
        for client in clients:
            self.assertEqual(client.read_chunk(), b"last\n")
            self.assertEqual(client.read_until(b"\r\n\r\n"), b"0\r\nExit-Code: 0\r\n\r\n")
        with self.connect(server) as other:
            other.get("/x?x=b")
            other.read_head()
            self.assertEqual(other.read_chunk(), b"b first\n")

    def test_it_ends_when_its_last_viewer_has_been_gone_for_the_linger_time(self) -> None:
        command = Command("!echo $$; exec sleep 300", shared=True)
        server = self.serve({"x": command}, linger_seconds=0.2)
        one, two = self.connect(server), self.connect(server)
        for client in (one, two):
            client.get("/x")
            client.read_head()
        (pid,) = pids_in(one.read_chunk() or b"")
        one.sock.close()
        time.sleep(0.7)
        self.assertTrue(is_alive(pid), "there is a viewer")
        two.sock.close()
        wait_until(lambda: not is_alive(pid), "it ends")
        patient = self.serve({"x": command}, linger_seconds=60)
        found = []
        for _ in range(2):  # one may come back
            with self.connect(patient) as client:
                client.get("/x")
                client.read_head()
                found.append(client.read_chunk())
            wait_until(lambda: not patient._clients, "it has left")
        self.assertEqual(found[0], found[1])

    def test_an_eventsource_resumes_and_never_starts_a_second_run(self) -> None:
        gate = self.make_gate()
        server = self.serve({"x": Command(f"!echo one; echo two; read line < {gate}", shared=True)})
        with self.connect(server) as client:
            client.get("/x", headers=["Accept: text/event-stream"])
            client.read_until(b"data: two\n\n")
        resumed = self.connect(server)
        resumed.get("/x", headers=["Accept: text/event-stream", "Last-Event-ID: 4"])
        self.assertIn(b"id: 8\ndata: two\n\n", resumed.read_until(b"two\n\n"))
        gate.write_text("\n")
        resumed.read_until(b"event: exit")
        wait_until(lambda: b"running" not in self.fetch(server, "/-/runs").body, "it has ended")
        self.assertEqual(
            self.fetch(server, "/x", headers=["Accept: text/event-stream", "Last-Event-ID: 8"]).status, 204
        )

    def test_a_reconnect_while_the_run_is_being_started_starts_no_other(self) -> None:
        is_starting, may_start = threading.Event(), threading.Event()

        def spawn(*arguments: Any, real: Any = streamlog._spawn) -> Any:
            is_starting.set()
            may_start.wait(10)
            return real(*arguments)

        server = self.serve({"x": Command("!echo $$; exec sleep 300", shared=True)})
        with mock.patch("streamlog._spawn", spawn), self.connect(server) as client:
            client.get("/x")
            self.assertTrue(is_starting.wait(10))
            headers = ["Accept: text/event-stream", "Last-Event-ID: 4"]
            self.assertEqual(self.fetch(server, "/x", headers=headers).status, 204)
            may_start.set()
            client.read_head()

    def test_two_that_come_at_once_get_one_run(self) -> None:
        count, gate = self.folder / "count", self.make_gate()
        server = self.serve({"x": Command(f"!echo run >> {count}; read _ <> {gate}; echo done", shared=True)})
        clients = [self.connect(server) for _ in range(20)]

        def ask(client: Raw) -> None:
            client.get("/x")
            client.read_head()

        at_once(self, ask, *([client] for client in clients))
        gate.write_text("\n")
        for client in clients:
            self.assertEqual(client.read_chunk(), b"done\n")
        self.assertEqual(count.read_text(), "run\n")

    def test_it_takes_no_input(self) -> None:
        with self.assertRaisesRegex(ConfigError, "can have neither stdin nor headers"):
            Command("cat", shared=True, stdin=True)

    def test_standard_input_is_served_to_any_number(self) -> None:
        with Program("-p", "0", "-q", "-", stdin=subprocess.PIPE) as program:
            stdin = program.process.stdin
            assert stdin
            clients = [program.connect() for _ in range(3)]
            for client in clients:
                self.addCleanup(client.sock.close)
                client.get("/stdin")
                client.read_head()
            for line in ("one\n", "two\n"):
                stdin.write(line)
                stdin.flush()
                for client in clients:
                    self.assertEqual(client.read_chunk(), line.encode())
            stdin.close()
            for client in clients:
                self.assertEqual(client.read_until(b"\r\n\r\n"), b"0\r\nExit-Code: 0\r\n\r\n")
            self.assertEqual(program.fetch("/stdin?tail=1").body, b"two\n")
            self.assertEqual(program.fetch("/stdin?async=1").status, 400)
            with program.connect() as client:
                client.get("/", headers=[HTML])
                page = client.read_answer().body
            self.assertIn(b"Start stdin", page)
            self.assertNotIn(b"Background", page)
            program.process.stdin = None
        self.assertIn("standard input can be served only once", run_program("-p", "0", "-", "x=-").stderr)


class Crowds(KeptCase):
    def test_readers_that_join_at_random_moments_get_identical_bytes(self) -> None:
        server = self.serve({"x": "!seq 1 50000; sleep 0.3; seq 50001 100000"}, max_runs=10)
        path = self.keep(server, "/x")
        count = 500 if SOAK >= 1000 else 60
        wanted = hashlib.sha256(HUNDRED_THOUSAND).digest()
        dice = random.Random(3)
        got: list[bool] = []

        def read(delay: float) -> None:
            time.sleep(delay)
            answer = self.fetch(server, path)
            got.append(answer.is_whole and hashlib.sha256(answer.body).digest() == wanted)

        threads = [threading.Thread(target=read, args=(dice.random() * 0.6,)) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(got, [True] * count)

    def test_a_thousand_viewers_and_one_that_does_not_read(self) -> None:
        gate = self.make_gate()
        server = self.serve({"x": f"!head -c 8000000 /dev/zero; read line < {gate}; echo; echo end"})
        path = self.keep(server, "/x")
        wait_until(lambda: self.state(server, path)["bytes"] == 8_000_000, "all is kept")
        stuck = self.connect(server, receive_buffer=4096)
        stuck.get(path)
        stuck.read_head()
        viewers = [self.connect(server) for _ in range(1000 if SOAK >= 1000 else 200)]
        for viewer in viewers:
            viewer.get(f"{path}?tail=0")
        for viewer in viewers:
            viewer.read_head()
        gate.write_text("\n")
        for viewer in viewers:
            self.assertIn(b"end\n", viewer.read_until(b"Exit-Code: 0"))
            viewer.sock.close()

    def test_stop_races_exit(self) -> None:
        server = self.serve({"x": "true"}, kept_runs=10)
        for number in range(SOAK):
            path = self.keep(server, "/x")
            if number % 3:
                time.sleep(random.Random(number).random() / 200)
            self.assertEqual(self.fetch(server, path, "DELETE").status, 202)
            if self.fetch(server, path, headers=[JSON]).status == 200:  # or else it had ended, and was dropped
                state = self.ended(server, path)
                self.assertIn(
                    (state["exit_code"], state["reason"]), ((0, "exit"), (143, "on request"), (0, "on request"))
                )

    def test_one_run_is_started_watched_resumed_and_stopped_from_many_sides(self) -> None:
        if not shutil.which("curl"):
            self.skipTest("curl is not installed")
        gate = self.make_gate()
        server = self.serve(
            {"x": f"!echo $$ > {gate}.pid; seq 1 60000; read line < {gate}; seq 60001 100000; exec sleep 300"}
        )
        url = subprocess.run(["curl", "-s", f"{server.url}/x?async=1"], stdout=-1, text=True).stdout.strip()
        path = url.partition("/-/")[1] + url.partition("/-/")[2]
        wait_until(lambda: self.state(server, path)["bytes"] > 300_000, "the first part is there")
        part = self.folder / "part"
        first = subprocess.Popen(["curl", "-sN", "-o", str(part), url])
        wait_until(lambda: part.exists() and part.stat().st_size > 200_000, "some has come")
        first.kill()
        first.wait()
        watching = [subprocess.Popen(["curl", "-sN", url], stdout=-1) for _ in range(3)]
        resumed = subprocess.Popen(["curl", "-sN", "-C", "-", "-o", str(part), url])
        gate.write_text("\n")
        wait_until(lambda: part.stat().st_size == len(HUNDRED_THOUSAND), "the rest has come")
        self.assertEqual(part.read_bytes(), HUNDRED_THOUSAND)
        subprocess.run(["curl", "-s", "-X", "DELETE", url], stdout=-3)
        for curl in watching:
            out = curl.communicate(timeout=10)[0]
            self.assertEqual((curl.returncode, out[: len(HUNDRED_THOUSAND)] == HUNDRED_THOUSAND), (18, True))
        resumed.wait(10)
        self.assertFalse(is_alive(*pids_in((self.folder / "gate.pid").read_bytes())))

    def test_a_program_polls_by_state_and_ranges_alone(self) -> None:
        server = self.serve({"x": "!for i in 1 2 3 4 5; do echo line $i; sleep 0.1; done; exit 2"})
        path = self.keep(server, "/x")
        got = b""
        while True:
            state = self.state(server, path)
            answer = self.fetch(server, f"{path}?follow=0", headers=[f"Range: bytes={len(got)}-"])
            if answer.status == 206:
                got += answer.body
            if state["state"] == "ended" and len(got) == state["bytes"]:
                break
            time.sleep(0.05)
        self.assertEqual((got, state["exit_code"]), (b"".join(b"line %d\n" % n for n in range(1, 6)), 2))

    def test_the_bytes_of_a_state_can_be_asked_for(self) -> None:
        write = streamlog.Transcript.write

        def write_late(*arguments: Any) -> None:
            time.sleep(0.02)
            write(*arguments)

        with mock.patch.object(streamlog.Transcript, "write", write_late):
            path = self.keep(server := self.serve({"x": "!while :; do echo x; sleep 0.01; done"}), "/x")
            for _ in range(20):
                start = self.state(server, path)["bytes"]
                with self.connect(server) as client:
                    client.get(path, headers=[f"Range: bytes={start}-"])
                    self.assertEqual(client.read_head()[0], 206)
            self.fetch(server, path, "DELETE")


class Faults(KeptCase):
    def test_a_server_that_is_ended_stops_its_kept_runs_and_the_next_one_does_not_know_them(self) -> None:
        note = self.folder / "pid"
        with Program("-p", "0", f"x=!echo $$ > {note}; exec sleep 300") as program:
            location = "/" + program.fetch("/x?async=1").headers["location"]
            wait_until(lambda: note.exists() and note.read_text(), "it runs")
            (pid,) = pids_in(note.read_bytes())
            program.process.send_signal(signal.SIGTERM)
            program.end()
        self.assertFalse(is_alive(pid))
        with Program("-p", "0", "x=true") as program:
            self.assertEqual(program.fetch(location).status, 410)

    def test_signals_in_a_row_end_it_all_the_same(self) -> None:
        for pause in (0.0005, 0.0015, 0.003):
            with Program("-p", "0", "-q", "x=sleep 300") as program:
                for _ in range(20):
                    program.fetch("/x?async=1")
                for _ in range(2):
                    program.process.send_signal(signal.SIGINT)
                    time.sleep(pause)
                self.assertEqual(program.end()[0], 0)

    def test_a_server_that_is_killed_leaves_no_kept_run(self) -> None:
        note = self.folder / "pid"
        with Program(
            "-p", "0", "--grace", "0.5", f"x=!echo $$ | tee {note}; trap '' TERM; sleep 300; sleep 300", "y=true"
        ) as program:
            program.fetch("/x?async=1")
            for _ in range(5):
                program.fetch("/y?wait")
            wait_until(lambda: b"  0 bytes" not in program.fetch("/-/runs").body, "it runs, and is watched over")
            (pid,) = pids_in(note.read_bytes())
            theirs = children(program.process.pid)
            program.process.kill()
            program.end()
        self.assertIn(pid, theirs)
        wait_until(lambda: not any(map(is_alive, theirs)), "the run has ended, and who ended it", 5)

    def test_a_disk_that_fills_up_ends_neither_the_run_nor_its_viewers(self) -> None:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000))

        gate = self.make_gate()
        line = f"x=!read line < {gate}; head -c 600000 /dev/zero; sleep 0.2; echo; echo end"
        with Program("-p", "0", line, preexec_fn=limit) as program, program.connect() as client:
            path = "/" + program.fetch("/x?async=1").headers["location"]
            client.get(path)
            client.read_head()
            gate.write_text("\n")
            live = b"".join(iter(client.read_chunk, None))
            again = program.fetch(path)
        for body in (live, again.body):  # all that was written is there, or told to be missing
            skipped = re.findall(rb"\[(\d+) bytes are no longer kept\]\n", body)
            rest = re.sub(rb"\n?\[\d+ bytes are no longer kept\]\n", b"", body)
            self.assertTrue(skipped)
            self.assertEqual(len(rest) + sum(map(int, skipped)), 600_005)
        self.assertEqual(again.headers["exit-code"], "0")

    def test_a_folder_that_is_gone_is_a_503_that_says_what_to_do(self) -> None:
        server = self.serve({"x": "true"}, transcripts="/nowhere", max_runs=1)
        answer = self.fetch(server, "/x?async=1")
        self.assertEqual((answer.status, b"transcripts=" in answer.body), (503, True))
        self.assertNotIn(b'runs_active{command="x"} 1', self.fetch(server, "/-/metrics").body)
        self.assertEqual(self.fetch(server, "/x").body, b"", "its slot is free")

    def test_nothing_is_left_of_many_runs(self) -> None:
        server = self.serve({"x": "echo x", "no": "no-such-program"}, kept_runs=5)
        for _ in range(10):
            self.ended(server, self.keep(server, "/x"))
        before = descriptors()
        for _ in range(SOAK // 4):
            self.ended(server, self.keep(server, "/x"))
            self.fetch(server, "/x?wait")
            self.fetch(server, "/no?async=1")
        wait_until(lambda: len(descriptors()) <= len(before), "no more are open than before")


@unittest.skipUnless(browser.IS_THERE, "no Chromium with its driver")
class Page(BrowserCase):
    def test_a_run_is_started_in_the_background_opened_and_stopped(self) -> None:
        note = self.folder / "pid"
        server = self.serve({"x": f"!echo $$ > {note}; echo hello; exec sleep 300"})
        self.browser.open(f"{server.url}/")
        self.see("document.querySelector('[aria-label=\"Start x in the background\"]')", "the page")
        self.browser.click("[aria-label='More of x']")
        self.browser.click("[aria-label='Start x in the background']")
        self.see("/hello/.test(frames.view.document.body.innerText)", "its output")
        self.see("/goes on without you/.test(frames.view.document.body.innerText)", "what it is")
        pid = self.pid(note)
        self.browser.open(f"{server.url}/")
        self.see("document.querySelector('[href=\"-/runs\"]')", "the page again")
        self.assertTrue(is_alive(pid), "it goes on")
        (index,) = self.browser.windows()
        self.browser.click("[href='-/runs']")
        tab = wait_until(lambda: [each for each in self.browser.windows() if each != index], "a second tab")[0]
        self.browser.window(tab)
        self.addCleanup(self.browser.window, index)
        self.addCleanup(self.browser.close_window)
        self.see("/x\\s.*running/.test(document.body.innerText)", "it is listed")
        self.assertRegex(self.browser.run("document.body.innerText"), r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d")
        self.browser.click("td a")
        self.see("/hello/.test(document.body.innerText)", "its output once more")
        self.browser.click("header button")
        wait_until(lambda: not is_alive(pid), "it is stopped", 5)
        self.see("/hello[^]*\\[stopped, /.test(document.querySelector('main').innerText)", "all that it has written")
        self.assertRegex(self.browser.run("document.querySelector('output').innerText"), r"^stopped, \d")
        self.browser.open(f"{server.url}/-/runs")
        self.see("/stopped, /.test(document.body.innerText)", "it is listed so")
        self.browser.click("[aria-label='Drop x']")
        self.see("/No command is running/.test(document.body.innerText)", "it is dropped")
        self.assertEqual(self.browser.errors(), [])
