"""Keras's files: recurrent layers in them have torch's weights, and compute in ours what they compute in Keras."""

import io
import json
import os
import random
import re
import time
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
from memory import memory_to_refuse

import jaxrnn
from jaxrnn.checkpoint import CheckpointError, find_rnns, load
from jaxrnn.checkpoint.formats.keras import _config
from jaxrnn.checkpoint.formats.keras_config import CALL

pytest.importorskip("pyfive", reason="pyfive is not installed")
h5py = pytest.importorskip("h5py", reason="h5py, which writes files, is not installed")
F, H = 2, 3
GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}
UNKNOWN = "jaxrnn does not know what it does: compare the outputs with the original's"
MASK = "which may mask steps: if it masks the ends of rows alone, give lengths=, and take h_n for the last output"
weights_alone = pytest.mark.filterwarnings("ignore:.*weights alone")


def _arrays(kind: str, features: int = F, bias: bool = True) -> list[np.ndarray]:
    columns = GATES[kind] * H
    shapes = [(features, columns), (H, columns), (2, columns) if kind == "GRU" else (columns,)]
    return [normal(*shape, seed=i).astype("f4") for i, shape in enumerate(shapes[: 2 + bias])]


def _hdf5(groups: dict[str, list[np.ndarray]], config: Any = None, names: dict[str, str] | None = None) -> bytes:
    """A file with numbered arrays in groups of Keras 3, or named ones where a group is not called vars."""
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        for group, arrays in groups.items():
            leaves = "012" if group.endswith("vars") else ("kernel:0", "recurrent_kernel:0", "bias:0")
            for leaf, array in zip(leaves, arrays, strict=False):
                opened[f"{group}/{leaf}"] = array
        for group, name in (names or {}).items():
            opened.require_group(group).attrs["name"] = name
        if config is not None:
            opened.attrs["model_config"] = json.dumps(config)
    return file.getvalue()


def _saved(tmp_path: Path, data: bytes, name: str = "model.h5") -> Path:
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def _layer(kind: str, name: str, class_name: str = "", **settings: Any) -> dict[str, Any]:
    return {"class_name": class_name or kind, "config": {"name": name, "units": H, **settings}}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_file_that_keras_writes(tmp_path: Path) -> None:
    os.environ["KERAS_BACKEND"] = "jax"
    keras = pytest.importorskip("keras")
    from keras import layers

    with jax.numpy_dtype_promotion("standard"):
        recurrent = [
            layers.LSTM(4, return_sequences=True, name="first"),
            layers.Bidirectional(layers.GRU(5, return_sequences=True), name="both"),
            layers.RNN(layers.SimpleRNNCell(3, use_bias=False), return_sequences=True, name="plain"),
        ]
        model = keras.Sequential([keras.Input((None, F)), *recurrent, layers.Dense(2, name="head")])
        for layer in model.layers:
            layer.set_weights([normal(*w.shape, seed=i).astype("f4") for i, w in enumerate(layer.get_weights())])
        x = normal(2, 6, F).astype("f4")
        expected = {}
        for layer in recurrent:
            expected[f"{layer.name}."] = x, np.asarray(x := layer(x))
    for name in ("model.keras", "model.weights.h5", "model.h5"):
        (model.save_weights if "weights" in name else model.save)(tmp_path / name)
        tensors = load(tmp_path / name)
        found = {rnn.prefix: rnn for rnn in find_rnns(tensors)}
        assert found.keys() == expected.keys(), name
        for prefix, (x, output) in expected.items():
            rnn = found[prefix]
            params = {key: tensors[prefix + key] for key in rnn.spec.shapes()}
            assert rnn.spec.batch_first
            axes = (0, 1) if rnn.spec.batch_first else (1, 0)
            ours = jaxrnn.apply(rnn.spec, params, np.moveaxis(x, axes, (0, 1)))[0]
            assert_close(np.moveaxis(ours, (0, 1), axes), output, atol=2e-6)


