"""ONNX both ways: nodes become torch's weights, and our modules become models that compute what they compute."""

import contextlib
import dataclasses
import itertools
import os
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import named, normal, parameters
from comparing import assert_close
from covering import covering
from flax import nnx
from making import filled, filled_variables
from memory import memory_to_refuse
from onnx_models import F, H, graph_of, model_of, node_weights, onnx, op, recurrent
from reading import loaded, of_guide

import jaxrnn
from jaxrnn.activations import Affine
from jaxrnn.checkpoint import CheckpointError, find_rnns, load, to_onnx
from jaxrnn.checkpoint.check import check
from jaxrnn.checkpoint.dialects import DIALECTS
from jaxrnn.checkpoint.formats import onnx_modules

pytest_plugins = "shared_fixtures"
pytestmark = [pytest.mark.libraries, pytest.mark.usefixtures("compiled_once")]
CELLS = {"LSTM": jaxrnn.LSTM_CELL, "GRU": jaxrnn.GRU_CELL, "RNN": jaxrnn.RNN_TANH}


def _saved(tmp_path: Path, nodes: list[Any], arrays: dict[str, np.ndarray]) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(_model(nodes, arrays).SerializeToString())
    return path


def _model(nodes: list[Any], arrays: dict[str, np.ndarray]) -> Any:
    return model_of(graph_of(nodes, arrays))


@pytest.mark.torch
@pytest.mark.parametrize("folding", [True, False])
def test_what_torch_exports_has_torchs_weights_and_names(folding: bool, torch: Any, tmp_path: Path, capfd: Any) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = torch.nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True)
            self.decoder = torch.nn.GRU(8, 5, 2)
            self.plain = torch.nn.RNN(5, 6, bias=False)

        def forward(self, x: Any) -> Any:
            return self.plain(self.decoder(self.encoder(x)[0])[0])

    model, path = Model().eval(), tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.ones(2, 7, 3),), path, dynamo=False, do_constant_folding=folding)
    tensors = load(path)
    for name, tensor in model.state_dict().items():
        assert np.array_equal(tensors[name], tensor.numpy()), name
    found = find_rnns(tensors)
    assert [(rnn.prefix, rnn.class_name, rnn.num_layers, rnn.bidirectional, rnn.bias) for rnn in found] == [
        ("encoder.", "LSTM", 2, True, True), ("decoder.", "GRU", 2, False, True), ("plain.", "RNN", 1, False, False),
    ]  # fmt: skip


