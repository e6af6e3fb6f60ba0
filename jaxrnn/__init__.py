"""PyTorch's RNN, LSTM and GRU in JAX and Flax: the same arguments, parameters and numbers.

To read the package, begin with what one step computes, `cells`, and what there is to set, `spec` and `options`. Then
`recurrence` runs one layer in one direction over time (`layouts` says where its gates lie, `rules` keeps derivative
rules right under vmap), `stack` runs all layers, and `calls` turns what a user gives into what `stack` takes. `nnx` and
`linen` add parameters and randomness. `packed` and `checkpoint` can be read on their own.
"""

from jaxrnn import checkpoint, linen
from jaxrnn._version import __version__
from jaxrnn.calls import Trajectory, apply, apply_cell, trajectory
from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, RNN_TANH, Cell, Parameter
from jaxrnn.checkpoint import CheckpointError, from_torch, load_state_dict, state_dict
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
