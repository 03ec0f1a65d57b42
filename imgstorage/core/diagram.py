"""The state machine's diagram and table as Markdown, drawn from ``machine.RULES``: ``docs/state-machine.md``.

``python -m imgstorage.core.diagram`` prints it; a test compares it with the file.
"""

from __future__ import annotations

from imgstorage.core import events as ev
from imgstorage.core.machine import LATE, PHASES, RULES
from imgstorage.core.mapping import PUBLIC, Mode

HEAD = """# The state machine

Drawn from the table in `imgstorage/core/rules.py` by `make docs`; do not edit.

Four public states are derived from the phases: {states}.
"""


def markdown() -> str:
    """The whole page: per mode one diagram of what moves, and one table with every phase's every answer."""
    states = ", ".join(sorted({f"`{public.value}`" for public in PUBLIC.values()}))
    return "\n".join([HEAD.format(states=states), *(_mode(mode) for mode in Mode)])


def _mode(mode: Mode) -> str:
    lines = [f"## {mode.value}", "", "```mermaid", "stateDiagram-v2", "    [*] --> idle"]
    lines += [f"    {phase.value}: {phase.value}<br/>{PUBLIC[phase].value}" for phase in PHASES[mode]]
    arrows: dict[tuple[str, str], list[str]] = {}
    for (its_mode, phase, event), rules in RULES.items():
        for rule in rules if its_mode is mode else ():
            if rule.to is not None:
                names = arrows.setdefault((phase.value, rule.to.value), [])
                if event.__name__ not in names:
                    names.append(event.__name__)
    lines += [f"    {start} --> {end}: {', '.join(names)}" for (start, end), names in arrows.items()]
    lines += ["```", "", "| phase | event | if | goes to | steps | note |", "|---|---|---|---|---|---|"]
    for phase in PHASES[mode]:
        for event in ev.EVENTS:
            for rule in RULES.get((mode, phase, event), ()):
                if rule is LATE:
                    cells = [phase.value, event.__name__, "", "", "", "late: changes nothing"]
                else:
                    to = f"refused: `{rule.refuse}`" if rule.refuse else rule.to.value if rule.to else ""
                    steps = " ".join(f"`{step.value}`" for step in rule.steps)
                    cells = [phase.value, event.__name__, rule.when, to, steps, rule.note.replace("|", "\\|")]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(markdown(), end="")
