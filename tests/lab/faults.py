"""Faults at one exact moment: before or after one call of a real tool.

A tool's place in the search path is taken by a few lines of shell that call the real one. At the call that is meant,
once, they kill the daemon (as ``kill -9``), or they hold the call: what is to happen at that moment is done meanwhile,
a power cut or anything else, and then the call goes on, if there still is somebody who can.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from imgstorage.core.errors import ImgStorageError
from tests.lab.cluster import Cluster
from tests.lab.guest import Guest

PLACE = "/usr/local/sbin"
STRUCK = "/run/struck"
GO = "/run/strike.go"
HOLD = f"until [ -e {GO} ]; do sleep 0.05; done; rm {GO}"
EXISTS = "import os; result = os.path.exists(path)"
EACH = 0
POLL_S = 0.1
DEEDS = {"daemon": "kill -9 $(cat /run/daemon.pid)", "power": HOLD, "hold": HOLD}
SHELL = """\
#!/bin/sh
case " $* " in
    {pattern}) echo >>/run/strike.calls; case "$(wc -l </run/strike.calls)" in {nth}) strike=1 ;; esac ;;
esac
if [ "$strike" ] && [ {when} = before ]; then touch {struck}; {deed}; {otherwise}; strike=; fi
{real} "$@"
status=$?
if [ "$strike" ]; then touch {struck}; {deed}; fi
exit $status
"""


@dataclass(frozen=True)
class Strike:
    """At the ``nth`` call of ``tool`` with ``words`` in its arguments, ``when`` (before, after): ``what``.

    ``daemon`` is killed, or ``power`` is cut, or there is a ``hold`` until :meth:`release`. Between words ``|`` means
    any of them. ``nth`` may be EACH, for a ``hold``.
    """

    tool: str
    words: str
    when: str = "after"
    what: str = "daemon"
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.what}-{self.when}-{self.tool}-{self.words}-{self.nth}".replace(" ", "-")

    def arm(self, guest: Guest) -> None:
        """From now on in this guest."""
        guest.run(["rm", "-f", STRUCK, GO, "/run/strike.calls"])
        real = real_path(guest, self.tool)
        text = SHELL.format(
            pattern="|".join(f"*' '{shlex.quote(words)}' '*" for words in self.words.split("|")),
            nth=self.nth or "*", when=self.when, struck=STRUCK,
            deed=DEEDS[self.what], otherwise="exit 1" if self.what == "daemon" else ":", real=real,
        )  # fmt: skip
        guest.put(f"{PLACE}/{self.tool}", text.encode(), 0o755)

    def fell(self, guest: Guest) -> bool:
        """Whether it struck."""
        return bool(guest.python(EXISTS, path=STRUCK))

    def wait(self, guest: Guest, within_s: float = 360.0) -> None:
        """Wait until it struck, and cut the power if that is what it is. Raises ``timeout``."""
        guest.wait_python(EXISTS, within_s, path=STRUCK)
        if self.what == "power":
            guest.kill()

    def release(self, guest: Guest) -> None:
        """Let a call that is held go on; wait until it does."""
        guest.run(["rm", "-f", STRUCK])
        guest.put(GO, b"")
        guest.wait_python(f"{EXISTS}\nresult = not result", path=GO)

    def revive(self, cluster: Cluster, host: str) -> None:
        """Start again what died; the tool is itself again."""
        if self.what == "power":
            cluster[host].start()
            cluster[host].wait_ready()
        self.disarm(cluster[host])
        cluster.start(host)

    def disarm(self, guest: Guest) -> None:
        """The tool itself again."""
        guest.run(["rm", "-f", f"{PLACE}/{self.tool}"])


def real_path(guest: Guest, tool: str) -> str:
    """Where a tool really is."""
    return guest.run(["sh", "-c", f"PATH=/usr/sbin:/usr/bin:/sbin:/bin command -v {tool}"]).stdout.strip()


@contextmanager
def struck(
    cluster: Cluster, host: str, strike: Strike, meanwhile: Callable[[], None] = lambda: None, within_s: float = 600.0
) -> Iterator[None]:
    """The strike falls on this host some time within the block; whoever died is started again at once.

    ``meanwhile`` is done while a call is held: of EACH call, until the block is left.
    """
    guest = cluster[host]
    strike.arm(guest)
    left, failed = threading.Event(), threading.Event()

    def fall() -> None:
        if strike.what != "hold":
            strike.wait(guest)
            strike.revive(cluster, host)
            return
        if strike.nth != EACH:
            strike.disarm(guest)
        meanwhile()
        strike.release(guest)

    def attend() -> None:
        try:
            watch()
        except BaseException:
            with suppress(ImgStorageError):  # who is held goes on: what failed is said at the end of the block
                strike.disarm(guest)
                guest.put(GO, b"")
            raise

    def watch() -> None:
        end = time.monotonic() + within_s
        while not failed.is_set() and not (strike.nth == EACH and left.is_set()):
            if strike.fell(guest):
                fall()
                if strike.nth != EACH:
                    return
            elif time.monotonic() > end:
                raise ImgStorageError("timeout", f"no {strike} in {within_s:g} s", host=host)
            time.sleep(POLL_S)
        strike.disarm(guest)

    with ThreadPoolExecutor(1) as other:
        attending = other.submit(attend)
        try:
            yield
        except BaseException as error:
            failed.set()
            if other_error := attending.exception(within_s):
                error.add_note(f"{strike} failed before: {other_error!r}")
            raise
        left.set()
        attending.result(within_s)


class Trace:
    """Writes down each call of a tool in a guest."""

    def __init__(self, guest: Guest, tool: str) -> None:
        self._guest = guest
        self._log = f"/root/{tool}.calls"
        real = real_path(guest, tool)
        guest.put(f"{PLACE}/{tool}", f'#!/bin/sh\necho "$*" >>{self._log}\nexec {real} "$@"\n'.encode(), 0o755)

    def calls(self) -> list[list[str]]:
        """The arguments of each call."""
        return [line.split() for line in self._guest.get(self._log).decode().splitlines()]
