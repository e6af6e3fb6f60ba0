"""TorchScript archives: the tensors of state_dict() bit by bit, the settings in the code, and nothing runs."""

import enum
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from memory import memory_to_refuse
from reading import loaded, refusal
from script_archives import TENSOR, script_archive, script_object, text

import jaxrnn
from jaxrnn.__main__ import main
from jaxrnn.checkpoint import CheckpointError, find_rnns, load, load_tree

# Of torch, which deprecates its own functions here.
_QUIET = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:.*:UserWarning:torch", "ignore:.*quantiz", "ignore:(Converting|Using len)"
)


def test_an_archive_by_hand(tmp_path: Path) -> None:
    tensors, said = loaded(tmp_path / "a.pt", script_archive(script_object(b"}" + text("w") + TENSOR + b"s")))
    assert {name: array.tolist() for name, array in tensors.items()} == {"w": [0, 1, 2, 3]}
    assert said == []


EVIL = b"cposix\nsystem\nX\x0a\x00\x00\x00touch evil\x85R"


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (EVIL, "it names posix.system"),
        (script_object(b"}" + text("w") + EVIL + b"s"), "it names posix.system"),
        (script_object(EVIL), "it names posix.system"),
        (b"\x8c\x02os\x8c\x06system\x93)R", "it names os.system"),
        (b"(ios\nsystem\n", "has the operation INST"),
        (b"c__torch__\nM\n)}\x92", "has the operation NEWOBJ_EX"),
        (b"(c__torch__\nM\no", "has the operation OBJ"),
        (b"\x82\x01", "has the operation EXT1"),
        (b"Pname\n", "has the operation PERSID"),
        (b"c__torch__\nM\nK\x01\x85\x81}b", "an object is made of something"),
        (b"c__torch__\nM\nK\x01\x81}b", "truncated or damaged"),
        (b"c__torch__.os\nsystem\nX\x02\x00\x00\x00lsR", "whose data is not a module"),
        (b"}", "whose data is not a module"),
        (script_object(b"}", b"__torch__\nN"), "the model is a __torch__.N, and the archive has no code of it"),
        (script_object(b"}", b"__torch__.a.b\nM"), "the archive has no code of it"),
        (script_object(b")"), "the model is a __torch__.M, which its own code restores: __setstate__ is not run"),
        (script_object(b"}K\x01K\x02s"), "which its own code restores"),
        (
            script_object(b"}" + text("w") + script_object(b"}", b"__torch__.torch.classes.x\nY") + b"s"),
            "w is a __torch__.torch.",
        ),
        (script_object(b"}" + text("w") + TENSOR + b"s") * 2 + b"a", "truncated or damaged"),
        (b"ctorch.jit._pickle\nbuild_tensorlist\n)R", "truncated or damaged"),
        (b"ctorch.jit._pickle\nbuild_tensor_from_id\nK\x00R", "build_tensor_from_id"),
        (b"(" * 100_000, "truncated or damaged"),
    ],
)
def test_pickles_that_do_what_torch_does_not(data: bytes, cause: str, tmp_path: Path) -> None:
    assert cause in refusal(tmp_path / "a.pt", script_archive(data))


def test_every_operation_of_pickles(tmp_path: Path) -> None:
    """Alone, and before a good archive's data: no operation makes an object or calls a function."""
    import pickletools

    good = script_object(b"}" + text("w") + TENSOR + b"s")
    for opcode in pickletools.opcodes:
        for before in (b"", b"cos\nsystem\n", b"(" + text("ls"), text("os") + text("system")):
            code = opcode.code.encode("latin1")
            (tmp_path / "a.pt").write_bytes(script_archive(before + code + b"1\nos\nsystem\n" + good))
            try:
                tensors = load(tmp_path / "a.pt")
            except CheckpointError:
                continue
            assert list(tensors) == ["w"], opcode.name


def _modules(depth: int) -> bytes:
    """Modules in modules, without recursion."""
    return b"c__torch__\nM\n)\x81}" + (text("m") + b"c__torch__\nM\n)\x81}") * depth + b"b" + b"sb" * depth


