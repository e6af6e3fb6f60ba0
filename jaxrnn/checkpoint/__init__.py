"""Checkpoints: files to tensors by name, and those into Flax modules, and back."""

from jaxrnn.checkpoint import linen
from jaxrnn.checkpoint.errors import CheckpointError
from jaxrnn.checkpoint.files import load
from jaxrnn.checkpoint.find import FoundRNN, find_rnns
from jaxrnn.checkpoint.modules import from_torch, load_state_dict, state_dict
from jaxrnn.checkpoint.names import fold
from jaxrnn.checkpoint.write import save

__all__ = [
    "CheckpointError",
    "FoundRNN",
    "find_rnns",
    "fold",
    "from_torch",
    "linen",
    "load",
    "load_state_dict",
    "save",
    "state_dict",
]
