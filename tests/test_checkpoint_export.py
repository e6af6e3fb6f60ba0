"""Files of torch.export: the weights of a program bit by bit, the settings in its graph, and nothing in a file runs."""

import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from export_archives import (
    export_archive,
    export_of_an_lstm,
    meta,
    older_export,
    torch_save,
    weights_config,
)
from flax import nnx
from memory import memory_to_refuse
from reading import loaded, refusal

import jaxrnn
from jaxrnn.__main__ import main
from jaxrnn.checkpoint import CheckpointError, find_rnns, load, load_tree
from jaxrnn.checkpoint.formats import torch_export

# Of torch: attributes of its own layers that it finds while it exports.
_QUIET = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:(?s).*tensor attri", "ignore:No complete"
)

# Files by hand


def test_an_archive_by_hand(tmp_path: Path) -> None:
    shared = weights_config(w=meta(4), v=meta(2, storage_offset={"as_int": 1}, strides=[{"as_int": 2}]))
    tensors, said = loaded(tmp_path / "a.pt2", export_archive(shared))
    assert {name: array.tolist() for name, array in tensors.items()} == {"w": [0, 1, 2, 3], "v": [1, 3]}
    assert said == []
    with pytest.raises(CheckpointError, match=r"which holds tensors only\nread it with jaxrnn.checkpoint.load"):
        load_tree(tmp_path / "a.pt2")


HUGE = {"as_int": 1 << 40}


