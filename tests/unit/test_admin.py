"""The scripts of admin/ and the targets of the Makefile: help helps, and what is wrong is said first."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def typed(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command at the top of the checkout."""
    return subprocess.run(argv, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=60,
                          check=False)  # fmt: skip


@pytest.mark.parametrize("script", ["check", "demo", "install", "lock", "test"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_help(script: str, option: str) -> None:
    told = typed(f"admin/{script}", option)
    assert told.returncode == 0, told
    assert f"admin/{script}" in told.stdout
    assert "set -" not in told.stdout
    assert "install:" not in told.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("admin/check --foo", "unknown argument '--foo'"),
        ("admin/lock foo", "unknown arguments 'foo'"),
        ("admin/demo --foo", "unrecognized arguments: --foo"),
        ("admin/demo a b", "unrecognized arguments: b"),
        ("admin/test tests/unit/nosuchfile.py", "there is no tests/unit/nosuchfile.py"),
        ("admin/test nosuchfile.py::test_it", "there is no nosuchfile.py"),
    ],
)
def test_a_wrong_argument_is_said_before_anything_is_installed(line: str, says: str) -> None:
    told = typed(*line.split())
    assert told.returncode == 2, told
    assert says in told.stderr
    assert "install:" not in told.stderr


def test_the_demos_arguments_are_read_without_what_is_installed_for_it() -> None:
    told = typed(
        "python3", "-S", "-I", "-c", "import sys; sys.path.insert(0, '.'); import imgstorage.sandbox.demo.arguments"
    )
    assert told.returncode == 0, told.stderr


def test_targets_that_people_guess() -> None:
    does = {
        "tests": "admin/test", "all": "admin/test", "test": "admin/test", "lint": "admin/check",
        "build": "admin/install", "run": "admin/demo", "up": "sandbox up", "down": "sandbox down",
        "uninstall": "rm -rf .venv", "docs": "catalogue",
    }  # fmt: skip
    for target, what in does.items():
        told = typed("make", "-n", target)
        assert (told.returncode, what in told.stdout) == (0, True), told
    shown = typed("make").stdout
    targets = re.findall(r"^make (\w+)", shown, re.MULTILINE)
    assert {"install", "test", "check", "up", "down"} <= set(targets)
    assert max(map(len, shown.splitlines())) <= 110
