"""Files of Keras: .keras, .weights.h5 and the older .h5, with the weights of recurrent layers as torch's."""

import importlib
import io
import itertools
import json
import math
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrnn.checkpoint.arrays import NO_NUMBERS, dtype_of
from jaxrnn.checkpoint.dialects import DIALECTS
from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, as_text, check_unicode, listed
from jaxrnn.checkpoint.formats.bombs import Budget, largest
from jaxrnn.checkpoint.formats.reading import Reading, warn
from jaxrnn.checkpoint.stored import Value

_HDF5 = b"\x89HDF\r\n\x1a\n"
_CONFIG, _WEIGHTS = "config.json", "model.weights.h5"  # in a .keras file
_FIRST_ENTRIES = (b"metadata.json", _CONFIG.encode(), _WEIGHTS.encode())
_DEEPEST, _MOST = 64, 50_000  # groups in groups, and in all
_SAVE = "save the model again, in one file: model.save(path)"
_NOWHERE = (1 << 64) - 1  # the address of what is not stored
_OPTIMIZER = ("optimizer", "optimizer_weights")
_CONTAINERS = ("layers", "_layer_checkpoint_dependencies", "model_weights")
_CELL = re.compile(r"cell|(lstm|gru|simple_rnn)_cell(_\d+)?")
_DIRECTION = re.compile(r"(forward|backward)_\w+")
_ARRAYS = ("kernel", "recurrent_kernel", "bias")  # in Keras 3 numbered
_KINDS = {4: "LSTM", 3: "GRU", 1: "SimpleRNN"}  # by gates

Path = tuple[str, ...]


def sniff(head: bytes) -> bool:
    return head.startswith(_HDF5) or (head.startswith(b"PK\x03\x04") and head[30:].startswith(_FIRST_ENTRIES))


def read(path: str | os.PathLike[str], what: Reading) -> dict[str, Value]:
    """The weights of recurrent layers by torch's names, and the other variables by their own.

    A layer's prefix is its name in Keras, or the attribute of a subclassed model. A model's configuration, if the file
    has one, says what weights do not.

    Warns:
        UserWarning: layers that compute what torch has not, and are left out; settings to give to the module.
    """
    what.check_no_key("a file of Keras")
    try:
        # In Python alone: what is damaged raises, where HDF5's own library may crash, or never return.
        pyfive = importlib.import_module("pyfive")
    except ImportError as error:
        cause = "a file of Keras (HDF5), and reading it needs the package pyfive"
        raise CheckpointError(f'{cause}\npip install "jaxrnn[keras]"') from error
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        zipped = file.read(8) != _HDF5
        config, weights = _unzipped(file, size) if zipped else (None, file)
        try:
            with warnings.catch_warnings(), pyfive.File(weights) as opened:
                warnings.simplefilter("ignore")  # of what is no array
                variables = list(_variables(pyfive, opened, (), (), Budget(size), itertools.count()))
                config = config if zipped else opened.attrs.get("model_config")
        except CheckpointError:
            raise
        except Exception as error:  # pyfive checks little itself: Python's errors are its checks
            cause = f"a damaged HDF5 file: {type(error).__name__} {error}".partition("\n")[0]
            raise CheckpointError(f"{cause}\n{AGAIN}") from error
    tensors, words = _converted(variables, _settings(config))
    for text in words:
        warn(path, text)
    for name in tensors:
        check_unicode(name)
    return tensors


