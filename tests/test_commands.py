"""Commands: what a line means, what a value may be, and where it ends up."""

from __future__ import annotations

import os
import subprocess
import tempfile
import unittest
from unittest import mock

import streamlog
from streamlog import Command, ConfigError, Error

from .support import ServerCase


def bind(line: str, **values: str) -> streamlog.Launch:
    launch = Command(line).bind("x", values)
    assert isinstance(launch, streamlog.Launch)
    return launch


def argv(line: str, **values: str) -> list[str]:
    return list(bind(line, **values).argv)


def output(line: str, **values: str) -> str:
    """What a command prints, run as a server runs it."""
    launch = bind(line, **values)
    return subprocess.run(launch.argv, env=launch.env, stdout=subprocess.PIPE, check=True, text=True).stdout


class Placeholders(unittest.TestCase):
    def test_a_value_is_put_where_its_placeholder_stands(self) -> None:
        for line, values, expected in (
            ("df -h", {}, ["df", "-h"]),
            ("tail -n {lines} x", {"lines": "5"}, ["tail", "-n", "5", "x"]),
            ("tail -n{lines:int=100}", {}, ["tail", "-n100"]),
            ("cat /var/log/{file}.log", {"file": "auth"}, ["cat", "/var/log/auth.log"]),
            ("cat {a}-{b}", {"a": "1", "b": "2"}, ["cat", "1-2"]),
            ("cat {a} {a}", {"a": "1"}, ["cat", "1", "1"]),
            ("cat {a:int=4} {a}", {}, ["cat", "4", "4"]),
            ("echo '{a:text} b'", {"a": "x  y"}, ["echo", "x  y b"]),
            ("echo {a:text}", {"a": "two words"}, ["echo", "two words"]),
            ("echo {a:text}", {"a": ""}, ["echo", ""]),
            ("echo {a:text=it's}", {}, ["echo", "it's"]),
            ("echo {a=x=y}", {}, ["echo", "x=y"]),
            ("echo ''", {}, ["echo", ""]),
        ):
            with self.subTest(line=line):
                self.assertEqual(argv(line, **values), expected)

    def test_other_braces_stay_as_they_are_written(self) -> None:
        for line, expected in (
            ("echo {{name}}", "{name}"),
            ("echo {{name:int=3}}", "{name:int=3}"),
            ("echo '{{.Names}}'", "{{.Names}}"),
            ("awk '{print $1}'", "{print $1}"),
            ("echo '{ print }'", "{ print }"),
            ("echo ${name}", "${name}"),
            ("echo '{\"a\": 1}'", '{"a": 1}'),
            ("echo {} {1}", "{}"),
            ("echo {{{{name}}", "{{{name}"),
        ):
            with self.subTest(line=line):
                self.assertEqual(Command(line).parameters, {})
                self.assertEqual(argv(line)[1], expected)

    def test_a_doubled_brace_that_is_not_closed_twice_holds_a_placeholder(self) -> None:
        self.assertEqual(argv("echo {{name}", name="x"), ["echo", "{x"])

    def test_the_text_of_a_placeholder_is_taken_verbatim(self) -> None:
        for line, good, bad in (
            (r"echo {y:\d{4}}", "2024", "d4"),
            (r"echo {y:\d{4}}", "2024", "２０２４"),
            ("echo {m:[a-z ]+}", "a b", "A"),
            ("echo {m:[}=]x}", "}x", "x"),
            ("echo {m:(?=ab)a.}", "ab", "ac"),
            (r"echo {m:a\}b}", "a}b", "a"),
            ("echo {m:[0-9]+=7}", "3", "x"),
            ("echo {m:'\"+}", "'\"", "a"),
        ):
            with self.subTest(line=line):
                name = next(iter(Command(line).parameters))
                self.assertEqual(argv(line, **{name: good})[1], good)
                with self.assertRaises(Error):
                    argv(line, **{name: bad})
        self.assertEqual(argv("echo {m:[0-9]+=7}")[1], "7")

    def test_a_mistake_in_a_line_is_told_at_start(self) -> None:
        for line, told in (
            ("", "is empty"),
            ("'' x", "is empty"),
            ("echo 'x", "no closing quotation"),
            ("echo {x:int", "no closing brace"),
            ("echo {x:integer}", "unknown type: 'integer'"),
            ("echo {x:[}", "no closing brace"),
            ("echo {x:(}", "no closing brace|bad regular expression"),
            ("echo {x:*a}", r"unknown type: '\*a'"),
            ("echo {x:[b-a]}", "bad regular expression"),
            ("echo {x:int=abc}", "must be int: 'abc'"),
            ("echo {x=-v}", "must not begin with '-': '-v'"),
            ("echo {x:-l|-a}", "must not begin with '-': '-l'"),
            ("echo {x:int} {x:word=a}", "twice, and differently"),
            ("{x} -h", "program itself cannot be a parameter"),
            ("/opt/{x} -h", "program itself cannot be a parameter"),
            ("! ", "is empty"),
            ("a\0b", "NUL"),
            ("echo \udcff", "must be UTF-8"),
        ):
            with self.subTest(line=line), self.assertRaisesRegex(ConfigError, told):
                Command(line)

    def test_a_shell_takes_a_value_as_an_argument(self) -> None:
        self.assertEqual(output('sh -c \'printf "<%s>" "$1"\' sh {x:text}', x="a  $(id)"), "<a  $(id)>")


