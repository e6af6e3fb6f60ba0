"""A recurrent cell in a file of Keras: its weights, the settings that the file says, and what becomes of them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxrnn.activations import Activation
from jaxrnn.cells import Cell
from jaxrnn.checkpoint.dialects import DIALECTS
from jaxrnn.checkpoint.errors import RESET_BEFORE, CheckpointError, printable
from jaxrnn.checkpoint.formats.keras_activations import MAKERS, activations_of, cell_of
from jaxrnn.checkpoint.formats.keras_config import TABLES, GroupPath, KerasCell, shown
from jaxrnn.checkpoint.formats.reading import words_on_cell
from jaxrnn.checkpoint.tables import Finding

_DROPOUTS = ("dropout", "recurrent_dropout")  # which act on the input and on h, by one mask for all steps
_KINDS = {4: "LSTM", 3: "GRU", 1: "SimpleRNN"}  # by gates


class Part(NamedTuple):
    """The weights of one cell: of a layer, in one direction.

    Attributes:
        group: where they are in the file.
        arrays: Keras's, by name.
        cell: what the configuration says of it; None if it does not.
        levels: how many cells are stacked there.
        title: the name of the cell, where the file says it.
    """

    group: GroupPath
    arrays: dict[str, np.ndarray]
    cell: KerasCell | None
    levels: int
    title: str | None

    @property
    def gates(self) -> int:
        hidden, columns = self.arrays["recurrent_kernel"].shape
        return int(columns // hidden)

    @property
    def kind(self) -> str:
        """The class in Keras, by the number of gates."""
        return _KINDS.get(self.gates, "")

    @property
    def settings(self) -> dict[str, Any]:
        return self.cell.settings if self.cell else {}

    @property
    def activations(self) -> dict[str, Activation | None]:
        """By the names of settings; None for one that jaxrnn does not know."""
        return activations_of(self.kind, self.settings, self.cell.version if self.cell else None)

    @property
    def rnn(self) -> Cell:
        """The cell that computes the same."""
        return cell_of(self.kind, self.settings, self.cell.version if self.cell else None)

    def weights(self) -> dict[str, np.ndarray]:
        """torch's, by role."""
        try:
            return DIALECTS["keras", self.kind].read(self.arrays)
        except CheckpointError as error:
            raise CheckpointError(f"{'/'.join(self.group)}: {error}") from error

    @property
    def form(self) -> tuple[Any, ...]:
        """What all layers and directions of a module of torch have in common."""
        state = self.arrays["recurrent_kernel"]
        return self.kind, state.shape, state.dtype, "bias" in self.arrays, self.rnn


Parts = dict[tuple[str, int], Part]  # by the attribute of a Bidirectional that has it, or "", and by the level


def lacking(part: Part) -> dict[str, str]:
    """Why torch does not have a cell: the reasons, each with a remedy or ""."""
    hidden, columns = part.arrays["recurrent_kernel"].shape
    bias, settings = part.arrays.get("bias"), part.settings
    kind = part.cell.chain[-1].kind if part.cell else part.kind
    if kind.removesuffix("Cell") != part.kind or not part.kind:
        name = kind.removeprefix("~")
        same = part.kind and name.removesuffix("Cell") == part.kind
        return {f"{name} that is not Keras's" if same else f"{name or 'a layer'} of {part.gates} gates": ""}
    if bias is not None and bias.shape == (2 * columns,):
        return {f"CuDNN{part.kind}'s layout": ""}
    unknown = [name for name, each in part.activations.items() if each is None]
    given = ", ".join(f"{name}=yours" for name in unknown)
    remedy = (
        f"has an activation that jaxrnn does not know: read its arrays with DIALECTS['keras', {part.kind!r}] of "
        f"jaxrnn.checkpoint.dialects, and make its cell with jaxrnn.{MAKERS[part.kind].__name__}({given})"
    )
    reasons = {shown(name, settings[name]): remedy for name in unknown}
    if part.cell and settings.get("units", hidden) != hidden:
        reasons[f"{shown('units', settings['units'])} in the configuration, and {hidden} in its weights"] = ""
    after = settings.get("reset_after", part.cell is None if bias is None else bias.ndim == 2)
    if part.kind == "GRU" and after is not True:
        reasons["reset_after=False, where torch's GRU has True"] = RESET_BEFORE
    return reasons


def findings(part: Part) -> Iterator[Finding]:
    for node in part.cell.chain if part.cell else ():
        if node.kind in TABLES:
            yield from TABLES[node.kind].findings(node.settings)


def words_on_activations(part: Part) -> Iterator[str]:
    """Warnings about activations other than those of torch's module of this kind."""
    yield from words_on_cell(part.rnn)
    if part.cell and part.cell.version is None and "hard_sigmoid" in map(part.settings.get, part.activations):
        yield (
            "has hard_sigmoid, and the file does not say its keras_version: jaxrnn assumes that of Keras 2; for "
            "that of Keras 3 make the cell with 'hard_sigmoid' in place of HardSigmoid(alpha=0.2, beta=0.5)"
        )


def drops(part: Part) -> list[str]:
    """The dropout of a cell."""
    return [shown(name, part.settings[name]) for name in _DROPOUTS if part.settings.get(name)]


def in_training(parts: Parts) -> tuple[str, ...]:
    """What Keras does in training alone, and how to do the same here."""
    settings = [part.settings for part in parts.values()]
    words = []
    for name in _DROPOUTS:
        several = list(dict.fromkeys(shown(name, each.get(name) or 0) for each in settings))
        if len(several) > 1:
            words.append(f"{' and '.join(several)} in its cells: make a module of one layer and direction for each")
        elif not (rate := settings[0].get(name)):
            continue
        elif name == "recurrent_dropout":
            words.append(f"{several[0]}: make the module with {several[0]}, which has one mask for all gates")
        else:
            axis = 0 if settings[0].get("time_major") else 1
            between = f", and the module with {several[0]}, variational_dropout=True" * any(level for _, level in parts)
            words.append(f"{several[0]}: put flax's Dropout({rate}, broadcast_dims=({axis},)) before it{between}")
    return tuple(map(printable, words))
