"""Write a Flax model for the tensors of a file, as a program to start from."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxrnn.checkpoint.arrays import dtype_of, to_numpy
from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.checkpoint.flax_names import with_torchs_names
from jaxrnn.checkpoint.named import described_as
from jaxrnn.checkpoint.names import fold, under, unwrapped
from jaxrnn.checkpoint.scaffold_layers import Layer
from jaxrnn.checkpoint.scaffold_model import STAND_IN, Made, Program, Statement, notes_of, statement_lines
from jaxrnn.checkpoint.scaffold_text import Code, Group, comment, laid_out, quoted
from jaxrnn.checkpoint.stored import Stored, equal, pieces, read

_TITLE = '"""A Flax model that the weights of a file fit. Each `__call__` is left to write."""'
_MOST_TIES = 8
_MOST_ALIKE = 50  # tensors of one beginning with which another is compared
_BEGINNING = 4096  # bytes, by which tensors that differ are told apart
_PLACEHOLDER = f"""

def {STAND_IN}(x):
    raise NotImplementedError("a step without weights, such as nnx.relu: write it in place of this")"""


def scaffold(
    tensors: Mapping[str, Any],
    prefix: str = "",
    *,
    linen: bool = False,
    source: str = 'jaxrnn.checkpoint.load("model.safetensors")',
) -> str:
    """Write a Flax model for some tensors: a program to start from, which `jaxrnn scaffold` prints.

    It has a class for every level of names, and a layer for every group of tensors whose names and shapes are those of
    a layer that `load_state_dict` knows, in PyTorch, Flax or Keras. Everything else is an `nnx.Param`. At the end it
    loads the tensors: nothing is missing, and nothing is unexpected. What is left to write is each `__call__`, and the
    settings that no weights say, such as strides. They are PyTorch's defaults, and comments name them.

    Args:
        tensors: from name to array of numpy, jax or torch, such as from `jaxrnn.checkpoint.load`.
        prefix: write only a model for the keys that start with it, such as "encoder.", without it.
        linen: whether to write modules of flax.linen rather than flax.nnx.
        source: the expression from which the program gets the tensors, as code.

    Returns:
        The program, as text.

    Raises:
        CheckpointError: there are no tensors, no key starts with the prefix, a key cannot be the name of an attribute,
            or there are more than 32 levels of names. Or as `jaxrnn.checkpoint.fold`.

    Warns:
        UserWarning: recurrent weights that do not fit together, which become parameters one by one.

    >>> import numpy as np
    >>> from jaxrnn import checkpoint
    >>> tensors = {"head.weight": np.ones((2, 3)), "head.bias": np.ones(2), "scale": np.ones(2)}
    >>> "self.head = nnx.Linear(3, 2, param_dtype=jnp.float64, rngs=rngs)" in checkpoint.scaffold(tensors)
    True
    """
    chosen = under(with_torchs_names(fold(tensors)), prefix)
    if not chosen:
        if tensors:
            raise CheckpointError(f"no key starts with {prefix!r}\nits keys: {listed(tensors)}")
        raise CheckpointError("it has no tensors\ngive another file, or the key of its tensors")
    named = _without_wrapper(chosen)
    program = Program(named, linen)
    classes = [*program.class_lines()]
    body = "\n".join([*classes, *([""] * 2 if classes else [""]), *_loading(program, named, prefix, source)])
    if re.search(rf"\b{STAND_IN},", body):
        body = _PLACEHOLDER + ("\n" if classes else "\n\n") + body
    library = "linen" if linen else "nnx"
    imports = ["import jax"] if re.search(r"\bjax\.", body) else []
    imports += ["import jax.numpy as jnp"] if re.search(r"\bjnp\.", body) else []
    imports += [
        "import jaxrnn",
        *([f"from flax import {library}"] if re.search(rf"(?<!\.)\b{library}\.", body) else []),
    ]
    return "\n".join([_TITLE, "", *imports]) + f"\n{body}\n"


def _without_wrapper(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors without the `module.` of DistributedDataParallel, which `load_state_dict` drops."""
    names = {key: unwrapped(key) for key in tensors}
    if not all(key.startswith("module.") for key in tensors) or len({*names.values()}) < len(names):
        return tensors
    return described_as({names[key]: value for key, value in tensors.items()}, tensors, unwrapped)


def _loading(program: Program, tensors: Mapping[str, Any], prefix: str, source: str) -> Iterator[str]:
    """The statements that make the model and load the tensors."""
    if program.wide:
        yield from comment(f"JAX has the dtype of {program.wide:.60} in this mode alone.", 0)
        yield 'jax.config.update("jax_enable_x64", True)'
    yield from _ties(tensors)
    yield f"tensors = {source}"
    counts = program.counts()
    if isinstance(program.root, Made):
        model: Code = "Model()" if program.linen else "Model(rngs=nnx.Rngs(0))"
        yield f"model = {model}"
    else:
        if not program.linen:
            yield "rngs = nnx.Rngs(0)"
        statement = Statement("model = ", program.code(program.root), notes_of(program.root))
        yield from statement_lines(statement, 0, counts, set())
    given = [f"prefix={quoted(prefix)}"] if prefix else []
    if not program.linen:
        load = Group("jaxrnn.load_state_dict(", ["model", "tensors", *given], ")")
        yield from laid_out("missing, unexpected = ", load)
        return
    call = ['method="touch"']
    if isinstance(program.root, Layer):
        [touch] = program.touch("", program.root)
        assert isinstance(touch, Group)
        x, *options = map(str, touch.items)
        yield f"x = {x}"
        call = ["x", *options]
    init = Group("model.init(", ["jax.random.key(0)", *call], ")")
    yield from laid_out("variables = ", init)
    load = Group("jaxrnn.checkpoint.linen.load_state_dict(", ["model", "variables", "tensors", *call, *given], ")")
    yield from laid_out("variables, missing, unexpected = ", load)


def _ties(tensors: Mapping[str, Any]) -> list[str]:
    """Comments about tensors that are equal, as of weights that torch shares."""
    groups: dict[Any, list[str]] = {}
    for key, value in tensors.items():
        if len(value.shape) > 1 and 0 not in value.shape:
            groups.setdefault((dtype_of(value), tuple(value.shape)), []).append(key)
    pairs = [pair for keys in groups.values() if len(keys) > 1 for pair in _equal({key: tensors[key] for key in keys})]
    if not pairs:
        return []
    lines = ["# These are equal, as if torch shared one parameter:"]
    for one, other in pairs[:_MOST_TIES]:
        lines += comment(f"  {one:.100} and {other:.100}", 0, "  ")
    lines += [f"#   and {len(pairs) - _MOST_TIES} more"] if len(pairs) > _MOST_TIES else []
    remedy = "use one layer for both (Embed.attend for a Linear), leave out the other, and del its key in tensors"
    return [*lines, *comment(f"To train two as one, {remedy}.", 0)]


def _equal(tensors: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The names of equal tensors, in pairs. Tensors that hold one number throughout do not count."""
    alike: dict[bytes, list[str]] = {}
    for key, tensor in tensors.items():
        value = tensor if isinstance(tensor, Stored) else to_numpy(key, tensor)
        others = alike.setdefault(bytes(next(iter(pieces(value)))[:_BEGINNING]), [])
        for other in others[:_MOST_ALIKE]:
            theirs = tensors[other]
            if equal(value, theirs if isinstance(theirs, Stored) else to_numpy(other, theirs)):
                array = read(value)
                if (array != array.flat[0]).any():
                    yield other, key
                break
        else:
            others.append(key)
