"""``docs/commands.md``, made from the verbs: ``python -m imgstorage.cli.reference`` prints it; a test compares."""

from __future__ import annotations

from imgstorage.cli.helptext import OPTIONS, STATUSES, column_items, described
from imgstorage.cli.verbs import VERBS

HEAD = """# Commands

Made from `imgstorage/cli/verbs.py` by `python -m imgstorage.cli.reference`; do not edit.

Every command is called as `imgstorage …` or, where no Rocks is installed, as `rocks …`. Where one is, `rocks` runs the
commands of this page that Rocks does not have, and hands all others to it. Words may be cut short while they mean one
command (`imgstorage li h storagem nas-0-0`). Parameters are `name=value`, after the words. Truth is `yes`, `no`,
`true`, `false`, `1` or `0`. A size is a number of GiB, or has K, M, G or T behind it.

What a command prints goes to stdout, what a person should know besides to stderr. Where a person waits on a terminal,
a bar shows how far the work is; elsewhere a line now and then. To repeat what is done already is a success, and said.
Ctrl-C ends the waiting, not the work.

The configuration is found in this order: `--config FILE`, `$IMGSTORAGE_CLIENT`, the user's last sandbox,
`/etc/imgstorage/client.conf`.

Tables: one line a row, in columns; an empty cell is filled with `-`. With rows of several hosts the host comes first,
with a colon. `--json` prints an array with one object a row and all columns: names in lower case with `_`, sizes in
bytes, times in seconds, `null` for an empty cell.
"""


def markdown() -> str:
    """The whole page."""
    lines = [HEAD, "| option | meaning |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in OPTIONS)]
    lines += ["", "| exit status | meaning |", "|---|---|", *(f"| {number} | {text} |" for number, text in STATUSES)]
    for verb in VERBS:
        if verb.hidden:
            continue
        lines += ["", f"## {verb.name}", "", "```", verb.usage, "```", ""]
        lines += [verb.text or f"{verb.summary[0].upper()}{verb.summary[1:]}."]
        rows = [(argument.name, described(argument.help, argument.choices)) for argument in verb.arguments]
        rows += [(f"{one.name}={one.value}", described(one.help, (), one.default)) for one in verb.parameters]
        if rows:
            lines += ["", "| given | meaning |", "|---|---|", *(_row(name, text) for name, text in rows)]
        if verb.columns:
            lines += ["", "| column (* = usual) | meaning |", "|---|---|"]
            lines += [_row(name, text) for name, text in column_items(verb)]
        if verb.examples:
            lines += ["", "```", *(f"imgstorage {example}" for example in verb.examples), "```"]
    return "\n".join([*lines, ""])


def _row(name: str, text: str) -> str:
    return f"| `{name}` | {text} |".replace("yes|no", r"yes\|no").replace("text|json", r"text\|json")


if __name__ == "__main__":
    print(markdown(), end="")
