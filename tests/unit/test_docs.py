"""What is generated in docs/ is what the code says now."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from imgstorage.bus import users
from imgstorage.config import load_client, load_container, load_frontend, load_nas
from imgstorage.core import catalogue, diagram

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("messages.md", catalogue.messages_markdown),
        ("errors.md", catalogue.errors_markdown),
        ("state-machine.md", diagram.markdown),
    ],
)
def test_up_to_date(name, text):
    assert (DOCS / name).read_text() == text(), "make docs"


@pytest.mark.parametrize(
    ("name", "load", "user"),
    [
        ("frontend.conf", load_frontend, "frontend"),
        ("client.conf", load_client, "operator"),
        ("nas.conf", load_nas, "nas.nas-0-0"),
        ("vm.conf", load_container, "container.compute-0-0"),
    ],
)
def test_the_files_of_the_install_page_are_read(
    name: str, load: Callable[[Path], object], user: str, tmp_path: Path
) -> None:
    """Each with the password that the page's own command makes for it."""
    page = (DOCS / "install.md").read_text()
    command = re.search(r"-m imgstorage.bus.users /etc/imgstorage/broker (.*)", page)
    assert command
    assert users.main([str(tmp_path / "broker"), *command.group(1).split()]) == 0
    made = {one["name"] for one in json.loads((tmp_path / "broker/definitions.json").read_text())["users"]}
    block = re.search(rf"`/etc/imgstorage/{re.escape(name)}`[^\n]*:\n\n```ini\n(.*?)```", page, re.DOTALL)
    assert block
    text, count = re.subn(r"password_file = .*", f"password_file = {tmp_path}/broker/secrets/{user}", block.group(1))
    assert count == 1
    (tmp_path / name).write_text(text)
    loaded = load(tmp_path / name)
    assert loaded.broker.user == user  # type: ignore[attr-defined]
    assert user in made


def test_brokers_users_are_kept_and_added_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "broker"
    assert users.main([str(folder), "nas=nas-0-0"]) == 0
    before = (folder / "secrets/nas.nas-0-0").read_text()
    assert (folder / "secrets/nas.nas-0-0").stat().st_mode & 0o077 == 0
    assert users.main([str(folder), "container=compute-0-0"]) == 0
    assert (folder / "secrets/nas.nas-0-0").read_text() == before
    made = [one["name"] for one in json.loads((folder / "definitions.json").read_text())["users"]]
    assert made == ["container.compute-0-0", "frontend", "nas.nas-0-0", "operator"]
    capsys.readouterr()
    for bad in (
        [],
        ["nas=a"],
        [str(folder)],
        [str(folder), "nas=a b"],
        [str(folder), "disk=a"],
        [str(folder), "nas=a,a"],
    ):
        assert users.main(bad) == 2, bad
        assert capsys.readouterr().err.startswith("users: ")
