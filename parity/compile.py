"""Compile the cases for a TPU that is not in this machine, and report the failures, the memory and the operations.

Each case is compiled for one device, and for all devices of a topology if they can share the batch; a sample also with
the hidden units sharded.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from . import hlo, sides
from .cases import Case
from .compilers import TARGETS, devices
from .tables import new_table, print_table

TARGET = "v5e"
TOPOLOGY = TARGETS[TARGET][1]["topology_name"]
# A TPU has no float64: XLA makes it of two float32, which takes long to compile. A sample shows that it can.
EXACT = re.compile(r".*-layers1-bidirectional-hx|\w+Cell\w*-hx")
# Ragged and chunked cases are compared in float64; of those that are compiled in float32 instead, a sample.
RAGGED = re.compile(r".*-layers2-.*(lengths-unsorted|packed-unsorted|sorted-sorted|mask|chunked|steps)")
# The cases that are compiled with hidden units sharded, if their number is even.
HIDDEN = re.compile(r".*-bfloat16|.*-layers2-.*lengths-unsorted")
COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\(")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        name: the case, its dtype, "forward" or "training", and the number of devices.
        memory: the temporary memory on a device, in bytes.
        operations: the operations of all loops over time, for each step.
        cycles: the estimate of the TPU's compiler, see `hlo.cycles`.
        not_time_major: arrays of all steps in loops that have another axis than time outermost.
        collectives: the number of collective operations.
        problem: why it does not compile, or which collectives it should not have.
    """

    name: str
    memory: int = 0
    operations: float = 0
    cycles: int = 0
    not_time_major: int = 0
    collectives: int = 0
    problem: str = ""


def programs(cases: Iterable[Case], dtypes: Sequence[str]) -> list[tuple[Case, str]]:
    """The cases and dtypes to compile: one of each shape, but a sample of float64."""
    chosen: dict[tuple, tuple[Case, str]] = {}
    for case in cases:
        for dtype in ("float32",) if RAGGED.fullmatch(case.name) else case.dtypes:
            if dtype in dtypes and (dtype != "float64" or EXACT.fullmatch(case.name)):
                shape = (re.sub(r"-seed\d+$", "", case.name), dtype)
                chosen.setdefault(shape, (case, dtype))
    return list(chosen.values())


def compile_all(chosen: Sequence[tuple[Case, str]]) -> Iterator[list[Program]]:
    """Compile the forward and the training program of every case, for one device and for all, in order."""
    described = devices(TARGET)

    def compile_each(entry: tuple[Case, str]) -> list[Program]:
        case, dtype = entry
        meshes = [Mesh(np.array(described[:1]), "batch")]
        packed = case.way in ("packed", "sorted")  # in whose data the rows are interleaved, and cannot be sharded
        if not packed and case.batch is not None and case.batch % len(described) == 0:
            meshes.append(Mesh(np.array(described), "batch"))
            if HIDDEN.fullmatch(case.name) and case.steps is not None and case.arguments["hidden_size"] % 2 == 0:
                meshes.append(Mesh(np.reshape(described, (-1, 2)), ("batch", "model")))
        return [_compile(case, dtype, kind, mesh) for mesh in meshes for kind in ("forward", "training")]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as executor:
        yield from executor.map(compile_each, chosen)


