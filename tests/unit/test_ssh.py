"""ssh: keys and lines of files, and a real sshd of our own that does one thing for known keys and nothing else."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools import ssh
from imgstorage.tools.pipeline import Pipeline
from imgstorage.tools.run import Result, run, start_time
from imgstorage.tools.ssh import Peer
from imgstorage.tools.sshd import Sshd

ADDRESS = "127.0.0.93"
DEADLINE_S = 30.0
WORD = "op-17.transfer:1"


def test_a_key_pair_is_made_once_by_one_command_and_closed_to_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "key"
    caplog.set_level(logging.DEBUG)
    public = ssh.ensure_key(path, "compute-0-0")
    assert len([text for text in caplog.messages if text.startswith("ssh-keygen ")]) == 1  # it is made during a map
    before = path.read_bytes()
    assert public.startswith("ssh-ed25519 ")
    assert public.endswith(" compute-0-0")
    os.chmod(path, 0o644)
    (tmp_path / "key.new").write_text("a run that was killed left this")
    assert ssh.ensure_key(path, "other") == public
    assert path.read_bytes() == before
    assert path.stat().st_mode & 0o777 == 0o600
    second = ssh.ensure_key(tmp_path / "second", "")
    assert second.split()[1] != public.split()[1]
    (tmp_path / "new").mkdir()
    leftover = tmp_path / "new/key.new"
    leftover.write_text("a run that was killed left this")
    ssh.ensure_key(tmp_path / "new/key", "x")
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["key"]


def test_a_file_that_is_no_key_is_said_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    with pytest.raises(ImgStorageError) as caught:
        ssh.ensure_key(path, "x")
    assert caught.value.code == "corrupt"
    assert path.read_text().startswith("-----BEGIN")


@pytest.mark.parametrize(
    "text",
    ["", "ssh-rsa AAAA x", "ssh-ed25519", "ssh-ed25519 AA\nssh-ed25519 BB", 'command="x" ssh-ed25519 AAAA', "x\ny"],
)
def test_what_is_no_public_key_goes_into_no_file(text: str) -> None:
    for make in (lambda: ssh.known_hosts_line("nas-0-0", text), lambda: ssh.authorized_keys_line(text, ["true"])):
        with pytest.raises(ImgStorageError) as caught:
            make()
        assert caught.value.code == "bad_message"


@pytest.mark.parametrize("word", ["", "a b", "-oProxyCommand=x", "a;b", "$(x)", "a\nb", "../x"])
def test_only_one_plain_word_is_sent(word: str, tmp_path: Path) -> None:
    with pytest.raises(ImgStorageError) as caught:
        ssh.client_argv(Peer("nas", ADDRESS, 22), word, key=tmp_path / "k", known_hosts=tmp_path / "h")
    assert caught.value.code == "bad_name"


def test_an_address_is_no_option(tmp_path: Path) -> None:
    with pytest.raises(ImgStorageError):
        ssh.client_argv(Peer("nas", "-oProxyCommand=x", 22), WORD, key=tmp_path / "k", known_hosts=tmp_path / "h")


def test_a_command_that_fails_with_255_is_not_taken_for_ssh() -> None:
    peer = Peer("nas-0-0", ADDRESS, 22)
    assert ssh.failure(1, "Host key verification failed.", peer) is None
    assert ssh.failure(255, "cannot receive: pool is full", peer) is None
    assert ssh.failure(255, "", peer) is None


# -- with a real server -------------------------------------------------------------------------------------

FORCED = r"""
import os, sys
word = os.environ.get("SSH_ORIGINAL_COMMAND", "")
print("forced", word, os.isatty(0), sorted(key for key in os.environ if key.startswith("EVIL")), flush=True)
if word.startswith("sum"):
    import hashlib
    print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())