def _unzipped(file: IO[bytes], size: int) -> tuple[bytes, IO[bytes]]:
    """The configuration and the weights in a .keras file."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if missing := [name for name in (_CONFIG, _WEIGHTS) if name not in names]:
                raise CheckpointError(f"a .keras file in which {listed(missing)} is missing\n{AGAIN}")
            if (inflated := sum(archive.getinfo(name).file_size for name in (_CONFIG, _WEIGHTS))) > largest(size):
                cause = f"a zip bomb: its entries inflate to {inflated} bytes, from a file of {size}"
                raise CheckpointError(f"{cause}\nget the file from a source that you trust")
            return archive.read(_CONFIG), io.BytesIO(archive.read(_WEIGHTS))
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, OSError, zlib.error) as error:
        raise CheckpointError(f"a truncated or damaged zip file: {error}\n{AGAIN}") from error


class _Variable(NamedTuple):
    """A variable.

    Attributes:
        path: of groups, and its name in the last.
        names: for each group the name of the layer that it holds, where Keras noted one, and otherwise the group's.
        array: its value.
    """

    path: Path
    names: Path
    array: np.ndarray


def _variables(
    pyfive: Any, group: Any, path: Path, names: Path, budget: Budget, count: Iterator[int]
) -> Iterator[_Variable]:
    """Every array of numbers in a group and below it."""
    for name in group:
        if not path and name in _OPTIMIZER:
            continue
        if len(path) > _DEEPEST or next(count) > _MOST:
            raise CheckpointError(f"a damaged HDF5 file: its groups contain each other, or are far too many\n{AGAIN}")
        item, below = group.get(name), (*path, name)
        if isinstance(item, pyfive.Group):
            variables = item.get("vars")
            noted = variables.attrs.get("name") if isinstance(variables, pyfive.Group) else None
            title = as_text(noted) if isinstance(noted, str | bytes) and noted else name
            yield from _variables(pyfive, item, below, (*names, title), budget, count)
        elif isinstance(item, pyfive.Dataset) and isinstance(item.dtype, np.dtype):
            bfloat16 = item.dtype == "V2" and item.attrs.get("dtype") in ("bfloat16", b"bfloat16")
            if not bfloat16 and dtype_of(np.empty(0, item.dtype)) == NO_NUMBERS:
                continue
            if item.chunks is not None:  # Keras writes none, and a few bytes of them may become many
                cause = f"{'/'.join(below)} is stored in chunks or compressed, as Keras never does"
                raise CheckpointError(f"{cause}\n{_SAVE}")
            budget.spend(math.prod(item.shape) * item.dtype.itemsize)
            if math.prod(item.shape) and getattr(item.id, "data_offset", 0) == _NOWHERE:
                raise CheckpointError(f"the numbers of {'/'.join(below)} are in another file\n{_SAVE}")
            array = np.array(item[()]) if math.prod(item.shape) else np.empty(item.shape, item.dtype)
            array = array.view(jnp.bfloat16) if bfloat16 else array.astype(array.dtype.newbyteorder("="))
            yield _Variable(below, names, array)


def _settings(config: Any) -> dict[str, dict[str, Any]]:
    """The settings of every layer in a model's configuration, by its name, with those of its cell."""
    found: dict[str, dict[str, Any]] = {}
    try:
        left = [] if config is None else [json.loads(config)]
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"the configuration of the model is damaged: {error}\n{AGAIN}") from error
    while left:
        node = left.pop()
        if isinstance(node, dict):
            settings = node.get("config")
            if isinstance(settings, dict) and isinstance(settings.get("name"), str):
                found[settings["name"]] = {"class_name": node.get("class_name")} | settings
                cell = settings.get("cell")
                if isinstance(cell, dict) and isinstance(cell.get("config"), dict):
                    found[settings["name"]] |= {"class_name": cell.get("class_name")} | cell["config"]
            left += node.values()
        elif isinstance(node, list):
            left += node
    return found


class _Layer(NamedTuple):
    """One layer in one direction.

    Attributes:
        where: the names of what it is in, and of the layer; both directions have the same.
        reverse: whether it is the backward layer of a Bidirectional, False in the forward layer, and None in neither.
        settings: its own, if they are known.
        merge_mode: that of the Bidirectional.
        arrays: Keras's, by name.
    """

    where: Path
    reverse: bool | None
    settings: Mapping[str, Any]
    merge_mode: str
    arrays: dict[str, np.ndarray]


