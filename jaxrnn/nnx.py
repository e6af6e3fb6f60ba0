"""RNN, LSTM, GRU, their cells, and Recurrent as flax.nnx modules with torch's arguments and parameters.

What a module computes is in `jaxrnn.calls`; a module adds the parameters and the randomness.
"""

import dataclasses
import functools
import inspect
from typing import Any, ClassVar, Generic, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from jaxrnn import _compat, engines, flax_cell, flax_sharding
from jaxrnn.calls import HX, Output, Pair, State, StateT, call, call_cell
from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, Cell, rnn_cell
from jaxrnn.options import CellKeywords, Keywords, Options, floating_dtype, spelled_out
from jaxrnn.packed import PackedSequence
from jaxrnn.spec import CellSpec, Spec

Randomness = nnx.Rngs | nnx.RngStream | jax.Array


def _key(rngs: Randomness | None, stream: str) -> jax.Array:
    if isinstance(rngs, nnx.Rngs):
        rngs = rngs[stream]
    if isinstance(rngs, nnx.RngStream):
        return rngs()
    if isinstance(rngs, jax.Array):
        return rngs
    raise TypeError(f"rngs should be nnx.Rngs, an nnx.RngStream or a jax key, got {type(rngs).__name__}")


def _setting(name: str) -> property:
    return property(lambda self: getattr(self.spec, name))


_NONLINEARITY = property(lambda self: "relu" if self.spec.cell == RNN_RELU else "tanh")


def _option(name: str) -> property:
    """An option as an attribute that can be set, as in Flax's modules."""

    def change(self: Any, value: Any) -> None:
        self.options = dataclasses.replace(self.options, **{name: value})

    return property(lambda self: getattr(self.options, name), change)


