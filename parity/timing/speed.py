"""Time jaxrnn beside Flax, Keras, cuDNN and torch.nn.

All sides are compiled and warm and take turns, so that a disturbance of the machine disturbs all; figures are medians.
"""

import dataclasses
import functools
import itertools
import random
import statistics
import time
import timeit
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

import jaxrnn

from ..tables import new_table, print_table
from .workloads import TORCH, Torch, Workload, implementations, torch_device, training

SIDES = (
    *("jaxrnn", "sharded", "graphs", "pallas", "cudnn", "scan", "associative_scan"),
    *("flax.nnx", "flax.linen", "keras", "torch"),
)
OURS = ("graphs", "pallas", "cudnn", "scan", "associative_scan")  # the loop in a CUDA graph, and other engines
THEIRS = SIDES[2:]
PROGRAMS = ("inference", "training")
LEAST = 5  # runs of each, however long they take
CLEARLY = 1.2  # what takes so many times the time of its side's fastest in its first two runs is not timed further
SETTLE = 0.01  # seconds, in which torch's threads stop spinning


@dataclasses.dataclass
class Timed:
    """The times of one program of a workload on one side.

    Attributes:
        form: the name of the implementation.
        operations: floating-point operations in the products.
        compile_s: the seconds to trace and compile.
        temporary_mb: the memory on one device beside arguments and results.
        error: the rms error of the outputs against float64, over the rms of the outputs; for inference.
        times: the milliseconds of each run.
        share: the operations a second, as a share of those in one large product.
        problem: why the program does not run.
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


Turn = tuple[Timed, Callable[[], Any]]  # and the function that runs the program once


def _shardings(*axes: Sequence[str | None]) -> tuple[NamedSharding, ...]:
    """Shardings over all devices, given the names of the arrays' axes; "batch" is sharded."""
    mesh = Mesh(np.array(jax.devices()), "batch")
    return tuple(NamedSharding(mesh, PartitionSpec(*axis)) for axis in axes)


def product_rates(sides: Collection[str]) -> dict[str, float]:
    """The GFLOP/s of a large float32 product for each side: on one device, on all, and with torch."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    matrix = np.ones((size, size), np.float32)

    def rate(call: Callable[[], Any]) -> float:
        return 2 * size**3 / min(timeit.repeat(call, number=1, repeat=20)) / 1e9

    one = jnp.asarray(matrix)
    rates = dict.fromkeys(sides, rate(lambda: jax.block_until_ready(one @ one)))
    if "sharded" in sides:
        rows, whole = jax.device_put((matrix, matrix), _shardings(("batch",), ()))
        rates["sharded"] = rate(lambda: jax.block_until_ready(rows @ whole))
    if "torch" in sides:
        import torch

        tensor = torch.tensor(matrix, device=torch_device())
        rates["torch"] = rate(lambda: (tensor @ tensor)[0, 0].item())  # which waits for a GPU
    return rates


def prepare(workload: Workload, sides: Collection[str]) -> Iterator[Turn]:
    """Compile the programs of a workload on all sides."""
    operations = dict(zip(PROGRAMS, (workload.operations(), 3 * workload.operations()), strict=True))
    if len(jax.devices()) == 1 or workload.batch % len(jax.devices()):
        sides = [side for side in sides if side != "sharded"]
    x, kwargs = workload.inputs()
    for each in implementations(workload, sides):
        places: Any = jax.devices()[0]
        if each.side == "sharded":
            whole, steps, rows = _shardings((), (None, "batch"), ("batch",))
            places = whole, steps, {name: steps if array.ndim > 1 else rows for name, array in kwargs.items()}
        arguments = jax.device_put((each.parameters, x, kwargs), places)
        for program, function in zip(PROGRAMS, (each.run, training(each.run)), strict=True):
            names = workload.name, program, each.side, each.name
            jitted = jax.jit(function, compiler_options=each.compiler_options)  # on the devices of its arguments
            start = time.perf_counter()
            try:
                compiled = jitted.lower(*arguments).compile()  # a call of jitted finds what was compiled here
            except Exception as problem:  # an engine refuses, or its kernel does not compile: that is a result
                if each.side not in OURS:
                    raise
                yield Timed(*names, operations[program], problem=str(problem).splitlines()[0]), lambda: None
                continue
            seconds = time.perf_counter() - start
            memory: Any = compiled.memory_analysis()
            timed = Timed(*names, operations[program], seconds, memory.temp_size_in_bytes / 1e6)
            yield timed, functools.partial(_call_and_wait, jitted, arguments)
    if "torch" in sides and not workload.reset and workload.kind in TORCH:  # torch has no resets
        module = Torch(workload)
        for program, call in zip(PROGRAMS, (module.inference, module.training), strict=True):
            yield Timed(workload.name, program, "torch", f"torch.nn.{workload.kind}", operations[program]), call


def _call_and_wait(function: Callable[..., Any], arguments: tuple) -> Any:
    return jax.block_until_ready(function(*arguments))


def truth(workload: Workload) -> np.ndarray:
    """The outputs in float64. It is enabled here alone: what is timed runs with JAX's default."""
    x, kwargs = workload.inputs()
    with jax.enable_x64(True):
        parameters = {name: array.astype(np.float64) for name, array in workload.parameters().items()}
        return np.asarray(jaxrnn.apply(workload.spec, parameters, x.astype(np.float64), **kwargs)[0])


