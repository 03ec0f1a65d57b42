"""The contract suites of the data planes (tests/contract) with the kernel plane: pytest runs in a guest.

NAS and container are both in that guest, over loopback, each with a pool of its own. Every file of the suites is at
least one test here, so a new one is run without being named; one that takes long is split. A test that fails there, or
is skipped, fails the one here by its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from imgstorage.tools.run import environment
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.machine import GIB, Machine

SUITES = Path(__file__).parents[1] / "contract"
THERE = "/opt/imgstorage"
REPORT = "/root/report.xml"
CLEAN = "clean"
MACHINE = Machine("nas-0-0", memory_mib=1024, cpus=2, disks={"tank": 4 * GIB, "pond": 4 * GIB})
SETTINGS = {"IMGSTORAGE_TEST_PLANE": "kernel", "IMGSTORAGE_TEST_ZPOOL": "tank", "IMGSTORAGE_TEST_DEADLINE_S": "180"}
TEST_S, PART_S = 420, 890

SPLIT: dict[str, dict[str, str]] = {"test_pulls": {"kills": "killed_at_any_moment"}}
"""Files that take long: parts of their own by name, as pytest's ``-k``; the rest of the file is another."""
EACH_TIME = ("unknown_is_not_lost",)
"""Parts that are run each time; the others take turns."""


@dataclass(frozen=True)
class Outcome:
    """What became of one test in the guest; ``why`` is "" if it passed."""

    name: str
    seconds: float
    why: str


def parts() -> Iterator[object]:
    """Each file, or part of one, as a parameter: its name, and pytest's ``-k``."""
    for path in sorted(SUITES.glob("test_*.py")):
        if path.stem.startswith("test_userspace_"):
            continue
        own = SPLIT.get(path.stem, {})
        name = path.stem.removeprefix("test_")
        found = {f"{name}-{part}": words for part, words in own.items()}
        found[name] = " and ".join(f"not ({words})" for words in own.values())
        for part, words in found.items():
            yield pytest.param(path.name, words, id=part, marks=[pytest.mark.ci] if part in EACH_TIME else [])


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A guest with two empty pools and an iscsid."""
    with Lab(tmp_path_factory.mktemp("contract"), (MACHINE,), environment=environment()) as lab:
        for guest in lab:
            for pool in guest.machine.disks:
                guest.run(["zpool", "create", "-f", pool, f"/dev/disk/by-id/virtio-{pool}"])
            guest.run(["iscsid"])
        lab.save(CLEAN)
        yield lab


def run(guest: Guest, file: str, words: str) -> list[Outcome]:
    """Run a part in the guest; returns what became of its tests."""
    argv = ["python3", "-m", "pytest", "-p", "no:cacheprovider", "-k", words, f"--timeout={TEST_S}"]
    argv += [f"--junitxml={REPORT}", f"tests/contract/{file}"]
    ended = guest.run(argv, cwd=THERE, env=SETTINGS, timeout_s=PART_S, check=False)
    assert ended.exit_status in (0, 1), ended.stdout + ended.stderr
    found = []
    for case in ElementTree.fromstring(guest.get(REPORT)).iter("testcase"):
        why = [f"{one.tag}: {one.get('message', '')}\n{one.text or ''}" for one in case if one.tag in WRONG]
        found.append(Outcome(case.get("name", ""), float(case.get("time", "0")), "\n".join(why)))
    return found


WRONG = ("failure", "error", "skipped")


@pytest.mark.parametrize(("file", "words"), list(parts()))
def test_contract(contract: Lab, file: str, words: str) -> None:
    contract.restore(CLEAN)
    guest = contract[MACHINE.name]
    outcomes = run(guest, file, words)
    print(f"{len(outcomes)} tests in {sum(one.seconds for one in outcomes):.0f} s:")
    for one in sorted(outcomes, key=lambda one: -one.seconds):
        print(f"{one.seconds:7.1f} s  {one.name}")
    wrong = [one for one in outcomes if one.why]
    assert outcomes, "nothing was run"
    if wrong:
        names = ", ".join(one.name for one in wrong)
        details = "\n\n".join(f"{one.name}: {one.why}" for one in wrong)
        pytest.fail(f"{len(wrong)} of {len(outcomes)} failed in {file}: {names}\n\n{details}", pytrace=False)
