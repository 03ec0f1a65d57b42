"""What ``help`` prints: all commands on one screen, those that begin with some words, or one command in full."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from imgstorage.cli.grammar import Help, Verb, starting_with

WIDTH = 80
FOOT = (
    "Parameters are name=value, after the words. '{prog} COMMAND help' says more.",
    "-C FILE, --config FILE   --json   --debug   -h, --help   --version",
)
OPTIONS = (
    ("-C, --config FILE", "the configuration to use, instead of the sandbox's or the system's"),
    ("--json", "tables as JSON: the same as output-format=json"),
    ("--debug", "with an error, where in the program it came from"),
    ("-h, --help", "help on the command"),
    ("--version", "the version of this program"),
)
STATUSES = (
    (0, "done"),
    (1, "failed"),
    (2, "the command line, a name, a size or a configuration file is wrong"),
    (3, "refused, or busy"),
    (4, "a host, or the message broker, cannot be reached"),
    (5, "the outcome is not known; the error names the operation to ask for"),
    (130, "interrupted; the work goes on"),
)


def help_text(prog: str, verbs: Sequence[Verb], question: Help) -> str:
    """The answer to a question about commands."""
    if question.verb is not None:
        return one(prog, question.verb)
    found = starting_with(verbs, question.words)
    width = max(len(verb.short) for verb in found)
    lines = [f"  {verb.short:<{width}}  {verb.summary}" for verb in found]
    if question.words:
        return "\n".join([*lines, ""])
    return "\n".join([f"usage: {prog} COMMAND", *lines, *(line.format(prog=prog) for line in FOOT), ""])


def one(prog: str, verb: Verb) -> str:
    """One command: usage, meaning, arguments, parameters, columns, examples."""
    usage = textwrap.wrap(f"usage: {prog} {verb.usage}", WIDTH, subsequent_indent=" " * 11, break_on_hyphens=False)
    lines = [*usage, "", *textwrap.wrap(verb.text or f"{verb.summary[0].upper()}{verb.summary[1:]}.", WIDTH)]
    items = [(argument.name, described(argument.help, argument.choices)) for argument in verb.arguments]
    items += [(f"{one.name}={one.value}", described(one.help, (), one.default)) for one in verb.parameters]
    lines += ["", *_items(items)] if items else []
    if verb.columns:
        lines += ["", "Columns (* = shown without output-col=):", *_items(column_items(verb))]
    if verb.examples:
        lines += ["", *(f"  {prog} {example}" for example in verb.examples)]
    return "\n".join([*lines, ""])


def described(text: str, choices: Sequence[str], default: str = "") -> str:
    """A help text with what may be given and what applies without it."""
    text = f"{text}: {', '.join(choices)}" if choices else text
    return f"{text} (default: {default})" if default else text


def column_items(verb: Verb) -> list[tuple[str, str]]:
    """Name and meaning of a command's columns, the usual ones with a star."""
    from importlib import import_module

    module, _, name = verb.columns.partition(":")
    columns = getattr(import_module(module), name)
    return [(f"{column.name}{'*' if column.shown else ''}", column.help) for column in columns]


def _items(items: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in items) + 4
    lines: list[str] = []
    for name, text in items:
        lines += textwrap.wrap(
            f"  {name:<{width - 2}}{text}", WIDTH, subsequent_indent=" " * width, break_on_hyphens=False
        )
    return lines
