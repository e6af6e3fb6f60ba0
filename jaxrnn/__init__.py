"""PyTorch's RNN, LSTM and GRU in JAX and Flax: the same arguments, parameters and numbers."""

from jaxrnn import checkpoint, linen
from jaxrnn._version import __version__
from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, RNN_TANH, Cell
from jaxrnn.checkpoint import CheckpointError, from_torch, load_state_dict, state_dict
from jaxrnn.nnx import GRU, LSTM, RNN, FlaxCell, GRUCell, LSTMCell, RNNCell
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
from jaxrnn.stack import apply, apply_cell

__all__ = [
    "GRU",
    "GRU_CELL",
    "LSTM",
    "LSTM_CELL",
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
    "RNNCell",
    "Spec",
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
    "unpack_sequence",
    "unpad_sequence",
]
