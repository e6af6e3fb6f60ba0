"""Zip archives that torch writes: their entries, and the tensors whose numbers are in entries."""

import contextlib
import io
import os
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import numpy as np

from jaxrnn.checkpoint.errors import AGAIN, CheckpointError
from jaxrnn.checkpoint.formats.bombs import largest
from jaxrnn.checkpoint.formats.nested import check_expanded
from jaxrnn.checkpoint.formats.pickles import Other, StoredTensor
from jaxrnn.checkpoint.stored import Source, Stored, Value, check_shape

_PIECE = 1 << 20  # bytes read at a time
_TRUSTED = "get the file from a source that you trust"
# A compressed pickle, JSON or code may inflate to this many times its size, and to this many bytes in any case: what is
# built from each byte takes a hundred. torch compresses code alone.
_LARGEST_TEXT, _SMALL_TEXT = 20, 1 << 18
# Without a folder: the entries of torch.export before torch 2.8.
TOP = ("serialized_exported_program.json",)


class Archive:
    """An opened archive.

    Attributes:
        entries: by their names inside the archive's one folder, if it has one.
        size: of the archive, in bytes.
        first: the bytes of the file before the archive, if that is an entry of another.
    """

    def __init__(self, file: IO[bytes], source: Source | None, size: int, first: int = 0) -> None:
        self._file, self._source = file, source
        self.size: int = size
        self.first: int = first
        self._zip = zipfile.ZipFile(file)
        self.entries: dict[str, zipfile.ZipInfo] = {}

    @property
    def path(self) -> str:
        """The file."""
        return os.fspath(self._file.name)

    @property
    def names(self) -> list[str]:
        """All entries, with their folder."""
        return self._zip.namelist()

    def enter(self, in_folder: bool = True) -> None:
        """Fill `entries`, after checks that torch wrote them."""
        infos = self._zip.infolist()
        # written with torch.serialization.set_crc32_options(False)
        unchecked = not any(entry.CRC for entry in infos)
        for entry in infos:
            if unchecked:
                del entry.CRC  # zipfile then compares none
            name = entry.filename.partition("/")[2] if in_folder else entry.filename
            known = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            plain = known and not entry.filename.startswith("/")
            if name in self.entries or not plain or ".." in entry.filename.split("/"):
                raise CheckpointError(f"damaged: torch.save writes no entry such as {entry.filename}\n{AGAIN}")
            self.entries[name] = entry

    def check_inflated(self) -> None:
        """Refuse a zip bomb."""
        infos = self._zip.infolist()
        if (inflated := sum(entry.file_size for entry in infos)) > largest(self.size):
            cause = f"a zip bomb: its {len(infos)} entries inflate to {inflated} bytes, from a file of {self.size}"
            raise CheckpointError(f"{cause}\n{_TRUSTED}")

    def text(self, name: str) -> bytes:
        """An entry that is parsed: a pickle, JSON or code."""
        entry = self.entries[name]
        if entry.file_size > max(_SMALL_TEXT, _LARGEST_TEXT * entry.compress_size):
            cause = f"a zip bomb: its entry {entry.filename} inflates to {entry.file_size} bytes"
            raise CheckpointError(f"{cause}\n{_TRUSTED}")
        return self._read(entry).tobytes()

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator["Archive"]:
        """An entry that is an archive of torch.save."""
        entry = self.entries[name]
        if entry.compress_type == zipfile.ZIP_STORED:
            first, source = self._offset(entry), self._source
            file: Any = _Window(self._file, first, entry.file_size)
        else:
            first, source, file = 0, None, io.BytesIO(self._read(entry).tobytes())
        archive = Archive(file, source, entry.file_size, self.first + first)
        archive.check_inflated()
        archive.enter()
        yield archive

    def _read(self, entry: zipfile.ZipInfo) -> np.ndarray:
        """Read an entry's bytes. zipfile compares the checksum at the end."""
        data = np.empty(entry.file_size, np.uint8)
        with self._zip.open(entry) as file:
            start = 0
            while piece := file.read(_PIECE):
                data[start : start + len(piece)] = np.frombuffer(piece, np.uint8)
                start += len(piece)
        if start < len(data):
            raise EOFError(f"its entry {entry.filename} ends early")
        return data

    def arrays(self, tensors: Mapping[str, Any]) -> dict[str, Value]:
        """Every tensor: `Stored` if its bytes can be used directly, otherwise a copy.

        A storage that several tensors share is read once, and dropped after the last of them.
        """
        tensors = _checked(tensors)
        if (total := sum(tensor.nbytes for tensor in tensors.values())) > largest(self.size):
            cause = f"a zip bomb: its tensors have {total} bytes, in a file of {self.size}"
            raise CheckpointError(f"{cause}\n{_TRUSTED}")
        order = self.text("byteorder") if "byteorder" in self.entries else b"little"
        if order not in (b"little", b"big"):
            raise CheckpointError(f"damaged: its byte order should be little or big, and is {order[:20]!r}\n{AGAIN}")
        swap = order.decode() != sys.byteorder
        by_storage: dict[str, list[str]] = {}
        for name, tensor in tensors.items():
            by_storage.setdefault(tensor.storage.key, []).append(name)
        arrays: dict[str, Value] = {}
        for key, names in by_storage.items():
            entry = self.entries.get(key)
            for name in names:
                wanted = tensors[name].storage.nbytes
                if entry is None or wanted != entry.file_size:
                    found = "none are there" if entry is None else f"{entry.file_size} are there"
                    raise CheckpointError(f"damaged: {name} should have {wanted} bytes, and {found}\n{AGAIN}")
            assert entry is not None  # every storage has a name
            plain = len(names) == 1 and tensors[names[0]].is_plain and not swap
            if plain and self._source is not None and entry.compress_type == zipfile.ZIP_STORED:
                tensor, offset = tensors[names[0]], self.first + self._offset(entry)
                check_shape(names[0], tensor.shape, tensor.dtype)
                arrays[names[0]] = Stored(
                    self._source, offset, tensor.dtype, tensor.shape, getattr(entry, "CRC", None), entry.filename
                )
            else:
                data = self._read(entry)
                arrays |= {name: _array(name, tensors[name], data, swap) for name in names}
        return {name: arrays[name] for name in tensors}

    def _offset(self, entry: zipfile.ZipInfo) -> int:
        """Where an entry's uncompressed bytes begin in the archive."""
        self._zip.open(entry).close()  # which checks the entry's header
        self._file.seek(entry.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", self._file.read(4))
        offset = entry.header_offset + 30 + name_length + extra_length
        end = offset + entry.file_size
        if entry.compress_size != entry.file_size or end > self.size:
            raise EOFError(f"its entry {entry.filename} ends early")
        return offset


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: IO[bytes], first: int, size: int) -> None:
        self._file, self._first, self._size, self._at = file, first, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if at < 0:
            raise ValueError("a place before the beginning")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, count: int | None = -1) -> bytes:
        left = max(self._size - self._at, 0)
        self._file.seek(self._first + self._at)
        data = self._file.read(left if count is None or count < 0 else min(count, left))
        self._at += len(data)
        return data


