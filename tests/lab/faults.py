"""Kills at one exact moment: before or after one call of a real tool.

A tool's place in the search path is taken by a few lines of shell that call the real one. At the call that is meant,
they kill the daemon (as ``kill -9``) or the whole machine (``sysrq b``: nothing is synced; QEMU ends, as after a power
cut), once.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from tests.lab.cluster import Cluster
from tests.lab.guest import Guest

PLACE = "/usr/local/sbin"
STRUCK = "/run/struck"
KILLS = {"daemon": "kill -9 $(cat /run/daemon.pid)", "power": "echo b >/proc/sysrq-trigger; sleep 60"}
SHELL = """\
#!/bin/sh
case " $* " in
    {pattern}) echo >>/run/strike.calls; if [ "$(wc -l </run/strike.calls)" -eq {nth} ]; then strike=1; fi ;;
esac
if [ "$strike" ] && [ {when} = before ]; then touch {struck}; {kill}; exit 1; fi
{real} "$@"
status=$?
if [ "$strike" ]; then touch {struck}; {kill}; fi
exit $status
"""


@dataclass(frozen=True)
class Strike:
    """At the ``nth`` call of ``tool`` with ``words`` in its arguments, ``when`` (before, after): kill ``what``."""

    tool: str
    words: str
    when: str = "after"
    what: str = "daemon"
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.what}-{self.when}-{self.tool}-{self.words}-{self.nth}".replace(" ", "-")

    def arm(self, guest: Guest) -> None:
        """From now on in this guest."""
        guest.run(["rm", "-f", STRUCK, "/run/strike.calls"])
        real = real_path(guest, self.tool)
        text = SHELL.format(
            pattern=f"*' '{shlex.quote(self.words)}' '*", nth=self.nth, when=self.when, struck=STRUCK,
            kill=KILLS[self.what], real=real,
        )  # fmt: skip
        guest.put(f"{PLACE}/{self.tool}", text.encode(), 0o755)

    def wait(self, guest: Guest, within_s: float = 180.0) -> None:
        """Wait until it struck. Raises ``timeout``."""
        if self.what == "daemon":
            guest.wait_python("import os; result = os.path.exists(path)", within_s, path=STRUCK)
        else:
            guest.wait_off(within_s)

    def disarm(self, guest: Guest) -> None:
        """The tool itself again."""
        guest.run(["rm", "-f", f"{PLACE}/{self.tool}"])


def real_path(guest: Guest, tool: str) -> str:
    """Where a tool really is."""
    return guest.run(["sh", "-c", f"PATH=/usr/sbin:/usr/bin:/sbin:/bin command -v {tool}"]).stdout.strip()


@contextmanager
def struck(cluster: Cluster, host: str, strike: Strike, within_s: float = 300.0) -> Iterator[None]:
    """The strike falls on this host some time within the block; whoever died is started again at once."""
    strike.arm(cluster[host])

    def revive() -> None:
        strike.wait(cluster[host], within_s)
        if strike.what == "daemon":
            strike.disarm(cluster[host])
            cluster.start(host)
        else:
            cluster[host].start()
            cluster[host].wait_ready()
            strike.disarm(cluster[host])
            cluster.start(host)

    with ThreadPoolExecutor(1) as other:
        revived = other.submit(revive)
        yield
        revived.result(within_s)


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
