"""Files of torch.export.save (.pt2): the weights of an exported program, and the settings in its graph.

Since torch 2.8 a file has a folder with an entry for each storage, and JSON that describes the tensors. Before, it had
a torch.save archive for all weights, and one for all constants.
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, check_unicode, listed
from jaxrnn.checkpoint.formats.nested import choose
from jaxrnn.checkpoint.formats.pickles import MOST_AXES, STATE_DICT, Other, Storage, StoredTensor, is_tensor, unpickle
from jaxrnn.checkpoint.formats.reading import Reading
from jaxrnn.checkpoint.formats.recurrent_calls import Call, Said
from jaxrnn.checkpoint.formats.torch_archive import TOP, Archive
from jaxrnn.checkpoint.named import Described

_WEIGHTS, _CONSTANTS = "weights", "constants"  # the folders in data/
_STATE_DICT = "state_dict"  # the key of the weights here
_CONSTANT = "if they matter, read them with key='constants', on the command line --key constants"
# torch's numbers of dtypes and of the usual layout, in torch/_export/serde/schema.py.
_DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16", 29: "float8_e4m3fn",
    30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu", 34: "uint32", 35: "uint64",
}  # fmt: skip
_STRIDED = 7
_MODEL = re.compile(r"models/([^/]+)\.json")
_TARGET = re.compile(r"torch\.ops\.aten\.(?:(lstm|gru|rnn_tanh|rnn_relu)|(lstm|gru|rnn_tanh|rnn_relu)_cell)\.\w+")
_SETTINGS = {"has_biases": "bias", **{name: name for name in ("num_layers", "dropout", "bidirectional", "batch_first")}}
# JSON with other types or keys than torch writes.
_DAMAGE = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError, StopIteration)


def are_its(names: list[str]) -> bool:
    return any(name in TOP or name.endswith("/archive_format") for name in names)


def is_one(archive: Archive) -> bool:
    return are_its(archive.names)


def read(archive: Archive, what: Reading, warn: Callable[[str, str], None]) -> tuple[Described, list[tuple[str, str]]]:
    """The weights of the program by their names in its state_dict(), and what to warn of, with remedies.

    With the key "constants" its constants: tensors that it has beside its parameters and buffers. If a file has several
    programs, the key begins with a program's name, unless that is "model".
    """
    with contextlib.ExitStack() as stack:
        programs = {name: _Program(archive, name, graph, stack) for name, graph in _graphs(archive).items()}
        trees = {name: {_STATE_DICT: each.weights, _CONSTANTS: each.constants} for name, each in programs.items()}
        tree: Any = trees if len(trees) > 1 else next(iter(trees.values()))
        found = choose(tree, what, is_tensor, warn)
        words = []
        arrays: dict[str, Any] = {}
        said: dict[str, dict[str, Any]] = {}
        for program in programs.values():
            for part, tensors in program.parts:
                own = {name: tensor for name, tensor in found.items() if tensors.get(name) is tensor}
                arrays |= part.arrays(own)
            if found and all(program.weights.get(name) is tensor for name, tensor in found.items()):
                heard = program.said()
                said, words = heard.settings(), list(heard.words)
        for name in arrays:
            check_unicode(name)
        left = [
            name
            for each in programs.values()
            for name, tensor in each.constants.items()
            if what.key is None and (isinstance(tensor, Other) or tensor.numel > 1)
        ]
        if left:
            words.append((f"left out constants of the program: {listed(left)}", _CONSTANT))
        return Described({name: arrays[name] for name in found}, said), words


def _graphs(archive: Archive) -> dict[str, Any]:
    """The JSON of the programs, by their names."""
    if TOP[0] in archive.entries:
        return {"model": _json(archive, TOP[0])}
    named = {match[1]: name for name in archive.entries if (match := _MODEL.fullmatch(name))}
    if not named:
        compiled = any(name.startswith("data/aotinductor/") for name in archive.entries)
        cause = (
            "a package of AOTInductor, which holds compiled code" if compiled else "a .pt2 archive without a program"
        )
        raise CheckpointError(f"{cause}\nsave the program with torch.export.save, or {STATE_DICT}")
    return {name: _json(archive, entry) for name, entry in named.items()}


def _json(archive: Archive, name: str) -> Any:
    """What an entry holds. Two values under one key are refused, because the names of tensors are keys."""

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise CheckpointError(f"damaged: {name} has {key} twice\n{AGAIN}")
        return found

    try:
        return json.loads(archive.text(name), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"damaged: its {name} is not JSON: {error}\n{AGAIN}") from error


class _Program:
    """An exported program.

    Attributes:
        weights: its parameters and buffers by name: `StoredTensor`s, or `Other`s.
        constants: its other tensors.
        parts: the archives that hold them, with those that each has.
    """

    def __init__(self, archive: Archive, name: str, graph: Any, stack: contextlib.ExitStack) -> None:
        self._graph = graph
        self.parts: list[tuple[Archive, Mapping[str, Any]]] = []
        self.weights = self._tensors(archive, name, _WEIGHTS, stack)
        self.constants = self._tensors(archive, name, _CONSTANTS, stack)

    def _tensors(self, archive: Archive, name: str, kind: str, stack: contextlib.ExitStack) -> dict[str, Any]:
        old = {_WEIGHTS: "serialized_state_dict", _CONSTANTS: "serialized_constants"}[kind]
        whole = [f"data/{kind}/{name}.pt", f"{old}.pt", f"{old}.json"]
        if saved := [each for each in whole if each in archive.entries]:
            part = stack.enter_context(archive.inside(saved[0]))
            if "data.pkl" not in part.entries:
                raise CheckpointError(f"damaged: its {saved[0]} has no data.pkl\n{AGAIN}")
            # Constants may be objects, and are left out then.
            found = unpickle(part.text("data.pkl"), set() if kind == _CONSTANTS else None)
            if not isinstance(found, dict) or not all(type(each) is str for each in found):
                raise CheckpointError(f"damaged: its {saved[0]} has no tensors by name\n{AGAIN}")
            tensors = {each: tensor for each, tensor in found.items() if is_tensor(tensor)}
        else:
            part, tensors = archive, dict(_described(archive, kind, f"data/{kind}/{name}_{kind}_config.json"))
        self.parts.append((part, tensors))
        return tensors

    def said(self) -> Said:
        """The settings in calls of recurrent functions."""
        said = Said()
        try:
            graph = self._graph["graph_module"]
            names = dict(_inputs(graph["signature"]["input_specs"]))
            for node in graph["graph"]["nodes"]:
                if match := _TARGET.fullmatch(node["target"]):
                    arguments = {each["name"]: each["arg"] for each in node["inputs"]}
                    weights = [names.get(name, "") for name in _weights(arguments)]
                    settings = {
                        name: next(iter(arguments[theirs].values()))
                        for theirs, name in _SETTINGS.items()
                        if theirs in arguments
                    }
                    call = Call(match[1] or match[2], settings, bool(match[2]))
                    if weights and all(name in self.weights for name in weights):
                        said.add_call(call, weights, self.weights)
        except _DAMAGE as damage:
            raise CheckpointError(f"damaged: its graph is not one of torch.export: {damage}\n{AGAIN}") from damage
        return said


def _described(archive: Archive, kind: str, name: str) -> Iterator[tuple[str, Any]]:
    """The tensors that a part of the file describes in JSON."""
    if name not in archive.entries:
        raise CheckpointError(f"damaged: it has no {name}\n{AGAIN}")
    try:
        for each, described in _json(archive, name)["config"].items():
            meta = described["tensor_meta"]
            if meta is not None:  # of an object
                yield each, _tensor(archive, f"data/{kind}/{described['path_name']}", described["use_pickle"], meta)
    except _DAMAGE as damage:
        if isinstance(damage, CheckpointError):
            raise
        raise CheckpointError(f"damaged: its {name} does not describe tensors: {damage}\n{AGAIN}") from damage


def _tensor(archive: Archive, entry: str, pickled: Any, meta: Mapping[str, Any]) -> StoredTensor | Other:
    """A tensor as JSON describes it."""
    if pickled is not False:
        return Other("tensor of a class of its own")
    if meta["layout"] != _STRIDED or meta["dtype"] not in _DTYPES:
        return Other(f"tensor of layout {meta['layout']} and dtype {meta['dtype']}, as torch.export numbers them")
    dtype = jnp.dtype(_DTYPES[meta["dtype"]])
    shape, strides = (tuple(each["as_int"] for each in meta[name]) for name in ("sizes", "strides"))
    offset = meta["storage_offset"]["as_int"]
    size = archive.entries[entry].file_size if entry in archive.entries else 0
    if len(shape) != len(strides) or len(shape) > MOST_AXES:
        raise ValueError(f"{entry} is of an impossible shape")
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in (offset, *shape, *strides)):
        raise ValueError(f"{entry} is of an impossible size")
    tensor = StoredTensor(Storage(entry, dtype, size // dtype.itemsize), dtype, offset, shape, strides)
    return Other("fake tensor, without numbers") if tensor.numel and not size and entry in archive.entries else tensor


def _inputs(specs: Any) -> Iterator[tuple[str, str]]:
    """The names of parameters and buffers in the graph, and in the program."""
    for spec in specs:
        for kind in ("parameter", "buffer"):
            if kind in spec:
                yield spec[kind]["arg"]["name"], spec[kind][f"{kind}_name"]


def _weights(arguments: Mapping[str, Any]) -> list[str]:
    """The weights' names in the graph, of a call of layers or of a cell."""
    if "params" in arguments:
        return [each["name"] for each in arguments["params"]["as_tensors"]]
    there = [arguments[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if name in arguments]
    return [each["as_tensor"]["name"] for each in there if "as_tensor" in each]