def _shared(levels: int) -> bytes:
    """Modules that each have the one below twice: 2^levels paths."""
    data = b"c__torch__\nM\n)\x81q\x000"
    for level in range(levels):
        below, above = bytes([level]), bytes([level + 1])
        data += (
            b"c__torch__\nM\n)\x81}"
            + text("a")
            + b"h"
            + below
            + b"s"
            + text("b")
            + b"h"
            + below
            + b"sbq"
            + above
            + b"0"
        )
    return data + b"h" + bytes([levels])


def _zipped(name: str, size: int) -> bytes:
    """An archive with an entry of many zeros or spaces, compressed."""
    file = io.BytesIO(script_archive(script_object(b"}")))
    out = io.BytesIO()
    with zipfile.ZipFile(file) as reader, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as writer:
        for each in reader.namelist():
            if each != f"model/{name}":
                writer.writestr(each, reader.read(each))
        writer.writestr(f"model/{name}", b"(" * size)
    return out.getvalue()


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "modules in modules": (lambda: script_archive(_modules(200_000)), "its modules are nested more than 100 deep"),
    "lists in lists": (
        lambda: script_archive(script_object(b"}" + text("a") + b"]" * 200_000 + b"a" * 199_999 + b"s")),
        "no recurrent weights",
    ),
    "a module in itself": (
        lambda: script_archive(b"c__torch__\nM\n)\x81q\x00}" + text("m") + b"h\x00sb"),
        "its modules are nested more than 100 deep",
    ),
    "shared modules": (lambda: script_archive(_shared(60)), "its modules have too many attributes"),
    "shared modules, and tensors": (
        lambda: script_archive(_shared(60).replace(b"}", b"}" + text("w") + TENSOR + b"s", 1)),
        "its modules have too many attributes",
    ),
    "shared modules of many weights": (
        lambda: script_archive(
            _shared(10).replace(b"}", b"}(" + b"".join(text(f"w{i}") + TENSOR for i in range(1000)) + b"u", 1)
        ),
        "its modules have too many attributes",
    ),
    "a list of tensors in shared modules": (
        lambda: script_archive(
            _shared(10).replace(b"}", b"}" + text("l") + b"](" + TENSOR + b"q\xc8" + b"h\xc8" * 1000 + b"es", 1)
        ),
        "its modules have too many attributes",
    ),
    "a pickle": (lambda: _zipped("data.pkl", 60_000_000), "a zip bomb: its entry model/data.pkl inflates to 60000000"),
    "code": (lambda: _zipped("code/__torch__.py", 60_000_000), "a zip bomb: its entry model/code/__torch__.py"),
    "constants": (lambda: _zipped("constants.pkl", 60_000_000), "a zip bomb: its entry model/constants.pkl"),
    "storage": (
        lambda: script_archive(
            script_object(b"}" + text("w") + TENSOR.replace(b"K\x04tQ", b"\x8a\x05\x00\x00\x00\x00\x40tQ") + b"s")
        ),
        "w should have 1099511627776 bytes, and 16 are there",
    ),
    "stride 0": (
        lambda: script_archive(
            script_object(
                b"}" + text("w") + TENSOR.replace(b"K\x04\x85K\x01", b"\x8a\x05\x00\x00\x00\x00\x40\x85K\x00") + b"s"
            )
        ),
        "was saved expanded",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str, tmp_path: Path) -> None:
    make, cause = BOMBS[name]
    if name == "lists in lists":
        (tmp_path / "a.pt").write_bytes(make())
        assert load(tmp_path / "a.pt") == {}
    else:
        assert cause in refusal(tmp_path / "a.pt", make())


@pytest.mark.slow
def test_bombs_take_no_memory(tmp_path: Path) -> None:
    for name, (make, _) in BOMBS.items():
        (tmp_path / name).write_bytes(make())
    assert memory_to_refuse(tmp_path / name for name in BOMBS) < 50_000_000


# With torch


class Color(enum.Enum):
    RED = 1
    GREEN = 2


