"""The parity runner: `jaxrnn parity`, or `python -m parity` from the root of a clone."""

import argparse
import collections
import concurrent.futures
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shlex
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, track

from jaxrnn import engines
from jaxrnn.__main__ import with_examples
from jaxrnn.checkpoint.check import installed_torch

from . import compile, model, reference, sides, training
from .cases import CASES, KINDS, Case
from .compare import DTYPES, Outcome, compare
from .locate import locate
from .report import Report, line

MOST_PLACES = 3
MANY = 50  # cases take a minute or so
STOPPED = 130  # the exit code of a program that Ctrl-C ends
# JAX's names of the platforms.
PLATFORMS = {"cpu": "cpu", "gpu": "cuda,rocm", "tpu": "tpu"}
# The options that each task reads; it refuses the others.
TASKS = {
    "compare": {"live", "filter", "dtype", "side", "engine", "platform", "precision", "json", "report"},
    "record": set[str](),
    "--model": {"key", "inputs", "dtype", "live", "side", "engine", "platform", "precision", "json", "report"},
    "--compile-only": {"filter", "dtype", "platform", "precision", "json"},
}


def main(arguments: Sequence[str] | None = None, prog: str = f"python -m {__package__}") -> int:
    """Compare, or record.

    Args:
        arguments: the command line; that of the process if None.
        prog: the command that was used, for messages and the report.

    Returns:
        The exit code: 0 if all is well, 1 if something fails, 130 if Ctrl-C ends it.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        **with_examples(
            "Compare jaxrnn with PyTorch: every kind of module, values and gradients. All of it takes about 6 minutes "
            "on two cores. Ctrl-C stops, and shows what was done.",
            f"{prog} --filter gru",
            f"{prog} --model examples/denoiser.safetensors",
        ),
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=("compare", "record"),
        default="compare",
        help="compare (the default), or record PyTorch's results again, in a clone",
    )
    parser.add_argument(
        "--live",
        nargs="?",
        const="cpu",
        choices=("cpu", "cuda"),
        help="run PyTorch here, on its cpu (the default) or on cuda, rather than use recorded results",
    )
    parser.add_argument(
        "--filter", default="", metavar="TEXT", help="only cases with TEXT in their name; upper or lower case"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype")
    parser.add_argument(
        "--side",
        choices=[s for s in sides.SIDES if s != "torch"],
        default="jaxrnn",
        help="what to compare with PyTorch (default: %(default)s)",
    )
    parser.add_argument(
        "--engine", choices=engines.ENGINES, help="use this engine for the loop over time, where it can run it"
    )
    parser.add_argument("--model", metavar="FILE", help="compare the recurrent modules in your own checkpoint")
    parser.add_argument("--key", help="with --model: the key that holds the state dict, for example trainer.model")
    parser.add_argument(
        "--inputs",
        metavar="NPY",
        action="append",
        default=[],
        help="with --model: also run on this .npy file, (time, batch, features); repeatable",
    )
    parser.add_argument("--platform", choices=PLATFORMS, help="the devices to run on (default: JAX's own)")
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="only compile for a TPU, without having one: needs --platform tpu, and libtpu installed",
    )
    parser.add_argument(
        "--precision",
        choices=("highest", "default"),
        default="highest",
        help="of products: highest (the default) is full float32; default may be TF32 or bfloat16 on a GPU or TPU",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write all results to this file")
    parser.add_argument("--report", type=Path, metavar="OUT", help="also write a report to this file, as HTML")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    _refuse_unused(parser, options)
    options.command_line = f"{prog} {shlex.join(arguments)}".strip()
    if options.report and not (importlib.util.find_spec("matplotlib") and importlib.util.find_spec("jinja2")):
        parser.error("--report draws with matplotlib and fills in with jinja2: pip install 'jaxrnn[report]'")
    torch = installed_torch() if options.live else None
    if options.live and torch is None:
        parser.error("--live compares with PyTorch: pip install 'jaxrnn[torch]'; without --live with recorded results")
    if options.live == "cuda" and torch and not torch.cuda.is_available():
        parser.error("--live cuda: this PyTorch sees no GPU")
    if options.model and options.dtype not in (None, "float64", "float32"):
        parser.error(f"--model takes --dtype float64 or float32, got {options.dtype}")
    if options.compile_only and options.platform != "tpu":
        parser.error("--compile-only compiles for a TPU: add --platform tpu")
    for path in (options.json, options.report):
        if path and not path.parent.is_dir():
            parser.error(f"there is no folder {path.parent} to write {path.name} to")
    dtypes = [options.dtype] if options.dtype else DTYPES
    text = options.filter.lower()
    cases = [case for case in CASES.values() if text in case.name.lower() and set(dtypes) & set(case.dtypes)]
    # What trains is jaxrnn.apply, which both sides call.
    runs = [run for run in training.RUNS.values() if text in run.name.lower() and "float64" in dtypes]
    if not cases and not runs and not options.model:
        wanted = f"no case {f'in {options.dtype} ' * bool(options.dtype)}has {options.filter!r} in its name"
        parser.error(f"{wanted}: names are like {next(iter(CASES))}, and begin with {', '.join(KINDS)}")

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", options.precision)
    if options.engine:
        engines.AUTO[:] = dict.fromkeys([options.engine, *engines.AUTO])
    if options.platform:
        jax.config.update("jax_platforms", "cpu" if options.compile_only else PLATFORMS[options.platform])
        try:
            jax.devices()
        except RuntimeError:  # JAX has no other for a platform that is not there
            parser.error(f"--platform {options.platform}: JAX finds none here; jax.devices() lists what it finds")
    console = Console()
    if options.model:
        return _model(options)
    if options.compile_only:
        return _compile(cases, dtypes, console, options.json)
    if options.command == "record":
        if not (Path(__file__).parents[1] / "pyproject.toml").is_file():
            parser.error("record writes into a clone of the repository: run `python -m parity record` in its root")
        if installed_torch() is None:
            parser.error("record runs PyTorch: pip install 'jaxrnn[torch]'")
        for path in reference.record():
            console.print(f"{path.name}: {path.stat().st_size:,} bytes", highlight=False)
        return 0
    return _judge(cases, runs, dtypes, options)


def _refuse_unused(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with an error where an option, or one of two tasks, would be ignored."""
    chosen = {"record": options.command == "record", "--model": options.model, "--compile-only": options.compile_only}
    tasks = [task for task in chosen if chosen[task]] or ["compare"]
    if len(tasks) > 1:
        parser.error(f"{' and '.join(tasks)} cannot be combined: give one of them")
    given = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    for name in sorted(given & set.union(*TASKS.values()) - TASKS[tasks[0]]):
        users = [task for task, names in TASKS.items() if name in names]
        task = "compare, the default" if tasks[0] == "compare" else tasks[0]
        parser.error(f"--{name} goes with {' or '.join(users)}, not with {task}")