def _module_of(torch: Any, kind: str, inner: str = "", **settings: Any) -> Any:
    """A model in whose attribute there is a recurrent layer, which is called once or, in "twice", two times."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = getattr(torch.nn, kind)(F, F, **settings)

        def forward(self, x: Any) -> Any:
            y = self.rnn(x)[0]
            return self.rnn(torch.tanh(y) if inner == "between" else y)[0] if inner else y

    return torch.nn.Sequential(Model()).eval()


EXPORTED: dict[str, dict[str, Any]] = {
    "bidirectional": {"kind": "LSTM", "bidirectional": True},
    "two layers": {"kind": "GRU", "num_layers": 2, "bidirectional": True, "batch_first": True},
    "relu without biases": {"kind": "RNN", "nonlinearity": "relu", "bias": False},
    "called twice": {"kind": "GRU", "inner": "between"},
    "called on its own output": {"kind": "LSTM", "inner": "at once"},
}


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("opset", [9, 11, 13, 17])
@pytest.mark.parametrize("name", EXPORTED)
def test_a_module_is_listed_once(name: str, opset: int, torch: Any, tmp_path: Path, capfd: Any) -> None:
    """By the names of initializers, if nodes have no paths as in what torch exported before 1.13, and no others."""
    made, path = _module_of(torch, **EXPORTED[name]), tmp_path / "model.onnx"
    for folding, old in ((True, False), (False, False), (False, True)):
        given = {"dynamo": False, "opset_version": opset, "do_constant_folding": folding}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(made, (torch.ones(5, 2, F),), path, **given, keep_initializers_as_inputs=old)
        model = onnx.load(path)
        for index, node in enumerate(model.graph.node):
            node.name = f"{node.op_type}_{index}" if old else node.name
        tensors, words = loaded(path, model.SerializeToString())
        assert [rnn.prefix for rnn in find_rnns(tensors)] == ["0.rnn."]
        for key, tensor in made.state_dict().items():
            assert np.array_equal(tensors[key], tensor.numpy()), key
        assert not [key for key in tensors if key not in made.state_dict() and "MatMul" not in key]
        again = "takes its output: call the module '0.rnn.' again, on its own output"
        assert all("has relu" in text or text.endswith(again) for text in words)
        assert len(words) == ("relu" in name or "own" in name)


def test_a_node_goes_by_its_initializers(tmp_path: Path) -> None:
    """Of both layers, in the order of the layers' numbers; what is only in part from them does not."""
    shapes = {"weight_ih": (H, H), "weight_hh": (H, H), "bias_ih": (H,), "bias_hh": (H,)}
    arrays: dict[str, Any] = {
        f"net.rnn.{role}_l{layer}": normal(*shape, seed=layer + len(role)).astype("f4")
        for layer in range(2)
        for role, shape in shapes.items()
    }
    arrays |= {"zero": np.array([0]), "one": np.array([1])}
    nodes = []
    for layer, (x, y) in enumerate((("X", "A"), ("C", "Y"))):
        w, r, b, c = (f"net.rnn.{role}_l{layer}" for role in shapes)
        nodes += [op("Unsqueeze", [w, "zero"], f"W{layer}"), op("Unsqueeze", [r, "zero"], f"R{layer}")]
        nodes += [op("Concat", [b, c], f"b{layer}", axis=0), op("Unsqueeze", [f"b{layer}", "zero"], f"B{layer}")]
        given = [x, f"W{layer}", f"R{layer}", f"B{layer}"]
        nodes.append(onnx.helper.make_node("RNN", given, [y], f"RNN_{layer}", hidden_size=H))
    nodes += [op("Squeeze", ["A", "one"], "C")]
    nodes.insert(5, nodes.pop())
    tensors, words = loaded(_saved(tmp_path, nodes, arrays))
    [found] = find_rnns(tensors)
    assert (words, found.prefix, found.num_layers) == ([], "net.rnn.", 2)
    assert {name for name in tensors if name.startswith("net")} == {name for name in arrays if name.startswith("net")}
    nodes[4].attribute.append(onnx.helper.make_attribute("clip", -1.0))  # the first is left out, and its initializers
    tensors, words = loaded(_saved(tmp_path, nodes, arrays))
    assert words[0] == "left out nodes that torch does not have: RNN_0 (clip=-1)"
    assert [each.prefix for each in find_rnns(tensors)] == ["net.rnn.l1."]
    del nodes[4].attribute[-1]
    arrays["other"] = arrays["net.rnn.weight_ih_l1"].T.copy()  # a weight that no layer of the module has
    nodes[6].input[0] = "other"
    tensors, words = loaded(_saved(tmp_path, nodes, arrays))
    assert [(each.prefix, each.num_layers) for each in find_rnns(tensors)] == [("net.rnn.", 1), ("RNN_1.", 1)]
    assert words == [
        "left out net.rnn.weight_ih_l1, whose other weights have no names, as in an RNN written step by step: export "
        "it with torch.onnx.export(..., dynamo=False)"
    ]


def _exported(prefix: str) -> list[Any]:
    """Two layers as torch's other exporter writes them: the path is in the metadata, the shapes are numbers."""
    nodes = []
    for name, x in (("a", "X"), ("b", "Z")):
        node = recurrent("GRU", name, x, f"Y_{name}", direction="bidirectional")
        node.metadata_props.add(key="namespace", value=f": Model/{prefix}: torch.nn.GRU/gru: aten.gru.input")
        shape = onnx.numpy_helper.from_array(np.array([5, 2, 2 * H]), f"shape_{name}")
        nodes += [
            node,
            onnx.helper.make_node("Transpose", [f"Y_{name}"], [f"T_{name}"], perm=[0, 2, 1, 3]),
            onnx.helper.make_node("Constant", [], [f"S_{name}"], value=shape),
            onnx.helper.make_node("Reshape", [f"T_{name}", f"S_{name}"], ["Z" if name == "a" else "Y"]),
        ]
    return nodes


