"""Formats: what a client gets of the output, and what follows it."""

from __future__ import annotations

import unittest

from streamlog import Outcome, Text

CLEAN = Outcome(0, "", 1.24)
FAILED = Outcome(3, "", 0.04)
CUT = Outcome(143, "timeout after 2 s", 2.04)


class TextFormat(unittest.TestCase):
    def test_output_is_left_as_it_is(self) -> None:
        for data in (b"a\n", b"\r 50%", bytes(range(256)), b"\xff\xfe"):
            self.assertEqual(Text("always").feed("stdout", data), data)

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
                self.assertEqual(Text(notes).end(outcome), expected)

    def test_a_note_has_a_line_of_its_own(self) -> None:
        text = Text("always")
        text.feed("stdout", b"a\n")
        self.assertEqual(text.end(CLEAN), b"[exit 0, 1.2 s]\n")
        text.feed("stdout", b"b")
        self.assertEqual(text.end(CLEAN), b"\n[exit 0, 1.2 s]\n")
