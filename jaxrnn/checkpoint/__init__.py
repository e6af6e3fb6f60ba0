"""Checkpoints: read files into tensors by name, load these into Flax modules, and back."""

from jaxrnn.checkpoint import dialects, linen
from jaxrnn.checkpoint.errors import CheckpointError
from jaxrnn.checkpoint.files import load, load_tree
from jaxrnn.checkpoint.find import FoundRNN, find_rnns
from jaxrnn.checkpoint.flax_cells import from_flax
from jaxrnn.checkpoint.names import fold
from jaxrnn.checkpoint.nnx import from_torch, load_state_dict, state_dict
from jaxrnn.checkpoint.optimizer import clip_grad_norm, optax_from_torch, optimizer_from_torch
from jaxrnn.checkpoint.scaffold import scaffold
from jaxrnn.checkpoint.to_onnx import to_onnx
from jaxrnn.checkpoint.to_torch_optimizer import optax_to_torch, optimizer_to_torch
from jaxrnn.checkpoint.torch_init import torch_init
from jaxrnn.checkpoint.write import save, save_tree

__all__ = [
    "CheckpointError",
    "FoundRNN",
    "clip_grad_norm",
    "dialects",
    "find_rnns",
    "fold",
    "from_flax",
    "from_torch",
    "linen",
    "load",
    "load_state_dict",
    "load_tree",
    "optax_from_torch",
    "optax_to_torch",
    "optimizer_from_torch",
    "optimizer_to_torch",
    "save",
    "save_tree",
    "scaffold",
    "state_dict",
    "to_onnx",
    "torch_init",
]