KERAS_3 = {
    "layers/lstm_1/cell/vars": _arrays("LSTM"),
    "layers/bidirectional/forward_layer/cell/vars": _arrays("GRU"),
    "layers/bidirectional/backward_layer/cell/vars": _arrays("GRU"),
    "layers/functional/layers/simple_rnn/cell/vars": _arrays("SimpleRNN", bias=False),
    "encoder/lstm/cell/vars": _arrays("LSTM"),
    "layers/dense/vars": [normal(3, 3)],
    "optimizer/vars": [normal(2)],
}


@weights_alone
def test_names_are_those_of_layers_and_attributes(tmp_path: Path) -> None:
    names = {"layers/lstm_1/vars": "tagger", "encoder/lstm/vars": "lstm_7", "layers/bidirectional/vars": "both"}
    tensors = load(_saved(tmp_path, _hdf5(KERAS_3, names=names)))
    found = {rnn.prefix: (rnn.class_name, rnn.bidirectional, rnn.bias) for rnn in find_rnns(tensors)}
    assert found == {
        "tagger.": ("LSTM", False, True),
        "both.": ("GRU", True, True),
        "functional.simple_rnn.": ("RNN", False, False),
        "encoder.lstm.": ("LSTM", False, True),
    }
    assert [name for name in tensors if "_l0" not in name] == ["layers.dense.0"]


def test_a_convolutional_cell_is_named(tmp_path: Path) -> None:
    arrays = [normal(3, F, 4 * H), normal(3, H, 4 * H), normal(4 * H)]
    with pytest.warns(UserWarning, match=r"left out layers .*: layers\.conv_lstm1d\.cell \(a recurrent cell with conv"):
        assert find_rnns(load(_saved(tmp_path, _hdf5({"layers/conv_lstm1d/cell/vars": arrays})))) == []


