"""What every verb of a plane has in common: whatever the system refuses comes out as an error that a user can read."""

from __future__ import annotations

import errno
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from imgstorage.core.errors import ImgStorageError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
Plane = TypeVar("Plane")


def typed_errors(plane: type[Plane]) -> type[Plane]:
    """A class decorator: its public methods raise an OSError as ``no_space``, or as ``failed``."""
    for name, verb in list(vars(plane).items()):
        if inspect.isfunction(verb) and not name.startswith("_"):
            setattr(plane, name, _typed(verb))
    return plane


def _typed(verb: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(verb)
    def guarded(*values: Any, **named: Any) -> Any:
        try:
            return verb(*values, **named)
        except OSError as error:
            raise of_system(error) from error

    return guarded


def of_system(error: OSError) -> ImgStorageError:
    """What the system refused, on which file."""
    where = f"{error.filename}: " if error.filename else ""
    code = "no_space" if error.errno in NO_ROOM else "failed"
    return ImgStorageError(code, f"{where}{error.strerror or error}")