def _models(torch: ModuleType) -> dict[str, Any]:
    """Modules, and what to call them with."""
    nn = torch.nn

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleList([nn.LSTM(3, 4, 2, batch_first=True, dropout=0.25), nn.GRU(4, 4, bias=False)])
            self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4))
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.head[0].weight
            self.shared = self.encoder[1]
            self.register_buffer("scale", torch.ones(2, 2).T.bfloat16())
            self.register_buffer("none", None)
            self.register_buffer("halves", torch.arange(6.0)[::2])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x
            for layer in self.encoder:
                y, _ = layer(y)
            y, _ = self.shared(y)
            return self.tied(self.head(y[0])) * self.scale[0, 0].float()

    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.RNNCell(3, 4, nonlinearity="relu")
            self.tanh = nn.RNNCell(4, 4)
            self.gru = nn.GRUCell(4, 4)
            self.lstm = nn.LSTMCell(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.lstm(self.gru(self.tanh(self.relu(x[0]))))

    return {
        "LSTM": nn.LSTM(3, 4, batch_first=True),
        "GRU": nn.GRU(3, 4),
        "RNN": nn.RNN(3, 4, batch_first=True),
        "RNN of relu": nn.RNN(3, 4, 2, nonlinearity="relu", dropout=0.5),
        "stacked both ways": nn.LSTM(3, 4, 3, bidirectional=True, dropout=0.125),
        "projected": nn.LSTM(3, 4, proj_size=2, bidirectional=True, batch_first=True),
        "bfloat16": nn.GRU(3, 4, batch_first=True).bfloat16(),
        "nested": Nested(),
        "cells": Cells(),
    }


SAID: dict[str, list[dict[str, Any]]] = {
    "LSTM": [{"batch_first": True}],
    "GRU": [{"batch_first": False}],
    "RNN": [{"nonlinearity": "tanh", "batch_first": True}],
    "RNN of relu": [{"nonlinearity": "relu", "batch_first": False, "dropout": 0.5}],
    "stacked both ways": [{"batch_first": False, "dropout": 0.125}],
    "projected": [{"batch_first": True}],
    "bfloat16": [{"batch_first": True}],
    "nested": [{"batch_first": True, "dropout": 0.25}, {"batch_first": False}, {"batch_first": False}],
    "cells": [{"nonlinearity": "relu"}, {"nonlinearity": "tanh"}, {}, {}],
}


def _assert_same(tensors: Any, expected: Any, torch: ModuleType) -> None:
    """Names, order, dtypes, shapes and bits."""
    assert list(tensors) == list(expected)
    for name, tensor in expected.items():
        tensor = tensor.detach().resolve_conj().clone(memory_format=torch.contiguous_format)
        assert str(tensor.dtype) == f"torch.{tensors[name].dtype}"
        assert tensors[name].shape == tuple(tensor.shape)
        assert tensors[name].tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@_QUIET
@pytest.mark.torch
@pytest.mark.parametrize("traced", [False, True], ids=["script", "trace"])
@pytest.mark.parametrize("name", SAID)
def test_models_of_torch(name: str, traced: bool, torch: ModuleType, tmp_path: Path) -> None:
    model = _models(torch)[name].eval()
    x = torch.ones(5, 2, 3, dtype=next(model.parameters()).dtype)
    script = torch.jit.trace(model, x) if traced else torch.jit.script(model)
    script.save(tmp_path / "a.pt")
    tensors, said = loaded(tmp_path / "a.pt")
    _assert_same(tensors, torch.jit.load(tmp_path / "a.pt").state_dict(), torch)
    assert said == []
    found = find_rnns(tensors)
    assert [each.said for each in found] == SAID[name]
    assert all(each.assumed == {} for each in found)


@pytest.mark.torch
def test_the_constants_of_torchs_classes(torch: ModuleType) -> None:
    """All are read, or are the shapes of weights: input_size and proj_size."""
    layers = {"mode", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "hidden_size"}
    assert {*torch.nn.RNNBase.__constants__} == {*layers, "input_size", "proj_size"}
    assert {*torch.nn.RNNCell.__constants__} == {"input_size", "hidden_size", "bias", "nonlinearity"}
    for kind in (torch.nn.LSTMCell, torch.nn.GRUCell):
        assert {*kind.__constants__} == {"input_size", "hidden_size", "bias"}


@_QUIET
@pytest.mark.torch
def test_attributes_that_are_no_parameters(torch: ModuleType, tmp_path: Path) -> None:
    class Pair(NamedTuple):
        a: torch.Tensor
        b: int

    @torch.jit.script
    class Box:
        def __init__(self, inside: torch.Tensor) -> None:
            self.inside = inside

    class Model(torch.nn.Module):
        color: Color
        pair: Pair
        nothing: torch.Tensor | None
        tensors: dict[str, torch.Tensor]

        def __init__(self) -> None:
            super().__init__()
            self.rnn = torch.nn.GRU(3, 4)
            self.color, self.pair, self.nothing = Color.GREEN, Pair(torch.ones(2), 3), None
            self.box, self.tensors, self.names = Box(torch.ones(4)), {"k": torch.zeros(2)}, ["a", "b"]
            self.device, self.dtype, self.complex, self.nan = torch.device("cpu"), torch.float32, 1 + 2j, float("nan")
            self.plain, self.number = torch.arange(3), torch.tensor(2)
            self.table = torch.nn.ModuleDict({"a b": torch.nn.Linear(2, 2), "é": torch.nn.Linear(2, 2)})
            self.register_parameter("é", torch.nn.Parameter(torch.ones(1)))
            self.register_parameter("none", None)
            self.register_buffer("conjugate", torch.tensor([1 + 2j]).conj())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.color == Color.GREEN:
                x = x + self.pair.a[0] + self.pair.b + self.box.inside[0] + self.tensors["k"][0] + self.plain[0]
            return self.rnn(x)[0]

    torch.jit.script(Model()).save(tmp_path / "a.pt", _extra_files={"notes/a.txt": "x"})
    tensors, [said] = loaded(tmp_path / "a.pt")
    _assert_same(tensors, torch.jit.load(tmp_path / "a.pt").state_dict(), torch)
    cause = "left out tensors that are neither parameters nor buffers: pair.0, box.inside, tensors.k, plain"
    assert said == f"{cause}\nif they matter, read them with jaxrnn.checkpoint.load_tree(path)"
    tree = load_tree(tmp_path / "a.pt")
    assert (tree["color"], tree["nothing"], tree["names"], tree["device"]) == (2, None, ["a", "b"], "cpu")
    assert (tree["complex"], tree["pair"][1], tree["plain"].tolist()) == (1 + 2j, 3, [0, 1, 2])
    assert tree["box"]["inside"].tolist() == [1, 1, 1, 1]
    assert load_tree(tmp_path / "a.pt", "table.a b.bias").shape == (2,)
    assert load_tree(tmp_path / "a.pt", "tensors.k").tolist() == [0, 0]


@_QUIET
@pytest.mark.torch
def test_frozen_models(torch: ModuleType, tmp_path: Path) -> None:
    """Their weights are constants: recurrent ones get torch's names, by the calls that use them."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = torch.nn.LSTM(3, 4, 2, batch_first=True, dropout=0.25, bidirectional=True)
            self.decoder = torch.nn.RNN(8, 4, nonlinearity="relu")
            self.head = torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, _ = self.encoder(x)
            y, _ = self.decoder(y)
            return self.head(y)

    model = Model().eval()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    settings = [{"batch_first": True, "dropout": 0.25}, {"batch_first": False, "nonlinearity": "relu"}]
    torch.jit.freeze(torch.jit.script(model)).save(tmp_path / "a.pt")
    assert not torch.jit.load(tmp_path / "a.pt").state_dict()
    tensors, [said] = loaded(tmp_path / "a.pt")
    assert said == (
        "frozen: its weights have no names; its code gave these modules theirs: encoder, decoder\n"
        "rename them as your module has them, or save state_dict() before torch.jit.freeze"
    )
    assert [each.said for each in find_rnns(tensors)] == settings
    for name, array in state.items():
        if "head" not in name:
            assert np.array_equal(tensors[name], array), name
    others = [array for name, array in tensors.items() if name.startswith("CONSTANTS.c")]
    assert any(np.array_equal(array, state["head.bias"]) for array in others)
    torch.jit.optimize_for_inference(torch.jit.script(model)).save(tmp_path / "b.pt")
    assert loaded(tmp_path / "b.pt")[0].keys() >= state.keys() - {"head.weight", "head.bias"}

    torch.jit.freeze(torch.jit.script(_models(torch)["cells"].eval())).save(tmp_path / "a.pt")
    found = find_rnns(loaded(tmp_path / "a.pt")[0])
    assert sorted((each.class_name, each.said.get("nonlinearity")) for each in found) == [
        ("GRUCell", None), ("LSTMCell", None), ("RNNCell", "relu"), ("RNNCell", "tanh"),
    ]  # fmt: skip
    torch.jit.freeze(torch.jit.trace(model, torch.ones(5, 2, 3))).save(tmp_path / "a.pt")
    assert [each.said for each in find_rnns(loaded(tmp_path / "a.pt")[0])] == settings

    class Kept(torch.nn.Module):
        """Of this one, the frozen trace keeps the parameters of layers, and not the code of their class."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.ModuleList([torch.nn.GRU(3, 4, batch_first=True)])
            self.cell = torch.nn.LSTMCell(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.cell(self.inner[0](x)[0][0])[0]

    torch.jit.freeze(torch.jit.trace(Kept().eval(), torch.ones(5, 2, 3))).save(tmp_path / "a.pt")
    tensors, [said] = loaded(tmp_path / "a.pt")
    _assert_same(tensors, torch.jit.load(tmp_path / "a.pt").state_dict(), torch)
    assert "left out tensors that are neither parameters nor buffers: CONSTANTS.c0" in said
    assert [(each.prefix, each.said) for each in find_rnns(tensors)] == [("inner.0.", {"batch_first": True})]
    assert "c0" in load_tree(tmp_path / "a.pt")["CONSTANTS"]


@_QUIET
@pytest.mark.torch
@pytest.mark.parametrize("traced", [False, True], ids=["script", "trace"])
def test_quantized_models(traced: bool, torch: ModuleType, tmp_path: Path) -> None:
    """As their state dicts, except that the file says in how many directions layers go."""
    nn = torch.nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 4, 1, bidirectional=True, batch_first=True)
            self.cell = nn.GRUCell(8, 8)
            self.head = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, _ = self.rnn(x)
            return self.head(self.cell(y[0]))

    model = Model()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.GRUCell, nn.Linear})
    x = torch.ones(2, 5, 4)
    (torch.jit.trace(quantized, x) if traced else torch.jit.script(quantized)).save(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="dequantize=True, or --dequantize on the command line"):
        load(tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="dequantized rnn.weight_ih_l0"):
        tensors = load(tmp_path / "a.pt", dequantize=True)
    assert sorted(tensors) == sorted(model.state_dict())
    expected = {f"rnn.{name}": each.dequantize() for name, each in quantized.rnn.get_weight().items()}
    expected |= {"head.weight": quantized.head.weight().dequantize(), "head.bias": quantized.head.bias().detach()}
    for name, tensor in expected.items():
        assert np.array_equal(tensors[name], tensor.numpy()), name
    layers, cell = find_rnns(tensors)
    assert (layers.bidirectional, layers.num_layers, layers.said) == (True, 1, {"batch_first": True})
    assert cell.class_name == "GRUCell"


