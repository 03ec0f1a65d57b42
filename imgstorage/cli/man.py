"""``docs/man/imgstorage.1``, made from the verbs: ``python -m imgstorage.cli.man`` prints it; a test compares."""

from __future__ import annotations

from imgstorage import __version__
from imgstorage.cli.helptext import OPTIONS, STATUSES, column_items, described
from imgstorage.cli.verbs import VERBS

FILES = (
    ("/etc/imgstorage/client.conf", "where the message broker is, and as whom to talk to it"),
    ("~/.local/state/imgstorage/sandbox", "the folder of the sandbox that was started last"),
)


def roff() -> str:
    """The whole page."""
    lines = [
        '.\\" Made from imgstorage/cli/verbs.py by python -m imgstorage.cli.man; do not edit.',
        f'.TH IMGSTORAGE 1 "" "imgstorage {__version__}" "User Commands"',
        ".SH NAME",
        r"imgstorage, rocks \- virtual machine disks from a NAS, used at local-disk speed",
        ".SH SYNOPSIS",
        *_usage("imgstorage COMMAND [ARGUMENT…] [NAME=VALUE…]"),
        ".SH DESCRIPTION",
        _text(
            "Maps disk images that live on NAS hosts to the hosts that run virtual machines, and takes them back. What "
            "a command prints goes to standard output, what a person should know besides to standard error. To repeat "
            "what is done already is a success. An interrupt ends the waiting, not the work."
        ),
        ".SH COMMANDS",
    ]
    for verb in VERBS:
        if verb.hidden:
            continue
        lines += [f".SS {_text(verb.name)}", *_usage(f"imgstorage {verb.usage}"), ".PP"]
        lines += [_text(verb.text or f"{verb.summary[0].upper()}{verb.summary[1:]}.")]
        for argument in verb.arguments:
            lines += _item(argument.name, described(argument.help, argument.choices))
        for parameter in verb.parameters:
            lines += _item(f"{parameter.name}={parameter.value}", described(parameter.help, (), parameter.default))
        if verb.columns:
            lines += [".PP", r"Columns (* = shown without output\-col=):"]
            lines += [line for name, text in column_items(verb) for line in _item(name, text)]
    lines += [".SH OPTIONS", *(line for name, text in OPTIONS for line in _item(name, text))]
    lines += [".SH EXIT STATUS", *(line for number, text in STATUSES for line in _item(str(number), text))]
    lines += [".SH ENVIRONMENT", *_item("IMGSTORAGE_CLIENT", "the configuration to use, as with --config")]
    lines += [".SH FILES", *(line for name, text in FILES for line in _item(name, text))]
    return "\n".join([*lines, ""])


def _text(text: str) -> str:
    """Text with what roff would take for its own marked, and never a request at the beginning of a line."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...").replace("'", "\\(aq").replace("~", "\\(ti")
    return f"\\&{text}" if text.startswith(".") else text


def _usage(line: str) -> list[str]:
    return [".nh", ".ad l", f".B {_text(line)}", ".br", ".ad b", ".hy"]


def _item(name: str, text: str) -> list[str]:
    return [".TP", f".B {_text(name)}", _text(text)]


if __name__ == "__main__":
    print(roff(), end="")