@contextlib.contextmanager
def opened_archive(path: str | os.PathLike[str], what_else: Callable[[list[str]], str | None]) -> Iterator[Archive]:
    """Open a file, whose damage becomes a CheckpointError.

    Args:
        path: the file's.
        what_else: from the names of all entries to what a zip file is that is not torch's, with the remedy.
    """
    try:
        with open(path, "rb") as file:
            archive = Archive(file, Source.of(file), os.fstat(file.fileno()).st_size)
            archive.check_inflated()
            if text := what_else(archive.names):
                raise CheckpointError(text)
            archive.enter(in_folder=not any(name in TOP for name in archive.names))
            yield archive
    except zipfile.BadZipFile as error:
        cause = f"a truncated or damaged zip file: {error}"
        if damaged := re.fullmatch(r"Bad CRC-32 for file (.*)", str(error), re.DOTALL):
            cause = f"damaged: the checksum (CRC) of its entry {damaged[1]} does not match"
        raise CheckpointError(f"{cause}\n{AGAIN}") from error
    except CheckpointError:
        raise
    # zipfile and zlib raise these on damage, and a RuntimeError for an unknown version of the format.
    except (RuntimeError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise CheckpointError(f"a damaged zip file, or one that torch.save did not write: {error}\n{AGAIN}") from error


def _checked(tensors: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The tensors, after checks that all are dense tensors of numbers that fit their storages."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Other):
            raise CheckpointError(f"{name} is a {tensor.what}\nsave it as a dense tensor of numbers")
        check_expanded(name, tensor.shape, tensor.nbytes, tensor.storage.nbytes)
    return dict(tensors)


def _array(name: str, tensor: StoredTensor, data: np.ndarray, swap: bool) -> np.ndarray:
    """A contiguous copy of a tensor's view of its storage."""
    itemsize = tensor.dtype.itemsize
    try:
        if tensor.numel == 0:
            return np.zeros(tensor.shape, tensor.dtype)
        last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
        if (last + 1) * itemsize > len(data):
            raise ValueError("it reaches past the end of what is stored")
        # As raw bytes, because as_strided does not know every dtype.
        numbers = data[tensor.offset * itemsize : (last + 1) * itemsize].view(f"V{itemsize}")
        strides = [step * itemsize for step in tensor.strides]
        view = np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides, writeable=False)
        array = np.array(view, order="C").view(tensor.dtype)
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"damaged: {name} of shape {tensor.shape} cannot be read: {error}\n{AGAIN}") from error
    if swap:
        array = array.byteswap()
    for bit in tensor.bits:
        array = np.asarray(np.conj(array) if bit == "conj" else -array)
    return array
