"""Files of torch.save since torch 1.6, read and written without torch; other zip files are handed over or named."""

import functools
import os
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import numpy as np

from jaxrnn.checkpoint import stored
from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, listed
from jaxrnn.checkpoint.formats import quantized, torch_export, torchscript
from jaxrnn.checkpoint.formats.nested import at_key, choose, mapped
from jaxrnn.checkpoint.formats.pickle_machine import Global, LeftOut
from jaxrnn.checkpoint.formats.pickles import STATE_DICT, is_known, is_tensor, pickle_tree, unpickle
from jaxrnn.checkpoint.formats.reading import Reading, warn
from jaxrnn.checkpoint.formats.torch_archive import Archive, opened_archive
from jaxrnn.checkpoint.named import Described, modules_of
from jaxrnn.checkpoint.stored import Value, pieces

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


def sniff(head: bytes) -> bool:
    return head.startswith(b"PK\x03\x04")


def read(path: str | os.PathLike[str], what: Reading) -> dict[str, Value]:
    with opened_archive(path, _what_else) as archive:
        tensors, words = _read(archive, what, functools.partial(warn, path))
    for text, remedy in words:
        warn(path, text, remedy)
    return tensors


def _read(
    archive: Archive, what: Reading, warn: Callable[[str, str], None]
) -> tuple[Described, Sequence[tuple[str, str]]]:
    """The tensors, and what to warn of, with remedies."""
    if torchscript.is_one(archive):
        return torchscript.read(archive, what)
    if torch_export.is_one(archive):
        return torch_export.read(archive, what, warn)
    left_out: set[str] | None = set() if what.only_tensors else None
    checkpoint = unpickle(_pickle(archive), left_out, what.dequantize)
    wanted = (lambda value: is_tensor(value) or quantized.is_packed(value)) if what.dequantize else is_tensor
    found = choose(checkpoint, what, wanted, warn)
    plan = quantized.Plan.of(found) if what.dequantize else quantized.Plan(dict(found))
    tensors, words = plan.dequantized(archive.arrays(plan.stored))
    if left_out:
        words = [f"left out objects that are not tensors: {listed(sorted(left_out))}", *words]
    return Described(tensors, modules=modules_of(found)), [(text, "") for text in words]


def _pickle(archive: Archive) -> bytes:
    if "data.pkl" not in archive.entries:
        raise CheckpointError(f"damaged: its data.pkl is not where torch.save writes it\n{AGAIN}")
    return archive.text("data.pkl")


def read_tree(path: str | os.PathLike[str], key: str | None) -> Any:
    """What is under a key in a file's pickle, or all of it, with NumPy arrays for tensors."""
    with opened_archive(path, _what_else) as archive:
        if torch_export.is_one(archive):
            raise CheckpointError(
                "a file of torch.export, which holds tensors only\nread it with jaxrnn.checkpoint.load"
            )
        left_out: set[str] | None = None if key is None else set()
        if torchscript.is_one(archive):
            tree = torchscript.tree(archive, left_out)
        else:
            tree = unpickle(_pickle(archive), left_out)
        return _resolved(archive, at_key(tree, key), key)


def _resolved(archive: Archive, tree: Any, key: str | None) -> Any:
    """A tree with arrays for its tensors."""
    tensors: dict[str, Any] = {}
    found: dict[int, str] = {}

    def note(name: str, value: Any) -> Any:
        if isinstance(value, LeftOut):
            raise CheckpointError(
                f"it holds more than data, and its code is not run: {name or key} is a {value.name}\n{STATE_DICT}"
            )
        if is_tensor(value):
            name += "" if name not in tensors else f" ({len(tensors)})"  # the keys 0 and "0" differ
            found[id(value)] = name
            tensors[name] = value
        return value

    mapped(tree, note)
    arrays = archive.arrays(tensors)

    def resolved(name: str, value: Any) -> Any:
        if id(value) in found:
            return stored.read(arrays[found[id(value)]])
        return value.name if isinstance(value, Global) else value

    return mapped(tree, resolved)


def _what_else(names: list[str]) -> str | None:
    """What a zip file is that torch.save did not write, and the remedy."""
    if any(name.endswith("/data.pkl") for name in names) or torch_export.are_its(names):
        return None
    inside = [name for name in names if name.endswith((".pth", ".pt", ".ckpt", ".bin", ".safetensors"))]
    if any(name.endswith("/model.json") for name in names) and any("/tensors/" in name for name in names):
        return f"a TorchScript archive from before torch 1.4\n{torchscript.EXPORT}"
    if any("/.data/" in name for name in names):
        return f"an archive of torch.package, which holds code\nload it with torch.package, and {STATE_DICT}"
    if inside:
        inside.sort(key=lambda name: "optim" in name or "variables" in name)  # as Stable-Baselines3 has beside weights
        return f"a zip file with checkpoints in it\nunzip it, and give one of them: {listed(inside)}"
    return f"a zip file that torch.save did not write: it has no data.pkl\n{STATE_DICT}"


def write(file: IO[bytes], tensors: Mapping[str, Value], wrote: Callable[[int], None]) -> str:
    """Write contiguous tensors as torch.save writes a state dict."""
    return write_tree(file, OrderedDict(tensors), wrote)


def write_tree(file: IO[bytes], tree: Any, wrote: Callable[[int], None]) -> str:
    """Write nested dicts, lists and tuples of contiguous tensors, strings and numbers as torch.save writes them."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, np.ndarray | stored.Stored) and not is_known(value.dtype):
            cause = f"{name} has dtype {value.dtype}, which torch does not have"
            raise CheckpointError(f"{cause}\nconvert it, or leave it out")

    mapped(tree, check)
    pickled, arrays = pickle_tree(tree)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", sys.byteorder)
        for index, array in enumerate(arrays):
            with archive.open(f"archive/data/{index}", "w", force_zip64=array.nbytes >= 1 << 31) as entry:
                for piece in pieces(array):
                    entry.write(piece)
                    wrote(len(piece))
        archive.writestr("archive/version", "3\n")
    return file.name
