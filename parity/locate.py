"""Find the layer, direction, step and gates at which a wrong result first differs from the equations.

The side is run on parts of the case: the first layers, one layer by itself, one with some of its gates switched off.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import oracle
from .cases import KINDS, Case, NamedArrays
from .compare import LARGEST_ROUNDED, products_are_float32
from .sides import Side

# What counts as off, scaled by max(1, largest): above what rounding makes of any case.
_OFF = {"float64": 1e-9, "float32": 2e-5, "bfloat16": 2.0**-4, "float16": 2.0**-7}
# A mistake is recognised if with it the oracle comes as close as rounding, or this much closer than without.
_CLOSER = 0.05


@dataclasses.dataclass(frozen=True)
class Probe(Case):
    """A case whose arrays are given."""

    given: tuple[NamedArrays, NamedArrays, NamedArrays] = ({}, {}, {})

    def arrays(self) -> tuple[NamedArrays, NamedArrays, NamedArrays]:
        return self.given


@dataclasses.dataclass(frozen=True)
class Place:
    """The place where two computations first differ.

    Attributes:
        layer: the first layer whose outputs are off, from 0; None if they are not, or for a cell.
        directions: the directions of the layer that are off.
        step: the first time step that is off, in the order of the direction.
        gates: the one or two gates without which the rest is right; empty if there are none.
        cause: the known mistake that gives the same results; empty if none does.
        arrays: the results that are off, or, if none is, the gradients of the layer.
    """

    layer: int | None = None
    directions: tuple[str, ...] = ()
    step: int | None = None
    gates: tuple[str, ...] = ()
    cause: str = ""
    arrays: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = [] if self.layer is None else [f"layer {self.layer}"]
        words += [f"{' and '.join(self.directions)} direction"] if self.directions else []
        words += [] if self.step is None else [f"step {self.step}"]
        words += [f"gate{'s' * (len(self.gates) > 1)} {', '.join(self.gates)}"] if self.gates else []
        if not words or any("." in name for name in self.arrays):
            words.append(f"only {' and '.join(self.arrays)}")
        where = ", ".join(words)
        return f"first off at {where}" + (f"; it looks as if {self.cause}" if self.cause else "; no known mistake")


def locate(case: Case, side: Side, dtype: str = "float64", gradients: NamedArrays | None = None) -> Place:
    """Find where a side first differs from the equations in a case, and the known mistake that it looks like.

    Args:
        case, side, dtype: the case, and the side and dtype to run it with.
        gradients: torch's gradients by name, if they are known; the equations give only the results.
    """
    parameters, inputs, _ = case.arrays()
    truth = oracle.run(case, (parameters, inputs))
    ours = side(case, dtype)
    names = [name for name in truth if name != "layers"]
    off = tuple(name for name in names if _is_off(ours[name], truth[name], dtype))
    if not off:
        return _in_gradients(case, ours, gradients or {}, dtype)
    place = Place(cause=_cause(case, ours, truth, dtype), arrays=off)
    if case.steps is None:
        return dataclasses.replace(place, gates=_gates(case, parameters, inputs, side, dtype))
    for layer, output in enumerate(truth["layers"]):
        probe, wanted = _first_layers(case, layer + 1), _laid_out(case, output)
        found = side(probe, dtype)["output"]
        if _is_off(found, wanted, dtype):
            directions, step = _first_step(case, found, wanted, dtype)
            alone = _alone(case, layer, truth["layers"])
            gates = _gates(alone, *alone.arrays()[:2], side, dtype)
            return dataclasses.replace(place, layer=layer, directions=directions, step=step, gates=gates)
    return place


def _in_gradients(case: Case, ours: NamedArrays, truth: NamedArrays, dtype: str) -> Place:
    """The place where gradients first differ, if the results do not: in the last layer, as gradients go backward."""
    off = [name for name, array in truth.items() if _is_off(ours[name], array, dtype)]
    pattern = re.compile(rf"({'|'.join(oracle.ROLES)})(?:_l(\d+)(_reverse)?)?\.grad")
    found = [match for match in map(pattern.fullmatch, off) if match]
    if not found:
        return Place(arrays=tuple(off) or ("the gradients",))
    layer = max(int(match[2] or 0) for match in found)
    here = [match for match in found if int(match[2] or 0) == layer]
    ends = {match[3] for match in here}
    directions = tuple(word for word, end in (("forward", None), ("backward", "_reverse")) if end in ends)
    names = oracle.GATES[KINDS[case.kind].module.removesuffix("Cell")]
    gates = {
        gate
        for match in here
        if match[1] != "weight_hr"
        for gate, a, b in zip(
            names, np.split(ours[match[0]], len(names)), np.split(truth[match[0]], len(names)), strict=True
        )
        if _is_off(a, b, dtype)
    }
    return Place(
        layer=None if case.steps is None else layer,
        directions=() if case.steps is None else directions,
        gates=tuple(gate for gate in names if gate in gates) if len(gates) < len(names) else (),
        arrays=tuple(match[0] for match in here),
    )


def _limit(dtype: str) -> float:
    return _OFF[dtype] if dtype != "float32" or products_are_float32() else LARGEST_ROUNDED


def _is_off(ours: np.ndarray, wanted: np.ndarray, dtype: str) -> bool:
    scale = max(1.0, float(np.max(np.abs(wanted), initial=0)))
    return not np.max(np.abs(ours.astype(np.float64) - wanted), initial=0) <= _limit(dtype) * scale


def _distance(ours: NamedArrays, results: dict[str, Any]) -> float:
    return max(float(np.max(np.abs(ours[n].astype(np.float64) - results[n]))) for n in results if n != "layers")


def _cause(case: Case, ours: NamedArrays, truth: dict[str, Any], dtype: str) -> str:
    """The mistake with which the oracle's results equal the side's; empty if there is none."""
    without = _distance(ours, truth)
    arrays = case.arrays()[:2]
    distances = {mistake.cause: _distance(ours, oracle.run(case, arrays, mistake)) for mistake in oracle.mistakes(case)}
    if distances and min(distances.values()) < max(_limit(dtype), _CLOSER * without):
        return min(distances, key=lambda cause: distances[cause])
    if "output" in ours and not any(_is_off(ours[name], truth[name], dtype) for name in truth if name.endswith("_n")):
        kept = (ours["output"] != 0) & (np.abs(truth["output"]) > 1e-3)
        factors = ours["output"][kept] / truth["output"][kept]
        if 0 < kept.mean() < 1 and np.ptp(factors) < 1e-3 and np.min(factors) > 1:
            return "the last layer's output goes through dropout"
    return ""


def _probe(case: Case, arguments: dict[str, Any], parameters: NamedArrays, inputs: NamedArrays) -> Probe:
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(Case)}
    probe = Probe(**fields | {"arguments": {**case.arguments, **arguments}})
    cotangents = {name: np.zeros(shape) for name, shape in probe.shapes()[2].items()}
    return dataclasses.replace(probe, given=(parameters, inputs, cotangents))


def _first_layers(case: Case, count: int) -> Probe:
    """The case with its first layers only."""
    parameters, inputs, _ = case.arrays()
    directions = 1 + case.arguments["bidirectional"]
    kept = {f"_l{layer}{end}" for layer in range(count) for end in ("", "_reverse")}
    return _probe(
        case,
        {"num_layers": count},
        {name: array for name, array in parameters.items() if name[name.index("_l") :] in kept},
        {name: array if name == "input" else array[: count * directions] for name, array in inputs.items()},
    )


def _alone(case: Case, layer: int, outputs: Sequence[np.ndarray]) -> Probe:
    """One layer of the case by itself, on the inputs that the equations give it."""
    parameters, inputs, _ = case.arrays()
    directions = 1 + case.arguments["bidirectional"]
    x = inputs["input"] if layer == 0 else _laid_out(case, outputs[layer - 1])
    ends = {f"_l{layer}{end}": f"_l0{end}" for end in ("", "_reverse")}
    parameters = {
        name[: name.index("_l")] + ends[name[name.index("_l") :]]: array
        for name, array in parameters.items()
        if name[name.index("_l") :] in ends
    }
    states = {
        name: array[layer * directions : (layer + 1) * directions] for name, array in inputs.items() if name != "input"
    }
    return _probe(case, {"num_layers": 1, "input_size": x.shape[-1]}, parameters, {"input": x} | states)


def _laid_out(case: Case, output: np.ndarray) -> np.ndarray:
    """A layer's output, (time, batch, features), in the layout of the case."""
    if case.batch is None:
        return output[:, 0]
    return output.swapaxes(0, 1) if case.arguments.get("batch_first") else output


