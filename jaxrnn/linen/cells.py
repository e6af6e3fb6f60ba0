"""RNNCell, LSTMCell and GRUCell for flax.linen, and FlaxCell, which makes a cell of Flax's of one."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen

from jaxrnn._core import flax_cell
from jaxrnn.cells import GRU_CELL, LSTM_CELL, Cell, Nonlinearity, Pair, torch_rnn_cell
from jaxrnn.linen.base import OneStep


class RNNCell(OneStep[jax.Array]):
    """One step of an Elman RNN at a call: torch.nn.RNNCell. Torch's arguments are fields, in torch's order.

    A call computes, from the input x_t and the state h_{t-1},

        h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    or relu in place of tanh.

    Args:
        input_size: features of the input; 0 is allowed, as in torch.
        hidden_size: features of the hidden state.
        bias: whether there are `bias_ih` and `bias_hh`.
        nonlinearity: "tanh" or "relu".
        name: the name of the module in its parent, as everywhere in Linen.
        dtype: the floating dtype to compute in, and of the output; by default the promoted dtype of
            inputs and parameters. States have the dtype of hx, if given: a float32 state is returned
            unrounded.
        param_dtype: the parameters' floating dtype.
        kernel_init: what draws `weight_ih` gate by gate, and `weight_hr` if there is one: a function
            init(key, shape, dtype), such as those of `jax.nn.initializers`, which gets the shape
            (features, hidden_size); or a dict from some gates to such functions. None: as torch,
            uniform within 1/sqrt(hidden_size) of 0. For Flax's own, give `**jaxrnn.initializers.FLAX`.
        recurrent_kernel_init: the same for `weight_hh`.
        bias_init: the same for `bias_ih`, with the shape (hidden_size,). It makes `bias_hh` 0, because
            the two add up. In GRU's n, where they do not, it draws both.
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
        return torch_rnn_cell(self.nonlinearity)


class LSTMCell(OneStep[Pair]):
    """One step of an LSTM at a call: torch.nn.LSTMCell. Torch's arguments are fields, in torch's order.

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
        bias: whether there are `bias_ih` and `bias_hh`.
        name: the name of the module in its parent, as everywhere in Linen.
        dtype: the floating dtype to compute in, and of the output; by default the promoted dtype of
            inputs and parameters. States have the dtype of hx, if given: a float32 state is returned
            unrounded.
        param_dtype: the parameters' floating dtype.
        kernel_init: what draws `weight_ih` gate by gate, and `weight_hr` if there is one: a function
            init(key, shape, dtype), such as those of `jax.nn.initializers`, which gets the shape
            (features, hidden_size); or a dict from some gates to such functions. None: as torch,
            uniform within 1/sqrt(hidden_size) of 0. For Flax's own, give `**jaxrnn.initializers.FLAX`.
        recurrent_kernel_init: the same for `weight_hh`.
        bias_init: the same for `bias_ih`, with the shape (hidden_size,). It makes `bias_hh` 0, because
            the two add up. In GRU's n, where they do not, it draws both.
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


class GRUCell(OneStep[jax.Array]):
    """One step of a GRU at a call: torch.nn.GRUCell. Torch's arguments are fields, in torch's order.

    A call computes, from the input x_t and the state h_{t-1},

        r = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z) * n + z * h_{t-1}

    The rows of the weights and biases hold r, z, n in this order.

    Args:
        input_size: features of the input; 0 is allowed, as in torch.
        hidden_size: features of the hidden state.
        bias: whether there are `bias_ih` and `bias_hh`.
        name: the name of the module in its parent, as everywhere in Linen.
        dtype: the floating dtype to compute in, and of the output; by default the promoted dtype of
            inputs and parameters. States have the dtype of hx, if given: a float32 state is returned
            unrounded.
        param_dtype: the parameters' floating dtype.
        kernel_init: what draws `weight_ih` gate by gate, and `weight_hr` if there is one: a function
            init(key, shape, dtype), such as those of `jax.nn.initializers`, which gets the shape
            (features, hidden_size); or a dict from some gates to such functions. None: as torch,
            uniform within 1/sqrt(hidden_size) of 0. For Flax's own, give `**jaxrnn.initializers.FLAX`.
        recurrent_kernel_init: the same for `weight_hh`.
        bias_init: the same for `bias_ih`, with the shape (hidden_size,). It makes `bias_hh` 0, because
            the two add up. In GRU's n, where they do not, it draws both.
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

    cell: OneStep[Any]

    def __post_init__(self) -> None:
        flax_cell.check(self.cell, OneStep)
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
