"""PyTorch's RNN, LSTM and GRU in JAX and Flax: the same arguments, parameters and numbers."""

from jaxrnn import checkpoint
from jaxrnn._version import __version__
from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, RNN_TANH, Cell
from jaxrnn.checkpoint import CheckpointError, from_torch, load_state_dict, state_dict
from jaxrnn.nnx import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
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
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Spec",
    "__version__",
    "apply",
    "apply_cell",
    "checkpoint",
    "from_torch",
    "load_state_dict",
    "state_dict",
]
