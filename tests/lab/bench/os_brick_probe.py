"""os-brick's attach and detach of one iSCSI disk, in a guest: ``python3 -m tests.lab.bench.os_brick_probe RUNS NAS``.

Needs os-brick in PYTHONPATH and the target of by_hand.py. Runs as root within this process, without os-brick's helper
process (which would take longer). Prints JSON: its version, and milliseconds of each connect and disconnect.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time

from tests.lab.bench import by_hand

LOCKS = "/run/os-brick"


def main(runs: int, nas: str) -> None:
    """Measure; the first attach, which loads modules, is not counted."""
    import os_brick
    from os_brick import privileged
    from os_brick.initiator.connectors.iscsi import ISCSIConnector
    from oslo_concurrency import lockutils
    from oslo_config import cfg

    cfg.CONF([], project="bench")
    lockutils.set_defaults(LOCKS)
    os_brick.setup(cfg.CONF)
    privileged.default.set_client_mode(False)
    connector = ISCSIConnector(root_helper="", use_multipath=False)
    volume = {
        "target_discovered": False,
        "target_portal": f"{nas}:{by_hand.PORT}",
        "target_iqn": by_hand.IQN,
        "target_lun": by_hand.LUN,
        "auth_method": "CHAP",
        "auth_username": by_hand.USER,
        "auth_password": by_hand.SECRET,
        "access_mode": "rw",
    }
    times = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        device = connector.connect_volume(volume)
        between = time.perf_counter()
        connector.disconnect_volume(volume, device)
        times.append((1000 * (between - began), 1000 * (time.perf_counter() - between)))
    version = importlib.metadata.version("os-brick")
    print(
        json.dumps(
            {"version": version, "connect": [one for one, _ in times[1:]], "disconnect": [two for _, two in times[1:]]}
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
