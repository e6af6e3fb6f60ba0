"""The variables in a file of Keras, and its configuration: .keras, .weights.h5 and the older .h5."""

import importlib
import io
import itertools
import json
import math
import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrnn.checkpoint.arrays import NO_NUMBERS, dtype_of
from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, as_text, listed
from jaxrnn.checkpoint.formats.bombs import Budget, largest
from jaxrnn.checkpoint.formats.keras_config import GroupPath

_HDF5 = b"\x89HDF\r\n\x1a\n"
_CONFIG, _WEIGHTS = "config.json", "model.weights.h5"  # in a .keras file
_METADATA = "metadata.json"
_FIRST_ENTRIES = (_METADATA.encode(), _CONFIG.encode(), _WEIGHTS.encode())
_DEEPEST, _MOST = 64, 50_000  # groups in groups, and in all
_SAVE = "save the model again, in one file: model.save(path)"
_NOWHERE = (1 << 64) - 1  # the address of a dataset that is not stored
_COMPRESSED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_OPTIMIZER = ("optimizer", "optimizer_weights")


def sniff(head: bytes) -> bool:
    return head.startswith(_HDF5) or (head.startswith(b"PK\x03\x04") and head[30:].startswith(_FIRST_ENTRIES))


def contents(path: str | os.PathLike[str]) -> tuple[Any, str | None, list["Variable"]]:
    """The configuration of the model, as text, and the version of Keras, None if the file has none; all variables."""
    try:
        # In Python alone: what is damaged raises, where HDF5's own library may crash, or never return.
        pyfive = importlib.import_module("pyfive")
    except ImportError as error:
        cause = "a file of Keras (HDF5), and reading it needs the package pyfive"
        raise CheckpointError(f'{cause}\npip install "jaxrnn[keras]"') from error
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        zipped = file.read(8) != _HDF5
        config, version, weights = _unzipped(file, size) if zipped else (None, None, file)
        try:
            with warnings.catch_warnings(), pyfive.File(weights) as opened:
                warnings.simplefilter("ignore")  # of what is no array
                config = config if zipped else opened.attrs.get("model_config")
                version = version if zipped else opened.attrs.get("keras_version")
                variables = list(_variables(pyfive, opened, weights, (), (), Budget(size), itertools.count()))
        except CheckpointError:
            raise
        except Exception as error:  # pyfive checks little itself: Python's errors are its checks
            cause = f"a damaged HDF5 file: {type(error).__name__} {error}".partition("\n")[0]
            raise CheckpointError(f"{cause}\n{AGAIN}") from error
    return config, as_text(version) if isinstance(version, str | bytes) else None, variables


