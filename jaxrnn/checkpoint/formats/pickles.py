"""The pickle in a file of torch.save: what its globals stand for, as data; and how to write one."""

import itertools
import math
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrnn.checkpoint.errors import CheckpointError
from jaxrnn.checkpoint.formats.pickle_machine import (
    DAMAGE,
    Global,
    Refused,
    Vocabulary,
    build,
    bytes_of,
    checked_key,
    quiet,
)
from jaxrnn.checkpoint.stored import Stored, Value

STATE_DICT = "save only the tensors: torch.save(model.state_dict(), path)"

_WITHOUT = f"{STATE_DICT}, or leave the rest out: only_tensors=True, or --only-tensors on the command line"

_DTYPES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}  # fmt: skip
_STORAGES = {f"torch.{name}Storage": jnp.dtype(dtype) for name, dtype in _DTYPES.items()}
# torch's dtypes by name; NumPy lacks one.
_NAMED = {f"torch.{name}": jnp.dtype(name) for name in (*_DTYPES.values(), "uint16", "uint32", "uint64")}
_NAMED |= {f"torch.float8_{name}": jnp.dtype(f"float8_{name}") for name in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz")}
_NAMED |= {"torch.float8_e8m0fnu": jnp.dtype("float8_e8m0fnu")}
_PACKED = "torch.ScriptObject"
_NO_NUMPY = "torch.complex32"
# Storages of raw bytes: the dtype is given separately, or is quantized.
_BYTES = ("torch.storage.UntypedStorage", "torch.QUInt4x2Storage", "torch.QUInt2x4Storage")
_QUANTIZED = {f"torch.q{name}": jnp.dtype(name) for name in ("int8", "uint8", "int32")}
_QUANTIZED_STORAGES = {f"torch.Q{name}Storage": jnp.dtype(name.lower()) for name in ("Int8", "UInt8", "Int32")}
# Calls whose results are not tensors of numbers: only their descriptions are kept.
_OTHER_CALLS = {
    "torch._utils._rebuild_meta_tensor_no_storage": "meta tensor",
    "torch._utils._rebuild_qtensor": "quantized tensor",
    "torch._utils._rebuild_nested_tensor": "nested tensor",
    "torch._utils._rebuild_sparse_tensor": "sparse tensor",
}
_TENSOR_CALLS = {
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
}
# Calls whose results are plain data.
_DATA_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda items=(): OrderedDict(_pairs(items)),
    "collections.Counter": lambda items=(): dict(_pairs(items.items() if type(items) is dict else items)),
    "torch.Size": lambda sizes: tuple(sizes),
    "torch.serialization._get_layout": lambda name: Other(
        name.removeprefix("torch.") if type(name) is str else "layout"
    ),
    "torch.device": lambda kind, index=None: _text(kind) + ("" if index is None else f":{_number(index)}"),
    "_codecs.encode": lambda text, encoding: bytes_of(text, encoding),
    **dict.fromkeys(("__builtin__.set", "builtins.set"), lambda items=(): {checked_key(item) for item in items}),
    **dict.fromkeys(("__builtin__.complex", "builtins.complex"), lambda a, b: complex(_number(a), _number(b))),
    **dict.fromkeys(("__builtin__.bytearray", "builtins.bytearray"), bytes_of),
}
_CALLS = _TENSOR_CALLS | _OTHER_CALLS.keys() | _DATA_CALLS.keys()
_TENSOR_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_SCHEMES = ("torch.per_tensor_affine", "torch.per_channel_affine", "torch.per_channel_affine_float_qparams")
# The dtypes of storages.
_STORED = _STORAGES | _QUANTIZED_STORAGES | dict.fromkeys(_BYTES, jnp.dtype(np.uint8))
_KNOWN = frozenset((*_CALLS, *_STORED, *_TENSOR_TYPES, *_SCHEMES, *_NAMED, *_QUANTIZED, _NO_NUMPY))
MOST_AXES = 64  # of NumPy and of torch


class Other(NamedTuple):
    """A value that is not a tensor of numbers: only what it is.

    Attributes:
        what: what it is.
        quantized: of a quantized tensor, its stored numbers and torch's parameters of the quantizer.
    """

    what: str
    quantized: tuple[Any, tuple[Any, ...]] | None = None


class Packed:
    """An object of torch's own code that holds the weights of a quantized module, as data."""

    state: Any = None
    kind = ""  # its class's name, where the pickle has it

    def contents(self) -> Any:
        """What torch would restore it from, less the name of its class."""
        contents, name = self.state
        if type(contents) is not tuple or type(name) is not str:
            raise ValueError("a quantized module in an unknown form")
        return contents


