"""PyTorch's RNN, LSTM and GRU in JAX and Flax: the same arguments, parameters and numbers.

What people use, in the order in which to read it:

1. `cells`: what one step computes. `more_cells`: cells that torch does not have. `activations`: torch's cells with
   other activations.
2. `spec`: a layer's or a cell's settings, and the names and shapes of its parameters. `initializers`: other initial
   values than torch's. `torch_random`: torch's own from its seed.
3. `functions`: `apply` and its relatives, for parameters that no module holds.
4. `nnx` and `linen`: modules, which add parameters and randomness.
5. `packed`: rows of different lengths. `engines`: what runs the loop over time. `checkpoint`: files, and other
   libraries.

The engine room is `_core`: what runs a call.

To add a cell, write it in `more_cells`; an engine, see `engines`; a format of files, `checkpoint/formats`; another
library's layout of weights, `checkpoint/dialects`. To add an option:

- a field of `Options` in `_core/options`, and its sentence in `.ci/docs.py`;
- a keyword in `functions`, `nnx/layers`, `nnx/recurrent` and `linen/base`, and an attribute in `nnx/base`;
- its use: around a call in `_core/calls`, around layers in `_core/stack`, within a loop in `engines`.
"""

from jaxrnn import activations, checkpoint, initializers, linen
from jaxrnn._version import __version__
from jaxrnn.activations import gru_cell, lstm_cell, rnn_cell
from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, RNN_TANH, Cell, Parameter
from jaxrnn.checkpoint import CheckpointError, from_flax, from_torch, load_state_dict, state_dict, torch_init
from jaxrnn.functions import Trajectory, apply, apply_cell, apply_step, plain_jaxprs, trajectory
from jaxrnn.more_cells import IND_RNN_CELL, LAYER_NORM_LSTM_CELL, MIN_GRU_CELL, PEEPHOLE_LSTM_CELL, zoneout
from jaxrnn.nnx import GRU, LSTM, RNN, FlaxCell, GRUCell, LSTMCell, OutputOnly, Recurrent, RNNCell
from jaxrnn.packed import (
    PackedSequence,
    flip_sequences,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
    unpack_sequence,
    unpad_sequence,
)
from jaxrnn.spec import CellSpec, Spec
from jaxrnn.torch_random import TorchGenerator

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
    "OutputOnly",
    "PackedSequence",
    "Parameter",
    "RNNCell",
    "Recurrent",
    "Spec",
    "TorchGenerator",
    "Trajectory",
    "__version__",
    "activations",
    "apply",
    "apply_cell",
    "apply_step",
    "checkpoint",
    "flip_sequences",
    "from_flax",
    "from_torch",
    "gru_cell",
    "initializers",
    "linen",
    "load_state_dict",
    "lstm_cell",
    "pack_padded_sequence",
    "pack_sequence",
    "pad_packed_sequence",
    "pad_sequence",
    "plain_jaxprs",
    "rnn_cell",
    "state_dict",
    "torch_init",
    "trajectory",
    "unpack_sequence",
    "unpad_sequence",
    "zoneout",
]
