"""What is generated in docs/ is what the code says now."""

from pathlib import Path

import pytest

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
