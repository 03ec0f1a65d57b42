"""The guests' root: Debian's own packages, unpacked by debootstrap and apt; nothing is started.

Besides them it holds the Python packages that the project and its tests need, with the versions and hashes of
requirements-test.txt, as wheels for Debian's Python. What makes one guest differ from another (names, addresses,
keys) is written when it boots.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from tests.lab.build_mirror import COMPONENTS, SUITE, Mirror, apt_settings
from tests.lab.build_steps import command, in_root, step, write

ARCHITECTURE = "amd64"
PYTHON = "3.11"
PACKAGES = (
    *("iproute2", "openssh-client", "openssh-server", "python3", "dmsetup", "kmod", "udev", "procps", "socat", "zstd"),
    *("e2fsprogs", "pv", "util-linux", "nftables", "zfsutils-linux", "tgt", "open-iscsi", "python3-rtslib-fb"),
    *("qemu-utils", "qemu-block-extra", "qemu-system-x86"),
)
# Checkers of source code: no use in a guest, and as large as all the others together.
NOT_IN_GUESTS = {"mypy", "mypy-extensions", "ruff", "grimp", "import-linter", "ast-serialize", "librt"}
PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(36, 16, -1)))
DIST_PACKAGES = f"usr/local/lib/python{PYTHON}/dist-packages"

NO_START = "#!/bin/sh\n# Services are started by whoever needs them.\nexit 101\n"
DPKG = """\
force-unsafe-io
path-exclude /usr/share/doc/*
path-exclude /usr/share/man/*
path-exclude /usr/share/locale/*
"""
APT = 'APT::Install-Recommends "false";\nAcquire::Languages "none";\nAcquire::Retries "3";\n'
SETTINGS_OF_BUILD = "etc/apt/apt.conf.d/80build"
SHELL = """\
export PYTHONPATH= LC_ALL=C.UTF-8
PS1='\\h:\\w# '
cd /opt/imgstorage
"""


def make(root: Path, mirror: Mirror, requirements: Path) -> None:
    """Fill the empty folder ``root``. Raises ``tool_failed`` with the lines of the command that failed."""
    with step("Debian's base system"):
        components = f"--components={','.join(COMPONENTS)}"
        argv = ["debootstrap", "--variant=minbase", f"--arch={ARCHITECTURE}", components]
        command([*argv, SUITE, str(root), mirror.archive])
    write(root / "usr/sbin/policy-rc.d", NO_START, 0o755)
    write(root / "etc/dpkg/dpkg.cfg.d/lab", DPKG)
    write(root / "etc/apt/apt.conf.d/90lab", APT)
    write(root / "etc/apt/sources.list", mirror.sources())
    reach_archives(root)
    with step("Debian packages"):
        in_root(root, ["apt-get", "update"])
        in_root(root, ["apt-get", "-y", "install", *PACKAGES])
    with step("Python packages"):
        _python_packages(root / DIST_PACKAGES, requirements)
    _configure(root)


def reach_archives(root: Path) -> None:
    """Let apt in ``root`` reach the archives as this machine does."""
    write(root / SETTINGS_OF_BUILD, apt_settings())
    for name in ("etc/resolv.conf", "etc/ssl/certs/ca-certificates.crt"):
        source = Path("/") / name
        if source.exists():
            write(root / name, source.read_text())


def forget_archives(root: Path) -> None:
    """Undo :func:`reach_archives`, and drop what apt has downloaded."""
    in_root(root, ["apt-get", "clean"])
    for name in (SETTINGS_OF_BUILD, "etc/resolv.conf"):
        (root / name).unlink(missing_ok=True)
    for folder in ("var/lib/apt/lists", "var/cache/apt", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(root / folder, ignore_errors=True)


def _python_packages(target: Path, requirements: Path) -> None:
    text = requirements.read_text().replace("\\\n", " ")
    kept = [line for line in text.splitlines() if re.split(r"[=\s;]", line)[0].lower() not in NOT_IN_GUESTS]
    chosen = target.parent / "requirements.txt"
    write(chosen, "\n".join(kept) + "\n")
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    argv = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
    argv += ["--require-hashes", "--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}", *platforms]
    command([*argv, "--implementation=cp", f"--target={target}", f"--requirement={chosen}"])
    chosen.unlink()
    shutil.rmtree(target / "bin", ignore_errors=True)


def _configure(root: Path) -> None:
    # iscsiadm starts the daemon when it finds none; Debian's way to do that needs systemd.
    settings = root / "etc/iscsi/iscsid.conf"
    text = re.sub(r"(?m)^iscsid\.startup = .*$", "iscsid.startup = /usr/sbin/iscsid", settings.read_text())
    settings.write_text(text)
    # What is different in each guest is made at its first boot.
    for path in (root / "etc/ssh").glob("ssh_host_*"):
        path.unlink()
    for name in ("etc/iscsi/initiatorname.iscsi", "etc/hostid", "etc/machine-id"):
        (root / name).unlink(missing_ok=True)
    write(root / "etc/ssh/sshd_config.d/lab.conf", "PermitRootLogin prohibit-password\nUseDNS no\nUsePAM no\n")
    write(root / "etc/profile.d/lab.sh", SHELL)
    write(root / "etc/fstab", "")
    in_root(root, ["python3", "-m", "compileall", "-q", f"/{DIST_PACKAGES}", "/usr/lib/python3/dist-packages"])
