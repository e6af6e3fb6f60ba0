"""The command line: `jaxrnn inspect FILE`, `scaffold FILE`, `convert IN OUT`, `diff A B`, `check FILE`; the suite."""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxrnn._core.tables import print_table
from jaxrnn._version import __version__
from jaxrnn.cells import Cell
from jaxrnn.checkpoint import CheckpointError, FoundRNN, find_rnns, fold, save, scaffold
from jaxrnn.checkpoint.check import LIMIT, check, installed_torch
from jaxrnn.checkpoint.errors import about, listed, printable
from jaxrnn.checkpoint.files import Tensors, opened
from jaxrnn.checkpoint.flax_names import maybe_haikus_lstms
from jaxrnn.checkpoint.formats.reading import Reading
from jaxrnn.checkpoint.named import described_as, origins_of
from jaxrnn.checkpoint.names import under
from jaxrnn.checkpoint.scaffold_text import quoted
from jaxrnn.checkpoint.stored import Value, equal, not_finite, read

DTYPES = ("float64", "float32", "bfloat16", "float16")
# Show a progress bar above this many bytes, which take about a second.
LARGE = 256 << 20
# What only_tensors warns of, which is a note to those who only look.
_LEFT_OUT = ": left out objects that are not "
# Commands that are modules of the parity suite, and parse their own arguments.
SUITE = {
    "parity": ("jaxrnn.parity.__main__", "compare every kind of module with PyTorch: recorded results, or run here"),
    "speed": ("jaxrnn.parity.timing.__main__", "time jaxrnn, Flax, Keras and PyTorch"),
}


def main(argv: Sequence[str] | None = None, prog: str = "jaxrnn") -> int:
    """Run the command line.

    Args:
        argv: the arguments; those of the process if None.
        prog: the command that was used, for messages.

    Returns:
        The exit code: 0; 1 if diff, check or parity found a difference, or the output is no longer read; 2 for a file
        that cannot be used, with a message on stderr; 130 if Ctrl-C ends it.

    Raises:
        SystemExit: for arguments that argparse refuses, for --help and for --version.

    >>> from jaxrnn.__main__ import main
    >>> import os, tempfile
    >>> import jax, jaxrnn
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "gru.safetensors")
    ...     jaxrnn.checkpoint.save(path, jaxrnn.Spec(jaxrnn.GRU_CELL, 3, 4).init(jax.random.key(0)))
    ...     main(["inspect", path])
    """
    return quietly(functools.partial(_main, sys.argv[1:] if argv is None else argv, prog))


