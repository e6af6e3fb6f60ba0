"""RNN, LSTM, GRU, their cells, and Recurrent as flax.linen modules with torch's arguments and parameters.

These are the modules of `jaxrnn.nnx` for Flax's other API: `jaxrnn._core.calls` computes, and a module adds parameters and
randomness. `params` has the keys of torch's `state_dict()`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Unpack, overload

import jax
import jax.numpy as jnp
from flax import linen
from jax.typing import ArrayLike, DTypeLike

from jaxrnn import engines
from jaxrnn._core import docs, flax_cell, flax_sharding
from jaxrnn._core.calls import HX, Marks, Output, PackedMarks, call, call_cell
from jaxrnn._core.options import CellKeywords, Engine, Keywords, MeshAxis, Options, Remat, floating_dtype
from jaxrnn.cells import GRU_CELL, LSTM_CELL, Cell, Nonlinearity, Pair, StateT, rnn_cell
from jaxrnn.packed import Lengths, PackedSequence
from jaxrnn.spec import CellSpec, Spec


class _PackedCall(PackedMarks, total=False):
    """The keywords of a layer's call, for type checkers."""

    rng: jax.Array | None


class _Call(_PackedCall, Marks, total=False):
    """The same for rows that are not packed."""


_Variables = Mapping[str, Any]
_Rngs = jax.Array | Mapping[str, jax.Array] | None


class _Module(linen.Module, Generic[StateT]):
    """What layers and cells share: the settings, checked at construction, and the parameters under torch's names."""

    _: dataclasses.KW_ONLY  # so that the fields of the classes below come first, in torch's order
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None

    def __post_init__(self) -> None:
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self._Spec) if f.name != "cell"}
        self.spec: Any = self._Spec(self._cell, **settings)
        self.options: Options = Options(**{name: getattr(self, name) for name in self._Keywords.__annotations__})
        engines.asked(self.options)
        floating_dtype("param_dtype", self.param_dtype)
        super().__post_init__()

    if TYPE_CHECKING:  # Flax's is a dict or a FrozenDict to a checker

        def init(self, rngs: jax.Array | dict[str, jax.Array], *args: Any, **kwargs: Any) -> dict[str, Any]: ...

    def _initializers(self) -> dict[str, Callable[..., Any]]:
        return self.spec.initializers()

    def _params(self) -> dict[str, jax.Array]:
        shapes, draws = self.spec.shapes(), self._initializers()
        return {name: self.param(name, draws[name], shape, self.param_dtype) for name, shape in shapes.items()}

    @linen.nowrap
    def initial_state(self, batch: int | None = None, dtype: DTypeLike | None = None) -> StateT:
        """The state of zeros that a call without hx starts from. Use it as the first carry of a scan.

        Args:
            batch: how many rows; None for unbatched input.
            dtype: the state's floating dtype, which calls keep; by default the module's dtype, or its parameters'.

        Returns:
            A value for hx.
        """
        return self.spec.initial_state(batch, dtype or self.dtype or self.param_dtype)


