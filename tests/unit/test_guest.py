"""The writing guest and its checker: a lost or changed byte is found, whatever hides it."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.sandbox import guest
from imgstorage.sandbox.guest import Guest, Writer
from imgstorage.sandbox.guest_check import Report, check
from imgstorage.sandbox.guest_disk import FileDisk
from imgstorage.sandbox.guest_log import BLOCK, CUT, LogWriter, checksum, content, named, read_logs
from imgstorage.sandbox.nbd import NbdDevice, parse_uri
from imgstorage.tools import run

SIZE = 4 << 20
RANGE = 1 << 20
"""Guests in these tests write to the first part only: the rest is "never written"."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE // 2) + bytes(SIZE // 2))
    return path


@pytest.fixture
def image(tmp_path: Path, base: Path) -> Path:
    path = tmp_path / "image.raw"
    path.write_bytes(base.read_bytes())
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "guest.log"


def write_some(image: Path, log: Path, writes: int, seed: int = 7) -> None:
    """A guest that makes some writes to a file, in this process."""
    lines = LogWriter(log)
    one = Guest(lambda: str(image), lines, seed=seed, length=RANGE, writes=writes)
    one.run()
    lines.close()


def patch(image: Path, offset: int, data: bytes) -> None:
    with open(image, "r+b") as file:
        file.seek(offset)
        file.write(data)


def by_hand(log: Path, image: Path, sequence: int, offset: int, *, done: bool, there: bool = True) -> bytes:
    """One write of one block: whether it was acknowledged, and whether it is in the image."""
    data = content(7, sequence, offset, BLOCK)
    with open(log, "a") as lines:
        if log.stat().st_size == 0:
            lines.write(f"open 7 0 {RANGE} /device\n")
        for kind in ("intent", "done")[: 2 if done else 1]:
            lines.write(f"{kind} {sequence} {offset} {BLOCK} {checksum(data)}\n")
    if there:
        patch(image, offset, data)
    return data


def test_what_a_guest_wrote_is_found(base: Path, image: Path, log: Path) -> None:
    write_some(image, log, 60)
    report = check([log], image, base)
    assert report.ok
    assert report.writes == 60
    assert report.errors == 0
    assert report.compared_bytes == SIZE
    lengths = {write.length for write in read_logs([log]).writes}
    assert lengths == {BLOCK, 16 * BLOCK}
    old, new = base.read_bytes(), image.read_bytes()
    changed = sum(old[at : at + BLOCK] != new[at : at + BLOCK] for at in range(0, SIZE, BLOCK))
    assert report.changed_bytes == read_logs([log]).changed_bytes == changed * BLOCK


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_one_corrupted_byte_of_a_written_block(base: Path, image: Path, log: Path, place: str) -> None:
    write_some(image, log, 40)
    write = read_logs([log]).writes[-1]
    offset = write.offset + {"first": 0, "middle": 2048, "last": BLOCK - 1}[place]
    before = image.read_bytes()[offset]
    patch(image, offset, bytes([before ^ 1]))
    report = check([log], image, base)
    assert not report.ok
    assert report.difference == offset


