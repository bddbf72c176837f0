"""The pages in a real browser: what a person sees while a command runs, and that nothing else happens."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import unittest
from pathlib import Path
from typing import Any

from streamlog import Command

from . import browser
from .support import CERTIFICATE, SOAK, ServerCase, at_once, is_alive, pids_in, wait_until

UNNAMED = (
    "Array.from(document.querySelectorAll('input:not([type=hidden]), select, textarea, button, summary, iframe'))"
    ".filter(e => !(e.labels && e.labels.length) && !e.ariaLabel && !e.title && !e.innerText).length"
)
SCRIPTS = (
    "document.querySelectorAll('script').length + Array.from(document.querySelectorAll('*'))"
    ".filter(e => Array.from(e.attributes).some(a => a.name.startsWith('on'))).length"
)
# The texts whose contrast with what is behind them is less than 4.5 (WCAG 2.2, success criterion 1.4.3).
CONTRAST = """() => {
  const parse = colour => colour.match(/[0-9.]+/g).map(Number);
  const light = colour => colour.slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length == 3 || colour[3] == 1) return colour;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = new Set();
  while (walker.nextNode()) if (walker.currentNode.data.trim()) found.add(walker.currentNode.parentElement);
  document.querySelectorAll('input, select, textarea').forEach(e => found.add(e));
  const bad = [];
  for (const e of found) {
    if (!e.offsetHeight) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) bad.push(e.outerHTML);
  }
  return bad;
}"""
TEXT = "document.body ? document.body.innerText : ''"
LINES = "Array.from(document.querySelectorAll('samp')).filter(p => p.offsetHeight).map(p => p.innerText.trimEnd())"


@unittest.skipUnless(browser.IS_THERE, "Chromium and its driver are not installed")
class BrowserCase(ServerCase):
    shared: browser.Browser

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        driver = browser.driver()
        cls.shared = browser.Browser(driver.__enter__())
        cls.addClassCleanup(driver.__exit__, None, None, None)
        cls.addClassCleanup(cls.shared.close)

    def setUp(self) -> None:
        super().setUp()
        self.browser = self.shared
        self.browser.resize(1280, 800)
        self.browser.open("about:blank")
        self.browser.errors()
        self.addCleanup(self.browser.open, "about:blank")

    def see(self, expression: str, what: str, seconds: float = 10) -> Any:
        """Wait until a JavaScript expression is true in the page."""

        def look() -> Any:
            try:
                return self.browser.run(expression)
            except RuntimeError:  # the page is only just coming
                return None

        return wait_until(look, what, seconds)

    def pid(self, path: Path) -> int:
        """The number that a command has written to a file."""
        wait_until(lambda: path.exists() and path.read_text().strip(), "the command has started")
        return next(pids_in(path.read_bytes()))


class Tokens(BrowserCase):
    def test_a_browser_asks_for_the_token_and_uses_it_for_the_frames_and_forms_too(self) -> None:
        server = self.serve({"x": Command("!echo hello; sleep 300", method="POST")}, token="secret")
        self.browser.open(f"http://:secret@127.0.0.1:{server.port}/")
        self.see("document.title.startsWith('streamlog')", "the page")
        self.browser.run("document.querySelector('button.start').click()")
        self.see("frames.view.document.body.textContent.includes('hello')", "the output")

    def test_a_page_of_an_allowed_origin_reads_a_run_by_the_token_and_no_other_page_does(self) -> None:
        page = Command("echo '<!DOCTYPE html><title>page</title>'", type="text/html")
        allowed, other = self.serve({"page": page}), self.serve({"page": page})
        server = self.serve({"x": "echo hello"}, token="secret", allow_origins=[allowed.url])
        script = (
            f"void fetch('{server.url}/x', {{headers: {{Authorization: 'Bearer secret'}}}})"
            ".then(answer => answer.text()).then(text => window.got = text, error => window.got = 'refused')"
        )
        for origin, got in ((allowed, "hello\n"), (other, "refused")):
            self.browser.open(f"{origin.url}/page")
            self.see("document.title == 'page'", "the page")
            self.browser.run(script)
            self.assertEqual(self.see("window.got", "an answer"), got)


class Encrypted(BrowserCase):
    def test_a_page_and_its_forms_work_over_tls(self) -> None:
        server = self.serve({"x": Command("!echo hello; sleep 300", method="POST")}, tls_cert=CERTIFICATE)
        self.browser.open(f"{server.url}/")
        self.see("document.title.startsWith('streamlog')", "the page")
        self.browser.run("document.querySelector('button.start').click()")
        self.see("frames.view.document.body.textContent.includes('hello')", "the output")


class LiveText(BrowserCase):
    def test_lines_of_plain_text_appear_before_the_command_ends_and_leaving_ends_it(self) -> None:
        note, gate = self.folder / "pid", self.make_gate()
        server = self.serve({"x": f"!echo $$ > {note}; echo first; read _ <> {gate}; echo second; exec sleep 300"})
        self.browser.open(f"{server.url}/x")
        self.see(f"{TEXT} == 'first\\n'", "the first line, alone")
        gate.write_text("\n")
        self.see(f"{TEXT} == 'first\\nsecond\\n'", "the second line")
        pid = self.pid(note)
        self.assertTrue(is_alive(pid))
        self.browser.open("about:blank")
        wait_until(lambda: not is_alive(pid), "the command is ended")

    def test_the_end_is_told_in_a_last_line(self) -> None:
        server = self.serve({"x": "!echo a; exit 3"})
        self.browser.open(f"{server.url}/x")
        self.see(f"/^a\\n\\[exit 3, [0-9.]+ s\\]\\n$/.test({TEXT})", "the footer")


class LivePage(BrowserCase):
    def test_a_page_paints_at_once_follows_the_newest_line_and_stays_where_the_reader_scrolls(self) -> None:
        go = self.folder / "go"
        server = self.serve(
            {"x": f"!seq 1 500; while [ ! -e {go} ]; do sleep 0.05; done; seq 501 1000; exec sleep 300"}
        )
        self.browser.open(f"{server.url}/x?format=html")
        self.see(f"{LINES}.length == 500", "five hundred lines")
        end = "(m => Math.abs(m.scrollTop) < 2)(document.querySelector('main'))"
        self.assertTrue(self.browser.run(end), "it shows the end")
        self.browser.run("document.querySelector('main').scrollTo(0, -3000) || 1")
        at = "document.elementFromPoint(600, 400).textContent"
        before = self.browser.run(at)
        go.touch()
        self.see(f"{LINES}.length == 1000", "all lines")
        self.assertEqual(self.browser.run(at), before, "it stays where the reader is")
        self.browser.run("document.querySelector('main').scrollTo(0, 0) || 1")
        self.assertEqual(self.browser.run(f"{LINES}.pop()"), "1000")
        self.browser.run("document.querySelector('main').scrollTo(0, -1e6) || 1")
        top = "document.querySelector('samp').getBoundingClientRect().top"
        self.assertGreater(self.browser.run(top), 0, "the first line can be scrolled to")

    def test_short_output_stands_at_the_top_with_numbers_colours_and_the_end(self) -> None:
        gate = self.make_gate()
        line = f"!printf 'a\033[31mred\033[0m\n'; read _ <> {gate}; echo oops >&2; read _ <> {gate}; "
        server = self.serve({"x": line + "printf '1%%\r2%%\r3%%'; sleep 0.4; exit 3"})
        self.browser.open(f"{server.url}/x?format=html")
        for said in ("red", "oops"):
            self.see(f"document.body.innerText.includes('{said}')", "a line")
            gate.write_text("\n")
        self.see("/\\[exit 3/.test(document.body.innerText)", "the end")
        lines = self.browser.run(LINES)
        self.assertEqual(lines[:3], ["ared", "oops", "3%"])
        self.assertRegex(lines[3], r"^\[exit 3, [0-9.]+ s\]$")
        number = "getComputedStyle(document.querySelectorAll('samp')[0], '::before').content"
        self.assertIn("counter(line)", self.browser.run(number))
        self.assertLess(self.browser.run("document.querySelector('samp').getBoundingClientRect().top"), 150)
        colour = "getComputedStyle(document.querySelector('{}')).color"
        self.browser.scheme("light")
        self.assertEqual(self.browser.run(colour.format("main span")), "rgb(179, 38, 30)")
        self.assertEqual(self.browser.run(colour.format("samp.e")), "rgb(179, 38, 30)")
        self.browser.scheme("dark")
        self.assertEqual(self.browser.run(colour.format("samp.e")), "rgb(242, 133, 125)")
        self.assertEqual(self.browser.errors(), [])

    def test_a_long_progress_bar_stays_one_line_and_cheap(self) -> None:
        server = self.serve({"x": self.python("import sys\nfor n in range(50000): sys.stdout.write(f'\\r{n}')")})
        started = time.monotonic()
        self.browser.open(f"{server.url}/x?format=html")
        self.see(f"{LINES}.length == 2 && {LINES}[0] == '49999'", "its last state, alone", 40)
        self.assertLess(time.monotonic() - started, 30)

    def test_what_is_copied_is_what_was_put_out(self) -> None:
        server = self.serve({"x": "!printf 'a\tb\n\n  c\n\033[31mred\033[0m\nd\n'; exec sleep 300"})
        self.browser.open(f"{server.url}/x?format=html")
        self.see(f"{LINES}.length == 5", "all lines")
        copied = "(s => { s.selectAllChildren(document.querySelector('main')); return String(s) })(getSelection())"
        self.assertEqual(self.browser.run(copied).strip("\n"), "a\tb\n\n  c\nred\nd")

    def test_three_hundred_thousand_lines_load_at_once_and_scroll_without_a_long_task(self) -> None:
        server = self.serve({"x": "!seq 1 300000"})
        watch = (
            "new PerformanceObserver(l => l.getEntries().forEach(e => long = Math.max(long, e.duration)))"
            ".observe({type: 'longtask'})"
        )
        self.browser.devtools("Page.addScriptToEvaluateOnNewDocument", {"source": f"window.long = 0; {watch}"})
        started = time.monotonic()
        self.browser.open(f"{server.url}/x?format=html")
        self.see(
            "document.readyState == 'complete' && document.querySelectorAll('samp').length == 300001", "all lines", 30
        )
        self.assertLess(time.monotonic() - started, 30)
        main = "document.querySelector('main')"
        number = f"(m => m.scrollTop / m.scrollHeight)({main})"
        self.browser.run("[long = 0]")
        for part in (0, 0.001, 0.01, 0.1, 0.3, 0.6, 0.99):
            self.browser.run(f"[{main}.scrollTo(0, -{part} * {main}.scrollHeight)]")
            self.see(f"Math.abs({number} + {part}) < 0.01", "it is there")
            line = int(self.browser.run("parseInt(document.elementFromPoint(600, 400).textContent)"))
            self.assertLess(abs(line / 300_000 - (1 - part)), 0.02)
        self.assertLess(self.browser.run("long"), 500)  # ms, of which others may have taken most
        self.browser.run(f"[{main}.scrollTo(0, 0)]")
        self.see(
            "document.querySelector('main > div > div:last-child > samp:last-child').getBoundingClientRect().top > 0",
            "the end is seen again",
        )
        self.assertEqual(self.number("main > div > div:last-child > samp:nth-last-child(2)"), "300000")
        self.browser.run(f"[{main}.scrollTo(0, -1e9)]")
        self.see("document.querySelector('samp').getBoundingClientRect().top > 0", "the first line can be seen")

    def number(self, selector: str) -> str:
        """The number before a line, as Chromium tells it to a screen reader."""
        found = {"expression": f"document.querySelector({json.dumps(selector)})"}
        line = self.browser.devtools("Runtime.evaluate", found)["result"]["objectId"]
        tree = self.browser.devtools("Accessibility.queryAXTree", {"objectId": line, "role": "StaticText"})
        return str(tree["nodes"][0]["name"]["value"])

    def test_lines_that_are_shown_are_numbered(self) -> None:
        script = "!seq 1 40; i=0; while [ $i -lt 6000 ]; do i=$((i+1)); printf '\\r%d%%' $i; done; echo; echo end"
        server = self.serve({"x": script})
        self.browser.open(f"{server.url}/x?format=html")
        self.see("/exit 0/.test(document.body.innerText)", "the end")
        self.assertEqual(self.browser.run(LINES)[-4:-1], ["40", "6000%", "end"])
        self.assertEqual(self.number("main > div > div:last-child > samp:nth-last-child(2)"), "42")

    def test_a_page_shows_what_a_terminal_would(self) -> None:
        for output, shown in (
            (r"\r10%%\r20%%\r30%%\n", ["30%"]),
            (r"\033[?25l- load\033[1G\033[0K\\ load\033[1G\033[0K\033[?25hadded 3 packages\n", ["added 3 packages"]),
            (r"-\b/\b-\b done\n", [" done"]),
            (r"a: Wait\r\nb: Wait\r\n\033[2A\033[2K\ra: 50%%\r\033[2B", ["a: Wait", "b: Wait", "a: 50%"]),
            (r"  1 one\n\033[1A\033[2K  ok 1 one\033[1E  2 two\n", ["  1 one", "  ok 1 one", "  2 two"]),
        ):
            with self.subTest(output=output):
                server = self.serve({"x": f"!printf -- '{output}'"})
                self.browser.open(f"{server.url}/x?format=html")
                self.see("/exit 0/.test(document.body.innerText)", "the end")
                self.assertEqual(self.browser.run(LINES)[:-1], [line.rstrip() for line in shown])

    def test_hostile_output_executes_nothing(self) -> None:
        payload = self.folder / "payload"
        payload.write_text(
            "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>\n"
            "</p></div></main><svg onload='window.pwned = 1'>\n"
            "\x1b]8;;javascript:window.pwned=1\x07click\x1b]8;;\x07\n"
            "&lt;script&gt;window.pwned = 1&lt;/script&gt; &#60;script>\n"
            '"><style>body { display: none }</style>\n'
            "\x1b[31;</p><script>window.pwned = 1</script>m\n"
        )
        server = self.serve({"x": f"cat {payload}"})
        for format_ in ("html", "text"):
            self.browser.open(f"{server.url}/x?format={format_}")
            self.see(f"/exit 0/.test({TEXT})", "the end")
            self.assertIsNone(self.browser.run("window.pwned"))
            self.assertEqual(self.browser.run("document.querySelectorAll('script, img, svg, main a').length"), 0)
            self.assertIn("<script>window.pwned = 1</script><img src=x", self.browser.run(TEXT))
            self.assertEqual(self.browser.errors(), [])


class IndexPage(BrowserCase):
    def setUp(self) -> None:
        super().setUp()
        self.note = self.folder / "pid"
        self.server = self.serve(
            {
                "live": Command(
                    f"!echo $$ > {self.note}; echo got {{n:int=3}} {{unit:a|b=b}}; exec sleep 300", about="Runs on"
                ),
                "say": Command(r"echo {word} {text:text=} {year:\d{4}=2024} {path:path=a/b}", about="Says <it>"),
                "post": Command("echo posted {what}", method="POST"),
                "page": Command("echo '<h1>own page</h1>'", type="text/html"),
                "end": "!exit {code:int=0}",
                "flood": "!while :; do seq 1 200; sleep .02; done",
                "formy": Command("!a={form:text=x}; cat; echo form $a", stdin=True),
                "tag": Command('!mark={mark:text=}; sed "s/^/$mark /"', stdin=True),
                "sh": Command("sh", stdin=True, pty=True),
                "wide": "!for i in 1 2 3; do printf '%0100d\\n' $i; done",
                "many": "echo {one=1} {two=2} {three=3} {four=4} {five=5}",
            }
        )
        self.browser.open(f"{self.server.url}/")
        self.see("document.querySelector('#page')", "the index")

    def in_frame(self, expression: str, what: str) -> Any:
        self.browser.frame("iframe[name=view]")
        try:
            return self.see(expression, what)
        finally:
            self.browser.frame()

    def test_stop_in_the_head_of_the_output_ends_the_command_and_keeps_the_output(self) -> None:
        self.in_frame(f"/Start a command/.test({TEXT})", "the empty frame")
        self.browser.type("[aria-labelledby=live] [name=n]", "7")
        self.browser.click("[aria-labelledby=live] .start")
        self.in_frame(f"{LINES}[0] == 'got 7 b'", "the output")
        self.in_frame("document.querySelector('h1').innerText == 'live n=7 unit=b'", "its head")
        pid = self.pid(self.note)
        self.assertTrue(is_alive(pid))
        self.browser.frame("iframe[name=view]")
        with self.assertLogs("streamlog", "INFO") as logged:
            self.browser.click("header button")
            self.browser.frame()
            wait_until(lambda: not is_alive(pid), "the command is ended")
            wait_until(lambda: any(" status=204 " in line for line in logged.output), "the form's answer shows nothing")
        self.in_frame(f"/^\\[stopped, [0-9.]+ s\\]$/.test({LINES}[1])", "the last line")
        self.in_frame("/^stopped, [0-9.]+ s$/.test(document.querySelector('output').innerText)", "the state")
        self.in_frame(f"{LINES}[0] == 'got 7 b' && !document.querySelector('header form').offsetHeight", "the output")
        self.assertEqual(self.browser.errors(), [])

    def test_every_stop_leaves_its_last_line(self) -> None:
        for number in range(50 if SOAK >= 1000 else 6):
            path = f"live?n={number}&" if number % 2 else "flood?"
            self.browser.open(f"{self.server.url}/{path}format=html")
            self.see(f"{LINES}.length > {0 if number % 2 else 100}", "the output")
            self.browser.click("header button")
            self.see("/^stopped, /.test(document.querySelector('output').innerText)", "the state")
            last = self.browser.run("Array.from(document.querySelectorAll('samp')).pop().textContent")
            self.assertRegex(last, r"^\[stopped, [0-9.]+ s\]\n$")  # the browser may not have laid it out yet

    def test_the_state_is_told_by_a_word_and_a_colour(self) -> None:
        told = set()
        for code, word in ((0, "succeeded: exit 0"), (3, "failed: exit 3")):
            self.browser.open(f"{self.server.url}/end?code={code}&format=html")
            self.see(f"document.querySelector('output').innerText.startsWith('{word}')", "the state")
            told.add(self.browser.run("getComputedStyle(document.querySelector('output')).color"))
        self.assertEqual(len(told), 2)

    def test_input_is_typed_into_a_text_area(self) -> None:
        self.browser.type("[aria-labelledby=tag] [name=mark]", "é")
        self.browser.type("[aria-labelledby=tag] textarea", "one & two\n\n+three%")
        self.browser.click("[aria-label='Start tag']")
        self.in_frame(f"/exit 0/.test({TEXT})", "the end")
        lines = self.browser.run(LINES.replace("document", "frames.view.document"))
        self.assertEqual(lines[:-1], ["é one & two", "é", "é +three%"])
        self.browser.type("[aria-labelledby=formy] textarea", "in")
        self.browser.click("[aria-label='Start formy']")
        self.in_frame(f"{LINES}[0] == 'inform x'", "an option never stands in a parameter's place")
        curl = self.browser.run("document.querySelector('[aria-labelledby=tag] .curl').value")
        self.assertIn(" -T FILE ", curl)
        self.assertIn(" -T . ", self.browser.run("document.querySelector('[aria-labelledby=sh] .curl').value"))

    def test_starting_another_command_ends_the_first(self) -> None:
        self.browser.click("[aria-labelledby=live] .start")
        pid = self.pid(self.note)
        self.browser.type("[aria-labelledby=post] [name=what]", "it")
        self.browser.click("[aria-labelledby=post] .start")
        self.in_frame(f"{LINES}[0] == 'posted it'", "the posted output")
        wait_until(lambda: not is_alive(pid), "the first command is ended")

    def test_a_command_opens_in_its_own_tab_and_closing_that_ends_it(self) -> None:
        (index,) = self.browser.windows()
        self.browser.click("[aria-label='More of live']")
        self.browser.click("[aria-label='Start live in its own tab']")
        tab = wait_until(lambda: [each for each in self.browser.windows() if each != index], "a second tab")[0]
        self.browser.window(tab)
        self.see(f"{LINES}[0] == 'got 3 b'", "the output")
        pid = self.pid(self.note)
        self.browser.close_window()
        self.browser.window(index)
        wait_until(lambda: not is_alive(pid), "the command is ended")

    def test_a_field_is_required_and_a_bad_value_is_answered_in_the_frame(self) -> None:
        valid = "document.querySelector('[aria-labelledby=say] form').checkValidity()"
        self.assertFalse(self.browser.run(valid), "a word is required")
        for field, value in (("word", "a b"), ("year", "1999"), ("path", "c/d.e"), ("text", "two words & more")):
            self.browser.type(f"[aria-labelledby=say] [name={field}]", value)
        self.assertTrue(self.browser.run(valid))
        self.browser.click("[aria-labelledby=say] .start")
        self.in_frame(f"/'word' of 'say' must be word/.test({TEXT})", "what the server says of it")
        self.browser.type("[aria-labelledby=say] [name=word]", "a-b")
        self.browser.click("[aria-labelledby=say] .start")
        self.in_frame(f"{LINES}[0] == 'a-b two words & more 1999 c/d.e'", "the values")

    def test_output_of_another_type_is_shown_as_it_is(self) -> None:
        self.browser.click("[aria-labelledby=page] .start")
        self.in_frame("document.querySelector('h1').innerText == 'own page'", "the page")

    def test_it_asks_no_other_host(self) -> None:
        resources = self.browser.run("performance.getEntriesByType('resource').map(entry => entry.name)")
        self.assertEqual(resources, [f"{self.server.url}/-/idle"])
        self.assertEqual(self.browser.run(SCRIPTS), 0)

    def test_it_can_be_used_by_keyboard_and_read_by_a_screen_reader(self) -> None:
        self.assertEqual(self.browser.run(UNNAMED), 0)
        self.assertEqual(self.browser.run("document.querySelectorAll('h1').length"), 1)
        self.assertEqual(self.browser.run("document.querySelectorAll('h2').length"), 11)
        self.assertEqual(self.browser.run("document.documentElement.lang"), "en")
        self.browser.click("[aria-label='More of live']")
        tree = self.browser.devtools("Accessibility.getFullAXTree", {})
        names = {node["name"]["value"] for node in tree["nodes"] if node.get("name") and not node.get("ignored")}
        wanted = {"Start live", "More of live", "Start live in its own tab", "Commands", "Output"}
        self.assertLessEqual(wanted | {"Start live in the background", "curl line for live"}, names)
        first = "document.querySelector('[aria-labelledby=live] form button').innerText"
        self.assertEqual(self.browser.run(first), "Start", "the first button is what Enter presses")
        self.browser.run("document.querySelector('[aria-labelledby=live] [name=n]').focus()")
        order = []
        for _ in range(4):
            self.browser.key("Tab")
            order.append(self.browser.run("document.activeElement.ariaLabel || document.activeElement.name"))
        self.assertEqual(order, ["unit", "Start live", "More of live", "curl line for live"])
        self.browser.run("document.querySelector('[aria-labelledby=live] [name=n]').focus()")
        self.browser.key("Enter")
        self.in_frame(f"{LINES}[0] == 'got 3 b'", "the output")

    def test_a_command_has_a_row(self) -> None:
        rows = "Array.from(document.querySelectorAll('section')).map(row => row.offsetHeight)"
        self.assertLessEqual(max(self.browser.run(rows)[:-1]), 72)  # the last has more fields than fit
        colours = "Array.from(document.querySelectorAll('.start')).map(e => getComputedStyle(e).backgroundColor)"
        self.assertEqual(len(set(self.browser.run(colours))), 2, "those that look, and those that change something")
        posts = "Array.from(document.querySelectorAll('section')).filter(row => /POST/.test(row.innerText)).length"
        self.assertEqual(self.browser.run(posts), 4)

    def test_it_fits_a_phone(self) -> None:
        self.browser.resize(390, 844)
        self.see("innerWidth == 390", "the size")
        self.browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
        heights = self.browser.run(
            "Array.from(document.querySelectorAll('button, summary, select, textarea, input:not([type=hidden])'))"
            ".map(each => each.getBoundingClientRect().height)"
        )
        self.assertGreaterEqual(min(heights), 40)
        self.browser.run("document.querySelectorAll('details').forEach(each => each.open = false)")
        rows = self.browser.run("Array.from(document.querySelectorAll('section')).map(row => row.offsetHeight)")
        self.assertLessEqual(max(rows[:-1]), 140, "a line of text, and two of fields with their labels")
        self.assertLessEqual(rows[0], 110, "two lines of text, and one of fields")
        for element in ("document.documentElement", "document.querySelector('main')"):
            self.assertLessEqual(self.browser.run(f"{element}.scrollWidth"), 390)
        view = "document.querySelector('aside').offsetHeight"
        self.assertLess(self.browser.run(view), 844 / 3)
        self.browser.click("[aria-label='Start wide']")
        self.in_frame(f"/exit 0/.test({TEXT})", "the output")
        self.see(f"{view} > 844 / 2", "the frame makes room for it")
        self.assertLessEqual(self.browser.run("document.documentElement.scrollWidth"), 390)
        self.browser.frame("iframe[name=view]")
        self.assertGreater(self.browser.run("document.querySelector('main').scrollWidth"), 800, "it scrolls in itself")
        self.assertLess(self.browser.run("document.querySelector('samp').offsetHeight"), 30, "a line is a line")
        self.assertLessEqual(self.browser.run("document.documentElement.scrollWidth"), 390)
        self.browser.frame()
        for width, height in ((320, 256), (640, 360)):  # a desktop at 400 %, a phone on its side
            self.browser.resize(width, height)
            self.assertGreater(self.browser.run("document.querySelector('main').offsetHeight"), 100)

    def test_each_page_can_be_read_in_both_colour_schemes_and_has_no_script(self) -> None:
        url = self.server.url
        self.fetch(self.server, "/end?async=1&code=3")
        self.fetch(self.server, "/live?async=1")
        for scheme in ("light", "dark"):
            self.browser.scheme(scheme)
            for path, ready in (
                ("/", "document.querySelector('#page')"),
                ("/-/idle", "/Start/.test(document.body.innerText)"),
                ("/-/runs", "document.querySelector('td.failed') && document.querySelector('td.running')"),
                ("/none", "/nothing at/.test(document.body.innerText)"),
                ("/live?format=html", "document.querySelector('samp') && document.querySelector('button')"),
                ("/end?code=3&format=html", "document.querySelector('output')"),
                ("/end?code=0&format=html", "document.querySelector('output')"),
            ):
                with self.subTest(path=path, scheme=scheme):
                    self.browser.open(url + path)
                    self.see(ready, "the page")
                    if path == "/":
                        self.browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
                    self.assertEqual(self.browser.run(f"({CONTRAST})()"), [])
                    self.assertEqual((self.browser.run(SCRIPTS), self.browser.run(UNNAMED)), (0, 0))
                    self.assertTrue(self.browser.run("document.title"))
                    dark = self.browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
                    self.assertEqual(dark, scheme == "dark")
        refused = [error for error in self.browser.errors() if "status of 404" not in error]
        self.assertEqual([error for error in refused if "ERR_" not in error], [])

    def test_what_others_run_is_seen_and_stopped_on_the_page_of_runs(self) -> None:
        with self.connect(self.server) as client:
            client.get("/live?n=5&unit=a")
            client.read_until(b"got 5 a\n")
            pid = self.pid(self.note)
            (index,) = self.browser.windows()
            self.browser.click("[aria-label='Start flood']")
            self.in_frame(f"{LINES}.length > 100", "a run of ours")
            self.browser.click("[href='-/runs']")
            tab = wait_until(lambda: [each for each in self.browser.windows() if each != index], "a second tab")[0]
            self.browser.window(tab)
            self.see("document.querySelector('[aria-label=\"Stop live n=5 unit=a\"]')", "the run")
            self.assertTrue(self.browser.run("!!document.querySelector('[aria-label=\"Stop flood\"]')"), "it goes on")
            row = self.browser.run("document.querySelector('tbody tr').innerText")
            self.assertIn(f"127.0.0.1:{client.sock.getsockname()[1]}", row)
            self.assertRegex(row, r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\s+127.*\s+8 bytes\s+running")
            self.browser.click("[aria-label='Stop live n=5 unit=a']")
            wait_until(lambda: not is_alive(pid), "it is stopped")
            self.assertIn(b"[stopped, ", client.read_until(b" s]"))
        self.see("!/live/.test(document.querySelector('tbody').innerText)", "it is gone from the list")
        self.browser.click("[href='runs?follow=0']")
        self.see("document.querySelector('[href=runs]')", "the list stays as it is")
        self.browser.resize(390, 844)
        self.assertLessEqual(self.browser.run("document.documentElement.scrollWidth"), 390)
        self.browser.close_window()
        self.browser.window(index)

    def test_an_error_is_a_page_with_a_way_back(self) -> None:
        for path, said in (
            ("/none", "there is nothing at '/none'"),
            ("/live?n=x", "must be int: 'x'"),
            ("/post?what=a", f"try: curl -N -d what=WHAT {self.server.url}/post"),
            ("/-/runs/aaaaaaaaaaaaaaaaaaaaaa", "is not kept"),
        ):
            with self.subTest(path=path):
                self.browser.open(self.server.url + path)
                self.see(f"document.body.innerText.includes({json.dumps(said)})", "what the server says")
                self.browser.click("body > header a")
                self.see("document.querySelector('#page')", "the index")
        self.browser.type("[aria-labelledby=say] [name=word]", "a b")
        self.browser.click("[aria-labelledby=say] .start")
        self.in_frame(f"/'word' of 'say' must be word/.test({TEXT})", "what the server says of it")
        self.browser.frame("iframe[name=view]")
        self.browser.click("body > header a")
        self.browser.frame()
        self.see("frames.view.location.pathname == '/-/idle'", "the index, which is not in its own frame")


class Events(BrowserCase):
    PAGE = """<!DOCTYPE html>
