"""What the code in TorchScript archives says of settings, and code that says nothing."""

import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reading import loaded
from script_archives import TENSOR, script_archive, script_object, text

import jaxrnn
from jaxrnn.checkpoint import CheckpointError, find_rnns
from jaxrnn.checkpoint.formats import torchscript
from jaxrnn.checkpoint.formats.recurrent_calls import Call, Said


def _lstm(code: str, folder: Path, kind: str = "LSTM", layers: int = 2) -> tuple[Any, list[str]]:
    """The tensors of an LSTM with this code in its class, and what is said of them."""
    shapes = jaxrnn.Spec(getattr(jaxrnn, f"{kind}_CELL"), 1, 1, layers).shapes()
    state = b"".join(text(name) + _numbers(index, shape) for index, (name, shape) in enumerate(shapes.items()))
    names = ", ".join(f'"{name}"' for name in shapes)
    code = f"class M(Module):\n  __parameters__ = [{names}, ]\n  __buffers__ = []\n{code}"
    storages = {f"data/{index}": bytes(4 * int(np.prod(shape))) for index, shape in enumerate(shapes.values())}
    return loaded(folder / "a.pt", script_archive(script_object(b"}(" + state + b"u"), code, **storages))


def _numbers(index: int, shape: tuple[int, ...]) -> bytes:
    sizes, strides = pickle.dumps(shape, 2)[2:-1], pickle.dumps((1,) * len(shape), 2)[2:-1]
    sizes, strides = (each.replace(b"q\x00", b"") for each in (sizes, strides))
    tensor = TENSOR.replace(b"X\x01\x00\x00\x000", text(str(index))).replace(b"K\x04tQ", b"K%ctQ" % int(np.prod(shape)))
    return tensor.replace(b"K\x04\x85K\x01\x85", sizes + strides)


FINAL = """  mode : Final[str] = "LSTM"
  bias : Final[bool] = True
  batch_first : Final[bool] = True
  num_layers : Final[int] = 2
  bidirectional : Final[bool] = False
  hidden_size : Final[int] = 1
  dropout : Final[float] = 0.25
"""
CALL = """  def forward(self: __torch__.M,
    x: Tensor) -> Tensor:
    _w = self._flat_weights
    _1, _2, _3 = torch.lstm(x, [h, c], [LIST], True, 2, 0.25, False, False, True)
"""
WEIGHTS = [f"{role}_l{layer}" for layer in range(2) for role in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
TRACED = "".join(f"    {name} = self.{name}\n" for name in WEIGHTS)
BY_CALL = CALL.replace("    _w = self._flat_weights\n", TRACED).replace("LIST", ", ".join(WEIGHTS))


@pytest.mark.parametrize("code", [FINAL, BY_CALL, FINAL + BY_CALL], ids=["constants", "call", "both"])
def test_settings(code: str, tmp_path: Path) -> None:
    tensors, said = _lstm(code, tmp_path)
    assert said == []
    [found] = find_rnns(tensors)
    assert (found.said, found.assumed) == ({"batch_first": True, "dropout": 0.25}, {})


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (FINAL.replace("= 2", "= 3"), "its class says num_layers=3, which does not fit its weights"),
        (
            FINAL.replace("bidirectional : Final[bool] = False", "bidirectional : Final[bool] = True"),
            "bidirectional=True",
        ),
        (FINAL.replace('"LSTM"', '"GRU"'), "its class says mode=GRU, hidden_size=1, which does not fit its weights"),
        (FINAL.replace('"LSTM"', '"RNN_RELU"'), "mode=RNN_RELU"),
        (FINAL.replace("hidden_size : Final[int] = 1", "hidden_size : Final[int] = 2"), "hidden_size=2"),
        (BY_CALL.replace("True, 2,", "True, 3,"), "its code calls it with settings that do not fit its weights"),
        (
            FINAL + BY_CALL.replace("False, True)", "False, False)"),
            "its code says batch_first=False, dropout=0.25, and",
        ),
    ],
)
def test_code_that_contradicts_itself_is_named(code: str, cause: str, tmp_path: Path) -> None:
    tensors, [said] = _lstm(code, tmp_path)
    assert said.startswith("the model: ")
    assert cause in said
    assert "compare the outputs" in said
    [found] = find_rnns(tensors)
    assert found.said == {}


@pytest.mark.parametrize(
    "code",
    [
        "",
        FINAL.replace("Final[bool] = True", "Final[bool] = __import__('os').system('ls')").replace("0.25", "1 / 4"),
        FINAL.replace("  batch_first", "    batch_first").replace("  dropout", "    dropout"),
        BY_CALL.replace("True, 2, 0.25, False, False, True", "flag, n, p, False, both, first"),
        BY_CALL.replace("_1, _2, _3 = torch.lstm", "_1, _2, _3 = other.lstm"),
        BY_CALL.replace("weight_hh_l1 = self", "weight_hh_l1 = elsewhere"),
        '  batch_first : Final[bool] = "' + "\\" * 50_001,
        CALL.replace("LIST", "a, " * 20_000 + "b"),
        "    a = " + "b." * 20_000 + "c\n",
        "    a, " * 20_000 + " = torch.lstm(",
        "    x = torch.lstm(" + "a, " * 20_000,
        "    x = torch.lstm(" + "[a, " * 20_000 + ")",
    ],
)
def test_other_code_says_nothing(code: str, tmp_path: Path) -> None:
    """Nor does it take long: the expressions are linear."""
    tensors, said = _lstm(code, tmp_path)
    assert said == []
    [found] = find_rnns(tensors)
    assert found.said == {}


def test_lines_that_could_take_forever(tmp_path: Path) -> None:
    spaces, quotes = " " * 100_000, '  __parameters__ = ["' + '\\"' * 100_000 + "]"
    start = time.monotonic()
    for line in (spaces, quotes):
        (tmp_path / "a.pt").write_bytes(script_archive(script_object(b"}"), f"class M(Module):\n{line}\n"))
        assert loaded(tmp_path / "a.pt") == ({}, [])
    assert time.monotonic() - start < 2


def test_a_call_of_many_layers_in_a_shared_module() -> None:
    settings = {"num_layers": 10**6, "bias": False, "bidirectional": False}
    start = time.monotonic()
    assert all(Call("lstm", settings).names(4) == [] for _ in range(100))
    tensors = {f"{index}.{name}": name for index in range(5000) for name in ("weight_ih", "weight_hh")}
    said = Said()
    for index in range(5000):
        said.add_call(Call("rnn_relu", {}, True), [f"{index}.weight_ih", f"{index}.weight_hh"], tensors)
    assert said.settings() == {f"{index}.": {"nonlinearity": "relu"} for index in range(5000)}
    assert time.monotonic() - start < 2


def test_calls_that_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchscript, "_MOST_CALLS", 9)
    _lstm(BY_CALL, tmp_path)
    monkeypatch.setattr(torchscript, "_MOST_CALLS", 8)
    with pytest.raises(CheckpointError, match="its modules call recurrent layers more than 8 times"):
        _lstm(BY_CALL, tmp_path)


def test_a_nonlinearity_of_a_cell_with_gates() -> None:
    for rows, expected in ((1, {"": {"nonlinearity": "relu"}}), (4, {})):
        said = Said()
        said.add_module("", {"nonlinearity": "relu"}, {"weight_ih": (rows, 2), "weight_hh": (rows, 1)})
        assert said.settings() == expected