class _Module(nnx.Module):
    """What layers and cells share: the settings, and an nnx.Param under torch's name for each parameter."""

    _Keywords: ClassVar[type]
    __signature__: ClassVar[inspect.Signature]
    input_size = _setting("input_size")
    hidden_size = _setting("hidden_size")
    bias = _setting("bias")
    dtype = _option("dtype")
    precision = _option("precision")

    def __init__(
        self,
        spec: Spec | CellSpec,
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

    def initial_state(self, batch: int | None = None, dtype: DTypeLike | None = None) -> State:
        """The state of zeros that a call without hx starts from. Use it as the first carry of a scan.

        Args:
            batch: how many rows; None for unbatched input.
            dtype: the state's floating dtype, which calls keep; by default the module's dtype, or its parameters'.

        Returns:
            A value for hx.
        """
        return self.spec.initial_state(batch, dtype or self.dtype or self.param_dtype)

    def __repr__(self) -> str:
        """Like torch's repr: the sizes, then the settings that are not the defaults."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        if self.spec.cell == RNN_RELU:
            parts.append("nonlinearity='relu'")
        for field in dataclasses.fields(self.spec):
            value = getattr(self.spec, field.name)
            if field.default is not dataclasses.MISSING and value != field.default:
                parts.append(f"{field.name}={value}")
        return f"{type(self).__name__}({', '.join(parts)})"


class _Layers(_Module, Generic[StateT]):
    """What RNN, LSTM, GRU and Recurrent share: the call, and dropout as in nnx.Dropout."""

    spec: Spec
    _Keywords = Keywords
    num_layers = _setting("num_layers")
    batch_first = _setting("batch_first")
    dropout = _setting("dropout")
    bidirectional = _setting("bidirectional")
    proj_size = _setting("proj_size")
    remat = _option("remat")
    hidden_axis = _option("hidden_axis")
    unroll = _option("unroll")
    engine = _option("engine")

    def __init__(
        self,
        spec: Spec,
        options: Keywords,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        flax_sharding.check(spec, options.get("hidden_axis"))
        super().__init__(spec, options, param_dtype, rngs)
        self.deterministic = False
        # Only where it is used: a stream adds leaves without a gradient.
        self.rngs = rngs["dropout"].fork() if self._drops() else nnx.data(None)

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

    def __call__(
        self,
        x: ArrayLike | PackedSequence,
        hx: HX = None,
        *,
        lengths: ArrayLike | None = None,
        reset: ArrayLike | None = None,
        reset_state: HX = None,
        deterministic: bool | None = None,
        rngs: Randomness | None = None,
    ) -> tuple[Output, StateT]:
        """Run over a sequence.

        Args:
            x: the input, (time, batch, input_size), or (batch, time, input_size) with `batch_first`, or unbatched
                (time, input_size); floating. Or a PackedSequence of such steps.
            hx: the initial state h_0, for an LSTM (h_0, c_0), of the shapes that are returned; zeros if None. A state
                that all rows share, such as a learned one, may have a batch of 1, or none.
            lengths: how many steps each row has, integers from 0 to time, (batch,), or for unbatched x (); all steps if
                None. Padding in x affects no result and no gradient. Under jit lengths are data, and cannot be
                checked: a length below 0 counts as 0, and one above time as time.
            reset: True at the steps before which the state is reset, such as the first of an episode; boolean, of the
                shape of x, or its data, without features. Not for a bidirectional module.
            reset_state: the state that `reset` starts from, like hx; zeros if None.
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


class RNN(_Layers[jax.Array]):
    r"""A stack of Elman RNN layers: torch.nn.RNN.

    Each layer computes, for each step t of its input x,

        h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    or relu in place of tanh.

    Args:
        input_size: features of the input at each step.
        hidden_size: features of the hidden state.
        num_layers: how many layers are stacked.
        nonlinearity: "tanh" or "relu".
        bias: whether there are `bias_ih` and `bias_hh`.
        batch_first: whether batched input and output are (batch, time, features) rather than (time, batch,
            features); touches neither hx nor h_n.
        dropout: the probability with which an output of each layer but the last is zeroed in training.
        bidirectional: whether each layer also runs backward in time.
        proj_size: 0; only an LSTM projects.
        dtype: the floating dtype to compute in, and of the output; by default the promoted dtype of inputs and
            parameters. States have the dtype of hx, if given: a float32 state is returned unrounded.
        param_dtype: the parameters' floating dtype.
        precision: the precision of the products, as for `jax.lax.dot_general`.
        remat: what the forward pass saves for the backward pass. "none": everything. "gates": only the states; gates
            are recomputed. An integer k: the state before every k-th step; the rest is recomputed.
        hidden_axis: mesh axis, or Flax logical axis, over which hidden units are sharded; stored in the parameters'
            metadata. If a mesh is set, parameters are created on it.
        unroll: how many steps the loop makes at a time, as for `jax.lax.scan`; if None, 4 on a GPU and 1 elsewhere.
        engine: what runs the loop over time: "auto"; a name in `jaxrnn.engines.ENGINES`; or a tuple of such names, of
            which the first that can run it does.
        rngs: nnx.Rngs for the initial parameters (uniform within 1/sqrt(hidden_size) of 0, as torch's) and, where it
            is used, for dropout.

    Raises:
        TypeError: a size is not an int, or `bias` or `batch_first` is not a bool.
        ValueError: a size or a probability is out of range, the nonlinearity is unknown, or `proj_size` is not 0.

    The parameters are attributes with torch's names, shapes and order: `weight_ih_l0` (hidden_size, input_size),
    `weight_hh_l0`, `bias_ih_l0`, `bias_hh_l0`, with `_reverse` for the backward direction, and so on for each layer.

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> rnn = jaxrnn.RNN(10, 20, 2, nonlinearity="relu", rngs=nnx.Rngs(0))
    >>> output, h_n = rnn(jnp.ones((5, 3, 10)))
    >>> output.shape, h_n.shape
    ((5, 3, 20), (2, 3, 20))
    """

    nonlinearity = _NONLINEARITY

    @spelled_out
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
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


class LSTM(_Layers[Pair]):
    r"""A stack of long short-term memory layers: torch.nn.LSTM.

    Each layer computes, for each step t of its input x, with gates of `hidden_size` features,

        i = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
        f = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        g = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        o = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(c_t), or W_hr (o * tanh(c_t)) with `proj_size`

    where the rows of `weight_ih`, `weight_hh` and the biases hold i, f, g, o in this order.

    Args:
        proj_size: features of the projected hidden state, less than `hidden_size`; 0 for no projection.

    The other arguments are those of `jaxrnn.RNN`, less nonlinearity. The state is a pair: hx is (h_0, c_0).

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


class GRU(_Layers[jax.Array]):
    r"""A stack of gated recurrent unit layers: torch.nn.GRU.

    Each layer computes, for each step t of its input x,

        r = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z) * n + z * h_{t-1}

    where the rows of `weight_ih`, `weight_hh` and the biases hold r, z, n in this order.

    The arguments are those of `jaxrnn.RNN`, less nonlinearity.

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


