"""Typed decoding by several threads at once: in a process of its own, because it was a segmentation fault."""

from __future__ import annotations

import subprocess
import sys

import pytest

from imgstorage.core.typed import from_json, from_plain

CODE = """
import dataclasses, sys, threading
from imgstorage.core.typed import from_plain
sys.setswitchinterval(1e-6)
VALUE = {"one": {"a": 1, "b": "b"}, "named": {"k": {"a": 1, "b": ""}}, "all": [{"a": 1, "b": ""}] * 3}
for _ in range(500):
    inner = dataclasses.make_dataclass("Inner", [("a", int), ("b", str), ("c", float, 0.0), ("d", str | None, None)])
    outer = dataclasses.make_dataclass("Outer", [("one", inner), ("named", dict[str, inner]), ("all", list[inner])])
    barrier = threading.Barrier(4)
    def decode():
        barrier.wait()
        from_plain(VALUE, outer)
    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


@pytest.mark.timeout(120)
def test_types_that_several_threads_decode_for_the_first_time() -> None:
    """msgspec.convert alone dies within the first dozen types."""
    assert subprocess.run([sys.executable, "-c", CODE], timeout=100, check=False).returncode == 0


def test_values() -> None:
    assert from_json("[1, 2]", tuple[int, ...]) == (1, 2)
    assert from_plain({"a": "3"}, dict[str, int]) == {"a": 3}
