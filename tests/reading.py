"""What tests of files share: the tensors and warnings of a file, and the modules in it."""

import doctest
import random
import warnings
from collections.abc import Sequence
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


def refused_of_mutated(path: Path, data: bytes, files: int, bytes_changed: Sequence[int], first: int = 2) -> int:
    """How many files with changed bytes are refused; the others are read. Any other error is passed on."""
    numbers, refused = random.Random(0), 0
    for _ in range(files):
        changed = bytearray(data)
        for _ in range(numbers.choice(bytes_changed)):
            changed[numbers.randrange(first, len(data))] = numbers.choice([0, 1, 255, numbers.randrange(256)])
        path.write_bytes(changed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # also of files that a reader leaves open when it fails
            try:
                load(path)
            except CheckpointError:
                refused += 1
    return refused
