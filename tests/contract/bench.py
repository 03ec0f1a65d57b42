"""What a container's test bench is: one for each data plane, chosen by ``IMGSTORAGE_TEST_PLANE``.

A bench has a container plane with a real NAS plane as its other end, a guest that writes to a device as a virtual
machine does, and ways to harm what serves it. The tests of the protocol know this module only.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import HostName, PoolName, VolumeName, VolumeUuid
from imgstorage.core.ports import ContainerPlane, NasPlane

SIZE = (24 << 20) + 3 * 512  # not a whole number of any cluster or block
HOST = HostName("compute-0-0")
TANK = PoolName("tank")
DEADLINE_S = float(os.environ.get("IMGSTORAGE_TEST_DEADLINE_S", "90"))
"""How long anything may take: a guest in software emulation on a busy machine is fifty times slower than a host."""
WORD = 4096


def refused(code: str, work: Callable[[], object]) -> ImgStorageError:
    """The error with which something is refused, which has to have that code."""
    with pytest.raises(ImgStorageError) as caught:
        work()
    assert caught.value.code == code, caught.value
    return caught.value


def wait_for(what: Callable[[], Any], why: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll until ``what()`` is true; fails the test at the deadline."""
    until = time.monotonic() + deadline_s
    while not (answer := what()):
        if time.monotonic() > until:
            pytest.fail(f"not within {deadline_s:g} s: {why}")
        time.sleep(0.01)
    return answer


class Guest(ABC):
    """A program that has the device open and writes through: a write has been acknowledged only once it is flushed."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    @abstractmethod
    def request(self, offset: int, length: int, what: int | Path) -> str:
        """The line that asks for a write: of one byte over and over, or of what is in a file."""

    @abstractmethod
    def answer(self, line: str) -> bool | None:
        """Whether a line says that it was done; None if it says nothing of it."""

    def write(self, offset: int, length: int, what: int | Path) -> bool:
        """Write and flush; False if the device refused or the program is gone."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(self.request(offset, length, what) + "\n")
            self.process.stdin.flush()
        except OSError:
            return False
        for line in self.process.stdout:
            done = self.answer(line)
            if done is not None:
                return done
        return False

    def close(self) -> None:
        """Close the device."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a test wants of its bench: speeds in bytes a second, the size of the container's pool (0: as it comes)."""

    tmp: Path
    variant: str
    pace: int = 0
    return_pace: int = 0
    pool_bytes: int = 0


class Breaker(ABC):
    """A container plane, and ways to harm it. ``pool`` is its pool's name."""

    plane: ContainerPlane
    pool: PoolName

    @abstractmethod
    def guest(self, path: str) -> Guest:
        """A guest that has the device of that path open."""

    @abstractmethod
    def read(self, path: str, target: Path) -> None:
        """Copy a device's bytes into a file."""

    @abstractmethod
    def break_device(self, uuid: VolumeUuid) -> None:
        """Take away what serves the device, which nobody has open."""

    @abstractmethod
    def stop_copy(self, uuid: VolumeUuid) -> None:
        """Kill what copies the volume here, from outside."""

    @abstractmethod
    def stop_return(self, uuid: VolumeUuid) -> None:
        """Kill what sends changes back, as soon as it runs; nothing if it is over."""

    @abstractmethod
    def restart(self) -> ContainerPlane:
        """A new plane over the same state, as after the daemon was killed: the old one is not stopped."""

    @abstractmethod
    def reboot(self) -> ContainerPlane:
        """A new boot: nothing runs, run-time files are gone, nothing unsynced is trusted."""

    @abstractmethod
    def serving(self, uuid: VolumeUuid) -> list[str]:
        """What serves a volume now: the same words for the same processes and kernel objects."""

    @abstractmethod
    def serving_pids(self, uuid: VolumeUuid) -> list[int]:
        """The processes that serve a volume."""

    @abstractmethod
    def places(self) -> list[Path]:
        """The folders in which something of a volume is written down."""

    @abstractmethod
    def put_foreign(self, name: VolumeName) -> Callable[[], bool]:
        """Put somebody's data where a volume of that name would be; the answer tells whether it is untouched."""

    @abstractmethod
    def pool_away(self) -> ContainerPlane:
        """The pool is gone, and the plane starts anew."""

    @abstractmethod
    def pool_back(self) -> None:
        """The pool is there again."""


class BenchModule:
    """What the module of a plane's bench offers."""

    VARIANTS: Sequence[str]
    bench: Callable[[Setup], AbstractContextManager[Breaker]]
    other_end: Callable[[Path, Path, int], AbstractContextManager[NasPlane]]


def chosen() -> BenchModule:
    """The bench of the plane under test."""
    plane = os.environ.get("IMGSTORAGE_TEST_PLANE", "userspace")
    return cast(BenchModule, importlib.import_module(f"tests.contract.{plane}_bench"))
