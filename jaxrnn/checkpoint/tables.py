"""Closed tables: for every setting of another library, what becomes of it here.

A reader or converter has a table for each kind of thing that it meets: a class's fields, a node's attributes, the keys
of a configuration. What no table names is unknown, and is reported as such. A test compares each table with the other
library's own list of settings.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

UNKNOWN = "jaxrnn does not know what it does: compare the outputs with the original's"


class Row(NamedTuple):
    """What becomes of a setting.

    Attributes:
        use: "used": the code that has the table reads it. "neutral": it changes no result. "refused" and "warned": of a
            value that is not plain.
        plain: the values that change no result, for "refused" and "warned".
        words: for "neutral" the reason, for "refused" and "warned" the remedy.
    """

    use: Literal["used", "neutral", "refused", "warned", "unknown"]
    plain: tuple[Any, ...] = ()
    words: str = ""


USED = Row("used")


def neutral(reason: str) -> Row:
    return Row("neutral", (), reason)


def refused(*plain: Any, remedy: str) -> Row:
    return Row("refused", plain, remedy)


def warned(*plain: Any, remedy: str) -> Row:
    return Row("warned", plain, remedy)


class Finding(NamedTuple):
    """A setting with a value that is refused, warned of, or unknown.

    Attributes:
        name: the setting's.
        value: the value that was found.
        row: its row in the table.
    """

    name: str
    value: Any
    row: Row

    @property
    def refused(self) -> bool:
        return self.row.use == "refused"

    def __str__(self) -> str:
        """The setting and its value, on one line and shortened: a file may hold anything."""
        value = " ".join(repr(self.value).split())
        return f"{self.name}={value if len(value) <= 80 else value[:77] + '...'}"


class Table(dict[str, Row]):
    """The rows for one kind of thing, by the names of its settings.

    Args:
        title: the library's class, or what else has the settings.
        rows: by setting.
    """

    def __init__(self, title: str, rows: Mapping[str, Row]) -> None:
        super().__init__(rows)
        self.title = title

    def findings(self, settings: Mapping[str, Any]) -> Iterator[Finding]:
        """What is to be said of settings; nothing of those that are used, neutral, or have a plain value."""
        for name, value in settings.items():
            row = self.get(name, Row("unknown", (), UNKNOWN))
            if row.use not in ("used", "neutral") and not any(_same(value, plain) for plain in row.plain):
                yield Finding(name, value, row)


def _same(value: Any, plain: Any) -> bool:
    """Whether a value is a plain one: of the same kind, because 0 == False, and an array equals nothing."""
    if isinstance(plain, bool) or isinstance(value, bool) or plain is None or callable(plain):
        return value is plain
    try:
        return type(value == plain) is bool and value == plain
    except (TypeError, ValueError):
        return False
