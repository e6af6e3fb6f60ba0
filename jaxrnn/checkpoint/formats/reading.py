"""What all formats share: what is to be read, and how they warn."""

import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, RNN_TANH, Cell
from jaxrnn.checkpoint.errors import CheckpointError, printable
from jaxrnn.spec import level_outside


class Reading(NamedTuple):
    """What to read from a file.

    Attributes:
        key: the key of nested dicts under which the tensors are; None for those at the top.
        only_tensors: whether to leave out objects beside the tensors.
        dequantize: whether to compute the weights of quantized modules.
        note: gets a sentence about the nested dict that was taken, and about what was left out.
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


def said_of_cell(cell: Cell) -> dict[str, Any]:
    """The settings that a layer's activations imply, and weights do not: an entry of `Described.said`."""
    if cell in (RNN_TANH, RNN_RELU):
        return {"nonlinearity": "relu" if cell == RNN_RELU else "tanh"}
    return {} if cell in (LSTM_CELL, GRU_CELL) else {"cell": cell}


def words_on_cell(cell: Cell) -> list[str]:
    """Warnings about activations other than those of torch's module of this kind."""
    if cell == RNN_RELU:
        return ["has relu, which weights do not say: make the module with nonlinearity='relu'"]
    if "cell" not in said_of_cell(cell):
        return []
    remedy = "make the module as jaxrnn.Recurrent(cell, ...) with the cell that find_rnns gives"
    return [f"has other activations, which weights do not say: {remedy}, {cell.name}"]
