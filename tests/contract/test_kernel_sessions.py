"""A session that the kernel's initiator would never bring back: its portal answers, and iscsid tries for ever.

The state is provoked as in real life: the peer ends the connection just after iscsid has bound it to its session.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgstorage.planes.kernel import session
from imgstorage.tools import iscsid
from tests.contract.container_fixtures import World, wait_for
from tests.contract.kernel_bench import KernelBreaker
from tests.leftovers import MARK

pytest_plugins = ("tests.contract.container_fixtures",)
pytestmark = pytest.mark.real

ALONE_S = 20.0
"""Far longer than iscsid takes for a session that it can bring back (two seconds between its tries)."""
TRIES_S = 240.0
QUIET_S = 30.0
SURE = 3


@pytest.fixture
def host_iscsid() -> Iterator[None]:
    """The test has iscsid started anew; when all else is over, the host gets one that is no test's."""
    yield
    iscsid.end()
    plain = {name: value for name, value in os.environ.items() if name != MARK}
    quiet = subprocess.DEVNULL
    subprocess.run(["iscsid"], env=plain, stdin=quiet, stdout=quiet, stderr=quiet, check=True, timeout=QUIET_S)


def bound_ports() -> set[str]:
    """Which local ports the connections of sessions are bound to, as the kernel sees it."""
    found = set()
    for path in Path("/sys/class/iscsi_connection").glob("*/local_port"):
        try:
            found.add(path.read_text().strip())
        except OSError:  # it is bound to none
            continue
    return found


def refuse_until_stuck(portal: socket.socket) -> None:
    """Serve a portal: end each connection once it is bound, until iscsid itself ends them before it asks anything."""
    portal.settimeout(QUIET_S)
    until, refused = time.monotonic() + TRIES_S, 0
    while time.monotonic() < until:
        line, (_, port) = portal.accept()
        with line:
            refused = refused + 1 if ended(line, port) else 0
        if refused == SURE:
            return
    pytest.fail("iscsid does not get stuck")


def ended(line: socket.socket, port: int) -> bool:
    """Wait until a connection from ``port`` is bound (or it is too late: a login was asked for); true if its peer ended
    it before."""
    while str(port) not in bound_ports():
        if select.select([line], [], [], 0)[0]:
            try:
                return not line.recv(1)
            except ConnectionResetError:
                return True
    return False


@pytest.mark.usefixtures("host_iscsid")
def test_a_session_that_iscsid_never_brings_back_gets_a_new_iscsid(world: World, breaker: KernelBreaker) -> None:
    world.attach()
    portal = world.grant.portal
    assert portal is not None
    world.nas.stop()
    wait_for(lambda: not session.up(breaker.settings, portal), "the session is lost")
    with socket.create_server((portal.address, portal.port)) as listening:
        refuse_until_stuck(listening)
    world.nas.start()
    world.export()
    world.nas.open()
    time.sleep(ALONE_S)  # what is tested: nobody does anything
    assert not session.up(breaker.settings, portal)
    old, said = iscsid.pids(), list[str]()
    assert old
    wait_for(lambda: said.extend(world.container.tend()) or session.up(breaker.settings, portal), "the session is back")
    assert [one for one in said if "iscsid was started anew" in one]
    assert len(iscsid.pids()) == 1
    assert not {*old} & {*iscsid.pids()}
    world.assert_device()
    assert not [one for one in world.container.tend() if "iscsid" in one]
