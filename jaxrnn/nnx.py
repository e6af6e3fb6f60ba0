"""RNN, LSTM, GRU, their cells, and Recurrent as flax.nnx modules with torch's arguments and parameters.

What a module computes is in `jaxrnn._core.calls`; a module adds the parameters and the randomness.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Unpack, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from jaxrnn import _compat, engines
from jaxrnn._core import docs, flax_cell, flax_sharding
from jaxrnn._core.calls import HX, Marks, Output, PackedMarks, call, call_cell
from jaxrnn._core.options import CellKeywords, Engine, Keywords, MeshAxis, Options, Remat, floating_dtype, spelled_out
from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, Cell, Nonlinearity, Pair, StateT, rnn_cell
from jaxrnn.packed import Lengths, PackedSequence
from jaxrnn.spec import CellSpec, Spec, shown

if TYPE_CHECKING:
    from jaxrnn._core.weights import Weights
else:
    Weights = object

Randomness = nnx.Rngs | nnx.RngStream | jax.Array


def _key(rngs: Randomness | None, stream: str) -> jax.Array:
    if isinstance(rngs, nnx.Rngs):
        rngs = rngs[stream]
    if isinstance(rngs, nnx.RngStream):
        return rngs()
    if isinstance(rngs, jax.Array):
        return rngs
    raise TypeError(f"rngs should be nnx.Rngs, an nnx.RngStream or a jax key, got {type(rngs).__name__}")


def _option(name: str) -> Any:
    """An option as an attribute that can be set, as in Flax's modules."""

    def change(self: Any, value: Any) -> None:
        self.options = dataclasses.replace(self.options, **{name: value})

    return property(lambda self: getattr(self.options, name), change)


