"""Read checkpoint files: tell the format by the first bytes, and read safetensors.

A format's reader is a function from a path, and a key or None, to tensors. It raises CheckpointError without the path;
`opened` puts the path first.
"""

import codecs
import json
import math
import os
import stat
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxrnn.checkpoint import orbax_files, torch_files
from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, listed, os_cause
from jaxrnn.checkpoint.stored import Source, Stored, UnreadableError, Value, read

Path = str | os.PathLike[str]
Tensors = dict[str, Value]
T = TypeVar("T")

_SAVE = "save the tensors as a .safetensors file, or with torch.save(model.state_dict(), path)"
SAFETENSORS_DTYPES = {
    "BOOL": "bool", "I8": "int8", "U8": "uint8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
# Files that are not checkpoints, by their first bytes: what they are, and the remedy.
_NOT_CHECKPOINTS = {
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "run git lfs pull"),
    b"\x89HDF": ("an HDF5 file, as Keras writes it", _SAVE),
    b"\x93NUMPY": ("a NumPy .npy file", _SAVE),
    b"\x1f\x8b": ("compressed by gzip", "decompress it first"),
    b"\x80": ("a pickle, but none of torch.save", _SAVE),
}


def load(path: Path, key: str | None = None) -> dict[str, np.ndarray]:
    """Read every tensor of a checkpoint file.

    The first bytes decide the format, not the name. Code in a checkpoint never runs: files of torch.save are read
    without torch, by a reader that only builds data. Files from before torch 1.6 need torch 2.10 or later, which reads
    them with `weights_only=True`.

    Args:
        path: a safetensors file, a torch.save file of a dict of tensors, such as a state dict, or the directory of an
            orbax checkpoint, whose nested names are joined by dots.
        key: the key of that dict in a nested file, dotted if it is deeper ("trainer.model"). If None, the dict is at
            the top, or in a torch.save file under one of "state_dict", "model_state_dict", "model_state" and "model".

    Returns:
        A dict from name to NumPy array, with the file's dtypes (bfloat16 as `ml_dtypes.bfloat16`).

    Raises:
        CheckpointError: the file is missing, unreadable, damaged, or not a checkpoint; nothing is under `key`; or torch
            is needed and is missing or too old.

    >>> import os, tempfile
    >>> import numpy as np
    >>> from jaxrnn import checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.safetensors")
    ...     checkpoint.save(path, {"scale": np.array([1.0, 2.0])})
    ...     checkpoint.load(path)
    {'scale': array([1., 2.])}
    """
    return {name: read(value) for name, value in opened(path, key).items()}


def opened(path: Path, key: str | None = None) -> Tensors:
    """As `load`, but tensors whose bytes can be used directly are not read: they are `Stored`."""
    return _said_of(path, lambda: _reader(path)(path, key))


def load_tree(path: Path, key: str | None = None) -> Any:
    """Read all of a torch.save file, such as an optimizer's state beside a model's, without torch.

    Args:
        path: the file, as for `load`.
        key: the key of nested dicts to return, dotted if it is deeper; all if None.

    Returns:
        Dicts, lists, tuples, numbers and strings, nested as in the file, with NumPy arrays for tensors, and names for
        dtypes.

    Raises:
        CheckpointError: as `load`, or the file is not one of torch.save.

    >>> import os, tempfile
    >>> import numpy as np
    >>> from jaxrnn import checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.pt")
    ...     checkpoint.save(path, {"scale": np.array([1.0, 2.0])})
    ...     checkpoint.load_tree(path, key="scale")
    array([1., 2.])
    """

    def load_it() -> Any:
        trees: dict[Any, Callable[[Path], Any]]
        trees = {torch_files.read_zip: torch_files.read_zip_tree, torch_files.read_legacy: torch_files.read_legacy_tree}
        if (reader := trees.get(_reader(path))) is None:
            raise CheckpointError("not a file of torch.save, the only one that holds more than arrays\nuse load")
        tree = reader(path)
        for part in [] if key is None else key.split("."):
            if not (isinstance(tree, dict) and part in tree):
                raise CheckpointError(f"it has nothing under {key!r}\nthere are: {listed(tree)}")
            tree = tree[part]
        return tree

    return _said_of(path, load_it)


def _said_of(path: Path, function: Callable[[], T]) -> T:
    """Call `function`; put the path first in any CheckpointError."""
    try:
        return function()
    except UnreadableError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{os.fspath(path)}: {os_cause(error)}\ncheck the path and its permissions") from error


def check_path(path: Path) -> None:
    if "\0" in os.fspath(path):
        raise CheckpointError("a path cannot hold a NUL character\ncheck the path")


