"""Mutated files: bytes of any kind, and the values within zips, JSON, pickles, protobuf and the like.

A format with structure has a `Codec`: files are taken apart into trees, something in a tree is changed, and the tree is
put together again, so that checksums and lengths are right and the reader gets to see what is wrong.
"""

import contextlib
import functools
import io
import json
import pickletools
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import msgpack

EXTREMES = (0, -1, 1, 2, 3, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31), 2**32, 2**32 + 1, 2**62,
            2**63 - 1, 2**63, -(2**63), 2**64 - 1, 10**30)  # fmt: skip
_JUNK = (
    None,
    True,
    False,
    "",
    ".",
    "..",
    "a/b",
    "é\n",
    "\ud800",
    "a" * 300,
    1e308,
    float("nan"),
    float("inf"),
    [],
    b"",
)
_DEEP = 1500  # lists in each other


class Pairs(list):
    """The items of a dict, among which a key may be there twice."""


class Coded(NamedTuple):
    """A file within a file, taken apart."""

    codec: "Codec"
    tree: Any


class Codec(NamedTuple):
    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]


def mutated(random: Random, seeds: list[Any]) -> Any:
    """One of the seeds, bytes or trees, changed."""
    seed = random.choice(seeds)
    if isinstance(seed, bytes):
        return _spliced(random, seed, whole(random.choice(seeds))) if random.random() < 0.1 else flat(random, seed)
    if isinstance(seed, Coded) and random.random() < 0.15:
        others = [whole(other) for other in (seed, random.choice(seeds))]
        return _spliced(random, *others) if random.random() < 0.3 else flat(random, others[0])
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        seed = _changed(random, seed, random.choice(seeds))
    try:
        return whole(seed) if isinstance(seed, Coded) else seed
    except (TypeError, ValueError, OverflowError, struct.error):  # what this format cannot hold
        return mutated(random, seeds)


def whole(value: Any) -> bytes:
    if not isinstance(value, Coded):
        return value
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 10 * _DEEP))
    try:
        return value.codec.encode(value.tree)
    finally:
        sys.setrecursionlimit(limit)


# Bytes


def flat(random: Random, data: bytes) -> bytes:
    array = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5))):
        _CHANGES[random.randrange(len(_CHANGES))](random, array)
    return bytes(array)


def _spliced(random: Random, one: bytes, other: bytes) -> bytes:
    at = random.randrange(len(one) + 1)
    return one[:at] + other[at if random.random() < 0.5 else random.randrange(len(other) + 1) :]


