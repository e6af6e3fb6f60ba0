"""Files of torch.save from before torch 1.6, which torch reads."""

import functools
import os
import pickletools
import re
import warnings
from types import ModuleType
from typing import IO, Any

import numpy as np

from jaxrnn.checkpoint.arrays import is_torch_tensor, to_numpy
from jaxrnn.checkpoint.errors import AGAIN, CheckpointError
from jaxrnn.checkpoint.formats.nested import at_key, check_expanded, choose, mapped
from jaxrnn.checkpoint.formats.pickle_machine import quiet
from jaxrnn.checkpoint.formats.pickles import STATE_DICT, is_object
from jaxrnn.checkpoint.formats.reading import Reading, warn
from jaxrnn.checkpoint.named import Described, modules_of
from jaxrnn.checkpoint.stored import Value

# The first number in such a file.
MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
# The magic number, the protocol, the system, the tensors and the storages' keys.
_PICKLES = 5


def sniff(head: bytes) -> bool:
    return MAGIC in head[:32]


def read(path: str | os.PathLike[str], what: Reading) -> dict[str, Value]:
    tensors = choose(_load_legacy(path), what, is_torch_tensor, functools.partial(warn, path))
    return Described({name: _from_torch(name, tensor) for name, tensor in tensors.items()}, modules=modules_of(tensors))


def _load_legacy(path: str | os.PathLike[str]) -> Any:
    """Let torch read the file."""
    with open(path, "rb") as file:
        if file.read(2)[1:] >= b"\x04":
            cause = "a pickle of protocol 4 or later in torch's old format, which torch cannot read safely"
            raise CheckpointError(
                f"{cause}\nsave it again, without pickle_protocol=: torch.save(model.state_dict(), path)"
            )
    torch = _import_torch()
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:  # given a path, torch would go by the suffix
            warnings.simplefilter("ignore")  # torch warns of what the bytes of a damaged file happen to name
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged pickle, torch raises almost anything
        with open(path, "rb") as file:
            raise CheckpointError(_cause(error, file)) from error


def _from_torch(name: str, tensor: Any) -> np.ndarray:
    if not tensor.is_meta and str(tensor.layout) == "torch.strided":  # to_numpy refuses the others
        stored = tensor.untyped_storage().nbytes()
        check_expanded(name, tuple(tensor.shape), tensor.numel() * tensor.element_size(), stored)
    return to_numpy(name, tensor)


def read_tree(path: str | os.PathLike[str], key: str | None) -> Any:
    """What is under a key in a file, or all of it, with NumPy arrays for tensors."""

    def to_array(name: str, value: Any) -> Any:
        if is_torch_tensor(value):
            return _from_torch(name, value)
        if type(value).__module__ == "torch":  # a size or a dtype, as torch_zip.read_tree returns it
            return tuple(value) if isinstance(value, tuple) else str(value)
        return value

    tree = _load_legacy(path)
    return mapped(at_key(tree, key), to_array)


def _import_torch() -> ModuleType:
    remedy = 'pip install "jaxrnn[torch]", or convert the file to safetensors where torch is'
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"reading a file of torch.save from before torch 1.6 needs torch, which is not installed\n{remedy}"
        ) from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        # A file could run code in spite of weights_only in earlier versions.
        cause = f"reading a file of torch.save from before torch 1.6 needs torch 2.10 or later, not {torch.__version__}"
        raise CheckpointError(f"{cause}\n{remedy}")
    return torch


def _cause(error: Exception, file: IO[bytes]) -> str:
    """Why torch could not load the file, without torch's advice to load unsafely."""
    try:
        with quiet():
            whole = [is_object(list(pickletools.genops(file))) for _ in range(_PICKLES)]
    except Exception as damage:  # also by pickletools
        return f"truncated or damaged: its pickle cannot be read ({damage})\n{AGAIN}"
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused and any(whole):
        return f"a whole module, not a state_dict: it names {refused[1]}\nsave model.state_dict() instead"
    if refused:
        return f"it holds more than tensors, and its code is not run: it names {refused[1]}\n{STATE_DICT}"
    reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
    reason = type(error).__name__ + (f": {reason}" if reason and "weights_only" not in reason else "")
    return f"truncated or damaged: torch cannot read it ({reason})\n{AGAIN}"
