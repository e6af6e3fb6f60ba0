"""What tests of files share: the tensors and warnings of a file, and the modules in it."""

import doctest
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxrnn
from jaxrnn.checkpoint import CheckpointError, load

# Compiled once for a spec and shapes, which many files share.
apply = jax.jit(jaxrnn.apply, static_argnums=0, static_argnames="dtype")


def loaded(path: Path, data: bytes | None = None) -> tuple[Any, list[str]]:
    """The tensors of a file, and what was said of it. With data, the file is written first."""
    if data is not None:
        path.write_bytes(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tensors = load(path)
    return tensors, [str(each.message).removeprefix(f"{path}: ") for each in caught]


def of_guide(guide: str, name: str) -> Any:
    """A function that a guide defines."""
    text = (Path(__file__).parents[1] / "examples" / guide).read_text()
    block = next(each for each in text.split("```python\n") if f">>> def {name}(" in each).partition("```")[0]
    made: dict[str, Any] = {"jax": jax, "jnp": jnp, "jaxrnn": jaxrnn}
    for example in doctest.DocTestParser().get_examples(block):
        if example.source.startswith("def "):
            exec(example.source, made)
    return made[name]


def refusal(path: Path, data: bytes) -> str:
    """The cause for which a file with these bytes is refused. There is a remedy, too."""
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    cause, _, remedy = str(caught.value).removeprefix(f"{path}: ").partition("\n")
    assert remedy
    return cause


def weights(tensors: Any, found: Any) -> dict[str, Any]:
    """The parameters of a module that `find_rnns` found, by the names that `jaxrnn.apply` takes."""
    return {name: jnp.asarray(tensors[found.prefix + name]) for name in found.spec.shapes()}