<title>Ticks</title>
<ul id="list"></ul>
<script>
const source = new EventSource("/ticks");
const show = event => {
  const item = list.appendChild(document.createElement("li"));
  item.textContent = event.type + " " + event.data;
};
source.onmessage = show;
source.addEventListener("stderr", show);
source.addEventListener("exit", show);
</script>
"""

    def test_the_page_that_a_user_writes_with_eventsource_works_and_never_starts_a_second_run(self) -> None:
        mark, gate = self.folder / "mark", self.make_gate()
        (self.folder / "page.html").write_text(self.PAGE)
        ticks = f"!echo run >> {mark}; echo 1; read _ <> {gate}; echo 2; read _ <> {gate}; echo oops >&2; exit 3"
        page = Command(f"cat {self.folder}/page.html", type="text/html")
        server = self.serve({"page": page, "ticks": ticks})
        self.browser.open(f"{server.url}/page")
        items = "Array.from(document.querySelectorAll('li')).map(li => li.innerText)"
        for count in (1, 2):
            self.see(f"{items}.length == {count}", "an event, before the next one")
            gate.write_text("\n")
        self.see(f"{items}.length == 4", "all events")
        self.assertEqual(self.browser.run(items), ["message 1", "message 2", "stderr oops", "exit 3"])
        self.see("source.readyState == EventSource.CLOSED", "it has come again, and was told to stay away")
        self.assertEqual(mark.read_text(), "run\n")

    def test_a_page_of_another_site_gets_nothing_to_run(self) -> None:
        mark = self.folder / "mark"
        server = self.serve({"x": f"touch {mark}"})
        (self.folder / "evil.html").write_text(
            f"<img src='{server.url}/x'><iframe src='{server.url}/x'></iframe><form action='{server.url}/x'></form>"
            f"<script>fetch('{server.url}/x', {{mode: 'no-cors'}}).finally(() => {{ document.title = 'tried';"
            " document.querySelector('form').submit() })</script>"
        )
        evil = self.serve({"page": Command(f"cat {self.folder}/evil.html", type="text/html")})
        self.browser.open(evil.url.replace("127.0.0.1", "localhost") + "/page")
        self.see(f"location.port == '{server.port}' && /may not use this server/.test({TEXT})", "the refusal")
        self.assertFalse(mark.exists())


class Clients(ServerCase):
    """The formats as other programs get them."""

    def test_negotiation_and_options_choose_the_format(self) -> None:
        server = self.serve({"x": "!echo out; echo err >&2", "csv": Command("echo a", type="text/csv")})
        for path, accept, type_ in (
            ("/x", "*/*", "text/plain; charset=utf-8"),
            ("/x", "text/html", "text/html; charset=utf-8"),
            ("/x", "text/html, */*;q=0.8", "text/plain; charset=utf-8"),
            ("/x", "text/event-stream", "text/event-stream"),
            ("/x", "application/json", "application/x-ndjson"),
            ("/x?format=html", "*/*", "text/html; charset=utf-8"),
            ("/x?format=text", "text/event-stream", "text/plain; charset=utf-8"),
            ("/csv", "text/html", "text/csv"),
        ):
            for method in ("GET", "HEAD"):
                with self.subTest(path=path, accept=accept, method=method):
                    answer = self.fetch(server, path, method, headers=[f"Accept: {accept}"])
                    self.assertEqual((answer.status, answer.headers["content-type"]), (200, type_))
                    self.assertEqual(answer.headers["vary"], "Accept")
        for path in (
            "/x?format=xml",
            "/csv?format=html",
            "/x?timestamps=2",
            "/x?heartbeat=0",
            "/x?heartbeat=x",
            "/x?heartbeat=nan",
            "/x?heartbeat=1e308",
            "/x?heartbeat=0.05",
        ):
            with self.subTest(path=path):
                self.assertEqual(self.fetch(server, path).status, 400)
        policy = self.fetch(server, "/x?format=html").headers["content-security-policy"]
        self.assertIn("default-src 'none'", policy)

    def test_a_program_gets_the_end_as_json(self) -> None:
        server = self.serve({"x": "!echo out; kill -15 $$"})
        *lines, last = map(json.loads, self.fetch(server, "/x?format=ndjson").body.splitlines())
        self.assertEqual(
            (lines[0]["line"], last["exit_code"], last["signal"], last["reason"]), ("out", 143, 15, "exit")
        )

    def test_a_prompt_is_not_held_back(self) -> None:
        server = self.serve({"x": "!printf 'name? '; sleep 300"})
        for format_, expected in (
            ("ndjson", b'"line": "name? ", "partial": true}'),
            ("sse", b"partial: true\nid: 6\ndata: name? \n\n"),
        ):
            with self.subTest(format=format_), self.connect(server) as client:
                started = time.monotonic()
                client.get(f"/x?format={format_}")
                client.read_until(expected)
                self.assertTrue(0.2 < time.monotonic() - started < 10)
        for format_ in ("text", "html"):
            with self.subTest(format=format_), self.connect(server) as client:
                client.get(f"/x?format={format_}")
                client.read_until(b"name? ")

    def test_stderr_has_its_own_pipe_in_the_tagged_formats_unless_the_command_says_otherwise(self) -> None:
        for stderr, streams in ((None, ["stderr", "stdout"]), ("merge", ["stdout", "stdout"]), ("discard", ["stdout"])):
            server = self.serve({"x": Command("!echo out; echo err >&2", stderr=stderr)})
            lines = map(json.loads, self.fetch(server, "/x?format=ndjson").body.splitlines()[:-1])
            self.assertEqual(sorted(line["stream"] for line in lines), streams)
        self.assertEqual(self.fetch(self.serve({"x": "!echo out; echo err >&2"}), "/x").body, b"out\nerr\n")

    def test_a_heartbeat_tells_that_a_silent_run_goes_on(self) -> None:
        gate = self.make_gate()
        server = self.serve({"x": f"!printf a; read _ <> {gate}; echo b"})
        for format_ in ("text", "html"):
            with self.connect(server) as client:
                client.get(f"/x?heartbeat=0.2&format={format_}")
                client.read_head()
                body = b""
                while b"silent" not in body.partition(b"a\n")[2]:
                    body += client.read_chunk() or b""
                gate.write_text("\n")
                body += b"".join(iter(client.read_chunk, None))
            if format_ == "text":
                note = rb"(\[still running, silent for \d+\.\d s\]\n)"
                self.assertRegex(body, rb"^%b*a\n%b+b\n$" % (note, note))

    def test_a_line_says_which_machine_it_is_from_where_that_is_asked_for(self) -> None:
        name = socket.gethostname()
        server = self.serve({"x": "printf 'a\\nb'"})
        for query, expected in (
            ("hostname=1", f"{name} a\n{name} b"),
            ("hostname=0", "a\nb"),
            ("hostname=1&format=html", f"<samp><b>{name}</b> a\n</samp><samp><b>{name}</b> b"),
            ("hostname=1&format=ndjson", f'"host": "{name}", "stream": "stdout", "line": "b"'),
        ):
            with self.subTest(query=query):
                self.assertIn(expected.encode(), self.fetch(server, f"/x?{query}").body)
        both = self.fetch(server, "/x?hostname=1&timestamps=1").body.decode()
        self.assertRegex(both, rf"^\S+T\S+ {name} a\n\S+T\S+ {name} b$")

    def test_timestamps_have_milliseconds_and_a_zone(self) -> None:
        server = self.serve({"x": "!echo a; echo b"})
        stamp = rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d"
        self.assertRegex(self.fetch(server, "/x?timestamps=1").body, rb"^%b a\n%b b\n$" % (stamp, stamp))
        self.assertEqual(
            len(re.findall(rb"<time>%b</time> [ab]" % stamp, self.fetch(server, "/x?timestamps&format=html").body)), 2
        )

    def test_lines_reach_every_client_before_the_command_ends(self) -> None:
        go = self.folder / "go"
        server = self.serve({"x": f"!echo first; while [ ! -e {go} ]; do sleep 0.02; done; echo second"})
        url = f"{server.url}/x"
        python = f"for line in urllib.request.urlopen('{url}'): print(line.decode(), end='', flush=True)"
        low = (
            f"c = http.client.HTTPConnection('127.0.0.1', {server.port}); c.request('GET', '/x'); r = c.getresponse()\n"
            "while True:\n data = r.read1(100)\n if not data: break\n print(data.decode(), end='', flush=True)"
        )
        node = (
            f"const r = await fetch('{url}'); const d = new TextDecoder();"
            "for await (const chunk of r.body) process.stdout.write(d.decode(chunk))"
        )
        for command in (
            ["curl", "-sN", url],
            ["wget", "-qO-", url],
            [sys.executable, "-uc", f"import urllib.request\n{python}"],
            [sys.executable, "-uc", f"import http.client\n{low}"],
            ["node", "--input-type=module", "-e", node],
        ):
            if not shutil.which(command[0]):
                continue
            with self.subTest(client=command[0]), subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                assert process.stdout
                self.assertEqual(process.stdout.readline(), b"first\n")
                go.touch()
                self.assertEqual(process.stdout.read(), b"second\n")
                self.assertEqual(process.wait(10), 0)
                go.unlink()

    def test_a_reconnect_for_events_gets_204_and_starts_nothing(self) -> None:
        mark = self.folder / "mark"
        server = self.serve({"x": f"touch {mark}"})
        answer = self.fetch(server, "/x", headers=["Accept: text/event-stream", "Last-Event-ID: 0"])
        self.assertEqual((answer.status, answer.body), (204, b""))
        self.assertFalse(mark.exists())

    def test_a_stopped_run_says_why_in_every_format_and_is_cut_in_those_for_programs(self) -> None:
        server = self.serve({"x": Command("!echo a; sleep 300", timeout=0.3)})
        for format_, told in (
            ("html", b"[stopped: timeout after 0.3 s, "),
            ("sse", b"event: stopped\ndata: timeout after 0.3 s\n"),
            ("ndjson", b'"reason": "timeout after 0.3 s"'),
        ):
            answer = self.fetch(server, f"/x?format={format_}")
            self.assertIn(told, answer.body)
            self.assertEqual(answer.is_whole, format_ == "html", "a browser would lose the end of a page")

    def test_a_parameter_of_a_command_goes_before_an_option_of_the_server(self) -> None:
        server = self.serve({"x": "echo {format} {footer=no}"})
        self.assertEqual(self.fetch(server, "/x?format=a&footer=b").body, b"a b\n")

    def test_progress_comes_while_it_is_made(self) -> None:
        bar = "import sys, time\nfor n in range({}):\n sys.stdout.write({})\n sys.stdout.flush()\n time.sleep(0.1)\n"
        server = self.serve(
            {"bar": self.python(bar.format(300, "f'\\r{n}%'")), "dots": self.python(bar.format(300, "'.'"))}
        )

        def watch(name: str, format_: str) -> None:
            with self.connect(server) as client:
                client.get(f"/{name}?format={format_}")
                moments = []
                for _ in range(4):
                    client.read_until(b"partial")
                    moments.append(time.monotonic())
                self.assertLess(max(b - a for a, b in zip(moments, moments[1:])), 10)

        at_once(self, watch, *itertools.product(("bar", "dots"), ("ndjson", "sse")))

    def test_a_character_that_comes_in_two_parts_is_one_event_s(self) -> None:
        gate = self.make_gate()
        server = self.serve({"x": rf"!printf 'a\346\274'; read _ <> {gate}; printf '\242 ok\n'"})
        with self.connect(server) as client:
            client.get("/x?format=sse")
            first = client.read_until(b"data: a\n\n")
            gate.write_text("\n")
            events = (first + client.read_until(b"data: 0\n")).decode()
        found = re.findall("(partial|data): (.*)", events)
        self.assertEqual(found, [("partial", "true"), ("data", "a"), ("data", "漢 ok"), ("data", "0")])

    def test_heartbeats_come_in_every_format(self) -> None:
        server = self.serve({"x": "sleep 300"})
        for format_, expected in (
            ("ndjson", b'"silent_seconds": '),
            ("sse", b"event: heartbeat\ndata: "),
            ("text", b"[still running, silent for "),
            ("html", b"[still running, silent for "),
        ):
            with self.subTest(format=format_), self.connect(server) as client:
                client.get(f"/x?format={format_}&heartbeat=0.2")
                client.read_until(expected)

    def test_no_event_or_object_is_too_long_for_a_reader_of_64_kib(self) -> None:
        server = self.serve({"x": self.python("print('\\x01' * 200_000 + '\\u20ac' * 100_000 + '\\\\' * 90_000)")})
        found = list(map(json.loads, self.fetch(server, "/x?format=ndjson").body.splitlines()))
        text = "\x01" * 200_000 + "\u20ac" * 100_000 + "\\" * 90_000
        self.assertEqual("".join(one["line"] for one in found[:-1]), text)
        self.assertEqual([one.get("partial", False) for one in found[:-2]], [True] * (len(found) - 2))
        for format_, separator in (("ndjson", b"\n"), ("sse", b"\n\n")):
            body = self.fetch(server, f"/x?format={format_}").body
            self.assertLess(max(map(len, body.split(separator))), 65_536)
