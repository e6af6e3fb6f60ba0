"""PyTorch's RNN, LSTM and GRU in JAX and Flax: the same arguments, parameters and numbers.

The order in which to read the package:

1. `cells`: what one step computes. `more_cells`: cells that torch does not have.
2. `spec` and `options`: what to compute, and how to run it.
3. `steps`: one step of a layer, with its weights. `layouts`: the layout of its gates.
4. `engines`: the loop over time.
5. `recurrence`: one layer in one direction, and its derivative. `rules`: derivative rules that are right under vmap.
6. `stack`: all layers and directions.
7. `calls`: `apply` and its relatives: checks, and conversion to what `stack` takes.
8. `nnx` and `linen`: parameters and randomness.

`packed` and `checkpoint` can be read on their own.

To add a cell, write it in `more_cells`; a format of files, see `checkpoint/files`; an engine, `engines/__init__`; an
option, add a field to `options.Options`, a keyword to its TypedDict and to the modules, its sentence to
`_docs.ARGUMENTS`, and use it where it acts.
"""

from jaxrnn import checkpoint, linen
from jaxrnn._core.calls import Trajectory, apply, apply_cell, trajectory
from jaxrnn._version import __version__
from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, RNN_TANH, Cell, Parameter
from jaxrnn.checkpoint import CheckpointError, from_flax, from_torch, load_state_dict, state_dict
from jaxrnn.more_cells import IND_RNN_CELL, LAYER_NORM_LSTM_CELL, MIN_GRU_CELL, PEEPHOLE_LSTM_CELL
from jaxrnn.nnx import GRU, LSTM, RNN, FlaxCell, GRUCell, LSTMCell, Recurrent, RNNCell
from jaxrnn.packed import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
    unpack_sequence,
    unpad_sequence,
)
from jaxrnn.spec import CellSpec, Spec

__all__ = [
    "GRU",
    "GRU_CELL",
    "IND_RNN_CELL",
    "LAYER_NORM_LSTM_CELL",
    "LSTM",
    "LSTM_CELL",
    "MIN_GRU_CELL",
    "PEEPHOLE_LSTM_CELL",
    "RNN",
    "RNN_RELU",
    "RNN_TANH",
    "Cell",
    "CellSpec",
    "CheckpointError",
    "FlaxCell",
    "GRUCell",
    "LSTMCell",
    "PackedSequence",
    "Parameter",
    "RNNCell",
    "Recurrent",
    "Spec",
    "Trajectory",
    "__version__",
    "apply",
    "apply_cell",
    "checkpoint",
    "from_flax",
    "from_torch",
    "linen",
    "load_state_dict",
    "pack_padded_sequence",
    "pack_sequence",
    "pad_packed_sequence",
    "pad_sequence",
    "state_dict",
    "trajectory",
    "unpack_sequence",
    "unpad_sequence",
]
