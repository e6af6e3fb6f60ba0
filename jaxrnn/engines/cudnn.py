"""The engine "cudnn": LSTM layers by cuDNN, on an NVIDIA GPU, forward and backward.

cuDNN has first derivatives by reverse mode, and no others: `jax.jvp`, second derivatives and `jax.vmap` raise JAX's
errors. An engine is not told which of them its caller will use, so this one cannot refuse them, and "auto" leaves it
out.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jaxrnn._compat import cudnn_lstm, is_plain, manual_axes
from jaxrnn._core import steps
from jaxrnn._core.options import Options
from jaxrnn._core.steps import Layer
from jaxrnn.cells import LSTM_CELL, Arrays


class CuDNN:
    """Both directions of a layer in one call of cuDNN."""

    def refuses_layer(self, layer: Layer) -> str | None:
        options, x = layer.options, layer.x
        reasons = {
            f"it needs a GPU, and JAX's default backend is {jax.default_backend()!r}": not self.has_gpu(),
            f"it runs LSTM_CELL, not {layer.cell.name!r}": layer.cell != LSTM_CELL,
            "it has no projection": "weight_hr" in layer.weights[0],
            f"it computes in float32, not {x.dtype}": x.dtype != jnp.float32,
            "it has no resets": layer.marks.reset is not None,
            "it takes lengths, and no mask": layer.marks.skipped is not None,
            "it has no recurrent dropout": layer.h_scale is not None,
            "it does not return the states of every step": layer.every,
            f"it does not recompute, and remat is {options.remat!r}": options.remat != "none",
            "its program is no plain jaxpr": is_plain.value,
            "it does not shard hidden units": options.hidden_axis is not None,
            "it runs on one device, or in jax.shard_map with check_vma=False": _sharded(layer),
            f"it needs sizes that are known and above 0, and x has shape {x.shape}": not _known(x.shape),
            f"it has no precision {options.precision_in_effect!r}": _full_float32(options) is None,
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def has_gpu(self) -> bool:
        """Whether JAX runs on a GPU. Tests without a GPU replace this method."""
        return jax.default_backend() == "gpu"

    def run_layer(self, layer: Layer) -> tuple[jax.Array, Arrays]:
        ended, first = layer.marks.ended, tuple(a.astype(jnp.float32) for a in layer.state)
        lengths = jnp.full(layer.x.shape[1], len(layer.x), jnp.int32)
        if ended is not None:
            lengths = jnp.sum(~ended[..., 0], axis=0, dtype=jnp.int32)
        lengths = jnp.maximum(lengths, 1)  # cuDNN takes no row of length 0
        x, weights, full_float32 = layer.x.swapaxes(0, 1), _flat(layer.weights), bool(_full_float32(layer.options))
        outputs, *last = cudnn_lstm(x, first[0], first[1], weights, lengths, full_float32)
        # JAX does not document what cuDNN leaves in the padding. A row of length 0 made a step.
        (outputs,) = steps.zero_if_held(layer.marks, (outputs.swapaxes(0, 1),))
        return outputs, steps.select(None if ended is None else ended[:1], first, tuple(last))


def _known(shape: tuple[Any, ...]) -> bool:
    """Sizes in an export may be symbols."""
    return all(isinstance(size, int) and size > 0 for size in shape)


def _flat(weights: tuple[dict[str, jax.Array], ...]) -> jax.Array:
    """The matrices of each direction, then the biases of each."""
    none = jnp.zeros(len(weights[0]["weight_ih"]), jnp.float32)
    matrices = [each[role] for each in weights for role in ("weight_ih", "weight_hh")]
    biases = [each.get(role, none) for each in weights for role in ("bias_ih", "bias_hh")]
    return jnp.concatenate([a.ravel() for a in matrices + biases])


def _full_float32(options: Options) -> bool | None:
    """Whether products must not be in TF32, which JAX uses on a GPU by default; None for a precision cuDNN lacks."""
    given = options.precision_in_effect
    if given is None:
        return False
    try:
        both = [jax.lax.Precision(each) for each in (given if isinstance(given, tuple | list) else [given])]
    except ValueError:  # one of JAX's algorithms
        return None
    return jax.lax.Precision.HIGHEST in both


def _sharded(layer: Layer) -> bool:
    """Whether several devices share the arrays, as far as tracing can tell.

    Each would run the whole batch. And JAX does not know over which axes of `jax.shard_map` cuDNN's results vary.
    """
    arrays = layer.weights, layer.x, layer.state
    meshes = {jax.sharding.get_abstract_mesh()} | {jax.typeof(a).sharding.mesh for a in jax.tree.leaves(arrays)}
    axes = [axis for mesh in meshes for axis in zip(mesh.axis_sizes, mesh.axis_types, strict=True)]
    shared = any(size > 1 and kind != AxisType.Manual for size, kind in axes)
    return shared or any(map(manual_axes, jax.tree.leaves(arrays)))
