"""How long jaxrnn takes beside Flax, Keras, cuDNN and torch.nn: `jaxrnn speed`, on an otherwise idle machine.

All sides are compiled and warm and take turns, so that what disturbs the machine disturbs all; figures are medians. A
training step is the value and the gradient, by parameters and input, of the outputs' sum of squares.
"""

import argparse
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxrnn
from jaxrnn.__main__ import with_examples
from jaxrnn._core.tables import print_table

from . import ahead, device, sweep
from .workloads import WORKLOADS, Torch, Workload, forms, torch_device

SIDES = ("jaxrnn", "sharded", "graphs", "pallas", "cudnn", "flax.nnx", "flax.linen", "keras", "torch")
OURS = ("graphs", "pallas", "cudnn")  # the loop in a CUDA graph, and other engines
THEIRS = SIDES[2:]
EXTRAS = {"keras": "keras (pip install 'jaxrnn[speed]')", "torch": "torch (pip install 'jaxrnn[torch]')"}
PROGRAMS = ("inference", "training")
SMALL = 1e9  # operations forward, below which --quick takes a workload
LEAST = 5  # runs of each, however long they take
CLEARLY = 1.2  # times the fastest form of its side: what takes longer in its first two runs is not timed further
SETTLE = 0.01  # seconds, in which torch's threads stop to spin


@dataclasses.dataclass
class Timed:
    """What came of one program of a workload on one side.

    Attributes:
        operations: in floating point, in the products alone.
        compile_s: the seconds to trace and compile.
        temporary_mb: the memory on one device beside arguments and results.
        error: the outputs' rms error beside float64, over the rms of the outputs; for inference.
        times: of all runs, in milliseconds.
        share: of the operations a second that one large product makes.
        problem: why it does not run.
    """

    workload: str
    program: str
    side: str
    form: str
    operations: int
    compile_s: float | None = None
    temporary_mb: float | None = None
    error: float | None = None
    times: list[float] = dataclasses.field(default_factory=list)
    share: float = 0.0
    problem: str = ""

    @property
    def ms(self) -> float:
        return statistics.median(self.times)

    @property
    def gflops(self) -> float:
        return self.operations / self.ms / 1e6

    def json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ms": self.ms, "minimum_ms": min(self.times), "gflops": self.gflops}


Turn = tuple[Timed, Callable[[], Any]]


def _shared_out(*axes: Sequence[str | None]) -> tuple[NamedSharding, ...]:
    """How arrays lie on all devices, given which of their axes is the batch."""
    mesh = Mesh(np.array(jax.devices()), "batch")
    return tuple(NamedSharding(mesh, PartitionSpec(*axis)) for axis in axes)


