"""Numbers for tests, made by NumPy, so that making them compiles nothing; and names for what comes back."""

import zlib
from typing import Any

import numpy as np

import jaxrnn


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Normally distributed float64 numbers; the same ones for the same shape and seed."""
    return np.asarray(np.random.RandomState(seed + sum(shape)).randn(*shape))


def parameters(spec: jaxrnn.Spec | jaxrnn.CellSpec, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """Normally distributed parameters of half the unit variance's size, each name with its own."""
    return {
        name: (normal(*shape, seed=zlib.crc32(name.encode()) % 2**31) / 2).astype(dtype)
        for name, shape in spec.shapes().items()
    }


def named(spec: jaxrnn.Spec, returned: Any) -> dict[str, Any]:
    """What `jaxrnn.apply` returned, by name, so that a comparison can say which array is off."""
    output, state = returned
    state = state if len(spec.cell.states) > 1 else (state,)
    return {"output": output} | {f"{name}_n": a for name, a in zip(spec.cell.states, state, strict=True)}
