"""What all formats share: what is to be read, and how they warn."""

import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

from jaxrnn.checkpoint.errors import CheckpointError, printable
from jaxrnn.spec import level_outside


class Reading(NamedTuple):
    """What to read from a file.

    Attributes:
        key: the key of nested dicts under which the tensors are; None for those at the top.
        only_tensors: whether to leave out objects beside the tensors.
        dequantize: whether to compute the weights of quantized modules.
        note: is told in words which of nested dicts was taken, and what was left out.
    """

    key: str | None = None
    only_tensors: bool = False
    dequantize: bool = False
    note: Callable[[str], None] = lambda text: None

    def check_no_key(self, what: str) -> None:
        """Refuse a key for a format that nests no dicts."""
        if self.key is not None:
            raise CheckpointError(
                f"{what} has no dicts in it, and so no key {self.key!r}\nleave out key=, or --key on the command line"
            )


def warn(path: str | os.PathLike[str], text: str, remedy: str = "") -> None:
    """Warn of a file. What comes from it, such as a name, must not look like lines of the warning."""
    lines = [f"{os.fspath(path)}: {printable(text)}", *([printable(remedy)] if remedy else [])]
    warnings.warn("\n".join(lines), stacklevel=level_outside())
