"""Every example in a docstring or a README runs and shows what it says, in float32, and nothing public lacks one."""

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import jaxrnn

ROOT = Path(__file__).parents[1]
EXAMPLES_README = ROOT / "examples" / "README.md"
MODULES = ["jaxrnn", *(m.name for m in pkgutil.walk_packages(jaxrnn.__path__, "jaxrnn.") if "__main__" not in m.name)]


def _examples(module: str) -> list[doctest.DocTest]:
    """A module's docstrings that have examples."""
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(module)) if test.examples]


def _run(test: doctest.DocTest) -> doctest.TestResults:
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        return doctest.DocTestRunner().run(test)


def _missing(text: str) -> list[str]:
    """Packages that examples import, and that need not be installed."""
    imported = [name for line in re.findall(r"^ *>>> import (.+)", text, re.M) for name in line.split(", ")]
    return [name for name in ("torch", "onnx") if name in imported and importlib.util.find_spec(name) is None]


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module: str) -> None:
    skipped = []
    for test in _examples(module):
        if missing := _missing(test.docstring or ""):
            skipped.append(f"{test.name} ({', '.join(missing)} is not installed)")
        else:
            assert _run(test).failed == 0, test.name
    if skipped:
        pytest.skip(f"examples that did not run: {', '.join(skipped)}")


GUIDES = ["README.md", "examples/README.md", "examples/own_cell.md", "examples/other_libraries.md"]


@pytest.mark.parametrize("path", GUIDES)
def test_readme_examples(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = Path(path).read_text()
    if missing := _missing(text):
        pytest.skip(f"{', '.join(missing)} is not installed")
    result = _run(doctest.DocTestParser().get_doctest(text, {}, path, path, 0))
    assert result.failed == 0
    assert result.attempted > 10


@pytest.mark.parametrize(
    ("name", "among_them"),
    [
        ("jaxrnn", {"LSTM", "apply", "Spec"}),
        ("jaxrnn.linen", {"LSTM", "GRUCell", "FlaxCell"}),
        ("jaxrnn.checkpoint", {"load", "find_rnns", "FoundRNN"}),
        ("jaxrnn.checkpoint.linen", {"state_dict", "Loaded"}),
    ],
)
def test_every_public_name_is_documented(name: str, among_them: set[str]) -> None:
    module = importlib.import_module(name)
    # What a module without __all__ imports is no name of its own.
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == name]
    names = getattr(module, "__all__", [key for key in own if not key.startswith("_")])
    public = {key: getattr(module, key) for key in names if callable(getattr(module, key))}
    assert among_them <= public.keys()
    assert [key for key, value in public.items() if len(value.__doc__ or "") < 80] == []
    origins = {key: f"{value.__module__}.{value.__qualname__}" for key, value in public.items()}
    with_example = {test.name for module in MODULES for test in _examples(module)}
    assert [key for key, origin in origins.items() if origin not in with_example] == []


def test_every_example_program_has_a_heading() -> None:
    programs = {path.name for path in ROOT.glob("examples/*.py")}
    headings = [line for line in EXAMPLES_README.read_text().splitlines() if line.startswith("### ")]
    assert "streaming.py" in programs
    assert programs - {name for line in headings for name in re.findall(r"`(.+?)`", line)} == set()


def _torch_column() -> dict[str, set[str]]:
    """By heading the names in backticks in the first column of its table."""
    _, _, tables = EXAMPLES_README.read_text().partition("\n## PyTorch, argument by argument\n")
    columns = {}
    for section in tables.split("\n### ")[1:]:
        heading, _, text = section.partition("\n")
        cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
        code = re.findall("`(.+?)`", "|".join(cells))
        columns[heading] = set(re.findall(r"\w+", " ".join(code)))
    return columns


def _arguments(*functions: Callable) -> set[str]:
    signatures = [inspect.signature(function) for function in functions]
    return {p for signature in signatures for p in signature.parameters} - {"self", "cls", "args", "kwargs"}


def _members(module: Any, base: type) -> set[str]:
    return {name for name in set(dir(module)) - set(dir(base)) if not name.startswith("_")}


def test_every_argument_of_torch_is_in_the_tables() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    nn, rnn = torch.nn, torch.nn.utils.rnn
    layers = [nn.RNN(1, 1), nn.LSTM(1, 2, proj_size=1), nn.GRU(1, 1)]
    cells = [nn.RNNCell(1, 1), nn.LSTMCell(1, 1), nn.GRUCell(1, 1)]
    # The layers' own constructors take *args; what they may be is in their overloads, and in that of their base.
    constructors = [function for layer in layers for function in typing.get_overloads(type(layer).__init__)]
    assert len(constructors) >= 3
    functions = [getattr(rnn, name) for name in rnn.__all__ if inspect.isfunction(getattr(rnn, name))]
    # Used on every module, and what it is here is not what it is there.
    of_modules = {"state_dict", "load_state_dict", "train", "eval", "training", "parameters", "to", "half", "bfloat16"}
    expected = {
        "Constructors of `torch.nn.RNN`, `LSTM` and `GRU`": _arguments(nn.RNNBase.__init__, *constructors),
        "Constructors of `torch.nn.RNNCell`, `LSTMCell` and `GRUCell`": _arguments(
            nn.RNNCellBase.__init__, *(type(cell).__init__ for cell in cells)
        ),
        "Calls": _arguments(*(type(module).forward for module in layers + cells)),
        "Attributes and methods": set.union(of_modules, *(_members(module, nn.Module) for module in layers + cells)),
        "`torch.nn.utils.rnn`": {
            *rnn.__all__, *_arguments(*functions, rnn.PackedSequence.__new__), *_members(rnn.PackedSequence, object)
        },
    }  # fmt: skip
    columns = _torch_column()
    assert columns.keys() == expected.keys()
    assert {heading: names - columns[heading] for heading, names in expected.items() if names - columns[heading]} == {}


@pytest.mark.parametrize("api", [jaxrnn, jaxrnn.linen], ids=["nnx", "linen"])
def test_help_describes_every_argument(api: Any) -> None:
    names = ["RNN", "LSTM", "GRU", "Recurrent", "RNNCell", "LSTMCell", "GRUCell"]
    classes = [getattr(api, name) for name in names]
    calls = [getattr(api, name).__call__ for name in names[:4]]
    for described in [*classes, *calls, jaxrnn.apply, jaxrnn.trajectory, jaxrnn.apply_cell]:
        arguments = set(inspect.signature(described).parameters) - {"self", "parent"}
        texts = re.findall(r"^ {4}(\w[\w, ]*): \S", described.__doc__.partition("Args:\n")[2], re.M)
        assert arguments - {name for text in texts for name in text.split(", ")} == set(), described


def test_help_of_a_layer_stands_alone() -> None:
    for api in (jaxrnn, jaxrnn.linen):
        text = api.LSTM.__doc__
        shapes = ("(D * num_layers, batch, H)", "PackedSequence", "weight_hr_lk")
        for needed in ("c_t = f * c_{t-1} + i * g", *shapes, "Differs from torch", "Raises:", ">>> "):
            assert needed in text, needed
        assert "as in `jaxrnn" not in text
        assert "as for `jaxrnn" not in text
