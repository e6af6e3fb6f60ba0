"""Read checkpoint files: tell the format by the first bytes, and let `formats` read it."""

import functools
import itertools
import os
import stat
import tarfile
from typing import Any

from numpy.typing import NDArray

from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, about, is_text, listed
from jaxrnn.checkpoint.flax_names import with_torchs_names
from jaxrnn.checkpoint.formats import FILES, Format, index, orbax
from jaxrnn.checkpoint.formats.reading import Reading, warn
from jaxrnn.checkpoint.named import described_as
from jaxrnn.checkpoint.stored import Value, read

FilePath = str | os.PathLike[str]
Tensors = dict[str, Value]
_ALL = Reading()

_SAVE = "save the tensors as a .safetensors file, or with torch.save(model.state_dict(), path)"
_MOST_MEMBERS = 1000
# Files that are not checkpoints, by their first bytes: what they are, and the remedy.
_NOT_CHECKPOINTS = {
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "run git lfs pull"),
    b"\x93NUMPY": ("a NumPy .npy file", _SAVE),
    b"\x1f\x8b": ("compressed by gzip", "decompress it first"),
}


def load(
    path: FilePath, key: str | None = None, only_tensors: bool = False, dequantize: bool = False
) -> dict[str, NDArray[Any]]:
    """Read every tensor of a checkpoint file.

    The first bytes decide the format, not the name. Code in a checkpoint never runs: pickles are read by a machine that
    only builds data. Files from before torch 1.6 need torch 2.10 or later, which reads them with `weights_only=True`.

    Recurrent layers of ONNX and Keras, and cells of Flax and Haiku, get torch's names and layouts. Other layers keep
    the layouts of their library; `load_state_dict` knows Flax's.

    Args:
        path: a safetensors file; a torch.save file of a dict of tensors, such as a state dict; a TorchScript archive or
            a file of torch.export; a file of `flax.serialization`, a pickle or an .npz file of arrays, or the directory
            of an orbax checkpoint, in which parameters are found, and nested names are joined by dots; an ONNX model or
            a file of Keras (.keras, .weights.h5, .h5), which need the extras onnx and keras. Of a checkpoint in several
            files, the index, such as model.safetensors.index.json, its folder, or any of the files.
        key: the key of that dict in a nested file, dotted if it is deeper ("trainer.model"). If None, the dict is at
            the top, or in a torch.save file under one of "state_dict", "model_state_dict", "model_state" and "model",
            or in Flax's files under "params", beside its "batch_stats". A number is an index of a list.
        only_tensors: whether to leave out objects that a pickle holds beside tensors, such as a config of omegaconf,
            rather than refuse the file. Nothing of them is built.
        dequantize: whether to compute the weights of modules that torch quantized dynamically, such as an LSTM, with
            torch's usual names. They are rounded; the warning says how far.

    Returns:
        A dict from name to NumPy array, with the file's dtypes (bfloat16 as `ml_dtypes.bfloat16`). If the file also
        says settings, such as `nonlinearity="relu"`, the dict keeps them: `find_rnns` uses them, and `load_state_dict`
        warns if the module has others.

    Raises:
        CheckpointError: the file is missing, unreadable, damaged, or not a checkpoint; nothing is under `key`; two
            tensors would have the same name; or a package is needed and is missing or too old.

    Warns:
        UserWarning: what `only_tensors` left out; how much quantized weights are rounded; files and tensors that an
            index does not list. Of Flax, cells that jax.vmap has stacked, which keep their names and layouts. Of ONNX
            and Keras, layers that are left out because torch has nothing like them; transposed convolutions of Keras;
            settings that no weights hold, with what to do about each; settings that jaxrnn does not know; and what is
            assumed because the file does not say it.

    >>> import os, tempfile
    >>> import numpy as np
    >>> from jaxrnn import checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.safetensors")
    ...     checkpoint.save(path, {"scale": np.array([1.0, 2.0])})
    ...     checkpoint.load(path)
    {'scale': array([1., 2.])}
    """
    tensors = opened(path, Reading(key, only_tensors, dequantize))
    return described_as({name: read(value) for name, value in tensors.items()}, tensors)


