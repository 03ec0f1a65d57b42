"""An operation: what one user's command set going, from its acceptance to its end.

Its id is made where the command is typed, and stays the same in every message, journal line and log line
until the last step; asking again with it never starts anything twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from imgstorage.core.names import HostName, OpId


class Milestone(str, Enum):
    """How far an operation is. The last three end it."""

    ACCEPTED = "accepted"
    USABLE = "usable"
    LET_GO = "let_go"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = frozenset({Milestone.DONE, Milestone.FAILED, Milestone.CANCELLED})


class Kind(str, Enum):
    """What an operation does."""

    MAP = "map"
    UNMAP = "unmap"
    ADD = "add"
    IMPORT = "import"
    DELETE = "delete"
    DUMP = "dump"
    PULL = "pull"
    GROW = "grow"


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """How far an operation is.

    ``note`` is the sentence of the last decision; ``done_bytes`` of ``total_bytes`` how far its copy is,
    ``wire_bytes`` what that copy moved over the network; ``code``, ``error`` and ``hint`` say why it failed.
    """

    op: OpId
    kind: Kind
    nas: HostName
    pool: str
    volume: str
    container: str = ""
    requester: str = ""
    accepted_at: float = 0.0
    changed_at: float = 0.0
    milestone: Milestone = Milestone.ACCEPTED
    note: str = ""
    device: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    wire_bytes: int = 0
    code: str = ""
    error: str = ""
    hint: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen under this id."""
        return self.milestone in FINAL

    def reached(self, milestone: Milestone) -> bool:
        """Whether it is as far as ``milestone`` (an operation that ended has reached, or missed, them all)."""
        order = list(Milestone)
        return self.ended or order.index(self.milestone) >= order.index(milestone)
