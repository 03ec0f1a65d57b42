"""Whether a dataset still has the bytes of one of its snapshots. ZFS 2.1.11.

The property ``written`` is only half an answer: it counts the block that holds the header of the intent log as well,
and importing a pool after a reboot changes that header in every volume that was ever flushed to. A few hundred bytes
``written`` may then be nothing at all. What is sent of the dataset since the snapshot tells: a stream without a change
is a first record and a last one. ``zfs receive`` looks at it in the same way (dsl_dataset_modified_since_snap).
"""

from __future__ import annotations

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.pipeline import Pipeline
from imgstorage.tools.zfs import names
from imgstorage.tools.zfs.errors import Reason, ZfsError, reason, words
from imgstorage.tools.zfs.properties import written_since

EMPTY_STREAM_BYTES = 624
"""Two records of 312 bytes: DRR_BEGIN, DRR_END."""
HEADER_BYTES = 8192
"""What the header's block takes at most: 4 KiB, twice. A changed byte takes that, and a block on each of the seven
levels above the volume's own metadata, each twice: 30 KiB were measured where blocks are smallest (ashift=9)."""
SEND_S = 60.0


def changes_argv(dataset: str, snapshot: str) -> list[str]:
    """Send what changed in a dataset since its snapshot of that short name. Raises ``bad_name``."""
    names.tag(snapshot)
    return ["zfs", "send", "-i", f"@{snapshot}", names.below_pool(dataset)]


def unchanged_since(dataset: str, snapshot: str) -> bool:
    """Whether a dataset has the bytes of its snapshot of that short name.

    Of a volume that somebody has open nothing can be sent: what was written there decides by its size alone. Raises
    MISSING if there is no such snapshot.
    """
    written = written_since(dataset, snapshot)
    if written == 0:
        return True
    counted = ["head", "-c", str(EMPTY_STREAM_BYTES + 1)], ["wc", "-c"]
    with Pipeline([changes_argv(dataset, snapshot), *counted]) as pipeline:
        outcome = pipeline.wait(SEND_S)
    if int(outcome.output or 0) > EMPTY_STREAM_BYTES:
        return False
    sender = outcome.members[0]
    if sender.exit_status:
        why = reason(sender.stderr)
        if why is Reason.BUSY:
            return written <= HEADER_BYTES
        raise ZfsError(why, f"'zfs send' of {dataset}: {words(sender.stderr)}")
    if int(outcome.output) != EMPTY_STREAM_BYTES:
        raise ImgStorageError("tool_output", f"'zfs send' of {dataset} sent {outcome.output.strip()} bytes")
    return True