class _Layers(_Module[StateT]):
    """What RNN, LSTM, GRU and Recurrent share: the call, and dropout as in linen.Dropout."""

    _Spec, _Keywords = Spec, Keywords
    _: dataclasses.KW_ONLY
    remat: Remat = "none"
    hidden_axis: MeshAxis | None = None
    unroll: int | None = None
    engine: Engine = "auto"
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    def __post_init__(self) -> None:
        super().__post_init__()
        flax_sharding.check(self.spec, self.hidden_axis)

    if TYPE_CHECKING:  # what the call returns; Flax's are Any, or a pair

        @overload
        def apply(
            self,
            variables: _Variables,
            x: ArrayLike,
            hx: HX = None,
            deterministic: bool | None = None,
            *,
            rngs: _Rngs = None,
            **keywords: Unpack[_Call],
        ) -> tuple[jax.Array, StateT]: ...
        @overload
        def apply(
            self,
            variables: _Variables,
            x: PackedSequence,
            hx: HX = None,
            deterministic: bool | None = None,
            *,
            rngs: _Rngs = None,
            **keywords: Unpack[_PackedCall],
        ) -> tuple[PackedSequence, StateT]: ...
        @overload
        def apply(self, variables: _Variables, *args: Any, **kwargs: Any) -> Any: ...
        def apply(self, variables: _Variables, *args: Any, **kwargs: Any) -> Any: ...

        @overload
        def init_with_output(
            self,
            rngs: _Rngs,
            x: ArrayLike,
            hx: HX = None,
            deterministic: bool | None = None,
            **keywords: Unpack[_Call],
        ) -> tuple[tuple[jax.Array, StateT], dict[str, Any]]: ...
        @overload
        def init_with_output(self, rngs: _Rngs, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]: ...
        def init_with_output(self, rngs: _Rngs, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]: ...

    def _initializers(self) -> dict[str, Callable[..., Any]]:
        draws = self.spec.initializers()
        if self.hidden_axis is None:
            return draws
        names = flax_sharding.names(self.spec, flax_sharding.mesh_axis(self.hidden_axis))
        return {name: linen.with_partitioning(draw, names[name]) for name, draw in draws.items()}

    @overload
    def __call__(
        self, x: ArrayLike, hx: HX = None, deterministic: bool | None = None, **keywords: Unpack[_Call]
    ) -> tuple[jax.Array, StateT]: ...
    @overload
    def __call__(
        self, x: PackedSequence, hx: HX = None, deterministic: bool | None = None, **keywords: Unpack[_PackedCall]
    ) -> tuple[PackedSequence, StateT]: ...
    @linen.compact
    @docs.described
    def __call__(
        self,
        x: ArrayLike | PackedSequence,
        hx: HX = None,
        deterministic: bool | None = None,
        *,
        lengths: Lengths | None = None,
        reset: ArrayLike | None = None,
        reset_state: HX = None,
        rng: jax.Array | None = None,
    ) -> tuple[Output, StateT]:
        """Run over a sequence.

        Args:
            deterministic: whether dropout is off. With dropout, give it either here or as a field. It can be given by
                position, so that `linen.remat` can name it: `linen.remat(jaxrnn.linen.LSTM, static_argnums=3)`.
            rng: a jax key for dropout, in place of the one that `apply` was given for `rng_collection`.

        Returns:
            `(output, h_n)`, for an LSTM `(output, (h_n, c_n))`; shapes as the class says.

        Raises:
            As `jaxrnn.apply`; and ValueError if `deterministic` is given twice, or needed and not given.
        """
        flax_cell.refuse_state_of_sequential(self, hx)
        if isinstance(deterministic, Sequence) or getattr(deterministic, "shape", ()) != ():  # by position
            raise TypeError(f"deterministic should be True, False or None, got {deterministic!r}: give lengths by name")
        if self.dropout > 0 and self.num_layers > 1:
            off = linen.merge_param("deterministic", self.deterministic, deterministic)
            rng = None if off else self.make_rng(self.rng_collection) if rng is None else rng
        options = flax_sharding.on_the_mesh(self.options)
        if self.is_initializing() and not flax_sharding.on_mesh():  # `init` needs no mesh for names and shapes
            options = dataclasses.replace(options, hidden_axis=None)
        return call(
            options,
            self.spec,
            self._params(),
            x,
            hx,
            lengths=lengths,
            reset=reset,
            reset_state=reset_state,
            dropout_key=rng,
        )

    __call__.__qualname__ = "module"  # for Python's own messages, which would name this class


