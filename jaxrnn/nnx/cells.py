"""RNNCell, LSTMCell and GRUCell for flax.nnx, and FlaxCell, which makes a cell of Flax's of one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxrnn._core import flax_cell
from jaxrnn._core.options import Options
from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, Nonlinearity, Pair, torch_rnn_cell
from jaxrnn.initializers import GateInitializer
from jaxrnn.nnx.base import OneStep, drawn_key
from jaxrnn.spec import CellSpec
from jaxrnn.torch_random import TorchGenerator


class RNNCell(OneStep[jax.Array]):
    """One step of an Elman RNN at a call: torch.nn.RNNCell.

    A call computes, from the input x_t and the state h_{t-1},

        h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    or relu in place of tanh.

    Args:
        input_size: features of the input; 0 is allowed, as in torch.
        hidden_size: features of the hidden state.
        bias: whether there are `bias_ih` and `bias_hh`; without, they are None.
        nonlinearity: "tanh" or "relu".
        param_dtype: the parameters' floating dtype.
        kernel_init: what draws `weight_ih` gate by gate, and `weight_hr` if there is one: a function
            init(key, shape, dtype), such as those of `jax.nn.initializers`, which gets the shape
            (features, hidden_size); or a dict from some gates to such functions. None: as torch,
            uniform within 1/sqrt(hidden_size) of 0. For Flax's own, give `**jaxrnn.initializers.FLAX`.
        recurrent_kernel_init: the same for `weight_hh`.
        bias_init: the same for `bias_ih`, with the shape (hidden_size,). It makes `bias_hh` 0, because
            the two add up. In GRU's n, where they do not, it draws both.
        rngs: nnx.Rngs for the initial parameters, or a jaxrnn.TorchGenerator to draw them as torch
            does.
        dtype: the floating dtype to compute in, and of the output; by default the promoted dtype of
            inputs and parameters. States have the dtype of hx, if given: a float32 state is returned
            unrounded.
        precision: the precision of the products, as for `jax.lax.dot_general`.

    Call:
        `h = module(x, hx=None, *, reset=None, reset_state=None)`

        x                      each state
        (batch, input_size)    (batch, hidden_size)
        (input_size,)          (hidden_size,)

        hx: the state, h; zeros if None. One state for all rows may have a batch of 1, or none.
        reset: True for the rows whose state is reset before the step; boolean, (batch,), or ().
        reset_state: the state that `reset` starts from, like hx; zeros if None.

    Parameters, with torch's names, shapes and order:
        weight_ih           (hidden_size, input_size)
        weight_hh           (hidden_size, hidden_size)
        bias_ih, bias_hh    (hidden_size,)

    Differs from torch.nn.RNNCell:
        `dtype` is, as in Flax, the dtype to compute in; torch's `dtype` is `param_dtype`. There is no
        `device`.
        Inputs and parameters of different dtypes are promoted, where torch raises.
        `reset=` and `reset_state=` are new.

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

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool | int = True,
        nonlinearity: Nonlinearity = "tanh",
        *,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: GateInitializer | None = None,
        recurrent_kernel_init: GateInitializer | None = None,
        bias_init: GateInitializer | None = None,
        rngs: nnx.Rngs | TorchGenerator,
        dtype: DTypeLike | None = None,
        precision: jax.lax.PrecisionLike = None,
    ) -> None:
        spec = CellSpec(torch_rnn_cell(nonlinearity), input_size, hidden_size, bias)
        options = Options(dtype, precision)
        super().__init__(spec, options, param_dtype, rngs, kernel_init, recurrent_kernel_init, bias_init)


