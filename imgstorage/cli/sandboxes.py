"""``sandbox …``: handed to the sandbox, which is imported only then."""

from __future__ import annotations

from imgstorage.cli.grammar import Call, UsageError


def run(call: Call) -> int:
    """One sandbox verb; the status of ``sandbox exec`` is that of the command."""
    verb = call.verb.words[1]
    arguments = [*call.many("HOST"), *call.many("COMMAND")]
    if verb == "exec" and not call.many("COMMAND"):
        usage = f"{call.prog} {call.verb.usage}"
        raise UsageError("sandbox exec: COMMAND is missing", usage=usage, hint=f"{call.prog} sandbox exec help")

    from imgstorage.sandbox import command

    return command.run(verb, arguments, dict(call.parameters))
