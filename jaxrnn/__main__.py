"""The command line over checkpoints: `python -m jaxrnn inspect FILE` and `python -m jaxrnn convert IN OUT`."""

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from jaxrnn.checkpoint import CheckpointError, find_rnns, fold, load, save
from jaxrnn.checkpoint.errors import listed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code: 0, or 2 with a message on stderr for a file that cannot be used.

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
    command = commands.add_parser("inspect", help="list the recurrent modules in a checkpoint")
    command.set_defaults(run=_inspect)
    command.add_argument("file", metavar="FILE", help="a safetensors file, or a torch.save file of a state dict")
    command = commands.add_parser("convert", help="write a checkpoint's tensors to another file")
    command.set_defaults(run=_convert)
    command.add_argument("file", metavar="IN", help="a safetensors file, or a torch.save file of a state dict")
    command.add_argument("out", metavar="OUT", help="the file to write, .safetensors or .pt by its name")
    command.add_argument("--prefix", default="", help="write only keys that start with this, without it: encoder.lstm.")
    command.add_argument("--force", action="store_true", help="replace OUT where it exists")
    for command in commands.choices.values():
        command.add_argument("--key", help="under what key of a torch.save file the state dict is: trainer.model")
        command.add_argument(
            "--raw", action="store_true", help="take weight_hh_l0_raw, of weight drop, for weight_hh_l0"
        )
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except CheckpointError as error:
        _print(str(error), sys.stderr)
        return 2
    return 0


def _load(arguments: argparse.Namespace) -> dict[str, Any]:
    """The file's tensors, those in parts put together."""
    tensors = load(arguments.file, arguments.key)
    try:
        return fold(tensors, arguments.raw)
    except CheckpointError as error:
        raise CheckpointError(f"{arguments.file}: {error}") from error


def _inspect(arguments: argparse.Namespace) -> None:
    tensors = _load(arguments)
    try:
        found = find_rnns(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{arguments.file}: {error}") from error
    if not found:
        keys = f"its keys: {listed(tensors)}" if tensors else "it has no tensors at all"
        raise CheckpointError(f"{arguments.file}: no torch.nn recurrent weights\n{keys}")
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


def _convert(arguments: argparse.Namespace) -> None:
    if os.path.lexists(arguments.out) and not arguments.force:
        raise CheckpointError(f"{arguments.out}: it exists already\ngive another name, or --force to replace it")
    tensors = _load(arguments)
    prefix = arguments.prefix
    chosen = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if not chosen:
        cause = f"no key starts with {prefix!r}\nits keys: {listed(tensors)}" if tensors else "it has no tensors"
        raise CheckpointError(f"{arguments.file}: {cause}")
    save(arguments.out, chosen)
    numbers = sum(value.size for value in chosen.values())
    _print(f"wrote {arguments.out}: {len(chosen)} tensors of {numbers:,} numbers\nkeys: {listed(chosen)}")


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