def _first_step(case: Case, found: np.ndarray, wanted: np.ndarray, dtype: str) -> tuple[tuple[str, ...], int]:
    """The directions that are off, and the first step that is, in the order of its direction."""
    time_axis = 1 if case.arguments.get("batch_first") and case.batch is not None else 0
    names = ("forward", "backward")[: 1 + case.arguments["bidirectional"]]
    steps = {}
    for name, ours, theirs in zip(
        names, np.split(found, len(names), axis=-1), np.split(wanted, len(names), axis=-1), strict=True
    ):
        pairs = zip(np.moveaxis(ours, time_axis, 0), np.moveaxis(theirs, time_axis, 0), strict=True)
        wrong = [step for step, (a, b) in enumerate(pairs) if _is_off(a, b, dtype)]
        if wrong:
            steps[name] = wrong[-1] if name == "backward" else wrong[0]
    return tuple(steps), next(iter(steps.values()))


def _gates(case: Case, parameters: NamedArrays, inputs: NamedArrays, side: Side, dtype: str) -> tuple[str, ...]:
    """The one or two gates whose rows must be zero for the side to be right; none if it is right with all rows."""
    names = oracle.GATES[KINDS[case.kind].module.removesuffix("Cell")]
    for chosen in [(), *itertools.combinations(names, 1), *itertools.combinations(names, 2)]:
        if len(chosen) == len(names) > 1:
            break
        off = {}
        for name, array in parameters.items():
            off[name] = array.copy()
            if not name.startswith("weight_hr"):
                for gate in chosen:
                    np.split(off[name], len(names))[names.index(gate)][:] = 0
        probe = _probe(case, {}, off, inputs)
        wanted, found = oracle.run(probe, (off, inputs)), side(probe, dtype)
        if not any(_is_off(found[name], wanted[name], dtype) for name in wanted if name != "layers"):
            return chosen
    return ()
