"""Files of torch.save since torch 1.6, read and written without torch."""

import functools
import os
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from jaxrnn.checkpoint import stored
from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, listed
from jaxrnn.checkpoint.formats import quantized
from jaxrnn.checkpoint.formats.bombs import largest
from jaxrnn.checkpoint.formats.nested import check_expanded, choose, mapped, under_key
from jaxrnn.checkpoint.formats.pickle_machine import Global, LeftOut
from jaxrnn.checkpoint.formats.pickles import STATE_DICT, Other, StoredTensor, is_known, pickle_tensors, unpickle
from jaxrnn.checkpoint.formats.reading import Reading, warn
from jaxrnn.checkpoint.named import Described, modules_of
from jaxrnn.checkpoint.stored import Source, Stored, Value, pieces

_PIECE = 1 << 20  # bytes read at a time


SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


def sniff(head: bytes) -> bool:
    return head.startswith(b"PK\x03\x04")


def read(path: str | os.PathLike[str], what: Reading) -> dict[str, Value]:
    left_out: set[str] | None = set() if what.only_tensors else None
    plan, modules = quantized.Plan(), frozenset[str]()

    def chosen(checkpoint: Any) -> dict[str, StoredTensor]:
        nonlocal plan, modules
        wanted = (lambda value: _is_tensor(value) or quantized.is_packed(value)) if what.dequantize else _is_tensor
        found = choose(checkpoint, what, wanted, functools.partial(warn, path))
        modules = modules_of(found)
        if not what.dequantize:
            return _checked(found)
        plan = quantized.Plan.of(found)
        return _checked(plan.stored)

    tensors = _read_zip(path, chosen, left_out, what.dequantize)[1]
    if left_out:
        warn(path, f"left out objects that are not tensors: {listed(sorted(left_out))}")
    tensors, words = plan.dequantized(tensors)
    for text in words:
        warn(path, text)
    return Described(tensors, modules=modules)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, StoredTensor | Other)


def read_tree(path: str | os.PathLike[str], key: str | None) -> Any:
    """What is under a key in a file's pickle, or all of it, with NumPy arrays for tensors."""
    found: dict[int, str] = {}

    def choose(checkpoint: Any) -> dict[str, StoredTensor]:
        tensors: dict[str, Any] = {}

        def note(name: str, value: Any) -> Any:
            if isinstance(value, LeftOut):
                raise CheckpointError(
                    f"it holds more than data, and its code is not run: {name or key} is a {value.name}\n{STATE_DICT}"
                )
            if isinstance(value, StoredTensor | Other):
                name += "" if name not in tensors else f" ({len(tensors)})"  # the keys 0 and "0" differ
                found[id(value)] = name
                tensors[name] = value
            return value

        mapped(checkpoint if key is None else under_key(checkpoint, key)[0], note)
        return _checked(tensors)

    def resolved(name: str, value: Any) -> Any:
        if id(value) in found:
            return stored.read(tensors[found[id(value)]])
        return value.name if isinstance(value, Global) else value

    checkpoint, tensors = _read_zip(path, choose, None if key is None else set())
    return mapped(checkpoint if key is None else under_key(checkpoint, key)[0], resolved)


def _read_zip(
    path: str | os.PathLike[str],
    choose: Callable[[Any], dict[str, StoredTensor]],
    left_out: set[str] | None,
    packed: bool = False,
) -> tuple[Any, dict[str, Value]]:
    """The contents of a file's pickle, with the chosen tensors read."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            size = os.fstat(file.fileno()).st_size
            entries = _entries(archive.infolist(), size)
            checkpoint = unpickle(_read(archive, entries["data.pkl"]).tobytes(), left_out, packed)
            tensors = choose(checkpoint)
            if (total := sum(tensor.nbytes for tensor in tensors.values())) > largest(size):
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
    if (inflated := sum(entry.file_size for entry in entries)) > largest(size):
        cause = f"a zip bomb: its {len(entries)} entries inflate to {inflated} bytes, from a file of {size}"
        raise CheckpointError(f"{cause}\nget the file from a source that you trust")
    if not any(entry.filename.endswith("/data.pkl") for entry in entries):
        raise CheckpointError(_what_else([entry.filename for entry in entries]))
    # written with torch.serialization.set_crc32_options(False)
    unchecked = not any(entry.CRC for entry in entries)
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        if unchecked:
            del entry.CRC  # zipfile then compares none
        name = entry.filename.partition("/")[2]
        plain = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not entry.filename.startswith("/")
        if name in found or not plain or ".." in entry.filename.split("/"):
            raise CheckpointError(f"damaged: torch.save writes no entry such as {entry.filename}\n{AGAIN}")
        found[name] = entry
    if "constants.pkl" in found:
        remedy = "export its tensors: torch.save(torch.jit.load(path).state_dict(), new_path)"
        raise CheckpointError(f"a TorchScript archive, not a state dict\n{remedy}")
    if "data.pkl" not in found:
        raise CheckpointError(f"damaged: its data.pkl is not where torch.save writes it\n{AGAIN}")
    return found


def _what_else(names: list[str]) -> str:
    """What a zip file is that has no data.pkl, and the remedy."""
    inside = [name for name in names if name.endswith((".pth", ".pt", ".ckpt", ".bin", ".safetensors"))]
    if any("/.data/" in name for name in names):
        return f"an archive of torch.package, which holds code\nload it with torch.package, and {STATE_DICT}"
    if inside:
        return f"a zip file with checkpoints in it\nunzip it, and give one of them: {listed(inside)}"
    if all(name.endswith(".npy") for name in names):
        return "a NumPy .npz archive\nread it with numpy.load; jaxrnn.from_flax converts weights of Flax"
    return f"a zip file that torch.save did not write: it has no data.pkl\n{STATE_DICT}"


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


def _checked(tensors: dict[str, Any]) -> dict[str, StoredTensor]:
    """The tensors, after checks that all are dense tensors of numbers that fit their storages."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Other):
            raise CheckpointError(f"{name} is a {tensor.what}\nsave it as a dense tensor of numbers")
        check_expanded(name, tensor.shape, tensor.nbytes, tensor.storage.nbytes)
    return tensors


def _arrays(
    file: IO[bytes], archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], tensors: dict[str, StoredTensor]
) -> dict[str, Value]:
    """Every tensor: `Stored` if its bytes can be used directly, otherwise a copy.

    A storage that several tensors share is read once, and dropped after the last of them.
    """
    order = _read(archive, entries["byteorder"]).tobytes() if "byteorder" in entries else b"little"
    if order not in (b"little", b"big"):
        raise CheckpointError(f"damaged: its byte order should be little or big, and is {order[:20]!r}\n{AGAIN}")
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
                raise CheckpointError(f"damaged: {name} should have {wanted} bytes, and {found}\n{AGAIN}")
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


def write(file: IO[bytes], tensors: Mapping[str, Value], wrote: Callable[[int], None]) -> str:
    """Write contiguous tensors as torch.save writes a state dict."""
    for name, array in tensors.items():
        if not is_known(array.dtype):
            raise CheckpointError(
                f"{name} has dtype {array.dtype}, which torch does not have\nconvert it, or leave it out"
            )
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle_tensors(tensors))
        archive.writestr("archive/byteorder", sys.byteorder)
        for index, array in enumerate(tensors.values()):
            with archive.open(f"archive/data/{index}", "w", force_zip64=array.nbytes >= 1 << 31) as entry:
                for piece in pieces(array):
                    entry.write(piece)
                    wrote(len(piece))
        archive.writestr("archive/version", "3\n")
    return file.name
