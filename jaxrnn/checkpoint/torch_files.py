"""Files of torch.save: read and write the zip format without torch; torch reads the format from before torch 1.6."""

import os
import pickletools
import re
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import IO, Any

import numpy as np

from jaxrnn.checkpoint.arrays import is_torch_tensor, to_numpy
from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, listed
from jaxrnn.checkpoint.pickles import STATE_DICT, Global, Other, StoredTensor, is_object, pickle_tensors, unpickle
from jaxrnn.checkpoint.stored import Source, Stored, Value, pieces, read

# The first number in a file of torch.save before 1.6.
LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
# Far above what compression or sharing gains on weights; a larger gain means a file made to fill the memory.
_LARGEST_INFLATION = 100
_SMALL = 64 << 20  # this many bytes are harmless, however few are stored
_PIECE = 1 << 20  # bytes read at a time
_DEEPEST = 100  # nested dicts and lists; a state dict has a handful
# The usual keys of a model's state dict beside an optimizer's.
_USUAL_KEYS = ("state_dict", "model_state_dict", "model_state", "model")
# The magic number, the protocol, the system, the tensors and the storages' keys.
_LEGACY_PICKLES = 5


def is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def read_zip(path: str | os.PathLike[str], key: str | None) -> dict[str, Value]:
    return _read_zip(path, lambda checkpoint: _tensors(checkpoint, key))[1]


def read_zip_tree(path: str | os.PathLike[str]) -> Any:
    """Everything in a file's pickle, with NumPy arrays for tensors."""
    found: dict[int, str] = {}

    def choose(checkpoint: Any) -> dict[str, StoredTensor]:
        tensors: dict[str, Any] = {}

        def note(name: str, value: Any) -> Any:
            if isinstance(value, StoredTensor | Other):
                name += "" if name not in tensors else f" ({len(tensors)})"  # the keys 0 and "0" differ
                found[id(value)] = name
                tensors[name] = value
            return value

        _mapped(checkpoint, note)
        return _checked(tensors)

    def resolved(name: str, value: Any) -> Any:
        if id(value) in found:
            return read(tensors[found[id(value)]])
        return value.name if isinstance(value, Global) else value

    checkpoint, tensors = _read_zip(path, choose)
    return _mapped(checkpoint, resolved)


def read_legacy_tree(path: str | os.PathLike[str]) -> Any:
    """As `read_zip_tree`, read by torch."""

    def to_array(name: str, value: Any) -> Any:
        if is_torch_tensor(value):
            return _from_torch(name, value)
        if type(value).__module__ == "torch":  # a size or a dtype, as read_zip_tree returns it
            return tuple(value) if isinstance(value, tuple) else str(value)
        return value

    return _mapped(_load_legacy(path), to_array)


