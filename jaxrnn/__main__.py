"""The command line over checkpoints: `jaxrnn inspect FILE`, `jaxrnn convert IN OUT` and `jaxrnn diff A B`."""

import argparse
import contextlib
import json
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from jaxrnn.checkpoint import CheckpointError, FoundRNN, find_rnns, fold, load, save
from jaxrnn.checkpoint.errors import listed

DTYPES = ("float64", "float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code: 0, 1 from diff where the files differ, or 2 with a message on stderr for a file that cannot be
        used.

    Raises:
        SystemExit: for arguments that argparse refuses, and for --help.

    >>> from jaxrnn.__main__ import main
    >>> import os, tempfile
    >>> import jax, jaxrnn
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "gru.safetensors")
    ...     jaxrnn.checkpoint.save(path, jaxrnn.Spec(jaxrnn.GRU_CELL, 3, 4).init(jax.random.key(0)))
    ...     main(["inspect", path])
    """
    parser = argparse.ArgumentParser(prog="jaxrnn", description="PyTorch's recurrent weights in checkpoint files.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    file = "a safetensors file, or a torch.save file of a state dict"
    command = commands.add_parser("inspect", help="list the recurrent modules in a checkpoint")
    command.set_defaults(run=_inspect)
    command.add_argument("file", metavar="FILE", help=file)
    command = commands.add_parser("convert", help="write a checkpoint's tensors to another file")
    command.set_defaults(run=_convert)
    command.add_argument("file", metavar="IN", help=file)
    command.add_argument("out", metavar="OUT", help="the file to write, .safetensors or .pt by its name")
    command.add_argument("--prefix", default="", help="write only keys that start with this, without it: encoder.lstm.")
    command.add_argument("--only-rnn", action="store_true", help="write only the weights of recurrent modules")
    command.add_argument(
        "--rename", metavar="A=B", action="append", default=[], help="keys that start with A start with B; repeatable"
    )
    command.add_argument("--dtype", choices=DTYPES, help="convert floating tensors to this")
    command.add_argument("--force", action="store_true", help="replace OUT where it exists")
    command = commands.add_parser("diff", help="compare two checkpoints: keys, shapes, dtypes and numbers")
    command.set_defaults(run=_diff)
    command.add_argument("file", metavar="A", help=file)
    command.add_argument("other", metavar="B", help="another")
    for name, command in commands.choices.items():
        command.add_argument("--key", help="under what key of a torch.save file the state dict is: trainer.model")
        command.add_argument(
            "--raw", action="store_true", help="take weight_hh_l0_raw, of weight drop, for weight_hh_l0"
        )
        if name != "convert":
            command.add_argument("--json", action="store_true", help="print it as JSON")
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except CheckpointError as error:
        _print(str(error), sys.stderr)
        return 2


def _load(path: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The file's tensors, those in parts put together."""
    tensors = load(path, arguments.key)
    with _said_of(path):
        return fold(tensors, arguments.raw)


