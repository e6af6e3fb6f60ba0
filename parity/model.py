"""A user's checkpoint as cases: every recurrent module, with its weights, on random and on given inputs.

A user's weights may be ill-conditioned: over many steps a rounding error grows. Renumbering hidden units changes only
the order in which numbers are added up. A change of this size in our results is no mistake.
"""

import dataclasses
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxrnn.checkpoint import CheckpointError, FoundRNN, find_rnns, load
from jaxrnn.checkpoint.errors import about

from .cases import KINDS
from .compare import LARGEST
from .locate import Probe
from .sides import run_torch

STEPS, BATCH = 16, 4
RENUMBERINGS = 4
# Our results differ from torch's in more than the order of sums, and few renumberings do not find the worst: in 117
# random ill-conditioned modules right results were up to 3.9 times as far apart.
FACTOR = 8
# A rounding error in float32 is so many times one in float64.
EPS_RATIO = float(np.finfo(np.float32).eps / np.finfo(np.float64).eps)


@dataclasses.dataclass(frozen=True)
class Module(Probe):
    """A module in a user's checkpoint. Its errors are not pooled with those of other modules."""

    @property
    def group(self) -> str:
        return self.name


def cases(path: str, key: str | None = None, inputs: Sequence[str] = ()) -> list[Module]:
    """The cases of a checkpoint.

    Args:
        path, key: as for `jaxrnn.checkpoint.load`.
        inputs: .npy files of shape (time, batch, features), or (batch, features) for cells. Every module with as many
            features and axes is run on each, too.

    Raises:
        CheckpointError: the file, or what is in it, cannot be used.
        ValueError: there is no recurrent module, or none takes a file's inputs.
    """
    tensors = load(path, key)
    found = [rnn for rnn in find_rnns(tensors) if rnn.in_torch]
    if not found:
        raise ValueError(f"{path}: no recurrent weights that torch has\n`jaxrnn inspect` lists what there is")
    labels = ["given inputs"] if len(inputs) == 1 else [os.path.basename(file) for file in inputs]
    given = dict(zip(labels, map(_inputs, inputs), strict=True))
    made = [case for rnn in found for case in _of(rnn, tensors, given)]
    for file, (label, array) in zip(inputs, given.items(), strict=True):
        if not any(case.name.endswith(f" on {label}") for case in made):
            sizes = sorted({rnn.input_size for rnn in found})
            wanted = " or ".join(f"(time, batch, {size})" for size in sizes)
            raise ValueError(f"{file}: no module takes shape {array.shape}\ngive an array of shape {wanted}")
    return made


def _inputs(path: str) -> np.ndarray:
    with about(path):
        try:
            given = np.load(path, allow_pickle=False)
        except (ValueError, EOFError):
            given = None
        if not isinstance(given, np.ndarray) or given.dtype.kind not in "fiub":
            raise CheckpointError("not a .npy file of numbers\nwrite one with numpy.save(path, array)")
    return given


def _of(rnn: FoundRNN, tensors: dict[str, np.ndarray], given: Mapping[str, np.ndarray]) -> Iterator[Module]:
    kind = rnn.class_name
    if rnn.kind == "RNN":
        kind += rnn.spec.cell.name.removeprefix("RNN")  # tanh, unless the file says relu
    elif rnn.proj_size:
        kind += "_PROJ"
    parameters = {name: tensors[rnn.prefix + name].astype(np.float64) for name in rnn.spec.shapes()}
    name = f"{rnn.prefix.removesuffix('.') or rnn.kind} ({kind})"
    arguments = {key: value for key, value in rnn.arguments.items() if key not in rnn.said}  # time-major, no dropout

    def case(label: str, steps: int | None, batch: int, x: np.ndarray | None) -> Module:
        module = Module(f"{name} on {label}", kind, arguments, steps, batch, hx=True)
        random = np.random.RandomState(zlib.crc32(module.name.encode()))
        inputs, results = (
            {name: random.standard_normal(shape) for name, shape in shapes.items()} for shapes in module.shapes()[1:]
        )
        if x is not None:
            inputs["input"] = x.astype(np.float64)
        return dataclasses.replace(module, given=(parameters, inputs, results))

    yield case("random inputs", None if rnn.is_cell else STEPS, BATCH, None)
    for label, array in given.items():
        if array.ndim == (2 if rnn.is_cell else 3) and array.shape[-1] == rnn.input_size:
            yield case(label, None if rnn.is_cell else array.shape[0], array.shape[-2], array)


