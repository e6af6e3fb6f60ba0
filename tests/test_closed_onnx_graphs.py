"""ONNX, closed: no name is lost, and what is around a recurrent node in the graph is followed or named."""

import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from comparing import assert_close
from onnx_models import (
    B,
    F,
    H,
    T,
    call,
    everything,
    function_of,
    graph_of,
    model_of,
    node_weights,
    onnx,
    op,
    read,
    recurrent,
    refers,
    run,
    values,
)  # fmt: skip
from reading import apply, weights

import jaxrnn
from jaxrnn.checkpoint import CheckpointError, find_rnns

pytestmark = pytest.mark.libraries

LOOPS = (  # test_closed_keras and test_checkpoint_torch_zip read such files
    "may be recurrent layers, written as loops over steps, which are not read: read the weights from the library's own "
    "file: of Keras model.save('model.keras'), of torch torch.save(model.state_dict(), 'model.pt')"
)
GRU_X = values("X", sizes=[None, None, H])  # the input of a model whose layers have as many features as units


def test_sparse_initializers_are_returned(tmp_path: Path) -> None:
    model, array = model_of(graph_of([op("Tanh", ["X"], "Y")], {})), np.array([[0, 0, 2.0], [3, 0, 0]])
    values = onnx.numpy_helper.from_array(np.array([2.0, 3.0]), "sparse")
    for places in (np.array([2, 3]), np.array([[0, 2], [1, 0]])):
        del model.graph.sparse_initializer[:]
        indices = onnx.numpy_helper.from_array(places)
        model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, array.shape))
        tensors, words = read(model, tmp_path)
        assert words == []
        assert np.array_equal(tensors["sparse"], array)
    for dims, cause in (([10**6, 10**6], "a bomb"), ([1, 2], "cannot be read"), ([-1, 3], "cannot be read")):
        model.graph.sparse_initializer[0].dims[:] = dims
        with pytest.raises(CheckpointError, match=f"{cause}.*\n"):
            read(model, tmp_path)


def test_attributes_and_inputs_that_nobody_knows_are_named(tmp_path: Path) -> None:
    node = recurrent("GRU", "one", "X", "Y", more=["", "", "seventh"], new=2, since_version=3)
    node.output.extend(["h", "third"])
    _, words = read(model_of(graph_of([node], node_weights("GRU", "one"))), tmp_path)
    assert [text.partition(": ")[0] for text in words] == [
        "one has new=2", "one has attribute since_version=3", "one has input 6='seventh'", "one has output 2='third'",
    ]  # fmt: skip


def test_branches_with_the_same_names_keep_both(tmp_path: Path) -> None:
    """Their weights, and their first states."""
    inner = []
    for seed in (0, 5):
        arrays = node_weights("GRU", "one", seed=seed) | {"first": normal(1, B, H, seed=seed + 7).astype("f4")}
        inner.append(graph_of([recurrent("GRU", "one", "X", "Y", more=["", "first"])], arrays))
        del inner[-1].input[:]
    node = onnx.helper.make_node("If", ["C"], ["Y"], "if", then_branch=inner[0], else_branch=inner[1])
    condition = onnx.helper.make_tensor_value_info("C", onnx.TensorProto.BOOL, [])
    model = model_of(graph_of([node], {}, [*values("X", sizes=[None, None, F]), condition]))
    tensors, words = read(model, tmp_path)
    assert words == [
        "one in else_branch of if starts from the state first, which is not zero: give it to each call as hx",
        "one in then_branch of if starts from the state first.1, which is not zero: give it to each call as hx",
        "the nodes one in else_branch of if and one in then_branch of if have the prefix 'one.': load the second with "
        "the prefix 'one.1.', or give the nodes other names",
    ]
    x = normal(T, B, F).astype("f4")
    for found, first, taken in zip(find_rnns(tensors), ("first", "first.1"), (False, True), strict=True):
        ours = apply(found.spec, weights(tensors, found), jnp.asarray(x), hx=jnp.asarray(tensors[first]))[0]
        assert_close(ours, run(model, X=x, C=np.array(taken))[:, 0], atol=1e-6, rtol=1e-6)
    node = onnx.helper.make_node("If", ["C"], ["Y"], "if", then_branch=inner[0], else_branch=inner[0])
    tensors, words = read(model_of(graph_of([node], {}, [*values("X"), condition])), tmp_path)
    assert [each.prefix for each in find_rnns(tensors)] == ["one."]  # the same weights
    assert len(words) == 2


