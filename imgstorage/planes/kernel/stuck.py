"""Sessions that stay down although their NAS's portal answers: iscsid is started anew (tools/iscsid.py says why).

It costs the other sessions of the host one more login, which their guests see as a short wait. So it is done only for a
session that was given time to come back by itself, and less and less often for one that it does not bring back: its
target may be missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.ports import Portal
from imgstorage.planes.kernel.container_settings import ContainerSettings
from imgstorage.tools.portal import answering

PATIENCE_S = 60.0
"""How long a session may be down while its portal answers; twice that after each new iscsid that did not help."""
LONGEST_PATIENCE_S = 3600.0
ANSWER_S = 1.0
"""Within what time a portal has to take a connection."""


@dataclass
class _Wait:
    since: float
    patience_s: float = PATIENCE_S


class Stuck:
    """What is known of the sessions that are down; one for a container."""

    def __init__(self, settings: ContainerSettings) -> None:
        self._settings = settings
        self._waits: dict[str, _Wait] = {}

    def tend(self, portals: Iterable[Portal]) -> str:
        """One round for the sessions to these targets; one sentence if iscsid was started anew, or could not be."""
        wanted = {portal.iqn: portal for portal in portals}
        if not wanted:
            self._waits.clear()
            return ""
        try:
            sessions = self._settings.sysfs.sessions()
        except ImgStorageError as error:
            return f"the iSCSI sessions cannot be looked at: {error}"
        down = {one.iqn: wanted[one.iqn] for one in sessions if one.iqn in wanted and not one.up}
        self._waits = {iqn: wait for iqn, wait in self._waits.items() if iqn in down}
        if not down:
            return ""
        open_ = answering([(one.address, one.port) for one in down.values()], ANSWER_S)
        now = time.monotonic()
        for iqn, portal in down.items():
            wait = self._waits.setdefault(iqn, _Wait(now))
            if (portal.address, portal.port) not in open_:
                wait.since = now
        due = [iqn for iqn in down if now - self._waits[iqn].since >= self._waits[iqn].patience_s]
        return self._restart(due) if due else ""

    def _restart(self, due: list[str]) -> str:
        waited_s = max(self._waits[iqn].patience_s for iqn in due)
        why = f"the iSCSI session to {due[0]} was down for {waited_s:g} s although its portal answers"
        try:
            self._settings.initiator.restart_daemon()
        except ImgStorageError as error:
            if error.code == "busy":  # somebody logs in just now
                return ""
            why = f"{why}, and iscsid cannot be started anew: {error}"
        else:
            why = f"{why}: iscsid was started anew"
        now = time.monotonic()
        for iqn in due:
            self._waits[iqn].patience_s = min(2 * self._waits[iqn].patience_s, LONGEST_PATIENCE_S)
        for wait in self._waits.values():
            wait.since = now
        return why
