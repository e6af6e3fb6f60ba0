"""Every example in a docstring and in the README runs and shows what it says, as users run it: in float32."""

import doctest
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import jax
import pytest

import jaxrnn

README = Path(__file__).parents[1] / "README.md"
MODULES = ["jaxrnn", *(m.name for m in pkgutil.walk_packages(jaxrnn.__path__, "jaxrnn.") if "__main__" not in m.name)]
DOCUMENTED = [test for name in MODULES for test in doctest.DocTestFinder().find(importlib.import_module(name))]
EXAMPLES = {test.name: test for test in DOCUMENTED if test.examples}


def _run(test: doctest.DocTest) -> doctest.TestResults:
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        return doctest.DocTestRunner().run(test)


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_examples(name: str) -> None:
    test = EXAMPLES[name]
    if "import jaxrnn, torch" in (test.docstring or ""):
        pytest.importorskip("torch", reason="PyTorch is not installed")
    assert _run(test).failed == 0


def test_readme_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(README.parent)
    result = _run(doctest.DocTestParser().get_doctest(README.read_text(), {}, "README.md", str(README), 0))
    assert result.failed == 0
    assert result.attempted > 10


def test_every_public_name_is_documented() -> None:
    public = {name: getattr(jaxrnn, name) for name in jaxrnn.__all__}
    assert {"LSTM", "apply", "Spec"} <= public.keys()
    undocumented = [name for name, value in public.items() if callable(value) and len(value.__doc__ or "") < 80]
    assert undocumented == []
    without_example = [
        name
        for name, value in public.items()
        if callable(value) and f"{value.__module__}.{value.__qualname__}" not in EXAMPLES
    ]
    assert without_example == ["CheckpointError"]
