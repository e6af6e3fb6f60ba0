"""The exception that reading, checking and loading checkpoints raise."""

import codecs
import contextlib
import os
from collections.abc import Iterable, Iterator

AGAIN = "download or copy it again"
# What to do about a GRU that torch does not have.
RESET_BEFORE = (
    "multiplies r * h by a matrix within its step: write a jaxrnn.Cell with that matrix, as "
    "examples/other_libraries.md does"
)


class CheckpointError(ValueError):
    """A checkpoint or a set of tensors cannot be used.

    The message starts with the file's path, or with the module's class from `jaxrnn.load_state_dict`; the cause
    follows, with the keys if there are any, and a line with the remedy.

    >>> from jaxrnn import checkpoint
    >>> try:
    ...     checkpoint.load("nowhere.pt")
    ... except checkpoint.CheckpointError as error:
    ...     print(error)
    nowhere.pt: no such file
    check the path and its permissions
    """


class UnreadableError(CheckpointError):
    """An array in a file cannot be read. The message starts with the file's path."""


@contextlib.contextmanager
def about(path: str | os.PathLike[str], remedy: str = "check the path and its permissions") -> Iterator[None]:
    """Put the path first in the message of any CheckpointError, and of the system's errors, which get a remedy."""
    try:
        yield
    except UnreadableError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{os.fspath(path)}: {os_cause(error)}\n{remedy}") from error


def os_cause(error: OSError) -> str:
    """Why the operating system refused a file."""
    causes = {FileNotFoundError: "no such file", PermissionError: "permission denied"}
    return causes.get(type(error)) or error.strerror or str(error)


def check_unicode(name: str) -> None:
    """Refuse a name with half of a surrogate pair, which a pickle can hold and other formats cannot."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        name = name.encode(errors="backslashreplace").decode()
        raise CheckpointError(f"the name {name} is not valid Unicode\nrename that tensor") from error


def as_text(value: str | bytes) -> str:
    """A name from a file, which some readers give as bytes."""
    return value if isinstance(value, str) else bytes(value).decode(errors="backslashreplace")


def printable(text: str) -> str:
    """The text on one line, and without control characters: a name may hold any, which could steer a terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def listed(names: Iterable[object], limit: int = 20) -> str:
    """Names for a message: the first few, and how many more there are."""
    names = list(names)
    text = ", ".join(map(str, names[:limit]))
    return text + (f", ... ({len(names) - limit} more)" if len(names) > limit else "")


def is_text(head: bytes) -> bool:
    """Whether the first bytes of a file are text."""
    try:
        # Incremental, because the end of head may split a character.
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)
