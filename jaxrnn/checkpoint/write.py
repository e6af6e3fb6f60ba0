"""Write checkpoint files atomically, and read them back before they replace an existing one."""

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import IO, Any

import numpy as np

from jaxrnn._compat import is_orbax_tree
from jaxrnn.checkpoint.arrays import NO_NUMBERS, dtype_of, to_numpy
from jaxrnn.checkpoint.errors import CheckpointError, about, listed
from jaxrnn.checkpoint.files import FilePath, Tensors, check_path, load_tree, stored_in
from jaxrnn.checkpoint.formats import WRITERS, torch_zip
from jaxrnn.checkpoint.formats.nested import mapped
from jaxrnn.checkpoint.formats.orbax import NEW
from jaxrnn.checkpoint.stored import THREADS, Stored, equal

Wrote = Callable[[int], None]
# None on systems without such locks, which do not remove open files either.
fcntl: ModuleType | None = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None


def save(path: FilePath, tensors: Mapping[str, Any], progress: Wrote | None = None) -> None:
    """Write tensors to a file. It is read back and compared, and only then replaces an existing one.

    Args:
        path: the file. The suffix decides the format: .safetensors; .pt, .pth, .ckpt or .bin for a state dict that
            `torch.load` reads, also with `weights_only=True`; .orbax for the directory of an orbax checkpoint. An
            existing one is replaced.
        tensors: from name to array of numpy or jax (or torch), of any shape, and any dtype that the format has.
        progress: called now and then with the number of bytes written or compared since its last call; in all twice
            the tensors' bytes.

    Raises:
        TypeError: tensors is not a dict.
        CheckpointError: another suffix, a value that cannot be written, an error of the file system, or a file that
            does not read back as it was written.

    >>> import os, tempfile
    >>> import numpy as np
    >>> from jaxrnn import checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.pt")  # torch.load reads it
    ...     checkpoint.save(path, {"head.weight": np.ones((2, 3)), "head.bias": np.zeros(2)})
    ...     os.listdir(folder), list(checkpoint.load(path))
    (['model.pt'], ['head.weight', 'head.bias'])
    """
    if not isinstance(tensors, Mapping):
        makers = "jaxrnn.state_dict(module), jaxrnn.checkpoint.linen.state_dict(module, variables, x) or, in torch,"
        got = type(tensors).__name__
        raise TypeError(
            f"tensors should be a dict from name to array, got {got}\nmake it by {makers} module.state_dict()"
        )
    with about(path, "check the folder and its space"):
        check_path(path)
        write = WRITERS.get(os.path.splitext(os.fspath(path))[1])
        if write is None:
            suffix = os.path.splitext(os.fspath(path))[1]
            cause = f"no format is written to a name that ends in {suffix!r}" if suffix else "its name has no suffix"
            raise CheckpointError(f"{cause}\nend the name in one of {', '.join(WRITERS)}")
        if others := [name for name in tensors if not isinstance(name, str)]:
            raise CheckpointError(f"names should be strings, got {listed(others)}\ngive a dict from name to array")
        if nested := [name for name, value in tensors.items() if isinstance(value, Mapping)]:
            each = f'{{f"{nested[0]}.{{name}}": array for name, array in tensors["{nested[0]}"].items()}}'
            cause = f"tensors should be one flat dict of arrays, and has dicts under {listed(nested)}"
            raise CheckpointError(f"{cause}\njoin the names with dots, and leave out what is not an array: {each}")
        arrays = {name: value if _is_plain(value) else to_numpy(name, value) for name, value in tensors.items()}
        wrote = progress or (lambda count: None)
        _save(
            os.path.realpath(path),
            lambda file: write(file, arrays, wrote),
            lambda written, pool: _compare(written, arrays, pool, wrote),
        )