class Recurrent(_Layers[Any]):
    r"""A stack of layers of any cell: one of `jaxrnn`'s, such as `jaxrnn.LAYER_NORM_LSTM_CELL`, or one of your own.

    Args:
        cell: the kind of cell, a `jaxrnn.Cell`.

    The other arguments are those of `jaxrnn.RNN`, less nonlinearity. The parameters are named as torch's, and the
    cell's own likewise: its name, then `_l0`, or `_l0_reverse`, and so on. For a cell of several states, hx and h_n
    are tuples.

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
        cell: Cell,
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

    cell = _setting("cell")

    def __repr__(self) -> str:
        return super().__repr__().replace("(", f"({self.cell.name}, ", 1)


class _OneStep(_Module, Generic[StateT]):
    """What RNNCell, LSTMCell and GRUCell share: the call."""

    spec: CellSpec
    _Keywords = CellKeywords
    # What torch's cells have in place of biases that are not there.
    bias_ih: nnx.Param | None = None
    bias_hh: nnx.Param | None = None

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
        return call_cell(self.options, self.spec, self._params(), x, hx)

    __call__.__qualname__ = "cell"  # for Python's own messages, which would name this class

    @property
    def num_feature_axes(self) -> int:
        raise AttributeError(flax_cell.NOT_FLAXS)


class RNNCell(_OneStep[jax.Array]):
    r"""One step of an Elman RNN at a call: torch.nn.RNNCell, `h' = tanh(W_ih x + b_ih + W_hh h + b_hh)` or relu.

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden state.
        bias: whether there are `bias_ih` and `bias_hh`; without, they are None.
        nonlinearity: "tanh" or "relu".
        dtype, param_dtype, precision, rngs: as for `jaxrnn.RNN`.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is negative, or the nonlinearity is unknown.

    The parameters are `weight_ih` (hidden_size, input_size), `weight_hh`, `bias_ih` and `bias_hh`.

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> cell = jaxrnn.RNNCell(10, 20, rngs=nnx.Rngs(0))
    >>> cell(jnp.ones((3, 10))).shape
    (3, 20)
    """

    nonlinearity = _NONLINEARITY

    @spelled_out
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool | int = True,
        nonlinearity: str = "tanh",
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Unpack[CellKeywords],
    ) -> None:
        spec = CellSpec(rnn_cell(nonlinearity), input_size, hidden_size, bias)
        super().__init__(spec, options, param_dtype, rngs)


class LSTMCell(_OneStep[Pair]):
    r"""One step of an LSTM at a call: torch.nn.LSTMCell. Equations as in `jaxrnn.LSTM`, arguments as for `RNNCell`.

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


class GRUCell(_OneStep[jax.Array]):
    r"""One step of a GRU at a call: torch.nn.GRUCell. Equations as in `jaxrnn.GRU`, arguments as for `RNNCell`.

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

    def __init__(self, cell: _OneStep) -> None:
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
