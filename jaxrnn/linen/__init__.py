"""RNN, LSTM, GRU, their cells, and Recurrent as flax.linen modules with torch's arguments and parameters.

`params` has the keys of torch's `state_dict()`.
"""

from jaxrnn.linen.cells import FlaxCell, GRUCell, LSTMCell, RNNCell
from jaxrnn.linen.layers import GRU, LSTM, RNN
from jaxrnn.linen.recurrent import Recurrent
from jaxrnn.linen.sequential import OutputOnly

__all__ = ["GRU", "LSTM", "RNN", "FlaxCell", "GRUCell", "LSTMCell", "OutputOnly", "RNNCell", "Recurrent"]
