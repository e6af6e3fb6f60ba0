"""Lay out code as `ruff format` does, and turn text from a file into code that cannot be anything else."""

import builtins
import keyword
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxrnn.checkpoint.errors import printable

WIDTH = 100
_LONGEST = 40  # of a name that is made from one in a file


class Group(NamedTuple):
    """Code in brackets, which may be split at the commas.

    Attributes:
        start: what is before the items, with the opening bracket.
        items: what the commas separate.
        end: the closing bracket or brackets.
    """

    start: str
    items: Sequence["Code"]
    end: str

    def __str__(self) -> str:
        return self.start + ", ".join(map(str, self.items)) + self.end


class Loop(NamedTuple):
    """Code that is run several times, in a comprehension."""

    code: "Code"
    times: int

    def __str__(self) -> str:
        return f"{self.code} for _ in range({self.times})"


Code = str | Group | Loop


def laid_out(before: str, code: Code, after: str = "", depth: int = 0) -> list[str]:
    """The lines of `before`, `code` and `after`, indented `depth` times."""
    indent = "    " * depth
    line = f"{indent}{before}{code}{after}"
    if isinstance(code, str) or len(line) <= WIDTH:
        return [line]
    if isinstance(code, Loop):
        return [*laid_out(before, code.code, "", depth), f"{indent}for _ in range({code.times}){after}"]
    inside = ", ".join(map(str, code.items))
    if len(indent) + 4 + len(inside) <= WIDTH:
        body = [f"{indent}    {inside}"]
    elif len(code.items) == 1:
        body = laid_out("", code.items[0], "", depth + 1)
    else:
        body = [line for item in code.items for line in laid_out("", item, ",", depth + 1)]
    return [f"{indent}{before}{code.start}", *body, f"{indent}{code.end}{after}"]


def comment(text: str, depth: int, hanging: str = "") -> list[str]:
    """A comment of any length, as lines."""
    start = "    " * depth + "# "
    return textwrap.wrap(
        printable(text),
        WIDTH,
        initial_indent=start,
        subsequent_indent=start + hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def quoted(text: str) -> str:
    """A string as a literal, in double quotes where that needs no escapes."""
    literal = repr(text)
    return f'"{literal[1:-1]}"' if '"' not in text and "'" not in text else literal


def is_name(text: str) -> bool:
    """Whether it can be written as an attribute. Python would change others: it normalizes and mangles names."""
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text) and not text.startswith("__")


class NewNames:
    """Makes names that are not taken."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = {*taken, *keyword.kwlist, *dir(builtins)}
        self._numbers: dict[str, int] = {}

    def attribute(self, text: str) -> str:
        """A name for the attribute that is named otherwise in a file."""
        plain = re.sub(r"\W", "_", text[:_LONGEST], flags=re.ASCII).strip("_") or "layer"
        plain = f"layer_{plain}" if plain[0].isdigit() else plain
        return self._free(f"{plain}_" if plain in self._taken else plain)

    def of_class(self, text: str) -> str:
        """A name for the class of what has this name in a file."""
        words = re.findall(r"[A-Za-z0-9]+", text[:_LONGEST])
        plain = "".join(word[0].upper() + word[1:] for word in words)
        return self._free(f"Module{plain}" if not plain or plain[0].isdigit() else plain)

    def _free(self, name: str) -> str:
        free = name
        while free in self._taken:
            self._numbers[name] = self._numbers.get(name, 1) + 1
            free = f"{name}{self._numbers[name]}"
        self._taken.add(free)
        return free


def singular(text: str) -> str:
    """What an item of a list is called."""
    return text[:-1] if re.fullmatch(r"\w+[^su\W]s", text) else text
