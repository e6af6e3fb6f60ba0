"""OutputOnly, which makes a layer fit into `flax.nnx.Sequential`."""

from __future__ import annotations

from typing import Any, overload

import jax
from flax import nnx
from jax.typing import ArrayLike

from jaxrnn._core import flax_cell
from jaxrnn._core.calls import HX, Output
from jaxrnn.nnx.base import Layers, Randomness
from jaxrnn.packed import PackedSequence


class OutputOnly(nnx.Module):
    """A layer that returns its output without its state, for `flax.nnx.Sequential`.

    A Sequential unpacks a tuple, so that it would call the next module with a layer's output and state. For the same
    reason a PackedSequence does not pass through one, and only its first module can be given `lengths`.

    In `jaxrnn.state_dict` and `load_state_dict` the parameters have the names that they have without the wrapper. To
    load a `torch.nn.Sequential`, keep a place for each of its modules: `lambda output: output` for one that takes the
    output out of the tuple.

    Args:
        layer: a `jaxrnn.RNN`, `LSTM`, `GRU` or `Recurrent`, which is then the attribute `layer`.

    Raises:
        TypeError: layer is none of these.

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(jaxrnn.OutputOnly(jaxrnn.LSTM(10, 20, rngs=rngs)), nnx.Linear(20, 2, rngs=rngs))
    >>> model(jnp.ones((7, 3, 10))).shape
    (7, 3, 2)
    >>> list(jaxrnn.state_dict(model))
    ['0.weight_ih_l0', '0.weight_hh_l0', '0.bias_ih_l0', '0.bias_hh_l0', '1.weight', '1.bias']
    """

    def __init__(self, layer: Layers[Any]) -> None:
        flax_cell.check_layer(layer, Layers)
        self.layer = layer

    @overload
    def __call__(
        self, x: ArrayLike, hx: HX = None, *, rngs: Randomness | None = None, **settings: Any
    ) -> jax.Array: ...
    @overload
    def __call__(
        self, x: PackedSequence, hx: HX = None, *, rngs: Randomness | None = None, **settings: Any
    ) -> PackedSequence: ...
    # Sequential passes rngs to a module that names it.
    def __call__(
        self, x: ArrayLike | PackedSequence, hx: HX = None, *, rngs: Randomness | None = None, **settings: Any
    ) -> Output:
        """Call the layer, and return its output.

        Args:
            x, hx, rngs, settings: the arguments of the layer's call.
        """
        flax_cell.refuse_state_of_sequential(self, hx)
        return self.layer(x, hx, rngs=rngs, **settings)[0]

    __call__.__qualname__ = "module"  # for Python's own messages, as in `Layers`