def _unzipped(file: IO[bytes], size: int) -> tuple[bytes, Any, IO[bytes]]:
    """The configuration, the version and the weights in a .keras file."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if missing := [name for name in (_CONFIG, _WEIGHTS) if name not in names]:
                raise CheckpointError(f"a .keras file in which {listed(missing)} is missing\n{AGAIN}")
            read = [_CONFIG, _WEIGHTS, *([_METADATA] if _METADATA in names else [])]
            if (inflated := sum(archive.getinfo(name).file_size for name in read)) > largest(size):
                cause = f"a zip bomb: its entries inflate to {inflated} bytes, from a file of {size}"
                raise CheckpointError(f"{cause}\nget the file from a source that you trust")
            if odd := [name for name in read if archive.getinfo(name).compress_type not in _COMPRESSED]:
                raise CheckpointError(f"damaged: Keras compresses no entry as {listed(odd)} is\n{AGAIN}")
            version = _version(archive.read(_METADATA)) if _METADATA in names else None
            return archive.read(_CONFIG), version, io.BytesIO(archive.read(_WEIGHTS))
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, OSError, zlib.error) as error:
        raise CheckpointError(f"a truncated or damaged zip file: {error}\n{AGAIN}") from error


def _in_order(group: Any) -> list[str]:
    """The names in a group; of layers and their variables in the order of the model, which Keras 2 notes."""
    names, noted = list(group), []
    for key in ("layer_names", "weight_names"):
        found = np.asarray(group.attrs.get(key, [])).reshape(-1).tolist()
        noted += [as_text(each).partition("/")[0] for each in found if isinstance(each, str | bytes)]
    places = {name: index for index, name in reversed(list(enumerate(noted)))}
    return sorted(names, key=lambda name: places.get(name, len(noted)))


def _version(metadata: bytes) -> Any:
    try:
        found = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{_METADATA} is damaged: {error}\n{AGAIN}") from error
    return found.get("keras_version") if isinstance(found, dict) else None


def _array(name: str, dataset: Any, file: IO[bytes]) -> np.ndarray:
    """The numbers of a dataset, read from the file.

    Not by pyfive: of files without a name, and of those in a zip, it reads large arrays in pieces, not all of them from
    the right place, and gives zeros for what is past the end. A file with a name it opens anew, and may leave open.
    """
    size = math.prod(dataset.shape)
    if size and hasattr(dataset.id, "data_offset"):
        file.seek(dataset.id.data_offset)
        data = file.read(size * dataset.dtype.itemsize)
        if len(data) < size * dataset.dtype.itemsize:
            raise CheckpointError(f"a damaged HDF5 file: the numbers of {name} reach past its end\n{AGAIN}")
        return np.frombuffer(data, dataset.dtype, size).reshape(dataset.shape).copy()
    return np.array(dataset[()]) if size else np.empty(dataset.shape, dataset.dtype)


class Variable(NamedTuple):
    """A variable.

    Attributes:
        path: the names of the groups around it, then its own.
        titles: for each group the name of the layer in it, if Keras noted one.
        array: its value.
    """

    path: GroupPath
    titles: tuple[str | None, ...]
    array: np.ndarray


def _variables(
    pyfive: Any,
    group: Any,
    file: IO[bytes],
    path: GroupPath,
    titles: tuple[str | None, ...],
    budget: Budget,
    count: Iterator[int],
) -> Iterator[Variable]:
    """Every array of numbers in a group and below it."""
    for name in _in_order(group):
        if not path and name in _OPTIMIZER:
            continue
        if len(path) > _DEEPEST or next(count) > _MOST:
            raise CheckpointError(f"a damaged HDF5 file: its groups contain each other, or are far too many\n{AGAIN}")
        item, below = group.get(name), (*path, name)
        if isinstance(item, pyfive.Group):
            variables = item.get("vars")
            noted = variables.attrs.get("name") if isinstance(variables, pyfive.Group) else None
            title = as_text(noted) if isinstance(noted, str | bytes) and noted else None
            yield from _variables(pyfive, item, file, below, (*titles, title), budget, count)
        elif isinstance(item, pyfive.Dataset) and isinstance(item.dtype, np.dtype):
            # Keras writes no other type of which numpy knows the size alone; its older files do not name this one.
            bfloat16 = item.dtype == "V2" and item.attrs.get("dtype", "bfloat16") in ("bfloat16", b"bfloat16")
            if not bfloat16 and dtype_of(np.empty(0, item.dtype)) == NO_NUMBERS:
                continue
            if item.chunks is not None:  # Keras writes none, and a few bytes of them may become many
                cause = f"{'/'.join(below)} is stored in chunks or compressed, as Keras never does"
                raise CheckpointError(f"{cause}\n{_SAVE}")
            budget.spend(math.prod(item.shape) * item.dtype.itemsize)
            if math.prod(item.shape) and getattr(item.id, "data_offset", 0) == _NOWHERE:
                raise CheckpointError(f"the numbers of {'/'.join(below)} are in another file\n{_SAVE}")
            array = _array("/".join(below), item, file)
            array = array.view(jnp.bfloat16) if bfloat16 else array.astype(array.dtype.newbyteorder("="))
            yield Variable(below, titles, array)
