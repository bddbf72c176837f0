"""Requests: which bytes are a request, and which are refused before anything is done for them."""

from __future__ import annotations

import io
import time
import unittest
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import streamlog
from streamlog import Error, Request


class Pieces(io.RawIOBase):
    """A file that gives its bytes in pieces, as a socket does. The pieces end at these places."""

    def __init__(self, data: bytes, ends: Iterable[int]) -> None:
        self.data, self.at, self.ends = data, 0, iter(ends)

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        end = next((end for end in self.ends if end > self.at), len(self.data))
        piece = self.data[self.at : min(end, self.at + len(room))]
        room[: len(piece)] = piece
        self.at += len(piece)
        return len(piece)


def in_pieces(data: bytes, size: int = 1) -> io.BufferedReader:
    """A connection on which data comes in pieces of a size."""
    return io.BufferedReader(Pieces(data, range(size, len(data), size)))


def whole(data: bytes) -> io.BufferedReader:
    """A connection on which all of the data has come."""
    return in_pieces(data, max(1, len(data)))


def read(file: io.BufferedIOBase) -> Request:
    """Read a request as the server does."""
    return streamlog._parse_head(streamlog._read_head(file))


def parse(data: bytes) -> Request:
    return read(whole(data))


def head(first: str = "GET / HTTP/1.1", *lines: str) -> bytes:
    return "\r\n".join([first, "Host: localhost", *lines, "", ""]).encode("latin-1")