def _model(options: argparse.Namespace) -> int:
    """Compare a user's own modules with torch run here."""
    if installed_torch() is None:
        print("--model compares with PyTorch: pip install 'jaxrnn[torch]'; jaxrnn check runs without", file=sys.stderr)
        return 2
    try:
        cases = model.cases(options.model, options.key, options.inputs)
    except (ValueError, OSError) as error:  # a CheckpointError is one
        print(error, file=sys.stderr)
        return 2
    options.live = options.live or "cpu"
    cases = [model.with_limit(case, options.live) for case in cases]
    return _judge(cases, [], [options.dtype] if options.dtype else ["float64", "float32"], options)


def _judge(cases: Sequence[Case], runs: list[training.Run], dtypes: Sequence[str], options: argparse.Namespace) -> int:
    """Compare, and report. Ctrl-C ends the comparison, and the report is of the cases by then."""
    count = len(cases) + len(runs)
    if count > MANY:
        words = f"comparing {count} cases, mostly compiling: all {len(CASES) + len(training.RUNS)} take about 6 minutes"
        print(f"{words} on two cores. Ctrl-C stops, and shows what was done.", file=sys.stderr)
    outcomes, trained, torch = _outcomes(cases, runs, options.side, dtypes, options.live)
    done = len(outcomes) + len(trained)
    stopped = done < count
    places = {} if stopped else _places(outcomes, options.side)
    # A user's weights may sum more terms, or fewer numbers, than the ratios are made for.
    report = Report.of(options.side, outcomes, trained, torch, places, ratios=not options.model)
    if done:
        report.show(Console())
    if stopped:
        print(f"Stopped: {done} of {count} cases were compared.", file=sys.stderr)
        return STOPPED
    if options.json:
        options.json.write_text(json.dumps(report.json(), indent=1) + "\n")
    if options.report:
        from . import html  # matplotlib and jinja2, which only this needs

        scope = "model" if options.model else "part" if options.filter or options.dtype else "suite"
        html.write(options.report, report, options.command_line, scope)
    return 1 if report.failures else 0


