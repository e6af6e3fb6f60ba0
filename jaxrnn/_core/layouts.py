"""Layouts of a layer's gates: side by side on one axis, or on an axis of their own where hidden units are sharded."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxrnn._core.options import MeshAxis
from jaxrnn.cells import Arrays


class Layout(Protocol):
    """How a layer's gates are laid out. An array "in this layout" has its gates where `join` puts them."""

    @property
    def contract(self) -> int:
        """The axis of a weight, as it is stored, over which products sum."""

    def split(self, a: jax.Array) -> Arrays:
        """G arrays (..., H) from one in this layout."""

    def join(self, gates: Arrays) -> jax.Array:
        """The inverse of `split`."""

    def by_gate(self, a: jax.Array) -> jax.Array:
        """Convert an array whose last axis is torch's rows, (..., G * H), to this layout."""

    def stored(self, weight: jax.Array) -> jax.Array:
        """Convert torch's weights, (G * H, I), to this layout."""

    def for_each_gate(self, weight_ih: jax.Array) -> Arrays:
        """The input weights of each gate: G arrays (I, H)."""

    def features_first(self, weight: jax.Array) -> jax.Array:
        """A weight, as it is stored, with the features first."""

    def transposed(self, weight_hh: jax.Array) -> tuple[jax.Array, int]:
        """Recurrent weights, features first, for a loop that JAX transposes, and the axis over which it sums."""

    def directions(self, outputs: list[jax.Array], returned: bool) -> jax.Array:
        """The features of all directions on one axis: for the next layer, or as the result."""


class SideBySide(NamedTuple):
    """Gate after gate on one axis, as torch's rows: (..., G * H)."""

    gates: int

    @property
    def contract(self) -> int:
        return 1

    def split(self, a: jax.Array) -> Arrays:
        # Separate arrays, because XLA's CPU backend does not vectorise gates sliced from one array inside a loop.
        return tuple(jnp.split(a, self.gates, axis=-1))

    def join(self, gates: Arrays) -> jax.Array:
        return jnp.concatenate(gates, axis=-1)

    def by_gate(self, a: jax.Array) -> jax.Array:
        return a

    def stored(self, weight: jax.Array) -> jax.Array:
        return weight

    def for_each_gate(self, weight_ih: jax.Array) -> Arrays:
        return tuple(part.T for part in jnp.split(weight_ih, self.gates))

    def features_first(self, weight: jax.Array) -> jax.Array:
        return weight.T

    def transposed(self, weight_hh: jax.Array) -> tuple[jax.Array, int]:
        return weight_hh.T, 1  # so that the transposed loop, too, reads contiguous rows

    def directions(self, outputs: list[jax.Array], returned: bool) -> jax.Array:
        return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=-1)


class Sharded(NamedTuple):
    """Hidden units sharded, each device with every gate of its units: (..., G, H).

    Sharding torch's rows would give each device different gates and force an exchange at every step.
    """

    gates: int
    axis: MeshAxis

    @property
    def contract(self) -> int:
        return 0

    def split(self, a: jax.Array) -> Arrays:
        return tuple(gate[..., 0, :] for gate in jnp.split(a, self.gates, axis=-2))

    def join(self, gates: Arrays) -> jax.Array:
        return jnp.stack(gates, axis=-2)

    def by_gate(self, a: jax.Array) -> jax.Array:
        return self._sharded(a.reshape(*a.shape[:-1], self.gates, -1))

    def stored(self, weight: jax.Array) -> jax.Array:
        return self.by_gate(weight.T)

    def for_each_gate(self, weight_ih: jax.Array) -> Arrays:
        return self.split(weight_ih)

    def features_first(self, weight: jax.Array) -> jax.Array:
        return weight

    def transposed(self, weight_hh: jax.Array) -> tuple[jax.Array, int]:
        return weight_hh, 0

    def directions(self, outputs: list[jax.Array], returned: bool) -> jax.Array:
        # The next layer's products need all units. Sharding the result again needs a temporary axis of directions.
        if len(outputs) == 1:
            return outputs[0]
        x = self._sharded(jnp.stack(outputs, axis=-2))
        x = x.reshape(*x.shape[:-2], -1)
        return self._sharded(x) if returned else x

    def _sharded(self, a: jax.Array) -> jax.Array:
        """Shard the last axis, of hidden units; the others stay as they are."""
        rest = [PartitionSpec.UNCONSTRAINED] * (a.ndim - 1)
        return lax.with_sharding_constraint(a, PartitionSpec(*rest, self.axis))


def layout(gates: int, hidden_axis: MeshAxis | None) -> Layout:
    """The layout for hidden units that are sharded over this mesh axis, or for None are not sharded."""
    return SideBySide(gates) if hidden_axis is None else Sharded(gates, hidden_axis)
