"""Every setting of Keras's recurrent layers: changed, saved, read, and run in both."""

import functools
import inspect
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from comparing import assert_close

import jaxrnn
from jaxrnn.checkpoint import find_rnns, load
from jaxrnn.checkpoint.formats.keras_config import CALL, MASKS, TABLES, UNMASKING
from jaxrnn.checkpoint.tables import Table

os.environ["KERAS_BACKEND"] = "jax"
pytest.importorskip("pyfive", reason="pyfive is not installed")
h5py = pytest.importorskip("h5py", reason="h5py, which writes files, is not installed")
pytest.importorskip("keras", reason="Keras is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
B, T, F, H = 2, 4, 2, 3
KINDS = ("SimpleRNN", "LSTM", "GRU")
ALL = {**TABLES, **MASKS}

# Of Keras 2 alone, so that this Keras cannot make a layer with them: they are put into the file.
OLD = {
    "time_major": True,
    "implementation": 2,
    "batch_input_shape": [None, T, F],
    "dynamic": True,
    "input_dim": F,
    "input_length": T,
    "reverse_state_order": True,
    "sparse": True,
    **dict.fromkeys(("module", "output_shape_module", "function_type", "output_shape_type"), "lambda"),
}
# A value that is not the default, by setting.
OTHERS: dict[str, Any] = {
    "name": "other", "trainable": False, "dtype": "mixed_float16", "units": H + 2, "seed": 3,
    "return_sequences": False, "return_state": True, "go_backwards": True, "stateful": True, "unroll": True,
    "use_cudnn": False, "zero_output_for_mask": True, "use_bias": False, "dropout": 0.5, "recurrent_dropout": 0.5,
    "activation": "relu", "recurrent_activation": "hard_sigmoid", "unit_forget_bias": False, "reset_after": False,
    "merge_mode": "sum", "mask_value": 1.0, "mask_zero": True, "input_dim": 7, "output_dim": F, "weights": None,
    "lora_rank": 2, "lora_alpha": 3, "quantization_config": None, "sparse": True,
    **dict.fromkeys([f"{each}_initializer" for each in ("kernel", "recurrent", "bias", "embeddings")], "ones"),
    **dict.fromkeys([f"{each}_regularizer" for each in ("kernel", "recurrent", "bias", "embeddings")], "l2"),
    "activity_regularizer": "l2", "tie_weights": False, "reverse_dtype": "float32", "logit_soft_cap": 1.0,
    "output_shape": (T, F), "arguments": {"scale": 1.0},
    **dict.fromkeys([f"{each}_constraint" for each in ("kernel", "recurrent", "bias", "embeddings")], "non_neg"),
}  # fmt: skip


def _keras() -> Any:
    import absl.logging
    import keras

    absl.logging.set_verbosity(absl.logging.ERROR)
    return keras


@pytest.fixture(autouse=True)
def standard() -> Iterator[None]:
    """Keras relies on promotion, and its GRU without biases on float32."""
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        yield


def _cell(kind: str, units: int = H, **settings: Any) -> Any:
    return getattr(_keras().layers, f"{kind}Cell")(units, **settings)


def _layer(kind: str, units: int = H, **settings: Any) -> Any:
    return getattr(_keras().layers, kind)(units, **{"return_sequences": True, **settings})


def _built(title: str, settings: dict[str, Any]) -> list[Any]:
    """Layers, one after the other, of which one is of this class with these settings."""
    layers = _keras().layers
    units = settings.pop("units", H)
    if title in KINDS:
        return [_layer(title, units, **settings)]
    if title.endswith("Cell"):
        return [layers.RNN(_cell(title.removesuffix("Cell"), units, **settings), return_sequences=True)]
    if title == "RNN":
        cell = settings.pop("cell", None) or _cell("LSTM")
        return [layers.RNN(cell, **{"return_sequences": True, **settings})]
    if title == "StackedRNNCells":
        policy = {"dtype": settings["dtype"]} if "dtype" in settings else {}  # Keras's own states need the same
        cells = settings.pop("cells", None) or [_cell("GRU", **policy), _cell("GRU", **policy)]
        return [layers.RNN(layers.StackedRNNCells(cells, **settings), return_sequences=True)]
    if title == "Bidirectional":
        return [layers.Bidirectional(settings.pop("layer", None) or _layer("LSTM"), **settings)]
    if title == "TimeDistributed":
        return [layers.TimeDistributed(settings.pop("layer", None) or _layer("GRU"), **settings)]
    if title == "Masking":
        return [layers.Masking(**settings), _layer("LSTM")]
    if title == "Lambda":
        function = settings.pop("function", None) or _registered()["_also_same" if "arguments" in settings else "_same"]
        return [layers.Lambda(function, **settings), _layer("LSTM")]
    assert title in ("Embedding", "ReversibleEmbedding")
    table = getattr(layers, title)(settings.pop("input_dim", 5), settings.pop("output_dim", F), **settings)
    return [table, _layer("LSTM")]


@functools.cache
def _registered() -> dict[str, Any]:
    """Functions that a file may name."""
    register = _keras().saving.register_keras_serializable("closed")
    return {each.__name__: register(each) for each in (_same, _also_same, _padded)}


def _same(x: Any) -> Any:
    return x


def _also_same(x: Any, scale: float = 1.0) -> Any:
    return x * scale


def _padded(x: Any, mask: Any = None) -> Any:
    return _keras().ops.any(_keras().ops.not_equal(x, 0), axis=-1)


def _inner(title: str, name: str) -> Any:
    """Another value for a setting that is a layer, or several."""
    layers = _keras().layers
    return {
        ("RNN", "cell"): lambda: layers.StackedRNNCells([_cell("LSTM"), _cell("LSTM")]),
        ("StackedRNNCells", "cells"): lambda: [_cell("LSTM", 4), _cell("GRU"), _cell("GRU", 5)],
        ("Bidirectional", "layer"): lambda: layers.RNN([_cell("GRU"), _cell("GRU")], return_sequences=True),
        ("Bidirectional", "backward_layer"): lambda: _layer("GRU", 4, go_backwards=True),
        ("TimeDistributed", "layer"): lambda: layers.Bidirectional(_layer("SimpleRNN")),
        ("Lambda", "function"): lambda: _registered()["_also_same"],
        ("Lambda", "mask"): lambda: _registered()["_padded"],
    }.get((title, name), lambda: OTHERS[name])()


def _input(title: str, settings: dict[str, Any]) -> np.ndarray:
    """Input with steps at the ends of rows that a mask would drop, if any layer masks."""
    if title == "TimeDistributed":
        return normal(B, 2, T, F).astype("f4")
    if "Embedding" in title:
        return np.array([[1, 2, 3, 0], [4, 1, 0, 0]], "i4")
    x = normal(B, T, F).astype("f4")
    if title in ("Masking", "Lambda"):
        x[0, 3:] = x[1, 2:] = settings.get("mask_value", 0.0)
    return x


def _model(layers: list[Any], x: np.ndarray) -> Any:
    keras = _keras()
    model = keras.Sequential([keras.Input(batch_shape=x.shape, dtype=x.dtype), *layers])
    for layer in model.layers:
        layer.set_weights([(normal(*w.shape, seed=i) / 2).astype(w.dtype) for i, w in enumerate(layer.get_weights())])
    return model


def _saved(model: Any, path: Path, settings: dict[str, Any], of: str) -> Path:
    """Save a model, and put settings into its configuration, where a layer is of a class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(path)

    def patched(node: Any) -> Any:
        if isinstance(node, list):
            return [patched(each) for each in node]
        if not isinstance(node, dict):
            return node
        node = {name: patched(value) for name, value in node.items()}
        return node | {"config": node["config"] | settings} if settings and node.get("class_name") == of else node

    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = json.dumps(patched(json.loads(file.attrs["model_config"])))
        return path
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries["config.json"] = json.dumps(patched(json.loads(entries["config.json"]))).encode()
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in sorted(entries, key="metadata.json".__ne__):
            archive.writestr(name, entries[name])
    path.write_bytes(data.getvalue())
    return path


def _loaded(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The tensors of a file, and what was said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tensors = load(path)
    return tensors, [str(each.message).removeprefix(f"{path}: ") for each in caught]


Run = Callable[..., Any]


def _modules(tensors: dict[str, Any]) -> dict[str, Run]:
    """The modules of a file, by prefix, to be called with (batch, time, features)."""
    runs: dict[str, Run] = {}
    for found in find_rnns(tensors):
        params = {name: jnp.asarray(tensors[found.prefix + name]) for name in found.spec.shapes()}

        def run(x: Any, found: Any = found, params: Any = params, **more: Any) -> Any:
            swap = not found.spec.batch_first
            output, state = jaxrnn.apply(found.spec, params, jnp.swapaxes(x, 0, 1) if swap else x, **more)
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


def _with_lengths(run: Run) -> Run:
    return functools.partial(run, lengths=jnp.array([3, 2]))


REMEDIES: dict[str, Callable[[Run], Run]] = {
    r"has go_backwards: flip its input along the time axis": _flip,
    r"has merge_mode=sum: merge the output's halves, because torch concatenates": _merge,
    r"has stateful: give each call the state that the last one returned, as hx": _stateful,
    r"has dtype=mixed_float16: make the module with the dtype in which that computes, dtype=jnp.float16 or "
    r"dtype=jnp.bfloat16": _half,
    r"is in a TimeDistributed: merge the first two axes of its input": _each_step,
    r"comes after \w+ \((Masking|Embedding|ReversibleEmbedding|Lambda)\), which may mask steps: "
    r"if it masks the ends of rows alone, give lengths=, and take h_n for the last output": _with_lengths,
    r"has relu, which weights do not say: make the module with nonlinearity='relu'": lambda run: run,  # it is said
}
AFTER = re.compile(r"is more than torch has in one module: run (.*?)(?:; run (.*) on the input flipped along the time "
                   r"axis, flip the output, and concatenate)?")  # fmt: skip


def _followed(runs: dict[str, Run], words: list[str]) -> Run:
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


def _rows() -> list[tuple[str, str]]:
    return [(title, name) for title, table in ALL.items() for name in table]


def test_tables_have_all_that_keras_has() -> None:
    layers = _keras().layers
    made = {title: each for title in ALL for each in _flat(_built(title, {})) if type(each).__name__ == title}
    assert made.keys() == ALL.keys()
    for title, layer in made.items():
        _check(ALL[title], {*layer.get_config(), *_parameters(type(layer).__init__)})
    masks = {each.__name__ for each in vars(layers).values() if inspect.isclass(each) and _makes_masks(each)}
    assert masks <= {*ALL, *PASSING}, "these may mask"
    made_of = {"RepeatVector": (2,), "Permute": ((1,),), "Reshape": ((1,),)}
    for name in UNMASKING - {"GlobalAveragePooling1D"}:  # which ends masks after using them
        sizes = 2 - name.startswith("Depthwise") if "Conv" in name else int(name.startswith(("Max", "Average")))
        layer = getattr(layers, name)(*made_of.get(name, (2,) * sizes))
        assert not layer.supports_masking, f"{name} passes masks on"
    embedding = layers.Embedding(3, 2, lora_rank=2)  # which adds keys
    _check(ALL["Embedding"], set(embedding.get_config()))
    _check(
        Table("keras.layers.Layer", {**ALL["LSTM"], "autocast": ALL["LSTM"]["dtype"]}),
        _parameters(layers.Layer.__init__),
    )
    for kind in ("RNN", "Bidirectional", *KINDS):
        _check(CALL, _parameters(getattr(layers, kind).call))
    classes = [each for each in vars(layers).values() if inspect.isclass(each)]
    recurrent = [each for each in classes if issubclass(each, layers.RNN) or each.__name__.endswith(("RNN", "Cell"))]
    known = {*TABLES, "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"}  # whose kernels are no matrices: under their own names
    assert {each.__name__ for each in recurrent} <= known


# Classes that combine or drop the masks of their inputs, and make none; the cells of ConvLSTM are not read.
PASSING = {
    *("Add", "Average", "Concatenate", "Dot", "Maximum", "Minimum", "Multiply", "Subtract", "GlobalAveragePooling1D"),
    *("AdditiveAttention", "Attention", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D", "InputSpec"),
}


def _makes_masks(layer: Any) -> bool:
    base = _keras().layers.Layer.compute_mask
    return getattr(layer, "compute_mask", base) is not base


def _flat(layers: list[Any]) -> Iterator[Any]:
    for layer in layers:
        yield layer
        inner = [getattr(layer, name, None) for name in ("cell", "layer")] + list(getattr(layer, "cells", ()))
        yield from _flat([each for each in inner if each is not None])


def _parameters(function: Any) -> set[str]:
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = inspect.signature(function).parameters.values()
    return {each.name for each in found if each.kind not in variable} - {"self"}


def _check(table: Table, settings: set[str]) -> None:
    missing = sorted(settings - table.keys())
    assert not missing, f"{table.title} has {missing}, which the table has not"


def _computed(title: str, settings: dict[str, Any]) -> tuple[Any, np.ndarray, Any]:
    """A model, its input, and its output; of a stateful one the second."""
    x = _input(title, settings)
    model = _model(_built(title, dict(settings)), x)
    outputs = [model(x) for _ in range(1 + bool(settings.get("stateful")))]
    return model, x, outputs[-1]


_plain = functools.cache(lambda title: _computed(title, {}))


@pytest.mark.parametrize(("title", "name"), _rows())
def test_a_setting_is_used_or_changes_nothing_or_is_said(title: str, name: str, tmp_path: Path) -> None:
    old = name in OLD and name not in _parameters(getattr(_keras().layers, title).__init__)
    old = old and name not in _flat_config(title)
    settings = {} if old else {name: _inner(title, name)}
    model, x, expected = _plain(title) if old else _computed(title, settings)
    for suffix in (".keras", ".h5"):
        path = _saved(model, tmp_path / f"model{suffix}", {name: OLD[name]} if old else {}, title)
        tensors, words = _loaded(path)
        if any(text.startswith("left out layers") for text in words):
            [text] = words
            assert ALL[title][name].use in ("refused", "used")
            assert f"({name}={settings[name]}" in text or name == "reset_after", text
            assert not find_rnns(tensors)
            continue
        if ALL[title][name].use == "warned":
            assert words, name
        run = _followed(_modules(tensors), words)
        output, state = run(jnp.asarray(model.layers[0](x) if "Embedding" in title else x))
        masked = title == "Masking" or "mask_zero" in settings or (title, name) == ("Lambda", "mask")
        _compare(output, state, expected, settings, (3, 2) if masked else (T, T))


def _flat_config(title: str) -> set[str]:
    return {key for each in _flat(_built(title, {})) if type(each).__name__ == title for key in each.get_config()}


def _compare(output: Any, state: Any, expected: Any, settings: dict[str, Any], lengths: tuple[int, int]) -> None:
    tolerance = 5e-3 if settings.get("dtype") == "mixed_float16" else 1e-6
    if settings.get("return_state"):
        expected, *states = expected
        for ours, theirs in zip(jax.tree.leaves(state), states, strict=True):
            assert_close(ours[0], np.asarray(theirs), atol=tolerance)
    if settings.get("return_sequences") is False:
        assert_close(jax.tree.leaves(state)[0][0], np.asarray(expected), atol=tolerance)
        return
    for row, length in enumerate(lengths):
        assert_close(output[row, :length], np.asarray(expected)[row, :length], atol=tolerance)


def _recurrent(model: Any, *suffixes: str, path: Path) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    for suffix in suffixes or (".keras", ".h5"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            name = path / f"model{suffix}"
            (model.save_weights if "weights" in suffix else model.save)(name)
        yield (suffix, *_loaded(name))


def _agree(tensors: dict[str, Any], words: list[str], layers: dict[str, Any], **more: Any) -> None:
    """Each layer computes in Keras what its module, run as the words say, computes here; and there is no other."""
    modules = _modules(tensors)
    for prefix, layer in layers.items():
        about = [text for text in words if text.startswith(f"{prefix} ")]
        features = layer.weights[0].shape[0]
        x = normal(B, T, features).astype("f4")
        some = {name: modules.pop(name) for name in list(modules) if name.startswith(prefix)}
        output, _ = _followed(some, about)(jnp.asarray(x), **more)
        cell = not hasattr(layer, "return_sequences")
        expected = _keras().layers.RNN(layer, return_sequences=True)(x) if cell else layer(x)
        assert_close(output, np.asarray(expected), atol=2e-6)
    assert not modules


def _sequential(*layers: Any, name: str | None = None) -> Any:
    model = _keras().Sequential([_keras().Input((T, F)), *layers], name=name)
    model.set_weights([(normal(*w.shape, seed=i) / 2).astype(w.dtype) for i, w in enumerate(model.get_weights())])
    return model


def test_settings_are_of_the_layer_at_the_path_not_of_one_of_the_same_name(tmp_path: Path) -> None:
    layers = _keras().layers
    inner, outer = _layer("SimpleRNN", name="enc"), _layer("SimpleRNN", name="enc", activation="relu")
    one = layers.Bidirectional(_layer("SimpleRNN", name="rnn"), name="a")
    other = layers.Bidirectional(_layer("SimpleRNN", name="rnn", activation="relu"), name="b")
    beside = _layer("SimpleRNN", name="forward_rnn", activation="relu")
    model = _sequential(_sequential(inner, name="within"), outer, one, other, beside)
    for _, tensors, words in _recurrent(model, path=tmp_path):
        [prefix] = {found.prefix for found in find_rnns(tensors)} - {"enc.", "a.", "b.", "forward_rnn."}
        assert prefix in ("within.enc.", "within.")
        assert sorted(text.partition(" has relu")[0] for text in words) == ["b.", "enc.", "forward_rnn."]
        _agree(tensors, words, {prefix: inner, "enc.": outer, "a.": one, "b.": other, "forward_rnn.": beside})


def test_no_two_layers_take_one_name(tmp_path: Path) -> None:
    nested, dotted = _layer("LSTM", name="lstm"), _layer("LSTM", name="enc.lstm")
    model = _sequential(_sequential(nested, name="enc"), dotted)
    for suffix, tensors, words in _recurrent(model, ".keras", ".h5", ".weights.h5", path=tmp_path):
        if suffix == ".h5":
            _agree(tensors, words, {"enc.lstm.": dotted, "enc.": nested})
            continue
        assert (
            "several layers are named enc.lstm: of these, layers.lstm, layers.sequential.layers.lstm are read by their "
            "paths in the file"
        ) in words
        _agree(tensors, words, {"layers.lstm.": dotted, "layers.sequential.layers.lstm.": nested})


def test_an_attribute_with_the_name_of_another_layer(tmp_path: Path) -> None:
    keras = _keras()

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.out_rnn, self.gru = _layer("GRU", name="gru"), _layer("GRU", name="gru_1")

        def call(self, x: Any) -> Any:
            return self.out_rnn(self.gru(x))

    model = Model()
    model(normal(B, T, F).astype("f4"))
    for suffix, tensors, words in _recurrent(model, ".keras", ".h5", ".weights.h5", path=tmp_path):
        assert any("does not say the settings of" in text for text in words)
        gru = "gru_1." if suffix == ".h5" else "gru."
        _agree(tensors, words, {"gru." if suffix == ".h5" else "layers.gru.": model.out_rnn, gru: model.gru})


def test_layers_in_a_layer_of_ones_own(tmp_path: Path) -> None:
    keras = _keras()

    class Encoder(keras.layers.Layer):
        def __init__(self, units: int = H, **settings: Any) -> None:
            super().__init__(**settings)
            self.units = units
            self.lstm_cell_1, self.lstm_cell_2 = _cell("LSTM"), _cell("LSTM")
            self.forward_rnn1, self.forward_rnn2 = _layer("LSTM"), _layer("LSTM")
            self.forward_rnn, self.backward_rnn = _layer("GRU"), _layer("GRU")
            self.my_backward_rnn, self.both = _layer("SimpleRNN"), keras.layers.Bidirectional(_layer("GRU"))

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
    forward, backward = _layer(kind, go_backwards=True), _layer(kind)
    both = _keras().layers.Bidirectional(forward, backward_layer=backward, name="both")
    for _, tensors, words in _recurrent(_sequential(both), path=tmp_path):
        assert words == ["both. has go_backwards: flip its input along the time axis"]
        _agree(tensors, words, {"both.": both})


def test_directions_of_different_kinds(tmp_path: Path) -> None:
    layers = _keras().layers
    pairs = {
        "relu": (_layer("SimpleRNN", activation="relu"), _layer("SimpleRNN", go_backwards=True)),
        "sizes": (_layer("LSTM"), _layer("LSTM", 5, go_backwards=True)),
        "kinds": (_layer("GRU"), _layer("LSTM", go_backwards=True)),
        "swapped": (_layer("GRU", go_backwards=True), _layer("LSTM")),
        "stacks": (
            layers.RNN([_cell("GRU"), _cell("GRU", 4)], return_sequences=True),
            layers.RNN(_cell("GRU"), return_sequences=True, go_backwards=True),
        ),
        "biases": (_layer("GRU", use_bias=False), _layer("GRU", go_backwards=True)),
    }
    both = {f"{name}.": layers.Bidirectional(one, backward_layer=two, name=name) for name, (one, two) in pairs.items()}
    for _, tensors, words in _recurrent(_sequential(*both.values()), path=tmp_path):
        assert len([text for text in words if " is more than torch has in one module: run " in text]) == len(pairs)
        _agree(tensors, words, both)


def test_a_layer_half_of_which_torch_does_not_have(tmp_path: Path) -> None:
    layers = _keras().layers
    both = layers.Bidirectional(_layer("LSTM"), backward_layer=_layer("LSTM", activation="relu", go_backwards=True))
    stack = layers.RNN([_cell("GRU"), _cell("GRU", reset_after=False)], name="stack")
    for _, tensors, [text] in _recurrent(_sequential(both, stack), path=tmp_path):
        assert text.startswith("left out layers that torch does not have")
        assert "(activation=relu of its backward_layer)" in text
        assert "stack (reset_after=False, where torch's GRU has True)" in text
        assert not find_rnns(tensors)
        assert len(tensors) == 12  # Keras's own


def _masked_layers() -> dict[str, Any]:
    layers = _keras().layers
    return {
        "a.": _layer("LSTM", name="a"),
        "b.": layers.Bidirectional(_layer("GRU"), name="b"),
        "c.": _layer("SimpleRNN", name="c", go_backwards=True),
    }


def test_masked_layers(tmp_path: Path) -> None:
    keras, x = _keras(), normal(B, T, F).astype("f4")
    x[0, 3:] = x[1, 2:] = 0
    for way in ("a Sequential", "a functional model", "nested"):
        made = _masked_layers()
        masks = keras.layers.Masking(name="pads")
        if way == "a functional model":
            y = start = keras.Input((T, F))
            for layer in (masks, *made.values(), keras.layers.LSTM(2, name="last"), keras.layers.RepeatVector(3)):
                y = layer(y)
            model = keras.Model(start, _layer("GRU", name="free")(y))
        else:
            before = _sequential(masks, name="before") if way == "nested" else masks
            after = (keras.layers.LSTM(2, name="last"), keras.layers.RepeatVector(3), _layer("GRU", name="free"))
            model = _sequential(before, *made.values(), *after)
        for _, tensors, words in _recurrent(model, path=tmp_path):
            assert sorted(text.partition(" comes after pads (Masking), ")[0] for text in words) == [*made, "last."], way
            _run_masked(tensors, words, made, x)


def _run_masked(tensors: dict[str, Any], words: list[str], layers: dict[str, Any], x: np.ndarray) -> None:
    """Follow the words: lengths, and for what goes backwards valid steps reversed."""
    runs, mask, lengths = _modules(tensors), np.any(x != 0, -1), [3, 2]
    for prefix, layer in layers.items():
        text = next(each for each in words if each.startswith(prefix))
        y = np.resize(x, (B, T, layer.weights[0].shape[0]))
        backward = "reverse the valid steps of each row, give lengths=" in text
        assert backward == bool(getattr(layer, "go_backwards", False))
        inputs = y.copy()
        for row, length in enumerate(lengths):
            inputs[row, :length] = y[row, length - 1 :: -1] if backward else y[row, :length]
        output, _ = runs[prefix](jnp.asarray(inputs), lengths=jnp.array(lengths))
        expected = np.asarray(layer(y, mask=mask))
        for row, length in enumerate(lengths):
            theirs = expected[row, T - length :] if backward else expected[row, :length]
            assert_close(output[row, :length], theirs, atol=2e-6)


def test_states_that_the_model_gives(tmp_path: Path) -> None:
    keras = _keras()
    start, h = keras.Input((T, F)), keras.Input((H,))
    layer = _layer("GRU", name="decoder", dropout=0.5)
    model = keras.Model([start, h], layer(start, initial_state=h, training=True))
    x, state = normal(B, T, F).astype("f4"), normal(B, H).astype("f4")
    for _, tensors, words in _recurrent(model, path=tmp_path):
        assert words == [
            "decoder. is called with initial_state: give it as hx, with the layers and directions on the first axis",
            "decoder. is called with training=True, and has dropout=0.5: what is read here drops nothing",
        ]
        output, _ = _modules(tensors)["decoder."](jnp.asarray(x), hx=jnp.asarray(state)[None])
        assert_close(output, np.asarray(layer(x, initial_state=state)), atol=2e-6)


def test_a_class_that_is_not_kerass(tmp_path: Path) -> None:
    keras = _keras()

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
    layers = _keras().layers
    model = _sequential(layers.Bidirectional(_layer("SimpleRNN", activation="relu"), merge_mode="sum", name="odd"))
    [(_, tensors, [text])] = _recurrent(model, ".weights.h5", path=tmp_path)
    assert text == (
        "the file does not say the settings of odd., but weights alone: assumed are Keras's default activations, "
        "go_backwards=False, no mask, merge_mode='concat'; read a file of model.save(path) instead, or compare the "
        "outputs with Keras's"
    )
    [found] = find_rnns(tensors)
    assert found.said == {"batch_first": True}
    assert found.assumed == {"nonlinearity": "tanh"}
