"""Keras's layers and models in tests: made, saved, read, and run as what is said of them tells."""

import functools
import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest
from arrays import normal
from reading import apply, weights

from jaxrnn.checkpoint import find_rnns

os.environ["KERAS_BACKEND"] = "jax"
pytest.importorskip("pyfive", reason="pyfive is not installed")
h5py = pytest.importorskip("h5py", reason="h5py, which writes files, is not installed")
# Imported by tests alone, for it takes seconds, and every worker of pytest-xdist collects all files.
MARKS = [
    pytest.mark.libraries,
    pytest.mark.slow,
    pytest.mark.usefixtures("compiled_once", "as_keras_computes"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is not installed"),
]
B, T, F, H = 2, 4, 2, 3
KINDS = ("SimpleRNN", "LSTM", "GRU")


def load_keras() -> Any:
    import absl.logging
    import keras

    absl.logging.set_verbosity(absl.logging.ERROR)
    return keras


_QUICKLY = dict.fromkeys(("kernel_initializer", "recurrent_initializer"), "zeros")  # random ones are compiled


def rnn_cell(kind: str, units: int = H, **settings: Any) -> Any:
    return getattr(load_keras().layers, f"{kind}Cell")(units, **_QUICKLY | settings)


def rnn_layer(kind: str, units: int = H, **settings: Any) -> Any:
    return getattr(load_keras().layers, kind)(units, **_QUICKLY | {"return_sequences": True} | settings)


def set_numbers(layer: Any) -> None:
    """Give a layer or a model random numbers."""
    layer.set_weights([(normal(*w.shape, seed=i) / 2).astype(w.dtype) for i, w in enumerate(layer.get_weights())])


Run = Callable[..., Any]


def modules(tensors: dict[str, Any]) -> dict[str, Run]:
    """The modules of a file, by prefix, to be called with (batch, time, features)."""
    runs: dict[str, Run] = {}
    for found in find_rnns(tensors):
        params = weights(tensors, found)

        def run(x: Any, found: Any = found, params: Any = params, **more: Any) -> Any:
            swap = not found.spec.batch_first
            output, state = apply(found.spec, params, jnp.swapaxes(x, 0, 1) if swap else x, **more)
            return (jnp.swapaxes(output, 0, 1) if swap else output), state

        runs[found.prefix] = run
    return runs


# What a remedy tells to do: a change of a way to run a layer, by the words. Words that are not here make a test fail.
def _flip(run: Run) -> Run:
    return lambda x, **more: run(jnp.flip(x, 1), **more)


def _merge(run: Run) -> Run:
    def merged(x: Any, **more: Any) -> Any:
        output, state = run(x, **more)
        return sum(jnp.split(output, 2, -1)), state

    return merged


def _stateful(run: Run) -> Run:
    return lambda x, **more: run(x, hx=run(x, **more)[1], **more)


def _half(run: Run) -> Run:
    return functools.partial(run, dtype=jnp.float16)


def _each_step(run: Run) -> Run:
    def runs(x: Any, **more: Any) -> Any:
        output, state = run(x.reshape(-1, *x.shape[2:]), **more)
        return output.reshape(*x.shape[:2], *output.shape[1:]), state

    return runs


def _with_mask(run: Run) -> Run:
    return functools.partial(run, mask=jnp.arange(T) < jnp.array([3, 2])[:, None])


REMEDIES: dict[str, Callable[[Run], Run]] = {
    r"has go_backwards: flip its input along the time axis": _flip,
    r"has merge_mode=sum: merge the output's halves, because torch concatenates": _merge,
    r"has stateful: give each call the state that the last one returned, as hx": _stateful,
    r"has dtype=mixed_float16: make the module with the dtype in which that computes, dtype=jnp.float16 or "
    r"dtype=jnp.bfloat16": _half,
    r"is in a TimeDistributed: merge the first two axes of its input": _each_step,
    r"comes after \w+ \((Masking|Embedding|ReversibleEmbedding|Lambda)\), which may mask steps: "
    r"give mask=, True at valid steps, and take h_n for the last output; "
    r"at a masked step the output is 0, where Keras repeats the one before": _with_mask,
    # What the file says is in what `find_rnns` gives, of which `modules` makes them.
    r"has relu, which weights do not say: make the module with nonlinearity='relu'": lambda run: run,
    r"has other activations, which weights do not say: make the module as jaxrnn.Recurrent\(cell, ...\) with the cell "
    r"that find_rnns gives, \w+_cell\(.*\)": lambda run: run,
}
AFTER = re.compile(r"is more than torch has in one module: run (.*?)(?:; run (.*) on the input flipped along the time "
                   r"axis, flip the output, and concatenate)?")  # fmt: skip


def followed(runs: dict[str, Run], words: list[str]) -> Run:
    """The one layer of a file, run as the words say."""
    remedies = []
    for text in words:
        prefix, _, text = text.partition(" ")
        if match := AFTER.fullmatch(text):
            ways = [[runs.pop(name) for name in side.split(" and then ")] for side in match.groups() if side]
            runs[prefix] = functools.partial(_several, ways)
            continue
        found = [remedy for pattern, remedy in REMEDIES.items() if re.fullmatch(pattern, text)]
        assert len(found) == 1, text
        remedies += found
    [run] = runs.values()
    for remedy in remedies:
        run = remedy(run)
    return run


def _several(ways: list[list[Run]], x: Any, **more: Any) -> Any:
    outputs = []
    for way, axis in zip(ways, ((), 1), strict=False):
        y = jnp.flip(x, axis)
        for run in way:
            y, state = run(y, **more)
        outputs.append(jnp.flip(y, axis))
    return jnp.concatenate(outputs, -1), state
