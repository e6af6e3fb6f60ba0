"""Pickles of NumPy's and JAX's arrays in dicts and lists, as Haiku's users write them, read without running code."""

import os
import re
from typing import IO, Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxrnn.checkpoint.arrays import NO_NUMBERS, dtype_of
from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, listed
from jaxrnn.checkpoint.formats import trees
from jaxrnn.checkpoint.formats.bombs import Budget
from jaxrnn.checkpoint.formats.nested import at_key, mapped
from jaxrnn.checkpoint.formats.pickle_machine import Global, LeftOut, Refused, Vocabulary, build, bytes_of, checked_key
from jaxrnn.checkpoint.formats.reading import Reading, warn
from jaxrnn.checkpoint.stored import Value

_SAVE = 'pathlib.Path("weights.msgpack").write_bytes(flax.serialization.to_bytes({}))'
_REMEDY = f"if you trust it, unpickle it, and save its parameters: {_SAVE.format('params')}"
_OF_STATE = "flax.nnx.to_pure_dict(flax.nnx.filter_state(state, flax.nnx.Any(flax.nnx.Param, flax.nnx.BatchStat)))"
_REMEDY_OF_STATE = f"if you trust it, unpickle its state, and save what is in it: {_SAVE.format(_OF_STATE)}"
_LEAVE = "or leave out what is not an array: only_tensors=True, or --only-tensors on the command line"
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")  # of NumPy 1 and 2
_MAKE = {f"{module}._reconstruct" for module in _NUMPY}
_SCALAR = {f"{module}.scalar" for module in _NUMPY}
_FROM_BUFFER = {"numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"}
_JAX = {"jax._src.array._reconstruct_array", "jax._src.device_array.reconstruct_device_array"}
_DICTS = {
    "collections.OrderedDict", "flax.core.frozen_dict.FrozenDict", "haiku._src.data_structures.FlatMapping",
    "haiku._src.data_structures.FlatMap",
}  # fmt: skip
_BYTES = {"_codecs.encode", "builtins.bytes", "__builtin__.bytes", "builtins.bytearray", "__builtin__.bytearray"}
_ML_DTYPES = re.compile(r"ml_dtypes\.(bfloat16|float8_\w+|u?int[24])")
_KIND = re.compile(r"[biufc][0-9]{1,2}")
_ORDERS: dict[str, Literal["<", ">", "="]] = {"<": "<", ">": ">", "|": "=", "=": "="}
_NAMED = {"numpy.ndarray", "numpy.dtype", "builtins.dict", "builtins.list"}  # the last two for defaultdict
_CALLS = {*_MAKE, *_SCALAR, *_FROM_BUFFER, *_JAX, *_DICTS, *_BYTES, "numpy.dtype", "collections.defaultdict"}


class _DType:
    """A dtype, whose byte order is set after it is made."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype


class _Array:
    """An array, whose numbers are set after it is made."""

    array: np.ndarray | None = None


def sniff(head: bytes) -> bool:
    return head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


def read(path: str | os.PathLike[str], what: Reading) -> dict[str, Value]:
    left_out: set[str] | None = set() if what.only_tensors else None
    params = trees.params_in(_tree(path, left_out), what, _is_array)
    if left_out:
        warn(path, f"left out objects that are not arrays: {listed(sorted(left_out))}")
    return dict(trees.owned(params, _numbers, Budget(os.path.getsize(path))))


def read_tree(path: str | os.PathLike[str], key: str | None) -> Any:
    """What is under a key of a file, or all of it."""

    def leaf(name: str, value: Any) -> Any:
        if isinstance(value, LeftOut):
            raise CheckpointError(
                f"it holds more than data, and its code is not run: {name or key} is a {value.name}\n{_REMEDY}"
            )
        if isinstance(value, Global | _DType):
            return value.name if isinstance(value, Global) else str(value.dtype)
        return np.array(_numbers(value), order="C") if _is_array(value) else value

    return mapped(at_key(_tree(path, None if key is None else set()), key), leaf)


def _tree(path: str | os.PathLike[str], left_out: set[str] | None) -> Any:
    with open(path, "rb") as file:
        size = os.path.getsize(path)
        try:
            return build(_UpToTheEnd(file, size), _Arrays(Budget(size)), left_out)
        except Refused as refusal:
            cause = f"a pickle that holds more than arrays in dicts and lists, and its code is not run: {refusal}"
            remedy = _REMEDY_OF_STATE if "flax.nnx." in str(refusal) else f"{_REMEDY}, {_LEAVE}"
            raise CheckpointError(f"{cause}\n{remedy}") from refusal


class _UpToTheEnd:
    """A file of which nobody reads more than there is: a pickle may say any length, for which Python makes room."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size

    def read(self, count: int) -> bytes:
        return self._counted(self._file.read(min(count, self._left)))

    def readline(self) -> bytes:
        return self._counted(self._file.readline())

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data