def test_layers_of_one_module_are_one_again(tmp_path: Path) -> None:
    arrays = node_weights("GRU", "a", directions=2) | node_weights("GRU", "b", 2 * H, directions=2)
    [found] = find_rnns(load(_saved(tmp_path, _exported("encoder"), arrays)))
    assert (found.prefix, found.num_layers, found.bidirectional) == ("encoder.", 2, True)
    # Whatever else happens between two layers, they are two modules.
    other = [node for node in _exported("encoder") if node.op_type != "Reshape" or node.output[0] != "Z"]
    other.append(onnx.helper.make_node("Tanh", ["X2"], ["Z"]))
    with pytest.warns(UserWarning, match=r"the nodes a and b have the prefix 'encoder\.': load the second with .*1\.'"):
        found = find_rnns(load(_saved(tmp_path, other, arrays)))
    assert [(rnn.prefix, rnn.num_layers) for rnn in found] == [("encoder.", 1), ("encoder.1.", 1)]


def test_what_no_weights_hold_is_said(tmp_path: Path) -> None:
    arrays = node_weights("RNN", "one") | {"first": np.ones((1, 2, H), "f4")}
    path = _saved(tmp_path, [recurrent("RNN", "one", more=("", "first"), activations=["Relu"])], arrays)
    assert loaded(path)[1] == [
        "one starts from the state first, which is not zero: give it to each call as hx",
        "one. has relu, which weights do not say: make the module with nonlinearity='relu'",
    ]
    weights = onnx.helper.make_node("Tanh", ["X"], ["oneW"])
    path = _saved(tmp_path, [weights, recurrent("RNN", "one")], {n: a for n, a in arrays.items() if n != "oneW"})
    with pytest.warns(UserWarning, match=r"one \(its weights are computed by the graph\)") as caught:
        load(path)
    assert caught[0].filename == __file__


