"""The three daemons as programs: options, configuration, one instance, detaching, ending."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgstorage import __version__
from imgstorage.sandbox.layout import free_port
from imgstorage.tools import run
from tests.cluster import FAST, NAS, ROOT, Cluster, until

pytestmark = pytest.mark.real

PROGRAMS = {"img-storage-frontend": "frontend", "img-storage-nas": "nas", "img-storage-vm": "container"}
PROMPTLY_S = 5.0


def daemon(program: str, *arguments: str, timeout_s: float = 20.0) -> run.Result:
    """Run a daemon's program to its end."""
    argv = [sys.executable, "-m", f"imgstorage.daemons.{PROGRAMS[program]}", *arguments]
    return run.run(argv, timeout_s=timeout_s, check=False, env={"PYTHONPATH": str(ROOT)})


class Own:
    """A NAS daemon of this test alone: it never reaches a broker, and that is no reason to end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, self.log, self.pid_file = folder / "nas.conf", folder / "log", folder / "run" / "nas.pid"
        (folder / "pool").mkdir()
        (folder / "images").mkdir()
        password = folder / "password"
        password.write_text("secret")
        password.chmod(0o600)
        self.fields = {
            "daemon": {"host": "nas-9", "state_dir": str(folder / "state"), "log_file": str(self.log),
                       "pid_file": str(self.pid_file)},
            "broker": {"urls": f"amqp://127.0.0.1:{free_port()}", "user": "nas.nas-9", "password_file": str(password)},
            "nas": {"pool.tank": str(folder / "pool"), "import_dirs": str(folder / "images"),
                    "port": str(free_port())},
        }  # fmt: skip
        self.write()

    def write(self) -> None:
        """Write the configuration file."""
        lines = []
        for section, fields in self.fields.items():
            lines += [f"[{section}]", *(f"{key} = {value}" for key, value in fields.items()), ""]
        self.config.write_text("\n".join(lines))

    def start(self, *arguments: str) -> run.Result:
        """Start it detached; returns what the launching shell sees."""
        return daemon("img-storage-nas", "--config", str(self.config), "--daemon", *arguments)

    @property
    def pid(self) -> int | None:
        """The process in the pid file, if it runs."""
        try:
            pid = int(self.pid_file.read_text())
        except (OSError, ValueError):
            return None
        return pid if run.start_time(pid) is not None else None

    def wait_pid(self) -> int:
        """Wait until it has written its pid file and started."""
        until("the daemon is up", lambda: self.pid and "starts as pid" in self.log.read_text(), 10.0)
        assert self.pid is not None
        return self.pid

    def target_pid(self) -> int | None:
        """The target daemon that it started."""
        from imgstorage.config import load_nas
        from imgstorage.daemons import nas

        return nas.plane(load_nas(self.config)).target_pid

    def end(self) -> None:
        """End it and its target daemon."""
        from imgstorage.config import load_nas
        from imgstorage.daemons import nas

        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
        self.fields["daemon"].pop("bad", None)
        nas.plane(load_nas(self.config)).stop()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Own]:
    """A daemon's files; what was started of it is ended."""
    one = Own(tmp_path)
    try:
        yield one
    finally:
        one.write()
        one.end()


# -- options and configuration


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_version_need_no_configuration(program: str) -> None:
    told = daemon(program, "--help")
    assert told.exit_status == 0
    assert all(option in told.stdout for option in ("--config", "--daemon", "--pid-file", "--check", "--version"))
    version = daemon(program, "--version")
    assert (version.exit_status, version.stdout.strip()) == (0, f"{program} {__version__}")


def test_check_reads_the_configuration_and_starts_nothing(own: Own) -> None:
    told = daemon("img-storage-nas", "--check", "--config", str(own.config))
    assert told.exit_status == 0, told
    assert str(own.config) in told.stdout
    assert not (own.folder / "state").exists()


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("nas", "port", "70000"),
        ("nas", "pool.tank", "relative/folder"),
        ("nas", "import_dir", "/a/typing/error"),
        ("daemon", "host", "Not A Host"),
        ("daemon", "log_level", "loud"),
        ("broker", "urls", "http://127.0.0.1"),
        ("broker", "password_file", "/does/not/exist"),
    ],
)
@pytest.mark.parametrize("option", ["--check", "--daemon"])
def test_a_wrong_field_is_named_with_its_file(own: Own, option: str, section: str, field: str, value: str) -> None:
    before = dict(own.fields[section])
    own.fields[section][field] = value
    own.write()
    told = daemon("img-storage-nas", option, "--config", str(own.config))
    own.fields[section] = before
    assert told.exit_status == 2, told
    assert str(own.config) in told.stderr
    assert f"[{section}] {field}" in told.stderr
    assert "Traceback" not in told.stderr
    assert own.pid is None