@weights_alone
def test_names_in_files_of_keras_2(tmp_path: Path) -> None:
    groups = {
        "model_weights/lstm_1/lstm_1/lstm_cell_3": _arrays("LSTM"),
        "model_weights/both/both/forward_gru/gru_cell_4": _arrays("GRU"),
        "model_weights/both/both/backward_gru/gru_cell_5": _arrays("GRU"),
        "model_weights/inner/a/lstm_cell": _arrays("LSTM"),
        "model_weights/inner/b/lstm_cell": _arrays("LSTM"),
        "model_weights/old/old": _arrays("SimpleRNN"),
    }
    found = find_rnns(load(_saved(tmp_path, _hdf5(groups))))
    prefixes = [(rnn.prefix, rnn.bidirectional) for rnn in found]
    assert sorted(prefixes) == [
        ("both.", True), ("inner.a.", False), ("inner.b.", False), ("lstm_1.", False), ("old.", False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("LSTM", {"recurrent_activation": "hard_sigmoid"}, r"left out.*: odd \(recurrent_activation=hard_sigmoid\)$"),
        ("LSTM", {"activation": "relu"}, r"left out.*: odd \(activation=relu\)$"),
        ("GRU", {"reset_after": False}, r"left out.*: odd \(reset_after=False, where torch's GRU has True\)$"),
        ("LSTM", {"class_name": "PeepholeLSTM"}, r"left out.*: odd \(PeepholeLSTM of 4 gates\)$"),
        ("LSTM", {"go_backwards": True}, r"odd\. has go_backwards: flip its input along the time axis$"),
        ("SimpleRNN", {"activation": "relu"}, r"odd\. has relu.*with nonlinearity='relu'$"),
    ],
)
def test_what_weights_do_not_hold_is_said(kind: str, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = {"class_name": "Sequential", "config": {"layers": [_layer(kind, "odd", **settings)]}}
    path = _saved(tmp_path, _hdf5({"model_weights/odd/odd/cell": _arrays(kind)}, config))
    with pytest.warns(UserWarning, match=words) as caught:
        tensors = load(path)
    assert caught[0].filename == __file__
    assert len(find_rnns(tensors)) == ("left out" not in words)


@weights_alone
def test_a_layer_of_cudnn_is_left_out(tmp_path: Path) -> None:
    arrays = [*_arrays("LSTM", bias=False), normal(8 * H)]
    groups = {"cu_dnnlstm_1/cu_dnnlstm_1": arrays, "lstm_1/lstm_1": _arrays("LSTM")}
    with pytest.warns(UserWarning, match=r"left out.*: cu_dnnlstm_1 \(CuDNNLSTM's layout\)"):
        assert [rnn.prefix for rnn in find_rnns(load(_saved(tmp_path, _hdf5(groups))))] == ["lstm_1."]


def test_halves_that_are_not_concatenated(tmp_path: Path) -> None:
    layer = {
        "class_name": "Bidirectional",
        "config": {"name": "both", "merge_mode": "sum", "layer": _layer("LSTM", "lstm")},
    }
    config = {"class_name": "Sequential", "config": [layer]}
    groups = {f"model_weights/both/both/{each}_lstm/cell": _arrays("LSTM") for each in ("forward", "backward")}
    with pytest.warns(UserWarning, match=r"both\. has merge_mode=sum"):
        [found] = find_rnns(load(_saved(tmp_path, _hdf5(groups, config))))
    assert found.bidirectional


def _read(tmp_path: Path, groups: dict[str, list[np.ndarray]], config: Any) -> tuple[dict[str, Any], list[str]]:
    """The modules found by prefix, and what was said."""
    path = _saved(tmp_path, _hdf5(groups, config))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = {rnn.prefix: rnn for rnn in find_rnns(load(path))}
    return found, [str(each.message).removeprefix(f"{path}: ") for each in caught]


def _functional_2(*layers: dict[str, Any], **inputs: list[list[Any]]) -> dict[str, Any]:
    """A functional model of Keras 2: what each layer is called with."""
    nodes = [layer | {"inbound_nodes": [inputs[layer["config"]["name"]]]} for layer in layers]
    return {"class_name": "Functional", "config": {"name": "model", "layers": nodes}}


def test_masks_and_states_in_functional_models_of_keras_2(tmp_path: Path) -> None:
    layers = (
        {"class_name": "InputLayer", "config": {"name": "start"}},
        {"class_name": "Embedding", "config": {"name": "em", "mask_zero": True}},
        _layer("LSTM", "masked", return_sequences=True, time_major=False),
        _layer("GRU", "last", reset_after=True),
        _layer("GRU", "free", reset_after=True, time_major=True),
        _layer("LSTM", "given"),
    )
    config = _functional_2(
        *layers, start=[], em=[["start", 0, 0, {}]], masked=[["em", 0, 0, {}]], last=[["masked", 0, 0, {}]],
        free=[["last", 0, 0, {}]], given=[["start", 0, 0, {"mask": ["m", 0, 0]}], ["h", 0, 0, {}], ["c", 0, 0, {}]],
    )  # fmt: skip
    groups = {f"model_weights/{name}/{name}/cell": _arrays(kind) for kind, name in (
        ("LSTM", "masked"), ("GRU", "last"), ("GRU", "free"), ("LSTM", "given"),
    )}  # fmt: skip
    found, words = _read(tmp_path, groups, config)
    assert sorted(words) == [
        "given. is called with initial_state: give it as hx, with the layers and directions on the first axis",
        f"given. is called with mask=, {MASK}",
        f"last. comes after em (Embedding), {MASK}",
        f"masked. comes after em (Embedding), {MASK}",
    ]
    assert {prefix: rnn.spec.batch_first for prefix, rnn in found.items()} == {
        "masked.": True, "last.": True, "free.": False, "given.": True,
    }  # fmt: skip


CALLED = {  # what is said of an argument
    "mask": f"is called with mask=, {MASK}",
    "initial_state": "is called with initial_state: give it as hx, with the layers and directions on the first axis",
    "training": "is called with training=True, and has dropout=0.5: what is read here drops nothing",
    "constants": "is called with constants: write a jaxrnn.Cell that has them",
    "unheard_of": f"is called with unheard_of: {UNKNOWN}",
    **dict.fromkeys(("sequence", "sequences", "inputs"), ""),
}


@pytest.mark.parametrize("name", [*CALL, "unheard_of"])
@pytest.mark.parametrize("given", [True, False])
def test_arguments_of_calls(name: str, given: bool, tmp_path: Path) -> None:
    tensor = {"class_name": "__keras_tensor__", "config": {"keras_history": ["start", 0, 0]}}
    value = given if name == "training" else [tensor] if given else None
    node = {"args": [tensor], "kwargs": {name: value}}
    layer = _layer("LSTM", "a", dropout=0.5) | {"inbound_nodes": [node]}
    config = {"class_name": "Functional", "config": {"name": "model", "layers": [layer]}}
    _, words = _read(tmp_path, {"model_weights/a/a/cell": _arrays("LSTM")}, config)
    said = f"a. {CALLED[name]}" if CALLED[name] and given else ""
    assert words == ([said] if said else [f"a. is called with {name}=None: {UNKNOWN}"] if name == "unheard_of" else [])


@pytest.mark.parametrize(
    "layer",
    [
        {"class_name": "Lambda", "config": {"name": "m", "mask": "<function>"}},
        {"class_name": "ReversibleEmbedding", "config": {"name": "m", "mask_zero": True}},
        {"class_name": "Own>Masking", "config": {"name": "m"}},
    ],
)
def test_whatever_may_mask_is_named(layer: dict[str, Any], tmp_path: Path) -> None:
    name = layer["class_name"].removeprefix("Own>")
    groups = {"model_weights/a/a/cell": _arrays("LSTM")}
    config = {"class_name": "Sequential", "config": [layer, _layer("LSTM", "a")]}
    assert _read(tmp_path, groups, config)[1] == [f"a. comes after m ({name}), {MASK}"]
    ends = {"class_name": "Conv1D", "config": {"name": "c"}}  # passes no mask on
    config = {"class_name": "Sequential", "config": [layer, ends, _layer("LSTM", "a")]}
    assert _read(tmp_path, groups, config)[1] == []


def test_how_a_nested_model_is_called(tmp_path: Path) -> None:
    inner = {"class_name": "Sequential", "config": {"name": "enc", "layers": [_layer("LSTM", "a", dropout=0.5)]}}
    tensor = {"class_name": "__keras_tensor__", "config": {"keras_history": ["start", 0, 0]}}
    node = {"args": [tensor], "kwargs": {"mask": tensor, "training": True}}
    layers = [{"class_name": "InputLayer", "config": {"name": "start"}}, inner | {"inbound_nodes": [node]}]
    config = {"class_name": "Functional", "config": {"name": "model", "layers": layers}}
    _, words = _read(tmp_path, {"model_weights/enc/a/lstm_cell": _arrays("LSTM")}, config)
    assert sorted(words) == [
        "enc. is called with training=True, and has dropout=0.5: what is read here drops nothing",
        f"enc. is in enc, which is called with mask=, {MASK}",
    ]


def test_layers_in_a_class_of_ones_own_that_lists_them(tmp_path: Path) -> None:
    inner = {"class_name": "Own>Flips", "config": {"name": "f", "layers": [_layer("LSTM", "a")]}}
    config = {"class_name": "Sequential", "config": [inner]}
    _, words = _read(tmp_path, {"model_weights/f/a/lstm_cell": _arrays("LSTM")}, config)
    assert words == [
        "f. is in f (Flips), a class of your own, whose code the file does not have: compare the outputs with Keras's"
    ]


def test_a_layer_without_weights_of_its_own(tmp_path: Path) -> None:
    layers = [_layer("LSTM", "a"), _layer("LSTM", "b", go_backwards=True)]
    _, words = _read(
        tmp_path, {"model_weights/a/a/cell": _arrays("LSTM")}, {"class_name": "Sequential", "config": layers}
    )
    assert words == [
        "found no weights for b (go_backwards) of the configuration: another layer may have them, if they "
        "are shared, and its module can be called again"
    ]


def test_a_layer_made_in_another_model(tmp_path: Path) -> None:
    config = {"class_name": "Sequential", "config": [_layer("LSTM", "a", go_backwards=True)]}
    _, words = _read(tmp_path, {"model_weights/a/base/a/lstm_cell": _arrays("LSTM")}, config)
    assert words == ["a. has go_backwards: flip its input along the time axis"]


def test_a_model_in_a_time_distributed(tmp_path: Path) -> None:
    inner = {
        "class_name": "Sequential",
        "config": {"name": "sq", "layers": [_layer("SimpleRNN", "in", activation="relu")]},
    }
    layer = {"class_name": "TimeDistributed", "config": {"name": "td", "layer": inner}}
    groups = {"model_weights/td/td/sq/in/simple_rnn_cell": _arrays("SimpleRNN")}
    _, words = _read(tmp_path, groups, {"class_name": "Sequential", "config": [layer]})
    assert [text.partition(":")[0] for text in words] == [
        "td. is in a TimeDistributed", "td. has relu, which weights do not say",
    ]  # fmt: skip


@weights_alone
def test_a_cell_under_another_attribute(tmp_path: Path) -> None:
    groups, names = {"enc/my_cell/vars": _arrays("LSTM")}, {"enc/my_cell/vars": "lstm_cell_3"}
    [found] = find_rnns(load(_saved(tmp_path, _hdf5(groups, names=names))))
    assert (found.prefix, found.kind) == ("enc.my_cell.", "LSTM")


def test_names_forge_no_lines(tmp_path: Path) -> None:
    config = {"class_name": "Sequential", "config": [_layer("LSTM", "a\nb", go_backwards=True)]}
    _, [text] = _read(tmp_path, {"model_weights/a\nb/a\nb/lstm_cell": _arrays("LSTM")}, config)
    assert text.startswith("a\\nb. has go_backwards")


def test_a_gru_from_before_reset_after(tmp_path: Path) -> None:
    """Without biases its weights do not tell that it computes otherwise; its configuration does."""
    config = {"class_name": "Sequential", "config": [_layer("GRU", "old")]}
    arrays = _arrays("GRU", bias=False)
    found, [text] = _read(tmp_path, {"model_weights/old/old": arrays}, config)
    assert not found
    assert text.endswith(": old (reset_after=False, where torch's GRU has True)")
    found, [text] = _read(tmp_path, {"old/old": arrays}, None)
    assert "old." in found
    assert "assumed are Keras's default activations, go_backwards=False, no mask, reset_after=True" in text


def test_what_a_configuration_says_must_fit_the_weights(tmp_path: Path) -> None:
    config = {"class_name": "Sequential", "config": [_layer("LSTM", "a", units=7)]}
    _, [text] = _read(tmp_path, {"model_weights/a/a/cell": _arrays("LSTM")}, config)
    assert text.endswith(": a (units=7 in the configuration, and 3 in its weights)")


def _encoder(**groups: str) -> tuple[dict[str, list[np.ndarray]], dict[str, Any]]:
    """A file of Keras 3's .h5 with a layer of one's own that has these, and its configuration, which does not."""
    config = {"name": "model", "layers": [{"class_name": "Custom>Encoder", "config": {"name": "enc", "units": H}}]}
    arrays = {f"model_weights/enc/model/enc/{name}": _arrays(kind) for name, kind in groups.items()}
    return arrays, {"class_name": "Sequential", "config": config}


def test_layers_in_a_layer_of_ones_own(tmp_path: Path) -> None:
    """Two cells are two modules; what is named forward and backward may both run forward; units are not the LSTM's."""
    inside = {"lstm_cell_1": "LSTM", "lstm_cell_2": "LSTM", "forward_x/gru_cell": "GRU", "backward_x/gru_cell": "GRU"}
    found, [text] = _read(tmp_path, *_encoder(**inside, **{"my_backward_rnn/simple_rnn_cell": "SimpleRNN"}))
    assert {prefix.removeprefix("enc.model.enc."): rnn.bidirectional for prefix, rnn in found.items()} == {
        "lstm_cell_1.": False, "lstm_cell_2.": False, "forward_x.": False, "backward_x.": False,
        "my_backward_rnn.": False,
    }  # fmt: skip
    assert "or not where jaxrnn finds them: assumed are Keras's default activations" in text
    assert all(rnn.said == {"batch_first": True} for rnn in found.values())
    found, [text] = _read(tmp_path, *_encoder(**{"lstm/lstm_cell": "LSTM"}))
    assert [*found] == ["enc."]
    assert "does not say the settings of enc., or not where jaxrnn finds them" in text
    found, [text] = _read(tmp_path, *_encoder(lstm_cell="LSTM"))  # it may be a subclass of LSTM
    assert not found
    assert text.endswith(": enc (Encoder of 4 gates)")


def test_a_layer_of_the_same_name_in_a_layer_of_ones_own(tmp_path: Path) -> None:
    layers = [_layer("LSTM", "a", go_backwards=True), {"class_name": "Own", "config": {"name": "own"}}]
    inner = {"class_name": "Functional", "config": {"name": "enc", "layers": layers}}
    groups = {f"model_weights/enc/enc/{name}/lstm_cell": _arrays("LSTM") for name in ("a", "own/a")}
    _, words = _read(tmp_path, groups, {"class_name": "Sequential", "config": [inner]})
    assert words[0].startswith("the file does not say the settings of enc.enc.own.a., or not where jaxrnn finds")
    assert words[1:] == ["enc.enc.a. has go_backwards: flip its input along the time axis"]


def test_directions_that_run_the_same_way(tmp_path: Path) -> None:
    """Keras 3 refuses this; a file may say it."""
    layers = {name: _layer("LSTM", f"{name[:-6]}_a", go_backwards=True) for name in ("forward_layer", "backward_layer")}
    layer = {"name": "b", "layer": layers["forward_layer"], "backward_layer": layers["backward_layer"]}
    config = {"class_name": "Sequential", "config": [{"class_name": "Bidirectional", "config": layer}]}
    groups = {f"model_weights/b/b/{each}_a/lstm_cell": _arrays("LSTM") for each in ("forward", "backward")}
    found, [text] = _read(tmp_path, groups, config)
    assert not found
    assert text.endswith(": b (both of its directions run the same way)")
    layers["forward_layer"]["config"]["go_backwards"] = False
    assert [rnn.bidirectional for rnn in _read(tmp_path, groups, config)[0].values()] == [True]


def test_unknown_settings_are_named(tmp_path: Path) -> None:
    config = {"class_name": "Sequential", "config": [_layer("LSTM", "a", zoneout=0.1, new={"x": [1]}, on=True)]}
    _, words = _read(tmp_path, {"model_weights/a/a/cell": _arrays("LSTM")}, config)
    assert words == [f"a. has {each}: {UNKNOWN}" for each in ("zoneout=0.1", "new=None", "on")]


@pytest.mark.parametrize("container", ["layers", "_layer_checkpoint_dependencies"])
def test_layers_whose_names_are_not_in_the_file(container: str, tmp_path: Path) -> None:
    """Keras 3.0 numbers the layers of each class; Keras 2 numbers them otherwise."""
    config = {"class_name": "Sequential", "config": {"layers": [
        _layer("GRU", "gru_1", reset_after=False), _layer("LSTM", "b"), _layer("LSTM", "c", go_backwards=True),
    ]}}  # fmt: skip
    names = {"gru": "GRU", "lstm": "LSTM", "lstm_1": "LSTM"}
    groups = {f"{container}/{name}/cell/vars": _arrays(kind) for name, kind in names.items()}
    data = _zip(config_json=json.dumps(config).encode(), model_weights_h5=_hdf5(groups))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(_saved(tmp_path, data))
    words = [str(each.message).partition(": ")[2] for each in caught]
    assert words[0].endswith(": gru (reset_after=False, where torch's GRU has True)")
    if container == "layers":
        assert words[1:] == ["lstm_1. has go_backwards: flip its input along the time axis"]
    else:
        assert "does not say the settings of lstm., lstm_1." in words[1]


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [
        ("layers/a/b/cell/vars", "layers/a.b/cell/vars", r"layers\.a\.b\.cell\."),
        ("a/b.c/vars", "a.b/c/vars", r"a\.b\.c\.0"),
    ],
)
def test_groups_that_would_have_one_name(one: str, other: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        _read(tmp_path, {one: _arrays("LSTM"), other: _arrays("LSTM")}, None)
    words = rf"{one}\S* and {other}\S* are both read as {name}\nrename one of them, and save the model again"
    assert re.search(words, str(caught.value))


CONFIG = {
    "class_name": "Functional",
    "config": {"name": "model", "layers": [
        {"class_name": "InputLayer", "config": {"name": "in"}, "inbound_nodes": []},
        {"class_name": "Masking", "config": {"name": "mask"}, "inbound_nodes": [[["in", 0, 0, {}]]]},
        _layer("LSTM", "tagger", dtype={"class_name": "DTypePolicy", "config": {"name": "float32"}}),
        {"class_name": "Bidirectional", "config": {
            "name": "both", "layer": _layer("GRU", "gru", return_sequences=True), "merge_mode": "sum",
        }, "inbound_nodes": [{"args": [{"config": {"keras_history": ["mask", 0, 0]}}], "kwargs": {"mask": None}}]},
        {"class_name": "RNN", "config": {"name": "st", "cell": {
            "class_name": "StackedRNNCells", "config": {"name": "cells", "cells": [_layer("LSTMCell", "x")] * 2},
        }}},
        {"class_name": "Sequential", "config": {"name": "functional", "layers": [
            {"class_name": "TimeDistributed", "config": {"name": "td", "layer": _layer("SimpleRNN", "simple_rnn")}},
        ]}},
    ]},
}  # fmt: skip


def _changed(value: Any, numbers: random.Random) -> Any:
    """A configuration in which something is something else."""
    if numbers.random() < 0.03:
        junk = (
            None,
            True,
            -1,
            1e308,
            "",
            "layers",
            "LSTM",
            [],
            {},
            [[[]]],
            {"class_name": "RNN", "config": {}},
            ["a", 0],
        )
        return numbers.choice((*junk, value, [value], {"class_name": "Bidirectional", "config": {"layer": value}}))
    if isinstance(value, dict):
        return {name: _changed(each, numbers) for name, each in value.items()}
    return [_changed(each, numbers) for each in value] if isinstance(value, list) else value


def test_any_configuration_is_read_or_refused(tmp_path: Path) -> None:
    numbers, said = random.Random(0), set()
    names = {"layers/lstm_1/vars": "tagger", "layers/bidirectional/vars": "both"}
    groups = KERAS_3 | {
        f"layers/rnn/cell/cells/{name}/vars": _arrays("LSTM", H) for name in ("lstm_cell", "lstm_cell_1")
    }
    old = {"model_weights/both/both/forward_gru/gru_cell": _arrays("GRU"), "model_weights/st/st/x": _arrays("LSTM")}
    weights, weights_2 = _hdf5(groups, names=names), _hdf5(old)
    for i in range(150):
        config = json.dumps(_changed(CONFIG, numbers) if i else CONFIG)
        data = _zip(config_json=config.encode(), model_weights_h5=weights if i % 2 else weights_2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(_saved(tmp_path, data))
        said |= {str(each.message).partition(": ")[2][:60] for each in caught}
    assert len(said) > 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found no weights for")
def test_a_huge_configuration_takes_no_time(tmp_path: Path) -> None:
    many = [_layer("LSTM", "a") for _ in range(10_000)]
    config = {"class_name": "Sequential", "config": {"name": "a", "layers": many}}
    for depth in range(60):
        config = {"class_name": "Sequential", "config": {"name": f"a{depth}", "layers": [config]}}
    groups = {f"model_weights/a58/a/lstm_cell_{i}": _arrays("LSTM", 1) for i in range(100)}
    data = _hdf5(groups)
    start = time.perf_counter()
    with pytest.warns(UserWarning, match="does not say the settings"):
        load(_saved(tmp_path, _zip(config_json=json.dumps(config).encode(), model_weights_h5=data)))
    assert time.perf_counter() - start < 5
    with pytest.raises(CheckpointError, match="over 50000 recurrent layers"):
        _config(json.dumps({"class_name": "Sequential", "config": [_layer("LSTM", f"a{i}") for i in range(50_001)]}))


@weights_alone
def test_bfloat16(tmp_path: Path) -> None:
    file = io.BytesIO()
    arrays = [array.astype(jnp.bfloat16) for array in _arrays("LSTM")]
    with h5py.File(file, "w") as opened:
        for i, array in enumerate(arrays):
            opened.create_dataset(f"layers/lstm/cell/vars/{i}", data=array).attrs["dtype"] = "bfloat16"
    tensors = load(_saved(tmp_path, file.getvalue()))
    assert tensors["lstm.weight_hh_l0"].dtype == jnp.bfloat16
    assert_close(tensors["lstm.weight_hh_l0"], arrays[1].T, atol=0)
    tensors = load(_saved(tmp_path, _hdf5({"lstm/lstm/lstm_cell": arrays})))  # with no attribute
    assert_close(tensors["lstm.weight_hh_l0"], arrays[1].T, atol=0)


def _linked(make: Any) -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        make(opened)
    return file.getvalue()


def _cycle(file: Any) -> None:
    file.create_group("layers")
    file["layers/layers"] = file["layers"]


def _zip(**entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name.replace("_", "."), data)
    return file.getvalue()


def _dataset(*shape: int, **settings: Any) -> bytes:
    return _linked(lambda file: file.create_dataset("x", shape, "f4", **settings))


WEIGHTS = _hdf5({"layers/lstm/cell/vars": _arrays("LSTM")})
HOSTILE = {
    "truncated": (WEIGHTS[:1000], "a damaged HDF5 file"),
    "a cycle": (_linked(_cycle), "its groups contain each other"),
    "huge, not stored": (_dataset(1 << 33), "a bomb"),
    "huge, compressed": (_dataset(1 << 25, data=np.zeros(1 << 25), compression="gzip"), "in chunks or compressed"),
    "another file": (_dataset(4, external=[("/etc/passwd", 0, 16)]), "the numbers of x are in another file"),
    "another shape": (_hdf5({"layers/lstm/cell/vars": [*_arrays("LSTM")[:2], normal(7)]}), r"bias of .* is \(7,\)"),
    "no weights": (_zip(metadata_json=b"{}", config_json=b"{}"), "model.weights.h5 is missing"),
    "a damaged config": (_zip(config_json=b"{", model_weights_h5=WEIGHTS), "of the model is damaged"),
    "a deep config": (
        _zip(config_json=b"[" * 100000, model_weights_h5=WEIGHTS),
        "of the model is damaged",
    ),
    "a zip bomb": (_zip(config_json=b" " * (1 << 27), model_weights_h5=WEIGHTS), "a zip bomb"),
    "a truncated zip": (_zip(config_json=b"{}", model_weights_h5=WEIGHTS)[:-30], "truncated or damaged zip"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_and_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    data, words = HOSTILE[name]
    with pytest.raises(CheckpointError, match=rf"model\.h5: .*{words}.*\n"):
        load(_saved(tmp_path, data))


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    names = ["a cycle", "huge, not stored", "huge, compressed", "a deep config", "a zip bomb"]
    assert memory_to_refuse([_saved(tmp_path, HOSTILE[n][0], f"{n}.h5") for n in names], "pyfive") < 100_000_000


def test_links_to_other_files_are_not_followed(tmp_path: Path) -> None:
    _saved(tmp_path, WEIGHTS, "other.h5")
    link = h5py.ExternalLink(str(tmp_path / "other.h5"), "/layers")
    with pytest.raises(CheckpointError, match="a damaged HDF5 file"):
        load(_saved(tmp_path, _linked(lambda file: file.update({"outside": link}) or file)))


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    numbers, data, refused = random.Random(0), _hdf5(KERAS_3), 0
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(numbers.choice([1, 5, 30])):
            changed[numbers.randrange(8, len(data))] = numbers.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load(_saved(tmp_path, bytes(changed)))
            except CheckpointError:
                refused += 1
    assert 30 < refused < 150
