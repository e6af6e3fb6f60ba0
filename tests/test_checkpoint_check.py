"""The check of a checkpoint's modules: equal where they are, and red where ours or the weights are not torch's."""

import types
from pathlib import Path

import jax
import numpy as np
import pytest
from arrays import parameters

import jaxrnn
from jaxrnn import checkpoint
from jaxrnn.checkpoint.check import LIMIT, check
from jaxrnn.checkpoint.flax_names import with_torchs_names
from jaxrnn.checkpoint.named import Described

SPECS = {
    "RNN": jaxrnn.Spec(jaxrnn.RNN_TANH, 3, 4),
    "LSTM": jaxrnn.Spec(jaxrnn.LSTM_CELL, 3, 4, num_layers=2, bidirectional=True, proj_size=2),
    "GRU": jaxrnn.Spec(jaxrnn.GRU_CELL, 3, 4, bias=False, num_layers=2),
    "LSTMCell": jaxrnn.CellSpec(jaxrnn.LSTM_CELL, 3, 4),
    "GRUCell": jaxrnn.CellSpec(jaxrnn.GRU_CELL, 3, 4, bias=False),
    "RNNCell": jaxrnn.CellSpec(jaxrnn.RNN_TANH, 3, 4),
}


def _tensors(name: str) -> dict[str, np.ndarray]:
    return {f"enc.{key}": value for key, value in parameters(SPECS[name], np.float32).items()}


@pytest.mark.torch
@pytest.mark.parametrize(
    "name", [name if name in ("LSTM", "GRUCell") else pytest.param(name, marks=pytest.mark.slow) for name in SPECS]
)
def test_equal_to_torch(torch: types.ModuleType, name: str) -> None:
    tensors = _tensors(name)
    [rnn] = checkpoint.find_rnns(tensors)
    result = check(rnn, tensors, torch)
    assert result.finite
    assert 0 <= result.difference < 1e-14, "an output or a final state is not torch's"
    assert result.equal
    weight = f"enc.weight_hh{'' if rnn.is_cell else '_l0'}"
    tensors[weight][0, 0] = np.nan
    result = check(rnn, tensors, torch)
    assert not result.finite
    assert result.equal  # NaN where torch has NaN


@pytest.mark.torch
def test_a_difference_is_seen(torch: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = _tensors("GRU")
    [rnn] = checkpoint.find_rnns(tensors)
    call = jaxrnn.nnx.GRU.__call__

    def wrong(self: object, *args: object) -> tuple:
        output, h_n = call(self, *args)
        return output, h_n.at[1, 2, 3].add(2 * LIMIT)

    monkeypatch.setattr(jaxrnn.nnx.GRU, "__call__", wrong)
    result = check(rnn, tensors, torch)
    assert not result.equal
    assert LIMIT < result.difference < 3 * LIMIT
    monkeypatch.setattr(
        jaxrnn.nnx.GRU, "__call__", lambda self, *args: jax.tree.map(lambda a: a * np.nan, call(self, *args))
    )
    assert check(rnn, tensors, torch).difference == np.inf


@pytest.mark.torch
def test_dropout_does_not_act(torch: types.ModuleType) -> None:
    params = parameters(jaxrnn.Spec(jaxrnn.LSTM_CELL, 3, 4, 2), np.float64)
    tensors = Described(params, {"": {"dropout": 0.5}})
    [rnn] = checkpoint.find_rnns(tensors)
    assert rnn.said == {"dropout": 0.5}
    assert check(rnn, tensors, torch).equal


def test_without_torch() -> None:
    tensors = _tensors("LSTM")
    [rnn] = checkpoint.find_rnns(tensors)
    assert check(rnn, tensors, None)[:2] == (True, None)
    assert check(rnn, tensors, None).equal


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")
def test_the_code_in_a_torchscript_archive(torch: types.ModuleType, tmp_path: Path) -> None:
    """It runs only where that is asked for, and then a difference from it is seen."""
    model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True)})["rnn"]
    torch.jit.script(model).save(str(tmp_path / "a.pt"))
    tensors = checkpoint.load(tmp_path / "a.pt")
    [rnn] = checkpoint.find_rnns(tensors)
    assert check(rnn, tensors, torch).original == "torch.nn.LSTM"
    result = check(rnn, tensors, torch, run_code=True)
    assert result.original == "TorchScript's LSTM"
    assert result.difference < 1e-14
    tensors["weight_hh_l1_reverse"][0, 0] += 1
    assert check(rnn, tensors, torch).equal
    assert not check(rnn, tensors, torch, run_code=True).equal


def test_a_difference_from_flaxs_cell_is_seen() -> None:
    cell = checkpoint.dialects.DIALECTS["flax.nnx", "GRUCell"].write(parameters(SPECS["GRUCell"], np.float64))
    tensors = with_torchs_names({f"enc.{name}": array for name, array in cell.items()})
    [rnn] = checkpoint.find_rnns(tensors)
    result = check(rnn, tensors, None)
    assert (result.original, result.equal) == ("flax.nnx.GRUCell", True)
    tensors["enc.weight_hh_l0"][0, 0] += 1e-6
    assert not check(rnn, tensors, None).equal
