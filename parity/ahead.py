"""Compile workloads for accelerators that are not here, and count what their compilers made of the loops over time.

A TPU's compiler (libtpu) and a GPU's (JAX's CUDA plugin) compile ahead of time, for a described device. What they say
is no time: a TPU's estimate of cycles leaves out what overlaps, and puts some 2,000 on every pointwise fusion, however
small; how long a GPU's launch takes is up to its driver.
"""

import atexit
import dataclasses
import functools
import importlib.resources
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich import box
from rich.console import Console
from rich.table import Table

from jaxrnn._compat import described_devices
from jaxrnn._core.tables import print_table

from .workloads import Workload, forms

# By name: the platform, and how JAX describes it. Of a GPU, a text of XLA's has its sizes.
TARGETS = {
    "v5e": ("tpu", {"topology_name": "v5e:2x2"}),
    "v6e": ("tpu", {"topology_name": "v6e:2x2"}),
    "v5p": ("tpu", {"topology_name": "v5p:2x2x1"}),
    "h100": ("cuda", {"topology_name": "", "topology": "1x1x1"}),
}
SIDES = ("jaxrnn", "pallas", "flax.nnx")
PROGRAMS = ("forward", "training")
# Let XLA make one CUDA graph of a loop that has nothing in it but kernels.
GRAPHS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE",
    "xla_gpu_graph_min_graph_size": "1",
}
# No operations, or loops of their own.
_FREE = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast", "after-all", "compare", "while"}
_CALLED = re.compile(r"(?:calls|to_apply|\w+_computations?)=\{?(%?[\w.\-]+(?:, %?[\w.\-]+)*)")
_KERNEL = '"tpu_custom_call"'
_SIZES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s64": 8, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}
_ARRAY = re.compile(r"\b(" + "|".join(_SIZES) + r")\[([\d,]*)\](?:\{([\d,]*)(:[^}]*)?\})?")


class Bundles(NamedTuple):
    """How many bundles of instructions there are, and whether some of them run more than once."""

    number: int = 0
    at_least: bool = False


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop over time, as compiled. Counts are those of one trip, which may make several steps.

    What a loop within it does is not in them: that is a loop of its own.

    Attributes:
        trips: how often it runs; of a loop within another, in all trips of the other.
        operations: fusions and other operations; on a GPU, kernels and copies that are launched.
        copies: those that only move numbers: copies, slices, transpositions.
        hbm_bytes: bytes of operands that are read from memory outside the chip. What is sliced counts as the slice.
        not_time_major: arrays of all steps that have another axis than time outermost.
        cycles: the TPU's compiler's estimate; 0 on a GPU, and for a kernel of ours.
        in_graph: whether the whole loop is in a CUDA graph.
        bundles: of instructions that a TPU runs, if they were asked for: without what it waits for.
        at_least: whether an operation has a loop of its own, whose bundles count once.
    """

    trips: int
    operations: int
    copies: int
    hbm_bytes: int = 0
    not_time_major: int = 0
    cycles: int = 0
    in_graph: bool = False
    bundles: int = 0
    at_least: bool = False


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program, as compiled.

    Attributes:
        target, workload, program, side: what was compiled.
        loops: its loops over time, in their order.
        temporary: the temporary memory that it takes, in bytes.
        cycles: a TPU's, of the whole program with every loop's times its trips.
        problem: why it does not compile.
        refused: why the engine does not run it.
    """

    target: str
    workload: str
    program: str
    side: str
    loops: tuple[Loop, ...] = ()
    temporary: int = 0
    cycles: int = 0
    problem: str = ""
    refused: str = ""

    def bundles(self, steps: int) -> str:
        """Bundles of all loops for each time step, with a plus where an operation has loops of its own."""
        count = sum(loop.bundles * loop.trips for loop in self.loops) / steps
        return f"{count:,.0f}{'+' * any(loop.at_least for loop in self.loops)}"

    def a_step(self, steps: int) -> float:
        """Operations of all loops for each time step; of several layers and directions, their sum."""
        return sum(loop.operations * loop.trips for loop in self.loops) / steps