def test_a_missing_configuration_is_said_by_name(tmp_path: Path) -> None:
    told = daemon("img-storage-vm", "--config", str(tmp_path / "nowhere.conf"))
    assert told.exit_status == 2
    assert "nowhere.conf" in told.stderr
    assert "Traceback" not in told.stderr


def test_a_detached_daemon_needs_a_log_file(own: Own) -> None:
    log_file = own.fields["daemon"].pop("log_file")
    own.write()
    told = own.start()
    own.fields["daemon"]["log_file"] = log_file
    assert told.exit_status == 2, told
    assert "log_file" in told.stderr
    assert own.pid is None


def test_a_pid_file_that_cannot_be_written_is_an_error_not_a_traceback(own: Own) -> None:
    (own.folder / "run").write_text("a file, not a folder")
    told = daemon("img-storage-nas", "--config", str(own.config))
    assert told.exit_status == 2, told
    assert str(own.pid_file) in told.stderr
    assert "Traceback" not in told.stderr


# -- one instance, detached or not


def test_detached_with_a_pid_file_and_a_log_until_it_is_told_to_stop(own: Own) -> None:
    started = own.start()
    assert started.exit_status == 0, started
    pid = own.wait_pid()
    assert os.getsid(pid) != os.getsid(0), "it is still in the session of whoever started it"
    assert f"starts as pid {pid}" in own.log.read_text()

    again = own.start()
    assert again.exit_status == 3, f"a second instance has to be refused where it is started: {again}"
    assert "already runs" in again.stderr
    in_front = daemon("img-storage-nas", "--config", str(own.config))
    assert in_front.exit_status == 3
    assert own.pid == pid, "the refused one changed the pid file"

    tgtd = until("its target daemon runs", own.target_pid, 10.0)
    os.kill(pid, signal.SIGTERM)
    began = time.monotonic()
    assert run.wait_gone(pid, PROMPTLY_S), "TERM does not end it promptly"
    assert time.monotonic() - began < PROMPTLY_S
    assert not own.pid_file.exists()
    assert run.start_time(tgtd) is not None, "the target daemon has to outlive it"
    assert "stops" in own.log.read_text()


def test_a_pid_file_left_by_a_kill_does_not_keep_the_next_from_starting(own: Own) -> None:
    assert own.start().exit_status == 0
    killed = own.wait_pid()
    tgtd = until("its target daemon runs", own.target_pid, 10.0)
    os.kill(killed, signal.SIGKILL)
    assert run.wait_gone(killed, 10.0)
    assert own.pid_file.read_text().strip() == str(killed)

    again = own.start()
    assert again.exit_status == 0, again
    pid = until("another one runs", lambda: own.pid, 10.0)
    assert pid != killed
    until("it has adopted the target daemon", lambda: own.log.read_text().count("starts as pid") == 2, 10.0)
    assert own.target_pid() == tgtd


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_the_foreground_a_signal_ends_it_with_status_0(own: Own, number: signal.Signals) -> None:
    del own.fields["daemon"]["log_file"], own.fields["daemon"]["pid_file"]
    own.write()
    argv = [sys.executable, "-m", "imgstorage.daemons.nas", "--config", str(own.config)]
    script = f"import os,signal,subprocess,sys\np=subprocess.Popen({argv!r},stderr=subprocess.PIPE,text=True)\n"
    script += "for line in p.stderr:\n  if 'away' in line or 'starts as pid' in line: break\n"
    script += f"import time; time.sleep(1); p.send_signal({int(number)}); p.stderr.read(); sys.exit(p.wait(10))\n"
    told = run.run([sys.executable, "-c", script], check=False, env={"PYTHONPATH": str(ROOT)})
    assert told.exit_status == 0, told


def test_the_sandbox_daemon_refuses_a_second_instance_of_each(cluster: Cluster) -> None:
    for program, host in (("img-storage-nas", NAS), ("img-storage-vm", FAST), ("img-storage-frontend", "frontend")):
        layout = cluster.layout
        told = daemon(program, "--config", str(layout.config_of(layout.host(host))))
        assert told.exit_status == 3, told
        assert "already runs" in told.stderr
    assert cluster.sandbox("status").status == 0
