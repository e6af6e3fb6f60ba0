"""Keras's files: recurrent layers in them have torch's weights, and compute in ours what they compute in Keras."""

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from comparing import assert_close
from keras_files import KERAS_3, F, H, around, h5py, hdf5, keras_zip, layer, layer_arrays, sequential
from memory import memory_to_refuse
from reading import loaded

from jaxrnn.checkpoint import CheckpointError, find_rnns, load
from jaxrnn.checkpoint.formats.keras import _config
from jaxrnn.checkpoint.formats.keras_config import CALL

pytest.importorskip("pyfive", reason="pyfive is not installed")
pytestmark = pytest.mark.libraries
UNKNOWN = "jaxrnn does not know what it does: compare the outputs with the original's"
MASK = (
    "which may mask steps: give mask=, True at valid steps, and take h_n for the last output; at a masked step the "
    "output is 0, where Keras repeats the one before"
)
weights_alone = pytest.mark.filterwarnings("ignore:.*weights alone")


def _saved(tmp_path: Path, data: bytes, name: str = "model.h5") -> Path:
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


@weights_alone
def test_names_are_those_of_layers_and_attributes(tmp_path: Path) -> None:
    names = {"layers/lstm_1/vars": "tagger", "encoder/lstm/vars": "lstm_7", "layers/bidirectional/vars": "both"}
    tensors = load(_saved(tmp_path, hdf5(KERAS_3, names=names)))
    found = {rnn.prefix: (rnn.class_name, rnn.bidirectional, rnn.bias) for rnn in find_rnns(tensors)}
    assert found == {
        "tagger.": ("LSTM", False, True),
        "both.": ("GRU", True, True),
        "functional.simple_rnn.": ("RNN", False, False),
        "encoder.lstm.": ("LSTM", False, True),
    }
    assert [name for name in tensors if "_l0" not in name] == ["dense.kernel"]


def test_a_convolutional_cell_is_named(tmp_path: Path) -> None:
    arrays = [normal(3, F, 4 * H), normal(3, H, 4 * H), normal(4 * H)]
    with pytest.warns(UserWarning, match=r"left out layers .*: layers\.conv_lstm1d\.cell \(a recurrent cell with conv"):
        assert find_rnns(load(_saved(tmp_path, hdf5({"layers/conv_lstm1d/cell/vars": arrays})))) == []


@weights_alone
def test_names_in_files_of_keras_2(tmp_path: Path) -> None:
    groups = {
        "model_weights/lstm_1/lstm_1/lstm_cell_3": layer_arrays("LSTM"),
        "model_weights/both/both/forward_gru/gru_cell_4": layer_arrays("GRU"),
        "model_weights/both/both/backward_gru/gru_cell_5": layer_arrays("GRU"),
        "model_weights/inner/a/lstm_cell": layer_arrays("LSTM"),
        "model_weights/inner/b/lstm_cell": layer_arrays("LSTM"),
        "model_weights/old/old": layer_arrays("SimpleRNN"),
    }
    found = find_rnns(load(_saved(tmp_path, hdf5(groups))))
    prefixes = [(rnn.prefix, rnn.bidirectional) for rnn in found]
    assert sorted(prefixes) == [
        ("both.", True), ("inner.a.", False), ("inner.b.", False), ("lstm_1.", False), ("old.", False),
    ]  # fmt: skip


@weights_alone
def test_a_layer_of_cudnn_is_left_out(tmp_path: Path) -> None:
    arrays = [*layer_arrays("LSTM", bias=False), normal(8 * H)]
    groups = {"cu_dnnlstm_1/cu_dnnlstm_1": arrays, "lstm_1/lstm_1": layer_arrays("LSTM")}
    with pytest.warns(UserWarning, match=r"left out.*: cu_dnnlstm_1 \(CuDNNLSTM's layout\)"):
        assert [rnn.prefix for rnn in find_rnns(load(_saved(tmp_path, hdf5(groups))))] == ["lstm_1."]


def _read(tmp_path: Path, groups: dict[str, list[np.ndarray]], config: Any) -> tuple[dict[str, Any], list[str]]:
    """The modules found by prefix, and what was said."""
    tensors, words = loaded(tmp_path / "model.h5", hdf5(groups, config))
    return {rnn.prefix: rnn for rnn in find_rnns(tensors)}, words


