"""Files of `numpy.savez`: arrays by name, in a zip archive."""

import contextlib
import math
import os
import warnings
import zipfile
from collections.abc import Iterator
from typing import IO

import jax.numpy as jnp
import numpy as np

from jaxrnn.checkpoint.arrays import NO_NUMBERS, dtype_of
from jaxrnn.checkpoint.errors import AGAIN, CheckpointError
from jaxrnn.checkpoint.formats.bombs import Budget
from jaxrnn.checkpoint.formats.reading import Reading, warn
from jaxrnn.checkpoint.named import Names
from jaxrnn.checkpoint.stored import Value

_ENDS = ".npy"
_BFLOAT16 = np.dtype("V2")  # what NumPy writes for it


def sniff(head: bytes) -> bool:
    length = int.from_bytes(head[26:28], "little")
    return head.startswith(b"PK\x03\x04") and head[30 : 30 + length].endswith(_ENDS.encode())


def read(path: str | os.PathLike[str], what: Reading) -> dict[str, Value]:
    what.check_no_key("an .npz file")
    budget = Budget(os.path.getsize(path))
    arrays = Names[Value]("rename one of them, and save the arrays again")
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                budget.spend(entry.file_size)
                arrays.put(entry.filename.removesuffix(_ENDS), _array(path, archive, entry), entry.filename)
    except CheckpointError:
        raise
    except Exception as error:  # of zipfile, zlib and NumPy, on damage
        cause = f"a truncated or damaged .npz file: {type(error).__name__} {error}".partition("\n")[0][:200]
        raise CheckpointError(f"{cause}\n{AGAIN}") from error
    return dict(arrays)


@contextlib.contextmanager
def _opened(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[IO[bytes]]:
    """Open an entry, and silence NumPy, which advises on headers that Python 2 wrote, and Python, which parses them."""
    with warnings.catch_warnings(), archive.open(entry) as file:
        warnings.simplefilter("ignore")
        yield file


def _array(path: str | os.PathLike[str], archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with _opened(archive, entry) as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
    numbers = dtype if dtype != _BFLOAT16 else jnp.dtype(jnp.bfloat16)
    if dtype_of(np.empty(0, numbers)) == NO_NUMBERS:
        name = entry.filename.removesuffix(_ENDS)
        raise CheckpointError(f"{name} is an array of {dtype}, which are not numbers\nsave the arrays of numbers alone")
    if math.prod(shape) * dtype.itemsize > entry.file_size:
        raise CheckpointError(f"damaged: {entry.filename} of shape {shape} has too few bytes\n{AGAIN}")
    with _opened(archive, entry) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise CheckpointError(f"damaged: {entry.filename} of shape {shape} has too many bytes\n{AGAIN}")
    if dtype == _BFLOAT16:
        warn(path, f"{entry.filename} is read as bfloat16, which NumPy writes so", "compare the outputs")
        return array.view(numbers)
    return np.array(array, array.dtype.newbyteorder("="), order="C")
