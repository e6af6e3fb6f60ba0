"""Find recurrent modules in a flat dict of tensors, by names and shapes alone."""

import bisect
import dataclasses
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrnn import more_cells
from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, RNN_TANH, ROLES, Cell
from jaxrnn.checkpoint.arrays import dtype_of
from jaxrnn.checkpoint.errors import CheckpointError
from jaxrnn.checkpoint.flax_names import with_torchs_names
from jaxrnn.checkpoint.named import in_training_of, origins_of, said_of
from jaxrnn.checkpoint.names import fold, misfits
from jaxrnn.spec import CellSpec, Shape, Spec, level_outside

_TORCH_CELLS = (LSTM_CELL, GRU_CELL, RNN_TANH)
_MORE_CELLS = tuple(cell for cell in vars(more_cells).values() if isinstance(cell, Cell) and cell.own)
_CELL_NAMES = CellSpec(LSTM_CELL, 1, 1).shapes().keys()
_LAYER_NAME = re.compile(r"(?P<role>[A-Za-z_]\w*)_l(?P<layer>0|[1-9]\d{0,8})(?P<reverse>_reverse)?", re.ASCII)


_LIKE_OURS = re.compile(r"(weight|bias)_\w+", re.ASCII)


@dataclasses.dataclass(frozen=True)
class FoundRNN:
    """A recurrent module that `find_rnns` found.

    Attributes:
        prefix: what its keys start with, such as "encoder.lstm.", or "".
        spec: its settings: a `jaxrnn.Spec` for layers, a `jaxrnn.CellSpec` for a cell.
        dtype: its tensors' dtype.
        beside: other keys that begin with weight_ or bias_ and have the same prefix. They may change what it computes.
        said: the settings that the file says, although weights do not. They are in spec.
        in_training: what the library that wrote the file does in training alone, and how to do the same here. It is not
            in spec.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.CellSpec(jaxrnn.LSTM_CELL, 10, 20, bias=False).init(jax.random.key(0))
    >>> [found] = jaxrnn.checkpoint.find_rnns({f"decoder.{name}": value for name, value in params.items()})
    >>> found.prefix, found.kind, found.is_cell, found.bias, found.dtype
    ('decoder.', 'LSTM', True, False, dtype('float32'))
    >>> cell = getattr(jaxrnn.linen, found.class_name)(**found.arguments)
    """

    prefix: str
    spec: Spec | CellSpec
    dtype: np.dtype[Any]
    beside: tuple[str, ...] = ()
    said: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    in_training: tuple[str, ...] = ()

    @property
    def class_name(self) -> str:
        """The class to build, of `jaxrnn` and `jaxrnn.linen`, and if `in_torch` of torch.nn."""
        return self.kind + "Cell" * self.is_cell if self.in_torch else "Recurrent"

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments with which to build it. `assumed` says which of the others matter."""
        arguments: dict[str, Any] = {} if self.in_torch else {"cell": self.spec.cell}
        arguments |= {"input_size": self.input_size, "hidden_size": self.hidden_size, "bias": self.bias}
        if isinstance(self.spec, Spec):
            arguments |= {"num_layers": self.num_layers, "bidirectional": self.bidirectional}
            arguments |= {"batch_first": True} if self.spec.batch_first else {}
        return arguments | ({"proj_size": self.proj_size} if self.proj_size else {}) | dict(self.said)

    @property
    def is_cell(self) -> bool:
        """Whether it is a cell (RNNCell, LSTMCell, GRUCell), which makes one step per call."""
        return isinstance(self.spec, CellSpec)

    @property
    def kind(self) -> str:
        """The class in torch.nn, less Cell: "RNN", "LSTM" or "GRU"; for other cells their name."""
        return self.spec.cell.name.partition("_")[0] if self.in_torch else self.spec.cell.name

    @property
    def in_torch(self) -> bool:
        """Whether torch.nn has it."""
        return self.spec.cell in (*_TORCH_CELLS, RNN_RELU)

    @property
    def input_size(self) -> int:
        return self.spec.input_size

    @property
    def hidden_size(self) -> int:
        return self.spec.hidden_size

    @property
    def num_layers(self) -> int:
        return self.spec.num_layers if isinstance(self.spec, Spec) else 1

    @property
    def bidirectional(self) -> bool:
        return isinstance(self.spec, Spec) and self.spec.bidirectional

    @property
    def bias(self) -> bool:
        return bool(self.spec.bias)

    @property
    def proj_size(self) -> int:
        return self.spec.proj_size if isinstance(self.spec, Spec) else 0

    @property
    def num_parameters(self) -> int:
        """How many numbers its tensors hold."""
        return sum(math.prod(shape) for shape in self.spec.shapes().values())

    @property
    def assumed(self) -> dict[str, object]:
        """The settings that neither weights nor the file say, with the values that `spec` assumes."""
        assumed: dict[str, object] = {}
        if self.spec.cell == RNN_TANH:
            assumed["nonlinearity"] = "tanh"
        if isinstance(self.spec, Spec):
            assumed["batch_first"] = self.spec.batch_first
            if self.spec.num_layers > 1:
                assumed["dropout"] = self.spec.dropout
        return {name: value for name, value in assumed.items() if name not in self.said}


def find_rnns(tensors: Mapping[str, Any], cells: Sequence[Cell] = ()) -> list[FoundRNN]:
    """Find every torch.nn.RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell in a flat dict of tensors.

    Layers of `jaxrnn.Recurrent` are found, too, if their cell has parameters of its own, whose names tell it, or if the
    file says the cell: files of Keras and ONNX say their activations.

    A key that ends in the name of a layer's weight, such as `weight_hh_l0`, belongs to layers, whose weights must be
    complete. Other modules, too, have names like a cell's `weight_hh`. They are taken for a cell only if their shapes
    are a cell's, and nothing else has their prefix; otherwise they are skipped.

    Args:
        tensors: from name to array of numpy, jax or torch, such as from `jaxrnn.checkpoint.load` or `state_dict()`.
            Weights in parts are folded: see `jaxrnn.checkpoint.fold`. What `load` read of settings is used. Cells of
            Flax and Haiku are found under their own names, too, joined by any separator.
        cells: your own cells to look for, beside jaxrnn's. Each must have parameters of its own: layers of a cell
            without are taken for torch's of the same shapes.

    Returns:
        A `FoundRNN` for each, in the order of their first keys; an empty list if there is none.

    Raises:
        CheckpointError: weights do not fit together, and no module is complete; the message names every key that is
            missing, or has a wrong shape or dtype.
        ValueError: one of `cells` has no parameters of its own.

    Warns:
        UserWarning: the same, if other modules are complete.

    >>> import jax, jaxrnn
    >>> from jaxrnn import checkpoint
    >>> params = jaxrnn.Spec(jaxrnn.GRU_CELL, 10, 20, num_layers=2).init(jax.random.key(0))
    >>> [found] = checkpoint.find_rnns({f"encoder.{name}": value for name, value in params.items()})
    >>> found.prefix, found.kind, found.input_size, found.hidden_size, found.num_layers, found.num_parameters
    ('encoder.', 'GRU', 10, 20, 2, 4440)
    >>> found.assumed
    {'batch_first': False, 'dropout': 0.0}
    """
    if unknowable := [cell.name for cell in cells if not cell.own]:
        raise ValueError(f"cells should have params of their own, whose names tell them from torch's, got {unknowable}")
    cells = (*cells, *_MORE_CELLS)
    roles = {*ROLES, *(name for cell in cells for name in cell.own)}
    tensors = with_torchs_names(fold(tensors))
    said, origins = said_of(tensors), origins_of(tensors)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    keys = [key for key in tensors if isinstance(key, str)]
    for key in keys:
        prefix, dot, leaf = key.rpartition(".")
        is_cell = leaf in _CELL_NAMES
        match = _LAYER_NAME.fullmatch(leaf)
        if is_cell or (match and match["role"] in roles):
            groups.setdefault((prefix + dot, is_cell), {})[leaf] = tensors[key]
    keys.sort()
    problems: list[str] = []
    found = []
    for (prefix, is_cell), group in groups.items():
        spec: Spec | CellSpec | None = None
        wrong: list[str] = []
        if is_cell:
            under = bisect.bisect(keys, prefix + chr(sys.maxunicode)) - bisect.bisect_left(keys, prefix)
            if under == len(group):
                spec = _cell_spec(prefix, group, wrong)
        elif any(match["role"] in ROLES for name in group if (match := _LAYER_NAME.fullmatch(name))):
            spec = _layers_spec(prefix, group, cells, wrong)
        if spec is not None:
            wrong += _misfits(prefix, group, spec.shapes())
        if spec is not None and not wrong:
            others = keys[bisect.bisect_left(keys, prefix) : bisect.bisect(keys, prefix + chr(sys.maxunicode))]
            names = [key.removeprefix(prefix) for key in others]
            beside = tuple(name for name in names if _LIKE_OURS.fullmatch(name) and name not in group)
            settings = said.get(prefix, {})
            usual = origins[prefix].usual if prefix in origins else {}
            full = _with(spec, {**usual, **settings})
            dtype = dtype_of(next(iter(group.values())))
            found.append(FoundRNN(prefix, full, dtype, beside, settings, in_training_of(tensors).get(prefix, ())))
        problems += wrong
    for target, text in misfits(tensors).items():
        prefix, dot, leaf = target.rpartition(".")
        alone = (
            (match := _LAYER_NAME.fullmatch(leaf)) and match["role"] in ROLES and (prefix + dot, False) not in groups
        )
        if f"{target} is missing" in problems or alone:
            problems.append(text)
    if problems:
        lines = "\n  ".join(problems)
        text = (
            f"recurrent weights that do not fit together:\n  {lines}\nsave the whole state_dict() of a torch.nn module"
        )
        if not found:
            raise CheckpointError(text)
        warnings.warn(f"left out {text}", stacklevel=level_outside())
    return found


def _with(spec: Spec | CellSpec, said: Mapping[str, Any]) -> Spec | CellSpec:
    """A spec with the settings that the file says."""
    others = {name: value for name, value in said.items() if name != "nonlinearity"}
    if said.get("nonlinearity") == "relu":
        others["cell"] = RNN_RELU
    return dataclasses.replace(spec, **others)


def _layers_spec(prefix: str, group: dict[str, Any], cells: Sequence[Cell], problems: list[str]) -> Spec | None:
    """The settings of the layers in `group`; or None, with what is wrong added to `problems`."""
    parsed = [match for name in group if (match := _LAYER_NAME.fullmatch(name))]
    roles = {match["role"] for match in parsed}
    own = roles - {*ROLES}
    likely = [cell for cell in cells if own & cell.own.keys()] if own else [*_TORCH_CELLS]
    likely.sort(key=lambda cell: len(own ^ cell.own.keys()))  # the best match first
    present = {int(match["layer"]) for match in parsed}
    settings: dict[str, Any] = {
        "num_layers": max(present) + 1,
        "bias": any(role.startswith("bias") for role in roles),
        "bidirectional": any(match["reverse"] for match in parsed),
    }
    projected = "weight_hr" in roles
    layers: Sequence[int] = range(settings["num_layers"])
    gap = len(layers) > 10 * len(group)  # which may be huge: do not loop over it
    if gap:
        problems.append(f"{prefix}: keys go up to layer {max(present)}, but only {len(present)} layers have any")
        layers = sorted(present)
    # Names do not depend on sizes, and are the same for torch's cells, except for the projection.
    one = likely[0]
    names = Spec(one, 1, 2, **settings, proj_size=int(projected and one.projects)).names
    missing = [
        f"{prefix}{name} is missing"
        for layer in layers
        for direction in range(1 + settings["bidirectional"])
        for name in names(layer, direction).values()
        if name not in group
    ]
    problems += missing
    if missing or gap:
        return None
    first = names(0, 0)
    shapes = {role: _shape_of(group[first[role]]) for role in first if role in ROLES and role.startswith("weight")}
    if bad := [role for role, shape in shapes.items() if len(shape) != 2]:
        problems += [f"{prefix}{first[role]} is {shapes[role]}, should be 2-D" for role in bad]
        return None
    if own:  # the names tell the cell; `_misfits` checks the shapes
        hidden_size = shapes["weight_ih"][0] // len(one.gates)
        cell, proj_size = one, shapes["weight_hr"][0] if projected and one.projects else 0
    else:
        hidden_size = shapes["weight_hr" if projected else "weight_hh"][1]
        rows, features = shapes["weight_hh"]
        found = _cell(rows, hidden_size)
        if found is None or (projected and not found.projects):
            wanted = f"4 * {hidden_size} rows (LSTM)"
            if not projected:
                wanted += f", 3 * {hidden_size} (GRU) or {hidden_size} (RNN)"
            problems.append(f"{prefix}{first['weight_hh']} is {(rows, features)}, should have {wanted}")
            return None
        cell, proj_size = found, features if projected else 0
    try:
        return Spec(cell, shapes["weight_ih"][1], hidden_size, **settings, proj_size=proj_size)
    except ValueError as error:
        problems.append(f"{prefix}{first['weight_ih']} and the weights beside it: {error}")
        return None


def _cell_spec(prefix: str, group: dict[str, Any], problems: list[str]) -> CellSpec | None:
    """The settings of the cell in `group`, or None if it is not a torch cell."""
    weights = [name for name in _CELL_NAMES if name.startswith("weight")]
    missing = [name for name in weights if name not in group]
    if missing:
        if len(group) == len(_CELL_NAMES) - 1:
            problems += [f"{prefix}{name} is missing" for name in missing]
        return None
    shapes = {name: _shape_of(group[name]) for name in weights}
    if any(len(shape) != 2 for shape in shapes.values()):
        return None
    (_, input_size), (rows, hidden_size) = shapes.values()
    if (cell := _cell(rows, hidden_size)) is None:
        return None
    spec = CellSpec(cell, input_size, hidden_size, bias=len(group) > len(weights))
    return spec if all(spec.shapes()[name] == shape for name, shape in shapes.items()) else None


def _cell(rows: int, hidden_size: int) -> Cell | None:
    return next((cell for cell in _TORCH_CELLS if hidden_size > 0 and rows == len(cell.gates) * hidden_size), None)


def _misfits(prefix: str, group: dict[str, Any], wanted: dict[str, Shape]) -> list[str]:
    """What is wrong with the tensors, one line each."""
    dtypes = {name: dtype_of(value) for name, value in group.items()}
    common = Counter(dtypes.values()).most_common(1)[0][0]
    problems = []
    for name, shape in wanted.items():
        if name not in group:
            problems.append(f"{prefix}{name} is missing")
            continue
        if (found := _shape_of(group[name])) != shape:
            problems.append(f"{prefix}{name} is {found}, should be {shape}")
        if not jnp.issubdtype(dtypes[name], jnp.floating):
            problems.append(f"{prefix}{name} is {dtypes[name]}, should be floating")
        elif dtypes[name] != common:
            problems.append(f"{prefix}{name} is {dtypes[name]}, should be {common} as the others")
    return problems


def _shape_of(value: Any) -> Shape:
    return tuple(getattr(value, "shape", ()))
