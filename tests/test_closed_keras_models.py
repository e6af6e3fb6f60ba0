"""Models of Keras: where their layers are, and how they are called, so that each runs here as it does there."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from comparing import assert_close
from flax import nnx
from keras_models import KINDS, MARKS, B, F, H, T, followed, load_keras, modules, rnn_cell, rnn_layer, set_numbers
from reading import loaded

import jaxrnn
from jaxrnn.__main__ import main
from jaxrnn.checkpoint import find_rnns, scaffold

pytest_plugins = "shared_fixtures"
pytestmark = MARKS


def _recurrent(model: Any, *suffixes: str, path: Path) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    for suffix in suffixes or (".keras", ".h5"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            name = path / f"model{suffix}"
            (model.save_weights if "weights" in suffix else model.save)(name)
        yield (suffix, *loaded(name))


def _agree(tensors: dict[str, Any], words: list[str], layers: dict[str, Any], **more: Any) -> None:
    """Each layer computes in Keras what its module, run as the words say, computes here; and there is no other."""
    runs = modules(tensors)
    for prefix, layer in layers.items():
        about = [text for text in words if text.startswith(f"{prefix} ")]
        features = layer.weights[0].shape[0]
        x = normal(B, T, features).astype("f4")
        some = {name: runs.pop(name) for name in list(runs) if name.startswith(prefix)}
        output, _ = followed(some, about)(jnp.asarray(x), **more)
        cell = not hasattr(layer, "return_sequences")
        expected = load_keras().layers.RNN(layer, return_sequences=True)(x) if cell else layer(x)
        assert_close(output, np.asarray(expected), atol=2e-6)
    assert not runs


def _sequential(*layers: Any, name: str | None = None) -> Any:
    model = load_keras().Sequential([load_keras().Input((T, F)), *layers], name=name)
    set_numbers(model)
    return model


def test_settings_are_of_the_layer_at_the_path_not_of_one_of_the_same_name(tmp_path: Path) -> None:
    layers = load_keras().layers
    inner, outer = rnn_layer("SimpleRNN", name="enc"), rnn_layer("SimpleRNN", name="enc", activation="relu")
    one = layers.Bidirectional(rnn_layer("SimpleRNN", name="rnn"), name="a")
    other = layers.Bidirectional(rnn_layer("SimpleRNN", name="rnn", activation="relu"), name="b")
    beside = rnn_layer("SimpleRNN", name="forward_rnn", activation="relu")
    model = _sequential(_sequential(inner, name="within"), outer, one, other, beside)
    for _, tensors, words in _recurrent(model, path=tmp_path):
        [prefix] = {found.prefix for found in find_rnns(tensors)} - {"enc.", "a.", "b.", "forward_rnn."}
        assert prefix in ("within.enc.", "within.")
        assert sorted(text.partition(" has relu")[0] for text in words) == ["b.", "enc.", "forward_rnn."]
        _agree(tensors, words, {prefix: inner, "enc.": outer, "a.": one, "b.": other, "forward_rnn.": beside})


def test_every_file_that_keras_writes(tmp_path: Path) -> None:
    layers = load_keras().layers
    model = _sequential(
        first := rnn_layer("LSTM", name="first"),
        both := layers.Bidirectional(rnn_layer("GRU", 5), name="both"),
        plain := layers.RNN(rnn_cell("SimpleRNN", use_bias=False), return_sequences=True, name="plain"),
        layers.Dense(2, name="head"),
    )
    for suffix, tensors, words in _recurrent(model, ".keras", ".h5", ".weights.h5", path=tmp_path):
        assert all(found.arguments["batch_first"] is True for found in find_rnns(tensors))
        assert {name for name in tensors if "_l0" not in name} == {"head.kernel", "head.bias"}
        assert_close(tensors["head.kernel"], model.layers[-1].get_weights()[0], atol=0)
        if suffix != ".weights.h5":
            assert [found.prefix for found in find_rnns(tensors)] == ["first.", "both.", "plain."]
        _agree(tensors, words, {"first.": first, "both.": both, "plain.": plain})


def _in_order(suffix: str) -> list[str]:
    """The nested layer is the first of the model, and the second in a file of weights alone."""
    found = ["layers.sequential.layers.lstm", "layers.lstm"]
    return found[::-1] if "weights" in suffix else found


def test_no_two_layers_take_one_name(tmp_path: Path) -> None:
    nested, dotted = rnn_layer("LSTM", name="lstm"), rnn_layer("LSTM", name="enc.lstm")
    model = _sequential(_sequential(nested, name="enc"), dotted)
    for suffix, tensors, words in _recurrent(model, ".keras", ".h5", ".weights.h5", path=tmp_path):
        if suffix == ".h5":
            _agree(tensors, words, {"enc.lstm.": dotted, "enc.": nested})
            continue
        names = ", ".join(_in_order(suffix))
        assert f"several layers are named enc.lstm: of these, {names} are read by their paths in the file" in words
        _agree(tensors, words, {"layers.lstm.": dotted, "layers.sequential.layers.lstm.": nested})


def test_an_attribute_with_the_name_of_another_layer(tmp_path: Path) -> None:
    keras = load_keras()

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.out_rnn, self.gru = rnn_layer("GRU", name="gru"), rnn_layer("GRU", name="gru_1")

        def call(self, x: Any) -> Any:
            return self.out_rnn(self.gru(x))

    model = Model()
    model(normal(B, T, F).astype("f4"))
    for suffix, tensors, words in _recurrent(model, ".keras", ".h5", ".weights.h5", path=tmp_path):
        assert any("does not say the settings of" in text for text in words)
        gru = "gru_1." if suffix == ".h5" else "gru."
        _agree(tensors, words, {"gru." if suffix == ".h5" else "layers.gru.": model.out_rnn, gru: model.gru})


def test_layers_in_a_layer_of_ones_own(tmp_path: Path) -> None:
    keras = load_keras()

    class Encoder(keras.layers.Layer):
        def __init__(self, units: int = H, **settings: Any) -> None:
            super().__init__(**settings)
            self.units = units
            self.lstm_cell_1, self.lstm_cell_2 = rnn_cell("LSTM"), rnn_cell("LSTM")
            self.forward_rnn1, self.forward_rnn2 = rnn_layer("LSTM"), rnn_layer("LSTM")
            self.forward_rnn, self.backward_rnn = rnn_layer("GRU"), rnn_layer("GRU")
            self.my_backward_rnn, self.both = rnn_layer("SimpleRNN"), keras.layers.Bidirectional(rnn_layer("GRU"))

        def build(self, shape: Any) -> None:
            for layer in [each for each in vars(self).values() if isinstance(each, keras.layers.Layer)]:
                layer.build((None, F) if not hasattr(layer, "return_sequences") else shape)

        def call(self, x: Any) -> Any:
            return self.forward_rnn1(x)

        def get_config(self) -> dict[str, Any]:
            return super().get_config() | {"units": self.units}

    encoder = Encoder(name="enc")
    model = _sequential(encoder)
    for _, tensors, words in _recurrent(model, ".keras", ".weights.h5", path=tmp_path):
        [text] = words
        names = ("lstm_cell_1", "lstm_cell_2", "forward_rnn1", "forward_rnn2", "forward_rnn", "backward_rnn")
        layers = {f"enc.{name}.": getattr(encoder, name) for name in (*names, "my_backward_rnn", "both")}
        assert "does not say the settings of enc.backward_rnn., enc.both." in text
        assert all(found.said == {"batch_first": True} for found in find_rnns(tensors))
        _agree(tensors, words, layers)


@pytest.mark.parametrize("kind", KINDS)
def test_directions_that_go_the_other_way(kind: str, tmp_path: Path) -> None:
    forward, backward = rnn_layer(kind, go_backwards=True), rnn_layer(kind)
    both = load_keras().layers.Bidirectional(forward, backward_layer=backward, name="both")
    for _, tensors, words in _recurrent(_sequential(both), path=tmp_path):
        assert words == ["both. has go_backwards: flip its input along the time axis"]
        _agree(tensors, words, {"both.": both})


def test_directions_of_different_kinds(tmp_path: Path) -> None:
    layers = load_keras().layers
    pairs = {
        "relu": (rnn_layer("SimpleRNN", activation="relu"), rnn_layer("SimpleRNN", go_backwards=True)),
        "activations": (rnn_layer("LSTM", activation="softsign"), rnn_layer("LSTM", go_backwards=True)),
        "sizes": (rnn_layer("LSTM"), rnn_layer("LSTM", 5, go_backwards=True)),
        "kinds": (rnn_layer("GRU"), rnn_layer("LSTM", go_backwards=True)),
        "swapped": (rnn_layer("GRU", go_backwards=True), rnn_layer("LSTM")),
        "stacks": (
            layers.RNN([rnn_cell("GRU"), rnn_cell("GRU", 4)], return_sequences=True),
            layers.RNN(rnn_cell("GRU"), return_sequences=True, go_backwards=True),
        ),
        "biases": (rnn_layer("GRU", use_bias=False), rnn_layer("GRU", go_backwards=True)),
    }
    both = {f"{name}.": layers.Bidirectional(one, backward_layer=two, name=name) for name, (one, two) in pairs.items()}
    for _, tensors, words in _recurrent(_sequential(*both.values()), path=tmp_path):
        assert len([text for text in words if " is more than torch has in one module: run " in text]) == len(pairs)
        _agree(tensors, words, both)


def test_a_layer_half_of_which_torch_does_not_have(tmp_path: Path) -> None:
    layers = load_keras().layers
    both = layers.Bidirectional(rnn_layer("GRU"), backward_layer=rnn_layer("GRU", reset_after=False, go_backwards=True))
    stack = layers.RNN([rnn_cell("GRU"), rnn_cell("GRU", reset_after=False)], name="stack")
    for _, tensors, [text, *remedies] in _recurrent(_sequential(both, stack), path=tmp_path):
        assert text.startswith("left out layers that torch does not have")
        assert len([each for each in remedies if "multiplies r * h by a matrix" in each]) == 2
        assert "(reset_after=False, where torch's GRU has True of its backward_layer)" in text
        assert "stack (reset_after=False, where torch's GRU has True)" in text
        assert not find_rnns(tensors)
        assert len(tensors) == 12  # Keras's own


def _masked_layers() -> dict[str, Any]:
    layers = load_keras().layers
    return {
        "a.": rnn_layer("LSTM", name="a"),
        "b.": layers.Bidirectional(rnn_layer("GRU"), name="b"),
        "c.": rnn_layer("SimpleRNN", name="c", go_backwards=True),
    }


def test_masked_layers(tmp_path: Path) -> None:
    keras, x = load_keras(), normal(B, T, F).astype("f4")
    x[0, 1] = x[0, 3:] = x[1, :2] = 0
    for way in ("a Sequential", "a functional model", "nested"):
        made = _masked_layers()
        masks = keras.layers.Masking(name="pads")
        if way == "a functional model":
            y = start = keras.Input((T, F))
            for layer in (masks, *made.values(), keras.layers.LSTM(2, name="last"), keras.layers.RepeatVector(3)):
                y = layer(y)
            model = keras.Model(start, rnn_layer("GRU", name="free")(y))
        else:
            before = _sequential(masks, name="before") if way == "nested" else masks
            after = (keras.layers.LSTM(2, name="last"), keras.layers.RepeatVector(3), rnn_layer("GRU", name="free"))
            model = _sequential(before, *made.values(), *after)
        for _, tensors, words in _recurrent(model, path=tmp_path):
            assert sorted(text.partition(" comes after pads (Masking), ")[0] for text in words) == [*made, "last."], way
            _run_masked(tensors, words, made, x)


def _run_masked(tensors: dict[str, Any], words: list[str], layers: dict[str, Any], x: np.ndarray) -> None:
    """Follow the words: a mask, and for what goes backwards both flipped."""
    runs, mask = modules(tensors), np.any(x != 0, -1)
    for prefix, layer in layers.items():
        text = next(each for each in words if each.startswith(prefix))
        backward = "flip its input and the mask along the time axis, give mask=, " in text
        assert backward == bool(getattr(layer, "go_backwards", False))
        y, valid = np.resize(x, (B, T, layer.weights[0].shape[0])), mask
        expected = np.asarray(layer(y, mask=mask))
        if backward:
            y, valid = np.flip(y, 1), np.flip(mask, 1)
        output, _ = runs[prefix](jnp.asarray(y), mask=jnp.asarray(valid))
        assert_close(output[valid], expected[valid], atol=2e-6)
        assert not output[~valid].any()


def test_states_that_the_model_gives(tmp_path: Path) -> None:
    keras = load_keras()
    start, h = keras.Input((T, F)), keras.Input((H,))
    layer = rnn_layer("GRU", name="decoder", dropout=0.5)
    model = keras.Model([start, h], layer(start, initial_state=h, training=True))
    x, state = normal(B, T, F).astype("f4"), normal(B, H).astype("f4")
    for _, tensors, words in _recurrent(model, path=tmp_path):
        assert words == [
            "decoder. is called with initial_state: give it as hx, with the layers and directions on the first axis",
            "decoder. is called with training=True, and has dropout=0.5: what is read here drops nothing",
        ]
        output, _ = modules(tensors)["decoder."](jnp.asarray(x), hx=jnp.asarray(state)[None])
        assert_close(output, np.asarray(layer(x, initial_state=state)), atol=2e-6)


def test_variables_of_layers_that_are_not_recurrent(tmp_path: Path) -> None:
    """By the layer's name, and Keras's for the variable if its class is known; otherwise by its number."""
    keras = load_keras()

    class Scale(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.factor = self.add_weight(shape=(), name="factor")

        def call(self, x: Any) -> Any:
            return x * self.factor

    layers = keras.layers
    made = {
        "z": (layers.Dense(3, name="z"), ("kernel", "bias")),
        "y": (layers.Dense(3, use_bias=False, name="y"), ("kernel",)),
        "x": (layers.BatchNormalization(name="x"), ("gamma", "beta", "moving_mean", "moving_variance")),
        "w": (layers.LayerNormalization(name="w", scale=False), ("0",)),
        "v": (Scale(name="v"), ("0",)),
        "u": (layers.Conv1D(3, 1, name="u"), ("kernel", "bias")),
    }
    model = _sequential(*(layer for layer, _ in made.values()), rnn_layer("GRU", name="rnn"))
    for suffix, tensors, _ in _recurrent(model, ".keras", ".h5", ".weights.h5", path=tmp_path):
        others = [name for name in tensors if not name.startswith("rnn.")]
        if suffix == ".h5":  # which says every name
            assert {"w.beta", "v.factor", "x.moving_mean", "z.kernel"} <= {*others}
            assert list(dict.fromkeys(name[0] for name in others)) == [*made]
            continue
        assert {*others} == {f"{name}.{each}" for name, (_, names) in made.items() for each in names}
        if suffix == ".keras":
            assert list(dict.fromkeys(name[0] for name in others)) == [*made]
        for name, (layer, names) in made.items():
            for each, value in zip(names, layer.get_weights(), strict=True):
                assert_close(tensors[f"{name}.{each}"], value, atol=0)


def test_dropout_of_stacked_cells(tmp_path: Path) -> None:
    stack = load_keras().layers.RNN([rnn_cell("GRU"), rnn_cell("GRU", dropout=0.5)], return_sequences=True, name="s")
    for _, tensors, words in _recurrent(_sequential(stack), path=tmp_path):
        assert words == []
        [found] = find_rnns(tensors)
        assert (found.arguments["dropout"], found.assumed) == (0.0, {})
        assert found.in_training == (
            "dropout=0 and dropout=0.5 in its cells: make a module of one layer and direction for each",
        )


def test_dropout_is_named_where_training_is_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = load_keras().layers
    drop = {"dropout": 0.2, "recurrent_dropout": 0.3}
    stack = layers.RNN([rnn_cell("GRU", **drop), rnn_cell("GRU", **drop)], return_sequences=True, name="stack")
    model = _sequential(rnn_layer("LSTM", name="one", **drop), stack, rnn_layer("GRU", name="none"))
    recurrent = "recurrent_dropout=0.3: make the module with recurrent_dropout=0.3, which has one mask for all gates"
    before = "dropout=0.2: put flax's Dropout(0.2, broadcast_dims=(1,)) before it"
    [(_, tensors, words)] = _recurrent(model, ".keras", path=tmp_path)
    assert words == []
    assert {found.prefix: found.in_training for found in find_rnns(tensors)} == {
        "one.": (before, recurrent),
        "stack.": (f"{before}, and the module with dropout=0.2, variational_dropout=True", recurrent),
        "none.": (),
    }
    [path] = tmp_path.glob("*.keras")
    assert main(["inspect", str(path)]) == 0
    assert f"In training alone, the original of one. has {before}" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", "--json", str(path)]) == 0
    assert f'"in_training": [\n   "{before}",\n   "{recurrent}"\n  ]' in capsys.readouterr().out
    assert f"n training alone, the original has {recurrent}" in " ".join(scaffold(tensors).replace("#", "").split())


def test_a_class_that_is_not_kerass(tmp_path: Path) -> None:
    keras = load_keras()

    class LSTM(keras.layers.LSTM):  # which may compute anything
        pass

    class MyCell(keras.layers.LSTMCell):
        pass

    model = _sequential(LSTM(H, name="own", return_sequences=True), keras.layers.RNN(MyCell(H), name="cell"))
    [(_, tensors, [text]), (_, _, [alone])] = _recurrent(model, ".keras", ".weights.h5", path=tmp_path)
    assert "of own., cell. (whose cell is named my_cell), but weights alone: " in alone
    assert "own (LSTM that is not Keras's)" in text
    assert "cell (MyCell of 4 gates)" in text
    assert not find_rnns(tensors)


def test_weights_alone_say_nothing(tmp_path: Path) -> None:
    layers = load_keras().layers
    model = _sequential(layers.Bidirectional(rnn_layer("SimpleRNN", activation="relu"), merge_mode="sum", name="odd"))
    [(_, tensors, [text])] = _recurrent(model, ".weights.h5", path=tmp_path)
    assert text == (
        "the file does not say the settings of odd., but weights alone: jaxrnn assumes Keras's default activations, "
        "go_backwards=False, no mask, merge_mode='concat'; read a file of model.save(path) instead, or compare the "
        "outputs with Keras's"
    )
    [found] = find_rnns(tensors)
    assert found.said == {"batch_first": True}
    assert found.assumed == {"nonlinearity": "tanh"}


def test_a_transposed_convolution_as_flaxs(tmp_path: Path) -> None:
    """Its kernel may fit Flax's layer without a word, where inputs are as many as outputs."""
    up = load_keras().layers.Conv1DTranspose(F, 3, name="up")
    for _, tensors, words in _recurrent(_sequential(up, rnn_layer("GRU", name="gru")), path=tmp_path):
        [text] = words
        assert text.startswith("up: a transposed convolution's kernel is reversed, with outputs before inputs")
        assert text.endswith("make it as Flax's ConvTranspose(..., transpose_kernel=True)")
        ours = nnx.ConvTranspose(F, F, (3,), padding="VALID", transpose_kernel=True, rngs=nnx.Rngs(0))
        assert jaxrnn.load_state_dict(ours, tensors, prefix="up.") == ([], [])
        x = normal(B, T, F).astype("f4")
        assert_close(ours(jnp.asarray(x)), np.asarray(up(x)), atol=1e-5)
