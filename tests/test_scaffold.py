"""`scaffold` writes a program whose model takes a file's tensors: none is missing, and none is unexpected."""

import ast
import subprocess
import sys
import types
import warnings
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an epsilon that is Flax's
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
            self.encoder = nn.ModuleDict(
                {"rnn": nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2), "proj": nn.Linear(4, 4)}
            )
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


def test_a_sequential_runs(torch: types.ModuleType) -> None:
    """With the places between filled, because a Sequential would pass a layer's state on."""

    class Output(torch.nn.Module):
        def forward(self, results: Any) -> Any:
            return results[0]

    theirs = torch.nn.Sequential(torch.nn.LSTM(3, 4), Output(), torch.nn.GRU(4, 4), Output(), torch.nn.Linear(4, 2))
    text = scaffold(tensors := theirs.state_dict(), source="TENSORS").replace("    todo,", "    lambda x: x,")
    x = np.linspace(-1, 1, 30).reshape(5, 2, 3).astype(np.float32)
    found = _run(text, TENSORS=tensors)["model"](jnp.asarray(x))
    np.testing.assert_allclose(found, theirs(torch.tensor(x)).detach().numpy(), atol=1e-6)


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


HOSTILE = [
    "quote\"s'",
    "line\nbreak",
    "return\r",
    "tab\t",
    "\x1b[31m",
    "\u202eevil",
    "{braces}",
    "%s",
    '"""',
    "#",
    "\\",
    "\\'",
    "a b",
    "-1",
    "conv-1",
    "0weird",
    "00",
    "²",
    "ﬁ",
    "é",
    "",
    "if",
    "for",
    "None",
    "print",
    "self",
    "rngs",
    "nnx",
    "jnp",
    "__mangled",
    "_hidden",
    "name",
    "parent",
    "setup",
    "scope",
    "variables",
    "touch",
    "train",
    "eval",
    "layers",
    "Model",
    "x" * 100_000,
    "); import os",
]
MADE = {"jaxrnn", "nnx", "linen", "jnp", "jax", "Model", "super", "setattr", "range", "self", "model", "layer"}


@both
def test_hostile_names(linen: bool) -> None:
    """They are strings in the program, or names of attributes; nothing else of it comes from a file."""
    shapes = {f"{name}.weight" if index % 2 else f"{name}.weight.deep": (2, 3) for index, name in enumerate(HOSTILE)}
    shapes |= {f"{name}.bias": (2,) for index, name in enumerate(HOSTILE) if index % 2}
    shapes |= {f"in.{name}": (2,) for name in HOSTILE}
    text = _fits(_ones(shapes), linen)
    assert max(text.count(character) for character in "\r\t\x1b\u202e") == 0
    tree = ast.parse(text)
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in HOSTILE if name not in strings | attributes} == set()
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    called = {ast.unparse(node.func).partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert called - {"NotImplementedError"} <= MADE | classes
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {alias.name for node in imported for alias in node.names} <= {"jax", "jax.numpy", "jaxrnn", "nnx", "linen"}
    kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.Assign, ast.Expr)
    assert [node for node in tree.body if not isinstance(node, kinds)] == []


@pytest.mark.parametrize("name", ["__class__", "__dict__", "_setattr", "_pytree__nodes"])
def test_names_of_flaxs_own(name: str) -> None:
    """NNX has no place for them, and Linen has."""
    tensors = _ones({f"{name}.weight": (2, 3), f"a.{name}": (3,)})
    with pytest.raises(CheckpointError, match=rf"^{name}: .* itself\nrename it by .* or write the model in Linen$"):
        scaffold(tensors)
    _fits(tensors, linen=True)


@both
def test_a_tensor_and_a_level_of_one_name(linen: bool) -> None:
    _fits(_ones({"w": (2,), "w.b": (3,), "w.b.c": (1,), "a.w.0": (2,), "a.w": (3,), "layers_0": (2,)}), linen)
    listed = {"layers.0.weight": (2, 3), "layers.1.weight": (3, 3), "layers_0.weight": (2, 3), "layers_1": (1,)}
    _fits(_ones(listed), linen)
    _fits(_ones({"a.0.1.weight": (2, 3), "a_0.1.weight": (2, 3), "a.0.0.weight": (2, 4)}), linen)
    _fits(_ones({"0.weight": (2, 3), "head.0": (3,), "1.0.weight": (2, 3)}), linen)


