"""Access: hosts, sites and tokens, before anything is looked up or run."""

from __future__ import annotations

import base64
import os
import random
import shlex
import shutil
import socket
import subprocess
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import streamlog
from streamlog import Access, Command, Error, Settings

from .support import Program, ServerCase, run_program
from .test_requests import parse

TOKEN = "s3cret-à"  # whose last byte in UTF-8 is a no-break space in Latin-1
BEARER = f"Authorization: Bearer {TOKEN}"


def basic(user: str, password: str) -> str:
    return "Authorization: Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


class Headers(unittest.TestCase):
    """Access, as far as it is a matter of headers."""

    refusal = 403

    def check(
        self, reach: Any, first: str = "GET /x HTTP/1.1", *lines: str, host: str = "localhost:8000", **settings: Any
    ) -> bool:
        data = "\r\n".join([first, f"Host: {host}", *lines, "", ""]).encode()
        try:
            Access(Settings(**settings), reach).check(parse(data))
        except Error as error:
            self.assertEqual(error.status, self.refusal)
            return False
        return True

    def test_only_names_that_nobody_else_controls_are_taken_for_this_server(self) -> None:
        for host, locally, openly in (
            ("localhost", True, True),
            ("LOCALHOST.:1", True, True),
            ("x.localhost", True, True),
            ("127.0.0.1:9", True, True),
            ("127.1.2.3", True, True),
            ("[::1]:8000", True, True),
            ("192.0.2.1", False, True),
            ("[2001:db8::1]", False, True),
            ("0.0.0.0", False, True),
            ("evil.test", False, False),
            ("localhost.evil.test", False, False),
            ("127.0.0.1.evil.test", False, False),
            ("2130706433", False, False),
            (socket.gethostname(), False, True),
        ):
            with self.subTest(host=host):
                self.assertEqual(self.check("loopback", host=host), locally)
                self.assertEqual(self.check("network", host=host), openly)

    def test_the_absolute_form_cannot_smuggle_a_host_in(self) -> None:
        self.assertFalse(self.check("loopback", "GET http://evil.test/x HTTP/1.1"))

    def test_other_sites_pages_are_refused_for_every_method(self) -> None:
        for lines, allowed in (
            ([], True),
            (["Sec-Fetch-Site: same-origin"], True),
            (["Sec-Fetch-Site: none"], True),
            (["Sec-Fetch-Site: same-site"], False),
            (["Sec-Fetch-Site: cross-site"], False),
            (["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"], False),
            (["Sec-Fetch-Site: cross-site", "Origin: http://localhost:8000"], False),
            (["Origin: http://localhost:8000"], True),
            (["Origin: http://LOCALHOST:8000"], True),
            (["Origin: http://localhost:9000"], False),
            (["Origin: https://localhost:8000"], False),
            (["Origin: http://evil.test"], False),
            (["Origin: null"], False),
            (["Origin:"], False),
        ):
            for method in ("GET", "POST", "HEAD", "OPTIONS"):
                with self.subTest(lines=lines, method=method):
                    self.assertEqual(self.check("loopback", f"{method} /x HTTP/1.1", *lines), allowed)

    def test_the_index_may_be_opened_by_a_link_from_another_site(self) -> None:
        self.assertTrue(
            self.check("loopback", "GET / HTTP/1.1", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate")
        )
        self.assertFalse(
            self.check("loopback", "GET / HTTP/1.1", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors")
        )

    def test_a_token_lets_any_host_in_where_others_reach_the_server_unless_hosts_are_listed(self) -> None:
        for host, settings, locally, openly, by_socket in (
            ("box.example", {"allow_hosts": ["BOX.example."]}, True, True, True),
            ("box.example:99", {"allow_hosts": ["box.example"]}, True, True, True),
            ("sub.box.example", {"allow_hosts": ["box.example"]}, False, False, False),
            ("evil.test", {}, False, False, True),
            ("evil.test", {"token": "t"}, False, True, True),
            ("evil.test", {"token": "t", "allow_hosts": ["box.example"]}, False, False, False),
            ("box.example", {"token": "t", "allow_hosts": ["box.example"]}, True, True, True),
            ("localhost", {"token": "t", "allow_hosts": ["box.example"]}, True, True, True),
        ):
            expected = {"loopback": locally, "network": openly, "unix": by_socket}
            for reach, is_taken in expected.items():
                with self.subTest(host=host, settings=settings, reach=reach):
                    bearer = "Authorization: Bearer t"
                    self.assertEqual(self.check(reach, "GET / HTTP/1.1", bearer, host=host, **settings), is_taken)

    def test_an_origin_that_is_allowed_may_use_the_server_and_no_other(self) -> None:
        for lines, allowed in (
            (["Origin: https://dash.example"], True),
            (["Origin: https://DASH.example", "Sec-Fetch-Site: cross-site"], True),
            (["Sec-Fetch-Site: cross-site", "Referer: https://dash.example/page"], False),  # a page may make that up
            (["Origin: https://evil.test", "Referer: https://dash.example/"], False),
            (["Origin: http://dash.example"], False),
            (["Origin: https://dash.example:444"], False),
            (["Sec-Fetch-Site: cross-site"], False),
            (["Origin: null", "Sec-Fetch-Site: cross-site"], False),
        ):
            with self.subTest(lines=lines):
                origins: Any = {"allow_origins": ["https://dash.example"]}
                self.assertEqual(self.check("loopback", "POST /x HTTP/1.1", *lines, **origins), allowed)

    def test_nothing_is_run_ahead_of_being_asked_for(self) -> None:
        self.refusal = 503
        for line in (
            "Sec-Purpose: prefetch",
            "Sec-Purpose: prefetch;prerender",
            "Purpose: prefetch",
            "X-Purpose: preview",
            "X-Moz: prefetch",
        ):
            with self.subTest(line=line):
                self.assertFalse(self.check("loopback", "GET /x HTTP/1.1", line, "Sec-Fetch-Site: none"))


class Tokens(ServerCase):
    def setUp(self) -> None:
        super().setUp()
        self.mark = self.folder / "mark"
        self.server = self.serve({"x": f"!echo ran >> {self.mark}; echo $STREAMLOG_TOKEN"}, token=TOKEN)

    def status(self, *headers: str, path: str = "/x", method: str = "GET") -> int:
        with self.connect(self.server) as client:
            lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]
            client.send("\r\n".join(lines).encode())
            return client.read_answer(method).status

    def test_the_token_opens_as_bearer_and_as_the_password_of_basic(self) -> None:
        for header in (BEARER, BEARER.replace("Bearer", "bearer"), basic("", TOKEN), basic("anyone", TOKEN)):
            with self.subTest(header=header):
                self.assertEqual(self.status(header), 200)

    def test_anything_else_is_a_401_that_runs_nothing_and_tells_no_path_from_another(self) -> None:
        for headers in (
            [],
            ["Authorization:"],
            ["Authorization: Bearer"],
            ["Authorization: Bearer wrong"],
            [f"Authorization: Bearer {TOKEN}x"],
            [f"Authorization: Bearer {TOKEN[:-1]}"],
            [f"Authorization: Token {TOKEN}"],
            [f"Authorization: Basic {TOKEN}"],
            ["Authorization: Basic ===="],
            ["Authorization: Basic w6k="],
            [basic(TOKEN, "")],
            [basic("", TOKEN + ":")],
        ):
            for path in ("/x", "/", "/none", "/-/idle", "/x?bad=1"):
                for method in ("GET", "HEAD", "POST", "OPTIONS"):
                    with self.subTest(headers=headers, path=path, method=method):
                        self.assertEqual(self.status(*headers, path=path, method=method), 401)
        self.assertFalse(self.mark.exists())
        answer = self.fetch(self.server, "/x")
        challenge = 'Basic realm="streamlog", charset="UTF-8", Bearer realm="streamlog"'
        self.assertEqual(answer.headers["www-authenticate"], challenge)

    def test_random_authorizations_are_refused_and_never_an_error_of_ours(self) -> None:
        dice = random.Random(4)
        for _ in range(300):
            junk = "".join(chr(dice.choice((*range(32, 127), *range(160, 256)))) for _ in range(dice.randrange(40)))
            scheme = dice.choice(("Basic ", "Bearer ", "", "Digest "))
            with self.assertRaises(Error) as caught:
                self.server._site.access._find_token(scheme + junk)
            self.assertEqual(caught.exception.status, 401)

    def test_the_health_address_alone_needs_no_token(self) -> None:
        self.assertEqual(self.status(path="/-/healthy"), 200)

    def test_a_body_is_not_asked_for_before_the_token_was_given(self) -> None:
        server = self.serve({"p": Command("true", method="POST")}, token=TOKEN)
        with self.connect(server) as client:
            client.get("/p", "POST", ["Expect: 100-continue", "Content-Length: 3"])
            self.assertEqual(client.read_answer().status, 401)

    def test_the_token_reaches_neither_a_command_nor_the_log_nor_a_representation(self) -> None:
        (self.folder / "token").write_text(TOKEN + "\n")
        (self.folder / "token").chmod(0o600)
        command = "x=!env; cat /proc/*/cmdline | tr '\\0' ' '"
        for options, env in ((["--token-file", str(self.folder / "token")], {}), ([], {"STREAMLOG_TOKEN": TOKEN})):
            with Program("-v", "-p", "0", *options, command, env={**os.environ, **env}) as program:
                with program.connect() as client:
                    client.send(f"GET /x HTTP/1.1\r\nHost: localhost\r\n{BEARER}\r\n\r\n".encode())
                    answer = client.read_answer()
                self.assertEqual((answer.status, TOKEN.encode() in answer.body), (200, False))
                self.assertEqual(program.fetch("/x").status, 401)
                program.process.terminate()
                self.assertNotIn(TOKEN, program.end()[1])
        self.assertNotIn(TOKEN, repr(self.server._settings))

    def test_a_page_of_an_allowed_origin_is_answered_so_that_its_browser_lets_it_read(self) -> None:
        server = self.serve({"x": "echo x"}, token=TOKEN, allow_origins=["https://dash.example"])
        ask = ["Origin: https://dash.example", "Access-Control-Request-Method: GET"]
        preflight = self.fetch(server, "/x", "OPTIONS", ask)
        self.assertEqual(preflight.status, 204)
        self.assertEqual(preflight.headers["access-control-allow-origin"], "https://dash.example")
        self.assertIn("Authorization", preflight.headers["access-control-allow-headers"])
        self.assertEqual(
            self.fetch(server, "/none", "OPTIONS", ask).status, 204
        )  # without a token all paths look alike
        for headers in (ask[:1], ["Referer: https://dash.example/"], [ask[1], "Origin: https://evil.test"]):
            self.assertIn(self.fetch(server, "/x", "OPTIONS", headers).status, (401, 403))
        for path, status in (("/x", 401), ("/-/healthy", 200)):
            answer = self.fetch(server, path, headers=["Origin: https://dash.example"])
            self.assertEqual(answer.status, status)
            self.assertEqual(answer.headers["access-control-allow-origin"], "https://dash.example")
            self.assertIn("Origin", answer.headers["vary"])
            policy = answer.headers["content-security-policy"]
            self.assertIn("frame-ancestors 'self' https://dash.example", policy)
        other = self.fetch(server, "/-/healthy")
        self.assertNotIn("access-control-allow-origin", other.headers)
        self.assertIn("Origin", other.headers["vary"])
        plain = self.fetch(self.serve({}), "/-/healthy", headers=["Origin: http://localhost"])
        self.assertNotIn("access-control-allow-origin", plain.headers)
        self.assertIn("frame-ancestors 'self'", plain.headers["content-security-policy"])

    def test_a_refusal_names_the_origin_and_the_option(self) -> None:
        answer = self.fetch(self.serve({}), "/", headers=["Origin: https://evil.test"])
        self.assertEqual(answer.status, 403)
        self.assertIn(b"(https://evil.test)", answer.body)
        self.assertIn(b"allow_origins=", answer.body)


class ReadToken(ServerCase):
    READ = "Authorization: Bearer look-only-0123456789"

    def setUp(self) -> None:
        super().setUp()
        commands: dict[str, Any] = {
            "x": "echo {y=1}",
            "user": "!echo $REMOTE_USER",
            "post": Command("true", method="POST"),
            "in": Command("cat", stdin=True),
            "both": Command("cat", stdin=True, method="GET"),
        }
        self.server = self.serve(commands, token=TOKEN, read_token="look-only-0123456789")

    def test_it_may_look_and_no_more(self) -> None:
        for method, path, status in (
            ("GET", "/x", 200),
            ("HEAD", "/x", 200),
            ("OPTIONS", "/post", 204),
            ("GET", "/", 200),
            ("GET", "/-/runs", 200),
            ("GET", "/-/metrics", 200),
            ("GET", "/user?wait", 200),
            ("GET", "/both", 200),
            ("GET", "/post", 405),
            ("POST", "/post", 403),
            ("POST", "/in", 403),
            ("PUT", "/in", 403),
            ("PUT", "/both", 403),
            ("DELETE", "/-/runs/aaaaaaaaaaaaaaaaaaaaaa", 403),
            ("POST", "/none", 403),
            ("GET", "/x?async=1", 403),
        ):
            with self.subTest(method=method, path=path):
                self.assertEqual(self.fetch(self.server, path, method, [self.READ]).status, status)
                allowed = {403: (200, 202, 404, 410)}.get(status, (status,))
                self.assertIn(self.fetch(self.server, path, method, [BEARER]).status, allowed)
        self.assertEqual(self.fetch(self.server, "/x", headers=[self.READ, "Prefer: respond-async"]).status, 403)
        self.assertEqual(self.fetch(self.server, "/x").status, 401)
        self.assertEqual(self.fetch(self.server, "/x", headers=[self.READ + "x"]).status, 401)

    def test_a_command_is_told_which_token_it_was(self) -> None:
        self.assertEqual(self.fetch(self.server, "/user", headers=[self.READ]).body, b"read-token\n")
        self.assertEqual(self.fetch(self.server, "/user", headers=[BEARER]).body, b"token\n")
        self.assertEqual(self.fetch(self.serve({"x": "!echo [$REMOTE_USER]"}), "/x").body, b"[]\n")

    def test_it_needs_the_other_token_beside_it(self) -> None:
        for token in ("", "0123456789abcdef"):
            with self.assertRaisesRegex(streamlog.ConfigError, "needs another beside it"):
                Settings(token=token, read_token="0123456789abcdef")
        with mock.patch.dict(os.environ, {"STREAMLOG_READ_TOKEN": "0123456789abcdef"}):
            self.assertIn("needs another beside it", run_program("-p", "0", "x=true").stderr)

    def test_files_and_variables_are_read_and_the_lines_that_are_printed_work(self) -> None:
        full, read = self.folder / "it's full", self.folder / "read"
        full.write_text("0123456789abcdef\n")
        read.write_text("short\n")
        for path in (full, read):
            path.chmod(0o600)
        arguments = "-p", "0", "--token-file", str(full), "--read-token-file", str(read), "x=echo $REMOTE_USER"
        with Program(*arguments) as program:
            assert program.process.stdout
            line = program.process.stdout.readline()
            self.assertIn(f'-u ":$(cat {shlex.quote(str(full))})"', line)
            if shutil.which("curl"):
                told = subprocess.run(["sh", "-c", line], capture_output=True).stdout
                self.assertEqual(told, b"$REMOTE_USER\n")
            with program.connect() as client:
                client.get("/", headers=["Authorization: Bearer short"])
                self.assertIn(
                    b' -u ":$STREAMLOG_TOKEN" ', client.read_answer().body, "another machine has no such file"
                )
            program.process.terminate()
            told_of = program.end()[1]
            self.assertIn(f"the token in {read} is short, and can be guessed: use at least 16 characters", told_of)
            self.assertNotIn(str(full), told_of)
        variables = {"STREAMLOG_TOKEN": "0123456789abcdef", "STREAMLOG_READ_TOKEN": "fedcba9876543210"}
        with mock.patch.dict(os.environ, variables), Program("-p", "0", "x=true") as program:
            for token, status in (("0123456789abcdef", 200), ("fedcba9876543210", 200), ("x", 401)):
                with program.connect() as client:
                    client.get("/x", headers=[f"Authorization: Bearer {token}"])
                    self.assertEqual(client.read_answer().status, status)


class Options(ServerCase):
    def test_others_are_let_in_with_a_token_and_warned_of_without(self) -> None:
        with self.assertRaisesRegex(streamlog.ConfigError, "set a token"):
            streamlog.Server({}, Settings(bind="0.0.0.0", port=0))
        with streamlog.Server({}, Settings(bind="0.0.0.0", port=0, token="t")) as server:
            self.assertEqual(server._reach, "network")
        with Program("-p", "0", "-b", "0.0.0.0", "--no-auth", "x=echo x") as program:
            program.process.terminate()
            self.assertIn("those that change things should be POST", program.end()[1])

    def test_mistakes_in_the_options_are_told(self) -> None:
        path = Path(self.folder, "token")
        for content, options, told in (
            ("", ["--token-file", str(path)], "and not empty"),
            ("a\nb", ["--token-file", str(path)], "one line of printable characters"),
            ("a", ["--token-file", "/nowhere"], "cannot read '/nowhere'"),
            ("a", ["--allow-host", "a:80"], "--allow-host must be a host name, without a port: 'a:80'"),
            ("a", ["--allow-origin", "dash.example"], "--allow-origin must be http://HOST or https://HOST"),
            ("a", ["--allow-origin", "http://a/b"], "--allow-origin must be http://HOST or https://HOST"),
        ):
            with self.subTest(options=options, content=content):
                path.write_text(content)
                path.chmod(0o600)
                done = run_program("-p", "0", *options, "true")
                self.assertEqual((done.returncode, done.stderr.count("\n")), (2, 1), done.stderr)
                self.assertIn(told, done.stderr)

    def test_a_token_file_that_others_can_read_is_warned_of(self) -> None:
        path = Path(self.folder, "token")
        path.write_text("t")
        path.chmod(0o644)
        with Program("-p", "0", "--token-file", str(path), "true") as program:
            program.process.terminate()
            self.assertIn("warning: others can read", program.end()[1])
