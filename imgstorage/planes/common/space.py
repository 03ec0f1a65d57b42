"""How much room a way back asks for before it begins.

How much will come is not known, and promising room for a whole volume would refuse most; a pool that fills up only
pauses the container's copy.
"""

from __future__ import annotations

MARGIN_SHARE = 20
MARGIN_MIN_BYTES = 64 << 20
MARGIN_MAX_BYTES = 8 << 30


def margin_bytes(size_bytes: int) -> int:
    """The free space that must be there before a way back of a disk of ``size_bytes``."""
    return min(MARGIN_MAX_BYTES, max(MARGIN_MIN_BYTES, size_bytes // MARGIN_SHARE))
