"""Compile workloads for accelerators that are not here, and count what their compilers made of the loops over time.

None of the counts is a time: a TPU compiler's estimate of cycles leaves out what overlaps, and puts some 2,000 on every
pointwise fusion, however small; how long a GPU's launch takes is up to its driver.
"""

import atexit
import dataclasses
import functools
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from .. import hlo
from ..compilers import TARGETS, devices
from ..hlo import Bundles
from ..tables import new_table, print_table
from .workloads import GRAPHS, Workload, implementations, training

SIDES = ("jaxrnn", "scan", "pallas", "flax.nnx")
PROGRAMS = ("forward", "training")
Key = tuple[str, str, str, str]  # the first attributes of `Compiled`


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
        target, workload, program, side: what was compiled.
        loops: the loops over time, in their order.
        temporary: the temporary memory, in bytes.
        cycles: the cycles of a TPU, see `hlo.cycles`.
        outside: the launches of a GPU outside of loops.
        problem: why it does not compile.
        refused: why the engine does not run it.
    """

    target: str
    workload: str
    program: str
    side: str
    loops: tuple[hlo.Loop, ...] = ()
    temporary: int = 0
    cycles: int = 0
    outside: int = 0
    problem: str = ""
    refused: str = ""

    def bundles(self, steps: int) -> str:
        """Bundles of all loops for each time step, with a plus where an operation has loops inside."""
        return f"{self.a_step(steps, 'bundles'):,.0f}{'+' * any(loop.at_least for loop in self.loops)}"

    def a_step(self, steps: int, attribute: str = "operations") -> float:
        return hlo.a_step(self.loops, attribute, steps)

    def total(self, attribute: str) -> int:
        return sum(getattr(loop, attribute) for loop in self.loops)


def compile_for(
    target: str, workloads: Sequence[Workload], sides: Sequence[str] = SIDES, bundles: bool = False
) -> Iterator[Compiled]:
    """Compile every workload's forward and training program on each side; with `bundles`, count those, too."""
    on_tpu = TARGETS[target][0] == "tpu"
    dumped = _dumped() if bundles and on_tpu else None
    sharding = NamedSharding(Mesh(np.array(devices(target)[:1]), "one"), PartitionSpec())

    def described(a: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jnp.shape(a), jax.dtypes.canonicalize_dtype(a.dtype), sharding=sharding)

    chosen = [side for side in SIDES if side in sides and (on_tpu or side != "pallas")]
    for workload, program in itertools.product(workloads, PROGRAMS):
        found: dict[str, list[Compiled]] = {}
        for each in implementations(workload, chosen):
            function = jax.jit(training(each.run) if program == "training" else each.run)
            arguments = jax.tree.map(described, (each.parameters, *workload.inputs()))
            key = target, workload.name, program, each.side
            found.setdefault(each.side, []).append(_compiled(key, workload.time, function, arguments, dumped))
        for compiled in found.values():  # Flax has two LSTMs: the one that takes fewer cycles, or operations
            yield min(compiled, key=lambda each: (each.problem != "", each.cycles, each.a_step(workload.time)))