@docs.layer("RNN", linen=True)
class RNN(_Layers[jax.Array]):
    """A stack of Elman RNN layers: torch.nn.RNN. Torch's arguments are fields, in torch's order.

    Raises:
        TypeError: a size is not an int, or `bias` or `batch_first` is not a bool.
        ValueError: a size or a probability is out of range, the nonlinearity is unknown, or `proj_size` is not 0.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> rnn = jaxrnn.linen.RNN(10, 20, 2, "relu")
    >>> variables = rnn.init(jax.random.key(0), jnp.ones((5, 3, 10)))
    >>> output, h_n = rnn.apply(variables, jnp.ones((5, 3, 10)))
    >>> output.shape, h_n.shape
    ((5, 3, 20), (2, 3, 20))
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    nonlinearity: Nonlinearity = "tanh"
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    _: dataclasses.KW_ONLY
    proj_size: int = 0

    @property
    def _cell(self) -> Cell:
        return rnn_cell(self.nonlinearity)


@docs.layer("LSTM", linen=True)
class LSTM(_Layers[Pair]):
    """A stack of long short-term memory layers: torch.nn.LSTM. Torch's arguments are fields, in torch's order.

    Raises:
        TypeError: a size is not an int, or `bias` or `batch_first` is not a bool.
        ValueError: a size or a probability is out of range.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> lstm = jaxrnn.linen.LSTM(10, 20, num_layers=2, dropout=0.5, bidirectional=True)
    >>> variables = lstm.init(jax.random.key(0), jnp.ones((5, 3, 10)), deterministic=True)
    >>> list(variables["params"])[:4]
    ['weight_ih_l0', 'weight_hh_l0', 'bias_ih_l0', 'bias_hh_l0']
    >>> output, (h_n, c_n) = lstm.apply(
    ...     variables, jnp.ones((5, 3, 10)), deterministic=False, rngs={"dropout": jax.random.key(1)}
    ... )
    >>> output.shape, h_n.shape, c_n.shape
    ((5, 3, 40), (4, 3, 20), (4, 3, 20))
    """

    _cell = LSTM_CELL
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    proj_size: int = 0


@docs.layer("GRU", linen=True)
class GRU(_Layers[jax.Array]):
    """A stack of gated recurrent unit layers: torch.nn.GRU. Torch's arguments are fields, in torch's order.

    Raises:
        TypeError: a size is not an int, or `bias` or `batch_first` is not a bool.
        ValueError: a size or a probability is out of range, or `proj_size` is not 0.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> gru = jaxrnn.linen.GRU(10, 20, batch_first=True)
    >>> (output, h_n), variables = gru.init_with_output(jax.random.key(0), jnp.ones((3, 7, 10)), lengths=[7, 2, 0])
    >>> output.shape, h_n.shape
    ((3, 7, 20), (1, 3, 20))
    """

    _cell = GRU_CELL
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    _: dataclasses.KW_ONLY
    proj_size: int = 0


@docs.layer(linen=True)
class Recurrent(_Layers[StateT]):
    """A stack of layers of any cell: one of `jaxrnn`'s, such as `jaxrnn.LAYER_NORM_LSTM_CELL`, or one of your own.

    For a cell of several states, hx and h_n are tuples. A cell's own parameters are named like the weights: their name,
    then `_l0`, `_l0_reverse` and so on.

    Args:
        cell: the kind of cell, a `jaxrnn.Cell`.
        proj_size: features of the projected hidden state; 0 for no projection. Only for a cell that allows it.

    Raises:
        TypeError: cell is not a `jaxrnn.Cell`, a size is not an int, or `bias` or `batch_first` is not a bool.
        ValueError: a size or a probability is out of range, or the cell does not support `proj_size`.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> rnn = jaxrnn.linen.Recurrent(jaxrnn.IND_RNN_CELL, 10, 20)
    >>> (output, h_n), variables = rnn.init_with_output(jax.random.key(0), jnp.ones((5, 3, 10)))
    >>> output.shape, list(variables["params"])
    ((5, 3, 20), ['weight_ih_l0', 'bias_ih_l0', 'weight_u_l0'])
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

    @property
    def _cell(self) -> Cell:
        return self.cell


class _OneStep(_Module[StateT]):
    """What RNNCell, LSTMCell and GRUCell share: the call."""

    _Spec, _Keywords = CellSpec, CellKeywords

    if TYPE_CHECKING:

        @overload
        def apply(self, variables: _Variables, x: ArrayLike, hx: HX = None) -> StateT: ...
        @overload
        def apply(self, variables: _Variables, *args: Any, **kwargs: Any) -> Any: ...
        def apply(self, variables: _Variables, *args: Any, **kwargs: Any) -> Any: ...

        @overload
        def init_with_output(self, rngs: _Rngs, x: ArrayLike, hx: HX = None) -> tuple[StateT, dict[str, Any]]: ...
        @overload
        def init_with_output(self, rngs: _Rngs, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]: ...
        def init_with_output(self, rngs: _Rngs, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]: ...

    @linen.compact
    def __call__(self, x: ArrayLike, hx: HX = None) -> StateT:
        """Make one step: x and hx to the next state, as the class says. Errors are those of `jaxrnn.apply_cell`."""
        flax_cell.refuse_state_of_sequential(self, hx)
        return call_cell(self.options, self.spec, self._params(), x, hx)

    __call__.__qualname__ = "cell"  # for Python's own messages, which would name this class

    @property
    def num_feature_axes(self) -> int:
        raise TypeError(flax_cell.NOT_FLAXS)  # Linen would hide the words of an AttributeError