def test_peepholes_are_ours(tmp_path: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    arrays = node_weights("LSTM", "one") | {"oneP": normal(1, 3 * H).astype("f4")}
    node = recurrent("LSTM", "one", more=("", "", "", "oneP"))
    path = _saved(tmp_path, [node], arrays)
    [found] = find_rnns(tensors := load(path))
    assert found.class_name == "Recurrent"
    assert found.spec.cell is jaxrnn.PEEPHOLE_LSTM_CELL
    x = normal(5, 4, F)
    wide = ReferenceEvaluator(_model([node], {name: a.astype(float) for name, a in arrays.items()}))
    [y] = wide.run(["Y"], {"X": x})
    params = {name.removeprefix("one."): a.astype(float) for name, a in tensors.items()}
    assert_close(jaxrnn.apply(found.spec, params, x)[0], y[:, 0])


def test_other_activations_are_a_cell_of_ours(tmp_path: Path) -> None:
    """In float64 against ONNX's own reference, which has few; see test_closed_onnx for all, by onnxruntime."""
    from onnx.reference import ReferenceEvaluator

    arrays = node_weights("RNN", "one")
    node = recurrent("RNN", "one", activations=["Affine"], activation_alpha=[0.3], activation_beta=[0.1])
    tensors, words = loaded(_saved(tmp_path, [node], arrays))
    [found] = find_rnns(tensors)
    assert found.spec.cell == jaxrnn.rnn_cell(Affine(float(np.float32(0.3)), float(np.float32(0.1))))
    assert words == [
        "one. has other activations, which weights do not say: make the module as jaxrnn.Recurrent(cell, ...) with the "
        f"cell that find_rnns gives, {found.kind}"
    ]
    x = normal(5, 4, F)
    wide = ReferenceEvaluator(_model([node], {name: a.astype(float) for name, a in arrays.items()}))
    params = {name.removeprefix("one."): a.astype(float) for name, a in tensors.items()}
    assert_close(jaxrnn.apply(found.spec, params, x)[0], wide.run(["Y"], {"X": x})[0][:, 0], atol=1e-12)
    module = getattr(jaxrnn, found.class_name)(**found.arguments, rngs=nnx.Rngs(0))
    jaxrnn.load_state_dict(module, tensors, prefix="one.")
    with pytest.warns(UserWarning, match="cell=RNN_TANH, where the file says cell=rnn_cell"):
        jaxrnn.load_state_dict(jaxrnn.RNN(F, H, rngs=nnx.Rngs(0)), tensors, prefix="one.")


WRONG = {
    "two ways": ({"activations": ["LeakyRelu", "Tanh", "Elu"], "activation_alpha": [0.1, 0.2, 0.3]}, "fit in two ways"),
    "no default": ({"activations": ["Sigmoid", "ThresholdedRelu", "Tanh"]}, "disagree on thresholdedrelu without"),
    "unknown": ({"activations": ["Sigmoid", "Gelu", "Tanh"]}, "jaxrnn does not know gelu"),
    "too few": ({"activations": ["Sigmoid", "Tanh"]}, r"\(activations=\['Sigmoid', 'Tanh'\]\)"),
    "no list": ({"activations": "Sigmoid"}, r"\(activations=Sigmoid\)"),
    "more numbers": (
        {"activations": ["Elu", "Tanh", "Tanh"], "activation_alpha": [0.1, 0.2]},
        "activation_alpha has more numbers than they take",
    ),
    "infinite": (
        {"activations": ["Elu", "Tanh", "Tanh"], "activation_alpha": [float("inf")]},
        r"activation_alpha=\[inf",
    ),
    "no numbers": ({"activations": ["Elu", "Tanh", "Tanh"], "activation_alpha": ["x"]}, "activation_alpha="),
    "no clip": ({"clip": -1.0}, "clip=-1"),
    "clip of another type": ({"clip": 1}, "clip=1"),
    "peepholes": ({"activations": ["Sigmoid", "Relu", "Tanh"]}, "peepholes P with other activations"),
    "directions": (
        {"activations": ["Sigmoid", "Relu", "Tanh", "Sigmoid", "Tanh", "Tanh"], "direction": "bidirectional"},
        "others in each direction",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_activations_that_are_no_cell(name: str, tmp_path: Path) -> None:
    attributes, words = WRONG[name]
    arrays = node_weights("LSTM", "one", directions=1 + ("direction" in attributes)) | {"P": np.ones((1, 3 * H), "f4")}
    more = ("", "", "", "P") if name == "peepholes" else ()
    tensors, [text] = loaded(_saved(tmp_path, [recurrent("LSTM", "one", more=more, **attributes)], arrays))
    assert re.search(f"^left out nodes that torch does not have: one .*?{words}", text)
    assert find_rnns(tensors) == []
    assert {"oneW", "oneR", "oneB"} <= tensors.keys()


def test_a_gru_that_resets_before_the_product(tmp_path: Path) -> None:
    """What the message tells to do."""
    from onnx.reference import ReferenceEvaluator

    node, arrays = recurrent("GRU", "one", linear_before_reset=0), node_weights("GRU", "one")
    tensors, [_, remedy] = loaded(_saved(tmp_path, [node], arrays))
    assert remedy == (
        "one multiplies r * h by a matrix within its step: write a jaxrnn.Cell with that matrix, as "
        "examples/other_libraries.md does"
    )
    kernel, recurrent_kernel, bias = (jnp.asarray(tensors[f"one{key}"][0]) for key in "WRB")
    spec, params = of_guide("other_libraries.md", "of_keras")(kernel.T, recurrent_kernel.T, sum(jnp.split(bias, 2)))
    x = normal(5, 4, F).astype("f4")
    [y] = ReferenceEvaluator(_model([node], arrays)).run(["Y"], {"X": x})
    assert_close(jaxrnn.apply(dataclasses.replace(spec, batch_first=False), params, x)[0], y[:, 0], atol=1e-6)


def test_nodes_in_a_branch_and_weights_beside_the_file(tmp_path: Path) -> None:
    described = onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, None)
    arrays = node_weights("LSTM", "one")
    tensors = [onnx.numpy_helper.from_array(arrays["oneW"], "oneW")]
    inner = onnx.helper.make_graph([recurrent("LSTM", "one")], "inner", [], [described], tensors)
    node = onnx.helper.make_node("If", ["C"], ["Y"], then_branch=inner, else_branch=inner)
    model = _model([node], {name: a for name, a in arrays.items() if name != "oneW"})
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="beside.bin", size_threshold=0)
    assert os.path.exists(tmp_path / "beside.bin")
    [found] = find_rnns(load(tmp_path / "model.onnx"))
    assert (found.prefix, found.class_name, found.num_parameters) == (
        "one.",
        "LSTM",
        sum(a.size for a in arrays.values()),
    )
    os.remove(tmp_path / "beside.bin")
    with pytest.raises(CheckpointError, match=r"oneW cannot be read.*beside.bin"):
        load(tmp_path / "model.onnx")
    tensor = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer[0]
    assert tensor.external_data[0].value == "beside.bin"
    outside = (tmp_path / "model.onnx").read_bytes().replace(b"beside.bin", b"../outside")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "model.onnx").write_bytes(outside)
    (tmp_path / "outside").write_bytes(bytes(10000))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path / "inside" / "model.onnx")


