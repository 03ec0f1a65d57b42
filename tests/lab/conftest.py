"""For the tests in virtual machines: the fixture ``lab``, brought back to the same state for each test.

They are collected only by ``admin/lab run``, which sets IMGSTORAGE_LAB, and then none may be skipped. A test gets the
guests of its mark, ``@pytest.mark.hosts("nas-0-0", "compute-0-0", "compute-0-1")``, or a NAS and a container. Each has
a pool ``tank`` on its disk ``tank``; no daemon of the project runs, nor tgtd, nor iscsid.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from imgstorage.tools.run import environment
from tests.lab.build import MARK
from tests.lab.guest import Guest
from tests.lab.lab import HOSTS, Lab

BASE = "base"
collect_ignore_glob = [] if MARK in os.environ else ["test_*.py"]
_skipped: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "hosts(*names): the guests that a test in the lab needs")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and isinstance(lab := getattr(item, "funcargs", {}).get("lab"), Lab):
        for guest in lab:
            report.sections.append((f"guest {guest.name}", guest.fate()))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped and not hasattr(session.config, "workerinput"):
        print(f"\nskipped, which the lab counts as failed: {', '.join(_skipped)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


class Labs:
    """One lab for each set of hosts, booted once; only the one in use has guests that run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Guests outlive the test that needs them first: they carry the mark of this fixture (tests/conftest.py).
        self._environment = environment()
        self._labs: dict[tuple[str, ...], Lab] = {}

    def at_base(self, hosts: tuple[str, ...]) -> Lab:
        """The lab with these hosts, in the state in which every test begins."""
        for names, other in self._labs.items():
            if names != hosts:
                for guest in other:
                    guest.kill()
        if hosts in self._labs:
            self._labs[hosts].restore(BASE)
            return self._labs[hosts]
        lab = Lab(self._folder / str(len(self._labs)), hosts, environment=self._environment)
        lab.start()
        self._labs[hosts] = lab
        for guest in lab:
            prepare(guest)
        lab.save(BASE)
        return lab

    def stop(self) -> None:
        """End all labs."""
        for lab in self._labs.values():
            lab.stop()


def prepare(guest: Guest) -> None:
    """What every test finds on a guest."""
    guest.run(["zpool", "create", "-f", "tank", "/dev/disk/by-id/virtio-tank"])


# Not "session": hooks of tests/conftest.py, which marks processes, do not see fixtures of the session.
@pytest.fixture(scope="package")
def _labs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Labs]:
    labs = Labs(tmp_path_factory.mktemp("lab"))
    yield labs
    labs.stop()


@pytest.fixture
def lab(request: pytest.FixtureRequest, _labs: Labs) -> Lab:
    """Guests in the state ``base``; what a test does to them is gone with the next one."""
    mark = request.node.get_closest_marker("hosts")
    return _labs.at_base(mark.args if mark else HOSTS)
