"""OutputOnly, which makes a layer fit into `flax.linen.Sequential`."""

from __future__ import annotations

from typing import Any, overload

import jax
from flax import linen
from jax.typing import ArrayLike

from jaxrnn._core import flax_cell
from jaxrnn._core.calls import HX, Output
from jaxrnn.linen.base import Layers
from jaxrnn.packed import PackedSequence


class OutputOnly(linen.Module):
    """A layer that returns its output without its state, for `flax.linen.Sequential`: as `jaxrnn.OutputOnly`.

    Args:
        layer: a `jaxrnn.linen.RNN`, `LSTM`, `GRU` or `Recurrent`, whose parameters are under `layer`. With dropout,
            give it `deterministic` as a field, because a Sequential passes that to its first module alone.

    Raises:
        TypeError: layer is none of these.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> from flax import linen
    >>> model = linen.Sequential([jaxrnn.linen.OutputOnly(jaxrnn.linen.LSTM(10, 20)), linen.Dense(2)])
    >>> output, variables = model.init_with_output(jax.random.key(0), jnp.ones((7, 3, 10)))
    >>> output.shape
    (7, 3, 2)
    """

    layer: Layers[Any]

    def __post_init__(self) -> None:
        flax_cell.check_layer(self.layer, Layers)
        super().__post_init__()

    @overload
    def __call__(
        self, x: ArrayLike, hx: HX = None, deterministic: bool | None = None, **settings: Any
    ) -> jax.Array: ...
    @overload
    def __call__(
        self, x: PackedSequence, hx: HX = None, deterministic: bool | None = None, **settings: Any
    ) -> PackedSequence: ...
    def __call__(
        self, x: ArrayLike | PackedSequence, hx: HX = None, deterministic: bool | None = None, **settings: Any
    ) -> Output:
        """Call the layer, and return its output.

        Args:
            x, hx, deterministic, settings: the arguments of the layer's call.
        """
        flax_cell.refuse_state_of_sequential(self, hx)
        return self.layer(x, hx, deterministic, **settings)[0]

    __call__.__qualname__ = "module"  # for Python's own messages, as in `Layers`
