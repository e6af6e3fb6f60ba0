"""Models that torch quantized: their weights are those of torch's own modules, and the warning says how far off."""

import re
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxrnn.__main__ import main
from jaxrnn.checkpoint import CheckpointError, find_rnns, load

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")]


def _quantized(torch: types.ModuleType, module: Any, dtype: Any = None, per_channel: bool = False) -> Any:
    quantization = torch.ao.quantization
    config = quantization.per_channel_dynamic_qconfig if per_channel else quantization.default_dynamic_qconfig
    config = quantization.float16_dynamic_qconfig if dtype is torch.float16 else config
    nn = torch.nn
    kinds = (nn.Linear,) if per_channel else (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.Linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.quantize_dynamic(module, dict.fromkeys(kinds, config), dtype=dtype or torch.qint8)


def _saved(torch: types.ModuleType, module: Any, tmp_path: Path) -> Path:
    torch.save(module.state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_layers(kind: str, torch: types.ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"rnn": getattr(torch.nn, kind)(3, 4, 2, bidirectional=True), "fc": torch.nn.Linear(8, 2)}
    )
    quantized = _quantized(torch, model)
    path = _saved(torch, quantized, tmp_path)
    with pytest.raises(CheckpointError, match="dequantize=True, or --dequantize on the command line"):
        load(path)
    with pytest.warns(
        UserWarning, match=r"dequantized rnn\.weight_ih_l0, .*fc\.weight: each number is at most"
    ) as caught:
        tensors = load(path, dequantize=True)
    assert caught[0].filename == __file__
    assert list(tensors) == list(model.state_dict())
    expected = {f"rnn.{name}": each.dequantize() for name, each in quantized["rnn"].get_weight().items()}
    expected |= {f"rnn.{name}": each.detach() for name, each in quantized["rnn"].get_bias().items()}
    expected |= {"fc.weight": quantized["fc"].weight().dequantize(), "fc.bias": quantized["fc"].bias().detach()}
    for name, tensor in expected.items():
        assert np.array_equal(tensors[name], tensor.numpy()), name
    error = max(np.abs(tensors[name] - tensor.numpy()).max() for name, tensor in model.state_dict().items())
    said = float(re.findall(r"at most (\S+) from", str(caught[0].message))[0])
    assert 0.3 * said < error < 1.05 * said
    [found] = find_rnns(tensors)
    assert (found.class_name, found.num_layers, found.bidirectional) == (kind, 2, True)
    assert main(["convert", str(path), str(tmp_path / "out.pt"), "--dequantize"]) == 0
    model.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))


def test_halves_cells_and_channels(torch: types.ModuleType, tmp_path: Path) -> None:
    halves = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(4, 4, 3)})
    path = _saved(torch, _quantized(torch, halves, torch.float16), tmp_path)
    with pytest.warns(UserWarning, match=r"the weights of rnn\. are rounded to float16$"):
        tensors = load(path, dequantize=True)
    for name, tensor in halves.state_dict().items():
        rounded = tensor.half().float() if "weight" in name else tensor
        assert np.array_equal(tensors[name], rounded.numpy()), name

    cell = torch.nn.ModuleDict({"cell": torch.nn.GRUCell(3, 4)})
    with pytest.warns(UserWarning, match=r"dequantized cell\.weight_ih, cell\.weight_hh"):
        tensors = load(_saved(torch, _quantized(torch, cell), tmp_path), dequantize=True)
    assert sorted(tensors) == sorted(cell.state_dict())
    assert [rnn.class_name for rnn in find_rnns(tensors)] == ["GRUCell"]

    linear = torch.nn.ModuleDict({"fc": torch.nn.Linear(8, 4, bias=False)})
    quantized = _quantized(torch, linear, per_channel=True)
    with pytest.warns(UserWarning, match=r"dequantized fc\.weight"):
        tensors = load(_saved(torch, quantized, tmp_path), dequantize=True)
    assert list(tensors) == ["fc.weight"]
    assert np.array_equal(tensors["fc.weight"], quantized["fc"].weight().dequantize().numpy())


@pytest.mark.filterwarnings("ignore:.*dequantized")
def test_what_is_in_doubt_is_refused_and_what_is_not_is_read(torch: types.ModuleType, tmp_path: Path) -> None:
    for layers, both in ((2, False), (1, True)):
        path = _saved(
            torch, _quantized(torch, torch.nn.ModuleList([torch.nn.GRU(4, 4, layers, bidirectional=both)])), tmp_path
        )
        with pytest.raises(
            CheckpointError,
            match=r"0\. has two layers, or one layer in two directions, and the file does not say which\n",
        ):
            load(path, dequantize=True)
    for layers, both in ((1, False), (3, False), (2, True)):
        path = _saved(
            torch, _quantized(torch, torch.nn.ModuleList([torch.nn.GRU(4, 4, layers, bidirectional=both)])), tmp_path
        )
        [found] = find_rnns(load(path, dequantize=True))
        assert (found.num_layers, found.bidirectional) == (layers, both)
    alone = _quantized(torch, torch.nn.ModuleList([torch.nn.GRU(3, 4), torch.nn.LSTMCell(3, 4)]))
    for module, name in ((alone[0], "GRU"), (alone[1], "LSTMCell")):
        [found] = find_rnns(load(_saved(torch, module, tmp_path), dequantize=True))
        assert (found.prefix, found.class_name) == ("", name)
    plain = torch.nn.GRU(4, 4)
    assert list(load(_saved(torch, plain, tmp_path), dequantize=True)) == list(plain.state_dict())


def test_a_plain_weight_beside_a_quantized_one_of_its_name(torch: types.ModuleType, tmp_path: Path) -> None:
    quantized = _quantized(torch, torch.nn.ModuleDict({"fc": torch.nn.Linear(8, 4)})).state_dict()
    path = tmp_path / "both.pt"
    torch.save(quantized | {"fc.weight": torch.zeros(4, 8)}, path)
    with pytest.raises(CheckpointError, match=r"_packed_params and fc\.weight are both read as fc\.weight\nsave"):
        load(path, dequantize=True)
