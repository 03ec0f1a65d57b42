"""The contract suites of the data planes (tests/contract) with the kernel plane: pytest runs in a guest.

NAS and container are both in that guest, over loopback, each with a pool of its own. The tests of each file are taken
some at a time, in the order in which they stand there, so that new ones are run without being named anywhere. One that
fails in the guest, or is skipped there, fails the one here and is named with what pytest said.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import HostName
from imgstorage.planes.common import names
from imgstorage.tools.run import environment
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.machine import GIB, Machine

pytestmark = pytest.mark.timeout(3600)

SUITES = Path(__file__).parents[1] / "contract"
AT_ONCE = 4
"""How many test functions are one part."""
MACHINE = Machine("compute-0-0", memory_mib=1024, cpus=2, disks={"tank": 4 * GIB, "pond": 4 * GIB})
SETTINGS = {"IMGSTORAGE_TEST_PLANE": "kernel", "IMGSTORAGE_TEST_ZPOOL": "tank", "IMGSTORAGE_TEST_DEADLINE_S": "300"}
TEST_S, PART_S = 900, 3500
THERE = "/opt/imgstorage"
REPORT, OUTPUT = "/root/report.xml", "/root/output"
CLEAN = "clean"
WRONG = ("failure", "error", "skipped")


@dataclass(frozen=True)
class Outcome:
    """What became of one test in the guest; ``why`` is "" if it passed."""

    name: str
    seconds: float
    why: str


def parts() -> Iterator[object]:
    """Each part as a parameter: its file, and its tests."""
    for path in sorted(SUITES.glob("test_*.py")):
        if path.stem.startswith("test_userspace_"):
            continue
        tops = ast.parse(path.read_text()).body
        tests = [top.name for top in tops if isinstance(top, ast.FunctionDef) and top.name.startswith("test_")]
        for first in range(0, len(tests), AT_ONCE):
            name = f"{path.stem.removeprefix('test_')}-{first // AT_ONCE + 1}"
            yield pytest.param(path.name, tests[first : first + AT_ONCE], id=name)


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A guest with two empty pools and an iscsid."""
    with Lab(tmp_path_factory.mktemp("contract"), (MACHINE,), environment=environment()) as lab:
        for guest in lab:
            for pool in guest.machine.disks:
                guest.run(["zpool", "create", "-f", pool, f"/dev/disk/by-id/virtio-{pool}"])
            name = names.initiator_name(HostName(guest.name))  # over loopback the NAS knows containers by name
            guest.put("/etc/iscsi/initiatorname.iscsi", f"InitiatorName={name}\n".encode(), 0o600)
            guest.run(["iscsid"])
        lab.save(CLEAN)
        yield lab


def run(guest: Guest, file: str, tests: list[str]) -> list[Outcome]:
    """Run tests of a file in the guest; returns what became of them."""
    argv = ["python3", "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--timeout={TEST_S}", f"--junitxml={REPORT}"]
    argv += [f"tests/contract/{file}::{test}" for test in tests]
    into = ["sh", "-c", f'exec "$@" >{OUTPUT} 2>&1', "sh"]
    try:
        status = guest.run([*into, *argv], cwd=THERE, env=SETTINGS, timeout_s=PART_S, check=False).exit_status
    except ImgStorageError as error:
        pytest.fail(f"{error}\n{_output(guest)}", pytrace=False)
    if status not in (0, 1):
        pytest.fail(f"pytest ended with status {status}\n{_output(guest)}", pytrace=False)
    found = []
    for case in ElementTree.fromstring(guest.get(REPORT)).iter("testcase"):
        why = [f"{one.tag}: {one.get('message', '')}\n{one.text or ''}" for one in case if one.tag in WRONG]
        found.append(Outcome(case.get("name", ""), float(case.get("time", "0")), "\n".join(why)))
    return found


def _output(guest: Guest) -> str:
    return guest.run(["tail", "-n60", OUTPUT], check=False).stdout


@pytest.mark.parametrize(("file", "tests"), list(parts()))
def test_contract(contract: Lab, file: str, tests: list[str]) -> None:
    contract.restore(CLEAN)
    outcomes = run(contract[MACHINE.name], file, tests)
    print(f"{file}: {len(outcomes)} tests in {sum(one.seconds for one in outcomes):.0f} s")
    for one in sorted(outcomes, key=lambda one: -one.seconds):
        print(f"{one.seconds:7.1f} s  {one.name}")
    assert len({one.name.partition("[")[0] for one in outcomes}) == len(tests), "not all tests were run"
    if wrong := [one for one in outcomes if one.why]:
        listed = ", ".join(one.name for one in wrong)
        details = "\n\n".join(f"{one.name}: {one.why}" for one in wrong)
        pytest.fail(f"{len(wrong)} of {len(outcomes)} failed in {file}: {listed}\n\n{details}", pytrace=False)
