"""How a person is asked for an argument of `sample`: what conditions and modalities tell an interface."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Control:
    """One input of an interface. What is entered there is text that the argument's own parser reads; nothing entered
    leaves the argument to its default.

    title: its name for people. choices: all values it has, of which any number may be chosen. lines: each line of text
    is one value (a line may contain commas). examples: values to start from. hint: what may be entered, with the range
    seen in training. negative: whether the argument also has a meaning as what guidance leads away from.
    """

    title: str
    choices: tuple[str, ...] = ()
    lines: bool = False
    examples: tuple[str, ...] = ()
    hint: str = ""
    negative: bool = False

    def value(self, entered: object) -> object | None:
        """Return what was entered as the argument's value; None if nothing was.

        entered: a text, or the list of what was chosen.
        """
        if isinstance(entered, list | tuple):
            return [str(part) for part in entered] or None
        text = "" if entered is None else str(entered)
        if self.lines:
            return [line.strip() for line in text.splitlines() if line.strip()] or None
        return text.strip() or None
