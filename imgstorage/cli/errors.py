"""What a user reads when something went wrong: the one place that prints errors.

``error:`` what failed, on which host; ``usage:`` how the command is written; ``try:`` the next command to run. Each
code has advice of its own for the errors that bring none. The exit status is the error's.
"""

from __future__ import annotations

import sys

from imgstorage.cli.grammar import UsageError
from imgstorage.cli.out import give_up
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.text import shown

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

MAPPINGS = "imgstorage list host storagemap {nas}"
OPERATION = "imgstorage show operation {op}"
AGAIN = "the same command again"
ADVICE: dict[str, str] = {
    "usage": "{about}",
    "bad_name": "{about}",
    "bad_size": "a whole number of GiB, or with K, M, G or T: 10, 512M",
    "bad_config": "mend the file named above, or name another with --config FILE",
    "busy": MAPPINGS + " output-col=zvol,state,phase,op,note",
    "in_use": "end what holds the device open, then the same command again; force=yes cuts it off",
    "mapped_elsewhere": MAPPINGS,
    "conflict": MAPPINGS,
    "exists": "imgstorage list host storageimg {nas}",
    "ambiguous": "say which one with zpool=",
    "no_space": "imgstorage list host output-col=host,pools,free",
    "not_allowed": "ask the administrator: the message broker or the host's configuration forbids it",
    "quarantined": MAPPINGS + " output-col=zvol,state,error,generation",
    "expired": AGAIN,
    "stale_generation": MAPPINGS,
    "wrong_sender": "look into the log of the host named above",
    "cancelled": MAPPINGS,
    "bad_image": "qemu-img info IMAGE, on the NAS",
    "not_found": "imgstorage list host; imgstorage list host storagemap",
    "failed": AGAIN,
    "tool_failed": "look into the log of the host named above, then the same command again",
    "tool_missing": "install it on the host named above",
    "tool_output": "report this error with the version of the tool",
    "verify_failed": AGAIN,
    "diverged": MAPPINGS + " output-col=zvol,state,error,generation",
    "corrupt": "look into the log of the host named above; restore the file from a backup",
    "lost_copy": MAPPINGS + " output-col=zvol,state,error,generation",
    "bad_message": "imgstorage list host output-col=host,version: all should have the same",
    "version_mismatch": "imgstorage list host output-col=host,version: all should have the same",
    "internal": "the same command with --debug, and report what it prints",
    "unreachable": "imgstorage list host",
    "broker_unreachable": "imgstorage sandbox status, or service rabbitmq-server status on the frontend",
    "timeout": "imgstorage list host, then the same command again",
}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while an operation was under way (``accepted``) or on its way."""

    def __init__(self, op: str, accepted: bool) -> None:
        super().__init__(op)
        self.op = op
        self.accepted = accepted


class StillRunning(KeyboardInterrupt):
    """Ctrl-C where something was started that goes on: ``what`` it is, and the command (``then``) that ends it."""

    def __init__(self, what: str, then: str) -> None:
        super().__init__(what)
        self.what = what
        self.then = then


def say(text: str, *, indent: str = "") -> None:
    """One line to the person, on stderr: not part of what the command prints. Nothing can be done if it is full."""
    try:
        print(f"{indent}{_printable(text)}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        give_up(sys.stderr)


def report(error: ImgStorageError, *, debug: bool = False, nas: str = "", about: str = "imgstorage help") -> int:
    """Print an error; returns the exit status of a command that ends with it.

    ``nas``: the one it was about; ``about``: what explains the command.
    """
    say(f"error: {error}")
    if isinstance(error, UsageError):
        for choice in error.choices:
            say(choice, indent="  ")
        if error.usage:
            say(f"usage: {error.usage}")
    say(f"try: {error.hint or ADVICE[error.code].format(nas=nas or 'NAS', about=about)}")
    if debug:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    return error.exit_status


def report_fault(error: Exception, *, debug: bool) -> int:
    """Print an exception that no code of ours foresaw."""
    known = ImgStorageError("internal", f"{type(error).__name__}: {error}")
    known.__cause__ = error
    return report(known, debug=debug)


def report_interrupt(interrupt: KeyboardInterrupt) -> int:
    """Say what goes on although the person does not wait any more."""
    if isinstance(interrupt, Interrupted):
        goes_on = "goes on" if interrupt.accepted else "may have been accepted, and then goes on,"
        say(f"interrupted: the work {goes_on} as {interrupt.op}")
        say(f"try: {OPERATION.format(op=interrupt.op)}")
    elif isinstance(interrupt, StillRunning):
        say(f"interrupted: {interrupt.what}")
        say(f"try: {interrupt.then}")
    else:
        say("interrupted")
    return EXIT_INTERRUPTED


def _printable(text: str) -> str:
    """One line without what a terminal would obey: parts of it come from other hosts."""
    return shown(" ".join(text.split()))