def _read_zip(
    path: str | os.PathLike[str], choose: Callable[[Any], dict[str, StoredTensor]]
) -> tuple[Any, dict[str, Value]]:
    """The contents of a file's pickle, with the chosen tensors read."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            size = os.fstat(file.fileno()).st_size
            entries = _entries(archive.infolist(), size)
            checkpoint = unpickle(_read(archive, entries["data.pkl"]).tobytes())
            tensors = choose(checkpoint)
            if (total := sum(tensor.nbytes for tensor in tensors.values())) > max(_SMALL, _LARGEST_INFLATION * size):
                cause = f"a zip bomb: its tensors have {total} bytes, in a file of {size}"
                raise CheckpointError(f"{cause}\nget the file from a source that you trust")
            return checkpoint, _arrays(file, archive, entries, tensors)
    except zipfile.BadZipFile as error:
        cause = f"a truncated or damaged zip file: {error}"
        if damaged := re.fullmatch(r"Bad CRC-32 for file (.*)", str(error), re.DOTALL):
            cause = f"damaged: the checksum (CRC) of its entry {damaged[1]} does not match"
        raise CheckpointError(f"{cause}\n{AGAIN}") from error
    except CheckpointError:
        raise
    # zipfile and zlib raise these on damage, and a RuntimeError for an unknown version of the format.
    except (RuntimeError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise CheckpointError(f"a damaged zip file, or one that torch.save did not write: {error}\n{AGAIN}") from error


def _entries(entries: list[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries by their names inside the archive's one folder, after checks that torch.save wrote them."""
    if (inflated := sum(entry.file_size for entry in entries)) > max(_SMALL, _LARGEST_INFLATION * size):
        cause = f"a zip bomb: its {len(entries)} entries inflate to {inflated} bytes, from a file of {size}"
        raise CheckpointError(f"{cause}\nget the file from a source that you trust")
    if not any(entry.filename.endswith("/data.pkl") for entry in entries):
        kind = "a NumPy .npz archive" if all(entry.filename.endswith(".npy") for entry in entries) else "a zip file"
        raise CheckpointError(f"{kind}, but none of torch.save: it has no data.pkl\n{STATE_DICT}")
    # written with torch.serialization.set_crc32_options(False)
    unchecked = not any(entry.CRC for entry in entries)
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        if unchecked:
            del entry.CRC  # zipfile then compares none
        name = entry.filename.partition("/")[2]
        plain = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not entry.filename.startswith("/")
        if name in found or not plain or ".." in entry.filename.split("/"):
            raise CheckpointError(f"damaged: its entry {entry.filename} is none that torch.save writes\n{AGAIN}")
        found[name] = entry
    if "constants.pkl" in found:
        remedy = "export its tensors: torch.save(torch.jit.load(path).state_dict(), new_path)"
        raise CheckpointError(f"a TorchScript archive, not a state dict\n{remedy}")
    if "data.pkl" not in found:
        raise CheckpointError(f"damaged: its data.pkl is not where torch.save writes it\n{AGAIN}")
    return found


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """Read an entry's bytes. zipfile compares the checksum at the end."""
    data = np.empty(entry.file_size, np.uint8)
    with archive.open(entry) as file:
        start = 0
        while piece := file.read(_PIECE):
            data[start : start + len(piece)] = np.frombuffer(piece, np.uint8)
            start += len(piece)
    if start < len(data):
        raise EOFError(f"its entry {entry.filename} ends early")
    return data


def _tensors(checkpoint: Any, key: str | None) -> dict[str, StoredTensor]:
    return _checked(_choose(checkpoint, key, lambda value: isinstance(value, StoredTensor | Other)))


