"""The command admin/lab: reads the command line, and says in one sentence what went wrong."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from imgstorage.core.errors import EXIT_FAILED, EXIT_OK, ImgStorageError
from tests.lab import build, build_code, kept
from tests.lab.agent_client import AgentClient
from tests.lab.build_steps import say
from tests.lab.lab import HOSTS
from tests.lab.network import remove_leftovers, running

COMMAND_S = 86400.0
RUN_TIMEOUT_S = 1800
LABS_AT_ONCE = 2
"""A lab alone leaves a third of two cores idle: much of what is tested is waiting."""
ALL, SEED = "--all", "--lab-seed"


class Arguments:
    """``name=value`` words before the first other word, and the rest."""

    def __init__(self, words: list[str], allowed: tuple[str, ...]) -> None:
        self._named: dict[str, str] = {}
        while words and (pair := words[0].partition("="))[0] in allowed and pair[1]:
            self._named[pair[0]] = pair[2]
            words = words[1:]
        self.rest = words

    @property
    def folder(self) -> Path:
        return Path(self._named["dir"]) if self._named.get("dir") else kept.default_folder()

    @property
    def hosts(self) -> list[str]:
        return [name for name in self._named.get("hosts", ",".join(HOSTS)).split(",") if name]

    def no_more(self) -> None:
        """Raises ``usage`` if words are left."""
        if self.rest:
            raise ImgStorageError("usage", f"'{self.rest[0]}' is not understood", hint="see admin/lab --help")


def up(words: list[str]) -> int:
    arguments = Arguments(words, ("hosts", "dir"))
    arguments.no_more()
    _show(kept.up(arguments.folder, arguments.hosts))
    return EXIT_OK


def run(words: list[str]) -> int:
    build.artefact()  # before the tests' own clock runs
    environment = {**os.environ, build.MARK: str(build.cache())}
    argv = [str(build_code.TOP / "admin/test"), "--no-skips", "--timeout", str(RUN_TIMEOUT_S)]
    named = any("::" in word for word in words)
    argv += ["-n0"] if named else [f"-n{LABS_AT_ONCE}", "--dist", "worksteal"]
    if not named and not any(word.startswith((ALL, SEED, "-k")) for word in words):
        words = [*words, f"{SEED}={secrets.randbelow(10**6)}"]
        say(f"some scenarios of each kind, chosen by {words[-1]}; {ALL} runs every one")
    which = [] if any(word.startswith("tests/") for word in words) else ["tests/lab"]
    words = [word for word in words if word != ALL]
    return subprocess.run([*argv, *which, *words], env=environment, check=False).returncode


def shell(words: list[str]) -> int:
    arguments = Arguments(words, ("dir",))
    if not arguments.rest:
        raise ImgStorageError("usage", "name a host", hint="admin/lab shell HOST [COMMAND...]")
    found = _kept(arguments.folder)
    host, *argv = arguments.rest
    if host not in found.addresses:
        raise ImgStorageError("not_found", f"the lab has no host '{host}'", hint=f"it has {', '.join(found.addresses)}")
    inside = ["nsenter", f"--net=/run/netns/{found.network}", "--"]
    if host == kept.THIS_SIDE:
        return subprocess.run([*inside, *(argv or [os.environ.get("SHELL", "/bin/sh")])], check=False).returncode
    if not argv:
        options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
        login = ["ssh", "-t", "-i", str(arguments.folder / kept.KEY), *options, f"root@{found.addresses[host]}"]
        return subprocess.run([*inside, *login], check=False).returncode
    agent = AgentClient(arguments.folder / host / "agent", host, str)
    try:
        stdin = b"" if sys.stdin.isatty() else sys.stdin.buffer.read()
        result = agent.run(argv, timeout_s=COMMAND_S, stdin=stdin)
    finally:
        agent.close()
    sys.stdout.write(result.stdout)
    sys.stderr.write(result.stderr)
    return result.exit_status


def status(words: list[str]) -> int:
    arguments = Arguments(words, ("dir",))
    arguments.no_more()
    _show(_kept(arguments.folder))
    return EXIT_OK


def down(words: list[str]) -> int:
    arguments = Arguments(words, ("dir",))
    arguments.no_more()
    ended = kept.down(arguments.folder)
    for name in remove_leftovers():
        say(f"removed the network {name}, left by a lab that was killed")
    say("the lab is down" if ended else f"no lab was running in {arguments.folder}")
    return EXIT_OK


def bench(words: list[str]) -> int:
    from tests.lab.bench import command

    build.artefact()
    return command.bench(words)


def clean(words: list[str]) -> int:
    Arguments(words, ()).no_more()
    remove_leftovers()
    if names := running():
        text = f"guests are running that boot from it ({', '.join(names)})"
        raise ImgStorageError("in_use", text, hint="end them first: admin/lab down")
    build.clean()
    say(f"{build.cache()} is empty")
    return EXIT_OK


COMMANDS: dict[str, Callable[[list[str]], int]] = {f.__name__: f for f in (up, run, bench, shell, status, down, clean)}


def _kept(folder: Path) -> kept.Kept:
    found = kept.find(folder)
    if found is None:
        raise ImgStorageError("not_found", f"no lab is running in {folder}", hint="start one with 'admin/lab up'")
    return found


def _show(found: kept.Kept) -> None:
    print(f"network {found.network}, kept by process {found.pid}")
    for name, address in found.addresses.items():
        print(f"{name:<16} {address}")


def main(words: list[str]) -> int:
    """Run one command line; returns its exit status."""
    try:
        if not words or words[0] not in COMMANDS:
            raise ImgStorageError("usage", f"one of {', '.join(COMMANDS)} is wanted", hint="see admin/lab --help")
        build.check_root()
        return COMMANDS[words[0]](words[1:])
    except ImgStorageError as error:
        say(str(error) + (f"; {error.hint}" if error.hint else ""))
        return error.exit_status
    except KeyboardInterrupt:
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
