"""Arrays that lie in files: described when a file is opened, and read when they are wanted, in pieces if need be.

A checkpoint may be larger than the memory: what only passes through goes piece by piece.
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

from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, os_cause

# Large beside what a system call costs, and small beside the processor's caches.
_PIECE = 1 << 20
# Threads that read, take checksums and compare, all of which let others run.
THREADS = 4


class UnreadableError(CheckpointError):
    """Of an array in a file: its message starts with that file's path already."""


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
    """A contiguous array of numbers in a file, in the machine's byte order.

    Attributes:
        source: the file.
        offset: where in it the array begins, in bytes.
        dtype: of the array.
        shape: of the array.
        checksum: the CRC-32 of its bytes, or None if the file has none.
        entry: what the file calls that part of itself, for the message where the checksum does not match.
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
        """The array, in memory of its own.

        Raises:
            UnreadableError: the file is gone, is another one than was opened, or is damaged.
        """
        data = np.empty(self.nbytes, np.uint8)
        for _ in self._through(data.data):
            pass
        return data.view(self.dtype).reshape(self.shape)

    def pieces(self) -> Iterator[memoryview]:
        """The array's bytes, in pieces that are good until the next one; raises as `read`, at the end at the latest."""
        return self._through(memoryview(bytearray(min(_PIECE, self.nbytes))))

    def _through(self, memory: memoryview) -> Iterator[memoryview]:
        """Read into memory, piece by piece, from its start again whenever it is full."""
        try:
            with open(self.source.path, "rb") as file:
                if _stamp(file) != self.source.stamp:
                    raise UnreadableError(f"{self.source.path}: it has changed since it was opened\nopen it again")
                file.seek(self.offset)
                checksum, done = 0, 0
                while done < self.nbytes:
                    start = done % len(memory)
                    piece = memory[start : start + min(_PIECE, self.nbytes - done)]
                    if file.readinto(piece) < len(piece):
                        raise UnreadableError(f"{self.source.path}: truncated while it was read\n{AGAIN}")
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


Value = np.ndarray | Stored


def read(value: Value) -> np.ndarray:
    """The array, read if it is stored."""
    return value.read() if isinstance(value, Stored) else value


def pieces(value: Value) -> Iterator[memoryview]:
    """The bytes of a contiguous array, in pieces that are good until the next one."""
    if isinstance(value, Stored):
        yield from value.pieces()
    else:
        data = value.reshape(-1).view(np.uint8).data
        for start in range(0, len(data), _PIECE):
            yield data[start : start + _PIECE]


def equal(one: Value, other: Value) -> bool:
    """Whether two arrays are of the same dtype and shape, and of the same bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pairs = zip(pieces(one), pieces(other), strict=True)
    return all(np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)) for a, b in pairs)


def not_finite(tensors: Mapping[str, Value], progress: Callable[[int], None]) -> list[str]:
    """The names of the tensors that hold NaN or infinities.

    All of them are read, to the last byte: damage that a checksum tells comes to light. `progress` is called with how
    many bytes were read since.
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
