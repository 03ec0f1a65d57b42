"""A guest for block devices: writes, past every cache, what each line on its stdin says.

``OFFSET LENGTH PATTERN`` is answered with ``done`` or ``failed REASON``. O_DIRECT wants memory at page boundaries: it
comes from mmap.
"""

from __future__ import annotations

import mmap
import os
import sys

MOST = 1 << 20


def main(path: str) -> None:
    """Serve until stdin ends."""
    device = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
    memory = mmap.mmap(-1, MOST)
    for line in sys.stdin:
        offset, length, pattern = (int(word) for word in line.split())
        memory[:] = bytes([pattern]) * MOST
        try:
            while length:
                part = min(length, MOST)
                with memoryview(memory) as view:
                    done = os.pwrite(device, view[:part], offset)
                offset, length = offset + done, length - done
        except OSError as error:
            print("failed", error, flush=True)
        else:
            print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