def _span(random: Random, array: bytearray) -> slice:
    start = random.randrange(len(array) + 1)
    return slice(start, start + random.choice((1, 1, 2, 4, 8, 40, len(array) // 4 + 1)))


def _flip(random: Random, array: bytearray) -> None:
    if array:
        array[random.randrange(len(array))] ^= 1 << random.randrange(8)


def _set(random: Random, array: bytearray) -> None:
    if array:
        choices = (0, 1, 0x28, 0x2E, 0x52, 0x7F, 0x80, 0xFF, random.randrange(256))
        array[random.randrange(len(array))] = random.choice(choices)


def _truncate(random: Random, array: bytearray) -> None:
    if random.random() < 0.2:  # or little would be left of most files
        del array[random.randrange(len(array) + 1) :]


def _cut(random: Random, array: bytearray) -> None:
    del array[_span(random, array)]


def _insert(random: Random, array: bytearray) -> None:
    at = random.randrange(len(array) + 1)
    array[at:at] = random.randbytes(random.choice((1, 2, 8)))


def _double(random: Random, array: bytearray) -> None:
    at = random.randrange(len(array) + 1)
    array[at:at] = array[_span(random, array)]


def _copy(random: Random, array: bytearray) -> None:
    piece = array[_span(random, array)]
    at = random.randrange(len(array) + 1)
    array[at : at + len(piece)] = piece


def _extreme(random: Random, array: bytearray) -> None:
    width = random.choice((1, 2, 4, 8))
    if len(array) >= width:
        at = random.randrange(len(array) - width + 1)
        number = random.choice(EXTREMES) % (1 << 8 * width)
        array[at : at + width] = number.to_bytes(width, random.choice(("little", "big")))


def _number(random: Random, array: bytearray) -> None:
    """Replace a number that is written in digits."""
    if found := [match.span() for match in re.finditer(rb"[0-9]+", array[:4000])]:
        start, end = random.choice(found)
        array[start:end] = str(random.choice(EXTREMES)).encode()


_CHANGES = (_flip, _set, _truncate, _cut, _insert, _double, _copy, _extreme, _number)


# Trees


def _children(value: Any) -> list[Any]:
    if isinstance(value, Coded):
        return [value.tree]
    if isinstance(value, Pairs):
        return [each for _, each in value]
    return value if isinstance(value, list) else []


def _place(random: Random, tree: Any) -> tuple[int, ...]:
    """A place in a tree, found by walking down from its root."""
    path: list[int] = []
    while children := _children(tree):
        if random.random() < 0.2 and not isinstance(tree, Coded):
            break
        path.append(random.randrange(len(children)))
        tree = children[path[-1]]
    return tuple(path)


def _at(tree: Any, path: tuple[int, ...]) -> Any:
    for index in path:
        tree = _children(tree)[index]
    return tree


def _with(tree: Any, path: tuple[int, ...], change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(tree)
    if isinstance(tree, Coded):
        return Coded(tree.codec, _with(tree.tree, path[1:], change))
    copy = type(tree)(tree)
    index = path[0]
    if isinstance(tree, Pairs):
        copy[index] = (tree[index][0], _with(tree[index][1], path[1:], change))
    else:
        copy[index] = _with(tree[index], path[1:], change)
    return copy


def _changed(random: Random, tree: Any, other: Any) -> Any:
    """A tree in which one value, key or order is another; parts may come from another tree."""
    place = _place(random, tree)

    def change(value: Any) -> Any:
        if isinstance(value, Coded):
            return Coded(value.codec, change(value.tree))
        if isinstance(value, Pairs | list) and value and random.random() < 0.85:
            return _rearranged(random, value, other)
        if random.random() < 0.15:
            return _at(other, _place(random, other))
        return _leaf(random, value)

    return _with(tree, place, change)


def _rearranged(random: Random, value: Any, other: Any) -> Any:
    copy, kind = type(value)(value), random.randrange(6)
    one, two = random.randrange(len(copy)), random.randrange(len(copy))
    if kind == 0:
        del copy[one]
    elif kind == 1:
        copy.insert(two, copy[one])
    elif kind == 2:
        copy[one], copy[two] = copy[two], copy[one]
    elif isinstance(value, Pairs):
        key, (there, below) = copy[one][0], copy[two]
        if kind == 3:
            copy[two] = (key, below)
        elif kind == 4:
            copy[one] = (key, below)
        else:
            copy[two] = (_leaf(random, there), below)
    elif kind == 3:
        copy[one] = copy[two]
    elif kind == 4:
        del copy[min(one, two) : max(one, two)]
    else:
        copy[one] = _at(other, _place(random, other))
    return copy


def _leaf(random: Random, value: Any) -> Any:
    kind = random.random()
    if kind < 0.1:
        return random.choice(_JUNK)
    if kind < 0.12:
        return functools.reduce(lambda inner, _: [inner], range(_DEEP), value)
    if kind < 0.15:
        return [value]
    if isinstance(value, bytes):
        return flat(random, value)
    if isinstance(value, str):
        return flat(random, value.encode(errors="surrogatepass")).decode(errors="replace")
    if isinstance(value, msgpack.ExtType):
        return msgpack.ExtType(value.code if kind < 0.9 else random.randrange(128), flat(random, value.data))
    if isinstance(value, tuple):  # of protobuf: the number of a field, and its type
        return (random.choice((*range(30), 2**29 - 1)), value[1])
    return random.choice(EXTREMES)


# Formats


def _json(tree: Any) -> str:
    """JSON, in which a key may be there twice."""
    if isinstance(tree, Pairs):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_json(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(_json, tree)) + "]"
    return json.dumps(tree.decode("latin-1") if isinstance(tree, bytes) else tree)


JSON = Codec(lambda data: json.loads(data, object_pairs_hook=Pairs), lambda tree: _json(tree).encode())
CODE = Codec(lambda data: re.findall(rb"\w+|\s+|[^\w\s]", data), lambda tree: b"".join(map(_bytes, tree)))


def _bytes(value: Any) -> bytes:
    if isinstance(value, list):
        return b"".join(map(_bytes, value))
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


def _operations(data: bytes) -> list[bytes]:
    starts = [place for _, _, place in pickletools.genops(data) if place is not None]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


PICKLE = Codec(_operations, CODE.encode)


def _unzipped(data: bytes) -> Pairs:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    return Pairs((name, taken_apart(content, name)) for name, content in entries)


def _zipped(tree: Pairs) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in tree:
            archive.writestr(zipfile.ZipInfo(str(name) or "-"), _bytes(whole(content)))
    return file.getvalue()


ZIP = Codec(_unzipped, _zipped)


def _safetensors(data: bytes) -> list[Any]:
    end = 8 + int.from_bytes(data[:8], "little")
    return [Coded(JSON, JSON.decode(data[8:end])), data[end:]]


def _as_safetensors(tree: list[Any]) -> bytes:
    header, *rest = [_bytes(whole(each)) for each in tree]
    return len(header).to_bytes(8, "little") + header + b"".join(rest)


SAFETENSORS = Codec(_safetensors, _as_safetensors)


_PACKER = msgpack.Packer(strict_types=True)


def _packed(tree: Any) -> bytes:
    if isinstance(tree, Pairs):
        return _PACKER.pack_map_header(len(tree)) + b"".join(_packed(key) + _packed(value) for key, value in tree)
    if isinstance(tree, list):
        return _PACKER.pack_array_header(len(tree)) + b"".join(map(_packed, tree))
    return _PACKER.pack(tree)


MSGPACK = Codec(lambda data: msgpack.unpackb(data, object_pairs_hook=Pairs, strict_map_key=False), _packed)


def _fields(data: bytes) -> Pairs:
    """The fields of a message of protobuf: (number, type) and value. What could be a message is taken apart as one."""
    at, fields = 0, Pairs()
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 100 or kind not in (0, 1, 2, 5):
            raise ValueError("no message")
        value: Any
        if kind == 0:
            value, at = _varint(data, at)
        else:
            length, at = _varint(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
            value, at = data[at : at + length], at + length
            if at > len(data):
                raise ValueError("no message")
            if kind == 2:
                with contextlib.suppress(ValueError, IndexError):
                    value = _fields(value) if value else value
        fields.append(((number, kind), value))
    return fields


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def _as_varint(value: int) -> bytes:
    value %= 1 << 64
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _message(tree: Any) -> bytes:
    found = bytearray()
    for (number, kind), value in tree:
        found += _as_varint(number << 3 | kind)
        if kind == 0:
            found += _as_varint(value)
        else:
            data = _message(value) if isinstance(value, Pairs) else _bytes(value)
            found += _as_varint(len(data)) + data if kind == 2 else data
    return bytes(found)


PROTOBUF = Codec(_fields, _message)


def _around_json(data: bytes) -> list[Any]:
    """A binary file with one JSON text in it, which is put back at its old length where it is no longer."""
    start = data.index(b'{"')
    end = data.index(b"\0", start)
    return [data[:start], Coded(JSON, JSON.decode(data[start:end])), end - start, data[end:]]


def _with_json(tree: list[Any]) -> bytes:
    start, text, length, end = tree
    return _bytes(start) + _bytes(whole(text)).ljust(min(length, 1 << 16)) + _bytes(end)


BINARY = Codec(_around_json, _with_json)
_BY_NAME = {".pkl": PICKLE, ".json": JSON, ".py": CODE, ".pt": ZIP, ".h5": BINARY, ".index.json": JSON}


def taken_apart(data: bytes, name: str) -> Any:
    """A file by its name, as a tree; as bytes if it has none."""
    codec = next((codec for suffix, codec in _BY_NAME.items() if name.endswith(suffix)), None)
    try:
        return Coded(codec, codec.decode(data)) if codec and data else data
    except (ValueError, zipfile.BadZipFile):  # .h5 without JSON, a pickle that is in no zip
        return data