class LSTMCell(OneStep[Pair]):
    """One step of an LSTM at a call: torch.nn.LSTMCell.

    A call computes, from the input x_t and the state h_{t-1},

        i = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
        f = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        g = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        o = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(c_t)

    The rows of the weights and biases hold i, f, g, o in this order.

    Args:
        input_size: features of the input; 0 is allowed, as in torch.
        hidden_size: features of the hidden state.
        bias: whether there are `bias_ih` and `bias_hh`; without, they are None.
        param_dtype: the parameters' floating dtype.
        kernel_init: what draws `weight_ih` gate by gate, and `weight_hr` if there is one: a function
            init(key, shape, dtype), such as those of `jax.nn.initializers`, which gets the shape
            (features, hidden_size); or a dict from some gates to such functions. None: as torch,
            uniform within 1/sqrt(hidden_size) of 0. For Flax's own, give `**jaxrnn.initializers.FLAX`.
        recurrent_kernel_init: the same for `weight_hh`.
        bias_init: the same for `bias_ih`, with the shape (hidden_size,). It makes `bias_hh` 0, because
            the two add up. In GRU's n, where they do not, it draws both.
        rngs: nnx.Rngs for the initial parameters, or a jaxrnn.TorchGenerator to draw them as torch
            does.
        dtype: the floating dtype to compute in, and of the output; by default the promoted dtype of
            inputs and parameters. States have the dtype of hx, if given: a float32 state is returned
            unrounded.
        precision: the precision of the products, as for `jax.lax.dot_general`.

    Call:
        `(h, c) = module(x, hx=None, *, reset=None, reset_state=None)`

        x                      each state
        (batch, input_size)    (batch, hidden_size)
        (input_size,)          (hidden_size,)

        hx: the state, (h, c); zeros if None. One state for all rows may have a batch of 1, or none.
        reset: True for the rows whose state is reset before the step; boolean, (batch,), or ().
        reset_state: the state that `reset` starts from, like hx; zeros if None.

    Parameters, with torch's names, shapes and order:
        weight_ih           (4 * hidden_size, input_size)
        weight_hh           (4 * hidden_size, hidden_size)
        bias_ih, bias_hh    (4 * hidden_size,)

    Differs from torch.nn.LSTMCell:
        `dtype` is, as in Flax, the dtype to compute in; torch's `dtype` is `param_dtype`. There is no
        `device`.
        Inputs and parameters of different dtypes are promoted, where torch raises.
        `reset=` and `reset_state=` are new.

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

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool | int = True,
        *,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: GateInitializer | None = None,
        recurrent_kernel_init: GateInitializer | None = None,
        bias_init: GateInitializer | None = None,
        rngs: nnx.Rngs | TorchGenerator,
        dtype: DTypeLike | None = None,
        precision: jax.lax.PrecisionLike = None,
    ) -> None:
        spec = CellSpec(LSTM_CELL, input_size, hidden_size, bias)
        options = Options(dtype, precision)
        super().__init__(spec, options, param_dtype, rngs, kernel_init, recurrent_kernel_init, bias_init)


class GRUCell(OneStep[jax.Array]):
    """One step of a GRU at a call: torch.nn.GRUCell.

    A call computes, from the input x_t and the state h_{t-1},

        r = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z) * n + z * h_{t-1}

    The rows of the weights and biases hold r, z, n in this order.

    Args:
        input_size: features of the input; 0 is allowed, as in torch.
        hidden_size: features of the hidden state.
        bias: whether there are `bias_ih` and `bias_hh`; without, they are None.
        param_dtype: the parameters' floating dtype.
        kernel_init: what draws `weight_ih` gate by gate, and `weight_hr` if there is one: a function
            init(key, shape, dtype), such as those of `jax.nn.initializers`, which gets the shape
            (features, hidden_size); or a dict from some gates to such functions. None: as torch,
            uniform within 1/sqrt(hidden_size) of 0. For Flax's own, give `**jaxrnn.initializers.FLAX`.
        recurrent_kernel_init: the same for `weight_hh`.
        bias_init: the same for `bias_ih`, with the shape (hidden_size,). It makes `bias_hh` 0, because
            the two add up. In GRU's n, where they do not, it draws both.
        rngs: nnx.Rngs for the initial parameters, or a jaxrnn.TorchGenerator to draw them as torch
            does.
        dtype: the floating dtype to compute in, and of the output; by default the promoted dtype of
            inputs and parameters. States have the dtype of hx, if given: a float32 state is returned
            unrounded.
        precision: the precision of the products, as for `jax.lax.dot_general`.

    Call:
        `h = module(x, hx=None, *, reset=None, reset_state=None)`

        x                      each state
        (batch, input_size)    (batch, hidden_size)
        (input_size,)          (hidden_size,)

        hx: the state, h; zeros if None. One state for all rows may have a batch of 1, or none.
        reset: True for the rows whose state is reset before the step; boolean, (batch,), or ().
        reset_state: the state that `reset` starts from, like hx; zeros if None.

    Parameters, with torch's names, shapes and order:
        weight_ih           (3 * hidden_size, input_size)
        weight_hh           (3 * hidden_size, hidden_size)
        bias_ih, bias_hh    (3 * hidden_size,)

    Differs from torch.nn.GRUCell:
        `dtype` is, as in Flax, the dtype to compute in; torch's `dtype` is `param_dtype`. There is no
        `device`.
        Inputs and parameters of different dtypes are promoted, where torch raises.
        `reset=` and `reset_state=` are new.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is negative.

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> cell = jaxrnn.GRUCell(10, 20, rngs=nnx.Rngs(0))
    >>> cell(jnp.ones(10), jnp.zeros(20)).shape
    (20,)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool | int = True,
        *,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: GateInitializer | None = None,
        recurrent_kernel_init: GateInitializer | None = None,
        bias_init: GateInitializer | None = None,
        rngs: nnx.Rngs | TorchGenerator,
        dtype: DTypeLike | None = None,
        precision: jax.lax.PrecisionLike = None,
    ) -> None:
        spec = CellSpec(GRU_CELL, input_size, hidden_size, bias)
        options = Options(dtype, precision)
        super().__init__(spec, options, param_dtype, rngs, kernel_init, recurrent_kernel_init, bias_init)


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

    def __init__(self, cell: OneStep[Any]) -> None:
        flax_cell.check(cell, OneStep)
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
        keys = (lambda: None) if rngs is None else functools.partial(drawn_key, rngs, "carry")
        return flax_cell.initialize_carry(self.cell, input_shape, lambda shape, dtype: carry_init(keys(), shape, dtype))

    @property
    def num_feature_axes(self) -> int:
        return 1