class Values(unittest.TestCase):
    GOOD = {
        "word": ["a", "a.b-c_d:e,f@g%h+i=j", "1", "Z"],
        "int": ["0", "42", "007"],
        "path": ["a", "a/b", "/etc/passwd", "a/", "..."],
        "text": ["", "a b", "é ü", "a;b|c$(d)`e`", "'\"\\"],
        "nginx|redis": ["nginx", "redis"],
        "syslog|auth.log": ["auth.log"],
        "[ab]+": ["abba"],
    }
    BAD = {
        "word": ["", "a b", "a/b", "..", "é", "a\n", "a;b", "\0", "a*"],
        "int": ["", "x", "1.5", "1_0", "+5", " 5", "5\n", "٣", "0x5"],
        "path": ["", "../a", "a/../b", "a/..", "a b", "a\0"],
        "text": ["a\nb", "a\tb", "\x1b[0m", "\0", "\x9b", "\u2028", "\ud800"],
        "nginx|redis": ["", "nginx ", "Nginx", "nginxredis", "nginx|redis"],
        "syslog|auth.log": ["authxlog"],
        "[ab]+": ["", "c", "ab\n"],
    }

    def test_each_type_takes_what_it_says_and_nothing_else(self) -> None:
        for type_, values in self.GOOD.items():
            for value in values:
                with self.subTest(type=type_, value=value):
                    self.assertEqual(argv(f"echo {{x:{type_}}}", x=value)[1], value)
        for type_, values in self.BAD.items():
            for value in values:
                with self.subTest(type=type_, value=value), self.assertRaises(Error) as caught:
                    argv(f"echo {{x:{type_}}}", x=value)
                self.assertEqual(caught.exception.status, 400)

    def test_values_do_not_make_up_a_path_that_goes_up(self) -> None:
        for line, values, is_taken in (
            ("cat /srv/{a:path}{b:path}", {"a": ".", "b": "./etc"}, False),
            ("cat /srv/.{a:path}", {"a": "./etc"}, False),
            ("cat /srv/{a}{b}/x", {"a": ".", "b": "."}, False),
            ("cat ../{a:path}", {"a": "x"}, True),
            ("cat ../.{a:path}", {"a": "."}, False),
            ("cat /srv/{a}", {"a": "..."}, True),
            ("!ls /srv/{a}{b:path}", {"a": ".", "b": "./etc/hostname"}, False),
            ("!ls '/srv/{a}'\"{b:path}\"", {"a": ".", "b": "./etc/hostname"}, False),
            ("!ls /srv/.\\{b:path}", {"b": "./etc/hostname"}, False),
            ("!ls /srv/{a} {b:path}", {"a": ".", "b": "./etc/hostname"}, True),
            ("cat /home/{u:alice|bob}/.{f:path}", {"u": "alice", "f": "./bob/.ssh/id"}, False),
            ("cat /home/{u:alice|bob}/.{f:path}", {"u": "alice", "f": "ssh/id.pub"}, True),
            ("cc -I{a}{b:path}", {"a": ".", "b": "./etc"}, False),
            ("cc -I{b:path}", {"b": "../etc"}, False),
            ("cc -I.{b:path}", {"b": "./etc"}, False),
            ("cc -I{b:path}", {"b": "./etc"}, True),
            ("git log {r}", {"r": "v1..v2"}, True),
            ("git log {a}..{b}", {"a": "v1", "b": "v2"}, True),
            ("!git log {r} {a}..{b}", {"r": "v1..v2", "a": "v1", "b": "v2"}, True),
            ("cat {f:path}", {"f": "a/v1..v2/b"}, True),
            ("echo {a:text}{b:text}", {"a": ".", "b": "."}, True),
        ):
            with self.subTest(line=line, values=values):
                try:
                    Command(line).bind("x", values)
                    self.assertTrue(is_taken)
                except Error as error:
                    self.assertEqual((error.status, is_taken), (400, False))

    def test_no_value_becomes_an_option(self) -> None:
        for type_ in ("word", "text", "[-a-z]+", "path"):
            with self.subTest(type=type_), self.assertRaisesRegex(Error, "must not begin with '-'"):
                argv(f"ls {{x:{type_}}}", x="-la")
        self.assertEqual(argv("nice -n {x:int}", x="5")[2], "5")
        with self.assertRaisesRegex(Error, "must not begin with '-'"):
            argv("nice -n {x:int}", x="-5")
        self.assertEqual(argv("nice -n{x:int}", x="-5")[1], "-n-5")
        with self.assertRaisesRegex(Error, "parameter 'b' of 'x' must not begin with '-'"):
            argv("ls {a:text}{b:text}", a="", b="-la")

    def test_a_path_is_absolute_only_where_it_starts_an_argument(self) -> None:
        self.assertEqual(argv("cat {p:path}", p="/etc/passwd")[1], "/etc/passwd")
        with self.assertRaisesRegex(Error, "must be a relative path"):
            argv("cat /srv/{p:path}", p="/etc/passwd")

    def test_a_refusal_names_the_parameter_the_command_and_the_value(self) -> None:
        command = Command("tail -n {lines:int}")
        with self.assertRaisesRegex(Error, r"^parameter 'lines' of 'logs' must be int: 'abc'$"):
            command.bind("logs", {"lines": "abc"})
        with self.assertRaisesRegex(Error, r"^parameter 'lines' of 'logs' is required: give it as lines=\.\.\.$"):
            command.bind("logs", {})


