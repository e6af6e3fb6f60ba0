"""Files of torch.save, read by torch with `weights_only=True`. Everything that needs torch to read a file is here."""

import io
import os
import pickletools
import re
import zipfile
import zlib
from types import ModuleType
from typing import IO

import numpy as np

from jaxrnn.checkpoint.arrays import is_torch_tensor, to_numpy
from jaxrnn.checkpoint.errors import CheckpointError, listed

# The number that a file of torch.save before 1.6 pickles first.
LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
_AGAIN = "download or copy it again"
_STATE_DICT = "save only the tensors: torch.save(model.state_dict(), path)"
# Far above what compression gains on weights: a file of zeros made to fill the memory.
_LARGEST_INFLATION = 100


def is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def read_zip(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(archive.infolist(), os.path.getsize(path))
            stream = io.BytesIO(archive.read(next(name for name in archive.namelist() if _inside(name) == "data.pkl")))
            if damaged := archive.testzip():
                raise CheckpointError(f"damaged: the checksum (CRC) of its entry {damaged} does not match\n{_AGAIN}")
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"a truncated or damaged zip file: {error}\n{_AGAIN}") from error
    except (NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise CheckpointError(f"a damaged zip file, or one that torch.save did not write: {error}\n{_AGAIN}") from error
    return _read(path, stream, 1)


def read_legacy(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        # The magic number, the protocol, the system, the tensors, and the storages' keys.
        return _read(path, file, 5)


def _inside(name: str) -> str:
    return name.partition("/")[2]  # after the folder, whose name is any


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    if (inflated := sum(entry.file_size for entry in entries)) > _LARGEST_INFLATION * size:
        cause = f"a zip bomb: its {len(entries)} entries inflate to {inflated} bytes, from a file of {size}"
        raise CheckpointError(f"{cause}\nget the file from a source that you trust")
    names = {_inside(entry.filename) for entry in entries}
    if "constants.pkl" in names:
        remedy = "export its tensors: torch.save(torch.jit.load(path).state_dict(), new_path)"
        raise CheckpointError(f"a TorchScript archive, not a state dict\n{remedy}")
    if "data.pkl" not in names:
        kind = "a NumPy .npz archive" if all(entry.filename.endswith(".npy") for entry in entries) else "a zip file"
        raise CheckpointError(f"{kind}, but none of torch.save: it has no data.pkl\n{_STATE_DICT}")


def _import_torch() -> ModuleType:
    remedy = 'pip install "jaxrnn[torch]", or convert the file to safetensors where torch is'
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(f"reading a file of torch.save needs torch, which is not installed\n{remedy}") from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        # Earlier versions of weights_only could be made to run code.
        cause = f"reading a file of torch.save needs torch 2.10 or later, not {torch.__version__}"
        raise CheckpointError(f"{cause}\n{remedy}")
    return torch


def _read(path: str | os.PathLike[str], stream: IO[bytes], pickles: int) -> dict[str, np.ndarray]:
    """Let torch read the file, in which `stream` is at the first of so many pickles."""
    torch = _import_torch()
    try:
        with open(path, "rb") as file:  # by its path, torch would go by its suffix
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle makes torch raise almost anything
        raise CheckpointError(_cause(error, stream, pickles)) from error
    if not isinstance(checkpoint, dict):
        what = "one tensor" if is_torch_tensor(checkpoint) else f"a {type(checkpoint).__name__}"
        raise CheckpointError(f"it holds {what}, not a dict of tensors\n{_STATE_DICT}")
    nested = [key for key, value in checkpoint.items() if isinstance(value, dict)]
    if nested:
        remedy = f"save that dict alone: torch.save(checkpoint[{nested[0]!r}], path)"
        raise CheckpointError(f"its tensors are not at the top: dicts are nested under {listed(nested)}\n{remedy}")
    others = [
        f"{key} ({type(value).__name__})"
        for key, value in checkpoint.items()
        if not (isinstance(key, str) and is_torch_tensor(value))
    ]
    if others:
        raise CheckpointError(f"some of its entries are not named tensors: {listed(others)}\n{_STATE_DICT}")
    for name, tensor in checkpoint.items():
        if tensor.is_meta or str(tensor.layout) != "torch.strided":
            continue  # to_numpy refuses these, which have no storage to compare with
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            cause = f"{name} of shape {tuple(tensor.shape)} is larger than what is stored of it"
            raise CheckpointError(f"{cause}\nsave a copy that is not expanded: tensor.clone()")
    return {name: to_numpy(name, tensor) for name, tensor in checkpoint.items()}


def _cause(error: Exception, stream: IO[bytes], pickles: int) -> str:
    """Why torch could not load, without its advice to load unsafely."""
    try:
        names = _globals(stream, pickles)
    except Exception as damage:  # pickletools too
        return f"truncated or damaged: its pickle cannot be read ({damage})\n{_AGAIN}"
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused and any(name.startswith("torch.nn.modules.") for name in names):
        return f"a whole module, not a state_dict: it names {refused[1]}\nsave model.state_dict() instead"
    if refused:
        return f"it holds more than tensors, and its code is not run: it names {refused[1]}\n{_STATE_DICT}"
    reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
    reason = type(error).__name__ + (f": {reason}" if reason and "weights_only" not in reason else "")
    return f"truncated or damaged: torch cannot read it ({reason})\n{_AGAIN}"


def _globals(stream: IO[bytes], pickles: int) -> list[str]:
    """Every global that so many pickles name, read without running them."""
    return [
        str(argument).replace(" ", ".")
        for _ in range(pickles)
        for opcode, argument, _ in pickletools.genops(stream)
        if opcode.name == "GLOBAL"
    ]
