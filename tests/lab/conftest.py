"""For the tests in virtual machines: the fixture ``lab``, brought back to the same state for each test.

They are collected only by ``admin/lab run``, which sets IMGSTORAGE_LAB, and then none may be skipped. A test gets the
guests of its mark, ``@pytest.mark.hosts("nas-0-0", "compute-0-0", "compute-0-1")``, or a NAS and a container. Each has
a pool ``tank`` on its disk ``tank``; no daemon of the project runs, nor tgtd, nor iscsid. ``cluster`` is a whole
cluster on such guests: broker, frontend, and the daemons in the guests, all running.

Scenarios (tests that use ``cluster`` or have the mark ``scenario``) and parts of the contract suites: with
``--lab-seed`` those that are marked ``ci`` are run, and of the others one of each file and some more.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from imgstorage.tools.run import environment
from tests.lab.build import MARK
from tests.lab.cluster import Cluster
from tests.lab.lab import HOSTS, Lab

HERE = Path(__file__).parent
BASE, WITH_CLUSTER = "base", "cluster"
ROTATED = 3
"""How many scenarios are chosen for a run besides those that are marked, and one of each file that has none."""
collect_ignore_glob = [] if MARK in os.environ else ["test_*.py"]
_ran: dict[str, tuple[str, float]] = {}
"""What each test came to, and how long it took with all that was done for it, in seconds."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lab-seed", type=int, help="the lab: a choice of its scenarios, the same for the same seed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "hosts(*names): the guests that a test in the lab needs")
    config.addinivalue_line("markers", "container(**settings): what the containers of a scenario are configured with")
    config.addinivalue_line("markers", "scenario: a scenario of the lab that makes its guests itself")
    config.addinivalue_line("markers", "nas(**settings): what the NAS of a scenario is configured with")
    config.addinivalue_line("markers", "ci: a scenario of the lab that is run each time")
    if MARK in os.environ:
        config.pluginmanager.register(Progress(config))


class Progress:
    """A run takes hours: what a test came to, how long it took and why it failed is said when it ends."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """A hook of pytest: no dot for what has a line."""
        return ("passed" if report.when == "call" else "", "", "") if report.passed else None

    @pytest.hookimpl(trylast=True)  # when _ran knows of it
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A hook of pytest."""
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None:
            return
        if report.failed:
            parts = [f"--- {title}\n{text}" for title, text in report.sections]
            terminal.write_line("\n".join([f"\n{report.nodeid} failed:", report.longreprtext, *parts]))
        if report.when == "teardown":
            outcome, took_s = _ran[report.nodeid]
            terminal.write_line(f"{time.strftime('%H:%M:%S')}  {outcome:7} {took_s:5.0f} s  {report.nodeid}")


def _is_scenario(item: pytest.Item) -> bool:
    # A run of all tests calls the hooks here for every folder's, of which others have a ``cluster`` too.
    if not item.path.is_relative_to(HERE):
        return False
    marked = item.get_closest_marker("scenario") is not None
    return marked or not {"cluster", "contract"}.isdisjoint(getattr(item, "fixturenames", ()))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose scenarios: all workers the same."""
    if (seed := config.getoption("--lab-seed", None)) is None:
        return
    dice = random.Random(seed)
    others = [item for item in items if _is_scenario(item) and not item.get_closest_marker("ci")]
    always = {item.path for item in items if item.get_closest_marker("ci")}
    kinds: dict[Path, list[pytest.Item]] = {}
    for item in others:
        if item.path not in always and not item.get_closest_marker("scenario"):
            kinds.setdefault(item.path, []).append(item)
    chosen = [dice.choice(kind) for kind in kinds.values()]
    rest = [item for item in others if item not in chosen]
    chosen += dice.sample(rest, min(ROTATED, len(rest)))
    left_out = [item for item in others if item not in chosen]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and isinstance(lab := getattr(item, "funcargs", {}).get("lab"), Lab):
        for guest in lab:
            report.sections.append((f"guest {guest.name}", guest.fate()))
    if report.failed and isinstance(cluster := getattr(item, "funcargs", {}).get("cluster"), Cluster):
        report.sections.append(("the cluster", cluster.logs()))
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome, took_s = _ran.get(report.nodeid, ("passed", 0.0))
    _ran[report.nodeid] = (outcome if report.passed else report.outcome, took_s + report.duration)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Every test that ran in the lab, file by file, with what it came to and its seconds."""
    if not _ran or MARK not in os.environ or hasattr(config, "workerinput"):
        return
    terminalreporter.section("what ran in the lab")
    for file in dict.fromkeys(name.partition("::")[0] for name in _ran):
        tests = {name.partition("::")[2]: ran for name, ran in _ran.items() if name.startswith(f"{file}::")}
        terminalreporter.write_line(f"{file}  {sum(took_s for _, took_s in tests.values()):.0f} s")
        for test, (outcome, took_s) in tests.items():
            terminalreporter.write_line(f"  {outcome:7} {took_s:5.0f} s  {test}")


class Labs:
    """One lab for each set of hosts, booted once; only the one in use has guests that run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Guests outlive the test that needs them first: they carry the mark of this fixture (tests/conftest.py).
        self.environment = environment()
        self._labs: dict[tuple[str, ...], Lab] = {}

    def at(self, hosts: tuple[str, ...], state: str, prepare: Callable[[Lab], None]) -> Lab:
        """The lab with these hosts, in the state that ``prepare`` makes of its guests: the first time it does."""
        for names, other in self._labs.items():
            if names != hosts:
                for guest in other:
                    guest.kill()
        if hosts not in self._labs:
            lab = Lab(self._folder / str(len(self._labs)), hosts, environment=self.environment)
            lab.start()
            self._labs[hosts] = lab
            for guest in lab:
                guest.run(["zpool", "create", "-f", "tank", "/dev/disk/by-id/virtio-tank"])
            lab.save(BASE)
        lab = self._labs[hosts]
        if lab.has(state):
            lab.restore(state)
        else:
            lab.restore(BASE)
            prepare(lab)
            lab.save(state)
        return lab

    def stop(self) -> None:
        """End all labs."""
        for lab in self._labs.values():
            lab.stop()


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
    return _labs.at(mark.args if mark else HOSTS, BASE, lambda _: None)


@pytest.fixture(scope="package")
def _clusters() -> dict[tuple[str, ...], Cluster]:
    return {}


@pytest.fixture
def cluster(
    request: pytest.FixtureRequest, _labs: Labs, _clusters: dict[tuple[str, ...], Cluster]
) -> Iterator[Cluster]:
    """A cluster of which every daemon runs, and which has no volume yet."""
    mark = request.node.get_closest_marker("hosts")
    hosts = mark.args if mark else HOSTS

    def prepare(lab: Lab) -> None:
        _clusters[hosts] = Cluster(lab, lab.folder / "here", _labs.environment)
        _clusters[hosts].prepare()

    _labs.at(hosts, WITH_CLUSTER, prepare)
    found = _clusters[hosts]
    marks = {role: request.node.get_closest_marker(role) for role in ("nas", "container")}
    found.begin({role: mark.kwargs for role, mark in marks.items() if mark})
    yield found
    found.end()