def product_rates(sides: Collection[str]) -> dict[str, float]:
    """How many GFLOP/s a large float32 product makes for each side: on one device, on all, and with torch."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    matrix = np.ones((size, size), np.float32)

    def rate(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(20):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return 2 * size**3 / min(times) / 1e9

    one = jnp.asarray(matrix)
    rates = dict.fromkeys(sides, rate(lambda: jax.block_until_ready(one @ one)))
    if "sharded" in sides:
        rows, whole = jax.device_put((matrix, matrix), _shared_out(("batch",), ()))
        rates["sharded"] = rate(lambda: jax.block_until_ready(rows @ whole))
    if "torch" in sides:
        import torch

        there = torch.tensor(matrix, device=torch_device())
        rates["torch"] = rate(lambda: (there @ there)[0, 0].item())  # which waits for a GPU
    return rates


def prepare(workload: Workload, sides: Collection[str]) -> Iterator[Turn]:
    """Everything that is to be timed, compiled."""
    operations = dict(zip(PROGRAMS, (workload.operations(), 3 * workload.operations()), strict=True))
    if len(jax.devices()) == 1 or workload.batch % len(jax.devices()):
        sides = [side for side in sides if side != "sharded"]
    x, marks = workload.inputs()
    for form in forms(workload, sides):
        places: Any = jax.devices()[0]
        if form.side == "sharded":
            whole, steps, rows = _shared_out((), (None, "batch"), ("batch",))
            places = whole, steps, {name: steps if mark.ndim > 1 else rows for name, mark in marks.items()}
        arguments = jax.device_put((form.parameters, x, marks), places)
        functions: list[Callable[..., Any]] = [form.run]
        functions += [jax.value_and_grad(functools.partial(_loss, form.run), (0, 1))]
        for program, function in zip(PROGRAMS, functions, strict=True):
            names = workload.name, program, form.side, form.name
            # On the devices where its arguments are.
            jitted = jax.jit(function, compiler_options=ahead.GRAPHS if form.side == "graphs" else None)
            start = time.perf_counter()
            try:
                compiled = jitted.lower(*arguments).compile()  # a call of jitted finds what was compiled here
            except Exception as problem:  # an engine refuses, or its kernel does not compile: that is a result
                if form.side not in OURS:
                    raise
                yield Timed(*names, operations[program], problem=str(problem).splitlines()[0]), lambda: None
                continue
            seconds = time.perf_counter() - start
            memory: Any = compiled.memory_analysis()
            timed = Timed(*names, operations[program], seconds, memory.temp_size_in_bytes / 1e6)
            yield timed, functools.partial(_run, jitted, arguments)
    if "torch" in sides and not workload.reset:  # which it has not
        module = Torch(workload)
        for program, call in zip(PROGRAMS, (module.inference, module.training), strict=True):
            yield Timed(workload.name, program, "torch", f"torch.nn.{workload.kind}", operations[program]), call


def _loss(run: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
    return jnp.sum(run(*arguments) ** 2)


def _run(jitted: Callable[..., Any], arguments: tuple) -> Any:
    return jax.block_until_ready(jitted(*arguments))


def truth(workload: Workload) -> np.ndarray:
    """The outputs in float64, which is switched on for this alone: what is timed runs as it does for everyone."""
    x, marks = workload.inputs()
    with jax.enable_x64(True):
        parameters = {name: array.astype(np.float64) for name, array in workload.parameters().items()}
        return np.asarray(jaxrnn.apply(workload.spec, parameters, x.astype(np.float64), **marks)[0])


def take_turns(turns: Sequence[Turn], repeats: int, seconds: float) -> list[Timed]:
    """Time everything in turns, each time in another order: the first after torch and its pause starts colder.

    What is left is the fastest form of each side.
    """

    def fastest(like: Timed) -> float:
        return min(min(t.times) for t, _ in turns if (t.program, t.side) == (like.program, like.side))

    start = time.perf_counter()
    for count in range(1, repeats + 1):
        for timed, call in random.Random(count).sample(turns, len(turns)):
            begin = time.perf_counter()
            call()
            timed.times.append(1000 * (time.perf_counter() - begin))
            if timed.side == "torch":
                time.sleep(SETTLE)
        if count == 2:
            turns = [turn for turn in turns if min(turn[0].times) <= CLEARLY * fastest(turn[0])]
        if count >= LEAST and time.perf_counter() - start > seconds:
            break
    slowest_first = sorted((timed for timed, _ in turns), key=lambda timed: -timed.ms)
    return list({(timed.program, timed.side): timed for timed in slowest_first}.values())


def measure(
    workload: Workload, sides: Collection[str], repeats: int, seconds: float, rates: dict[str, float]
) -> list[Timed]:
    """Compile, warm up and time a workload on all sides."""
    exact = truth(workload)
    prepared = list(prepare(workload, sides))
    turns = [turn for turn in prepared if not turn[0].problem]
    for timed, call in turns:
        outputs = call()
        if timed.program == "inference":
            difference = np.asarray(outputs.cpu() if timed.side == "torch" else outputs) - exact
            timed.error = float(np.sqrt(np.mean(difference**2) / np.mean(exact**2)))
    found = take_turns(turns, repeats, seconds)
    for timed in found:
        timed.share = timed.gflops / rates[timed.side]
    return found + [timed for timed, _ in prepared if timed.problem]


class Results:
    """What was timed, by workload, program and side."""

    def __init__(self, found: Sequence[Timed]) -> None:
        self.refused = [timed for timed in found if timed.problem]
        found = [timed for timed in found if not timed.problem]
        self.found = {(timed.workload, timed.program, timed.side): timed for timed in found}
        self.names = list(dict.fromkeys(timed.workload for timed in found))
        self.sides = [side for side in SIDES if any(timed.side == side for timed in found)]
        self.theirs = [side for side in self.sides if side in THEIRS]

    def ratio(self, workload: str, program: str, theirs: str) -> float | None:
        """Their time over ours: over that of one device, but torch's, on all cores, over the faster of ours."""
        their = self.found.get((workload, program, theirs))
        return their.ms / self._ours(workload, program, theirs).ms if their else None

    def _ours(self, workload: str, program: str, theirs: str) -> Timed:
        """What their time is compared with."""
        sides = ("jaxrnn", "sharded") if theirs == "torch" else ("jaxrnn",)
        found = [self.found[key] for side in sides if (key := (workload, program, side)) in self.found]
        return min(found, key=lambda timed: timed.ms)

    def memory(self, workload: str, program: str, theirs: str) -> float | None:
        """Our temporary memory on one device over theirs."""
        found = [self.found.get((workload, program, side)) for side in ("jaxrnn", theirs)]
        ours, their = (each.temporary_mb if each else None for each in found)
        return ours / their if ours is not None and their else None

    def ratios(self) -> dict[str, dict[str, dict[str, list[float]]]]:
        """For each workload, program and side the quartiles of their time over ours, turn by turn."""

        def quartiles(name: str, program: str, side: str) -> list[float]:
            ours = self._ours(name, program, side).times
            turns = [their / our for their, our in zip(self.found[name, program, side].times, ours, strict=False)]
            return statistics.quantiles(turns, n=4) if len(turns) > 1 else 3 * turns

        return {
            name: {
                program: {
                    side: quartiles(name, program, side) for side in self.theirs if (name, program, side) in self.found
                }
                for program in reversed(PROGRAMS)
            }
            for name in self.names
        }

    def summary(self) -> list[dict[str, Any]]:
        """For each program and side the geometric mean of the ratios and the worst, and the largest of memory."""
        lines = []
        for program, side in itertools.product(reversed(PROGRAMS), self.theirs):
            ratios = {name: ratio for name in self.names if (ratio := self.ratio(name, program, side))}
            if ratios:
                worst = min(ratios, key=lambda name: ratios[name])
                mean = statistics.geometric_mean(ratios.values())
                line = {"program": program, "side": side, "mean": mean, "worst": ratios[worst], "in": worst}
                memory = {name: ratio for name in self.names if (ratio := self.memory(name, program, side))}
                if memory:
                    most = max(memory, key=lambda name: memory[name])
                    line |= {"memory": memory[most], "memory in": most}
                lines.append(line)
        return lines

    def show(self, console: Console, rates: dict[str, float]) -> None:
        """Print the table, and the means below."""
        table = Table(title="medians in ms, and theirs over ours", title_justify="left", box=box.SIMPLE_HEAD)
        for heading in ("workload", "program"):
            table.add_column(heading, no_wrap=True)
        headings = [f"{side}\nms   ratio" if side in THEIRS else f"{side}\nms" for side in self.sides]
        for heading in (*headings, "memory MB\nours flax's", "compile s\nours flax's", "% of\nGEMM"):
            table.add_column(heading, justify="right", no_wrap=True)
        for workload, program in itertools.product(self.names, PROGRAMS):
            cells = []
            sides = {side: self.found.get((workload, program, side)) for side in self.sides}
            for side, timed in sides.items():
                ratio = self.ratio(workload, program, side) if side in THEIRS else None
                cells.append((_figure(timed.ms) if timed else "") + (f" {ratio:6.2f}" if ratio else ""))
            both = [timed for side in ("jaxrnn", "flax.nnx") if (timed := sides.get(side))]
            cells += [" ".join(f"{_figure(timed.temporary_mb):>6}" for timed in both)]
            cells += [" ".join(f"{_figure(timed.compile_s):>6}" for timed in both)]
            table.add_row(workload, program, *cells, f"{100 * both[0].share:.0f}")
        print_table(table, console)
        others = "".join(f", {rate:.0f} {side}" for side, rate in rates.items() if side in ("sharded", "torch"))
        lines = [
            "Ratios: their time over that of our one device; torch's, on all cores, over the faster of ours.",
            "Memory: beside arguments and results. Flax's, as in the time to trace and compile, is that of flax.nnx.",
            f"GEMM: a large float32 product, in GFLOP/s: {rates['jaxrnn']:.0f} on one device, which on a CPU uses all "
            f"cores for it{others}. The share is that of our one device.",
        ]
        errors = ((side, [t.error for t in self.found.values() if t.side == side and t.error]) for side in SIDES)
        worst = ", ".join(f"{side} {max(values):.1e}" for side, values in errors if values)
        lines.append(f"The largest rms error of outputs beside float64: {worst}.")
        spread = {f"{t.workload}, {t.program}, {t.side}": t.ms / min(t.times) for t in self.found.values()}
        widest = max(spread, key=lambda name: spread[name])
        lines.append(f"Medians are at most {spread[widest]:.1f} of minima, in {widest}; more on a busy machine.")
        for line in (*lines, *self.in_words()):
            console.print(line, highlight=False, soft_wrap=True)

    def in_words(self) -> Iterator[str]:
        """What did not run, and the summary."""
        for reason, group in itertools.groupby(self.refused, lambda timed: (timed.side, timed.problem)):
            names = ", ".join(dict.fromkeys(timed.workload for timed in group))
            yield f"{reason[0]} does not run {names}: {reason[1]}"
        words = "{program}: {side} takes {mean:.2f} times our time, at worst {worst:.2f}, in {in}"
        of_memory = "; we take at most {memory:.2f} times its memory, in {memory in}"
        for line in self.summary():
            yield (words + of_memory * ("memory" in line)).format(**line)


