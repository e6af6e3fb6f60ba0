"""How tests compare numbers: up to rounding, with a message of what is off, by how much and where; or bit by bit."""

from typing import Any

import chex
import jax
import numpy as np

from jaxrnn.checkpoint.arrays import to_numpy


def assert_close(found: Any, expected: Any, *, atol: float = 1e-12, rtol: float = 0.0) -> None:
    """Check that two pytrees have one structure, the same shapes, and numbers within `atol + rtol * |expected|`.

    Tuples and lists count as the same, and dtypes may differ. NaN equals NaN.

    Raises:
        AssertionError: the message names the first leaf that is off, the largest difference, and some of the indices.
    """
    found, expected = _arrays(found), _arrays(expected)
    chex.assert_trees_all_equal_shapes(found, expected)
    chex.assert_trees_all_close(found, expected, atol=atol, rtol=rtol)


def bits(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    """All that tells two arrays apart, also 0 and -0."""
    array = np.asarray(array)
    return str(array.dtype), array.shape, array.tobytes()


def torchs(tensor: Any) -> np.ndarray:
    """A tensor as a NumPy array, also of bfloat16."""
    return np.asarray(to_numpy("tensor", tensor.detach()))


def _arrays(tree: Any) -> Any:
    """The tree with NumPy arrays as leaves, in float64, and lists for tuples."""
    if isinstance(tree, dict):
        return {key: _arrays(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_arrays(value) for value in tree]
    leaves, structure = jax.tree.flatten(tree)
    if jax.tree.structure(0) != structure:  # a node of some library's own
        return jax.tree.unflatten(structure, map(_arrays, leaves))
    array = np.asarray(tree)
    return array if array.dtype == object else array.astype(np.float64)
