"""What every target driver does, told without any of them.

Rules for all
* A target is offered to one initiator, with CHAP, at the NAS's one portal, over one LUN of number :data:`LUN`. Nobody
  gets in before everything else holds; a target that is not exactly as wanted is removed and made again.
* A read-only LUN cannot be written to. What was acknowledged of a write to another is on stable storage; where the
  driver cannot see to that itself (``synchronous``), what it offers has to.
* A target counts as removed when nothing of it is left and nobody has what it offered open any more: a write that
  was under way has ended by then.
* What somebody else offers is shown, and never touched.
* Targets outlive the process that made them, and nothing brings them back after a reboot but a new offer.
* Nobody is let in at the portal before everything is offered that was: an initiator that finds its target missing may
  take that for the end (its login is refused, not only late).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

LUN = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """One target as it should be: a file or device for one initiator, who is known by name (``initiator``) or, if the
    driver knows addresses, by ``address`` instead."""

    iqn: str
    path: Path
    serial: str
    user: str
    initiator: str = ""
    address: str = ""
    readonly: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A target that exists. ``path`` is what it offers, "" for nothing; ``sessions`` are the initiators logged in."""

    name: str
    path: str
    sessions: tuple[str, ...] = ()


class Targets(Protocol):
    """The targets of one NAS."""

    programs: Sequence[str]
    """The commands that have to be installed."""
    synchronous: bool
    """Whether a writable LUN is synchronous whatever it is over."""
    knows_addresses: bool
    """Whether an initiator can be known by its address."""

    @property
    def pid(self) -> int | None:
        """The process id of the target daemon; None if none runs, or the target is in the kernel."""
        ...

    def ensure(self) -> bool:
        """See that targets can be made; True if everything has to be offered again, and :meth:`open` called then.

        Raises ``tool_missing``, ``failed``, ``conflict`` (somebody else has the portal).
        """
        ...

    def open(self) -> None:
        """Let initiators in at the portal, if they are not let in yet: all that was offered is offered again.

        Raises ``conflict`` (somebody else has the portal), ``tool_failed``.
        """
        ...

    def stop(self) -> None:
        """Remove all targets of this NAS, and end what this driver started. No error if there is nothing."""
        ...

    def seen(self) -> list[Seen]:
        """All targets that exist now, anybody's. Raises ``tool_failed`` if the target daemon does not run."""
        ...

    def offer(self, offer: Offer, secret: str, check: Callable[[Sequence[Seen]], Sequence[Seen]]) -> None:
        """Have a target as ``offer`` says; one that is so already is left alone but for its secret.

        ``check`` is given all targets and returns those that have to go first; it may raise. Raises ``in_use`` if
        somebody has what is to be offered, or goes, to himself.
        """
        ...

    def renew(self, offer: Offer, secret: str) -> None:
        """As :meth:`offer`, of what may have grown: afterwards all of it is offered.

        A session may end and come back by itself; no command of it fails.
        """
        ...

    def remove(self, which: Callable[[Seen], bool]) -> None:
        """Remove the targets that ``which`` picks, whatever their sessions, and see that they are gone.

        Raises ``in_use`` if what one offered is still open, ``conflict`` for one that is not this project's.
        """
        ...


def portal_text(address: str, port: int) -> str:
    """A portal as targets write it: an IPv6 address in its shortest form (RFC 5952), in brackets."""
    if ":" not in address:
        return f"{address}:{port}"
    return f"[{socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, address))}]:{port}"
