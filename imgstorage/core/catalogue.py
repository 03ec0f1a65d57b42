"""The catalogues of messages and of error codes as Markdown, made from the declarations themselves.

``docs/messages.md`` and ``docs/errors.md`` are these texts (``make docs``); a test compares them.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields

from imgstorage.core import messages
from imgstorage.core.errors import CODES


def messages_markdown() -> str:
    """Every message: who may send it, what answers it, how long an asker waits, its fields."""
    table = inspect.getdoc(messages) or ""
    lines = [
        "# Messages",
        "",
        "Made from `imgstorage/core/messages.py` by `make docs`; do not edit.",
        "",
        f"Protocol version {messages.PROTOCOL_VERSION}; at most {messages.MAX_BODY_BYTES} bytes a message.",
        "",
        "```text",
        *table.splitlines()[2:],
        "```",
        "",
    ]
    for action, kind in messages.CATALOGUE.items():
        lines += [f"## {action}", "", inspect.getdoc(kind) or "", ""]
        lines.append(f"Sent by: {', '.join(sorted(role.value for role in kind.senders))}.")
        if kind.answer is not None:
            lines.append(f"Answered by `{kind.answer.action}` or `error` within {kind.timeout.value:g} s.")
        lines += ["", "| field | type |", "|---|---|"]
        lines += [f"| `{field.name}` | `{field.type}` |" for field in fields(kind)]
        lines.append("")
    return "\n".join(lines)


def errors_markdown() -> str:
    """Every error code: the exit status of a command that ends with it, and whether trying again can help."""
    lines = [
        "# Error codes",
        "",
        "Made from `imgstorage/core/errors.py` by `make docs`; do not edit. Exit statuses: 0 done, 1 failed, 2 usage,",
        "3 refused or busy, 4 host unreachable, 5 outcome unknown.",
        "",
        "| code | exit status | try again? | meaning |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {code.exit_status} | {'yes' if code.retry else 'no'} | {code.meaning} |"
        for name, code in CODES.items()
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(errors_markdown() if sys.argv[1:] == ["errors"] else messages_markdown(), end="")
