"""Arrays in files: described when the file is opened, and read later, in pieces if need be.

A checkpoint may be larger than memory, so data that is only copied or compared goes piece by piece.
"""

import dataclasses
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import jax.numpy as jnp
import numpy as np

from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, UnreadableError, os_cause

# Large compared with the cost of a system call, small compared with the processor's caches.
_PIECE = 1 << 20
_USUAL_AXES = 32
# Threads that read, compute checksums and compare, all of which release the GIL.
THREADS = 4


@dataclasses.dataclass(frozen=True)
class Source:
    """A file as it was when it was opened."""

    path: str
    stamp: tuple[int, ...]

    @classmethod
    def of(cls, file: IO[bytes]) -> "Source":
        return cls(os.fspath(file.name), _stamp(file))


def _stamp(file: IO[bytes]) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclasses.dataclass(frozen=True)
class Stored:
    """A contiguous array in a file, in the machine's byte order.

    Attributes:
        source: the file.
        offset: where the array begins in the file, in bytes.
        dtype: the array's.
        shape: the array's.
        checksum: the CRC-32 of the array's bytes; None if the file has none.
        entry: the name of that part of the file, for the message if the checksum does not match.
    """

    source: Source
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    checksum: int | None = None
    entry: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Read the array into new memory.

        Raises:
            UnreadableError: the file is gone, was replaced since it was opened, or is damaged.
        """
        data = np.empty(self.nbytes, np.uint8)
        for _ in self._through(data.data):
            pass
        return data.view(self.dtype).reshape(self.shape)

    def pieces(self) -> Iterator[memoryview]:
        """Yield the array's bytes in pieces, each valid until the next. Raises like `read`, maybe only at the end."""
        return self._through(memoryview(bytearray(min(_PIECE, self.nbytes))))

    def _through(self, memory: memoryview) -> Iterator[memoryview]:
        """Read piece by piece into the same memory."""
        try:
            with open(self.source.path, "rb") as file:
                if _stamp(file) != self.source.stamp:
                    raise UnreadableError(
                        f"{self.source.path}: the file has changed since it was opened\nload it again"
                    )
                file.seek(self.offset)
                checksum, done = 0, 0
                while done < self.nbytes:
                    start = done % len(memory)
                    piece = memory[start : start + min(_PIECE, self.nbytes - done)]
                    if file.readinto(piece) < len(piece):
                        raise UnreadableError(f"{self.source.path}: the file was truncated while it was read\n{AGAIN}")
                    if self.checksum is not None:
                        checksum = zlib.crc32(piece, checksum)
                    done += len(piece)
                    yield piece
        except OSError as error:
            cause = f"{self.source.path}: {os_cause(error)}\ncheck the file and its permissions"
            raise UnreadableError(cause) from error
        if self.checksum is not None and checksum != self.checksum:
            cause = f"damaged: the checksum (CRC) of its entry {self.entry!r} does not match"
            raise UnreadableError(f"{self.source.path}: {cause}\n{AGAIN}")


def check_shape(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuse what no NumPy array can be, where the size in bytes does not tell: it has too many axes, or is empty.

    Raises:
        CheckpointError: it has too many axes, or one of size 0 beside one that is too large.
    """
    try:
        if 0 in shape or len(shape) > _USUAL_AXES:
            np.empty(shape, dtype)
    except ValueError as error:
        raise CheckpointError(f"damaged: {name} of shape {shape} cannot be read: {error}\n{AGAIN}") from error


Value = np.ndarray | Stored


def read(value: Value) -> np.ndarray:
    """The array, read from its file if it is `Stored`."""
    return value.read() if isinstance(value, Stored) else value


def pieces(value: Value) -> Iterator[memoryview]:
    """Yield the bytes of a contiguous array in pieces, each valid until the next."""
    if isinstance(value, Stored):
        yield from value.pieces()
    else:
        data = value.reshape(-1).view(np.uint8).data
        for start in range(0, len(data), _PIECE):
            yield data[start : start + _PIECE]


def equal(one: Value, other: Value) -> bool:
    """Whether two arrays have the same dtype, shape and bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pairs = zip(pieces(one), pieces(other), strict=True)
    return all(np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)) for a, b in pairs)


def not_finite(tensors: Mapping[str, Value], progress: Callable[[int], None]) -> list[str]:
    """The names of the tensors that hold NaN or infinities.

    All tensors are read to the last byte, so that checksums find damage. `progress` is called with the number of bytes
    read since its last call.
    """

    def is_finite(value: Value) -> bool:
        inexact = jnp.issubdtype(value.dtype, jnp.inexact)
        finite = True
        for piece in pieces(value):
            finite = finite and (not inexact or bool(np.isfinite(np.frombuffer(piece, value.dtype)).all()))
            progress(len(piece))
        return finite

    with ThreadPoolExecutor(THREADS) as pool:
        return [name for name, finite in zip(tensors, pool.map(is_finite, tensors.values()), strict=True) if not finite]