def _compile(case: Case, dtype: str, kind: str, mesh: Mesh) -> Program:
    name = f"{case.name} in {dtype}, {kind}" + (f" on {mesh.size} devices" if mesh.size > 1 else "")
    settings = {"hidden_axis": "model"} if "model" in mesh.axis_names else {}
    name += ", sharing hidden units" if settings else ""
    parameters, inputs, cotangents = (
        {name: array.astype(jax.numpy.dtype(dtype)) for name, array in arrays.items()} for arrays in case.arrays()
    )
    hx = sides.given_state(case, inputs, "0") if case.hx else None
    state = sides.given_state(case, cotangents, "n")

    def forward(parameters: Any, inputs: tuple, marks: Any, cotangent: Any) -> Any:
        return sides.Feed.of(case)(functools.partial(sides.call_nnx, module, parameters), inputs[0], inputs[1], marks)

    def training(parameters: Any, inputs: tuple, marks: Any, cotangent: Any) -> Any:
        returned, pullback = jax.vjp(lambda p, i: forward(p, i, marks, None), parameters, inputs)
        return returned, pullback(cotangent)

    def describe(array: Any, *parts: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            np.shape(array), array.dtype, sharding=NamedSharding(mesh, PartitionSpec(*parts if mesh.size > 1 else ()))
        )

    def described(tree: Any, batch_axis: int) -> Any:
        return jax.tree.map(lambda array: describe(array, *[None] * batch_axis, "batch"), tree)

    state_axis = 0 if case.steps is None else 1
    axis = 0 if case.arguments.get("batch_first") else state_axis
    try:
        with jax.default_matmul_precision(sides.precision()):
            built: Any = sides.build_nnx(case, dtype, parameters, **settings)
            module, parameters = built
            spec = nnx.merge(module, nnx.State(parameters)).spec
            axes = spec.hidden_axes() if settings else dict.fromkeys(parameters, ())
            states = described(state, state_axis)
            arguments = (
                {
                    name: describe(array, *("model" if hidden else None for hidden in axes[name]))
                    for name, array in parameters.items()
                },
                (described(inputs["input"], axis), described(hx, state_axis)),
                described(case.marks(), axis if case.way == "mask" else 0),
                states if case.steps is None else (described(cotangents["output"], axis), states),
            )
            function = jax.jit({"forward": forward, "training": training}[kind])
            with jax.set_mesh(mesh) if settings else contextlib.nullcontext():
                compiled = function.lower(*arguments).compile()
        memory: Any = compiled.memory_analysis()
        text, steps = compiled.as_text() or "", case.steps or 1
        loops = hlo.loops(text, steps)
        not_time_major = sum(loop.not_time_major for loop in loops)
        collectives = COLLECTIVE.findall(text)
        wrong = sorted(set(collectives) - ({"all-reduce"} if kind == "training" else set()))
        problem = f"{kind} should not need {', '.join(wrong)}" if wrong and not settings else ""
        counts = hlo.a_step(loops, "operations", steps), hlo.cycles(text, loops), not_time_major, len(collectives)
        return Program(name, memory.temp_size_in_bytes, *counts, problem)
    except Exception as problem:  # a failure is a result; the others go on
        return Program(name, problem=f"{type(problem).__name__}: {problem}".splitlines()[0])


def show(found: Sequence[Program], console: Console) -> int:
    """Print a table of the largest programs and what failed; return the exit code."""
    headings = "temporary\nmemory", "thousand\ncycles", "operations\na step", "not time-\nmajor", "collectives"
    table = new_table(f"compiled ahead of time for {TOPOLOGY}", ["the largest programs"], headings)
    for program in sorted(found, key=lambda program: -program.cycles)[:10]:
        cells = f"{program.memory:,} bytes", f"{program.cycles / 1e3:,.0f}", f"{program.operations:.1f}"
        table.add_row(program.name, *cells, str(program.not_time_major), str(program.collectives))
    print_table(table, console)
    failures = [program for program in found if program.problem]
    for program in failures:
        console.print(f"[red]FAIL[/] {program.name}: ", program.problem, sep="", highlight=False, soft_wrap=True)
    shared = sum("devices" in program.name for program in found)
    hidden = sum("hidden" in program.name for program in found)
    words = f"{len(found)} programs, forward and training, {shared} of them with the batch sharded over all devices, "
    words += f"{hidden} with hidden units as well,"
    words += f" {'do not all' if failures else 'all'} compile"
    console.print(f"{words} for {TOPOLOGY}.", style="red" if failures else "green", highlight=False)
    return 1 if failures else 0