def take_turns(turns: Sequence[Turn], repeats: int, seconds: float) -> list[Timed]:
    """Time the programs in turns, each time in another order: the first one after torch and its pause starts colder.

    Returns:
        The fastest implementation of each program and side.
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
    """The times, by workload, program and side."""

    def __init__(self, found: Sequence[Timed]) -> None:
        self.refused = [timed for timed in found if timed.problem]
        found = [timed for timed in found if not timed.problem]
        self.found = {(timed.workload, timed.program, timed.side): timed for timed in found}
        self.names = list(dict.fromkeys(timed.workload for timed in found))
        self.sides = [side for side in SIDES if any(timed.side == side for timed in found)]
        self.theirs = [side for side in self.sides if side in THEIRS]

    def ratio(self, workload: str, program: str, theirs: str) -> float | None:
        """Their time over ours on one device; torch's, on all cores, over the faster of one device and all."""
        their = self.found.get((workload, program, theirs))
        return their.ms / self._ours(workload, program, theirs).ms if their else None

    def _ours(self, workload: str, program: str, theirs: str) -> Timed:
        """Our time, with which theirs is compared."""
        sides = ("jaxrnn", "sharded") if theirs == "torch" else ("jaxrnn",)
        found = [self.found[key] for side in sides if (key := (workload, program, side)) in self.found]
        return min(found, key=lambda timed: timed.ms)

    def memory(self, workload: str, program: str, theirs: str) -> float | None:
        """Our temporary memory on one device over theirs."""
        found = [self.found.get((workload, program, side)) for side in ("jaxrnn", theirs)]
        ours, their = (each.temporary_mb if each else None for each in found)
        return ours / their if ours is not None and their else None

    def ratios(self) -> dict[str, dict[str, dict[str, list[float]]]]:
        """The quartiles of their time over ours, turn by turn, for each workload, program and side."""
        ratios: dict[str, Any] = {name: {program: {} for program in reversed(PROGRAMS)} for name in self.names}
        for key in itertools.product(self.names, PROGRAMS, self.theirs):
            if key in self.found:
                name, program, side = key
                both = zip(self.found[key].times, self._ours(*key).times, strict=False)
                turns = [their / our for their, our in both]
                ratios[name][program][side] = statistics.quantiles(turns, n=4) if len(turns) > 1 else 3 * turns
        return ratios

    def summary(self) -> list[dict[str, Any]]:
        """The geometric mean of the ratios and the worst, and the largest of memory, for each program and side."""
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
        """Print the table, and the summary below."""
        headings = [f"{side}\nms   ratio" if side in THEIRS else f"{side}\nms" for side in self.sides]
        headings += ["memory MB\nours flax's", "compile s\nours flax's", "% of\nGEMM"]
        table = new_table("medians in ms, and theirs over ours", ("workload", "program"), headings)
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
        """The summary, and which programs did not run, in sentences."""
        for reason, group in itertools.groupby(self.refused, lambda timed: (timed.side, timed.problem)):
            names = ", ".join(dict.fromkeys(timed.workload for timed in group))
            yield f"{reason[0]} does not run {names}: {reason[1]}"
        words = "{program}: {side} takes {mean:.2f} times our time, at worst {worst:.2f}, in {in}"
        of_memory = "; we take at most {memory:.2f} times its memory, in {memory in}"
        for line in self.summary():
            yield (words + of_memory * ("memory" in line)).format(**line)


def _figure(value: float | None) -> str:
    """A number with three digits."""
    return "" if value is None else f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"
