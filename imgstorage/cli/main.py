"""Where ``imgstorage`` and ``rocks`` begin: read the command line, run the command, say what went wrong.

Modules that take long to import (the bus, messages, rich) are imported by the commands that need them, and all of ours
inside of :func:`run`: an interrupt that early has its answer there too.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing takes longer to import than most commands to read
if TYPE_CHECKING:
    from collections.abc import Sequence

    from imgstorage.cli.grammar import Call

EXIT_INTERRUPTED = 130


def main() -> int:
    """The command ``imgstorage``; returns its exit status."""
    return run("imgstorage", sys.argv[1:])


def rocks() -> int:
    """The command ``rocks``; where a real Rocks is installed, it gets what is not ours."""
    return run("rocks", sys.argv[1:], hand_on=True)


def run(prog: str, argv: Sequence[str], *, hand_on: bool = False) -> int:
    """Run one command line; returns its exit status, having printed what went wrong.

    ``hand_on``: where another program of this name is installed, it gets what is not ours.
    """
    try:
        return _run(prog, argv, hand_on)
    except BrokenPipeError:
        from imgstorage.cli import errors, out

        out.give_up(sys.stdout)
        return errors.EXIT_BROKEN_PIPE
    except KeyboardInterrupt as interrupt:
        try:
            from imgstorage.cli import errors

            return errors.report_interrupt(interrupt)
        except KeyboardInterrupt:  # again, and there is nothing more to say
            return EXIT_INTERRUPTED


def _run(prog: str, argv: Sequence[str], hand_on: bool) -> int:
    from imgstorage.cli import errors, out
    from imgstorage.core.errors import ImgStorageError

    if hand_on:
        from imgstorage.cli.rocks import ours, real_rocks

        if not ours(argv) and (real := real_rocks(sys.argv[0])):
            os.execv(real, [real, *argv])  # noqa: S606 - it takes our place: there is nothing to wait for
    out.secure()
    asked: list[Call] = []
    debug = "--debug" in argv
    try:
        status = _answer(prog, argv, asked)
        trouble = out.failure()
        if trouble is not None:
            raise out.unwritten(trouble)
        return status
    except ImgStorageError as error:
        call = asked[0] if asked else None
        about = f"{prog} {call.verb.name} help" if call else f"{prog} help"
        return errors.report(error, debug=debug, nas=call.one("NAS") if call else "", about=about)
    except BrokenPipeError:
        raise
    except OSError as error:
        trouble = out.failure()
        if trouble is not None:
            return errors.report(out.unwritten(trouble), debug=debug)
        return errors.report_fault(error, debug=debug)
    except Exception as error:
        return errors.report_fault(error, debug=debug)


def _answer(prog: str, argv: Sequence[str], asked: list[Call]) -> int:
    """Do what is asked; the command, once it is known, is noted in ``asked``."""
    from importlib import import_module

    from imgstorage.cli import out
    from imgstorage.cli.grammar import Help, Version, parse
    from imgstorage.cli.verbs import VERBS
    from imgstorage.core.errors import EXIT_OK

    question = parse(prog, VERBS, argv)
    if isinstance(question, Version):
        from imgstorage import __version__

        out.put(f"imgstorage {__version__}")
        return EXIT_OK
    if isinstance(question, Help):
        from imgstorage.cli.helptext import help_text

        out.put(help_text(prog, VERBS, question), end="")
        return EXIT_OK
    asked.append(question)
    module, _, function = question.verb.handler.partition(":")
    status: int = getattr(import_module(module), function)(question)
    return status


if __name__ == "__main__":
    sys.exit(main())
