"""Whose command a ``rocks …`` is, where a real Rocks is installed.

There, a command that is not ours goes to it unchanged, and so does one that both have: only full words of ours, or a
question about one of our commands, are ours.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from imgstorage.cli.verbs import ROCKS_OWN, VERBS

INSTALLED = "/opt/rocks/bin/rocks"
OURS = b"imgstorage.cli"


def ours(argv: Sequence[str]) -> bool:
    """Whether a command line is one of our commands, each word written out."""
    if any(word.partition("=")[0] in ("-C", "--config") for word in argv):
        return True  # an option that only we have
    words = [word for word in argv if not word.startswith("-")]
    return any(tuple(words[: len(verb.words)]) == verb.words for verb in VERBS if verb.words not in ROCKS_OWN)


def real_rocks(myself: str) -> str | None:
    """Another ``rocks``, later on PATH than the file ``myself`` or where Rocks installs it; None if there is none."""
    folders = [folder for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    places = [Path(folder, "rocks") for folder in folders]
    own = [number for number, place in enumerate(places) if _same(place, myself)]
    for place in (*places[own[0] + 1 if own else 0 :], Path(INSTALLED)):
        if os.path.isfile(place) and os.access(place, os.X_OK) and not _same(place, myself) and not _is_ours(place):
            return str(place)
    return None


def _same(place: Path, myself: str) -> bool:
    try:
        return os.path.samefile(place, myself)
    except OSError:
        return False


def _is_ours(place: Path) -> bool:
    """Another installation of this program would hand the command on to the next, and that one back."""
    try:
        with place.open("rb") as file:
            return OURS in file.read(4096)
    except OSError:
        return False