def _both(merge_mode: str = "concat", **go_backwards: bool) -> dict[str, Any]:
    layers = {name: layer("LSTM", f"{name[:-6]}_a", go_backwards=way) for name, way in go_backwards.items()}
    halves = {"layer": layers["forward_layer"], "backward_layer": layers["backward_layer"]} if layers else {}
    return around("Bidirectional", "b", merge_mode=merge_mode, **(halves or {"layer": layer("LSTM", "a")}))


def _other(cell: str) -> str:
    words = "has other activations, which weights do not say: make the module as jaxrnn.Recurrent(cell, ...) with the"
    return f"a. {words} cell that find_rnns gives, {cell}"


_TENSOR = around("__keras_tensor__", "x", keras_history=["start", 0, 0])
_TRAINED = {"inbound_nodes": [{"args": [_TENSOR], "kwargs": {"mask": _TENSOR, "training": True}}]}
_FLIP, _LEFT = "has go_backwards: flip its input along the time axis", "left out layers that torch does not have"
_BEFORE = (
    "multiplies r * h by a matrix within its step: write a jaxrnn.Cell with that matrix, as "
    "examples/other_libraries.md does"
)
_HALVES = {"b/b/forward_a/lstm_cell": "LSTM", "b/b/backward_a/lstm_cell": "LSTM"}
_A, _ENC = {"a/a/cell": "LSTM"}, {"enc/a/lstm_cell": "LSTM"}
_MASKING = {
    "Lambda": around("Lambda", "m", mask="<function>"),
    "ReversibleEmbedding": around("ReversibleEmbedding", "m", mask_zero=True),
    "Masking": around("Own>Masking", "m"),
}
# What weights do not hold: the groups of a file, the layers of its configuration, and what is said.
SAID: dict[str, tuple[dict[str, str], list[dict[str, Any]], list[str]]] = {
    "an activation of one's own": (
        _A,
        [layer("LSTM", "a", recurrent_activation="x")],
        [
            f"{_LEFT}.*: a (recurrent_activation=x)",
            "a has an activation that jaxrnn does not know: read its arrays with DIALECTS['keras', 'LSTM'] of "
            "jaxrnn.checkpoint.dialects, and make its cell with jaxrnn.lstm_cell(recurrent_activation=yours)",
        ],
    ),
    "another activation": (_A, [layer("LSTM", "a", activation="relu")], [_other("lstm_cell(activation='relu')")]),
    "no activation": (
        {"a/a/cell": "SimpleRNN"},
        [layer("SimpleRNN", "a", activation=None)],
        [_other("rnn_cell(activation='linear')")],
    ),
    "a layer as activation": (
        _A,
        [layer("LSTM", "a", activation=around("LeakyReLU", "x", negative_slope=0.3))],
        [_other("lstm_cell(activation=LeakyRelu(alpha=0.3))")],
    ),
    "hard_sigmoid of nobody knows which Keras": (
        {"a/a/cell": "GRU"},
        [layer("GRU", "a", recurrent_activation="hard_sigmoid", reset_after=True)],
        [
            _other("gru_cell(recurrent_activation=HardSigmoid(alpha=0.2, beta=0.5))"),
            "a. has hard_sigmoid, and the file does not say its keras_version: jaxrnn assumes that of Keras 2; for "
            "that of Keras 3 make the cell with 'hard_sigmoid' in place of HardSigmoid(alpha=0.2, beta=0.5)",
        ],
    ),
    "reset_after": (
        {"a/a/cell": "GRU"},
        [layer("GRU", "a", reset_after=False)],
        [f"{_LEFT}.*: a (reset_after=False, where torch's GRU has True)", f"a {_BEFORE}"],
    ),
    "another class": (_A, [layer("LSTM", "a", "PeepholeLSTM")], [f"{_LEFT}.*: a (PeepholeLSTM of 4 gates)"]),
    "units": (_A, [layer("LSTM", "a", units=7)], [f"{_LEFT}.*: a (units=7 in the configuration, .*)"]),
    "go_backwards": (_A, [layer("LSTM", "a", go_backwards=True)], [f"a. {_FLIP}"]),
    "relu": (
        {"a/a/cell": "SimpleRNN"},
        [layer("SimpleRNN", "a", activation="relu")],
        ["a. has relu, which weights do not say: make the module with nonlinearity='relu'"],
    ),
    "settings that nobody knows": (
        _A,
        [layer("LSTM", "a", zoneout=0.1, new={"x": [1]}, on=True)],
        [f"a. has {each}: {UNKNOWN}" for each in ("zoneout=0.1", "new=None", "on")],
    ),
    "halves that are added": (_HALVES, [_both("sum")], ["b. has merge_mode=sum: merge the output's halves, .*"]),
    "halves that run the same way": (  # Keras 3 refuses this; a file may say it
        _HALVES,
        [_both(forward_layer=True, backward_layer=True)],
        [f"{_LEFT}.*: b (both of its directions run the same way)"],
    ),
    "halves that run apart": (_HALVES, [_both(forward_layer=False, backward_layer=True)], []),
    **{f"mask of {name}": (_A, [mask, layer("LSTM", "a")], [f"a. comes after m ({name}), {MASK}"])
       for name, mask in _MASKING.items()},
    **{f"mask of {name} that ends": (_A, [mask, around("Conv1D", "c"), layer("LSTM", "a")], [])  # passes no mask on
       for name, mask in _MASKING.items()},
    "a call of a nested model": (
        _ENC,
        [around("Sequential", "enc", layers=[layer("LSTM", "a", dropout=0.5)]) | _TRAINED],
        [
            "enc. is called with training=True, and has dropout=0.5: what is read here drops nothing",
            f"enc. is in enc, which is called with mask=, {MASK}",
        ],
    ),
    "a class of one's own that lists layers": (
        {"f/a/lstm_cell": "LSTM"},
        [around("Own>Flips", "f", layers=[layer("LSTM", "a")])],
        ["f. is in f (Flips), a class of your own, whose code the file does not have: compare the outputs .*"],
    ),
    "a layer of the same name in a layer of one's own": (
        {"enc/enc/a/lstm_cell": "LSTM", "enc/enc/own/a/lstm_cell": "LSTM"},
        [around("Functional", "enc", layers=[layer("LSTM", "a", go_backwards=True), around("Own", "own")])],
        [
            "the file does not say the settings of enc.enc.own.a., or not where jaxrnn finds .*",
            f"enc.enc.a. {_FLIP}",
        ],
    ),
    "a layer without weights of its own": (
        _A,
        [layer("LSTM", "a"), layer("LSTM", "b", go_backwards=True)],
        [
            "found no weights for b (go_backwards) of the configuration: another layer may have them, if they are "
            "shared, and its module can be called again"
        ],
    ),
    "a layer made in another model": (
        {"a/base/a/lstm_cell": "LSTM"}, [layer("LSTM", "a", go_backwards=True)], [f"a. {_FLIP}"],
    ),
    "a model in a TimeDistributed": (
        {"td/td/sq/in/simple_rnn_cell": "SimpleRNN"},
        [around("TimeDistributed", "td", layer=around("Sequential", "sq", layers=[
            layer("SimpleRNN", "in", activation="relu"),
        ]))],
        ["td. is in a TimeDistributed: .*", "td. has relu, which weights do not say: .*"],
    ),
    "names that forge lines": (
        {"a\nb/a\nb/lstm_cell": "LSTM"}, [layer("LSTM", "a\nb", go_backwards=True)], [rf"a\nb. {_FLIP}"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_what_weights_do_not_hold_is_said(name: str, tmp_path: Path) -> None:
    groups, layers, expected = SAID[name]
    arrays = {f"model_weights/{path}": layer_arrays(kind) for path, kind in groups.items()}
    found, words = _read(tmp_path, arrays, sequential(*layers))
    assert len(words) == len(expected), words
    for text, pattern in zip(words, expected, strict=True):
        assert re.fullmatch(re.escape(pattern).replace(r"\.\*", ".*"), text)
    assert bool(found) != any(text.startswith("left out") for text in words)
    assert all(rnn.bidirectional == (groups is _HALVES) for rnn in found.values())


def test_warnings_are_of_the_line_that_loads(tmp_path: Path) -> None:
    data = hdf5({"model_weights/a/a/cell": layer_arrays("LSTM")}, sequential(layer("LSTM", "a", go_backwards=True)))
    with pytest.warns(UserWarning, match="go_backwards") as caught:
        load(_saved(tmp_path, data))
    assert caught[0].filename == __file__


def test_a_gru_from_before_reset_after(tmp_path: Path) -> None:
    """Without biases its weights do not tell that it computes otherwise; its configuration does."""
    arrays = layer_arrays("GRU", bias=False)
    found, [text, remedy] = _read(tmp_path, {"model_weights/old/old": arrays}, sequential(layer("GRU", "old")))
    assert not found
    assert text.endswith(": old (reset_after=False, where torch's GRU has True)")
    assert remedy == f"old {_BEFORE}"
    found, [text] = _read(tmp_path, {"old/old": arrays}, None)
    assert "old." in found
    assert "jaxrnn assumes Keras's default activations, go_backwards=False, no mask, reset_after=True" in text


def test_masks_and_states_in_functional_models_of_keras_2(tmp_path: Path) -> None:
    layers = (
        around("InputLayer", "start"),
        around("Embedding", "em", mask_zero=True),
        layer("LSTM", "masked", return_sequences=True, time_major=False),
        layer("GRU", "last", reset_after=True),
        layer("GRU", "free", reset_after=True, time_major=True),
        layer("LSTM", "given"),
    )
    called = (
        *([], [["start", 0, 0, {}]], [["em", 0, 0, {}]], [["masked", 0, 0, {}]], [["last", 0, 0, {}]]),
        [["start", 0, 0, {"mask": ["m", 0, 0]}], ["h", 0, 0, {}], ["c", 0, 0, {}]],
    )
    nodes = [layer | {"inbound_nodes": [inputs]} for layer, inputs in zip(layers, called, strict=True)]
    config = around("Functional", "model", layers=nodes)
    groups = {f"model_weights/{name}/{name}/cell": layer_arrays(kind) for kind, name in (
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
    value = given if name == "training" else [_TENSOR] if given else None
    called = layer("LSTM", "a", dropout=0.5) | {"inbound_nodes": [{"args": [_TENSOR], "kwargs": {name: value}}]}
    config = around("Functional", "model", layers=[called])
    _, words = _read(tmp_path, {"model_weights/a/a/cell": layer_arrays("LSTM")}, config)
    said = f"a. {CALLED[name]}" if CALLED[name] and given else ""
    assert words == ([said] if said else [f"a. is called with {name}=None: {UNKNOWN}"] if name == "unheard_of" else [])


@weights_alone
def test_a_cell_under_another_attribute(tmp_path: Path) -> None:
    groups, names = {"enc/my_cell/vars": layer_arrays("LSTM")}, {"enc/my_cell/vars": "lstm_cell_3"}
    [found] = find_rnns(load(_saved(tmp_path, hdf5(groups, names=names))))
    assert (found.prefix, found.kind) == ("enc.my_cell.", "LSTM")


def _encoder(**groups: str) -> tuple[dict[str, list[np.ndarray]], dict[str, Any]]:
    """A file of Keras 3's .h5 with a layer of one's own that has these, and its configuration, which does not."""
    arrays = {f"model_weights/enc/model/enc/{name}": layer_arrays(kind) for name, kind in groups.items()}
    return arrays, around("Sequential", "model", layers=[around("Custom>Encoder", "enc", units=H)])


def test_layers_in_a_layer_of_ones_own(tmp_path: Path) -> None:
    """Two cells are two modules; what is named forward and backward may both run forward; units are not the LSTM's."""
    inside = {"lstm_cell_1": "LSTM", "lstm_cell_2": "LSTM", "forward_x/gru_cell": "GRU", "backward_x/gru_cell": "GRU"}
    found, [text] = _read(tmp_path, *_encoder(**inside, **{"my_backward_rnn/simple_rnn_cell": "SimpleRNN"}))
    assert {prefix.removeprefix("enc.model.enc."): rnn.bidirectional for prefix, rnn in found.items()} == {
        "lstm_cell_1.": False, "lstm_cell_2.": False, "forward_x.": False, "backward_x.": False,
        "my_backward_rnn.": False,
    }  # fmt: skip
    assert "or not where jaxrnn finds them: jaxrnn assumes Keras's default activations" in text
    assert all(rnn.said == {"batch_first": True} for rnn in found.values())
    found, [text] = _read(tmp_path, *_encoder(**{"lstm/lstm_cell": "LSTM"}))
    assert [*found] == ["enc."]
    assert "does not say the settings of enc., or not where jaxrnn finds them" in text
    found, [text] = _read(tmp_path, *_encoder(lstm_cell="LSTM"))  # it may be a subclass of LSTM
    assert not found
    assert text.endswith(": enc (Encoder of 4 gates)")


@pytest.mark.parametrize("container", ["layers", "_layer_checkpoint_dependencies"])
def test_layers_whose_names_are_not_in_the_file(container: str, tmp_path: Path) -> None:
    """Keras 3.0 numbers the layers of each class; Keras 2 numbers them otherwise."""
    layers = [layer("GRU", "gru_1", reset_after=False), layer("LSTM", "b"), layer("LSTM", "c", go_backwards=True)]
    config = {"class_name": "Sequential", "config": {"layers": layers}}
    names = {"gru": "GRU", "lstm": "LSTM", "lstm_1": "LSTM"}
    groups = {f"{container}/{name}/cell/vars": layer_arrays(kind) for name, kind in names.items()}
    data = keras_zip(config_json=json.dumps(config).encode(), model_weights_h5=hdf5(groups))
    _, words = loaded(tmp_path / "model.keras", data)
    assert words[0].endswith(": gru_1 (reset_after=False, where torch's GRU has True)")
    if container == "layers":
        assert words[2:] == ["c. has go_backwards: flip its input along the time axis"]
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
        _read(tmp_path, {one: layer_arrays("LSTM"), other: layer_arrays("LSTM")}, None)
    words = rf"{one}\S* and {other}\S* are both read as {name}\nrename one of them, and save the model again"
    assert re.search(words, str(caught.value))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found no weights for")
def test_a_huge_configuration_takes_no_time(tmp_path: Path) -> None:
    many = [layer("LSTM", "a") for _ in range(10_000)]
    config = around("Sequential", "a", layers=many)
    for depth in range(60):
        config = around("Sequential", f"a{depth}", layers=[config])
    groups = {f"model_weights/a58/a/lstm_cell_{i}": layer_arrays("LSTM", 1) for i in range(100)}
    data = hdf5(groups)
    start = time.perf_counter()
    with pytest.warns(UserWarning, match="does not say the settings"):
        load(_saved(tmp_path, keras_zip(config_json=json.dumps(config).encode(), model_weights_h5=data)))
    assert time.perf_counter() - start < 5
    with pytest.raises(CheckpointError, match="over 50000 recurrent layers"):
        _config(json.dumps(sequential(*(layer("LSTM", f"a{i}") for i in range(50_001)))))


@weights_alone
def test_bfloat16(tmp_path: Path) -> None:
    file = io.BytesIO()
    arrays = [array.astype(jnp.bfloat16) for array in layer_arrays("LSTM")]
    with h5py.File(file, "w") as opened:
        for i, array in enumerate(arrays):
            opened.create_dataset(f"layers/lstm/cell/vars/{i}", data=array).attrs["dtype"] = "bfloat16"
    tensors = load(_saved(tmp_path, file.getvalue()))
    assert tensors["lstm.weight_hh_l0"].dtype == jnp.bfloat16
    assert_close(tensors["lstm.weight_hh_l0"], arrays[1].T, atol=0)
    tensors = load(_saved(tmp_path, hdf5({"lstm/lstm/lstm_cell": arrays})))  # with no attribute
    assert_close(tensors["lstm.weight_hh_l0"], arrays[1].T, atol=0)


def _linked(make: Any) -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        make(opened)
    return file.getvalue()


def _cycle(file: Any) -> None:
    file.create_group("layers")
    file["layers/layers"] = file["layers"]


def _dataset(*shape: int, **settings: Any) -> bytes:
    return _linked(lambda file: file.create_dataset("x", shape, "f4", **settings))


WEIGHTS = hdf5({"layers/lstm/cell/vars": layer_arrays("LSTM")})
HOSTILE = {
    "truncated": (WEIGHTS[:1000], "a damaged HDF5 file"),
    "a cycle": (_linked(_cycle), "its groups contain each other"),
    "huge, not stored": (_dataset(1 << 33), "a bomb"),
    "huge, compressed": (_dataset(1 << 25, data=np.zeros(1 << 25), compression="gzip"), "in chunks or compressed"),
    "another file": (_dataset(4, external=[("/etc/passwd", 0, 16)]), "the numbers of x are in another file"),
    "another shape": (hdf5({"layers/lstm/cell/vars": [*layer_arrays("LSTM")[:2], normal(7)]}), r"bias of .* is \(7,\)"),
    "no weights": (keras_zip(metadata_json=b"{}", config_json=b"{}"), "model.weights.h5 is missing"),
    "a damaged config": (keras_zip(config_json=b"{", model_weights_h5=WEIGHTS), "of the model is damaged"),
    "damaged metadata": (keras_zip(metadata_json=b"[", config_json=b"{}", model_weights_h5=WEIGHTS), "json is damaged"),
    "a deep config": (keras_zip(config_json=b"[" * 100000, model_weights_h5=WEIGHTS), "of the model is damaged"),
    "a zip bomb": (keras_zip(config_json=b" " * (1 << 27), model_weights_h5=WEIGHTS), "a zip bomb"),
    "a truncated zip": (keras_zip(config_json=b"{}", model_weights_h5=WEIGHTS)[:-30], "truncated or damaged zip"),
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