class Storage(NamedTuple):
    """The numbers of one or more tensors: the entry of the archive, their dtype and how many."""

    key: str
    dtype: np.dtype
    size: int

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class StoredTensor(NamedTuple):
    """A tensor as the pickle describes it, not checked and not read."""

    storage: Storage
    dtype: np.dtype
    offset: int  # in elements, like the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    bits: tuple[str, ...] = ()  # "conj", "neg": what to do with the numbers after reading

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def is_plain(self) -> bool:
        """Whether it is all of its storage, in order."""
        whole = self.offset == 0 and self.nbytes == self.storage.nbytes and not self.bits
        return whole and self.strides == contiguous_strides(self.shape)


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor, of numbers or not."""
    return isinstance(value, StoredTensor | Other)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides that torch gives a contiguous tensor, in elements."""
    return tuple(math.prod(max(n, 1) for n in shape[axis + 1 :]) for axis in range(len(shape)))


def is_known(dtype: np.dtype) -> bool:
    """Whether torch has the dtype."""
    return dtype in _NAMED.values()


def unpickle(data: bytes, left_out: set[str] | None = None, packed: bool = False) -> Any:
    """Read a pickle of torch.save: dicts, lists, tuples, numbers, strings, `StoredTensor`s and `Other`s.

    With a set `left_out`, each object whose class or function is not on the list becomes a `LeftOut`, and the set gets
    its name. Nothing of it is built. With `packed`, the weights of quantized modules are `Packed`.

    Raises:
        CheckpointError: it names a global that is not on the list, does what torch.save never does, or is damaged.
    """
    try:
        return build(data, TorchSave(packed), left_out)
    except Refused as refusal:
        with quiet():
            whole = is_object(pickletools.genops(data))
        if whole:
            cause, remedy = f"a whole module, not a state_dict: {refusal}", "save model.state_dict() instead"
        else:
            cause, remedy = f"it holds more than tensors, and its code is not run: {refusal}", _WITHOUT
            if _PACKED in str(refusal):
                cause = f"a quantized model, whose weights are packed by torch's own code: {refusal}"
                remedy = "read its rounded weights: dequantize=True, or --dequantize on the command line"
        raise CheckpointError(f"{cause}\n{remedy}") from refusal


class TorchSave(Vocabulary):
    """The globals in files of torch.save.

    Args:
        packed: whether the weights of quantized modules become `Packed`, rather than be refused.
        folder: where the archive has the storages.
    """

    def __init__(self, packed: bool = False, folder: str = "data") -> None:
        self.packed = packed
        self.folder = folder

    def knows(self, name: str) -> bool:
        return name in _KNOWN or self.makes(name)

    def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        return _call(name, arguments)

    def makes(self, name: str) -> bool:
        return self.packed and name == _PACKED

    def new(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if arguments:
            raise ValueError("a quantized module is made of something")
        return Packed()

    def build(self, value: Any, state: Any) -> None:
        if type(value) is Packed:
            value.state = state
        elif type(value) is OrderedDict:  # torch stores the versions of a state dict's modules
            vars(value)["_metadata"] = state.get("_metadata") if type(state) is dict else None
        elif type(value) is not dict:
            raise ValueError("it sets attributes, as torch.save does not")

    def stored(self, identity: Any) -> Storage:
        kind, storage, key, _location, size = identity
        if kind != "storage" or type(storage) is not Global or type(key) is not str or type(size) is not int:
            raise ValueError("a storage in an unknown form")
        return Storage(f"{self.folder}/{key}", _STORED[storage.name], size)


def is_object(operations: Iterable[Any]) -> bool:
    """Whether a pickle holds an object of some class, as torch.save(model, path) writes it, not a dict or a list."""
    named = ((opcode.name, argument) for opcode, argument, _ in operations if opcode.name not in ("PROTO", "FRAME"))
    try:
        begin = list(itertools.islice(named, 2))  # the rest may be damaged
    except DAMAGE:
        return False
    if begin and begin[0][0] == "GLOBAL":
        return begin[0][1] != "collections OrderedDict"
    return len(begin) == 2 and begin[0][0] == "MARK" and begin[1][1] == "module"  # as torch before 1.6 wrote it


def _pairs(items: Any) -> list[tuple[Any, Any]]:
    return [(checked_key(key), value) for key, value in items]


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError("a value is not text, and should be")
    return value


def _number(value: Any) -> Any:
    if type(value) not in (int, float):
        raise ValueError("a value is not a number, and should be")
    return value


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    """The data that torch would make of a call."""
    if name not in _CALLS:
        raise ValueError("it calls something that is not a function")
    if name in _DATA_CALLS:
        return _DATA_CALLS[name](*arguments)
    if name == "torch._tensor._rebuild_from_type_v2":
        function, kind, arguments, _state = arguments
        if type(kind) is not Global or kind.name not in _TENSOR_TYPES:
            raise ValueError("a tensor of an unknown type")
        # Without recursion: a file decides how deep this goes.
        if type(function) is not Global or function.name == name or type(arguments) is not tuple:
            raise ValueError("a tensor made by something that is not a function")
        return _call(function.name, arguments)
    if name.startswith("torch._utils._rebuild_parameter"):
        if type(arguments[0]) not in (StoredTensor, Other):
            raise ValueError("a parameter made of something that is not a tensor")
        return arguments[0]
    if name not in _TENSOR_CALLS:
        what = _OTHER_CALLS[name]
        if what == "sparse tensor" and type(arguments[0]) is Other:
            what = f"{arguments[0].what} tensor"
        return Other(what, _quantized(*arguments) if what == "quantized tensor" else None)
    return _tensor(name, *arguments)


def _quantized(
    storage: Any, offset: Any, shape: Any, strides: Any, quantizer: Any, *_more: Any
) -> tuple[Any, tuple] | None:
    if type(quantizer) is not tuple or len(quantizer) not in (3, 4):
        return None
    return _tensor("torch._utils._rebuild_tensor_v2", storage, offset, shape, strides), quantizer


def _tensor(
    name: str, storage: Any, offset: Any, shape: Any, strides: Any, _requires_grad: Any = None, _hooks: Any = None,
    *more: Any,
) -> StoredTensor | Other:  # fmt: skip
    dtype = storage.dtype
    if name.endswith("_v3"):
        if more[0].name == _NO_NUMPY:
            return Other(f"{_NO_NUMPY} tensor")
        dtype, more = _NAMED[more[0].name], more[1:]
    sizes = (storage.size, offset, *shape, *strides)
    if not (type(storage) is Storage and len(shape) == len(strides) <= MOST_AXES):
        raise ValueError("a tensor has an impossible shape")
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in sizes):
        raise ValueError("a tensor has an impossible size")
    bits = tuple(bit for bit in ("conj", "neg") if more and more[0] and more[0].get(bit))
    if ("conj" in bits and dtype.kind != "c") or (bits and not jnp.issubdtype(dtype, jnp.inexact)):
        raise ValueError("a tensor is conjugated or negated, and its dtype cannot be")
    return StoredTensor(storage, dtype, offset, tuple(shape), tuple(strides), bits)


