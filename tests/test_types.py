"""What type checkers tell users, in their strict modes: `public_api.py` is right, and mistakes are found."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import pytest

import jaxrnn
from jaxrnn._core.weights import LayerParameters

pytestmark = pytest.mark.libraries  # the type checkers
ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("public_api.py")
RIGHT = """
import jaxrnn
from flax import nnx

rngs = nnx.Rngs(0)
lstm = jaxrnn.LSTM(10, 20, rngs=rngs)
packed = jaxrnn.pack_sequence([0.0 * lstm.weight_ih_l0[...]])
"""
MISTAKES = """
print(lstm.hiden_size)
lstm.hidden_size = 30
jaxrnn.LSTM(10, 20, remat="all", rngs=rngs)
jaxrnn.LSTM(10, 20, remat_steps=3, rngs=rngs)
jaxrnn.RNN(10, 20, nonlinearity="sigmoid", rngs=rngs)
print(lstm(packed, lengths=[5, 2]))
print(lstm("x"))
print(lstm(packed)[0].mean())
print(jaxrnn.apply(lstm.spec, {}, packed)[0].mean())
print(jaxrnn.Recurrent(jaxrnn.LSTM_CELL, 10, 20, rngs=rngs)(packed)[1].mean())
print(jaxrnn.GRUCell(10, 20, rngs=rngs).weight_ih_l0)
print(jaxrnn.LSTMCell(10, 20, rngs=rngs).bias_ih[...])
jaxrnn.LSTM(10, 20, kernel_init="orthogonal", rngs=rngs)
jaxrnn.linen.LSTM(10, 20, engin="scan")
print(jaxrnn.linen.LSTM(10, 20).apply({}, packed)[0].mean())
jaxrnn.pad_sequence([], padding_side="both")
print(jaxrnn.load_state_dict(lstm, {}, strict=False).missing)
print(jaxrnn.OutputOnly(lstm)(packed).mean())
jaxrnn.OutputOnly(jaxrnn.GRUCell(10, 20, rngs=rngs))
"""


Lines = dict[str, set[int]]  # in which a checker finds errors, by the file's name


def _mypy(*paths: Path) -> Lines:
    pytest.importorskip("mypy", reason="mypy is not installed")
    options = ["--strict", "--config-file=", "--follow-imports=silent", "--show-absolute-path"]
    command = [sys.executable, "-m", "mypy", *options, *map(str, paths)]
    ran = subprocess.run(command, env={**os.environ, "MYPYPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True)
    print(ran.stdout, ran.stderr)
    # mypy's cache keeps errors with the folder of the run before.
    found: Lines = {path.name: set() for path in paths}
    for name, line in re.findall(r"^\S*/(\w+\.py):(\d+): error: ", ran.stdout, re.M):
        found[name].add(int(line))
    assert ran.returncode == any(found.values())
    return found


def _pyright(*paths: Path) -> Lines:
    found: Lines = {path.name: set() for path in paths}
    settings = {"typeCheckingMode": "strict", "include": [*found], "extraPaths": [str(ROOT)]}
    project = paths[0].with_name("pyrightconfig.json")
    project.write_text(json.dumps(settings))
    answer = _run_pyright("--project", str(project))
    assert answer["summary"]["filesAnalyzed"] == len(paths)
    for error in answer["generalDiagnostics"]:
        found[Path(error["file"]).name].add(error["range"]["start"]["line"] + 1)
    return found


def _run_pyright(*options: str) -> Any:
    pytest.importorskip("pyright", reason="pyright is not installed")
    command = [sys.executable, "-m", "pyright", "--outputjson", *options]
    # It asks the first Python on the path where packages are.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    print(ran.stdout, ran.stderr)
    return json.loads(ran.stdout)


CHECKERS = {"mypy": _mypy, "pyright": _pyright}


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_the_public_api_is_typed_and_mistakes_are_found(checker: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    paths = tmp_path / SCRIPT.name, tmp_path / "mistakes.py"
    for path, text in zip(paths, (SCRIPT.read_text(), RIGHT + MISTAKES), strict=True):
        path.write_text(text)
    first, last = (text.count("\n") for text in (RIGHT, RIGHT + MISTAKES))
    assert CHECKERS[checker](*paths) == {SCRIPT.name: set(), "mistakes.py": set(range(first + 2, last + 1))}


@pytest.mark.slow
def test_no_annotation_is_missing() -> None:
    """Of the whole package, but for what JAX, Flax and others leave out."""
    found = _run_pyright("--verifytypes", "jaxrnn", "--ignoreexternal")["typeCompleteness"]
    unknown = [symbol["name"] for symbol in found["symbols"] if not symbol["isTypeKnown"]]
    assert len(found["symbols"]) > 500
    assert unknown == []


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value has a type, such as tuple[jax.Array, int]."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if not isinstance(value, origin):
        return False
    if origin is tuple:
        return len(value) == len(arguments) and all(map(_is_a, value, arguments))
    if origin is list:
        return all(_is_a(item, arguments[0]) for item in value)
    return True


@pytest.mark.slow
def test_the_types_are_true(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script runs, and its values have the types that it asserts to the checkers."""
    for name, title in {"torch": "PyTorch", "onnx": "onnx"}.items():
        pytest.importorskip(name, reason=f"{title} is not installed")
    asserted = []

    def assert_type(value: Any, kind: Any) -> None:
        asserted.append(kind)
        assert _is_a(value, kind), f"{type(value)} is no {kind}"

    monkeypatch.setattr(typing, "assert_type", assert_type)
    specification = importlib.util.spec_from_file_location("public_api", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        specification.loader.exec_module(script)
        script.main()
    assert len(asserted) > 40


@pytest.mark.parametrize(
    "module",
    [
        jaxrnn,
        jaxrnn.initializers,
        jaxrnn.linen,
        jaxrnn.checkpoint,
        jaxrnn.checkpoint.linen,
        jaxrnn.checkpoint.dialects,
    ],
)
def test_the_script_uses_every_public_name(module: ModuleType) -> None:
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    names = getattr(module, "__all__", [key for key in own if not key.startswith("_")])
    assert len(names) > 1
    text = SCRIPT.read_text()
    assert [name for name in names if not re.search(rf"\b{module.__name__}\.{name}\b", text)] == []


def test_the_layers_weights_are_declared() -> None:
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, 3, 4, num_layers=8, bidirectional=True, proj_size=2)
    assert list(LayerParameters.__annotations__) == list(spec.shapes())
