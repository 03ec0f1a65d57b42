"""The kernel's iSCSI initiator alone: how often it tries a command again that is lost with its session.

A proxy before tgtd ends the connection whenever one certain read passes. By default the kernel lets the read fail
after five tries more, and one failed read makes a snapshot invalid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from imgstorage.tools import iscsiadm
from imgstorage.tools.iscsi_record import Node, Settings
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.recordings.iscsi import IQN, SECRET, SERIAL
from tests.recordings.record_iscsi import offer, start_iscsid, start_tgtd, write_record

LOSSES = 9
PROXY_PORT = 3261
READ_10, SECTOR, AT_SECTOR = 0x28, 512, 65536
NUMBER = 2
SIZE_BYTES = 64 << 20
PROXY = """
import socket, struct, sys, threading
port, operation, sector, left = map(int, sys.argv[1:])

def exactly(line, count):
    data = b""
    while len(data) < count:
        more = line.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data

def end(*lines):
    for line in lines:
        try:
            line.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

def up(client, server):  # RFC 7143, 11.2.1: the basic header segment; 11.3: a SCSI command, its CDB at byte 32
    global left
    try:
        while True:
            header = exactly(client, 48)
            length = int.from_bytes(header[5:8], "big")
            rest = exactly(client, header[4] * 4 + length + -length % 4)
            command = header[0] & 0x3F == 1 and header[32] == operation
            if command and struct.unpack(">I", header[34:38])[0] == sector and left > 0:
                left -= 1
                print(left, flush=True)
                break
            server.sendall(header + rest)
    except (EOFError, OSError):
        pass
    end(client, server)

def down(server, client):
    try:
        while data := server.recv(65536):
            client.sendall(data)
    except OSError:
        pass
    end(client, server)

listening = socket.create_server(("0.0.0.0", port))
while True:
    client, _ = listening.accept()
    server = socket.create_connection(("127.0.0.1", 3260))
    threading.Thread(target=up, args=(client, server), daemon=True).start()
    threading.Thread(target=down, args=(server, client), daemon=True).start()
"""
FIND = """
from imgstorage.tools.iscsi_sysfs import Sysfs
sysfs = Sysfs()
disk = sysfs.wait_disk(iqn, 1, serial=serial, size_bytes=size, timeout_s=30)
if for_ever:
    sysfs.never_give_up(disk)
result = disk.name
"""


@contextmanager
def through_proxy(nas: Guest, host: Guest, losses: int, *, for_ever: bool) -> Iterator[str]:
    """The disk of a session through a proxy that loses so many reads."""
    nas.put("/root/proxy.py", PROXY.encode())
    words = [str(word) for word in (PROXY_PORT, READ_10, AT_SECTOR, losses)]
    proxy = nas.spawn(["python3", "/root/proxy.py", *words], log="/root/proxy.log")
    nas.wait_for(["sh", "-c", f"ss -Hltn sport = :{PROXY_PORT} | grep -q ."])
    node = Node(iqn=IQN % NUMBER, address=nas.run(["hostname", "-I"]).stdout.split()[0], port=PROXY_PORT)
    write_record(host, node, Settings(user=f"u.g{NUMBER}", secret=SECRET))
    host.run(iscsiadm.login_argv(node))
    name = host.python(FIND, iqn=node.iqn, serial=SERIAL % NUMBER, size=SIZE_BYTES, for_ever=for_ever)
    yield f"/dev/{name}"
    host.run(iscsiadm.logout_argv(node))
    nas.run(["kill", str(proxy)])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("for_ever", [False, True], ids=["by-default", "as-we-set-it"])
def test_a_read_that_is_lost_with_its_session_nine_times(lab: Lab, for_ever: bool) -> None:
    nas, host = lab["nas-0-0"], lab["compute-0-0"]
    start_tgtd(nas)
    offer(nas, NUMBER, readonly=False)
    start_iscsid(host)
    with through_proxy(nas, host, LOSSES, for_ever=for_ever) as disk:
        read = ["dd", f"if={disk}", "of=/dev/null", "bs=4k", "count=1", f"skip={AT_SECTOR * SECTOR // 4096}",
                "iflag=direct"]  # fmt: skip
        result = host.run(read, check=False, timeout_s=300)
        left = int(nas.run(["tail", "-n1", "/root/proxy.log"]).stdout)
    assert (result.exit_status == 0) is for_ever, result.stderr
    assert (left == 0) is for_ever