def test_a_node_and_an_initializer_of_one_name(tmp_path: Path) -> None:
    arrays = node_weights("GRU", "one")
    model = model_of(graph_of([recurrent("GRU", "one", "X", "Y")], arrays))
    tensors, _ = read(model, tmp_path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(tensors["one.bias_ih_l0"], "one.bias_ih_l0"))
    again, words = read(model, tmp_path)  # the same numbers, as in what torch exports without folding
    assert (again.keys(), words) == (tensors.keys(), [])
    model.graph.initializer[-1].raw_data = bytes(len(model.graph.initializer[-1].raw_data))
    with pytest.raises(CheckpointError) as caught:
        read(model, tmp_path)
    assert str(caught.value).partition(": ")[2] == (
        "bias_ih of the node one and the initializer one.bias_ih_l0 are both read as one.bias_ih_l0\n"
        "rename the node or the initializer in the model, and save it again"
    )
    model.graph.node[0].name = "other"
    tensors, _ = read(model, tmp_path)
    assert "other.bias_ih_l0" in tensors


@pytest.mark.parametrize("what", ["initializers", "outputs", "attributes", "functions"])
def test_two_of_one_name_in_the_file_are_refused(what: str, tmp_path: Path) -> None:
    model = everything()
    if what == "initializers":
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1), "gru0W"))
    elif what == "outputs":
        model.graph.node.append(op("Cos", ["X"], "Y0"))
    elif what == "attributes":
        node = next(each for each in model.graph.node if each.op_type == "GRU")
        node.attribute.append(onnx.helper.make_attribute("hidden_size", 9))
    else:
        model.functions.append(function_of("Block", [op("Cos", ["v"], "Y")], ["v"]))
    with pytest.raises(CheckpointError, match=f"a damaged ONNX file, two {what} are named .*\n"):
        read(model, tmp_path)


def test_functions_are_looked_into(tmp_path: Path) -> None:
    """Called twice with other weights, and one through another; sizes come from the call or the function."""
    names = ["w", "r", "b"]
    inner = refers(recurrent("GRU", "", "v", "Z", "gru"), "hidden_size", "units")
    inner.input[1:4] = names
    squeeze = onnx.helper.make_node("Squeeze", ["Z", "axis"], ["Y"])
    axis = onnx.helper.make_node("Constant", [], ["axis"], value_ints=[1])
    block = function_of("Block", [axis, inner, squeeze], ["v", *names], units=H)
    outer = function_of("Outer", [call("Block", ["v", *names], "Y", "deep")], ["v", *names])
    arrays = node_weights("GRU", "a") | node_weights("GRU", "b", H) | {"bR": node_weights("GRU", "bbb")["bbbR"]}
    calls = [
        call("Block", ["X", "aW", "aR", "aB"], "M", "first", units=H),
        call("Outer", ["M", "bW", "bR", "bB"], "Y", "/dec/Outer"),
    ]
    model = model_of(graph_of(calls, arrays), [block, outer])
    tensors, words = read(model, tmp_path)
    assert words == []
    found = find_rnns(tensors)
    assert [each.prefix for each in found] == ["first.gru.", "dec.deep.gru."]
    x = normal(T, B, F).astype("f4")
    ours: Any = jnp.asarray(x)
    for each in found:
        ours = apply(each.spec, weights(tensors, each), ours)[0]
    assert_close(ours, run(model, X=x), atol=1e-6, rtol=1e-6)