@contextlib.contextmanager
def _said_of(path: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _found(path: str, tensors: dict[str, Any]) -> list[FoundRNN]:
    with _said_of(path):
        found = find_rnns(tensors)
    if not found:
        keys = f"its keys: {listed(tensors)}" if tensors else "it has no tensors at all"
        raise CheckpointError(f"{path}: no torch.nn recurrent weights\n{keys}")
    return found


def _inspect(arguments: argparse.Namespace) -> int:
    found = _found(arguments.file, _load(arguments.file, arguments))
    if arguments.json:
        names = ["prefix", "input_size", "hidden_size", "num_layers", "bidirectional", "bias", "proj_size"]
        names += ["num_parameters", "assumed"]
        rows = [{name: getattr(rnn, name) for name in names} for rnn in found]
        kinds = [{"kind": rnn.kind + "Cell" * rnn.is_cell, "dtype": rnn.dtype.name} for rnn in found]
        print(json.dumps([row | kind for row, kind in zip(rows, kinds, strict=True)], indent=1))
        return 0
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("prefix", overflow="fold")
    for name in ("kind", "input", "hidden", "layers", "bidir", "bias", "proj", "dtype", "parameters"):
        table.add_column(name, justify="left" if name in ("kind", "dtype") else "right", no_wrap=True)
    for rnn in found:
        table.add_row(
            _printable(rnn.prefix) or '""',
            rnn.kind + "Cell" * rnn.is_cell,
            str(rnn.input_size),
            str(rnn.hidden_size),
            str(rnn.num_layers),
            "yes" if rnn.bidirectional else "no",
            "yes" if rnn.bias else "no",
            str(rnn.proj_size or "no"),
            rnn.dtype.name,
            f"{rnn.num_parameters:,}",
        )
    # A key may hold what would otherwise be markup.
    Console(markup=False, emoji=False, highlight=False).print(table)
    assumed = {name: value for rnn in found for name, value in rnn.assumed.items()}
    if assumed:
        settings = ", ".join(f"{name}={value!r}" for name, value in assumed.items())
        _print(f"\nAssumed, because no state dict says it: {settings}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    if os.path.lexists(arguments.out) and not arguments.force:
        raise CheckpointError(f"{arguments.out}: it exists already\ngive another name, or --force to replace it")
    tensors = _load(arguments.file, arguments)
    if arguments.only_rnn:
        found = _found(arguments.file, tensors)
        tensors = {key: tensors[key] for key in (rnn.prefix + name for rnn in found for name in rnn.spec.shapes())}
    prefix = arguments.prefix
    chosen = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if not chosen:
        cause = f"no key starts with {prefix!r}\nits keys: {listed(tensors)}" if tensors else "it has no tensors"
        raise CheckpointError(f"{arguments.file}: {cause}")
    with _said_of(arguments.file):
        for rename in arguments.rename:
            chosen = _renamed(chosen, rename)
        if arguments.dtype:
            chosen = {key: _cast(key, value, arguments.dtype) for key, value in chosen.items()}
    save(arguments.out, chosen)
    numbers = sum(value.size for value in chosen.values())
    _print(f"wrote {arguments.out}: {len(chosen)} tensors of {numbers:,} numbers\nkeys: {listed(chosen)}")
    return 0


def _renamed(tensors: dict[str, Any], rename: str) -> dict[str, Any]:
    before, equals, after = rename.partition("=")
    if not equals or not any(key.startswith(before) for key in tensors):
        raise CheckpointError(f"--rename {rename}: no key starts with {before!r}\nits keys: {listed(tensors)}")
    names = {key: after + key.removeprefix(before) if key.startswith(before) else key for key in tensors}
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"--rename {rename} gives two keys one name\nchoose another name")
    return {names[key]: value for key, value in tensors.items()}


def _cast(key: str, value: np.ndarray, dtype: str) -> np.ndarray:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return value
    with np.errstate(over="ignore"):
        cast = value.astype(jnp.dtype(dtype))
    if np.any(np.isinf(cast.astype(np.float64)) & np.isfinite(value.astype(np.float64))):
        raise CheckpointError(f"{key} has numbers that are too large for {dtype}\nchoose another dtype")
    return cast


def _diff(arguments: argparse.Namespace) -> int:
    one, other = (_load(path, arguments) for path in (arguments.file, arguments.other))
    differences = {key: _difference(one.get(key), other.get(key)) for key in {**one, **other}}
    differences = {key: difference for key, difference in differences.items() if difference}
    if arguments.json:
        print(json.dumps({"equal": not differences, "tensors": len({**one, **other}), "differences": differences}))
    else:
        for key, difference in differences.items():
            _print(f"{key}: {difference}")
        count = len({**one, **other})
        _print(f"{len(differences)} of {count} tensors differ" if differences else f"all {count} tensors are equal")
    return 1 if differences else 0


def _difference(one: np.ndarray | None, other: np.ndarray | None) -> str:
    """What is different, empty if nothing is: NaN is equal to NaN."""
    if one is None or other is None:
        return "only in B" if one is None else "only in A"
    for name in ("shape", "dtype"):
        if (a := getattr(one, name)) != (b := getattr(other, name)):
            return f"{name} {a} in A, {b} in B"
    wide = np.complex128 if one.dtype.kind == "c" else np.float64
    a, b = (array.astype(wide) if jnp.issubdtype(array.dtype, jnp.inexact) else array for array in (one, other))
    same = (a == b) | ((a != a) & (b != b))
    if np.all(same):
        return ""
    with np.errstate(invalid="ignore"):
        worst = np.max(np.abs(a.astype(wide) - b.astype(wide))[~same])
    return f"{np.sum(~same):,} of {same.size:,} numbers differ, by {worst:.3g} at most"


def _print(text: str, file: TextIO | None = None) -> None:
    wrapper = textwrap.TextWrapper(80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    for line in _printable(text).split("\n"):
        print(wrapper.fill(line), file=file)


def _printable(text: str) -> str:
    """The text without what would steer a terminal: a key is whatever its author put in the file."""
    return "".join(
        character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
        for character in text
    )


if __name__ == "__main__":
    sys.exit(main())
