"""What a daemon's logic takes from outside, in one bundle."""

from __future__ import annotations

from dataclasses import dataclass

from imgstorage.core.names import HostName
from imgstorage.core.ports import Clock, Random, Tasks
from imgstorage.core.post import Post


@dataclass(frozen=True)
class World:
    """Who this daemon is, and its post, clock, randomness and tasks."""

    host: HostName
    post: Post
    clock: Clock
    random: Random
    tasks: Tasks
