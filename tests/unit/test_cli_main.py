"""The two programs: what they print when nothing can be asked, which status they end with, how fast they begin."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from imgstorage import __version__
from imgstorage.cli import completion, errors, man, reference, rocks
from imgstorage.cli.grammar import UsageError
from imgstorage.cli.main import run
from imgstorage.cli.verbs import VERBS
from imgstorage.config import client_config_path
from imgstorage.core.errors import CODES, ImgStorageError

ROOT = Path(__file__).parents[2]
PROGRAM = "import sys; from imgstorage.cli.main import {name}; sys.exit({name}())"


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No configuration, no sandbox."""
    monkeypatch.delenv("IMGSTORAGE_CLIENT", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("imgstorage.config.client.CONFIG_DIR", tmp_path / "etc")
    return tmp_path


def client_conf(folder: Path, text: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    secret = folder / "password"
    secret.touch(mode=0o600)
    path = folder / "client.conf"
    path.write_text(
        text or f"[broker]\nurls = amqp://127.0.0.1:1\nuser = operator\npassword_file = {secret}\n"
    )  # fmt: skip
    return path


# -- documents made from the verbs


def test_the_reference_is_up_to_date():
    assert (ROOT / "docs/commands.md").read_text() == reference.markdown(), "python -m imgstorage.cli.reference"


def test_the_man_page_is_up_to_date():
    assert (ROOT / "docs/man/imgstorage.1").read_text() == man.roff(), "python -m imgstorage.cli.man"


def test_every_command_is_documented():
    for verb in VERBS:
        if not verb.hidden:
            assert f"\n## {verb.name}\n" in reference.markdown()
            assert verb.summary


def test_help_fits_one_screen(capsys):
    assert run("imgstorage", ["help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    for verb in VERBS:
        assert verb.hidden or any(verb.name in line for line in lines)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if not verb.hidden], ids=lambda verb: verb.name)
def test_help_of_each_command(verb, capsys):
    assert run("rocks", [*verb.words, "--help"]) == 0
    printed = capsys.readouterr().out
    for argument in verb.arguments:
        assert f"  {argument.name} " in printed or verb.name == "list host"
    if verb.words != ("list", "host"):
        assert printed.startswith(f"usage: rocks {verb.name}")
        assert "Columns" in printed or not verb.columns


# -- errors


def test_every_code_has_advice():
    assert set(errors.ADVICE) == set(CODES)


@pytest.mark.parametrize("code", CODES)
def test_every_error_says_where_and_what_next(code, capsys):
    error = ImgStorageError(code, "it did not work", host="nas-0-0")
    assert errors.report(error, nas="nas-0-0") == CODES[code].exit_status
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: nas-0-0: it did not work"
    assert second.startswith("try: ")
    assert "{" not in second


def test_an_errors_own_hint_comes_first(capsys):
    errors.report(ImgStorageError("busy", "no", hint="imgstorage show operation op-a"))
    assert capsys.readouterr().err.splitlines()[1] == "try: imgstorage show operation op-a"


def test_usage_and_choices_are_shown(capsys):
    assert errors.report(UsageError("wrong", usage="imgstorage x", choices=["a b", "c"])) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: wrong", "  a b", "  c", "usage: imgstorage x", "try: imgstorage help",
    ]  # fmt: skip


def test_what_another_host_says_cannot_steer_the_terminal(capsys):
    errors.report(ImgStorageError("failed", "a\x1b]0;b\nc\udcff"))
    assert capsys.readouterr().err.splitlines()[0] == "error: a?]0;b c?"


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        ("list host frobnicate", 2, "error: list host: 'frobnicate' is one argument too many"),
        ("add host storagemap nas-0-0 tank vol1 compute-0-3 ten", 2, "error: 'ten' is not a size"),
        ("add host storagemap nas-0-0 tank vol1 compute-0-3 0", 2, "too small"),
        ("add host storagemap nas-0-0 tank völ compute-0-3 1", 2, "'völ' is not a valid volume name"),
        ("add host storagemap NAS tank vol1 compute-0-3 1", 2, "'NAS' is not a valid host name"),
        ("add host storagemap nas-0-0 tank vol1 compute-0-3 1 remotepool=", 2, "is not a valid pool"),
        ("remove host storagemap nas-0-0 vol1-snap", 2, "reserved"),
        ("add host storageimg nas-0-0 tank vol1", 2, "give either SIZE or file="),
        ("add host storageimg nas-0-0 tank vol1 3 file=/a", 2, "give either SIZE or file="),
        ("add host storageimg nas-0-0 tank vol1 file=a.img", 2, "not an absolute path on nas-0-0"),
        ("show operation 7", 2, "'7' is not a valid operation id"),
        ("list host storagemap output-col=colour", 2, "there is no column 'colour'"),
        ("sandbox exec compute-0-0", 2, "COMMAND is missing"),
        ("list host", 2, "error: there is no configuration"),
        ("remove host storagemap nas-0-0 vol1", 2, "try: imgstorage sandbox up"),
    ],
)
def test_wrong_lines_ask_nobody(line, status, says, capsys):
    assert run("imgstorage", line.split()) == status
    printed = capsys.readouterr()
    assert says in printed.err
    assert "try: " in printed.err
    assert printed.out == ""


