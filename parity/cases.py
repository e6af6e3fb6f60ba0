"""The table of cases: one table feeds the recorder, the runner and the tests."""

import dataclasses
import itertools
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, RNN_TANH, Cell
from jaxrnn.spec import CellSpec, Shape, Spec

NamedArrays = dict[str, np.ndarray]

# A pooled float32 error is judged from this many numbers on: fewer say little about an rms.
ENOUGH = 10_000
# Seeds of the accuracy cases that put an argument of a relu within NEAR of 0, where rounding could flip its derivative
# and an error be a thousand times torch's by chance.
NEAR = 3e-6
NEAR_ZERO = {"RNN_RELU": {5, 8, 11, 12, 14, 15, 17, 22, 27, 34, 35}, "RNNCell_RELU": {23, 58}}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of module: its class, which has one name in torch.nn and in jaxrnn, and its constructor's arguments."""

    module: str
    cell: Cell
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    projects: bool = False


LAYERS = {
    "RNN_TANH": Kind("RNN", RNN_TANH, {"nonlinearity": "tanh"}),
    "RNN_RELU": Kind("RNN", RNN_RELU, {"nonlinearity": "relu"}),
    "LSTM": Kind("LSTM", LSTM_CELL),
    "LSTM_PROJ": Kind("LSTM", LSTM_CELL, projects=True),
    "GRU": Kind("GRU", GRU_CELL),
}
CELLS = {
    "RNNCell_TANH": Kind("RNNCell", RNN_TANH, {"nonlinearity": "tanh"}),
    "RNNCell_RELU": Kind("RNNCell", RNN_RELU, {"nonlinearity": "relu"}),
    "LSTMCell": Kind("LSTMCell", LSTM_CELL),
    "GRUCell": Kind("GRUCell", GRU_CELL),
}
KINDS = {**LAYERS, **CELLS}