def _checked(tensors: dict[str, Any]) -> dict[str, StoredTensor]:
    """The tensors, after checks that all are dense tensors of numbers that fit their storages."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Other):
            raise CheckpointError(f"{name} is a {tensor.what}\nsave it as a dense tensor of numbers")
        _check_expanded(name, tensor.shape, tensor.nbytes, tensor.storage.nbytes)
    return tensors


def _choose(checkpoint: Any, key: str | None, is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
    """The dict of tensors under a key; without one, at the top or under the only usual key."""
    path = [] if key is None else key.split(".")
    for index, part in enumerate(path):
        _check_dict(checkpoint, path[:index], is_tensor)
        if part not in checkpoint:
            raise CheckpointError(f"{_at(path[:index])} has no {part!r}\nits keys: {listed(checkpoint)}")
        checkpoint = checkpoint[part]
    _check_dict(checkpoint, path, is_tensor)
    while key is None and not any(is_tensor(value) for value in checkpoint.values()):
        usual = [name for name in _USUAL_KEYS if isinstance(checkpoint.get(name), dict)]
        if len(usual) != 1 or len(path) == len(_USUAL_KEYS):  # a dict may contain itself
            break
        path.append(usual[0])
        checkpoint = checkpoint[usual[0]]
    nested = _dicts(checkpoint)
    if nested:
        first, value = [*path, str(nested[0])], checkpoint[nested[0]]
        while not any(is_tensor(item) for item in value.values()) and _dicts(value) and len(first) < 8:
            first.append(str(_dicts(value)[0]))
            value = value[_dicts(value)[0]]
        remedy = f"say which: key={'.'.join(first)!r}, on the command line --key"
        cause = f"no recurrent weights, or not alone: {_at(path)} has dicts nested under {listed(nested)}"
        raise CheckpointError(f"{cause}\n{remedy}")
    others = [
        f"{name} ({'Tensor' if is_tensor(value) else type(value).__name__})"
        for name, value in checkpoint.items()
        if not (isinstance(name, str) and is_tensor(value))
    ]
    if others:
        raise CheckpointError(f"some entries of {_at(path)} are not named tensors: {listed(others)}\n{STATE_DICT}")
    return checkpoint


def _mapped(value: Any, function: Callable[[str, Any], Any]) -> Any:
    """Copy nested dicts, lists and tuples, with `function(name, leaf)` for each leaf; names are keys joined by dots.

    Shared objects are copied once, and are shared in the copy.
    """
    copies: dict[int, Any] = {}

    def copy(value: Any, path: tuple[str, ...]) -> Any:
        if len(path) > _DEEPEST:
            raise CheckpointError(f"more than {_DEEPEST} dicts and lists, one in the other\n{STATE_DICT}")
        if id(value) in copies:
            return copies[id(value)]
        if type(value) is dict or isinstance(value, OrderedDict):
            copies[id(value)] = {}
            copies[id(value)].update((key, copy(item, (*path, str(key)))) for key, item in value.items())
        elif type(value) is list:
            copies[id(value)] = []
            copies[id(value)].extend(copy(item, (*path, str(index))) for index, item in enumerate(value))
        elif type(value) is tuple:
            copies[id(value)] = tuple(copy(item, (*path, str(index))) for index, item in enumerate(value))
        else:
            copies[id(value)] = function(".".join(path), value)
        return copies[id(value)]

    return copy(value, ())


def _dicts(value: dict) -> list[Any]:
    return [name for name, item in value.items() if isinstance(item, dict)]


def _check_dict(value: Any, path: list[str], is_tensor: Callable[[Any], bool]) -> None:
    if not isinstance(value, dict):
        what = "one tensor" if is_tensor(value) else f"of type {type(value).__name__}"
        raise CheckpointError(f"no recurrent weights: {_at(path)} is {what}, not a dict of tensors\n{STATE_DICT}")


def _at(path: list[str]) -> str:
    return f"its {'.'.join(path)!r}" if path else "it"


def _check_expanded(name: str, shape: tuple[int, ...], size: int, stored: int) -> None:
    if size > stored:
        cause = f"{name} of shape {shape} is larger than what is stored of it"
        raise CheckpointError(f"{cause}\nsave a copy that is not expanded: tensor.clone()")


def _arrays(
    file: IO[bytes], archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], tensors: dict[str, StoredTensor]
) -> dict[str, Value]:
    """Every tensor: `Stored` if its bytes can be used directly, otherwise a copy.

    A storage that several tensors share is read once, and dropped after the last of them.
    """
    order = _read(archive, entries["byteorder"]).tobytes() if "byteorder" in entries else b"little"
    if order not in (b"little", b"big"):
        raise CheckpointError(f"damaged: its byte order is {order[:20]!r}\n{AGAIN}")
    swap = order.decode() != sys.byteorder
    source = Source.of(file)
    by_storage: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        by_storage.setdefault(tensor.storage.key, []).append(name)
    arrays: dict[str, Value] = {}
    for key, names in by_storage.items():
        entry = entries.get(f"data/{key}")
        for name in names:
            wanted = tensors[name].storage.nbytes
            if entry is None or wanted != entry.file_size:
                found = "none are there" if entry is None else f"{entry.file_size} are there"
                raise CheckpointError(f"damaged: of {name} {wanted} bytes should be stored, and {found}\n{AGAIN}")
        assert entry is not None  # every storage has a name
        if len(names) == 1 and entry.compress_type == zipfile.ZIP_STORED and tensors[names[0]].is_plain and not swap:
            tensor, offset = tensors[names[0]], _offset(file, archive, entry)
            arrays[names[0]] = Stored(
                source, offset, tensor.dtype, tensor.shape, getattr(entry, "CRC", None), entry.filename
            )
        else:
            data = _read(archive, entry)
            arrays |= {name: _array(name, tensors[name], data, swap) for name in names}
    return {name: arrays[name] for name in tensors}


def _offset(file: IO[bytes], archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """Where an entry's uncompressed bytes begin in the file."""
    archive.open(entry).close()  # which checks the entry's header
    file.seek(entry.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    offset = entry.header_offset + 30 + name_length + extra_length
    end = offset + entry.file_size
    if entry.compress_size != entry.file_size or end > os.fstat(file.fileno()).st_size:
        raise EOFError(f"its entry {entry.filename} ends early")
    return offset


def _array(name: str, tensor: StoredTensor, data: np.ndarray, swap: bool) -> np.ndarray:
    """A contiguous copy of a tensor's view of its storage."""
    itemsize = tensor.dtype.itemsize
    try:
        if tensor.numel == 0:
            return np.zeros(tensor.shape, tensor.dtype)
        last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
        if (last + 1) * itemsize > len(data):
            raise ValueError("it reaches past the end of what is stored")
        # As raw bytes, because as_strided does not know every dtype.
        numbers = data[tensor.offset * itemsize : (last + 1) * itemsize].view(f"V{itemsize}")
        strides = [step * itemsize for step in tensor.strides]
        view = np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides, writeable=False)
        array = np.array(view, order="C").view(tensor.dtype)
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"damaged: {name} of shape {tensor.shape} cannot be read: {error}\n{AGAIN}") from error
    if swap:
        array = array.byteswap()
    for bit in tensor.bits:
        array = np.asarray(np.conj(array) if bit == "conj" else -array)
    return array