def save_tree(path: FilePath, tree: Any) -> None:
    """Write nested dicts and lists to a file that `torch.load` reads: a model and its optimizer, for example.

    As with `save`, the file is read back and compared, and only then replaces an existing one.

    Args:
        path: the file, named .pt, .pth, .ckpt or .bin.
        tree: dicts, with strings or integers as keys, lists and tuples, nested, of arrays of numpy or jax (or torch),
            strings, numbers, True, False and None. Arrays become tensors.

    Raises:
        CheckpointError: another suffix, a value that cannot be written, an error of the file system, or a file that
            does not read back as it was written.

    >>> import os, tempfile
    >>> import numpy as np
    >>> from jaxrnn import checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "run.pt")
    ...     checkpoint.save_tree(path, {"model": {"head.bias": np.zeros(2)}, "epoch": 3})
    ...     checkpoint.load_tree(path)
    {'model': {'head.bias': array([0., 0.])}, 'epoch': 3}
    """
    with about(path, "check the folder and its space"):
        check_path(path)
        if not os.fspath(path).endswith(torch_zip.SUFFIXES):
            raise CheckpointError(f"nested dicts are written for torch alone\nend the name in {torch_zip.SUFFIXES[0]}")
        plain = mapped(_with_dicts(tree), _plain)

        def compare(written: str, pool: ThreadPoolExecutor) -> None:
            if different := _different(load_tree(written), plain):
                cause = f"read back, it differs from what was written: {listed(different)}"
                raise CheckpointError(f"{cause}\ncheck the disk")

        _save(os.path.realpath(path), lambda file: torch_zip.write_tree(file, plain, lambda count: None), compare)