def _is_array(value: Any) -> bool:
    return isinstance(value, _Array | np.ndarray)


def _numbers(value: Any) -> np.ndarray:
    array = value.array if isinstance(value, _Array) else value
    if array is None:
        raise CheckpointError(f"truncated or damaged: an array without numbers\n{AGAIN}")
    return array


class _Arrays(Vocabulary):
    """What NumPy's and JAX's arrays are pickled as."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    def knows(self, name: str) -> bool:
        return name in _CALLS or name in _NAMED or _ML_DTYPES.fullmatch(name) is not None

    def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name in _MAKE:
            return _Array()
        if name in _JAX:
            _function, _arguments, state, *_more = arguments
            made = _Array()
            self.build(made, state)
            return made
        if name in _FROM_BUFFER:
            numbers, dtype, shape, order = arguments
            return self._array(shape, dtype, order == "F", numbers)
        if name in _SCALAR:
            dtype, numbers = arguments
            return self._array((), dtype, False, numbers)
        if name == "numpy.dtype":
            return _DType(_named(arguments[0]))
        if name == "collections.defaultdict":
            return {}
        if name in _DICTS:
            items = arguments[0] if arguments else {}
            pairs = items.items() if isinstance(items, dict) else [(name, value) for name, value in items]
            return {checked_key(key): value for key, value in pairs}
        if name in _BYTES:
            return bytes_of(*arguments)
        return super().call(name, arguments)

    def build(self, value: Any, state: Any) -> None:
        if type(value) is _Array:
            _version, shape, dtype, fortran, numbers = state
            value.array = self._array(shape, dtype, fortran, numbers)
        elif type(value) is _DType:
            value.dtype = value.dtype.newbyteorder(_ORDERS[state[1]])
        elif state is not None:
            raise ValueError("it sets attributes of something that is not an array")

    def _array(self, shape: Any, dtype: Any, fortran: Any, numbers: Any) -> np.ndarray:
        if type(numbers) not in (bytes, bytearray) or type(dtype) is not _DType or type(shape) is not tuple:
            raise Refused("an array of objects, or in an unknown form")
        array = np.frombuffer(numbers, dtype.dtype).reshape(shape, order="F" if fortran else "C")
        self.budget.spend(array.nbytes)
        return array.astype(dtype.dtype.newbyteorder("="), copy=False)


def _named(name: Any) -> np.dtype:
    if type(name) is Global and (match := _ML_DTYPES.fullmatch(name.name)):
        return jnp.dtype(match[1])
    if type(name) is not str or not _KIND.fullmatch(name):
        raise Refused(f"an array of {str(name)[:50]!r}, which are not numbers")
    dtype = np.dtype(name)
    if dtype_of(np.empty(0, dtype)) == NO_NUMBERS:
        raise Refused(f"an array of {name!r}, which are not numbers")
    return dtype