class Heads(unittest.TestCase):
    GOOD = [
        (head(), ("GET", "/", "")),
        (head("GET /a?b=c&d HTTP/1.1"), ("GET", "/a", "b=c&d")),
        (head("GET /%61%2Fb HTTP/1.1"), ("GET", "/a/b", "")),
        (head("GET /a%20b HTTP/1.0"), ("GET", "/a b", "")),
        (b"GET /-/healthy HTTP/1.0\r\n\r\n", ("GET", "/-/healthy", "")),
        (b"HEAD /-/healthy HTTP/1.0\r\nX: y\r\n\r\n", ("HEAD", "/-/healthy", "")),
        (head("OPTIONS * HTTP/1.1"), ("OPTIONS", "*", "")),
        (head("GET http://localhost:8000/x?y HTTP/1.1"), ("GET", "/x", "y")),
        (head("GET http://localhost HTTP/1.1"), ("GET", "/", "")),
        (head("GET / HTTP/1.1", "X:", "Y: \t a b \t ", "Z: \xe9"), ("GET", "/", "")),
        (head(f"GET /{'a' * 8000} HTTP/1.1"), ("GET", f"/{'a' * 8000}", "")),
        (head("GET / HTTP/1.1", *[f"X-{n}: 1" for n in range(99)]), ("GET", "/", "")),
    ]
    BAD = [
        (b"GET / HTTP/1.1\nHost: localhost\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: b\rC: d\r\n\r\n", 400),
        (head("GET /"), 400),
        (head("GET  / HTTP/1.1"), 400),
        (head("GET /\tHTTP/1.1"), 400),
        (head("GET\xa0/\xa0HTTP/1.1"), 400),
        (head("GET / HTTP/1.1 "), 400),
        (head(" GET / HTTP/1.1"), 400),
        (head("GET /\xe9 HTTP/1.1"), 400),
        (head("GET /a b HTTP/1.1"), 400),
        (head("G(T / HTTP/1.1"), 400),
        (head("GET / HTTP/11"), 400),
        (head("GET / http/1.1"), 400),
        (head("GET / HTTP/2.0"), 505),
        (b"PRI * HTTP/2.0\r\n\r\n", 505),
        (head("GET x HTTP/1.1"), 400),
        (head("GET * HTTP/1.1"), 400),
        (head("GET ftp://localhost/ HTTP/1.1"), 400),
        (head("GET http://a@b/ HTTP/1.1"), 400),
        (head("CONNECT localhost:80 HTTP/1.1"), 501),
        (head("get / HTTP/1.1"), 501),
        (head("BREW / HTTP/1.1"), 501),
        (head("TRACE / HTTP/1.1"), 501),
        (head("GET http://localhost?x HTTP/1.1"), 400),
        (head("GET /#x HTTP/1.1"), 400),
        (head("GET /% HTTP/1.1"), 400),
        (head("GET /%4 HTTP/1.1"), 400),
        (head("GET /%zz HTTP/1.1"), 400),
        (head("GET /%ff HTTP/1.1"), 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\n\r\n", 400),
        (b"GET /-/healthy HTTP/1.1\r\n\r\n", 400),
        (b"GET /-/healthy HTTP/1.0\r\nHost: a/b\r\n\r\n", 400),
        (b"GET /-/metrics HTTP/1.0\r\n\r\n", 400),
        (head("GET / HTTP/1.1", "Host: localhost"), 400),
        (b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a:b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
        (head("GET / HTTP/1.1", "X : y"), 400),
        (head("GET / HTTP/1.1", "X"), 400),
        (head("GET / HTTP/1.1", ": y"), 400),
        (head("GET / HTTP/1.1", " folded"), 400),
        (head("GET / HTTP/1.1", "\tfolded"), 400),
        (head("GET / HTTP/1.1", "X: a\0b"), 400),
        (head("GET / HTTP/1.1", "X: a\x7fb"), 400),
        (head("GET / HTTP/1.1", "X: a\x0bb"), 400),
        (head("GET / HTTP/1.1", "X\xe9: a"), 400),
        (head("GET / HTTP/1.1", "Content-Length: 1", "Content-Length: 1"), 400),
        (head("GET / HTTP/1.1", "Origin: a", "Origin: b"), 400),
        *(
            (head("POST / HTTP/1.1", f"Content-Length: {n}"), 400)
            for n in ("", "+5", "1_0", "-1", "0x5", "5, 5", "9" * 16, "\xb2")
        ),
        (b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        *(
            (head("POST / HTTP/1.1", f"Transfer-Encoding: {coding}"), 400)
            for coding in (
                *("xchunked", "gzip", "identity", "", "chunked\xa0", "chunked;a=b", "chunked,"),
                *("chunked, gzip", "gzip, chunked, gzip", "chunked, chunked", "chunked, gzip, chunked"),
            )
        ),
        *(
            (head("POST / HTTP/1.1", f"Transfer-Encoding: {coding}"), 501)
            for coding in ("gzip, chunked", "x,GZIP,\tChunked")
        ),
        (head("POST / HTTP/1.1", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400),
        (head("POST / HTTP/1.1", "Transfer-Encoding: \x0bchunked"), 400),
        (head("POST / HTTP/1.1", "Transfer-Encoding: chunked", "Content-Length: 3"), 400),
        (head("POST / HTTP/1.1", "Content-Length: 3", "Transfer-Encoding: chunked"), 400),
        (head("GET / HTTP/1.1", *[f"X-{n}: 1" for n in range(100)]), 431),
        (head("GET / HTTP/1.1", f"X: {'a' * 70000}"), 431),
        (head(f"GET /{'a' * 17000} HTTP/1.1"), 414),
        (b"\0\0\0\0\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
    ]

    def test_a_sound_request_is_read_whole_byte_by_byte_and_with_more_behind_it(self) -> None:
        for data, expected in self.GOOD:
            for behind in (b"", b"GET /next HTTP/1.1\r\n", b"\0\n"):
                for size in (1, 7, 100_000):
                    with self.subTest(data=data[:60], behind=behind, size=size):
                        file = in_pieces(data + behind, size)
                        request = read(file)
                        self.assertEqual((request.method, request.path, request.query), expected)
                        self.assertEqual(file.read(), behind)

    def test_an_unsound_request_is_refused_whole_and_byte_by_byte(self) -> None:
        for data, status in self.BAD:
            for size in (1, 7, 100_000):
                with self.subTest(data=data[:80], size=size):
                    with self.assertRaises(Error) as caught:
                        read(in_pieces(data, size))
                    self.assertEqual(caught.exception.status, status)

    def test_what_is_not_encoded_is_told_how_to_be(self) -> None:
        for line in ("GET /x?t=gr\xc3\xbc\xc3\x9fe HTTP/1.1", "GET /\xe9 HTTP/1.1"):
            with self.assertRaisesRegex(Error, "percent-encoded, as curl -G --data-urlencode"):
                parse(head(line))

    def test_empty_lines_before_a_request_are_skipped_and_count_towards_its_head(self) -> None:
        self.assertEqual(parse(b"\r\n\r\n" + head()).path, "/")
        for count in (32_700, 32_767, 32_768, 40_000):
            for line in (b"X: " + b"a" * 100_000, b"X: a"):
                with self.subTest(count=count, line=line[:9]), self.assertRaises(Error) as caught:
                    parse(b"\r\n" * count + head(f"GET /{'a' * 200} HTTP/1.1") + line + b"\r\n\r\n")
                self.assertIn(caught.exception.status, (414, 431))

    def test_a_head_that_never_ends_is_refused_once_it_is_too_long(self) -> None:
        for start in (b"", b"GET /", head()[:-2], head()[:-2] + b"X: ", b"\r\n", b"\r\n" * 33_000 + head()[:-2]):
            for more in (b"a", b"\r\n", b"X: a\r\n"):
                with self.subTest(start=start[:20], more=more):
                    file = whole(start + more * (200_000 // len(more)))
                    with self.assertRaises(Error):
                        while True:  # empty lines end the head, and what follows is the next one
                            read(file)
                    self.assertGreater(len(file.read()), 50_000)

    def test_a_head_takes_little_time_however_it_is_made(self) -> None:
        # A pattern with two repetitions in a row once took 14 s for the first of these, and held up every thread.
        for junk in (b"X:" + b" " * 65000 + b"\0", b"X: " + b"\t " * 32000 + b"\x7f", b"X" * 65000, b":" * 65000):
            started = time.process_time()
            with self.assertRaises(Error):
                parse(head()[:-2] + junk + b"\r\n\r\n")
            self.assertLess(time.process_time() - started, 0.2, junk[:9])

    def test_a_header_that_is_a_list_takes_little_time_however_it_is_made(self) -> None:
        for name in ("Accept", "Connection", "TE", "Cookie", "Range", "Prefer", "Content-Type", "Authorization"):
            for junk in ("a" + " " * 60000 + "b", ", " * 30000, "a" + ";q=x" * 15000, "; " * 30000, "a/b" * 20000):
                started = time.process_time()
                with suppress(Error):
                    parse(head("GET / HTTP/1.1", f"{name}: {junk}"))
                self.assertLess(time.process_time() - started, 0.2, (name, junk[:9]))

    def test_trailers_are_for_a_client_that_asks_for_them(self) -> None:
        for value, wants in (("trailers", True), ("gzip;q=0.5,\tTrailers", True), ("", False), ("trailersx", False)):
            self.assertEqual(parse(head("GET / HTTP/1.1", f"TE: {value}")).wants_trailers, wants, value)
        self.assertFalse(parse(head()).wants_trailers)

    def test_a_head_without_its_empty_line_is_no_request(self) -> None:
        for data in (b"", b"GET", b"GET / HTTP/1.1\r\nHost: localhost\r\nX", head()[:-1], head()[:-2]):
            with self.subTest(data=data), self.assertRaises(streamlog._Gone):
                parse(data)

    def test_the_absolute_form_gives_the_host(self) -> None:
        self.assertEqual(parse(head("GET http://evil.test/x HTTP/1.1")).host, "evil.test")

    def test_a_host_is_given_without_its_port(self) -> None:
        for host, expected in (("LOCALHOST:80", "localhost"), ("[::1]:80", "[::1]"), ("[::1]", "[::1]"), ("a", "a")):
            request = parse(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            self.assertEqual(request.host, expected)

    def test_connection_is_a_list_in_which_close_counts(self) -> None:
        for value, version, closes in (
            ("close", "1.1", True),
            ("Close, TE", "1.1", True),
            ("keep-alive,\tclose", "1.1", True),
            ("keep-alive", "1.1", False),
            ("closed", "1.1", False),
            ("keep-alive", "1.0", True),
        ):
            with self.subTest(value=value, version=version):
                self.assertEqual(parse(head(f"GET / HTTP/{version}", f"Connection: {value}")).is_last, closes)

    def test_accept_gives_the_types_that_it_names_and_does_not_rule_out(self) -> None:
        for value, accepted in (
            ("text/html,application/xhtml+xml,*/*;q=0.8", {"text/html": 1, "application/xhtml+xml": 1, "*/*": 0.8}),
            ("*/*", {"*/*": 1}),
            ("text/html;q=0, text/plain", {"text/plain": 1}),
            ("text/html; q=0.0, a/b;q=x, c/d;q=2", {}),
            ("Text/HTML; level=1; Q=0.5", {"text/html": 0.5}),
            ("a/b, */*; q=.2", {"a/b": 1, "*/*": 0.2}),
            ("a/b;q=0.1234, c/d;q=., e/f;q=.0, g/h;q=1.", {"a/b": 0.1234, "g/h": 1}),
            ("", {}),
        ):
            with self.subTest(value=value):
                self.assertEqual(parse(head("GET / HTTP/1.1", f"Accept: {value}")).accepted, accepted)


class Queries(unittest.TestCase):
    def test_fields_are_decoded_once_blank_ones_and_repeats_included(self) -> None:
        for query, expected in (
            ("", []),
            ("a=1&b=2", [("a", "1"), ("b", "2")]),
            ("a=1&a=2", [("a", "1"), ("a", "2")]),
            ("a", [("a", "")]),
            ("a=&&b", [("a", ""), ("b", "")]),
            ("a=b=c", [("a", "b=c")]),
            ("a+b=c+d%2B", [("a b", "c d+")]),
            ("a=%2541", [("a", "%41")]),
            ("a=1;b=2", [("a", "1;b=2")]),
            ("a=%C3%A9", [("a", "é")]),
            ("a=%00", [("a", "\0")]),
        ):
            with self.subTest(query=query):
                self.assertEqual(list(streamlog._parse_query(query)), expected)

    def test_broken_encoding_is_refused(self) -> None:
        for query in ("a=%", "a=%4", "%zz=1", "a=%ff", "a=%ed%a0%80"):
            with self.subTest(query=query), self.assertRaises(Error):
                list(streamlog._parse_query(query))


class ChunkedBodies(unittest.TestCase):
    GOOD = [
        (b"0\r\n\r\n", b""),
        (b"3\r\nabc\r\n0\r\n\r\n", b"abc"),
        (b"3\r\nabc\r\n00000001\r\nd\r\n000\r\n\r\n", b"abcd"),
        (b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n", b"01234567890123456789"),
        (b"3;name=value;x\r\na\r\n\r\n0;last\r\n\r\n", b"a\r\n"),
        (b'1; a = "b;\\" c\xe9" ;d=e\r\na\r\n0\r\n\r\n', b"a"),
        (b"1 \t;x\r\na\r\n0\r\nTrailer: x\r\nOther:\r\n\r\n", b"a"),
    ]
    BAD = [
        b"3\nabc\r\n0\r\n\r\n",
        b"3\r\nabc\n0\r\n\r\n",
        b"3\r\nabcd\r\n0\r\n\r\n",
        b"4\r\nabc\r\n0\r\n\r\n",
        b"0x3\r\nabc\r\n0\r\n\r\n",
        b"+3\r\nabc\r\n0\r\n\r\n",
        b"-3\r\nabc\r\n0\r\n\r\n",
        b" 3\r\nabc\r\n0\r\n\r\n",
        b"1_0\r\nabc\r\n0\r\n\r\n",
        b"g\r\n\r\n",
        b"\r\n",
        b";x\r\n",
        b"000000003\r\nabc\r\n0\r\n\r\n",
        b"3;a\rb\r\nabc\r\n0\r\n\r\n",
        b"3;" + b"x" * 2000,
        b"3;" + b"x" * 2000 + b"\r\nabc\r\n0\r\n\r\n",
        b"0\r\nGET / HTTP/1.1\r\n\r\n",
        b"0\r\nA: b\n\r\n",
        b"0\r\n\n",
        b"0\r\n" + b"A: b\r\n" * 2000,
        b"3 \r\nabc\r\n0\r\n\r\n",
        b"3;\r\nabc\r\n0\r\n\r\n",
        b"3;a=\r\nabc\r\n0\r\n\r\n",
        b'3;a="b\r\nabc\r\n0\r\n\r\n',
        b"3;a b\r\nabc\r\n0\r\n\r\n",
    ]

    def take(self, data: bytes, size: int) -> tuple[bytes, bytes]:
        """The body, and what is left behind it; it comes in pieces of a size."""
        request = parse(head("POST / HTTP/1.1", "Transfer-Encoding: chunked"))
        file = in_pieces(data, size)
        return b"".join(streamlog._read_body(file, request)), file.read()

    def test_a_sound_body_is_taken_apart_in_pieces_of_any_size_and_what_follows_is_left(self) -> None:
        for data, body in self.GOOD:
            for size in (1, 2, 3, 1000):
                for behind in (b"", b"GET / HTTP/1.1\r\n"):
                    with self.subTest(data=data, size=size, behind=behind):
                        self.assertEqual(self.take(data + behind, size), (body, behind))

    def test_a_body_that_breaks_off_is_not_taken_for_a_whole_one(self) -> None:
        for data, _ in self.GOOD:
            for end in range(len(data)):
                with self.subTest(data=data, end=end), self.assertRaises(streamlog._Gone):
                    self.take(data[:end], 1000)

    def test_an_unsound_body_is_refused(self) -> None:
        for data in self.BAD:
            for size in (1, 1000, 100_000):
                with self.subTest(data=data[:40], size=size), self.assertRaises(Error) as caught:
                    self.take(data, size)
                self.assertEqual(caught.exception.status, 400)

    def test_a_large_chunk_is_handed_on_in_pieces_and_not_kept(self) -> None:
        request = parse(head("POST / HTTP/1.1", "Transfer-Encoding: chunked"))
        file = whole(b"100000\r\n" + b"x" * (1 << 20) + b"\r\n0\r\n\r\n")
        sizes = [len(piece) for piece in streamlog._read_body(file, request)]
        self.assertEqual(sum(sizes), 1 << 20)
        self.assertLessEqual(max(sizes), 64 * 1024)


class CountedBodies(unittest.TestCase):
    def test_a_body_is_as_long_as_it_says_and_what_follows_is_left(self) -> None:
        for length in (0, 3):
            for size in (1, 2, 1000):
                with self.subTest(length=length, size=size):
                    request = parse(head("POST / HTTP/1.1", f"Content-Length: {length}"))
                    file = in_pieces(b"abcdef", size)
                    self.assertEqual(b"".join(streamlog._read_body(file, request)), b"abcdef"[:length])
                    self.assertEqual(file.read(), b"abcdef"[length:])

    def test_a_body_that_breaks_off_is_not_taken_for_a_whole_one(self) -> None:
        request = parse(head("POST / HTTP/1.1", "Content-Length: 4"))
        with self.assertRaises(streamlog._Gone):
            list(streamlog._read_body(whole(b"abc"), request))
