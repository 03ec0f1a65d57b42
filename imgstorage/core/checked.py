"""Dataclasses whose names and texts are checked whenever one is made or decoded, by the types of their fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

from imgstorage.core import names
from imgstorage.core.names import HostName, OpId, PoolName, VolumeName, VolumeUuid

Check = Callable[[Any], Any]
_CHECKED: dict[Any, Check] = {
    HostName: names.host_name,
    PoolName: names.pool_name,
    VolumeName: names.volume_name,
    VolumeUuid: names.volume_uuid,
    OpId: names.op_id,
}
_cache: dict[type, tuple[tuple[str, Check], ...]] = {}


class Checked:
    """Base of dataclasses with such fields. Making one raises ``bad_name`` for a value that is not valid."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for name, check in _checks(type(self)):
            value = getattr(self, name)
            if value is not None:
                valid = check(value)
                if valid != value:
                    object.__setattr__(self, name, valid)


def _checks(kind: type) -> tuple[tuple[str, Check], ...]:
    """The fields of a class that are checked, with what checks them."""
    if kind not in _cache:
        hints = get_type_hints(kind, include_extras=True)
        found = [(field.name, _check_of(hints[field.name])) for field in fields(kind)]
        _cache[kind] = tuple((name, check) for name, check in found if check is not None)
    return _cache[kind]


def _check_of(hint: Any) -> Check | None:
    if hint in _CHECKED:
        return _CHECKED[hint]
    if get_origin(hint) is Annotated:
        return cast(Check, get_args(hint)[1])
    checks = [check for option in get_args(hint) if (check := _check_of(option)) is not None]
    if not checks:
        return None
    (one,) = checks
    return (lambda values: tuple(map(one, values))) if get_origin(hint) is tuple else one
