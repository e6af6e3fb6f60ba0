"""Every setting of Keras's recurrent layers: changed, saved, read, and run in both."""

import functools
import inspect
import io
import json
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from comparing import assert_close
from keras_models import KINDS, MARKS, B, F, H, T, followed, h5py, load_keras, modules, rnn_cell, rnn_layer, set_numbers
from reading import apply, loaded, of_guide

from jaxrnn.checkpoint.formats.keras_config import CALL, MASKS, TABLES, UNMASKING
from jaxrnn.checkpoint.tables import Table

pytest_plugins = "shared_fixtures"
pytestmark = MARKS
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


def _built(title: str, settings: dict[str, Any]) -> list[Any]:
    """Layers, one after the other, of which one is of this class with these settings."""
    layers = load_keras().layers
    units = settings.pop("units", H)
    if title in KINDS:
        return [rnn_layer(title, units, **settings)]
    if title.endswith("Cell"):
        return [layers.RNN(rnn_cell(title.removesuffix("Cell"), units, **settings), return_sequences=True)]
    if title == "RNN":
        cell = settings.pop("cell", None) or rnn_cell("LSTM")
        return [layers.RNN(cell, **{"return_sequences": True, **settings})]
    if title == "StackedRNNCells":
        policy = {"dtype": settings["dtype"]} if "dtype" in settings else {}  # Keras's own states need the same
        cells = settings.pop("cells", None) or [rnn_cell("GRU", **policy), rnn_cell("GRU", **policy)]
        return [layers.RNN(layers.StackedRNNCells(cells, **settings), return_sequences=True)]
    if title == "Bidirectional":
        return [layers.Bidirectional(settings.pop("layer", None) or rnn_layer("LSTM"), **settings)]
    if title == "TimeDistributed":
        return [layers.TimeDistributed(settings.pop("layer", None) or rnn_layer("GRU"), **settings)]
    if title == "Masking":
        return [layers.Masking(**settings), rnn_layer("LSTM")]
    if title == "Lambda":
        function = settings.pop("function", None) or _registered()["_also_same" if "arguments" in settings else "_same"]
        return [layers.Lambda(function, **settings), rnn_layer("LSTM")]
    assert title in ("Embedding", "ReversibleEmbedding")
    table = getattr(layers, title)(settings.pop("input_dim", 5), settings.pop("output_dim", F), **settings)
    return [table, rnn_layer("LSTM")]


@functools.cache
def _registered() -> dict[str, Any]:
    """Functions that a file may name."""
    register = load_keras().saving.register_keras_serializable("closed")
    return {each.__name__: register(each) for each in (_same, _also_same, _padded)}


def _same(x: Any) -> Any:
    return x


def _also_same(x: Any, scale: float = 1.0) -> Any:
    return x * scale


def _padded(x: Any, mask: Any = None) -> Any:
    return load_keras().ops.any(load_keras().ops.not_equal(x, 0), axis=-1)


def _inner(title: str, name: str) -> Any:
    """Another value for a setting that is a layer, or several."""
    layers = load_keras().layers
    return {
        ("RNN", "cell"): lambda: layers.StackedRNNCells([rnn_cell("LSTM"), rnn_cell("LSTM")]),
        ("StackedRNNCells", "cells"): lambda: [rnn_cell("LSTM", 4), rnn_cell("GRU"), rnn_cell("GRU", 5)],
        ("Bidirectional", "layer"): lambda: layers.RNN([rnn_cell("GRU"), rnn_cell("GRU")], return_sequences=True),
        ("Bidirectional", "backward_layer"): lambda: rnn_layer("GRU", 4, go_backwards=True),
        ("TimeDistributed", "layer"): lambda: layers.Bidirectional(rnn_layer("SimpleRNN")),
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
    keras = load_keras()
    model = keras.Sequential([keras.Input(batch_shape=x.shape, dtype=x.dtype), *layers])
    for layer in model.layers:
        set_numbers(layer)
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


def _rows() -> list[tuple[str, str]]:
    return [(title, name) for title, table in ALL.items() for name in table]


def test_tables_have_all_that_keras_has() -> None:
    layers = load_keras().layers
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
    base = load_keras().layers.Layer.compute_mask
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
    old = name in OLD and name not in _parameters(getattr(load_keras().layers, title).__init__)
    old = old and name not in _flat_config(title)
    settings = {} if old else {name: _inner(title, name)}
    model, x, expected = _plain(title) if old else _computed(title, settings)
    for suffix in (".keras", ".h5"):
        path = _saved(model, tmp_path / f"model{suffix}", {name: OLD[name]} if old else {}, title)
        tensors, words = loaded(path)
        if any(text.startswith("left out layers") for text in words):
            [text, remedy] = words
            assert name == "reset_after"
            assert "(reset_after=False, where torch's GRU has True)" in text
            output, state = _follow_reset_before(remedy, tensors, x)
            _compare(output, state, expected, settings, (T, T))
            continue
        if ALL[title][name].use == "warned":
            assert words, name
        run = followed(modules(tensors), words)
        output, state = run(jnp.asarray(model.layers[0](x) if "Embedding" in title else x))
        masked = title == "Masking" or "mask_zero" in settings or (title, name) == ("Lambda", "mask")
        _compare(output, state, expected, settings, (3, 2) if masked else (T, T))


def _follow_reset_before(remedy: str, tensors: dict[str, Any], x: np.ndarray) -> Any:
    """Run the cell of the guide with the arrays of the one layer that is left out."""
    assert remedy.endswith(
        " multiplies r * h by a matrix within its step: write a jaxrnn.Cell with that matrix, as "
        "examples/other_libraries.md does"
    )
    names = ("kernel", "recurrent_kernel", "bias")
    arrays = {name: next(each for key, each in tensors.items() if key.endswith(f".{name}")) for name in names}
    spec, params = of_guide("other_libraries.md", "of_keras")(**arrays)
    return apply(spec, params, jnp.asarray(x))


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
