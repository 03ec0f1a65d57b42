"""``sandbox …``: handed to the sandbox, which is imported only then."""

from __future__ import annotations

import shlex

from imgstorage.cli.errors import StillRunning
from imgstorage.cli.grammar import Call


def run(call: Call) -> int:
    """One sandbox verb; the status of ``sandbox exec`` is that of the command."""
    verb = call.verb.words[1]
    where = f" dir={shlex.quote(call.parameters['dir'])}" if "dir" in call.parameters else ""
    try:
        from imgstorage.sandbox import command

        return command.run(verb, [*call.many("HOST"), *call.many("COMMAND")], dict(call.parameters))
    except KeyboardInterrupt:
        if verb in ("up", "down"):
            raise StillRunning(
                "parts of the sandbox may be running", f"{call.prog} sandbox down{where}, or sandbox {verb} once more"
            ) from None
        raise
