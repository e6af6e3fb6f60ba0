"""Every example in a docstring and in the README runs and shows what it says, as users run it: in float32."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import jax
import pytest

import jaxrnn

ROOT = Path(__file__).parents[1]
MODULES = ["jaxrnn", *(m.name for m in pkgutil.walk_packages(jaxrnn.__path__, "jaxrnn.") if "__main__" not in m.name)]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_readme_examples() -> None:
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.failed == 0
    assert result.attempted > 10


def test_every_public_name_is_documented() -> None:
    names = [name for name in vars(jaxrnn) if name[0] != "_"]
    public = {name: value for name, value in vars(jaxrnn).items() if name in names and callable(value)}
    assert {"LSTM", "apply", "Spec"} <= public.keys()
    assert [name for name, value in public.items() if len(value.__doc__ or "") < 80] == []