@functools.cache
def _dumped() -> Path:
    """The folder to which libtpu writes the bundles of every operation. It reads the flags when it is loaded."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
    asked = "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags} {asked}"
    return folder


def _compiled(key: Key, time: int, function: Any, arguments: Any, dumps: Path | None) -> Compiled:
    on_gpu = TARGETS[key[0]][0] == "cuda"
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
        dumped = sorted(Path(launched).glob("*thunk_sequence_after_thunk_passes.txt"))
        launches, outside = hlo.launches(dumped[-1].read_text()) if dumped else ([], 0)
    text, memory = compiled.as_text() or "", compiled.memory_analysis().temp_size_in_bytes
    if on_gpu:
        pairs = zip(launches, hlo.trips(text, time), strict=False)
        loops = [dataclasses.replace(loop, trips=n) for loop, n in pairs if n]
        return Compiled(*key, tuple(loops), memory, outside=outside)
    loops = hlo.loops(text, time, {} if dumps is None else _bundles(dumps))
    return Compiled(*key, tuple(loops), memory, hlo.cycles(text, loops))


def _bundles(folder: Path) -> dict[str, Bundles]:
    """The bundles of every dumped operation by name; of a Pallas kernel, the bundles of one time step."""
    found = {}
    for path in folder.glob("*final_bundles.txt"):
        if match := re.match(r"\d+-(.*?)-\d+-final_bundles", path.name):
            found[match[1]] = _count(path.read_text(), match[1].startswith("jaxrnn_"))
        path.unlink()
    return found


def _count(dump: str, is_kernel: bool) -> Bundles:
    """Count the lines of a dump, one for each bundle, with a mark where a loop begins, and one for each loop it is in.

    The grid of a Pallas kernel is one loop. The steps of a block are the longest loop in it.
    """
    lines = [
        (begin, len(depth), 1 + sum(map(int, re.findall(r"vdelay (\d+)", text))))
        for begin, depth, text in re.findall(r"^ *(?:0x)?[0-9a-f]+ +([A-Z]{2})?: (>*)(.*)$", dump, re.M)
    ]
    whole = sum(count for *_, count in lines), any(begin == "LB" for begin, *_ in lines)
    steps = []
    for first, (begin, depth, _) in enumerate(lines):
        if is_kernel and begin == "LB" and depth == 2:
            # Some lines in a loop lack its mark, but never many.
            ends = (k for k in range(first, len(lines)) if all(d < 2 for _, d, _ in lines[k : k + 6]))
            loop = lines[first : next(ends, len(lines))]
            steps.append((sum(count for *_, count in loop), any(begin == "LB" for begin, *_ in loop[1:])))
    return Bundles(*max(steps, default=whole))


def show(found: Sequence[Compiled], workloads: Sequence[Workload], console: Console) -> int:
    """Print a table for each target, ours beside Flax's, and what failed; return the exit code."""
    steps = {workload.name: workload.time for workload in workloads}
    for target, group in itertools.groupby(found, lambda each: each.target):
        compiled = list(group)
        on_tpu = TARGETS[target][0] == "tpu"
        title = f"compiled for {target}: " + ("estimates by its compiler" if on_tpu else "launches")
        columns = _columns(on_tpu, compiled)
        headings = (f"{text if side == sides[0] else ''}\n{side}" for text, sides, _ in columns for side in sides)
        table = new_table(title, ("workload", "program"), headings)
        for (name, program), pair in itertools.groupby(compiled, lambda each: (each.workload, each.program)):
            by_side = {each.side: each for each in pair if not each.problem and not each.refused}
            cells = (
                cell(by_side[side], by_side.get("flax.nnx"), steps[name]) if side in by_side else ""
                for _, sides, cell in columns
                for side in sides
            )
            table.add_row(name, program, *cells)
        print_table(table, console)
    for each in found:
        words = f"{each.workload}, {each.program}, {each.side} for {each.target}: "
        if each.problem:
            console.print(f"[red]FAIL[/] {words}", each.problem, sep="", highlight=False, soft_wrap=True)
        elif each.refused and each.program == PROGRAMS[0]:
            console.print(words, each.refused, sep="", markup=False, highlight=False, soft_wrap=True)
    return 1 if any(each.problem for each in found) else 0


# The text of a cell, given what was compiled on its side and on Flax's, and the number of time steps.
Formatter = Callable[[Compiled, Compiled | None, int], str]


def _columns(on_tpu: bool, compiled: Sequence[Compiled]) -> list[tuple[str, list[str], Formatter]]:
    """The title, the sides and the cells of each group of columns."""
    present = [side for side in SIDES if any(each.side == side for each in compiled)]
    xla, ours = [side for side in present if side != "pallas"], [side for side in present if side != "flax.nnx"][:1]
    counted = any(loop.bundles for each in compiled for loop in each.loops)
    columns: list[tuple[bool, str, list[str], Formatter]] = [
        (on_tpu, "M cycles", xla, lambda each, *_: f"{each.cycles / 1e6:.2f}"),
        (on_tpu, "ratio", ours, lambda each, flax, _: f"{flax.cycles / each.cycles:.2f}" if flax else ""),
        (counted, "bundles a step", present, lambda each, _, steps: each.bundles(steps)),
        (
            True,
            "operations a step" if on_tpu else "launches a step",
            xla,
            lambda each, _, steps: f"{each.a_step(steps):.1f}",
        ),
        (not on_tpu, "outside", xla, lambda each, *_: str(each.outside)),
        (True, "copies", ours, lambda each, _, steps: f"{each.a_step(steps, 'copies'):.1f}"),
        (on_tpu, "HBM kB a step", ours, lambda each, _, steps: f"{each.a_step(steps, 'hbm_bytes') / 1e3:,.0f}"),
        (on_tpu, "not time-major", ours, lambda each, *_: str(each.total("not_time_major"))),
        (not on_tpu, "in a graph", ours, lambda each, *_: f"{each.total('in_graph')} of {len(each.loops)}"),
        (True, "memory MB", present, lambda each, *_: f"{each.temporary / 1e6:.1f}"),
    ]
    return [(title, sides, cell) for shown, title, sides, cell in columns if shown]
