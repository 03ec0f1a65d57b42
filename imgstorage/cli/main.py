"""Where ``imgstorage`` and ``rocks`` begin: read the command line, run the command, say what went wrong.

Modules that take long to import (the bus, messages, rich) are imported by the commands that need them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from imgstorage.cli import errors
from imgstorage.cli.grammar import Call, Help, Version, parse
from imgstorage.cli.verbs import VERBS
from imgstorage.core.errors import EXIT_OK, ImgStorageError


def main() -> int:
    """The command ``imgstorage``; returns its exit status."""
    return run("imgstorage", sys.argv[1:])


def rocks() -> int:
    """The command ``rocks``; where a real Rocks is installed, it gets what is not ours."""
    from imgstorage.cli.rocks import ours, real_rocks

    argv = sys.argv[1:]
    if not ours(argv) and (real := real_rocks(sys.argv[0])):
        os.execv(real, [real, *argv])  # noqa: S606 - it takes our place: there is nothing to wait for
    return run("rocks", argv)


def run(prog: str, argv: Sequence[str]) -> int:
    """Run one command line; returns its exit status, having printed what went wrong."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _run(prog, argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Nobody reads any more. Python would flush once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.EXIT_BROKEN_PIPE
    except KeyboardInterrupt as interrupt:
        return errors.report_interrupt(interrupt)


def _run(prog: str, argv: Sequence[str]) -> int:
    call: Call | None = None
    debug = "--debug" in argv
    try:
        asked = parse(prog, VERBS, argv)
        if isinstance(asked, Version):
            from imgstorage import __version__

            print(f"imgstorage {__version__}")
            return EXIT_OK
        if isinstance(asked, Help):
            from imgstorage.cli.helptext import help_text

            print(help_text(prog, VERBS, asked), end="")
            return EXIT_OK
        call, debug = asked, asked.options.debug
        module, _, function = call.verb.handler.partition(":")
        status: int = getattr(import_module(module), function)(call)
        return status
    except ImgStorageError as error:
        return errors.report(error, debug=debug, nas=call.one("NAS") if call else "")
    except BrokenPipeError:
        raise
    except Exception as error:
        return errors.report_fault(error, debug=debug)


if __name__ == "__main__":
    sys.exit(main())
