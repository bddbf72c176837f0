"""Formats: what a client gets of the output, however it was cut into pieces, and what follows it."""

from __future__ import annotations

import html.parser
import json
import random
import re
import unittest
from typing import Optional

from streamlog import _VIEW, Format, Html, Ndjson, Options, Outcome, Sse, _make_page, _negotiate

CLEAN = Outcome(0, "", 1.24)
FAILED = Outcome(3, "", 0.04)
CUT = Outcome(143, "timeout after 2 s", 2.04, 15)
NOON = 1_700_000_000.1234
STAMP = r"2023-11-1[45]T\d\d:\d\d:20\.123[+-]\d\d:\d\d"


def noon() -> float:
    return NOON


class Timer:
    """A monotonic clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class TextFormat(unittest.TestCase):
    def test_output_is_left_as_it_is(self) -> None:
        for data in (b"a\n", b"\r 50%", bytes(range(256)), b"\xff\xfe"):
            self.assertEqual(Format(Options(notes="always")).feed("stdout", data), data)
            self.assertEqual(Format().feed("stdout", data), data)

    def test_a_note_follows_when_it_was_asked_for(self) -> None:
        for notes, outcome, expected in (
            ("never", CLEAN, b""),
            ("never", CUT, b""),
            ("cut", CLEAN, b""),
            ("cut", CUT, b"[stopped: timeout after 2 s, 2.0 s]\n"),
            ("always", CLEAN, b"[exit 0, 1.2 s]\n"),
            ("always", FAILED, b"[exit 3, 0.0 s]\n"),
            ("always", CUT, b"[stopped: timeout after 2 s, 2.0 s]\n"),
        ):
            with self.subTest(notes=notes, outcome=outcome):
                self.assertEqual(Format(Options(notes=notes)).end(outcome), expected)

    def test_a_note_has_a_line_of_its_own(self) -> None:
        text = Format(Options(notes="always"))
        text.feed("stdout", b"a\n")
        self.assertEqual(text.end(CLEAN), b"[exit 0, 1.2 s]\n")
        text.feed("stdout", b"b")
        self.assertEqual(text.end(CLEAN), b"\n[exit 0, 1.2 s]\n")

    def test_each_line_gets_the_time_of_its_first_byte(self) -> None:
        text = Format(Options(timestamps=True), noon)
        got = b"".join(text.feed("stdout", piece) for piece in (b"a", b"b\n", b"\n", b"c\nd\n", b"e"))
        self.assertRegex(got.decode(), f"^{STAMP} ab\n{STAMP} \n{STAMP} c\n{STAMP} d\n{STAMP} e$")

    def test_a_heartbeat_is_a_line_that_tells_how_long_it_was_silent(self) -> None:
        timer = Timer()
        text = Format(Options(heartbeat_seconds=30), noon, timer)
        self.assertEqual(text.due, 130)
        text.feed("stdout", b"a")
        timer.now = 130
        self.assertEqual((text.pause(), text.due), (b"\n[still running, silent for 30.0 s]\n", 160))
        timer.now = 160
        self.assertEqual(text.pause(), b"[still running, silent for 60.0 s]\n")
        text.feed("stdout", b"b\n")
        timer.now = 190
        self.assertEqual(text.pause(), b"[still running, silent for 30.0 s]\n")
        self.assertEqual(Format(Options(), noon, timer).due, float("inf"))


class NdjsonFormat(unittest.TestCase):
    def objects(self, *fed: tuple[str, bytes], outcome: Outcome = CLEAN) -> list[dict[str, object]]:
        format_ = Ndjson(clock=noon, timer=Timer())
        data = b"".join([format_.feed(*piece) for piece in fed] + [format_.end(outcome)])
        self.assertTrue(data.isascii())
        return [json.loads(line) for line in data.splitlines()]

    def test_a_line_is_an_object_with_its_time_and_stream(self) -> None:
        first, second, third, last = self.objects(("stdout", b"a\nb"), ("stderr", b"e\n"), ("stdout", b"c\n"))
        self.assertRegex(str(first.pop("time")), f"^{STAMP}$")
        self.assertEqual(first, {"stream": "stdout", "line": "a"})
        self.assertEqual((second["stream"], second["line"]), ("stderr", "e"))
        self.assertEqual((third["stream"], third["line"]), ("stdout", "bc"))
        last.pop("time")
        self.assertEqual(last, {"exit_code": 0, "seconds": 1.24, "reason": "exit"})

    def test_the_end_names_signal_and_reason(self) -> None:
        (last,) = self.objects(outcome=CUT)
        self.assertEqual((last["exit_code"], last["signal"], last["reason"]), (143, 15, "timeout after 2 s"))

    def test_an_unfinished_line_goes_out_after_a_quarter_of_a_second_and_is_marked(self) -> None:
        timer = Timer()
        format_ = Ndjson(clock=noon, timer=timer)
        self.assertEqual((format_.feed("stdout", b"name? "), format_.due), (b"", 100.25))
        timer.now = 100.2  # the other stream goes on: that is no reason to wait longer, nor to hurry
        self.assertEqual(json.loads(format_.feed("stderr", b"noise\nmore"))["line"], "noise")
        timer.now = 100.25
        partial = json.loads(format_.pause())
        self.assertEqual((partial["line"], partial["partial"]), ("name? ", True))
        self.assertEqual((round(format_.due, 3), format_.pause()), (100.45, b""))
        timer.now = 100.5
        self.assertEqual((json.loads(format_.pause())["line"], format_.due), ("more", float("inf")))
        rest = json.loads(format_.feed("stdout", b"\n"))
        self.assertEqual((rest["line"], "partial" in rest), ("", False))
        format_.feed("stdout", b"end")
        self.assertEqual(json.loads(format_.end(CLEAN).splitlines()[0])["partial"], True)

    def test_an_unfinished_line_does_not_wait_for_its_stream_to_pause(self) -> None:
        for kind in (Ndjson, Sse):
            timer = Timer()
            format_ = kind(clock=noon, timer=timer)
            for moment in (100.0, 100.1, 100.2):
                timer.now = moment
                self.assertEqual((format_.feed("stdout", b"%"), format_.due), (b"", 100.25))
            timer.now = 100.25
            self.assertIn(b"%%%", format_.pause())
            timer.now = 100.5
            self.assertEqual((format_.feed("stdout", b"50"), format_.due), (b"", 100.75))

    def test_bytes_that_are_not_utf_8_survive_as_lone_surrogates(self) -> None:
        data = b"".join(bytes([n]) for n in range(256) if n != 10) + "é€𝄞".encode()
        for size in (1, 2, 3, 1000):
            pieces = [("stdout", data[at : at + size]) for at in range(0, len(data), size)]
            line = "".join(str(found["line"]) for found in self.objects(*pieces)[:-1])
            self.assertEqual(line.encode("utf-8", "surrogateescape"), data)

    def test_nothing_is_longer_than_64_kib_as_written(self) -> None:
        """Go's bufio.Scanner stops at that. A part ends where a character does."""
        for bits in (b"\x01", b"\r", b"\xff", b"\x80", "é".encode(), "€".encode(), "𝄞".encode(), b'"'):
            line = bits * (40_000 // len(bits))
            for size in (16384, 4096, 999):
                pieces = [line[at : at + size] for at in range(0, len(line), size)] + [b"\nshort\n"]
                written = Ndjson(Options("ndjson", hostname="h" * 64), clock=noon)
                found = b"".join(
                    [*(written.feed("stdout", piece) for piece in pieces), written.end(CLEAN)]
                ).splitlines()
                self.assertLess(max(map(len, found)), 65_536, bits)
                *parts, short, _ = map(json.loads, found)
                self.assertEqual("".join(part["line"] for part in parts).encode("utf-8", "surrogateescape"), line)
                self.assertEqual((short["line"], "partial" in short, "partial" in parts[-1]), ("short", False, False))
                if size > 4096 and bits > b"\x80" and bits != b"\xff":
                    self.assertFalse([part for part in parts[:1] if re.search("[\udc80-\udcff]", part["line"])], bits)
                sse = Sse(Options("sse"), clock=noon)
                events = b"".join(sse.feed("stdout", piece) for piece in pieces).split(b"\n\n")
                self.assertLess(max(map(len, events)), 65_536, bits)

    def test_a_heartbeat_is_an_object_or_an_event_after_a_silence_of_ours(self) -> None:
        for kind, expected in ((Ndjson, b'"silent_seconds": 2.2}\n'), (Sse, b"event: heartbeat\ndata: 2.2\n\n")):
            timer = Timer()
            format_ = kind(Options(heartbeat_seconds=2), clock=noon, timer=timer)
            self.assertEqual(format_.due, 102)
            timer.now = 101
            format_.feed("stdout", b"part")  # it is not written yet, and puts nothing off
            timer.now = 101.25
            self.assertIn(b"part", format_.pause())
            self.assertEqual(format_.due, 103.25)
            timer.now = 103.25
            self.assertTrue(format_.pause().endswith(expected))
            self.assertEqual(format_.due, 105.25)

    def test_a_line_without_an_end_is_held_no_further_than_the_bound(self) -> None:
        format_ = Ndjson(clock=noon)
        got = b"".join(format_.feed("stdout", b"x" * 10_000) for _ in range(100))
        found = [json.loads(line) for line in got.splitlines()]
        self.assertTrue(all(each["partial"] for each in found))
        self.assertGreaterEqual(sum(len(each["line"]) for each in found), 930_000)


class SseFormat(unittest.TestCase):
    def events(self, *fed: tuple[str, bytes], outcome: Outcome = CLEAN) -> list[tuple[str, str, Optional[str]]]:
        """What a browser would make of it (WHATWG HTML section 9.2.6): event, data and last id."""
        format_ = Sse(clock=noon, timer=Timer())
        stream = b"".join([format_.beginning, *(format_.feed(*piece) for piece in fed), format_.end(outcome)]).decode()
        found: list[tuple[str, str, Optional[str]]] = []
        event, last_id = "message", None
        data: list[str] = []
        for line in re.split("\r\n|\r|\n", stream):
            field, _, value = line.partition(":")
            value = value[1:] if value.startswith(" ") else value
            if not line:
                if data:
                    found.append((event, "\n".join(data), last_id))
                event, data = "message", []
            elif field == "data":
                data.append(value)
            elif field == "event":
                event = value
            elif field == "id":
                last_id = value
        return found

    def test_a_line_is_an_event_whose_id_is_the_offset_behind_it(self) -> None:
        self.assertEqual(
            self.events(("stdout", b"a\n\xc3\xa9"), ("stderr", b"no\n"), ("stdout", b"b\n\nlast")),
            [
                ("message", "a", "2"),
                ("stderr", "no", "5"),
                ("message", "éb", "9"),
                ("message", "", "10"),
                ("message", "last", "14"),
                ("exit", "0", "14"),
            ],
        )

    def test_a_carriage_return_ends_no_field(self) -> None:
        data = b"dos\r\n10%\r20%\r\n\revil\rdata: x\n"
        self.assertEqual(
            self.events(("stdout", data))[:-1],
            [("message", "dos", "5"), ("message", "10%\n20%", "14"), ("message", "evil\ndata: x", str(len(data)))],
        )

    def test_bytes_that_are_not_utf_8_are_replaced_and_counted(self) -> None:
        self.assertEqual(
            self.events(("stdout", b"\xff\xfea\nb\n"))[:2], [("message", "\ufffd\ufffda", "4"), ("message", "b", "6")]
        )

    def test_a_reconnect_has_an_id_even_before_the_first_line(self) -> None:
        self.assertEqual(Sse().beginning, b"id: 0\n\n")

    def test_silence_is_filled_with_comments(self) -> None:
        timer = Timer()
        format_ = Sse(timer=timer)
        self.assertEqual(format_.due, 115)
        timer.now = 115
        self.assertEqual((format_.pause(), format_.due), (b": still running\n\n", 130))
        format_.feed("stdout", b"prompt")
        self.assertEqual(format_.due, 115.25)
        timer.now = 115.25
        self.assertEqual(format_.pause(), b"partial: true\nid: 6\ndata: prompt\n\n")

    def test_a_run_that_was_stopped_says_so_before_its_exit(self) -> None:
        self.assertEqual(self.events(outcome=CUT), [("stopped", "timeout after 2 s", "0"), ("exit", "143", "0")])


class Page(html.parser.HTMLParser):
    """Reads a page as strictly as the standard library can: every tag closed, in order; nothing but our own tags. Lines
    are those that are seen: an <i> hides the one before it."""

    VOID = ("meta", "link")
    KNOWN = (
        "html",
        "head",
        "title",
        "style",
        "body",
        "header",
        "main",
        "h1",
        "p",
        "div",
        "samp",
        "span",
        "time",
        "i",
        "b",
        "output",
        "form",
        "button",
        "iframe",
    )

    def __init__(self, text: bytes) -> None:
        super().__init__()
        self.open: list[str] = []
        self.lines: list[str] = []
        self.classes: list[str] = []
        self.styles: list[str] = []
        self.cells: list[list[tuple[str, str]]] = []  # of each line, characters with their styles
        self.hidden = 0
        self.in_main = False
        self.blocks = 0
        self.feed(text.decode())
        self.close()
        assert not self.open, self.open
        assert all(line.endswith("\n") for line in self.lines)
        self.lines = [line[:-1] for line in self.lines]
        for cells in self.cells:
            while cells and cells[-1] == (" ", ""):
                cells.pop()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        assert tag in self.KNOWN or tag in self.VOID, tag
        if tag not in self.VOID:
            self.open.append(tag)
        self.in_main = self.in_main or tag == "main"
        if self.in_main:
            assert {name for name, _ in attrs} <= {"class", "style", "tabindex", "aria-label"}, attrs
        if tag == "samp":
            assert self.open[-2:] == ["div", "samp"], self.open
            self.lines.append("")
            self.cells.append([])
            self.classes.append(dict(attrs).get("class") or "")
        if tag == "i":
            assert self.open[-2:] == ["div", "i"], self.open
            assert self.lines.pop().endswith("\n")
            self.cells.pop()
            self.hidden += 1
            assert self.classes.pop() in ("", "e")
        if self.in_main and tag == "div":
            self.blocks += 1
        if tag == "b":  # at the beginning of a block, within what content-visibility contains
            assert self.open[-2:] == ["div", "b"], self.open
            assert attrs == [("style", f"counter-reset:line {len([one for one in self.classes if one != 'n'])}")]
        if tag == "span":
            self.styles.append(dict(attrs).get("style") or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.open)
        self.in_main = self.in_main and tag != "main"

    def handle_data(self, data: str) -> None:
        if "samp" in self.open:
            assert not self.lines[-1].endswith("\n")
            self.lines[-1] += data
            style = self.styles[-1] if "span" in self.open else ""
            for one in data.rstrip("\n"):
                self.cells[-1] += [(" ", style)] * (8 - len(self.cells[-1]) % 8) if one == "\t" else [(one, style)]
        elif self.in_main:
            assert not data.strip(), data


class HtmlFormat(unittest.TestCase):
    PAGE = _make_page("x: echo <b>", "", _VIEW, {"HEAD": ""}).partition("</body>")[0]

    def write(self, *fed: tuple[str, bytes], outcome: Outcome = CLEAN, options: Optional[Options] = None) -> bytes:
        format_ = Html((options or Options(notes="always"))._replace(page=self.PAGE), noon)
        return b"".join([format_.beginning, *(format_.feed(*piece) for piece in fed), format_.end(outcome)])

    def page(self, *fed: tuple[str, bytes], options: Optional[Options] = None) -> Page:
        return Page(self.write(*fed, options=options))

    def test_lines_are_paragraphs_and_stderr_has_a_class(self) -> None:
        page = self.page(("stdout", b"a\nb"), ("stderr", b"e\n"), ("stdout", b"c\n\n"))
        self.assertEqual(page.lines, ["a", "b", "e", "c", "", "[exit 0, 1.2 s]"])
        self.assertEqual(page.classes, ["", "", "e", "", "", "n"])

    def test_a_line_that_the_other_stream_breaks_off_goes_on_in_one_of_its_own(self) -> None:
        for fed, lines in (
            ([("stdout", b"a"), ("stderr", b"e\n"), ("stdout", b"b\nc\n")], ["a", "e", "b", "c"]),
            ([("stdout", b"a"), ("stderr", b"e\n"), ("stdout", b"\nc\nd\n")], ["a", "e", "c", "d"]),
            ([("stdout", b"a"), ("stderr", b"\n"), ("stdout", b"b\n")], ["a", "", "b"]),
            ([("stdout", b"a"), ("stderr", b"e"), ("stdout", b"\n\nc"), ("stderr", b"f\n")], ["a", "e", "", "c", "f"]),
            ([("stdout", b"a\r"), ("stderr", b"e\r"), ("stdout", b"b\n")], ["a", "e", "b"]),
        ):
            with self.subTest(fed=fed):
                page = self.page(*fed)
                self.assertEqual(page.lines[:-1], lines)
                self.assertEqual(page.hidden, 0)

    def test_colours_and_attributes_become_styles(self) -> None:
        for sequence, style in (
            ("31", "color:var(--c1)"),
            ("97", "color:var(--c15)"),
            ("44", "color:var(--page);background:var(--c4)"),
            ("103", "color:var(--page);background:var(--c11)"),
            ("38;5;9", "color:var(--c9)"),
            ("38;5;208", "color:light-dark(#b45f00, #ff8700)"),
            ("48;5;255", "color:#000;background:#eeeeee"),
            ("38;2;1;2;300", "color:light-dark(#0102ff, #8383ff)"),
            ("38;2;120;120;120;48;2;250;250;250", "color:#787878;background:#fafafa"),
            ("1", "font-weight:bold"),
            ("2", "opacity:.7"),
            ("3", "font-style:italic"),
            ("4", "text-decoration:underline"),
            ("7", "color:var(--page);background:var(--text)"),
            ("31;42;7", "color:var(--page);background:var(--c1)"),
            ("31;7", "color:var(--page);background:var(--c1)"),
            ("4;9", "text-decoration:underline line-through"),
            ("4;9;24", "text-decoration:line-through"),
            ("31;44", "color:var(--page);background:var(--c4)"),
            ("38;2;1;2;3;44", "color:#010203;background:var(--c4)"),
            ("58;5;1;3", "font-style:italic"),
            ("31;4:0", "color:var(--c1)"),
            ("58;2;1;2;3;1", "font-weight:bold"),
            ("1;31", "color:var(--c1);font-weight:bold"),
            ("1;31;22;39;4", "text-decoration:underline"),
        ):
            with self.subTest(sequence=sequence):
                page = self.page(("stdout", f"a\x1b[{sequence}mb\x1b[0mc\n".encode()))
                self.assertEqual((page.lines[0], page.styles), ("abc", [style]))
        for sequence in (
            "",
            "0",
            "99",
            "38",
            "38;5",
            "38;2;1",
            "31;0",
            "9999999999",
            ">4;2",
            "?4",
            "38;5;256",
            "38;7;1;1",
            "4:0",
            "4:3",
            "38:",
            "38:2::1:2:3",
            "38:2:0:1:2:3",
        ):
            self.assertEqual(self.page(("stdout", f"\x1b[{sequence}mb\n".encode())).styles, [], sequence)

    def test_a_colour_goes_on_over_ends_of_lines_and_is_its_stream_s_own(self) -> None:
        page = self.page(("stdout", b"\x1b[31ma\n\nb"), ("stderr", b"plain\n"), ("stdout", b"c\x1b[m\nd\n"))
        self.assertEqual(page.lines[:-1], ["a", "", "b", "plain", "c", "d"])
        self.assertEqual(page.styles, ["color:var(--c1)"] * 4)

    def test_other_sequences_and_control_characters_are_dropped(self) -> None:
        for junk in (
            "\x1b[?25l",
            "\x1b[?1049h",
            "\x1b[?2K",
            "\x1b]0;title\x07",
            "\x1b]8;;javascript:alert(1)\x1b\\",
            "\x1bP+q\x1b\\",
            "\x1b(B",
            "\x1b=",
            "\x9bK",
            "\0\x07\x0e\x7f\x86",
            "\x1b7",
            "\x1b[0;31q",
        ):
            with self.subTest(junk=junk):
                page = self.page(("stdout", f"a{junk}b\n".encode()))
                self.assertEqual((page.lines[0], page.styles), ("ab", []))

    def test_everything_else_is_escaped(self) -> None:
        text = "<script>alert(1)</script> &lt; \"'> <p class=r> --> ]]>"
        self.assertEqual(self.page(("stdout", text.encode())).lines[0], text)

    def test_every_colour_can_be_told_from_the_page(self) -> None:
        def light(colour: str) -> float:
            levels = [level / 255 for level in bytes.fromhex(colour[1:])]
            red, green, blue = (one / 12.92 if one <= 0.03928 else ((one + 0.055) / 1.055) ** 2.4 for one in levels)
            return 0.2126 * red + 0.7152 * green + 0.0722 * blue

        dice = random.Random(1)
        colours = [f"5;{index}" for index in range(16, 256)]
        colours += ["2;{};{};{}".format(*dice.randbytes(3)) for _ in range(2000)]
        for colour in colours:
            found = re.findall(
                "#[0-9a-f]{6}", self.write(("stdout", f"\x1b[38;{colour}mx\n".encode())).decode().partition("<main")[2]
            )
            for shown, page in ((found[0], "#ffffff"), (found[-1], "#16181c")):
                darker, lighter = sorted([light(shown), light(page)])
                self.assertGreaterEqual((lighter + 0.05) / (darker + 0.05), 4.5, (colour, shown))

    def test_links_are_those_of_the_web_alone(self) -> None:
        start, end = b"\x1b]8;id=1;", b"\x1b]8;;\x1b\\"
        written = self.write(
            ("stdout", b"a " + start + b'https://e.test/?a=1&b="\x07l\x1b[1mink' + end + b" b\n")
        ).decode()
        tag = '<a href="https://e.test/?a=1&amp;b=&quot;" rel="noopener noreferrer" target="_blank" style="{}">'
        self.assertIn(f"<samp>a {tag.format('')}l</a>{tag.format('font-weight:bold')}ink</a>", written)
        self.assertIn('<span style="font-weight:bold"> b\n</span></samp>', written)
        for other in (b"javascript:alert(1)", b"file:///etc/passwd", b"//e.test", b"data:text/html,x", b""):
            written = self.write(("stdout", start + other + b"\x07text" + end + b"\n")).decode()
            self.assertIn("<samp>text\n</samp>", written)
            self.assertNotIn("<a ", written)

    def test_a_line_is_as_a_terminal_would_leave_it(self) -> None:
        for data, line in (
            ("10%\r20%\r\x1b[K30%\r\n", "30%"),
            ("10%\0\x01\r20%\n", "20%"),
            ("abc\rx\n", "xbc"),
            ("abc\r\n", "abc"),
            ("abc\b\bx\n", "axc"),
            ("\b\b|\b/\b-\n", "-"),
            ("12%\b\b\b\b\b99\n", "99%"),
            ("spin \x1b[1Gdone\n", "done"),
            ("spin\x1b[2K\x1b[Gok\n", "ok"),
            ("spin\x1b[2Kok\n", "    ok"),
            ("abc\x1b[3Gx\x1b[K\n", "abx"),
            ("abc\x1b[2G\x1b[0K\n", "a"),
            ("abc\x1b[2G\x1b[1K\n", "  c"),
            ("abc\x1b[2G\x1b[J\n", "a"),
            ("abcdef\r\x1b[2X\n", "  cdef"),
            ("a\x1b[3Cb\x1b[2Dx\n", "a  xb"),
            ("\x1b[5Cx\n", "     x"),
            ("\x1b[999Cx\x1b[10Dy\n", f"{' ' * 70}y{' ' * 8}x"),
            ("a\tb\rxy\n", "xy      b"),
            ("\x9b3Gx\n", "  x"),
            ("abcdefghij\r\tX\n", "abcdefghXj"),
            ("あ\tx\rb\n", "b       x"[:1] + " " * 6 + "x"),
            ("e\u0301 50%\rdone\n", "done%"[:4] + "%"),
            ("x" * 600 + "\x1b[K\x1b[6nY\n", "x" * 600 + "Y"),
            ("\x1b[5C\u0301x\n", "     \u0301x"),
            ("$ lss foo\b\b\b\b\b\x1b[1P foo\n", "$ ls foo"),
            ("abc\r\x1b[@X\n", "Xabc"),
            ("abcdef\r\x1b[2P\n", "cdef"),
            ("a\x1b[5`b\x1b[2ac\n", "a   b  c"),
            ("世界\b\bx\n", "世x"),
            ("a 🌍\b\b🌎\b\b🌏\n", "a 🌏"),
            ("[#    ]\r\x1b[2C#\x1b[3C]\n", "[##   ]"),
            ("wiped\r     \r\n", ""),
            ("a\n\x1b[31mred\b\x1b[mx\r\x1b[Cy\n", "a\nryx"),
            ("one\r\x1b[K\ntwo\n", "\ntwo"),
            ("x" * 1500 + "\ry\n", "x" * 1500 + "\ny"),
            ("x" * 399 + "\ry\n", "y" + "x" * 398),
            ("é" * 390 + "\r" + "y" * 1500 + "\n", "y" * 1500),
            ("a\x1b[999999Gb\n", "a" + " " * 78 + "b"),
        ):
            with self.subTest(data=data):
                for size in (len(data.encode()), 1, 2, 3):
                    pieces = [data.encode()[at : at + size] for at in range(0, len(data.encode()), size)]
                    page = self.page(*(("stdout", piece) for piece in pieces))
                    self.assertEqual("\n".join(line.rstrip() for line in page.lines[:-1]), line, size)

    def test_a_spinner_that_wipes_itself_is_gone(self) -> None:
        for wipe in ("\x1b[2K\r", "\r\x1b[K", "\r      \r", "\x1b[1G\x1b[0J", "\x1b[1K", "\b" * 6 + " " * 6):
            for pieces in (["- load", wipe], ["- load" + wipe]):
                page = self.page(("stdout", b"a\n"), *(("stdout", piece.encode()) for piece in pieces))
                self.assertEqual(page.lines[:-1], ["a"], wipe)
                page = self.page(*(("stdout", piece.encode()) for piece in [*pieces, "\rdone", "\n"]))
                self.assertEqual(page.lines[:-1], ["done"], wipe)

    def test_what_moves_to_another_line_begins_a_new_one(self) -> None:
        for move in ("A", "2A", "B", "E", "2F", "H", "3;4H", "2;1f", "5d", "2J", "S", "T", "L", "M", "u", "e", "1;5r"):
            page = self.page(("stdout", f"one\ntwo\x1b[{move}three\n".encode()))
            self.assertEqual((page.lines[:-1], page.hidden), (["one", "two", "three"], 0), move)
        for move in ("\v", "\f", "\x1bM", "\x1bD", "\x1bE", "\x1b8", "\x1bc", "\x84", "\x85", "\x8d"):
            page = self.page(("stdout", f"one\ntwo{move}three\n".encode()))
            self.assertEqual((page.lines[:-1], page.hidden), (["one", "two", "three"], 0), move)
        pull = "a: Waiting\r\nb: Waiting\r\n" + "".join(
            f"\x1b[2A\x1b[2K\ra: {n}%\r\x1b[2B\x1b[1A\x1b[2K\rb: {n}%\r\x1b[1B" for n in (50, 100)
        )
        page = self.page(("stdout", pull.encode()))
        self.assertEqual(page.lines[:-1], ["a: Waiting", "b: Waiting", "a: 50%", "b: 50%", "a: 100%", "b: 100%"])

    def test_lines_that_are_written_anew_are_hidden_in_their_block(self) -> None:
        fed = [("stdout", b"\r%d" % n) for n in range(1000)]
        self.assertEqual(self.page(*fed).lines[:-1], ["999"])
        written = self.write(*fed, ("stdout", b"\n" + b"x\n" * 300))
        self.assertEqual(Page(written).lines[:-1], ["999", *["x"] * 300])
        blocks = re.split(b"</div><div[^>]*>", written.partition(b"<main")[2])
        self.assertLessEqual(max(block.count(b"<samp") for block in blocks), 201)

    def test_lines_stand_in_blocks(self) -> None:
        page = self.page(("stdout", b"".join(b"%d\n" % n for n in range(1000))))
        self.assertEqual(page.lines[:-1], [str(n) for n in range(1000)])
        self.assertEqual(page.blocks, 1 + 5)

    def test_the_page_is_the_same_however_the_output_is_cut_into_pieces(self) -> None:
        dice = random.Random(3)
        parts = [
            "é€𝄞",
            "a",
            "\n",
            "\r",
            "\r\n",
            "\x1b[31m",
            "\x1b[0m",
            "\x1b]0;t\x07",
            "<&>",
            "\x1b[38;5;99m",
            "\x1b",
            "\x1b[",
            "\b",
            "\x1b[K",
            "\x1b[1K",
            "\x1b[2K",
            "\x1b[2C",
            "\x1b[3G",
            "\x1b[A",
            "\x1b[P",
            "\x1b[2@",
            "世",
        ]
        parts += [
            "x" * 30,
            "\x9d",
            "\x1b" + " " * 9,
            "\x1b[1" + " " * 9,
            "\x1b[44m",
            "\x1b[" + "1" * 1030,
            "\x1b]" + "1" * 1030,
        ]
        for _ in range(100):
            fed = [
                (dice.choice(("stdout", "stdout", "stderr")), "".join(dice.choice(parts) for _ in range(10)).encode())
                for _ in range(6)
            ]
            fed.append(("stdout", b"\xff\xc3"))
            whole = self.page(*fed)
            for size in (1, 2, 3, 7):
                pieces = [(stream, data[at : at + size]) for stream, data in fed for at in range(0, len(data), size)]
                page = self.page(*pieces)
                self.assertEqual((page.cells, page.classes), (whole.cells, whole.classes))
        data = b"".join(b"%d\n" % n for n in range(600))
        self.assertEqual(
            self.write(*(("stdout", data[at : at + 1]) for at in range(len(data)))), self.write(("stdout", data))
        )

    def test_every_prefix_of_a_page_is_sound_so_far(self) -> None:
        written = self.write(("stdout", b"a\x1b[1mb\nc\rd\n"), ("stderr", b"e"))
        self.assertTrue(written.startswith(b'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>'))
        self.assertIn(b"x: echo &lt;b&gt;</title>", written)

    def test_sequences_that_never_end_hold_nothing_back(self) -> None:
        for start in (b"\x1b]0;", b"\x1b[", b"\x1bP", b"\x1b[1;"):
            format_ = Html(Options(), noon)
            written = b"".join(format_.feed("stdout", piece) for piece in [start, *[b"1" * 100] * 50, b"end\n"])
            self.assertIn(b"end", written)

    def test_timestamps_and_heartbeats_are_lines_for_people(self) -> None:
        page = self.page(("stdout", b"a\nb\nc"), options=Options(timestamps=True, notes="never"))
        self.assertTrue(all(re.fullmatch(f"{STAMP} [abc]", line) for line in page.lines), page.lines)
        timer = Timer()
        format_ = Html(Options(heartbeat_seconds=5, page=self.PAGE), noon, timer)
        data = format_.beginning + format_.feed("stdout", b"a\r")
        timer.now = format_.due
        data += format_.pause() + format_.feed("stdout", b"b") + format_.end(FAILED)
        page = Page(data)
        self.assertEqual(page.lines, ["a", "[still running, silent for 5.0 s]", "b", "[exit 3, 0.0 s]"])
        self.assertEqual((page.classes, page.hidden), (["", "n", "", "n"], 0))


class Negotiation(unittest.TestCase):
    def test_accept_chooses_the_format(self) -> None:
        for accepted, expected in (
            ({}, "text"),
            ({"*/*": 1}, "text"),
            ({"text/plain": 1}, "text"),
            ({"text/*": 1}, "text"),
            ({"text/html": 1, "application/xhtml+xml": 1, "application/xml": 0.9, "*/*": 0.8}, "text"),
            ({"text/html": 1}, "html"),
            ({"text/html": 0.5, "image/png": 1}, "html"),
            ({"text/html": 1, "text/plain": 0.1}, "text"),
            ({"text/event-stream": 1}, "sse"),
            ({"application/x-ndjson": 1}, "ndjson"),
            ({"application/jsonl": 0.3}, "ndjson"),
            ({"application/json": 1, "text/plain": 1, "*/*": 1}, "ndjson"),
            ({"application/json": 0.1, "text/plain": 1}, "text"),
            ({"image/png": 1}, "text"),
        ):
            with self.subTest(accepted=accepted):
                self.assertEqual(_negotiate(accepted), expected)