def _figure(value: float | None) -> str:
    """Three digits."""
    return "" if value is None else f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def plot(results: Results, path: Path, curves: tuple[sweep.Curves, sweep.Curves] | None = None) -> None:
    """Draw the ratios, or the curves of a sweep, in the format that the path's suffix says."""
    import matplotlib

    from . import plots

    with matplotlib.rc_context(plots.STYLE):
        if curves:
            figure = plots.sweep(*curves, results.theirs[0])
        else:
            figure = plots.ratios(results.ratios(), {side: side for side in results.theirs})
        figure.savefig(path)


def _environment() -> dict[str, Any]:
    names = ["jax", "flax", *(name for name in ("keras", "torch") if importlib.util.find_spec(name))]
    device = jax.devices()[0]
    devices = f"{len(jax.devices())} {device.platform} ({device.device_kind})"
    versions = {"jaxrnn": jaxrnn.__version__} | {name: importlib.metadata.version(name) for name in names}
    return versions | {"python": platform.python_version(), "devices": devices, "cores": os.cpu_count()}


def main(arguments: Sequence[str] | None = None, prog: str = f"python -m {__package__}.speed") -> int:
    """Time every workload and print a table. Returns 0. `prog` is the command that was used."""
    parser = argparse.ArgumentParser(
        prog=prog,
        **with_examples(
            "Time jaxrnn, Flax, Keras and PyTorch on the same workloads, on an otherwise idle machine.",
            f"{prog} --quick",
            f"{prog} --filter lstm --sides flax.nnx,torch",
            f"{prog} --sweep --filter gru --plot sweep.svg",
        ),
    )
    parser.add_argument("--repeats", type=int, help="runs of each side (default: 30; --sweep: 300)")
    parser.add_argument(
        "--seconds",
        type=float,
        help="stop a workload after this time, but not before 5 runs (default: 20; --quick: 5; --sweep: 3)",
    )
    parser.add_argument(
        "--devices", type=int, help="CPU devices (default: one for each core; --sweep, but for sharded: one)"
    )
    parser.add_argument(
        "--filter", default="", metavar="TEXT", help="only workloads with TEXT in their name; upper or lower case"
    )
    parser.add_argument(
        "--sides", help=f"what to time beside jaxrnn (default: {','.join(SIDES)}; --sweep, which takes one: flax.nnx)"
    )
    parser.add_argument("--quick", action="store_true", help="only the small workloads, in about two minutes")
    parser.add_argument(
        "--sweep", action="store_true", help="layers of 32 to 512 units with 1 to 4,096 rows, in about ten minutes"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write all results to this file")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="also draw the ratios to this .svg or .png file")
    parser.add_argument(
        "--device-report",
        type=Path,
        metavar="OUT",
        help="run parity, speed and a profile on this device in --seconds (450), and write OUT.json and OUT.html",
    )
    parser.add_argument("--compile-only", action="store_true", help="only compile, for a device that is not here")
    parser.add_argument(
        "--platform",
        choices=["tpu", "cuda", *ahead.TARGETS],
        help="with --compile-only: all TPUs, all GPUs, or one of them",
    )
    parser.add_argument("--bundles", action="store_true", help="with --compile-only: also count a TPU's instructions")
    options = parser.parse_args(arguments)
    asked = {"jaxrnn", *(options.sides or ("flax.nnx" if options.sweep else ",".join(SIDES))).split(",")}
    if unknown := asked - set(SIDES):
        parser.error(f"--sides has {', '.join(sorted(unknown))}: there are {', '.join(SIDES)}")
    if options.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot draws with matplotlib: pip install 'jaxrnn[report]'")
    workloads = sweep.workloads() if options.sweep else WORKLOADS
    chosen = [
        w
        for w in workloads
        if options.filter.lower() in w.name.lower() and (not options.quick or w.operations() < SMALL)
    ]
    if (options.platform or options.bundles) and not options.compile_only:
        parser.error("--platform and --bundles are for --compile-only: add it")
    if not chosen:
        names = "; ".join(workload.name for workload in workloads)
        parser.error(f"no workload has {options.filter!r} in its name: there are {names}")
    if options.device_report:
        return device.write(options.device_report, options.seconds or device.SECONDS)
    if options.compile_only:
        return _compile_only(chosen, options)
    devices = 1 if options.sweep and "sharded" not in asked else os.cpu_count()
    jax.config.update("jax_num_cpu_devices", options.devices or devices)
    absent = {side for side in ("keras", "torch") if not importlib.util.find_spec(side)}
    absent |= {"sharded"} if len(jax.devices()) == 1 else set()
    absent |= {"graphs", "cudnn"} if jax.default_backend() != "gpu" else set()
    absent |= {"pallas"} if jax.default_backend() != "tpu" else set()
    left_out = [side for side in SIDES if side in asked & absent]
    asked -= absent
    if options.sweep and len(asked & set(THEIRS)) != 1:
        here = ", ".join(side for side in THEIRS if side not in absent)
        parser.error(f"--sweep compares with one side: --sides has to name one of {here}")
    default = 3 if options.sweep else 5 if options.quick else 20
    seconds = default if options.seconds is None else options.seconds
    repeats = options.repeats or (300 if options.sweep else 30)

    rates = product_rates([side for side in SIDES if side in asked])
    results = Results([])
    for workload in track(chosen, description="timing", console=Console(stderr=True), transient=True):
        results = Results(
            [*results.found.values(), *results.refused, *measure(workload, asked, repeats, seconds, rates)]
        )
        jax.clear_caches()
        gc.collect()
        if options.json:  # each time, for all of it may take long
            everything = {
                "environment": _environment(),
                "gemm_gflops": rates,
                "workloads": [workload._asdict() for workload in chosen],
                "results": [timed.json() for timed in results.found.values()],
                "refused": [dataclasses.asdict(timed) for timed in results.refused],
                "summary": results.summary(),
                "ratios": results.ratios(),
            }
            options.json.write_text(json.dumps(everything, indent=1) + "\n")
    curves = None
    if options.sweep:
        [side] = results.theirs
        ratios = (functools.partial(ratio, theirs=side) for ratio in (results.ratio, results.memory))
        of_time, of_memory = (sweep.curves(chosen, PROGRAMS, ratio) for ratio in ratios)
        curves = of_time, of_memory
        sweep.show(*curves, side, Console())
        print(*results.in_words(), sep="\n")
    else:
        results.show(Console(), rates)
    print(", ".join(f"{name} {value}" for name, value in _environment().items()))
    if left_out:
        print(f"Not available here: {', '.join(EXTRAS.get(side, side) for side in left_out)}.")
    if options.plot:
        plot(results, options.plot, curves)
    return 0


def _compile_only(chosen: Sequence[Workload], options: argparse.Namespace) -> int:
    """Compile for devices that need not be here, and print what came of it."""
    jax.config.update("jax_platforms", "cpu")
    found: list[ahead.Compiled] = []
    for target, (kind, _) in ahead.TARGETS.items():
        if options.platform in (None, target, kind):
            programs = ahead.compile_for(target, chosen, bundles=options.bundles)
            count = len(chosen) * len(ahead.PROGRAMS) * len(ahead.SIDES)
            found += track(programs, target, count, console=Console(stderr=True), transient=True)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(each) for each in found], indent=1) + "\n")
    return ahead.show(found, chosen, Console())


if __name__ == "__main__":
    from jaxrnn.__main__ import quietly

    sys.exit(quietly(main))