# The lengths of the ragged cases' rows, four rows of up to five steps.
LENGTHS = {"unsorted": (2, 5, 1, 4), "sorted": (5, 4, 2, 1), "equal": (4, 4, 4, 4), "ones": (1, 1, 5, 1)}
# The masked case's rows, # for a valid step: a hole, padding on the left, a short row, and no valid step at either end.
MASK = ("##.##", "..###", "##...", ".#.#.")
CHUNKS = (2, 1, 2)
LONG = 4096
MANY = 72  # rows


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of one module, and the cotangents of its results.

    Attributes:
        name: stable and readable; it also seeds the numbers.
        kind: a key of `KINDS`.
        arguments: of the module's constructor, by torch's names, without the arguments of the kind.
        steps: time steps, or None for a cell.
        batch: rows, or None for an unbatched input.
        hx: whether an initial state is given.
        small: whether the truth is recorded in full; else it is recorded as a digest, and the case measures accuracy.
        dtypes: what it is run in: float64, and maybe one dtype that is less exact.
        way: how the sequence is fed: "whole"; with `lengths`, as "lengths", "packed" or "sorted", which is packed with
            enforce_sorted; with `mask`, as "mask"; or with the state carried on, as "chunked", chunk by chunk, or
            "steps", step by step.
        lengths: of the rows, for the ways that have any.
        mask: of the rows, for the way "mask": see `MASK`.
        second: whether it is differentiated twice, and forward: see `tangents`.
        limit: the largest float64 error that counts as right; None for the limit of all cases.
        float32_limit: the same in float32.
    """

    name: str
    kind: str
    arguments: Mapping[str, Any]
    steps: int | None
    batch: int | None
    hx: bool
    small: bool = True
    dtypes: tuple[str, ...] = ("float64", "float32")
    way: str = "whole"
    lengths: tuple[int, ...] | None = None
    mask: tuple[str, ...] | None = None
    second: bool = False
    limit: float | None = None
    float32_limit: float | None = None

    @property
    def inexact(self) -> str | None:
        """The dtype beside float64, in which torch is inexact, too."""
        return self.dtypes[1] if len(self.dtypes) > 1 else None

    @property
    def group(self) -> str:
        """The name under which errors are pooled: the kind, and for long sequences also the number of steps."""
        return f"{self.kind} T={self.steps}" if (self.steps or 0) >= LONG else self.kind

    @property
    def alone(self) -> bool:
        """Whether it is the only case of its group."""
        return self.group == self.name

    @property
    def module(self) -> str:
        return KINDS[self.kind].module

    @property
    def constructor(self) -> dict[str, Any]:
        """Every argument of the module's constructor."""
        return {**self.arguments, **KINDS[self.kind].arguments}

    @property
    def states(self) -> tuple[str, ...]:
        return KINDS[self.kind].cell.states

    def valid(self) -> np.ndarray | None:
        """The mask, laid out like the input, if there is one."""
        if self.mask is None:
            return None
        rows = np.array([[step == "#" for step in row] for row in self.mask])
        return rows if self.arguments.get("batch_first") else rows.T

    def marks(self) -> NamedArrays:
        """The lengths or the mask, by the name of the argument that takes them."""
        given = {"lengths": None if self.lengths is None else np.array(self.lengths, np.int32), "mask": self.valid()}
        return {name: array for name, array in given.items() if name == self.way and array is not None}

    def shapes(self) -> tuple[dict[str, Shape], dict[str, Shape], dict[str, Shape]]:
        """Names and shapes of the parameters, of the inputs and of the results."""
        cell = KINDS[self.kind].cell
        batch = () if self.batch is None else (self.batch,)
        if self.steps is None:
            step = CellSpec(cell, **self.arguments)
            states = [(*batch, step.hidden_size)] * len(self.states)
            inputs, results = {"input": (*batch, step.input_size)}, {}
            parameters = step.shapes()
        else:
            spec = Spec(cell, **self.arguments)
            states = [(spec.num_layers * spec.num_directions, *batch, size) for size in spec.state_sizes()]
            leading = (*batch, self.steps) if spec.batch_first else (self.steps, *batch)
            inputs = {"input": (*leading, spec.input_size)}
            results = {"output": (*leading, spec.output_size * spec.num_directions)}
            parameters = spec.shapes()
        if self.hx:
            inputs |= {f"{state}_0": shape for state, shape in zip(self.states, states, strict=True)}
        results |= {f"{state}_n": shape for state, shape in zip(self.states, states, strict=True)}
        return parameters, inputs, results

    def measured(self) -> dict[str, Shape]:
        """Names and shapes of all that is compared: the results, and the gradients (`weight_ih_l0.grad`).

        Where `second` is set, also what the tangents make of the results
        (`output.jvp`), and the second derivative of the results, weighted by
        their cotangents, times the tangents (`weight_ih_l0.hvp`).
        """
        parameters, inputs, results = self.shapes()
        sources = inputs | parameters
        named = results | {f"{name}.grad": shape for name, shape in sources.items()}
        if self.second:
            named |= {f"{name}.jvp": shape for name, shape in results.items()}
            named |= {f"{name}.hvp": shape for name, shape in sources.items()}
        return named

    def tangents(self) -> tuple[NamedArrays, NamedArrays]:
        """Directions, of the parameters and of the inputs, in which a case is differentiated forward."""
        random = np.random.RandomState(zlib.crc32(f"{self.name} tangents".encode()))
        parameters, inputs, _ = (
            {name: random.standard_normal(shape) for name, shape in shapes.items()} for shapes in self.shapes()
        )
        return parameters, inputs

    def arrays(self) -> tuple[NamedArrays, NamedArrays, NamedArrays]:
        """The parameters, the inputs and the results' cotangents.

        As float64 arrays of numbers that float32 has, or the less exact
        dtype of the case.
        """
        # RandomState's stream is frozen, so that the recorded results stay the results of these numbers.
        random = np.random.RandomState(zlib.crc32(self.name.encode()))
        bound = 1 / math.sqrt(self.arguments["hidden_size"])
        parameters, inputs, results = self.shapes()
        dtype = jnp.dtype(self.inexact or "float32")

        def rounded(array: np.ndarray) -> np.ndarray:
            return array.astype(dtype).astype(np.float64)

        return (
            {name: rounded(random.uniform(-bound, bound, shape)) for name, shape in parameters.items()},
            {name: rounded(random.standard_normal(shape)) for name, shape in inputs.items()},
            {name: rounded(random.standard_normal(shape)) for name, shape in results.items()},
        )


def quantity(name: str) -> str:
    """The name of an array without its layer and direction: `weight_ih.grad` for `weight_ih_l1_reverse.grad`.

    All forward derivatives are one quantity, `jvp`, and all second derivatives another, `hvp`.
    """
    _, _, order = name.rpartition(".")
    return order if order in ("jvp", "hvp") else re.sub(r"_l\d+(_reverse)?", "", name)


