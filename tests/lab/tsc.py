"""How fast this machine's time stamp counter runs. Software emulation hands it to guests as it is (QEMU 7.2).

A guest that measures it by itself, on a busy machine where its only processor is stopped now and then, may take a wrong
rate, and its clock then runs fast or slow for good; so it is told (``tsc_early_khz``, kernel-parameters.txt).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import time
from collections.abc import Callable

READ_TSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret
MEASURE_S = 0.1
TRIES = 50


@functools.cache
def frequency_khz() -> int:
    """Measured against the kernel's clock; exact to some parts in a hundred thousand."""
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(READ_TSC)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    began_ns, began = _both(read)
    time.sleep(MEASURE_S)
    ended_ns, ended = _both(read)
    return round((ended - began) * 1_000_000 / (ended_ns - began_ns))


def _both(read: Callable[[], int]) -> tuple[int, int]:
    """The kernel's clock and the counter at one moment: the closest of several tries."""
    tries = []
    for _ in range(TRIES):
        before, counter, after = time.monotonic_ns(), read(), time.monotonic_ns()
        tries.append((after - before, (before + after) // 2, counter))
    return min(tries)[1:]
