"""Arrays in files, in pieces: every bit, comparison, what is not finite, and damage that comes to light by reading."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrnn.checkpoint.errors import UnreadableError
from jaxrnn.checkpoint.formats.safetensors import DTYPES
from jaxrnn.checkpoint.stored import Source, Stored, equal, not_finite, pieces

# Several pieces, and a rest.
NUMBERS = np.random.RandomState(0).standard_normal(400_003)


def _stored(path: Path, array: np.ndarray, checksum: bool = True) -> Stored:
    path.write_bytes(b"head" + array.tobytes() + b"tail")
    with open(path, "rb") as file:
        crc = zlib.crc32(array.tobytes()) if checksum else None
        return Stored(Source.of(file), 4, array.dtype, array.shape, crc, "data/0")


@pytest.mark.parametrize("shape", [(400_003,), (1, 400_003), (), (0, 3)])
def test_read_and_pieces(shape: tuple[int, ...], tmp_path: Path) -> None:
    array = NUMBERS[: int(np.prod(shape))].reshape(shape)
    stored = _stored(tmp_path / "a", array)
    assert (stored.size, stored.nbytes) == (array.size, array.nbytes)
    np.testing.assert_array_equal(stored.read(), array, strict=True)
    for value in (stored, array):
        assert b"".join(map(bytes, pieces(value))) == array.tobytes()
        assert all(len(piece) <= 1 << 20 for piece in pieces(value))


def test_equal(tmp_path: Path) -> None:
    stored = _stored(tmp_path / "a", NUMBERS)
    assert equal(stored, NUMBERS)
    assert equal(NUMBERS, _stored(tmp_path / "b", NUMBERS, checksum=False))
    for index in (0, 131_072, -1):
        other = NUMBERS.copy()
        other[index] = np.nextafter(other[index], 9)
        assert not equal(stored, other)
        assert not equal(other, stored)
    assert not equal(stored, NUMBERS.view(np.int64))
    assert not equal(stored, NUMBERS[None])
    assert equal(np.array([np.nan]), np.array([np.nan]))
    assert not equal(np.array([0.0]), np.array([-0.0]))


def test_not_finite(tmp_path: Path) -> None:
    odd = NUMBERS.copy()
    odd[3] = np.inf  # not in the last piece
    tensors = {"good": _stored(tmp_path / "a", NUMBERS), "inf": odd, "nan": np.array(np.nan, np.float16)}
    done: list[int] = []
    assert not_finite(tensors, done.append) == ["inf", "nan"]
    assert sum(done) == 2 * NUMBERS.nbytes + 2
    dtypes = [jnp.dtype(name) for name in DTYPES.values()]
    assert not_finite({dtype.name: np.ones(3, dtype) for dtype in dtypes}, done.append) == []


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda path, data: path.write_bytes(data[:-1] + b"x"), "the file has changed since it was opened"),
        (lambda path, data: path.write_bytes(data[:-9]), "the file has changed since it was opened"),
        (lambda path, data: path.unlink(), "no such file"),
    ],
)
def test_a_file_that_changes(change: Callable[[Path, bytes], object], cause: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    stored = _stored(path, NUMBERS)
    os.utime(path, ns=(0, 0))
    with pytest.raises(UnreadableError, match=f"^{path}: the file has changed since"):
        stored.read()
    stored = _stored(path, NUMBERS)
    change(path, path.read_bytes())
    if path.exists():
        os.utime(path, ns=(1, 1))  # as time would
    for read in (stored.read, lambda: list(stored.pieces())):
        with pytest.raises(UnreadableError, match=f"^{path}: {cause}\n"):
            read()


def test_damage(tmp_path: Path) -> None:
    path = tmp_path / "a"
    stored = _stored(path, NUMBERS)
    data = bytearray(path.read_bytes())
    data[1_000_000] ^= 1
    path.write_bytes(data)
    with open(path, "rb") as file:
        damaged = Stored(Source.of(file), 4, stored.dtype, stored.shape, stored.checksum, "data/0")
        short = Stored(Source.of(file), 9, stored.dtype, stored.shape)
    for read in (damaged.read, lambda: list(damaged.pieces()), lambda: equal(damaged, damaged)):
        with pytest.raises(UnreadableError, match=rf"^{path}: damaged: the checksum \(CRC\) of its entry 'data/0'"):
            read()
    with pytest.raises(UnreadableError, match=f"^{path}: the file was truncated while it was read\n"):
        short.read()
