"""For all tests: who started which process, and a test that leaves one running fails.

The mark (tests/leftovers.py) carries the id of the test that runs, or the name of the fixture while one of a wider
scope than a function is set up: what such a fixture starts may outlive the test, what a test starts may not.
Under admin/test the run has a name already; a bare pytest gets one here, and ends what it left by itself.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import hypothesis
import pytest

from tests import leftovers

hypothesis.settings.register_profile("any-machine", deadline=None)  # how long an example takes says nothing of the code
hypothesis.settings.load_profile("any-machine")

LABEL_MAX = 160


def _run_id() -> str:
    return os.environ[leftovers.MARK].partition(" ")[0]


def _label(text: str) -> None:
    # An environment variable holds any byte but NUL; one line is what reports want.
    os.environ[leftovers.MARK] = f"{_run_id()} {' '.join(text.replace(chr(0), '').split())[:LABEL_MAX]}".rstrip()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a test that is skipped has failed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.config.getoption("--no-skips") and report.skipped and not hasattr(report, "wasxfail"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"skipped, which is not allowed here: {why}"
    return report


def pytest_configure(config: pytest.Config) -> None:
    if not os.environ.get(leftovers.MARK):
        os.environ[leftovers.MARK] = leftovers.run_name(os.getpid())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    _label(item.nodeid)
    try:
        return (yield)
    finally:
        _label("")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    before = os.environ[leftovers.MARK]
    if fixturedef.scope != "function":
        _label(f"the {fixturedef.scope} fixture {fixturedef.argname}")
    try:
        return (yield)
    finally:
        os.environ[leftovers.MARK] = before


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    """Set up before and torn down after every other fixture of one test."""
    yield
    mark = os.environ[leftovers.MARK]
    left = leftovers.still_there(lambda process: f"{process.run} {process.label}" == mark)
    if left:
        leftovers.end_processes(left)
        pytest.fail("left running: " + "; ".join(map(str, left)), pytrace=False)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A bare pytest: what wider fixtures left is ended and said (under admin/test, by leftovers.py ``end``)."""
    run_id = _run_id()
    if hasattr(session.config, "workerinput") or run_id != leftovers.run_name(os.getpid()):
        return
    left = leftovers.still_there(lambda process: process.run == run_id)
    leftovers.end_processes(left)
    for process in left:
        print(f"\nleft over, now ended: {process}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
