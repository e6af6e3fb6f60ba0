"""Models that jax2onnx exports, in onnxruntime: the same results.

jax2onnx asks for an older orbax than the newest, with which it runs all the same. So the gate installs it beside the
environment. It leaves functions of `jax.numpy` changed behind it: these tests need a process of their own.
"""

import doctest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, parameters
from flax import nnx
from making import filled

import jaxrnn

jax2onnx = pytest.importorskip("jax2onnx", reason="jax2onnx is not beside")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not beside")
pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("default")]  # its warnings

Tree = Any
T, N, F, H = 7, 3, 3, 4
TOLERANCE = 1e-6
LENGTHS = np.array([7, 0, 4], np.int32)
BOTH = {"num_layers": 2, "bidirectional": True}


@pytest.fixture(autouse=True)
def as_users_have_it() -> Iterator[None]:
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


def _f(*shape: int) -> np.ndarray:
    return normal(*shape).astype(np.float32)


class Tagger(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(20, F, rngs=rngs)
        self.lstm = jaxrnn.LSTM(F, H, batch_first=True, dropout=0.5, **BOTH, rngs=rngs)
        self.head = nnx.Linear(2 * H, 5, rngs=rngs)

    def __call__(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        return self.head(self.lstm(self.embed(tokens), lengths=lengths)[0])


def _tagger() -> nnx.Module:
    model = filled(lambda: Tagger(rngs=nnx.Rngs(0)))
    model.eval()
    return model


def _layer(kind: str, **settings: Any) -> Any:
    return filled(lambda: getattr(jaxrnn, kind)(F, H, **settings, rngs=nnx.Rngs(0)))


def _with(layer: Callable, name: str) -> Callable:
    return lambda x, given: layer(x, **{name: given})


def _at_once() -> Callable:
    spec = jaxrnn.Spec(jaxrnn.MIN_GRU_CELL, F, H, **BOTH)
    return lambda x: jaxrnn.apply(spec, parameters(spec, np.float32), x, engine="associative_scan")


def _linen() -> Callable:
    module = jaxrnn.linen.GRU(F, H, bidirectional=True)
    return lambda x: module.apply({"params": parameters(module.spec, np.float32)}, x)


TOKENS = np.random.RandomState(0).randint(0, 20, (N, T)).astype(np.int32)
STATE = _f(2, N, H)
# The function, the inputs, and their symbolic axes.
CASES: dict[str, tuple[Callable[[], Callable], list[np.ndarray], list[str] | None]] = {
    "RNN": (lambda: _layer("RNN"), [_f(T, N, F)], None),
    "LSTM": (lambda: _layer("LSTM", **BOTH), [_f(T, N, F)], ["time, rows, 3"]),
    "GRU": (lambda: _layer("GRU", batch_first=True, **BOTH), [_f(N, T, F)], ["rows, 7, 3"]),
    "lengths": (lambda: _with(_layer("LSTM", **BOTH), "lengths"), [_f(T, N, F), LENGTHS], ["time, rows, 3", "rows"]),
    "mask": (lambda: _with(_layer("GRU", **BOTH), "mask"), [_f(T, N, F), _f(T, N) > 0], None),
    "state": (lambda: _layer("GRU", num_layers=2), [_f(T, N, F), STATE], ["time, rows, 3", "2, rows, 4"]),
    "a step": (lambda: _layer("GRU", num_layers=2).step, [_f(N, F), STATE], ["rows, 3", "2, rows, 4"]),
    "a cell": (lambda: _layer("LSTMCell"), [_f(N, F)], ["rows, 3"]),
    "a model": (_tagger, [TOKENS, LENGTHS], ["rows, time", "rows"]),
    "all steps at once": (_at_once, [_f(T, N, F)], None),
    "Linen": (_linen, [_f(T, N, F)], None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_results(name: str) -> None:
    make, inputs, axes = CASES[name]
    function = make()
    shapes: list[Any] = [array.shape for array in inputs]
    if axes is not None:
        scope = jax.export.SymbolicScope()
        shapes = [jax.export.symbolic_shape(each, scope=scope) for each in axes]
    structs = [jax.ShapeDtypeStruct(shape, array.dtype) for shape, array in zip(shapes, inputs, strict=True)]
    with jaxrnn.plain_jaxprs():
        model = jax2onnx.to_onnx(function, structs, return_mode="proto")
    _compare(model.SerializeToString(), function, inputs, *([] if axes is None else [_others(inputs, axes)]))


def test_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "examples" / "export.md").read_text()
    before, _, after = text.partition("```py\n")
    export, _, _ = after.partition("```")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in doctest.DocTestParser().get_examples(before):
        exec(example.source, names)
    exec(export, names)
    arrays = [_f(5, 3, 8), np.array([5, 2, 0], np.int32)]
    _compare("model.onnx", names["function"], arrays)


def _compare(model: Any, function: Callable, *inputs: list[np.ndarray]) -> None:
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(model, options)
    for arrays in inputs:
        found = session.run(None, {each.name: array for each, array in zip(session.get_inputs(), arrays, strict=True)})
        expected = jax.tree.leaves(function(*map(jnp.asarray, arrays)))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def _others(inputs: list[np.ndarray], axes: list[str]) -> list[np.ndarray]:
    """Inputs of twice the size along each axis that is a symbol."""
    found = []
    for array, names in zip(inputs, axes, strict=True):
        doubled = array
        for axis, name in enumerate(names.split(", ")):
            if not name.isdigit():
                doubled = np.concatenate([doubled, doubled[::-1]], axis)
        found.append(doubled)
    return found
