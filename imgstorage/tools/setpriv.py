"""setpriv: commands that do not outlive who started them. Tried with util-linux 2.38.1 (Debian 12).

* The kernel sends the signal when the starter is gone, also by SIGKILL. It fires when the *thread* that forked ends
  (prctl(2), PR_SET_PDEATHSIG): start such a command from a thread that waits for it.
* A starter that died before the request was made would go unnoticed. A line of shell, the same for every command,
  therefore compares its parent with the process it was told, after the request, and only then becomes the command.
* Set-user-id programs lose the request. What the command itself starts is not covered.
"""

from __future__ import annotations

from collections.abc import Sequence

from imgstorage.tools.run import which

ORPHANED = 125
"""Exit status of a command whose starter was gone before it began."""

_GUARD = f'[ "$PPID" = "$0" ] || exit {ORPHANED}; exec "$@"'


def bound_argv(argv: Sequence[str], starter: int, sig: str = "KILL") -> list[str]:
    """The command, sent ``sig`` when the thread of process ``starter`` that starts it ends. Raises ``tool_missing``."""
    guard = [which("sh"), "-c", _GUARD, str(starter)]
    return [which("setpriv"), "--pdeathsig", sig, "--", *guard, which(argv[0]), *argv[1:]]
