"""Flax's conventions for cells and for Sequential, shared by the modules for both Flax APIs.

The carry is the first argument and the first result, an LSTM's is (c, h), and any number of batch axes is allowed.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from jaxrnn._compat import called_by_sequential

# For a cell without FlaxCell in Flax's RNN, which asks for `num_feature_axes`.
NOT_FLAXS = "Flax's RNN takes a jaxrnn cell as FlaxCell(cell): or use jaxrnn's RNN, LSTM or GRU, which need no wrapper"


def check(cell: Any, kind: type) -> None:
    """Raise TypeError unless the cell is one of this Flax API's."""
    _check("cell", "RNNCell, LSTMCell or GRUCell", cell, kind)


def check_layer(layer: Any, kind: type) -> None:
    """Raise TypeError unless the layer is one of this Flax API's."""
    _check("layer", "RNN, LSTM, GRU or Recurrent", layer, kind)


def _check(name: str, classes: str, module: Any, kind: type) -> None:
    if not isinstance(module, kind):
        api = kind.__module__.rpartition(".")[0]
        raise TypeError(f"{name} should be an {classes} of {api}, got {module!r}")


def refuse_state_of_sequential(module: Any, hx: Any) -> None:
    """Raise TypeError if hx is the state of another module, whose (output, state) Flax's Sequential unpacked."""
    if hx is not None and called_by_sequential(module):
        name, api = type(module).__name__, "jaxrnn.linen" if isinstance(module, linen.Module) else "jaxrnn"
        raise TypeError(
            f"hx of {name} came from Sequential, which unpacks the (output, state) of the module before: to drop the "
            f"state, wrap that module, if it is a layer, as {api}.OutputOnly(layer), or put "
            "`lambda output, state: output` between the two; to start from it, call the layer in "
            "`lambda output, state: layer(output, state)`"
        )


def initialize_carry(cell: Any, input_shape: tuple[int, ...], make: Callable[..., jax.Array] = jnp.zeros) -> Any:
    """The first carry, in the cell's dtype, or if it has none in its parameters' dtype."""
    dtype = cell.dtype or cell.param_dtype
    return _carry(tuple(make(shape, dtype) for shape in cell.spec.state_shapes(*input_shape[:-1])))


def step(cell: Any, carry: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
    """Call a cell with its batch axes flattened. The carry keeps its dtype; the output has the cell's, if any."""
    state = carry[::-1] if isinstance(carry, tuple) else (carry,)
    batch = inputs.shape[:-1]
    for array in state:  # after flattening, another shape with as many rows would pass
        if array.shape != (wanted := (*batch, cell.hidden_size)):
            raise RuntimeError(f"carry should have arrays of shape {wanted} for these inputs, got {array.shape}")
    dtype = cell.dtype or jnp.result_type(inputs, *state)
    x, *flat = (a.reshape(math.prod(batch), a.shape[-1]) for a in (inputs, *state))
    flat = [a.astype(max(a.dtype, dtype, key=lambda d: jnp.finfo(d).bits)) for a in flat]  # the cell returns this dtype
    after = cell(x, tuple(flat) if len(flat) > 1 else flat[0])
    after = [a.reshape(*batch, a.shape[-1]) for a in (after if isinstance(after, tuple) else (after,))]
    carry = _carry(tuple(a.astype(old.dtype) for a, old in zip(after, state, strict=True)))
    return carry, after[0].astype(dtype)


def _carry(state: tuple[jax.Array, ...]) -> Any:
    return state[::-1] if len(state) > 1 else state[0]