def read_legacy(path: str | os.PathLike[str], key: str | None) -> dict[str, Value]:
    tensors = _choose(_load_legacy(path), key, is_torch_tensor)
    return {name: _from_torch(name, tensor) for name, tensor in tensors.items()}


def _load_legacy(path: str | os.PathLike[str]) -> Any:
    """Let torch read the file."""
    torch = _import_torch()
    try:
        with open(path, "rb") as file:  # given a path, torch would go by the suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged pickle, torch raises almost anything
        with open(path, "rb") as file:
            raise CheckpointError(_cause(error, file)) from error


def _from_torch(name: str, tensor: Any) -> np.ndarray:
    if not tensor.is_meta and str(tensor.layout) == "torch.strided":  # to_numpy refuses the others
        stored = tensor.untyped_storage().nbytes()
        _check_expanded(name, tuple(tensor.shape), tensor.numel() * tensor.element_size(), stored)
    return to_numpy(name, tensor)


def write_zip(file: IO[bytes], tensors: Mapping[str, Value], wrote: Callable[[int], None]) -> None:
    """Write contiguous tensors as torch.save writes a state dict; `wrote` is called with the bytes written."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle_tensors(tensors))
        archive.writestr("archive/byteorder", sys.byteorder)
        for index, array in enumerate(tensors.values()):
            with archive.open(f"archive/data/{index}", "w", force_zip64=array.nbytes >= 1 << 31) as entry:
                for piece in pieces(array):
                    entry.write(piece)
                    wrote(len(piece))
        archive.writestr("archive/version", "3\n")


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
        whole = [is_object(list(pickletools.genops(file))) for _ in range(_LEGACY_PICKLES)]
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
