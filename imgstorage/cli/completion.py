"""Completion for bash and zsh: words from the verbs; hosts and volumes by asking, if that is answered at once.

The shells' scripts call ``imgstorage _complete -- WORD…`` with the words up to the cursor, the last one unfinished, and
get one candidate a line. Nothing is ever said on stderr, and nothing takes longer than ``PATIENCE_S``.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from types import FrameType

from imgstorage.cli.grammar import Argument, Call, Verb, starting_with
from imgstorage.cli.out import put
from imgstorage.core.errors import EXIT_OK, ImgStorageError

PATIENCE_S = 1.0

BASH = """# bash completion for imgstorage, and for rocks where nothing else completes it
_imgstorage() {
    local line words current
    # Words of the shell's own making end at = and : as well; these are the user's, split at blanks.
    line=${COMP_LINE:0:COMP_POINT}
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    current=${words[-1]}
    local IFS=$'\\n'
    COMPREPLY=($(imgstorage _complete -- "${words[@]:1}" 2>/dev/null))
    # Readline replaces only what follows the last = or : of the word.
    local prefix=${current%"${current##*[=:]}"}
    COMPREPLY=("${COMPREPLY[@]#"$prefix"}")
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=/] ]] && compopt -o nospace
    return 0
}
complete -F _imgstorage imgstorage
complete -p rocks >/dev/null 2>&1 || complete -F _imgstorage rocks
"""

ZSH = """#compdef imgstorage
# zsh completion for imgstorage
_imgstorage() {
    local -a found
    found=("${(@f)$(imgstorage _complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    compadd -S '' -- ${(M)found:#*[=/]}
    compadd -- ${found:#*[=/]}
}
compdef _imgstorage imgstorage
"""


def script(call: Call) -> int:
    """``completion bash|zsh``."""
    put({"bash": BASH, "zsh": ZSH}[call.one("SHELL")], end="")
    return EXIT_OK


def complete(call: Call) -> int:
    """``_complete WORD…``: the candidates for the last word."""
    from imgstorage.cli.verbs import VERBS

    words = call.many("WORD") or ("",)
    for candidate in candidates(VERBS, words[:-1], words[-1], call):
        put(candidate)
    return EXIT_OK


def candidates(verbs: Sequence[Verb], before: Sequence[str], current: str, call: Call | None = None) -> list[str]:
    """What may stand in place of ``current``; with a ``call``, its frontend is asked for hosts and volumes."""
    words: tuple[str, ...] = ()
    rest = list(before)
    while rest and starting_with(verbs, (*words, rest[0])):
        words = (*words, rest.pop(0))
    found = starting_with(verbs, words)
    verb = next((verb for verb in found if verb.words == words), None)
    offered = [] if rest else list(dict.fromkeys(one.words[len(words)] for one in found if len(one.words) > len(words)))
    if verb is not None:
        offered += _parameters(verb, rest, current)
        argument = _argument(verb, [word for word in rest if "=" not in word])
        if argument is not None and "=" not in current:
            offered += argument.choices
            if argument.offers and call is not None:
                offered += _asked(call, argument.offers, rest)
    return sorted({word for word in offered if word.startswith(current)})


def _parameters(verb: Verb, rest: Sequence[str], current: str) -> list[str]:
    given = {word.partition("=")[0] for word in rest if "=" in word}
    offered = []
    for parameter in verb.parameters:
        values = ("yes", "no") if parameter.boolean else parameter.choices
        if current.startswith(f"{parameter.name}="):
            begun = current.partition("=")[2]
            if parameter.path:
                values = _paths(begun)
            elif parameter.name == "output-col" and verb.columns:
                values = _columns(verb, begun)
            offered += [f"{parameter.name}={value}" for value in values]
        elif parameter.name not in given:
            offered.append(f"{parameter.name}=")
    return offered


def _paths(begun: str) -> tuple[str, ...]:
    """The files and folders here whose paths begin so."""
    from glob import escape, glob

    return tuple(f"{path}/" if os.path.isdir(path) else path for path in glob(f"{escape(begun)}*"))


def _columns(verb: Verb, begun: str) -> tuple[str, ...]:
    """What may be added to a list of columns, after its last comma."""
    from importlib import import_module

    module, _, name = verb.columns.partition(":")
    chosen = begun.rpartition(",")[0]
    columns = [column.key for column in getattr(import_module(module), name)]
    return tuple(f"{chosen},{key}" if chosen else key for key in columns if key not in chosen.split(","))


def _argument(verb: Verb, given: Sequence[str]) -> Argument | None:
    if verb.arguments and verb.arguments[-1].many:
        return verb.arguments[min(len(given), len(verb.arguments) - 1)]
    return verb.arguments[len(given)] if len(given) < len(verb.arguments) else None


class _TooLate(BaseException):
    """Nobody waits for a completion any longer."""


def _asked(call: Call, what: str, rest: Sequence[str]) -> list[str]:
    def late(_number: int, _frame: FrameType | None) -> None:
        raise _TooLate

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    try:
        from imgstorage.cli import rows
        from imgstorage.cli.client import frontend
        from imgstorage.core import names
        from imgstorage.core.messages import HostList, ListHosts

        with frontend(call) as door:
            if what in ("nas", "container"):
                return list(rows.of_role(door, what))
            if what == "pool":
                found_hosts = door.ask(ListHosts(), HostList).rows
                return [pool.name for row in found_hosts if rest and row.host == rest[0] for pool in row.pools]
            pool = rest[1] if len(rest) > 1 else ""
            found = rows.zvols(door, names.host_name(rest[0])) if rest else []
            return [row.volume for row in found if pool in ("", row.pool)]
    except (ImgStorageError, _TooLate):
        return []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