def test_names_in_a_function_are_its_own(tmp_path: Path) -> None:
    """A weight in a function has the name of an initializer outside, which stays."""
    arrays = node_weights("LSTM", "")
    constants = [
        onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(array))
        for name, array in arrays.items()
    ]
    function = function_of("Block", [*constants, recurrent("LSTM", "", "v", "Y", "lstm")], ["v"])
    calls = [call("Block", ["X"], "M", "a"), call("Block", ["X"], "N", "b"), op("MatMul", ["X", "W"], "Y")]
    outside = normal(F, F, seed=3)
    tensors, words = read(model_of(graph_of(calls, {"W": outside}), [function]), tmp_path)
    assert words == []
    assert np.array_equal(tensors["W"], outside)
    assert [each.prefix for each in find_rnns(tensors)] == ["a.lstm.", "b.lstm."]


def _bomb(depth: int, calls: int) -> Any:
    """Functions of which each calls the one below twice, or one that calls itself."""
    names = [f"f{number}" for number in range(depth)]
    functions = [
        function_of(name, [call(below, ["v"], f"y{index}") for index in range(calls)], ["v"])
        for name, below in zip(names, [*names[1:], "f0"], strict=True)
    ]
    return model_of(graph_of([call("f0", ["X"], "Y")], {}), functions)


