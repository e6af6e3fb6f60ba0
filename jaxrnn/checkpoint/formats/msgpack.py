"""Files of `flax.serialization.to_bytes` and `msgpack_serialize`: nested dicts of arrays in msgpack."""

import mmap
import os
from typing import IO, Any

import jax.numpy as jnp
import msgpack
import numpy as np

from jaxrnn.checkpoint.arrays import NO_NUMBERS, dtype_of
from jaxrnn.checkpoint.errors import AGAIN, CheckpointError
from jaxrnn.checkpoint.formats import trees
from jaxrnn.checkpoint.formats.bombs import Budget
from jaxrnn.checkpoint.formats.nested import DEEPEST, at_key, mapped
from jaxrnn.checkpoint.formats.reading import Reading
from jaxrnn.checkpoint.stored import Value

# Flax's types of extension: an array, a complex number, and a number of NumPy.
_ARRAY, _COMPLEX, _NUMBER = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"  # an array of more than 1 GB, in parts


def sniff(head: bytes) -> bool:
    """Whether it begins with a dict, and that with text."""
    start = 1 if 0x81 <= head[0] <= 0x8F else {0xDE: 3, 0xDF: 5}.get(head[0], 0)
    return 0 < start < len(head) and _is_text(head[start])


def read(path: str | os.PathLike[str], what: Reading) -> dict[str, Value]:
    params = trees.params_in(_tree(path), what, trees.is_array)
    return dict(trees.owned(params, np.asarray, Budget(os.path.getsize(path))))


def read_tree(path: str | os.PathLike[str], key: str | None) -> Any:
    """What is under a key of a file, or all of it."""
    return mapped(at_key(_tree(path), key), lambda _, leaf: np.array(leaf) if trees.is_array(leaf) else leaf)


def _tree(path: str | os.PathLike[str]) -> Any:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(file, data)
            tree = reader.value()
            if reader.unpacker.tell() < len(data):
                raise CheckpointError(f"damaged: there are more bytes after its end\n{AGAIN}")
            return tree
    except CheckpointError:
        raise
    except Exception as error:  # of msgpack and NumPy, on damage
        cause = f"truncated or damaged: its msgpack cannot be read ({type(error).__name__}: {error})"
        raise CheckpointError(f"{cause.partition(chr(10))[0][:200]}\n{AGAIN}") from error


def _is_text(first: int) -> bool:
    return 0xA0 <= first <= 0xBF or 0xD9 <= first <= 0xDB


class _Reader:
    """Reads value by value. msgpack, given a whole file, makes room for as many items as it says there are."""

    def __init__(self, file: IO[bytes], data: mmap.mmap) -> None:
        self.data, self.count = data, 0
        self.unpacker = msgpack.Unpacker(
            file, max_buffer_size=max(len(data), 1 << 20), raw=False, ext_hook=self._extension
        )

    def value(self, depth: int = 0) -> Any:
        self.count += 1
        if self.count > trees.MOST:
            raise CheckpointError(trees.TOO_MUCH)
        if depth > DEEPEST:
            raise CheckpointError(f"its dicts and lists are nested more than {DEEPEST} deep\nsave the parameters alone")
        first = self.data[self.unpacker.tell()]
        if 0x90 <= first <= 0x9F or first in (0xDC, 0xDD):
            return [self.value(depth + 1) for _ in range(self.unpacker.read_array_header())]
        if not (0x80 <= first <= 0x8F or first in (0xDE, 0xDF)):
            return self.unpacker.unpack()
        found: dict[Any, Any] = {}
        for _ in range(self.unpacker.read_map_header()):
            name = self.value(depth + 1)
            if type(name) not in (str, int) or name in found:
                raise CheckpointError(f"damaged: a dict has the key {name!r:.50} twice, or it is no text\n{AGAIN}")
            found[name] = self.value(depth + 1)
        return _joined(found) if _CHUNKED in found else found

    def _extension(self, code: int, packed: bytes) -> Any:
        if code == _COMPLEX:
            return complex(*msgpack.unpackb(packed))
        if code not in (_ARRAY, _NUMBER):
            cause = f"it holds a value of an unknown type, {code}"
            raise CheckpointError(f"{cause}\nsave it with flax.serialization.to_bytes")
        shape, name, numbers = msgpack.unpackb(packed, raw=True)
        dtype = jnp.dtype(name.decode())
        if dtype_of(np.empty(0, dtype)) == NO_NUMBERS:
            cause = f"it holds an array of {dtype}, which are not numbers"
            raise CheckpointError(f"{cause}\nsave the arrays of numbers alone")
        return np.frombuffer(numbers, dtype).reshape(shape)


def _joined(parts: dict[Any, Any]) -> np.ndarray:
    """The array that Flax cut into parts."""
    if parts.keys() != {_CHUNKED, "shape", "chunks"}:
        raise ValueError("an array in parts with other keys")
    shape, chunks = ([each[str(index)] for index in range(len(each))] for each in (parts["shape"], parts["chunks"]))
    return np.concatenate(chunks).reshape(shape)