def _layer(group: list[_Variable], settings: Mapping[str, Mapping[str, Any]]) -> _Layer | None:
    """The layer whose cell has these variables, all of one group; None if it is no recurrent layer."""
    numbered = group[0].path[-2:-1] == ("vars",)
    known = {str(i): name for i, name in enumerate(_ARRAYS)} if numbered else {name: name for name in _ARRAYS}
    arrays = {name: each.array for each in group if (name := known.get(each.path[-1].partition(":")[0]))}
    path, names = (list(part[: -1 - numbered]) for part in (group[0].path, (*group[0].names, "")))
    shapes = [arrays[name].shape for name in _ARRAYS[:2] if name in arrays]
    if len(arrays) < len(group) or [len(shape) for shape in shapes] != [2, 2] or shapes[0][1] != shapes[1][1]:
        return None
    hidden, columns = shapes[1]
    if not hidden or columns % hidden or not path or (numbered and not _CELL.fullmatch(path[-1])):
        return None
    if _CELL.fullmatch(path[-1]) and len(path) > 1:
        path, names = path[:-1], names[:-1]
    if not numbered:  # the names of weights repeat the model's and the layer's
        path = names = [each for each in path if each not in _CONTAINERS]
    direction = next((i for i, each in enumerate(path) if i and _DIRECTION.fullmatch(each)), None)
    titles = [names[-1], names[-1].removeprefix("forward_").removeprefix("backward_"), *names[::-1]]
    own = next((settings[title] for title in titles if "units" in settings.get(title, {})), {})
    merged = (settings[title].get("merge_mode") for title in names if "merge_mode" in settings.get(title, {}))
    # What is in a list of layers goes by the layer's name, an attribute by its own.
    inside = [
        name if i and path[i - 1] in _CONTAINERS else each
        for i, (each, name) in enumerate(zip(path, names, strict=True))
    ]
    where = tuple(each for each in inside[:direction] if each not in _CONTAINERS)
    reverse = None if direction is None else path[direction].startswith("backward")
    return _Layer(where, reverse, own, str(next(merged, "concat")), arrays)


def _converted(
    variables: list[_Variable], settings: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Value], list[str]]:
    """The weights, and what there is to say of them."""
    groups: dict[Path, list[_Variable]] = {}
    for each in variables:
        groups.setdefault(each.path[:-1], []).append(each)
    layers = {path: layer for path, group in groups.items() if (layer := _layer(group, settings))}
    firsts = [where[0] for where in {layer.where for layer in layers.values()}]
    tensors: dict[str, Value] = {}
    left_out: list[str] = []
    words: dict[str, None] = {}
    for path, group in groups.items():
        if path not in layers:
            tensors |= {".".join(part for part in each.path if part != "vars"): each.array for each in group}
            continue
        layer = layers[path]
        legacy = path[-1] != "vars" and firsts.count(layer.where[0]) == 1
        prefix = "".join(f"{each}." for each in (layer.where[:1] if legacy else layer.where))
        kind, reasons = _kind(layer)
        if reasons:
            left_out.append(f"{prefix.removesuffix('.')} ({', '.join(reasons)})")
            continue
        if layer.settings.get("go_backwards") and layer.reverse is None:
            words[f"{prefix} has go_backwards: flip its input along the time axis"] = None
        if layer.settings.get("activation") == "relu":
            words[f"{prefix} has relu, which weights do not say: make the module with nonlinearity='relu'"] = None
        if layer.merge_mode != "concat":
            words[f"{prefix} has merge_mode={layer.merge_mode}, and torch concatenates: merge the output's halves"] = (
                None
            )
        try:
            weights = DIALECTS["keras", kind].read(layer.arrays)
        except CheckpointError as error:
            raise CheckpointError(f"{'/'.join(path)}: {error}") from error
        tensors |= {f"{prefix}{role}_l0{'_reverse' * bool(layer.reverse)}": array for role, array in weights.items()}
    if left_out:
        words = {f"left out layers that torch does not have: {listed(dict.fromkeys(left_out))}": None, **words}
    return tensors, list(words)


def _kind(layer: _Layer) -> tuple[str, list[str]]:
    """The class in Keras, and what of the layer torch does not have."""
    hidden, columns = layer.arrays["recurrent_kernel"].shape
    kind, settings = _KINDS.get(columns // hidden, ""), layer.settings
    name = str(settings.get("class_name", kind)).removesuffix("Cell")
    if not kind or name != kind:
        return kind, [f"{name or 'a layer'} of {columns // hidden} gates"]
    usual = ("tanh", "relu") if kind == "SimpleRNN" else ("tanh",)
    reasons = []
    for setting, values in (("activation", usual), ("recurrent_activation", ("sigmoid",))):
        if (value := settings.get(setting, values[0])) not in values:
            reasons.append(f"{setting}={value}"[:80])
    bias = layer.arrays.get("bias")
    if bias is not None and bias.shape == (2 * columns,):
        return kind, [f"CuDNN{kind}'s layout"]
    if kind == "GRU" and not settings.get("reset_after", bias is None or bias.ndim == 2):
        reasons.append("reset_after=False, where torch's GRU has True")
    return kind, reasons
