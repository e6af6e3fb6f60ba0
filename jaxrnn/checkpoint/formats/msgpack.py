"""Files of `flax.serialization.to_bytes` and `msgpack_serialize`: nested dicts of arrays in msgpack."""

import mmap
import os
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np

from jaxrnn.checkpoint.arrays import NO_NUMBERS, dtype_of
from jaxrnn.checkpoint.errors import AGAIN, CheckpointError
from jaxrnn.checkpoint.formats import trees
from jaxrnn.checkpoint.formats.bombs import Budget
from jaxrnn.checkpoint.formats.reading import Reading
from jaxrnn.checkpoint.stored import Value

# Flax's types of extension: an array, a complex number, and a number of NumPy.
_ARRAY, _COMPLEX, _NUMBER = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"  # an array of more than 1 GB, in parts
_LONGEST = 1 << 16  # of a list, of which a file says the length first


def sniff(head: bytes) -> bool:
    """Whether it begins with a dict, and that with text."""
    start = 1 if 0x81 <= head[0] <= 0x8F else {0xDE: 3, 0xDF: 5}.get(head[0], 0)
    return bool(start) and (0xA0 <= head[start] <= 0xBF or 0xD9 <= head[start] <= 0xDB if len(head) > start else False)


def read(path: str | os.PathLike[str], what: Reading) -> dict[str, Value]:
    params = trees.params_in(_tree(path), what, trees.is_array)
    return dict(trees.owned(params, np.asarray, Budget(os.path.getsize(path))))


def read_tree(path: str | os.PathLike[str], key: str | None) -> Any:
    """What is under a key of a file, or all of it."""
    return trees.resolved(trees.under(_tree(path), key), lambda leaf: np.array(leaf) if trees.is_array(leaf) else leaf)


def _tree(path: str | os.PathLike[str]) -> Any:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            budget = Budget(len(data))
            unpacked = msgpack.unpackb(
                data,
                raw=False,
                strict_map_key=False,
                max_array_len=_LONGEST,
                ext_hook=lambda code, packed: _extension(budget, code, packed),
                object_pairs_hook=_dict,
            )
    except CheckpointError:
        raise
    except Exception as error:  # of msgpack and NumPy, on damage
        cause = f"truncated or damaged: its msgpack cannot be read ({type(error).__name__}: {error})"
        raise CheckpointError(f"{cause.partition(chr(10))[0][:200]}\n{AGAIN}") from error
    return unpacked


def _dict(pairs: list[tuple[Any, Any]]) -> Any:
    """A dict, or the array that Flax cut into parts."""
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise CheckpointError(f"damaged: it has two values under the name {name!r}\n{AGAIN}")
        found[name] = value
    if _CHUNKED not in found:
        return found
    shape, chunks = ([each[str(index)] for index in range(len(each))] for each in (found["shape"], found["chunks"]))
    return np.concatenate(chunks).reshape(shape)


def _extension(budget: Budget, code: int, packed: bytes) -> Any:
    if code == _COMPLEX:
        return complex(*msgpack.unpackb(packed))
    if code not in (_ARRAY, _NUMBER):
        raise CheckpointError(f"it holds a value of an unknown type, {code}\nsave it with flax.serialization.to_bytes")
    shape, name, numbers = msgpack.unpackb(packed, raw=True)
    dtype = jnp.dtype(name.decode())
    if dtype_of(np.empty(0, dtype)) == NO_NUMBERS:
        raise CheckpointError(f"it holds an array of {dtype}, which are not numbers\nsave the arrays of numbers alone")
    array = np.frombuffer(numbers, dtype).reshape(shape)
    budget.spend(array.nbytes)
    return array
