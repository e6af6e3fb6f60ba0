"""PyTorch's RNN, LSTM and GRU in JAX and Flax: the same arguments, parameters and numbers."""

from jaxrnn._version import __version__
from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, RNN_TANH, Cell
from jaxrnn.nnx import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from jaxrnn.spec import CellSpec, Spec
from jaxrnn.stack import apply, apply_cell