@both
def test_dtypes(linen: bool) -> None:
    shapes = {"a.weight": (2, 3), "a.bias": (2,), "norm.weight": (3,), "norm.bias": (3,), "scale": ()}
    for dtype in (jnp.bfloat16, np.float16):
        text = _fits(_ones(shapes, dtype), linen)
        assert text.count(f"param_dtype=jnp.{np.dtype(dtype).name}") == 2
    mixed = _ones(shapes, np.float64) | _ones({"half.weight": (2, 3)}, np.float16)
    counts = {"counts": np.arange(3), "mask": np.array([True, False]), "small": np.arange(3, dtype=np.uint8)}
    assert 'jax.config.update("jax_enable_x64", True)' in _fits(mixed, linen)
    text = _fits(counts | _ones({"z": (2,)}, np.complex64), linen)
    assert "jax_enable_x64" not in text
    assert "jax_enable_x64" in _fits({"large": np.array([1 << 40])} | _ones({"a.weight": (2, 3)}), linen)


@both
def test_recurrent_modules_with_more(torch: types.ModuleType, linen: bool) -> None:
    """A layer inherits where more is beside its weights, and weights that are no layer's become parameters."""
    lstm = {f"rnn.{name}": shape for name, shape in jaxrnn.Spec(jaxrnn.LSTM_CELL, 3, 4).shapes().items()}
    text = _fits(_ones(lstm | {"rnn.extra": (2,), "rnn.head.weight": (2, 4)}), linen)
    assert ("class Rnn(jaxrnn.LSTM):" in text) != linen
    _fits(_ones({name.removeprefix("rnn."): shape for name, shape in lstm.items()} | {"head.weight": (2, 4)}), linen)
    peephole = jaxrnn.Spec(jaxrnn.PEEPHOLE_LSTM_CELL, 3, 4, bias=False, num_layers=2).shapes()
    text = _fits(_ones({f"a.{name}": shape for name, shape in peephole.items()}), linen)
    assert "Recurrent(" in text.replace("\n            ", "")
    assert "jaxrnn.PEEPHOLE_LSTM_CELL, 3, 4, " in " ".join(text.split())
    with pytest.warns(UserWarning, match="parameter of its own: .*\n.*rnn.weight_hh_l0 is missing"):
        _fits(_ones({"rnn.weight_ih_l0": (16, 3)}), linen)


@both
def test_what_a_file_says_is_used(linen: bool) -> None:
    shapes = jaxrnn.Spec(jaxrnn.RNN_RELU, 3, 4).shapes()
    said = {"rnn.": {"nonlinearity": "relu", "batch_first": True}}
    tensors = checkpoint.named.Described(_ones({f"rnn.{name}": shape for name, shape in shapes.items()}), said)
    text = _fits(tensors, linen)  # a warning would be an error
    assert 'batch_first=True, nonlinearity="relu"' in text
    assert "does not say" not in text


@both
def test_cells_with_other_activations(linen: bool) -> None:
    hard = jaxrnn.activations.HardSigmoid()
    for cell in (jaxrnn.gru_cell("relu", hard), jaxrnn.lstm_cell("softsign", "hard_sigmoid")):
        shapes = jaxrnn.Spec(cell, 3, 4).shapes()
        tensors = _ones({f"rnn.{name}": shape for name, shape in shapes.items()})
        text = _fits(checkpoint.named.Described(tensors, {"rnn.": {"cell": cell, "batch_first": True}}), linen)
        assert "Recurrent(" in text
    assert 'jaxrnn.lstm_cell(activation="softsign", recurrent_activation="hard_sigmoid")' in text


@both
def test_names_and_layouts_of_flax(linen: bool) -> None:
    cell = checkpoint.dialects.DIALECTS["flax.linen", "GRUCell"].write(
        {name: np.ones(shape, np.float32) for name, shape in jaxrnn.CellSpec(jaxrnn.GRU_CELL, 3, 4).shapes().items()}
    )
    shapes = {"Dense_0.kernel": (3, 4), "Dense_0.bias": (4,), "Embed_0.embedding": (5, 4), "conv.kernel": (3, 2, 4, 6)}
    shapes |= {"LayerNorm_0.scale": (4,), "LayerNorm_0.bias": (4,), "rms.scale": (4,), "query.kernel": (4, 2, 2)}
    shapes |= {f"bn.{name}": (4,) for name in ("scale", "bias", "mean", "var")} | {"query.bias": (2, 2)}
    tensors = {"/".join(("params", *name.split("."))): value for name, value in _ones(shapes).items()}
    tensors |= {f"params/ScannedRNN_0/GRUCell_0/{name.replace('.', '/')}": value for name, value in cell.items()}
    text = scaffold(tensors, linen=linen, source="TENSORS")
    names = _run(text, TENSORS=tensors)  # a warning would be an error
    assert (names["missing"], names["unexpected"]) == ([], [])
    np.testing.assert_array_equal(names["ours"]["Dense_0.weight"], tensors["params/Dense_0/kernel"].T)
    np.testing.assert_array_equal(names["ours"]["rms.weight"], tensors["params/rms/scale"])
    if not linen:
        for line in (
            "Dense_0 = nnx.Linear(3, 4, ",
            "Embed_0 = nnx.Embed(5, 4, ",
            "conv = nnx.Conv(\n            4, 6, ",
        ):
            assert f"self.{line}" in text
        assert 'padding="SAME"' in text  # the default of Flax


