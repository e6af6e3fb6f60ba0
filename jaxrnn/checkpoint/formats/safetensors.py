"""Files of safetensors."""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import IO, Any

import jax.numpy as jnp
from safetensors import SafetensorError, safe_open

from jaxrnn.checkpoint import stored
from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, check_unicode, is_text
from jaxrnn.checkpoint.formats.reading import Reading, warn
from jaxrnn.checkpoint.stored import Source, Stored, Value, pieces
from jaxrnn.checkpoint.tables import Table, warned

SUFFIXES = (".safetensors",)
DTYPES = {
    "BOOL": "bool", "I8": "int8", "U8": "uint8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip

# What a file says beside its tensors; all but the format is free text of whoever saved it.
METADATA = Table(
    "__metadata__ of safetensors",
    {"format": warned("pt", "np", "numpy", remedy="layouts may not be torch's: compare the outputs")},
)


def sniff(head: bytes) -> bool:
    return head[8:9] == b"{" and not is_text(head[:8])


def read(path: str | os.PathLike[str], what: Reading) -> dict[str, Value]:
    what.check_no_key("a safetensors file")
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
        tensors: dict[str, Value] = {}
        header = file.read(length)
        metadata = dict(json.loads(header)).get("__metadata__") or {}
        for finding in METADATA.findings({name: value for name, value in metadata.items() if name in METADATA}):
            warn(path, f"it says {finding}", finding.row.words)
        for name, info in _entries(header):
            if name in tensors:
                raise CheckpointError(f"a damaged safetensors file, two tensors are named {name}\n{AGAIN}")
            if info["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{name} is of {info['dtype']}, which NumPy does not have\nconvert it before saving"
                )
            dtype = jnp.dtype(DTYPES[info["dtype"]])
            stored.check_shape(name, shape := tuple(info["shape"]), dtype)
            tensors[name] = Stored(source, 8 + length + info["data_offsets"][0], dtype, shape)
        return {name: _little_endian(value) for name, value in tensors.items()}


def _impossible(header: bytes) -> str | None:
    """The name of the first tensor whose entry in the header is impossible, if there is one."""
    try:
        for name, info in _entries(header):
            sizes, (begin, end) = info["shape"], info["data_offsets"]
            dtype = DTYPES.get(info["dtype"])
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


def write(file: IO[bytes], arrays: Mapping[str, Value], wrote: Callable[[int], None]) -> str:
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, array in arrays.items():
        check_unicode(name)
        if name == "__metadata__" or array.dtype.name not in names:
            cause = f"{name} of {array.dtype} cannot be written to safetensors"
            raise CheckpointError(f"{cause}\nrename or convert it, or leave it out")
    # The widest dtype first, so that every array is aligned: readers map the file into memory.
    order = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    begin, offsets = 0, {}
    for name in order:
        offsets[name] = [begin, begin := begin + arrays[name].nbytes]
    # Names and layout are torch's; readers look for this metadata.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, array in arrays.items():
        header[name] = {
            "dtype": names[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets[name],
        }  # fmt: skip
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        for piece in pieces(_little_endian(arrays[name])):
            file.write(piece)
            wrote(len(piece))
    return file.name


def _little_endian(value: Value) -> Value:
    return value if sys.byteorder == "little" else stored.read(value).byteswap()