class _Module(nnx.Module, Generic[StateT]):
    """What layers and cells share: the settings, and an nnx.Param under torch's name for each parameter."""

    _Keywords: ClassVar[type]
    __signature__: ClassVar[inspect.Signature]
    spec: Spec[StateT] | CellSpec[StateT]
    options: Options
    param_dtype: DTypeLike
    dtype: DTypeLike | None = _option("dtype")
    precision: jax.lax.PrecisionLike = _option("precision")

    def __init__(
        self,
        spec: Spec[StateT] | CellSpec[StateT],
        options: Keywords | CellKeywords,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.spec = spec
        self.options = Options.of(type(self).__name__, options, self._Keywords)
        engines.asked(self.options)
        floating_dtype("param_dtype", param_dtype)
        self.param_dtype = param_dtype
        self._add_params(spec.init(rngs.params(), param_dtype))

    @property
    def input_size(self) -> int:
        return self.spec.input_size

    @property
    def hidden_size(self) -> int:
        return self.spec.hidden_size

    @property
    def bias(self) -> bool:
        return bool(self.spec.bias)

    if TYPE_CHECKING:  # Flax's have no annotations

        def train(self, **attributes: Any) -> None: ...
        def eval(self, **attributes: Any) -> None: ...

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        # For help(), which Flax's metaclass would give (*args, **kwargs).
        _, *parameters = inspect.signature(cls.__init__).parameters.values()
        cls.__signature__ = inspect.Signature(parameters)

    def _add_params(self, values: dict[str, jax.Array]) -> None:
        for name, value in values.items():
            setattr(self, name, nnx.Param(value))

    def _params(self) -> dict[str, jax.Array]:
        return {name: getattr(self, name)[...] for name in self.spec.shapes()}

    def initial_state(self, batch: int | None = None, dtype: DTypeLike | None = None) -> StateT:
        """The state of zeros that a call without hx starts from. Use it as the first carry of a scan.

        Args:
            batch: how many rows; None for unbatched input.
            dtype: the state's floating dtype, which calls keep; by default the module's dtype, or its parameters'.

        Returns:
            A value for hx.
        """
        return self.spec.initial_state(batch, dtype or self.dtype or self.param_dtype)

    def __repr__(self) -> str:
        parts = shown(self.spec)
        if self.spec.cell == RNN_RELU:
            parts.insert(2, "nonlinearity='relu'")
        return f"{type(self).__name__}({', '.join(parts)})"


class _PackedCall(PackedMarks, total=False):
    """The keywords of a layer's call, for type checkers."""

    deterministic: bool | None
    rngs: Randomness | None


class _Call(_PackedCall, Marks, total=False):
    """The same for rows that are not packed."""


class _Layers(_Module[StateT], Weights):
    """What RNN, LSTM, GRU and Recurrent share: the call, and dropout as in nnx.Dropout."""

    spec: Spec[StateT]
    _Keywords = Keywords
    deterministic: bool
    rngs: nnx.RngStream | None
    remat: Remat = _option("remat")
    hidden_axis: MeshAxis | None = _option("hidden_axis")
    unroll: int | None = _option("unroll")
    engine: Engine = _option("engine")

    def __init__(
        self,
        spec: Spec[StateT],
        options: Keywords,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        flax_sharding.check(spec, options.get("hidden_axis"))
        super().__init__(spec, options, param_dtype, rngs)
        self.deterministic = False
        # Only where it is used: a stream adds leaves without a gradient.
        self.rngs = rngs["dropout"].fork() if self._drops() else nnx.data(None)

    @property
    def num_layers(self) -> int:
        return self.spec.num_layers

    @property
    def batch_first(self) -> bool:
        return self.spec.batch_first

    @property
    def dropout(self) -> float:
        return self.spec.dropout

    @property
    def bidirectional(self) -> bool:
        return self.spec.bidirectional

    @property
    def proj_size(self) -> int:
        return self.spec.proj_size

    def _add_params(self, values: dict[str, jax.Array]) -> None:
        if self.hidden_axis is None:
            return super()._add_params(values)
        for name, axes in flax_sharding.names(self.spec, self.hidden_axis).items():
            value = values[name]
            if _compat.sharded_at_creation():
                value = flax_sharding.shard(value, axes)
            setattr(self, name, _compat.annotated_param(value, axes))

    def _drops(self) -> bool:
        return self.dropout > 0 and self.num_layers > 1

    @overload
    def __call__(self, x: ArrayLike, hx: HX = None, **keywords: Unpack[_Call]) -> tuple[jax.Array, StateT]: ...
    @overload
    def __call__(
        self, x: PackedSequence, hx: HX = None, **keywords: Unpack[_PackedCall]
    ) -> tuple[PackedSequence, StateT]: ...
    @docs.described
    def __call__(
        self,
        x: ArrayLike | PackedSequence,
        hx: HX = None,
        *,
        lengths: Lengths | None = None,
        reset: ArrayLike | None = None,
        reset_state: HX = None,
        deterministic: bool | None = None,
        rngs: Randomness | None = None,
    ) -> tuple[Output, StateT]:
        """Run over a sequence.

        Args:
            deterministic: whether dropout is off; the module's `deterministic` if None, which `train()` sets to
                False and `eval()` to True.
            rngs: nnx.Rngs, an nnx.RngStream or a jax key for dropout, in place of the module's own.

        Returns:
            `(output, h_n)`, for an LSTM `(output, (h_n, c_n))`. output: the last layer's outputs at every step, laid
            out like x, with directions * (proj_size or hidden_size) features, 0 past a row's end. h_n and c_n: the
            states after each row's last step, (num_layers * directions, batch, features), without batch for unbatched
            x, in the dtype of hx, if given. The backward direction starts at each row's last step. A row of length 0
            keeps its hx. For a PackedSequence, output is one, and rows of hx and states are in their original order.

        Raises:
            TypeError: x, hx or reset_state is not floating; hx or reset_state is not one array, or for an LSTM not
                two; lengths are not integers; or reset is not boolean.
            ValueError: x is neither 2-D nor 3-D, a length is out of range, lengths are given with a PackedSequence, or
                reset to a bidirectional module.
            RuntimeError: the size of x, hx, lengths, reset or reset_state does not fit, or the sequence is empty.
        """
        flax_cell.refuse_state_of_sequential(self, hx)
        key = None
        deterministic = self.deterministic if deterministic is None else deterministic
        if self._drops() and not deterministic:
            key = _key(self.rngs if rngs is None else rngs, "dropout")
        return call(
            flax_sharding.on_the_mesh(self.options),
            self.spec,
            self._params(),
            x,
            hx,
            lengths=lengths,
            reset=reset,
            reset_state=reset_state,
            dropout_key=key,
        )

    __call__.__qualname__ = "module"  # for Python's own messages, which would name this class

    def set_view(self, deterministic: bool | None = None) -> None:
        """`nnx.view` calls this: it sets `deterministic` unless that is None."""
        if deterministic is not None:
            self.deterministic = deterministic


@docs.layer("RNN")
class RNN(_Layers[jax.Array]):
    """A stack of Elman RNN layers: torch.nn.RNN.

    Raises:
        TypeError: a size is not an int, or `bias` or `batch_first` is not a bool.
        ValueError: a size or a probability is out of range, the nonlinearity is unknown, or `proj_size` is not 0.

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> rnn = jaxrnn.RNN(10, 20, 2, nonlinearity="relu", rngs=nnx.Rngs(0))
    >>> output, h_n = rnn(jnp.ones((5, 3, 10)))
    >>> output.shape, h_n.shape
    ((5, 3, 20), (2, 3, 20))
    """

    @property
    def nonlinearity(self) -> Nonlinearity:
        return "relu" if self.spec.cell == RNN_RELU else "tanh"

    @spelled_out
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Nonlinearity = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        proj_size: int = 0,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Unpack[Keywords],
    ) -> None:
        cell = rnn_cell(nonlinearity)
        spec = Spec(cell, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__(spec, options, param_dtype, rngs)


@docs.layer("LSTM")
class LSTM(_Layers[Pair]):
    """A stack of long short-term memory layers: torch.nn.LSTM.

    Raises:
        TypeError: a size is not an int, or `bias` or `batch_first` is not a bool.
        ValueError: a size or a probability is out of range.

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> lstm = jaxrnn.LSTM(10, 20, bidirectional=True, proj_size=5, rngs=nnx.Rngs(0))
    >>> output, (h_n, c_n) = lstm(jnp.ones((7, 3, 10)))
    >>> output.shape, h_n.shape, c_n.shape
    ((7, 3, 10), (2, 3, 5), (2, 3, 20))
    """

    @spelled_out
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Unpack[Keywords],
    ) -> None:
        spec = Spec(
            LSTM_CELL, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
        )
        super().__init__(spec, options, param_dtype, rngs)


@docs.layer("GRU")
class GRU(_Layers[jax.Array]):
    """A stack of gated recurrent unit layers: torch.nn.GRU.

    Raises:
        TypeError: a size is not an int, or `bias` or `batch_first` is not a bool.
        ValueError: a size or a probability is out of range, or `proj_size` is not 0.

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> gru = jaxrnn.GRU(10, 20, batch_first=True, rngs=nnx.Rngs(0))
    >>> output, h_n = gru(jnp.ones((3, 7, 10)), hx=jnp.zeros((1, 3, 20)))
    >>> output.shape, h_n.shape
    ((3, 7, 20), (1, 3, 20))
    """

    @spelled_out
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        proj_size: int = 0,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Unpack[Keywords],
    ) -> None:
        spec = Spec(GRU_CELL, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__(spec, options, param_dtype, rngs)


@docs.layer()
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

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> lstm = jaxrnn.Recurrent(jaxrnn.PEEPHOLE_LSTM_CELL, 10, 20, bidirectional=True, rngs=nnx.Rngs(0))
    >>> output, (h_n, c_n) = lstm(jnp.ones((5, 3, 10)))
    >>> output.shape, c_n.shape, lstm.weight_ci_l0_reverse.shape
    ((5, 3, 40), (2, 3, 20), (20,))
    """

    @spelled_out
    def __init__(
        self,
        cell: Cell[StateT],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Unpack[Keywords],
    ) -> None:
        spec = Spec(cell, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__(spec, options, param_dtype, rngs)

    if TYPE_CHECKING:  # the cell's own parameters, of which only the cell knows the names

        def __getattr__(self, name: str) -> nnx.Param[jax.Array]: ...

    @property
    def cell(self) -> Cell[StateT]:
        return self.spec.cell

    def __repr__(self) -> str:
        return super().__repr__().replace("(", f"({self.cell.name}, ", 1)


class _OneStep(_Module[StateT]):
    """What RNNCell, LSTMCell and GRUCell share: the call."""

    spec: CellSpec[StateT]
    _Keywords = CellKeywords
    weight_ih: nnx.Param[jax.Array]
    weight_hh: nnx.Param[jax.Array]
    # What torch's cells have in place of biases that are not there.
    bias_ih: nnx.Param[jax.Array] | None = None
    bias_hh: nnx.Param[jax.Array] | None = None

    def __call__(self, x: ArrayLike, hx: HX = None) -> StateT:
        """Make one step.

        Args:
            x: the input, (batch, input_size) or unbatched (input_size,); floating.
            hx: the state h, for an LSTMCell (h, c), each (batch, hidden_size), or (hidden_size,) for unbatched x or
                for all rows; zeros if None.

        Returns:
            The next state, of the shape of x's rows, in hx's dtype if that is given.

        Raises:
            TypeError: x or hx is not floating, or hx is not one array, or for an LSTMCell not two.
            ValueError: x or hx is neither 1-D nor 2-D.
            RuntimeError: the size of x or hx does not fit.
        """
        flax_cell.refuse_state_of_sequential(self, hx)
        return call_cell(self.options, self.spec, self._params(), x, hx)

    __call__.__qualname__ = "cell"  # for Python's own messages, which would name this class

    @property
    def num_feature_axes(self) -> int:
        raise AttributeError(flax_cell.NOT_FLAXS)


@docs.cell("RNN")
class RNNCell(_OneStep[jax.Array]):
    """One step of an Elman RNN at a call: torch.nn.RNNCell.

    Args:
        input_size: features of the input; 0 is allowed, as in torch.
        bias: whether there are `bias_ih` and `bias_hh`; without, they are None.
        rngs: nnx.Rngs for the initial parameters, uniform within 1/sqrt(hidden_size) of 0, as torch's.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is negative, or the nonlinearity is unknown.

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> cell = jaxrnn.RNNCell(10, 20, rngs=nnx.Rngs(0))
    >>> cell(jnp.ones((3, 10))).shape
    (3, 20)
    """

    @property
    def nonlinearity(self) -> Nonlinearity:
        return "relu" if self.spec.cell == RNN_RELU else "tanh"

    @spelled_out
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool | int = True,
        nonlinearity: Nonlinearity = "tanh",
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Unpack[CellKeywords],
    ) -> None:
        spec = CellSpec(rnn_cell(nonlinearity), input_size, hidden_size, bias)
        super().__init__(spec, options, param_dtype, rngs)


@docs.cell("LSTM")
class LSTMCell(_OneStep[Pair]):
    """One step of an LSTM at a call: torch.nn.LSTMCell.

    Args:
        input_size: features of the input; 0 is allowed, as in torch.
        bias: whether there are `bias_ih` and `bias_hh`; without, they are None.
        rngs: nnx.Rngs for the initial parameters, uniform within 1/sqrt(hidden_size) of 0, as torch's.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is negative.

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> cell = jaxrnn.LSTMCell(10, 20, rngs=nnx.Rngs(0))
    >>> h, c = cell(jnp.ones((3, 10)))
    >>> h, c = cell(jnp.ones((3, 10)), (h, c))
    >>> h.shape, c.shape
    ((3, 20), (3, 20))
    """

    @spelled_out
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool | int = True,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Unpack[CellKeywords],
    ) -> None:
        super().__init__(CellSpec(LSTM_CELL, input_size, hidden_size, bias), options, param_dtype, rngs)


@docs.cell("GRU")
class GRUCell(_OneStep[jax.Array]):
    """One step of a GRU at a call: torch.nn.GRUCell.

    Args:
        input_size: features of the input; 0 is allowed, as in torch.
        bias: whether there are `bias_ih` and `bias_hh`; without, they are None.
        rngs: nnx.Rngs for the initial parameters, uniform within 1/sqrt(hidden_size) of 0, as torch's.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is negative.

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> cell = jaxrnn.GRUCell(10, 20, rngs=nnx.Rngs(0))
    >>> cell(jnp.ones(10), jnp.zeros(20)).shape
    (20,)
    """

    @spelled_out
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool | int = True,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Unpack[CellKeywords],
    ) -> None:
        super().__init__(CellSpec(GRU_CELL, input_size, hidden_size, bias), options, param_dtype, rngs)


class FlaxCell(nnx.RNNCellBase):
    """A cell in Flax's convention, for `flax.nnx.RNN` and `flax.nnx.Bidirectional`.

    There the carry comes first and is returned first, an LSTM's is (c, h), and there may be any number of batch axes.
    Flax's wrappers run a step at a time; `jaxrnn.LSTM` and its like are faster, and right for length 0.

    Args:
        cell: a `jaxrnn.RNNCell`, `LSTMCell` or `GRUCell`, whose parameters are under `cell`.

    Raises:
        TypeError: cell is none of these.

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> rnn = nnx.RNN(jaxrnn.FlaxCell(jaxrnn.LSTMCell(10, 20, rngs=nnx.Rngs(0))), return_carry=True)
    >>> (c, h), output = rnn(jnp.ones((3, 7, 10)))
    >>> output.shape, c.shape
    ((3, 7, 20), (3, 20))
    """

    def __init__(self, cell: _OneStep[Any]) -> None:
        flax_cell.check(cell, _OneStep)
        self.cell = cell

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
        """Make one step.

        Args:
            carry: as `initialize_carry` makes it: h, for an LSTM (c, h).
            inputs: (..., input_size), with any number of batch axes.

        Returns:
            The next carry, in the dtype of carry, and h.
        """
        return flax_cell.step(self.cell, carry, inputs)

    def initialize_carry(self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None) -> Any:
        """The first carry.

        Args:
            input_shape: (..., input_size), with any number of batch axes.
            rngs: nnx.Rngs, an nnx.RngStream or a jax key, for `carry_init` only.
            carry_init: `carry_init(key, shape, dtype)` makes each array of the carry; zeros if None.

        Returns:
            h, for an LSTM (c, h), each (..., hidden_size), in the dtype of the cell or else of its parameters.
        """
        if carry_init is None:
            return flax_cell.initialize_carry(self.cell, input_shape)
        keys = (lambda: None) if rngs is None else functools.partial(_key, rngs, "carry")
        return flax_cell.initialize_carry(self.cell, input_shape, lambda shape, dtype: carry_init(keys(), shape, dtype))

    @property
    def num_feature_axes(self) -> int:
        return 1
