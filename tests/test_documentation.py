"""Every example in a docstring, the README or a guide runs and shows what it says; every link and command is right."""

import dataclasses
import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import jaxrnn
from jaxrnn.__main__ import SUITE, main
from jaxrnn._core.options import Options

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
MODULES = ["jaxrnn", *(m.name for m in pkgutil.walk_packages(jaxrnn.__path__, "jaxrnn.") if "__main__" not in m.name)]


def _examples(module: str) -> list[doctest.DocTest]:
    """A module's docstrings that have examples."""
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(module)) if test.examples]


def _run(test: doctest.DocTest) -> doctest.TestResults:
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        return doctest.DocTestRunner().run(test)


def _libraries(text: str) -> list[str]:
    """Packages that examples import, and that need not be installed."""
    lines = re.findall(r"^ *>>> import (.+)", text, re.M)
    imported = [name.split(" as ")[0] for line in lines for name in line.split(", ")]
    return [name for name in ("torch", "onnx", "equinox", "haiku") if name in imported]


def _missing(text: str) -> list[str]:
    return [name for name in _libraries(text) if importlib.util.find_spec(name) is None]


def _marked(name: str, path: str | Path, *marks: pytest.MarkDecorator) -> Any:
    """A parameter, for the tests of libraries if the examples in a file import one."""
    needs = bool(_libraries((ROOT / path).read_text()))
    return pytest.param(name, marks=[*marks, *[pytest.mark.libraries] * needs])


@pytest.mark.parametrize("module", [_marked(name, str(importlib.util.find_spec(name).origin)) for name in MODULES])
def test_docstring_examples(module: str) -> None:
    skipped = []
    for test in _examples(module):
        if missing := _missing(test.docstring or ""):
            skipped.append(f"{test.name} ({', '.join(missing)} is not installed)")
        else:
            assert _run(test).failed == 0, test.name
    if skipped:
        pytest.skip(f"examples that did not run: {', '.join(skipped)}")


GUIDES = ["README.md", *sorted(f"examples/{path.name}" for path in EXAMPLES.glob("*.md"))]
EXAMPLES_README = "examples/README.md"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a clone to a reader who types what a guide says, and that may be written to."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__", "pictures"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _blocks(path: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / path).read_text(), re.M | re.S)


@pytest.mark.parametrize(
    "path", [_marked(GUIDES[0], GUIDES[0]), *(_marked(path, path, pytest.mark.slow) for path in GUIDES[1:])]
)
def test_every_block_of_python_runs(path: str, clone: Path) -> None:
    text = (ROOT / path).read_text()
    blocks = _blocks(path, "python")
    assert [block for block in blocks if not block.startswith(">>> ")] == []
    if missing := _missing(text):
        pytest.skip(f"{', '.join(missing)} is not installed")
    result = _run(doctest.DocTestParser().get_doctest(text, {}, path, path, 0))
    assert result.failed == 0
    assert result.attempted >= sum(block.count(">>> ") for block in blocks)


def _commands(path: str) -> list[list[str]]:
    lines = "".join(_blocks(path, "bash")).splitlines()
    return [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]


def _extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


