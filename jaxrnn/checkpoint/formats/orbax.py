"""Orbax checkpoints, which are directories: read a tree of arrays, with names joined by dots, and write a dict.

Orbax comes with Flax. It is imported only when needed, because the import is slow.
"""

import asyncio
import contextlib
import dataclasses
import functools
import glob
import logging
import math
import os
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn._compat import is_orbax_tree
from jaxrnn.checkpoint import stored
from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, check_unicode, listed
from jaxrnn.checkpoint.formats import trees
from jaxrnn.checkpoint.formats.bombs import largest
from jaxrnn.checkpoint.formats.nested import at_key
from jaxrnn.checkpoint.formats.reading import Reading
from jaxrnn.checkpoint.stored import Value

SUFFIXES = (".orbax",)
NEW = ".new"  # what the directory's name has more than the file's


def read(path: str | os.PathLike[str], what: Reading) -> dict[str, Value]:
    params = trees.params_in(_tree(path), what, trees.is_array)
    return {name: np.array(value, order="C") for name, value in params.items()}


def read_tree(path: str | os.PathLike[str], key: str | None) -> Any:
    """What is under a key of a checkpoint, or all of it."""
    return at_key(_tree(path), key)


def _tree(path: str | os.PathLike[str]) -> Any:
    import orbax.checkpoint as ocp

    path = _tree_in(os.path.abspath(path))
    try:
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=_patient_handlers())
        with _quiet(), ocp.Checkpointer(handler) as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata.tree
            _check((leaf for _, leaf in trees.leaves(metadata)), path)
            # As NumPy arrays: JAX would cut them to 32 bits and move them to a device. Strings stay strings.
            arguments = jax.tree.map(
                lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray if _is_array(leaf) else None), metadata
            )
            restored = checkpointer.restore(path, restore_args=arguments)
            return {name: _without_values(value) for name, value in restored.items()}
    except CheckpointError:
        raise
    except Exception as error:  # on damage, orbax, tensorstore and JSON raise almost anything
        cause = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise CheckpointError(
            f"a damaged orbax checkpoint, or one that this orbax cannot read ({cause})\n{AGAIN}"
        ) from error


@functools.cache
def _patient_handlers() -> Any:
    """Orbax's own handlers of arrays, strings and numbers, but for errors: these wait for all that is being read.

    Otherwise tensorstore, which is still reading, prints a traceback for each array, because the event loop is closed.
    """
    import orbax.checkpoint as ocp

    def patient(handler: Any) -> Any:
        class Patient(handler):
            def metadata(self, infos: Sequence[Any]) -> "_All":
                return _All(super().metadata, [([info],) for info in infos])

            def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> "_All":
                pairs = zip(infos, args or [ocp.RestoreArgs()] * len(infos), strict=True)
                return _All(super().deserialize, [([info], [each]) for info, each in pairs])

        return Patient()

    kinds = ocp.type_handlers
    numbers = patient(kinds.ScalarHandler)
    arrays = [(np.ndarray, patient(kinds.NumpyHandler)), (jax.Array, patient(kinds.ArrayHandler))]
    others = [(str, patient(kinds.StringHandler)), *((kind, numbers) for kind in (int, float, bytes, np.number))]
    return kinds.create_type_handler_registry(*arrays, *others)


_READING = weakref.WeakSet[asyncio.Future[Any]]()


@dataclasses.dataclass(eq=False)
class _All:
    """Calls whose results are awaited together. An error is raised when everything that is being read is there.

    Not a coroutine, of which Python says that it was never awaited if orbax fails before it begins.
    """

    begin: Callable[..., Coroutine[Any, Any, Sequence[Any]]]
    arguments: list[tuple[Any, ...]]

    def __await__(self) -> Generator[Any, None, list[Any]]:
        begun = [asyncio.ensure_future(self.begin(*each)) for each in self.arguments]
        _READING.update(begun)
        found: list[Any] = []
        for each in (yield from asyncio.gather(*begun, return_exceptions=True).__await__()):
            if isinstance(each, BaseException):
                loop = asyncio.get_running_loop()
                others = [other for other in _READING if other.get_loop() is loop and not other.done()]
                yield from asyncio.gather(*others, return_exceptions=True).__await__()
                raise each
            found += each
        return found


def _tree_in(path: str) -> str:
    """The directory of the tree: this one, or the only one in it, as when orbax's CheckpointManager saved one step."""
    found = [
        folder
        for below in ("", "*", "*/*")
        for folder in sorted(glob.glob(os.path.join(glob.escape(path), below)))
        if is_orbax_tree(folder)
    ]
    if not found:
        raise CheckpointError(
            "a directory without an orbax checkpoint\ngive the path of a file, or of a directory that orbax wrote"
        )
    if len(found) > 1 and not os.path.samefile(found[0], path):
        names = listed(os.path.relpath(tree, path) for tree in found)
        raise CheckpointError(f"a directory with several checkpoints\ngive the path of one of them: {names}")
    return found[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence orbax's logging in all threads; errors are raised anyway."""
    logger, silent = logging.getLogger("absl"), lambda record: False
    logger.addFilter(silent)
    try:
        yield
    finally:
        logger.removeFilter(silent)


def _without_values(tree: Any) -> Any:
    """Remove the name that nnx.State gives the value of a variable."""
    if isinstance(tree, Mapping):
        below = {name: _without_values(value) for name, value in tree.items()}
        is_variable = below.keys() == {"value"} and not isinstance(below["value"], Mapping | list | tuple)
        return below["value"] if is_variable else below
    if isinstance(tree, list | tuple):
        return [_without_values(value) for value in tree]
    return tree


def _is_array(described: Any) -> bool:
    return getattr(described, "shape", None) is not None and described.dtype is not None


def _check(described: Iterable[Any], path: str) -> None:
    """Refuse arrays far larger than their files, and those in larger chunks: tensorstore reads whole chunks."""

    def numbers(leaf: Any) -> int:
        chunk = leaf.storage and leaf.storage.chunk_shape
        return max(math.prod(leaf.shape), math.prod(chunk or ()))

    size = sum(numbers(leaf) * jnp.dtype(leaf.dtype).itemsize for leaf in described if _is_array(leaf))
    files = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    stored = sum(map(os.path.getsize, files))
    if size > largest(stored):  # data that is not stored would be read as zeros, however many
        cause = f"a bomb: its tensors have {size} bytes, in files of {stored}"
        raise CheckpointError(f"{cause}\nget it from a source that you trust")


def write(file: IO[bytes], tensors: Mapping[str, Value], wrote: Callable[[int], None]) -> str:
    """Write a directory beside the file, which keeps its name free, and return its path."""
    import orbax.checkpoint as ocp

    if not tensors:
        raise CheckpointError(
            "no tensors, and an orbax checkpoint cannot be empty\nchoose another format, such as .safetensors"
        )
    for name, value in tensors.items():
        if value.size == 0:
            raise CheckpointError(
                f"{name} has size 0, which orbax cannot write\nleave it out, or choose another format"
            )
        check_unicode(name)
    path = file.name + NEW
    # Weights hardly compress, and compression doubles the memory that writing takes.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    try:
        with _quiet(), ocp.Checkpointer(handler) as checkpointer:
            arrays = {name: stored.read(value) for name, value in tensors.items()}
            checkpointer.save(path, args=ocp.args.PyTreeSave(arrays))
    except ValueError as error:  # tensorstore raises this for a full disk, too
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"orbax cannot write it ({str(error)[:200]})\ncheck the disk, and the names") from error
    wrote(sum(value.nbytes for value in tensors.values()))
    return path
