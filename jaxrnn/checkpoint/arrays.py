"""Convert arrays of NumPy, JAX or torch to NumPy arrays of the same dtype."""

import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn._compat import is_traced
from jaxrnn.checkpoint.errors import CheckpointError
from jaxrnn.checkpoint.stored import Stored

# `dtype_of` returns this for anything but an array of numbers.
NO_NUMBERS = np.dtype(object)


def is_torch_tensor(value: object) -> bool:
    # Whoever has a tensor has imported torch: no need to import it here.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_lazy(tensor: Any) -> bool:
    """Whether it is a parameter of a lazy layer that has not been called: it has no shape."""
    return isinstance(tensor, sys.modules["torch"].nn.parameter.UninitializedTensorMixin)


def dtype_of(value: Any) -> np.dtype:
    """The NumPy dtype of an array of NumPy, JAX, torch or a file; `NO_NUMBERS` for anything else."""
    if isinstance(value, np.ndarray | np.generic | jax.Array | Stored) or (
        is_torch_tensor(value) and not is_lazy(value)
    ):
        try:
            dtype = jnp.dtype(str(value.dtype).removeprefix("torch.")).newbyteorder("=")
        except TypeError:
            return NO_NUMBERS
        if dtype.kind == "b" or jnp.issubdtype(dtype, np.number):
            return dtype
    return NO_NUMBERS


def with_library(arrays: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The library to compute with, and the arrays: NumPy's, or jax.numpy and the arrays that jit or vmap traces.

    Also beside traced arrays the others are NumPy's: their numbers are known.

    Raises:
        CheckpointError: as `to_numpy`.
    """
    traced = {name for name, array in arrays.items() if is_traced(array) and dtype_of(array) != NO_NUMBERS}
    found = {name: array if name in traced else to_numpy(name, array) for name, array in arrays.items()}
    return jnp if traced else np, found


def to_numpy(name: str, value: Any) -> np.ndarray:
    """A contiguous NumPy copy, in the machine's byte order, of an array of numpy, jax, torch or a file.

    Raises:
        CheckpointError: `value` is not a dense array of numbers; the message calls it `name`.
    """
    if isinstance(value, Stored):
        return value.read()
    dtype = dtype_of(value)
    if is_torch_tensor(value) and is_lazy(value):
        raise CheckpointError(f"{name} is a lazy tensor, without numbers yet\ncall the model once in torch")
    if is_torch_tensor(value):
        kind = next((kind for kind in ("meta", "quantized", "nested") if getattr(value, f"is_{kind}")), None)
        if kind is None and str(value.layout) != "torch.strided":
            kind = str(value.layout).removeprefix("torch.")
        if kind is None and dtype != NO_NUMBERS:
            torch = sys.modules["torch"]
            value = value.detach().cpu().resolve_conj().resolve_neg()
            if dtype.kind == "V":  # bfloat16 and the float8 types, which torch's numpy() does not know
                bits = value.contiguous().view({1: torch.uint8, 2: torch.int16}[dtype.itemsize])
                return bits.numpy().view(dtype).copy()
            return value.numpy().copy(order="C")
        raise CheckpointError(f"{name} is a {kind or value.dtype} tensor\nsave it as a dense tensor of numbers")
    if dtype == NO_NUMBERS:
        is_array = isinstance(value, np.ndarray | np.generic | jax.Array)
        what = f"an array of {value.dtype}" if is_array else f"of type {type(value).__name__}"
        raise CheckpointError(f"{name} is {what}\ngive a numpy, jax or torch array of numbers: numpy.asarray makes one")
    return np.array(value, dtype=dtype, order="C")