def compile_for(
    target: str, workloads: Sequence[Workload], sides: Sequence[str] = SIDES, bundles: bool = False
) -> Iterator[Compiled]:
    """Compile every workload's forward and training program on each side; with `bundles`, count those, too."""
    on_tpu = TARGETS[target][0] == "tpu"
    dumped = _dumped() if bundles and on_tpu else None
    devices = _devices(target)
    sharding = NamedSharding(Mesh(np.array(devices[:1]), "one"), PartitionSpec())

    def described(tree: Any) -> Any:
        def one(a: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(jnp.shape(a), jax.dtypes.canonicalize_dtype(a.dtype), sharding=sharding)

        return jax.tree.map(one, tree)

    for workload, program in itertools.product(workloads, PROGRAMS):
        made: dict[str, list[Compiled]] = {}
        for form in forms(workload, [side for side in SIDES if side in sides and (on_tpu or side != "pallas")]):
            function = _programs(form.run)[program]
            arguments = described((form.parameters, *workload.inputs()))
            made.setdefault(form.side, []).append(
                _compiled(target, workload, program, form.side, jax.jit(function), arguments, dumped)
            )
        for compiled in made.values():  # Flax has two LSTMs: the one that takes fewer cycles, or operations
            yield min(compiled, key=lambda each: (each.problem != "", each.cycles, each.a_step(workload.time)))


def _programs(run: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    def training(parameters: Any, x: Any, marks: Any) -> Any:
        return jax.value_and_grad(lambda p, x: jnp.sum(run(p, x, marks) ** 2), (0, 1))(parameters, x)

    return {"forward": run, "training": training}


def _devices(target: str) -> list[Any]:
    platform, settings = TARGETS[target]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # nor a driver
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip that two processes could want
    if platform == "cuda":
        settings = settings | {"target_config": (importlib.resources.files(__package__) / "h100.txt").read_text()}
    try:
        return described_devices(platform, **settings)
    except Exception as error:  # whatever JAX and XLA raise where the compiler is not installed
        packages = "libtpu" if platform == "tpu" else "jax-cuda12-plugin jax-cuda12-pjrt"
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        remedy = f"pip install --no-deps --target DIR {packages}, and put DIR on PYTHONPATH"
        raise SystemExit(f"the compiler for {target} does not start ({cause})\n{remedy}") from error


@functools.cache
def _dumped() -> Path:
    """Where the TPU's compiler writes the bundles of every operation. It must be told before it is loaded."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
    asked = "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags} {asked}"
    return folder


def _compiled(
    target: str, workload: Workload, program: str, side: str, function: Any, arguments: Any, folder: Path | None
) -> Compiled:
    key = target, workload.name, program, side
    on_gpu = TARGETS[target][0] == "cuda"
    try:
        lowered = function.lower(*arguments)
    except ValueError as refusal:  # of an engine
        return Compiled(*key, refused=str(refusal))
    with tempfile.TemporaryDirectory() as launched:
        options = {"xla_dump_to": launched, **GRAPHS} if on_gpu else {}
        try:
            compiled = lowered.compile(compiler_options=options)
        except Exception as problem:  # what does not compile is one of the results
            return Compiled(*key, problem=f"{type(problem).__name__}: {problem}".splitlines()[0])
        memory: Any = compiled.memory_analysis()
        dumped = sorted(Path(launched).glob("*thunk_sequence_after_thunk_passes.txt"))
        if on_gpu:
            launches = _launches(dumped[-1].read_text()) if dumped else []
            trips = [each.trips for each in _whiles(_computations(compiled.as_text() or ""), workload.time)]
            found = [dataclasses.replace(loop, trips=n) for loop, n in zip(launches, trips, strict=False) if n]
            return Compiled(*key, tuple(found), memory.temp_size_in_bytes)
    text = compiled.as_text() or ""
    found = loops(text, workload.time, {} if folder is None else _bundles(folder))
    return Compiled(*key, tuple(found), memory.temp_size_in_bytes, cycles(text, found))


def cycles(text: str, found: Sequence[Loop]) -> int:
    """A TPU's compiler's estimate for a program: what is outside its loops, and each loop's times its trips.

    XLA's own sum, `cost_analysis`, counts a loop's body once.
    """
    return _cycles(_computations(text).get("ENTRY", [])) + sum(loop.cycles * loop.trips for loop in found)


def loops(text: str, time: int, bundles: dict[str, Bundles] | None = None) -> list[Loop]:
    """The loops over so many steps in a program's optimised HLO, as they begin, and the kernels of ours.

    `bundles` are those of each operation, if they were counted.
    """
    computations, bundles = _computations(text), bundles or {}
    known: dict[str, Bundles] = {}
    found = []
    for line, body, own, trips in _whiles(computations, time):
        if _KERNEL in line:
            # One that is there twice is compiled once.
            name, kernel = line.removeprefix("ROOT ").split()[0].lstrip("%"), line.partition("backend_config=")[2]
            known[kernel] = bundles.get(name, known.get(kernel, Bundles()))
            found.append(Loop(trips, 0, 0, bundles=known[kernel].number, at_least=known[kernel].at_least))
        elif trips:
            found.append(_loop(body, trips, {own, time} - {1}, bundles))
    return found


class While(NamedTuple):
    """A loop in HLO, or a kernel of ours, which is one.

    Attributes:
        line: the operation.
        body: the lines of what it repeats.
        own: its trips each time that it runs.
        trips: those in all; 0 for a loop that is neither over time nor in one that is.
    """

    line: str
    body: list[str]
    own: int
    trips: int


def _whiles(computations: dict[str, list[str]], time: int, name: str = "ENTRY", around: int = 0) -> Iterator[While]:
    """A computation's loops, in the order in which they begin, given how often loops over time around it run it."""
    for line in computations.get(name, []):
        if _KERNEL in line:
            yield While(line, [], time, time)
        elif match := re.search(r" while\(.*body=%?([\w.\-]+)", line):
            own = _trips(line, computations)
            trips = around * max(own, 1) if around else own if own <= time else 0
            yield While(line, computations.get(match[1], []), own, trips)
            yield from _whiles(computations, time, match[1], trips)
        else:
            for called in re.findall(r"[\w.\-]+", ", ".join(_CALLED.findall(line))):
                yield from _whiles(computations, time, called, around)


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation, by name; those of the program itself under ENTRY."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and (match := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            lines = found["ENTRY" if match[1] else match[2]] = []
        elif line.startswith("  "):
            lines.append(line.strip())
    return found


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs: as XLA noted, or what its condition compares with; 0 where neither is known."""
    if match := re.search(r'known_trip_count"?:\s*\{"n":\s*"(\d+)"', line):
        return int(match[1])
    if match := re.search(r"condition=%?([\w.\-]+)", line):
        numbers = [int(n) for each in computations.get(match[1], []) for n in re.findall(r"constant\((\d+)\)", each)]
        return max(numbers, default=0)
    return 0


def _bundles(folder: Path) -> dict[str, Bundles]:
    """The bundles of every operation that was dumped, by its name; of a kernel of ours, those of a time step."""
    found = {}
    for path in folder.glob("*final_bundles.txt"):
        if match := re.match(r"\d+-(.*?)-\d+-final_bundles", path.name):
            found[match[1]] = _count(path.read_text(), match[1].startswith("jaxrnn_"))
        path.unlink()
    return found


def _count(dump: str, of_ours: bool) -> Bundles:
    """Count what was dumped, one line for each bundle, with a mark where a loop begins, and one for each loop it is in.

    The grid of a kernel of ours is one loop. The steps of a block are the longest loop in it.
    """
    lines = [
        (begin, len(depth), 1 + sum(map(int, re.findall(r"vdelay (\d+)", text))))
        for begin, depth, text in re.findall(r"^ *(?:0x)?[0-9a-f]+ +([A-Z]{2})?: (>*)(.*)$", dump, re.M)
    ]
    whole = sum(count for *_, count in lines), any(begin == "LB" for begin, *_ in lines)
    steps = []
    for first, (begin, depth, _) in enumerate(lines):
        if of_ours and begin == "LB" and depth == 2:
            # Some lines in a loop lack its mark, but never many.
            ends = (k for k in range(first, len(lines)) if all(d < 2 for _, d, _ in lines[k : k + 6]))
            loop = lines[first : next(ends, len(lines))]
            steps.append((sum(count for *_, count in loop), any(begin == "LB" for begin, *_ in loop[1:])))
    return Bundles(*max(steps, default=whole))


def _loop(body: list[str], trips: int, lengths: Collection[int], bundles: dict[str, Bundles]) -> Loop:
    """A loop, given how long the first axis of an array of all its steps may be."""
    shapes = {}
    operations = copies = read = other_layout = cycles = 0
    counted: list[Bundles] = []
    for line in body:
        if not (match := re.match(r"(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)", line)):
            continue
        name, shape, operation, operands = match.groups()
        shapes[name] = shape
        if operation == "parameter":
            arrays = _ARRAY.findall(shape)
            other_layout = sum(_is_not_time_major(dims, order, lengths) for _, dims, order, _ in arrays)
        if operation in _FREE or _KERNEL in line:
            continue
        operations += 1
        copies += operation in ("copy", "slice", "dynamic-slice", "dynamic-update-slice", "transpose", "copy-start")
        cycles += _cycles([line])
        counted.append(bundles.get(name, Bundles()))
        for operand in re.findall(r"%([\w.\-]+)", operands):
            for kind, dims, _, tiling in _ARRAY.findall(shapes.get(operand, "")):
                if "S(" not in tiling:
                    sizes = [int(n) for n in dims.split(",") if n]
                    whole = sizes[1:] if len(sizes) > 2 and sizes[0] in lengths else sizes
                    read += _SIZES[kind] * int(np.prod(whole))
    number, at_least = sum(each.number for each in counted), any(each.at_least for each in counted)
    return Loop(trips, operations, copies, read, other_layout, cycles, bundles=number, at_least=at_least)


def _is_not_time_major(dims: str, order: str, lengths: Collection[int]) -> bool:
    """Whether an array of all steps, (length, ...), has another axis outermost in memory."""
    sizes, axes = dims.split(","), [n for n in order.split(",") if n]
    return len(sizes) > 2 and int(sizes[0]) in lengths and bool(axes) and axes[-1] != "0"


def _cycles(lines: Sequence[str]) -> int:
    return sum(int(n) for line in lines for n in re.findall(r'"estimated_cycles":"(\d+)"', line))


def _launches(thunks: str) -> list[Loop]:
    """The loops in a GPU's list of launches, as they begin. An operation is a kernel, a library's product, or a copy.

    What is indented belongs to the last line before it that is less so.
    """
    found: list[Loop] = []
    within: list[tuple[int, bool, int | None]] = []  # the indentation, whether in a graph, and in which loop's body
    for line in thunks.splitlines():
        if not (match := re.match(r"( *)(?:\d+: (k\w+)|body:)", line)):
            continue
        indent, kind = len(match[1]), match[2]
        while within and within[-1][0] >= indent:
            within.pop()
        in_graph, body = within[-1][1:] if within else (False, None)
        if kind is None:
            body = len(found) - 1
        elif kind == "kWhile":
            found.append(Loop(1, 0, 0, in_graph=in_graph))
            body = None  # but its condition
        elif kind == "kCommandBuffer":
            in_graph = True
        elif body is not None and kind not in ("kDynamicSliceFusion", "kSequential"):
            loop = found[body]
            copies = loop.copies + (kind == "kCopy")
            found[body] = dataclasses.replace(loop, operations=loop.operations + 1, copies=copies)
        within.append((indent, in_graph, body))
    return found


def show(found: Sequence[Compiled], workloads: Sequence[Workload], console: Console) -> int:
    """Print a table for each target, ours beside flax's; return the exit code."""
    steps = {workload.name: workload.time for workload in workloads}
    for target, group in itertools.groupby(found, lambda each: each.target):
        compiled = list(group)
        on_tpu = TARGETS[target][0] == "tpu"
        title = f"compiled for {target}: " + ("estimates by its compiler" if on_tpu else "launches")
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        columns = _columns(on_tpu, [side for side in SIDES if any(each.side == side for each in compiled)])
        if not any(loop.bundles for each in compiled for loop in each.loops):
            columns = [column for column in columns if column.title != "bundles a step"]
        table.add_column("workload")
        table.add_column("program")
        for title, block in itertools.groupby(columns, lambda column: column.title):
            for k, column in enumerate(block):
                table.add_column(f"{title if k == 0 else ''}\n{column.side}", justify="right")
        for (name, program), pair in itertools.groupby(compiled, lambda each: (each.workload, each.program)):
            sides = {each.side: each for each in pair if not each.problem and not each.refused}
            table.add_row(name, program, *(column.cell(sides, steps[name]) for column in columns))
        print_table(table, console)
    for each in found:
        words = f"{each.workload}, {each.program}, {each.side} for {each.target}: "
        if each.problem:
            console.print(f"[red]FAIL[/] {words}", each.problem, sep="", highlight=False, soft_wrap=True)
        elif each.refused and each.program == PROGRAMS[0]:
            console.print(words, each.refused, sep="", markup=False, highlight=False, soft_wrap=True)
    return 1 if any(each.problem for each in found) else 0


class Column(NamedTuple):
    """A column of the table: what is in a cell, given what was compiled on one side, that on flax's, and the steps."""

    title: str
    side: str
    figure: Callable[[Compiled, Compiled | None, int], str]

    def cell(self, sides: dict[str, Compiled], steps: int) -> str:
        return self.figure(sides[self.side], sides.get("flax.nnx"), steps) if self.side in sides else ""


def _columns(on_tpu: bool, present: Sequence[str]) -> list[Column]:
    def over(title: str, sides: Sequence[str], figure: Callable[[Compiled, Compiled | None, int], str]) -> list[Column]:
        return [Column(title, side, figure) for side in sides]

    def a_step(of_loop: Callable[[Loop], int]) -> Callable[[Compiled, int], float]:
        return lambda each, steps: sum(of_loop(loop) * loop.trips for loop in each.loops) / steps

    xla = [side for side in present if side != "pallas"]
    ours = [side for side in present if side != "flax.nnx"]
    copies, read = a_step(lambda loop: loop.copies), a_step(lambda loop: loop.hbm_bytes)
    columns = []
    if on_tpu:
        columns += over("M cycles", xla, lambda each, *_: f"{each.cycles / 1e6:.2f}")
        columns += over("ratio", ours[:1], lambda each, flax, _: f"{flax.cycles / each.cycles:.2f}" if flax else "")
        columns += over("bundles a step", present, lambda each, _, steps: each.bundles(steps))
    operations = "operations a step" if on_tpu else "launches a step"
    columns += over(operations, xla, lambda each, _, steps: f"{each.a_step(steps):.1f}")
    columns += over("copies", ours[:1], lambda each, _, steps: f"{copies(each, steps):.1f}")
    if on_tpu:
        columns += over("HBM kB a step", ours[:1], lambda each, _, steps: f"{read(each, steps) / 1e3:,.0f}")
        columns += over(
            "not time-major", ours[:1], lambda each, *_: str(sum(loop.not_time_major for loop in each.loops))
        )
    else:
        columns += over(
            "in a graph", ours[:1], lambda each, *_: f"{sum(loop.in_graph for loop in each.loops)} of {len(each.loops)}"
        )
    return columns + over("memory MB", present, lambda each, *_: f"{each.temporary / 1e6:.1f}")