def _concatenated(times: int) -> list[Any]:
    nodes = [onnx.helper.make_node("Concat", [f"c{i}"] * 8, [f"c{i + 1}"], axis=0) for i in range(times)]
    return [*nodes, onnx.helper.make_node("LSTM", ["X", f"c{times}", "R"], ["Y"], hidden_size=H)]


HOSTILE = {
    "truncated": lambda data: data[: len(data) // 2],
    "no graph": lambda data: onnx.ModelProto(ir_version=8, producer_name="nobody").SerializeToString(),
    "a bomb": lambda data: _model(_concatenated(12), {"c0": np.ones((1, 9, 9)), "R": np.ones(1)}).SerializeToString(),
    "a chain": lambda data: _model(_concatenated(2000), {"c0": np.ones(1), "R": np.ones(1)}).SerializeToString(),
    "another shape": lambda data: _model([recurrent("LSTM", "one")], node_weights("GRU", "one")).SerializeToString(),
    "names that are no text": lambda data: data.replace(b"one", b"o\xff\xfe"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_and_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    data = _model([recurrent("LSTM", "one")], node_weights("LSTM", "one")).SerializeToString()
    (tmp_path / "model.onnx").write_bytes(HOSTILE[name](data))
    if name == "names that are no text":
        assert "o\\xff\\xfe.weight_ih_l0" in load(tmp_path / "model.onnx")
        return
    with pytest.raises(CheckpointError, match=r"model\.onnx: .*\n"):
        load(tmp_path / "model.onnx")


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    for name in ("a bomb", "a chain"):
        (tmp_path / name).write_bytes(HOSTILE[name](b""))
    paths = [tmp_path / name for name in ("a bomb", "a chain")]
    assert memory_to_refuse(paths, "onnx onnx.reference") < 100_000_000


NAMES = ("kind", "sizes", "layers", "bias", "batch_first", "bidirectional", "lengths", "hx")
CHOICES = [["LSTM", "GRU", "RNN", "RNN relu"], [(F, H), (3, 1)], [1, 3], *([[True, False]] * 5)]
ROWS = covering((dict(zip(NAMES, row, strict=True)) for row in itertools.product(*CHOICES)), lambda row: row)


@pytest.mark.parametrize("row", [*ROWS[:2], *(pytest.param(row, marks=pytest.mark.slow) for row in ROWS[2:])], ids=str)
def test_onnxruntime_computes_what_we_do(row: dict[str, Any], tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    kind, relu = row["kind"].partition(" ")[0], row["kind"] == "RNN relu"
    flags = {name: row[name] for name in ("bias", "batch_first", "bidirectional")}
    spec = jaxrnn.Spec(jaxrnn.RNN_RELU if relu else CELLS[kind], *row["sizes"], row["layers"], **flags)
    module = filled(lambda: _module(kind, spec))
    path = tmp_path / "model.onnx"
    to_onnx(module, path, lengths=row["lengths"], hx=row["hx"])
    session, steps, rows = runtime.InferenceSession(path), 5, 3
    x = normal(*((rows, steps) if spec.batch_first else (steps, rows)), spec.input_size).astype("f4")
    state_shape = spec.num_layers * (1 + spec.bidirectional), rows, spec.hidden_size
    states = {f"{state}_0": normal(*state_shape, seed=i).astype("f4") for i, state in enumerate(spec.cell.states)}
    given = {"lengths": np.array([5, 0, 2], np.int32)} if row["lengths"] else {}
    theirs = session.run(None, {"x": x} | given | (states if row["hx"] else {}))
    names = [output.name for output in session.get_outputs()]
    first = tuple(states.values()) if len(states) > 1 else states["h_0"]
    ours = named(spec, module(jnp.asarray(x), first if row["hx"] else None, **given))
    assert_close(ours, dict(zip(names, theirs, strict=True)), atol=1e-6, rtol=1e-6)
    with pytest.warns(UserWarning, match="nonlinearity='relu'") if relu else contextlib.nullcontext():
        assert_close(load(path), jaxrnn.state_dict(module), atol=0)


def _module(kind: str, spec: jaxrnn.Spec) -> Any:
    more: dict[str, Any] = {"nonlinearity": "relu" if spec.cell is jaxrnn.RNN_RELU else "tanh"} if kind == "RNN" else {}
    more |= {"bias": spec.bias, "batch_first": spec.batch_first, "bidirectional": spec.bidirectional}
    return getattr(jaxrnn, kind)(spec.input_size, spec.hidden_size, spec.num_layers, **more, rngs=nnx.Rngs(0))


def test_linen_and_what_onnx_has_not(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    module = jaxrnn.linen.GRU(F, H, 2, bidirectional=True)
    variables = filled_variables(module, jnp.ones((2, 1, F), jnp.float32))
    to_onnx(module, path, variables)
    assert_close(load(path), dict(variables["params"]), atol=0)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="variables should be what the Linen module's init returned"):
        to_onnx(module, path)
    for other in (jaxrnn.GRUCell(F, H, rngs=nnx.Rngs(0)), nnx.Linear(2, 2, rngs=nnx.Rngs(0))):
        with pytest.raises(TypeError, match=f"should be an RNN, LSTM or GRU of jaxrnn, got {type(other).__name__}"):
            to_onnx(other, path)
    zoned = jaxrnn.Recurrent(jaxrnn.zoneout(jaxrnn.LSTM_CELL, h=0.5), F, H, rngs=nnx.Rngs(0))  # in inference, too
    with pytest.raises(TypeError, match=r"got Recurrent of zoneout\(LSTM, h=0.5\)"):
        to_onnx(zoned, path)
    with pytest.raises(CheckpointError, match=r"model.onnx: ONNX has no LSTM with proj_size\n"):
        to_onnx(filled(lambda: jaxrnn.LSTM(F, H, proj_size=2, rngs=nnx.Rngs(0))), path)
    with pytest.raises(CheckpointError, match=r"has no GRU of bfloat16\nmake .* with param_dtype one of float32"):
        to_onnx(filled(lambda: jaxrnn.GRU(F, H, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.onnx"]
    with pytest.raises(CheckpointError, match="no such file"):
        to_onnx(module, tmp_path / "nowhere" / "model.onnx", variables)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_torch_to_flax_to_keras_to_onnx_to_torch(kind: str, torch: Any, tmp_path: Path) -> None:
    """Weights bit for bit; biases too, once they are added up, within one rounding of their sum."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(F, H, 2, bidirectional=True, dtype=torch.float64)
    module = jaxrnn.from_torch(theirs)
    params = {name: np.asarray(value[...]) for name, value in nnx.to_flat_state(nnx.state(module))}
    params = {name[0]: value for name, value in params.items()}
    for library, cell in (("flax.nnx" if kind == "LSTM" else "flax.linen", f"{kind}Cell"), ("keras", kind)):
        dialect = DIALECTS[library, cell]
        for layer in range(2):
            for direction in range(2):
                names = module.spec.names(layer, direction)
                back = dialect.read(dialect.write({role: params[name] for role, name in names.items()}))
                params |= {names[role]: array for role, array in back.items()}
    nnx.update(module, nnx.State({name: jnp.asarray(value) for name, value in params.items()}))
    to_onnx(module, tmp_path / "model.onnx")
    again = getattr(torch.nn, kind)(F, H, 2, bidirectional=True, dtype=torch.float64)
    again.load_state_dict({name: torch.tensor(value) for name, value in load(tmp_path / "model.onnx").items()})
    for (name, before), after in zip(theirs.state_dict().items(), again.state_dict().values(), strict=True):
        if name.startswith("weight"):
            assert torch.equal(before, after), name
        elif name.startswith("bias_ih"):
            other = name.replace("ih", "hh")
            wanted, found = (each.state_dict()[name] + each.state_dict()[other] for each in (theirs, again))
            assert_close(found.numpy(), wanted.numpy(), rtol=2**-52, atol=0)
    x = torch.tensor(normal(5, 2, F))
    with torch.no_grad():
        assert_close(again(x)[0].numpy(), theirs(x)[0].numpy(), atol=1e-15)


def test_around_and_back_bit_for_bit(tmp_path: Path) -> None:
    """float64 weights of layers both ways, through ONNX; in the layouts of Flax and Keras see the dialects."""
    for kind, cell in CELLS.items():
        spec = jaxrnn.Spec(cell, F, H, 2, bidirectional=True)
        module = filled(lambda kind=kind, spec=spec: _module(kind, spec))
        params = parameters(spec)
        nnx.update(module, nnx.State(jax.tree.map(jnp.asarray, params)))
        to_onnx(module, tmp_path / "model.onnx")
        assert_close(load(tmp_path / "model.onnx"), params, atol=0)


def test_check_compares_with_onnxruntime(tmp_path: Path) -> None:
    """In float32, which is all that it has. A weight that is read wrong is seen."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    nodes = [
        recurrent("LSTM", "lstm", direction="bidirectional"),
        recurrent("GRU", "gru", y="Z"),
        recurrent("RNN", "rnn", y="R", activations=["Relu"]),
        recurrent("GRU", "hard", y="S", activations=["HardSigmoid", "Softsign"], clip=0.7),
        recurrent("RNN", "back", y="V", direction="reverse"),
    ]
    arrays = node_weights("LSTM", "lstm", directions=2) | node_weights("GRU", "gru") | node_weights("RNN", "rnn")
    arrays |= node_weights("GRU", "hard") | node_weights("RNN", "back")
    tensors, _ = loaded(_saved(tmp_path, nodes, arrays))
    found = find_rnns(tensors)
    assert [rnn.prefix for rnn in found] == ["lstm.", "gru.", "rnn.", "hard.", "back."]
    for rnn in found:
        result = check(rnn, tensors, None)
        assert result.original == f"ONNX's {[node.op_type for node in nodes][found.index(rnn)]}"
        assert result.difference < 2e-6, rnn.prefix
        assert result.equal
        tensors[f"{rnn.prefix}weight_hh_l0"] += 0.1
        assert not check(rnn, tensors, None).equal


def test_recurrent_nodes_that_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [recurrent("RNN", name) for name in ("one", "two")]
    nodes[1].output[0] = "Z"
    path = _saved(tmp_path, nodes, node_weights("RNN", "one") | node_weights("RNN", "two"))
    assert len(find_rnns(load(path))) == 2
    monkeypatch.setattr(onnx_modules, "_MOST", 1)
    with pytest.raises(CheckpointError, match=r"it has 2 recurrent nodes, and 1 are the most that are read\nsave"):
        load(path)