@pytest.mark.parametrize(
    ("weights", "cause"),
    [
        (weights_config(w=meta(5)), "w of shape (5,) was saved expanded"),
        (weights_config(w=meta(1, sizes=[HUGE], strides=[{"as_int": 0}])), "was saved expanded"),
        (weights_config(w=meta(1, sizes=[{"as_int": 1 << 63}])), "is of an impossible size"),
        (weights_config(w=meta(1, sizes=[{"as_int": -1}])), "is of an impossible size"),
        (weights_config(w=meta(1, sizes=[{"as_int": True}])), "is of an impossible size"),
        (weights_config(w=meta(1, sizes=[{"as_expr": "s0"}])), "does not describe tensors: 'as_int'"),
        (weights_config(w=meta(1, storage_offset={"as_int": 4})), "it reaches past the end of what is stored"),
        (weights_config(w=meta(1, strides=[])), "is of an impossible shape"),
        (weights_config(w=meta(1, layout=1)), "w is a tensor of layout 1 and dtype 7, as torch.export numbers them"),
        (weights_config(w=meta(1, dtype=9)), "w is a tensor of layout 7 and dtype 9"),
        (weights_config(w=meta(1, dtype=[])), "does not describe tensors"),
        (weights_config(w=meta(1)) | {"config": 1}, "does not describe tensors"),
        (
            {"config": {"w": {"path_name": "weight_0", "use_pickle": True, "tensor_meta": meta(1)}}},
            "w is a tensor of a",
        ),
        (
            {"config": {"w": {"path_name": "weight_9", "use_pickle": False, "tensor_meta": meta(4)}}},
            "was saved expanded",
        ),
        ({"config": {"w": {"path_name": "../../x", "use_pickle": False, "tensor_meta": meta(0)}}}, "none are there"),
        (b'{"config": {"w": 1, "w": 2}}', "has w twice"),
        (b"{" + b"".join(b'"%d": 0, ' % i for i in range(40_000)) + b'"w": 1, "w": 2}', "has w twice"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"config": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
    ],
)
def test_descriptions_that_torch_does_not_write(weights: Any, cause: str, tmp_path: Path) -> None:
    assert cause in refusal(tmp_path / "a.pt2", export_archive(weights))


def test_what_is_no_program(tmp_path: Path) -> None:
    def without(name: str, **entries: bytes) -> bytes:
        file, out = io.BytesIO(export_archive(weights_config(), **entries)), io.BytesIO()
        with zipfile.ZipFile(file) as reader, zipfile.ZipFile(out, "w") as writer:
            for each in reader.namelist():
                if each != f"model/{name}":
                    writer.writestr(each, reader.read(each))
        return out.getvalue()

    compiled = without("models/model.json", **{"data/aotinductor/model/a.so": b"\x7fELF"})
    assert refusal(tmp_path / "a", compiled) == "a package of AOTInductor, which holds compiled code"
    assert refusal(tmp_path / "a", without("models/model.json")) == "a .pt2 archive without a program"
    name = "data/weights/model_weights_config.json"
    assert refusal(tmp_path / "a", without(name)) == f"damaged: it has no {name}"
    fake = export_archive(weights_config(w=meta(4)), **{"data/weights/weight_0": b""})
    assert refusal(tmp_path / "a", fake) == "w is a fake tensor, without numbers"


@pytest.mark.parametrize(
    ("changes", "expected", "cause"),
    [
        ({}, {"batch_first": True}, ""),
        ({"batch_first": {"as_bool": False}}, {"batch_first": False}, ""),
        ({"batch_first": {"as_sym_bool": {"as_name": "x"}}}, {}, ""),
        ({"num_layers": {"as_int": 2}}, {}, "its code calls it with settings that do not fit its weights"),
        ({"bidirectional": {"as_bool": True}}, {}, "its code calls it with settings that do not fit its weights"),
    ],
)
def test_settings(changes: Any, expected: Any, cause: str, tmp_path: Path) -> None:
    tensors, said = loaded(tmp_path / "a.pt2", export_of_an_lstm(**changes))
    [found] = find_rnns(tensors)
    assert found.said == expected
    assert len(said) == bool(cause)
    assert all(cause in text for text in said)


@pytest.mark.parametrize(
    "graph", [b"[]", b"{}", b'{"graph_module": {"signature": {"input_specs": 1}}}', b"[" * 100_000]
)
def test_graphs_that_torch_does_not_write(graph: bytes, tmp_path: Path) -> None:
    data = export_archive(weights_config(w=meta(4)), **{"models/model.json": graph})
    assert "damaged: its " in refusal(tmp_path / "a.pt2", data)


def test_an_argument_without_a_value(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.pt2", export_of_an_lstm(batch_first={})).startswith("damaged: its graph is not one of")


EVIL = b"\x80\x02}X\x01\x00\x00\x00wcposix\nsystem\nX\x0a\x00\x00\x00touch evil\x85Rs."


def test_the_older_layout_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    arrays = {"w": np.arange(4.0), "b": np.arange(3, dtype=np.int8)}
    for name in ("serialized_state_dict.pt", "serialized_state_dict.json"):
        tensors, said = loaded(tmp_path / "a.pt2", older_export(torch_save(arrays), name))
        assert said == []
        for each, array in arrays.items():
            np.testing.assert_array_equal(tensors[each], array, strict=True)
    inside = io.BytesIO()
    with zipfile.ZipFile(inside, "w") as writer:
        writer.writestr("archive/data.pkl", EVIL)
    assert "it names posix.system" in refusal(tmp_path / "a.pt2", older_export(inside.getvalue()))
    assert "truncated or damaged" in refusal(tmp_path / "a.pt2", older_export(torch_save(arrays)[:-30]))
    flipped = bytearray(older_export(torch_save(arrays)))
    flipped[flipped.index(np.arange(4.0).tobytes()) + 9] ^= 1
    assert "the checksum (CRC) of its entry" in refusal(tmp_path / "a.pt2", bytes(flipped))


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "JSON": (
        lambda: export_archive(b" " * 60_000_000),
        "a zip bomb: its entry model/data/weights/model_weights_config.json",
    ),
    "graph": (
        lambda: export_archive(weights_config(), **{"models/model.json": b"[" * 60_000_000}),
        "a zip bomb: its entry",
    ),
    "deep JSON": (lambda: export_archive(b"[" * 200_000), "is not JSON"),
    "sizes": (
        lambda: export_archive(weights_config(w=meta(1, sizes=[HUGE] * 3, strides=[{"as_int": 0}] * 3))),
        "was saved expanded",
    ),
    "views": (
        lambda: export_archive(
            weights_config(**{f"w{k}": meta(1 << 18) for k in range(300)}), **{"data/weights/weight_0": bytes(1 << 20)}
        ),
        "a zip bomb: its tensors have 314572800 bytes",
    ),
    "inside": (lambda: older_export(_inflating()), "a zip bomb: its entry archive/data.pkl inflates"),
}


def _inflating() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as writer:
        writer.writestr("archive/data.pkl", b"(" * 60_000_000)
    return file.getvalue()


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str, tmp_path: Path) -> None:
    make, cause = BOMBS[name]
    assert cause in refusal(tmp_path / "a.pt2", make())


@pytest.mark.slow
def test_bombs_take_no_memory(tmp_path: Path) -> None:
    for name, (make, _) in BOMBS.items():
        (tmp_path / name).write_bytes(make())
    assert memory_to_refuse(tmp_path / name for name in BOMBS) < 50_000_000


# With torch


