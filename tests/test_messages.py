"""What a wrong call says: it names what to type, and no private class. And what all messages have in common."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxrnn
from jaxrnn import checkpoint
from jaxrnn.checkpoint.linen import load_state_dict

ROOT = Path(__file__).parents[1]
KEY = jax.random.key(0)
X = np.ones((5, 2, 3), np.float32)
SPEC = jaxrnn.Spec(jaxrnn.GRU_CELL, 3, 4)
CELL_SPEC = jaxrnn.CellSpec(jaxrnn.GRU_CELL, 3, 4)


def _gru(**options: Any) -> jaxrnn.GRU:
    return jaxrnn.GRU(3, 4, rngs=nnx.Rngs(0), **options)


def _cell() -> jaxrnn.GRUCell:
    return jaxrnn.GRUCell(3, 4, rngs=nnx.Rngs(0))


def _apply(spec: Any = SPEC, **arguments: Any) -> Any:
    return jaxrnn.apply(spec, SPEC.init(KEY), X, **arguments)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "keyword of a layer": (lambda: _gru()(X, nothing=1), TypeError, "module() got an unexpected keyword"),
    "keyword of a step": (
        lambda: _gru().step(X[0], nothing=1),
        TypeError,
        "module.step() got an unexpected keyword",
    ),
    "keyword of a cell": (lambda: _cell()(X[0], nothing=1), TypeError, "cell() got an unexpected keyword"),
    "keyword of Linen's": (
        lambda: jaxrnn.linen.GRU(3, 4).init(KEY, X, nothing=1),
        TypeError,
        "module() got an unexpected keyword",
    ),
    "keyword of Linen's cell": (
        lambda: jaxrnn.linen.GRUCell(3, 4).init(KEY, X[0], nothing=1),
        TypeError,
        "cell() got an unexpected keyword",
    ),
    "cell by name": (
        lambda: jaxrnn.Spec("LSTM", 3, 4),
        TypeError,
        "got 'LSTM': jaxrnn has RNN_TANH, RNN_RELU, LSTM_CELL",
    ),
    "cell spec by name": (lambda: jaxrnn.CellSpec("LSTM", 3, 4), TypeError, "cell should be a jaxrnn.Cell, got 'LSTM'"),
    "cell as spec": (lambda: _apply(jaxrnn.GRU_CELL), TypeError, "got Cell: make one of a cell: jaxrnn.Spec(jaxrnn.LS"),
    "module as spec": (lambda: _apply(_gru()), TypeError, "got GRU: give the module's own: module.spec"),
    "spec as cell spec": (
        lambda: jaxrnn.apply_cell(SPEC, CELL_SPEC.init(KEY), X[0]),
        TypeError,
        "spec should be a jaxrnn.CellSpec, got Spec",
    ),
    "state as array": (
        lambda: jaxrnn.LSTM(3, 4, rngs=nnx.Rngs(0))(X, jnp.zeros((1, 2, 4))),
        TypeError,
        "hx should be a tuple (h_0, c_0), got one array of shape (1, 2, 4)",
    ),
    "nnx.RNN": (lambda: nnx.RNN(_cell())(X), AttributeError, "as FlaxCell(cell)"),
    "linen.RNN": (lambda: linen.RNN(jaxrnn.linen.GRUCell(3, 4)).init(KEY, X), TypeError, "as FlaxCell(cell)"),
    "dtype": (lambda: _gru(dtype="torch.float32"), TypeError, "dtype should be a dtype of JAX or NumPy"),
    "param_dtype": (lambda: _gru(param_dtype="torch.float32"), TypeError, "param_dtype should be a dtype of JAX"),
    "Linen's param_dtype": (
        lambda: jaxrnn.linen.GRU(3, 4, param_dtype=jnp.int32),
        TypeError,
        "param_dtype should be floating, got int32",
    ),
    "save a module": (lambda: checkpoint.save("x.pt", _gru()), TypeError, "make it by jaxrnn.state_dict(module)"),
    "save a number": (
        lambda: checkpoint.save("x.pt", {"epoch": 3}),
        jaxrnn.CheckpointError,
        "x.pt: epoch is of type int\ngive a numpy, jax or torch array of numbers: numpy.asarray makes one",
    ),
    "save a state": (lambda: checkpoint.save("x.pt", nnx.state(_gru())), jaxrnn.CheckpointError, "is of type Param\n"),
    "from_torch of a model": (
        lambda: jaxrnn.from_torch(np.ones(1)),
        TypeError,
        "jaxrnn.load_state_dict(model, torch_model.state_dict())",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_say_what_to_type(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, error, words = WRONG[name]
    with pytest.raises(error, match=re.escape(words)):
        call()
    assert list(tmp_path.iterdir()) == []


def test_a_nested_dict_to_save_is_flattened_as_the_message_says(tmp_path: Path) -> None:
    tensors = {"model": {"weight": np.ones(2)}, "epoch": 3}
    with pytest.raises(jaxrnn.CheckpointError, match="dicts under model\n") as caught:
        checkpoint.save(tmp_path / "x.pt", tensors)
    advice = str(caught.value).partition("not an array: ")[2]
    checkpoint.save(tmp_path / "x.pt", eval(advice, {"tensors": tensors}))
    assert list(checkpoint.load(tmp_path / "x.pt")) == ["model.weight"]


def test_weights_of_flaxs_own_rnn_are_converted_as_the_message_says() -> None:
    class Model(nnx.Module):
        def __init__(self, rnn: nnx.Module) -> None:
            self.rnn = rnn

    theirs, model = Model(nnx.RNN(nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0)))), Model(jaxrnn.LSTM(3, 4, rngs=nnx.Rngs(1)))
    with pytest.raises(jaxrnn.CheckpointError, match=r"weights of Flax's own RNN: convert it with (.*\));") as caught:
        jaxrnn.load_state_dict(model, jaxrnn.state_dict(theirs))
    [advice] = re.findall(r"convert it with (.*\));", str(caught.value))
    exec(advice, {"model": model, "theirs": theirs, "jaxrnn": jaxrnn})
    np.testing.assert_allclose(model.rnn(X)[0], theirs.rnn(X), atol=1e-6)


def test_linens_variables_and_names() -> None:
    class Model(linen.Module):
        rnn: str | None = None

        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return jaxrnn.linen.GRU(3, 4, name=self.rnn)(x)[0]

    variables = Model().init(KEY, X)
    tensors = {f"lstm.{name}": value for name, value in SPEC.init(KEY).items()}
    with pytest.raises(jaxrnn.CheckpointError, match=r"it has GRU_0\ngive \{'params': variables\}"):
        load_state_dict(Model(), variables["params"], tensors, X)
    with pytest.raises(jaxrnn.CheckpointError, match=r"Linen named GRU_0 itself: .* such as name='lstm'"):
        load_state_dict(Model(), variables, tensors, X)
    with pytest.raises(TypeError, match=r"'x': give the arguments of the module's call"):
        load_state_dict(Model(), variables, tensors)
    named = Model("lstm")
    assert load_state_dict(named, named.init(KEY, X), tensors, X).missing == []
    layer = jaxrnn.linen.GRU(3, 4)
    with pytest.raises(jaxrnn.CheckpointError, match=r"\ngive \{'params': variables\}"):
        load_state_dict(layer, layer.init(KEY, X)["params"], SPEC.init(KEY), X)


def test_every_checkpoint_error_has_a_remedy() -> None:
    """On a line of its own, unless it passes another error on."""
    spec = importlib.util.spec_from_file_location("messages", ROOT / ".ci" / "messages.py")
    assert spec
    assert spec.loader
    messages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(messages)
    found = list(messages.all_messages())
    errors = [(place, words) for place, kind, words in found if kind in ("CheckpointError", "UnreadableError")]
    assert len(errors) > 100
    passed_on = ("{error}", "}")  # what a function returns
    assert [place for place, words in errors if "\n" not in words and not words.endswith(passed_on)] == []