def _case(kind: str, arguments: dict[str, Any], *, pattern: str = "", **settings: Any) -> Case:
    words = [
        f"layers{arguments['num_layers']}" if settings["steps"] else "",
        "bidirectional" if arguments.get("bidirectional") else "",
        "" if arguments.get("bias", True) else "nobias",
        "batch_first" if arguments.get("batch_first") else "",
        "" if settings["batch"] else "unbatched",
        "hx" if settings["hx"] else "",
        settings.get("way", ""),
        pattern,
    ]
    return Case("-".join([kind, *filter(None, words)]), kind, arguments, **settings)


SIZES = {"input_size": 3, "hidden_size": 4}


def _layers(kind: str, layers: int, bidirectional: bool, **arguments: Any) -> dict[str, Any]:
    projection = {"proj_size": 2} if LAYERS[kind].projects else {}
    return {**SIZES, "num_layers": layers, "bidirectional": bidirectional, **projection, **arguments}


def _small() -> Iterator[Case]:
    both, exact = ("float64", "float32"), ("float64",)
    # bias, batch_first, batch, hx: six of the combinations, in which any two of them meet in every way.
    layouts = [
        (True, False, 3, True, both),
        (True, True, 3, False, exact),
        (True, False, None, False, exact),
        (True, True, None, True, exact),
        (False, True, 3, False, exact),
        (False, False, None, True, exact),
    ]
    for kind, layers, bidirectional, (bias, batch_first, batch, hx, dtypes) in itertools.product(
        LAYERS, (1, 2, 3), (False, True), layouts
    ):
        arguments = _layers(kind, layers, bidirectional, bias=bias, batch_first=batch_first)
        yield _case(kind, arguments, steps=5, batch=batch, hx=hx, dtypes=dtypes)
    for kind, bias, batch, hx in itertools.product(CELLS, (True, False), (3, None), (True, False)):
        yield _case(kind, {**SIZES, "bias": bias}, steps=None, batch=batch, hx=hx)


def _ragged() -> Iterator[Case]:
    def case(kind: str, layers: int, bidirectional: bool, way: str, pattern: str, hx: bool) -> Case:
        arguments = _layers(kind, layers, bidirectional, batch_first=layers == 2)
        lengths = LENGTHS[pattern]
        settings = {"steps": 5, "batch": len(lengths), "hx": hx, "dtypes": ("float64",), "way": way}
        return _case(kind, arguments, pattern=pattern, lengths=lengths, **settings)

    # The patterns change fastest: where lengths are data, the patterns of one module share a compilation.
    for kind, layers, bidirectional in itertools.product(LAYERS, (1, 2, 3), (False, True)):
        yield case(kind, layers, bidirectional, "lengths", "unsorted", hx=True)
        if (layers, bidirectional) == (2, True):
            for pattern in ("sorted", "equal", "ones"):
                yield case(kind, layers, bidirectional, "lengths", pattern, hx=True)
            for way, pattern in (("packed", "equal"), ("packed", "ones"), ("sorted", "sorted"), ("sorted", "equal")):
                yield case(kind, layers, bidirectional, way, pattern, hx=pattern != "ones")
        yield case(kind, layers, bidirectional, "packed", "unsorted", hx=True)


def _masked() -> Iterator[Case]:
    for kind in LAYERS:
        arguments = _layers(kind, 2, bidirectional=True, batch_first=True)
        settings: dict[str, Any] = {"steps": 5, "batch": len(MASK), "hx": True, "dtypes": ("float64",)}
        yield _case(kind, arguments, way="mask", mask=MASK, **settings)


def _in_parts() -> Iterator[Case]:
    for kind, way in itertools.product(LAYERS, ("chunked", "steps")):
        arguments = _layers(kind, 2, bidirectional=False)
        yield _case(kind, arguments, steps=sum(CHUNKS), batch=3, hx=True, dtypes=("float64",), way=way)