@pytest.mark.parametrize(("depth", "calls"), [(1, 1), (1, 2), (40, 2), (60, 30)])
def test_functions_without_end_are_refused(depth: int, calls: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nested too deeply|a bomb"):
        read(_bomb(depth, calls), tmp_path)


def test_other_recurrences_are_named(tmp_path: Path) -> None:
    others = [
        onnx.helper.make_node("DynamicQuantizeLSTM", ["X"], ["A"], "quantized", domain="com.microsoft"),
        onnx.helper.make_node("GRUUnit", ["X"], ["C"], "unit"),
        onnx.helper.make_node("LSTM", ["X"], ["D"], "theirs", domain="my.own"),
    ]
    settings: Any = {"clip": -3.0}, {"input_forget": 1}, {"activations": ["Affine", "Tanh", "Tanh"]}
    others += [recurrent("LSTM", "lstm", y=f"E{i}", name=f"lstm{i}", **some) for i, some in enumerate(settings)]
    others.append(recurrent("GRU", "gru", y="F", linear_before_reset=0))
    node, arrays = recurrent("GRU", "one", "X", "G"), node_weights("LSTM", "lstm") | node_weights("GRU", "gru")
    tensors, words = read(model_of(graph_of([*others, node], arrays | node_weights("GRU", "one"))), tmp_path)
    assert words == [
        "left out nodes that torch does not have: quantized (com.microsoft.DynamicQuantizeLSTM), unit (GRUUnit), "
        "theirs (my.own.LSTM), lstm0 (clip=-3), lstm1 (input_forget=1), lstm2 (activations=['Affine', 'Tanh', "
        "'Tanh']: runtimes disagree on affine without all its numbers), gru (linear_before_reset=0, where torch's GRU "
        "has 1)",
        "gru multiplies r * h by a matrix within its step: write a jaxrnn.Cell with that matrix, as "
        "examples/other_libraries.md does",
    ]
    assert [each.prefix for each in find_rnns(tensors)] == ["one."]
    body = graph_of([op("Tanh", ["s"], "t")], {}, values("s"), ("t",))
    scan = onnx.helper.make_node("Scan", ["X"], ["Y"], "steps", body=body, num_scan_inputs=1)
    _, words = read(model_of(graph_of([scan], {"a": np.ones(2)})), tmp_path)
    assert words == [f"steps {LOOPS}"]
    _, words = read(model_of(graph_of([scan, node], node_weights("GRU", "one"))), tmp_path)
    assert words == []
    body = graph_of([op("MatMul", ["s", "a"], "b"), op("Tanh", ["b"], "t")], {}, values("s"), ("t",))
    scan = onnx.helper.make_node("Scan", ["X"], ["Y"], "steps", body=body, num_scan_inputs=1)
    _, words = read(model_of(graph_of([scan, node], node_weights("GRU", "one"))), tmp_path)
    assert words == [f"steps {LOOPS}"]  # beside a node, if there is a product in its steps


def test_find_rnns_knows_what_nodes_say(tmp_path: Path) -> None:
    nodes = [
        recurrent("RNN", "a", "X", "A", activations=["Relu"]),
        recurrent("RNN", "bb", "X", "C"),
        recurrent("RNN", "ccc", "X", "Y", layout=1, activations=["relu"]),
    ]
    arrays = node_weights("RNN", "a") | node_weights("RNN", "bb") | node_weights("RNN", "ccc")
    tensors, words = read(model_of(graph_of(nodes, arrays)), tmp_path)
    found = {each.prefix: each for each in find_rnns(tensors)}
    assert {prefix: each.spec.cell.name for prefix, each in found.items()} == {
        "a.": "RNN_RELU", "bb.": "RNN_TANH", "ccc.": "RNN_RELU",
    }  # fmt: skip
    assert [each.assumed for each in found.values()] == [{"batch_first": False}, {"batch_first": False}, {}]
    assert found["ccc."].arguments["batch_first"] is True
    assert words == [
        "a. has relu, which weights do not say: make the module with nonlinearity='relu'",
        "ccc. has relu, which weights do not say: make the module with nonlinearity='relu'",
        "ccc. has layout=1, which weights do not say: make the module with batch_first=True",
    ]


def test_a_node_that_is_left_out_is_not_loaded_by_its_initializers(tmp_path: Path) -> None:
    """An RNN whose weights have torch's names, as they are exported without folding, but which torch does not have."""
    names = {"W": "one.weight_ih_l0", "R": "one.weight_hh_l0"}
    arrays = {names["W"]: normal(H, F).astype("f4"), names["R"]: normal(H, H).astype("f4"), "zero": np.array([0])}
    deeper = [op("Unsqueeze", [name, "zero"], f"deeper{key}") for key, name in names.items()]
    for clip, prefixes in ((None, ["one."]), (-0.1, [])):
        node = onnx.helper.make_node("RNN", ["X", "deeperW", "deeperR"], ["Y"], "one", hidden_size=H, clip=clip)
        tensors, words = read(model_of(graph_of([*deeper, node], arrays)), tmp_path)
        assert [each.prefix for each in find_rnns(tensors)] == prefixes
        assert words == ([] if prefixes else [
            "left out nodes that torch does not have: one (clip=-0.1)",
            "left out one.weight_ih_l0, one.weight_hh_l0, with the node that has them",
        ])  # fmt: skip


def _steps(nonlinearity: str, names: bool) -> Any:
    """An RNN as torch's dynamo exporter writes it, step by step; optimized, its weights lose their names."""
    arrays = {"rnn.bias_ih_l0": normal(H).astype("f4"), "rnn.bias_hh_l0": normal(H).astype("f4")}
    weights = {"rnn.weight_ih_l0": normal(H, F).astype("f4"), "rnn.weight_hh_l0": normal(H, H).astype("f4")}
    arrays |= weights if names else {"val_12": weights["rnn.weight_ih_l0"].T, "val_34": weights["rnn.weight_hh_l0"].T}
    nodes = [op("MatMul", ["X", "val_12"], "linear"), op(nonlinearity, ["linear"], "Y")]
    if names:
        nodes[:0] = [op("Transpose", ["rnn.weight_ih_l0"], "val_12", perm=[1, 0])]
    for node in nodes:
        node.metadata_props.add(key="namespace", value=": M/rnn: torch.nn.modules.rnn.RNN/linear: aten.linear.default")
    return model_of(graph_of(nodes, arrays))


@pytest.mark.parametrize("nonlinearity", ["Tanh", "Relu"])
def test_an_rnn_written_step_by_step(nonlinearity: str, tmp_path: Path) -> None:
    tensors, words = read(_steps(nonlinearity, names=False), tmp_path)
    assert words == [
        "left out rnn.bias_ih_l0, rnn.bias_hh_l0, whose other weights have no names, as in an RNN written step by "
        "step: export it with torch.onnx.export(..., dynamo=False)"
    ]
    assert find_rnns(tensors) == []
    tensors, words = read(_steps(nonlinearity, names=True), tmp_path)
    [found] = find_rnns(tensors)
    assert (words, found.prefix, found.said) == ([], "rnn.", {"nonlinearity": nonlinearity.lower()})


@pytest.mark.parametrize("nonlinearity", ["Tanh", "Relu"])
def test_a_cell_written_as_torch_does(nonlinearity: str, tmp_path: Path) -> None:
    shapes = {"weight_ih": (H, F), "weight_hh": (H, H), "bias_ih": (H,), "bias_hh": (H,)}
    arrays = {f"cell.{name}": normal(*shape, seed=len(name)).astype("f4") for name, shape in shapes.items()}
    nodes = [
        onnx.helper.make_node("Gemm", ["h", "cell.weight_hh", "cell.bias_hh"], ["a"], "/cell/Gemm", transB=1),
        onnx.helper.make_node("Gemm", ["x", "cell.weight_ih", "cell.bias_ih"], ["b"], "/cell/Gemm_1", transB=1),
        onnx.helper.make_node("Add", ["a", "b"], ["c"], "/cell/Add"),
        onnx.helper.make_node(nonlinearity, ["c"], ["Y"], f"/cell/{nonlinearity}"),
    ]
    inputs = [*values("x", sizes=[B, F]), *values("h", sizes=[B, H])]
    tensors, words = read(model := model_of(graph_of(nodes, arrays, inputs)), tmp_path)
    [found] = find_rnns(tensors)
    assert (words, found.said, found.is_cell) == ([], {"nonlinearity": nonlinearity.lower()}, True)
    x, h = normal(B, F).astype("f4"), normal(B, H, seed=1).astype("f4")
    assert_close(jaxrnn.apply_cell(found.spec, weights(tensors, found), x, h), run(model, x=x, h=h), atol=1e-6)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_learned_first_state_of_torch(kind: str, torch: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            more = {"nonlinearity": "relu"} if kind == "RNN" else {}
            self.rnn = getattr(torch.nn, kind)(F, H, 2, bidirectional=True, **more)
            self.first = torch.nn.Parameter(torch.randn(4, 1, H))

        def forward(self, x: Any) -> Any:
            first = self.first.expand(-1, x.shape[1], -1).contiguous()
            return self.rnn(x, (first, torch.zeros_like(first)) if kind == "LSTM" else first)[0]

    model, path, x = Model().eval(), tmp_path / "model.onnx", torch.tensor(normal(T, B, F).astype("f4"))
    settings: dict[str, Any] = {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": [0, 1]}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, **settings)
    tensors, words = read(onnx.load(path), tmp_path)
    stated = [text for text in words if "starts from" in text]
    assert len(stated) == 2
    assert all(text.endswith("which the graph makes of first: give it to each call as hx") for text in stated)
    assert len(words) == 2 + (kind == "RNN")
    [found] = find_rnns(tensors)
    h = jnp.broadcast_to(jnp.asarray(tensors["first"]), (4, B, H))
    hx = (h, 0 * h) if kind == "LSTM" else h
    ours = apply(found.spec, weights(tensors, found), jnp.asarray(x.numpy()), hx=hx)[0]
    assert_close(ours, model(x).detach().numpy(), atol=1e-6, rtol=1e-6)


def test_layers_joined_by_sizes_that_the_graph_computes(tmp_path: Path) -> None:
    """As torch's dynamo exporter joins two directions when sizes are not numbers."""
    nodes = [recurrent("GRU", "a", "X", "Ya", "gru", direction="bidirectional")]
    arrays = {name: np.concatenate([array, array]) for name, array in node_weights("GRU", "a").items()}
    arrays |= {name: np.concatenate([array, array]) for name, array in node_weights("GRU", "b", 2 * H).items()}
    arrays |= {str(number): np.array([number]) for number in range(5)}
    nodes += [
        op("Transpose", ["Ya"], "apart", perm=[0, 2, 1, 3]),
        op("Shape", ["apart"], "shape", start=0),
        op("Slice", ["shape", "0", "1"], "time"),
        op("Slice", ["shape", "1", "2"], "rows"),
        op("Slice", ["shape", "2", "3"], "directions"),
        op("Slice", ["shape", "3", "4"], "units"),
        op("Mul", ["directions", "units"], "both"),
        op("Concat", ["time", "rows", "both"], "joined", axis=0),
        op("Reshape", ["apart", "joined"], "Z"),
        recurrent("GRU", "b", "Z", "Y", "gru", direction="bidirectional"),
    ]
    tensors, words = read(model_of(graph_of(nodes, arrays), opset=15), tmp_path)
    assert words == []
    [found] = find_rnns(tensors)
    assert (found.prefix, found.num_layers, found.bidirectional) == ("gru.", 2, True)
    swapped = [node for node in nodes if node.output[0] != "joined"]
    swapped.append(op("Concat", ["rows", "time", "both"], "joined", axis=0))  # which mixes steps with rows
    tensors, words = read(model_of(graph_of(swapped, arrays), opset=15), tmp_path)
    assert [each.num_layers for each in find_rnns(tensors)] == [1, 1]
    assert len(words) == 1


@pytest.mark.parametrize("names", ["aa", "ab", "aba"])
def test_layers_may_have_the_same_weights(names: str, tmp_path: Path) -> None:
    """Torch's exporter gives the second call of a module another path."""
    nodes, arrays, last = [], {"one": np.array([1])}, "X"
    for layer, name in enumerate(names):
        arrays |= node_weights("GRU", name, H, seed=ord(name))
        nodes.append(recurrent("GRU", name, last, f"Y{layer}", "/gru/GRU" + f"_{layer}" * bool(layer)))
        nodes.append(op("Squeeze", [f"Y{layer}", "one"], last := f"Z{layer}"))
    model = model_of(graph_of(nodes, arrays, GRU_X, (last,)))
    tensors, words = read(model, tmp_path)
    [found] = find_rnns(tensors)
    assert (words, found.prefix, found.num_layers) == ([], "gru.", len(names))
    x = normal(T, B, H).astype("f4")
    assert_close(apply(found.spec, weights(tensors, found), jnp.asarray(x))[0], run(model, X=x), atol=1e-6)


@pytest.mark.parametrize("path", ["/gru_1/GRU", "again"])
def test_a_module_called_on_its_own_output_is_one(path: str, tmp_path: Path) -> None:
    """Not two layers of one module: nodes of one module of torch have one path."""
    arrays = node_weights("GRU", "a", H) | {"one": np.array([1])}
    nodes = [recurrent("GRU", "a", "X", "Ya", "/gru/GRU"), op("Squeeze", ["Ya", "one"], "Z")]
    nodes.append(recurrent("GRU", "a", "Z", "Y", path))
    tensors, words = read(model_of(graph_of(nodes, arrays)), tmp_path)
    assert [(each.prefix, each.num_layers) for each in find_rnns(tensors)] == [("gru.", 1)]
    assert words == [
        f"the node {path} has the weights of /gru/GRU, and takes its output: call the module 'gru.' again, on its own "
        "output"
    ]


@pytest.mark.parametrize("between", [None, "Neg"])
def test_a_node_that_starts_from_anothers_end_is_no_layer_of_one_module(between: str | None, tmp_path: Path) -> None:
    arrays = node_weights("GRU", "a", H) | node_weights("GRU", "b", H, seed=5) | {"one": np.array([1])}
    first = recurrent("GRU", "a", "X", "Ya", "/gru/GRU")
    first.output.append("end")
    start = "start" if between else "end"
    nodes = [
        first,
        *([op(between, ["end"], start)] if between else []),
        op("Squeeze", ["Ya", "one"], "Z"),
        recurrent("GRU", "b", "Z", "Y", "/gru/GRU_1", ["", start]),
    ]
    model = model_of(graph_of(nodes, arrays, GRU_X))
    tensors, words = read(model, tmp_path)
    one, two = find_rnns(tensors)
    assert (one.prefix, two.prefix, one.num_layers, two.num_layers) == ("gru.", "gru.1.", 1, 1)
    assert words == [
        f"/gru/GRU_1 starts from the state {start}, which the graph computes: give it to each call as hx",
        "the nodes /gru/GRU and /gru/GRU_1 have the prefix 'gru.': load the second with the prefix 'gru.1.', or give "
        "the nodes other names",
    ]
    x = normal(T, B, H).astype("f4")
    ours, end = jnp.asarray(x), None
    for each in (one, two):
        ours, end = apply(each.spec, weights(tensors, each), ours, end if end is None or not between else -end)
    assert_close(ours, run(model, X=x)[:, 0], atol=1e-6)


@pytest.mark.parametrize("reverse", [0, 1])
def test_a_node_that_runs_backward_is_a_module_of_its_own(reverse: int, tmp_path: Path) -> None:
    """Not a layer of the module below or above, whatever its path, and not another call of one with its weights."""
    arrays, nodes, last = node_weights("GRU", "a", H) | {"one": np.array([1])}, [], "X"
    for layer in range(2):
        direction = "reverse" if layer == reverse else "forward"
        nodes.append(recurrent("GRU", "a", last, f"Y{layer}", f"/gru/GRU_{layer}", direction=direction))
        nodes.append(op("Squeeze", [f"Y{layer}", "one"], last := f"Z{layer}"))
    model = model_of(graph_of(nodes, arrays, GRU_X, (last,)))
    tensors, words = read(model, tmp_path)
    found = find_rnns(tensors)
    assert [(each.prefix, each.num_layers) for each in found] == [("gru.", 1), ("gru.1.", 1)]
    assert words[0].startswith(f"/gru/GRU_{reverse} has direction='reverse': flip its input and its output along the")
    x = normal(T, B, H).astype("f4")
    ours: Any = jnp.asarray(x)
    for layer, each in enumerate(found):
        way = (lambda y: jnp.flip(y, 0)) if layer == reverse else (lambda y: y)
        ours = way(apply(each.spec, weights(tensors, each), way(ours))[0])
    assert_close(ours, run(model, X=x), atol=1e-6)


@pytest.mark.parametrize("loop", ["Loop", "Scan"])
def test_a_node_in_a_loop_is_named(loop: str, tmp_path: Path) -> None:
    helper, arrays = onnx.helper, node_weights("GRU", "a", H) | {"one": np.array([1]), "many": np.array(2)}
    body_nodes = [recurrent("GRU", "a", "x", "y", "in"), op("Squeeze", ["y", "one"], "x_out")]
    given, made = values("x"), values("x_out")
    if loop == "Loop":
        body_nodes.append(op("Identity", ["go"], "go_out"))
        given[:0] = [helper.make_tensor_value_info("step", 7, []), helper.make_tensor_value_info("go", 9, [])]
        made[:0] = [helper.make_tensor_value_info("go_out", 9, [])]
        node = helper.make_node("Loop", ["many", "", "X"], ["Y"], "loop")
    else:
        body_nodes.append(op("Identity", ["scanned"], "scanned_out"))
        given, made = [*given, *values("scanned")], [*made, *values("scanned_out")]
        node = helper.make_node("Scan", ["X", "S"], ["Y", "S_out"], "loop", num_scan_inputs=1)
    node.attribute.append(helper.make_attribute("body", helper.make_graph(body_nodes, "body", given, made)))
    inputs = [*values("X", sizes=[T, B, H]), *(values("S", sizes=[2, 1]) if loop == "Scan" else [])]
    model = model_of(graph_of([node], arrays, inputs))
    tensors, words = read(model, tmp_path)
    assert words == ["in in body of loop runs once for each step of loop: call 'in.' as often"]
    x = normal(T, B, H).astype("f4")
    feeds = {"S": np.zeros((2, 1), "f4")} if loop == "Scan" else {}
    [found] = find_rnns(tensors)
    once = apply(found.spec, weights(tensors, found), jnp.asarray(x))[0]
    twice = apply(found.spec, weights(tensors, found), once)[0]
    assert_close(twice, run(model, X=x, **feeds), atol=1e-6)


def test_names_make_no_lines_of_warnings(tmp_path: Path) -> None:
    arrays = node_weights("GRU", "a") | {"start": np.ones((1, B, H), "f4")}
    node = recurrent("GRU", "a", "X", "Y", "gru\nWarning: all is well\x1b[31m", ["", "start"])
    [text] = read(model_of(graph_of([node], arrays)), tmp_path)[1]
    assert text == (
        r"gru\nWarning: all is well\x1b[31m starts from the state start, which is not zero: give it to each call as hx"
    )