def _places(outcomes: list[Outcome], side: str) -> dict[str, str]:
    """The places where the first failing case of each kind is off, for a few kinds, as each takes some compiling."""
    places: dict[str, str] = {}
    kinds: set[str] = set()
    for outcome in outcomes:
        if outcome.off and outcome.case.kind not in kinds and len(kinds) < MOST_PLACES:
            kinds.add(outcome.case.kind)
            try:
                truth = reference.truth_of(outcome.case, outcome.record)
                place = str(locate(outcome.case, sides.SIDES[side], outcome.off[0], truth))
            except Exception as problem:  # a part of the case may break where the whole does not
                place = f"not to be found: {type(problem).__name__}: {problem}".splitlines()[0]
            places[outcome.case.name] = place
    return places


def _compile(cases: list[Case], dtypes: Sequence[str], console: Console, out: Path | None) -> int:
    chosen = compile.programs(cases, dtypes)
    pairs = track(compile.compile_all(chosen), "compiling", len(chosen), console=Console(stderr=True), transient=True)
    found = list(itertools.chain.from_iterable(pairs))
    if out:
        out.write_text(json.dumps([dataclasses.asdict(program) for program in found], indent=1) + "\n")
    return compile.show(found, console)


def _outcomes(
    cases: Sequence[Case], runs: list[training.Run], side: str, dtypes: Sequence[str], live: str | None
) -> tuple[list[Outcome], list[training.Trained], str]:
    """The outcomes of the cases and of the training runs, in their order, and the version of torch.

    After Ctrl-C, only the outcomes by then.
    """
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        if live:
            import torch

            records = {
                case.name: reference.live(case, device=live) for case in progress.track(cases, description="torch")
            }
            trained_there = {run.name: training.run_torch(run) for run in progress.track(runs, description="torch")}
            version = f"{torch.__version__} (live)" if live == "cpu" else f"{torch.__version__} (live, {live})"
        else:
            recorded = reference.Recorded()
            records = {case.name: recorded(case) for case in cases}
            trained_there = {run.name: recorded.training(run) for run in runs}
            version = f"{', '.join(recorded.versions)} (recorded)"
        task = progress.add_task(side, total=len(cases) + len(runs))

        pooled: dict[str, list[Outcome]] = {case.group: [] for case in cases}
        counts = collections.Counter(case.group for case in cases)
        position = {case.name: index for index, case in enumerate(cases)}
        lock, stopped = threading.Lock(), threading.Event()
        trained: dict[str, training.Trained] = {}

        def run(batch: list[Case]) -> None:
            for case in batch:
                if stopped.is_set():
                    return
                outcome = compare(case, records[case.name], sides.SIDES[side], dtypes)
                with lock:
                    group = pooled[case.group]
                    group.append(outcome)
                    progress.advance(task)
                    if len(group) == counts[case.group]:
                        group.sort(key=lambda outcome: position[outcome.case.name])
                        progress.console.print(line(case.group, group), highlight=False, soft_wrap=True)

        def train(run: training.Run) -> None:
            if not stopped.is_set():
                trained[run.name] = training.compare(run, trained_there[run.name])
                progress.advance(task)

        # Nearly all of the time goes into compiling, which leaves Python free for other threads. Cases that differ in
        # their seeds or lengths only share a compilation, so one thread has them all. Kind by kind, so that there is
        # something to say before the end.
        batches = [
            list(batch)
            for _, batch in itertools.groupby(
                sorted(cases, key=lambda case: list(pooled).index(case.group)),
                lambda case: re.sub(r"-(seed\d+|lengths-\w+)$", "", case.name),
            )
        ]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as executor:
            try:
                results = [executor.map(train, runs), executor.map(run, batches)]
                for result in results:
                    list(result)  # raises what a thread raised
            except KeyboardInterrupt:
                stopped.set()  # what is being compared is finished
        outcomes = sorted(itertools.chain(*pooled.values()), key=lambda outcome: position[outcome.case.name])
        return outcomes, [trained[run.name] for run in runs if run.name in trained], version


if __name__ == "__main__":
    from jaxrnn.__main__ import quietly

    sys.exit(quietly(main))