def with_limit(case: Module, device: str) -> Module:
    """The case with the limits raised to what renumbering changes in torch's results, if that is more."""
    torch = run_torch(case, "float64", device)
    moved = 0.0
    for seed in range(RENUMBERINGS):
        renumbering = Renumbering(case, seed)
        again = run_torch(renumbering.case, "float64", device)
        for name, array in torch.items():
            back = renumbering.back(name, again[name])
            moved = max(
                moved, float(np.max(np.abs(back - array), initial=0) / max(1, np.max(np.abs(array), initial=0)))
            )
    limit = FACTOR * moved
    case = dataclasses.replace(case, float32_limit=max(LARGEST["float32"], limit * EPS_RATIO))
    return case if limit <= LARGEST["float64"] else dataclasses.replace(case, limit=limit)


class Renumbering:
    """A case with the hidden units in another order, which is mathematically the same.

    Attributes:
        case: the renumbered case.
    """

    def __init__(self, case: Module, seed: int) -> None:
        random = np.random.RandomState(seed)
        arguments = case.arguments
        hidden, projected = arguments["hidden_size"], arguments.get("proj_size") or 0
        layers, self._directions = arguments.get("num_layers", 1), 1 + arguments.get("bidirectional", False)
        count = layers * self._directions
        self._hidden = [random.permutation(hidden) for _ in range(count)]
        self._states = [random.permutation(projected) for _ in range(count)] if projected else self._hidden
        self._gates = len(KINDS[case.kind].cell.gates)
        self._is_cell = case.steps is None
        parameters, inputs, results = (
            {name: array[self._order(name, array.shape)] for name, array in arrays.items()} for arrays in case.arrays()
        )
        self.case = dataclasses.replace(case, given=(parameters, inputs, results))

    def back(self, name: str, array: np.ndarray) -> np.ndarray:
        """An array of the renumbered case in the original order."""
        found = np.empty_like(array)
        found[self._order(name.removesuffix(".grad"), array.shape)] = array
        return found

    def _order(self, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        """The index of an array that puts each axis in the new order."""
        if name == "input":
            return np.ix_(*map(np.arange, shape))
        if name == "output":
            outputs = self._joined(len(self._states) - self._directions)
            return np.ix_(*map(np.arange, shape[:-1]), outputs)
        role, _, place = name.partition("_l")
        if role[0] in "hc" and role[1:] in ("_0", "_n"):  # states: the first axis says which order the last has
            orders = self._states if role[0] == "h" else self._hidden
            if self._is_cell:
                return np.ix_(*map(np.arange, shape[:-1]), orders[0])
            first = np.ix_(*map(np.arange, shape))
            last = np.stack(orders).reshape(len(orders), *[1] * (len(shape) - 2), shape[-1])
            return (*first[:-1], last)
        layer = int(place.removesuffix("_reverse") or 0)
        index = layer * self._directions + place.endswith("_reverse")
        hidden = self._hidden[index]
        rows = np.concatenate([gate * len(hidden) + hidden for gate in range(self._gates)])
        if role.startswith("bias"):
            return (rows,)
        if role == "weight_hr":
            return np.ix_(self._states[index], hidden)
        if role == "weight_hh":
            return np.ix_(rows, self._states[index])
        columns = np.arange(shape[1]) if layer == 0 else self._joined((layer - 1) * self._directions)
        return np.ix_(rows, columns)

    def _joined(self, begin: int) -> np.ndarray:
        """The order of a layer's outputs, whose directions are one after the other."""
        states = self._states[begin : begin + self._directions]
        return np.concatenate([direction * len(states[0]) + order for direction, order in enumerate(states)])