class Shell(unittest.TestCase):
    NASTY = "a  b;c|d&e$(id)`id`*?[x]~'\"\\ #!{}<>é"

    def test_a_text_stays_as_it_is_in_a_variable_that_the_script_quotes(self) -> None:
        for script, expected in (
            ("x={x:text}; printf '%s|' \"$x\"", "V|"),
            ("x={x:text}\nprintf '%s|' \"is $x it\"", "is V it|"),
            ('n={n:int=3} x={x:text}\n\n\ty={x}{n}; printf \'%s|\' "$x" "$y"', "V|V3|"),
            ('x="pre {x:text}" && printf \'%s|\' "$x"', "pre V|"),
            ('x={x:text} sh -c \'printf "%s|" "$x"\'', "V|"),
            ("x={x:[^0-9]+}; cat <<E\n$x\nE", "V\n"),
            ('x={x:text}; printf \'%s|\' "$(printf %s "$x")" "`printf %s "$x"`"', "V|V|"),
            ("x={x:text}; printf '%s|' it\\'s \"$x\" # it's", "it's|V|"),
        ):
            with self.subTest(script=script):
                launch = bind("!" + script, x=self.NASTY)
                self.assertNotIn(self.NASTY, "".join(launch.argv))
                found = subprocess.run(launch.argv, env=launch.env, stdout=subprocess.PIPE, check=True, text=True)
                self.assertEqual(found.stdout, expected.replace("V", self.NASTY))

    def test_a_text_is_refused_at_start_anywhere_but_in_the_first_assignments(self) -> None:
        for script in (
            "echo {x}",
            'echo "{x}"',
            "echo '{x}'",
            "a=b; echo {x}",
            "echo; x={x}",
            "# comment\nx={x}",
            "x={x}|cat",
            "x={x}y={x}",
            'x="{x}',
            'x="$y{x}"',
            "x='{x}'",
            "x=$(echo {x})",
            "x=`echo {x}`",
            "x={x}$(echo {x})",
            "x={x}&echo",
            "export x={x}",
            "x={x} {x}",
            "x+={x}",
            "x[1]={x}",
            "cat <<E\n{x}\nE",
        ):
            for type_ in ("text", "[a-z ]*", "(?s:.*)", "(nginx|redis)"):
                line = "!" + script.replace("{x}", "{x:" + type_ + "}")
                with self.subTest(line=line), self.assertRaisesRegex(ConfigError, r'assignments .* "\$x"$'):
                    Command(line)

    def test_a_value_of_a_safe_alphabet_stands_anywhere(self) -> None:
        for script, expected in (
            ("printf '%s|' {x} \"{x}\" pre{x}post", "V|V|preVpost|"),
            ('printf "%s|" "$(printf %s {x})" `printf %s {x}`', "V|V|"),
            ("# it's a comment with {x}\nprintf '%s|' {x}", "V|"),
            ("cat <<E\n5\" disk {x}\nE\nprintf '%s|' {x}", '5" disk V\nV|'),
            ("case a in a) printf '%s|' {x};; esac", "V|"),
            ("p=a/b; printf '%s|' ${p##*/} ${none:-{x}} \"${p%/*}\" {x}", "b|V|a|V|"),
            ("y='\"'; printf '%s|' \"{x}\"", "V|"),
            ("for x in {x} b; do printf '%s|' $x; done", "V|b|"),
            ('sh -c \'printf "%s|" "$1"\' sh {x}', "V|"),
            ("printf '%s|' a \\\n  {x}", "a|V|"),
        ):
            for type_, value in (("word", "a.b,c:d@e%f+g=h-i_1"), ("int", "007"), ("a,b|c%s", "c%s")):
                with self.subTest(script=script, type=type_):
                    line = "!" + script.replace("{x}", "{x:" + type_ + "}")
                    self.assertEqual(output(line, x=value), expected.replace("V", value))

    def test_arithmetic_takes_numbers_and_choices_only(self) -> None:
        self.assertEqual(output('!a={a:int}; echo $(( (1+2) * {a} + (2 * a) )) "$(({a}))"', a="7"), "35 7\n")
        self.assertEqual(output("!echo $((1 + {a:2|3}))", a="3"), "4\n")
        for script in (
            "echo $((1 + {x}))",
            "echo $(( y )) {x}",
            "x={x}; echo $((x))",
            "[[ {x} -eq 1 ]]",
            "echo $[{x}]",
            "let y={x}",
            "declare -i y; y={x}",
            "declare -x -i y={x}",
            "typeset -ix y={x}",
            "echo ${y:{x}}",
            "echo ${y:0:{x}}",
            "x={x}; echo ${y:x}",
            "echo ${@:{x}}",
            "y[{x}]=1",
            "y[1+{x}]=1",
            "x={x}; y[x]=1",
            "x={x}; echo ${y[x]}",
            "unset y[{x}]",
            '[ "{x}" -gt 3 ]',
            "test 3 -le {x}",
            "RANDOM={x}",
        ):
            for type_ in ("word", "path", *(["text", "[a-z]"] if script.startswith("x={x}") else [])):
                line = "!" + script.replace("{x}", "{x:" + type_ + "}", 1)
                with (
                    self.subTest(line=line),
                    self.assertRaisesRegex(ConfigError, "arithmetic.* make parameter 'x' an int"),
                ):
                    Command(line)

    def test_what_only_looks_like_arithmetic_takes_any_value(self) -> None:
        for script in (
            "echo ${y:-{x}} ${y:+{x}} ${y-{x}}",
            "[ {x} = a ] && echo",
            "[ $# -eq 0 ] && echo {x}",
            "echo outlet {x}",
            "declare -x y={x}",
            'y=(a b); echo "${y[@]}" {x}',
            "ls a[0-9].log {x}",
        ):
            with self.subTest(script=script):
                Command("!" + script)

    def test_the_program_of_a_script_is_no_parameter(self) -> None:
        for script in (
            "{x}",
            " \n{x} -h",
            '"{x}" -h',
            "/opt/{x} -h",
            '"/opt/{x}"',
            "./{x}",
            "true; {x}",
            "true && {x}",
            "true | {x}",
            "true &\n{x}",
            "echo $({x})",
            "echo `{x}`",
            "if {x}; then echo; fi",
            "while ! {x}; do echo; done",
            "({x})",
            "A=1 {x}",
            'A=1 B="a b" {x}',
            "A={x} {x}",
            ">/dev/null {x}",
            "2>&1 < a {x}",
            "exec {x}",
            "eval {x}",
        ):
            for type_ in ("word", "path", "on|off"):
                line = "!" + script.replace("{x}", "{x:" + type_ + "}")
                with self.subTest(line=line), self.assertRaisesRegex(ConfigError, "program itself cannot be .*'x'"):
                    Command(line)

    def test_a_value_travels_in_the_environment_only(self) -> None:
        launch = bind("!x={x:text}; echo {y}", x="secret", y="word")
        self.assertEqual(list(launch.argv), ["/bin/sh", "-c", "x=${arg_x}; echo ${arg_y}"])
        self.assertEqual((launch.env["arg_x"], launch.env["arg_y"]), ("secret", "word"))

    def test_a_value_for_a_script_is_never_an_option(self) -> None:
        for line in ("!ls -d a{x}", "!ls {x}", '!ls "{x}"', "!x={x:text}; ls $x", "!echo $(({x:int}))"):
            value = "-5" if "int" in line else "-la"
            with self.subTest(line=line), self.assertRaisesRegex(Error, "must not begin with '-'"):
                output(line, x=value)

    def test_a_path_in_a_script_is_absolute_only_where_it_starts_an_argument(self) -> None:
        for line, is_taken in (
            ("!cat {x:path}", True),
            ('!cat a <"{x:path}"', True),
            ("!cat $(ls {x:path})", True),
            ("!cat /srv/{x:path}", False),
            ('!cat "/srv/"{x:path}', False),
        ):
            with self.subTest(line=line):
                command = Command(line)
                command.bind("t", {"x": "etc/passwd"})
                try:
                    command.bind("t", {"x": "/etc/passwd"})
                    self.assertTrue(is_taken)
                except Error:
                    self.assertFalse(is_taken)

    def test_a_shell_s_own_expansions_are_left_alone(self) -> None:
        self.assertEqual(output("!a=1; echo ${a} $a"), "1 1\n")