def opened(path: FilePath, what: Reading = _ALL) -> Tensors:
    """As `load`, but tensors whose bytes can be used directly are not read: they are `Stored`."""
    tensors = stored_in(path, what)
    with about(path):
        return with_torchs_names(tensors, note=what.note, warn=functools.partial(warn, path))


def stored_in(path: FilePath, what: Reading = _ALL) -> Tensors:
    """As `opened`, with the names of the file."""
    with about(path):
        check_path(path)
        if (several := index.index_of(path)) is not None:
            return index.read(several, what)
        return _format(path).read(path, what)


def load_tree(path: FilePath, key: str | None = None) -> Any:
    """Read all of a nested file, such as an optimizer's state beside a model's, without torch.

    Args:
        path: a file of torch.save, msgpack or pickle, or the directory of an orbax checkpoint, as for `load`.
        key: the key of nested dicts and lists to return, dotted if it is deeper; all if None. What else the file holds
            does not matter.

    Returns:
        Dicts, lists, tuples, sets, numbers, strings and bytes, nested as in the file, with NumPy arrays for tensors,
        and names for dtypes.

    Raises:
        CheckpointError: as `load`, or the file has another format.

    >>> import os, tempfile
    >>> import numpy as np
    >>> from jaxrnn import checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.pt")
    ...     checkpoint.save(path, {"scale": np.array([1.0, 2.0])})
    ...     checkpoint.load_tree(path, key="scale")
    array([1., 2.])
    """

    with about(path):
        if (read_tree := getattr(_format(path), "read_tree", None)) is None:
            raise CheckpointError("its format holds tensors only, in no dicts\nread it with jaxrnn.checkpoint.load")
        return read_tree(path, key)


def _about_tar(path: FilePath) -> str:
    """What a tar file holds, and the remedy. Only the names in it are read."""
    try:
        with tarfile.open(path, "r:") as archive:
            names = [member.name for member in itertools.islice(archive, _MOST_MEMBERS)]
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        return f"a damaged tar file: {error}\n{AGAIN}"
    if {"storages", "tensors", "pickle"} <= set(names):
        remedy = "if you trust it, load it with any torch, and save its state_dict()"
        return f"a tar file, as torch before 0.4 wrote it\n{remedy}"
    return f"a tar file that holds {listed(names)}\nunpack it, and give the checkpoint in it"


def check_path(path: FilePath) -> None:
    if "\0" in os.fspath(path):
        raise CheckpointError("the path has a NUL character in it\ncheck the path")


def _format(path: FilePath) -> Format:
    """The format of a file, by its first bytes."""
    check_path(path)
    if os.path.islink(path) and not os.path.exists(path):
        raise CheckpointError(
            f"a link to {os.readlink(path)}, which does not exist\nrepair the link, or give the path of the file itself"
        )
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        return orbax
    if not stat.S_ISREG(mode):
        raise CheckpointError("not a regular file\ncopy it to a regular file first")
    with open(path, "rb") as file:
        head = file.read(1024)
    if not head:
        raise CheckpointError(f"an empty file\n{AGAIN}")
    for each in FILES:
        if each.sniff(head):
            return each
    if head[257:262] == b"ustar":
        raise CheckpointError(_about_tar(path))
    for magic, (cause, remedy) in _NOT_CHECKPOINTS.items():
        if head.startswith(magic):
            raise CheckpointError(f"{cause}\n{remedy}")
    if is_text(head):
        web = head.lstrip().lower().startswith((b"<!doctype html", b"<html"))
        remedy = "download the file itself, not the page about it" if web else _SAVE
        raise CheckpointError(f"{'an HTML page' if web else 'a text file'}, not a checkpoint\n{remedy}")
    if len(head) < 9:
        raise CheckpointError(f"truncated: it has only {len(head)} bytes\n{AGAIN}")
    raise CheckpointError(f"not a file of safetensors, torch.save, ONNX, Keras, msgpack or pickle\n{_SAVE}")
