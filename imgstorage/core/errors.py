"""Every error a user can meet: a stable code, an exit status, and what to do next.

One class, because callers never branch on a Python type across a message: they branch on ``code``,
which travels. The catalogue ``CODES`` fixes each code's exit status and whether trying again can help;
``docs/errors.md`` is generated from it.

Exit statuses: 0 done, 1 failed, 2 usage, 3 refused or busy, 4 host unreachable, 5 outcome unknown.
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_REFUSED = 3
EXIT_UNREACHABLE = 4
EXIT_UNKNOWN = 5


@dataclass(frozen=True)
class Code:
    """One kind of error: its exit status, whether repeating can help, and its meaning."""

    exit_status: int
    retry: bool
    meaning: str


CODES: dict[str, Code] = {
    # usage: the request itself is wrong; nothing was asked of anybody
    "usage": Code(EXIT_USAGE, False, "the command line is wrong"),
    "bad_name": Code(EXIT_USAGE, False, "a name is not valid"),
    "bad_size": Code(EXIT_USAGE, False, "a size is not valid"),
    "bad_config": Code(EXIT_USAGE, False, "a configuration file is wrong"),
    # refused: understood, and the answer is no; nothing was changed
    "busy": Code(EXIT_REFUSED, True, "another operation owns the volume"),
    "in_use": Code(EXIT_REFUSED, True, "something still holds the device open"),
    "mapped_elsewhere": Code(EXIT_REFUSED, False, "the volume is mapped to another container"),
    "conflict": Code(EXIT_REFUSED, False, "the request contradicts what is there"),
    "exists": Code(EXIT_REFUSED, False, "something of that name exists already"),
    "ambiguous": Code(EXIT_REFUSED, False, "the name means more than one volume"),
    "no_space": Code(EXIT_REFUSED, True, "not enough free space"),
    "not_allowed": Code(EXIT_REFUSED, False, "the request is not allowed"),
    "quarantined": Code(EXIT_REFUSED, False, "two copies differ; an operator has to choose one"),
    "expired": Code(EXIT_REFUSED, True, "the request was too old when it was read"),
    "stale_generation": Code(EXIT_REFUSED, False, "the sender holds an older grant of the volume"),
    "wrong_sender": Code(EXIT_REFUSED, False, "the sender may not say this"),
    "cancelled": Code(EXIT_REFUSED, False, "another command cancelled the operation"),
    "bad_image": Code(EXIT_REFUSED, False, "the disk image cannot be taken"),
    # failed
    "not_found": Code(EXIT_FAILED, False, "no such volume, host, pool or operation"),
    "failed": Code(EXIT_FAILED, True, "a step failed"),
    "tool_failed": Code(EXIT_FAILED, True, "an external command failed"),
    "tool_missing": Code(EXIT_FAILED, False, "an external command is not installed"),
    "tool_output": Code(EXIT_FAILED, False, "an external command printed something unexpected"),
    "verify_failed": Code(EXIT_FAILED, True, "bytes that travelled do not compare equal"),
    "diverged": Code(EXIT_FAILED, False, "a copy is not a descendant of the version it claims"),
    "corrupt": Code(EXIT_FAILED, False, "durable state cannot be read"),
    "lost_copy": Code(EXIT_FAILED, False, "a copy that must be there is gone, on a container or on the NAS"),
    "bad_message": Code(EXIT_FAILED, False, "a message could not be understood"),
    "version_mismatch": Code(EXIT_FAILED, False, "two daemons speak different protocol versions"),
    "internal": Code(EXIT_FAILED, False, "a fault in this program"),
    # unreachable, unknown
    "unreachable": Code(EXIT_UNREACHABLE, True, "a host's daemon is not connected"),
    "broker_unreachable": Code(EXIT_UNREACHABLE, True, "the message broker cannot be reached"),
    "timeout": Code(EXIT_UNKNOWN, True, "no answer in time; the outcome is not known"),
}


class ImgStorageError(Exception):
    """Something a user should read: what failed, on which host, and what to do next.

    ``code`` is a key of :data:`CODES`; ``message`` one sentence without a final full stop;
    ``host`` the host on which it happened ("" = here); ``hint`` the next command to run or the
    thing to mend ("" = none). Raises ``KeyError`` for a code that is not in the catalogue.
    """

    def __init__(self, code: str, message: str, *, host: str = "", hint: str = "") -> None:
        self._kind = CODES[code]
        super().__init__(message)
        self.code = code
        self.message = message
        self.host = host
        self.hint = hint

    @property
    def exit_status(self) -> int:
        """The exit status of a command that ends with this error."""
        return self._kind.exit_status

    @property
    def retry(self) -> bool:
        """Whether the same request may succeed later without anybody's help."""
        return self._kind.retry

    def at(self, host: str) -> ImgStorageError:
        """The same error, with ``host`` named if none was."""
        return ImgStorageError(self.code, self.message, host=self.host or host, hint=self.hint)

    def __str__(self) -> str:
        where = f"{self.host}: " if self.host else ""
        return f"{where}{self.message}"


class IllegalEvent(Exception):
    """An event that the state machine has no rule for; names state and event, changes nothing."""
