"""Keras's layers with every activation: read with the cell that computes the same, and used everywhere with it."""

import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from comparing import assert_close
from flax import nnx
from keras_models import KINDS, MARKS, B, F, H, T, load_keras, modules, rnn_layer, set_numbers
from reading import loaded

import jaxrnn
from jaxrnn.__main__ import main
from jaxrnn.activations import FUNCTIONS, SYNONYMS, HardSigmoid, LeakyRelu
from jaxrnn.checkpoint import find_rnns, load
from jaxrnn.checkpoint.check import check
from jaxrnn.checkpoint.formats.keras_activations import activations_of

pytest_plugins = "shared_fixtures"
pytestmark = MARKS
# Some of them grow: weights are small.
X = normal(B, T, F).astype("f4")


def _saved(path: Path, layers: list[Any], version: str | None = None) -> tuple[Path, list[Any]]:
    """A model with these layers side by side, in a file of a version of Keras; and what each returns."""
    keras = load_keras()
    start = keras.Input((T, F))
    model = keras.Model(start, [layer(start) for layer in layers])
    set_numbers(model)
    model.set_weights([each / 4 for each in model.get_weights()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(path)
    if version is not None:
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        entries["metadata.json"] = json.dumps({"keras_version": version} if version else {}).encode()
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            for name, entry in entries.items():
                archive.writestr(name, entry)
        path.write_bytes(data.getvalue())
    return path, [[np.asarray(each) for each in jax.tree.leaves(layer(X))] for layer in layers]


def _compare(tensors: Any, prefix: str, expected: list[np.ndarray]) -> None:
    """The output and every state."""
    output, state = modules(tensors)[prefix](jnp.asarray(X))
    for ours, theirs in zip([output, *(each[0] for each in jax.tree.leaves(state))], expected, strict=True):
        assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", [*FUNCTIONS, *SYNONYMS, None, "LeakyReLU", "ELU"])
def test_every_activation_of_keras(name: str | None, tmp_path: Path) -> None:
    layers = load_keras().layers
    activation = {"LeakyReLU": lambda: layers.LeakyReLU(0.3), "ELU": lambda: layers.ELU(0.7)}.get(name, lambda: name)
    made = [rnn_layer(kind, activation=activation(), return_state=True, name=f"{kind}_1") for kind in KINDS]
    made += [
        rnn_layer(kind, recurrent_activation=activation(), return_state=True, name=f"{kind}_2") for kind in KINDS[1:]
    ]
    path, expected = _saved(tmp_path / "model.keras", made)
    tensors, words = loaded(path)
    assert len(words) == (2 if name == "tanh" else 3 if name == "sigmoid" else 5)
    for layer, theirs in zip(made, expected, strict=True):
        _compare(tensors, f"{layer.name}.", theirs)


def test_hard_sigmoid_is_that_of_the_version_in_the_file(tmp_path: Path) -> None:
    ops = load_keras().ops
    layer = rnn_layer("LSTM", recurrent_activation="hard_sigmoid", return_state=True, name="a")
    path, expected = _saved(tmp_path / "model.keras", [layer])
    for version in ("3.0.5", "0.1.7", "2.15.0", "2.1.6", "1.2.0", ""):
        tensors, words = loaded(_saved(path, [layer], version)[0])
        [found] = find_rnns(tensors)
        old = version[:1] in ("1", "2", "")
        assert found.spec.cell == jaxrnn.lstm_cell(recurrent_activation=HardSigmoid() if old else "hard_sigmoid")
        if old:  # as Keras 2 computed it
            layer.cell.recurrent_activation = lambda x: ops.clip(0.2 * x + 0.5, 0.0, 1.0)
            expected = [[np.asarray(each) for each in layer(X)]]
            layer.cell.recurrent_activation = load_keras().activations.hard_sigmoid
        _compare(tensors, "a.", expected[0])
        assert len(words) == 1 + (not version)
        if not version:
            assert words[1].startswith(
                "a. has hard_sigmoid, and the file does not say its keras_version: jaxrnn assumes"
            )
            other = eval(
                found.spec.cell.name.replace("HardSigmoid(alpha=0.2, beta=0.5)", "'hard_sigmoid'"), vars(jaxrnn)
            )
            assert other == jaxrnn.lstm_cell(recurrent_activation="hard_sigmoid")


def test_everything_knows_the_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = load_keras().layers.Bidirectional(rnn_layer("GRU", recurrent_activation="hard_sigmoid"), name="both")
    path, [[expected]] = _saved(tmp_path / "model.keras", [both])
    with pytest.warns(UserWarning, match="both. has other activations, .* as jaxrnn.Recurrent"):
        tensors = load(path)
    [found] = find_rnns(tensors)
    assert (found.class_name, found.kind) == ("Recurrent", "gru_cell(recurrent_activation='hard_sigmoid')")
    assert found.said == {"batch_first": True, "cell": jaxrnn.gru_cell(recurrent_activation="hard_sigmoid")}
    ours = getattr(jaxrnn, found.class_name)(**found.arguments, rngs=nnx.Rngs(0))
    jaxrnn.load_state_dict(ours, tensors, prefix="both.")
    assert_close(ours(jnp.asarray(X))[0], expected, atol=1e-6)
    for other in (
        jaxrnn.GRU(F, H, batch_first=True, bidirectional=True, rngs=nnx.Rngs(0)),
        jaxrnn.Recurrent(jaxrnn.gru_cell("relu"), F, H, batch_first=True, bidirectional=True, rngs=nnx.Rngs(0)),
    ):
        with pytest.warns(UserWarning, match="where the file says cell=") as caught:
            jaxrnn.load_state_dict(other, tensors, prefix="both.")
        assert [str(each.message) for each in caught] == [
            f"{type(other).__name__}: cell={other.spec.cell.name}, where the file says cell={found.kind}\n"
            "make that module as jaxrnn.Recurrent(cell, ...), with the cell that find_rnns gives"
        ]
    assert main(["inspect", str(path)]) == 0
    assert f"cell={found.kind}" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["kind"] == found.kind
    assert main(["check", str(path)]) == 0
    assert "keras.layers.GRU" in capsys.readouterr().out


def test_an_activation_of_ones_own(tmp_path: Path) -> None:
    """What the message tells to do."""
    keras = load_keras()

    @keras.saving.register_keras_serializable("closed")
    def cubed(x: Any) -> Any:
        return x * x * x

    layer = rnn_layer("LSTM", activation=cubed, return_state=True, name="a")
    path, [expected] = _saved(tmp_path / "model.keras", [layer])
    tensors, [text, remedy] = loaded(path)
    assert text.endswith(": a (activation=closed>cubed)")
    assert remedy == (
        "a has an activation that jaxrnn does not know: read its arrays with DIALECTS['keras', 'LSTM'] of "
        "jaxrnn.checkpoint.dialects, and make its cell with jaxrnn.lstm_cell(activation=yours)"
    )
    weights = jaxrnn.checkpoint.dialects.DIALECTS["keras", "LSTM"].read(
        {name: tensors[f"a.cell.{name}"] for name in ("kernel", "recurrent_kernel", "bias")}
    )
    spec = jaxrnn.Spec(jaxrnn.lstm_cell(activation=cubed), F, H, batch_first=True)
    output, state = jaxrnn.apply(spec, {f"{role}_l0": array for role, array in weights.items()}, jnp.asarray(X))
    for ours, theirs in zip([output, *(each[0] for each in state)], expected, strict=True):
        assert_close(ours, theirs, atol=1e-6)


def test_check_compares_with_keras(tmp_path: Path) -> None:
    """In float64 where Keras computes in it. A weight that is read wrong is seen."""
    keras = load_keras()
    one, state = {"return_sequences": True, "return_state": True}, {"return_sequences": True}
    layers = [
        rnn_layer("LSTM", return_state=True, name="lstm"),
        keras.layers.Bidirectional(keras.layers.GRU(H, **state), name="both"),
        keras.layers.RNN([keras.layers.LSTMCell(H), keras.layers.LSTMCell(H)], **one, name="stack"),
        rnn_layer("SimpleRNN", activation="relu", use_bias=False, name="rnn"),
        rnn_layer("GRU", recurrent_activation="hard_sigmoid", activation="softsign", name="hard"),
    ]
    for version in (None, "2.15.0"):  # which has another hard_sigmoid
        path, _ = _saved(tmp_path / "model.keras", layers, version)
        tensors, _ = loaded(path)
        for found in find_rnns(tensors):
            result = check(found, tensors, None)
            kind = {"lstm.": "LSTM", "both.": "GRU", "stack.": "LSTM", "rnn.": "SimpleRNN", "hard.": "GRU"}
            assert result.original == f"keras.layers.{kind[found.prefix]}"
            assert result.difference < (1e-6 if found.prefix == "hard." else 1e-14), found.prefix
            tensors[f"{found.prefix}weight_hh_l0"] += 0.1
            assert not check(found, tensors, None).equal
        layers = [rnn_layer("GRU", recurrent_activation="hard_sigmoid", activation="softsign", name="hard")]


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"module": "this", "registered_name": "LeakyReLU"}, {}),
        ({"registered_name": "mine>LeakyReLU", "class_name": "mine>LeakyReLU"}, {}),
        ({}, {"threshold": 0.5}),
        ({}, {"negative_slope": float("inf")}),
    ],
)
def test_a_layer_that_may_be_something_else(changes: Any, settings: Any) -> None:
    raw = {"class_name": "LeakyReLU", "config": {"name": "a", "negative_slope": 0.5}, "module": "keras.layers"}
    assert activations_of("SimpleRNN", {"activation": raw}, "3.0") == {"activation": LeakyRelu(0.5)}
    raw = raw | changes | {"config": raw["config"] | settings}  # type: ignore[operator]
    assert activations_of("SimpleRNN", {"activation": raw}, "3.0") == {"activation": None}


def test_keras_gets_no_classes_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keras = load_keras()
    layers = [
        rnn_layer("LSTM", activation=keras.layers.LeakyReLU(0.3), name="a"),
        rnn_layer("GRU", activation=keras.layers.ELU(0.7), name="b"),
        rnn_layer("GRU", recurrent_activation="hard_sigmoid", name="c"),
        keras.layers.Bidirectional(rnn_layer("GRU", use_bias=False), name="d"),
    ]
    tensors = [loaded(_saved(tmp_path / "a.keras", layers, version)[0])[0] for version in ("3.0", "2.0")]
    given: list[Any] = []
    get = keras.activations.get
    monkeypatch.setattr(keras.activations, "get", lambda each: given.append(each) or get(each))
    for each in tensors:
        for found in find_rnns(each):
            result = check(found, each, None)
            assert result.original.startswith("keras.layers."), found
            assert result.equal, found
    assert all(each is None or isinstance(each, str) or callable(each) for each in given)
