"""A guest for block devices: writes, past every cache, what each line on its stdin says.

``OFFSET LENGTH WHAT`` is answered with ``done`` or ``failed REASON``; WHAT is a byte's number, or a file of that
length. O_DIRECT wants memory at page boundaries: it comes from mmap.
"""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

MOST = 1 << 20


def main(path: str) -> None:
    """Serve until stdin ends."""
    device = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
    memory = mmap.mmap(-1, MOST)
    for line in sys.stdin:
        where, long, what = line.split()
        offset, length = int(where), int(long)
        if what.isdigit():
            memory[:] = bytes([int(what)]) * MOST
        data = b"" if what.isdigit() else Path(what).read_bytes()
        try:
            while length:
                part = min(length, MOST)
                if data:
                    memory[:part], data = data[:part], data[part:]
                with memoryview(memory) as view:
                    done = os.pwrite(device, view[:part], offset)
                offset, length = offset + done, length - done
        except OSError as error:
            print("failed", error, flush=True)
        else:
            print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
