"""A constructor's arguments as a frozen value, with their checks and the names and shapes of the parameters.

Modules, checkpoints and the parity suite all read names and shapes here.
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from jaxrnn import cells, more_cells
from jaxrnn.cells import ROLES, Cell, StateT
from jaxrnn.initializers import GateInitializer, by_role
from jaxrnn.torch_random import TorchGenerator

Shape = tuple[int, ...]


class _Shapes(abc.ABC, Generic[StateT]):
    """What `Spec` and `CellSpec` share: initial parameters and states from names and shapes."""

    cell: Cell[StateT]
    input_size: int
    hidden_size: int

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join([self.cell.name, *shown(self)])})"

    @abc.abstractmethod
    def shapes(self) -> dict[str, Shape]:
        """The parameters' names and shapes, in the order of torch's `state_dict()`."""

    @abc.abstractmethod
    def state_shapes(self, *batch: int) -> tuple[Shape, ...]:
        """The shape of each of the cell's states, with any number of batch axes."""

    def initial_state(self, batch: int | None = None, dtype: DTypeLike = jnp.float32) -> StateT:
        """The state of zeros that a call without hx starts from. Use it as the first carry of `jax.lax.scan`.

        Args:
            batch: how many rows; None for unbatched input.
            dtype: the state's floating dtype, which a call keeps.

        Returns:
            A value for hx: one array, or for a cell of several states a tuple, (h_0, c_0) for an LSTM.

        >>> import jaxrnn
        >>> h_0, c_0 = jaxrnn.Spec(jaxrnn.LSTM_CELL, 10, 20, num_layers=2, proj_size=5).initial_state(3)
        >>> h_0.shape, c_0.shape
        ((2, 3, 5), (2, 3, 20))
        """
        shapes = self.state_shapes() if batch is None else self.state_shapes(batch)
        state: Any = tuple(jnp.zeros(shape, dtype) for shape in shapes)
        return state if len(state) > 1 else state[0]

    def init(
        self,
        key: jax.Array | TorchGenerator,
        dtype: DTypeLike = jnp.float32,
        *,
        kernel_init: GateInitializer | None = None,
        recurrent_kernel_init: GateInitializer | None = None,
        bias_init: GateInitializer | None = None,
    ) -> dict[str, jax.Array]:
        """Initial parameters, by default as torch draws them: uniform in `[-1/sqrt(hidden_size), 1/sqrt(hidden_size))`.

        A cell's own parameters are drawn by their `init`, if they have one.

        Args:
            key: a jax random key; or a `jaxrnn.TorchGenerator`, for the numbers that torch's constructor draws.
            dtype: the parameters' floating dtype.
            kernel_init: what draws `weight_ih`, and with proj_size `weight_hr`, in place of torch's draw: a function
                `init(key, shape, dtype)`, as in `jax.nn.initializers`. It is called for each gate with the shape
                (features, hidden_size). Or a dict from names of gates to such functions. See `jaxrnn.initializers`.
            recurrent_kernel_init: the same for `weight_hh`.
            bias_init: the same for `bias_ih`, with the shape (hidden_size,). Then `bias_hh` is 0, because the two add
                up; it is drawn, too, for a gate in which they do not, such as GRU's n.

        Returns:
            A dict from name to array, in the order of `shapes()`.

        Raises:
            TypeError: an initializer is not a function of a key, a shape and a dtype, or returns another shape.
            ValueError: it names a gate that the cell does not have. Or a TorchGenerator is given with an initializer,
                or for a cell with one of its own, such as `jaxrnn.LAYER_NORM_LSTM_CELL`.

        >>> import jax, jaxrnn
        >>> params = jaxrnn.CellSpec(jaxrnn.GRU_CELL, 3, 4).init(jax.random.key(0))
        >>> {name: value.shape for name, value in params.items()}
        {'weight_ih': (12, 3), 'weight_hh': (12, 4), 'bias_ih': (12,), 'bias_hh': (12,)}
        """
        shapes = self.shapes()
        given: dict[str, Any] = {
            "kernel_init": kernel_init, "recurrent_kernel_init": recurrent_kernel_init, "bias_init": bias_init
        }  # fmt: skip
        if isinstance(key, TorchGenerator):
            self._refuse_initializers(given)
            bound = self._bound()
            drawn = {name: key.uniform(shape, -bound, bound, dtype) for name, shape in shapes.items()}
            return {name: _as_jax(array) for name, array in drawn.items()}
        keys = jax.random.split(key, len(shapes))
        draws = self.initializers(**given)
        return {name: draws[name](keys[i], shape, dtype) for i, (name, shape) in enumerate(shapes.items())}

    def initializers(
        self,
        *,
        kernel_init: GateInitializer | None = None,
        recurrent_kernel_init: GateInitializer | None = None,
        bias_init: GateInitializer | None = None,
    ) -> dict[str, Callable[..., jax.Array]]:
        """For each parameter, the function (key, shape, dtype) that draws its initial value; see `init`."""
        draws = {name: own.init for name, own in self.cell.own.items() if own.init is not None}
        draws |= by_role(self.cell, self._uniform, kernel_init, recurrent_kernel_init, bias_init)
        return {name: draws.get(role, self._uniform) for name, role in self._named_roles().items()}

    @abc.abstractmethod
    def _named_roles(self) -> dict[str, str]:
        """Each parameter's role, in the order of `shapes()`."""

    def _bound(self) -> float:
        return 1 / math.sqrt(self.hidden_size) if self.hidden_size else 0.0

    def _uniform(self, key: jax.Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> jax.Array:
        bound = self._bound()
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    def _refuse_initializers(self, given: Mapping[str, GateInitializer | None]) -> None:
        """Refuse what draws from a key of JAX, which a TorchGenerator is not."""
        own = [name for name, parameter in self.cell.own.items() if parameter.init is not None]
        found = [name for name, value in given.items() if value is not None] + [f"init of {name}" for name in own]
        if found:
            raise ValueError(
                f"{found[0]} should be None with a TorchGenerator, because it draws from a jax key: "
                "give a key or nnx.Rngs in place of the generator"
            )


def _as_jax(array: NDArray[Any]) -> jax.Array:
    """An array on the mesh, if one is set: with a dtype, `jnp.asarray` would put it on one device."""
    found = jnp.asarray(array)
    return found if found.dtype == array.dtype else found.astype(array.dtype)  # float64 without x64, of which JAX warns


def shown(spec: Any) -> list[str]:
    """The settings in a repr, like torch's: the sizes, then the settings that are not the defaults."""
    values = {field.name: (getattr(spec, field.name), field.default) for field in dataclasses.fields(spec)}
    others = [f"{n}={value}" for n, (value, default) in values.items() if default not in (dataclasses.MISSING, value)]
    return [str(spec.input_size), str(spec.hidden_size), *others]


def _shape(role: str, cell: Cell, input_size: int, hidden_size: int, proj_size: int = 0) -> Shape:
    if role in cell.own:
        sizes = {"gates": len(cell.gates), "hidden": hidden_size}
        return tuple(sizes[axis] for axis in cell.own[role].axes)
    rows = len(cell.gates) * hidden_size
    return {
        "weight_ih": (rows, input_size),
        "weight_hh": (rows, proj_size or hidden_size),
        "bias_ih": (rows,),
        "bias_hh": (rows,),
        "weight_hr": (proj_size, hidden_size),
    }[role]


def _roles(cell: Cell, bias: bool | int, proj_size: int = 0) -> tuple[str, ...]:
    """The parameters of one layer in one direction: torch's weights and biases, then the cell's own."""
    has = {
        "weight_ih": True,
        "weight_hh": cell.recurrent,
        "bias_ih": bool(bias),
        "bias_hh": bool(bias) and cell.recurrent,
        "weight_hr": bool(proj_size),
    }
    return (*(role for role in ROLES if has[role]), *cell.own)


def _check_type(name: str, value: object, kind: type, remedy: str = "") -> None:
    if not isinstance(value, kind):
        library = "numpy." if isinstance(value, np.generic) else ""  # whose bool is called bool, too
        got = f"got {value!r} of type {library}{type(value).__name__}"
        same = jnp.issubdtype(getattr(value, "dtype", object), jnp.integer if kind is int else jnp.bool_)
        remedy = f": write {kind.__name__}({name})" if same else remedy
        raise TypeError(f"{name} should be of type {kind.__name__}, {got}{remedy}")


def _check_cell(cell: object) -> None:
    if not isinstance(cell, Cell):
        known = [name for module in (cells, more_cells) for name, value in vars(module).items() if type(value) is Cell]
        raise TypeError(f"cell should be a jaxrnn.Cell, got {cell!r}: jaxrnn has {', '.join(known)}")


def level_outside() -> int:
    """`stacklevel` that points at the first frame outside jaxrnn and the libraries that call it."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("jaxrnn", "flax", "jax"):
        frame, level = frame.f_back, level + 1
    return level


@dataclasses.dataclass(frozen=True, repr=False)
class Spec(_Shapes[StateT]):
    """A recurrent network's settings: torch's constructor arguments after the kind of cell.

    Args:
        cell: the kind of cell: `jaxrnn.RNN_TANH`, `RNN_RELU`, `LSTM_CELL`, `GRU_CELL`, or your own `Cell`.
        input_size: features of the input at each step.
        hidden_size: features of the hidden state.
        num_layers: how many layers are stacked.
        bias: whether there are `bias_ih` and `bias_hh`.
        batch_first: whether batched input and output are `(batch, time, features)` instead of
            `(time, batch, features)`. Touches neither `h_0` nor `h_n`.
        dropout: the probability with which an output of every layer but the last is zeroed in training.
        bidirectional: whether each layer also runs backward in time.
        proj_size: features of the projected hidden state, for an LSTM and other cells that allow it; 0 for none.
        recurrent_dropout: the probability with which a number of h is zeroed in training before the recurrent product,
            one mask for all steps and gates (Gal and Ghahramani 2016, tied weights).
        variational_dropout: whether `dropout`, too, has one mask for all steps.

    Raises:
        TypeError: a size is not an int, or `bias` or `batch_first` is not a bool.
        ValueError: a value is out of range, or the cell does not support `proj_size`.

    Warns:
        UserWarning: `dropout` with a single layer, where it does nothing.

    >>> import jaxrnn
    >>> jaxrnn.Spec(jaxrnn.LSTM_CELL, 10, 20, bias=False, proj_size=5).shapes()
    {'weight_ih_l0': (80, 10), 'weight_hh_l0': (80, 5), 'weight_hr_l0': (5, 20)}
    """

    cell: Cell[StateT]
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    proj_size: int = 0
    _: dataclasses.KW_ONLY
    recurrent_dropout: float = 0.0
    variational_dropout: bool = False

    def __post_init__(self) -> None:
        _check_cell(self.cell)
        cells.check_probability("dropout", self.dropout)
        cells.check_probability("recurrent_dropout", self.recurrent_dropout)
        _check_type("bias", self.bias, bool)
        _check_type("batch_first", self.batch_first, bool)
        _check_type("variational_dropout", self.variational_dropout, bool, ": the probability is that of dropout")
        if self.recurrent_dropout and not self.cell.recurrent:
            raise ValueError(
                f"recurrent_dropout should be 0 for {self.cell.name}, got {self.recurrent_dropout}: the cell has no "
                "recurrent weights"
            )
        for name in ("input_size", "hidden_size", "num_layers"):
            value = getattr(self, name)
            _check_type(name, value, int)
            if value <= 0:
                raise ValueError(f"{name} should be greater than zero, got {value}")
        _check_type("proj_size", self.proj_size, int)
        if self.proj_size and not self.cell.projects:
            raise ValueError(
                f"proj_size should be 0 for {self.cell.name}, got {self.proj_size}: only a Cell with projects=True, "
                "such as LSTM_CELL, can have a projection"
            )
        if not 0 <= self.proj_size < self.hidden_size:
            raise ValueError(
                f"proj_size should be 0 for none, or less than hidden_size={self.hidden_size}, got {self.proj_size}"
            )
        if self.dropout > 0 and self.num_layers == 1:
            warnings.warn(
                f"dropout={self.dropout} acts after every layer but the last, so it does nothing with num_layers=1",
                UserWarning,
                stacklevel=level_outside(),
            )
        object.__setattr__(self, "dropout", float(self.dropout))
        object.__setattr__(self, "recurrent_dropout", float(self.recurrent_dropout))
        object.__setattr__(self, "bidirectional", bool(self.bidirectional))

    def is_random(self, masks: bool = False) -> bool:
        """Whether training draws random numbers: for recurrent dropout, zoneout, or without masks for dropout."""
        between_layers = self.dropout > 0 and self.num_layers > 1 and not masks
        return between_layers or self.recurrent_dropout > 0 or any(self.cell.zoneout)

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """Features of the output: `proj_size`, or `hidden_size` without projection."""
        return self.proj_size or self.hidden_size

    def state_sizes(self) -> tuple[int, ...]:
        """Features of each of the cell's states. Only the first, the output, is projected."""
        return (self.output_size,) + (self.hidden_size,) * (len(self.cell.states) - 1)

    def state_shapes(self, *batch: int) -> tuple[Shape, ...]:
        """The shape of each of the cell's states, with any number of batch axes.

        >>> import jaxrnn
        >>> jaxrnn.Spec(jaxrnn.LSTM_CELL, 10, 20, bidirectional=True, proj_size=5).state_shapes(3)
        ((2, 3, 5), (2, 3, 20))
        """
        rows = self.num_layers * self.num_directions
        return tuple((rows, *batch, size) for size in self.state_sizes())

    def dropout_masks(self, generator: TorchGenerator, *leading: int) -> list[NDArray[np.bool_]]:
        """The masks that torch's module with these settings draws in a training call, for `dropout_masks=`.

        Args:
            generator: torch's generator, as it is before the call. See `TorchGenerator.dropout_mask` for where torch
                draws these masks, and where others.
            leading: (time, batch) of the input, even with `batch_first`; or (time,) of an unbatched one; or for a
                PackedSequence the length of its data.

        Returns:
            A mask for each layer but the last.

        >>> import jaxrnn
        >>> spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, 10, 20, num_layers=3, dropout=0.2, bidirectional=True)
        >>> [mask.shape for mask in spec.dropout_masks(jaxrnn.TorchGenerator(0), 7, 3)]
        [(7, 3, 40), (7, 3, 40)]
        """
        if not isinstance(generator, TorchGenerator):
            raise TypeError(f"generator should be a jaxrnn.TorchGenerator, got {type(generator).__name__}")
        shape = *leading, self.num_directions * self.output_size
        return [generator.dropout_mask(shape, self.dropout) for _ in range(self.num_layers - 1)]

    def names(self, layer: int, direction: int) -> dict[str, str]:
        """For one layer and direction: from a parameter's role (`weight_ih`) to its name (`weight_ih_l0_reverse`).

        >>> import jaxrnn
        >>> jaxrnn.Spec(jaxrnn.RNN_TANH, 1, 1, bias=False).names(layer=0, direction=1)
        {'weight_ih': 'weight_ih_l0_reverse', 'weight_hh': 'weight_hh_l0_reverse'}
        """
        suffix = f"_l{layer}" + ("_reverse" if direction else "")
        return {role: role + suffix for role in _roles(self.cell, self.bias, self.proj_size)}

    def _parameters(self) -> dict[str, tuple[int, str]]:
        """Each parameter's layer and role."""
        return {
            name: (layer, role)
            for layer in range(self.num_layers)
            for direction in range(self.num_directions)
            for role, name in self.names(layer, direction).items()
        }

    def shapes(self) -> dict[str, Shape]:
        """The parameters' names and shapes, in the order of torch's `state_dict()`."""
        inputs = (self.input_size, self.output_size * self.num_directions)
        return {
            name: _shape(role, self.cell, inputs[layer > 0], self.hidden_size, self.proj_size)
            for name, (layer, role) in self._parameters().items()
        }

    def _named_roles(self) -> dict[str, str]:
        return {name: role for name, (_, role) in self._parameters().items()}

    def hidden_axes(self) -> dict[str, tuple[bool, ...]]:
        """For each parameter axis, whether it counts hidden units and can be sharded. Axes of rows cannot.

        >>> import jaxrnn
        >>> jaxrnn.Spec(jaxrnn.GRU_CELL, 10, 20, bias=False).hidden_axes()
        {'weight_ih_l0': (False, False), 'weight_hh_l0': (False, True)}
        """

        def axes(layer: int, role: str) -> tuple[bool, ...]:
            if role in self.cell.own:
                return tuple(axis == "hidden" for axis in self.cell.own[role].axes)
            if role.startswith("bias"):
                return (False,)
            return False, role == "weight_hr" or (not self.proj_size and (role == "weight_hh" or layer > 0))

        return {name: axes(layer, role) for name, (layer, role) in self._parameters().items()}


@dataclasses.dataclass(frozen=True, repr=False)
class CellSpec(_Shapes[StateT]):
    """The settings of one cell that makes one step at a call: torch's `RNNCell`, `LSTMCell` and `GRUCell`.

    Args:
        cell: the kind of cell.
        input_size: features of the input; 0 is allowed, as in torch.
        hidden_size: features of the hidden state; 0 is allowed, as in torch.
        bias: whether there are `bias_ih` and `bias_hh`; anything true or false, as in torch.

    Raises:
        TypeError: cell is not a `Cell`, or a size is not an int.
        ValueError: a size is negative.

    >>> import jaxrnn
    >>> jaxrnn.CellSpec(jaxrnn.LSTM_CELL, 3, 5, bias=False).shapes()
    {'weight_ih': (20, 3), 'weight_hh': (20, 5)}
    """

    cell: Cell[StateT]
    input_size: int
    hidden_size: int
    bias: bool | int = True

    def __post_init__(self) -> None:
        _check_cell(self.cell)
        for name in ("input_size", "hidden_size"):
            value = getattr(self, name)
            _check_type(name, value, int)
            if value < 0:
                raise ValueError(f"{name} should not be negative, got {value}")

    def shapes(self) -> dict[str, Shape]:
        """The parameters' names and shapes, in the order of torch's `state_dict()`."""
        roles = _roles(self.cell, self.bias)
        return {role: _shape(role, self.cell, self.input_size, self.hidden_size) for role in roles}

    def _named_roles(self) -> dict[str, str]:
        return {role: role for role in _roles(self.cell, self.bias)}

    def state_shapes(self, *batch: int) -> tuple[Shape, ...]:
        """The shape of each of the cell's states, with any number of batch axes."""
        return ((*batch, self.hidden_size),) * len(self.cell.states)
