"""How to run: one frozen value, which is checked here and passed on whole."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.typing import DTypeLike

# See `Options`.
Remat = Literal["none", "gates"] | int
MeshAxis = str | tuple[str, ...]
EngineNames = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Options:
    """How a call computes. Options change its results by rounding at most.

    Its fields are keywords of modules and functions: `jaxrnn.LSTM` says what each means.

    Raises:
        TypeError: dtype is not floating.
        ValueError: remat is neither "none" nor "gates" nor an integer above 0, or unroll is neither None nor an integer
            above 0.
    """

    dtype: DTypeLike | None = None
    precision: jax.lax.PrecisionLike = None
    remat: Remat = "none"
    hidden_axis: MeshAxis | None = None
    unroll: int | None = None
    engine: EngineNames = "auto"

    def __post_init__(self) -> None:
        if self.dtype is not None:
            # so that "float32" and jnp.float32 compare equal
            object.__setattr__(self, "dtype", floating_dtype("dtype", self.dtype))
        if self.remat not in ("none", "gates") and not _is_count(self.remat):
            raise ValueError(f"remat should be 'none', 'gates' or an integer above 0, got {self.remat!r}")
        if isinstance(self.engine, list):
            object.__setattr__(self, "engine", tuple(self.engine))
        if self.unroll is not None and not _is_count(self.unroll):
            raise ValueError(f"unroll should be an integer above 0, or None, got {self.unroll!r}")

    @property
    def precision_in_effect(self) -> Any:
        """The precision of the products: as asked for, or else JAX's setting."""
        config: Any = jax.config  # whose type does not name its settings
        return config.jax_default_matmul_precision if self.precision is None else self.precision

    def check_mesh(self, hidden_size: int) -> None:
        """Raise ValueError unless hidden units can be sharded over `hidden_axis` of the mesh in effect."""
        axis, mesh = self.hidden_axis, jax.sharding.get_abstract_mesh()
        if axis is None:
            return
        wanted = (axis,) if isinstance(axis, str) else axis
        if not isinstance(wanted, tuple) or not set(wanted) <= set(mesh.axis_names) or len(set(wanted)) < len(wanted):
            raise ValueError(
                f"hidden_axis should be an axis of the mesh in jax.set_mesh, which has {mesh.axis_names}, or a logical "
                f"axis that Flax's rules map to one, got {axis!r}"
            )
        kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        if any(kinds[name] != AxisType.Auto for name in wanted):
            raise ValueError(
                f"hidden_axis should be an axis of type jax.sharding.AxisType.Auto, got {axis!r} of {mesh}"
            )
        count = math.prod(mesh.shape[name] for name in wanted)
        if hidden_size % count:
            raise ValueError(
                f"hidden_size should be a multiple of {count}, the devices of axis {axis!r}, got {hidden_size}"
            )


def floating_dtype(name: str, dtype: DTypeLike) -> jnp.dtype:
    """The dtype that an argument is, or TypeError."""
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"{name} should be a dtype of JAX or NumPy, such as jnp.float32, got {dtype!r}") from error
    if not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"{name} should be floating, got {found}")
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
