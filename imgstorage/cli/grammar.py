"""How a command line is read: verbs as data, and one function that turns typed words into a call.

* A command is its words, its arguments, and parameters ``name=value`` anywhere after the words.
* A word may be cut short as long as it still means one command. Arguments and parameters may not.
* ``help`` right after the words, ``--help`` and ``-h`` ask about a command instead of running it. A volume may be
  called ``help``: with an argument before it, the word is an argument.
* What follows the first arguments of a ``verbatim`` command is taken as it is.

Nothing here knows a single command: those are in ``verbs.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import TRUTH

_PARAMETER = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)=(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument. ``many``: any number of them, also none unless ``needed``. ``usage`` is what a usage line shows, if
    not the name."""

    name: str
    help: str
    many: bool = False
    needed: bool = False
    optional: bool = False
    choices: tuple[str, ...] = ()
    usage: str = ""
    offers: str = ""  # what completion asks for: nas, container, pool or volume

    @property
    def shown(self) -> str:
        """As a usage line shows it."""
        name = self.usage or "|".join(self.choices) or self.name
        if self.many:
            return f"{name}…" if self.needed else f"[{name}…]"
        return f"[{name}]" if self.optional and not self.usage else name


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter ``name=value``. ``value`` names the value for people, and ``default`` what applies without it.

    ``path``: the value is a path, which completion looks for on this machine.
    """

    name: str
    value: str
    help: str
    also: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    boolean: bool = False
    required: bool = False
    in_usage: bool = True
    default: str = ""
    path: bool = False

    @property
    def shown(self) -> str:
        """As a usage line shows it."""
        return f"{self.name}={self.value}" if self.required else f"[{self.name}={self.value}]"


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One command. ``handler`` is "module:function": imported when called, it takes a Call and returns a status."""

    words: tuple[str, ...]
    summary: str
    handler: str
    text: str = ""
    arguments: tuple[Argument, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    examples: tuple[str, ...] = ()
    columns: str = ""  # "module:name" of the table it prints
    verbatim: bool = False
    hidden: bool = False

    @property
    def name(self) -> str:
        """Its words."""
        return " ".join(self.words)

    @property
    def short(self) -> str:
        """Words, and all that has to be given."""
        required = (one.shown for one in self.parameters if one.required)
        return " ".join([self.name, *(argument.shown for argument in self.arguments), *required])

    @property
    def usage(self) -> str:
        """Words, arguments and parameters."""
        return " ".join([self.short, *(one.shown for one in self.parameters if one.in_usage and not one.required)])


@dataclass(frozen=True, kw_only=True)
class Options:
    """What may stand anywhere on a command line, whichever command it is."""

    config: str = ""
    debug: bool = False
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Call:
    """A command to run, checked. ``prog`` is the name it was called by."""

    prog: str
    verb: Verb
    arguments: Mapping[str, tuple[str, ...]]
    parameters: Mapping[str, str]
    options: Options = field(default_factory=Options)

    def one(self, name: str) -> str:
        """The argument ``name``; "" for an optional one that was not given."""
        return (self.arguments.get(name) or ("",))[0]

    def many(self, name: str) -> tuple[str, ...]:
        """All of the argument ``name``."""
        return self.arguments.get(name, ())

    def text(self, name: str) -> str | None:
        """The parameter ``name``, None if it was not given."""
        return self.parameters.get(name)

    def yes(self, name: str, default: bool) -> bool:
        """Whether the parameter ``name`` is true."""
        value = self.parameters.get(name)
        return default if value is None else TRUTH[value.lower()]


@dataclass(frozen=True, kw_only=True)
class Help:
    """A question about commands: all that begin with ``words``, or just ``verb``."""

    words: tuple[str, ...] = ()
    verb: Verb | None = None


@dataclass(frozen=True)
class Version:
    """The question which version this is."""


class UsageError(ImgStorageError):
    """A command line that is wrong. ``usage`` is how it would be right, ``choices`` the commands it may have meant."""

    def __init__(self, message: str, *, usage: str = "", hint: str = "", choices: Sequence[str] = ()) -> None:
        super().__init__("usage", message, hint=hint)
        self.usage = usage
        self.choices = tuple(choices)


def starting_with(verbs: Sequence[Verb], words: Sequence[str]) -> list[Verb]:
    """The commands whose words begin with ``words``."""
    return [verb for verb in verbs if verb.words[: len(words)] == tuple(words) and not verb.hidden]


def parse(prog: str, verbs: Sequence[Verb], argv: Sequence[str]) -> Call | Help | Version:
    """What a command line asks for. Raises UsageError."""
    return _Reader(prog, verbs, argv).read()


class _Reader:
    """Reads one command line from left to right."""

    def __init__(self, prog: str, verbs: Sequence[Verb], argv: Sequence[str]) -> None:
        self._prog, self._verbs, self._left = prog, verbs, list(argv)
        self._words: tuple[str, ...] = ()
        self._config, self._debug, self._json, self._help, self._ended = "", False, False, False, False
        self._positional: list[str] = []
        self._parameters: dict[str, str] = {}

    def read(self) -> Call | Help | Version:
        for number, token in enumerate(self._left, 1):
            try:
                token.encode()
            except UnicodeEncodeError:
                raise self._wrong(f"argument {number} is not valid UTF-8") from None
        verb = None
        while self._left:
            token = self._left.pop(0)
            if self._is_option(token):
                if self._option(token):
                    return Version()
            elif token == "help" and not self._positional and not self._ended:  # noqa: S105
                self._help = True
            elif verb is None and (word := self._word(token)):
                self._words = (*self._words, word)
                if len(starting_with(self._verbs, self._words)) <= 1:
                    verb = self._verb()
            else:
                verb = verb or self._verb()
                if verb is None:
                    raise self._unknown(token)
                self._take(verb, token)
        verb = verb or self._verb()
        if self._help:
            return Help(words=self._words, verb=verb if len(starting_with(self._verbs, self._words)) <= 1 else None)
        if verb is None:
            raise self._unfinished()
        return self._call(verb)

    # -- words

    def _verb(self) -> Verb | None:
        return next((verb for verb in self._verbs if verb.words == self._words), None)

    def _word(self, token: str) -> str | None:
        depth = len(self._words)
        longer = [verb for verb in self._verbs if verb.words[:depth] == self._words and len(verb.words) > depth]
        known = dict.fromkeys(verb.words[depth] for verb in longer)
        found = [token] if token in known else [word for word in known if token and word.startswith(token)]
        if len(found) > 1:
            text = f"'{' '.join((*self._words, token))}' may mean {', '.join(found)}"
            raise UsageError(text, choices=[v.short for word in found for v in self._after(word)])
        return found[0] if found else None

    def _after(self, *words: str) -> list[Verb]:
        return starting_with(self._verbs, (*self._words, *words))

    def _unknown(self, token: str) -> UsageError:
        shown = repr(" ".join((*self._words, token)))
        return UsageError(f"{shown} is not a command", choices=[verb.short for verb in self._after()])

    def _unfinished(self) -> UsageError:
        text = f"'{' '.join(self._words)}' is the beginning of several commands" if self._words else "no command given"
        return UsageError(text, choices=[verb.short for verb in self._after()])

    # -- options

    def _is_option(self, token: str) -> bool:
        return token.startswith("-") and len(token) > 1 and not self._ended

    def _option(self, token: str) -> bool:
        """Notes one option; True for ``--version``."""
        name, has_value, value = token.partition("=")
        if name in ("-C", "--config"):
            if not has_value and not self._left:
                raise self._wrong(f"{name} needs a file")
            self._config = value if has_value else self._left.pop(0)
            if not self._config:
                raise self._wrong(f"{name} needs a file")
        elif token in ("-h", "--help"):
            self._help = True
        elif token == "--debug":  # noqa: S105
            self._debug = True
        elif token == "--json":  # noqa: S105
            self._json = True
        elif token == "--":  # noqa: S105
            self._ended = True
        elif token == "--version":  # noqa: S105
            return True
        else:
            raise self._wrong(f"{token!r} is not an option")
        return False

    # -- arguments and parameters

    def _take(self, verb: Verb, token: str) -> None:
        parameter = _PARAMETER.fullmatch(token)
        if parameter and not self._ended:
            self._parameter(verb, parameter[1], parameter[2])
            return
        self._positional.append(token)
        if verb.verbatim and len(self._positional) >= len(verb.arguments) - 1:
            self._positional += self._left[1:] if self._left[:1] == ["--"] else self._left
            self._left.clear()

    def _parameter(self, verb: Verb, name: str, value: str) -> None:
        known = next((one for one in verb.parameters if name == one.name or name in one.also), None)
        if known is None:
            names = ", ".join(f"{one.name}=" for one in verb.parameters) or "none"
            raise self._wrong(f"{verb.name}: there is no parameter {name}=; there is {names}", verb)
        if known.name in self._parameters:
            raise self._wrong(f"{verb.name}: {name}= is given twice", verb)
        if known.boolean and value.lower() not in TRUTH:
            raise self._wrong(f"{verb.name}: {name}={value!r} is neither yes nor no", verb)
        if known.choices and value not in known.choices:
            raise self._wrong(f"{verb.name}: {name}={value!r} is none of {', '.join(known.choices)}", verb)
        self._parameters[known.name] = value

    def _call(self, verb: Verb) -> Call:
        given, arguments = list(self._positional), {}
        for argument in verb.arguments:
            count = len(given) if argument.many else 1
            values, given = given[:count], given[count:]
            if not values and (argument.needed or not (argument.many or argument.optional)):
                raise self._wrong(f"{verb.name}: {argument.name} is missing", verb)
            for value in values:
                if argument.choices and value not in argument.choices:
                    raise self._wrong(f"{verb.name}: {value!r} is none of {', '.join(argument.choices)}", verb)
            arguments[argument.name] = tuple(values)
        if given:
            raise self._wrong(f"{verb.name}: {given[0]!r} is one argument too many", verb)
        for parameter in verb.parameters:
            if parameter.required and parameter.name not in self._parameters:
                raise self._wrong(f"{verb.name}: {parameter.name}= is missing", verb)
        options = Options(config=self._config, debug=self._debug, json=self._json)
        return Call(prog=self._prog, verb=verb, arguments=arguments, parameters=self._parameters, options=options)

    def _wrong(self, message: str, verb: Verb | None = None) -> UsageError:
        if verb is None:
            return UsageError(message, hint=f"{self._prog} help")
        return UsageError(message, usage=f"{self._prog} {verb.usage}", hint=f"{self._prog} {verb.name} help")