@_QUIET
@pytest.mark.torch
def test_the_commands(torch: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _models(torch)["LSTM"].eval()
    path, out = tmp_path / "a.pt", tmp_path / "out.pt"
    torch.jit.script(model).save(path)
    for command in (["inspect", str(path)], ["check", str(path)], ["convert", str(path), str(out)]):
        assert main(command) == 0
    assert "batch_first=True" in capsys.readouterr().out
    _assert_same(load(out), model.state_dict(), torch)
    lstm = jaxrnn.LSTM(3, 4, batch_first=True, rngs=nnx.Rngs(0))
    assert jaxrnn.load_state_dict(lstm, load(path)) == ([], [])
    x = np.ones((2, 5, 3), np.float32)
    np.testing.assert_allclose(lstm(jnp.asarray(x))[0], model(torch.tensor(x))[0].detach().numpy(), atol=1e-6)
    with pytest.warns(UserWarning, match="batch_first"):
        jaxrnn.load_state_dict(jaxrnn.LSTM(3, 4, rngs=nnx.Rngs(0)), load(path))


def test_an_attribute_with_the_name_of_the_constants(tmp_path: Path) -> None:
    constants = b"\x80\x02" + TENSOR + b"\x85."
    for name, cause in (("w", "its keys: c0"), ("CONSTANTS", "the model has an attribute CONSTANTS, which is also")):
        data = script_archive(script_object(b"}" + text(name) + TENSOR + b"s"), constants=constants)
        (tmp_path / "a.pt").write_bytes(data)
        with pytest.raises(CheckpointError, match=cause):
            load_tree(tmp_path / "a.pt", "CONSTANTS.c9")
