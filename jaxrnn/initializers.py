"""Initial weights other than torch's: what `kernel_init=`, `recurrent_kernel_init=` and `bias_init=` take.

These are keywords of layers and cells, and of `Spec.init` and `CellSpec.init`. Each takes a function
`init(key, shape, dtype)`, such as those of `jax.nn.initializers`. It is called once for each gate, with the shape that
Flax's cells have, `(features, hidden_size)`, or for a bias `(hidden_size,)`. So with `orthogonal()` each gate's weights
are orthogonal, and `lecun_normal()` counts the features of the input. For some gates alone, give a dict from their
names to functions; then the others are drawn as torch draws them. A gate's two biases add up, so `bias_init` draws
`bias_ih`, and `bias_hh` is 0; where they do not add up, as in GRU's n, it draws both.

`FLAX` has all three keywords, with the defaults of Flax's cells:

>>> import jax, jaxrnn
>>> params = jaxrnn.Spec(jaxrnn.GRU_CELL, 3, 4).init(jax.random.key(0), **jaxrnn.initializers.FLAX)
>>> r, z, n = params["weight_hh_l0"].reshape(3, 4, 4)
>>> bool(jax.numpy.allclose(z @ z.T, jax.numpy.eye(4), atol=1e-5))
True

With other biases it is `FLAX | {"bias_init": forget_bias()}`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypedDict, cast

import jax
import jax.numpy as jnp
from jax.nn.initializers import constant, lecun_normal, orthogonal, zeros
from jax.typing import DTypeLike

from jaxrnn.cells import Cell

__all__ = ["FLAX", "forget_bias"]

Initializer = Callable[..., jax.Array]
GateInitializer = Initializer | Mapping[str, Initializer]  # for all gates, or by the gate's name


class _Flax(TypedDict, total=False):
    kernel_init: GateInitializer
    recurrent_kernel_init: GateInitializer
    bias_init: GateInitializer


# nnx.GRUCell and nnx.OptimizedLSTMCell draw all gates' recurrent weights as one matrix; Flax's other cells, and all of
# Linen's, draw them gate by gate, as here.
FLAX: _Flax = cast(
    _Flax,
    MappingProxyType({"kernel_init": lecun_normal(), "recurrent_kernel_init": orthogonal(), "bias_init": zeros}),
)


def forget_bias(value: float = 1.0) -> Mapping[str, Initializer]:
    """An LSTM's `bias_init` that is `value` for the forget gate, f, and 0 for the other gates.

    Args:
        value: the sum of the forget gate's two biases.

    Returns:
        A dict from the LSTM's gates to functions.

    >>> import jax, jaxrnn
    >>> spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, 3, 2)
    >>> params = spec.init(jax.random.key(0), bias_init=jaxrnn.initializers.forget_bias())
    >>> params["bias_ih_l0"].tolist()                                    # i, f, g, o
    [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """
    return {"i": zeros, "f": constant(value), "g": zeros, "o": zeros}


def by_role(
    cell: Cell,
    default: Initializer,
    kernel_init: GateInitializer | None,
    recurrent_kernel_init: GateInitializer | None,
    bias_init: GateInitializer | None,
) -> dict[str, Initializer]:
    """For the weights that are not drawn by `default`: from their role to the function that draws all their gates."""
    kernel = _by_gate("kernel_init", kernel_init, cell)
    recurrent = _by_gate("recurrent_kernel_init", recurrent_kernel_init, cell)
    bias = _by_gate("bias_init", bias_init, cell)
    # The two biases of a gate add up, unless its halves come apart.
    second = {gate: init if gate in cell.apart else zeros for gate, init in bias.items()}
    inits = {
        "weight_ih": ("kernel_init", kernel),
        "weight_hh": ("recurrent_kernel_init", recurrent),
        "bias_ih": ("bias_init", bias),
        "bias_hh": ("bias_init", second),
    }
    found = {
        role: _stacked(argument, [given.get(gate, default) for gate in cell.gates])
        for role, (argument, given) in inits.items()
        if given
    }
    if kernel_init is not None and not isinstance(kernel_init, Mapping):
        found["weight_hr"] = _stacked("kernel_init", [kernel_init])
    return found


def _by_gate(argument: str, given: GateInitializer | None, cell: Cell) -> dict[str, Initializer]:
    """The gates that are not drawn as torch's, and what draws them."""
    if given is None:
        return {}
    inits = dict(given) if isinstance(given, Mapping) else dict.fromkeys(cell.gates, given)
    for gate, init in inits.items():
        if gate not in cell.gates:
            raise ValueError(f"{argument} should have names of gates of {cell.name}, {cell.gates}, got {gate!r}")
        if not _draws(init):
            name = argument if init is given else f"{argument}[{gate!r}]"
            raise TypeError(
                f"{name} should be a function (key, shape, dtype), such as jax.nn.initializers.orthogonal(), "
                f"got {init!r}"
            )
    return inits


def _draws(init: object) -> bool:
    """Whether it can be called with a key, a shape and a dtype, as far as its signature shows."""
    if not callable(init):
        return False
    try:
        signature = inspect.signature(init)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(None, None, None)
    except TypeError:
        return False
    return True


def _stacked(argument: str, inits: Sequence[Initializer]) -> Initializer:
    """A function that draws the rows of each gate by its own function of the transposed shape."""

    def draw(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
        if 0 in shape:  # no variance can be scaled by no features
            return jnp.zeros(shape, dtype)
        rows, *features = shape
        wanted = (*features, rows // len(inits))
        drawn = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32  # QR has no smaller one
        keys = jax.random.split(key, len(inits))
        gates = [_checked(argument, init(keys[k], wanted, drawn), wanted) for k, init in enumerate(inits)]
        return jnp.concatenate([gate.T for gate in gates]).astype(dtype)

    return draw


def _checked(argument: str, drawn: Any, wanted: tuple[int, ...]) -> jax.Array:
    if getattr(drawn, "shape", None) == wanted:
        return jnp.asarray(drawn)
    got = f"one of shape {drawn.shape}" if hasattr(drawn, "shape") else type(drawn).__name__
    remedy = ": to shard parameters, give hidden_axis"
    if callable(drawn):
        remedy = ": call it first, as in orthogonal()"
    elif hasattr(drawn, "shape"):
        remedy = ": it is called for each gate"
    raise TypeError(f"{argument} should return an array of shape {wanted}, got {got}{remedy}")
