"""Names and sizes: what is taken, what is refused, and that nothing dangerous gets through."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgstorage.core import names
from imgstorage.core.errors import ImgStorageError

CHECKS: dict[str, Callable[[str], str]] = {
    "host": names.host_name, "pool": names.pool_name, "volume": names.volume_name, "uuid": names.volume_uuid,
    "op": names.op_id,
}  # fmt: skip
GOOD = {
    "host": ["compute-0-0", "a", "nas.example.org", "0x", "a" * 63],
    "pool": ["tank", "tank/vms", "a/b/c", "T-1_x.y:z"],
    "volume": ["vol1", "vm-hpcdev-pub03-vol", "a.b", "0", "x" * 128, "disk:0", "snap", "delta"],
    "uuid": ["00000000-0000-4000-8000-000000000001"],
    "op": ["op-abcdefghijklm", "op-2345672345672"],
}
NEVER = [
    "", " ", "a b", " a", "a ", "/", "a/", "/a", "a//b", ".", "..", "../a", "a/..", "a/../b", "-a", "--force", "-",
    "a'b", 'a"b', "a`b", "a$b", "a;b", "a|b", "a&b", "a\\b", "a\nb", "a\n", "a\tb", "a\0b", "a@b", "a#b", "a,b", "a%b",
    "ä", "аdmin", "\u202ea", "😀", "a" * 300, "a*", "a?", "~", "~root", "$(reboot)", "a=b", "{a}", "a\r",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in GOOD.items() for text in texts])
def test_good_names_stay_as_they_are(kind: str, text: str) -> None:
    assert CHECKS[kind](text) == text


@pytest.mark.parametrize("kind", CHECKS)
def test_bad_names_are_refused_and_shown_short(kind: str) -> None:
    for text in NEVER:
        if kind == "pool" and text == "a/b":
            continue
        with pytest.raises(ImgStorageError) as caught:
            CHECKS[kind](text)
        assert caught.value.code == "bad_name", text
        assert len(caught.value.message) < 200
        assert "\n" not in caught.value.message
        assert "\0" not in caught.value.message


@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.parametrize("thing", [None, 1, b"bytes", ["a"], 1.5])
def test_what_is_no_text_is_no_name(kind: str, thing: object) -> None:
    with pytest.raises(ImgStorageError) as caught:
        CHECKS[kind](thing)  # type: ignore[arg-type]
    assert caught.value.code == "bad_name"


@pytest.mark.parametrize("suffix", names.RESERVED_SUFFIXES)
def test_our_own_suffixes_are_reserved(suffix: str) -> None:
    with pytest.raises(ImgStorageError):
        names.volume_name(f"vol1{suffix}")
    assert names.volume_name(f"vol1{suffix}x")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("host", "UPPER"), ("host", "a_b"), ("host", "a-"), ("host", ".a"), ("host", "a..b"), ("host", "a" * 64),
        ("host", "a." * 33 + "a"), ("volume", "a/b"), ("volume", "x" * 129), ("volume", "a..b"), ("pool", "a/-b"),
        ("pool", "a" * 129), ("uuid", "00000000-0000-4000-8000-00000000000G"), ("uuid", "0" * 36),
        ("op", "op-ABCDEFGHIJKLM"),
        ("op", "op-abcdefghijkl1"), ("op", "op-abc"), ("op", "abcdefghijklm"),
    ],
)  # fmt: skip
def test_what_only_one_kind_refuses(kind: str, text: str) -> None:
    with pytest.raises(ImgStorageError):
        CHECKS[kind](text)


@given(st.text(max_size=200))
def test_a_name_that_passes_is_plain(text: str) -> None:
    for check in (names.volume_name, names.pool_name, names.host_name):
        try:
            good = check(text)
        except ImgStorageError:
            continue
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:/-]*", good)
        assert ".." not in good
        assert len(good) <= 128


def test_operation_ids_differ() -> None:
    made = {names.new_op_id() for _ in range(1000)}
    assert len(made) == 1000
    assert {names.op_id(op) for op in made} == made


# -- sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1 << 30), ("10", 10 << 30), ("1M", 1 << 20), ("1m", 1 << 20), ("1024K", 1 << 20), ("2G", 2 << 30),
        ("2Gi", 2 << 30), ("512mi", 512 << 20),
        ("2GB", 2 << 30), ("2GiB", 2 << 30), ("1T", 1 << 40), (" 5 ", 5 << 30), ("1048576T", 1 << 60),
        ("0001", 1 << 30),
    ],
)  # fmt: skip
def test_sizes_that_are_taken(text: str, size: int) -> None:
    assert names.parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "0", "-1", "-5G", "1.5", "1,5", "1e3", "", " ", "G", "10X", "10 G", "ten", "0x10", "1_000", "+1", "٣", "１",
        "∞",
        "nan", "1023K", "1048577T", "9" * 19, "9" * 300, "1GG", "1G1", "1\n2", "1\0", None, 10, 1.5,
    ],
)  # fmt: skip
def test_sizes_that_are_refused(text: object) -> None:
    with pytest.raises(ImgStorageError) as caught:
        names.parse_size(text)  # type: ignore[arg-type]
    assert caught.value.code == "bad_size"
    assert len(caught.value.message) < 120


@pytest.mark.parametrize("size", [0, -1, 1, (1 << 20) - 512, (1 << 20) + 1, (1 << 60) + 512])
def test_sizes_in_bytes_that_are_refused(size: int) -> None:
    with pytest.raises(ImgStorageError) as caught:
        names.check_size(size)
    assert caught.value.code == "bad_size"


@given(st.integers(1 << 20, 1 << 60))
def test_a_size_is_shown_as_what_it_is(size: int) -> None:
    shown = names.format_size(size)
    number, unit = shown.split()
    factor = {"MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}[unit]
    assert abs(float(number) * factor - size) <= factor * 0.06
