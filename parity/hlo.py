"""Read the loops over time in a program as XLA compiled it: in its optimized HLO, or in a GPU's list of launches."""

import dataclasses
import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Instructions that cost nothing, and loops, which are counted by themselves.
_FREE = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast", "after-all", "compare", "while"}
_CALLED = re.compile(r"(?:calls|to_apply|\w+_computations?)=\{?(%?[\w.\-]+(?:, %?[\w.\-]+)*)")
_KERNEL = '"tpu_custom_call"'
_SIZES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s64": 8, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}
_ARRAY = re.compile(r"\b(" + "|".join(_SIZES) + r")\[([\d,]*)\](?:\{([\d,]*)(:[^}]*)?\})?")


class Bundles(NamedTuple):
    """The number of bundles of instructions in an operation, and whether some of them run more than once."""

    number: int = 0
    at_least: bool = False


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop over time, as compiled. It counts one trip, which may make several steps, without inner loops.

    Attributes:
        trips: how often it runs; for an inner loop, in all trips of the outer one.
        operations: fusions and other operations; on a GPU, kernels and copies that are launched.
        copies: operations that only move numbers: copies, slices, transpositions.
        hbm_bytes: bytes of operands that are read from memory outside the chip. A slice counts as its own size.
        not_time_major: arrays of all steps that have another axis than time outermost.
        cycles: the estimate of the TPU's compiler; 0 on a GPU, and for Pallas kernels.
        in_graph: whether the whole loop is in a CUDA graph.
        bundles: of instructions that a TPU runs, if they were counted; waiting is not in them.
        at_least: whether an operation has a loop inside, whose bundles count once.
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


def cycles(text: str, found: Sequence[Loop]) -> int:
    """The cycles of a program by the estimate of the TPU's compiler: each loop counts as often as it runs.

    In XLA's `cost_analysis` the body of a loop counts once.
    """
    return _cycles(_computations(text).get("ENTRY", [])) + sum(loop.cycles * loop.trips for loop in found)


def a_step(found: Sequence[Loop], attribute: str, steps: int) -> float:
    """The count that an attribute of loops has, such as operations, for each time step; the loops' counts are added."""
    return sum(getattr(loop, attribute) * loop.trips for loop in found) / steps


def trips(text: str, time: int) -> list[int]:
    """How often each loop in a program's HLO runs, in their order; 0 for a loop that is not over `time` steps."""
    return [each.trips for each in _whiles(_computations(text), time)]


def loops(text: str, time: int, bundles: dict[str, Bundles] | None = None) -> list[Loop]:
    """The loops over time, and the Pallas kernels, in a program's optimized HLO.

    Args:
        text: the HLO.
        time: the number of time steps.
        bundles: the bundles of each operation by name, if they were counted.

    Returns:
        The loops and kernels in the order in which they begin.
    """
    computations, bundles = _computations(text), bundles or {}
    known: dict[str, Bundles] = {}
    found = []
    for line, body, trip_count, trips in _whiles(computations, time):
        if _KERNEL in line:
            # A kernel that is called twice is compiled once.
            name, kernel = line.removeprefix("ROOT ").split()[0].lstrip("%"), line.partition("backend_config=")[2]
            known[kernel] = bundles.get(name, known.get(kernel, Bundles()))
            found.append(Loop(trips, 0, 0, bundles=known[kernel].number, at_least=known[kernel].at_least))
        elif trips:
            found.append(_loop(body, trips, {trip_count, time} - {1}, bundles))
    return found


class While(NamedTuple):
    """A `while` in HLO, or a Pallas kernel, which is a loop over time.

    Attributes:
        line: the instruction.
        body: the lines of the computation that it repeats.
        trip_count: the trips of one run.
        trips: the trips of all runs; 0 for a loop that is neither over time nor within a loop over time.
    """

    line: str
    body: list[str]
    trip_count: int
    trips: int


def _whiles(computations: dict[str, list[str]], time: int, name: str = "ENTRY", around: int = 0) -> Iterator[While]:
    """A computation's loops, in the order in which they begin. Outer loops over time run it `around` times."""
    for line in computations.get(name, []):
        if _KERNEL in line:
            yield While(line, [], time, time)
        elif match := re.search(r" while\(.*body=%?([\w.\-]+)", line):
            count = _trip_count(line, computations)
            trips = around * max(count, 1) if around else count if count <= time else 0
            yield While(line, computations.get(match[1], []), count, trips)
            yield from _whiles(computations, time, match[1], trips)
        else:
            for called in re.findall(r"[\w.\-]+", ", ".join(_CALLED.findall(line))):
                yield from _whiles(computations, time, called, around)


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation by name. The program itself is named ENTRY."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and (match := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            lines = found["ENTRY" if match[1] else match[2]] = []
        elif line.startswith("  "):
            lines.append(line.strip())
    return found


def _trip_count(line: str, computations: dict[str, list[str]]) -> int:
    """The trip count that XLA noted, or that the condition compares with; 0 where neither is known."""
    if match := re.search(r'known_trip_count"?:\s*\{"n":\s*"(\d+)"', line):
        return int(match[1])
    if match := re.search(r"condition=%?([\w.\-]+)", line):
        numbers = [int(n) for each in computations.get(match[1], []) for n in re.findall(r"constant\((\d+)\)", each)]
        return max(numbers, default=0)
    return 0


def _loop(body: list[str], trips: int, lengths: Collection[int], bundles: dict[str, Bundles]) -> Loop:
    """Read a loop. An array holds all its steps if the first axis has one of these lengths."""
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


_CONDITION = -1  # of a loop, in the place of the loop whose body a launch is in


def launches(thunks: str) -> tuple[list[Loop], int]:
    """The loops in a GPU's list of launches, in the order in which they begin, each with 1 trip; and what is outside.

    An operation is a kernel, a library's product, or a copy. Lines belong to the last line before them that is indented
    less.
    """
    found: list[Loop] = []
    others = 0
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
            body = _CONDITION
        elif kind == "kCommandBuffer":
            in_graph = True
        elif kind in ("kDynamicSliceFusion", "kSequential") or body == _CONDITION:
            pass
        elif body is None:
            others += 1
        else:
            loop = found[body]
            copies = loop.copies + (kind == "kCopy")
            found[body] = dataclasses.replace(loop, operations=loop.operations + 1, copies=copies)
        within.append((indent, in_graph, body))
    return found, others