def test_equal_tensors_are_named(torch: types.ModuleType) -> None:
    tensors = _models(torch)["tied"]().state_dict()
    text = scaffold(tensors)
    assert "#   embedding.weight and head.weight\n# To train two as one, use one layer for both (Embed.attend" in text
    assert "equal" not in scaffold(tensors | {"head.weight": tensors["head.weight"] + 1})
    assert "equal" not in scaffold({"a": np.ones((2, 2)), "b": np.ones((2, 2))})
    named = scaffold({f"{name}\x1b\nimport os": np.eye(2) for name in ("a", "b")})
    assert "\nimport os" not in named
    assert "\x1b" not in named
    assert "#   a\\x1b\\nimport os and b\\x1b\\nimport os\n" in named
    tensors.pop("head.weight")  # as the comment says, with the layer left out
    text = "\n".join(line for line in scaffold(tensors, source="TENSORS").splitlines() if "head" not in line)
    assert _run(text, TENSORS=tensors)["missing"] == []


@pytest.mark.parametrize("linen", [False, True])
def test_many_names_and_levels(linen: bool) -> None:
    deepest = ".".join(["level"] * 30)
    _fits(_ones({f"{deepest}.head.weight": (2, 3), f"{deepest[:-6]}.x": (1,)}), linen)
    deep = {".".join(["level"] * 10_000): np.ones(1)}
    message = r"^level\.level.{85,95}\.\.\. has 10000 levels of names, and 32 are the most\nwrite a part .* prefix="
    with pytest.raises(CheckpointError, match=message):
        scaffold(deep, linen=linen)
    _fits(deep, linen, prefix=".".join(["level"] * 9_990) + ".")
    tensors = {f"level{number % 100}.part{number}.weight": np.ones(2) for number in range(20_000)}
    assert scaffold(tensors, linen=linen).count("class ") == 101 + 1


@both
def test_a_part_of_a_model(linen: bool) -> None:
    tensors = _ones({"module.encoder.0.weight": (2, 3), "module.encoder.0.bias": (2,), "module.x": (1,)})
    assert 'prefix="encoder."' in _fits(tensors, linen, "module.encoder.").replace("module.encoder.", "encoder.")
    with pytest.raises(CheckpointError, match=r"^no key starts with 'nobody\.'\nits keys: module\.encoder\.0\.weight"):
        scaffold(tensors, "nobody.", linen=linen)
    with pytest.raises(CheckpointError, match=r"^it has no tensors\n"):
        scaffold({}, linen=linen)
    with pytest.raises(CheckpointError, match=r"^a is of type dict\n"):
        scaffold({"a": {"b": 1}}, linen=linen)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / 'it\'s a "model"'
    folder.mkdir()
    path = folder / "model.safetensors"
    checkpoint.save(path, _ones({"encoder.weight": (2, 3), "encoder.bias": (2,)}))
    assert main(["scaffold", str(path)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    command = [sys.executable, "-c", printed.out + "print(missing, unexpected)"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[] []\n", "")
    assert main(["scaffold", str(path), "--prefix", "nobody."]) == 2
    assert "no key starts with 'nobody.'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["scaffold", str(path), "--json"])
    assert "unrecognized arguments: --json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["scaffold", "--help"])
    assert "write modules of flax.linen" in capsys.readouterr().out


def test_options_are_in_the_program(
    torch: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt"
    raw = {"rnn.weight_hh_l0_raw": torch.ones(16, 4), "rnn.weight_ih_l0": torch.ones(16, 3)}
    torch.save({"deep": {"model": raw}}, path)
    assert main(["scaffold", str(path), "--key", "deep.model", "--raw", "--only-tensors", "--dequantize"]) == 0
    text = capsys.readouterr().out
    load = f'load("{path}", key="deep.model", only_tensors=True, dequantize=True)'
    assert f"tensors = jaxrnn.checkpoint.fold(jaxrnn.checkpoint.{load}, raw=True)\n" in text
    names = _run(text)
    assert (names["missing"], names["unexpected"]) == ([], [])


class _Config:
    """An object beside the tensors, whose code does not run."""


def test_objects_are_left_out(torch: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt"
    torch.save({"state_dict": torch.nn.Linear(3, 4).state_dict(), "config": _Config()}, path)
    assert main(["scaffold", str(path)]) == 0
    printed = capsys.readouterr()
    note = f"note: {path}: left out objects that are not tensors: {_Config.__module__}._Config"
    assert note in " ".join(printed.err.split())
    with pytest.warns(UserWarning, match="left out"):
        assert _run(printed.out)["missing"] == []
    path.write_bytes(path.read_bytes()[:-100])
    assert main(["scaffold", str(path)]) == 2
    assert capsys.readouterr().err.startswith(str(path))