def _second() -> Iterator[Case]:
    """Two layers of each kind, both ways, whole, ragged and masked, and each cell: their second derivatives."""
    for kind in LAYERS:
        arguments = _layers(kind, 2, bidirectional=True)
        settings: dict[str, Any] = {"steps": 5, "hx": True, "dtypes": ("float64",), "pattern": "second", "second": True}
        yield _case(kind, arguments, batch=3, **settings)
        yield _case(kind, arguments, batch=4, way="lengths", lengths=LENGTHS["unsorted"], **settings)
        yield _case(kind, arguments, batch=len(MASK), way="mask", mask=MASK, **settings)
    for kind in CELLS:
        arguments = dict(SIZES)
        yield _case(kind, arguments, steps=None, batch=3, hx=True, dtypes=("float64",), pattern="second", second=True)


def _many() -> Iterator[Case]:
    """One layer of each kind with as many rows as make jaxrnn's loop run step by step, and their second derivatives."""
    for kind in LAYERS:
        if KINDS[kind].cell != RNN_RELU:  # of so many numbers, some come near its kink
            lengths = tuple(1 + k % 5 for k in range(MANY))
            settings: dict[str, Any] = {"hx": True, "dtypes": ("float64",), "second": True}
            settings |= {"steps": 5, "batch": MANY, "way": "lengths", "lengths": lengths}
            yield _case(kind, _layers(kind, 1, bidirectional=True), pattern="many", **settings)


def _half() -> Iterator[Case]:
    """One case of each kind in the dtypes of 16 bits. Those of relu are tiny, so that none comes near its kink."""
    for dtype, (name, kind) in itertools.product(("bfloat16", "float16"), KINDS.items()):
        relu = kind.cell == RNN_RELU
        arguments: dict[str, Any] = SIZES if relu else {"input_size": 24, "hidden_size": 32}
        if name in LAYERS and not relu:
            arguments = {**arguments, "num_layers": 2, "bidirectional": True}
            arguments |= {"proj_size": 16} if kind.projects else {}
        steps = None if name in CELLS else 3 if relu else 32
        batch, dtypes = 2 if relu else 8, ("float64", dtype)
        yield Case(f"{name}-{dtype}", name, arguments, steps, batch, hx=True, small=False, dtypes=dtypes)


def _accuracy() -> Iterator[Case]:
    """A bigger module of each kind, with as many seeds as give every quantity enough numbers.

    Sized so that no product sums more than 128 terms: what is compared is the error of a recurrence. Longer sums
    compare matrix libraries: the one below torch on a CPU adds up in blocks of less than 240 terms, the one below JAX
    does not, and a single product of 512 terms is 1.7 times as far off.
    """
    terms = 128
    for name, kind in LAYERS.items():
        size = terms // max(len(kind.cell.gates), 2)  # a layer above the first reads two directions
        arguments = {"input_size": size, "hidden_size": size, "num_layers": 3, "bidirectional": True}
        arguments |= {"proj_size": size // 2} if kind.projects else {}
        yield from _seeds(Case(f"{name}-accuracy", name, arguments, steps=16, batch=8, hx=True, small=False))
    for name, kind in CELLS.items():
        size = terms // len(kind.cell.gates)
        arguments = {"input_size": size, "hidden_size": size}
        yield from _seeds(Case(f"{name}-accuracy", name, arguments, steps=None, batch=32, hx=True, small=False))


def _long() -> Iterator[Case]:
    """A long sequence of each kind, where errors could add up. Not of relu: some argument would come near its kink."""
    for name, kind in LAYERS.items():
        if kind.cell != RNN_RELU:
            arguments = {"input_size": 8, "hidden_size": 16, "num_layers": 1, "bidirectional": True}
            arguments |= {"proj_size": 8} if kind.projects else {}
            yield Case(f"{name}-long", name, arguments, LONG, batch=2, hx=True, small=False)


def _seeds(case: Case) -> Iterator[Case]:
    counts: dict[str, int] = {}
    for name, shape in case.measured().items():
        counts[quantity(name)] = counts.get(quantity(name), 0) + math.prod(shape)
    seeds = (seed for seed in itertools.count() if seed not in NEAR_ZERO.get(case.kind, ()))
    for seed in itertools.islice(seeds, math.ceil(ENOUGH / min(counts.values()))):
        yield dataclasses.replace(case, name=f"{case.name}-seed{seed}")


_ALL = (*_small(), *_ragged(), *_masked(), *_in_parts(), *_second(), *_many(), *_half(), *_accuracy(), *_long())
CASES = {case.name: case for case in _ALL}