def test_no_broker_is_status_4(nowhere, capsys):
    conf = client_conf(nowhere / "a")
    assert run("imgstorage", ["-C", str(conf), "list", "host"]) == 4
    assert "127.0.0.1:1" in capsys.readouterr().err


def test_a_fault_of_ours_has_no_traceback_without_debug(monkeypatch, capsys):
    def broken(_call: object) -> int:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("imgstorage.cli.completion.script", broken)
    assert run("imgstorage", ["completion", "bash"]) == 1
    printed = capsys.readouterr().err
    assert "error: ZeroDivisionError: oh" in printed
    assert "Traceback" not in printed
    assert run("imgstorage", ["completion", "bash", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_debug_shows_where_an_error_came_from(capsys):
    assert run("imgstorage", ["list", "host", "--debug"]) == 2
    assert "client_config_path" in capsys.readouterr().err


@pytest.mark.parametrize(("accepted", "says"), [(True, "goes on as op-a"), (False, "may have been accepted")])
def test_an_interrupt_says_what_goes_on(accepted, says, monkeypatch, capsys):
    def interrupted(_call: object) -> int:
        raise errors.Interrupted("op-a", accepted)

    monkeypatch.setattr("imgstorage.cli.completion.script", interrupted)
    assert run("imgstorage", ["completion", "bash"]) == 130
    printed = capsys.readouterr().err
    assert says in printed
    assert "imgstorage show operation op-a" in printed


# -- which configuration


def test_the_configuration_is_found_in_order(nowhere, monkeypatch):
    with pytest.raises(ImgStorageError) as caught:
        client_config_path()
    assert caught.value.code == "bad_config"
    assert "imgstorage sandbox up" in caught.value.hint
    system = client_conf(nowhere / "etc")
    assert client_config_path() == system
    note = nowhere / "state/imgstorage/sandbox"
    note.parent.mkdir(parents=True)
    note.write_text(f"{nowhere / 'gone'}\n")
    assert client_config_path() == system, "a sandbox that is gone does not count"
    sandbox = client_conf(nowhere / "gone")
    assert client_config_path() == sandbox
    monkeypatch.setenv("IMGSTORAGE_CLIENT", "/named/by/environment")
    assert client_config_path() == Path("/named/by/environment")
    assert client_config_path("given") == Path("given")


# -- as processes


def start(
    name: str, *argv: str | bytes, stdout: int = subprocess.PIPE, **more: str
) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(name=name), *argv],
        env=env, stdout=stdout, stderr=subprocess.PIPE, timeout=60, check=False,
    )  # fmt: skip


def test_nobody_reads_any_more():
    """``imgstorage help | head -0``: no traceback, and the status of a broken pipe."""
    read, write = os.pipe()
    os.close(read)
    try:
        ended = start("main", "help", stdout=write)
    finally:
        os.close(write)
    assert ended.returncode == 141
    assert ended.stderr == b""


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX"])
def test_arguments_that_are_no_text_are_refused(locale):
    ended = start("main", "list", "host", "storagemap", b"nas-\xff", LC_ALL=locale)
    assert ended.returncode == 2
    assert b"argument 4 is not valid UTF-8" in ended.stderr


def test_output_that_the_terminal_cannot_show_is_no_error():
    ended = start("main", "list", "host", "storagemap", "--help", LC_ALL="C", PYTHONIOENCODING="ascii")
    assert ended.returncode == 0
    assert b"[NAS\\u2026]" in ended.stdout


def test_version_and_name():
    assert start("main", "--version").stdout.decode() == f"imgstorage {__version__}\n"
    assert start("rocks", "remove", "host").stderr.startswith(b"error: 'remove host' is the beginning")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from imgstorage.cli.main import run; run('imgstorage', ['help']); run('imgstorage', ['add']);"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, timeout=60, check=True)
    modules = ended.stdout.decode().splitlines()[-1].split()
    assert not {"pika", "rich", "msgspec", "ssl", "socket", "logging", "subprocess", "sqlite3", "json"} & set(modules)


