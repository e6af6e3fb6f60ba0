"""RNN, LSTM, GRU, their cells, and Recurrent as flax.linen modules with torch's arguments and parameters.

These are the modules of `jaxrnn.nnx` for Flax's other API: `jaxrnn.calls` computes, and a module adds parameters and
randomness. `params` has the keys of torch's `state_dict()`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic

import jax
import jax.numpy as jnp
from flax import linen
from jax.typing import ArrayLike, DTypeLike

from jaxrnn import engines, flax_cell, flax_sharding
from jaxrnn.calls import HX, Output, Pair, State, StateT, call, call_cell
from jaxrnn.cells import GRU_CELL, LSTM_CELL, Cell, rnn_cell
from jaxrnn.options import CellKeywords, Engine, Keywords, MeshAxis, Options, Remat, floating_dtype
from jaxrnn.packed import PackedSequence
from jaxrnn.spec import CellSpec, Spec


class _Module(linen.Module):
    """What layers and cells share: the settings, checked at construction, and the parameters under torch's names."""

    _: dataclasses.KW_ONLY  # so that the fields of the classes below come first, in torch's order
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None

    def __post_init__(self) -> None:
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self._Spec) if f.name != "cell"}
        self.spec = self._Spec(self._cell, **settings)
        self.options = Options(**{name: getattr(self, name) for name in self._Keywords.__annotations__})
        engines.asked(self.options)
        floating_dtype("param_dtype", self.param_dtype)
        super().__post_init__()

    def _initializers(self) -> dict[str, Callable[..., Any]]:
        return self.spec.initializers()

    def _params(self) -> dict[str, jax.Array]:
        shapes, draws = self.spec.shapes(), self._initializers()
        return {name: self.param(name, draws[name], shape, self.param_dtype) for name, shape in shapes.items()}

    @linen.nowrap
    def initial_state(self, batch: int | None = None, dtype: DTypeLike | None = None) -> State:
        """The state of zeros that a call without hx starts from; as for `jaxrnn.RNN`."""
        return self.spec.initial_state(batch, dtype or self.dtype or self.param_dtype)


class _Layers(_Module, Generic[StateT]):
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

    def _initializers(self) -> dict[str, Callable[..., Any]]:
        draws = self.spec.initializers()
        if self.hidden_axis is None:
            return draws
        names = flax_sharding.names(self.spec, flax_sharding.mesh_axis(self.hidden_axis))
        return {name: linen.with_partitioning(draw, names[name]) for name, draw in draws.items()}

    @linen.compact
    def __call__(
        self,
        x: ArrayLike | PackedSequence,
        hx: HX = None,
        *,
        lengths: ArrayLike | None = None,
        reset: ArrayLike | None = None,
        reset_state: HX = None,
        deterministic: bool | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[Output, StateT]:
        """Run over a sequence: as the modules of `jaxrnn`, except for dropout.

        Args:
            x, hx, lengths, reset, reset_state: as for `jaxrnn.apply`.
            deterministic: whether dropout is off. With dropout, give it either here or as a field.
            rng: a jax key for dropout, in place of the one that `apply` was given for `rng_collection`.

        Returns:
            `(output, h_n)`, for an LSTM `(output, (h_n, c_n))`: as `jaxrnn.apply`.

        Raises:
            As `jaxrnn.apply`; and ValueError if `deterministic` is given twice, or needed and not given.
        """
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


class RNN(_Layers[jax.Array]):
    """A stack of Elman RNN layers: torch.nn.RNN. Equations and arguments as in `jaxrnn.RNN`.

    Torch's arguments are fields in torch's order. The other fields are keyword-only: dtype, param_dtype, precision,
    remat, hidden_axis, unroll and engine as in `jaxrnn.RNN` (with hidden_axis the parameters are `linen.Partitioned`,
    as `linen.with_partitioning` makes them), deterministic and rng_collection as in `flax.linen.Dropout`, and Linen's
    name.

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
    nonlinearity: str = "tanh"
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    _: dataclasses.KW_ONLY
    proj_size: int = 0

    @property
    def _cell(self) -> Cell:
        return rnn_cell(self.nonlinearity)


class LSTM(_Layers[Pair]):
    """A stack of long short-term memory layers: torch.nn.LSTM. Equations and arguments as in `jaxrnn.LSTM`.

    The other fields are those of `jaxrnn.linen.RNN`.

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


class GRU(_Layers[jax.Array]):
    """A stack of gated recurrent unit layers: torch.nn.GRU. Equations and arguments as in `jaxrnn.GRU`.

    The other fields are those of `jaxrnn.linen.RNN`.

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


class Recurrent(_Layers[Any]):
    """A stack of layers of any cell, `jaxrnn`'s or your own. Arguments and parameters as in `jaxrnn.Recurrent`.

    The other fields are those of `jaxrnn.linen.RNN`.

    Raises:
        TypeError: cell is not a `jaxrnn.Cell`, a size is not an int, or `bias` or `batch_first` is not a bool.
        ValueError: a size or a probability is out of range, or the cell does not support `proj_size`.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> rnn = jaxrnn.linen.Recurrent(jaxrnn.IND_RNN_CELL, 10, 20)
    >>> (output, h_n), variables = rnn.init_with_output(jax.random.key(0), jnp.ones((5, 3, 10)))
    >>> output.shape, list(variables["params"])
    ((5, 3, 20), ['weight_ih_l0', 'bias_ih_l0', 'weight_u_l0'])
    """

    cell: Cell
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


class _OneStep(_Module, Generic[StateT]):
    """What RNNCell, LSTMCell and GRUCell share: the call."""

    _Spec, _Keywords = CellSpec, CellKeywords

    @linen.compact
    def __call__(self, x: ArrayLike, hx: HX = None) -> StateT:
        """Make one step. Arguments, result and errors are those of `jaxrnn.apply_cell`."""
        return call_cell(self.options, self.spec, self._params(), x, hx)

    __call__.__qualname__ = "cell"  # for Python's own messages, which would name this class

    @property
    def num_feature_axes(self) -> int:
        raise TypeError(flax_cell.NOT_FLAXS)  # Linen would hide the words of an AttributeError


class RNNCell(_OneStep[jax.Array]):
    """One step of an Elman RNN at a call: torch.nn.RNNCell. Equations and arguments as in `jaxrnn.RNNCell`.

    The keyword-only arguments dtype, param_dtype and precision are those of `jaxrnn.RNN`.

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
    nonlinearity: str = "tanh"

    @property
    def _cell(self) -> Cell:
        return rnn_cell(self.nonlinearity)


class LSTMCell(_OneStep[Pair]):
    """One step of an LSTM at a call: torch.nn.LSTMCell. Equations as in `jaxrnn.LSTM`, arguments as for `RNNCell`.

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


class GRUCell(_OneStep[jax.Array]):
    """One step of a GRU at a call: torch.nn.GRUCell. Equations as in `jaxrnn.GRU`, arguments as for `RNNCell`.

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

    cell: _OneStep

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