def _with_dicts(value: Any, place: str = "") -> Any:
    """A copy in which dicts, lists and tuples of other classes are plain ones."""
    if isinstance(value, Mapping):
        if odd := [key for key in value if type(key) not in (str, int)]:
            cause = f"keys should be strings or integers, and {place or 'the tree'} has {odd[0]!r}"
            raise CheckpointError(f"{cause}\nrename it: a string will do")
        return {key: _with_dicts(item, _below(place, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_with_dicts(item, _below(place, index)) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return value


def _below(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


def _plain(name: str, value: Any) -> Any:
    """A leaf as it is written."""
    if value is None or type(value) in (str, bool, float) or (type(value) is int and value.bit_length() < 2000):
        return value
    if dtype_of(value) == NO_NUMBERS:
        cause = f"{name or 'the tree'} is of type {type(value).__name__}, which is not written"
        raise CheckpointError(f"{cause}\nleave it out, or give its arrays, strings and numbers")
    return value if _is_plain(value) else to_numpy(name, value)


def _different(found: Any, expected: Any, place: str = "") -> list[str]:
    """The places where two trees differ."""
    if isinstance(expected, np.ndarray | Stored):
        same = isinstance(found, np.ndarray) and equal(found, expected)
    elif isinstance(expected, dict | list | tuple) and type(found) is type(expected):
        one, other = (dict(each.items() if isinstance(each, dict) else enumerate(each)) for each in (found, expected))
        if list(one) == list(other):
            return [where for key in other for where in _different(one[key], other[key], _below(place, key))]
        same = False
    else:
        same = type(found) is type(expected) and repr(found) == repr(expected)
    return [] if same else [place or "the tree"]


def replace(path: FilePath, data: bytes) -> None:
    """Write a file that is complete once it has its name."""
    check_path(path)
    path = os.path.realpath(path)
    _remove_abandoned(path)
    with _temporary(path) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()
            os.replace(file.name, path)
        finally:
            _remove(file.name, path)


def _is_plain(value: Any) -> bool:
    """Whether an array's bytes can be written without a copy."""
    if isinstance(value, Stored):
        return True
    return type(value) is np.ndarray and value.flags.c_contiguous and value.dtype == dtype_of(value) != NO_NUMBERS


def _save(path: str, write: Callable[[IO[bytes]], str], compare: Callable[[str, ThreadPoolExecutor], None]) -> None:
    """Write and compare a file, which then replaces an existing one. `write` returns the path that it wrote."""
    if os.path.isdir(path) and os.listdir(path) and not is_orbax_tree(path):
        raise CheckpointError("a directory that is not an orbax checkpoint, so it is not replaced\nchoose another name")
    _remove_abandoned(path)
    with _temporary(path) as file, ThreadPoolExecutor(THREADS) as pool:
        temporary = file.name
        try:
            mode = stat.S_IMODE(os.stat(path).st_mode) if os.path.isfile(path) else None
            if mode is not None:  # whoever may not read the old file may not read this one
                os.chmod(temporary, mode | stat.S_IWUSR | stat.S_IRUSR)
            written = write(file)
            file.flush()
            synced = pool.submit(_sync, written)
            compare(written, pool)
            synced.result()
            if os.path.isdir(path) and written != temporary:
                os.rename(path, temporary + _OLD)  # a directory cannot replace another
            if mode is not None and written == temporary:
                os.chmod(temporary, mode)
            if fcntl is None:  # on systems where an open file cannot be renamed
                file.close()
            os.replace(written, path)
        finally:
            _remove(temporary, path)


@contextlib.contextmanager
def _temporary(path: str) -> Iterator[IO[bytes]]:
    """Make a new, locked file in the same folder, because a rename is atomic only within a file system."""
    while True:
        with open(f"{path}.{secrets.token_hex(4)}.tmp", "xb") as file:
            if _hold(file):
                yield file
                return


def _hold(file: IO[bytes]) -> bool:
    """Lock a new file, if the file system can. False if a concurrent cleanup removed it first."""
    try:
        _lock(file)
    except BlockingIOError:
        return False
    except OSError:  # no locks here: files of killed writers stay, because nobody can tell them
        pass
    return os.path.exists(file.name)


# The companions of a temporary file: the directory that is written, as orbax names it until it is complete, and the
# one to be replaced.
_OLD = ".old"
_BESIDE = (NEW, f"{NEW}.orbax-checkpoint-tmp", _OLD)


def _remove_abandoned(path: str) -> None:
    """Remove what killed writers of this path left: temporary files that nobody has locked."""
    folder, name = os.path.split(path)
    pattern = re.compile(re.escape(name) + r"\.[0-9a-f]{8}\.tmp")
    for entry in os.listdir(folder):
        if pattern.fullmatch(entry):
            with contextlib.suppress(OSError), open(os.path.join(folder, entry), "rb") as file:
                _lock(file)
                _remove(file.name, path)


def _remove(temporary: str, path: str) -> None:
    """Remove a temporary file and its companions, but keep a backup that is the only complete copy."""
    if os.path.isdir(temporary + _OLD) and not os.path.lexists(path):
        os.rename(temporary + _OLD, path)
    for suffix in _BESIDE:
        if os.path.isdir(temporary + suffix):
            shutil.rmtree(temporary + suffix)
    if os.path.lexists(temporary):  # last, because it leads to the others
        os.remove(temporary)


def _sync(path: str) -> None:
    """Flush a file, or everything in a directory, to disk."""
    files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    for name in files or [path]:
        with open(name, "r+b") as file:
            os.fsync(file.fileno())


def _lock(file: IO[bytes]) -> None:
    """Lock the file until it is closed; OSError if another process has locked it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _compare(path: str, arrays: Tensors, pool: ThreadPoolExecutor, progress: Wrote) -> None:
    """Read a file, and compare it with the tensors."""
    found = stored_in(path)

    def same(name: str) -> bool:
        return name in found and name in arrays and equal(found[name], arrays[name])

    names = list({**found, **arrays})
    different = []
    for name, is_same in zip(names, pool.map(same, names), strict=True):
        different += [] if is_same else [name]
        progress(arrays[name].nbytes if name in arrays else 0)
    if different:
        raise CheckpointError(f"read back, it differs from what was written: {listed(different)}\ncheck the disk")