class Environment(unittest.TestCase):
    def test_a_command_gets_the_server_s_environment_without_its_secrets(self) -> None:
        extra = {
            "STREAMLOG_TOKEN": "t",
            "LISTEN_FDS": "1",
            "LISTEN_PID": "1",
            "NOTIFY_SOCKET": "n",
            "CREDENTIALS_DIRECTORY": "c",
            "KEPT": "yes",
        }
        with mock.patch.dict(os.environ, extra):
            launch = Command("env", env={"ADDED": "1"}).bind("env", {})
        assert isinstance(launch, streamlog.Launch)
        env = launch.env
        self.assertFalse(set(env) & (set(extra) - {"KEPT"}))
        self.assertEqual((env["KEPT"], env["ADDED"], env["PYTHONUNBUFFERED"]), ("yes", "1", "1"))
        self.assertEqual(env["PATH"], os.environ["PATH"])


class Config(unittest.TestCase):
    def read(self, text: str) -> dict[str, Command]:
        with tempfile.NamedTemporaryFile("w", suffix=".ini") as file:
            file.write(text)
            file.flush()
            return dict(streamlog._read_config(file.name))

    def test_a_file_gives_each_option_its_meaning(self) -> None:
        commands = self.read(
            "# a comment\n; another\n"
            "[logs]\n;command = no\n"
            "command = tail -n {lines:int=100} -F /var/log/{file:syslog|auth.log}\nabout = Follow: 50% = half\n"
            "[busiest]\ncommand = !ps aux --sort=-%cpu |\n  head -n {n:int=10}\n  ;; esac\n"
            "[restart]\ncommand = true {unit:nginx|redis}\nmethod = POST\ntimeout = 1.5\nmax = 1\nstderr = discard\n"
            "cwd = /\nenv =\n  A=1\n  B=x=y\ntype = text/csv\n"
        )
        self.assertEqual(list(commands), ["logs", "busiest", "restart"])
        self.assertEqual(commands["logs"].about, "Follow: 50% = half")
        self.assertEqual(commands["logs"].parameters["file"].choices, ["syslog", "auth.log"])
        self.assertEqual(commands["busiest"].command, "!ps aux --sort=-%cpu |\nhead -n {n:int=10}\n;; esac")
        restart = commands["restart"]
        self.assertEqual((restart.method, restart.timeout, restart.max, restart.stderr), ("POST", 1.5, 1, "discard"))
        self.assertEqual((restart.cwd, restart.env, restart.type), ("/", {"A": "1", "B": "x=y"}, "text/csv"))

    def test_a_signal_and_headers_are_read_from_a_file(self) -> None:
        commands = self.read("[x]\ncommand = true\nstop = sigint\nheaders = User-Agent , X-GitHub-Event\n")
        self.assertEqual((commands["x"].stop, commands["x"].headers), ("INT", ["User-Agent", "X-GitHub-Event"]))
        for text, told in (
            ("stop = NONE", "command 'x': stop must be the name of a signal, as in INT: 'NONE'"),
            ("stop = 2", "command 'x': stop must be the name of a signal"),
            ("headers = Cookie", "command 'x': headers must be names of request headers"),
            ("headers = A, , B", "command 'x': headers must be names of request headers"),
            ("headers = A\nshared = yes", "command 'x': a shared command can have neither stdin nor headers"),
        ):
            with self.subTest(text=text), self.assertRaisesRegex(ConfigError, told):
                self.read(f"[x]\ncommand = true\n{text}\n")

    def test_a_mistake_names_the_file_the_command_and_the_place(self) -> None:
        for text, told in (
            ("[x]\n", r"\.ini: command 'x': 'command = \.\.\.' is missing"),
            ("[x]\ncommand = true\nspeed = 3\n", "command 'x': unknown option 'speed'; known are command, about"),
            ("[x]\ncommand = true\ntimeout = soon\n", "command 'x': timeout must be a number of seconds.*: 'soon'"),
            ("[x]\ncommand = true\ntimeout = -1\n", "command 'x': timeout must be .* 0 for no limit: "),
            ("[x]\ncommand = true\nenv = A\n", "command 'x': env must be NAME=value, one a line: 'A'"),
            ("# nothing\n", "no command in it"),
            ("[x]\ncommand = true\nmax = 0\n", "command 'x': max must be a whole number above 0"),
            ("[x]\ncommand = true\nmethod = PUT\n", "command 'x': method must be GET or POST: 'PUT'"),
            ("[x]\ncommand = true\nstderr = loud\n", "command 'x': stderr must be merge, separate or discard"),
            ("[x]\ncommand = true\ntype = nonsense\n", "command 'x': type must be a Content-Type"),
            ("[x]\ncommand = true\nenv = 1A=x\n", "command 'x': env must be NAME=value"),
            ("[a b]\ncommand = true\n", "'a b'"),
            ("[x]\ncommand = true\n[x]\ncommand = true\n", "already exists"),
            ("command = true\n", "no section headers"),
            ("[x]\ncommand = echo {y:\n", "command 'x': placeholder '{y' has no closing brace"),
        ):
            with self.subTest(text=text), self.assertRaisesRegex(ConfigError, told):
                self.read(text)
        with self.assertRaisesRegex(ConfigError, "cannot read '/nowhere': No such file"):
            list(streamlog._read_config("/nowhere"))

    def test_a_name_given_twice_is_a_mistake(self) -> None:
        with self.assertRaisesRegex(ConfigError, "'x' is given twice"):
            streamlog._load_commands(streamlog._Flags(commands=["x=true", "x=false"]), print)

    def test_an_argument_is_a_name_and_a_line_or_a_line_alone(self) -> None:
        for text, name, method, line in (
            ("disk=df -h", "disk", "GET", "df -h"),
            ("POST:go=true", "go", "POST", "true"),
            ("GET:go=true", "go", "GET", "true"),
            ("df -h", "df", "GET", "df -h"),
            ("/usr/bin/env A=1 true", "env", "GET", "/usr/bin/env A=1 true"),
            ("!ps aux | head", "ps", "GET", "!ps aux | head"),
            ("a.b-c_1=true", "a.b-c_1", "GET", "true"),
        ):
            with self.subTest(text=text):
                found, command = streamlog._parse_command_argument(text)
                self.assertEqual((found, command.method, command.command), (name, method, line))
        for text in ("PUT:x=true", "=true", "-=true", "", "x="):
            with self.subTest(text=text), self.assertRaises(ConfigError):
                streamlog._parse_command_argument(text)


