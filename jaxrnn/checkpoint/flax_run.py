"""Run cells that were read from files of Flax and Haiku in their own library: see `named.Origin`."""

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.traverse_util import unflatten_dict
from numpy.typing import NDArray

from jaxrnn.checkpoint.arrays import to_numpy
from jaxrnn.checkpoint.dialects import Dialect


class StoredCell(NamedTuple):
    """A cell in a flat dict.

    Attributes:
        package: "flax.linen", "flax.nnx" or "haiku".
        name: the class there.
        dialect: how it stores its weights.
        arrays: its arrays, by name.
    """

    package: str
    name: str
    dialect: Dialect
    arrays: dict[str, Any]


def run(cells: Sequence[StoredCell], x: NDArray[Any], states: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Compute with the originals. The second cell runs backward."""
    outputs, lasts = [], []
    for cell, back, *start in zip(cells, (False, True), *states, strict=False):
        x_there = x[::-1] if back else x
        steps, last = (_run_haiku if cell.package == "haiku" else _run_flax)(cell, x_there, start)
        outputs.append(steps[::-1] if back else steps)
        lasts.append(last)
    return [np.concatenate(outputs, -1), *(np.stack(each) for each in zip(*lasts, strict=True))]


def _run_flax(cell: StoredCell, x: Any, start: list[Any]) -> tuple[Any, list[Any]]:
    arrays = {name: jnp.asarray(to_numpy(name, array), x.dtype) for name, array in cell.arrays.items()}
    features, carry = start[0].shape[-1], tuple(map(jnp.asarray, reversed(start)))  # Flax's LSTM has c first
    initial = carry if len(carry) > 1 else carry[0]
    if cell.package == "flax.linen":
        made = getattr(linen, cell.name)(features, dtype=x.dtype, param_dtype=x.dtype)
        layer = linen.RNN(made, time_major=True, return_carry=True)
        variables = {"params": {"cell": unflatten_dict(arrays, sep=".")}}
        last, output = layer.apply(variables, x, initial_carry=initial)
    else:
        made = getattr(nnx, cell.name)(x.shape[-1], features, dtype=x.dtype, param_dtype=x.dtype, rngs=nnx.Rngs(0))
        nnx.update(made, nnx.State(unflatten_dict(arrays, sep=".")))
        last, output = nnx.RNN(made, time_major=True, return_carry=True, rngs=nnx.Rngs(0))(x, initial_carry=initial)
    return np.asarray(output), [np.asarray(each) for each in (reversed(last) if len(carry) > 1 else [last])]


def _run_haiku(cell: StoredCell, x: Any, start: list[Any]) -> tuple[Any, list[Any]]:
    haiku = importlib.import_module("haiku")
    params: dict[str, dict[str, Any]] = {}
    for name, array in cell.arrays.items():
        layer, leaf = name.split(".")
        params.setdefault(f"cell/{layer}", {})[leaf] = to_numpy(name, array).astype(x.dtype)

    def unrolled(x: Any, *state: Any) -> Any:
        more = {"double_bias": len(params["cell/linear_1"]) > 1} if cell.name == "VanillaRNN" else {}
        core = getattr(haiku, cell.name)(start[0].shape[-1], name="cell", **more)
        first = haiku.LSTMState(*state) if cell.name == "LSTM" else state[0]
        return haiku.dynamic_unroll(core, x, first)

    output, last = haiku.transform(unrolled).apply(params, None, x, *start)
    return np.asarray(output), [np.asarray(each) for each in (last if cell.name == "LSTM" else [last])]