def _reader(path: Path) -> Callable[[Path, str | None], Tensors]:
    """The reader for a file, by its first bytes."""
    check_path(path)
    if os.path.islink(path) and not os.path.exists(path):
        raise CheckpointError(f"a link to {os.readlink(path)}, which is not there\nmend the link")
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        return orbax_files.read_directory
    if not stat.S_ISREG(mode):
        raise CheckpointError("not a regular file\ncopy it to a regular file first")
    with open(path, "rb") as file:
        head = file.read(1024)
    if not head:
        raise CheckpointError(f"an empty file\n{AGAIN}")
    if head.startswith(b"PK\x03\x04"):
        return torch_files.read_zip
    if torch_files.LEGACY_MAGIC in head[:32]:
        return torch_files.read_legacy
    if head[8:9] == b"{" and not _is_text(head[:8]):
        return _read_safetensors
    if torch_files.is_tar(head):
        raise CheckpointError("a tar file, as torch before 0.4 wrote it\nload and save it with a torch of 0.4 to 1.x")
    for magic, (cause, remedy) in _NOT_CHECKPOINTS.items():
        if head.startswith(magic):
            raise CheckpointError(f"{cause}\n{remedy}")
    if _is_text(head):
        web = head.lstrip().lower().startswith((b"<!doctype html", b"<html"))
        remedy = "download the file itself, not the page about it" if web else _SAVE
        raise CheckpointError(f"{'an HTML page' if web else 'a text file'}, not a checkpoint\n{remedy}")
    if len(head) < 9:
        raise CheckpointError(f"truncated: {len(head)} bytes are no checkpoint\n{AGAIN}")
    raise CheckpointError(f"neither safetensors nor a file of torch.save, by its first bytes\n{_SAVE}")


def _is_text(head: bytes) -> bool:
    try:
        # Incremental, because the end of head may split a character.
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


def _read_safetensors(path: Path, key: str | None) -> Tensors:
    if key is not None:
        raise CheckpointError(f"a safetensors file nests no dicts under keys such as {key!r}\nload it without a key")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size - 8
        try:
            # The library checks the header: valid JSON, offsets that fill the file, shapes that fill the offsets.
            with safe_open(path, "np"):
                pass
        except SafetensorError as error:
            cause = str(error).removeprefix("Error while deserializing header: ")
            if size < length <= 100_000_000:
                cause = f"truncated: the header should have {length} bytes, and {size} are there"
            elif "not fully covered" in cause:
                end = max((info["data_offsets"][1] for _, info in _entries(file.read(length))), default=0)
                there = f"the tensors should have {end} bytes, and {size - length} are there"
                cause = f"truncated: {there}" if size - length < end else f"trailing bytes: {there}"
            elif length <= size and (name := _impossible(file.read(length))) is not None:
                cause = f"its tensor {name} is impossible: {cause}"
            raise CheckpointError(f"a damaged safetensors file, {cause}\n{AGAIN}") from error
        source = Source.of(file)
        tensors: Tensors = {}
        for name, info in _entries(file.read(length)):
            if name in tensors:
                raise CheckpointError(f"a damaged safetensors file, two tensors are named {name}\n{AGAIN}")
            if info["dtype"] not in SAFETENSORS_DTYPES:
                raise CheckpointError(f"{name} is of {info['dtype']}, which NumPy has not\nconvert it before saving")
            dtype = jnp.dtype(SAFETENSORS_DTYPES[info["dtype"]])
            tensors[name] = Stored(source, 8 + length + info["data_offsets"][0], dtype, tuple(info["shape"]))
        return tensors if sys.byteorder == "little" else {name: read(v).byteswap() for name, v in tensors.items()}


def _impossible(header: bytes) -> str | None:
    """The name of the first tensor whose entry in the header is impossible, if there is one."""
    try:
        for name, info in _entries(header):
            sizes, (begin, end) = info["shape"], info["data_offsets"]
            dtype = SAFETENSORS_DTYPES.get(info["dtype"])
            whole = all(type(n) is int and 0 <= n < 1 << 63 for n in (*sizes, begin, end))
            if not whole or (dtype and math.prod(sizes) * jnp.dtype(dtype).itemsize != end - begin):
                return name
    except (ValueError, TypeError, KeyError, RecursionError):  # not even like a header
        pass
    return None


def _entries(header: bytes) -> list[tuple[str, dict[str, Any]]]:
    """The header's entries as pairs (name, entry), because JSON allows a name twice."""
    pairs = json.loads(header, object_pairs_hook=lambda pairs: pairs)
    return [(name, dict(info)) for name, info in pairs if name != "__metadata__"]