sys.exit(7 if word == "fails" else 0)
"""


@dataclass
class Pair:
    """A server and the files of a client that it lets in."""

    server: Sshd
    peer: Peer
    key: Path
    known_hosts: Path

    def ask(self, word: str, peer: Peer | None = None, key: Path | None = None) -> Result:
        argv = ssh.client_argv(peer or self.peer, word, key=key or self.key, known_hosts=self.known_hosts)
        return run(argv, check=False, timeout_s=DEADLINE_S)

    def plain(self, *options: str, stdin: str = "") -> Result:
        """As anybody with the key would connect, with a client of his own."""
        argv = ["ssh", "-F", "none", "-i", str(self.key), "-p", str(self.server.port), "-o", "BatchMode=yes"]
        argv += ["-o", f'UserKnownHostsFile="{self.known_hosts}"', "-o", "HostKeyAlias=nas-0-0", "-o", "LogLevel=ERROR"]
        return run([*argv, *options], check=False, timeout_s=DEADLINE_S, stdin=stdin)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="is-ssh-") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def pair(folder: Path, worker_id: str) -> Iterator[Pair]:
    number = int(worker_id.removeprefix("gw")) if worker_id.startswith("gw") else 99
    server = Sshd(folder / "sshd", ADDRESS, 33270 + number)
    script = folder / "a script's 'forced' \"command\".py"
    script.write_text(FORCED)
    key = folder / "client_key"
    public = ssh.ensure_key(key, "compute-0-0")
    known_hosts = folder / "known hosts"
    known_hosts.write_text(ssh.known_hosts_line("nas-0-0", server.host_public_key()) + "\n")
    server.authorize([ssh.authorized_keys_line(public, [sys.executable, "-I", str(script)])])
    server.ensure()
    user = run(["id", "-un"]).stdout.strip()
    try:
        yield Pair(server, Peer("nas-0-0", ADDRESS, server.port, user), key, known_hosts)
    finally:
        server.stop()


pytestmark = pytest.mark.filterwarnings("error")
real = pytest.mark.real


@real
def test_the_forced_command_gets_the_word(pair: Pair) -> None:
    result = pair.ask(WORD)
    assert (result.exit_status, result.stdout, result.stderr) == (0, f"forced {WORD} False []\n", "")
    assert ssh.failure(result.exit_status, result.stderr, pair.peer) is None


@real
def test_the_status_of_the_forced_command_comes_back(pair: Pair) -> None:
    result = pair.ask("fails")
    assert result.exit_status == 7
    assert ssh.failure(result.exit_status, result.stderr, pair.peer) is None


@real
def test_bytes_arrive_whole(pair: Pair, tmp_path: Path) -> None:
    data = os.urandom(5_000_001)
    (tmp_path / "data").write_bytes(data)
    argv = ssh.client_argv(pair.peer, "sum", key=pair.key, known_hosts=pair.known_hosts)
    with Pipeline([["cat", str(tmp_path / "data")], argv, ["tail", "-n", "1"]], meter_after=0) as copy:
        outcome = copy.wait(DEADLINE_S).check()
    (tmp_path / "digest").write_bytes(data)
    assert outcome.output.split()[0] == run(["sha256sum", str(tmp_path / "digest")]).stdout.split()[0]
    assert outcome.bytes_done == len(data)


@real
def test_the_key_opens_nothing_else(pair: Pair, tmp_path: Path) -> None:
    at = f"{pair.peer.user}@{ADDRESS}"
    witness = tmp_path / "never"
    assert pair.plain(at, f"id; touch {witness}").stdout == f"forced id; touch {witness} False []\n"
    assert not witness.exists()
    assert pair.plain(at, stdin="id\n").stdout == "forced  False []\n"
    terminal = pair.plain("-tt", at)
    assert "True" not in terminal.stdout
    assert "PTY allocation request failed" in terminal.stderr
    assert pair.plain("-o", "SetEnv=EVIL=1", at).stdout.endswith("[]\n")
    assert pair.plain("-s", at, "sftp").exit_status != 0
    forward = pair.plain("-o", "ExitOnForwardFailure=yes", "-N", "-R", "33269:127.0.0.1:1", at)
    assert forward.exit_status == 255
    assert "forwarding failed" in forward.stderr
    through = pair.plain("-W", f"{ADDRESS}:{pair.server.port}", at)
    assert through.exit_status == 255
    assert "stdio forwarding failed" in through.stderr
    assert pair.plain(f"nobody@{ADDRESS}").exit_status == 255


@real
def test_a_password_is_not_even_asked_for(pair: Pair) -> None:
    result = pair.plain("-o", "PubkeyAuthentication=no", f"{pair.peer.user}@{ADDRESS}")
    assert "Permission denied (publickey)." in result.stderr


@real
def test_another_host_key_is_refused(pair: Pair, tmp_path: Path) -> None:
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_text(ssh.known_hosts_line("nas-0-0", ssh.ensure_key(tmp_path / "other", "x")) + "\n")
    for one in (replace(pair, known_hosts=known_hosts), replace(pair, known_hosts=tmp_path / "none")):
        result = one.ask(WORD)
        problem = ssh.failure(result.exit_status, result.stderr, pair.peer)
        assert problem is not None
        assert problem.code == "conflict"
    assert not (tmp_path / "none").exists()


@real
def test_another_key_is_refused(pair: Pair, tmp_path: Path) -> None:
    ssh.ensure_key(tmp_path / "stranger", "x")
    result = pair.ask(WORD, key=tmp_path / "stranger")
    problem = ssh.failure(result.exit_status, result.stderr, pair.peer)
    assert problem is not None
    assert problem.code == "not_allowed"


@real
@pytest.mark.parametrize(("address", "port"), [(ADDRESS, 1), ("nowhere.invalid", 22)])
def test_nobody_listens(pair: Pair, address: str, port: int) -> None:
    peer = replace(pair.peer, address=address, port=port)
    result = pair.ask(WORD, peer=peer)
    problem = ssh.failure(result.exit_status, result.stderr, peer)
    assert problem is not None
    assert (problem.code, problem.retry) == ("unreachable", True)
    assert f"port {port}" in str(problem)


@real
def test_a_key_can_be_taken_back(pair: Pair) -> None:
    lines = (pair.server.folder / "authorized_keys").read_text().splitlines()
    pair.server.authorize([])
    try:
        result = pair.ask(WORD)
        problem = ssh.failure(result.exit_status, result.stderr, pair.peer)
        assert problem is not None
        assert problem.code == "not_allowed"
    finally:
        pair.server.authorize(lines)
    assert pair.ask(WORD).exit_status == 0


@real
def test_nothing_of_the_users_own_configuration_is_used(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir(mode=0o700)
    (tmp_path / ".ssh/config").write_text("Host *\n  ProxyCommand false\n")
    argv = ssh.client_argv(pair.peer, WORD, key=pair.key, known_hosts=pair.known_hosts)
    assert run(argv, env={"HOME": str(tmp_path)}, timeout_s=DEADLINE_S).stdout.startswith("forced")


@real
def test_an_instance_that_runs_is_adopted_and_a_dead_one_replaced(pair: Pair) -> None:
    first = pair.server.pid()
    assert first is not None
    pair.server.ensure()
    assert pair.server.pid() == first
    assert pair.server.folder.stat().st_mode & 0o777 == 0o700
    os.kill(first, 9)
    end = time.monotonic() + DEADLINE_S
    while start_time(first) is not None:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert pair.server.pid() is None
    pair.server.ensure()
    assert pair.server.pid() not in (None, first)
    assert pair.ask(WORD).exit_status == 0


@real
def test_a_taken_port_is_said(pair: Pair, tmp_path: Path) -> None:
    second = Sshd(tmp_path / "second", ADDRESS, pair.server.port)
    with pytest.raises(ImgStorageError) as caught:
        second.ensure()
    assert caught.value.code == "tool_failed"
    assert "Cannot bind any address" in str(caught.value)
    assert second.pid() is None


ORDINARY = """
import os, pwd, sys, tempfile
from pathlib import Path
from imgstorage.tools import ssh
from imgstorage.tools.run import run
from imgstorage.tools.sshd import Sshd
address, port = sys.argv[1], int(sys.argv[2])
assert os.getuid() != 0
with tempfile.TemporaryDirectory() as path:
    folder = Path(path)
    server = Sshd(folder / "sshd", address, port)
    public = ssh.ensure_key(folder / "key", "x")
    (folder / "known").write_text(ssh.known_hosts_line("nas", server.host_public_key()))
    server.authorize([ssh.authorized_keys_line(public, ["sh", "-c", "echo got $SSH_ORIGINAL_COMMAND"])])
    server.ensure()
    peer = ssh.Peer("nas", address, port, pwd.getpwuid(os.getuid()).pw_name)
    argv = ssh.client_argv(peer, "word", key=folder / "key", known_hosts=folder / "known")
    print(run(argv, check=False))
    server.stop()
"""


@real
def test_an_ordinary_user_can_have_an_instance_too(tmp_path: Path, pair: Pair) -> None:
    argv = [sys.executable, "-c", ORDINARY, ADDRESS, str(pair.server.port + 100)]
    if os.getuid() == 0:
        # A system user, with a shell in a private view of /etc/passwd.
        passwd = tmp_path / "passwd"
        passwd.write_text(
            "root:x:0:0:root:/root:/bin/sh\nsshd:x:104:65534::/run/sshd:/bin/false\nbackup:x:34:34::/:/bin/sh\n"
        )
        enter = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/passwd && exec "$@"', str(passwd)]
        argv = [*enter, "setpriv", "--reuid=34", "--regid=34", "--clear-groups", "--", *argv]
    result = run(argv, env={"HOME": "/"}, timeout_s=DEADLINE_S)
    assert "exit_status=0, stdout='got word" in result.stdout
