"""A file for each format of checkpoints.

To add one, write a module with the functions of `FileFormat`, and list it in `FILES`. They are tried in order: put a
format that is a kind of zip before `torch_zip`, which claims every other zip.

A reader refuses damage (`errors.AGAIN` is the remedy), tensors that would take more memory than `bombs.Budget` allows,
two tensors of one name (`named.Names`), and a key if its files have none (`Reading.check_no_key`).
"""

import os
from collections.abc import Callable, Mapping
from typing import IO, Protocol

from jaxrnn.checkpoint.formats import (
    keras,
    msgpack,
    npz,
    onnx,
    orbax,
    pickled_arrays,
    safetensors,
    torch_legacy,
    torch_zip,
)
from jaxrnn.checkpoint.formats.reading import Reading
from jaxrnn.checkpoint.stored import Value

Writer = Callable[[IO[bytes], Mapping[str, Value], Callable[[int], None]], str]


class Format(Protocol):
    """The functions of every format. Their errors leave the path out: `files.opened` puts it first.

    A format that holds more than tensors also has `read_tree(path, key)`. One that can be written has `SUFFIXES` and
    `write(file, tensors, wrote)`, which calls `wrote` with the number of bytes written since its last call, and returns
    the path it wrote: the file's, or that of a directory beside it.
    """

    def read(self, path: str | os.PathLike[str], what: Reading) -> dict[str, Value]:
        """The tensors by name."""


class FileFormat(Format, Protocol):
    """A format of files, not directories."""

    def sniff(self, head: bytes) -> bool:
        """Whether a file that begins so has this format."""


FILES: tuple[FileFormat, ...] = (keras, npz, torch_zip, torch_legacy, safetensors, onnx, msgpack, pickled_arrays)
WRITERS: dict[str, Writer] = {
    suffix: each.write for each in (safetensors, torch_zip, orbax) for suffix in each.SUFFIXES
}