_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def pickle_tree(tree: Any) -> tuple[bytes, list[Value]]:
    """Pickle dicts, lists, tuples, strings, numbers and arrays as torch.save does.

    Returns:
        The pickle, and the arrays, which have to be contiguous. The keys of their storages are "0", "1" and so on.
    """
    arrays: list[Value] = []
    return b"\x80\x02" + b"".join(_pickled(tree, arrays)) + b".", arrays


def _pickled(value: Any, arrays: list[Value]) -> Iterator[bytes]:
    if isinstance(value, dict):
        yield (_ORDERED_DICT if isinstance(value, OrderedDict) else b"}") + b"("
        for key, item in value.items():
            yield _value(key)
            yield from _pickled(item, arrays)
        yield b"u"
    elif isinstance(value, list | tuple):
        yield b"](" if isinstance(value, list) else b"("
        for item in value:
            yield from _pickled(item, arrays)
        yield b"e" if isinstance(value, list) else b"t"
    elif isinstance(value, np.ndarray | Stored):
        yield _tensor_of(value, str(len(arrays)))
        arrays.append(value)
    else:
        yield _value(value)


def _tensor_of(array: Value, key: str) -> bytes:
    """A contiguous tensor in a storage of its own."""
    storages = {dtype: name for name, dtype in _STORAGES.items()}
    untyped = array.dtype not in storages
    kind = "torch.storage.UntypedStorage" if untyped else storages[array.dtype]
    size = array.nbytes if untyped else array.size
    return b"".join([
        _name(f"torch._utils._rebuild_tensor_v{3 if untyped else 2}"),
        b"((" + _value("storage") + _name(kind) + _value(key) + _value("cpu") + _value(size) + b"tQ",
        _value(0),
        *(b"(" + b"".join(map(_value, each)) + b"t" for each in (array.shape, contiguous_strides(array.shape))),
        b"\x89" + _ORDERED_DICT,  # requires_grad=False, and no hooks
        _name({dtype: name for name, dtype in _NAMED.items()}[array.dtype]) if untyped else b"",
        b"tR",
    ])  # fmt: skip


def _name(name: str) -> bytes:
    module, _, leaf = name.rpartition(".")
    return f"c{module}\n{leaf}\n".encode()


def _value(value: str | int | float | None) -> bytes:
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return b"X" + len(text).to_bytes(4, "little") + text
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