class Diagnostics(ServerCase):
    def test_every_way_of_every_diagnostic_is_a_sound_command(self) -> None:
        for line in streamlog._DIAGNOSTICS.strip().splitlines():
            name, about, *ways = line.split(" | ")
            self.assertRegex(name, f"^{streamlog._NAME.pattern}$")
            self.assertTrue(about and ways)
            for way in ways:
                Command(way.rpartition("] ")[2], about)

    def test_only_what_this_machine_has_is_offered(self) -> None:
        commands = dict(streamlog._diagnostics())
        self.assertIn("disk", commands)
        for name, command in commands.items():
            with self.subTest(name=name):
                self.assertEqual(list(streamlog._warnings(command)), [])

    def test_a_container_with_hardly_any_program_still_gets_a_page(self) -> None:
        with mock.patch.dict(os.environ, {"PATH": str(self.folder)}):
            commands = dict(streamlog._diagnostics())
        self.assertLessEqual({"load", "disk"}, set(commands))
        if os.path.exists("/proc"):
            self.assertLessEqual({"uptime", "system", "memory", "mounts", "processes", "sockets"}, set(commands))
        server = self.serve(commands)
        page = self.fetch(server, "/").body.decode()
        for name in commands:
            with self.subTest(name=name):
                self.assertRegex(page, rf"(?m)/{name}\b")
                if name != "load":
                    answer = self.fetch(server, f"/{name}")
                    self.assertEqual((answer.status, answer.trailers), (200, {"Exit-Code": "0"}))
                    self.assertTrue(answer.body)

    def test_a_live_diagnostic_without_a_program_goes_on_until_its_client_leaves(self) -> None:
        with mock.patch.dict(os.environ, {"PATH": str(self.folder)}):
            commands = dict(streamlog._diagnostics())
        server = self.serve({"load": commands["load"]})
        with self.connect(server) as client:
            client.get("/load")
            client.read_head()
            for _ in range(2):
                self.assertRegex(client.read_chunk() or b"", rb"\A(\d\d:\d\d:\d\d( \d+\.\d\d){3}\n)+\Z")
