"""Standard output and error: what a command prints arrives, or the command says that it did not.

A descriptor that is closed is taken, so that no connection gets its number, and a closed stdout fails when it is
written to, as a full disk does. Errors never go to stdout, not even when stderr is closed.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

from imgstorage.core.errors import ImgStorageError

STDOUT, STDERR = 1, 2


def secure() -> None:
    """Before anything is opened: three descriptors that are there, and streams that never fail for want of a letter."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if number == STDERR else os.O_RDONLY)  # the lowest that is free: this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(STDOUT, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(STDERR, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def put(text: str, *, end: str = "\n", op: str = "") -> None:
    """Print at once; ``op`` is the operation that it tells of.

    Raises ``failed``, naming stdout and the operation; BrokenPipeError if nobody reads any more.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise unwritten(error, op) from None


def unwritten(error: OSError, op: str = "") -> ImgStorageError:
    """What could not be printed is given up; the error that says so."""
    give_up(sys.stdout)
    work, hint = "", "the same command with another stdout"
    if op:
        work, hint = f"; what was asked for is done, or goes on, as {op}", f"imgstorage show operation {op}"
    return ImgStorageError("failed", f"cannot write to stdout: {error.strerror}{work}", hint=hint)


def failure() -> OSError | None:
    """Why what was printed so far cannot be written to stdout, if it cannot."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        return error
    return None


def give_up(stream: TextIO) -> None:
    """Nothing more can be written to a stream: Python would try once more at its end, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