def test_a_command_that_asks_imports_no_rich_and_no_state_machine():
    code = (
        "import sys, importlib\n"
        "from imgstorage.cli.verbs import VERBS\n"
        "for verb in VERBS: importlib.import_module(verb.handler.partition(':')[0])\n"
        "import pika; print(*sorted(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, timeout=60, check=True)
    modules = set(ended.stdout.decode().split())
    assert not {"rich", "sqlite_utils", "sqlite3", "imgstorage.core.machine", "imgstorage.sandbox.command"} & modules


# -- rocks beside a real Rocks


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def installed(folder: Path) -> Path:
    return program(
        folder / "rocks", f"#!{sys.executable}\nimport sys\nfrom imgstorage.cli.main import rocks\nsys.exit(rocks())\n"
    )  # fmt: skip


REAL = '#!/bin/sh\nprintf "real:"; printf "<%s>" "$@"; exit 7\n'


@pytest.fixture
def both(nowhere: Path) -> tuple[Path, dict[str, str]]:
    own = installed(nowhere / "own")
    installed(nowhere / "another-of-ours")
    program(nowhere / "real/rocks", REAL)
    path = os.pathsep.join(str(nowhere / name) for name in ("own", "another-of-ours", "real"))
    return own, {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("line", ["list host", "list host interface a b=c", "sync", "help", "", "list host storagema"])
def test_a_real_rocks_gets_what_is_not_ours(both, line):
    own, env = both
    ended = subprocess.run(
        [own, *line.split()], env={**os.environ, **env}, capture_output=True, timeout=60, check=False
    )
    assert ended.returncode == 7
    assert ended.stdout.decode() == "real:" + ("".join(f"<{word}>" for word in line.split()) or "<>")


@pytest.mark.parametrize("line", ["list host storagemap help", "remove host storagemap --help", "sandbox up help"])
def test_ours_are_ours_beside_a_real_rocks(both, line):
    own, env = both
    ended = subprocess.run(
        [own, *line.split()], env={**os.environ, **env}, capture_output=True, timeout=60, check=False
    )
    assert ended.returncode == 0
    assert ended.stdout.startswith(b"usage: rocks ")


def test_without_a_real_rocks_everything_is_ours(nowhere, monkeypatch):
    own = installed(nowhere / "own")
    installed(nowhere / "another-of-ours")
    monkeypatch.setattr(rocks, "INSTALLED", str(nowhere / "opt/rocks"))
    monkeypatch.setenv("PATH", f"{nowhere / 'own'}{os.pathsep}{nowhere / 'another-of-ours'}")
    assert rocks.real_rocks(str(own)) is None
    there = program(nowhere / "opt/rocks", REAL)
    assert rocks.real_rocks(str(own)) == str(there)


# -- completion


@pytest.mark.parametrize(
    ("before", "current", "offered"),
    [
        ("", "l", ["list"]),
        (
            "list host",
            "",
            ["output-col=", "output-format=", "output-header=", "storagedev", "storageimg", "storagemap"],
        ),
        ("list host", "storaged", ["storagedev"]),
        ("remove host storagemap nas-0-0 vol1", "w", ["wait="]),
        ("remove host storagemap nas-0-0 vol1", "wait=", ["wait=no", "wait=yes"]),
        ("remove host storagemap nas-0-0 vol1 wait=yes", "w", []),
        ("list host storagemap", "output-format=j", ["output-format=json"]),
        ("completion", "", ["bash", "zsh"]),
        ("frobnicate", "", []),
        ("", "_", []),
    ],
)
def test_completion_of_words_and_parameters(before, current, offered):
    assert completion.candidates(VERBS, before.split(), current) == offered


def test_bash_completes_with_the_printed_script(nowhere):
    program(nowhere / "bin/imgstorage", f"#!{sys.executable}\n{PROGRAM.format(name='main')}\n")
    lines = ["rocks list ho", "imgstorage remove host storagemap a b wait=", "imgstorage list host "]
    ask = "".join(
        f"COMP_LINE='{line}' COMP_POINT={len(line)}; _imgstorage; echo \"${{COMPREPLY[*]}}\"; " for line in lines
    )
    ended = subprocess.run(
        ["bash", "-c", f'eval "$(imgstorage completion bash)"; compopt() {{ :; }}; {ask}'],
        env={**os.environ, "PATH": f"{nowhere / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.stderr == b""
    assert [line.split() for line in ended.stdout.decode().splitlines()] == [
        ["host"],
        ["no", "yes"],
        ["output-col=", "output-format=", "output-header=", "storagedev", "storageimg", "storagemap"],
    ]