def _model(torch: ModuleType) -> Any:
    nn = torch.nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.LSTM(3, 4, 2, batch_first=True, dropout=0.25, bidirectional=True)])
            self.gru = nn.GRU(8, 4, bias=False)
            self.projected = nn.LSTM(4, 4, proj_size=2)
            self.relu = nn.RNN(2, 4, nonlinearity="relu")
            self.tanh = nn.RNN(4, 4)
            self.relu_cell, self.cell = nn.RNNCell(4, 4, nonlinearity="relu"), nn.LSTMCell(4, 4)
            self.tied = self.tanh
            self.head = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
            self.same = nn.Linear(4, 2)
            self.same.weight = self.head[0].weight
            self.register_buffer("brain", torch.ones(2, 3).T.bfloat16())
            self.register_buffer("passing", torch.arange(3), persistent=False)
            self.plain = torch.arange(2.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x
            for layer in (*self.layers, self.gru, self.projected, self.relu, self.tanh, self.tied):
                y, _ = layer(y)
            z, _ = self.cell(self.relu_cell(y[0]))
            return self.head(z) + self.same(z) + self.brain[0, 0] + self.passing[1] + self.plain

    return Model().eval()


def _older(torch: ModuleType, program: Any, path: Path) -> None:
    """Save a program as torch 2.1 to 2.7 did: torch.export.save of 2.6, line by line."""
    from torch._export.serde.schema import SCHEMA_VERSION
    from torch._export.serde.serialize import serialize

    artifact = serialize(program)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("serialized_exported_program.json", artifact.exported_program)
        file.writestr("serialized_state_dict.pt", artifact.state_dict)
        file.writestr("serialized_constants.pt", artifact.constants)
        file.writestr("serialized_example_inputs.pt", artifact.example_inputs)
        file.writestr("version", ".".join(map(str, SCHEMA_VERSION)))


@_QUIET
@pytest.mark.torch
@pytest.mark.parametrize("older", [False, True], ids=["since 2.8", "before"])
def test_programs_of_torch(older: bool, torch: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    program = torch.export.export(_model(torch), (torch.ones(2, 5, 3),))
    if older:
        _older(torch, program, path)
    else:
        torch.export.save(program, path)
    tensors, [said] = loaded(path)
    assert said.startswith("left out constants of the program: ")
    expected = torch.export.load(path).state_dict
    assert list(tensors) == list(expected)
    for name, tensor in expected.items():
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        assert f"torch.{tensors[name].dtype}" == str(tensor.dtype)
        assert tensors[name].shape == tuple(tensor.shape)
        assert tensors[name].tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    found = {each.prefix: each for each in find_rnns(tensors)}
    assert {prefix: each.said for prefix, each in found.items()} == {
        "layers.0.": {"batch_first": True, "dropout": 0.25},
        "gru.": {"batch_first": False},
        "projected.": {"batch_first": False},
        "relu.": {"nonlinearity": "relu", "batch_first": False},
        "tanh.": {"nonlinearity": "tanh", "batch_first": False},
        "tied.": {"nonlinearity": "tanh", "batch_first": False},
        "relu_cell.": {"nonlinearity": "relu"},
        "cell.": {},
    }
    assert all(each.assumed == {} for each in found.values())
    constants = load(path, key="constants")
    assert (constants["passing"].tolist(), constants["plain"].tolist()) == ([0, 1, 2], [0, 1])


@pytest.mark.torch
def test_the_dtypes_that_torch_numbers(torch: ModuleType) -> None:
    """All of torch's are known, but for half complex numbers, which NumPy lacks."""
    from torch._export.serde.schema import ScalarType
    from torch._export.serde.serialize import deserialize_scalar_type

    known = {number: f"torch.{name}" for number, name in torch_export._DTYPES.items()}
    theirs = {int(each): each for each in ScalarType if each.name not in ("UNKNOWN", "COMPLEXHALF")}
    assert {number: str(deserialize_scalar_type(each)) for number, each in theirs.items()} == known


@_QUIET
@pytest.mark.torch
def test_the_commands(torch: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.GRU(3, 4, batch_first=True).eval()
    x, path, out = torch.ones(2, 5, 3), tmp_path / "a.pt2", tmp_path / "out.pt"
    torch.export.save(torch.export.export(model, (x,)), path)
    for command in (["inspect", str(path)], ["check", str(path)], ["convert", str(path), str(out)]):
        assert main(command) == 0
    assert "batch_first=True" in capsys.readouterr().out
    assert list(torch.load(out)) == list(model.state_dict())
    gru = jaxrnn.GRU(3, 4, batch_first=True, rngs=nnx.Rngs(0))
    assert jaxrnn.load_state_dict(gru, load(path)) == ([], [])
    np.testing.assert_allclose(gru(jnp.asarray(x.numpy()))[0], model(x)[0].detach().numpy(), atol=1e-6)