def quietly(command: Callable[[], int]) -> int:
    """Run a command. If its output is no longer read, as by `head`, or Ctrl-C ends it, there is no traceback."""
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(argv: Sequence[str], prog: str) -> int:
    def add(name: str, words: str, *lines: str) -> argparse.ArgumentParser:
        described = with_examples(f"{words[0].upper()}{words[1:]}.", *(f"{prog} {line}" for line in lines))
        return commands.add_parser(name, help=words, **described)

    denoiser = "examples/denoiser.safetensors"  # in the repository, where every example runs
    inspecting, converting = f"inspect {denoiser}", f"convert {denoiser} encoder.pt --prefix encoder."
    parser = argparse.ArgumentParser(
        prog=prog,
        **with_examples(
            "Read, convert and compare checkpoints with PyTorch's recurrent weights, and test jaxrnn.",
            f"{prog} {inspecting}",
            f"{prog} {converting}",
        ),
    )
    parser.add_argument("--version", action="version", version=f"jaxrnn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    file = "a checkpoint: of PyTorch, Flax, Haiku, Keras or ONNX, in any of the formats that they write"
    command = add("inspect", "list the recurrent modules in a checkpoint", inspecting, f"{inspecting} --json")
    command.set_defaults(run=_inspect)
    command.add_argument("file", metavar="FILE", help=file)
    words = "write a Flax model that a checkpoint fits, as a program to start from"
    command = add("scaffold", words, f"scaffold {denoiser}", f"scaffold {denoiser} --linen > model.py")
    command.set_defaults(run=_scaffold)
    command.add_argument("file", metavar="FILE", help=file)
    command.add_argument(
        "--prefix", default="", help="write a model for the keys that start with this, for example encoder., alone"
    )
    command.add_argument("--linen", action="store_true", help="write modules of flax.linen, not flax.nnx")
    half = f"convert {denoiser} half.safetensors --only-rnn --dtype bfloat16"
    command = add("convert", "write a checkpoint's tensors to another file", converting, half)
    command.set_defaults(run=_convert)
    command.add_argument("file", metavar="IN", help=file)
    command.add_argument("out", metavar="OUT", help="the file to write; its name ends in .safetensors, .pt or .orbax")
    command.add_argument(
        "--prefix", default="", help="write only the keys that start with this, for example encoder., and remove it"
    )
    command.add_argument("--only-rnn", action="store_true", help="write only the weights of recurrent modules")
    command.add_argument(
        "--rename",
        metavar="A=B",
        action="append",
        default=[],
        help="in keys that start with A, replace A by B; can be given several times",
    )
    command.add_argument("--dtype", choices=DTYPES, help="convert floating tensors to this dtype")
    command.add_argument("--force", action="store_true", help="replace OUT if it exists")
    command = add(
        "diff",
        "compare two checkpoints: keys, shapes, dtypes and numbers",
        f"diff {denoiser} examples/highlighter.safetensors",
        f"diff {denoiser} encoder.pt --prefix encoder.",
    )
    command.set_defaults(run=_diff)
    command.add_argument("file", metavar="A", help=file)
    command.add_argument("other", metavar="B", help="the checkpoint to compare it with")
    command.add_argument(
        "--prefix", default="", help="compare only the keys of A that start with this, and remove it from them"
    )
    command.add_argument("--other-prefix", default="", help="the same for B")
    command.add_argument("--other-key", metavar="KEY", help="the same as --key, for B")
    words = "run the recurrent modules in a checkpoint, and compare with the original library or PyTorch"
    command = add("check", words, f"check {denoiser}", f"check {denoiser} --json")
    command.set_defaults(run=_check)
    command.add_argument("file", metavar="FILE", help=file)
    words = "also run the code in a TorchScript archive, if you trust it, to compare with its own modules"
    command.add_argument("--run-code", action="store_true", help=words)
    for name, command in commands.choices.items():
        command.set_defaults(past_objects=name in ("inspect", "scaffold"))
        command.add_argument("--key", help="the key that holds the state dict, for example trainer.model")
        command.add_argument(
            "--raw", action="store_true", help="for weight-dropped LSTMs: read weight_hh_l0_raw as weight_hh_l0"
        )
        command.add_argument(
            "--only-tensors", action="store_true", help="skip objects that are not tensors; their code never runs"
        )
        command.add_argument("--dequantize", action="store_true", help="read quantized modules, as rounded numbers")
        if name != "scaffold":
            command.add_argument("--json", action="store_true", help="print the result as JSON")
    for name, (_, words) in SUITE.items():
        commands.add_parser(name, help=words, add_help=False)
    if argv and argv[0] in SUITE:
        return _suite(argv[0])(argv[1:], f"{prog} {argv[0]}")
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        return arguments.run(arguments)
    except CheckpointError as error:
        _print(str(error), sys.stderr)
        return 2


def with_examples(description: str, *lines: str) -> dict[str, Any]:
    """For an ArgumentParser: a description, and examples at the end of its help."""
    epilog = "examples:\n" + "\n".join(f"  {line}" for line in lines)
    form = argparse.RawDescriptionHelpFormatter
    return {"description": textwrap.fill(description, 79), "epilog": epilog, "formatter_class": form}


def _suite(name: str) -> Callable[[Sequence[str], str], int]:
    """The main function of a module of the parity suite."""
    if importlib.util.find_spec("jaxrnn.parity") is None:
        # In a clone that is not installed, the suite is a folder of its own.
        raise SystemExit("jaxrnn.parity is not installed: run pip install -e . in the clone, or python -m parity there")
    return importlib.import_module(SUITE[name][0]).main


def _load(path: str, key: str | None, arguments: argparse.Namespace) -> Tensors:
    """Read all tensors of a file, and fold weights that are in parts."""
    tensors = _opened(path, key, arguments)
    with _progress(f"reading {os.path.basename(path)}", tensors) as progress:
        odd = not_finite(tensors, progress)
    if odd:
        _print(f"warning: {path}: NaN or infinite numbers in {listed(odd)}", sys.stderr)
    return tensors


def _opened(path: str, key: str | None, arguments: argparse.Namespace) -> Tensors:
    """As `_load`, but the tensors are not read yet.

    Commands with `past_objects` leave out what is no tensor, if they must; then `arguments.only_tensors` becomes True.
    """
    notes: list[str] = []
    what = Reading(key, arguments.only_tensors, arguments.dequantize, notes.append)
    with _printed_warnings():
        try:
            tensors = opened(path, what)
        except CheckpointError as refusal:
            if not arguments.past_objects or arguments.only_tensors:
                raise
            notes.clear()
            try:
                tensors = opened(path, what._replace(only_tensors=True))
            except CheckpointError:
                raise refusal from None
            arguments.only_tensors = True
    for text in notes:
        _note(path, text)
    with about(path):
        return fold(tensors, arguments.raw)


@contextlib.contextmanager
def _printed_warnings(prefix: str = "") -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        kind = "note" if _LEFT_OUT in str(warning.message) else "warning"
        _print(f"{kind}: {prefix}{warning.message}", sys.stderr)


def _note(path: str, text: str) -> None:
    _print(f"note: {path}: {text}", sys.stderr)


@contextlib.contextmanager
def _progress(what: str, tensors: Tensors, times: int = 1) -> Iterator[Callable[[int], None]]:
    """Show a progress bar over the tensors' bytes, if many and on a terminal; yields what to call with a number."""
    total = times * sum(value.nbytes for value in tensors.values())
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    columns = (TextColumn(printable(what), markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    hidden = total < LARGE or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)


def _found(path: str, tensors: Tensors) -> list[FoundRNN]:
    with about(path), _printed_warnings(f"{path}: "):
        found = find_rnns(tensors)
    if not found:
        keys = f"its keys: {listed(tensors)}" if tensors else "it has no tensors at all"
        cause = "no recurrent weights: no key ends as torch.nn's do, such as weight_ih_l0 and weight_hh_l0"
        if maybe := maybe_haikus_lstms(tensors):
            names = " ".join(f"--rename {prefix}={prefix[:-1]}_lstm/" for prefix in maybe)
            keys += f"\nif these are LSTMs of Haiku, put lstm in their names: jaxrnn convert {path} OUT {names}"
        raise CheckpointError(f"{path}: {cause}\n{keys}")
    return found


def _inspect(arguments: argparse.Namespace) -> int:
    found = _found(arguments.file, _load(arguments.file, arguments.key, arguments))
    if arguments.json:
        names = ["prefix", "input_size", "hidden_size", "num_layers", "bidirectional", "bias", "proj_size"]
        names += ["num_parameters", "assumed", "beside", "in_training"]
        rows = [{name: getattr(rnn, name) for name in names} for rnn in found]
        kinds = [{"kind": _kind(rnn), "dtype": rnn.dtype.name} for rnn in found]
        print(json.dumps([row | kind for row, kind in zip(rows, kinds, strict=True)], indent=1))
        return 0
    columns = ("prefix", "kind", "input", "hidden", "layers", "bidir", "bias", "proj", "dtype", "parameters")
    described = [
        (
            rnn.prefix,
            _kind(rnn),
            str(rnn.input_size),
            str(rnn.hidden_size),
            str(rnn.num_layers),
            "yes" if rnn.bidirectional else "no",
            "yes" if rnn.bias else "no",
            str(rnn.proj_size or "no"),
            rnn.dtype.name,
            f"{rnn.num_parameters:,}",
        )
        for rnn in found
    ]
    _print_table(columns, described)
    _print_settings(found)
    return 0


def _scaffold(arguments: argparse.Namespace) -> int:
    path = arguments.file
    tensors = _opened(path, arguments.key, arguments)
    given = [] if arguments.key is None else [f"key={quoted(arguments.key)}"]
    given += [f"{name}=True" for name in ("only_tensors", "dequantize") if getattr(arguments, name)]
    source = f"jaxrnn.checkpoint.load({', '.join([quoted(path), *given])})"
    if arguments.raw:
        source = f"jaxrnn.checkpoint.fold({source}, raw=True)"
    with about(path), _printed_warnings(f"{path}: "):
        text = scaffold(tensors, arguments.prefix, linen=arguments.linen, source=source)
    print(text, end="")
    return 0


def _kind(rnn: FoundRNN) -> str:
    return rnn.class_name if rnn.in_torch else rnn.kind


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is a prefix, which may hold any text. No prefix is ever split over lines."""
    rows = [(printable(prefix) or '""', *row) for prefix, *row in rows]
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(
            name, justify="left" if name in ("prefix", "kind", "dtype", "verdict", "compared with") else "right"
        )
    for row in rows:
        table.add_row(*row)
    print_table(table, Console(markup=False, emoji=False, highlight=False))  # a prefix may look like markup


def _print_settings(found: list[FoundRNN]) -> None:
    """Tell what the file says beside the weights, and what was assumed because it does not."""
    for rnn in found:
        if rnn.beside:
            _print(f"\nBeside {rnn.prefix or 'it'}, and unknown to torch.nn.{rnn.class_name}: {listed(rnn.beside)}")
    for rnn in found:
        for text in rnn.in_training:
            _print(f"\nIn training alone, the original of {rnn.prefix or 'it'} has {text}")
    prefixes: dict[tuple[str, str, str], list[str]] = {}
    for rnn in found:
        for words, settings in (
            ("From the file", rnn.said),
            ("Assumed, because the file does not say it", rnn.assumed),
        ):
            for name, value in settings.items():
                text = value.name if isinstance(value, Cell) else repr(value)
                prefixes.setdefault((words, name, text), []).append(rnn.prefix)
    lines: dict[str, list[str]] = {}
    for (words, name, value), those in prefixes.items():
        several = sum(other == name for _, other, _ in prefixes) > 1
        lines.setdefault(words, []).append(f"{name}={value}" + (f" of {listed(those)}" if several else ""))
    for words, texts in lines.items():
        _print(f"\n{words}: {', '.join(texts)}")


def _convert(arguments: argparse.Namespace) -> int:
    if os.path.lexists(arguments.out) and not arguments.force:
        raise CheckpointError(f"{arguments.out}: it exists already\ngive another name, or --force to replace it")
    tensors = _load(arguments.file, arguments.key, arguments)
    if arguments.only_rnn:
        keys = [rnn.prefix + name for rnn in _found(arguments.file, tensors) for name in rnn.spec.shapes()]
        tensors = described_as({key: tensors[key] for key in keys}, tensors)
    chosen = _chosen(arguments.file, tensors, arguments.prefix)
    if not chosen:
        raise CheckpointError(f"{arguments.file}: it has no tensors\ngive another file, or --key")
    found: list[FoundRNN] = []
    with contextlib.suppress(CheckpointError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # any tensors can be converted
        found = find_rnns(chosen)
    with about(arguments.file):
        for rename in arguments.rename:
            chosen = _renamed(chosen, rename)
        if arguments.dtype:
            chosen = {key: _cast(key, value, arguments.dtype) for key, value in chosen.items()}
    with _progress(f"writing {os.path.basename(arguments.out)}", chosen, times=2) as progress:
        save(arguments.out, chosen, progress)
    numbers = sum(value.size for value in chosen.values())
    if arguments.json:
        print(json.dumps({"out": arguments.out, "tensors": len(chosen), "numbers": numbers, "keys": list(chosen)}))
        return 0
    _print(f"wrote {arguments.out}: {len(chosen)} tensors of {numbers:,} numbers\nkeys: {listed(chosen)}")
    _print_settings(found)
    if any(rnn.said for rnn in found):
        _print(f"{arguments.out} holds weights alone: give the file's settings to the modules")
    return 0


def _chosen(path: str, tensors: Tensors, prefix: str) -> Tensors:
    """The tensors under a prefix, without it."""
    with about(path):
        chosen = under(tensors, prefix) if prefix else tensors
        if prefix and not chosen:
            raise CheckpointError(f"no key starts with {prefix!r}\nits keys: {listed(tensors)}")
    return chosen


def _renamed(tensors: Tensors, rename: str) -> Tensors:
    before, equals, after = rename.partition("=")
    if not equals:
        raise CheckpointError(f"--rename {rename}: it should be A=B\ngive both, such as --rename encoder.=model.")
    if not any(key.startswith(before) for key in tensors):
        raise CheckpointError(f"--rename {rename}: no key starts with {before!r}\nits keys: {listed(tensors)}")
    names = {key: after + key.removeprefix(before) if key.startswith(before) else key for key in tensors}
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"--rename {rename}: two keys would have the same name\nchoose another name")
    return {names[key]: value for key, value in tensors.items()}


def _cast(key: str, value: Value, dtype: str) -> Value:
    if not jnp.issubdtype(value.dtype, jnp.floating) or value.dtype == dtype:
        return value
    array = read(value)
    with np.errstate(over="ignore"):
        cast = array.astype(jnp.dtype(dtype))
    if np.any(np.isinf(cast) & np.isfinite(array)):
        raise CheckpointError(f"{key} has numbers too large for {dtype}\nchoose another --dtype, such as bfloat16")
    return cast


def _diff(arguments: argparse.Namespace) -> int:
    one = _chosen(arguments.file, _load(arguments.file, arguments.key, arguments), arguments.prefix)
    other = _chosen(arguments.other, _load(arguments.other, arguments.other_key, arguments), arguments.other_prefix)
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


def _difference(one: Value | None, other: Value | None) -> str:
    """Describe how two values differ; empty if they are equal. NaN equals NaN."""
    if one is None or other is None:
        return "only in B" if one is None else "only in A"
    for name in ("shape", "dtype"):
        if (a := getattr(one, name)) != (b := getattr(other, name)):
            return f"{name} {a} in A, {b} in B"
    if equal(one, other):
        return ""
    # Holds 64-bit integers exactly, if the machine has it.
    wide: Any = np.complex128 if one.dtype.kind == "c" else np.float64 if one.dtype.kind in "fV" else np.longdouble
    a, b = read(one).astype(wide), read(other).astype(wide)
    same = (a == b) | ((a != a) & (b != b))
    if np.all(same):
        return ""
    with np.errstate(invalid="ignore"):
        distances = np.abs(a - b)[~same]
    odd = np.isnan(distances)
    words = f"{np.sum(~same):,} of {same.size:,} numbers differ"
    words += f", by {np.max(distances[~odd]):.3g} at most" if not np.all(odd) else ""
    return words + (f", {np.sum(odd):,} of them NaN in one file only" if np.any(odd) else "")


def _check(arguments: argparse.Namespace) -> int:
    tensors = _load(arguments.file, arguments.key, arguments)
    found = _found(arguments.file, tensors)
    torch = installed_torch()
    checked = [check(rnn, tensors, torch, arguments.run_code) for rnn in found]
    equal = all(result.equal for result in checked)
    if arguments.json:
        rows = [
            {
                "prefix": rnn.prefix,
                "kind": _kind(rnn),
                "finite": result.finite,
                "equal": None if result.difference is None else result.equal,
                "difference": result.difference if np.isfinite(result.difference or 0) else None,
                "original": result.original or None,
                "limit": result.limit,
            }
            for rnn, result in zip(found, checked, strict=True)
        ]
        print(json.dumps({"equal": equal, "torch": torch and torch.__version__, "limit": LIMIT, "modules": rows}))
        return 0 if equal else 1
    verdicts = [
        "not compared" if result.difference is None else "equal" if result.equal else "DIFFERENT" for result in checked
    ]
    table = [
        (
            rnn.prefix,
            _kind(rnn),
            "yes" if result.finite else "no",
            _shown(result.difference),
            verdict,
            result.original or "-",
        )
        for rnn, result, verdict in zip(found, checked, verdicts, strict=True)
    ]
    _print_table(("prefix", "kind", "finite", "difference", "verdict", "compared with"), table)
    _print_settings(found)
    count = f"{len(found)} recurrent module{'s' * (len(found) > 1)} built and run in float64"
    _print(f"\n{count}. A difference is relative to the largest number.")
    missed: dict[str, list[str]] = {}
    for rnn, result in zip(found, checked, strict=True):
        origin = origins_of(tensors).get(rnn.prefix)
        if origin is not None and result.original != origin.title:
            runs = origin.runs_code and not arguments.run_code
            why = "--run-code runs the code in the file, if you trust it" if runs else "it does not run here"
            missed.setdefault(why, []).append(f"{origin.title} ({rnn.prefix})" if rnn.prefix else origin.title)
    for why, titles in missed.items():
        _print(f"Not compared with {listed(titles)}: {why}.")
    if torch is None and not all(result.original for result in checked):
        _print("PyTorch is not installed: nothing to compare with.")
    elif torch is not None and any(result.original.startswith("torch.") for result in checked):
        _print(f"PyTorch is {torch.__version__}.")
    return 0 if equal else 1


def _shown(difference: float | None) -> str:
    return "-" if difference is None else f"{difference:.1e}"


def _print(text: str, file: TextIO | None = None) -> None:
    wrapper = textwrap.TextWrapper(80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    for line in text.split("\n"):
        print(wrapper.fill(printable(line)), file=file)


if __name__ == "__main__":
    sys.exit(main(prog="python -m jaxrnn"))
