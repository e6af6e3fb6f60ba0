"""Write a recurrent module as an ONNX model."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen, nnx

from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, RNN_TANH
from jaxrnn.checkpoint.arrays import to_numpy
from jaxrnn.checkpoint.errors import CheckpointError, about
from jaxrnn.checkpoint.formats import onnx
from jaxrnn.checkpoint.write import replace
from jaxrnn.spec import Spec

_DTYPES = ("float32", "float64", "float16")


def to_onnx(
    module: nnx.Module | linen.Module,
    path: str | os.PathLike[str],
    variables: Mapping[str, Any] | None = None,
    lengths: bool = False,
    hx: bool = False,
) -> None:
    """Write an RNN, LSTM or GRU as an ONNX model, which onnxruntime and others run.

    The model's input is "x", and its outputs are "output", "h_n" and, for an LSTM, "c_n", with the shapes of the
    module's call. Batch and time may have any size. The model computes what the module computes without dropout, in the
    dtype of its parameters.

    Needs the package onnx: `pip install "jaxrnn[onnx]"`.

    Args:
        module: an RNN, LSTM or GRU of jaxrnn, or of jaxrnn.linen.
        path: the file to write, which replaces one that is there.
        variables: those of a Linen module, as from `module.init`.
        lengths: whether the model has another input "lengths" of shape (batch,) and dtype int32, as the module's call.
        hx: whether the model has inputs for the initial states: "h_0" and, for an LSTM, "c_0". Without, they are zeros.

    Raises:
        TypeError: another module, or a Linen module without variables.
        CheckpointError: ONNX does not have such a module: an LSTM with a projection, or parameters of bfloat16; the
            file cannot be written; or onnx is not installed.

    >>> import os, tempfile
    >>> import jaxrnn, onnx
    >>> from flax import nnx
    >>> gru = jaxrnn.GRU(3, 4, bidirectional=True, rngs=nnx.Rngs(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "gru.onnx")
    ...     jaxrnn.checkpoint.to_onnx(gru, path)
    ...     [found] = jaxrnn.checkpoint.find_rnns(jaxrnn.checkpoint.load(path))
    >>> found.kind, found.hidden_size, found.bidirectional
    ('GRU', 4, True)
    """
    spec = getattr(module, "spec", None)
    params: Mapping[str, Any]
    if isinstance(module, linen.Module):
        if variables is None:
            raise TypeError("variables should be what the Linen module's init returned, got None")
        params = linen.unbox(variables["params"])
    if not isinstance(spec, Spec) or spec.cell not in (RNN_TANH, RNN_RELU, LSTM_CELL, GRU_CELL):
        raise TypeError(f"module should be an RNN, LSTM or GRU of jaxrnn, got {type(module).__name__}")
    if isinstance(module, nnx.Module):
        params = {name: getattr(module, name)[...] for name in spec.shapes()}
    with about(path, "check the folder and its space"):
        if spec.proj_size:
            raise CheckpointError("ONNX has no LSTM with proj_size\nexport it with jax.export instead")
        arrays = {name: to_numpy(name, params[name]) for name in spec.shapes()}
        if (dtype := np.dtype(arrays["weight_ih_l0"].dtype).name) not in _DTYPES:
            raise CheckpointError(
                f"ONNX has no {spec.cell.name} of {dtype}\nmake the module with param_dtype one of {', '.join(_DTYPES)}"
            )
        replace(path, onnx.graph_of(spec, arrays, lengths, hx))