@docs.cell("RNN")
class RNNCell(_OneStep[jax.Array]):
    """One step of an Elman RNN at a call: torch.nn.RNNCell. Torch's arguments are fields, in torch's order.

    Args:
        input_size: features of the input; 0 is allowed, as in torch.
        bias: whether there are `bias_ih` and `bias_hh`.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is negative, or the nonlinearity is unknown.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> cell = jaxrnn.linen.RNNCell(10, 20)
    >>> cell.apply(cell.init(jax.random.key(0), jnp.ones((3, 10))), jnp.ones((3, 10))).shape
    (3, 20)
    """

    input_size: int
    hidden_size: int
    bias: bool | int = True
    nonlinearity: Nonlinearity = "tanh"

    @property
    def _cell(self) -> Cell:
        return rnn_cell(self.nonlinearity)


@docs.cell("LSTM")
class LSTMCell(_OneStep[Pair]):
    """One step of an LSTM at a call: torch.nn.LSTMCell. Torch's arguments are fields, in torch's order.

    Args:
        input_size: features of the input; 0 is allowed, as in torch.
        bias: whether there are `bias_ih` and `bias_hh`.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is negative.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> cell = jaxrnn.linen.LSTMCell(10, 20)
    >>> h, c = cell.apply(cell.init(jax.random.key(0), jnp.ones(10)), jnp.ones(10))
    >>> h.shape, c.shape
    ((20,), (20,))
    """

    _cell = LSTM_CELL
    input_size: int
    hidden_size: int
    bias: bool | int = True


@docs.cell("GRU")
class GRUCell(_OneStep[jax.Array]):
    """One step of a GRU at a call: torch.nn.GRUCell. Torch's arguments are fields, in torch's order.

    Args:
        input_size: features of the input; 0 is allowed, as in torch.
        bias: whether there are `bias_ih` and `bias_hh`.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is negative.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> cell = jaxrnn.linen.GRUCell(10, 20, bias=False)
    >>> list(cell.init(jax.random.key(0), jnp.ones((3, 10)))["params"])
    ['weight_ih', 'weight_hh']
    """

    _cell = GRU_CELL
    input_size: int
    hidden_size: int
    bias: bool | int = True


class FlaxCell(linen.RNNCellBase):
    """A cell in Flax's convention, for `flax.linen.RNN` and `flax.linen.Bidirectional`: as `jaxrnn.FlaxCell`.

    Args:
        cell: a `jaxrnn.linen.RNNCell`, `LSTMCell` or `GRUCell`, whose parameters are under `cell`.

    Raises:
        TypeError: cell is none of these.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> from flax import linen
    >>> rnn = linen.RNN(jaxrnn.linen.FlaxCell(jaxrnn.linen.LSTMCell(10, 20)), return_carry=True)
    >>> ((c, h), output), variables = rnn.init_with_output(jax.random.key(0), jnp.ones((3, 7, 10)))
    >>> output.shape, c.shape
    ((3, 7, 20), (3, 20))
    """

    cell: _OneStep[Any]

    def __post_init__(self) -> None:
        flax_cell.check(self.cell, _OneStep)
        super().__post_init__()

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
        """Make one step.

        Args:
            carry: as `initialize_carry` makes it: h, for an LSTM (c, h).
            inputs: (..., input_size), with any number of batch axes.

        Returns:
            The next carry, in the dtype of carry, and h.
        """
        return flax_cell.step(self.cell, carry, inputs)

    @linen.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Any:
        """The carry of zeros for inputs of `input_shape`; `rng` is not used."""
        return flax_cell.initialize_carry(self.cell, input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1