@pytest.mark.parametrize("offset", [RANGE, SIZE // 2 - 1, SIZE // 2, SIZE - 1])
def test_one_corrupted_byte_where_nobody_wrote(base: Path, image: Path, log: Path, offset: int) -> None:
    write_some(image, log, 20)
    patch(image, offset, bytes([base.read_bytes()[offset] ^ 0x80]))
    report = check([log], image, base)
    assert report.difference == offset
    assert "nobody wrote here" in report.why


def test_a_byte_in_a_hole_of_the_base(tmp_path: Path, log: Path) -> None:
    base, image = tmp_path / "base", tmp_path / "image"
    for path in (base, image):
        path.touch()
        os.truncate(path, 64 << 20)
    write_some(image, log, 5)
    assert check([log], image, base).ok
    patch(image, 50_000_000, b"x")
    assert check([log], image, base).difference == 50_000_000


def test_a_last_write_that_is_lost(base: Path, image: Path, log: Path) -> None:
    by_hand(log, image, 1, 8 * BLOCK, done=True)
    by_hand(log, image, 2, 9 * BLOCK, done=True, there=False)
    report = check([log], image, base)
    assert report.difference is not None
    assert report.difference // BLOCK == 9
    assert "wanted write 2" in report.why


def test_an_older_version_of_a_block(base: Path, image: Path, log: Path) -> None:
    old = by_hand(log, image, 1, 8 * BLOCK, done=True)
    by_hand(log, image, 2, 8 * BLOCK, done=True)
    assert check([log], image, base).ok
    patch(image, 8 * BLOCK, old)
    report = check([log], image, base)
    assert report.difference is not None
    assert report.difference // BLOCK == 8
    assert "there is write 1" in report.why


def test_a_write_at_the_wrong_place(base: Path, image: Path, log: Path) -> None:
    data = by_hand(log, image, 1, 8 * BLOCK, done=True)
    patch(image, 20 * BLOCK, data)
    report = check([log], image, base)
    assert report.difference == 20 * BLOCK
    assert f"for offset {8 * BLOCK}" in report.why


@pytest.mark.parametrize("there", [True, False])
def test_a_write_that_was_not_acknowledged_may_be_there_or_not(base: Path, image: Path, log: Path, there: bool) -> None:
    by_hand(log, image, 1, 8 * BLOCK, done=True)
    by_hand(log, image, 2, 8 * BLOCK, done=False, there=there)
    by_hand(log, image, 3, 12 * BLOCK, done=False, there=there)
    report = check([log], image, base)
    assert report.ok
    assert (report.writes, report.unacknowledged) == (1, 2)


def test_a_write_that_was_not_acknowledged_may_be_there_in_part_but_only_whole_sectors(
    base: Path, image: Path, log: Path
) -> None:
    by_hand(log, image, 1, 8 * BLOCK, done=True)
    new = by_hand(log, image, 2, 8 * BLOCK, done=False, there=False)
    patch(image, 8 * BLOCK, new[:1024])
    assert check([log], image, base).ok
    patch(image, 8 * BLOCK + 1024, new[1024:1100])
    assert check([log], image, base).difference is not None


def test_an_unacknowledged_write_before_the_last_acknowledged_one_may_not_come_back(
    base: Path, image: Path, log: Path
) -> None:
    late = by_hand(log, image, 1, 8 * BLOCK, done=False)
    by_hand(log, image, 2, 8 * BLOCK, done=True)
    assert check([log], image, base).ok
    patch(image, 8 * BLOCK, late)
    assert not check([log], image, base).ok


def test_an_image_that_is_too_short_or_too_long(base: Path, image: Path, log: Path) -> None:
    by_hand(log, image, 1, 0, done=True)
    os.truncate(image, SIZE - 512)
    assert check([log], image, base).difference == SIZE - 512
    os.truncate(image, SIZE + 512)
    assert check([log], image, base).ok
    patch(image, SIZE, b"x")
    assert check([log], image, base).difference == SIZE


def test_logs_are_read_in_order(base: Path, image: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "1.log", tmp_path / "2.log"
    write_some(image, first, 300, seed=1)
    write_some(image, second, 300, seed=2)
    assert check([first, second], image, base).writes == 600
    assert not check([second, first], image, base).ok


def test_what_a_guest_read_wrong_counts(base: Path, image: Path, log: Path) -> None:
    by_hand(log, image, 1, BLOCK, done=True)
    with open(log, "a") as lines:
        lines.write(f"bad 1 {BLOCK}\n")
    assert check([log], image, base).difference == BLOCK


def test_a_line_that_a_kill_cut_short(base: Path, image: Path, log: Path) -> None:
    by_hand(log, image, 1, BLOCK, done=True)
    with open(log, "a") as lines:
        lines.write("done 2 40")
    assert check([log], image, base).writes == 1
    LogWriter(log).close()
    assert log.read_text().endswith(f"done 2 40{CUT}\n")
    assert check([log], image, base).writes == 1


@pytest.mark.parametrize("line", ["done 9 0 4096 00", "nonsense", "intent 1", "done 1 8192 4096 00"])
def test_a_log_that_makes_no_sense(base: Path, image: Path, log: Path, line: str) -> None:
    by_hand(log, image, 1, BLOCK, done=True)
    with open(log, "a") as lines:
        lines.write(f"{line}\n")
    with pytest.raises(ImgStorageError) as caught:
        check([log], image, base)
    assert caught.value.code == "corrupt"
    assert f"{log}:4" in caught.value.message


def test_a_wrong_checksum_in_a_log(base: Path, image: Path, log: Path) -> None:
    data = by_hand(log, image, 1, BLOCK, done=True)
    log.write_text(log.read_text().replace(checksum(data), "0" * 16))
    with pytest.raises(ImgStorageError) as caught:
        check([log], image, base)
    assert caught.value.code == "corrupt"


def test_a_block_says_what_it_is() -> None:
    block = content(7, 3, 4096, BLOCK)
    assert named(block) == "write 3 of seed 7 for offset 4096"
    assert named(block[:-1] + bytes([block[-1] ^ 1])).startswith("a damaged write 3")
    assert named(bytes(BLOCK)) == "zeros"
    assert named(b"x" * BLOCK) == "no guest's write"


def test_the_checker_as_a_command(base: Path, image: Path, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_some(image, log, 3)
    argv = ["check", "--log", str(log), "--image", str(image), "--base", str(base)]
    assert guest.main(argv) == 0
    assert "3 fsynced writes checked" in capsys.readouterr().out
    patch(image, 3_000_000, b"x")
    assert guest.main(argv) == 1
    assert "first difference at byte 3000000" in capsys.readouterr().out


class BreakingDisk(FileDisk):
    """A file that fails the requests named in ``failures``, in this order; a flush after the bytes arrived."""

    failures: list[str]

    def _maybe(self, kind: str) -> None:
        if self.failures and self.failures[0] == kind:
            self.failures.pop(0)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def pread(self, length: int, offset: int) -> bytes:
        self._maybe("read")
        return super().pread(length, offset)

    def pwrite(self, data: bytes, offset: int) -> None:
        self._maybe("write")
        super().pwrite(data, offset)

    def flush(self) -> None:
        self._maybe("flush")
        super().flush()


def test_a_guest_opens_its_disk_again_and_repeats_what_failed(
    base: Path, image: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BreakingDisk, "failures", ["write", "flush", "write", "read"], raising=False)
    monkeypatch.setattr(guest, "open_disk", BreakingDisk)
    write_some(image, log, 40)
    history = read_logs([log])
    assert len(history.errors) == 4
    assert history.done == 40
    assert BreakingDisk.failures == []
    assert check([log], image, base).ok


def test_a_guest_gives_up_on_a_disk_that_goes_on_failing(
    image: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BreakingDisk, "failures", ["write"] * 1000, raising=False)
    monkeypatch.setattr(guest, "open_disk", BreakingDisk)
    lines = LogWriter(log)
    with pytest.raises(ImgStorageError, match="goes on failing"):
        Guest(lambda: str(image), lines, seed=1, length=RANGE, away_s=0.2).run()
    lines.close()
    assert 2 <= len(read_logs([log]).errors) < 20


@pytest.fixture
def writer(tmp_path: Path, image: Path, log: Path) -> Iterator[Writer]:
    with Writer(client_config=tmp_path / "none", container="compute-0-0", volume="vol1", log=log, length=RANGE,
                device=str(image), away_s=10) as one:  # fmt: skip
        yield one


def test_a_writer_process_ends_when_it_is_asked(base: Path, image: Path, log: Path, writer: Writer) -> None:
    writer.wait_writes(5)
    assert writer.alive
    summary = writer.stop()
    assert not writer.alive
    assert summary.ended
    assert summary.writes >= 5
    assert summary.errors == ()
    report = check([log], image, base)
    assert report.ok
    assert report.unacknowledged == 0


def test_a_writer_that_is_killed_and_goes_on_with_its_log(base: Path, image: Path, log: Path, writer: Writer) -> None:
    writer.wait_writes(20)
    os.kill(writer.pid, signal.SIGKILL)
    run.wait_gone(writer.pid, 5)
    with pytest.raises(ImgStorageError, match="ended by itself"):
        writer.stop()
    writer.start()
    writer.wait_writes(20)
    assert writer.stop().writes >= 40
    assert check([log], image, base).ok


def test_a_writer_without_a_device_says_so(tmp_path: Path, log: Path) -> None:
    there = str(tmp_path / "nothing")
    one = Writer(client_config=tmp_path, container="c", volume="vol1", log=log, device=there, away_s=0.2)
    with one, pytest.raises(ImgStorageError, match="there is no device"):
        one.wait_writes(1)


def opened(uri: str) -> NbdDevice:
    """A connection to a server that is just starting: its socket is there before it listens."""
    until = time.monotonic() + 10
    while True:
        try:
            return NbdDevice(uri)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def test_a_disk_over_nbd(tmp_path: Path, base: Path, image: Path, log: Path) -> None:
    socket = tmp_path / "s"
    file, server = f"driver=file,node-name=f,filename={image}", f"addr.type=unix,addr.path={socket}"
    export = "type=nbd,id=e,node-name=f,name=vol1,writable=on"
    argv = ["qemu-storage-daemon", "--blockdev", file, "--nbd-server", server, "--export", export]
    pid = run.spawn(argv, log_file=tmp_path / "qsd.log")
    uri = f"nbd+unix:///vol1?socket={socket}"
    try:
        disk = opened(uri)
        assert disk.size_bytes == SIZE
        assert disk.pread(5000, 100) == base.read_bytes()[100:5100]
        with pytest.raises(OSError) as refused:
            disk.pwrite(b"x" * BLOCK, SIZE)
        assert refused.value.errno in (errno.ENOSPC, errno.EINVAL)
        disk.close()
        with Writer(client_config=tmp_path, container="c", volume="vol1", log=log, length=RANGE, device=uri) as one:
            one.wait_writes(20)
            assert one.stop().errors == ()
        with pytest.raises(OSError) as missing:
            NbdDevice(f"nbd+unix:///other?socket={socket}")
        assert missing.value.errno == errno.ENOENT
        disk = NbdDevice(uri)
        os.kill(pid, signal.SIGKILL)
        run.wait_gone(pid, 5)
        with pytest.raises(OSError) as lost:
            disk.flush()
        assert lost.value.errno == errno.ENOTCONN
        disk.close()
    finally:
        if run.start_time(pid) is not None:
            os.kill(pid, signal.SIGKILL)
            run.wait_gone(pid, 5)
    report: Report = check([log], image, base)
    assert report.ok
    assert report.writes >= 20


@pytest.mark.parametrize("uri", ["nbd://host/vol1", "nbd+unix:///vol1", "/dev/x"])
def test_what_is_no_nbd_socket(uri: str) -> None:
    with pytest.raises(ValueError):
        parse_uri(uri)
