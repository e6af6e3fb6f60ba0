"""RNN, LSTM, GRU, their cells, and Recurrent as flax.nnx modules with torch's arguments and parameters."""

from jaxrnn.nnx.cells import FlaxCell, GRUCell, LSTMCell, RNNCell
from jaxrnn.nnx.layers import GRU, LSTM, RNN
from jaxrnn.nnx.recurrent import Recurrent
from jaxrnn.nnx.sequential import OutputOnly

__all__ = ["GRU", "LSTM", "RNN", "FlaxCell", "GRUCell", "LSTMCell", "OutputOnly", "RNNCell", "Recurrent"]
