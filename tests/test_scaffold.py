"""`scaffold` writes a program whose model takes a file's tensors: none is missing, and none is unexpected."""

import ast
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxrnn
from jaxrnn import CheckpointError, checkpoint
from jaxrnn.__main__ import main
from jaxrnn.checkpoint import scaffold

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "checkpoints"
FILES = ["denoiser.safetensors", "highlighter.safetensors"]
REAL = ["dtln/model.pth", "silero_vad/silero_vad_16k.safetensors"]
both = pytest.mark.parametrize("linen", [False, True], ids=["nnx", "linen"])


def _ones(shapes: Mapping[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Tensors of these shapes, no two of which are equal."""
    return {name: (np.full(shape, index + 1) / 4).astype(dtype) for index, (name, shape) in enumerate(shapes.items())}


def _run(text: str, **given: Any) -> dict[str, Any]:
    """What a program leaves in its namespace, run as a user runs it, unlike the tests."""
    names: dict[str, Any] = dict(given)
    wide = "jax_enable_x64" in text
    with jax.enable_x64(wide), jax.numpy_dtype_promotion("standard"):
        exec(compile(text, "<scaffold>", "exec"), names)
        module = names["model"]
        if isinstance(module, nnx.Module):
            names["ours"] = jaxrnn.state_dict(module)
        else:
            inputs = {"method": "touch"} if hasattr(type(module), "touch") else {}
            values = [] if inputs else [names["x"]]
            names["ours"] = checkpoint.linen.state_dict(module, names["variables"], *values, **inputs)
    return names


def _fits(tensors: Mapping[str, Any], linen: bool, prefix: str = "") -> str:
    """Check that the program for these tensors loads them, and return it."""
    text = scaffold(tensors, prefix, linen=linen, source="TENSORS")
    names = _run(text, TENSORS=tensors)
    assert (names["missing"], names["unexpected"]) == ([], [])
    wanted = {name: value for name, value in checkpoint.fold(tensors).items() if name.startswith(prefix)}
    wanted = {name.removeprefix(prefix): value for name, value in wanted.items() if "num_batches" not in name}
    wanted = {name.removeprefix("module."): np.asarray(value) for name, value in wanted.items()}
    assert names["ours"].keys() == wanted.keys()
    for name, value in names["ours"].items():
        assert value.dtype == wanted[name].dtype or value.dtype.itemsize * 2 == wanted[name].dtype.itemsize == 8, name
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)
    return text


def _models(torch: types.ModuleType) -> dict[str, Callable[[], Any]]:
    nn = torch.nn

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleDict({"rnn": nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2), "proj": nn.Linear(4, 4)})
            self.crf = nn.ParameterDict({"transitions": nn.Parameter(torch.ones(4, 4))})
            self.start = nn.Parameter(torch.zeros(()))
            self.register_buffer("position_ids", torch.arange(4)[None])

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight

    def transformer() -> Any:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 2, enable_nested_tensor=False)

    def normed() -> Any:
        weight_norm = nn.utils.parametrizations.weight_norm
        return nn.ModuleDict({"a": weight_norm(nn.Linear(4, 4)), "b": weight_norm(nn.GRU(3, 4), "weight_hh_l0")})

    norms = {
        "norm": nn.LayerNorm(4),
        "gn": nn.GroupNorm(2, 4),
        "instance": nn.InstanceNorm1d(4, affine=True),
        "rms_norm": nn.RMSNorm(4),
        "bn": nn.BatchNorm1d(4),
        "plain_bn": nn.BatchNorm1d(4, affine=False),
        "bn_without": nn.BatchNorm1d(4, track_running_stats=False),
        "no_bias_norm": nn.LayerNorm(4, bias=False),
        "act": nn.PReLU(4),
        "prelu": nn.PReLU(),
    }
    cells = [nn.LSTMCell(4, 4), nn.LSTMCell(4, 4), nn.GRUCell(4, 4, bias=False), nn.RNNCell(4, 4)]
    gaps = [nn.Flatten(), nn.Conv1d(3, 4, 5), nn.ReLU(), nn.Linear(4, 4)]
    return {
        "nested": Nested,
        "a Sequential": lambda: nn.Sequential(nn.Linear(3, 4), nn.GRU(4, 4, 2)),
        "a Sequential with gaps": lambda: nn.Sequential(*gaps, nn.Sequential(*gaps)),
        "a far gap": lambda: nn.ModuleDict({"2": nn.Linear(3, 4), "90": nn.Linear(4, 4)}),
        "lists": lambda: nn.ModuleDict(
            {
                "layers": nn.ModuleList(nn.ModuleDict({"rnn": nn.GRU(4, 4), "out": nn.Linear(4, 4)}) for _ in range(3)),
                "mixed": nn.ModuleList([nn.Linear(3, 4), *(nn.Linear(4, 4) for _ in range(3)), nn.Embedding(5, 4)]),
                "nested": nn.ModuleList([nn.ModuleList([nn.Linear(4, 4)])]),
                "weights": nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]),
            }
        ),
        "cells": lambda: nn.ModuleDict({"cells": nn.ModuleList(cells), "one": nn.LSTMCell(3, 4)}),
        "convolutions": lambda: nn.ModuleDict(
            {
                "conv": nn.Conv1d(3, 4, 3),
                "conv2d": nn.Conv2d(4, 4, (3, 1), bias=False),
                "depthwise": nn.Conv1d(4, 4, 3, groups=4),
                "up": nn.ConvTranspose1d(4, 4, 2),
                "unnamed": nn.ConvTranspose1d(4, 3, 2),
            }
        ),
        "a transformer": transformer,
        "norms": lambda: nn.ModuleDict(norms),
        "parts": normed,
        "a lone layer": lambda: nn.Linear(3, 4),
        "a lone LSTM": lambda: nn.LSTM(3, 4),
        "tied": Tied,
        "wrapped": lambda: nn.DataParallel(nn.ModuleDict({"a": nn.Linear(3, 4)})),
    }


MODELS = [
    "nested",
    "a Sequential",
    "a Sequential with gaps",
    "a far gap",
    "lists",
    "cells",
    "convolutions",
    "a transformer",
    "norms",
    "parts",
    "a lone layer",
    "a lone LSTM",
    "tied",
    "wrapped",
]


@both
@pytest.mark.parametrize("name", MODELS)
def test_models_of_torch(torch: types.ModuleType, name: str, linen: bool) -> None:
    assert list(_models(torch)) == MODELS
    _fits(_models(torch)[name]().state_dict(), linen)


@both
@pytest.mark.parametrize("path", [ROOT / "examples" / name for name in FILES] + [SHARED / name for name in REAL])
def test_files(path: Path, linen: bool, capsys: pytest.CaptureFixture[str]) -> None:
    if not path.exists():
        pytest.skip("the real checkpoints are not here")
    assert main(["scaffold", str(path), *["--linen"] * linen]) == 0
    names = _run(capsys.readouterr().out)
    assert (names["missing"], names["unexpected"]) == ([], [])
    tensors = checkpoint.load(path)
    assert names["ours"].keys() == tensors.keys()
    for name, value in names["ours"].items():
        np.testing.assert_array_equal(value, tensors[name])
