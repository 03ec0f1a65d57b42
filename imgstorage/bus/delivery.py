"""A message as it arrives, and what its receiver says to it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """ACK: taken, whatever its answer. REJECT: not understood; the broker keeps it as a dead letter."""

    ACK = "ack"
    REJECT = "reject"


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """A message. ``user_id`` is the publisher's broker user, checked by the broker.

    ``oversized``: the message is larger than this receiver takes; ``body`` is then its beginning only (the
    dead-letter queue gets all of it), and its other fields are whole, so that it can be answered.
    """

    exchange: str
    key: str
    body: bytes
    user_id: str = ""
    reply_to: str = ""
    correlation: str = ""
    redelivered: bool = False
    oversized: bool = False