@pytest.mark.parametrize("path", [path for path in GUIDES if _blocks(path, "bash")])
def test_every_command_is_right(path: str, clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is quick is run. Of the rest, the options, extras and files that it names have to be there."""
    for words in _commands(path):
        while "=" in words[0]:  # variables of the environment
            words = words[1:]
        line, options = shlex.join(words), [word for word in words if word.startswith("--")]
        if words[:2] == ["pip", "install"]:
            assert {name for found in re.findall(r"\[(.+?)\]", line) for name in found.split(",")} <= _extras(), line
        elif words[0] == "pytest":
            assert [word for word in words if word.endswith(".py") and not (ROOT / word).exists()] == [], line
        elif words[0] == "python":
            source = (ROOT / words[1]).read_text()
            assert [option for option in options if f'"{option}"' not in source] == [], line
        elif words[1] in SUITE:
            with pytest.raises(SystemExit):
                main([words[1], "--help"])
            shown = capsys.readouterr().out
            assert [option for option in options if option not in shown] == [], line
        elif words[2].startswith("model."):  # the reader's own
            assert words[1] in ("inspect", "convert"), line
        else:
            assert (words[0], main(words[1:])) == ("jaxrnn", 0), line


def _slugs(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PAGES = [*GUIDES, *sorted(f".github/{path.name}" for path in (ROOT / ".github").glob("*.md"))]


@pytest.mark.parametrize("path", PAGES)
def test_every_link_leads_somewhere(path: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / path).read_text(), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = []
    for link in links:
        file, _, anchor = link.partition("#")
        target = (ROOT / path).parent / file if file else ROOT / path
        if link.startswith("https://"):
            continue
        if not target.exists() or (anchor and anchor not in _slugs(target)):
            broken.append(link)
    assert broken == []
    assert links or path == ".github/CHANGELOG.md"


def test_links_work_on_a_package_page() -> None:
    absolute = runpy.run_path(str(ROOT / ".ci" / "package_page.py"))["absolute"]
    page, address = absolute((ROOT / "README.md").read_text(), "https://example.org/us/jaxrnn/"), "https://example.org/"
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert [link for link in links if not link.startswith(address)] == []
    assert f"{address}us/jaxrnn/raw/main/examples/pictures/parity.svg" in links
    assert f"{address}us/jaxrnn/blob/main/examples/from_flax.md" in links


def test_the_index_has_every_guide_and_example() -> None:
    index = (ROOT / EXAMPLES_README).read_text()
    linked = set(re.findall(r"\]\((\w+\.(?:md|py))\)", index)) | set(re.findall(r"`(\w+\.py)`", index))
    assert {path.name for path in EXAMPLES.glob("*.*") if path.suffix in (".md", ".py")} - {"README.md"} == linked


def test_pages_are_short() -> None:
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in GUIDES}
    assert {path: count for path, count in lines.items() if count > (180 if path == "README.md" else 150)} == {}
    assert {path.name for path in EXAMPLES.glob("pictures/*.*") if path.stat().st_size > 150_000} == set()


def test_no_figure_is_left_to_fill_in() -> None:
    assert {path: found for path in GUIDES if (found := re.findall(r"@\w+@", (ROOT / path).read_text()))} == {}


@pytest.mark.parametrize(
    ("name", "among_them"),
    [
        ("jaxrnn", {"LSTM", "apply", "Spec"}),
        ("jaxrnn.initializers", {"forget_bias"}),
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


def _torch_column() -> dict[str, set[str]]:
    """By heading the names in backticks in the first column of its table."""
    columns = {}
    for section in (EXAMPLES / "from_pytorch.md").read_text().split("\n## ")[1:]:
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


def test_every_argument_of_torch_is_in_the_tables(torch: types.ModuleType) -> None:
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


def test_what_docstrings_share_is_written_into_them() -> None:
    assert subprocess.run([sys.executable, ROOT / ".ci" / "docs.py"], capture_output=True, check=False).stdout == b""


@pytest.mark.parametrize("api", [jaxrnn, jaxrnn.linen], ids=["nnx", "linen"])
def test_help_describes_every_argument(api: Any) -> None:
    names = ["RNN", "LSTM", "GRU", "Recurrent", "RNNCell", "LSTMCell", "GRUCell"]
    classes = [getattr(api, name) for name in names]
    calls = [getattr(api, name).__call__ for name in names[:4]]
    for described in [*classes, *calls, jaxrnn.apply, jaxrnn.trajectory, jaxrnn.apply_cell]:
        arguments = set(inspect.signature(described).parameters) - {"self", "parent"}
        texts = re.findall(r"^ {4}(\w[\w, ]*): \S", inspect.getdoc(described).partition("Args:\n")[2], re.M)
        assert arguments - {name for text in texts for name in text.split(", ")} == set(), described


def test_every_option_is_a_keyword_everywhere() -> None:
    layers = [getattr(api, name) for api in (jaxrnn, jaxrnn.linen) for name in ("RNN", "LSTM", "GRU", "Recurrent")]
    options = {field.name: field.default for field in dataclasses.fields(Options)}
    for taker in (*layers, jaxrnn.apply, jaxrnn.trajectory):
        keywords = inspect.signature(taker).parameters
        assert {name: keywords[name].default for name in options if name in keywords} == options, taker


def test_help_of_a_layer_stands_alone() -> None:
    for api in (jaxrnn, jaxrnn.linen):
        text = inspect.getdoc(api.LSTM)
        shapes = ("(D * num_layers, batch, H)", "PackedSequence", "weight_hr_lk")
        for needed in ("c_t = f * c_{t-1} + i * g", *shapes, "Differs from torch", "Raises:", ">>> "):
            assert needed in text, needed
        assert "as in `jaxrnn" not in text
        assert "as for `jaxrnn" not in text
