"""Sizes of the files a container keeps for one volume. Pure.

Sources: docs/interop/qcow2.txt of QEMU 7.2 (an L2 entry is 8 bytes, 16 with extended L2 entries; a refcount is
2 bytes per cluster; the L1 table has at most 32 MiB).
"""

from __future__ import annotations

from imgstorage.core.errors import ImgStorageError

OVERLAY_CLUSTER_BYTES = 128 << 10  # with extended L2 entries: 32 subclusters of 4 KiB, so a 4 KiB write stays one
SMALLEST_CLUSTER_BYTES = 64 << 10
LARGEST_CLUSTER_BYTES = 2 << 20
L2_BUDGET_BYTES = 4 << 20
MAX_OVERLAY_BYTES = ((32 << 20) // 8) * (OVERLAY_CLUSTER_BYTES // 16) * OVERLAY_CLUSTER_BYTES


def base_cluster_bytes(size_bytes: int) -> int:
    """The cluster size of the local copy: the smallest of 64 KiB … 2 MiB whose L2 tables take at most 4 MiB.

    Marking the zeros of a volume before the copy writes those tables: 1 TiB takes 0.6 s with 2 MiB clusters and
    3.5 s with 64 KiB. Above 1 TiB the tables grow: 4 MiB per TiB.
    """
    cluster = SMALLEST_CLUSTER_BYTES
    while cluster < LARGEST_CLUSTER_BYTES and 8 * _ceil(size_bytes, cluster) > L2_BUDGET_BYTES:
        cluster *= 2
    return cluster


def full_qcow2_bytes(size_bytes: int, cluster_bytes: int, entry_bytes: int) -> int:
    """The largest a qcow2 file of one layer gets: data, L2 tables, refcounts, L1 table, header."""
    data = _ceil(size_bytes, cluster_bytes)
    per_l2 = cluster_bytes // entry_bytes
    tables = _ceil(data, per_l2)
    l1 = _ceil(8 * tables, cluster_bytes)
    clusters = data + tables + l1 + 1
    refcounts = _ceil(clusters, cluster_bytes // 2) + 2
    return (clusters + refcounts) * cluster_bytes


def need_bytes(size_bytes: int) -> int:
    """What a volume can take in its pool at worst: the whole copy, and an overlay in which all was rewritten."""
    base = full_qcow2_bytes(size_bytes, base_cluster_bytes(size_bytes), 8)
    return base + full_qcow2_bytes(size_bytes, OVERLAY_CLUSTER_BYTES, 16)


def check_overlay_size(size_bytes: int) -> None:
    """Raise ``bad_size`` for a volume whose overlay QEMU could not make (above 4 PiB)."""
    if size_bytes > MAX_OVERLAY_BYTES:
        raise ImgStorageError("bad_size", f"{size_bytes} bytes is too large for an overlay: at most 4 PiB")


def zero_runs(extents: list[tuple[int, int]], cluster_bytes: int, size_bytes: int) -> list[tuple[int, int]]:
    """(start, length) of the whole clusters inside runs of zeros; only these may be marked before the copy.

    A part of a cluster would be filled up with zeros where the NAS has data. The last cluster may be cut short by
    the end of the disk. Adjacent runs are joined first, since one source may report them in pieces.
    """
    joined: list[list[int]] = []
    for start, length in extents:
        if joined and sum(joined[-1]) == start:
            joined[-1][1] += length
        else:
            joined.append([start, length])
    runs = []
    for start, length in joined:
        end = start + length
        first = _ceil(start, cluster_bytes) * cluster_bytes
        last = end if end == size_bytes else end // cluster_bytes * cluster_bytes
        if last > first:
            runs.append((first, last - first))
    return runs


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit)
